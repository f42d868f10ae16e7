"""Reading of designs (searches for parameters) from TOML files, with a check of every key.

systems/README.md documents the format.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.suggestions import did_you_mean
from mdsens._util.validation import is_number
from mdsens.design import FEATURES, Free, LevenbergMarquardt, Optax, Target
from mdsens.io.system_toml import load_system, locate, read
from mdsens.io.toml_table import TomlTable, array_of
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
OPTIMIZERS = ("adam", "rmsprop", "sgd")  # functions of optax


class DesignSpecification(NamedTuple):
    """The content of a design file, as arguments of ``ms.design.fit``.

    With ``spec`` such a specification, ``fit(spec.targets, spec.systems, spec.free,
    **spec.options)`` searches for the parameters.

    Attributes:
      targets: a :class:`~mdsens.design.Target` for each feature: the value to reach, and a
        tolerance.
      systems: the systems that the parameters are fitted for, one for each seed.
      free: the parameters that may change, by name, with their bounds.
      options: keywords of ``fit``: method, steps, restart, and the options of the relaxations.
      system: the name of the system.
    """

    targets: list[Target]
    systems: list[System]
    free: dict[str, Free]
    options: dict[str, Any]
    system: str


def load_design(path: str | Path) -> DesignSpecification:
    """Read a design (targets, and parameters that may change) from a TOML file.

    Nothing in the file is executed.

    Raises:
      InputError: bad content; the message gives the file, the key, its value and the remedy.
    """
    path = Path(path)
    try:
        return _build_specification(TomlTable.of("", read(path), KEYS), path.parent)
    except InputError as error:
        # the message names the file, once
        named = str(error).startswith((path.name, str(path)))
        raise InputError(str(error) if named else f"{path}: {error}") from error


def _build_specification(top: TomlTable, folder: Path) -> DesignSpecification:
    """Build a design from the top-level table ``top`` of its TOML file.

    A path of the system in the table may be relative to ``folder``.
    """
    top.text("description", "")
    name = top.text("system")
    beside = folder / name
    path = beside if beside.is_file() else locate(name)
    fields = top.raw("fields", {})
    if not isinstance(fields, Mapping):
        raise InputError(f"fields is {fields!r}: give a table of the system's keys, such as count.")
    if "seed" in fields and top.has("seeds"):
        raise InputError(
            f"fields.seed is {fields['seed']!r} and seeds is {top.raw('seeds')!r}: give one of the"
            " two."
        )
    systems = [load_system(path, **fields, **seed) for seed in _read_seeds(top)]
    steps = top.integer("steps", 60, least=1)
    options: dict[str, Any] = {
        "restart": top.boolean("restart", False),
        "steps": steps,
        "method": _read_method(top, steps),
        **_read_relaxation(top),
    }
    return DesignSpecification(
        targets=_read_targets(top),
        systems=systems,
        free=_read_free_parameters(top, systems[0]),
        options=options,
        system=path.stem,
    )


def _read_seeds(top: TomlTable) -> list[dict[str, int]]:
    """Read the key ``seeds`` of a design file, which asks for one system for each seed.

    Return the keywords of ``load_system`` for each system, such as ``{"seed": 3}``. Without the key
    there is a single system and no keyword, so that the seed is that of the system's own file.
    """
    if not top.has("seeds"):
        return [{}]
    seeds = array_of("seeds", top.raw("seeds"), (None,), integers=True).tolist()
    # Members of an ensemble differ in their seed alone: the same seed twice would be one member.
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds is {seeds}: give different integers from 0.")
    return [{"seed": seed} for seed in seeds]


def _read_relaxation(top: TomlTable) -> dict[str, Any]:
    """Read the table ``relaxation`` of a design file as keywords of ``ms.design.fit``."""
    table = TomlTable.of(
        "relaxation", top.raw("relaxation", {}), ("pressure", "shape", "tolerance", "max_steps")
    )
    options: dict[str, Any] = {}
    if table.has("pressure"):  # may be negative, which table.number does not allow
        if not is_number(table.raw("pressure")):
            raise InputError(f"relaxation.pressure is {table.raw('pressure')!r}: give a number.")
        options["pressure"] = float(table.raw("pressure"))
    if table.has("shape"):
        options["shape"] = table.boolean("shape")
    if table.has("tolerance"):
        options["tolerance"] = table.number("tolerance")
    if table.has("max_steps"):
        options["max_steps"] = table.integer("max_steps", least=1)
    return options


def _read_targets(top: TomlTable) -> list[Target]:
    """Read the targets of a design from the tables ``[[target]]``, one for each feature."""
    entries = top.raw("target")
    if not isinstance(entries, list) or not entries:
        raise InputError("target is not a list of tables: give [[target]] for each feature.")
    keys = ("feature", "value", "change", "hold", "tolerance", "share", "name")
    return [
        _read_target(TomlTable.of(f"target[{k}]", entry, keys)) for k, entry in enumerate(entries)
    ]


def _read_target(table: TomlTable) -> Target:
    """Read one target of a design: the feature, the value or change to reach, and a tolerance."""
    feature = table.text("feature", choices=sorted(FEATURES))
    aim = _require_one_key(table, ("value", "change", "hold"))
    if aim == "hold" and table.raw("hold") is not True:
        raise InputError(
            f"{table.label('hold')} is {table.raw('hold')!r}: give true, or leave out the target."
        )
    value = 0.0 if aim == "hold" else table.raw(aim)  # hold: a change of 0 from the start
    if not (is_number(value) and np.isfinite(value)):
        raise InputError(f"{table.label(aim)} is {value!r}: give a number.")
    width = _require_one_key(table, ("tolerance", "share"))
    return Target(
        feature,
        float(value),
        tolerance=table.number(width),
        name=table.text("name", ""),
        from_start=aim != "value",
        share=width == "share",
    )


def _require_one_key(table: TomlTable, keys: Sequence[str]) -> str:
    """Return which one of several keys a table has; raise InputError if it has none or several."""
    present = [key for key in keys if table.has(key)]
    if len(present) != 1:
        raise InputError(
            f"{table.name} has {len(present)} of {', '.join(keys[:-1])} and {keys[-1]}: give one of"
            " these keys."
        )
    return present[0]


def _read_free_parameters(top: TomlTable, system: System) -> dict[str, Free]:
    """Read the parameters that may change, with their bounds, from the tables ``[free.NAME]``."""
    entries = top.raw("free")
    if not isinstance(entries, Mapping) or not entries:
        raise InputError("free is not a table: give, for example, [free.sigma] with bounds.")
    keys = ("low", "high", "within", "log", "only")
    free = {}
    for name, entry in entries.items():
        if name not in system.params:
            raise InputError(
                f"free.{name} is no parameter of the system: {did_you_mean(name, system.params)}"
            )
        free[name] = _read_free_parameter(TomlTable.of(f"free.{name}", entry, keys))
    return free


def _read_free_parameter(table: TomlTable) -> Free:
    """Read the bounds of one parameter that may change, and which of its components may."""
    bounds = {
        key: array_of(table.label(key), table.raw(key), None)
        for key in ("low", "high")
        if table.has(key)
    }
    log = table.boolean("log", None)
    # 0 and 1 become integers here, not truth values, and are refused
    only = np.asarray(table.raw("only")) if table.has("only") else None
    if only is not None and only.dtype != bool:
        raise InputError(
            f"{table.label('only')} is {table.raw('only')!r}: give true or false for each"
            " component."
        )
    return Free(
        low=bounds.get("low"),
        high=bounds.get("high"),
        within=table.number("within") if table.has("within") else None,
        log=log,
        only=only,
    )


def _read_method(top: TomlTable, steps: int) -> LevenbergMarquardt | Optax:
    """Read the optimization method of a design from the table ``method``.

    ``steps`` is the number of steps over which a learning rate decays.
    """
    entry = top.raw("method", {"kind": "levenberg_marquardt"})
    kinds = ("levenberg_marquardt", *OPTIMIZERS)
    # The kind first: it decides which other keys are allowed. What is no table is refused below.
    unchecked = TomlTable("method", entry if isinstance(entry, Mapping) else {})
    kind = unchecked.text("kind", kinds[0], choices=kinds)
    if kind == "levenberg_marquardt":
        fields = [field.name for field in dataclasses.fields(LevenbergMarquardt)]
        table = TomlTable.of("method", entry, ("kind", *fields))
        return LevenbergMarquardt(**{key: table.raw(key) for key in fields if table.has(key)})
    table = TomlTable.of("method", entry, ("kind", "learning_rate", "decay"))
    import optax  # heavy, so only where it is needed

    rate: Any = table.number("learning_rate")
    if table.has("decay"):
        if table.text("decay") != "cosine":
            raise InputError(
                f'method.decay is {table.raw("decay")!r}: give "cosine", or leave out the key.'
            )
        rate = optax.cosine_decay_schedule(rate, steps)
    label = f"{kind}, learning rate {table.number('learning_rate'):g}"
    return Optax(getattr(optax, kind)(rate), label)
