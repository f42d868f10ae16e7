"""Reading of checked values from TOML tables; an error names the key, its value and the remedy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.suggestions import did_you_mean
from mdsens._util.validation import is_integer, is_number, short

__all__ = ["TomlTable", "array_of", "short"]

_MISSING: Any = object()  # the default of a key that must be present; None may be a value


@dataclasses.dataclass(frozen=True)
class TomlTable:
    """A table of a TOML file, with its name, so that error messages give the full key.

    Attributes:
      name: name of the table, which stands before the key in a message; empty for the top level of
        the file.
      values: the values by key.
    """

    name: str
    values: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, value: object, keys: Sequence[str]) -> TomlTable:
        """Make a TomlTable of the dict ``value``; raise InputError for a key not in ``keys``."""
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
                    f"{table.label(str(key))} is no key of the format: {did_you_mean(key, keys)}"
                )
        return table

    def label(self, key: str) -> str:
        """Return the key with the name of its table, such as box.lengths, for messages."""
        return f"{self.name}.{key}" if self.name else key

    def has(self, key: str) -> bool:
        """Return whether this table of a TOML file has the key."""
        return key in self.values

    def raw(self, key: str, default: object = _MISSING) -> Any:
        """Return the value of a key of the TOML table, unchecked.

        If the key is missing, return ``default``; without a default raise InputError.
        """
        if key in self.values:
            return self.values[key]
        if default is _MISSING:
            raise InputError(f"{self.label(key)} is missing: add this key, see systems/README.md.")
        return default

    def _checked(self, key: str, default: object, good: Callable[[Any], bool], need: str) -> Any:
        """Return the value of a key of the TOML table; raise InputError if the test ``good`` fails.

        If the key is missing, return ``default``, which is not tested. ``need`` says in the message
        what to give.
        """
        value = self.raw(key, default)
        if key in self.values and not good(value):
            raise InputError(f"{self.label(key)} is {value!r}: give {need}.")
        return value

    def text(self, key: str, default: str = _MISSING, choices: Sequence[str] = ()) -> str:
        """Return the value of a key of the TOML table, which must be a string.

        If ``choices`` are given, the string must be one of them.
        """
        value = self._checked(key, default, lambda v: isinstance(v, str), "a text")
        if choices and value not in choices:
            raise InputError(f"{self.label(key)} is {value!r}: {did_you_mean(value, choices)}")
        return value

    def integer(self, key: str, default: int = _MISSING, least: int = 0) -> int:
        """Return the value of a key of the TOML table, which must be an integer.

        The integer must be at least ``least``. If the key is missing, return ``default``; without a
        default raise InputError.
        """
        return self._checked(
            key, default, lambda v: is_integer(v) and v >= least, f"an integer from {least}"
        )

    def number(self, key: str, default: float = _MISSING, positive: bool = True) -> float:
        """Return the value of a key of the TOML table, which must be a finite number above 0.

        With ``positive=False`` the number 0 is valid, too.
        """

        def good(value: Any) -> bool:
            if not is_number(value) or not np.isfinite(value):
                return False
            return value > 0 if positive else value >= 0

        need = "a positive number" if positive else "a number from 0"
        return self._checked(key, default, good, need)

    def boolean(self, key: str, default: bool | None = _MISSING) -> bool | None:
        """Return the value of a key of the TOML table, which must be true or false.

        If the key is missing, return ``default``; without a default raise InputError.
        """
        return self._checked(key, default, lambda v: isinstance(v, bool), "true or false")

    def array(self, key: str, shape: tuple[int | None, ...], integers: bool = False) -> np.ndarray:
        """Return the value of a key of the TOML table, which must be an array of numbers.

        The array must have the shape ``shape``, in which None stands for any length.
        """
        return array_of(self.label(key), self.raw(key), shape, integers)


def array_of(
    name: str, value: object, shape: tuple[int | None, ...] | None, integers: bool = False
) -> np.ndarray:
    """Convert a value to an array of finite numbers, and check the shape and the numbers.

    Args:
      name: name of the value, for messages.
      value: numbers in nested lists, or an array.
      shape: the required shape, in which None stands for any length; None for any shape.
      integers: whether integers are required.

    Returns:
      an array of integers if integers are required, else of floats.
    """
    need = _describe_array(shape, integers)
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


def _describe_array(shape: tuple[int | None, ...] | None, integers: bool) -> str:
    """Describe in words, for a message, the array that :func:`array_of` requires."""
    need = "integers" if integers else "numbers"
    if shape is None:
        return need
    lengths = ", ".join("any" if length is None else str(length) for length in shape)
    return f"{need} of shape ({lengths})"


def _has_shape(array: np.ndarray, shape: tuple[int | None, ...]) -> bool:
    """Return whether an array has the shape ``shape``, in which None stands for any length."""
    if array.ndim != len(shape):
        return False
    return all(length in (None, actual) for length, actual in zip(shape, array.shape, strict=True))
