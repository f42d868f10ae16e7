"""Relaxation of the systems of a batch in fixed cells.

Compiled calls take steps of all systems together. The systems that then need Newton steps, a longer
neighbor list, or a step off a saddle are relaxed further one by one.
"""

from __future__ import annotations

import dataclasses
import time
from threading import Event
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.batching import concatenate_trees, in_chunks, take_members
from mdsens._util.compilation import compiled
from mdsens._util.outcome import is_good
from mdsens._util.progress import Members
from mdsens._util.pytree import PyTree
from mdsens.mechanics.hessian import largest_force, max_force
from mdsens.mechanics.hessian_factor import HessianFactor, factorizes
from mdsens.mechanics.rigidity import analyze_rigidity
from mdsens.mechanics.status import Status
from mdsens.mechanics.units import (
    ForceScale,
    Limits,
    force_goal,
    force_scales,
    natural_units,
)
from mdsens.model.batch import unstack
from mdsens.model.system import System
from mdsens.relaxation._driver import (
    STEPS_PER_CALL,
    WATCHED,
    RelaxationState,
    at_size,
    falls_fast,
    near_force,
    newton_worth,
    pace_of,
)
from mdsens.relaxation.equilibrium import Equilibrium, batch_of
from mdsens.relaxation.fire_loop import advance, at_rest, status_of
from mdsens.relaxation.methods import Minimizer, Newton
from mdsens.relaxation.options import Options

__all__ = ["BatchRelaxation", "relax_batch"]

# Steps after which a member that is not at rest goes on by itself.
ALONE = 20_000


@compiled(static_argnames=("method",))
def _start_members(batch: System, method: Minimizer) -> tuple[jax.Array, Limits, Any]:
    """Prepare the relaxation of each system of a batch.

    Returns:
      (length scales of the potential, limits of the steps, first states of the minimizer).
    """

    def start(system: System) -> tuple[jax.Array, Limits, Any]:
        length, stiffness = jax.tree.map(
            lambda x: x.astype(system.positions.dtype), natural_units(system)
        )
        limits = Limits.of((length, stiffness), method, system.potential.finite_force)
        return length, limits, at_rest(system.positions, limits, method)

    return jax.vmap(start)(batch)


@compiled(static_argnames=("method",), loops=True)
def _advance_each(
    batch: System,
    state: PyTree,
    target: np.ndarray,
    budget: np.ndarray,
    method: Minimizer,
    limits: Limits,
) -> tuple[System, Any, jax.Array, jax.Array, jax.Array]:
    """Take steps of the minimizer for each system of a batch.

    Returns:
      (batch, states of the minimizer, numbers of steps taken, largest forces on a particle, which
      neighbor lists overflowed).
    """

    def advance_one(member: tuple[Any, ...]) -> tuple[Any, ...]:
        system, state, target, budget, limits = member
        state, pairs, steps = advance(
            system, state, system.neighbors, target, budget, method, limits
        )
        moved = system.replace(positions=method.positions(state), neighbors=pairs)
        return moved, state, steps, largest_force(method.forces(state)), pairs.overflowed

    members = (batch, state, target, budget, limits)
    # On a CPU one core serves the members one after the other, and none waits for the slowest.
    if jax.default_backend() == "cpu":
        return jax.lax.map(advance_one, members)
    return jax.vmap(lambda *member: advance_one(member))(*members)


class BatchRelaxation:
    """State of the relaxation of all systems of a batch; its methods continue the relaxation.

    Some systems have to be continued alone: the method ``run`` returns the state of such a system,
    a :class:`RelaxationState`.

    Attributes:
      systems: the batch so far, with its potential in the form that is cheapest to evaluate.
      potential: the batch's potential as it was given.
      steps, largest, pace, tested, goal, scale: arrays with an entry for each system: number of
        steps, largest force left, rate at which this force falls, force at which the relaxation
        stops, force that counts as converged, and scales of the forces; see
        :class:`RelaxationState`.
      taken: number of steps of each system in the last call that advanced this system.
      going: mask of the systems that are relaxed together, and have neither an overflowed neighbor
        list nor a force that is not finite.
    """

    def __init__(
        self,
        batch: System,
        method: Minimizer,
        tolerance: float | None,
        max_steps: int,
        count: int,
        stop: Event | None = None,
    ):
        """Prepare the relaxation of the systems of a batch, before the first step.

        Args:
          batch: the systems.
          method: the first-order minimizer.
          tolerance: the largest force to reach; None for 1e-12 of the mean pair force.
          max_steps: largest number of steps of each system.
          count: number of systems to relax, from the first one on; the others stay as they are.
          stop: an event that is set, in any thread, to interrupt the relaxation.
        """
        self.stop = Event() if stop is None else stop
        self.potential = batch.potential
        self.method = method
        self.max_steps = max_steps
        self.count = count
        self.tolerance = tolerance
        self.systems = batch.replace(potential=self.potential.specialize(batch.params))
        self.length, self.limits, self.state = _start_members(self.systems, method)
        self.tested = 0.5 * np.asarray(self.limits.strongest)
        size = self.tested.size
        self.goal = np.full(size, np.inf)
        self.steps = np.zeros(size, int)
        self.largest = np.full(size, np.inf)
        self.taken = np.zeros(size, int)
        # Members beyond ``count`` only fill up the last chunk of a batch, see ``in_chunks``.
        self.going = np.arange(size) < count
        self.pace = np.zeros(size)

    @property
    def unfinished(self) -> np.ndarray:
        """Return a mask of the systems whose force is too large and that have steps left."""
        return self.going & (self.largest > self.tested) & (self.steps < self.max_steps)

    def aim(self) -> None:
        """Set the largest force at which each system of the batch stops.

        This force is the tolerance, or the force that round-off leaves where that is larger.
        Without a tolerance of the user, 1e-12 of the mean force of the pairs that interact now
        takes its place.
        """
        left = jnp.asarray(self.largest, self.systems.positions.dtype)
        scale = force_scales(self.systems, self.length, self.limits.stiffness, left)
        self.scale = ForceScale(*(np.asarray(x) for x in scale))
        goal, stop = force_goal(self.scale, self.tolerance)
        self.goal = np.broadcast_to(goal, self.tested.shape)
        self.tested = np.fmin(stop, 0.5 * np.asarray(self.limits.strongest))

    def advance(
        self,
        near: float | np.ndarray,
        until: int | np.ndarray,
        chosen: bool | np.ndarray = True,
    ) -> None:
        """Take steps of the minimizer until a given force or a given number of steps is reached.

        Args:
          near: the largest force at which each system stops; without effect where it is below the
            force at which the relaxation ends.
          until: total number of steps of the relaxation at which to stop.
          chosen: mask of the systems that take steps.
        """
        while True:
            if self.stop.is_set():
                raise KeyboardInterrupt
            target = np.maximum(near, self.tested)
            if np.any(self.going & chosen & (self.largest <= target) & (near <= self.tested)):
                self.aim()
                target = np.maximum(near, self.tested)
            wanted = np.minimum(until, self.max_steps) - self.steps
            above = self.going & chosen & ~(self.largest <= target)
            budget = np.where(above, np.clip(wanted, 0, STEPS_PER_CALL), 0)
            if not budget.any():
                return
            # of the type of the positions, lest the call be compiled for another type
            target = target.astype(self.systems.positions.dtype)
            self.systems, self.state, *rest = _advance_each(
                self.systems, self.state, target, budget, self.method, self.limits
            )
            steps, largest, overflowed = (np.asarray(x) for x in rest)
            # Members with a budget of 0 pass through the call and keep their numbers.
            served = budget > 0
            self.taken = np.where(served, steps, self.taken)
            self.steps = self.steps + np.where(served, steps, 0)
            self.largest = np.where(served, largest, self.largest)
            self.going = self.going & np.isfinite(self.largest) & ~overflowed

    def to_minimum(self, newton: Newton | None) -> None:
        """Relax all systems together, to the tolerance or as far as this is efficient.

        Systems that need Newton steps, a longer neighbor list, or a step off a saddle stop here;
        their relaxation is continued one by one. The method ``on_their_own`` finds these systems.

        Args:
          newton: options of the Newton steps, which are taken later for one system at a time; None
            to use the minimizer alone.
        """
        self.advance(0.0, newton.patience if newton else ALONE)
        if newton is None or not self.unfinished.any():
            return
        self.aim()
        n = self.systems.n
        self.advance(near_force(newton.begin, self.scale.mean, n), self.max_steps)
        # The members for which Newton steps pay stop here; the others go on, as in
        # RelaxationState.
        fast = self._fast()
        while fast.any():
            before = self.largest
            since = self.steps
            self.advance(0.0, since + at_size(WATCHED, n), fast)
            self.pace = np.where(fast, pace_of(before, self.largest, self.steps - since), self.pace)
            fast = self._fast()

    def _fast(self) -> np.ndarray:
        """Return a mask of the systems that the minimizer relaxes faster than Newton steps."""
        worth = newton_worth(self.systems)
        return self.unfinished & falls_fast(self.pace, self.largest, self.tested, worth)

    def examine(self) -> np.ndarray:
        """Return a mask of the systems at saddles, where the Hessian has a negative eigenvalue.

        The mask is also True where the number of negative eigenvalues is not known.
        """
        none = np.zeros(self.tested.size, bool)
        if not factorizes(self.systems):
            return ~none
        # The members beyond ``count`` never moved and have no Hessian: the last one that counts
        # takes their place.
        which = np.minimum(np.arange(none.size), self.count - 1)
        relaxed = take_members(self.systems.replace(potential=self.potential), which)
        backbone, _, null = analyze_rigidity(relaxed, jnp.asarray(self.largest[which]))
        stiffness = HessianFactor(backbone, null.simplified())
        # One factor serves all Hessians, as the diagonal blocks of one matrix.
        return ~none if stiffness.factor is None else stiffness.negative > 0

    def on_their_own(self, leave_saddles: bool) -> list[int]:
        """Return the indices of the systems whose relaxation has to be continued one by one.

        These systems need a longer neighbor list, Newton steps, or a step off a saddle.

        Args:
          leave_saddles: whether to search for modes of negative stiffness.
        """
        # A longer list does not help where positions are not finite.
        finite = np.isfinite(np.asarray(self.systems.positions)).all(axis=(1, 2))
        wanted = self.unfinished | (np.asarray(self.systems.neighbors.overflowed) & finite)
        if leave_saddles:
            wanted = wanted | ((self.largest <= self.tested) & self.examine())
        return [int(k) for k in np.flatnonzero(wanted[: self.count])]

    def run(self, k: int) -> RelaxationState:
        """Return the relaxation of system k of the batch so far, to be continued alone."""
        batched = (self.systems, self.potential, self.state, self.length, self.limits)
        # Through numpy: a slice of a jax array would be a dispatch for each leaf.
        system, potential, state, length, limits = jax.tree.map(
            lambda leaf: jnp.asarray(np.asarray(leaf)[k]), batched
        )
        run = RelaxationState(
            system=system,
            potential=potential,
            method=self.method,
            length=length,
            limits=limits,
            tolerance=self.tolerance,
            max_steps=self.max_steps,
            state=state,
            steps=int(self.steps[k]),
            largest=float(self.largest[k]),
            pace=self.pace[k],
            # until the pairs are known, as in RelaxationState.of
            tested=0.5 * float(limits.strongest),
            stop=self.stop,
        )
        if bool(system.neighbors.overflowed):
            run.make_room(int(self.taken[k]))
        return run

    def equilibria(self, seconds: float, examined: bool) -> Equilibrium:
        """Return the relaxed systems as a batch, with status, forces left and number of steps.

        Args:
          seconds: wall time of the relaxation of one system.
          examined: whether the Hessians were searched for modes of negative stiffness.
        """
        relaxed = self.systems.replace(potential=self.potential)
        largest = self.largest
        # Where the tolerance is not met, the forces of the minimizer may have been shortened.
        if np.any(largest > self.tested):
            whole = np.asarray(jax.vmap(max_force)(relaxed))
            self.largest = np.where(largest <= self.tested, largest, whole)
        self.aim()
        floor = self.scale.floor
        idle = self.scale.idle
        ones = np.ones(self.tested.size)
        overflowed = relaxed.neighbors.overflowed
        status = status_of(self.largest, self.goal, floor, idle, overflowed)
        if self.stop.is_set():
            ended = is_good(np.asarray(status)) & ~np.asarray(overflowed)
            status = jnp.where(ended, status, Status.INTERRUPTED.value).astype(jnp.int32)
        return Equilibrium(
            system=relaxed,
            code=status,
            max_force=jnp.asarray(self.largest),
            steps=jnp.asarray(self.steps),
            wall_time=seconds * ones,
            tolerance=np.asarray(self.goal),
            force_floor=np.asarray(floor),
            # Members at saddles are continued alone, so that the others have left none.
            saddles=0 * self.steps,
            descent=0.0 * ones,
            examined=examined * (ones > 0),
        )


def relax_batch(batch: System, options: Options, bar: Members) -> Equilibrium:
    """Minimize the energy of each system of a batch in its fixed cell; return the relaxed batch."""

    def relax_some(part: System, count: int) -> tuple[Equilibrium, int, dict[int, Equilibrium]]:
        """Relax the first ``count`` systems of the batch ``part``.

        Systems that need Newton steps or a longer neighbor list, or are at a saddle, are continued
        one by one after the common steps.

        Returns:
          (the relaxed batch, ``count``, the results of the systems that were continued one by one,
          by their index).
        """
        began = time.perf_counter()
        together = BatchRelaxation(
            part, options.first, options.tolerance, options.max_steps, count, stop
        )
        runs: dict[int, RelaxationState] = {}
        try:
            together.to_minimum(options.newton)
            runs = {k: together.run(k) for k in together.on_their_own(options.leave_saddles)}
        except KeyboardInterrupt:
            stop.set()
        for run in runs.values():
            run.interrupted = stop.is_set()
            if not run.interrupted and run.to_minimum_unless_interrupted(
                options.newton, options.leave_saddles
            ):
                stop.set()
        # Members that are relaxed together have no time of their own: each gets an equal share.
        seconds = (time.perf_counter() - began) / count
        bar.advance(count)
        alone = {
            k: dataclasses.replace(run.equilibrium(), wall_time=seconds) for k, run in runs.items()
        }
        return together.equilibria(seconds, options.leave_saddles), count, alone

    stop = Event()
    if options.interrupted:
        stop.set()
    chunks = in_chunks(relax_some, batch, batch.batch or 0, batch.n, stop.set)
    parts, counts, alone_in_parts = zip(*chunks, strict=True)
    eq = concatenate_trees(parts, counts)
    if not any(alone_in_parts):
        return eq
    members = unstack(eq)
    start = 0  # index of the part's first member
    for alone, count in zip(alone_in_parts, counts, strict=True):
        for k, member in alone.items():
            members[start + k] = member
        start += count
    return batch_of(members)
