"""A trial vector for estimates of an operator, such as its norm."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

__all__ = ["chirp"]


def chirp(shape: int | tuple[int, ...], dtype: DTypeLike = np.float64, xp: ModuleType = jnp) -> Any:
    """Return cos(k^2) for k = 0, 1, 2, … as an array of a shape.

    The array contains all wavelengths about equally, so that it has a component along the smooth
    and the alternating modes of an operator. And it is the same in every run; a random vector would
    need a key for that.

    Args:
      shape: shape of the array.
      dtype: floating-point type of the array.
      xp: numpy or jax.numpy.
    """
    size = shape if isinstance(shape, int) else math.prod(shape)
    return xp.cos(xp.arange(size, dtype=dtype) ** 2).reshape(shape)
