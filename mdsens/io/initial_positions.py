"""Where particles start: at random, on a lattice, or from a file of a few arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mdsens._util.errors import InputError
from mdsens.io.ase_structures import cell_of, coordinates_of, species_of
from mdsens.io.files import read_npz

__all__ = ["Start", "crystal", "from_file", "lattices", "pairs_within", "random"]

# Conventional cells: edges in units of the lattice constant, and the sites as fractions of them.
_CELLS: dict[str, tuple[list[float], list[list[float]]]] = {
    "square": ([1.0, 1.0], [[0, 0]]),
    "triangular": (
        [1.0, 3**0.5],
        [[0, 0], [0.5, 0.5]],
    ),  # the constant is the distance of nearest neighbors
    "sc": ([1.0, 1.0, 1.0], [[0, 0, 0]]),
    "bcc": ([1.0, 1.0, 1.0], [[0, 0, 0], [0.5, 0.5, 0.5]]),
    "fcc": ([1.0, 1.0, 1.0], [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]),
}


@dataclasses.dataclass(frozen=True)
class Start:
    """Positions before relaxing, and what came with them.

    Attributes:
      positions: (n, d), Cartesian, or fractions of a cell that is still to be chosen.
      cell: (d, d), columns the cell vectors; None where the positions say nothing about it.
      fractional: True for fractions.
      arrays: other arrays of the file, by name.
      file: where they came from, for messages.
      symbols: (n,) chemical symbols; None where the positions come without.
      species_names: the symbols of the species in ``arrays``.
    """

    positions: np.ndarray
    cell: np.ndarray | None = None
    fractional: bool = False
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    file: str = ""
    symbols: np.ndarray | None = None
    species_names: tuple[str, ...] = ()

    def array(self, name: str, wanted_by: str) -> np.ndarray:
        """An array of the file, or an error that lists those it has."""
        if name in self.arrays:
            return self.arrays[name]
        if not self.file:
            raise InputError(
                f"{wanted_by} asks for the array {name!r}, but the positions are no file: give"
                " numbers."
            )
        held = ", ".join(sorted(self.arrays)) or "none"
        raise InputError(
            f"{wanted_by} asks for the array {name!r}, which {self.file} does not hold: it has"
            f" {held}."
        )


def lattices(dimension: int) -> tuple[str, ...]:
    """The names of the lattices of a dimension."""
    return tuple(name for name, (edges, _) in _CELLS.items() if len(edges) == dimension)


def random(dimension: int, n: int, seed: int) -> Start:
    """Uniform in the cell, ``numpy.random.default_rng(seed).random((n, d))``."""
    return Start(np.random.default_rng(seed).random((n, dimension)), fractional=True)


def crystal(
    lattice: str,
    dimension: int,
    constant: float,
    repeats: np.ndarray,
    vacancies: np.ndarray,
    noise: float,
    seed: int,
) -> Start:
    """A lattice in a rectangular cell, some sites empty, the others displaced at random.

    Args:
      lattice: one of ``lattices(dimension)``.
      constant: the lattice constant; of the triangular lattice, the distance of nearest neighbors.
      repeats: (d,) conventional cells along each axis.
      vacancies: indices of the sites left empty.
      noise: standard deviation of each coordinate's Gaussian displacement.
      seed: of the displacements.
    """
    edges, basis = _CELLS[lattice]
    corners = np.stack(
        np.meshgrid(*[np.arange(k) for k in repeats], indexing="ij"), axis=-1
    ).reshape(-1, 1, dimension)
    sites = ((corners + np.asarray(basis, float)) * np.asarray(edges) * constant).reshape(
        -1, dimension
    )
    if len(vacancies) and (vacancies.min() < 0 or vacancies.max() >= len(sites)):
        raise InputError(
            f"positions.vacancies is {vacancies.tolist()}: name sites from 0 to {len(sites) - 1}."
        )
    if noise:
        sites = sites + noise * np.random.default_rng(seed).standard_normal(sites.shape)
    return Start(
        np.delete(sites, vacancies, axis=0), np.diag(np.asarray(edges) * constant * repeats)
    )


def pairs_within(positions: np.ndarray, cell: np.ndarray | None, length: float) -> np.ndarray:
    """(m, 2) pairs whose nearest images are nearer than ``length``, the smaller index first."""
    i, j = np.triu_indices(len(positions), 1)
    vectors = positions[i] - positions[j]
    if cell is not None:
        vectors = vectors - np.round(vectors @ np.linalg.inv(cell).T) @ cell.T
    near = np.linalg.norm(vectors, axis=1) < length
    return np.stack([i[near], j[near]], axis=1)


def from_file(path: Path, dimension: int, index: int) -> Start:
    """One frame of a .npz or an extended XYZ file; nothing in it is executed.

    Args:
      path: .npz with ``positions`` (n, d) or (frames, n, d), perhaps ``box`` (d, d) or (frames, d,
        d) with the cell vectors as columns, and other arrays, with a leading axis of frames where
        the positions have one; or .extxyz or .xyz, whose Lattice has the cell vectors as rows.
      dimension: 2 or 3; of a planar extended XYZ file, x and y are taken.
      index: the frame.
    """
    if not path.is_file():
        found = sorted(
            p.name for p in path.parent.glob("*") if p.suffix in (".npz", ".extxyz", ".xyz")
        )
        beside = f" (beside it: {', '.join(found)})" if found else ""
        raise InputError(f"positions.file {path} does not exist{beside}: correct the path.")
    if path.suffix == ".npz":
        return _npz(path, dimension, index)
    if path.suffix in (".extxyz", ".xyz"):
        return _extxyz(path, dimension, index)
    raise InputError(
        f"positions.file {path} is of no kind that is read: give .npz, .extxyz or .xyz."
    )


def _npz(path: Path, dimension: int, index: int) -> Start:
    arrays = read_npz(path)
    if "positions" not in arrays:
        raise InputError(
            f"{path} has no array 'positions' (it has {', '.join(sorted(arrays)) or 'none'}):"
            " add it."
        )
    positions = arrays["positions"]
    if positions.ndim not in (2, 3) or positions.shape[-1] != dimension or not _numeric(positions):
        raise InputError(
            f"{path}: positions have shape {positions.shape} and type {positions.dtype}: give (n,"
            f" {dimension}) or (frames, n, {dimension}) numbers."
        )
    if positions.ndim == 3:
        frames = positions.shape[0]
        _check_index(path, index, frames)
        arrays = {k: v[index] for k, v in arrays.items() if v.ndim and v.shape[0] == frames}
    else:
        _check_index(path, index, 1)
    cell = arrays.get("box")
    if cell is not None and (cell.shape != (dimension, dimension) or not _numeric(cell)):
        raise InputError(
            f"{path}: box has shape {cell.shape}: give ({dimension}, {dimension}), columns the"
            " vectors."
        )
    return Start(arrays["positions"].astype(float), cell, False, arrays, str(path))


def _numeric(array: np.ndarray) -> bool:
    return bool(np.issubdtype(array.dtype, np.number)) and not np.iscomplexobj(array)


def _check_index(path: Path, index: int, frames: int) -> None:
    if not 0 <= index < frames:
        raise InputError(
            f"positions.index is {index}, but {path} has {frames} frames: give 0 to {frames - 1}."
        )


def _extxyz(path: Path, dimension: int, index: int) -> Start:
    import ase.io

    _check_whole(path)
    try:
        frames: Any = ase.io.read(path, index=":", format="extxyz")
    except Exception as error:  # ASE's reader lets what the text provokes through
        raise InputError(
            f"{path} is no whole extended XYZ file ({error}): write or fetch it again."
        ) from error
    _check_index(path, index, len(frames))
    atoms = frames[index]
    kinds, names = species_of(atoms)
    arrays = dict(atoms.arrays) if kinds is None else {"species": np.asarray(kinds), **atoms.arrays}
    symbols, cell = np.array(atoms.get_chemical_symbols()), cell_of(atoms, dimension)
    return Start(coordinates_of(atoms, dimension), cell, False, arrays, str(path), symbols, names)


def _check_whole(path: Path) -> None:
    """Refuse a file that is cut short: ASE's reader takes half a number, or half a frame at times,
    without a word.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is no whole extended XYZ file ({error}): write or fetch it again."
        ) from error
    if not text.endswith("\n"):
        raise InputError(
            f"{path} is no whole extended XYZ file (its last line has no end): write or fetch it"
            " again."
        )
    lines, at = text.rstrip().split("\n"), 0
    while at < len(lines):
        first = lines[at].strip()
        if not first.isdecimal() or at + 2 + int(first) > len(lines):
            why = (
                f"line {at + 1} promises {first} particles"
                if first.isdecimal()
                else f"line {at + 1} is no number"
            )
            raise InputError(
                f"{path} is no whole extended XYZ file ({why}): write or fetch it again."
            )
        at += 2 + int(first)
