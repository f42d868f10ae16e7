"""Energies, forces and virials against LAMMPS, live where it is installed and stored ones else.

LAMMPS interpolates tables of embedded atoms by other polynomials. There the way from one code to
the other is in two steps: ASE's sums over LAMMPS's polynomials give LAMMPS's numbers, and over
splines those of mdsens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import ase
import lammps_runs
import numpy as np
import pytest
from ase.calculators.eam import EAM
from scipy.interpolate import CubicHermiteSpline, CubicSpline
from surroundings import Atoms, Result, configurations, deviation, evaluate

import mdsens as ms

STORED = Path(__file__).with_name("lammps_numbers.json")
# File, elements in an order that is not that of the file where there are two, pair style, distance
# of neighbors.
BOND_ORDERS = [
    ("Si.sw", ["Si"], "sw", 2.4),
    ("CdTe.sw", ["Te", "Cd"], "sw", 2.7),
    ("Si.tersoff", ["Si"], "tersoff", 2.4),
    ("SiC.tersoff", ["Si", "C"], "tersoff", 2.0),
    ("SiC_Erhart-Albe.tersoff", ["Si", "C"], "tersoff", 2.0),
]
TABLES = [
    ("Cu_u3.eam", ["Cu"], "eam", 2.6),
    ("NiAlH_jea.eam.alloy", ["Al", "H", "Ni"], "eam/alloy", 2.5),
    ("AlFe_mm.eam.fs", ["Fe", "Al"], "eam/fs", 2.6),
]


def coefficients(path: Path, elements: Sequence[str], style: str) -> list[str]:
    """The arguments of ``pair_coeff``."""
    return [f"* * {path} {'' if style == 'eam' else ' '.join(elements)}"]


def by_mdsens(path: Path, elements: Sequence[str], atoms: Sequence[Atoms]) -> list[Result]:
    potential, params = ms.io.read_potential(path, elements)
    values = potential.values(params, len(elements))
    return evaluate(potential.fn, values, float(potential.range(params)), atoms)


@cache
def both(file: str, elements: tuple[str, ...], style: str, spacing: float) -> Any:
    """Configurations, and the results of mdsens and of LAMMPS for each."""
    path = lammps_runs.potential_file(file)
    atoms = configurations(len(elements), spacing, seed=3)
    theirs = lammps_runs.run(
        style, coefficients(path, elements, style), list(atoms.values()), len(elements)
    )
    return atoms, by_mdsens(path, elements, list(atoms.values())), theirs


@pytest.mark.parametrize(("file", "elements", "style", "spacing"), BOND_ORDERS)
def test_bond_orders_and_angles_as_in_lammps(
    file: str, elements: list[str], style: str, spacing: float
) -> None:
    atoms, mine, theirs = both(file, tuple(elements), style, spacing)
    for name, result, expected in zip(atoms, mine, theirs, strict=True):
        assert deviation(result, expected) < 1e-10, name


@pytest.mark.parametrize(("file", "elements", "style", "spacing"), TABLES)
def test_tables_as_in_lammps_up_to_its_interpolation(
    file: str, elements: list[str], style: str, spacing: float
) -> None:
    atoms, mine, theirs = both(file, tuple(elements), style, spacing)
    for name, result, expected in zip(atoms, mine, theirs, strict=True):
        # few neighbors: F is interpolated at its first knots, where it is not smooth
        if len(atoms[name].species) < 8:
            continue
        assert result.energy == pytest.approx(expected.energy, rel=1e-6)
        assert deviation(result, expected) < 5e-4, name


def lammps_polynomials(x: np.ndarray, values: np.ndarray) -> CubicHermiteSpline:
    """Cubic polynomials with slopes by differences of the neighboring values."""
    spacing = x[1] - x[0]
    slopes = np.gradient(values, spacing)
    inner = values[:-4] - values[4:] + 8.0 * (values[3:-1] - values[1:-3])
    slopes[2:-2] = inner / (12.0 * spacing)
    return CubicHermiteSpline(x, values, slopes)


class Line:
    """An interpolation that goes on as a straight line."""

    def __init__(self, interpolation: Any) -> None:
        self.inner = interpolation
        self.end = interpolation.x[-1]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        inside = np.minimum(x, self.end)
        return self.inner(inside) + self.inner(self.end, 1) * (x - inside)

    def slope(self, x: np.ndarray) -> np.ndarray:
        return self.inner(np.minimum(x, self.end), 1)


class PerLength:
    """phi = z / r of an interpolated z."""

    def __init__(self, interpolation: Any) -> None:
        self.inner = interpolation

    def __call__(self, r: np.ndarray) -> np.ndarray:
        return self.inner(r) / r

    def slope(self, r: np.ndarray) -> np.ndarray:
        return (self.inner(r, 1) - self.inner(r) / r) / r


def objects(items: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """An array of functions, which numpy would not make of a list of them."""
    array = np.empty(len(items), object)
    array[:] = items
    return array.reshape(shape)


def by_ase(
    path: Path,
    elements: list[str],
    atoms: Sequence[Atoms],
    interpolation: Callable[[np.ndarray, np.ndarray], Any],
) -> list[Result]:
    """ASE's sums over the tables that mdsens reads, interpolated by a function of x and values."""
    potential, params = ms.io.read_potential(path, elements)
    count = len(elements)
    energy = potential.fn.form
    r = energy.r_spacing * np.arange(params["pair"].shape[-1])
    rho = energy.rho_spacing * np.arange(params["embedding"].shape[-1])
    embedding = [
        Line(interpolation(rho, table)) for table in params["embedding"].reshape(count, -1)
    ]
    # by the atom at which the density is and that which makes it; ASE has the latter first
    tables = params["density"].reshape(*params["density"].shape[:-1], len(r))
    tables = np.broadcast_to(tables, (count, count, len(r))).swapaxes(0, 1)
    density = [Line(interpolation(r, table)) for table in tables.reshape(-1, len(r))]
    pair = [PerLength(interpolation(r, table)) for table in params["pair"].reshape(-1, len(r))]

    def slopes(functions: list[Any]) -> list[Any]:
        return [function.slope for function in functions]

    square = (count, count)
    calculator = EAM(
        form="fs",
        elements=elements,
        cutoff=energy.cutoff,
        skin=0.0,
        embedded_energy=objects(embedding, (count,)),
        d_embedded_energy=objects(slopes(embedding), (count,)),
        electron_density=objects(density, square),
        d_electron_density=objects(slopes(density), square),
        phi=objects(pair, square),
        d_phi=objects(slopes(pair), square),
    )
    results = []
    for each in atoms:
        cell = None if each.cell is None else each.cell.T
        there = ase.Atoms(
            [elements[k] for k in each.species], each.positions, cell=cell, pbc=cell is not None
        )
        there.calc = calculator
        virial = np.zeros((3, 3))
        if cell is not None:
            virial = there.get_stress(voigt=False) * there.get_volume()
        results.append(Result(there.get_potential_energy(), there.get_forces(), virial))
    return results


@pytest.mark.parametrize(("file", "elements", "style", "spacing"), TABLES)
def test_tables_as_summed_by_ase(
    file: str, elements: list[str], style: str, spacing: float
) -> None:
    """With splines to the numbers of mdsens, with LAMMPS's polynomials to those of LAMMPS."""
    atoms, mine, theirs = both(file, tuple(elements), style, spacing)
    path = lammps_runs.potential_file(file)
    for interpolation, expected in [(CubicSpline, mine), (lammps_polynomials, theirs)]:
        results = by_ase(path, elements, list(atoms.values()), interpolation)
        for name, result, other in zip(atoms, results, expected, strict=True):
            if atoms[name].cell is None:  # ASE has no stress in the open
                result = result._replace(virial=other.virial)
            assert deviation(result, other) < 1e-10, (name, interpolation)


@pytest.mark.parametrize("name", json.loads(STORED.read_text()))
def test_stored_numbers_of_lammps(name: str, tmp_path: Path) -> None:
    """The potential files are those of ``lammps_numbers.py``, which stored the numbers."""
    stored = json.loads(STORED.read_text())[name]
    path = tmp_path / name
    path.write_text(stored["file"])
    atoms = [
        Atoms(np.array(c["positions"]), np.array(c["species"]), c["cell"] and np.array(c["cell"]))
        for c in stored["configurations"]
    ]
    mine = by_mdsens(path, stored["elements"], atoms)
    for result, expected in zip(mine, stored["results"], strict=True):
        energy, forces, virial = expected
        theirs = Result(energy, np.array(forces), np.array(virial))
        assert deviation(result, theirs) < 1e-10
