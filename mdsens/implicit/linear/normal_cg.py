"""Conjugate gradients on A^T A x = A^T b, for linear systems with any operator A, also singular."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from mdsens.implicit.linear.method import IterativeMethod, Round, projected
from mdsens.implicit.linear.operator import Operator
from mdsens.implicit.linear.result import Result
from mdsens.implicit.linear.vectors import CURVATURE_UNITS, Apply, Iterate, dot, norm, safe_divide

__all__ = ["NormalCG", "cgls"]


@dataclasses.dataclass(frozen=True)
class NormalCG(IterativeMethod):
    """Conjugate gradients on A^T A x = A^T b, for any operator A, also a singular one.

    Of all x that minimize |b - A x|, the method finds the shortest. It uses the form CGLS, which
    never applies A^T A to x, so that round-off grows with the condition number of A and not with
    its square (Björck, *Numerical Methods for Least Squares Problems*, 1996, section 7.4). The null
    space need not be declared. Where b lies outside of the range of A, |A^T r| falls to ``rtol``
    |A| |r| while the residual r itself cannot fall: the status is SINGULAR.

    The status of NormalCG does not say whether the solution is unique or the shortest of many; that
    of the method LeastSquares does. The number of steps is proportional to the condition number;
    GMRES and MINRES need fewer steps. So NormalCG is for an operator that may be singular and is
    too large to write out as a matrix.

    Args:
      rtol: requested relative residual. The relative error of a least-squares solution is up to the
        square of the condition number times as large.
      max_iterations: largest number of products with A and A^T together, two for each step; where
        None, 10 times the number of unknowns, at least 1,000.
    """

    def iteration(self, operator: Operator, b: Array) -> tuple[Round, int]:
        apply, _ = projected(operator)
        transposed, _ = projected(operator.transpose(b))
        # below 16 units of round-off, |A^T r| does not fall any more
        flat = max(self.rtol, 16 * float(jnp.finfo(b.dtype).eps))
        definite = operator.positive_semidefinite
        return lambda r, tol, limit: cgls(apply, transposed, r, tol, limit, flat, definite), 0


def cgls(
    apply: Apply,
    transposed: Apply,
    b: Array,
    tol: Array,
    limit: Array,
    flat: float,
    definite: bool = False,
) -> Iterate:
    """Minimize |b - A x| over the Krylov space of A^T A and A^T b by CGLS, from x = 0.

    Source: Hestenes and Stiefel, 1952. The residual r = b - A x is updated by products with A, and
    s = A^T r is computed from r. So A^T A is never applied to x, and round-off grows with the
    condition number of A, not with the square of this number. x lies in the range of A^T, so that x
    converges to the shortest least-squares solution. Each step takes a product with A and one with
    A^T.

    The result is SINGULAR where |s| <= ``flat`` |A| |r|, with |A| estimated from below by the
    products that were made. Then r lies in the null space of A^T and cannot fall. With a regular A
    this happens only where the condition number of A is 1 / ``flat`` or more. Where A should be
    positive semi-definite (``definite``), the result is INDEFINITE at a search direction of
    negative curvature; the iteration may end before it meets such a direction.

    Args:
      apply: the function v -> A v.
      transposed: the function v -> A^T v.
      b: right-hand side (n,).
      tol: norm of the residual at which to stop.
      limit: largest number of products with A and A^T together.
      flat: relative size of |A^T r| at which r counts as orthogonal to the range of A.
      definite: whether A should be positive semi-definite.

    Returns:
      (x, number of products with A and A^T, :class:`Result` code).
    """
    eps = jnp.finfo(b.dtype).eps

    def going(state: tuple[Any, ...]) -> Array:
        _, r, _, _, _, k, status = state
        return (norm(r) > tol) & (k < limit) & (status == Result.CONVERGED)

    def body(state: tuple[Any, ...]) -> tuple[Any, ...]:
        x, r, p, slope, size, k, _ = state
        q = apply(p)
        length, image = norm(p), norm(q)
        size = jnp.maximum(size, safe_divide(image, length))
        # Tested before the step: for a right-hand side outside of the range, the first |A^T r| is
        # already round-off.
        level = slope <= flat * size * norm(r)
        step = jnp.where(level, 0, safe_divide(slope, image) ** 2)
        x = x + step * p
        r = r - step * q
        s = transposed(r)
        new = norm(s)
        status = jnp.where(level, jnp.int32(Result.SINGULAR), jnp.int32(0))
        negative = (dot(p, q) < -CURVATURE_UNITS * eps * size * length**2) & definite
        status = jnp.where(negative, jnp.int32(Result.INDEFINITE), status)
        return x, r, s + safe_divide(new, slope) ** 2 * p, new, size, k + 2, status

    s = transposed(b)
    # x, r, p, |A^T r|, estimate of |A|, applications, result
    # One application is counted already, that of A^T to b.
    start = (jnp.zeros_like(b), b, s, norm(s), jnp.zeros((), b.dtype), jnp.int32(1), jnp.int32(0))
    x, *_, k, status = lax.while_loop(going, body, start)
    return x, k, status
