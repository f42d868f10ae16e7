"""Colors, sizes and the form of titles, which are the same in all figures."""

from __future__ import annotations

from mdsens.mechanics.status import Status

__all__ = ["ARROW", "COLUMN", "FONT", "OUTLINE", "PAPER", "title_with_status"]

OUTLINE = "#7b8794"  # gray, for outlines and guide lines
ARROW = "#17202a"  # near black, for arrows and marks
PAPER = "white"
FONT = 7  # points
COLUMN = 3.4  # inches: the width of a figure of one column


def title_with_status(title: str | None, status: Status) -> str:
    """Return the title of a figure; the name of the status is added if the status is not good."""
    return ", ".join([*([title] if title else []), *([] if status.good else [status.name])])
