"""Polynomials of an operator on flat vectors: Chebyshev's, which preconditions, and Neumann's
series, which solves.

Of both, every coefficient is known beforehand, so that a step takes a product and no inner product.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from mdsens.implicit.linear._krylov import CURVATURE_UNITS, Apply, Iterate, dot, norm, safe_divide
from mdsens.implicit.linear.result import Result

__all__ = ["POWER_STEPS", "chebyshev", "neumann", "neumann_terms"]

POWER_STEPS = 15


def chebyshev(apply: Apply, degree: int, like: Array) -> Apply:
    """r -> p(A) r, which solves A z = r roughly: ``degree - 1`` steps of the Chebyshev iteration,
    on products alone.

    1 - t p(t) is the Chebyshev polynomial of that degree on [a, b], b the largest eigenvalue and a
    = 4 b / degree^2, and one at zero (Saad, Iterative Methods for Sparse Linear Systems, 2003,
    section 12.3). So p(A) A has the eigenvalues above a near one, and those below at about degree^2
    times their share of b: its condition number is that of A over degree^2, and an iteration on it
    takes as many products as on A, but inner products for one in ``degree``. It has the null space
    of A, and where A has a negative eigenvalue, a negative one too.

    Args:
      apply: products with A, symmetric.
      degree: of t p(t).
      like: an array of the right-hand sides' shape, to find b with.
    """

    def power(_: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
        v, size = state
        w = apply(v)
        length = norm(w)
        return safe_divide(w, length), jnp.maximum(size, length)

    start = jnp.cos(
        jnp.arange(like.size, dtype=like.dtype) ** 2
    )  # a chirp holds every wavelength alike
    _, found = lax.fori_loop(
        0, POWER_STEPS, power, (start / norm(start), jnp.zeros((), like.dtype))
    )
    high = 1.2 * jnp.where(found > 0, found, 1)
    low = 4.0 * high / degree**2
    center, half = 0.5 * (high + low), 0.5 * (high - low)
    sigma = center / half

    def smooth(r: Array) -> Array:
        def step(
            _: Any, state: tuple[Array, Array, Array, Array]
        ) -> tuple[Array, Array, Array, Array]:
            z, r, d, rho = state
            r = r - apply(d)
            new = 1.0 / (2.0 * sigma - rho)
            d = new * rho * d + (2.0 * new / half) * r
            return z + d, r, d, new

        d = r / center
        return lax.fori_loop(0, degree - 1, step, (d, r, d, 1.0 / sigma))[0]

    return smooth


# A series is compared with itself at half its length, from here on, and stands where it has not
# fallen by this share.
_FIRST_LOOK, _FALL = 16, 1e-6


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
        stands = (looked & (size >= (1 - _FALL) * before)) | ~(size < most)
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
        jnp.int32(_FIRST_LOOK),
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
