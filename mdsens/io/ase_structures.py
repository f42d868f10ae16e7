"""Conversion of systems to and from ASE, and writing of extended XYZ files.

The cell vectors are the rows of a matrix in ASE, and the columns in mdsens; only this module
transposes one into the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.pytree import arrays_of
from mdsens._util.validation import is_real, short
from mdsens.constraints import Constraint, Pinned, RigidBonds
from mdsens.io.files import replacing
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.batch import unstack
from mdsens.model.box import with_normals
from mdsens.model.system import System

if TYPE_CHECKING:
    from ase import Atoms
    from numpy.typing import ArrayLike

    from mdsens.potentials.base import Potential

__all__ = [
    "cell_of",
    "coordinates_of",
    "from_ase",
    "masses_of",
    "numbered",
    "species_of",
    "tags_of",
    "to_ase",
    "write_extxyz",
]

# Name of ASE's array with the species as integers from 0. Extended XYZ calls the chemical symbols
# "species".
SPECIES = "species_index"
# A structure is planar if z varies by no more than this fraction of the spread of x and y.
FLAT = 1e-6


def from_ase(
    atoms: Any,
    potential: Potential,
    params: Mapping[str, Any],
    species: Mapping[str, int] | ArrayLike | None = None,
    *,
    elements: Sequence[str] | None = None,
    dimension: int = 3,
    constraints: Sequence[Constraint] = (),
) -> System:
    """Make a system of an ASE ``Atoms``: its positions, cell, species, masses, tags, constraints.

    The system is periodic along the axes of ``atoms.pbc``: along all, none (open boundaries), or
    some of them, as a slab or a wire is. A cell vector along which it is not is left out, and may
    be zero. ``FixAtoms`` and ``FixCartesian``, and ``FixedPlane`` and ``FixedLine`` along x, y or
    z, become pinned coordinates with the name ``fixed``; ``FixBondLengths`` become rigid bonds with
    the name ``fixed_bond``, whose lengths are added to ``params`` as the parameter
    ``fixed_bond_length``. The masses are those of the atoms, in atomic mass units: where they were
    not set, those of the elements.

    Args:
      atoms: the atoms. Lengths are not converted: if they are in Å, give the potential's lengths in
        Å and its energies in eV.
      potential: a potential of :mod:`mdsens.potentials`.
      params: the potential's parameters, as in ``System.create``.
      species: the species of each atom: a dict that numbers the elements from 0, ``{"Ni": 0, "P":
        1}``, or (n,) integers from 0. None takes the atoms' array ``species_index`` if they have
        this array; else the elements of a potential by ``read_potential``; else, if there are two
        or more elements, numbers the elements in the order in which the elements first appear.
        ``print(system)`` shows the number of each element.
      elements: in place of ``species``, the chemical symbols of species 0, 1, …, such as ``["Cd",
        "Te"]``: the order in which the potential numbers them.
      dimension: 2 takes x and y of a planar structure: z must be the same for all atoms, and a
        third cell vector must be along z; the periodicity along z is ignored.
      constraints: further constraints, see :mod:`mdsens.constraints`.

    Raises:
      InputError: an input is invalid; the message gives the field, the value and the remedy.
    """
    positions = coordinates_of(atoms, dimension)
    cell, periodic = cell_of(atoms, dimension)
    if elements is None and species is None and SPECIES not in atoms.arrays:
        elements = _elements_of(potential, atoms)
        if elements is not None and len(elements) == 1:
            elements = None  # a single element needs no species
    numbering = species if elements is None else _numbering(elements, species, atoms)
    kinds, names = species_of(atoms, numbering)
    dtype = jnp.result_type(float)  # jax's precision: float32 unless x64 is enabled
    constraints_of_atoms, lengths = _constraints_of(atoms, positions)
    system = System.create(
        positions.astype(dtype),
        None if cell is None else cell.astype(dtype),
        potential,
        {**lengths, **params},  # a bond length in params takes precedence
        kinds,
        constraints=(*constraints_of_atoms, *constraints),
        periodic=periodic,
        masses=masses_of(atoms, names),
        tags=tags_of(atoms),
    )
    return system.replace(species_names=names)


def _elements_of(potential: Potential, atoms: Atoms) -> tuple[str, ...] | None:
    """Return the elements of the species of a potential that was read from a file.

    The result is None for other potentials, and where a file has names that are no elements, such
    as ``Si(B)``, or one element several times.

    Raises:
      InputError: the atoms have other elements, or none of the first.
    """
    from ase.data import atomic_numbers  # on demand: it takes long to import

    for part in getattr(potential, "parts", (potential,)):
        names = getattr(part, "elements", ())
        if names and len(set(names)) == len(names) and set(names) <= set(atomic_numbers):
            present = dict.fromkeys(atoms.get_chemical_symbols())
            if names[0] not in present or not set(present) <= set(names):
                raise InputError(
                    f"the potential was read for {', '.join(names)}, and the atoms are"
                    f" {', '.join(present)}: read it for the elements that are there, or number"
                    " them by species=."
                )
            return names
    return None


def _numbering(elements: Sequence[str], species: object, atoms: Atoms) -> dict[str, int]:
    """Return the dict from chemical symbols to numbers of a user's list of elements.

    Raises:
      InputError: ``elements`` is no list of symbols, ``species`` is given as well, or the atoms
        have none of the first element.
    """
    if species is not None:
        raise InputError(
            f"species is {short(species)} and elements {short(elements)}: give one of the two."
        )
    _check_elements(elements)
    # System.create takes numbers that start above 0 for a mistake
    if elements[0] not in atoms.get_chemical_symbols():
        raise InputError(
            f"elements is {short(elements)}, and no atom is {elements[0]}: begin with an element"
            " that is there, in the parameters of the potential as well."
        )
    return {element: k for k, element in enumerate(elements)}


def _check_elements(elements: Sequence[str]) -> None:
    """Raise InputError unless ``elements`` is a list of chemical symbols, each of them once."""
    listed = not isinstance(elements, str) and isinstance(elements, Sequence)
    if not listed or not elements or not all(isinstance(e, str) for e in elements):
        raise InputError(
            f"elements is {short(elements)}: give the chemical symbols of species 0, 1, … in a"
            " list, such as ['Si']."
        )
    twice = [e for e in elements if list(elements).count(e) > 1]
    if twice:
        raise InputError(f"elements names {twice[0]} twice: give each element once.")


def masses_of(atoms: Atoms, names: Sequence[str]) -> np.ndarray | None:
    """Return the masses (n,) of an ASE ``Atoms``, in atomic mass units.

    Where the atoms have none of their own, they are those of the elements; None where it is not
    known which elements the atoms are, without ``names``, the chemical symbols of the species.
    """
    if atoms.has("masses") or names:
        return np.array(atoms.get_masses(), float)
    return None


def tags_of(atoms: Atoms) -> np.ndarray | None:
    """Return the tags (n,) of an ASE ``Atoms``; None where it has none."""
    return np.array(atoms.get_tags()) if atoms.has("tags") else None


def _constraints_of(
    atoms: Atoms, positions: np.ndarray
) -> tuple[tuple[Constraint, ...], dict[str, np.ndarray]]:
    """Convert the constraints of an ASE ``Atoms`` to those of mdsens.

    Return the constraints, and the lengths of the rigid bonds by the name of their parameter.
    """
    from ase.constraints import FixBondLengths

    mask = np.zeros(positions.shape, bool)
    constraints: list[Constraint] = []
    pairs: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    for c in atoms.constraints:
        if isinstance(c, FixBondLengths):
            pairs.append(np.asarray(c.pairs, int).reshape(-1, 2))
            lengths.append(_bond_lengths(atoms, c))
        else:
            axes = _fixed_axes(c)  # first, since others may have no `index`
            mask[c.index] |= axes[: positions.shape[1]]
    if mask.any():
        constraints.append(Pinned.coordinates(mask, name="fixed"))
    if not pairs:
        return tuple(constraints), {}
    bonds = RigidBonds.between(np.concatenate(pairs), name="fixed_bond")
    return (*constraints, bonds), {bonds.length: np.concatenate(lengths)}


def _bond_lengths(atoms: Atoms, constraint: Any) -> np.ndarray:
    """Return the lengths (m,) that a ``FixBondLengths`` of ASE prescribes."""
    if constraint.bondlengths is not None:
        return np.broadcast_to(np.asarray(constraint.bondlengths, float), len(constraint.pairs))
    # without lengths, ASE keeps the present distances
    return np.array([atoms.get_distance(int(i), int(j), mic=True) for i, j in constraint.pairs])


def _fixed_axes(constraint: Any) -> np.ndarray:
    """Return which of x, y and z a constraint of ASE fixes for its atoms, (3,) booleans.

    Raises:
      InputError: the constraint is none that fixes coordinates, or fixes them along an oblique
        direction.
    """
    from ase.constraints import FixAtoms, FixCartesian, FixedLine, FixedPlane

    kind = type(constraint).__name__
    match constraint:
        case FixAtoms():
            return np.ones(3, bool)
        case FixCartesian():
            return np.asarray(constraint.mask, bool)
        case FixedPlane() | FixedLine():
            # a unit vector, which is an axis if one entry alone is not zero but for round-off
            along = np.abs(constraint.dir) > 1e-12
            if np.count_nonzero(along) == 1:
                return along if kind == "FixedPlane" else ~along
            raise InputError(
                f"atoms have a {kind} along {short(np.asarray(constraint.dir).tolist())}, and"
                " mdsens pins coordinates along x, y and z alone: rotate the atoms, or remove it by"
                " atoms.set_constraint()."
            )
    raise InputError(
        f"atoms have the constraint {kind}, which mdsens lacks: remove all by"
        " atoms.set_constraint(), and give constraints=[...] of mdsens.constraints."
    )


def species_of(
    atoms: Atoms, species: Mapping[str, int] | ArrayLike | None = None
) -> tuple[ArrayLike | None, tuple[str, ...]]:
    """Return the species of an ASE ``Atoms`` and their chemical symbols.

    Args:
      atoms: the atoms.
      species: a dict that numbers the elements from 0, or (n,) integers from 0; None takes the
        atoms' array ``species_index``, or numbers the elements in the order of appearance.

    Returns:
      the species (n,), None for atoms of a single element; and the chemical symbols of species 0,
      1, …. The symbols are empty for atoms ``X``, and where ``to_ase`` has chosen the symbols as
      substitutes because the system had none.
    """
    symbols = np.array(atoms.get_chemical_symbols())
    if isinstance(species, Mapping) or (species is None and SPECIES not in atoms.arrays):
        kinds, names = numbered(symbols, species)
        if species is None and len(names) < 2:
            return None, () if names == ("X",) else names
        return kinds, names
    kinds = atoms.arrays[SPECIES] if species is None else species
    indices = np.asarray(kinds)
    if indices.shape != symbols.shape or not np.issubdtype(indices.dtype, np.integer):
        return kinds, ()  # System.create raises, and names what is wrong with them
    return kinds, _find_species_symbols(indices, symbols, atoms.numbers)


def _find_species_symbols(
    species: np.ndarray, symbols: np.ndarray, atomic_numbers: np.ndarray
) -> tuple[str, ...]:
    """Return the chemical symbols of species 0, 1, …; empty unless each species has one symbol.

    The result is also empty where ``to_ase`` had chosen the symbols as substitutes, because the
    system had none.

    Args:
      species: (n,) species of each particle.
      symbols: (n,) chemical symbol of each particle.
      atomic_numbers: (n,) atomic number of each particle.
    """
    # to_ase gives species k without a symbol the atomic number k + 1
    stand_ins = np.array_equal(atomic_numbers, species + 1)
    pairs = sorted({(int(k), str(symbol)) for k, symbol in zip(species, symbols, strict=True)})
    # one symbol for each species: none is missing and none has two symbols
    named = [k for k, _ in pairs] == list(range(len(pairs))) and not stand_ins
    return tuple(symbol for _, symbol in pairs) if named else ()


def numbered(
    symbols: Sequence[str] | np.ndarray, species: Mapping[str, int] | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Number the species of n particles by their chemical symbols.

    Args:
      symbols: (n,) chemical symbols.
      species: a dict that numbers the symbols from 0; None numbers the symbols in the order in
        which they first appear.

    Returns:
      the species (n,) of the particles, and the symbols of species 0, 1, ….

    Raises:
      InputError: the numbers are not 0, 1, …, or a symbol has no number.
    """
    distinct = list(dict.fromkeys(map(str, symbols)))  # in the order of appearance
    if species is None:
        numbers = dict(zip(distinct, range(len(distinct)), strict=True))
    else:
        _check_numbering(species, distinct)
        numbers = dict(species)
    names = tuple(
        str(symbol) for symbol in sorted(numbers, key=lambda symbol: int(numbers[symbol]))
    )
    return np.array([int(numbers[str(symbol)]) for symbol in symbols], int), names


def _check_numbering(species: Mapping[str, int], symbols: Sequence[str]) -> None:
    """Raise InputError unless a dict numbers all chemical symbols as species 0, 1, ….

    Args:
      species: the dict from symbols to numbers; it may have more symbols than needed.
      symbols: the symbols that need a number, each once.
    """
    whole = all(
        is_real(np.asarray(k).dtype) and np.ndim(k) == 0 and int(k) == k for k in species.values()
    )
    if not whole or sorted(map(int, species.values())) != list(range(len(species))):
        raise InputError(
            f"species is {short(species)}: number its {len(species)} symbols from 0, each with its"
            " own number."
        )
    missing = [symbol for symbol in symbols if symbol not in species]
    if missing:
        listed = ", ".join(f"{symbol!r}: {k}" for k, symbol in enumerate(symbols))
        raise InputError(
            f"species is {short(species)}, without {', '.join(missing)}: name all, such as"
            f" {{{listed}}}."
        )


def coordinates_of(atoms: Atoms, dimension: int) -> np.ndarray:
    """Return the positions (n, d) of an ASE ``Atoms``; in 2-D, x and y of a planar structure."""
    # by attributes and not by class, so that ASE need not be imported for it
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
            f"atoms differ by {spread[2]:.3g} in z, so not planar: give dimension=3, or equal z."
        )
    return positions[:, :2]


def cell_of(atoms: Atoms, dimension: int) -> tuple[np.ndarray | None, tuple[bool, ...]]:
    """Return the cell (d, d) of an ASE ``Atoms``, and for each cell vector if it is periodic.

    The cell vectors are columns. Those along which the atoms are not periodic are replaced by unit
    vectors normal to the others. The cell is None for atoms that are not periodic at all.
    """
    periodic = tuple(bool(p) for p in atoms.pbc[:dimension])
    if not any(periodic):
        return None, periodic
    rows = np.array(atoms.cell.array, float)
    if dimension == 2:
        if np.any(rows[:2, 2]) or np.any(rows[2, :2]):
            raise InputError(
                f"atoms.cell is {rows.tolist()}, not planar: give two vectors in the x-y plane and"
                " the third along z."
            )
        rows = rows[:2, :2]
    sides = rows[np.asarray(periodic)]
    if not np.linalg.det(sides @ sides.T) > 0:  # "not above", so that NaN is refused too
        raise InputError(
            f"atoms.cell is {rows.tolist()}, without a volume along the periodic axes of atoms.pbc"
            f" = {list(periodic)}: set atoms.cell, or atoms.pbc = False."
        )
    return (rows.T if all(periodic) else with_normals(rows.T, periodic)), periodic


def to_ase(system: System, *, symbols: Sequence[str] | None = None) -> Any:
    """Convert a system to an ASE ``Atoms``, in full precision.

    Args:
      system: a system that is not a batch, such as ``eq.system`` of an Equilibrium.
      symbols: a chemical symbol for each species; a single one for a system without species. None
        takes the system's ``species_names``. If the system has no such names, species 0, 1, …
        become H, He, …, and particles without species become X: substitutes by which viewers choose
        a color for each species.

    Returns:
      Atoms with the arrays ``species_index`` if there are species, ``diameter`` if the potential
      has diameters, and each parameter with one value a particle under its own name; with the tags
      of the system, and with its masses where they are not those of the elements. A cell vector
      along which the system is not periodic is zero. Pinned coordinates become ``FixAtoms`` and
      ``FixCartesian``, rigid bonds ``FixBondLengths``; walls have no counterpart. In 2-D, z is 0
      and not periodic, and the third cell vector of a periodic system, along z, is as long as the
      largest diameter (1 without diameters).

    Raises:
      InputError: ``system`` is not a System or is a batch, a symbol is unknown, or their number is
        not that of the species.
    """
    from ase import Atoms

    if not isinstance(system, System):
        raise InputError(f"system is a {type(system).__name__}: give a System, such as eq.system.")
    if system.batch is not None:
        raise InputError(
            f"system is a batch of {system.batch}: convert its members, mdsens.unstack(system)."
        )
    numbers = _choose_atomic_numbers(system, symbols)
    positions = np.zeros((system.n, 3))
    positions[:, : system.dimension] = np.asarray(system.positions)
    diameters = None if system.diameters is None else np.asarray(system.diameters, float)
    rows, periodic = _cell_to_ase(system, diameters)
    atoms = Atoms(numbers=numbers, positions=positions, cell=rows, pbc=periodic)
    _set_arrays(atoms, system, diameters)
    atoms.set_constraint(_constraints_to_ase(system))
    return atoms


def _choose_atomic_numbers(system: System, symbols: Sequence[str] | None) -> np.ndarray:
    """Return the atomic number of each particle, (n,), by which ASE knows its element.

    ``symbols`` has a chemical symbol for each species. None takes the names of the system's
    species, if these are chemical symbols; if not, the numbers are substitutes: species 0, 1, …
    become H, He, …, and particles without species become X.
    """
    from ase.data import atomic_numbers

    if system.species is None:
        species = np.zeros(system.n, int)
        kinds = 1
        stand_ins = species  # 0 is X
    else:
        species = np.asarray(system.species)
        kinds = max(system.species_count, int(species.max(initial=0)) + 1)
        stand_ins = species + 1  # 1 is H
    names = system.species_names  # which need not be chemical symbols
    if symbols is None and len(names) >= kinds and set(names) <= set(atomic_numbers):
        symbols = names[:kinds]
    if symbols is None:
        return stand_ins
    if not set(symbols) <= set(atomic_numbers) or len(symbols) != kinds:
        raise InputError(
            f"symbols is {list(symbols)!r}: give {kinds} chemical symbol(s), one per species."
        )
    return np.array([atomic_numbers[s] for s in symbols])[species]


def _cell_to_ase(system: System, diameters: np.ndarray | None) -> tuple[np.ndarray, list[bool]]:
    """Return the cell of a system for ASE, with the cell vectors as rows, and its periodic axes.

    ``diameters`` are those of the particles; in 2-D, the third cell vector is as long as the
    largest of them.
    """
    rows = np.zeros((3, 3))
    periodic = [False] * 3
    if system.box is None:
        return rows, periodic
    d = system.dimension
    along = np.asarray(system.periodic)
    # the unit vectors of the open axes only complete the matrix
    rows[:d, :d] = np.where(along[:, None], np.asarray(system.box).T, 0.0)
    periodic[:d] = along.tolist()
    if d == 2:
        rows[2, 2] = 1.0 if diameters is None else diameters.max(initial=0.0)
    return rows, periodic


def _set_arrays(atoms: Atoms, system: System, diameters: np.ndarray | None) -> None:
    """Give an ASE ``Atoms`` the species, masses, tags, diameters and parameters as arrays."""
    if system.species is not None:
        atoms.set_array(SPECIES, np.asarray(system.species).astype(int))
    if system.tags is not None:
        atoms.set_tags(np.asarray(system.tags).astype(int))
    _set_masses(atoms, system)
    if diameters is not None:
        atoms.set_array("diameter", diameters)
    for name, value in arrays_of(system.params).items():
        # with as many species as particles, (n,) values are one for each species
        one_a_species = system.species is not None and system.species_count == system.n
        one_a_particle = value.shape == (system.n,) and not one_a_species
        if one_a_particle and name not in atoms.arrays:
            atoms.set_array(name, np.asarray(value, float))


def _set_masses(atoms: Any, system: System) -> None:
    """Give an ASE ``Atoms`` the masses of a system, unless it has them by its elements."""
    if system.masses is None:
        return
    masses = np.asarray(system.masses)
    if not np.array_equal(masses, atoms.get_masses().astype(masses.dtype)):
        atoms.set_masses(masses.astype(float))


def _constraints_to_ase(system: System) -> list[Any]:
    """Convert a system's pinned coordinates and rigid bonds to constraints of ASE.

    Other constraints have no counterpart in ASE and are left out.
    """
    from ase.constraints import FixAtoms, FixBondLengths, FixCartesian

    constraints: list[Any] = []
    for c in system.constraints:
        if isinstance(c, Pinned):
            mask = np.asarray(c.mask)
            whole = mask.all(axis=1)
            if whole.any():
                constraints.append(FixAtoms(np.flatnonzero(whole)))
            # a FixCartesian has one mask for all its atoms, so one for each combination of axes
            kinds = {tuple(row) for row in mask[~whole & mask.any(axis=1)].tolist()}
            for kind in sorted(kinds):
                rows = np.flatnonzero((mask == kind).all(axis=1))
                # in 2-D, z is added as free; in 3-D the fourth entry is cut off
                constraints.append(FixCartesian(rows, mask=(*kind, False)[:3]))
        elif isinstance(c, RigidBonds):
            length = np.broadcast_to(np.asarray(system.params[c.length], float), len(c.bonds))
            constraints.append(FixBondLengths(np.asarray(c.bonds), bondlengths=np.array(length)))
    return constraints


def write_extxyz(path: str | Path, eq: object, response: object = None) -> None:
    """Write a configuration as extended XYZ, which OVITO draws and ASE reads, in full precision.

    ASE's own writer keeps 8 decimals; here each number is written as the shortest text that reads
    back as the same float64. The format has no place for the potential, nor for a rule by which the
    box follows the parameters: only ``save`` stores these.

    Args:
      path: the file to write or replace; it is never left half-written.
      eq: a System or an Equilibrium; a batch is written as one frame for each member.
      response: a vector for each particle, written as the column ``response``: a Displacement of
        ``jvp`` or ``response``, which also gives the column ``rattler``, or an array (n, d). Not
        possible with a batch.

    Raises:
      InputError: an argument has another type or shape, a response is given with a batch, or the
        path cannot be written.
    """
    system = getattr(eq, "system", eq)
    if not isinstance(system, System):
        raise InputError(f"eq is a {type(eq).__name__}: give a System or an Equilibrium.")
    if system.batch is not None and response is not None:
        raise InputError(
            "response is given, but eq is a batch: write each member of mdsens.unstack(system) with"
            " its own response."
        )
    members = [system] if system.batch is None else unstack(system)
    text = "".join(_frame(member, response) for member in members)
    with replacing(path) as file:
        file.write(text.encode())


def _frame(system: System, response: object) -> str:
    """Format a configuration as extended XYZ: atom count, properties, and a row for each atom."""
    atoms = to_ase(system)
    columns: dict[str, np.ndarray] = {
        "species": np.array(atoms.get_chemical_symbols()),
        "pos": atoms.get_positions(),
    }
    if "diameter" in atoms.arrays:
        columns["radius"] = 0.5 * atoms.arrays["diameter"]  # the size of spheres in OVITO
    columns |= {k: v for k, v in atoms.arrays.items() if k not in ("numbers", "positions")}
    if response is not None:
        columns |= _make_response_columns(system, response)
    rows = zip(*[[_cell_text(v) for v in column] for column in columns.values()], strict=True)
    head = f"{system.n}\n{_format_comment_line(atoms, columns, system.dimension)}\n"
    return head + "".join(" ".join(row) + "\n" for row in rows)


def _make_response_columns(system: System, response: object) -> dict[str, np.ndarray]:
    """Return the columns of a response: a vector (n, 3), and the rattlers if they are known."""
    n = system.n
    d = system.dimension
    value: Any = getattr(response, "value", response)
    value = value.positions if isinstance(value, Unknowns) else value
    if not hasattr(value, "shape") or value.shape != (n, d):
        shape = getattr(value, "shape", type(value).__name__)
        raise InputError(f"response has shape {shape}: give one vector per particle, ({n}, {d}).")
    vectors = np.zeros((n, 3))
    vectors[:, :d] = np.asarray(value)
    columns = {"response": vectors}
    rattlers = getattr(response, "rattlers", None)
    if rattlers is not None:
        columns["rattler"] = np.asarray(rattlers, bool)
    return columns


def _format_comment_line(atoms: Atoms, columns: Mapping[str, np.ndarray], dimension: int) -> str:
    """Format the second line of extended XYZ: cell, columns, dimension and periodic axes."""
    # numpy's kind of a dtype -> extended XYZ's letter: string, real, integer, logical
    letters = {"U": "S", "f": "R", "i": "I", "b": "L"}
    properties = ":".join(
        f"{name}:{letters[v.dtype.kind]}:{1 if v.ndim == 1 else v.shape[1]}"
        for name, v in columns.items()
    )
    cell = " ".join(repr(float(x)) for x in atoms.cell.array.ravel())
    lattice = f'Lattice="{cell}" ' if any(atoms.pbc) else ""
    periodic = " ".join("T" if p else "F" for p in atoms.pbc)
    return f'{lattice}Properties={properties} dimension={dimension} pbc="{periodic}"'


def _cell_text(value: np.ndarray | np.generic) -> str:
    """Format a particle's value for extended XYZ: a vector, truth value, number or string.

    The ``repr`` of a float is the shortest text that reads back as the same float64.
    """
    if isinstance(value, np.ndarray):
        return " ".join(repr(float(x)) for x in value)
    if isinstance(value, (bool, np.bool_)):
        return "T" if value else "F"
    return repr(float(value)) if isinstance(value, np.floating) else str(value)
