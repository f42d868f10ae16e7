"""A Chebyshev polynomial of an operator A as a preconditioner, which needs no inner products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from mdsens._util.probe import chirp
from mdsens.implicit.linear.method import Round
from mdsens.implicit.linear.vectors import Apply, Iterate, norm, safe_divide

__all__ = ["POWER_STEPS", "chebyshev", "smoothed"]

# Steps of the power method in the estimate of the largest eigenvalue.
POWER_STEPS = 15
# The power method estimates the largest eigenvalue from below. The polynomial is to cover the whole
# spectrum: beyond its interval it grows without bound.
MARGIN = 1.2


def chebyshev(apply: Apply, degree: int, like: Array) -> Apply:
    """Return the preconditioner r -> p(A) r, which solves A z = r approximately, p a polynomial.

    The preconditioner takes ``degree - 1`` steps of the Chebyshev iteration, which needs products
    with A only.

    1 - t p(t) is the Chebyshev polynomial of degree ``degree`` on [a, b], scaled to 1 at t = 0,
    with b the largest eigenvalue of A and a = 4 b / degree^2 (Saad, Iterative Methods for Sparse
    Linear Systems, 2003, section 12.3). The eigenvalues lambda of A above a become eigenvalues of
    p(A) A near 1, and the eigenvalues below a become about degree^2 lambda / b. So the condition
    number of p(A) A is that of A divided by degree^2. An iteration on p(A) A takes as many products
    with A as an iteration on A, but only one step, with its inner products, for every ``degree``
    products. p(A) A has the null space of A, and has a negative eigenvalue where A has one.

    Args:
      apply: the function v -> A v, A symmetric.
      degree: degree of the polynomial t p(t) in the eigenvalue t of A.
      like: an array with the shape of the right-hand sides, for the estimate of the largest
        eigenvalue.
    """

    def power(_: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
        v, size = state
        w = apply(v)
        length = norm(w)
        return safe_divide(w, length), jnp.maximum(size, length)

    start = chirp(like.size, like.dtype)
    start = start / norm(start)
    _, largest = lax.fori_loop(0, POWER_STEPS, power, (start, jnp.zeros((), like.dtype)))
    # an operator of zeros gets any interval
    high = MARGIN * jnp.where(largest > 0, largest, 1)
    low = 4.0 * high / degree**2
    center = 0.5 * (high + low)
    half = 0.5 * (high - low)
    sigma = center / half

    def smooth(r: Array) -> Array:
        def step(
            _: Any, state: tuple[Array, Array, Array, Array]
        ) -> tuple[Array, Array, Array, Array]:
            # z: the solution so far, r: its residual, d: its last change
            z, r, d, rho = state
            r = r - apply(d)
            new = 1.0 / (2.0 * sigma - rho)
            d = new * rho * d + (2.0 * new / half) * r
            return z + d, r, d, new

        # The first step starts at z = 0 and needs no product with A.
        d = r / center
        return lax.fori_loop(0, degree - 1, step, (d, r, d, 1.0 / sigma))[0]

    return smooth


def smoothed(
    iterate: Callable[[Apply, Array, Array, Array], Iterate], apply: Apply, degree: int, b: Array
) -> Round:
    """Return a function that solves A x = r by an iteration on p(A) A x = p(A) r.

    p is the polynomial of :func:`chebyshev`, a preconditioner. The function is called in each round
    of iterative refinement, where r is the residual that the round before has left.

    Args:
      iterate: the iteration, ``(apply, b, tol, limit) -> (x, applications, result)``, such as
        :func:`cg`; applications is the number of products that were taken.
      apply: the function v -> A v, A symmetric.
      degree: degree of the polynomial t p(t) in the eigenvalue t of A.
      b: an array with the shape of the right-hand sides.
    """
    smooth = chebyshev(apply, degree, b)

    def inner(r: Array, tol: Array, limit: Array) -> Iterate:
        right_side = smooth(r)
        size = norm(right_side)
        unit = safe_divide(right_side, size)
        # p is large on soft modes and small on stiff ones, so that the residual of A x is larger
        # than that of p(A) A x. A tenth of the tolerance was enough in all systems of
        # benchmarks.jamming.
        inner_tol = 0.1 * tol
        steps = limit // degree

        def product(v: Array) -> Array:
            return smooth(apply(v))

        x, k, ended = iterate(product, unit, inner_tol, steps)
        # each step, and the right-hand side, counts as ``degree`` applications of A
        return x * size, degree * (k + 1), ended

    return inner
