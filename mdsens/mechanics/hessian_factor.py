"""This module solves linear systems with the Hessian of one configuration, and finds its modes.

The Hessian is assembled as a matrix of scipy, and factorized where this is faster than an iterative
solver.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse as sp

from mdsens._util.compilation import compiled
from mdsens.implicit.linear import Auto, eigen
from mdsens.implicit.linear.block_cg import block_cg
from mdsens.implicit.linear.eigen import Iteration, Spectrum
from mdsens.implicit.linear.factor_estimate import FactorEstimate
from mdsens.implicit.linear.result import SolveStats
from mdsens.implicit.linear.solution import solve
from mdsens.implicit.linear.sparse_ldl import SHIFT, SparseFactor, bounds, ordering, solve_on_range
from mdsens.mechanics.hessian import assembles, hessian_operator, sparse_hessian
from mdsens.mechanics.hessian_blocks import BlockRows, block_cholesky
from mdsens.mechanics.null_space import NullSpace
from mdsens.mechanics.status import Status
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.system import System

__all__ = ["HessianFactor", "factor_of", "factorizes", "participation"]

# Largest number of particles in 3-D for which the Hessian is factorized. The factor of a sparse
# matrix is less sparse than the matrix; in 3-D its time is proportional to n^2: 13 s at 8,192
# particles, where a solve by CG takes 1 s.
FACTOR_PARTICLES_3D = 4000
# Longest estimated time of a factor in 3-D, in seconds. 4,000 spheres in contact stay below it, and
# 1,400 atoms of a Kob-Andersen glass, with 76 neighbors each. A factor of 2,000 of these takes 4 s,
# where a solve by CG takes 0.4 s and a whole certificate without a factor 4 s.
FACTOR_SECONDS = 2.0
# Largest number of particles in 3-D for which a factor pays for a single solve. At 2,000 spheres a
# factor takes 0.27 s, one solve by CG 0.07 s, and 0.15 s at a pressure of 4e-4.
ONE_SOLVE_3D = 1500
# Columns that block conjugate gradients solve for together, at most.
COLUMNS = 16
# Relative residual of the solves that make the start vectors of LOBPCG soft. In 20,000 spheres the
# softest mode then takes 490 products and 120 of these solves, and 710 and 40 at 0.1.
SOFTENED = 1e-2
# Longest estimated time of a factor in 3-D that is made to search for a single negative mode, in
# seconds. Lanczos' method, which may miss one, takes 0.05 s for 1,500 spheres.
SEARCH_SECONDS = 0.5
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
    """Return whether the Hessian of a system is assembled and factorized.

    This is done where the Hessian is assembled, see :func:`mdsens.mechanics.hessian.assembles`, in
    double precision, in 2-D for any number of particles. In 3-D it is done up to 4,000 particles
    (the constant ``FACTOR_PARTICLES_3D`` of this module), where the time of a factor is estimated
    at most at ``FACTOR_SECONDS``.
    """
    if not assembles(system) or system.positions.dtype != jnp.float64:
        return False
    if system.dimension == 2:
        return True
    return system.n <= FACTOR_PARTICLES_3D and factor_of(system).seconds <= FACTOR_SECONDS


def factor_of(system: System) -> FactorEstimate:
    """Estimate the cost of a factor of the Hessian of a system, from its neighbor list.

    The list is that of the system, or of each system of a batch. The pairs within the range are
    those of the list, less the share of the skin. An energy of atoms in their surroundings couples
    atoms within twice the range.
    """
    rows = np.asarray(system.neighbors.rows)
    listed = np.count_nonzero(rows < system.n) / max(rows.size // max(rows.shape[-2], 1), 1)
    range_ = float(np.max(np.asarray(system.range)))
    skin = float(np.max(np.asarray(system.neighbors.skin)))
    reach = 1.0 if system.potential.pairwise else 2.0
    # the list of all pairs has a skin without end, and all of its pairs count
    share = (range_ / (range_ + skin)) ** system.dimension if np.isfinite(skin) else 1.0
    near = min(listed * share * reach**system.dimension, system.n - 1.0)
    return FactorEstimate.of(system.n, system.dimension, near)


@compiled
def _products(system: System, null: NullSpace, columns: jax.Array) -> jax.Array:
    """Multiply the Hessian of the system by each of the c columns of a matrix (n d, c)."""
    operator = hessian_operator(system, null)
    n, d = system.positions.shape

    def product(v: jax.Array) -> jax.Array:
        return operator.matvec(Unknowns(v.reshape(n, d))).positions.ravel()

    # 32 columns at a time, which bounds the memory
    return jax.lax.map(product, columns.T, batch_size=min(32, columns.shape[1])).T


@compiled(static_argnames=("rtol", "definite"), loops=True)
def _solve(
    system: System,
    null: NullSpace,
    blocks: BlockRows | None,
    b: jax.Array,
    rtol: float,
    definite: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Solve H x = b for the displacements x by an iterative method, with the Hessian H.

    Args:
      null: the null space of H.
      blocks: H assembled as blocks of pairs; None where it is not assembled.
      b: (n, d) right-hand side.
      rtol: relative residual at which the method stops.
      definite: whether H is positive semidefinite, as at a minimum.

    Returns:
      (x, relative residual, status), with x (n, d).
    """
    x, stats = solve(hessian_operator(system, null, blocks, definite), Unknowns(b), Auto(rtol=rtol))
    return x.positions, stats.residual, stats.status


@compiled(loops=True)
def _lanczos(
    system: System,
    null: NullSpace,
    start: jax.Array,
    weights: jax.Array,
) -> tuple[jax.Array, ...]:
    """Run Lanczos' method on the Hessian H of the system, with the null space of H projected out.

    Args:
      null: the null space of H.
      start: (n d,) first vector.
      weights: (steps,) coefficients of a sum of the Lanczos vectors, one for each step of the
        method.

    Returns:
      the diagonal and off-diagonal of the tridiagonal matrix, and the sum of the Lanczos vectors.
    """
    operator = hessian_operator(system, null)

    def apply(v: jax.Array) -> jax.Array:
        product = operator.matvec(null.project(Unknowns(v.reshape(system.positions.shape))))
        return null.project(product).positions.ravel()

    begin = null.project(Unknowns(start.reshape(system.positions.shape))).positions.ravel()
    return eigen.lanczos(apply, begin, weights)


class HessianFactor:
    """The Hessian H of a backbone with its null space projected out, and its factor if that pays.

    H is factorized where this makes solves faster.

    Args:
      system: the backbone (the system without the contacts of rattlers); or a batch of systems,
        where H has a diagonal block for each system. For a batch, vectors and matrices have the
        rows of all systems one after the other, and only ``project``, ``solve_many`` and
        ``negative`` are available.
      null: the null space of H, simplified by its method ``simplified``.
      index: the expected number of negative eigenvalues of H: 0 at a minimum, the order of a
        saddle.
    """

    _factors = ("factor",)  # attributes that a pickled copy computes again

    def __init__(self, system: System, null: NullSpace, index: int = 0):
        self.system = system
        self.null = null
        self.index = index
        self.members = system.batch or 1
        self._factorize = factorizes(system)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for a pickled copy, without the factors of the Hessian.

        Factors are in the memory of other libraries. A copy factorizes the Hessian again at its
        first solve.
        """
        return {name: value for name, value in vars(self).items() if name not in self._factors}

    @functools.cached_property
    def matrix(self) -> Any:
        """The Hessian as a scipy sparse matrix; None if the potential is not a sum over pairs."""
        return sparse_hessian(self.system)

    @functools.cached_property
    def blocks(self) -> BlockRows | None:
        """The Hessian as (d, d) blocks of pairs, for products in JAX; None if not assembled."""
        if self.matrix is None:
            return None
        return BlockRows.of(self.matrix, self.system.dimension, self.system.positions.dtype)

    @functools.cached_property
    def order(self) -> np.ndarray | None:
        """The order of the rows of the Hessian in which its factor is sparse.

        The value is None where the order is left to the minimum degree algorithm of the
        factorization.
        """
        return ordering(self.matrix, self.system.dimension)

    @functools.cached_property
    def factor(self) -> SparseFactor | None:
        """Sparse factor of the Hessian, made regular by springs or a shift on the diagonal.

        The value is None where the Hessian is not factorized, and where the matrix is exactly
        singular in spite of the springs or the shift.
        """
        if self.matrix is None or not self._factorize:
            return None
        try:
            return SparseFactor(self.matrix, self._diagonal_springs(), self.order)
        except RuntimeError:  # exactly singular, in spite of the springs
            return None

    @functools.cached_property
    def _bounds(self) -> np.ndarray:
        """The largest row sum of |H| for each system of a batch, (systems,), H being the Hessian.

        The sum is an upper bound of the eigenvalues of H.
        """
        return bounds(self.matrix, self.members)

    def _diagonal_springs(self) -> np.ndarray:
        """Compute stiffnesses (m,) that are added to the diagonal of the Hessian to factorize it.

        m is the number of rows of the Hessian. Where no cluster of particles can rotate, the
        stiffnesses are springs on the rattlers and on one particle of each cluster. For a
        right-hand side without a component in the null space, these springs change the solution
        only by a vector of the null space. Where a cluster can rotate, the stiffnesses are a small
        shift of the whole diagonal.
        """
        scale = np.where(self._bounds > 0, self._bounds, 1.0)[:, None]
        null = self.null
        if null.motions is not None or null.arms is not None:
            # one shift for each system of the batch, repeated for all of its rows
            return np.repeat(SHIFT * scale, self.matrix.shape[0] // self.members)
        rattlers = np.asarray(null.rattlers)
        first = np.argmin(rattlers, axis=-1)[..., None]  # the first particle that is no rattler
        if null.labels is None:
            labels = np.broadcast_to(first, rattlers.shape)
        else:
            labels = np.asarray(null.labels)
        # a cluster is named by one of its particles, which gets the spring
        # the springs are as stiff as the Hessian: weak ones would cost digits of the solution
        has_spring = rattlers | (labels == np.arange(labels.shape[-1]))
        return np.repeat(np.where(has_spring, scale, 0.0).ravel(), self.system.dimension)

    def project(self, columns: np.ndarray) -> np.ndarray:
        """Project the null space of the Hessian out of a vector (m,), or out of the columns (m, c).

        m is the number of rows of the Hessian, and c that of the columns of a matrix.
        """
        matrix = columns.reshape(columns.shape[0], -1)
        return self.null.project_columns(matrix).reshape(columns.shape)

    def products(self, columns: np.ndarray) -> np.ndarray:
        """Multiply the Hessian (m, m) by the c columns of a matrix (m, c)."""
        if self.matrix is not None:
            return self.matrix @ columns
        return np.asarray(_products(self.system, self.null, columns))

    @property
    def negative(self) -> np.ndarray:
        """Number of negative eigenvalues of the Hessian for each system of a batch, (systems,).

        The number follows from the signs of the pivots of the factor; it is -1 where the pivots are
        not known.
        """
        assert self.factor is not None  # callers look at ``factor`` first
        return self.factor.negatives(self.members)

    def solve(self, b: np.ndarray, rtol: float = 1e-12) -> tuple[np.ndarray, float, Status]:
        """Solve H x = b for displacements x, with the null space of the Hessian H projected out.

        Args:
          b: (n, d) right-hand side.
          rtol: relative residual. Where H is factorized, the solution is refined to round-off, and
            counts as converged at a residual of 1e-10, or ``rtol`` where that is larger.

        Returns:
          (x, relative residual, status), with x (n, d).
        """
        if self.factor is not None:
            x, stats = self.solve_many(
                np.asarray(b, float).reshape(-1, 1), max(rtol, 1e-10), to=1e-15
            )
            return x.reshape(b.shape), float(stats.residual[0, 0]), Status(int(stats.status[0, 0]))
        # at a saddle, index > 0, the solver must not be told that H is positive semidefinite
        x, residual, code = _solve(self.system, self.null, self.blocks, b, rtol, not self.index)
        return np.asarray(x), float(residual), Status(int(code))

    def solve_many(
        self, columns: np.ndarray, rtol: float, to: float = 1e-12
    ) -> tuple[np.ndarray, SolveStats]:
        """Solve H x = b for the columns b of a matrix (m, c), with the Hessian H.

        The columns are solved for by the factor of H, or by block conjugate gradients where the
        assembled H of one system is not factorized.

        The status is INDEFINITE where H has a negative eigenvalue and the system should be a
        minimum. It is NOT_A_SADDLE where the system should be a saddle and the number of negative
        eigenvalues is not the order of the saddle. Both are for right-hand sides with a part off
        the null space: without one the solution is zero in any case.

        Args:
          columns: (m, c) right-hand sides.
          rtol: largest relative residual of a converged solution.
          to: relative residual to which the solution is refined, where H is factorized.

        Returns:
          ``(x, stats)``: the solutions x (m, c), and statistics whose entries are (systems, c), for
            each system of a batch; ``iterations`` counts the refinements, with one product each,
            or the products of block conjugate gradients.
        """
        assert self.matrix is not None
        eps = float(jnp.finfo(self.system.positions.dtype).eps)  # the precision of the projections

        def norms(matrix: np.ndarray) -> np.ndarray:
            """Compute the norm of each of c columns, for each system of a batch, (systems, c)."""
            by_member = matrix.reshape(self.members, -1, matrix.shape[1])
            return np.asarray(np.linalg.norm(by_member, axis=1))

        whole = norms(columns)
        in_range = self.project(columns)
        share = norms(in_range) / np.where(whole > 0, whole, 1.0)
        dropped = norms(columns - in_range) / np.where(whole > 0, whole, 1.0)
        # A part in the range below 8 eps of the column is round-off: its solution would be noise.
        rows = len(in_range) // self.members
        # A NaN compares as False: its column is zero from here on, and its status NOT_FINITE.
        in_range = np.where(np.repeat(share > 8 * eps, rows, axis=0), in_range, 0.0)
        negative = self.index
        if self.factor is None:
            x, residual, rounds, curved = self._solve_in_blocks(in_range, rtol)
            negative = max(negative, int(curved))
            solver = "block CG"
        else:
            x, residual, rounds = solve_on_range(
                self.matrix, self.factor, self.project, in_range, min(rtol, to), self.members
            )
            negative = self.negative
            solver = "sparse factor"
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
            np.reshape(negative != self.index, (-1, 1)) & (share > 8 * eps), wrong.value, status
        )
        status = np.where(
            np.isfinite(whole) & np.isfinite(norms(x)), status, Status.NOT_FINITE.value
        )
        # numpy arrays here, where the solvers on the device give jax arrays
        numbers: tuple[Any, Any, Any, Any] = (status.astype(np.int32), residual, rounds, dropped)
        return x, SolveStats(*numbers, solver)

    def _solve_in_blocks(
        self, b: np.ndarray, rtol: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
        """Solve H x = b by block conjugate gradients, for columns b (m, c) in the range of H.

        The components of each particle are scaled, so that its diagonal block of the Hessian is the
        identity.

        Returns:
          (x (m, c), relative residuals (1, c), products (1, c), whether H has a negative curvature)
        """
        n, d = self.system.positions.shape
        blocks = np.ascontiguousarray(np.moveaxis(self._block_scaling, -1, 0))
        scaling = sp.bsr_array((blocks, np.arange(n), np.arange(n + 1)), shape=(n * d, n * d))
        x = np.zeros_like(b)
        residual = np.zeros(b.shape[1])
        products = np.zeros(b.shape[1], np.int32)
        negative = False
        for start in range(0, b.shape[1], COLUMNS):
            some = slice(start, start + COLUMNS)
            answer = block_cg(
                lambda v: self.matrix @ v,
                b[:, some],
                rtol,
                max(1000, 10 * n * d),
                scaling.tocsr(),
                self.project,
            )
            x[:, some] = answer.x
            residual[some] = answer.residual
            products[some] = answer.products
            negative = negative or answer.negative
        return x, residual[None], products[None], negative

    @functools.cached_property
    def _block_scaling(self) -> np.ndarray:
        """S of each particle, (d, d, n), which makes its block of S H S^T the identity."""
        d = self.system.dimension
        return block_cholesky(self.matrix.tobsr((d, d)))[0]

    def _precondition(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """Return a preconditioner, a function of vectors; None where the Hessian is not assembled.

        The function multiplies the components of each particle by the inverse of its diagonal block
        of the Hessian; the block is made positive where it is not.
        """
        if self.matrix is None:
            return None
        n, d = self.system.positions.shape
        scaling = self._block_scaling
        # D^-1 = S^T S for the block D of each particle, (n, d, d)
        inverse = np.einsum("kin,kjn->nij", scaling, scaling)
        return lambda v: np.einsum("nij,njk->nik", inverse, v.reshape(n, d, -1)).reshape(v.shape)

    def _soften(self, columns: np.ndarray) -> np.ndarray:
        """Solve H x = b to two digits for columns b (m, c), for vectors of soft modes mostly."""
        return self._solve_in_blocks(columns, SOFTENED)[0]

    def lowest(self, k: int = 1, floor: float = 0.0, accuracy: float = 1e-4) -> Spectrum:
        """Compute the k modes of the Hessian with the lowest eigenvalues, outside its null space.

        Args:
          k: number of modes.
          floor: the sign of an eigenvalue is not known where its absolute value is below ``floor``.
          accuracy: residual of a mode in units of the lowest eigenvalue, where the Hessian is not
            factorized.
        """
        iteration = Iteration(
            self._precondition(), None if self.matrix is None else self._soften, accuracy
        )
        return eigen.lowest(
            self.products,
            self.system.positions.size,
            k,
            project=self.project,
            null=sum(self.null.dimensions(self.system.dimension)),
            matrix=self.matrix if self._factorize else None,
            order=self.order if self._factorize and self.matrix is not None else None,
            iteration=iteration,
            dtype=self.system.positions.dtype,
            floor=floor,
        )

    def unstable(self, most: int) -> int:
        """Count the negative eigenvalues of the Hessian.

        Args:
          most: number of the lowest eigenvalues that are computed where no factor of the Hessian
            gives the count.
        """
        count = -1 if self.factor is None else int(self.negative[0])
        return count if count >= 0 else self.lowest(most).negative

    def negative_mode(self, floor: float = 0.0) -> tuple[float, np.ndarray] | None:
        """Search for a mode of the Hessian with a negative stiffness (eigenvalue).

        Where the Hessian is factorized, the search counts negative eigenvalues by the factor, and
        misses no such mode. Otherwise, all eigenvalues of a small system are computed. For a larger
        system Lanczos' method is used, which may miss a mode whose stiffness is small beside that
        of other modes.

        Args:
          floor: the sign of a stiffness is not known where its absolute value is below ``floor``.

        Returns:
          (stiffness, mode), with the mode (n, d) of norm one; None where no such mode is found.
        """
        n, d = self.system.positions.shape
        pays = d == 2 or factor_of(self.system).seconds <= SEARCH_SECONDS
        count = int(self.negative[0]) if pays and self.factor is not None else -1
        if count == 0:
            return None
        if count > 0 or n * d <= ALL_MODES:
            spectrum = self.lowest(1, floor)
            if not spectrum.negative:
                return None
            return float(spectrum.values[0]), spectrum.vectors[:, 0].reshape(n, d)
        return self._search_by_lanczos(floor)

    def _search_by_lanczos(self, floor: float) -> tuple[float, np.ndarray] | None:
        """Search for a mode with a negative stiffness by Lanczos' method, as ``negative_mode``."""
        n, d = self.system.positions.shape
        # a fixed seed: the same start in every run
        start = np.random.default_rng(0).standard_normal(n * d)
        if self.matrix is None:
            found = self._lanczos_on_device(start.astype(self.system.positions.dtype))
        else:
            found = eigen.lanczos_lowest(self._in_range, self.project(start), LANCZOS_STEPS)
        if found is None:
            return None
        values, lowest_vector = found
        if not values[0] < -max(NEGATIVE * values[-1], floor):
            return None
        vector = lowest_vector()
        # a Rayleigh quotient: above the lowest stiffness, however inaccurate the vector is
        value = float(vector @ self._in_range(vector) / (vector @ vector))
        if not value < -floor:
            return None
        return value, (vector / np.linalg.norm(vector)).reshape(n, d)

    def _in_range(self, v: np.ndarray) -> np.ndarray:
        """Multiply the Hessian, with its null space projected out, by a vector (m,)."""
        return self.project(self.products(self.project(v)[:, None])[:, 0])

    def _lanczos_on_device(
        self, start: np.ndarray
    ) -> tuple[np.ndarray, Callable[[], np.ndarray]] | None:
        """Run Lanczos' method in compiled code, as :func:`eigen.lanczos_lowest` on the host."""
        # The Lanczos vectors are not stored. A first run gives the tridiagonal matrix, whose lowest
        # eigenvector holds the weights with which a second run sums them.
        weights = np.zeros(LANCZOS_STEPS, start.dtype)
        diagonal, off_diagonal, _ = _lanczos(self.system, self.null, start, weights)
        diagonal = np.asarray(diagonal, float)
        off_diagonal = np.asarray(off_diagonal, float)
        if not (np.isfinite(diagonal).all() and np.isfinite(off_diagonal).all()):
            return None
        # the last entry would couple the last Lanczos vector to one that was not used
        values, vectors = scipy.linalg.eigh_tridiagonal(diagonal, off_diagonal[:-1])
        weights = vectors[:, 0].astype(start.dtype)
        return values, lambda: np.asarray(
            _lanczos(self.system, self.null, start, weights)[2], float
        )

    def below(self, value: float) -> int | None:
        """Count the modes whose stiffness, an eigenvalue of the Hessian, is below ``value`` > 0.

        The null space of the Hessian H is not counted: the count is the number of negative
        eigenvalues of H - ``value``, minus the dimension of the null space. The result is None
        where no factor of H - ``value`` gives this number.
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
    """Compute the participation ratio (sum_i |e_i|^2)^2 / (n sum_i |e_i|^4) of k modes, (k,).

    e_i is the displacement of particle i in a mode, and n the number of particles. The ratio is 1
    where all particles move by the same distance, 1/n where a single particle moves.

    Args:
      vectors: (n d, k) modes in columns.
      dimension: the dimension d of space.
    """
    n = vectors.shape[0] // dimension
    squares = np.sum(vectors.reshape(n, dimension, vectors.shape[1]) ** 2, axis=1)
    return np.sum(squares, axis=0) ** 2 / (squares.shape[0] * np.sum(squares**2, axis=0))
