"""Neumann's series, for a fixed point's operator A = I - C with C a contraction."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from mdsens._util.errors import InputError
from mdsens.implicit.linear._vectors import (
    CURVATURE_UNITS,
    Apply,
    Iterate,
    dot,
    norm,
    safe_divide,
)
from mdsens.implicit.linear.method import (
    IterativeMethod,
    Round,
    check_count,
    projected,
    refine,
    same,
)
from mdsens.implicit.linear.operator import Operator
from mdsens.implicit.linear.result import Result

__all__ = ["Neumann"]


@dataclasses.dataclass(frozen=True)
class Neumann(IterativeMethod):
    """Neumann's series, x = sum over k of alpha (I - alpha A)^k b, for A = I - C with C a
    contraction: a fixed point's.

    One application a term and two vectors of memory. The rest falls by |I - alpha A| a term, which
    must be below one; where the series grows or stands the status is STAGNATED.

    Args:
      rtol: relative residual asked for, as in :class:`CG`.
      max_iterations: operator applications; 10 times the number of unknowns, at least 1,000, where
        None.
      alpha: the step. One suits a fixed point; for a symmetric positive definite A anything below 2
        over its largest eigenvalue converges, and 2 / (largest + smallest) fastest.
      terms: sum exactly so many terms, for a cheap and rough answer: where its residual is above
        ``rtol`` the status says that it is cut off (MAX_STEPS_REACHED), or worse than none
        (STAGNATED). None for as many as ``rtol`` takes.

    Source: Lorraine, Vicol and Duvenaud, *Optimizing Millions of Hyperparameters by Implicit
    Differentiation*, arXiv:1911.02590.
    """

    alpha: float = 1.0
    terms: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("Neumann", "terms", self.terms)
        if not (
            isinstance(self.alpha, int | float) and math.isfinite(self.alpha) and self.alpha != 0
        ):
            raise InputError(
                f"Neumann: alpha={self.alpha!r} is no step; give a finite number other than zero,"
                " such as 1"
            )

    def iteration(self, operator: Operator, b: Array) -> tuple[Round, int]:
        apply, precondition = projected(operator)
        definite, alpha = operator.positive_semidefinite, self.alpha
        return lambda r, tol, limit: neumann(apply, r, tol, limit, alpha, definite, precondition), 0

    def run(self, operator: Operator, b: Array) -> tuple[Array, Array, Array, Array]:
        if self.terms is None:
            return refine(self, operator, b)
        return _cut_off(operator, b, self.terms, self.alpha)


# The residual is compared with that at half as many terms, from the 16th on, so that a series that
# alternates is not taken for one that stands; it stands where it has not fallen by this share.
FIRST_LOOK = 16
SMALLEST_FALL = 1e-6


def _step(
    apply: Apply, alpha: float, precondition: Apply | None, x: Array, r: Array, scale: Any
) -> tuple[Array, Array, Array, Array]:
    """x with the next term, what is left of b, the largest stretch of a term so far, and whether
    the curvature along the term is negative beside it.
    """
    term = alpha * (r if precondition is None else precondition(r))
    product = apply(term)
    scale = jnp.maximum(scale, safe_divide(norm(product), norm(term)))
    negative = dot(term, product) < -CURVATURE_UNITS * jnp.finfo(r.dtype).eps * scale * dot(
        term, term
    )
    return x + term, r - product, scale, negative


def _cut_off(
    operator: Operator, b: Array, terms: int, alpha: float
) -> tuple[Array, Array, Array, Array]:
    """So many terms of Neumann's series: MAX_STEPS_REACHED, or STAGNATED where the residual is
    larger than b.
    """
    apply, precondition = projected(operator)
    x = (operator.project or same)(neumann_terms(apply, b, terms, alpha, precondition))
    residual = norm(b - operator.matvec(x))
    worse = residual > norm(b)
    ended = jnp.where(worse, jnp.int32(Result.STAGNATED), jnp.int32(Result.MAX_STEPS_REACHED))
    return x, residual, jnp.int32(terms), ended


def neumann(
    apply: Apply,
    b: Array,
    tol: Array,
    limit: Array,
    alpha: float,
    definite: bool = False,
    precondition: Apply | None = None,
) -> Iterate:
    """Neumann's series x = sum over k of (I - alpha M A)^k alpha M b, until |b - A x| <= tol; M is
    one where None.

    STAGNATED where b - A x has not fallen over the second half of the terms, or has grown so far
    that their sum has lost half its digits. Where the operator should be positive semi-definite
    (``definite``), INDEFINITE at a term of negative curvature; it may end without meeting one.
    """
    eps = jnp.finfo(b.dtype).eps
    most = norm(b) / eps**0.5

    def going(state: tuple[Any, ...]) -> Array:
        _, _, size, _, _, _, k, status = state
        return (size > tol) & (k < limit) & (status == Result.CONVERGED)

    def body(state: tuple[Any, ...]) -> tuple[Any, ...]:
        x, r, _, scale, before, look, k, _ = state
        x, r, scale, negative = _step(apply, alpha, precondition, x, r, scale)
        size, k = norm(r), k + 1
        looked = k >= look
        stands = (looked & (size >= (1 - SMALLEST_FALL) * before)) | ~(size < most)
        status = jnp.where(stands, jnp.int32(Result.STAGNATED), jnp.int32(0))
        status = jnp.where(negative & definite, jnp.int32(Result.INDEFINITE), status)
        before, look = jnp.where(looked, size, before), jnp.where(looked, 2 * look, look)
        return x, r, size, scale, before, look, k, status

    zero = jnp.zeros((), b.dtype)
    start = (
        jnp.zeros_like(b),
        b,
        norm(b),
        zero,
        norm(b),
        jnp.int32(FIRST_LOOK),
        jnp.int32(0),
        jnp.int32(0),
    )
    x, *_, k, status = lax.while_loop(going, body, start)
    return x, k, status


def neumann_terms(
    apply: Apply, b: Array, terms: int, alpha: float, precondition: Apply | None = None
) -> Array:
    """The first ``terms`` terms of the series, by one product fewer."""

    def body(_: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
        return _step(apply, alpha, precondition, *state, 0.0)[:2]

    x, r = lax.fori_loop(0, terms - 1, body, (jnp.zeros_like(b), b))
    return x + alpha * (r if precondition is None else precondition(r))
