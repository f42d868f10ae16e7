"""Nearest images in a periodic lattice; inverse and heights of its cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

__all__ = ["Components", "components", "nearest_images", "nearest_image", "inverse", "heights"]


Components: TypeAlias = tuple[Any, ...]


def components(vectors: jax.Array) -> Components:
    """(…, d) as d arrays, the form in which arithmetic on them is fastest."""
    return tuple(vectors[..., a] for a in range(vectors.shape[-1]))


def nearest_images(
    box: jax.Array | None, orthogonal: bool = False
) -> Callable[[Components], Components]:
    """The function that brings vectors, as components, to their image nearest to zero in the
    lattice of ``box``.

    By rounding fractional components, exact for results shorter than half the smallest height of
    the cell. The integer shift carries no derivative, so the derivative by the box is -d(box) @
    shift: jax-md's ``periodic_general`` in Cartesian coordinates gets this one wrong (its custom
    transform drops the box from the tangent of the inverse).
    """
    if box is None:
        return lambda vectors: vectors
    if orthogonal:  # nothing beside the diagonal of the box: half the arithmetic
        sides = [(box[a, a], jax.lax.stop_gradient(1.0 / box[a, a])) for a in range(box.shape[0])]
        return lambda vectors: tuple(
            v - side * jnp.round(rate * jax.lax.stop_gradient(v))
            for v, (side, rate) in zip(vectors, sides, strict=True)
        )
    d, rows = box.shape[0], jax.lax.stop_gradient(inverse(box))  # once, not at each call

    def images(vectors: Components) -> Components:
        fixed = jax.lax.stop_gradient(vectors)
        shifts = [jnp.round(sum(rows[a, b] * fixed[b] for b in range(d))) for a in range(d)]
        return tuple(vectors[a] - sum(box[a, b] * shifts[b] for b in range(d)) for a in range(d))

    return images


def nearest_image(difference: jax.Array, box: jax.Array | None) -> jax.Array:
    """:func:`nearest_images` of vectors (…, d)."""
    return (
        difference
        if box is None
        else jnp.stack(nearest_images(box)(components(difference)), axis=-1)
    )


def inverse(box: Any) -> Any:
    """The inverse of a cell, d = 2 or 3, written out: it compiles in no time, which that of any
    matrix does not.
    """
    xp: Any = box.__array_namespace__()
    if box.shape[0] == 2:
        (a, b), (c, d) = box
        return xp.stack([xp.stack([d, -b]), xp.stack([-c, a])]) / (a * d - b * c)
    faces = xp.stack([xp.linalg.cross(box[:, (k + 1) % 3], box[:, (k + 2) % 3]) for k in range(3)])
    return faces / xp.sum(faces[0] * box[:, 0])


def heights(box: Any) -> Any:
    """The distances between opposite faces of the cell, (d,); of a numpy array, without compiling
    anything.
    """
    rows = inverse(box)
    return 1.0 / box.__array_namespace__().sqrt((rows**2).sum(axis=1))
