"""Parameters of a potential: names, shapes, values for each pair, and independent numbers."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from numpy.typing import ArrayLike

from mdsens._util.errors import InputError, short
from mdsens._util.pytree import is_leaf, named_leaves
from mdsens._util.suggestions import similar_name
from mdsens._util.validation import real_array, real_number

__all__ = [
    "Mixing",
    "Parameter",
    "arithmetic",
    "check_finite",
    "check_leaf_names",
    "check_names",
    "check_pair_shape",
    "check_symmetric",
    "checked_cutoff",
    "checked_lengths",
    "checked_names",
    "component",
    "of_pairs",
    "split_label",
]

Params: TypeAlias = Mapping[str, Any]
Mixing: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]


def arithmetic(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the arithmetic mean of two particles' values of a parameter, for their pair."""
    return 0.5 * (a + b)


def of_pairs(
    value: jax.Array,
    i: jax.Array,
    j: jax.Array,
    species: jax.Array | None,
    species_count: int,
    mix: Mixing,
) -> jax.Array:
    """Compute the value of a parameter for each pair of particles; a scalar stays a scalar.

    Args:
      value: the parameter as the user gives it: a scalar, one value per species or per particle, or
        a matrix of species pairs.
      i, j: indices of the two particles of each pair.
      species: (n,) species of the particles; None without species.
      species_count: number of species.
      mix: function that computes a pair's value from the values of the two particles.
    """
    if value.ndim == 0:
        return value
    if value.ndim == 2:
        # check_pair_shape refuses a matrix where the system has no species
        assert species is not None
        # symmetrized, so that (a, b) and (b, a) each get half of a derivative: see Parameter.paired
        value = 0.5 * (value + value.T)
        return value[species[i], species[j]]
    # first per species: it matters where there are as many species as particles
    if species is not None and value.shape[0] == species_count:
        return mix(value[species[i]], value[species[j]])
    return mix(value[i], value[j])


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a system by which derivatives are taken.

    The components of a parameter are the independent numbers in its value; each has an index.

    Attributes:
      name: the parameter's name; that of a leaf of a tree of arrays is its path, such as
        ``weights.layers.0.w``.
      shape: shape of its value.
      paired: True for a symmetric matrix of species pairs, whose entries (a, b) and (b, a) are the
        same physical number. A derivative by the parameter has the matrix's shape, and each of the
        two entries holds half of the derivative by that number. So the response to a symmetric
        change of the matrix is the sum over all entries of derivative times change.
    """

    name: str
    shape: tuple[int, ...]
    paired: bool = False

    def of(self, values: Mapping[str, Any]) -> Any:
        """Return what belongs to this parameter among arrays, and trees of arrays, by name."""
        if self.name in values:
            return values[self.name]
        return dict(named_leaves(values))[self.name]  # a leaf of a tree

    @property
    def indices(self) -> list[tuple[int, ...]]:
        """The index of each independent number in the parameter's value.

        In a symmetric matrix of species pairs the indices are (a, b) with a <= b.
        """
        entries = itertools.product(*map(range, self.shape))
        return [index for index in entries if not self.paired or index[0] <= index[1]]

    def label(self, index: tuple[int, ...]) -> str:
        """Return the name of the number at an index of the parameter, such as ``sigma[0,1]``."""
        return f"{self.name}[{','.join(map(str, index))}]" if index else self.name

    def entries(self, index: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return where in the parameter's value the independent number with this index is stored.

        A symmetric matrix of species pairs holds the number at (a, b) and at (b, a).
        """
        # a set, since the two entries of a diagonal component are one
        return sorted({index, index[::-1]}) if self.paired else [index]

    def unit(self, index: tuple[int, ...]) -> np.ndarray:
        """Return the change of the parameter's value when the number at this index grows by 1.

        In a symmetric matrix of species pairs the entries (a, b) and (b, a) both grow.
        """
        change = np.zeros(self.shape)
        for entry in self.entries(index):
            change[entry] = 1.0
        return change

    def whole(self, derivative: np.ndarray | jax.Array, index: tuple[int, ...]) -> Any:
        """Return the derivative by one independent number of the parameter.

        For a symmetric matrix of species pairs this derivative is the sum of the entries (a, b) and
        (b, a) of ``derivative``.

        Args:
          derivative: the derivative by the parameter; its last axes have the parameter's shape.
          index: the index of the number.
        """
        return sum(derivative[(..., *entry)] for entry in self.entries(index))

    def size(self, derivative: np.ndarray | jax.Array) -> float:
        """Compute the norm of the derivatives by all independent numbers of the parameter."""
        parts = [derivative]
        if self.paired:
            parts = [self.whole(derivative, index) for index in self.indices]
        flat = jnp.concatenate([jnp.ravel(jnp.asarray(part)) for part in parts])
        return float(jnp.linalg.norm(flat))


def split_label(text: str) -> tuple[str, tuple[int, ...] | None] | None:
    """Split a label such as ``sigma[0,1]`` into the parameter's name and the index (0, 1).

    The index is None for a label without brackets. The result is None for a text that is no label.
    """
    # negative indices match, so that an error can say which ones are allowed
    pattern = r"\s*([^\[\]\s]+)\s*(?:\[\s*(-?\d+(?:\s*,\s*-?\d+)*)\s*\])?\s*"
    match = re.fullmatch(pattern, text)
    if not match:
        return None
    name, index = match.groups()
    return name, None if index is None else tuple(int(i) for i in index.split(","))


def component(parameters: Sequence[Parameter], label: object) -> tuple[Parameter, tuple[int, ...]]:
    """Return the parameter and the index that a label such as ``sigma[0,1]`` names.

    Raises:
      InputError: the label names none of ``parameters``, or an index outside of its shape.
    """
    parts = split_label(label) if isinstance(label, str) else None
    if parts is None:
        raise InputError(
            f"`component` is {short(label)}: give a label, such as 'epsilon', 'sigma[3]' or"
            " 'sigma[0,1]'."
        )
    name, index = parts
    by_name = {parameter.name: parameter for parameter in parameters}
    if name not in by_name:
        raise InputError(
            f"this derivative is by {', '.join(by_name)}, not by {name!r}: give one of the former."
        )
    parameter = by_name[name]
    index = index or ()
    shape = parameter.shape
    if len(index) != len(shape):
        form = f"{name}[{','.join('ij'[: len(shape)])}]" if shape else name
        raise InputError(
            f"component {label!r} has the wrong number of indices, since {name} has shape {shape}:"
            f" give {form}."
        )
    for i, size in zip(index, shape, strict=True):
        if not 0 <= i < size:
            raise InputError(
                f"component {label!r} is out of range: give indices of {name} from 0 to {size - 1}."
            )
    return parameter, index


def checked_names(parameters: Iterable[str]) -> tuple[str, ...]:
    """Check parameter names that a user gives, and return them as a tuple of strings."""
    # A string is iterable, too: "sigma" would become five names.
    if isinstance(parameters, str | bytes) or not np.iterable(parameters):
        raise InputError(f"`parameters` is {short(parameters)}: give a tuple of names.")
    names = tuple(parameters)
    for name in names:
        if not isinstance(name, str):
            raise InputError(f"`parameters` contains {short(name)}: give a tuple of names.")
    return names


def checked_lengths(breakpoints: ArrayLike) -> tuple[float, ...]:
    """Check breakpoints that a user gives, and return them as a tuple of finite lengths."""
    array = np.asarray(real_array("breakpoints", breakpoints, "give lengths."), float)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise InputError(f"`breakpoints` is {short(breakpoints)}: give finite lengths, in a tuple.")
    return tuple(array.tolist())


def checked_cutoff(cutoff: float, need: str) -> float:
    """Check the length of a cutoff that a user gives, and return it as a float.

    ``need`` is what to give instead, for the message.
    """
    length = real_number("cutoff", cutoff, need)
    if not 0 < length < np.inf:
        raise InputError(f"`cutoff` is {length}: {need}")
    return float(length)


def check_symmetric(what: str, value: ArrayLike) -> Any:
    """Make a matrix of species pairs, or each of a batch of matrices, symmetric to the last bit.

    Arrays that jax traces have no values to check, and are returned as they are.

    Raises:
      InputError: the matrix is not symmetric, beyond round-off; the error calls the matrix
        ``what``.
    """
    if isinstance(value, Tracer):
        return value
    array = np.asarray(value)
    transposed = np.swapaxes(array, -1, -2)
    eps = float(np.finfo(array.dtype).eps) if np.issubdtype(array.dtype, np.floating) else 0.0
    # a few eps of the largest entry are the round-off of the computation that made the matrix
    off = np.abs(array - transposed) > 8.0 * eps * np.max(np.abs(array), initial=0.0)
    if off.any():
        *_, a, b = (int(k) for k in np.argwhere(off)[0])
        bad = off[..., a, b]  # of a batch, the members that differ there
        upper, lower = (float(x[..., a, b][bad].ravel()[0]) for x in (array, transposed))
        raise InputError(
            f"{what} is {upper:g} at [{a},{b}] and {lower:g} at [{b},{a}], which are the same"
            f" number, that of the species {a} and {b}: give both entries the same value."
        )
    return value if np.array_equal(array, transposed) else 0.5 * (array + transposed)


def check_names(params: Params, valid: Sequence[str], potential: str) -> None:
    """Raise InputError if a parameter name is unknown or missing, and suggest the closest name.

    Args:
      params: parameters that a user gives, by name.
      valid: the potential's parameter names.
      potential: the potential's name.
    """
    for name in params:
        if name not in valid:
            similar = similar_name(str(name), valid)
            hint = f"did you mean {similar!r}?" if similar else "remove it."
            names = ", ".join(map(repr, valid))
            raise InputError(f"{potential} has no parameter {name!r} (it has {names}): {hint}")
    for name in valid:
        if name not in params:
            raise InputError(f"{potential} needs the parameter {name!r}: give params[{name!r}].")


def check_leaf_names(params: Params) -> None:
    """Raise InputError if two arrays in trees of parameters have the same name."""
    if all(map(is_leaf, params.values())):
        return
    names = [name for name, _ in named_leaves(params)]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"two arrays of the parameters are called {name}: rename a key of the tree, such as"
                " one with a dot."
            )


def check_finite(name: str, value: np.ndarray, above: float) -> None:
    """Raise InputError if a parameter has an entry that is not finite or not above a bound.

    The message names the entry.
    """
    # not <=, so that NaN is bad
    bad = ~np.isfinite(value) | ~(value > above)
    if bad.any():
        where = tuple(int(k) for k in np.argwhere(bad)[0])
        label = f"{name}{list(where)}" if where else name
        needs = {0.0: "a positive number", -math.inf: "a finite number"}
        need = needs.get(above, f"a number above {above:g}")
        raise InputError(f"parameter {label} is {value[where]}: give {need}.")


def check_pair_shape(name: str, value: np.ndarray, n: int, species_count: int) -> None:
    """Raise InputError if a parameter of a pair potential has a shape that is not allowed.

    The parameter may be a scalar or have one value per particle, per species or per pair of
    species; a matrix of species pairs must be symmetric.
    """
    s = species_count  # 0 without species
    if value.ndim == 0:
        return
    if value.ndim == 1 and value.shape[0] in ((n, s) if s else (n,)):
        return
    if value.ndim == 2 and s and value.shape == (s, s):
        if not np.array_equal(value, value.T):
            raise InputError(
                f"parameter {name} is not symmetric: give a symmetric ({s}, {s}) matrix of species"
                " pairs."
            )
        return
    allowed = f"a scalar, ({n},) for one value per particle"
    if s:
        allowed += f", ({s},) for one value per species or ({s}, {s}) for species pairs"
    else:
        allowed += " (give species= for one value per species)"
    raise InputError(f"parameter {name} has shape {value.shape}: give {allowed}.")
