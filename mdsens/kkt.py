"""The linear system at a constrained minimum, on the host: assembled, factorised, solved with, its redundancies found.

    [ H_L  A^T ] [ dx      ]   [ -d2L/dx dp . dp ]
    [ A    0   ] [ dlambda ] = [ -dg/dp . dp     ]      H_L = d2L/dx2,  A = dg/dx,  L = U + lambda . g

on what is free of x: coordinates that are pinned or at a bound have no row. Symmetric, and indefinite where there are
equations. The minimum is stable where H_L is positive on the tangent space, A v = 0. Nocedal and Wright, Numerical
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
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import splu

from mdsens.boxes import nearest_image
from mdsens.constraints import RigidBonds
from mdsens.contacts import Network
from mdsens.implicit import eigen
from mdsens.implicit._sparse import SHIFT, SparseFactor, bound
from mdsens.implicit.eigen import Spectrum
from mdsens.implicit.linear import solve
from mdsens.implicit.operators import Auto, Operator
from mdsens.implicit.status import SolveStats, Status
from mdsens.lagrangian import (
    at_bounds,
    bounds,
    equations,
    held,
    lagrangian_slope,
    own_params,
    pinned,
    relaxed,
    unknowns_of,
)
from mdsens.scales import scales
from mdsens.stationarity import NullSpace, sparse_hessian
from mdsens.stiffness import Stiffness
from mdsens.system import System
from mdsens.unknowns import Unknowns

__all__ = ["KKT", "about_to_switch", "constrained_null_space", "flat", "kkt_operator", "scaled", "unflat"]

DENSE = 2500  # unknowns up to which a matrix whose sparsity is not known is written out
REPEATED = 1e-9  # of the largest singular value of A: equations below it are no new ones
WEAK = 10.0  # times the largest force left: a push on a bound below it is none
STIFF = 1e6  # times |H|: what A^T A counts for where the inertia on the tangent space is asked for


def _leaves(x: Unknowns) -> list[Any]:
    return [x.positions, *jax.tree.leaves(x.params), *jax.tree.leaves(x.multipliers)]


def flat(x: Unknowns, many: bool = False) -> np.ndarray:
    """Positions, relaxed parameters and multipliers as one vector (m,), or as columns (m, c) of many."""
    leaves = [np.asarray(leaf) for leaf in _leaves(x)]
    if not many:
        return np.concatenate([leaf.ravel() for leaf in leaves])
    return np.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1).T


def unflat(vector: np.ndarray, like: Unknowns, many: bool = False) -> Unknowns:
    """The inverse of ``flat``; ``like`` has the shapes of one."""
    rows, parts, start = vector.T if many else vector, [], 0
    for leaf in _leaves(like):
        size, lead = int(np.size(leaf)), rows.shape[:-1]
        parts.append(rows[..., start : start + size].reshape((*lead, *np.shape(leaf))))
        start += size
    of_params, of_multipliers = jax.tree.structure(like.params), jax.tree.structure(like.multipliers)
    k = 1 + of_params.num_leaves
    return Unknowns(
        parts[0], None, jax.tree.unflatten(of_multipliers, parts[k:]), jax.tree.unflatten(of_params, parts[1:k])
    )


def constrained_null_space(system: System, net: Network, null: NullSpace) -> NullSpace:
    """The null space of the constrained Hessian: rattlers, and the rigid motions that constraints leave. Host code.

    Equations that bind rattlers alone count as held, as the rattlers do.
    """
    mask, loose = held(system), np.asarray(null.rattlers)
    stuck = np.asarray(mask.positions)
    dropped: dict[str, Any] = {}
    for c in system.constraints:
        if isinstance(c, RigidBonds):
            ends = np.asarray(c.bonds)
            dropped[c.name] = jnp.asarray(loose[ends[:, 0]] | loose[ends[:, 1]])
    shapes = jax.eval_shape(lambda s: equations(s, s.positions, s.params), system)
    drops = {k: dropped.get(k, jnp.zeros(shape.shape, bool)) for k, shape in shapes.items()} or None
    labels = np.arange(loose.size) * 0 if null.labels is None else np.asarray(net.labels)
    whole, wraps = np.asarray(net.whole, float), np.asarray(net.wraps)
    motions: list[np.ndarray] = []
    for label in np.unique(labels[~loose]):
        some = np.flatnonzero((labels == label) & ~loose)
        motions += _left_motions(whole[some], bool(wraps[label]), stuck[some], some, loose.size)
    n, d = system.positions.shape
    rows = np.array(motions).reshape(-1, n, d)
    if not system.potential.pairwise and len(rows):
        rows = _costless(system, rows)
    plain = NullSpace(null.rattlers, jnp.asarray(labels), null.counts)
    found = jnp.asarray(rows, system.positions.dtype)
    return dataclasses.replace(plain, motions=found, held=Unknowns(mask.positions, None, drops, mask.params))


def _left_motions(x: np.ndarray, wraps: bool, stuck: np.ndarray, some: np.ndarray, n: int) -> list[np.ndarray]:
    """Orthonormal rigid motions (n, d) of some particles that leave their held coordinates where they are."""
    count, d = x.shape
    basis = [np.broadcast_to(np.eye(d)[k], (count, d)) for k in range(d)]
    if not wraps:
        arms = x - x.mean(axis=0)
        size = np.sqrt(np.mean(arms**2)) or 1.0
        for a, b in [(0, 1), (1, 2), (0, 2)][: 1 if d == 2 else 3]:
            turn = np.zeros((count, d))
            turn[:, a], turn[:, b] = -arms[:, b] / size, arms[:, a] / size
            basis.append(turn)
    rows = np.array([b.ravel() for b in basis])
    _, sizes, rows = np.linalg.svd(rows, full_matrices=False)
    rows = rows[sizes > 1e-9 * sizes[0]]
    at_stuck = rows[:, stuck.ravel()]
    if at_stuck.shape[1]:
        # the combinations that vanish there: null vectors of a small matrix
        values, vectors = np.linalg.eigh(at_stuck @ at_stuck.T)
        rows = vectors[:, values < 1e-12].T @ rows
    found = []
    for row in rows:
        motion = np.zeros((n, d))
        motion[some] = row.reshape(count, d)
        found.append(motion)
    return found


def _costless(system: System, rows: np.ndarray) -> np.ndarray:
    """Those combinations of orthonormal motions that the Hessian finds free: a field may hold the others."""
    probe = np.cos(np.arange(rows[0].size) ** 2.0).reshape(1, *rows[0].shape)
    *images, of_probe = np.asarray(_images(system, jnp.asarray(np.concatenate([rows, probe]))))
    scale = np.linalg.norm(of_probe) / np.linalg.norm(probe)
    u, costs, _ = np.linalg.svd(np.array(images), full_matrices=False)
    kept = u[:, costs <= np.finfo(float).eps ** 0.5 * scale]
    return np.tensordot(kept.T, rows, axes=1)


@jax.jit
def _images(system: System, rows: jax.Array) -> jax.Array:
    def slope(R: jax.Array) -> jax.Array:
        return lagrangian_slope(system.replace(constraints=()), Unknowns(R), system.params).positions

    product = jax.linearize(slope, system.positions)[1]
    return jax.lax.map(lambda v: product(v).ravel(), rows)


def scaled(x: Unknowns, by: Any) -> Unknowns:
    """Multipliers in units of a force a length, so that all rows of the system are alike."""
    return dataclasses.replace(x, multipliers=jax.tree.map(lambda leaf: by * leaf, x.multipliers))


def kkt_operator(system: System, x: Unknowns, null: NullSpace) -> tuple[Operator, Any]:
    """The system as products, with multipliers in units of the law's stiffness, and that unit.

    Positive semi-definite where no constraint is an equation.
    """
    unit = scales(system)[1]
    own = {k: v for k, v in system.params.items() if k not in (x.params or {})}
    jacobian = jax.linearize(lambda y: lagrangian_slope(system, y, own), x)[1]

    def product(v: Unknowns) -> Unknowns:
        return null.free(scaled(jacobian(scaled(null.free(v), unit)), unit))

    definite = x.multipliers is None
    return Operator(product, symmetric=True, positive_semidefinite=definite, project=null.project), unit


@jax.jit
def _written_out(system: System, x: Unknowns, null: NullSpace) -> jax.Array:
    operator, _ = kkt_operator(system, x, null)
    leaves, kind = jax.tree.flatten(x)
    sizes = np.cumsum([0, *[leaf.size for leaf in leaves]])

    def column(e: jax.Array) -> jax.Array:
        parts = [e[a:b].reshape(leaf.shape) for a, b, leaf in zip(sizes[:-1], sizes[1:], leaves, strict=True)]
        image = operator.matvec(jax.tree.unflatten(kind, parts))
        return jnp.concatenate([leaf.ravel() for leaf in _leaves(image)])

    # columns in the order of ``flat``, whose leaves stand in another order than the tree's
    order = np.concatenate([np.arange(a, b) for a, b in _spans(x, sizes)])
    identity = jnp.eye(int(sizes[-1]), dtype=x.positions.dtype)[order]
    return jax.lax.map(column, identity, batch_size=min(32, int(sizes[-1])))


def _spans(x: Unknowns, sizes: np.ndarray) -> list[tuple[int, int]]:
    """Where each leaf of ``flat`` stands in the tree's own order: positions, multipliers, parameters."""
    spans = list(zip(sizes[:-1].tolist(), sizes[1:].tolist(), strict=True))
    first, many = 1, len(jax.tree.leaves(x.multipliers))
    return [spans[0], *spans[first + many :], *spans[first : first + many]]


class _Factor:
    """Of the bordered and slightly shifted system: regular whatever is redundant or floppy."""

    def __init__(self, matrix: Any, motions: np.ndarray, primal: int, shift: float, scale: float):
        """``shift`` is added to the diagonal of H_L; both blocks have SHIFT of ``scale`` beside."""
        least = SHIFT * scale
        signs = np.concatenate([np.full(primal, shift + least), np.full(matrix.shape[0] - primal, -least)])
        whole = matrix + sp.diags_array(signs)
        self.size = matrix.shape[0]
        if len(motions):
            border = sp.csr_array(
                scale * np.pad(motions.reshape(len(motions), -1), [(0, 0), (0, self.size - motions[0].size)])
            )
            whole = sp.block_array([[whole, border.T], [border, None]])
        self._lu = splu(sp.csc_array(whole))

    def apply(self, b: np.ndarray) -> np.ndarray:
        more = self._lu.shape[0] - self.size
        padded = np.pad(b, [(0, more), *[(0, 0)] * (b.ndim - 1)])
        return self._lu.solve(np.ascontiguousarray(padded))[: self.size]


class KKT(Stiffness):
    """The system of a constrained minimum. What it solves for has positions, relaxed parameters and multipliers.

    Args:
      system: the backbone.
      null: from :func:`constrained_null_space`.
      multipliers: of the equations.
    """

    def __init__(self, system: System, null: NullSpace, multipliers: dict[str, jax.Array] | None):
        super().__init__(system, null)
        self.x = unknowns_of(system, multipliers)
        self.unit = float(scales(system)[1])
        self.primal = system.positions.size + sum(v.size for v in jax.tree.leaves(self.x.params))
        self.size = flat(self.x).size
        sparse = system.potential.pairwise and not relaxed(system)
        self._sparse = sparse and all(isinstance(c, RigidBonds) for c in system.constraints if _binds(c, self.x))
        self._factorise = system.positions.dtype == jnp.float64 and (
            (self._sparse and self._factorise) or self.size <= DENSE
        )
        free = null.free(jax.tree.map(jnp.ones_like, self.x))
        loose = np.repeat(np.asarray(null.rattlers), system.dimension)
        self.moves = flat(free) > 0
        self.moves[: loose.size] &= ~loose

    @functools.cached_property
    def matrix(self) -> Any:
        """The system as a sparse matrix, rows of what is held those of the unit matrix; None where too large."""
        if not self._factorise and not self._sparse:
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
        hessian, rows, start = sparse_hessian(system), [], 0
        assert hessian is not None
        lengthwise = self.x.multipliers or {}
        by_name = {c.name: c for c in system.constraints}
        for name in sorted(lengthwise):
            c = by_name[name]
            assert isinstance(c, RigidBonds)
            ends, tension = np.asarray(c.bonds), np.asarray(lengthwise[name], float)
            i, j = ends[:, 0], ends[:, 1]
            apart = np.asarray(nearest_image(system.positions[i] - system.positions[j], system.box), float)
            r = np.linalg.norm(apart, axis=1)
            unit = apart / r[:, None]
            across = (tension / r)[:, None, None] * (np.eye(d) - unit[:, :, None] * unit[:, None, :])
            m = len(ends)
            bond = np.repeat(np.arange(m), d)
            axes = np.tile(np.arange(d), m)
            shape, columns = (m, n * d), (d * np.repeat(i, d) + axes, d * np.repeat(j, d) + axes)
            ahead = sp.csr_array((unit.ravel(), (bond, columns[0])), shape=shape)
            behind = sp.csr_array((unit.ravel(), (bond, columns[1])), shape=shape)
            rows.append(ahead - behind)
            spread = sp.csr_array(
                (np.ones(m * d), (np.arange(m * d), columns[0])), shape=(m * d, n * d)
            ) - sp.csr_array((np.ones(m * d), (np.arange(m * d), columns[1])), shape=(m * d, n * d))
            hessian = hessian + spread.T @ sp.block_diag(list(across), format="csr") @ spread
            start += m
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
        if self.matrix is None or not self._factorise:
            return None
        scale = float(self._bounds[0]) or 1.0
        try:
            return _Factor(self.matrix, np.asarray(self.null.motions), self.primal, 0.0, scale)
        except RuntimeError:  # singular, shift and all
            return None

    @functools.cached_property
    def equations(self) -> Any:
        """A, (m, primal) sparse, in units of the law's stiffness, of what is free."""
        return self.matrix[self.primal :, : self.primal].tocsr() if self.matrix is not None else None

    @functools.cached_property
    def redundant(self) -> int:
        """How many equations repeat others, to first order."""
        A = self.equations
        if A is None or not A.shape[0]:
            return 0
        kept = A[self.moves[self.primal :]]
        _, labels = connected_components(kept @ kept.T, directed=False) if kept.shape[0] else (0, np.zeros(0, int))
        repeated = 0
        for label in np.unique(labels):
            block = kept[labels == label]
            columns = np.unique(block.indices)
            sizes = np.linalg.svd(block[:, columns].toarray(), compute_uv=False)
            repeated += block.shape[0] - int(np.sum(sizes > REPEATED * max(sizes[0], 1e-300)))
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
        """The columns of (m, c), or one (m,), without what is held and off the motions that nothing holds."""
        rows = columns.reshape(columns.shape[0], -1)
        found = np.where(self.moves[: len(rows), None], rows, 0.0)
        motions = np.asarray(self.null.motions)
        if len(motions):
            motions = motions.reshape(len(motions), -1)
            k = motions.shape[1]
            found[:k] -= motions.T @ (motions @ found[:k])
        return found.reshape(columns.shape)

    def solve_many(self, columns: np.ndarray, rtol: float, to: float = 1e-12) -> tuple[np.ndarray, SolveStats]:
        units = np.where(np.arange(self.size) < self.primal, 1.0, self.unit)[:, None]
        x, stats = super().solve_many(units * columns, rtol, to)
        return units * x, dataclasses.replace(stats, solver="sparse KKT factor")

    def unflat(self, vector: np.ndarray) -> Unknowns:
        """Of (primal,), without multipliers, or of (m,) with them."""
        like = self.x if vector.size == self.size else dataclasses.replace(self.x, multipliers=None)
        found = unflat(vector, like)
        if vector.size == self.size or self.x.multipliers is None:
            return found
        return dataclasses.replace(found, multipliers=jax.tree.map(np.zeros_like, self.x.multipliers))

    def solve_unknowns(self, b: Unknowns, rtol: float) -> tuple[Unknowns, float, Status]:
        """K x = b, as ``solve``; multipliers in their own units."""
        if self.factor is None:
            x, residual, code = _iterated(self.system, self.x, self.null, jax.tree.map(jnp.asarray, b), rtol)
            return x, float(residual), Status(int(code))
        x, stats = self.solve_many(flat(b)[:, None], max(rtol, 1e-10), to=1e-15)
        return self.unflat(x[:, 0]), float(stats.residual[0, 0]), Status(int(stats.status[0, 0]))

    def direction(self, b: np.ndarray, shift: float) -> np.ndarray:
        """About K^-1 b, (m,), with a shift on the diagonal of H_L, in units of the law's stiffness: a Newton step."""
        if self.matrix is not None and self._factorise:
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
        return splu(sp.csc_array(square + off + SHIFT**1.5 * (bound(square) or 1.0) * sp.eye_array(A.shape[0])))

    def tangent(self, columns: np.ndarray) -> np.ndarray:
        """The columns of (primal, c), or one, off what is held, off the equations and off free motions."""
        found = self.project(columns.reshape(columns.shape[0], -1))
        A = self.equations
        if A.shape[0]:
            for _ in range(2):
                found = self.project(found - A.T @ self._normal.solve(A @ found))
        return found.reshape(columns.shape)

    def lowest(self, k: int = 1, floor: float = 0.0) -> Spectrum:
        """The k lowest modes on the tangent space; of a stiffness below ``floor`` the sign tells nothing."""
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


def about_to_switch(system: System, multipliers: Any, null: NullSpace, max_force: float) -> int:
    """How many coordinates are at a bound that does not push them, or so near to one that the force left could bring
    them there: on one side of the minimum's parameters they are held, on the other free. Host code.
    """
    low, high = (jax.tree.map(np.asarray, side) for side in bounds(system, system.params))
    at_low, at_high = (jax.tree.map(np.asarray, side) for side in at_bounds(system))
    x = unknowns_of(system, multipliers)
    slope = lagrangian_slope(system, x, own_params(system))
    length, stiffness = (float(s) for s in scales(system))
    loose = {"positions": np.asarray(null.rattlers)[:, None] | np.asarray(pinned(system))}
    count = 0
    for name, value, along in (
        ("positions", x.positions, slope.positions),
        *((k, (x.params or {})[k], (slope.params or {})[k]) for k in x.params or {}),
    ):

        def part(side: Unknowns, name: str = name) -> Any:
            return side.positions if name == "positions" else (side.params or {})[name]

        value, along = np.asarray(value, float), np.asarray(along, float)
        held = part(at_low) | part(at_high)
        weak = held & (np.abs(along) <= WEAK * max_force + SHIFT * stiffness * length)
        gap = np.minimum(value - part(low), part(high) - value)
        close = ~held & (gap <= WEAK * max_force / stiffness + SHIFT * length)
        count += int(np.sum((weak | close) & ~loose.get(name, False)))
    return count
