"""Outcomes of a computation: an integer code for jit, a severity, and a sentence with the remedy.

:class:`mdsens.implicit.Result` lists the outcomes of a linear solve or a root, and
:class:`mdsens.Status` those of relaxations and derivatives, which include the former. Both use the
same codes, so that an array of codes can be passed from one layer to the other.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, ClassVar, Self

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from numpy.typing import ArrayLike

__all__ = ["Outcome", "Severity", "is_good", "name_of", "severity_of", "worse", "worst"]

# Last letters of Python's format strings for whole numbers, as in f"{status:d}".
INTEGER_FORMATS = tuple("bcdoxXn")


class Severity(IntEnum):
    """Whether the result beside an outcome can be used."""

    NONE = 0  # converged
    NOTE = 1  # as good as this precision allows
    WARNING = 2  # usable with the restriction that the sentence states
    FAILURE = 3  # not usable


class Outcome(IntEnum):
    """Base of the enumerations of outcomes.

    Inside ``jit`` an outcome is an int32 array of its code. A member prints as its name and
    sentence; ``f"{status:d}"``, ``int(status)`` and json give the code.

    Attributes:
      severity: whether the result can be used.
      sentence: the cause and the remedy.
    """

    severity: Severity
    sentence: str

    def __new__(cls, code: int, severity: Severity, sentence: str) -> Outcome:
        member = int.__new__(cls, code)
        member._value_ = code
        member.severity = severity
        member.sentence = sentence
        # Both enumerations share their codes, so that a code must have one severity.
        known = _Registry.severities.setdefault(code, severity)
        assert known is severity, f"two severities of outcome {code}"
        return member

    def __init__(self, *_: object) -> None:
        _Registry.names[int(self)] = self.name

    @property
    def entry(self) -> tuple[int, Severity, str]:
        """Code, severity and sentence, from which another enumeration repeats this outcome."""
        return int(self), self.severity, self.sentence

    @property
    def good(self) -> bool:
        """Whether the result can be used."""
        return self.severity is not Severity.FAILURE

    @property
    def warning(self) -> bool:
        """Whether the result can be used with the restriction that the sentence states."""
        return self.severity is Severity.WARNING

    @classmethod
    def worst_of(cls, codes: ArrayLike) -> Self:
        """Return the most severe of some outcomes or codes. Not for compiled code."""
        return cls(worst(codes))

    def __str__(self) -> str:
        return f"{self.name}: {self.sentence}"

    def __format__(self, spec: str) -> str:
        """Format the code where ``spec`` is a format of whole numbers, else name and sentence."""
        if spec[-1:] in INTEGER_FORMATS:
            return int.__format__(self, spec)
        return format(str(self), spec)


class _Registry:
    """Severity and name of each code of all enumerations."""

    severities: ClassVar[dict[int, Severity]] = {}
    names: ClassVar[dict[int, str]] = {}


def name_of(code: int) -> str:
    """Return the name of the outcome with this code, of any enumeration."""
    return _Registry.names[code]


def severity_of(codes: ArrayLike) -> Any:
    """Look up the severities of an array of codes; traceable."""
    table = np.zeros(max(_Registry.severities) + 1, np.int32)
    for code, severity in _Registry.severities.items():
        table[code] = severity
    # numpy outside of jit, where indexing an array of jax would be a dispatch
    if isinstance(codes, Tracer):
        return jnp.asarray(table)[codes]
    return table[np.asarray(codes)]


def is_good(codes: ArrayLike) -> Any:
    """Whether the result of each of an array of codes can be used; traceable."""
    return severity_of(codes) < Severity.FAILURE


def worse(first: ArrayLike, second: ArrayLike) -> Any:
    """Return the more severe of two codes, the first where they are equal; traceable.

    For codes or arrays of codes.
    """
    traced = isinstance(first, Tracer) or isinstance(second, Tracer)
    xp: Any = jnp if traced else np
    return xp.where(severity_of(second) > severity_of(first), second, first)


def worst(codes: ArrayLike) -> int:
    """Return the most severe of an array of codes, the first if equal. Not for compiled code.

    For an empty array the result is 0, the code of success.
    """
    flat = np.ravel(np.asarray(codes))
    return int(flat[np.argmax(severity_of(flat))]) if flat.size else 0
