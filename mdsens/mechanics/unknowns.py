"""What a condition is solved for."""

from __future__ import annotations

import dataclasses

import jax

from mdsens._util.attributes import Named
from mdsens._util.portable import Portable

__all__ = ["Unknowns"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unknowns(Portable, Named):
    """What the stationarity condition is solved for, or a change of it, or a force on it.

    Attributes:
      positions: (n, d).
      strain: Mandel vector of d (d + 1) / 2 where the cell is relaxed too, else None.
      multipliers: of constraints, by the constraint's name, else None.
      params: parameters that constraints relax with the positions, by name, else None.
    """

    positions: jax.Array
    strain: jax.Array | None = None
    multipliers: dict[str, jax.Array] | None = None
    params: dict[str, jax.Array] | None = None
