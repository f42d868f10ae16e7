"""Products of narrow matrices, a few columns of many rows, by BLAS on one thread.

BLAS divides such a product among threads, which gain nothing on columns, and while they wait for
one another they hold the cores: with other work on the machine, solves with six columns of 60,000
rows took four times as long. So the rows are taken in pieces for which BLAS takes one thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np

__all__ = ["add_product", "inner", "orthonormal", "sizes"]

# Multiplications in a product up to which BLAS takes one thread; in OpenBLAS 2^18.
ONE_THREAD = 200_000
# Rows up to which a product with a single column takes one thread; in OpenBLAS 9,216.
ONE_COLUMN = 8000
# Columns whose Cholesky factor has a diagonal that spans more than this are made orthonormal by
# Householder reflections: the quicker way would lose half of the digits.
SPANNED = 1e-5


def _pieces(first: np.ndarray, width: int) -> Iterator[slice]:
    """Yield slices of the rows of ``first`` (m, c) for products with ``width`` columns."""
    rows = max(1, min(ONE_COLUMN, ONE_THREAD // max(first.shape[1] * width, 1)))
    for start in range(0, len(first), rows):
        yield slice(start, start + rows)


def inner(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Compute the inner products (c, e) of the columns of matrices (m, c) and (m, e)."""
    total = np.zeros((first.shape[1], second.shape[1]))
    for rows in _pieces(first, second.shape[1]):
        total += first[rows].T @ second[rows]
    return total


def add_product(total: np.ndarray, columns: np.ndarray, factor: np.ndarray) -> None:
    """Add columns (m, c) times a small matrix (c, e) to ``total`` (m, e), in place."""
    for rows in _pieces(columns, factor.shape[1]):
        total[rows] += columns[rows] @ factor


def sizes(columns: np.ndarray) -> np.ndarray:
    """Compute the Euclidean norms (c,) of columns (m, c)."""
    return np.sqrt(np.einsum("mc,mc->c", columns, columns))


def orthonormal(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Write columns (m, r) as Q T, with orthonormal columns Q (m, r) and a triangle T (r, r)."""
    # By the Cholesky factor of the small matrix of inner products: Householder reflections of such
    # narrow columns take as long as a product with the matrix.
    with contextlib.suppress(np.linalg.LinAlgError):
        turn = np.linalg.cholesky(inner(columns, columns)).T
        across = np.diag(turn)
        if across.min() > SPANNED * across.max():
            unit = np.zeros_like(columns)
            add_product(unit, columns, np.linalg.inv(turn))
            return unit, turn
    return np.linalg.qr(columns)
