"""The cell of a system: a fixed matrix, a matrix that follows the parameters, or no cell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from mdsens._util.compilation import as_jax
from mdsens._util.errors import InputError
from mdsens._util.lattice import BALL_OF_UNIT_DIAMETER
from mdsens._util.portable import Portable
from mdsens._util.user_functions import Traceable
from mdsens._util.validation import real_array, real_number, short

__all__ = [
    "BoxFunction",
    "FixedBox",
    "OpenBox",
    "PackingFraction",
    "box_rule",
    "described",
    "periodic_axes",
    "with_normals",
]

Params = Mapping[str, Any]
# host code (numpy) and traced code (jax) share the functions that take these
A = TypeVar("A", jax.Array, np.ndarray)
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
      periodic: for each cell vector whether the system is periodic along it; a column of the matrix
        along which it is not is replaced by a unit vector normal to the others.
    """

    orthogonal = False
    follows = ", a function of the parameters"
    function: Callable[[Params], jax.Array] = dataclasses.field(metadata={"static": True})
    periodic: tuple[bool, ...] = dataclasses.field(default=(), metadata={"static": True})

    def matrix(self, params: Params, diameters: Diameters, dimension: int) -> jax.Array:
        """Return the cell matrix (d, d) that the user's function computes from ``params``."""
        cell = Traceable("the box function", self.function)(params)
        return cell if all(self.periodic) else with_normals(jnp.asarray(cell), self.periodic)


BoxRule: TypeAlias = OpenBox | FixedBox | PackingFraction | BoxFunction


def periodic_axes(periodic: object, box: object, dimension: int) -> tuple[bool, ...]:
    """Check the directions in which a system is periodic, and return one value per cell vector.

    Args:
      periodic: a user's True or False for all cell vectors, or a sequence of one for each.
      box: the user's box; None for open boundaries, which are periodic along no axis.
      dimension: 2 or 3.
    """
    array = np.asarray(periodic)
    if array.dtype != bool or array.shape not in ((), (dimension,)):
        example = ", ".join(["True"] * (dimension - 1) + ["False"])
        raise InputError(
            f"`periodic` is {short(periodic)}: give True, False or one of them for each of the"
            f" {dimension} cell vectors, such as ({example})."
        )
    along = tuple(bool(p) for p in np.broadcast_to(array, dimension))
    return (False,) * dimension if box is None or isinstance(box, OpenBox) else along


def with_normals(cell: A, periodic: tuple[bool, ...]) -> A:
    """Return a cell (d, d) whose open sides are unit vectors normal to all other cell vectors.

    Args:
      cell: the cell; its columns along which the system is not periodic are not used.
      periodic: for each cell vector whether the system is periodic along it; at least one is.
    """
    xp: Any = cell.__array_namespace__()
    columns = [cell[:, a] for a in range(len(periodic))]
    open_axes = [a for a, along in enumerate(periodic) if not along]
    for a in open_axes:
        # the vectors that this one is normal to: those of the periodic axes, then those made here
        others = [b for b in range(len(periodic)) if b not in open_axes or b < a]
        columns[a] = _normal([columns[b] for b in others], a)
    return xp.stack(columns, axis=1)


def _normal(vectors: list[Any], axis: int) -> Any:
    """Return a unit vector normal to one vector in 2-D, or to one or two vectors in 3-D.

    To a single vector in 3-D many are normal: the one that is taken depends on the number of the
    cell vector, ``axis``, which is replaced.
    """
    xp: Any = vectors[0].__array_namespace__()
    if vectors[0].shape == (2,):
        x, y = vectors[0]
        normal = xp.stack([-y, x]) if axis == 1 else xp.stack([y, -x])
    elif len(vectors) == 2:
        normal = xp.linalg.cross(vectors[0], vectors[1])
        # normals of a right-handed cell: a x b along c, b x c along a, but a x c against b
        normal = -normal if axis == 1 else normal
    else:
        # a coordinate axis, the one that is farthest from the vector, made normal to it
        direction = vectors[0] / xp.sqrt(xp.sum(vectors[0] ** 2))
        nearest = xp.argmin(xp.abs(direction))
        start = xp.where(xp.arange(3) == nearest, 1.0, 0.0).astype(direction.dtype)
        normal = start - xp.sum(start * direction) * direction
    return normal / xp.sqrt(xp.sum(normal**2))


def box_rule(
    box: ArrayLike | BoxRule | Callable[[Params], jax.Array] | None,
    dimension: int,
    dtype: np.dtype,
    periodic: tuple[bool, ...] = (),
) -> BoxRule:
    """Convert the ``box`` that a user gives to a box rule, and check the values.

    A box rule is an object that computes the cell matrix from the parameters and the diameters.

    Args:
      box: None for open boundaries, a length, d lengths, a (d, d) matrix, a box rule, or a function
        of the parameters that returns a matrix.
      dimension: 2 or 3.
      dtype: floating-point type of the cell's entries.
      periodic: for each cell vector whether the system is periodic along it; empty where it is
        periodic along all of them.
    """
    if box is None or (periodic and not any(periodic)):
        return OpenBox()
    if isinstance(box, PackingFraction):
        if not all(periodic):
            raise InputError(
                f"`periodic` is {periodic}, and the box follows a packing fraction, which needs a"
                " volume: give periodic=True, or the box as a matrix."
            )
        value = real_number("packing fraction", box.fraction, "give a positive number.")
        if not 0 < value < np.inf:
            raise InputError(f"the packing fraction is {value}: give a positive number.")
        shape = None if box.shape is None else jnp.asarray(_cell(box.shape, dimension), dtype)
        return PackingFraction(as_jax(value, dtype), shape)
    if isinstance(box, OpenBox | FixedBox | BoxFunction):
        return box
    if callable(box):
        return BoxFunction(cast(Callable[[Params], jax.Array], box), periodic)
    cell = _cell(box, dimension, periodic)
    return FixedBox(jnp.asarray(cell, dtype), not np.any(cell[~np.eye(dimension, dtype=bool)]))


def _cell(box: ArrayLike, dimension: int, periodic: tuple[bool, ...] = ()) -> np.ndarray:
    """Make the cell matrix (d, d) from a length, d lengths, or a matrix, and check the matrix.

    Columns along which the system is not periodic are replaced by normals of the others.
    """
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
    if not np.isfinite(cell).all():
        raise InputError(
            f"`box` {cell.tolist()} is not finite: give finite cell vectors as columns."
        )
    if not all(periodic):
        cell = _completed(cell, periodic)
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


def _completed(cell: np.ndarray, periodic: tuple[bool, ...]) -> np.ndarray:
    """Return a cell (d, d) whose open sides are unit normals, at the scale of the periodic sides.

    Raises:
      InputError: a side along which the system is periodic has no length, or two are parallel.
    """
    sides = cell[:, np.asarray(periodic)]
    sizes = np.linalg.norm(sides, axis=0)
    # sides of length one: below a volume of 1e-12 they count as linearly dependent
    unit = sides / np.where(sizes > 0, sizes, 1.0)
    if not np.isfinite(sizes).all() or not np.linalg.det(unit.T @ unit) > 1e-24:
        raise InputError(
            f"`box` {cell.tolist()} has no extent along its periodic axes, periodic = {periodic}:"
            " give independent, finite cell vectors as the columns of these axes."
        )
    return with_normals(cell, periodic)


def described(cell: jax.Array | np.ndarray | None, periodic: tuple[bool, ...] = ()) -> str:
    """Describe a cell in words: the lengths of the cell vectors, and their angles if oblique.

    ``periodic`` tells for each cell vector whether the system is periodic along it; it is empty
    where the system is periodic along all of them.
    """
    if cell is None:
        return "open boundaries"
    if not all(periodic):
        return _described_in_part(np.asarray(cell), periodic)
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


def _described_in_part(cell: np.ndarray, periodic: tuple[bool, ...]) -> str:
    """Describe a cell (d, d) that is periodic along some of its vectors only, in words."""
    along = [a for a, p in enumerate(periodic) if p]
    sides = cell[:, along]
    lengths = np.linalg.norm(sides, axis=0)
    names = " and ".join(f"vector {a + 1}" for a in along)
    text = f"periodic along {names} ({' x '.join(f'{v:.6g}' for v in lengths)}"
    if len(along) == 2:
        cosine = float(sides[:, 0] @ sides[:, 1] / (lengths[0] * lengths[1]))
        if abs(cosine) > 1e-12:  # not just round-off of a right angle
            text += f" at {np.degrees(np.arccos(cosine)):.4g} degrees"
    return f"{text}), open otherwise"
