"""Results on disk, bit for bit: a .npz of plain arrays with a header in JSON. Reading one executes
nothing.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens import constraints, potentials
from mdsens._util.environment import require_sound_jax
from mdsens._util.errors import InputError, PrecisionError
from mdsens.design import State, Step
from mdsens.implicit.linear.result import SolveStats
from mdsens.io.files import read_npz, replacing
from mdsens.mechanics.hessian import Unknowns
from mdsens.mechanics.status import Status
from mdsens.model.box import BoxFunction, FixedBox, OpenBox, PackingFraction
from mdsens.model.neighbors import Neighbors
from mdsens.model.system import System
from mdsens.potentials.base import BondedPotential, PairPotential, Potential, SumPotential
from mdsens.potentials.electrostatics import ChargeEquilibration, InducedDipoles
from mdsens.potentials.parameters import Parameter
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity.results import (
    Derivative,
    DirectionalDerivative,
    Displacement,
    ParameterGradient,
)

__all__ = ["load", "read_header", "save"]

FORMAT = "mdsens"
VERSION = 2
KINDS = (
    DirectionalDerivative,
    Displacement,
    Equilibrium,
    ParameterGradient,
    State,
    System,
)
_RECORDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        *KINDS,
        Neighbors,
        Parameter,
        SolveStats,
        Step,
        Unknowns,
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


def save(path: str | Path, result: Any, *, provenance: Mapping[str, Any] | None = None) -> None:
    """Store a System, an Equilibrium or a derivative in full precision, with what made it.

    Args:
      path: a file that is made or replaced, whole or not at all; ``.npz`` is its usual end.
      result: a batch is stored like a single one. A potential or a box that is a function of your
        own is not stored, because only Python code could: ``load`` asks for it again.
      provenance: what else is worth keeping, such as ``{"seed": 3}``: anything that JSON can say.
    """
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
        text = json.dumps(header, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"provenance is {provenance!r}: give what JSON can say, numbers, texts, lists."
        ) from error
    with replacing(path) as file:
        np.savez_compressed(file, allow_pickle=False, header=np.array(text), **arrays)


def load(
    path: str | Path,
    *,
    potential: Any = None,
    box: Callable[[Mapping[str, Any]], jax.Array] | None = None,
) -> Any:
    """What ``save`` stored, bit for bit.

    Args:
      path: the file.
      potential: the potential, where it was a function of your own (it is used for any other, too,
        if its parameters fit).
      box: the function of the parameters that gives the cell, where the box was one.

    Raises:
      InputError: the file is missing, cut short, or not of this format; the potential or the box is
        needed and not given.
      PrecisionError: it holds float64 and jax computes in float32.
    """
    require_sound_jax()
    header, arrays = _contents(path)
    try:
        return _decode(header["tree"], _Source(str(path), arrays, potential, box))
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} has a damaged header ({error!r}): write it again with mdsens.io.save."
        ) from error


def read_header(path: str | Path) -> dict[str, Any]:
    """What a stored file says of itself: kind, status, parameters, provenance, versions, device,
    precision.
    """
    header, _ = _contents(path)
    return {key: value for key, value in header.items() if key != "tree"}


def _contents(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    arrays = read_npz(path)
    try:
        header = json.loads(str(arrays.pop("header")[()]))
        ours = header["format"] == FORMAT and "tree" in header
        version = header["format_version"]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"{path} was not written by mdsens.io.save: give a file that was."
        ) from error
    if not ours:
        raise InputError(f"{path} was not written by mdsens.io.save: give a file that was.")
    if version != VERSION:
        newer = not isinstance(version, int) or version > VERSION
        remedy = "install a newer mdsens." if newer else "compute it again, or read it with that."
        raise InputError(
            f"{path} has format version {version}, and this mdsens reads {VERSION}: {remedy}"
        )
    return header, arrays


# -- what the header says


def _status_names(result: Any) -> Any:
    if isinstance(result, Equilibrium):
        codes = np.asarray(result.status)
    elif isinstance(result, Derivative):
        codes = np.asarray(result.stats.status)
    else:
        return None
    names = [Status(int(k)).name for k in codes.ravel()]
    return names[0] if codes.ndim == 0 else names


def _parameters(result: Any) -> Any:
    """Values of the parameters where they are few, else their shapes: the arrays hold them all."""
    system = getattr(result, "system", result)
    if not isinstance(system, System):
        return None
    shown = {k: np.asarray(v) for k, v in system.params.items()}
    return {
        k: v.tolist() if v.size <= 16 else f"array of shape {v.shape}" for k, v in shown.items()
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("mdsens", "jax", "jaxlib", "jax-md", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def _machine(result: Any) -> dict[str, str]:
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


# -- values as JSON with the arrays beside it


def _encode(value: Any, where: str, arrays: dict[str, np.ndarray]) -> Any:
    """JSON for a value; arrays go into ``arrays`` under the name of the place they stand at."""
    if value is None or (
        isinstance(value, (bool, int, float, str)) and not isinstance(value, np.generic)
    ):
        return value
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        arrays[where] = np.asarray(value)
        return {"array": where, "on": "device" if isinstance(value, jax.Array) else "host"}

    def inside(name: str) -> str:
        return f"{where}.{name}" if where else name

    if isinstance(value, Mapping):
        return {"dict": {k: _encode(v, inside(k), arrays) for k, v in value.items()}}
    if isinstance(value, list):
        return {"list": [_encode(v, inside(str(k)), arrays) for k, v in enumerate(value)]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(v, inside(str(k)), arrays) for k, v in enumerate(value)]}
    if isinstance(value, BoxFunction):
        return {"user": "box"}
    if type(value) in _RECORDS.values():
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {
            "record": type(value).__name__,
            "fields": {
                k: (
                    _encode_potential(v, inside(k), arrays)
                    if k == "potential"
                    else _encode(v, inside(k), arrays)
                )
                for k, v in fields.items()
            },
        }
    raise InputError(
        f"{where or 'result'} is a {type(value).__name__}, which cannot be stored: use mdsens' own"
        " records."
    )


def _encode_potential(potential: Any, where: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """A potential's name and options where it is one of ours, else its parameters alone."""
    options = _describe(potential, where, arrays)
    if options is None:
        return {
            "user": "potential",
            "name": str(potential.name),
            "parameters": list(potential.parameters),
        }
    return {"potential": options}


def _describe(potential: Any, where: str, arrays: dict[str, np.ndarray]) -> dict[str, Any] | None:
    if isinstance(potential, SumPotential):
        parts = [_describe(part, f"{where}.{k}", arrays) for k, part in enumerate(potential.parts)]
        return None if None in parts else {"name": "sum", "parts": parts}
    if isinstance(potential, BondedPotential):
        bare = potentials.harmonic_bonds([[0, 1]]).renamed(
            _renaming(("stiffness", "length"), potential.names)
        )
        if dataclasses.replace(potential, bonds=None) != dataclasses.replace(bare, bonds=None):
            return None
        return {
            "name": "harmonic_bonds",
            "names": list(potential.names),
            "bonds": _encode(potential.bonds, f"{where}.bonds", arrays),
        }
    options: list[dict[str, Any]] = [{"name": "soft_sphere"}, {"name": "harmonic_morse"}]
    if isinstance(potential, InducedDipoles):
        options = [{"name": "induced_dipoles", "damped": len(potential.names) == 3}]
    elif isinstance(potential, ChargeEquilibration):
        options = [{"name": "charge_equilibration", "total": potential.total}]
    elif not isinstance(potential, PairPotential):
        return None
    elif isinstance(potential.phi, potentials.switched):
        span = {"onset": potential.phi.onset, "cutoff": potential.phi.cutoff}
        options = [{"name": "lennard_jones", **span}, {"name": "morse", **span}]
    for candidate in options:
        named = {**candidate, "names": list(potential.names)}
        if (
            len(potential.names) == len(_plain(candidate).parameters)
            and _potential(named, None) == potential
        ):
            return named
    return None


def _renaming(own: tuple[str, ...], names: Any) -> dict[str, str]:
    if len(own) != len(names):
        return {}
    return dict(zip(own, names, strict=True))


def _plain(options: Mapping[str, Any]) -> PairPotential | InducedDipoles | ChargeEquilibration:
    """A potential from its name and options."""
    if options["name"] == "induced_dipoles":
        return potentials.induced_dipoles(options["damped"])
    if options["name"] == "charge_equilibration":
        return potentials.charge_equilibration(options["total"])
    if options["name"] in ("soft_sphere", "harmonic_morse"):
        return getattr(potentials, options["name"])()
    makers = {"lennard_jones": potentials.lennard_jones, "morse": potentials.morse}
    return makers[options["name"]](options["onset"], options["cutoff"])


def _potential(options: Mapping[str, Any], source: _Source | None) -> Any:
    """The potential of a description."""
    if options["name"] == "sum":
        return SumPotential(tuple(_potential(part, source) for part in options["parts"]))
    if options["name"] == "harmonic_bonds":
        bare = potentials.harmonic_bonds([[0, 1]])
        return dataclasses.replace(bare, bonds=_decode(options["bonds"], source)).renamed(
            _renaming(bare.names, options["names"])
        )
    plain = _plain(options)
    return plain.renamed(_renaming(plain.names, options["names"]))


@dataclasses.dataclass(frozen=True)
class _Source:
    """What a file is decoded with."""

    path: str
    arrays: Mapping[str, np.ndarray]
    potential: Any
    box: Any

    def potential_of(self, node: Mapping[str, Any]) -> Any:
        own = node.get("potential")
        names = (
            tuple(node["parameters"]) if own is None else tuple(_potential(own, self).parameters)
        )
        if self.potential is None:
            if own is not None:
                return _potential(own, self)
            raise InputError(
                f"{self.path} was made with the potential {node['name']!r}, a function of your own"
                f" (parameters {', '.join(names)}): give it, load(path, potential=...)."
            )
        given: Potential = self.potential
        if set(getattr(given, "parameters", ())) != set(names):
            raise InputError(
                f"potential {getattr(given, 'name', given)!r} has other parameters than the"
                f" {', '.join(names)} of {self.path}: give the potential it was made with."
            )
        return given

    def array(self, node: Mapping[str, Any]) -> Any:
        name = node["array"]
        if name not in self.arrays:
            raise InputError(
                f"{self.path} lacks the array {name!r} that its header names: write it again."
            )
        stored = self.arrays[name]
        if node["on"] != "device":
            return stored
        if jax.dtypes.canonicalize_dtype(stored.dtype) != stored.dtype:
            raise PrecisionError(
                f"{self.path} holds {stored.dtype}, which jax would cut short: call ms.enable_x64()"
                " before load."
            )
        return jnp.asarray(stored)


def _decode(node: Any, source: _Source | None) -> Any:
    if not isinstance(node, Mapping) or source is None:
        return node
    if "array" in node:
        return source.array(node)
    if "dict" in node:
        return {k: _decode(v, source) for k, v in node["dict"].items()}
    if "list" in node:
        return [_decode(v, source) for v in node["list"]]
    if "tuple" in node:
        return tuple(_decode(v, source) for v in node["tuple"])
    if node.get("user") == "box":
        if source.box is None:
            raise InputError(
                f"{source.path} was made with a box that is a function of your own: give it,"
                " load(path, box=...)."
            )
        return BoxFunction(source.box)
    if "potential" in node or node.get("user") == "potential":
        return source.potential_of(node)
    kind = _RECORDS[node["record"]]
    return kind(**{k: _decode(v, source) for k, v in node["fields"].items()})
