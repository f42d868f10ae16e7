"""A cell that relaxes with its particles: the enthalpy U + P V and its derivatives by strain.

At a pressure P the unknowns are the positions R and a strain e of the cell, and the enthalpy is
stationary:

    h(R, e) = U(R, e) + P V_0 det(1 + e),    dh/dR = 0,    dh/de = V (stress + P) = 0.

The particles are eliminated first. Under a strain e they move by X e relative to their affine
positions, X = -H^+ d2U/dR de. A small matrix is left, the stiffness of the cell with relaxed
particles, S = d2h/de2 + (d2U/de dR) X. So a computation at constant pressure needs the factor of
the Hessian in a fixed cell and k more right-hand sides: k = 1 where the cell keeps its shape, and
k = d (d + 1) / 2 where its shape is free.
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
    """Return orthonormal strains (k, d, d) that change the cell's size, or its shape as well.

    Args:
      dimension: the dimension d.
      shape: whether the cell's shape may change; if False only its size changes, and k = 1.
    """
    return basis(dimension) if shape else uniform(dimension)


def fixed_cell(system: System) -> System:
    """Return the system in a fixed cell, its present box, which depends on no parameter."""
    return system.replace(boundary=FixedBox(jnp.asarray(system.box), system.boundary.orthogonal))


@full_precision
def deformed(system: System, strain: jax.Array, positions: jax.Array | None = None) -> System:
    """Deform the positions and the cell of a system by 1 + strain.

    Traceable. The result has a fixed cell and the neighbor list of ``system``.

    Args:
      strain: the strain, (d, d).
      positions: (n, d) before the deformation; those of the system where None.
    """
    R = system.positions if positions is None else positions
    box = jnp.asarray(system.box)
    cell = box + strain @ box
    return system.replace(positions=R + R @ strain.T, boundary=FixedBox(cell))


@full_precision
def enthalpy_gradient(
    system: System,
    pressure: jax.Array | float,
    along: jax.Array | np.ndarray,
    strain: jax.Array | None = None,
) -> jax.Array:
    """Compute the derivative of the enthalpy by strain, dh/de, (k,).

    Args:
      pressure: the pressure P.
      along: (k, d, d) the strains E along which the derivative is taken.
      strain: (k,) amplitudes of the strains E at which the derivative is taken; None for zero,
        where the result is V (stress + P) : E.
    """
    volume = system.volume
    if strain is None:
        return strain_gradient(system, along) + pressure * volume * jnp.einsum(
            "kii->k", jnp.asarray(along)
        )

    def enthalpy(s: jax.Array) -> jax.Array:
        change = jnp.tensordot(s, along, axes=1)
        return potential_energy(system, strain=change) + pressure * volume * _stretch(change)

    return jax.grad(enthalpy)(strain)


def _stretch(strain: jax.Array) -> jax.Array:
    """det(1 + strain), written out, since ``jnp.linalg.det`` takes long to compile."""
    rows = jnp.eye(strain.shape[0], dtype=strain.dtype) + strain
    if strain.shape[0] == 2:
        return rows[0, 0] * rows[1, 1] - rows[0, 1] * rows[1, 0]
    return jnp.sum(rows[0] * jnp.cross(rows[1], rows[2]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cell(Portable):
    """The cell of a relaxed configuration as an unknown.

    Attributes:
      along: (k, d, d) the strains that the cell can take.
      pressure: P.
      motion: (k, n, d) X, the displacements from the affine positions under each strain.
      slope: (k,) dh/de.
      stiffness: (k, k) S, the second derivative of the enthalpy with relaxed particles.
      compliance: (k, k) S^-1; zero along strains whose stiffness is zero to round-off.
      status: status of the solves for X, an int32 array; FLOPPY where an eigenvalue of S is zero to
        round-off, INDEFINITE where one is negative.
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
        """Compute the cell's derivatives from the Hessian in a fixed cell, by k solves.

        Not for compiled code.

        Args:
          system: the backbone, in a fixed cell.
          stiffness: the Hessian of the backbone.
          pressure: P.
          along: (k, d, d) the strains that the cell can take.
          rtol: relative residual to which the solves for X are carried.
        """
        dtype = system.positions.dtype
        strains = jnp.asarray(along, dtype)
        sides = np.asarray(_sides(system, strains))
        if stiffness.factor is not None:
            x, stats = stiffness.solve_many(sides.reshape(len(sides), -1).T, rtol)
            motion = x.T.reshape(sides.shape)
            codes = list(stats.status[0])
        else:
            solutions = [stiffness.solve(side, rtol) for side in sides]
            motion = np.stack([x for x, *_ in solutions])
            codes = [int(code) for *_, code in solutions]
        slope, matrix = (
            np.asarray(x, float)
            for x in _slopes(system, pressure, strains, jnp.asarray(motion, dtype))
        )
        # Of the solves that failed, the status with the highest code stands for all.
        failures = [int(code) for code in codes if not Status(int(code)).good]
        code = max(failures, default=Status.CONVERGED.value)
        # A matrix with a NaN has no eigenvalues: an identity takes its place, and the status tells.
        finite = bool(np.isfinite(matrix).all())
        values, vectors = np.linalg.eigh(matrix if finite else np.eye(len(along)))
        flat = motion.reshape(len(along), -1)
        # The particles lower the stiffness by X^T H X when they relax, so the affine one is larger.
        affine = matrix + flat @ stiffness.products(flat.T)
        # Round-off alone, with no force left on the particles and no residual.
        resolved = np.abs(values) > float(resolution(system, affine, motion, 0.0, 0.0)[0])
        if not finite:
            code = Status.NOT_FINITE.value
        elif code == Status.CONVERGED and not (resolved & (values > 0)).all():
            negative = (resolved & (values < 0)).any()
            code = (Status.INDEFINITE if negative else Status.FLOPPY).value
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
        """Compute the strain (k,) of a Newton step down the enthalpy, with norm 2 % at most.

        Each eigenvalue of ``stiffness`` counts with its absolute value, so that the step goes
        downhill also where the curvature is negative.
        """
        values, vectors = np.linalg.eigh(np.asarray(self.stiffness, float))
        # Eigenvalues next to zero are raised to 1e-12 of the largest, lest the step be infinite.
        size = np.maximum(np.abs(values), 1e-12 * np.max(np.abs(values), initial=0.0))
        step = -(vectors / np.where(size > 0, size, 1.0)) @ (
            vectors.T @ np.asarray(self.slope, float)
        )
        # 1e-300 only avoids a division by zero, for a step of zero
        return step * min(1.0, LONGEST / max(float(np.linalg.norm(step)), 1e-300))


@jax.jit
def _sides(system: System, strains: jax.Array) -> jax.Array:
    """Compute the forces (k, n, d) that strains (k, d, d) put on the particles."""
    return jax.vmap(lambda e: forces_of_strain(system, e))(strains)


@jax.jit
@full_precision
def _slopes(
    system: System, pressure: jax.Array | float, along: jax.Array, motion: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Compute dh/de, (k,), and the second derivative of h by e with relaxed particles, (k, k)."""
    trace = jnp.einsum("kii->k", along)
    # the second derivative of det(1 + e) at e = 0
    of_volume = trace[:, None] * trace[None] - jnp.einsum("kij,lij->kl", along, along)
    matrix = stiffness_along(system, along, motion) + pressure * system.volume * of_volume
    return enthalpy_gradient(system, pressure, along), matrix
