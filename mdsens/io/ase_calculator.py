"""A calculator of ASE that evaluates the energy of a system.

With it the tools of ASE, such as its optimizers, molecular dynamics and elastic bands, run on a
potential of mdsens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.compilation import compiled
from mdsens._util.errors import InputError
from mdsens.io.ase_structures import SPECIES, cell_of, coordinates_of
from mdsens.mechanics.forces import energy_gradient, row_terms
from mdsens.mechanics.not_finite import where_not_finite
from mdsens.mechanics.status import Status
from mdsens.mechanics.strain import basis, from_mandel, strain_gradient
from mdsens.model.box import box_rule
from mdsens.model.neighbors import Neighbors
from mdsens.model.system import (
    System,
    atom_energies,
    listed,
    pair_distances,
    potential_energy,
)
from mdsens.potentials.base import Potential
from mdsens.potentials.local import LocalPotential, parts_of_neighbors

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

__all__ = ["as_calculator"]

# The components of a symmetric tensor in the order of Voigt: xx, yy, zz, yz, xz, xy.
VOIGT = ((0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1))


def as_calculator(system: System) -> Calculator:
    """Return a calculator of ASE with the potential and the parameters of a system.

        atoms.calc = ms.io.as_calculator(system)

    It gives the energy U; the forces -dU/dR; the stress (dU/dstrain) / V, positive in tension, in
    the order xx, yy, zz, yz, xz, xy, with the volume V of ``atoms.cell``; ``free_energy``, which is
    the energy; and where the energy is a sum of pairs and of energies of atoms, ``energies`` (n,),
    with half of the energy of a pair for either atom. Positions, cell and periodic axes are those
    of the atoms: a box rule of the system, such as ``PackingFraction``, has no effect. Parameters
    are those of the system. There is a stress where the three cell vectors span a volume, be the
    atoms periodic along them or not.

    No unit is converted. Other tools of ASE take lengths for Å and energies for eV: give the
    potential such parameters where that matters, as for temperatures and time steps. Constraints of
    the system have no effect; those of the atoms, which ``to_ase`` makes of them, are ASE's to
    obey. A system in 2-D takes x and y of planar atoms, and its forces and stresses along z are
    zero.

    Args:
      system: a system that is not a batch, such as that of :func:`from_ase`. The atoms of the
        calculator are as many as its particles, of the same elements in the same order.

    Raises:
      InputError: ``system`` is not a System or is a batch. A calculation raises it where the atoms
        are others than those of the system, or their cell does not fit the potential, or the energy
        is not finite.
    """
    if not isinstance(system, System):
        raise InputError(f"system is a {type(system).__name__}: give a System, such as eq.system.")
    if system.batch is not None:
        raise InputError(
            f"system is a batch of {system.batch}: give one of its members, mdsens.unstack(system)."
        )
    return _calculator_class()(system)


@functools.cache
def _calculator_class() -> Any:
    """Return the class of the calculator, which is made when it is first needed.

    Its base class is ASE's, and ASE is not imported with mdsens.
    """
    from ase.calculators.calculator import Calculator, all_changes

    class SystemCalculator(Calculator):
        """The calculator of ASE that :func:`as_calculator` returns.

        Attributes:
          system: the system at the last positions, with its neighbor list.
        """

        name = "mdsens"  # type: ignore[assignment]  # a property in the base class
        # the energy depends on neither; ASE would ask for it again where they change
        ignored_changes = {"initial_charges", "initial_magmoms"}  # noqa: RUF012

        def __init__(self, system: System) -> None:
            """Make a calculator of a system that is not a batch."""
            super().__init__()
            # the cheapest form of the potential at parameters that stay as they are
            potential = system.potential.specialize(system.params)
            self.system = system.replace(potential=potential)
            self.numbers = _known_numbers(system)
            energies = ["energies"] if _is_split(potential) else []
            self.implemented_properties = ["energy", "free_energy", *energies, "forces", "stress"]

        def calculate(
            self,
            atoms: Atoms | None = None,
            properties: Sequence[str] = ("energy",),
            system_changes: Sequence[str] = all_changes,
        ) -> None:
            """Put the energy and forces of the atoms, and their stress if asked, in ``results``."""
            super().calculate(atoms, list(properties), list(system_changes))
            if system_changes:
                self.results = {}  # none is left behind by a calculation that fails
            current: Any = self.atoms
            self.numbers = _checked_numbers(self.system, current, self.numbers)
            if not self.results:
                self.system, self.results = _evaluated(_moved(self.system, current))
            if "stress" in properties and current.cell.volume > 0:
                self.results["stress"] = _stress(self.system, current.cell.volume)

        def __reduce__(self) -> tuple[Any, ...]:
            """Return how pickle makes the calculator again: the class itself has no name for it."""
            state = {name: value for name, value in vars(self).items() if name != "system"}
            return as_calculator, (self.system,), state

    return SystemCalculator


def _known_numbers(system: System) -> np.ndarray | None:
    """Return the atomic number of each particle, (n,); None where its element is not known."""
    from ase.data import atomic_numbers

    symbols = system.symbols
    if symbols is None or not set(symbols.tolist()) <= set(atomic_numbers):
        return None
    return np.array([atomic_numbers[s] for s in symbols.tolist()])


def _checked_numbers(system: System, atoms: Atoms, numbers: np.ndarray | None) -> np.ndarray:
    """Raise InputError if atoms are not those of a calculator's system; return their numbers.

    Args:
      system: the system of the calculator.
      atoms: the atoms of the calculation.
      numbers: (n,) the atomic numbers that the atoms must have; None where they are not known.
    """
    remedy = "make a calculator of these atoms, ms.io.as_calculator(ms.io.from_ase(atoms, ...))."
    if len(atoms) != system.n:
        raise InputError(
            f"atoms has {len(atoms)} atoms, and the system of this calculator {system.n} particles:"
            f" {remedy}"
        )
    species = atoms.arrays.get(SPECIES)
    same = species is None or system.species is None or np.array_equal(species, system.species)
    if not same or (numbers is not None and not np.array_equal(numbers, atoms.numbers)):
        raise InputError(
            f"atoms are {atoms.symbols}, of other species than the system of this calculator, or in"
            f" another order: {remedy}"
        )
    return atoms.numbers.copy()


def _moved(system: System, atoms: Atoms) -> System:
    """Return a system at the positions, in the cell and with the periodic axes of an ASE ``Atoms``.

    The neighbor list need not be complete there, except where the periodic axes are new.
    """
    dtype = system.positions.dtype
    positions = coordinates_of(atoms, system.dimension)
    bad = ~np.isfinite(positions).all(axis=1)
    if bad.any():
        k = int(np.argmax(bad))
        raise InputError(
            f"atoms.positions[{k}] is {positions[k].tolist()}: every coordinate must be finite."
        )
    cell, periodic = cell_of(atoms, system.dimension)
    moved = system.replace(
        positions=jnp.asarray(positions, dtype),
        boundary=box_rule(cell, system.dimension, dtype, periodic),
        periodic=periodic,
    )
    return moved if periodic == system.periodic else moved.reallocate()


def _evaluated(system: System) -> tuple[System, dict[str, Any]]:
    """Evaluate a system; return it with a neighbor list that is complete, and the results for ASE.

    Raises:
      InputError: the cell does not fit the potential, or the energy is not finite.
    """
    neighbors, energy, forces, energies = _evaluate(system)
    if bool(neighbors.overflowed):
        # more neighbors than places for them, or a cell that became small: a larger list
        system = system.reallocate(keep=True)
        neighbors, energy, forces, energies = _evaluate(system)
    system = system.replace(neighbors=neighbors)
    value = float(energy)
    if not np.isfinite(value):
        where = where_not_finite(Status.NOT_FINITE, system)
        raise InputError(f"the energy of the atoms is {value}{where}: move them apart.")
    components = np.zeros((system.n, 3))
    components[:, : system.dimension] = np.asarray(forces)
    results: dict[str, Any] = {"energy": value, "free_energy": value, "forces": components}
    if energies is not None:
        results["energies"] = np.asarray(energies, float)
    return system, results


@compiled
def _evaluate(
    system: System,
) -> tuple[Neighbors, jax.Array, jax.Array, jax.Array | None]:
    """Compute energy, forces (n, d) and energies of the atoms (n,) with an updated neighbor list.

    The energies are None for a potential that has none. The list comes first; where it is marked as
    overflowed, the other results are not right.
    """
    neighbors, _ = listed(system)
    system = system.replace(neighbors=neighbors)
    energies = _energies(system) if _is_split(system.potential) else None
    energy = potential_energy(system) if energies is None else jnp.sum(energies)
    gradient = energy_gradient(system, used=neighbors.used)(system.positions)
    return neighbors, energy, -gradient, energies


def _stress(system: System, volume: float) -> np.ndarray:
    """Compute the stress (dU/dstrain) / V for ASE, (6,) in the order of Voigt.

    Args:
      system: the system, whose neighbor list is complete.
      volume: the volume V of ASE's cell, in 2-D too.
    """
    d = system.dimension
    stress = np.zeros((3, 3))
    stress[:d, :d] = np.asarray(_strain_gradient(system)) / volume
    return stress[VOIGT]


@compiled
def _strain_gradient(system: System) -> jax.Array:
    """Compute the derivative of the energy by the strain, (d, d), at no strain."""
    return from_mandel(strain_gradient(system, basis(system.dimension)))


def _is_split(potential: Potential) -> bool:
    """Return whether the energy is a sum over pairs and over atoms, so that each atom has one."""
    parts = getattr(potential, "parts", (potential,))
    return all(part.pairwise or isinstance(part, LocalPotential) for part in parts)


def _energies(system: System) -> jax.Array:
    """Compute the energy of each atom, (n,), whose sum is the energy of the system.

    It is half of the energy of its pairs, and e_i of potentials of an atom's surroundings.
    """
    box = system.box
    total = jnp.zeros(system.n, system.positions.dtype)
    for term in row_terms(system):
        halves = 0.5 * term.energy(pair_distances(system, term, system.positions, box))
        if term.j.ndim == 2:  # column i has the pairs of particle i
            total = total + jnp.sum(halves, axis=0)
        else:
            total = total.at[term.i].add(halves).at[term.j].add(halves)
    for part in parts_of_neighbors(system.potential):
        if isinstance(part, LocalPotential):
            total = total + atom_energies(system, part, system.positions, system.params, box)
    return total
