"""Relaxation of one system in a fixed cell.

A first-order minimizer such as FIRE lowers the forces, and Newton steps take over where the
minimizer is slow. Where a relaxation ends at a saddle, a step along a mode of negative stiffness
leaves the saddle.
"""

from __future__ import annotations

import dataclasses
import math
from threading import Event
from typing import Any

import jax
import numpy as np

from mdsens._util.compilation import as_jax, compiled
from mdsens._util.progress import Decades
from mdsens._util.pytree import PyTree
from mdsens.mechanics.hessian import assembles, largest_force, max_force
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
    step_off_saddle,
)
from mdsens.model.neighbors import Neighbors
from mdsens.model.system import System, energy_number
from mdsens.potentials.base import Potential
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.relaxation.fire_loop import (
    Pace,
    advance,
    at_rest,
    forces_at,
    on_next_list,
    status_of,
    steps_on_list,
)
from mdsens.relaxation.methods import Minimizer, Newton
from mdsens.relaxation.newton import ENERGY_ROUND_OFF, descend
from mdsens.relaxation.options import Options

__all__ = [
    "STEPS_PER_CALL",
    "WATCHED",
    "RelaxationState",
    "at_size",
    "falls_fast",
    "near_force",
    "newton_worth",
    "pace_of",
    "relax_in_fixed_cell",
]

# Steps of the minimizer in one compiled call. Between two calls the host shows the progress,
# allocates a larger neighbor list where one overflowed, and can be interrupted.
STEPS_PER_CALL = 500
# Particles up to which the relaxation alternates between two programs, which compile sooner. For
# 128 discs 300 steps then took 27 ms in place of 14, for 500 discs 60 in place of 21. With
# 2,000 atoms of a glass and their long list, they took three times as long.
TWO_PROGRAMS = 256
# Steps of FIRE that take as long as Newton's method does to the minimum: up to SMALL particles,
# where the compilation of Newton steps counts, and from 4 SMALL to LARGE particles.
WORTH = 4000
WORTH_OF_MANY = 1000
SMALL = 1024
# The share of these steps where forces are costly, see ``share_of_steps``.
COSTLY = 0.15
# Steps in which the pace of FIRE is measured, up to LARGE particles.
WATCHED = 250
# Beyond this number of particles WORTH and WATCHED grow with the root of the number: the time of a
# factor grows faster than the number of particles, and some part of a packing slips now and then.
LARGE = 16384
# Times that FIRE continues to the force where Newton steps begin, because the force has risen above
# it while the pace was measured: some part of the packing slipped.
RETURNS = 3
# Saddles that one relaxation leaves at most.
SADDLES = 20
# Random displacement beside the mode, as a share of the displacement along it. Without it, a
# configuration that is symmetric about the mode would come to rest at the next saddle.
ASIDE = 0.03
# Longest step off a saddle, in units of the potential's length scale.
LONGEST = 0.1
# Largest change of a coordinate, in units of the potential's length scale, with which the scale of
# the forces is not measured again.
NEAR = 1e-3
# If the force does not fall below GAINED of the smallest so far in STANDING calls, the minimizer
# stands at round-off that the force floor underestimates, provided that the force is at most
# NEAR_FLOOR times the floor. FIRE is slow near jamming, too, but there the force loses a tenth
# within 2,000 steps.
STANDING = 4
GAINED = 0.9
NEAR_FLOOR = 30.0


def pace_of(
    before: float | np.ndarray, after: float | np.ndarray, steps: int | np.ndarray
) -> np.ndarray:
    """Compute the rate log(before / after) / steps at which a force falls; -inf if it rises.

    Args:
      before, after: the largest force on a particle before and after the steps.
      steps: number of steps.
    """
    smallest = np.finfo(float).tiny  # in place of a force of zero, which has no logarithm
    lost = np.log(np.maximum(before, smallest)) - np.log(np.maximum(after, smallest))
    return np.where(lost > 0, lost / np.maximum(steps, 1), -np.inf)


def at_size(steps: int, n: int) -> int:
    """Scale a number of steps of a relaxation to a system of n particles.

    The number is unchanged up to 16,384 particles, and grows as sqrt(n) beyond.
    """
    return math.ceil(steps * max(1.0, n / LARGE) ** 0.5)


def newton_worth(system: System) -> int:
    """Return the number of steps of FIRE that take as long as Newton's method for a system.

    Measured for 4,096 discs: Newton steps from 1e-5 of a contact's force take as long as 400 steps.
    """
    n = system.n
    many = max(WORTH_OF_MANY, int(WORTH * min(1.0, SMALL / n)))
    return at_size(int(min(many, WORTH) * share_of_steps(system)), n)


def share_of_steps(system: System) -> float:
    """Return by how much fewer steps of FIRE are taken before Newton steps, for costly forces.

    Forces of atoms in their surroundings cost as much as ten products with the assembled Hessian:
    7 ms and 0.8 ms for 8,000 atoms of silicon.
    """
    costly = system.potential.of_neighbors and assembles(system) and system.n >= SMALL
    return COSTLY if costly else 1.0


def near_force(begin: float, contact: float | np.ndarray, n: int) -> Any:
    """Compute the largest force on a particle at which Newton steps are tried.

    Beyond 16,384 particles this force falls as 1 / n: the more contacts a system has, the smaller
    is the force at which the first of them opens or closes. For 131,072 discs, Newton steps that
    began at 3e-4 of the mean contact force needed 36 factorizations, and the relaxation took four
    times as long as one in which FIRE first lowered the force to an eighth of this value.

    Args:
      begin: this force for up to 16,384 particles, in units of the mean force of a contact.
      contact: mean force of a contact, or an array with a value for each system of a batch.
      n: number of particles.
    """
    return begin * min(1.0, LARGE / n) * contact


def falls_fast(
    pace: float | np.ndarray, largest: float | np.ndarray, tested: float | np.ndarray, worth: int
) -> Any:
    """Return whether the minimizer reaches the minimum faster than Newton steps would.

    The result is also True where the speed of the minimizer is not known. The arguments are
    numbers, or arrays over the systems of a batch.

    Args:
      pace: rate at which the force falls, from ``pace_of``; 0 where it is not known.
      largest: the largest force on a particle now.
      tested: the largest force at which the relaxation stops.
      worth: steps of the minimizer that take as long as Newton steps to the minimum.
    """
    with np.errstate(divide="ignore"):
        # The steps to go, log(largest / tested) / pace, are compared with ``worth``, both times the
        # pace. The pace is -inf where the force rises: the comparison is then False.
        return (pace == 0.0) | (np.log(largest / tested) < worth * pace)


_on_next_list = compiled(on_next_list, static_argnames=("method",))
_steps_on_list = compiled(steps_on_list, static_argnames=("method",), loops=True)


@compiled(static_argnames=("method",), loops=True)
def _advance_at_once(
    system: System,
    state: PyTree,
    target: float | jax.Array,
    budget: int,
    method: Minimizer,
    limits: Limits,
) -> tuple[Any, Neighbors, jax.Array, jax.Array]:
    """Take steps of the minimizer as :func:`_advance` does, in one program."""
    state, pairs, steps = advance(system, state, system.neighbors, target, budget, method, limits)
    return state, pairs, steps, largest_force(method.forces(state))


def _advance(
    system: System,
    state: PyTree,
    target: float | jax.Array,
    budget: int,
    method: Minimizer,
    limits: Limits,
) -> tuple[Any, Neighbors, int, float]:
    """Take steps of the minimizer, beginning with the neighbor list of the system.

    Up to ``TWO_PROGRAMS`` particles, the host calls two programs in turn. Only the second one, with
    the steps, runs so often that its code has to be fast: both in one take up to three times as
    long to compile.

    Returns:
      (state of the minimizer, neighbor list, number of steps taken, largest force on a particle).
    """
    if system.n > TWO_PROGRAMS:
        state, pairs, steps, largest = _advance_at_once(
            system, state, target, budget, method, limits
        )
        return state, pairs, int(steps), float(largest)
    pace = Pace.at_start(state)
    while True:
        pace, kept, copy = _on_next_list(system, pace, method=method, limits=limits)
        system = system.replace(neighbors=kept)
        here = system if copy is None else system.replace(neighbors=copy)
        pace, finished, largest = _steps_on_list(
            here, pace, target, budget, method=method, limits=limits
        )
        if finished:
            return pace.state, kept, int(pace.steps), float(largest)


@dataclasses.dataclass
class RelaxationState:
    """State of the relaxation of one system in a fixed cell; its methods continue the relaxation.

    Attributes:
      system: the system so far, with its potential in the form that is cheapest to evaluate.
      potential: the system's potential as it was given.
      method: the first-order minimizer.
      length, limits: the length scale of the potential (contact distance, or the distance of the
        minimum of the pair energy), and the limits of the minimizer's steps.
      tolerance: the tolerance that was given; None for 1e-12 of the mean pair force.
      max_steps: largest number of steps.
      bar: progress bar, or None.
      state: state of the minimizer; None for particles at rest.
      steps: number of steps so far.
      largest: the largest force left on a particle; inf where it is not known.
      pace: rate at which the force falls, from :func:`pace_of`; 0 where it is not known.
      room: capacity of the next neighbor list, as a multiple of what the positions need.
      tested: the largest force at which the relaxation stops: ``goal``, or the force that round-off
        leaves where that is larger, for the pairs that interact now; the method ``aim`` sets both.
      goal: the largest force at which the status is CONVERGED: the tolerance, or 1e-12 of the mean
        pair force.
      scale: mean pair force and round-off of the forces, for the pairs that interact now; None
        before the method ``aim`` is called.
      stands: whether the force has stopped falling, at round-off.
      saddles: number of saddles that the relaxation reached and left.
      highest, left: energy at the first and at the last saddle that the relaxation left.
      touching: whether particles touched without a force at the last saddle, so that it was not
        known whether they were in contact.
      examined: whether the Hessian at the end was searched for modes of negative stiffness.
      unstable: whether the Hessian at the end has a mode of negative stiffness along which no step
        was taken.
      aimed_at: the system and its largest force for which ``aim`` was called last.
      scaled_at: (n, d) the positions at which ``scale`` was computed; None before.
      interrupted: whether the relaxation was interrupted before its end.
      stop: an event that another thread sets to interrupt the relaxation.
    """

    system: System
    potential: Potential
    method: Minimizer
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
    aimed_at: tuple[System | None, float] = (None, np.inf)
    scaled_at: np.ndarray | None = None
    interrupted: bool = False
    stop: Event = dataclasses.field(default_factory=Event)

    @classmethod
    def of(
        cls,
        system: System,
        method: Minimizer,
        tolerance: float | None,
        max_steps: int,
        bar: Decades,
    ) -> RelaxationState:
        """Make the state of the relaxation of a system, before the first step of the minimizer."""
        dtype = system.positions.dtype.type
        length, stiffness = (dtype(x) for x in natural_units(system))
        limits = Limits.of((length, stiffness), method, system.potential.finite_force)
        cheapest = system.potential.specialize(system.params)
        return cls(
            system=system.replace(potential=cheapest).reallocate(keep=True),
            potential=system.potential,
            method=method,
            length=length,
            limits=limits,
            tolerance=tolerance,
            max_steps=max_steps,
            bar=bar,
            # Until the pairs are known. Forces above ``strongest`` are shortened to it: a force
            # near it may be larger in truth.
            tested=0.5 * float(limits.strongest),
        )

    @property
    def unfinished(self) -> bool:
        """Return whether the largest force is too large and more steps may lower this force."""
        more = self.largest > self.tested and self.steps < self.max_steps and not self.stands
        return more and bool(np.isfinite(self.largest))

    @property
    def floor(self) -> float:
        """Return the largest force that counts as round-off.

        Once the forces have stopped falling, the result is the largest force left.
        """
        floor = 0.0 if self.scale is None else float(self.scale.floor)
        return max(floor, self.largest) if self.stands else floor

    def equilibrium(self) -> Equilibrium:
        """Return the relaxed system with status, forces and steps, as an Equilibrium.

        The caller sets the wall time of the result.
        """
        # Users take derivatives by the parameters, and these may be wrong in the potential's
        # cheapest form.
        relaxed = self.system.replace(potential=self.potential)
        if self.interrupted:
            # A list that has overflowed was not replaced, and its forces lack pairs.
            relaxed = relaxed.reallocate()
            self.largest = np.inf
            self.stands = False
        # Where the tolerance is not met, the forces of the minimizer may have been shortened.
        if not self.at_rest:
            self.largest = float(max_force(relaxed))
        self.aim()
        assert self.scale is not None
        overflowed = relaxed.neighbors.overflowed
        code = status_of(self.largest, self.goal, self.floor, self.scale.idle, overflowed)
        if self.unstable:
            code = as_jax(Status.INDEFINITE.value, np.int32)
        if self.interrupted:
            code = as_jax(Status.INTERRUPTED.value, np.int32)
        descent = self.highest - energy_number(relaxed) if self.saddles else 0.0
        return Equilibrium(
            system=relaxed,
            code=code,
            max_force=as_jax(self.largest, relaxed.positions.dtype),
            steps=as_jax(self.steps),
            wall_time=0.0,
            tolerance=self.goal,
            force_floor=float(self.scale.floor),
            saddles=self.saddles,
            descent=descent,
            examined=self.examined,
        )

    def aim(self) -> bool:
        """Set the largest force at which the relaxation stops.

        This force is the tolerance, or the force that round-off leaves where that is larger.
        Without a tolerance of the user, 1e-12 of the mean force of the pairs that interact now
        takes its place.

        Returns:
          whether the largest force on a particle is still above this limit.
        """
        # by identity: every move makes a new System
        if self.aimed_at[0] is self.system and self.aimed_at[1] == self.largest:
            return self.largest > self.tested
        self.aimed_at = (self.system, self.largest)
        if not self._scale_serves():
            left = self.limits.stiffness.dtype.type(self.largest)
            scale = force_scale(self.system, self.length, self.limits.stiffness, left)
            self.scale = ForceScale(*(np.asarray(x) for x in scale))
            self.scaled_at = np.asarray(self.system.positions)
        assert self.scale is not None
        goal, stop = force_goal(self.scale, self.tolerance)
        self.goal = float(goal)
        # fmin rather than min: a stop of NaN, at positions that are not finite, is ignored
        self.tested = float(np.fmin(stop, 0.5 * self.limits.strongest))
        if self.bar is not None:
            self.bar.tolerance = self.tested
        return self.largest > self.tested

    def _scale_serves(self) -> bool:
        """Return whether the scale of the forces of an earlier configuration serves here, too.

        For energies that are no sums over pairs it takes some thirty Hessian products, and changes
        little with small moves. That of pairs costs little, and tells which of them interact.
        """
        if self.scaled_at is None or self.system.potential.pairwise:
            return False
        moved = np.max(np.abs(np.asarray(self.system.positions) - self.scaled_at), initial=0.0)
        return bool(moved <= NEAR * self.length)

    def to_minimum(self, newton: Newton | None, leave_saddles: bool = True) -> None:
        """Relax the system to the tolerance of the forces, or as far as possible.

        Saddles on the way are left by steps along modes of negative stiffness.

        Args:
          newton: options of the Newton steps; None for the minimizer alone.
          leave_saddles: whether to search for modes of negative stiffness at the end.
        """
        self._relax(newton)
        while leave_saddles and self.at_rest and self._leave_saddle():
            self._relax(newton)
            if self.at_rest and not self._fell():
                break

    def to_minimum_unless_interrupted(self, newton: Newton | None, leave_saddles: bool) -> bool:
        """Relax the system as ``to_minimum`` does; Ctrl-C ends this at the last complete state.

        Returns:
          whether the relaxation was interrupted.
        """
        try:
            self.to_minimum(newton, leave_saddles)
        except KeyboardInterrupt:
            self.interrupted = True
        return self.interrupted

    @property
    def at_rest(self) -> bool:
        """Return whether the largest force is small enough to stop, or has stopped falling."""
        return self.largest <= self.tested or self.stands

    def _relax(self, newton: Newton | None) -> None:
        """Relax the system until its forces vanish, at a minimum or at a saddle."""
        if newton is None:
            self.advance(0.0, self.max_steps)
            return
        share = share_of_steps(self.system)
        self.advance(0.0, self.steps + math.ceil(share * newton.patience))
        self._alternate_with_newton(newton.begin)

    def _alternate_with_newton(self, begin: float) -> None:
        """Relax the system by a minimizer far from the minimum, and by Newton steps near it.

        Args:
          begin: force at which Newton steps are tried first, in units of the mean contact force.
        """
        returns = 0
        while self.unfinished:
            self.aim()
            assert self.scale is not None
            near = near_force(begin, float(self.scale.mean), self.system.n)
            # The force was below ``near`` once, and has risen while the pace was measured.
            if self.largest > near and self.pace != 0.0:
                returns += 1
                self.pace = 0.0
            self.advance(near)
            self._advance_while_fast()
            if self.unfinished and self.largest > near and returns < RETURNS:
                continue
            if self.unfinished:
                self._descend()
                self.aim()
            # Where Newton steps made no headway, they begin nearer to the minimum the next time.
            begin = 0.1 * begin
            self.pace = 0.0

    def _advance_while_fast(self) -> None:
        """Take steps of the minimizer as long as it is faster than Newton steps would be.

        The rate at which the force falls decides. This rate is measured again after every 500 steps
        (more steps for more than 16,384 particles).
        """
        while self.unfinished and self._falls_fast():
            before = self.largest
            since = self.steps
            watched = math.ceil(share_of_steps(self.system) * WATCHED)
            self.advance(0.0, since + at_size(watched, self.system.n))
            self.pace = float(pace_of(before, self.largest, self.steps - since))

    def _falls_fast(self) -> bool:
        """Return whether the minimizer reaches the minimum faster than Newton steps would."""
        worth = newton_worth(self.system)
        return bool(falls_fast(self.pace, self.largest, self.tested, worth))

    def advance(self, near: float, until: int | None = None) -> None:
        """Take steps of the minimizer until a given force or a given number of steps is reached.

        Args:
          near: the largest force at which to stop; without effect where it is below the force at
            which the relaxation ends.
          until: total number of steps of the relaxation at which to stop; None for ``max_steps``.
        """
        until = self.max_steps if until is None else min(until, self.max_steps)
        if self.state is None:
            self.state = at_rest(self.system.positions, self.limits, self.method)
        # the smallest force so far, and the number of calls since it last fell by a tenth
        best = np.inf
        standing = 0
        while self.steps < until and not self.stands:
            if self._has_reached(near):
                break
            if not self._take_steps(near, min(STEPS_PER_CALL, until - self.steps)):
                break
            standing = 0 if self.largest < GAINED * best else standing + 1
            best = min(best, self.largest)
            if standing >= STANDING:
                self.aim()
                self.stands = self.tested < self.largest <= NEAR_FLOOR * self.floor

    def _has_reached(self, near: float) -> bool:
        """Return whether the largest force is at most ``near``, or small enough for the relaxation.

        The force at which the relaxation ends depends on the pairs that interact. Before this
        function says that it is reached, it is computed again for the pairs that interact now.
        """
        target = max(near, self.tested)
        return self.largest <= target and (near > self.tested or not self.aim())

    def _take_steps(self, near: float, budget: int) -> bool:
        """Take steps of the minimizer in one compiled call; enlarge a neighbor list that overflows.

        Args:
          near: the largest force at which to stop.
          budget: largest number of steps.

        Returns:
          whether the relaxation can go on; False where the forces are not finite.
        """
        if self.stop.is_set():
            raise KeyboardInterrupt
        system = self.system
        method = self.method
        # of the type of the positions, lest the call be compiled for another type
        target = system.positions.dtype.type(max(near, self.tested))
        self.state, pairs, taken, largest = _advance(
            system, self.state, target, budget, method, self.limits
        )
        self.steps += taken
        self.largest = largest
        self.system = system.replace(positions=method.positions(self.state), neighbors=pairs)
        self._show(self.steps, self.largest)
        if bool(pairs.overflowed) and np.isfinite(np.asarray(self.system.positions)).all():
            self.make_room(taken)
            return True
        return bool(np.isfinite(self.largest))

    def make_room(self, taken: int) -> None:
        """Allocate a larger neighbor list after an overflow, and compute the forces again.

        Args:
          taken: number of steps that the compiled loop took before the list overflowed. If it took
            at most one step, the list was too small from the start, and the next list is given a
            larger reserve for further pairs than this one had.
        """
        self.room = min(1.25 * self.room, 4.0) if taken <= 1 else 1.25
        self.system = self.system.reallocate(self.room)
        # The forces of the state come from a list that lost pairs.
        forces = forces_at(self.system, self.method, self.limits)
        self.state = self.method.with_forces(self.state, forces)
        self.largest = float(largest_force(self.method.forces(self.state)))

    def _show(self, steps: int, largest: float) -> None:
        """Show the number of steps and the largest force in the progress bar, if there is a bar."""
        if self.bar is not None:
            self.bar.show(steps, largest)

    def _descend(self) -> None:
        """Take Newton steps towards the minimum, as long as they make progress."""
        before = self.steps
        self.state = None  # its positions and velocities are those before the Newton steps
        self.system, self.largest, taken = descend(
            self.system,
            self.tested,
            float(self.length),
            lambda k, force: self._show(before + k, force),
            NEAR_FLOOR * self.floor,
            self._keep,
        )
        self.steps = before + taken

    def _keep(self, system: System) -> None:
        """Keep the system after a Newton step, for a relaxation that is interrupted at the next."""
        self.system = system
        self.steps += 1

    def _leave_saddle(self) -> bool:
        """Take a step along a mode of negative stiffness, if the Hessian has such a mode.

        Returns:
          whether a step was taken.
        """
        whole = self.system.replace(potential=self.potential)
        backbone, net, null = analyze_rigidity(whole, self.largest)
        if bool(net.unjammed):
            return False
        floor = doubtful_stiffness(self.largest, self.length)
        negative_mode = HessianFactor(backbone, null.simplified()).negative_mode(floor)
        self.examined = True
        self.unstable = negative_mode is not None and self.saddles == SADDLES
        if negative_mode is None or self.unstable:
            return False
        stiffness, mode = negative_mode
        self.touching = bool(net.touching)
        # The seed is the number of the saddle: other directions at each, the same in each run.
        aside = np.random.default_rng(self.saddles).uniform(-ASIDE, ASIDE, mode.shape)
        # A displacement s along the mode makes a force of about |stiffness| s. It has to be above
        # the force to stop at, or the relaxation would end where it is.
        needed = 5.0 * self.tested / -stiffness
        length = float(self.length)
        step = step_off_saddle(mode, length, min(needed, LONGEST * length))
        self.left = energy_number(whole)
        self.highest = self.highest if self.saddles else self.left
        self.saddles += 1
        # added by numpy: jax would compile it
        moved = np.asarray(self.system.positions) + step + aside * abs(step).max()
        positions = as_jax(moved, self.system.positions.dtype)
        self.system = self.system.replace(positions=positions).reallocate(keep=True)
        self.largest = np.inf
        self.state = None
        self.stands = False
        return True

    def _fell(self) -> bool:
        """Return whether the energy is lower than at the last saddle that the relaxation left.

        If the energy is not lower, the saddle is taken off the number of saddles left. Where
        particles touched there without a force, these contacts may have pushed the system back, so
        that it is not known whether there is a mode of negative stiffness. Otherwise there is one,
        along which no step leads down.
        """
        energy = energy_number(self.system.replace(potential=self.potential))
        eps = np.finfo(self.system.positions.dtype).eps
        fell = energy < self.left - ENERGY_ROUND_OFF * eps * abs(self.left)
        self.saddles -= not fell
        self.examined = self.examined and (fell or not self.touching)
        self.unstable = not (fell or self.touching)
        return fell


def relax_in_fixed_cell(system: System, options: Options, bar: Decades) -> tuple[Equilibrium, str]:
    """Minimize the energy of a system over the positions, in a fixed cell.

    Returns:
      (the relaxed system, text for an error message that tells where the relaxation ended).
    """
    run = RelaxationState.of(system, options.first, options.tolerance, options.max_steps, bar)
    run.interrupted = options.interrupted
    if not run.interrupted:
        run.to_minimum_unless_interrupted(options.newton, options.leave_saddles)
    eq = run.equilibrium()
    steps = int(eq.steps)
    return eq, f"minimize stopped after {steps:,} steps at max_force {float(eq.max_force):.3e}"
