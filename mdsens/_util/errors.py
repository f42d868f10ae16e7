"""Errors that mdsens raises on purpose, and how values stand in their messages."""

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
    """This floating-point precision does not do: for the tolerance asked for, or for what was made
    in a higher one.
    """


class TooLargeError(MdsensError, MemoryError):
    """The result would not fit in memory; the message gives the size."""


class UnsupportedVersionError(MdsensError, ImportError):
    """A dependency is installed in a version known to give wrong numbers."""


class ConvergenceError(MdsensError, RuntimeError):
    """A computation ended without a usable number; ``status`` says how, ``result`` holds what there
    is.
    """

    def __init__(self, message: str, status: Outcome, result: Any = None):
        super().__init__(message)
        self.status = status
        self.result = result

    def __reduce__(self) -> Any:
        # an exception is made anew from its ``args``, which are the message alone: a pool of
        # processes would break
        return type(self), (str(self), self.status, self.result)


def raise_for_status(status: Outcome, what: str, result: Any = None) -> None:
    """Raise :class:`ConvergenceError` where ``status`` is not good. Called on the host alone."""
    if not status.good:
        raise ConvergenceError(f"{what}: {status.sentence}.", status, result)


def short(value: Any) -> str:
    """A value as it may stand in a message: on one line, 60 characters at most."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # what cannot be shown must not hide what is wrong with it
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
