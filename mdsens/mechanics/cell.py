"""A cell that moves with its particles: the enthalpy U + P V and its derivatives by strain.

At a pressure P the unknowns are positions and a strain of the cell, and what is stationary is

    h(R, e) = U(R, e) + P V_0 det(1 + e),    dh/dR = 0,    dh/de = V (stress + P) = 0.

Particles are eliminated first: for a strain e they leave their affine places by X e, X = -H^+
d2U/dR de, and what is left is a small matrix, the relaxed stiffness of the cell S = d2h/de2 +
(d2U/de dR) X. So everything at a pressure takes
the factor of the Hessian in a fixed cell and k more right-hand sides: one where the cell keeps its
shape, d (d + 1) / 2 where it is free.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.portable import Portable
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

LONGEST = 0.02  # strain of one step


def free_strains(dimension: int, shape: bool) -> np.ndarray:
    """(k, d, d) orthonormal strains that a cell is free to take: of its size, or of its shape as
    well.
    """
    return basis(dimension) if shape else uniform(dimension)


def fixed_cell(system: System) -> System:
    """The same in a cell of its own, which follows no parameter."""
    return system.replace(boundary=FixedBox(jnp.asarray(system.box), system.boundary.orthogonal))


def deformed(system: System, strain: jax.Array, positions: jax.Array | None = None) -> System:
    """A system in a fixed cell, positions and cell deformed by 1 + strain (d, d). Traceable; the
    list stays.
    """
    at = system.positions if positions is None else positions
    box = jnp.asarray(system.box)
    cell = box + strain @ box
    return system.replace(positions=at + at @ strain.T, boundary=FixedBox(cell))


def enthalpy_gradient(
    system: System, pressure: Any, along: Any, strain: jax.Array | None = None
) -> jax.Array:
    """dh/de along strains (k, d, d), at a strain (k,) of them: at none it is V (stress + P) : E,
    (k,).
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
    """det(1 + strain), written out: it compiles in no time, which that of any matrix does not."""
    rows = jnp.eye(strain.shape[0], dtype=strain.dtype) + strain
    if strain.shape[0] == 2:
        return rows[0, 0] * rows[1, 1] - rows[0, 1] * rows[1, 0]
    return jnp.sum(rows[0] * jnp.cross(rows[1], rows[2]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cell(Portable):
    """The cell of a relaxed configuration as an unknown.

    Attributes:
      along: (k, d, d) the strains that it is free to take.
      pressure: P.
      motion: (k, n, d) X, the displacements from the affine places by each.
      slope: (k,) dh/de.
      stiffness: (k, k) S, the second derivative of the enthalpy with particles relaxed.
      compliance: (k, k) S^-1; zero where S is, to round-off.
      status: of the solves; INDEFINITE where S is not positive definite, FLOPPY where it is zero to
        round-off.
    """

    along: jax.Array
    pressure: jax.Array
    motion: jax.Array
    slope: jax.Array
    stiffness: jax.Array
    compliance: jax.Array
    status: jax.Array

    @classmethod
    def of(
        cls,
        system: System,
        stiffness: HessianFactor,
        pressure: Any,
        along: np.ndarray,
        rtol: float = 1e-10,
    ) -> Cell:
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
        slope, matrix = (
            np.asarray(x, float)
            for x in _slopes(system, pressure, strains, jnp.asarray(motion, dtype))
        )
        code = max(
            [int(code) for code in codes if not Status(int(code)).good],
            default=Status.CONVERGED.value,
        )
        finite = bool(np.isfinite(matrix).all())
        values, vectors = np.linalg.eigh(matrix if finite else np.eye(len(along)))
        flat = motion.reshape(len(along), -1)
        affine = matrix + flat @ stiffness.products(
            flat.T
        )  # with what the particles give back by X
        firm = np.abs(values) > float(resolution(system, affine, motion, 0.0, 0.0)[0])
        if not finite:
            code = Status.NOT_FINITE.value
        elif code == Status.CONVERGED and not (firm & (values > 0)).all():
            code = (Status.INDEFINITE if (firm & (values < 0)).any() else Status.FLOPPY).value
        inverse = (vectors * np.where(firm, 1.0 / np.where(firm, values, 1.0), 0.0)) @ vectors.T
        given, moves, slopes, matrix, inverse = (
            jnp.asarray(x, dtype) for x in (pressure, motion, slope, matrix, inverse)
        )
        return cls(strains, given, moves, slopes, matrix, inverse, jnp.asarray(code, jnp.int32))

    def newton(self) -> np.ndarray:
        """(k,) the strain of a Newton step, down the enthalpy whatever its curvature, and no
        further than 2 %.
        """
        values, vectors = np.linalg.eigh(np.asarray(self.stiffness, float))
        size = np.maximum(np.abs(values), 1e-12 * np.max(np.abs(values), initial=0.0))
        step = -(vectors / np.where(size > 0, size, 1.0)) @ (
            vectors.T @ np.asarray(self.slope, float)
        )
        return step * min(1.0, LONGEST / max(float(np.linalg.norm(step)), 1e-300))


@jax.jit
def _sides(system: System, strains: jax.Array) -> jax.Array:
    return jax.vmap(lambda e: forces_of_strain(system, e))(strains)


@jax.jit
def _slopes(
    system: System, pressure: Any, along: jax.Array, motion: jax.Array
) -> tuple[jax.Array, jax.Array]:
    trace = jnp.einsum("kii->k", along)
    of_volume = trace[:, None] * trace[None] - jnp.einsum(
        "kij,lij->kl", along, along
    )  # of det(1 + e)
    matrix = stiffness_along(system, along, motion) + pressure * system.volume * of_volume
    return enthalpy_gradient(system, pressure, along), matrix
