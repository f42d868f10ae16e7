"""This module defines the unknowns of a minimum: positions, and all that relaxes with them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from mdsens._util.attributes import Named
from mdsens._util.portable import Portable

__all__ = ["Unknowns", "flat", "scaled", "unflat"]


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


def flat(x: Unknowns, many: bool = False) -> np.ndarray:
    """Flatten positions, relaxed parameters and multipliers to one vector of all m numbers, (m,).

    Args:
      x: the positions, relaxed parameters and multipliers.
      many: whether all arrays have a leading axis of length c; then the result is a matrix (m, c).
    """
    # The order is that of jax: the fields as they are defined, a dict by its sorted keys; None has
    # no leaves.
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(x)]
    if not many:
        return np.concatenate([leaf.ravel() for leaf in leaves])
    return np.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1).T


def unflat(vector: np.ndarray, like: Unknowns, many: bool = False) -> Unknowns:
    """Restore positions, relaxed parameters and multipliers from a vector (m,) of all m numbers.

    This is the inverse of ``flat``.

    Args:
      vector: (m,); or a matrix (m, c), whose c columns give arrays with a leading axis of length c.
      like: unknowns whose arrays have the shapes and types of the result, without the leading axis.
      many: whether ``vector`` is a matrix.
    """
    rows = vector.T if many else vector
    leading_shape = rows.shape[:-1]
    leaves, structure = jax.tree.flatten(like)
    parts: list[Any] = []
    start = 0
    for leaf in leaves:
        size = int(np.size(leaf))
        part = rows[..., start : start + size].reshape((*leading_shape, *np.shape(leaf)))
        parts.append(part.astype(leaf.dtype))
        start += size
    return jax.tree.unflatten(structure, parts)


def scaled(x: Unknowns, by: ArrayLike) -> Unknowns:
    """Multiply the Lagrange multipliers in ``x`` by a factor; positions and parameters stay.

    With multipliers in units of the stiffness of the potential (see ``natural_units``), all rows of
    the linear system at a constrained minimum have the same scale.

    Args:
      x: positions, relaxed parameters and multipliers.
      by: the factor.
    """
    return dataclasses.replace(
        x, multipliers=jax.tree.map(lambda leaf: (by * leaf).astype(leaf.dtype), x.multipliers)
    )
