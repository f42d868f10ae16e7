"""Structures in ASE and extended XYZ. ASE's cell vectors are rows, ours are columns: transposed
here alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.validation import is_real, short
from mdsens.constraints import Constraint, Pinned, RigidBonds
from mdsens.io.files import replacing
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.batch import unstack
from mdsens.model.system import System

__all__ = [
    "cell_of",
    "coordinates_of",
    "from_ase",
    "numbered",
    "species_of",
    "to_ase",
    "write_extxyz",
]

SPECIES = "species_index"  # our integers; "species" is what extended XYZ calls the chemical symbols
FLAT = 1e-6  # of the spread of x and y: z may differ by this much in a planar structure


def from_ase(
    atoms: Any,
    potential: Any,
    params: Mapping[str, Any],
    species: Any = None,
    *,
    dimension: int = 3,
    constraints: Sequence[Constraint] = (),
) -> System:
    """A system with the positions, cell, species and constraints of an ASE ``Atoms``.

    ``FixAtoms`` and ``FixCartesian`` become pinned coordinates, under the name ``fixed``;
    ``FixBondLengths`` rigid bonds under the name ``fixed_bond``, with the parameter
    ``fixed_bond_length`` added to ``params``.

    Args:
      atoms: all three axes periodic, or none (open boundaries). Lengths are taken as they are:
        where they are Å, give the potential's lengths in Å and its energies in eV.
      potential: a potential of :mod:`mdsens.potentials`.
      params: its parameters, as in ``System.create``.
      species: which parameters an atom has: a dict that numbers the elements from 0, ``{"Ni": 0,
        "P": 1}``, or (n,) integers from 0. Where None, the atoms' array ``species_index`` if they
        have one, else their elements in the order in which they first appear, if there are two or
        more. ``print(system)`` shows which is which.
      dimension: 2 takes x and y of a planar structure: z must be the same for all, a third cell
        vector be along z, and its periodicity is not looked at.
      constraints: more of them, see :mod:`mdsens.constraints`.

    Raises:
      InputError: with the field, the value and the remedy.
    """
    positions, cell = coordinates_of(atoms, dimension), cell_of(atoms, dimension)
    kinds, names = species_of(atoms, species)
    dtype = jnp.result_type(float)
    own, lengths = _constraints_of(atoms, positions)
    box = None if cell is None else cell.astype(dtype)
    params = {**lengths, **params}
    found = (*own, *constraints)
    system = System.create(
        positions.astype(dtype), box, potential, params, kinds, constraints=found
    )
    return system.replace(species_names=names)


def _constraints_of(
    atoms: Any, positions: np.ndarray
) -> tuple[tuple[Constraint, ...], dict[str, Any]]:
    """What an ASE ``Atoms`` is constrained by, and the lengths of its rigid bonds."""
    from ase.constraints import FixAtoms, FixBondLengths, FixCartesian

    mask, found, lengths = np.zeros(positions.shape, bool), [], {}
    for c in atoms.constraints:
        match c:
            case FixAtoms():
                mask[c.index] = True
            case FixCartesian():
                mask[c.index] |= np.asarray(c.mask, bool)[: positions.shape[1]]
            case FixBondLengths() if not lengths:
                bonds = RigidBonds.between(c.pairs, name="fixed_bond")
                own = [atoms.get_distance(int(i), int(j), mic=True) for i, j in c.pairs]
                lengths[bonds.length] = np.asarray(
                    own if c.bondlengths is None else c.bondlengths, float
                )
                found.append(bonds)
            case _:
                raise InputError(
                    f"atoms have the constraint {type(c).__name__}, for which there is none here:"
                    " take it off, atoms.set_constraint(), and give one of mdsens.constraints."
                )
    if mask.any():
        found.insert(0, Pinned.coordinates(mask, name="fixed"))
    return tuple(found), lengths


def species_of(atoms: Any, species: Any = None) -> tuple[Any, tuple[str, ...]]:
    """The species (n,) of an ASE ``Atoms``, None where there is one, and their chemical symbols, as
    in ``from_ase``.

    There are none where nobody gave any: of atoms ``X``, and of the stand-ins of ``to_ase``.
    """
    symbols = np.array(atoms.get_chemical_symbols())
    if isinstance(species, Mapping) or (species is None and SPECIES not in atoms.arrays):
        kinds, names = numbered(symbols, species)
        if species is None and len(names) < 2:
            return None, () if names == ("X",) else names
        return kinds, names
    kinds = atoms.arrays[SPECIES] if species is None else species
    whole = np.asarray(kinds)
    if whole.shape != symbols.shape or not np.issubdtype(whole.dtype, np.integer):
        return kinds, ()  # System.create says what is wrong with them
    pairs = sorted({(int(k), str(symbol)) for k, symbol in zip(whole, symbols, strict=True)})
    stand_ins = np.array_equal(atoms.numbers, whole + 1)
    named = [k for k, _ in pairs] == list(range(len(pairs))) and not stand_ins
    return kinds, tuple(symbol for _, symbol in pairs) if named else ()


def numbered(
    symbols: Sequence[str] | np.ndarray, species: Any = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The species (n,) of particles by their symbols, and the symbols of species 0, 1, ….

    Args:
      symbols: (n,).
      species: a dict that numbers them from 0; None for the order in which they first appear.
    """
    met = list(dict.fromkeys(map(str, symbols)))
    numbers = dict(zip(met, range(len(met)), strict=True)) if species is None else dict(species)
    whole = all(
        is_real(np.asarray(k).dtype) and np.ndim(k) == 0 and int(k) == k for k in numbers.values()
    )
    if not whole or sorted(map(int, numbers.values())) != list(range(len(numbers))):
        raise InputError(
            f"species is {short(species)}: number its {len(numbers)} symbols from 0, each with its"
            " own."
        )
    missing = [symbol for symbol in met if symbol not in numbers]
    if missing:
        listed = ", ".join(f"{symbol!r}: {k}" for k, symbol in enumerate(met))
        raise InputError(
            f"species is {short(species)}, without {', '.join(missing)}: name all, such as"
            f" {{{listed}}}."
        )
    names = tuple(
        str(symbol) for symbol in sorted(numbers, key=lambda symbol: int(numbers[symbol]))
    )
    return np.array([int(numbers[str(symbol)]) for symbol in symbols], int), names


def coordinates_of(atoms: Any, dimension: int) -> np.ndarray:
    """Positions (n, d) of an ASE ``Atoms``; of a planar one, x and y."""
    if not hasattr(atoms, "get_positions") or not hasattr(atoms, "pbc"):
        raise InputError(f"atoms is a {type(atoms).__name__}: give an ase.Atoms.")
    if dimension not in (2, 3):
        raise InputError(f"dimension is {dimension!r}: give 2 or 3.")
    positions = np.array(atoms.get_positions(), float)
    if dimension == 3 or not len(positions):
        return positions
    spread = np.ptp(positions, axis=0)
    if spread[2] > FLAT * max(spread[0], spread[1]):
        raise InputError(
            f"atoms are {spread[2]:.3g} apart along z, so not planar: give dimension=3, or equal z."
        )
    return positions[:, :2]


def cell_of(atoms: Any, dimension: int) -> np.ndarray | None:
    """The cell (d, d) of an ASE ``Atoms``, columns the cell vectors; None where it is not periodic."""
    periodic = [bool(p) for p in atoms.pbc[:dimension]]
    if not any(periodic):
        return None
    if not all(periodic):
        hint = "make all axes periodic or none" + (
            ", or give dimension=2 for a planar structure"
            if periodic == [True, True, False]
            else ""
        )
        raise InputError(
            f"atoms.pbc is {[bool(p) for p in atoms.pbc]}, periodic along some axes only: {hint}."
        )
    rows = np.array(atoms.cell[:], float)
    if dimension == 2:
        if np.any(rows[:2, 2]) or np.any(rows[2, :2]):
            raise InputError(
                f"atoms.cell is {rows.tolist()}, not planar: keep two vectors in x, y and the third"
                " along z."
            )
        rows = rows[:2, :2]
    if not abs(np.linalg.det(rows)) > 0:
        raise InputError(
            f"atoms.cell is {rows.tolist()} without a volume, but periodic: set the cell, or"
            " pbc=False."
        )
    return rows.T


def to_ase(system: System, *, symbols: Sequence[str] | None = None) -> Any:
    """The system as an ASE ``Atoms``, in full precision.

    Args:
      system: not a batch; an Equilibrium's is ``eq.system``.
      symbols: a chemical symbol for each species, one in all without species. Where None, the
        system's own ``species_names``; without them, species 0, 1, … stand as H, He, …, and
        particles without species as X: stand-ins, for colors.

    Returns:
      Atoms with arrays ``species_index`` where there are species, ``diameter`` where the potential
      has one, and each parameter that has one value a particle under its own name; pinned
      coordinates as ``FixAtoms`` and ``FixCartesian``, rigid bonds as ``FixBondLengths``; walls
      have no counterpart. In 2-D z is 0 and not periodic, and the third cell vector, along z, is as
      long as the largest diameter (1 without diameters).
    """
    from ase import Atoms
    from ase.data import atomic_numbers

    if not isinstance(system, System):
        raise InputError(f"system is a {type(system).__name__}: give a System, such as eq.system.")
    if system.batch is not None:
        raise InputError(
            f"system is a batch of {system.batch}: convert its members, mdsens.unstack(system)."
        )
    n, dimension = system.n, system.dimension
    species = None if system.species is None else np.asarray(system.species)
    kinds = 1 if species is None else max(system.species_count, int(species.max(initial=0)) + 1)
    if (
        symbols is None
        and len(system.species_names) >= kinds
        and set(system.species_names) <= set(atomic_numbers)
    ):
        symbols = system.species_names[:kinds]
    if symbols is None:
        numbers = np.zeros(n, int) if species is None else species + 1
    else:
        unknown = [s for s in symbols if s not in atomic_numbers]
        if unknown or len(symbols) != kinds:
            raise InputError(
                f"symbols is {list(symbols)!r}: give {kinds} chemical symbol(s), one a species."
            )
        numbers = np.array([atomic_numbers[s] for s in symbols])[
            np.zeros(n, int) if species is None else species
        ]
    positions = np.zeros((n, 3))
    positions[:, :dimension] = np.asarray(system.positions)
    diameters = None if system.diameters is None else np.asarray(system.diameters, float)
    rows, periodic = np.zeros((3, 3)), [False] * 3
    if system.box is not None:
        rows[:dimension, :dimension] = np.asarray(system.box).T
        periodic[:dimension] = [True] * dimension
        if dimension == 2:
            rows[2, 2] = 1.0 if diameters is None else diameters.max(initial=0.0)
    atoms = Atoms(numbers=numbers, positions=positions, cell=rows, pbc=periodic)
    if species is not None:
        atoms.set_array(SPECIES, species.astype(int))
    if diameters is not None:
        atoms.set_array("diameter", diameters)
    for name, value in system.params.items():
        one_a_particle = value.shape == (n,) and not (
            species is not None and system.species_count == n
        )
        if one_a_particle and name not in atoms.arrays:
            atoms.set_array(name, np.asarray(value, float))
    atoms.set_constraint(_as_ase(system))
    return atoms


def _as_ase(system: System) -> list[Any]:
    """The constraints that ASE has, in its terms."""
    from ase.constraints import FixAtoms, FixBondLengths, FixCartesian

    found: list[Any] = []
    for c in system.constraints:
        if isinstance(c, Pinned):
            mask = np.asarray(c.mask)
            whole = mask.all(axis=1)
            if whole.any():
                found.append(FixAtoms(np.flatnonzero(whole)))
            kinds = {tuple(row) for row in mask[~whole & mask.any(axis=1)].tolist()}
            for kind in sorted(kinds):
                rows = np.flatnonzero((mask == kind).all(axis=1))
                found.append(FixCartesian(rows, mask=(*kind, False)[:3]))
        elif isinstance(c, RigidBonds):
            length = np.broadcast_to(np.asarray(system.params[c.length], float), len(c.bonds))
            found.append(FixBondLengths(np.asarray(c.bonds), bondlengths=np.array(length)))
    return found


def write_extxyz(path: str | Path, eq: Any, response: Any = None) -> None:
    """Write extended XYZ, which OVITO draws and ASE reads, with every digit of the numbers.

    ASE's own writer keeps 8 decimals; the numbers here are the shortest that read back as the same
    float64. What the format has no place for (the potential, the box's rule) is kept by ``save``
    alone.

    Args:
      path: a file that is made or replaced, whole or not at all.
      eq: a System or an Equilibrium; a batch makes one frame a member.
      response: a Displacement of ``jvp`` or ``response``, or an array (n, d), for the vector column
        ``response``; a Displacement also gives the column ``rattler``. Not with a batch.
    """
    system = getattr(eq, "system", eq)
    if not isinstance(system, System):
        raise InputError(f"at is a {type(eq).__name__}: give a System or an Equilibrium.")
    if system.batch is not None and response is not None:
        raise InputError(
            "response with a batch: write each member with its own response,"
            " mdsens.unstack(system)."
        )
    members = [system] if system.batch is None else unstack(system)
    text = "".join(_frame(member, response) for member in members)
    with replacing(path) as file:
        file.write(text.encode())


def _frame(system: System, response: Any) -> str:
    """One frame of extended XYZ."""
    atoms = to_ase(system)
    n, d = system.n, system.dimension
    columns: dict[str, np.ndarray] = {
        "species": np.array(atoms.get_chemical_symbols()),
        "pos": atoms.get_positions(),
    }
    if "diameter" in atoms.arrays:
        columns["radius"] = 0.5 * atoms.arrays["diameter"]
    columns |= {k: v for k, v in atoms.arrays.items() if k not in ("numbers", "positions")}
    if response is not None:
        value = getattr(response, "value", response)
        value = value.positions if isinstance(value, Unknowns) else value
        if not hasattr(value, "shape") or value.shape != (n, d):
            shape = getattr(value, "shape", type(value).__name__)
            raise InputError(
                f"response has shape {shape}: give one vector a particle, ({n}, {d}), as jvp does."
            )
        columns["response"] = np.zeros((n, 3))
        columns["response"][:, :d] = np.asarray(value)
        if hasattr(response, "rattlers"):
            columns["rattler"] = np.asarray(response.rattlers, bool)
    letters = {"U": "S", "f": "R", "i": "I", "b": "L"}
    properties = ":".join(
        f"{name}:{letters[v.dtype.kind]}:{1 if v.ndim == 1 else v.shape[1]}"
        for name, v in columns.items()
    )
    cell = " ".join(repr(float(x)) for x in atoms.cell[:].ravel())
    lattice = f'Lattice="{cell}" ' if any(atoms.pbc) else ""
    periodic = " ".join("T" if p else "F" for p in atoms.pbc)
    rows = zip(*[[_row(v) for v in column] for column in columns.values()], strict=True)
    head = f'{n}\n{lattice}Properties={properties} dimension={d} pbc="{periodic}"\n'
    return head + "".join(" ".join(row) + "\n" for row in rows)


def _row(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return " ".join(repr(float(x)) for x in value)
    if isinstance(value, (bool, np.bool_)):
        return "T" if value else "F"
    return repr(float(value)) if isinstance(value, np.floating) else str(value)
