"""The Hessian at one configuration, by numpy and scipy: matrix, factor, solves, lowest modes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from mdsens.implicit.linear import Auto, eigen
from mdsens.implicit.linear.eigen import Spectrum
from mdsens.implicit.linear.result import SolveStats
from mdsens.implicit.linear.solution import solve
from mdsens.implicit.linear.sparse_ldl import SHIFT, SparseFactor, bounds, ordering, solve_on_range
from mdsens.mechanics.hessian import Unknowns, hessian_operator, sparse_hessian
from mdsens.mechanics.hessian_blocks import BlockRows, block_cholesky
from mdsens.mechanics.null_space import NullSpace
from mdsens.mechanics.status import Status
from mdsens.model.system import System

__all__ = ["HessianFactor", "factorizes", "participation"]

# Largest number of particles in 3-D for which the Hessian is factorized. The factor of a sparse
# matrix is less sparse than the matrix; in 3-D its time is proportional to n^2: 13 s at 8,192
# particles, where a solve by CG takes 1 s.
FACTOR_PARTICLES_3D = 4000
# Largest number of particles in 3-D for which a factor pays for a single solve. At 2,000 spheres a
# factor takes 0.27 s, one solve by CG 0.07 s, and 0.15 s at a pressure of 4e-4.
ONE_SOLVE_3D = 1500
# Largest number of unknowns for which all eigenvalues are computed where H is not factorized.
ALL_MODES = 600
# Steps of Lanczos' method in the search for negative curvature in larger systems. Beside modes of
# stiffness 0 to 1, the weight of a mode of stiffness -s grows by exp(4 sqrt(s)) in each step: 150
# steps find s = 1e-3 nearly always, 1e-4 mostly, and smaller s sometimes.
LANCZOS_STEPS = 150
# Smallest resolved negative stiffness, in units of the largest stiffness: after so many products
# the sign of a smaller one is round-off.
NEGATIVE = 1e-9


def factorizes(system: System) -> bool:
    """Return whether the Hessian is assembled and factorized.

    This is done for pair potentials, in double precision, in 2-D or up to FACTOR_PARTICLES_3D
    particles.
    """
    small = system.dimension == 2 or system.n <= FACTOR_PARTICLES_3D
    return small and system.potential.pairwise and system.positions.dtype == jnp.float64


@jax.jit
def _products(system: System, null: NullSpace, columns: jax.Array) -> jax.Array:
    """H times the columns of a matrix (m, c)."""
    operator = hessian_operator(system, null)
    n, d = system.positions.shape

    def product(v: jax.Array) -> jax.Array:
        return operator.matvec(Unknowns(v.reshape(n, d))).positions.ravel()

    # 32 columns at a time, which bounds the memory
    return jax.lax.map(product, columns.T, batch_size=min(32, columns.shape[1])).T


@functools.partial(jax.jit, static_argnames=("rtol", "definite"))
def _solve(
    system: System, null: NullSpace, b: jax.Array, rtol: float, definite: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Solve H x = b iteratively, b (n, d): (x, relative residual, status)."""
    x, stats = solve(
        hessian_operator(system, null, definite=definite), Unknowns(b), Auto(rtol=rtol)
    )
    return x.positions, stats.residual, stats.status


@jax.jit
def _lanczos(
    system: System, null: NullSpace, start: jax.Array, weights: jax.Array
) -> tuple[jax.Array, ...]:
    """Run Lanczos' method on H with its null space projected out.

    Args:
      start: (n d,) first vector.
      weights: (steps,) coefficients of a sum of the Lanczos vectors.

    Returns:
      the diagonal and off-diagonal of the tridiagonal matrix, the sum of the Lanczos vectors, and H
      times this sum.
    """
    operator = hessian_operator(system, null)

    def apply(v: jax.Array) -> jax.Array:
        product = operator.matvec(null.project(Unknowns(v.reshape(system.positions.shape))))
        return null.project(product).positions.ravel()

    begin = null.project(Unknowns(start.reshape(system.positions.shape))).positions.ravel()
    diagonal, off_diagonal, total = eigen.lanczos(apply, begin, weights)
    return diagonal, off_diagonal, total, apply(total)


class HessianFactor:
    """The Hessian H of a backbone with its null space projected out; factorized where that pays.

    Args:
      system: the backbone (the system without the contacts of rattlers); or a batch, whose H has a
        diagonal block for each of its systems. For a batch, the columns of the systems are
        concatenated, and only ``project``, ``solve_many`` and ``negative`` are available.
      null: the null space of H, simplified by its method ``simplified``.
      index: the expected number of negative eigenvalues: 0 at a minimum, the order of a saddle.
    """

    _factors = ("factor",)  # attributes that a pickled copy computes again

    def __init__(self, system: System, null: NullSpace, index: int = 0):
        self.system = system
        self.null = null
        self.index = index
        self.members = system.batch or 1
        self._factorize = factorizes(system)

    def __getstate__(self) -> dict[str, Any]:
        """The attributes without the factors, which are in the memory of other libraries.

        A copy factorizes again at its first solve.
        """
        return {name: value for name, value in vars(self).items() if name not in self._factors}

    @functools.cached_property
    def matrix(self) -> Any:
        """H as a scipy sparse matrix; None where the potential is not a sum over pairs."""
        return sparse_hessian(self.system)

    @functools.cached_property
    def blocks(self) -> BlockRows | None:
        """H as blocks for products on the device; None where H is not assembled."""
        if self.matrix is None:
            return None
        return BlockRows.of(self.matrix, self.system.dimension, self.system.positions.dtype)

    @functools.cached_property
    def order(self) -> np.ndarray | None:
        """Order of the rows of H in which its factor is sparse; None for minimum degree."""
        return ordering(self.matrix, self.system.dimension)

    @functools.cached_property
    def factor(self) -> SparseFactor | None:
        """Factor of H with springs or a shift that make it regular; None where H is not factorized.

        It is also None where the matrix is exactly singular in spite of the springs or the shift.
        """
        if self.matrix is None or not self._factorize:
            return None
        try:
            return SparseFactor(self.matrix, self._diagonal_springs(), self.order)
        except RuntimeError:  # exactly singular, in spite of the springs
            return None

    @functools.cached_property
    def _bounds(self) -> np.ndarray:
        """The largest row sum of |H| for each system of a batch, (members,)."""
        return bounds(self.matrix, self.members)

    def _diagonal_springs(self) -> np.ndarray:
        """Stiffnesses to add to the diagonal of H, so that it can be factorized, (m,).

        Where no cluster can rotate, these are springs on the rattlers and on one particle of each
        cluster. They do not change the solution for a right-hand side without a part in the null
        space, except by a null vector. Where a cluster can rotate, they are a small shift of the
        whole diagonal.
        """
        scale = np.where(self._bounds > 0, self._bounds, 1.0)[:, None]
        null = self.null
        if null.motions is not None or null.arms is not None:
            return np.repeat(SHIFT * scale, self.matrix.shape[0] // self.members)
        rattlers = np.asarray(null.rattlers)
        first = np.argmin(rattlers, axis=-1)[..., None]  # the first particle that is no rattler
        if null.labels is None:
            labels = np.broadcast_to(first, rattlers.shape)
        else:
            labels = np.asarray(null.labels)
        # a cluster is named by one of its particles, which gets the spring
        has_spring = rattlers | (labels == np.arange(labels.shape[-1]))
        return np.repeat(np.where(has_spring, scale, 0.0).ravel(), self.system.dimension)

    def project(self, columns: np.ndarray) -> np.ndarray:
        """Project the null space out of the columns of a matrix (m, c), or of a vector (m,)."""
        matrix = columns.reshape(columns.shape[0], -1)
        return self.null.project_columns(matrix).reshape(columns.shape)

    def products(self, columns: np.ndarray) -> np.ndarray:
        """H times the columns of a matrix (m, c)."""
        if self.matrix is not None:
            return self.matrix @ columns
        return np.asarray(_products(self.system, self.null, columns))

    @property
    def negative(self) -> np.ndarray:
        """Number of negative eigenvalues of H for each system of a batch, (members,).

        The number follows from the signs of the factor's pivots; -1 where the pivots are not known.
        """
        assert self.factor is not None
        return self.factor.negatives(self.members)

    def solve(self, b: np.ndarray, rtol: float = 1e-12) -> tuple[np.ndarray, float, Status]:
        """Solve H x = b on the range of H, for b (n, d): ``(x, relative residual, status)``.

        Args:
          rtol: relative residual. With a factor the solution is refined to round-off, and is
            converged at a residual of 1e-10, or ``rtol`` where that is larger.
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
        """Solve H x = b by the factor, for the columns b of a matrix (m, c).

        The status is INDEFINITE where H has a negative eigenvalue and the system should be a
        minimum, and NOT_A_SADDLE where a saddle has more or fewer of them than its order, whatever
        the right-hand side.

        Args:
          columns: right-hand sides.
          rtol: largest relative residual of a converged solution.
          to: relative residual to which the solution is refined.

        Returns:
          ``(x, stats)``, x (m, c) and the statistics (members, c); ``iterations`` counts the
          refinements, with one product each.
        """
        assert self.matrix is not None and self.factor is not None
        eps = float(jnp.finfo(self.system.positions.dtype).eps)  # the precision of the projections

        def norms(matrix: np.ndarray) -> np.ndarray:
            """Norm of each column of each member, (members, c)."""
            by_member = matrix.reshape(self.members, -1, matrix.shape[1])
            return np.asarray(np.linalg.norm(by_member, axis=1))

        whole = norms(columns)
        in_range = self.project(columns)
        share = norms(in_range) / np.where(whole > 0, whole, 1.0)
        dropped = norms(columns - in_range) / np.where(whole > 0, whole, 1.0)
        # A part in the range below 8 eps of the column is round-off: its solution would be noise.
        rows = len(in_range) // self.members
        in_range = np.where(np.repeat(share > 8 * eps, rows, axis=0), in_range, 0.0)
        x, residual, rounds = solve_on_range(
            self.matrix, self.factor, self.project, in_range, min(rtol, to), self.members
        )
        status = np.where(
            dropped > eps**0.5, Status.NULL_COMPONENT_DROPPED.value, Status.CONVERGED.value
        )
        # the residual that the rounding of x alone leaves
        size = norms(in_range)
        scale = self._bounds[:, None]
        floor = eps * np.maximum(100.0, 4.0 * scale * norms(x) / np.where(size > 0, size, 1.0))
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
            np.isfinite(whole) & np.isfinite(norms(x)), status, Status.NOT_FINITE.value
        )
        # numpy arrays here, where the solvers on the device give jax arrays
        numbers: tuple[Any, Any, Any, Any] = (status.astype(np.int32), residual, rounds, dropped)
        return x, SolveStats(*numbers, "sparse factor")

    def _precondition(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """Return the preconditioner: the inverse of each particle's diagonal block, made positive.

        None where H is not assembled.
        """
        if self.matrix is None:
            return None
        n, d = self.system.positions.shape
        scaling, _ = block_cholesky(self.matrix.tobsr((d, d)))
        inverse = np.einsum("kin,kjn->nij", scaling, scaling)
        return lambda v: np.einsum("nij,njk->nik", inverse, v.reshape(n, d, -1)).reshape(v.shape)

    def lowest(self, k: int = 1, floor: float = 0.0) -> Spectrum:
        """Compute the k lowest modes outside the null space.

        Args:
          floor: a stiffness below this may be of either sign.
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
        """Count the negative eigenvalues.

        Args:
          most: number of the lowest eigenvalues to compute where no factor counts the negative
            ones.
        """
        count = -1 if self.factor is None else int(self.negative[0])
        return count if count >= 0 else self.lowest(most).negative

    def negative_mode(self, floor: float = 0.0) -> tuple[float, np.ndarray] | None:
        """Search a mode of negative stiffness: (stiffness, mode (n, d) of norm one), or None.

        The search uses the factor where there is one, and then misses no such mode; for a small
        system, all eigenvalues; else Lanczos' method, which may miss a mode whose stiffness is
        small beside that of the others.

        Args:
          floor: a stiffness below this may be of either sign.
        """
        n, d = self.system.positions.shape
        pays = d == 2 or n <= ONE_SOLVE_3D
        count = int(self.negative[0]) if pays and self.factor is not None else -1
        if count == 0:
            return None
        if count > 0 or n * d <= ALL_MODES:
            spectrum = self.lowest(1, floor)
            if not spectrum.negative:
                return None
            return float(spectrum.values[0]), spectrum.vectors[:, 0].reshape(n, d)
        dtype = self.system.positions.dtype
        # a fixed seed: the same start in every run
        start = np.random.default_rng(0).standard_normal(n * d).astype(dtype)
        # The Lanczos vectors are not stored. A first run gives the tridiagonal matrix, whose lowest
        # eigenvector holds the weights with which a second run sums them.
        weights = np.zeros(LANCZOS_STEPS, dtype)
        diagonal, off_diagonal, *_ = _lanczos(self.system, self.null, start, weights)
        diagonal = np.asarray(diagonal, float)
        off_diagonal = np.asarray(off_diagonal, float)
        if not (np.isfinite(diagonal).all() and np.isfinite(off_diagonal).all()):
            return None
        values, vectors = scipy.linalg.eigh_tridiagonal(diagonal, off_diagonal[:-1])
        if not values[0] < -max(NEGATIVE * values[-1], floor):
            return None
        *_, vector, image = _lanczos(self.system, self.null, start, vectors[:, 0].astype(dtype))
        vector = np.asarray(vector, float)
        image = np.asarray(image, float)
        value = float(vector @ image / (vector @ vector))
        if not value < -floor:
            return None
        return value, (vector / np.linalg.norm(vector)).reshape(n, d)

    def below(self, value: float) -> int | None:
        """Count the modes outside the null space with a stiffness below ``value`` > 0.

        The count is the number of negative eigenvalues of H - value, less the null space. None
        where there is no factor that gives this number.
        """
        if self.matrix is None or not self._factorize:
            return None
        try:
            negative = SparseFactor(self.matrix, -value, self.order).negative
        except RuntimeError:  # singular: ``value`` is an eigenvalue, to the last digit
            return None
        if negative is None:
            return None
        return negative - sum(self.null.dimensions(self.system.dimension))


def participation(vectors: np.ndarray, dimension: int) -> np.ndarray:
    """Compute the participation ratio of modes, (sum_i |e_i|^2)^2 / (n sum_i |e_i|^4), (k,).

    1 where all particles move by the same distance, 1/n where a single particle moves.

    Args:
      vectors: (n d, k) modes in columns.
      dimension: d.
    """
    n = vectors.shape[0] // dimension
    squares = np.sum(vectors.reshape(n, dimension, vectors.shape[1]) ** 2, axis=1)
    return np.sum(squares, axis=0) ** 2 / (squares.shape[0] * np.sum(squares**2, axis=0))
