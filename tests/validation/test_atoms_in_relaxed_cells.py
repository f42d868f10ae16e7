"""Silicon with a vacancy and a slab of copper in cells under a stress, at a volume, strained along
some axes alone: derivatives by parameters of the potential and by the load.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import small_systems
from cells import IN_PLANE, TOLERANCE, assert_responds_as_minimized_again
from conftest import quick
from small_systems import DIAMOND, SILICON, crystal

import mdsens as ms
from mdsens.relaxation import AtPressure, AtStress, AtVolume

# In eV/Å^3: 0.2 to 0.5 GPa.
STRESS = 1e-3 * np.array([[2.0, 0.5, 0.0], [0.5, -1.0, 0.3], [0.0, 0.3, -3.0]])
DEVIATOR = STRESS - np.trace(STRESS) / 3 * np.eye(3)
ALONG_X = np.diag([True, False, False])


@cache
def silicon() -> ms.System:
    """Eight sites, one of them vacant."""
    places, cell = crystal(DIAMOND, 5.431, (1, 1, 1))
    return ms.System.create(places[:7], cell, ms.potentials.stillinger_weber(), SILICON)


CASES: dict[str, tuple[Any, Any]] = {
    "silicon under a stress": (silicon, AtStress(STRESS)),
    "silicon at a volume": (silicon, AtVolume(DEVIATOR)),
    "silicon in tension along x": (silicon, AtStress(STRESS, ALONG_X)),
    "silicon at a pressure in plane": (silicon, AtPressure(0.002, shape=True, free=IN_PLANE)),
    # a force per length, since a slab has no thickness
    "a slab in plane": (small_systems.gupta, AtStress(STRESS, IN_PLANE)),
    "a slab at an area": (small_systems.gupta, AtVolume(DEVIATOR)),
}


@pytest.mark.parametrize("case", quick(CASES, "silicon in tension along x"))
def test_derivatives_are_those_of_minimizing_again(case: str) -> None:
    make, condition = CASES[case]
    eq = ms.minimize(make(), cell=condition, tolerance=TOLERANCE)
    assert ms.Status(int(eq.status)).good and float(eq.max_force) < 3 * TOLERANCE
    changes: dict[str, Any] = {k: 0.1 * (1 + i) for i, k in enumerate(eq.params)}
    rng = np.random.default_rng(2)
    assert eq.load is not None
    for name, value in eq.load.params.items():
        change = 0.01 * rng.normal(size=value.shape)
        changes[name] = change + change.T
    assert_responds_as_minimized_again(ms.linearize(eq), changes, 3e-4)
