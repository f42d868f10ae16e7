"""Conjugate gradients on the normal equations, for any operator, singular ones included."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from mdsens.implicit.linear._vectors import CURVATURE_UNITS, Apply, Iterate, dot, norm, safe_divide
from mdsens.implicit.linear.method import IterativeMethod, Round, projected
from mdsens.implicit.linear.operator import Operator
from mdsens.implicit.linear.result import Result

__all__ = ["NormalCG", "cgls"]


@dataclasses.dataclass(frozen=True)
class NormalCG(IterativeMethod):
    """Conjugate gradients on A^T A x = A^T b, for any operator: the shortest of the x that make |b
    - A x| least.

    In the form that never squares the residual (CGLS; Björck, *Numerical Methods for Least Squares
    Problems*, 1996, section 7.4). It needs no null space declared. Where b lies outside of A's
    range, |A^T r| falls to ``rtol`` |A| |r| above a residual r that cannot: status SINGULAR. It
    cannot tell a unique answer from the shortest of many, which LeastSquares does, and its steps go
    by the condition number where those of GMRES or MINRES go by less: for an operator that may be
    singular and is too large to write out.

    Args:
      rtol: relative residual asked for, as in :class:`CG`. Of a least-squares solution the error is
        up to the square of the condition number times as large.
      max_iterations: applications of A and of A^T together (two a step); 10 times the number of
        unknowns, at least 1,000, where None.
    """

    def iteration(self, operator: Operator, b: Array) -> tuple[Round, int]:
        apply, _ = projected(operator)
        transposed, _ = projected(operator.transpose(b))
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
    """CGLS (Hestenes and Stiefel, 1952): the least |b - A x| over the Krylov space of A^T A and A^T
    b, from zero.

    The residual r is updated by products with A and s = A^T r taken from it, so that A^T A is never
    applied to x and round-off enters by the condition number of A, not by its square. x lies in the
    range of A^T: of all least-squares solutions it tends to the shortest.

    SINGULAR where |s| <= ``flat`` |A| |r|, |A| from below, by the products that were made: r then
    lies in the null space of A^T and cannot fall, which on a regular operator happens only under a
    condition number of 1 / ``flat``. Where the operator should be positive semi-definite
    (``definite``), INDEFINITE at a search direction of negative curvature; it may end without
    meeting one. Two applications a step.
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
        # Before the step: of a right-hand side outside of the range, the first slope is round-off
        # already.
        level = slope <= flat * size * norm(r)
        step = jnp.where(level, 0, safe_divide(slope, image) ** 2)
        x, r = x + step * p, r - step * q
        s = transposed(r)
        new = norm(s)
        status = jnp.where(level, jnp.int32(Result.SINGULAR), jnp.int32(0))
        negative = (dot(p, q) < -CURVATURE_UNITS * eps * size * length**2) & definite
        status = jnp.where(negative, jnp.int32(Result.INDEFINITE), status)
        return x, r, s + safe_divide(new, slope) ** 2 * p, new, size, k + 2, status

    s = transposed(b)
    start = (jnp.zeros_like(b), b, s, norm(s), jnp.zeros((), b.dtype), jnp.int32(1), jnp.int32(0))
    x, *_, k, status = lax.while_loop(going, body, start)
    return x, k, status
