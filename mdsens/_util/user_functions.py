"""A user's function where jax traces it: what it does that a traced array does not allow is named
by its line.

jax calls a function with arrays that have a shape and a type and no numbers, and records what is
done to them. A function that needs the numbers (numpy, ``float``, ``if``) ends in an error that
names jax's own sources; here it ends in one that names the line of the function, and what to write
there.
"""

from __future__ import annotations

import dataclasses
import linecache
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import jaxlib
import numpy as np
import scipy

from mdsens._util.errors import InputError

__all__ = ["Traceable"]


class _Fault(NamedTuple):
    """An error of an array of jax, by its type and the beginning of its message; what was done, and
    what to do.
    """

    kind: type[Exception]
    begins: str
    done: str
    remedy: str


_BRANCH = (
    "decides by an array that jax traces",
    "take jnp.where or jax.lax.cond in place of if, while, and, or",
)
_INDEX = "counts or indexes by an array that jax traces", "take jnp.take or jax.lax.fori_loop there"
_NUMPY = "gives numpy an array that jax traces", "take jax.numpy in place of numpy there"
_NUMBER = (
    "makes a Python number of an array that jax traces",
    "take jax.numpy in place of float(), int() and math there",
)
# The more special before the more general. Of arrays with several entries jax raises what numpy
# does.
_FAULTS = (
    _Fault(jax.errors.TracerBoolConversionError, "", *_BRANCH),
    _Fault(ValueError, "The truth value of an array", *_BRANCH),
    _Fault(
        jax.errors.NonConcreteBooleanIndexError,
        "",
        "selects by an array that jax traces",
        "take jnp.where(mask, x, 0) in place of x[mask]",
    ),
    _Fault(jax.errors.TracerIntegerConversionError, "", *_INDEX),
    _Fault(TypeError, "Only integer scalar arrays", *_INDEX),
    _Fault(jax.errors.TracerArrayConversionError, "", *_NUMPY),
    _Fault(ValueError, "setting an array element with a sequence", *_NUMPY),
    _Fault(jax.errors.ConcretizationTypeError, "", *_NUMBER),
    _Fault(TypeError, "Only scalar arrays", *_NUMBER),
    _Fault(ValueError, "can only convert an array of size 1", *_NUMBER),
    _Fault(
        TypeError,
        "JAX arrays are immutable",
        "changes an array of jax in place",
        "take x = x.at[k].set(value) in place of x[k] = value",
    ),
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
      otherwise: what else may be done than what the fault asks for; empty for nothing.
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
          InputError: it does what a traced array does not allow: with the line, and what to write
            there.
        """
        try:
            return self.function(*arguments)
        except (TypeError, ValueError, IndexError) as error:
            for fault in _FAULTS:
                if isinstance(error, fault.kind) and str(error).startswith(fault.begins):
                    raise InputError(self._explained(fault, error)) from error
            raise

    def _explained(self, fault: _Fault, error: Exception) -> str:
        remedy = f"{fault.remedy}, or {self.otherwise}" if self.otherwise else fault.remedy
        frames = list(traceback.walk_tb(error.__traceback__))[1:]  # the first is the call above
        own = [k for k, (frame, _) in enumerate(frames) if _is_users(frame)]
        if not own:
            return f"{self.what} {fault.done}: {remedy}."
        frame, line = frames[own[-1]]
        inner = next((f for f, _ in frames[own[-1] + 1 :] if _is_ours(f)), None)
        if inner is not None:  # it is a function of this package that needs numbers
            remedy = (
                f"mdsens's {inner.f_code.co_name} works on numbers, so call it outside of what is"
                " traced"
            )
        return f"{self.what} {fault.done}, in {_place(frame, line)}: {remedy}."


def _within(frame: FrameType, folder: Path) -> bool:
    return Path(frame.f_code.co_filename).is_relative_to(folder)


def _is_ours(frame: FrameType) -> bool:
    return _within(frame, _OURS)


def _is_users(frame: FrameType) -> bool:
    """Whether it is neither ours nor of what it called."""
    if _is_ours(frame) or any(_within(frame, folder) for folder in _OTHERS):
        return False
    standard = _within(frame, _STANDARD) and not _INSTALLED & set(
        Path(frame.f_code.co_filename).parts
    )
    return not standard and not frame.f_code.co_filename.startswith("<frozen")


def _place(frame: FrameType, line: int) -> str:
    """The function, the file and the line, and what stands there, where it can be read."""
    file, name = frame.f_code.co_filename, frame.f_code.co_name
    source = linecache.getline(file, line, frame.f_globals).strip()
    if len(source) > _SOURCE:
        source = source[: _SOURCE - 3] + "..."
    return f"{name} ({file}:{line}{f', `{source}`' if source else ''})"
