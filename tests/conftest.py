"""Double precision for every test; the packings with independently computed values;
the seed's system.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

jax.config.update("jax_enable_x64", True)
# Compiling is nearly all the time that tests take; the demo and the notebooks run with everything
# on. Without its fusion emitters, and with one module a program, XLA compiles these 2.5 times as
# fast; later releases than 0.10 have no such switch, and XLA ends the process at a flag that it
# does not know.
# `make test-as-shipped` runs those marked so with all of it on.
AS_SHIPPED = "MDSENS_TESTS_OPTIMIZED" in os.environ
if not AS_SHIPPED:
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # for the processes that tests start as well
if not AS_SHIPPED and jax.__version_info__ < (0, 11):
    QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()

import mdsens as ms  # noqa: E402

# the command line would keep what the tests compile among what the user's own runs keep
os.environ.setdefault("MDSENS_CACHE", "none")

# Tracing makes many small objects that live on: at Python's own thresholds, looking for cycles
# among them takes 7% of the time of the tests.
gc.set_threshold(100_000, 20, 100)

# What `make fuzz` runs beside: the longest of each kind,
# of which a shorter one is among the others.
LONG = pytest.mark.skipif("MDSENS_FUZZ_CASES" not in os.environ, reason="a long run: make fuzz")


LONG_TESTS = Path(__file__).with_name("long.txt")  # by name, where no parameter tells them apart


def long_tests() -> set[str]:
    """The names in that file."""
    lines = LONG_TESTS.read_text().splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the long ones to `make fuzz`."""
    names = long_tests()
    for item in items:
        if item.nodeid in names:
            item.add_marker(LONG)


def quick(values: Iterable[Any], *these: Any) -> list[Any]:
    """Cases of a test, all of which are long but these."""
    return [pytest.param(value, marks=() if value in these else LONG) for value in values]


ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "systems" / "data"
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


@cache
def ring(pulled: float = 0.0, dtype: Any = np.float64) -> ms.System:
    """Thirty springs in a closed ring within a periodic cell, at rest or stretched:
    it has no modulus whatever.
    """
    angle = 2.0 * np.pi * np.arange(30) / 30
    places = 10.0 + (3.0 + pulled) * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    potential = ms.potentials.harmonic_bonds([[k, (k + 1) % 30] for k in range(30)])
    length = 6.0 * np.sin(np.pi / 30)
    return ms.System.create(
        places.astype(dtype), dtype(20.0), potential, {"stiffness": 1.0, "length": length}
    )


@cache
def square_lattice(diagonals: float) -> ms.System:
    """25 nodes on a square lattice, a spring of stiffness 1 to each neighbor
    and one across each square, at rest.

    C11 = 1 + k, C12 = C44 = k, the stiffness of the diagonals; each node is a center of symmetry,
    and follows a strain.
    """
    j, i = np.divmod(np.arange(25), 5)

    def bonds(right: int, up: int) -> np.ndarray:
        return np.stack([5 * j + i, 5 * ((j + up) % 5) + (i + right) % 5], axis=1)

    potential = ms.potentials.harmonic_bonds(
        np.concatenate([bonds(1, 0), bonds(0, 1), bonds(1, 1), bonds(1, -1)])
    )
    params = {
        "stiffness": np.repeat([1.0, diagonals], 50),
        "length": np.repeat([1.0, 2.0**0.5], 50),
    }
    return ms.System.create(np.stack([i, j], axis=1).astype(float), 5.0, potential, params)


# By the seed of its start, what sixteen discs are without their cell.
SOLIDS = {"stable": 5, "sheared away": 4, "unstable": 2}


def sixteen_discs(kind: str) -> ms.System:
    """Of a negative shear modulus, or one that some strain lowers the enthalpy of, or stable."""
    box = {"packing_fraction": 0.9, "follows": "nothing"}
    return ms.load_system(
        "seed_packing_2d", seed=SOLIDS[kind], count=16, parameters={"sigma": [1.0, 1.4]}, box=box
    )


@cache
def discs_at_rest(kind: str) -> ms.Equilibrium:
    return ms.minimize(sixteen_discs(kind), tolerance=1e-13)


@pytest.fixture(params=PACKINGS)
def packing_name(request: pytest.FixtureRequest) -> str:
    return request.param


def forget_compiled_code() -> None:
    """Drop it where there is much: each program maps memory,
    and at 65,530 maps the kernel ends the process.
    """
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture(autouse=True, scope="function" if "MDSENS_FUZZ_CASES" in os.environ else "module")
def _room_for_compiled_code() -> None:
    forget_compiled_code()


def pytest_collection_finish() -> None:
    """What is imported by now stays to the end: no collection looks through it again."""
    gc.collect()
    gc.freeze()


def relative(a, b) -> float:
    """|a - b| / |b|, in the 2-norm."""
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The figures of the generated cases, where some were asked for: see test_fuzz.py."""
    if "MDSENS_FUZZ_CASES" not in os.environ:
        return
    try:
        from judge import figures
    except ModuleNotFoundError:  # none of tests/fuzz was collected
        return

    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])]
    found = [
        record
        for r in reports
        for name, value in r.user_properties
        if name == "fuzz"
        for record in value
    ]
    terminalreporter.section("generated cases")
    for line in figures(found):
        terminalreporter.write_line(line)
