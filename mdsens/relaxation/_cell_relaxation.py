"""Relaxation of a cell and its particles: Newton steps of the cell towards the stress of its load.

The particles are relaxed in a fixed cell before the first Newton step and after each. A step is
kept where the energy falls by more than the work that the load does on the cell along it: at a
pressure, where the enthalpy U + P V falls.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.compilation import as_jax, compiled
from mdsens._util.lattice import heights
from mdsens._util.progress import Decades
from mdsens.mechanics.cell import Cell, deformed
from mdsens.mechanics.hessian_factor import HessianFactor
from mdsens.mechanics.load import CellLoad, PressureLoad, StressLoad, VolumeLoad
from mdsens.mechanics.rigidity import analyze_rigidity
from mdsens.mechanics.status import Status
from mdsens.mechanics.units import natural_units
from mdsens.model.box import FixedBox
from mdsens.model.system import System, energy_number
from mdsens.relaxation._driver import relax_in_fixed_cell
from mdsens.relaxation.cell_conditions import RelaxedCell, at_start, periodic_axes, strains_of
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.relaxation.options import Options

__all__ = ["relax_with_cell"]

# Steps of the cell in one relaxation, at most. A step strains the cell by 2 % at most.
STEPS = 300
# Trials of one step of the cell, each half as long as the one before.
HALVINGS = 12
# Newton steps for a polar decomposition. Each doubles the digits, from a deformation by a factor of
# 10 as well.
POLAR_STEPS = 12
# Stress that counts as zero, as a share of the stiffness of the cell.
ROUND_OFF = 1e-14
# Rise of the energy less the work of the load that counts as round-off, as a share of both.
ENERGY_ROUND_OFF = 1e-12
# Part of the volume at the start below which a cell counts as too small, if a particle then meets
# its own images.
SMALLEST = 0.125


def relax_with_cell(
    system: System, condition: RelaxedCell, options: Options, bar: Decades
) -> tuple[Equilibrium, str]:
    """Relax the positions and the cell, until no force is left and the stress is that of the load.

    The cell takes Newton steps, and the particles are relaxed after each. A step is halved where
    the energy rises by more than the work of the load (at a pressure, where the enthalpy rises),
    where it removes a packing's last contact although contacts have to carry the load, and where
    the particles do not come to rest after it.

    Returns:
      (the relaxed system, text for an error message that tells where the relaxation ended).
    """
    # of the start: its volume is that of a relaxation at a volume
    load = condition.load(system)
    strains = strains_of(condition, system.dimension, periodic_axes(system))
    run = _Run(load, strains, options, bar)
    start = at_start(condition, system)
    try:
        eq, status = run.relax(start)
    except KeyboardInterrupt:
        eq = run.reached or run.unrelaxed(start)
        status = Status.INTERRUPTED
    eq = dataclasses.replace(
        eq,
        code=as_jax(status.value, np.int32),
        steps=as_jax(run.steps),
        strains=as_jax(strains, system.positions.dtype),
        **_fields_of(load),
    )
    volume = float(eq.system.periodic_volume)
    message = f"minimize at {load.goal_in_words()} stopped after {run.steps:,} steps at volume"
    return eq, f"{message} {volume:g}"


def _fields_of(load: CellLoad) -> dict[str, Any]:
    """Return the fields of an Equilibrium that record the load under which it was relaxed."""
    if isinstance(load, PressureLoad):
        return {"pressure": load.pressure}
    return {"at_stress" if isinstance(load, StressLoad) else "at_volume": load}


class _Run:
    """One relaxation of a cell with its particles.

    Attributes:
      load: the load on the cell.
      strains: (k, d, d) the strains E that the cell can take.
      options: the options of the relaxation.
      bar: the progress bar.
      steps: the number of steps of the minimizer so far, in all relaxations of the particles.
      traction: largest component of the stress sigma_t of the load along a strain of norm 1.
      pull: sum of (sigma_t : E) tr E over the strains: positive where the load pulls the cell
        apart, negative where it compresses it.
      carried: whether contacts have to carry the load.
      expands: whether a cell without contacts would expand, or not come to rest.
      stretched: whether the cell is stretched along its axes alone, without shear.
      reached: the particles in the last cell that was kept; None before the first relaxation.
      turned: whether the orientation of the cell matters to the load. The steps of the cell are
        symmetric strains, which add up to a strain and a rotation; the rotation is taken back then.
    """

    def __init__(self, load: CellLoad, strains: np.ndarray, options: Options, bar: Decades):
        self.load = load
        self.strains = strains
        self.options = options
        self.bar = bar
        self.steps = 0
        target = np.asarray(load.target(strains.shape[-1]), float)
        tractions = np.einsum("ij,kij->k", target, strains)
        traces = np.einsum("kii->k", strains)
        self.traction = float(np.max(np.abs(tractions)))
        fixed_volume = isinstance(load, VolumeLoad)
        self.pull = 0.0 if fixed_volume else float(tractions @ traces)
        self.expands = not fixed_volume and self.pull >= 0
        self.carried = self.pull < 0 or (fixed_volume and bool(tractions.any()))
        d = strains.shape[-1]
        self.stretched = not np.any(strains[:, ~np.eye(d, dtype=bool)])
        # sigma_t : E = (tr sigma_t / d) tr E for all E where the stress is the same all around
        mean = np.trace(target) / d
        off = np.max(np.abs(tractions - mean * traces))
        self.turned = not self.stretched and bool(off > 1e-13 * self.traction)
        self.start = np.eye(d)
        self.reached: Equilibrium | None = None

    def relax(self, system: System) -> tuple[Equilibrium, Status]:
        """Relax the positions and the cell of a system, by Newton steps of the cell.

        Returns:
          (relaxed particles in the last cell, status of the relaxation of positions and cell).
        """
        self.start = np.asarray(system.box, float)
        eq = self._relax_particles(system)
        self.reached = eq
        if not eq.status.good:
            return eq, eq.status
        for _ in range(STEPS):
            backbone, net, null = analyze_rigidity(eq.system, eq.max_force)
            unjammed = bool(net.unjammed)
            # Without contacts nothing opposes an expansion at zero or negative pressure.
            if unjammed and self.expands:
                return eq, Status.NO_REST
            factor = HessianFactor(backbone, null.simplified())
            cell = Cell.of(backbone, factor, self.load, self.strains)
            stress, goal = _stress_and_goal(eq, cell)
            if stress <= goal:
                cell_status = Status(int(cell.status))
                return eq, eq.status if cell_status.good else cell_status
            trial = self._lower(eq, cell, unjammed)
            if self.steps >= self.options.max_steps:
                # Under tension there may be no state of rest: the cell expands without end.
                return eq, Status.NO_REST if self.pull > 0 else Status.MAX_STEPS_REACHED
            if trial is None:
                return eq, Status.NO_REST
            eq = trial
            self.reached = eq
        return eq, Status.NO_REST

    def unrelaxed(self, system: System) -> Equilibrium:
        """Return a system as it is, as the result of a relaxation that was interrupted."""
        options = dataclasses.replace(self.options, interrupted=True)
        return relax_in_fixed_cell(system, options, self.bar)[0]

    def _lower(self, eq: Equilibrium, cell: Cell, unjammed: bool) -> Equilibrium | None:
        """Strain the cell by a Newton step and relax the particles; halve it until it is kept.

        A step is kept if the particles come to rest and the energy does not rise by more than the
        work of the load. The result is None if no step is kept, or the steps of the minimizer are
        used up.

        Args:
          eq: particles at rest in the cell.
          cell: the stress left and its derivatives by strain, with the response of the positions.
          unjammed: whether no contacts hold the particles of ``eq``.
        """
        energy = energy_number(eq.system)
        volume = float(eq.system.periodic_volume)
        round_off = ENERGY_ROUND_OFF * (abs(energy) + volume * self.traction)
        step = cell.newton()
        for _ in range(HALVINGS):
            amplitudes = step.astype(cell.along.dtype)
            strain, moved = _cell_step(self.load, cell, eq.positions, amplitudes, volume)
            strain = np.asarray(strain, float)
            trial = self._strained(eq.system, strain, moved)
            if self.steps >= self.options.max_steps:
                return None
            limit = energy + self.load.work(strain, volume) + round_off
            needs_contacts = self.carried and not unjammed
            if trial is not None and _is_kept(trial, limit, needs_contacts):
                return trial
            step = 0.5 * step
        return None

    def _strained(self, system: System, strain: np.ndarray, moved: jax.Array) -> Equilibrium | None:
        """Strain a cell and relax the particles; None if the cell becomes too small.

        A cell is too small if it has an eighth of its volume at the start, and a particle meets its
        own images in it.

        Args:
          system: the system, with particles at rest in the cell.
          strain: (d, d) the strain of the cell.
          moved: (n, d) positions before the strain, from which the relaxation starts.
        """
        strained = deformed(system, strain.astype(moved.dtype), moved)
        # by numpy: jax would compile a program for each operation
        positions = np.asarray(strained.positions)
        box = np.asarray(strained.box)
        if self.turned:
            back = _rotation(box.astype(float) @ np.linalg.inv(self.start)).T
            positions = positions @ back.T
            box = back @ box
        positions = as_jax(positions, moved.dtype)
        # Stretched along the axes, an orthogonal cell stays one, which ``deformed`` does not know.
        boundary = FixedBox(as_jax(box, moved.dtype), self.stretched and system.boundary.orthogonal)
        strained = strained.replace(positions=positions, boundary=boundary)
        if _has_collapsed(strained, abs(float(np.linalg.det(self.start)))):
            return None
        return self._relax_particles(strained.reallocate(keep=True))

    def _relax_particles(self, system: System) -> Equilibrium:
        """Relax the particles in a fixed cell, in the steps of the minimizer that are left."""
        # Options refuse a budget below 1 by an InputError, which ``_strained`` would take for a
        # cell that is too small.
        left = max(self.options.max_steps - self.steps, 1)
        eq, _ = relax_in_fixed_cell(
            system, dataclasses.replace(self.options, max_steps=left), self.bar
        )
        self.steps += int(eq.steps)
        if int(eq.status) == Status.INTERRUPTED:
            # before the first step of the cell there is no better state than this one
            self.reached = self.reached or eq
            raise KeyboardInterrupt
        return eq


@compiled
def _cell_step(
    load: CellLoad, cell: Cell, positions: jax.Array, amplitudes: jax.Array, volume: float
) -> tuple[jax.Array, jax.Array]:
    """Compute the strain of a step of the cell, and the positions to be strained with it.

    Args:
      load: the load on the cell.
      cell: the cell before the step.
      positions: (n, d) positions before the step.
      amplitudes: (k,) amplitudes of the strains that the cell can take.
      volume: volume of the cell before the step.

    Returns:
      (strain (d, d), positions (n, d)). The positions have the non-affine part of their motion; the
      affine part is left to :func:`mdsens.mechanics.cell.deformed`.
    """
    strain = load.strain(amplitudes, cell.along, volume)
    return strain, positions + jnp.tensordot(amplitudes, cell.motion, axes=1)


def _has_collapsed(system: System, volume: float) -> bool:
    """Return whether a cell is much smaller than at the start, and smaller than twice the range.

    Under a pressure that nothing withstands a cell would shrink without end, and the images within
    the range of the interactions would fill the memory.

    Args:
      system: the system in its present cell.
      volume: volume of the cell at the start.
    """
    box = np.asarray(system.box)
    if abs(float(np.linalg.det(box))) >= SMALLEST * volume:
        return False
    return 2.0 * float(system.range) > float(np.min(heights(box)))


def _rotation(deformation: np.ndarray) -> np.ndarray:
    """Return the rotation R (d, d) of a deformation F = R U, with a symmetric positive U.

    Args:
      deformation: (d, d) F, with a positive determinant.
    """
    R = deformation
    # Newton's method for the polar factor (Higham 1986). Without a singular value decomposition,
    # axes that F leaves alone are left alone to the last bit.
    for _ in range(POLAR_STEPS):
        R = 0.5 * (R + np.linalg.inv(R).T)
    return R


def _is_kept(trial: Equilibrium, limit: float, needs_contacts: bool) -> bool:
    """Return whether to keep a step of the cell, after which the particles were relaxed.

    Args:
      trial: the particles, relaxed after the step of the cell.
      limit: the largest energy at which the step is kept.
      needs_contacts: whether contacts carried the load before the step; if so, a step that removes
        the last contact is not kept.
    """
    if not Status(int(trial.status)).good:
        return False
    if needs_contacts and _all_rattlers(trial):
        return False
    return energy_number(trial.system) <= limit  # False for an energy of NaN


def _stress_and_goal(eq: Equilibrium, cell: Cell) -> tuple[float, float]:
    """Compute the unbalanced stress of a cell, and the largest value of it that counts as zero.

    The unbalanced stress is the largest component of |sigma - sigma_t| along the strains by which
    the cell can deform, with the stress sigma and that of the load, sigma_t. What counts as zero
    follows from the tolerance of the forces, from the forces left and from the round-off of the
    stress.
    """
    volume = float(eq.system.periodic_volume)
    length = float(natural_units(eq.system)[0])
    # cell.slope is V (sigma - sigma_t) : E for each strain E of norm one
    stress = float(np.max(np.abs(np.asarray(cell.slope)))) / volume
    # the stress of a force per l^(d-1), the cross section of a particle
    area = length ** (eq.system.dimension - 1)
    goal = float(eq.tolerance) / area
    # The forces that are left make a stress, and so does round-off of the sum over the pairs.
    stiffness = float(np.max(np.abs(np.asarray(cell.stiffness))))
    floor = max(float(eq.max_force) / area, ROUND_OFF * stiffness / volume)
    return stress, max(goal, floor)


def _all_rattlers(eq: Equilibrium) -> bool:
    """Return whether all particles are rattlers, so that no particle is in the contact network."""
    _, net, _ = analyze_rigidity(eq.system, eq.max_force)
    return bool(np.all(np.asarray(net.rattlers)))
