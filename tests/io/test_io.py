"""What is read is checked key by key, what is written comes back bit for bit,
and files that lie are found out.
"""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import ase
import ase.build
import ase.io
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mdsens as ms
from mdsens import InputError
from mdsens._util.lattice import nearest_image
from mdsens.cli import report
from mdsens.io.initial_positions import pairs_within
from mdsens.io.system_toml import systems_folder

BONDS = [[0, 1], [1, 2], [2, 0]]
TOML = """
description = "three springs"
dimension = 2
box = { lengths = [10.0, 10.0] }
positions = { kind = "list", values = [[1.0, 1.0], [2.0, 1.0], [1.5, 2.0]] }
potential = { kind = "harmonic_bonds", bonds = [[0, 1], [1, 2], [2, 0]] }
parameters = { stiffness = 1.0, length = [1.0, 1.1, 1.2] }
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "springs.toml"
    path.write_text(TOML)
    return path


@pytest.fixture
def discs(tmp_path: Path) -> Path:
    """Six discs of two sizes: everything but the dimension is a keyword away."""
    path = tmp_path / "discs.toml"
    path.write_text(
        'description = "discs"\ndimension = 2\ncount = 6\nspecies = [3, 3]\n'
        "box = { packing_fraction = 0.3 }\n"
        'positions = { kind = "random" }\npotential = { kind = "soft_sphere" }\n'
        "[parameters]\nsigma = [1.0, 0.6]\nepsilon = 1.0\nalpha = 2.0\n"
    )
    return path


def same(a: Any, b: Any) -> None:
    """Two pytrees, equal bit for bit, with equal types of what is not an array."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y)
        assert np.asarray(x).dtype == np.asarray(y).dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# -- the format


def test_a_path_is_read_like_a_bundled_name(toml):
    system = ms.load_system(toml)
    assert system.n == 3
    same(system, ms.load_system(str(toml)))


def test_keywords_override_fields_and_merge_parameters():
    system = ms.load_system("seed_packing_2d", count=64, parameters={"sigma": [1.0, 0.7]})
    assert system.n == 64
    assert system.params["sigma"].tolist() == [1.0, 0.7]
    assert float(system.params["alpha"]) == 2.0
    other = ms.load_system("seed_packing_2d", seed=1)
    assert not np.array_equal(other.positions, ms.load_system("seed_packing_2d").positions)


def test_the_box_follows_the_parameters_unless_held(discs):
    follows = ms.load_system(discs)
    held = ms.load_system(discs, box={"packing_fraction": 0.3, "follows": "nothing"})
    np.testing.assert_array_equal(follows.positions, held.positions)
    grown = {"sigma": jnp.array([1.2, 0.7])}
    assert float(follows.with_params(grown).volume) > float(follows.volume)
    assert float(held.with_params(grown).volume) == pytest.approx(float(follows.volume), rel=1e-14)
    assert isinstance(follows.boundary, ms.PackingFraction)


def test_vectors_are_given_one_after_the_other(toml):
    system = ms.load_system(toml, box={"vectors": [[10.0, 0.0], [2.0, 9.0]]})
    np.testing.assert_array_equal(system.box, [[10.0, 2.0], [0.0, 9.0]])
    assert ms.load_system(toml, box="open").box is None


def test_fractions_scale_with_the_count(discs):
    species = ms.load_system(discs, count=10, species=[0.8, 0.2]).species
    assert np.bincount(np.asarray(species)).tolist() == [8, 2]


def test_parameters_can_be_drawn(discs):
    drawn = {"sigma": {"uniform": [0.8, 1.2]}}
    sigma = ms.load_system(discs, parameters=drawn, species=[6]).params["sigma"]
    assert sigma.shape == (6,) and 0.8 <= float(sigma.min()) < float(sigma.max()) <= 1.2
    again = ms.load_system(discs, parameters=drawn, species=[6], seed=1).params["sigma"]
    assert not np.array_equal(sigma, again)


def test_potentials_add_up_with_renamed_parameters(toml):
    parts = [
        {"kind": "harmonic_bonds", "bonds": BONDS},
        {"kind": "soft_sphere"},
        {"kind": "morse", "cutoff": 4.0},
    ]
    parts[2]["rename"] = {"sigma": "well", "epsilon": "depth", "alpha": "width"}
    values = {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0, "well": 1.0, "depth": 0.1, "width": 3.0}
    system = ms.load_system(toml, potential=parts, parameters=values)
    assert system.potential.name == "harmonic_bonds + soft_sphere + morse"
    assert set(system.params) == {"stiffness", "length", *values}


@pytest.mark.parametrize(("lattice", "sites"), [("sc", 1), ("bcc", 2), ("fcc", 4)])
def test_lattices_have_their_neighbors(tmp_path, lattice, sites):
    nearest = {"sc": (6, 1.0), "bcc": (8, 3**0.5 / 2), "fcc": (12, 0.5**0.5)}[lattice]
    place = {"kind": "lattice", "lattice": lattice, "constant": 1.7, "cells": 4}
    potential = {"kind": "lennard_jones", "onset": 2.9, "cutoff": 3}
    system = ms.load_system(
        "fcc_argon", positions=place, potential=potential, parameters={"sigma": 1.0}
    )
    assert system.n == sites * 64
    pairs = pairs_within(
        np.asarray(system.positions), np.asarray(system.box), 1.7 * nearest[1] * 1.001
    )
    assert np.bincount(pairs.ravel(), minlength=system.n).tolist() == [nearest[0]] * system.n


def test_relaxation_options_are_keywords_of_minimize(toml):
    options = ms.io.relaxation_options(toml, relaxation={"tolerance": 1e-10, "dt_max": 0.2})
    assert options == {"tolerance": 1e-10, "method": ms.relaxation.Fire(dt_max=0.2)}
    assert ms.Status(int(ms.minimize(ms.load_system(toml), **options).status)).good


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sed": 1}, "sed.*did you mean 'seed'"),
        ({"seed": -1}, "seed is -1.*integer from 0"),
        ({"seed": True}, "seed is True.*integer"),
        ({"dimension": 4}, "dimension is 4.*2 or 3"),
        ({"dimension": "2"}, "dimension is '2'"),
        ({"count": 0}, "count is 0.*integer from 1"),
        ({"count": 2.5}, "count is 2.5"),
        ({"description": 3}, "description is 3.*text"),
        ({"species": [3, 4]}, "species is .*7 in all.*6 particles"),
        ({"species": [0.3, 0.3]}, "species is .*sum to 1"),
        ({"species": "positions"}, "species asks for the array 'species'.*not from a file"),
        ({"species": 6}, "species is 6.*counts"),
        ({"species": [-3, 9]}, "species is .*0 or more"),
        (
            {"box": {"packing_fraktion": 0.9}},
            "box.packing_fraktion.*did you mean 'packing_fraction'",
        ),
        ({"box": {"packing_fraction": -0.9}}, "box.packing_fraction is -0.9.*positive"),
        ({"box": {"packing_fraction": float("nan")}}, "box.packing_fraction is nan.*positive"),
        (
            {"box": {"packing_fraction": 0.9, "lengths": [1, 1]}},
            "box has 2 of packing_fraction.*give one",
        ),
        ({"box": {}}, "box has 0 of packing_fraction.*give one"),
        ({"box": {"lengths": [9.0]}}, r"box.lengths has shape \(1,\).*\(2\)"),
        ({"box": {"vectors": [[9.0, 0.0], [9.0]]}}, "box.vectors has rows of different lengths"),
        (
            {"box": {"number_density": 1.0, "follows": "nothing"}},
            "box.follows belongs to packing_fraction",
        ),
        ({"box": {"packing_fraction": 0.9, "follows": "sigma"}}, "box.follows is .sigma."),
        ({"box": "opened"}, "box is 'opened'.*did you mean 'open'"),
        ({"box": "open"}, "random positions need a cell"),
        ({"box": "positions"}, "positions come without a cell"),
        ({"box": 3.0}, "box is 3.0.*table"),
        ({"positions": {"kind": "randm"}}, "positions.kind is 'randm'.*did you mean 'random'"),
        ({"positions": "random"}, "positions is 'random'.*table"),
        ({"positions": {"kind": "random", "file": "a"}}, "positions.file is no key"),
        (
            {"positions": {"kind": "list", "values": [[1.0, 2.0, 3.0]]}},
            "positions.values has shape",
        ),
        ({"positions": {"kind": "list", "values": [[1.0, "a"]]}}, "positions.values is .*numbers"),
        (
            {"positions": {"kind": "list", "values": [[1.0, 2.0]]}},
            "count is 6, but positions give 1",
        ),
        ({"positions": {"kind": "list"}}, "positions.values is missing"),
        (
            {"positions": {"kind": "lattice", "lattice": "fcc"}},
            "positions.lattice is 'fcc'.*square, triangular",
        ),
        (
            {"positions": {"kind": "lattice", "lattice": "square", "constant": 1.0, "cells": [2]}},
            "positions.cells has shape",
        ),
        (
            {
                "positions": {
                    "kind": "lattice",
                    "lattice": "square",
                    "constant": 1.0,
                    "cells": 2,
                    "vacancies": [9],
                }
            },
            "positions.vacancies is .*0 to 3",
        ),
        ({"positions": {"kind": "file", "file": "nothing.npz"}}, "nothing.npz does not exist"),
        ({"positions": {"kind": "file", "file": "discs.toml"}}, "unknown suffix.*extxyz"),
        (
            {"potential": {"kind": "soft_spheres"}},
            "potential.kind is 'soft_spheres'.*did you mean 'soft_sphere'",
        ),
        ({"potential": {"kind": "soft_sphere", "cutoff": 2.0}}, "potential.cutoff is no key"),
        ({"potential": {"kind": "lennard_jones", "onset": 3.0}}, "is 3.0 and `cutoff` is 2.5"),
        ({"potential": []}, "potential is empty"),
        ({"potential": "soft_sphere"}, "potential is 'soft_sphere'.*table"),
        ({"potential": {"law": "soft_sphere"}}, "potential.law.*potential.kind = 'soft_sphere'"),
        (
            {"potential": {"kind": "harmonic_bonds", "bonds": {"within": 1e-9}}},
            "no two particles are that near",
        ),
        (
            {"potential": {"kind": "soft_sphere", "rename": {"sigm": "d"}}},
            "rename.sigm.*did you mean 'sigma'",
        ),
        ({"parameters": {"sigma": [1.0]}}, "parameters.sigma has shape"),
        ({"parameters": {"sigma": -1.0}}, "parameters.sigma is .*positive"),
        ({"parameters": {"sigma": "big"}}, "parameters.sigma is 'big'.*numbers"),
        ({"parameters": {"sigma": {"array": "diameter"}}}, "the positions are not from a file"),
        (
            {"parameters": {"sigma": {"uniform": [2.0, 1.0]}}},
            "parameters.sigma.uniform.*low below high",
        ),
        ({"parameters": {"sigma": {"normal": [2.0, 1.0]}}}, "parameters.sigma.normal is no key"),
        ({"parameters": {"epsilom": 1.0}}, "epsilom.*did you mean 'epsilon'"),
        ({"parameters": 3}, "parameters is 3.*table"),
        ({"relaxation": {"tolerence": 1e-9}}, "relaxation.tolerence.*did you mean 'tolerance'"),
    ],
)
def test_bad_fields_are_named_with_value_and_remedy(discs, fields, words):
    with pytest.raises(InputError, match=words) as caught:
        ms.load_system(discs, **fields)
    assert str(caught.value).startswith(f"{discs}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["description", "dimension", "box", "positions", "potential", "parameters"]
)
def test_a_missing_key_is_named(toml, key):
    kept = [line for line in TOML.splitlines() if not line.startswith(f"{key} =")]
    toml.write_text("\n".join(kept))
    with pytest.raises(InputError, match=f"{key} is missing"):
        ms.load_system(toml)


def test_names_that_nobody_has_get_the_nearest():
    with pytest.raises(InputError, match=r"seed_packing_2D.*did you mean 'seed_packing_2d'"):
        ms.load_system("seed_packing_2D")
    with pytest.raises(InputError, match=r"no/such/file.toml"):
        ms.load_system("no/such/file.toml")
    with pytest.raises(InputError, match="bundled name or the path"):
        ms.load_system(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "content", [TOML[:150].encode(), b"\x00\xff\xfe", b"n = [1,", b"import os"]
)
def test_what_is_no_toml_is_said_to_be_none(tmp_path, content):
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"broken.toml"):
        ms.load_system(path)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"box": np.eye(2)}, "no array 'positions'"),
        ({"positions": np.zeros((3, 3))}, "positions have shape"),
        ({"positions": np.full((2, 2), "a")}, "positions have shape"),
        ({"positions": np.zeros((2, 2), complex)}, "positions have shape"),
        ({"positions": np.random.default_rng(0).random((4, 2)), "box": np.eye(3)}, "box has shape"),
        ({"positions": np.zeros((4, 2)), "diameter": np.ones(4)}, "without a cell"),
        (
            {
                "positions": np.zeros((2, 4, 2)),
                "diameter": np.ones((2, 4)),
                "box": np.ones((2, 2, 2)),
            },
            "no volume",
        ),
        (
            {"positions": np.full((4, 2), np.nan), "diameter": np.ones(4), "box": 9 * np.eye(2)},
            "every coordinate must be finite",
        ),
        (
            {"positions": np.zeros((4, 2)), "diameter": np.ones(4), "box": 9 * np.eye(2)},
            "are the same point",
        ),
        (
            {"positions": np.zeros((4, 2)), "diameter": np.full(4, "a"), "box": 9 * np.eye(2)},
            "parameters.sigma.*numbers",
        ),
        (
            {"positions": np.random.default_rng(0).random((4, 2)), "box": 9 * np.eye(2)},
            "'diameter'.*does not hold.*box",
        ),
        ({"positions": np.array([{}, {}], object)}, "Python objects"),
    ],
)
def test_wrong_contents_of_a_position_file_are_named(tmp_path, arrays, words):
    path = tmp_path / "packing.npz"
    np.savez(path, **arrays)
    with pytest.raises(InputError, match=words):
        ms.load_system("packing_from_file", positions={"file": str(path)})


def test_truncated_position_files_and_indices_are_named(tmp_path, monkeypatch):
    data = systems_folder() / "data"
    for ending in ("npz", "extxyz"):
        whole = (data / f"2d_polydisperse_N64_p1e-1.{ending}").read_bytes()
        cut = tmp_path / f"cut.{ending}"
        cut.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InputError, match=rf"cut\.{ending} is no whole"):
            ms.load_system("packing_from_file", positions={"file": str(cut)})
        (tmp_path / f"whole.{ending}").write_bytes(whole)
        monkeypatch.chdir(tmp_path)  # as a keyword, a path may be relative to where the user is
        assert ms.load_system("packing_from_file", positions={"file": f"whole.{ending}"}).n == 64
        with pytest.raises(InputError, match=r"positions\.index is 10, but .* has 10 frames"):
            ms.load_system("packing_from_file", positions={"index": 10, "file": f"whole.{ending}"})


def test_single_precision_needs_no_warning(discs):
    script = (
        "import warnings; warnings.simplefilter('error', UserWarning); import mdsens as ms\n"
        f"print(ms.load_system({str(discs)!r}).positions.dtype)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=Path(ms.__file__).parents[1],
        env={"JAX_ENABLE_X64": "0", "PATH": "", "JAX_PLATFORMS": "cpu"},
    )
    assert done.stdout.strip() == "float32", done.stderr


# -- ASE


def test_importing_io_imports_no_ase():
    script = "import sys, mdsens.io; print('ase' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=Path(ms.__file__).parents[1],
    )
    assert done.stdout.strip() == "False", done.stderr


LJ = ms.potentials.lennard_jones(3.0, 4.0)


def test_ase_round_trip_in_3d_with_a_skew_cell():
    atoms = ase.build.bulk("Ar", "fcc", a=5.26) * (5, 5, 5)
    atoms.rattle(0.1, seed=0)
    atoms.numbers[1::3] = 36
    system = ms.io.from_ase(atoms, LJ, {"sigma": [3.4, 3.6], "epsilon": 0.01})
    np.testing.assert_array_equal(system.box, atoms.cell[:].T)
    assert np.asarray(system.species).tolist() == (atoms.numbers == 36).astype(int).tolist()
    back = ms.io.to_ase(system, symbols=["Ar", "Kr"])
    np.testing.assert_array_equal(back.positions, atoms.positions)
    np.testing.assert_array_equal(back.cell[:], atoms.cell[:])
    np.testing.assert_array_equal(back.numbers, atoms.numbers)
    same(ms.io.from_ase(back, LJ, system.params), system)
    # distances in the two codes, over a skew cell
    near = atoms.get_all_distances(mic=True)[0, 1:]
    assert system.box is not None
    ours = jnp.linalg.norm(
        nearest_image(system.positions[1:] - system.positions[0], system.box), axis=1
    )
    short = near < 7.0
    np.testing.assert_allclose(np.asarray(ours)[short], near[short], rtol=1e-12)


def test_ase_round_trip_in_2d_and_open():
    system = ms.load_system("packing_from_file")
    atoms = ms.io.to_ase(system)
    assert atoms.pbc.tolist() == [True, True, False]
    assert atoms.cell[2, 2] == float(system.params["sigma"].max())
    np.testing.assert_array_equal(atoms.arrays["diameter"], system.params["sigma"])
    np.testing.assert_array_equal(atoms.arrays["sigma"], system.params["sigma"])
    back = ms.io.from_ase(atoms, system.potential, system.params, dimension=2)
    same(back.positions, system.positions)
    np.testing.assert_array_equal(back.box, system.box)
    dimer = ms.load_system("dimer")
    same(ms.io.from_ase(ms.io.to_ase(dimer), dimer.potential, dimer.params), dimer)


def test_species_survive_without_symbols():
    system = ms.load_system("seed_packing_2d")
    atoms = ms.io.to_ase(system)
    back = ms.io.from_ase(atoms, system.potential, system.params, dimension=2)
    same(back.species, system.species)


# -- which element is which species

GLASS = {"sigma": [2.2, 1.8], "epsilon": [[1.0, 1.2], [1.2, 0.5]]}


def glass(symbols: str = "Ni6P2") -> ase.Atoms:
    """Two elements on a cubic lattice."""
    places = np.stack(np.meshgrid(*[2.5 * np.arange(2)] * 3), -1).reshape(-1, 3)
    return ase.Atoms(symbols, positions=places, cell=[9.0] * 3, pbc=True)


@pytest.mark.parametrize(
    ("symbols", "species", "names", "first"),
    [
        ("Ni6P2", None, ("Ni", "P"), 0),  # Ni is 28, P is 15: not the order of the atomic number
        ("P2Ni6", None, ("P", "Ni"), 0),
        ("Ni6P2", {"Ni": 0, "P": 1}, ("Ni", "P"), 0),
        ("Ni6P2", {"P": 0, "Ni": 1}, ("P", "Ni"), 1),
        ("P2Ni6", {"Ni": np.int64(0), "P": 1}, ("Ni", "P"), 1),
        ("Ni6P2", {"Ni": 0, "P": 1, "B": 2}, ("Ni", "P", "B"), 0),
    ],
)
def test_elements_are_numbered_as_they_come_or_as_they_are_told(symbols, species, names, first):
    system = ms.io.from_ase(glass(symbols), LJ, {"sigma": 2.0, "epsilon": 1.0}, species)
    assert system.species_names == names
    assert int(np.asarray(system.species)[0]) == first
    assert (
        system.symbols is not None
        and system.symbols.tolist() == glass(symbols).get_chemical_symbols()
    )


def test_each_element_has_the_parameters_of_its_species():
    energies = [
        float(ms.observables.energy(ms.io.from_ase(glass(symbols), LJ, GLASS, {"Ni": 0, "P": 1})))
        for symbols in ("Ni6P2", "P2Ni6")
    ]
    # the corners of a cube are all alike
    assert energies[0] == pytest.approx(energies[1], rel=1e-14)
    swapped = float(ms.observables.energy(ms.io.from_ase(glass(), LJ, GLASS, {"P": 0, "Ni": 1})))
    assert swapped != pytest.approx(energies[0], rel=1e-2)
    system = ms.io.from_ase(glass(), LJ, GLASS)
    np.testing.assert_array_equal(np.asarray(system.diameters), [2.2] * 6 + [1.8] * 2)


@pytest.mark.parametrize(
    ("species", "words"),
    [
        ({"Ni": 0}, r"species is {'Ni': 0}, without P: name all, such as {'Ni': 0, 'P': 1}"),
        ({"Ni": 0, "P": 2}, r"species is .*: number its 2 symbols from 0, each with its own"),
        ({"Ni": 0, "P": 0}, "number its 2 symbols from 0"),
        ({"Ni": 0, "P": -1}, "number its 2 symbols from 0"),
        ({"Ni": 0, "P": "1"}, "number its 2 symbols from 0"),
        ({"Ni": 0, "P": 1.5}, "number its 2 symbols from 0"),
        ({"Ni": False, "P": True}, "number its 2 symbols from 0"),
        ({}, r"species is {}, without Ni, P: name all"),
        ([0, 1], r"`species` has shape \(2,\) and type int64: give \(8,\) integers from 0"),
        ("Ni", "species is 'Ni'"),
    ],
)
def test_numbers_of_elements_are_checked(species, words):
    with pytest.raises(InputError, match=words) as caught:
        ms.io.from_ase(glass(), LJ, GLASS, species)
    assert "\n" not in str(caught.value)


def test_symbols_go_through_everything(tmp_path):
    system = ms.io.from_ase(glass(), LJ, GLASS)
    assert ms.io.to_ase(system).get_chemical_formula() == "Ni6P2"
    other = ms.io.from_ase(glass(), LJ, GLASS, {"P": 0, "Ni": 1})
    assert ms.io.to_ase(other).get_chemical_symbols() == glass().get_chemical_symbols()
    same(ms.io.from_ase(ms.io.to_ase(other), LJ, GLASS), other)
    path = tmp_path / "glass.npz"
    ms.io.save(path, system)
    xyz = tmp_path / "glass.extxyz"
    ms.io.write_extxyz(xyz, other)
    written: Any = ase.io.read(xyz)
    assert written.get_chemical_symbols() == glass().get_chemical_symbols()
    kept = [
        ms.io.load(path),
        pickle.loads(pickle.dumps(system)),
        system.replace(positions=system.positions + 0.1),
        system.with_params({"epsilon": 1.0}),
        system.reallocate(),
        ms.stack([system, system]),
        ms.unstack(ms.stack([system, system]))[1],
        jax.jit(lambda s: s)(system),
    ]
    assert [s.species_names for s in kept] == [("Ni", "P")] * len(kept)
    with pytest.raises(InputError, match="system 1 differs from system 0 in species_names"):
        ms.stack([system, system.replace(species_names=("Cu", "Zr"))])


def test_a_description_takes_symbols_from_the_file_of_the_positions(tmp_path):
    path = tmp_path / "glass.toml"
    ase.io.write(tmp_path / "glass.extxyz", glass())
    path.write_text(
        'description = "glass"\ndimension = 3\nspecies = { P = 0, Ni = 1 }\nbox = "positions"\n'
        'positions = { kind = "file", file = "glass.extxyz" }\n'
        'potential = { kind = "lennard_jones", onset = 3.0, cutoff = 4.0 }\n'
        "parameters = { sigma = [1.8, 2.2], epsilon = 1.0 }\n"
    )
    system = ms.load_system(path)
    assert (
        system.species_names == ("P", "Ni")
        and np.asarray(system.species).tolist() == [1] * 6 + [0] * 2
    )
    as_they_come = ms.load_system(path, species="positions")
    assert (
        as_they_come.species_names == ("Ni", "P") and int(np.asarray(as_they_come.species)[0]) == 0
    )
    with pytest.raises(InputError, match="without P: name all"):
        ms.load_system(path, species={"Ni": 0})
    with pytest.raises(InputError, match="the positions come without chemical symbols"):
        ms.load_system(
            path,
            positions={"kind": "list", "values": glass().positions.tolist()},
            box={"lengths": [9.0] * 3},
        )


def test_stand_ins_are_no_names():
    discs = ms.load_system("seed_packing_2d")
    back = ms.io.from_ase(ms.io.to_ase(discs), discs.potential, discs.params, dimension=2)
    assert discs.species_names == back.species_names == () and back.symbols is None
    argon = ms.io.from_ase(
        ase.build.bulk("Ar", "fcc", a=5.26, cubic=True) * 3, LJ, {"sigma": 3.4, "epsilon": 0.01}
    )
    assert argon.species is None and argon.species_names == ("Ar",) and argon.symbols is not None
    assert set(argon.symbols.tolist()) == {"Ar"}
    assert set(ms.io.to_ase(argon).get_chemical_symbols()) == {"Ar"}
    colloids = discs.replace(species_names=("large", "small"))  # no elements
    assert set(ms.io.to_ase(colloids).get_chemical_symbols()) == {"H", "He"}


def shown(system: ms.System) -> dict[str, str]:
    rows = [line.strip().split("  ", 1) for line in str(system).splitlines()[1:]]
    return {key: value.strip() for key, value in rows}


def test_a_system_shows_its_species_and_its_cell():
    system = ms.io.from_ase(glass(), LJ, GLASS)
    assert shown(system)["species"] == "6 Ni (species 0), 2 P (species 1)"
    assert shown(system)["box"] == "periodic, 9 x 9 x 9"
    assert shown(ms.stack([system, system]))["species"] == "6 Ni (species 0), 2 P (species 1)"
    assert shown(ms.stack([system, system]))["box"] == "periodic, 9 x 9 x 9; that of the first"
    discs = ms.load_system("seed_packing_2d")
    assert shown(discs)["species"] == "64 of species 0, 64 of species 1"
    length = f"{float(discs.volume) ** 0.5:.6g}"
    assert (
        shown(discs)["box"]
        == f"periodic, {length} x {length}, follows the diameters at a packing fraction of 0.98"
    )
    skew = ms.System.create(
        discs.positions, [[9.0, 2.0], [0.0, 9.0]], discs.potential, discs.params, discs.species
    )
    assert shown(skew)["box"] == "periodic, 9 x 9.21954, angles 77.47 degrees"
    dimer = ms.load_system("dimer")
    assert shown(dimer)["box"] == "open boundaries" and "species" not in shown(dimer)
    argon = ms.io.from_ase(
        ase.build.bulk("Ar", "fcc", a=5.26, cubic=True) * 3, LJ, {"sigma": 3.4, "epsilon": 0.01}
    )
    assert shown(argon)["particles"] == "n = 108 in 3-D, all Ar"
    assert "6 Ni + 2 P" in report.system("glass", system, {})
    seen: list[str] = []
    jax.jit(lambda s: (seen.append(repr(s)), s.positions)[1])(system)
    assert seen == ["<System, traced>"]


@pytest.mark.parametrize(
    ("change", "dimension", "words"),
    [
        (lambda a: None, 2, "differ by .* in z"),
        (lambda a: a.set_cell(np.zeros((3, 3))), 3, "without a volume along the periodic axes"),
        (
            lambda a: (a.set_cell([20.0, 20.0, 0.0]), a.set_pbc([False, True, True])),
            3,
            r"without a volume along the periodic axes of atoms.pbc = \[False, True, True\]",
        ),
        (lambda a: a.positions.__setitem__((0, 0), np.nan), 3, "positions.*finite"),
        (lambda a: None, 4, "dimension is 4"),
    ],
)
def test_structures_that_do_not_fit_are_refused(change, dimension, words):
    atoms = ase.build.bulk("Ar", "fcc", a=5.26, cubic=True) * 3
    change(atoms)
    with pytest.raises(InputError, match=words):
        ms.io.from_ase(atoms, LJ, {"sigma": 3.4, "epsilon": 0.01}, dimension=dimension)


def test_planar_cells_only():
    atoms = ase.Atoms(
        "Ar2", positions=[[0, 0, 0], [3, 0, 0]], cell=[[20, 0, 0], [0, 20, 1], [0, 0, 5]], pbc=True
    )
    with pytest.raises(InputError, match="not planar"):
        ms.io.from_ase(atoms, LJ, {"sigma": 3.4, "epsilon": 0.01}, dimension=2)


def test_planar_structures_take_their_periodic_axes_from_x_and_y():
    atoms = ase.Atoms(
        "Ar2", positions=[[0, 0, 5], [3, 0, 5]], cell=[20, 20, 0], pbc=[True, False, True]
    )
    strip = ms.io.from_ase(atoms, LJ, {"sigma": 3.4, "epsilon": 0.01}, dimension=2)
    assert strip.periodic == (True, False)
    back = ms.io.to_ase(strip)
    assert back.pbc.tolist() == [True, False, False]
    np.testing.assert_array_equal(back.cell.array, np.diag([20.0, 0.0, 3.4]))
    atoms.pbc = [True, True, False]
    assert ms.io.from_ase(atoms, LJ, {"sigma": 3.4, "epsilon": 0.01}, dimension=2).volume == 400.0


def test_things_that_are_no_structures_are_refused():
    with pytest.raises(InputError, match=r"give an ase.Atoms"):
        ms.io.from_ase("argon.xyz", LJ, {})
    with pytest.raises(InputError, match="give a System"):
        ms.io.to_ase("system")  # type: ignore[arg-type]
    system = ms.load_system("dimer")
    with pytest.raises(InputError, match="symbols is"):
        ms.io.to_ase(system, symbols=["Ar", "Kr"])
    with pytest.raises(InputError, match="symbols is"):
        ms.io.to_ase(system, symbols=["Argon"])
    with pytest.raises(InputError, match="batch of 2"):
        ms.io.to_ase(ms.stack([system, system]))


# -- extended XYZ


@pytest.fixture(scope="module")
def eq() -> ms.Equilibrium:
    return ms.minimize(ms.load_system("packing_from_file", positions={"index": 1}))


@pytest.fixture(scope="module")
def response(eq) -> ms.Displacement:
    return ms.jvp(eq, {"sigma": np.random.default_rng(0).random(eq.system.n)})


def test_extxyz_keeps_every_digit(tmp_path, eq, response):
    path = tmp_path / "packing.extxyz"
    ms.io.write_extxyz(path, eq, response)
    atoms: Any = ase.io.read(path)
    assert atoms.positions[:, :2].tobytes() == np.asarray(eq.positions).tobytes()
    assert atoms.arrays["response"][:, :2].tobytes() == np.asarray(response.value).tobytes()
    assert np.array_equal(atoms.arrays["radius"], np.asarray(eq.system.diameters) / 2)
    assert np.array_equal(atoms.arrays["rattler"], np.asarray(response.rattlers))
    assert atoms.pbc.tolist() == [True, True, False]
    again = ms.load_system(
        "packing_from_file",
        positions={"file": str(path)},
        parameters={"sigma": {"array": "diameter"}},
    )
    same(again.positions, eq.positions)
    same(again.params, eq.params)
    np.testing.assert_array_equal(again.box, eq.system.box)


def test_extxyz_of_species_open_space_and_batches(tmp_path):
    path = tmp_path / "frames.extxyz"
    systems = [ms.load_system("seed_packing_2d", seed=k, count=16) for k in range(3)]
    ms.io.write_extxyz(path, ms.stack(systems))
    frames: Any = ase.io.read(path, ":")
    assert len(frames) == 3
    for atoms, system in zip(frames, systems, strict=True):
        assert np.array_equal(atoms.positions[:, :2], system.positions)
        assert np.array_equal(atoms.arrays["species_index"], np.asarray(system.species))
    ms.io.write_extxyz(path, ms.load_system("dimer"))
    assert not ase.io.read(path).pbc.any()  # type: ignore[union-attr]


def test_extxyz_refuses_what_does_not_fit(tmp_path, eq):
    path = tmp_path / "a.extxyz"
    with pytest.raises(InputError, match=r"response has shape \(3, 2\)"):
        ms.io.write_extxyz(path, eq, np.zeros((3, 2)))
    with pytest.raises(InputError, match="response has shape dict"):
        ms.io.write_extxyz(path, eq, ms.vjp(eq, np.ones((64, 2)), throw=False))
    with pytest.raises(InputError, match="System or an Equilibrium"):
        ms.io.write_extxyz(path, "a")
    with pytest.raises(InputError, match="is no folder"):
        ms.io.write_extxyz(tmp_path / "nowhere" / "a.extxyz", eq)
    assert list(tmp_path.iterdir()) == []


# -- save and load


def test_equilibrium_comes_back_bit_for_bit(tmp_path, eq):
    path = tmp_path / "eq.npz"
    ms.io.save(path, eq, provenance={"seed": 3, "note": "σ"})
    back = ms.io.load(path)
    same(back, eq)
    assert isinstance(back, ms.Equilibrium)
    dparams = {"sigma": np.ones(64)}
    same(ms.jvp(back, dparams), ms.jvp(eq, dparams))
    assert [p.name for p in tmp_path.iterdir()] == ["eq.npz"]


def test_header_says_what_made_the_file(tmp_path, eq):
    path = tmp_path / "eq.npz"
    ms.io.save(path, eq, provenance={"seed": 3})
    header = ms.io.read_header(path)
    assert header["kind"] == "Equilibrium" and header["status"] == "CONVERGED"
    assert header["provenance"] == {"seed": 3} and header["parameters"]["alpha"] == 2.0
    assert set(header["versions"]) == {"python", "mdsens", "jax", "jaxlib", "jax-md", "numpy"}
    assert header["versions"]["jax"] == jax.__version__
    assert header["precision"] == "float64" and header["device"].startswith(jax.default_backend())
    with np.load(path, allow_pickle=False) as archive:  # and numpy alone reads it
        assert np.array_equal(archive["system.positions"], eq.positions)


def test_response_comes_back_bit_for_bit(tmp_path, eq, response):
    for k, one in enumerate([response, ms.vjp(eq, np.ones((64, 2)), throw=False)]):
        path = tmp_path / f"{k}.npz"
        ms.io.save(path, one)
        same(ms.io.load(path), one)
        assert ms.io.read_header(path)["status"] == one.status.name


def parts() -> list[Any]:
    p = ms.potentials
    renamed = p.lennard_jones(1.1, 2.2).renamed({"sigma": "s", "epsilon": "e"})
    return [
        p.soft_sphere(),
        p.soft_sphere().renamed({"sigma": "diameter"}),
        p.lennard_jones(1.5, 2.75),
        p.morse(1.25, 2.5),
        p.harmonic_morse(),
        p.harmonic_bonds(BONDS),
        p.harmonic_bonds(BONDS).renamed({"length": "rest"}) + renamed + p.soft_sphere(),
        p.stillinger_weber(),
        p.tersoff(),
        p.tersoff(1),
        p.gupta(1.5, 2.5).renamed({"r0": "length"}),
        p.finnis_sinclair() + renamed,
        p.eam(0.5, 0.25, 2.0),
    ]


@pytest.mark.parametrize("potential", parts(), ids=lambda potential: potential.name)
def test_every_built_in_potential_comes_back(tmp_path, potential):
    # a table where it must be one
    table = np.linspace(1.0, 0.0, 9) if potential.name == "eam" else 1.0
    system = ms.System.create(
        np.array([[0, 0], [1, 0.1], [0.2, 1.2]]),
        18.0,
        potential,
        {k: (1.0 + i / 8) * table for i, k in enumerate(potential.parameters)},
    )
    ms.io.save(tmp_path / "a", system)
    back = ms.io.load(tmp_path / "a")
    same(back, system)
    assert type(back.potential) is type(potential) and back.potential.name == potential.name
    assert float(ms.observables.energy(back)) == float(ms.observables.energy(system))


@pytest.mark.parametrize(
    "box",
    [None, 9.0, ms.PackingFraction(0.2), ms.PackingFraction(0.2, np.array([[1, 0.1], [0, 1]]))],
)
def test_every_box_comes_back_and_batches_do(tmp_path, box):
    starts = [np.random.default_rng(k).random((12, 2)) * 4 for k in range(2)]
    values = {"sigma": [1.0, 0.7], "epsilon": 1.0, "alpha": 2.5}
    systems = [
        ms.System.create(x, box, ms.potentials.soft_sphere(), values, species=[0, 1] * 6)
        for x in starts
    ]
    for k, one in enumerate([systems[0], ms.stack(systems)]):
        ms.io.save(tmp_path / f"{k}.npz", one)
        same(ms.io.load(tmp_path / f"{k}.npz"), one)


def soft(r, sigma):
    return jnp.where(r < sigma, (1 - r / sigma) ** 2, 0.0)


def growing(params):
    return jnp.eye(2) * (4.0 + params["sigma"])


def test_functions_of_the_user_are_asked_for(tmp_path):
    potential = ms.potentials.from_pair(soft, ["sigma"], cutoff=1.5)
    system = ms.System.create(
        np.random.default_rng(0).random((6, 2)) * 4, growing, potential, {"sigma": 1.2}
    )
    path = tmp_path / "own.npz"
    ms.io.save(path, system)
    with pytest.raises(InputError, match=r"'soft', a function of your own.*potential="):
        ms.io.load(path, box=growing)
    with pytest.raises(InputError, match="box that is a function of your own"):
        ms.io.load(path, potential=potential)
    with pytest.raises(InputError, match="other parameters than the sigma"):
        ms.io.load(path, potential=ms.potentials.soft_sphere(), box=growing)
    same(ms.io.load(path, potential=potential, box=growing), system)
    both = ms.System.create(
        system.positions,
        9.0,
        potential + ms.potentials.harmonic_bonds(BONDS),
        {"sigma": 1.2, "stiffness": 1.0, "length": 1.0},
    )
    ms.io.save(path, both)
    with pytest.raises(InputError, match="potential="):
        ms.io.load(path)
    same(ms.io.load(path, potential=both.potential), both)


def test_a_tree_of_parameters_comes_back_bit_for_bit(tmp_path):
    potential = ms.potentials.from_energy(lambda R, p, d: jnp.sum(R**2), ("weights",))
    tree = {"b": [np.ones((2, 3)), (np.float32(1.5), None)], "a": {}, "c": np.zeros(0)}
    system = ms.System.create(np.eye(2), None, potential, {"weights": tree})
    ms.io.save(tmp_path / "system.npz", system)
    again = ms.io.load(tmp_path / "system.npz", potential=potential)
    same(again.params, system.params)
    assert jax.tree.structure(again.params["weights"]) == jax.tree.structure(tree)
    with np.load(tmp_path / "system.npz") as file:
        assert "params.weights.b.0" in file.files
    described = ms.io.read_header(tmp_path / "system.npz")["parameters"]
    assert described["weights.b.1.0"] == 1.5
    assert "weights" not in ms.io.to_ase(system).arrays


def test_a_look_alike_of_a_built_in_potential_is_the_users(tmp_path):
    mine = ms.potentials.from_pair(
        ms.potentials.lennard_jones().phi,
        ("sigma", "epsilon"),
        2.5,
        (2.0, 2.5),
        {"epsilon": ms.potentials.geometric},
        name="lennard_jones",
        positive=True,
    )
    system = ms.System.create([[0, 0], [1, 0.1]], 9.0, mine, {"sigma": 1.0, "epsilon": 1.0})
    ms.io.save(tmp_path / "a.npz", system)
    with pytest.raises(InputError, match="potential="):
        ms.io.load(tmp_path / "a.npz")


def test_files_that_are_not_what_they_should_be(tmp_path, eq):
    good = tmp_path / "good.npz"
    ms.io.save(good, eq)
    whole = good.read_bytes()
    with pytest.raises(InputError, match="does not exist"):
        ms.io.load(tmp_path / "missing.npz")
    bad = tmp_path / "bad.npz"
    for content in (b"", b"text", whole[:100], whole[: len(whole) // 2], whole[:-1], whole[1:]):
        bad.write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.npz is no whole"):
            ms.io.load(bad)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    bad.write_bytes(damaged)
    with pytest.raises(InputError, match=r"bad\.npz"):
        ms.io.load(bad)
    with pytest.raises(InputError, match=r"is no whole"):
        ms.io.load(tmp_path)
    np.savez(bad, positions=np.zeros(3))
    with pytest.raises(InputError, match="not written by mdsens"):
        ms.io.load(bad)
    np.savez(bad, header=np.array({}, object))
    with pytest.raises(InputError, match="Python objects"):
        ms.io.load(bad)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h.update(format="other"), "not written by mdsens"),
        (lambda h: h.update(format_version=99), "format version 99.*newer mdsens"),
        (
            lambda h: h.update(format_version=1),
            "format version 1, .* reads 2 to 5: compute it again",
        ),
        (lambda h: h.pop("tree"), "not written by mdsens"),
        (lambda h: h["tree"].update(record="Unheard"), "damaged header"),
        (lambda h: h["tree"]["fields"].pop("code"), "damaged header"),
        (
            lambda h: h["tree"]["fields"]["code"].update(array="nothing"),
            "lacks the array 'nothing'",
        ),
        (
            lambda h: h["tree"]["fields"]["system"]["fields"]["potential"]["potential"].update(
                name="x"
            ),
            "damaged header",
        ),
    ],
)
def test_headers_that_lie(tmp_path, eq, change, words):
    path = tmp_path / "a.npz"
    ms.io.save(path, eq)
    with np.load(path) as archive:
        arrays = dict(archive)
    header = json.loads(str(arrays.pop("header")))
    change(header)
    np.savez(path, header=np.array(json.dumps(header)), **arrays)
    with pytest.raises(InputError, match=words):
        ms.io.load(path)


def test_single_precision_does_not_cut_short_in_silence(tmp_path, eq):
    path = tmp_path / "a.npz"
    ms.io.save(path, eq)
    jax.config.update("jax_enable_x64", False)
    try:
        with pytest.raises(ms.PrecisionError, match="enable_x64"):
            ms.io.load(path)
    finally:
        jax.config.update("jax_enable_x64", True)


def test_saving_replaces_whole_files_or_nothing(tmp_path, eq):
    path = tmp_path / "a.npz"
    ms.io.save(path, eq)
    before = path.read_bytes()
    with pytest.raises(InputError, match="provenance"):
        ms.io.save(path, eq, provenance={"system": object()})
    with pytest.raises(InputError, match="give a System, an Equilibrium, a derivative or"):
        ms.io.save(path, {"a": 1})
    with pytest.raises(InputError, match="is a folder"):
        ms.io.save(tmp_path, eq)
    with pytest.raises(InputError, match="is no folder"):
        ms.io.save(tmp_path / "nowhere" / "a.npz", eq)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_what_is_no_path_is_named() -> None:
    with pytest.raises(InputError, match="`path` is 3: give the path"):
        ms.io.load(3)  # type: ignore[arg-type]
