"""Draw an inverse design: its steps, configurations, and whether features are independent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.lattice import nearest_image
from mdsens.design import Design, FeatureResponse
from mdsens.mechanics.status import Status
from mdsens.plots._style import ARROW, COLUMN, FONT, OUTLINE, PAPER, title_with_status
from mdsens.plots.maps import sensitivity_map
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity.derivatives import Linearization

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["before_after", "design_history", "feature_response"]

TAKEN = "#2f6db3"  # steps that the design went on from
REFUSED = "#c8553d"
BAND = "#dbe6f2"  # tolerance of a target, range of many parameters
HALF = "#a9c8e8"  # range of the middle half of many parameters
ROW = 1.1  # inches: height of one panel
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
    panels[-1].set_xlabel("relaxations", fontsize=FONT)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in panels:
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
    number = np.arange(taken.size)
    values = np.array([s.values[k] for s in of.history])
    wanted = of.wanted[k]
    low, high = wanted - of.tolerance[k], wanted + of.tolerance[k]
    ax.axhspan(low, high, color=BAND, zorder=0)
    ax.axhline(wanted, color=OUTLINE, linewidth=0.6, linestyle=(0, (4, 2)), zorder=1)
    ax.plot(number[taken], values[taken], color=TAKEN, linewidth=1.0, zorder=2)
    for chosen, color, fill in ((taken, TAKEN, TAKEN), (~taken, REFUSED, PAPER)):
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
    ax.plot(number[lost], heights, linestyle="none", marker="x", color=REFUSED, zorder=3)
    shown = np.append(values[taken & np.isfinite(values)], [low, high])
    room = 0.25 * float(np.ptp(shown)) or 1.0
    # the axis spans the accepted steps and the tolerance: refused steps may lie outside
    ax.set_ylim(shown.min() - room, shown.max() + room)
    ax.set_ylabel(of.names[k].replace("_", " "), fontsize=FONT)


def _draw_parameters(ax: Axes, of: Design, number: np.ndarray, x: np.ndarray) -> None:
    """Draw how each parameter changes in an inverse design; of many parameters, draw quantiles.

    Args:
      ax: the Axes to draw in.
      of: the design.
      number: (k,) numbers of the steps.
      x: (k, p) variables of the design (parameters or their logarithms) at these steps.
    """
    start = of.state.history[0].x
    # of logarithms of parameter over start the ratio is drawn
    logarithmic = all(of.state.about["logarithms"])
    moved = np.exp(x - start) if logarithmic else x - start
    if x.shape[1] <= FEW:
        for k, label in enumerate(of.labels):
            ax.plot(number, moved[:, k], linewidth=1.0, color=SHADES[k % len(SHADES)], label=label)
        ax.legend(fontsize=FONT - 1, frameon=False, ncols=min(len(of.labels), 5))
    else:
        low, below, middle, above, high = np.quantile(moved, (0.0, 0.25, 0.5, 0.75, 1.0), axis=1)
        ax.fill_between(number, low, high, color=BAND, linewidth=0, label="all")
        ax.fill_between(number, below, above, color=HALF, linewidth=0, label="half")
        ax.plot(number, middle, color=TAKEN, linewidth=1.0, label="median")
        ax.legend(fontsize=FONT - 1, frameon=False, ncols=3)
    label = "parameters\nover start" if logarithmic else "parameters\nless start"
    ax.set_ylabel(label, fontsize=FONT)


def _draw_changes(ax: Axes, of: Design) -> None:
    """Draw the size of each step of an inverse design, and the radius of the trust region.

    The size is the largest change of a variable. The start is left out.
    """
    from matplotlib.ticker import LogLocator

    ax.set_ylabel("change", fontsize=FONT)
    if len(of.history) < 2:
        return
    number = np.arange(1, len(of.history))
    trust = np.array([s.trust for s in of.history[1:]])
    size = np.array([s.size for s in of.history[1:]])
    if np.any(trust != 1.0):  # optimizers of optax have no trust region: it stays 1
        ax.plot(number, trust, color=OUTLINE, linewidth=1.0, label="trust region")
    ax.plot(
        number,
        np.maximum(size, 1e-12),  # a logarithmic axis has no zero
        linestyle="none",
        marker=".",
        color=ARROW,
        label="step",
    )
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.legend(fontsize=FONT - 1, frameon=False, ncols=2, loc="best")


def before_after(
    first: Equilibrium | Linearization,
    second: Equilibrium | Linearization,
    axes: tuple[Axes, Axes] | None = None,
    *,
    scale: float | None = None,
) -> tuple[Axes, Axes]:
    """Draw two configurations of the same particles side by side, with the displacements as arrows.

    The arrows are in the second picture. The median displacement is subtracted, so that a
    translation of all particles does not show.

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

        _, made = pyplot.subplots(1, 2, figsize=(2 * COLUMN, 1.25 * COLUMN))
        axes = made[0], made[1]
    displacement = after.positions - before.positions
    moved = np.asarray(nearest_image(displacement, after.system.box, after.system.periodic))
    moved = moved - np.median(moved, axis=0)
    sensitivity_map(first, np.zeros_like(moved), axes[0], title="before")
    sensitivity_map(second, moved, axes[1], scale=scale, label=r"$|\Delta R|$", title="after")
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
    s = of.singular_values
    number = np.arange(1, s.size + 1)
    heights = np.maximum(s, 1e-17)  # a logarithmic axis has no zero
    in_rank = number <= of.rank  # descending: the singular values that count as non-zero come first
    left.semilogy(number, heights, color=OUTLINE, linewidth=0.6, zorder=1)
    for chosen, fill in ((in_rank, TAKEN), (~in_rank, PAPER)):
        left.plot(
            number[chosen],
            heights[chosen],
            linestyle="none",
            marker="o",
            color=TAKEN,
            markerfacecolor=fill,
            markersize=4,
        )
    rank = "fully independent" if of.independent else f"rank {of.rank} of {len(of.names)}"
    left.set_title(f"singular values: {rank}", fontsize=FONT + 1)
    left.set_xlabel("number", fontsize=FONT)
    left.set_xticks(number)
    places = np.arange(len(of.names))[::-1]
    right.barh(places, of.free, color=BAND, label="nothing held")
    right.barh(places, of.susceptibility, height=0.45, color=TAKEN, label="others held")
    right.set_yticks(places, [name.replace("_", " ") for name in of.names])
    shown = np.concatenate([of.free, of.susceptibility])
    right.set_xscale("log")
    right.set_xlim(left=0.3 * float(np.min(shown[shown > 0], initial=1.0)))
    right.minorticks_off()
    left.minorticks_off()
    right.set_title("susceptibility", fontsize=FONT + 1)
    right.legend(fontsize=FONT - 1, frameon=False)
    for ax in axes:
        ax.tick_params(labelsize=FONT)
        ax.grid(linewidth=0.3, alpha=0.6)
    if not of.status.good:
        left.set_title(Status(of.status).name, fontsize=FONT + 1)
    return axes
