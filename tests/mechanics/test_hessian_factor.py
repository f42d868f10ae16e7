"""The assembled Hessian against the written-out one, the null space's dimension,
solves and participation ratios.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from conftest import LONG

import mdsens as ms
from mdsens.mechanics.hessian import dense_hessian, sparse_hessian
from mdsens.mechanics.hessian_factor import HessianFactor, participation

NAMES = ("seed_packing_2d", pytest.param("argon_vacancy", marks=LONG), "spring_network", "dimer")


@cache
def relaxed(name):
    return ms.linearize(ms.minimize(ms.load_system(name), **ms.io.relaxation_options(name)))


@pytest.mark.parametrize("name", NAMES)
def test_assembled_hessian_is_the_hessian(name):
    lin = relaxed(name)
    dense = np.asarray(dense_hessian(lin.system))
    assembled = sparse_hessian(lin.system)
    assert assembled is not None
    assert np.abs(assembled - dense).max() < 1e-13 * np.abs(dense).max()
    values = np.linalg.eigvalsh(dense)
    assert sum(lin.null.dimensions(lin.system.dimension)) == int(
        (np.abs(values) < 1e-12 * values[-1]).sum()
    )


@pytest.mark.parametrize("name", NAMES)
def test_solves_and_lowest_modes_are_the_dense_ones(name):
    lin = relaxed(name)
    dense = np.asarray(dense_hessian(lin.system))
    stiffness = HessianFactor(lin.system, lin.null)
    b = np.random.default_rng(0).normal(size=lin.system.positions.shape)
    x, residual, status = stiffness.solve(b)
    want = np.linalg.pinv(dense, rcond=1e-11, hermitian=True) @ stiffness.project(b.ravel())
    assert status.good and residual < 1e-13
    np.testing.assert_allclose(x.ravel(), want, atol=1e-10 * np.abs(want).max())
    values = np.linalg.eigvalsh(dense)
    assert stiffness.lowest(1).values[0] == pytest.approx(
        values[sum(lin.null.dimensions(lin.system.dimension))], rel=1e-9
    )


def test_a_potential_of_many_bodies_has_no_assembled_hessian():
    def energy(R, params, displacement):
        return (
            params["k"] * ((R[:, None] - R[None]) ** 2).sum() ** 2 / 4 - params["k"] * (R**2).sum()
        )

    potential = ms.potentials.from_energy(energy, ("k",))
    points = np.array([[0.0, 0.0], [0.3, 0.1], [0.1, 0.4], [0.5, 0.5]])
    lin = ms.linearize(
        ms.minimize(ms.System.create(points, None, potential, {"k": 1.0}), throw=False), throw=False
    )
    stiffness = HessianFactor(lin.system, lin.null)
    assert stiffness.matrix is None
    dense = np.asarray(dense_hessian(lin.system))
    np.testing.assert_allclose(stiffness.products(np.eye(8)), dense, atol=1e-12)
    assert stiffness.solve(np.ones((4, 2)))[0].shape == (4, 2)


def test_participation_is_one_for_all_alike_and_one_over_n_for_one():
    together = np.tile([0.6, 0.8], 10)[:, None]
    alone = np.zeros((20, 1))
    alone[4:6, 0] = 0.6, 0.8
    np.testing.assert_allclose(participation(np.hstack([together, alone]), 2), [1.0, 0.1])
