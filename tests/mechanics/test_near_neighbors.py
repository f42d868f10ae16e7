"""Forces from a list of the neighbors within the cutoff alone, which large systems take."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative
from literature import SILICON

import mdsens as ms
from mdsens.mechanics import atom_forces
from mdsens.mechanics.forces import energy_gradient
from mdsens.model import surroundings

SIZES = (6, 12)


def silicon(noise: float, lattice: float = 5.431) -> ms.System:
    """A crystal of 64 atoms; in a dense one the second neighbors are within the cutoff, too."""
    fcc = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    corners = np.stack(np.meshgrid(*[range(2)] * 3), -1).reshape(-1, 1, 3)
    sites = lattice * (corners + np.concatenate([fcc, fcc + 0.25])).reshape(-1, 3)
    sites = sites + noise * np.random.default_rng(0).normal(size=sites.shape)
    return ms.System.create(sites, 2 * lattice, ms.potentials.stillinger_weber(), SILICON)


def most_near(system: ms.System) -> int:
    """The largest number of neighbors within the cutoff."""
    listed = ms.observables.pairs_within(system, 1.8 * 2.0951)
    pairs = listed.pairs
    assert system.box is not None
    side = float(system.box[0, 0])
    vectors = system.positions[pairs.j] - system.positions[pairs.i]
    r = np.linalg.norm(vectors - side * np.round(vectors / side), axis=1)
    real = np.asarray(pairs.j < system.n) & (r < 1.8 * 2.0951)
    ends = np.concatenate([np.asarray(pairs.i)[real], np.asarray(pairs.j)[real]])
    return int(np.bincount(ends).max())


def derivatives(system: ms.System, v: jax.Array) -> list[Any]:
    """Gradient, Hessian product, and what reverse mode gives of the product."""

    def gradient(positions: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
        return energy_gradient(system, params)(positions)

    R, params = system.positions, system.params
    product = jax.jvp(lambda R: gradient(R, params), (R,), (v,))[1]
    back = jax.grad(lambda R, p: jnp.vdot(gradient(R, p), v), argnums=(0, 1))(R, params)
    return [gradient(R, params), product, back[0], back[1]["sigma"], back[1]["lambda"]]


@pytest.mark.parametrize(
    ("noise", "lattice", "list_taken"), [(0.01, 5.431, 0), (0.2, 5.431, 1), (0.01, 4.9, 2)]
)
def test_each_list_gives_the_same_derivatives(noise, lattice, list_taken, monkeypatch):
    system = silicon(noise, lattice)
    v = jnp.asarray(np.random.default_rng(1).normal(size=system.positions.shape))
    whole = jax.jit(lambda s, v: derivatives(s, v))(system, v)
    assert int(np.searchsorted(SIZES, most_near(system))) == list_taken
    monkeypatch.setattr(atom_forces, "shorter_lists", lambda *_: SIZES)
    # another function, since the lists are no argument of what is compiled
    again = jax.jit(lambda s, v: derivatives(s, v))(system, v)
    for ours, expected in zip(again, whole, strict=True):
        assert relative(ours, expected) < 1e-12
    # the product is symmetric, so forward and reverse mode give the same
    assert relative(whole[1], whole[2]) < 1e-10


def test_places_of_near_neighbors_are_in_the_order_of_the_list():
    near = np.random.default_rng(2).random((12, 40)) < 0.3
    places, most = surroundings.near_places(lambda k: jnp.asarray(near)[k], 12, 5, 40)
    assert int(most) == near.sum(axis=0).max() > 5
    for column, mask in zip(np.asarray(places).T, near.T, strict=True):
        expected = np.flatnonzero(mask)[:5]
        np.testing.assert_array_equal(column[: len(expected)], expected)
        assert (column[len(expected) :] == -1).all()
