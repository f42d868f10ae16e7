"""The calculator of ASE, against finite differences by ASE, and ASE's tools that run on it."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import ase
import ase.build
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase.calculators.calculator import Calculator, PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.calculators.lj import LennardJones
from ase.mep import NEB
from ase.optimize import BFGS

import mdsens as ms
from mdsens import InputError

LJ = ms.potentials.lennard_jones(2.0, 2.5)
PARAMS = {"sigma": 1.0, "epsilon": 1.0}
CONSTANT = 1.55  # of fcc Lennard-Jones, near its minimum
# Argon in eV and angstroms, the units in which ASE's optimizers guess a stiffness.
ARGON = ms.potentials.lennard_jones(4.5, 5.2)
ARGON_PARAMS = {"sigma": 3.4, "epsilon": 0.0104}


class Case(NamedTuple):
    """Atoms with a potential; ``plane`` where they move in x and y alone."""

    atoms: ase.Atoms
    potential: Any
    params: dict[str, Any]
    plane: bool = False


def fcc(repeats: Any = 1, cubic: bool = True, noise: float = 0.03) -> ase.Atoms:
    atoms = ase.build.bulk("Ar", "fcc", a=CONSTANT, cubic=cubic) * repeats
    atoms.rattle(noise, seed=1)
    return atoms


def molecule() -> ase.Atoms:
    corners = np.array([[0, 0, 0], [1.1, 0, 0], [0.5, 1.0, 0.1], [0.4, 0.3, 0.9], [1.2, 1.0, 0.9]])
    return ase.Atoms("Ar5", corners)


def slab() -> ase.Atoms:
    """Four layers of a small cell, with a vacuum that the axis is not periodic along."""
    atoms = ase.build.fcc111("Ar", (2, 2, 2), a=CONSTANT, vacuum=2.0)
    atoms.pbc = [True, True, False]
    atoms.rattle(0.03, seed=2)
    return atoms


def wire() -> ase.Atoms:
    """A zigzag along x, without other cell vectors."""
    places = [[0, 0, 0], [0.9, 0.6, 0.1], [1.9, 0.1, 0.5]]
    return ase.Atoms("Ar3", places, cell=[2.8, 0, 0], pbc=[True, False, False])


def discs() -> ase.Atoms:
    """Sixteen discs in a plane, in a cell of ASE with a third vector."""
    corners = np.stack(np.meshgrid(*[np.arange(4.0)] * 2), -1).reshape(-1, 2)
    places = np.zeros((16, 3))
    places[:, :2] = 0.9 * corners + 0.1 * np.random.default_rng(0).normal(size=(16, 2))
    return ase.Atoms("Ar16", places, cell=[3.6, 3.7, 2.0], pbc=[True, True, False])


def stillinger_weber(vectors: Any, mask: Any, kind: Any, kinds: Any, p: Any) -> Any:
    """The energy of an atom of Stillinger and Weber: half of its pairs, and its angles."""
    a = 1.8
    r = jnp.sqrt(jnp.sum(vectors**2, axis=1))
    inside = mask & (r < 0.999 * a)
    safe = jnp.where(inside, r, 1.0)
    pairs = p["A"] * (p["B"] / safe**4 - 1.0) * jnp.exp(1.0 / (safe - a))
    tails = jnp.where(inside, jnp.exp(1.2 / (safe - a)), 0.0)
    cosines = (vectors @ vectors.T) / (safe[:, None] * safe[None])
    angles = p["lam"] * (cosines + 1.0 / 3.0) ** 2 * tails[:, None] * tails[None]
    both = inside[:, None] & inside[None] & ~jnp.eye(len(r), dtype=bool)
    return 0.5 * jnp.sum(jnp.where(inside, pairs, 0.0)) + 0.5 * jnp.sum(
        jnp.where(both, angles, 0.0)
    )


def tied(positions: Any, params: Any, displacement: Any) -> Any:
    """Fourth powers of the distances in a ring of atoms: an energy of all atoms at once."""
    apart = displacement(positions, jnp.roll(positions, 1, axis=0))
    return params["k"] * jnp.sum(jnp.sum(apart**2, axis=1) ** 2)


SW = ms.potentials.from_local(stillinger_weber, ("A", "B", "lam"), 1.8)
SW_PARAMS = {"A": 7.05, "B": 0.602, "lam": 21.0}
BONDS = ms.potentials.harmonic_bonds([[0, 1], [1, 2], [2, 0]]) + LJ.renamed({"epsilon": "depth"})
BOND_PARAMS = {"stiffness": 3.0, "length": 1.0, "sigma": 1.0, "depth": [[1.0, 1.1], [1.1, 0.8]]}
SILENT: Any = None  # the log of ASE's optimizers
ENERGY = ms.potentials.from_energy(tied, ("k",)) + LJ


def diamond() -> ase.Atoms:
    atoms = ase.build.bulk("Si", "diamond", a=2.56)
    atoms.rattle(0.03, seed=4)
    return atoms


def alloy() -> ase.Atoms:
    """Atoms of two elements, some of which are bonded."""
    atoms = molecule()
    atoms.symbols = "NiNiNiPP"
    return atoms


CASES: dict[str, Callable[[], Case]] = {
    "one-atom cell": lambda: Case(fcc(cubic=False), LJ, PARAMS),
    "four-atom cell": lambda: Case(fcc(), LJ, PARAMS),
    "skewed cell": lambda: Case(fcc((2, 1, 1), cubic=False), LJ, PARAMS),
    "molecule": lambda: Case(molecule(), LJ, PARAMS),
    "slab": lambda: Case(slab(), LJ, PARAMS),
    "wire": lambda: Case(wire(), LJ, PARAMS),
    "discs": lambda: Case(discs(), ms.potentials.soft_sphere(), {**PARAMS, "alpha": 2.5}, True),
    "bonds": lambda: Case(alloy(), BONDS, BOND_PARAMS),
    "Stillinger-Weber": lambda: Case(diamond(), SW, SW_PARAMS),
    "many bodies": lambda: Case(fcc(), ENERGY, {**PARAMS, "k": 0.1}),
}


def attached(case: Case) -> ase.Atoms:
    """The atoms of a case with a calculator of their own."""
    dimension = 2 if case.plane else 3
    system = ms.io.from_ase(case.atoms, case.potential, case.params, dimension=dimension)
    atoms = case.atoms.copy()
    atoms.calc = ms.io.as_calculator(system)
    return atoms


@cache
def made(name: str) -> ase.Atoms:
    return attached(CASES[name]())


@pytest.mark.parametrize("name", CASES)
def test_forces_and_stress_are_derivatives_of_the_energy(name: str):
    """Central differences over 1e-5 leave an error of some 1e-10 of the third derivative."""
    case = CASES[name]()
    atoms = made(name).copy()
    atoms.calc = made(name).calc
    axes = [0, 1] if case.plane else [0, 1, 2]
    forces = atoms.get_forces()
    scale = max(1.0, float(np.abs(forces).max()))
    numerical = calculate_numerical_forces(atoms, 1e-5, icarts=axes)
    np.testing.assert_allclose(forces[:, axes], numerical, atol=1e-7 * scale)
    assert forces.shape == (len(atoms), 3) and not forces[:, len(axes) :].any()
    assert len(atoms) == 1 or np.abs(forces).max() > 0.1  # the test is of something
    if not atoms.cell.volume > 0:
        with pytest.raises(PropertyNotImplementedError):
            atoms.get_stress()
        return
    stress = atoms.get_stress()
    assert np.abs(stress).max() > 0.01
    if case.plane:  # planar cells stay planar: one strain at a time
        numerical = plane_stress(atoms)
    else:
        numerical = calculate_numerical_stress(atoms, 1e-5)
    np.testing.assert_allclose(stress, numerical, atol=1e-6 * max(1.0, np.abs(stress).max()))


def plane_stress(atoms: ase.Atoms, step: float = 1e-5) -> np.ndarray:
    """The stress of planar atoms, by differences of their energy, with the volume of ASE."""
    cell = atoms.cell.array.copy()
    volume = atoms.cell.volume

    def energy(i: int, j: int, e: float) -> float:
        strain = np.eye(3)
        strain[i, j] += 0.5 * e
        strain[j, i] += 0.5 * e
        strained = atoms.copy()
        strained.calc = atoms.calc
        strained.set_cell(cell @ strain, scale_atoms=True)
        return float(strained.get_potential_energy())

    stress = np.zeros(6)
    for k, (i, j) in {0: (0, 0), 1: (1, 1), 5: (0, 1)}.items():
        stress[k] = (energy(i, j, step) - energy(i, j, -step)) / (2.0 * step * volume)
    return stress


@pytest.mark.parametrize("name", ["one-atom cell", "slab", "bonds", "Stillinger-Weber", "discs"])
def test_energies_of_the_atoms_sum_to_that_of_the_system(name: str):
    case, atoms = CASES[name](), made(name)
    energies = atoms.get_potential_energies()
    energy = atoms.get_potential_energy()
    assert energies.shape == (len(atoms),)
    assert energies.sum() == pytest.approx(energy, rel=1e-12)
    dimension = 2 if case.plane else 3
    system = ms.io.from_ase(case.atoms, case.potential, case.params, dimension=dimension)
    # another path to it: the list of pairs, each once
    assert energy == pytest.approx(float(ms.observables.energy(system)), rel=1e-12)
    assert atoms.get_potential_energy(force_consistent=True) == energy


def test_half_of_a_pair_goes_to_either_atom_and_all_of_an_atoms_own_to_it():
    """In a crystal all are alike; of a dimer with a third atom far away it has none."""
    np.testing.assert_allclose(np.ptp(made("one-atom cell").get_potential_energies()), 0.0)
    atoms = attached(Case(ase.Atoms("Ar3", [[0, 0, 0], [1.2, 0, 0], [9, 0, 0]]), LJ, PARAMS))
    energies = atoms.get_potential_energies()
    phi = 4.0 * (1.2**-12 - 1.2**-6)
    np.testing.assert_allclose(energies, [0.5 * phi, 0.5 * phi, 0.0], rtol=1e-12)


def test_no_energies_where_the_energy_has_no_parts():
    atoms = made("many bodies")
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_potential_energies()
    edges = ms.potentials.from_edges(lambda edges, p: p["k"] * jnp.sum(edges.mask), ("k",), 2.0)
    calc = ms.io.as_calculator(ms.io.from_ase(fcc(), edges, {"k": 1.0}))
    assert "energies" not in calc.implemented_properties


def test_another_code_has_the_same_energy_forces_and_stress():
    """ASE's own Lennard-Jones, smoothly cut off; its own energies of the atoms as well."""

    def smooth(r: Any, sigma: Any, epsilon: Any) -> Any:
        """ASE's: the energy times a polynomial that goes from 1 at 2.0 to 0 at 2.5."""
        s = jnp.clip((r**2 - 4.0) / (6.25 - 4.0), 0.0, 1.0)
        factor = 1.0 - s**2 * (3.0 - 2.0 * s)
        return 4.0 * epsilon * ((sigma / r) ** 12 - (sigma / r) ** 6) * factor

    potential = ms.potentials.from_pair(smooth, ("sigma", "epsilon"), 2.5, (2.0, 2.5))
    atoms = attached(Case(fcc((2, 1, 1), cubic=False), potential, PARAMS))
    other = atoms.copy()
    other.calc = LennardJones(sigma=1.0, epsilon=1.0, rc=2.5, ro=2.0, smooth=True)
    assert atoms.get_potential_energy() == pytest.approx(other.get_potential_energy(), rel=1e-12)
    np.testing.assert_allclose(atoms.get_forces(), other.get_forces(), atol=1e-10)
    np.testing.assert_allclose(atoms.get_stress(), other.get_stress(), atol=1e-10)
    np.testing.assert_allclose(
        atoms.get_potential_energies(), other.get_potential_energies(), rtol=1e-12
    )


# -- moving atoms and cells


class _Compilations(logging.Handler):
    """Counts what jax compiles, by its log."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("Compiling"):
            self.names.append(record.getMessage())


def test_a_hundred_steps_compile_nothing():
    atoms = fcc((3, 3, 3))
    atoms.calc = ms.io.as_calculator(ms.io.from_ase(atoms, LJ, PARAMS))
    atoms.get_forces()
    atoms.get_stress()
    log, rng, counted = logging.getLogger("jax"), np.random.default_rng(3), _Compilations()
    log.addHandler(counted)
    system: Any = atoms.calc
    first = system.system.neighbors.reference
    try:
        with jax.log_compiles():
            for k in range(100):
                atoms.positions += 0.02 * rng.normal(size=(108, 3))
                atoms.set_cell(atoms.cell * (1.0 + 1e-3 * np.sin(k)), scale_atoms=True)
                atoms.get_forces()
                atoms.get_stress()
            during = list(counted.names)
            jax.jit(lambda x: x + 1.0)(np.ones(3))
    finally:
        log.removeHandler(counted)
    assert not during and counted.names  # and the count counts
    assert not np.array_equal(first, system.system.neighbors.reference)  # lists were made anew
    fresh = ms.io.from_ase(atoms, LJ, PARAMS)
    assert atoms.get_potential_energy() == pytest.approx(
        float(ms.observables.energy(fresh)), rel=1e-12
    )


def test_cells_and_periodic_axes_may_change_as_they_like():
    """From a cell of nearest images to one with images, to a slab, to no cell, and back."""
    near = ms.potentials.lennard_jones(1.3, 1.5)
    start = fcc((2, 2, 2))
    calculator: Any = ms.io.as_calculator(ms.io.from_ase(start, near, PARAMS))

    def right(changed: ase.Atoms) -> None:
        changed.calc = calculator
        fresh = ms.io.from_ase(changed, near, PARAMS)
        want = float(ms.observables.energy(fresh))
        assert changed.get_potential_energy() == pytest.approx(want, rel=1e-12)

    right(start)
    assert calculator.system.neighbors.images is None
    small = start.copy()
    small.set_cell(start.cell.array * 0.8, scale_atoms=True)
    right(small)
    assert calculator.system.neighbors.images is not None
    open_ = start.copy()
    open_.pbc = False
    right(open_)
    layers = start.copy()
    layers.pbc = [True, False, True]
    layers.cell.array[1] = 0.0
    right(layers)
    sheared = start.copy()
    sheared.set_cell(start.cell.array @ [[1, 0.2, 0], [0, 1, 0], [0, 0, 1]], scale_atoms=True)
    right(sheared)
    moved = start.copy()
    moved.wrap()
    moved.positions += 7.3
    right(moved)
    right(start)


def test_a_box_that_follows_the_parameters_gives_way_to_the_atoms_cell():
    discs = ms.load_system("seed_packing_2d", count=16)
    atoms = ms.io.to_ase(discs)
    atoms.calc = ms.io.as_calculator(discs)
    before = atoms.get_potential_energy()
    assert before == pytest.approx(float(ms.observables.energy(discs)), rel=1e-12)
    atoms.set_cell(atoms.cell * [1.1, 1.1, 1.0], scale_atoms=True)
    box = np.asarray(discs.box) * 1.1
    wider = ms.System.create(
        discs.positions * 1.1, box, discs.potential, discs.params, discs.species
    )
    want = float(ms.observables.energy(wider))
    assert atoms.get_potential_energy() == pytest.approx(want, rel=1e-12) and want < 0.9 * before


# -- ASE's tools


@cache
def vacancy() -> tuple[ms.Equilibrium, ms.Equilibrium]:
    """A vacancy in an fcc crystal of eight cells, before and after a neighbor hops into it."""
    atoms = ase.build.bulk("Ar", "fcc", a=3.4 * CONSTANT, cubic=True) * 2
    hole = atoms.positions[0].copy()
    distances = atoms.get_distances(0, range(1, 32), mic=True)
    nearest = int(np.argmin(distances))  # of the others, those from 1 on
    del atoms[0]
    hopped = atoms.copy()
    hopped.positions[nearest] = hole
    first, second = (ms.minimize(ms.io.from_ase(a, ARGON, ARGON_PARAMS)) for a in (atoms, hopped))
    return first, second


def test_ases_optimizer_finds_the_same_minimum():
    minimum, _ = vacancy()
    atoms = ms.io.to_ase(minimum.system)
    atoms.rattle(0.05, seed=5)
    atoms.calc = ms.io.as_calculator(minimum.system)
    with BFGS(atoms, logfile=SILENT, alpha=2.0) as relax:
        assert relax.run(fmax=1e-6, steps=100)
    energy = float(ms.observables.energy(minimum.system))
    assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-9)


def test_ases_elastic_band_finds_the_same_barrier():
    first, second = vacancy()
    start = float(ms.observables.energy(first.system))
    saddle = ms.find_saddle(first, towards=second)
    barrier = float(ms.observables.energy(saddle.system)) - start
    ends = [ms.io.to_ase(eq.system) for eq in (first, second)]
    images = [ends[0], *(ends[0].copy() for _ in range(3)), ends[1]]
    band: Any = NEB(
        images, climb=True, k=0.1, allow_shared_calculator=True, method="improvedtangent"
    )
    band.interpolate(mic=True)
    calculator = ms.io.as_calculator(first.system)
    for image in images:
        image.calc = calculator
    with BFGS(band, logfile=SILENT, alpha=3.0) as relax:
        assert relax.run(fmax=1e-3, steps=100)
    heights = [image.get_potential_energy() - start for image in images]
    assert max(heights) == pytest.approx(barrier, rel=1e-3) and barrier > 0.05
    assert heights[-1] == pytest.approx(0.0, abs=1e-9)


def test_a_calculator_goes_through_pickle_and_copy():
    atoms = made("slab")
    forces = atoms.get_forces()
    again = pickle.loads(pickle.dumps(atoms.calc))
    deep = copy.deepcopy(atoms.calc)
    for calc in (again, deep):
        assert type(calc) is type(atoms.calc) and isinstance(calc, Calculator)
        np.testing.assert_array_equal(calc.results["forces"], forces)
        other = slab()
        other.calc = calc
        np.testing.assert_array_equal(other.get_forces(), forces)
        other.positions[0] += 0.1
        assert np.abs(other.get_forces() - forces).max() > 0.1
    assert again.name == "mdsens"


# -- what does not fit


def test_other_atoms_are_refused():
    calc = ms.io.as_calculator(ms.io.from_ase(alloy(), BONDS, BOND_PARAMS))
    for change, words in (
        (lambda a: a.pop(), "atoms has 4 atoms, and the system of this calculator 5 particles"),
        (lambda a: a.set_chemical_symbols("Ni2P3"), "atoms are Ni2P3, of other species"),
        (lambda a: a.set_chemical_symbols("P2Ni3"), "or in another order: make a calculator of"),
        (lambda a: a.set_array("species_index", np.array([1, 1, 0, 0, 0])), "of other species"),
        (lambda a: a.positions.__setitem__((2, 1), np.nan), r"atoms.positions\[2\] is .*finite"),
        (lambda a: a.set_pbc(True), "without a volume along the periodic axes"),
        (lambda a: a.positions.__setitem__(1, a.positions[0]), "energy of the atoms is nan"),
    ):
        atoms = alloy()
        change(atoms)
        atoms.calc = calc
        with pytest.raises(InputError, match=words) as caught:
            atoms.get_potential_energy()
        assert "\n" not in str(caught.value)
        with pytest.raises(InputError):  # and again: no result is left from the failure
            atoms.get_potential_energy()
    good = alloy()
    good.calc = calc
    assert np.isfinite(good.get_potential_energy())


def test_without_elements_the_first_atoms_tell_them():
    system = ms.System.create(molecule().positions, None, LJ, PARAMS)
    atoms, other = molecule(), molecule()
    atoms.calc = other.calc = ms.io.as_calculator(system)
    atoms.get_potential_energy()
    other.symbols = "Kr5"
    with pytest.raises(InputError, match="Kr5, of other species"):
        other.get_potential_energy()


def test_planar_systems_take_planar_atoms():
    atoms = made("discs").copy()
    atoms.calc = made("discs").calc
    atoms.positions[3, 2] = 0.5
    with pytest.raises(InputError, match=r"differ by 0\.5 in z"):
        atoms.get_forces()


def test_what_is_no_single_system_is_refused():
    system = ms.System.create(molecule().positions, None, LJ, PARAMS)
    with pytest.raises(InputError, match="system is a Equilibrium: give a System"):
        ms.io.as_calculator(ms.minimize(system, max_steps=1, throw=False))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="batch of 2: give one of its members"):
        ms.io.as_calculator(ms.stack([system, system]))
