"""Options of a relaxation: the condition on the cell, the method, and when to stop."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np

from mdsens._util.errors import InputError, PrecisionError
from mdsens._util.validation import is_number, real_number, short
from mdsens.mechanics.units import round_off
from mdsens.model.system import System, require_unconstrained
from mdsens.relaxation.methods import Minimizer, Newton

__all__ = ["AtPressure", "CellCondition", "FixedCell", "Method", "Options"]

Method: TypeAlias = Newton | Minimizer


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
    """

    pressure: float
    shape: bool = False

    def __post_init__(self) -> None:
        remedy = "give one number, in energy per volume, or None for a fixed cell."
        number = real_number("pressure", self.pressure, remedy)
        if not np.isfinite(number):
            raise InputError(f"`pressure` is {self.pressure}: give a finite number.")
        if not isinstance(self.shape, bool):
            raise InputError(f"`shape` is {short(self.shape)}: give True or False.")
        object.__setattr__(self, "pressure", float(number))

    def check(self, system: System) -> None:
        """Raise InputError if a system cannot be relaxed at a pressure.

        Open boundaries, constraints, and a potential with a parameter named ``pressure`` are
        refused.
        """
        if system.box is None:
            raise InputError(
                "`pressure` needs a cell, and this system has open boundaries: give it a box."
            )
        if "pressure" in system.params:
            raise InputError(
                "the potential has a parameter 'pressure', which is also the name of the cell's"
                " pressure: give the parameter another name."
            )
        require_unconstrained(system, "a cell at a pressure")


CellCondition: TypeAlias = FixedCell | AtPressure


def cell_condition(
    cell: CellCondition | None, pressure: float | None, shape: bool
) -> CellCondition:
    """Return the condition on the cell that the arguments of ``minimize`` describe.

    The result is a FixedCell or an AtPressure. Arguments that contradict each other raise an
    InputError.
    """
    if cell is not None:
        if pressure is not None or shape:
            raise InputError(
                "`cell` is given together with `pressure` or `shape`, which are a short form of"
                " `cell`: give `cell` alone, such as cell=AtPressure(P, shape=True), or give"
                " `pressure` and `shape` alone."
            )
        if not isinstance(cell, FixedCell | AtPressure):
            raise InputError(
                f"`cell` is {short(cell)}: give FixedCell() or AtPressure(P) of ms.relaxation."
            )
        return cell
    if pressure is not None:
        return AtPressure(pressure, shape)
    if shape:
        raise InputError(
            "shape=True needs `pressure`: give the pressure at which the cell is to relax."
        )
    return FixedCell()


@dataclasses.dataclass(frozen=True)
class Options:
    """Validated options of one call of ``minimize``; see the docstring of ``minimize``."""

    cell: CellCondition
    tolerance: float | None
    method: Method
    max_steps: int
    leave_saddles: bool

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise InputError(
                f"`method` is {short(self.method)}: give Newton(), Fire(), GradientDescent() or"
                " JaxMD(…) of ms.relaxation."
            )
        # Up to the largest float: infinity is refused, and so is NaN, which compares as False.
        if self.tolerance is not None and not (
            is_number(self.tolerance) and 0 < self.tolerance <= sys.float_info.max
        ):
            raise InputError(
                f"`tolerance` is {short(self.tolerance)}: give a positive number, or None."
            )
        if not (is_number(self.max_steps) and 1 <= self.max_steps < math.inf):
            raise InputError(
                f"`max_steps` is {short(self.max_steps)}: give a finite number from 1."
            )
        if not isinstance(self.leave_saddles, bool):
            raise InputError(f"`leave_saddles` is {short(self.leave_saddles)}: give True or False.")
        # max_steps may be a float such as 1e5
        object.__setattr__(self, "max_steps", int(self.max_steps))

    @property
    def newton(self) -> Newton | None:
        """Return the options of the Newton steps; None for a method without Newton steps."""
        return self.method if isinstance(self.method, Newton) else None

    @property
    def first(self) -> Minimizer:
        """Return the first-order minimizer, such as FIRE; it runs alone or before Newton steps."""
        return self.method.first if isinstance(self.method, Newton) else self.method

    def check(self, system: System) -> None:
        """Raise an error if a system cannot be relaxed with the options that the user chose.

        The error is a PrecisionError for a tolerance below round-off, and otherwise an InputError.
        """
        self.cell.check(system)
        if system.constraints and self.newton is None:
            raise InputError(
                f"`method` is {short(self.method)}, which cannot relax a system under constraints:"
                " leave `method` out, or give method=Newton(), which then uses an augmented"
                " Lagrangian and Newton steps."
            )
        if self.tolerance is None:
            return
        floor = round_off(system)
        # ``round_off`` is an upper bound: most systems reach forces of a tenth of it. 0.05 leaves
        # another factor of 2.
        if self.tolerance < 0.05 * floor:
            remedy = f"raise `tolerance` to {floor:.0e} or more"
            if system.positions.dtype != jnp.float64:
                remedy += (
                    ", or work in double precision (in Python, ms.enable_x64() before making the"
                    " system)"
                )
            raise PrecisionError(
                f"tolerance={self.tolerance:.0e} is out of reach in {system.positions.dtype}, where"
                f" round-off of the positions leaves forces of about {floor:.0e}: {remedy}."
            )
