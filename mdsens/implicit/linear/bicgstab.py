"""Stabilized bi-conjugate gradients, for linear systems with any operator, with little memory."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array, lax

from mdsens.implicit.linear.method import IterativeMethod, Round, projected
from mdsens.implicit.linear.operator import Operator
from mdsens.implicit.linear.result import Result
from mdsens.implicit.linear.vectors import (
    CURVATURE_UNITS,
    Apply,
    Iterate,
    dot,
    int32,
    norm,
    safe_divide,
)

__all__ = ["BiCGSTAB", "bicgstab"]


@dataclasses.dataclass(frozen=True)
class BiCGSTAB(IterativeMethod):
    """Stabilized bi-conjugate gradients, for A x = b with any operator A, with little memory.

    The recurrence may break down; use GMRES in this case.

    Args:
      rtol: requested relative residual.
      max_iterations: largest number of products with A, two for each step; where None, 10 times the
        number of unknowns, at least 1,000.
    """

    scalable: ClassVar[bool] = True

    def iteration(self, operator: Operator, b: Array) -> tuple[Round, int]:
        apply, precondition = projected(operator)
        definite = operator.positive_semidefinite
        return lambda r, tol, limit: bicgstab(apply, r, tol, limit, definite, precondition), 0


def bicgstab(
    apply: Apply,
    b: Array,
    tol: Array,
    limit: Array,
    definite: bool = False,
    precondition: Apply | None = None,
) -> Iterate:
    """Solve A x = b by BiCGSTAB (van der Vorst, 1992).

    The iteration takes two products with A for each step, and memory for seven vectors.

    The result is INDEFINITE where A should be positive semi-definite (``definite``) and a search
    direction has negative curvature; the iteration may end before it meets such a direction. The
    result is BREAKDOWN where an inner product in a denominator vanishes to round-off, which happens
    in the first step for a skew-symmetric A.

    Args:
      apply: the function v -> A v.
      b: right-hand side (n,).
      tol: norm of the residual at which to stop.
      limit: largest number of products with A.
      definite: whether A should be positive semi-definite.
      precondition: the function v -> M v of a preconditioner M, applied from the right (A M); None
        for none.

    Returns:
      (x, number of products with A, :class:`Result` code).
    """
    eps = jnp.finfo(b.dtype).eps
    shadow = b  # the fixed second vector of the bi-orthogonal recurrence
    change = precondition or (lambda v: v)

    def going(state: tuple[Any, ...]) -> Array:
        _, r, _, _, _, k, status = state
        return (dot(r, r) > tol**2) & (k < limit) & (status == Result.CONVERGED)

    def body(state: tuple[Any, ...]) -> tuple[Any, ...]:
        x, r, p, rho, scale, k, _ = state
        p_changed = change(p)
        ap = apply(p_changed)
        along = dot(shadow, ap)
        broken = jnp.abs(along) <= eps * norm(shadow) * norm(ap)
        alpha = jnp.where(broken, 0, safe_divide(rho, along))
        s = r - alpha * ap
        s_changed = change(s)
        t = apply(s_changed)
        st, tt = dot(t, s), dot(t, t)
        # s = 0 is convergence after half a step, not a breakdown.
        done = dot(s, s) <= tol**2
        broken = broken | (~done & (jnp.abs(st) <= eps * norm(t) * norm(s)))
        omega = safe_divide(st, tt)
        x, r = x + alpha * p_changed + omega * s_changed, s - omega * t
        rho_new = dot(shadow, r)
        broken = broken | (~done & (jnp.abs(rho_new) <= eps * norm(shadow) * norm(r)))
        pp, ss = dot(p_changed, p_changed), dot(s_changed, s_changed)
        scale = jnp.maximum(
            scale, jnp.sqrt(jnp.maximum(safe_divide(dot(ap, ap), pp), safe_divide(tt, ss)))
        )
        # ``scale`` is the largest |A v| / |v| so far, an estimate of |A| from below.
        least = -CURVATURE_UNITS * eps * scale
        negative = (dot(p_changed, ap) < least * pp) | (~done & (dot(t, s_changed) < least * ss))
        p = r + safe_divide(rho_new, rho) * safe_divide(alpha, omega) * (p - omega * ap)
        status = jnp.where(broken, int32(Result.BREAKDOWN), int32(0))
        status = jnp.where(negative & definite, int32(Result.INDEFINITE), status)
        return x, r, p, rho_new, scale, k + 2, status

    # x, r, p, shadow.r, estimate of |A|, applications, result
    start = (jnp.zeros_like(b), b, b, dot(b, b), jnp.zeros((), b.dtype), int32(0), int32(0))
    x, _, _, _, _, k, status = lax.while_loop(going, body, start)
    return x, k, status
