"""Records that reach another process as they are: :class:`Portable`."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax

from mdsens._util.environment import require_sound_jax
from mdsens._util.errors import PrecisionError

__all__ = ["Portable", "array_types", "reduced", "restored"]


def array_types(value: Any, seen: frozenset[int] = frozenset()) -> list[str]:
    """The types of the jax arrays in a field of a record: in dicts, lists, tuples, and in what
    functions close over.

    Args:
      seen: what it is part of; a function may close over itself.
    """
    if isinstance(value, jax.Array):
        return [str(value.dtype)]
    if id(value) in seen or isinstance(value, Portable):  # a record tells its own
        return []
    parts: list[Any] = []
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = list(value)
    elif isinstance(value, types.FunctionType):
        cells = [
            cell for cell in value.__closure__ or () if cell != types.CellType()
        ]  # but for empty ones
        parts = [*(cell.cell_contents for cell in cells), value.__defaults__, value.__kwdefaults__]
    elif isinstance(value, functools.partial):
        parts = [value.func, value.args, value.keywords]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = list(vars(value).values())
    return [name for part in parts for name in array_types(part, seen | {id(value)})]


def reduced(record: Any, fields: dict[str, Any]) -> Any:
    """What pickle makes a record anew from, as the ``__reduce__`` of its class: :func:`restored` of
    its fields.
    """
    return restored, (
        type(record),
        fields,
        {name: array_types(value) for name, value in fields.items()},
    )


def restored(kind: Callable[..., Any], fields: dict[str, Any], had: dict[str, list[str]]) -> Any:
    """A record out of its unpickled fields, whose arrays must be of the types that they had.

    Raises:
      PrecisionError: they are not, since jax makes float32 of float64, in silence, in a process
        without x64.
    """
    require_sound_jax()
    for name, value in fields.items():
        for then, now in zip(had[name], array_types(value), strict=False):
            if then != now:
                raise PrecisionError(
                    f"{getattr(kind, '__name__', kind)}.{name} is {then}, and this process computes"
                    f" in {now}: call ms.enable_x64() in it before unpickling, in a pool of"
                    " processes by initializer=ms.enable_x64."
                )
    return kind(**fields)


class Portable:
    """A frozen record whose arrays come out of pickle, and of ``copy``, as they went in to the last
    bit, or not at all.

    A named tuple of arrays cannot inherit it, and calls :func:`reduced` itself.
    """

    def __reduce__(self) -> Any:
        record: Any = self
        return reduced(
            record,
            {field.name: getattr(record, field.name) for field in dataclasses.fields(record)},
        )
