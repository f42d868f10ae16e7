"""Polar curves of the elastic moduli of a 2-D solid, and the non-affine field of a strain."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from mdsens._util.errors import InputError
from mdsens.elasticity import Moduli, directional
from mdsens.mechanics.stability import isotropic_part
from mdsens.mechanics.strain import basis, to_mandel
from mdsens.plots._style import COLUMN, FONT, Inks, inks
from mdsens.plots.maps import sensitivity_map
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity.linearization import Linearization

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.projections.polar import PolarAxes
    from numpy.typing import ArrayLike

__all__ = ["moduli", "nonaffine_field"]

STEPS = 361  # angles from 0 to 2 pi, both included: one a degree


def moduli(
    of: Moduli,
    axes: tuple[PolarAxes, PolarAxes] | None = None,
    *,
    birch: bool = False,
    title: str | None = None,
) -> tuple[PolarAxes, PolarAxes]:
    """Draw Young's modulus and Poisson's ratio of a 2-D solid by angle, as two polar curves.

    The curves are circles for an isotropic solid. The thin gray circle is the value that the
    isotropic part of the elastic tensor gives. For Poisson's ratio nu the radius is |nu|, and the
    curve is dashed where nu < 0.

    Args:
      of: the moduli, from ``ms.elasticity.moduli``, in 2-D.
      axes: two polar Axes to draw in; None makes a figure of two columns with pyplot.
      birch: whether to draw the moduli of Birch's tensor, the derivative of the stress by the
        strain. If False, those of ``moduli.tensor`` are drawn, the second derivative of the energy
        by strain. The titles name the tensor. The two tensors differ under a stress, see
        :mod:`mdsens.elasticity`.
      title: text above the picture.

    Returns:
      the two Axes.

    Raises:
      InputError: ``of`` is not a Moduli, or it is of a system in 3-D.
    """
    if not isinstance(of, Moduli):
        raise InputError(f"`of` is a {type(of).__name__}: give what ms.elasticity.moduli returns.")
    if of.stress.shape[0] != 2:
        raise InputError(
            "`of` is of a 3-D solid, and moduli are drawn by angle in 2-D only: in 3-D take"
            " ms.elasticity.directional."
        )
    if axes is None:
        import matplotlib.pyplot as plt

        _, axes = plt.subplots(
            1,
            2,
            figsize=(2 * COLUMN, 1.15 * COLUMN),
            subplot_kw={"projection": "polar"},
            layout="constrained",
        )
    assert axes is not None
    tensor = of.birch if birch else of.tensor
    angle = np.linspace(0.0, 2.0 * np.pi, STEPS)
    directions = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    curves = [np.asarray(curve) for curve in directional(tensor, directions)]
    mean = isotropic_part(tensor, of.round_off)
    convention = "Birch's tensor" if birch else "tensor $A$"
    colors = inks(axes[0])
    names = (
        r"Young's modulus $E$ (energy/length$^2$)",
        r"Poisson's ratio $\nu$ (no unit)",
    )
    shades = (colors.good, colors.bad)
    for ax, curve, level, color, name in zip(
        axes, curves, (mean.young, mean.poisson), shades, names, strict=True
    ):
        _draw_by_angle(ax, angle, curve, float(level), color, colors)
        ax.set_title(
            f"{name}\n{convention}; isotropic part {float(level):.3g} (gray)",
            fontsize=FONT + 1,
            color=colors.ink,
        )
    if title:
        axes[0].figure.suptitle(title, fontsize=FONT + 2)
    return axes


def _draw_by_angle(
    ax: PolarAxes, angle: np.ndarray, curve: np.ndarray, level: float, color: str, colors: Inks
) -> None:
    """Draw a modulus or ratio by angle as a polar curve, dashed where it is negative.

    Args:
      ax: the polar Axes to draw in.
      angle: (k,) angles in radians.
      curve: (k,) the values at these angles, whose absolute values are drawn.
      level: the value that the isotropic part of the elastic tensor gives, drawn as a gray circle.
      color: color of the curve.
      colors: the colors of the figure.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import MaxNLocator

    ax.plot(angle, np.full(angle.size, abs(level)), color=colors.outline, linewidth=0.8, zorder=1.5)
    for sign, dash in ((1.0, "-"), (-1.0, (0, (3, 2)))):
        # NaN breaks the line where the curve has the other sign
        radius = np.where(sign * curve >= 0, np.abs(curve), np.nan)
        ax.plot(angle, radius, color=color, linestyle=dash, linewidth=1.4)
    sizes = np.abs([*curve, level])  # NaN for ratios of moduli that are zero
    ax.set_ylim(0.0, 1.15 * float(np.max(sizes[np.isfinite(sizes)], initial=0.0)) or 1.0)
    ax.yaxis.set_major_locator(MaxNLocator(4, prune="upper"))
    # in degrees: between the lines at 0 and 45 degrees, with a rim that parts them from the curve
    ax.set_rlabel_position(22.5)
    ax.yaxis.set_zorder(2.5)
    for name in ax.get_yticklabels():
        name.set_path_effects([withStroke(linewidth=2.0, foreground=colors.paper)])
    ax.tick_params(labelsize=FONT)
    ax.grid(linewidth=0.4, alpha=0.6)


def nonaffine_field(
    eq: Equilibrium | Linearization,
    moduli: Moduli,
    strain: ArrayLike | None = None,
    ax: Axes | None = None,
    *,
    scale: float | None = None,
    title: str | None = None,
) -> Axes:
    """Draw the non-affine displacements u of the particles under a strain, to first order.

    They are the derivative du/dstrain times the strain.

    Args:
      eq: the minimum.
      moduli: the result of ``ms.elasticity.moduli`` at this minimum.
      strain: (d, d) symmetric matrix; None for pure shear, xy = yx = 1/2.
      ax, scale, title: as in ``sensitivity_map``.

    Returns:
      the Axes.

    Raises:
      InputError: ``moduli`` is not the result of ``ms.elasticity.moduli``, or the strain has
        another shape or is not symmetric.
    """
    if not isinstance(moduli, Moduli):
        raise InputError(
            f"`moduli` is a {type(moduli).__name__}: give what ms.elasticity.moduli returns."
        )
    d = moduli.stress.shape[0]
    shear = np.zeros((d, d))
    shear[0, 1] = shear[1, 0] = 0.5
    matrix = shear if strain is None else np.asarray(strain, float)
    if matrix.shape != (d, d) or not np.allclose(matrix, matrix.T):
        raise InputError(
            f"`strain` has shape {matrix.shape} or is not symmetric: give a symmetric ({d}, {d})"
            " matrix."
        )
    # nonaffine is (m, n, d) by the m Mandel components of the strain
    assert basis(d).shape[0] == moduli.nonaffine.shape[0]
    mandel = np.asarray(to_mandel(jnp.asarray(matrix)))
    field = np.tensordot(mandel, np.asarray(moduli.nonaffine), axes=1)
    return sensitivity_map(
        eq, field, ax, scale=scale, label=r"$|\mathrm{d}u/\mathrm{d}\epsilon|$", title=title
    )
