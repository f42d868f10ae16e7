"""Reading of potentials from the tables ``potential`` of a system's TOML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mdsens import potentials
from mdsens._util.errors import InputError
from mdsens._util.suggestions import did_you_mean
from mdsens.io import initial_positions
from mdsens.io.potential_files import read_potential
from mdsens.io.toml_table import TomlTable, array_of, short
from mdsens.potentials.base import Potential

__all__ = ["KINDS", "PotentialTables", "read_potential_tables"]

# kinds of potentials, and the keys of each beside kind and rename
KINDS = {
    "soft_sphere": (),
    "lennard_jones": ("onset", "cutoff"),
    "morse": ("onset", "cutoff"),
    "harmonic_morse": (),
    "harmonic_bonds": ("bonds",),
    "induced_dipoles": ("damped",),
    "charge_equilibration": ("total",),
    "stillinger_weber": (),
    "tersoff": ("m",),
    "gupta": ("onset", "cutoff"),
    "finnis_sinclair": (),
    "file": ("path", "elements"),
}
# defaults of the other options
OPTIONS = {"damped": True, "total": 0.0, "m": 3}
# onset and cutoff of the potentials that have a default
SWITCH = {"lennard_jones": (2.0, 2.5), "morse": (2.0, 2.5)}


@dataclasses.dataclass(frozen=True)
class PotentialTables:
    """The potential of a system's file, with what comes with it.

    Attributes:
      potential: the potential, or the sum of the potentials.
      bond_counts: the number of bonds by the name of each parameter of bonds, which has one value
        for each bond if its values are drawn at random.
      params: values of the parameters that were read from files of potentials.
      elements: for each file of a potential the name of its table and the elements of species 0, 1,
        ….
    """

    potential: Potential
    bond_counts: Mapping[str, int]
    params: Mapping[str, np.ndarray]
    elements: tuple[tuple[str, tuple[str, ...]], ...]

    def check_elements(self, species: np.ndarray | None, names: tuple[str, ...]) -> tuple[str, ...]:
        """Check the elements of the files of potentials against the species of a system.

        Args:
          species: (n,) species of the particles; None if all are alike.
          names: chemical symbols of species 0, 1, …; empty where none are known.

        Returns:
          ``names``; where they are not known, the elements of the files.

        Raises:
          InputError: there are fewer elements than species, or they are other elements. There may
            be elements of which there are no particles, if the particles have species.
        """
        count = 1 if species is None else int(np.max(species, initial=0)) + 1
        for label, elements in self.elements:
            shown = f"{label}.elements is {short(list(elements))}"
            if len(elements) < count or (species is None and len(elements) > 1):
                raise InputError(f"{shown}: give {count}, one for each species.")
            names = names or elements
            if names != elements[: len(names)]:
                raise InputError(
                    f"{shown}, and the species 0, 1, … are {', '.join(names)}: give the elements in"
                    " this order."
                )
        return names


def read_potential_tables(
    value: object, start: initial_positions.Start, folder: Path
) -> PotentialTables:
    """Read the potential of a system's file.

    Args:
      value: the value of the key ``potential``, a table or an array of tables for a sum.
      start: the initial positions and the cell of the system, by which bonds are found, with the
        arrays of their file.
      folder: the folder from which relative paths of files start.
    """
    tables = list(value) if isinstance(value, (list, tuple)) else [value]
    if not tables:
        raise InputError(
            "potential is empty: give a table with a kind, or several as an array of tables."
        )
    labels = [f"potential[{k}]" for k in range(len(tables))] if len(tables) > 1 else ["potential"]
    parts: list[Any] = []
    bond_counts: dict[str, int] = {}
    params: dict[str, np.ndarray] = {}
    elements: list[tuple[str, tuple[str, ...]]] = []
    for label, entry in zip(labels, tables, strict=True):
        table = _read_potential_table(label, entry)
        potential, values = _make_potential(table, start, folder)
        renamed = _rename_parameters(potential, table)
        names = dict(zip(potential.parameters, renamed.parameters, strict=True))
        params |= {names[name]: value for name, value in values.items()}
        # uniform = [low, high] draws one value a bond
        if table.raw("kind") == "harmonic_bonds":
            bond_counts.update(dict.fromkeys(renamed.parameters, len(renamed.bonds)))
        if table.has("elements"):
            elements.append((label, tuple(table.raw("elements"))))
        parts.append(renamed)
    potential = parts[0] if len(parts) == 1 else potentials.SumPotential(tuple(parts))
    return PotentialTables(potential, bond_counts, params, tuple(elements))


def _read_potential_table(label: str, entry: object) -> TomlTable:
    """Check the TOML table of one potential: its key ``kind``, and the names of its keys.

    Return the table as a ``TomlTable``. ``label`` is the name of the table, for messages.
    """
    if not isinstance(entry, Mapping):
        raise InputError(f"{label} is {short(entry)}: give a table with a kind.")
    if "law" in entry:  # the name of the key "kind" in an earlier version of the format
        raise InputError(
            f"{label}.law is no key of the format: write {label}.kind = {short(entry['law'])}."
        )
    kind = TomlTable(label, entry).text("kind", choices=tuple(KINDS))
    return TomlTable.of(label, entry, ("kind", "rename", *KINDS[kind]))


def _make_potential(
    table: TomlTable, start: initial_positions.Start, folder: Path
) -> tuple[Any, Mapping[str, np.ndarray]]:
    """Make one potential from its table, with the default names of the parameters.

    Return the potential, and the values of its parameters if they come from a file.
    """
    kind = table.raw("kind")
    if kind == "file":
        return read_potential(folder / table.text("path"), table.raw("elements"))
    make = getattr(potentials, kind)
    match KINDS[kind]:
        case ():
            potential = make()
        case ("onset", "cutoff"):
            potential = make(*_read_switch(table, kind))
        case ("bonds",):
            potential = make(_read_bonds(table, start))
        case (option,):
            potential = make(table.raw(option, OPTIONS[option]))
    return potential, {}


def _read_switch(table: TomlTable, kind: str) -> tuple[float, float]:
    """Read the lengths between which a potential is switched off."""
    if kind in SWITCH:
        onset, cutoff = SWITCH[kind]
        return table.number("onset", onset), table.number("cutoff", cutoff)
    return table.number("onset"), table.number("cutoff")


def _rename_parameters(potential: Any, table: TomlTable) -> Any:
    """Rename the parameters of a potential as the key ``rename`` of its table says."""
    rename = table.raw("rename", {})
    label = table.label("rename")
    if not isinstance(rename, Mapping) or not all(isinstance(v, str) for v in rename.values()):
        raise InputError(f"{label} is {short(rename)}: give a table of old and new names.")
    for old in rename:
        if old not in potential.parameters:
            hint = did_you_mean(old, potential.parameters)
            raise InputError(f"{label}.{old} is no parameter: {hint}")
    return potential.renamed(rename) if rename else potential


def _read_bonds(table: TomlTable, start: initial_positions.Start) -> np.ndarray:
    """Read the bonds of a potential as (m, 2) particle indices.

    The bonds are a list; an array in the file of the positions, ``{array = "bonds"}``; or with
    ``{within = length}`` all pairs that are closer than ``length`` at the initial positions.
    """
    value = table.raw("bonds")
    label = table.label("bonds")
    if not isinstance(value, Mapping):
        return table.array("bonds", (None, 2), integers=True)
    rule = TomlTable.of(label, value, ("within", "array"))
    if len(value) != 1:
        raise InputError(f"{label} is {short(value)}: give either `within` or `array`.")
    if rule.has("array"):
        return array_of(label, start.array(rule.text("array"), label), (None, 2), integers=True)
    length = rule.number("within")
    pairs = initial_positions.pairs_within(start.positions, start.cell, length, start.periodic)
    if not len(pairs):
        raise InputError(
            f"{label}.within is {value['within']}: no two particles are that near, give a larger"
            " length."
        )
    return pairs
