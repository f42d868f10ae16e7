"""Saddles as roots of the same F: found, judged, differentiated; barriers and their derivatives."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick

import mdsens as ms
from mdsens.implicit import MINRES, Direct
from mdsens.mechanics.hessian import max_force
from mdsens.mechanics.unknowns import Unknowns
from mdsens.saddles import _elastic_band
from mdsens.saddles.search import EigenvectorFollowing, ElasticBand, find_saddle, sides

TIGHT = 1e-12


def lennard_jones(r: jax.Array, sigma: jax.Array, epsilon: jax.Array) -> jax.Array:
    sixth = (sigma / r) ** 6
    return 4.0 * epsilon * (sixth**2 - sixth)


BARE = ms.potentials.from_pair(lennard_jones, ("sigma", "epsilon"), None)


def ring(count: int, radius: float) -> np.ndarray:
    turn = 2 * np.pi / count * np.arange(count)
    return radius * np.stack([np.cos(turn), np.sin(turn)], axis=1)


def discs(positions: np.ndarray) -> ms.System:
    return ms.System.create(positions, None, BARE, {"sigma": 1.0, "epsilon": 1.0})


@cache
def cluster() -> ms.Equilibrium:
    """The seven discs of Dellago, Bolhuis and Chandler,
    J. Chem. Phys. 108, 9236 (1998), at their hexagon.
    """
    return ms.minimize(discs(np.concatenate([np.zeros((1, 2)), ring(6, 1.12)])), tolerance=TIGHT)


@cache
def over(seed: int) -> ms.Equilibrium:
    """A saddle of the cluster, climbed to along a random direction."""
    return find_saddle(
        cluster(), direction=np.random.default_rng(seed).normal(size=(7, 2)), tolerance=TIGHT
    )


@cache
def vacancy() -> tuple[ms.Equilibrium, ms.Equilibrium]:
    """A triangular crystal of Lennard-Jones discs without one of them, in a cell;
    and the hop of a neighbor.
    """
    grid = (
        np.stack(np.meshgrid(np.arange(6), np.arange(6), indexing="ij"), axis=-1).reshape(-1, 2) / 6
    )
    box = 1.11 * 6 * np.array([[1.0, 0.5], [0.0, 0.75**0.5]])
    places = grid @ box.T + 0.01
    start = ms.System.create(
        places[1:], box, ms.potentials.lennard_jones(), {"sigma": 1.0, "epsilon": 1.0}
    )
    eq = ms.minimize(start, tolerance=TIGHT)
    direction = np.zeros((35, 2))
    direction[0] = places[0] - places[1]
    return eq, find_saddle(eq, direction=direction, tolerance=TIGHT)


def energy(at: ms.Equilibrium) -> float:
    return float(ms.observables.energy(at.system))


# climbed to from the hexagon: the saddle's energy, and those of its two minima,
# of the four that the cluster has
PASSES = {1: (-11.04025, (-12.53487, -11.47691)), 5: (-11.03733, (-12.53487, -11.50129))}


@pytest.mark.parametrize("seed", PASSES)
def test_the_passes_out_of_the_hexagon_are_found(seed: int):
    saddle = over(seed)
    assert (
        saddle.order == 1
        and float(saddle.max_force) <= TIGHT
        and "saddle of order 1" in str(saddle)
    )
    height, minima = PASSES[seed]
    assert energy(saddle) == pytest.approx(height, abs=1e-5)
    found = sides(saddle, tolerance=1e-11)
    assert sorted(map(energy, found)) == pytest.approx(minima, abs=1e-5)
    again = find_saddle(found[0], towards=found[1])
    assert energy(again) == pytest.approx(energy(saddle), abs=1e-10)


def test_the_softest_mode_leads_to_a_saddle_too():
    """Of the hexagon it is one of two, equally soft:
    which of its passes they lead to is left to round-off.
    """
    saddle = find_saddle(cluster())
    assert (
        saddle.order == 1
        and ms.certify(saddle).negative_modes == 1
        and energy(saddle) > energy(cluster())
    )
    assert 0 < float(saddle.force_floor) and float(saddle.max_force) <= 1e-10
    assert min(abs(energy(saddle) - height) for height in (-11.04025, -11.03733, -10.45468)) < 1e-5
    assert min(map(energy, sides(saddle))) == pytest.approx(energy(cluster()), abs=1e-9)


def test_a_saddle_of_higher_order_is_left():
    """A ring of seven has forces along its radii alone, and leads to a saddle of order 4;
    no slope points off it.
    """
    saddle = find_saddle(discs(ring(7, 1.25)))
    assert saddle.order == 1 and energy(saddle) < -10.0 and ms.certify(saddle).negative_modes == 1


def test_another_code_finds_the_same_saddle():
    """ASE's dimer, on its own Lennard-Jones forces."""
    from ase import Atoms
    from ase.calculators.lj import LennardJones
    from ase.mep import DimerControl, MinModeAtoms, MinModeTranslate

    silent: Any = None

    saddle = over(1)
    rng = np.random.default_rng(0)
    start = np.zeros((7, 3))
    start[:, :2] = np.asarray(saddle.positions) + 0.02 * rng.normal(size=(7, 2))
    atoms = Atoms("Ar7", positions=start)
    atoms.calc = LennardJones(sigma=1.0, epsilon=1.0, rc=1000.0)
    with DimerControl(
        initial_eigenmode_method="displacement",
        displacement_method="vector",
        logfile=silent,
        mask=[True] * 7,
    ) as control:
        dimer = MinModeAtoms(atoms, control)
        dimer.displace(displacement_vector=1e-3 * np.pad(rng.normal(size=(7, 2)), ((0, 0), (0, 1))))
        with MinModeTranslate(dimer, logfile=silent) as follow_eigenvector:
            assert follow_eigenvector.run(fmax=1e-3, steps=300)
    assert atoms.get_potential_energy() == pytest.approx(energy(saddle), abs=1e-6)


def test_positions_of_a_saddle_follow_the_diameter():
    """Without a cutoff sigma is the only length: R = sigma R(1) and dR/dsigma = R / sigma;
    energies leave R alone.
    """
    saddle = over(1)
    centered = np.asarray(saddle.positions - saddle.positions.mean(axis=0))
    lin = ms.linearize(saddle)
    np.testing.assert_allclose(ms.jvp(lin, {"sigma": 1.0}).value, centered, atol=1e-11)
    np.testing.assert_allclose(ms.jacobian(lin, "sigma").value, centered, atol=1e-11)
    assert np.abs(ms.jvp(lin, {"epsilon": 1.0}).value).max() < 1e-11
    # of (sum R^2) it is 2 (sum R^2) / sigma, by reverse mode
    spread = ms.gradient(
        lambda s: jnp.sum((s.positions - s.positions.mean(axis=0)) ** 2), lin
    ).value
    assert float(spread["sigma"]) == pytest.approx(2.0 * np.sum(centered**2), rel=1e-10)


def test_an_iteration_has_to_be_one_for_indefinite_matrices():
    want = ms.jvp(over(1), {"sigma": 1.0}).value
    np.testing.assert_allclose(
        ms.jvp(over(1), {"sigma": 1.0}, solve=ms.implicit.MINRES(1e-12)).value, want, atol=1e-9
    )
    with pytest.raises(ms.InputError, match="MINRES"):
        ms.jvp(over(1), {"sigma": 1.0}, solve=ms.implicit.CG())


@pytest.mark.parametrize(
    ("where", "order", "status"),
    [
        ("saddle", 0, ms.Status.INDEFINITE),
        ("saddle", 2, ms.Status.NOT_A_SADDLE),
        ("minimum", 1, ms.Status.NOT_A_SADDLE),
    ],
)
def test_a_wrong_order_is_an_error(where: str, order: int, status: ms.Status):
    eq = dataclasses.replace(over(1) if where == "saddle" else cluster(), order=order)
    with pytest.raises(ms.ConvergenceError) as caught:
        ms.jvp(eq, {"sigma": 1.0})
    assert caught.value.status is status
    c = ms.certify(eq, {"sigma": 1.0})
    assert c.status is status and c.error == np.inf and not c.estimates_hold


def test_the_certificate_is_of_a_saddle():
    saddle = over(5)
    c = ms.certify(saddle, {"sigma": 1.0})
    assert (
        c.status is ms.Status.CONVERGED and c.negative_modes == c.order == 1 and c.stiffness_min < 0
    )
    assert "Is it a saddle of order 1?" in str(c) and c.as_dict()["order"] == 1
    # beside the saddle the Newton step is the distance to it,
    # and the estimate is the error of the derivative there
    away = 1e-5 * np.random.default_rng(0).normal(size=(7, 2))
    system = saddle.system.replace(positions=saddle.positions + away)
    beside = dataclasses.replace(saddle, system=system, max_force=max_force(system))
    d = ms.certify(beside, {"sigma": 1.0})
    off = np.asarray(ms.linearize(saddle).null.project(Unknowns(jnp.asarray(away))).positions)
    assert (
        d.newton_step_norm == pytest.approx(np.linalg.norm(off), rel=1e-3)
        and d.newton_step_norm <= d.distance
    )
    right, wrong = (ms.jvp(eq, {"sigma": 1.0}, throw=False).value for eq in (saddle, beside))
    turn = np.linalg.norm(wrong - right) / np.linalg.norm(right)
    assert 0.3 * turn < d.error < 3.0 * turn and d.bound > d.error


@pytest.mark.parametrize("name", quick(["sigma", "epsilon"], "epsilon"))
def test_the_hop_of_a_vacancy_moves_as_differences_say(name: str):
    """Barrier, its derivatives to the second and the saddle's positions,
    against finding both ends again.
    """
    minimum, saddle = vacancy()
    found = ms.barrier(minimum, saddle, {name: 1.0})
    step = 1e-5
    ends = [
        (
            ms.minimize(minimum.system, moved, tolerance=TIGHT),
            find_saddle(saddle.system, moved, tolerance=TIGHT),
        )
        for moved in ({name: 1.0 + step}, {name: 1.0 - step})
    ]
    up, down = (ms.barrier(*pair) for pair in ends)
    assert found.second is not None
    assert (up.value - down.value) / (2 * step) == pytest.approx(
        float(found.gradient[name]), rel=1e-6
    )
    for other in found.gradient:
        second = float(up.gradient[other] - down.gradient[other]) / (2 * step)
        assert second == pytest.approx(float(found.second[other]), rel=1e-6, abs=1e-6)
    if name == "sigma":
        v = ms.verify.finite_difference(saddle, {"sigma": 1.0})
        assert v.status.good and v.disagreement(ms.jvp(saddle, {"sigma": 1.0}).value) < 1e-6
    else:
        assert float(found.gradient["epsilon"]) == pytest.approx(found.value, rel=1e-12)


def test_a_barrier_without_a_cutoff_is_a_multiple_of_epsilon():
    b = ms.barrier(cluster(), over(1), {"sigma": 1.0})
    assert b.value == pytest.approx(PASSES[1][0] - PASSES[1][1][0], abs=2e-5)
    # d ln B / d ln epsilon = 1
    assert float(b.gradient["epsilon"]) == pytest.approx(b.value, rel=1e-12)
    assert abs(float(b.gradient["sigma"])) < 1e-10
    assert (
        b.second is not None
        and abs(float(b.second["sigma"])) < 1e-9
        and abs(float(b.second["epsilon"])) < 1e-10
    )
    assert b.status is ms.Status.CONVERGED
    assert "by epsilon" in str(b)


def test_second_derivatives_of_a_barrier_take_a_solver() -> None:
    minimum, saddle = cluster(), over(1)
    default = ms.barrier(minimum, saddle, {"sigma": 1.0})
    chosen = ms.barrier(minimum, saddle, {"sigma": 1.0}, solve=Direct())
    assert default.second is not None and chosen.second is not None
    # Both are zero: a barrier without a cutoff does not depend on sigma.
    assert abs(float(chosen.second["sigma"]) - float(default.second["sigma"])) < 1e-9
    with pytest.raises(ms.ConvergenceError):
        ms.barrier(minimum, saddle, {"sigma": 1.0}, solve=MINRES(max_iterations=1))


def test_a_walk_that_is_cut_short_says_so():
    with pytest.raises(ms.ConvergenceError) as caught:
        find_saddle(cluster(), max_steps=2)
    assert (
        caught.value.status is ms.Status.MAX_STEPS_REACHED and int(caught.value.result.steps) == 2
    )


def anything(value: Any) -> Any:
    return value


REFUSED: list[tuple[Any, str]] = [
    (lambda: find_saddle(anything(cluster().positions)), "give a System"),
    (lambda: find_saddle(ms.stack([cluster().system] * 2)), "batch of 2"),
    (lambda: find_saddle(cluster(), direction=np.zeros((7, 2))), "not zero"),
    (lambda: find_saddle(cluster(), direction=np.ones((6, 2))), r"shape \(6, 2\)"),
    (lambda: find_saddle(cluster(), direction=np.ones((7, 2)), towards=over(1)), "one of them"),
    (lambda: find_saddle(cluster(), towards=discs(ring(5, 1.0))), "same particles"),
    (lambda: find_saddle(cluster(), towards=cluster()), "same configuration as `start`"),
    (lambda: find_saddle(cluster(), tolerance=0.0), "tolerance"),
    (lambda: find_saddle(cluster(), tolerance=1e-17), "out of reach"),
    (lambda: find_saddle(cluster(), max_steps=0), "max_steps"),
    (lambda: find_saddle(cluster(), method=anything(ms.relaxation.Fire())), "EigenvectorFollowing"),
    (lambda: EigenvectorFollowing(vectors=1), "vectors"),
    (lambda: ElasticBand(images=0), "images"),
    (lambda: sides(cluster()), "order 1"),
    (lambda: ms.barrier(cluster(), cluster()), "`saddle` has order 0"),
    (lambda: ms.barrier(over(1), over(1)), "`minimum` has order 1"),
    (lambda: ms.barrier(cluster(), vacancy()[1]), "different systems"),
    (
        lambda: ms.barrier(
            dataclasses.replace(cluster(), system=cluster().system.with_params({"epsilon": 2.0})),
            over(1),
        ),
        "differ in epsilon",
    ),
]


@pytest.mark.parametrize(("call", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_bad_input_is_refused(call, says: str):
    with pytest.raises(ms.InputError, match=says):
        call()


def test_two_minima_are_aligned_whatever_common_translation_lies_between_them():
    """At half the cell, the nearest images of some particles point the opposite way."""
    rng = np.random.default_rng(4)
    first = rng.uniform(0.0, 10.0, (20, 2))
    change = 0.1 * rng.normal(size=first.shape)
    change -= change.mean(axis=0)
    params = {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0}
    start = ms.System.create(first, 10.0, ms.potentials.soft_sphere(), params)
    for shift in np.linspace(0.0, 10.0, 21):
        end = start.replace(positions=jnp.asarray(first + change + [shift, -0.7 * shift]))
        np.testing.assert_allclose(_elastic_band._align(start, end), first + change, atol=1e-9)
