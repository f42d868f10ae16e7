"""Relaxing a system to a minimum: choose how, run, judge."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from mdsens._util.environment import require_sound_jax
from mdsens._util.errors import ConvergenceError, InputError, raise_for_status
from mdsens._util.progress import Decades, Members
from mdsens._util.validation import require_host
from mdsens.mechanics.not_finite import where_not_finite
from mdsens.mechanics.status import Status
from mdsens.model.batch import stack, unstack
from mdsens.model.system import System
from mdsens.relaxation._augmented_lagrangian import relax_constrained
from mdsens.relaxation._batch_driver import relax_batch
from mdsens.relaxation._constant_pressure import relax_at_pressure
from mdsens.relaxation._driver import relax_in_fixed_cell
from mdsens.relaxation.equilibrium import Equilibrium, batch_of
from mdsens.relaxation.methods import Newton
from mdsens.relaxation.options import AtPressure, CellCondition, Method, Options, cell_condition

__all__ = ["minimize"]

Params = Mapping[str, Any]


def minimize(
    system: System,
    params: Params | None = None,
    *,
    cell: CellCondition | None = None,
    pressure: float | None = None,
    shape: bool = False,
    tolerance: float | None = None,
    method: Method | None = None,
    max_steps: int = 200_000,
    leave_saddles: bool = True,
    throw: bool = True,
    progress: bool | None = None,
) -> Equilibrium:
    """Relax a system to a minimum of its energy, dU/dR = 0; at a pressure, of its enthalpy U + P V.

    At a pressure the cell is an unknown like the positions: it is taken from the system to begin
    with and follows no parameter. A packing is compressed or decompressed to it, from an unjammed
    start, too. The derivatives of what comes
    out, by ``jvp`` and its kin, are at that pressure: the cell responds.

    Args:
      system: where to start; a batch made by ``stack`` relaxes member by member.
      params: parameters to change first; the others stay.
      cell: ``FixedCell()`` of ms.relaxation (the default), or ``AtPressure(P, shape=False)``.
      pressure, shape: short for ``cell=AtPressure(pressure, shape)``.
      tolerance: the largest force on a particle to reach, in the potential's units. The error of
        every derivative is this over the smallest stiffness. Where None, 1e-12 of the mean force of
        the pairs that interact, in any units. Where round-off of the positions leaves more than
        that, the relaxation ends there at once, ROUND_OFF_LIMITED, and ``force_floor`` says where
        that is.
      method: ``Newton()`` (the default: FIRE, and Newton steps where it crawls), ``Fire()`` or
        ``GradientDescent()``.
      max_steps: of the minimizer; at a pressure, of all its relaxations together.
      leave_saddles: go on downhill from where the forces vanish and a mode has a negative
        stiffness, as an exactly symmetric start does; ``saddles`` and ``descent`` of the result say
        how often and how far. With False the relaxation ends wherever the forces vanish. Where no
        factor tells, a few products with the Hessian look for such a mode, and may miss a weak one.
      throw: raise where the tolerance is not reached; with False the status says so instead.
      progress: show a progress bar; where None, in a terminal or notebook alone.

    Returns:
      an :class:`Equilibrium`.

    Raises:
      InputError: bad parameters or tolerance. PrecisionError: a tolerance below round-off at this
        precision.
      ConvergenceError: with the status, and what was reached as ``result``.
    """
    require_sound_jax()
    if not isinstance(system, System):
        raise InputError(
            f"minimize got a {type(system).__name__}: give a System, such as ms.load_system gives."
        )
    condition = cell_condition(cell, pressure, shape)
    options = Options(
        condition, tolerance, Newton() if method is None else method, max_steps, leave_saddles
    )
    require_host("minimize", "take ms.equilibrate(system, params) there", system, params)
    if params is not None:
        system = _with_params(system, params)
    options.check(system)
    if system.batch is not None:
        return _minimize_batch(system, options, throw, progress)
    with Decades(progress) as bar:
        eq, ended = _relax(system, options, bar)
    if throw:
        status = Status(int(eq.status))
        raise_for_status(status, ended + where_not_finite(status, system), eq)
    return eq


def _relax(system: System, options: Options, bar: Decades) -> tuple[Equilibrium, str]:
    """One system by the relaxation that its constraints and its cell ask for, timed."""
    began = time.perf_counter()
    if system.constraints:
        eq, ended = relax_constrained(system, options, bar)
    elif isinstance(options.cell, AtPressure):
        eq, ended = relax_at_pressure(system, options, bar)
    else:
        eq, ended = relax_in_fixed_cell(system, options, bar)
    return dataclasses.replace(eq, wall_time=time.perf_counter() - began), ended


def _minimize_batch(
    batch: System, options: Options, throw: bool, progress: bool | None
) -> Equilibrium:
    with Members(batch.batch or 0, progress) as bar:
        if batch.constraints or isinstance(options.cell, AtPressure):
            members = []
            for member in unstack(batch):  # each has a cell, or an active set, of its own
                members.append(_relax(member, options, Decades(False))[0])
                bar.advance(1)
            eq = batch_of(members)
        else:
            eq = relax_batch(batch, options, bar)
    if throw:
        _raise_for_members(eq, batch)
    return eq


def _with_params(system: System, params: Params) -> System:
    if system.batch is None:
        return system.with_params(params)
    return stack([member.with_params(params) for member in unstack(system)])


def _raise_for_members(eq: Equilibrium, start: System) -> None:
    codes = [Status(int(code)) for code in np.asarray(eq.status)]
    bad = [k for k, status in enumerate(codes) if not status.good]
    if bad:
        status = codes[bad[0]]
        what = f"{len(bad)} of {len(codes)} members did not relax, the first is member {bad[0]}"
        what += where_not_finite(status, unstack(start)[bad[0]])
        raise ConvergenceError(f"{what}: {status.sentence}.", status, eq)
