"""Store LAMMPS's energies, forces and virials for the tests:
python tests/potentials/lammps_numbers.py

The numbers are in ``lammps_numbers.json``, beside the potential files and configurations that they
belong to. The files are written here: published parameters, and tables of simple functions.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import lammps_runs
import numpy as np
from surroundings import Atoms, configurations

SILICON = """# Stillinger and Weber 1985; an entry may fill several lines
Si Si Si 2.1683 2.0951 1.80 21.0 1.20 -0.333333333333  # continued
  7.049556277 0.6022245584 4.0 0.0 0.0
"""

# Wang, Stroud and Markworth 1989, with epsilon of the mixed angles changed, so that they count.
CDTE = """# epsilon sigma a lambda gamma costheta0 A B p q tol
Cd Cd Cd 1.03 2.51 1.80 25.0 1.20 -0.333333333333 5.1726 0.8807 4.0 0.0 0.0
Te Te Te 1.03 2.51 1.80 25.0 1.20 -0.333333333333 8.1415 0.6671 4.0 0.0 0.0
Cd Te Te 1.10 2.45 1.80 25.0 1.20 -0.333333333333 7.0496 0.6022 4.0 0.0 0.0
Te Cd Cd 1.10 2.45 1.80 25.0 1.20 -0.333333333333 7.0496 0.6022 4.0 0.0 0.0
Cd Cd Te 0.93 0.0 0.0 22.0 0.0 -0.30 0.0 0.0 0.0 0.0 0.0
Cd Te Cd 0.93 0.0 0.0 22.0 0.0 -0.30 0.0 0.0 0.0 0.0 0.0
Te Cd Te 1.21 0.0 0.0 27.0 0.0 -0.35 0.0 0.0 0.0 0.0 0.0
Te Te Cd 1.21 0.0 0.0 27.0 0.0 -0.35 0.0 0.0 0.0 0.0 0.0
"""

# Tersoff 1989, carbon and silicon with the mixing of that paper.
SIC = """# m gamma lambda3 c d costheta0 n beta lambda2 B R D lambda1 A
C C C 3 1 0 38049 4.3484 -0.57058 0.72751 1.5724e-7 2.2119 346.74 1.95 0.15 3.4879 1393.6
Si Si Si 3 1 0 100390 16.217 -0.59825 0.78734 1.1e-6 1.7322 471.18 2.85 0.15 2.4799 1830.8
Si Si C 3 1 0 100390 16.217 -0.59825 0 0 0 0 2.36 0.15 0 0
Si C C 3 1 0 100390 16.217 -0.59825 0.78734 1.1e-6 1.97205 395.13 2.36 0.15 2.9839 1597.3
C Si Si 3 1 0 38049 4.3484 -0.57058 0.72751 1.5724e-7 1.97205 395.13 2.36 0.15 2.9839 1597.3
C Si C 3 1 0 38049 4.3484 -0.57058 0 0 0 0 1.95 0.15 0 0
C C Si 3 1 0 38049 4.3484 -0.57058 0 0 0 0 2.36 0.15 0 0
Si C Si 3 1 0 100390 16.217 -0.59825 0 0 0 0 2.85 0.15 0 0
"""


def lines(numbers: Iterable[float]) -> str:
    """Numbers, five to a line."""
    words = [f"{x:.15g}" for x in numbers]
    return "".join(" ".join(words[k : k + 5]) + "\n" for k in range(0, len(words), 5))


def tables(kind: str) -> str:
    """A file of tables for two elements, or for copper in ``.eam``.

    All functions are polynomials of third order at most, which LAMMPS's interpolation and a spline
    give alike, but for the two intervals at either end, from which the cutoff keeps away.
    """
    rho = 0.25 * np.arange(240)
    r = 0.05 * np.arange(100)
    gap = 4.95 - r

    def embedding(depth: float) -> np.ndarray:
        return -depth * rho + 0.03 * rho**2 - 0.0002 * rho**3

    grid = f"{len(rho)} 0.25 {len(r)} 0.05 4.8\n"
    if kind == "eam":
        head = f"made for a test\n29 63.55 3.615 FCC\n{grid}"
        return head + lines(embedding(1.5)) + lines(0.3 * gap) + lines(0.1 * gap**3)
    text = f"made\nfor\na test\n2 Al Ni\n{grid}"
    for number, depth in [(13, 1.2), (28, 1.7)]:
        text += f"{number} 1.0 4.0 fcc\n" + lines(embedding(depth))
        # at an atom of the first and of the second element, where they are not the same
        for height in [0.08, 0.1] if kind == "eam.fs" else [0.09]:
            text += lines(height * depth * gap**3)
    for height in (0.4, 0.5, 0.7):
        text += lines(height * r * gap**2)
    return text


# Name of the file: its content, the elements, LAMMPS's pair style, and the distance of neighbors.
FILES = {
    "silicon.sw": (SILICON, ["Si"], "sw", 2.4),
    "cdte.sw": (CDTE, ["Cd", "Te"], "sw", 2.7),
    "sic.tersoff": (SIC, ["Si", "C"], "tersoff", 2.0),
    "copper.eam": (tables("eam"), ["Cu"], "eam", 2.6),
    "alni.eam.alloy": (tables("eam.alloy"), ["Ni", "Al"], "eam/alloy", 2.5),
    "alni.eam.fs": (tables("eam.fs"), ["Ni", "Al"], "eam/fs", 2.5),
}
STORED = ("two in a skewed cell", "eight in a skewed cell", "3 in the open")


def rounded(atoms: Atoms) -> Atoms:
    """Positions and cell as they are stored, to six digits; atoms in the open closer together, so
    that none has a density in the first two intervals of its table.
    """
    if atoms.cell is None:
        return Atoms((0.85 * atoms.positions).round(6), atoms.species, None)
    return Atoms(atoms.positions.round(6), atoms.species, atoms.cell.round(6))


def main() -> None:
    """Run LAMMPS and write the file."""
    stored = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (text, elements, style, spacing) in FILES.items():
            path = Path(folder) / name
            path.write_text(text)
            made = configurations(len(elements), spacing, seed=5)
            atoms = [rounded(made[key]) for key in STORED]
            names = "" if style == "eam" else " ".join(elements)
            results = lammps_runs.run(style, [f"* * {path} {names}"], atoms, len(elements))
            stored[name] = {
                "file": text,
                "elements": elements,
                "configurations": [
                    {
                        "positions": each.positions.tolist(),
                        "species": each.species.tolist(),
                        "cell": None if each.cell is None else each.cell.tolist(),
                    }
                    for each in atoms
                ],
                "results": [
                    [result.energy, result.forces.tolist(), result.virial.tolist()]
                    for result in results
                ],
            }
    target = Path(__file__).with_suffix(".json")
    target.write_text(json.dumps(stored, indent=1) + "\n")
    print(f"{target}: {', '.join(stored)}")


if __name__ == "__main__":
    main()
