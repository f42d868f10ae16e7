"""This module provides the linear system at a constrained minimum, as an operator.

The module also finds the null space of the Hessian there, converts unknowns (positions, relaxed
parameters, multipliers) to vectors, and counts the constraints that are about to switch on or off.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.compilation import compiled
from mdsens._util.probe import chirp
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
from mdsens.mechanics.unknowns import Unknowns, scaled
from mdsens.model.system import System

__all__ = [
    "about_to_switch",
    "constrained_null_space",
    "kkt_operator",
]

# A force on a bound below this many times the largest force left on a particle counts as zero.
WEAK = 10.0


def constrained_null_space(
    system: System, net: Network, null: NullSpace, multipliers: dict[str, jax.Array] | None
) -> NullSpace:
    """Return the null space of the Hessian at a constrained minimum.

    The null space consists of the displacements of rattlers, and of the rigid motions that the
    constraints allow. Equations between particles of which one is a rattler are dropped: their
    multipliers are fixed. The function does not work inside ``jax.jit``.

    Args:
      system: the backbone (the system without the contacts of rattlers).
      net: the contact network of the system.
      null: the null space without constraints.
      multipliers: multipliers of the equations, by constraint name. The tension of a rigid bond, a
        multiplier, gives a pendulum its stiffness.
    """
    active = active_set(system)
    rattlers = np.asarray(null.rattlers)
    stuck = np.asarray(active.positions)
    of_rattlers: dict[str, Any] = {}
    for c in system.constraints:
        if isinstance(c, RigidBonds):
            ends = np.asarray(c.bonds)
            of_rattlers[c.name] = jnp.asarray(rattlers[ends[:, 0]] | rattlers[ends[:, 1]])
    # By the name of each constraint with equations, which of them are dropped; without evaluating
    # the equations.
    shapes = jax.eval_shape(lambda s: equations(s, s.positions, s.params), system)
    dropped = {
        name: of_rattlers.get(name, jnp.zeros(shape.shape, bool)) for name, shape in shapes.items()
    }
    # without labels, all particles but rattlers are one cluster
    labels = np.arange(rattlers.size) * 0 if null.labels is None else np.asarray(net.labels)
    whole = np.asarray(net.whole, float)
    wraps = np.asarray(net.wraps)
    axes = np.asarray(net.axes, float)
    motions: list[np.ndarray] = []
    for label in np.unique(labels[~rattlers]):
        members = np.flatnonzero((labels == label) & ~rattlers)
        axis = axes[label] if wraps[label] else None
        motions += left_motions(whole[members], axis, stuck[members], members, rattlers.size)
    n, d = system.positions.shape
    # reshaped for the case without motions, whose array has the shape (0,)
    rows = np.array(motions).reshape(-1, n, d)
    if not system.potential.listed and len(rows):
        rows = _without_stiffness(system, rows, multipliers)
    return NullSpace(
        null.rattlers,
        jnp.asarray(labels),
        null.counts,
        motions=jnp.asarray(rows, system.positions.dtype),
        active_set=Unknowns(active.positions, multipliers=dropped or None, params=active.params),
    )


def _without_stiffness(
    system: System, rows: np.ndarray, multipliers: dict[str, jax.Array] | None
) -> np.ndarray:
    """Return the combinations of rigid motions that have no stiffness under the constraints.

    The stiffness is that of the Hessian of the Lagrangian. An external field, or a rigid bond under
    tension in such a field, may give other combinations a stiffness.

    Args:
      rows: (k, n, d) orthonormal rigid motions of the n particles.
      multipliers: multipliers of the constraint equations, by constraint name.
    """
    # the norm of H times a trial vector is the scale for zero
    probe = chirp((1, *rows[0].shape), float, np)
    trials = jnp.asarray(np.concatenate([rows, probe]))
    *images, probe_image = np.asarray(_hessian_products(system, multipliers, trials))
    scale = np.linalg.norm(probe_image) / np.linalg.norm(probe)
    # columns of u are combinations of the motions, each with the norm of the force that it makes
    u, stiffness, _ = np.linalg.svd(np.array(images), full_matrices=False)
    kept = u[:, stiffness <= np.finfo(float).eps ** 0.5 * scale]
    return np.tensordot(kept.T, rows, axes=1)


@compiled
def _hessian_products(
    system: System, multipliers: dict[str, jax.Array] | None, rows: jax.Array
) -> jax.Array:
    """Multiply the Hessian of the Lagrangian, d2L/dR2, by each of k displacements, (k, n d).

    Args:
      multipliers: multipliers of the constraint equations, by constraint name.
      rows: (k, n, d) the displacements.
    """

    def slope(R: jax.Array) -> jax.Array:
        x = dataclasses.replace(unknowns_of(system, multipliers), positions=R)
        return lagrangian_gradient(system, x, own_params(system)).positions

    product = jax.linearize(slope, system.positions)[1]
    return jax.lax.map(lambda v: product(v).ravel(), rows)


def kkt_operator(
    system: System, x: Unknowns, null: NullSpace, shift: jax.Array | float = 0.0
) -> tuple[Operator, jax.Array]:
    """Return the linear system at a constrained minimum as an operator, and the multipliers' unit.

    The operator maps changes of positions, relaxed parameters and multipliers to changes of the
    derivatives of the Lagrangian. The unit of the multipliers is the stiffness of the potential,
    see ``natural_units``. The operator is declared positive semidefinite where no constraint has
    equations.

    Args:
      x: positions, relaxed parameters and multipliers at the minimum.
      null: the null space, whose fixed coordinates are left out.
      shift: a positive number that is added to the diagonal of the second derivative H_L of the
        Lagrangian by positions and relaxed parameters; 0 for the derivative itself.
    """
    unit = natural_units(system)[1]
    # The relaxed parameters are unknowns; the others are constant here.
    constant_params = {k: v for k, v in system.params.items() if k not in (x.params or {})}
    jacobian = jax.linearize(lambda y: lagrangian_gradient(system, y, constant_params), x)[1]

    def product(v: Unknowns) -> Unknowns:
        free = null.free(v)
        # the unit on both sides, for columns of multipliers and rows of equations: symmetric
        image = scaled(jacobian(scaled(free, unit)), unit)
        # the shift is for H_L alone, so that it is zero for the multipliers
        diagonal = scaled(jax.tree.map(lambda leaf: shift * leaf, free), 0.0)
        return null.free(jax.tree.map(jnp.add, image, diagonal))

    operator = Operator(
        product,
        symmetric=True,
        positive_semidefinite=x.multipliers is None,
        project=null.project,
    )
    return operator, unit


def about_to_switch(
    system: System, multipliers: dict[str, jax.Array] | None, null: NullSpace, max_force: float
) -> int:
    """Count the coordinates that are about to meet or to leave a bound, such as a wall.

    The count includes coordinates at a bound that exerts no force on them, and coordinates so near
    to a bound that the force left on a particle could move them there. Such a coordinate is
    constrained for a change of the parameters in one direction, and free in the opposite direction.
    The count also includes coordinates at which several walls meet, since after a change of the
    parameters any one of these walls may be the one that limits the coordinate. The function does
    not work inside ``jax.jit``.

    Args:
      system: the system at the minimum.
      multipliers: multipliers of the constraint equations, by constraint name.
      null: the null space, which names the rattlers; rattlers do not count.
      max_force: the largest force that is left on a particle.
    """
    low, high = (jax.tree.map(np.asarray, side) for side in bounds(system, system.params))
    at_low, at_high = (jax.tree.map(np.asarray, side) for side in at_bounds(system))
    x = unknowns_of(system, multipliers)
    slope = lagrangian_gradient(system, x, own_params(system))
    length, stiffness = (float(s) for s in natural_units(system))
    # Below these a force or a distance counts as zero: from the force left, and from round-off.
    zero_force = WEAK * max_force + SHIFT * stiffness * length
    zero_gap = WEAK * max_force / stiffness + SHIFT * length
    count = 0
    for name in ("positions", *(x.params or {})):

        def part(side: Unknowns, name: str = name) -> Any:
            return side.positions if name == "positions" else (side.params or {})[name]

        value = np.asarray(part(x), float)
        force = np.asarray(part(slope), float)  # of the bound, for a coordinate at a bound
        at_bound = part(at_low) | part(at_high)
        weak = at_bound & (np.abs(force) <= zero_force)
        gap = np.minimum(value - part(low), part(high) - value)
        close = ~at_bound & (gap <= zero_gap)
        switching = weak | close
        if name == "positions":
            ignored = np.asarray(null.rattlers)[:, None] | np.asarray(pinned(system))
            switching = (switching | np.asarray(between_bounds(system))) & ~ignored
        count += int(np.sum(switching))
    return count
