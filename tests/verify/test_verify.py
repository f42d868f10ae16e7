"""The user's own checks: each passes on what is right, and is made to fail on what is wrong."""

from __future__ import annotations

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LONG, packing_file, relaxed_packing

import mdsens as ms
from mdsens import potentials, verify
from mdsens.implicit import CG, GMRES
from mdsens.mechanics.hessian import force, mixed_product, sparse_hessian
from mdsens.verify import _discontinuities, _settling, finite_differences

THETA = {"sigma": [0.0, 1.0]}
ADJOINT = 1e-9


@cache
def discs() -> ms.Equilibrium:
    """32 discs of two sizes, whose box follows them."""
    rng = np.random.default_rng(0)
    params = {"sigma": [1.0, 0.6], "epsilon": 1.0, "alpha": 2.0}
    box, potential = ms.PackingFraction(0.98), potentials.soft_sphere()
    return ms.minimize(
        ms.System.create(
            rng.random((32, 2)) * 4.2, box, potential, params, (np.arange(32) >= 16).astype(int)
        )
    )


@cache
def dimer() -> ms.Equilibrium:
    params = {"sigma": 1.0, "epsilon": 1.0}
    return ms.minimize(
        ms.System.create(
            [[0.0, 0.0, 0.0], [0.7, 0.8, 0.2]], None, potentials.lennard_jones(), params
        )
    )


@cache
def curve() -> verify.DerivativeTest:
    return verify.derivative_test(discs(), THETA)


# ── the derivative over steps ──


def test_a_right_derivative_makes_a_v_that_breaks_beyond_the_radius():
    test = curve()
    assert test.status is ms.Status.CONVERGED
    assert test.steps.shape == test.errors.shape == test.network_changed.shape == (22,)
    assert (np.diff(test.steps) > 0).all()
    assert test.best < 1e-6 and "at no step" not in str(test)
    assert test.errors[0] > 10 * test.best  # round-off of the smallest steps
    assert test.slope == pytest.approx(2.0, abs=0.2)
    assert not test.network_changed[test.steps < 0.5 * test.radius].any()
    assert test.network_changed[test.steps > 3 * test.radius].all()
    assert (test.errors[test.steps > 3 * test.radius] > 1e3 * test.best).all()


def test_a_wrong_derivative_is_a_floor():
    exact = ms.jvp(discs(), THETA).value
    test = verify.derivative_test(discs(), THETA, curve().steps[6:13], value=1.01 * exact)
    assert 5e-3 < test.best < 2e-2 and "at no step" in str(test)
    other = verify.derivative_test(discs(), {"sigma": [1.0, 0.0]}, curve().steps[9:11], value=exact)
    assert other.best > 0.1


def test_the_null_space_of_a_given_derivative_is_left_out():
    steps = curve().steps[5:7]
    moved = ms.jvp(discs(), THETA).value + jnp.array([3.0, -1.0])
    assert verify.derivative_test(discs(), THETA, steps, value=moved).best < 1e-6


def test_the_two_kinds_of_differences_are_one():
    step = float(curve().steps[6])
    v = verify.finite_difference(discs(), THETA, step)
    assert v.radius == curve().radius
    assert v.disagreement(ms.jvp(discs(), THETA).value) == pytest.approx(
        curve().errors[6], rel=1e-3
    )


def test_where_nothing_moves_errors_are_absolute():
    test = verify.derivative_test(dimer(), {"epsilon": 1.0}, [1e-3, 1e-4])
    assert (test.steps == [1e-4, 1e-3]).all()
    # relative to the round-off that jvp gives, it would be of order 1
    assert 0.0 < test.best < 1e-6
    assert test.slope is None


def test_steps_that_do_not_relax_say_nothing(monkeypatch: pytest.MonkeyPatch):
    right = finite_differences.minimize

    def stuck(*args, **kwargs) -> ms.Equilibrium:
        code = jnp.asarray(ms.Status.MAX_STEPS_REACHED.value)
        return dataclasses.replace(right(*args, **kwargs), code=code, max_force=jnp.asarray(1.0))

    monkeypatch.setattr(finite_differences, "minimize", stuck)
    test = verify.derivative_test(dimer(), {"sigma": 1.0}, [1e-4])
    assert test.status is ms.Status.MAX_STEPS_REACHED
    assert not test.sound.any() and not test.branch.any() and test.best == np.inf
    assert "MAX_STEPS_REACHED" in str(test)


def test_the_test_prints_as_a_table():
    text = str(curve())
    assert text.count("contacts changed") == curve().network_changed.sum()
    for word in ("best", "error ~ t^", "first contact change at", "CONVERGED"):
        assert word in text
    assert "<table>" in curve()._repr_html_()


@pytest.mark.parametrize(
    ("dparams", "options", "says"),
    [
        (THETA, {"steps": []}, "`steps` is"),
        (THETA, {"steps": [1e-5, -1e-5]}, "`steps` is"),
        (THETA, {"steps": [[1e-5]]}, "`steps` is"),
        (THETA, {"value": np.zeros((31, 2))}, r"`value` has shape \(31, 2\)"),
        (THETA, {"value": np.full((32, 2), np.nan)}, "finite"),
        ({"sigma": [0.0, 0.0]}, {}, "zero everywhere"),
        ({"sgima": [0.0, 1.0]}, {}, "did you mean 'sigma'"),
    ],
)
def test_bad_input_is_refused(dparams, options, says):
    with pytest.raises(ms.InputError, match=says):
        verify.derivative_test(discs(), dparams, **options)


def test_an_unconverged_minimum_is_refused():
    bad = dataclasses.replace(discs(), code=jnp.asarray(ms.Status.MAX_STEPS_REACHED.value))
    with pytest.raises(ms.ConvergenceError):
        verify.derivative_test(bad, THETA)


# ── the error that differences state of themselves ──

NEAR_JAMMING = "3d_bidisperse_N128_p1e-4"
COVERED = 3.0  # times the stated error: what the disagreement is to stay within


def diameters(eq: ms.Equilibrium) -> dict[str, np.ndarray]:
    """Directions among the diameters: of one particle, of every other one, of all, random ones."""
    n, rng = eq.system.n, np.random.default_rng(3)
    held = np.flatnonzero(~np.asarray(ms.linearize(eq).network.rattlers))
    single = {f"particle {k}": np.eye(n)[k] for k in held[[0, n // 3, -1]]}
    random = {f"random {k}": rng.normal(size=n) for k in range(2)}
    return {**single, "every other": np.arange(n) % 2.0, "all": np.ones(n), **random}


@cache
def at_the_minimum() -> tuple[ms.System, np.ndarray]:
    """The packing near jamming by two Newton steps, and the pseudo-inverse
    of its Hessian, by dense linear algebra.
    """
    system, inverse = ms.linearize(relaxed_packing(NEAR_JAMMING, 0)).system, np.zeros(())
    for _ in range(2):
        hessian = sparse_hessian(system)
        assert hessian is not None
        inverse = np.linalg.pinv(hessian.toarray(), 1e-11, hermitian=True)
        step = inverse @ np.asarray(force(system)).ravel()
        system = system.replace(positions=system.positions + step.reshape(system.positions.shape))
    return system, inverse


def derivative(dparams: dict) -> np.ndarray:
    """dR/dt there."""
    system, inverse = at_the_minimum()
    pull = np.asarray(
        mixed_product(system, {k: jnp.asarray(v) for k, v in dparams.items()}).positions
    )
    return -(inverse @ pull.ravel()).reshape(pull.shape)


def test_the_truth_lies_within_the_stated_error_near_jamming():
    """Where a step of 1e-6 is in round-off: it stated 1e-7 and was off by 1e-4."""
    eq, off = relaxed_packing(NEAR_JAMMING, 0), {}
    for name, change in diameters(eq).items():
        v = verify.finite_difference(eq, {"sigma": change})
        assert v.status is ms.Status.CONVERGED and not v.network_changed
        assert 1e-10 < v.error < 1e-7, name
        off[name] = v.disagreement(derivative({"sigma": change})) / v.error
    assert max(off.values()) < COVERED, off
    assert np.median(list(off.values())) > 0.05, off  # nor is it a number that nothing could exceed


def test_the_stated_error_follows_the_step():
    """Round-off, foot and truncation, by the step that is asked for."""
    eq = relaxed_packing(NEAR_JAMMING, 0)
    change = {"sigma": diameters(eq)["particle 0"]}
    true, radius = derivative(change), verify.finite_difference(eq, change).radius
    stated = []
    for step in (1e-10, 1e-8, 1e-6, 0.8 * radius):
        v = verify.finite_difference(eq, change, step)
        stated.append(v.error)
        assert v.disagreement(true) < COVERED * v.error, step
    assert stated[0] > 10 * stated[1] > 100 * stated[2] and stated[3] > 3 * stated[2]


def test_what_the_minimizer_leaves_is_taken_away_or_stated(monkeypatch: pytest.MonkeyPatch):
    eq = relaxed_packing(NEAR_JAMMING, 0)
    change = {"sigma": diameters(eq)["particle 0"]}
    true = derivative(change)
    early = verify.finite_difference(eq, change, 1e-6, tolerance=1e-11)
    assert early.disagreement(true) < COVERED * early.error < 1e-7
    monkeypatch.setattr(_settling, "STEPS", 0)
    left = verify.finite_difference(eq, change, 1e-6, tolerance=1e-11)
    assert 1e-4 < left.disagreement(true) < COVERED * left.error < 1.0


def stiffer(r, k, length):
    """A spring whose second derivative is wrong by a tenth, and nothing else."""
    return 0.5 * k * (r - length) ** 2 + 0.05 * k * (r - jax.lax.stop_gradient(r)) ** 2


def test_a_wrong_hessian_makes_no_wrong_difference():
    """A triangle of springs: it goes where the lengths say whatever the Hessian,
    which makes the response too small.
    """
    potential = dataclasses.replace(
        potentials.harmonic_bonds([[0, 1], [1, 2], [2, 0]]), phi=stiffer
    )
    places = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 0.8]])
    eq = ms.minimize(
        ms.System.create(places, None, potential, {"stiffness": 1.0, "length": [1.0, 1.0, 1.0]})
    )
    v = verify.finite_difference(eq, {"length": [1.0, 0.0, 0.0]})
    assert v.status.good and v.error < 1e-7
    ends = np.asarray(v.value)[[0, 1, 2]] - np.asarray(v.value)[[1, 2, 0]]
    sides = np.asarray(eq.positions)[[0, 1, 2]] - np.asarray(eq.positions)[[1, 2, 0]]
    np.testing.assert_allclose(
        np.sum(ends * sides, axis=1), [1.0, 0.0, 0.0], atol=COVERED * v.error
    )
    assert v.disagreement(ms.jvp(eq, {"length": [1.0, 0.0, 0.0]}).value) == pytest.approx(
        1.0 - 1.0 / 1.1, rel=1e-3
    )


def _jammed(
    n: int, dimension: int, pressure: float, alpha: float = 2.0
) -> tuple[ms.Equilibrium, ms.Equilibrium]:
    """Particles of two sizes at a pressure, and in the cell that this gives."""
    rng, sigma = np.random.default_rng(n + dimension), np.where(np.arange(n) % 2, 1.4, 1.0)
    fraction = 0.86 if dimension == 2 else 0.68
    side = (np.sum(np.pi / (2 * dimension) * sigma**dimension) / fraction) ** (1 / dimension)
    params = {"sigma": sigma, "epsilon": 1.0, "alpha": alpha}
    start = ms.System.create(
        rng.random((n, dimension)) * side, side, potentials.soft_sphere(), params
    )
    pressed = ms.minimize(start, pressure=pressure)
    return pressed, ms.minimize(pressed.system)


def _lennard_jones() -> list[ms.Equilibrium]:
    rng, potential = np.random.default_rng(2), potentials.lennard_jones()
    sizes = {"sigma": np.linspace(0.9, 1.1, 60), "epsilon": 1.0}
    plane = ms.minimize(ms.System.create(rng.random((60, 2)) * 8, 8.0, potential, sizes))
    matrices = {"sigma": [[1.0, 0.8], [0.8, 0.88]], "epsilon": [[1.0, 1.5], [1.5, 0.5]]}
    kinds = (np.arange(150) % 5 == 0).astype(int)
    glass = ms.System.create(rng.random((150, 3)) * 5.05, 5.05, potential, matrices, kinds)
    return [plane, ms.minimize(glass, tolerance=1e-11)]


@LONG
def test_the_truth_lies_within_the_stated_error_in_nearly_all_directions(record_property):
    """200 directions and more: diameters, depths and pressures, in 2-D and 3-D,
    from 1e-1 down to 1e-4 of pressure.

    The truth is the certificate's corrected derivative, which is that at the minimum itself to
    second order.
    """
    minima = _lennard_jones()
    for n, pressure in ((64, 1e-1), (64, 1e-2), (128, 1e-3), (128, 1e-4)):
        minima += [eq for dimension in (2, 3) for eq in _jammed(n, dimension, pressure)]
    minima += [eq for dimension in (2, 3) for eq in _jammed(64, dimension, 1e-2, 2.5)]
    ratios, stated = [], []
    for eq in minima:
        params, rng = eq.params, np.random.default_rng(eq.system.n)
        if params["sigma"].ndim == 1:
            directions: list[dict] = [{"sigma": v} for v in diameters(eq).values()]
            directions += [
                {"sigma": rng.normal(size=eq.system.n), "epsilon": 0.3},
                {"epsilon": 1.0},
            ]
        else:
            pairs = [np.diag([0.0, 1.0]), np.array([[0.0, 1.0], [1.0, 0.0]]), np.ones((2, 2))]
            directions = [{name: pair} for name in params for pair in pairs]
        directions += [] if eq.pressure is None else [{"pressure": 1.0}]
        for change in directions:
            v = verify.finite_difference(eq, change)
            assert v.status.good and not v.network_changed
            along = ms.certify(eq, change).derivative
            assert along is not None
            ratios.append(v.disagreement(along.corrected) / v.error)
            stated.append(v.error)
    off = np.array(ratios)
    figures = (
        f"{off.size} directions, {np.mean(off <= COVERED):.1%} within {COVERED:g} times the stated"
        " error; "
    )
    figures += (
        f"median of the disagreement over it {np.median(off):.2f}, of the stated error"
        f" {np.median(stated):.1e}"
    )
    record_property("coverage", figures)
    print(figures)
    assert off.size >= 200
    assert np.mean(off <= COVERED) >= 0.95, figures
    assert np.median(off) > 0.1 and np.median(stated) < 1e-7, figures


# ── forward against reverse ──


def test_the_adjoint_identity_holds_for_random_and_for_given_vectors():
    lin = ms.linearize(relaxed_packing("2d_polydisperse_N64_p1e-1", 0))
    test = verify.adjoint(lin)
    assert test.status is ms.Status.CONVERGED and test.gap < ADJOINT and abs(test.forward) > 1e-6
    assert verify.adjoint(lin, seed=1).forward != test.forward
    rng = np.random.default_rng(5)
    v, w = {"sigma": rng.normal(size=64)}, rng.normal(size=(64, 2))
    given = verify.adjoint(lin.equilibrium, v, w)
    assert given.gap < ADJOINT
    assert given.forward == pytest.approx(float(np.vdot(w, ms.jvp(lin, v).value)), rel=1e-12)
    assert "J^T w" in str(given)


def test_a_solver_that_stops_too_early_breaks_the_identity():
    loose = verify.adjoint(discs(), solve=GMRES(rtol=1e-2, restart=64))
    assert verify.adjoint(discs()).gap < ADJOINT < 1e-6 < loose.gap


def test_the_adjoint_test_raises_for_a_failed_solve_where_asked():
    two_steps = CG(max_iterations=2)
    assert not verify.adjoint(discs(), solve=two_steps).status.good
    with pytest.raises(ms.ConvergenceError, match="adjoint identity"):
        verify.adjoint(discs(), solve=two_steps, throw=True)


@jax.custom_jvp
def _rule(x: jax.Array) -> jax.Array:
    return 0.5 * jnp.sum(x**2)


@_rule.defjvp
def _unsymmetric(primals, tangents):
    """A "force" that no energy has: its Hessian is not symmetric."""
    (x,), (dx,) = primals, tangents
    return _rule(x), jnp.sum((x + 0.1 * jnp.roll(x, 1, axis=0)) * dx)


def swirl(positions: jax.Array, params, displacement) -> jax.Array:
    return params["k"] * _rule(positions - params["at"])


def test_a_force_of_no_energy_breaks_the_identity():
    potential = potentials.from_energy(swirl, ("k", "at"))
    at = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    eq = ms.minimize(
        ms.System.create(at + 0.1, None, potential, {"k": 1.0, "at": at}), tolerance=1e-10
    )
    assert verify.adjoint(eq, solve=GMRES()).gap > 1e-3


def test_what_is_no_minimum_is_refused():
    with pytest.raises(ms.InputError, match="got a System"):
        verify.adjoint(discs().system)  # type: ignore[arg-type]


# ── where a function jumps ──


def broken(r, at, c0, c1, c2, c3):
    """Smooth, but for a jump of 1 c0 of phi, -c1 of phi',
    2 c2 of phi'' and -6 c3 of phi''' at one length.
    """
    short = jnp.maximum(at - r, 0.0)
    smooth = jnp.exp(-r) / r + jnp.cos(3.0 * r)
    return smooth - c0 * (r < at) + c1 * short - c2 * short**2 + c3 * short**3


evaluate_broken = _discontinuities.with_derivatives(broken)


@pytest.mark.parametrize("order", range(4))
@pytest.mark.parametrize("height", [1e-2, -30.0])
def test_a_jump_of_every_order_is_found_in_its_place(order: int, height: float):
    rng = np.random.default_rng(order)
    edges = _discontinuities.edges_of(0.3, 3.0, ())
    for at in [*rng.uniform(0.4, 2.9, 4), edges[700]]:  # anywhere, and on an edge of the grid
        powers = np.zeros(4)
        powers[order] = height
        (found,) = _discontinuities.find_breaks(evaluate_broken, (at, *powers), edges)
        assert found.length == pytest.approx(at, rel=1e-9)
        jump = height * (1.0, 1.0, 2.0, 6.0)[order]
        assert found.jumps[order] == pytest.approx(jump, rel=1e-3)
        assert min(found.jumps) == order


def test_a_smooth_function_has_no_jump():
    edges = _discontinuities.edges_of(0.01, 30.0, ())
    assert _discontinuities.find_breaks(evaluate_broken, (1.0, 0.0, 0.0, 0.0, 0.0), edges) == []


def test_roots_are_told_from_jumps():
    def root(r, power):
        return jnp.where(r < 1.0, jnp.where(r < 1.0, 1.0 - r, 1.0) ** power, 0.0)

    evaluate, edges = (
        _discontinuities.with_derivatives(root),
        _discontinuities.edges_of(0.3, 1.5, (1.0,)),
    )
    (hertz,) = _discontinuities.find_breaks(evaluate, (2.5,), edges)
    assert hertz.length == pytest.approx(1.0, rel=1e-9) and hertz.jumps == {3: np.inf}
    (soft,) = _discontinuities.find_breaks(evaluate, (1.2,), edges)
    assert soft.jumps == {2: np.inf, 3: np.inf}  # phi' is continuous, of infinite slope


def test_two_jumps_apart_are_both_found_beside_a_declared_one():
    def twice(r):
        return jnp.maximum(1.0 - r, 0.0) ** 2 + jnp.maximum(1.00001 - r, 0.0) ** 2

    found = _discontinuities.find_breaks(
        _discontinuities.with_derivatives(twice), (), _discontinuities.edges_of(0.3, 1.5, (1.0,))
    )
    np.testing.assert_allclose([b.length for b in found], [1.0, 1.00001], rtol=1e-9)


# ── a potential's promises ──

OURS = {
    "harmonic discs": (
        potentials.soft_sphere(),
        {"sigma": [1.0, 0.6], "epsilon": 1.0, "alpha": 2.0},
    ),
    "Hertzian discs in meters": (
        potentials.soft_sphere(),
        {"sigma": 1e-6, "epsilon": 1e-18, "alpha": 2.5},
    ),
    "steep discs": (potentials.soft_sphere(), {"sigma": 1.0, "epsilon": 1.0, "alpha": 1.5}),
    "binary Lennard-Jones": (
        potentials.lennard_jones(),
        {"sigma": [[1.0, 0.8], [0.8, 0.88]], "epsilon": [[1.0, 1.5], [1.5, 0.5]]},
    ),
    "morse of a hundred sizes": (
        potentials.morse(),
        {"sigma": np.linspace(0.8, 1.2, 100), "epsilon": 1.0, "alpha": 6.0},
    ),
    "harmonic-Morse discs": (
        potentials.harmonic_morse(),
        {"sigma": [0.8, 1.0], "epsilon": [[0.1, 0.2], [0.2, 0.05]], "alpha": 6.0, "stiffness": 5.0},
    ),
    "bonds": (
        potentials.harmonic_bonds([[0, 1], [1, 2], [2, 0], [5, 3]]),
        {"stiffness": [1.0, 2.0, 3.0, 1.0], "length": 1.0},
    ),
    "discs with bonds": (
        potentials.soft_sphere() + potentials.harmonic_bonds([[0, 1], [1, 2]]),
        {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0, "stiffness": 1.0, "length": [1.0, 0.9]},
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_our_potentials_keep_their_promises(name):
    potential, params = OURS[name]
    test = verify.potential(potential, params)
    assert test.good, test
    assert test.bad == ()
    checks = " ".join(finding.check for finding in test.findings)
    for check in ("undeclared", "finite", "forces", "stiffness", "symmetry", "parameters"):
        assert check in checks


def test_what_is_declared_is_told_with_its_jump():
    test = verify.potential(*OURS["harmonic discs"])
    (told,) = [f.sentence for f in test.findings if f.check == "breakpoint 1"]
    # the jump is -epsilon / sigma^2
    assert told == "declared at r = 0.6 to 1: phi and phi' continuous, phi'' jumps by -2.78."
    assert str(test).startswith("Potential test of soft_sphere: good")


def test_a_configuration_of_the_user_in_a_cell():
    file = packing_file("2d_polydisperse_N64_p1e-1")
    params = {"sigma": file["diameter"][0], "epsilon": 1.0, "alpha": 2.5}
    test = verify.potential(
        potentials.soft_sphere(), params, positions=file["positions"][0], box=file["box"][0]
    )
    assert test.good, test


def test_a_many_body_potential_needs_its_configuration():
    def three(positions, params, displacement):
        a, b, c = positions
        return params["k"] * jnp.sum(jnp.cross(displacement(b, a), displacement(c, a)) ** 2)

    potential = potentials.from_energy(three, ("k",))
    with pytest.raises(ms.InputError, match="`positions` is None and three acts on more"):
        verify.potential(potential, {"k": 1.0})
    test = verify.potential(
        potential, {"k": 1.0}, positions=[[0.0, 0.0, 0.1], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    )
    assert test.good, test
    assert [f.check for f in test.findings] == ["forces", "stiffness", "symmetry", "parameters"]


def quadratic(r, k, sigma):
    """Harmonic contact with a stiffer second shell inside 0.7123456789 sigma, undeclared."""
    return (
        0.5
        * k
        * (jnp.maximum(1.0 - r / sigma, 0.0) ** 2 + jnp.maximum(0.7123456789 - r / sigma, 0.0) ** 2)
    )


def sigma_of(k, sigma):
    return sigma


def contact(k, sigma):
    return (sigma,)


def test_an_undeclared_kink_is_found_in_its_place():
    potential = potentials.from_pair(quadratic, ("k", "sigma"), sigma_of, contact)
    test = verify.potential(potential, {"k": 1.0, "sigma": 2.0})
    assert [f.check for f in test.bad] == ["undeclared"]
    place = float(test.bad[0].sentence.removeprefix("at r = ").split()[0])
    assert place == pytest.approx(2 * 0.7123456789, abs=1e-6)
    assert "phi'' jumps by -0.25" in test.bad[0].sentence and "declare it" in test.bad[0].sentence
    whole = potentials.from_pair(
        quadratic,
        ("k", "sigma"),
        sigma_of,
        lambda k, sigma: (0.7123456789 * sigma, sigma),
        name="whole",
    )
    assert verify.potential(whole, {"k": 1.0, "sigma": 2.0}).good


def stepped(r, k):
    return k * jnp.maximum(1.0 - r, 0.0) ** 3 - 1e-3 * (r < 0.65)


def bare(r, k):
    return k / r


def unclipped(r, k):
    return k * (1.0 - r) ** 4


def well(r, k):
    return k * jnp.maximum(1.0 - r, 0.0) ** 3 * (0.5 - r)


def unguarded(r, k):
    return jnp.where(
        r < 1.0, k * jnp.where(r < 1.0, (1.0 - r), 0.0) ** 2.5 + 0 * jnp.sqrt(1.0 - r), 0.0
    )


@jax.custom_jvp
def biased(r, k):
    return k * jnp.maximum(1.0 - r, 0.0) ** 3


biased.defjvps(
    lambda dr, _, r, k: -3.03 * k * jnp.maximum(1.0 - r, 0.0) ** 2 * dr,
    lambda dk, _, r, k: jnp.maximum(1.0 - r, 0.0) ** 3 * dk,
)


@jax.custom_jvp
def frozen(r, k):
    return k * jnp.maximum(1.0 - r, 0.0) ** 3


frozen.defjvps(
    lambda dr, _, r, k: -3.0 * k * jnp.maximum(1.0 - jax.lax.stop_gradient(r), 0.0) ** 2 * dr,
    lambda dk, _, r, k: jnp.maximum(1.0 - r, 0.0) ** 3 * dk,
)


def stopped(r, k):
    return jax.lax.stop_gradient(k) * jnp.maximum(1.0 - r, 0.0) ** 3


WRONG = {
    "a declared step": (stepped, {"breakpoints": (0.65, 1.0)}, {"breakpoint 1"}),
    "no end": (bare, {}, {"cutoff", "range"}),
    "no end, but zero there": (unclipped, {}, {"cutoff", "range"}),
    "a pull declared repulsive": (well, {"breakpoints": (1.0,), "repulsive": True}, {"repulsion"}),
    "a where() without a guard": (unguarded, {"breakpoints": (1.0,)}, {"finite", "configuration"}),
    "a wrong force": (biased, {"breakpoints": (1.0,)}, {"forces"}),
    "a force without a derivative": (frozen, {"breakpoints": (1.0,)}, {"stiffness"}),
    "a parameter without a derivative": (stopped, {"breakpoints": (1.0,)}, {"parameters"}),
}


@pytest.mark.parametrize("name", WRONG)
def test_every_check_can_fail(name):
    phi, options, expected = WRONG[name]
    test = verify.potential(potentials.from_pair(phi, ("k",), 1.0, **options), {"k": 1.0})
    assert {f.check for f in test.bad} == expected, test
    assert not test.good and f"{len(test.bad)} not good" in str(test) and "NOT GOOD: " in str(test)


def hill(s):
    """A cutoff that is longest between two values of its parameter."""
    return 1.0 - (s - 1.0) ** 2


def test_a_range_that_loses_pairs_is_found():
    def phi(r, s):
        return jnp.maximum(hill(s) - r, 0.0) ** 3

    potential = potentials.from_pair(phi, ("s",), hill, lambda s: (hill(s),))
    (bad,) = verify.potential(potential, {"s": [0.5, 1.5]}).bad
    assert bad.check == "range" and "monotone" in bad.sentence


def test_a_force_of_no_energy_is_found():
    positions = np.random.default_rng(0).random((4, 2))
    test = verify.potential(
        potentials.from_energy(swirl, ("k", "at")), {"k": 1.0, "at": 0.1}, positions=positions
    )
    assert {"forces", "symmetry"} <= {f.check for f in test.bad}


def test_a_kink_in_a_bond_is_found():
    def kinked(r, stiffness, length):
        return 0.5 * stiffness * (r - length) ** 2 + jnp.maximum(r - 1.3 * length, 0.0) ** 2

    potential = dataclasses.replace(potentials.harmonic_bonds([[0, 1], [1, 2]]), phi=kinked)
    (bad,) = verify.potential(potential, {"stiffness": 1.0, "length": 1.0}).bad
    assert (
        bad.check == "undeclared"
        and bad.sentence.startswith("at r = 1.3 ")
        and "phi'' jumps by 2" in bad.sentence
    )


def test_a_configuration_that_shows_nothing_is_not_good():
    potential, params = potentials.soft_sphere(), {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0}
    (bad,) = verify.potential(potential, params, positions=[[0.0, 0.0], [1.5, 0.0]]).bad
    assert bad.check == "configuration" and "no force acts" in bad.sentence
    alone = verify.potential(potential, params, positions=[[0.0, 0.0]])
    assert {f.check for f in alone.bad} == {"pairs", "configuration"}


def test_lengths_to_look_between():
    potential = potentials.from_pair(quadratic, ("k", "sigma"), sigma_of, contact)
    test = verify.potential(potential, {"k": 1.0, "sigma": 1.0}, between=(0.75, 0.9))
    assert test.good, test
    assert any("not between the lengths given" in f.sentence for f in test.findings)


@pytest.mark.parametrize(
    ("potential", "params", "options", "says"),
    [
        (potentials.soft_sphere, {}, {}, "`potential` is"),
        (potentials.soft_sphere(), [1.0], {}, "`params` is a list"),
        (
            potentials.soft_sphere(),
            {"sgima": 1.0, "epsilon": 1.0, "alpha": 2.0},
            {},
            "did you mean 'sigma'",
        ),
        (
            potentials.soft_sphere(),
            {"sigma": -1.0, "epsilon": 1.0, "alpha": 2.0},
            {},
            "sigma is -1.0",
        ),
        (potentials.soft_sphere(), {"sigma": "a", "epsilon": 1.0, "alpha": 2.0}, {}, "sigma is"),
        (
            potentials.soft_sphere(),
            {"sigma": [1.0, 2.0], "epsilon": [1.0] * 5, "alpha": 2.0},
            {},
            "2 and 5 values",
        ),
        (
            potentials.soft_sphere(),
            {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0},
            {"between": (1.0, 0.5)},
            "between",
        ),
    ],
)
def test_what_no_system_takes_is_refused(potential, params, options, says):
    with pytest.raises(ms.InputError, match=says):
        verify.potential(potential, params, **options)


def test_single_precision_is_refused():
    with jax.enable_x64(False), pytest.raises(ms.PrecisionError, match="enable_x64"):
        verify.potential(*OURS["harmonic discs"])


def test_a_contact_that_changes_at_the_minimum_leaves_no_step():
    """Discs on rods at rest, two of them exactly touching:
    a larger diameter pushes them, a smaller one does not.
    """
    potential = ms.potentials.soft_sphere() + ms.potentials.harmonic_bonds([[0, 1], [1, 2]])
    params = {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0, "length": [1.5, 1.0], "stiffness": 1.0}
    eq = ms.minimize(
        ms.System.create([[0.0, 0.0], [1.5, 0.0], [1.5, 1.0]], None, potential, params)
    )
    with pytest.raises(ms.InputError, match="a contact changes at this very minimum"):
        ms.verify.finite_difference(eq, {"sigma": 1.0})
