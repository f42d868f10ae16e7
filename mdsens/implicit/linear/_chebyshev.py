"""Chebyshev's polynomial of an operator as a preconditioner: products alone, no inner products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from mdsens._util.probe import chirp
from mdsens.implicit.linear._vectors import Apply, Iterate, norm, safe_divide
from mdsens.implicit.linear.method import Round

__all__ = ["POWER_STEPS", "chebyshev", "smoothed"]

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

    start = chirp(like.size, like.dtype)
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


def smoothed(
    iterate: Callable[[Apply, Array, Array, Array], Iterate], apply: Apply, degree: int, b: Array
) -> Round:
    """The iteration on p(A) A x = p(A) r, p the Chebyshev polynomial of a degree.

    Args:
      iterate: ``(apply, b, tol, limit) -> (x, applications, result)``.
    """
    smooth = chebyshev(apply, degree, b)

    def inner(r: Array, tol: Array, limit: Array) -> Iterate:
        side = smooth(r)
        size = norm(side)
        unit = safe_divide(side, size)
        # p is large on soft modes and small on stiff ones, so that the residual of A x is larger
        # than that of p(A) A x: a tenth was enough in every system of benchmarks.jamming.
        share = 0.1 * tol
        steps = limit // degree

        def product(v: Array) -> Array:
            return smooth(apply(v))

        x, k, ended = iterate(product, unit, share, steps)
        return x * size, degree * (k + 1), ended

    return inner
