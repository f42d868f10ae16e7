"""Constraints against closed forms, minimizing again under them,
and the catalogue's own conditions.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LONG, quick

import mdsens as ms
from mdsens._util.progress import Decades
from mdsens.constraints import FixedTotal, Pinned, RigidBonds, Simplex, Wall
from mdsens.mechanics import kkt_factor
from mdsens.mechanics.unknowns import Unknowns
from mdsens.relaxation import _augmented_lagrangian
from mdsens.verify import finite_differences as differences

N = 16


def _discs(seed: int = 0, n: int = N, d: int = 2, side: float = 3.6):
    rng = np.random.default_rng(seed)
    diameters = np.where(np.arange(n) < n // 2, 1.0, 1.2)
    return rng.uniform(0, side, (n, d)), {"sigma": diameters, "epsilon": 1.0, "alpha": 2.0}


def _breathing(R, p, displacement):
    """What it costs a particle to have another diameter than it prefers."""
    return 0.5 * p["kappa"] * jnp.sum((p["sigma"] - p["preferred"]) ** 2)


def _alloy(R, p, displacement):
    """Mean field of a binary alloy whose sites relax:
    pairs by the weights on both, and mixing entropy.
    """
    i, j = np.triu_indices(R.shape[0], 1)
    r = jnp.sqrt(jnp.sum(jax.vmap(displacement)(R[i], R[j]) ** 2, axis=-1))
    size = 0.5 * (p["size"][:, None] + p["size"][None])
    each = jnp.sum(
        p["weights"][i][:, :, None]
        * p["weights"][j][:, None]
        * jnp.exp(-((r[:, None, None] / size) ** 2)),
        0,
    )
    w = p["weights"]
    return jnp.sum(each) + p["temperature"] * jnp.sum(w * jnp.log(jnp.where(w > 0, w, 1.0)))


@cache
def system(name: str) -> ms.System:
    x, params = _discs()
    soft = ms.potentials.soft_sphere()
    match name:
        case "bonds and pins in a slit":
            held = [
                RigidBonds.between([[2 * k, 2 * k + 1] for k in range(4)]),
                Pinned.particles([12], N, 2),
                Pinned.particles([13], N, 2, axes=[0], name="rail"),
                Wall(1, True, "floor", 1.0),
                Wall(1, False, "lid", 1.0),
            ]
            given = {
                **params,
                "bond_length": np.linspace(0.75, 0.9, 4),
                "floor_position": 0.0,
                "lid_position": 3.5,
            }
            return ms.System.create(x, [3.6, 5.5], soft, given, constraints=held)
        case "a container":
            walls = [Wall(k // 2, k % 2 == 0, f"wall{k}", 1.0) for k in range(4)]
            given = {**params, **{f"wall{k}_position": 3.6 * (k % 2) for k in range(4)}}
            return ms.System.create(x, None, soft, given, constraints=walls)
        case "breathing discs":
            potential = soft + ms.potentials.from_energy(
                _breathing, ("sigma", "preferred", "kappa"), shared=("sigma",), name="breathing"
            )
            total = FixedTotal("sigma", 2.0, "area")
            given = {**params, "preferred": params["sigma"], "kappa": 0.5}
            given["area_total"] = float(total.total_of(params["sigma"], 2))
            return ms.System.create(x, 4.0, potential, given, constraints=[total])
        case "an alloy":
            potential = ms.potentials.from_energy(
                _alloy, ("weights", "size", "temperature"), name="alloy"
            )
            rng = np.random.default_rng(3)
            weights = rng.uniform(0.2, 0.8, (6, 1)) * [1.0, -1.0] + [0.0, 1.0]
            given = {"weights": weights, "size": np.array([0.9, 1.4]), "temperature": 0.4}
            place = np.stack(np.meshgrid(np.arange(3.0), np.arange(2.0)), -1).reshape(-1, 2)
            return ms.System.create(
                place + rng.uniform(-0.1, 0.1, (6, 2)),
                8.0,
                potential,
                given,
                constraints=[Simplex("weights"), Pinned.particles([0, 5], 6, 2)],
            )
        case "rigid bodies in 3-D":
            rng = np.random.default_rng(1)
            corners = (
                np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1.0], [0.7, 0.7, 0.7]]) * 0.7
            )
            places = np.concatenate(
                [corners + shift for shift in ([0, 0, 0], [1.3, 0.2, 0.1], [0.2, 1.4, 0.9])]
            )
            places += rng.uniform(-0.02, 0.02, places.shape)
            bodies = RigidBonds.bodies(places, [range(5), range(5, 10), range(10, 15)])
            given = {
                "sigma": 1.0,
                "epsilon": 1.0,
                "alpha": 2.0,
                "bond_length": bodies.lengths_of(places),
            }
            return ms.System.create(places, 2.3, soft, given, constraints=[bodies])
    raise KeyError(name)


@cache
def minimum(name: str) -> ms.Equilibrium:
    return ms.minimize(system(name))


NAMES = (
    "bonds and pins in a slit",
    "a container",
    "breathing discs",
    "an alloy",
    pytest.param("rigid bodies in 3-D", marks=LONG),
)


def direction(lin, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {k: 0.3 * rng.normal(size=v.shape) for k, v in lin.params.items() if k not in ("alpha",)}


@pytest.mark.parametrize("name", quick(NAMES, "bonds and pins in a slit", "breathing discs"))
def test_derivative_is_that_of_minimizing_again(name):
    eq = minimum(name)
    lin = ms.linearize(eq)
    system: Any = lin.factor
    assert system.negative[0] == 0 and system.redundant == 0
    change = direction(lin)
    r = ms.jvp(lin, change)
    again = ms.verify.finite_difference(eq, change)
    assert again.status.good and not again.network_changed
    # positions, multipliers and relaxed parameters, each relative
    assert again.disagreement(r.value) < 1e-6
    assert set(r.value.multipliers) == {c.name for c in eq.system.constraints}


@pytest.mark.parametrize("name", NAMES)
def test_reverse_is_the_transpose_of_forward(name):
    lin = ms.linearize(minimum(name))
    change, rng = direction(lin), np.random.default_rng(2)
    r = ms.jvp(lin, change)
    w = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), r.value)
    g = ms.vjp(lin, w, throw=False)
    assert g.status.good
    left = sum(
        float(jnp.sum(a * b))
        for a, b in zip(jax.tree.leaves(w), jax.tree.leaves(r.value), strict=True)
    )
    right = sum(float(jnp.sum(g.value[k] * change[k])) for k in change)
    assert abs(left - right) < 1e-9 * max(abs(left), 1.0)


def test_iterative_solvers_give_the_same():
    lin = ms.linearize(minimum("bonds and pins in a slit"))
    change = direction(lin)
    exact = ms.jvp(lin, change).value
    for solve in (ms.implicit.GMRES(rtol=1e-12), ms.implicit.MINRES(rtol=1e-12)):
        found = ms.jvp(lin, change, solve=solve)
        for a, b in zip(jax.tree.leaves(found.value), jax.tree.leaves(exact), strict=True):
            assert np.abs(a - b).max() < 1e-8


@pytest.mark.parametrize("name", ["bonds and pins in a slit", "breathing discs"])
def test_gradient_of_the_energy_needs_the_multipliers_alone(name):
    eq = minimum(name)
    g = ms.gradient(ms.observables.energy, eq).value
    for c in eq.system.constraints:  # dU*/dp = dL/dp
        if isinstance(c, RigidBonds):
            assert np.allclose(g[c.length], -eq.multipliers[c.name], rtol=0, atol=1e-10)
        if isinstance(c, FixedTotal):
            assert np.allclose(g[c.total], -eq.multipliers[c.name], rtol=0, atol=1e-10)
        if isinstance(c, Wall):  # a wall that goes the way it pushes does work
            work = jnp.sum(eq.multipliers[c.name]) * (1 if c.above else -1)
            assert np.allclose(g[c.position], work, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["bonds and pins in a slit", "an alloy"])
def test_certificate(name):
    eq = minimum(name)
    lin = ms.linearize(eq)
    c = ms.certify(lin, direction(lin))
    assert (
        c.status.good
        and c.stiffness_min > 0
        and c.negative_modes == 0
        and c.constraints is not None
    )
    assert c.error < 1e-6 and 0 < c.radius < np.inf
    residual = np.linalg.norm
    mode = c.spectrum.vectors[:, 0]
    assert c.spectrum.residuals[0] < 1e-6 * c.stiffness_max and abs(residual(mode) - 1) < 1e-9
    for text in ("constraints", "largest multipliers"):
        assert text in str(c)
    assert c.as_dict()["constraints"]["redundant"] == 0


def test_radius_ends_where_the_wall_lets_go():
    """Pushed out of reach, a wall loses its particles one by one:
    the first goes where the certificate says.
    """
    eq = minimum("bonds and pins in a slit")
    lin = ms.linearize(eq)
    change = {"floor_position": np.asarray(-1.0)}
    c: Any = ms.certify(lin, change)
    t = c.derivative.switch[0]
    assert 0 < t < np.inf
    touching = [
        int(
            np.sum(
                np.asarray(ms.minimize(eq.system, {"floor_position": -s * t}).multipliers["floor"])
                > 0
            )
        )
        for s in (0.9, 1.1)
    ]
    before = int(np.sum(np.asarray(eq.multipliers["floor"]) > 0))
    assert c.radius < t or touching == [before, before - 1]


# ── closed forms ──


def _column(ceiling: float, **held):
    """A spring of length 1 and stiffness k = 2 that stands on the ground, under a ceiling."""
    potential = ms.potentials.harmonic_bonds([[0, 1]])
    walls = [
        Pinned.particles([0], 2, 2),
        Pinned.particles([1], 2, 2, axes=[0], name="rail"),
        Wall(1, False, "lid"),
    ]
    params = {"stiffness": 2.0, "length": 1.0, "lid_position": ceiling}
    return ms.System.create([[0.0, 0.0], [0.0, 0.6]], None, potential, params, constraints=walls)


def test_a_spring_under_a_ceiling():
    eq = ms.minimize(_column(0.8))
    assert np.allclose(eq.positions, [[0, 0], [0, 0.8]], atol=1e-14)
    assert np.allclose(eq.multipliers["lid"], [0, 0.4]) and np.allclose(
        eq.multipliers["pinned"], [[0, 0.4], [0, 0]]
    )
    r = ms.jvp(eq, {"lid_position": 1.0, "length": 0.5, "stiffness": 0.0})
    assert np.allclose(r.value.positions, [[0, 0], [0, 1]], atol=1e-14)
    assert np.allclose(r.value.multipliers["lid"], [0, -2.0 + 1.0])  # k (length - height)
    assert np.allclose(r.value.multipliers["pinned"], [[0, -1.0], [0, 0]])
    free = ms.jvp(ms.minimize(_column(1.3)), {"lid_position": 1.0, "length": 0.5})
    assert np.allclose(free.value.positions, [[0, 0], [0, 0.5]]) and not np.any(
        free.value.multipliers["lid"]
    )


def test_a_ceiling_that_just_touches_is_degenerate():
    eq = ms.minimize(_column(1.0))
    with pytest.raises(ms.ConvergenceError, match="about to open or close"):
        ms.jvp(eq, {"lid_position": 1.0})
    lin = ms.linearize(eq, throw=False)
    assert ms.Status(int(lin.status)) is ms.Status.DEGENERATE_CONSTRAINT
    c: Any = ms.certify(eq)
    assert c.status is ms.Status.DEGENERATE_CONSTRAINT and c.constraints.switching == 1


def test_a_rod_between_a_pin_and_a_spring():
    """Tension of a rigid bond of length l, pulled by a spring of length a at distance L:
    k (L - l - a).
    """
    potential = ms.potentials.harmonic_bonds([[1, 2]])
    held = [Pinned.particles([0, 2], 3, 2), RigidBonds.between([[0, 1]])]
    params = {"stiffness": 3.0, "length": 0.5, "bond_length": 1.0}
    s = ms.System.create(
        [[0.0, 0], [1.0, 0.1], [2.0, 0]], None, potential, params, constraints=held
    )
    eq = ms.minimize(s)
    assert np.allclose(eq.multipliers["bond"], [1.5], atol=1e-10) and np.allclose(
        eq.positions[1], [1, 0], atol=1e-10
    )
    r = ms.jvp(eq, {"bond_length": 1.0, "length": 0.0, "stiffness": 0.0})
    assert np.allclose(r.value.multipliers["bond"], [-3.0]) and np.allclose(
        r.value.positions[1], [1, 0], atol=1e-12
    )
    assert np.allclose(ms.jvp(eq, {"stiffness": 1.0}).value.multipliers["bond"], [0.5])


def test_redundant_constraints_are_reported():
    """A square of four with both diagonals: six bonds, five of which make it rigid in the plane."""
    x = np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    bonds = RigidBonds.between([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2], [1, 3]])
    params = {"sigma": 1.05, "epsilon": 1.0, "alpha": 2.0, "bond_length": bonds.lengths_of(x)}
    eq = ms.minimize(
        ms.System.create(x, None, ms.potentials.soft_sphere(), params, constraints=[bonds])
    )
    with pytest.raises(ms.ConvergenceError, match="repeat others"):
        ms.linearize(eq)
    lin = ms.linearize(eq, throw=False)
    c: Any = ms.certify(eq)
    assert (
        c.constraints.redundant == 1
        and c.status is ms.Status.REDUNDANT_CONSTRAINTS
        and "1 of 6 equations" in " ".join(str(c).split())
    )
    assert len(RigidBonds.bodies(x, [range(4)]).bonds) == 5
    r = ms.jvp(lin, {"sigma": 1.0}, throw=False)
    # it is rigid
    assert r.status is ms.Status.REDUNDANT_CONSTRAINTS and np.abs(r.value.positions).max() < 1e-8


@pytest.mark.parametrize("count, d", [(2, 2), (3, 2), (6, 2), (2, 3), (3, 3), (4, 3), (7, 3)])
def test_bodies_are_rigid_and_no_more(count, d):
    x = np.random.default_rng(count).uniform(size=(count, d))
    bonds = np.asarray(RigidBonds.bodies(x, [range(count)]).bonds)
    rows = np.zeros((len(bonds), count, d))
    for row, (i, j) in zip(rows, bonds, strict=True):
        row[i], row[j] = x[i] - x[j], x[j] - x[i]
    rotations = {(2, 2): 1, (2, 3): 2}.get((count, d), d * (d - 1) // 2)
    sizes = np.linalg.svd(rows.reshape(len(bonds), -1), compute_uv=False)
    assert len(bonds) == count * d - d - rotations and sizes[-1] > 1e-4


def test_relaxed_weights_are_a_softmax():
    """Without pairs, weights minimize sum w e + T w log w on the simplex: w = exp(-e / T) / Z."""
    energies = np.array([0.1, 0.5, 0.3])

    def energy(R, p, displacement):
        w = p["weights"]
        return (
            jnp.sum(w * p["levels"])
            + p["T"] * jnp.sum(jax.scipy.special.xlogy(w, w))
            + jnp.sum(R**2)
        )

    potential = ms.potentials.from_energy(energy, ("weights", "levels", "T"))
    params = {"weights": np.full(3, 1 / 3), "levels": energies, "T": 0.4}
    s = ms.System.create([[0.0, 0.0]], None, potential, params, constraints=[Simplex("weights")])
    eq = ms.minimize(s)
    expected = np.exp(-energies / 0.4) / np.exp(-energies / 0.4).sum()
    assert np.allclose(eq.params["weights"], expected, rtol=0, atol=1e-11)
    # the multiplier is T log Z - T, and its slope by a level minus
    # that level's weight with the other sign
    jacobian = ms.jvp(eq, {"levels": np.array([1.0, 0.0, 0.0])})
    slope = -(np.diag(expected) - np.outer(expected, expected))[0] / 0.4
    assert np.allclose(jacobian.value.params["weights"], slope, rtol=0, atol=1e-10)
    assert np.allclose(jacobian.value.multipliers["simplex"], -expected[0], rtol=0, atol=1e-10)

    # and the same by the fixed point of mirror descent, behind a solver that is a closed form
    from mdsens.implicit import fixed_point
    from mdsens.implicit.conditions import optimality

    def cost(w, levels):
        return jnp.sum(w * levels) + 0.4 * jnp.sum(w * jnp.log(w))

    T = optimality.mirror_descent(cost, optimality.softmax, optimality.kl_map, step=0.5)
    solver = fixed_point(T)(lambda init, levels: jax.nn.softmax(-levels / 0.4))
    assert np.allclose(
        jax.jacobian(lambda e: solver(expected, e))(energies)[:, 0], slope, rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("levels, degenerate", [([0.9, 0.5, -0.3], False), ([0.9, 0.5, 0.2], True)])
def test_a_weight_at_the_edge_of_the_simplex(levels, degenerate):
    """sum (w - a)^2 / 2 is least where a is projected onto the simplex;
    at (0.9, 0.5, 0.2) a weight is just zero.
    """

    def energy(R, p, displacement):
        return 0.5 * jnp.sum((p["weights"] - p["levels"]) ** 2) + jnp.sum(R**2)

    potential = ms.potentials.from_energy(energy, ("weights", "levels"))
    params = {"weights": np.full(3, 1 / 3), "levels": np.array(levels)}
    eq = ms.minimize(
        ms.System.create([[0.1, 0.0]], None, potential, params, constraints=[Simplex("weights")])
    )
    assert np.allclose(eq.params["weights"], [0.7, 0.3, 0.0], rtol=0, atol=1e-11)
    r = ms.jvp(eq, {"levels": np.array([1.0, 0.0, 0.0])}, throw=False)
    assert (r.status is ms.Status.DEGENERATE_CONSTRAINT) is degenerate
    if not degenerate:
        assert np.allclose(r.value.params["weights"], [0.5, -0.5, 0.0], rtol=0, atol=1e-11)


# ── the same minimum by the catalogue of conditions ──


def test_the_catalogue_gives_the_same_derivative():
    """Projected gradient on the box, behind root, at the container's minimum:
    no line of this module in it.
    """
    from mdsens.implicit import fixed_point
    from mdsens.implicit.conditions import optimality, projections
    from mdsens.mechanics.lagrangian import bounds
    from mdsens.model.system import potential_energy

    eq = minimum("a container")
    s = eq.system

    def energy(x, params):
        return potential_energy(s, x, params)

    def onto(y, *args):
        low, high = bounds(s, args[-1])
        return projections.box(y, low.positions, high.positions)

    T = optimality.projected_gradient(energy, onto, step=0.05)
    solver = fixed_point(T, solve=ms.implicit.GMRES(rtol=1e-13))(lambda init, params: init)
    change = {k: jnp.asarray(v) for k, v in direction(ms.linearize(eq)).items()}
    change["alpha"] = jnp.zeros(())
    _, rate = jax.jvp(lambda p: solver(eq.positions, p), (dict(eq.params),), (change,))
    exact = ms.jvp(eq, {k: v for k, v in change.items() if k != "alpha"}).value.positions
    assert np.abs(rate - exact).max() < 1e-8 * np.abs(exact).max()


# ── what a user meets ──


@LONG
def test_a_batch_goes_member_by_member():
    first = system("bonds and pins in a slit")
    other = first.with_params({"floor_position": 0.02})
    eq = ms.minimize(ms.stack([first, other]))
    alone = ms.unstack(eq)[1]
    assert np.allclose(alone.multipliers["bond"], ms.minimize(other).multipliers["bond"], atol=1e-9)
    r = ms.jvp(eq, {"floor_position": 1.0})
    assert np.allclose(
        r.value.multipliers["bond"][1],
        ms.jvp(alone, {"floor_position": 1.0}).value.multipliers["bond"],
    )


def test_saved_and_loaded(tmp_path):
    eq = minimum("bonds and pins in a slit")
    ms.io.save(tmp_path / "eq.npz", eq)
    back = ms.io.load(tmp_path / "eq.npz")
    assert [type(c) for c in back.system.constraints] == [type(c) for c in eq.system.constraints]
    assert np.array_equal(back.multipliers["bond"], eq.multipliers["bond"])
    assert back.system.constraints[3] == eq.system.constraints[3]


def test_ase_constraints_become_ours_and_back():
    from ase import Atoms
    from ase.constraints import FixAtoms, FixBondLengths, FixCartesian, Hookean

    atoms = Atoms("Ar4", positions=[[0, 0, 0], [1.1, 0, 0], [0, 1.1, 0], [0, 0, 1.1]])
    atoms.set_constraint(
        [FixAtoms([0]), FixCartesian([1], mask=(False, True, True)), FixBondLengths([[2, 3]])]
    )
    potential, params = ms.potentials.lennard_jones(), {"sigma": 1.0, "epsilon": 1.0}
    s: Any = ms.io.from_ase(atoms, potential, params)
    assert np.array_equal(
        np.asarray(s.constraints[0].mask), [[1, 1, 1], [0, 1, 1], [0, 0, 0], [0, 0, 0]]
    )
    assert np.allclose(s.params["fixed_bond_length"], np.sqrt(2) * 1.1)
    back: Any = ms.io.from_ase(ms.io.to_ase(s), potential, params)
    assert np.array_equal(back.constraints[0].mask, s.constraints[0].mask)
    assert np.array_equal(back.constraints[1].bonds, s.constraints[1].bonds)
    atoms.set_constraint(Hookean(a1=0, a2=1, rt=1.0, k=1.0))
    with pytest.raises(ms.InputError, match="Hookean"):
        ms.io.from_ase(atoms, potential, params)


@pytest.mark.parametrize(
    "constraints, extra, said",
    [
        ([Wall(1, True)], {}, "needs the parameter 'wall_position'"),
        ([Wall(2, True)], {"wall_position": 0.0}, "`axis` is 2 in 2 dimensions"),
        (
            [Wall(1, True), Wall(0, True)],
            {"wall_position": 0.0},
            "two constraints are named 'wall'",
        ),
        ([RigidBonds.between([[0, 20]])], {"bond_length": 1.0}, "`bonds` names particle 20 of 16"),
        ([RigidBonds.between([[0, 1]])], {"bond_length": [1.0, 2.0]}, "give a scalar, or \\(1,\\)"),
        ([RigidBonds.between([[0, 1]])], {"bond_length": -1.0}, "positive lengths"),
        (
            [RigidBonds.between([[0, 1]])],
            {"bond_length": 1.9},
            "a length of 1.9, above half of the cell",
        ),
        ([FixedTotal("epsilon")], {"total_total": 1.0}, "which the total alone would fix"),
        (
            [FixedTotal("mass")],
            {"total_total": 1.0},
            "relaxes 'mass', which the potential does not have",
        ),
        ([Pinned.particles([0], 4, 2)], {}, "`mask` has shape"),
        ("pins", {}, "give constraints of mdsens.constraints"),
        (
            [Wall(1, True, clearance=1.0), FixedTotal("sigma")],
            {"wall_position": -1.0, "total_total": 16.0},
            "wall depend on 'sigma', which the constraint total relaxes",
        ),
        (
            [FixedTotal("sigma", 2)],
            {"total_total": -1.0},
            "total_total is -1: give a positive number",
        ),
    ],
)
def test_bad_constraints_are_refused(constraints, extra, said):
    x, params = _discs()
    with pytest.raises(ms.InputError, match=said):
        ms.System.create(
            x, 3.6, ms.potentials.soft_sphere(), {**params, **extra}, constraints=constraints
        )


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: Wall(3, True), "`axis` is 3"),
        (lambda: Wall(0, cast(Any, 1)), "`above` is 1"),
        (lambda: Wall(0, True, clearance=-1.0), "`clearance` is -1.0"),
        (lambda: Pinned.particles([9], 4, 2), "give numbers from 0 to 3"),
        (lambda: Pinned.particles([0], 4, 2, axes=[2]), "`axes` is"),
        (lambda: Pinned.coordinates([[1, 0]]), "booleans"),
        (lambda: RigidBonds.between([[1, 1]]), "to itself"),
        (lambda: RigidBonds.between([0, 1]), "particle numbers"),
        (
            lambda: RigidBonds.between([[0, 1], [1, 2], [1, 0]]),
            "bond of particles 0 and 1 is given 2 times",
        ),
        (lambda: RigidBonds.bodies([[0.0, 0], [1, 0], [2, 0]], [[0, 1, 2]]), "lie on a line"),
        (lambda: RigidBonds.bodies([[0.0, 0], [1, 0]], [[0]]), "two or more"),
        (
            lambda: RigidBonds.bodies([[0.0, 0], [1, 0], [0, 1], [0, 1]], [range(4)]),
            "two particles of body 0, .* at the same position",
        ),
        (lambda: RigidBonds.bodies([[0.0, 0], [1, 0]], cast(Any, None)), "give a list of bodies"),
        (
            lambda: RigidBonds.bodies([[0.0, 0], [1, 0]], cast(Any, [0, 1])),
            "body 0 is .0.: give two or more",
        ),
        (lambda: RigidBonds.bodies([0.0, 0.0], [[0, 1]]), "`positions` has shape"),
        (lambda: FixedTotal("sigma", -1.0), "exponent"),
    ],
)
def test_bad_records_are_refused(make, said):
    with pytest.raises(ms.InputError, match=said):
        make()


@pytest.mark.parametrize(
    "make, error, said",
    [
        (
            lambda low: [Wall(1, True, "floor"), Wall(1, False, "lid")],
            ms.InputError,
            "no room along axis 1",
        ),
        (
            lambda low: [Wall(1, True, "floor"), Pinned.particles([low], N, 2)],
            ms.InputError,
            "beyond a wall",
        ),
        (
            lambda low: [Pinned.particles([0, 1], N, 2), RigidBonds.between([[0, 1]])],
            ms.ConvergenceError,
            "is off by",
        ),
    ],
)
def test_constraints_that_cannot_be_met_are_named(make, error, said):
    x, params = _discs()
    given = {**params, "floor_position": 2.0, "lid_position": 1.0, "bond_length": 0.9}
    held = make(int(np.argmin(x[:, 1])))
    given = {k: v for k, v in given.items() if k in params or any(k in c.parameters for c in held)}
    with pytest.raises(error, match=said):
        ms.minimize(ms.System.create(x, 6.0, ms.potentials.soft_sphere(), given, constraints=held))


GRAVITY = ms.potentials.from_energy(
    lambda R, p, d: -jnp.sum(p["m"][:, None] * R * p["g"]), ("m", "g")
)


@pytest.mark.parametrize("n", [2, 3])
def test_a_chain_hangs_along_gravity(n):
    """Of one link or two: R_k = l_1 + … + l_k along g, tensions the weight below;
    the bonds alone hold its swing.
    """
    g, links = np.array([0.2, -1.0]), np.array([1.0, 0.8])[: n - 1]
    chain = [Pinned.particles([0], n, 2), RigidBonds.between([[k, k + 1] for k in range(n - 1)])]
    start = np.array([[0.0, 0.0], [0.3, -1.0], [0.5, -1.8]])[:n]
    params = {"m": np.ones(n), "g": g, "bond_length": links}
    eq = ms.minimize(ms.System.create(start, None, GRAVITY, params, constraints=chain))
    size, depth, below = (
        np.linalg.norm(g),
        np.concatenate([[0.0], np.cumsum(links)]),
        np.arange(n - 1, 0, -1),
    )
    np.testing.assert_allclose(eq.positions, depth[:, None] * g / size, atol=1e-12)
    np.testing.assert_allclose(eq.multipliers["bond"], below * size, rtol=1e-12)
    along = np.array([1.0, 0.0])
    r = ms.jvp(eq, {"g": along})
    turn = along / size - g * (g @ along) / size**3
    assert (
        r.status is ms.Status.CONVERGED
        and ms.certify(eq, {"g": along}).status is ms.Status.CONVERGED
    )
    np.testing.assert_allclose(r.value.positions, depth[:, None] * turn, atol=1e-11)
    np.testing.assert_allclose(r.value.multipliers["bond"], below * (g @ along) / size, rtol=1e-11)
    pull = np.zeros((n, 2))
    pull[-1, 0] = 1.0
    np.testing.assert_allclose(ms.vjp(eq, pull).value["g"][0], depth[-1] * turn[0], rtol=1e-11)


def test_a_free_cluster_with_a_bond_turns_freely_whatever_its_potential_is():
    def energy(R, p, displacement):
        r = jnp.sqrt(jnp.sum((R[:, None] - R[None]) ** 2, axis=-1) + jnp.eye(4))[
            jnp.triu_indices(4, 1)
        ]
        return jnp.sum((p["s"] / r) ** 6 - 2 * (p["s"] / r) ** 3)

    potential = ms.potentials.from_energy(energy, ("s",))
    start = [[0.0, 0.0], [1.2, 0.1], [0.3, 1.1], [1.3, 1.2]]
    params = {"s": 1.0, "bond_length": 1.05}
    eq = ms.minimize(
        ms.System.create(start, None, potential, params, constraints=[RigidBonds.between([[0, 1]])])
    )
    c = ms.certify(eq, {"s": 1.0})
    assert c.status is ms.Status.CONVERGED and c.floppy_modes == 0
    apart = np.zeros((4, 2))
    apart[0], apart[3] = eq.positions[0] - eq.positions[3], eq.positions[3] - eq.positions[0]
    assert ms.vjp(eq, apart).status is ms.Status.CONVERGED


@pytest.mark.parametrize("name", ["breathing discs", "an alloy"])
def test_a_system_too_large_for_a_matrix_is_certified_by_products(name, monkeypatch):
    """Lowest modes, redundant equations and Newton steps: with the matrix, and without it."""
    eq = minimum(name)
    with_matrix = ms.certify(eq)
    factored = ms.linearize(eq).factor
    assert isinstance(factored, kkt_factor.KKT)
    rng = np.random.default_rng(2)
    b = factored.project(rng.normal(size=factored.size))
    monkeypatch.setattr(kkt_factor, "DENSE", 0)
    lin = ms.linearize(eq)
    factor = lin.factor
    assert isinstance(factor, kkt_factor.KKT)
    assert factor.matrix is None and factored.matrix is not None
    without = ms.certify(lin)
    assert without.constraints is not None and with_matrix.constraints is not None
    assert without.stiffness_min == pytest.approx(with_matrix.stiffness_min, rel=1e-6)
    assert without.constraints.redundant == with_matrix.constraints.redundant
    assert without.status.good
    equations = factored.equations.toarray()
    np.testing.assert_allclose(factor.equations.toarray(), equations, atol=1e-12)
    shift = 0.1 * factored.unit
    steps = [kkt.direction(b, shift) for kkt in (factored, factor)]
    np.testing.assert_allclose(steps[1], steps[0], atol=1e-5 * np.abs(steps[0]).max())
    unshifted = factored.direction(b, 0.0)
    assert np.abs(steps[0] - unshifted).max() > 1e-3 * np.abs(steps[0]).max()


def test_walls_at_one_place_are_degenerate_and_share_the_push():
    potential = ms.potentials.from_energy(lambda R, p, d: jnp.sum(p["k"] * R**2) / 2, ("k",))
    walls = [
        Wall(1, True, "first"),
        Wall(1, True, "second"),
        Wall(0, True, "left"),
        Wall(0, False, "right"),
    ]
    params = {
        "k": 2.0,
        "first_position": 0.5,
        "second_position": 0.5,
        "left_position": 0.3,
        "right_position": 0.3,
    }
    system = ms.System.create([[0.3, 1.0]], None, potential, params, constraints=walls)
    eq = ms.minimize(system)
    want = {"first": 0.5, "second": 0.5, "left": 0.6, "right": 0.0}
    assert {k: float(v[0]) for k, v in eq.multipliers.items()} == pytest.approx(want, abs=1e-14)
    assert ms.jvp(eq, {"k": 1.0}, throw=False).status is ms.Status.DEGENERATE_CONSTRAINT
    alone = ms.minimize(system.with_params({"second_position": 0.4, "left_position": 0.2}))
    assert ms.jvp(alone, {"k": 1.0}).status is ms.Status.CONVERGED
    assert (
        float(alone.multipliers["first"][0]) == pytest.approx(1.0)
        and float(alone.multipliers["second"][0]) == 0.0
    )


def test_a_chain_drawn_straight_has_no_tensions_of_its_own():
    start = np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.5, 0.9], [1.5, 0.9]])
    chain = [Pinned.particles([0, 2], 5, 2), RigidBonds.between([[0, 1], [1, 2]])]
    params = {"sigma": 1.0, "epsilon": 1.0, "bond_length": 1.0}
    eq = ms.minimize(
        ms.System.create(
            start, None, ms.potentials.lennard_jones(2.5, 3.5), params, constraints=chain
        )
    )
    assert ms.jvp(eq, {"epsilon": 1.0}, throw=False).status is ms.Status.REDUNDANT_CONSTRAINTS


@pytest.mark.parametrize(
    "held",
    quick(
        [Pinned.particles([0], 2, 2), RigidBonds.between([[0, 1]]), Wall(1, True)], Wall(1, True)
    ),
)
def test_in_single_precision(held):
    start = np.array([[0.0, 0.0], [1.1, 0.1]], np.float32)
    params = {"sigma": 1.0, "epsilon": 1.0, "bond_length": 1.05, "wall_position": -1.0}
    params = {k: v for k, v in params.items() if k in ("sigma", "epsilon", *held.parameters)}
    single = ms.System.create(
        start, None, ms.potentials.lennard_jones(), params, constraints=[held]
    )
    eq = ms.minimize(single, tolerance=1e-3)
    r = ms.jvp(eq, {"sigma": 1.0})
    assert r.status.good and {leaf.dtype for leaf in jax.tree.leaves(r.value)} == {
        jnp.dtype("float32")
    }


def test_a_bond_between_pins_is_redundant():
    x, params = _discs()
    held = [Pinned.particles([0, 1], N, 2), RigidBonds.between([[0, 1]])]
    given = {**params, "bond_length": held[1].lengths_of(x)}
    eq = ms.minimize(
        ms.System.create(x, 20.0, ms.potentials.soft_sphere(), given, constraints=held)
    )
    c: Any = ms.certify(eq)
    assert c.constraints.redundant == 1


def test_what_knows_no_constraints_says_so():
    eq = minimum("bonds and pins in a slit")
    s = eq.system
    for ask in (
        lambda: ms.minimize(s, pressure=0.1),
        lambda: ms.minimize(s, method=ms.relaxation.Fire()),
        lambda: ms.elasticity.moduli(eq),
        lambda: ms.modes.smallest_stiffness(eq),
        lambda: ms.equilibrate(s),
        lambda: ms.packing.compress(eq, 0.9),
        lambda: ms.verify.unrolled(eq, {"floor_position": 1.0}, steps=(30,)),
    ):
        with pytest.raises(ms.InputError, match="constraints"):
            ask()
    with pytest.raises(ms.InputError, match=r"cotangent\.multipliers has a key 'bonds'"):
        ms.vjp(eq, Unknowns(jnp.zeros((N, 2)), multipliers={"bonds": jnp.zeros(4)}))


@pytest.mark.parametrize("count", [1, 2])
def test_bodies_that_nothing_holds(count):
    """Two far apart have no place of rest, as discs without contacts;
    one alone has the shape of its bond.
    """
    places = np.array([[0.0, 0], [0.7, 0], [5, 0], [5.5, 0.5]])[: 2 * count]
    rods = RigidBonds.between(np.arange(2 * count).reshape(count, 2))
    params = {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.5, "bond_length": rods.lengths_of(places)}
    eq = ms.minimize(
        ms.System.create(places, 10.0, ms.potentials.soft_sphere(), params, constraints=[rods])
    )
    if count == 2:
        with pytest.raises(ms.ConvergenceError, match="no contact carries force"):
            ms.jvp(eq, {"sigma": 1.0})
        certificate = ms.certify(eq)
        assert certificate.status is ms.Status.UNJAMMED
        assert "no rigid body is supported by contacts" in str(certificate)
    else:
        moved = np.asarray(ms.jvp(eq, {"bond_length": [1.0]}).value.positions)
        assert np.allclose(moved, [[-0.5, 0.0], [0.5, 0.0]], atol=1e-12)


@LONG
def test_differences_of_another_minimum_say_so(monkeypatch):
    """A rod that turns round when it is relaxed again:
    each end is as good a minimum, and their difference reversed.
    """
    places = np.array([[0.0, 0], [0.7, 0]])
    rod = RigidBonds.between([[0, 1]])
    params = {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0, "bond_length": rod.lengths_of(places)}
    eq = ms.minimize(
        ms.System.create(places, 10.0, ms.potentials.soft_sphere(), params, constraints=[rod])
    )
    response = ms.jvp(eq, {"bond_length": [1.0]})
    kept = ms.verify.finite_difference(eq, {"bond_length": [1.0]})
    assert not kept.network_changed and kept.disagreement(response.value) < 1e-6

    minimize = differences.minimize

    def turned(start, params, **how):
        there = minimize(start, params, **how)
        return dataclasses.replace(
            there, system=there.system.replace(positions=there.positions[::-1])
        )

    monkeypatch.setattr(differences, "minimize", turned)
    lost = ms.verify.finite_difference(eq, {"bond_length": [1.0]})
    assert lost.status.good and lost.network_changed and lost.disagreement(response.value) > 1


def test_the_penalty_of_bonds_along_a_closed_ring_is_that_of_its_bonds() -> None:
    """The gradients of the bonds add up to zero there: their squares must not cancel."""
    turn = 2.0 * np.pi * np.arange(12) / 12
    ring = 2.0 * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    bonds = RigidBonds.between([[k, (k + 1) % 12] for k in range(12)])
    params = {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0, "bond_length": bonds.lengths_of(ring)}
    soft = ms.potentials.soft_sphere()
    run = _augmented_lagrangian._Relaxation(
        ms.System.create(ring, None, soft, params, constraints=[bonds]), None, 100, Decades(False)
    )
    # |grad g|^2 = 2 for a bond
    assert float(run._penalties()["bond"]) == pytest.approx(0.5 * run.stiffness, rel=0.5)
