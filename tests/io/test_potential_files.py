"""Potential files: what is read, and what is refused. Energies are compared with LAMMPS's in
``tests/potentials/test_lammps_energies.py``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import mdsens as ms

SW = """# comment
Si Si Si 2.1683 2.0951 1.80 21.0 1.20 -0.333333333333  # goes on
    7.049556277 0.6022245584

  4.0 0.0 0.0
"""


def sw_file(elements: Sequence[str]) -> str:
    """Entries in which epsilon tells the triple: 123 for the second, third and fourth element."""
    lines = []
    for triple in itertools.product(range(len(elements)), repeat=3):
        number = sum((k + 1) * 10 ** (2 - place) for place, k in enumerate(triple))
        names = " ".join(elements[k] for k in triple)
        lines.append(f"{names} {number} {1000 + number} 1.8 21 1.2 -0.3 7 0.6 4 0 0")
    return "\n".join(lines)


def tersoff_entry(names: str, m: str = "3", n: float = 0.8) -> str:
    return (
        f"{names} {m} 1.0 0.5 38049 4.3484\n -.57058 {n} 1.57e-07 2.2\n346.7 1.95 0.15 3.5 1393.6\n"
    )


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_an_entry_over_several_lines(tmp_path: Path) -> None:
    potential, params = ms.io.read_potential(written(tmp_path, "Si.sw", SW), ["Si"])
    assert potential == ms.potentials.stillinger_weber()
    assert set(params) == set(potential.parameters)
    assert all(np.shape(value) == () for value in params.values())
    assert params["epsilon"] == 2.1683
    assert params["cos_theta0"] == -0.333333333333
    assert (params["A"], params["q"]) == (7.049556277, 0.0)


def test_triples_in_the_order_of_the_elements(tmp_path: Path) -> None:
    """epsilon of all triples, center first, and sigma of the entries [i, j, j]."""
    path = written(tmp_path, "three.SW", sw_file("ABC"))
    _, params = ms.io.read_potential(str(path), ["C", "A"])
    of = {0: 3, 1: 1}  # the number of each species in the file, from 1
    for i, j, k in itertools.product(range(2), repeat=3):
        assert params["epsilon"][i, j, k] == 100 * of[i] + 10 * of[j] + of[k]
        assert params["sigma"][i, j] == 1000 + 100 * of[i] + 11 * of[j]
    assert params["lambda"].shape == (2, 2, 2)


@pytest.mark.parametrize("m", ["1", "3.0"])
def test_the_exponent_of_tersoff(m: str, tmp_path: Path) -> None:
    text = tersoff_entry("C C C", m)
    potential, params = ms.io.read_potential(written(tmp_path, "C.tersoff", text), ["C"])
    assert potential == ms.potentials.tersoff(int(float(m)))
    assert (params["lambda1"], params["A"], params["R"]) == (3.5, 1393.6, 1.95)
    assert params["beta"] == 1.57e-07


FUNCFL = (
    "a comment\n29 63.55 3.615 FCC\n5 0.1 6 0.5 2.75\n0 -1 -2\n-3 -4\n6 5 4 3 2 1\n8 7 6 5 4 3\n"
)


def setfl(kind: str) -> str:
    """Elements Al and Ni; each table has one number, which tells what it is."""

    def table(number: float, count: int) -> str:
        return " ".join([str(number)] * count) + "\n"

    text = "1\n2 # no comment\n3\n2 Al Ni\n5 0.1 6 0.5 2.0\n"
    for name, number in [("Al", 1), ("Ni", 2)]:
        text += f"13 27.0 4.05 {name}\n" + table(number, 5)
        others = [1, 2] if kind == "fs" else [0]
        text += "".join(table(10 * number + other, 6) for other in others)
    return text + table(11, 6) + table(21, 6) + table(22, 6)


def test_tables_of_one_element(tmp_path: Path) -> None:
    potential, params = ms.io.read_potential(written(tmp_path, "Cu.eam", FUNCFL), ["Cu"])
    # the cutoff is before the last knot, which is at 2.5
    assert potential == ms.potentials.eam(0.1, 0.5, 2.5)
    np.testing.assert_array_equal(params["embedding"], [0, -1, -2, -3, -4])
    np.testing.assert_array_equal(params["density"], [8, 7, 6, 5, 4, 3])
    # LAMMPS's factors for a Hartree and a Bohr radius
    charges = np.array([6, 5, 4, 3, 2, 1])
    np.testing.assert_allclose(params["pair"], 27.2 * 0.529 * charges**2, rtol=1e-15)


def test_tables_of_two_elements(tmp_path: Path) -> None:
    path = written(tmp_path, "x.eam.alloy", setfl("alloy"))
    potential, params = ms.io.read_potential(path, ["Ni", "Al"])
    assert potential == ms.potentials.eam(0.1, 0.5, 2.0)
    np.testing.assert_array_equal(params["embedding"][:, 0], [2, 1])
    np.testing.assert_array_equal(params["density"], [[20] * 6, [10] * 6])
    np.testing.assert_array_equal(params["pair"][..., 3], [[22, 21], [21, 11]])
    _, alone = ms.io.read_potential(path, ["Al"])
    np.testing.assert_array_equal(alone["pair"], [11] * 6)
    assert [alone[name].shape for name in ("embedding", "density", "pair")] == [(5,), (6,), (6,)]


def test_densities_by_the_atom_and_its_neighbor(tmp_path: Path) -> None:
    """In the file those that Al makes at Al (11) and at Ni (12) come first."""
    path = written(tmp_path, "x.eam.fs", setfl("fs"))
    _, params = ms.io.read_potential(path, ["Al", "Ni"])
    np.testing.assert_array_equal(params["density"][..., 0], [[11, 21], [12, 22]])
    _, params = ms.io.read_potential(path, ["Ni"])
    np.testing.assert_array_equal(params["density"], [22] * 6)


TWO = sw_file("AB")
REFUSED = {
    "suffix": ("x.meam", "1", ["Si"], r"no suffix of a known format: give .*\.sw, \.tersoff"),
    "no list": ("x.sw", SW, "Si", r"`elements` is 'Si': give the elements .* in a list"),
    "no name": ("x.sw", SW, [14], r"`elements` contains 14: give names"),
    "element": ("x.sw", SW, ["Ge"], r"no element 'Ge': give elements among Si"),
    "empty": ("x.sw", "# nothing\n", ["Si"], r"no element 'Si': give elements among none"),
    "triple": (
        "x.sw",
        "\n".join(line for line in TWO.split("\n") if not line.startswith("A B A")),
        ["A", "B"],
        r"no entry A B A \(center first\): add this line",
    ),
    "twice": ("x.sw", SW + SW, ["Si"], r"two entries Si Si Si: remove one"),
    "short entry": (
        "x.sw",
        SW + "Ge Ge Ge 1.0 2.0",
        ["Si"],
        r"Ge Ge Ge has 2 numbers, and needs 11",
    ),
    "long entry": (
        "x.sw",
        SW.replace("4.0 0.0", "4.0 0.0 0.0"),
        ["Si"],
        r"has 12 numbers, and needs",
    ),
    "no number": ("x.sw", SW.replace("4.0", "four"), ["Si"], r"has 'four' where a number belongs"),
    "not finite": ("x.sw", SW.replace("4.0", "nan"), ["Si"], r"has 'nan' where a number belongs"),
    "m": ("x.tersoff", tersoff_entry("C C C", "2"), ["C"], r"m is 2 in the entries of C: give"),
    "two m": (
        "x.tersoff",
        "".join(
            tersoff_entry(" ".join(t), "1" if t[0] == "C" else "3")
            for t in itertools.product(("C", "Si"), repeat=3)
        ),
        ["C", "Si"],
        r"m is 1, 3 in the entries of C, Si",
    ),
    "truncated": ("x.eam", FUNCFL[:-6], ["Cu"], r"table of the density has 3 numbers, and needs 6"),
    "no table": ("x.eam", FUNCFL[:40], ["Cu"], r"table of F has 0 numbers|in place of"),
    "line in a table": (
        "x.eam",
        FUNCFL.replace("-3 -4", "-3 -4 -5"),
        ["Cu"],
        r"table of F has 6 numbers, and needs 5",
    ),
    "other metal": ("x.eam", FUNCFL, ["Ni"], r"no element 'Ni': give elements among Cu"),
    "two metals": ("x.eam", FUNCFL, ["Cu", "Cu"], r"has one element: give \['Cu'\]"),
    "no atom": ("x.eam", FUNCFL.replace("29 6", "0 6"), ["Cu"], r"give elements among none"),
    "grid": ("x.eam", FUNCFL.replace("6 0.5", "6 -0.5"), ["Cu"], r"give positive numbers"),
    "head": ("x.eam", FUNCFL.replace("5 0.1", "5.5 0.1"), ["Cu"], r"has '5\.5 .*in place of"),
    "names": ("x.eam.fs", setfl("fs").replace("2 Al", "3 Al"), ["Al"], r"'3 Al Ni' in place of"),
    "pair table": (
        "x.eam.alloy",
        setfl("alloy")[:-12],
        ["Al"],
        r"r phi of Ni and Ni has 2 numbers",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_file_that_does_not_fit_is_refused_with_a_remedy(what: str, tmp_path: Path) -> None:
    name, text, elements, message = REFUSED[what]
    with pytest.raises(ms.InputError, match=message):
        ms.io.read_potential(written(tmp_path, name, text), elements)


def test_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(ms.InputError, match=r"cannot be read \(No such file"):
        ms.io.read_potential(tmp_path / "x.sw", ["Si"])
    with pytest.raises(ms.InputError, match="cannot be read"):
        (tmp_path / "folder.sw").mkdir()
        ms.io.read_potential(tmp_path / "folder.sw", ["Si"])
    with pytest.raises(ms.InputError, match=r"`path` is 3: give the path"):
        ms.io.read_potential(3, ["Si"])  # type: ignore[arg-type]
    (tmp_path / "bytes.sw").write_bytes(bytes(range(256)))
    with pytest.raises(ms.InputError):
        ms.io.read_potential(tmp_path / "bytes.sw", ["Si"])


def test_atoms_are_numbered_in_the_order_of_the_file(tmp_path: Path) -> None:
    """Whatever their order, atoms get the tables of their own elements, also after storing."""
    from ase import Atoms

    sites = [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
    atoms = Atoms("SiC3", scaled_positions=sites, cell=[4.0] * 3, pbc=True)
    text = re.sub(" 1[0-9]{3} 1.8", " 1.9 1.8", sw_file(["C", "Si"]))  # sigma a length of 1.9
    read = ms.io.read_potential(written(tmp_path, "a.sw", text), ["C", "Si"])
    systems = [ms.io.from_ase(x, *read) for x in (atoms, atoms[[1, 2, 3, 0]])]
    assert systems[0].species_names == systems[1].species_names == ("C", "Si")
    energies = [float(ms.observables.energy(s)) for s in systems]
    assert energies[0] == pytest.approx(energies[1], rel=1e-13)
    ms.io.save(tmp_path / "a.npz", systems[0])
    again = ms.io.load(tmp_path / "a.npz")
    assert again.potential == read[0] and again.potential.elements == ("C", "Si")
    carbon = ms.io.from_ase(Atoms("C", cell=[4.0] * 3, pbc=True), *read)
    np.testing.assert_array_equal(carbon.species, [0])
    for symbols in ("Si4", "SiC2Ge"):
        other = Atoms(symbols, scaled_positions=sites, cell=[4.0] * 3, pbc=True)
        with pytest.raises(ms.InputError, match="read for C, Si, and the atoms are Si"):
            ms.io.from_ase(other, *read)
