"""Validation of user input: the functions that make a condition, and its unknowns."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mdsens._util.errors import InputError, short
from mdsens._util.pytree import PyTree

__all__ = ["check_functions", "unknowns"]


def check_functions(**functions: Any) -> None:
    """Raise InputError for a keyword whose value is not a function.

    None stands for a function that is left out, and is accepted except for F and T, which are
    always needed.
    """
    for name, value in functions.items():
        # "F" and "T" have one letter, so that ``in`` compares the whole name
        if not callable(value) and (value is not None or name in "FT"):
            first = "init" if name == "preprocess" else "x"
            raise InputError(f"{name} is {short(value)}: give a function of ({first}, *args)")


def unknowns(x: PyTree, where: str) -> PyTree:
    """Convert the unknowns to jax arrays of single or double precision.

    Args:
      x: a tree of numbers or arrays.
      where: the beginning of an error message, which says where x is from, such as "x is".

    Raises:
      InputError: x is empty, or has a leaf that is no array of float32 or float64.
    """
    if not jax.tree.leaves(x):
        raise InputError(
            f"{where} {short(x)}, without a number in it: give an array, or a tree of arrays"
        )
    return jax.tree.map(functools.partial(_as_unknown, where), x)


def _as_unknown(where: str, leaf: object) -> Array:
    """Convert one leaf of the unknowns to an array; an error begins with ``where``."""
    try:
        array = jnp.asarray(leaf)
    except (TypeError, ValueError):  # such as scipy's OptimizeResult, which jax takes for a leaf
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
