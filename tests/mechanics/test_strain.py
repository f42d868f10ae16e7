"""Forces of a strain and stiffness to strain, by pairs, against the derivatives of the energy."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mdsens as ms
from mdsens.mechanics import strain
from mdsens.mechanics.hessian import dense_hessian, hessian_change
from mdsens.model.system import potential_energy


@cache
def discs() -> ms.System:
    """Hertzian discs with bonds, in a skewed cell that follows their diameters; not relaxed."""
    rng = np.random.default_rng(0)
    rule = ms.PackingFraction(1.3, np.array([[1.0, 0.2], [-0.1, 1.1]]))
    params = {"sigma": rng.uniform(0.8, 1.2, 12), "epsilon": 1.0, "alpha": 2.5}
    params |= {"stiffness": np.full(2, 0.7), "length": np.full(2, 0.4)}
    potential = ms.potentials.soft_sphere() + ms.potentials.harmonic_bonds([[0, 3], [2, 7]])
    return ms.System.create(3.0 * rng.random((12, 2)), rule, potential, params)


@cache
def crystal() -> ms.System:
    """Three atoms in a skewed cell shorter than twice the range, with images of themselves."""
    cell = np.array([[1.7, 0.9, -0.6], [0.0, 1.5, 0.7], [0.2, 0.0, 1.6]])
    places = np.arange(3)[:, None] * np.full(3, 0.6) + 0.05 * np.random.default_rng(1).random(
        (3, 3)
    )
    lennard_jones = ms.potentials.lennard_jones(2.0, 2.5)
    return ms.System.create(places, cell, lennard_jones, {"sigma": 1.0, "epsilon": 1.0})


SYSTEMS = {"discs": discs, "crystal": crystal}


def energy(system: ms.System, motion: Any, params: Any, positions: Any, s: Any) -> jax.Array:
    """The energy at amplitudes s of the unit strains and of the motion that belongs to each."""
    along = strain.basis(system.dimension)
    places = positions + jnp.tensordot(s, motion, axes=1)
    return potential_energy(system, places, params, jnp.tensordot(s, along, axes=1))


def motion_of(system: ms.System) -> jax.Array:
    m = len(strain.basis(system.dimension))
    return jnp.asarray(np.random.default_rng(2).standard_normal((m, *system.positions.shape)))


@pytest.mark.parametrize("kind", SYSTEMS)
def test_stiffness_is_the_second_derivative_of_the_energy(kind: str):
    system = SYSTEMS[kind]()
    motion = motion_of(system)
    zero = jnp.zeros(len(motion))
    matrices = jax.jit(lambda m: strain.stiffnesses_along(system, strain.basis(m.shape[2]), m))
    relaxed, affine = matrices(motion)
    second = jax.jit(jax.hessian(lambda s, m: energy(system, m, None, system.positions, s)))
    truth = np.asarray(second(zero, motion))
    size = np.abs(truth).max()
    np.testing.assert_allclose(relaxed, truth, atol=1e-11 * size)
    np.testing.assert_allclose(affine, second(zero, 0 * motion), atol=1e-11 * size)


@pytest.mark.parametrize("kind", SYSTEMS)
def test_its_derivatives_are_those_of_the_energy(kind: str):
    """In reverse mode, by positions and parameters, at a constant motion."""
    system = SYSTEMS[kind]()
    motion = motion_of(system)
    weights = np.random.default_rng(3).standard_normal((len(motion), len(motion)))
    weights = weights + weights.T

    def by_pairs(positions: Any, params: Any) -> jax.Array:
        moved = system.replace(positions=positions, params=params)
        matrix = strain.stiffness_along(moved, strain.basis(system.dimension), motion)
        return jnp.sum(weights * matrix)

    def by_energy(positions: Any, params: Any) -> jax.Array:
        second = jax.hessian(lambda s: energy(system, motion, params, positions, s))
        return jnp.sum(weights * second(jnp.zeros(len(motion))))

    at = (system.positions, dict(system.params))
    ours = jax.jit(jax.grad(by_pairs, (0, 1)))(*at)
    truth = jax.jit(jax.grad(by_energy, (0, 1)))(*at)
    size = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(truth))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(truth), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-10 * size)


@pytest.mark.parametrize("kind", SYSTEMS)
def test_forces_of_a_strain_are_the_mixed_derivative_of_the_energy(kind: str):
    system = SYSTEMS[kind]()

    def slope(e: jax.Array) -> jax.Array:
        return jax.grad(lambda R: potential_energy(system, R, strain=e))(system.positions)

    mixed = jax.jit(lambda e: jax.jvp(slope, (jnp.zeros_like(e),), (e,))[1])
    ours = jax.jit(lambda e: strain.forces_of_strain(system, e))
    for e in strain.basis(system.dimension):
        truth = -np.asarray(mixed(e))
        np.testing.assert_allclose(ours(e), truth, atol=1e-12 * np.abs(truth).max())


@pytest.mark.parametrize("kind", SYSTEMS)
def test_the_change_of_the_hessian_is_its_difference(kind: str):
    system = SYSTEMS[kind]()
    motion = np.random.default_rng(4).standard_normal(system.positions.shape)
    change = hessian_change(system, motion)
    assert change is not None
    h = 1e-6
    here = system.positions
    ahead = np.asarray(dense_hessian(system.replace(positions=here + h * motion)))
    behind = np.asarray(dense_hessian(system.replace(positions=here - h * motion)))
    truth = (ahead - behind) / (2 * h)
    np.testing.assert_allclose(change.toarray(), truth, atol=1e-7 * np.abs(truth).max())


def test_no_change_of_the_hessian_for_an_energy_that_is_no_sum_over_pairs():
    silicon = ms.load_system("silicon_vacancy", count=63)
    assert hessian_change(silicon, np.zeros(silicon.positions.shape)) is None
