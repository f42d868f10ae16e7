"""What stands below the picture of a configuration: colors, rattlers, and an arrow with its value."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mdsens.plots._style import ARROW, FONT, OUTLINE, PAPER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.quiver import Quiver

__all__ = ["ROW", "Foot", "legend", "rounded"]

ROW = 11.0  # points from one row of the legend to the next


class Foot(NamedTuple):
    """What stands below the picture, and in how many rows.

    Attributes:
      names: of the circles.
      bar: width of the color bar, as a fraction of the picture's.
      caption: of the scale arrow; empty without arrows.
      length: of the scale arrow, as a fraction of the picture's width.
    """

    names: list[str]
    bar: float
    caption: str
    length: float

    def rows(self, wide: float) -> tuple[int, int, int]:
        """Columns of the legend, the row of the scale arrow, and the number of rows, in a width in
        points.

        Widths are estimates: measuring text takes a renderer, which a figure has only when it is
          drawn.
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


def legend(ax: Axes, foot: Foot, key: Any, quiver: Quiver | None) -> None:
    """Below the picture: the colors, the rattlers where there are any, and an arrow with its value."""
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
        for x, side, text in (
            (-0.08, "right", rf"$\sigma$ {span.vmin:.2g}"),
            (1.08, "left", f"{span.vmax:.2g}"),
        ):
            bar.text(x, 0.4, text, ha=side, va="center", fontsize=FONT, transform=bar.transAxes)
    for name, tint in tints:
        handles.append(Circle((0, 0), facecolor=tint, edgecolor=OUTLINE, linewidth=0.5, label=name))
    if "rattler" in foot.names:
        dashed = Circle(
            (0, 0), facecolor=PAPER, edgecolor=OUTLINE, linewidth=0.7, linestyle=(0, (2, 1))
        )
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

    def dot(
        *_: Any, xdescent: float, ydescent: float, width: float, height: float, **__: Any
    ) -> Circle:
        return Circle((width / 2 - xdescent, height / 2 - ydescent), 0.55 * height)

    ax.legend(
        handles=[
            entry for k in range(columns) for entry in handles[k::columns]
        ],  # columns fill first, read rows first
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


def rounded(longest: float) -> tuple[float, str]:
    """The largest 1, 2 or 5 times a power of ten that is not above ``longest``, and how it is
    written.
    """
    power = int(np.floor(np.log10(longest)))
    digit = max(m for m in (1, 2, 5) if m == 1 or m * 10.0**power <= longest * (1 + 1e-9))
    value = digit * 10.0**power
    return value, f"{value:g}" if -3 <= power < 4 else rf"${digit}\times10^{{{power}}}$"
