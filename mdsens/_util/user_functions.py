"""Calls of functions of the user, with errors that name the line that jax cannot trace.

To trace a function, jax calls the function with arrays that have a shape and a type but no values,
and records the operations on them. A function that needs the values (numpy, ``float``, ``if``)
fails with an error that names jax's own sources. This module raises an error that names the line
of the user's function instead, and what to write there.
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
    """A kind of operation that is impossible on an array without values, and the message for it.

    Attributes:
      error_type: type of the error that jax or numpy raises.
      begins: first words of that error's message; empty for any message.
      fault: what the user's function does, for the message of mdsens.
      remedy: what to write instead, for the message of mdsens.
    """

    error_type: type[Exception]
    begins: str
    fault: str
    remedy: str


_BRANCH = (
    "branches on the values of an array that jax traces",
    "use jnp.where or jax.lax.cond in place of if, while, and, or",
)
_INDEX = (
    "uses an array that jax traces as an index or a count",
    "use jnp.take or jax.lax.fori_loop there",
)
_NUMPY = "passes an array that jax traces to numpy", "use jax.numpy in place of numpy there"
_NUMBER = (
    "converts an array that jax traces to a Python number",
    "use jax.numpy in place of float(), int() and math there",
)
# The first entry that fits counts, so a derived class of errors stands before its base class. For
# arrays with several entries jax raises the same errors as numpy: those are known by their words.
_FAULTS = (
    _Fault(jax.errors.TracerBoolConversionError, "", *_BRANCH),
    _Fault(ValueError, "The truth value of an array", *_BRANCH),
    _Fault(
        jax.errors.NonConcreteBooleanIndexError,
        "",
        "selects entries by a mask that jax traces",
        "use jnp.where(mask, x, 0) in place of x[mask]",
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
        "use x = x.at[k].set(value) in place of x[k] = value",
    ),
)
# Folders whose source lines are not the user's: mdsens, the libraries that a line of the user may
# call, and Python's standard library.
_MDSENS = Path(__file__).parents[1]
_LIBRARIES = tuple(Path(package.__path__[0]) for package in (jax, jaxlib, np, scipy))
_STANDARD = Path(sysconfig.get_path("stdlib"))
# Other installed packages are in these folders inside of the standard library's; they count as the
# user's.
_INSTALLED = {"site-packages", "dist-packages"}
_SOURCE_LENGTH = 80  # largest number of characters of the source line in a message


@dataclasses.dataclass(frozen=True)
class Traceable:
    """A function of the user that jax will trace, that is, call with arrays without values.

    Two objects of this class are equal if their attributes are equal. For an equal object, jax
    reuses the compiled code.

    Attributes:
      what: name of the function in an error message, such as "the observable".
      function: the function itself.
      otherwise: a second remedy that every error message adds; empty for none.
    """

    what: str
    function: Callable[..., Any]
    otherwise: str = ""

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The user's function, under the name by which Python's ``inspect`` looks for it."""
        return self.function

    def __call__(self, *arguments: Any) -> Any:
        """Call the user's function.

        Raises:
          InputError: the function needs the values of an array that jax traces. The message gives
            the line of the function, and what to write there.
        """
        try:
            return self.function(*arguments)
        # base classes of all error types in _FAULTS
        except (TypeError, ValueError, IndexError) as error:
            for fault in _FAULTS:
                if isinstance(error, fault.error_type) and str(error).startswith(fault.begins):
                    raise InputError(self._message(fault, error)) from error
            raise

    def _message(self, fault: _Fault, error: Exception) -> str:
        """Compose the message of the error that is raised if jax cannot trace the user's function.

        The message gives the fault, the line of the user's code, and the remedy.
        """
        remedy = f"{fault.remedy}, or {self.otherwise}" if self.otherwise else fault.remedy
        # the first frame is that of __call__ above
        frames = list(traceback.walk_tb(error.__traceback__))[1:]
        of_user = [k for k, (frame, _) in enumerate(frames) if _is_of_user(frame)]
        if not of_user:
            return f"{self.what} {fault.fault}: {remedy}."
        frame, line = frames[of_user[-1]]
        called = next((f for f, _ in frames[of_user[-1] + 1 :] if _is_of_mdsens(f)), None)
        if called is not None:
            # The user's line calls a function of mdsens that needs values: jax.numpy is no remedy.
            remedy = (
                f"mdsens's {called.f_code.co_name} works on numbers, so call it outside of the"
                " function that jax traces"
            )
        return f"{self.what} {fault.fault}, in {_location(frame, line)}: {remedy}."


def _is_within(frame: FrameType, folder: Path) -> bool:
    return Path(frame.f_code.co_filename).is_relative_to(folder)


def _is_of_mdsens(frame: FrameType) -> bool:
    return _is_within(frame, _MDSENS)


def _is_of_user(frame: FrameType) -> bool:
    """Return whether a stack frame is of the user's code: not of mdsens, a library or Python."""
    if _is_of_mdsens(frame) or any(_is_within(frame, folder) for folder in _LIBRARIES):
        return False
    file = frame.f_code.co_filename
    standard = _is_within(frame, _STANDARD) and not _INSTALLED & set(Path(file).parts)
    # Modules that are built into Python have names such as <frozen importlib._bootstrap>.
    return not standard and not file.startswith("<frozen")


def _location(frame: FrameType, line: int) -> str:
    """Describe a line of code: function, file, line number, and the source text if available."""
    file = frame.f_code.co_filename
    name = frame.f_code.co_name
    source = linecache.getline(file, line, frame.f_globals).strip()
    if len(source) > _SOURCE_LENGTH:
        source = source[: _SOURCE_LENGTH - 3] + "..."
    return f"{name} ({file}:{line}{f', `{source}`' if source else ''})"
