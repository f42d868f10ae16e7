"""Suggestions for a misspelled name: the valid name that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean", "similar_name"]

# Smallest number of letters for which a name is suggested because it is a part of the other name.
# One or two letters are a part of nearly every name.
SHORTEST = 3


def similar_name(name: str, names: Iterable[str]) -> str | None:
    """Return the one of ``names`` that ``name`` probably means; None where no name is similar.

    Upper and lower case count as equal.
    """
    known = {n.lower(): n for n in names}
    asked = name.lower()
    close = difflib.get_close_matches(asked, known, n=1)
    if not close:
        # difflib misses an abbreviation, such as the first word of a long name.
        close = [
            n
            for n in known
            if len(min(n, asked, key=len)) >= SHORTEST and (n in asked or asked in n)
        ]
    return known[max(close, key=len)] if close else None


def did_you_mean(name: object, valid: Iterable[str]) -> str:
    """Write the end of an error message for an unknown name: what to write instead.

    This is the valid name most similar to ``name``; without a similar one, all valid names.
    """
    names = list(valid)
    similar = similar_name(str(name), names)
    return f"did you mean {similar!r}?" if similar else f"use one of {', '.join(names)}."
