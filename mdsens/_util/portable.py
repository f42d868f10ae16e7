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
    return [name for part in _list_parts(value) for name in array_types(part, seen | {id(value)})]


def _list_parts(value: object) -> list[Any]:
    """List the objects that a container, function, partial or dataclass refers to."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, types.FunctionType):
        return [*_list_closure(value), value.__defaults__, value.__kwdefaults__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return list(vars(value).values())
    return []


def _list_closure(function: types.FunctionType) -> list[Any]:
    """List the values of the outer variables that a function refers to (its closure)."""
    # The cell of a variable that is not yet assigned is empty, and reading it raises an error.
    cells = [cell for cell in function.__closure__ or () if cell != types.CellType()]
    return [cell.cell_contents for cell in cells]


def reduced(record: object, fields: dict[str, Any]) -> tuple[Any, ...]:
    """Return how pickle is to restore an object, in the form that ``__reduce__`` must return.

    The form is a function, here :func:`restored`, and the arguments of its call: the class of the
    object, its fields by name, and the dtypes of the arrays in each field.
    """
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
    # unpickling may be the first use of mdsens in this process
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
    unpickling raises a PrecisionError. A class of named tuples cannot inherit from this class:
    instead, it defines ``__reduce__`` by a call of :func:`reduced`.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        record: Any = self
        fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
        return reduced(record, fields)
