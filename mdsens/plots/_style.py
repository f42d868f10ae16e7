"""Colors, sizes and the form of titles, which are the same in all figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mdsens.mechanics.status import Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLUMN", "DIVERGING", "FONT", "Inks", "default_inks", "inks", "title_with_status"]

FONT = 8  # points
COLUMN = 3.4  # inches: the width of a figure of one column
DIVERGING = "RdBu_r"  # blue below zero, red above: apart under every common color blindness


class Inks(NamedTuple):
    """The colors of a figure, which depend on its background.

    Attributes:
      paper: the background, which also fills hollow marks.
      ink: texts, arrows and marks.
      outline: outlines and guide lines.
      good, bad: curves and marks of two kinds, apart in lightness and hue under every common color
        blindness.
      dark: whether the background is dark.
    """

    paper: str
    ink: str
    outline: str
    good: str
    bad: str
    dark: bool


def inks(ax: Axes) -> Inks:
    """Choose the colors that can be seen on the background of a figure.

    A transparent figure counts as its Axes do, and as white where these are transparent, too.
    """
    figure = ax.get_figure(root=True)
    assert figure is not None
    return _for_background([figure.patch.get_facecolor(), ax.patch.get_facecolor()])


def default_inks() -> Inks:
    """Choose the colors for the background of the figures that pyplot makes."""
    from matplotlib import rcParams

    return _for_background([rcParams["figure.facecolor"], rcParams["axes.facecolor"]])


def _for_background(backgrounds: Sequence[Any]) -> Inks:
    """Choose the colors for the first background that is not transparent, or for white."""
    from matplotlib.colors import to_hex, to_rgba

    opaque = [to_hex(color) for color in map(to_rgba, backgrounds) if color[3] > 0.5]
    paper = [*opaque, "#ffffff"][0]
    red, green, blue = (int(paper[k : k + 2], 16) / 255 for k in (1, 3, 5))
    if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5:  # luma of ITU-R BT.601
        return Inks(paper, "#eef2f5", "#8a96a3", "#6aa9e9", "#ef8a62", True)
    return Inks(paper, "#17202a", "#7b8794", "#2f6db3", "#c8553d", False)


def title_with_status(title: str | None, status: Status) -> str:
    """Return the title of a figure; the name of the status is added if the status is not good."""
    return ", ".join([*([title] if title else []), *([] if status.good else [status.name])])
