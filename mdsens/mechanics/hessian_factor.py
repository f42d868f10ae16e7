"""The Hessian at one configuration on the host: assembled, factorized, solved with and its lowest
modes found.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from mdsens.implicit.linear import eigen
from mdsens.implicit.linear.eigen import Spectrum
from mdsens.implicit.linear.operators import Auto
from mdsens.implicit.linear.result import SolveStats
from mdsens.implicit.linear.solution import solve
from mdsens.implicit.linear.sparse_ldl import SHIFT, SparseFactor, bounds, ordering, solve_on_range
from mdsens.mechanics.hessian import Unknowns, hessian_operator, sparse_hessian
from mdsens.mechanics.hessian_blocks import BlockRows, block_cholesky
from mdsens.mechanics.null_space import NullSpace
from mdsens.mechanics.status import Status
from mdsens.model.system import System

__all__ = ["HessianFactor", "factorizes", "participation"]

# Factorizing fills in: in 3-D its time goes with the square of n, 13 s at 8,192 particles, where a
# solve by CG takes 1.
FACTOR_PARTICLES_3D = 4000
# In 3-D, a factor takes 0.27 s at 2,000 spheres, one solve by CG 0.07 s, and 0.15 s at a pressure
# of 4e-4.
ONE_SOLVE_3D = 1500
ALL_MODES = 600  # unknowns up to which all eigenvalues are computed where products alone are there
# Steps of Lanczos that look for negative curvature elsewhere. The weight of a mode of stiffness -s
# beside others from 0 to 1 grows by exp(4 sqrt(s)) a step: 150 steps find s = 1e-3 nearly always,
# 1e-4 mostly, and weaker ones at times.
LANCZOS_STEPS = 150
NEGATIVE = (
    1e-9  # of the largest stiffness: below it the sign is round-off's, after so many products
)


def factorizes(system: System) -> bool:
    """Whether the Hessian is assembled and factorized: of pairs, in double precision, and where it
    does not fill in.
    """
    small = system.dimension == 2 or system.n <= FACTOR_PARTICLES_3D
    return small and system.potential.pairwise and system.positions.dtype == jnp.float64


@jax.jit
def _products(system: System, null: NullSpace, columns: Any) -> jax.Array:
    """H times the columns of (m, c)."""
    operator = hessian_operator(system, null)
    n, d = system.positions.shape

    def one(v: jax.Array) -> jax.Array:
        return operator.matvec(Unknowns(v.reshape(n, d))).positions.ravel()

    return jax.lax.map(one, columns.T, batch_size=min(32, columns.shape[1])).T


@functools.partial(jax.jit, static_argnames=("rtol", "definite"))
def _solve(
    system: System, null: NullSpace, b: Any, rtol: float, definite: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, stats = solve(
        hessian_operator(system, null, definite=definite), Unknowns(b), Auto(rtol=rtol)
    )
    return x.positions, stats.residual, stats.status


@jax.jit
def _lanczos(system: System, null: NullSpace, start: Any, weights: Any) -> tuple[jax.Array, ...]:
    """Lanczos on H off its null space, and H times the vector that the weights give."""
    operator = hessian_operator(system, null)

    def apply(v: jax.Array) -> jax.Array:
        product = operator.matvec(null.project(Unknowns(v.reshape(system.positions.shape))))
        return null.project(product).positions.ravel()

    begin = null.project(Unknowns(start.reshape(system.positions.shape))).positions.ravel()
    diagonal, beside, total = eigen.lanczos(apply, begin, weights)
    return diagonal, beside, total, apply(total)


class HessianFactor:
    """H of a backbone, off its null space. Assembled and factorized where the potential is made of
    pairs and it pays.

    Args:
      system: the backbone (rattlers' contacts deleted); or a batch, whose H has a block for each
        member. Its columns stand below each other, and it answers ``project``, ``solve_many`` and
        ``negative`` alone.
      null: its null space, simplified.
      index: how many negative eigenvalues it is to have: 0 at a minimum, at a saddle its order.
    """

    _factors = ("factor",)  # of what is kept once it is made

    def __init__(self, system: System, null: NullSpace, index: int = 0):
        self.system, self.null, self.index, self.members = system, null, index, system.batch or 1
        self._factorize = factorizes(system)

    def __getstate__(self) -> dict[str, Any]:
        """All but the factors, which lie in memory of their libraries: a copy makes its own when it
        first solves.
        """
        return {name: value for name, value in vars(self).items() if name not in self._factors}

    @functools.cached_property
    def matrix(self) -> Any:
        """H as a scipy sparse matrix; None where the potential is more than pairs."""
        return sparse_hessian(self.system)

    @functools.cached_property
    def blocks(self) -> BlockRows | None:
        """For products on the device; None where H is not assembled."""
        if self.matrix is None:
            return None
        return BlockRows.of(self.matrix, self.system.dimension, self.system.positions.dtype)

    @functools.cached_property
    def order(self) -> np.ndarray | None:
        """Of the rows of H, in which its factor stays sparse; None for minimum degree."""
        return ordering(self.matrix, self.system.dimension)

    @functools.cached_property
    def factor(self) -> SparseFactor | None:
        """Of H with its null space held; None where it is not assembled, or would fill in too much."""
        if self.matrix is None or not self._factorize:
            return None
        try:
            return SparseFactor(self.matrix, self._hold(), self.order)
        except RuntimeError:  # exactly singular, held and all
            return None

    @functools.cached_property
    def _bounds(self) -> np.ndarray:
        """(members,) the largest row sum of each one's |H|."""
        return bounds(self.matrix, self.members)

    def _hold(self) -> np.ndarray:
        """What is added to the diagonal: where nothing turns, springs on the rattlers and on one
        particle of each cluster, which do not change what a right-hand side without a part in the
        null space does; else a small shift.
        """
        scale, null = np.where(self._bounds > 0, self._bounds, 1.0)[:, None], self.null
        if null.motions is not None or null.arms is not None:
            return np.repeat(SHIFT * scale, self.matrix.shape[0] // self.members)
        rattlers = np.asarray(null.rattlers)
        first = np.argmin(rattlers, axis=-1)[..., None]
        labels = (
            np.broadcast_to(first, rattlers.shape)
            if null.labels is None
            else np.asarray(null.labels)
        )
        held = rattlers | (labels == np.arange(labels.shape[-1]))
        return np.repeat(np.where(held, scale, 0.0).ravel(), self.system.dimension)

    def project(self, columns: np.ndarray) -> np.ndarray:
        """The columns of (m, c), or one (m,), off the null space."""
        return self.null.project_columns(columns.reshape(columns.shape[0], -1)).reshape(
            columns.shape
        )

    def products(self, columns: np.ndarray) -> np.ndarray:
        """H times the columns of (m, c)."""
        if self.matrix is not None:
            return self.matrix @ columns
        return np.asarray(_products(self.system, self.null, columns))

    @property
    def negative(self) -> np.ndarray:
        """(members,) negative eigenvalues of each one's H, by the factor's pivots; -1 where they
        tell nothing.
        """
        assert self.factor is not None
        return self.factor.negatives(self.members)

    def solve(self, b: np.ndarray, rtol: float = 1e-12) -> tuple[np.ndarray, float, Status]:
        """H x = b on the range, for b (n, d): ``(x, relative residual, status)``; to ``rtol``, by a
        factor to round-off and good from 1e-10.
        """
        if self.factor is not None:
            x, stats = self.solve_many(
                np.asarray(b, float).reshape(-1, 1), max(rtol, 1e-10), to=1e-15
            )
            return x.reshape(b.shape), float(stats.residual[0, 0]), Status(int(stats.status[0, 0]))
        x, residual, code = _solve(self.system, self.null, b, rtol, not self.index)
        return np.asarray(x), float(residual), Status(int(code))

    def solve_many(
        self, columns: np.ndarray, rtol: float, to: float = 1e-12
    ) -> tuple[np.ndarray, SolveStats]:
        """H x = b by the factor, for the columns b of (m, c): x, and stats (members, c).

        Refined to a residual of ``to``, and converged from ``rtol``; ``iterations`` counts the
        refinements, a product each. The status is INDEFINITE where H has a negative eigenvalue, at
        a saddle NOT_A_SADDLE where it has more or fewer than its order, whatever the right-hand
        side.
        """
        assert self.matrix is not None and self.factor is not None
        eps = float(jnp.finfo(self.system.positions.dtype).eps)  # that of the projections

        def sizes(some: np.ndarray) -> np.ndarray:
            return np.asarray(np.linalg.norm(some.reshape(self.members, -1, some.shape[1]), axis=1))

        whole = sizes(columns)
        kept = self.project(columns)
        share = sizes(kept) / np.where(whole > 0, whole, 1.0)
        dropped = sizes(columns - kept) / np.where(whole > 0, whole, 1.0)
        # the rest is round-off, and its solution would be noise
        kept = np.where(np.repeat(share > 8 * eps, len(kept) // self.members, axis=0), kept, 0.0)
        x, residual, rounds = solve_on_range(
            self.matrix, self.factor, self.project, kept, min(rtol, to), self.members
        )
        status = np.where(
            dropped > eps**0.5, Status.NULL_COMPONENT_DROPPED.value, Status.CONVERGED.value
        )
        # what the rounding of x alone leaves of the residual
        size, scale = sizes(kept), self._bounds[:, None]
        floor = eps * np.maximum(100.0, 4.0 * scale * sizes(x) / np.where(size > 0, size, 1.0))
        limited = np.where(
            residual <= np.minimum(floor, 1e-9),
            Status.ROUND_OFF_LIMITED.value,
            Status.STAGNATED.value,
        )
        status = np.where(residual <= rtol, status, limited)
        wrong = Status.NOT_A_SADDLE if self.index else Status.INDEFINITE
        status = np.where(
            (self.negative != self.index)[:, None] & (share > 8 * eps), wrong.value, status
        )
        status = np.where(
            np.isfinite(whole) & np.isfinite(sizes(x)), status, Status.NOT_FINITE.value
        )
        found: tuple[Any, Any, Any, Any] = (status.astype(np.int32), residual, rounds, dropped)
        return x, SolveStats(*found, "sparse factor")

    def _precondition(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """The inverse of each particle's own block of H, made positive; None where H is not
        assembled.
        """
        if self.matrix is None:
            return None
        n, d = self.system.positions.shape
        scaling, _ = block_cholesky(self.matrix.tobsr((d, d)))
        inverse = np.einsum("kin,kjn->nij", scaling, scaling)
        return lambda v: np.einsum("nij,njk->nik", inverse, v.reshape(n, d, -1)).reshape(v.shape)

    def lowest(self, k: int = 1, floor: float = 0.0) -> Spectrum:
        """The k lowest modes off the null space; of a stiffness below ``floor`` the sign tells
        nothing.
        """
        return eigen.lowest(
            self.products,
            self.system.positions.size,
            k,
            project=self.project,
            null=sum(self.null.dimensions(self.system.dimension)),
            matrix=self.matrix if self._factorize else None,
            order=self.order if self._factorize and self.matrix is not None else None,
            precondition=self._precondition(),
            dtype=self.system.positions.dtype,
            floor=floor,
        )

    def unstable(self, most: int) -> int:
        """How many eigenvalues are negative; where no factor counts them, of the lowest ``most``."""
        counted = -1 if self.factor is None else int(self.negative[0])
        return counted if counted >= 0 else self.lowest(most).negative

    def negative_mode(self, floor: float = 0.0) -> tuple[float, np.ndarray] | None:
        """A mode of negative stiffness and its stiffness, the mode (n, d) of norm one; None where
        none was found.

        By the factor where it pays, which misses none; else by all eigenvalues of a small system;
        else by Lanczos' method, which may miss one that is weak beside the others.

        Args:
          floor: a stiffness of this size may be of either sign.
        """
        n, d = self.system.positions.shape
        pays = d == 2 or n <= ONE_SOLVE_3D
        counted = int(self.negative[0]) if pays and self.factor is not None else -1
        if counted == 0:
            return None
        if counted > 0 or n * d <= ALL_MODES:
            spectrum = self.lowest(1, floor)
            if not spectrum.negative:
                return None
            return float(spectrum.values[0]), spectrum.vectors[:, 0].reshape(n, d)
        dtype = self.system.positions.dtype
        start = np.random.default_rng(0).standard_normal(n * d).astype(dtype)
        diagonal, beside, *_ = _lanczos(
            self.system, self.null, start, np.zeros(LANCZOS_STEPS, dtype)
        )
        diagonal, beside = np.asarray(diagonal, float), np.asarray(beside, float)
        if not (np.isfinite(diagonal).all() and np.isfinite(beside).all()):
            return None
        values, vectors = scipy.linalg.eigh_tridiagonal(diagonal, beside[:-1])
        if not values[0] < -max(NEGATIVE * values[-1], floor):
            return None
        *_, vector, image = _lanczos(self.system, self.null, start, vectors[:, 0].astype(dtype))
        vector, image = np.asarray(vector, float), np.asarray(image, float)
        value = float(vector @ image / (vector @ vector))
        return (value, (vector / np.linalg.norm(vector)).reshape(n, d)) if value < -floor else None

    def below(self, value: float) -> int | None:
        """How many modes off the null space are less stiff than ``value`` > 0; None where no factor
        tells.
        """
        if self.matrix is None or not self._factorize:
            return None
        try:
            negative = SparseFactor(self.matrix, -value, self.order).negative
        except RuntimeError:  # an eigenvalue, to the last digit
            return None
        return (
            None
            if negative is None
            else negative - sum(self.null.dimensions(self.system.dimension))
        )


def participation(vectors: np.ndarray, dimension: int) -> np.ndarray:
    """Participation ratio of modes, (sum |e_i|^2)^2 / (n sum |e_i|^4): 1 where all particles move
    alike, 1/n for one.

    Args:
      vectors: (n d, k).
      dimension: d.
    """
    squares = np.sum(
        vectors.reshape(vectors.shape[0] // dimension, dimension, vectors.shape[1]) ** 2, axis=1
    )
    return np.sum(squares, axis=0) ** 2 / (squares.shape[0] * np.sum(squares**2, axis=0))
