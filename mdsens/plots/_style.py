"""What all figures share: colors, sizes, and the figure of one column."""

from __future__ import annotations

__all__ = ["ARROW", "COLUMN", "FONT", "OUTLINE", "PAPER"]

OUTLINE, ARROW = "#7b8794", "#17202a"
PAPER = "white"
FONT = 7  # points
COLUMN = 3.4  # inches
