"""The linear system at a constrained minimum, on the host: assembled, factorized, solved with, its
redundancies found.

    [ H_L  A^T ] [ dx      ]   [ -d2L/dx dp . dp ]
    [ A    0   ] [ dlambda ] = [ -dg/dp . dp     ]      H_L = d2L/dx2,  A = dg/dx,  L = U + lambda . g

on what is free of x: coordinates that are pinned or at a bound have no row. Symmetric, and
indefinite where there are equations. The minimum is stable where H_L is positive on the tangent
space, A v = 0. Nocedal and Wright, Numerical Optimization, 2006, sections 12.3 and 16.1.
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

DENSE = 2500  # unknowns up to which a matrix whose sparsity is not known is written out
# Of the largest singular value of A: equations below it are no new ones. Those that repeat others
# in one configuration alone, as the bonds of a chain drawn straight, are met to a root of round-off
# from there.
REPEATED = 1e-7
STIFF = 1e6  # times |H|: what A^T A counts for where the inertia on the tangent space is asked for


@jax.jit
def _written_out(system: System, x: Unknowns, null: NullSpace) -> jax.Array:
    operator, _ = kkt_operator(system, x, null)
    leaves, kind = jax.tree.flatten(x)
    sizes = np.cumsum([0, *[leaf.size for leaf in leaves]])

    def column(e: jax.Array) -> jax.Array:
        parts = [
            e[a:b].reshape(leaf.shape)
            for a, b, leaf in zip(sizes[:-1], sizes[1:], leaves, strict=True)
        ]
        image = operator.matvec(jax.tree.unflatten(kind, parts))
        return jnp.concatenate([leaf.ravel() for leaf in parts_of(image)])

    # columns in the order of ``flat``, whose leaves stand in another order than the tree's
    order = np.concatenate([np.arange(a, b) for a, b in _spans(x, sizes)])
    identity = jnp.eye(int(sizes[-1]), dtype=x.positions.dtype)[order]
    return jax.lax.map(column, identity, batch_size=min(32, int(sizes[-1])))


def _diagonal(blocks: np.ndarray) -> sp.bsr_array:
    """(m, p, q) blocks as the diagonal of a matrix (m p, m q)."""
    m, p, q = blocks.shape
    return sp.bsr_array((blocks, np.arange(m), np.arange(m + 1)), (m * p, m * q))


def _spans(x: Unknowns, sizes: np.ndarray) -> list[tuple[int, int]]:
    """Where each leaf of ``flat`` stands in the tree's own order: positions, multipliers,
    parameters.
    """
    spans = list(zip(sizes[:-1].tolist(), sizes[1:].tolist(), strict=True))
    first, many = 1, len(jax.tree.leaves(x.multipliers))
    return [spans[0], *spans[first + many :], *spans[first : first + many]]


class _Factor:
    """Of the bordered and slightly shifted system: regular whatever is redundant or floppy."""

    def __init__(self, matrix: Any, motions: np.ndarray, primal: int, shift: float, scale: float):
        """``shift`` is added to the diagonal of H_L; both blocks have SHIFT of ``scale`` beside."""
        least = SHIFT * scale
        signs = np.concatenate(
            [np.full(primal, shift + least), np.full(matrix.shape[0] - primal, -least)]
        )
        whole = matrix + sp.diags_array(signs)
        self.size = matrix.shape[0]
        if len(motions):
            border = sp.csr_array(
                scale
                * np.pad(
                    motions.reshape(len(motions), -1), [(0, 0), (0, self.size - motions[0].size)]
                )
            )
            whole = sp.block_array([[whole, border.T], [border, None]])
        self._lu = splu(sp.csc_array(whole))

    def apply(self, b: np.ndarray) -> np.ndarray:
        more = self._lu.shape[0] - self.size
        padded = np.pad(b, [(0, more), *[(0, 0)] * (b.ndim - 1)])
        return self._lu.solve(np.ascontiguousarray(padded))[: self.size]


class KKT(HessianFactor):
    """The system of a constrained minimum. What it solves for has positions, relaxed parameters and
    multipliers.

    Args:
      system: the backbone.
      null: from :func:`constrained_null_space`.
      multipliers: of the equations.
    """

    _factors = ("factor", "_normal")

    def __init__(self, system: System, null: NullSpace, multipliers: dict[str, jax.Array] | None):
        super().__init__(system, null)
        self.x = unknowns_of(system, multipliers)
        self.unit = float(natural_units(system)[1])
        self.primal = system.positions.size + sum(v.size for v in jax.tree.leaves(self.x.params))
        self.size = flat(self.x).size
        sparse = system.potential.pairwise and not relaxed(system)
        self._sparse = sparse and all(
            isinstance(c, RigidBonds) for c in system.constraints if _binds(c, self.x)
        )
        self._factorize = system.positions.dtype == jnp.float64 and (
            (self._sparse and self._factorize) or self.size <= DENSE
        )
        free = null.free(jax.tree.map(jnp.ones_like, self.x))
        loose = np.repeat(np.asarray(null.rattlers), system.dimension)
        self.moves = flat(free) > 0
        self.moves[: loose.size] &= ~loose

    @functools.cached_property
    def matrix(self) -> Any:
        """The system as a sparse matrix, rows of what is held those of the unit matrix; None where
        too large.
        """
        if not self._factorize and not self._sparse:
            return None
        free = sp.diags_array(self.moves.astype(float))
        whole = (
            self._assembled()
            if self._sparse
            else sp.csr_array(np.asarray(_written_out(self.system, self.x, self.null)))
        )
        kept = free @ whole @ free
        scale = bound(kept[: self.primal, : self.primal].tocsr()) or 1.0
        return (kept + sp.diags_array(np.where(self.moves, 0.0, scale))).tocsr()

    def _assembled(self) -> Any:
        system, n, d = self.system, self.system.n, self.system.dimension
        hessian, rows = sparse_hessian(system), []
        assert hessian is not None
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
            # R -> R_i - R_j, whose second derivative is across the bond
            components = np.arange(len(r) * d).reshape(-1, d)
            ends = [(d * end[:, None] + np.arange(d)).ravel() for end in (i, j)]
            ones, shape = np.ones(components.size), (components.size, n * d)
            apart_of = sp.csr_array((ones, (components.ravel(), ends[0])), shape) - sp.csr_array(
                (ones, (components.ravel(), ends[1])), shape
            )
            pull = (np.asarray(tensions, float) / r)[:, None, None]
            across = pull * (np.eye(d) - along[:, :, None] * along[:, None, :])
            hessian = hessian + apart_of.T @ _diagonal(across) @ apart_of
            rows.append(_diagonal(along[:, None, :]) @ apart_of)
        if not rows:
            return hessian.tocsr()
        A = self.unit * sp.vstack(rows)
        return sp.block_array([[hessian, A.T], [A, None]]).tocsr()

    @functools.cached_property
    def _bounds(self) -> np.ndarray:
        return np.array([bound(self.matrix)])

    @functools.cached_property
    def factor(self) -> Any:
        """Of the system; None where it is not written out."""
        if self.matrix is None or not self._factorize:
            return None
        scale = float(self._bounds[0]) or 1.0
        try:
            return _Factor(self.matrix, np.asarray(self.null.motions), self.primal, 0.0, scale)
        except RuntimeError:  # singular, shift and all
            return None

    @functools.cached_property
    def equations(self) -> Any:
        """A, (m, primal) sparse, in units of the potential's stiffness, of what is free."""
        return (
            self.matrix[self.primal :, : self.primal].tocsr() if self.matrix is not None else None
        )

    @functools.cached_property
    def redundant(self) -> int:
        """How many equations repeat others, to first order."""
        A = self.equations
        if A is None or not A.shape[0]:
            return 0
        kept = A[self.moves[self.primal :]]
        _, labels = (
            connected_components(kept @ kept.T, directed=False)
            if kept.shape[0]
            else (0, np.zeros(0, int))
        )
        repeated = 0
        for label in np.unique(labels):
            block = kept[labels == label]
            columns = np.unique(block.indices)
            sizes = np.linalg.svd(block[:, columns].toarray(), compute_uv=False)
            # an equation all of whose coordinates are held elsewhere has no column: it repeats
            # those
            repeated += block.shape[0] - int(
                np.sum(sizes > REPEATED * max(sizes.max(initial=0.0), 1e-300))
            )
        return repeated

    @functools.cached_property
    def negative(self) -> np.ndarray:
        """(1,) negative eigenvalues of H_L on the tangent space; -1 where no factor tells."""
        if self.matrix is None:
            return np.array([-1])
        H = self.matrix[: self.primal, : self.primal].tocsr()
        A, scale = self.equations, bound(H) or 1.0
        if A.shape[0]:
            size = bound((A @ A.T).tocsr()) or 1.0
            H = (H + STIFF * scale / size * (A.T @ A)).tocsr()
        try:
            count = SparseFactor(H, SHIFT * scale).negative
        except RuntimeError:
            count = None
        return np.array([-1 if count is None else count])

    def project(self, columns: np.ndarray) -> np.ndarray:
        """The columns of (m, c), or one (m,), without what is held and off the motions that nothing
        holds.
        """
        rows = columns.reshape(columns.shape[0], -1)
        found = np.where(self.moves[: len(rows), None], rows, 0.0)
        motions = np.asarray(self.null.motions)
        if len(motions):
            motions = motions.reshape(len(motions), -1)
            k = motions.shape[1]
            found[:k] -= motions.T @ (motions @ found[:k])
        return found.reshape(columns.shape)

    def solve_many(
        self, columns: np.ndarray, rtol: float, to: float = 1e-12
    ) -> tuple[np.ndarray, SolveStats]:
        units = np.where(np.arange(self.size) < self.primal, 1.0, self.unit)[:, None]
        x, stats = super().solve_many(units * columns, rtol, to)
        return units * x, dataclasses.replace(stats, solver="sparse KKT factor")

    def unflat(self, vector: np.ndarray) -> Unknowns:
        """Of (primal,), without multipliers, or of (m,) with them."""
        like = self.x if vector.size == self.size else dataclasses.replace(self.x, multipliers=None)
        found = unflat(vector, like)
        if vector.size == self.size or self.x.multipliers is None:
            return found
        return dataclasses.replace(
            found, multipliers=jax.tree.map(np.zeros_like, self.x.multipliers)
        )

    def solve_unknowns(self, b: Unknowns, rtol: float) -> tuple[Unknowns, float, Status]:
        """K x = b, as ``solve``; multipliers in their own units."""
        if self.factor is None:
            x, residual, code = _iterated(
                self.system, self.x, self.null, jax.tree.map(jnp.asarray, b), rtol
            )
            return x, float(residual), Status(int(code))
        x, stats = self.solve_many(flat(b)[:, None], max(rtol, 1e-10), to=1e-15)
        return self.unflat(x[:, 0]), float(stats.residual[0, 0]), Status(int(stats.status[0, 0]))

    def direction(self, b: np.ndarray, shift: float) -> np.ndarray:
        """About K^-1 b, (m,), with a shift on the diagonal of H_L, in units of the potential's stiffness:
        a Newton step.
        """
        if self.matrix is not None and self._factorize:
            scale = float(self._bounds[0]) or 1.0
            return _Factor(self.matrix, np.zeros((0, 1)), self.primal, shift, scale).apply(b)
        like = scaled(unflat(b, self.x), 1.0 / self.unit)
        found, *_ = _iterated(self.system, self.x, self.null, jax.tree.map(jnp.asarray, like), 1e-6)
        return flat(scaled(found, 1.0 / self.unit))

    @functools.cached_property
    def _normal(self) -> Any:
        """A factor of A A^T, of the equations that bind something free."""
        A = self.equations
        if not A.shape[0]:
            return None
        square = (A @ A.T).tocsr()
        off = sp.diags_array(np.where(self.moves[self.primal :], 0.0, bound(square) or 1.0))
        return splu(
            sp.csc_array(
                square + off + SHIFT**1.5 * (bound(square) or 1.0) * sp.eye_array(A.shape[0])
            )
        )

    def tangent(self, columns: np.ndarray) -> np.ndarray:
        """The columns of (primal, c), or one, off what is held, off the equations and off free
        motions.
        """
        found = self.project(columns.reshape(columns.shape[0], -1))
        A = self.equations
        if A.shape[0]:
            for _ in range(2):
                found = self.project(found - A.T @ self._normal.solve(A @ found))
        return found.reshape(columns.shape)

    def lowest(self, k: int = 1, floor: float = 0.0) -> Spectrum:
        """The k lowest modes on the tangent space; of a stiffness below ``floor`` the sign tells
        nothing.
        """
        H = self.matrix[: self.primal, : self.primal]
        bonds = int(self.moves[self.primal :].sum()) - self.redundant
        null = int((~self.moves[: self.primal]).sum()) + bonds + len(np.asarray(self.null.motions))

        def softened(columns: np.ndarray) -> np.ndarray:
            padded = np.pad(columns, [(0, self.size - self.primal), (0, 0)])
            return self.tangent(self.factor.apply(padded)[: self.primal])

        return eigen.lowest(
            lambda v: self.tangent(H @ v),
            self.primal,
            k,
            project=self.tangent,
            null=null,
            precondition=softened if self.factor is not None and self.negative[0] == 0 else None,
            dtype=self.system.positions.dtype,
            floor=floor,
        )


@functools.partial(jax.jit, static_argnames=("rtol",))
def _iterated(
    system: System, x: Unknowns, null: NullSpace, b: Unknowns, rtol: float
) -> tuple[Unknowns, jax.Array, jax.Array]:
    operator, unit = kkt_operator(system, x, null)
    found, stats = solve(operator, scaled(b, unit), Auto(rtol=rtol))
    return scaled(found, unit), stats.residual, stats.status


def _binds(c: Any, x: Unknowns) -> bool:
    return c.name in (x.multipliers or {})
