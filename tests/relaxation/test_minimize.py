"""Relaxed minima against closed forms; solvers agree;
every way of not converging has its status; lists recover.
"""

from __future__ import annotations

import functools
import sys
from functools import cache
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick, relative, square_lattice

import mdsens as ms
from mdsens._util.progress import Decades
from mdsens.mechanics.forces import energy_gradient
from mdsens.mechanics.hessian import dense_hessian, largest_force, largest_stiffness, max_force
from mdsens.mechanics.units import Limits, natural_units
from mdsens.model import neighbors
from mdsens.model.system import potential_energy
from mdsens.relaxation.fire_loop import advance, at_rest, limited_minimizer
from mdsens.relaxation.methods import MEASURED, Fire, GradientDescent
from mdsens.relaxation.traced import relax


def distance(eq: ms.Equilibrium, i: int, j: int) -> float:
    return float(jnp.linalg.norm(eq.positions[i] - eq.positions[j]))


# ── closed forms ──


def dimer(sigma: float = 1.0, dtype: Any = float) -> ms.System:
    places = np.array([[0.0, 0.0], [1.3, 0.1]], dtype)
    return ms.System.create(
        places, None, ms.potentials.lennard_jones(), {"sigma": sigma, "epsilon": 1.0}
    )


@pytest.mark.as_shipped
@pytest.mark.parametrize("sigma", [1.0, 1.15])
def test_lennard_jones_dimer_rests_at_its_minimum(sigma):
    eq = ms.minimize(dimer(), {"sigma": sigma})
    assert ms.Status(int(eq.status)) is ms.Status.CONVERGED
    assert float(eq.max_force) <= 1e-12 and int(eq.steps) > 0
    assert distance(eq, 0, 1) == pytest.approx(2 ** (1 / 6) * sigma, rel=1e-13)
    assert float(ms.observables.energy(eq.system)) == pytest.approx(-1.0, rel=1e-13)
    assert float(eq.params["sigma"]) == sigma
    assert float(max_force(eq.system)) == pytest.approx(float(eq.max_force), abs=1e-14)


@pytest.mark.as_shipped
def test_stretched_chain_of_springs_shares_the_force():
    # a ring of springs around a periodic cell:
    # k_b (r_b - l_b) = f for all, f = (L - sum l) / sum 1/k
    n, length = 5, 7.0
    rng = np.random.default_rng(0)
    stiffness, rest = rng.uniform(0.5, 3.0, n), rng.uniform(0.8, 1.2, n)
    bonds = np.stack([np.arange(n), (np.arange(n) + 1) % n], axis=1)
    places = np.stack([np.arange(n) * length / n, np.full(n, 1.0)], axis=1)
    potential = ms.potentials.harmonic_bonds(bonds)
    chain = ms.System.create(
        places, [length, 4.0], potential, {"stiffness": stiffness, "length": rest}
    )
    eq = ms.minimize(chain)
    tension = (length - rest.sum()) / np.sum(1 / stiffness)
    gaps = np.diff(np.append(eq.positions[:, 0], eq.positions[0, 0] + length))
    np.testing.assert_allclose(gaps, rest + tension / stiffness, rtol=1e-11)
    expected = 0.5 * tension**2 * np.sum(1 / stiffness)
    assert float(ms.observables.energy(eq.system)) == pytest.approx(expected, rel=1e-12)


# ── solvers, batches ──


@cache
def packing() -> ms.System:
    rng = np.random.default_rng(1)
    params = {"sigma": rng.uniform(0.9, 1.1, 16), "epsilon": 1.0, "alpha": 2.0}
    return ms.System.create(3.6 * rng.random((16, 2)), 3.6, ms.potentials.soft_sphere(), params)


@cache
def relaxed() -> ms.Equilibrium:
    return ms.minimize(packing())


def shape_of(positions) -> np.ndarray:
    """Positions without their mean, which no minimizer fixes."""
    return np.asarray(positions) - np.mean(positions, axis=0)


def test_gradient_descent_reaches_the_minimum_that_fire_found():
    start = relaxed().system
    noise = 1e-3 * np.random.default_rng(2).standard_normal(start.positions.shape)
    eq = ms.minimize(start.replace(positions=start.positions + noise), method=GradientDescent())
    assert ms.Status(int(eq.status)) is ms.Status.CONVERGED
    assert int(eq.steps) > 100  # it did have a way to go
    assert relative(shape_of(eq.positions), shape_of(relaxed().positions)) < 1e-10
    assert float(ms.observables.energy(eq.system)) == pytest.approx(
        float(ms.observables.energy(start)), rel=1e-12
    )


@pytest.mark.parametrize("name", ["fire_descent", "gradient_descent"])
def test_a_minimizer_of_jax_md_makes_its_own_steps(name):
    from jax_md import minimize as theirs

    options = {"fire_descent": {"dt_max": 0.2}, "gradient_descent": {"step_size": 2e-3}}[name]
    minimizer, start, count = getattr(theirs, name), dimer(), 40

    def energy(R: jax.Array, **_: Any) -> jax.Array:
        return potential_energy(start, R)

    init, apply = minimizer(energy, lambda R, dR, **_: R + dR, **options)
    # step sizes in double precision, which jax-md makes float16 where they fit
    state = jax.tree.map(lambda leaf: leaf * np.float64(1), init(start.positions))
    for _ in range(count):
        state = apply(state)
    method = ms.relaxation.JaxMD(functools.partial(minimizer, **options))
    eq = ms.minimize(start, method=method, max_steps=count, throw=False)
    assert ms.Status(int(eq.status)) is ms.Status.MAX_STEPS_REACHED and int(eq.steps) == count
    there = np.asarray(getattr(state, "position", state))
    moved = np.linalg.norm(there - np.asarray(start.positions))
    assert np.linalg.norm(np.asarray(eq.positions) - there) < 1e-12 * moved
    if name == "fire_descent":
        assert distance(ms.minimize(start, method=method), 0, 1) == pytest.approx(
            2 ** (1 / 6), rel=1e-12
        )


def test_relaxing_goes_downhill_and_is_reproducible():
    again = ms.minimize(packing())
    assert np.array_equal(again.positions, relaxed().positions) and int(again.steps) == int(
        relaxed().steps
    )
    assert float(potential_energy(relaxed().system)) < 0.5 * float(potential_energy(packing()))


def test_relaxed_stays_where_it_is():
    again = ms.minimize(relaxed().system)
    assert int(again.steps) == 0 and np.array_equal(again.positions, relaxed().positions)


def test_the_way_of_the_particles_is_told():
    def two(apart: float, side: float = 8.0) -> ms.System:
        places = np.array([[7.9, 4.0], [7.9 + apart - side, 4.0]])  # across the border
        potential = ms.potentials.harmonic_bonds([[0, 1]])
        return ms.System.create(places, side, potential, {"stiffness": 1.0, "length": 1.0})

    eq = ms.minimize(two(1.4))
    assert eq.moved == pytest.approx(0.2, rel=1e-9)  # each by half of what the spring was stretched
    assert eq.status is ms.Status.CONVERGED
    assert "moved      at most 0.2 from the start" in str(eq)
    assert "nothing: the particles were at rest" in str(ms.minimize(eq.system))
    # a batch has a number a member
    both = ms.minimize(ms.stack([two(1.4), two(1.1)]))
    np.testing.assert_allclose(both.moved, [0.2, 0.05], rtol=1e-9)
    assert both.status.tolist() == [0, 0]


def test_the_way_of_the_particles_is_beside_that_of_the_cell():
    # a lattice of springs under pressure shrinks, and every node stays where it is in the cell
    start = square_lattice(1.0)
    eq = ms.minimize(start, pressure=0.1)
    assert float(eq.system.volume) < 0.99 * float(start.volume) and eq.moved < 1e-9
    words = eq.move_in_words()
    assert words.endswith("beside the motion with the cell") or words.startswith("nothing")


def test_batch_of_three_relaxes_member_by_member():
    sigma = np.asarray(packing().params["sigma"])
    systems = [packing().with_params({"sigma": s * sigma}) for s in (1.0, 1.02, 1.05)]
    eq = ms.minimize(ms.stack(systems))
    assert eq.positions.shape == (3, 16, 2) and np.all(eq.status == ms.Status.CONVERGED)
    assert np.all(eq.max_force <= 1e-12) and eq.steps.shape == (3,)
    for member, alone in zip(ms.unstack(eq), systems, strict=True):
        want = shape_of(ms.minimize(alone).positions)
        np.testing.assert_allclose(shape_of(member.positions), want, rtol=0, atol=1e-10)
    with pytest.raises(
        ms.ConvergenceError, match="3 of the 3 systems did not relax, the first is system 0"
    ) as caught:
        ms.minimize(ms.stack(systems), max_steps=1)
    assert np.all(caught.value.result.status == ms.Status.MAX_STEPS_REACHED)


def test_relax_inside_of_traced_code_gives_the_same():
    eq = jax.jit(relax, static_argnames="method")(packing(), 1e-12, 10_000, Fire())
    assert int(eq.status) == ms.Status.CONVERGED and float(eq.max_force) <= 1e-12
    assert relative(shape_of(eq.positions), shape_of(relaxed().positions)) < 1e-9


# ── not converging ──


def test_the_step_limit_is_raised_or_reported():
    with pytest.raises(
        ms.ConvergenceError, match=r"stopped after 7 steps at max_force .*raise max_steps"
    ) as caught:
        ms.minimize(packing(), max_steps=7)
    assert caught.value.status is ms.Status.MAX_STEPS_REACHED
    eq = ms.minimize(packing(), max_steps=7, throw=False)
    assert ms.Status(int(eq.status)) is ms.Status.MAX_STEPS_REACHED and int(eq.steps) == 7
    assert np.array_equal(eq.positions, caught.value.result.positions)
    # the force that is reported is the whole force, not what the minimizer made of it
    assert (
        float(eq.max_force) == pytest.approx(float(max_force(eq.system)), rel=1e-12)
        and float(eq.max_force) > 1e-6
    )


def broken(r, strength):
    """A potential that is not a number inside a core, where it is not tried beforehand."""
    core = jnp.sqrt(jnp.where(r < 0.5, -jnp.square(0.5 - r), 1.0))
    return strength * (0.5 * jnp.maximum(1.0 - r, 0.0) ** 2 + 0.0 * core)


def test_forces_that_are_no_numbers_are_a_status():
    potential = ms.potentials.from_pair(broken, ("strength",), cutoff=1.0)
    system = ms.System.create([[0.0, 0.0], [0.4, 0.0]], None, potential, {"strength": 1.0})
    eq = ms.minimize(system, throw=False, max_steps=50)
    assert ms.Status(int(eq.status)) is ms.Status.NOT_FINITE
    where = r"phi of broken is nan at r = 0\.4, the distance of particles 0 and 1"
    with pytest.raises(
        ms.ConvergenceError,
        match=f"{where}: a value was not finite; look for overlapping particles",
    ):
        ms.minimize(system, max_steps=50)


def test_single_precision_refuses_what_round_off_keeps_out_of_reach():
    with pytest.raises(ms.PrecisionError, match=r"tolerance=1e-12 .* float32.*enable_x64"):
        ms.minimize(dimer(dtype=np.float32), tolerance=1e-12)
    eq = ms.minimize(dimer(dtype=np.float32))
    assert eq.positions.dtype == jnp.float32
    assert (
        ms.Status(int(eq.status)) is ms.Status.ROUND_OFF_LIMITED
        and eq.max_force <= eq.force_floor < 1e-4
    )
    assert distance(eq, 0, 1) == pytest.approx(2 ** (1 / 6), rel=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tolerance": 0.0}, r"`tolerance` is 0.0: give a positive number"),
        ({"tolerance": np.nan}, r"`tolerance` is nan: give a positive number"),
        ({"tolerance": 1e-12 + 1e-12j}, r"`tolerance` is .*1e-12j.*: give a positive number"),
        ({"tolerance": "tight"}, r"`tolerance` is 'tight': give a positive number"),
        ({"max_steps": 0}, r"`max_steps` is 0: give a finite number from 1"),
        ({"max_steps": np.inf}, r"`max_steps` is inf: give a finite number from 1"),
        ({"params": {"sgima": 1.0}}, r"no parameter 'sgima' .*did you mean 'sigma'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ms.InputError, match=message):
        ms.minimize(packing(), **options)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Fire(dt_start=0.0), r"Fire\(dt_start=0.0\): give a positive number"),
        (lambda: Fire(dt_max=np.inf), r"Fire\(dt_max=inf\): give a positive number"),
        (lambda: ms.relaxation.JaxMD(3), r"JaxMD\(minimizer=3\): give a function \(force, shift\)"),  # type: ignore
        (
            lambda: GradientDescent(step_size=-1.0),
            r"GradientDescent\(step_size=-1.0\): give a positive number",
        ),
    ],
)
def test_bad_methods_are_refused(make, message):
    with pytest.raises(ms.InputError, match=message):
        make()


# ── random starts, unjammed systems, lists ──


def test_an_unjammed_system_converges_to_no_energy():
    rng = np.random.default_rng(3)
    loose = ms.System.create(
        9.0 * rng.random((20, 2)), 9.0, ms.potentials.soft_sphere(), packing_params()
    )
    assert float(potential_energy(loose)) > 0  # some overlap at first
    eq = ms.minimize(loose)
    assert ms.Status(int(eq.status)) is ms.Status.NO_CONTACTS and "zero energy" in str(eq)
    assert float(potential_energy(eq.system)) < 1e-20


def packing_params():
    return {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0}


@pytest.fixture(autouse=True, scope="module")
def short_lists_as_well():
    """Lists from 33 particles on, wherever all pairs may be faster."""
    with mock.patch.object(neighbors, "ALL_PAIRS_BELOW", 32):
        yield


@cache
def condensed() -> tuple[ms.Equilibrium, ms.System, int]:
    """Kob-Andersen discs from a random start with overlaps, loose enough to condense:
    more pairs than at the start.
    """
    rng = np.random.default_rng(4)
    n, length = 70, 12.0
    sigma, epsilon = [[1.0, 0.8], [0.8, 0.88]], [[1.0, 1.5], [1.5, 0.5]]
    potential = ms.potentials.lennard_jones(1.4, 1.8)
    params = {"sigma": sigma, "epsilon": epsilon}
    start = ms.System.create(
        length * rng.random((n, 2)), length, potential, params, (np.arange(n) % 5 == 0).astype(int)
    )
    # no room to spare
    start = start.replace(neighbors=start.neighbors.resized(int(start.neighbors.used)))
    with mock.patch.object(neighbors, "allocate", wraps=neighbors.allocate) as allocate:
        eq = ms.minimize(start, tolerance=1e-10, throw=False)
    return eq, start, allocate.call_count


def test_overlapping_lennard_jones_start_relaxes():
    eq, start, _ = condensed()
    assert float(max_force(start)) > 1e6  # forces that would throw particles out of the cell
    assert ms.Status(int(eq.status)) is ms.Status.CONVERGED
    assert float(potential_energy(eq.system)) < -70.0  # bound: more than a full bond a particle


def test_a_list_that_overflows_on_the_way_is_allocated_again():
    eq, start, calls = condensed()
    assert calls >= 1 and eq.system.neighbors.rows.shape[0] > start.neighbors.rows.shape[0]
    assert not bool(eq.system.neighbors.overflowed)
    whole = eq.system.replace(neighbors=neighbors.all_pairs(start.n))
    assert float(potential_energy(whole)) == pytest.approx(
        float(potential_energy(eq.system)), rel=1e-13
    )
    assert float(max_force(whole)) <= 2e-10


def test_traced_relaxing_marks_the_overflow_that_it_cannot_mend():
    _, start, _ = condensed()
    eq = relax(start, 1e-10, 2_000, Fire())
    assert ms.Status(int(eq.status)) is ms.Status.NEIGHBORS_OVERFLOWED
    # stopped in the very step of the overflow
    stopped = ms.minimize(start, tolerance=1e-10, max_steps=int(eq.steps), throw=False)
    assert ms.Status(int(stopped.status)) is ms.Status.MAX_STEPS_REACHED
    assert not bool(stopped.system.neighbors.overflowed)
    assert float(stopped.max_force) == pytest.approx(float(max_force(stopped.system)), rel=1e-12)


# ── progress ──


def test_no_progress_bar_where_nobody_watches(capfd):
    assert not sys.stderr.isatty()
    ms.minimize(packing(), max_steps=50, throw=False)
    assert capfd.readouterr() == ("", "")


def test_progress_bar_where_it_is_asked_for(capfd):
    bar = Decades(True, 1e-12)
    assert bar.bar is not None
    bar.bar.delay = 0
    bar.show(20, 1e-2)
    bar.show(40, 1e-7)
    bar.bar.refresh()
    assert bar.bar.n == 50  # half of the decades
    bar.close()
    out, err = capfd.readouterr()
    assert out == "" and "relaxing" in err and "step 40, max_force 1.0e-07" in err


def test_largest_force_is_that_of_one_particle():
    forces = jnp.asarray([[3.0, 4.0], [1.0, 0.0], [0.0, -4.9]])
    assert float(largest_force(forces)) == 5.0
    assert float(largest_force(jnp.zeros((0, 2)))) == 0.0


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_a_force_that_was_cut_is_not_small(unit):
    """A many-body potential in units where its forces are far above the tolerance
    at any step that the minimizer takes.
    """

    def embedded(positions, params, displacement):
        vectors = jax.vmap(lambda a: jax.vmap(lambda b: displacement(a, b))(positions))(positions)
        density = jnp.sum(jnp.exp(-jnp.sum(vectors**2, axis=-1) / params["reach"] ** 2), axis=1)
        return jnp.sum((density - 3.0) ** 2)

    potential = ms.potentials.from_energy(embedded, ("reach",))
    places = unit * np.random.default_rng(0).random((6, 2))
    system = ms.System.create(places, None, potential, {"reach": unit})
    eq = ms.minimize(system, tolerance=1e-6 / unit, max_steps=3000)
    assert eq.steps > 0
    assert float(max_force(eq.system)) <= 1e-6 / unit


# ── the stiffness that the time step is taken from ──


def hertzian(n: int) -> ms.System:
    """Discs near jamming, where contacts are several times softer
    than the potential's own stiffness says.
    """
    rng = np.random.default_rng(0)
    sigma = np.where(np.arange(n) < n // 2, 1.0, 0.6)
    length = np.sqrt(np.pi / 4 * np.sum(sigma**2) / 0.86)
    params = {"sigma": sigma, "epsilon": 1.0, "alpha": 2.5}
    return ms.System.create(
        rng.random((n, 2)) * length, length, ms.potentials.soft_sphere(), params
    )


# a list of all pairs, and one that becomes narrow
@pytest.mark.parametrize("n", quick([32, 256], 32))
def test_fire_takes_its_mass_from_the_stiffness_that_it_meets(n):
    start = hertzian(n)
    limits = Limits.of(natural_units(start), Fire(), start.potential.finite_force)
    state = at_rest(start.positions, limits, Fire())
    state, *_ = advance(start, state, start.reallocate(4.0).neighbors, 1e-12, 1500, Fire(), limits)
    relaxed = ms.minimize(start, method=Fire()).system
    largest = np.linalg.eigvalsh(dense_hessian(relaxed))[-1]
    mass = np.unique(np.asarray(state.inner["mass"] / state.unit))
    assert largest < 0.5 * float(limits.stiffness)
    assert mass.size == 1 and 0.85 * largest < mass[0] * 10.0 / MEASURED < 1.05 * largest


def test_largest_stiffness_of_a_stretched_spring():
    def slope(R):
        return jnp.stack([3.0 * (R[0] - R[1]), 3.0 * (R[1] - R[0])])

    R = jnp.array([[0.3, 0.1], [1.0, 0.4]])
    assert largest_stiffness(slope, R, 1.0) == pytest.approx(6.0, rel=1e-12)
    assert largest_stiffness(jnp.zeros_like, R, 2.5) == 2.5
    assert largest_stiffness(lambda R: jnp.inf * R, R, 2.5) == 2.5


def test_a_particle_alone_rests_where_it_is():
    params = {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0}
    eq = ms.minimize(ms.System.create([[1.0, 1.0]], 5.0, ms.potentials.soft_sphere(), params))
    np.testing.assert_array_equal(eq.positions, [[1.0, 1.0]])
    with pytest.raises(ms.ConvergenceError, match="no contact carries force"):
        ms.jvp(eq, {"sigma": 1.0})


def test_a_deep_overlap_gives_no_momentum():
    """Its energy would heat the system; FIRE moves such particles apart step by step."""
    potential = ms.potentials.lennard_jones()
    # two particles at a third of their distance of rest, two at a distance somewhat too short
    places = jnp.asarray([[0.0, 0.0], [0.4, 0.0], [5.0, 0.0], [6.05, 0.0]])
    system = ms.System.create(places, None, potential, {"sigma": 1.0, "epsilon": 1.0})
    limits = Limits.of(natural_units(system), Fire(), system.potential.finite_force)
    slope = energy_gradient(system)
    init, apply, _ = limited_minimizer(Fire(), lambda R: -slope(R), limits)
    state = init(places)
    for _ in range(3):
        state = apply(state)
    moved = np.asarray(Fire.positions(state) - places)
    momentum = np.asarray(state.inner["momentum"])
    assert moved[0, 0] < 0 < moved[1, 0] and not momentum[:2].any()
    assert moved[2, 0] < 0 < moved[3, 0] and momentum[2:, 0].all()
