"""What a user gives of a condition, taken as functions and unknowns, or refused in one line."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mdsens._util.errors import InputError, short
from mdsens._util.pytree import PyTree

__all__ = ["check_functions", "unknowns"]


def check_functions(**given: Any) -> None:
    """Refuse what is no function where one is needed; None, except of F or T, is one that is not
    there.
    """
    for name, value in given.items():
        if not callable(value) and (value is not None or name in "FT"):
            first = "init" if name == "preprocess" else "x"
            raise InputError(f"{name} is {short(value)}: give a function of ({first}, *args)")


def unknowns(x: PyTree, where: str) -> PyTree:
    """The unknowns as arrays of single or double precision, or an error that begins with ``where``
    they are from.
    """
    if not jax.tree.leaves(x):
        raise InputError(
            f"{where} {short(x)}, without a number in it: give an array, or a tree of arrays"
        )
    return jax.tree.map(functools.partial(_as_unknown, where), x)


def _as_unknown(where: str, leaf: Any) -> Array:
    try:
        array = jnp.asarray(leaf)
    except (TypeError, ValueError):  # such as scipy's OptimizeResult, which is no tree to jax
        inside = " (such as its entry x)" if hasattr(leaf, "x") else ""
        raise InputError(
            f"{where} an unknown of type {type(leaf).__name__}; return arrays alone{inside}, and"
            " the rest as aux with has_aux=True"
        ) from None
    if array.dtype not in (jnp.float32, jnp.float64):
        raise InputError(
            f"{where} an unknown of dtype {array.dtype}; x must be of real numbers, float64 or"
            " float32"
        )
    return array
