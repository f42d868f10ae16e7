"""Elastic moduli against an independent code's, lattice sums, minimising again, and each other."""

from __future__ import annotations

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LONG, PACKINGS, packing, packing_file, relative, relaxed_packing

import mdsens as ms
from mdsens import breakpoints, elasticity, strains
from mdsens.boxes import FixedBox
from mdsens.elasticity import isotropic, moduli

AXES = {"x": 0, "y": 1, "z": 2}


def of_isotropic(bulk: float, shear: float, d: int) -> np.ndarray:
    """K d_ij d_kl + G (d_ik d_jl + d_il d_jk - 2/d d_ij d_kl)."""
    unit = np.eye(d)
    same = np.einsum("ij,kl->ijkl", unit, unit)
    crossed = np.einsum("ik,jl->ijkl", unit, unit) + np.einsum("il,jk->ijkl", unit, unit)
    return bulk * same + shear * (crossed - 2 / d * same)


# ── forms of a tensor ──


@pytest.mark.parametrize("d", [2, 3])
def test_an_isotropic_tensor_gives_its_moduli(d):
    found = isotropic(jnp.asarray(of_isotropic(2.0, 0.7, d)))
    assert found.bulk == pytest.approx(2.0) and found.shear == pytest.approx(0.7)
    # uniaxial stress: the strain along it is sigma / E, across it -nu sigma / E
    sigma = np.zeros((d, d))
    sigma[0, 0] = 1.0
    strain = strains.from_mandel(
        jnp.linalg.solve(
            elasticity.mandel(jnp.asarray(of_isotropic(2.0, 0.7, d))), strains.to_mandel(jnp.asarray(sigma))
        )
    )
    assert found.young == pytest.approx(1.0 / float(strain[0, 0]))
    assert found.poisson == pytest.approx(-float(strain[1, 1] / strain[0, 0]))


@pytest.mark.parametrize("d", [2, 3])
def test_directions_of_an_isotropic_tensor_are_alike_and_of_a_cubic_one_are_not(d):
    same = isotropic(jnp.asarray(of_isotropic(2.0, 0.7, d)))
    some = np.random.default_rng(d).normal(size=(5, d))
    young, poisson = elasticity.directional(jnp.asarray(of_isotropic(2.0, 0.7, d)), some)
    np.testing.assert_allclose(young, same.young, rtol=1e-12)
    np.testing.assert_allclose(poisson, same.poisson, rtol=1e-12)
    c11, c12, c44 = 3.0, 1.0, 0.4
    m = d * (d + 1) // 2
    cubic = np.diag([c11 - c12] * d + [2 * c44] * (m - d)) + c12 * np.outer(np.arange(m) < d, np.arange(m) < d)
    young, poisson = elasticity.directional(strains.from_mandel(jnp.asarray(cubic)), np.eye(d))
    if d == 2:  # C11 e + C12 e' = s, C12 e + C11 e' = 0
        np.testing.assert_allclose(young, (c11**2 - c12**2) / c11)
        np.testing.assert_allclose(poisson, c12 / c11)
    else:
        np.testing.assert_allclose(young, (c11 - c12) * (c11 + 2 * c12) / (c11 + c12))
        np.testing.assert_allclose(poisson, c12 / (c11 + c12))
    with pytest.raises(ms.InputError, match="directions have shape"):
        elasticity.directional(jnp.asarray(of_isotropic(2.0, 0.7, d)), np.eye(4))


@pytest.mark.parametrize("d", [2, 3])
def test_mandel_and_voigt_forms(d):
    rng = np.random.default_rng(d)
    m = d * (d + 1) // 2
    square = jnp.asarray(rng.normal(size=(m, m)))
    tensor = strains.from_mandel(square)
    np.testing.assert_allclose(elasticity.mandel(tensor), square, rtol=1e-14)
    np.testing.assert_allclose(tensor, jnp.swapaxes(tensor, 0, 1), rtol=1e-14)
    entries = [(k, k) for k in range(d)] + ([(0, 1)] if d == 2 else [(1, 2), (0, 2), (0, 1)])
    for a, b in itertools.product(range(m), range(m)):
        assert elasticity.voigt(tensor)[a, b] == pytest.approx(float(tensor[entries[a] + entries[b]]))


# ── an independent code ──


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("index", range(10))
def test_elastic_constants_are_those_of_an_independent_code(name, index):
    file = packing_file(name)
    found = moduli(relaxed_packing(name, index))
    want = file["elastic_constants"][index]
    ours = np.array([found.tensor[tuple(AXES[axis] for axis in str(label)[1:])] for label in file["elastic_names"]])
    assert np.max(np.abs(ours - want)) < 1e-6 * np.max(np.abs(want))
    assert np.max(np.abs(found.stress - file["stress"][index])) < 1e-8 * np.max(np.abs(file["stress"][index]))
    symmetries = [(1, 0, 2, 3), (0, 1, 3, 2), (2, 3, 0, 1)]
    for order in symmetries:
        assert relative(np.transpose(found.tensor, order), found.tensor) < 1e-10
    assert float(jnp.max(found.stats.residual)) < 1e-10


# ── lattice sums ──


def fcc(constant: float) -> ms.System:
    return ms.load_system(
        "fcc_argon", positions={"kind": "lattice", "lattice": "fcc", "constant": constant, "cells": 4}
    )


def lattice_sums(system: ms.System) -> tuple[np.ndarray, np.ndarray]:
    """(A, sigma) of a crystal whose atoms are centres of symmetry, from one atom's neighbours, in numpy.

    C = (phi'' - phi'/r) r r r r / r^2 and sigma = phi' r r / r, summed over neighbours and halved, a volume; A from C
    by the stress.
    """
    R, box = np.asarray(system.positions), np.asarray(system.box)
    apart = R[1:] - R[0]
    apart -= np.round(apart @ np.linalg.inv(box).T) @ box.T
    r = np.linalg.norm(apart, axis=1)
    sigma, epsilon, onset, cutoff = 3.4, 0.0104, 6.8, 8.5

    def phi(r):
        x = jnp.clip((r - onset) / (cutoff - onset), 0.0, 1.0)
        switch = 1 - x**3 * (10 - 15 * x + 6 * x**2)
        return 4 * epsilon * ((sigma / r) ** 12 - (sigma / r) ** 6) * switch

    first, second = (np.asarray(jax.vmap(f)(jnp.asarray(r))) for f in (jax.grad(phi), jax.grad(jax.grad(phi))))
    volume = 2 * float(system.volume) / system.n
    stress = np.einsum("m,mi,mj->ij", first / r, apart, apart) / volume
    born = np.einsum("m,mi,mj,mk,ml->ijkl", (second - first / r) / r**2, apart, apart, apart, apart) / volume
    unit = np.eye(3)
    terms = ("ik,jl->ijkl", "il,jk->ijkl", "jk,il->ijkl", "jl,ik->ijkl")
    return born + 0.25 * sum(np.einsum(t, stress, unit) for t in terms), stress


@pytest.mark.parametrize("constant", [pytest.param(5.267140220637, marks=LONG), 5.1])
def test_fcc_argon_has_the_constants_of_its_lattice_sums(constant):
    system = fcc(constant)
    found, (want, stress) = moduli(ms.minimize(system)), lattice_sums(system)
    assert np.max(np.abs(found.tensor - want)) < 1e-6 * np.max(np.abs(want))
    assert np.max(np.abs(found.stress - stress)) < 1e-8 * max(np.max(np.abs(stress)), 1e-3 * np.max(np.abs(want)))
    a, b, pressure = elasticity.voigt(found.tensor), elasticity.voigt(found.birch), float(found.pressure)
    size = 1e-8 * float(jnp.max(jnp.abs(a)))
    assert a[0, 1] - a[3, 3] == pytest.approx(pressure / 2, abs=size)  # Cauchy's relation, under pressure
    assert b[0, 1] - b[3, 3] == pytest.approx(2 * pressure, abs=size)
    assert abs(pressure) < 1e-6 * float(a[0, 0]) if constant > 5.2 else pressure > 0.01 * float(a[0, 0])
    assert float(found.stability) > 0
    assert np.all(np.asarray(found.stats.status) == ms.Status.CONVERGED)  # round-off has no null part to drop


# ── minimising again ──


@cache
def loose() -> ms.Equilibrium:
    """Polydisperse discs with rattlers."""
    rng = np.random.default_rng(6)
    sigma = np.linspace(0.7, 1.3, 48)
    length = np.sqrt(np.pi / 4 * np.sum(sigma**2) / 0.87)
    params = {"sigma": sigma, "epsilon": 1.0, "alpha": 2.0}
    system = ms.System.create(rng.random((48, 2)) * length, length, ms.potentials.soft_sphere(), params)
    eq = ms.minimize(system, tolerance=1e-13)
    assert 0 < int(ms.linearize(eq).network.rattlers.sum()) < 10
    return eq


def strained(eq: ms.Equilibrium, strain: np.ndarray) -> ms.System:
    """Positions and cell deformed, and relaxed again."""
    change = np.eye(2) + strain
    system = eq.system
    box = FixedBox(jnp.asarray(change @ np.asarray(system.box)))
    moved = system.replace(positions=jnp.asarray(np.asarray(system.positions) @ change.T), boundary=box)
    return ms.minimize(moved.reallocate(), tolerance=1e-13).system


@pytest.mark.parametrize("which", ["packing", "loose"])
def test_tensors_are_second_differences_of_the_relaxed_energy_and_first_of_the_stress(which):
    eq = relaxed_packing(PACKINGS[0], 0) if which == "packing" else loose()
    found, h = moduli(eq), 1e-5
    volume = float(eq.system.volume)
    slopes, stresses = [], []
    for unit in strains.basis(2):
        both = [strained(eq, s * h * unit) for s in (1.0, -1.0)]
        stress = [np.asarray(ms.observables.stress(s)) for s in both]
        stresses.append((stress[0] - stress[1]) / (2 * h))
        # dU/dstrain at a strain e: V sigma (1 + e)^-1, symmetric part
        slope = [
            float(s.volume) * x @ np.linalg.inv(np.eye(2) + sign * h * unit)
            for s, x, sign in zip(both, stress, (1.0, -1.0), strict=True)
        ]
        slopes.append((slope[0] - slope[1]) / (2 * h * volume))
    units = strains.basis(2)
    a = np.einsum("aij,bij->ab", units, 0.5 * (np.array(slopes) + np.swapaxes(slopes, 1, 2)))
    assert relative(a, elasticity.mandel(found.tensor)) < 1e-6
    b = np.einsum("aij,bij->ab", units, np.array(stresses))
    assert relative(b, elasticity.mandel(found.birch)) < 1e-6


@pytest.mark.parametrize(
    "which", ["packing", pytest.param("loose", marks=LONG), pytest.param("growing box", marks=LONG)]
)
def test_gradients_of_moduli_are_finite_differences_of_minimising_again(which):
    if which == "growing box":
        eq = ms.minimize(ms.load_system("seed_packing_2d", seed=1), tolerance=1e-13)
    else:
        eq = relaxed_packing(PACKINGS[0], 0) if which == "packing" else loose()
    lin, h = ms.linearize(eq), 1e-5

    def features(m: elasticity.Moduli) -> jax.Array:
        return jnp.stack([*isotropic(m.tensor), *isotropic(m.birch), m.pressure, m.tensor[0, 0, 0, 1]])

    found = elasticity.gradient(features, lin).value
    rows = {name: np.asarray(v).reshape(v.shape[0], -1) for name, v in found.items()}
    scale = np.max([np.abs(rows[name]).max(axis=1) for name in ("sigma", "epsilon")], axis=0)  # nu knows no epsilon
    some = range(0, eq.params["sigma"].size, 8) if which != "growing box" else range(2)
    for name, ks in {"sigma": some, "epsilon": [0]}.items():
        flat = np.asarray(eq.params[name]).ravel()
        for k in ks:
            values = []
            for t in (h, -h, 0.5 * h, -0.5 * h):  # extrapolated: the error falls as h^4
                moved = flat + t * (np.arange(flat.size) == k)
                there = ms.minimize(eq.system, {name: moved.reshape(eq.params[name].shape)}, tolerance=3e-14)
                values.append(np.asarray(features(moduli(there))))
            want = (4 * (values[2] - values[3]) / h - (values[0] - values[1]) / (2 * h)) / 3
            assert np.max(np.abs(rows[name][:, k] - want) / scale) < 1e-6
    rng = np.random.default_rng(5)
    along = {name: rng.normal(size=np.shape(eq.params[name])) for name in ("sigma", "epsilon")}
    want = sum(rows[name] @ change.ravel() for name, change in along.items())
    forward = elasticity.jvp(features, lin, along)
    assert forward.status.good and np.max(np.abs(forward.value - want) / scale) < 1e-9


@LONG
@pytest.mark.parametrize("member", range(10))
@pytest.mark.parametrize("name", PACKINGS, ids=["2d", "3d"])
def test_gradients_of_moduli_on_every_packing_are_finite_differences_within_the_radius(name, member):
    eq = relaxed_packing(name, member)
    lin, rattlers = ms.linearize(eq), np.asarray(ms.linearize(eq).network.rattlers)

    def features(m: elasticity.Moduli) -> jax.Array:
        return jnp.stack([m.bulk, m.shear, m.poisson])

    found = np.asarray(elasticity.gradient(features, lin).value["sigma"])
    jacobian = ms.jacobian(lin, "sigma").value
    n, dimension = eq.positions.shape
    chosen = range(n) if dimension == 2 else np.flatnonzero(~rattlers)[:: n // 11][:10]
    assert len(chosen) == (n if dimension == 2 else 10)
    for k in chosen:
        unit = {**{p: jnp.zeros_like(v) for p, v in eq.params.items()}, "sigma": jnp.eye(n)[k]}
        radius = breakpoints.crossings(eq.system, jacobian[..., k], unit, lin.network.rattlers).radius
        errors = []
        for h in np.minimum([1e-5, 1e-6, 1e-7], np.multiply([0.8, 0.3, 0.1], radius)):  # a contact, or round-off
            ends = []
            for t in (h, -h, 0.5 * h, -0.5 * h):
                change = {"sigma": eq.params["sigma"] + t * unit["sigma"]}
                near = eq.system.replace(positions=eq.positions + t * jacobian[..., k])
                ends.append(np.asarray(features(moduli(ms.minimize(near, change, tolerance=3e-14, throw=False)))))
            want = (4 * (ends[2] - ends[3]) / h - (ends[0] - ends[1]) / (2 * h)) / 3
            errors.append(np.max(np.abs(found[:, k] - want) / np.abs(found).max(axis=1)))
            if errors[-1] < 1e-5:
                break
        assert errors[-1] < 1e-5, (int(k), radius, errors)


# ── the composable door ──


@LONG
def test_moduli_of_a_system_are_those_of_its_equilibrium_and_so_are_their_gradients():
    eq = loose()
    params = dict(eq.params)
    np.testing.assert_allclose(moduli(eq.system).tensor, moduli(eq).tensor, rtol=0, atol=1e-10)

    def poisson(p):
        return moduli(ms.equilibrate(eq.system, p, tolerance=1e-13)).poisson

    want = elasticity.gradient(lambda m: m.poisson, eq).value
    reverse = jax.jit(jax.grad(poisson))(params)
    assert relative(reverse["sigma"], want["sigma"]) < 1e-7
    assert abs(float(reverse["epsilon"])) < 1e-9  # a ratio of moduli knows no unit of energy
    tangent = jax.tree.map(jnp.zeros_like, params) | {"sigma": jnp.cos(jnp.arange(48.0))}
    forward = jax.jit(lambda p, t: jax.jvp(poisson, (p,), (t,))[1])(params, tangent)
    assert forward == pytest.approx(float(reverse["sigma"] @ tangent["sigma"]), rel=1e-8)


@LONG
def test_second_derivatives_of_moduli_pass_through_the_displacements():
    eq = relaxed_packing(PACKINGS[0], 1)
    direction = jnp.asarray(np.random.default_rng(0).normal(size=64))

    def shear(t):
        p = {**eq.params, "sigma": eq.params["sigma"] + t * direction}
        return moduli(ms.equilibrate(eq.system, p, tolerance=1e-13)).shear

    def first(t):  # by the other door, minimising again
        there = ms.minimize(eq.system, {"sigma": eq.params["sigma"] + t * direction}, tolerance=1e-13)
        return float(elasticity.gradient(lambda m: m.shear, there).value["sigma"] @ direction)

    second, h = jax.jit(jax.grad(jax.grad(shear)))(0.0), 1e-6
    assert second == pytest.approx((first(h) - first(-h)) / (2 * h), rel=1e-4)


# ── what it refuses, what it shows ──


def test_bad_input_is_refused():
    open_system = ms.System.create(
        np.array([[0.0, 0.0], [1.1, 0.0]]), None, ms.potentials.lennard_jones(), {"sigma": 1.0, "epsilon": 1.0}
    )
    with pytest.raises(ms.InputError, match="open boundaries: give it a box"):
        moduli(ms.minimize(open_system))
    with pytest.raises(ms.InputError, match="open boundaries"):
        moduli(open_system)
    with pytest.raises(ms.InputError, match=r"loop over ms\.unstack"):
        moduli(ms.stack([packing(PACKINGS[0], 0), packing(PACKINGS[0], 1)]))
    with pytest.raises(ms.InputError, match="give one of Moduli"):
        elasticity.gradient(0.3, loose())  # type: ignore[arg-type]


def test_an_unjammed_system_has_no_moduli():
    params = {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0}
    places = 10.0 * np.random.default_rng(0).random((8, 2))
    eq = ms.minimize(ms.System.create(places, 10.0, ms.potentials.soft_sphere(), params))
    with pytest.raises(ms.ConvergenceError, match="no contact carries force"):
        moduli(eq)
    assert ms.Status(int(jnp.max(moduli(eq, throw=False).stats.status))) is ms.Status.UNJAMMED


def test_a_system_that_is_not_relaxed_or_not_jammed_says_so():
    relaxed = loose().system
    moved = relaxed.positions + 0.02 * jnp.asarray(np.random.default_rng(0).normal(size=relaxed.positions.shape))
    smaller = relaxed.with_params({"sigma": 0.5 * relaxed.params["sigma"]})
    found = [moduli(s).stats.status for s in (relaxed, relaxed.replace(positions=moved).reallocate(), smaller)]
    kinds = [ms.Status(int(jnp.max(code))) for code in found]
    assert kinds[0].good and kinds[1:] == [ms.Status.UNCONVERGED, ms.Status.UNJAMMED]


def test_tensors_and_directions_are_checked():
    found = moduli(relaxed_packing(PACKINGS[0], 0))
    with pytest.raises(ms.InputError, match=r"give one of its tensors, moduli\.tensor or moduli\.birch"):
        isotropic(found)  # type: ignore[arg-type]
    with pytest.raises(ms.InputError, match=r"the tensor has shape \(3, 3\)"):
        elasticity.directional(jnp.eye(3), [1.0, 0.0])
    for bad in ([0.0, 0.0], [np.nan, 1.0]):
        with pytest.raises(ms.InputError, match="a direction is zero or not finite"):
            elasticity.directional(found.tensor, bad)
    sizes = [elasticity.directional(found.tensor, [s, 2 * s])[0] for s in (1e-200, 1.0, 1e200)]
    np.testing.assert_allclose(sizes, sizes[1], rtol=1e-12)


def test_a_gradient_that_does_not_fit_is_refused():
    with pytest.raises(ms.TooLargeError, match="observables"):
        elasticity.gradient(lambda m: jnp.outer(jnp.ones(1000), jnp.ones(1000)) * m.shear, loose())


def test_the_table_names_both_conventions():
    text = str(moduli(relaxed_packing(PACKINGS[0], 0)))
    assert "0.672" in text and "0.7225" in text  # as in systems/data/README.md, and with P / 2 more
    assert "Poisson's ratio" in text and "CONVERGED" in text


def test_the_figure_draws_both_by_angle():
    found = moduli(relaxed_packing(PACKINGS[0], 0))
    axes = ms.plots.moduli(found, birch=True, title="a packing")
    for ax, values in zip(axes, elasticity.directional(found.birch, np.array([[1.0, 0.0], [0.0, 1.0]])), strict=True):
        angle, radius = ax.lines[1].get_data()
        np.testing.assert_allclose(radius[[0, 90]], np.abs(values), rtol=1e-10)
        assert angle[90] == pytest.approx(np.pi / 2)
        assert "Birch" in ax.get_title()
    with pytest.raises(ms.InputError, match="in 2-D"):
        ms.plots.moduli(moduli(relaxed_packing(PACKINGS[1], 0)))
    with pytest.raises(ms.InputError, match=r"give what ms\.elasticity\.moduli returns"):
        ms.plots.moduli(3)  # type: ignore[arg-type]
