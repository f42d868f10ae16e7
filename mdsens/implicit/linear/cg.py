"""Conjugate gradients, for a positive semi-definite operator."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array, lax

from mdsens._util.errors import InputError
from mdsens.implicit.linear._chebyshev import smoothed
from mdsens.implicit.linear._vectors import (
    CURVATURE_UNITS,
    Apply,
    Iterate,
    dot,
    int32,
    norm,
    preconditioned,
    safe_divide,
)
from mdsens.implicit.linear.method import IterativeMethod, Round, check_count, projected
from mdsens.implicit.linear.operator import Operator
from mdsens.implicit.linear.result import Result

__all__ = ["CG", "cg"]


@dataclasses.dataclass(frozen=True)
class CG(IterativeMethod):
    """Conjugate gradients: the fastest where the operator is positive semi-definite; refuses any
    other.

    Args:
      rtol: relative residual asked for. Residual is not error, the condition number stands between:
        lower it to 1e-13 near unjamming.
      max_iterations: operator applications; 10 times the number of unknowns, at least 1,000, where
        None.
      degree: of the polynomial of the operator that preconditions, see
        :func:`mdsens.implicit.linear._polynomials.chebyshev`. One is none: it saves inner products,
        not applications.
    """

    degree: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("CG", "degree", self.degree)

    scalable: ClassVar[bool] = True

    def check(self, operator: Operator) -> None:
        if not operator.positive_semidefinite:
            raise InputError(
                "method=CG on an operator with positive_semidefinite=False may give a wrong answer;"
                " declare it, or take MINRES (symmetric) or GMRES (any)"
            )

    def iteration(self, operator: Operator, b: Array) -> tuple[Round, int]:
        apply, precondition = projected(operator)
        if self.degree > 1 and precondition is None:
            return smoothed(cg, apply, self.degree, b), 0
        return lambda r, tol, limit: cg(apply, r, tol, limit, precondition), 0


def cg(
    apply: Apply, b: Array, tol: Array, limit: Array, precondition: Apply | None = None
) -> Iterate:
    """Conjugate gradients (Hestenes and Stiefel, 1952), for a positive semi-definite operator.

    The curvatures p.Ap are the pivots of the Lanczos matrix, so one of them is negative as soon as
    the Krylov space holds a direction of negative curvature: status INDEFINITE. One that is zero to
    round-off is a null direction that the right-hand side excites: STAGNATED. A residual r with r.M
    r no longer positive: BREAKDOWN.
    """
    eps = jnp.finfo(b.dtype).eps

    def broken(r: Array, z: Array, rr: Array, rz: Array) -> Array:
        return (
            (rr > tol**2) & ~(rz > eps * norm(r) * norm(z))
            if precondition is not None
            else jnp.asarray(False)
        )

    def going(state: tuple[Any, ...]) -> Array:
        _, _, _, rr, _, _, k, status = state
        return (rr > tol**2) & (k < limit) & (status == Result.CONVERGED)

    def body(state: tuple[Any, ...]) -> tuple[Any, ...]:
        x, r, p, rr, rz, size, k, _ = state
        ap = apply(p)
        pp, pap = dot(p, p), dot(p, ap)
        size = jnp.maximum(size, jnp.sqrt(safe_divide(dot(ap, ap), pp)))
        zero = CURVATURE_UNITS * eps * size * pp
        status = jnp.where(
            pap < -zero,
            int32(Result.INDEFINITE),
            jnp.where(pap > zero, int32(0), int32(Result.STAGNATED)),
        )
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
    begun = jnp.where(broken(b, z, rr, rz), int32(Result.BREAKDOWN), int32(0))
    x, *_, k, status = lax.while_loop(
        going, body, (jnp.zeros_like(b), b, z, rr, rz, jnp.zeros((), b.dtype), int32(0), begun)
    )
    return x, k, status
