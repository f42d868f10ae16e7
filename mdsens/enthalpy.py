"""A cell that moves with its particles: the enthalpy U + P V, its derivatives by strain, and its minimum.

At a pressure P the unknowns are positions and a strain of the cell, and what is stationary is

    h(R, e) = U(R, e) + P V_0 det(1 + e),    dh/dR = 0,    dh/de = V (stress + P) = 0.

Particles are eliminated first: for a strain e they leave their affine places by X e, X = -H^+ d2U/dR de, and what is
left is a small matrix, the relaxed stiffness of the cell S = d2h/de2 + (d2U/de dR) X. So everything at a pressure takes
the factor of the Hessian in a fixed cell and k more right-hand sides: one where the cell keeps its shape, d (d + 1) / 2
where it is free.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens.boxes import FixedBox
from mdsens.implicit.status import InputError, Status
from mdsens.scales import scales
from mdsens.stationarity import linearisation
from mdsens.stiffness import Stiffness
from mdsens.strains import basis, forces_of_strain, stiffness_along, strain_slope, uniform
from mdsens.system import System, potential_energy

__all__ = ["Cell", "deformed", "enthalpy_slope", "free_strains", "held", "pressed"]

LONGEST = 0.02  # strain of one step
STEPS = 300  # of the cell
HALVINGS = 12  # of a step
ROUND_OFF = 1e-14  # of the cell's stiffness: less of a stress than this is none


def free_strains(dimension: int, shape: bool) -> np.ndarray:
    """(k, d, d) orthonormal strains that a cell is free to take: of its size, or of its shape as well."""
    return basis(dimension) if shape else uniform(dimension)


def held(system: System) -> System:
    """The same in a cell of its own, which follows no parameter."""
    return system.replace(boundary=FixedBox(jnp.asarray(system.box), system.boundary.orthogonal))


def deformed(system: System, strain: jax.Array, positions: jax.Array | None = None) -> System:
    """A system in a fixed cell, positions and cell deformed by 1 + strain (d, d). Traceable; the list stays."""
    at = system.positions if positions is None else positions
    box = jnp.asarray(system.box)
    cell = box + strain @ box
    return system.replace(positions=at + at @ strain.T, boundary=FixedBox(cell))


def enthalpy_slope(system: System, pressure: Any, along: Any) -> jax.Array:
    """dh/de along strains (k, d, d), at strain 0: V (stress + P) : E, (k,)."""
    return strain_slope(system, along) + pressure * system.volume * jnp.einsum("kii->k", jnp.asarray(along))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cell:
    """The cell of a relaxed configuration as an unknown.

    Attributes:
      along: (k, d, d) the strains that it is free to take.
      pressure: P.
      motion: (k, n, d) X, the displacements from the affine places by each.
      slope: (k,) dh/de.
      stiffness: (k, k) S, the second derivative of the enthalpy with particles relaxed.
      compliance: (k, k) S^-1; zero where S is singular.
      status: of the solves; INDEFINITE where S is not positive definite.
    """

    along: jax.Array
    pressure: jax.Array
    motion: jax.Array
    slope: jax.Array
    stiffness: jax.Array
    compliance: jax.Array
    status: jax.Array

    @classmethod
    def of(cls, system: System, stiffness: Stiffness, pressure: Any, along: np.ndarray, rtol: float = 1e-10) -> Cell:
        """Of a backbone in a fixed cell, with its Hessian. Host code: k solves."""
        dtype = system.positions.dtype
        strains = jnp.asarray(along, dtype)
        sides = np.asarray(_sides(system, strains))
        if stiffness.factor is not None:
            x, stats = stiffness.solve_many(sides.reshape(len(sides), -1).T, rtol)
            motion, codes = x.T.reshape(sides.shape), list(stats.status[0])
        else:
            found = [stiffness.solve(side, rtol) for side in sides]
            motion, codes = np.stack([x for x, *_ in found]), [int(code) for *_, code in found]
        slope, matrix = (np.asarray(x, float) for x in _slopes(system, pressure, strains, jnp.asarray(motion, dtype)))
        code = max([int(code) for code in codes if not Status(int(code)).good], default=Status.CONVERGED.value)
        finite = bool(np.isfinite(matrix).all())
        values, vectors = np.linalg.eigh(matrix if finite else np.eye(len(along)))
        firm = np.abs(values) > 1e-13 * np.max(np.abs(values), initial=0.0)
        if not finite:
            code = Status.NOT_FINITE.value
        elif code == Status.CONVERGED and not (firm & (values > 0)).all():
            code = Status.INDEFINITE.value
        inverse = (vectors * np.where(firm, 1.0 / np.where(firm, values, 1.0), 0.0)) @ vectors.T
        given, moves, slopes, matrix, inverse = (
            jnp.asarray(x, dtype) for x in (pressure, motion, slope, matrix, inverse)
        )
        return cls(strains, given, moves, slopes, matrix, inverse, jnp.asarray(code, jnp.int32))

    def newton(self) -> np.ndarray:
        """(k,) the strain of a Newton step, down the enthalpy whatever its curvature, and no further than 2 %."""
        values, vectors = np.linalg.eigh(np.asarray(self.stiffness, float))
        size = np.maximum(np.abs(values), 1e-12 * np.max(np.abs(values), initial=0.0))
        step = -(vectors / np.where(size > 0, size, 1.0)) @ (vectors.T @ np.asarray(self.slope, float))
        return step * min(1.0, LONGEST / max(float(np.linalg.norm(step)), 1e-300))


@jax.jit
def _sides(system: System, strains: jax.Array) -> jax.Array:
    return jax.vmap(lambda e: forces_of_strain(system, e))(strains)


@jax.jit
def _slopes(system: System, pressure: Any, along: jax.Array, motion: jax.Array) -> tuple[jax.Array, jax.Array]:
    trace = jnp.einsum("kii->k", along)
    of_volume = trace[:, None] * trace[None] - jnp.einsum("kij,lij->kl", along, along)  # of det(1 + e)
    matrix = stiffness_along(system, along, motion) + pressure * system.volume * of_volume
    return enthalpy_slope(system, pressure, along), matrix


@jax.jit
def _enthalpy(system: System, pressure: Any) -> jax.Array:
    return potential_energy(system) + pressure * system.volume


def pressed(
    relax: Callable[[System, int], Any], system: System, pressure: float, shape: bool, tolerance: float, max_steps: int
) -> tuple[Any, int, np.ndarray, Status]:
    """Relax positions and cell at a pressure: Newton steps of the cell, particles relaxed after each.

    A step is halved where it raises the enthalpy, where it takes a packing's last contact away, though the pressure is
    to be held by some, or where its particles do not come to rest.

    Args:
      relax: (System, steps at most) -> Equilibrium, in a fixed cell.
      system: where to start.
      pressure, shape, tolerance, max_steps: as in ``minimize``.

    Returns:
      (the Equilibrium, steps in all, the free strains, the status of the cell).
    """
    along = free_strains(system.dimension, shape)
    eq = relax(held(system), max_steps)
    steps = int(eq.steps)
    if not Status(int(eq.status)).good:
        return eq, steps, along, Status(int(eq.status))
    for _ in range(STEPS):
        now = eq.system
        backbone, net, null = linearisation(now, eq.max_force)
        loose = bool(np.all(np.asarray(net.rattlers)))
        if loose and pressure <= 0:
            return eq, steps, along, Status.NO_REST
        cell = Cell.of(backbone, Stiffness(backbone, null.simplified()), pressure, along)
        volume, length = float(now.volume), float(scales(now)[0])
        left = float(np.max(np.abs(np.asarray(cell.slope)))) / volume
        floor = ROUND_OFF * float(np.max(np.abs(np.asarray(cell.stiffness)))) / volume
        if left <= max(tolerance / length ** (now.dimension - 1), floor):
            code = Status(int(cell.status))
            return eq, steps, along, Status.CONVERGED if code.good else code
        before, step = float(_enthalpy(now, pressure)), cell.newton()
        for _ in range(HALVINGS):
            found = _after(now, cell, step, relax, max(max_steps - steps, 1), shape)
            steps += 0 if found is None else int(found.steps)
            if steps >= max_steps:
                return eq, steps, along, Status.NO_REST if pressure < 0 else Status.MAX_STEPS_REACHED
            if found is not None and Status(int(found.status)).good:
                lost = pressure > 0 and not loose and bool(np.all(_rattlers(found.system, found.max_force)))
                if not lost and float(_enthalpy(found.system, pressure)) - before <= 1e-12 * abs(before):
                    break
            step = 0.5 * step
        else:
            return eq, steps, along, Status.NO_REST
        eq = found
    return eq, steps, along, Status.NO_REST


def _after(
    now: System, cell: Cell, step: np.ndarray, relax: Callable[[System, int], Any], budget: int, shape: bool
) -> Any:
    """Relaxed again after a strain, from where its linear response puts the particles; None in a cell too small."""
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
    return np.asarray(linearisation(system, max_force)[1].rattlers)
