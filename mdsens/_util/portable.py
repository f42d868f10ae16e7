"""Records that keep their values when pickle sends them to another process: :class:`Portable`."""

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


def array_types(value: object, seen: frozenset[int] = frozenset()) -> list[str]:
    """List the types of the jax arrays in a field of a record.

    Arrays are searched for in dicts, lists, tuples, dataclasses, and in the closures and default
    arguments of functions.

    Args:
      value: the field.
      seen: ids of the objects that contain ``value``; a function may close over itself.
    """
    if isinstance(value, jax.Array):
        return [str(value.dtype)]
    # a Portable record inside of this one checks its arrays itself when it is restored
    if id(value) in seen or isinstance(value, Portable):
        return []
    parts: list[Any] = []
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = list(value)
    elif isinstance(value, types.FunctionType):
        # The cell of a variable that is not yet assigned is empty, and reading it raises an error.
        cells = [cell for cell in value.__closure__ or () if cell != types.CellType()]
        parts = [*(cell.cell_contents for cell in cells), value.__defaults__, value.__kwdefaults__]
    elif isinstance(value, functools.partial):
        parts = [value.func, value.args, value.keywords]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = list(vars(value).values())
    return [name for part in parts for name in array_types(part, seen | {id(value)})]


def reduced(record: object, fields: dict[str, Any]) -> tuple[Any, ...]:
    """Return what the ``__reduce__`` of a record's class must: a call of :func:`restored`."""
    types_of_fields = {name: array_types(value) for name, value in fields.items()}
    return restored, (type(record), fields, types_of_fields)


def restored(kind: Callable[..., Any], fields: dict[str, Any], had: dict[str, list[str]]) -> Any:
    """Restore a record from its unpickled fields, and check the types of its arrays.

    Args:
      kind: the class of the record.
      fields: its fields.
      had: types of the arrays in each field when it was pickled.

    Raises:
      PrecisionError: a type has changed. In a process without x64, jax converts float64 to float32
        without a warning.
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
    """Base of frozen records whose arrays come out of pickle and ``copy`` equal to the last bit.

    Where that is not possible, unpickling raises an error. A named tuple of arrays cannot inherit
    from this class, and calls :func:`reduced` itself.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        record: Any = self
        fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
        return reduced(record, fields)
