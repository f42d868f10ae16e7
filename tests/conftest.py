"""Double precision for every test; the packings with independently computed values; the seed's system."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

jax.config.update("jax_enable_x64", True)
# Compiling is nearly all the time that tests take; the demo and the notebooks run with everything on.
jax.config.update("jax_disable_most_optimizations", True)

import mdsens as ms  # noqa: E402

DATA = Path(__file__).parents[1] / "systems" / "data"
PACKINGS = ("2d_polydisperse_N64_p1e-1", "3d_bidisperse_N128_p1e-4")


@cache
def packing_file(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


@cache
def packing(name: str, index: int) -> ms.System:
    """One of the packings by an independent code, at the file's positions."""
    file = packing_file(name)
    return ms.System.create(
        file["positions"][index],
        file["box"][index],
        ms.potentials.soft_sphere(),
        {"sigma": file["diameter"][index], "epsilon": 1.0, "alpha": 2.0},
    )


@cache
def relaxed_packing(name: str, index: int) -> ms.Equilibrium:
    return ms.minimize(packing(name, index), tolerance=1e-13)


@pytest.fixture(params=PACKINGS)
def packing_name(request: pytest.FixtureRequest) -> str:
    return request.param


def relative(a, b) -> float:
    """|a - b| / |b|, in the 2-norm."""
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))
