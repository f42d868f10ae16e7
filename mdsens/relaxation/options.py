"""Options of a relaxation: the condition on the cell, the method, and when to stop."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import TypeAlias

import jax.numpy as jnp

from mdsens._util.errors import InputError, PrecisionError
from mdsens._util.validation import is_number, short
from mdsens.mechanics.units import round_off
from mdsens.model.system import System
from mdsens.relaxation.cell_conditions import CellCondition
from mdsens.relaxation.methods import Minimizer, Newton

__all__ = ["Method", "Options"]

Method: TypeAlias = Newton | Minimizer


@dataclasses.dataclass(frozen=True)
class Options:
    """Validated options of one call of ``minimize``; see the docstring of ``minimize``."""

    cell: CellCondition
    tolerance: float | None
    method: Method
    max_steps: int
    leave_saddles: bool
    # True after an interruption, for what was to be relaxed next and stays as it is.
    interrupted: bool = False

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
