"""A sparse symmetric factorization on the host, for matrices with a null space, known or not."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import splu

__all__ = ["SparseFactor", "bound", "bounds", "dissection", "ordering", "solve_on_range"]

Project: TypeAlias = Callable[[np.ndarray], np.ndarray]

# The matrix is factorized as A + s |A| I with this s. Softer than the softest mode of a packing
# (1e-6 of the stiffest), so that refinement gains three digits a round; far above round-off, so
# that a null direction does no harm.
SHIFT = 1e-9
ROUNDS = 30
PLANAR = 20_000  # unknowns up to which two-dimensional networks are small
MANY = 16  # right-hand sides from which on threads pay


def bound(matrix: Any) -> float:
    """The largest row sum of |A|: no eigenvalue is larger, and the largest is seldom under a third
    of it.
    """
    return float(bounds(matrix, 1)[0])


def bounds(matrix: Any, parts: int) -> np.ndarray:
    """The same of each of the equal diagonal blocks that A is made of, (parts,)."""
    sizes = sp.csr_array((np.abs(matrix.data), matrix.indices, matrix.indptr), shape=matrix.shape)
    return np.max((sizes @ np.ones(matrix.shape[1])).reshape(parts, -1), axis=1, initial=0.0)


def ordering(matrix: Any, block: int) -> np.ndarray | None:
    """The order in which to factorize the stiffness of particles; None where minimum degree is as
    good.

    Measured, of discs: minimum degree and QDLDL take 0.6 of the time of METIS and SuperLU at 1,024,
    0.8 at 8,192 and 1.1 at 16,384. In 3-D they take more from 500 particles on, and ten times as
    much at 4,000.

    Args:
      matrix: symmetric, (m, m).
      block: unknowns of a particle, its dimension.
    """
    return None if block == 2 and matrix.shape[0] <= PLANAR else dissection(matrix, block)


def dissection(matrix: Any, block: int = 1) -> np.ndarray:
    """An ordering of a symmetric matrix's rows that keeps its factor sparse: nested dissection, by
    METIS.

    Karypis and Kumar, SIAM J. Sci. Comput. 20, 359 (1998). For a planar network of m nodes the
    factor has m log m entries and takes m^1.5 operations: of 130,000 discs a quarter of the time
    that minimum degree takes.

    Args:
      matrix: symmetric, (m, m), of any scipy format.
      block: unknowns that belong together, neighboring rows; they stay neighbors.
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


def _shifted(matrix: Any, shift: np.ndarray) -> Any:
    """A compressed matrix plus a diagonal."""
    size = matrix.shape[0]
    own = matrix.indices == np.repeat(np.arange(size), np.diff(matrix.indptr))
    if np.count_nonzero(own) != size:  # not all of its diagonal is there
        return (matrix + sp.dia_array((shift[None], [0]), shape=matrix.shape).tocsr()).tocsr()
    data = matrix.data.copy()
    data[own] += shift
    return sp.csr_array((data, matrix.indices, matrix.indptr), shape=matrix.shape)


class _Parts(NamedTuple):
    """A factorization L D L^T as its library gives it, with rows and columns in the order of the
    matrix.

    Attributes:
      solve: (m,) -> (m,).
      pivots: () -> (m,) the pivot of each row; None where rows had to be exchanged, so that they
        tell nothing.
      image: k -> (m,) L D e, e the unit vector of row k.
    """

    solve: Callable[[np.ndarray], np.ndarray]
    pivots: Callable[[], np.ndarray | None]
    image: Callable[[int], np.ndarray]


def _by_qdldl(matrix: Any) -> _Parts:
    """Ordered by minimum degree, row by row: the fastest for a small matrix."""
    import qdldl  # type: ignore[import-not-found]

    size, starts = matrix.shape[0], matrix.indptr
    rows = np.repeat(np.arange(size, dtype=np.int32), np.diff(starts))
    kept = matrix.indices <= rows  # the rows of its lower triangle are the columns of its upper one
    ends = np.concatenate([[0], np.cumsum(kept)])[starts].astype(np.int32)
    upper = sp.csc_matrix(
        (matrix.data[kept], matrix.indices[kept].astype(np.int32), ends), shape=matrix.shape
    )
    solver = qdldl.Solver(upper, upper=True)

    def pivots() -> np.ndarray:
        _, diagonal, order = solver.factors()
        found = np.empty(diagonal.size)
        found[order] = diagonal
        return found

    def image(k: int) -> np.ndarray:
        below, diagonal, order = solver.factors()
        at = int(np.flatnonzero(order == k)[0])
        found = np.zeros(diagonal.size)
        column = below[:, [at]].tocoo()
        found[order[column.row]] = diagonal[at] * column.data
        found[k] = diagonal[at]
        return found

    return _Parts(solver.solve, pivots, image)


def _by_superlu(matrix: Any, order: np.ndarray) -> _Parts:
    """In a given order, in dense blocks, which pay where the matrix is large."""
    permuted = matrix[order][:, order]
    permuted.sort_indices()
    lu = splu(  # of a symmetric matrix, the rows are the columns
        sp.csc_array((permuted.data, permuted.indices, permuted.indptr), shape=permuted.shape),
        permc_spec="NATURAL",
        diag_pivot_thresh=0.0,
        options={"SymmetricMode": True},
    )

    def solve(b: np.ndarray) -> np.ndarray:
        x = np.empty_like(b)
        x[order] = lu.solve(b[order])
        return x

    def pivots() -> np.ndarray | None:  # takes as long as half the factorization
        if not np.array_equal(lu.perm_r, lu.perm_c):
            return None
        found = np.empty(order.size)
        found[order] = lu.U.diagonal()[lu.perm_c]
        return found

    def image(k: int) -> np.ndarray:
        at = int(lu.perm_c[np.flatnonzero(order == k)[0]])
        column, right = lu.L[:, [at]].tocoo(), np.zeros(order.size)
        right[column.row] = lu.U[at, at] * column.data
        found = np.empty(order.size)
        found[order] = right[lu.perm_r]
        return found

    return _Parts(solve, pivots, image)


class SparseFactor:
    """L D L^T of a symmetric matrix plus a shift, without row exchanges.

    Args:
      matrix: symmetric, (m, m).
      shift: s in A + s I; or (m,) of a diagonal.
      order: of the rows, from :func:`dissection` of this matrix or of one much like it, for a large
        matrix; None for a small one.

    Raises:
      RuntimeError: a pivot is zero.
    """

    def __init__(self, matrix: Any, shift: float | np.ndarray, order: np.ndarray | None = None):
        shifted = _shifted(matrix.tocsr(), np.broadcast_to(shift, matrix.shape[:1]))
        self._parts = _by_qdldl(shifted) if order is None else _by_superlu(shifted, order)

    @functools.cached_property
    def _pivots(self) -> np.ndarray | None:
        return self._parts.pivots()

    @property
    def negative(self) -> int | None:
        """Number of negative pivots: by Sylvester's law of inertia that of eigenvalues of A below
        -s; None where the pivots are not known.
        """
        return None if self._pivots is None else int(np.sum(self._pivots < 0))

    def negatives(self, parts: int) -> np.ndarray:
        """The same of each of the equal diagonal blocks that A is made of, (parts,); -1 where they
        tell nothing.
        """
        if self._pivots is None:
            return np.full(parts, -1)
        return np.sum(self._pivots.reshape(parts, -1) < 0, axis=1)

    def negative_direction(self) -> np.ndarray | None:
        """v with v^T (A + s I) v the most negative pivot; None where none is negative, or pivots
        tell nothing.
        """
        if self._pivots is None or not self.negative:
            return None
        # L D L^T v = L D e, so that v = L^-T e and v^T L D L^T v is the pivot
        return self._parts.solve(self._parts.image(int(np.argmin(self._pivots))))

    def apply(self, b: np.ndarray) -> np.ndarray:
        """(A + s I)^-1 b, (m,) or (m, k)."""
        if b.ndim == 1:
            return self._parts.solve(b)
        columns = np.empty(b.shape, order="F")

        def solve(some: range) -> None:
            for k in (
                some
            ):  # SuperLU takes ten times as long for many at once as for one after the other
                columns[:, k] = self._parts.solve(np.ascontiguousarray(b[:, k]))

        count, cores = b.shape[1], os.cpu_count() or 1
        if count < MANY:
            solve(range(count))
        else:
            with ThreadPoolExecutor(
                cores
            ) as pool:  # both libraries let go of Python while they solve
                list(pool.map(solve, [range(k, count, cores) for k in range(cores)]))
        return columns


def solve_on_range(
    matrix: Any,
    factor: SparseFactor,
    project: Project,
    b: np.ndarray,
    rtol: float = 1e-15,
    parts: int = 1,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A x = b by refinement with a factor of A + s I: ``(x, |b - A x| / |b|, rounds)``, x on the
    range of P as b is.

    Each round leaves s / (lambda + s) of the error along a mode of stiffness lambda; what the
    factor makes of round-off along a null direction is projected out. A column stops where a round
    gains less than half.

    Args:
      b: (m, k), k right-hand sides.
      parts: equal diagonal blocks that A is made of. Each part of each right-hand side has its own
        residual and number of rounds, (parts, k).
    """

    def sizes(columns: np.ndarray) -> np.ndarray:
        return np.asarray(np.linalg.norm(columns.reshape(parts, -1, columns.shape[1]), axis=1))

    def where(found: np.ndarray, columns: np.ndarray, others: np.ndarray) -> np.ndarray:
        return np.where(np.repeat(found, len(columns) // parts, axis=0), columns, others)

    size = sizes(b)
    x, left, best = np.zeros_like(b), b, np.where(np.isfinite(size), 1.0, np.inf)
    best = np.where(size == 0.0, 0.0, best)
    going = np.isfinite(size) & (size > 0.0)
    rounds = np.zeros(size.shape, np.int32)
    while going.any() and rounds.max() < ROUNDS:
        rounds += going
        some = going.any(axis=0)
        trial, rest = x.copy(), left.copy()
        trial[:, some] += project(factor.apply(left[:, some]))
        rest[:, some] = b[:, some] - project(matrix @ trial[:, some])
        now = sizes(rest) / np.where(size > 0.0, size, 1.0)
        better = going & (now < best)
        going = better & (now < 0.5 * best) & (now > rtol)
        x, left, best = (
            where(better, trial, x),
            where(better, rest, left),
            np.where(better, now, best),
        )
    return x, best, rounds
