"""Operators that are singular in directions that nobody declared."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from linear_cases import _U, _V, DEFICIENT, OUTSIDE, RANK, alone, solve_dense
from problems import SIZE, spectral

from mdsens.implicit import (
    Direct,
    LeastSquares,
    Method,
    NormalCG,
    Result,
)

PSEUDO_INVERSE = np.linalg.pinv(DEFICIENT, rcond=1e-12)


WITHIN = DEFICIENT @ OUTSIDE


@pytest.mark.parametrize("method", [NormalCG(), LeastSquares()], ids=lambda m: type(m).__name__)
def test_least_squares_of_a_singular_operator(method: Method) -> None:
    x, status, stats = alone(DEFICIENT, WITHIN, method)
    assert status == (Result.NOT_UNIQUE if isinstance(method, LeastSquares) else Result.CONVERGED)
    assert status.good and status.warning == isinstance(method, LeastSquares)
    assert float(stats.residual) <= 1e-10
    np.testing.assert_allclose(x, PSEUDO_INVERSE @ WITHIN, atol=1e-8)
    np.testing.assert_allclose(_V[:, RANK:].T @ x, 0, atol=1e-13)  # the shortest

    x, status, stats = alone(DEFICIENT, OUTSIDE, method)
    assert status == Result.SINGULAR and not status.good
    np.testing.assert_allclose(x, PSEUDO_INVERSE @ OUTSIDE, atol=1e-8 * float(np.linalg.norm(x)))
    least = np.linalg.norm(_U[:, RANK:].T @ OUTSIDE) / np.linalg.norm(OUTSIDE)
    assert float(stats.residual) == pytest.approx(least, rel=1e-12)

    bs = np.stack([WITHIN, OUTSIDE, np.zeros(SIZE), _U[:, -1]])  # the last is outside as a whole
    eye = np.eye(SIZE)
    batched = jax.vmap(lambda b: solve_dense(DEFICIENT, b, eye, eye, "two null spaces", method))
    xs, stats = batched(bs)
    np.testing.assert_allclose(xs, bs @ PSEUDO_INVERSE.T, atol=1e-7)
    free = Result.NOT_UNIQUE if isinstance(method, LeastSquares) else Result.CONVERGED
    codes = [Result(int(code)) for code in stats.status]
    assert codes[:2] == [free, Result.SINGULAR] and codes[2].good and codes[3] == Result.SINGULAR
    assert np.all(np.asarray(xs[2]) == 0) and float(stats.residual[2]) == 0


@pytest.mark.parametrize("method", [NormalCG(), LeastSquares()], ids=lambda m: type(m).__name__)
def test_least_squares_in_single_precision(method: Method) -> None:
    single = DEFICIENT.astype(np.float32)
    x, status, _ = alone(single, OUTSIDE.astype(np.float32), method)
    assert x.dtype == np.float32 and status == Result.SINGULAR
    np.testing.assert_allclose(x, PSEUDO_INVERSE @ OUTSIDE, atol=2e-4 * float(np.linalg.norm(x)))
    x, status, _ = alone(single, WITHIN.astype(np.float32), method)
    assert status == (
        Result.NOT_UNIQUE if isinstance(method, LeastSquares) else Result.ROUND_OFF_LIMITED
    )
    np.testing.assert_allclose(x, PSEUDO_INVERSE @ WITHIN, atol=1e-4 * float(np.linalg.norm(x)))


def test_direct_tells_where_it_takes_singular_values() -> None:
    """Left and right null space given apart, here as none."""
    for b, expected in ((WITHIN, Result.NOT_UNIQUE), (OUTSIDE, Result.SINGULAR)):
        x, status, _ = alone(DEFICIENT, b, Direct())
        assert status == expected
        np.testing.assert_allclose(x, PSEUDO_INVERSE @ b, atol=1e-11 * float(np.linalg.norm(x)))


def test_least_squares_declared_symmetric() -> None:
    """By eigenvalues, of either sign; a negative one is no minimum's, however near to zero."""
    values = np.where(np.arange(SIZE) < 3, 0.0, np.linspace(-1, 1, SIZE))
    matrix, _ = spectral(values, 8)
    inside, outside = matrix @ OUTSIDE, OUTSIDE
    want = np.linalg.pinv(matrix, rcond=1e-12, hermitian=True)
    for b, expected in ((inside, Result.NOT_UNIQUE), (outside, Result.SINGULAR)):
        x, status, _ = alone(matrix, b, LeastSquares(), "symmetric")
        assert status == expected
        np.testing.assert_allclose(x, want @ b, atol=1e-11 * float(np.linalg.norm(x)))
    saddle, _ = spectral(np.linspace(0.1, 1, SIZE) - 0.1 - 1e-8, 5)
    assert alone(saddle, OUTSIDE, LeastSquares(), "positive")[1] == Result.INDEFINITE
    assert (
        alone(spectral(np.linspace(-0.5, 1, SIZE), 5)[0], OUTSIDE, NormalCG(), "positive")[1]
        == Result.INDEFINITE
    )


def test_rank_tolerance_decides_what_is_zero() -> None:
    matrix = (_U * np.where(np.arange(SIZE) < RANK, 1.0, 1e-7)) @ _V.T
    b = matrix @ OUTSIDE
    x, status, _ = alone(matrix, b, LeastSquares(rtol=1e-9))
    assert status == Result.CONVERGED
    np.testing.assert_allclose(x, OUTSIDE, atol=1e-7)
    x, status, _ = alone(matrix, b, LeastSquares(rtol=1e-6, rank_tolerance=1e-6))
    assert status == Result.NOT_UNIQUE
    np.testing.assert_allclose(x, _V[:, :RANK] @ (_V[:, :RANK].T @ OUTSIDE), atol=1e-12)
