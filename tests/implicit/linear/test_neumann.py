"""Neumann's series."""

from __future__ import annotations

import numpy as np
import pytest
from linear_cases import _C, CONTRACTION, OUTSIDE, alone
from problems import SIZE, spectral

from mdsens.implicit import (
    Neumann,
    Result,
)

LONG = Neumann()


def test_neumann_on_a_contraction() -> None:
    matrix = np.eye(SIZE) - CONTRACTION
    x, status, stats = alone(matrix, OUTSIDE, LONG)
    assert status == Result.CONVERGED and float(stats.residual) <= 1e-10
    np.testing.assert_allclose(x, np.linalg.solve(matrix, OUTSIDE), atol=1e-9)
    assert int(stats.iterations) <= 36  # the rest falls by a half a term, or faster
    with_null = np.eye(SIZE)
    with_null[0, 0] = 0.0  # what lies along the first stands, whatever the number of terms
    x, status, stats = alone(with_null, OUTSIDE, LONG)
    assert status == Result.STAGNATED and int(stats.iterations) < 100
    x, status, stats = alone(np.eye(SIZE) + 3 * _C / np.linalg.norm(_C, 2), OUTSIDE, LONG)
    assert status == Result.STAGNATED and np.all(np.isfinite(x)) and int(stats.iterations) < 100
    assert alone(np.eye(SIZE) * 1e30, OUTSIDE, LONG)[1] == Result.STAGNATED


@pytest.mark.parametrize("terms", [1, 5])
def test_neumann_cut_off_says_so(terms: int) -> None:
    matrix = np.eye(SIZE) - CONTRACTION
    x, status, stats = alone(matrix, OUTSIDE, Neumann(terms=terms))
    powers = [np.linalg.matrix_power(CONTRACTION, k) for k in range(terms + 1)]
    np.testing.assert_allclose(x, sum(powers[:terms]) @ OUTSIDE, rtol=1e-13, atol=1e-13)
    assert status == Result.MAX_STEPS_REACHED
    want = np.linalg.norm(powers[terms] @ OUTSIDE) / np.linalg.norm(OUTSIDE)
    assert float(stats.residual) == pytest.approx(want, rel=1e-10)
    error = np.linalg.norm(x - np.linalg.solve(matrix, OUTSIDE))
    assert error <= 0.5**terms / (1 - 0.5) * np.linalg.norm(OUTSIDE)
    # worse than no answer
    assert alone(-2 * np.eye(SIZE), OUTSIDE, Neumann(terms=terms))[1] == Result.STAGNATED
    assert alone(np.eye(SIZE), OUTSIDE, Neumann(terms=terms))[1] == Result.CONVERGED


def test_neumann_with_a_step() -> None:
    """Eigenvalues from 1 to 10: the step of one grows, that of 2 / 11 falls fastest."""
    matrix, _ = spectral(np.linspace(1, 10, SIZE), 3)
    assert alone(matrix, OUTSIDE, LONG)[1] == Result.STAGNATED
    x, status, stats = alone(matrix, OUTSIDE, Neumann(alpha=2 / 11))
    assert status == Result.CONVERGED
    assert int(stats.iterations) <= 1 + np.ceil(np.log(1e10) / np.log(11 / 9))
    np.testing.assert_allclose(x, np.linalg.solve(matrix, OUTSIDE), atol=1e-9)
