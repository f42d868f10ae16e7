"""Newton steps: they end at FIRE's minimum, leave saddles, never go uphill,
and stop where there is no headway.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp

import mdsens as ms
from mdsens.implicit.linear.sparse_ldl import SparseFactor, dissection
from mdsens.mechanics import units
from mdsens.mechanics.hessian import assembles, dense_hessian, largest_force, max_force
from mdsens.mechanics.hessian_factor import HessianFactor, factor_of, factorizes
from mdsens.mechanics.rigidity import analyze_rigidity
from mdsens.model import neighbors
from mdsens.model.system import listed, potential_energy
from mdsens.relaxation import _driver, newton
from mdsens.relaxation.methods import Fire, Newton

WAYS = ("factor", "conjugate gradients")


@dataclasses.dataclass
class Descent:
    """What came of Newton steps: the system, the force that they claim,
    and after each step energy and positions.
    """

    system: ms.System
    largest: float
    taken: int
    forces: list[float]
    energies: list[float]
    places: list[np.ndarray]
    length: float


def of_way(way: str, length: float, system: ms.System) -> Any:
    """The method of Newton steps by its name here."""
    hessian = newton._Hessian()
    if way == "factor":
        return newton._Factorized(length, hessian)
    return newton._Krylov(length, hessian if assembles(system) else None)


def descend(system: ms.System, way: str | None = None, tolerance: float = 1e-12) -> Descent:
    """Newton steps by one of both ways, by the system's own where None."""
    seen: list[Any] = []
    forces, energies, places = [], [float(potential_energy(system))], [np.asarray(system.positions)]
    evaluate = newton._energy_and_gradient
    choose = (
        newton._choose_method if way is None else lambda there, length: of_way(way, length, there)
    )

    def watched(there: ms.System) -> Any:
        seen.append((there, evaluate(there)))
        return seen[-1][1]

    def show(taken: int, largest: float) -> None:
        there, (energy, slope) = seen[-1]
        assert taken == len(places) and largest == float(largest_force(slope))
        forces.append(largest)
        energies.append(float(energy))
        places.append(np.asarray(there.positions))

    length = float(units.natural_units(system)[0])
    with mock.patch.multiple(newton, _energy_and_gradient=watched, _choose_method=choose):
        out, largest, taken = newton.descend(system, tolerance, length, show)
    assert taken == len(forces) and np.array_equal(out.positions, places[-1])
    return Descent(out, largest, taken, forces, energies, places, length)


# ── near a minimum ──


def spheres(d: int, n: int, phi: float) -> ms.System:
    """Bidisperse soft spheres from a random start."""
    sigma = np.where(np.arange(n) % 2, 1.0, 1.2)
    length = (np.sum(sigma**d) * np.pi / {2: 4, 3: 6}[d] / phi) ** (1 / d)
    places = length * np.random.default_rng(1).random((n, d))
    params = {"sigma": sigma, "epsilon": 1.0, "alpha": 2.5}
    return ms.System.create(places, length, ms.potentials.soft_sphere(), params)


def embedded(R: jax.Array, params: Any, displacement: Any) -> jax.Array:
    """Gupta's potential of metals: repulsion, and the root of a density."""
    own = jnp.eye(R.shape[0])
    apart = jax.vmap(lambda a: jax.vmap(lambda b: displacement(a, b))(R))(R)
    r = jnp.sqrt(jnp.sum(apart**2, axis=-1) + own)
    repulsion = 0.1 * jnp.sum((1 - own) * jnp.exp(-params["p"] * (r - 1)))
    return repulsion - jnp.sum(
        jnp.sqrt(jnp.sum((1 - own) * jnp.exp(-2 * params["q"] * (r - 1)), axis=1))
    )


def cluster() -> ms.System:
    potential = ms.potentials.from_energy(embedded, ("p", "q"))
    return ms.System.create(
        1.6 * np.random.default_rng(3).random((8, 3)), None, potential, {"p": 9.0, "q": 3.0}
    )


STARTS = {  # well above jamming: no rattlers
    "2-D packing": lambda: spheres(2, 40, 1.0),
    "3-D packing": lambda: spheres(3, 40, 0.8),
    "metal cluster": cluster,
}


@cache
def near(name: str) -> ms.System:
    # so that three Newton steps are left above round-off
    force = {"3-D packing": 2e-4}.get(name, 1e-4)
    return ms.minimize(STARTS[name](), tolerance=force, method=Fire(), leave_saddles=False).system


@cache
def relaxed(name: str) -> ms.System:
    return ms.minimize(near(name), tolerance=1e-12, method=Fire(), leave_saddles=False).system


@cache
def descended(name: str, way: str) -> Descent:
    return descend(near(name), way)


def separations(system: ms.System) -> np.ndarray:
    """Between all particles, (n, n): free of translations, and in a cluster of rotations."""
    R, box = np.asarray(system.positions), system.box
    apart = R[:, None] - R[None]
    if box is not None:
        side = np.diag(np.asarray(box))
        apart = apart - side * np.round(apart / side)
    return np.linalg.norm(apart, axis=-1)


EASY = [(name, way) for name in ("2-D packing", "3-D packing") for way in WAYS] + [
    ("metal cluster", WAYS[1])
]


@pytest.mark.parametrize("name, way", EASY)
def test_newton_steps_end_at_the_minimum_that_fire_finds(name, way):
    start, found, alone = near(name), descended(name, way), relaxed(name)
    assert float(max_force(start)) > 1e-6  # there was a way to go
    assert found.taken > 0 and found.largest <= 1e-12
    assert float(max_force(found.system)) == pytest.approx(found.largest, abs=1e-14)
    assert np.abs(separations(found.system) - separations(alone)).max() < 1e-8
    assert np.abs(separations(start) - separations(alone)).max() > 1e-6
    assert float(potential_energy(found.system)) == pytest.approx(
        float(potential_energy(alone)), rel=1e-13
    )


@pytest.mark.parametrize("name", ["2-D packing", "3-D packing"])
def test_the_factor_squares_the_force_at_each_step(name):
    forces = [f for f in descended(name, "factor").forces if f > 1e-14]  # above round-off
    gains = np.diff(np.log([float(max_force(near(name))), *forces]))
    assert descended(name, "factor").taken <= 5
    # the order of convergence
    assert gains.size >= 3 and gains[0] < 0 and np.all(gains[1:] / gains[:-1] > 1.6), gains


@pytest.mark.parametrize("name, way", [case for case in EASY if case[1] != "factor"])
def test_conjugate_gradients_gain_on_the_force_faster_at_each_step(name, way):
    found = descended(name, way)
    gains = np.diff(np.log([f for f in found.forces if f > 1e-13]))
    assert found.taken <= 9 and gains[-1] < 1.5 * gains[0] < 0


def test_a_potential_of_many_bodies_takes_conjugate_gradients():
    start = near("metal cluster")
    assert not factorizes(start)
    with mock.patch.object(newton, "_Factorized", side_effect=AssertionError):
        found = descend(start)
    assert found.largest <= 1e-12 and found.taken > 0


def test_single_precision_takes_conjugate_gradients_down_to_round_off():
    """Of an energy near 1, of which single precision sees no gain below 1e-7:
    those of forces from 1e-4 on.
    """
    double = ms.minimize(spheres(2, 40, 1.4), tolerance=1e-3, method=Fire()).system
    params = {name: np.asarray(value, np.float32) for name, value in double.params.items()}
    R, side = np.asarray(double.positions, np.float32), float(np.asarray(double.box)[0, 0])
    start = ms.System.create(R, side, double.potential, params)
    assert start.positions.dtype == jnp.float32 and not factorizes(start)
    found = descend(start, tolerance=2e-6)
    assert found.largest <= 2e-6 < 0.01 * float(max_force(start))


# ── negative curvature ──


def row(off: float, stretch: float = 1.0, n: int = 3, d: int = 2) -> ms.System:
    """Lennard-Jones particles in a row, every second one off it:
    a saddle at 0, from which the row buckles.
    """
    places = np.zeros((n, d))
    places[:, 0] = stretch * 2 ** (1 / 6) * np.arange(n)
    places[1::2, -1] = off
    return ms.System.create(
        places, None, ms.potentials.lennard_jones(), {"sigma": 1.0, "epsilon": 1.0}
    )


def stiffnesses(system: ms.System) -> np.ndarray:
    return np.linalg.eigvalsh(np.asarray(dense_hessian(system)))


def motions(d: int) -> int:
    """Of a free body."""
    return d * (d + 1) // 2


OFF = (1e-9, 1e-6, 1e-3, 0.1)
STRETCH = (1.0, 1.03, 1.1)


@cache
def buckled(off: float, stretch: float, way: str) -> Descent:
    return descend(row(off, stretch), way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stretch", STRETCH)
@pytest.mark.parametrize("off", OFF)
def test_a_row_that_is_hardly_off_its_saddle_ends_as_a_triangle(off, stretch, way):
    found = buckled(off, stretch, way)
    assert found.largest <= 1e-12 and float(max_force(found.system)) <= 1.1e-12
    assert float(potential_energy(found.system)) == pytest.approx(-3.0, abs=1e-12)
    assert stiffnesses(found.system)[motions(2)] > 1.0


@pytest.mark.parametrize("stretch", STRETCH)
def test_the_factor_sees_the_saddle_that_no_force_points_away_from(stretch):
    straight, found = buckled(0.0, stretch, "conjugate gradients"), buckled(0.0, stretch, "factor")
    assert straight.largest <= 1e-12 and stiffnesses(straight.system)[0] < -0.4  # the saddle
    assert found.largest <= 1e-12
    assert float(potential_energy(found.system)) == pytest.approx(-3.0, abs=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_a_squeezed_row_in_three_dimensions_ends_at_a_minimum(way):
    start = row(1e-3, 0.97, n=4, d=3)
    start = start.replace(
        positions=start.positions + 1e-3 * np.random.default_rng(0).standard_normal((4, 3))
    )
    found = descend(start, way)
    values = stiffnesses(found.system)
    assert np.sum(stiffnesses(start) < -1e-2) > 1
    assert found.largest <= 1e-12
    assert np.abs(values[: motions(3)]).max() < 1e-9 and values[motions(3)] > 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_no_step_raises_the_energy(way):
    runs = [descended(name, way) for name, its in EASY if its == way]
    runs += [buckled(off, stretch, way) for off in OFF for stretch in STRETCH]
    for found in runs:
        energies = np.asarray(found.energies)
        # none rises, all but round-off
        assert np.all(np.diff(energies) <= 1e-14 * np.abs(energies[:-1])), energies
        assert energies[-1] < energies[0]
    # where the force rises, that says something
    assert any(np.any(np.diff(found.forces) > 0) for found in runs)


@pytest.mark.parametrize("way", WAYS)
def test_no_particle_moves_farther_in_a_step_than_a_share_of_the_length(way):
    longest = 0.0
    for off in OFF:
        for stretch in STRETCH:
            found = buckled(off, stretch, way)
            moves = np.linalg.norm(np.diff(found.places, axis=0), axis=-1)
            longest = max(longest, moves.max() / found.length)
    assert longest == pytest.approx(newton.LONGEST, rel=1e-9)  # no farther, and some go as far


@pytest.mark.parametrize("way", WAYS)
def test_a_step_promises_what_the_quadratic_model_gives_cut_or_not(way):
    start = row(0.1, 1.1)
    slope, hessian = newton._energy_and_gradient(start)[1], np.asarray(dense_hessian(start))
    length, sizes = float(units.natural_units(start)[0]), []
    for scale in (length, 100.0 * length):  # with a hundred times the length there is no cut
        step, promised = of_way(way, scale, start)(start, slope, float(largest_force(slope)))
        p = np.asarray(step).ravel()
        sizes.append(np.linalg.norm(step, axis=1).max() / scale)
        assert promised == pytest.approx(
            -float(np.ravel(slope) @ p + 0.5 * p @ hessian @ p), rel=1e-9
        )
        assert promised > 0
    assert sizes[0] == pytest.approx(newton.LONGEST, rel=1e-9)


@pytest.mark.parametrize("ordered", [False, True])
def test_a_negative_pivot_gives_a_direction_of_negative_curvature(ordered):
    rng = np.random.default_rng(0)
    dense = np.where(rng.random((30, 30)) < 0.1, rng.normal(size=(30, 30)), 0.0)
    dense = dense + dense.T + np.diag(2.0 + rng.normal(size=30))
    matrix = sp.csr_array(dense)
    order = dissection(matrix) if ordered else None
    factor = SparseFactor(matrix, 0.01, order)
    assert factor.negative == np.sum(np.linalg.eigvalsh(dense) < -0.01) > 0
    v = factor.negative_direction()
    assert v is not None and v @ dense @ v < -0.01 * v @ v
    assert SparseFactor(matrix, 50.0, order).negative_direction() is None


# ── no headway ──


@pytest.mark.parametrize("way", WAYS)
def test_a_tolerance_below_round_off_ends_with_the_true_force(way):
    found = descend(near("2-D packing"), way, tolerance=1e-30)
    assert found.taken < newton.STEPS
    assert 1e-30 < found.largest < 1e-13
    assert float(max_force(found.system)) == pytest.approx(found.largest, rel=1e-12)


def pair(potential: Any, r: float) -> ms.System:
    potential = ms.potentials.from_pair(potential, ("strength",), cutoff=2.0)
    return ms.System.create([[0.0, 0.0], [0.6 * r, 0.8 * r]], None, potential, {"strength": 1.0})


def hollow(r: Any, strength: Any) -> Any:
    """Not a number inside of 0.5, downhill to there."""
    return strength * (jnp.sqrt(r - 0.5) * 0.0 + (r - 0.45) ** 2 * jnp.maximum(2.0 - r, 0.0) ** 4)


def kinked(r: Any, strength: Any) -> Any:
    """Downhill to a kink, where the force does not vanish."""
    return strength * jnp.where(r < 2.0, jnp.abs(r - 1.0) + 0.1 * (r - 1.0) ** 2 - 1.1, 0.0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("potential, ends", [(hollow, 0.5), (kinked, 1.0)])
def test_where_the_energy_gives_out_the_steps_end_with_the_true_force(potential, ends, way):
    start = pair(potential, ends + 0.3)
    found = descend(start, way)
    assert 0 < found.taken < newton.STEPS and found.energies[-1] < found.energies[0]
    assert separations(found.system)[0, 1] == pytest.approx(ends, abs=0.05)
    assert np.isfinite(found.largest) and found.largest > 1e-3
    assert float(max_force(found.system)) == pytest.approx(found.largest, rel=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_a_start_without_finite_forces_comes_back_as_it_is(way):
    start = pair(hollow, 0.4)
    found = descend(start, way)
    assert (
        found.taken == 0
        and np.isnan(found.largest)
        and np.array_equal(found.system.positions, start.positions)
    )


# ── the public door ──


def true_force(system: ms.System) -> float:
    """Of every pair, by differentiating the energy."""
    every = system.replace(neighbors=neighbors.all_pairs(system.n))
    slope = jax.grad(lambda R: potential_energy(every, R))(every.positions)
    return float(np.linalg.norm(np.asarray(slope), axis=1).max())


def test_a_list_that_steps_outrun_is_made_anew():
    rest = ms.minimize(spheres(2, 100, 0.9), tolerance=1e-6).system
    moved = rest.replace(
        positions=rest.positions + 0.05 * np.random.default_rng(5).standard_normal((100, 2))
    )
    start = moved.replace(neighbors=listed(moved, skin=1e-3, anew=True)[0])
    assert true_force(start) == pytest.approx(float(max_force(start)), rel=1e-9)
    found = descend(start, "factor")
    assert found.taken > 1 and np.abs(found.places[-1] - found.places[0]).max() > 1e-2
    assert true_force(found.system) == pytest.approx(found.largest, abs=1e-13)


@pytest.mark.parametrize("way", WAYS)
def test_minimize_ends_converged_with_few_steps_of_fire(way):
    start, used = spheres(2, 100, 0.9), []
    assert not start.neighbors.complete  # a list of those near by
    alone = ms.minimize(start, method=Fire())

    def counted(*given: Any) -> Any:
        used.append(newton.descend(*given))
        return used[-1]

    with (
        mock.patch.object(
            newton, "_choose_method", lambda there, length: of_way(way, length, there)
        ),
        mock.patch.object(_driver, "descend", counted),
        mock.patch.object(_driver, "WORTH", 0),  # FIRE would be there soon
        mock.patch.object(_driver, "WATCHED", 20),
    ):
        eq = ms.minimize(start, method=Newton(begin=1e-2, patience=50))
    assert ms.Status(int(eq.status)) is ms.Status.CONVERGED and float(eq.max_force) <= 1e-12
    assert used and sum(taken for *_, taken in used) > 0 and int(eq.steps) < int(alone.steps)
    assert used[-1][1] == float(eq.max_force)  # theirs is the last word
    assert true_force(eq.system) == pytest.approx(float(eq.max_force), abs=1e-14)
    assert true_force(eq.system) <= 1.01e-12
    assert float(potential_energy(eq.system)) < float(potential_energy(start))


def test_newton_steps_begin_nearer_to_the_minimum_of_many_particles():
    assert (
        _driver.near_force(3e-4, 2.0, 1000) == _driver.near_force(3e-4, 2.0, _driver.LARGE) == 6e-4
    )
    assert _driver.near_force(3e-4, 2.0, 8 * _driver.LARGE) == pytest.approx(6e-4 / 8)


# ── the choice by cost ──


@cache
def glass(n: int = 500) -> ms.System:
    """Kob and Andersen's mixture near a minimum, relaxed from a packing of soft spheres."""
    sigma, epsilon = np.array([[1.0, 0.8], [0.8, 0.88]]), np.array([[1.0, 1.5], [1.5, 0.5]])
    kinds, length = (np.arange(n) >= 0.8 * n).astype(int), (n / 1.2) ** (1 / 3)
    soft = ms.System.create(
        length * np.random.default_rng(0).random((n, 3)),
        length,
        ms.potentials.soft_sphere(),
        {"sigma": sigma, "epsilon": 1.0, "alpha": 2.0},
        kinds,
    )
    places = ms.minimize(soft, method=Fire(), max_steps=200, throw=False, progress=False).positions
    start = ms.System.create(
        places, length, ms.potentials.lennard_jones(), {"sigma": sigma, "epsilon": epsilon}, kinds
    )
    return ms.minimize(start, method=Fire(), tolerance=1e-2, progress=False).system


def test_long_ranges_in_three_dimensions_take_products_and_discs_a_factor():
    """By the estimate, which depends on the neighbors and not on a clock."""
    start = glass()
    ways = {"glass": newton._ByCost(1.0), "discs": newton._ByCost(1.0)}
    assert not ways["glass"].factor_is_cheaper(start)
    discs = near("2-D packing")
    assert ways["discs"].factor_is_cheaper(discs)
    # and what a step costs decides about the next one
    ways["glass"].by_products.iterations = 100_000
    assert ways["glass"].factor_is_cheaper(start)
    ways["discs"].by_factor.factorizations = 10_000
    assert not ways["discs"].factor_is_cheaper(discs)
    # the list knows the neighbors before the matrix is assembled
    estimate = ways["glass"].estimate
    assert estimate is not None
    assert 0.6 < factor_of(start).operations / estimate.operations < 1.7


def test_conjugate_gradients_end_at_the_minimum_of_the_factor():
    start = glass()
    ends = [descend(start, way, tolerance=1e-11) for way in WAYS]
    apart = np.asarray(ends[0].system.positions - ends[1].system.positions)
    assert all(end.largest <= 1e-11 for end in ends)
    assert np.abs(apart - apart.mean(axis=0)).max() < 1e-9


def test_a_saddle_of_many_atoms_is_seen_without_a_factor():
    """Lanczos on the assembled matrix, against the factor's count of negative pivots."""
    start = glass()
    places = np.asarray(start.positions)
    bent = start.replace(
        positions=places + 0.05 * np.random.default_rng(2).standard_normal(places.shape)
    ).reallocate()
    for system, sign in ((start, 1), (bent, -1)):
        backbone, _, null = analyze_rigidity(system, 1e-2)
        factor = HessianFactor(backbone, null.simplified())
        assert (factor.negative[0] > 0) == (sign < 0)
        found = factor._search_by_lanczos(0.0)
        assert (found is not None) == (sign < 0)
        if found is not None:
            value, mode = found
            true = np.linalg.eigvalsh(factor.matrix.toarray())[0]
            assert true - 1e-9 * abs(true) <= value < 0.9 * true
            product = factor.products(mode.reshape(-1, 1))[:, 0]
            assert mode.ravel() @ product == pytest.approx(value, rel=1e-9)
