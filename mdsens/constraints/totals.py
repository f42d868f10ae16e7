"""Constraints on the potential's parameters, which relax with the positions: fixed totals, weights on a
simplex.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.validation import short
from mdsens.constraints.base import Constraint, Displacement, check_name

__all__ = ["FixedTotal", "Simplex"]

Params = Mapping[str, Any]
UNIT_BALL = {2: np.pi / 4.0, 3: np.pi / 6.0}  # area or volume of a sphere of diameter 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FixedTotal(Constraint):
    """A parameter of particles that relaxes with the positions while its total stays: sum_i c p_i^e
    = T.

    For diameters and the exponent d it is the particles' area or volume, c = pi/4 or pi/6; for any
    other exponent c is 1. The sum is over the parameter's values: where there is one a species,
    each counts once, however many particles have it. T is the parameter ``<name>_total``. The
    multiplier is a scalar, -dU/dT, in energy an area or volume: negative where more of it costs.

    Attributes:
      parameter: of the potential, one value a particle or species; an unknown from here on.
      exponent: e.
      name: of its multiplier and parameter.
    """

    parameter: str = dataclasses.field(metadata={"static": True})
    exponent: float = dataclasses.field(default=1.0, metadata={"static": True})
    name: str = dataclasses.field(default="total", metadata={"static": True})

    def __post_init__(self) -> None:
        check_name("FixedTotal", self.name)
        if not isinstance(self.parameter, str):
            raise InputError(
                f"FixedTotal: parameter is {short(self.parameter)}: give its name, such as 'sigma'."
            )
        if not (isinstance(self.exponent, int | float) and self.exponent > 0):
            raise InputError(
                f"FixedTotal: exponent is {short(self.exponent)}: give a positive number."
            )

    @property
    def total(self) -> str:
        """The name of its parameter."""
        return f"{self.name}_total"

    @property
    def parameters(self) -> tuple[str, ...]:
        return (self.total,)

    @property
    def relaxes(self) -> tuple[str, ...]:
        return (self.parameter,)

    def check(self, params: Params, n: int, d: int) -> None:
        if np.ndim(params[self.parameter]) == 0:
            raise InputError(
                f"{self.name}: {self.parameter} is a scalar, which its total fixes: give one a"
                " particle."
            )
        if np.shape(params[self.total]) != ():
            raise InputError(
                f"parameter {self.total} has shape {np.shape(params[self.total])}: give a number."
            )
        if self.exponent % 2 != 1 and not float(params[self.total]) > 0:
            raise InputError(
                f"parameter {self.total} is {float(params[self.total]):g}: give a positive number."
            )

    def total_of(self, values: Any, d: int) -> jax.Array:
        """The total of some values of the parameter in d dimensions."""
        unit = UNIT_BALL[d] if self.parameter == "sigma" and self.exponent == d else 1.0
        return unit * jnp.sum(jnp.asarray(values) ** self.exponent)

    def residuals(
        self, positions: jax.Array, params: Params, displacement: Displacement
    ) -> jax.Array:
        return self.total_of(params[self.parameter], positions.shape[1]) - params[self.total]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Simplex(Constraint):
    """Weights of species that relax with the positions: not negative, and a sum of 1 over the last
    axis of each row.

    The multiplier is one for each row: minus what the energy would change by for a larger sum, a
      chemical potential.

    Attributes:
      parameter: of the potential, (S,) or (rows, S); an unknown from here on.
      name: of its multiplier.
    """

    parameter: str = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(default="simplex", metadata={"static": True})

    def __post_init__(self) -> None:
        check_name("Simplex", self.name)
        if not isinstance(self.parameter, str):
            raise InputError(
                f"Simplex: parameter is {short(self.parameter)}: give its name, such as 'weights'."
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
        if (value < 0).any() or np.abs(value.sum(axis=-1) - 1.0).max() > 1e-6:
            raise InputError(
                f"parameter {self.parameter} is off the simplex: give weights from 0 whose sum"
                " is 1."
            )

    def residuals(
        self, positions: jax.Array, params: Params, displacement: Displacement
    ) -> jax.Array:
        return jnp.sum(params[self.parameter], axis=-1) - 1.0
