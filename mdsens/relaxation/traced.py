"""Relaxation of a system inside code that jax traces, for ``equilibrate``.

The whole relaxation is one compiled loop, which cannot allocate a larger neighbor list or raise an
error.
"""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp

from mdsens._util.pytree import PyTree
from mdsens.implicit.linear.result import SolveStats
from mdsens.mechanics.hessian import largest_force, max_force
from mdsens.mechanics.units import Limits, force_goal, force_scale, natural_units
from mdsens.model.neighbors import Neighbors
from mdsens.model.system import System
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.relaxation.fire_loop import advance, at_rest, status_of
from mdsens.relaxation.methods import Minimizer

__all__ = ["relax", "solve_stats"]

# The minimizer's state, the neighbor list, the number of steps, the force that counts as converged,
# and the force to stop at.
Carry: TypeAlias = tuple[PyTree, Neighbors, jax.Array, jax.Array, jax.Array]


def relax(
    system: System,
    tolerance: jax.Array | float | None,
    max_steps: jax.Array | int,
    method: Minimizer,
) -> Equilibrium:
    """Relax a system inside code that jax traces; the status of the result reports a failure.

    Args:
      system: the system at the start, in a fixed cell. Its neighbor list keeps its capacity.
      tolerance: the largest force to reach; None for 1e-12 of the mean pair force.
      max_steps: largest number of steps of the minimizer.
      method: the minimizer.
    """
    dtype = system.positions.dtype
    # A fixed cutoff is a double where x64 is enabled. Without this conversion, positions in single
    # precision would change their type in the loop.
    length, stiffness = jax.tree.map(
        lambda x: jax.lax.stop_gradient(x).astype(dtype), natural_units(system)
    )
    limits = Limits.of((length, stiffness), method, system.potential.finite_force)
    state = at_rest(system.positions, limits, method)
    # Forces above ``limits.strongest`` are shortened to it: a force near it may be larger in truth.
    largest_stop = 0.5 * limits.strongest

    def goals(state: PyTree, pairs: Neighbors) -> tuple[jax.Array, jax.Array]:
        """Compute the force that counts as converged and the force at which the minimizer stops.

        Both follow from the pairs that interact at the positions of the minimizer's ``state``, with
        the neighbor list ``pairs``. The minimizer already stops at the force that round-off leaves,
        if this force is larger than the one that counts as converged.
        """
        here = system.replace(positions=method.positions(state), neighbors=pairs)
        left = largest_force(method.forces(state))
        goal, stop = force_goal(force_scale(here, length, stiffness, left), tolerance)
        return jnp.asarray(goal, dtype), jnp.fmin(stop, largest_stop).astype(dtype)

    def unfinished(carry: Carry) -> jax.Array:
        state, pairs, steps, _, stop = carry
        left = largest_force(method.forces(state))
        return (left > stop) & jnp.isfinite(left) & (steps < max_steps) & ~pairs.overflowed

    def continue_relaxation(carry: Carry) -> Carry:
        state, pairs, steps, _, stop = carry
        state, pairs, taken = advance(system, state, pairs, stop, max_steps - steps, method, limits)
        return state, pairs, steps + taken, *goals(state, pairs)

    # The force to reach depends on the pairs that interact, and these change during the relaxation.
    # So it is computed again where the last one is reached, until the force is below it.
    start = (state, system.neighbors, jnp.zeros((), jnp.int32), largest_stop, largest_stop)
    # One call comes before the loop: the state at rest has forces of zero in place of those at its
    # positions, and ``unfinished`` would be False at once.
    state, pairs, steps, goal, stop = jax.lax.while_loop(
        unfinished, continue_relaxation, continue_relaxation(start)
    )
    relaxed = system.replace(positions=method.positions(state), neighbors=pairs)
    # Where the tolerance is not met, the forces of the state may have been shortened. The largest
    # force that is reported is then the whole one.
    largest = largest_force(method.forces(state))
    largest = jnp.where(largest <= stop, largest, max_force(relaxed))
    scale = force_scale(relaxed, length, stiffness, largest)
    return Equilibrium(
        system=relaxed,
        code=status_of(largest, goal, scale.floor, scale.idle, pairs.overflowed),
        max_force=largest,
        steps=steps,
        wall_time=jnp.zeros((), dtype),
        tolerance=goal,
        force_floor=scale.floor.astype(dtype),
    )


def solve_stats(eq: Equilibrium, method: Minimizer) -> SolveStats:
    """Return the status, largest force and number of steps of a relaxation as a SolveStats.

    SolveStats is the class that reports a linear solve.
    """
    return SolveStats(
        status=eq.code,
        residual=eq.max_force,  # a force; that of a linear solve is relative
        iterations=eq.steps,
        dropped=jnp.zeros_like(eq.max_force),
        solver=type(method).__name__,
    )
