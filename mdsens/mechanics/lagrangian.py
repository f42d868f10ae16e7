"""The energy under constraints: active set, equations g = 0, and dL/dx of L = U + lambda . g.

At a constrained minimum a coordinate is either free, and dL/dx is zero along it, or constrained:
pinned, or at a bound. The value of a constrained coordinate depends on the parameters through its
constraint alone; dL/dx along it is the force of the constraint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.lattice import nearest_image
from mdsens.constraints import Pinned, Wall
from mdsens.mechanics.forces import energy_gradient
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.system import System, box_at, diameters_at, potential_energy

__all__ = [
    "at_bounds",
    "bounds",
    "equations",
    "active_set",
    "lagrangian_gradient",
    "multipliers_at",
    "own_params",
    "pinned",
    "constrained_coordinates",
    "relaxed",
    "between_bounds",
    "switch_times",
    "supports",
    "unknowns_of",
    "with_unknowns",
]

Params = Mapping[str, Any]
# Distance from its bound, in units of round-off of the two, within which a coordinate is at it.
TOUCHING = 64.0


def relaxed(system: System) -> tuple[str, ...]:
    """Return the names of the potential's parameters that constraints relax, which are unknowns."""
    # a dict removes duplicates and keeps the order
    return tuple(dict.fromkeys(name for c in system.constraints for name in c.relaxes))


def own_params(system: System) -> dict[str, jax.Array]:
    """Return the parameters by which derivatives can be taken: those that are no unknowns."""
    unknown = relaxed(system)
    return {name: value for name, value in system.params.items() if name not in unknown}


def unknowns_of(system: System, multipliers: dict[str, jax.Array] | None = None) -> Unknowns:
    """Return the system's positions and relaxed parameters, with the multipliers of its equations.

    Args:
      multipliers: multipliers by the name of the constraint; zero for names that are missing; None
        for all zero.
    """
    x = _primal(system)
    g = equations(system, system.positions, system.params)
    known = multipliers or {}
    all_multipliers = {
        name: jnp.asarray(known[name], value.dtype) if name in known else jnp.zeros_like(value)
        for name, value in g.items()
    }
    return Unknowns(x.positions, None, all_multipliers or None, x.params)


def _primal(system: System) -> Unknowns:
    """Return the system's positions and relaxed parameters, without multipliers."""
    names = relaxed(system)
    return Unknowns(system.positions, params={name: system.params[name] for name in names} or None)


def with_unknowns(system: System, x: Unknowns, params: Params) -> System:
    """Return the system at other unknowns and parameters, with the same neighbors. Traceable."""
    return system.replace(positions=x.positions, params={**params, **(x.params or {})})


def pinned(system: System) -> jax.Array:
    """Return a mask (n, d) of the coordinates that are pinned, so that they never move."""
    mask = jnp.zeros(system.positions.shape, bool)
    for c in system.constraints:
        constraint_mask = c.pinned()
        mask = mask if constraint_mask is None else mask | constraint_mask
    return mask


def bounds(system: System, params: Params) -> tuple[Unknowns, Unknowns]:
    """Return lower and upper bounds of positions and relaxed parameters; infinite if unbounded."""
    shape = system.positions.shape
    dtype = system.positions.dtype
    low = jnp.full(shape, -jnp.inf, dtype)
    high = jnp.full(shape, jnp.inf, dtype)
    least = {name: jnp.full_like(system.params[name], -jnp.inf) for name in relaxed(system)}
    for c in system.constraints:
        constraint_bounds = c.bounds(params, diameters_at(system, params), shape)
        if constraint_bounds is not None:
            # of several bounds the tightest counts
            low = jnp.maximum(low, constraint_bounds.lower)
            high = jnp.minimum(high, constraint_bounds.upper)
        floor = c.least()
        if floor is not None:
            least = {k: jnp.maximum(v, floor) if k in c.relaxes else v for k, v in least.items()}
    most = {name: jnp.full_like(value, jnp.inf) for name, value in least.items()}
    return Unknowns(low, params=least or None), Unknowns(high, params=most or None)


def at_bounds(system: System) -> tuple[Unknowns, Unknowns]:
    """Return masks of positions and relaxed parameters at their lower and at their upper bound."""
    low, high = bounds(system, system.params)
    x = _primal(system)
    at_low = jax.tree.map(lambda a, b: _meets(a, b, 1.0), x, low)
    at_high = jax.tree.map(lambda a, b: _meets(a, b, -1.0), x, high)
    return at_low, at_high


def _meets(x: jax.Array, bound: jax.Array, side: float) -> jax.Array:
    """Whether coordinates are at a bound or beyond: side = 1 for a lower, -1 for an upper bound."""
    # An infinite bound is never met, though its tolerance would be infinite, too.
    near = TOUCHING * jnp.finfo(x.dtype).eps * jnp.maximum(jnp.abs(bound), jnp.abs(x))
    return jnp.isfinite(bound) & (side * (x - bound) <= jnp.where(jnp.isfinite(bound), near, 0.0))


def between_bounds(system: System) -> jax.Array:
    """Return a mask (n, d) of the coordinates that more than one wall constrains.

    How the force is shared between these walls is not determined.
    """
    walls = jnp.zeros(system.positions.shape, int)
    for c in system.constraints:
        diameters = diameters_at(system, system.params)
        constraint_bounds = c.bounds(system.params, diameters, system.positions.shape)
        if constraint_bounds is not None:
            walls += _meets(system.positions, constraint_bounds.lower, 1.0).astype(int)
            walls += _meets(system.positions, constraint_bounds.upper, -1.0).astype(int)
    return (walls > 1) & ~pinned(system)


def active_set(system: System) -> Unknowns:
    """Return masks of the coordinates and relaxed parameters that are pinned or at a bound."""
    low, high = at_bounds(system)
    both = jax.tree.map(jnp.logical_or, low, high)
    return Unknowns(both.positions | pinned(system), params=both.params)


def constrained_coordinates(system: System, params: Params) -> Unknowns:
    """Compute the constrained coordinates at other parameters; free coordinates are unchanged.

    A coordinate at a bound moves with the bound, a pinned one is constant. The active set is that
    of the system as it is. Differentiable by ``params``.
    """
    low, high = bounds(system, {**system.params, **params})
    # Which coordinates are at a bound is a comparison, and has no derivative.
    at_low, at_high = at_bounds(jax.lax.stop_gradient(system))
    x = _primal(system)

    def place(
        x: jax.Array, low: jax.Array, high: jax.Array, at_low: jax.Array, at_high: jax.Array
    ) -> jax.Array:
        # The first two where() keep infinite bounds out of the derivative, where they make NaN.
        low = jnp.where(at_low, low, x)
        high = jnp.where(at_high, high, x)
        return jnp.where(at_low, low, jnp.where(at_high, high, x))

    placed = jax.tree.map(place, x, low, high, at_low, at_high)
    return Unknowns(
        jnp.where(pinned(system), system.positions, placed.positions), params=placed.params
    )


def equations(system: System, positions: jax.Array, params: Params) -> dict[str, jax.Array]:
    """Compute the values g of the constraints that have equations g = 0, by constraint name."""
    box = box_at(system, params)
    values = {}

    def displacement(a: jax.Array, b: jax.Array) -> jax.Array:
        return nearest_image(a - b, box)

    for c in system.constraints:
        g = c.residuals(positions, params, displacement)
        if g is not None:
            values[c.name] = g
    return values


def lagrangian_gradient(system: System, x: Unknowns, params: Params) -> Unknowns:
    """Compute dL/dR and dL/dp by all coordinates, constrained ones too, and the residuals g.

    p are the parameters that constraints relax with the positions; g = 0 are the equations of the
    constraints.
    """
    all_params = {**params, **(x.params or {})}
    by_positions = energy_gradient(system, all_params)(x.positions)
    by_params = None
    if x.params is not None:

        def energy(relaxed_params: dict[str, jax.Array]) -> jax.Array:
            return potential_energy(system, x.positions, {**params, **relaxed_params})

        by_params = jax.grad(energy)(x.params)
    if x.multipliers is None:
        return Unknowns(by_positions, params=by_params)

    def constraint_values(
        positions: jax.Array, relaxed_params: dict[str, jax.Array] | None
    ) -> dict[str, jax.Array]:
        return equations(system, positions, {**params, **(relaxed_params or {})})

    # dL/dx = dU/dx + (dg/dx)^T lambda, the product with the transpose by reverse mode
    g, transpose = jax.vjp(constraint_values, x.positions, x.params)
    of_positions, of_params = transpose(x.multipliers)
    if by_params is not None:
        by_params = jax.tree.map(jnp.add, by_params, of_params)
    return Unknowns(by_positions + of_positions, None, g, by_params)


def multipliers_at(system: System, x: Unknowns, params: Params) -> dict[str, jax.Array]:
    """Compute the multiplier of each constraint by name; zero where a wall or pin exerts no force.

    Walls at the same position share the force equally. Of two opposite walls that touch the same
    particle, the one that can push in the direction of the force takes all of it.

    Args:
      system: the system, from which follows which coordinates are at their bounds.
      x: the unknowns.
      params: the parameters.
    """
    constant = jax.lax.stop_gradient(system)
    low, high = (side.positions for side in at_bounds(constant))
    force = lagrangian_gradient(system, x, params).positions
    # By ``above`` of a wall, whether particles are above it: the force on walls of that side. Where
    # a wall of the other side touches the particle too, only the part of one sign.
    push = {
        True: jnp.where(high, jnp.maximum(force, 0.0), force),
        False: jnp.where(low, jnp.minimum(force, 0.0), force),
    }
    stuck = pinned(system)
    walls = [c for c in system.constraints if isinstance(c, Wall)]
    tight = {c.name: _is_tightest(constant, c) for c in walls}
    sharing = {
        above: sum((tight[c.name] for c in walls if c.above is above), 0 * force) for above in push
    }
    multipliers = {}
    for c in system.constraints:
        match c:
            case Pinned():
                multipliers[c.name] = jnp.where(c.mask, force, 0.0)
            case Wall():
                touches = (low if c.above else high) & ~stuck & tight[c.name]
                share = push[c.above] / jnp.maximum(sharing[c.above], 1.0)
                share = jnp.where(touches, share, 0.0)[:, c.axis]
                # not -share, which would make -0 of 0
                multipliers[c.name] = share if c.above else 0.0 - share
            case _:
                multipliers[c.name] = (x.multipliers or {})[c.name]
    return multipliers


def _is_tightest(system: System, wall: Wall) -> jax.Array:
    """Return a mask (n, d), True where this wall is the tightest bound of the walls on its side."""
    diameters = diameters_at(system, system.params)
    wall_bounds = wall.bounds(system.params, diameters, system.positions.shape)
    low, high = bounds(system, system.params)
    if wall.above:
        bound = wall_bounds.lower
        tightest = low.positions
    else:
        bound = wall_bounds.upper
        tightest = high.positions
    return jnp.isfinite(bound) & (bound == tightest)


def switch_times(
    system: System,
    place: tuple[Unknowns, Params],
    rate: tuple[Unknowns, Params],
    loose: jax.Array | np.ndarray,
) -> jax.Array:
    """Compute when each coordinate meets its bound, or loses the force of it, along a path.

    The result is the path parameter t of each such event to first order; inf without an event.

    Args:
      place: unknowns and parameters at t = 0.
      rate: derivatives of unknowns and parameters by t.
      loose: (n,) True for particles that are left out.
    """
    low, high = at_bounds(jax.lax.stop_gradient(system))
    stuck = pinned(system) | jnp.asarray(loose)[:, None]

    def margins(x: Unknowns, params: Params) -> tuple[Unknowns, Unknowns, Unknowns]:
        """Distances above the lower and below the upper bounds, and the forces of the bounds."""
        lower, upper = bounds(system, {**system.params, **params})
        slope = lagrangian_gradient(system, x, params)
        here = Unknowns(x.positions, params=x.params)

        def gap(a: jax.Array, b: jax.Array) -> jax.Array:
            both = jnp.isfinite(a) & jnp.isfinite(b)  # the derivative of inf - x would be NaN
            return jnp.where(both, a, 0.0) - jnp.where(both, b, 0.0)

        above_lower = jax.tree.map(gap, here, lower)
        below_upper = jax.tree.map(gap, upper, here)
        return above_lower, below_upper, Unknowns(slope.positions, params=slope.params)

    values, rates = jax.jvp(margins, place, rate)

    def when(value: jax.Array, speed: jax.Array, counts: jax.Array) -> jax.Array:
        """Time at which a value becomes zero; inf where it is constant or does not count."""
        return jnp.where(counts & (speed != 0), -value / jnp.where(speed == 0, 1.0, speed), jnp.inf)

    lower, upper = bounds(system, system.params)
    times = []
    for field in ("positions", *((low.params or {}).keys())):

        def part(x: Unknowns, field: str = field) -> Any:
            return x.positions if field == "positions" else (x.params or {})[field]

        # A free coordinate meets a bound where its distance becomes zero; one at a bound leaves it
        # where dL/dx along it, the force of the bound, becomes zero.
        at_bound = part(low) | part(high)
        moves = ~stuck if field == "positions" else jnp.ones_like(at_bound)
        can_meet_lower = moves & ~at_bound & jnp.isfinite(part(lower))
        can_meet_upper = moves & ~at_bound & jnp.isfinite(part(upper))
        times.append(when(part(values[0]), part(rates[0]), can_meet_lower))
        times.append(when(part(values[1]), part(rates[1]), can_meet_upper))
        times.append(when(part(values[2]), part(rates[2]), moves & at_bound))
    return jnp.concatenate([jnp.ravel(t) for t in times])


def supports(system: System) -> tuple[jax.Array, jax.Array]:
    """Count the pinned coordinates of each particle, and the walls that it touches.

    Returns:
      (number of pinned coordinates, number of walls), (n,) each.
    """
    low, high = at_bounds(system)
    stuck = pinned(system)
    touching = jnp.sum((low.positions | high.positions) & ~stuck, axis=1)
    return jnp.sum(stuck, axis=1).astype(jnp.int32), touching.astype(jnp.int32)
