"""Hessian and mixed products against jax, finite differences and transposes;
the null space against the Hessian.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PACKINGS, relative, relaxed_packing

import mdsens as ms
from mdsens.mechanics import contacts, hessian, rigidity
from mdsens.mechanics.hessian import dense_hessian, hessian_operator
from mdsens.mechanics.hessian_blocks import BlockRows
from mdsens.mechanics.null_space import NullSpace
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.system import potential_energy

LAW = ms.potentials.soft_sphere()


@cache
def discs() -> ms.System:
    """Twelve Hertzian discs in a moving, skewed cell:
    smooth, every kind of parameter, not at a minimum.
    """
    rng = np.random.default_rng(0)
    rule = ms.PackingFraction(1.3, np.array([[1.0, 0.2], [-0.1, 1.1]]))
    params = {"sigma": rng.uniform(0.8, 1.2, 12), "epsilon": [[1.0, 1.5], [1.5, 0.7]], "alpha": 2.5}
    return ms.System.create(3.0 * rng.random((12, 2)), rule, LAW, params, np.arange(12) % 2)


# ── forces, Hessian and mixed products ──


@pytest.mark.as_shipped
def test_force_is_minus_the_slope_of_the_energy():
    system = discs()
    energy = jax.jit(lambda R: potential_energy(system, R))
    direction = np.random.default_rng(1).standard_normal((12, 2))
    h = 1e-6
    central = float(
        energy(system.positions + h * direction) - energy(system.positions - h * direction)
    ) / (2 * h)
    assert -float(jnp.sum(hessian.force(system) * direction)) == pytest.approx(central, rel=1e-8)
    largest = np.linalg.norm(hessian.force(system), axis=1).max()
    assert float(hessian.max_force(system)) == pytest.approx(largest, rel=1e-15)


@pytest.mark.as_shipped
def test_hessian_products_are_those_of_jax_hessian():
    system = discs()
    hessian = jax.jit(jax.hessian(lambda x: potential_energy(system, x.reshape(12, 2))))
    full = np.asarray(hessian(system.positions.ravel()))
    held = dense_hessian(system)
    assert relative(held, full) < 1e-13
    np.testing.assert_allclose(held, held.T, atol=1e-13 * np.abs(full).max())
    null = rigidity.null_space(system, contacts.network(system, 0.0))
    operator = hessian_operator(system, null)
    assert operator.symmetric and operator.positive_semidefinite
    v = np.random.default_rng(2).standard_normal((12, 2))
    product = operator.matvec(Unknowns(jnp.asarray(v))).positions
    assert relative(np.asarray(product).ravel(), full @ v.ravel()) < 1e-13


def test_mixed_products_are_finite_differences_and_transposes():
    system = discs()
    rng = np.random.default_rng(3)
    w = rng.standard_normal((12, 2))
    mixed = jax.jit(hessian.mixed_product)
    back = jax.jit(hessian.mixed_transpose)(system, Unknowns(jnp.asarray(w)))
    slope = jax.jit(lambda p: hessian.gradient(system, Unknowns(system.positions), p).positions)
    zero = {k: jnp.zeros_like(v) for k, v in system.params.items()}
    h = 1e-6
    for name, value in system.params.items():
        change = rng.uniform(-1, 1, value.shape)
        change = jnp.asarray(change + change.T if change.ndim == 2 else change)
        forward = mixed(system, zero | {name: change}).positions
        ahead, behind = (slope({**system.params, name: value + s * h * change}) for s in (1, -1))
        assert relative(forward, (ahead - behind) / (2 * h)) < 1e-7
        assert back[name].shape == value.shape
        assert float(jnp.sum(back[name] * change)) == pytest.approx(
            float(jnp.sum(forward * w)), rel=1e-11
        )


# ── assembled ──


@pytest.mark.parametrize("name", ["2-D", "3-D"])
def test_blocks_make_the_products_of_the_matrix(name):
    """Of particles with rattlers and single contacts, whose own blocks are singular."""
    d = int(name[0])
    rng = np.random.default_rng(3)
    length = 4.0 if d == 2 else 2.7
    system = ms.System.create(
        length * rng.random((40, d)), length, LAW, {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0}
    )
    matrix = hessian.sparse_hessian(system)
    assert matrix is not None
    dense = matrix.toarray()
    assert relative(dense, dense_hessian(system)) < 1e-14
    blocks = BlockRows.of(matrix, d)
    v = rng.standard_normal((40, d))
    assert relative(np.asarray(blocks.product(jnp.asarray(v))).ravel(), dense @ v.ravel()) < 1e-13
    even = (
        np.asarray(jax.vmap(blocks.scaled)(jnp.eye(40 * d).reshape(-1, 40, d)))
        .reshape(40 * d, -1)
        .T
    )
    of_even = jax.vmap(blocks.scaled_product)(jnp.eye(40 * d).reshape(-1, d, 40)).reshape(
        40 * d, -1
    )
    assert relative(of_even, even @ dense @ even.T) < 1e-13
    own = np.diagonal(of_even)
    held = (
        np.linalg.eigvalsh(dense.reshape(40, d, 40, d)[np.arange(40), :, np.arange(40)]).min(axis=1)
        > 0.01
    )
    assert held.any() and not held.all()
    np.testing.assert_allclose(own.reshape(d, 40)[:, held], 1.0, rtol=1e-12)


# ── the null space ──


def projector(null: NullSpace, n: int, d: int) -> np.ndarray:
    """P as a matrix."""
    columns = jax.jit(
        jax.vmap(lambda e: null.project(Unknowns(e.reshape(n, d))).positions.ravel())
    )(jnp.eye(n * d))
    return np.asarray(columns).T


def null_directions(system: ms.System, max_force: Any = 1e-12) -> tuple[np.ndarray, np.ndarray]:
    """The projector, and the Hessian of the backbone."""
    held, _, null = rigidity.analyze_rigidity(system, max_force)
    return projector(null, system.n, system.dimension), np.asarray(dense_hessian(held))


def check_projection(P: np.ndarray, H: np.ndarray, nullity: int) -> None:
    """An orthogonal projection of that nullity, along which the Hessian has nothing."""
    np.testing.assert_allclose(P, P.T, atol=1e-13)
    np.testing.assert_allclose(P @ P, P, atol=1e-13)
    assert round(len(P) - np.trace(P), 9) == nullity
    assert relative(H @ P, H) < 1e-11


@pytest.mark.parametrize("name, index", [(PACKINGS[0], 0), (PACKINGS[1], 7)])
def test_null_space_of_a_packing_is_all_of_its_zero_modes(name, index):
    eq = relaxed_packing(name, index)
    P, H = null_directions(eq.system, eq.max_force)
    eigenvalues = np.linalg.eigvalsh(H)
    check_projection(P, H, int(np.sum(np.abs(eigenvalues) < 1e-12 * eigenvalues[-1])))


def cluster(points) -> ms.System:
    """Morse particles, bonded at their rest length where they are a bond apart:
    a minimum by construction.
    """
    return ms.System.create(
        points, None, ms.potentials.morse(1.3, 1.6), {"sigma": 1.0, "epsilon": 1.0, "alpha": 6.0}
    )


TRIANGLE = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(0.75)]])
TETRAHEDRON = np.array([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / np.sqrt(8.0)
TURN = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
DIMER = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]) @ TURN.T

# nullity: translations, then rotations: one in 2-D, three in 3-D, two of a line
CLUSTERS = {
    "triangle": (TRIANGLE, 3),
    "dimer in 3-D": (DIMER, 5),
    "tetrahedron and dimer": (np.concatenate([TETRAHEDRON @ TURN.T, DIMER + 9.0]), 11),
    "triangle and a loner": (np.concatenate([TRIANGLE, [[9.0, 9.0]]]), 5),
}


@pytest.mark.parametrize("name", CLUSTERS)
def test_null_space_of_open_clusters(name):
    points, nullity = CLUSTERS[name]
    system = cluster(points)
    assert float(hessian.max_force(system)) < 1e-13
    P, H = null_directions(system, 1e-13)
    check_projection(P, H, nullity)
    eigenvalues = np.linalg.eigvalsh(H)
    assert np.sum(eigenvalues < 1e-10 * eigenvalues[-1]) == nullity  # and these are all
    assert eigenvalues[0] > -1e-10 * eigenvalues[-1]


def test_a_cluster_that_is_free_in_a_periodic_cell_rotates_as_well():
    points, nullity = CLUSTERS["triangle"]
    potential, params = cluster(points).potential, cluster(points).params
    P, H = null_directions(ms.System.create(points, 20.0, potential, params), 1e-13)
    check_projection(P, H, nullity)


def trap(positions, params, displacement):
    """A harmonic trap about the origin, stiff along x, soft along y,
    with a repulsion between the two particles.
    """
    apart = displacement(positions[0], positions[1])
    return jnp.sum(jnp.asarray([3.0, 1.0]) * positions**2) + params["push"] / jnp.sqrt(
        jnp.sum(apart**2)
    )


def gravity(positions, params, displacement):
    """Springs to a floor, nothing along x: only that translation is free."""
    apart = displacement(positions[0], positions[1])
    return jnp.sum((positions[:, 1] - 1.0) ** 2) + params["push"] * (jnp.sum(apart**2) - 1.0) ** 2


def test_an_external_field_takes_translations_and_rotations_off_the_null_space():
    # they part along the soft axis
    potential = ms.potentials.from_energy(trap, ("push",))
    system = ms.System.create([[0.01, 0.4], [0.0, -0.4]], None, potential, {"push": 1.0})
    eq = ms.minimize(system, tolerance=1e-11)
    P, H = null_directions(eq.system, eq.max_force)
    check_projection(P, H, 0)
    assert np.linalg.eigvalsh(H)[0] > 0.1


def test_a_field_along_one_axis_leaves_the_other_translation():
    potential = ms.potentials.from_energy(gravity, ("push",))
    system = ms.System.create([[0.0, 1.0], [1.0, 1.0]], None, potential, {"push": 1.0})
    P, H = null_directions(system)
    check_projection(P, H, 1)
    np.testing.assert_allclose(P @ np.array([1.0, 0, 1, 0]), 0.0, atol=1e-14)
    np.testing.assert_allclose(P @ np.array([0.0, 1, 0, 1]), [0.0, 1, 0, 1], atol=1e-14)


def ring(positions, params, displacement):
    """A round gutter about the origin and a spring:
    they turn about the origin, not about their centroid.
    """
    apart = displacement(positions[0], positions[1])
    gutter = jnp.sum((jnp.sum(positions**2, axis=1) - 1.0) ** 2)
    return gutter + params["push"] * (jnp.sum(apart**2) - 2.0) ** 2


def test_a_field_can_leave_a_combination_of_motions_free():
    potential = ms.potentials.from_energy(ring, ("push",))
    system = ms.System.create([[1.0, 0.0], [0.0, 1.0]], None, potential, {"push": 1.0})
    P, H = null_directions(system)
    check_projection(P, H, 1)
    np.testing.assert_allclose(P @ np.array([0.0, 1, -1, 0]), 0.0, atol=1e-13)
    null = rigidity.analyze_rigidity(system, 1e-12)[2]
    assert null.dimensions(2) == (0, 0, 1)


def stretch(positions, params, displacement):
    """A spring written as a many-body potential: it knows no absolute position."""
    apart = displacement(positions[0], positions[1])
    return (jnp.sum(apart**2) - params["length"] ** 2) ** 2


def test_a_many_body_potential_without_a_field_keeps_translations_and_rotations():
    potential = ms.potentials.from_energy(stretch, ("length",))
    system = ms.System.create([[0.0, 0.0], [0.6, 0.8]], None, potential, {"length": 1.0})
    check_projection(*null_directions(system), 3)
