"""Relaxations on the host: what is done next with a member, and with the members of a batch together."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._loop import advance, at_rest, forces_at
from mdsens._members import taken
from mdsens._progress import Decades
from mdsens.minimisers import Fire, GradientDescent, Newton
from mdsens.newton import descend
from mdsens.scales import ForceScale, Limits, doubtful_stiffness, force_goal, force_scale, force_scales, scales
from mdsens.stationarity import largest_force, linearisation
from mdsens.stiffness import Stiffness, factorises
from mdsens.system import System, potential_energy

__all__ = ["Run", "Runs"]

STEPS_PER_CALL = 500  # between two looks of the host: progress, reallocation, interrupts
# Steps of FIRE that take as long as Newton's to the minimum, and those that its pace is taken from: so many from 256
# particles to 16,384; beyond, where a factor takes more than in proportion to the particles and some part of a packing
# slips now and then, with the root of their number.
WORTH, WATCHED, LARGE = 4000, 500, 16384
ALONE = 20_000  # steps after which a member that is not at rest goes on by itself
RETURNS = 3  # times that FIRE is given back what slipped away while it was watched
# Times that a saddle is left; the step off it along the mode, of the potential's length; and in any direction beside,
# of that, so that what is symmetric about the mode does not end on the next saddle.
SADDLES, OFF_SADDLE, ASIDE = 20, 1e-3, 0.03
LONGEST = 0.1  # the longest step off a saddle, of the potential's length
UNSEEN = 4500.0  # units of round-off of the energy: a difference below them tells nothing, as in mdsens.newton
# A minimizer that within so many calls has not gained a tenth, at a force not far above its floor, stands at round-off
# that the floor underestimates. FIRE crawls near jamming, too, but loses a tenth within 2,000 steps.
STANDING, GAINED, NEAR_FLOOR = 4, 0.9, 30.0


def _pace(before: Any, after: Any, steps: Any) -> Any:
    """The powers of e that the largest force loses in a step, -inf where it grows."""
    lost = np.log(np.asarray(before) / np.where(np.asarray(after) > 0, after, np.finfo(float).tiny))
    return np.where(lost > 0, lost / np.maximum(steps, 1), -np.inf)


def _at_size(steps: int, n: int) -> int:
    return math.ceil(steps * max(1.0, n / LARGE) ** 0.5)


def _near(begin: float, contact: Any, n: int) -> Any:
    """The largest force at which Newton steps are tried. Some contact of many changes sooner: at 131,072 discs steps
    from 3e-4 of the contact force took 36 factors and four times as long as FIRE from an eighth of it.
    """
    return begin * min(1.0, LARGE / n) * contact


def _falls_fast(pace: Any, largest: Any, tested: Any, n: int) -> Any:
    """Whether the minimiser, at its pace, is at the minimum before Newton steps would be; so where it is not known."""
    with np.errstate(divide="ignore"):
        return (pace == 0.0) | (np.log(largest / tested) < _at_size(WORTH, n) * pace)


@functools.partial(jax.jit, static_argnames=("method",))
def _advance(
    system: System, state: Any, target: Any, budget: Any, method: Any, limits: Limits
) -> tuple[Any, Any, jax.Array, jax.Array]:
    """Steps on the system's own list: (state, list, how many steps, the largest force)."""
    state, pairs, steps = advance(system, state, system.neighbours, target, budget, method, limits)
    return state, pairs, steps, largest_force(method.forces(state))


@dataclasses.dataclass
class Run:
    """One relaxation.

    Attributes:
      system: so far, with its law in the cheapest form.
      law: as it was given.
      method: the minimiser.
      length, limits: in the law's own units.
      tolerance: that was asked for; None for 1e-12 of the mean pair force.
      state: the minimiser's; None at rest.
      largest: the largest force left.
      pace: see ``_pace``; 0 where it is not known.
      tested: the largest force to stop at, from where the relaxation is now; see ``aim``.
      goal: the one that counts as converged.
      scale: what forces are judged against there; None before the first steps.
      stands: whether the force has stopped falling at round-off.
      saddles: how many were left.
      highest, left: energy at the first one, and at the last.
      touching: whether particles touched there without a force, see ``Network``.
      examined: whether the Hessian where it ended was looked at for negative curvature.
      unstable: whether it was found to have some, and was not left.
    """

    system: System
    law: Any
    method: Fire | GradientDescent
    length: Any
    limits: Limits
    tolerance: float | None
    max_steps: int
    bar: Decades | None = None
    state: Any = None
    steps: int = 0
    largest: float = np.inf
    pace: float = 0.0
    room: float = 1.25
    tested: float = np.inf
    goal: float = np.inf
    scale: ForceScale | None = None
    stands: bool = False
    saddles: int = 0
    highest: float = 0.0
    left: float = 0.0
    touching: bool = False
    examined: bool = False
    unstable: bool = False

    @classmethod
    def of(cls, system: System, method: Any, tolerance: float | None, max_steps: int, bar: Decades) -> Run:
        """A relaxation that is to begin."""
        dtype = system.positions.dtype.type
        length, stiffness = (dtype(x) for x in scales(system))
        limits = Limits.of((length, stiffness), method)
        at = system.replace(potential=system.potential.at(system.params)).reallocate(keep=True)
        tested = 0.5 * float(limits.strongest)  # to begin with; what was cut is not small
        return cls(at, system.potential, method, length, limits, tolerance, max_steps, bar, tested=tested)

    @property
    def unfinished(self) -> bool:
        more = self.largest > self.tested and self.steps < self.max_steps and not self.stands
        return more and bool(np.isfinite(self.largest))

    @property
    def floor(self) -> float:
        """The force that counts as round-off."""
        floor = 0.0 if self.scale is None else float(self.scale.floor)
        return max(floor, self.largest) if self.stands else floor

    def aim(self) -> bool:
        """Set the force to reach by the pairs as they are now; whether the largest one is still above it."""
        left = self.limits.stiffness.dtype.type(self.largest)
        found = force_scale(self.system, self.length, self.limits.stiffness, left)
        self.scale = ForceScale(*(np.asarray(x) for x in found))
        goal, stop = force_goal(self.scale, self.tolerance)
        self.goal = float(goal)
        self.tested = float(np.fmin(stop, 0.5 * self.limits.strongest))
        if self.bar is not None:
            self.bar.tolerance = self.tested
        return self.largest > self.tested

    def to_minimum(self, newton: Newton | None, leave_saddles: bool = True) -> None:
        """Down to the tolerance, or as far as it goes; off the saddles on the way."""
        self._relax(newton)
        while leave_saddles and self.at_rest and self._leave_saddle():
            self._relax(newton)
            if self.at_rest and not self._fell():
                break

    @property
    def at_rest(self) -> bool:
        return self.largest <= self.tested or self.stands

    def _relax(self, newton: Newton | None) -> None:
        self.advance(0.0, self.steps + newton.patience if newton else self.max_steps)
        begin, returns = newton.begin if newton else 0.0, 0
        while newton and self.unfinished:
            self.aim()
            assert self.scale is not None
            near = _near(begin, float(self.scale.mean), self.system.n)
            if self.largest > near and self.pace != 0.0:
                returns, self.pace = returns + 1, 0.0
            self.advance(near)
            while self.unfinished and _falls_fast(self.pace, self.largest, self.tested, self.system.n):
                before, since = self.largest, self.steps
                self.advance(0.0, since + _at_size(WATCHED, self.system.n))
                self.pace = float(_pace(before, self.largest, self.steps - since))
            if self.unfinished and self.largest > near and returns < RETURNS:
                continue
            if self.unfinished:
                self._descend()
                self.aim()
            begin, self.pace = 0.1 * begin, 0.0  # where Newton steps made no headway, from nearer by

    def advance(self, near: float, until: int | None = None) -> None:
        """The minimiser's steps to a largest force, or to what it is to reach; or up to a number of steps."""
        until = self.max_steps if until is None else min(until, self.max_steps)
        method = self.method
        if self.state is None:
            self.state = at_rest(self.system.positions, self.limits, method)
        best, standing = np.inf, 0
        while self.steps < until and not self.stands:
            target = max(near, self.tested)
            if self.largest <= target and (near > self.tested or not self.aim()):
                break
            system, budget = self.system, min(STEPS_PER_CALL, until - self.steps)
            target = system.positions.dtype.type(max(near, self.tested))
            self.state, pairs, taken, largest = _advance(system, self.state, target, budget, method, self.limits)
            self.steps += int(taken)
            self.largest = float(largest)
            self.system = system.replace(positions=method.positions(self.state), neighbours=pairs)
            self._show(self.steps, self.largest)
            if bool(pairs.overflowed) and np.isfinite(np.asarray(self.system.positions)).all():
                self.make_room(int(taken))
            elif not np.isfinite(self.largest):
                break
            standing = 0 if self.largest < GAINED * best else standing + 1
            best = min(best, self.largest)
            if standing >= STANDING:
                self.aim()
                self.stands = self.tested < self.largest <= NEAR_FLOOR * self.floor

    def make_room(self, taken: int) -> None:
        """A larger list, after some steps on one that lost pairs; and the forces anew, which came from that one."""
        self.room = min(1.25 * self.room, 4.0) if taken <= 1 else 1.25
        self.system = self.system.reallocate(self.room)
        self.state = self.method.with_forces(self.state, forces_at(self.system, self.method, self.limits))
        self.largest = float(largest_force(self.method.forces(self.state)))

    def _show(self, steps: int, largest: float) -> None:
        if self.bar is not None:
            self.bar.show(steps, largest)

    def _descend(self) -> None:
        """Newton steps, as long as they make headway."""
        before, self.state = self.steps, None
        self.system, self.largest, taken = descend(
            self.system,
            self.tested,
            float(self.length),
            lambda k, force: self._show(before + k, force),
            NEAR_FLOOR * self.floor,
        )
        self.steps += taken

    def _leave_saddle(self) -> bool:
        """A step along a mode of negative stiffness where the Hessian has one; whether a step was made."""
        whole = self.system.replace(potential=self.law)
        backbone, net, null = linearisation(whole, self.largest)
        if bool(net.unjammed):
            return False
        floor = doubtful_stiffness(self.largest, self.length)
        found = Stiffness(backbone, null.simplified()).negative_mode(floor)
        self.examined, self.unstable = True, found is not None and self.saddles == SADDLES
        if found is None or self.unstable:
            return False
        value, mode = found
        self.touching = bool(net.touching)
        aside = np.random.default_rng(self.saddles).uniform(-ASIDE, ASIDE, mode.shape)
        # so far that the force is above the one to stop at
        length = min(max(OFF_SADDLE * float(self.length), 5.0 * self.tested / -value), LONGEST * float(self.length))
        self.left = float(potential_energy(whole))
        self.highest = self.highest if self.saddles else self.left
        self.saddles += 1
        step = length * (mode / np.abs(mode).max() + aside)
        self.system = self.system.replace(positions=self.system.positions + step).reallocate(keep=True)
        self.largest, self.state, self.stands = np.inf, None, False
        return True

    def _fell(self) -> bool:
        """Whether the energy fell from the last saddle. Where not, contacts that touch without a force may hold it
        there, and it was none.
        """
        energy = float(potential_energy(self.system.replace(potential=self.law)))
        fell = energy < self.left - UNSEEN * np.finfo(self.system.positions.dtype).eps * abs(self.left)
        self.saddles -= not fell
        self.examined = self.examined and (fell or not self.touching)
        self.unstable = not (fell or self.touching)
        return fell


@functools.partial(jax.jit, static_argnames=("method",))
def _begin(batch: System, method: Any) -> tuple[Any, ...]:
    """Of each member: the law's length, the limits, the minimiser at rest."""

    def one(system: System) -> tuple[Any, ...]:
        length, stiffness = jax.tree.map(lambda x: x.astype(system.positions.dtype), scales(system))
        limits = Limits.of((length, stiffness), method)
        return length, limits, at_rest(system.positions, limits, method)

    return jax.vmap(one)(batch)


@functools.partial(jax.jit, static_argnames=("method",))
def _advance_each(batch: System, state: Any, target: Any, budget: Any, method: Any, limits: Limits) -> tuple[Any, ...]:
    """Each member's steps: (batch, states, steps, largest forces, which lists overflowed)."""

    def one(given: tuple[Any, ...]) -> tuple[Any, ...]:
        system, state, target, budget, limits = given
        state, pairs, steps = advance(system, state, system.neighbours, target, budget, method, limits)
        moved = system.replace(positions=method.positions(state), neighbours=pairs)
        return moved, state, steps, largest_force(method.forces(state)), pairs.overflowed

    given = (batch, state, target, budget, limits)
    # on a CPU one core serves them one after the other, and none waits for the slowest
    return jax.lax.map(one, given) if jax.default_backend() == "cpu" else jax.vmap(lambda *g: one(g))(*given)


class Runs:
    """The relaxations of a batch's members, in calls that serve them all; what is left of each is then a :class:`Run`.

    Attributes:
      systems: the batch so far, its law in the cheapest form.
      steps, largest, tested, goal, scale: of each member, as in :class:`Run`.
    """

    def __init__(self, batch: System, method: Any, tolerance: float | None, max_steps: int, count: int):
        """Of the first ``count`` members; the others stay as they are."""
        self.law, self.method, self.max_steps, self.count = batch.potential, method, max_steps, count
        self.tolerance = tolerance
        self.systems = batch.replace(potential=self.law.at(batch.params))
        self.length, self.limits, self.state = _begin(self.systems, method)
        self.tested = 0.5 * np.asarray(self.limits.strongest)
        self.goal = np.full(self.tested.size, np.inf)
        self.steps, self.largest = np.zeros(self.tested.size, int), np.full(self.tested.size, np.inf)
        self.taken = np.zeros(self.tested.size, int)
        self.going = np.arange(self.tested.size) < count  # not those whose list or numbers overflowed
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
        """Steps of some members to a largest force each, or to what it is to reach; or up to a number of steps."""
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
            found = _advance_each(self.systems, self.state, target, budget, self.method, self.limits)
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
        self.advance(_near(newton.begin, self.scale.mean, self.systems.n), self.max_steps)
        while (fast := self.unfinished & _falls_fast(self.pace, self.largest, self.tested, self.systems.n)).any():
            before, since = self.largest, self.steps
            self.advance(0.0, since + _at_size(WATCHED, self.systems.n), fast)
            self.pace = np.where(fast, _pace(before, self.largest, self.steps - since), self.pace)

    def examine(self) -> np.ndarray:
        """Which of the members came to rest where the Hessian has a negative eigenvalue, or where that is not known."""
        none = np.zeros(self.tested.size, bool)
        if not factorises(self.systems):
            return ~none
        count = np.minimum(np.arange(none.size), self.count - 1)  # the others, which never moved, have no Hessian
        relaxed, largest = taken(self.systems.replace(potential=self.law), count), jnp.asarray(self.largest[count])
        backbone, _, null = linearisation(relaxed, largest)
        stiffness = Stiffness(backbone, null.simplified())
        return ~none if stiffness.factor is None else stiffness.negative > 0

    def on_their_own(self, leave_saddles: bool) -> list[int]:
        """The members that have more to do than this: a longer list, Newton steps, a saddle to leave."""
        whole = np.isfinite(np.asarray(self.systems.positions)).all(axis=(1, 2))
        wanted = self.unfinished | (np.asarray(self.systems.neighbours.overflowed) & whole)
        if leave_saddles:
            wanted = wanted | ((self.largest <= self.tested) & self.examine())
        return [int(k) for k in np.flatnonzero(wanted[: self.count])]

    def run(self, k: int) -> Run:
        """The relaxation of one member, as far as it is."""
        given = (self.systems, self.law, self.state, self.length, self.limits)
        system, law, state, length, limits = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[k]), given)
        run = Run(system, law, self.method, length, limits, self.tolerance, self.max_steps)
        run.state, run.steps, run.largest, run.pace = state, int(self.steps[k]), float(self.largest[k]), self.pace[k]
        run.tested = 0.5 * float(limits.strongest)
        if bool(system.neighbours.overflowed):
            run.make_room(int(self.taken[k]))
        return run
