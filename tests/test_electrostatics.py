"""Induced dipoles and equalised charges: closed forms, a dense explicit solve, and minimising again."""

from __future__ import annotations

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

import mdsens as ms
from mdsens import potentials

CORNERS = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)], float)


@cache
def ions() -> ms.Equilibrium:
    rng = np.random.default_rng(0)
    law = potentials.lennard_jones(4.0, 5.0) + potentials.induced_dipoles()
    params = {
        "sigma": 1.0,
        "epsilon": 1.0,
        "charge": (1 - 2 * (CORNERS.sum(1) % 2)) * rng.uniform(1.0, 1.2, 8),
        "polarizability": rng.uniform(0.03, 0.1, 8),
        "damping": 0.5,
    }
    return ms.minimize(ms.System.create(1.1 * CORNERS + 0.1 * rng.normal(size=(8, 3)), None, law, params))


def test_gradient_of_the_relaxed_energy_is_that_of_minimising_again():
    eq = ions()
    found = ms.gradient(ms.observables.energy, eq).value
    rng = np.random.default_rng(1)
    change = {k: rng.uniform(-1, 1, v.shape) * np.asarray(v) for k, v in eq.params.items()}

    def energy(h):
        moved = eq.system.with_params({k: v + h * change[k] for k, v in eq.params.items()})
        return float(ms.observables.energy(ms.minimize(moved).system))

    h = 1e-4
    first, second = ((energy(k * h) - energy(-k * h)) / (2 * k * h) for k in (1, 2))
    expected = (4 * first - second) / 3
    assert sum(float(jnp.sum(found[k] * change[k])) for k in found) == pytest.approx(expected, rel=1e-8)
