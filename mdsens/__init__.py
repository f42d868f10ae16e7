"""mdsens: exact sensitivities of relaxed particle configurations, by implicit differentiation.

Every derivative comes with a status and a residual, which show whether it can be trusted.

    import mdsens as ms

    ms.enable_x64()
    system = ms.load_system("seed_packing_2d", seed=0)
    eq = ms.minimize(system)
    r = ms.jvp(eq, {"sigma": [0.0, 1.0]})

This module only collects names. jax_md, ASE and matplotlib are imported when a function first
needs them.
"""

from __future__ import annotations

from importlib import metadata as _metadata
from pathlib import Path as _Path
from types import ModuleType as _ModuleType
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

import jax as _jax

from mdsens import (
    constraints,
    design,
    elasticity,
    implicit,
    io,
    mechanics,
    modes,
    observables,
    packing,
    plots,
    potentials,
    relaxation,
    saddles,
    verify,
)
from mdsens._util import cache_warnings as _cache_warnings
from mdsens._util import compilation as _compilation
from mdsens._util.attributes import missing_of_package as _missing_of_package
from mdsens._util.errors import (
    ConvergenceError,
    InputError,
    InterruptionError,
    MdsensError,
    PrecisionError,
    TooLargeError,
    UnsupportedVersionError,
)
from mdsens.implicit.linear.result import SolveStats
from mdsens.io import load_system
from mdsens.mechanics import Unknowns
from mdsens.mechanics.explanations import explain
from mdsens.mechanics.status import Status
from mdsens.model.batch import stack, unstack
from mdsens.model.box import PackingFraction
from mdsens.model.system import System
from mdsens.relaxation import Equilibrium, minimize
from mdsens.saddles import barrier, find_saddle
from mdsens.sensitivity import (
    Certificate,
    Displacement,
    Linearization,
    ParameterGradient,
    certify,
    equilibrate,
    gradient,
    jacobian,
    jvp,
    linearize,
    response,
    vjp,
)

try:
    __version__ = _metadata.version("mdsens")
except _metadata.PackageNotFoundError:
    # a checkout on the path that was not installed
    __version__ = "unknown"


_cache_warnings.silence()


def enable_x64() -> None:
    """Compute in double precision from now on; call it before making arrays.

    It sets ``jax_enable_x64``. Call it in each process: a new process computes in single precision,
    and refuses to unpickle objects made in double precision. A pool calls it in all of its
    processes with

        ProcessPoolExecutor(
            mp_context=multiprocessing.get_context("spawn"), initializer=ms.enable_x64
        )

    Take "spawn" or "forkserver": in a process forked from one where jax is in use, jax hangs, and
    mdsens raises.
    """
    _jax.config.update("jax_enable_x64", True)


def enable_compilation_cache(folder: str | _Path | None = None) -> None:
    """Keep compiled code in a folder, from which later processes load it.

    It sets ``jax_compilation_cache_dir``. A first relaxation with its sensitivity then takes a
    second instead of several. Programs that depend on no function of the user's own are kept with
    all that they were traced from, so that a later process does not even trace them; their files
    are read by pickle, so take a folder that only you can write to. The folder grows with each new
    shape of a system, up to 2 GB: then the oldest files are deleted. It can be deleted at any time,
    and several processes may use it at once. The command line keeps such a folder by itself. For
    processes that this one starts, set ``JAX_COMPILATION_CACHE_DIR`` in the environment. On a CPU
    jax 0.10 warns of each part that it loads, because it mistakes its own tuning flags for features
    that the processor lacks; mdsens silences these warnings when it is imported.

    Args:
      folder: the folder; where None, ``mdsens`` in ``XDG_CACHE_HOME`` or else in ``~/.cache``.
    """
    _compilation.keep_compiled(_Path(folder) if folder else _compilation.cache_folder())


__all__ = [
    "Certificate",
    "ConvergenceError",
    "Displacement",
    "Equilibrium",
    "InputError",
    "InterruptionError",
    "Linearization",
    "MdsensError",
    "PackingFraction",
    "ParameterGradient",
    "PrecisionError",
    "SolveStats",
    "Status",
    "System",
    "TooLargeError",
    "Unknowns",
    "UnsupportedVersionError",
    "barrier",
    "certify",
    "constraints",
    "design",
    "elasticity",
    "enable_compilation_cache",
    "enable_x64",
    "equilibrate",
    "explain",
    "find_saddle",
    "gradient",
    "implicit",
    "io",
    "jacobian",
    "jvp",
    "linearize",
    "load_system",
    "minimize",
    "mechanics",
    "modes",
    "observables",
    "packing",
    "plots",
    "potentials",
    "relaxation",
    "response",
    "saddles",
    "stack",
    "unstack",
    "verify",
    "vjp",
]

# hidden from type checkers: with a module __getattr__ they would accept every name
if not _TYPE_CHECKING:

    def __getattr__(name: str) -> _Any:
        """Raise an AttributeError that names the right place, ``ms.observables.pressure``."""
        public = {room: globals()[room] for room in __all__}
        rooms = {room: module for room, module in public.items() if isinstance(module, _ModuleType)}
        raise _missing_of_package("mdsens", name, __all__, rooms)
