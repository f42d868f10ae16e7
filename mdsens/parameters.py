"""The parameters of a law: what names, values and shapes they may have, and their values at each pair."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from mdsens.implicit.status import InputError

__all__ = ["Mixing", "arithmetic", "check_finite", "check_names", "check_pair_shape", "of_pairs"]

Params: TypeAlias = Mapping[str, Any]
Mixing: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]


def arithmetic(a: jax.Array, b: jax.Array) -> jax.Array:
    """The mean of two particles' values: how a pair's is made where nothing else is said."""
    return 0.5 * (a + b)


def of_pairs(value: jax.Array, i: jax.Array, j: jax.Array, species: Any, species_count: int, mix: Mixing) -> jax.Array:
    """One parameter at each pair: a scalar, one a species, one a particle, or a matrix of species pairs."""
    if value.ndim == 0:
        return value
    if value.ndim == 2:
        value = 0.5 * (value + value.T)
        return value[species[i], species[j]]
    if species is not None and value.shape[0] == species_count:
        return mix(value[species[i]], value[species[j]])
    return mix(value[i], value[j])


def check_names(given: Params, valid: Sequence[str], law: str) -> None:
    """Refuse names that the law has not, with the nearest that it has, and names left out."""
    for name in given:
        if name not in valid:
            near = difflib.get_close_matches(str(name), valid, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "remove it."
            raise InputError(f"{law} has no parameter {name!r} (it has {', '.join(map(repr, valid))}): {hint}")
    for name in valid:
        if name not in given:
            raise InputError(f"{law} needs the parameter {name!r}: give params[{name!r}].")


def check_finite(name: str, value: np.ndarray, above: float) -> None:
    """Refuse what is not finite or not above a bound, and name the entry."""
    bad = ~np.isfinite(value) | ~(value > above)
    if bad.any():
        where = tuple(int(k) for k in np.argwhere(bad)[0])
        label = f"{name}{list(where)}" if where else name
        need = {0.0: "a positive number", -math.inf: "a finite number"}.get(above, f"a number above {above:g}")
        raise InputError(f"parameter {label} is {value[where]}: give {need}.")


def check_pair_shape(name: str, value: np.ndarray, n: int, species_count: int) -> None:
    """Refuse what is neither a scalar nor one value a particle, a species or a pair of species."""
    s = species_count
    if value.ndim == 0 or (value.ndim == 1 and (value.shape[0] == n or (s and value.shape[0] == s))):
        return
    if value.ndim == 2 and s and value.shape == (s, s):
        if not np.array_equal(value, value.T):
            raise InputError(f"parameter {name} is not symmetric: give a symmetric ({s}, {s}) matrix of species pairs.")
        return
    allowed = f"a scalar, ({n},) for one a particle" + (
        f", ({s},) for one a species or ({s}, {s}) for species pairs" if s else " (give species= for one a species)"
    )
    raise InputError(f"parameter {name} has shape {value.shape}: give {allowed}.")
