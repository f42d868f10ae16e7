"""The relaxation of one system in a fixed cell: FIRE, Newton steps where it crawls, off saddles."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.progress import Decades
from mdsens.mechanics.hessian import largest_force, max_force
from mdsens.mechanics.hessian_factor import HessianFactor
from mdsens.mechanics.rigidity import analyze_rigidity
from mdsens.mechanics.status import Status
from mdsens.mechanics.units import (
    ForceScale,
    Limits,
    doubtful_stiffness,
    force_goal,
    force_scale,
    natural_units,
)
from mdsens.model.system import System, potential_energy
from mdsens.relaxation._fire_loop import advance, at_rest, forces_at, status_of
from mdsens.relaxation._newton import descend
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.relaxation.jax_md import JaxMD
from mdsens.relaxation.methods import Fire, GradientDescent, Newton
from mdsens.relaxation.options import Options

__all__ = [
    "STEPS_PER_CALL",
    "WATCHED",
    "RelaxationState",
    "at_size",
    "falls_fast",
    "near_force",
    "pace_of",
    "relax_in_fixed_cell",
]

STEPS_PER_CALL = 500  # between two looks of the host: progress, reallocation, interrupts
# Steps of FIRE that take as long as Newton's to the minimum, and those that its pace is taken from:
# so many from 256 particles to 16,384; beyond, where a factor takes more than in proportion to the
# particles and some part of a packing slips now and then, with the root of their number.
WORTH, WATCHED, LARGE = 4000, 500, 16384
RETURNS = 3  # times that FIRE is given back what slipped away while it was watched
# Times that a saddle is left; the step off it along the mode, of the potential's length; and in any
# direction beside, of that, so that what is symmetric about the mode does not end on the next
# saddle.
SADDLES, OFF_SADDLE, ASIDE = 20, 1e-3, 0.03
LONGEST = 0.1  # the longest step off a saddle, of the potential's length
# units of round-off of the energy: a difference below them tells nothing, as in
# mdsens.relaxation._newton
UNSEEN = 4500.0
# A minimizer that within so many calls has not gained a tenth, at a force not far above its floor,
# stands at round-off that the floor underestimates. FIRE crawls near jamming, too, but loses a
# tenth within 2,000 steps.
STANDING, GAINED, NEAR_FLOOR = 4, 0.9, 30.0


def pace_of(before: Any, after: Any, steps: Any) -> Any:
    """The powers of e that the largest force loses in a step, -inf where it grows."""
    smallest = np.finfo(float).tiny  # in place of a force of zero, whose logarithm is none
    lost = np.log(np.maximum(before, smallest)) - np.log(np.maximum(after, smallest))
    return np.where(lost > 0, lost / np.maximum(steps, 1), -np.inf)


def at_size(steps: int, n: int) -> int:
    return math.ceil(steps * max(1.0, n / LARGE) ** 0.5)


def near_force(begin: float, contact: Any, n: int) -> Any:
    """The largest force at which Newton steps are tried. Some contact of many changes sooner: at
    131,072 discs steps from 3e-4 of the contact force took 36 factors and four times as long as
    FIRE from an eighth of it.
    """
    return begin * min(1.0, LARGE / n) * contact


def falls_fast(pace: Any, largest: Any, tested: Any, n: int) -> Any:
    """Whether the minimizer, at its pace, is at the minimum before Newton steps would be; so where
    it is not known.
    """
    with np.errstate(divide="ignore"):
        return (pace == 0.0) | (np.log(largest / tested) < at_size(WORTH, n) * pace)


@functools.partial(jax.jit, static_argnames=("method",))
def _advance(
    system: System, state: Any, target: Any, budget: Any, method: Any, limits: Limits
) -> tuple[Any, Any, jax.Array, jax.Array]:
    """Steps on the system's own list: (state, list, how many steps, the largest force)."""
    state, pairs, steps = advance(system, state, system.neighbors, target, budget, method, limits)
    return state, pairs, steps, largest_force(method.forces(state))


@dataclasses.dataclass
class RelaxationState:
    """One relaxation.

    Attributes:
      system: so far, with its potential in the cheapest form.
      potential: as it was given.
      method: the minimizer.
      length, limits: in the potential's own units.
      tolerance: that was asked for; None for 1e-12 of the mean pair force.
      state: the minimizer's; None at rest.
      largest: the largest force left.
      pace: see :func:`pace_of`; 0 where it is not known.
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
    potential: Any
    method: Fire | GradientDescent | JaxMD
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
    def of(
        cls, system: System, method: Any, tolerance: float | None, max_steps: int, bar: Decades
    ) -> RelaxationState:
        """A relaxation that is to begin."""
        dtype = system.positions.dtype.type
        length, stiffness = (dtype(x) for x in natural_units(system))
        limits = Limits.of((length, stiffness), method)
        at = system.replace(potential=system.potential.at(system.params)).reallocate(keep=True)
        tested = 0.5 * float(limits.strongest)  # to begin with; what was cut is not small
        return cls(
            at, system.potential, method, length, limits, tolerance, max_steps, bar, tested=tested
        )

    @property
    def unfinished(self) -> bool:
        more = self.largest > self.tested and self.steps < self.max_steps and not self.stands
        return more and bool(np.isfinite(self.largest))

    @property
    def floor(self) -> float:
        """The force that counts as round-off."""
        floor = 0.0 if self.scale is None else float(self.scale.floor)
        return max(floor, self.largest) if self.stands else floor

    def equilibrium(self) -> Equilibrium:
        """What was reached, with its evidence; the caller sets ``wall_time``."""
        relaxed = self.system.replace(potential=self.potential)
        if not self.at_rest:
            self.largest = float(max_force(relaxed))
        self.aim()
        assert self.scale is not None
        overflowed = relaxed.neighbors.overflowed
        code = status_of(self.largest, self.goal, self.floor, self.scale.idle, overflowed)
        if self.unstable:
            code = jnp.asarray(Status.INDEFINITE.value, jnp.int32)
        descent = self.highest - float(potential_energy(relaxed)) if self.saddles else 0.0
        return Equilibrium(
            system=relaxed,
            status=code,
            max_force=jnp.asarray(self.largest),
            steps=jnp.asarray(self.steps),
            wall_time=0.0,
            tolerance=self.goal,
            force_floor=float(self.scale.floor),
            saddles=self.saddles,
            descent=descent,
            examined=self.examined,
        )

    def aim(self) -> bool:
        """Set the force to reach by the pairs as they are now; whether the largest one is still
        above it.
        """
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
            near = near_force(begin, float(self.scale.mean), self.system.n)
            if self.largest > near and self.pace != 0.0:
                returns, self.pace = returns + 1, 0.0
            self.advance(near)
            while self.unfinished and falls_fast(
                self.pace, self.largest, self.tested, self.system.n
            ):
                before, since = self.largest, self.steps
                self.advance(0.0, since + at_size(WATCHED, self.system.n))
                self.pace = float(pace_of(before, self.largest, self.steps - since))
            if self.unfinished and self.largest > near and returns < RETURNS:
                continue
            if self.unfinished:
                self._descend()
                self.aim()
            begin, self.pace = (
                0.1 * begin,
                0.0,
            )  # where Newton steps made no headway, from nearer by

    def advance(self, near: float, until: int | None = None) -> None:
        """The minimizer's steps to a largest force, or to what it is to reach; or up to a number of
        steps.
        """
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
            self.state, pairs, taken, largest = _advance(
                system, self.state, target, budget, method, self.limits
            )
            self.steps += int(taken)
            self.largest = float(largest)
            self.system = system.replace(positions=method.positions(self.state), neighbors=pairs)
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
        """A larger list, after some steps on one that lost pairs; and the forces anew, which came
        from that one.
        """
        self.room = min(1.25 * self.room, 4.0) if taken <= 1 else 1.25
        self.system = self.system.reallocate(self.room)
        self.state = self.method.with_forces(
            self.state, forces_at(self.system, self.method, self.limits)
        )
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
        """A step along a mode of negative stiffness where the Hessian has one; whether a step was
        made.
        """
        whole = self.system.replace(potential=self.potential)
        backbone, net, null = analyze_rigidity(whole, self.largest)
        if bool(net.unjammed):
            return False
        floor = doubtful_stiffness(self.largest, self.length)
        found = HessianFactor(backbone, null.simplified()).negative_mode(floor)
        self.examined, self.unstable = True, found is not None and self.saddles == SADDLES
        if found is None or self.unstable:
            return False
        value, mode = found
        self.touching = bool(net.touching)
        aside = np.random.default_rng(self.saddles).uniform(-ASIDE, ASIDE, mode.shape)
        # so far that the force is above the one to stop at
        length = min(
            max(OFF_SADDLE * float(self.length), 5.0 * self.tested / -value),
            LONGEST * float(self.length),
        )
        self.left = float(potential_energy(whole))
        self.highest = self.highest if self.saddles else self.left
        self.saddles += 1
        step = length * (mode / np.abs(mode).max() + aside)
        self.system = self.system.replace(positions=self.system.positions + step).reallocate(
            keep=True
        )
        self.largest, self.state, self.stands = np.inf, None, False
        return True

    def _fell(self) -> bool:
        """Whether the energy fell from the last saddle. Where not, contacts that touch without a
        force may hold it there, and it was none.
        """
        energy = float(potential_energy(self.system.replace(potential=self.potential)))
        fell = energy < self.left - UNSEEN * np.finfo(self.system.positions.dtype).eps * abs(
            self.left
        )
        self.saddles -= not fell
        self.examined = self.examined and (fell or not self.touching)
        self.unstable = not (fell or self.touching)
        return fell


def relax_in_fixed_cell(system: System, options: Options, bar: Decades) -> tuple[Equilibrium, str]:
    """The minimum of the energy in the cell as it is, and where the relaxation ended, in words."""
    run = RelaxationState.of(system, options.first, options.tolerance, options.max_steps, bar)
    run.to_minimum(options.newton, options.leave_saddles)
    eq = run.equilibrium()
    steps, largest = int(eq.steps), float(eq.max_force)
    return eq, f"minimize stopped after {steps:,} steps at max_force {largest:.3e}"
