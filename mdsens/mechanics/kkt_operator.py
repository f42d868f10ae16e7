"""The unknowns of a constrained minimum as vectors, and their linear system as products, with what
is known beforehand: its null space, and which constraints are about to switch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens.constraints import RigidBonds
from mdsens.implicit.linear import Operator
from mdsens.implicit.linear.sparse_ldl import SHIFT
from mdsens.mechanics.contacts import Network
from mdsens.mechanics.lagrangian import (
    active_set,
    at_bounds,
    between_bounds,
    bounds,
    equations,
    lagrangian_gradient,
    own_params,
    pinned,
    unknowns_of,
)
from mdsens.mechanics.null_space import NullSpace, left_motions
from mdsens.mechanics.units import natural_units
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.system import System

__all__ = [
    "about_to_switch",
    "constrained_null_space",
    "flat",
    "kkt_operator",
    "parts_of",
    "scaled",
    "unflat",
]

WEAK = 10.0  # times the largest force left: a push on a bound below it is none


def parts_of(x: Unknowns) -> list[Any]:
    """Positions, relaxed parameters, multipliers: in the order of ``flat``."""
    return [x.positions, *jax.tree.leaves(x.params), *jax.tree.leaves(x.multipliers)]


def flat(x: Unknowns, many: bool = False) -> np.ndarray:
    """Positions, relaxed parameters and multipliers as one vector (m,), or as columns (m, c) of
    many.
    """
    leaves = [np.asarray(leaf) for leaf in parts_of(x)]
    if not many:
        return np.concatenate([leaf.ravel() for leaf in leaves])
    return np.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1).T


def unflat(vector: np.ndarray, like: Unknowns, many: bool = False) -> Unknowns:
    """The inverse of ``flat``; ``like`` has the shapes of one."""
    rows, parts, start = vector.T if many else vector, [], 0
    for leaf in parts_of(like):
        size, lead = int(np.size(leaf)), rows.shape[:-1]
        parts.append(
            rows[..., start : start + size].reshape((*lead, *np.shape(leaf))).astype(leaf.dtype)
        )
        start += size
    of_params, of_multipliers = (
        jax.tree.structure(like.params),
        jax.tree.structure(like.multipliers),
    )
    k = 1 + of_params.num_leaves
    return Unknowns(
        parts[0],
        None,
        jax.tree.unflatten(of_multipliers, parts[k:]),
        jax.tree.unflatten(of_params, parts[1:k]),
    )


def constrained_null_space(
    system: System, net: Network, null: NullSpace, multipliers: Any
) -> NullSpace:
    """The null space of the constrained Hessian: rattlers, and the rigid motions that constraints
    leave. Host code.

    Equations that bind rattlers alone count as held, as the rattlers do.

    Args:
      multipliers: of the equations; a rigid bond's tension is what holds a pendulum.
    """
    mask, loose = active_set(system), np.asarray(null.rattlers)
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
        motions += left_motions(whole[some], bool(wraps[label]), stuck[some], some, loose.size)
    n, d = system.positions.shape
    rows = np.array(motions).reshape(-1, n, d)
    if not system.potential.pairwise and len(rows):
        rows = _costless(system, rows, multipliers)
    plain = NullSpace(null.rattlers, jnp.asarray(labels), null.counts)
    found = jnp.asarray(rows, system.positions.dtype)
    return dataclasses.replace(
        plain, motions=found, active_set=Unknowns(mask.positions, None, drops, mask.params)
    )


def _costless(system: System, rows: np.ndarray, multipliers: Any) -> np.ndarray:
    """Those combinations of orthonormal motions that the Lagrangian's Hessian finds free: a field,
    or a bond that hangs in one, may hold the others.
    """
    probe = np.cos(np.arange(rows[0].size) ** 2.0).reshape(1, *rows[0].shape)
    *images, of_probe = np.asarray(
        _images(system, multipliers, jnp.asarray(np.concatenate([rows, probe])))
    )
    scale = np.linalg.norm(of_probe) / np.linalg.norm(probe)
    u, costs, _ = np.linalg.svd(np.array(images), full_matrices=False)
    kept = u[:, costs <= np.finfo(float).eps ** 0.5 * scale]
    return np.tensordot(kept.T, rows, axes=1)


@jax.jit
def _images(system: System, multipliers: Any, rows: jax.Array) -> jax.Array:
    def slope(R: jax.Array) -> jax.Array:
        x = dataclasses.replace(unknowns_of(system, multipliers), positions=R)
        return lagrangian_gradient(system, x, own_params(system)).positions

    product = jax.linearize(slope, system.positions)[1]
    return jax.lax.map(lambda v: product(v).ravel(), rows)


def scaled(x: Unknowns, by: Any) -> Unknowns:
    """Multipliers in units of a force a length, so that all rows of the system are alike."""
    return dataclasses.replace(
        x, multipliers=jax.tree.map(lambda leaf: (by * leaf).astype(leaf.dtype), x.multipliers)
    )


def kkt_operator(system: System, x: Unknowns, null: NullSpace) -> tuple[Operator, Any]:
    """The system as products, with multipliers in units of the potential's stiffness, and that unit.

    Positive semi-definite where no constraint is an equation.
    """
    unit = natural_units(system)[1]
    own = {k: v for k, v in system.params.items() if k not in (x.params or {})}
    jacobian = jax.linearize(lambda y: lagrangian_gradient(system, y, own), x)[1]

    def product(v: Unknowns) -> Unknowns:
        return null.free(scaled(jacobian(scaled(null.free(v), unit)), unit))

    definite = x.multipliers is None
    return (
        Operator(product, symmetric=True, positive_semidefinite=definite, project=null.project),
        unit,
    )


def about_to_switch(system: System, multipliers: Any, null: NullSpace, max_force: float) -> int:
    """How many coordinates are at a bound that does not push them, or so near to one that the force
    left could bring them there: on one side of the minimum's parameters they are held, on the other
    free. And those that several walls hold, by one or by another. Host code.
    """
    low, high = (jax.tree.map(np.asarray, side) for side in bounds(system, system.params))
    at_low, at_high = (jax.tree.map(np.asarray, side) for side in at_bounds(system))
    x = unknowns_of(system, multipliers)
    slope = lagrangian_gradient(system, x, own_params(system))
    length, stiffness = (float(s) for s in natural_units(system))
    loose = {"positions": np.asarray(null.rattlers)[:, None] | np.asarray(pinned(system))}
    count = 0
    for name, value, along in (
        ("positions", x.positions, slope.positions),
        *((k, (x.params or {})[k], (slope.params or {})[k]) for k in x.params or {}),
    ):

        def part(side: Unknowns, name: str = name) -> Any:
            return side.positions if name == "positions" else (side.params or {})[name]

        value, along = np.asarray(value, float), np.asarray(along, float)
        active_set = part(at_low) | part(at_high)
        weak = active_set & (np.abs(along) <= WEAK * max_force + SHIFT * stiffness * length)
        gap = np.minimum(value - part(low), part(high) - value)
        close = ~active_set & (gap <= WEAK * max_force / stiffness + SHIFT * length)
        switching = (
            weak | close | (np.asarray(between_bounds(system)) if name == "positions" else False)
        )
        count += int(np.sum(switching & np.logical_not(loose.get(name, False))))
    return count
