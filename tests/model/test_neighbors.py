"""A list never loses a pair in silence: against brute force,
after moves and deformations, at every overflow.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import packing
from scipy.spatial import KDTree

import mdsens as ms
from mdsens.model import neighbors
from mdsens.model.system import listed, pair_lengths, potential_energy
from mdsens.observables.pairs import _Range

N = 100
CELL_2D = np.array([[7.2, -1.5], [2.0, 7.6]])  # not triangular
CELL_3D = np.array([[5.6, 0.6, -0.5], [0.8, 5.9, 0.7], [-0.4, 0.5, 5.7]])


@pytest.fixture(autouse=True, scope="module")
def short_lists_as_well():
    """Lists from 33 particles on, wherever all pairs may be faster."""
    with mock.patch.object(neighbors, "ALL_PAIRS_BELOW", 32):
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
    unstack_tree = vectors(s.positions, s.box)
    r = np.linalg.norm(unstack_tree, axis=2) + np.eye(s.n) * 1e9
    mean = 0.5 * (sigma[:, None] + sigma[None])
    overlap = np.maximum(1 - r / mean, 0)
    return 0.25 * np.sum(overlap**2), -np.sum(
        (overlap / mean / r)[:, :, None] * unstack_tree, axis=1
    )


def lost(s: ms.System, found: neighbors.Neighbors, positions, box, skin=0.0) -> int:
    """How many pairs nearer than the length they interact at,
    and a skin, are not in the rows of both.
    """
    r = np.linalg.norm(vectors(positions, box), axis=2)
    i, j = np.nonzero(~np.eye(s.n, dtype=bool) & (r < lengths(s) + skin))
    columns, rows = np.broadcast_to(np.arange(s.n), found.rows.shape), np.asarray(found.rows)
    listed = set(zip(columns.ravel().tolist(), rows.ravel().tolist(), strict=True))
    return len(set(zip(i.tolist(), j.tolist(), strict=True)) - listed)


def lengths(s: ms.System) -> np.ndarray:
    """(n, n) mean diameters."""
    assert s.diameters is not None
    sigma = np.asarray(s.diameters)
    return 0.5 * (sigma[:, None] + sigma[None])


def update(s: ms.System, found=None, positions=None, box=None, **how):
    """The list ``found`` brought up to date, in the system's cell
    and at its positions where not given.
    """
    at = s.positions if positions is None else positions
    cell = s.box if box is None else box
    return neighbors.update(
        s.neighbors if found is None else found, at, cell, pair_lengths(s), s.range, **how
    )


def agrees(s: ms.System) -> None:
    assert not bool(s.neighbors.overflowed)
    energy, slope = energy_and_slope(s.positions, s)
    expected = brute_force(s)
    assert float(energy) == pytest.approx(expected[0], rel=1e-12)
    # the round-off of positions times the stiffness of a pair, 1,
    # bounds it at a minimum, where forces cancel
    assert np.abs(slope - expected[1]).max() < 1e-13 * max(np.abs(expected[1]).max(), 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_energy_and_gradient_by_a_list_are_those_of_all_pairs(name):
    assert not system(name).neighbors.complete  # it is a list that is tested
    agrees(system(name))


@pytest.mark.parametrize("name", NAMES)
def test_each_pair_is_listed_once(name):
    pairs = np.stack(system(name).neighbors.pairs[:2])
    rows = np.asarray(system(name).neighbors.rows)
    assert pairs.shape[1] == rows.size and 2 * np.sum(pairs[0] < system(name).n) == np.sum(
        rows < system(name).n
    )
    real = np.sort(pairs[:, pairs[0] < system(name).n], axis=0)
    assert np.all(real[0] != real[1])
    assert len({tuple(p) for p in real.T.tolist()}) == real.shape[1]


def test_single_precision_loses_no_pair():
    """In a cell of many ranges, where a change to its coordinates
    at less than full precision would misplace many.
    """
    n, angle = 20_000, 0.3
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    length = np.sqrt(n)
    places = np.random.default_rng(5).random((n, 2)) * length
    near = KDTree(places, boxsize=length).query_pairs(1.0 - 1e-4, output_type="ndarray")
    R, cell = (places @ turn.T).astype(np.float32), (length * turn).astype(np.float32)
    s = ms.System.create(
        R[::-1], cell, ms.potentials.soft_sphere(), {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0}
    )
    found, rebuilt = jax.jit(listed)(s, jnp.asarray(R))
    assert (
        rebuilt
        and found.skin.dtype == jnp.float32
        and not found.complete
        and not bool(found.overflowed)
    )
    pairs = np.stack(found.pairs[:2])
    keys = np.sort(pairs[:, np.all(pairs < n, axis=0)], axis=0)
    assert np.all(np.isin(np.min(near, axis=1) * n + np.max(near, axis=1), keys[0] * n + keys[1]))


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
        assert float(potential_energy(s)) == pytest.approx(
            2 * 81 * 0.5 * (1 - 1 / 1.1) ** 2, rel=1e-12
        )


def test_allocation_ends_where_the_first_cell_is_the_fullest():
    places = np.random.default_rng(0).random((120, 2)) * [1.0, 8.0]
    places[:, 0] = np.where(np.arange(120) % 2, -1e-18, 0.01)  # half of them wrap to the other side
    s = ms.System.create(
        places, 8.0, ms.potentials.soft_sphere(), {"sigma": 0.5, "epsilon": 1.0, "alpha": 2.0}
    )
    roomy = system("random 2-D").neighbors.resized(90)
    found = neighbors.allocate(s.positions, s.box, pair_lengths(s), 0.5, like=roomy)
    assert (
        found.cells is not None
        and found.rows.shape[0] == 90
        and lost(s, found, places, s.box, 0.99 * float(found.skin)) == 0
    )


# ── updates ──


@pytest.mark.parametrize("name", ["random 2-D", "open 2-D", "random 3-D"])
def test_no_pair_is_missing_unless_the_list_says_so(name):
    """Random moves of every size, in cells that deform, clumped and spread: complete, or marked."""
    s = system(name)
    rng = np.random.default_rng(11)
    before = s.neighbors
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
        after, rebuilt = neighbors.update(before, positions, box, pair_lengths(s), s.range)
        assert before.rows.shape == after.rows.shape
        missing = lost(s, after, positions, box)
        if bool(after.overflowed):
            seen["overflowed"] += 1
        else:
            assert missing == 0
            seen["rebuilt" if bool(rebuilt) else "kept"] += 1
            if not bool(rebuilt):
                assert np.array_equal(after.rows, before.rows)
    assert min(seen.values()) > 2, seen


def test_a_list_lost_in_moves_would_be_noticed():
    """The check above can fail: without the update, large moves do lose pairs."""
    s = system("random 2-D")
    moved = np.asarray(s.positions) + np.random.default_rng(1).uniform(-1, 1, (N, 2))
    assert lost(s, s.neighbors, moved, s.box) > 5


def test_update_inside_of_jit_and_its_energy():
    s = system("random 2-D")

    @jax.jit
    def energy(positions):
        found, rebuilt = listed(s, positions)
        return potential_energy(s.replace(neighbors=found), positions), found.overflowed, rebuilt

    noise = np.random.default_rng(2).uniform(-1, 1, (N, 2))
    for size, again in ((1e-3, False), (0.5, True)):
        moved = s.positions + size * noise
        value, overflowed, rebuilt = energy(moved)
        assert bool(rebuilt) == again and not bool(overflowed)
        assert float(value) == pytest.approx(brute_force(s.replace(positions=moved))[0], rel=1e-12)


def test_uniform_deformation_keeps_the_list_as_far_as_its_skin_allows():
    s = system("random 2-D")
    assert s.box is not None
    kept = update(s, None, 0.95 * s.positions, 0.95 * s.box)
    assert not bool(kept[1]) and lost(s, kept[0], 0.95 * s.positions, 0.95 * s.box) == 0
    rebuilt = update(s, None, 0.8 * s.positions, 0.8 * s.box)
    assert bool(rebuilt[1])


def test_a_skin_is_what_is_asked_for_where_a_list_is_made_anew():
    s = system("random 2-D")
    found, rebuilt = update(s, skin=0.05, anew=True)
    assert bool(rebuilt) and float(found.skin) == pytest.approx(0.05 * float(s.range))
    assert lost(s, found, s.positions, s.box, 0.99 * float(found.skin)) == 0
    assert int(found.used) < int(s.neighbors.used)
    assert not bool(update(s, skin=0.05)[1])  # what is complete is kept


# ── overflow ──


def stale(found: neighbors.Neighbors, **changes) -> neighbors.Neighbors:
    """The list as if every particle had moved far, so that the next update rebuilds it."""
    assert found.reference is not None
    return dataclasses.replace(found, reference=found.reference + 20.0 * found.skin, **changes)


def test_a_list_too_short_by_one_row_is_marked():
    s = system("random 2-D")
    most = int(s.neighbors.used)
    for capacity, overflowed in ((most, False), (most - 1, True)):
        after, rebuilt = update(s, stale(s.neighbors).resized(capacity))
        assert bool(rebuilt) and bool(after.overflowed) == overflowed
        assert (
            lost(s, after, s.positions, s.box, 0.99 * float(s.neighbors.skin)) > 0
        ) == overflowed


def test_an_overflowing_run_of_cells_is_marked():
    s = system("random 2-D")
    assert min(s.neighbors.grid.visited) == 3
    after, _ = update(
        s, stale(s.neighbors, grid=dataclasses.replace(s.neighbors.grid, run_capacity=1))
    )
    assert bool(after.overflowed)


def test_overflow_stays_until_the_host_allocates_again():
    s = system("random 2-D")
    marked = dataclasses.replace(s.neighbors, overflowed=jnp.ones((), bool))
    assert bool(update(s, marked)[0].overflowed)
    assert not bool(s.replace(neighbors=marked).reallocate().neighbors.overflowed)
    assert not bool(s.replace(neighbors=marked).reallocate(keep=True).neighbors.overflowed)


def test_other_lengths_are_a_new_list_in_traced_code_and_on_the_host():
    s = system("random 2-D")
    # at 1.6 larger than the cells of the grid
    for factor, overflowed in ((1.0, False), (1.1, False), (1.6, True)):
        grown = s.replace(params={**s.params, "sigma": factor * s.params["sigma"]})
        after, rebuilt = listed(grown)
        assert bool(rebuilt) == (factor > 1) and bool(after.overflowed) == overflowed
        assert overflowed or lost(grown, after, s.positions, s.box) == 0
    for factor in (0.5, 1.1, 1.6):
        agrees(s.with_params({"sigma": factor * s.params["sigma"]}))


def test_a_range_that_was_zero_gets_its_pairs_where_it_grows():
    repulsion = ms.potentials.from_pair(
        lambda r, s: jnp.where(r < s, (s - r) ** 2 / 2, 0.0), ("s",), cutoff=lambda s: s
    )
    places = np.array([[0.0, 0.0], [0.9, 0.0], [1.8, 0.0]])
    without = ms.System.create(places, 4.0, repulsion, {"s": 0.0})
    assert without.neighbors.rows.shape[0] == 0
    assert float(ms.observables.energy(without.with_params({"s": 1.0}))) == pytest.approx(0.01)
    # traced code cannot make a list: it marks the empty one
    traced, _ = jax.jit(lambda s: listed(without.replace(params={"s": s}), without.positions))(1.0)
    assert bool(traced.overflowed)
    traced, _ = jax.jit(lambda s: listed(without.replace(params={"s": s}), without.positions))(0.0)
    assert not bool(traced.overflowed)


def test_a_cell_too_small_for_the_range_is_marked_and_gets_images():
    s = system("random 2-D")
    assert s.box is not None
    tiny = s.box * 0.3
    for found in (s.neighbors, neighbors.all_pairs(N)):
        assert bool(update(s, found, 0.3 * s.positions, tiny)[0].overflowed)
    found = neighbors.allocate(0.3 * s.positions, tiny, pair_lengths(s), float(s.range))
    assert found.images is not None and found.grid.reach == (1, 1)


def test_small_systems_list_all_pairs_and_tight_cells_list_images():
    s = system("random 2-D")
    few = neighbors.allocate(s.positions[:30], s.box, pair_lengths(s), 1.2)
    assert few.complete and few.rows.shape == (29, 30)
    assert {tuple(sorted(p)) for p in np.stack(few.pairs[:2]).T.tolist() if p[0] < 30} == set(
        zip(*(k.tolist() for k in np.triu_indices(30, 1)), strict=True)
    )
    tight = neighbors.allocate(s.positions, 3.0 * jnp.eye(2), pair_lengths(s), 1.49)
    assert tight.images is not None and not tight.complete


# ── batches ──


@cache
def batch() -> tuple[list[ms.System], ms.System]:
    rng = np.random.default_rng(3)
    members = []
    # loose, dense, clumped: other cells and capacities
    for length, spread in ((12.0, 1.0), (9.0, 1.0), (12.0, 0.7)):
        params = {"sigma": rng.uniform(0.9, 1.1, N), "epsilon": 1.0, "alpha": 2.0}
        places = length * spread * rng.random((N, 2))
        members.append(ms.System.create(places, length, ms.potentials.soft_sphere(), params))
    return members, ms.stack(members)


def test_a_batch_keeps_every_pair_of_its_members():
    members, whole = batch()
    lists = [m.neighbors for m in members]
    assert len({(tuple(np.asarray(x.cells).tolist()), x.rows.shape) for x in lists}) == 3
    assert whole.batch == 3 and not np.any(whole.neighbors.overflowed)
    energies = jax.jit(jax.vmap(potential_energy))(whole)
    for member, alone, energy in zip(members, ms.unstack(whole), energies, strict=True):
        assert alone.batch is None
        np.testing.assert_array_equal(alone.positions, member.positions)
        assert float(energy) == pytest.approx(brute_force(member)[0], rel=1e-12)
        assert lost(alone, alone.neighbors, alone.positions, alone.box) == 0


def test_a_batch_makes_room_where_the_coarsest_grid_has_fuller_cells():
    rng = np.random.default_rng(0)
    loose = 6.2 * rng.random((N, 2))  # four cells a side
    corner = np.where(
        np.arange(N)[:, None] < 60, 0.6 + 0.07 * (rng.random((N, 2)) - 0.5), rng.random((N, 2))
    )
    # five cells, and a clump where four of them meet
    params = {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0}
    members = [
        ms.System.create(places, length, ms.potentials.soft_sphere(), params)
        for places, length in ((loose, 6.2), (7.45 * corner, 7.45))
    ]
    assert [np.asarray(m.neighbors.cells).tolist() for m in members] == [[4, 4], [5, 5]]
    whole = ms.stack(members)
    assert not np.any(whole.neighbors.overflowed)
    for s in ms.unstack(whole):
        assert lost(s, s.neighbors, s.positions, s.box) == 0


def test_a_batch_updates_under_vmap_and_marks_the_member_that_overflows():
    _, whole = batch()
    moved = whole.positions.at[1].multiply(0.1)  # the second collapses
    after, rebuilt = jax.vmap(listed)(whole, moved)
    assert np.array_equal(after.overflowed, [False, True, False]) and np.array_equal(
        rebuilt, [False, True, False]
    )


def test_a_cell_of_just_twice_the_range_is_taken_alike_by_host_and_compiled_code():
    """They round heights differently; where compiled code refused such a cell,
    minimize asked for a list for ever.
    """
    points = jnp.asarray(np.random.default_rng(0).random((3, 2)))
    for side in np.linspace(2.0, 8.0, 49):
        box, reach = side * jnp.eye(2), jnp.asarray(0.5 * side)
        lengths = _Range(reach)
        found = neighbors.allocate(points, box, lengths, float(reach))
        assert bool(neighbors.serves(found, points, box, lengths, reach))
        assert not bool(neighbors.update(found, points, box, lengths, reach)[0].overflowed)
        assert found.images is None
        smaller = neighbors.allocate(points, (1.0 - 1e-13) * box, lengths, float(reach))
        assert smaller.images is not None


@pytest.mark.parametrize("count", [2, 3])
def test_no_pair_is_lost_of_atoms_on_the_borders_of_grid_cells(count, monkeypatch):
    """Numpy and compiled code put such an atom in different cells, so their counts may differ."""
    import ase.build
    from ase.neighborlist import neighbor_list

    monkeypatch.setattr(neighbors, "fullest_run", lambda *_: 1)  # as wrong as it can be
    atoms = ase.build.bulk("Cu", a=3.615, cubic=True) * count
    potential = ms.potentials.gupta(5.8, 6.2)
    params = {"A": 0.0855, "xi": 1.224, "p": 10.96, "q": 2.278, "r0": 2.556191}
    crystal = ms.io.from_ase(atoms, potential, params)
    reach = 6.2 + float(crystal.neighbors.skin)
    expected = len(neighbor_list("i", atoms, reach))
    assert int(np.sum(np.asarray(crystal.neighbors.rows) < crystal.n)) == expected
    force = np.asarray(ms.mechanics.force(crystal))
    assert np.abs(force).max() < 1e-13


def test_a_cell_too_skewed_is_refused_with_a_remedy():
    cell = np.array([[1.8, 1.8, 0.0], [0.0, 1.8, 1.8], [1.8, 0.0, 1.8]]).T
    skewed = cell @ np.array([[1.0, 300.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    params = {"sigma": 2.3, "epsilon": 1.0}
    potential = ms.potentials.lennard_jones()
    with pytest.raises(ms.InputError, match="shorten the cutoff, or where the cell is skewed"):
        ms.System.create(np.zeros((1, 3)), skewed, potential, params)
