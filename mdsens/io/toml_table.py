"""Reading of checked values from TOML tables; errors name the key, its value and the remedy."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.validation import short

__all__ = ["TomlTable", "array_of", "is_integer", "nearest", "short"]

_MISSING: Any = object()  # the default of a key that must be present; None may be a value


def nearest(name: str, valid: Sequence[str]) -> str:
    """The remedy for an unknown name: the valid name nearest to it, or else all valid names."""
    near = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(valid)}."


@dataclasses.dataclass(frozen=True)
class TomlTable:
    """A table of a TOML file with its name, so that error messages give the full key.

    Attributes:
      name: of the table, before the key in a message; empty for the top level of the file.
      values: values by key.
    """

    name: str
    values: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, value: object, keys: Sequence[str]) -> TomlTable:
        """``value`` as a table, checked to have no other keys than these."""
        if not isinstance(value, Mapping):
            raise InputError(
                f"{name or 'the file'} is {value!r}: give a table with keys among"
                f" {', '.join(keys)}."
            )
        table = cls(name, value)
        # a misspelt key must not be ignored: the default would be used instead
        for key in value:
            if key not in keys:
                raise InputError(
                    f"{table.label(str(key))} is no key of the format: {nearest(str(key), keys)}"
                )
        return table

    def label(self, key: str) -> str:
        """The full key for messages, such as box.lengths."""
        return f"{self.name}.{key}" if self.name else key

    def has(self, key: str) -> bool:
        """Whether the table has the key."""
        return key in self.values

    def raw(self, key: str, default: object = _MISSING) -> Any:
        """The value of a key, unchecked."""
        if key in self.values:
            return self.values[key]
        if default is _MISSING:
            raise InputError(f"{self.label(key)} is missing: give it, systems/README.md says how.")
        return default

    def _checked(self, key: str, default: object, good: Callable[[Any], bool], need: str) -> Any:
        """The value of a key if ``good`` accepts it; the default is not checked."""
        value = self.raw(key, default)
        if key in self.values and not good(value):
            raise InputError(f"{self.label(key)} is {value!r}: give {need}.")
        return value

    def text(self, key: str, default: str = _MISSING, choices: Sequence[str] = ()) -> str:
        """A string; if there are ``choices``, one of them."""
        value = self._checked(key, default, lambda v: isinstance(v, str), "a text")
        if choices and value not in choices:
            raise InputError(f"{self.label(key)} is {value!r}: {nearest(value, choices)}")
        return value

    def integer(self, key: str, default: int = _MISSING, least: int = 0) -> int:
        """An integer not below ``least``."""
        return self._checked(
            key, default, lambda v: is_integer(v) and v >= least, f"an integer from {least}"
        )

    def number(self, key: str, default: float = _MISSING, positive: bool = True) -> float:
        """A finite number above 0, or not below 0 if ``positive`` is False."""

        def good(value: Any) -> bool:
            if not is_number(value) or not np.isfinite(value):
                return False
            return value > 0 if positive else value >= 0

        need = "a positive number" if positive else "a number from 0"
        return self._checked(key, default, good, need)

    def array(self, key: str, shape: tuple[int | None, ...], integers: bool = False) -> np.ndarray:
        """An array of numbers of this shape; None in the shape stands for any length."""
        return array_of(self.label(key), self.raw(key), shape, integers)


def is_integer(value: object) -> bool:
    """Whether it is an integer; a truth value, which Python counts as an int, is none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a real number; a truth value, which Python counts as an int, is none."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def array_of(
    name: str, value: object, shape: tuple[int | None, ...] | None, integers: bool = False
) -> np.ndarray:
    """An array of finite numbers, checked.

    Args:
      name: for messages.
      value: numbers in nested lists, or an array.
      shape: required shape, None in it for any length; None for any shape.
      integers: require integers.

    Returns:
      integers if these are required, else floats.
    """
    need = "integers" if integers else "numbers"
    if shape is not None:
        lengths = ", ".join("any" if length is None else str(length) for length in shape)
        need = f"{need} of shape ({lengths})"
    try:
        array = np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise InputError(f"{name} has rows of different lengths: give {need}.") from error
    # truth values and texts are no numbers here, although numpy would convert them
    kind = np.integer if integers else np.number
    if not np.issubdtype(array.dtype, kind) or np.iscomplexobj(array):
        raise InputError(f"{name} is {short(value)}: give {need}.")
    if shape is not None and not _has_shape(array, shape):
        raise InputError(f"{name} has shape {array.shape}: give {need}.")
    if not np.isfinite(array).all():
        raise InputError(f"{name} is {short(value)}: every number must be finite.")
    return array if integers else array.astype(float)


def _has_shape(array: np.ndarray, shape: tuple[int | None, ...]) -> bool:
    """Whether an array has this shape, in which None stands for any length."""
    if array.ndim != len(shape):
        return False
    return all(length in (None, actual) for length, actual in zip(shape, array.shape, strict=True))
