"""The Hessian at one configuration on the host: assembled, factorised, solved with and its lowest modes found."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mdsens.implicit import eigen
from mdsens.implicit._sparse import SHIFT, SparseFactor, bound, solve_on_range
from mdsens.implicit.eigen import Spectrum
from mdsens.implicit.linear import Auto, solve
from mdsens.implicit.status import Status
from mdsens.stationarity import NullSpace, Unknowns, hessian_operator, sparse_hessian
from mdsens.system import System

__all__ = ["Stiffness", "participation"]

# Factorising fills in: in 3-D its time goes with the square of n, 13 s at 8,192 particles, where a solve by CG takes 1.
FACTOR_PARTICLES_3D = 4000


@jax.jit
def _products(system: System, null: NullSpace, columns: jax.Array) -> jax.Array:
    """H times the columns of (m, c)."""
    operator = hessian_operator(system, null)
    n, d = system.positions.shape

    def one(v: jax.Array) -> jax.Array:
        return operator.matvec(Unknowns(v.reshape(n, d))).positions.ravel()

    return jax.lax.map(one, columns.T, batch_size=min(32, columns.shape[1])).T


@jax.jit
def _projections(null: NullSpace, columns: jax.Array) -> jax.Array:
    n = null.rattlers.shape[0]

    def one(v: jax.Array) -> jax.Array:
        return null.project(Unknowns(v.reshape(n, -1))).positions.ravel()

    return jax.lax.map(one, columns.T, batch_size=min(32, columns.shape[1])).T


@functools.partial(jax.jit, static_argnames=("rtol",))
def _solve(system: System, null: NullSpace, b: jax.Array, rtol: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, stats = solve(hessian_operator(system, null), Unknowns(b), Auto(rtol=rtol))
    return x.positions, stats.residual, stats.status


class Stiffness:
    """H of a backbone, off its null space. Assembled and factorised where the law is made of pairs and it pays.

    Args:
      system: the backbone (rattlers' contacts deleted).
      null: its null space.
    """

    def __init__(self, system: System, null: NullSpace):
        self.system, self.null = system, null
        self.matrix = sparse_hessian(system)
        self._factorise = system.dimension == 2 or system.n <= FACTOR_PARTICLES_3D

    @functools.cached_property
    def factor(self) -> SparseFactor | None:
        """Of H plus a small shift; None where it is not assembled, or would fill in too much."""
        if self.matrix is None or not self._factorise:
            return None
        try:
            return SparseFactor(self.matrix, SHIFT * (bound(self.matrix) or 1.0))
        except RuntimeError:  # exactly singular, shift and all
            return None

    def project(self, columns: np.ndarray) -> np.ndarray:
        """The columns of (m, c), or one (m,), off the null space."""
        given = columns.reshape(columns.shape[0], -1)
        return np.asarray(_projections(self.null, jnp.asarray(given))).reshape(columns.shape)

    def products(self, columns: np.ndarray) -> np.ndarray:
        """H times the columns of (m, c)."""
        if self.matrix is not None:
            return self.matrix @ columns
        return np.asarray(_products(self.system, self.null, jnp.asarray(columns)))

    def solve(self, b: np.ndarray, rtol: float = 1e-12) -> tuple[np.ndarray, float, Status]:
        """H x = b on the range, for b (n, d): ``(x, relative residual, status)``; to ``rtol`` where there is no factor,
        which gives round-off.
        """
        shape = self.system.positions.shape
        if self.factor is not None:
            flat = np.asarray(b, float).ravel()
            x, residual = solve_on_range(self.matrix, self.factor, self.project, flat)
            eps = float(jnp.finfo(self.system.positions.dtype).eps)  # that of the projections
            limited = Status.ROUND_OFF_LIMITED if residual <= 100.0 * eps else Status.STAGNATED
            return x.reshape(shape), residual, Status.CONVERGED if residual <= 1e-10 else limited
        x, residual, code = _solve(self.system, self.null, jnp.asarray(b), rtol)
        return np.asarray(x), float(residual), Status(int(code))

    def _precondition(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """The inverse of each particle's own block of H, made positive; None where H is not assembled."""
        if self.matrix is None:
            return None
        n, d = self.system.positions.shape
        entries = self.matrix.tocoo()
        own = entries.row // d == entries.col // d
        blocks = np.zeros((n, d, d))
        blocks[entries.row[own] // d, entries.row[own] % d, entries.col[own] % d] = entries.data[own]
        values, axes = np.linalg.eigh(blocks)
        values = np.maximum(np.abs(values), 1e-3 * np.abs(values).max())
        inverse = np.einsum("nij,nj,nkj->nik", axes, 1.0 / values, axes)
        return lambda v: np.einsum("nij,njk->nik", inverse, v.reshape(n, d, -1)).reshape(v.shape)

    def lowest(self, k: int = 1, floor: float = 0.0) -> Spectrum:
        """The k lowest modes off the null space; of a stiffness below ``floor`` the sign tells nothing."""
        return eigen.lowest(
            self.products,
            self.system.positions.size,
            k,
            project=self.project,
            null=sum(self.null.dimensions(self.system.dimension)),
            matrix=self.matrix if self._factorise else None,
            precondition=self._precondition(),
            dtype=self.system.positions.dtype,
            floor=floor,
        )


def participation(vectors: np.ndarray, dimension: int) -> np.ndarray:
    """Participation ratio of modes, (sum |e_i|^2)^2 / (n sum |e_i|^4): 1 where all particles move alike, 1/n for one.

    Args:
      vectors: (n d, k).
      dimension: d.
    """
    squares = np.sum(vectors.reshape(vectors.shape[0] // dimension, dimension, vectors.shape[1]) ** 2, axis=1)
    return np.sum(squares, axis=0) ** 2 / (squares.shape[0] * np.sum(squares**2, axis=0))
