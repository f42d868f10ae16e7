"""Initial positions of particles: at random, on a lattice, or from a file."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.lattice import heights
from mdsens.io.ase_structures import cell_of, coordinates_of, masses_of, species_of, tags_of
from mdsens.io.files import read_npz
from mdsens.model.box import with_normals

__all__ = ["Start", "crystal", "from_file", "lattices", "pairs_within", "random", "site_kinds"]


@dataclasses.dataclass(frozen=True)
class _Cell:
    """A conventional cell with right angles.

    Attributes:
      edges: lengths of its edges, in units of the lattice constant.
      sites: the sites, as fractions of the edges.
      kinds: for each site the number of its kind, from 0; empty if all sites are alike.
    """

    edges: list[float]
    sites: list[list[float]]
    kinds: list[int] = dataclasses.field(default_factory=list)

    @property
    def kind_count(self) -> int:
        """How many kinds of sites there are."""
        return max(self.kinds, default=0) + 1

    @property
    def kind_of_sites(self) -> np.ndarray:
        """The number of the kind of each site, from 0."""
        return np.array(self.kinds or [0] * len(self.sites))


_CUBE = [1.0, 1.0, 1.0]
_FCC = [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
# the sites of fcc and, a quarter of the diagonal away from them, those of another fcc
_DIAMOND = [*_FCC, *([x + 0.25 for x in site] for site in _FCC)]
# c / a of hcp where all twelve neighbors of an atom are equally near
_IDEAL_RATIO = (8 / 3) ** 0.5

_CELLS: dict[str, _Cell] = {
    "square": _Cell([1.0, 1.0], [[0, 0]]),
    # the lattice constant is the distance of nearest neighbors
    "triangular": _Cell([1.0, 3**0.5], [[0, 0], [0.5, 0.5]]),
    "sc": _Cell(_CUBE, [[0, 0, 0]]),
    "bcc": _Cell(_CUBE, [[0, 0, 0], [0.5, 0.5, 0.5]]),
    "fcc": _Cell(_CUBE, _FCC),
    # the lattice constant is the distance of neighbors in a close-packed layer, normal to z
    "hcp": _Cell(
        [1.0, 3**0.5, _IDEAL_RATIO],
        [[0, 0, 0], [0.5, 0.5, 0], [0.5, 1 / 6, 0.5], [0, 2 / 3, 0.5]],
    ),
    "diamond": _Cell(_CUBE, _DIAMOND),
    "zincblende": _Cell(_CUBE, _DIAMOND, [0, 0, 0, 0, 1, 1, 1, 1]),
    # Ni3Al: the majority at the centers of the faces, the minority at the corners
    "L1_2": _Cell(_CUBE, _FCC, [1, 0, 0, 0]),
}


@dataclasses.dataclass(frozen=True)
class Start:
    """Positions of particles before a relaxation, with the other contents of their file, if any.

    Attributes:
      positions: (n, d), Cartesian, or fractional coordinates in a cell that is chosen later.
      cell: (d, d), columns the cell vectors; None where no cell comes with the positions.
      fractional: whether the positions are fractional coordinates.
      arrays: other arrays of the file, by name.
      file: path of the file, for messages; empty where the positions are from no file.
      symbols: (n,) chemical symbols; None where none come with the positions.
      species_names: chemical symbols of species 0, 1, …; empty where none are known.
      lattice_kinds: how many kinds of sites the lattice has; 1 where there is none.
      periodic: for each cell vector whether the file's structure is periodic along it; empty where
        it is along all of them.
      masses: (n,) masses; None where none come with the positions.
      tags: (n,) integers that mark particles; None where none come with the positions.
    """

    positions: np.ndarray
    cell: np.ndarray | None = None
    fractional: bool = False
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    file: str = ""
    symbols: np.ndarray | None = None
    species_names: tuple[str, ...] = ()
    lattice_kinds: int = 1
    periodic: tuple[bool, ...] = ()
    masses: np.ndarray | None = None
    tags: np.ndarray | None = None

    def array(self, name: str, wanted_by: str) -> np.ndarray:
        """Return an array of the file from which the initial positions come.

        Args:
          name: name of the array.
          wanted_by: the TOML key that asks for the array, for messages.

        Raises:
          InputError: the file has no such array (the message lists the arrays of the file), or the
            positions are not from a file.
        """
        if name in self.arrays:
            return self.arrays[name]
        if not self.file:
            raise InputError(
                f"{wanted_by} asks for the array {name!r}, but the positions are not from a file:"
                " give numbers."
            )
        names = ", ".join(sorted(self.arrays)) or "none"
        raise InputError(
            f"{wanted_by} asks for the array {name!r}, which {self.file} does not hold: it has"
            f" {names}."
        )


def lattices(dimension: int) -> tuple[str, ...]:
    """Return the names of the lattices in two or three dimensions, such as fcc."""
    return tuple(name for name, cell in _CELLS.items() if len(cell.edges) == dimension)


def site_kinds(lattice: str) -> int:
    """Return how many kinds of sites a lattice has: 1, or 2 of a compound such as zincblende."""
    return _CELLS[lattice].kind_count


def random(dimension: int, n: int, seed: int) -> Start:
    """Draw n uniform random positions, as fractional coordinates.

    With d the dimension, the positions are ``numpy.random.default_rng(seed).random((n, d))``.
    """
    return Start(np.random.default_rng(seed).random((n, dimension)), fractional=True)


def crystal(
    lattice: str,
    dimension: int,
    constant: float,
    repeats: np.ndarray,
    vacancies: np.ndarray,
    noise: float,
    seed: int,
    ratio: float | None = None,
    elements: Sequence[str] = (),
) -> Start:
    """Place particles on the sites of a lattice in a rectangular cell.

    Some sites may be left empty, and the particles may be displaced at random. The array
    ``species`` of the result has the number of the kind of each particle's site.

    Args:
      lattice: name of the lattice: square or triangular in 2-D; sc, bcc, fcc, hcp, diamond,
        zincblende or L1_2 in 3-D.
      constant: the lattice constant; for the triangular lattice and hcp, the distance of nearest
        neighbors.
      dimension: 2 or 3.
      repeats: (d,) numbers of conventional cells along each axis.
      vacancies: indices of the sites that are left empty.
      noise: standard deviation of the Gaussian displacement of each coordinate.
      seed: seed of the random displacements.
      ratio: c / a of hcp; None for the ideal ratio.
      elements: chemical symbols of the kinds of sites, which give the masses; empty where none are
        known.
    """
    shape = _CELLS[lattice]
    edges = np.array(shape.edges)
    if ratio is not None:
        edges[-1] = ratio
    # corners of the conventional cells (cells, 1, d) + sites in a cell (sites, d)
    grid = np.meshgrid(*[np.arange(k) for k in repeats], indexing="ij")
    corners = np.stack(grid, axis=-1).reshape(-1, 1, dimension)
    sites = (corners + np.asarray(shape.sites, float)) * edges * constant
    sites = sites.reshape(-1, dimension)
    if len(vacancies) and (vacancies.min() < 0 or vacancies.max() >= len(sites)):
        raise InputError(
            f"positions.vacancies is {vacancies.tolist()}: give sites from 0 to {len(sites) - 1}."
        )
    if noise:
        # drawn for the empty sites too: a vacancy leaves the displacements of the others unchanged
        sites = sites + noise * np.random.default_rng(seed).standard_normal(sites.shape)
    kinds = np.delete(np.tile(shape.kind_of_sites, len(corners)), vacancies)
    return Start(
        np.delete(sites, vacancies, axis=0),
        np.diag(edges * constant * repeats),
        arrays={"species": kinds},
        symbols=np.array(elements)[kinds] if elements else None,
        masses=_masses_of(elements)[kinds] if elements else None,
        species_names=tuple(elements),
        lattice_kinds=shape.kind_count,
    )


def _masses_of(elements: Sequence[str]) -> np.ndarray:
    """Return the masses of elements in atomic mass units.

    Raises:
      InputError: a symbol is that of no element.
    """
    from ase.data import atomic_masses, atomic_numbers  # on demand: it takes long to import

    for element in elements:
        if not atomic_numbers.get(element, 0):  # 0 is X, which is no element
            raise InputError(f"positions.elements contains {element!r}: give chemical symbols.")
    return np.array([atomic_masses[atomic_numbers[element]] for element in elements])


def pairs_within(
    positions: np.ndarray,
    cell: np.ndarray | None,
    length: float,
    periodic: tuple[bool, ...] = (),
) -> np.ndarray:
    """Find the pairs of particles that are closer than ``length``, also across periodic boundaries.

    Return their indices (m, 2), the smaller index first.

    Args:
      positions: (n, d).
      cell: (d, d), columns the cell vectors; None for open boundaries.
      length: largest distance of a pair, above 0.
      periodic: for each cell vector whether the system is periodic along it; empty where it is
        along all of them.
    """
    # Imported here, so that importing this package does not import scipy.spatial.
    from scipy.spatial import KDTree

    n, d = positions.shape
    images = positions
    if cell is not None:
        along = np.asarray(periodic or (True,))
        cell = cell if all(along) else with_normals(cell, periodic)
        fractions = positions @ np.linalg.inv(cell).T
        positions = (fractions - np.where(along, np.floor(fractions), 0.0)) @ cell.T
        # As many copies of the cell to each side as a sphere of this radius can reach into, in
        # cells of any shape.
        reach = np.where(along, np.ceil(length / heights(cell)), 0.0).astype(int)
        steps = itertools.product(*(range(-k, k + 1) for k in reach))
        images = (positions[None] + (np.array(list(steps)) @ cell.T)[:, None]).reshape(-1, d)
    near = KDTree(positions).sparse_distance_matrix(KDTree(images), length, output_type="ndarray")
    i = near["i"]
    # the images are n rows for each copy of the cell, in the order of the particles
    j = near["j"] % n
    # i < j leaves out a particle's own images, and one of (i, j) and (j, i); a distance of just
    # ``length`` counts for KDTree, but not here
    kept = (i < j) & (near["v"] < length)
    # in a small cell a pair may be near through several images
    pairs = np.unique(np.stack([i[kept], j[kept]], axis=1), axis=0)
    return pairs.reshape(-1, 2)


def from_file(path: Path, dimension: int, index: int) -> Start:
    """Read the initial positions from one frame of a .npz or extended XYZ file.

    Nothing in the file is executed.

    Args:
      path: a .npz with the array ``positions`` (n, d) or (frames, n, d). The array ``box``, (d, d)
        or (frames, d, d) with the cell vectors as columns, is optional, and so are other arrays; if
        the positions have a leading axis of frames, arrays without this axis are ignored. Or an
        .extxyz or .xyz, whose Lattice has the cell vectors as rows.
      dimension: 2 or 3; 2 takes x and y of a planar extended XYZ file.
      index: index of the frame, from 0.

    Raises:
      InputError: the file does not exist, is damaged or is of another kind, or has no such frame.
    """
    if not path.is_file():
        readable = [p for p in path.parent.glob("*") if p.suffix in (".npz", ".extxyz", ".xyz")]
        names = ", ".join(sorted(p.name for p in readable))
        beside = f" (beside it: {names})" if names else ""
        raise InputError(f"positions.file {path} does not exist{beside}: correct the path.")
    if path.suffix == ".npz":
        return _read_npz_frame(path, dimension, index)
    if path.suffix in (".extxyz", ".xyz"):
        return _read_extxyz_frame(path, dimension, index)
    raise InputError(
        f"positions.file {path} has an unknown suffix: give a .npz, .extxyz or .xyz file."
    )


def _read_npz_frame(path: Path, dimension: int, index: int) -> Start:
    """Read the positions and other arrays of one frame of a .npz file; ``index`` counts from 0."""
    arrays = read_npz(path)
    if "positions" not in arrays:
        raise InputError(
            f"{path} has no array 'positions' (it has {', '.join(sorted(arrays)) or 'none'}):"
            " add it."
        )
    positions = arrays["positions"]
    if positions.ndim not in (2, 3) or positions.shape[-1] != dimension or not _is_real(positions):
        raise InputError(
            f"{path}: positions have shape {positions.shape} and type {positions.dtype}: give (n,"
            f" {dimension}) or (frames, n, {dimension}) numbers."
        )
    arrays = _select_frame(path, arrays, index)
    cell = arrays.get("box")
    if cell is not None and (cell.shape != (dimension, dimension) or not _is_real(cell)):
        raise InputError(
            f"{path}: box has shape {cell.shape}: give ({dimension}, {dimension}), with the"
            " cell vectors as columns."
        )
    return Start(arrays["positions"].astype(float), cell, arrays=arrays, file=str(path))


def _select_frame(
    path: Path, arrays: Mapping[str, np.ndarray], index: int
) -> Mapping[str, np.ndarray]:
    """Return the arrays of one frame of a .npz file; raise InputError if there is no such frame.

    The file has several frames if its positions have a leading axis of frames.
    """
    positions = arrays["positions"]
    if positions.ndim == 2:
        _check_index(path, index, 1)
        return arrays
    frames = positions.shape[0]
    _check_index(path, index, frames)
    # arrays without the axis of frames belong to no single frame and are left out
    return {k: v[index] for k, v in arrays.items() if v.ndim and v.shape[0] == frames}


def _is_real(array: np.ndarray) -> bool:
    """Return whether an array contains integers or real numbers."""
    return bool(np.issubdtype(array.dtype, np.number)) and not np.iscomplexobj(array)


def _check_index(path: Path, index: int, frames: int) -> None:
    """Raise InputError unless ``index`` is below ``frames``, the number of frames in the file."""
    if not 0 <= index < frames:
        raise InputError(
            f"positions.index is {index}, but {path} has {frames} frames: give 0 to {frames - 1}."
        )


def _read_extxyz_frame(path: Path, dimension: int, index: int) -> Start:
    """Read the positions and other arrays of one frame of an extended XYZ file, by ASE's reader."""
    import ase.io

    _check_extxyz_whole(path)
    try:
        frames: Any = ase.io.read(path, index=":", format="extxyz")
    except Exception as error:  # ASE's reader lets through any exception that the text provokes
        raise InputError(
            f"{path} is no whole extended XYZ file ({error}): write or download it again."
        ) from error
    _check_index(path, index, len(frames))
    atoms = frames[index]
    kinds, names = species_of(atoms)
    # an array "species" in the file takes precedence over species from the chemical symbols
    arrays = dict(atoms.arrays) if kinds is None else {"species": np.asarray(kinds), **atoms.arrays}
    cell, periodic = cell_of(atoms, dimension)
    return Start(
        coordinates_of(atoms, dimension),
        cell,
        arrays=arrays,
        file=str(path),
        symbols=np.array(atoms.get_chemical_symbols()),
        species_names=names,
        periodic=periodic,
        masses=masses_of(atoms, names),
        tags=tags_of(atoms),
    )


def _check_extxyz_whole(path: Path) -> None:
    """Raise InputError if an extended XYZ file is cut short.

    ASE's reader accepts without an error a number that is cut off, and in some files a frame that
    is cut off.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is no whole extended XYZ file ({error}): write or download it again."
        ) from error
    if not text.endswith("\n"):
        raise InputError(
            f"{path} is no whole extended XYZ file (its last line has no end): write or"
            " download it again."
        )
    lines = text.rstrip().split("\n")
    k = 0  # index of the first line of a frame: the number of particles, then a line of properties
    while k < len(lines):
        count = lines[k].strip()
        reason = ""
        if not count.isdecimal():
            reason = f"line {k + 1} is no number"
        elif k + 2 + int(count) > len(lines):
            reason = f"line {k + 1} promises {count} particles"
        if reason:
            raise InputError(
                f"{path} is no whole extended XYZ file ({reason}): write or download it again."
            )
        k += 2 + int(count)
