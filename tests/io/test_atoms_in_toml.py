"""Systems of atoms in TOML: potentials of surroundings and their files, lattices, slabs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ase.build
import ase.units
import numpy as np
import pytest
from ase import Atoms
from ase.neighborlist import neighbor_list

import mdsens as ms
from mdsens import InputError, potentials
from mdsens.elasticity import GPa

SW = "Si Si Si 2.1683 2.0951 1.80 21.0 1.20 -0.333333333333 7.049556277 0.6022245584 4.0 0.0 0.0\n"
IRON = {
    "A": 1.828905,
    "d": 3.569745,
    "beta": 1.8,
    "c": 3.40,
    "c0": 1.2371147,
    "c1": -0.3592185,
    "c2": -0.0385607,
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A system beside the file of its potential."""
    (tmp_path / "Si.sw").write_text(SW)
    path = tmp_path / "system.toml"
    path.write_text(
        'description = "silicon by a file"\n'
        "dimension = 3\n"
        'box = "positions"\n'
        'positions = { kind = "lattice", lattice = "diamond", constant = 5.43, cells = 1 }\n'
        'potential = { kind = "file", path = "Si.sw", elements = ["Si"] }\n'
    )
    return path


# -- potentials


def test_kinds_of_potentials_with_their_options() -> None:
    assert ms.load_system("silicon").potential == potentials.stillinger_weber()
    assert ms.load_system("silicon_carbide").potential == potentials.tersoff(3)
    one = ms.load_system("silicon_carbide", potential={"m": 1})
    assert one.potential == potentials.tersoff(1)
    assert ms.load_system("copper_gupta").potential == potentials.gupta(5.8, 6.2)


def test_iron_of_finnis_and_sinclair(tmp_path: Path) -> None:
    path = tmp_path / "iron.toml"
    values = "\n".join(f"{name} = {value}" for name, value in IRON.items())
    path.write_text(
        'description = "iron"\ndimension = 3\nbox = "positions"\n'
        'potential = { kind = "finnis_sinclair" }\n'
        '[positions]\nkind = "lattice"\nlattice = "bcc"\nconstant = 2.8665\ncells = 2\n'
        f"[parameters]\n{values}\n"
    )
    system = ms.load_system(path)
    assert system.potential == potentials.finnis_sinclair()
    # the cohesive energy of the source
    assert float(ms.observables.energy(system)) / system.n == pytest.approx(-4.28, abs=5e-4)


def test_parameters_of_pairs_and_of_triples_are_nested_lists() -> None:
    params = ms.load_system("silicon_carbide").params
    assert [params[name].shape for name in ("A", "R", "gamma")] == [(2, 2), (2, 2, 2), ()]
    # center, bonded atom, third atom: the reach of zeta is that from the center to the third
    assert (float(params["R"][0, 1, 0]), float(params["R"][0, 0, 1])) == (2.85, 2.36)


def test_a_file_brings_potential_parameters_and_names(file: Path) -> None:
    system = ms.load_system(file)
    bundled = ms.load_system("silicon")
    assert system.potential == bundled.potential
    assert set(system.params) == set(bundled.params)
    assert float(system.params["epsilon"]) == 2.1683
    assert system.species_names == ("Si",)
    changed = ms.load_system(file, parameters={"epsilon": 2.0})
    assert (float(changed.params["epsilon"]), float(changed.params["sigma"])) == (2.0, 2.0951)


def test_a_path_is_relative_to_the_file_and_as_a_keyword_to_the_working_directory(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "other.sw").write_text(SW.replace("2.1683", "3.0"))
    monkeypatch.chdir(here)
    assert float(ms.load_system(file).params["epsilon"]) == 2.1683
    other = ms.load_system(file, potential={"path": "other.sw"})
    assert float(other.params["epsilon"]) == 3.0


def test_the_parameters_of_a_file_are_renamed_with_its_potential(file: Path) -> None:
    renamed = [
        {"kind": "file", "path": "Si.sw", "elements": ["Si"], "rename": {"sigma": "bond"}},
        {"kind": "soft_sphere", "rename": {"epsilon": "core", "sigma": "diameter"}},
    ]
    values = {"core": 1.0, "diameter": 1.0, "alpha": 2.0}
    system = ms.load_system(file, potential=renamed, parameters=values)
    assert float(system.params["bond"]) == 2.0951
    assert "sigma" not in system.params


def test_the_elements_of_a_file_are_those_of_the_species(file: Path, tmp_path: Path) -> None:
    text = "".join(
        f"{a} {b} {c} {SW.split(maxsplit=3)[3]}"
        for a in ("Si", "Ge")
        for b in ("Si", "Ge")
        for c in ("Si", "Ge")
    )
    (tmp_path / "SiGe.sw").write_text(text)
    place = {"lattice": "zincblende", "elements": ["Si", "Ge"]}
    potential = {"path": "SiGe.sw", "elements": ["Si", "Ge"]}
    system = ms.load_system(file, positions=place, species="positions", potential=potential)
    assert system.species_names == ("Si", "Ge")
    with pytest.raises(InputError, match=r"elements is \['Ge', 'Si'\], and .* Si, Ge: give"):
        ms.load_system(
            file,
            positions=place,
            species="positions",
            potential={**potential, "elements": ["Ge", "Si"]},
        )


# -- lattices and slabs


def spectrum(atoms: Atoms, reach: float) -> list[tuple[str, str, float]]:
    """The elements and distances of all neighbors of each atom, in order, without the atoms."""
    i, j, d = neighbor_list("ijd", atoms, reach)
    of_atoms: Any = [
        sorted(
            (atoms.symbols[k], atoms.symbols[b], round(x, 9))
            for a, b, x in zip(i, j, d, strict=True)
            if a == k
        )
        for k in range(len(atoms))
    ]
    return sorted(of_atoms)


CRYSTALS = {
    "diamond": (["Si"], {}, lambda: ase.build.bulk("Si", "diamond", a=4.0, cubic=True)),
    "zincblende": (
        ["Ga", "As"],
        {},
        lambda: ase.build.bulk("GaAs", "zincblende", a=4.0, cubic=True),
    ),
    "hcp": (
        ["Mg"],
        {},
        lambda: ase.build.bulk("Mg", "hcp", a=4.0, covera=(8 / 3) ** 0.5) * (2, 1, 1),
    ),
    "hcp of zinc": (
        ["Zn"],
        {"ratio": 1.86},
        lambda: ase.build.bulk("Zn", "hcp", a=4.0, covera=1.86) * (2, 1, 1),
    ),
    "L1_2": (["Ni", "Al"], {}, lambda: alloy()),
}


def alloy() -> Atoms:
    atoms = ase.build.bulk("Ni", "fcc", a=4.0, cubic=True)
    atoms.symbols[0] = "Al"
    return atoms


@pytest.mark.parametrize("name", CRYSTALS)
def test_lattices_are_those_of_ase(file: Path, name: str) -> None:
    elements, options, build = CRYSTALS[name]
    lattice = {"lattice": name.split()[0], "constant": 4.0, "elements": elements, **options}
    species = None if len(elements) == 1 else "positions"
    fields: dict[str, Any] = {} if species is None else {"species": species}
    # a potential for any species: the lattice is what counts
    system = ms.load_system(
        file,
        positions=lattice,
        potential={"kind": "gupta", "onset": 3.0, "cutoff": 4.0},
        parameters={"A": 0.1, "xi": 1.0, "p": 10.0, "q": 2.0, "r0": 2.5},
        **fields,
    )
    expected = build()
    atoms = ms.io.to_ase(system)
    assert len(atoms) == len(expected)
    assert atoms.cell.volume == pytest.approx(expected.cell.volume, rel=1e-12)
    assert spectrum(atoms, 6.1) == spectrum(expected, 6.1)
    np.testing.assert_array_equal(system.masses, atoms.get_masses())


def test_a_slab_takes_the_cell_of_its_lattice() -> None:
    system = ms.load_system("copper_surface")
    assert system.periodic == (True, True, False)
    assert system.n == 64
    smaller = ms.load_system("copper_surface", positions={"cells": [1, 1, 3]})
    box = np.asarray(smaller.box)
    assert box[0, 0] == pytest.approx(3.6149497711) and box[2, 2] == 1.0  # an open side


def test_a_vacancy_leaves_the_species_of_the_others(file: Path) -> None:
    system = ms.load_system("nickel_aluminide", positions={"cells": 2, "vacancies": [1, 4]})
    # site 1 is a face, site 4 the corner of the second cell
    assert np.bincount(np.asarray(system.species)).tolist() == [23, 7]


# -- mistakes

LATTICE = {"kind": "lattice", "lattice": "diamond", "constant": 5.43, "cells": 1}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"potential": {"kind": "stillinger-weber"}}, "did you mean 'stillinger_weber'"),
    "m": ({"potential": {"kind": "tersoff", "m": 2}}, "`m` of tersoff is 2: give 1 or 3"),
    "option": ({"potential": {"kind": "stillinger_weber", "m": 3}}, "potential.m is no key"),
    "onset": ({"potential": {"kind": "gupta", "cutoff": 6.0}}, "potential.onset is missing"),
    "path": ({"potential": {"kind": "file", "elements": ["Si"]}}, "potential.path is missing"),
    "no such file": ({"potential": {"path": "Ge.sw"}}, "Ge.sw cannot be read"),
    "elements": ({"potential": {"kind": "file", "path": "Si.sw"}}, "potential.elements is missing"),
    "no list": ({"potential": {"elements": "Si"}}, "`elements` is 'Si': give .* in a list"),
    "element": ({"potential": {"elements": ["Ge"]}}, "no element 'Ge'"),
    "rename": ({"potential": {"rename": {"sigm": "d"}}}, "did you mean 'sigma'"),
    "override": ({"parameters": {"epsilom": 1.0}}, "epsilom.*did you mean 'epsilon'"),
    "shape": ({"parameters": {"lambda": [[1.0]]}}, r"parameter lambda has shape .*triples"),
    "two kinds": (
        {"positions": {"lattice": "zincblende"}},
        'lattice has sites of 2 kinds: give species = "positions"',
    ),
    "count": (
        {"positions": {"lattice": "zincblende"}, "species": "positions"},
        r"elements is \['Si'\]: give 2, one for each species",
    ),
    "names": ({"positions": {"elements": ["Ge"]}}, r"elements is \['Si'\], and .* are Ge: give"),
    "symbols": (
        {"positions": {"elements": ["Si", "Ge"]}},
        r"positions.elements .* give 1 chemical",
    ),
    "symbol": ({"positions": {"elements": ["Sj"]}}, "positions.elements contains 'Sj': give"),
    "twice": (
        {"positions": {"lattice": "zincblende", "elements": ["Si", "Si"]}},
        "positions.elements .* give 2 chemical",
    ),
    "ratio": ({"positions": {"ratio": 1.6}}, "ratio is c / a of hcp, .* 'diamond': remove it"),
    "lattice": ({"positions": {"lattice": "diamon"}}, "did you mean 'diamond'"),
    "cell": ({"box": {"cell": "lattice"}}, r"box.cell is 'lattice': .*positions"),
    "two cells": ({"box": {"cell": "positions", "lengths": [5, 5, 5]}}, "box has 2 of .*give one"),
    "periodic": (
        {"box": {"number_density": 0.05, "periodic": [True, True, False]}},
        "box.periodic is for box.lengths, box.vectors and box.cell",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_mistakes_are_named_with_a_remedy_in_one_sentence(file: Path, what: str) -> None:
    fields, message = REFUSED[what]
    with pytest.raises(InputError, match=message) as caught:
        ms.load_system(file, **fields)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith((f"{file}: ", str(file.parent)))


def test_parameters_are_missing_where_no_file_brings_them(file: Path) -> None:
    with pytest.raises(InputError, match="parameters is missing"):
        ms.load_system(file, potential={"kind": "stillinger_weber"})


# -- units


def test_a_gigapascal_is_that_of_ase() -> None:
    # ASE's constants are those of CODATA 2014, before the SI fixed the elementary charge
    assert pytest.approx(ase.units.GPa, rel=1e-7) == GPa
