"""Compiled programs kept in a folder, which later processes call without tracing their functions.

jax keeps compiled code under the program that it was compiled from. To look for it, a process first
traces and lowers the function, which takes longer than to load the code. Here a program is kept
under what it was traced from: the function, its static arguments, the shapes and types of its
arrays, and all that their tree holds besides, such as the functions of a potential; and the sources
of mdsens, the releases of the packages it builds on, the settings of jax and the processor.

A function in no module of mdsens, jax or numpy, such as that of a user's potential, may change
while its name stays: programs that depend on one are left to jax. A script that changes constants
in modules of mdsens should keep no programs.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import hashlib
import importlib
import inspect
import io
import os
import pickle
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from mdsens._util.cache_warnings import silenced

__all__ = ["SUFFIX", "Keeper", "Unkept", "keep_in", "keeps", "source_digest"]

# How the names of the files end: as those of jax, so that the oldest of both make room.
SUFFIX = "-mdsens-cache"
# Packages whose functions and classes are known by their names and the packages' releases.
# Not jax_md, which takes seconds to be imported.
KNOWN = frozenset({"builtins", "collections", "copyreg", "functools", "jax", "jaxlib", "mdsens"})
KNOWN |= {"numpy", "operator", "_operator"}
# Settings of jax that change no program: words in their names.
UNRELATED = ("cache", "jax_log", "traceback", "profiler")
# Settings with which jax does more in a call than to run a program.
WATCHFUL = ("jax_disable_jit", "jax_debug_nans", "jax_debug_infs")


class _Folder:
    """The folder in which this process keeps programs; None where it keeps none."""

    path: Path | None = None


def keep_in(folder: Path | None) -> None:
    """Keep programs in a folder from now on, and take them from there; in none where None."""
    _Folder.path = folder


def keeps() -> bool:
    """Return whether this process keeps programs in a folder."""
    return _Folder.path is not None


class Unkept(Exception):  # noqa: N818 - no error, but a program that is compiled as usual
    """What a program depends on cannot be named so that another process knows it again."""


class _Names(pickle.Pickler):
    """A pickler for names of programs, which refuses functions and classes that may change."""

    def persistent_id(self, obj: Any) -> None:
        """Raise Unkept for a function, or an object of a class, that is in no known package."""
        if not callable(obj):
            return
        module = getattr(obj, "__module__", None)
        if not isinstance(module, str) or module.partition(".")[0] not in KNOWN:
            raise Unkept(f"{obj!r} is in no known package")


def _pickled(content: Any) -> bytes:
    """Return an object as bytes; raise Unkept where it depends on code that may change."""
    file = io.BytesIO()
    pickler = _Names(file, protocol=5)
    # what is there twice is written twice: whether two equal values are one object depends on how
    # they were made
    pickler.fast = True
    try:
        pickler.dump(content)
    except Unkept:
        raise
    except Exception as error:  # of many kinds: a lambda, a lock, an open file
        raise Unkept(str(error)) from error
    return file.getvalue()


@functools.cache
def source_digest() -> str:
    """Return a digest of the sources of mdsens, and of the releases of the packages it builds on.

    Raises:
      OSError: the sources cannot be read.
    """
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode())
        digest.update(path.read_bytes())
    releases = [metadata.version(name) for name in ("jax", "jaxlib", "jax-md", "numpy")]
    digest.update(repr((sys.version, releases)).encode())
    return digest.hexdigest()[:32]


@functools.cache
def _processor() -> str:
    """Describe the processor: code compiled for one may not run on another."""
    described = [platform.machine(), platform.processor(), platform.system()]
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        kinds = ("model name", "flags", "Features", "CPU part")
        described += [line for line in first.splitlines() if line.startswith(kinds)]
    return repr(described)


# The settings of jax in this thread that programs depend on; None in a release that does not tell.
_settings_of_thread: Callable[[], tuple[Any, ...]] | None = getattr(
    importlib.import_module("jax._src.config"), "trace_context", None
)


def _context() -> tuple[Any, ...]:
    """Return the settings of jax in this thread that programs depend on.

    Raises:
      Unkept: one of them is no plain value, or this release of jax does not tell them.
    """
    if _settings_of_thread is None:
        raise Unkept("the settings of this thread are not known")
    # the named axes are left out: there are none where jax traces nothing
    settings = [x for x in _settings_of_thread() if type(x).__name__ != "AxisEnv"]
    plain = (bool, int, float, str, enum.Enum)
    if not all(x is None or x == () or isinstance(x, plain) for x in settings):
        raise Unkept("a setting of this thread is no plain value")
    return tuple(settings)


def _process() -> str:
    """Describe what programs depend on in this process, as a text.

    Raises:
      Unkept: there are several devices, or jax is to watch its programs for NaN.
    """
    values: Mapping[str, Any] = jax.config.values
    if len(jax.devices()) != 1 or any(values[name] for name in WATCHFUL):
        raise Unkept("several devices, or programs that jax watches")
    related = [
        (name, repr(value))
        for name, value in sorted(values.items())
        if not any(word in name for word in UNRELATED)
    ]
    device = jax.devices()[0]
    described = (device.platform, device.device_kind, os.environ.get("XLA_FLAGS", ""))
    return repr((related, described, source_digest(), _processor()))


class _Call(NamedTuple):
    """The arguments of a call of a function, those that are arrays apart from the static ones."""

    positional: tuple[Any, ...]
    named: dict[str, Any]
    static: tuple[tuple[str, Any], ...]


class Keeper:
    """The programs of one function, as compiled with some options, that are kept in the folder.

    Attributes:
      function: the function, of a module of mdsens.
      version: the function compiled by ``jax.jit``.
      static: names of its static arguments.
      options: options of the compiler.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        version: Any,
        static: tuple[str, ...],
        options: Mapping[str, Any],
    ):
        self.function = function
        self.version = version
        self.static = static
        self.options = options
        self._programs: dict[Any, Any] = {}

    @functools.cached_property
    def _order(self) -> tuple[str, ...] | None:
        """Names of the function's arguments in order; None where no program of it is kept."""
        function = self.function
        called = getattr(sys.modules.get(function.__module__), function.__qualname__, None)
        if function.__module__.partition(".")[0] != "mdsens":
            return None
        # What is defined inside of another function may depend on its variables. A function that
        # is transformed, as by jax.vmap, has the name of another one.
        if function is not called and function is not getattr(called, "__wrapped__", None):
            return None
        parameters = inspect.signature(function).parameters
        kinds = {parameter.kind for parameter in parameters.values()}
        open_ended = kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
        return None if open_ended else tuple(parameters)

    def __call__(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Call the function by a program that is kept, or else compile it and keep the program.

        Raises:
          Unkept: the program cannot be kept; nothing was computed.
        """
        call = self._split(arguments, named)
        leaves, tree = jax.tree.flatten((call.positional, call.named))
        try:
            kinds = tuple((x.shape, x.dtype, x.weak_type) for x in map(jax.typeof, leaves))
            here = (tree, kinds, call.static, _context())
            program = self._programs.get(here)
        except TypeError as error:  # no arrays, or a static argument without a hash: jax will tell
            raise Unkept(str(error)) from error
        if program is None:
            program = self._found(here, arguments, named)
            self._programs[here] = program
        return program(*call.positional, **call.named)

    def _split(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> _Call:
        """Split the arguments of a call into arrays and static ones."""
        order = self._order
        if order is None:
            raise Unkept("a function whose name does not tell what it is")
        by_place = list(zip(order, arguments, strict=False))
        static = [(k, v) for k, v in (*by_place, *named.items()) if k in self.static]
        positional = tuple(v for k, v in by_place if k not in self.static)
        others = {k: v for k, v in named.items() if k not in self.static}
        return _Call(positional, others, tuple(sorted(static, key=lambda item: item[0])))

    def _found(self, here: tuple[Any, ...], arguments: tuple[Any, ...], named: Any) -> Any:
        """Return a program from the folder, or compile it and write it there."""
        tree, kinds, static, context = here
        function = self.function
        name = (function.__module__, function.__qualname__, sorted(self.options.items()))
        content = _pickled((name, tree, static)) + repr((kinds, context, _process())).encode()
        assert _Folder.path is not None
        path = _Folder.path / f"{function.__name__}-{hashlib.sha256(content).hexdigest()}{SUFFIX}"
        program = _read(path, tree)
        if program is None:
            traced = self.version.trace(*arguments, **named)
            lowered = traced.lower()
            with _without_cache_of_jax():
                program = lowered.compile()
            if not _calls_process(traced.jaxpr.jaxpr):
                _write(path, program)
        return program


def _calls_process(jaxpr: Any) -> bool:
    """Return whether a program calls functions of this process, which another one has not."""
    for equation in jaxpr.eqns:
        if any(word in equation.primitive.name for word in ("callback", "ffi_call")):
            return True
        if any(map(_calls_process, _inner(equation))):
            return True
    return False


def _inner(equation: Any) -> list[Any]:
    """Return the programs inside of an equation of a program, such as the body of a loop."""
    parts: list[Any] = []
    for value in equation.params.values():
        parts += value if isinstance(value, list | tuple) else [value]
    # a closed program has the open one as its field
    programs = [getattr(part, "jaxpr", part) for part in parts]
    return [program for program in programs if hasattr(program, "eqns")]


@functools.cache
def _prepare_lapack() -> None:
    """Give jax the functions of LAPACK, which it looks up when it lowers the first call of one.

    Without them, a program that calls LAPACK ends the process.
    """
    jax.jit(jnp.linalg.cholesky).lower(np.eye(1))


def _read(path: Path, tree: Any) -> Any:
    """Return the program in a file; None where there is none for these arguments."""
    try:
        stored, trees = pickle.loads(path.read_bytes())
        tree_then, tree_out = pickle.loads(trees)
        if tree_then != tree:
            return None
        _prepare_lapack()
        with silenced():
            return serialize_executable.deserialize_and_load(stored, tree_then, tree_out)
    # a file that another process is writing, or that was damaged, raises errors of many kinds
    except Exception:
        return None


@contextlib.contextmanager
def _without_cache_of_jax() -> Iterator[None]:
    """Switch jax's own cache off: what jax loads from there cannot be written a second time.

    jax 0.10 writes it without an error, and what is read then lacks functions.
    """
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    # jax would not look at the setting again
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _write(path: Path, program: Any) -> None:
    """Write a program to a file, at once, so that no other process finds a part of it."""
    with contextlib.suppress(Exception):
        stored, tree, tree_out = serialize_executable.serialize(program)
        content = pickle.dumps((stored, _pickled((tree, tree_out))))
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
