"""This module relaxes the cell with its particles, under the load on the cell.

The cell of volume V takes a symmetric strain e, whose k independent amplitudes s are its unknowns:
k = 1 where the cell keeps its shape, and k = d (d + 1) / 2 in d dimensions where its size and shape
are free. The other unknowns are the positions R of the particles. The configuration is at rest
where the forces vanish and the stress sigma has reached that of the load, sigma_t
(:mod:`mdsens.mechanics.load`):

    dU/dR = 0,    G_a = V (sigma - sigma_t) : E_a = 0 for each strain E_a that the cell can take.

At a pressure P both are derivatives of the enthalpy U + P V, with the energy U.

The particles are eliminated first. Under a strain e they move by X e relative to their affine
positions, with X = -H^+ d2U/dR de and H^+ the pseudo-inverse of the Hessian H = d2U/dR2. A small
matrix (k, k) is left, the stiffness of the cell with relaxed particles, S = dG/ds + (dG/dR) X. At a
pressure S is symmetric. So a relaxed cell needs the factor of the Hessian in a fixed cell, and k
linear solves with this factor.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.compilation import as_jax, compiled
from mdsens._util.portable import Portable
from mdsens._util.precision import full_precision
from mdsens.mechanics.hessian_factor import HessianFactor
from mdsens.mechanics.load import CellLoad, load_slope
from mdsens.mechanics.stability import resolution
from mdsens.mechanics.status import Status
from mdsens.mechanics.strain import forces_of_strain, stiffness_along
from mdsens.model.box import FixedBox
from mdsens.model.system import System

__all__ = ["Cell", "deformed", "fixed_cell"]

LONGEST = 0.02  # largest norm of the strain in one Newton step


def fixed_cell(system: System) -> System:
    """Return the system in a fixed cell: its present box, which then depends on no parameter."""
    return system.replace(boundary=FixedBox(jnp.asarray(system.box), system.boundary.orthogonal))


@compiled
@full_precision
def deformed(system: System, strain: jax.Array, positions: jax.Array | None = None) -> System:
    """Return the system with its positions and its cell deformed by the matrix 1 + strain.

    The result has a fixed cell and the neighbor list of ``system``. The function works inside
    ``jax.jit``.

    Args:
      strain: the strain, (d, d) in d dimensions.
      positions: (n, d) positions of the n particles before the deformation; None for the positions
        of ``system``.
    """
    R = system.positions if positions is None else positions
    box = jnp.asarray(system.box)
    # cell vectors are columns, positions are rows: hence the transpose below
    cell = box + strain @ box
    return system.replace(positions=R + R @ strain.T, boundary=FixedBox(cell))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cell(Portable):
    """The stress left in a cell under a load, and its derivatives by the strain of the cell.

    The strain of the cell is an unknown with k components, next to the positions of the n particles
    in d dimensions. At a pressure P, ``slope`` and ``stiffness`` are the first and the second
    derivative of the enthalpy U + P V, with the energy U and the volume V.

    Attributes:
      along: (k, d, d) the strains E that the cell can take.
      load: the load, with the stress sigma_t that the cell is to reach.
      motion: (k, n, d) displacements of the particles, relative to their affine positions, under
        each of the strains.
      slope: (k,) G = V (sigma - sigma_t) : E for each strain, with the stress sigma of the
        particles.
      stiffness: (k, k) derivative of ``slope`` (its rows) by the amplitudes of the strains, with
        relaxed particles. It is symmetric but under a stress that is no pressure, whose work
        depends on the path.
      compliance: (k, k) inverse of ``stiffness``; zero along strains whose stiffness is zero to
        round-off.
      status: status of the linear solves for ``motion``, an int32 array; FLOPPY where an eigenvalue
        of the symmetric part of ``stiffness`` is zero to round-off, INDEFINITE where one is
        negative, so that some strain gains more work from the load than it costs energy.
    """

    along: jax.Array
    load: CellLoad
    motion: jax.Array
    slope: jax.Array
    stiffness: jax.Array
    compliance: jax.Array
    status: jax.Array

    @classmethod
    @full_precision
    def of(
        cls,
        system: System,
        stiffness: HessianFactor,
        load: CellLoad,
        along: np.ndarray,
        rtol: float = 1e-10,
    ) -> Cell:
        """Compute the stress left and its derivatives by k strains of the cell, by k linear solves.

        Each strain needs one linear solve with the Hessian in a fixed cell. The function does not
        work inside ``jax.jit``.

        Args:
          system: the backbone (the system without the contacts of rattlers), in a fixed cell.
          stiffness: the Hessian of the backbone, with its factor.
          load: the load on the cell.
          along: (k, d, d) the k strains that the cell can take, in d dimensions.
          rtol: relative residual to which the linear solves for the displacements of the particles
            are carried.
        """
        dtype = system.positions.dtype
        strains = as_jax(along, dtype)
        sides = np.asarray(_sides(system, strains))
        motion, codes = _solve_motions(stiffness, sides, rtol)
        slope, matrix = (
            np.asarray(x, float) for x in _slopes(system, load, strains, motion.astype(dtype))
        )
        # A matrix with a NaN has no eigenvalues: an identity takes its place, and the status tells.
        finite = bool(np.isfinite(matrix).all())
        values, vectors = np.linalg.eigh(_symmetric(matrix) if finite else np.eye(len(along)))
        flat = motion.reshape(len(along), -1)
        # The particles lower the stiffness by X^T H X when they relax, so the affine one is larger.
        affine = matrix + flat @ stiffness.products(flat.T)
        # Round-off alone, with no force left on the particles and no residual.
        resolved = np.abs(values) > float(resolution(system, affine, motion, 0.0, 0.0)[0])
        code = _judge_stiffness(values, resolved, codes) if finite else Status.NOT_FINITE.value
        compliance = np.zeros_like(matrix)
        if finite:
            kept = vectors[:, resolved]
            compliance = kept @ np.linalg.pinv(kept.T @ matrix @ kept) @ kept.T
        return cls(
            strains,
            load=load,
            motion=as_jax(motion, dtype),
            slope=as_jax(slope, dtype),
            stiffness=as_jax(matrix, dtype),
            compliance=as_jax(compliance, dtype),
            status=as_jax(code, np.int32),
        )

    @full_precision
    def newton(self) -> np.ndarray:
        """Compute a Newton step of the cell's strain towards the stress of the load.

        The result (k,) holds the amplitudes of the k strains that the cell can take; its norm is
        0.02 at most. Each eigenvalue of the symmetric part of the stiffness counts with its
        absolute value, so that the energy less the work of the load falls along the step also where
        the curvature is negative.
        """
        matrix = np.asarray(self.stiffness, float)
        values, vectors = np.linalg.eigh(_symmetric(matrix))
        # Eigenvalues next to zero are raised to 1e-12 of the largest, lest the step be infinite.
        size = np.maximum(np.abs(values), 1e-12 * np.max(np.abs(values), initial=0.0))
        downhill = (vectors * np.where(size > 0, size, 1.0)) @ vectors.T
        rotation = 0.5 * (matrix - matrix.T)  # zero at a pressure
        step = -np.linalg.solve(downhill + rotation, np.asarray(self.slope, float))
        # 1e-300 only avoids a division by zero, for a step of zero
        return step * min(1.0, LONGEST / max(float(np.linalg.norm(step)), 1e-300))


def _symmetric(matrix: np.ndarray) -> np.ndarray:
    """Return the symmetric part of a matrix."""
    return 0.5 * (matrix + matrix.T)


def _solve_motions(
    stiffness: HessianFactor, sides: np.ndarray, rtol: float
) -> tuple[np.ndarray, list[int]]:
    """Solve for the displacements of the particles under each of k strains, by the Hessian.

    Args:
      stiffness: the Hessian, with its factor.
      sides: (k, n, d) the forces on the particles due to the strains.
      rtol: relative residual to which the solves are carried.

    Returns:
      the displacements (k, n, d), and the code of the status of each solve.
    """
    if stiffness.factor is not None:
        x, stats = stiffness.solve_many(sides.reshape(len(sides), -1).T, rtol)
        return x.T.reshape(sides.shape), [int(code) for code in stats.status[0]]
    solutions = [stiffness.solve(side, rtol) for side in sides]
    return np.stack([x for x, *_ in solutions]), [int(code) for *_, code in solutions]


def _judge_stiffness(values: np.ndarray, resolved: np.ndarray, codes: list[int]) -> int:
    """Return the code of the status of a cell, from its stiffness and from the linear solves.

    Args:
      values: (k,) eigenvalues of the stiffness of the cell.
      resolved: (k,) True for eigenvalues that are not zero to round-off.
      codes: the codes of the status of the solves for the displacements of the particles.
    """
    # Of the solves that failed, the status with the highest code stands for all.
    failures = [code for code in codes if not Status(code).good]
    if failures:
        return max(failures)
    if (resolved & (values > 0)).all():
        return Status.CONVERGED.value
    negative = (resolved & (values < 0)).any()
    return (Status.INDEFINITE if negative else Status.FLOPPY).value


@compiled
def _sides(system: System, strains: jax.Array) -> jax.Array:
    """Compute the forces (k, n, d) on the particles due to k affine strains (k, d, d)."""
    return jax.vmap(lambda e: forces_of_strain(system, e))(strains)


@compiled
@full_precision
def _slopes(
    system: System, load: CellLoad, along: jax.Array, motion: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Compute the stress left in a cell and its derivative by strain, (k,) and (k, k).

    The particles are relaxed in the derivative: they move by ``motion``.

    Args:
      system: the system, in its present cell.
      load: the load on the cell.
      along: (k, d, d) the strains of the cell along which the derivatives are taken.
      motion: (k, n, d) displacements of the particles, relative to their affine positions, under
        each of the strains.
    """
    matrix = stiffness_along(system, along, motion) + load.stiffness(system, along)
    return load_slope(system, load, along), matrix
