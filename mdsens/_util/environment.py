"""Check for releases of jax that compute wrong results, and processes in which jax would hang."""

from __future__ import annotations

import os

import jax

from mdsens._util.errors import MdsensError, UnsupportedVersionError

__all__ = ["require_sound_jax"]

# Releases of jax with known faults, and what is wrong with each.
_BAD_JAX = {
    "0.10.2": "miscompiles neighbor lists on CPU and drops pairs in silence (jax issue 39103)",
    "0.11.0": "gives wrong values on some GPUs (jax issue 40633)",
    "0.11.1": "gives wrong values on some GPUs (jax issue 40633)",
}
_first_process: int | None = None  # id of the process in which mdsens first used jax


def require_sound_jax() -> None:
    """Raise an error if this release of jax computes wrong results, or if jax would hang here.

    Raises:
      UnsupportedVersionError: the installed release of jax has a known fault; the message gives the
        fault and the remedy.
      MdsensError: this process was forked from one in which jax was in use. A fork does not copy
        threads, so that jax would wait forever for threads that do not exist.
    """
    global _first_process
    # A fork copies this variable, so that the id of the parent process is still in it.
    _first_process = _first_process or os.getpid()
    if os.getpid() != _first_process:
        raise MdsensError(
            "this process was forked from one in which jax was in use, so that any computation of"
            ' jax would hang: start processes with multiprocessing.get_context("spawn").'
        )
    if jax.__version__ in _BAD_JAX:
        raise UnsupportedVersionError(
            f"jax {jax.__version__} {_BAD_JAX[jax.__version__]}: install another release, "
            "pip install 'jax>=0.10.0,!=0.10.2,!=0.11.0,!=0.11.1,<0.13'."
        )
