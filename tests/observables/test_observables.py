"""Pressure and stress against finite differences by volume and strain,
closed forms, and another code's values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PACKINGS, packing, packing_file, relative, relaxed_packing

import mdsens as ms
from mdsens import observables
from mdsens.model.box import FixedBox
from mdsens.model.system import potential_energy
from mdsens.observables import pairs

LAW = ms.potentials.soft_sphere()


def deformed(system: ms.System, strain: np.ndarray) -> float:
    """The energy of the system after positions and cell are deformed by 1 + strain."""
    deformation = jnp.eye(system.dimension) + jnp.asarray(strain)
    box = deformation @ jnp.asarray(system.box)
    moved = system.replace(positions=system.positions @ deformation.T, boundary=FixedBox(box))
    return float(potential_energy(moved))


def discs() -> ms.System:
    rng = np.random.default_rng(0)
    params = {"sigma": rng.uniform(0.8, 1.2, 12), "epsilon": 1.0, "alpha": 2.5}
    return ms.System.create(3.0 * rng.random((12, 2)), [[3.0, 0.4], [-0.3, 3.2]], LAW, params)


def test_pressure_is_minus_the_slope_of_the_energy_by_volume():
    system = discs()
    h = 1e-5
    # at volumes V (1 ± h)
    ahead, behind = (deformed(system, ((1 + s * h) ** 0.5 - 1) * np.eye(2)) for s in (1, -1))
    central = -(ahead - behind) / (2 * h * float(system.volume))
    assert float(ms.observables.pressure(system)) == pytest.approx(central, rel=1e-7)
    assert central > 0.01  # repulsion pushes outwards


def test_stress_is_the_slope_of_the_energy_by_strain():
    system = discs()
    stress = np.asarray(ms.observables.stress(system))
    np.testing.assert_allclose(stress, stress.T, atol=1e-15)
    h = 1e-6
    for strain in (np.diag([1.0, 0.0]), np.diag([0.0, 1.0]), np.array([[0.0, 0.5], [0.5, 0.0]])):
        central = (deformed(system, h * strain) - deformed(system, -h * strain)) / (
            2 * h * float(system.volume)
        )
        assert np.sum(stress * strain) == pytest.approx(central, rel=1e-6)
    assert float(ms.observables.pressure(system)) == pytest.approx(-np.trace(stress) / 2, rel=1e-15)


def test_a_stretched_spring_pulls():
    potential = ms.potentials.harmonic_bonds([[0, 1]])
    params = {"stiffness": 3.0, "length": 1.0}
    system = ms.System.create([[0.0, 0.0], [1.2, 0.0]], [4.0, 5.0], potential, params)
    tension = 3.0 * 0.2 * 1.2 / 20.0  # force times distance over volume: the virial
    np.testing.assert_allclose(
        ms.observables.stress(system), [[tension, 0.0], [0.0, 0.0]], atol=1e-16
    )
    assert float(ms.observables.pressure(system)) == pytest.approx(-tension / 2, rel=1e-13)
    assert float(ms.observables.energy(system)) == pytest.approx(0.5 * 3.0 * 0.04, rel=1e-13)


def test_overlapping_spheres_push_in_three_dimensions():
    params = {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0}
    system = ms.System.create([[0.0, 0.0, 0.0], [0.0, 0.0, 0.8]], 4.0, LAW, params)
    expected = np.zeros((3, 3))
    expected[2, 2] = -0.2 * 0.8 / 64.0
    np.testing.assert_allclose(ms.observables.stress(system), expected, atol=1e-17)
    assert float(ms.observables.pressure(system)) == pytest.approx(0.16 / 192.0, rel=1e-12)


def test_stress_needs_a_volume():
    system = ms.System.create(
        [[0.0, 0.0], [0.8, 0.0]], None, LAW, {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0}
    )
    for observable in (ms.observables.stress, ms.observables.pressure):
        with pytest.raises(
            ms.InputError, match="need a volume, and this system has open boundaries: give the"
        ):
            observable(system)


@pytest.mark.parametrize("index", [0, 7])
def test_energy_and_stress_are_those_of_another_code(packing_name, index):
    file = packing_file(packing_name)
    system = packing(packing_name, index)
    assert float(ms.observables.energy(system)) == pytest.approx(file["energy"][index], rel=1e-9)
    assert relative(ms.observables.stress(system), file["stress"][index]) < 1e-8
    pressure = -np.trace(file["stress"][index]) / system.dimension
    assert pressure > 0 and float(ms.observables.pressure(system)) == pytest.approx(
        pressure, rel=1e-8
    )


def test_polishing_the_minimum_leaves_its_stress(packing_name):
    file = packing_file(packing_name)
    relaxed = ms.observables.stress(relaxed_packing(packing_name, 0).system)
    assert relative(relaxed, file["stress"][0]) < 1e-8  # the files stop at a force of 1e-13


# ── structure: what designers aim at ──


UNIT = {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0}
SHAPES = {"triangular": np.array([[1.0, 0.5], [0.0, 0.75**0.5]]), "square": np.eye(2)}


@cache
def lattice(shape: str, cells: int = 12, spacing: float = 0.97) -> ms.System:
    places = np.stack(np.meshgrid(*[np.arange(cells)] * 2, indexing="ij"), axis=-1).reshape(-1, 2)
    cell = SHAPES[shape] * spacing
    return ms.System.create(places @ cell.T, cells * cell, LAW, UNIT)


def jammed() -> ms.Equilibrium:
    """64 discs, each of its own size."""
    return relaxed_packing(PACKINGS[0], 0)


@cache
def seed() -> ms.System:
    """128 discs at random, in a box that grows with them."""
    return ms.load_system("seed_packing_2d", seed=1)


def target(system: ms.System) -> jax.Array:
    return system.positions + 0.1 * jnp.cos(jnp.arange(2.0 * system.n).reshape(-1, 2) ** 2)


def everything(aim: jax.Array) -> Callable[[ms.System], jax.Array]:
    def of(system: ms.System) -> jax.Array:
        found = [
            observables.volume(system),
            observables.packing_fraction(system),
            observables.bond_order(system, 6, 1.4),
            observables.distances(system, [[0, 1], [3, 40]]),
            observables.radial_distribution(system, [0.7, 1.0, 1.5], 0.05),
            observables.distance_to(system, aim),
            observables.smooth_coordination(system, 0.05),
        ]
        return jnp.concatenate([jnp.ravel(x) for x in found])

    return of


def test_gradients_are_finite_differences_of_minimizing_again_and_those_through_equilibrate():
    eq, h = jammed(), 1e-5
    of = everything(target(eq.system))
    found = ms.gradient(of, eq).value["sigma"]
    direction = np.cos(np.arange(64.0) ** 2)
    values = []
    for t in (h, -h, 0.5 * h, -0.5 * h):  # extrapolated: the error falls as h^4
        there = ms.minimize(
            eq.system, {"sigma": eq.params["sigma"] + t * direction}, tolerance=3e-14
        )
        values.append(np.asarray(of(there.system)))
    want = (4 * (values[2] - values[3]) / h - (values[0] - values[1]) / (2 * h)) / 3
    np.testing.assert_allclose(found @ direction, want, rtol=1e-6, atol=1e-7)
    weights = jnp.cos(jnp.arange(10.0) ** 2)
    slope = jax.grad(lambda p: weights @ of(ms.equilibrate(eq.system, p, tolerance=1e-13)))(
        dict(eq.params)
    )
    assert relative(slope["sigma"], weights @ found) < 1e-9


def test_derivatives_by_positions_are_finite_differences_and_second_ones_are_finite():
    system, h = jammed().system, 1e-5
    of = everything(target(system))
    direction = jnp.asarray(np.random.default_rng(0).normal(size=system.positions.shape))

    def along(t):
        return of(system.replace(positions=system.positions + t * direction))

    def both(t):
        return jax.jvp(along, (t,), (1.0,))

    first, second = jax.jit(lambda t: jax.jvp(both, (t,), (1.0,)))(0.0)
    (up, up_slope), (down, down_slope) = jax.jit(both)(h), jax.jit(both)(-h)
    np.testing.assert_allclose(first[1], (up - down) / (2 * h), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(second[1], (up_slope - down_slope) / (2 * h), rtol=1e-4, atol=1e-4)


def test_a_list_of_pairs_and_all_pairs_give_the_same():
    system = seed()
    near = observables.pairs_within(system, 1.8)
    assert not near.complete and near.rows.shape[0] < 80

    def of(pairs):
        order = observables.bond_order(system, 6, 1.4, pairs)
        return jnp.append(
            observables.radial_distribution(system, [0.7, 1.0, 1.5], 0.05, pairs), order
        )

    np.testing.assert_allclose(of(near), of(None), rtol=1e-8)


@pytest.mark.parametrize("shape, m, other", [("triangular", 6, 4), ("square", 4, 6)])
def test_perfect_lattices_have_all_of_their_own_order_and_none_of_another(shape, m, other):
    system = lattice(shape)
    assert float(observables.bond_order(system, m, 1.3)) == pytest.approx(1.0, rel=1e-12)
    assert float(observables.bond_order(system, other, 1.3)) == pytest.approx(0.0, abs=1e-12)


def test_order_of_bonds_turns_with_the_particles():
    places, angle = 3.0 * np.random.default_rng(1).random((30, 2)), 0.7
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    one, other = (ms.System.create(x, None, LAW, UNIT) for x in (places, places @ turn.T))
    for m in (1, 6):
        psi = np.asarray(observables.bond_orientation(one, m, 1.0)) @ [1.0, 1.0j]
        turned = np.asarray(observables.bond_orientation(other, m, 1.0)) @ [1.0, 1.0j]
        np.testing.assert_allclose(turned, psi * np.exp(1j * m * angle), atol=1e-12)
        # the definition, in numpy
        apart = (places[None] - places[:, None]) @ [1.0, 1.0j]
        r = np.abs(apart)
        x = np.clip((r - 0.75) / 0.25, 0.0, 1.0)
        weight = (1 - x**3 * (10 - 15 * x + 6 * x**2)) * (r > 0)
        total = weight.sum(axis=1)
        mean = (weight * (apart / np.where(r > 0, r, 1)) ** m).sum(axis=1) / np.maximum(total, 1)
        np.testing.assert_allclose(psi[total >= 1], mean[total >= 1], atol=1e-12)


def test_the_last_neighbor_leaves_without_a_jump():
    system = ms.System.create([[0.0, 0.0], [1.0, 0.0], [9.0, 9.0]], None, LAW, UNIT)

    def order(x):
        return observables.bond_order(
            system.replace(positions=system.positions.at[1, 0].set(x)), 6, 1.0
        )

    at = jnp.array([0.5, 0.8, 0.9, 0.999, 1.0, 1.001, 3.0])
    values, second = jax.jit(
        lambda x: (jax.vmap(order)(x), jax.vmap(jax.jacfwd(jax.jacfwd(order)))(x))
    )(at)
    assert float(values[0]) == pytest.approx(2 / 3)  # two of three particles have a neighbor
    assert np.all(np.diff(values) <= 0) and float(values[3]) < 1e-9 and not np.any(values[4:])
    assert np.all(np.isfinite(second))


@pytest.mark.parametrize("d", [2, 3])
def test_an_ideal_gas_has_no_structure(d):
    places = np.random.default_rng(d).random((1200, d))
    system = ms.System.create(places, 1.0, LAW, UNIT | {"sigma": 0.01})
    # of pairs within the shells, 1 / sqrt of their number is below a hundredth,
    # and at r = 0 of 2-D 0.02
    found = observables.radial_distribution(
        system, [0.0, 0.1, 0.2, 0.35] if d == 2 else [0.1, 0.2, 0.35], 0.02
    )
    np.testing.assert_allclose(found, 1.0, atol=0.06 if d == 2 else 0.04)


def test_the_pair_distribution_of_a_lattice_has_its_shells():
    system, width = lattice("triangular"), 0.02
    shells = 0.97 * np.array([1.0, 3**0.5, 2.0, 7**0.5])
    found = observables.radial_distribution(system, [*shells, 1.35 * 0.97], width)
    count = np.array([6, 6, 6, 12]) / (width * (2 * np.pi) ** 0.5)  # at the peaks of Gaussians
    want = float(system.volume) * count / ((system.n - 1) * 2 * np.pi * shells)
    np.testing.assert_allclose(found[:4], want, rtol=1e-9)
    assert float(found[4]) < 1e-9


def test_distances_are_those_of_the_nearest_images():
    rng = np.random.default_rng(0)
    cell = np.array([[3.0, 0.4], [-0.3, 3.2]])
    system = discs()
    pairs = rng.permuted(np.tile(np.arange(12), (30, 1)), axis=1)[:, :2]
    R, shifts = (
        np.asarray(system.positions),
        np.stack(np.meshgrid(*[[-1, 0, 1]] * 2), axis=-1).reshape(-1, 2) @ cell.T,
    )
    want = np.linalg.norm((R[pairs[:, 0]] - R[pairs[:, 1]])[:, None] + shifts, axis=2).min(axis=1)
    np.testing.assert_allclose(observables.distances(system, pairs), want, rtol=1e-12)


def test_the_distance_to_a_target_knows_no_translation():
    system = jammed().system
    aim = target(system)
    apart = np.asarray(aim - system.positions)
    want = np.sqrt(np.mean(np.sum((apart - apart.mean(axis=0)) ** 2, axis=1)))
    box = np.asarray(system.box)
    shift = 5 * box @ np.random.default_rng(0).integers(-2, 3, (2, 64))  # images
    for moved in (np.zeros(2), np.array([0.3, -0.2]), box @ [0.5, 0.0], box @ [1.37, -0.51]):
        there = system.replace(positions=system.positions + moved + shift.T)
        assert float(observables.distance_to(there, aim)) == pytest.approx(want, rel=1e-11)
    # what is loose may stand anywhere where it has no weight
    weights = np.arange(64) != 5
    loose = aim.at[5].add(1.0)
    slope = jax.grad(
        lambda R: observables.distance_to(system.replace(positions=R), loose, weights)
    )(system.positions)
    assert not np.any(slope[5]) and np.any(slope[6])
    assert float(jnp.abs(jnp.sum(slope))) < 1e-12


def test_at_its_target_the_distance_and_its_slope_are_zero():
    system = jammed().system
    value, slope = jax.value_and_grad(
        lambda R: observables.distance_to(system.replace(positions=R), system.positions)
    )(system.positions)
    assert float(value) == 0.0 and not np.any(slope)


def test_smooth_contacts_are_counted_by_their_depth():
    system = lattice("triangular")  # overlaps of 0.03
    assert float(observables.smooth_coordination(system, 0.02)) == pytest.approx(6.0)
    assert float(observables.smooth_coordination(system, 0.06)) == pytest.approx(3.0)
    eq = jammed()
    sharp, net = (
        observables.smooth_coordination(eq.system, 1e-9),
        ms.mechanics.network(eq.system, eq.max_force),
    )
    assert float(sharp) == pytest.approx(2 * int(net.pairs) / 64)


def test_volume_and_packing_fraction_where_the_box_follows_the_diameters():
    system = seed()

    def both(sigma):
        there = system.replace(params={**system.params, "sigma": sigma})
        return jnp.stack([observables.volume(there), observables.packing_fraction(there)])

    sigma = system.params["sigma"]
    volume, fraction = both(sigma)
    assert float(fraction) == pytest.approx(0.98, rel=1e-14)
    of_volume, of_fraction = jax.jacrev(both)(sigma)
    np.testing.assert_allclose(of_volume, 64 * np.pi / 2 * sigma / 0.98, rtol=1e-12)
    np.testing.assert_allclose(of_fraction, 0.0, atol=1e-14)
    assert float(volume) == pytest.approx(float(jnp.linalg.det(system.box)))
    three = ms.System.create(np.eye(3), 3.0, LAW, UNIT | {"sigma": [0.5, 1.0, 1.5]})
    assert float(observables.packing_fraction(three)) == pytest.approx(
        np.pi / 6 * (0.125 + 1 + 3.375) / 27
    )


def test_many_particles_take_the_list_of_the_potential_or_a_list_of_pairs(monkeypatch):
    soft = seed()
    bonds, glass = observables.bond_order(soft, 6, 1.4), lattice("triangular", spacing=1.1)
    potential = ms.potentials.lennard_jones()
    lj = ms.System.create(glass.positions, glass.box, potential, {"sigma": 1.0, "epsilon": 1.0})
    monkeypatch.setattr(pairs, "ALL_PAIRS", 100)
    # the potential reaches 2.5
    assert float(observables.bond_order(lj, 6, 1.6)) == pytest.approx(1.0)
    assert observables.bond_order(
        soft, 6, 1.4, observables.pairs_within(soft, 1.4)
    ) == pytest.approx(bonds)
    with pytest.raises(
        ms.InputError, match=r"give pairs=ms\.observables\.pairs_within\(system, 1\.4\)"
    ):
        observables.bond_order(soft, 6, 1.4)
    # nearly half the smallest height of the cell, and more: images in place of all pairs
    assert observables.pairs_within(soft, 4.15).images is not None


def test_lists_of_pairs_that_do_not_serve_are_refused():
    system = seed()
    near = observables.pairs_within(system, 1.4)
    with pytest.raises(ms.InputError, match=r"`pairs` reaches 1\.4, and the observable needs 1\.5"):
        observables.bond_order(system, 6, 1.5, near)
    with pytest.raises(ms.InputError, match="moved by more than half the skin"):
        observables.bond_order(
            system.replace(positions=system.positions.at[3].add(0.5)), 6, 1.4, near
        )
    with pytest.raises(ms.InputError, match="`pairs` is for 128 particles and the system has 144"):
        observables.bond_order(lattice("square"), 4, 1.3, near)
    with pytest.raises(ms.InputError, match=r"give a list made by ms\.observables\.pairs_within"):
        observables.bond_order(system, 6, 1.4, [[0, 1]])  # type: ignore[arg-type]


def test_bad_settings_are_refused_with_the_remedy():
    system, three = seed(), packing("3d_bidisperse_N128_p1e-4", 0)
    free = ms.System.create([[0.0, 0.0], [1.2, 0.0]], None, LAW, UNIT)
    bonds = ms.System.create(
        [[0.0, 0.0], [1.2, 0.0]],
        4.0,
        ms.potentials.harmonic_bonds([[0, 1]]),
        {"stiffness": 1.0, "length": 1.0},
    )
    o = observables
    refused = [
        (lambda: o.bond_order(three, 6, 1.4), "Steinhardt"),
        (lambda: o.bond_order(system, 0, 1.4), "`m` is 0: give a whole number from 1"),
        (lambda: o.bond_order(system, 6, -1.0), r"`range` is -1\.0: give a positive length"),
        (lambda: o.bond_order(system, 6, 5.0), "beyond half the smallest height"),
        (
            lambda: o.radial_distribution(system, [4.0], 0.1),
            r"the observable needs pairs up to 4\.6, beyond half",
        ),
        (lambda: o.radial_distribution(system, [-1.0], 0.1), "radii that are not negative"),
        (lambda: o.radial_distribution(free, [1.0], 0.1), "open boundaries: give the system a box"),
        (lambda: o.volume(free), "open boundaries: give the system a box"),
        (lambda: o.packing_fraction(bonds), "no parameter 'sigma' for each particle"),
        (
            lambda: o.smooth_coordination(bonds, 0.1),
            "no distance at which neighbors begin to interact",
        ),
        (lambda: o.smooth_coordination(system, 0.0), r"`width` is 0\.0: give a positive length"),
        (
            lambda: o.distances(system, [[0, 128]]),
            r"pairs\[0\] is \[0, 128\] and there are 128 particles",
        ),
        (lambda: o.distances(system, [[2, 2]]), "a particle with itself"),
        (lambda: o.distances(system, [0, 1]), r"give \(m, 2\) whole numbers from 0 to 127"),
        (
            lambda: o.distance_to(system, np.zeros((3, 2))),
            r"`target` has shape \(3, 2\): give \(128, 2\)",
        ),
        (
            lambda: o.distance_to(system, system.positions, -np.ones(128)),
            "numbers that are not negative",
        ),
        (lambda: o.volume(ms.stack([free, free])), "an observable takes one system"),
    ]
    for call, message in refused:
        with pytest.raises(ms.InputError, match=message):
            call()
    with pytest.raises(ms.InputError, match="this setting cannot be differentiated"):
        jax.grad(lambda w: o.smooth_coordination(system, w))(0.1)
