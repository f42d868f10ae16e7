"""Elastic moduli by direction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mdsens._util.errors import InputError
from mdsens.elasticity import Moduli, directional
from mdsens.mechanics.stability import isotropic_part
from mdsens.plots._style import ARROW, COLUMN, FONT, OUTLINE

if TYPE_CHECKING:
    from matplotlib.projections.polar import PolarAxes

__all__ = ["moduli"]

STEPS = 361
YOUNG, POISSON = "#2f6db3", "#c8553d"


def moduli(
    of: Moduli,
    axes: tuple[PolarAxes, PolarAxes] | None = None,
    *,
    birch: bool = False,
    title: str | None = None,
) -> Any:
    """Draw E(angle) and nu(angle) of a 2-D solid as polar curves: circles where it is isotropic.

    The thin grey circle is that of the isotropic part. Of Poisson's ratio the radius is |nu|,
    dashed where nu < 0.

    Args:
      of: from ``ms.elasticity.moduli``, in 2-D.
      axes: two polar Axes to draw in; None makes a figure of two columns with pyplot.
      birch: of Birch's tensor in place of A; the titles say which.
      title: above the picture.

    Returns:
      the two Axes.

    Raises:
      InputError: something else than Moduli, or moduli in 3-D.
    """
    if not isinstance(of, Moduli):
        raise InputError(f"got a {type(of).__name__}: give what ms.elasticity.moduli returns.")
    if of.stress.shape[0] != 2:
        raise InputError("moduli by angle are drawn in 2-D: in 3-D take ms.elasticity.directional.")
    if axes is None:
        import matplotlib.pyplot as plt

        look = {"projection": "polar"}
        _, axes = plt.subplots(
            1, 2, figsize=(2 * COLUMN, 1.15 * COLUMN), subplot_kw=look, layout="constrained"
        )
    assert axes is not None
    tensor = of.birch if birch else of.tensor
    from matplotlib.ticker import MaxNLocator

    angle = np.linspace(0.0, 2.0 * np.pi, STEPS)
    curves = [
        np.asarray(x)
        for x in directional(tensor, np.stack([np.cos(angle), np.sin(angle)], axis=-1))
    ]
    mean = isotropic_part(tensor, of.round_off)
    convention = "Birch's tensor" if birch else "tensor $A$"
    names = (f"Young's modulus $E$, {convention}", rf"Poisson's ratio $\nu$, {convention}")
    for ax, curve, level, color, name in zip(
        axes, curves, (mean.young, mean.poisson), (YOUNG, POISSON), names, strict=True
    ):
        ax.plot(angle, np.full(STEPS, abs(float(level))), color=OUTLINE, linewidth=0.8, zorder=1.5)
        for sign, dash in ((1.0, "-"), (-1.0, (0, (3, 2)))):
            ax.plot(
                angle,
                np.where(sign * curve >= 0, np.abs(curve), np.nan),
                color=color,
                linestyle=dash,
                linewidth=1.4,
            )
        sizes = np.abs([*curve, float(level)])  # NaN where there is nothing to divide by
        ax.set_ylim(0.0, 1.15 * float(np.max(sizes[np.isfinite(sizes)], initial=0.0)) or 1.0)
        ax.set_rlabel_position(22.5)
        ax.yaxis.set_major_locator(MaxNLocator(4, prune="upper"))
        ax.tick_params(labelsize=FONT)
        ax.grid(linewidth=0.4, alpha=0.6)
        ax.set_title(f"{name}; isotropic part {float(level):.3g}", fontsize=FONT + 1, color=ARROW)
    if title:
        axes[0].figure.suptitle(title, fontsize=FONT + 2)
    return axes
