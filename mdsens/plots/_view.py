"""Orthographic projection of a configuration: particles wrapped into the cell, sorted by depth."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mdsens._util.errors import InputError
from mdsens.model.system import System

__all__ = ["View", "corners", "extent", "image_shifts", "images", "in_slab", "layers", "project"]

LAYERS = 16  # of a 3-D picture, drawn from the rear to the front


class View(NamedTuple):
    """A configuration projected to the plane of the picture.

    Attributes:
      spots: (n, 2) centers of the particles in the plane, wrapped into the cell.
      depth: (n,) depth of each particle, from 0 at the rear to 1 at the front; 1 in 2-D.
      cell: (2, 2) matrix whose columns are the projected cell vectors; None for open boundaries.
      across: (2, d) matrix that projects a vector to the plane.
    """

    spots: np.ndarray
    depth: np.ndarray
    cell: np.ndarray | None
    across: np.ndarray


def project(system: System, axis: int) -> View:
    """Wrap the particles into the cell and project them along one of the cell vectors.

    Seen along a cell vector, the cell is a parallelogram in the picture, also if it is triclinic.

    Args:
      system: the configuration.
      axis: in 3-D, index of the cell vector to look along; without a cell, index of the coordinate.
        In 2-D nothing is projected.
    """
    positions = np.asarray(system.positions, float)
    box = None if system.box is None else np.asarray(system.box, float)
    if system.dimension == 3 and axis not in (0, 1, 2):
        raise InputError(f"`axis` is {axis!r}: give 0, 1 or 2, the cell vector to look along.")
    fractions = positions  # without a box: the coordinates
    if box is not None:
        # the cell vectors are columns, and positions are rows: R = f box^T, f = R box^-T
        fractions = positions @ np.linalg.inv(box).T
        fractions = np.where(system.periodic, fractions % 1.0, fractions)
        positions = fractions @ box.T
    if system.dimension == 2:
        outline = box if system.has_volume else None
        return View(positions, np.ones(system.n), outline, np.eye(2))
    cell = np.eye(3) if box is None else box
    across = _frame(cell, axis)
    depth = fractions[:, axis]
    if not system.periodic[axis]:
        depth = (depth - depth.min()) / max(float(np.ptp(depth)), np.finfo(float).tiny)
    return View(positions @ across.T, depth, _outline(system, across, axis), across)


def _outline(system: System, across: np.ndarray, axis: int) -> np.ndarray | None:
    """Return the sides of the cell in the picture, (2, 2), or None unless both are periodic."""
    sides = [(axis + 1) % 3, (axis + 2) % 3]
    if system.box is None or not all(system.periodic[k] for k in sides):
        return None
    return across @ np.asarray(system.box, float)[:, sides]


def _frame(cell: np.ndarray, axis: int) -> np.ndarray:
    """Return the directions right and up of a picture seen along a cell vector, (2, 3).

    With the direction toward the viewer they are a right-handed frame, in which the next cell
    vector points to the right.
    """
    following = cell[:, (axis + 1) % 3]
    toward = cell[:, axis] / np.linalg.norm(cell[:, axis])
    right = following - toward * (toward @ following)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(toward, right)])


def in_slab(system: System, depth: np.ndarray, slab: tuple[float, float]) -> np.ndarray:
    """Return a mask (n,) of the particles between two depths; in 2-D, of all particles.

    Args:
      system: the configuration.
      depth: (n,) depth of each particle, from 0 at the rear to 1 at the front.
      slab: the two depths.

    Raises:
      InputError: the slab is no range within 0 to 1, or empty, or given in 2-D.
    """
    low, high = slab
    if not 0.0 <= low < high <= 1.0:
        raise InputError(
            f"`slab` is {slab}: give two fractions of the depth of the system along the line of"
            " sight, 0 <= rear < front <= 1."
        )
    if system.dimension == 2:
        if (low, high) != (0.0, 1.0):
            raise InputError("`slab` is for 3-D: a 2-D system has no depth, leave `slab` out.")
        return np.ones(system.n, bool)
    shown = (depth >= low) & (depth <= high)
    if not shown.any():
        raise InputError(f"`slab` is {slab}, which holds no particle: give a thicker slab.")
    return shown


def layers(depth: np.ndarray, shown: np.ndarray) -> list[np.ndarray]:
    """Divide a configuration into layers of equal depth; return a mask of particles for each.

    Args:
      depth: (n,) depth of each particle, from 0 at the rear to 1 at the front.
      shown: (n,) mask of the particles to draw.

    Returns:
      masks (n,) of the particles to draw in each layer, from rear to front.
    """
    edges = np.linspace(depth[shown].min(), depth[shown].max(), LAYERS + 1)
    # clipped: the particle in front is on the last edge, and particles not shown may be outside
    step = np.clip(np.searchsorted(edges, depth, side="right") - 1, 0, LAYERS - 1)
    return [shown & (step == k) for k in range(LAYERS)]


def images(view: View, chosen: np.ndarray, diameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the circles to draw: particles and those periodic images that reach into the cell.

    A circle is included if it reaches into the cell along both cell vectors. At a corner of the
    cell, two or three such circles lie just outside of the cell; they are hidden because the
    picture is clipped at the cell.

    Args:
      view: the projected configuration.
      chosen: (n,) mask of the particles.
      diameters: (n,) diameters of the particles.

    Returns:
      the index of the particle of each circle, and the center (2,) of each circle.
    """
    (index,) = np.nonzero(chosen)
    if view.cell is None:
        return index, view.spots[index]
    inverse = np.linalg.inv(view.cell)
    # radius in fractions of the cell's heights: row i of the inverse has the length 1 / height i
    radius = diameters[index, None] / 2 * np.linalg.norm(inverse, axis=1)
    fractions = view.spots[index] @ inverse.T
    reach = int(np.ceil(radius.max(initial=0.0)))  # cells between a particle and its images
    centers = fractions + image_shifts(reach)
    visible = ((centers > -radius) & (centers < 1.0 + radius)).all(axis=-1)
    return np.broadcast_to(index, visible.shape)[visible], centers[visible] @ view.cell.T


def image_shifts(reach: int) -> np.ndarray:
    """Return the shifts from a particle to its periodic images, in units of the cell vectors.

    The images are those up to ``reach`` cells away, the particle itself included. The shape is
    (images, 1, 2); along the axis of length 1 the shifts are added to all particles.
    """
    steps = np.arange(-reach, reach + 1)
    return np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 1, 2)


def extent(view: View, shown: np.ndarray, radii: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return two opposite corners of the picture, which encloses the cell.

    Without a cell, the picture encloses the circles of the particles shown.

    Args:
      view: the projected configuration.
      shown: (n,) mask of the particles to draw.
      radii: (n,) radii of the circles.
    """
    if view.cell is not None:
        four = corners(view.cell)
        return four.min(axis=0), four.max(axis=0)
    spots, radii = view.spots[shown], radii[shown, None]
    return (spots - radii).min(axis=0), (spots + radii).max(axis=0)


def corners(cell: np.ndarray) -> np.ndarray:
    """Return the four corners (4, 2) of a projected cell, in order along the cell's outline."""
    return np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) @ cell.T
