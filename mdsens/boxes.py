"""Periodic cells: a fixed matrix, a rule that follows the parameters, or none; and nearest images in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._checks import real_array, real_number
from mdsens.implicit.status import InputError

__all__ = ["BoxFunction", "FixedBox", "OpenBox", "PackingFraction", "box_rule", "heights", "nearest_image"]

Params = Mapping[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OpenBox:
    """No cell: open boundaries."""

    def matrix(self, params: Params, diameters: Any, dimension: int) -> None:
        return None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FixedBox:
    """A cell matrix (d, d) whose columns are the cell vectors; it does not depend on the parameters."""

    cell: Any

    def matrix(self, params: Params, diameters: Any, dimension: int) -> jax.Array:
        return jnp.asarray(self.cell)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackingFraction:
    """The cell of a packing fraction: V(params) = sum_i v(sigma_i) / fraction, v = pi/4 sigma^2 or pi/6 sigma^3.

    Overlaps are counted twice, as the field does. The cell follows the diameters, and that dependence is
    differentiated.

    Attributes:
      fraction: the packing fraction phi, above 0.
      shape: a (d, d) matrix whose columns give the cell's shape; its size is rescaled. None for a square or cube.
    """

    fraction: Any
    shape: Any = None

    def matrix(self, params: Params, diameters: Any, dimension: int) -> jax.Array:
        if diameters is None:
            raise InputError(
                "a box that follows the packing fraction needs the parameter 'sigma': give a box matrix instead."
            )
        unit = {2: np.pi / 4, 3: np.pi / 6}[dimension]
        volume = jnp.sum(unit * diameters**dimension) / self.fraction
        shape = jnp.eye(dimension, dtype=volume.dtype) if self.shape is None else jnp.asarray(self.shape)
        return shape * (volume / jnp.abs(jnp.linalg.det(shape))) ** (1.0 / dimension)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BoxFunction:
    """A cell given by a function of the parameters, ``function(params) -> (d, d)``."""

    function: Callable[[Params], jax.Array] = dataclasses.field(metadata={"static": True})

    def matrix(self, params: Params, diameters: Any, dimension: int) -> jax.Array:
        return self.function(params)


def box_rule(box: Any, dimension: int, dtype: Any) -> Any:
    """The rule behind what a user gives as a box: None, a length, d lengths, a matrix, a rule, or a function."""
    if box is None:
        return OpenBox()
    if isinstance(box, PackingFraction):
        value = real_number("packing fraction", box.fraction, "give a positive number.")
        if not 0 < value < np.inf:
            raise InputError(f"packing fraction is {value}: give a positive number.")
        shape = None if box.shape is None else jnp.asarray(_cell(box.shape, dimension), dtype)
        return PackingFraction(jnp.asarray(value, dtype), shape)
    if isinstance(box, OpenBox | FixedBox | BoxFunction):
        return box
    if callable(box):
        return BoxFunction(cast(Callable[[Params], jax.Array], box))
    return FixedBox(jnp.asarray(_cell(box, dimension), dtype))


def _cell(box: Any, dimension: int) -> np.ndarray:
    need = f"give a length, {dimension} lengths, or a ({dimension}, {dimension}) matrix."
    cell = np.asarray(real_array("box", box, need), float)
    if cell.ndim < 2 and (cell < 0).any():
        raise InputError(f"box is {np.asarray(box).tolist()}: give positive lengths.")
    if cell.ndim == 0:
        cell = cell * np.eye(dimension)
    elif cell.shape == (dimension,):
        cell = np.diag(cell)
    if cell.shape != (dimension, dimension):
        raise InputError(
            f"box has shape {cell.shape} in {dimension} dimensions: give a length, {dimension} lengths, or a "
            f"({dimension}, {dimension}) matrix whose columns are the cell vectors."
        )
    size = np.max(np.abs(cell), initial=0.0)  # taken out, so that no power of a length over- or underflows
    if not 0 < size < np.inf or not abs(np.linalg.det(cell / size)) > 1e-12 * np.linalg.norm(cell / size) ** dimension:
        raise InputError(f"box {cell.tolist()} has no volume: give independent, finite cell vectors as columns.")
    return cell


def nearest_image(difference: jax.Array, box: jax.Array | None) -> jax.Array:
    """The image of ``difference`` (…, d) nearest to zero in the lattice of ``box``, by rounding fractional components.

    Exact for results shorter than half the smallest height of the cell. The integer shift carries no derivative, so the
    derivative by the box is -d(box) @ shift: jax-md's ``periodic_general`` in Cartesian coordinates gets this one wrong
    (its custom transform drops the box from the tangent of the inverse).
    """
    if box is None:
        return difference
    shift = jax.lax.stop_gradient(jnp.round(difference @ jnp.linalg.inv(box).T))
    return difference - shift @ box.T


def heights(box: jax.Array) -> jax.Array:
    """The distances between opposite faces of the cell, (d,)."""
    return 1.0 / jnp.linalg.norm(jnp.linalg.inv(box), axis=1)
