"""Potentials averaged over a width of r: derivatives against quadrature of the potential's own."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LONG

import mdsens as ms
from mdsens.design import Free, LevenbergMarquardt, Target, fit
from mdsens.design.ensemble import softened
from mdsens.model.system import pair_terms
from mdsens.potentials.smoothed import SmoothedPotential, smoothed

WIDTH = 0.03
LAWS = {
    "harmonic": (ms.potentials.soft_sphere(), {"sigma": 1.0, "epsilon": 1.3, "alpha": 2.0}),
    "Hertzian": (ms.potentials.soft_sphere(), {"sigma": 1.0, "epsilon": 1.3, "alpha": 2.5}),
    "Lennard-Jones": (ms.potentials.lennard_jones(1.1, 1.3), {"sigma": 1.0, "epsilon": 0.7}),
}


def dimer(potential: Any, params: Any, r: float) -> ms.System:
    return ms.System.create([[0.0, 0.0], [r, 0.0]], None, potential, params)


NEAR, SHARES = np.polynomial.legendre.leggauss(40)


def averages(of: Any, r: float, points: list[float]) -> float:
    """The mean of a function over r +- WIDTH, by quadrature from breakpoint to breakpoint."""
    ends = [r - WIDTH, *sorted(p for p in points if abs(p - r) < WIDTH), r + WIDTH]
    total = 0.0
    for low, high in itertools.pairwise(ends):
        at = 0.5 * (low + high) + 0.5 * (high - low) * NEAR
        total += 0.5 * (high - low) * float(SHARES @ np.asarray(of(jnp.asarray(at))))
    return total / (2 * WIDTH)


@pytest.mark.parametrize("name", LAWS)
def test_slopes_are_the_averages_of_the_potential_s(name: str) -> None:
    potential, params = LAWS[name]
    at = dimer(potential, params, 0.99)
    (term,), (soft,) = pair_terms(at), pair_terms(at.replace(potential=smoothed(potential, WIDTH)))

    def slopes(term: Any) -> tuple[Any, Any]:
        def slope(s: jax.Array) -> jax.Array:
            return jax.grad(lambda x: term.phi(x, *[v.ravel()[0] for v in term.values]))(s)

        return jax.jit(jax.vmap(slope)), jax.jit(jax.vmap(jax.grad(slope)))

    (force, _), (average, stiffness) = slopes(term), slopes(soft)
    for r in (0.9, 0.98, 1.01, 1.02, 1.11, 1.29):
        point = jnp.asarray([r])
        assert float(average(point)[0]) == pytest.approx(
            averages(force, r, [1.0, 1.1, 1.3]), rel=1e-8, abs=1e-10
        )
        below, above = np.asarray(force(jnp.asarray([r - WIDTH, r + WIDTH])))
        assert float(stiffness(point)[0]) == pytest.approx(
            (above - below) / (2 * WIDTH), rel=1e-10, abs=1e-10
        )


@pytest.mark.parametrize("name", LAWS)
def test_derivatives_by_parameters_are_those_of_the_smoothed_slope(name: str) -> None:
    potential, params = LAWS[name]
    at, h = dimer(smoothed(potential, WIDTH), params, 0.99), 1e-6

    def force(sigma: jax.Array) -> jax.Array:
        inside = {**at.params, "sigma": sigma}
        return jax.grad(lambda R: sum(t.energy(distance(R)).sum() for t in pair_terms(at, inside)))(
            at.positions
        )[0, 0]

    def distance(R: jax.Array) -> jax.Array:
        return jnp.linalg.norm(R[1] - R[0])[None]

    sigma = at.params["sigma"]
    assert float(jax.grad(force)(sigma)) == pytest.approx(
        float((force(sigma + h) - force(sigma - h)) / (2 * h)), rel=1e-5
    )


def test_a_sum_smooths_its_pair_potentials_alone() -> None:
    bonds = ms.potentials.harmonic_bonds([[0, 1]])
    potential = smoothed(ms.potentials.soft_sphere() + bonds, 0.1)
    assert isinstance(potential.parts[0], SmoothedPotential) and potential.parts[1] is bonds
    assert smoothed(bonds, 0.1) is bonds
    assert (
        float(
            smoothed(ms.potentials.soft_sphere(), 0.1).range(
                {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0}
            )
        )
        == 1.1
    )


@LONG
def test_a_narrow_average_has_the_derivatives_of_the_potential() -> None:
    eq = ms.minimize(ms.load_system("polydisperse_2d", count=64, seed=1), progress=False)
    (soft,) = softened(eq, [1e-7], 1e-7)
    for of in (lambda m: m.poisson, lambda m: m.bulk):
        ours, potential = (
            np.asarray(ms.elasticity.gradient(of, at).value["sigma"]) for at in (soft, eq)
        )
        np.testing.assert_allclose(ours, potential, atol=1e-5 * np.abs(potential).max())


def test_a_contact_that_is_about_to_form_has_a_derivative() -> None:
    """At alpha = 2 the energy of a pair a hair beyond contact knows nothing of the other;
    averaged, it stiffens.
    """
    potential, params = LAWS["harmonic"]

    def stiffness_slope(of: Any) -> float:
        (term,) = pair_terms(dimer(of, params, 1.01))

        def stiffness(s: jax.Array) -> jax.Array:
            return jax.grad(jax.grad(lambda x: term.phi(x, *[v.ravel()[0] for v in term.values])))(
                s
            )

        return float(jax.grad(stiffness)(jnp.asarray(1.01)))

    assert stiffness_slope(potential) == 0.0
    assert stiffness_slope(smoothed(potential, WIDTH)) == pytest.approx(-1.3 / (2 * WIDTH))


def test_what_barely_touches_holds_nothing() -> None:
    """Pairs that only the width brings together are no contacts,
    so that no rattler turns into a soft mode.
    """
    eq = ms.minimize(
        ms.load_system("seed_packing_2d", seed=2, box={"packing_fraction": 0.87}), progress=False
    )
    (soft,) = softened(eq, [0.02], 0.02)
    rattlers, loose = (np.asarray(lin.network.rattlers) for lin in (ms.linearize(eq), soft))
    assert rattlers.any() and loose[rattlers].all()


def test_a_cell_without_room_for_wider_pairs_is_designed_without_them() -> None:
    start = ms.load_system("polydisperse_2d", count=12, seed=0)
    assert start.box is not None and float(start.range) * 1.2 > 0.5 * float(start.box[0, 0])
    wanted = Target("pressure", -1e-3, 1e-4, from_start=True)
    wide = LevenbergMarquardt()
    ours = [
        fit(wanted, start, {"sigma": Free(within=0.3)}, method=m, progress=False)
        for m in (wide, bare(wide))
    ]
    assert ours[0].status is ours[1].status is ms.Status.CONVERGED
    np.testing.assert_array_equal(ours[0].params["sigma"], ours[1].params["sigma"])


def bare(method: LevenbergMarquardt) -> LevenbergMarquardt:
    return dataclasses.replace(method, widths=())
