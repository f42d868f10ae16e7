"""Validation of user input.

A value is converted to numbers, or refused with an error of one line that names the field, its
value and the remedy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mdsens._util.compilation import at_top, compiled
from mdsens._util.errors import InputError, short

__all__ = [
    "check_count",
    "check_positive",
    "check_whole",
    "is_integer",
    "is_number",
    "is_real",
    "real_array",
    "real_number",
    "require_host",
    "short",
]


def is_real(dtype: np.dtype) -> bool:
    """Return whether a dtype is of integers or real numbers; booleans do not count."""
    # by jax, whose bfloat16 is no floating-point type for numpy
    return bool(jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating))


def real_array(name: str, value: object, need: str = "give numbers.") -> Any:
    """Convert ``value`` to an array of integers or real numbers.

    numpy alone would read strings as numbers, drop imaginary parts and drop the mask of a masked
    array.

    Args:
      name: name of the field, for the message.
      value: anything that converts to an array, also an array that jax traces.
      need: the remedy, for the message.

    Returns:
      ``value`` itself if it is an array of jax, else an array of numpy.
    """
    if isinstance(value, jax.Array):
        array: Any = value
    else:
        try:
            array = np.asarray(value)
        except Exception as error:
            # rows of different lengths, or an object that cannot be converted
            raise InputError(f"{name} is no array, {short(value)}: {need}") from error
    if not is_real(array.dtype) or np.ma.is_masked(value):
        what = f"an array of {array.dtype}" if array.ndim else short(value)
        raise InputError(f"{name} is {what}: {need}")
    return array


def real_number(name: str, value: object, need: str = "give a number.") -> float:
    """Convert ``value`` to a float, or raise InputError if it is not one real number.

    ``name`` is the name of the field and ``need`` the remedy, for the message.
    """
    array = real_array(name, value, need)
    if array.ndim:
        raise InputError(f"{name} has shape {array.shape}: {need}")
    return float(array)


@compiled
def _probe() -> jax.Array:
    """Return an array whose type tells whether jax is tracing a function with ``jit``.

    Inside of jit, every array that is created is a tracer (an array without values), also where no
    argument is a tracer. To call this compiled function takes a tenth of the time that creating an
    array takes.
    """
    return jnp.zeros(())


def require_host(what: str, remedy: str, *arguments: object) -> None:
    """Raise InputError if called while jax traces a function, when arrays have no values.

    Args:
      what: name of the function that needs values, for the message.
      remedy: what the user can do, for the message.
      arguments: arguments of the function that needs values, which are searched for traced arrays:
        grad and vmap trace only the arrays that they differentiate by or map over.
    """
    # where nothing is traced at all, the probe need not be compiled
    traced = not at_top() and isinstance(_probe(), Tracer)
    if traced or any(map(_has_tracer, arguments)):
        raise InputError(
            f"{what} works on numbers, and is called inside a function that jax traces (grad, jit,"
            f" vmap): {remedy}."
        )


def _has_tracer(value: object) -> bool:
    """Return whether a value is an array that jax traces, or contains one.

    Dicts, lists and tuples may contain objects of any kind. Other objects are searched only where
    they are dataclasses.
    """
    if isinstance(value, Mapping):
        return any(map(_has_tracer, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_tracer, value))
    leaves = jax.tree.leaves(value) if dataclasses.is_dataclass(value) else [value]
    return any(isinstance(leaf, Tracer) for leaf in leaves)


def check_positive(record: object, names: tuple[str, ...]) -> None:
    """Raise InputError unless the fields ``names`` of a record are positive finite numbers."""
    for name in names:
        value = getattr(record, name)
        # Both comparisons are False for NaN.
        if not (is_number(value) and 0 < value < np.inf):
            raise InputError(
                f"{type(record).__name__}({name}={short(value)}): give a positive number."
            )


def check_whole(record: object, name: str) -> None:
    """Raise InputError unless the field ``name`` of a record is a whole number of at least 0."""
    value = getattr(record, name)
    if not (is_integer(value) and value >= 0):
        raise InputError(
            f"{type(record).__name__}({name}={short(value)}): give a whole number from 0."
        )


def is_integer(value: object) -> bool:
    """Return whether a value is an integer; True and False, ints in Python, do not count."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return whether a value is a real number; True and False, ints in Python, do not count."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def check_count(name: str, field: str, value: int | None) -> None:
    """Raise InputError unless ``value`` is None or a positive whole number.

    ``value`` was given for a field of a class. The error message names both: ``name`` is the name
    of the class, and ``field`` the name of the field.
    """
    if value is not None and not (is_integer(value) and value >= 1):
        raise InputError(
            f"{name}: {field}={value!r} is not a count: give a whole number of at least 1."
        )
