"""Relaxing inside traced code, for ``equilibrate``: one compiled loop, no reallocation, no errors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mdsens.implicit.linear.result import SolveStats
from mdsens.mechanics.hessian import largest_force, max_force
from mdsens.mechanics.units import Limits, force_goal, force_scale, natural_units
from mdsens.model.system import System
from mdsens.relaxation._fire_loop import advance, at_rest, status_of
from mdsens.relaxation.equilibrium import Equilibrium

__all__ = ["relax", "solve_stats"]


def relax(system: System, tolerance: Any, max_steps: Any, method: Any) -> Equilibrium:
    """Relax inside traced code: no reallocation, no errors; the status says what happened."""
    dtype = system.positions.dtype
    # a fixed cutoff is a double where x64 is on: positions in single precision keep theirs through
    # the loop
    length, stiffness = jax.tree.map(
        lambda x: jax.lax.stop_gradient(x).astype(dtype), natural_units(system)
    )
    limits = Limits.of((length, stiffness), method)
    state = at_rest(system.positions, limits, method)
    cut = 0.5 * limits.strongest  # what was cut is not small

    def aim(state: Any, pairs: Any) -> tuple[jax.Array, jax.Array]:
        at = system.replace(positions=method.positions(state), neighbors=pairs)
        left = largest_force(method.forces(state))
        goal, stop = force_goal(force_scale(at, length, stiffness, left), tolerance)
        return jnp.asarray(goal, dtype), jnp.fmin(stop, cut).astype(dtype)

    def unfinished(carry: Any) -> jax.Array:
        state, pairs, steps, _, stop = carry
        left = largest_force(method.forces(state))
        return (left > stop) & jnp.isfinite(left) & (steps < max_steps) & ~pairs.overflowed

    def go_on(carry: Any) -> Any:
        state, pairs, steps, _, stop = carry
        state, pairs, taken = advance(system, state, pairs, stop, max_steps - steps, method, limits)
        return state, pairs, steps + taken, *aim(state, pairs)

    # what is to be reached depends on the pairs that interact, and they change on the way
    start = state, system.neighbors, jnp.zeros((), jnp.int32), cut, cut
    state, pairs, steps, goal, stop = jax.lax.while_loop(unfinished, go_on, go_on(start))
    relaxed = system.replace(positions=method.positions(state), neighbors=pairs)
    # the force that met the tolerance, or, where none did, the whole force without its limit
    largest = largest_force(method.forces(state))
    largest = jnp.where(largest <= stop, largest, max_force(relaxed))
    scale = force_scale(relaxed, length, stiffness, largest)
    code = status_of(largest, goal, scale.floor, scale.idle, pairs.overflowed)
    return Equilibrium(
        relaxed, code, largest, steps, jnp.zeros((), dtype), goal, scale.floor.astype(dtype)
    )


def solve_stats(eq: Equilibrium, method: Any) -> SolveStats:
    """The relaxation's evidence in the form that a solve has."""
    return SolveStats(
        eq.status, eq.max_force, eq.steps, jnp.zeros_like(eq.max_force), type(method).__name__
    )
