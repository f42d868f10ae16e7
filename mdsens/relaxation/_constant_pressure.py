"""Relaxation of a cell and its particles: Newton steps of the cell lower the enthalpy U + P V.

The particles are relaxed in a fixed cell before the first Newton step and after each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

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

# Steps of the cell in one relaxation, at most. A step strains the cell by 2 % at most.
STEPS = 300
# Trials of one step of the cell, each half as long as the one before.
HALVINGS = 12
# Stress that counts as zero, as a share of the stiffness of the cell.
ROUND_OFF = 1e-14
# Rise of the enthalpy that counts as round-off, as a share of the enthalpy.
ENTHALPY_ROUND_OFF = 1e-12

# Relaxes the particles of a system in its cell, with up to a number of steps.
RelaxParticles = Callable[[System, int], Equilibrium]


@jax.jit
def _enthalpy(system: System, pressure: float | jax.Array) -> jax.Array:
    return potential_energy(system) + pressure * system.volume


def relax_at_pressure(system: System, options: Options, bar: Decades) -> tuple[Equilibrium, str]:
    """Minimize the enthalpy U + P V over the positions and the cell.

    U is the energy, P the pressure and V the volume. The cell takes Newton steps, and the particles
    are relaxed after each. A step is halved where it raises the enthalpy, where it removes a
    packing's last contact although contacts have to carry the pressure, and where the particles do
    not come to rest after it.

    Returns:
      (the relaxed system, text for an error message that tells where the relaxation ended).
    """
    assert isinstance(options.cell, AtPressure)
    pressure = options.cell.pressure
    eq, steps, strains, status = _relax(system, options.cell, options, bar)
    dtype = system.positions.dtype
    eq = dataclasses.replace(
        eq,
        status=jnp.asarray(status.value, jnp.int32),
        steps=jnp.asarray(steps),
        pressure=jnp.asarray(pressure, dtype),
        strains=jnp.asarray(strains, dtype),
    )
    volume = float(eq.system.volume)
    message = (
        f"minimize at pressure {pressure:g} stopped after {steps:,} steps at volume {volume:g}"
    )
    return eq, message


def _relax(
    system: System, condition: AtPressure, options: Options, bar: Decades
) -> tuple[Equilibrium, int, np.ndarray, Status]:
    """Minimize the enthalpy over the positions and the cell, by Newton steps of the cell.

    Returns:
      (relaxed particles in the last cell, total number of steps of the minimizer, the strains
      (k, d, d) by which the cell can deform, status of the relaxation of positions and cell).
    """
    pressure = condition.pressure
    max_steps = options.max_steps

    def relax_particles(system: System, budget: int) -> Equilibrium:
        eq, _ = relax_in_fixed_cell(system, dataclasses.replace(options, max_steps=budget), bar)
        return eq

    strains = free_strains(system.dimension, condition.shape)
    # A box that is a function of the parameters becomes a constant: the cell is an unknown now.
    eq = relax_particles(fixed_cell(system), max_steps)
    steps = int(eq.steps)
    if not Status(int(eq.status)).good:
        return eq, steps, strains, Status(int(eq.status))
    for _ in range(STEPS):
        backbone, net, null = analyze_rigidity(eq.system, eq.max_force)
        unjammed = bool(net.unjammed)
        # Without contacts nothing opposes an expansion at zero or negative pressure.
        if unjammed and pressure <= 0:
            return eq, steps, strains, Status.NO_REST
        cell = Cell.of(backbone, HessianFactor(backbone, null.simplified()), pressure, strains)
        stress, goal = _stress_and_goal(eq, cell)
        if stress <= goal:
            cell_status = Status(int(cell.status))
            status = Status(int(eq.status)) if cell_status.good else cell_status
            return eq, steps, strains, status
        trial, taken = _lower_enthalpy(
            eq, cell, condition, unjammed, relax_particles, max_steps - steps
        )
        steps += taken
        if steps >= max_steps:
            # A negative pressure may have no minimum: the cell expands without end.
            status = Status.NO_REST if pressure < 0 else Status.MAX_STEPS_REACHED
            return eq, steps, strains, status
        if trial is None:
            return eq, steps, strains, Status.NO_REST
        eq = trial
    return eq, steps, strains, Status.NO_REST


def _lower_enthalpy(
    eq: Equilibrium,
    cell: Cell,
    condition: AtPressure,
    unjammed: bool,
    relax_particles: RelaxParticles,
    budget: int,
) -> tuple[Equilibrium | None, int]:
    """Strain the cell by a Newton step and relax the particles; halve the step until it is kept.

    Args:
      eq: particles at rest in the cell.
      cell: derivatives of the enthalpy by strain, and the linear response of the positions.
      condition: the pressure, and whether the shape of the cell may change.
      unjammed: whether no contacts hold the particles of ``eq``.
      relax_particles: function that relaxes the particles in a fixed cell.
      budget: number of steps of the minimizer, in all trials together. Where it is used up, no
        step is kept.

    Returns:
      (relaxed particles in the strained cell, None if no step is kept; number of steps of the
      minimizer).
    """
    pressure = condition.pressure
    enthalpy = float(_enthalpy(eq.system, pressure))
    step = cell.newton()
    steps = 0
    for _ in range(HALVINGS):
        # Options refuse a budget below 1 by an InputError, which ``_relaxed_after_step`` would take
        # for a cell that is too small.
        left = max(budget - steps, 1)
        trial = _relaxed_after_step(eq.system, cell, step, relax_particles, left, condition.shape)
        steps += 0 if trial is None else int(trial.steps)
        if steps >= budget:
            return None, steps
        had_contacts = pressure > 0 and not unjammed
        if trial is not None and _is_kept(trial, enthalpy, pressure, had_contacts):
            return trial, steps
        step = 0.5 * step
    return None, steps


def _is_kept(trial: Equilibrium, enthalpy: float, pressure: float, had_contacts: bool) -> bool:
    """Return whether to keep a step of the cell, after which the particles were relaxed.

    The step is kept if the particles came to rest and the enthalpy did not rise.

    Args:
      trial: the particles, relaxed after the step of the cell.
      enthalpy: the enthalpy before the step.
      pressure: the pressure at which the cell relaxes.
      had_contacts: whether contacts carried the pressure before the step; if so, a step that
        removes the last contact is not kept.
    """
    if not Status(int(trial.status)).good:
        return False
    if had_contacts and _all_rattlers(trial):
        return False
    rise = float(_enthalpy(trial.system, pressure)) - enthalpy
    return rise <= ENTHALPY_ROUND_OFF * abs(enthalpy)  # False for a rise of NaN


def _stress_and_goal(eq: Equilibrium, cell: Cell) -> tuple[float, float]:
    """Compute the unbalanced stress of a cell, and the largest value of it that counts as zero.

    The unbalanced stress is the largest component of |stress + P 1| along the strains by which the
    cell can deform; P is the pressure at which the cell relaxes, and 1 the identity. What counts as
    zero follows from the tolerance of the forces, from the forces left and from the round-off of
    the stress.
    """
    volume = float(eq.system.volume)
    length = float(natural_units(eq.system)[0])
    # cell.slope is V (stress + P 1) : E for each strain E of norm one
    stress = float(np.max(np.abs(np.asarray(cell.slope)))) / volume
    # the stress of a force per l^(d-1), the cross section of a particle
    area = length ** (eq.system.dimension - 1)
    goal = float(eq.tolerance) / area
    # The forces that are left make a stress, and so does round-off of the sum over the pairs.
    stiffness = float(np.max(np.abs(np.asarray(cell.stiffness))))
    floor = max(float(eq.max_force) / area, ROUND_OFF * stiffness / volume)
    return stress, max(goal, floor)


def _relaxed_after_step(
    system: System,
    cell: Cell,
    step: np.ndarray,
    relax_particles: RelaxParticles,
    budget: int,
    shape: bool,
) -> Equilibrium | None:
    """Strain the cell by a Newton step and relax the particles; None if the cell becomes too small.

    A cell is too small if its height is below twice the range of the interactions.

    Args:
      system: the system, with particles at rest in the cell.
      cell: derivatives of the enthalpy by strain in this system, and the linear response of the
        positions to strain, with which the relaxation starts.
      step: (k,) amplitudes of the k strains by which the cell can deform.
      relax_particles: function that relaxes the particles in a fixed cell.
      budget: largest number of steps of the minimizer.
      shape: whether the shape of the cell may change.
    """
    dtype = system.positions.dtype
    strain = np.tensordot(step, np.asarray(cell.along), axes=1)
    # The non-affine part X e comes first: ``deformed`` multiplies these positions by 1 + e.
    moved = np.asarray(system.positions) + np.tensordot(step, np.asarray(cell.motion), axes=1)
    strained = deformed(system, jnp.asarray(strain, dtype), jnp.asarray(moved, dtype))
    # A cell that keeps its shape stays orthogonal, which ``deformed`` does not know.
    box = FixedBox(strained.box, not shape and system.boundary.orthogonal)
    try:
        return relax_particles(strained.replace(boundary=box).reallocate(), budget)
    except InputError:  # a height of the cell below twice the range of the interactions
        return None


def _all_rattlers(eq: Equilibrium) -> bool:
    """Return whether all particles are rattlers, so that no particle is in the contact network."""
    _, net, _ = analyze_rigidity(eq.system, eq.max_force)
    return bool(np.all(np.asarray(net.rattlers)))
