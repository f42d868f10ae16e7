"""This module defines the unknowns of a minimum: positions, and all that relaxes with them."""

from __future__ import annotations

import dataclasses

import jax

from mdsens._util.attributes import Named
from mdsens._util.portable import Portable

__all__ = ["Unknowns"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unknowns(Portable, Named):
    """The unknowns of a minimum; also a change of these unknowns, or the forces on them.

    The unknowns make the energy, or with constraints the Lagrangian, stationary.

    Attributes:
      positions: (n, d) positions of the n particles in d dimensions.
      strain: strain of the cell where the cell is relaxed too, else None. It is given by its
        components (k,) along the strains that the cell can take; for a free shape a Mandel vector,
        k = d (d + 1) / 2.
      params: parameters that constraints relax with the positions, by name; None if there are none.
      multipliers: Lagrange multipliers by the name of the constraint; None without constraints that
        have equations.
    """

    positions: jax.Array
    strain: jax.Array | None = None
    params: dict[str, jax.Array] | None = None
    multipliers: dict[str, jax.Array] | None = None
