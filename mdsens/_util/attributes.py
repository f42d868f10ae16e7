"""Errors for attributes that do not exist: they list the existing names and suggest one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mdsens._util.suggestions import similar_name

__all__ = ["Named", "missing", "missing_of_package"]


class Named:
    """Base class of result records, with a helpful error for an attribute that does not exist.

    The error lists the attributes that the record has, and suggests the one that was probably
    meant.
    """

    # Hidden from type checkers, which would otherwise accept any attribute name.
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise missing(self, name)


def missing(record: object, name: str) -> AttributeError:
    """Build the error for reading an attribute that an object does not have.

    The message lists the attributes of the object and suggests the one that was probably meant.
    Where the object has a property of this name which itself raised an AttributeError, the error of
    the property is raised instead.
    """
    record_type = type(record)
    message = f"{record_type.__name__!r} object has no attribute {name!r}"
    # Protocols of Python and jax probe for names with an underscore (copy, pickle,
    # ``__jax_array__``). They get the plain error of Python, without a search for suggestions.
    if name.startswith("_"):
        return AttributeError(message, name=name, obj=record)
    # Python calls __getattr__ also after a property raised an AttributeError, and drops that error.
    # Reading the property again raises it.
    if hasattr(record_type, name):
        object.__getattribute__(record, name)
    names = _public_names(record)
    hint = _find_nested(record, name) or similar_name(name, names)
    meant = f"did you mean {hint}? It has" if hint else "it has"
    return AttributeError(f"{message}: {meant} {', '.join(names)}.", name=name, obj=record)


def missing_of_package(
    package: str, name: str, names: Iterable[str], rooms: Mapping[str, ModuleType]
) -> AttributeError:
    """Build the error for a name that a package does not have.

    The message points to the public module that has the name, or suggests a similar name.

    Args:
      package: name of the package as users write it.
      name: the name that was asked for.
      names: the names that the package has.
      rooms: public modules of the package, by name.
    """
    message = f"module {package!r} has no attribute {name!r}"
    if name.startswith("_"):
        return AttributeError(message, name=name)
    exact = [f"{package}.{room}.{name}" for room, module in rooms.items() if name in module.__all__]
    if exact:
        return AttributeError(f"{message}: it is {' or '.join(exact)}.", name=name)
    # Path of every public name inside the package. A name of the package itself comes last, so that
    # it replaces the same name of a module.
    paths = {inner: f"{room}.{inner}" for room, module in rooms.items() for inner in module.__all__}
    paths |= {top: top for top in names}
    hint = similar_name(name, paths)
    if hint:
        remedy = f"did you mean {package}.{paths[hint]}?"
    else:
        remedy = f"dir({package}) lists its names."
    return AttributeError(f"{message}: {remedy}", name=name)


def _public_names(record: object) -> list[str]:
    """List the public attributes of an object: fields in order, then properties and methods."""
    fields: list[str] = []
    if dataclasses.is_dataclass(record):
        fields += [field.name for field in dataclasses.fields(record)]
    fields += getattr(type(record), "_fields", ())
    others = set(dir(type(record)))
    if isinstance(record, tuple):
        others -= set(dir(tuple))
    # a dict removes duplicates and keeps the order
    return list(dict.fromkeys(n for n in (*fields, *sorted(others)) if not n.startswith("_")))


def _find_nested(record: Any, name: str) -> str | None:
    """Find an attribute or key in the objects and dicts that an object has as fields.

    Return the path to the attribute, such as 'stats.residual'; None where no field has it.
    """
    values = record._asdict() if hasattr(type(record), "_asdict") else vars(record)
    for field, value in values.items():
        if dataclasses.is_dataclass(value) and name in _public_names(value):
            return f"{field}.{name}"
        if isinstance(value, Mapping) and name in value:
            return f"{field}[{name!r}]"
    return None
