"""Conic programs: linear, second-order and semidefinite ones, as the root of a residual.

    primal:  minimize  c^T x  subject to  A x + s = b, s in K
    dual:    maximize -b^T y  subject to  A^T y + c = 0, y in K*

K is a cone and K* its dual cone. A product of cones is a tuple of records, in the order of the rows
of A. To differentiate a solution, such as the vertex of a linear program or the matrix of a
semidefinite one, give :func:`mdsens.implicit.root` the condition that :func:`conic_residual`
returns, and any solver. :func:`embed` turns the solution of another solver into the unknown z of
that condition, :func:`read` turns z into the solution.
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
    """A closed convex cone K of vectors."""

    @property
    def size(self) -> int:
        """Length of the vectors."""
        ...

    def project_dual(self, y: Array) -> Array:
        """Project y on the dual cone K*: the point of K* nearest to y, shape (size,).

        K* is the set of vectors whose inner product with each vector of K is not negative.
        """
        ...


Cones: TypeAlias = Cone | tuple[Cone, ...]


@dataclasses.dataclass(frozen=True)
class _Sized:
    """A cone of vectors of length ``size``."""

    size: int

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 1:
            raise InputError(
                f"{type(self).__name__}: size={self.size!r} is not the length of a vector; give a"
                " whole number from 1"
            )


class Zero(_Sized):
    """The cone of zeros, s = 0: equalities A x = b, whose multipliers y are not restricted."""

    def project_dual(self, y: Array) -> Array:
        """Return y, since the dual cone is the whole space."""
        return y


class NonNegative(_Sized):
    """The cone of vectors without negative entries, s >= 0: inequalities A x <= b."""

    def project_dual(self, y: Array) -> Array:
        """Return max(y, 0), the projection on the cone, which is its own dual."""
        return projections.non_negative(y)


class SecondOrder(_Sized):
    """The second-order cone: vectors s = (t, u) of length ``size`` with |u| <= t."""

    def project_dual(self, y: Array) -> Array:
        """Project y on the cone, which is its own dual; see ``projections.second_order_cone``."""
        return projections.second_order_cone(y)


@dataclasses.dataclass(frozen=True)
class Semidefinite:
    """Positive semidefinite matrices with ``order`` rows, as vectors: see :func:`vector`."""

    order: int

    def __post_init__(self) -> None:
        if not isinstance(self.order, int) or self.order < 1:
            raise InputError(
                f"Semidefinite: order={self.order!r} is not a number of rows; give a whole number"
                " from 1"
            )

    @property
    def size(self) -> int:
        """Length of the vectors, order (order + 1) / 2."""
        return self.order * (self.order + 1) // 2

    def project_dual(self, y: Array) -> Array:
        """Project y on the cone, which is its own dual; see ``projections.semidefinite``."""
        return vector(projections.semidefinite(matrix(y)))


def vector(symmetric: Array) -> Array:
    """Write a symmetric matrix (n, n) as a vector of n (n + 1) / 2 entries.

    The entries are the lower triangle, column by column, with off-diagonal entries times sqrt(2),
    so that inner products of vectors are those of the matrices. The solver SCS uses the same order.
    """
    # The column-major order of the lower triangle is the row-major order of the upper triangle,
    # with row and column exchanged.
    rows, columns = np.triu_indices(jnp.shape(symmetric)[0])
    return jnp.where(rows == columns, 1.0, np.sqrt(2)) * symmetric[columns, rows]


def matrix(entries: Array) -> Array:
    """Write a vector of n (n + 1) / 2 entries as a symmetric matrix; inverts :func:`vector`."""
    # n from m = n (n + 1) / 2
    order = int((np.sqrt(8 * jnp.size(entries) + 1) - 1) / 2)
    if order * (order + 1) // 2 != jnp.size(entries):
        raise InputError(
            f"entries has length {jnp.size(entries)}, but the vector of a symmetric matrix (n, n)"
            " has length n (n + 1) / 2; give one of length 1, 3, 6, 10, ..."
        )
    rows, columns = np.triu_indices(order)
    scaled = jnp.where(rows == columns, 1.0, np.sqrt(0.5)) * entries
    return (
        jnp.zeros((order, order), scaled.dtype)
        .at[columns, rows]
        .set(scaled)
        .at[rows, columns]
        .set(scaled)
    )


def conic_residual(cone: Cones) -> Callable[[Array, Array, Array, Array], Array]:
    """Make F(z, c, A, b) of a conic program: its homogeneous self-dual embedding, at scale one.

        F(z) = (Q - I) P(z) + z + (0, 0, w - 1),   P(z) = (u, P_K*(v), max(w, 0)),   z = (u, v, w)
        Q = [[0, A^T, c], [-A, 0, b], [-c^T, -b^T, 0]]

    Where there is a solution the root is z = (x, y - s, 1). Without the last term F is homogeneous,
    and its Jacobian has the right null vector z and the left null vector P(z). The last entry of
    both is w, so that the last term removes the null vectors. It moves no root, since P(z) F(z) =
    w (w - 1).

    Args:
      cone: a cone, or a tuple of cones in the order of the rows of A.

    Returns:
      F on z of shape (n + m + 1,), with c (n,), A (m, n) and b (m,); the root has derivatives by c,
      A and b. The Jacobian is not symmetric. It is regular where the primal and the dual solution
      are unique and P_K* has no kink, see :func:`mdsens.implicit.conditions.degeneracy.kinked`.

    Raises:
      InputError: when F is called with shapes that do not fit.

    Busseti, Moursi and Boyd, arXiv:1811.02157; Agrawal et al., arXiv:1904.09043.
    """

    @full_precision
    def F(z: Array, c: Array, A: Array, b: Array) -> Array:
        rows, columns = jnp.shape(A)
        _check_shape("c", c, columns)
        _check_shape("b", b, rows)
        _check_shape("the cones' rows", jnp.zeros(sum(part.size for part in _parts(cone))), rows)
        _check_shape("z", z, columns + rows + 1)
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
    """A primal and dual solution.

    Attributes:
      x: unknowns, shape (n,).
      y: multipliers in K*, shape (m,).
      s: slacks b - A x in K, shape (m,).
    """

    x: Array
    y: Array
    s: Array


def embed(solution: ConicSolution) -> Array:
    """Turn a solution into z = (x, y - s, 1), the unknown of :func:`conic_residual`."""
    return jnp.concatenate([solution.x, solution.y - solution.s, jnp.ones_like(solution.x[:1])])


def read(z: Array, cone: Cones) -> ConicSolution:
    """Turn the unknown z of :func:`conic_residual`, at any scale w, into the solution.

    x = u / w,   y = P_K*(v) / w,   s = (P_K*(v) - v) / w,   z = (u, v, w)
    """
    columns = jnp.size(z) - 1 - sum(part.size for part in _parts(cone))
    v = z[columns:-1]
    y = _project_dual(cone, v)
    return ConicSolution(z[:columns] / z[-1], y / z[-1], (y - v) / z[-1])


def _parts(cone: Cones) -> tuple[Cone, ...]:
    return cone if isinstance(cone, tuple) else (cone,)


def _project_dual(cone: Cones, v: Array) -> Array:
    """Project each cone's part of v on its dual cone; v is in the order of the rows of A."""
    # without the last end, which is the length of v: jnp.split takes the inner ends
    parts = _parts(cone)
    ends = np.cumsum([part.size for part in parts])[:-1]
    return jnp.concatenate(
        [part.project_dual(piece) for part, piece in zip(parts, jnp.split(v, ends), strict=True)]
    )


def _check_shape(name: str, array: Array, length: int) -> None:
    if jnp.shape(array) != (length,):
        raise InputError(
            f"{name} has shape {jnp.shape(array)}, but A needs ({length},); give shapes that fit"
        )
