"""Relaxing a system to a minimum: jax-md's minimisers in a loop that owns the list, the tolerance and the status."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Mapping
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._checks import short
from mdsens._members import each
from mdsens._progress import Decades, Members
from mdsens._tables import Shown
from mdsens.contacts import pair_forces
from mdsens.implicit.status import (
    ConvergenceError,
    InputError,
    PrecisionError,
    SolveStats,
    Status,
    raise_for_status,
)
from mdsens.minimisers import Fire, GradientDescent, Newton
from mdsens.neighbours import SKIN, Neighbours, slack, within
from mdsens.newton import descend
from mdsens.scales import Limits, round_off, scales
from mdsens.slopes import energy_slope
from mdsens.stationarity import largest_force, linearisation, max_force
from mdsens.stiffness import Stiffness, factorises
from mdsens.system import System, listed, pair_distances, pair_terms, stack, unstack

__all__ = ["Equilibrium", "Fire", "GradientDescent", "Newton", "minimize", "relax"]

Params = Mapping[str, Any]
STEPS_PER_CALL = 500  # between two looks of the host: progress, reallocation, interrupts
WORTH = 4000  # steps of FIRE that take as long as Newton's to the minimum, from 256 particles to 16,384
SADDLES, OFF_SADDLE = 3, 1e-3  # times that a saddle is left; the step off it, of the law's length
NARROW, SERVES = 0.1, 150  # skin of a slow system's list; steps on one wide list that tell that it is slow


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Equilibrium(Shown):
    """A relaxed system with the evidence. Frozen, and a pytree; of a batch, every array has a leading axis.

    Attributes:
      system: relaxed.
      status: a :class:`~mdsens.Status`, as an integer array.
      max_force: the largest norm of a particle's force left (ASE's fmax), in energy a length.
      steps: of the minimiser.
      wall_time: seconds, compilation included; 0 inside traced code.
      tolerance: what max_force was to reach.
    """

    system: System
    status: jax.Array
    max_force: jax.Array
    steps: jax.Array
    wall_time: Any
    tolerance: Any

    @property
    def positions(self) -> jax.Array:
        """(n, d), the system's."""
        return self.system.positions

    @property
    def params(self) -> dict[str, jax.Array]:
        """The system's."""
        return self.system.params

    _title = "Equilibrium"

    def _rows(self) -> list[tuple[str, str]]:
        s = self.system
        if s.batch is not None:
            good = int(sum(Status(int(k)).good for k in np.asarray(self.status)))
            return [
                ("members", f"{s.batch} of n = {s.n}, {s.dimension}-D, {s.potential.name}"),
                ("converged", f"{good} of {s.batch}"),
                ("largest max_force", f"{float(jnp.max(self.max_force)):.2e}"),
            ]
        return [
            ("system", f"n = {s.n}, {s.dimension}-D, {s.potential.name}"),
            ("status", f"{Status(int(self.status)).name}: {Status(int(self.status)).sentence}"),
            ("max_force", f"{float(self.max_force):.2e} (tolerance {float(self.tolerance):.0e})"),
            ("steps", f"{int(self.steps):,} in {float(self.wall_time):.2f} s"),
        ]


@functools.partial(jax.jit, static_argnames=("method",))
def _begin(positions: jax.Array, stiffness: jax.Array, method: Any) -> Any:
    """The minimiser at rest; its forces are to come."""
    init, _ = method.minimizer(lambda R, **_: jnp.zeros_like(R), lambda R, dR, **_: R + dR, stiffness)
    return init(positions)


def _machine(system: System, method: Any, limits: Limits) -> tuple[Any, Any]:
    """jax-md's minimiser on this system's list: (apply, forces).

    Overlaps of a random start make forces of 1e20 in a Lennard-Jones law, and FIRE never forgets such a momentum. So a
    particle's force counts up to the size that moves it by the longest step, and its step is cut there too. Neither
    touches the neighbourhood of a minimum.
    """
    slope = energy_slope(system, used=system.neighbours.used)

    def forces(R: jax.Array, **_: Any) -> jax.Array:
        return _shortened(-slope(R), limits.strongest)

    def shift(R: jax.Array, dR: jax.Array, **_: Any) -> jax.Array:
        return R + _shortened(dR, limits.longest)

    return method.minimizer(forces, shift, limits.stiffness)[1], forces


def _shortened(vectors: jax.Array, longest: jax.Array) -> jax.Array:
    """Each row cut to a length."""
    # by their largest component, whose square may overflow: a force of 1e200 would come out as none at all
    largest = jnp.max(jnp.abs(vectors), axis=-1, keepdims=True)
    unit = vectors / jnp.where(largest > 0, largest, 1.0)
    size = largest * jnp.sqrt(jnp.sum(unit**2, axis=-1, keepdims=True))
    return vectors * jnp.minimum(1.0, longest / jnp.where(size > 0, size, 1.0))


def _advance(
    system: System,
    state: Any,
    pairs: Neighbours,
    tolerance: Any,
    budget: Any,
    method: Any,
    limits: Limits,
) -> tuple[Any, Neighbours, jax.Array]:
    """Up to ``budget`` steps; stops at the tolerance, at a list that overflowed, at a force that is not finite.

    Steps on one list are a loop of their own, in which nothing of the list is touched: it ends where a particle has
    moved so far that the list may be incomplete, or where a list with a wide skin has served so long that one with less
    to sum over pays. The force that is tested against the tolerance comes from a complete list always.
    """
    box, needed = system.box, system.range

    def largest(state: Any) -> jax.Array:
        return largest_force(method.forces(state))

    def steps_on_a_list(carry: tuple[Any, Neighbours, jax.Array, jax.Array, jax.Array]) -> Any:
        state, pairs, step, slow, _ = carry
        skin = jnp.where(slow, NARROW, SKIN)
        pairs, _ = listed(system.replace(neighbours=pairs), method.positions(state), skin=skin, anew=slow)
        apply, forces = _machine(system.replace(neighbours=pairs), method, limits)
        anchors, distance = slack(pairs, box, needed)
        wide = (pairs.skin > 1.1 * NARROW * needed) & jnp.isfinite(pairs.skin)
        last = jnp.where(wide, jnp.minimum(budget, step + SERVES), budget)

        def unfinished(carry: tuple[Any, jax.Array, jax.Array, jax.Array]) -> jax.Array:
            _, step, force, complete = carry
            return (step < last) & (force > tolerance) & jnp.isfinite(force) & complete

        def advance(carry: tuple[Any, jax.Array, jax.Array, jax.Array]) -> Any:
            state, step, _, _ = carry
            state = apply(state)
            return state, step + 1, largest(state), within(method.positions(state), anchors, distance)

        state = method.with_forces(state, forces(method.positions(state)))
        start = (state, step, largest(state), ~pairs.overflowed)
        state, step, force, complete = jax.lax.while_loop(unfinished, advance, start)
        finished = pairs.overflowed | ~jnp.isfinite(force) | (complete & ((force <= tolerance) | (step >= budget)))
        return state, pairs, step, complete & (step >= last), finished

    never = jnp.zeros((), bool)
    start = (state, pairs, jnp.zeros((), jnp.int32), never, never)
    return jax.lax.while_loop(lambda carry: ~carry[4], steps_on_a_list, start)[:3]


@functools.partial(jax.jit, static_argnames=("method",))
def _forces(system: System, method: Any, limits: Limits) -> jax.Array:
    """The forces that the minimiser works with, at the system's positions."""
    return _machine(system, method, limits)[1](system.positions)


_advance_jit = functools.partial(jax.jit, static_argnames=("method",))(_advance)


@jax.jit
def _status(largest: Any, tolerance: Any, overflowed: Any) -> jax.Array:
    """CONVERGED, NEIGHBOURS_OVERFLOWED, NOT_FINITE or MAX_STEPS_REACHED."""
    code = jnp.where(largest <= tolerance, Status.CONVERGED.value, Status.MAX_STEPS_REACHED.value)
    code = jnp.where(jnp.isfinite(largest), code, Status.NOT_FINITE.value)
    return jnp.where(overflowed, Status.NEIGHBOURS_OVERFLOWED.value, code).astype(jnp.int32)


def relax(system: System, tolerance: Any, max_steps: Any, method: Any) -> Equilibrium:
    """Relax inside traced code: no reallocation, no errors; the status says what happened."""
    dtype = system.positions.dtype
    # a fixed cutoff is a double where x64 is on: positions in single precision keep theirs through the loop
    limits = Limits.of(jax.tree.map(lambda x: jax.lax.stop_gradient(x).astype(dtype), scales(system)), method)
    state = _begin(system.positions, limits.stiffness, method)
    tested = jnp.minimum(tolerance, 0.5 * limits.strongest)  # what was cut is not small
    state, pairs, steps = _advance(system, state, system.neighbours, tested, max_steps, method, limits)
    relaxed = system.replace(positions=method.positions(state), neighbours=pairs)
    # the force that met the tolerance, or, where none did, the whole force without its limit
    largest = largest_force(method.forces(state))
    largest = jnp.where(largest <= tested, largest, max_force(relaxed))
    code = _status(largest, tolerance, pairs.overflowed)
    zero = jnp.zeros((), dtype)
    return Equilibrium(relaxed, code, largest, steps, zero, jnp.asarray(tolerance, zero.dtype))


def minimize(
    system: System,
    params: Params | None = None,
    *,
    tolerance: float = 1e-12,
    method: Newton | Fire | GradientDescent | None = None,
    max_steps: int = 200_000,
    throw: bool = True,
    progress: bool | None = None,
) -> Equilibrium:
    """Relax a system to a minimum of its energy, dU/dR = 0.

    Args:
      system: where to start; a batch made by ``stack`` relaxes member by member.
      params: parameters to change first; the others stay.
      tolerance: the largest force on a particle to reach, in the potential's units. The error of every derivative is
        this over the smallest stiffness, so it is small by default; raise it where round-off stands above it.
      method: ``Newton()`` (the default: FIRE, and Newton steps where it crawls; where the Hessian can be factorised, a
        saddle that FIRE came to rest on is left), ``Fire()`` or ``GradientDescent()``.
      max_steps: of the minimiser.
      throw: raise where the tolerance is not reached; with False the status says so instead.
      progress: show a progress bar; where None, in a terminal or notebook alone.

    Returns:
      an :class:`Equilibrium`.

    Raises:
      InputError: bad parameters or tolerance. PrecisionError: a tolerance below round-off at this precision.
      ConvergenceError: with the status, and what was reached as ``result``.
    """
    method = Newton() if method is None else method
    _check_kinds(system, method)
    if not (isinstance(tolerance, Real) and 0 < tolerance <= sys.float_info.max):
        raise InputError(f"tolerance is {short(tolerance)}: give a positive number.")
    if not (isinstance(max_steps, Real) and max_steps >= 1):
        raise InputError(f"max_steps is {short(max_steps)}: give 1 or more.")
    if system.batch is not None:
        return _minimize_batch(system, params, tolerance, method, max_steps, throw, progress)
    if params is not None:
        system = system.with_params(params)
    began = time.perf_counter()
    _check_precision(system, tolerance)
    newton, first = (method, method.first) if isinstance(method, Newton) else (None, method)
    run = _Run(system, first, tolerance, int(max_steps), Decades(tolerance, progress))
    try:
        run.advance(run.tested, newton.patience if newton else run.max_steps)
        begin = newton.begin if newton else 0.0
        while newton and run.unfinished:
            run.advance(max(begin * float(_contact_force(run.system, run.length, run.limits.stiffness)), run.tested))
            pace = 0.0
            while run.unfinished and (pace == 0.0 or np.log(run.largest / run.tested) < WORTH * pace):
                pace = run.fall(STEPS_PER_CALL)
            if run.unfinished:
                run.descend()
            begin *= 0.1  # where Newton steps made no headway, from nearer by
        for _ in range(SADDLES):
            if not (newton and run.largest <= run.tested and run.leave_saddle()):
                break
            run.advance(run.tested)
    finally:
        run.bar.close()
    relaxed, steps = run.system.replace(potential=run.law), run.steps
    largest = run.largest if run.largest <= run.tested else float(max_force(relaxed))
    status = Status(int(_status(largest, tolerance, relaxed.neighbours.overflowed)))
    eq = Equilibrium(
        relaxed,
        jnp.asarray(status.value, jnp.int32),
        jnp.asarray(largest),
        jnp.asarray(steps),
        time.perf_counter() - began,
        tolerance,
    )
    if throw:
        raise_for_status(status, f"minimize stopped after {steps:,} steps at max_force {largest:.3e}", eq)
    return eq


class _Run:
    """A relaxation on the host: the system so far, the minimiser's state, the largest force left.

    Attributes:
      system: with its law in the cheapest form.
      law: as it was given.
      tested: what the largest force is to reach.
    """

    def __init__(self, system: System, method: Any, tolerance: float, max_steps: int, bar: Decades):
        self.law = system.potential
        self.system = system.replace(potential=self.law.at(system.params)).reallocate(keep=True)
        self.method, self.max_steps, self.bar = method, max_steps, bar
        dtype = system.positions.dtype.type
        self.length, stiffness = (dtype(x) for x in scales(system))
        self.limits = Limits.of((self.length, stiffness), method)
        self.tested = min(tolerance, 0.5 * float(self.limits.strongest))  # what was cut is not small
        self.state, self.steps, self.largest, self.room = None, 0, np.inf, 1.25

    @property
    def unfinished(self) -> bool:
        return self.largest > self.tested and self.steps < self.max_steps and bool(np.isfinite(self.largest))

    def fall(self, steps: int) -> float:
        """Some more steps; the powers of e that the largest force loses in one, -inf where it grows."""
        before, since = self.largest, self.steps
        self.advance(self.tested, since + steps)
        lost = np.log(before / self.largest) if self.largest > 0 else np.inf
        return lost / (self.steps - since) if lost > 0 else -np.inf

    def advance(self, target: float, until: int | None = None) -> None:
        """The minimiser's steps to a largest force, or up to a number of steps."""
        until = self.max_steps if until is None else min(until, self.max_steps)
        system, method = self.system, self.method
        state = _begin(system.positions, self.limits.stiffness, method) if self.state is None else self.state
        while self.steps < until and not self.largest <= target:
            budget = min(STEPS_PER_CALL, until - self.steps)
            state, pairs, done = _advance_jit(system, state, system.neighbours, target, budget, method, self.limits)
            self.steps += int(done)
            self.largest = float(largest_force(method.forces(state)))
            system = system.replace(positions=method.positions(state), neighbours=pairs)
            self.bar.show(self.steps, self.largest)
            if bool(pairs.overflowed) and np.isfinite(np.asarray(system.positions)).all():
                self.room = min(1.25 * self.room, 4.0) if int(done) <= 1 else 1.25
                system = system.reallocate(self.room)
                # what stood there came from a list that lost pairs
                state = method.with_forces(state, _forces(system, method, self.limits))
                self.largest = float(largest_force(method.forces(state)))
            elif not np.isfinite(self.largest):
                break
        self.system, self.state = system, state

    def descend(self) -> None:
        """Newton steps, as long as they make headway."""
        before, self.state = self.steps, None
        self.system, self.largest, taken = descend(
            self.system, self.tested, float(self.length), lambda k, force: self.bar.show(before + k, force)
        )
        self.steps += taken

    def leave_saddle(self) -> bool:
        """A step along the lowest mode where the Hessian has a negative one; whether there was one."""
        if not factorises(self.system):
            return False
        backbone, _, null = linearisation(self.system.replace(potential=self.law), self.largest)
        stiffness = Stiffness(backbone, null.simplified())
        if stiffness.factor is None or not stiffness.factor.negative:
            return False
        mode = stiffness.lowest(1).vectors[:, 0].reshape(self.system.positions.shape)
        step = OFF_SADDLE * float(self.length) / np.abs(mode).max() * mode
        self.system = self.system.replace(positions=self.system.positions + step).reallocate(keep=True)
        self.largest, self.state = np.inf, None
        return True


@jax.jit
def _contact_force(system: System, length: jax.Array, stiffness: jax.Array) -> jax.Array:
    """Mean force of the pairs that interact; of a law without pairs, what a hundredth of its length costs."""
    total, count = jnp.zeros(()), jnp.zeros(())
    for term in pair_terms(system):
        size = jnp.abs(pair_forces(term, pair_distances(term, system.positions, system.box)))
        total, count = total + jnp.sum(size), count + jnp.sum(size > 0)
    return jnp.where(count > 0, total / jnp.maximum(count, 1), 0.01 * stiffness * length)


def _minimize_batch(
    batch: System, params: Params | None, tolerance: float, method: Any, max_steps: int, throw: bool, progress: Any
) -> Equilibrium:
    starts, bar = unstack(batch), Members(batch.batch or 0, progress)

    def member(k: int) -> Equilibrium:
        return minimize(
            starts[k], params, tolerance=tolerance, method=method, max_steps=max_steps, throw=False, progress=False
        )

    try:
        members = each(member, len(starts), bar.advance)
    finally:
        bar.close()
    whole = stack([m.system for m in members])
    eq = Equilibrium(
        whole,
        jnp.stack([m.status for m in members]),
        jnp.stack([m.max_force for m in members]),
        jnp.stack([m.steps for m in members]),
        jnp.asarray([m.wall_time for m in members]),
        jnp.full(len(members), tolerance),
    )
    if throw:
        bad = [k for k, m in enumerate(members) if not Status(int(m.status)).good]
        if bad:
            status = Status(int(members[bad[0]].status))
            raise ConvergenceError(
                f"{len(bad)} of {len(members)} members did not relax, the first is member {bad[0]}: {status.sentence}.",
                status,
                eq,
            )
    return eq


def stats(eq: Equilibrium, method: Any) -> SolveStats:
    """The relaxation's evidence in the form that a solve has."""
    return SolveStats(eq.status, eq.max_force, eq.steps, jnp.zeros_like(eq.max_force), type(method).__name__)


def _check_kinds(system: Any, method: Any) -> None:
    if not isinstance(system, System):
        raise InputError(f"minimize got a {type(system).__name__}: give a System, such as ms.load_system gives.")
    if not isinstance(method, Newton | Fire | GradientDescent):
        raise InputError(f"method is {short(method)}: give Newton(), Fire() or GradientDescent() of ms.relaxation.")


def _check_precision(system: System, tolerance: float) -> None:
    floor = round_off(system)
    if tolerance < 0.05 * floor:
        remedy = f"raise it to {floor:.0e} or more"
        if system.positions.dtype != jnp.float64:
            remedy += ", or work in double precision (in Python, ms.enable_x64() before making the system)"
        raise PrecisionError(
            f"tolerance {tolerance:.0e} is out of reach in {system.positions.dtype}, where round-off of the positions "
            f"leaves forces of about {floor:.0e}: {remedy}."
        )
