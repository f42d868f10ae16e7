"""Conic programs (linear, second-order and semidefinite), solved as the root of a residual.

    primal:  minimize  c^T x  subject to  A x + s = b, s in K
    dual:    maximize -b^T y  subject to  A^T y + c = 0, y in K*

K is a convex cone and K* its dual cone; A is a matrix, b and c are vectors. A product of cones is a
tuple such as (Zero(2), NonNegative(3)), in the order of the rows of A. To differentiate a solution,
such as the vertex of a linear program or the matrix of a semidefinite program, give
:func:`mdsens.implicit.root` the condition that :func:`conic_residual` returns, and any solver.
:func:`embed` turns the solution of another solver into the unknown z of this condition, and
:func:`read` turns z into the solution.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mdsens._util.errors import InputError
from mdsens._util.portable import Portable
from mdsens._util.precision import full_precision
from mdsens._util.validation import is_integer
from mdsens.implicit.conditions import projections

__all__ = [
    "Cone",
    "ConicSolution",
    "NonNegative",
    "SecondOrder",
    "Semidefinite",
    "Zero",
    "conic_residual",
    "embed",
    "matrix",
    "read",
    "vector",
]


class Cone(Protocol):
    """A closed convex cone K of vectors: the interface of each kind of cone in a conic program."""

    @property
    def size(self) -> int:
        """Return the length of the vectors in the cone."""
        ...

    def project_dual(self, y: Array) -> Array:
        """Return the point (size,) nearest to the vector y in the dual cone K* of the cone K.

        K* is the set of vectors whose inner product with each vector of K is not negative.
        """
        ...


Cones: TypeAlias = Cone | tuple[Cone, ...]


@dataclasses.dataclass(frozen=True)
class _Sized:
    """A convex cone of vectors of length ``size``, the base class of cones given by this length."""

    size: int

    def __post_init__(self) -> None:
        if not is_integer(self.size) or self.size < 1:
            raise InputError(
                f"{type(self).__name__}: size={self.size!r} is not the length of a vector; give a"
                " whole number from 1"
            )


class Zero(_Sized):
    """The cone that contains the zero vector alone, for equalities A x = b.

    The slack s = b - A x must be zero, and the Lagrange multipliers y may have any sign.
    """

    def project_dual(self, y: Array) -> Array:
        """Return the vector y unchanged, since the dual of the cone {0} is the whole space."""
        return y


class NonNegative(_Sized):
    """The cone of vectors without negative entries, for inequalities A x <= b.

    No entry of the slack s = b - A x may be negative.
    """

    def project_dual(self, y: Array) -> Array:
        """Return max(y, 0), the projection of y on the vectors without negative entries.

        The cone of these vectors is its own dual.
        """
        return projections.non_negative(y)


class SecondOrder(_Sized):
    """The second-order cone of vectors (t, u) of length ``size``, t a number, with |u| <= t."""

    def project_dual(self, y: Array) -> Array:
        """Project y = (t, u) on the second-order cone |u| <= t, which is its own dual cone."""
        return projections.second_order_cone(y)


@dataclasses.dataclass(frozen=True)
class Semidefinite:
    """The cone of positive semidefinite matrices with ``order`` rows and columns.

    Each matrix is represented by the vector of its lower triangle, see :func:`vector`.
    """

    order: int

    def __post_init__(self) -> None:
        if not is_integer(self.order) or self.order < 1:
            raise InputError(
                f"Semidefinite: order={self.order!r} is not a number of rows; give a whole number"
                " from 1"
            )

    @property
    def size(self) -> int:
        """Return n (n + 1) / 2, the length of the vector for a symmetric matrix (n, n)."""
        return self.order * (self.order + 1) // 2

    def project_dual(self, y: Array) -> Array:
        """Project the symmetric matrix that the vector y represents on the semidefinite matrices.

        The cone of positive semidefinite matrices is its own dual. The result is a vector like y.
        """
        return vector(projections.semidefinite(matrix(y)))


def vector(symmetric: Array) -> Array:
    """Write a symmetric matrix (n, n) as a vector of n (n + 1) / 2 entries.

    The entries are the lower triangle, column by column, with off-diagonal entries times sqrt(2),
    so that the inner product of two such vectors is the inner product of the two matrices. The
    solver SCS uses the same order.
    """
    # The column-major order of the lower triangle is the row-major order of the upper triangle,
    # with row and column exchanged.
    rows, columns = np.triu_indices(jnp.shape(symmetric)[0])
    return jnp.where(rows == columns, 1.0, np.sqrt(2)) * symmetric[columns, rows]


def matrix(entries: Array) -> Array:
    """Write a vector of n (n + 1) / 2 entries as a symmetric matrix (n, n).

    The entries are the lower triangle, column by column, with off-diagonal entries times sqrt(2),
    as :func:`vector` writes them.
    """
    # n from m = n (n + 1) / 2
    order = int((np.sqrt(8 * jnp.size(entries) + 1) - 1) / 2)
    if order * (order + 1) // 2 != jnp.size(entries):
        raise InputError(
            f"entries has length {jnp.size(entries)}, but the vector of a symmetric matrix (n, n)"
            " has length n (n + 1) / 2; give a vector of length 1, 3, 6, 10, ..."
        )
    rows, columns = np.triu_indices(order)
    scaled = jnp.where(rows == columns, 1.0, np.sqrt(0.5)) * entries
    return (
        # The diagonal is written twice, with the same numbers. The second ``set`` overwrites the
        # first, in derivatives as well, so that nothing is counted twice.
        jnp.zeros((order, order), scaled.dtype)
        .at[columns, rows]
        .set(scaled)
        .at[rows, columns]
        .set(scaled)
    )


def conic_residual(cone: Cones) -> Callable[[Array, Array, Array, Array], Array]:
    """Make the function F(z, c, A, b) whose root z gives the solution of a conic program.

        minimize  c^T x  subject to  A x + s = b, s in the cone K

        F(z) = (Q - I) P(z) + z + (0, 0, w - 1),   P(z) = (u, P_K*(v), max(w, 0)),   z = (u, v, w)
        Q = [[0, A^T, c], [-A, 0, b], [-c^T, -b^T, 0]]

    F is the homogeneous self-dual embedding of the program, at scale w = 1. P_K* is the projection
    on the dual cone K*. Where there is a solution, with multipliers y in K*, the root is
    z = (x, y - s, 1). Without the last term F is homogeneous, and the Jacobian of F has the right
    null vector z and the left null vector P(z). Both vectors have the last entry w, so that the
    last term removes the null vectors. The last term moves no root, since the product of P(z) and
    F(z) is w (w - 1).

    Args:
      cone: the cone K, or a tuple of cones in the order of the rows of A.

    Returns:
      F as a function of z (n + m + 1,), c (n,), A (m, n) and b (m,). The root has derivatives by c,
      A and b. The Jacobian of F is not symmetric. It is regular where the primal and the dual
      solution are unique and P_K* has no kink there, see
      :func:`mdsens.implicit.conditions.degeneracy.kinked`.

    Raises:
      InputError: F is called with arrays whose shapes do not fit.

    Source: Busseti, Moursi and Boyd, arXiv:1811.02157; Agrawal et al., arXiv:1904.09043.
    """

    @full_precision
    def F(z: Array, c: Array, A: Array, b: Array) -> Array:
        rows, columns = jnp.shape(A)
        _check_shape("`c`", c, columns)
        _check_shape("`b`", b, rows)
        _check_shape("`cone`", jnp.zeros(sum(part.size for part in _parts(cone))), rows)
        _check_shape("`z`", z, columns + rows + 1)
        u = z[:columns]
        v = z[columns:-1]
        w = z[-1]
        y = _project_dual(cone, v)
        tau = jnp.maximum(w, 0.0)
        # the three block rows of (Q - I) P(z) + z + (0, 0, w - 1), where (I - I) u = 0
        return jnp.concatenate(
            [A.T @ y + c * tau, b * tau - A @ u - y + v, (w - tau - c @ u - b @ y + w - 1)[None]]
        )

    return F


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConicSolution(Portable):
    """The solution of a conic program: minimize c^T x subject to A x + s = b, s in the cone K.

    Attributes:
      x: the minimum, shape (n,).
      y: Lagrange multipliers, in the dual cone K*, shape (m,).
      s: slacks b - A x, in K, shape (m,).
    """

    x: Array
    y: Array
    s: Array


def embed(solution: ConicSolution) -> Array:
    """Write the solution of a conic program as the vector z = (x, y - s, 1).

    x is the minimum, y are the multipliers and s the slacks; :func:`conic_residual` is zero at z.
    """
    return jnp.concatenate([solution.x, solution.y - solution.s, jnp.ones_like(solution.x[:1])])


def read(z: Array, cone: Cones) -> ConicSolution:
    """Turn a root z of :func:`conic_residual` into the solution of the conic program.

        x = u / w,   y = P_K*(v) / w,   s = (P_K*(v) - v) / w,   z = (u, v, w)

    P_K* is the projection on the dual of the cone K; w is the scale of z, not necessarily one.
    """
    columns = jnp.size(z) - 1 - sum(part.size for part in _parts(cone))
    v = z[columns:-1]
    y = _project_dual(cone, v)
    return ConicSolution(z[:columns] / z[-1], y / z[-1], (y - v) / z[-1])


def _parts(cone: Cones) -> tuple[Cone, ...]:
    return cone if isinstance(cone, tuple) else (cone,)


def _project_dual(cone: Cones, v: Array) -> Array:
    """Project the block of the vector v that belongs to each cone on the dual of this cone.

    ``cone`` is one cone, or a tuple of cones in the order of the blocks. Return a vector like v.
    """
    # without the last end, which is the length of v: jnp.split takes the inner ends
    parts = _parts(cone)
    ends = np.cumsum([part.size for part in parts])[:-1]
    return jnp.concatenate(
        [part.project_dual(piece) for part, piece in zip(parts, jnp.split(v, ends), strict=True)]
    )


def _check_shape(name: str, array: Array, length: int) -> None:
    if jnp.shape(array) != (length,):
        raise InputError(
            f"{name} has shape {jnp.shape(array)}, but the shape of `A` requires ({length},);"
            " give shapes that fit"
        )
