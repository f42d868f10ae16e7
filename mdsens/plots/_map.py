"""The sensitivity of every particle, drawn on the configuration."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from mdsens import contacts
from mdsens.implicit.status import InputError, Status
from mdsens.plots._style import ARROW, COLUMN, FONT, OUTLINE, PAPER
from mdsens.relaxation import Equilibrium
from mdsens.sensitivity import Linearization, Response
from mdsens.stationarity import Unknowns
from mdsens.system import System

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.quiver import Quiver

__all__ = ["sensitivity_map"]

# Pale, so that the arrows stand out, and apart in lightness and hue under every common colour blindness.
SPECIES = ("#a9c8e8", "#f4d6a0", "#b5dcc3", "#e6b8c2", "#c9c2e4", "#dcdcd2")
DIAMETERS = ("#eef3f7", "#7fa6cc")  # the ends of the colour map of many different diameters
REACH = 1.5  # diameters: length of the arrow at the percentile below
PERCENTILE = 95.0  # some arrows stay longer; scaling by the longest would shrink all others to dots
SMALLEST, LARGEST = 0.02, 0.35  # of the picture's width: bounds of the arrow at the percentile and of the longest
LAYERS = 16  # of a 3-D picture, drawn from back to front
CROWD = 2000  # circles; beyond, thin outlines
SHAFT = np.array([0.0016, 0.007])  # of the picture's width: bounds of an arrow's thickness
KEY = 0.08  # of the picture's width: the scale arrow is about that long or longer
ROW = 11.0  # points from one row of the legend to the next
HAZE = 0.75  # how far the rear of a 3-D picture fades into the paper


class _View(NamedTuple):
    """Particles as the eye sees them.

    Attributes:
      spots: (n, 2) in the plane, wrapped into the cell.
      depth: (n,) from 0 at the rear to 1 at the front; 1 in 2-D.
      cell: (2, 2), columns the cell vectors in the plane; None for open boundaries.
      across: (2, d) takes a vector to the plane.
    """

    spots: np.ndarray
    depth: np.ndarray
    cell: np.ndarray | None
    across: np.ndarray


class _Foot(NamedTuple):
    """What stands below the picture, and in how many rows.

    Attributes:
      names: of the circles.
      bar: width of the colour bar, as a fraction of the picture's.
      caption: of the scale arrow; empty without arrows.
      length: of the scale arrow, as a fraction of the picture's width.
    """

    names: list[str]
    bar: float
    caption: str
    length: float

    def rows(self, wide: float) -> tuple[int, int, int]:
        """Columns of the legend, the row of the scale arrow, and the number of rows, in a width in points.

        Widths are estimates: measuring text takes a renderer, which a figure has only when it is drawn.
        """

        def points(text: str) -> float:
            return 0.55 * FONT * len(re.sub(r"\\mathrm|[${}_\\]|(?<=\\)[a-z]+", "", text))

        each = max((points(name) + 2.3 * FONT for name in self.names), default=0.0)
        arrow = points(self.caption) + FONT + self.length * wide if self.caption else 0.0
        room = (1.0 - self.bar) * wide
        if len(self.names) * each + arrow <= room:
            return max(len(self.names), 1), 0, 1
        columns = max(int(room // max(each, 1.0)), 1)
        rows = max(-(-len(self.names) // columns), 1)
        return columns, rows, rows + 1


def sensitivity_map(
    at: Equilibrium | Linearization,
    response: Response | Any,
    ax: Axes | None = None,
    *,
    part: Literal["nonaffine", "value"] = "nonaffine",
    scale: float | None = None,
    label: str | None = None,
    axis: int = 2,
    slab: tuple[float, float] = (0.0, 1.0),
    title: str | None = None,
) -> Axes:
    """Draw how each particle of a minimum moves with a parameter: circles to scale, dR_i/dtheta as an arrow on each.

    The figure of arXiv:2105.15183. Particles stand in their cell, together with the images that reach into it; colours
    are the species, or the diameters where there are no species. Rattlers are hollow and dashed and carry no arrow. An
    arrow with its value below the cell gives the scale. Without diameters, circles have the typical distance of nearest
    neighbours.

    Args:
      at: the minimum, from ``minimize`` or ``linearize``; not a batch.
      response: of ``jvp`` or ``response``; or any vectors (n, d), such as ``jacobian(eq).nonaffine[..., k]``.
      ax: where to draw; None makes a figure of one column with pyplot.
      part: ``"nonaffine"`` draws the motion less that of the box: free of the choice of images, and the same as
        ``"value"`` where the box does not move. ``"value"`` draws the derivative of the stored positions.
      scale: drawn length of an arrow of length 1, in the positions' unit. Give it to compare figures; None draws the
        arrow at the 95th percentile 1.5 diameters long.
      label: the name of an arrow's length; None for |dR/dtheta|, with the index na where the affine part was taken off.
      axis: in 3-D, the cell vector to look along, from its tip; the open system's coordinate. The projection is
        orthographic: an arrow's part along the view is not seen. What is far fades.
      slab: in 3-D, the part of the depth to draw, in fractions from the rear to the front.
      title: above the picture. A response whose status is not good is named there in any case.

    Returns:
      the Axes.

    Raises:
      InputError: a batch, a response without one vector a particle (``vjp``, ``gradient``, ``jacobian``), bad options.
    """
    system, vectors, rattlers = _checked(at, response, part)
    if scale is not None and not 0 < scale < np.inf:
        raise InputError(f"scale is {scale}: give the drawn length of a unit arrow, above 0, or None.")
    diameters = _diameters(system)
    view = _project(system, axis)
    shown = _in_slab(system, view.depth, slab)
    arrows = vectors @ view.across.T

    low, high = _extent(view, shown, diameters / 2)
    width, usual = float((high - low).max()), float(np.median(diameters))
    moving = shown & ~rattlers
    lengths = np.linalg.norm(arrows[moving], axis=1)
    typical = float(np.percentile(lengths[lengths > 0], PERCENTILE)) if lengths.any() else 0.0
    if scale is None:
        longest = float(lengths.max(initial=0.0))
        scale = min(max(REACH * usual, SMALLEST * width) / typical, LARGEST * width / longest) if typical > 0 else 1.0
    arrows = scale * arrows
    if view.cell is None and moving.any():  # nothing cuts an arrow here, so make room for it
        tips = (view.spots + arrows)[moving]
        low, high = np.minimum(low, tips.min(axis=0)), np.maximum(high, tips.max(axis=0))
    margin = 0.01 * float((high - low).max())
    low, high = low - margin, high + margin
    eq = at.equilibrium if isinstance(at, Linearization) else at
    status = response.status if isinstance(response, Response) else Status(int(eq.status))
    heading = ", ".join([*([title] if title else []), *([] if status.good else [status.name])])
    fill, key = _colours(system, diameters)
    if label is None:
        label = r"$|\mathrm{d}R/\mathrm{d}\theta|$"
        if part == "nonaffine" and isinstance(response, Response):
            if not np.allclose(_of_positions(response.value), response.nonaffine, rtol=1e-6, atol=1e-6 * typical):
                label = r"$|\mathrm{d}R/\mathrm{d}\theta|_{\mathrm{na}}$"
    names = [name for name, _ in key] if isinstance(key, list) else []
    if (shown & rattlers).any():
        names.append("rattler")
    span = np.clip(typical, KEY * width / scale, LARGEST * width / scale)
    unit, text = _round(float(span)) if typical > 0 else (0.0, "")
    foot = _Foot(
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

    layers = _layers(view.depth, shown) if system.dimension == 3 else [shown]
    quiver = None
    for k, layer in enumerate(layers):
        haze = HAZE * (1.0 - (k + 1) / len(layers)) ** 0.8
        _circles(ax, view, layer & ~rattlers, diameters, fill, haze)
        _circles(ax, view, layer & rattlers, diameters, None, haze)
        if (layer & moving).any() and typical > 0:
            quiver = _arrows(ax, view, layer & moving, arrows, float(np.clip(0.08 * usual, *SHAFT * width)), haze)
    _legend(ax, foot, key, quiver)
    return ax


def _of_positions(value: Any) -> Any:
    """A response's value, of positions and cell that of the positions."""
    return value.positions if isinstance(value, Unknowns) else value


def _checked(
    at: Equilibrium | Linearization, response: Response | Any, part: str
) -> tuple[System, np.ndarray, np.ndarray]:
    """The system, the vectors (n, d) and who is a rattler (n,)."""
    if not isinstance(at, Equilibrium | Linearization):
        raise InputError(f"got a {type(at).__name__}: give what ms.minimize or ms.linearize returns.")
    if part not in ("nonaffine", "value"):
        raise InputError(f"part is {part!r}: give 'nonaffine' or 'value'.")
    eq = at.equilibrium if isinstance(at, Linearization) else at
    system = eq.system
    if system.batch is not None:
        raise InputError(
            f"sensitivity_map draws one minimum and got a batch of {system.batch}: take one member of it and of the "
            "response, as in jax.tree.map(lambda leaf: leaf[0], eq)."
        )
    given = _of_positions(getattr(response, part)) if isinstance(response, Response) else response
    if given is None or isinstance(given, dict):
        raise InputError("the response is a derivative by parameters (vjp, gradient): give one of jvp or response.")
    vectors = np.asarray(given, float)
    if vectors.shape != system.positions.shape:
        raise InputError(
            f"the response has shape {vectors.shape} and the positions {system.positions.shape}: give one vector a "
            f"particle, of jvp, or one component of a jacobian, jacobian(eq).{part}[..., k]."
        )
    bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        raise InputError(f"the response of {int(bad.sum())} particles is not finite: look at its status.")
    if isinstance(response, Response):
        rattlers = response.rattlers
    else:
        net = at.network if isinstance(at, Linearization) else contacts.network(system, eq.max_force, eq.held_by)
        rattlers = net.rattlers
    return system, vectors, np.asarray(rattlers, bool)


def _diameters(system: System) -> np.ndarray:
    """What circles to draw (n,): sigma, or the median distance of nearest neighbours for laws without it."""
    if system.diameters is not None:
        return np.asarray(system.diameters, float)
    from scipy.spatial import KDTree

    distance = 1.0
    if system.n > 1:
        positions = np.asarray(system.positions, float)
        distance = float(np.median(KDTree(positions).query(positions, k=2)[0][:, 1]))
    return np.full(system.n, distance)


def _project(system: System, axis: int) -> _View:
    """Wrap the particles into the cell and look along one of its vectors: the cell is then a parallelogram."""
    positions = np.asarray(system.positions, float)
    box = None if system.box is None else np.asarray(system.box, float)
    if system.dimension == 3 and axis not in (0, 1, 2):
        raise InputError(f"axis is {axis!r}: give 0, 1 or 2, the cell vector to look along.")
    fractions = positions
    if box is not None:
        fractions = (positions @ np.linalg.inv(box).T) % 1.0
        positions = fractions @ box.T
    if system.dimension == 2:
        return _View(positions, np.ones(system.n), box, np.eye(2))
    cell = np.eye(3) if box is None else box
    toward = cell[:, axis] / np.linalg.norm(cell[:, axis])
    right = cell[:, (axis + 1) % 3] - toward * (toward @ cell[:, (axis + 1) % 3])
    right /= np.linalg.norm(right)
    across = np.stack([right, np.cross(toward, right)])
    depth = fractions[:, axis]
    if box is None:
        depth = (depth - depth.min()) / max(float(np.ptp(depth)), np.finfo(float).tiny)
    plane = None if box is None else across @ box[:, [(axis + 1) % 3, (axis + 2) % 3]]
    return _View(positions @ across.T, depth, plane, across)


def _in_slab(system: System, depth: np.ndarray, slab: tuple[float, float]) -> np.ndarray:
    low, high = slab
    if not 0.0 <= low < high <= 1.0:
        raise InputError(f"slab is {slab}: give two fractions of the depth, 0 <= rear < front <= 1.")
    if system.dimension == 2:
        if (low, high) != (0.0, 1.0):
            raise InputError("slab is for 3-D: a 2-D system has no depth, leave it out.")
        return np.ones(system.n, bool)
    shown = (depth >= low) & (depth <= high)
    if not shown.any():
        raise InputError(f"no particle is in the slab {slab}: take a thicker one.")
    return shown


def _layers(depth: np.ndarray, shown: np.ndarray) -> list[np.ndarray]:
    """Masks of the particles shown, from rear to front, in equal steps of depth."""
    edges = np.linspace(depth[shown].min(), depth[shown].max(), LAYERS + 1)
    step = np.clip(np.searchsorted(edges, depth, side="right") - 1, 0, LAYERS - 1)
    return [shown & (step == k) for k in range(LAYERS)]


def _images(view: _View, chosen: np.ndarray, diameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index and place of every circle that reaches into the cell, images included; two or three of a corner's lie just
    outside, which the clipping at the cell hides."""
    (index,) = np.nonzero(chosen)
    if view.cell is None:
        return index, view.spots[index]
    inverse = np.linalg.inv(view.cell)
    radius = diameters[index, None] / 2 * np.linalg.norm(inverse, axis=1)  # in fractions of the cell's heights
    fractions = view.spots[index] @ inverse.T
    turns = int(np.ceil(radius.max(initial=0.0)))
    shifts = np.stack(np.meshgrid(*[np.arange(-turns, turns + 1)] * 2), axis=-1).reshape(-1, 1, 2)
    placed = fractions + shifts
    seen = ((placed > -radius) & (placed < 1.0 + radius)).all(axis=-1)
    return np.broadcast_to(index, seen.shape)[seen], placed[seen] @ view.cell.T


def _extent(view: _View, shown: np.ndarray, radii: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower left and upper right corner of the cell, or of the circles where there is none."""
    if view.cell is not None:
        corners = _corners(view.cell)
        return corners.min(axis=0), corners.max(axis=0)
    spots, radii = view.spots[shown], radii[shown, None]
    return (spots - radii).min(axis=0), (spots + radii).max(axis=0)


def _column(low: np.ndarray, high: np.ndarray, foot: _Foot, titled: bool) -> Axes:
    """A new figure one column wide, as high as the picture, the legend and the title need."""
    from matplotlib import pyplot

    wide, tall = high - low
    picture = COLUMN * min(tall / wide, 1.6)
    below, head = (foot.rows(72 * COLUMN)[2] + 0.9) * ROW / 72, 0.25 if titled else 0.0
    total = picture + below + head
    return pyplot.figure(figsize=(COLUMN, total)).add_axes((0.0, below / total, 1.0, picture / total))


def _frame(ax: Axes, view: _View, low: np.ndarray, high: np.ndarray) -> None:
    """Limits, equal aspect, and the cell's outline."""
    from matplotlib.patches import Polygon

    if view.cell is not None:
        corners = _corners(view.cell)
        ax.add_patch(Polygon(corners, closed=True, fill=False, edgecolor=OUTLINE, linewidth=0.8, zorder=1.8))
    ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    ax.set_axis_off()


def _corners(cell: np.ndarray) -> np.ndarray:
    return np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) @ cell.T


def _faded(colours: Any, haze: float) -> np.ndarray:
    from matplotlib.colors import to_rgb, to_rgba_array

    return to_rgba_array(colours) * [1 - haze, 1 - haze, 1 - haze, 1] + [*(haze * np.array(to_rgb(PAPER))), 0]


def _circles(
    ax: Axes, view: _View, chosen: np.ndarray, diameters: np.ndarray, fill: np.ndarray | None, haze: float
) -> None:
    """One collection of circles, cut at the cell; hollow and dashed without a fill."""
    from matplotlib.collections import EllipseCollection

    index, places = _images(view, chosen, diameters)
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


def _arrows(ax: Axes, view: _View, chosen: np.ndarray, arrows: np.ndarray, shaft: float, haze: float) -> Quiver:
    """Arrows of drawn length, cut at the cell like the circles; what leaves it comes in again at the other side."""
    tails, arrows = view.spots[chosen], arrows[chosen]
    if view.cell is not None:
        inverse = np.linalg.inv(view.cell)
        ends = [tails @ inverse.T, (tails + arrows) @ inverse.T]
        shifts = np.stack(np.meshgrid(*[np.arange(-1, 2)] * 2), axis=-1).reshape(-1, 1, 2)
        seen = np.any([((end + shifts > 0) & (end + shifts < 1)).all(axis=-1) for end in ends], axis=0)
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
    """Width of the white edge that keeps crossing arrows apart; it would swallow the shortest ones, and small ones."""
    room = np.clip(np.linalg.norm(arrows, axis=1) / (6 * shaft) - 0.2, 0.0, 1.0)
    return 0.3 * room * (len(arrows) < CROWD)


def _cut(ax: Axes, view: _View, artist: Artist) -> None:
    from matplotlib.patches import Polygon

    if view.cell is not None:
        artist.set_clip_path(Polygon(_corners(view.cell), closed=True, transform=ax.transData))


def _colours(system: System, diameters: np.ndarray) -> tuple[np.ndarray, Any]:
    """The fill of every particle (n, 4), and what explains it: names with colours, or a colour map with its range."""
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


def _legend(ax: Axes, foot: _Foot, key: Any, quiver: Quiver | None) -> None:
    """Below the picture: the colours, the rattlers where there are any, and an arrow with its value."""
    from matplotlib.legend_handler import HandlerPatch
    from matplotlib.patches import Circle

    (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
    wide = min(ax.bbox.width, ax.bbox.height * (x1 - x0) / (y1 - y0)) * 72 / ax.figure.dpi  # points
    row = ROW / (wide * (y1 - y0) / (x1 - x0))
    columns, arrow_row, _ = foot.rows(wide)
    handles, tints = [], key
    if not isinstance(key, list):
        (shades, span), tints = key, []
        bar = ax.inset_axes((0.12, -1.15 * row, 0.22, 0.6 * row))
        bar.imshow(np.linspace(0, 1, 64)[None], aspect="auto", cmap=shades)
        bar.set(xticks=[], yticks=[])
        bar.spines[:].set(color=OUTLINE, linewidth=0.5)
        for x, side, text in ((-0.08, "right", rf"$\sigma$ {span.vmin:.2g}"), (1.08, "left", f"{span.vmax:.2g}")):
            bar.text(x, 0.4, text, ha=side, va="center", fontsize=FONT, transform=bar.transAxes)
    for name, tint in tints:
        handles.append(Circle((0, 0), facecolor=tint, edgecolor=OUTLINE, linewidth=0.5, label=name))
    if "rattler" in foot.names:
        dashed = Circle((0, 0), facecolor=PAPER, edgecolor=OUTLINE, linewidth=0.7, linestyle=(0, (2, 1)))
        dashed.set_label("rattler")
        handles.append(dashed)
    if quiver is not None:
        ax.quiverkey(
            quiver,
            0.99 - foot.length,  # where its tail is
            -(arrow_row + 0.83) * row,
            foot.length * (x1 - x0),
            foot.caption,
            labelpos="W",
            labelsep=0.06,
            facecolor=ARROW,
            linewidth=max(np.asarray(quiver.get_linewidth())),
            fontproperties={"size": FONT},
        )
    if not handles:
        return

    def dot(*_: Any, xdescent: float, ydescent: float, width: float, height: float, **__: Any) -> Circle:
        return Circle((width / 2 - xdescent, height / 2 - ydescent), 0.55 * height)

    ax.legend(
        handles=[entry for k in range(columns) for entry in handles[k::columns]],  # columns fill first, read rows first
        handler_map={Circle: HandlerPatch(patch_func=dot)},
        loc="upper left",
        bbox_to_anchor=(0.01 + foot.bar, -0.55 * row),
        ncols=columns,
        frameon=False,
        fontsize=FONT,
        borderpad=0.0,
        borderaxespad=0.0,
        handlelength=1.0,
        handletextpad=0.4,
        columnspacing=1.0,
        labelspacing=(ROW - FONT) / FONT - 0.15,
    )


def _round(longest: float) -> tuple[float, str]:
    """The largest 1, 2 or 5 times a power of ten that is not above ``longest``, and how it is written."""
    power = int(np.floor(np.log10(longest)))
    digit = max(m for m in (1, 2, 5) if m == 1 or m * 10.0**power <= longest * (1 + 1e-9))
    value = digit * 10.0**power
    return value, f"{value:g}" if -3 <= power < 4 else rf"${digit}\times10^{{{power}}}$"
