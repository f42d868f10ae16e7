"""The parameters of a potential: their names, values and shapes, the numbers that they are, and their
values at each pair.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mdsens._util.errors import InputError, short

__all__ = [
    "Mixing",
    "Parameter",
    "arithmetic",
    "check_finite",
    "check_names",
    "check_pair_shape",
    "check_symmetric",
    "component",
    "of_pairs",
    "split_label",
]

Params: TypeAlias = Mapping[str, Any]
Mixing: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]


def arithmetic(a: jax.Array, b: jax.Array) -> jax.Array:
    """The mean of two particles' values: how a pair's is made where nothing else is said."""
    return 0.5 * (a + b)


def of_pairs(
    value: jax.Array, i: jax.Array, j: jax.Array, species: Any, species_count: int, mix: Mixing
) -> jax.Array:
    """One parameter at each pair: a scalar, one a species, one a particle, or a matrix of species
    pairs.
    """
    if value.ndim == 0:
        return value
    if value.ndim == 2:
        value = 0.5 * (value + value.T)
        return value[species[i], species[j]]
    if species is not None and value.shape[0] == species_count:
        return mix(value[species[i]], value[species[j]])
    return mix(value[i], value[j])


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What a derivative is taken by.

    Attributes:
      name: of the parameter.
      shape: of its value.
      paired: True of a symmetric matrix of species pairs, whose entries (a, b) and (b, a) are one
        physical number. Its derivatives have the matrix's shape, and half of the derivative by that
        number in each of the two entries, so that the sum of their product with a symmetric change
        is what the change gives.
    """

    name: str
    shape: tuple[int, ...]
    paired: bool = False

    @property
    def indices(self) -> list[tuple[int, ...]]:
        """Of the numbers that it consists of; each pair once."""
        every = itertools.product(*map(range, self.shape))
        return [index for index in every if not self.paired or index[0] <= index[1]]

    def label(self, index: tuple[int, ...]) -> str:
        """The name of one of them: ``sigma[0,1]``."""
        return f"{self.name}[{','.join(map(str, index))}]" if index else self.name

    def entries(self, index: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Where one of them stands in the value: twice, of two species."""
        return sorted({index, index[::-1]}) if self.paired else [index]

    def unit(self, index: tuple[int, ...]) -> np.ndarray:
        """The change of the value as one of them grows by 1."""
        found = np.zeros(self.shape)
        for entry in self.entries(index):
            found[entry] = 1.0
        return found

    def whole(self, derivative: Any, index: tuple[int, ...]) -> Any:
        """The derivative by one of them, from that by the value, which has its shape last."""
        return sum(derivative[(..., *entry)] for entry in self.entries(index))

    def size(self, derivative: Any) -> float:
        """The norm of the derivatives by all of them."""
        parts = (
            [self.whole(derivative, index) for index in self.indices]
            if self.paired
            else [derivative]
        )
        return float(
            jnp.linalg.norm(jnp.concatenate([jnp.ravel(jnp.asarray(part)) for part in parts]))
        )


def split_label(text: str) -> tuple[str, tuple[int, ...] | None] | None:
    """``sigma[0,1]`` as the name and the index; the index None where there is none, all None where
    it is no label.
    """
    found = re.fullmatch(r"\s*([^\[\]\s]+)\s*(?:\[\s*(-?\d+(?:\s*,\s*-?\d+)*)\s*\])?\s*", text)
    if not found:
        return None
    name, index = found.groups()
    return name, None if index is None else tuple(int(i) for i in index.split(","))


def component(parameters: Sequence[Parameter], label: Any) -> tuple[Parameter, tuple[int, ...]]:
    """The parameter and the index that a label such as ``sigma[0,1]`` names, checked."""
    parts = split_label(label) if isinstance(label, str) else None
    if parts is None:
        raise InputError(
            f"component is {short(label)}: give a label, such as 'epsilon', 'sigma[3]' or"
            " 'sigma[0,1]'."
        )
    (name, index), by_name = parts, {parameter.name: parameter for parameter in parameters}
    if name not in by_name:
        raise InputError(
            f"this derivative is by {', '.join(by_name)}, not by {name!r}: give one of these."
        )
    parameter, given = by_name[name], index or ()
    shape = parameter.shape
    if len(given) != len(shape):
        form = f"{name}[{','.join('ij'[: len(shape)])}]" if shape else name
        raise InputError(
            f"component {label!r}: {name} has shape {shape}, so that one number of it is {form}."
        )
    for i, size in zip(given, shape, strict=True):
        if not 0 <= i < size:
            raise InputError(f"component {label!r}: the indices of {name} go from 0 to {size - 1}.")
    return parameter, given


def check_symmetric(what: str, value: Any) -> Any:
    """A matrix of species pairs as it is, or one in a batch, symmetric to the last bit; refused
    where it is not.

    What is traced has no values to look at, and passes.
    """
    if isinstance(value, Tracer):
        return value
    array = np.asarray(value)
    turned = np.swapaxes(array, -1, -2)
    eps = float(np.finfo(array.dtype).eps) if np.issubdtype(array.dtype, np.floating) else 0.0
    off = np.abs(array - turned) > 8.0 * eps * np.max(
        np.abs(array), initial=0.0
    )  # round-off of what made it is let be
    if off.any():
        *_, a, b = (int(k) for k in np.argwhere(off)[0])
        one, other = (float(x[..., a, b][off[..., a, b]].ravel()[0]) for x in (array, turned))
        raise InputError(
            f"{what} is {one:g} at [{a},{b}] and {other:g} at [{b},{a}], which are one number, that"
            f" of the species {a} and {b}: give both entries the same."
        )
    return value if np.array_equal(array, turned) else 0.5 * (array + turned)


def check_names(given: Params, valid: Sequence[str], potential: str) -> None:
    """Refuse names that the potential has not, with the nearest that it has, and names left out."""
    for name in given:
        if name not in valid:
            near = difflib.get_close_matches(str(name), valid, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "remove it."
            raise InputError(
                f"{potential} has no parameter {name!r} (it has {', '.join(map(repr, valid))}): {hint}"
            )
    for name in valid:
        if name not in given:
            raise InputError(f"{potential} needs the parameter {name!r}: give params[{name!r}].")


def check_finite(name: str, value: np.ndarray, above: float) -> None:
    """Refuse what is not finite or not above a bound, and name the entry."""
    bad = ~np.isfinite(value) | ~(value > above)
    if bad.any():
        where = tuple(int(k) for k in np.argwhere(bad)[0])
        label = f"{name}{list(where)}" if where else name
        need = {0.0: "a positive number", -math.inf: "a finite number"}.get(
            above, f"a number above {above:g}"
        )
        raise InputError(f"parameter {label} is {value[where]}: give {need}.")


def check_pair_shape(name: str, value: np.ndarray, n: int, species_count: int) -> None:
    """Refuse what is neither a scalar nor one value a particle, a species or a pair of species."""
    s = species_count
    if value.ndim == 0 or (
        value.ndim == 1 and (value.shape[0] == n or (s and value.shape[0] == s))
    ):
        return
    if value.ndim == 2 and s and value.shape == (s, s):
        if not np.array_equal(value, value.T):
            raise InputError(
                f"parameter {name} is not symmetric: give a symmetric ({s}, {s}) matrix of species"
                " pairs."
            )
        return
    allowed = f"a scalar, ({n},) for one a particle" + (
        f", ({s},) for one a species or ({s}, {s}) for species pairs"
        if s
        else " (give species= for one a species)"
    )
    raise InputError(f"parameter {name} has shape {value.shape}: give {allowed}.")
