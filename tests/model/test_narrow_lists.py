"""A narrow copy of a neighbor list has the pairs within its skin, and serves FIRE as well."""

from __future__ import annotations

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mdsens as ms
from mdsens.mechanics.hessian import max_force
from mdsens.model.neighbors import narrowed, within
from mdsens.model.system import images_of, pair_lengths
from mdsens.relaxation import fire_loop


def spheres(n: int = 150, skewed: bool = False) -> ms.System:
    """Lennard-Jones particles at random places, in a cubic or a skewed cell."""
    box = 7.0 * np.eye(3)
    if skewed:
        box[0, 1] = 1.5
    places = np.random.default_rng(0).random((n, 3)) @ box.T
    pair = {"sigma": 1.0, "epsilon": 1.0}
    return ms.System.create(places, box, ms.potentials.lennard_jones(1.5, 2.0), pair)


def pairs_within(system: ms.System, reach: float) -> set[tuple[int, int]]:
    """All pairs nearer than a distance, from the images around each particle."""
    R, box = np.asarray(system.positions), np.asarray(system.box)
    shifts = np.stack(np.meshgrid(*3 * [[-1, 0, 1]], indexing="ij"), -1).reshape(-1, 3) @ box.T
    apart = R[:, None, None] - R[None, :, None] + shifts
    near = (np.linalg.norm(apart, axis=-1) < reach).any(axis=-1)
    return {(int(i), int(j)) for i, j in zip(*np.nonzero(near), strict=True) if i != j}


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("moved", [0.0, 0.2])
def test_a_copy_has_the_pairs_within_its_skin_and_no_others(moved, skewed):
    start = spheres(skewed=skewed)
    moves = moved * np.random.default_rng(1).uniform(-0.5, 0.5, (150, 3))
    system = start.replace(positions=start.positions + moves)  # with the list of the start
    wide = system.neighbors
    skin = jnp.asarray(0.1)
    # as far as the list may serve: half of the difference of both skins
    assert np.linalg.norm(moves, axis=1).max() <= 0.5 * (float(wide.skin) - 0.1)

    @jax.jit
    def copied(system: ms.System) -> object:
        box = system.box
        lengths, images = pair_lengths(system), images_of(system, box)
        return narrowed(system.neighbors, system.positions, box, lengths, images, skin)

    copy = copied(system)
    rows = np.asarray(copy.rows)
    listed = {(i, int(j)) for i in range(150) for j in rows[:, i] if j < 150}
    assert listed == pairs_within(system, 2.1)
    assert int(copy.used) < int(wide.used) and not bool(copy.overflowed)
    # without gaps, each neighbor once
    counts = (rows < 150).sum(axis=0)
    assert all((rows[:c, i] < 150).all() for i, c in enumerate(counts))
    assert len(listed) == counts.sum()
    assert bool(within(system.positions, copy.reference, jnp.asarray(0.0)))


def test_a_relaxation_on_copies_ends_with_the_forces_of_all_pairs():
    # another range than in any other test: the constant is part of the compiled code
    start = spheres()
    start = start.replace(potential=ms.potentials.lennard_jones(1.37, 1.93)).reallocate()
    with (
        mock.patch.object(fire_loop, "MANY_ROWS", 8),
        mock.patch.object(fire_loop, "narrowed", side_effect=narrowed) as copies,
    ):
        eq = ms.minimize(start, method=ms.relaxation.Fire(), tolerance=1e-9, progress=False)
    assert copies.called
    fresh = eq.system.reallocate()
    assert float(max_force(fresh)) == pytest.approx(float(eq.max_force), rel=1e-3)
    assert float(max_force(fresh)) <= 1.001e-9
