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
from mdsens.contacts import pair_forces
from mdsens.minimisers import Fire, GradientDescent, Newton
from mdsens.newton import descend
from mdsens.scales import Limits, scales
from mdsens.stationarity import largest_force, linearisation
from mdsens.stiffness import Stiffness, factorises
from mdsens.system import System, pair_distances, pair_terms

__all__ = ["Run", "Runs"]

STEPS_PER_CALL = 500  # between two looks of the host: progress, reallocation, interrupts
# Steps of FIRE that take as long as Newton's to the minimum, and those that its pace is taken from: so many from 256
# particles to 16,384; beyond, where a factor takes more than in proportion to the particles and some part of a packing
# slips now and then, with the root of their number.
WORTH, WATCHED, LARGE = 4000, 500, 16384
RETURNS = 3  # times that FIRE is given back what slipped away while it was watched
SADDLES, OFF_SADDLE = 3, 1e-3  # times that a saddle is left; the step off it, of the law's length


@jax.jit
def _contact_force(system: System, length: jax.Array, stiffness: jax.Array) -> jax.Array:
    """Mean force of the pairs that interact; of a law without pairs, what a hundredth of its length costs."""
    total, count = jnp.zeros(()), jnp.zeros(())
    for term in pair_terms(system):
        size = jnp.abs(pair_forces(term, pair_distances(term, system.positions, system.box)))
        total, count = total + jnp.sum(size), count + jnp.sum(size > 0)
    return jnp.where(count > 0, total / jnp.maximum(count, 1), 0.01 * stiffness * length)


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


_advance = functools.partial(jax.jit, static_argnames=("method",))(advance)


@dataclasses.dataclass
class Run:
    """One relaxation.

    Attributes:
      system: so far, with its law in the cheapest form.
      law: as it was given.
      method: the minimiser.
      length, limits: in the law's own units.
      tested: what the largest force is to reach.
      state: the minimiser's; None at rest.
      largest: the largest force left.
      pace: see ``_pace``; 0 where it is not known.
    """

    system: System
    law: Any
    method: Fire | GradientDescent
    length: Any
    limits: Limits
    tested: float
    max_steps: int
    bar: Decades | None = None
    state: Any = None
    steps: int = 0
    largest: float = np.inf
    pace: float = 0.0
    room: float = 1.25

    @classmethod
    def of(cls, system: System, method: Any, tolerance: float, max_steps: int, bar: Decades) -> Run:
        """A relaxation that is to begin."""
        dtype = system.positions.dtype.type
        length, stiffness = (dtype(x) for x in scales(system))
        limits = Limits.of((length, stiffness), method)
        tested = min(tolerance, 0.5 * float(limits.strongest))  # what was cut is not small
        at = system.replace(potential=system.potential.at(system.params)).reallocate(keep=True)
        return cls(at, system.potential, method, length, limits, tested, max_steps, bar)

    @property
    def unfinished(self) -> bool:
        return self.largest > self.tested and self.steps < self.max_steps and bool(np.isfinite(self.largest))

    def to_minimum(self, newton: Newton | None) -> None:
        """Down to the tolerance, or as far as it goes."""
        self.advance(self.tested, newton.patience if newton else self.max_steps)
        begin, returns = newton.begin if newton else 0.0, 0
        while newton and self.unfinished:
            contact = float(_contact_force(self.system, self.length, self.limits.stiffness))
            near = max(_near(begin, contact, self.system.n), self.tested)
            if self.largest > near and self.pace != 0.0:
                returns, self.pace = returns + 1, 0.0
            self.advance(near)
            while self.unfinished and _falls_fast(self.pace, self.largest, self.tested, self.system.n):
                before, since = self.largest, self.steps
                self.advance(self.tested, since + _at_size(WATCHED, self.system.n))
                self.pace = float(_pace(before, self.largest, self.steps - since))
            if self.unfinished and self.largest > near and returns < RETURNS:
                continue
            if self.unfinished:
                self._descend()
            begin, self.pace = 0.1 * begin, 0.0  # where Newton steps made no headway, from nearer by
        for _ in range(SADDLES):
            if not (newton and self.largest <= self.tested and self._leave_saddle()):
                break
            self.advance(self.tested)

    def advance(self, target: float, until: int | None = None) -> None:
        """The minimiser's steps to a largest force, or up to a number of steps."""
        until = self.max_steps if until is None else min(until, self.max_steps)
        method = self.method
        if self.state is None:
            self.state = at_rest(self.system.positions, self.limits.stiffness, method)
        while self.steps < until and not self.largest <= target:
            system, budget = self.system, min(STEPS_PER_CALL, until - self.steps)
            found = _advance(system, self.state, system.neighbours, target, budget, method, self.limits)
            self.state, pairs, taken = found
            self.steps += int(taken)
            self.largest = float(largest_force(method.forces(self.state)))
            self.system = system.replace(positions=method.positions(self.state), neighbours=pairs)
            self._show(self.steps, self.largest)
            if bool(pairs.overflowed) and np.isfinite(np.asarray(self.system.positions)).all():
                self.make_room(int(taken))
            elif not np.isfinite(self.largest):
                break

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
            self.system, self.tested, float(self.length), lambda k, force: self._show(before + k, force)
        )
        self.steps += taken

    def _leave_saddle(self) -> bool:
        """A step along the lowest mode where the Hessian has a negative one; whether there was one."""
        if not factorises(self.system):
            return False
        backbone, _, null = linearisation(self.system.replace(potential=self.law), self.largest)
        stiffness = Stiffness(backbone, null.simplified())
        if stiffness.factor is None or not stiffness.negative[0] > 0:
            return False
        mode = stiffness.lowest(1).vectors[:, 0].reshape(self.system.positions.shape)
        step = OFF_SADDLE * float(self.length) / np.abs(mode).max() * mode
        self.system = self.system.replace(positions=self.system.positions + step).reallocate(keep=True)
        self.largest, self.state = np.inf, None
        return True


@functools.partial(jax.jit, static_argnames=("method",))
def _begin(batch: System, tolerance: Any, method: Any) -> tuple[Any, ...]:
    """Of each member: the law's length, the limits, the force to reach, the minimiser at rest."""

    def one(system: System) -> tuple[Any, ...]:
        length, stiffness = jax.tree.map(lambda x: x.astype(system.positions.dtype), scales(system))
        limits = Limits.of((length, stiffness), method)
        state = at_rest(system.positions, stiffness, method)
        return length, limits, jnp.minimum(tolerance, 0.5 * limits.strongest), state

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


_contact_forces = jax.jit(jax.vmap(_contact_force))


class Runs:
    """The relaxations of a batch's members, in calls that serve them all; what is left of each is then a :class:`Run`.

    Attributes:
      systems: the batch so far, its law in the cheapest form.
      steps, largest: of each member, as in :class:`Run`.
    """

    def __init__(self, batch: System, method: Any, tolerance: float, max_steps: int, count: int):
        """Of the first ``count`` members; the others stay as they are."""
        self.law, self.method, self.max_steps, self.count = batch.potential, method, max_steps, count
        self.systems = batch.replace(potential=self.law.at(batch.params))
        self.length, self.limits, tested, self.state = _begin(self.systems, tolerance, method)
        self.tested = np.asarray(tested)
        self.steps, self.largest = np.zeros(self.tested.size, int), np.full(self.tested.size, np.inf)
        self.taken = np.zeros(self.tested.size, int)
        self.going = np.arange(self.tested.size) < count  # not those whose list or numbers overflowed
        self.pace = np.zeros(self.tested.size)

    @property
    def unfinished(self) -> np.ndarray:
        return self.going & (self.largest > self.tested) & (self.steps < self.max_steps)

    def advance(self, target: np.ndarray, until: Any) -> None:
        """Steps of the members to a largest force each, or up to a number of steps."""
        while True:
            wanted = np.minimum(until, self.max_steps) - self.steps
            budget = np.where(self.going & ~(self.largest <= target), np.clip(wanted, 0, STEPS_PER_CALL), 0)
            if not budget.any():
                return
            found = _advance_each(self.systems, self.state, target, budget, self.method, self.limits)
            self.systems, self.state, *rest = found
            taken, largest, overflowed = (np.asarray(x) for x in rest)
            self.taken = np.where(budget > 0, taken, self.taken)
            self.steps = self.steps + np.where(budget > 0, taken, 0)
            self.largest = np.where(budget > 0, largest, self.largest)
            self.going = self.going & np.isfinite(self.largest) & ~overflowed

    def to_minimum(self, newton: Newton | None) -> None:
        """Down to the tolerance, or to where each member's relaxation takes a way of its own."""
        self.advance(self.tested, newton.patience if newton else self.max_steps)
        if newton is None or not self.unfinished.any():
            return
        contact = np.asarray(_contact_forces(self.systems, self.length, self.limits.stiffness))
        near = _near(newton.begin, contact, self.systems.n)
        self.advance(np.maximum(near, self.tested), self.max_steps)
        while (fast := self.unfinished & _falls_fast(self.pace, self.largest, self.tested, self.systems.n)).any():
            before, since = self.largest, self.steps
            self.advance(np.where(fast, self.tested, np.inf), since + _at_size(WATCHED, self.systems.n))
            self.pace = np.where(fast, _pace(before, self.largest, self.steps - since), self.pace)

    def saddles(self) -> np.ndarray:
        """Which of the members came to rest where the Hessian has a negative eigenvalue."""
        none = np.zeros(self.tested.size, bool)
        if not factorises(self.systems):
            return none
        count = np.minimum(np.arange(none.size), self.count - 1)  # the others, which never moved, have no Hessian
        relaxed, largest = taken(self.systems.replace(potential=self.law), count), jnp.asarray(self.largest[count])
        backbone, _, null = linearisation(relaxed, largest)
        stiffness = Stiffness(backbone, null.simplified())
        return ~none if stiffness.factor is None else stiffness.negative > 0

    def on_their_own(self, newton: Newton | None) -> list[int]:
        """The members that have more to do than this: a longer list, Newton steps, a saddle to leave."""
        whole = np.isfinite(np.asarray(self.systems.positions)).all(axis=(1, 2))
        wanted = np.asarray(self.systems.neighbours.overflowed) & whole
        if newton is not None:
            wanted = wanted | self.unfinished | ((self.largest <= self.tested) & self.saddles())
        return [int(k) for k in np.flatnonzero(wanted[: self.count])]

    def run(self, k: int) -> Run:
        """The relaxation of one member, as far as it is."""
        given = (self.systems, self.law, self.state, self.length, self.limits)
        system, law, state, length, limits = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[k]), given)
        run = Run(system, law, self.method, length, limits, float(self.tested[k]), self.max_steps)
        run.state, run.steps, run.largest, run.pace = state, int(self.steps[k]), self.largest[k], self.pace[k]
        if bool(system.neighbours.overflowed):
            run.make_room(int(self.taken[k]))
        return run
