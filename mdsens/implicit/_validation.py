"""Validation of user input: the functions that define F(x, *args) = 0, and the unknowns x."""

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
    """Raise InputError unless the value of each keyword argument is a function or None.

    None stands for an optional function that is left out. None is refused for F and T, the
    functions in F(x, *args) = 0 and x = T(x, *args), which are always needed.
    """
    for name, value in functions.items():
        # "F" and "T" have one letter, so that ``in`` compares the whole name
        if not callable(value) and (value is not None or name in "FT"):
            first = "init" if name == "preprocess" else "x"
            raise InputError(
                f"{name}={short(value)} is not a function; give a function of ({first}, *args)"
            )


def unknowns(x: PyTree, where: str) -> PyTree:
    """Convert the unknowns x of an equation F(x, *args) = 0 to float32 or float64 arrays of jax.

    Args:
      x: a number, an array, or nested containers of them.
      where: the beginning of an error message, which says where x is from, such as "x is".

    Raises:
      InputError: x is empty, or contains anything but arrays and numbers of float32 or float64.
    """
    if not jax.tree.leaves(x):
        raise InputError(
            f"{where} {short(x)}, which contains no number; give an array, or a tree of arrays"
        )
    return jax.tree.map(functools.partial(_as_unknown, where), x)


def _as_unknown(where: str, leaf: object) -> Array:
    """Convert one entry of the unknowns to a float32 or float64 array of jax, or raise InputError.

    The error message begins with the text ``where``, which says where the entry is from.
    """
    try:
        array = jnp.asarray(leaf)
    except (TypeError, ValueError):  # such as scipy's OptimizeResult, which jax takes for a leaf
        inside = " (such as its entry x)" if hasattr(leaf, "x") else ""
        raise InputError(
            f"{where} an unknown of type {type(leaf).__name__}, which is not an array; give arrays"
            f" alone{inside}, and let the solver return anything else as aux, with has_aux=True"
        ) from None
    if array.dtype not in (jnp.float32, jnp.float64):
        raise InputError(
            f"{where} an unknown of dtype {array.dtype}; give x as real numbers of dtype float64 or"
            " float32"
        )
    return array
