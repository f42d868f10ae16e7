"""Errors that mdsens raises on purpose, and the short form of values in their messages."""

from __future__ import annotations

from typing import Any

from mdsens._util.outcome import Outcome

__all__ = [
    "ConvergenceError",
    "InputError",
    "InterruptionError",
    "MdsensError",
    "PrecisionError",
    "TooLargeError",
    "UnsupportedVersionError",
    "raise_for_status",
    "short",
]


class MdsensError(Exception):
    """Base class of every error that mdsens raises on purpose."""


class InputError(MdsensError, ValueError):
    """An input is invalid; the message names the field, its value and the remedy."""


class PrecisionError(InputError):
    """The floating-point precision in use is too low.

    It is too low for the requested tolerance, or for data that were made in a higher precision.
    """


class TooLargeError(MdsensError, MemoryError):
    """A result would not fit in memory; the message gives the size of the result."""


class UnsupportedVersionError(MdsensError, ImportError):
    """A dependency is installed in a version known to give wrong numbers."""


class ConvergenceError(MdsensError, RuntimeError):
    """A computation, such as a relaxation or a linear solve, ended without a usable result.

    Attributes:
      status: the outcome of the computation, whose sentence says what failed and what to do.
      result: the last state of the computation; None where there is no state.
    """

    def __init__(self, message: str, status: Outcome, result: object = None):
        super().__init__(message)
        self.status = status
        self.result: Any = result

    def __str__(self) -> str:
        # where the longer explanation is, with causes and remedies
        return f"{self.args[0]} ms.explain({self.status.name!r}) tells more."

    def __reduce__(self) -> tuple[Any, ...]:
        # Python's default restores an exception from its ``args``, here the message alone. The
        # call would lack ``status``, and a pool of processes would break.
        return type(self), (self.args[0], self.status, self.result)


class InterruptionError(ConvergenceError, KeyboardInterrupt):
    """A computation was interrupted, as by Ctrl-C; ``result`` is the last state that it reached.

    It is a ConvergenceError, as for every result that cannot be used, and a KeyboardInterrupt, so
    that code which stops at Ctrl-C stops here, too.
    """


def raise_for_status(
    status: Outcome, what: str, result: object = None, interrupted: bool = False
) -> None:
    """Raise :class:`ConvergenceError` if a computation failed. Not for use inside ``jit``.

    Args:
      status: the outcome of the computation; ``status.good`` is False for a failure.
      what: name of the computation, for the message.
      result: the last state of the computation, stored in the error.
      interrupted: whether the computation was interrupted, for an :class:`InterruptionError`.
    """
    if not status.good:
        error = InterruptionError if interrupted else ConvergenceError
        raise error(f"{what}: {status.sentence}.", status, result)


def short(value: object) -> str:
    """Format a value for an error message: on one line, in at most 60 characters."""
    try:
        text = " ".join(repr(value).split())
    except Exception:
        # A value whose repr fails must not replace the error that is being reported.
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
