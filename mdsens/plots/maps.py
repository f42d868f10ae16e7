"""The sensitivity of every particle, drawn on the configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mdsens._util.errors import InputError
from mdsens.mechanics import contacts
from mdsens.mechanics.status import Status
from mdsens.model.system import System
from mdsens.plots._legend import ROW, Foot, legend, rounded
from mdsens.plots._style import ARROW, COLUMN, FONT, OUTLINE, PAPER
from mdsens.plots._view import View, corners, extent, images, in_slab, layers, project
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity.linearization import Linearization
from mdsens.sensitivity.results import Derivative, Displacement

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.quiver import Quiver

__all__ = ["sensitivity_map"]

# Pale, so that the arrows stand out, and apart in lightness and hue under every common color
# blindness.
SPECIES = ("#a9c8e8", "#f4d6a0", "#b5dcc3", "#e6b8c2", "#c9c2e4", "#dcdcd2")
DIAMETERS = ("#eef3f7", "#7fa6cc")  # the ends of the color map of many different diameters
REACH = 1.5  # diameters: length of the arrow at the percentile below
PERCENTILE = 95.0  # some arrows stay longer; scaling by the longest would shrink all others to dots
SMALLEST, LARGEST = (
    0.02,
    0.35,
)  # of the picture's width: bounds of the arrow at the percentile and of the longest
CROWD = 2000  # circles; beyond, thin outlines
SHAFT = np.array([0.0016, 0.007])  # of the picture's width: bounds of an arrow's thickness
KEY = 0.08  # of the picture's width: the scale arrow is about that long or longer
HAZE = 0.75  # how far the rear of a 3-D picture fades into the paper


def sensitivity_map(
    eq: Equilibrium | Linearization,
    response: Displacement | Any,
    ax: Axes | None = None,
    *,
    part: Literal["nonaffine", "value"] = "nonaffine",
    scale: float | None = None,
    label: str | None = None,
    axis: int = 2,
    slab: tuple[float, float] = (0.0, 1.0),
    title: str | None = None,
) -> Axes:
    """Draw how each particle of a minimum moves with a parameter: circles to scale, dR_i/dtheta as
    an arrow on each.

    The figure of arXiv:2105.15183. Particles stand in their cell, together with the images that
    reach into it; colors are the species, or the diameters where there are no species. Rattlers are
    hollow and dashed and carry no arrow. An arrow with its value below the cell gives the scale.
    Without diameters, circles have the typical distance of nearest neighbors.

    Args:
      eq: the minimum, from ``minimize`` or ``linearize``; not a batch.
      response: of ``jvp`` or ``response``; or any vectors (n, d), such as
        ``jacobian(minimum).nonaffine[..., k]``.
      ax: where to draw; None makes a figure of one column with pyplot.
      part: ``"nonaffine"`` draws the motion less that of the box: free of the choice of images, and
        the same as ``"value"`` where the box does not move. ``"value"`` draws the derivative of the
        stored positions.
      scale: drawn length of an arrow of length 1, in the positions' unit. Give it to compare
        figures; None draws the arrow at the 95th percentile 1.5 diameters long.
      label: the name of an arrow's length; None for |dR/dtheta|, with the index na where the affine
        part was taken off.
      axis: in 3-D, the cell vector to look along, from its tip; the open system's coordinate. The
        projection is orthographic: an arrow's part along the view is not seen. What is far fades.
      slab: in 3-D, the part of the depth to draw, in fractions from the rear to the front.
      title: above the picture. A response whose status is not good is named there in any case.

    Returns:
      the Axes.

    Raises:
      InputError: a batch, a response without one vector a particle (``vjp``, ``gradient``,
        ``jacobian``), bad options.
    """
    system, vectors, rattlers = _checked(eq, response, part)
    if scale is not None and not 0 < scale < np.inf:
        raise InputError(
            f"scale is {scale}: give the drawn length of a unit arrow, above 0, or None."
        )
    diameters = _diameters(system)
    view = project(system, axis)
    shown = in_slab(system, view.depth, slab)
    arrows = vectors @ view.across.T

    low, high = extent(view, shown, diameters / 2)
    width, usual = float((high - low).max()), float(np.median(diameters))
    moving = shown & ~rattlers
    lengths = np.linalg.norm(arrows[moving], axis=1)
    typical = float(np.percentile(lengths[lengths > 0], PERCENTILE)) if lengths.any() else 0.0
    if scale is None:
        longest = float(lengths.max(initial=0.0))
        scale = (
            min(max(REACH * usual, SMALLEST * width) / typical, LARGEST * width / longest)
            if typical > 0
            else 1.0
        )
    arrows = scale * arrows
    if view.cell is None and moving.any():  # nothing cuts an arrow here, so make room for it
        tips = (view.spots + arrows)[moving]
        low, high = np.minimum(low, tips.min(axis=0)), np.maximum(high, tips.max(axis=0))
    margin = 0.01 * float((high - low).max())
    low, high = low - margin, high + margin
    minimum = eq.equilibrium if isinstance(eq, Linearization) else eq
    status = response.status if isinstance(response, Displacement) else Status(int(minimum.status))
    heading = ", ".join([*([title] if title else []), *([] if status.good else [status.name])])
    fill, key = _colors(system, diameters)
    if label is None:
        label = r"$|\mathrm{d}R/\mathrm{d}\theta|$"
        if part == "nonaffine" and isinstance(response, Displacement):
            if not np.allclose(
                response.positions, response.nonaffine, rtol=1e-6, atol=1e-6 * typical
            ):
                label = r"$|\mathrm{d}R/\mathrm{d}\theta|_{\mathrm{na}}$"
    names = [name for name, _ in key] if isinstance(key, list) else []
    if (shown & rattlers).any():
        names.append("rattler")
    span = np.clip(typical, KEY * width / scale, LARGEST * width / scale)
    unit, text = rounded(float(span)) if typical > 0 else (0.0, "")
    foot = Foot(
        names,
        0.0 if isinstance(key, list) else 0.44,
        f"{label} = {text}" if text else "",
        unit * scale / float(high[0] - low[0]),
    )
    if ax is None:
        ax = _column(low, high, foot, bool(heading))
    if heading:
        ax.set_title(heading, fontsize=FONT + 1)
    _frame(ax, view, low, high)

    slices = layers(view.depth, shown) if system.dimension == 3 else [shown]
    quiver = None
    for k, layer in enumerate(slices):
        haze = HAZE * (1.0 - (k + 1) / len(slices)) ** 0.8
        _circles(ax, view, layer & ~rattlers, diameters, fill, haze)
        _circles(ax, view, layer & rattlers, diameters, None, haze)
        if (layer & moving).any() and typical > 0:
            quiver = _arrows(
                ax, view, layer & moving, arrows, float(np.clip(0.08 * usual, *SHAFT * width)), haze
            )
    legend(ax, foot, key, quiver)
    return ax


def _checked(
    eq: Equilibrium | Linearization, response: Displacement | Any, part: str
) -> tuple[System, np.ndarray, np.ndarray]:
    """The system, the vectors (n, d) and who is a rattler (n,)."""
    if not isinstance(eq, Equilibrium | Linearization):
        raise InputError(
            f"got a {type(eq).__name__}: give what ms.minimize or ms.linearize returns."
        )
    if part not in ("nonaffine", "value"):
        raise InputError(f"part is {part!r}: give 'nonaffine' or 'value'.")
    minimum = eq.equilibrium if isinstance(eq, Linearization) else eq
    system = minimum.system
    if system.batch is not None:
        raise InputError(
            f"sensitivity_map draws one minimum and got a batch of {system.batch}: take one member"
            " of it and of the response, as in jax.tree.map(lambda leaf: leaf[0], minimum)."
        )
    vectors = response
    if isinstance(response, Displacement):
        vectors = response.positions if part == "value" else response.nonaffine
    elif isinstance(response, dict | Derivative):
        raise InputError(
            "the response is a derivative by parameters (vjp, gradient): give one of jvp or"
            " response."
        )
    vectors = np.asarray(vectors, float)
    if vectors.shape != system.positions.shape:
        raise InputError(
            f"the response has shape {vectors.shape} and the positions {system.positions.shape}:"
            " give one vector a particle, of jvp, or of a jacobian by one number, jacobian(minimum,"
            " 'sigma').component('sigma[0]')."
        )
    bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        raise InputError(
            f"the response of {int(bad.sum())} particles is not finite: look at its status."
        )
    if isinstance(response, Displacement):
        rattlers = response.rattlers
    else:
        net = (
            eq.network
            if isinstance(eq, Linearization)
            else contacts.network(system, minimum.max_force, minimum.contacts_needed)
        )
        rattlers = net.rattlers
    return system, vectors, np.asarray(rattlers, bool)


def _diameters(system: System) -> np.ndarray:
    """What circles to draw (n,): sigma, or the median distance of nearest neighbors for potentials
    without it.
    """
    if system.diameters is not None:
        return np.asarray(system.diameters, float)
    from scipy.spatial import KDTree

    distance = 1.0
    if system.n > 1:
        positions = np.asarray(system.positions, float)
        distance = float(np.median(KDTree(positions).query(positions, k=2)[0][:, 1]))
    return np.full(system.n, distance)


def _column(low: np.ndarray, high: np.ndarray, foot: Foot, titled: bool) -> Axes:
    """A new figure one column wide, as high as the picture, the legend and the title need."""
    from matplotlib import pyplot

    wide, tall = high - low
    picture = COLUMN * min(tall / wide, 1.6)
    below, head = (foot.rows(72 * COLUMN)[2] + 0.9) * ROW / 72, 0.25 if titled else 0.0
    total = picture + below + head
    return pyplot.figure(figsize=(COLUMN, total)).add_axes(
        (0.0, below / total, 1.0, picture / total)
    )


def _frame(ax: Axes, view: View, low: np.ndarray, high: np.ndarray) -> None:
    """Limits, equal aspect, and the cell's outline."""
    from matplotlib.patches import Polygon

    if view.cell is not None:
        ax.add_patch(
            Polygon(
                corners(view.cell),
                closed=True,
                fill=False,
                edgecolor=OUTLINE,
                linewidth=0.8,
                zorder=1.8,
            )
        )
    ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    ax.set_axis_off()


def _faded(colors: Any, haze: float) -> np.ndarray:
    from matplotlib.colors import to_rgb, to_rgba_array

    return to_rgba_array(colors) * [1 - haze, 1 - haze, 1 - haze, 1] + [
        *(haze * np.array(to_rgb(PAPER))),
        0,
    ]


def _circles(
    ax: Axes,
    view: View,
    chosen: np.ndarray,
    diameters: np.ndarray,
    fill: np.ndarray | None,
    haze: float,
) -> None:
    """One collection of circles, cut at the cell; hollow and dashed without a fill."""
    from matplotlib.collections import EllipseCollection

    index, places = images(view, chosen, diameters)
    if index.size == 0:
        return
    size = diameters[index]
    many = 0.5 if fill is not None and index.size > CROWD else 1.0
    circles = EllipseCollection(
        size,
        size,
        np.zeros_like(size),
        units="xy",
        offsets=places,
        transOffset=ax.transData,
        facecolors=PAPER if fill is None else _faded(fill[index], haze),
        edgecolors=_faded([OUTLINE], haze),
        linewidths=many * (0.7 if fill is None else 0.5),
        linestyles=(0, (3, 2)) if fill is None else "solid",
        zorder=1.5,
    )
    ax.add_collection(circles, autolim=False)
    _cut(ax, view, circles)


def _arrows(
    ax: Axes, view: View, chosen: np.ndarray, arrows: np.ndarray, shaft: float, haze: float
) -> Quiver:
    """Arrows of drawn length, cut at the cell like the circles; what leaves it comes in again at
    the other side.
    """
    tails, arrows = view.spots[chosen], arrows[chosen]
    if view.cell is not None:
        inverse = np.linalg.inv(view.cell)
        ends = [tails @ inverse.T, (tails + arrows) @ inverse.T]
        shifts = np.stack(np.meshgrid(*[np.arange(-1, 2)] * 2), axis=-1).reshape(-1, 1, 2)
        seen = np.any(
            [((end + shifts > 0) & (end + shifts < 1)).all(axis=-1) for end in ends], axis=0
        )
        tails = (tails + shifts @ view.cell.T)[seen]
        arrows = np.broadcast_to(arrows, (len(shifts), *arrows.shape))[seen]
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
        facecolor=_faded([ARROW], haze),
        edgecolor=PAPER,
        linewidth=_halo(arrows, shaft),
        zorder=1.5 if haze else 1.7,
    )
    _cut(ax, view, quiver)
    return quiver


def _halo(arrows: np.ndarray, shaft: float) -> np.ndarray:
    """Width of the white edge that keeps crossing arrows apart; it would swallow the shortest ones,
    and small ones.
    """
    room = np.clip(np.linalg.norm(arrows, axis=1) / (6 * shaft) - 0.2, 0.0, 1.0)
    return 0.3 * room * (len(arrows) < CROWD)


def _cut(ax: Axes, view: View, artist: Artist) -> None:
    from matplotlib.patches import Polygon

    if view.cell is not None:
        artist.set_clip_path(Polygon(corners(view.cell), closed=True, transform=ax.transData))


def _colors(system: System, diameters: np.ndarray) -> tuple[np.ndarray, Any]:
    """The fill of every particle (n, 4), and what explains it: names with colors, or a color map
    with its range.
    """
    from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgba_array

    palette = to_rgba_array(SPECIES)
    if system.species is not None:
        kinds, which = np.unique(np.asarray(system.species), return_inverse=True)
        names = [f"species {k}" for k in kinds]
        tints = palette[kinds % len(SPECIES)]
    else:
        kinds, which = np.unique(diameters, return_inverse=True)
        names = [rf"$\sigma={k:.3g}$" for k in kinds] if len(kinds) > 1 else []
        tints = palette[np.arange(len(kinds)) % len(SPECIES)]
    if len(kinds) <= len(SPECIES):
        return tints[which], list(zip(names, tints, strict=False))
    if system.species is not None:
        return tints[which], []
    shades = LinearSegmentedColormap.from_list("diameter", DIAMETERS)
    span = Normalize(diameters.min(), diameters.max())
    return shades(span(diameters)), (shades, span)
