"""A sparse symmetric factorisation on the host, for matrices that have a null space, known or not."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import splu

__all__ = ["SparseFactor", "bound", "bounds", "dissection", "solve_on_range"]

Project: TypeAlias = Callable[[np.ndarray], np.ndarray]

# The matrix is factorised as A + s |A| I with this s. Softer than the softest mode of a packing (1e-6 of the stiffest),
# so that refinement gains three digits a round; far above round-off, so that a null direction does no harm.
SHIFT = 1e-9
ROUNDS = 30
# Up to here dense blocks of columns cost SuperLU more than they save: a quarter of its time.
SMALL, ONE_COLUMN = 10_000, {"relax": 1, "panel_size": 1}
MANY = 16  # right-hand sides from which on threads pay


def bound(matrix: Any) -> float:
    """The largest row sum of |A|: no eigenvalue is larger, and the largest is seldom under a third of it."""
    return float(bounds(matrix, 1)[0])


def bounds(matrix: Any, parts: int) -> np.ndarray:
    """The same of each of the equal diagonal blocks that A is made of, (parts,)."""
    return np.max(np.asarray(abs(matrix).sum(axis=1)).reshape(parts, -1), axis=1, initial=0.0)


def dissection(matrix: Any, block: int = 1) -> np.ndarray:
    """An ordering of a symmetric matrix's rows that keeps its factor sparse: nested dissection, by METIS.

    Karypis and Kumar, SIAM J. Sci. Comput. 20, 359 (1998). For a planar network of m nodes the factor has m log m
    entries and takes m^1.5 operations: of 130,000 discs a quarter of the time that minimum degree takes.

    Args:
      matrix: symmetric, (m, m), of any scipy format.
      block: unknowns that belong together, neighbouring rows; they stay neighbours.
    """
    import pymetis

    size = matrix.shape[0] // block
    graph = matrix.tobsr((block, block)) if block > 1 else matrix.tocsr()
    rows = np.repeat(np.arange(size), np.diff(graph.indptr))
    others = rows != graph.indices
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows[others], minlength=size))])
    if not starts[-1]:
        return np.arange(matrix.shape[0])
    order, _ = pymetis.nested_dissection(pymetis.CSRAdjacency(starts, graph.indices[others]))
    return (np.asarray(order)[:, None] * block + np.arange(block)).ravel()


class SparseFactor:
    """L D L^T of a symmetric matrix plus a shift, by SuperLU without row exchanges.

    Args:
      matrix: symmetric, (m, m).
      shift: s in A + s I; or (m,) of a diagonal.
      order: of the rows, from :func:`dissection` of this matrix or of one much like it; minimum degree where None.
    """

    def __init__(self, matrix: Any, shift: float | np.ndarray, order: np.ndarray | None = None):
        size = matrix.shape[0]
        diagonal = sp.dia_array((np.broadcast_to(shift, (1, size)), [0]), shape=(size, size))
        shifted = (matrix + diagonal.tocsr()).tocsr()
        self._order = np.arange(size) if order is None else order
        if order is not None:
            shifted = shifted[order][:, order]
        shifted.sort_indices()
        self._lu = splu(  # of a symmetric matrix, the rows are the columns
            sp.csc_array((shifted.data, shifted.indices, shifted.indptr), shape=shifted.shape),
            permc_spec="MMD_AT_PLUS_A" if order is None else "NATURAL",
            diag_pivot_thresh=0.0,
            options={"SymmetricMode": True},
            **(ONE_COLUMN if size < SMALL else {}),
        )

    @functools.cached_property
    def _pivots(self) -> np.ndarray | None:
        """(m,) the pivot of each row of A; None where rows had to be exchanged, so that they tell nothing.

        Takes as long as half the factorisation.
        """
        if not np.array_equal(self._lu.perm_r, self._lu.perm_c):
            return None
        pivots = np.empty(self._order.size)
        pivots[self._order] = self._lu.U.diagonal()[self._lu.perm_c]
        return pivots

    @property
    def negative(self) -> int | None:
        """Number of negative pivots: by Sylvester's law, of eigenvalues of A below -s; None where they tell nothing."""
        return None if self._pivots is None else int(np.sum(self._pivots < 0))

    def negatives(self, parts: int) -> np.ndarray:
        """The same of each of the equal diagonal blocks that A is made of, (parts,); -1 where they tell nothing."""
        if self._pivots is None:
            return np.full(parts, -1)
        return np.sum(self._pivots.reshape(parts, -1) < 0, axis=1)

    def negative_direction(self) -> np.ndarray | None:
        """v with v^T (A + s I) v the most negative pivot; None where none is negative, or pivots tell nothing."""
        if not self.negative:
            return None
        pivots = self._lu.U.diagonal()
        k = int(np.argmin(pivots))
        right = np.zeros(pivots.size)  # L D L^T v = d_k L e_k, so that v = L^-T e_k and v^T L D L^T v = d_k
        column = self._lu.L[:, [k]].tocoo()
        right[column.row] = pivots[k] * column.data
        v = np.empty(pivots.size)
        v[self._order] = self._lu.solve(right[self._lu.perm_r])
        return v

    def apply(self, b: np.ndarray) -> np.ndarray:
        """(A + s I)^-1 b, (m,) or (m, k)."""
        x = np.empty(b.shape)
        if b.ndim == 1:
            x[self._order] = self._lu.solve(b[self._order])
            return x
        columns = np.asfortranarray(b[self._order])

        def solve(some: range) -> None:
            for k in some:  # SuperLU takes ten times as long for many at once as for one after the other
                columns[:, k] = self._lu.solve(columns[:, k])

        count, cores = b.shape[1], os.cpu_count() or 1
        if count < MANY:
            solve(range(count))
        else:
            with ThreadPoolExecutor(cores) as pool:  # it lets go of Python while it solves
                list(pool.map(solve, [range(k, count, cores) for k in range(cores)]))
        x[self._order] = columns
        return x


def solve_on_range(
    matrix: Any, factor: SparseFactor, project: Project, b: np.ndarray, rtol: float = 1e-15, parts: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A x = P b by refinement with a factor of A + s I: ``(x, |P b - A x| / |P b|, rounds)``, x on the range of P.

    Each round leaves s / (lambda + s) of the error along a mode of stiffness lambda; what the factor makes of round-off
    along a null direction is projected out. A column stops where a round gains less than half.

    Args:
      b: (m, k), k right-hand sides.
      parts: equal diagonal blocks that A is made of. Each part of each right-hand side has its own residual and number
        of rounds, (parts, k).
    """

    def sizes(columns: np.ndarray) -> np.ndarray:
        return np.asarray(np.linalg.norm(columns.reshape(parts, -1, columns.shape[1]), axis=1))

    def where(found: np.ndarray, columns: np.ndarray, others: np.ndarray) -> np.ndarray:
        return np.where(np.repeat(found, len(columns) // parts, axis=0), columns, others)

    right = project(b)
    size = sizes(right)
    x, left, best = np.zeros_like(right), right, np.where(np.isfinite(size), 1.0, np.inf)
    best = np.where(size == 0.0, 0.0, best)
    going = np.isfinite(size) & (size > 0.0)
    rounds = np.zeros(size.shape, np.int32)
    while going.any() and rounds.max() < ROUNDS:
        rounds += going
        some = going.any(axis=0)
        trial, rest = x.copy(), left.copy()
        trial[:, some] += project(factor.apply(left[:, some]))
        rest[:, some] = right[:, some] - project(matrix @ trial[:, some])
        now = sizes(rest) / np.where(size > 0.0, size, 1.0)
        better = going & (now < best)
        going = better & (now < 0.5 * best) & (now > rtol)
        x, left, best = where(better, trial, x), where(better, rest, left), np.where(better, now, best)
    return x, best, rounds
