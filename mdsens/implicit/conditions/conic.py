"""Conic programs: the residual whose root is a solution, for linear, second-order and semidefinite
constraints.

    minimize c^T x  subject to  A x + s = b, s in K;    maximize -b^T y  subject to  A^T y + c = 0, y in K*

A product of cones is a tuple of records, in the order of the rows of A. The derivative of a linear
program's vertex, of a semidefinite program's matrix: give :func:`mdsens.implicit.root` the
condition that :func:`conic_residual` makes, and any solver; :func:`embed` makes its unknown of what
other solvers return, :func:`read` the solution of it.
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
        """Length of its vectors."""
        ...

    def project_dual(self, y: Array) -> Array:
        """The nearest point of K*, the vectors with no negative product with any of K; shape
        (size,).
        """
        ...


Cones: TypeAlias = Cone | tuple[Cone, ...]


@dataclasses.dataclass(frozen=True)
class _Sized:
    size: int

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 1:
            raise InputError(
                f"{type(self).__name__}: size={self.size!r} is no length; give a whole number"
                " from 1"
            )


class Zero(_Sized):
    """s = 0: equalities A x = b, of any multipliers y."""

    def project_dual(self, y: Array) -> Array:
        """y itself."""
        return y


class NonNegative(_Sized):
    """s >= 0: inequalities A x <= b."""

    def project_dual(self, y: Array) -> Array:
        """max(y, 0)."""
        return projections.non_negative(y)


class SecondOrder(_Sized):
    """|u| <= t, s = (t, u) of length size."""

    def project_dual(self, y: Array) -> Array:
        """As :func:`mdsens.implicit.conditions.projections.second_order_cone`."""
        return projections.second_order_cone(y)


@dataclasses.dataclass(frozen=True)
class Semidefinite:
    """Positive semi-definite matrices with ``order`` rows, as vectors: see :func:`vector`."""

    order: int

    def __post_init__(self) -> None:
        if not isinstance(self.order, int) or self.order < 1:
            raise InputError(
                f"Semidefinite: order={self.order!r} is no number of rows; give a whole number"
                " from 1"
            )

    @property
    def size(self) -> int:
        """order (order + 1) / 2."""
        return self.order * (self.order + 1) // 2

    def project_dual(self, y: Array) -> Array:
        """As :func:`mdsens.implicit.conditions.projections.semidefinite`."""
        return vector(projections.semidefinite(matrix(y)))


def vector(symmetric: Array) -> Array:
    """A symmetric matrix (n, n) as a vector of n (n + 1) / 2, with the same inner product.

    The lower triangle, column by column, off-diagonal entries times sqrt(2), as SCS has it.
    """
    rows, columns = np.triu_indices(jnp.shape(symmetric)[0])
    return jnp.where(rows == columns, 1.0, np.sqrt(2)) * symmetric[columns, rows]


def matrix(entries: Array) -> Array:
    """The symmetric matrix (n, n) of a vector of n (n + 1) / 2: the inverse of :func:`vector`."""
    order = int((np.sqrt(8 * jnp.size(entries) + 1) - 1) / 2)
    if order * (order + 1) // 2 != jnp.size(entries):
        raise InputError(
            f"entries has length {jnp.size(entries)}, but a symmetric matrix's is n (n + 1) / 2"
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
    """F(z, c, A, b) of a conic program: the homogeneous self-dual embedding, at scale one.

        F(z) = (Q - I) P(z) + z + (0, 0, w - 1),   P(z) = (u, P_K*(v), max(w, 0)),   z = (u, v, w)
        Q = [[0, A^T, c], [-A, 0, b], [-c^T, -b^T, 0]]

    Where there is a solution the root is z = (x, y - s, 1). Without the last term F is homogeneous,
    and its Jacobian has the null vector z and the left one P(z). Both end in w, so that the term
    removes them, and it moves no root: P(z) F(z) = w (w - 1).

    Args:
      cone: a cone, or a tuple of cones in the order of the rows of A.

    Returns:
      F on z of shape (n + m + 1,), with c (n,), A (m, n) and b (m,), all of which the root has
      derivatives by. Its Jacobian is unsymmetric, and regular where primal and dual solution are
      unique and no kink of P_K* is met, which :func:`mdsens.implicit.conditions.degeneracy.kinked`
      tells.

    Raises:
      InputError: when called, shapes that do not fit.

    Busseti, Moursi and Boyd, arXiv:1811.02157; Agrawal et al., arXiv:1904.09043.
    """

    def F(z: Array, c: Array, A: Array, b: Array) -> Array:
        rows, columns = jnp.shape(A)
        _check_shape("c", c, columns)
        _check_shape("b", b, rows)
        _check_shape("the cones' rows", jnp.zeros(sum(part.size for part in _parts(cone))), rows)
        _check_shape("z", z, columns + rows + 1)
        u, v, w = z[:columns], z[columns:-1], z[-1]
        y, tau = _project_dual(cone, v), jnp.maximum(w, 0.0)
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
    """z = (x, y - s, 1), the unknown of :func:`conic_residual`, of what another solver returned."""
    return jnp.concatenate([solution.x, solution.y - solution.s, jnp.ones_like(solution.x[:1])])


def read(z: Array, cone: Cones) -> ConicSolution:
    """The solution that z stands for, at any scale: x = u / w, y = P_K*(v) / w, s = (P_K*(v) - v) /
    w.
    """
    columns = jnp.size(z) - 1 - sum(part.size for part in _parts(cone))
    v = z[columns:-1]
    y = _project_dual(cone, v)
    return ConicSolution(z[:columns] / z[-1], y / z[-1], (y - v) / z[-1])


def _parts(cone: Cones) -> tuple[Cone, ...]:
    return cone if isinstance(cone, tuple) else (cone,)


def _project_dual(cone: Cones, v: Array) -> Array:
    parts = _parts(cone)
    ends = np.cumsum([part.size for part in parts])[:-1]
    return jnp.concatenate(
        [part.project_dual(piece) for part, piece in zip(parts, jnp.split(v, ends), strict=True)]
    )


def _check_shape(name: str, array: Array, length: int) -> None:
    if jnp.shape(array) != (length,):
        raise InputError(f"{name} has shape {jnp.shape(array)}, but A needs ({length},)")
