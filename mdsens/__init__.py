"""mdsens: exact sensitivities of relaxed particle configurations, by implicit differentiation, with the evidence.

    import mdsens as ms

    ms.enable_x64()
    system = ms.load_system("seed_packing_2d", seed=0)
    eq = ms.minimize(system)
    r = ms.jvp(eq, {"sigma": [0.0, 1.0]})

Only names here: neither jax_md, ASE nor matplotlib is imported until something needs it.
"""

from __future__ import annotations

from importlib import metadata as _metadata

import jax as _jax

from mdsens.implicit.status import (
    ConvergenceError,
    InputError,
    MdsensError,
    PrecisionError,
    SolveStats,
    Status,
    TooLargeError,
    UnsupportedVersionError,
)

if _jax.__version__ == "0.10.2":
    raise UnsupportedVersionError(
        "jax 0.10.2 miscompiles neighbour lists on CPU and drops pairs in silence (jax issue 39103): "
        "install another version, pip install 'jax!=0.10.2'."
    )

from mdsens import contacts, implicit, io, observables, plots, potentials, relaxation, verify  # noqa: E402
from mdsens.boxes import PackingFraction  # noqa: E402
from mdsens.io import load_system  # noqa: E402
from mdsens.relaxation import Equilibrium, minimize  # noqa: E402
from mdsens.sensitivity import (  # noqa: E402
    Linearization,
    Response,
    equilibrate,
    gradient,
    jacobian,
    jvp,
    linearize,
    response,
    vjp,
)
from mdsens.system import System, stack, unstack  # noqa: E402

try:
    __version__ = _metadata.version("mdsens")
except _metadata.PackageNotFoundError:  # a bare checkout on the path
    __version__ = "unknown"


def enable_x64() -> None:
    """Compute in double precision from here on: sets ``jax_enable_x64``. Call it before making arrays."""
    _jax.config.update("jax_enable_x64", True)


__all__ = [
    "ConvergenceError",
    "Equilibrium",
    "InputError",
    "Linearization",
    "MdsensError",
    "PackingFraction",
    "PrecisionError",
    "Response",
    "SolveStats",
    "Status",
    "System",
    "TooLargeError",
    "UnsupportedVersionError",
    "contacts",
    "enable_x64",
    "equilibrate",
    "gradient",
    "implicit",
    "io",
    "jacobian",
    "jvp",
    "linearize",
    "load_system",
    "minimize",
    "observables",
    "plots",
    "potentials",
    "relaxation",
    "response",
    "stack",
    "unstack",
    "verify",
    "vjp",
]
