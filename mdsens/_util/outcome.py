"""Outcomes of computations: each has an integer code, a severity, and a sentence with the remedy.

:class:`mdsens.implicit.Result` lists the outcomes of a linear solve or a root search.
:class:`mdsens.Status` lists the same outcomes, under the same codes, and in addition those of
relaxations and derivatives.
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
    """How far the result of a computation can be used: fully, with a restriction, or not at all."""

    NONE = 0  # converged
    NOTE = 1  # as good as this precision allows
    WARNING = 2  # usable with the restriction that the sentence states
    FAILURE = 3  # not usable


class Outcome(IntEnum):
    """Base class of enumerations of the outcomes of a computation, such as ``mdsens.Status``.

    Inside ``jit`` an outcome is an int32 array with its code. An outcome prints as its name and
    sentence; ``f"{status:d}"``, ``int(status)`` and json give the code.

    Attributes:
      severity: how far the result of the computation can be used.
      sentence: the cause of the outcome and the remedy.
    """

    severity: Severity
    sentence: str

    def __new__(cls, code: int, severity: Severity, sentence: str) -> Outcome:
        member = int.__new__(cls, code)
        # without this, enum makes the value from all three arguments
        member._value_ = code
        member.severity = severity
        member.sentence = sentence
        # Both enumerations share their codes, so that a code must have one severity.
        known = _Registry.severities.setdefault(code, severity)
        assert known is severity, f"two severities of outcome {code}"
        return member

    def __init__(self, *_: object) -> None:
        # not in __new__, where enum has not set the name yet
        _Registry.names[int(self)] = self.name

    @property
    def entry(self) -> tuple[int, Severity, str]:
        """Code, severity and sentence of this outcome of a computation.

        They define the same outcome in another enumeration.
        """
        return int(self), self.severity, self.sentence

    @property
    def good(self) -> bool:
        """Whether the result of a computation with this outcome can be used."""
        return self.severity is not Severity.FAILURE

    @property
    def warning(self) -> bool:
        """Whether a result with this outcome can be used, but only with a restriction.

        The attribute ``sentence`` of the outcome states the restriction.
        """
        return self.severity is Severity.WARNING

    @classmethod
    def worst_of(cls, codes: ArrayLike) -> Self:
        """Return the most severe of several outcomes of computations.

        ``codes`` is an array of the codes of the outcomes. Not for use inside ``jit``.
        """
        return cls(worst(codes))

    def __str__(self) -> str:
        return f"{self.name}: {self.sentence}"

    def __format__(self, spec: str) -> str:
        """Format the outcome of a computation as its code, or as its name and sentence.

        The code is formatted if ``spec`` is a format of whole numbers, as in ``f"{status:d}"``.
        """
        if spec[-1:] in INTEGER_FORMATS:
            return int.__format__(self, spec)
        return format(str(self), spec)


class _Registry:
    """Severity and name of every outcome of a computation, by the outcome's integer code."""

    severities: ClassVar[dict[int, Severity]] = {}
    names: ClassVar[dict[int, str]] = {}


def name_of(code: int) -> str:
    """Return the name of the outcome of a computation that has this integer code."""
    return _Registry.names[code]


def severity_of(codes: ArrayLike) -> Any:
    """Look up the severity of each outcome in an array of their codes; works inside ``jit``."""
    table = np.zeros(max(_Registry.severities) + 1, np.int32)
    for code, severity in _Registry.severities.items():
        table[code] = severity
    # numpy outside of jit, where indexing an array of jax would be a dispatch
    if isinstance(codes, Tracer):
        return jnp.asarray(table)[codes]
    return table[np.asarray(codes)]


def is_good(codes: ArrayLike) -> Any:
    """Return whether a result can be used, given the code of the outcome of its computation.

    For an array of codes the answer is an array of truth values. Works inside ``jit``.
    """
    return severity_of(codes) < Severity.FAILURE


def worse(first: ArrayLike, second: ArrayLike) -> Any:
    """Return the more severe of two outcomes of a computation, the first if equally severe.

    The arguments are codes of outcomes, or arrays of codes that are compared entry by entry. Works
    inside ``jit``.
    """
    traced = isinstance(first, Tracer) or isinstance(second, Tracer)
    xp: Any = jnp if traced else np
    return xp.where(severity_of(second) > severity_of(first), second, first)


def worst(codes: ArrayLike) -> int:
    """Return the code of the most severe outcome in an array of codes of outcomes.

    Of equally severe outcomes the first one counts. For an empty array the result is 0, the code of
    success. Not for use inside ``jit``.
    """
    flat = np.ravel(np.asarray(codes))
    return int(flat[np.argmax(severity_of(flat))]) if flat.size else 0
