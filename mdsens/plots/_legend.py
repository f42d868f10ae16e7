"""The legend below the picture of a configuration: colors, rattlers, and a scale arrow."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from mdsens.plots._style import FONT, Inks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.quiver import Quiver

__all__ = ["ROW", "Bar", "Foot", "Key", "legend", "rounded"]

ROW = 12.0  # points from one row of the legend to the next


class Bar(NamedTuple):
    """A color map with its range, which the legend shows as a bar between two numbers.

    Attributes:
      shades: the color map.
      span: the range.
      name: symbol of the quantity, written before the lower number.
      unit: written after both numbers; empty for none.
    """

    shades: Colormap
    span: Normalize
    name: str
    unit: str = ""


# names and colors of the kinds of circles, or the color bar of a quantity
Key: TypeAlias = list[tuple[str, np.ndarray]] | Bar


class Foot(NamedTuple):
    """The contents of the legend below the picture of a configuration.

    Attributes:
      names: names of the kinds of particles, which are drawn as circles.
      bar: width of the color bar, as a fraction of the picture's width; 0 without a color bar.
      caption: text of the scale arrow; empty without arrows.
      length: length of the scale arrow, as a fraction of the picture's width.
    """

    names: list[str]
    bar: float
    caption: str
    length: float

    def rows(self, width: float) -> tuple[int, int, int]:
        """Arrange the entries of the legend in rows of a given width, in points.

        The widths of texts are estimates: to measure a text takes a renderer, which a figure has
        only when it is drawn.

        Returns:
          the number of columns of names, the row of the scale arrow, and the number of rows.
        """

        def points(text: str) -> float:
            # 0.6 of the font size for each character; a Greek letter of mathtext is one
            plain = re.sub(r"\\[a-z]+", "x", re.sub(r"\\mathrm|[${}_]", "", text))
            return 0.6 * FONT * len(plain)

        # 2.5 font sizes for the circle and the gaps beside it
        column = max((points(name) + 2.5 * FONT for name in self.names), default=0.0)
        arrow = points(self.caption) + FONT + self.length * width if self.caption else 0.0
        room = (1.0 - self.bar) * width
        if len(self.names) * column + arrow <= room:
            return max(len(self.names), 1), 0, 1
        columns = max(int(room // max(column, 1.0)), 1)
        rows = max(-(-len(self.names) // columns), 1)  # rounded up
        return columns, rows, rows + 1  # the arrow gets a row of its own


def legend(ax: Axes, foot: Foot, key: Key, quiver: Quiver | None, colors: Inks) -> None:
    """Draw the legend below the picture of a configuration.

    Args:
      ax: the Axes with the picture and its final limits.
      foot: the contents of the legend.
      key: the kinds of particles with their colors; or a quantity, for a color bar.
      quiver: the arrows of the picture, whose scale the scale arrow shows; None without arrows.
      colors: the colors of the figure.
    """
    from matplotlib.legend_handler import HandlerPatch
    from matplotlib.patches import Circle

    (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
    # the picture, which keeps its aspect, may be narrower than the Axes; in points, 72 an inch
    width = min(ax.bbox.width, ax.bbox.height * (x1 - x0) / (y1 - y0)) * 72 / ax.figure.dpi
    row = ROW / (width * (y1 - y0) / (x1 - x0))  # as a fraction of the picture's height
    columns, arrow_row, _ = foot.rows(width)
    if isinstance(key, list):
        kinds = key
    else:
        kinds = []
        span = key.span
        # with its numbers on both sides, the bar fills the 0.44 that sensitivity_map gives Foot.bar
        bar = ax.inset_axes((0.12, -1.15 * row, 0.22, 0.6 * row))
        bar.imshow(np.linspace(0, 1, 64)[None], aspect="auto", cmap=key.shades)
        bar.set(xticks=[], yticks=[])
        bar.spines[:].set(color=colors.outline, linewidth=0.5)
        for x, side, text in (
            (-0.08, "right", f"{key.name} {span.vmin:.2g}{key.unit}"),
            (1.08, "left", f"{span.vmax:.2g}{key.unit}"),
        ):
            look: dict[str, Any] = {"ha": side, "va": "center", "fontsize": FONT}
            bar.text(x, 0.4, text, transform=bar.transAxes, color=colors.ink, **look)
    handles = []
    for name, color in kinds:
        circle = Circle(
            (0, 0), facecolor=color, edgecolor=colors.outline, linewidth=0.5, label=name
        )
        handles.append(circle)
    if "rattler" in foot.names:
        dashed = Circle((0, 0), facecolor=colors.paper, linewidth=0.7, linestyle=(0, (2, 1)))
        dashed.set(edgecolor=colors.outline, label="rattler")
        handles.append(dashed)
    if "changed" in foot.names:
        ring = Circle((0, 0), facecolor="none", edgecolor=colors.bad, linewidth=1.4)
        ring.set_label("changed")
        handles.append(ring)
    if quiver is not None:
        ax.quiverkey(
            quiver,
            0.99 - foot.length,  # place of its tail
            -(arrow_row + 0.83) * row,
            foot.length * (x1 - x0),
            foot.caption,
            labelpos="W",
            labelsep=0.06,
            facecolor=colors.ink,
            labelcolor=colors.ink,
            linewidth=max(np.asarray(quiver.get_linewidth())),
            fontproperties={"size": FONT},
        )
        # A layout engine (constrained, tight) makes room for texts and legends, and not for scale
        # arrows: without this blank it would cut off one that has a row of its own.
        ax.text(0.5, -(arrow_row + 1.3) * row, " ", fontsize=1, transform=ax.transAxes)
    if not handles:
        return

    def dot(
        *_: Any, xdescent: float, ydescent: float, width: float, height: float, **__: Any
    ) -> Circle:
        return Circle((width / 2 - xdescent, height / 2 - ydescent), 0.55 * height)

    # matplotlib fills a legend column by column; this order makes it read row by row
    by_rows = [entry for k in range(columns) for entry in handles[k::columns]]
    ax.legend(
        handles=by_rows,
        handler_map={Circle: HandlerPatch(patch_func=dot)},
        loc="upper left",
        bbox_to_anchor=(0.01 + foot.bar, -0.55 * row),
        ncols=columns,
        frameon=False,
        fontsize=FONT,
        labelcolor=colors.ink,
        borderpad=0.0,
        borderaxespad=0.0,
        handlelength=1.0,
        handletextpad=0.4,
        columnspacing=1.0,
        # in font sizes: the gap between two rows at the distance ROW, less 0.15
        labelspacing=(ROW - FONT) / FONT - 0.15,
    )


def rounded(longest: float) -> tuple[float, str]:
    """Round the length ``longest`` of the scale arrow down to 1, 2 or 5 times a power of ten.

    Returns:
      the number, and its text for the legend.
    """
    power = int(np.floor(np.log10(longest)))
    # 1e-9: so that 5 is found for 5, despite round-off
    # m == 1 in any case: log10 may round up to the next power, and max() would get nothing
    digit = max(m for m in (1, 2, 5) if m == 1 or m * 10.0**power <= longest * (1 + 1e-9))
    value = digit * 10.0**power
    return value, f"{value:g}" if -3 <= power < 4 else rf"${digit}\times10^{{{power}}}$"
