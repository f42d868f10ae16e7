"""The compiled loop of a first-order minimizer, with neighbor lists and the test of the force.

The minimizer is one of jax-md, or one with the same interface; see
:mod:`mdsens.relaxation.methods`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mdsens._util.compilation import as_jax, compiled
from mdsens._util.outcome import is_good
from mdsens._util.pytree import PyTree
from mdsens.mechanics.forces import energy_gradient
from mdsens.mechanics.hessian import largest_force, largest_stiffness
from mdsens.mechanics.status import Status
from mdsens.mechanics.units import Limits
from mdsens.model.neighbors import Neighbors, narrowed, slack, within
from mdsens.model.system import System, images_of, listed, pair_lengths
from mdsens.relaxation.methods import DEEP, Minimizer

__all__ = [
    "Pace",
    "advance",
    "at_rest",
    "forces_at",
    "limited_minimizer",
    "on_next_list",
    "status_of",
    "steps_on_list",
]

# Skin of the neighbor list of a slow system, as a share of the range of the interactions.
NARROW = 0.1
# Steps on one list with the default skin after which a system counts as slow.
SERVES = 150
# Rows of a neighbor list from which on the steps use a narrow copy of it. The copy takes as long as
# one or two evaluations of the forces. For 4,000 Lennard-Jones particles in three dimensions, with
# 76 neighbors each, the wide list has 190 rows and the narrow one 107.
MANY_ROWS = 64
# Skin of the narrow copy, as a share of the range.
COPIED = 0.05
# Steps on a list of all pairs, which nothing makes incomplete, between two measurements of the
# stiffness.
SETTLED = 500


@compiled(static_argnames=("method",))
def at_rest(positions: jax.Array, limits: Limits, method: Minimizer) -> Any:
    """Return a minimizer's first state, with the particles at rest and zero forces.

    The function ``advance`` computes the forces before the first step.
    """
    initialize, _, _ = limited_minimizer(method, jnp.zeros_like, limits)
    return initialize(positions)


def limited_minimizer(
    method: Minimizer, forces: Callable[[jax.Array], jax.Array], limits: Limits
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[[jax.Array], jax.Array]]:
    """Make the functions of a minimizer in which forces and steps of the particles are limited.

    Overlaps of a random start make forces of 1e20 in a Lennard-Jones potential, and in FIRE the
    momentum of such a force would persist. So the force on a particle is shortened to the size that
    moves the particle by the longest step, and the step is shortened to the longest one, too. Near
    a minimum the limits have no effect. Forces above ``limits.extreme`` are shortened to ``DEEP``
    times the limit, by which FIRE knows them.

    Args:
      method: the minimizer.
      forces: function from positions (…, n, d) to forces (…, n, d).
      limits: the longest step of a particle and the largest force on a particle.

    Returns:
      three functions: from positions to the first state of the minimizer, from a state to the next
      one, and from positions to the limited forces.
    """

    # jax-md passes keyword arguments to both functions; none is used here.
    def limited_forces(R: jax.Array, **_: Any) -> jax.Array:
        free = forces(R)
        if limits.extreme is None:
            return _shortened(free, limits.strongest)
        deep = jnp.max(jnp.abs(free), axis=-1, keepdims=True) > limits.extreme
        return _shortened(free, jnp.where(deep, DEEP, 1.0) * limits.strongest)

    def shift(R: jax.Array, dR: jax.Array, **_: Any) -> jax.Array:
        return R + _shortened(dR, limits.longest)

    initialize, apply = method.functions(limited_forces, shift, limits)
    return initialize, apply, limited_forces


def _minimizer_on_list(
    system: System, method: Minimizer, limits: Limits
) -> tuple[Callable[[Any], Any], Callable[..., jax.Array]]:
    """Return functions (apply, forces) of a minimizer that use the neighbor list of a system.

    ``apply`` takes one step of the minimizer, from a state to the next one. ``forces`` computes the
    forces (n, d) at positions (n, d), and shortens those that are too large for a step.
    """
    # The number of rows in use is known at run time only: jax has no reverse mode through this
    # gradient.
    slope = energy_gradient(system, used=system.neighbors.used)
    _, apply, forces = limited_minimizer(method, lambda R: -slope(R), limits)
    return apply, forces


def _shortened(vectors: jax.Array, longest: jax.Array) -> jax.Array:
    """Shorten each of the vectors (..., d) that is longer than ``longest`` to this length."""
    # Rows are divided by their largest component first, since a square may overflow: a force of
    # 1e200 would come out as zero.
    largest = jnp.max(jnp.abs(vectors), axis=-1, keepdims=True)
    unit = vectors / jnp.where(largest > 0, largest, 1.0)
    squared = jnp.sum(unit**2, axis=-1, keepdims=True)
    # where() avoids the square root of 0, whose derivative is infinite in reverse mode
    size = largest * jnp.sqrt(jnp.where(squared > 0, squared, 1.0))
    return vectors * jnp.minimum(1.0, longest / jnp.where(size > 0, size, 1.0))


def advance(
    system: System,
    state: PyTree,
    pairs: Neighbors,
    tolerance: jax.Array | float,
    budget: jax.Array | int,
    method: Minimizer,
    limits: Limits,
) -> tuple[Any, Neighbors, jax.Array]:
    """Take up to ``budget`` steps of a minimizer, in one compiled loop.

    The loop ends early where the largest force is at most ``tolerance`` or not finite, or where the
    neighbor list has too little room for all pairs. Each turn of it is :func:`on_next_list` and
    :func:`steps_on_list`.

    Args:
      system: defines potential, parameters and cell; positions come from ``state``, and the
        neighbor list is ``pairs``.
      state: state of the minimizer.
      pairs: the neighbor list, complete or not.
      tolerance: the largest force at which to stop.
      budget: largest number of steps.
      method: the minimizer.
      limits: the longest step and the largest force of a particle, and the potential's stiffness.

    Returns:
      (state, neighbor list, number of steps taken).
    """

    def turn(carry: tuple[Pace, Neighbors, jax.Array]) -> tuple[Pace, Neighbors, jax.Array]:
        pace, kept, _ = carry
        here = system.replace(neighbors=kept)
        pace, kept, copy = on_next_list(here, pace, method, limits)
        here = system.replace(neighbors=kept if copy is None else copy)
        pace, finished, _ = steps_on_list(here, pace, tolerance, budget, method, limits)
        return pace, kept, finished

    start = (Pace.at_start(state), pairs, jnp.zeros((), bool))
    pace, pairs, _ = jax.lax.while_loop(lambda carry: ~carry[2], turn, start)
    return pace.state, pairs, pace.steps


class Pace(NamedTuple):
    """A minimizer between two neighbor lists.

    Attributes:
      state: state of the minimizer.
      steps: number of steps taken so far.
      slow: whether the last list has served for many steps, so that the particles move slowly.
    """

    state: Any
    steps: Any
    slow: Any

    @classmethod
    def at_start(cls, state: PyTree) -> Pace:
        """Make the record before the first step, from the state of the minimizer."""
        return cls(state, np.zeros((), np.int32), np.zeros((), bool))


def on_next_list(
    system: System, pace: Pace, method: Minimizer, limits: Limits
) -> tuple[Pace, Neighbors, Neighbors | None]:
    """Update the neighbor list for the next steps of a minimizer, and compute the forces with it.

    Where the particles move slowly, a list with a narrow skin, which has fewer pairs to sum over,
    takes the place of one with a wide skin. At this moment the largest stiffness is measured, too,
    and sets the minimizer's steps.

    Args:
      system: the system with the neighbor list so far, complete or not; the positions come from
        the state of the minimizer.
      pace: the minimizer.
      method: the method of the minimizer.
      limits: the longest step and the largest force of a particle, and the potential's stiffness.

    Returns:
      (the minimizer, the list to keep, the narrow copy of it that the next steps use). The copy is
      None where the steps use the list itself.
    """
    state = pace.state
    kept, copy = _lists_at(system, method.positions(state), pace.slow)
    here = system.replace(neighbors=kept if copy is None else copy)
    _, forces = _minimizer_on_list(here, method, limits)

    def with_measured_stiffness(state: PyTree) -> Any:
        slope = energy_gradient(here, used=here.neighbors.used)
        stiffness = largest_stiffness(slope, method.positions(state), limits.stiffness)
        return method.at_stiffness(state, stiffness)

    # The forces in the state come from the list before this one, which may be incomplete.
    state = method.with_forces(state, forces(method.positions(state)))
    # Off the CPU the members of a batch run under vmap, where a cond computes both branches:
    # the stiffness is then measured for every new list.
    state = jax.lax.cond(pace.slow, with_measured_stiffness, lambda state: state, state)
    return pace._replace(state=state), kept, copy


def steps_on_list(
    system: System,
    pace: Pace,
    tolerance: jax.Array | float,
    budget: jax.Array | int,
    method: Minimizer,
    limits: Limits,
) -> tuple[Pace, jax.Array, jax.Array]:
    """Take steps of a minimizer with one neighbor list, in a compiled loop that only reads it.

    The loop ends where a particle has moved so far that a pair may be missing from the list. It
    also ends where a list with a wide skin has served for many steps. The force that is compared
    with the tolerance always comes from a complete list.

    Args:
      system: the system with the neighbor list, which is complete at the positions of the state, or
        has overflowed.
      pace: the minimizer, with forces from this list.
      tolerance, budget, method, limits: as in :func:`advance`.

    Returns:
      (the minimizer, whether it has finished, the largest force on a particle).
    """
    pairs = system.neighbors
    needed = system.range
    apply, _ = _minimizer_on_list(system, method, limits)
    anchors, distance = slack(pairs, system.box, needed)
    # compared with a margin of 10 %
    narrow = pairs.skin <= 1.1 * NARROW * needed
    # A slow system whose list is not narrow has a list of all pairs, which never becomes
    # incomplete: without SETTLED the loop would not end for a measurement. A list that is narrow
    # from the start, as for an energy of all neighbors, is measured once it has served.
    serves = pace.steps + jnp.where(pace.slow, SETTLED, SERVES)
    last = jnp.where(narrow & pace.slow, budget, jnp.minimum(budget, serves))

    def largest(state: PyTree) -> jax.Array:
        return largest_force(method.forces(state))

    def unfinished(carry: tuple[Any, jax.Array, jax.Array, jax.Array]) -> jax.Array:
        _, step, force, complete = carry
        return (step < last) & (force > tolerance) & jnp.isfinite(force) & complete

    def one_step(carry: tuple[Any, jax.Array, jax.Array, jax.Array]) -> Any:
        state, step, _, _ = carry
        state = apply(state)
        complete = within(method.positions(state), anchors, distance)
        return state, step + 1, largest(state), complete

    # No step is taken on an overflowed list: only the host can allocate a larger one.
    start = (pace.state, jnp.asarray(pace.steps), largest(pace.state), ~pairs.overflowed)
    state, steps, force, complete = jax.lax.while_loop(unfinished, one_step, start)
    stopped = complete & ((force <= tolerance) | (steps >= budget))
    finished = pairs.overflowed | ~jnp.isfinite(force) | stopped
    return Pace(state, steps, complete & (steps >= last)), finished, force


def _lists_at(
    system: System, positions: jax.Array, slow: jax.Array
) -> tuple[Neighbors, Neighbors | None]:
    """Update the neighbor list of a system, and make the list that the next steps use.

    For most systems both are one list, which is narrow where the system is slow. A list of many
    rows stays wide, so that it is searched rarely, and the steps use a narrow copy.

    Args:
      positions: (n, d) the positions at which both have to be complete.
      slow: whether the last list served for many steps.

    Returns:
      (the list to keep, the narrow copy for the next steps, or None where they use the list).
    """
    kept = system.neighbors
    skin = COPIED * system.range
    copies = not kept.complete and kept.images is None and kept.rows.shape[0] >= MANY_ROWS
    if not copies or kept.grid.skin < 2.0 * NARROW or system.potential.of_neighbors:
        wide = jnp.where(slow, NARROW, kept.grid.skin)
        kept, _ = listed(system, positions, skin=wide, anew=slow)
        return kept, None
    anchors, distance = slack(kept, system.box, system.range)
    near = within(positions, anchors, distance - 0.5 * skin)
    kept, _ = listed(system, positions, skin=jnp.asarray(kept.grid.skin), anew=~near)
    images = images_of(system, system.box)
    return kept, narrowed(kept, positions, system.box, pair_lengths(system), images, skin)


@compiled(static_argnames=("method",))
def forces_at(system: System, method: Minimizer, limits: Limits) -> jax.Array:
    """Compute the forces (n, d) at the system's positions, shortened as in the minimizer.

    The minimizer shortens forces that would move a particle by more than the longest step.
    """
    _, forces = _minimizer_on_list(system, method, limits)
    return forces(system.positions)


def status_of(
    largest: float | np.ndarray | jax.Array,
    goal: float | np.ndarray | jax.Array,
    floor: float | np.ndarray | jax.Array,
    idle: bool | np.ndarray | jax.Array,
    overflowed: bool | np.ndarray | jax.Array,
) -> jax.Array:
    """Determine the status of a relaxation from the largest force that is left, as an int32 code.

    The status is one of NO_CONTACTS, CONVERGED, ROUND_OFF_LIMITED, MAX_STEPS_REACHED, NOT_FINITE
    and NEIGHBORS_OVERFLOWED. The arguments are numbers, or arrays with an entry for each system.

    Args:
      largest: the largest force left on a particle.
      goal: the largest force that counts as converged.
      floor: the largest force that counts as round-off.
      idle: whether no particles are in contact.
      overflowed: whether the neighbor list lost pairs.
    """
    # A later line takes precedence over an earlier one.
    arguments = (largest, goal, floor, idle, overflowed)
    # by numpy on the host: jax would compile a program for each line
    traced = any(isinstance(argument, Tracer) for argument in arguments)
    xp: Any = jnp if traced else np
    if not traced:
        largest, goal, floor, idle, overflowed = map(np.asarray, arguments)
    code = xp.where(
        largest <= floor, Status.ROUND_OFF_LIMITED.value, Status.MAX_STEPS_REACHED.value
    )
    code = xp.where(largest <= goal, Status.CONVERGED.value, code)
    code = xp.where(idle & is_good(code), Status.NO_CONTACTS.value, code)
    code = xp.where(xp.isfinite(largest), code, Status.NOT_FINITE.value)
    code = xp.where(overflowed, Status.NEIGHBORS_OVERFLOWED.value, code).astype(np.int32)
    return code if traced else as_jax(code)
