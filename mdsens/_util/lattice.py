"""Geometry of a periodic cell: nearest images, inverse matrix, heights; volumes of spheres."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mdsens._util.precision import full_precision

__all__ = [
    "BALL_OF_UNIT_DIAMETER",
    "Components",
    "Images",
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


class Images(Protocol):
    """A function that maps each vector to one of its periodic images, ``images(vectors, shifts)``.

    ``vectors`` are the d components of the vectors. The image is vector - box @ shift. The integer
    shifts along the cell vectors are given by ``shifts``, their d components; where None, they are
    those of the image nearest to zero.
    """

    def __call__(self, vectors: Components, shifts: Components | None = None) -> Components: ...


def nearest_images(
    box: jax.Array | None, orthogonal: bool = False, periodic: tuple[bool, ...] = ()
) -> Images:
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
      periodic: for each cell vector whether the system is periodic along it; empty where it is
        periodic along all of them.

    Returns:
      A function of the d components of the vectors, and of integer shifts other than those of the
      nearest image.
    """
    if box is None:
        return lambda vectors, shifts=None: vectors
    d = box.shape[0]
    axes = [a for a in range(d) if not periodic or periodic[a]]
    # Where the box is diagonal, its diagonal is enough, which takes half the arithmetic.
    coupled = [[a] if orthogonal else axes for a in range(d)]
    # once here, not at each call of ``images``; only rounded, so that no derivative is carried
    rows = _rates(jax.lax.stop_gradient(box), orthogonal)

    def nearest(vectors: Components) -> dict[int, jax.Array]:
        """Return the integer shift along each periodic axis that leads to the nearest image."""
        fixed = jax.lax.stop_gradient(vectors)
        sides = [[a] if orthogonal else range(d) for a in range(d)]
        return {a: jnp.round(sum(rows[a, b] * fixed[b] for b in sides[a])) for a in axes}

    def images(vectors: Components, shifts: Components | None = None) -> Components:
        if shifts is None:
            steps = nearest(vectors)
        else:
            steps = {a: shifts[a].astype(box.dtype) for a in axes}
        return tuple(
            vectors[a] - sum(box[a, b] * steps[b] for b in coupled[a] if b in steps)
            for a in range(d)
        )

    return images


def _rates(box: jax.Array, orthogonal: bool) -> dict[tuple[int, int], jax.Array]:
    """Return the entries of the inverse of a cell matrix by their two indices.

    Those of a diagonal matrix are the diagonal alone.
    """
    d = box.shape[0]
    if orthogonal:
        return {(a, a): 1.0 / box[a, a] for a in range(d)}
    rows = inverse(box)
    return {(a, b): rows[a, b] for a in range(d) for b in range(d)}


def nearest_image(
    difference: jax.Array,
    box: jax.Array | None,
    periodic: tuple[bool, ...] = (),
    shifts: jax.Array | None = None,
) -> jax.Array:
    """Map vectors (…, d) to their periodic images nearest to zero.

    Args:
      difference: the vectors.
      box: the cell matrix (d, d), columns the lattice vectors, or None for an infinite system.
      periodic: for each cell vector whether the system is periodic along it; empty where it is
        periodic along all of them.
      shifts: (…, d) integer shifts along the cell vectors, for the images difference - box @ shift
        in place of the nearest ones; None for the nearest ones.
    """
    if box is None:
        return difference
    steps = None if shifts is None else components(shifts)
    images = nearest_images(box, periodic=periodic)
    return jnp.stack(images(components(difference), steps), axis=-1)


def inverse(box: np.ndarray | jax.Array) -> Any:
    """Invert a cell matrix (d, d), d = 2 or 3, an array of numpy or jax.

    The formula is written out, because it compiles at once, unlike a general matrix inverse.
    """
    xp: Any = box.__array_namespace__()
    if box.shape[0] == 2:
        (a, b), (c, d) = box
        return xp.stack([xp.stack([d, -b]), xp.stack([-c, a])]) / (a * d - b * c)
    # Cofactors, over the volume of the cell: rows and columns k + 1 and k + 2 of each entry, in a
    # circle, are slices of the matrix beside itself. Cross products one by one are six times as
    # many operations, which jax traces anew in each program.
    rows = xp.concatenate([box, box])
    around = xp.concatenate([rows, rows], axis=1)
    cofactors = around[1:4, 1:4] * around[2:5, 2:5] - around[2:5, 1:4] * around[1:4, 2:5]
    return cofactors.T / xp.sum(cofactors[:, 0] * box[:, 0])


def heights(box: np.ndarray | jax.Array) -> Any:
    """Compute the d distances between opposite faces of a cell (d, d), columns the cell vectors.

    With a numpy array, jax is not used, so that nothing is compiled.
    """
    # Row k of the inverse is normal to the faces that the other lattice vectors span, and its norm
    # is the inverse of the distance of these faces.
    rows = inverse(box)
    return 1.0 / box.__array_namespace__().sqrt((rows**2).sum(axis=1))


@full_precision
def circular_mean(
    vectors: jax.Array, box: jax.Array, weights: ArrayLike, periodic: tuple[bool, ...] = ()
) -> jax.Array:
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
      periodic: for each cell vector whether the system is periodic along it; empty where it is
        periodic along all of them. Along the others the mean is the weighted mean.
    """
    fractions = vectors @ inverse(box).T
    angles = 2.0 * np.pi * fractions
    column = jnp.asarray(weights)[:, None]
    sine = jnp.sum(column * jnp.sin(angles), axis=0)
    cosine = jnp.sum(column * jnp.cos(angles), axis=0)
    mean = jnp.arctan2(sine, cosine) / (2.0 * np.pi)
    if not all(periodic):
        plain = jnp.sum(column * fractions, axis=0) / jnp.sum(column)
        mean = jnp.where(np.asarray(periodic), mean, plain)
    return box @ mean
