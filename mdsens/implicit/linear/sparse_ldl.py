"""Factorization of a sparse symmetric matrix by scipy or QDLDL, also of a singular matrix."""

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

# A projection of columns, (m, k) -> (m, k).
Project: TypeAlias = Callable[[np.ndarray], np.ndarray]

# The matrix is factorized as A + s |A| I with this s. It is smaller than the lowest stiffness of a
# packing, 1e-6 of the largest, so that refinement gains three digits a round. It is far above
# round-off, so that a null direction does no harm.
SHIFT = 1e-9
# Largest number of rounds of refinement. It ends earlier, where a round gains less than half.
ROUNDS = 30
# Largest number of unknowns of a two-dimensional network for which minimum degree is the faster
# ordering, see ``ordering``.
PLANAR = 20_000
# Smallest number of right-hand sides for which several threads are faster than one.
MANY = 16


def bound(matrix: sp.csr_array) -> float:
    """Compute an upper bound of the eigenvalues of a matrix A: the largest sum of |A| over a row.

    The largest eigenvalue is rarely below a third of this bound.
    """
    return float(bounds(matrix, 1)[0])


def bounds(matrix: sp.csr_array, parts: int) -> np.ndarray:
    """Compute an upper bound of the eigenvalues of each diagonal block of a matrix A, (parts,).

    A has ``parts`` diagonal blocks of equal size. The bound is the largest sum of |A| over a row of
    the block.
    """
    sizes = sp.csr_array((np.abs(matrix.data), matrix.indices, matrix.indptr), shape=matrix.shape)
    return np.max((sizes @ np.ones(len(matrix.indptr) - 1)).reshape(parts, -1), axis=1, initial=0.0)


def ordering(matrix: sp.csr_array, block: int) -> np.ndarray | None:
    """Choose the order of rows in which the sparse Hessian of a packing is factorized fastest.

    The choice is between minimum degree, with the library QDLDL, and the nested dissection of
    METIS, with SuperLU. Measured for discs: minimum degree takes 0.6 of the time of METIS at 1,024
    particles, 0.8 at 8,192 and 1.1 at 16,384. For spheres in 3-D, minimum degree takes more time
    than METIS from 500 particles on, and ten times as much at 4,000.

    Args:
      matrix: the Hessian, a symmetric matrix (m, m).
      block: number of unknowns of a particle, which is the dimension of space.

    Returns:
      the order of the rows (m,); None for minimum degree.
    """
    # indptr has one entry more than the matrix has rows.
    return None if block == 2 and len(matrix.indptr) <= PLANAR + 1 else dissection(matrix, block)


def dissection(matrix: sp.csr_array, block: int = 1) -> np.ndarray:
    """Order the rows of a symmetric matrix by nested dissection, which keeps its factor sparse.

    The order is computed by METIS (Karypis and Kumar, SIAM J. Sci. Comput. 20, 359 (1998)). For a
    planar network of m nodes the factor has m log m entries and takes m^1.5 operations. For 130,000
    discs the factorization takes a quarter of the time that it takes in minimum-degree order.

    Args:
      matrix: the symmetric matrix, (m, m), in any format of scipy.
      block: number of neighboring rows that belong together, and stay neighbors in the order.

    Returns:
      the order of the rows (m,).
    """
    import pymetis

    # A node of the graph is a particle, so that METIS orders ``block`` times fewer nodes.
    graph = matrix.tobsr((block, block)) if block > 1 else matrix.tocsr()
    size = len(graph.indptr) - 1
    rows = np.repeat(np.arange(size), np.diff(graph.indptr))
    off_diagonal = rows != graph.indices
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows[off_diagonal], minlength=size))])
    if not starts[-1]:  # a diagonal matrix, whose graph has no edges
        return np.arange(size * block)
    graph_of_metis = pymetis.CSRAdjacency(starts, graph.indices[off_diagonal])
    order, _ = pymetis.nested_dissection(graph_of_metis)
    return (np.asarray(order)[:, None] * block + np.arange(block)).ravel()


def _shifted(matrix: sp.csr_array, shift: np.ndarray) -> Any:
    """Add the numbers ``shift`` (m,) to the diagonal of a sparse matrix in compressed rows.

    Where all diagonal entries are stored, these entries are changed in a copy of the data, which is
    faster than adding two sparse matrices.
    """
    size = len(matrix.indptr) - 1
    on_diagonal = matrix.indices == np.repeat(np.arange(size), np.diff(matrix.indptr))
    if np.count_nonzero(on_diagonal) != size:
        return (matrix + sp.dia_array((shift[None], [0]), shape=matrix.shape).tocsr()).tocsr()
    data = matrix.data.copy()
    data[on_diagonal] += shift
    return sp.csr_array((data, matrix.indices, matrix.indptr), shape=matrix.shape)


class _Parts(NamedTuple):
    """Functions of a factorization L D L^T of a matrix by the library QDLDL or SuperLU.

    Their vectors are in the order of the rows of the matrix, not in that of the factor.

    Attributes:
      solve: the function b -> x (m,) that solves the linear system of the matrix for a vector b.
      pivots: the function () -> (m,) that returns the pivot of each row (entry of D), or None where
        rows were exchanged, since then the signs of the pivots are not those of the eigenvalues.
      image: the function k -> L D e (m,), with e the unit vector of row k.
    """

    solve: Callable[[np.ndarray], np.ndarray]
    pivots: Callable[[], np.ndarray | None]
    image: Callable[[int], np.ndarray]


def _by_qdldl(matrix: sp.csr_array) -> _Parts:
    """Factorize a sparse symmetric matrix with QDLDL, with the rows in minimum-degree order.

    This is the fastest way for a small matrix.
    """
    import qdldl  # type: ignore[import-not-found]

    starts = matrix.indptr
    size = len(starts) - 1
    rows = np.repeat(np.arange(size, dtype=np.int32), np.diff(starts))
    # QDLDL takes the columns of the upper triangle, which are the rows of the lower one.
    in_lower = matrix.indices <= rows
    # Entry k is the number of kept entries before row k.
    ends = np.concatenate([[0], np.cumsum(in_lower)])[starts].astype(np.int32)
    upper = sp.csc_matrix(
        (matrix.data[in_lower], matrix.indices[in_lower].astype(np.int32), ends),
        shape=matrix.shape,
    )
    solver = qdldl.Solver(upper, upper=True)

    def pivots() -> np.ndarray:
        _, diagonal, order = solver.factors()
        in_matrix_order = np.empty(diagonal.size)
        in_matrix_order[order] = diagonal
        return in_matrix_order

    def image(k: int) -> np.ndarray:
        # QDLDL stores L without its diagonal of ones.
        strict_lower, diagonal, order = solver.factors()
        position = int(np.flatnonzero(order == k)[0])
        column = strict_lower[:, [position]].tocoo()
        in_matrix_order = np.zeros(diagonal.size)
        in_matrix_order[order[column.row]] = diagonal[position] * column.data
        in_matrix_order[k] = diagonal[position]
        return in_matrix_order

    return _Parts(solver.solve, pivots, image)


def _by_superlu(matrix: sp.csr_array, order: np.ndarray) -> _Parts:
    """Factorize a sparse symmetric matrix with SuperLU, with the rows in a given order.

    SuperLU works by dense blocks, which is faster than QDLDL for a large matrix.
    """
    permuted = matrix[order][:, order]
    permuted.sort_indices()
    # SuperLU takes columns; those of a symmetric matrix are its rows. The threshold of zero keeps
    # the pivots on the diagonal, as in L D L^T.
    columns = sp.csc_array((permuted.data, permuted.indices, permuted.indptr), shape=permuted.shape)
    lu = splu(
        columns,
        permc_spec="NATURAL",
        diag_pivot_thresh=0.0,
        options={"SymmetricMode": True},
    )

    def solve(b: np.ndarray) -> np.ndarray:
        x = np.empty_like(b)
        x[order] = lu.solve(b[order])
        return x

    def pivots() -> np.ndarray | None:
        # Reading U takes half as long as the factorization, so only when the pivots are needed.
        # Where the two permutations differ, rows were exchanged to avoid a small pivot.
        if not np.array_equal(lu.perm_r, lu.perm_c):
            return None
        in_matrix_order = np.empty(order.size)
        in_matrix_order[order] = lu.U.diagonal()[lu.perm_c]
        return in_matrix_order

    def image(k: int) -> np.ndarray:
        position = int(lu.perm_c[np.flatnonzero(order == k)[0]])
        column = lu.L[:, [position]].tocoo()
        in_factor_order = np.zeros(order.size)
        in_factor_order[column.row] = lu.U[position, position] * column.data
        in_matrix_order = np.empty(order.size)
        in_matrix_order[order] = in_factor_order[lu.perm_r]
        return in_matrix_order

    return _Parts(solve, pivots, image)


class SparseFactor:
    """The factorization A + s I = L D L^T of a sparse symmetric matrix A, without row exchanges.

    Args:
      matrix: A, symmetric, (m, m).
      shift: the number s; or (m,) the numbers to add to the diagonal of A.
      order: order of the rows, from :func:`dissection` of this matrix or a similar one, for a large
        matrix; None for a small one, which is ordered by minimum degree.

    Raises:
      RuntimeError: a pivot is zero.
    """

    def __init__(
        self, matrix: sp.csr_array, shift: float | np.ndarray, order: np.ndarray | None = None
    ):
        rows = matrix.tocsr()
        shifted = _shifted(rows, np.broadcast_to(shift, len(rows.indptr) - 1))
        self._parts = _by_qdldl(shifted) if order is None else _by_superlu(shifted, order)

    @functools.cached_property
    def _pivots(self) -> np.ndarray | None:
        return self._parts.pivots()

    @property
    def negative(self) -> int | None:
        """Return the number of eigenvalues of A below -s, where A + s I = L D L^T is factorized.

        By Sylvester's law of inertia this is the number of negative pivots (entries of D). The
        result is None where the pivots are not known.
        """
        return None if self._pivots is None else int(np.sum(self._pivots < 0))

    def negatives(self, parts: int) -> np.ndarray:
        """Count the eigenvalues below -s of each of the ``parts`` equal diagonal blocks of A.

        The factorized matrix is A + s I = L D L^T.

        Returns:
          numbers (parts,), which are -1 where the pivots (entries of D) are not known.
        """
        if self._pivots is None:
            return np.full(parts, -1)
        # The pivots are in the order of the rows of A, in which each block is a run of rows.
        return np.sum(self._pivots.reshape(parts, -1) < 0, axis=1)

    def negative_direction(self) -> np.ndarray | None:
        """Compute a vector v for which v^T (A + s I) v is the most negative pivot.

        The factorized matrix is A + s I = L D L^T, with the pivots in D. The result is None where
        no pivot is negative, or the pivots are not known.
        """
        if self._pivots is None or not self.negative:
            return None
        # It solves L D L^T v = L D e, so that v = L^-T e, and v^T L D L^T v is the pivot.
        return self._parts.solve(self._parts.image(int(np.argmin(self._pivots))))

    def apply(self, b: np.ndarray) -> np.ndarray:
        """Compute (A + s I)^-1 b by the factorization of A + s I, for b of shape (m,) or (m, k)."""
        if b.ndim == 1:
            return self._parts.solve(b)
        columns = np.empty(b.shape, order="F")

        def solve(indices: range) -> None:
            # One column after the other: SuperLU takes ten times as long for many at once.
            for k in indices:
                columns[:, k] = self._parts.solve(np.ascontiguousarray(b[:, k]))

        count = b.shape[1]
        cores = os.cpu_count() or 1
        if count < MANY:
            solve(range(count))
        else:
            # Both libraries release Python's lock while they solve.
            with ThreadPoolExecutor(cores) as pool:
                # list(), since map raises an error of a thread only when its result is asked for.
                list(pool.map(solve, [range(k, count, cores) for k in range(cores)]))
        return columns


def solve_on_range(
    matrix: sp.csr_array,
    factor: SparseFactor,
    project: Project,
    b: np.ndarray,
    rtol: float = 1e-15,
    parts: int = 1,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Solve A x = b by iterative refinement with a factorization of A + s I, on the range of P.

    Each round of the refinement solves for the residual, and reduces the error along a mode of
    stiffness lambda by the factor s / (lambda + s). The projector P removes the null directions of
    A, along which a solve with A + s I magnifies round-off. The refinement of a right-hand side
    ends where a round reduces the residual by less than half.

    Args:
      matrix: A, sparse, (m, m).
      factor: the factorization of A + s I.
      project: the function that multiplies P with the columns of an (m, k) array.
      b: (m, k), k right-hand sides in the range of P.
      rtol: relative residual at which to stop.
      parts: number of equal diagonal blocks of A. Each block of each right-hand side has its own
        residual and number of rounds.

    Returns:
      x (m, k); the relative residuals |b - A x| / |b| (parts, k); the number of rounds (parts, k).
    """

    def norms(columns: np.ndarray) -> np.ndarray:
        return np.asarray(np.linalg.norm(columns.reshape(parts, -1, columns.shape[1]), axis=1))

    def where(mask: np.ndarray, columns: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Return ``columns`` (m, k) in the blocks where ``mask`` is True, and ``others`` elsewhere.

        Each column has ``parts`` blocks of equal length; the mask (parts, k) has one entry for
        each block of each column.
        """
        return np.where(np.repeat(mask, len(columns) // parts, axis=0), columns, others)

    size = norms(b)
    x = np.zeros_like(b)
    residual = b
    # x = 0 has the relative residual 1, or 0 where b is zero; for an infinite b there is none.
    best = np.where(np.isfinite(size), 1.0, np.inf)
    best = np.where(size == 0.0, 0.0, best)
    going = np.isfinite(size) & (size > 0.0)
    rounds = np.zeros(size.shape, np.int32)
    while going.any() and rounds.max() < ROUNDS:
        rounds += going
        active = going.any(axis=0)  # columns with a block that is not done
        x_new = x.copy()
        residual_new = residual.copy()
        x_new[:, active] += project(factor.apply(residual[:, active]))
        residual_new[:, active] = b[:, active] - project(matrix @ x_new[:, active])
        relative = norms(residual_new) / np.where(size > 0.0, size, 1.0)
        better = going & (relative < best)
        going = better & (relative < 0.5 * best) & (relative > rtol)
        x = where(better, x_new, x)
        residual = where(better, residual_new, residual)
        best = np.where(better, relative, best)
    return x, best, rounds
