"""Minimal residuals by the Lanczos recurrence, for linear systems with a symmetric operator."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from mdsens._util.errors import InputError
from mdsens.implicit.linear.method import IterativeMethod, Round, projected
from mdsens.implicit.linear.operator import Operator
from mdsens.implicit.linear.result import Result
from mdsens.implicit.linear.vectors import (
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

__all__ = ["MINRES", "minres"]


@dataclasses.dataclass(frozen=True)
class MINRES(IterativeMethod):
    """Minimal residuals by the Lanczos recurrence, for A x = b with A symmetric, definite or not.

    Args:
      rtol: requested relative residual.
      max_iterations: largest number of products with A; where None, 10 times the number of
        unknowns, at least 1,000.
    """

    scalable: ClassVar[bool] = True

    def check(self, operator: Operator) -> None:
        if not operator.symmetric:
            raise InputError(
                "method=MINRES on an operator with symmetric=False gives a wrong solution; set"
                " symmetric=True if the operator is symmetric, or take GMRES"
            )

    def iteration(self, operator: Operator, b: Array) -> tuple[Round, int]:
        apply, precondition = projected(operator)
        definite = operator.positive_semidefinite
        return lambda r, tol, limit: minres(apply, r, tol, limit, definite, precondition), 0


class _State(NamedTuple):
    """Variables of the MINRES iteration for A x = b, with the names of Paige and Saunders (1975).

    Attributes:
      x: solution so far.
      r_old, r: the last two Lanczos vectors, not scaled to norm one.
      beta_old, beta: norms of r_old and r, which are entries beside the diagonal of the Lanczos
        matrix.
      d_bar, epsilon: entries of the Lanczos matrix after the last Givens rotation.
      phi_bar: norm of the residual, weighted by M where there is a preconditioner M.
      cs, sn: cosine and sine of the last Givens rotation.
      w_old, w: the last two search directions.
      size: Frobenius norm of the Lanczos matrix.
      pivot: last pivot of the Lanczos matrix, which tests whether this matrix is definite.
      z: M r; unused without a preconditioner.
      rest: the residual b - A x; unused without a preconditioner.
      k: number of steps.
      status: the result so far.
    """

    x: Array
    r_old: Array
    r: Array
    beta: Array
    beta_old: Array
    d_bar: Array
    epsilon: Array
    phi_bar: Array
    cs: Array
    sn: Array
    w_old: Array
    w: Array
    size: Array
    pivot: Pivot
    z: Array
    rest: Array
    k: Array
    status: Array


def minres(
    apply: Apply,
    b: Array,
    tol: Array,
    limit: Array,
    definite: bool = False,
    precondition: Apply | None = None,
) -> Iterate:
    """Solve A x = b by MINRES (Paige and Saunders, 1975), A symmetric, definite or not.

    Where A should be positive semi-definite (``definite``), the result is INDEFINITE as soon as the
    Lanczos matrix proves that A is not.

    The result is STAGNATED where |A r| / (|A| |r|) falls below the square root of round-off: the
    residual r that is left then lies in the null space. On singular systems this ratio was observed
    to fall to values between 1e-11 and 6e-9, and no lower. Along a soft direction the ratio is the
    stiffness of this direction over the largest stiffness, above 1e-6 in packings. In float32 the
    limit of the ratio is 1e-5 instead, below the square root of round-off.

    With a preconditioner M, MINRES minimizes the norm of the residual weighted by M, so that the
    residual itself is computed as well. The result is BREAKDOWN where r.M r is negative for a
    Lanczos vector r.

    Args:
      apply: the function v -> A v.
      b: right-hand side (n,).
      tol: norm of the residual at which to stop.
      limit: largest number of products with A.
      definite: whether A should be positive semi-definite.
      precondition: the function v -> M v, M symmetric and positive definite; None for the identity.

    Returns:
      (x, number of products with A, :class:`Result` code).
    """
    eps = jnp.finfo(b.dtype).eps
    null = jnp.minimum(jnp.sqrt(eps), 1e-5)  # 1e-5 counts in float32 only
    zero = jnp.zeros((), b.dtype)
    zeros = jnp.zeros_like(b)
    plain = precondition is None

    def going(state: _State) -> Array:
        residual = state.phi_bar if plain else norm(state.rest)
        running = (state.k < limit) & (state.status == Result.CONVERGED)
        return (residual > tol) & (state.beta > 0) & running

    def body(state: _State) -> _State:
        beta_old = state.beta
        v = (state.r if plain else state.z) / beta_old
        # in the first step beta_old and r_old of the state are zero, and so is this term
        y = apply(v) - safe_divide(beta_old, state.beta_old) * state.r_old
        alpha = dot(v, y)
        r = y - (alpha / beta_old) * state.r
        if plain:
            z = state.z
            beta = norm(r)
            broken = jnp.asarray(False)
        else:
            z, square = preconditioned(precondition, r)
            beta = jnp.sqrt(jnp.maximum(square, 0))
            broken = square < -eps * norm(r) * norm(z)
        # In the first step ``beta_old`` is the norm of b, and no entry of the Lanczos matrix.
        size = jnp.sqrt(state.size**2 + alpha**2 + beta_old**2 * (state.k > 0) + beta**2)
        off_diagonal = jnp.where(state.k > 0, beta_old, 0)
        pivot, negative = next_pivot(alpha, off_diagonal, state.pivot, size)
        # A Lanczos vector at round-off has no direction: the Krylov space is invariant, and the
        # loop ends.
        beta = jnp.where(beta > eps * size, beta, 0)
        # the last rotation on the new column of the Lanczos matrix
        delta = state.cs * state.d_bar + state.sn * alpha
        gamma_bar = state.sn * state.d_bar - state.cs * alpha
        epsilon = state.sn * beta
        d_bar = -state.cs * beta
        # hypot(gamma_bar, d_bar) is |A r| / |r|
        stalled = jnp.hypot(gamma_bar, d_bar) <= null * size
        # the next rotation
        gamma = jnp.maximum(jnp.hypot(gamma_bar, beta), eps * size)
        cs = gamma_bar / gamma
        sn = beta / gamma
        phi = cs * state.phi_bar
        phi_bar = sn * state.phi_bar
        w = (v - state.epsilon * state.w_old - delta * state.w) / gamma
        # After a stall the step would be a division by round-off along a null direction: x stays.
        x = jnp.where(stalled, state.x, state.x + phi * w)
        rest = state.rest
        if not plain:
            rest = sn**2 * rest - safe_divide(phi_bar * cs, beta) * r
        status = jnp.where(stalled, int32(Result.STAGNATED), int32(0))
        status = jnp.where(negative & definite, int32(Result.INDEFINITE), status)
        status = jnp.where(broken, int32(Result.BREAKDOWN), status)
        return _State(
            x=x,
            r_old=state.r,
            r=r,
            beta=beta,
            beta_old=beta_old,
            d_bar=d_bar,
            epsilon=epsilon,
            phi_bar=phi_bar,
            cs=cs,
            sn=sn,
            w_old=state.w,
            w=w,
            size=size,
            pivot=pivot,
            z=z,
            rest=rest,
            k=state.k + 1,
            status=status,
        )

    if plain:
        length = norm(b)
        # Scalars in place of vectors: without a preconditioner the loop need not carry them.
        z = zero
        rest = zero
        status = int32(0)
    else:
        z, square = preconditioned(precondition, b)
        length = jnp.sqrt(jnp.maximum(square, 0))
        rest = b
        broken = square < -eps * norm(b) * norm(z)
        status = jnp.where(broken, int32(Result.BREAKDOWN), int32(0))
    # With cs = -1 and sn = 0 the first rotation gives delta = 0 and gamma_bar = alpha.
    start = _State(
        x=zeros,
        r_old=zeros,
        r=b,
        beta=length,
        beta_old=zero,
        d_bar=zero,
        epsilon=zero,
        phi_bar=length,
        cs=-jnp.ones_like(zero),
        sn=zero,
        w_old=zeros,
        w=zeros,
        size=zero,
        pivot=Pivot(zero, zero),
        z=z,
        rest=rest,
        k=int32(0),
        status=status,
    )
    final = lax.while_loop(going, body, start)
    return final.x, final.k, final.status
