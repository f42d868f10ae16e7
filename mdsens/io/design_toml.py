"""Designs described in TOML: read, checked key by key, made ready to run. systems/README.md
documents every key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mdsens._util.errors import InputError
from mdsens.design import FEATURES, Free, LevenbergMarquardt, Optax, Target
from mdsens.io.system_toml import load_system, locate, read
from mdsens.io.toml_table import TomlTable, array_of, is_number, nearest
from mdsens.model.system import System

__all__ = ["DesignSpecification", "load_design"]

KEYS = (
    "description",
    "system",
    "fields",
    "seeds",
    "restart",
    "steps",
    "relaxation",
    "target",
    "free",
    "method",
)
OPTIMIZERS = ("adam", "rmsprop", "sgd")


class DesignSpecification(NamedTuple):
    """What a design file asks for, as ``ms.design.fit`` takes it: ``fit(b.targets, b.systems,
    b.free, **b.options)``.

    Attributes:
      targets, systems, free: of ``fit``.
      options: its keywords: method, steps, and what the relaxations take.
      system: the name of the system.
    """

    targets: list[Target]
    systems: list[System]
    free: dict[str, Free]
    options: dict[str, Any]
    system: str


def load_design(path: str | Path) -> DesignSpecification:
    """Read a design from TOML. Nothing in it is executed.

    Raises:
      InputError: naming the file, the key, its value and the remedy.
    """
    path = Path(path)
    try:
        return _built(TomlTable.of("", read(path), KEYS), path.parent)
    except InputError as error:
        named = str(error).startswith((path.name, str(path)))
        raise InputError(str(error) if named else f"{path}: {error}") from error


def _built(top: TomlTable, folder: Path) -> DesignSpecification:
    top.text("description", "")
    name = top.text("system")
    beside = folder / name
    where = beside if beside.is_file() else locate(name)
    fields = top.raw("fields", {})
    if not isinstance(fields, Mapping):
        raise InputError(f"fields is {fields!r}: give a table of the system's keys, such as count.")
    seeds = (
        array_of("seeds", top.raw("seeds"), (None,), integers=True).tolist()
        if top.has("seeds")
        else [None]
    )
    if not seeds or min(seed or 0 for seed in seeds) < 0 or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds is {seeds}: give different integers from 0.")
    systems = [
        load_system(where, **fields, **({} if seed is None else {"seed": int(seed)}))
        for seed in seeds
    ]
    steps = top.integer("steps", 60, least=1)
    if top.has("restart") and not isinstance(top.raw("restart"), bool):
        raise InputError(f"restart is {top.raw('restart')!r}: give true or false.")
    options: dict[str, Any] = {
        "restart": top.raw("restart", False),
        "steps": steps,
        "method": _method(top, steps),
        **_relaxation(top),
    }
    return DesignSpecification(_targets(top), systems, _free(top, systems[0]), options, where.stem)


def _relaxation(top: TomlTable) -> dict[str, Any]:
    table = TomlTable.of(
        "relaxation", top.raw("relaxation", {}), ("pressure", "shape", "tolerance", "max_steps")
    )
    found: dict[str, Any] = {}
    if table.has("pressure"):
        if not is_number(table.raw("pressure")):
            raise InputError(f"relaxation.pressure is {table.raw('pressure')!r}: give a number.")
        found["pressure"] = float(table.raw("pressure"))
    if table.has("shape"):
        if not isinstance(table.raw("shape"), bool):
            raise InputError(f"relaxation.shape is {table.raw('shape')!r}: give true or false.")
        found["shape"] = table.raw("shape")
    if table.has("tolerance"):
        found["tolerance"] = table.number("tolerance")
    if table.has("max_steps"):
        found["max_steps"] = table.integer("max_steps", least=1)
    return found


def _targets(top: TomlTable) -> list[Target]:
    given = top.raw("target")
    if not isinstance(given, list) or not given:
        raise InputError("target is no list of tables: give [[target]] for each feature.")
    found = []
    for k, entry in enumerate(given):
        keys = ("feature", "value", "change", "hold", "tolerance", "share", "name")
        table = TomlTable.of(f"target[{k}]", entry, keys)
        feature = table.text("feature", choices=sorted(FEATURES))
        ways = [key for key in ("value", "change", "hold") if table.has(key)]
        if len(ways) != 1:
            raise InputError(
                f"target[{k}] has {len(ways)} of value, change and hold: give one of them."
            )
        if table.has("hold") and table.raw("hold") is not True:
            raise InputError(
                f"target[{k}].hold is {table.raw('hold')!r}: give true, or leave the target out."
            )
        wanted = 0.0 if ways == ["hold"] else table.raw(ways[0])
        if not (is_number(wanted) and np.isfinite(wanted)):
            raise InputError(f"target[{k}].{ways[0]} is {wanted!r}: give a number.")
        widths = [key for key in ("tolerance", "share") if table.has(key)]
        if len(widths) != 1:
            raise InputError(
                f"target[{k}] has {len(widths)} of tolerance and share: give one of them."
            )
        found.append(
            Target(feature, float(wanted), table.number(widths[0]), table.text("name", ""), ways != ["value"],
                   widths == ["share"])
        )  # fmt: skip
    return found


def _free(top: TomlTable, system: System) -> dict[str, Free]:
    given = top.raw("free")
    if not isinstance(given, Mapping) or not given:
        raise InputError("free is no table: give [free.sigma], for example, with its bounds.")
    found = {}
    for name, entry in given.items():
        if name not in system.params:
            raise InputError(
                f"free.{name} is no parameter of the system: {nearest(name, list(system.params))}"
            )
        table = TomlTable.of(f"free.{name}", entry, ("low", "high", "within", "log", "only"))
        ends = {
            key: array_of(f"free.{name}.{key}", table.raw(key), None)
            for key in ("low", "high")
            if table.has(key)
        }
        if table.has("log") and not isinstance(table.raw("log"), bool):
            raise InputError(f"free.{name}.log is {table.raw('log')!r}: give true or false.")
        only = np.asarray(table.raw("only")) if table.has("only") else None
        if only is not None and only.dtype != bool:
            raise InputError(
                f"free.{name}.only is {table.raw('only')!r}: give true and false, one a component."
            )
        within = table.number("within") if table.has("within") else None
        found[name] = Free(ends.get("low"), ends.get("high"), within, table.raw("log", None), only)
    return found


def _method(top: TomlTable, steps: int) -> LevenbergMarquardt | Optax:
    given = top.raw("method", {"kind": "levenberg_marquardt"})
    kinds = ("levenberg_marquardt", *OPTIMIZERS)
    kind = TomlTable("method", given if isinstance(given, Mapping) else {}).text(
        "kind", kinds[0], choices=kinds
    )
    if kind == "levenberg_marquardt":
        own = [field.name for field in dataclasses.fields(LevenbergMarquardt)]
        table = TomlTable.of("method", given, ("kind", *own))
        return LevenbergMarquardt(**{key: table.raw(key) for key in own if table.has(key)})
    table = TomlTable.of("method", given, ("kind", "learning_rate", "decay"))
    import optax

    rate: Any = table.number("learning_rate")
    if table.has("decay"):
        if table.text("decay") != "cosine":
            raise InputError(
                f'method.decay is {table.raw("decay")!r}: give "cosine", or leave it out.'
            )
        rate = optax.cosine_decay_schedule(rate, steps)
    return Optax(
        getattr(optax, kind)(rate), f"{kind}, learning rate {table.number('learning_rate'):g}"
    )
