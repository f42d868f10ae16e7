"""A trial vector, by which properties of a matrix, such as the norm, are estimated."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

__all__ = ["chirp"]


def chirp(shape: int | tuple[int, ...], dtype: DTypeLike = np.float64, xp: ModuleType = jnp) -> Any:
    """Return cos(k^2) for k = 0, 1, 2, … as an array of the given shape.

    The array contains all wavelengths about equally, so that it has a component along the smooth
    and along the alternating modes of a matrix. Unlike a random vector, the array is the same in
    every run.

    Args:
      shape: shape of the array.
      dtype: floating-point type of the array.
      xp: the module that makes the array, numpy or jax.numpy.
    """
    size = shape if isinstance(shape, int) else math.prod(shape)
    # in single precision k^2 is rounded from k = 4,097 on, which only gives another trial vector
    return xp.cos(xp.arange(size, dtype=dtype) ** 2).reshape(shape)
