"""This module relaxes the cell with its particles, by the enthalpy U + P V and its derivatives.

U is the energy, P the pressure, and V = V_0 det(1 + e) the volume under a symmetric strain e of the
cell. The strain has k independent components, its unknowns: k = 1 where the cell keeps its shape,
and k = d (d + 1) / 2 in d dimensions where its shape is free. The other unknowns are the positions
R of the particles. At a minimum the enthalpy h is stationary:

    h(R, e) = U(R, e) + P V_0 det(1 + e),    dh/dR = 0,    dh/de = V (stress + P) = 0.

The particles are eliminated first. Under a strain e they move by X e relative to their affine
positions, with X = -H^+ d2U/dR de and H^+ the pseudo-inverse of the Hessian H = d2U/dR2. A small
matrix (k, k) is left, the stiffness of the cell with relaxed particles, S = d2h/de2 + (d2U/de dR)
X. So a computation at constant pressure needs the factor of the Hessian in a fixed cell, and k
linear solves with this factor.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.portable import Portable
from mdsens._util.precision import full_precision
from mdsens.mechanics.hessian_factor import HessianFactor
from mdsens.mechanics.stability import resolution
from mdsens.mechanics.status import Status
from mdsens.mechanics.strain import (
    basis,
    forces_of_strain,
    stiffness_along,
    strain_gradient,
    uniform,
)
from mdsens.model.box import FixedBox
from mdsens.model.system import System, potential_energy

__all__ = ["Cell", "deformed", "enthalpy_gradient", "free_strains", "fixed_cell"]

LONGEST = 0.02  # largest norm of the strain in one Newton step


def free_strains(dimension: int, shape: bool) -> np.ndarray:
    """Return an orthonormal basis (k, d, d) of the strains that a cell can take.

    Args:
      dimension: the dimension d of space.
      shape: if True, the cell may change its size and its shape, and k = d (d + 1) / 2; if False,
        it may change its size alone, and k = 1.
    """
    return basis(dimension) if shape else uniform(dimension)


def fixed_cell(system: System) -> System:
    """Return the system in a fixed cell: its present box, which then depends on no parameter."""
    return system.replace(boundary=FixedBox(jnp.asarray(system.box), system.boundary.orthogonal))


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


@full_precision
def enthalpy_gradient(
    system: System,
    pressure: jax.Array | float,
    along: jax.Array | np.ndarray,
    strain: jax.Array | None = None,
) -> jax.Array:
    """Compute the derivative of the enthalpy U + P V by the amplitudes of k strains, (k,).

    U is the energy of the system and V the volume of its cell, which is strained.

    Args:
      pressure: the pressure P.
      along: (k, d, d) the strains E along which the derivative is taken, in d dimensions.
      strain: (k,) amplitudes of the strains E at which the derivative is taken; None for zero
        amplitudes, where the result is V (stress + P) : E.
    """
    volume = system.volume
    if strain is None:
        # the derivative of det(1 + s E) by s at zero is the trace of E
        return strain_gradient(system, along) + pressure * volume * jnp.einsum(
            "kii->k", jnp.asarray(along)
        )

    def enthalpy(s: jax.Array) -> jax.Array:
        change = jnp.tensordot(s, along, axes=1)
        return potential_energy(system, strain=change) + pressure * volume * _stretch(change)

    return jax.grad(enthalpy)(strain)


def _stretch(strain: jax.Array) -> jax.Array:
    """Compute the relative volume det(1 + strain) of a strained cell, from its strain (d, d).

    The determinant is written out, since ``jnp.linalg.det`` takes long to compile.
    """
    rows = jnp.eye(strain.shape[0], dtype=strain.dtype) + strain
    if strain.shape[0] == 2:
        return rows[0, 0] * rows[1, 1] - rows[0, 1] * rows[1, 0]
    return jnp.sum(rows[0] * jnp.cross(rows[1], rows[2]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cell(Portable):
    """The derivatives of the enthalpy by the strain of the cell, for a relaxed configuration.

    The strain of the cell is an unknown with k components, next to the positions of the n particles
    in d dimensions. The enthalpy is h = U + P V, with the energy U, the pressure P and the volume
    V.

    Attributes:
      along: (k, d, d) the strains that the cell can take.
      pressure: the pressure P.
      motion: (k, n, d) displacements of the particles, relative to their affine positions, under
        each of the strains.
      slope: (k,) derivative of the enthalpy h by the amplitude of each strain.
      stiffness: (k, k) second derivative of h by these amplitudes, with relaxed particles.
      compliance: (k, k) inverse of ``stiffness``; zero along strains whose stiffness is zero to
        round-off.
      status: status of the linear solves for ``motion``, an int32 array; FLOPPY where an eigenvalue
        of ``stiffness`` is zero to round-off, INDEFINITE where an eigenvalue is negative.
    """

    along: jax.Array
    pressure: jax.Array
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
        pressure: jax.Array | float,
        along: np.ndarray,
        rtol: float = 1e-10,
    ) -> Cell:
        """Compute the derivatives of the enthalpy by k strains of the cell, by one solve for each.

        Each strain needs one linear solve with the Hessian in a fixed cell. The function does not
        work inside ``jax.jit``.

        Args:
          system: the backbone (the system without the contacts of rattlers), in a fixed cell.
          stiffness: the Hessian of the backbone, with its factor.
          pressure: the pressure in the enthalpy.
          along: (k, d, d) the k strains that the cell can take, in d dimensions.
          rtol: relative residual to which the linear solves for the displacements of the particles
            are carried.
        """
        dtype = system.positions.dtype
        strains = jnp.asarray(along, dtype)
        sides = np.asarray(_sides(system, strains))
        motion, codes = _solve_motions(stiffness, sides, rtol)
        slope, matrix = (
            np.asarray(x, float)
            for x in _slopes(system, pressure, strains, jnp.asarray(motion, dtype))
        )
        # A matrix with a NaN has no eigenvalues: an identity takes its place, and the status tells.
        finite = bool(np.isfinite(matrix).all())
        values, vectors = np.linalg.eigh(matrix if finite else np.eye(len(along)))
        flat = motion.reshape(len(along), -1)
        # The particles lower the stiffness by X^T H X when they relax, so the affine one is larger.
        affine = matrix + flat @ stiffness.products(flat.T)
        # Round-off alone, with no force left on the particles and no residual.
        resolved = np.abs(values) > float(resolution(system, affine, motion, 0.0, 0.0)[0])
        code = _judge_stiffness(values, resolved, codes) if finite else Status.NOT_FINITE.value
        inverses = np.where(resolved, 1.0 / np.where(resolved, values, 1.0), 0.0)
        compliance = (vectors * inverses) @ vectors.T
        return cls(
            strains,
            pressure=jnp.asarray(pressure, dtype),
            motion=jnp.asarray(motion, dtype),
            slope=jnp.asarray(slope, dtype),
            stiffness=jnp.asarray(matrix, dtype),
            compliance=jnp.asarray(compliance, dtype),
            status=jnp.asarray(code, jnp.int32),
        )

    @full_precision
    def newton(self) -> np.ndarray:
        """Compute a Newton step of the cell's strain down the enthalpy, of norm 0.02 at most.

        The result (k,) holds the amplitudes of the k strains that the cell can take. Each
        eigenvalue of the stiffness of the cell (the second derivative of the enthalpy by strain)
        counts with its absolute value, so that the step goes downhill also where the curvature is
        negative.
        """
        values, vectors = np.linalg.eigh(np.asarray(self.stiffness, float))
        # Eigenvalues next to zero are raised to 1e-12 of the largest, lest the step be infinite.
        size = np.maximum(np.abs(values), 1e-12 * np.max(np.abs(values), initial=0.0))
        step = -(vectors / np.where(size > 0, size, 1.0)) @ (
            vectors.T @ np.asarray(self.slope, float)
        )
        # 1e-300 only avoids a division by zero, for a step of zero
        return step * min(1.0, LONGEST / max(float(np.linalg.norm(step)), 1e-300))


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


@jax.jit
def _sides(system: System, strains: jax.Array) -> jax.Array:
    """Compute the forces (k, n, d) on the particles due to k affine strains (k, d, d)."""
    return jax.vmap(lambda e: forces_of_strain(system, e))(strains)


@jax.jit
@full_precision
def _slopes(
    system: System, pressure: jax.Array | float, along: jax.Array, motion: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Compute the first and second derivative of the enthalpy U + P V by strain, (k,) and (k, k).

    U is the energy, P the pressure and V the volume. The particles are relaxed in the second
    derivative: they move by ``motion``.

    Args:
      along: (k, d, d) the strains of the cell along which the derivatives are taken.
      motion: (k, n, d) displacements of the particles, relative to their affine positions, under
        each of the strains.
    """
    trace = jnp.einsum("kii->k", along)
    # the second derivative of det(1 + e) at e = 0
    of_volume = trace[:, None] * trace[None] - jnp.einsum("kij,lij->kl", along, along)
    matrix = stiffness_along(system, along, motion) + pressure * system.volume * of_volume
    return enthalpy_gradient(system, pressure, along), matrix
