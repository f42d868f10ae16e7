"""Atoms by which users trip: alone, in pairs, in molecules, one in a cell, alike under two names,
in batches, in traced code, and in single precision.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LONG, relative
from small_systems import COPPER, DIAMOND, FCC, SILICON, minimum

import mdsens as ms
from mdsens.mechanics.hessian import dense_hessian
from mdsens.mechanics.units import natural_units
from mdsens.relaxation import AtPressure

STILLINGER_WEBER = ms.potentials.stillinger_weber()
GUPTA = ms.potentials.gupta(4.0, 5.0)
LENNARD_JONES = ms.potentials.lennard_jones()
UNIT = {"sigma": 1.0, "epsilon": 1.0}


def off_sites(places: Any, amount: float) -> np.ndarray:
    """Positions with some noise."""
    places = np.asarray(places, float)
    return places + amount * np.random.default_rng(0).normal(size=places.shape)


@LONG
def test_a_dimer_in_a_large_cell() -> None:
    """Its length is 2^(1/6) sigma: A and B are chosen so."""
    system = ms.System.create(
        off_sites([[0, 0, 0], [2.4, 0.1, 0.2]], 0.1), 30.0, STILLINGER_WEBER, SILICON
    )
    eq = ms.minimize(system)
    bond = np.linalg.norm(eq.positions[0] - eq.positions[1])
    assert bond == pytest.approx(2 ** (1 / 6) * SILICON["sigma"], rel=1e-8)
    moved = ms.jvp(eq, {"sigma": 1.0})
    assert moved.status is ms.Status.CONVERGED
    # one end by half of 2^(1/6), and so the other
    assert np.linalg.norm(moved.value) == pytest.approx(2 ** (1 / 6) / 2**0.5, rel=1e-8)
    certificate = ms.certify(eq)
    assert certificate.status.good
    assert (certificate.translations, certificate.rotations) == (3, 2)


@cache
def with_a_lone_atom() -> ms.relaxation.Equilibrium:
    cluster = 3.615 * np.concatenate([FCC, FCC + np.array([1, 0, 0])])
    places = np.concatenate([cluster, [[20.0, 20.0, 20.0]]])
    return ms.minimize(ms.System.create(off_sites(places, 0.02), None, GUPTA, COPPER))


@LONG
def test_an_atom_out_of_reach_is_a_rattler() -> None:
    eq = with_a_lone_atom()
    moved = ms.jvp(eq, {"r0": 1.0})
    np.testing.assert_array_equal(np.flatnonzero(moved.rattlers), [8])
    np.testing.assert_array_equal(moved.value[8], 0.0)
    differences = ms.verify.finite_difference(eq, {"r0": 1.0})
    assert differences.disagreement(moved.value) < 1e-7
    certificate = ms.certify(eq)
    assert certificate.status.good
    assert certificate.zero_modes == 9


@LONG
@pytest.mark.parametrize("molecule", ["copper", "silicon"])
def test_two_molecules_turn_freely(molecule: str) -> None:
    if molecule == "copper":
        one, potential, params, name = 3.615 * FCC, GUPTA, COPPER, "r0"
    else:
        triangle = [[0, 0, 0], [2.3, 0, 0], [1.1, 2.0, 0]]
        one, potential, params, name = np.array(triangle), STILLINGER_WEBER, SILICON, "sigma"
    places = np.concatenate([one, one + np.array([15.0, 3.0, 2.0])])
    eq = ms.minimize(ms.System.create(off_sites(places, 0.03), None, potential, params))
    certificate = ms.certify(eq)
    assert certificate.status.good
    assert (certificate.translations, certificate.rotations) == (6, 6)
    moved = ms.jvp(eq, {name: 1.0}).value
    assert ms.verify.finite_difference(eq, {name: 1.0}).disagreement(moved) < 1e-7


def one_atom() -> ms.System:
    """Not at the origin, where round-off would be zero."""
    primitive = 1.1 * 2**-0.5 * (np.ones((3, 3)) - np.eye(3))
    return ms.System.create([[0.3, 0.2, 0.1]], primitive, LENNARD_JONES, UNIT)


def test_one_atom_in_a_cell_stays_where_it_is() -> None:
    eq = ms.minimize(one_atom())
    moved = ms.jvp(eq, {"sigma": 1.0})
    assert moved.status is ms.Status.CONVERGED
    assert np.abs(moved.value).max() < 1e-14
    with pytest.raises(ms.InputError, match="no modes but translations and rotations: take more"):
        ms.modes.smallest_stiffness(eq)
    assert ms.certify(eq).zero_modes == 3


@LONG
def test_one_atom_at_a_pressure() -> None:
    pressed = ms.minimize(one_atom(), cell=AtPressure(0.7, shape=True))
    strain = ms.jvp(pressed, {"pressure": 1.0}).value.strain
    bulk = ms.elasticity.isotropic(ms.elasticity.moduli(pressed).birch).bulk
    expected = -np.array([1, 1, 1, 0, 0, 0]) / (3 * float(bulk))
    np.testing.assert_allclose(strain, expected, atol=1e-10 * abs(expected[0]))
    of_sigma = ms.jvp(pressed, {"sigma": 1.0})
    assert of_sigma.status is ms.Status.CONVERGED
    differences = ms.verify.finite_difference(pressed, {"sigma": 1.0})
    assert differences.disagreement(of_sigma.value) < 1e-6


@LONG
@pytest.mark.parametrize("species", ["one", "two"])
def test_equal_atoms_under_two_names(species: str) -> None:
    """The derivative by a parameter is the sum of those by the entries of its table."""
    alike = minimum("stillinger_weber")
    tables = {
        name: np.full((2,) * axes, SILICON[name])
        for name, axes in zip(STILLINGER_WEBER.names, STILLINGER_WEBER.axes, strict=True)
    }
    kinds = np.arange(8) // 4 if species == "two" else np.zeros(8, int)
    start = alike.system
    eq = ms.minimize(ms.System.create(start.positions, start.box, STILLINGER_WEBER, tables, kinds))
    assert relative(eq.positions, alike.positions) < 1e-12
    weights = np.random.default_rng(0).normal(size=(8, 3))
    weights -= weights.mean(axis=0)
    expected = ms.vjp(alike, weights).value
    for name, value in ms.vjp(eq, weights).value.items():
        assert float(jnp.sum(value)) == pytest.approx(float(expected[name]), rel=1e-9, abs=1e-12)


def test_a_table_without_species_is_refused() -> None:
    params = {**SILICON, "epsilon": np.full((2, 2, 2), 2.1683)}
    with pytest.raises(ms.InputError, match="and the particles have no species: give a scalar, or"):
        ms.System.create(5.431 * DIAMOND, 5.431, STILLINGER_WEBER, params)


@LONG
def test_single_precision_is_a_warning() -> None:
    double = minimum("stillinger_weber")
    params = {name: np.float32(value) for name, value in SILICON.items()}
    box = np.asarray(double.system.box, np.float32)
    places = np.asarray(double.positions, np.float32)
    eq = ms.minimize(ms.System.create(places, box, STILLINGER_WEBER, params), throw=False)
    assert ms.Status(int(eq.status)) is ms.Status.ROUND_OFF_LIMITED
    change = {"sigma": 1.0, "gamma": 0.3}
    moved = ms.jvp(eq, change, throw=False)
    assert moved.status is ms.Status.SINGLE_PRECISION
    assert relative(moved.value, ms.jvp(double, change).value) < 1e-3
    assert ms.certify(eq).status is ms.Status.SINGLE_PRECISION


@LONG
def test_a_batch_of_silicon() -> None:
    first = minimum("stillinger_weber").system
    other = first.replace(positions=first.positions + 0.02).with_params({"gamma": 1.25})
    batch = ms.minimize(ms.stack([first, other]))
    moved = ms.jvp(batch, {"sigma": np.ones(2)}).value
    slopes = ms.gradient(ms.observables.pressure, batch).value
    for k, system in enumerate((first, other)):
        alone = ms.minimize(system)
        assert relative(moved[k], ms.jvp(alone, {"sigma": 1.0}).value) < 1e-8
        expected = ms.gradient(ms.observables.pressure, alone).value
        for name, value in slopes.items():
            assert float(value[k]) == pytest.approx(float(expected[name]), rel=1e-8, abs=1e-10)


@LONG
def test_jit_vmap_and_grad_through_equilibrate() -> None:
    eq = minimum("stillinger_weber")

    def pressure(params: Any) -> jax.Array:
        return ms.observables.pressure(ms.equilibrate(eq.system, params))

    slope = jax.jit(jax.grad(pressure))(dict(eq.params))
    expected = ms.gradient(ms.observables.pressure, eq).value
    for name, value in slope.items():
        assert float(value) == pytest.approx(float(expected[name]), rel=1e-9, abs=1e-12)
    values = jnp.asarray([1.2, 1.22])
    several = jax.jit(jax.vmap(lambda gamma: pressure({"gamma": gamma})))(values)
    for gamma, value in zip((1.2, 1.22), several, strict=True):
        again = ms.minimize(eq.system, {"gamma": gamma})
        assert float(value) == pytest.approx(float(ms.observables.pressure(again.system)), rel=1e-9)


# -- the units of minimizers


def half_of_the_pairs(vectors: Any, mask: Any, species_i: Any, species_j: Any, params: Any) -> Any:
    """Half of Lennard-Jones's energy of each pair."""
    r = jnp.sqrt(jnp.sum(vectors**2, axis=-1))
    return 0.5 * jnp.sum(jnp.where(mask, LENNARD_JONES.phi(r, 1.0, params["epsilon"]), 0.0))


BY_ATOMS = ms.potentials.from_local(half_of_the_pairs, ("epsilon",), 2.5, breakpoints=(2.0,))


def test_a_molecule_in_a_large_cell_has_the_length_of_its_potential() -> None:
    places = [[0.0, 0.0], [1.1, 0.0], [0.5, 0.9]]
    for box in (6.0, 600.0):
        system = ms.System.create(places, box, BY_ATOMS, {"epsilon": 1.0})
        assert 1.0 < float(natural_units(system)[0]) <= 2.5


def test_a_weak_pair_beside_a_strong_energy_of_all_neighbors() -> None:
    """The stiffness is that of the whole energy, not of the pairs in it."""
    weak = ms.potentials.soft_sphere().renamed({"epsilon": "strength"}) + BY_ATOMS
    params = {"sigma": 1.2, "strength": 1e-6, "alpha": 2.0, "epsilon": 1.0}
    system = ms.System.create(off_sites([[0, 0], [1.1, 0], [0.5, 0.9]], 0.02), None, weak, params)
    eq = ms.minimize(system)
    assert ms.Status(int(eq.status)) is ms.Status.CONVERGED
    largest = np.linalg.eigvalsh(np.asarray(dense_hessian(eq.system)))[-1]
    assert float(natural_units(eq.system)[1]) == pytest.approx(largest, rel=0.1)


def test_a_random_start_takes_few_steps() -> None:
    """Its stiffness is that of overlaps, and falls by many powers of ten: the steps follow.

    The list is that of a cell smaller than the cutoff, whose skin is narrow from the start.
    """
    places = 4.7 * np.random.default_rng(0).random((21, 2))
    system = ms.System.create(places, 4.7, BY_ATOMS, {"epsilon": 1.0})
    start = float(natural_units(system)[1])
    eq = ms.minimize(system)
    assert start > 1e6 * float(natural_units(eq.system)[1])
    assert int(eq.steps) < 3000
