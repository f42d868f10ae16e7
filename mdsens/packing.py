"""Preparing packings: compressed or decompressed to a packing fraction, a little at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from mdsens import observables
from mdsens._util.errors import InputError, raise_for_status
from mdsens._util.progress import Members
from mdsens._util.validation import real_number, short
from mdsens.mechanics.status import Status
from mdsens.model.box import FixedBox
from mdsens.model.system import System, require_unconstrained
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.relaxation.minimization import minimize

__all__ = ["compress"]

LARGEST = 0.01  # of the packing fraction, in one step


def compress(
    start: System | Equilibrium,
    packing_fraction: float,
    *,
    step: float = LARGEST,
    tolerance: float | None = None,
    method: Any = None,
    max_steps: int = 200_000,
    throw: bool = True,
    progress: bool | None = None,
) -> Equilibrium:
    """Compress or decompress a packing to a packing fraction, relaxing it after every step.

    The cell keeps its shape; particles keep their fractional coordinates in a step, and are then
    relaxed. So the packing at the end has the history of the one it began as, where a random start
    at that fraction has none. To a pressure in place of a fraction goes ``minimize(system,
    pressure=P)``.

    Args:
      start: a System, relaxed or not, or an Equilibrium; with a cell, and a ``sigma`` of particles.
      packing_fraction: to reach, the volume of all particles over that of the cell, overlaps
        counted twice.
      step: the largest relative change of it in one step.
      tolerance, method, max_steps: of each relaxation, as in ``minimize``.
      throw: raise where a relaxation does not reach the tolerance; with False the status says so,
        and what was reached by then is given.
      progress: show a progress bar; where None, in a terminal or notebook alone.

    Returns:
      the Equilibrium at that packing fraction, in a cell of its own that follows no parameter.

    Raises:
      InputError: open boundaries, no ``sigma``, a batch, numbers that are not positive.
      ConvergenceError: see ``throw``.
    """
    system = start.system if isinstance(start, Equilibrium) else start
    if not isinstance(system, System):
        raise InputError(f"start is a {type(start).__name__}: give a System or an Equilibrium.")
    require_unconstrained(system, "compress")
    now = float(observables.packing_fraction(system))  # refuses a batch, open boundaries, no sigma
    for name, value in (("packing_fraction", packing_fraction), ("step", step)):
        number = real_number(name, value, "give a positive number.")
        if not (np.isfinite(number) and number > 0):
            raise InputError(f"{name} is {short(value)}: give a positive number.")
    count = max(1, int(np.ceil(abs(np.log(packing_fraction / now)) / np.log1p(step))))
    how: dict[str, Any] = {"tolerance": tolerance, "method": method, "max_steps": max_steps}
    bar, steps, seconds = Members(count, progress), 0, 0.0
    try:
        for fraction in now * (packing_fraction / now) ** (np.arange(1, count + 1) / count):
            scale = (float(observables.packing_fraction(system)) / fraction) ** (
                1.0 / system.dimension
            )
            cell = FixedBox(jnp.asarray(system.box) * scale, system.boundary.orthogonal)
            at = system.replace(positions=system.positions * scale, boundary=cell).reallocate(
                keep=True
            )
            eq = minimize(at, throw=False, progress=False, **how)
            steps, seconds, system = steps + int(eq.steps), seconds + float(eq.wall_time), eq.system
            eq = dataclasses.replace(eq, steps=jnp.asarray(steps), wall_time=seconds)
            if not Status(int(eq.status)).good:
                break
            bar.advance(1)
    finally:
        bar.close()
    if throw:
        reached = float(observables.packing_fraction(eq.system))
        raise_for_status(
            Status(int(eq.status)), f"compress stopped at packing fraction {reached:g}", eq
        )
    return eq
