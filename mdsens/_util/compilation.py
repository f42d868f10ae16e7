"""Compilation of the package's functions: quick for small systems, thorough for large ones.

Compiling with all of XLA's optimizations takes seconds, and a small system is done in milliseconds
whatever the code. :func:`compiled` takes the place of ``jax.jit``: it makes the same compiled
function, and chooses the compiler's effort by the size of the arguments.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from mdsens._util.kept_programs import Keeper, Unkept, keep_in, keeps

__all__ = ["SMALL", "as_jax", "at_top", "cache_folder", "compiled", "keep_compiled"]

# Floating-point numbers in the arguments of a call up to which its code is compiled quickly. A
# packing of 128 discs has 700, a glass of 500 atoms 3,000. For 1,024 discs, with 5,000, such code
# made a derivative a third slower, and there are more derivatives than compilations.
SMALL = 4000
# The same for code with the plain options, compiled in half the time of thorough code. A derivative
# of a glass of 500 atoms (7,500 numbers) takes as long with both. With plain code up to 30,000
# numbers, a certificate of 1,024 discs took a quarter longer.
MEDIUM = 8000
# The same for loops, which are never compiled quickly: plain code cost 1,000 spheres half as much
# again for each step.
MEDIUM_LOOP = 2000
# Options of XLA for code that is compiled in less time and runs as fast for small arrays: without
# the fusion emitters and with one module a program. Releases of jax from 0.11 on have no such
# switches, and refuse options that they do not know.
_PLAIN: dict[str, Any] = (
    {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
    if jax.__version_info__ < (0, 11)
    else {}
)
# Options of XLA for code that is compiled in a quarter of the time: this code runs up to three
# times slower in loops over small arrays.
_QUICK: dict[str, Any] = {
    **_PLAIN,
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


# Bytes of compiled code that a folder keeps: beyond them the oldest files are deleted until
# three quarters are left. A packing with its derivatives takes 2 MB, a glass 5 MB.
KEPT = 2_000_000_000
# Shortest compilation that is kept, in seconds. Loading takes a few milliseconds.
WORTH_KEEPING = 0.02


def _never_at_top() -> bool:
    """Stand in for jax's own function in a release of jax that lacks it."""
    return False


# Whether jax traces nothing at present. Options of the compiler are for the outermost of nested
# compiled functions, and jax refuses them inside.
at_top: Callable[[], bool] = getattr(
    importlib.import_module("jax._src.core"), "trace_state_clean", _never_at_top
)


def compiled(
    function: Callable[..., Any] | None = None,
    *,
    static_argnames: str | tuple[str, ...] = (),
    loops: bool = False,
) -> Callable[..., Any]:
    """Compile a function as ``jax.jit`` does, with less effort where the arguments are small.

    Args:
      function: the function; None to get a decorator with these options.
      static_argnames: names of the arguments that are no arrays, as in ``jax.jit``.
      loops: whether the function repeats its work many times, such as a minimizer. Its code is
        never compiled quickly.
    """
    if function is None:
        return functools.partial(compiled, static_argnames=static_argnames, loops=loops)
    thorough: Any = jax.jit(function, static_argnames=static_argnames)
    plain: Any = jax.jit(function, static_argnames=static_argnames, compiler_options=_PLAIN or None)
    quick: Any = jax.jit(function, static_argnames=static_argnames, compiler_options=_QUICK)
    # each version with its options, and the largest number of numbers in its arguments
    small = -1 if loops else SMALL
    medium = MEDIUM_LOOP if loops else MEDIUM
    versions = ((small, quick, _QUICK), (medium, plain, _PLAIN), (math.inf, thorough, {}))
    names = (static_argnames,) if isinstance(static_argnames, str) else static_argnames
    keepers = tuple(
        (limit, version, Keeper(function, version, names, options))
        for limit, version, options in versions
    )

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        if not (at_top() and jax.default_backend() == "cpu"):
            return thorough(*arguments, **named)
        count = _numbers((arguments, named))
        _, version, keeper = next(entry for entry in keepers if count <= entry[0])
        if keeps():
            with contextlib.suppress(Unkept):
                return keeper(arguments, named)
        return version(*arguments, **named)

    # for tests that count programs, or forget them
    call.versions = (quick, plain, thorough)  # type: ignore[attr-defined]
    return call


def _numbers(arguments: Any) -> int:
    """Count the floating-point numbers in the arguments of a call."""
    arrays = [leaf for leaf in jax.tree.leaves(arguments) if hasattr(leaf, "dtype")]
    return sum(array.size for array in arrays if array.dtype.kind == "f")


def as_jax(value: ArrayLike, dtype: DTypeLike | None = None) -> jax.Array:
    """Return numbers of the host as an array of jax, without compiling a program.

    ``jnp.asarray`` compiles one for each shape and type (in jax 0.10), and another where the type
    changes.

    Args:
      value: a number or an array, not traced.
      dtype: the type of the result; None for that of ``value``.
    """
    return jax.device_put(np.asarray(value, dtype))


def cache_folder() -> Path:
    """Return the folder ``mdsens`` in the user's folder of caches, which may not exist yet.

    That is ``XDG_CACHE_HOME`` of the environment, or else ``~/.cache``.

    Raises:
      RuntimeError: the user has no home directory.
    """
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(chosen) if os.path.isabs(chosen) else Path.home() / ".cache") / "mdsens"


def keep_compiled(folder: Path) -> None:
    """Keep compiled code in a folder, from which later processes load it.

    Several processes may use the folder at once: one that meets a file that another is just writing
    compiles that program itself. Above 2 GB the oldest files are deleted.
    """
    _delete_oldest(folder, KEPT)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # whatever the size of the code
    jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    from jax.experimental.compilation_cache import compilation_cache

    # after a first compilation without a cache, jax would not look for one again
    compilation_cache.reset_cache()
    keep_in(folder)


def _delete_oldest(folder: Path, limit: int) -> None:
    """Delete the oldest files of compiled code in a folder that has more than ``limit`` bytes.

    Three quarters of the limit are left. Files that another process has deleted are passed over.
    """
    files = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):
                if entry.name.endswith("-cache"):
                    found = entry.stat()
                    files.append((found.st_mtime, found.st_size, entry.path))
    total = sum(size for _, size, _ in files)
    if total <= limit:
        return
    for _, size, path in sorted(files):
        if total <= 0.75 * limit:
            return
        with contextlib.suppress(OSError):
            os.unlink(path)
        total -= size
