"""Saddles as roots of the same F: found, judged, differentiated; barriers and their derivatives."""

from __future__ import annotations

from functools import cache

import jax
import numpy as np
import pytest

import mdsens as ms
from mdsens.saddles import find_saddle, sides


def lennard_jones(r: jax.Array, sigma: jax.Array, epsilon: jax.Array) -> jax.Array:
    sixth = (sigma / r) ** 6
    return 4.0 * epsilon * (sixth**2 - sixth)


BARE = ms.potentials.from_pair(lennard_jones, ("sigma", "epsilon"), None)
HEXAGON = np.array([[0.0, 0.0], *[[np.cos(t), np.sin(t)] for t in np.pi / 3 * np.arange(6)]])


@cache
def cluster() -> ms.Equilibrium:
    """The seven discs of Dellago, Bolhuis and Chandler, J. Chem. Phys. 108, 9236 (1998), at their hexagon."""
    start = ms.System.create(2 ** (1 / 6) * HEXAGON, None, BARE, {"sigma": 1.0, "epsilon": 1.0})
    return ms.minimize(start, tolerance=1e-12)


@cache
def over(seed: int) -> ms.Equilibrium:
    """A saddle of the cluster, climbed to along a random direction."""
    return find_saddle(cluster(), direction=np.random.default_rng(seed).normal(size=(7, 2)), tolerance=1e-12)


# climbed to from the hexagon: the saddle's energy, and those of its two minima, of the four that the cluster has
PASSES = {1: (-11.04025, (-12.53487, -11.47691)), 5: (-11.03733, (-12.53487, -11.50129))}


@pytest.mark.parametrize("seed", PASSES)
def test_the_passes_out_of_the_hexagon_are_found(seed: int):
    saddle = over(seed)
    assert saddle.order == 1 and float(saddle.max_force) <= 1e-12
    energy, minima = PASSES[seed]
    assert float(ms.observables.energy(saddle.system)) == pytest.approx(energy, abs=1e-5)
    found = sorted(float(ms.observables.energy(side.system)) for side in sides(saddle, tolerance=1e-11))
    assert found == pytest.approx(minima, abs=1e-5)


def test_positions_of_a_saddle_follow_the_diameter():
    """Without a cutoff sigma is the only length: R = sigma R(1) and dR/dsigma = R / sigma; energies leave R alone."""
    saddle = over(1)
    centred = np.asarray(saddle.positions - saddle.positions.mean(axis=0))
    lin = ms.linearize(saddle)
    np.testing.assert_allclose(ms.jvp(lin, {"sigma": 1.0}).value, centred, atol=1e-11)
    assert np.abs(ms.jvp(lin, {"epsilon": 1.0}).value).max() < 1e-11
