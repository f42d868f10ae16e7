"""Small tables for terminals and notebooks, and the base class of results that print as a table."""

from __future__ import annotations

import abc
import html as _html
import math
import textwrap
from collections.abc import Iterable, Sequence

import jax

from mdsens._util.attributes import Named

__all__ = ["Shown", "columns", "html", "numbers", "text"]

Rows = Sequence[tuple[str, str]]
WIDTH = 100  # characters, at which lines for a terminal are wrapped


def text(title: str, rows: Rows, width: int = WIDTH) -> str:
    """Format rows of a name and a value as two aligned columns; values are wrapped to ``width``."""
    names = max((len(k) for k, _ in rows), default=0)
    lines = [title]
    for key, value in rows:
        # Paths and numbers with an exponent such as 1e-12 stay whole.
        # 4: two spaces before the name and two before the value.
        wrapped = textwrap.wrap(
            value, max(width - names - 4, 20), break_long_words=False, break_on_hyphens=False
        )
        for k, part in enumerate(wrapped or [""]):
            lines.append(f"  {key if k == 0 else '':<{names}}  {part}".rstrip())
    return "\n".join(lines)


def columns(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a title, a header and rows of cells as a table with all columns aligned right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [
        "  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True))
        for row in (header, *rows)
    ]
    return "\n".join([title, *lines] if title else lines)


def numbers(values: Iterable[float], digits: int = 5) -> list[str]:
    """Format numbers, all with the same number of decimals.

    The number of decimals is that with which the number of largest magnitude shows ``digits``
    digits, or 0 if it has more digits before the decimal point. The notation is scientific where
    the largest magnitude is below 1e-3, or 1e6 or more.
    """
    column = [float(v) for v in values]
    largest = max((abs(v) for v in column if math.isfinite(v)), default=0.0)
    if largest == 0.0 or 1e-3 <= largest < 1e6:
        exponent = math.floor(math.log10(largest)) if largest else 0
        decimals = max(0, digits - 1 - exponent)
        return [f"{v:,.{decimals}f}" for v in column]
    return [f"{v:.{digits - 1}e}" for v in column]


def html(title: str, rows: Rows) -> str:
    """Format rows of a name and a value as HTML tables that can be folded.

    A name without a value is the heading of a section, which has a table of its own.
    """
    sections: list[tuple[str, list[tuple[str, str]]]] = [("", [])]
    for key, value in rows:
        if value:
            sections[-1][1].append((key, value))
        else:
            sections.append((key, []))
    body = "".join(
        _folding(f"<i>{_html.escape(name)}</i>", _table(lines)) if name else _table(lines)
        for name, lines in sections
    )
    return _folding(f"<b>{_html.escape(title)}</b>", body)


def _table(rows: Rows) -> str:
    """Format rows as a table of HTML; no rows as nothing."""
    left = "style='text-align:left'"
    body = "".join(
        f"<tr><th {left}>{_html.escape(key)}</th><td {left}>{_html.escape(value)}</td></tr>"
        for key, value in rows
    )
    return f"<table>{body}</table>" if body else ""


def _folding(summary: str, body: str) -> str:
    """Put HTML under a line that folds it; it is open at first."""
    return f"<details open><summary>{summary}</summary>{body}</details>"


class Shown(Named, abc.ABC):
    """Base class of results that print as a table, also in Jupyter.

    Subclasses define ``_title``, the heading, and ``_rows``, the lines as pairs of name and value.
    """

    _title = ""

    @abc.abstractmethod
    def _rows(self) -> list[tuple[str, str]]:
        """List the lines of the table: pairs of name and value."""

    def __str__(self) -> str:
        return text(self._title, self._rows())

    def __repr__(self) -> str:
        try:
            return str(self)
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
            # Inside of jit the fields are tracers, which have no values to print.
            return f"<{type(self).__name__}, traced>"

    def _repr_html_(self) -> str:
        return html(self._title, self._rows())
