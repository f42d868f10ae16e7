"""Values that no argument takes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from sample_potentials import POTENTIALS

import mdsens as ms


class _Odd:
    def __repr__(self) -> str:
        return "<odd\nthing>"


def bad_values(shape: tuple[int, ...]) -> dict[str, Any]:
    """What no argument takes that wants an array of this shape, or a number."""
    holed = np.ones(shape)
    holed[(-1,) * len(shape)] = np.nan
    return {
        "nan": holed,
        "infinite": np.full(shape, np.inf),
        "complex": np.ones(shape) + 1j,
        "complex of jax": jnp.ones(shape) + 1j,
        "text": "abc",
        "number in a text": "1.0",
        "texts": np.full(shape, "1.0"),
        "bytes": b"abc",
        "object": _Odd(),
        "objects": np.full(shape, _Odd(), dtype=object),
        "ragged": [[1.0, 2.0], [3.0]],
        "dict": {"a": 1.0},
        "set": {1.0, 2.0},
        "generator": (x for x in [1.0]),
        "empty": np.zeros(0),
        "no rows": np.zeros((0, 2)),
        "one too many": np.ones((7, *shape[1:])),
        "more dimensions": np.ones((3, *shape)),
        "truth values": np.ones(shape, bool),
        "dates": np.full(shape, "2020-01-01", dtype="datetime64[D]"),
        "masked": np.ma.masked_array(np.ones(shape), mask=np.ones(shape, bool)),
        "huge integer": 10**400,
        "type": float,
        "system": ms.System.create(
            [[0.0, 0.0]],
            None,
            POTENTIALS["soft_sphere"],
            {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0},
        ),
    }
