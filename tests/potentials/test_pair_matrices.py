"""A symmetric matrix of species pairs: an entry and its mirror image are one number,
by which every figure is meant.

The truth is minimizing again with that number a little larger and smaller.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LONG

import mdsens as ms
from mdsens import cli
from mdsens.cli import report
from mdsens.design import Free, feature_response, fit
from mdsens.design.variables import Variables
from mdsens.potentials.parameters import Parameter
from mdsens.potentials.smoothed import smoothed
from mdsens.saddles.barriers import Barrier

PLACES = [
    [0.1, 0.2],
    [0.9, 0.3],
    [0.4, 1.0],
    [1.5, 1.6],
    [1.2, 0.9],
    [1.9, 0.2],
    [0.1, 1.7],
    [1.0, 1.9],
]
SIGMA = np.array([[1.0, 0.97], [0.97, 0.9]])
BOTH = {
    (0, 0): [[1.0, 0.0], [0.0, 0.0]],
    (0, 1): [[0.0, 1.0], [1.0, 0.0]],
    (1, 1): [[0.0, 0.0], [0.0, 1.0]],
}
LOPSIDED = {"sigma": [[0.0, 1.0], [0.0, 0.0]]}
COTANGENT = np.cos(np.arange(16.0) ** 2).reshape(8, 2)
STEP = (
    1e-5  # minima are within 2e-13 of where no force is left: 2e-8 of a derivative by differences
)
OFF = 1e-7


def discs(sigma: Any = SIGMA) -> ms.System:
    params = {"sigma": sigma, "epsilon": 1.0, "alpha": 2.0}
    return ms.System.create(PLACES, 2.2, ms.potentials.soft_sphere(), params, [0, 1] * 4)


@cache
def relaxed(index: tuple[int, int] = (0, 0), by: float = 0.0) -> ms.Equilibrium:
    if not by:
        return ms.minimize(discs(), tolerance=1e-14)
    return ms.minimize(
        relaxed().system, {"sigma": SIGMA + by * np.array(BOTH[index])}, tolerance=1e-14
    )


@cache
def lin() -> ms.Linearization:
    return ms.linearize(relaxed())


def again(observable: Any, index: tuple[int, int]) -> np.ndarray:
    """The derivative by one number, minimizing again."""
    up, down = (np.asarray(observable(relaxed(index, side))) for side in (STEP, -STEP))
    return (up - down) / (2.0 * STEP)


def of_system(observable: Any) -> Any:
    return lambda eq: observable(eq.system)


def close(found: Any, wanted: np.ndarray) -> None:
    assert np.shape(found) == np.shape(wanted)
    np.testing.assert_allclose(found, wanted, rtol=0.0, atol=OFF)


def stress(system: ms.System) -> jax.Array:
    return ms.observables.stress(system)


def bulk(m: ms.elasticity.Moduli) -> jax.Array:
    return m.bulk


@pytest.mark.parametrize("index", BOTH)
def test_a_component_is_the_derivative_by_the_one_number(index):
    label = f"sigma[{index[0]},{index[1]}]"
    mirrored = f" sigma[{index[1]} , {index[0]}]"
    of_pressure = ms.gradient(ms.observables.pressure, lin())
    results = [
        (of_pressure, of_system(ms.observables.pressure)),
        (ms.gradient(stress, lin()), of_system(stress)),
        (ms.vjp(lin(), COTANGENT), lambda eq: np.sum(COTANGENT * eq.positions)),
        (ms.elasticity.gradient(bulk, lin()), lambda eq: ms.elasticity.moduli(eq).bulk),
        (ms.modes.gradient(lin()), lambda eq: ms.modes.smallest_stiffness(eq).value),
        (ms.jacobian(lin(), "sigma"), lambda eq: eq.positions),
    ]
    for result, observable in results:
        close(result.component(label), again(observable, index))
        np.testing.assert_array_equal(result.component(label), result.component(mirrored))
    half = 0.5 if index == (0, 1) else 1.0
    np.testing.assert_allclose(
        of_pressure.value["sigma"][index], half * of_pressure.component(label), rtol=1e-12
    )


def test_the_value_is_the_cotangent_of_symmetric_changes():
    change = np.array([[0.3, -0.7], [-0.7, 1.1]])
    response, whole = ms.jvp(lin(), {"sigma": change}), ms.jacobian(lin(), "sigma")
    np.testing.assert_allclose(np.tensordot(whole.value, change, 2), response.value, atol=1e-12)
    back = ms.vjp(lin(), COTANGENT)
    assert float(np.sum(back.value["sigma"] * change)) == pytest.approx(
        float(np.sum(COTANGENT * response.value))
    )
    parts = [float(back.component(f"sigma[{a},{b}]")) * change[a, b] for a, b in BOTH]
    assert sum(parts) == pytest.approx(float(np.sum(COTANGENT * response.value)))


@LONG  # beside it: the energy's own gradient, in test_potentials.py
def test_the_composable_way_is_the_same():
    def pressure(sigma: jax.Array) -> jax.Array:
        return ms.observables.pressure(ms.equilibrate(relaxed().system, {"sigma": sigma}))

    slope = jax.grad(pressure)(jnp.asarray(SIGMA))
    close(slope[0, 1] + slope[1, 0], again(of_system(ms.observables.pressure), (0, 1)))


def test_other_parameters_are_named_by_their_components():
    found = ms.gradient(stress, lin())
    np.testing.assert_array_equal(found.component("epsilon"), found.value["epsilon"])
    stiffness = Parameter("stiffness", (4,))
    assert [stiffness.label(index) for index in stiffness.indices][3] == "stiffness[3]"
    assert float(stiffness.whole(jnp.arange(8.0).reshape(2, 4), (3,))[1]) == 7.0


def pulls(R: jax.Array, params: Any, displacement: Any) -> jax.Array:
    """Springs to the origin and a force on each coordinate:
    (3, 2) numbers, a matrix of no species pairs.
    """
    return 0.5 * jnp.sum(R**2) - jnp.sum(params["k"] * R)


def test_a_matrix_of_no_species_pairs_has_every_entry_of_its_own():
    k, alone = np.arange(6.0).reshape(3, 2), np.eye(3, 2, 1)
    eq = ms.minimize(
        ms.System.create(
            k + 0.1, None, ms.potentials.from_energy(pulls, ("k",)), {"k": k}, [0, 1, 0]
        )
    )
    at = ms.linearize(eq)
    np.testing.assert_allclose(ms.jvp(at, {"k": alone}).value, alone, atol=1e-9)  # at rest R = k
    np.testing.assert_allclose(ms.jacobian(at, "k").component("k[0,1]"), alone, atol=1e-9)
    assert float(ms.gradient(lambda s: s.positions[0, 1], at).component("k[0,1]")) == pytest.approx(
        1.0
    )
    examined = ms.certify(at, {"k": alone}).derivative
    assert examined is not None and examined.norm == pytest.approx(1.0)
    labels = [part.label for part in report.components(eq.system, "k", None)]
    assert labels == ["k[0,0]", "k[0,1]", "k[1,0]", "k[1,1]", "k[2,0]", "k[2,1]"]
    assert Variables.of(eq.system, "k").labels == tuple(labels)


def test_members_of_a_batch_have_components():
    members = [discs(), discs(SIGMA + 0.01)]
    batch = ms.minimize(ms.stack(members))
    for whole, alone in [
        (ms.vjp(batch, COTANGENT), lambda eq: ms.vjp(eq, COTANGENT)),
        (ms.jacobian(batch, "sigma"), lambda eq: ms.jacobian(eq, "sigma")),
    ]:
        wanted = [alone(eq).component("sigma[0,1]") for eq in ms.unstack(batch)]
        np.testing.assert_allclose(whole.component("sigma[0,1]"), wanted, rtol=1e-9, atol=1e-12)
    with pytest.raises(ms.InputError, match=r"dparams\['sigma'\] is 1 at \[0,1\] and 0 at \[1,0\]"):
        ms.jvp(batch, LOPSIDED)


# ── what is not symmetric is refused ──


def _free(**bounds: Any) -> Any:
    return lambda: fit(
        ms.design.Target(ms.observables.pressure, 0.1, 1e-3), discs(), {"sigma": Free(**bounds)}
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda: ms.jvp(lin(), LOPSIDED),
        lambda: ms.jvp(relaxed(), LOPSIDED),
        lambda: ms.certify(relaxed(), LOPSIDED),
        lambda: ms.elasticity.jvp(bulk, lin(), LOPSIDED),
        lambda: ms.verify.finite_difference(relaxed(), LOPSIDED),
        lambda: ms.verify.derivative_test(relaxed(), LOPSIDED),
        lambda: ms.verify.adjoint(lin(), LOPSIDED),
        lambda: ms.verify.unrolled(discs(), LOPSIDED, 3),
        lambda: ms.equilibrate(discs(), LOPSIDED),
        _free(low=[[0.5, 1e-3], [0.0, 0.5]]),
        _free(high=[[2.0, 2.0], [0.0, 2.0]]),
    ],
)
def test_a_change_that_is_not_symmetric_is_refused_in_one_sentence(call):
    with pytest.raises(ms.InputError) as caught:
        call()
    message = str(caught.value)
    assert "[0,1]" in message and "[1,0]" in message and "\n" not in message
    assert message.endswith(
        "which are the same number, that of the species 0 and 1: give both entries the same value."
    )


def test_round_off_of_a_change_is_let_be():
    nearly = {"sigma": np.array([[0.1, 0.3 * 3.0], [0.9, 0.2]])}
    assert nearly["sigma"][0, 1] != nearly["sigma"][1, 0]
    even = {"sigma": [[0.1, 0.9], [0.9, 0.2]]}
    np.testing.assert_allclose(
        ms.jvp(lin(), nearly).value, ms.jvp(lin(), even).value, rtol=1e-12, atol=1e-14
    )
    assert (
        ms.verify.finite_difference(relaxed(), nearly).disagreement(ms.jvp(lin(), nearly).value)
        < 1e-6
    )


def test_the_adjoint_identity_takes_symmetric_directions():
    assert ms.verify.adjoint(lin()).gap < 1e-9


@pytest.mark.parametrize(
    "label, message",
    [
        ("sigma", r"sigma has shape \(2, 2\): give sigma\[i,j\]"),
        ("sigma[0]", r"'sigma\[0\]' has the wrong number of indices, .* shape \(2, 2\)"),
        ("sigma[0,2]", "out of range: give indices of sigma from 0 to 1"),
        ("sigma[-1,0]", "out of range: give indices of sigma from 0 to 1"),
        ("epsilon[0]", r"epsilon has shape \(\): give epsilon"),
        ("sgima[0,1]", "this derivative is by .*, not by 'sgima': give one of the former"),
        ("sigma[0,1", "give a label, such as"),
        (3, "`component` is 3: give a label"),
    ],
)
def test_a_bad_label_is_named(label, message):
    with pytest.raises(ms.InputError, match=message):
        ms.vjp(lin(), COTANGENT).component(label)
    with pytest.raises(
        ms.InputError, match=r"along one direction, and has no components: take ms\.jacobian"
    ):
        ms.jvp(lin(), {"epsilon": 1.0}).component("epsilon")


# ── every figure that is shown ──


def test_norms_count_each_pair_once():
    found = ms.vjp(lin(), COTANGENT)
    parts = np.array([float(found.component(f"sigma[{a},{b}]")) for a, b in BOTH])
    line = next(line for line in str(found).splitlines() if "sigma" in line)
    assert f"norm {np.linalg.norm(parts):.6g} by each pair of species once" in line
    assert "once" not in next(line for line in str(found).splitlines() if "epsilon" in line)
    whole = ms.jacobian(lin(), "sigma")
    sizes = [float(np.linalg.norm(whole.component(f"sigma[{a},{b}]"))) for a, b in BOTH]
    assert f"norm {np.linalg.norm(sizes):.6g} by each pair of species once" in str(whole)


def test_a_barrier_has_components():
    slope = {"sigma": jnp.array([[1.0, 2.0], [2.0, 5.0]]), "epsilon": jnp.array(7.0)}
    wrt = (Parameter("sigma", (2, 2), True), Parameter("epsilon", ()))
    good = ms.Status.CONVERGED, ms.Status.CONVERGED
    found = Barrier(1.0, slope, slope, good, (0.0, 0.0), wrt)
    assert float(found.component("sigma[0,1]")) == 4.0 and float(found.component("epsilon")) == 7.0
    assert str(found).count(f"norm {42.0**0.5:.6g}") == 2 and "by epsilon" in str(found)


def test_the_command_line_means_the_whole_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = "\n".join(f"  [{x}, {y}]," for x, y in PLACES)
    given, table = tmp_path / "discs.toml", tmp_path / "moduli.json"
    given.write_text(
        'description = "discs"\ndimension = 2\nspecies = [4, 4]\nbox = { lengths = [2.2, 2.2] }\n'
        f'[positions]\nkind = "list"\nvalues = [\n{rows}\n]\n[potential]\nkind = "soft_sphere"\n'
        f"[parameters]\nsigma = {SIGMA.tolist()}\nepsilon = 1.0\nalpha = 2.0\n"
    )
    assert cli.main(["moduli", str(given), "--wrt", "sigma[0,1]", "--json", str(table)]) == cli.GOOD
    shown, stored = capsys.readouterr().out, json.loads(table.read_text())["derivatives"]
    eq = ms.minimize(ms.load_system(given))

    def shear(by: float) -> float:
        sigma = SIGMA + by * np.array(BOTH[0, 1])
        return float(
            ms.elasticity.moduli(ms.minimize(eq.system, {"sigma": sigma}, tolerance=1e-14)).shear
        )

    truth = (shear(STEP) - shear(-STEP)) / (2.0 * STEP)
    assert set(stored) == {"sigma[0,1]"} and stored["sigma[0,1]"]["G"] == pytest.approx(
        truth, rel=1e-5
    )
    assert float(
        ms.elasticity.gradient(lambda m: m.shear, eq).component("sigma[0,1]")
    ) == pytest.approx(truth, rel=1e-5)
    assert "sigma[0,1]" in shown


def test_design_counts_the_whole_number():
    found = feature_response(
        {"P": ms.observables.pressure}, lin(), {"sigma": Free(log=False)}, scales=[1.0]
    )
    assert found.labels == ("sigma[0,0]", "sigma[0,1]", "sigma[1,1]")
    slope = ms.gradient(ms.observables.pressure, lin())
    unit = np.abs(SIGMA).max()  # of a variable
    wanted = [unit * float(slope.component(label)) for label in found.labels]
    np.testing.assert_allclose(found.jacobian[0], wanted, rtol=1e-9)


def test_potentials_tell_their_pair_parameters():
    potential = discs().potential
    assert (
        potential.pair_parameters
        == ("sigma", "epsilon", "alpha")
        == smoothed(potential, 0.1).pair_parameters
    )
    assert ms.potentials.harmonic_bonds([[0, 1]]).pair_parameters == ()
    saved = dataclasses.asdict(ms.vjp(lin(), COTANGENT).wrt[0])
    assert set(saved) == {"name", "shape", "paired"}


def test_a_stored_derivative_keeps_its_components(tmp_path: Path):
    found = ms.vjp(lin(), COTANGENT)
    ms.io.save(tmp_path / "v.npz", found)
    again = ms.io.load(tmp_path / "v.npz")
    assert again.wrt == found.wrt
    np.testing.assert_array_equal(again.component("sigma[0,1]"), found.component("sigma[0,1]"))
