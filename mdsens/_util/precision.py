"""Matrix products in the full precision of their factors, on a GPU too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

__all__ = ["full_precision"]

P = ParamSpec("P")
T = TypeVar("T")


def full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """Wrap a function so that its matrix products are computed in the precision of their factors.

    By default a GPU rounds the factors of a product of float32 matrices to TensorFloat32, which
    has three digits: too few for a change of coordinates or a field of dipoles. Derivatives and
    batches of the function keep the full precision; the user's own matrix products do not change.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return run
