"""Minimal residuals on the Lanczos recurrence, for a symmetric operator."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array, lax

from mdsens._util.errors import InputError
from mdsens.implicit.linear._vectors import (
    Apply,
    Iterate,
    Pivot,
    dot,
    int32,
    next_pivot,
    norm,
    preconditioned,
    safe_divide,
)
from mdsens.implicit.linear.method import IterativeMethod, Round, projected
from mdsens.implicit.linear.operator import Operator
from mdsens.implicit.linear.result import Result

__all__ = ["MINRES", "minres"]


@dataclasses.dataclass(frozen=True)
class MINRES(IterativeMethod):
    """Minimal residuals on the Lanczos recurrence: for a symmetric operator that may be indefinite.

    Args:
      rtol: relative residual asked for, as in :class:`CG`.
      max_iterations: operator applications; 10 times the number of unknowns, at least 1,000, where
        None.
    """

    scalable: ClassVar[bool] = True

    def check(self, operator: Operator) -> None:
        if not operator.symmetric:
            raise InputError(
                "method=MINRES on an operator with symmetric=False gives a wrong answer; declare it"
                " symmetric, or take GMRES"
            )

    def iteration(self, operator: Operator, b: Array) -> tuple[Round, int]:
        apply, precondition = projected(operator)
        definite = operator.positive_semidefinite
        return lambda r, tol, limit: minres(apply, r, tol, limit, definite, precondition), 0


def minres(
    apply: Apply,
    b: Array,
    tol: Array,
    limit: Array,
    definite: bool = False,
    precondition: Apply | None = None,
) -> Iterate:
    """MINRES (Paige and Saunders, 1975), for a symmetric operator, definite or not.

    Where the operator should be positive semi-definite (``definite``), INDEFINITE at the first
    proof that it is not.

    STAGNATED where |A r| / (|A| |r|) falls under the square root of round-off, which is as low as
    it was seen to come on singular systems (1e-11 to 6e-9): what is left of the residual lies in
    the null space. On a soft direction it stands at that stiffness over the largest one, in
    packings above 1e-6; in float32 the bound must stay under that.

    With a preconditioner the residual is least in the norm of M, so that the one asked for is
    carried along. BREAKDOWN where a Lanczos vector r has r.M r negative.
    """
    eps = jnp.finfo(b.dtype).eps
    null = jnp.minimum(jnp.sqrt(eps), 1e-5)
    zero, none = jnp.zeros((), b.dtype), jnp.zeros_like(b)
    plain = precondition is None

    def going(state: tuple[Any, ...]) -> Array:
        beta, phi_bar, rest, k, status = state[3], state[7], state[-3], state[-2], state[-1]
        return (
            ((phi_bar if plain else norm(rest)) > tol)
            & (beta > 0)
            & (k < limit)
            & (status == Result.CONVERGED)
        )

    def body(state: tuple[Any, ...]) -> tuple[Any, ...]:
        (
            x,
            r1,
            r2,
            beta,
            beta_old,
            d_bar,
            epsilon,
            phi_bar,
            cs,
            sn,
            w1,
            w2,
            size,
            pivot,
            z,
            rest,
            k,
            _,
        ) = state
        v = (r2 if plain else z) / beta
        y = apply(v) - safe_divide(beta, beta_old) * r1
        alpha = dot(v, y)
        y = y - (alpha / beta) * r2
        r1, r2, beta_old = r2, y, beta
        if plain:
            beta, broken = norm(r2), jnp.asarray(False)
        else:
            z, square = preconditioned(precondition, r2)
            beta, broken = jnp.sqrt(jnp.maximum(square, 0)), square < -eps * norm(r2) * norm(z)
        size = jnp.sqrt(
            size**2 + alpha**2 + beta_old**2 * (k > 0) + beta**2
        )  # Frobenius norm of the Lanczos matrix
        pivot, negative = next_pivot(alpha, jnp.where(k > 0, beta_old, 0), pivot, size)
        # A Lanczos vector at round-off has no direction left: the Krylov space is invariant and the
        # loop ends.
        beta = jnp.where(beta > eps * size, beta, 0)
        epsilon_old, delta, gamma_bar = epsilon, cs * d_bar + sn * alpha, sn * d_bar - cs * alpha
        epsilon, d_bar = sn * beta, -cs * beta
        stalled = jnp.hypot(gamma_bar, d_bar) <= null * size
        gamma = jnp.maximum(jnp.hypot(gamma_bar, beta), eps * size)
        cs, sn = gamma_bar / gamma, beta / gamma
        phi, phi_bar = cs * phi_bar, sn * phi_bar
        w1, w2 = w2, (v - epsilon_old * w1 - delta * w2) / gamma
        # After a stall the step would be a division by round-off along a null direction: leave x as
        # it is.
        x = jnp.where(stalled, x, x + phi * w2)
        if not plain:
            rest = sn**2 * rest - safe_divide(phi_bar * cs, beta) * r2
        status = jnp.where(stalled, int32(Result.STAGNATED), int32(0))
        status = jnp.where(negative & definite, int32(Result.INDEFINITE), status)
        status = jnp.where(broken, int32(Result.BREAKDOWN), status)
        return (
            x,
            r1,
            r2,
            beta,
            beta_old,
            d_bar,
            epsilon,
            phi_bar,
            cs,
            sn,
            w1,
            w2,
            size,
            pivot,
            z,
            rest,
            k + 1,
            status,
        )

    if plain:
        length, z, rest, begun = norm(b), zero, zero, int32(0)
    else:
        z, square = preconditioned(precondition, b)
        length, rest = jnp.sqrt(jnp.maximum(square, 0)), b
        begun = jnp.where(square < -eps * norm(b) * norm(z), int32(Result.BREAKDOWN), int32(0))
    start = (
        none,
        none,
        b,
        length,
        zero,
        zero,
        zero,
        length,
        -jnp.ones_like(zero),
        zero,
        none,
        none,
        zero,
        Pivot(zero, zero),
        z,
        rest,
    )
    final = lax.while_loop(going, body, (*start, int32(0), begun))
    return final[0], final[-2], final[-1]
