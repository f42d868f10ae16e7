"""Matrix products in full precision."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

__all__ = ["full_precision"]

P = ParamSpec("P")
T = TypeVar("T")


def full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """Compute the matrix products of a function in the precision of their factors.

    By default a GPU rounds the factors of a product of float32 matrices to TensorFloat32, which
    has three digits: too few for a change of coordinates or a field of dipoles. The setting is that
    of these products alone, not of the user's own; derivatives and batches keep it.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return run
