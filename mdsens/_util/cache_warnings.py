"""XLA's warnings of compiled code that it loads from jax's cache: silenced while it is loaded, and
then alone.

On a CPU every part that jax 0.10 loads is warned of as an error on the process's stderr, a thousand
characters each: XLA compares the features that it compiled for with those of the processor, and
takes its own tuning flags (prefer-no-scatter, prefer-no-gather), which no processor lists, for some
that this one lacks. The code runs right.
"""

from __future__ import annotations

import importlib
import os
import threading
from typing import Any

import jax

__all__ = ["silence"]

REQUESTED = (  # before the cache is looked through
    "/jax/compilation_cache/compile_requests_use_cache"
)
COMPILED = "/jax/core/compile/backend_compile_duration"  # after the code was loaded, or compiled
LEVELS = {"DEBUG": 0, "INFO": 0, "WARNING": 1, "WARN": 1, "ERROR": 2, "FATAL": 3, "CRITICAL": 3}
NOTHING = 3  # the level of what ends the process

_loading: set[int] = set()  # threads
_lock = threading.Lock()


def _usual() -> int:
    """The level of XLA's log that the user has, by jax's setting or by the environment."""
    chosen = jax.config.values.get("jax_logging_level")
    if chosen in LEVELS:
        return LEVELS[chosen]
    given = os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1")
    return int(given) if given.isdigit() else 1


def _set_level(level: int) -> None:
    utils: Any = importlib.import_module("jaxlib.utils")
    utils.absl_set_min_log_level(level)


def _requested(event: str, **_: Any) -> None:
    if event == REQUESTED:
        with _lock:
            _loading.add(threading.get_ident())
            _set_level(NOTHING)


def _compiled(event: str, duration_secs: float, **_: Any) -> None:
    if event == COMPILED and _loading:
        with _lock:
            _loading.discard(threading.get_ident())
            if not _loading:
                _set_level(_usual())


def silence() -> None:
    """From here on, in this process: wherever its cache is, and whoever has set it."""
    utils: Any = importlib.import_module("jaxlib.utils")
    if hasattr(utils, "absl_set_min_log_level"):
        jax.monitoring.register_event_listener(_requested)
        jax.monitoring.register_event_duration_secs_listener(_compiled)
