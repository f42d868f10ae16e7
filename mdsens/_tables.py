"""Small tables for terminals and notebooks."""

from __future__ import annotations

import html as _html
from collections.abc import Sequence

__all__ = ["html", "text"]

Rows = Sequence[tuple[str, str]]


def text(title: str, rows: Rows) -> str:
    """Two aligned columns under a title."""
    width = max((len(k) for k, _ in rows), default=0)
    return "\n".join([title, *(f"  {k:<{width}}  {v}" for k, v in rows)])


def html(title: str, rows: Rows) -> str:
    """The same as a small HTML table."""
    body = "".join(
        f"<tr><th style='text-align:left'>{_html.escape(k)}</th><td style='text-align:left'>{_html.escape(v)}</td></tr>"
        for k, v in rows
    )
    return f"<table><caption style='text-align:left'><b>{_html.escape(title)}</b></caption>{body}</table>"
