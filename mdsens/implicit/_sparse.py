"""A sparse symmetric factorisation on the host, for matrices that have a null space, known or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import splu

__all__ = ["SparseFactor", "bound"]

Project: TypeAlias = Callable[[np.ndarray], np.ndarray]

# The matrix is factorised as A + s |A| I with this s. Softer than the softest mode of a packing (1e-6 of the stiffest),
# so that refinement gains three digits a round; far above round-off, so that a null direction does no harm.
SHIFT = 1e-9
ROUNDS = 30


def bound(matrix: Any) -> float:
    """The largest row sum of |A|: no eigenvalue is larger, and the largest is seldom under a third of it."""
    return float(abs(matrix).sum(axis=1).max()) if matrix.nnz else 0.0


class SparseFactor:
    """L D L^T of a symmetric matrix plus a shift, by SuperLU without row exchanges.

    Args:
      matrix: symmetric, (m, m).
      shift: s in A + s I.

    Attributes:
      negative: number of negative pivots: by Sylvester's law, of eigenvalues of A below -s. None where rows had to be
        exchanged, so that the pivots tell nothing.
    """

    def __init__(self, matrix: Any, shift: float):
        size = matrix.shape[0]
        self._lu = splu(
            (matrix + shift * sp.identity(size, format="csc")).tocsc(),
            permc_spec="MMD_AT_PLUS_A",
            diag_pivot_thresh=0.0,
            options={"SymmetricMode": True},
        )
        exchanged = not np.array_equal(self._lu.perm_r, self._lu.perm_c)
        self.negative = None if exchanged else int(np.sum(self._lu.U.diagonal() < 0))

    def apply(self, b: np.ndarray) -> np.ndarray:
        """(A + s I)^-1 b, (m,) or (m, k)."""
        return self._lu.solve(b)


def solve_on_range(
    matrix: Any, factor: SparseFactor, project: Project, b: np.ndarray, rtol: float = 1e-15
) -> tuple[np.ndarray, float]:
    """A x = P b by refinement with a factor of A + s I: ``(x, |P b - A x| / |P b|)``, x on the range of P.

    Each round leaves s / (lambda + s) of the error along a mode of stiffness lambda; what the factor makes of round-off
    along a null direction is projected out. Stops where a round gains less than half.
    """
    right = project(b)
    size = float(np.linalg.norm(right))
    x = np.zeros_like(right)
    if size == 0.0 or not np.isfinite(size):
        return x, 0.0 if size == 0.0 else np.inf
    left, residual = right, size
    for _ in range(ROUNDS):
        trial = x + project(factor.apply(left))
        rest = right - project(matrix @ trial)
        now = float(np.linalg.norm(rest))
        if not now < residual:
            break
        gained = now < 0.5 * residual
        x, left, residual = trial, rest, now
        if residual <= rtol * size or not gained:
            break
    return x, residual / size
