"""Constraints on parameters that relax with the positions: fixed totals, weights on a simplex."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mdsens._util.errors import InputError
from mdsens._util.lattice import BALL_OF_UNIT_DIAMETER
from mdsens._util.validation import is_number, short
from mdsens.constraints.base import Constraint, Displacement, check_name

__all__ = ["FixedTotal", "Simplex"]

Params = Mapping[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FixedTotal(Constraint):
    """Constraint that relaxes a parameter of the particles with the positions, at a fixed total.

        sum_i c p_i^e = T

    p_i are the values of the relaxed parameter, and the total T is the parameter ``<name>_total``.
    If p_i are the diameters and e is the dimension d, then T is the area or volume of the
    particles, with c = pi/4 in 2-D and pi/6 in 3-D; otherwise c is 1. If there is one value per
    species, each value counts once in the sum, however many particles have it. The Lagrange
    multiplier is the scalar -dU/dT, with U the relaxed energy: negative if a larger total costs
    energy. For diameters its unit is energy per area or volume.

    Attributes:
      parameter: name of the parameter of the potential that is relaxed, with one value per particle
        or species.
      exponent: the exponent e.
      name: name under which the multiplier is stored, and beginning of the total's name.
    """

    parameter: str = dataclasses.field(metadata={"static": True})
    exponent: float = dataclasses.field(default=1.0, metadata={"static": True})
    name: str = dataclasses.field(default="total", metadata={"static": True})

    def __post_init__(self) -> None:
        check_name("FixedTotal", self.name)
        if not isinstance(self.parameter, str):
            raise InputError(
                f"FixedTotal: `parameter` is {short(self.parameter)}: give the name of a parameter,"
                " such as 'sigma'."
            )
        if not (is_number(self.exponent) and self.exponent > 0):
            raise InputError(
                f"FixedTotal: `exponent` is {short(self.exponent)}: give a positive number."
            )

    @property
    def total(self) -> str:
        """Name of the parameter that gives the fixed total."""
        return f"{self.name}_total"

    @property
    def parameters(self) -> tuple[str, ...]:
        return (self.total,)

    @property
    def relaxes(self) -> tuple[str, ...]:
        return (self.parameter,)

    def check(self, params: Params, n: int, d: int) -> None:
        # a scalar would have no freedom left
        if np.ndim(params[self.parameter]) == 0:
            raise InputError(
                f"the constraint {self.name} relaxes {self.parameter!r}, but the parameter is a"
                " scalar, which the total alone would fix: give one value per particle."
            )
        if np.shape(params[self.total]) != ():
            raise InputError(
                f"parameter {self.total} has shape {np.shape(params[self.total])}: give one number."
            )
        # only an odd power of negative values has a negative total
        if self.exponent % 2 != 1 and not float(params[self.total]) > 0:
            raise InputError(
                f"parameter {self.total} is {float(params[self.total]):g}: give a positive number."
            )

    def total_of(self, values: ArrayLike, d: int) -> jax.Array:
        """Compute the total of given parameter values p_i, sum_i c p_i^e, in d dimensions.

        c is pi/4 or pi/6 for the area or volume of particles with diameters p_i, if e = d;
        otherwise c is 1.
        """
        # only for diameters to the power d is the total a volume
        unit = BALL_OF_UNIT_DIAMETER[d] if self.parameter == "sigma" and self.exponent == d else 1.0
        return unit * jnp.sum(jnp.asarray(values) ** self.exponent)

    def residuals(
        self, positions: jax.Array, params: Params, displacement: Displacement
    ) -> jax.Array:
        # The total is subtracted, so that the multiplier is -dU/dT.
        return self.total_of(params[self.parameter], positions.shape[1]) - params[self.total]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Simplex(Constraint):
    """Constraint that relaxes weights of species together with the positions.

    The weights are not negative, and each row of weights has the sum 1. The Lagrange multiplier has
    one value per row, a chemical potential: minus the derivative of the relaxed energy by the row's
    sum.

    Attributes:
      parameter: name of the parameter of the potential that is relaxed, the weights of S species,
        (S,) for a single row or (rows, S).
      name: name under which the multiplier is stored.
    """

    parameter: str = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(default="simplex", metadata={"static": True})

    def __post_init__(self) -> None:
        check_name("Simplex", self.name)
        if not isinstance(self.parameter, str):
            raise InputError(
                f"Simplex: `parameter` is {short(self.parameter)}: give the name of a parameter,"
                " such as 'weights'."
            )

    @property
    def relaxes(self) -> tuple[str, ...]:
        return (self.parameter,)

    def least(self) -> float:
        return 0.0

    def check(self, params: Params, n: int, d: int) -> None:
        value = np.asarray(params[self.parameter])
        if value.ndim not in (1, 2) or value.shape[-1] < 2:
            raise InputError(
                f"parameter {self.parameter} has shape {value.shape}: give (S,) or (rows, S)"
                " weights."
            )
        # the sum of a row may be off by up to 1e-6
        if (value < 0).any() or np.abs(value.sum(axis=-1) - 1.0).max() > 1e-6:
            raise InputError(
                f"the weights {self.parameter!r} are negative somewhere, or do not have the sum 1:"
                " give weights that are not negative and have the sum 1 in each row."
            )

    def residuals(
        self, positions: jax.Array, params: Params, displacement: Displacement
    ) -> jax.Array:
        return jnp.sum(params[self.parameter], axis=-1) - 1.0
