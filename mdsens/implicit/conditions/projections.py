"""Nearest points of convex sets, with derivatives that are finite everywhere.

    projection(x) = argmin_p |p - x|^2  subject to  p in C

Each projection is a function of the point x and of the parameters of the convex set C, and
differentiable by both, in forward and reverse mode and to higher order.

At a kink, where the nearest point is about to change from one face of C to another, the projection
has a different derivative on each of the two sides of the kink. One of the two is returned, never
their average: that for which a constraint that x just touches counts as active.
:func:`mdsens.implicit.conditions.degeneracy.kinked` tells whether a solution is at a kink.

To project each row of an array separately, use ``jax.vmap`` of the projection.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from mdsens._util.batching import one_by_one
from mdsens._util.errors import InputError
from mdsens._util.precision import full_precision
from mdsens._util.pytree import PyTree
from mdsens.implicit.linear import Direct, Operator
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
    """Project x on the arrays without negative entries: max(x, 0), with derivative zero at zero."""
    from optax import projections  # slow to import

    return projections.projection_non_negative(x)


# Not optax's projection: at a bound, its jnp.clip has the mean of the derivatives to both sides,
# which is the derivative of neither.
def box(x: PyTree, lower: PyTree, upper: PyTree) -> PyTree:
    """Project x on the box of points p with lower <= p <= upper.

    At a bound, the derivative is the derivative of the bound.

    Args:
      x: an array, or nested containers (a tree) of arrays.
      lower, upper: bounds, which may be infinite: scalars, or trees like x whose arrays broadcast
        to the arrays of x.
    """

    def clip(x: Array, lower: Array, upper: Array) -> Array:
        return jnp.where(x <= lower, lower, jnp.where(x >= upper, upper, x))

    def like_x(bound: PyTree) -> PyTree:
        is_leaf = jax.tree_util.treedef_is_leaf(jax.tree.structure(bound))
        return jax.tree.map(lambda _: bound, x) if is_leaf else bound

    return jax.tree.map(clip, x, like_x(lower), like_x(upper))


# Not optax's projections on simplex and l1_ball (0.2.8): where 64-bit arrays are enabled in jax,
# these cannot differentiate 32-bit arrays.
def simplex(x: PyTree, scale: Array | float = 1.0) -> PyTree:
    """Project x on the simplex p >= 0, sum p = scale, the sum being over all arrays in x together.

        p = max(x - tau, 0),  with the number tau such that sum p = scale

    The derivative is dp = dx - mean(dx) for the positive entries of p, the mean being over the
    positive entries alone, and zero for the other entries.

    Args:
      x: an array, or nested containers of arrays.
      scale: the sum of the entries of p, a positive number.
    """
    flat, unravel = ravel_pytree(x)
    return unravel(_simplex(flat, jnp.asarray(scale, flat.dtype)))


def _simplex(x: Array, scale: Array) -> Array:
    """Project the vector x on the simplex of vectors p with p >= 0 and sum p = scale."""
    # A shift of all entries changes only tau; it saves digits where all of x is far from zero.
    x = x - lax.stop_gradient(jnp.max(x))
    # Sorting only finds out which entries are zero. tau is computed again from x below, in a form
    # whose derivative is the one of the docstring.
    largest = jnp.sort(x)[::-1]
    bounds = (jnp.cumsum(largest) - scale) / jnp.arange(1, x.size + 1, dtype=x.dtype)
    count = jnp.sum(largest > bounds)
    zero = x <= lax.stop_gradient(bounds[jnp.maximum(count - 1, 0)])
    tau = (jnp.sum(jnp.where(zero, 0, x)) - scale) / jnp.maximum(count, 1).astype(x.dtype)
    return jnp.where(zero, 0, x - tau)


def l1_ball(x: PyTree, radius: Array | float = 1.0) -> PyTree:
    """Project x on the set sum |p| <= radius, the sum being over all arrays in x together."""
    flat, unravel = ravel_pytree(x)
    size = jnp.abs(flat)
    # < and not <=: a point on the surface has the derivative of the active constraint.
    inside = jnp.sum(size) < radius
    surface = jnp.sign(flat) * _simplex(size, jnp.asarray(radius, flat.dtype))
    return unravel(jnp.where(inside, flat, surface))


# Not optax's projection, for the same reason as in ``box``.
def ball(x: PyTree, radius: Array | float = 1.0) -> PyTree:
    """Project x on the ball |p| <= radius, with the 2-norm over all arrays in x together."""
    flat, unravel = ravel_pytree(x)
    square = jnp.sum(flat**2)
    outside = (square >= radius**2) & (square > 0)
    size = jnp.sqrt(jnp.where(outside, square, 1.0))
    return unravel(jnp.where(outside, radius / size, 1.0) * flat)


@full_precision
def affine(x: Array, A: Array, b: Array) -> Array:
    """Project the point x on the affine set of points p with A p = b.

        p = x - A^T (A A^T)^-1 (A x - b)

    Args:
      x: a point, shape (n,).
      A: normals of the constraints, shape (m, n). Its rows may be linearly dependent, provided that
        b has the same dependence.
      b: right-hand sides of the constraints, shape (m,).
    """
    # A A^T is singular where rows of A depend on each other. Where Cholesky fails for this reason,
    # Direct repeats it with a small shift on the diagonal, whose error the refinement removes.
    operator = Operator(lambda v: A @ (A.T @ v), positive_semidefinite=True)
    forces, _ = linear_solve(operator, A @ x - b, Direct(rtol=1e-13), not_finite=float("nan"))
    return x - A.T @ forces


def second_order_cone(x: Array) -> Array:
    """Project the vector x = (t, u), with t a number, on the second-order cone |u| <= t.

        p = x where |u| <= t;  0 where |u| <= -t;  (t + |u|) / 2 (1, u / |u|) else

    On the surface of the cone the derivative is that of the third case. At the apex and on the
    polar cone |u| <= -t the derivative is zero.

    Args:
      x: the vector (t, u) to project, shape (1 + d,).
    """
    if jnp.ndim(x) != 1:
        raise InputError(
            f"`x` has shape {jnp.shape(x)}, but a second-order cone is a set of vectors; give a"
            " vector, or use jax.vmap for the rows of an array"
        )
    t, u = x[0], x[1:]
    square = jnp.sum(u**2)
    # The root of zero has no derivative, not even where a later jnp.where leaves it out.
    size = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    direction = u / size
    size = jnp.where(square > 0, size, 0.0)
    surface = 0.5 * (t + size) * jnp.concatenate([jnp.ones_like(x[:1]), direction])
    return jnp.where(size <= -t, 0.0, jnp.where(size < t, x, surface))


def semidefinite(x: Array) -> Array:
    """Project the symmetric part of the matrix x on the positive semidefinite matrices.

        P(x) = V max(L, 0) V^T,  x = V L V^T;  |x| dP + dP |x| = P dx + dx P

    V are the eigenvectors and L the eigenvalues l_i of the symmetric part of x, and |x| is
    V |L| V^T. In the eigenbasis dP_ij = (max(l_i, 0) + max(l_j, 0)) / (|l_i| + |l_j|) dx_ij, the
    divided differences of the positive part. These are finite for equal eigenvalues, where the
    derivative of the eigendecomposition is not. Eigenvalues that are zero to round-off count as
    active constraints: dP_ij is zero where l_i and l_j are both zero.

    Args:
      x: the matrix to project, shape (n, n).
    """
    if jnp.ndim(x) != 2 or jnp.shape(x)[0] != jnp.shape(x)[1]:
        raise InputError(
            f"`x` has shape {jnp.shape(x)}, but a semidefinite matrix is square; give shape (n, n),"
            " or use jax.vmap for a stack of matrices"
        )
    return _positive_part((x + x.T) / 2)


@one_by_one
def _eigh(x: Array) -> tuple[Array, Array]:
    """Compute the eigenvalues and eigenvectors of a symmetric matrix (n, n)."""
    return tuple(jnp.linalg.eigh(x, symmetrize_input=False))


@jax.custom_jvp
@full_precision
def _positive_part(x: Array) -> Array:
    """Compute the positive part V max(L, 0) V^T of a symmetric matrix x with eigenvalues L.

    V are the eigenvectors: x = V L V^T.
    """
    values, vectors = _eigh(x)
    return (vectors * jnp.maximum(values, 0)) @ vectors.T


@_positive_part.defjvp
@full_precision
def _positive_part_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    # A call with this same rule, so that for second derivatives the coefficients of the equation
    # below have their derivatives, too.
    positive = _positive_part(x)
    values, vectors = _eigh(lax.stop_gradient(x))
    sums = jnp.abs(values)[:, None] + jnp.abs(values)  # |l_i| + |l_j|
    # Round-off of the eigenvalues is about n eps of the largest one; 8 times that counts as zero.
    both_zero = sums <= 8 * values.size * jnp.finfo(x.dtype).eps * jnp.max(jnp.abs(values))

    def equation(d: Array) -> Array:
        absolute = 2 * positive - x  # |x| = V |L| V^T
        return absolute @ d + d @ absolute

    def solve(_: object, b: Array) -> Array:
        in_eigenbasis = vectors.T @ b @ vectors
        quotient = jnp.where(both_zero, 0, in_eigenbasis / jnp.where(both_zero, 1, sums))
        return vectors @ quotient @ vectors.T

    return positive, lax.custom_linear_solve(
        equation, positive @ dx + dx @ positive, solve, symmetric=True
    )
