"""Draw the derivative of each particle's position as an arrow on the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.pytree import is_leaf
from mdsens.mechanics import contacts
from mdsens.mechanics.status import Status
from mdsens.model.system import System
from mdsens.plots._draw import (
    SHAFT,
    draw_arrows,
    draw_circles,
    draw_frame,
    draw_rings,
    drawn_diameters,
    new_axes,
    read_indices,
)
from mdsens.plots._legend import Bar, Foot, legend, rounded
from mdsens.plots._style import DIVERGING, FONT, default_inks, inks, title_with_status
from mdsens.plots._view import View, extent, in_slab, layers, project
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity.linearization import Linearization
from mdsens.sensitivity.results import Derivative, Displacement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

    from mdsens.plots._legend import Key

__all__ = ["sensitivity_map"]

# Pale, so that the arrows stand out, and apart in lightness and hue under every common color
# blindness.
SPECIES = ("#a9c8e8", "#f4d6a0", "#b5dcc3", "#e6b8c2", "#c9c2e4", "#dcdcd2")
DIAMETERS = ("#eef3f7", "#7fa6cc")  # the ends of the color map of many different diameters
# The same on a dark background, where the arrows are light.
SPECIES_DARK = ("#2b5078", "#8a6a22", "#2f6b4c", "#7d3a50", "#574b8a", "#66665a")
DIAMETERS_DARK = ("#16222e", "#4d7ba6")
CHANGES_DARK = ("#3f76ad", "#1d2024", "#ad4a3f")  # of a change below zero, none, above zero
REACH = 1.5  # diameters: length of the arrow at the percentile below
PERCENTILE = 95.0  # some arrows stay longer; scaling by the longest would shrink all others to dots
SMALLEST = 0.02  # of the picture's width: the arrow at the percentile is at least that long,
LARGEST = 0.35  # and the longest arrow at most that long
KEY = 0.08  # of the picture's width: the scale arrow is about that long or longer
HAZE = 0.75  # how far the rear of a 3-D picture fades into the paper


class Shade(NamedTuple):
    """A quantity of each particle, drawn as its color: blue below zero, red above.

    Attributes:
      values: (n,) finite numbers.
      name: symbol of the quantity in the legend.
      unit: written after a number.
    """

    values: np.ndarray
    name: str
    unit: str

    def colors(self, dark: bool) -> tuple[np.ndarray, Bar]:
        """Return the colors (n, 4) of the particles, and the entry of the legend.

        ``dark`` chooses the colors for a dark background.
        """
        from matplotlib import colormaps
        from matplotlib.colors import LinearSegmentedColormap, Normalize

        # without the dark ends of the map, on which an arrow could not be seen
        pale = colormaps[DIVERGING](np.linspace(0.25, 0.75, 64))
        shades = LinearSegmentedColormap.from_list("change", CHANGES_DARK if dark else pale)
        limit = float(np.abs(self.values).max()) or 1.0
        span = Normalize(-limit, limit)
        return shades(span(self.values)), Bar(shades, span, self.name, self.unit)


def sensitivity_map(
    eq: Equilibrium | Linearization,
    response: Displacement | ArrayLike,
    ax: Axes | None = None,
    *,
    part: Literal["nonaffine", "value"] = "nonaffine",
    scale: float | None = None,
    label: str | None = None,
    axis: int = 2,
    slab: tuple[float, float] = (0.0, 1.0),
    changed: int | Sequence[int] | None = None,
    title: str | None = None,
) -> Axes:
    """Draw how each particle of a minimum moves with a parameter: dR_i/dtheta as an arrow on it.

    theta is the parameter. The figure follows arXiv:2105.15183. Particles are circles, drawn to
    scale in the cell, together with the periodic images that reach into the cell. Colors show the
    species, or the diameters where there are no species. Rattlers are hollow and dashed and carry
    no arrow. A scale arrow with its value is below the cell. For a potential without diameters, the
    diameter of the circles is the median distance of nearest neighbors. On a dark background, as of
    matplotlib's style ``dark_background``, the particles are dark and the arrows light.

    Args:
      eq: the minimum, from ``minimize`` or ``linearize``; not a batch.
      response: a derivative from ``jvp`` or ``response``; or any vectors (n, d), such as
        ``jacobian(eq).nonaffine[..., k]``.
      ax: the Axes to draw in; None makes a figure of one column with pyplot.
      part: ``"nonaffine"`` draws the motion minus the affine motion with the box; it does not
        depend on the choice of periodic images, and is the same as ``"value"`` where the box does
        not change. ``"value"`` draws the derivative of the Cartesian positions, which includes the
        motion with the box.
      scale: drawn length of an arrow of length 1, in the positions' unit. Give it to compare
        figures. None chooses a scale at which the 95th percentile of the lengths is drawn 1.5
        diameters long, or 0.02 of the picture's width if that is longer; the longest arrow is at
        most 0.35 of the picture's width.
      label: name of the quantity that the scale arrow shows; None for |dR/dtheta|, with the index
        na (non-affine) where the affine part was subtracted.
      axis: in 3-D, index of the cell vector to look along, seen from its tip; in an open system,
        index of the coordinate. The projection is orthographic: the component of an arrow along
        the line of sight is not visible. Particles fade with their distance.
      slab: in 3-D, the part of the depth to draw, in fractions from the rear to the front.
      changed: index of the particle whose parameter is theta, or several indices: a colored ring is
        drawn around each. None marks no particle.
      title: title of the figure. The name of a status that is not good is added to it in any case.

    Returns:
      the Axes.

    Raises:
      InputError: a batch, a response without one vector for each particle (``vjp``, ``gradient``,
        ``jacobian``), bad options.
    """
    return draw_map(
        eq,
        response,
        ax,
        part=part,
        scale=scale,
        label=label,
        axis=axis,
        slab=slab,
        changed=changed,
        title=title,
    )


def draw_map(
    eq: Equilibrium | Linearization,
    response: Displacement | ArrayLike,
    ax: Axes | None,
    *,
    part: Literal["nonaffine", "value"] = "nonaffine",
    scale: float | None = None,
    label: str | None = None,
    axis: int = 2,
    slab: tuple[float, float] = (0.0, 1.0),
    changed: int | Sequence[int] | None = None,
    title: str | None = None,
    shade: Shade | None = None,
) -> Axes:
    """Draw a ``sensitivity_map``, whose arguments these are, with colors that show a quantity.

    ``shade`` is the quantity; None colors the particles by species or diameter.
    """
    system, vectors, rattlers = _check_input(eq, response, part, scale)
    marked = read_indices(changed, system.n)
    diameters = drawn_diameters(system)
    view = project(system, axis)
    shown = in_slab(system, view.depth, slab)
    arrows = vectors @ view.across.T

    low, high = extent(view, shown, diameters / 2)
    width = float((high - low).max())
    diameter = float(np.median(diameters))
    moving = shown & ~rattlers
    lengths = np.linalg.norm(arrows[moving], axis=1)
    typical = _find_typical_length(lengths)
    if scale is None:
        scale = _choose_scale(lengths, typical, diameter, width)
    arrows = scale * arrows
    low, high = _make_room(view, low, high, arrows, moving)
    heading = title_with_status(title, _find_status(eq, response))
    if label is None:
        label = _length_label(response, part, typical)
    caption, length = _choose_scale_arrow(label, typical, scale, width)
    background = inks(ax) if ax is not None else default_inks()
    if shade is None:
        fill, key = _colors(system, diameters, background.dark)
    else:
        fill, key = shade.colors(background.dark)
    foot = Foot(
        names=_name_kinds(key, shown & rattlers, shown & marked),
        bar=0.0 if isinstance(key, list) else 0.44,
        caption=caption,
        length=length / float(high[0] - low[0]),
    )
    if ax is None:
        ax = new_axes(low, high, foot, bool(heading))
    if heading:
        ax.set_title(heading, fontsize=FONT + 1, color=background.ink)
    draw_frame(ax, view, low, high, background)

    # from the rear to the front, each layer with its arrows, so that near circles cover far arrows
    slices = layers(view.depth, shown) if system.dimension == 3 else [shown]
    shaft = float(np.clip(0.08 * diameter, *SHAFT * width))
    quiver = None
    for k, layer in enumerate(slices):
        haze = HAZE * (1.0 - (k + 1) / len(slices)) ** 0.8  # 0 at the front
        draw_circles(ax, view, layer & ~rattlers, diameters, fill, haze, background)
        draw_circles(ax, view, layer & rattlers, diameters, None, haze, background)
        draw_rings(ax, view, layer & marked, diameters, background)
        if (layer & moving).any() and typical > 0:
            quiver = draw_arrows(ax, view, layer & moving, arrows, shaft, haze, background)
    legend(ax, foot, key, quiver, background)
    return ax


def _find_typical_length(lengths: np.ndarray) -> float:
    """Return the 95th percentile of the lengths above zero; 0 if there are none."""
    return float(np.percentile(lengths[lengths > 0], PERCENTILE)) if lengths.any() else 0.0


def _choose_scale(lengths: np.ndarray, typical: float, diameter: float, width: float) -> float:
    """Choose the drawn length of an arrow of length 1, so that typical arrows can be seen.

    If nothing moves, it is 1.

    Args:
      lengths: (k,) lengths of the vectors that are drawn as arrows.
      typical: their typical length; 0 if nothing moves.
      diameter: typical diameter of the particles.
      width: width of the picture.
    """
    if typical > 0:
        longest = float(lengths.max(initial=0.0))
        return min(max(REACH * diameter, SMALLEST * width) / typical, LARGEST * width / longest)
    return 1.0


def _make_room(
    view: View, low: np.ndarray, high: np.ndarray, arrows: np.ndarray, moving: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Enlarge the picture by a margin, given two opposite corners; return the new corners.

    Without a cell, which would clip the arrows, the picture also grows to contain all arrows.

    Args:
      view: the projected configuration.
      low, high: the corners of the picture of the particles.
      arrows: (n, 2) the arrows as they are drawn, in the positions' unit.
      moving: (n,) mask of the particles with an arrow.
    """
    if view.cell is None and moving.any():  # nothing cuts an arrow here, so make room for it
        tips = (view.spots + arrows)[moving]
        low = np.minimum(low, tips.min(axis=0))
        high = np.maximum(high, tips.max(axis=0))
    margin = 0.01 * float((high - low).max())
    return low - margin, high + margin


def _find_status(eq: Equilibrium | Linearization, response: Displacement | ArrayLike) -> Status:
    """Return the status of a derivative; for vectors without a status, that of the minimum."""
    if isinstance(response, Displacement):
        return response.status
    minimum = eq.equilibrium if isinstance(eq, Linearization) else eq
    return minimum.status


def _length_label(response: Displacement | ArrayLike, part: str, typical: float) -> str:
    """Return the default name of the quantity that the scale arrow shows, |dR/dtheta|.

    The name has the index na (non-affine) where the box changes with the parameter theta and the
    affine motion with the box was subtracted.
    """
    if part == "nonaffine" and isinstance(response, Displacement):
        # up to 1e-6 of a typical arrow the two are equal: the box does not move
        atol = 1e-6 * typical
        if not np.allclose(response.positions, response.nonaffine, rtol=1e-6, atol=atol):
            return r"$|\mathrm{d}R/\mathrm{d}\theta|_{\mathrm{na}}$"
    return r"$|\mathrm{d}R/\mathrm{d}\theta|$"


def _choose_scale_arrow(
    label: str, typical: float, scale: float, width: float
) -> tuple[str, float]:
    """Choose a round length for the scale arrow, near the typical length of the arrows drawn.

    The scale arrow must be long enough to be visible, and not too long for the picture.

    Args:
      label: name of the quantity that the arrows show.
      typical: typical length of the vectors; 0 if nothing moves.
      scale: drawn length of an arrow of length 1.
      width: width of the picture.

    Returns:
      the caption, empty if nothing moves, and the drawn length, in the positions' unit.
    """
    if typical > 0:
        span = np.clip(typical, KEY * width / scale, LARGEST * width / scale)
        unit, text = rounded(float(span))
        return f"{label} = {text}", unit * scale
    return "", 0.0


def _name_kinds(key: Key, hollow: np.ndarray, marked: np.ndarray) -> list[str]:
    """Name the kinds of particles that the legend shows as circles.

    Args:
      key: names and colors of the kinds, or a color map with its range, which has no names.
      hollow: (n,) mask of the rattlers that are drawn, which are a kind of their own.
      marked: (n,) mask of the particles with a ring, which are another.
    """
    names = [name for name, _ in key] if isinstance(key, list) else []
    if hollow.any():
        names.append("rattler")
    if marked.any():
        names.append("changed")
    return names


def _check_input(
    eq: Equilibrium | Linearization,
    response: Displacement | ArrayLike,
    part: str,
    scale: float | None,
) -> tuple[System, np.ndarray, np.ndarray]:
    """Check the minimum, the response and the scale that a user gives to ``sensitivity_map``.

    Returns:
      the system, the vectors (n, d) to draw, and a mask (n,) of the rattlers.

    Raises:
      InputError: the errors listed in ``sensitivity_map``.
    """
    if not isinstance(eq, Equilibrium | Linearization):
        raise InputError(
            f"`eq` is a {type(eq).__name__}: give what ms.minimize or ms.linearize returns."
        )
    if part not in ("nonaffine", "value"):
        raise InputError(f"`part` is {part!r}: give 'nonaffine' or 'value'.")
    minimum = eq.equilibrium if isinstance(eq, Linearization) else eq
    system = minimum.system
    if system.batch is not None:
        raise InputError(
            f"`eq` is a batch of {system.batch} minima, and sensitivity_map draws one: take one"
            " member of `eq` and of `response`, as in jax.tree.map(lambda leaf: leaf[0], eq)."
        )
    vectors = _check_response(response, part, system)
    if scale is not None and not 0 < scale < np.inf:
        raise InputError(
            f"`scale` is {scale}: give the drawn length of a unit arrow, above 0, or None."
        )
    return system, vectors, _find_rattlers(eq, response)


def _check_response(response: Displacement | ArrayLike, part: str, system: System) -> np.ndarray:
    """Return the vectors (n, d) to draw, or raise InputError if a response has no such vectors."""
    vectors: Any = response
    if isinstance(response, Displacement):
        vectors = response.positions if part == "value" else response.nonaffine
        if not is_leaf(vectors):
            raise InputError(
                "`response` is a derivative by all numbers of a tree: give that by one of them,"
                " from its method component."
            )
    elif isinstance(response, dict | Derivative):
        raise InputError(
            "`response` is a derivative by parameters (vjp, gradient): give a derivative of the"
            " positions, from jvp or response."
        )
    vectors = np.asarray(vectors, float)
    if vectors.shape != system.positions.shape:
        raise InputError(
            f"`response` has shape {vectors.shape} and the positions {system.positions.shape}:"
            " give one vector for each particle, from jvp or from one component, as in"
            " jacobian(eq, 'sigma').component('sigma[0]')."
        )
    bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        raise InputError(
            f"`response` is not finite for {int(bad.sum())} particles: look at its status."
        )
    return vectors


def _find_rattlers(
    eq: Equilibrium | Linearization, response: Displacement | ArrayLike
) -> np.ndarray:
    """Return a mask (n,) of the rattlers of a minimum.

    The mask is that of the response or of the linearized minimum; if there is neither of these, it
    is computed.
    """
    if isinstance(response, Displacement):
        rattlers = response.rattlers
    elif isinstance(eq, Linearization):
        rattlers = eq.network.rattlers
    else:
        rattlers = contacts.network(eq.system, eq.max_force, eq.contacts_needed).rattlers
    return np.asarray(rattlers, bool)


def _colors(system: System, diameters: np.ndarray, dark: bool) -> tuple[np.ndarray, Key]:
    """Return the colors (n, 4) of the particles, by species or diameter, and their legend.

    The legend is a list of names with colors, empty if all particles are alike or if there are too
    many species; or a color map with its range, for more diameters than the palette has colors.
    ``dark`` chooses the colors for a dark background.
    """
    from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgba_array

    palette = to_rgba_array(SPECIES_DARK if dark else SPECIES)
    if system.species is not None:
        kinds, kind_of = np.unique(np.asarray(system.species), return_inverse=True)
        names = [f"species {k}" for k in kinds]
        colors = palette[kinds % len(SPECIES)]
    else:
        kinds, kind_of = np.unique(diameters, return_inverse=True)
        names = [rf"$\sigma={k:.3g}$" for k in kinds] if len(kinds) > 1 else []
        colors = palette[np.arange(len(kinds)) % len(SPECIES)]
    if len(kinds) <= len(SPECIES):
        # strict=False: a single diameter has a color and no name
        return colors[kind_of], list(zip(names, colors, strict=False))
    if system.species is not None:  # more species than colors: the colors repeat, without a legend
        return colors[kind_of], []
    shades = LinearSegmentedColormap.from_list("diameter", DIAMETERS_DARK if dark else DIAMETERS)
    span = Normalize(diameters.min(), diameters.max())
    return shades(span(diameters)), Bar(shades, span, r"$\sigma$")
