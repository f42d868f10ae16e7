"""Relaxing a system to a minimum: jax-md's minimisers in a loop that owns the list, the tolerance and the status."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._checks import real_number, require_host, short
from mdsens._held import relax_held
from mdsens._loop import advance, at_rest, status_of
from mdsens._members import in_chunks, joined, together
from mdsens._pressed import pressed
from mdsens._progress import Decades, Members
from mdsens._runs import Run, Runs
from mdsens._tables import Shown
from mdsens.batches import stack, unstack
from mdsens.implicit.status import (
    ConvergenceError,
    InputError,
    Portable,
    PrecisionError,
    SolveStats,
    Status,
    raise_for_status,
    require_sound_jax,
)
from mdsens.lagrangian import multipliers_at, own_params, unknowns_of
from mdsens.minimisers import Fire, GradientDescent, Newton
from mdsens.not_finite import where_not_finite
from mdsens.scales import Limits, force_goal, force_scale, round_off, scales
from mdsens.stationarity import largest_force, max_force
from mdsens.system import System, potential_energy, require_unconstrained

__all__ = ["Equilibrium", "Fire", "GradientDescent", "Newton", "minimize", "relax"]

Params = Mapping[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Equilibrium(Portable, Shown):
    """A relaxed system with the evidence. Frozen, and a pytree; of a batch, every array has a leading axis.

    Attributes:
      system: relaxed.
      status: a :class:`~mdsens.Status`, as an integer array.
      max_force: the largest norm of a particle's force left (ASE's fmax), in energy a length.
      steps: of the minimiser.
      wall_time: seconds, compilation included; 0 inside traced code.
      tolerance: what max_force was to reach: the one that was asked for, or 1e-12 of the mean pair force.
      force_floor: the largest force that round-off of the positions leaves on a particle,
        4 eps sqrt(sum_j (k_ij |R|)^2 + f_ij^2): no relaxation goes below it.
      saddles: how many saddles were left on the way, each along a mode of negative stiffness.
      descent: how far down in energy the minimum is from the first of them.
      examined: whether the Hessian there was looked at for negative stiffness.
      pressure: at which the cell was relaxed, too; None in a cell that was given.
      strains: (k, d, d) orthonormal strains that the cell was free to take; None likewise.
      multipliers: of the system's constraints, by their names; None without constraints.
      order: how many modes have a negative stiffness: 0 at a minimum, 1 at the saddle of ``find_saddle``.
    """

    system: System
    status: jax.Array
    max_force: jax.Array
    steps: jax.Array
    wall_time: Any
    tolerance: Any
    force_floor: Any = 0.0
    saddles: Any = 0
    descent: Any = 0.0
    examined: Any = False
    pressure: Any = None
    strains: Any = None
    multipliers: Any = None
    order: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def positions(self) -> jax.Array:
        """(n, d), the system's."""
        return self.system.positions

    @property
    def params(self) -> dict[str, jax.Array]:
        """The system's."""
        return self.system.params

    @property
    def held_by(self) -> int | None:
        """How many contacts hold a particle here: at a saddle two that oppose each other; None for what a minimum
        needs.
        """
        return 2 if self.order else None

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
            *([("kind", f"saddle of order {self.order}")] if self.order else []),
            (
                "max_force",
                f"{float(self.max_force):.2e} (tolerance {float(self.tolerance):.0e}, round-off "
                f"{float(self.force_floor):.0e})",
            ),
            *([("saddles", self.saddles_in_words())] if int(self.saddles) else []),
            *([] if self.pressure is None else [("pressure", self.cell_in_words())]),
            ("steps", f"{int(self.steps):,} in {float(self.wall_time):.2f} s"),
        ]

    def saddles_in_words(self) -> str:
        """How many saddles were left on the way, and how far down."""
        times = "one was" if int(self.saddles) == 1 else f"{int(self.saddles)} were"
        return f"{times} left, {float(self.descent):.4g} down in energy"

    def cell_in_words(self) -> str:
        """What the cell was relaxed to, and its volume; of a minimum at a pressure."""
        free = "the size of the cell was" if len(self.strains) == 1 else "the size and shape of the cell were"
        return f"{float(self.pressure):.6g}, to which {free} relaxed: volume {float(self.system.volume):.8g}"


def relax(system: System, tolerance: Any, max_steps: Any, method: Any) -> Equilibrium:
    """Relax inside traced code: no reallocation, no errors; the status says what happened."""
    dtype = system.positions.dtype
    # a fixed cutoff is a double where x64 is on: positions in single precision keep theirs through the loop
    length, stiffness = jax.tree.map(lambda x: jax.lax.stop_gradient(x).astype(dtype), scales(system))
    limits = Limits.of((length, stiffness), method)
    state = at_rest(system.positions, limits, method)
    cut = 0.5 * limits.strongest  # what was cut is not small

    def aim(state: Any, pairs: Any) -> tuple[jax.Array, jax.Array]:
        at = system.replace(positions=method.positions(state), neighbours=pairs)
        left = largest_force(method.forces(state))
        goal, stop = force_goal(force_scale(at, length, stiffness, left), tolerance)
        return jnp.asarray(goal, dtype), jnp.fmin(stop, cut).astype(dtype)

    def unfinished(carry: Any) -> jax.Array:
        state, pairs, steps, _, stop = carry
        left = largest_force(method.forces(state))
        return (left > stop) & jnp.isfinite(left) & (steps < max_steps) & ~pairs.overflowed

    def go_on(carry: Any) -> Any:
        state, pairs, steps, _, stop = carry
        state, pairs, taken = advance(system, state, pairs, stop, max_steps - steps, method, limits)
        return state, pairs, steps + taken, *aim(state, pairs)

    # what is to be reached depends on the pairs that interact, and they change on the way
    start = state, system.neighbours, jnp.zeros((), jnp.int32), cut, cut
    state, pairs, steps, goal, stop = jax.lax.while_loop(unfinished, go_on, go_on(start))
    relaxed = system.replace(positions=method.positions(state), neighbours=pairs)
    # the force that met the tolerance, or, where none did, the whole force without its limit
    largest = largest_force(method.forces(state))
    largest = jnp.where(largest <= stop, largest, max_force(relaxed))
    scale = force_scale(relaxed, length, stiffness, largest)
    code = status_of(largest, goal, scale.floor, scale.idle, pairs.overflowed)
    return Equilibrium(relaxed, code, largest, steps, jnp.zeros((), dtype), goal, scale.floor.astype(dtype))


def minimize(
    system: System,
    params: Params | None = None,
    *,
    pressure: float | None = None,
    shape: bool = False,
    tolerance: float | None = None,
    method: Newton | Fire | GradientDescent | None = None,
    max_steps: int = 200_000,
    leave_saddles: bool = True,
    throw: bool = True,
    progress: bool | None = None,
) -> Equilibrium:
    """Relax a system to a minimum of its energy, dU/dR = 0; at a pressure, of its enthalpy U + P V.

    At a pressure the cell is an unknown like the positions: it is taken from the system to begin with and follows no
    parameter. A packing is compressed or decompressed to it, from an unjammed start, too. The derivatives of what comes
    out, by ``jvp`` and its kin, are at that pressure: the cell responds.

    Args:
      system: where to start; a batch made by ``stack`` relaxes member by member.
      params: parameters to change first; the others stay.
      pressure: P, energy a volume, to which the cell is relaxed; None for a cell that stays as it is.
      shape: relax the shape of the cell too, until no shear stress is left; without it the cell grows or shrinks alike
        in all directions, and the pressure is the mean over them.
      tolerance: the largest force on a particle to reach, in the potential's units. The error of every derivative is
        this over the smallest stiffness. Where None, 1e-12 of the mean force of the pairs that interact, in any units.
        Where round-off of the positions leaves more than that, the relaxation ends there at once, ROUND_OFF_LIMITED,
        and ``force_floor`` says where that is.
      method: ``Newton()`` (the default: FIRE, and Newton steps where it crawls), ``Fire()`` or ``GradientDescent()``.
      max_steps: of the minimiser; at a pressure, of all its relaxations together.
      leave_saddles: go on downhill from where the forces vanish and a mode has a negative stiffness, as an exactly
        symmetric start does; ``saddles`` and ``descent`` of the result say how often and how far. With False the
        relaxation ends wherever the forces vanish. Where no factor tells, a few products with the Hessian look for
        such a mode, and may miss a weak one.
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
    require_host("minimize", "take ms.equilibrate(system, params) there", system, params)
    if tolerance is not None and not (isinstance(tolerance, Real) and 0 < tolerance <= sys.float_info.max):
        raise InputError(f"tolerance is {short(tolerance)}: give a positive number, or None.")
    if not (isinstance(max_steps, Real) and max_steps >= 1):
        raise InputError(f"max_steps is {short(max_steps)}: give 1 or more.")
    if not isinstance(leave_saddles, bool):
        raise InputError(f"leave_saddles is {short(leave_saddles)}: give True or False.")
    if pressure is None and shape:
        raise InputError("shape=True goes with a pressure: give the pressure to relax the cell to.")
    if pressure is not None:
        _check_pressure(system, pressure, shape)
        if system.batch is not None:
            return _one_by_one(system, params, throw, {
                "pressure": pressure, "shape": shape, "tolerance": tolerance, "method": method, "max_steps": max_steps,
                "leave_saddles": leave_saddles,
            })  # fmt: skip
    if system.batch is not None and system.constraints:
        how = {"tolerance": tolerance, "method": method, "max_steps": max_steps, "leave_saddles": leave_saddles}
        return _one_by_one(system, params, throw, how)
    if system.batch is not None:
        return _minimize_batch(system, params, tolerance, method, max_steps, leave_saddles, throw, progress)
    if params is not None:
        system = system.with_params(params)
    began = time.perf_counter()
    if system.constraints:
        return _constrained(system, pressure, tolerance, method, max_steps, leave_saddles, throw, progress)
    if pressure is not None:
        how = {"tolerance": tolerance, "method": method, "leave_saddles": leave_saddles}
        return _at_pressure(system, float(pressure), shape, how, max_steps, throw, progress)
    _check_precision(system, tolerance)
    newton, first = (method, method.first) if isinstance(method, Newton) else (None, method)
    bar = Decades(progress)
    run = Run.of(system, first, tolerance, int(max_steps), bar)
    try:
        run.to_minimum(newton, leave_saddles)
    finally:
        bar.close()
    eq = _reached(run, time.perf_counter() - began)
    if throw:
        status, steps, largest = Status(int(eq.status)), int(eq.steps), float(eq.max_force)
        what = f"minimize stopped after {steps:,} steps at max_force {largest:.3e}{where_not_finite(status, system)}"
        raise_for_status(status, what, eq)
    return eq


def _constrained(
    system: System,
    pressure: Any,
    tolerance: float | None,
    method: Any,
    max_steps: int,
    leave_saddles: bool,
    throw: bool,
    progress: bool | None,
) -> Equilibrium:
    began = time.perf_counter()
    if pressure is not None:
        require_unconstrained(system, "a cell at a pressure")
    if not isinstance(method, Newton):
        raise InputError(
            f"method is {short(method)}, which knows no constraints: leave it out, for an augmented Lagrangian and "
            "Newton steps."
        )
    _check_precision(system, tolerance)
    bar = Decades(progress)
    try:
        found = relax_held(system, tolerance, int(max_steps), leave_saddles, bar)
    finally:
        bar.close()
    relaxed = found.system
    multipliers = multipliers_at(relaxed, unknowns_of(relaxed, found.multipliers), own_params(relaxed))
    eq = Equilibrium(
        relaxed,
        jnp.asarray(found.status.value, jnp.int32),
        jnp.asarray(found.max_force),
        jnp.asarray(found.steps),
        time.perf_counter() - began,
        found.goal,
        force_floor=found.floor,
        saddles=found.saddles,
        descent=found.descent,
        examined=found.examined,
        multipliers=multipliers,
    )
    if throw:
        what = f"minimize under constraints stopped after {found.steps:,} steps at max_force {found.max_force:.3e}"
        what += f"; {found.unmet}" if found.unmet else where_not_finite(found.status, system)
        raise_for_status(found.status, what, eq)
    return eq


def _at_pressure(
    system: System,
    pressure: float,
    shape: bool,
    how: dict[str, Any],
    max_steps: int,
    throw: bool,
    progress: bool | None,
) -> Equilibrium:
    began = time.perf_counter()

    def relax_in_cell(at: System, budget: int) -> Equilibrium:
        return minimize(at, throw=False, max_steps=budget, progress=progress, **how)

    eq, steps, strains, status = pressed(relax_in_cell, system, pressure, shape, how["tolerance"], int(max_steps))
    dtype = system.positions.dtype
    eq = dataclasses.replace(
        eq,
        status=jnp.asarray(status.value, jnp.int32),
        steps=jnp.asarray(steps),
        wall_time=time.perf_counter() - began,
        pressure=jnp.asarray(pressure, dtype),
        strains=jnp.asarray(strains, dtype),
    )
    if throw:
        what = f"minimize at pressure {pressure:g} stopped after {steps:,} steps at volume {float(eq.system.volume):g}"
        what += where_not_finite(status, system)
        raise_for_status(status, what, eq)
    return eq


def _one_by_one(batch: System, params: Params | None, throw: bool, how: dict[str, Any]) -> Equilibrium:
    found = [minimize(member, params, throw=False, **how) for member in unstack(batch)]
    arrays = together([dataclasses.replace(m, system=None) for m in found])
    eq = dataclasses.replace(arrays, system=stack([m.system for m in found]))
    if throw:
        _raise_for_members(eq, batch)
    return eq


def _reached(run: Run, seconds: float) -> Equilibrium:
    relaxed = run.system.replace(potential=run.law)
    if not run.at_rest:
        run.largest = float(max_force(relaxed))
    run.aim()
    assert run.scale is not None
    code = status_of(run.largest, run.goal, run.floor, run.scale.idle, relaxed.neighbours.overflowed)
    if run.unstable:
        code = jnp.asarray(Status.INDEFINITE.value, jnp.int32)
    descent = run.highest - float(potential_energy(relaxed)) if run.saddles else 0.0
    evidence = float(run.scale.floor), run.saddles, descent, run.examined
    return Equilibrium(relaxed, code, jnp.asarray(run.largest), jnp.asarray(run.steps), seconds, run.goal, *evidence)


def _all_reached(runs: Runs, seconds: float, examined: bool) -> Equilibrium:
    relaxed, largest = runs.systems.replace(potential=runs.law), runs.largest
    if np.any(largest > runs.tested):
        runs.largest = np.where(largest <= runs.tested, largest, np.asarray(jax.vmap(max_force)(relaxed)))
    runs.aim()
    scale, same = runs.scale, np.ones(runs.tested.size)
    code = status_of(runs.largest, runs.goal, scale.floor, scale.idle, relaxed.neighbours.overflowed)
    found = jnp.asarray(runs.largest), jnp.asarray(runs.steps), seconds * same, np.asarray(runs.goal)
    return Equilibrium(
        relaxed, code, *found, np.asarray(scale.floor), 0 * runs.steps, 0.0 * same, examined * (same > 0)
    )


def _minimize_batch(
    batch: System,
    params: Params | None,
    tolerance: float | None,
    method: Any,
    max_steps: int,
    leave_saddles: bool,
    throw: bool,
    progress: Any,
) -> Equilibrium:
    if params is not None:
        batch = stack([member.with_params(params) for member in unstack(batch)])
    _check_precision(batch, tolerance)
    bar = Members(batch.batch or 0, progress)
    newton, first = (method, method.first) if isinstance(method, Newton) else (None, method)

    def some(part: System, count: int) -> tuple[Equilibrium, int, dict[int, Equilibrium]]:
        began = time.perf_counter()
        runs = Runs(part, first, tolerance, int(max_steps), count)
        runs.to_minimum(newton)
        others = {k: runs.run(k) for k in runs.on_their_own(leave_saddles)}
        for run in others.values():
            run.to_minimum(newton, leave_saddles)
        seconds = (time.perf_counter() - began) / count
        bar.advance(count)
        return (
            _all_reached(runs, seconds, leave_saddles),
            count,
            {k: _reached(run, seconds) for k, run in others.items()},
        )

    try:
        parts, counts, others = zip(*in_chunks(some, batch, batch.batch or 0, batch.n), strict=True)
    finally:
        bar.close()
    eq = joined(parts, counts)
    if any(others):
        members, start = unstack(eq), 0
        for some_others, count in zip(others, counts, strict=True):
            for k, other in some_others.items():
                members[start + k] = other
            start += count
        arrays = together([dataclasses.replace(m, system=None) for m in members])
        eq = dataclasses.replace(arrays, system=stack([m.system for m in members]))
    if throw:
        _raise_for_members(eq, batch)
    return eq


def _raise_for_members(eq: Equilibrium, start: System) -> None:
    codes = [Status(int(code)) for code in np.asarray(eq.status)]
    bad = [k for k, status in enumerate(codes) if not status.good]
    if bad:
        status = codes[bad[0]]
        what = f"{len(bad)} of {len(codes)} members did not relax, the first is member {bad[0]}"
        what += where_not_finite(status, unstack(start)[bad[0]])
        raise ConvergenceError(f"{what}: {status.sentence}.", status, eq)


def stats(eq: Equilibrium, method: Any) -> SolveStats:
    """The relaxation's evidence in the form that a solve has."""
    return SolveStats(eq.status, eq.max_force, eq.steps, jnp.zeros_like(eq.max_force), type(method).__name__)


def _check_kinds(system: Any, method: Any) -> None:
    require_sound_jax()
    if not isinstance(system, System):
        raise InputError(f"minimize got a {type(system).__name__}: give a System, such as ms.load_system gives.")
    if not isinstance(method, Newton | Fire | GradientDescent):
        raise InputError(f"method is {short(method)}: give Newton(), Fire() or GradientDescent() of ms.relaxation.")


def _check_pressure(system: System, pressure: Any, shape: Any) -> None:
    real_number("pressure", pressure, "give one number, energy a volume, or None for a cell that stays.")
    if not np.isfinite(pressure):
        raise InputError(f"pressure is {pressure}: give a finite number.")
    if not isinstance(shape, bool):
        raise InputError(f"shape is {short(shape)}: give True or False.")
    if system.box is None:
        raise InputError("pressure needs a cell, and this system has open boundaries: give it a box.")
    if "pressure" in system.params:
        raise InputError("the law has a parameter 'pressure', which the cell's would hide: give it another name.")


def _check_precision(system: System, tolerance: float | None) -> None:
    if tolerance is None:
        return
    floor = round_off(system)
    if tolerance < 0.05 * floor:
        remedy = f"raise it to {floor:.0e} or more"
        if system.positions.dtype != jnp.float64:
            remedy += ", or work in double precision (in Python, ms.enable_x64() before making the system)"
        raise PrecisionError(
            f"tolerance {tolerance:.0e} is out of reach in {system.positions.dtype}, where round-off of the positions "
            f"leaves forces of about {floor:.0e}: {remedy}."
        )
