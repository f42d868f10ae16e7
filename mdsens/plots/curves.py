"""Draw curves: the error of a derivative over step size or steps, the stiffness of the modes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mdsens._util.errors import InputError
from mdsens.plots._style import COLUMN, FONT, Inks, inks, title_with_status
from mdsens.verify import DerivativeTest, Unrolled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike


__all__ = ["derivative_test", "stiffness_spectrum", "unrolled"]

HEIGHT = 2.5  # inches
# Color map of the participation ratio: dark where few particles move; its palest end, of plane
# waves, is rare.
MODES = "viridis"
MARKER = 4.0  # points
CROWDED = 2.5  # points, for more modes than MANY
MANY = 80
BAND = 0.14  # height of the band for modes without stiffness, as a fraction of the axis
FLOOR = 1e-17  # a smaller error is drawn here: a logarithmic axis has no zero
# Relative to the largest eigenvalue: smaller ones count as zero. The softest real modes near
# jamming are at 1e-6, null ones at 1e-16.
NULL = 1e-9


def derivative_test(
    test: DerivativeTest, ax: Axes | None = None, *, title: str | None = None
) -> Axes:
    """Draw the error of central differences against their step t, on logarithmic axes.

    For a right derivative the curve is a V. Its left arm is round-off of the minima, error ~ 1/t;
    its right arm is truncation, error ~ t^2, labeled with the fitted exponent where enough of the
    arm is visible. The error of a wrong derivative stays above a constant value at every step. The
    dashed line is the step at which the first contact changes, to first order; at longer steps a
    difference quotient is no test of the derivative. Points are hollow where a contact changed
    within the step, and crosses where a minimization did not converge.

    Args:
      test: the result of ``ms.verify.derivative_test``.
      ax: the Axes to draw in; None makes a figure of one column with pyplot.
      title: title of the figure. The name of a status that is not good is added to it in any case.

    Returns:
      the Axes.

    Raises:
      InputError: an argument that is not the result of ``ms.verify.derivative_test``.
    """
    if not isinstance(test, DerivativeTest):
        raise InputError(
            f"`test` is a {type(test).__name__}: give what ms.verify.derivative_test returns."
        )
    ax = _column() if ax is None else ax
    colors = inks(ax)
    steps = test.steps
    # a NaN would leave no point in the picture; it is drawn as an error of all of the value
    errors = np.nan_to_num(np.clip(test.errors, FLOOR, None), nan=1.0, posinf=1.0)
    relaxed = np.array([status.good for status in test.statuses])
    ax.set(xscale="log", yscale="log", xlim=(steps.min() / 2, steps.max() * 2))
    # two decades at least, so that small scatter about a constant error does not fill the axis
    ax.set_ylim(errors.min() / 5, max(errors.max(), 100 * errors.min()) * 5)
    ax.plot(steps[relaxed], errors[relaxed], color=colors.outline, linewidth=0.6, zorder=1.5)
    for chosen, marker, fill, edge, name in (
        (test.sound, "o", colors.good, colors.good, "same contacts"),
        (relaxed & test.network_changed, "o", colors.paper, colors.bad, "contacts changed"),
        (~relaxed, "x", colors.bad, colors.bad, "not relaxed"),
    ):
        if chosen.any():
            _points(ax, steps[chosen], errors[chosen], marker, fill, edge, name)
    if test.slope is not None:
        t = steps[test.branch]
        e = errors[test.branch]
        middle = np.sqrt(t[0] * t[-1]), np.sqrt(e[0] * e[-1])  # of the arm, on logarithmic axes
        ax.annotate(
            rf"$\propto t^{{{test.slope:.1f}}}$",
            middle,
            (-7, 2),
            textcoords="offset points",
            fontsize=FONT,
            ha="right",
        )
    marked = steps.min() / 2 < test.radius < steps.max() * 2  # within the limits of the axis
    if marked:
        _mark_contact_change(ax, test.radius, colors)
    ax.set_xlabel("step $t$", fontsize=FONT)
    ax.set_ylabel("relative error", fontsize=FONT)
    # where the mark has its name above the frame, the title goes above that
    _finish(
        ax, title_with_status(title, test.status), legend=True, pad=FONT + 6.0 if marked else 6.0
    )
    return ax


def unrolled(found: Unrolled, ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Draw the error of an unrolled derivative and the residual force over the minimizer's steps.

    An unrolled derivative is the derivative of the positions after a number of steps. The axes are
    logarithmic. The error is relative to the implicit derivative: above the dashed line at 1 no
    digit of the unrolled derivative is right. A point is hollow where the run was chaotic up to
    that step: small displacements grew, so that their growth rate was above 0.

    Args:
      found: the result of ``ms.verify.unrolled``.
      ax: the Axes to draw in; None makes a figure of one column with pyplot.
      title: title of the figure. The name of a status that is not good is added to it in any case.

    Returns:
      the Axes.

    Raises:
      InputError: an argument that is not the result of ``ms.verify.unrolled``.
    """
    if not isinstance(found, Unrolled):
        raise InputError(
            f"`found` is a {type(found).__name__}: give what ms.verify.unrolled returns."
        )
    ax = _column() if ax is None else ax
    colors = inks(ax)
    steps = found.steps
    # a NaN would leave no point in the picture; it is drawn as an error of all of the value
    errors = np.nan_to_num(np.clip(found.errors, FLOOR, None), nan=1.0, posinf=1.0)
    chaotic = found.growth > 0
    ax.set(xscale="log", yscale="log", xlim=(steps.min() / 1.5, steps.max() * 1.5))
    ax.axhline(1.0, color=colors.ink, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1.2)
    ax.plot(steps, errors, color=colors.outline, linewidth=0.6, zorder=1.5)
    for chosen, fill, edge, name in (
        (~chaotic, colors.good, colors.good, "error"),
        (chaotic, colors.paper, colors.bad, "error, chaotic so far"),
    ):
        if chosen.any():
            _points(ax, steps[chosen], errors[chosen], "o", fill, edge, name)
    forces = np.clip(found.max_forces, FLOOR, None)
    ax.plot(
        steps,
        forces,
        color=colors.outline,
        linewidth=0.8,
        linestyle=":",
        label="largest force",
        zorder=1.4,
    )
    ax.set_xlabel("steps of the minimizer", fontsize=FONT)
    ax.set_ylabel("relative error (no unit), force (energy/length)", fontsize=FONT)
    _finish(ax, title_with_status(title, found.status), legend=True)
    return ax


def _points(
    ax: Axes, x: np.ndarray, y: np.ndarray, marker: str, fill: str, edge: str, name: str
) -> None:
    """Draw points at (x, y) with one marker and color, and with a name for the legend."""
    # a dict: pyright rejects these keywords written out
    look: dict[str, Any] = {"marker": marker, "markerfacecolor": fill, "markeredgecolor": edge}
    ax.plot(x, y, linestyle="none", markersize=MARKER, label=name, zorder=2, **look)


def _mark_contact_change(ax: Axes, radius: float, colors: Inks) -> None:
    """Draw a dashed vertical line at the step of central differences where a contact first changes.

    The name of the line is above the frame of the figure, where it hides no point.
    """
    ax.axvline(radius, color=colors.ink, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1.2)
    low, high = np.log(ax.get_xlim())
    place = (np.log(radius) - low) / (high - low)  # from 0 at the left end of the axis to 1
    # near an end of the axis the name runs toward the middle, so that it stays in the figure
    if place < 0.25:
        alignment = "left"
    elif place > 0.75:
        alignment = "right"
    else:
        alignment = "center"
    ax.annotate(
        "first contact change",
        (radius, 1.0),
        (0, 2),
        xycoords=ax.get_xaxis_transform(),
        textcoords="offset points",
        ha=alignment,
        va="bottom",
        fontsize=FONT,
        color=colors.ink,
    )


def stiffness_spectrum(
    given: Any,
    ax: Axes | None = None,
    *,
    participation: ArrayLike | None = None,
    null: float | None = None,
    title: str | None = None,
) -> Axes:
    """Draw the stiffness of each mode: the eigenvalues of the Hessian in rising order.

    The axis is logarithmic. Zero modes (translations, rattlers) are hollow circles in a band at the
    bottom, whatever value round-off gave them. Negative eigenvalues, which no minimum has, are
    triangles that point down, at their absolute value. Nothing is computed: eigenvalues and
    participation ratios are drawn as the eigensolver gave them.

    Args:
      given: a Certificate of ``ms.certify``; or (k,) eigenvalues of the Hessian, all or the lowest,
        in any order, in units of energy over length squared.
      ax: the Axes to draw in; None makes a figure of one column with pyplot.
      participation: (k,) participation ratios p = (sum_i e_i^2)^2 / (n sum_i e_i^4), where e_i is
        the length of particle i's displacement in the mode: 1 for a mode that moves all particles
        alike, 1/n for a mode that moves a single particle. The ratios color the modes. None takes
        the ratios of a certificate; eigenvalues without ratios have one color.
      null: absolute value up to which an eigenvalue counts as zero; None takes the certificate's,
        or 1e-9 of the largest eigenvalue given.
      title: title of the figure.

    Returns:
      the Axes.

    Raises:
      InputError: values that are no finite vector, ``participation`` of another shape or outside 0
        to 1, ``null`` below 0.
    """
    from matplotlib.ticker import MaxNLocator

    rising, ratios, null = _read_spectrum(given, participation, null)
    ax = _column() if ax is None else ax
    colors = inks(ax)
    size = np.abs(rising)
    mode = np.arange(1, rising.size + 1)
    zero = size <= null
    negative = (rising < 0) & ~zero
    stiff = (rising > 0) & ~zero
    bottom, low, top = _choose_limits(size, zero)
    beside = max(0.7, 0.02 * rising.size)  # room left and right of the points, in modes
    ax.set(yscale="log", xlim=(1.0 - beside, rising.size + beside), ylim=(bottom, top))
    middle_of_band = np.sqrt(bottom * low)
    _set_ticks(ax, low, top, middle_of_band if zero.any() else None)
    dot = MARKER if rising.size <= MANY else CROWDED
    look: dict[str, Any] = {"markersize": dot, "linestyle": "none"}
    if zero.any():
        ax.axhspan(bottom, low, color=colors.outline, alpha=0.12, linewidth=0, zorder=1)
        hollow = {
            "markerfacecolor": colors.paper,
            "markeredgecolor": colors.outline,
            "markeredgewidth": 0.2 * dot,
        }
        heights = np.full(zero.sum(), middle_of_band)
        ax.plot(mode[zero], heights, "o", label=f"{zero.sum()} of no stiffness", **look, **hollow)
    if negative.any():
        name = rf"{negative.sum()} negative, at $|\lambda|$"
        larger = {**look, "markersize": dot + 1}
        ax.plot(mode[negative], size[negative], "v", color=colors.bad, label=name, **larger)
    if stiff.any():
        if ratios is None:
            name = f"{stiff.sum()} stable"
            ax.plot(mode[stiff], size[stiff], "o", color=colors.good, label=name, **look)
        else:
            _draw_by_participation(ax, mode[stiff], size[stiff], ratios[stiff], dot, colors)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set_xlabel("mode", fontsize=FONT)
    ax.set_ylabel(r"stiffness $\lambda$ (energy/length$^2$)", fontsize=FONT)
    _finish(ax, title or "", legend=bool(zero.any() or negative.any()))
    return ax


def _read_spectrum(
    given: Any, participation: ArrayLike | None, null: float | None
) -> tuple[np.ndarray, np.ndarray | None, float]:
    """Check the arguments of ``stiffness_spectrum``, and replace those that are None.

    Where the eigenvalues are from a certificate, the replacements are from it, too.

    Returns:
      the eigenvalues in rising order, their participation ratios or None, and the absolute value up
      to which an eigenvalue counts as zero.

    Raises:
      InputError: the errors listed in ``stiffness_spectrum``.
    """
    values = getattr(given, "spectrum", given)
    if participation is None and hasattr(given, "participation"):
        participation = given.participation
    if null is None and hasattr(values, "floor"):
        null = max(values.floor, 1e-12 * values.largest)
    rising, ratios = _sort_spectrum(getattr(values, "values", values), participation)
    if null is None:
        return rising, ratios, NULL * np.abs(rising).max()
    if not 0 <= null < np.inf:
        raise InputError(
            f"`null` is {null}: give the absolute value up to which an eigenvalue counts as zero, 0"
            " or above, or None."
        )
    return rising, ratios, null


def _sort_spectrum(
    values: ArrayLike, participation: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Check eigenvalues and participation ratios, and sort both by the eigenvalues, ascending."""
    try:
        spectrum = np.asarray(values, float)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"`given` is a {type(values).__name__}: give a Certificate, or a vector of eigenvalues."
        ) from error
    if spectrum.ndim != 1 or spectrum.size == 0 or not np.isfinite(spectrum).all():
        raise InputError(
            f"`given` has shape {spectrum.shape} or is not finite: give a vector of finite"
            " eigenvalues, at least one."
        )
    order = np.argsort(spectrum, kind="stable")
    if participation is None:
        return spectrum[order], None
    ratios = np.asarray(participation, float)
    if ratios.shape != spectrum.shape:
        raise InputError(
            f"`participation` has shape {ratios.shape} and the eigenvalues {spectrum.shape}: give"
            " one ratio for each eigenvalue."
        )
    # 1e-9 above 1: round-off of a mode that moves all particles alike
    if not ((ratios >= 0) & (ratios <= 1 + 1e-9)).all():
        raise InputError(
            "`participation` has ratios outside 0 to 1: give (sum_i e_i^2)^2 / (n sum_i e_i^4),"
            " with e_i the displacement of particle i in the mode."
        )
    return spectrum[order], ratios[order]


def _choose_limits(size: np.ndarray, zero: np.ndarray) -> tuple[float, float, float]:
    """Choose the limits of the logarithmic stiffness axis, with a band for modes without stiffness.

    Args:
      size: (k,) absolute values of the eigenvalues.
      zero: (k,) mask of the eigenvalues that count as zero.

    Returns:
      the lower end of the band, its upper end, and the upper end of the axis. Without eigenvalues
      that count as zero, the band is empty.
    """
    real = size[~zero] if (~zero).any() else np.ones(1)
    margin = max(1.5, (12.0 * real.min() / real.max()) ** 0.5)  # an axis of a decade, at least
    low = real.min() / margin
    top = real.max() * margin
    # the band from bottom to low takes the fraction BAND of the axis in log(value)
    bottom = low * (low / top) ** (BAND / (1.0 - BAND)) if zero.any() else low
    return bottom, low, top


def _set_ticks(ax: Axes, low: float, top: float, zero: float | None) -> None:
    """Set the ticks of the logarithmic stiffness axis, from ``low`` to ``top``.

    Ticks are at powers of ten; where fewer than two of these are in the range, at 1, 2 and 5 times
    powers of ten. A tick labeled 0 is at the height ``zero``, in the band of modes without
    stiffness; ``zero`` is None if there is no such band.
    """
    from matplotlib.ticker import FixedLocator, NullFormatter

    powers = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(top)) + 1)
    minor = (10.0 ** powers[:, None] * np.arange(1, 10)).ravel()
    minor = minor[(minor >= low) & (minor <= top)]
    # leading digit; 1e-9, because the logarithm of a power of ten may round below the integer
    leading = np.round(minor / 10.0 ** np.floor(np.log10(minor) + 1e-9))
    major = minor[leading == 1]
    major = major[:: max(-(-major.size // 8), 1)]  # every second, third ... of more than 8 decades
    labels = [rf"$10^{{{np.log10(t):.0f}}}$" for t in major]
    if major.size < 2:
        major = minor[np.isin(leading, (1, 2, 5))]
        labels = [f"{t:.0e}" if t < 1e-3 or t >= 1e4 else f"{t:g}" for t in major]
    ticks = [*major]
    if zero is not None:
        ticks = [zero, *ticks]
        labels = ["0", *labels]
    ax.set_yticks(ticks, labels)
    ax.yaxis.set_minor_locator(FixedLocator(list(minor)))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _draw_by_participation(
    ax: Axes, mode: np.ndarray, size: np.ndarray, ratios: np.ndarray, dot: float, colors: Inks
) -> None:
    """Draw the stiffness of modes as points colored by participation ratio, with a color bar.

    Args:
      ax: the Axes to draw in.
      mode: (k,) numbers of the modes, the horizontal axis.
      size: (k,) their stiffness, the vertical axis.
      ratios: (k,) their participation ratios, from 0 to 1.
      dot: size of the points.
      colors: the colors of the figure.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    # the darkest part of the color map cannot be told from a dark background
    shades = ListedColormap(colormaps[MODES](np.linspace(0.3 if colors.dark else 0.0, 1.0, 256)))
    dots = ax.scatter(
        mode, size, s=dot**2, c=ratios, cmap=shades, vmin=0.0, vmax=1.0, zorder=2, linewidths=0
    )
    figure = ax.get_figure(root=True)
    assert figure is not None
    bar = figure.colorbar(dots, ax=ax, pad=0.03, aspect=28)
    bar.outline.set_linewidth(0.5)  # type: ignore[operator]
    bar.ax.tick_params(labelsize=FONT, width=0.5, length=2)
    bar.set_label("participation ratio", fontsize=FONT)


def _column() -> Axes:
    """Make a figure one column wide, and return its Axes."""
    from matplotlib import pyplot

    return pyplot.figure(figsize=(COLUMN, HEIGHT), layout="constrained").add_subplot()


def _finish(ax: Axes, title: str, legend: bool, pad: float = 6.0) -> None:
    """Set the legend and title of a figure, and the sizes of its ticks and frame.

    ``pad`` is the distance of the title from the frame, in points.
    """
    if legend:
        ax.legend(fontsize=FONT, frameon=False, handletextpad=0.1, borderpad=0.2, labelspacing=0.3)
    if title:
        ax.set_title(title, fontsize=FONT + 1, pad=pad)
    ax.tick_params(labelsize=FONT, width=0.6)
    ax.tick_params(which="minor", width=0.4)
    ax.spines[:].set_linewidth(0.6)
    ax.spines[["top", "right"]].set_visible(False)
