"""The load on a cell that relaxes: a pressure, a stress, or a deviatoric stress at a fixed volume.

The unknowns of the cell are the amplitudes s of k strains E_a, which deform the present cell by
F = 1 + e(s), with a symmetric strain e. The cell is at rest under the target stress sigma_t where

    G_a = dU/ds_a - V sigma_t : (dF/ds_a F^-1) = V (sigma - sigma_t) : E_a = 0  at s = 0,

with the energy U, the volume V and the Cauchy stress sigma, positive in tension. At a pressure P,
sigma_t = -P 1, and G is the derivative of the enthalpy U + P V. Under another stress no enthalpy
exists: V sigma_t depends on the volume, so that the work of the stress depends on the path and the
derivative of G by s is no symmetric matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.lattice import inverse
from mdsens._util.portable import Portable
from mdsens._util.precision import full_precision
from mdsens.mechanics.strain import basis, strain_gradient
from mdsens.model.system import System, parameters_of, potential_energy
from mdsens.potentials.parameters import Parameter

__all__ = [
    "CellLoad",
    "PressureLoad",
    "StressLoad",
    "VolumeLoad",
    "differentiated",
    "labels_of",
    "load_slope",
    "masked_strains",
    "traceless_strains",
    "uniform_strain",
]

Array: TypeAlias = jax.Array | np.ndarray


# -- the strains that a cell can take


def uniform_strain(axes: np.ndarray) -> np.ndarray:
    """Return the strain of norm 1 that stretches the given axes equally, (1, d, d).

    Args:
      axes: (d,) True for the axes that stretch.
    """
    return np.diag(axes / np.sum(axes) ** 0.5)[None]


def masked_strains(free: np.ndarray) -> np.ndarray:
    """Return an orthonormal basis (k, d, d) of the symmetric strains with some free components.

    Args:
      free: (d, d) symmetric, True for the components that may differ from zero.
    """
    unit = basis(len(free))
    return unit[np.any((unit != 0) & free, axis=(1, 2))]


def traceless_strains(free: np.ndarray) -> np.ndarray:
    """Return an orthonormal basis (k, d, d) of the traceless strains with some free components.

    They change the shape and, to first order, not the volume.

    Args:
      free: (d, d) symmetric, True for the components that may differ from zero.
    """
    axes = np.flatnonzero(np.diag(free))
    strains = []
    # (1, -1, 0), (1, 1, -2), …, each divided by its norm: orthogonal to each other and to (1, 1, 1)
    for count in range(1, len(axes)):
        stretch = np.zeros(len(free))
        stretch[axes[:count]] = 1.0
        stretch[axes[count]] = -count
        strains.append(np.diag(stretch / np.linalg.norm(stretch)))
    shears = masked_strains(free & ~np.eye(len(free), dtype=bool))
    return np.concatenate([np.reshape(strains, (-1, *free.shape)), shears])


def labels_of(strains: Array) -> list[str]:
    """Return the components of a strain that some strains (k, d, d) free, such as xx, yy, xy."""
    free = np.any(np.asarray(strains) != 0, axis=0)
    pairs = np.argwhere(np.triu(free))
    # the diagonal first, as in a Mandel vector
    return ["xyz"[i] + "xyz"[j] for i, j in sorted(pairs.tolist(), key=lambda ij: ij[0] != ij[1])]


# -- the loads


class _Load(Portable):
    """What all loads have in common.

    The fields of a load are the parameters of the same names by which a minimum can be
    differentiated. In a batch they have a leading axis over the systems.
    """

    kind: ClassVar[str]  # the row of a printed table that describes the load

    @property
    def params(self) -> dict[str, jax.Array]:
        """The parameters of the load by name, which are parameters of the minimum as well."""
        record: Any = self
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(record)}

    def at(self, params: Mapping[str, Any]) -> Self:
        """Return the load with other parameters; ``params`` may hold those of the system too."""
        record: Any = self
        return dataclasses.replace(record, **{name: params[name] for name in self.params})

    def target(self, dimension: int) -> jax.Array:
        """Return the target (d, d) of the Cauchy stress, positive in tension."""
        raise NotImplementedError

    def strain(self, amplitudes: jax.Array, along: Array, volume: Any) -> jax.Array:
        """Return the strain e (d, d) of the cell, which deforms the cell by F = 1 + e.

        Args:
          amplitudes: (k,) amplitudes of the strains.
          along: (k, d, d) the strains that the cell can take.
          volume: the volume of the cell at zero amplitudes.
        """
        return jnp.tensordot(amplitudes, along, axes=1)

    def imposed(self, changes: Mapping[str, Any], along: Array) -> jax.Array | None:
        """Return the strain (d, d) of the cell that a change of the load's parameters imposes.

        The result is None where the parameters act on the cell by its equilibrium alone.

        Args:
          changes: changes of parameters by name.
          along: (k, d, d) the strains that the cell can take.
        """
        return None

    def imposed_gradient(self, weights: jax.Array, along: Array) -> dict[str, jax.Array]:
        """Compute the derivative by the load's parameters of ``weights`` : imposed strain.

        This is the transpose of ``imposed``. The result has no entry for a parameter that imposes
        no strain.

        Args:
          weights: (d, d) weights of the components of the strain.
          along: (k, d, d) the strains that the cell can take.
        """
        return {}

    def stiffness(self, system: System, along: jax.Array) -> jax.Array:
        """Compute the part of dG/ds, (k, k), that is no second derivative of U along F = 1 + e.

        Args:
          system: the system, in its present cell.
          along: (k, d, d) the strains that the cell can take.
        """
        target = self.target(system.dimension)
        trace = jnp.einsum("kii->k", along)
        slope = jnp.einsum("ij,kij->k", target, along)
        # d/ds_b of - V sigma_t : (E_a F^-1): dV = V tr E_b, and dF^-1 = - E_b
        return -system.periodic_volume * (slope[:, None] * trace[None] - _products(target, along))

    def work(self, strain: np.ndarray, volume: float) -> float:
        """Compute the work of the target stress along the straight path to a strain of the cell.

        The work is the integral of V(t) sigma_t : (e F^-1) over t from 0 to 1, F = 1 + t e. At a
        pressure P it is minus P times the change of the volume.

        Args:
          strain: (d, d) the strain e.
          volume: the volume before the strain.
        """
        identity = np.eye(len(strain))
        target = np.asarray(self.target(len(strain)), float)

        def power(t: float) -> float:
            F = identity + t * strain
            return float(np.linalg.det(F) * np.sum(target * (strain @ np.linalg.inv(F))))

        # Simpson's rule, exact here: V(t) F^-1 is the matrix of cofactors, of degree d - 1 in t
        return volume * (power(0.0) + 4.0 * power(0.5) + power(1.0)) / 6.0

    def goal_in_words(self) -> str:
        """Name the load and its value, such as "pressure 0.05", for a message."""
        raise NotImplementedError

    def in_words(self, strains: Array, extent: str) -> str:
        """Describe the load, which strains of the cell relaxed and how large it is, for a table.

        ``extent`` is the size of the cell, such as "volume 5.2".
        """
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PressureLoad(_Load):
    """A pressure P on the cell, with the enthalpy U + P V.

    Attributes:
      pressure: P, in energy per volume; positive in compression.
    """

    pressure: jax.Array

    kind = "pressure"

    def target(self, dimension: int) -> jax.Array:
        return -self.pressure * np.eye(dimension, dtype=jnp.result_type(self.pressure))

    def goal_in_words(self) -> str:
        return f"pressure {float(self.pressure):g}"

    def in_words(self, strains: Array, extent: str) -> str:
        goal = f"{float(self.pressure):.6g}, to which {_relaxed(strains)} relaxed"
        return f"{goal}: {extent}"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StressLoad(_Load):
    """A Cauchy stress on the cell.

    Attributes:
      stress: (d, d) symmetric, in energy per volume; positive in tension.
    """

    stress: jax.Array

    kind = "stress"

    def target(self, dimension: int) -> jax.Array:
        return self.stress

    def goal_in_words(self) -> str:
        return f"stress {_entries(self.stress)}"

    def in_words(self, strains: Array, extent: str) -> str:
        # of the other components nothing was asked
        goal = f"{_entries(self.stress, labels_of(strains))}, to which {_relaxed(strains)} relaxed"
        return f"{goal}: {extent}"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VolumeLoad(_Load):
    """A deviatoric stress on a cell of fixed volume.

    The strains E_a that the cell can take are traceless, and the cell deforms by
    F = (1 + sum_a s_a E_a) c, where c stretches the free axes equally, so that the volume is the
    one prescribed.

    Attributes:
      volume: the volume of the cell; in 2-D an area.
      deviator: (d, d) symmetric, the target of the deviatoric stress, in energy per volume.
        Its trace does not count.
    """

    volume: jax.Array
    deviator: jax.Array

    kind = "volume"

    def target(self, dimension: int) -> jax.Array:
        return self.deviator

    @full_precision
    def strain(self, amplitudes: jax.Array, along: Array, volume: Any) -> jax.Array:
        free_axes = _free_axes(along)
        identity = jnp.eye(along.shape[-1], dtype=amplitudes.dtype)
        F = identity + jnp.tensordot(amplitudes, along, axes=1)
        stretch = (self.volume / (volume * _determinant(F))) ** (1.0 / jnp.sum(free_axes))
        return F * jnp.where(free_axes, stretch, 1.0)[:, None] - identity

    def imposed(self, changes: Mapping[str, Any], along: Array) -> jax.Array | None:
        if "volume" not in changes:
            return None
        return changes["volume"] / self.volume * self._dilation(along)

    def imposed_gradient(self, weights: jax.Array, along: Array) -> dict[str, jax.Array]:
        return {"volume": jnp.sum(weights * self._dilation(along)) / self.volume}

    def stiffness(self, system: System, along: jax.Array) -> jax.Array:
        dilation = self._dilation(along)
        # V sigma : D, the slope of the energy along the dilation
        slope = strain_gradient(system, dilation[None])[0]
        rest = slope - system.periodic_volume * jnp.sum(self.deviator * dilation)
        # c = 1 + e : e / 2 m over the m free axes keeps the volume to second order in e
        return rest * jnp.einsum("aij,bij->ab", along, along) + system.periodic_volume * _products(
            self.deviator, along
        )

    def work(self, strain: np.ndarray, volume: float) -> float:
        # at constant volume the work is V sigma_t : log F, since F commutes with its rate
        values, vectors = np.linalg.eigh(np.eye(len(strain)) + strain)
        logarithm = (vectors * np.log(values)) @ vectors.T
        return volume * float(np.sum(np.asarray(self.deviator, float) * logarithm))

    def goal_in_words(self) -> str:
        return f"volume {float(self.volume):g} and stress deviator {self._deviator_in_words()}"

    def in_words(self, strains: Array, extent: str) -> str:
        d = self.deviator.shape[-1]
        whole = len(strains) == d * (d + 1) // 2 - 1
        shape = "the shape" if whole else f"the traceless part of {', '.join(labels_of(strains))}"
        goal = self._deviator_in_words()
        size = extent.removeprefix("volume ")
        return f"{size}, in which {shape} of the cell was relaxed to a stress deviator {goal}"

    def _deviator_in_words(self) -> str:
        return _entries(self.deviator) if np.any(np.asarray(self.deviator)) else "of zero"

    def _dilation(self, along: Array) -> jax.Array:
        """Return the strain D (d, d) of trace 1 that stretches the free axes equally.

        A change dV of the volume imposes the strain dV / V D.
        """
        free_axes = _free_axes(along)
        return jnp.diag(free_axes / jnp.sum(free_axes)).astype(along.dtype)


CellLoad: TypeAlias = PressureLoad | StressLoad | VolumeLoad


def _free_axes(along: Array) -> jax.Array:
    """Return the axes (d,) along which some strains (k, d, d) stretch a cell, as 0 or 1."""
    return jnp.any(jnp.diagonal(jnp.asarray(along), axis1=1, axis2=2) != 0, axis=0)


def _products(target: jax.Array, along: jax.Array) -> jax.Array:
    """Compute target : (E_a E_b), (k, k), for a symmetric matrix and k strains E; symmetric."""
    return jnp.einsum("ij,aim,bmj->ab", target, along, along)


def _relaxed(strains: Array) -> str:
    """Describe in words, with their verb, the strains (k, d, d) of the cell that relaxed."""
    d = strains.shape[-1]
    labels = labels_of(strains)
    if len(strains) == 1 and len(labels) == d > 1:
        return "the size of the cell was"
    if len(strains) == d * (d + 1) // 2:
        return "the size and shape of the cell were"
    if len(labels) == 1:
        return f"the strain {labels[0]} of the cell was"
    return f"the strains {', '.join(labels)} of the cell were"


def _entries(matrix: Array, labels: Sequence[str] | None = None) -> str:
    """Format the components of a symmetric matrix by name, such as "xx -0.06, yy -0.04, xy 0".

    Args:
      matrix: (d, d).
      labels: the components to format, such as xx; None for all.
    """
    values = np.asarray(matrix)
    chosen = labels_of(np.ones((1, *values.shape))) if labels is None else labels
    # + 0.0, so that no "-0" is shown
    entries = [(label, values["xyz".index(label[0]), "xyz".index(label[1])]) for label in chosen]
    return ", ".join(f"{label} {value + 0.0:.6g}" for label, value in entries)


# -- the condition of rest


@full_precision
def load_slope(
    system: System,
    load: CellLoad,
    along: jax.Array | np.ndarray,
    strain: jax.Array | None = None,
) -> jax.Array:
    """Compute the condition G (k,) of a cell under a load, which is zero where the cell is at rest.

    G_a = dU/ds_a - V sigma_t : (dF/ds_a F^-1), see the head of this file.

    Args:
      system: the system, whose cell is the one at zero amplitudes.
      load: the load.
      along: (k, d, d) the strains that the cell can take, in d dimensions.
      strain: (k,) the amplitudes s of the strains; None for zero amplitudes in a cell that has the
        volume of the load, where G_a = V (sigma - sigma_t) : E_a.
    """
    target = load.target(system.dimension)
    if strain is None:
        return strain_gradient(system, along) - system.periodic_volume * jnp.einsum(
            "ij,kij->k", target, jnp.asarray(along)
        )

    def change(s: jax.Array) -> jax.Array:
        return load.strain(s, along, system.periodic_volume)

    def energy(s: jax.Array) -> jax.Array:
        return potential_energy(system, strain=change(s))

    F = jnp.eye(system.dimension, dtype=strain.dtype) + change(strain)
    rates = jax.jacfwd(change)(strain)  # dF/ds, (d, d, k)
    power = jnp.einsum("ij,imk,mj->k", target, rates, inverse(F))
    return jax.grad(energy)(strain) - system.periodic_volume * _determinant(F) * power


def _determinant(matrix: jax.Array) -> jax.Array:
    """Compute the determinant of a (2, 2) or (3, 3) matrix.

    It is written out, since ``jnp.linalg.det`` takes long to compile.
    """
    if matrix.shape[0] == 2:
        return matrix[0, 0] * matrix[1, 1] - matrix[0, 1] * matrix[1, 0]
    return jnp.sum(matrix[0] * jnp.cross(matrix[1], matrix[2]))


def differentiated(system: System, params: Mapping[str, Any]) -> tuple[Parameter, ...]:
    """List the parameters of a minimum, of its system and of the load on its cell, with shapes.

    A stress is a symmetric matrix, whose entries (i, j) and (j, i) are one number, as those of a
    matrix of species pairs are.

    Args:
      system: the system, or a batch.
      params: the parameters by name.
    """
    of_system = {name: value for name, value in params.items() if name in system.params}
    of_load = {name: value for name, value in params.items() if name not in of_system}
    return (
        *parameters_of(system, of_system),
        *(
            dataclasses.replace(parameter, paired=len(parameter.shape) == 2)
            for parameter in parameters_of(system, of_load)
        ),
    )
