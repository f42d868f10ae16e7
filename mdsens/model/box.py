"""The cell of a system: a fixed matrix, a matrix that follows the parameters, or no cell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from mdsens._util.errors import InputError
from mdsens._util.lattice import BALL_OF_UNIT_DIAMETER
from mdsens._util.portable import Portable
from mdsens._util.user_functions import Traceable
from mdsens._util.validation import real_array, real_number

__all__ = [
    "BoxFunction",
    "FixedBox",
    "OpenBox",
    "PackingFraction",
    "box_rule",
    "described",
]

Params = Mapping[str, Any]
Diameters: TypeAlias = jax.Array | np.ndarray | None


# Every box rule has `orthogonal`, True where its matrix is known to be diagonal, and `follows`, the
# text that the table of a system shows after the cell: what the cell depends on, "" for nothing.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OpenBox:
    """Open boundaries: no periodic cell."""

    orthogonal = False
    follows = ""

    def matrix(self, params: Params, diameters: Diameters, dimension: int) -> None:
        """Return None, since open boundaries have no cell matrix."""
        return None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FixedBox(Portable):
    """A periodic cell that does not depend on the parameters of the system.

    Attributes:
      cell: the matrix (d, d) whose columns are the cell vectors.
      orthogonal: whether the matrix is known to be diagonal.
    """

    cell: Any
    orthogonal: bool = dataclasses.field(default=False, metadata={"static": True})

    follows = ""

    def matrix(self, params: Params, diameters: Diameters, dimension: int) -> jax.Array:
        """Return the cell matrix (d, d), which does not depend on the parameters."""
        return jnp.asarray(self.cell)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackingFraction(Portable):
    """The cell in which the particles have a given packing fraction.

        V(params) = sum_i v(sigma_i) / fraction,     v = pi/4 sigma^2 (2-D) or pi/6 sigma^3 (3-D)

    V is the volume (in 2-D the area) of the cell, and sigma are the diameters of the particles.
    Overlaps are counted twice, as is usual in the field. The cell follows the diameters, and
    derivatives by the diameters include this dependence.

    Attributes:
      fraction: the packing fraction phi, above 0.
      shape: a (d, d) matrix whose columns give the cell's shape; it is rescaled to the volume V.
        None for a square or cube.
    """

    fraction: float | jax.Array
    shape: ArrayLike | jax.Array | None = None

    @property
    def follows(self) -> str:
        """Words for a printed table that say what the cell depends on."""
        return f", follows the diameters at a packing fraction of {float(self.fraction):.6g}"

    @property
    def orthogonal(self) -> bool:
        """Whether the cell matrix is known to be diagonal."""
        return self.shape is None

    def matrix(self, params: Params, diameters: Diameters, dimension: int) -> jax.Array:
        """Compute the cell matrix (d, d) in which particles have the prescribed packing fraction.

        ``diameters`` (n,) are the diameters of the particles.
        """
        if diameters is None:
            raise InputError(
                "a box that follows the packing fraction needs the parameter 'sigma', which this"
                " potential lacks: give the box as a matrix."
            )
        volume = jnp.sum(BALL_OF_UNIT_DIAMETER[dimension] * diameters**dimension) / self.fraction
        # only the ratios of the shape's entries count, and abs() lets it be left-handed
        if self.shape is None:
            shape = jnp.eye(dimension, dtype=volume.dtype)
        else:
            shape = jnp.asarray(self.shape)
        return shape * (volume / jnp.abs(jnp.linalg.det(shape))) ** (1.0 / dimension)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BoxFunction(Portable):
    """A cell given by a user's function, which computes the matrix (d, d) from the parameters.

    Attributes:
      function: ``function(params)``, with a dict of the parameters.
    """

    orthogonal = False
    follows = ", a function of the parameters"
    function: Callable[[Params], jax.Array] = dataclasses.field(metadata={"static": True})

    def matrix(self, params: Params, diameters: Diameters, dimension: int) -> jax.Array:
        """Return the cell matrix (d, d) that the user's function computes from ``params``."""
        return Traceable("the box function", self.function)(params)


BoxRule: TypeAlias = OpenBox | FixedBox | PackingFraction | BoxFunction


def box_rule(
    box: ArrayLike | BoxRule | Callable[[Params], jax.Array] | None,
    dimension: int,
    dtype: np.dtype,
) -> BoxRule:
    """Convert the ``box`` that a user gives to a box rule, and check the values.

    A box rule is an object that computes the cell matrix from the parameters and the diameters.

    Args:
      box: None for open boundaries, a length, d lengths, a (d, d) matrix, a box rule, or a function
        of the parameters that returns a matrix.
      dimension: 2 or 3.
      dtype: floating-point type of the cell's entries.
    """
    if box is None:
        return OpenBox()
    if isinstance(box, PackingFraction):
        value = real_number("packing fraction", box.fraction, "give a positive number.")
        if not 0 < value < np.inf:
            raise InputError(f"the packing fraction is {value}: give a positive number.")
        shape = None if box.shape is None else jnp.asarray(_cell(box.shape, dimension), dtype)
        return PackingFraction(jnp.asarray(value, dtype), shape)
    if isinstance(box, OpenBox | FixedBox | BoxFunction):
        return box
    if callable(box):
        return BoxFunction(cast(Callable[[Params], jax.Array], box))
    cell = _cell(box, dimension)
    return FixedBox(jnp.asarray(cell, dtype), not np.any(cell[~np.eye(dimension, dtype=bool)]))


def _cell(box: ArrayLike, dimension: int) -> np.ndarray:
    """Make the cell matrix (d, d) from a length, d lengths, or a matrix, and check the matrix."""
    need = f"give a length, {dimension} lengths, or a ({dimension}, {dimension}) matrix."
    cell = np.asarray(real_array("box", box, need), float)
    # a matrix may have negative entries; zeros are refused below, by the volume
    if cell.ndim < 2 and (cell < 0).any():
        raise InputError(f"`box` is {np.asarray(box).tolist()}: give positive lengths.")
    if cell.ndim == 0:
        cell = cell * np.eye(dimension)
    elif cell.shape == (dimension,):
        cell = np.diag(cell)
    if cell.shape != (dimension, dimension):
        raise InputError(
            f"`box` has shape {cell.shape} in {dimension} dimensions: give a length, {dimension}"
            f" lengths, or a ({dimension}, {dimension}) matrix whose columns are the cell vectors."
        )
    # The largest entry is divided out, so that no power of a length over- or underflows. Below a
    # relative determinant of 1e-12 the cell vectors count as linearly dependent.
    size = np.max(np.abs(cell), initial=0.0)
    if (
        not 0 < size < np.inf
        or not abs(np.linalg.det(cell / size)) > 1e-12 * np.linalg.norm(cell / size) ** dimension
    ):
        raise InputError(
            f"`box` {cell.tolist()} has no volume: give independent, finite cell vectors as"
            " columns."
        )
    return cell


def described(cell: jax.Array | np.ndarray | None) -> str:
    """Describe a cell in words: the lengths of the cell vectors, and their angles if oblique."""
    if cell is None:
        return "open boundaries"
    matrix = np.asarray(cell)
    lengths = np.linalg.norm(matrix, axis=0)
    text = "periodic, " + " x ".join(f"{v:.6g}" for v in lengths)
    cosines = (matrix / lengths).T @ (matrix / lengths)
    # alpha, beta, gamma of crystallography: each between the two vectors that do not name it
    pairs = [(1, 2), (0, 2), (0, 1)] if lengths.size == 3 else [(0, 1)]
    if max(abs(cosines[p]) for p in pairs) > 1e-12:  # not just round-off of right angles
        angles = ", ".join(f"{np.degrees(np.arccos(cosines[p])):.4g}" for p in pairs)
        text += f", angles {angles} degrees"
    return text
