"""The function ``minimize``, which relaxes a system or a batch and raises errors of convergence."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from mdsens._util.environment import require_sound_jax
from mdsens._util.errors import (
    ConvergenceError,
    InputError,
    InterruptionError,
    raise_for_status,
)
from mdsens._util.progress import Decades, Members
from mdsens._util.validation import require_host
from mdsens.mechanics.not_finite import where_not_finite
from mdsens.mechanics.status import Status
from mdsens.model.batch import stack, unstack
from mdsens.model.system import System
from mdsens.relaxation._augmented_lagrangian import relax_constrained
from mdsens.relaxation._batch_driver import relax_batch
from mdsens.relaxation._cell_relaxation import relax_with_cell
from mdsens.relaxation._driver import relax_in_fixed_cell
from mdsens.relaxation.cell_conditions import CellCondition, FixedCell, cell_condition
from mdsens.relaxation.equilibrium import Equilibrium, batch_of, largest_move
from mdsens.relaxation.methods import Newton
from mdsens.relaxation.options import Method, Options

__all__ = ["minimize", "stop_if_interrupted"]

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

    U is the energy, R the positions, P the pressure and V the volume. At a pressure the cell
    relaxes with the positions, starting from the cell of the system. Derivatives of the result, by
    ``jvp`` and the like, are then taken at constant pressure, where the cell responds to the
    parameters. This is so also if the cell at the start was a given function of the parameters; the
    relaxed cell no longer is. A packing is compressed or decompressed until it has this pressure,
    also from an unjammed start. In the same way the cell relaxes to a stress, or its shape at a
    fixed volume, by ``cell``.

    Args:
      system: the system at the start. Each system of a batch made by ``stack`` is relaxed.
      params: parameters to change before the relaxation; the others keep their values.
      cell: ``FixedCell()`` of ms.relaxation (the default), ``AtPressure(P)``, ``AtStress(stress)``
        or ``AtVolume()``, with their options.
      pressure, shape: a short form of ``cell=AtPressure(pressure, shape)``.
      tolerance: the largest force on a particle to reach, in the potential's units. None for 1e-12
        of the mean force of the pairs that interact. The positions are then wrong by about the
        tolerance over the smallest stiffness, and the error of every derivative grows with this
        distance. If round-off of the positions leaves larger forces than the tolerance, the
        relaxation ends as soon as it reaches these forces, with the status ROUND_OFF_LIMITED; their
        size is ``force_floor`` of the result.
      method: ``Newton()`` (the default: FIRE, and Newton steps where FIRE is slow), ``Fire()``,
        ``GradientDescent()`` or ``JaxMD(...)`` of ms.relaxation.
      max_steps: largest number of steps of the minimizer; where the cell relaxes, of all
        relaxations together.
      leave_saddles: whether to continue downhill where the forces vanish and a mode has a negative
        stiffness, as from an exactly symmetric start; ``saddles`` and ``descent`` of the result
        give how often and by how much energy. If False, the relaxation ends wherever the forces
        vanish. Where the Hessian is not factorized, the search for such a mode uses a few products
        of the Hessian and vectors, and may miss a mode of small stiffness.
      throw: whether to raise an error where the tolerance is not reached; if False, only the status
        shows this.
      progress: whether to show a progress bar; None shows it only in a terminal or a notebook.

    Returns:
      the relaxed system with its status, an :class:`Equilibrium`. Ctrl-C ends a relaxation at the
      last complete state, with the status INTERRUPTED: with ``throw`` it is the ``result`` of the
      error, which is a KeyboardInterrupt as well. ``ms.minimize(eq.system)`` continues.

    Raises:
      InputError: the parameters or options are not valid.
      PrecisionError: the tolerance is below round-off in the precision of the positions.
      ConvergenceError: the tolerance was not reached; the error has the status, and the
        configuration that was reached as ``result``.

    Example:
      >>> import mdsens as ms
      >>> ms.enable_x64()
      >>> eq = ms.minimize(ms.load_system("dimer"))  # two Lennard-Jones particles
      >>> apart = eq.positions[0] - eq.positions[1]
      >>> print(f"{float((apart**2).sum()) ** 0.5:.4f}")  # 2^(1/6) sigma
      1.1225
      >>> eq.status.good
      True
    """
    # Some versions of jax give wrong neighbor lists or forces without an error.
    require_sound_jax()
    if not isinstance(system, System):
        raise InputError(
            f"`system` is a {type(system).__name__}: give a System, such as ms.load_system returns."
        )
    options = Options(
        cell=cell_condition(cell, pressure, shape),
        tolerance=tolerance,
        method=Newton() if method is None else method,
        max_steps=max_steps,
        leave_saddles=leave_saddles,
    )
    # It reallocates neighbor lists and raises errors, which traced code cannot do.
    require_host("minimize", "take ms.equilibrate(system, params) there", system, params)
    if params is not None:
        system = _with_params(system, params)
    options.check(system)
    if system.batch is not None:
        return _minimize_batch(system, options, throw, progress)
    with Decades(progress) as bar:
        eq, message = _relax(system, options, bar)
    eq = dataclasses.replace(eq, moved=largest_move(system, eq.system))
    if throw:
        # of the system at the start, where a potential may be not finite
        status = eq.status
        message += where_not_finite(status, system)
        raise_for_status(status, message, eq, interrupted=status is Status.INTERRUPTED)
    return eq


def _relax(system: System, options: Options, bar: Decades) -> tuple[Equilibrium, str]:
    """Relax one system: under its constraints, in a fixed cell, or together with its cell.

    Returns:
      (the relaxed system with its wall time, text for an error message that tells where the
      relaxation ended).
    """
    began = time.perf_counter()
    # Constraints come first: ``options.check`` has refused them where the cell relaxes.
    if system.constraints:
        eq, message = relax_constrained(system, options, bar)
    elif isinstance(options.cell, FixedCell):
        eq, message = relax_in_fixed_cell(system, options, bar)
    else:
        eq, message = relax_with_cell(system, options.cell, options, bar)
    return dataclasses.replace(eq, wall_time=time.perf_counter() - began), message


def _minimize_batch(
    batch: System, options: Options, throw: bool, progress: bool | None
) -> Equilibrium:
    """Relax the systems of a batch, each to its own minimum.

    Unconstrained systems in fixed cells are relaxed together, other systems one by one.
    """
    with Members(batch.batch or 0, progress) as bar:
        if batch.constraints or not isinstance(options.cell, FixedCell):
            # The cells, or the sets of active constraints, differ between the members.
            members = []
            for member in unstack(batch):
                members.append(_relax(member, options, Decades(False))[0])
                if int(members[-1].status) == Status.INTERRUPTED:
                    options = dataclasses.replace(options, interrupted=True)
                bar.advance(1)
            eq = batch_of(members)
        else:
            eq = relax_batch(batch, options, bar)
    eq = dataclasses.replace(eq, moved=largest_move(batch, eq.system))
    if throw:
        _raise_for_members(eq, batch)
    return eq


def _with_params(system: System, params: Params) -> System:
    """Return the system, or each system of a batch, with some parameters changed."""
    if system.batch is None:
        return system.with_params(params)
    return stack([member.with_params(params) for member in unstack(system)])


def _raise_for_members(eq: Equilibrium, start: System) -> None:
    """Raise ConvergenceError if systems of a batch did not relax, with the status of the first one.

    Args:
      eq: the results for all systems of the batch.
      start: the batch before its relaxation, which is searched for an energy that is not finite.
    """
    codes = [Status(int(code)) for code in np.asarray(eq.status)]
    bad = [k for k, status in enumerate(codes) if not status.good]
    if bad:
        status = codes[bad[0]]
        message = (
            f"{len(bad)} of the {len(codes)} systems did not relax, the first is system {bad[0]}"
        )
        message += where_not_finite(status, unstack(start)[bad[0]])
        error = InterruptionError if Status.INTERRUPTED in codes else ConvergenceError
        raise error(f"{message}: {status.sentence}.", status, eq)


def stop_if_interrupted(eq: Equilibrium) -> None:
    """Raise KeyboardInterrupt if a relaxation was interrupted, of one system or of a batch.

    It is for code that calls ``minimize`` with throw=False, and would go on.
    """
    if np.any(np.asarray(eq.status) == Status.INTERRUPTED.value):
        raise KeyboardInterrupt
