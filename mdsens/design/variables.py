"""The parameters that a design may change, as one vector within bounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from numpy.typing import ArrayLike

from mdsens._util.errors import InputError
from mdsens._util.portable import Portable
from mdsens._util.pytree import PyTree, from_named, is_leaf, matched_leaves, named_leaves
from mdsens._util.validation import real_array, real_number, short
from mdsens.model.system import System, parameters_of
from mdsens.potentials.parameters import Parameter, check_symmetric

__all__ = ["Free", "Variables"]

# name -> (low, high); None for no bound
Bounds: TypeAlias = Mapping[str, tuple[ArrayLike | None, ArrayLike | None]]


@dataclasses.dataclass(frozen=True)
class Free(Portable):
    """How one parameter may change in a design: its bounds, and which of its components.

    For a parameter that is a tree of arrays, a number bounds all numbers of the tree; a tree of the
    same structure may give each array bounds, or an ``only``, of its own.

    Attributes:
      low, high: bounds of the parameter: one number, or an array with one number for each
        component, symmetric for a matrix of species pairs; None for no bound (positive parameters
        stay positive).
      within: bounds as a fraction of the starting value: 0.3 allows changes by up to 30 % of the
        starting value. Where ``low`` or ``high`` is given as well, the narrower bound holds.
      log: whether to vary the logarithm of the parameter, so that steps are relative changes; None
        varies the logarithm if all starting values are positive.
      only: array of the parameter's shape, True where a component may change; None if all
        components may change. A matrix of species pairs stays symmetric: an entry and its mirror
        image are one variable.
    """

    low: ArrayLike | PyTree | None = None
    high: ArrayLike | PyTree | None = None
    within: float | None = None
    log: bool | None = None
    only: ArrayLike | PyTree | None = None


@dataclasses.dataclass(frozen=True)
class Variables(Portable):
    """The free parameters of a design as one vector x of p dimensionless variables.

    Each variable x_i stands for one free component of a parameter, a number that the design may
    change. The component is s_i exp(x_i) if the variable is a logarithm, else s_i x_i, with the
    scale s_i.

    The leaves of a tree of arrays count as parameters, each under its own name, such as
    ``weights.layers.0.w``.

    Attributes:
      like: the free parameters at the start, by name, whose trees ``params`` makes again.
      start: starting value of each parameter, an array by name; components that are not free keep
        their starting values.
      index: for each parameter an array of its shape: for each component the index, in x, of the
        variable that the component follows; -1 for a component that is not free.
      log: (p,) whether the variable is a logarithm.
      scale: (p,) the scales s_i: for a logarithm the starting value, else the parameter's largest
        absolute value.
      low, high: (p,) bounds of x.
      labels: (p,) names of the variables, such as ``sigma[1]``.
    """

    like: Mapping[str, PyTree]
    start: Mapping[str, np.ndarray]
    index: Mapping[str, np.ndarray]
    log: np.ndarray
    scale: np.ndarray
    low: np.ndarray
    high: np.ndarray
    labels: tuple[str, ...]

    @classmethod
    def of(
        cls,
        system: System,
        free: str | Sequence[str] | Mapping[str, Free],
        bounds: Bounds | None = None,
    ) -> Variables:
        """Make the vector of variables from the parameters of a system that a design may change.

        Args:
          system: the system at the start, with the starting values.
          free: a parameter's name, several names, or a dict of names and :class:`Free`.
          bounds: dict of names and (low, high), in place of the bounds in ``free``.

        Raises:
          InputError: unknown names, bad bounds, or no component that may change.
        """
        records = _checked_records(system, free, bounds)
        like = {name: system.params[name] for name in records}
        of_leaves: dict[str, Free] = {}
        for name, record in records.items():
            of_leaves |= _records_of_leaves(name, like[name], record)
        start: dict[str, np.ndarray] = {}
        index: dict[str, np.ndarray] = {}
        log: list[bool] = []
        scale: list[float] = []
        low: list[float] = []
        high: list[float] = []
        labels: list[str] = []
        for parameter in parameters_of(system, like):
            name = parameter.name
            record = of_leaves[name]
            value = np.asarray(parameter.of(like), float)
            which = _index(parameter, record)
            start[name] = value
            index[name] = np.where(which >= 0, which + len(labels), -1)
            # Of an entry and its mirror image, the first stands for both.
            places = [np.argwhere(which == k)[0] for k in range(which.max(initial=-1) + 1)]
            values = np.array([value[tuple(place)] for place in places])
            is_log = _choose_log(name, values, record)
            below, above = _bounds(parameter, value, record)
            sizes = _sizes(values, is_log)
            scale += list(sizes)
            for place, size in zip(places, sizes, strict=True):
                component = tuple(int(k) for k in place)
                low.append(_bound_of_variable(float(below[component]), size, is_log))
                high.append(_bound_of_variable(float(above[component]), size, is_log))
                labels.append(parameter.label(component))
            log += [is_log] * len(places)
        if not labels:
            raise InputError(
                "`free` has no component that may change: set at least one to True in `only`."
            )
        return cls(
            like,
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
        """The variables (p,) of the design at the start; a variable that is a logarithm is 0."""
        return np.where(self.log, 0.0, self._free_components(self.start) / self.scale)

    def _free_components(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return a vector (p,) of the p components of the parameters that a design may change."""
        components = np.zeros(len(self.labels))
        for name, index in self.index.items():
            components[index[index >= 0]] = np.asarray(params[name])[index >= 0]
        return components

    def values(self, x: np.ndarray) -> np.ndarray:
        """Convert the variables x (p,) of a design to the components of parameters they stand for.

        The components are numbers in the units of the parameters, (p,).
        """
        # The inner where() keeps exp from overflowing for variables that are no logarithms.
        return self.scale * np.where(self.log, np.exp(np.where(self.log, x, 0.0)), x)

    def params(self, x: np.ndarray) -> dict[str, Any]:
        """Convert the variables x (p,) of a design to parameters, arrays or trees by name.

        Components that the design may not change keep their starting values.
        """
        return self._spread(self.values(x), self.start)

    def _spread(self, values: np.ndarray, base: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Return the parameters ``base`` with their free components replaced by ``values`` (p,).

        The free components are those that the design may change.
        """
        changed = {
            # np.where evaluates both sides: any valid index will do where a component is not free.
            name: np.where(index >= 0, values[np.maximum(index, 0)], base[name])
            for name, index in self.index.items()
        }
        return from_named(self.like, changed)

    def slope(self, x: np.ndarray) -> np.ndarray:
        """Return the derivative of each free parameter component by its variable, (p,).

        The derivatives are taken at the variables x (p,) of the design.
        """
        # d(s exp x)/dx = s exp x is the component itself; d(s x)/dx = s.
        return np.where(self.log, self.values(x), self.scale)

    def tangent(self, x: np.ndarray, step: np.ndarray) -> dict[str, Any]:
        """Convert a step (p,) of the variables x of a design to a change of the parameters.

        The change is to first order in the step, and a dict of arrays or trees by name.
        """
        zeros = {name: np.zeros_like(value) for name, value in self.start.items()}
        return self._spread(self.slope(x) * step, zeros)

    def pulled(self, x: np.ndarray, slopes: Mapping[str, np.ndarray]) -> np.ndarray:
        """Convert derivatives of m features by the parameters to those by the variables, (m, p).

        Args:
          x: (p,) the variables of the design at which the derivatives are taken.
          slopes: the derivatives by each parameter, (m, *shape of the parameter).
        """
        count = next(iter(slopes.values())).shape[0]
        by_components = np.zeros((count, len(self.labels)))
        for name, index in self.index.items():
            inside = index >= 0
            for row, slope in zip(by_components, slopes[name], strict=True):
                # Not row[index] += slope, which would count a repeated index once: an entry of a
                # matrix and its mirror image follow one variable, and both contribute.
                np.add.at(row, index[inside], slope[inside])
        return by_components * self.slope(x)


def _sizes(values: np.ndarray, is_log: bool) -> np.ndarray:
    """Return the unit of each component of a parameter: its value, or for all the largest."""
    if is_log:
        return values
    return np.full(values.shape, np.max(np.abs(values), initial=0.0) or 1.0)


def _choose_log(name: str, values: np.ndarray, record: Free) -> bool:
    """Return whether a design varies the logarithm of a parameter; this needs positive values.

    Args:
      name: name of the parameter.
      values: the starting values of its free components.
      record: how the parameter may change.
    """
    positive = bool((values > 0).all())
    is_log = positive if record.log is None else record.log
    if is_log and not positive:
        raise InputError(
            f"free.{name}: `log` needs positive values, and {name} has {values.min():g}:"
            " give log=False."
        )
    return is_log


def _bound_of_variable(bound: float, scale: float, is_log: bool) -> float:
    """Convert the bound of a parameter to the bound of its variable in a design.

    Args:
      bound: the bound of the parameter; may be infinite.
      scale: the scale s: the parameter is s exp(x) or s x, with the variable x.
      is_log: whether the variable is a logarithm, s exp(x).
    """
    if not is_log:
        return bound / scale
    # No bound below, or one that is not positive, becomes log 0 = -inf: no bound of the logarithm.
    with np.errstate(divide="ignore"):
        return float(np.log(max(bound, 0.0) / scale))


def _checked_records(
    system: System, free: str | Sequence[str] | Mapping[str, Free], bounds: Bounds | None
) -> dict[str, Free]:
    """Check which parameters a user lets a design change, and within which bounds.

    Return, by name of the parameter, a ``Free``: the record of its bounds and of the components
    that may change. Bounds in the argument ``bounds`` replace those in ``free``.
    """
    records = _make_records(free)
    if not records:
        raise InputError(
            f"`free` is empty: give the name of a parameter, one of {', '.join(system.params)}."
        )
    if bounds is not None and not isinstance(bounds, Mapping):
        raise InputError(f"`bounds` is {short(bounds)}: give a dict of names and (low, high).")
    for name in [*records, *(bounds or {})]:
        if name not in system.params:
            raise InputError(
                f"{name!r} is no parameter of the system: use one of {', '.join(system.params)}."
            )
    for name, record in records.items():
        if not isinstance(record, Free):
            raise InputError(f"`free[{name!r}]` is {short(record)}: give ms.design.Free(...).")
    return _replace_bounds(records, bounds or {})


def _make_records(free: str | Sequence[str] | Mapping[str, Free]) -> dict[str, Free]:
    """Return, by name, a ``Free`` (record of bounds) for each parameter that a design may change.

    A user gives the name of one parameter, several names, or a dict of names and ``Free``. For a
    name alone, the ``Free`` has no bounds.
    """
    if isinstance(free, str):
        return {free: Free()}
    if isinstance(free, Mapping):
        return dict(free)
    if not isinstance(free, Iterable):
        raise InputError(
            f"`free` is {short(free)}: give the name of a parameter, several names, or a dict of"
            " names and ms.design.Free(...)."
        )
    return {name: Free() for name in free}


def _replace_bounds(records: Mapping[str, Free], bounds: Bounds) -> dict[str, Free]:
    """Return the records of the free parameters, with bounds replaced by those in ``bounds``."""
    records = dict(records)
    for name, pair in bounds.items():
        if name not in records:
            raise InputError(
                f"`bounds` has {name!r}, which is not free: name this parameter in `free`, too."
            )
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InputError(
                f"`bounds[{name!r}]` is {short(pair)}: give (low, high), with None for no bound."
            )
        records[name] = dataclasses.replace(records[name], low=pair[0], high=pair[1])
    return records


def _records_of_leaves(name: str, value: PyTree, record: Free) -> dict[str, Free]:
    """Return how each leaf of a parameter may change, by the name of the leaf.

    Args:
      name: name of the parameter.
      value: its starting value; an array is its only leaf.
      record: how the parameter may change.
    """
    if is_leaf(value):
        return {name: record}
    log = record.log
    if log is None:  # of all numbers or of none: single arrays may be positive by chance
        log = all(bool(np.all(np.asarray(leaf) > 0)) for leaf in jax.tree.leaves(value))
    records = {
        label: dataclasses.replace(record, log=log) for label, _ in named_leaves({name: value})
    }
    for field in ("low", "high", "only"):
        part = getattr(record, field)
        if part is None or is_leaf(part):  # the same for every leaf
            continue
        for label, of_leaf, _ in matched_leaves(part, value, name, f"free[{name!r}].{field}"):
            records[label] = dataclasses.replace(records[label], **{field: of_leaf})
    return records


def _index(parameter: Parameter, record: Free) -> np.ndarray:
    """Number the components of one parameter that a design may change, from 0.

    The numbers are an array of the parameter's shape, with -1 for components that may not change.
    An entry of a matrix of species pairs and its mirror image have the same number.
    """
    name = parameter.name
    shape = parameter.shape
    only = np.ones(shape, bool)
    if record.only is not None:
        only = np.asarray(record.only)
        if only.dtype != bool or only.shape != shape:
            raise InputError(
                f"free.{name}: `only` has shape {only.shape}: give booleans of shape {shape}."
            )
    if parameter.paired and not np.array_equal(only, only.T):
        raise InputError(
            f"free.{name}: `only` is not symmetric: set True for an entry of the matrix of"
            " species pairs and for its mirror image."
        )
    numbers = np.full(shape, -1)
    count = 0
    for index in parameter.indices:
        if only[index]:
            for entry in parameter.entries(index):
                numbers[entry] = count
            count += 1
    return numbers


def _bounds(parameter: Parameter, value: np.ndarray, record: Free) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and the upper bound of each component of a parameter, as two arrays.

    Where there is no bound, the arrays are infinite.
    """
    name = parameter.name
    low = np.full(value.shape, -np.inf)
    high = np.full(value.shape, np.inf)
    if record.within is not None:
        share = real_number(f"free.{name}: `within`", record.within, "give a share such as 0.3.")
        if not share > 0:
            raise InputError(
                f"free.{name}: `within` is {share}: give a positive share, such as 0.3 for 30 %."
            )
        # of a scalar numpy would make a number, into which nothing can be written
        low = np.asarray(value - share * np.abs(value))
        high = np.asarray(value + share * np.abs(value))
    for bound, end, narrower in ((record.low, low, np.maximum), (record.high, high, np.minimum)):
        if bound is None:
            continue
        # in place: ``end`` is ``low`` or ``high``
        end[...] = narrower(end, _check_bound(parameter, value.shape, bound))
    within = (low <= value) & (value <= high) & (low < high)
    if not within.all():  # a bound of NaN ends here as well: it compares False
        k = tuple(int(i) for i in np.argwhere(~within)[0])
        raise InputError(
            f"free.{name}: the bounds {low[k]:g} to {high[k]:g} do not contain the starting value"
            f" {value[k]:g}{f' of {name}{list(k)}' if k else ''}: widen the bounds."
        )
    return low, high


def _check_bound(parameter: Parameter, shape: tuple[int, ...], bound: ArrayLike) -> np.ndarray:
    """Check a bound that a user gives for a parameter; return it as a number or an array.

    Args:
      parameter: the parameter.
      shape: shape of the parameter's value, which an array of bounds has to have.
      bound: the lower or the upper bound.
    """
    name = parameter.name
    array = np.asarray(real_array(f"free.{name}: bounds", bound, "give numbers."), float)
    if array.shape not in ((), shape):
        raise InputError(
            f"free.{name}: a bound has shape {array.shape}: give one number, or {shape}."
        )
    if parameter.paired and array.ndim:
        array = check_symmetric(f"free.{name}: a bound", array)
    return array
