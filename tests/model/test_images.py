"""Cells smaller than twice the range, and systems that are not periodic along every axis.

The reference is a sum over explicit images in numpy.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mdsens as ms
from mdsens._util.errors import TooLargeError
from mdsens.mechanics.hessian import dense_hessian, force, sparse_hessian
from mdsens.model.system import listed, pair_lengths, potential_energy

LJ = ms.potentials.lennard_jones(2.0, 2.5)
UNIT = {"sigma": 1.0, "epsilon": 1.0}
SKEWED = np.array([[1.7, 0.9, -0.6], [0.0, 1.5, 0.7], [0.2, 0.0, 1.6]])
# periodic axes, particles
CASES = [
    ((True, True, True), 1),
    ((True, True, True), 2),
    ((True, True, False), 3),
    ((False, True, True), 1),
    ((False, False, True), 3),
    ((True, True), 2),
    ((False, True), 3),
]


def system_of(periodic: tuple[bool, ...], n: int, seed: int = 0) -> ms.System:
    """Particles about 1.1 apart in a skewed cell, stored up to three cells away from it."""
    d = len(periodic)
    rng = np.random.default_rng(seed)
    cell = SKEWED[:d, :d] @ (np.eye(d) + 0.05 * rng.standard_normal((d, d)))
    diagonal = np.full(d, 1.1 / np.sqrt(d))
    places = np.arange(n)[:, None] * diagonal + 0.02 * rng.standard_normal((n, d))
    away = rng.integers(-3, 4, (n, d)) * np.array(periodic)
    return ms.System.create(places + away @ cell.T, cell, LJ, UNIT, periodic=periodic)


def lennard_jones(r: np.ndarray) -> np.ndarray:
    x = np.clip((r - 2.0) / 0.5, 0.0, 1.0)
    s6 = r**-6.0
    return 4.0 * (s6**2 - s6) * (1.0 - x**3 * (10.0 - 15.0 * x + 6.0 * x**2))


def brute_force(s: ms.System, positions: np.ndarray, box: np.ndarray) -> float:
    """Energy of all images up to nine cells away."""
    energy = 0.0
    for t in itertools.product(*[range(-9, 10) if p else (0,) for p in s.periodic]):
        vectors = positions[None] - positions[:, None] + box @ np.array(t)
        r = np.linalg.norm(vectors, axis=-1)
        if not any(t):
            np.fill_diagonal(r, np.inf)
        energy += 0.5 * float(np.sum(lennard_jones(r)))
    return energy


def shifted(s: ms.System) -> np.ndarray:
    """The positions inside of the cell, for a sum over the images next to it."""
    box = np.asarray(s.box)
    fractions = np.asarray(s.positions) @ np.linalg.inv(box).T
    return np.asarray(s.positions) - (np.floor(fractions) * np.array(s.periodic)) @ box.T


@pytest.mark.parametrize(("periodic", "n"), CASES)
def test_energy_forces_and_hessian_are_those_of_explicit_images(periodic, n):
    s = system_of(periodic, n)
    assert s.neighbors.images is not None
    box = np.asarray(s.box)
    expected = brute_force(s, shifted(s), box)
    assert float(potential_energy(s)) == pytest.approx(expected, rel=1e-13)
    # forces by differences of the sum
    step = 1e-6
    numeric = np.zeros(s.positions.shape)
    for k, a in np.ndindex(numeric.shape):
        places = shifted(s)
        energies = []
        for sign in (1.0, -1.0):
            places[k, a] += sign * step
            energies.append(brute_force(s, places, box))
            places[k, a] -= sign * step
        numeric[k, a] = -(energies[0] - energies[1]) / (2.0 * step)
    got = np.asarray(force(s))
    np.testing.assert_allclose(got, numeric, atol=2e-7 * max(1.0, np.abs(got).max()))
    matrix = sparse_hessian(s)
    dense = np.asarray(dense_hessian(s))
    assert matrix is not None
    np.testing.assert_allclose(matrix.toarray(), dense, atol=1e-12 * max(1.0, np.abs(dense).max()))


@pytest.mark.parametrize(("periodic", "n"), [((True, True, True), 2), ((False, True), 3)])
def test_a_strain_moves_every_image(periodic, n):
    s = system_of(periodic, n)
    d = len(periodic)
    # no strain along an open axis, whose normal would turn
    along = np.asarray(s.box)[:, list(periodic)]
    projector = along @ np.linalg.pinv(along)
    strain = 1e-2 * projector @ np.random.default_rng(1).standard_normal((d, d)) @ projector
    strain = 0.5 * (strain + strain.T)
    deformed = np.eye(d) + strain
    expected = brute_force(s, shifted(s) @ deformed.T, deformed @ np.asarray(s.box))
    got = float(potential_energy(s, strain=jnp.asarray(strain)))
    assert got == pytest.approx(expected, rel=1e-13)


def test_each_pair_is_there_once_and_in_both_columns():
    s = system_of((True, True, True), 2)
    columns = s.neighbors.columns
    assert columns.images is not None
    entries = set()
    for k, i in np.argwhere(np.asarray(columns.j) < s.n):
        entries.add((i, int(columns.j[k, i]), *np.asarray(columns.images[k, i]).tolist()))
    assert all((j, i, *(-t for t in image)) in entries for i, j, *image in entries)
    assert any(i == j for i, j, *_ in entries)
    pairs = s.neighbors.pairs
    assert pairs.images is not None
    real = np.flatnonzero(np.asarray(pairs.i) < s.n)
    once = {(int(pairs.i[m]), int(pairs.j[m]), *np.asarray(pairs.images[m]).tolist()) for m in real}
    assert 2 * len(once) == len(entries) and once <= entries


@pytest.mark.parametrize(("periodic", "n"), [((True, True, True), 2), ((True, True, False), 3)])
def test_no_pair_is_missing_unless_the_list_says_so(periodic, n):
    """Moves and deformations of many sizes, in compiled code: right, or marked."""
    s = system_of(periodic, n)
    update = jax.jit(lambda s: listed(s)[0])
    rng = np.random.default_rng(3)
    d = len(periodic)
    outcomes = set()
    for size in (1e-3, 1e-2, 0.1, 0.2, 0.3, 0.5):
        move = size * rng.standard_normal(s.positions.shape) * 0.3
        cell = np.asarray(s.box) @ (np.eye(d) + size * np.diag(rng.uniform(-1, 0.4, d)))
        cell[:, ~np.array(periodic)] = np.asarray(s.box)[:, ~np.array(periodic)]
        if not all(periodic):
            cell = np.asarray(s.box)
        moved = s.replace(
            positions=s.positions + move, boundary=ms.model.box.FixedBox(jnp.asarray(cell))
        )
        after = moved.replace(neighbors=update(moved))
        outcomes.add(bool(after.neighbors.overflowed))
        if bool(after.neighbors.overflowed):
            after = after.reallocate()
        expected = brute_force(after, shifted(after), np.asarray(after.box))
        assert float(potential_energy(after)) == pytest.approx(expected, rel=1e-12)
    assert False in outcomes


def test_a_cell_that_shrinks_past_twice_the_range_gets_images_from_the_host():
    s = ms.System.create(np.zeros((1, 2)), 5.2, LJ, UNIT)
    assert s.neighbors.images is None
    smaller = s.replace(boundary=ms.model.box.FixedBox(4.8 * jnp.eye(2)))
    assert bool(jax.jit(listed)(smaller)[0].overflowed)
    again = smaller.reallocate(keep=True)
    assert again.neighbors.images is not None and not bool(again.neighbors.overflowed)


def test_systems_with_and_without_images_form_a_batch():
    small, large = system_of((True, True, True), 2, 1), system_of((True, True, True), 2, 2)
    large = large.replace(boundary=ms.model.box.FixedBox(6.0 * jnp.eye(3))).reallocate()
    assert large.neighbors.images is None
    batch = ms.stack([small, large])
    assert not np.any(np.asarray(batch.neighbors.overflowed))
    energies = jax.jit(jax.vmap(potential_energy))(batch)
    for member, energy in zip((small, large), energies, strict=True):
        assert float(energy) == pytest.approx(float(potential_energy(member)), rel=1e-13)


def test_bad_input_is_refused_with_the_remedy():
    places = np.array([[0.0, 0.0, 0.0], [0.7, 0.7, 0.7]])
    cell = np.diag([1.5, 1.5, 1.5])
    with pytest.raises(ms.InputError, match=r"more than the 12. that are possible.*wrap"):
        ms.System.create(np.array([[0.0, 0, 0], [300.7, 0, 0]]), cell, LJ, UNIT)
    far = ms.potentials.lennard_jones(100.0, 2000.0)
    with pytest.raises(TooLargeError, match=r"neighbors for each of 2 particles.*shorten"):
        ms.System.create(places, cell, far, UNIT)
    with pytest.raises(ms.InputError, match=r"`periodic` is \(True, False\): give True, False"):
        ms.System.create(places, cell, LJ, UNIT, periodic=(True, False))
    with pytest.raises(ms.InputError, match="no extent along its periodic axes"):
        ms.System.create(places, np.diag([1.5, 0, 0]), LJ, UNIT, periodic=(True, True, False))
    soft = ms.potentials.soft_sphere()
    params = {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0}
    with pytest.raises(ms.InputError, match="needs a volume: give periodic=True"):
        ms.System.create(
            places, ms.PackingFraction(0.5), soft, params, periodic=(True, True, False)
        )
    # two atoms at one point, by way of an image
    with pytest.raises(
        ms.InputError, match=r"positions\[0\] and positions\[1\] are the same point"
    ):
        ms.System.create(np.array([[0.0, 0, 0], [1.5, 0, 0]]), cell, LJ, UNIT)


def test_open_sides_are_unit_normals_of_the_others():
    slab = ms.System.create(
        np.zeros((1, 3)),
        [[1.5, 0.5, 0], [0, 1.4, 0], [0.3, 0, 0]],
        LJ,
        UNIT,
        periodic=(True, True, False),
    )
    box = np.asarray(slab.box)
    assert np.linalg.norm(box[:, 2]) == pytest.approx(1.0) and np.linalg.det(box) > 0
    np.testing.assert_allclose(box[:, :2].T @ box[:, 2], 0.0, atol=1e-15)
    wire = ms.System.create(
        np.zeros((1, 3)),
        [[0, 0, 0.1], [0, 0, 0.2], [0, 0, 1.4]],
        LJ,
        UNIT,
        periodic=(False, False, True),
    )
    box = np.asarray(wire.box)
    np.testing.assert_allclose(box[:, :2].T @ box, np.eye(3)[:2], atol=1e-15)
    assert ms.System.create(np.zeros((1, 3)), 1.5, LJ, UNIT, periodic=False).box is None


def test_what_has_no_volume_has_no_stress_or_moduli():
    slab = system_of((True, True, False), 3)
    assert not slab.has_volume and np.isinf(float(slab.volume))
    message = "a volume, and this system is not periodic along cell vector 3"
    for f in (ms.observables.stress, ms.observables.pressure, ms.observables.volume):
        with pytest.raises(ms.InputError, match=message):
            f(slab)
    with pytest.raises(ms.InputError, match=message):
        ms.elasticity.moduli(slab)


def test_the_list_of_a_small_cell_serves_observables_of_pairs():
    s = system_of((True, True, True), 2)
    near = ms.observables.pairs_within(s, 2.0)
    # twice as large a cell: eight copies of the particles
    box = np.asarray(s.box)
    steps = np.array(list(itertools.product((0, 1), repeat=3))) @ box.T
    copies = (shifted(s)[None] + steps[:, None]).reshape(-1, 3)
    larger = ms.System.create(copies, 2.0 * box, LJ, UNIT)
    radii = [0.9, 1.2, 1.6]
    got = ms.observables.radial_distribution(s, radii, 0.05, near)
    expected = ms.observables.radial_distribution(
        larger, radii, 0.05, ms.observables.pairs_within(larger, 2.0)
    )
    # both count 2 n neighbors of n particles: g(r) is over n - 1 others
    np.testing.assert_allclose(
        got * (s.n - 1) / s.n, expected * (larger.n - 1) / larger.n, rtol=1e-12
    )
    assert float(pair_lengths(s)(jnp.zeros(1, int), jnp.zeros(1, int))) == 2.5
