"""What counts as converged: relative to the forces of the pairs,
in any units, and never below round-off.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LONG, relative

import mdsens as ms
from mdsens.mechanics.hessian import max_force
from mdsens.mechanics.units import force_scale, natural_units
from mdsens.relaxation.methods import Fire

SOFT = ms.potentials.soft_sphere()
Status = ms.Status


def discs(epsilon: float = 1.0, unit: float = 1.0) -> ms.System:
    """64 bidisperse discs at packing fraction 0.9 in a fixed cell, from random places."""
    sigma = np.repeat([1.0, 1.4], 32)
    side = float(np.sqrt(np.sum(np.pi / 4 * sigma**2) / 0.9))
    places = side * np.random.default_rng(0).random((64, 2))
    params = {"sigma": unit * sigma, "epsilon": epsilon, "alpha": 2.0}
    return ms.System.create(unit * places, unit * side, SOFT, params)


# ── units ──

# Dimension of each parameter: powers of a length and of an energy.
UNITS = {
    "sigma": (1, 0),
    "epsilon": (0, 1),
    "alpha": (0, 0),
    "length": (1, 0),
    "stiffness": (-2, 1),
    "charge": (0.5, 0.5),
    "polarizability": (3, 0),
    "damping": (0, 0),
}
CUTOFFS = {
    "dimer": (2.0, 2.5),
    "fcc_argon": (6.8, 8.5),
    "argon_vacancy": (6.8, 8.5),
    "binary_lj_glass": (2.0, 2.5),
    "polarizable_cluster": (5.0, 6.0),
}
BUNDLED = {
    "seed_packing_2d": "sigma",
    "polydisperse_2d": "sigma",
    "packing_from_file": "sigma",
    "bidisperse_3d": "sigma",
    "harmonic_morse_2d": "sigma",
    "spring_network": "length",
    "dimer": "sigma",
    "fcc_argon": "epsilon",
    "argon_vacancy": "epsilon",
    "binary_lj_glass": "sigma",
    "polarizable_cluster": "epsilon",
}
# these compile once for all units: no length in them is fixed
PLAIN = ("seed_packing_2d", "spring_network")
SCALES = [(length, energy) for length in (1e-10, 1.0, 1e10) for energy in (1e-20, 1.0, 1e10)]


@cache
def near(name: str) -> ms.System:
    """A bundled system next to a minimum: from farther off,
    round-off decides which minimum is found.
    """
    start = ms.load_system(name)
    eq = ms.minimize(start)
    n, d = start.positions.shape
    spacing = float(natural_units(start)[0])
    aside = 1e-3 * spacing * np.random.default_rng(1).standard_normal((n, d))
    return eq.system.replace(positions=eq.positions + aside).reallocate()


def in_units(name: str, length: float, energy: float) -> ms.System:
    """The same with lengths and energies in other units."""
    s = near(name)
    kind = {**UNITS, "alpha": (-1, 0)} if name == "harmonic_morse_2d" else UNITS
    params = {k: v * length ** kind[k][0] * energy ** kind[k][1] for k, v in s.params.items()}
    potential: Any = s.potential
    if name in CUTOFFS:
        potential = ms.potentials.lennard_jones(*(length * x for x in CUTOFFS[name]))
        if name == "polarizable_cluster":
            potential = potential + ms.potentials.induced_dipoles()
    box: Any = None if s.box is None else np.asarray(s.box) * length
    if isinstance(s.boundary, ms.PackingFraction):
        box = s.boundary
    return ms.System.create(np.asarray(s.positions) * length, box, potential, params, s.species)


def answers(name: str, length: float, energy: float) -> dict[str, Any]:
    """The minimum and a derivative, without units; and all statuses."""
    eq = ms.minimize(in_units(name, length, energy))
    by = BUNDLED[name]
    r = ms.jvp(eq, {by: eq.params[by]}, throw=False)
    g = ms.gradient(ms.observables.energy, eq, throw=False)
    c = ms.certify(eq)
    return {
        "positions": np.asarray(eq.positions) / length,
        "response": np.asarray(r.value) / length,
        "energy": np.asarray(g.value[by] * eq.params[by]) / energy,
        "stiffness": c.stiffness_min * length**2 / energy,
        "forces": np.array([float(x) * length / energy for x in (eq.tolerance, eq.force_floor)]),
        "statuses": [Status(int(eq.status)).name, r.status.name, c.status.name],
    }


@cache
def plain(name: str) -> dict[str, Any]:
    return answers(name, 1.0, 1.0)


@pytest.mark.parametrize(
    "name, scale",
    [
        *[(name, scale) for name in PLAIN for scale in ((1e-10, 1.0), (1e10, 1e10))],
        *[
            pytest.param(name, scale, marks=LONG)
            for name in BUNDLED
            for scale in SCALES
            if scale != (1.0, 1.0)
        ],
    ],
)
def test_a_bundled_system_has_the_same_answer_in_any_units(name: str, scale: tuple[float, float]):
    got, want = answers(name, *scale), plain(name)
    relaxed = [Status[answer["statuses"][0]] for answer in (got, want)]
    assert all(status.good for status in relaxed)
    tolerance, floor = want["forces"]
    # else round-off decides which of two a relaxation comes to
    if not 0.5 < floor / tolerance < 2.0:
        assert relaxed[0] is relaxed[1]
    assert got["statuses"][1:] == want["statuses"][1:]
    np.testing.assert_allclose(
        got["positions"], want["positions"], rtol=0, atol=1e-8 * np.abs(want["positions"]).max()
    )
    np.testing.assert_allclose(got["forces"], want["forces"], rtol=1e-5)
    assert got["stiffness"] == pytest.approx(want["stiffness"], rel=1e-6)
    assert np.linalg.norm(got["response"] - want["response"]) <= 1e-6 * np.linalg.norm(
        want["positions"]
    )
    np.testing.assert_allclose(
        got["energy"], want["energy"], rtol=1e-7, atol=1e-9 * np.abs(want["energy"]).max() + 1e-14
    )


def test_units_of_powers_of_two_change_no_digit():
    """They scale every intermediate number exactly,
    so that anything absolute in the code would show.
    """
    length, energy = 2.0**-33, 2.0**-66
    eq, small = ms.minimize(discs()), ms.minimize(discs(energy, length))
    assert int(small.steps) == int(eq.steps) and int(small.status) == int(eq.status)
    np.testing.assert_array_equal(np.asarray(small.positions), np.asarray(eq.positions) * length)
    for name in ("tolerance", "force_floor", "max_force"):
        assert float(getattr(small, name)) == float(getattr(eq, name)) * energy / length


def test_a_crowded_start_of_many_bodies_has_no_part_in_the_floor():
    """Its stiffness is 1e6 times that of the minimum,
    and round-off there is no measure of round-off here.
    """

    def energy(positions: jax.Array, params: Any, displacement: Any) -> jax.Array:
        i, j = np.triu_indices(positions.shape[0], 1)
        s6 = (params["size"] ** 2 / jnp.sum((positions[i] - positions[j]) ** 2, axis=-1)) ** 3
        return 4.0 * jnp.sum(s6 * s6 - s6)

    places = 0.8 * np.random.default_rng(0).random((5, 3))
    eq = ms.minimize(
        ms.System.create(places, None, ms.potentials.from_energy(energy, ("size",)), {"size": 1.0})
    )
    again = ms.minimize(eq.system)
    assert Status(int(eq.status)).good
    assert (
        float(eq.force_floor) == pytest.approx(float(again.force_floor), rel=0.5)
        and float(eq.force_floor) < 1e-12
    )


# ── the force that is left ──


def test_forces_that_are_small_in_joules_are_not_small():
    """Of discs with epsilon = 1e-9 a force of 1e-12 is a hundredth of a contact's."""
    eq = ms.minimize(discs(1e-9))
    assert float(eq.max_force) < 1e-21
    lax = ms.minimize(discs(1e-9), tolerance=1e-12)
    change = {"sigma": np.asarray(lax.params["sigma"])}
    calls: dict[str, Any] = {
        "jvp": lambda **kw: ms.jvp(lax, change, **kw).status,
        "vjp": lambda **kw: ms.vjp(lax, np.ones((64, 2)), **kw).status,
        "gradient": lambda **kw: ms.gradient(ms.observables.pressure, lax, **kw).status,
        "response": lambda **kw: ms.response(lax, np.eye(64, 2), **kw).status,
        "moduli": lambda **kw: Status(int(np.max(ms.elasticity.moduli(lax, **kw).stats.status))),
    }
    for name, call in calls.items():
        assert call(throw=False) is Status.UNCONVERGED, name
        with pytest.raises(ms.ConvergenceError, match="not small beside the mean"):
            call()
    assert int(np.max(ms.elasticity.moduli(lax.system).stats.status)) == Status.UNCONVERGED
    _, stats = ms.equilibrate(discs(1e-9), tolerance=1e-12, has_aux=True)
    assert Status(int(stats.status)) is Status.UNCONVERGED
    batch = ms.minimize(ms.stack([discs(1e-9), discs(2e-9)]), tolerance=1e-12)
    codes = np.asarray(ms.jvp(batch, change, throw=False).stats.status)
    assert np.all(codes == Status.UNCONVERGED.value)


def test_equilibrate_goes_as_far_as_minimize():
    eq, (system, stats) = (
        ms.minimize(discs(1e-9), method=Fire()),
        ms.equilibrate(discs(1e-9), has_aux=True),
    )
    assert Status(int(stats.status)).good
    assert float(stats.residual) <= max(float(eq.tolerance), float(eq.force_floor))
    assert relative(system.positions, eq.positions) < 1e-8


# ── round-off ──


def test_the_floor_is_where_forces_stand():
    """Further steps of FIRE neither leave it nor get far below."""
    eq = ms.minimize(discs())
    floor = float(eq.force_floor)
    assert floor == pytest.approx(
        float(force_scale(eq.system, *natural_units(eq.system), eq.max_force).floor), rel=1e-12
    )
    # a change of the last digit of every coordinate makes a force of that size
    digit = np.spacing(np.abs(np.asarray(eq.positions))) * np.random.default_rng(0).choice(
        [-1, 1], eq.positions.shape
    )
    moved = float(max_force(eq.system.replace(positions=eq.positions + digit)))
    assert 0.02 * floor < moved < floor


def test_the_floor_of_a_potential_of_many_bodies_is_measured():
    def energy(R: jax.Array, params: Any, displacement: Any) -> jax.Array:
        bond = jnp.sqrt(jnp.sum((R[0] - R[1]) ** 2))
        return 0.5 * params["k"] * (bond - 1.0) ** 2

    def pair(offset: float) -> ms.System:
        places = np.array([[0.0, 0.0], [0.9, 0.3]]) + offset
        return ms.System.create(places, None, ms.potentials.from_energy(energy, ("k",)), {"k": 7.0})

    at_origin, far = ms.minimize(pair(0.0)), ms.minimize(pair(1e6))
    assert Status(int(at_origin.status)) is Status.CONVERGED
    assert Status(int(far.status)) is Status.ROUND_OFF_LIMITED and int(far.steps) < 1000
    assert 7.0 * np.spacing(1e6) < float(far.force_floor) < 100 * 7.0 * np.spacing(1e6)


def test_a_tolerance_below_round_off_ends_there_at_once():
    eq = ms.minimize(discs())
    floor = float(eq.force_floor)
    low = ms.minimize(discs(), tolerance=0.3 * floor)
    assert Status(int(low.status)).good and int(low.steps) < 2 * int(eq.steps)
    assert float(low.max_force) <= floor and float(low.tolerance) == 0.3 * floor
    with pytest.raises(ms.PrecisionError, match="out of reach"):
        ms.minimize(discs(), tolerance=1e-18)


def test_a_pressure_near_nothing_is_reached_in_time():
    start = ms.load_system("seed_packing_2d", box={"packing_fraction": 0.9, "follows": "nothing"})
    eq = ms.minimize(start, pressure=1e-9)
    assert Status(int(eq.status)).good and int(eq.steps) < 60_000
    assert float(ms.observables.pressure(eq.system)) == pytest.approx(1e-9, rel=1e-5)
