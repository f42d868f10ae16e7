"""Reading of potentials from the files that LAMMPS and other codes share."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mdsens._util.errors import InputError, short
from mdsens.potentials.embedded_atom import eam
from mdsens.potentials.local import LocalPotential
from mdsens.potentials.stillinger_weber import SHAPES as SW_SHAPES
from mdsens.potentials.stillinger_weber import stillinger_weber
from mdsens.potentials.tersoff import SHAPES as TERSOFF_SHAPES
from mdsens.potentials.tersoff import tersoff

__all__ = ["read_potential"]

# Order of the numbers of an entry, after the three elements. LAMMPS has costheta0 for cos_theta0.
# ``tol`` is a tolerance with which LAMMPS may shorten the cutoff; it is not part of the potential.
SW_FIELDS = ("epsilon", "sigma", "a", "lambda", "gamma", "cos_theta0", "A", "B", "p", "q", "tol")
TERSOFF_FIELDS = (
    *("m", "gamma", "lambda3", "c", "d", "cos_theta0", "n"),
    *("beta", "lambda2", "B", "R", "D", "lambda1", "A"),
)

# Hartree in eV times Bohr radius in angstroms, by which the squared charges of a file .eam become
# r phi. LAMMPS rounds both so, and the potentials were fitted with these numbers; CODATA's product
# is 0.08 % larger.
CHARGE_UNIT = 27.2 * 0.529

Params = dict[str, np.ndarray]


def read_potential(path: str | Path, elements: Sequence[str]) -> tuple[LocalPotential, Params]:
    """Read a potential and its parameters from a file.

    The suffix of the file's name tells its format, those of LAMMPS: ``.sw`` Stillinger-Weber,
    ``.tersoff`` Tersoff, ``.eam`` tables of one element (DYNAMO funcfl), ``.eam.alloy`` of several
    (setfl), ``.eam.fs`` those with densities by pairs (Finnis-Sinclair).

        potential, params = ms.io.read_potential("CdTe.sw", ["Cd", "Te"])

    Args:
      path: path of the file.
      elements: the elements of species 0, 1, …, as the file names them; entries of other elements
        are left out.

    Returns:
      the potential, which knows its elements, so that ``from_ase`` numbers the atoms in the same
      order, and its parameters in the units of the file (eV and angstroms for the usual
      "metal" units): matrices (S, S) of pairs of species [i, j] and arrays (S, S, S) of triples
      with the center first; numbers of shape () for a single element. Tables have the knots along
      their last axis: ``embedding`` (S, Nrho), ``density`` (S, Nr) by the species of the neighbor
      or, from ``.eam.fs``, (S, S, Nr) by the species of the atom and of its neighbor, ``pair``
      (S, S, Nr), r phi; (N,) for a single element.

    A tolerance ``tol`` in a file .sw, with which LAMMPS shortens the cutoff, is ignored. Beyond its
    last knot a table is not used: the cutoff is the smaller one of the file's and of that distance.

    Raises:
      InputError: the file cannot be read, has another format, ends too early, has entries that
        contradict each other, or lacks an element or a triple of elements; Tersoff's m is not 1 or
        3, or not the same in all entries.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"`path` is {short(path)}: give the path of a potential file.")
    _check_elements(elements)
    name = os.fspath(path)
    for suffix, reader in _READERS.items():
        if name.lower().endswith(suffix):
            potential, params = reader(_Lines(name, _text(name)), tuple(elements))
            return dataclasses.replace(potential, elements=tuple(elements)), params
    raise InputError(
        f"{name} has no suffix of a known format: give a file whose name ends with one of"
        f" {', '.join(_READERS)}."
    )


def _check_elements(elements: Sequence[str]) -> None:
    """Raise InputError unless ``elements`` is a list of names."""
    one = isinstance(elements, str)
    if one or not isinstance(elements, Sequence) or not elements:
        raise InputError(
            f"`elements` is {short(elements)}: give the elements of species 0, 1, … in a list, such"
            " as ['Si']."
        )
    for element in elements:
        if not isinstance(element, str):
            raise InputError(
                f"`elements` contains {short(element)}: give names of elements, such as 'Si'."
            )


def _text(path: str) -> str:
    """Read a file as text; bytes that are no text become question marks."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): give the path of a potential file."
        ) from error


@dataclasses.dataclass
class _Lines:
    """The lines of a file, which are read from the first to the last.

    Attributes:
      path: path of the file, for messages.
      text: content of the file.
    """

    path: str
    text: str

    def __post_init__(self) -> None:
        # not splitlines(), which ends lines at form feeds, too
        self._rest = iter(self.text.split("\n"))

    def comment(self) -> None:
        """Skip a line that may contain anything."""
        next(self._rest, None)

    def words(self) -> Iterator[list[str]]:
        """Read the words of the lines that have any, without comments, one line after the other."""
        for line in self._rest:
            words = line.partition("#")[0].split()
            if words:
                yield words

    def header(self, what: str, types: Sequence[Callable[[str], Any]]) -> list[Any]:
        """Read the next line and convert its first words; more words may follow.

        Args:
          what: what the line contains, for the message of an error.
          types: int, float or str, for each word.
        """
        words = next(self.words(), [])
        try:
            return [convert(word) for convert, word in zip(types, words[: len(types)], strict=True)]
        except ValueError as error:
            raise InputError(
                f"{self.path} has {short(' '.join(words))} in place of {what}: write or download"
                " the file again."
            ) from error

    def table(self, what: str, count: int) -> np.ndarray:
        """Read ``count`` numbers, which fill whole lines.

        Args:
          what: name of the table, for the message of an error.
          count: how many numbers the table has.
        """
        words: list[str] = []
        while len(words) < count:
            line = next(self.words(), None)
            if line is None:
                break
            words += line
        if len(words) != count:
            raise InputError(
                f"{self.path}: {what} has {len(words)} numbers, and needs {count}: write or"
                " download the file again."
            )
        return self.numbers(what, words)

    def numbers(self, what: str, words: Sequence[str]) -> np.ndarray:
        """Convert words to finite numbers.

        Args:
          what: what the numbers are, for the message of an error.
          words: the words.
        """
        values = np.full(len(words), np.nan)
        for k, word in enumerate(words):
            try:
                values[k] = float(word)
            except ValueError:
                break  # NaN from here on
        if not np.isfinite(values).all():
            word = words[int(np.argmin(np.isfinite(values)))]
            raise InputError(
                f"{self.path}: {what} has {short(word)} where a number belongs: correct the file."
            )
        return values


def _read_sw(lines: _Lines, elements: tuple[str, ...]) -> tuple[LocalPotential, Params]:
    """Read a file for ``pair_style sw``."""
    table = _triples(lines, elements, len(SW_FIELDS))
    values = _of_species(table, SW_FIELDS, SW_SHAPES)
    return stillinger_weber(), values


def _read_tersoff(lines: _Lines, elements: tuple[str, ...]) -> tuple[LocalPotential, Params]:
    """Read a file for ``pair_style tersoff``.

    Raises:
      InputError: m is neither 1 nor 3, or is not the same in all entries.
    """
    table = _triples(lines, elements, len(TERSOFF_FIELDS))
    exponents = np.unique(table[..., TERSOFF_FIELDS.index("m")])
    if len(exponents) > 1 or exponents[0] not in (1.0, 3.0):
        found = ", ".join(f"{m:g}" for m in exponents)
        raise InputError(
            f"{lines.path}: m is {found} in the entries of {', '.join(elements)}: give entries with"
            " m = 3, or all with m = 1."
        )
    values = _of_species(table, TERSOFF_FIELDS, TERSOFF_SHAPES)
    return tersoff(int(exponents[0])), values


def _triples(lines: _Lines, elements: tuple[str, ...], count: int) -> np.ndarray:
    """Read the entries of all triples of the elements, (S, S, S, count) numbers.

    Raises:
      InputError: an entry is not complete, or is there twice; a triple has none.
    """
    entries: dict[tuple[str, ...], np.ndarray] = {}
    for triple, words in _entries(lines, count):
        values = lines.numbers(f"the entry {' '.join(triple)}", words)
        if triple in entries and set(triple) <= set(elements):
            raise InputError(
                f"{lines.path} has two entries {' '.join(triple)}: remove one of them."
            )
        entries[triple] = values
    present = {triple[0] for triple in entries}
    _check_present(lines.path, elements, sorted(present))
    triples = list(itertools.product(elements, repeat=3))
    for triple in triples:
        if triple not in entries:
            raise InputError(
                f"{lines.path} has no entry {' '.join(triple)} (center first): add this line, or"
                " leave out one of the elements."
            )
    sizes = (len(elements),) * 3
    return np.array([entries[triple] for triple in triples]).reshape(*sizes, count)


def _entries(lines: _Lines, count: int) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Read entries of three elements and ``count`` words each, which may fill several lines."""
    entry: list[str] = []
    for words in lines.words():
        entry += words
        if len(entry) >= 3 + count:
            _check_length(lines.path, entry, count)
            yield tuple(entry[:3]), entry[3:]
            entry = []
    if entry:
        _check_length(lines.path, entry, count)


def _check_length(path: str, entry: list[str], count: int) -> None:
    """Raise InputError unless an entry has three elements and ``count`` numbers."""
    if len(entry) != 3 + count:
        raise InputError(
            f"{path}: the entry {' '.join(entry[:3])} has {max(len(entry) - 3, 0)} numbers, and"
            f" needs {count}: correct the file."
        )


def _check_present(path: str, elements: Sequence[str], present: Sequence[str]) -> None:
    """Raise InputError if a file lacks an element."""
    for element in elements:
        if element not in present:
            raise InputError(
                f"{path} has no element {element!r}: give elements among"
                f" {', '.join(present) or 'none'}."
            )


def _of_species(table: np.ndarray, fields: Sequence[str], shapes: dict[str, str]) -> Params:
    """Take the parameters of pairs and triples from the entries of all triples.

    Args:
      table: (S, S, S, F) numbers.
      fields: names of the F numbers.
      shapes: for each parameter "pair", whose values are those of the entries [i, j, j], or
        "triple".

    Returns:
      (S, S) and (S, S, S) arrays by name; () where S = 1.
    """
    one = table.shape[0] == 1
    values = {}
    for name, shape in shapes.items():
        value = table[..., fields.index(name)]
        if one:
            value = value[0, 0, 0]
        elif shape == "pair":
            value = np.diagonal(value, axis1=1, axis2=2)
        values[name] = np.array(value)
    return values


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Numbers of knots and their distances, from the head of a file of tables."""

    rho_count: int
    rho_spacing: float
    r_count: int
    r_spacing: float
    cutoff: float

    def potential(self) -> LocalPotential:
        """Make the potential of tables with these knots."""
        end = (self.r_count - 1) * self.r_spacing
        return eam(self.rho_spacing, self.r_spacing, min(self.cutoff, end))


def _grid(lines: _Lines) -> _Grid:
    """Read the line of numbers of knots, their distances and the cutoff."""
    what = "the numbers and distances of knots, and the cutoff"
    grid = _Grid(*lines.header(what, (int, float, int, float, float)))
    if min(dataclasses.astuple(grid)) <= 0:
        raise InputError(f"{lines.path}: {what} are {grid}: give positive numbers.")
    return grid


def _read_funcfl(lines: _Lines, elements: tuple[str, ...]) -> tuple[LocalPotential, Params]:
    """Read a file for ``pair_style eam``, of one element: F(rho), charges Z(r), and f(r).

    r phi of the pair is Z^2 in units of a Hartree times a Bohr radius.
    """
    import ase.data  # on demand: it takes long to import

    lines.comment()
    number, _ = lines.header("the atomic number and the mass", (int, float))
    # ase.data has X for 0, which is no element
    known = 0 < number < len(ase.data.chemical_symbols)
    present = [ase.data.chemical_symbols[number]] if known else []
    _check_present(lines.path, elements, present)
    if len(elements) > 1:
        raise InputError(
            f"`elements` is {short(list(elements))}, and {lines.path} has one element: give"
            f" {present}."
        )
    grid = _grid(lines)
    embedding = lines.table("the table of F", grid.rho_count)
    charges = lines.table("the table of Z", grid.r_count)
    density = lines.table("the table of the density", grid.r_count)
    params = {"embedding": embedding, "density": density, "pair": CHARGE_UNIT * charges**2}
    return grid.potential(), params


def _read_setfl(lines: _Lines, elements: tuple[str, ...]) -> tuple[LocalPotential, Params]:
    """Read a file for ``pair_style eam/alloy``, with a density by the element of the neighbor."""
    return _read_alloy(lines, elements, density_of_pairs=False)


def _read_fs(lines: _Lines, elements: tuple[str, ...]) -> tuple[LocalPotential, Params]:
    """Read a file for ``pair_style eam/fs``, with a density by both elements."""
    return _read_alloy(lines, elements, density_of_pairs=True)


def _read_alloy(
    lines: _Lines, elements: tuple[str, ...], density_of_pairs: bool
) -> tuple[LocalPotential, Params]:
    """Read a file of tables of several elements.

    For each element of the file F(rho) and f(r), or with ``density_of_pairs`` one f(r) for each
    element of the atom at which the density is; then r phi of all pairs.
    """
    for _ in range(3):
        lines.comment()
    names = _names(lines)
    _check_present(lines.path, elements, names)
    grid = _grid(lines)
    embedding = []
    density = []
    for name in names:
        lines.header(f"the atomic number of {name}", (int,))
        embedding.append(lines.table(f"the table of F of {name}", grid.rho_count))
        count = len(names) if density_of_pairs else 1
        tables = [
            lines.table(f"the table {k + 1} of the density of {name}", grid.r_count)
            for k in range(count)
        ]
        density.append(tables)
    order = [names.index(element) for element in elements]
    # in the file the atom that makes the density comes first, here the one at which it is
    by_pair = np.swapaxes(np.array(density), 0, 1)
    chosen = by_pair[np.ix_(order, order)] if density_of_pairs else by_pair[0, order]
    params = {
        "embedding": np.array(embedding)[order],
        "density": chosen,
        "pair": _pair_tables(lines, names, grid.r_count)[np.ix_(order, order)],
    }
    if len(elements) == 1:
        params = {name: value.reshape(-1) for name, value in params.items()}
    return grid.potential(), params


def _names(lines: _Lines) -> list[str]:
    """Read the line of the number of elements and their names."""
    words = next(lines.words(), [])
    if not words or words[0] != str(len(words) - 1):
        raise InputError(
            f"{lines.path} has {short(' '.join(words))} in place of the number of elements and"
            " their names: write or download the file again."
        )
    return words[1:]


def _pair_tables(lines: _Lines, names: Sequence[str], count: int) -> np.ndarray:
    """Read r phi of all pairs of elements, (E, E, count); the file has each pair once."""
    tables = np.zeros((len(names), len(names), count))
    # the rows of a lower triangle
    for later, name in enumerate(names):
        for earlier in range(later + 1):
            what = f"the table of r phi of {names[earlier]} and {name}"
            tables[earlier, later] = lines.table(what, count)
            tables[later, earlier] = tables[earlier, later]
    return tables


_READERS: dict[str, Callable[[_Lines, tuple[str, ...]], tuple[LocalPotential, Params]]] = {
    ".sw": _read_sw,
    ".tersoff": _read_tersoff,
    ".eam": _read_funcfl,
    ".eam.alloy": _read_setfl,
    ".eam.fs": _read_fs,
}
