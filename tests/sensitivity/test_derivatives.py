"""Sensitivities against closed forms, minimizing again, the adjoint identity,
the pseudo-inverse and each other.
"""

from __future__ import annotations

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LONG, packing, quick, relative, relaxed_packing

import mdsens as ms
from mdsens._util import memory
from mdsens.implicit import CG, GMRES, MINRES, BiCGSTAB, Direct, LeastSquares, NormalCG
from mdsens.mechanics.hessian import dense_hessian


@cache
def seed(k: int, held: bool = False) -> ms.Equilibrium:
    """The packing of 128 discs of two sizes, from random start k."""
    return ms.minimize(
        ms.load_system("seed_packing_2d", seed=k, **({"box": _HELD} if held else {}))
    )


_HELD = {"packing_fraction": 0.98, "follows": "nothing"}
THETA = {"sigma": [0.0, 1.0]}


@cache
def dimer(sigma: float = 1.0) -> ms.Equilibrium:
    start = [[0.0, 0.0, 0.0], [0.7 * sigma, 0.8 * sigma, 0.2 * sigma]]
    params = {"sigma": sigma, "epsilon": 1.0}
    return ms.minimize(ms.System.create(start, None, ms.potentials.lennard_jones(2.0, 2.5), params))


def separation(r: jax.Array, eq: ms.Equilibrium) -> float:
    """The change of the dimer's distance."""
    axis = eq.positions[1] - eq.positions[0]
    return float(jnp.vdot(r[1] - r[0], axis) / jnp.linalg.norm(axis))


@pytest.mark.as_shipped
def test_dimer_follows_its_closed_form():
    # r* = 2^(1/6) sigma inside the onset of the switch, whatever epsilon
    eq = dimer()
    r = ms.jvp(eq, {"sigma": 1.0})
    assert separation(r.value, eq) == pytest.approx(2 ** (1 / 6), abs=1e-12)
    assert float(jnp.abs(jnp.sum(r.value, axis=0)).max()) < 1e-13  # no translation
    turned = jnp.cross(eq.positions - eq.positions.mean(0), r.value).sum(0)
    assert float(jnp.abs(turned).max()) < 1e-12  # no rotation
    assert float(jnp.abs(ms.jvp(eq, {"epsilon": 1.0}).value).max()) < 1e-11


def test_triangle_of_springs_follows_its_closed_form():
    # a triangle without prestress takes the rest lengths as they are:
    # d|r_b| / dl_b = 1, the other sides stay
    points = np.array([[0.0, 0.0], [1.0, 0.1], [0.4, 0.9]])
    bonds = np.array([[0, 1], [1, 2], [2, 0]])
    lengths = np.linalg.norm(points[bonds[:, 0]] - points[bonds[:, 1]], axis=1)
    potential = ms.potentials.harmonic_bonds(bonds)
    system = ms.System.create(
        points + 0.01, None, potential, {"stiffness": [1.0, 2.0, 3.0], "length": lengths}
    )
    eq = ms.minimize(system)
    J = ms.jacobian(eq, "length").value  # (3, 2, 3)
    sides = eq.positions[bonds[:, 0]] - eq.positions[bonds[:, 1]]
    unit = sides / jnp.linalg.norm(sides, axis=1, keepdims=True)
    change = jnp.einsum("bd,bdk->bk", unit, J[bonds[:, 0]] - J[bonds[:, 1]])
    np.testing.assert_allclose(change, np.eye(3), atol=1e-10)
    assert float(jnp.abs(ms.jvp(eq, {"stiffness": [1.0, -1.0, 0.5]}).value).max()) < 1e-10


@pytest.mark.as_shipped
@pytest.mark.parametrize("held", [False, True])
def test_jvp_equals_minimizing_again(held):
    eq = seed(3, held)
    r, v = ms.jvp(eq, THETA), ms.verify.finite_difference(eq, THETA)
    assert not v.network_changed
    assert v.disagreement(r.value) < 1e-5
    # the check can fail
    assert ms.verify.finite_difference(eq, {"sigma": [1.0, -0.5]}).disagreement(r.value) > 1e-2


def _pseudo_inverse(lin: ms.Linearization) -> np.ndarray:
    """Of the backbone's dense Hessian."""
    values, vectors = np.linalg.eigh(np.asarray(dense_hessian(lin.system)))
    kept = values > 1e-12 * values[-1]
    return (vectors[:, kept] / values[kept]) @ vectors[:, kept].T


def test_cotangent_on_rattlers_and_translations_gives_the_pseudo_inverse_on_the_backbone():
    lin = ms.linearize(relaxed_packing("3d_bidisperse_N128_p1e-4", 7))
    rattlers = np.asarray(lin.network.rattlers)
    assert rattlers.sum() == 8
    w = np.random.default_rng(1).normal(size=(128, 3))
    r = ms.response(lin, w)
    assert r.status is ms.Status.NULL_COMPONENT_DROPPED
    assert relative(r.value.ravel(), _pseudo_inverse(lin) @ w.ravel()) < 1e-8
    assert not np.asarray(r.value)[rattlers].any()
    only = np.zeros((128, 3))
    only[rattlers] = 1.0
    alone = ms.vjp(lin, only)
    assert alone.status is ms.Status.NULL_COMPONENT_DROPPED and float(
        alone.stats.dropped
    ) == pytest.approx(1.0)
    assert all(not np.asarray(v).any() for v in alone.value.values())


def test_jacobian_is_made_of_jvps_whatever_the_chunk():
    eq = relaxed_packing("2d_polydisperse_N64_p1e-1", 0)
    whole, chunked = ms.jacobian(eq, "sigma"), ms.jacobian(eq, "sigma", chunk=7)
    assert whole.value.shape == (64, 2, 64) and whole.stats.status.shape == (64,)
    np.testing.assert_allclose(chunked.value, whole.value, rtol=0, atol=1e-11)
    unit = np.eye(64)[5]
    assert relative(whole.value[..., 5], ms.jvp(eq, {"sigma": unit}).value) < 1e-11
    np.testing.assert_allclose(
        ms.jacobian(eq, "alpha").value, ms.jvp(eq, {"alpha": 1.0}).value, atol=1e-12
    )


def test_jacobian_refuses_what_cannot_fit(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 1e5)
    with pytest.raises(ms.TooLargeError, match=r"64 components .* takes .* GiB, .* take ms.vjp"):
        ms.jacobian(relaxed_packing("2d_polydisperse_N64_p1e-1", 0), "sigma")


def test_gradient_of_the_pressure_equals_minimizing_again():
    eq = seed(3)
    g = ms.gradient(ms.observables.pressure, eq).value["sigma"]
    h = 1e-6
    for k in range(2):
        sides = [
            ms.minimize(
                eq.system, {"sigma": eq.params["sigma"].at[k].add(t)}, tolerance=1e-14
            ).system
            for t in (h, -h)
        ]
        slope = (ms.observables.pressure(sides[0]) - ms.observables.pressure(sides[1])) / (2 * h)
        assert float(g[k]) == pytest.approx(float(slope), rel=1e-6)


def test_gradient_of_the_energy_has_no_implicit_part():
    eq = seed(3)
    g = ms.gradient(ms.observables.energy, eq)
    direct = jax.grad(lambda p: ms.observables.energy(eq.system.replace(params=p)))(eq.params)
    for name, value in direct.items():
        np.testing.assert_allclose(g.value[name], value, rtol=1e-9, atol=1e-12)


def test_gradient_of_an_array_has_its_shape():
    eq = seed(3)
    g = ms.gradient(ms.observables.stress, eq)
    assert g.value["sigma"].shape == (2, 2, 2) and g.stats.status.shape == (2, 2)
    p = ms.gradient(ms.observables.pressure, eq)
    np.testing.assert_allclose(
        -(g.value["sigma"][0, 0] + g.value["sigma"][1, 1]) / 2, p.value["sigma"], rtol=1e-10
    )


def test_nonaffine_part_does_not_depend_on_the_images():
    eq = seed(3)
    box = np.asarray(eq.system.box)
    shifts = np.random.default_rng(3).integers(-2, 3, size=(128, 2))
    moved = dataclasses.replace(
        eq, system=eq.system.replace(positions=eq.positions + shifts @ box.T).reallocate()
    )
    here, there = ms.jvp(eq, THETA), ms.jvp(moved, THETA)
    assert relative(there.nonaffine, here.nonaffine) < 1e-9
    assert relative(there.value, here.value) > 1e-2


# ── the composable door ──


def relaxed_positions(system: ms.System, free: str = "sigma"):
    return lambda value: ms.equilibrate(system, {free: value}).positions


@pytest.mark.parametrize("held", quick([False, True], False))
def test_the_two_doors_agree_forward_and_reverse(held):
    eq = seed(3, held)
    f, sigma = relaxed_positions(eq.system), eq.params["sigma"]
    J = ms.jacobian(eq, "sigma").value
    assert relative(jax.jacfwd(f)(sigma), J) < 1e-9
    w = jax.random.normal(jax.random.key(0), eq.positions.shape)
    pulled = jax.jit(jax.grad(lambda s: jnp.vdot(w, f(s))))(sigma)
    np.testing.assert_allclose(pulled, ms.vjp(eq, w).value["sigma"], rtol=1e-8)


@LONG
def test_jacrev_of_a_small_system_equals_jacfwd_and_finite_differences():
    eq = cluster()
    f, sigma = relaxed_positions(eq.system), eq.params["sigma"]
    forward, reverse = jax.jacfwd(f)(sigma), jax.jacrev(f)(sigma)
    assert relative(reverse, forward) < 1e-10
    v = ms.verify.finite_difference(eq, {"sigma": [1.0, 0.0]})
    assert v.disagreement(forward[..., 0]) < 1e-6


@cache
def cluster() -> ms.Equilibrium:
    """Seven Lennard-Jones particles of two kinds in the plane, open boundaries."""
    rng = np.random.default_rng(4)
    angles = np.arange(6) * np.pi / 3
    start = np.concatenate([np.zeros((1, 2)), 1.1 * np.stack([np.cos(angles), np.sin(angles)], 1)])
    start = start + 0.05 * rng.normal(size=(7, 2))
    params = {"sigma": [1.0, 1.1], "epsilon": [1.0, 0.8]}
    return ms.minimize(
        ms.System.create(
            start, None, ms.potentials.lennard_jones(3.0, 4.0), params, [0, 1, 0, 0, 1, 0, 0]
        )
    )


def _spread(system: ms.System) -> jax.Array:
    """A scalar of the shape that depends nonlinearly on the positions."""
    centered = system.positions - jnp.mean(system.positions, axis=0)
    return jnp.sum(centered**2) ** 1.5


def test_second_derivatives_equal_differences_of_the_gradient():
    eq = cluster()

    def observed(sigma: jax.Array) -> jax.Array:
        return _spread(ms.equilibrate(eq.system, {"sigma": sigma}, tolerance=1e-13))

    sigma = eq.params["sigma"]
    H = jax.hessian(observed)(sigma)
    np.testing.assert_allclose(H, H.T, rtol=1e-9)
    slope, h = jax.jit(jax.grad(observed)), 1e-5
    for k in range(2):
        difference = (slope(sigma.at[k].add(h)) - slope(sigma.at[k].add(-h))) / (2 * h)
        np.testing.assert_allclose(H[k], difference, rtol=1e-6)


def test_vmap_over_seeds_equals_one_by_one_and_carries_a_status_each():
    equilibria = [seed(k) for k in (3, 4)]
    batch = ms.stack([eq.system for eq in equilibria])
    w = jax.random.normal(jax.random.key(1), (128, 2))

    def observed(system: ms.System, sigma: jax.Array):
        relaxed, stats = ms.equilibrate(system, {"sigma": sigma}, has_aux=True)
        return jnp.vdot(w, relaxed.positions), stats.status

    slopes, codes = jax.jit(jax.vmap(jax.grad(observed, argnums=1, has_aux=True)))(
        batch, batch.params["sigma"]
    )
    assert codes.tolist() == [0, 0]
    for k, eq in enumerate(equilibria):
        np.testing.assert_allclose(slopes[k], ms.vjp(eq, w).value["sigma"], rtol=1e-7)


@LONG
def test_a_box_given_by_a_function_is_differentiated():
    def box(params):
        return jnp.array([[5.2, 0.3], [0.0, 4.85]]) * (
            params["sigma"][0] + 0.5 * params["sigma"][1]
        )

    rng = np.random.default_rng(5)
    species = np.arange(60) % 2
    system = ms.System.create(
        rng.random((60, 2)) @ np.array([[9.0, 0.0], [0.5, 8.0]]),
        box,
        ms.potentials.soft_sphere(),
        {"sigma": [1.0, 1.4], "epsilon": 1.0, "alpha": 2.0},
        species,
    )
    eq = ms.minimize(system, tolerance=1e-13)
    r = ms.jvp(eq, {"sigma": [1.0, 0.0]})
    assert ms.verify.finite_difference(eq, {"sigma": [1.0, 0.0]}).disagreement(r.value) < 1e-6
    moved = jax.jvp(relaxed_positions(eq.system), (eq.params["sigma"],), (jnp.array([1.0, 0.0]),))[
        1
    ]
    assert relative(moved, r.value) < 1e-9


def test_equilibrate_says_when_it_failed():
    system = ms.load_system("seed_packing_2d", seed=3)
    _, stats = ms.equilibrate(system, max_steps=3, has_aux=True)
    assert ms.Status(int(stats.status)) is ms.Status.MAX_STEPS_REACHED


# ── batches ──


def test_a_batch_is_done_member_by_member():
    systems = [ms.load_system("seed_packing_2d", seed=k) for k in (3, 4)]
    eq = ms.minimize(ms.stack(systems))
    assert eq.status.tolist() == [0, 0] and eq.system.batch == 2
    r = ms.jvp(eq, THETA)
    assert r.value.shape == (2, 128, 2) and r.stats.status.shape == (2,)
    for k in range(2):
        assert relative(r.value[k], ms.jvp(seed(3 + k), THETA).value) < 1e-7
    w = np.random.default_rng(6).normal(size=(2, 128, 2))
    v = ms.vjp(eq, w)
    assert v.value["sigma"].shape == (2, 2)
    g = ms.gradient(ms.observables.pressure, eq)
    single = ms.gradient(ms.observables.pressure, seed(4)).value["sigma"]
    np.testing.assert_allclose(g.value["sigma"][1], single, rtol=1e-6)


# ── what must be refused ──


def test_an_early_stop_says_so():
    eq = seed(3)
    for solver in (
        CG(max_iterations=5),
        GMRES(max_iterations=5),
        MINRES(max_iterations=5),
        BiCGSTAB(max_iterations=5),
    ):
        with pytest.raises(ms.ConvergenceError, match="residual") as caught:
            ms.jvp(eq, THETA, solve=solver)
        assert caught.value.status is ms.Status.MAX_STEPS_REACHED
        r = ms.jvp(eq, THETA, solve=solver, throw=False)
        assert not r.status.good and float(r.stats.residual) > 1e-3


def test_single_precision_is_a_warning():
    places = np.array([[0.0, 0.0], [1.3, 0.1]], np.float32)
    single = ms.System.create(
        places, None, ms.potentials.lennard_jones(), {"sigma": 1.0, "epsilon": 1.0}
    )
    eq = ms.minimize(single, tolerance=1e-4)
    along = eq.positions - jnp.mean(eq.positions, axis=0)
    found = (
        ms.jvp(eq, {"sigma": 1.0}),
        ms.gradient(ms.observables.energy, eq),
        ms.response(eq, along),
    )
    for answer in found:
        assert (
            answer.status is ms.Status.SINGLE_PRECISION
            and answer.status.good
            and answer.status.warning
        )
    assert separation(found[0].value, eq) == pytest.approx(2 ** (1 / 6), rel=1e-5)


def test_an_unconverged_minimum_is_refused():
    system = ms.load_system("seed_packing_2d", seed=3)
    eq = ms.minimize(system, max_steps=20, throw=False)
    with pytest.raises(ms.ConvergenceError, match="step limit"):
        ms.jvp(eq, THETA)
    assert ms.jvp(eq, THETA, throw=False).status is ms.Status.MAX_STEPS_REACHED


def test_an_unjammed_packing_is_refused():
    eq = ms.minimize(ms.load_system("seed_packing_2d", seed=3, box={"packing_fraction": 0.4}))
    with pytest.raises(ms.ConvergenceError, match="no contact carries force") as caught:
        ms.jvp(eq, THETA)
    assert caught.value.status is ms.Status.UNJAMMED
    assert ms.vjp(eq, np.ones((128, 2)), throw=False).status is ms.Status.UNJAMMED


def test_a_saddle_is_refused():
    # a square of Lennard-Jones particles in the plane balances, but not stably
    potential = ms.potentials.lennard_jones(4.0, 5.0)
    square = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    start = ms.System.create(1.1 * square, None, potential, {"sigma": 1.0, "epsilon": 1.0})
    eq = ms.minimize(start, method=ms.relaxation.Fire(), leave_saddles=False)
    with pytest.raises(ms.ConvergenceError, match="negative curvature"):
        ms.jvp(eq, {"sigma": 1.0}, solve=Direct())
    left = ms.minimize(start)  # the default leaves it, for the rhombus
    assert float(ms.observables.energy(left.system)) < float(ms.observables.energy(eq.system)) - 0.1
    assert ms.certify(left).negative_modes == 0


@pytest.mark.parametrize(
    ("dparams", "message"),
    [
        ({"sgima": [0.0, 1.0]}, "did you mean 'sigma'"),
        ({"sigma": [0.0, 1.0, 2.0]}, r"has shape \(3,\): the parameter has \(2,\)"),
        ({"sigma": [0.0, np.nan]}, "not finite"),
        (3.0, "give a dict"),
    ],
)
def test_bad_directions_are_refused(dparams, message):
    with pytest.raises(ms.InputError, match=message):
        ms.jvp(seed(3), dparams)


def test_other_bad_input_is_refused():
    eq = seed(3)
    with pytest.raises(ms.InputError, match=r"cotangent has shape \(3,\): give \(128, 2\)"):
        ms.vjp(eq, np.ones(3))
    with pytest.raises(ms.InputError, match="force is not finite"):
        ms.response(eq, np.full((128, 2), np.inf))
    with pytest.raises(ms.InputError, match="dparams is empty"):
        ms.jvp(eq, {})
    with pytest.raises(ms.InputError, match="the observable returns None"):
        ms.gradient(lambda s: None, eq)
    with pytest.raises(ms.InputError, match="got a System"):
        ms.jvp(eq.system, THETA)  # type: ignore[arg-type]
    with pytest.raises(ms.InputError, match="'sgima'"):
        ms.jacobian(eq, "sgima")
    with pytest.raises(ms.InputError, match="got a batch"):
        ms.linearize(ms.minimize(ms.stack([eq.system, eq.system])))
    with pytest.raises(ms.InputError, match=r"jax\.vmap"):
        ms.equilibrate(ms.stack([eq.system, eq.system]))


def test_results_show_themselves():
    r = ms.jvp(seed(3), THETA)
    assert "CONVERGED" in str(r) and "<table>" in r._repr_html_()
    assert "max_force" in str(seed(3)) and "<table>" in seed(3)._repr_html_()


def test_positions_of_the_files_are_minima(packing_name):
    s = packing(packing_name, 0)
    assert float(ms.minimize(s, tolerance=2e-13).max_force) <= 2e-13


SOLVERS = (None, CG(), MINRES(), GMRES(), BiCGSTAB(), Direct(), NormalCG(), LeastSquares())


@pytest.mark.parametrize(
    "solve", quick(SOLVERS, None, CG(), GMRES(), Direct()), ids=lambda solve: type(solve).__name__
)
def test_what_is_round_off_has_no_part_worth_a_warning(solve):
    """The energy's own gradient vanishes at a minimum,
    and is not what a translation of the positions' is.
    """
    eq = dimer()

    def several(s: ms.System) -> jax.Array:
        return jnp.stack(
            [ms.observables.energy(s), s.positions[0, 0], ms.observables.distances(s, [[0, 1]])[0]]
        )

    r = ms.gradient(several, eq, solve=solve)
    good, dropped = ms.Status.CONVERGED, ms.Status.NULL_COMPONENT_DROPPED
    assert r.stats.status.tolist() == [good, dropped, good]
    assert float(r.stats.dropped[0]) < 1e-8 and float(r.stats.dropped[1]) > 0.1
    # -epsilon at the bottom of the well, at 2^(1/6) sigma, whatever sigma:
    # dU/depsilon = -1, dU/dsigma = 0
    assert (
        r.value["epsilon"][0] == pytest.approx(-1.0, abs=1e-10)
        and abs(float(r.value["sigma"][0])) < 1e-10
    )
    assert r.value["sigma"][2] == pytest.approx(2 ** (1 / 6), abs=1e-8)
    # by it the force changes as much as there is of it
    assert ms.jvp(eq, {"epsilon": 1.0}, solve=solve).status is good


def test_a_crystal_answers_no_diameter_and_no_strain_and_says_nothing_of_translations():
    side = np.arange(4) + 0.5
    square = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    params = {"sigma": 1.05, "epsilon": 1.0, "alpha": 2.0}
    eq = ms.minimize(
        ms.System.create(square, 4.0, ms.potentials.soft_sphere(), params), leave_saddles=False
    )
    r = ms.jvp(eq, {"sigma": 1.0}, throw=False)
    assert (
        float(jnp.abs(r.value).max()) < 1e-10 and r.status is not ms.Status.NULL_COMPONENT_DROPPED
    )
    batch = ms.jvp(
        ms.minimize(ms.stack([eq.system] * 2), leave_saddles=False), {"sigma": 1.0}, throw=False
    )
    assert ms.Status.NULL_COMPONENT_DROPPED not in batch.stats.status.tolist()
    moduli = ms.elasticity.moduli(eq.system)  # as traced code takes them
    assert ms.Status.NULL_COMPONENT_DROPPED not in moduli.stats.status.tolist()


def test_many_columns_of_a_large_system_by_an_iteration_are_those_of_the_factor():
    """More than 512 particles are solved for one right-hand side after the other on a CPU."""
    eq = ms.minimize(ms.load_system("seed_packing_2d", count=520))
    want = ms.jacobian(eq, "sigma").value
    got = ms.jacobian(eq, "sigma", solve=ms.implicit.CG(rtol=1e-13))
    assert got.stats.status.shape == (2,) and got.stats.solver.startswith("CG")
    np.testing.assert_allclose(got.value, want, atol=1e-8 * float(np.abs(want).max()))
