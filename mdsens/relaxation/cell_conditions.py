"""Conditions on the cell in a relaxation: fixed, at a pressure, at a stress, or at a volume."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from mdsens._util.compilation import as_jax
from mdsens._util.errors import InputError
from mdsens._util.validation import real_array, real_number, short
from mdsens.mechanics.cell import deformed, fixed_cell
from mdsens.mechanics.load import (
    CellLoad,
    PressureLoad,
    StressLoad,
    VolumeLoad,
    labels_of,
    masked_strains,
    traceless_strains,
    uniform_strain,
)
from mdsens.model.box import FixedBox
from mdsens.model.system import System, require_unconstrained
from mdsens.relaxation.equilibrium import Equilibrium

__all__ = [
    "AtPressure",
    "AtStress",
    "AtVolume",
    "CellCondition",
    "FixedCell",
    "RelaxedCell",
    "cell_condition",
    "condition_of",
    "periodic_axes",
    "strains_of",
]

# A matrix of numbers or of booleans, as nested tuples: records with it can be compared and hashed.
Matrix: TypeAlias = tuple[tuple[Any, ...], ...]
# Largest difference of two entries that count as equal, and largest trace that counts as zero, over
# the largest entry: some eps, the round-off of the computation that made the matrix.
ROUND_OFF = 1e-13


@dataclasses.dataclass(frozen=True)
class FixedCell:
    """Condition of a relaxation in a fixed cell, which minimizes the potential energy U.

    The cell is constant, or a given function of the potential's parameters.
    """

    def check(self, system: System) -> None:
        """Accept any system, since every system can be relaxed in a fixed cell."""


@dataclasses.dataclass(frozen=True)
class AtPressure:
    """Condition of a relaxation at a given pressure P, which minimizes the enthalpy U + P V.

    The cell relaxes with the particles until its stress balances the pressure. U is the potential
    energy and V the volume of the cell.

    Attributes:
      pressure: P, in energy per volume; positive in compression.
      shape: whether the shape of the cell relaxes as well, until no shear stress is left. If False,
        the cell expands or contracts equally in all directions, and P is the mean of the pressures
        along these directions.
      free: (d, d) symmetric, True for the components of the strain that may change, with
        shape=True; None for all. The stress balances the pressure along these components alone. A
        free shear needs the stretches along both of its axes to be free as well.
    """

    pressure: float
    shape: bool = False
    free: ArrayLike | None = None

    def __post_init__(self) -> None:
        remedy = "give one number, in energy per volume, or None for a fixed cell."
        number = real_number("pressure", self.pressure, remedy)
        if not np.isfinite(number):
            raise InputError(f"`pressure` is {self.pressure}: give a finite number.")
        if not isinstance(self.shape, bool):
            raise InputError(f"`shape` is {short(self.shape)}: give True or False.")
        if self.free is not None and not self.shape:
            raise InputError(
                "`free` is given and `shape` is False, so that the cell keeps its shape: give"
                " shape=True with `free`, or leave `free` out."
            )
        object.__setattr__(self, "pressure", float(number))
        object.__setattr__(self, "free", _checked_mask(self.free))

    def check(self, system: System) -> None:
        """Raise InputError if a system cannot be relaxed at a pressure.

        Open boundaries, constraints, and a potential with a parameter named ``pressure`` are
        refused.
        """
        _check_system(self, system, ("pressure",), "a cell at a pressure")

    def load(self, system: System) -> PressureLoad:
        """Return the pressure on the cell of a system, in the precision of its positions."""
        return PressureLoad(as_jax(self.pressure, system.positions.dtype))


@dataclasses.dataclass(frozen=True)
class AtStress:
    """Condition of a relaxation at a given Cauchy stress of the cell.

    The cell relaxes with the particles until V (sigma - sigma_t) is zero along the free components
    of the strain, with the stress sigma, the target sigma_t and the volume V of the relaxed cell.
    ``AtStress(-P * np.eye(d))`` is ``AtPressure(P, shape=True)``. Under a stress that is no
    pressure there is no enthalpy: its work depends on the path. The relaxed cell is a root of the
    condition, stable where every strain costs more energy than the stress gains in work.

    The target refers to the axes of space, and the cell strains without a rotation: the relaxed
    cell is F times the cell at the start, with a symmetric F = 1 + e (under a pressure, where no
    orientation counts, up to a rotation). So the result is a root of as
    many equations as unknowns, and does not depend on the path to it; which of several roots is
    found can depend on the start, as for any minimum. Derivatives by ``jvp`` and the like take the
    relaxed cell as the start, and are those of the symmetric strain e counted from it.

    Attributes:
      stress: sigma_t, a symmetric (d, d) matrix in energy per volume; positive in tension.
      free: (d, d) symmetric, True for the components of the strain that may change; None for all.
        Only these components of ``stress`` count. A free shear needs the stretches along both of
        its axes to be free as well.
    """

    stress: ArrayLike
    free: ArrayLike | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stress", _checked_tensor("stress", self.stress))
        object.__setattr__(self, "free", _checked_mask(self.free))

    def check(self, system: System) -> None:
        """Raise InputError if a system cannot be relaxed at a stress.

        Open boundaries, constraints, a matrix of another dimension, and a potential with a
        parameter named ``stress`` are refused.
        """
        _check_system(self, system, ("stress",), "a cell at a stress")
        _check_dimension("stress", self.stress, system)

    def load(self, system: System) -> StressLoad:
        """Return the stress on the cell of a system, in the precision of its positions."""
        return StressLoad(jnp.asarray(self.stress, system.positions.dtype))


@dataclasses.dataclass(frozen=True)
class AtVolume:
    """Condition of a relaxation at a fixed volume, where only the shape of the cell relaxes.

    The shape relaxes with the particles until the deviatoric part of the Cauchy stress, sigma -
    (tr sigma / d) 1, is the one given. The volume is a number, that of the cell at the start: also
    where the box at the start is a function of the parameters, it does not follow them afterwards.
    Derivatives by ``jvp`` and the like are taken at this volume, and the volume is a parameter
    too, as in ``jvp(eq, {"volume": 1.0})``; its change stretches the free axes equally.

    Attributes:
      deviator: (d, d) the deviatoric stress to reach, symmetric and without a trace, in energy per
        volume; None for zero.
      volume: the volume of the cell, an area in 2-D. The cell at the start is stretched to it,
        equally along the free axes. None for the volume of the cell at the start.
      free: (d, d) symmetric, True for the components of the strain that may change; None for all.
        The stress reaches the deviator along the traceless strains of these components alone. A
        free shear needs the stretches along both of its axes to be free as well.
    """

    deviator: ArrayLike | None = None
    volume: float | None = None
    free: ArrayLike | None = None

    def __post_init__(self) -> None:
        if self.deviator is not None:
            deviator = _checked_tensor("deviator", self.deviator)
            trace = float(np.trace(np.asarray(deviator)))
            if abs(trace) > ROUND_OFF * np.max(np.abs(deviator)):
                raise InputError(
                    f"`deviator` has the trace {trace:.6g}, and a deviatoric stress has none:"
                    " subtract the trace over d from its diagonal."
                )
            object.__setattr__(self, "deviator", deviator)
        if self.volume is not None:
            volume = real_number("volume", self.volume, "give one number, or None.")
            if not 0 < volume < np.inf:
                raise InputError(f"`volume` is {self.volume}: give a positive number, or None.")
            object.__setattr__(self, "volume", float(volume))
        object.__setattr__(self, "free", _checked_mask(self.free))

    def check(self, system: System) -> None:
        """Raise InputError if the shape of a system's cell cannot be relaxed at a fixed volume.

        Open boundaries, constraints, a matrix of another dimension, fewer than two axes that are
        free to stretch, and a potential with a parameter named ``volume`` or ``deviator`` are
        refused.
        """
        _check_system(self, system, ("volume", "deviator"), "a cell at a volume")
        if self.deviator is not None:
            _check_dimension("deviator", self.deviator, system)

    def load(self, system: System) -> VolumeLoad:
        """Return the volume and the deviatoric stress, in the precision of the positions."""
        d = system.dimension
        dtype = system.positions.dtype
        deviator = np.zeros((d, d)) if self.deviator is None else self.deviator
        volume = system.periodic_volume if self.volume is None else self.volume
        return VolumeLoad(jnp.asarray(volume, dtype), jnp.asarray(deviator, dtype))


RelaxedCell: TypeAlias = AtPressure | AtStress | AtVolume
CellCondition: TypeAlias = FixedCell | RelaxedCell


# -- checks


def _checked_tensor(name: str, value: ArrayLike) -> Matrix:
    """Check a symmetric (2, 2) or (3, 3) matrix of numbers; return it as nested tuples.

    Args:
      name: name of the field, for messages.
      value: the matrix.
    """
    array = np.asarray(real_array(f"`{name}`", value, "give a symmetric (d, d) matrix."), float)
    if array.shape not in ((2, 2), (3, 3)):
        raise InputError(
            f"`{name}` has shape {array.shape}: give a symmetric (d, d) matrix, d = 2 or 3."
        )
    if not np.isfinite(array).all():
        raise InputError(f"`{name}` is {short(array.tolist())}: give finite numbers.")
    off = np.abs(array - array.T)
    if np.max(off) > ROUND_OFF * np.max(np.abs(array)):
        i, j = np.unravel_index(np.argmax(off), off.shape)
        raise InputError(
            f"`{name}` is {array[i, j]:g} at [{i},{j}] and {array[j, i]:g} at [{j},{i}]: give a"
            " symmetric matrix."
        )
    return _nested(0.5 * (array + array.T))


def _checked_mask(free: ArrayLike | None) -> Matrix | None:
    """Check which components of the strain are free; return them as nested tuples, or None.

    The strains with these components must form a group of deformations, up to rotations: a shear
    xy turns into stretches along x and y as it grows, and shears xy and yz make a shear xz. With
    other components the relaxed cell would depend on the path to it.
    """
    if free is None:
        return None
    mask = np.asarray(free)
    if mask.dtype != bool or mask.shape not in ((2, 2), (3, 3)):
        raise InputError(
            f"`free` is {short(mask.tolist())}: give a symmetric (d, d) matrix of True and False,"
            " d = 2 or 3."
        )
    if not np.array_equal(mask, mask.T):
        i, j = (int(k) for k in np.argwhere(mask != mask.T)[0])
        raise InputError(
            f"`free` is {mask[i, j]} at [{i},{j}] and {mask[j, i]} at [{j},{i}]: give a symmetric"
            " matrix, since both stand for one shear."
        )
    if not mask.any():
        raise InputError(
            "`free` is False everywhere, so that the cell cannot strain: free some components, or"
            " give FixedCell()."
        )
    missing = _missing_strain(mask)
    if missing:
        raise InputError(
            f"`free` has {', '.join(labels_of(mask[None]))} and not {missing}, without which the"
            f" shears depend on the path of the cell: free {missing} as well, or no shear that"
            " needs it."
        )
    return _nested(mask)


def _missing_strain(mask: np.ndarray) -> str | None:
    """Return a component of the strain that free shears need and that is not free, such as xx.

    The result is None where there is none.

    Args:
      mask: (d, d) symmetric, True for free components.
    """
    axes = range(len(mask))
    for i, j in itertools.permutations(axes, 2):
        # the product of the shears ij and jk is ik: with k = i a stretch along i
        for k in axes:
            if mask[i, j] and j != k and mask[j, k] and not mask[i, k]:
                return "xyz"[min(i, k)] + "xyz"[max(i, k)]
    return None


def _nested(array: np.ndarray) -> Matrix:
    return tuple(tuple(row) for row in array.tolist())


def _check_dimension(name: str, matrix: Any, system: System) -> None:
    """Raise InputError unless a (d, d) matrix has the dimension d of the system."""
    d = system.dimension
    if len(matrix) != d:
        raise InputError(
            f"`{name}` has shape {np.shape(matrix)}, and the system is in {d}-D: give a ({d}, {d})"
            " matrix."
        )


def _check_system(
    condition: RelaxedCell, system: System, names: tuple[str, ...], what: str
) -> None:
    """Raise InputError if the cell of a system cannot be relaxed under a condition.

    Args:
      condition: the condition.
      system: the system.
      names: names of the parameters of the load, by which minima are differentiated too.
      what: the condition in words, for messages.
    """
    if system.box is None:
        raise InputError(
            f"`{names[0]}` needs a cell, and this system has open boundaries: give it a box."
        )
    for name in names:
        if name in system.params:
            raise InputError(
                f"the potential has a parameter {name!r}, which is also the name of the cell's"
                f" {name}: give the parameter another name."
            )
    require_unconstrained(system, what)
    if condition.free is not None:
        _check_dimension("free", condition.free, system)
    _check_free_axes(condition, periodic_axes(system))


def _check_free_axes(condition: RelaxedCell, periodic: np.ndarray) -> None:
    """Raise InputError if a free strain involves an axis without a period, or no strain is free.

    Args:
      condition: the condition on the cell.
      periodic: (d,) True for the axes with a period.
    """
    if condition.free is not None:
        outside = np.asarray(condition.free) & ~np.outer(periodic, periodic)
        if outside.any():
            raise InputError(
                f"`free` has {', '.join(labels_of(outside[None]))}, along an axis without periodic"
                " boundaries, where the cell has no length: leave it out of `free`."
            )
    if not len(strains_of(condition, len(periodic), periodic)):
        raise InputError(
            "AtVolume needs two axes that are free to stretch, one for the gain of the other:"
            " free another axis, or take AtStress."
        )


# -- what a condition means


def periodic_axes(system: System) -> np.ndarray:
    """Return along which axes of space a system has a period, (d,).

    Raises:
      InputError: an open side of the cell is not along one of these axes.
    """
    along = np.ones(system.dimension, bool)
    for a, periodic in enumerate(system.periodic):
        if periodic:
            continue
        normal = np.abs(np.asarray(system.box)[:, a])
        axis = int(np.argmax(normal))
        # 1e-9 is far above the round-off of a unit vector, and a strain along it is no strain
        if np.delete(normal, axis).max() > 1e-9:
            raise InputError(
                f"cell vector {a + 1}, along which the system is not periodic, is"
                f" {np.asarray(system.box)[:, a].tolist()}: rotate the system so that this vector"
                " is along x, y or z, and the cell can strain across it."
            )
        along[axis] = False
    return along


def strains_of(
    condition: RelaxedCell, dimension: int, periodic: Sequence[bool] | np.ndarray
) -> np.ndarray:
    """Return an orthonormal basis (k, d, d) of the strains that a cell can take under a condition.

    Strains that involve an axis without a period are never among them.

    Args:
      condition: the condition on the cell.
      dimension: the dimension d of space.
      periodic: (d,) True for the axes along which the cell has a period.
    """
    axes = np.asarray(periodic, bool)
    if isinstance(condition, AtPressure) and not condition.shape:
        return uniform_strain(axes)
    free = np.ones((dimension, dimension), bool)
    if condition.free is not None:
        free = np.asarray(condition.free)
    free = free & np.outer(axes, axes)
    return traceless_strains(free) if isinstance(condition, AtVolume) else masked_strains(free)


def at_start(condition: RelaxedCell, system: System) -> System:
    """Return the system in a fixed cell, which has the volume that a condition prescribes."""
    # A box that is a function of the parameters becomes a constant: the cell is an unknown now.
    start = fixed_cell(system)
    if not isinstance(condition, AtVolume) or condition.volume is None:
        return start
    strains = strains_of(condition, system.dimension, periodic_axes(system))
    no_strain = jnp.zeros(len(strains), system.positions.dtype)
    change = condition.load(system).strain(no_strain, jnp.asarray(strains), system.periodic_volume)
    stretched = deformed(start, change)
    # stretched along the axes, an orthogonal cell stays one, which ``deformed`` does not know
    box = FixedBox(stretched.box, system.boundary.orthogonal)
    return stretched.replace(boundary=box).reallocate()


def condition_of(eq: Equilibrium, load: CellLoad | None) -> CellCondition:
    """Return the condition under which a system was relaxed, with another load of the same kind.

    Args:
      eq: the relaxed system.
      load: the load on its cell; None in a fixed cell.
    """
    if load is None:
        return FixedCell()
    strains = np.asarray(eq.strains)
    free = np.any(strains != 0, axis=0)
    match load:
        case PressureLoad():
            # one strain of several axes stretches all of them equally
            if len(strains) == 1 and np.sum(free) > 1:
                return AtPressure(float(load.pressure))
            return AtPressure(float(load.pressure), shape=True, free=free)
        case StressLoad():
            return AtStress(np.asarray(load.stress), free)
        case VolumeLoad():
            deviator = np.asarray(load.deviator)
            # the trace of a change of the deviator has no effect
            d = len(deviator)
            deviator = deviator - np.trace(deviator) / d * np.eye(d)
            return AtVolume(deviator, float(load.volume), free)


def cell_condition(
    cell: CellCondition | None, pressure: float | None, shape: bool
) -> CellCondition:
    """Return the condition on the cell that the arguments of ``minimize`` describe.

    Arguments that contradict each other raise an InputError.
    """
    if cell is not None:
        if pressure is not None or shape:
            raise InputError(
                "`cell` is given together with `pressure` or `shape`, which are a short form of"
                " `cell`: give `cell` alone, such as cell=AtPressure(P, shape=True), or give"
                " `pressure` and `shape` alone."
            )
        if not isinstance(cell, CellCondition):
            raise InputError(
                f"`cell` is {short(cell)}: give FixedCell(), AtPressure(P), AtStress(stress) or"
                " AtVolume() of ms.relaxation."
            )
        return cell
    if pressure is not None:
        return AtPressure(pressure, shape)
    if shape:
        raise InputError(
            "shape=True needs `pressure`: give the pressure at which the cell is to relax."
        )
    return FixedCell()
