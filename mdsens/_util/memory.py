"""Check that a large result fits into the free memory, before it is computed."""

from __future__ import annotations

import psutil

from mdsens._util.errors import TooLargeError

__all__ = ["available_memory", "require_memory"]

# Largest part of the free memory that one result may take.
MEMORY_SHARE = 0.5


def available_memory() -> float:
    """Return the free memory in bytes that can be used without swapping to disk."""
    return float(psutil.virtual_memory().available)


def require_memory(entries: float, itemsize: int, what: str, remedy: str) -> None:
    """Raise TooLargeError where an array would take more than half of the free memory.

    Args:
      entries: number of entries of the array.
      itemsize: number of bytes of an entry.
      what: description of the array, for the message.
      remedy: what the user can do, for the message.
    """
    needed = float(entries) * itemsize
    free = available_memory()
    if needed > MEMORY_SHARE * free:
        raise TooLargeError(
            f"{what} takes {needed / 2**30:.3g} GiB, more than half of the free memory of"
            f" {free / 2**30:.3g} GiB: {remedy}"
        )
