"""Products and norms of vectors for all linear iterations, and the test for negative curvature."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
from jax import Array, lax

from mdsens.implicit.linear.result import Result

__all__ = [
    "Apply",
    "CURVATURE_UNITS",
    "Iterate",
    "Pivot",
    "dot",
    "int32",
    "next_pivot",
    "norm",
    "preconditioned",
    "safe_divide",
]

# v -> A v on flat vectors.
Apply: TypeAlias = Callable[[Array], Array]

# What an iteration returns: x, number of applications of the operator, and the result.
Iterate: TypeAlias = tuple[Array, Array, Array]

# Curvature below this many units of round-off of |A| counts as zero. The error of a product with
# the operator is a few units; the smallest stiffness of a packing is about 1e-6 of the largest,
# nine decades above these units.
CURVATURE_UNITS = 100.0


def dot(a: Array, b: Array) -> Array:
    """Multiply two matrices or vectors in full precision.

    By default, a GPU rounds float32 to TensorFloat32 in products.
    """
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def norm(v: Array) -> Array:
    """Compute the Euclidean norm of a vector v as |v| = m |v / m|, m the largest absolute entry.

    Computed in this form, the norm neither overflows nor underflows.
    """
    largest = jnp.max(jnp.abs(v))
    # With an infinite entry the norm is inf; divided by that entry it would be NaN instead.
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    # A division becomes a multiplication by 1 / unit, which beyond an eighth of the largest float
    # is too small for a normal number and is rounded to zero: the norm would be zero.
    unit = jnp.minimum(unit, jnp.finfo(v.dtype).max / 8)
    scaled = v / unit
    return unit * jnp.sqrt(dot(scaled, scaled))


def safe_divide(a: Array, b: Array) -> Array:
    """Divide a by b, entry by entry; the result is zero where b is zero."""
    # The inner where keeps 0 / 0 out, whose NaN would enter derivatives.
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


class Pivot(NamedTuple):
    """The last pivot in the factorization L D L^T of a Lanczos matrix T with k rows.

    Attributes:
      value: the pivot, the last entry of D. It equals z.Tz with z = L^-T e_k, where e_k is the last
        unit vector.
      weight: |z|^2.
    """

    value: Array
    weight: Array


def next_pivot(alpha: Array, beta: Array, last: Pivot, size: Array) -> tuple[Pivot, Array]:
    """Compute the next pivot of a Lanczos matrix T, and whether it proves negative curvature.

    The pivots are the entries of D in T = L D L^T. Pivot k equals z.Tz with z = L^-T e_k and the
    unit vector e_k, so that the curvature along z is pivot / |z|^2. In conjugate gradients this is
    p.Ap / p.p for the search direction p. After a pivot that is zero to round-off the later pivots
    cannot be computed. The later pivots are NaN, and prove nothing.

    Args:
      alpha: the next diagonal entry of T.
      beta: the entry of T beside alpha, in the row before.
      last: the pivot before, of value 0 at the start.
      size: the norm of T.
    """
    zero = CURVATURE_UNITS * jnp.finfo(alpha.dtype).eps * size
    ratio = safe_divide(beta, last.value)
    value = alpha - ratio * beta
    weight = 1 + ratio**2 * last.weight
    value = jnp.where(jnp.abs(value) <= zero * weight, jnp.nan, value)
    return Pivot(value, weight), value < -zero * weight


def int32(value: int | Result) -> Array:
    """Convert a number or a :class:`Result` code to an int32 array, as the loops of jax need it."""
    return jnp.asarray(int(value), jnp.int32)


def preconditioned(precondition: Apply | None, r: Array) -> tuple[Array, Array]:
    """Compute M r and r.M r for a residual r and a preconditioner M.

    ``precondition`` is the function r -> M r; where it is None, M is the identity.
    """
    z = r if precondition is None else precondition(r)
    return z, dot(r, z)
