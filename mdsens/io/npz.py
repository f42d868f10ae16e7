"""Storing of results, bit for bit, as a .npz of plain arrays with a header in JSON.

Reading a file executes nothing in the file. The header describes the result as nested records,
dicts, lists and tuples, in which an array is represented by its name in the file.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np

from mdsens import constraints, potentials
from mdsens._util.compilation import as_jax
from mdsens._util.environment import require_sound_jax
from mdsens._util.errors import InputError, PrecisionError
from mdsens._util.pytree import named_leaves
from mdsens.design import State, Step
from mdsens.implicit.linear.result import SolveStats
from mdsens.io.files import read_npz, replacing
from mdsens.mechanics.load import StressLoad, VolumeLoad
from mdsens.mechanics.status import Status
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.box import BoxFunction, FixedBox, OpenBox, PackingFraction
from mdsens.model.neighbors import Grid, Neighbors
from mdsens.model.system import System
from mdsens.potentials.base import BondedPotential, PairPotential, Potential, SumPotential
from mdsens.potentials.electrostatics import ChargeEquilibration, InducedDipoles
from mdsens.potentials.embedded_atom import Gupta, Tables
from mdsens.potentials.local import Embedded, LocalPotential
from mdsens.potentials.parameters import Parameter
from mdsens.potentials.tersoff import Tersoff
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity.results import (
    Derivative,
    DirectionalDerivative,
    Displacement,
    ParameterGradient,
)

__all__ = ["load", "read_header", "save"]

FORMAT = "mdsens"
VERSION = 5  # of the format; files of later versions, and of earlier ones than OLDEST, are refused
OLDEST = 2
# Results that can be stored; the two lists are the same.
Stored: TypeAlias = (
    DirectionalDerivative | Displacement | Equilibrium | ParameterGradient | State | System
)
KINDS = (
    DirectionalDerivative,
    Displacement,
    Equilibrium,
    ParameterGradient,
    State,
    System,
)
# all records that a stored tree may contain, by the names that the header gives them
_RECORDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        *KINDS,
        Grid,
        Neighbors,
        Parameter,
        SolveStats,
        Step,
        StressLoad,
        Unknowns,
        VolumeLoad,
        FixedBox,
        OpenBox,
        PackingFraction,
        constraints.FixedTotal,
        constraints.Pinned,
        constraints.RigidBonds,
        constraints.Simplex,
        constraints.Wall,
    )
}
# Potentials of mdsens that are stored as the name of the function that makes them, and its options.
_Rebuilt: TypeAlias = InducedDipoles | ChargeEquilibration | PairPotential | LocalPotential
# the options of each such function, in the order of its arguments
_OPTIONS: dict[str, tuple[str, ...]] = {
    "charge_equilibration": ("total",),
    "eam": ("rho_spacing", "r_spacing", "cutoff"),
    "finnis_sinclair": (),
    "gupta": ("onset", "cutoff"),
    "harmonic_morse": (),
    "induced_dipoles": ("damped",),
    "lennard_jones": ("onset", "cutoff"),
    "morse": ("onset", "cutoff"),
    "soft_sphere": (),
    "stillinger_weber": (),
    "tersoff": ("m",),
}


def save(path: str | Path, result: object, *, provenance: Mapping[str, Any] | None = None) -> None:
    """Store a System, an Equilibrium, a derivative or the State of a design in full precision.

    The header also records the versions of the packages, the device and the precision.

    Args:
      path: the file to write or replace, usually with the suffix ``.npz``; it is never left
        half-written.
      result: the result to store; may be a batch. A potential or a box that is a function of your
        own is Python code and cannot be stored: give this function to ``load`` again.
      provenance: anything else worth recording that JSON can represent, such as ``{"seed": 3}``.

    Raises:
      InputError: ``result`` has another type or a part that cannot be stored, or ``provenance``
        cannot be represented in JSON.
    """
    if isinstance(path, KINDS):
        raise InputError(
            f"path is a {type(path).__name__}: give the path first, as in"
            " ms.io.save('minimum.npz', eq)."
        )
    if not isinstance(result, KINDS):
        raise InputError(
            f"result is a {type(result).__name__}: give a System, an Equilibrium, a derivative or a"
            " design's State."
        )
    arrays: dict[str, np.ndarray] = {}
    tree = _encode(result, "", arrays)
    header = {
        "format": FORMAT,
        "format_version": VERSION,
        "kind": type(result).__name__,
        "status": _status_names(result),
        "parameters": _parameters(result),
        "provenance": dict(provenance or {}),
        "versions": _versions(),
        **_machine(result),
        "saved": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "tree": tree,
    }
    try:
        # a NaN, such as the first radius of a design, is written as NaN: not strict JSON, but
        # json.loads reads it
        text = json.dumps(header, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"provenance is {provenance!r}: give numbers, strings, lists and dicts, as in JSON."
        ) from error
    # the header as an array of one string, which numpy stores without pickle
    with replacing(path) as file:
        np.savez_compressed(file, allow_pickle=False, header=np.array(text), **arrays)


def load(
    path: str | Path,
    *,
    potential: Potential | None = None,
    box: Callable[[Mapping[str, Any]], jax.Array] | None = None,
) -> Any:
    """Read a result that ``save`` stored, bit for bit.

    Args:
      path: the file that ``save`` wrote.
      potential: needed if the potential of the result is a function of your own, which the file
        does not contain. Any potential with the same parameters replaces that of the file.
      box: needed if the cell of the result is a function of your own: this function of the
        parameters.

    Raises:
      InputError: the file is missing, cut short, or not of this format; or the potential or the box
        is needed and not given.
      PrecisionError: the file contains float64 and jax computes in float32.
    """
    require_sound_jax()
    header, arrays = _read_contents(path)
    try:
        return _decode(header["tree"], _Source(str(path), arrays, potential, box))
    # InputError is a ValueError: the next clause would take it for a damaged header
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} has a damaged header ({error!r}): write it again with mdsens.io.save."
        ) from error


def read_header(path: str | Path) -> dict[str, Any]:
    """Read the description of a result that ``save`` stored, without the arrays.

    The description has the kind of the result, status, parameters, provenance, versions, device and
    precision.
    """
    header, _ = _read_contents(path)
    return {key: value for key, value in header.items() if key != "tree"}


def _read_contents(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read the header and the arrays of a file written by ``save``; check the format version."""
    arrays = read_npz(path)
    not_by_save = f"{path} was not written by mdsens.io.save: give a file that was."
    try:
        header = json.loads(str(arrays.pop("header")[()]))
        by_save = header["format"] == FORMAT and "tree" in header
        version = header["format_version"]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(not_by_save) from error
    if not by_save:
        raise InputError(not_by_save)
    if version not in range(OLDEST, VERSION + 1):
        newer = not isinstance(version, int) or version > VERSION
        remedy = "compute it again, or read it with an older mdsens."
        if newer:
            remedy = "install a newer mdsens."
        raise InputError(
            f"{path} has format version {version}, and this mdsens reads {OLDEST} to {VERSION}:"
            f" {remedy}"
        )
    return header, arrays


# -- entries of the header


def _status_names(result: Stored) -> str | list[str] | None:
    """Return the name of a result's status: a list of names for a batch, None without a status."""
    if isinstance(result, Equilibrium):
        codes = np.asarray(result.status)
    elif isinstance(result, Derivative):
        codes = np.asarray(result.stats.status)
    else:
        return None
    names = [Status(int(k)).name for k in codes.ravel()]
    return names[0] if codes.ndim == 0 else names


def _parameters(result: Stored) -> dict[str, Any] | None:
    """Return the parameters of a result for human readers, with at most 16 numbers for each.

    An array of more than 16 numbers is given by its shape alone.
    """
    system = getattr(result, "system", result)
    if not isinstance(system, System):
        return None
    values = {k: np.asarray(v) for k, v in named_leaves(system.params)}
    return {
        k: v.tolist() if v.size <= 16 else f"array of shape {v.shape}" for k, v in values.items()
    }


def _versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on, by name."""
    versions = {"python": platform.python_version()}
    for name in ("mdsens", "jax", "jaxlib", "jax-md", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return versions


def _machine(result: Stored) -> dict[str, str]:
    """Return the device and the precision of a result: those of its largest array of floats."""
    leaves = [
        x
        for x in jax.tree.leaves(result)
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
    ]
    if not leaves:
        return {"device": "unknown", "precision": "unknown"}
    largest = max(leaves, key=lambda x: x.size)
    device = next(iter(largest.devices()))
    return {"device": f"{device.platform}: {device.device_kind}", "precision": str(largest.dtype)}


# -- values as JSON, with their arrays apart


def _encode(value: Any, where: str, arrays: dict[str, np.ndarray]) -> Any:
    """Convert a part of a result to JSON, and put the arrays in this part into ``arrays``.

    Args:
      value: the part to convert.
      where: path of the part in the result, such as system.params.sigma, which becomes the name of
        an array.
      arrays: dict of arrays by name, to which the arrays of the part are added.
    """
    # numpy's float64 is a float, but counts as an array, so that it comes back as one
    if value is None or (
        isinstance(value, (bool, int, float, str)) and not isinstance(value, np.generic)
    ):
        return value
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return _encode_array(value, where, arrays)
    # by exact type: another kind of dict, or a named tuple, would come back as the plain kind
    if type(value) in (dict, list, tuple):
        return _encode_container(value, where, arrays)
    if isinstance(value, BoxFunction):
        return {"user": "box", "periodic": list(value.periodic)}
    # by exact type: a subclass of the user's would come back as the base class
    if type(value) in _RECORDS.values():
        return _encode_record(value, where, arrays)
    raise InputError(
        f"{where or 'result'} is a {type(value).__name__}, which cannot be stored: build"
        " the result of arrays, dicts, lists, tuples and types of mdsens."
    )


def _encode_array(
    value: jax.Array | np.ndarray | np.generic, where: str, arrays: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Put an array into ``arrays``, and return its name and whether it is one of jax."""
    if where in arrays:  # keys of nested dicts with dots in them
        raise InputError(f"two arrays of the result are called {where}: rename a key of the tree.")
    # "on": jax arrays come back as jax arrays, numpy's as numpy's
    arrays[where] = np.asarray(value)
    return {"array": where, "on": "device" if isinstance(value, jax.Array) else "host"}


def _encode_container(
    value: dict[Any, Any] | list[Any] | tuple[Any, ...],
    where: str,
    arrays: dict[str, np.ndarray],
) -> dict[str, Any]:
    """Convert a dict, list or tuple of a result to JSON, and put its arrays into ``arrays``."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):  # in JSON it would become a text
                raise InputError(
                    f"{where} has the key {key!r}, which is no text and cannot be stored: give the"
                    " dict keys of text."
                )
        return {"dict": {k: _encode(v, _extend_path(where, k), arrays) for k, v in value.items()}}
    parts = [_encode(v, _extend_path(where, str(k)), arrays) for k, v in enumerate(value)]
    return {"list" if isinstance(value, list) else "tuple": parts}


def _encode_record(value: Any, where: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Convert a record of a result to JSON, and put its arrays into ``arrays``."""
    fields = {}
    for field in dataclasses.fields(value):
        encode = _encode_potential if field.name == "potential" else _encode
        path = _extend_path(where, field.name)
        fields[field.name] = encode(getattr(value, field.name), path, arrays)
    return {"record": type(value).__name__, "fields": fields}


def _extend_path(where: str, name: str) -> str:
    """Append the name of a part of a result to the path of the object that contains the part.

    For example, the part ``sigma`` of ``system.params`` has the path ``system.params.sigma``.
    """
    return f"{where}.{name}" if where else name


def _encode_potential(
    potential: Potential, where: str, arrays: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Convert a potential to JSON, as its name and options.

    For a potential of the user's own, which only the user can define again, the JSON has the name
    and the names of the parameters.
    """
    options = _describe_potential(potential, where, arrays)
    if options is None:
        return {
            "user": "potential",
            "name": str(potential.name),
            "parameters": list(potential.parameters),
        }
    return {"potential": options}


def _describe_potential(
    potential: Potential, where: str, arrays: dict[str, np.ndarray]
) -> dict[str, Any] | None:
    """Return the name and options of a potential, from which ``load`` can make an equal potential.

    Return None for a potential that is not one of mdsens.
    """
    if isinstance(potential, SumPotential):
        parts = [
            _describe_potential(part, f"{where}.{k}", arrays)
            for k, part in enumerate(potential.parts)
        ]
        return None if None in parts else {"name": "sum", "parts": parts}
    if isinstance(potential, BondedPotential):
        return _describe_bonds(potential, where, arrays)
    if not isinstance(potential, _Rebuilt):
        return None
    # A potential does not know which function built it: build each candidate and compare.
    elements = getattr(potential, "elements", ())
    for candidate in _list_candidates(potential):
        options = {**candidate, "names": list(potential.names)}
        if elements:
            options["elements"] = list(elements)
        same_count = len(potential.names) == len(_unrenamed_potential(candidate).parameters)
        if same_count and _build_potential(options, None) == potential:
            return options
    return None


def _describe_bonds(
    potential: BondedPotential, where: str, arrays: dict[str, np.ndarray]
) -> dict[str, Any] | None:
    """Return name and options of a potential of harmonic bonds; None for other bonds."""
    # one bond as a stand-in: bonds are left out of the comparison
    bare = potentials.harmonic_bonds([[0, 1]]).renamed(
        _renaming(("stiffness", "length"), potential.names)
    )
    # compared without the bonds, which are an array and stored apart
    if dataclasses.replace(potential, bonds=None) != dataclasses.replace(bare, bonds=None):
        return None
    return {
        "name": "harmonic_bonds",
        "names": list(potential.names),
        "bonds": _encode(potential.bonds, f"{where}.bonds", arrays),
    }


def _list_candidates(potential: _Rebuilt) -> list[dict[str, Any]]:
    """List the potentials of mdsens that a given potential may be equal to.

    Each is listed by its name and options, with which it can be made and compared: a potential does
    not contain the name of the function that made it.
    """
    if isinstance(potential, InducedDipoles):
        # the third parameter is the damping
        return [{"name": "induced_dipoles", "damped": len(potential.names) == 3}]
    if isinstance(potential, ChargeEquilibration):
        return [{"name": "charge_equilibration", "total": potential.total}]
    if isinstance(potential, LocalPotential):
        return _list_local_candidates(potential.fn)
    if isinstance(potential.phi, potentials.switched):
        span = {"onset": potential.phi.onset, "cutoff": potential.phi.cutoff}
        return [{"name": "lennard_jones", **span}, {"name": "morse", **span}]
    return [{"name": "soft_sphere"}, {"name": "harmonic_morse"}]


def _list_local_candidates(energy: object) -> list[dict[str, Any]]:
    """List the potentials of surroundings that may have this energy of an atom, with options."""
    if isinstance(energy, Tersoff):
        return [{"name": "tersoff", "m": energy.m}]
    form = energy.form if isinstance(energy, Embedded) else None
    if isinstance(form, Gupta):
        return [{"name": "gupta", "onset": form.onset, "cutoff": form.cutoff}]
    if isinstance(form, Tables):
        return [{"name": "eam", **dataclasses.asdict(form)}]
    return [{"name": "stillinger_weber"}, {"name": "finnis_sinclair"}]


def _renaming(old: Sequence[str], new: Sequence[str]) -> dict[str, str]:
    """Return a dict from the old to the new names of a potential's parameters.

    The dict is empty if the lists of names, ``old`` and ``new``, differ in length.
    """
    if len(old) != len(new):
        return {}
    return dict(zip(old, new, strict=True))


def _unrenamed_potential(options: Mapping[str, Any]) -> _Rebuilt:
    """Make a potential from its name and options, with the default names of the parameters."""
    arguments = [options[name] for name in _OPTIONS[options["name"]]]
    return getattr(potentials, options["name"])(*arguments)


def _build_potential(options: Mapping[str, Any], source: _Source | None) -> Any:
    """Make a potential from stored name and options; ``source`` has the arrays of the file."""
    if options["name"] == "sum":
        return SumPotential(tuple(_build_potential(part, source) for part in options["parts"]))
    if options["name"] == "harmonic_bonds":
        bare = potentials.harmonic_bonds([[0, 1]])
        return dataclasses.replace(bare, bonds=_decode(options["bonds"], source)).renamed(
            _renaming(bare.names, options["names"])
        )
    potential = _unrenamed_potential(options)
    if "elements" in options:
        potential = dataclasses.replace(cast(Any, potential), elements=tuple(options["elements"]))
    return potential.renamed(_renaming(potential.names, options["names"]))


@dataclasses.dataclass(frozen=True)
class _Source:
    """What ``load`` rebuilds a result from: the arrays of the file, and the user's arguments.

    Attributes:
      path: path of the file, for messages.
      arrays: the arrays by name.
      potential: potential given to ``load``; None takes the potential of the file.
      box: function of the parameters that returns the cell, given to ``load``; or None.
    """

    path: str
    arrays: Mapping[str, np.ndarray]
    potential: Potential | None
    box: Callable[[Mapping[str, Any]], jax.Array] | None

    def potential_of(self, node: Mapping[str, Any]) -> Any:
        """Return the potential of the result: the one given to ``load``, or else that of the file.

        A given potential must have the parameters that the file names.
        """
        options = node.get("potential")
        stored = None if options is None else _build_potential(options, self)
        names = tuple(node["parameters"]) if stored is None else tuple(stored.parameters)
        if self.potential is None:
            if stored is not None:
                return stored
            raise InputError(
                f"{self.path} was made with the potential {node['name']!r}, a function of your own"
                f" (parameters {', '.join(names)}): call load(path, potential=...)."
            )
        potential = self.potential
        if set(getattr(potential, "parameters", ())) != set(names):
            raise InputError(
                f"potential {getattr(potential, 'name', potential)!r} has other parameters than the"
                f" {', '.join(names)} of {self.path}: give the potential of that file."
            )
        return potential

    def box_function(self, node: Mapping[str, Any]) -> BoxFunction:
        """Return the cell as the function of the parameters that was given to ``load``.

        ``node`` has the axes along which the system is periodic, all where they are missing.
        """
        if self.box is None:
            raise InputError(
                f"{self.path} was made with a box that is a function of your own: call"
                " load(path, box=...)."
            )
        return BoxFunction(self.box, tuple(node.get("periodic", ())))

    def array(self, node: Mapping[str, Any]) -> jax.Array | np.ndarray:
        """Return the array that an entry of the header names, as an array of jax or numpy.

        The array is of jax if it was of jax when it was stored.
        """
        name = node["array"]
        if name not in self.arrays:
            raise InputError(
                f"{self.path} lacks the array {name!r} of its header: write the file again."
            )
        stored = self.arrays[name]
        if node["on"] != "device":
            return stored
        # without x64, jnp.asarray would turn float64 into float32 with no more than a warning
        if jax.dtypes.canonicalize_dtype(stored.dtype) != stored.dtype:
            raise PrecisionError(
                f"{self.path} holds {stored.dtype}, which jax would round: call ms.enable_x64()"
                " before load."
            )
        return jnp.asarray(stored)


def _decode(node: object, source: _Source | None) -> Any:
    """Rebuild a part of a stored result from JSON, in which arrays are represented by their names.

    ``source`` has the arrays of the file, and the arguments that the user gave to ``load``.
    """
    if not isinstance(node, Mapping) or source is None:
        return node
    if "array" in node:
        return source.array(node)
    if node.keys() & {"dict", "list", "tuple"}:
        return _decode_container(node, source)
    if node.get("user") == "box":
        return source.box_function(node)
    if "potential" in node or node.get("user") == "potential":
        return source.potential_of(node)
    kind = _RECORDS[node["record"]]
    fields = {k: _decode(v, source) for k, v in node["fields"].items()}
    if kind is Grid and "cells" in fields:
        return fields  # of versions 2 and 3: its neighbor list takes them
    return kind(**_of_earlier_versions(kind, fields))


def _of_earlier_versions(kind: type, fields: dict[str, Any]) -> dict[str, Any]:
    """Complete the fields of a record that a file of version 2, 3 or 4 of the format holds.

    In version 4 the code of a minimum's status is called status. In version 3 the number of grid
    cells is a field of the grid. In version 2 it is a field of the neighbor list, as the capacity
    of the search is, and systems are periodic along all axes or along none.
    """
    if kind is Neighbors and not isinstance(fields.get("grid"), Grid):
        return _neighbors_of_version_3(fields)
    if kind is Equilibrium and "status" in fields:
        return {"code": fields.pop("status"), **fields}
    if kind is System and "periodic" not in fields:
        along = not isinstance(fields["boundary"], OpenBox)
        periodic = (along,) * fields["positions"].shape[-1]
        listed = fields["neighbors"]
        grid = dataclasses.replace(listed.grid, periodic=periodic)
        neighbors = dataclasses.replace(listed, grid=grid)
        return {**fields, "periodic": periodic, "neighbors": neighbors}
    return fields


def _neighbors_of_version_3(fields: dict[str, Any]) -> dict[str, Any]:
    """Convert the fields of a neighbor list of version 2 or 3 of the format to those of today."""
    of_grid = fields.pop("grid", None) or {k: fields.pop(k) for k in ("cells", "run_capacity")}
    cells = tuple(of_grid.pop("cells"))
    grid = Grid(**of_grid)
    if not cells:
        return {**fields, "grid": grid}
    rows = fields["rows"]
    grid = grid.fitting(cells, rows.shape[-1])
    grid = dataclasses.replace(grid, run_capacity=grid.run_of(grid.run_capacity))
    # one row for each system of a batch
    counts = np.broadcast_to(np.asarray(cells, np.int32), (*rows.shape[:-2], len(cells)))
    return {**fields, "grid": grid, "cells": as_jax(counts)}


def _decode_container(node: Mapping[str, Any], source: _Source) -> Any:
    """Rebuild a dict, list or tuple of a stored result from JSON, with the arrays in it.

    ``source`` has the arrays of the file, and the arguments that the user gave to ``load``.
    """
    if "dict" in node:
        return {k: _decode(v, source) for k, v in node["dict"].items()}
    if "list" in node:
        return [_decode(v, source) for v in node["list"]]
    return tuple(_decode(v, source) for v in node["tuple"])
