"""Prepare packings: compress or decompress them to a given packing fraction, in small steps."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from mdsens import observables
from mdsens._util.errors import InputError, raise_for_status
from mdsens._util.progress import Members
from mdsens._util.validation import real_number, short
from mdsens.model.box import FixedBox
from mdsens.model.system import System, require_unconstrained
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.relaxation.minimization import minimize
from mdsens.relaxation.options import Method

__all__ = ["compress"]

# largest relative change of the packing fraction in one step
LARGEST_STEP = 0.01


def compress(
    start: System | Equilibrium,
    packing_fraction: float,
    *,
    step: float = LARGEST_STEP,
    tolerance: float | None = None,
    method: Method | None = None,
    max_steps: int = 200_000,
    throw: bool = True,
    progress: bool | None = None,
) -> Equilibrium:
    """Compress or decompress a packing to a packing fraction, relaxing it after every small step.

    The cell keeps its shape. In each step the cell is rescaled with the particles, which keep their
    fractional coordinates, and then the particles are relaxed. So the final packing depends on the
    initial one, unlike a packing that is relaxed from random positions at the final packing
    fraction. To reach a target pressure instead, use ``minimize(system, pressure=P)``.

    Args:
      start: a System, relaxed or not, or an Equilibrium, which is the result of ``minimize``. The
        system must have a cell, and a parameter ``sigma`` that gives the diameters of the
        particles.
      packing_fraction: the target, the total volume of the particles divided by the volume of the
        cell; overlaps count twice.
      step: the largest relative change of the packing fraction in one step.
      tolerance, method, max_steps: tolerance of the forces, method and largest number of steps of
        each relaxation, as in ``minimize``.
      throw: whether to raise an error where a relaxation does not reach the tolerance; if False,
        the last configuration is returned, and its ``status`` tells that the tolerance was not
        reached.
      progress: whether to show a progress bar; None shows it only in a terminal or a notebook.

    Returns:
      the relaxed packing at the target packing fraction, an Equilibrium. Its cell is fixed, and
      does not change with the parameters of the potential.

    Raises:
      InputError: the system has open boundaries, has no ``sigma`` or is a batch, or an argument is
        not a positive number.
      ConvergenceError: a relaxation did not reach the tolerance, and ``throw`` is True.
    """
    system = start.system if isinstance(start, Equilibrium) else start
    if not isinstance(system, System):
        raise InputError(f"`start` is a {type(start).__name__}: give a System or an Equilibrium.")
    require_unconstrained(system, "compress")
    # this also refuses a batch, open boundaries and a potential without sigma
    initial = float(observables.packing_fraction(system))
    for name, value in (("packing_fraction", packing_fraction), ("step", step)):
        number = real_number(name, value, "give a positive number.")
        if not (np.isfinite(number) and number > 0):
            raise InputError(f"`{name}` is {short(value)}: give a positive number.")
    # equal ratios, so that every step has the same relative change, of at most ``step``
    ratio = packing_fraction / initial
    count = max(1, int(np.ceil(abs(np.log(ratio)) / np.log1p(step))))
    bar = Members(count, progress)
    steps = 0
    seconds = 0.0
    try:
        for fraction in initial * ratio ** (np.arange(1, count + 1) / count):
            # relative to the packing fraction that the last step has reached
            scale = (float(observables.packing_fraction(system)) / fraction) ** (
                1.0 / system.dimension
            )
            cell = FixedBox(jnp.asarray(system.box) * scale, system.boundary.orthogonal)
            scaled = system.replace(positions=system.positions * scale, boundary=cell)
            eq = minimize(
                # The list keeps its capacity where it can, so that compiled code is used again.
                scaled.reallocate(keep=True),
                tolerance=tolerance,
                method=method,
                max_steps=max_steps,
                throw=False,
                progress=False,
            )
            system = eq.system
            steps += int(eq.steps)
            seconds += float(eq.wall_time)
            # the totals of all relaxations so far
            eq = dataclasses.replace(eq, steps=jnp.asarray(steps), wall_time=seconds)
            if not eq.status.good:
                break
            bar.advance(1)
    finally:
        bar.close()
    if throw:
        reached = float(observables.packing_fraction(eq.system))
        message = f"compress stopped at packing fraction {reached:g}"
        raise_for_status(eq.status, message, eq)
    return eq
