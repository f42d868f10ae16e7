"""Neumann series, for A x = b with the operator A = I - C of a fixed point, C a contraction."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from mdsens._util.errors import InputError
from mdsens._util.validation import check_count, is_number
from mdsens.implicit.linear.method import IterativeMethod, Round, projected, refine, same
from mdsens.implicit.linear.operator import Operator
from mdsens.implicit.linear.result import Result
from mdsens.implicit.linear.vectors import (
    CURVATURE_UNITS,
    Apply,
    Iterate,
    dot,
    norm,
    safe_divide,
)

__all__ = ["Neumann"]


@dataclasses.dataclass(frozen=True)
class Neumann(IterativeMethod):
    """Solve A x = b by the Neumann series x = sum over k of alpha (I - alpha A)^k b.

    This is for a fixed point, where A = I - C with a contraction C. The series takes one product
    with A for each term, and memory for two vectors. Each term reduces the residual by the factor
    |I - alpha A|, which must be below one. Where the series grows, or does not converge, the status
    is STAGNATED.

    Args:
      rtol: requested relative residual.
      max_iterations: largest number of products with A; where None, 10 times the number of
        unknowns, at least 1,000.
      alpha: the step, 1 for a fixed point. For a symmetric positive definite A the series converges
        with any alpha below 2 over the largest eigenvalue, and fastest with 2 / (largest + smallest
        eigenvalue).
      terms: number of terms to sum, for a cheap and rough solution. Where the residual of this
        solution is above ``rtol``, the status is MAX_STEPS_REACHED, or STAGNATED where the residual
        is larger than that of x = 0. None for as many terms as ``rtol`` takes.

    Source: Lorraine, Vicol and Duvenaud, *Optimizing Millions of Hyperparameters by Implicit
    Differentiation*, arXiv:1911.02590.
    """

    alpha: float = 1.0
    terms: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("Neumann", "terms", self.terms)
        if not (is_number(self.alpha) and math.isfinite(self.alpha) and self.alpha != 0):
            raise InputError(
                f"Neumann: alpha={self.alpha!r} is not a step; give a finite number other than"
                " zero, such as 1"
            )

    def iteration(self, operator: Operator, b: Array) -> tuple[Round, int]:
        apply, precondition = projected(operator)
        definite = operator.positive_semidefinite
        alpha = self.alpha
        return lambda r, tol, limit: neumann(apply, r, tol, limit, alpha, definite, precondition), 0

    def run(self, operator: Operator, b: Array) -> tuple[Array, Array, Array, Array]:
        if self.terms is None:
            return refine(self, operator, b)
        return _cut_off(operator, b, self.terms, self.alpha)


# The residual is compared with that at half as many terms, at 16 terms, 32, 64 …, so that an
# alternating series does not count as stagnated.
FIRST_COMPARISON = 16
# Smallest relative decrease of the residual between two comparisons; with less the series has
# stagnated.
SMALLEST_DECREASE = 1e-6


def _step(
    apply: Apply, alpha: float, precondition: Apply | None, x: Array, r: Array, scale: Array | float
) -> tuple[Array, Array, Array, Array]:
    """Add the next term v = alpha M r of the Neumann series for A x = b to the partial sum x.

    Args:
      apply: the function v -> A v.
      alpha: the step.
      precondition: the function r -> M r of a preconditioner M; None where M is the identity.
      x: the sum of the terms so far.
      r: the residual b - A x.
      scale: the largest |A v| / |v| of the terms v so far, an estimate of |A| from below.

    Returns:
      x, r and scale after the term, and whether the curvature v.A v along the term is negative
      beyond round-off.
    """
    term = alpha * (r if precondition is None else precondition(r))
    product = apply(term)
    scale = jnp.maximum(scale, safe_divide(norm(product), norm(term)))
    zero = CURVATURE_UNITS * jnp.finfo(r.dtype).eps * scale * dot(term, term)
    negative = dot(term, product) < -zero
    return x + term, r - product, scale, negative


def _cut_off(
    operator: Operator, b: Array, terms: int, alpha: float
) -> tuple[Array, Array, Array, Array]:
    """Sum a fixed number of terms of the Neumann series for A x = b.

    Returns:
      (x, norm of the residual, number of products with A, :class:`Result` code). The code is
      MAX_STEPS_REACHED, or STAGNATED where the residual is larger than b.
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
    """Sum the Neumann series x = sum over k of (I - alpha M A)^k alpha M b until |b - A x| <= tol.

    M is a preconditioner. The result is STAGNATED where the residual b - A x has not decreased over
    the second half of the terms, or has grown so far that half the digits of the sum are lost.
    Where A should be positive semi-definite (``definite``), the result is INDEFINITE at a term of
    negative curvature; the series may end before it meets such a term.

    Args:
      apply: the function v -> A v.
      b: right-hand side (n,).
      tol: norm of the residual at which to stop.
      limit: largest number of products with A.
      alpha: the step.
      definite: whether A should be positive semi-definite.
      precondition: the function v -> M v; None for the identity.

    Returns:
      (x, number of products with A, :class:`Result` code).
    """
    eps = jnp.finfo(b.dtype).eps
    largest = norm(b) / eps**0.5  # residual at which half the digits are lost

    def going(state: tuple[Any, ...]) -> Array:
        _, _, size, _, _, _, k, status = state
        return (size > tol) & (k < limit) & (status == Result.CONVERGED)

    def body(state: tuple[Any, ...]) -> tuple[Any, ...]:
        x, r, _, scale, earlier, compare_at, k, _ = state
        x, r, scale, negative = _step(apply, alpha, precondition, x, r, scale)
        size = norm(r)
        k = k + 1
        compare = k >= compare_at
        too_large = ~(size < largest)  # also where the norm is NaN
        stagnated = (compare & (size >= (1 - SMALLEST_DECREASE) * earlier)) | too_large
        status = jnp.where(stagnated, jnp.int32(Result.STAGNATED), jnp.int32(0))
        status = jnp.where(negative & definite, jnp.int32(Result.INDEFINITE), status)
        earlier = jnp.where(compare, size, earlier)
        compare_at = jnp.where(compare, 2 * compare_at, compare_at)
        return x, r, size, scale, earlier, compare_at, k, status

    scale = jnp.zeros((), b.dtype)
    compare_at = jnp.int32(FIRST_COMPARISON)
    # x, r, |r|, scale, |r| at the last comparison, terms at the next one, terms, result
    start = (jnp.zeros_like(b), b, norm(b), scale, norm(b), compare_at, jnp.int32(0), jnp.int32(0))
    x, *_, k, status = lax.while_loop(going, body, start)
    return x, k, status


def neumann_terms(
    apply: Apply, b: Array, terms: int, alpha: float, precondition: Apply | None = None
) -> Array:
    """Sum the first ``terms`` terms of the Neumann series x = sum_k (I - alpha M A)^k alpha M b.

    This takes ``terms - 1`` products with A. ``apply`` is the function v -> A v, ``precondition``
    the function v -> M v of a preconditioner, or None where M is the identity.
    """

    def body(_: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
        # 0.0 is the scale for the test of the curvature, which is not made here
        return _step(apply, alpha, precondition, *state, 0.0)[:2]

    x, r = lax.fori_loop(0, terms - 1, body, (jnp.zeros_like(b), b))
    # the last term; the residual after it is not needed
    return x + alpha * (r if precondition is None else precondition(r))
