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
    """List the dtypes of all jax arrays that a field of an object contains.

    Arrays are searched for in dicts, lists, tuples, dataclasses, and in the closures and default
    arguments of functions.

    Args:
      value: the field.
      seen: ids of the objects that contain ``value``, which are not searched again: a function may
        refer to itself.
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
    """Describe an object for pickle, as ``__reduce__`` must: as a call of :func:`restored`."""
    types_of_fields = {name: array_types(value) for name, value in fields.items()}
    return restored, (type(record), fields, types_of_fields)


def restored(kind: Callable[..., Any], fields: dict[str, Any], had: dict[str, list[str]]) -> Any:
    """Restore an object from its unpickled fields, and check the dtypes of its arrays.

    Args:
      kind: the class of the object.
      fields: the fields of the object, by name.
      had: dtypes of the arrays in each field when the object was pickled, by the field's name.

    Raises:
      PrecisionError: a dtype has changed. In a process without x64, jax converts float64 to float32
        without a warning.
    """
    require_sound_jax()
    for name, value in fields.items():
        for then, now in zip(had[name], array_types(value), strict=False):
            if then != now:
                raise PrecisionError(
                    f"{getattr(kind, '__name__', kind)}.{name} is {then}, and this process computes"
                    f" in {now}: call ms.enable_x64() in this process before unpickling; for a pool"
                    " of processes, give initializer=ms.enable_x64."
                )
    return kind(**fields)


class Portable:
    """Base class of records whose arrays come out of pickle and ``copy`` equal to the last bit.

    Where equality is not possible, because the other process computes in a lower precision,
    unpickling raises a PrecisionError. A class of named tuples cannot inherit from this class; its
    ``__reduce__`` calls :func:`reduced`.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        record: Any = self
        fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
        return reduced(record, fields)
