"""Nearest points of convex sets, with derivatives that are finite everywhere.

    projection(x) = argmin_p |p - x|^2  subject to  p in C

Each is one function of the point and the set's parameters, differentiable by both, forward, reverse
and again.

At a kink, where the nearest point is about to change from one face of C to another, the derivative
is that of one side, never an average of sides: x counts as held by each constraint that it just
touches. :func:`mdsens.implicit.conditions.degeneracy.kinked` tells whether a solution stands at
one.

A set for each row of an array: ``jax.vmap`` of the projection.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax.projections
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from mdsens._util.errors import InputError
from mdsens._util.pytree import PyTree
from mdsens.implicit.linear._dense import _one_by_one
from mdsens.implicit.linear.operators import Direct, Operator
from mdsens.implicit.linear.solution import linear_solve

__all__ = [
    "affine",
    "ball",
    "box",
    "l1_ball",
    "non_negative",
    "second_order_cone",
    "semidefinite",
    "simplex",
]


def non_negative(x: PyTree) -> PyTree:
    """The nearest point with no negative entry: max(x, 0). Zero at zero, and so is its derivative."""
    return optax.projections.projection_non_negative(x)


# Not optax's: at a bound its jnp.clip has half of each side's derivative, which no side's solution
# has.
def box(x: PyTree, lower: PyTree, upper: PyTree) -> PyTree:
    """The nearest point with lower <= p <= upper; at a bound the derivative is the bound's.

    Args:
      x: a tree of arrays.
      lower, upper: bounds, scalars or trees like x whose leaves broadcast to its leaves; may be
        infinite.
    """

    def clip(x: Array, lower: Array, upper: Array) -> Array:
        return jnp.where(x <= lower, lower, jnp.where(x >= upper, upper, x))

    def like_x(bound: PyTree) -> PyTree:
        return (
            jax.tree.map(lambda _: bound, x)
            if jax.tree_util.treedef_is_leaf(jax.tree.structure(bound))
            else bound
        )

    return jax.tree.map(clip, x, like_x(lower), like_x(upper))


# Not optax's (0.2.8), nor its l1_ball: where jax has 64 bits on, they refuse to differentiate
# 32-bit arrays.
def simplex(x: PyTree, scale: Array | float = 1.0) -> PyTree:
    """The nearest point with p >= 0 and sum p = scale, over all leaves of the tree together.

        p = max(x - tau, 0),  tau such that they sum to scale

    The derivative moves the entries that are positive alone: dp = dx - mean(dx) on them, zero off
      them.

    Args:
      x: a tree of arrays.
      scale: positive.
    """
    flat, unravel = ravel_pytree(x)
    return unravel(_simplex(flat, jnp.asarray(scale, flat.dtype)))


def _simplex(x: Array, scale: Array) -> Array:
    x = x - lax.stop_gradient(jnp.max(x))  # digits, where all of it is far from zero
    largest = jnp.sort(x)[::-1]
    bounds = (jnp.cumsum(largest) - scale) / jnp.arange(1, x.size + 1, dtype=x.dtype)
    count = jnp.sum(largest > bounds)
    zero = x <= lax.stop_gradient(bounds[jnp.maximum(count - 1, 0)])
    tau = (jnp.sum(jnp.where(zero, 0, x)) - scale) / jnp.maximum(count, 1).astype(x.dtype)
    return jnp.where(zero, 0, x - tau)


def l1_ball(x: PyTree, radius: Array | float = 1.0) -> PyTree:
    """The nearest point with sum |p| <= radius, over all leaves of the tree together."""
    flat, unravel = ravel_pytree(x)
    size = jnp.abs(flat)
    inside = jnp.sum(size) < radius
    return unravel(
        jnp.where(inside, flat, jnp.sign(flat) * _simplex(size, jnp.asarray(radius, flat.dtype)))
    )


# Not optax's, for the same reason as the box.
def ball(x: PyTree, radius: Array | float = 1.0) -> PyTree:
    """The nearest point with |p| <= radius, in the 2-norm over all leaves of the tree together."""
    flat, unravel = ravel_pytree(x)
    square = jnp.sum(flat**2)
    outside = (square >= radius**2) & (square > 0)
    size = jnp.sqrt(jnp.where(outside, square, 1.0))
    return unravel(jnp.where(outside, radius / size, 1.0) * flat)


def affine(x: Array, A: Array, b: Array) -> Array:
    """The nearest point with A p = b.

        p = x - A^T (A A^T)^-1 (A x - b)

    Args:
      x: a point, shape (n,).
      A: the constraints' normals, shape (m, n). Rows may depend on each other where b does
        likewise.
      b: shape (m,).
    """
    operator = Operator(lambda v: A @ (A.T @ v), positive_semidefinite=True)
    forces, _ = linear_solve(operator, A @ x - b, Direct(rtol=1e-13), not_finite=float("nan"))
    return x - A.T @ forces


def second_order_cone(x: Array) -> Array:
    """The nearest point of the cone |u| <= t, x = (t, u).

        p = x where |u| <= t;  0 where |u| <= -t;  (t + |u|) / 2 (1, u / |u|) else

    Args:
      x: shape (1 + d,), t first. On the cone the derivative is that of the last row, at the apex
        and on the polar cone zero.
    """
    if jnp.ndim(x) != 1:
        raise InputError(
            f"x has shape {jnp.shape(x)}, but a second-order cone holds vectors; use jax.vmap for"
            " rows"
        )
    t, u = x[0], x[1:]
    square = jnp.sum(u**2)
    size = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    direction = u / size
    size = jnp.where(square > 0, size, 0.0)
    surface = 0.5 * (t + size) * jnp.concatenate([jnp.ones_like(x[:1]), direction])
    return jnp.where(size <= -t, 0.0, jnp.where(size < t, x, surface))


def semidefinite(x: Array) -> Array:
    """The nearest positive semi-definite matrix: the positive part of the symmetric part of x.

        P(x) = V max(L, 0) V^T,  x = V L V^T;  |x| dP + dP |x| = P dx + dx P

    In the eigenbasis dP_ij = (max(l_i, 0) + max(l_j, 0)) / (|l_i| + |l_j|) dx_ij, the divided
    differences of the positive part, which equal eigenvalues do not trouble; the derivative of an
    eigendecomposition is not finite there. Eigenvalues of zero, to round-off, count as held: dP_ij
    = 0 between two of them.

    Args:
      x: shape (n, n).
    """
    if jnp.ndim(x) != 2 or jnp.shape(x)[0] != jnp.shape(x)[1]:
        raise InputError(
            f"x has shape {jnp.shape(x)}, but a semidefinite matrix is square; use jax.vmap for a"
            " stack"
        )
    return _positive_part((x + x.T) / 2)


@_one_by_one
def _eigh(x: Array) -> tuple[Array, Array]:
    return tuple(jnp.linalg.eigh(x, symmetrize_input=False))


@jax.custom_jvp
def _positive_part(x: Array) -> Array:
    values, vectors = _eigh(x)
    return (vectors * jnp.maximum(values, 0)) @ vectors.T


@_positive_part.defjvp
def _positive_part_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    # By this rule again, so that the coefficients of the equation below have their derivative, too.
    positive = _positive_part(x)
    values, vectors = _eigh(lax.stop_gradient(x))
    pairs = jnp.abs(values)[:, None] + jnp.abs(values)
    held = pairs <= 8 * values.size * jnp.finfo(x.dtype).eps * jnp.max(jnp.abs(values))

    def equation(d: Array) -> Array:
        size = 2 * positive - x  # |x|
        return size @ d + d @ size

    def solve(_: object, b: Array) -> Array:
        inside = vectors.T @ b @ vectors
        return vectors @ jnp.where(held, 0, inside / jnp.where(held, 1, pairs)) @ vectors.T

    return positive, lax.custom_linear_solve(
        equation, positive @ dx + dx @ positive, solve, symmetric=True
    )
