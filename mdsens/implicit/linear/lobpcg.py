"""LOBPCG: the lowest eigenpairs of a symmetric operator, by products with it.

Each step minimizes Rayleigh's quotients in the space of the vectors X, of their preconditioned
residuals W and of the last change P of the vectors (Knyazev, SIAM J. Sci. Comput. 23, 517 (2001)).
The three are kept orthonormal, P by a rotation of the small eigenproblem's vectors (Hetmaniuk and
Lehoucq, J. Comput. Phys. 218, 324 (2006)), so that the method is stable to round-off.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mdsens.implicit.linear.columns import add_product, inner, orthonormal, sizes

__all__ = ["lobpcg"]

# Products of a matrix with the columns of an (m, c) array.
Apply = Callable[[np.ndarray], np.ndarray]

# A direction of norm one of which less than this is left outside of the others is round-off.
DEPENDENT = 1e-10


def lobpcg(
    apply: Apply,
    start: np.ndarray,
    wanted: int,
    tolerance: float,
    limit: int,
    precondition: Apply | None,
) -> np.ndarray:
    """Compute the lowest eigenvectors of a symmetric operator A, as columns (m, k).

    Args:
      apply: the function V -> A V for columns V.
      start: (m, k) independent vectors; more than are wanted converge in fewer steps.
      wanted: number of vectors, the lowest ones, whose residuals decide when to stop.
      tolerance: largest residual |A v - lambda v| of a vector v of norm one.
      limit: largest number of steps, with one product of up to k columns each.
      precondition: the function that multiplies an approximation of A^-1, symmetric and positive,
        with columns; None for none.
    """
    k = start.shape[1]
    x = orthonormal(start)[0]
    values, turn = _eigenpairs(inner(x, apply(x)))
    x = x @ turn
    ax = apply(x)
    p = ap = np.zeros((len(x), 0))
    for _ in range(limit):
        residual = ax - x * values
        left = sizes(residual)
        if not np.isfinite(left).all() or not (left[:wanted] > tolerance).any():
            break
        unfinished = residual[:, left > tolerance]
        present = np.concatenate([x, p], axis=1)
        w = _outside(unfinished if precondition is None else precondition(unfinished), present)
        if not w.shape[1]:
            break
        space = np.concatenate([present, w], axis=1)
        image = np.concatenate([ax, ap, apply(w)], axis=1)
        values, vectors = _eigenpairs(inner(space, image))
        values = values[:k]
        both = _next(vectors[:, :k])
        moved = np.zeros((len(x), both.shape[1]))
        add_product(moved, space, both)
        image_moved = np.zeros_like(moved)
        add_product(image_moved, image, both)
        x, p = moved[:, :k], moved[:, k:]
        ax, ap = image_moved[:, :k], image_moved[:, k:]
    return x


def _eigenpairs(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute all eigenvalues, ascending, and eigenvectors of the symmetric part of a matrix."""
    return np.linalg.eigh(0.5 * (matrix + matrix.T))


def _outside(columns: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Return orthonormal columns for the part of ``columns`` outside of orthonormal ``present``.

    Columns that depend on the others are left out.
    """
    size = sizes(columns)
    rest = columns[:, size > 0] / size[size > 0]
    for _ in range(2):  # once more, for what round-off of the first time leaves
        add_product(rest, present, -inner(present, rest))
        values, vectors = _eigenpairs(inner(rest, rest))
        kept = values > DEPENDENT**2
        scaled = np.zeros((len(rest), int(kept.sum())))
        add_product(scaled, rest, vectors[:, kept] / np.sqrt(values[kept]))
        rest = scaled
    return rest


def _next(vectors: np.ndarray) -> np.ndarray:
    """Return the coefficients of the next X, and of P: their change, orthonormal to X.

    Args:
      vectors: (s, k) coefficients of the next X in the orthonormal vectors of the space, of which
        the first k are the present X.
    """
    k = vectors.shape[1]
    change = vectors.copy()
    change[:k] = 0.0
    change -= vectors @ (vectors.T @ change)
    left, values, _ = np.linalg.svd(change, full_matrices=False)
    return np.concatenate([vectors, left[:, values > DEPENDENT]], axis=1)
