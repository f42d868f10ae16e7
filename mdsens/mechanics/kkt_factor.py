"""The linear system at a constrained minimum, by numpy and scipy: matrix, factor, solves.

    [ H_L  A^T ] [ dx      ]   [ -d2L/dx dp . dp ]
    [ A    0   ] [ dlambda ] = [ -dg/dp . dp     ]

    H_L = d2L/dx2,  A = dg/dx,  L = U + lambda . g

The unknowns are the free coordinates of x; those that are pinned or at a bound have no row. The
matrix is symmetric, and indefinite where there are equations. The minimum is stable where H_L is
positive on the tangent space A v = 0. Source: Nocedal and Wright, Numerical Optimization, 2006,
sections 12.3 and 16.1.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import splu

from mdsens._util.lattice import nearest_image
from mdsens.constraints import RigidBonds
from mdsens.implicit.linear import Auto, eigen
from mdsens.implicit.linear.eigen import Spectrum
from mdsens.implicit.linear.result import SolveStats
from mdsens.implicit.linear.solution import solve
from mdsens.implicit.linear.sparse_ldl import SHIFT, SparseFactor, bound
from mdsens.mechanics.hessian import sparse_hessian
from mdsens.mechanics.hessian_factor import HessianFactor
from mdsens.mechanics.kkt_operator import flat, kkt_operator, parts_of, scaled, unflat
from mdsens.mechanics.lagrangian import relaxed, unknowns_of
from mdsens.mechanics.null_space import NullSpace
from mdsens.mechanics.status import Status
from mdsens.mechanics.units import natural_units
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.system import System

__all__ = ["KKT"]

# Largest number of unknowns for which the matrix is written out where its sparsity is not known.
DENSE = 2500
# A singular value of A below this part of the largest one is zero: its equation repeats others.
# Some equations repeat others in a single configuration only, as the bonds of a chain drawn
# straight; there the configuration is accurate to a root of round-off.
REPEATED = 1e-7
# Stiffness of A^T A, in units of |H|, where the inertia of H_L on the tangent space is computed:
# changes that violate the equations get a positive stiffness far above that of the potential.
STIFF = 1e6


@jax.jit
def _dense_matrix(system: System, x: Unknowns, null: NullSpace) -> jax.Array:
    """Compute the matrix of the linear system, with rows and columns in the order of ``flat``."""
    operator, _ = kkt_operator(system, x, null)
    leaves, structure = jax.tree.flatten(x)
    ends = np.cumsum([0, *[leaf.size for leaf in leaves]])
    size = int(ends[-1])

    def column(e: jax.Array) -> jax.Array:
        parts = [
            e[a:b].reshape(leaf.shape)
            for a, b, leaf in zip(ends[:-1], ends[1:], leaves, strict=True)
        ]
        image = operator.matvec(jax.tree.unflatten(structure, parts))
        return jnp.concatenate([leaf.ravel() for leaf in parts_of(image)])

    # ``flat`` has the leaves in another order than the tree
    order = np.concatenate([np.arange(a, b) for a, b in _spans(x, ends)])
    identity = jnp.eye(size, dtype=x.positions.dtype)[order]
    # 32 columns at a time, which bounds the memory
    return jax.lax.map(column, identity, batch_size=min(32, size))


def _block_diagonal(blocks: np.ndarray) -> sp.bsr_array:
    """Return the sparse matrix (m p, m q) with the blocks (m, p, q) on its diagonal."""
    m, p, q = blocks.shape
    return sp.bsr_array((blocks, np.arange(m), np.arange(m + 1)), (m * p, m * q))


def _spans(x: Unknowns, ends: np.ndarray) -> list[tuple[int, int]]:
    """Find the entries of each leaf in a vector in the order of the tree.

    The leaves are listed in the order of ``flat``: positions, parameters, multipliers. In the tree
    multipliers come before parameters.

    Args:
      ends: end of each leaf in the vector, after a leading 0.
    """
    spans = list(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))
    first_param = 1 + len(jax.tree.leaves(x.multipliers))
    return [spans[0], *spans[first_param:], *spans[1:first_param]]


class _Factor:
    """LU factor of the linear system, with a small shift and a border that make it regular.

    The factorized matrix is regular also where equations are redundant, or motions cost no energy.

    Args:
      matrix: the linear system, sparse, (m, m).
      motions: (k, n, d) rigid motions without stiffness, which get a row and a column each.
      primal: number of unknowns that are no multipliers.
      shift: number added to the diagonal of H_L.
      scale: a bound of the eigenvalues of H_L. SHIFT times it is added to the diagonal of H_L too,
        and subtracted on the diagonal of the multipliers.
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
            padding = [(0, 0), (0, self.size - rows.shape[1])]
            border = sp.csr_array(scale * np.pad(rows, padding))
            whole = sp.block_array([[whole, border.T], [border, None]])
        self._lu = splu(sp.csc_array(whole))

    def apply(self, b: np.ndarray) -> np.ndarray:
        """Solve for a right-hand side (m,) or (m, c), with zeros for the border."""
        more = self._lu.shape[0] - self.size
        padded = np.pad(b, [(0, more), *[(0, 0)] * (b.ndim - 1)])
        return self._lu.solve(np.ascontiguousarray(padded))[: self.size]


class KKT(HessianFactor):
    """The linear system at a constrained minimum.

    The unknowns of the system are positions, relaxed parameters and multipliers, in the order of
    ``flat``. In vectors and in the matrix, multipliers are in units of ``unit``.

    Attributes:
      x: the unknowns at the minimum.
      unit: the stiffness of the potential, see ``natural_units``.
      primal: number of unknowns that are no multipliers.
      size: number m of all unknowns.
      moves: (m,) True for free unknowns: not constrained, and not of a rattler.

    Args:
      system: the backbone.
      null: the null space, from :func:`constrained_null_space`.
      multipliers: multipliers of the equations.
    """

    _factors = ("factor", "_normal")

    def __init__(self, system: System, null: NullSpace, multipliers: dict[str, jax.Array] | None):
        super().__init__(system, null)
        self.x = unknowns_of(system, multipliers)
        self.unit = float(natural_units(system)[1])
        self.primal = system.positions.size + sum(v.size for v in jax.tree.leaves(self.x.params))
        self.size = flat(self.x).size
        # The sparse matrix is assembled only for pair potentials with rigid bonds: other equations,
        # and relaxed parameters, may couple any unknowns.
        with_equations = [c for c in system.constraints if c.name in (self.x.multipliers or {})]
        self._sparse = (
            system.potential.pairwise
            and not relaxed(system)
            and all(isinstance(c, RigidBonds) for c in with_equations)
        )
        small = (self._sparse and self._factorize) or self.size <= DENSE
        self._factorize = system.positions.dtype == jnp.float64 and small
        free = null.free(jax.tree.map(jnp.ones_like, self.x))
        of_rattlers = np.repeat(np.asarray(null.rattlers), system.dimension)
        self.moves = flat(free) > 0
        self.moves[: of_rattlers.size] &= ~of_rattlers

    @functools.cached_property
    def matrix(self) -> Any:
        """The linear system as a sparse matrix (m, m); None where it is too large.

        The row of an unknown that is not free has its diagonal entry only, a bound of the
        eigenvalues of H_L.
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
        """Assemble the sparse matrix of a pair potential with rigid bonds.

        A bond of length r along the unit vector e, with tension t, adds (t / r) (1 - e e^T) to the
        second derivative of L by the vector R_i - R_j. Its row of A is e by R_i and -e by R_j.
        """
        system = self.system
        n = system.n
        d = system.dimension
        hessian = sparse_hessian(system)
        assert hessian is not None
        rows: list[Any] = []
        by_name = {c.name: c for c in system.constraints}
        for name, tensions in sorted((self.x.multipliers or {}).items()):
            c = by_name[name]
            assert isinstance(c, RigidBonds)
            i, j = np.asarray(c.bonds).T
            apart = np.asarray(
                nearest_image(system.positions[i] - system.positions[j], system.box), float
            )
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
        A = self.unit * sp.vstack(rows)
        return sp.block_array([[hessian, A.T], [A, None]]).tocsr()

    @functools.cached_property
    def _bounds(self) -> np.ndarray:
        """(1,) a bound of the eigenvalues of the matrix."""
        return np.array([bound(self.matrix)])

    @functools.cached_property
    def factor(self) -> Any:
        """Factor of the linear system; None where it is not factorized, or exactly singular."""
        if self.matrix is None or not self._factorize:
            return None
        scale = float(self._bounds[0]) or 1.0
        try:
            return _Factor(self.matrix, np.asarray(self.null.motions), self.primal, 0.0, scale)
        except RuntimeError:  # exactly singular, in spite of the shift
            return None

    @functools.cached_property
    def equations(self) -> Any:
        """The derivative A of the equations by the free unknowns, sparse, (equations, primal).

        A is in units of the stiffness of the potential, see ``natural_units``; the result is None
        where the matrix is too large.
        """
        if self.matrix is None:
            return None
        return self.matrix[self.primal :, : self.primal].tocsr()

    @functools.cached_property
    def redundant(self) -> int:
        """Number of equations that follow from others to first order."""
        A = self.equations
        if A is None or not A.shape[0]:
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
            zero = REPEATED * max(sizes.max(initial=0.0), 1e-300)
            redundant += block.shape[0] - int(np.sum(sizes > zero))
        return redundant

    @functools.cached_property
    def negative(self) -> np.ndarray:
        """(1,) number of negative eigenvalues of H_L on the tangent space; -1 if not known."""
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
            count = SparseFactor(H, SHIFT * scale).negative
        except RuntimeError:
            count = None
        return np.array([-1 if count is None else count])

    def project(self, columns: np.ndarray) -> np.ndarray:
        """Project columns on the free unknowns, and off the rigid motions without stiffness.

        Args:
          columns: (m, c) or (primal, c), or one column.
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
        """Solve K x = b for the columns b of a matrix (m, c), as the base class.

        Here multipliers, and right-hand sides of equations, are in their natural units.
        """
        units = np.where(np.arange(self.size) < self.primal, 1.0, self.unit)[:, None]
        x, stats = super().solve_many(units * columns, rtol, to)
        return units * x, dataclasses.replace(stats, solver="sparse KKT factor")

    def unflat(self, vector: np.ndarray) -> Unknowns:
        """Restore the unknowns from a vector (m,), or from (primal,) with multipliers of zero."""
        if vector.size == self.size:
            return unflat(vector, self.x)
        unknowns = unflat(vector, dataclasses.replace(self.x, multipliers=None))
        zeros = jax.tree.map(np.zeros_like, self.x.multipliers)
        return dataclasses.replace(unknowns, multipliers=zeros)

    def solve_unknowns(self, b: Unknowns, rtol: float) -> tuple[Unknowns, float, Status]:
        """Solve K x = b for unknowns instead of vectors: ``(x, relative residual, status)``.

        Multipliers are in their natural units.

        Args:
          b: the right-hand side.
          rtol: relative residual. With a factor the solution is refined to round-off, and is
            converged at a residual of 1e-10, or ``rtol`` where that is larger.
        """
        if self.factor is None:
            b = jax.tree.map(jnp.asarray, b)
            x, residual, code = _solve_iteratively(self.system, self.x, self.null, b, rtol)
            return x, float(residual), Status(int(code))
        x, stats = self.solve_many(flat(b)[:, None], max(rtol, 1e-10), to=1e-15)
        return self.unflat(x[:, 0]), float(stats.residual[0, 0]), Status(int(stats.status[0, 0]))

    def direction(self, b: np.ndarray, shift: float) -> np.ndarray:
        """Compute a Newton step, about K^-1 b, (m,).

        K is the matrix of the linear system. Multipliers, and right-hand sides of equations, are in
        units of the stiffness of the potential, see ``natural_units``.

        Args:
          b: (m,) right-hand side.
          shift: added to the diagonal of H_L; ignored where the system is not factorized.
        """
        if self.matrix is not None and self._factorize:
            scale = float(self._bounds[0]) or 1.0
            return _Factor(self.matrix, np.zeros((0, 1)), self.primal, shift, scale).apply(b)
        right_side = scaled(unflat(b, self.x), 1.0 / self.unit)
        right_side = jax.tree.map(jnp.asarray, right_side)
        # a step needs less accuracy than a derivative
        step, *_ = _solve_iteratively(self.system, self.x, self.null, right_side, 1e-6)
        return flat(scaled(step, 1.0 / self.unit))

    @functools.cached_property
    def _normal(self) -> Any:
        """Factor of A A^T for the projection on the tangent space; None without equations."""
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
        """Project columns on the tangent space A v = 0, and by ``project``.

        Args:
          columns: (primal, c), or one column.
        """
        projected = self.project(columns.reshape(columns.shape[0], -1))
        A = self.equations
        if A.shape[0]:
            # twice: the second pass removes the error that the shift and round-off leave
            for _ in range(2):
                projected = self.project(projected - A.T @ self._normal.solve(A @ projected))
        return projected.reshape(columns.shape)

    def lowest(self, k: int = 1, floor: float = 0.0) -> Spectrum:
        """Compute the k lowest modes of H_L on the tangent space.

        Args:
          k: number of modes.
          floor: a stiffness below this may be of either sign.
        """
        H = self.matrix[: self.primal, : self.primal]
        # dimension of the complement of the tangent space
        independent = int(self.moves[self.primal :].sum()) - self.redundant
        constrained = int((~self.moves[: self.primal]).sum())
        null = constrained + independent + len(np.asarray(self.null.motions))

        def approximate_inverse(columns: np.ndarray) -> np.ndarray:
            padded = np.pad(columns, [(0, self.size - self.primal), (0, 0)])
            return self.tangent(self.factor.apply(padded)[: self.primal])

        has_inverse = self.factor is not None and self.negative[0] == 0
        return eigen.lowest(
            lambda v: self.tangent(H @ v),
            self.primal,
            k,
            project=self.tangent,
            null=null,
            # LOBPCG needs a positive preconditioner: none where H_L has a negative eigenvalue.
            precondition=approximate_inverse if has_inverse else None,
            dtype=self.system.positions.dtype,
            floor=floor,
        )


@functools.partial(jax.jit, static_argnames=("rtol",))
def _solve_iteratively(
    system: System, x: Unknowns, null: NullSpace, b: Unknowns, rtol: float
) -> tuple[Unknowns, jax.Array, jax.Array]:
    """Solve K dx = b without a factor: (dx, relative residual, status).

    Multipliers are in their natural units.
    """
    operator, unit = kkt_operator(system, x, null)
    solution, stats = solve(operator, scaled(b, unit), Auto(rtol=rtol))
    return scaled(solution, unit), stats.residual, stats.status
