"""Curves that judge: the error of a derivative over steps, unrolled or not, and the stiffness of
the softest modes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mdsens._util.errors import InputError
from mdsens.plots._style import ARROW, COLUMN, FONT, OUTLINE, PAPER
from mdsens.verify import DerivativeTest, Unrolled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["derivative_test", "stiffness_spectrum", "unrolled"]

HEIGHT = 2.5  # inches
GOOD, BAD = "#2f6db3", "#c8553d"  # apart in lightness and hue under every common color blindness
# of participation: dark where few particles move, and its palest end, of plane waves, is rare
MODES = "viridis"
MARKER, CROWDED = 4.0, 2.5  # points; the second for more modes than MANY
MANY = 80
BAND = 0.14  # of the axis, for modes of no stiffness
FLOOR = 1e-17  # of an error: what is less is drawn there
# of the largest value given; the softest real modes near jamming are at 1e-6, null ones at 1e-16
NULL = 1e-9


def derivative_test(
    test: DerivativeTest, ax: Axes | None = None, *, title: str | None = None
) -> Axes:
    """Draw the error of central differences against their step, on logarithmic axes: a V for a
    right derivative.

    Its left arm is round-off of the minima, error ~ 1/t; its right arm is truncation, error ~ t^2,
    with the exponent fitted where it shows. The dashed line is the first change of a contact to
    first order: beyond it a difference says nothing. Steps within which a contact changed are
    hollow, steps that did not relax are crosses. A wrong derivative shows as a floor.

    Args:
      test: of ``ms.verify.derivative_test``.
      ax: where to draw; None makes a figure of one column with pyplot.
      title: above the picture. A status that is not good is named there in any case.

    Returns:
      the Axes.

    Raises:
      InputError: something else than a test.
    """
    if not isinstance(test, DerivativeTest):
        raise InputError(
            f"got a {type(test).__name__}: give what ms.verify.derivative_test returns."
        )
    ax = _column() if ax is None else ax
    steps, errors = (
        test.steps,
        np.nan_to_num(np.clip(test.errors, FLOOR, None), nan=1.0, posinf=1.0),
    )
    relaxed = np.array([status.good for status in test.statuses])
    ax.set(xscale="log", yscale="log", xlim=(steps.min() / 2, steps.max() * 2))
    ax.set_ylim(errors.min() / 5, max(errors.max(), 100 * errors.min()) * 5)
    ax.plot(steps[relaxed], errors[relaxed], color=OUTLINE, linewidth=0.6, zorder=1.5)
    for chosen, marker, fill, edge, name in (
        (test.sound, "o", GOOD, GOOD, "same contacts"),
        (relaxed & test.network_changed, "o", PAPER, BAD, "contacts changed"),
        (~relaxed, "x", BAD, BAD, "not relaxed"),
    ):
        if chosen.any():
            look: dict[str, Any] = {
                "marker": marker,
                "markerfacecolor": fill,
                "markeredgecolor": edge,
            }
            ax.plot(
                steps[chosen],
                errors[chosen],
                linestyle="none",
                markersize=MARKER,
                label=name,
                zorder=2,
                **look,
            )
    if test.slope is not None:
        t, e = steps[test.branch], errors[test.branch]
        middle = np.sqrt(t[0] * t[-1]), np.sqrt(e[0] * e[-1])
        ax.annotate(
            rf"$\propto t^{{{test.slope:.1f}}}$",
            middle,
            (-7, 2),
            textcoords="offset points",
            fontsize=FONT,
            ha="right",
        )
    marked = steps.min() / 2 < test.radius < steps.max() * 2
    if marked:
        _mark(ax, test.radius)
    ax.set_xlabel("step $t$", fontsize=FONT)
    ax.set_ylabel("relative error", fontsize=FONT)
    heading = [*([title] if title else []), *([] if test.status.good else [test.status.name])]
    _finish(ax, ", ".join(heading), legend=True, pad=FONT + 6.0 if marked else 6.0)
    return ax


def unrolled(found: Unrolled, ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Draw the error of an unrolled derivative over the steps of the minimizer, and the force left,
    on log axes.

    The error is relative to the implicit derivative: above the dashed line at 1 nothing of it is
    right. Hollow points stand where the run was chaotic so far, its growth a step above 0.

    Args:
      found: of ``ms.verify.unrolled``.
      ax: where to draw; None makes a figure of one column with pyplot.
      title: above the picture. A status that is not good is named there in any case.

    Returns:
      the Axes.

    Raises:
      InputError: something else than what ``ms.verify.unrolled`` returns.
    """
    if not isinstance(found, Unrolled):
        raise InputError(f"got a {type(found).__name__}: give what ms.verify.unrolled returns.")
    ax = _column() if ax is None else ax
    steps, errors = (
        found.steps,
        np.nan_to_num(np.clip(found.errors, FLOOR, None), nan=1.0, posinf=1.0),
    )
    chaotic = found.growth > 0
    ax.set(xscale="log", yscale="log", xlim=(steps.min() / 1.5, steps.max() * 1.5))
    ax.axhline(1.0, color=ARROW, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1.2)
    ax.plot(steps, errors, color=OUTLINE, linewidth=0.6, zorder=1.5)
    for chosen, fill, edge, name in (
        (~chaotic, GOOD, GOOD, "error"),
        (chaotic, PAPER, BAD, "error, chaotic so far"),
    ):
        if chosen.any():
            look: dict[str, Any] = {"marker": "o", "markerfacecolor": fill, "markeredgecolor": edge}
            ax.plot(
                steps[chosen],
                errors[chosen],
                linestyle="none",
                markersize=MARKER,
                label=name,
                zorder=2,
                **look,
            )
    forces = np.clip(found.max_forces, FLOOR, None)
    ax.plot(
        steps,
        forces,
        color=OUTLINE,
        linewidth=0.8,
        linestyle=":",
        label="largest force",
        zorder=1.4,
    )
    ax.set_xlabel("steps of the minimizer", fontsize=FONT)
    ax.set_ylabel("relative error, force", fontsize=FONT)
    heading = [*([title] if title else []), *([] if found.status.good else [found.status.name])]
    _finish(ax, ", ".join(heading), legend=True)
    return ax


def _mark(ax: Axes, radius: float) -> None:
    """A vertical dashed line at the first contact change, named above the frame, where no point can
    be.
    """
    ax.axvline(radius, color=ARROW, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1.2)
    low, high = np.log(ax.get_xlim())
    side = (np.log(radius) - low) / (high - low)
    ax.annotate(
        "first contact change",
        (radius, 1.0),
        (0, 2),
        xycoords=ax.get_xaxis_transform(),
        textcoords="offset points",
        ha="left" if side < 0.25 else "right" if side > 0.75 else "center",
        va="bottom",
        fontsize=FONT,
        color=ARROW,
    )


def stiffness_spectrum(
    given: Any,
    ax: Axes | None = None,
    *,
    participation: Any = None,
    null: float | None = None,
    title: str | None = None,
) -> Axes:
    """Draw the stiffness of each mode, the eigenvalues of the Hessian in rising order, on a
    logarithmic axis.

    Modes that cost nothing (translations, rattlers) stand as hollow circles in a band at the
    bottom, whatever their round-off is; negative ones, which no minimum has, are triangles at their
    size, pointing down. Nothing is computed: values and participation are what an eigensolver gave.

    Args:
      given: a Certificate; or (k,) eigenvalues, all or the lowest, in any order, energy a length
        squared.
      ax: where to draw; None makes a figure of one column with pyplot.
      participation: (k,) participation ratios p = (sum_i e_i^2)^2 / (n sum_i e_i^4), e_i the size
        of particle i's part: 1 for a mode that moves all alike, 1/n for one that moves a single
        particle. They color the modes; a certificate brings its own.
      null: size up to which a value counts as zero; where None, the certificate's, or 1e-9 of the
        largest one given.
      title: above the picture.

    Returns:
      the Axes.

    Raises:
      InputError: values that are no finite vector, participation of another shape or outside 0 to
        1, null below 0.
    """
    from matplotlib.ticker import MaxNLocator

    values = getattr(given, "spectrum", given)
    if participation is None and hasattr(given, "participation"):
        participation = given.participation
    if null is None and hasattr(values, "floor"):
        null = max(values.floor, 1e-12 * values.largest)
    rising, ratios = _spectrum(getattr(values, "values", values), participation)
    if null is not None and not 0 <= null < np.inf:
        raise InputError(f"null is {null}: give a size, 0 or above, or None.")
    ax = _column() if ax is None else ax
    size, mode = np.abs(rising), np.arange(1, rising.size + 1)
    zero = size <= (NULL * size.max() if null is None else null)
    negative, stiff = (rising < 0) & ~zero, (rising > 0) & ~zero
    real = size[~zero] if (~zero).any() else np.ones(1)
    margin = max(1.5, (12.0 * real.min() / real.max()) ** 0.5)  # an axis of a decade, at least
    low, top = real.min() / margin, real.max() * margin
    bottom = low * (low / top) ** (BAND / (1.0 - BAND)) if zero.any() else low
    beside = max(0.7, 0.02 * rising.size)
    ax.set(yscale="log", xlim=(1.0 - beside, rising.size + beside), ylim=(bottom, top))
    _decades(ax, low, top, np.sqrt(bottom * low) if zero.any() else None)
    dot = MARKER if rising.size <= MANY else CROWDED
    look: dict[str, Any] = {"markersize": dot, "linestyle": "none"}
    if zero.any():
        ax.axhspan(bottom, low, color=OUTLINE, alpha=0.12, linewidth=0, zorder=1)
        hollow = {
            "markerfacecolor": PAPER,
            "markeredgecolor": OUTLINE,
            "markeredgewidth": 0.2 * dot,
        }
        there = np.full(zero.sum(), np.sqrt(bottom * low))
        ax.plot(mode[zero], there, "o", label=f"{zero.sum()} of no stiffness", **look, **hollow)
    if negative.any():
        name = rf"{negative.sum()} negative, at $|\lambda|$"
        ax.plot(
            mode[negative],
            size[negative],
            "v",
            color=BAD,
            label=name,
            **{**look, "markersize": dot + 1},
        )
    if ratios is None and stiff.any():
        ax.plot(mode[stiff], size[stiff], "o", color=GOOD, label=f"{stiff.sum()} stable", **look)
    elif ratios is not None and stiff.any():
        _colored(ax, mode[stiff], size[stiff], ratios[stiff], dot)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set_xlabel("mode", fontsize=FONT)
    ax.set_ylabel(r"stiffness $\lambda$ (energy/length$^2$)", fontsize=FONT)
    _finish(ax, title or "", legend=bool(zero.any() or negative.any()))
    return ax


def _decades(ax: Axes, low: float, top: float, zero: float | None) -> None:
    """Ticks at the decades (and at 2 and 5 of few) between ``low`` and ``top`` alone, and a 0 where
    the band is.
    """
    from matplotlib.ticker import FixedLocator, NullFormatter

    powers = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(top)) + 1)
    every = (10.0 ** powers[:, None] * np.arange(1, 10)).ravel()
    every = every[(every >= low) & (every <= top)]
    leading = np.round(every / 10.0 ** np.floor(np.log10(every) + 1e-9))
    major = every[leading == 1]
    major = major[:: max(-(-major.size // 8), 1)]
    labels = [rf"$10^{{{np.log10(t):.0f}}}$" for t in major]
    if major.size < 2:
        major = every[np.isin(leading, (1, 2, 5))]
        labels = [f"{t:.0e}" if t < 1e-3 or t >= 1e4 else f"{t:g}" for t in major]
    ticks = [*major]
    if zero is not None:
        ticks, labels = [zero, *ticks], ["0", *labels]
    ax.set_yticks(ticks, labels)
    ax.yaxis.set_minor_locator(FixedLocator(list(every)))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _spectrum(values: Any, participation: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Values in rising order and their participation ratios, checked."""
    try:
        given = np.asarray(values, float)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"values are of type {type(values).__name__}: give a Certificate, or a vector of"
            " eigenvalues."
        ) from error
    if given.ndim != 1 or given.size == 0 or not np.isfinite(given).all():
        raise InputError(
            f"values have shape {given.shape}: give a vector of eigenvalues, finite, at least one."
        )
    order = np.argsort(given, kind="stable")
    if participation is None:
        return given[order], None
    ratios = np.asarray(participation, float)
    if ratios.shape != given.shape:
        raise InputError(
            f"participation has shape {ratios.shape} and the values {given.shape}: give one ratio a"
            " value."
        )
    if not ((ratios >= 0) & (ratios <= 1 + 1e-9)).all():
        raise InputError(
            "participation has ratios outside 0 to 1: give p = (sum e_i^2)^2 / (n sum e_i^4)."
        )
    return given[order], ratios[order]


def _colored(ax: Axes, mode: np.ndarray, size: np.ndarray, ratios: np.ndarray, dot: float) -> None:
    """The modes in the colors of their participation, with a bar that explains them."""
    dots = ax.scatter(
        mode, size, s=dot**2, c=ratios, cmap=MODES, vmin=0.0, vmax=1.0, zorder=2, linewidths=0
    )
    figure = ax.get_figure(root=True)
    assert figure is not None
    bar = figure.colorbar(dots, ax=ax, pad=0.03, aspect=28)
    bar.outline.set_linewidth(0.5)  # type: ignore[operator]
    bar.ax.tick_params(labelsize=FONT, width=0.5, length=2)
    bar.set_label("participation ratio", fontsize=FONT)


def _column() -> Axes:
    """A new figure one column wide."""
    from matplotlib import pyplot

    return pyplot.figure(figsize=(COLUMN, HEIGHT), layout="constrained").add_subplot()


def _finish(ax: Axes, heading: str, legend: bool, pad: float = 6.0) -> None:
    if legend:
        ax.legend(fontsize=FONT, frameon=False, handletextpad=0.1, borderpad=0.2, labelspacing=0.3)
    if heading:
        ax.set_title(heading, fontsize=FONT + 1, pad=pad)
    ax.tick_params(labelsize=FONT, width=0.6)
    ax.tick_params(which="minor", width=0.4)
    ax.spines[:].set_linewidth(0.6)
    ax.spines[["top", "right"]].set_visible(False)
