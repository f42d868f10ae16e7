"""The energy under constraints: which coordinates are held, the equations, and the slope of L = U +
lambda . g.

At a constrained minimum a coordinate is either free, and dL/dx is zero along it, or it is held:
pinned, or at a bound. Held coordinates follow the parameters by what holds them; dL/dx along them
is the force that it takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

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
TOUCHING = 64.0  # units of round-off within which a coordinate is at its bound


def relaxed(system: System) -> tuple[str, ...]:
    """The potential's parameters that are unknowns."""
    return tuple(dict.fromkeys(name for c in system.constraints for name in c.relaxes))


def own_params(system: System) -> dict[str, jax.Array]:
    """What derivatives can be taken by: the parameters that are no unknowns."""
    unknown = relaxed(system)
    return {name: value for name, value in system.params.items() if name not in unknown}


def unknowns_of(system: System, multipliers: dict[str, jax.Array] | None = None) -> Unknowns:
    """The system's positions and relaxed parameters, with the equations' multipliers, zero where
    None.
    """
    x, found = _primal(system), equations(system, system.positions, system.params)
    if found:
        given = multipliers or {}
        found = {
            k: jnp.asarray(given[k], g.dtype) if k in given else jnp.zeros_like(g)
            for k, g in found.items()
        }
    return Unknowns(x.positions, None, found or None, x.params)


def _primal(system: System) -> Unknowns:
    names = relaxed(system)
    return Unknowns(system.positions, params={name: system.params[name] for name in names} or None)


def with_unknowns(system: System, x: Unknowns, params: Params) -> System:
    """The system at other unknowns and parameters; traceable, its list stays."""
    return system.replace(positions=x.positions, params={**params, **(x.params or {})})


def pinned(system: System) -> jax.Array:
    """(n, d) coordinates that never move."""
    mask = jnp.zeros(system.positions.shape, bool)
    for c in system.constraints:
        own = c.pinned()
        mask = mask if own is None else mask | own
    return mask


def bounds(system: System, params: Params) -> tuple[Unknowns, Unknowns]:
    """The lower and upper bounds of positions and relaxed parameters."""
    shape, dtype = system.positions.shape, system.positions.dtype
    low, high = jnp.full(shape, -jnp.inf, dtype), jnp.full(shape, jnp.inf, dtype)
    least = {name: jnp.full_like(system.params[name], -jnp.inf) for name in relaxed(system)}
    for c in system.constraints:
        own = c.bounds(params, diameters_at(system, params), shape)
        if own is not None:
            low, high = jnp.maximum(low, own.lower), jnp.minimum(high, own.upper)
        floor = c.least()
        if floor is not None:
            least = {k: jnp.maximum(v, floor) if k in c.relaxes else v for k, v in least.items()}
    most = {name: jnp.full_like(value, jnp.inf) for name, value in least.items()}
    return Unknowns(low, params=least or None), Unknowns(high, params=most or None)


def at_bounds(system: System) -> tuple[Unknowns, Unknowns]:
    """Which positions and relaxed parameters are at their lower bound, and which at their upper
    one.
    """
    low, high = bounds(system, system.params)
    x = _primal(system)
    return jax.tree.map(lambda a, b: _meets(a, b, 1.0), x, low), jax.tree.map(
        lambda a, b: _meets(a, b, -1.0), x, high
    )


def _meets(x: jax.Array, bound: jax.Array, side: float) -> jax.Array:
    near = TOUCHING * jnp.finfo(x.dtype).eps * jnp.maximum(jnp.abs(bound), jnp.abs(x))
    return jnp.isfinite(bound) & (side * (x - bound) <= jnp.where(jnp.isfinite(bound), near, 0.0))


def between_bounds(system: System) -> jax.Array:
    """(n, d) coordinates that more than one wall holds, so that it is open which of them takes the
    push.
    """
    walls = jnp.zeros(system.positions.shape, int)
    for c in system.constraints:
        own = c.bounds(system.params, diameters_at(system, system.params), system.positions.shape)
        if own is not None:
            walls += _meets(system.positions, own.lower, 1.0).astype(int)
            walls += _meets(system.positions, own.upper, -1.0).astype(int)
    return (walls > 1) & ~pinned(system)


def active_set(system: System) -> Unknowns:
    """Which coordinates and relaxed parameters are held: pinned, or at a bound."""
    low, high = at_bounds(system)
    both = jax.tree.map(jnp.logical_or, low, high)
    return Unknowns(both.positions | pinned(system), params=both.params)


def constrained_coordinates(system: System, params: Params) -> Unknowns:
    """Where what is held is held, as the parameters move it; what is not at a bound stays."""
    low, high = bounds(system, {**system.params, **params})
    at_low, at_high = at_bounds(jax.lax.stop_gradient(system))
    x = _primal(system)

    def place(
        x: jax.Array, low: jax.Array, high: jax.Array, at_low: jax.Array, at_high: jax.Array
    ) -> jax.Array:
        # where() before the bound too: an infinite one must not meet a derivative
        low, high = jnp.where(at_low, low, x), jnp.where(at_high, high, x)
        return jnp.where(at_low, low, jnp.where(at_high, high, x))

    found = jax.tree.map(place, x, low, high, at_low, at_high)
    return Unknowns(
        jnp.where(pinned(system), system.positions, found.positions), params=found.params
    )


def equations(system: System, positions: jax.Array, params: Params) -> dict[str, jax.Array]:
    """g of each constraint that has equations, by its name."""
    box, found = box_at(system, params), {}

    def displacement(a: jax.Array, b: jax.Array) -> jax.Array:
        return nearest_image(a - b, box)

    for c in system.constraints:
        g = c.residuals(positions, params, displacement)
        if g is not None:
            found[c.name] = g
    return found


def lagrangian_gradient(system: System, x: Unknowns, params: Params) -> Unknowns:
    """dL/dR, dL/dp of the relaxed parameters, and g, of everything, held or not."""
    whole = {**params, **(x.params or {})}
    along_positions = energy_gradient(system, whole)(x.positions)
    along_params = None
    if x.params is not None:

        def energy(some: dict[str, jax.Array]) -> jax.Array:
            return potential_energy(system, x.positions, {**params, **some})

        along_params = jax.grad(energy)(x.params)
    if x.multipliers is None:
        return Unknowns(along_positions, params=along_params)

    def met(positions: jax.Array, some: dict[str, jax.Array] | None) -> dict[str, jax.Array]:
        return equations(system, positions, {**params, **(some or {})})

    g, pull = jax.vjp(met, x.positions, x.params)
    of_positions, of_params = pull(x.multipliers)
    if along_params is not None:
        along_params = jax.tree.map(jnp.add, along_params, of_params)
    return Unknowns(along_positions + of_positions, None, g, along_params)


def multipliers_at(system: System, x: Unknowns, params: Params) -> dict[str, jax.Array]:
    """Every constraint's multiplier by its name, in its public shape; zero where a wall or a pin
    holds nothing.

    Walls at one place share the push; between two that meet, the one takes it that can.

    Args:
      system: gives which coordinates are at their bounds.
    """
    still = jax.lax.stop_gradient(system)
    low, high = (side.positions for side in at_bounds(still))
    force, found = lagrangian_gradient(system, x, params).positions, {}
    push = {
        True: jnp.where(high, jnp.maximum(force, 0.0), force),
        False: jnp.where(low, jnp.minimum(force, 0.0), force),
    }
    stuck, tight = (
        pinned(system),
        {c.name: _tight(still, c) for c in system.constraints if isinstance(c, Wall)},
    )
    sharing = {
        above: sum(
            (tight[c.name] for c in system.constraints if isinstance(c, Wall) and c.above is above),
            0 * force,
        )
        for above in push
    }
    for c in system.constraints:
        match c:
            case Pinned():
                found[c.name] = jnp.where(c.mask, force, 0.0)
            case Wall():
                side = (low if c.above else high) & ~stuck & tight[c.name]
                share = jnp.where(side, push[c.above] / jnp.maximum(sharing[c.above], 1.0), 0.0)[
                    :, c.axis
                ]
                found[c.name] = share if c.above else 0.0 - share
            case _:
                found[c.name] = (x.multipliers or {})[c.name]
    return found


def _tight(system: System, wall: Wall) -> jax.Array:
    """(n, d) where this wall is the one that holds, of those on its side."""
    own = wall.bounds(system.params, diameters_at(system, system.params), system.positions.shape)
    low, high = bounds(system, system.params)
    mine, tightest = (own.lower, low.positions) if wall.above else (own.upper, high.positions)
    return jnp.isfinite(mine) & (mine == tightest)


def switch_times(
    system: System, place: tuple[Unknowns, Params], rate: tuple[Unknowns, Params], loose: Any
) -> jax.Array:
    """When, along a path, each coordinate meets its bound or loses the push on it, t to first
    order; inf for never.

    Args:
      place: unknowns and parameters now.
      rate: how fast they change.
      loose: (n,) particles that are left out.
    """
    low, high = at_bounds(jax.lax.stop_gradient(system))
    stuck = pinned(system) | jnp.asarray(loose)[:, None]

    def margins(x: Unknowns, params: Params) -> tuple[Unknowns, Unknowns, Unknowns]:
        lower, upper = bounds(system, {**system.params, **params})
        slope = lagrangian_gradient(system, x, params)
        here = Unknowns(x.positions, params=x.params)

        def gap(a: jax.Array, b: jax.Array) -> jax.Array:
            both = jnp.isfinite(a) & jnp.isfinite(b)  # of infinite bounds no derivative
            return jnp.where(both, a, 0.0) - jnp.where(both, b, 0.0)

        below, above = jax.tree.map(gap, here, lower), jax.tree.map(gap, upper, here)
        return below, above, Unknowns(slope.positions, params=slope.params)

    now, change = jax.jvp(margins, place, rate)

    def when(value: jax.Array, speed: jax.Array, counts: jax.Array) -> jax.Array:
        return jnp.where(counts & (speed != 0), -value / jnp.where(speed == 0, 1.0, speed), jnp.inf)

    lower, upper = bounds(system, system.params)
    found = []
    for field in ("positions", *((low.params or {}).keys())):

        def part(x: Unknowns, field: str = field) -> Any:
            return x.positions if field == "positions" else (x.params or {})[field]

        active_set = part(low) | part(high)
        moves = ~stuck if field == "positions" else jnp.ones_like(active_set)
        found.append(
            when(part(now[0]), part(change[0]), moves & ~active_set & jnp.isfinite(part(lower)))
        )
        found.append(
            when(part(now[1]), part(change[1]), moves & ~active_set & jnp.isfinite(part(upper)))
        )
        found.append(when(part(now[2]), part(change[2]), moves & active_set))
    return jnp.concatenate([jnp.ravel(t) for t in found])


def supports(system: System) -> tuple[jax.Array, jax.Array]:
    """What holds each particle beside pairs and bonds, (n,) each: its pinned coordinates, and the
    walls it touches.
    """
    low, high = at_bounds(system)
    stuck = pinned(system)
    touching = jnp.sum((low.positions | high.positions) & ~stuck, axis=1)
    return jnp.sum(stuck, axis=1).astype(jnp.int32), touching.astype(jnp.int32)
