"""Relaxing the members of a batch together: calls that serve them all, then each by itself where
it needs Newton steps, a longer neighbor list, or to leave a saddle.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.batching import in_chunks, joined, taken
from mdsens._util.progress import Members
from mdsens.mechanics.hessian import largest_force, max_force
from mdsens.mechanics.hessian_factor import HessianFactor, factorizes
from mdsens.mechanics.rigidity import analyze_rigidity
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
    pace_of,
)
from mdsens.relaxation._fire_loop import advance, at_rest, status_of
from mdsens.relaxation.equilibrium import Equilibrium, batch_of
from mdsens.relaxation.methods import Newton
from mdsens.relaxation.options import Options

__all__ = ["BatchRelaxation", "relax_batch"]

ALONE = 20_000  # steps after which a member that is not at rest goes on by itself


@functools.partial(jax.jit, static_argnames=("method",))
def _begin(batch: System, method: Any) -> tuple[Any, ...]:
    """Of each member: the potential's length, the limits, the minimizer at rest."""

    def one(system: System) -> tuple[Any, ...]:
        length, stiffness = jax.tree.map(
            lambda x: x.astype(system.positions.dtype), natural_units(system)
        )
        limits = Limits.of((length, stiffness), method)
        return length, limits, at_rest(system.positions, limits, method)

    return jax.vmap(one)(batch)


@functools.partial(jax.jit, static_argnames=("method",))
def _advance_each(
    batch: System, state: Any, target: Any, budget: Any, method: Any, limits: Limits
) -> tuple[Any, ...]:
    """Each member's steps: (batch, states, steps, largest forces, which lists overflowed)."""

    def one(given: tuple[Any, ...]) -> tuple[Any, ...]:
        system, state, target, budget, limits = given
        state, pairs, steps = advance(
            system, state, system.neighbors, target, budget, method, limits
        )
        moved = system.replace(positions=method.positions(state), neighbors=pairs)
        return moved, state, steps, largest_force(method.forces(state)), pairs.overflowed

    given = (batch, state, target, budget, limits)
    # on a CPU one core serves them one after the other, and none waits for the slowest
    return (
        jax.lax.map(one, given)
        if jax.default_backend() == "cpu"
        else jax.vmap(lambda *g: one(g))(*given)
    )


class BatchRelaxation:
    """The relaxations of a batch's members, in calls that serve them all; what is left of each is
    then a :class:`RelaxationState`.

    Attributes:
      systems: the batch so far, its potential in the cheapest form.
      steps, largest, tested, goal, scale: of each member, as in :class:`RelaxationState`.
    """

    def __init__(
        self, batch: System, method: Any, tolerance: float | None, max_steps: int, count: int
    ):
        """Of the first ``count`` members; the others stay as they are."""
        self.potential, self.method, self.max_steps, self.count = (
            batch.potential,
            method,
            max_steps,
            count,
        )
        self.tolerance = tolerance
        self.systems = batch.replace(potential=self.potential.at(batch.params))
        self.length, self.limits, self.state = _begin(self.systems, method)
        self.tested = 0.5 * np.asarray(self.limits.strongest)
        self.goal = np.full(self.tested.size, np.inf)
        self.steps, self.largest = (
            np.zeros(self.tested.size, int),
            np.full(self.tested.size, np.inf),
        )
        self.taken = np.zeros(self.tested.size, int)
        self.going = (
            np.arange(self.tested.size) < count
        )  # not those whose list or numbers overflowed
        self.pace = np.zeros(self.tested.size)

    @property
    def unfinished(self) -> np.ndarray:
        return self.going & (self.largest > self.tested) & (self.steps < self.max_steps)

    def aim(self) -> None:
        """Set the force that each member is to reach by its pairs as they are now."""
        left = jnp.asarray(self.largest, self.systems.positions.dtype)
        found = force_scales(self.systems, self.length, self.limits.stiffness, left)
        self.scale = ForceScale(*(np.asarray(x) for x in found))
        goal, stop = force_goal(self.scale, self.tolerance)
        self.goal = np.broadcast_to(goal, self.tested.shape)
        self.tested = np.fmin(stop, 0.5 * np.asarray(self.limits.strongest))

    def advance(self, near: Any, until: Any, some: Any = True) -> None:
        """Steps of some members to a largest force each, or to what it is to reach; or up to a
        number of steps.
        """
        while True:
            target = np.maximum(near, self.tested)
            if np.any(self.going & some & (self.largest <= target) & (near <= self.tested)):
                self.aim()
                target = np.maximum(near, self.tested)
            wanted = np.minimum(until, self.max_steps) - self.steps
            more = self.going & some & ~(self.largest <= target)
            budget = np.where(more, np.clip(wanted, 0, STEPS_PER_CALL), 0)
            if not budget.any():
                return
            target = target.astype(self.systems.positions.dtype)
            found = _advance_each(
                self.systems, self.state, target, budget, self.method, self.limits
            )
            self.systems, self.state, *rest = found
            taken, largest, overflowed = (np.asarray(x) for x in rest)
            self.taken = np.where(budget > 0, taken, self.taken)
            self.steps = self.steps + np.where(budget > 0, taken, 0)
            self.largest = np.where(budget > 0, largest, self.largest)
            self.going = self.going & np.isfinite(self.largest) & ~overflowed

    def to_minimum(self, newton: Newton | None) -> None:
        """Down to the tolerance, or to where each member's relaxation takes a way of its own."""
        self.advance(0.0, newton.patience if newton else ALONE)
        if newton is None or not self.unfinished.any():
            return
        self.aim()
        self.advance(near_force(newton.begin, self.scale.mean, self.systems.n), self.max_steps)
        while (
            fast := self.unfinished
            & falls_fast(self.pace, self.largest, self.tested, self.systems.n)
        ).any():
            before, since = self.largest, self.steps
            self.advance(0.0, since + at_size(WATCHED, self.systems.n), fast)
            self.pace = np.where(fast, pace_of(before, self.largest, self.steps - since), self.pace)

    def examine(self) -> np.ndarray:
        """Which of the members came to rest where the Hessian has a negative eigenvalue, or where
        that is not known.
        """
        none = np.zeros(self.tested.size, bool)
        if not factorizes(self.systems):
            return ~none
        count = np.minimum(
            np.arange(none.size), self.count - 1
        )  # the others, which never moved, have no Hessian
        relaxed, largest = (
            taken(self.systems.replace(potential=self.potential), count),
            jnp.asarray(self.largest[count]),
        )
        backbone, _, null = analyze_rigidity(relaxed, largest)
        stiffness = HessianFactor(backbone, null.simplified())
        return ~none if stiffness.factor is None else stiffness.negative > 0

    def on_their_own(self, leave_saddles: bool) -> list[int]:
        """The members that have more to do than this: a longer list, Newton steps, a saddle to
        leave.
        """
        whole = np.isfinite(np.asarray(self.systems.positions)).all(axis=(1, 2))
        wanted = self.unfinished | (np.asarray(self.systems.neighbors.overflowed) & whole)
        if leave_saddles:
            wanted = wanted | ((self.largest <= self.tested) & self.examine())
        return [int(k) for k in np.flatnonzero(wanted[: self.count])]

    def run(self, k: int) -> RelaxationState:
        """The relaxation of one member, as far as it is."""
        given = (self.systems, self.potential, self.state, self.length, self.limits)
        system, potential, state, length, limits = jax.tree.map(
            lambda leaf: jnp.asarray(np.asarray(leaf)[k]), given
        )
        run = RelaxationState(
            system, potential, self.method, length, limits, self.tolerance, self.max_steps
        )
        run.state, run.steps, run.largest, run.pace = (
            state,
            int(self.steps[k]),
            float(self.largest[k]),
            self.pace[k],
        )
        run.tested = 0.5 * float(limits.strongest)
        if bool(system.neighbors.overflowed):
            run.make_room(int(self.taken[k]))
        return run

    def equilibria(self, seconds: float, examined: bool) -> Equilibrium:
        """What all members reached, as a batch."""
        relaxed, largest = self.systems.replace(potential=self.potential), self.largest
        if np.any(largest > self.tested):
            whole = np.asarray(jax.vmap(max_force)(relaxed))
            self.largest = np.where(largest <= self.tested, largest, whole)
        self.aim()
        floor, idle, ones = self.scale.floor, self.scale.idle, np.ones(self.tested.size)
        overflowed = relaxed.neighbors.overflowed
        return Equilibrium(
            system=relaxed,
            status=status_of(self.largest, self.goal, floor, idle, overflowed),
            max_force=jnp.asarray(self.largest),
            steps=jnp.asarray(self.steps),
            wall_time=seconds * ones,
            tolerance=np.asarray(self.goal),
            force_floor=np.asarray(floor),
            saddles=0 * self.steps,
            descent=0.0 * ones,
            examined=examined * (ones > 0),
        )


def relax_batch(batch: System, options: Options, bar: Members) -> Equilibrium:
    """The minimum of each member of a batch in a fixed cell, as a batch."""

    def some(part: System, count: int) -> tuple[Equilibrium, int, dict[int, Equilibrium]]:
        began = time.perf_counter()
        runs = BatchRelaxation(part, options.first, options.tolerance, options.max_steps, count)
        runs.to_minimum(options.newton)
        others = {k: runs.run(k) for k in runs.on_their_own(options.leave_saddles)}
        for run in others.values():
            run.to_minimum(options.newton, options.leave_saddles)
        seconds = (time.perf_counter() - began) / count
        bar.advance(count)
        alone = {
            k: dataclasses.replace(run.equilibrium(), wall_time=seconds)
            for k, run in others.items()
        }
        return runs.equilibria(seconds, options.leave_saddles), count, alone

    chunks = in_chunks(some, batch, batch.batch or 0, batch.n)
    parts, counts, others = zip(*chunks, strict=True)
    eq = joined(parts, counts)
    if not any(others):
        return eq
    members, start = unstack(eq), 0
    for alone, count in zip(others, counts, strict=True):
        for k, member in alone.items():
            members[start + k] = member
        start += count
    return batch_of(members)
