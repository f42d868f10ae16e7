"""A design: its history, the configurations before and after, and how independent features are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.lattice import nearest_image
from mdsens.design import Design, FeatureResponse
from mdsens.elasticity import Moduli
from mdsens.mechanics.status import Status
from mdsens.mechanics.strain import basis, to_mandel
from mdsens.plots._style import ARROW, COLUMN, FONT, OUTLINE, PAPER
from mdsens.plots.maps import sensitivity_map
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity.derivatives import Linearization

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["before_after", "design_history", "feature_response", "nonaffine_field"]

TAKEN, REFUSED, BAND = "#2f6db3", "#c8553d", "#dbe6f2"
ROW = 1.1  # inches of one panel
FEW = 8  # parameters that are drawn one by one; more as their quantiles
SHADES = ("#2f6db3", "#c8553d", "#3d8f5f", "#8d6bb8", "#b8860b", "#4a4a4a", "#d17aa5", "#6aa6a6")


def design_history(
    of: Design, axes: Sequence[Axes] | None = None, *, title: str | None = None
) -> Any:
    """Draw a design step by step: each feature with its target and tolerance, the parameters, the
    trust region.

    A line joins the steps that were taken; steps refused are hollow. A square is a step that left
    its basin, a cross one at which too few members relaxed.

    Args:
      of: from ``ms.design.fit``.
      axes: one for each feature, one for the parameters and one for the trust region; None makes a
        figure with pyplot.
      title: above the picture; a status that is not good is named there in any case.

    Returns:
      the Axes.
    """
    if not isinstance(of, Design):
        raise InputError(f"got a {type(of).__name__}: give what ms.design.fit returns.")
    from matplotlib.ticker import LogLocator, MaxNLocator

    m, steps = len(of.names), of.history
    if axes is None:
        from matplotlib import pyplot

        size = (1.5 * COLUMN, ROW * (m + 2) + 0.5)
        _, axes = pyplot.subplots(m + 2, 1, figsize=size, sharex=True, layout="constrained")
    panels = list(axes)  # type: ignore[arg-type]
    if len(panels) != m + 2:
        raise InputError(
            f"axes are {len(panels)}: give {m + 2}, one a feature, one of parameters, one of the"
            " trust region."
        )
    number = np.arange(len(steps))
    taken = np.array([s.accepted for s in steps])
    left = np.array([bool(np.any(s.left_basin)) for s in steps])
    for k, ax in enumerate(panels[:m]):
        values = np.array([s.values[k] for s in steps])
        wanted, near = of.wanted[k], of.tolerance[k]
        ax.axhspan(wanted - near, wanted + near, color=BAND, zorder=0)
        ax.axhline(wanted, color=OUTLINE, linewidth=0.6, linestyle=(0, (4, 2)), zorder=1)
        ax.plot(number[taken], values[taken], color=TAKEN, linewidth=1.0, zorder=2)
        for chosen, color, fill in ((taken, TAKEN, TAKEN), (~taken, REFUSED, PAPER)):
            for basin, marker in ((False, "o"), (True, "s")):
                some = chosen & (left == basin) & np.isfinite(values)
                ax.plot(
                    number[some], values[some], linestyle="none", marker=marker, markersize=3.2, color=color,
                    markerfacecolor=fill, markeredgewidth=0.8, zorder=3,
                )  # fmt: skip
        lost = ~np.isfinite(values)
        ax.plot(
            number[lost],
            np.full(lost.sum(), wanted),
            linestyle="none",
            marker="x",
            color=REFUSED,
            zorder=3,
        )
        shown = np.append(values[taken], [wanted - near, wanted + near])
        room = 0.25 * float(np.ptp(shown)) or 1.0
        ax.set_ylim(shown.min() - room, shown.max() + room)  # what was refused may lie outside
        ax.set_ylabel(of.names[k].replace("_", " "), fontsize=FONT)
    _parameters(panels[m], of, number[taken], np.array([s.x for s in steps])[taken])
    trust, size = (np.array([getattr(s, name) for s in steps[1:]]) for name in ("trust", "size"))
    ax = panels[m + 1]
    if len(steps) > 1:
        if np.any(trust != 1.0):  # optimizers of optax have none
            ax.plot(number[1:], trust, color=OUTLINE, linewidth=1.0, label="trust region")
        ax.plot(
            number[1:],
            np.maximum(size, 1e-12),
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
    ax.set_ylabel("change", fontsize=FONT)
    ax.set_xlabel("relaxations", fontsize=FONT)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in panels:
        ax.tick_params(labelsize=FONT)
        ax.grid(linewidth=0.3, alpha=0.6)
    heading = ", ".join(
        [*([title] if title else []), *([] if of.status.good else [of.status.name])]
    )
    if heading:
        panels[0].set_title(heading, fontsize=FONT + 1)
    return panels


def _parameters(ax: Axes, of: Design, number: np.ndarray, x: np.ndarray) -> None:
    """Each parameter over its start, or the quantiles of many."""
    start = of.state.history[0].x
    moved = np.exp(x - start) if np.allclose(start, 0.0) else x - start
    if x.shape[1] <= FEW:
        for k, label in enumerate(of.labels):
            ax.plot(number, moved[:, k], linewidth=1.0, color=SHADES[k % len(SHADES)], label=label)
        ax.legend(fontsize=FONT - 1, frameon=False, ncols=min(len(of.labels), 5))
    else:
        low, below, middle, above, high = np.quantile(moved, (0.0, 0.25, 0.5, 0.75, 1.0), axis=1)
        ax.fill_between(number, low, high, color=BAND, linewidth=0, label="all")
        ax.fill_between(number, below, above, color="#a9c8e8", linewidth=0, label="half")
        ax.plot(number, middle, color=TAKEN, linewidth=1.0, label="median")
        ax.legend(fontsize=FONT - 1, frameon=False, ncols=3)
    ax.set_ylabel(
        "parameters\nover start" if np.allclose(start, 0.0) else "parameters\nless start",
        fontsize=FONT,
    )


def before_after(
    first: Equilibrium | Linearization,
    second: Equilibrium | Linearization,
    axes: tuple[Axes, Axes] | None = None,
    *,
    scale: float | None = None,
) -> tuple[Axes, Axes]:
    """Draw two configurations of the same particles side by side; arrows in the second are how far
    each has moved.

    Args:
      first, second: minima of the same number of particles, such as ``design.equilibria`` and where
        they began.
      axes: two Axes; None makes a figure of two columns with pyplot.
      scale: drawn length of an arrow of length 1; None so that they can be seen, 1 for true to
        scale.

    Returns:
      the two Axes.
    """
    minima = [at.equilibrium if isinstance(at, Linearization) else at for at in (first, second)]
    for at in minima:
        if not isinstance(at, Equilibrium):
            raise InputError(
                f"got a {type(at).__name__}: give two minima, of ms.minimize or of a design."
            )
    one, two = minima
    if one.positions.shape != two.positions.shape:
        raise InputError(
            f"the minima have {one.positions.shape} and {two.positions.shape}: give the same"
            " particles."
        )
    if axes is None:
        from matplotlib import pyplot

        _, made = pyplot.subplots(1, 2, figsize=(2 * COLUMN, 1.25 * COLUMN))
        axes = made[0], made[1]
    moved = np.asarray(nearest_image(two.positions - one.positions, two.system.box))
    moved = moved - np.median(moved, axis=0)
    sensitivity_map(first, np.zeros_like(moved), axes[0], title="before")
    sensitivity_map(second, moved, axes[1], scale=scale, label=r"$|\Delta R|$", title="after")
    return axes


def nonaffine_field(
    eq: Equilibrium | Linearization,
    moduli: Moduli,
    strain: Any = None,
    ax: Axes | None = None,
    *,
    scale: float | None = None,
    title: str | None = None,
) -> Axes:
    """Draw the non-affine displacements that go with a small strain, for a strain of 1.

    Args:
      eq: the minimum.
      moduli: of ``ms.elasticity.moduli`` there.
      strain: (d, d) symmetric; pure shear, xy = yx = 1/2, where None.
      ax, scale, title: as in ``sensitivity_map``.
    """
    if not isinstance(moduli, Moduli):
        raise InputError(f"got a {type(moduli).__name__}: give what ms.elasticity.moduli returns.")
    d = moduli.stress.shape[0]
    shear = np.zeros((d, d))
    shear[0, 1] = shear[1, 0] = 0.5
    given = shear if strain is None else np.asarray(strain, float)
    if given.shape != (d, d) or not np.allclose(given, given.T):
        raise InputError(f"strain has shape {given.shape}: give a symmetric ({d}, {d}) matrix.")
    assert basis(d).shape[0] == moduli.nonaffine.shape[0]
    field = np.tensordot(
        np.asarray(to_mandel(jnp.asarray(given))), np.asarray(moduli.nonaffine), axes=1
    )
    return sensitivity_map(
        eq, field, ax, scale=scale, label=r"$|\mathrm{d}u/\mathrm{d}\epsilon|$", title=title
    )


def feature_response(
    of: FeatureResponse, axes: tuple[Axes, Axes] | None = None
) -> tuple[Axes, Axes]:
    """Draw the singular values of the features' Jacobian, and each feature's susceptibility with
    the others held.

    The pale bar behind is the susceptibility of the feature alone; a feature without any bar cannot
    be moved alone.

    Args:
      of: from ``ms.design.feature_response``.
      axes: two Axes; None makes a figure of two columns with pyplot.
    """
    if not isinstance(of, FeatureResponse):
        raise InputError(
            f"got a {type(of).__name__}: give what ms.design.feature_response returns."
        )
    if axes is None:
        from matplotlib import pyplot

        _, made = pyplot.subplots(
            1, 2, figsize=(2 * COLUMN, 0.28 * len(of.names) + 1.5), layout="constrained"
        )
        axes = made[0], made[1]
    left, right = axes
    s = of.singular_values
    kept = np.arange(s.size) < of.rank
    left.semilogy(
        np.arange(1, s.size + 1), np.maximum(s, 1e-17), color=OUTLINE, linewidth=0.6, zorder=1
    )
    for chosen, fill in ((kept, TAKEN), (~kept, PAPER)):
        left.plot(
            np.arange(1, s.size + 1)[chosen], np.maximum(s, 1e-17)[chosen], linestyle="none", marker="o", color=TAKEN,
            markerfacecolor=fill, markersize=4,
        )  # fmt: skip
    said = "fully independent" if of.independent else f"rank {of.rank} of {len(of.names)}"
    left.set_title(f"singular values: {said}", fontsize=FONT + 1)
    left.set_xlabel("number", fontsize=FONT)
    left.set_xticks(np.arange(1, s.size + 1))
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
