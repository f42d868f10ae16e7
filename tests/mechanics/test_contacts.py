"""Rattlers, clusters and coordination on hand-made configurations and packings;
the first breakpoint along a path.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LONG, PACKINGS, packing, packing_file, relative, relaxed_packing

import mdsens as ms
from mdsens.mechanics import contact_changes, contacts
from mdsens.mechanics.hessian import dense_hessian, max_force
from mdsens.model.system import potential_energy

LAW = ms.potentials.soft_sphere()


def discs(positions, sigma: Any = 1.0, box=None) -> ms.System:
    return ms.System.create(positions, box, LAW, {"sigma": sigma, "epsilon": 1.0, "alpha": 2.0})


# ── hand-made networks ──


def net_of(points, max_force=0.0) -> contacts.Network:
    """The network of unit discs, with loners far away to make nine: one compilation for all."""
    loners = np.array([[50.0 + 3.0 * k, 50.0] for k in range(9 - len(points))]).reshape(-1, 2)
    net = contacts.network(discs(np.concatenate([points, loners])), max_force)
    assert np.all(net.rattlers[len(points) :]) and not np.any(net.contacts[len(points) :])
    return net


# Two overlapping discs do not hold each other (1 contact each: fewer than d + 1, so rattlers both);
# four in a complete graph, overlapping across the diagonals as well, have 3 each.
# diagonals 0.85 < 1: every pair touches
FOUR = 0.6 * np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])


def test_a_complete_square_is_a_network_and_a_pair_is_none():
    square = net_of(FOUR)
    assert not np.any(square.rattlers[:4]) and np.array_equal(square.contacts[:4], [3, 3, 3, 3])
    assert int(square.pairs) == 6
    forces = [1 - 0.6] * 4 + [1 - 0.6 * np.sqrt(2)] * 2
    assert float(square.mean_force) == pytest.approx(np.mean(forces), rel=1e-13)
    assert float(contacts.coordination(discs(FOUR), square)) == 3.0
    pair = net_of(FOUR[:2])
    assert np.all(pair.rattlers) and int(pair.pairs) == 0 and float(pair.mean_force) == 0.0
    assert float(contacts.coordination(discs(FOUR[:2]), pair)) == 0.0


def test_a_chain_of_rattlers_is_removed_to_its_end():
    # a tail hangs on the square; each link rattles only once the one behind it is gone
    tail = np.array([[0.6 + 0.95 * k, -0.02] for k in range(1, 6)])
    system = discs(np.concatenate([FOUR, tail]))
    net = contacts.network(system, 0.0)
    assert np.array_equal(net.rattlers, [False] * 4 + [True] * 5)
    assert np.array_equal(net.contacts, [3] * 4 + [0] * 5) and int(net.pairs) == 6
    assert np.array_equal(net.labels, [0, 0, 0, 0, 4, 5, 6, 7, 8])
    held = contacts.backbone(system, net)
    assert float(potential_energy(held)) == pytest.approx(
        float(potential_energy(discs(FOUR))), rel=1e-13
    )
    assert float(potential_energy(system)) > float(potential_energy(held)) + 1e-3


def test_rattlers_that_touch_are_rattlers():
    pair = np.array([[5.0, 5.0], [5.999, 5.0]])
    net = net_of(np.concatenate([FOUR, pair]))
    assert (
        np.array_equal(net.rattlers[:6], [False] * 4 + [True] * 2) and int(net.contacts.sum()) == 12
    )


def test_a_contact_carries_ten_times_the_largest_net_force():
    weakest = 1 - 0.6 * np.sqrt(2)
    below, above = (net_of(FOUR, f * weakest / 10.0) for f in (0.99, 1.01))
    assert int(below.pairs) == 6
    assert int(above.pairs) == 4  # without the diagonals


def test_what_carries_force_between_two_contacts_is_no_rattler():
    """A row of discs that presses on itself through the cell:
    each has two contacts, where three would hold it.
    """
    row = np.stack([np.arange(12) * (20.0 / 24.0), np.full(12, 10.0)], axis=1)
    net = contacts.network(discs(row, box=10.0), 1e-14)
    assert not np.any(net.rattlers[:12]) and np.array_equal(net.contacts[:12], np.full(12, 2))
    # as one that touches with a force that matters to nobody
    faint = np.concatenate([FOUR, [[5.0, 5.0], [6.0 - 1e-8, 5.0], [7.0 - 2e-8, 5.0]]])
    assert np.all(net_of(faint, 1e-12).rattlers[4:7])


def test_clusters_are_named_by_their_lowest_index():
    apart = np.concatenate([FOUR, FOUR + 7.0])
    order = np.array([5, 0, 3, 6, 2, 7, 1, 4])  # interleaved
    net = net_of(apart[order])
    first = order < 4
    expected = np.where(first, np.flatnonzero(first)[0], np.flatnonzero(~first)[0])
    assert np.array_equal(net.labels[:8], expected)


def test_a_long_chain_is_one_cluster():
    n = 50
    potential = ms.potentials.harmonic_bonds(np.stack([np.arange(n - 1), np.arange(1, n)], 1))
    order = np.random.default_rng(0).permutation(n)
    places = np.zeros((n, 2))
    places[:, 0] = np.arange(n)
    potential = dataclasses.replace(potential, bonds=np.argsort(order)[potential.bonds])
    chain = ms.System.create(places[order], None, potential, {"stiffness": 1.0, "length": 1.0})
    net = contacts.network(chain, 1e-12)
    assert np.array_equal(net.labels, np.zeros(n)) and not np.any(net.rattlers)
    assert sorted(np.asarray(net.contacts)) == [1, 1] + [2] * (n - 2)


def test_contacts_reach_through_the_faces_of_the_cell():
    # the square, cut by both faces; whole only through them
    moved = np.mod(FOUR + 3.7, 4.0)
    assert np.ptp(moved) > 3.0
    net = contacts.network(discs(moved, box=4.0), 0.0)
    assert not np.any(net.rattlers) and int(net.pairs) == 6


def test_a_particle_that_nothing_attracts_is_a_rattler_and_an_unstressed_bond_is_none():
    potential = ms.potentials.lennard_jones()
    places = np.array([[0.0, 0.0, 0.0], [2 ** (1 / 6), 0.0, 0.0], [9.0, 0.0, 0.0]])
    net = contacts.network(
        ms.System.create(places, None, potential, {"sigma": 1.0, "epsilon": 1.0}), 1e-13
    )
    assert np.array_equal(net.rattlers, [False, False, True])
    assert np.array_equal(net.labels, [0, 0, 2]) and int(net.pairs) == 1


# ── packings ──


@cache
def spectrum(name: str, index: int) -> tuple[np.ndarray, np.ndarray, contacts.Network]:
    """Zero modes of the dense Hessian with the rattlers' contacts deleted,
    and of the Hessian as it is.
    """
    eq = relaxed_packing(name, index)
    net = contacts.network(eq.system, eq.max_force)
    held = np.linalg.eigvalsh(dense_hessian(contacts.backbone(eq.system, net)))
    return held, np.linalg.eigvalsh(dense_hessian(eq.system)), net


@pytest.mark.parametrize(
    "name, index", [(PACKINGS[0], 0), pytest.param(PACKINGS[1], 7, marks=LONG)]
)
def test_zero_modes_are_translations_and_rattlers(name, index):
    held, whole, net = spectrum(name, index)
    d = 2 if "2d" in name else 3
    expected = d + d * int(net.rattlers.sum())
    assert np.sum(np.abs(held) < 1e-12 * held[-1]) == expected
    assert held[expected] > 1e-7 * held[-1]  # a gap, not a slope
    # two of the eight rattlers touch, with an overlap of 1e-14: a spring between rattlers
    if index == 7:
        assert expected == 27
        assert np.sum(np.abs(whole) < 1e-12 * whole[-1]) == 25


@pytest.mark.parametrize("name", PACKINGS)
def test_contacts_of_a_packing_are_its_overlapping_pairs(name):
    system = relaxed_packing(name, 0).system
    net = contacts.network(system, max_force(system))
    positions, box, sigma = (
        np.asarray(x) for x in (system.positions, system.box, system.diameters)
    )
    apart = positions[:, None] - positions[None]
    apart -= np.round(apart @ np.linalg.inv(box).T) @ box.T
    overlap = 1 - np.linalg.norm(apart, axis=2) / (0.5 * (sigma[:, None] + sigma[None]))
    touching = (overlap > 1e-11) & ~np.eye(system.n, dtype=bool)
    for _ in range(system.n):  # rattlers, the plain way
        touching &= np.outer(touching.sum(0) > system.dimension, touching.sum(0) > system.dimension)
    assert np.array_equal(net.contacts, touching.sum(0))
    assert np.array_equal(net.rattlers, touching.sum(0) == 0)
    backbone = np.count_nonzero(touching.sum(0))
    assert float(ms.observables.coordination(system)) == pytest.approx(
        touching.sum() / backbone, rel=1e-14
    )
    # isostatic or above
    assert touching.sum() / backbone >= 2 * system.dimension - 2 * system.dimension / backbone


# ── the first breakpoint along a path ──


def test_first_crossing_of_a_hand_made_pair():
    # contact at (sigma_0 + sigma_1) / 2 = 1;
    # r = 0.9, so the gap of 0.1 is crossed when sigma_0 shrinks by 0.2
    system = discs([[0.0, 0.0], [0.9, 0.0], [0.0, 1.5]], sigma=np.ones(3))
    still = jnp.zeros((3, 2))
    change = {"sigma": jnp.array([1.0, 0.0, 0.0]), "epsilon": jnp.zeros(()), "alpha": jnp.zeros(())}
    crossing = contact_changes.crossings(system, still, change)
    assert float(crossing.backward) == pytest.approx(0.2, rel=1e-13)
    assert crossing.first(False)[:2] == ((0, 1), True)
    assert float(crossing.forward) == pytest.approx(1.0, rel=1e-13)  # 0 and 2, 1.5 apart
    assert crossing.first()[:2] == ((0, 2), False)
    # dr/dt = 2 against d sigma / dt = 1/2: the pair opens after 0.1 / 1.5
    away = still.at[1, 0].set(2.0)
    crossing = contact_changes.crossings(system, away, change)
    assert float(crossing.forward) == pytest.approx(0.1 / 1.5, rel=1e-13)
    left_out = contact_changes.crossings(system, away, change, jnp.array([False, True, False]))
    assert float(left_out.forward) == pytest.approx(1.0, rel=1e-13)


def test_nothing_to_cross_is_infinitely_far():
    crossing = contact_changes.crossings(
        discs([[0.0, 0.0], [0.9, 0.0]]),
        jnp.zeros((2, 2)),
        {"sigma": jnp.zeros(()), "epsilon": jnp.ones(()), "alpha": jnp.zeros(())},
    )
    assert (
        float(crossing.forward) == np.inf
        and float(crossing.backward) == np.inf
        and crossing.first() is None
    )


def test_onset_and_cutoff_are_breakpoints():
    potential = ms.potentials.lennard_jones(2.0, 2.5)
    system = ms.System.create(
        [[0.0, 0.0], [2.2, 0.0]], None, potential, {"sigma": 1.0, "epsilon": 1.0}
    )
    velocity = jnp.zeros((2, 2)).at[1, 0].set(1.0)
    crossing = contact_changes.crossings(
        system, velocity, {"sigma": jnp.zeros(()), "epsilon": jnp.zeros(())}
    )
    assert float(crossing.forward) == pytest.approx(0.3, rel=1e-12)  # to the cutoff
    assert float(crossing.backward) == pytest.approx(0.2, rel=1e-12)  # to the onset


def test_first_crossing_of_a_packing_is_where_its_contacts_change():
    """Moving by the derivative itself:
    the contacts are those of the minimum up to the crossing, and others beyond.
    """
    eq = relaxed_packing(PACKINGS[0], 0)
    direction = np.random.default_rng(0).uniform(-1, 1, eq.system.n) * np.asarray(
        eq.params["sigma"]
    )
    change = {k: jnp.zeros_like(v) for k, v in eq.params.items()} | {
        "sigma": jnp.asarray(direction)
    }
    velocity = 0.5 * jnp.asarray(np.random.default_rng(1).standard_normal(eq.positions.shape))
    crossing = contact_changes.crossings(eq.system, velocity, change)

    sides = jnp.diag(jnp.asarray(eq.system.box))

    @jax.jit
    def touching(t):
        sigma = eq.params["sigma"] + t * change["sigma"]
        i, j = jnp.triu_indices(eq.system.n, 1)
        apart = eq.positions[i] - eq.positions[j]
        apart = apart - jnp.round(apart / sides) * sides
        r = jnp.linalg.norm(apart + t * (velocity[i] - velocity[j]), axis=1)
        return r < 0.5 * (sigma[i] + sigma[j])

    i, j = np.triu_indices(eq.system.n, 1)
    for sign, distance in ((1, crossing.forward), (-1, crossing.backward)):
        pair, opens, *_ = crossing.first(sign > 0)
        before, inside, beyond = (
            np.asarray(touching(sign * f * float(distance))) for f in (0.0, 0.99, 1.01)
        )
        assert np.array_equal(before, inside)
        (changed,) = np.nonzero(before != beyond)
        assert [i[changed[0]], j[changed[0]]] == sorted(pair) and len(changed) == 1
        assert opens == before[changed[0]]


def test_files_positions_are_the_minimum_that_the_networks_are_made_on():
    for name in PACKINGS:
        moved = relaxed_packing(name, 0).positions - packing_file(name)["positions"][0]
        assert np.abs(moved - moved.mean(0)).max() < 1e-9
        assert (
            relative(relaxed_packing(name, 0).params["sigma"], packing(name, 0).params["sigma"])
            == 0.0
        )
