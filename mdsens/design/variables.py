"""The parameters that a design may change, as one vector within bounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.validation import real_array, real_number, short
from mdsens.model.system import System, parameters_of
from mdsens.potentials.parameters import Parameter, check_symmetric

__all__ = ["Free", "Variables"]


@dataclasses.dataclass(frozen=True)
class Free:
    """How one parameter may change.

    Attributes:
      low, high: bounds, one number or one a component, symmetric for a matrix of species pairs;
        None for none (positive parameters stay positive).
      within: bounds as a share of the start: 0.3 for within 30 % of it; beside ``low`` and
        ``high``, the narrower.
      log: vary the logarithm, so that steps are shares; None for where all the starting values are
        positive.
      only: (shape of the parameter) True where a component may change; None for everywhere. A
        matrix of species pairs stays symmetric: an entry and its mirror image are one variable.
    """

    low: Any = None
    high: Any = None
    within: float | None = None
    log: bool | None = None
    only: Any = None


@dataclasses.dataclass(frozen=True)
class Variables:
    """Parameters as a vector x without units, p = s exp(x) or p = s x, and back.

    Attributes:
      start: name -> the parameter's value that what is not free keeps.
      index: name -> (shape of the parameter) which variable a component follows; -1 where it stays.
      log: (p,) whether the variable is a logarithm.
      scale: (p,) the parameter's size.
      low, high: (p,) bounds of x.
      labels: (p,) names of the variables, such as ``sigma[1]``.
    """

    start: Mapping[str, np.ndarray]
    index: Mapping[str, np.ndarray]
    log: np.ndarray
    scale: np.ndarray
    low: np.ndarray
    high: np.ndarray
    labels: tuple[str, ...]

    @classmethod
    def of(cls, system: System, free: Any, bounds: Any = None) -> Variables:
        """Of the parameters of a system that are free, checked.

        Args:
          free: a name, several, or a dict of names and :class:`Free`.
          bounds: name -> (low, high), in place of those that ``free`` has.
        """
        records = _records(system, free, bounds)
        start, index, log, scale, low, high, labels = {}, {}, [], [], [], [], []
        for parameter in parameters_of(system, {name: system.params[name] for name in records}):
            name, record = parameter.name, records[parameter.name]
            value = np.asarray(system.params[name], float)
            which, first = _index(parameter, record), len(labels)
            start[name], index[name] = value, np.where(which >= 0, which + first, -1)
            places = [np.argwhere(which == k)[0] for k in range(which.max(initial=-1) + 1)]
            values = np.array([value[tuple(place)] for place in places])
            logs = bool((values > 0).all()) if record.log is None else record.log
            if logs and not (values > 0).all():
                raise InputError(
                    f"free.{name}: log needs positive values, and {name} has {values.min():g}:"
                    " log=False."
                )
            below, above = _bounds(parameter, value, record)
            size = (
                values
                if logs
                else np.full(values.shape, np.max(np.abs(values), initial=0.0) or 1.0)
            )
            for place, size_of in zip(places, size, strict=True):
                ends = [
                    float(np.broadcast_to(end, value.shape)[tuple(place)]) for end in (below, above)
                ]
                if logs:
                    with np.errstate(divide="ignore"):
                        ends = [float(np.log(max(end, 0.0) / size_of)) for end in ends]
                else:
                    ends = [end / size_of for end in ends]
                low.append(ends[0])
                high.append(ends[1])
                labels.append(parameter.label(tuple(int(k) for k in place)))
            log += [logs] * len(places)
            scale += list(size)
        if not labels:
            raise InputError("free names no component that may change: let one of them.")
        return cls(
            start,
            index,
            np.array(log),
            np.array(scale, float),
            np.array(low),
            np.array(high),
            tuple(labels),
        )

    @property
    def x(self) -> np.ndarray:
        """(p,) the start."""
        return np.where(self.log, 0.0, self._component(self.start) / self.scale)

    def _component(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
        found = np.zeros(len(self.labels))
        for name, index in self.index.items():
            found[index[index >= 0]] = np.asarray(params[name])[index >= 0]
        return found

    def values(self, x: np.ndarray) -> np.ndarray:
        """(p,) the parameters' components that are free, at x."""
        return self.scale * np.where(self.log, np.exp(np.where(self.log, x, 0.0)), x)

    def params(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """The parameters at x, by name."""
        return self._spread(self.values(x), self.start)

    def _spread(self, values: np.ndarray, base: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {
            name: np.where(index >= 0, values[np.maximum(index, 0)], base[name])
            for name, index in self.index.items()
        }

    def slope(self, x: np.ndarray) -> np.ndarray:
        """(p,) the derivative of each component by its variable."""
        return np.where(self.log, self.values(x), self.scale)

    def tangent(self, x: np.ndarray, step: np.ndarray) -> dict[str, np.ndarray]:
        """The parameters' change by a small step of x."""
        still = {name: np.zeros_like(value) for name, value in self.start.items()}
        return self._spread(self.slope(x) * step, still)

    def pulled(self, x: np.ndarray, slopes: Mapping[str, np.ndarray]) -> np.ndarray:
        """(m, p) derivatives by the variables, from those by the parameters (m, *shape)."""
        count = next(iter(slopes.values())).shape[0]
        found = np.zeros((count, len(self.labels)))
        for name, index in self.index.items():
            inside = index >= 0
            for row, slope in zip(found, slopes[name], strict=True):
                np.add.at(row, index[inside], slope[inside])
        return found * self.slope(x)


def _records(system: System, free: Any, bounds: Any) -> dict[str, Free]:
    """name -> Free, checked."""
    if isinstance(free, str):
        free = [free]
    given = dict(free) if isinstance(free, Mapping) else {name: Free() for name in free or ()}
    if not given:
        raise InputError(f"free is empty: name a parameter, one of {', '.join(system.params)}.")
    if bounds is not None and not isinstance(bounds, Mapping):
        raise InputError(f"bounds is {short(bounds)}: give a dict of names and (low, high).")
    for name in [*given, *(bounds or {})]:
        if name not in system.params:
            raise InputError(
                f"{name!r} is no parameter of the system: use one of {', '.join(system.params)}."
            )
    for name, record in given.items():
        if not isinstance(record, Free):
            raise InputError(f"free[{name!r}] is {short(record)}: give ms.design.Free(...).")
    for name, pair in (bounds or {}).items():
        if name not in given:
            raise InputError(f"bounds has {name!r}, which is not free: name it in free, too.")
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InputError(f"bounds[{name!r}] is {short(pair)}: give (low, high), None for none.")
        given[name] = dataclasses.replace(given[name], low=pair[0], high=pair[1])
    return given


def _index(parameter: Parameter, record: Free) -> np.ndarray:
    """(shape of the parameter) the number of the variable that each component follows; -1 where it
    stays.
    """
    name, shape = parameter.name, parameter.shape
    only = np.ones(shape, bool)
    if record.only is not None:
        only = np.asarray(record.only)
        if only.dtype != bool or only.shape != shape:
            raise InputError(
                f"free.{name}: only has shape {only.shape}: give truth values of shape {shape}."
            )
    if parameter.paired and not np.array_equal(only, only.T):
        raise InputError(
            f"free.{name}: only is not symmetric: free an entry of the matrix and its mirror image."
        )
    found, count = np.full(shape, -1), 0
    for index in parameter.indices:
        if only[index]:
            for entry in parameter.entries(index):
                found[entry] = count
            count += 1
    return found


def _bounds(parameter: Parameter, value: np.ndarray, record: Free) -> tuple[np.ndarray, np.ndarray]:
    name = parameter.name
    low, high = np.full(value.shape, -np.inf), np.full(value.shape, np.inf)
    if record.within is not None:
        share = real_number(f"free.{name}: within", record.within, "give a share such as 0.3.")
        if not share > 0:
            raise InputError(
                f"free.{name}: within is {share}: give a positive share, such as 0.3 for 30 %."
            )
        low, high = value - share * np.abs(value), value + share * np.abs(value)
    for given, end, narrower in ((record.low, low, np.maximum), (record.high, high, np.minimum)):
        if given is None:
            continue
        array = np.asarray(real_array(f"free.{name}: bounds", given, "give numbers."), float)
        if array.shape not in ((), value.shape):
            raise InputError(
                f"free.{name}: a bound has shape {array.shape}: give one number, or {value.shape}."
            )
        if parameter.paired and array.ndim:
            array = check_symmetric(f"free.{name}: a bound", array)
        end[...] = narrower(end, array)
    within = (low <= value) & (value <= high) & (low < high)
    if not within.all():
        k = tuple(int(i) for i in np.argwhere(~within)[0])
        raise InputError(
            f"free.{name}: the bounds {low[k]:g} to {high[k]:g} do not hold the start {value[k]:g}"
            f"{f' of {name}{list(k)}' if k else ''}: widen them."
        )
    return low, high
