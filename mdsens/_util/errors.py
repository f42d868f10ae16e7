"""Errors that mdsens raises on purpose, and the short form of values in their messages."""

from __future__ import annotations

from typing import Any

from mdsens._util.outcome import Outcome

__all__ = [
    "ConvergenceError",
    "InputError",
    "MdsensError",
    "PrecisionError",
    "TooLargeError",
    "UnsupportedVersionError",
    "raise_for_status",
    "short",
]


class MdsensError(Exception):
    """Base of every error that mdsens raises on purpose."""


class InputError(MdsensError, ValueError):
    """Bad input: the message names the field, the value and the remedy."""


class PrecisionError(InputError):
    """The floating-point precision is too low.

    It is too low for the requested tolerance, or for data that were made in a higher precision.
    """


class TooLargeError(MdsensError, MemoryError):
    """The result would not fit in memory; the message gives the size."""


class UnsupportedVersionError(MdsensError, ImportError):
    """A dependency is installed in a version known to give wrong numbers."""


class ConvergenceError(MdsensError, RuntimeError):
    """A computation ended without a usable result.

    Attributes:
      status: the outcome, whose sentence says what failed and what to do.
      result: the last state of the computation; None where there is no state.
    """

    def __init__(self, message: str, status: Outcome, result: object = None):
        super().__init__(message)
        self.status = status
        self.result: Any = result

    def __reduce__(self) -> tuple[Any, ...]:
        # Python's default restores an exception from its ``args``, here the message alone. The
        # call would lack ``status``, and a pool of processes would break.
        return type(self), (str(self), self.status, self.result)


def raise_for_status(status: Outcome, what: str, result: object = None) -> None:
    """Raise :class:`ConvergenceError` where ``status`` is not good. Not for compiled code.

    Args:
      status: the outcome.
      what: the computation, for the message.
      result: the last state of the computation, for the error.
    """
    if not status.good:
        raise ConvergenceError(f"{what}: {status.sentence}.", status, result)


def short(value: object) -> str:
    """Format a value for a message: on one line, in 60 characters at most."""
    try:
        text = " ".join(repr(value).split())
    except Exception:
        # A value whose repr fails must not replace the error that is being reported.
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
