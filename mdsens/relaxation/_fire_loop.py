"""The compiled part of a relaxation: jax-md's minimizers in a loop that owns the list and tests the
tolerance.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mdsens._util.outcome import is_good
from mdsens.mechanics.forces import energy_gradient
from mdsens.mechanics.hessian import largest_force
from mdsens.mechanics.status import Status
from mdsens.mechanics.units import Limits, largest_stiffness
from mdsens.model.neighbors import SKIN, Neighbors, slack, within
from mdsens.model.system import System, listed

__all__ = ["advance", "at_rest", "forces_at", "shortened", "status_of"]

NARROW, SERVES = (
    0.1,
    150,
)  # skin of a slow system's list; steps on one wide list that tell that it is slow
SETTLED = 500  # steps on a list of all pairs from one measurement of the stiffness to the next


@functools.partial(jax.jit, static_argnames=("method",))
def at_rest(positions: jax.Array, limits: Limits, method: Any) -> Any:
    """The minimizer at rest; its forces are to come."""
    init, _ = method.functions(lambda R, **_: jnp.zeros_like(R), lambda R, dR, **_: R + dR, limits)
    return init(positions)


def _machine(system: System, method: Any, limits: Limits) -> tuple[Any, Any]:
    """jax-md's minimizer on this system's list: (apply, forces).

    Overlaps of a random start make forces of 1e20 in a Lennard-Jones potential, and FIRE never forgets
    such a momentum. So a particle's force counts up to the size that moves it by the longest step,
    and its step is cut there too. Neither touches the neighborhood of a minimum.
    """
    slope = energy_gradient(system, used=system.neighbors.used)

    def forces(R: jax.Array, **_: Any) -> jax.Array:
        return shortened(-slope(R), limits.strongest)

    def shift(R: jax.Array, dR: jax.Array, **_: Any) -> jax.Array:
        return R + shortened(dR, limits.longest)

    return method.functions(forces, shift, limits)[1], forces


def shortened(vectors: jax.Array, longest: jax.Array) -> jax.Array:
    """Each row cut to a length."""
    # by their largest component, whose square may overflow: a force of 1e200 would come out as none
    # at all
    largest = jnp.max(jnp.abs(vectors), axis=-1, keepdims=True)
    unit = vectors / jnp.where(largest > 0, largest, 1.0)
    squared = jnp.sum(unit**2, axis=-1, keepdims=True)
    size = largest * jnp.sqrt(
        jnp.where(squared > 0, squared, 1.0)
    )  # the root of 0 has no derivative to reverse
    return vectors * jnp.minimum(1.0, longest / jnp.where(size > 0, size, 1.0))


def advance(
    system: System,
    state: Any,
    pairs: Neighbors,
    tolerance: Any,
    budget: Any,
    method: Any,
    limits: Limits,
) -> tuple[Any, Neighbors, jax.Array]:
    """Up to ``budget`` steps; stops at the tolerance, at a list that overflowed, at a force that is
    not finite.

    Steps on one list are a loop of their own, in which nothing of the list is touched: it ends
    where a particle has moved so far that the list may be incomplete, or where a list with a wide
    skin has served so long that one with less to sum over pays; the minimizer then gets the
    stiffness measured there, too. The force that is tested against the tolerance comes from a
    complete list always.
    """
    box, needed = system.box, system.range

    def largest(state: Any) -> jax.Array:
        return largest_force(method.forces(state))

    def steps_on_a_list(carry: tuple[Any, Neighbors, jax.Array, jax.Array, jax.Array]) -> Any:
        state, pairs, step, slow, _ = carry
        skin = jnp.where(slow, NARROW, SKIN)
        pairs, _ = listed(
            system.replace(neighbors=pairs), method.positions(state), skin=skin, anew=slow
        )
        apply, forces = _machine(system.replace(neighbors=pairs), method, limits)
        anchors, distance = slack(pairs, box, needed)
        narrow = pairs.skin <= 1.1 * NARROW * needed
        # a slow system whose list is not narrow has one of all pairs, which nothing else would ever
        # end
        last = jnp.where(
            narrow, budget, jnp.minimum(budget, step + jnp.where(slow, SETTLED, SERVES))
        )

        def measured(state: Any) -> Any:
            slope = energy_gradient(system.replace(neighbors=pairs), used=pairs.used)
            stiffness = largest_stiffness(slope, method.positions(state), limits.stiffness)
            return method.at_stiffness(state, stiffness)

        def unfinished(carry: tuple[Any, jax.Array, jax.Array, jax.Array]) -> jax.Array:
            _, step, force, complete = carry
            return (step < last) & (force > tolerance) & jnp.isfinite(force) & complete

        def one_more(carry: tuple[Any, jax.Array, jax.Array, jax.Array]) -> Any:
            state, step, _, _ = carry
            state = apply(state)
            return (
                state,
                step + 1,
                largest(state),
                within(method.positions(state), anchors, distance),
            )

        state = method.with_forces(state, forces(method.positions(state)))
        state = jax.lax.cond(slow, measured, lambda state: state, state)
        start = (state, step, largest(state), ~pairs.overflowed)
        state, step, force, complete = jax.lax.while_loop(unfinished, one_more, start)
        finished = (
            pairs.overflowed
            | ~jnp.isfinite(force)
            | (complete & ((force <= tolerance) | (step >= budget)))
        )
        return state, pairs, step, complete & (step >= last), finished

    never = jnp.zeros((), bool)
    start = (state, pairs, jnp.zeros((), jnp.int32), never, never)
    return jax.lax.while_loop(lambda carry: ~carry[4], steps_on_a_list, start)[:3]


@functools.partial(jax.jit, static_argnames=("method",))
def forces_at(system: System, method: Any, limits: Limits) -> jax.Array:
    """The forces that the minimizer works with, at the system's positions."""
    return _machine(system, method, limits)[1](system.positions)


@jax.jit
def status_of(largest: Any, goal: Any, floor: Any, idle: Any, overflowed: Any) -> jax.Array:
    """NO_CONTACTS, CONVERGED, ROUND_OFF_LIMITED, MAX_STEPS_REACHED, NOT_FINITE or
    NEIGHBORS_OVERFLOWED.

    Args:
      largest: force left.
      goal: that counts as converged.
      floor: below which forces are round-off.
      idle: whether nothing is in contact.
      overflowed: whether the list lost pairs.
    """
    code = jnp.where(
        largest <= floor, Status.ROUND_OFF_LIMITED.value, Status.MAX_STEPS_REACHED.value
    )
    code = jnp.where(largest <= goal, Status.CONVERGED.value, code)
    code = jnp.where(idle & is_good(code), Status.NO_CONTACTS.value, code)
    code = jnp.where(jnp.isfinite(largest), code, Status.NOT_FINITE.value)
    return jnp.where(overflowed, Status.NEIGHBORS_OVERFLOWED.value, code).astype(jnp.int32)
