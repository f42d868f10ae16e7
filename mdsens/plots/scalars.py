"""Draw one number for each particle: as its color on the configuration, and as a histogram."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mdsens._util.errors import InputError
from mdsens.plots._draw import (
    draw_circles,
    draw_frame,
    draw_rings,
    drawn_diameters,
    new_axes,
    read_indices,
)
from mdsens.plots._legend import Foot, legend
from mdsens.plots._style import COLUMN, DIVERGING, FONT, inks, title_with_status
from mdsens.plots._view import extent, in_slab, layers, project
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity.linearization import Linearization

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from numpy.typing import ArrayLike

    from mdsens.plots._style import Inks

__all__ = ["histogram", "scalar_map"]

HEIGHT = 2.5  # inches
BESIDE = 1.0  # inches: room for the color bar with its numbers and name
BINS = (8, 40)  # the fewest and the most bars of a histogram


def scalar_map(
    eq: Equilibrium | Linearization,
    values: ArrayLike,
    ax: Axes | None = None,
    *,
    label: str | None = None,
    limit: float | None = None,
    axis: int = 2,
    slab: tuple[float, float] = (0.0, 1.0),
    changed: int | Sequence[int] | None = None,
    title: str | None = None,
) -> Axes:
    """Draw one number for each particle of a minimum as the color of its circle.

    Such a number is the derivative of a property of the relaxed system by the particle's diameter,
    dG/dsigma_i. Blue is negative, white zero and red positive; both ends of the color map are at
    the same distance from zero. Particles are circles, drawn to scale in the cell, as in
    ``sensitivity_map``. A particle whose value is NaN is hollow and dashed. Nothing is computed.

    Args:
      eq: the minimum, from ``minimize`` or ``linearize``; not a batch.
      values: (n,) one number for each particle, such as ``ms.vjp(eq, cotangent).value["sigma"]``.
      ax: the Axes to draw in; None makes a figure with pyplot, of one column and a color bar.
      label: name of the quantity, and its unit, beside the color bar; None writes none.
      limit: the value at the ends of the color map, which stands for all that are beyond it. Give
        it to compare figures, or where a few values are much larger than all others. None takes
        the largest absolute value.
      axis, slab: in 3-D, the direction of view and the part of the depth to draw, as in
        ``sensitivity_map``. Colors do not fade with the distance, because they show the values.
      changed: index of a particle that a colored ring is drawn around, or several indices.
      title: title of the figure. The name of a status that is not good is added to it in any case.

    Returns:
      the Axes of the configuration.

    Raises:
      InputError: a batch, values of another shape or infinite, bad options.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    if not isinstance(eq, Equilibrium | Linearization):
        raise InputError(
            f"`eq` is a {type(eq).__name__}: give what ms.minimize or ms.linearize returns."
        )
    minimum = eq.equilibrium if isinstance(eq, Linearization) else eq
    system = minimum.system
    if system.batch is not None:
        raise InputError(
            f"`eq` is a batch of {system.batch} minima, and scalar_map draws one: take one member"
            " of it, as in jax.tree.map(lambda leaf: leaf[0], eq)."
        )
    number = _read_numbers(values, (system.n,))
    if limit is not None and not 0 < limit < np.inf:
        raise InputError(
            f"`limit` is {limit}: give the value at the ends of the color map, above 0, or None."
        )
    marked = read_indices(changed, system.n)
    diameters = drawn_diameters(system)
    view = project(system, axis)
    shown = in_slab(system, view.depth, slab)
    known = np.isfinite(number)
    if limit is None:
        # all values zero or NaN: any range shows them as they are
        limit = float(np.abs(number[shown & known]).max(initial=0.0)) or 1.0
    span = Normalize(-limit, limit)
    shades = ScalarMappable(span, colormaps[DIVERGING])
    fill = shades.to_rgba(np.where(known, number, 0.0))

    low, high = extent(view, shown, diameters / 2)
    margin = 0.01 * float((high - low).max())
    low, high = low - margin, high + margin
    names = [*(["changed"] if (shown & marked).any() else [])]
    foot = Foot(names=names, bar=0.0, caption="", length=0.0)
    heading = title_with_status(title, minimum.status)
    if ax is None:
        ax = new_axes(low, high, foot, bool(heading), BESIDE)
    colors = inks(ax)
    if heading:
        ax.set_title(heading, fontsize=FONT + 1, color=colors.ink)
    draw_frame(ax, view, low, high, colors)
    slices = layers(view.depth, shown) if system.dimension == 3 else [shown]
    for layer in slices:
        draw_circles(ax, view, layer & known, diameters, fill, 0.0, colors)
        draw_circles(ax, view, layer & ~known, diameters, None, 0.0, colors)
        draw_rings(ax, view, layer & marked, diameters, colors)
    beyond = bool((np.abs(number[shown & known]) > limit * (1 + 1e-9)).any())
    _draw_bar(ax, shades, label, beyond, colors)
    legend(ax, foot, [], None, colors)
    return ax


def _draw_bar(
    ax: Axes, shades: ScalarMappable, label: str | None, beyond: bool, colors: Inks
) -> None:
    """Draw a color bar at the right of a picture, as high as the picture.

    Args:
      ax: the Axes of the picture.
      shades: the color map with its range.
      label: name of the quantity, or None.
      beyond: whether there are values beyond the ends; they are then pointed.
      colors: the colors of the figure.
    """
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    figure = ax.get_figure(root=True)
    assert figure is not None
    # in fractions of the picture, which stays as it is where the Axes shrink to keep the aspect
    place = ax.inset_axes((1.03, 0.0, 0.045, 1.0))
    bar = figure.colorbar(shades, cax=place, extend="both" if beyond else "neither")
    bar.locator = MaxNLocator(5, symmetric=True)
    numbers = ScalarFormatter(useMathText=True)
    numbers.set_powerlimits((-2, 4))  # outside of 0.01 to 10,000 a power of ten above the bar
    bar.formatter = numbers
    bar.update_ticks()
    bar.outline.set(linewidth=0.5, edgecolor=colors.outline)  # type: ignore[operator]
    place.tick_params(labelsize=FONT, width=0.5, length=2, color=colors.ink, labelcolor=colors.ink)
    place.yaxis.get_offset_text().set(fontsize=FONT, color=colors.ink)
    if label:
        place.set_ylabel(label, fontsize=FONT + 1, color=colors.ink)


def histogram(
    values: ArrayLike,
    ax: Axes | None = None,
    *,
    label: str | None = None,
    bins: int | None = None,
    title: str | None = None,
) -> Axes:
    """Draw how often values occur, with their mean and its standard error.

    The values may be one for each particle, or one for each of many packings. The line is the mean,
    the band around it the mean with its standard error to both sides, s / sqrt(k) for k values of
    standard deviation s. This is the error of the mean of independent values; those of the
    particles of one packing are correlated, and their mean is known less well. The dashed line is
    at zero. NaN is left out, and counted in the legend.

    Args:
      values: the numbers, of any shape.
      ax: the Axes to draw in; None makes a figure of one column with pyplot.
      label: name of the quantity, and its unit, below the axis; None writes "value".
      bins: number of bars; None takes the square root of the number of values, from 8 to 40.
      title: title of the figure.

    Returns:
      the Axes.

    Raises:
      InputError: no finite value, infinite values, ``bins`` below 1.
    """
    numbers = _read_numbers(values, None).ravel()
    kept = numbers[~np.isnan(numbers)]
    k = kept.size
    if k == 0:
        raise InputError("`values` has no number to draw: give at least one that is not NaN.")
    if bins is not None and (int(bins) != bins or bins < 1):
        raise InputError(f"`bins` is {bins!r}: give the number of bars, 1 or more, or None.")
    if ax is None:
        from matplotlib import pyplot

        ax = pyplot.figure(figsize=(COLUMN, HEIGHT), layout="constrained").add_subplot()
    colors = inks(ax)
    count = int(np.clip(np.ceil(np.sqrt(k)), *BINS)) if bins is None else int(bins)
    ax.hist(kept, count, color=colors.good, alpha=0.55, edgecolor=colors.paper, linewidth=0.5)
    left, right = ax.get_xlim()
    if left < 0 < right:
        ax.axvline(0.0, color=colors.outline, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1.4)
    mean = float(kept.mean())
    error = float(kept.std(ddof=1) / np.sqrt(k)) if k > 1 else np.nan
    if k > 1:
        ax.axvspan(mean - error, mean + error, color=colors.bad, alpha=0.35, linewidth=0)
    name = f"mean {_with_error(mean, error)}, {k:,} value{'s' if k > 1 else ''}"
    if k < numbers.size:
        name += f", {numbers.size - k:,} NaN"
    ax.axvline(mean, color=colors.bad, linewidth=1.4, label=name)
    ax.set_xlabel(label or "value", fontsize=FONT + 1)
    ax.set_ylabel("number of values", fontsize=FONT)
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),  # above the frame, where it covers no bar
        fontsize=FONT,
        frameon=False,
        borderpad=0.0,
        borderaxespad=0.3,
        handlelength=1.2,
    )
    if title:
        ax.set_title(title, fontsize=FONT + 1, pad=2.0 * FONT)
    ax.tick_params(labelsize=FONT, width=0.6)
    ax.spines[:].set_linewidth(0.6)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _with_error(mean: float, error: float) -> str:
    """Write a mean with its standard error, to two digits of the error, as in 0.123 ± 0.045."""
    if not error > 0:  # zero, or NaN of a single value
        return f"{mean:.3g}" if np.isnan(error) else f"{mean:.3g} ± 0"
    power = int(np.floor(np.log10(max(abs(mean), error))))
    digits = 1 - int(np.floor(np.log10(error)))  # after the point, for two digits of the error
    if -3 <= power < 5:
        decimals = max(digits, 0)
        return f"{mean:.{decimals}f} ± {error:.{decimals}f}"
    scale, decimals = 10.0**power, max(digits + power, 0)
    return rf"({mean / scale:.{decimals}f} ± {error / scale:.{decimals}f}) $\times10^{{{power}}}$"


def _read_numbers(values: ArrayLike, shape: tuple[int, ...] | None) -> np.ndarray:
    """Return values as an array of floats, of a given shape where ``shape`` is not None.

    Raises:
      InputError: values that are no real numbers, of another shape, or infinite.
    """
    try:
        numbers = np.asarray(values, float)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"`values` is a {type(values).__name__}: give an array of reals."
        ) from error
    if shape is not None and numbers.shape != shape:
        raise InputError(
            f"`values` has shape {numbers.shape}: give one number for each particle, {shape}, such"
            ' as ms.vjp(eq, cotangent).value["sigma"].'
        )
    if np.isinf(numbers).any():
        raise InputError(f"`values` has {int(np.isinf(numbers).sum())} infinite values.")
    return numbers
