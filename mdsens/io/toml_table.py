"""Values of a specification, checked one by one: what is wrong is named by its key, with its value
and the remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.validation import short

__all__ = ["TomlTable", "array_of", "is_integer", "nearest", "short"]

_MISSING: Any = object()


def nearest(name: str, valid: Sequence[str]) -> str:
    """The remedy for a name that is not among the valid ones."""
    near = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(valid)}."


@dataclasses.dataclass(frozen=True)
class TomlTable:
    """A table of a specification that knows its own name, so that a complaint names the key.

    Attributes:
      name: what stands before the key in a message; empty at the top.
      values: keys and what they hold.
    """

    name: str
    values: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, value: Any, keys: Sequence[str]) -> TomlTable:
        """``value`` as a table that has no other keys than these."""
        if not isinstance(value, Mapping):
            raise InputError(
                f"{name or 'the file'} is {value!r}: give a table with keys among"
                f" {', '.join(keys)}."
            )
        table = cls(name, value)
        for key in value:
            if key not in keys:
                raise InputError(
                    f"{table.label(str(key))} is no key of the format: {nearest(str(key), keys)}"
                )
        return table

    def label(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key

    def has(self, key: str) -> bool:
        return key in self.values

    def raw(self, key: str, default: Any = _MISSING) -> Any:
        if key in self.values:
            return self.values[key]
        if default is _MISSING:
            raise InputError(f"{self.label(key)} is missing: give it, systems/README.md says how.")
        return default

    def _checked(self, key: str, default: Any, good: Callable[[Any], bool], need: str) -> Any:
        value = self.raw(key, default)
        if key in self.values and not good(value):
            raise InputError(f"{self.label(key)} is {value!r}: give {need}.")
        return value

    def text(self, key: str, default: Any = _MISSING, choices: Sequence[str] = ()) -> str:
        value = self._checked(key, default, lambda v: isinstance(v, str), "a text")
        if choices and value not in choices:
            raise InputError(f"{self.label(key)} is {value!r}: {nearest(value, choices)}")
        return value

    def integer(self, key: str, default: Any = _MISSING, least: int = 0) -> int:
        return self._checked(
            key, default, lambda v: is_integer(v) and v >= least, f"an integer from {least}"
        )

    def number(self, key: str, default: Any = _MISSING, positive: bool = True) -> float:
        need = "a positive number" if positive else "a number from 0"
        return self._checked(
            key,
            default,
            lambda v: is_number(v) and np.isfinite(v) and (v > 0 if positive else v >= 0),
            need,
        )

    def array(self, key: str, shape: tuple[int | None, ...], integers: bool = False) -> np.ndarray:
        """Numbers of a shape, None where any length does."""
        return array_of(self.label(key), self.raw(key), shape, integers)


def is_integer(value: Any) -> bool:
    """An integer that is no truth value."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """A real number that is no truth value."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def array_of(
    name: str, value: Any, shape: tuple[int | None, ...] | None, integers: bool = False
) -> np.ndarray:
    """Numbers as an array, of a shape where one is asked for."""
    kind = "integers" if integers else "numbers"
    need = (
        kind
        if shape is None
        else f"{kind} of shape ({', '.join('any' if s is None else str(s) for s in shape)})"
    )
    try:
        array = np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise InputError(f"{name} has rows of different lengths: give {need}.") from error
    if not np.issubdtype(array.dtype, np.integer if integers else np.number) or np.iscomplexobj(
        array
    ):
        raise InputError(f"{name} is {short(value)}: give {need}.")
    if shape is not None and (
        array.ndim != len(shape)
        or any(w not in (None, s) for w, s in zip(shape, array.shape, strict=True))
    ):
        raise InputError(f"{name} has shape {array.shape}: give {need}.")
    if not np.isfinite(array).all():
        raise InputError(f"{name} is {short(value)}: every number must be finite.")
    return array if integers else array.astype(float)
