"""Parameters that are trees of arrays: the weights of a small message-passing network, everywhere
that an array goes.

The truth is a minimization at other weights, jax's own derivative, or the same energy with its
weights as one array.
"""

from __future__ import annotations

import json
import pickle
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LONG, relative

import mdsens as ms
from mdsens import InputError
from mdsens._util.lattice import nearest_image
from mdsens.cli import design_report, report
from mdsens.design import Free, Target
from mdsens.design.variables import Variables

CUTOFF = 1.6
WIDTH = 4  # features of an atom
COUNT = 14
LENGTH = 3.3


def network(edges: ms.potentials.Edges, params: Any) -> jax.Array:
    """The energy of two layers of messages, which fade as a third power at the cutoff."""
    w = params["weights"]
    r = jnp.sqrt(jnp.sum(edges.vectors**2, axis=-1))
    fade = jnp.where(edges.mask, 1.0 - r / CUTOFF, 0.0) ** 3
    scale, shift = w["embed"]

    def gathered(messages: jax.Array) -> jax.Array:
        atoms = jnp.zeros((edges.species.shape[0], WIDTH))
        return atoms.at[edges.i].add(fade[:, None] * messages)

    first, second = w["layers"]
    hidden = gathered(jnp.tanh(r[:, None] * scale + shift))
    hidden = jnp.tanh(hidden @ first["w"] + first["b"])
    hidden = jnp.tanh(gathered(hidden[edges.j]) @ second["w"] + second["b"])
    return jnp.sum(hidden @ w["out"])


def weights(seed: int = 0) -> dict[str, Any]:
    """52 numbers in a dict with a tuple, a list of dicts, and places that hold nothing."""
    rng = np.random.default_rng(seed)

    def layer() -> dict[str, np.ndarray]:
        return {"w": 0.6 * rng.standard_normal((WIDTH, WIDTH)), "b": 0.3 * rng.standard_normal(4)}

    return {
        "embed": (rng.standard_normal(WIDTH), rng.standard_normal(WIDTH)),
        "layers": [layer(), layer()],
        "out": 0.2 * rng.standard_normal(WIDTH),
        "skip": None,
        "norms": {},
    }


LABELS = [
    "weights.embed.0",
    "weights.embed.1",
    "weights.layers.0.b",
    "weights.layers.0.w",
    "weights.layers.1.b",
    "weights.layers.1.w",
    "weights.out",
]
SIZES = [4, 4, 4, 16, 4, 16, 4]
NETWORK = ms.potentials.from_edges(network, ("weights",), CUTOFF, breakpoints=(CUTOFF,))
POTENTIAL = ms.potentials.soft_sphere() + NETWORK


@cache
def start() -> ms.System:
    places = np.random.default_rng(0).uniform(0, LENGTH, (COUNT, 2))
    sigma = np.where(np.arange(COUNT) % 2, 1.15, 0.95)
    params = {"sigma": sigma, "epsilon": 1.0, "alpha": 2.0, "weights": weights()}
    return ms.System.create(places, LENGTH, POTENTIAL, params)


@cache
def minimum() -> ms.relaxation.Equilibrium:
    """A solid, stable against every strain."""
    return ms.minimize(start(), tolerance=1e-12)


@cache
def lin() -> ms.sensitivity.Linearization:
    return ms.linearize(minimum())


@cache
def change() -> dict[str, Any]:
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda v: rng.standard_normal(v.shape), weights())


def at(t: float, eq: ms.relaxation.Equilibrium | None = None) -> ms.relaxation.Equilibrium:
    """The minimum at weights + t change."""
    eq = minimum() if eq is None else eq
    moved = jax.tree.map(lambda v, dv: v + t * dv, eq.params["weights"], change())
    return ms.minimize(eq.system, {"weights": moved}, tolerance=3e-14)


def dot(a: Any, b: Any) -> float:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return sum(float(np.sum(np.asarray(x) * np.asarray(y))) for x, y in leaves(a, b))


def leaves(a: Any, b: Any) -> list[tuple[Any, Any]]:
    return list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_system_keeps_the_tree_and_names_its_leaves():
    system = start()
    kept = system.params["weights"]
    assert jax.tree.structure(kept) == jax.tree.structure(weights())
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(kept))
    text = str(system)
    assert all(f"  {label} " in text for label in LABELS)
    page = report.system("discs", system, {})
    assert "weights.layers.0.w  shape (4, 4), from -1.39502 to 0.819878" in page
    single = ms.System.create(
        np.asarray(system.positions, np.float32), LENGTH, POTENTIAL, system.params
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(single.params)} == {np.dtype("float32")}
    others = system.with_params({"weights": weights(1)})
    np.testing.assert_array_equal(others.params["weights"]["out"], weights(1)["out"])
    again = pickle.loads(pickle.dumps(system))
    assert dot(again.params["weights"], kept) == dot(kept, kept)


def test_the_response_is_that_of_minimizing_again():
    response = ms.jvp(lin(), {"weights": change()})
    h = 1e-5
    difference = (at(h).positions - at(-h).positions) / (2 * h)
    assert relative(response.value, difference - difference.mean(axis=0)) < 1e-6
    # a part of the tree alone, by zeros elsewhere
    out = {**jax.tree.map(np.zeros_like, weights()), "out": change()["out"]}
    rest = {**change(), "out": np.zeros(WIDTH)}
    parts = [ms.jvp(lin(), {"weights": part}).value for part in (out, rest)]
    np.testing.assert_allclose(sum(parts), response.value, atol=1e-12)


def test_forward_and_reverse_mode_are_adjoint():
    w = np.random.default_rng(1).standard_normal((COUNT, 2))
    w -= w.mean(axis=0)
    pulled = ms.vjp(lin(), w)
    forward = float(np.sum(w * np.asarray(ms.jvp(lin(), {"weights": change()}).value)))
    assert dot(pulled.value["weights"], change()) == pytest.approx(forward, rel=1e-10)
    assert ms.verify.adjoint(lin()).gap < 1e-10  # random changes of all parameters
    assert ms.verify.adjoint(lin(), {"weights": change()}).gap < 1e-10


def test_the_jacobian_has_a_column_for_each_number():
    jacobian = ms.jacobian(lin(), "weights")
    assert jax.tree.structure(jacobian.value) == jax.tree.structure(weights())
    for column, value in leaves(jacobian.value, weights()):
        assert column.shape == (COUNT, 2, *value.shape)
    assert jacobian.stats.residual.shape == (sum(SIZES),)
    products = [
        np.tensordot(column, dv, dv.ndim) for column, dv in leaves(jacobian.value, change())
    ]
    np.testing.assert_allclose(
        sum(products), ms.jvp(lin(), {"weights": change()}).value, atol=1e-11
    )
    one = jacobian.component("weights.layers.0.w[3,2]")
    np.testing.assert_array_equal(one, jacobian.value["layers"][0]["w"][..., 3, 2])
    unit = jax.tree.map(np.zeros_like, weights())
    unit["layers"][0]["w"][3, 2] = 1.0
    np.testing.assert_allclose(one, ms.jvp(lin(), {"weights": unit}).value, atol=1e-12)
    assert "value['weights.layers.0.w']  shape (14, 2, 4, 4), norm" in str(jacobian)
    # in parts that do not begin where a leaf does
    parts = ms.jacobian(lin(), "weights", chunk=11)
    for a, b in leaves(parts.value, jacobian.value):
        np.testing.assert_allclose(a, b, atol=1e-12)
    with pytest.raises(InputError, match=r"by weights\.embed\.0, .*, not by 'weights'"):
        jacobian.component("weights")
    with pytest.raises(InputError, match=r"give weights\.layers\.0\.w\[i,j\]"):
        jacobian.component("weights.layers.0.w")
    with pytest.raises(InputError, match="by all numbers of a tree"):
        ms.plots.sensitivity_map(lin(), jacobian)
    assert ms.plots.sensitivity_map(lin(), one) is not None


def test_the_gradient_of_the_pressure_is_that_of_minimizing_again():
    gradient = ms.gradient(ms.observables.pressure, lin())
    assert jax.tree.structure(gradient.value["weights"]) == jax.tree.structure(weights())
    h = 1e-5
    ends = [float(ms.observables.pressure(at(t).system)) for t in (h, -h)]
    slope = (ends[0] - ends[1]) / (2 * h)
    assert dot(gradient.value["weights"], change()) == pytest.approx(slope, rel=1e-6)
    assert [p.name for p in gradient.wrt if p.name not in start().params] == LABELS
    text = str(gradient)
    assert all(f"value['{label}'] " in text for label in LABELS)
    one = gradient.component("weights.out[1]")
    assert float(one) == float(gradient.value["weights"]["out"][1])


def test_jax_differentiates_the_relaxed_system_by_the_tree():
    def first(w: Any) -> jax.Array:
        relaxed = ms.equilibrate(minimum().system, {"weights": w}, tolerance=1e-12)
        return relaxed.positions[0, 1]

    by_jax = jax.grad(first)(minimum().params["weights"])
    assert jax.tree.structure(by_jax) == jax.tree.structure(weights())
    gradient = ms.gradient(lambda system: system.positions[0, 1], lin())
    for a, b in leaves(by_jax, gradient.value["weights"]):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    wrong = {**weights(), "layers": weights()["layers"][:1]}
    with pytest.raises(InputError, match=r"params\['weights\.layers'\] is a list of 1, and the "):
        ms.equilibrate(minimum().system, {"weights": wrong})


@LONG
def test_jax_differentiates_positions_forward_and_in_a_batch():
    def positions(w: Any) -> jax.Array:
        return ms.equilibrate(minimum().system, {"weights": w}, tolerance=1e-12).positions

    w = minimum().params["weights"]
    jacobian = ms.jacobian(lin(), "weights")
    for a, b in leaves(jax.jacfwd(positions)(w), jacobian.value):
        np.testing.assert_allclose(a, b, atol=1e-10)
    both = jax.tree.map(lambda v, dv: jnp.stack([v, v + 1e-3 * dv]), w, change())
    np.testing.assert_allclose(jax.vmap(positions)(both)[1], at(1e-3).positions, atol=1e-9)


def test_the_certificate_covers_the_error():
    rough = ms.minimize(start(), tolerance=1e-6)
    certificate = ms.certify(rough, {"weights": change()})
    result = certificate.derivative
    assert result is not None and certificate.status.good
    exact = np.asarray(ms.jvp(lin(), {"weights": change()}).value)
    error = relative(result.response, exact)
    assert 0.3 * error < result.error < 3.0 * error + 1e-9
    assert relative(result.corrected, exact) < 0.1 * error
    record = json.loads(json.dumps(certificate.as_dict()))["derivative"]["dparams"]
    assert set(record) == {"sigma", "epsilon", "alpha", *LABELS}
    assert record["weights.layers.1.w"] == change()["layers"][1]["w"].tolist()
    assert "norm of the response" in str(certificate)


def test_moduli_have_derivatives_by_the_tree():
    gradient = ms.elasticity.gradient(lambda m: m.shear, lin())
    h = 1e-5
    ends = [float(ms.elasticity.moduli(at(t)).shear) for t in (h, -h)]
    slope = (ends[0] - ends[1]) / (2 * h)
    assert dot(gradient.value["weights"], change()) == pytest.approx(slope, rel=1e-5)
    along = ms.elasticity.jvp(lambda m: m.shear, lin(), {"weights": change()})
    assert float(along.value) == pytest.approx(slope, rel=1e-5)


@LONG
def test_the_softest_mode_has_a_derivative_by_the_tree():
    h = 1e-5
    softest = ms.modes.gradient(lin())
    ends = [ms.modes.smallest_stiffness(at(t)).value for t in (h, -h)]
    slope = (ends[0] - ends[1]) / (2 * h)
    assert dot(softest.value["weights"], change()) == pytest.approx(slope, rel=1e-5)


@LONG
def test_finite_differences_and_the_test_of_a_potential_take_the_tree():
    difference = ms.verify.finite_difference(minimum(), {"weights": change()})
    response = ms.jvp(lin(), {"weights": change()})
    assert difference.disagreement(response.value) < 1e-7
    places = start().positions
    tested = ms.verify.potential(POTENTIAL, start().params, positions=places, box=LENGTH)
    assert tested.good and "by sigma, epsilon, alpha, weights and" in str(tested)


@LONG
def test_steps_of_a_minimizer_are_differentiated_by_the_tree():
    run = ms.verify.unrolled(start(), {"weights": change()}, steps=[50, 400], reverse=True)
    assert run.error < 1e-8 and run.reverse is not None and run.reverse.gap < 1e-10
    test = ms.verify.derivative_test(minimum(), {"weights": change()}, steps=[1e-6, 1e-7])
    assert test.errors.max() < 1e-6


@LONG
def test_a_cell_at_a_pressure_responds_to_the_tree():
    eq = ms.minimize(minimum().system, pressure=0.3, shape=True, tolerance=1e-11)
    at_pressure = ms.linearize(eq)
    direction = {"weights": change(), "pressure": 0.1}
    response = ms.jvp(at_pressure, direction)
    difference = ms.verify.finite_difference(eq, direction, 5e-6)
    assert difference.disagreement(response.value) < 1e-6
    assert ms.verify.adjoint(at_pressure).gap < 1e-10
    jacobian = ms.jacobian(at_pressure, "weights")
    assert jacobian.strain is not None
    assert jax.tree.structure(jacobian.strain) == jax.tree.structure(weights())
    unit = {**jax.tree.map(np.zeros_like, weights()), "out": np.eye(WIDTH)[1]}
    column = ms.jvp(at_pressure, {"weights": unit})
    one = jacobian.component("weights.out[1]")
    np.testing.assert_allclose(one.positions, column.positions, atol=1e-11)
    assert column.strain is not None
    np.testing.assert_allclose(one.strain, column.strain, atol=1e-11)
    assert "value.strain['weights.out']" in str(jacobian)
    certificate = ms.certify(at_pressure, direction)
    assert certificate.derivative is not None and certificate.derivative.error < 1e-8


@LONG
def test_a_minimum_under_constraints_responds_to_the_tree():
    pin = ms.constraints.Pinned.particles([0], COUNT, 2)
    bond = ms.constraints.RigidBonds.between([[1, 2]])
    places = minimum().positions
    length = 1.02 * np.linalg.norm(nearest_image(places[1] - places[2], jnp.eye(2) * LENGTH))
    params = {**start().params, "bond_length": length}
    system = ms.System.create(places, LENGTH, POTENTIAL, params, constraints=[pin, bond])
    constrained = ms.linearize(ms.minimize(system, tolerance=1e-12))
    response = ms.jvp(constrained, {"weights": change()})
    again = ms.verify.finite_difference(constrained.equilibrium, {"weights": change()})
    assert again.disagreement(response.value) < 1e-7
    assert ms.verify.adjoint(constrained).gap < 1e-10
    jacobian = ms.jacobian(constrained, "weights")
    assert jacobian.multipliers is not None
    unit = {**jax.tree.map(np.zeros_like, weights()), "out": np.eye(WIDTH)[1]}
    column = ms.jvp(constrained, {"weights": unit}).value
    for a, b in leaves(jacobian.component("weights.out[1]"), column):
        np.testing.assert_allclose(a, b, atol=1e-12)


@LONG
def test_a_barrier_has_derivatives_by_the_tree():
    saddle = ms.find_saddle(minimum())
    result = ms.barrier(minimum(), saddle, {"weights": change()})
    h = 1e-5
    ends = []
    for t in (h, -h):
        there = at(t)
        above = ms.find_saddle(saddle.system, there.params)
        ends.append(ms.barrier(there, above))
    slope = (ends[0].value - ends[1].value) / (2 * h)
    assert dot(result.gradient["weights"], change()) == pytest.approx(slope, rel=1e-5)
    assert result.second is not None
    rates = jax.tree.map(lambda a, b: (a - b) / (2 * h), ends[0].gradient, ends[1].gradient)
    for a, b in leaves(result.second["weights"], rates["weights"]):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert float(result.component("weights.out[1]")) == float(result.gradient["weights"]["out"][1])
    assert "second, by weights.layers.0.w" in str(result)
    others = ms.minimize(
        minimum().system, {"weights": weights(0) | {"out": 0.9 * weights()["out"]}}
    )
    with pytest.raises(InputError, match=r"differ in weights\.out"):
        ms.barrier(others, saddle)


@LONG
def test_a_batch_of_systems_with_weights_of_their_own():
    members = [minimum(), at(1e-2)]
    batch = ms.stack([eq.system for eq in members])
    assert batch.params["weights"]["layers"][0]["w"].shape == (2, WIDTH, WIDTH)
    together = ms.minimize(batch, tolerance=1e-12)
    w = np.random.default_rng(1).standard_normal((COUNT, 2))
    w -= w.mean(axis=0)
    several = jax.tree.map(lambda v: np.stack([v, 2.0 * v]), change())
    shared = ms.jvp(together, {"weights": change()})
    apart = ms.jvp(together, {"weights": several})
    pulled = ms.vjp(together, w)
    slopes = ms.gradient(ms.observables.pressure, together)
    jacobian = ms.jacobian(together, "weights")
    for k, eq in enumerate(members):
        one = ms.linearize(eq)
        response = ms.jvp(one, {"weights": change()}).value
        np.testing.assert_allclose(shared.value[k], response, atol=1e-8)
        np.testing.assert_allclose(apart.value[k], (k + 1) * response, atol=1e-8)
        for got, expected in (
            (pulled.value["weights"], ms.vjp(one, w).value["weights"]),
            (slopes.value["weights"], ms.gradient(ms.observables.pressure, one).value["weights"]),
            (jacobian.value, ms.jacobian(one, "weights").value),
        ):
            for a, b in leaves(got, expected):
                np.testing.assert_allclose(a[k], b, atol=1e-8)
    assert jacobian.component("weights.out[1]").shape == (2, COUNT, 2)
    with pytest.raises(InputError, match=r"dparams\['weights\.out'\] has shape \(3,\)"):
        ms.jvp(together, {"weights": {**change(), "out": np.ones(3)}})


def test_a_design_reaches_its_target_by_the_weights():
    wanted = 1.02 * float(ms.observables.pressure(minimum().system))
    free = {"weights": Free(low=-3.0, high=3.0)}
    design = ms.design.fit(Target("pressure", wanted, 1e-6), minimum().system, free)
    assert design.status.good and abs(design.values[0] - wanted) < 1e-6
    assert design.labels[3] == "weights.embed.0[3]" and len(design.labels) == sum(SIZES)
    assert jax.tree.structure(design.params["weights"]) == jax.tree.structure(weights())
    again = ms.minimize(start(), design.params, tolerance=1e-12)
    there = ms.observables.pressure(design.equilibrium.system)
    assert float(there) == pytest.approx(wanted, abs=1e-6)
    assert again.code.dtype == np.int32
    assert "weights.layers.0.w" in str(design)
    written = json.loads(json.dumps(design_report.as_dict(design)))["parameters"]
    assert list(written) == LABELS
    assert ms.plots.design_history(design) is not None
    features = ms.design.feature_response(["pressure"], lin(), "weights")
    slopes = ms.gradient(ms.observables.pressure, lin()).value["weights"]
    along = features.change("pressure")["weights"]
    assert dot(slopes, along) == pytest.approx(1.0, rel=1e-9)


def test_bounds_and_free_components_of_single_arrays():
    only = jax.tree.map(lambda v: np.zeros(v.shape, bool), weights())
    only["out"][:2] = True
    low = {**jax.tree.map(lambda v: None, weights()), "out": [-1.0, -2.0, -1.0, -1.0]}
    variables = Variables.of(start(), {"weights": Free(only=only, low=low, high=2.0)})
    assert variables.labels == ("weights.out[0]", "weights.out[1]")
    scale = np.abs(weights()["out"]).max()
    np.testing.assert_allclose(variables.low, [-1.0 / scale, -2.0 / scale])
    np.testing.assert_allclose(variables.high, 2.0 / scale)
    assert not variables.log.any()  # though these two are positive: other weights are not
    params = variables.params(variables.x + 0.1)
    moved = jax.tree.map(lambda a, b: np.asarray(a) - b, params["weights"], weights())
    np.testing.assert_allclose(moved["out"], [0.1 * scale, 0.1 * scale, 0.0, 0.0], atol=1e-15)
    assert not any(np.any(v) for v in jax.tree.leaves({**moved, "out": 0.0}))
    with pytest.raises(InputError, match=r"free\['weights'\]\.low\['weights'\] is a dict with out"):
        Variables.of(start(), {"weights": Free(low={"out": 0.0})})
    with pytest.raises(InputError, match=r"free\.weights\.embed\.0: the bounds 0 to inf do not"):
        Variables.of(start(), {"weights": Free(low=0.0)})


def test_a_file_holds_the_tree(tmp_path):
    path = tmp_path / "minimum.npz"
    ms.io.save(path, minimum())
    again = ms.io.load(path, potential=POTENTIAL)
    kept = minimum().params["weights"]
    assert jax.tree.structure(again.params["weights"]) == jax.tree.structure(kept)
    for a, b in leaves(again.params, minimum().params):
        np.testing.assert_array_equal(a, b)
    direction = {"weights": change()}
    np.testing.assert_array_equal(ms.jvp(again, direction).value, ms.jvp(lin(), direction).value)
    assert list(ms.io.read_header(path)["parameters"])[3:] == LABELS
    for result in (
        ms.gradient(ms.observables.pressure, lin()),
        ms.jacobian(lin(), "weights"),
    ):
        ms.io.save(path, result)
        back = ms.io.load(path)
        assert str(back) == str(result)
        label = "weights.layers.0.w[3,2]"
        np.testing.assert_array_equal(back.component(label), result.component(label))


class Layer(NamedTuple):
    w: Any
    b: Any


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (Layer(np.ones(2), 1.0), r"system\.params\.weights is a Layer, which cannot be stored: "),
        ({0: np.ones(2)}, r"system\.params\.weights has the key 0, which is no text"),
    ],
)
def test_a_file_holds_no_other_kind_of_node(tree, message, tmp_path):
    potential = ms.potentials.from_energy(lambda R, p, d: jnp.sum(R) * 0.0, ("weights",))
    system = ms.System.create(np.eye(2), None, potential, {"weights": tree})
    assert jax.tree.structure(system.params["weights"]) == jax.tree.structure(tree)
    with pytest.raises(
        InputError, match=message.replace("system.", "", 1).replace("system\\.", "")
    ):
        ms.io.save(tmp_path / "system.npz", system)


def test_atoms_and_their_calculator_take_the_tree():
    system = minimum().system
    atoms = ms.io.to_ase(system)
    atoms.calc = ms.io.as_calculator(system)
    energy = float(ms.observables.energy(system))
    assert atoms.get_potential_energy() == pytest.approx(energy, rel=1e-12)
    again = ms.io.from_ase(atoms, POTENTIAL, system.params, dimension=2)
    assert float(ms.observables.energy(again)) == pytest.approx(energy, rel=1e-10)


def crowd(vectors: Any, mask: Any, species_i: Any, species_j: Any, params: Any) -> Any:
    """A pair repulsion and an attraction to a density, by a tree of a tuple and a dict."""
    strength, form = params["form"]
    r = jnp.sqrt(jnp.sum(vectors**2, axis=-1))
    fade = jnp.where(mask, 1.0 - r / 2.2, 0.0) ** 3
    density = jnp.sum(fade * jnp.exp(-form["decay"] * r))
    repulsion = jnp.sum(fade * (params["sigma"][species_i, species_j] / r) ** 6)
    return strength[0] * repulsion - strength[1] * density / (1.0 + density)


LOCAL = ms.potentials.from_local(
    crowd, ("sigma", "form"), 2.2, breakpoints=(2.2,), shapes={"sigma": "pair"}, positive=("form",)
)
FORM = (np.array([1.0, 20.0]), {"decay": 1.0})


@cache
def cluster() -> ms.relaxation.Equilibrium:
    """Nine atoms in free space, and a tenth out of their reach."""
    sites = 1.3 * np.stack(np.meshgrid(*[np.arange(3.0)] * 2), -1).reshape(-1, 2)
    noise = 0.1 * np.random.default_rng(2).standard_normal(sites.shape)
    places = np.concatenate([sites + noise, [[20.0, 20.0]]])
    params = {"sigma": 1.0, "form": FORM}
    return ms.minimize(ms.System.create(places, None, LOCAL, params), tolerance=1e-11)


def test_a_potential_of_surroundings_takes_a_tree():
    eq = cluster()
    direction = {"form": (np.array([0.0, 1.0]), {"decay": 0.3}), "sigma": 0.1}
    response = ms.jvp(eq, direction)
    h = 1e-6

    def relaxed(t: float) -> np.ndarray:
        strength, form = FORM
        moved = (strength + t * direction["form"][0], {"decay": form["decay"] + 0.3 * t})
        params = {"form": moved, "sigma": 1.0 + 0.1 * t}
        positions = ms.minimize(eq.system, params, tolerance=1e-12).positions
        return np.asarray(positions)

    null = ms.linearize(eq).null
    difference = jnp.asarray((relaxed(h) - relaxed(-h)) / (2 * h))
    projected = null.project(ms.Unknowns(difference)).positions
    assert relative(response.value, projected) < 1e-6
    certificate = ms.certify(eq, direction)
    assert certificate.derivative is not None
    assert certificate.rattlers.tolist() == [False] * 9 + [True]
    assert certificate.derivative.on_rattlers == 0.0  # weights belong to no atom


def made(tree: Any, potential: Any = NETWORK, name: str = "weights", **others: Any) -> ms.System:
    places = np.asarray(start().positions)
    return ms.System.create(places, LENGTH, potential, {name: tree, **others})


def with_leaf(leaf: Any) -> dict[str, Any]:
    return {**weights(), "layers": [{"w": leaf, "b": np.zeros(4)}]}


CLOSE_OVER = r": keep arrays of floating-point numbers alone in the tree, and close over the rest\."


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: made(with_leaf(jnp.tanh)), r"weights\.layers\.0\.w is .*" + CLOSE_OVER),
        (lambda: made(with_leaf("tanh")), r"weights\.layers\.0\.w is 'tanh'" + CLOSE_OVER),
        (lambda: made(with_leaf(3)), r"weights\.layers\.0\.w is 3, of type int64" + CLOSE_OVER),
        (lambda: made(with_leaf(True)), r"weights\.layers\.0\.w is True" + CLOSE_OVER),
        (lambda: made(with_leaf(1j)), r"weights\.layers\.0\.w is 1j" + CLOSE_OVER),
        (
            lambda: made(with_leaf(np.array([[0.0, 1.0], [np.nan, 0.0]]))),
            r"parameter weights\.layers\.0\.w\[1, 0\] is nan: give a finite number\.",
        ),
        (lambda: made({1: 1.0, "a": 2.0}), "weights is no tree of jax .* dict keys of one kind"),
        (
            lambda: made({"a.b": 1.0, "a": {"b": 2.0}}),
            r"two arrays of the parameters are called weights\.a\.b: rename a key",
        ),
        (
            lambda: made(weights(), ms.potentials.soft_sphere(), "sigma", epsilon=1.0, alpha=2.0),
            "sigma is a tree, a dict with embed, .*, and soft_sphere takes one array: give an arr",
        ),
        (
            lambda: made(
                {"a": 1.0}, ms.potentials.eam(0.1, 0.1, 1.0), "pair", embedding=1.0, density=1.0
            ),
            "parameter pair is a tree, a dict with a, and eam takes one array",
        ),
        (
            lambda: made(weights(), NETWORK, "weight"),
            "network has no parameter 'weight' .*: did you mean 'weights'",
        ),
        (
            lambda: ms.System.create(np.eye(2), None, LOCAL, {"sigma": {"a": 1.0}, "form": FORM}),
            "sigma is a tree, a dict with a, and crowd takes one array",
        ),
        (
            lambda: ms.System.create(
                np.eye(2),
                None,
                LOCAL,
                {"sigma": 1.0, "form": (np.array([1.0, 0.0]), {"decay": 1.0})},
            ),
            r"parameter form\.0\[1\] is 0\.0: give a positive number",
        ),
        (
            lambda: ms.jvp(lin(), {"weights": {**change(), "out": np.ones(3)}}),
            r"dparams\['weights\.out'\] has shape \(3,\): the parameter has \(4,\); give a change",
        ),
        (
            lambda: ms.jvp(lin(), {"weights": np.ones(52)}),
            r"dparams\['weights'\] is an array of shape \(52,\), and the parameter has a dict ",
        ),
        (
            lambda: ms.jvp(lin(), {"weights": {**change(), "embed": list(change()["embed"])}}),
            r"dparams\['weights\.embed'\] is a list of 2, and the parameter has a tuple of 2 there",
        ),
        (
            lambda: ms.jvp(lin(), {"weights": {**change(), "skip": 1.0}}),
            r"dparams\['weights\.skip'\] is 1\.0, and the parameter has None there: give a ",
        ),
        (
            lambda: ms.certify(lin(), {"weights": {"out": change()["out"]}}),
            r"dparams\['weights'\] is a dict with out, and the parameter has a dict with embed, ",
        ),
        (
            lambda: ms.jvp(lin(), {"weights": {**change(), "out": np.array([1.0, 0, 0, np.inf])}}),
            r"dparams\['weights\.out'\] is not finite",
        ),
        (
            lambda: ms.jacobian(lin(), "weights.out"),
            r"'weights\.out' is no parameter of soft_sphere \+ network: did you mean 'weights'",
        ),
    ],
)
def test_what_is_wrong_is_named_by_its_path(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_constraint_takes_no_tree():
    fixed = ms.constraints.FixedTotal("weights")
    with pytest.raises(InputError, match=r"weights is a tree, .* and the constraint .* takes one"):
        ms.System.create(
            start().positions,
            LENGTH,
            NETWORK,
            {"weights": weights(), **dict.fromkeys(fixed.parameters, 1.0)},
            constraints=fixed,
        )


def test_a_list_of_arrays_is_a_tree_and_one_of_numbers_an_array():
    def energy(R: jax.Array, p: Any, displacement: Any) -> jax.Array:
        return 0.5 * jnp.sum((p["k"][0] @ R.T) ** 2) + 0.5 * jnp.sum(p["m"][1] * R**2)

    potential = ms.potentials.from_energy(energy, ("k", "m"))

    def system(k: Any, m: Any) -> ms.System:
        return ms.System.create(np.eye(2), None, potential, {"k": k, "m": m})

    rows = system([np.ones((1, 2)), np.ones((1, 2))], [1.0, 2.0])
    assert isinstance(rows.params["k"], list) and rows.params["m"].shape == (2,)
    whole = system(np.ones((2, 1, 2)), (1.0, 2.0))
    assert whole.params["k"].shape == (2, 1, 2) and whole.params["m"].shape == (2,)
    assert float(ms.observables.energy(rows)) == float(ms.observables.energy(whole))
    # a potential of pairs takes a list of rows as the matrix that it is
    pairs = ms.System.create(
        np.array([[0.0, 0.0], [0.9, 0.0]]),
        None,
        ms.potentials.soft_sphere(),
        {"sigma": [np.array([1.0, 1.1]), np.array([1.1, 1.0])], "epsilon": 1.0, "alpha": 2.0},
        [0, 1],
    )
    assert pairs.params["sigma"].shape == (2, 2)
