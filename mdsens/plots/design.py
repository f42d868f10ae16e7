"""Draw an inverse design: its steps, configurations, and whether features are independent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.lattice import nearest_image
from mdsens.design import Design, FeatureResponse
from mdsens.mechanics.status import Status
from mdsens.plots._draw import drawn_diameters
from mdsens.plots._style import COLUMN, FONT, inks, title_with_status
from mdsens.plots.maps import Shade, draw_map, sensitivity_map
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity.derivatives import Linearization

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["before_after", "design_history", "feature_response"]

# opacity of the color of accepted steps, so that a band can be seen on every background
BAND = 0.25  # tolerance of a target, range of many parameters
HALF = 0.35  # range of the middle half of many parameters, over the former
ROW = 1.2  # inches: height of one panel
# names of features on the axes, with their units; other features have their own names and no unit
NAMES = {
    "poisson": "Poisson's ratio\n(no unit)",
    "bulk": "bulk modulus\n(energy/volume)",
    "shear": "shear modulus\n(energy/volume)",
    "young": "Young's modulus\n(energy/volume)",
    "pressure": "pressure\n(energy/volume)",
    "smallest_stiffness": "smallest stiffness\n(energy/length$^2$)",
}
SAME = 1e-9  # relative: diameters that differ by less are equal
FEW = 8  # as many parameters are drawn one by one; more are drawn as their quantiles
# colors of the parameters, FEW of them
SHADES = ("#2f6db3", "#c8553d", "#3d8f5f", "#8d6bb8", "#b8860b", "#4a4a4a", "#d17aa5", "#6aa6a6")


def design_history(
    of: Design, axes: Sequence[Axes] | None = None, *, title: str | None = None
) -> list[Axes]:
    """Draw an inverse design step by step: features with their targets, parameters, trust region.

    A feature is a property of the relaxed system that the design is to bring to a target value. A
    band shows the tolerance of a target. A line joins the accepted steps; refused steps are
    hollow. A square is a step at which particles rearranged, so that the minimum is in another
    basin; a cross is a step at which too few systems of the ensemble relaxed.

    Args:
      of: the design that ``ms.design.fit`` returned.
      axes: Axes, one for each feature, one for the parameters and one for the trust region; None
        makes a figure with pyplot.
      title: title of the figure; the name of a status that is not good is added to it in any case.

    Returns:
      the Axes.

    Raises:
      InputError: ``of`` is not a design, or the number of axes is wrong.
    """
    if not isinstance(of, Design):
        raise InputError(f"`of` is a {type(of).__name__}: give what ms.design.fit returns.")
    from matplotlib.ticker import MaxNLocator

    m = len(of.names)
    steps = of.history
    if axes is None:
        from matplotlib import pyplot

        size = (1.5 * COLUMN, ROW * (m + 2) + 0.5)
        _, axes = pyplot.subplots(m + 2, 1, figsize=size, sharex=True, layout="constrained")
    panels = list(axes)  # type: ignore[arg-type]
    if len(panels) != m + 2:
        raise InputError(
            f"`axes` has {len(panels)} Axes: give {m + 2}, one per feature, one for parameters,"
            " one for the trust region."
        )
    number = np.arange(len(steps))
    taken = np.array([s.accepted for s in steps])
    left = np.array([bool(np.any(s.left_basin)) for s in steps])
    for k, ax in enumerate(panels[:m]):
        _draw_feature(ax, of, k, taken, left)
    _draw_parameters(panels[m], of, number[taken], np.array([s.x for s in steps])[taken])
    _draw_changes(panels[m + 1], of)
    panels[-1].set_xlabel("number of relaxations", fontsize=FONT)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in panels:
        ax.margins(x=0.03)
        ax.tick_params(labelsize=FONT)
        ax.grid(linewidth=0.3, alpha=0.6)
    heading = title_with_status(title, of.status)
    if heading:
        panels[0].set_title(heading, fontsize=FONT + 1)
    return panels


def _draw_feature(ax: Axes, of: Design, k: int, taken: np.ndarray, left: np.ndarray) -> None:
    """Draw the values of one feature in the steps of an inverse design, with target and tolerance.

    Args:
      ax: the Axes to draw in.
      of: the design.
      k: index of the feature.
      taken: mask of the accepted steps.
      left: mask of the steps in which particles rearranged, so that a system relaxed to a minimum
        far from the one that linear response predicts.
    """
    colors = inks(ax)
    number = np.arange(taken.size)
    values = np.array([s.values[k] for s in of.history])
    wanted = of.wanted[k]
    low, high = wanted - of.tolerance[k], wanted + of.tolerance[k]
    ax.axhspan(low, high, color=colors.good, alpha=BAND, linewidth=0, zorder=0)
    ax.axhline(wanted, color=colors.outline, linewidth=0.6, linestyle=(0, (4, 2)), zorder=1)
    ax.plot(number[taken], values[taken], color=colors.good, linewidth=1.0, zorder=2)
    for chosen, color, fill in (
        (taken, colors.good, colors.good),
        (~taken, colors.bad, colors.paper),
    ):
        for basin, marker in ((False, "o"), (True, "s")):
            drawn = chosen & (left == basin) & np.isfinite(values)
            ax.plot(
                number[drawn],
                values[drawn],
                linestyle="none",
                marker=marker,
                markersize=3.2,
                color=color,
                markerfacecolor=fill,
                markeredgewidth=0.8,
                zorder=3,
            )
    lost = ~np.isfinite(values)  # too few members relaxed: drawn at the height of the target
    heights = np.full(lost.sum(), wanted)
    ax.plot(number[lost], heights, linestyle="none", marker="x", color=colors.bad, zorder=3)
    shown = np.append(values[taken & np.isfinite(values)], [low, high])
    room = 0.25 * float(np.ptp(shown)) or 1.0
    # the axis spans the accepted steps and the tolerance: refused steps may lie outside
    ax.set_ylim(shown.min() - room, shown.max() + room)
    ax.set_ylabel(NAMES.get(of.names[k], of.names[k].replace("_", " ")), fontsize=FONT)


def _draw_parameters(ax: Axes, of: Design, number: np.ndarray, x: np.ndarray) -> None:
    """Draw how each parameter changes in an inverse design; of many parameters, draw quantiles.

    Args:
      ax: the Axes to draw in.
      of: the design.
      number: (k,) numbers of the steps.
      x: (k, p) variables of the design (parameters or their logarithms) at these steps.
    """
    colors = inks(ax)
    start = of.state.history[0].x
    # of logarithms of parameter over start the ratio is drawn
    logarithmic = all(of.state.about["logarithms"])
    moved = np.exp(x - start) if logarithmic else x - start
    if x.shape[1] <= FEW:
        for k, label in enumerate(of.labels):
            ax.plot(number, moved[:, k], linewidth=1.0, color=SHADES[k % len(SHADES)], label=label)
        _legend_above(ax)
    else:
        low, below, middle, above, high = np.quantile(moved, (0.0, 0.25, 0.5, 0.75, 1.0), axis=1)
        band = {"color": colors.good, "linewidth": 0}
        ax.fill_between(number, low, high, alpha=BAND, label="all", **band)
        ax.fill_between(number, below, above, alpha=HALF, label="middle half", **band)
        ax.plot(number, middle, color=colors.good, linewidth=1.0, label="median")
        _legend_above(ax)
    label = "parameters\nover start" if logarithmic else "parameters\nless start"
    ax.set_ylabel(label, fontsize=FONT)


def _draw_changes(ax: Axes, of: Design) -> None:
    """Draw the size of each step of an inverse design, and the radius of the trust region.

    The size is the largest change of a variable. The start is left out.
    """
    from matplotlib.ticker import LogLocator

    colors = inks(ax)
    ax.set_ylabel("largest change\nof a variable", fontsize=FONT)
    if len(of.history) < 2:
        return
    number = np.arange(1, len(of.history))
    trust = np.array([s.trust for s in of.history[1:]])
    size = np.array([s.size for s in of.history[1:]])
    if np.any(trust != 1.0):  # optimizers of optax have no trust region: it stays 1
        ax.plot(number, trust, color=colors.outline, linewidth=1.0, label="trust region")
    ax.plot(
        number,
        np.maximum(size, 1e-12),  # a logarithmic axis has no zero
        linestyle="none",
        marker=".",
        color=colors.ink,
        label="step",
    )
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    _legend_above(ax)


def _legend_above(ax: Axes) -> None:
    """Draw the legend in one row or two above the frame, where it covers no data."""
    entries = len(ax.get_legend_handles_labels()[1])
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=entries if entries <= 5 else -(-entries // 2),
        fontsize=FONT - 1,
        frameon=False,
        borderpad=0.0,
        borderaxespad=0.2,
        handlelength=1.4,
        columnspacing=1.2,
    )


def before_after(
    first: Equilibrium | Linearization,
    second: Equilibrium | Linearization,
    axes: tuple[Axes, Axes] | None = None,
    *,
    scale: float | None = None,
) -> tuple[Axes, Axes]:
    """Draw two configurations of the same particles side by side, with the displacements as arrows.

    The arrows are in the second picture. The median displacement is subtracted, so that a
    translation of all particles does not show. Where diameters differ, the colors of the second
    picture are their relative changes, blue for particles that became smaller and red for those
    that grew.

    Args:
      first, second: minima of the same particles, such as the start of a design and one of its
        ``design.equilibria``.
      axes: two Axes; None makes a figure of two columns with pyplot.
      scale: drawn length of an arrow of length 1; None chooses a length at which the arrows can be
        seen, 1 draws the displacements true to scale.

    Returns:
      the two Axes.

    Raises:
      InputError: arguments that are not minima, or minima of different shapes.
    """
    minima = [x.equilibrium if isinstance(x, Linearization) else x for x in (first, second)]
    for minimum in minima:
        if not isinstance(minimum, Equilibrium):
            raise InputError(
                f"`first` or `second` is a {type(minimum).__name__}: give two minima, from"
                " ms.minimize or from a design."
            )
    before, after = minima
    if before.positions.shape != after.positions.shape:
        raise InputError(
            f"`first` and `second` have positions of shape {before.positions.shape} and"
            f" {after.positions.shape}: give two minima of the same particles."
        )
    if axes is None:
        from matplotlib import pyplot

        # in inches: two pictures of one column, with a gap, two rows of legend and a title
        gap, foot, head = 0.1, 0.5, 0.25
        size = (2 * COLUMN + gap, COLUMN + foot + head)
        figure = pyplot.figure(figsize=size)
        place = (COLUMN / size[0], COLUMN / size[1])
        made = [
            figure.add_axes((left / size[0], foot / size[1], *place)) for left in (0, COLUMN + gap)
        ]
        axes = made[0], made[1]
    displacement = after.positions - before.positions
    moved = np.asarray(nearest_image(displacement, after.system.box, after.system.periodic))
    moved = moved - np.median(moved, axis=0)
    sensitivity_map(first, np.zeros_like(moved), axes[0], title="before")
    grown = drawn_diameters(after.system) / drawn_diameters(before.system) - 1.0
    # without diameters, the circles of a picture are as large as its particles are apart
    same = after.system.diameters is None or np.abs(grown).max() < SAME
    shade = None if same else Shade(100.0 * grown, r"$\Delta\sigma$", " %")
    draw_map(second, moved, axes[1], scale=scale, label=r"$|\Delta R|$", title="after", shade=shade)
    return axes


def feature_response(
    of: FeatureResponse, axes: tuple[Axes, Axes] | None = None
) -> tuple[Axes, Axes]:
    """Draw the singular values of the features' Jacobian, and each feature's susceptibilities.

    A feature is a property of a relaxed system; the Jacobian is the matrix of derivatives of the
    features by the parameters. The dark bar is the susceptibility of a feature (its change for a
    parameter change of norm 1) while the other features are kept constant. The pale bar behind the
    dark one is the susceptibility without this condition. A feature without a dark bar cannot be
    changed alone.

    Args:
      of: the result of ``ms.design.feature_response``.
      axes: two Axes; None makes a figure of two columns with pyplot.

    Returns:
      the two Axes.

    Raises:
      InputError: ``of`` is not the result of ``ms.design.feature_response``.
    """
    if not isinstance(of, FeatureResponse):
        raise InputError(
            f"`of` is a {type(of).__name__}: give what ms.design.feature_response returns."
        )
    if axes is None:
        from matplotlib import pyplot

        size = (2 * COLUMN, 0.28 * len(of.names) + 1.5)  # a pair of bars needs 0.28 inches
        _, made = pyplot.subplots(1, 2, figsize=size, layout="constrained")
        axes = made[0], made[1]
    left, right = axes
    colors = inks(left)
    s = of.singular_values
    number = np.arange(1, s.size + 1)
    in_rank = number <= of.rank  # descending: the singular values that count as non-zero come first
    real = s[in_rank] if in_rank.any() else np.ones(1)
    # half a decade around the singular values of the rank; those that are zero but for round-off,
    # 1e-16 and the like, stand at the foot of the axis, where they do not squash the others
    low, high = real.min() / 5.0, real.max() * 3.0
    left.set(yscale="log", ylim=(low, high))
    left.plot(number[in_rank], real, "o-", color=colors.good, linewidth=0.8, markersize=4)
    lost = number[~in_rank]
    left.plot(
        lost,
        np.full(lost.size, 1.5 * low),
        linestyle="none",
        marker="v",
        color=colors.bad,
        markerfacecolor=colors.paper,
        markersize=5,
    )
    for k in lost:
        left.annotate(
            f"zero: {s[k - 1]:.0e}",
            (k, 1.5 * low),
            (-6, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=FONT,
            color=colors.bad,
        )
    rank = "fully independent" if of.independent else f"rank {of.rank} of {len(of.names)}"
    left.set_title(f"features' Jacobian: {rank}", fontsize=FONT + 1)
    left.set_xlabel("number of the singular value", fontsize=FONT)
    left.set_ylabel("singular value\n(features in their scales)", fontsize=FONT)
    left.set_xticks(number)
    left.set_xlim(0.6, s.size + 0.4)
    places = np.arange(len(of.names))[::-1]
    right.barh(places, of.free, color=colors.good, alpha=BAND, label="others may change")
    right.barh(places, of.susceptibility, height=0.45, color=colors.good, label="others held")
    right.set_yticks(places, [name.replace("_", " ") for name in of.names])
    shown = np.concatenate([of.free, of.susceptibility])
    shown = shown[shown > 0] if (shown > 0).any() else np.ones(1)
    right.set_xscale("log")
    right.set_xlim(0.3 * float(shown.min()), 1.5 * float(shown.max()))
    _label_log_axis(right)
    unit = "susceptibility (scale of the feature\nby unit change of the variables)"
    right.set_xlabel(unit, fontsize=FONT)
    _legend_above(right)
    for ax in axes:
        ax.tick_params(labelsize=FONT)
        ax.grid(linewidth=0.3, alpha=0.6)
        ax.set_axisbelow(True)
    if not of.status.good:
        left.set_title(Status(of.status).name, fontsize=FONT + 1)
    return axes


def _label_log_axis(ax: Axes) -> None:
    """Label the logarithmic horizontal axis at 1, 2 and 5 times powers of ten, or at powers alone.

    The powers alone are labeled where the axis spans more than two decades.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = ax.get_xlim()
    short = high / low < 100.0
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if short else (1.0,)))
    ax.xaxis.set_minor_locator(NullLocator())
    if short:
        ax.xaxis.set_major_formatter("{x:g}")
