"""What a user gives, taken as numbers, or refused in one line that names it, says what it is and
what to give.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mdsens._util.errors import InputError, short

__all__ = [
    "check_positive",
    "check_whole",
    "is_real",
    "real_array",
    "real_number",
    "require_host",
    "short",
]


def is_real(dtype: Any) -> bool:
    """Whether it is a type of integers or real numbers; truth values are none."""
    return bool(jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating))


def real_array(name: str, value: Any, need: str = "give numbers.") -> Any:
    """``value`` as an array of integers or real numbers, of jax where it is one already (tracers
    pass).

    numpy alone would read texts as numbers, drop imaginary parts and forget what is masked.
    """
    if isinstance(value, jax.Array):
        array: Any = value
    else:
        try:
            array = np.asarray(value)
        except Exception as error:  # rows of different lengths, or an object that refuses
            raise InputError(f"{name} is no array, {short(value)}: {need}") from error
    if not is_real(array.dtype) or np.ma.is_masked(value):
        what = f"an array of {array.dtype}" if array.ndim else short(value)
        raise InputError(f"{name} is {what}: {need}")
    return array


def real_number(name: str, value: Any, need: str = "give a number.") -> float:
    """``value`` as a float."""
    array = real_array(name, value, need)
    if array.ndim:
        raise InputError(f"{name} has shape {array.shape}: {need}")
    return float(array)


@jax.jit
def _probe() -> jax.Array:
    """A number that under jit is none, as nothing new is, whatever is given; compiled, it takes a
    tenth of an array.
    """
    return jnp.zeros(())


def require_host(what: str, remedy: str, *given: Any) -> None:
    """Refuse to compute on numbers inside of what jax traces, where there are none."""
    if any(map(_traced, given)) or isinstance(_probe(), Tracer):
        raise InputError(
            f"{what} works on numbers, and is called in what jax traces (grad, jit, vmap):"
            f" {remedy}."
        )


def _traced(value: Any) -> bool:
    """Whether there is a traced array in it, a user's own dicts and lists, of whatever they are,
    included.
    """
    if isinstance(value, Mapping):
        return any(map(_traced, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_traced, value))
    leaves = jax.tree.leaves(value) if dataclasses.is_dataclass(value) else [value]
    return any(isinstance(leaf, Tracer) for leaf in leaves)


def check_positive(record: Any, names: tuple[str, ...]) -> None:
    """Refuse an option record some of whose fields are no positive numbers."""
    for name in names:
        value = getattr(record, name)
        if not (isinstance(value, Real) and 0 < value < np.inf):  # type: ignore[operator]
            raise InputError(
                f"{type(record).__name__}({name}={short(value)}): give a positive number."
            )


def check_whole(record: Any, name: str) -> None:
    """Refuse an option record whose field is no whole number from 0."""
    value = getattr(record, name)
    if not (isinstance(value, int) and value >= 0):
        raise InputError(
            f"{type(record).__name__}({name}={short(value)}): give a whole number from 0."
        )
