"""A name that a record or the package has not: the error lists the names that it has, and the
likeliest of them.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["Named", "missing", "missing_of_package", "near"]

SHORTEST = 3  # letters of a name that may stand for another that it is a part of


class Named:
    """A record that users read from: an attribute that it has not is answered with those that it
    has.
    """

    if not TYPE_CHECKING:  # a type checker would take every name as there

        def __getattr__(self, name: str) -> Any:
            raise missing(self, name)


def missing(record: Any, name: str) -> AttributeError:
    """The error for an attribute that was not found. Raises the error of a property that there is.

    Protocols of Python and jax ask for names with an underscore (copy, pickle, ``__jax_array__``):
    these are answered at once, as Python does.
    """
    kind = type(record)
    message = f"{kind.__name__!r} object has no attribute {name!r}"
    if name.startswith("_"):
        return AttributeError(message, name=name, obj=record)
    if hasattr(kind, name):  # a property that raised an AttributeError, which would be lost here
        object.__getattribute__(record, name)
    names = _public(record)
    hint = _within(record, name) or near(name, names)
    meant = f"did you mean {hint}? It has" if hint else "it has"
    return AttributeError(f"{message}: {meant} {', '.join(names)}.", name=name, obj=record)


def missing_of_package(
    package: str, name: str, names: Iterable[str], rooms: Mapping[str, ModuleType]
) -> AttributeError:
    """The error for a name that a package has not, which points to the module of it that has the
    name.

    Args:
      package: its name as users write it.
      name: what was asked for.
      names: those that it has.
      rooms: its public modules, by name.
    """
    message = f"module {package!r} has no attribute {name!r}"
    if name.startswith("_"):
        return AttributeError(message, name=name)
    there = [f"{package}.{room}.{name}" for room, module in rooms.items() if name in module.__all__]
    if there:
        return AttributeError(f"{message}: it is {' or '.join(there)}.", name=name)
    places = {
        inner: f"{room}.{inner}" for room, module in rooms.items() for inner in module.__all__
    }
    places |= {own: own for own in names}
    hint = near(name, places)
    remedy = (
        f"did you mean {package}.{places[hint]}?" if hint else f"dir({package}) lists its names."
    )
    return AttributeError(f"{message}: {remedy}", name=name)


def near(name: str, names: Iterable[str]) -> str | None:
    """The name that was probably meant; None where none is like it."""
    known = {n.lower(): n for n in names}
    asked = name.lower()
    close = difflib.get_close_matches(asked, known, n=1)
    if not close:
        close = [
            n
            for n in known
            if len(min(n, asked, key=len)) >= SHORTEST and (n in asked or asked in n)
        ]
    return known[max(close, key=len)] if close else None


def _public(record: Any) -> list[str]:
    """Fields first, in their order, then properties and methods."""
    fields = (
        [field.name for field in dataclasses.fields(record)]
        if dataclasses.is_dataclass(record)
        else []
    )
    fields += getattr(type(record), "_fields", ())
    others = set(dir(type(record))) - (set(dir(tuple)) if isinstance(record, tuple) else set())
    return list(dict.fromkeys(n for n in (*fields, *sorted(others)) if not n.startswith("_")))


def _within(record: Any, name: str) -> str | None:
    """The attribute of one of its own records or dicts that has this name, such as
    'stats.residual'.
    """
    values = record._asdict() if hasattr(type(record), "_asdict") else vars(record)
    for field, value in values.items():
        if dataclasses.is_dataclass(value) and name in _public(value):
            return f"{field}.{name}"
        if isinstance(value, Mapping) and name in value:
            return f"{field}[{name!r}]"
    return None
