"""Conjugate gradients, for linear systems A x = b with a positive semi-definite operator A."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array, lax

from mdsens._util.errors import InputError
from mdsens._util.validation import check_count
from mdsens.implicit.linear._chebyshev import smoothed
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
    preconditioned,
    safe_divide,
)

__all__ = ["CG", "cg"]


@dataclasses.dataclass(frozen=True)
class CG(IterativeMethod):
    """Conjugate gradients, the fastest method for A x = b with a positive semi-definite operator A.

    Other operators are refused.

    Args:
      rtol: requested relative residual. The relative error is up to the condition number times as
        large: set rtol=1e-13 near unjamming.
      max_iterations: largest number of products with A; where None, 10 times the number of
        unknowns, at least 1,000.
      degree: degree of the polynomial preconditioner, see
        :func:`mdsens.implicit.linear._chebyshev.chebyshev`; 1 for no preconditioner. The
        polynomial saves inner products, not products with A.
    """

    degree: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("CG", "degree", self.degree)

    scalable: ClassVar[bool] = True

    def check(self, operator: Operator) -> None:
        if not operator.positive_semidefinite:
            raise InputError(
                "method=CG on an operator with positive_semidefinite=False may give a wrong"
                " solution; set positive_semidefinite=True if the operator is positive"
                " semi-definite, or take MINRES (for a symmetric operator) or GMRES (for any"
                " operator)"
            )

    def iteration(self, operator: Operator, b: Array) -> tuple[Round, int]:
        apply, precondition = projected(operator)
        if self.degree > 1 and precondition is None:
            return smoothed(cg, apply, self.degree, b), 0
        return lambda r, tol, limit: cg(apply, r, tol, limit, precondition), 0


def cg(
    apply: Apply, b: Array, tol: Array, limit: Array, precondition: Apply | None = None
) -> Iterate:
    """Solve A x = b by conjugate gradients (Hestenes and Stiefel, 1952), A positive semi-definite.

    The curvatures p.Ap of the search directions p are the pivots of the Lanczos matrix. So one
    curvature is negative as soon as the Krylov space contains a direction of negative curvature;
    the result is then INDEFINITE. The result is STAGNATED where a curvature is zero to round-off: b
    then has a component along a null direction. The result is BREAKDOWN where r.M r is not positive
    for a residual r: the preconditioner M is then not positive definite.

    Args:
      apply: the function v -> A v.
      b: right-hand side (n,).
      tol: norm of the residual at which to stop.
      limit: largest number of products with A.
      precondition: the function v -> M v, M symmetric and positive definite; None for the identity.

    Returns:
      (x, number of products with A, :class:`Result` code).
    """
    eps = jnp.finfo(b.dtype).eps

    def broken(r: Array, z: Array, rr: Array, rz: Array) -> Array:
        # Written with ~ so that a NaN counts as broken. At convergence r.M r may be round-off.
        if precondition is None:
            return jnp.asarray(False)
        return (rr > tol**2) & ~(rz > eps * norm(r) * norm(z))

    def going(state: tuple[Any, ...]) -> Array:
        _, _, _, rr, _, _, k, status = state
        return (rr > tol**2) & (k < limit) & (status == Result.CONVERGED)

    def body(state: tuple[Any, ...]) -> tuple[Any, ...]:
        x, r, p, rr, rz, size, k, _ = state
        ap = apply(p)
        pp, pap = dot(p, p), dot(p, ap)
        # the largest |A p| / |p| so far, an estimate of |A| from below
        size = jnp.maximum(size, jnp.sqrt(safe_divide(dot(ap, ap), pp)))
        # a curvature p.Ap within this of zero is round-off: its sign proves nothing
        zero = CURVATURE_UNITS * eps * size * pp
        status = jnp.where(pap > zero, int32(0), int32(Result.STAGNATED))
        status = jnp.where(pap < -zero, int32(Result.INDEFINITE), status)
        step = jnp.where(pap > zero, safe_divide(rz, pap), 0)
        x, r = x + step * p, r - step * ap
        rr = dot(r, r)
        z, rz_new = preconditioned(precondition, r)
        status = jnp.where(
            (status == Result.CONVERGED) & broken(r, z, rr, rz_new), int32(Result.BREAKDOWN), status
        )
        return x, r, z + safe_divide(rz_new, rz) * p, rr, rz_new, size, k + 1, status

    z, rz = preconditioned(precondition, b)
    rr = dot(b, b)
    status = jnp.where(broken(b, z, rr, rz), int32(Result.BREAKDOWN), int32(0))
    # x, r, p, r.r, r.M r, estimate of |A|, applications, result
    start = (jnp.zeros_like(b), b, z, rr, rz, jnp.zeros((), b.dtype), int32(0), status)
    x, *_, k, status = lax.while_loop(going, body, start)
    return x, k, status
