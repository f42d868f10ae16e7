"""Reading of systems from TOML files, with a check of every key.

systems/README.md documents every key, value and unit.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.lattice import BALL_OF_UNIT_DIAMETER
from mdsens._util.suggestions import similar_name
from mdsens._util.validation import is_integer
from mdsens.io import initial_positions
from mdsens.io.ase_structures import numbered
from mdsens.io.potential_toml import read_potential_tables
from mdsens.io.toml_table import TomlTable, array_of, short
from mdsens.model.box import PackingFraction
from mdsens.model.system import System
from mdsens.relaxation.methods import Fire

__all__ = ["bundled_systems", "load_system", "relaxation_options", "systems_folder"]

KEYS = (
    "description",
    "units",
    "seed",
    "dimension",
    "count",
    "species",
    "positions",
    "box",
    "potential",
    "parameters",
    "relaxation",
)
# Tables into which a keyword of load_system is merged key by key. A keyword with the key named here
# (the kind) replaces the table instead: the keys of another kind would not fit it.
MERGED = {"positions": "kind", "potential": "kind", "parameters": None, "relaxation": None}
# keys of tables whose values are paths
PATHS = {"positions": "file", "potential": "path"}


def systems_folder() -> Path:
    """Return the folder of the bundled systems and their data.

    The folder is inside the installed package, and beside the package in a checkout.
    """
    package = Path(__file__).resolve().parents[1]
    inside = package / "_systems"
    return inside if inside.is_dir() else package.parent / "systems"


def bundled_systems() -> dict[str, str]:
    """Return names and one-line descriptions of the systems that come with mdsens."""
    return {
        path.stem: str(read(path).get("description", "")).strip()
        for path in sorted(systems_folder().glob("*.toml"))
    }


def read(path: Path) -> dict[str, Any]:
    """Read the content of a TOML file as a dict; keys and values are not checked."""
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is no whole TOML file ({error}): correct or download it again."
        ) from error


def locate(name: str | Path) -> Path:
    """Return the path of a system's TOML file, given the name of a bundled system or a path."""
    if not isinstance(name, (str, Path)) or not str(name):
        raise InputError(
            f"the system is {name!r}: give a bundled name or the path of a .toml file."
        )
    bundled = systems_folder() / f"{name}.toml"
    # compared, so that a path such as ../name is not taken for the name of a bundled system
    if str(name) == bundled.stem and bundled.is_file():
        return bundled
    path = Path(name)
    if path.is_file():
        return path
    names = [p.stem for p in sorted(systems_folder().glob("*.toml"))]
    similar = similar_name(path.stem, names)
    hint = "give one of these or the path of a .toml file."
    if similar:
        hint = f"did you mean {similar!r}?"
    raise InputError(
        f"there is no file and no bundled system {str(name)!r} (bundled: {', '.join(names)}):"
        f" {hint}"
    )


def merged(content: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Replace keys of a system file's content by keywords of ``load_system``.

    The tables positions, potential, parameters and relaxation are merged key by key instead; but
    positions or potential given with a ``kind`` replace the whole table.
    """
    result = dict(content)
    for key, value in fields.items():
        table = result.get(key)
        result[key] = value
        if key in MERGED and isinstance(table, Mapping) and isinstance(value, Mapping):
            if MERGED[key] not in value:
                result[key] = {**table, **value}
    return result


def _read_and_merge(path: Path, fields: Mapping[str, Any]) -> TomlTable:
    """Read a system's TOML file, replace keys by ``fields``, and check the names of the keys."""
    fields = {key: _located(value, PATHS.get(key), path.parent) for key, value in fields.items()}
    return TomlTable.of("", merged(read(path), fields), KEYS)


def _located(table: Any, key: str | None, folder: Path) -> Any:
    """Return a keyword of ``load_system`` with a path that is valid from the system's folder.

    A path in the TOML file is relative to that file; one in a keyword may also be relative to the
    working directory.

    Args:
      table: the value of the keyword.
      key: the key of a path, if the keyword is a table that may have one; else None.
      folder: the folder of the TOML file.
    """
    if key is None or not isinstance(table, Mapping):
        return table
    if not isinstance(table.get(key), (str, Path)):
        return table
    file = Path(table[key])
    if not (folder / file).is_file() and file.is_file():
        file = file.resolve()
    return {**table, key: str(file)}


def load_system(name: str | Path, /, **fields: Any) -> System:
    """Build a system from its description in a TOML file.

    Args:
      name: a bundled system (``bundled_systems()`` lists them) or the path of a .toml file.
      fields: top-level keys of the format that replace those of the file: ``seed=3``,
        ``count=1024``, ``box={"packing_fraction": 0.9}``. The tables ``parameters``, ``positions``,
        ``potential`` and ``relaxation`` are merged key by key, ``parameters={"sigma": [1.0,
        0.7]}``; but ``positions`` or ``potential`` given with a ``kind`` replace the whole table.

    Returns:
      the system with its initial positions, not relaxed, in the units of the file.

    Raises:
      InputError: bad content; the message gives the key, its value and the remedy.

    Example:
      >>> import mdsens as ms
      >>> ms.enable_x64()
      >>> ms.load_system("seed_packing_2d", seed=3).n
      128
    """
    path = locate(name)
    try:
        return build(_read_and_merge(path, fields), path.parent)
    except InputError as error:
        # the message names the file, once
        named = str(error).startswith((path.name, str(path)))
        raise InputError(str(error) if named else f"{name}: {error}") from error


def relaxation_options(name: str | Path, /, **fields: Any) -> dict[str, Any]:
    """Return the table ``[relaxation]`` of a system's file as keywords of ``minimize``.

    The result is empty for a file without such a table.

    >>> options = ms.io.relaxation_options("fcc_argon")  # doctest: +SKIP
    >>> ms.minimize(ms.load_system("fcc_argon"), **options)  # doctest: +SKIP

    Args:
      name, fields: as in ``load_system``.
    """
    path = locate(name)
    try:
        return _read_relaxation(_read_and_merge(path, fields))
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _read_relaxation(top: TomlTable) -> dict[str, Any]:
    """Read the table ``relaxation`` of a system's file as keywords of ``minimize``."""
    fire = ("dt_start", "dt_max", "max_step")
    table = TomlTable.of("relaxation", top.raw("relaxation", {}), ("tolerance", "max_steps", *fire))
    options: dict[str, Any] = {}
    if table.has("tolerance"):
        options["tolerance"] = table.number("tolerance")
    if table.has("max_steps"):
        options["max_steps"] = table.integer("max_steps", least=1)
    fire_options = {key: table.number(key) for key in fire if table.has(key)}
    if fire_options:
        options["method"] = dataclasses.replace(Fire(), **fire_options)
    return options


def build(top: TomlTable, folder: Path) -> System:
    """Build a system from the top-level table ``top`` of its TOML file.

    Relative paths of files in the table start from ``folder``.
    """
    # These three are not part of the system, but a mistake in them is reported here as well.
    top.text("description")
    top.text("units", "")
    _read_relaxation(top)
    seed = top.integer("seed", 0)
    dimension = top.integer("dimension")
    if dimension not in (2, 3):
        raise InputError(f"dimension is {dimension}: give 2 or 3.")
    start = _read_positions(top, dimension, seed, folder)
    n = len(start.positions)
    _check_count(top, n)
    species, names = _read_species(top, n, start)
    values = top.raw("parameters", {})
    if not isinstance(values, Mapping):
        raise InputError(f"parameters is {short(values)}: give a table of names and values.")

    def parameter(name: str, size: int) -> np.ndarray:
        # a stream of random numbers for each parameter, the same whatever the order of the keys
        # from 1: by [seed, 0] numpy draws the same numbers as by seed alone, those of the positions
        stream = 1 + sorted(values).index(name)
        rng = np.random.default_rng([seed, stream])
        return _read_parameter(name, values[name], size, rng, start)

    # The diameters come first: a box of given packing fraction depends on them, and bonds within a
    # length depend on the box.
    sigma = parameter("sigma", n) if "sigma" in values else None
    box, cell = _read_box(top, dimension, n, species, sigma, start)
    positions = start.positions
    if start.fractional:
        if cell is None:
            raise InputError(
                "box is 'open', but random positions need a cell to fill: give box.lengths."
            )
        positions = positions @ cell.T
    placed = dataclasses.replace(
        start,
        positions=positions,
        fractional=False,
        cell=cell,
        periodic=_read_periodic(top, dimension, start),
    )
    tables = read_potential_tables(top.raw("potential"), placed, folder)
    if not tables.params:
        top.raw("parameters")  # reports the missing key
    names = tables.check_elements(species, names)
    params = {**tables.params}
    params |= {name: parameter(name, tables.bond_counts.get(name, n)) for name in values}
    dtype = jnp.result_type(float)  # jax's precision: float32 unless x64 is enabled
    return System.create(
        np.asarray(positions, dtype),
        box,
        tables.potential,
        params,
        species,
        periodic=placed.periodic,
        masses=start.masses,
        tags=start.tags,
    ).replace(species_names=names)


def _check_count(top: TomlTable, n: int) -> None:
    """Raise InputError if the key ``count`` is not the number of particles n of the positions."""
    count = top.integer("count", least=1) if top.has("count") else n
    if count != n:
        raise InputError(
            f"count is {count}, but positions give {n} particles: remove count, or change it to"
            f" {n}."
        )


def _read_positions(
    top: TomlTable, dimension: int, seed: int, folder: Path
) -> initial_positions.Start:
    """Read the initial positions of the particles from the table ``positions`` of a system's file.

    The key ``kind`` of the table (random, list, lattice, file) decides which other keys are valid.
    """
    table = TomlTable("positions", _table_of(top, "positions"))
    kind = table.text("kind", choices=("random", "list", "lattice", "file"))
    if kind == "random":
        TomlTable.of("positions", table.values, ("kind",))
        return initial_positions.random(dimension, top.integer("count", least=1), seed)
    if kind == "list":
        TomlTable.of("positions", table.values, ("kind", "values"))
        return initial_positions.Start(table.array("values", (None, dimension)))
    if kind == "lattice":
        return _read_lattice(table, dimension, seed)
    TomlTable.of("positions", table.values, ("kind", "file", "index"))
    return initial_positions.from_file(
        folder / table.text("file"), dimension, table.integer("index", 0)
    )


def _read_lattice(table: TomlTable, dimension: int, seed: int) -> initial_positions.Start:
    """Read the sites of a crystal from the table ``positions`` of kind lattice."""
    keys = ("lattice", "constant", "ratio", "cells", "elements", "vacancies", "noise")
    TomlTable.of("positions", table.values, ("kind", *keys))
    lattice = table.text("lattice", choices=initial_positions.lattices(dimension))
    cells = table.raw("cells")
    cells = [cells] * dimension if is_integer(cells) else cells  # one for all axes
    repeats = array_of("positions.cells", cells, (dimension,), integers=True)
    if repeats.min() < 1:
        raise InputError(f"positions.cells is {short(cells)}: give integers from 1.")
    if table.has("ratio") and lattice != "hcp":
        raise InputError(
            f"positions.ratio is c / a of hcp, and positions.lattice is {lattice!r}: remove it."
        )
    vacancies = np.zeros(0, int)
    if table.raw("vacancies", []):
        vacancies = table.array("vacancies", (None,), integers=True)
    return initial_positions.crystal(
        lattice,
        dimension,
        constant=table.number("constant"),
        repeats=repeats,
        vacancies=vacancies,
        noise=table.number("noise", 0.0, positive=False),
        seed=seed,
        ratio=table.number("ratio") if table.has("ratio") else None,
        elements=_read_elements(table, lattice),
    )


def _read_elements(table: TomlTable, lattice: str) -> tuple[str, ...]:
    """Read the chemical symbols of the kinds of sites of a lattice; empty where none are there."""
    elements = table.raw("elements", [])
    kinds = initial_positions.site_kinds(lattice)
    texts = isinstance(elements, list) and all(isinstance(name, str) for name in elements)
    distinct = texts and len(set(elements)) == len(elements)
    if not distinct or (table.has("elements") and len(elements) != kinds):
        raise InputError(
            f"positions.elements is {short(elements)}: give {kinds} chemical symbol(s) in a list,"
            f" one for each kind of site of {lattice}."
        )
    return tuple(elements)


def _table_of(top: TomlTable, key: str) -> Mapping[str, Any]:
    """Return the value of a key of a TOML file; raise InputError if the value is not a table."""
    value = top.raw(key)
    if not isinstance(value, Mapping):
        raise InputError(f"{key} is {short(value)}: give a table.")
    return value


def _read_species(
    top: TomlTable, n: int, start: initial_positions.Start
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Read the species (n,) of the particles, and the chemical symbols of the species where known.

    The key ``species`` of the system file gives counts or fractions, with the particles of species
    0 first. Where the positions are from a file, the species are an array of this file, or follow
    from the chemical symbols in the file and a number for each symbol.
    """
    value = top.raw("species", None)
    if value is None:
        _check_alike(start)
        # the name of the single element, if there is but one
        return None, start.species_names if len(start.species_names) == 1 else ()
    if value == "positions":
        species = array_of("species", start.array("species", "species"), (n,), integers=True)
        return species, start.species_names
    if isinstance(value, Mapping):
        if start.symbols is None:
            raise InputError(
                f"species is {short(value)}, but the positions come without chemical symbols: give"
                " counts."
            )
        return numbered(start.symbols, value)
    if not isinstance(value, (list, tuple, np.ndarray)) or len(value) == 0:
        raise InputError(
            f'species is {value!r}: give counts, fractions, "positions", or symbols with their'
            " numbers."
        )
    counts = _count_species(value, n)
    return np.repeat(np.arange(len(counts)), counts), ()


def _check_alike(start: initial_positions.Start) -> None:
    """Raise InputError if a system has no species, but its lattice has sites of several kinds."""
    if start.lattice_kinds > 1:
        raise InputError(
            f"species is missing, and the lattice has sites of {start.lattice_kinds} kinds: give"
            ' species = "positions".'
        )


def _count_species(value: Sequence[float] | np.ndarray, n: int) -> np.ndarray:
    """Return the numbers of particles of species 0, 1, … from counts or fractions.

    ``value`` has the counts, which are integers, or the fractions; ``n`` is the number of particles
    in all.
    """
    amounts = array_of("species", value, (None,))
    if amounts.min() < 0:
        raise InputError(f"species is {short(value)}: every count or fraction must be 0 or more.")
    # [1, 2] are counts and [1.0, 2.0] are fractions, so by the type of the entries
    if all(is_integer(v) for v in value):
        if amounts.sum() != n:
            raise InputError(
                f"species is {short(value)}, {int(amounts.sum())} in all: give counts of {n}"
                " particles in all."
            )
        return amounts.astype(int)
    if abs(amounts.sum() - 1.0) > 1e-9:  # round-off of written fractions such as 1/3
        raise InputError(
            f"species is {short(value)}, {amounts.sum():g} in all: give fractions that sum to 1."
        )
    # rounding the cumulative sums keeps the total at n
    return np.diff(np.rint(np.cumsum([0.0, *amounts]) * n).astype(int))


def _read_parameter(
    name: str, value: object, size: int, rng: np.random.Generator, start: initial_positions.Start
) -> np.ndarray:
    """Read the values of a parameter of the potential from the table ``parameters``.

    Args:
      name: name of the parameter.
      value: a number, numbers, ``{array = "name in the file"}``, or ``{uniform = [low, high]}``.
      size: number of values to draw from the uniform distribution, one for each particle or bond.
      rng: generator of the random values.
      start: the initial positions, with the arrays of their file.
    """
    label = f"parameters.{name}"
    if not isinstance(value, Mapping):
        return array_of(label, value, None)
    table = TomlTable.of(label, value, ("array", "uniform"))
    if len(value) != 1:
        raise InputError(f"{label} is {short(value)}: give either `array` or `uniform`.")
    if table.has("array"):
        return array_of(label, start.array(table.text("array"), label), None)
    low, high = table.array("uniform", (2,))
    if low > high:
        raise InputError(
            f"{label}.uniform is {short(value['uniform'])}: give [low, high] with low below high."
        )
    return rng.uniform(low, high, size)


def _diameters(
    sigma: np.ndarray | None, n: int, species: np.ndarray | None, names: Iterable[str]
) -> np.ndarray:
    """Compute the diameter of each particle, (n,), from the parameter sigma.

    Args:
      sigma: one value, one value for each species or particle, or a matrix of species pairs; None
        if the system's file does not give sigma.
      n: number of particles.
      species: (n,) species of the particles, or None.
      names: names of the parameters that the file gives, among which a misspelled sigma is sought.
    """
    if sigma is None:
        # a misspelt sigma is noticed here, before the potential can refuse the name
        similar = similar_name("sigma", names)
        remedy = f"did you write {similar!r} for it?" if similar else "give the diameters."
        raise InputError(f"box.packing_fraction needs parameters.sigma, which is missing: {remedy}")
    # of a matrix of species pairs, the pairs of a species with itself
    values = np.diagonal(sigma) if sigma.ndim == 2 else sigma
    if values.ndim == 0:
        return np.full(n, float(values))
    # first per species, as in ``diameters_at`` of the model: it matters where there are as many
    # species as particles
    if species is not None and species.max(initial=0) < values.shape[0]:
        if values.shape[0] != n or n == species.max(initial=0) + 1:
            return values[species]
    if values.shape != (n,):
        raise InputError(
            f"parameters.sigma has shape {sigma.shape}: give 1 or {n} numbers, or one per species."
        )
    return values


def _read_box(
    top: TomlTable,
    dimension: int,
    n: int,
    species: np.ndarray | None,
    sigma: np.ndarray | None,
    start: initial_positions.Start,
) -> tuple[Any, np.ndarray | None]:
    """Read the box for ``System.create``, and the cell matrix (d, d) at the file's parameters.

    The box is the cell matrix itself, or a rule by which the cell follows the parameters. Both are
    None for open boundaries.
    """
    keys = ("packing_fraction", "follows", "lengths", "vectors", "number_density", "cell")
    value = top.raw("box")
    if isinstance(value, str):
        choice = top.text("box", choices=("open", "positions"))
        cell = None if choice == "open" else _require_cell(start)
        return cell, cell
    table = TomlTable.of("box", value, (*keys, "periodic"))
    sizes = [key for key in keys if key != "follows" and table.has(key)]
    if len(sizes) != 1:
        raise InputError(
            f"box has {len(sizes)} of packing_fraction, lengths, vectors, number_density and cell:"
            " give one of them."
        )
    if table.has("packing_fraction"):
        follows = table.text("follows", "parameters", choices=("parameters", "nothing"))
        rule = PackingFraction(float(table.number("packing_fraction")))
        diameters = _diameters(sigma, n, species, top.raw("parameters", {}))
        if not (diameters > 0).all():
            raise InputError(
                f"parameters.sigma is {short(np.asarray(sigma).tolist())}: every diameter must be"
                " positive."
            )
        ball = BALL_OF_UNIT_DIAMETER[dimension]
        volume = np.sum(ball * diameters**dimension) / rule.fraction
        cell = np.eye(dimension) * volume ** (1.0 / dimension)
        return (rule if follows == "parameters" else cell), cell
    cell = _read_fixed_cell(table, dimension, n, start)
    return cell, cell


def _read_periodic(
    top: TomlTable, dimension: int, start: initial_positions.Start
) -> tuple[bool, ...]:
    """Read along which cell vectors a system is periodic, from ``box.periodic``; all by default.

    The axes of the file of the positions go with the cell of this file, ``box = "positions"``.
    """
    box = top.raw("box")
    if not isinstance(box, Mapping) or "periodic" not in box:
        of_positions = box == "positions" or (isinstance(box, Mapping) and "cell" in box)
        return (start.periodic if of_positions else ()) or (True,) * dimension
    if not {"lengths", "vectors", "cell"} & set(box):
        raise InputError(
            "box.periodic is for box.lengths, box.vectors and box.cell: the other boxes need a"
            " volume, and are periodic along all axes; remove it, or give the cell by one of these."
        )
    return _checked_axes(box["periodic"], dimension)


def _checked_axes(value: object, dimension: int) -> tuple[bool, ...]:
    """Check ``box.periodic``, true or false for each cell vector, and return it."""
    if not (
        isinstance(value, list)
        and len(value) == dimension
        and all(isinstance(along, bool) for along in value)
    ):
        raise InputError(
            f"box.periodic is {short(value)}: give true or false for each of the {dimension} cell"
            " vectors."
        )
    return tuple(value)


def _require_cell(start: initial_positions.Start) -> np.ndarray:
    """Return the cell that comes with the positions; raise InputError if none does."""
    if start.cell is None:
        raise InputError(
            "box is 'positions', but the positions come without a cell: give box.lengths"
            " or box.vectors."
        )
    return start.cell


def _read_fixed_cell(
    table: TomlTable, dimension: int, n: int, start: initial_positions.Start
) -> np.ndarray:
    """Read the cell matrix (d, d) of n particles.

    It is that of the positions, or follows from a density, edge lengths or cell vectors.
    """
    if table.has("follows"):
        raise InputError(
            "box.follows belongs to packing_fraction alone, other boxes do not change: remove it."
        )
    if table.has("cell"):
        table.text("cell", choices=("positions",))
        return _require_cell(start)
    if table.has("number_density"):
        return np.eye(dimension) * (n / table.number("number_density")) ** (1.0 / dimension)
    if table.has("lengths"):
        return np.diag(table.array("lengths", (dimension,)))
    # the cell vectors are rows in the file, and columns of the cell
    return table.array("vectors", (dimension, dimension)).T
