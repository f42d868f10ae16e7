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

from mdsens._checks import real_number, short
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
    PrecisionError,
    SolveStats,
    Status,
    raise_for_status,
)
from mdsens.lagrangian import multipliers_at, own_params, unknowns_of
from mdsens.minimisers import Fire, GradientDescent, Newton
from mdsens.scales import Limits, round_off, scales
from mdsens.stationarity import largest_force, max_force
from mdsens.system import System, require_unconstrained

__all__ = ["Equilibrium", "Fire", "GradientDescent", "Newton", "minimize", "relax"]

Params = Mapping[str, Any]


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
            ("max_force", f"{float(self.max_force):.2e} (tolerance {float(self.tolerance):.0e})"),
            *([] if self.pressure is None else [("pressure", self.cell_in_words())]),
            ("steps", f"{int(self.steps):,} in {float(self.wall_time):.2f} s"),
        ]

    def cell_in_words(self) -> str:
        """What the cell was relaxed to, and its volume; of a minimum at a pressure."""
        free = "the size of the cell was" if len(self.strains) == 1 else "the size and shape of the cell were"
        return f"{float(self.pressure):.6g}, to which {free} relaxed: volume {float(self.system.volume):.8g}"


def relax(system: System, tolerance: Any, max_steps: Any, method: Any) -> Equilibrium:
    """Relax inside traced code: no reallocation, no errors; the status says what happened."""
    dtype = system.positions.dtype
    # a fixed cutoff is a double where x64 is on: positions in single precision keep theirs through the loop
    limits = Limits.of(jax.tree.map(lambda x: jax.lax.stop_gradient(x).astype(dtype), scales(system)), method)
    state = at_rest(system.positions, limits.stiffness, method)
    tested = jnp.minimum(tolerance, 0.5 * limits.strongest)  # what was cut is not small
    state, pairs, steps = advance(system, state, system.neighbours, tested, max_steps, method, limits)
    relaxed = system.replace(positions=method.positions(state), neighbours=pairs)
    # the force that met the tolerance, or, where none did, the whole force without its limit
    largest = largest_force(method.forces(state))
    largest = jnp.where(largest <= tested, largest, max_force(relaxed))
    code = status_of(largest, tolerance, pairs.overflowed)
    zero = jnp.zeros((), dtype)
    return Equilibrium(relaxed, code, largest, steps, zero, jnp.asarray(tolerance, zero.dtype))


def minimize(
    system: System,
    params: Params | None = None,
    *,
    pressure: float | None = None,
    shape: bool = False,
    tolerance: float = 1e-12,
    method: Newton | Fire | GradientDescent | None = None,
    max_steps: int = 200_000,
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
        this over the smallest stiffness, so it is small by default; raise it where round-off stands above it.
      method: ``Newton()`` (the default: FIRE, and Newton steps where it crawls; where the Hessian can be factorised, a
        saddle that FIRE came to rest on is left), ``Fire()`` or ``GradientDescent()``.
      max_steps: of the minimiser; at a pressure, of all its relaxations together.
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
    if pressure is None and shape:
        raise InputError("shape=True goes with a pressure: give the pressure to relax the cell to.")
    if pressure is not None:
        _check_pressure(system, pressure, shape)
        if system.batch is not None:
            return _one_by_one(system, params, throw, {
                "pressure": pressure, "shape": shape, "tolerance": tolerance, "method": method, "max_steps": max_steps,
            })  # fmt: skip
    if system.batch is not None and system.constraints:
        how = {"tolerance": tolerance, "method": method, "max_steps": max_steps}
        return _one_by_one(system, params, throw, how)
    if system.batch is not None:
        return _minimize_batch(system, params, tolerance, method, max_steps, throw, progress)
    if params is not None:
        system = system.with_params(params)
    began = time.perf_counter()
    if system.constraints:
        return _constrained(system, pressure, tolerance, method, max_steps, throw, progress)
    if pressure is not None:
        return _at_pressure(system, float(pressure), shape, tolerance, method, max_steps, throw, progress)
    _check_precision(system, tolerance)
    newton, first = (method, method.first) if isinstance(method, Newton) else (None, method)
    bar = Decades(tolerance, progress)
    run = Run.of(system, first, tolerance, int(max_steps), bar)
    try:
        run.to_minimum(newton)
    finally:
        bar.close()
    eq = _reached(run, tolerance, time.perf_counter() - began)
    if throw:
        status, steps, largest = Status(int(eq.status)), int(eq.steps), float(eq.max_force)
        raise_for_status(status, f"minimize stopped after {steps:,} steps at max_force {largest:.3e}", eq)
    return eq


def _constrained(
    system: System, pressure: Any, tolerance: float, method: Any, max_steps: int, throw: bool, progress: bool | None
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
    bar = Decades(tolerance, progress)
    try:
        found = relax_held(system, tolerance, int(max_steps), bar.show)
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
        tolerance,
        multipliers=multipliers,
    )
    if throw:
        what = f"minimize under constraints stopped after {found.steps:,} steps at max_force {found.max_force:.3e}"
        what += f"; {found.unmet}" if found.unmet else ""
        raise_for_status(found.status, what, eq)
    return eq


def _at_pressure(
    system: System,
    pressure: float,
    shape: bool,
    tolerance: float,
    method: Any,
    max_steps: int,
    throw: bool,
    progress: bool | None,
) -> Equilibrium:
    began = time.perf_counter()

    def relax_held(at: System, budget: int) -> Equilibrium:
        how: dict[str, Any] = {"method": method, "max_steps": budget, "progress": progress}
        return minimize(at, tolerance=tolerance, throw=False, **how)

    eq, steps, strains, status = pressed(relax_held, system, pressure, shape, tolerance, int(max_steps))
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
        raise_for_status(status, what, eq)
    return eq


def _one_by_one(batch: System, params: Params | None, throw: bool, how: dict[str, Any]) -> Equilibrium:
    found = [minimize(member, params, throw=False, **how) for member in unstack(batch)]
    arrays = together([dataclasses.replace(m, system=None) for m in found])
    eq = dataclasses.replace(arrays, system=stack([m.system for m in found]))
    if throw:
        _raise_for_members(eq)
    return eq


def _reached(run: Run, tolerance: float, seconds: float) -> Equilibrium:
    relaxed = run.system.replace(potential=run.law)
    largest = run.largest if run.largest <= run.tested else float(max_force(relaxed))
    status = status_of(largest, tolerance, relaxed.neighbours.overflowed)
    return Equilibrium(relaxed, status, jnp.asarray(largest), jnp.asarray(run.steps), seconds, tolerance)


def _all_reached(runs: Runs, tolerance: float, seconds: float) -> Equilibrium:
    relaxed, largest = runs.systems.replace(potential=runs.law), jnp.asarray(runs.largest)
    if np.any(runs.largest > runs.tested):
        largest = jnp.where(largest <= runs.tested, largest, jax.vmap(max_force)(relaxed))
    status = status_of(largest, tolerance, relaxed.neighbours.overflowed)
    same = np.ones(runs.tested.size)
    return Equilibrium(relaxed, status, largest, jnp.asarray(runs.steps), seconds * same, tolerance * same)


def _minimize_batch(
    batch: System, params: Params | None, tolerance: float, method: Any, max_steps: int, throw: bool, progress: Any
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
        others = {k: runs.run(k) for k in runs.on_their_own(newton)}
        for run in others.values():
            run.to_minimum(newton)
        seconds = (time.perf_counter() - began) / count
        bar.advance(count)
        return (
            _all_reached(runs, tolerance, seconds),
            count,
            {k: _reached(run, tolerance, seconds) for k, run in others.items()},
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
        _raise_for_members(eq)
    return eq


def _raise_for_members(eq: Equilibrium) -> None:
    codes = [Status(int(code)) for code in np.asarray(eq.status)]
    bad = [k for k, status in enumerate(codes) if not status.good]
    if bad:
        status = codes[bad[0]]
        raise ConvergenceError(
            f"{len(bad)} of {len(codes)} members did not relax, the first is member {bad[0]}: {status.sentence}.",
            status,
            eq,
        )


def stats(eq: Equilibrium, method: Any) -> SolveStats:
    """The relaxation's evidence in the form that a solve has."""
    return SolveStats(eq.status, eq.max_force, eq.steps, jnp.zeros_like(eq.max_force), type(method).__name__)


def _check_kinds(system: Any, method: Any) -> None:
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
