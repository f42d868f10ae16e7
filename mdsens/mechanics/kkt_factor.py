"""This module solves the linear system for the response of a constrained minimum, by scipy.

    [ H_L  A^T ] [ dx      ]   [ -d2L/dx dp . dp ]
    [ A    0   ] [ dlambda ] = [ -dg/dp . dp     ]

    H_L = d2L/dx2,  A = dg/dx,  L = U + lambda . g

U is the energy, and g = 0 are the equations of the constraints, with multipliers lambda. dp is the
change of the parameters p. x are the positions, and the parameters that relax with them. Only
coordinates of x that are free are unknowns; those that are pinned or at a bound have no row. The
matrix is symmetric, and indefinite where there are equations. The minimum is stable where H_L is
positive on the tangent space of the equations, A v = 0. Source: Nocedal and Wright, Numerical
Optimization, 2006, sections 12.3 and 16.1.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jax.flatten_util import ravel_pytree
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import splu

from mdsens._util.compilation import compiled
from mdsens.constraints import RigidBonds
from mdsens.implicit.linear import Auto, eigen
from mdsens.implicit.linear.eigen import Iteration, Spectrum
from mdsens.implicit.linear.result import SolveStats
from mdsens.implicit.linear.solution import solve
from mdsens.implicit.linear.sparse_ldl import SHIFT, SparseFactor, bound
from mdsens.mechanics.hessian import assembles, sparse_hessian
from mdsens.mechanics.hessian_factor import HessianFactor
from mdsens.mechanics.kkt_operator import kkt_operator
from mdsens.mechanics.lagrangian import relaxed, unknowns_of
from mdsens.mechanics.null_space import NullSpace
from mdsens.mechanics.status import Status
from mdsens.mechanics.units import natural_units
from mdsens.mechanics.unknowns import Unknowns, flat, scaled, unflat
from mdsens.model.system import System, displacement_in

__all__ = ["KKT"]

# Largest number of unknowns for which the matrix is written out where its sparsity is not known.
DENSE = 2500
# Rows of A, one for each equation, that are computed together and then stored as a sparse matrix.
ROWS = 32
# A singular value of A below this part of the largest one is zero: its equation repeats others.
# Some equations repeat others in a single configuration only, as the bonds of a chain drawn
# straight; there the configuration is accurate to a root of round-off.
REPEATED = 1e-7
# Stiffness of A^T A, in units of |H|, where the inertia of H_L on the tangent space is computed:
# changes that violate the equations get a positive stiffness far above that of the potential.
STIFF = 1e6


@compiled
def _dense_matrix(system: System, x: Unknowns, null: NullSpace) -> jax.Array:
    """Compute the dense matrix of the linear system at a constrained minimum.

    Rows and columns are in the order: positions, relaxed parameters, multipliers.
    """
    operator, _ = kkt_operator(system, x, null)
    vector, unravel = ravel_pytree(x)

    def column(e: jax.Array) -> jax.Array:
        return ravel_pytree(operator.matvec(unravel(e)))[0]

    identity = jnp.eye(vector.size, dtype=vector.dtype)
    # 32 columns at a time, which bounds the memory
    return jax.lax.map(column, identity, batch_size=min(32, vector.size))


def _block_diagonal(blocks: np.ndarray) -> sp.bsr_array:
    """Return the sparse matrix (m p, m q) with the given blocks (m, p, q) on its diagonal."""
    m, p, q = blocks.shape
    return sp.bsr_array((blocks, np.arange(m), np.arange(m + 1)), (m * p, m * q))


class _Factor:
    """LU factor of the linear system at a constrained minimum, regularized by a shift and a border.

    The shift is a small change of the diagonal. The border consists of a row and a column for each
    rigid motion without stiffness. So the factorized matrix is regular also where equations are
    redundant, or motions cost no energy. H_L is the Hessian of the Lagrangian, the upper left block
    of the matrix.

    Args:
      matrix: the matrix of the linear system, sparse, (m, m).
      motions: (k, n, d) rigid motions of the n particles without stiffness.
      primal: number of unknowns that are no multipliers.
      shift: number added to the diagonal of H_L.
      scale: a bound of the eigenvalues of H_L. A tiny part of it, 1e-9, is added to the diagonal
        of H_L too, and subtracted on the diagonal of the multipliers.
    """

    def __init__(
        self, matrix: sp.csr_array, motions: np.ndarray, primal: int, shift: float, scale: float
    ):
        self.size = len(matrix.indptr) - 1
        small_shift = SHIFT * scale
        # With opposite signs the matrix is regular where H_L is positive semi-definite, for any
        # equations.
        diagonal = np.full(self.size, -small_shift)
        diagonal[:primal] = shift + small_shift
        whole = matrix + sp.diags_array(diagonal)
        if len(motions):
            rows = motions.reshape(len(motions), -1)
            # zeros for relaxed parameters and multipliers, which a rigid motion does not change
            padding = [(0, 0), (0, self.size - rows.shape[1])]
            border = sp.csr_array(scale * np.pad(rows, padding))
            whole = sp.block_array([[whole, border.T], [border, None]])
        # LU with row exchanges: the border has zeros on the diagonal, and the matrix is indefinite
        self._lu = splu(sp.csc_array(whole))

    def apply(self, b: np.ndarray) -> np.ndarray:
        """Solve the factorized linear system for a right-hand side (m,), or for c of them, (m, c).

        In the rows of the border, which regularize the matrix, the right-hand side is zero.
        """
        more = self._lu.shape[0] - self.size
        padded = np.pad(b, [(0, more), *[(0, 0)] * (b.ndim - 1)])
        return self._lu.solve(np.ascontiguousarray(padded))[: self.size]


def _has_known_sparsity(system: System, x: Unknowns) -> bool:
    """Return whether the matrix for the response of a constrained minimum is assembled as sparse.

    The sparse matrix is assembled only for pair potentials with rigid bonds: other equations, and
    relaxed parameters, may couple any unknowns.
    """
    with_equations = [c for c in system.constraints if c.name in (x.multipliers or {})]
    return (
        assembles(system)
        and not relaxed(system)
        and all(isinstance(c, RigidBonds) for c in with_equations)
    )


class KKT(HessianFactor):
    """The linear system for the response of a constrained minimum (Karush, Kuhn and Tucker).

    The unknowns are the positions of the particles, the parameters that relax with them, and the
    multipliers of the equations; vectors and the matrix have them in this order. There the
    multipliers are in units of the attribute ``unit``.

    Attributes:
      x: the unknowns at the minimum.
      unit: the stiffness of the potential, see ``natural_units``.
      primal: number of unknowns that are no multipliers.
      size: number m of all unknowns.
      moves: (m,) True for unknowns that are free: not fixed by a constraint, and not of a rattler.

    Args:
      system: the backbone (the system without the contacts of rattlers).
      null: the null space, from :func:`constrained_null_space`.
      multipliers: multipliers of the equations, by constraint name.
    """

    _factors = ("factor", "_normal")

    def __init__(self, system: System, null: NullSpace, multipliers: dict[str, jax.Array] | None):
        super().__init__(system, null)
        self.x = unknowns_of(system, multipliers)
        self.unit = float(natural_units(system)[1])
        self.primal = system.positions.size + sum(v.size for v in jax.tree.leaves(self.x.params))
        self.size = flat(self.x).size
        self._sparse = _has_known_sparsity(system, self.x)
        small = (self._sparse and self._factorize) or self.size <= DENSE
        self._factorize = system.positions.dtype == jnp.float64 and small
        free = null.free(jax.tree.map(jnp.ones_like, self.x))
        of_rattlers = np.repeat(np.asarray(null.rattlers), system.dimension)
        self.moves = flat(free) > 0
        # the positions come first in ``flat``
        self.moves[: of_rattlers.size] &= ~of_rattlers

    @functools.cached_property
    def matrix(self) -> Any:
        """Sparse matrix (m, m) of the linear system at a constrained minimum.

        The value is None where the matrix would be dense and is not factorized, since it is too
        large or in single precision.

        An unknown that is fixed (by a constraint, or as the coordinate of a rattler) has a row with
        a diagonal entry only: a bound of the eigenvalues of the Hessian of the Lagrangian.
        """
        if not self._factorize and not self._sparse:
            return None
        if self._sparse:
            whole = self._assembled()
        else:
            whole = sp.csr_array(np.asarray(_dense_matrix(self.system, self.x, self.null)))
        free = sp.diags_array(self.moves.astype(float))
        free_part = free @ whole @ free
        scale = bound(free_part[: self.primal, : self.primal].tocsr()) or 1.0
        return (free_part + sp.diags_array(np.where(self.moves, 0.0, scale))).tocsr()

    def _assembled(self) -> Any:
        """Assemble the sparse matrix of the linear system for a pair potential with rigid bonds.

        A bond of length r between particles i and j, along the unit vector e and with tension t,
        adds (t / r) (1 - e e^T) to the second derivative of the Lagrangian L by the vector R_i -
        R_j. The bond also adds one row to the derivative A of the constraint equations: the
        derivative of its length, which is e by R_i and -e by R_j.
        """
        system = self.system
        n = system.n
        d = system.dimension
        hessian = sparse_hessian(system)
        assert hessian is not None
        rows: list[Any] = []
        by_name = {c.name: c for c in system.constraints}
        # sorted, as jax sorts the keys of a dict: the rows of A stand in the order of ``flat``
        for name, tensions in sorted((self.x.multipliers or {}).items()):
            c = by_name[name]
            assert isinstance(c, RigidBonds)
            i, j = np.asarray(c.bonds).T
            displacement = displacement_in(system, system.box)
            apart = np.asarray(displacement(system.positions[i], system.positions[j]), float)
            r = np.linalg.norm(apart, axis=1)
            along = apart / r[:, None]
            # the matrix of R -> R_i - R_j for all bonds, (bonds d, n d)
            components = np.arange(len(r) * d)
            of_i = (d * i[:, None] + np.arange(d)).ravel()
            of_j = (d * j[:, None] + np.arange(d)).ravel()
            ones = np.ones(components.size)
            shape = (components.size, n * d)
            positions_i = sp.csr_array((ones, (components, of_i)), shape)
            positions_j = sp.csr_array((ones, (components, of_j)), shape)
            difference = positions_i - positions_j
            stiffness = (np.asarray(tensions, float) / r)[:, None, None]
            across = stiffness * (np.eye(d) - along[:, :, None] * along[:, None, :])
            hessian = hessian + difference.T @ _block_diagonal(across) @ difference
            rows.append(_block_diagonal(along[:, None, :]) @ difference)
        if not rows:
            return hessian.tocsr()
        # multipliers in units of the stiffness: A and A^T get one factor, and K stays symmetric
        A = self.unit * sp.vstack(rows)
        return sp.block_array([[hessian, A.T], [A, None]]).tocsr()

    @functools.cached_property
    def _bounds(self) -> np.ndarray:
        """An upper bound of the eigenvalues of the matrix at a constrained minimum, (1,).

        This is the matrix of the linear system for the response of the minimum.
        """
        return np.array([bound(self.matrix)])

    @functools.cached_property
    def factor(self) -> Any:
        """Factor of the linear system at a constrained minimum.

        The value is None where the matrix is not factorized, and where it is exactly singular.
        """
        if self.matrix is None or not self._factorize:
            return None
        scale = float(self._bounds[0]) or 1.0
        try:
            return _Factor(self.matrix, np.asarray(self.null.motions), self.primal, 0.0, scale)
        except RuntimeError:  # exactly singular, in spite of the shift
            return None

    @functools.cached_property
    def equations(self) -> Any:
        """Derivative A of the constraint equations by the unknowns, sparse, (equations, primal).

        ``primal`` is the number of unknowns that are no multipliers; columns of fixed unknowns are
        zero. A is multiplied by the stiffness of the potential, see ``natural_units``.
        """
        if self.matrix is not None:
            return self.matrix[self.primal :, : self.primal].tocsr()
        count = self.size - self.primal
        blocks = [sp.csr_array((0, self.primal))]
        for begin in range(0, count, ROWS):
            # the last block is padded with repeated rows, so that one program serves all blocks
            numbers = np.minimum(np.arange(begin, begin + ROWS), count - 1)
            rows = np.asarray(_equation_rows(self.system, self.x, self.null, numbers), float)
            blocks.append(sp.csr_array(rows[: count - begin]))
        return sp.vstack(blocks).tocsr()

    def _stiffness_times(self, columns: np.ndarray) -> np.ndarray:
        """Multiply the Hessian of the Lagrangian by the c columns of a matrix (primal, c).

        ``primal`` is the number of unknowns that are no multipliers. The result has a meaning for
        free unknowns only: those that no constraint fixes, and that are not of a rattler.
        """
        if self.matrix is not None:
            return self.matrix[: self.primal, : self.primal] @ columns
        flat_columns = columns.reshape(self.primal, -1)
        product = np.asarray(_stiffness_products(self.system, self.x, self.null, flat_columns.T))
        return product.T.reshape(columns.shape).astype(float)

    @functools.cached_property
    def redundant(self) -> int:
        """Number of constraint equations that follow from other equations to first order."""
        A = self.equations
        if not A.shape[0]:
            return 0
        A = A[self.moves[self.primal :]]
        if not A.shape[0]:
            return 0
        # Equations without common unknowns, directly or through others, are independent: the rank
        # is that of small dense blocks.
        _, labels = connected_components(A @ A.T, directed=False)
        redundant = 0
        for label in np.unique(labels):
            block = A[labels == label]
            # An equation whose coordinates are all constrained has no columns, and rank 0: it
            # repeats the constraints of its coordinates.
            columns = np.unique(block.indices)
            sizes = np.linalg.svd(block[:, columns].toarray(), compute_uv=False)
            # 1e-300 keeps the limit above zero for equations without columns
            zero = REPEATED * max(sizes.max(initial=0.0), 1e-300)
            redundant += block.shape[0] - int(np.sum(sizes > zero))
        return redundant

    @functools.cached_property
    def negative(self) -> np.ndarray:
        """Number of negative eigenvalues of the constrained Hessian, (1,); -1 where not known.

        This is the Hessian of the Lagrangian on the tangent space of the constraint equations.
        """
        if self.matrix is None:
            return np.array([-1])
        H = self.matrix[: self.primal, : self.primal].tocsr()
        A = self.equations
        scale = bound(H) or 1.0
        if A.shape[0]:
            # The factor counts negative eigenvalues of the whole space: those off the tangent space
            # are made positive.
            size = bound((A @ A.T).tocsr()) or 1.0
            H = (H + STIFF * scale / size * (A.T @ A)).tocsr()
        try:
            # eigenvalues below -SHIFT scale are counted: null directions do not count as negative
            count = SparseFactor(H, SHIFT * scale).negative
        except RuntimeError:  # exactly singular, in spite of the shift
            count = None
        return np.array([-1 if count is None else count])

    def project(self, columns: np.ndarray) -> np.ndarray:
        """Set fixed unknowns to zero in columns, and project out rigid motions without stiffness.

        Unknowns are fixed by a constraint, or as the coordinates of a rattler.

        Args:
          columns: (m, c) for all m unknowns, or (primal, c) without the multipliers; or a single
            column.
        """
        matrix = columns.reshape(columns.shape[0], -1)
        projected = np.where(self.moves[: len(matrix), None], matrix, 0.0)
        motions = np.asarray(self.null.motions)
        if len(motions):
            motions = motions.reshape(len(motions), -1)
            k = motions.shape[1]  # the number of coordinates
            projected[:k] -= motions.T @ (motions @ projected[:k])
        return projected.reshape(columns.shape)

    def solve_many(
        self, columns: np.ndarray, rtol: float, to: float = 1e-12
    ) -> tuple[np.ndarray, SolveStats]:
        """Solve K x = b for the columns b of a matrix (m, c), by the factor of the KKT matrix K.

        K is the matrix of the linear system at a constrained minimum. Multipliers, and right-hand
        sides of equations, are in the units of the user: this method converts them to the units of
        the stored matrix, and back. The other arguments, and the results, are those of
        ``HessianFactor.solve_many``.
        """
        units = np.where(np.arange(self.size) < self.primal, 1.0, self.unit)[:, None]
        x, stats = super().solve_many(units * columns, rtol, to)
        return units * x, dataclasses.replace(stats, solver="sparse KKT factor")

    def unflat(self, vector: np.ndarray) -> Unknowns:
        """Restore positions, relaxed parameters and multipliers from a vector that holds all.

        The vector is (m,); a shorter vector without the multipliers gives multipliers of zero.
        """
        if vector.size == self.size:
            return unflat(vector, self.x)
        unknowns = unflat(vector, dataclasses.replace(self.x, multipliers=None))
        zeros = jax.tree.map(np.zeros_like, self.x.multipliers)
        return dataclasses.replace(unknowns, multipliers=zeros)

    def solve_unknowns(self, b: Unknowns, rtol: float) -> tuple[Unknowns, float, Status]:
        """Solve K x = b for unknowns x: positions, relaxed parameters and multipliers.

        K is the matrix of the linear system at the constrained minimum. Multipliers are in the
        units of the user, not in units of the stiffness of the potential.

        Args:
          b: the right-hand side, with the structure of the unknowns.
          rtol: relative residual. Where K is factorized, the solution is refined to round-off, and
            counts as converged at a residual of 1e-10, or ``rtol`` where that is larger.

        Returns:
          (x, relative residual, status).
        """
        if self.factor is None:
            b = jax.tree.map(jnp.asarray, b)
            x, residual, code = _solve_iteratively(self.system, self.x, self.null, b, rtol)
            return x, float(residual), Status(int(code))
        x, stats = self.solve_many(flat(b)[:, None], max(rtol, 1e-10), to=1e-15)
        return self.unflat(x[:, 0]), float(stats.residual[0, 0]), Status(int(stats.status[0, 0]))

    def direction(self, b: np.ndarray, shift: float) -> np.ndarray:
        """Compute a Newton step of the unknowns, approximately K^-1 b, from a right-hand side b.

        K is the matrix of the linear system for positions, relaxed parameters and multipliers.
        Multipliers are divided by the stiffness of the potential, and right-hand sides of equations
        are multiplied by it, see ``natural_units``.

        Args:
          b: (m,) right-hand side.
          shift: number added to the diagonal of the Hessian of the Lagrangian, a block of K.
        """
        if self.matrix is not None and self._factorize:
            scale = float(self._bounds[0]) or 1.0
            # without a border: the shifts alone make the matrix regular along rigid motions
            return _Factor(self.matrix, np.zeros((0, 1)), self.primal, shift, scale).apply(b)
        # ``_solve_iteratively`` takes and returns natural units: for both, the unit is divided out
        right_side = scaled(unflat(b, self.x), 1.0 / self.unit)
        right_side = jax.tree.map(jnp.asarray, right_side)
        # a step needs less accuracy than a derivative
        step, *_ = _solve_iteratively(self.system, self.x, self.null, right_side, 1e-6, shift)
        return flat(scaled(step, 1.0 / self.unit))

    @functools.cached_property
    def _normal(self) -> Any:
        """Factor of A A^T, with the derivative A of the constraint equations by the unknowns.

        The factor serves for projections on the tangent space A v = 0. The value is None without
        equations.
        """
        A = self.equations
        if not A.shape[0]:
            return None
        normal = (A @ A.T).tocsr()
        scale = bound(normal) or 1.0
        # Equations that are dropped get a diagonal entry. Redundant ones make A A^T singular: a
        # shift of 3e-14 of its norm makes it regular.
        dropped = sp.diags_array(np.where(self.moves[self.primal :], 0.0, scale))
        shift = SHIFT**1.5 * scale * sp.eye_array(A.shape[0])
        return splu(sp.csc_array(normal + dropped + shift))

    def tangent(self, columns: np.ndarray) -> np.ndarray:
        """Project columns on the tangent space A v = 0 of the constraint equations.

        A is the derivative of the equations by the unknowns. Fixed unknowns, and rigid motions
        without stiffness, are projected out as well, by the method ``project``.

        Args:
          columns: (primal, c), for the ``primal`` unknowns that are no multipliers; or a single
            column.
        """
        projected = self.project(columns.reshape(columns.shape[0], -1))
        A = self.equations
        if A.shape[0]:
            # twice: the second pass removes the error that the shift and round-off leave
            for _ in range(2):
                projected = self.project(projected - A.T @ self._normal.solve(A @ projected))
        return projected.reshape(columns.shape)

    def lowest(self, k: int = 1, floor: float = 0.0, accuracy: float = 1e-4) -> Spectrum:
        """Compute the k lowest modes of the Hessian on the tangent space of the constraints.

        The Hessian is that of the Lagrangian.

        Args:
          k: number of modes.
          floor: the sign of an eigenvalue is not known where its absolute value is below ``floor``.
          accuracy: residual of a mode in units of the lowest eigenvalue, by iteration.
        """
        # dimension of the complement of the tangent space
        independent = int(self.moves[self.primal :].sum()) - self.redundant
        constrained = int((~self.moves[: self.primal]).sum())
        null = constrained + independent + len(np.asarray(self.null.motions))

        def approximate_inverse(columns: np.ndarray) -> np.ndarray:
            # zero right-hand sides of the equations: the solution lies in the tangent space
            padded = np.pad(columns, [(0, self.size - self.primal), (0, 0)])
            return self.tangent(self.factor.apply(padded)[: self.primal])

        has_inverse = self.factor is not None and self.negative[0] == 0
        return eigen.lowest(
            lambda v: self.tangent(self._stiffness_times(v)),
            self.primal,
            k,
            project=self.tangent,
            null=null,
            # LOBPCG needs a positive preconditioner: none where H_L has a negative eigenvalue.
            iteration=Iteration(approximate_inverse if has_inverse else None, accuracy=accuracy),
            dtype=self.system.positions.dtype,
            floor=floor,
        )


@compiled(static_argnames=("rtol",), loops=True)
def _solve_iteratively(
    system: System,
    x: Unknowns,
    null: NullSpace,
    b: Unknowns,
    rtol: float,
    shift: jax.Array | float = 0.0,
) -> tuple[Unknowns, jax.Array, jax.Array]:
    """Solve K dx = b by an iterative method, with the matrix K of a constrained minimum.

    dx is a change of positions, relaxed parameters and multipliers, and b has the same structure.
    Multipliers are in the units of the user, not in units of the stiffness of the potential.

    Args:
      x: the unknowns at the minimum.
      null: the null space.
      rtol: relative residual at which the method stops.
      shift: number added to the diagonal of the Hessian of the Lagrangian, a block of K.

    Returns:
      (dx, relative residual, status).
    """
    operator, unit = kkt_operator(system, x, null, shift)
    solution, stats = solve(operator, scaled(b, unit), Auto(rtol=rtol))
    return scaled(solution, unit), stats.residual, stats.status


@compiled
def _equation_rows(
    system: System, x: Unknowns, null: NullSpace, numbers: jax.Array | np.ndarray
) -> jax.Array:
    """Compute some rows of the derivative A of the constraint equations, (rows, primal).

    The derivative is by the ``primal`` unknowns that are no multipliers.

    Args:
      x: positions, relaxed parameters and multipliers.
      null: the null space, whose fixed coordinates have columns of zero.
      numbers: (rows,) numbers of the equations, in the order of the multipliers.
    """
    operator, _ = kkt_operator(system, x, null)
    multipliers, unravel = ravel_pytree(x.multipliers)
    zeros = jax.tree.map(jnp.zeros_like, x)

    def row(k: jax.Array) -> jax.Array:
        unit_vector = jnp.zeros_like(multipliers).at[k].set(1.0)
        # K (0, e) = (A^T e, 0)
        image = operator.matvec(dataclasses.replace(zeros, multipliers=unravel(unit_vector)))
        return ravel_pytree(dataclasses.replace(image, multipliers=None))[0]

    return jax.lax.map(row, jnp.asarray(numbers))


@compiled
def _stiffness_products(
    system: System, x: Unknowns, null: NullSpace, vectors: jax.Array | np.ndarray
) -> jax.Array:
    """Multiply the Hessian of the Lagrangian by each of c vectors (c, primal).

    ``primal`` is the number of unknowns that are no multipliers. Entries of fixed unknowns are zero
    in the result.

    Args:
      x: positions, relaxed parameters and multipliers.
      null: the null space, which holds the fixed unknowns.
    """
    operator, _ = kkt_operator(system, x, null)
    _, unravel = ravel_pytree(dataclasses.replace(x, multipliers=None))
    zeros = jax.tree.map(jnp.zeros_like, x.multipliers)

    def product(v: jax.Array) -> jax.Array:
        image = operator.matvec(dataclasses.replace(unravel(v), multipliers=zeros))
        return ravel_pytree(dataclasses.replace(image, multipliers=None))[0]

    return jax.lax.map(product, jnp.asarray(vectors, x.positions.dtype))
