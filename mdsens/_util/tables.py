"""Small tables for terminals and notebooks, and the results that show themselves as one."""

from __future__ import annotations

import html as _html
import math
import textwrap
from collections.abc import Iterable, Sequence

import jax

from mdsens._util.attributes import Named

__all__ = ["Shown", "columns", "html", "numbers", "text"]

Rows = Sequence[tuple[str, str]]
WIDTH = 100  # columns of a terminal that lines are folded to


def text(title: str, rows: Rows, width: int = WIDTH) -> str:
    """Two aligned columns under a title; what is too long goes on below itself."""
    names = max((len(k) for k, _ in rows), default=0)
    lines = [title]
    for key, value in rows:
        folded = textwrap.wrap(
            value, max(width - names - 4, 20), break_long_words=False, break_on_hyphens=False
        )
        for k, part in enumerate(folded or [""]):
            lines.append(f"  {key if k == 0 else '':<{names}}  {part}".rstrip())
    return "\n".join(lines)


def columns(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table under a title: a row of names, then the rows, every column flush right as numbers are
    read.
    """
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [
        "  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True))
        for row in (header, *rows)
    ]
    return "\n".join([title, *lines] if title else lines)


def numbers(values: Iterable[float], digits: int = 5) -> list[str]:
    """Numbers of one column with the same decimals: ``digits`` significant ones in the largest."""
    given = [float(v) for v in values]
    largest = max((abs(v) for v in given if math.isfinite(v)), default=0.0)
    if largest == 0.0 or 1e-3 <= largest < 1e6:
        decimals = max(0, digits - 1 - (math.floor(math.log10(largest)) if largest else 0))
        return [f"{v:,.{decimals}f}" for v in given]
    return [f"{v:.{digits - 1}e}" for v in given]


def html(title: str, rows: Rows) -> str:
    """Two columns as a small HTML table; a row without a value is a heading."""
    left = "style='text-align:left'"
    body = "".join(
        (
            f"<tr><th {left}>{_html.escape(k)}</th><td {left}>{_html.escape(v)}</td></tr>"
            if v
            else f"<tr><td {left} colspan='2'><i>{_html.escape(k)}</i></td></tr>"
        )
        for k, v in rows
    )
    return (
        "<table><caption"
        f" style='text-align:left'><b>{_html.escape(title)}</b></caption>{body}</table>"
    )


class Shown(Named):
    """A result that prints as a table and shows as one in Jupyter. Subclasses give ``_title`` and
    ``_rows``.
    """

    _title = ""

    def _rows(self) -> list[tuple[str, str]]:
        raise NotImplementedError

    def __str__(self) -> str:
        return text(self._title, self._rows())

    def __repr__(self) -> str:
        try:
            return str(self)
        except (
            jax.errors.ConcretizationTypeError,
            jax.errors.TracerArrayConversionError,
        ):  # a tracer has no numbers
            return f"<{type(self).__name__}, traced>"

    def _repr_html_(self) -> str:
        return html(self._title, self._rows())
