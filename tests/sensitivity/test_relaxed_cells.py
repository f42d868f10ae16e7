"""Derivatives of cells under a stress or at a volume, with all strains free or some:
against minimizing again, elastic moduli, and a dense Jacobian of the condition.
"""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import (
    DEVIATOR,
    KINDS,
    STRESS,
    again,
    along,
    assert_responds_as_minimized_again,
    at_rest,
    directions,
    discs,
    linearized,
    slope,
)
from conftest import LONG, quick, relative

import mdsens as ms
from mdsens.elasticity import mandel, moduli
from mdsens.mechanics.hessian import max_force
from mdsens.mechanics.hessian_factor import HessianFactor
from mdsens.mechanics.strain import basis, from_mandel, to_mandel
from mdsens.model.box import FixedBox
from mdsens.model.system import potential_energy
from mdsens.relaxation import AtStress
from mdsens.sensitivity.certificate.solution_space import Space

CASES = [
    (kind, which)
    for kind, loads in (
        ("stress", ["stress"]),
        ("volume", ["volume", "deviator"]),
        ("along x", ["pressure"]),
        ("spheres", ["stress"]),
        ("vacancy", ["stress"]),
    )
    for which in ("sigma", *loads, "all")
]
SHORT = [("stress", "sigma"), ("stress", "stress"), ("volume", "volume"), ("volume", "deviator")]
SHORT += [("along x", "all"), ("spheres", "all")]
# The step in each direction, in which a contact does not change: the radius is some 1e-3.
STEPS = {"vacancy": 2e-6, "spheres": 1e-5}


# -- minimizing again


@pytest.mark.parametrize("case", quick(CASES, *SHORT), ids="-".join)
def test_responses_are_finite_differences_of_minimizing_again(case):
    kind, which = case
    h = STEPS.get(kind, 1e-5)
    assert_responds_as_minimized_again(linearized(kind), directions(kind)[which], h)


@pytest.mark.parametrize("kind", quick(["stress", "volume"], "stress"))
def test_moduli_forward_are_their_gradient_and_minimizing_again(kind):
    eq, lin, dparams, h = at_rest(kind), linearized(kind), directions(kind)["all"], 3e-6

    def features(m: ms.elasticity.Moduli) -> jax.Array:
        return jnp.stack([m.poisson, m.bulk, m.tensor[0, 0, 0, 1], m.birch[0, 0, 1, 1]])

    forward = ms.elasticity.jvp(features, lin, dparams).value
    reverse = along(ms.elasticity.gradient(features, lin).value, dparams)
    assert np.abs(forward - reverse).max() < 1e-9 * np.abs(reverse).max()
    want = slope(lambda t: np.asarray(features(moduli(again(eq, dparams, t)))), h)
    assert np.abs(forward - want).max() < 1e-6 * np.abs(want).max()


@pytest.mark.parametrize("kind", KINDS[:3])
def test_verify_finds_them_right_and_a_wrong_one_wrong(kind):
    eq, lin, dparams = at_rest(kind), linearized(kind), directions(kind)["all"]
    r = ms.jvp(lin, dparams)
    v = ms.verify.finite_difference(eq, dparams)
    assert v.status.good and not v.network_changed and v.disagreement(r.value) < 1e-6
    off = dataclasses.replace(r.value, strain=1.01 * r.value.strain)
    assert v.disagreement(off) == pytest.approx(0.01, rel=1e-3)


# -- a stress and its strain


@pytest.mark.parametrize("kind", ["stress", "spheres", "vacancy"])
def test_the_strain_of_a_stress_is_the_inverse_of_birchs_tensor(kind):
    """Along the strains that are free: de = B^-1 dsigma, with Birch's B = dsigma/de."""
    eq, lin = at_rest(kind), linearized(kind)
    strains = np.asarray(eq.strains)
    m = basis(eq.system.dimension)
    free = np.einsum("kij,aij->ka", strains, m)  # in Mandel's components
    birch = free @ np.asarray(mandel(moduli(lin).birch)) @ free.T
    np.testing.assert_allclose(
        np.asarray(lin.cell.stiffness) / float(eq.system.volume), birch, atol=1e-11 * birch.max()
    )
    assert np.abs(birch - birch.T).max() > 1e-3 * np.abs(birch).max()  # by the deviatoric stress
    jacobian = np.asarray(ms.jacobian(lin, "stress").value.strain)  # (m, d, d)
    compliance = free @ np.einsum("aij,kij->ak", jacobian, strains)
    np.testing.assert_allclose(compliance, np.linalg.inv(birch), rtol=1e-8, atol=1e-9)
    # by what is not free nothing moves
    rest = m - np.einsum("ka,kij->aij", free, strains)
    np.testing.assert_allclose(np.einsum("aij,bij->ab", jacobian, rest), 0.0, atol=1e-12)


def test_a_uniaxial_modulus_is_birchs():
    """The strain along x alone: -dP / de_xx is B_xxxx."""
    eq = at_rest("along x")
    r = ms.jvp(linearized("along x"), {"pressure": 1.0})
    modulus = float(moduli(eq).birch[0, 0, 0, 0])
    np.testing.assert_allclose(np.asarray(r.strain), [-1.0 / modulus, 0.0, 0.0], rtol=1e-9)


def test_the_pressure_at_a_volume_is_the_bulk_modulus_of_a_free_shape():
    """dP/dV at a constant deviator: 1 / K = 1:B^-1:1, as that of a cell under a pressure."""
    eq = at_rest("volume")
    g = ms.gradient(ms.observables.pressure, linearized("volume")).value
    birch = np.asarray(mandel(moduli(eq).birch))
    unit = np.array([1.0, 1.0, 0.0])
    bulk = 1.0 / float(unit @ np.linalg.solve(birch, unit))
    assert -float(eq.system.volume) * float(g["volume"]) == pytest.approx(bulk, rel=1e-8)


# -- forward and reverse


@pytest.mark.parametrize("kind", KINDS)
def test_the_adjoint_is_the_transpose(kind):
    lin, eq = linearized(kind), at_rest(kind)
    n, d = eq.positions.shape
    rng = np.random.default_rng(2)
    w = jnp.asarray(rng.normal(size=(n, d)))
    w -= w.mean(axis=0)
    weights = ms.Unknowns(w, jnp.asarray(rng.normal(size=d * (d + 1) // 2)))
    for dparams in (None, *directions(kind).values()):
        test = ms.verify.adjoint(lin, dparams, weights)
        assert test.status.good and test.gap < 1e-9
    cell = lin.cell
    asymmetry = np.abs(cell.stiffness - cell.stiffness.T).max() / np.abs(cell.stiffness).max()
    # with the matrix itself in place of its transpose, this test would fail by as much
    assert (asymmetry > 1e-3) == (kind in ("stress", "spheres", "vacancy"))


@pytest.mark.parametrize("kind", quick(["stress", "volume"], "stress"))
def test_an_iterative_solve_is_that_of_the_factor(kind):
    lin, dparams = linearized(kind), directions(kind)["all"]
    w = jnp.asarray(np.random.default_rng(4).normal(size=(32, 2)))
    solve = ms.implicit.MINRES(rtol=1e-12)
    for here, there in (
        (ms.jvp(lin, dparams).value, ms.jvp(lin, dparams, solve=solve).value),
        (ms.vjp(lin, w).value, ms.vjp(lin, w, solve=solve).value),
    ):
        for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-7, atol=1e-8)


def test_a_shear_stress_is_one_number_in_two_entries():
    lin = linearized("stress")
    g = ms.gradient(lambda s: s.volume, lin)
    shear = np.array([[0.0, 1.0], [1.0, 0.0]])
    rate = np.asarray(ms.jvp(lin, {"stress": shear}).strain)
    volume = float(lin.system.volume)
    by_shear = volume * float(rate[0] + rate[1])
    assert float(g.component("stress[0,1]")) == pytest.approx(by_shear, rel=1e-9)
    assert float(g.value["stress"][1, 0]) == pytest.approx(0.5 * by_shear, rel=1e-9)
    columns = ms.jacobian(lin, "stress")
    np.testing.assert_allclose(columns.component("stress[0,1]").strain, rate, rtol=1e-9)


def test_a_trace_of_the_deviator_moves_nothing():
    r = ms.jvp(linearized("volume"), {"deviator": np.eye(2)})
    np.testing.assert_allclose(r.value.positions, 0.0, atol=1e-12)
    g = ms.gradient(ms.observables.energy, linearized("volume")).value["deviator"]
    assert abs(float(jnp.trace(g))) < 1e-12 * float(jnp.abs(g).max())


# -- the certificate


@jax.jit
def stress_equations(system: ms.System, x: jax.Array) -> jax.Array:
    """The forces, and V (sigma - STRESS) in Mandel's components, at positions and a strain."""
    size = system.positions.size
    strain = from_mandel(x[size:])
    F = jnp.eye(2) + strain
    places, cell = x[:size].reshape(-1, 2) @ F.T, F @ jnp.asarray(system.box)
    there = system.replace(positions=places, boundary=FixedBox(cell))
    slopes = jax.grad(lambda R: potential_energy(there, R))(places)
    unbalanced = there.volume * (ms.observables.stress(there) - STRESS)
    return jnp.concatenate([jnp.ravel(slopes @ F), to_mandel(unbalanced)])


def test_the_derivatives_are_those_of_the_dense_equations():
    """Written anew from forces and stresses: their Jacobian, which is unsymmetric, inverted."""
    eq, lin = at_rest("stress"), linearized("stress")
    size = eq.positions.size
    x = jnp.concatenate([eq.positions.ravel(), jnp.zeros(3)])
    dense = np.asarray(jax.jacfwd(lambda y: stress_equations(lin.system, y))(x))
    assert np.abs(dense - dense.T).max() > 1e-3
    change = np.array([[0.3, 0.1], [0.1, -0.2]])
    side = np.zeros(size + 3)
    side[size:] = float(eq.system.volume) * np.asarray(to_mandel(jnp.asarray(change)))
    found = np.linalg.lstsq(dense, side, rcond=1e-10)[0]
    r = ms.jvp(lin, {"stress": change})
    np.testing.assert_allclose(np.asarray(r.strain), found[size:], rtol=1e-9)
    moved = found[:size].reshape(-1, 2)
    assert relative(r.nonaffine, moved - moved.mean(axis=0)) < 1e-9
    c = ms.certify(lin)
    assert c.status is ms.Status.CONVERGED and c.cell is not None
    relaxed = np.asarray(lin.cell.stiffness) / float(eq.system.volume)
    np.testing.assert_allclose(c.cell.stiffness, np.linalg.eigvalsh(0.5 * (relaxed + relaxed.T)))
    # the bound of the smallest stiffness, of the same matrix in the norm of the certificate
    weight = np.concatenate([np.ones(size), np.full(3, np.sqrt(32 / 12 * lin.system.volume))])
    least = np.linalg.svd(dense / np.outer(weight, weight), compute_uv=False)[-3]
    bound = Space(lin, HessianFactor(lin.system, lin.null)).least(c.stiffness_min)
    assert 0.4 * least <= bound <= least


@pytest.mark.parametrize("kind", ["stress", "volume"])
def test_the_sharp_estimate_is_the_error_and_the_correction_takes_it_off(kind):
    late, lin, direction = at_rest(kind), linearized(kind), directions(kind)["all"]
    strain = 1e-6 * np.array([[1.0, 0.5], [0.5, -1.0 if kind == "volume" else -0.3]])
    moved = late.positions + 1e-6 * np.random.default_rng(3).normal(size=late.positions.shape)
    cell = np.asarray(late.system.box)
    box = FixedBox(jnp.asarray(cell + strain @ cell))
    system = late.system.replace(positions=moved + moved @ strain.T, boundary=box)
    early = dataclasses.replace(late, system=system, max_force=max_force(system))
    c = ms.certify(early, direction)
    d, told = c.derivative, c.cell
    assert d is not None and told is not None and c.crossed_to_minimum == 0
    assert told.strain == pytest.approx(np.linalg.norm(strain), rel=1e-3)
    left = np.asarray(ms.observables.stress(system)) - told.target
    if kind == "volume":
        left -= np.trace(left) / 2 * np.eye(2)
    np.testing.assert_allclose(told.stress_left, left, atol=1e-12)
    length = np.sqrt(32 / 12) * float(early.system.volume) ** 0.5

    def parts(r: ms.Unknowns, at: ms.Equilibrium) -> np.ndarray:
        """A response as it counts: motion from the affine places, and the strain."""
        strain = np.asarray(from_mandel(jnp.asarray(r.strain)))
        rest = np.asarray(r.positions) - np.asarray(at.positions) @ strain.T
        return np.concatenate([np.ravel(rest - rest.mean(axis=0)), length * np.asarray(r.strain)])

    true = parts(ms.jvp(lin, direction).value, late)
    size = np.linalg.norm(true)
    error = np.linalg.norm(parts(d.response, early) - true) / size
    assert d.norm == pytest.approx(size, rel=1e-3)
    assert error / 2 < c.error < 2 * error < c.bound
    assert np.linalg.norm(parts(d.corrected, early) - true) / size < 0.1 * error


def test_it_says_what_the_load_is_and_is_json():
    page = " ".join(str(ms.certify(linearized("stress"))).split())
    assert "the stress is off the target (stress xx -0.06, yy -0.05, xy 0.004) by" in page
    assert "energy/volume under this load" in page
    stored = json.loads(json.dumps(ms.certify(linearized("volume")).as_dict(), allow_nan=False))
    assert stored["cell"]["target"] == DEVIATOR.tolist() and not stored["cell"]["hydrostatic"]


def test_a_change_of_the_volume_alone_strains_the_cell():
    """The free axes stretch equally, and the shape responds."""
    r = ms.jvp(linearized("volume"), {"volume": 1.0})
    volume = float(linearized("volume").system.volume)
    strain = np.asarray(r.strain)
    assert strain[0] + strain[1] == pytest.approx(1.0 / volume, rel=1e-12)
    c = ms.certify(linearized("volume"), {"volume": 1.0}).derivative
    assert c is not None and not c.vanishes
    np.testing.assert_allclose(c.response.strain, strain, rtol=1e-9)
    v = ms.verify.finite_difference(at_rest("volume"), {"volume": 1.0})
    assert v.radius == pytest.approx(c.radius, rel=1e-9)


# -- design


def test_a_design_refuses_two_conditions():
    with pytest.raises(ms.InputError, match="`cell` is given together with `pressure`"):
        wanted = ms.design.Target("volume", 27.0, 0.1)
        ms.design.fit(wanted, discs(), "sigma", cell=AtStress(STRESS), pressure=0.1)


@LONG
def test_a_design_relaxes_under_a_stress():
    wanted = ms.design.Target("volume", -0.2, 1e-4, from_start=True)
    design = ms.design.fit(wanted, discs(), "sigma", cell=AtStress(STRESS), steps=6)
    assert design.status is ms.Status.CONVERGED
    (eq,) = design.state.equilibria
    start = float(at_rest("stress").system.volume)
    assert float(eq.system.volume) == pytest.approx(start - 0.2, abs=2e-4)
    np.testing.assert_allclose(np.asarray(ms.observables.stress(eq.system)), STRESS, atol=1e-11)
