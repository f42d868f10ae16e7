"""Relaxing a cell with its particles: Newton steps down the enthalpy U + P V, particles relaxed
after each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.progress import Decades
from mdsens.mechanics.cell import Cell, deformed, fixed_cell, free_strains
from mdsens.mechanics.hessian_factor import HessianFactor
from mdsens.mechanics.rigidity import analyze_rigidity
from mdsens.mechanics.status import Status
from mdsens.mechanics.units import natural_units
from mdsens.model.box import FixedBox
from mdsens.model.system import System, potential_energy
from mdsens.relaxation._driver import relax_in_fixed_cell
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.relaxation.options import AtPressure, Options

__all__ = ["relax_at_pressure"]

STEPS = 300  # of the cell
HALVINGS = 12  # of a step
ROUND_OFF = 1e-14  # of the cell's stiffness: less of a stress than this is none


@jax.jit
def _enthalpy(system: System, pressure: Any) -> jax.Array:
    return potential_energy(system) + pressure * system.volume


def relax_at_pressure(system: System, options: Options, bar: Decades) -> tuple[Equilibrium, str]:
    """The minimum of U + P V by positions and cell, and where the relaxation ended, in words.

    Newton steps of the cell, with the particles relaxed after each. A step is halved where it
    raises the enthalpy, where it takes a packing's last contact away though contacts are to bear
    the pressure, or where its particles do not come to rest.
    """
    assert isinstance(options.cell, AtPressure)
    pressure, shape = options.cell.pressure, options.cell.shape
    eq, steps, strains, status = _relax(system, pressure, shape, options, bar)
    dtype = system.positions.dtype
    eq = dataclasses.replace(
        eq,
        status=jnp.asarray(status.value, jnp.int32),
        steps=jnp.asarray(steps),
        pressure=jnp.asarray(pressure, dtype),
        strains=jnp.asarray(strains, dtype),
    )
    volume = float(eq.system.volume)
    return (
        eq,
        f"minimize at pressure {pressure:g} stopped after {steps:,} steps at volume {volume:g}",
    )


def _relax(
    system: System, pressure: float, shape: bool, options: Options, bar: Decades
) -> tuple[Equilibrium, int, np.ndarray, Status]:
    """(the Equilibrium, steps in all, the free strains, the status of positions and cell)."""
    max_steps = options.max_steps

    def relax(at: System, budget: int) -> Equilibrium:
        return relax_in_fixed_cell(at, dataclasses.replace(options, max_steps=budget), bar)[0]

    along = free_strains(system.dimension, shape)
    eq = relax(fixed_cell(system), max_steps)
    steps = int(eq.steps)
    if not Status(int(eq.status)).good:
        return eq, steps, along, Status(int(eq.status))
    for _ in range(STEPS):
        now = eq.system
        backbone, net, null = analyze_rigidity(now, eq.max_force)
        loose = bool(net.unjammed)
        if loose and pressure <= 0:
            return eq, steps, along, Status.NO_REST
        cell = Cell.of(backbone, HessianFactor(backbone, null.simplified()), pressure, along)
        volume, length = float(now.volume), float(natural_units(now)[0])
        left = float(np.max(np.abs(np.asarray(cell.slope)))) / volume
        # the stress that the forces left can make, and round-off of the sum that it is
        goal = float(eq.tolerance) / length ** (now.dimension - 1)
        floor = max(
            float(eq.max_force) / length ** (now.dimension - 1),
            ROUND_OFF * float(np.max(np.abs(np.asarray(cell.stiffness)))) / volume,
        )
        if left <= max(goal, floor):
            code = Status(int(cell.status))
            return eq, steps, along, code if not code.good else Status(int(eq.status))
        before, step = float(_enthalpy(now, pressure)), cell.newton()
        for _ in range(HALVINGS):
            found = _after(now, cell, step, relax, max(max_steps - steps, 1), shape)
            steps += 0 if found is None else int(found.steps)
            if steps >= max_steps:
                return (
                    eq,
                    steps,
                    along,
                    Status.NO_REST if pressure < 0 else Status.MAX_STEPS_REACHED,
                )
            if found is not None and Status(int(found.status)).good:
                lost = (
                    pressure > 0
                    and not loose
                    and bool(np.all(_rattlers(found.system, found.max_force)))
                )
                if not lost and float(_enthalpy(found.system, pressure)) - before <= 1e-12 * abs(
                    before
                ):
                    break
            step = 0.5 * step
        else:
            return eq, steps, along, Status.NO_REST
        eq = found
    return eq, steps, along, Status.NO_REST


def _after(
    now: System,
    cell: Cell,
    step: np.ndarray,
    relax: Callable[[System, int], Any],
    budget: int,
    shape: bool,
) -> Any:
    """Relaxed again after a strain, from where its linear response puts the particles; None in a
    cell too small.
    """
    dtype = now.positions.dtype
    strain = np.tensordot(step, np.asarray(cell.along), axes=1)
    moved = np.asarray(now.positions) + np.tensordot(step, np.asarray(cell.motion), axes=1)
    there = deformed(now, jnp.asarray(strain, dtype), jnp.asarray(moved, dtype))
    box = FixedBox(there.box, not shape and now.boundary.orthogonal)
    try:
        return relax(there.replace(boundary=box).reallocate(), budget)
    except InputError:  # below twice the range of the interactions
        return None


def _rattlers(system: System, max_force: Any) -> np.ndarray:
    return np.asarray(analyze_rigidity(system, max_force)[1].rattlers)
