"""Systems described in TOML: read, checked key by key, built. systems/README.md documents every
key, value and unit.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mdsens import potentials
from mdsens._util.errors import InputError
from mdsens.io import initial_positions
from mdsens.io.ase_structures import numbered
from mdsens.io.toml_table import TomlTable, array_of, is_integer, nearest, short
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
# potentials and their options
KINDS = {
    "soft_sphere": (),
    "lennard_jones": ("onset", "cutoff"),
    "morse": ("onset", "cutoff"),
    "harmonic_morse": (),
    "harmonic_bonds": ("bonds",),
    "induced_dipoles": ("damped",),
    "charge_equilibration": ("total",),
}
# a keyword merges into these key by key, unless it names the kind: then it is a table of its own
MERGED = {"positions": "kind", "potential": "kind", "parameters": None, "relaxation": None}


def systems_folder() -> Path:
    """Where the bundled systems and their data are: inside the installed package, or beside it in a
    checkout.
    """
    package = Path(__file__).resolve().parents[1]
    inside = package / "_systems"
    return inside if inside.is_dir() else package.parent / "systems"


def bundled_systems() -> dict[str, str]:
    """The systems that come with mdsens: name -> one line that says what it is."""
    return {
        path.stem: str(read(path).get("description", "")).strip()
        for path in sorted(systems_folder().glob("*.toml"))
    }


def read(path: Path) -> dict[str, Any]:
    """The content of a TOML file, unchecked."""
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is no whole TOML file ({error}): mend it, or fetch it again."
        ) from error


def locate(name: str | Path) -> Path:
    """The TOML file of a bundled name or a path."""
    if not isinstance(name, (str, Path)) or not str(name):
        raise InputError(
            f"the system is {name!r}: give a bundled name or the path of a .toml file."
        )
    bundled = systems_folder() / f"{name}.toml"
    if str(name) == bundled.stem and bundled.is_file():
        return bundled
    path = Path(name)
    if path.is_file():
        return path
    names = [p.stem for p in sorted(systems_folder().glob("*.toml"))]
    near = difflib.get_close_matches(path.stem, names, n=1)
    hint = (
        f"did you mean {near[0]!r}?" if near else "give one of these or the path of a .toml file."
    )
    raise InputError(
        f"there is no file and no bundled system {str(name)!r} (bundled: {', '.join(names)}):"
        f" {hint}"
    )


def merged(content: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The file's fields with the keywords laid over them."""
    result = dict(content)
    for key, value in fields.items():
        below = result.get(key)
        kind = MERGED.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        result[key] = {**below, **value} if key in MERGED and both and kind not in value else value  # type: ignore[dict-item]
    return result


def _merged_with(path: Path, fields: Mapping[str, Any]) -> TomlTable:
    """The top of a file with the keywords laid over it, its keys checked."""
    given = dict(fields)
    place = given.get("positions")
    if isinstance(place, Mapping) and isinstance(place.get("file"), (str, Path)):
        file = Path(
            place["file"]
        )  # as a keyword, relative to where the user is, unless it lies beside the TOML file
        if not (path.parent / file).is_file() and file.is_file():
            file = file.resolve()
        given["positions"] = {**place, "file": str(file)}
    return TomlTable.of("", merged(read(path), given), KEYS)


def load_system(name: str | Path, **fields: Any) -> System:
    """Build a system from its description in TOML.

    Args:
      name: a bundled system (``bundled_systems()`` lists them) or the path of a .toml file.
      fields: top-level keys of the format, in place of the file's: ``seed=3``, ``count=1024``,
        ``box={"packing_fraction": 0.9}``. The tables ``parameters``, ``positions``, ``potential``
        and ``relaxation`` are merged key by key, ``parameters={"sigma": [1.0, 0.7]}``;
        ``positions`` with a ``kind`` and ``potential`` with a ``kind`` replace the whole table.

    Returns:
      the system at its start, not relaxed. Numbers are in the file's ``units``.

    Raises:
      InputError: naming the key, its value and the remedy.
    """
    path = locate(name)
    try:
        return build(_merged_with(path, fields), path.parent)
    except InputError as error:
        named = str(error).startswith((path.name, str(path)))
        raise InputError(str(error) if named else f"{name}: {error}") from error


def relaxation_options(name: str | Path, **fields: Any) -> dict[str, Any]:
    """What a system's ``[relaxation]`` table asks of ``minimize``, as its keywords; empty where the
    defaults do.

    >>> ms.minimize(ms.load_system("fcc_argon"), **ms.io.relaxation_options("fcc_argon"))  #
    doctest: +SKIP
    """
    path = locate(name)
    try:
        return _relaxation(_merged_with(path, fields))
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _relaxation(top: TomlTable) -> dict[str, Any]:
    fire = ("dt_start", "dt_max", "max_step")
    table = TomlTable.of("relaxation", top.raw("relaxation", {}), ("tolerance", "max_steps", *fire))
    options: dict[str, Any] = {}
    if table.has("tolerance"):
        options["tolerance"] = table.number("tolerance")
    if table.has("max_steps"):
        options["max_steps"] = table.integer("max_steps", least=1)
    given = {key: table.number(key) for key in fire if table.has(key)}
    if given:
        options["method"] = dataclasses.replace(Fire(), **given)
    return options


def build(top: TomlTable, folder: Path) -> System:
    """The system that a checked top-level table describes; files are sought in ``folder``."""
    top.text("description")
    top.text("units", "")
    _relaxation(top)
    seed = top.integer("seed", 0)
    dimension = top.integer("dimension")
    if dimension not in (2, 3):
        raise InputError(f"dimension is {dimension}: give 2 or 3.")
    count = top.integer("count", least=1) if top.has("count") else None
    start = _start(top, dimension, count, seed, folder)
    n = len(start.positions)
    if count is not None and count != n:
        raise InputError(
            f"count is {count}, but positions give {n} particles: remove count, or change it to"
            f" {n}."
        )
    species, names = _species(top, n, start)
    given = top.raw("parameters")
    if not isinstance(given, Mapping):
        raise InputError(f"parameters is {short(given)}: give a table of names and values.")

    def parameter(name: str, size: int, stream: int) -> np.ndarray:
        return _parameter(name, given[name], size, np.random.default_rng([seed, stream]), start)

    sigma = parameter("sigma", n, _stream(given, "sigma")) if "sigma" in given else None
    box, cell = _box(top, dimension, n, species, sigma, start)
    positions = (
        start.positions @ cell.T if start.fractional and cell is not None else start.positions
    )
    if start.fractional and cell is None:
        raise InputError(
            "box is 'open', but random positions need a cell to be spread in: give lengths."
        )
    potential, sizes = _potential(top, positions, cell, start)
    params = {name: parameter(name, sizes.get(name, n), _stream(given, name)) for name in given}
    dtype = jnp.result_type(float)
    return System.create(np.asarray(positions, dtype), box, potential, params, species).replace(
        species_names=names
    )


def _stream(given: Mapping[str, Any], name: str) -> int:
    """A stream of random numbers for each parameter, the same whatever the order of the keys."""
    return 1 + sorted(given).index(name)


def _start(
    top: TomlTable, dimension: int, count: int | None, seed: int, folder: Path
) -> initial_positions.Start:
    table = TomlTable("positions", _table_of(top, "positions"))
    kind = table.text("kind", choices=("random", "list", "lattice", "file"))
    if kind == "random":
        TomlTable.of("positions", table.values, ("kind",))
        return initial_positions.random(dimension, top.integer("count", least=1), seed)
    if kind == "list":
        TomlTable.of("positions", table.values, ("kind", "values"))
        return initial_positions.Start(table.array("values", (None, dimension)))
    if kind == "lattice":
        TomlTable.of(
            "positions",
            table.values,
            ("kind", "lattice", "constant", "cells", "vacancies", "noise"),
        )
        lattice = table.text("lattice", choices=initial_positions.lattices(dimension))
        cells = table.raw("cells")
        cells = [cells] * dimension if is_integer(cells) else cells
        repeats = array_of("positions.cells", cells, (dimension,), integers=True)
        if repeats.min() < 1:
            raise InputError(f"positions.cells is {short(cells)}: give integers from 1.")
        vacancies = (
            table.array("vacancies", (None,), integers=True)
            if table.raw("vacancies", [])
            else np.zeros(0, int)
        )
        return initial_positions.crystal(
            lattice,
            dimension,
            table.number("constant"),
            repeats,
            vacancies,
            table.number("noise", 0.0, False),
            seed,
        )
    TomlTable.of("positions", table.values, ("kind", "file", "index"))
    return initial_positions.from_file(
        folder / table.text("file"), dimension, table.integer("index", 0)
    )


def _table_of(top: TomlTable, key: str) -> Mapping[str, Any]:
    value = top.raw(key)
    if not isinstance(value, Mapping):
        raise InputError(f"{key} is {short(value)}: give a table.")
    return value


def _species(
    top: TomlTable, n: int, start: initial_positions.Start
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """One integer a particle, species 0 first: from counts, from fractions, or from the file of the
    positions, by its chemical symbols where these are numbered; and the symbols, where they are
    known.
    """
    value = top.raw("species", None)
    if value is None:
        return None, ()
    if value == "positions":
        return (
            array_of("species", start.array("species", "species"), (n,), integers=True),
            start.species_names,
        )
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
    amounts = array_of("species", value, (None,))
    if amounts.min() < 0:
        raise InputError(f"species is {short(value)}: every count or fraction must be 0 or more.")
    if all(is_integer(v) for v in value):
        if amounts.sum() != n:
            raise InputError(
                f"species is {short(value)}, {int(amounts.sum())} in all: make them the {n}"
                " particles."
            )
        counts = amounts.astype(int)
    else:
        if abs(amounts.sum() - 1.0) > 1e-9:
            raise InputError(
                f"species is {short(value)}, {amounts.sum():g} in all: give fractions that sum"
                " to 1."
            )
        counts = np.diff(np.rint(np.cumsum([0.0, *amounts]) * n).astype(int))
    return np.repeat(np.arange(len(counts)), counts), ()


def _parameter(
    name: str, value: Any, size: int, rng: np.random.Generator, start: initial_positions.Start
) -> np.ndarray:
    """A number, numbers, ``{array = "name in the file"}``, or ``{uniform = [low, high]}``, one a
    particle or bond.
    """
    label = f"parameters.{name}"
    if not isinstance(value, Mapping):
        return array_of(label, value, None)
    table = TomlTable.of(label, value, ("array", "uniform"))
    if len(value) != 1:
        raise InputError(f"{label} is {short(value)}: give one of array and uniform.")
    if table.has("array"):
        return array_of(label, start.array(table.text("array"), label), None)
    low, high = table.array("uniform", (2,))
    if low > high:
        raise InputError(
            f"{label}.uniform is {short(value['uniform'])}: give [low, high] with low below high."
        )
    return rng.uniform(low, high, size)


def _diameters(
    sigma: np.ndarray | None, n: int, species: np.ndarray | None, remedy: str
) -> np.ndarray:
    """sigma at each particle."""
    if sigma is None:
        raise InputError(f"box.packing_fraction needs parameters.sigma, which is missing: {remedy}")
    own = np.diagonal(sigma) if sigma.ndim == 2 else sigma
    if own.ndim == 0:
        return np.full(n, float(own))
    if species is not None and own.shape[0] != n and own.shape[0] > species.max(initial=0):
        return own[species]
    if own.shape != (n,):
        raise InputError(
            f"parameters.sigma has shape {sigma.shape}: give one number, one a species, or {n}."
        )
    return own


def _box(
    top: TomlTable,
    dimension: int,
    n: int,
    species: np.ndarray | None,
    sigma: np.ndarray | None,
    start: initial_positions.Start,
) -> tuple[Any, np.ndarray | None]:
    """What ``System.create`` takes as the box, and the cell (columns) at the given parameters; None
    for open.
    """
    keys = ("packing_fraction", "follows", "lengths", "vectors", "number_density")
    value = top.raw("box")
    if isinstance(value, str):
        choice = top.text("box", choices=("open", "positions"))
        if choice == "open":
            return None, None
        if start.cell is None:
            raise InputError(
                "box is 'positions', but the positions come without a cell: give lengths or"
                " vectors."
            )
        return start.cell, start.cell
    table = TomlTable.of("box", value, keys)
    sizes = [key for key in keys if key != "follows" and table.has(key)]
    if len(sizes) != 1:
        raise InputError(
            f"box has {len(sizes)} of packing_fraction, lengths, vectors and number_density: give"
            " one of them."
        )
    if table.has("packing_fraction"):
        follows = table.text("follows", "parameters", choices=("parameters", "nothing"))
        rule = PackingFraction(float(table.number("packing_fraction")))
        near = difflib.get_close_matches("sigma", top.raw("parameters"), n=1)
        remedy = f"did you write {near[0]!r} for it?" if near else "give the diameters."
        diameters = _diameters(sigma, n, species, remedy)
        if not (diameters > 0).all():
            raise InputError(
                f"parameters.sigma is {short(np.asarray(sigma).tolist())}: every diameter must be"
                " positive."
            )
        unit = {2: np.pi / 4, 3: np.pi / 6}[dimension]
        cell = np.eye(dimension) * (np.sum(unit * diameters**dimension) / rule.fraction) ** (
            1.0 / dimension
        )
        return (rule if follows == "parameters" else cell), cell
    if table.has("follows"):
        raise InputError(
            "box.follows belongs to packing_fraction alone, any other box stays as it is:"
            " remove it."
        )
    if table.has("number_density"):
        cell = np.eye(dimension) * (n / table.number("number_density")) ** (1.0 / dimension)
    elif table.has("lengths"):
        cell = np.diag(table.array("lengths", (dimension,)))
    else:
        cell = table.array(
            "vectors", (dimension, dimension)
        ).T  # a vector a row in the file, a column in the box
    return cell, cell


def _potential(
    top: TomlTable, positions: np.ndarray, cell: np.ndarray | None, start: initial_positions.Start
) -> tuple[Any, dict[str, int]]:
    """The potential, and how many values those of its parameters have that are not one a particle."""
    value = top.raw("potential")
    tables = list(value) if isinstance(value, (list, tuple)) else [value]
    if not tables:
        raise InputError(
            "potential is empty: give a table with a kind, or several as an array of tables."
        )
    parts, sizes = [], {}
    for k, entry in enumerate(tables):
        label = "potential" if len(tables) == 1 else f"potential[{k}]"
        if not isinstance(entry, Mapping):
            raise InputError(f"{label} is {short(entry)}: give a table with a kind.")
        if "law" in entry:
            raise InputError(
                f"{label}.law is no key of the format: write {label}.kind = {short(entry['law'])}."
            )
        kind = TomlTable(label, entry).text("kind", choices=tuple(KINDS))
        table = TomlTable.of(label, entry, ("kind", "rename", *KINDS[kind]))
        potential: Any
        if not KINDS[kind]:
            potential = getattr(potentials, kind)()
        elif kind == "induced_dipoles":
            potential = potentials.induced_dipoles(table.raw("damped", True))
        elif kind == "charge_equilibration":
            potential = potentials.charge_equilibration(table.raw("total", 0.0))
        elif kind == "harmonic_bonds":
            potential = potentials.harmonic_bonds(_bonds(table, positions, cell, start))
        else:
            potential = getattr(potentials, kind)(
                table.number("onset", 2.0), table.number("cutoff", 2.5)
            )
        rename = table.raw("rename", {})
        if not isinstance(rename, Mapping) or not all(isinstance(v, str) for v in rename.values()):
            raise InputError(
                f"{label}.rename is {short(rename)}: give a table of old and new names."
            )
        for old in rename:
            if old not in potential.parameters:
                raise InputError(
                    f"{label}.rename.{old} is no parameter: {nearest(old, potential.parameters)}"
                )
        potential = potential.renamed(rename) if rename else potential
        if kind == "harmonic_bonds":
            sizes.update(dict.fromkeys(potential.parameters, len(potential.bonds)))
        parts.append(potential)
    return (parts[0] if len(parts) == 1 else potentials.SumPotential(tuple(parts))), sizes


def _bonds(
    table: TomlTable, positions: np.ndarray, cell: np.ndarray | None, start: initial_positions.Start
) -> np.ndarray:
    """Bonds as a list, as an array of the file, or ``{within = length}``: all pairs of the start
    nearer than it.
    """
    value = table.raw("bonds")
    label = table.label("bonds")
    if not isinstance(value, Mapping):
        return table.array("bonds", (None, 2), integers=True)
    rule = TomlTable.of(label, value, ("within", "array"))
    if len(value) != 1:
        raise InputError(f"{label} is {short(value)}: give one of within and array.")
    if rule.has("array"):
        return array_of(label, start.array(rule.text("array"), label), (None, 2), integers=True)
    found = initial_positions.pairs_within(positions, cell, rule.number("within"))
    if not len(found):
        raise InputError(
            f"{label}.within is {value['within']}: no two particles are that near, give a larger"
            " length."
        )
    return found
