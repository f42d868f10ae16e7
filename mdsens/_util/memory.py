"""What a large result takes, and what is free: asked before it is made."""

from __future__ import annotations

import os

from mdsens._util.errors import TooLargeError

__all__ = ["require_memory"]

MEMORY_SHARE = 0.5  # of what is free, at most, for one result


def _available_memory() -> float:
    """Bytes free for a new result."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable"):
                    return 1024.0 * float(line.split()[1])
    except OSError:
        pass
    try:
        return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return float("inf")


def require_memory(entries: float, itemsize: int, what: str, remedy: str) -> None:
    """Raise TooLargeError where so many entries take more than half of the free memory."""
    needed, free = float(entries) * itemsize, _available_memory()
    if needed > MEMORY_SHARE * free:
        raise TooLargeError(
            f"{what} takes {needed / 2**30:.3g} GiB and {free / 2**30:.3g} GiB are free: {remedy}"
        )
