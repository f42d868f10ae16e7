"""A list never loses a pair in silence: against brute force, after moves and deformations, at every overflow."""

from __future__ import annotations

import dataclasses
from functools import cache
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import packing

import mdsens as ms
from mdsens import neighbours
from mdsens.system import potential_energy

N = 100
CELL_2D = np.array([[7.2, -1.5], [2.0, 7.6]])  # not triangular
CELL_3D = np.array([[5.6, 0.6, -0.5], [0.8, 5.9, 0.7], [-0.4, 0.5, 5.7]])


@pytest.fixture(autouse=True, scope="module")
def short_lists_as_well():
    """Lists from 33 particles on, wherever all pairs may be faster."""
    with mock.patch.object(neighbours, "ALL_PAIRS_BELOW", 32):
        yield


@cache
def system(name: str) -> ms.System:
    rng = np.random.default_rng(7)
    if name == "relaxed 3-D":
        return packing("3d_bidisperse_N128_p1e-4", 7).reallocate()
    dimension = 3 if "3-D" in name else 2
    cell = CELL_3D if dimension == 3 else CELL_2D
    places = rng.random((N, dimension))
    if "clumped" in name:
        places = 0.2 * places + 0.9
    places = places @ cell.T
    box = {"open": None, "moving": ms.PackingFraction(1.2, cell)}.get(name.split()[0], cell)
    params = {"sigma": rng.uniform(0.8, 1.2, N), "epsilon": 1.0, "alpha": 2.0}
    return ms.System.create(places, box, ms.potentials.soft_sphere(), params)


NAMES = ["random 2-D", "clumped 2-D", "moving 2-D", "open 2-D", "random 3-D", "relaxed 3-D"]
energy_and_slope = jax.jit(jax.value_and_grad(lambda R, s: potential_energy(s, R)))


def vectors(positions, box):
    """(n, n, d) nearest images, in numpy."""
    difference = np.asarray(positions)[:, None] - np.asarray(positions)[None]
    if box is None:
        return difference
    return difference - np.round(difference @ np.linalg.inv(box).T) @ np.asarray(box).T


def brute_force(s: ms.System):
    """Energy and its gradient over all pairs of harmonic spheres, in numpy."""
    assert s.diameters is not None
    sigma = np.asarray(s.diameters)
    apart = vectors(s.positions, s.box)
    r = np.linalg.norm(apart, axis=2) + np.eye(s.n) * 1e9
    mean = 0.5 * (sigma[:, None] + sigma[None])
    overlap = np.maximum(1 - r / mean, 0)
    return 0.25 * np.sum(overlap**2), -np.sum((overlap / mean / r)[:, :, None] * apart, axis=1)


def lost(s: ms.System, pairs, positions, box, reach) -> int:
    """How many pairs nearer than ``reach`` are not on a list."""
    r = np.linalg.norm(vectors(positions, box), axis=2)
    i, j = np.nonzero(np.triu(r < reach, 1))
    listed = {tuple(sorted(p)) for p in np.asarray(pairs).T.tolist()}
    return len({(a, b) for a, b in zip(i.tolist(), j.tolist(), strict=True)} - listed)


def agrees(s: ms.System) -> None:
    assert not bool(s.neighbours.overflowed)
    energy, slope = energy_and_slope(s.positions, s)
    expected = brute_force(s)
    assert float(energy) == pytest.approx(expected[0], rel=1e-12)
    # the round-off of positions times the stiffness of a pair, 1, bounds it at a minimum, where forces cancel
    assert np.abs(slope - expected[1]).max() < 1e-13 * max(np.abs(expected[1]).max(), 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_energy_and_gradient_by_a_list_are_those_of_all_pairs(name):
    assert not system(name).neighbours.complete  # it is a list that is tested
    agrees(system(name))


@pytest.mark.parametrize("name", NAMES)
def test_each_pair_is_listed_once(name):
    pairs = np.asarray(system(name).neighbours.pairs)
    real = np.sort(pairs[:, pairs[0] < system(name).n], axis=0)
    assert np.all(real[0] != real[1])
    assert len({tuple(p) for p in real.T.tolist()}) == real.shape[1]


def test_images_of_the_positions_do_not_matter():
    s = system("random 2-D")
    shifts = np.random.default_rng(0).integers(-2, 3, (N, 2)) @ CELL_2D.T
    moved = ms.System.create(np.asarray(s.positions) + shifts, CELL_2D, s.potential, s.params)
    agrees(moved)
    assert float(potential_energy(moved)) == pytest.approx(float(potential_energy(s)), rel=1e-12)


def test_positions_on_the_faces_of_the_cell_are_found():
    # -1e-17 wraps to 1.0, outside of every cell of the grid; and a lattice lies on the cells' faces
    places = np.stack(np.meshgrid(np.arange(9.0), np.arange(9.0)), -1).reshape(-1, 2)
    for shift in (0.0, -1e-17):
        params = {"sigma": 1.1, "epsilon": 1.0, "alpha": 2.0}
        s = ms.System.create(places + shift, 9.0, ms.potentials.soft_sphere(), params)
        assert float(potential_energy(s)) == pytest.approx(2 * 81 * 0.5 * (1 - 1 / 1.1) ** 2, rel=1e-12)


def test_allocation_ends_where_the_first_cell_is_the_fullest():
    places = np.random.default_rng(0).random((120, 2)) * [1.0, 8.0]
    places[:, 0] = np.where(np.arange(120) % 2, -1e-18, 0.01)  # half of them wrap to the other side
    roomy = dataclasses.replace(system("random 2-D").neighbours, pairs=jnp.zeros((2, 2000), jnp.int32))
    found = neighbours.allocate(jnp.asarray(places), 8.0 * jnp.eye(2), 0.5, like=roomy)
    assert found.cells and lost(system("random 2-D"), found.pairs, places, 8.0 * np.eye(2), 0.5) == 0


# ── updates ──


@pytest.mark.parametrize("name", ["random 2-D", "open 2-D", "random 3-D"])
def test_no_pair_is_missing_unless_the_list_says_so(name):
    """Random moves of every size, in cells that deform, clumped and spread: complete, or marked."""
    s = system(name)
    rng = np.random.default_rng(11)
    before, reach = s.neighbours, float(s.range)
    seen = {"kept": 0, "rebuilt": 0, "overflowed": 0}
    for trial in range(60):
        size = 10.0 ** rng.uniform(-3, 0.5)
        d = s.dimension
        deformation = np.eye(d) + min(size, 0.05) * rng.uniform(-1, 1, (d, d))
        positions = np.asarray(s.positions) @ deformation.T
        if trial % 3 == 2:  # towards a clump
            positions = positions * rng.uniform(0.2, 1.0)
        positions = jnp.asarray(positions + size * rng.uniform(-1, 1, positions.shape))
        box = None if s.box is None else jnp.asarray(deformation @ np.asarray(s.box))
        after, rebuilt = neighbours.update(before, positions, box, s.range)
        assert before.pairs.shape == after.pairs.shape
        missing = lost(s, after.pairs, positions, box, reach)
        if bool(after.overflowed):
            seen["overflowed"] += 1
        else:
            assert missing == 0
            seen["rebuilt" if bool(rebuilt) else "kept"] += 1
            if not bool(rebuilt):
                assert np.array_equal(after.pairs, before.pairs)
    assert min(seen.values()) > 2, seen


def test_a_list_lost_in_moves_would_be_noticed():
    """The check above can fail: without the update, large moves do lose pairs."""
    s = system("random 2-D")
    moved = np.asarray(s.positions) + np.random.default_rng(1).uniform(-1, 1, (N, 2))
    assert lost(s, s.neighbours.pairs, moved, s.box, float(s.range)) > 5


def test_update_inside_of_jit_and_its_energy():
    s = system("random 2-D")

    @jax.jit
    def energy(positions):
        found, rebuilt = neighbours.update(s.neighbours, positions, s.box, s.range)
        return potential_energy(s.replace(neighbours=found), positions), found.overflowed, rebuilt

    noise = np.random.default_rng(2).uniform(-1, 1, (N, 2))
    for size, again in ((1e-3, False), (0.5, True)):
        moved = s.positions + size * noise
        value, overflowed, rebuilt = energy(moved)
        assert bool(rebuilt) == again and not bool(overflowed)
        assert float(value) == pytest.approx(brute_force(s.replace(positions=moved))[0], rel=1e-12)


def test_uniform_deformation_keeps_the_list_as_far_as_its_skin_allows():
    s = system("random 2-D")
    assert s.box is not None
    kept = neighbours.update(s.neighbours, 0.9 * s.positions, 0.9 * s.box, s.range)
    assert not bool(kept[1]) and lost(s, kept[0].pairs, 0.9 * s.positions, 0.9 * s.box, float(s.range)) == 0
    rebuilt = neighbours.update(s.neighbours, 0.75 * s.positions, 0.75 * s.box, s.range)
    assert bool(rebuilt[1])


# ── overflow ──


def stale(found: neighbours.Neighbours, **changes) -> neighbours.Neighbours:
    """The list as if every particle had moved far, so that the next update rebuilds it."""
    assert found.reference is not None
    return dataclasses.replace(found, reference=found.reference + 3.0 * found.reach, **changes)


def test_a_list_too_short_by_one_pair_is_marked():
    s = system("random 2-D")
    count = int(jnp.sum(s.neighbours.pairs[0] < N))
    for capacity, overflowed in ((count, False), (count - 1, True)):
        short = stale(s.neighbours, pairs=jnp.full((2, capacity), N, jnp.int32))
        after, rebuilt = neighbours.update(short, s.positions, s.box, s.range)
        assert bool(rebuilt) and bool(after.overflowed) == overflowed
        assert (lost(s, after.pairs, s.positions, s.box, float(s.neighbours.reach)) > 0) == overflowed


def test_an_overflowing_cell_is_marked():
    s = system("random 2-D")
    assert s.neighbours.cells >= 3
    after, _ = neighbours.update(stale(s.neighbours, cell_capacity=1), s.positions, s.box, s.range)
    assert bool(after.overflowed)


def test_overflow_stays_until_the_host_allocates_again():
    s = system("random 2-D")
    marked = dataclasses.replace(s.neighbours, overflowed=jnp.ones((), bool))
    assert bool(neighbours.update(marked, s.positions, s.box, s.range)[0].overflowed)
    assert not bool(s.replace(neighbours=marked).reallocate().neighbours.overflowed)
    assert not bool(s.replace(neighbours=marked).reallocate(keep=True).neighbours.overflowed)


def test_a_range_beyond_the_reach_is_marked_in_traced_code_and_rebuilt_on_the_host():
    s = system("random 2-D")
    reach = float(s.neighbours.reach)
    for needed, overflowed in ((0.99 * reach, False), (1.01 * reach, True)):
        after, _ = neighbours.update(s.neighbours, s.positions, s.box, jnp.asarray(needed))
        assert bool(after.overflowed) == overflowed
    grown = s.with_params({"sigma": 1.5 * s.params["sigma"]})
    assert float(grown.neighbours.reach) > reach
    agrees(grown)
    within = s.with_params({"sigma": 1.1 * s.params["sigma"]})
    assert np.array_equal(within.neighbours.pairs, s.neighbours.pairs)  # still complete: kept
    agrees(within)


def test_a_cell_too_small_for_the_range_is_marked_and_refused():
    s = system("random 2-D")
    assert s.box is not None
    tiny = s.box * 0.3
    for found in (s.neighbours, dataclasses.replace(s.neighbours, reference=None)):
        assert bool(neighbours.update(found, 0.3 * s.positions, tiny, s.range)[0].overflowed)
    with pytest.raises(ms.InputError, match="repeat the cell, or shorten the cutoff"):
        neighbours.allocate(0.3 * s.positions, tiny, float(s.range))


def test_small_systems_and_tight_cells_list_all_pairs():
    few = neighbours.allocate(system("random 2-D").positions[:30], jnp.asarray(CELL_2D), 1.2)
    assert few.complete and few.pairs.shape == (2, 30 * 29 // 2)
    tight = neighbours.allocate(system("random 2-D").positions, 3.0 * jnp.eye(2), 1.49)
    assert tight.complete and tight.pairs.shape == (2, N * (N - 1) // 2)


# ── batches ──


@cache
def batch() -> tuple[list[ms.System], ms.System]:
    rng = np.random.default_rng(3)
    members = []
    for length, spread in ((12.0, 1.0), (9.0, 1.0), (12.0, 0.7)):  # loose, dense, clumped: other cells and capacities
        params = {"sigma": rng.uniform(0.9, 1.1, N), "epsilon": 1.0, "alpha": 2.0}
        places = length * spread * rng.random((N, 2))
        members.append(ms.System.create(places, length, ms.potentials.soft_sphere(), params))
    return members, ms.stack(members)


def test_a_batch_keeps_every_pair_of_its_members():
    members, whole = batch()
    assert len({(m.neighbours.cells, m.neighbours.pairs.shape) for m in members}) == 3
    assert whole.batch == 3 and not np.any(whole.neighbours.overflowed)
    energies = jax.jit(jax.vmap(potential_energy))(whole)
    for member, alone, energy in zip(members, ms.unstack(whole), energies, strict=True):
        assert alone.batch is None
        np.testing.assert_array_equal(alone.positions, member.positions)
        assert float(energy) == pytest.approx(brute_force(member)[0], rel=1e-12)
        assert lost(alone, alone.neighbours.pairs, alone.positions, alone.box, float(alone.range)) == 0


def test_a_batch_makes_room_where_the_coarsest_grid_has_fuller_cells():
    rng = np.random.default_rng(0)
    loose = 6.2 * rng.random((N, 2))  # four cells a side
    corner = np.where(np.arange(N)[:, None] < 60, 0.6 + 0.07 * (rng.random((N, 2)) - 0.5), rng.random((N, 2)))
    params = {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0}  # five cells, and a clump where four of them meet
    members = [
        ms.System.create(places, length, ms.potentials.soft_sphere(), params)
        for places, length in ((loose, 6.2), (7.45 * corner, 7.45))
    ]
    assert [m.neighbours.cells for m in members] == [4, 5]
    whole = ms.stack(members)
    assert not np.any(whole.neighbours.overflowed)
    for s in ms.unstack(whole):
        assert lost(s, s.neighbours.pairs, s.positions, s.box, float(s.range)) == 0


def test_a_batch_updates_under_vmap_and_marks_the_member_that_overflows():
    _, whole = batch()
    moved = whole.positions.at[1].multiply(0.1)  # the second collapses
    after, rebuilt = jax.vmap(lambda s, R: neighbours.update(s.neighbours, R, s.box, s.range))(whole, moved)
    assert np.array_equal(after.overflowed, [False, True, False]) and np.array_equal(rebuilt, [False, True, False])
