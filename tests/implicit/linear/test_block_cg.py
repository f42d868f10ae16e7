"""Block conjugate gradients, against dense linear algebra."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from mdsens.implicit.linear.block_cg import block_cg

M = 90


def stiffness(lowest: float = 1e-2, null: int = 0) -> np.ndarray:
    """A symmetric matrix with eigenvalues from ``lowest`` to 1, and ``null`` of zero."""
    vectors, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((M, M)))
    values = np.geomspace(abs(lowest), 1.0, M) * np.where(np.arange(M) == 0, np.sign(lowest), 1.0)
    values[M - null :] = 0.0
    return (vectors * values) @ vectors.T


def answer(a: np.ndarray, b: np.ndarray, rtol: float = 1e-10):
    """The solution with a diagonal scaling, off the null space of A."""
    projector = np.linalg.pinv(a, rcond=1e-10) @ a
    scale = sp.diags_array(np.linspace(0.5, 2.0, M)).tocsr()
    return block_cg(lambda v: a @ v, b, rtol, 1000, scale, lambda v: projector @ v)


def right_hand_sides(count: int) -> np.ndarray:
    sizes = np.logspace(-8, 8, count)
    return np.random.default_rng(1).standard_normal((M, count)) * sizes


@pytest.mark.parametrize("null", [0, 3])
@pytest.mark.parametrize("rtol", [1e-6, 1e-13])
def test_solutions_of_all_sizes_have_the_residual_asked_for(null: int, rtol: float):
    a = stiffness(null=null)
    b = a @ right_hand_sides(6)
    got = answer(a, b, rtol)
    want = np.linalg.pinv(a, rcond=1e-10) @ b
    assert np.all(got.residual <= rtol) and not got.negative
    off = np.linalg.norm(got.x - want, axis=0) / np.linalg.norm(want, axis=0)
    assert np.all(off < 100 * rtol + 1e-13)
    left = np.linalg.norm(b - a @ got.x, axis=0) / np.linalg.norm(b, axis=0)
    np.testing.assert_allclose(got.residual, left, rtol=0.5, atol=5e-14)


def test_columns_that_depend_on_others_or_are_zero_are_solved_for():
    a = stiffness()
    b = right_hand_sides(3)
    b = np.column_stack([b, np.zeros(M), b[:, 0] + 1e8 * b[:, 1], b[:, 2]])
    got = answer(a, b)
    want = np.linalg.solve(a, b)
    np.testing.assert_allclose(
        got.x / np.linalg.norm(want, axis=0).clip(1e-300),
        want / np.linalg.norm(want, axis=0).clip(1e-300),
        atol=1e-8,
    )
    assert got.residual[3] == 0.0 and np.all(got.residual <= 1e-10)


def test_together_takes_fewer_products_than_one_by_one():
    a = stiffness(1e-4)
    b = np.random.default_rng(2).standard_normal((M, 6))
    alone = [answer(a, b[:, [k]]).products for k in range(6)]
    assert answer(a, b).products < 0.5 * min(alone)


def test_a_negative_curvature_is_seen():
    assert answer(stiffness(-0.01), right_hand_sides(4)).negative


def test_a_column_that_is_not_finite_has_no_solution_and_spoils_no_other():
    a = stiffness()
    b = right_hand_sides(3)
    b[4, 1] = np.nan
    got = answer(a, b)
    assert got.residual[1] == np.inf and not got.x[:, 1].any()
    np.testing.assert_allclose(got.x[:, [0, 2]], np.linalg.solve(a, b[:, [0, 2]]), rtol=1e-6)
