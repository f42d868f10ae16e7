"""Block conjugate gradients: several right-hand sides of one sparse matrix, solved for together.

All right-hand sides share one Krylov space, so that each of them needs fewer products than alone,
and a product with several columns reads the matrix once. The search directions are kept orthonormal
(Dubrulle, Electron. Trans. Numer. Anal. 12, 216 (2001)), which holds where some right-hand sides
converge before others, or depend on one another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse as sp

from mdsens.implicit.linear.columns import add_product, inner, orthonormal
from mdsens.implicit.linear.vectors import CURVATURE_UNITS

__all__ = ["BlockSolution", "block_cg"]

# Products of a matrix with the columns of an (m, c) array.
Apply = Callable[[np.ndarray], np.ndarray]

# Share of the allowed residual to which the scaled system is solved.
SHARE = 0.2
# A singular value of the right-hand sides below this part of the largest one, in units of eps m, is
# round-off: the column depends on the others.
RANK_UNITS = 1.0


class BlockSolution(NamedTuple):
    """Solutions of A X = B by :func:`block_cg`.

    Attributes:
      x: (m, c) the solutions.
      residual: (c,) |b - A x| / |b| of each column, computed from x; 0 where b is zero.
      products: number of products with A, of up to c columns each.
      negative: whether a direction of negative curvature was met: A is then indefinite.
    """

    x: np.ndarray
    residual: np.ndarray
    products: int
    negative: bool


def block_cg(
    apply: Apply, b: np.ndarray, rtol: float, limit: int, scale: sp.csr_array, project: Apply
) -> BlockSolution:
    """Solve A X = B by block conjugate gradients, with A symmetric and positive semidefinite.

    The method works on S A S^T, for a scaling S that makes this matrix better conditioned than A.
    The residual of that system may be smaller than the residual B - A X, which is computed after
    each round and solved for again, by as much more closely as the last rounds showed to be needed.

    Args:
      apply: the function V -> A V for an array of columns.
      b: (m, c) the right-hand sides B, in the range of A; a column that is not finite has the
        solution zero.
      rtol: relative residual of each column at which to stop.
      limit: largest number of products with A.
      scale: the sparse matrix S (m, m).
      project: the function that removes the null space of A from columns.
    """
    size = np.linalg.norm(b, axis=0)
    sound = np.isfinite(size) & (size > 0)
    unit = np.where(sound, size, 1.0)
    residual = np.where(sound, b / unit, 0.0)  # columns of one size: none is lost beside another
    right = residual
    x = np.zeros_like(right)
    left = np.where(sound, 1.0, np.where(size == 0, 0.0, np.inf))
    transposed = scale.T.tocsr()
    products = 0
    negative = False
    going = sound
    magnified = 1.0
    while going.any() and products < limit and not negative:
        before = float(left[going].max())
        aim = SHARE * rtol / (before * magnified)
        change, used, negative = _run(
            lambda v: scale @ apply(transposed @ v),
            scale @ residual[:, going],
            aim,
            limit - products,
        )
        products += used + 1
        trial = x.copy()
        trial[:, going] += project(transposed @ change)
        new = right - project(apply(trial))
        norms = np.linalg.norm(new, axis=0)
        better = going & (norms < left)
        magnified = max(magnified, float(norms[going].max()) / (before * aim))
        # a column that a round improved by less than half is at round-off
        going = better & (norms < 0.5 * left) & (norms > rtol)
        x = np.where(better, trial, x)
        residual = np.where(better, new, residual)
        left = np.where(better, norms, left)
    return BlockSolution(x * unit, left, products, negative)


def _run(apply: Apply, b: np.ndarray, rtol: float, limit: int) -> tuple[np.ndarray, int, bool]:
    """Run block conjugate gradients from zero, to a relative residual of ``rtol``.

    The residuals are Q S, with orthonormal columns Q (m, r) and S (r, c), and the directions P are
    orthonormal up to earlier directions. r is the rank of the right-hand sides b (m, c).

    Returns:
      (solutions (m, c), number of products, whether a negative curvature was met).
    """
    eps = np.finfo(float).eps
    goal = rtol * np.linalg.norm(b, axis=0)
    q, values, rest = scipy.linalg.svd(b, full_matrices=False)
    kept = values > RANK_UNITS * eps * len(b) * values[0]
    q = q[:, kept]
    s = values[kept, None] * rest[kept]
    p = q.copy()  # q is changed in place
    x = np.zeros_like(b)
    largest = 0.0
    for step in range(limit):
        ap = apply(p)
        curvature = inner(p, ap)
        curvature = 0.5 * (curvature + curvature.T)
        values, vectors = np.linalg.eigh(curvature)
        largest = max(largest, float(values[-1]))
        zero = CURVATURE_UNITS * eps * largest
        if values[0] < -zero:
            return x, step + 1, True
        # A direction without curvature is round-off: the others go on.
        inverse = np.where(values > zero, 1.0 / np.where(values > zero, values, 1.0), 0.0)
        steps = (vectors * inverse) @ vectors.T
        add_product(x, p, steps @ s)
        add_product(q, ap, -steps)
        q, turn = orthonormal(q)
        s = turn @ s
        if not (np.linalg.norm(s, axis=0) > goal).any():
            return x, step + 1, False
        before = p
        p = q.copy()
        add_product(p, before, turn.T)
    return x, limit, False
