"""The parts of the picture of a configuration: Axes, frame, circles, rings and arrows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mdsens._util.errors import InputError
from mdsens.model.system import System
from mdsens.plots._legend import ROW, Foot
from mdsens.plots._style import COLUMN, Inks
from mdsens.plots._view import View, corners, image_shifts, images

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.collections import EllipseCollection
    from matplotlib.quiver import Quiver

__all__ = [
    "SHAFT",
    "draw_arrows",
    "draw_circles",
    "draw_frame",
    "draw_rings",
    "drawn_diameters",
    "new_axes",
    "read_indices",
]

RING = 1.8  # points: width of the ring around a changed particle
CROWD = 2000  # circles or arrows; with more of them, outlines are thin and arrows have no edge
SHAFT = np.array([0.0016, 0.007])  # of the picture's width: bounds of an arrow's thickness


def drawn_diameters(system: System) -> np.ndarray:
    """Return the diameters (n,) with which to draw the particles.

    They are the diameters sigma of the potential. For a potential without diameters, all are the
    median distance of nearest neighbors.
    """
    if system.diameters is not None:
        return np.asarray(system.diameters, float)
    from scipy.spatial import KDTree

    distance = 1.0  # of a single particle, which has no neighbor
    if system.n > 1:
        positions = np.asarray(system.positions, float)
        distances, _ = KDTree(positions).query(positions, k=2)  # column 0: to the particle itself
        distance = float(np.median(distances[:, 1]))
    return np.full(system.n, distance)


def new_axes(
    low: np.ndarray, high: np.ndarray, foot: Foot, titled: bool, beside: float = 0.0
) -> Axes:
    """Make a figure with a picture one column wide, and return the Axes of the picture.

    Args:
      low, high: two opposite corners of the picture.
      foot: the legend below the picture, for which there will be room.
      titled: whether to leave room for a title.
      beside: width in inches that is left free at the right of the picture.
    """
    from matplotlib import pyplot

    width, height = high - low
    # all in inches; the picture is at most 1.6 times as high as wide
    picture = COLUMN * min(height / width, 1.6)
    rows = foot.rows(72 * COLUMN)[2] if foot.names or foot.caption or foot.bar else 0
    legend_height = (rows + 0.9) * ROW / 72
    title_height = 0.25 if titled else 0.0
    total = picture + legend_height + title_height
    figure = pyplot.figure(figsize=(COLUMN + beside, total))
    share = COLUMN / (COLUMN + beside)
    return figure.add_axes((0.0, legend_height / total, share, picture / total))


def draw_frame(ax: Axes, view: View, low: np.ndarray, high: np.ndarray, colors: Inks) -> None:
    """Set the limits and the equal aspect of the Axes, and draw the outline of the cell."""
    from matplotlib.patches import Polygon

    if view.cell is not None:
        outline = Polygon(
            corners(view.cell),
            closed=True,
            fill=False,
            edgecolor=colors.outline,
            linewidth=0.8,
            zorder=1.8,  # above circles (1.5) and arrows (at most 1.7)
        )
        ax.add_patch(outline)
    ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    ax.set_axis_off()


def faded(colors: Sequence[str] | np.ndarray, haze: float, paper: str) -> np.ndarray:
    """Mix k colors (k, 4) with the color of the paper, to show distant particles paler.

    ``haze`` is the fraction of the paper's color, from 0 to 1.
    """
    from matplotlib.colors import to_rgb, to_rgba_array

    added = [*(haze * np.array(to_rgb(paper))), 0]  # opacity stays
    return to_rgba_array(colors) * [1 - haze, 1 - haze, 1 - haze, 1] + added


def draw_circles(
    ax: Axes,
    view: View,
    chosen: np.ndarray,
    diameters: np.ndarray,
    fill: np.ndarray | None,
    haze: float,
    colors: Inks,
) -> None:
    """Draw particles as circles, clipped at the cell; without ``fill``, hollow and dashed.

    Args:
      ax: the Axes to draw in.
      view: the projected configuration.
      chosen: (n,) mask of the particles to draw.
      diameters: (n,) diameters of the circles.
      fill: (n, 4) colors of the particles, or None.
      haze: fraction of the color of the paper in all colors, for distant particles.
      colors: the colors of the figure.
    """
    index, circles = _circles(ax, view, chosen, diameters)
    thinner = 0.5 if fill is not None and index.size > CROWD else 1.0
    circles.set(
        facecolors=colors.paper if fill is None else faded(fill[index], haze, colors.paper),
        edgecolors=faded([colors.outline], haze, colors.paper),
        linewidths=thinner * (0.7 if fill is None else 0.5),
        linestyles=(0, (3, 2)) if fill is None else "solid",
        zorder=1.5,
    )


def draw_rings(
    ax: Axes, view: View, chosen: np.ndarray, diameters: np.ndarray, colors: Inks
) -> None:
    """Draw a colored ring around each chosen particle, clipped at the cell like the circles.

    Args:
      ax: the Axes to draw in.
      view: the projected configuration.
      chosen: (n,) mask of the particles.
      diameters: (n,) diameters of the circles.
      colors: the colors of the figure.
    """
    _, rings = _circles(ax, view, chosen, diameters)
    rings.set(
        facecolors="none",
        edgecolors=colors.bad,
        linewidths=RING,
        zorder=1.6,  # above the circles, below the arrows of the front
    )


def _circles(
    ax: Axes, view: View, chosen: np.ndarray, diameters: np.ndarray
) -> tuple[np.ndarray, EllipseCollection]:
    """Add circles at the chosen particles and their images, clipped at the cell.

    Returns:
      (the particle of each circle, the circles, whose colors and lines the caller sets).
    """
    from matplotlib.collections import EllipseCollection

    index, places = images(view, chosen, diameters)
    size = diameters[index]
    circles = EllipseCollection(
        size, size, np.zeros_like(size), units="xy", offsets=places, transOffset=ax.transData
    )
    if index.size:  # an empty collection would only be one more artist
        ax.add_collection(circles, autolim=False)
        clip_at_cell(ax, view, circles)
    return index, circles


def draw_arrows(
    ax: Axes,
    view: View,
    chosen: np.ndarray,
    arrows: np.ndarray,
    shaft: float,
    haze: float,
    colors: Inks,
) -> Quiver:
    """Draw an arrow on each chosen particle, clipped at the cell like the particles' circles.

    An arrow that leaves the cell enters again at the opposite side, as the arrow of an image.

    Args:
      ax: the Axes to draw in.
      view: the projected configuration.
      chosen: mask (n,) of the particles whose arrows to draw.
      arrows: (n, 2) the arrows as they are drawn, in the positions' unit.
      shaft: thickness of the arrows, in the positions' unit.
      haze: fraction of the color of the paper in the arrows' color, for distant particles.
      colors: the colors of the figure.
    """
    tails = view.spots[chosen]
    arrows = arrows[chosen]
    if view.cell is not None:
        inverse = np.linalg.inv(view.cell)
        ends = np.stack([tails @ inverse.T, (tails + arrows) @ inverse.T])
        # one cell to each side: by default no arrow is longer than a third of the picture's width
        shifts = image_shifts(1)
        # the box around the arrow reaches into the cell: also an arrow across a corner of the cell,
        # both of whose ends are outside
        after = (ends.max(axis=0) + shifts > 0).all(axis=-1)
        before = (ends.min(axis=0) + shifts < 1).all(axis=-1)
        visible = after & before
        tails = (tails + shifts @ view.cell.T)[visible]
        arrows = np.broadcast_to(arrows, (len(shifts), *arrows.shape))[visible]
    quiver = ax.quiver(
        *tails.T,
        *arrows.T,
        angles="xy",
        scale_units="xy",
        scale=1.0,
        units="xy",
        width=shaft,
        headwidth=3.2,
        headlength=4.0,
        headaxislength=3.6,
        minshaft=1.6,
        minlength=0.0,  # else quiver draws short arrows as dots of a fixed size
        facecolor=faded([colors.ink], haze, colors.paper),
        edgecolor=colors.paper,
        linewidth=_edge_width(arrows, shaft),
        # artists of one zorder are drawn in the order of the calls, so that circles of nearer
        # layers cover these arrows; those of the front layer are above all circles
        zorder=1.5 if haze else 1.7,
    )
    clip_at_cell(ax, view, quiver)
    return quiver


def _edge_width(arrows: np.ndarray, shaft: float) -> np.ndarray:
    """Compute the width in points of the edge, as the paper, that separates crossing arrows.

    Short arrows have a thinner edge or none, because an edge would cover them. Where there are very
    many arrows, none has an edge, because all are small.
    """
    room = np.clip(np.linalg.norm(arrows, axis=1) / (6 * shaft) - 0.2, 0.0, 1.0)
    return 0.3 * room * (len(arrows) < CROWD)


def clip_at_cell(ax: Axes, view: View, artist: Artist) -> None:
    """Hide the parts of circles or arrows outside of the cell; without a cell, hide nothing."""
    from matplotlib.patches import Polygon

    if view.cell is not None:
        artist.set_clip_path(Polygon(corners(view.cell), closed=True, transform=ax.transData))


def read_indices(changed: int | Sequence[int] | None, n: int) -> np.ndarray:
    """Return a mask (n,) of the particles that a user marks as changed.

    Raises:
      InputError: ``changed`` has an entry that is no index of a particle.
    """
    chosen = np.atleast_1d(np.asarray([] if changed is None else changed))
    whole = chosen.size == 0 or np.issubdtype(chosen.dtype, np.integer)
    if not whole or chosen.ndim != 1 or ((chosen < 0) | (chosen >= n)).any():
        raise InputError(
            f"`changed` is {changed!r}: give the index of a particle from 0 to {n - 1}, a list of"
            " indices, or None."
        )
    mask = np.zeros(n, bool)
    mask[chosen.astype(int)] = True
    return mask
