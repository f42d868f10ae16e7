"""A vector to probe an operator with."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

__all__ = ["chirp"]


def chirp(shape: int | tuple[int, ...], dtype: Any = np.float64, xp: Any = jnp) -> Any:
    """cos(k^2) for k = 0, 1, 2, … in an array of a shape.

    It holds every wavelength alike, so that no smooth or alternating mode of an operator is missed,
    and it is the same in every run, which a random vector would be at the price of a key.
    """
    size = shape if isinstance(shape, int) else math.prod(shape)
    return xp.cos(xp.arange(size, dtype=dtype) ** 2).reshape(shape)
