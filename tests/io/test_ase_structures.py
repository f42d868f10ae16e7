"""Structures of ASE become systems and come back with all that both can hold."""

from __future__ import annotations

import json
import pickle
from typing import Any

import ase
import ase.build
import ase.io
import jax
import numpy as np
import pytest
from ase.constraints import (
    FixAtoms,
    FixBondLength,
    FixBondLengths,
    FixCartesian,
    FixedLine,
    FixedPlane,
    Hookean,
)

import mdsens as ms
from mdsens import InputError

LJ = ms.potentials.lennard_jones(3.0, 4.0)
PARAMS = {"sigma": 2.0, "epsilon": 1.0}


def bulk() -> ase.Atoms:
    atoms = ase.build.bulk("NaCl", "rocksalt", a=5.6) * (2, 2, 2)
    atoms.set_tags(range(16))
    atoms.set_masses([22.0, 35.5] * 8)
    atoms.set_constraint([FixAtoms([3, 4]), FixCartesian([7], (True, False, True))])
    return atoms


def slab() -> ase.Atoms:
    """Copper; the third cell vector is zero, as from ase.build.fcc111 without a vacuum."""
    atoms = ase.build.fcc111("Cu", (2, 2, 3), a=3.6)
    assert atoms.pbc.tolist() == [True, True, False] and not atoms.cell.array[2].any()
    atoms.set_constraint(FixAtoms(mask=atoms.get_tags() > 2))
    return atoms


def wire() -> ase.Atoms:
    places = [[0, 0, 0], [0, 0, 2.3], [0.4, 0, 4.5]]
    atoms = ase.Atoms("AuCuAu", places, cell=[0, 0, 7.0], pbc=[False, False, True])
    atoms.set_constraint(FixCartesian([0, 1], (True, True, False)))
    return atoms


def molecule() -> ase.Atoms:
    atoms = ase.build.molecule("CH3CH2OH")
    atoms.set_masses(
        [m if k != 3 else 2.014 for k, m in enumerate(atoms.get_masses())]
    )  # deuterium
    atoms.set_constraint([FixAtoms([0]), FixBondLengths([[1, 2], [0, 1]], bondlengths=[1.4, 1.5])])
    return atoms


STRUCTURES = {"bulk": bulk, "slab": slab, "wire": wire, "molecule": molecule}


def fixed(atoms: ase.Atoms) -> np.ndarray:
    """Which coordinates of the atoms are fixed, (n, 3), by trying to move them."""
    moved = atoms.copy()
    moved.set_constraint([c for c in atoms.constraints if not isinstance(c, FixBondLengths)])
    moved.set_positions(atoms.positions + 1.0)
    return moved.positions == atoms.positions


def agree(back: ase.Atoms, atoms: ase.Atoms) -> None:
    """The same structure, to the last bit, in all but the cell vectors of its open axes."""
    np.testing.assert_array_equal(back.positions, atoms.positions)
    np.testing.assert_array_equal(back.numbers, atoms.numbers)
    np.testing.assert_array_equal(back.pbc, atoms.pbc)
    np.testing.assert_array_equal(back.cell.array, np.where(atoms.pbc[:, None], atoms.cell, 0.0))
    np.testing.assert_array_equal(back.get_masses(), atoms.get_masses())
    assert back.has("masses") == atoms.has("masses")
    np.testing.assert_array_equal(back.get_tags(), atoms.get_tags())
    assert back.has("tags") == atoms.has("tags")
    np.testing.assert_array_equal(fixed(back), fixed(atoms))
    bonds, wanted = (
        [(c.pairs, c.bondlengths) for c in a.constraints if isinstance(c, FixBondLengths)]
        for a in (back, atoms)
    )
    assert len(bonds) == len(wanted)
    for (pairs, lengths), (other_pairs, other_lengths) in zip(bonds, wanted, strict=True):
        np.testing.assert_array_equal(pairs, other_pairs)
        np.testing.assert_array_equal(lengths, other_lengths)


@pytest.mark.parametrize("name", STRUCTURES)
def test_all_that_both_can_hold_comes_back(name: str, tmp_path: Any):
    atoms = STRUCTURES[name]()
    system = ms.io.from_ase(atoms, LJ, PARAMS)
    assert system.periodic == tuple(atoms.pbc.tolist())
    np.testing.assert_array_equal(np.asarray(system.masses), atoms.get_masses())
    assert fixed(atoms).any()
    agree(ms.io.to_ase(system), atoms)
    # once more: the same system
    same(ms.io.from_ase(ms.io.to_ase(system), LJ, system.params), system)
    ms.io.save(tmp_path / "a.npz", system)
    same(ms.io.load(tmp_path / "a.npz"), system)
    kept = [
        pickle.loads(pickle.dumps(system)),
        system.replace(positions=system.positions + 0.1),
        system.with_params({"epsilon": 2.0}),
        ms.unstack(ms.stack([system, system]))[1],
        jax.jit(lambda s: s)(system),
    ]
    for one in kept:
        same((one.masses, one.tags), (system.masses, system.tags))


def same(a: Any, b: Any) -> None:
    """Two pytrees, equal bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_vacuum_is_left_out_and_changes_nothing():
    thick, thin = slab(), slab()
    thick.cell.array[2] = [0.5, 0.0, 40.0]
    same(ms.io.from_ase(thick, LJ, PARAMS), ms.io.from_ase(thin, LJ, PARAMS))


@pytest.mark.parametrize("name", STRUCTURES)
def test_files_keep_axes_masses_and_tags(name: str, tmp_path: Any):
    """An extended XYZ of ours, one of ASE's, and a description that reads either."""
    atoms = STRUCTURES[name]()
    system = ms.io.from_ase(atoms, LJ, PARAMS)
    ms.io.write_extxyz(tmp_path / "ours.extxyz", system)
    ase.io.write(tmp_path / "ases.extxyz", ms.io.to_ase(system))
    for file in ("ours.extxyz", "ases.extxyz"):
        written: Any = ase.io.read(tmp_path / file)
        np.testing.assert_array_equal(written.pbc, atoms.pbc)
        np.testing.assert_allclose(written.get_masses(), atoms.get_masses(), atol=1e-7)
        np.testing.assert_array_equal(written.get_tags(), atoms.get_tags())
        (tmp_path / "a.toml").write_text(
            'description = "from a file"\ndimension = 3\n'
            f'box = "{"positions" if atoms.pbc.any() else "open"}"\n'
            f'positions = {{ kind = "file", file = "{file}" }}\n'
            'potential = { kind = "lennard_jones", onset = 3.0, cutoff = 4.0 }\n'
            "parameters = { sigma = 2.0, epsilon = 1.0 }\n"
        )
        read = ms.load_system(tmp_path / "a.toml")
        assert read.periodic == system.periodic
        assert (read.box is None) == (system.box is None)
        if system.box is not None:
            np.testing.assert_allclose(np.asarray(read.box), np.asarray(system.box), atol=1e-7)
        np.testing.assert_allclose(np.asarray(read.masses), np.asarray(system.masses), atol=1e-7)
        assert (read.tags is None) == (system.tags is None)
        energy = float(ms.observables.energy(system))
        assert float(ms.observables.energy(read)) == pytest.approx(energy, rel=1e-5)


def test_bonds_within_a_length_are_not_found_across_an_open_axis(tmp_path: Any):
    """Three atoms along x, near each other across that axis; a fourth is near across z alone."""
    places = [[0.1, 0, 0], [1.5, 0, 0], [2.9, 0, 0], [0.1, 0.1, 2.8]]
    file = tmp_path / "a.extxyz"
    for axes, count in (([True, False, False], 3), ([True, False, True], 6)):
        ase.io.write(file, ase.Atoms("Ar4", places, cell=[3.0, 0.0, 3.0], pbc=axes))
        (tmp_path / "a.toml").write_text(
            'description = "bonds"\ndimension = 3\nbox = "positions"\n'
            'positions = { kind = "file", file = "a.extxyz" }\n'
            'potential = { kind = "harmonic_bonds", bonds = { within = 1.45 } }\n'
            "parameters = { stiffness = 1.0, length = 1.0 }\n"
        )
        bonds = np.asarray(ms.load_system(tmp_path / "a.toml").potential.bonds).tolist()
        assert [0, 2] in bonds and len(bonds) == count


# -- masses and elements


def test_masses_are_those_of_the_elements_where_none_were_set():
    plain = ase.build.molecule("H2O")
    assert not plain.has("masses")
    system = ms.io.from_ase(plain, LJ, PARAMS)
    np.testing.assert_allclose(np.asarray(system.masses), [15.999, 1.008, 1.008])
    assert not ms.io.to_ase(system).has("masses")
    # of other elements they are masses of their own
    np.testing.assert_allclose(
        ms.io.to_ase(system, symbols=["S", "Li"]).get_masses(), [15.999, 1.008, 1.008]
    )
    # atoms X, and discs without elements, have none
    assert ms.io.from_ase(ase.Atoms("X2", [[0, 0, 0], [2, 0, 0]]), LJ, PARAMS).masses is None
    discs = ms.load_system("seed_packing_2d", count=16)
    back = ms.io.from_ase(ms.io.to_ase(discs), discs.potential, discs.params, dimension=2)
    assert discs.masses is back.masses is None and discs.tags is back.tags is None
    heavy = discs.replace(masses=np.linspace(1.0, 2.0, 16))
    back = ms.io.from_ase(ms.io.to_ase(heavy), discs.potential, discs.params, dimension=2)
    np.testing.assert_array_equal(np.asarray(back.masses), heavy.masses)


def test_a_table_shows_masses_where_there_are_any():
    lines = str(ms.io.from_ase(bulk(), LJ, PARAMS)).splitlines()
    assert [line.split()[1:] for line in lines if line.split()[0] == "masses"] == [["22,", "35.5"]]
    many = ms.io.from_ase(bulk(), LJ, PARAMS).replace(masses=np.arange(1.0, 17.0))
    assert "1 to 16" in str(many)
    assert "masses" not in str(ms.load_system("dimer"))


def test_elements_are_numbered_in_the_order_of_the_potential():
    atoms = bulk()
    params = {"sigma": [1.8, 2.4], "epsilon": 1.0}
    swapped = ms.io.from_ase(atoms, LJ, params, elements=["Cl", "Na"])
    assert swapped.species_names == ("Cl", "Na")
    assert np.asarray(swapped.species).tolist() == [1, 0] * 8
    by_number = ms.io.from_ase(atoms, LJ, params, {"Cl": 0, "Na": 1})
    same(swapped, by_number)
    agree(ms.io.to_ase(swapped), atoms)
    more = ms.io.from_ase(atoms, LJ, PARAMS, elements=("Na", "Cl", "K"))
    assert more.species_names == ("Na", "Cl", "K")
    alone = ms.io.from_ase(slab(), LJ, PARAMS, elements=["Cu"])
    assert alone.symbols is not None and set(alone.symbols) == {"Cu"}


@pytest.mark.parametrize(
    ("elements", "species", "words"),
    [
        ("NaCl", None, "elements is 'NaCl': give the chemical symbols of species 0, 1"),
        ([], None, "give the chemical symbols of species 0, 1"),
        ([11, 17], None, "give the chemical symbols of species 0, 1"),
        (["Na", "Cl", "Na"], None, "elements names Na twice"),
        (["Na"], None, "without Cl: name all"),
        (["K", "Na", "Cl"], None, "no atom is K: begin with an element that is there"),
        (["Na", "Cl"], {"Na": 0, "Cl": 1}, "give one of the two"),
    ],
)
def test_elements_that_do_not_fit_are_refused(elements: Any, species: Any, words: str):
    with pytest.raises(InputError, match=words) as caught:
        ms.io.from_ase(bulk(), LJ, PARAMS, species, elements=elements)
    assert "\n" not in str(caught.value)


# -- constraints


def test_planes_and_lines_along_an_axis_pin_coordinates():
    atoms = molecule()
    atoms.set_constraint([FixedPlane([0, 2], [0, 0, -2]), FixedLine(3, [0, 1, 0])])
    system = ms.io.from_ase(atoms, LJ, PARAMS)
    mask = np.zeros((9, 3), bool)
    mask[[0, 2], 2] = True
    mask[3] = [True, False, True]
    pinned: Any = system.constraints[0]
    np.testing.assert_array_equal(np.asarray(pinned.mask), mask)
    np.testing.assert_array_equal(fixed(ms.io.to_ase(system)), mask)
    np.testing.assert_array_equal(fixed(atoms), mask)  # as ASE reads them


def test_planes_of_a_planar_structure_leave_z_out():
    flat = ase.Atoms("Ar2", [[0, 0, 0], [3, 0, 0]])
    flat.set_constraint([FixedPlane([0, 1], [0, 0, 1]), FixedLine([1], [1, 0, 0])])
    system = ms.io.from_ase(flat, LJ, PARAMS, dimension=2)
    pinned: Any = system.constraints[0]
    assert np.asarray(pinned.mask).tolist() == [[False, False], [False, True]]


def test_bonds_of_several_constraints_are_one_list():
    atoms = molecule()
    atoms.set_constraint([FixBondLength(0, 1), FixBondLengths([[1, 2]], bondlengths=[1.43])])
    system = ms.io.from_ase(atoms, LJ, PARAMS)
    bonds: Any = system.constraints[0]
    assert np.asarray(bonds.bonds).tolist() == [[0, 1], [1, 2]]
    lengths = np.asarray(system.params["fixed_bond_length"])
    np.testing.assert_allclose(lengths, [atoms.get_distance(0, 1), 1.43], rtol=1e-14)


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (FixedPlane([0], [1, 1, 0]), r"have a FixedPlane along \[0.7.*, 0.7.*, 0.0\], and mdsens"),
        (FixedLine([0], [1, 0, 2]), "have a FixedLine along .* rotate the atoms, or remove it"),
        (Hookean(a1=0, a2=1, rt=1.0, k=1.0), "have the constraint Hookean, which mdsens lacks"),
    ],
)
def test_constraints_that_mdsens_lacks_are_refused(constraint: Any, words: str):
    atoms = molecule()
    atoms.set_constraint(constraint)
    with pytest.raises(InputError, match=words):
        ms.io.from_ase(atoms, LJ, PARAMS)


# -- files of earlier versions


def test_a_file_of_version_2_has_no_masses_and_loads(tmp_path: Any):
    system = ms.io.from_ase(bulk(), LJ, PARAMS)
    path = tmp_path / "a.npz"
    ms.io.save(path, system)
    with np.load(path) as archive:
        arrays = {k: v for k, v in archive.items() if k not in ("masses", "tags")}
    header = json.loads(str(arrays.pop("header")))
    header["format_version"] = 2
    fields = header["tree"]["fields"]
    for name in ("masses", "tags", "periodic"):
        del fields[name]
    listed = fields["neighbors"]["fields"]
    grid = listed.pop("grid")["fields"]
    count = {"tuple": [3, 3, 3]} if listed.pop("cells") else {"tuple": []}
    listed |= {"cells": count, "run_capacity": grid["run_capacity"]}
    del listed["images"]
    np.savez(path, header=np.array(json.dumps(header)), **arrays)
    back = ms.io.load(path)
    assert back.masses is None and back.tags is None and back.periodic == (True, True, True)
    np.testing.assert_array_equal(np.asarray(back.box), np.asarray(system.box))


def test_a_file_of_version_3_has_its_cells_in_the_grid(tmp_path: Any):
    system = ms.load_system("seed_packing_2d")
    path = tmp_path / "a.npz"
    ms.io.save(path, system)
    with np.load(path) as archive:
        arrays = dict(archive.items())
    header = json.loads(str(arrays.pop("header")))
    header["format_version"] = 3
    listed = header["tree"]["fields"]["neighbors"]["fields"]
    name = listed.pop("cells")["array"]
    cells = [int(count) for count in arrays.pop(name)]
    grid = listed["grid"]["fields"]
    for later in ("visited", "cell_capacity"):
        del grid[later]
    grid["cells"] = {"tuple": cells}
    np.savez(path, header=np.array(json.dumps(header)), **arrays)
    back = ms.io.load(path)
    np.testing.assert_array_equal(back.neighbors.cells, system.neighbors.cells)
    assert back.neighbors.grid.visited == system.neighbors.grid.visited
    # the search on the grid finds the pairs that a new list has
    moved = back.replace(positions=back.positions + 0.3)
    same_pairs = ms.observables.energy(moved), ms.observables.energy(moved.reallocate())
    np.testing.assert_allclose(*same_pairs, rtol=1e-13)


def test_a_minimum_of_version_4_has_its_code_under_status(tmp_path: Any):
    eq = ms.minimize(ms.load_system("dimer"), progress=False)
    path = tmp_path / "a.npz"
    ms.io.save(path, eq)
    with np.load(path) as archive:
        arrays = dict(archive.items())
    header = json.loads(str(arrays.pop("header")))
    header["format_version"] = 4
    fields = header["tree"]["fields"]
    fields["status"] = fields.pop("code")
    del fields["moved"]
    np.savez(path, header=np.array(json.dumps(header)), **arrays)
    back = ms.io.load(path)
    assert back.status is eq.status is ms.Status.CONVERGED and back.moved is None
    assert "moved" not in str(back)


def test_a_box_function_keeps_its_axes(tmp_path: Any):
    box = _Cell()
    places = [[0, 0, 0], [2.2, 0, 0]]
    system = ms.System.create(places, box, LJ, PARAMS, periodic=(True, True, False))
    ms.io.save(tmp_path / "a.npz", system)
    same(ms.io.load(tmp_path / "a.npz", box=box), system)


class _Cell:
    """A cell of a length that a parameter gives."""

    def __call__(self, params: Any) -> Any:
        return 5.0 * params["sigma"] * np.eye(3)
