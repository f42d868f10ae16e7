"""Outcomes of a computation: an integer that jit can carry, how grave it is, and a sentence to act on.

Each layer lists its own: :class:`mdsens.implicit.Result` those of a linear solve or a root,
:class:`mdsens.Status` those of relaxations and derivatives, which include the former. The codes of
both are one set, so that an array of codes passes from one layer to the other.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, ClassVar, Self

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

__all__ = ["Outcome", "Severity", "is_good", "name_of", "severity_of", "worse", "worst"]

INTEGER_FORMATS = tuple("bcdoxXn")  # what ends the format of a whole number


class Severity(IntEnum):
    """How far the number beside an outcome can be used."""

    NONE = 0  # converged
    NOTE = 1  # as good as this precision allows
    WARNING = 2  # usable by one who knows what the sentence says
    FAILURE = 3  # not usable


class Outcome(IntEnum):
    """Base of the enumerations of outcomes: each member has a ``severity`` and a ``sentence`` that
    names the cause and the remedy.

    Inside ``jit`` an outcome is an int32 array of its code. Printed, a member is its name and
    sentence; ``f"{status:d}"``, ``int(status)`` and json give the code.
    """

    severity: Severity
    sentence: str

    def __new__(cls, code: int, severity: Severity, sentence: str) -> Outcome:
        member = int.__new__(cls, code)
        member._value_ = code
        member.severity = severity
        member.sentence = sentence
        known = _Registry.severities.setdefault(code, severity)
        assert known is severity, f"two severities of outcome {code}"
        return member

    def __init__(self, *_: object) -> None:
        _Registry.names[int(self)] = self.name

    @property
    def entry(self) -> tuple[int, Severity, str]:
        """What a layer above lists this outcome by."""
        return int(self), self.severity, self.sentence

    @property
    def good(self) -> bool:
        """True where the number beside this outcome can be used."""
        return self.severity is not Severity.FAILURE

    @property
    def warning(self) -> bool:
        """True where the number can be used, and its user should know what the sentence says."""
        return self.severity is Severity.WARNING

    @classmethod
    def worst_of(cls, codes: Any) -> Self:
        """The gravest of some outcomes, members or an array of codes. Host code."""
        return cls(worst(codes))

    def __str__(self) -> str:
        return f"{self.name}: {self.sentence}"

    def __format__(self, spec: str) -> str:
        """As a number where the format is one of whole numbers, else as its text."""
        if spec[-1:] in INTEGER_FORMATS:
            return int.__format__(self, spec)
        return format(str(self), spec)


class _Registry:
    """Severity and name of each code, over all layers."""

    severities: ClassVar[dict[int, Severity]] = {}
    names: ClassVar[dict[int, str]] = {}


def name_of(code: int) -> str:
    """The name of an outcome, of whichever layer."""
    return _Registry.names[code]


def severity_of(codes: Any) -> Any:
    """The severities of an array of codes, by a table; traceable."""
    table = np.zeros(max(_Registry.severities) + 1, np.int32)
    for code, severity in _Registry.severities.items():
        table[code] = severity
    if isinstance(codes, Tracer):
        return jnp.asarray(table)[codes]
    return table[np.asarray(codes)]


def is_good(codes: Any) -> Any:
    """Whether the number beside each of an array of codes can be used; traceable."""
    return severity_of(codes) < Severity.FAILURE


def worse(first: Any, second: Any) -> Any:
    """The graver one of two codes, the first where they are equally grave; traceable."""
    traced = isinstance(first, Tracer) or isinstance(second, Tracer)
    xp: Any = jnp if traced else np
    return xp.where(severity_of(second) > severity_of(first), second, first)


def worst(codes: Any) -> int:
    """The gravest of an array of codes, the first of equally grave ones; that of success where
    there are none. Host code.
    """
    flat = np.ravel(np.asarray(codes))
    return int(flat[np.argmax(severity_of(flat))]) if flat.size else 0
