"""How long does the first answer take in a fresh process, and how many programs are compiled?

``python -m benchmarks.first_answer --json FILE``: each run is a process of its own, once without
kept code ("cold") and once with the code that the run before it has kept ("cached"). The command is
``mdsens sensitivity seed_packing_2d``, with the start of Python and the import of mdsens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._common import arguments, report

# One process: the calls by name, each with its seconds and the programs that it compiled, or loaded
# from those that are kept.
CALLS = """
import json, sys, time

began = time.perf_counter()
import jax
import numpy as np
import mdsens as ms

ms.enable_x64()
imported = time.perf_counter() - began
if sys.argv[2]:
    ms.enable_compilation_cache(sys.argv[2])
programs = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **more: programs.append(event)
    if event == "/jax/core/compile/backend_compile_duration"
    else None
)
rows = [{"call": "import", "seconds": imported, "programs": 0}]


def call(name, run):
    before = len(programs)
    began = time.perf_counter()
    answer = jax.block_until_ready(run())
    seconds = time.perf_counter() - began
    rows.append({"call": name, "seconds": seconds, "programs": len(programs) - before})
    return answer


systems = {
    "Lennard-Jones dimer": lambda: ms.load_system("dimer"),
    "packing of 128 discs": lambda: ms.load_system("seed_packing_2d"),
    "glass of 500 atoms": lambda: ms.load_system("binary_lj_glass"),
    "silicon of 64 atoms": lambda: ms.load_system("silicon", positions={"cells": 2, "noise": 0.1}),
}
system = call("load", systems[sys.argv[1]])
eq = call("minimize", lambda: ms.minimize(system, progress=False))
sigma = np.asarray(eq.params["sigma"])
change = {"sigma": np.arange(2.0) if sigma.ndim == 1 else np.ones(sigma.shape)}
r = call("jvp", lambda: ms.jvp(eq, change, throw=False))
call("vjp", lambda: ms.vjp(eq, np.asarray(r.positions), throw=False))
observable = ms.observables.pressure if system.has_volume else ms.observables.energy
call("gradient", lambda: ms.gradient(observable, eq, throw=False))
call("certify", lambda: ms.certify(eq, change))
truth = call("finite_difference", lambda: ms.verify.finite_difference(eq, change))
if system.has_volume:
    call("moduli", lambda: ms.elasticity.moduli(eq, throw=False))
of_all = {"status": eq.status.name, "error": truth.disagreement(r.value)}
print(json.dumps([row | of_all for row in rows]))
"""
SYSTEMS = (
    "Lennard-Jones dimer",
    "packing of 128 discs",
    "glass of 500 atoms",
    "silicon of 64 atoms",
)
COMMAND = ("-m", "mdsens", "sensitivity", "seed_packing_2d", "--wrt", "sigma[1]")


def run(arguments: tuple[str, ...], **variables: str) -> tuple[float, str]:
    """Run Python in a process of its own; return the seconds and what it printed."""
    plain = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**plain, **variables},
        check=True,
    )
    return time.perf_counter() - began, done.stdout


def calls(system: str, folder: str) -> list[dict[str, Any]]:
    """Run all calls for one system; ``folder`` keeps compiled code where it is not empty."""
    seconds, printed = run(("-c", CALLS, system, folder))
    rows: list[dict[str, Any]] = json.loads(printed)
    total = sum(row["programs"] for row in rows)
    return [*rows, rows[-1] | {"call": "whole process", "seconds": seconds, "programs": total}]


def of_system(system: str, runs: int) -> list[dict[str, Any]]:
    """Measure all calls for one system, cold and cached: medians over the runs."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cold = [calls(system, "") for _ in range(runs)]
        calls(system, folder)
        cached = [calls(system, folder) for _ in range(runs)]
    for kept, found in (("cold", cold), ("cached", cached)):
        for of_call in zip(*found, strict=True):
            rows.append(
                {
                    "system": system,
                    "code": kept,
                    "call": of_call[0]["call"],
                    "seconds": float(np.median([row["seconds"] for row in of_call])),
                    "programs": of_call[0]["programs"],
                    "status": of_call[0]["status"],
                    "error": of_call[0]["error"],
                }
            )
    return rows


def of_command(runs: int) -> list[dict[str, Any]]:
    """Measure the command line, cold and with the code that it keeps."""
    seconds: dict[str, list[float]] = {"cold": [], "cached": []}
    printed = ""
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            for kept in seconds:
                time_taken, printed = run(COMMAND, MDSENS_CACHE=str(Path(folder) / "kept"))
                seconds[kept].append(time_taken)
    # the last line: "good: agrees with finite differences to 5e-09"
    error = float(printed.split()[-1])
    name = "mdsens sensitivity seed_packing_2d"
    return [
        {
            "system": "packing of 128 discs",
            "code": kept,
            "call": name,
            "seconds": float(np.median(times)),
            "status": "CONVERGED",
            "error": error,
        }
        for kept, times in seconds.items()
    ]


def main() -> None:
    """Each system in turn, and the command line."""
    asked = arguments(__doc__ or "", [0], systems=list(SYSTEMS), commands=1)
    rows: list[dict[str, Any]] = []
    if asked.commands:
        rows += of_command(asked.runs)
    for system in asked.systems:
        rows += of_system(system, asked.runs)
        print(*rows[-2:], sep="\n", flush=True)
    report("first_answer", rows, asked.json)


if __name__ == "__main__":
    main()
