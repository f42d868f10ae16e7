"""Geometry of a periodic cell: nearest images, inverse matrix, heights; volumes of spheres."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mdsens._util.precision import full_precision

__all__ = [
    "BALL_OF_UNIT_DIAMETER",
    "Components",
    "circular_mean",
    "components",
    "heights",
    "inverse",
    "nearest_image",
    "nearest_images",
]

# Area of a disc of diameter 1 in two dimensions, volume of a sphere of diameter 1 in three.
BALL_OF_UNIT_DIAMETER = {2: np.pi / 4.0, 3: np.pi / 6.0}

# Vectors as d arrays, one for each Cartesian component.
Components: TypeAlias = tuple[Any, ...]


def components(vectors: jax.Array) -> Components:
    """Split an array of vectors (…, d) into d arrays (…), one for each component.

    Arithmetic is faster on these arrays than on the array of vectors.
    """
    return tuple(vectors[..., a] for a in range(vectors.shape[-1]))


def nearest_images(
    box: jax.Array | None, orthogonal: bool = False
) -> Callable[[Components], Components]:
    """Return a function that maps each vector to its periodic image nearest to zero.

    The function rounds the fractional components of a vector to an integer shift and subtracts
    box @ shift. The image is the nearest one where it is shorter than half the smallest height of
    the cell. The integer shift has no derivative, so that a change d(box) of the box changes the
    image by -d(box) @ shift. jax-md's ``periodic_general`` in Cartesian coordinates gets this
    derivative wrong: in its rule for the derivative of box @ R, with fractional coordinates R, the
    term box @ dR is replaced by dR.

    Args:
      box: (d, d), its columns are the lattice vectors; None for an infinite system.
      orthogonal: whether the box is diagonal.

    Returns:
      A function of the d components of the vectors.
    """
    if box is None:
        return lambda vectors: vectors
    if orthogonal:
        # The diagonal of the box is enough, which takes half the arithmetic.
        # the rate is only rounded, which has no derivative, so that none is carried
        sides = [(box[a, a], jax.lax.stop_gradient(1.0 / box[a, a])) for a in range(box.shape[0])]
        return lambda vectors: tuple(
            v - side * jnp.round(rate * jax.lax.stop_gradient(v))
            for v, (side, rate) in zip(vectors, sides, strict=True)
        )
    d = box.shape[0]
    rows = jax.lax.stop_gradient(inverse(box))  # once here, not at each call of ``images``

    def images(vectors: Components) -> Components:
        fixed = jax.lax.stop_gradient(vectors)
        shifts = [jnp.round(sum(rows[a, b] * fixed[b] for b in range(d))) for a in range(d)]
        return tuple(vectors[a] - sum(box[a, b] * shifts[b] for b in range(d)) for a in range(d))

    return images


def nearest_image(difference: jax.Array, box: jax.Array | None) -> jax.Array:
    """Map vectors (…, d) to their periodic images nearest to zero.

    The box is the cell matrix (d, d), columns the lattice vectors, or None for an infinite system.
    """
    if box is None:
        return difference
    return jnp.stack(nearest_images(box)(components(difference)), axis=-1)


def inverse(box: np.ndarray | jax.Array) -> Any:
    """Invert a cell matrix (d, d), d = 2 or 3, an array of numpy or jax.

    The formula is written out, because it compiles at once, unlike a general matrix inverse.
    """
    xp: Any = box.__array_namespace__()
    if box.shape[0] == 2:
        (a, b), (c, d) = box
        return xp.stack([xp.stack([d, -b]), xp.stack([-c, a])]) / (a * d - b * c)
    # Cross products of the lattice vectors, over the volume of the cell.
    faces = xp.stack([xp.linalg.cross(box[:, (k + 1) % 3], box[:, (k + 2) % 3]) for k in range(3)])
    return faces / xp.sum(faces[0] * box[:, 0])


def heights(box: np.ndarray | jax.Array) -> Any:
    """Compute the d distances between opposite faces of a cell (d, d), columns the cell vectors.

    With a numpy array, jax is not used, so that nothing is compiled.
    """
    # Row k of the inverse is normal to the faces that the other lattice vectors span, and its norm
    # is the inverse of the distance of these faces.
    rows = inverse(box)
    return 1.0 / box.__array_namespace__().sqrt((rows**2).sum(axis=1))


@full_precision
def circular_mean(vectors: jax.Array, box: jax.Array, weights: ArrayLike) -> jax.Array:
    """Compute the weighted mean (d,) of vectors (n, d) that are known up to lattice vectors.

    The d fractional components of each vector, times 2 pi, are taken as angles, which a lattice
    vector changes by full turns only. For each component, the mean angle is the direction of the
    weighted sum of (cos, sin) of the angles.

    If all particles move by nearly half the cell, the nearest images of some displacements point
    the opposite way. The mean of the nearest images is then wrong, but the mean of the angles is
    still the common displacement.

    Args:
      vectors: (n, d) the vectors.
      box: (d, d) the cell, its columns the lattice vectors.
      weights: (n,) weight of each vector; their sum need not be 1.
    """
    angles = 2.0 * np.pi * vectors @ inverse(box).T
    column = jnp.asarray(weights)[:, None]
    sine = jnp.sum(column * jnp.sin(angles), axis=0)
    cosine = jnp.sum(column * jnp.cos(angles), axis=0)
    return box @ (jnp.arctan2(sine, cosine) / (2.0 * np.pi))
