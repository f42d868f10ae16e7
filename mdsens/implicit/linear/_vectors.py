"""Arithmetic on flat vectors that every iteration shares, and the test for negative curvature."""

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

Apply: TypeAlias = Callable[[Array], Array]

Iterate: TypeAlias = tuple[Array, Array, Array]


# Curvature below this many units of round-off of |A| counts as zero. An operator product is wrong
# by a few units; a packing's softest stiffness stands at 1e-6 of its stiffest, nine decades above.
CURVATURE_UNITS = 100.0


def dot(a: Array, b: Array) -> Array:
    """Matrix or inner product in full precision: float32 on a GPU would otherwise round to
    TensorFloat32.
    """
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def norm(v: Array) -> Array:
    """Euclidean norm that neither overflows nor underflows: |v| = m |v / m| with m the largest
    entry.
    """
    largest = jnp.max(jnp.abs(v))
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    scaled = v / unit
    return unit * jnp.sqrt(dot(scaled, scaled))


def safe_divide(a: Array, b: Array) -> Array:
    """a / b, and zero where b is zero."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


class Pivot(NamedTuple):
    """The last pivot of the L D L^T of a Lanczos matrix T, and |z|^2 of the z = L^-T e_k with z.Tz
    = pivot.
    """

    value: Array
    weight: Array


def next_pivot(alpha: Array, beta: Array, last: Pivot, size: Array) -> tuple[Pivot, Array]:
    """The next pivot, and whether it proves negative curvature: what conjugate gradients see in
    their p.Ap / p.p.

    The curvature along z is pivot / |z|^2. One that is zero to round-off leaves nothing that later
    pivots could be computed from: not a number from there on, and no proof.
    """
    zero = CURVATURE_UNITS * jnp.finfo(alpha.dtype).eps * size
    ratio = safe_divide(beta, last.value)
    value = alpha - ratio * beta
    weight = 1 + ratio**2 * last.weight
    value = jnp.where(jnp.abs(value) <= zero * weight, jnp.nan, value)
    return Pivot(value, weight), value < -zero * weight


def int32(value: int | Result) -> Array:
    return jnp.asarray(int(value), jnp.int32)


def preconditioned(precondition: Apply | None, r: Array) -> tuple[Array, Array]:
    """M r and r.M r."""
    z = r if precondition is None else precondition(r)
    return z, dot(r, z)
