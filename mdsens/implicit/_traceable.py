"""A user's function where jax traces it: what it asks of a traced array is named by the line that asks.

jax calls a function with arrays that have a shape and a type and no numbers, and records what is done to them. A
function that needs the numbers (numpy, ``float``, ``if``) ends in an error that names jax's own sources; here it ends
in one that names the line of the function, and what to write there.
"""

from __future__ import annotations

import dataclasses
import linecache
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jaxlib
import numpy as np
import scipy

from mdsens.implicit.status import InputError

__all__ = ["Traceable"]

# What each error of jax means in the function that met it, the more special before the more general.
_REMEDIES: tuple[tuple[type[Exception], str], ...] = (
    (jax.errors.TracerBoolConversionError, "take jnp.where or jax.lax.cond in place of if, while, and, or"),
    (jax.errors.NonConcreteBooleanIndexError, "take jnp.where(mask, x, 0) in place of x[mask]"),
    (jax.errors.TracerIntegerConversionError, "take jnp.take or jax.lax.fori_loop in place of an index or a range"),
    (jax.errors.TracerArrayConversionError, "take jax.numpy in place of numpy there"),
    (jax.errors.ConcretizationTypeError, "take jax.numpy in place of float(), int() and math there"),
)
_OURS = Path(__file__).parents[1]
# Frames of these are not the user's: what his line called.
_OTHERS = tuple(Path(package.__path__[0]) for package in (jax, jaxlib, np, scipy))
_STANDARD = Path(sysconfig.get_path("stdlib"))
_INSTALLED = {"site-packages", "dist-packages"}
_SOURCE = 80  # characters of a line that are shown


@dataclasses.dataclass(frozen=True)
class Traceable:
    """A user's function of arrays, called with traced ones. Equal by value, as the function is.

    Attributes:
      what: names it in the error: "the observable".
      function: called as it is.
      otherwise: what else may be done than what the error's kind asks for; empty for nothing.
    """

    what: str
    function: Callable[..., Any]
    otherwise: str = ""

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The function, for whoever asks what a callable is made of."""
        return self.function

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns.

        Raises:
          InputError: it needs the numbers of a traced array: with the line, and what to write there.
        """
        try:
            return self.function(*arguments)
        except tuple(kind for kind, _ in _REMEDIES) as error:
            raise InputError(self._explained(error)) from error

    def _explained(self, error: Exception) -> str:
        remedy = next(text for kind, text in _REMEDIES if isinstance(error, kind))
        if self.otherwise:
            remedy = f"{remedy}, or {self.otherwise}"
        frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)][1:]  # the first is the call
        own = [k for k, (frame, _) in enumerate(frames) if _is_users(frame)]
        if not own:
            return f"{self.what} needs the numbers of an array that jax traces, which has none: {remedy}."
        frame, line = frames[own[-1]]
        inner = next((f for f, _ in frames[own[-1] + 1 :] if _is_ours(f)), None)
        if inner is not None:  # it is a function of this package that asks
            name = inner.f_code.co_name
            remedy = f"mdsens's {name} works on numbers alone, so call it outside of what is traced"
        return (
            f"{self.what} needs the numbers of an array that jax traces, which has none, in {_place(frame, line)}: "
            f"{remedy}."
        )


def _within(frame: FrameType, folder: Path) -> bool:
    return Path(frame.f_code.co_filename).is_relative_to(folder)


def _is_ours(frame: FrameType) -> bool:
    return _within(frame, _OURS)


def _is_users(frame: FrameType) -> bool:
    """Whether it is neither ours nor of what it called."""
    if _is_ours(frame) or any(_within(frame, folder) for folder in _OTHERS):
        return False
    standard = _within(frame, _STANDARD) and not _INSTALLED & set(Path(frame.f_code.co_filename).parts)
    return not standard and not frame.f_code.co_filename.startswith("<frozen")


def _place(frame: FrameType, line: int) -> str:
    """The function, the file and the line, and what stands there, where it can be read."""
    file, name = frame.f_code.co_filename, frame.f_code.co_name
    source = linecache.getline(file, line, frame.f_globals).strip()
    if len(source) > _SOURCE:
        source = source[: _SOURCE - 3] + "..."
    return f"{name} ({file}:{line}{f', `{source}`' if source else ''})"
