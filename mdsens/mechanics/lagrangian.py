"""This module computes the energy under constraints, by the Lagrangian L = U + lambda . g.

U is the energy, g = 0 are the equations of the constraints, with multipliers lambda, and x are the
positions and the parameters that relax with them. At a constrained minimum a coordinate of x is
either free, and dL/dx is zero along it, or constrained: pinned, or at a bound such as a wall. The
value of a constrained coordinate depends on the parameters through its constraint alone; dL/dx
along this coordinate is the force of the constraint. The active set is the set of all constrained
coordinates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens.constraints import Pinned, Wall
from mdsens.mechanics.forces import energy_gradient
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.system import System, box_at, diameters_at, displacement_in, potential_energy

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
    """Return the names of the potential's parameters that relax together with the positions.

    A constraint makes a parameter relax, so that the parameter is an unknown.
    """
    # a dict removes duplicates and keeps the order
    return tuple(dict.fromkeys(name for c in system.constraints for name in c.relaxes))


def own_params(system: System) -> dict[str, Any]:
    """Return the parameters of a system, without those that relax with the positions.

    These are the parameters by which derivatives can be taken.
    """
    unknown = relaxed(system)
    return {name: value for name, value in system.params.items() if name not in unknown}


def unknowns_of(system: System, multipliers: dict[str, jax.Array] | None = None) -> Unknowns:
    """Return the unknowns of a system: its positions, relaxed parameters and Lagrange multipliers.

    Relaxed parameters are those that relax with the positions; multipliers belong to the equations
    of the constraints.

    Args:
      multipliers: multipliers by the name of the constraint. A multiplier is zero where its name is
        missing; all are zero for None.
    """
    x = _primal(system)
    g = equations(system, system.positions, system.params)
    known = multipliers or {}
    all_multipliers = {
        name: jnp.asarray(known[name], value.dtype) if name in known else jnp.zeros_like(value)
        for name, value in g.items()
    }
    return Unknowns(x.positions, params=x.params, multipliers=all_multipliers or None)


def _primal(system: System) -> Unknowns:
    """Return the positions of a system and the parameters that relax with the positions."""
    names = relaxed(system)
    return Unknowns(system.positions, params={name: system.params[name] for name in names} or None)


def with_unknowns(system: System, x: Unknowns, params: Params) -> System:
    """Return the system with other positions and parameters, and with the same neighbor list.

    The function works inside ``jax.jit``.

    Args:
      x: the new unknowns: the positions, and the parameters that relax with them.
      params: the other new parameters, by name.
    """
    return system.replace(positions=x.positions, params={**params, **(x.params or {})})


def pinned(system: System) -> jax.Array:
    """Return a mask (n, d) of the particle coordinates that are pinned: they never move."""
    mask = jnp.zeros(system.positions.shape, bool)
    for c in system.constraints:
        constraint_mask = c.pinned()
        mask = mask if constraint_mask is None else mask | constraint_mask
    return mask


def bounds(system: System, params: Params) -> tuple[Unknowns, Unknowns]:
    """Return the lower and the upper bounds of the positions and of the parameters that relax.

    Walls are bounds of positions. A bound is infinite where there is none.
    """
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
    """Return masks of the coordinates at their lower bound, and of those at their upper bound.

    The coordinates are the positions, and the parameters that relax with them.
    """
    low, high = bounds(system, system.params)
    x = _primal(system)
    at_low = jax.tree.map(lambda a, b: _meets(a, b, 1.0), x, low)
    at_high = jax.tree.map(lambda a, b: _meets(a, b, -1.0), x, high)
    return at_low, at_high


def _meets(x: jax.Array, bound: jax.Array, side: float) -> jax.Array:
    """Return a mask of the coordinates x that are at their bound or beyond, up to round-off.

    Args:
      x: the coordinates.
      bound: the bound of each coordinate; infinite where there is none.
      side: 1 for lower bounds, -1 for upper bounds.
    """
    # An infinite bound is never met, though its tolerance would be infinite, too.
    near = TOUCHING * jnp.finfo(x.dtype).eps * jnp.maximum(jnp.abs(bound), jnp.abs(x))
    return jnp.isfinite(bound) & (side * (x - bound) <= jnp.where(jnp.isfinite(bound), near, 0.0))


def between_bounds(system: System) -> jax.Array:
    """Return a mask (n, d) of the coordinates of n particles that more than one wall constrains.

    Then it is not determined how these walls share the force on the coordinate.
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
    """Return masks of the coordinates that constraints fix: those that are pinned or at a bound.

    The coordinates are the positions, and the parameters that relax with them.
    """
    low, high = at_bounds(system)
    both = jax.tree.map(jnp.logical_or, low, high)
    return Unknowns(both.positions | pinned(system), params=both.params)


def constrained_coordinates(system: System, params: Params) -> Unknowns:
    """Compute where constraints put the coordinates of a system at other parameters.

    A coordinate at a bound moves with the bound, a pinned coordinate is constant, and free
    coordinates are unchanged. Which coordinates are fixed is decided at the present state of the
    system. The result can be differentiated by ``params``.

    Args:
      params: the other parameters, by name.

    Returns:
      the positions, and the parameters that relax with them.
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
        # a coordinate that touches both bounds follows the lower one
        return jnp.where(at_low, low, jnp.where(at_high, high, x))

    placed = jax.tree.map(place, x, low, high, at_low, at_high)
    return Unknowns(
        jnp.where(pinned(system), system.positions, placed.positions), params=placed.params
    )


def equations(system: System, positions: jax.Array, params: Params) -> dict[str, jax.Array]:
    """Compute the residuals g of the constraints that have equations g = 0, by constraint name."""
    displacement = displacement_in(system, box_at(system, params))
    values = {}
    for c in system.constraints:
        g = c.residuals(positions, params, displacement)
        if g is not None:
            values[c.name] = g
    return values


def lagrangian_gradient(system: System, x: Unknowns, params: Params) -> Unknowns:
    """Compute the derivatives of the Lagrangian L = U + lambda . g by all coordinates, and g.

    U is the energy; g = 0 are the equations of the constraints, with multipliers lambda. The
    coordinates are the positions R and the parameters p that relax with them, with dL/dR and dL/dp;
    coordinates that constraints fix are included.

    Args:
      x: the values of R, p and lambda.
      params: the parameters that do not relax, by name.

    Returns:
      dL/dR and dL/dp in the places of R and p, and the residuals g in the place of the multipliers.
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
    return Unknowns(by_positions + of_positions, params=by_params, multipliers=g)


def multipliers_at(system: System, x: Unknowns, params: Params) -> dict[str, jax.Array]:
    """Compute the Lagrange multiplier, the force, of each constraint of the system, by name.

    The multiplier of a wall or of a pinned coordinate is zero where no force acts on it. Walls at
    the same position share the force equally. Of two opposite walls that touch the same particle,
    the wall that can push in the direction of the force takes all of it.

    Args:
      system: the system, which decides which coordinates are at their bounds.
      x: the unknowns: positions, relaxed parameters and the multipliers of equations.
      params: the parameters that do not relax, by name.
    """
    # which coordinate is at which wall is decided by comparisons, which have no derivative
    constant = jax.lax.stop_gradient(system)
    low, high = (side.positions for side in at_bounds(constant))
    force = lagrangian_gradient(system, x, params).positions
    of_walls = _compute_wall_multipliers(constant, force, low, high)
    multipliers = {}
    for c in system.constraints:
        match c:
            case Pinned():
                multipliers[c.name] = jnp.where(c.mask, force, 0.0)
            case Wall():
                multipliers[c.name] = of_walls[c.name]
            case _:
                multipliers[c.name] = (x.multipliers or {})[c.name]
    return multipliers


def _compute_wall_multipliers(
    system: System, force: jax.Array, low: jax.Array, high: jax.Array
) -> dict[str, jax.Array]:
    """Compute the multiplier of each wall by name: the force with which it pushes each particle.

    Args:
      system: the system with its walls.
      force: (n, d) the force of all constraints together on each particle, dL/dR.
      low, high: (n, d) True for coordinates at their lower bound, and at their upper bound.
    """
    # By ``above`` of a wall, whether particles are above it: the force on walls of that side. Where
    # a wall of the other side touches the particle too, only the part of one sign.
    push = {
        True: jnp.where(high, jnp.maximum(force, 0.0), force),
        False: jnp.where(low, jnp.minimum(force, 0.0), force),
    }
    stuck = pinned(system)
    walls = [c for c in system.constraints if isinstance(c, Wall)]
    tight = {c.name: _is_tightest(system, c) for c in walls}
    # number of tightest walls of each side at each coordinate, by which the force is shared
    sharing = {
        above: sum((tight[c.name] for c in walls if c.above is above), 0 * force) for above in push
    }
    multipliers = {}
    for c in walls:
        touches = (low if c.above else high) & ~stuck & tight[c.name]
        share = push[c.above] / jnp.maximum(sharing[c.above], 1.0)
        # a wall bounds one coordinate of each particle: (n, d) becomes (n,)
        share = jnp.where(touches, share, 0.0)[:, c.axis]
        # dL/dR is negative where an upper wall pushes particles down, hence the sign;
        # not -share, which would make -0 of 0
        multipliers[c.name] = share if c.above else 0.0 - share
    return multipliers


def _is_tightest(system: System, wall: Wall) -> jax.Array:
    """Return a mask (n, d) of the coordinates for which ``wall`` is the tightest bound.

    It is compared with the other walls that bound these coordinates in the same direction.
    """
    diameters = diameters_at(system, system.params)
    wall_bounds = wall.bounds(system.params, diameters, system.positions.shape)
    low, high = bounds(system, system.params)
    if wall.above:
        bound = wall_bounds.lower
        tightest = low.positions
    else:
        bound = wall_bounds.upper
        tightest = high.positions
    # The tightest bound is a copy of one of the bounds, so that equality is exact. isfinite()
    # leaves out the axes that the wall does not bound, where inf equals inf.
    return jnp.isfinite(bound) & (bound == tightest)


def switch_times(
    system: System,
    place: tuple[Unknowns, Params],
    rate: tuple[Unknowns, Params],
    loose: jax.Array | np.ndarray,
) -> jax.Array:
    """Compute when each coordinate meets its bound, or loses the force of its bound, along a path.

    A bound is a wall for example. Unknowns and parameters change along the path with the path
    parameter t. The result is the value of t at each such event, to first order; inf without an
    event.

    Args:
      place: unknowns (positions, relaxed parameters, multipliers) and parameters at t = 0.
      rate: derivatives of unknowns and parameters by t.
      loose: (n,) True for particles that are left out.
    """
    low, high = at_bounds(jax.lax.stop_gradient(system))
    stuck = pinned(system) | jnp.asarray(loose)[:, None]

    def margins(x: Unknowns, params: Params) -> tuple[Unknowns, Unknowns, Unknowns]:
        """Compute the distances of coordinates from their bounds, and the forces of the bounds.

        Returns:
          the distance above the lower bound, that below the upper bound, and the force.
        """
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
        """Compute the path parameter t at which a quantity that is linear in t becomes zero.

        The quantity is ``value`` at t = 0, and its derivative by t is ``speed``. The result is inf
        where ``speed`` is zero, or where ``counts`` is False.
        """
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
    """Count the pinned coordinates of each particle, and the walls that each particle touches.

    Returns:
      (number of pinned coordinates, number of walls), (n,) each, for n particles.
    """
    low, high = at_bounds(system)
    stuck = pinned(system)
    touching = jnp.sum((low.positions | high.positions) & ~stuck, axis=1)
    return jnp.sum(stuck, axis=1).astype(jnp.int32), touching.astype(jnp.int32)
