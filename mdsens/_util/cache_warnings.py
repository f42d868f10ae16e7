"""Suppression of the warnings that XLA prints while jax loads compiled code from its cache.

On a CPU, jax 0.10 prints a warning of a thousand characters, marked as an error, on stderr for each
piece of compiled code that it loads. XLA, jax's compiler, compares the processor features that the
code was compiled for with the features of the present processor. The former also include XLA's own
tuning flags (prefer-no-scatter, prefer-no-gather). As no processor lists these flags as features,
XLA warns that they are missing. The code runs correctly. At all other times XLA's messages are
printed as the user has chosen.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import jax

__all__ = ["silence", "silenced"]

# Event of jax before it searches the cache.
REQUESTED = "/jax/compilation_cache/compile_requests_use_cache"
# Event of jax after the code was loaded from the cache, or compiled.
COMPILED = "/jax/core/compile/backend_compile_duration"
# XLA's number for each level of Python's logging, as in TF_CPP_MIN_LOG_LEVEL.
LEVELS = {"DEBUG": 0, "INFO": 0, "WARNING": 1, "WARN": 1, "ERROR": 2, "FATAL": 3, "CRITICAL": 3}
FATAL_ONLY = 3  # XLA's level at which only messages that end the process are printed

# The log level belongs to the whole process, while several threads may load code at a time: the
# level is raised by the first and restored by the last of them.
_loading_threads: set[int] = set()
_lock = threading.Lock()


def _user_level() -> int:
    """Return XLA's log level as the user has set it, in jax's configuration or the environment."""
    chosen = jax.config.values.get("jax_logging_level")
    if chosen in LEVELS:
        return LEVELS[chosen]
    level = os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1")
    return int(level) if level.isdigit() else 1


def _set_level(level: int) -> None:
    utils: Any = importlib.import_module("jaxlib.utils")
    utils.absl_set_min_log_level(level)


def _on_event(event: str, **_: object) -> None:
    if event == REQUESTED:
        with _lock:
            _loading_threads.add(threading.get_ident())
            _set_level(FATAL_ONLY)


def _on_duration(event: str, duration_secs: float, **_: object) -> None:
    if event == COMPILED and _loading_threads:
        with _lock:
            _loading_threads.discard(threading.get_ident())
            if not _loading_threads:
                _set_level(_user_level())


def _has_levels() -> bool:
    """Return whether this release of jaxlib can change the level of XLA's messages."""
    return hasattr(importlib.import_module("jaxlib.utils"), "absl_set_min_log_level")


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Silence the same warnings while this thread loads code without jax's cache."""
    if not _has_levels():
        yield
        return
    _on_event(REQUESTED)
    try:
        yield
    finally:
        _on_duration(COMPILED, 0.0)


def silence() -> None:
    """Silence XLA's warnings about cached code in this process, whatever cache folder jax uses."""
    if _has_levels():
        jax.monitoring.register_event_listener(_on_event)
        jax.monitoring.register_event_duration_secs_listener(_on_duration)
