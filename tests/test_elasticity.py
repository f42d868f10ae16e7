"""Elastic moduli against an independent code's, lattice sums, minimizing again, and each other."""

from __future__ import annotations

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    LONG,
    PACKINGS,
    discs_at_rest,
    packing,
    packing_file,
    quick,
    relative,
    relaxed_packing,
    ring,
    square_lattice,
)

import mdsens as ms
from mdsens import elasticity
from mdsens._util.outcome import is_good
from mdsens.elasticity import isotropic, moduli
from mdsens.mechanics import contact_changes, hessian_factor
from mdsens.mechanics.strain import basis, from_mandel, to_mandel
from mdsens.model.box import FixedBox
from mdsens.model.system import potential_energy

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
    strain = from_mandel(
        jnp.linalg.solve(
            elasticity.mandel(jnp.asarray(of_isotropic(2.0, 0.7, d))), to_mandel(jnp.asarray(sigma))
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
    cubic = np.diag([c11 - c12] * d + [2 * c44] * (m - d)) + c12 * np.outer(
        np.arange(m) < d, np.arange(m) < d
    )
    young, poisson = elasticity.directional(from_mandel(jnp.asarray(cubic)), np.eye(d))
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
    tensor = from_mandel(square)
    np.testing.assert_allclose(elasticity.mandel(tensor), square, rtol=1e-14)
    np.testing.assert_allclose(tensor, jnp.swapaxes(tensor, 0, 1), rtol=1e-14)
    entries = [(k, k) for k in range(d)] + ([(0, 1)] if d == 2 else [(1, 2), (0, 2), (0, 1)])
    for a, b in itertools.product(range(m), range(m)):
        assert elasticity.voigt(tensor)[a, b] == pytest.approx(
            float(tensor[entries[a] + entries[b]])
        )


# ── an independent code ──


@pytest.mark.parametrize("index", range(10))
@pytest.mark.parametrize(
    "name",
    [  # in 3-D, all optimizations take half a minute to compile
        pytest.param(PACKINGS[0], marks=pytest.mark.as_shipped),
        PACKINGS[1],
    ],
)
def test_elastic_constants_are_those_of_an_independent_code(name, index):
    file = packing_file(name)
    found = moduli(relaxed_packing(name, index))
    want = file["elastic_constants"][index]
    ours = np.array(
        [
            found.tensor[tuple(AXES[axis] for axis in str(label)[1:])]
            for label in file["elastic_names"]
        ]
    )
    assert np.max(np.abs(ours - want)) < 1e-6 * np.max(np.abs(want))
    assert np.max(np.abs(found.stress - file["stress"][index])) < 1e-8 * np.max(
        np.abs(file["stress"][index])
    )
    symmetries = [(1, 0, 2, 3), (0, 1, 3, 2), (2, 3, 0, 1)]
    for order in symmetries:
        assert relative(np.transpose(found.tensor, order), found.tensor) < 1e-10
    assert float(jnp.max(found.stats.residual)) < 1e-10


# ── lattice sums ──


def fcc(constant: float) -> ms.System:
    return ms.load_system(
        "fcc_argon",
        positions={"kind": "lattice", "lattice": "fcc", "constant": constant, "cells": 4},
    )


def lattice_sums(system: ms.System) -> tuple[np.ndarray, np.ndarray]:
    """(A, sigma) of a crystal whose atoms are centers of symmetry,
    from one atom's neighbors, in numpy.

    C = (phi'' - phi'/r) r r r r / r^2 and sigma = phi' r r / r, summed over neighbors and halved, a
    volume; A from C by the stress.
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

    first, second = (
        np.asarray(jax.vmap(f)(jnp.asarray(r))) for f in (jax.grad(phi), jax.grad(jax.grad(phi)))
    )
    volume = 2 * float(system.volume) / system.n
    stress = np.einsum("m,mi,mj->ij", first / r, apart, apart) / volume
    born = (
        np.einsum("m,mi,mj,mk,ml->ijkl", (second - first / r) / r**2, apart, apart, apart, apart)
        / volume
    )
    unit = np.eye(3)
    terms = ("ik,jl->ijkl", "il,jk->ijkl", "jk,il->ijkl", "jl,ik->ijkl")
    return born + 0.25 * sum(np.einsum(t, stress, unit) for t in terms), stress


@pytest.mark.as_shipped
@pytest.mark.parametrize("constant", [pytest.param(5.267140220637, marks=LONG), 5.1])
def test_fcc_argon_has_the_constants_of_its_lattice_sums(constant):
    system = fcc(constant)
    found, (want, stress) = moduli(ms.minimize(system)), lattice_sums(system)
    assert np.max(np.abs(found.tensor - want)) < 1e-6 * np.max(np.abs(want))
    assert np.max(np.abs(found.stress - stress)) < 1e-8 * max(
        np.max(np.abs(stress)), 1e-3 * np.max(np.abs(want))
    )
    a, b, pressure = (
        elasticity.voigt(found.tensor),
        elasticity.voigt(found.birch),
        float(found.pressure),
    )
    size = 1e-8 * float(jnp.max(jnp.abs(a)))
    # Cauchy's relation, under pressure
    assert a[0, 1] - a[3, 3] == pytest.approx(pressure / 2, abs=size)
    assert b[0, 1] - b[3, 3] == pytest.approx(2 * pressure, abs=size)
    assert (
        abs(pressure) < 1e-6 * float(a[0, 0])
        if constant > 5.2
        else pressure > 0.01 * float(a[0, 0])
    )
    assert float(found.stability) > 0
    # round-off has no null part to drop
    assert np.all(np.asarray(found.stats.status) == ms.Status.CONVERGED)


# ── minimizing again ──


@cache
def loose() -> ms.Equilibrium:
    """Polydisperse discs with rattlers."""
    rng = np.random.default_rng(6)
    sigma = np.linspace(0.7, 1.3, 48)
    length = np.sqrt(np.pi / 4 * np.sum(sigma**2) / 0.87)
    params = {"sigma": sigma, "epsilon": 1.0, "alpha": 2.0}
    system = ms.System.create(
        rng.random((48, 2)) * length, length, ms.potentials.soft_sphere(), params
    )
    eq = ms.minimize(system, tolerance=1e-13)
    assert 0 < int(ms.linearize(eq).network.rattlers.sum()) < 10
    return eq


def strained(eq: ms.Equilibrium, strain: np.ndarray) -> ms.System:
    """Positions and cell deformed, and relaxed again."""
    change = np.eye(2) + strain
    system = eq.system
    box = FixedBox(jnp.asarray(change @ np.asarray(system.box)))
    moved = system.replace(
        positions=jnp.asarray(np.asarray(system.positions) @ change.T), boundary=box
    )
    return ms.minimize(moved.reallocate(), tolerance=1e-13).system


@pytest.mark.parametrize("which", quick(["packing", "loose"], "packing"))
def test_tensors_are_second_differences_of_the_relaxed_energy_and_first_of_the_stress(which):
    eq = relaxed_packing(PACKINGS[0], 0) if which == "packing" else loose()
    found, h = moduli(eq), 1e-5
    volume = float(eq.system.volume)
    slopes, stresses = [], []
    for unit in basis(2):
        both = [strained(eq, s * h * unit) for s in (1.0, -1.0)]
        stress = [np.asarray(ms.observables.stress(s)) for s in both]
        stresses.append((stress[0] - stress[1]) / (2 * h))
        # dU/dstrain at a strain e: V sigma (1 + e)^-1, symmetric part
        slope = [
            float(s.volume) * x @ np.linalg.inv(np.eye(2) + sign * h * unit)
            for s, x, sign in zip(both, stress, (1.0, -1.0), strict=True)
        ]
        slopes.append((slope[0] - slope[1]) / (2 * h * volume))
    units = basis(2)
    a = np.einsum("aij,bij->ab", units, 0.5 * (np.array(slopes) + np.swapaxes(slopes, 1, 2)))
    assert relative(a, elasticity.mandel(found.tensor)) < 1e-6
    b = np.einsum("aij,bij->ab", units, np.array(stresses))
    assert relative(b, elasticity.mandel(found.birch)) < 1e-6


@pytest.mark.parametrize(
    "which", ["packing", pytest.param("loose", marks=LONG), pytest.param("growing box", marks=LONG)]
)
def test_gradients_of_moduli_are_finite_differences_of_minimizing_again(which):
    if which == "growing box":
        eq = ms.minimize(ms.load_system("seed_packing_2d", seed=1), tolerance=1e-13)
    else:
        eq = relaxed_packing(PACKINGS[0], 0) if which == "packing" else loose()
    lin, h = ms.linearize(eq), 1e-5

    def features(m: elasticity.Moduli) -> jax.Array:
        return jnp.stack(
            [*isotropic(m.tensor), *isotropic(m.birch), m.pressure, m.tensor[0, 0, 0, 1]]
        )

    found = elasticity.gradient(features, lin).value
    rows = {name: np.asarray(v).reshape(v.shape[0], -1) for name, v in found.items()}
    # nu knows no epsilon
    scale = np.max([np.abs(rows[name]).max(axis=1) for name in ("sigma", "epsilon")], axis=0)
    some = range(0, eq.params["sigma"].size, 8) if which != "growing box" else range(2)
    for name, ks in {"sigma": some, "epsilon": [0]}.items():
        flat = np.asarray(eq.params[name]).ravel()
        for k in ks:
            values = []
            for t in (h, -h, 0.5 * h, -0.5 * h):  # extrapolated: the error falls as h^4
                moved = flat + t * (np.arange(flat.size) == k)
                there = ms.minimize(
                    eq.system, {name: moved.reshape(eq.params[name].shape)}, tolerance=3e-14
                )
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
def test_gradients_of_moduli_on_every_packing_are_finite_differences_within_the_radius(
    name, member
):
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
        radius = contact_changes.crossings(
            eq.system, jacobian[..., k], unit, lin.network.rattlers
        ).radius
        errors = []
        # what limits a step is a contact, or round-off
        for h in np.minimum([1e-5, 1e-6, 1e-7], np.multiply([0.8, 0.3, 0.1], radius)):
            ends = []
            for t in (h, -h, 0.5 * h, -0.5 * h):
                change = {"sigma": eq.params["sigma"] + t * unit["sigma"]}
                near = eq.system.replace(positions=eq.positions + t * jacobian[..., k])
                ends.append(
                    np.asarray(
                        features(moduli(ms.minimize(near, change, tolerance=3e-14, throw=False)))
                    )
                )
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

    def first(t):  # by the other door, minimizing again
        there = ms.minimize(
            eq.system, {"sigma": eq.params["sigma"] + t * direction}, tolerance=1e-13
        )
        return float(elasticity.gradient(lambda m: m.shear, there).value["sigma"] @ direction)

    second, h = jax.jit(jax.grad(jax.grad(shear)))(0.0), 1e-6
    assert second == pytest.approx((first(h) - first(-h)) / (2 * h), rel=1e-4)


# ── what is zero, and what is no solid ──


def zeros(m: elasticity.Moduli) -> jax.Array:
    return jnp.stack([m.bulk, m.shear, isotropic(m.birch).bulk, isotropic(m.birch).shear])


def ratios(m: elasticity.Moduli) -> jax.Array:
    return jnp.stack([m.young, m.poisson, isotropic(m.birch).young, isotropic(m.birch).poisson])


def test_a_ring_of_springs_at_rest_has_no_moduli():
    eq = ms.minimize(ring())
    found = moduli(eq, throw=False)
    assert found.status is ms.Status.FLOPPY and not np.any(found.tensor) and not np.any(found.birch)
    assert 0 < float(found.round_off) < 1e-11 * float(jnp.max(found.affine))
    traced = jax.jit(moduli)(eq.system)
    for m in (found, traced):
        assert not np.any(zeros(m)) and np.all(np.isnan(ratios(m))) and m.status is ms.Status.FLOPPY
    young, poisson = elasticity.directional(found.tensor, np.eye(2))
    assert not np.any(young) and np.all(np.isnan(poisson))
    said = (
        r"bulk modulus 0, shear modulus 0, smallest eigenvalue of Birch's tensor 0 \(throw=False"
        r" gives them\)"
    )
    with pytest.raises(ms.ConvergenceError, match=said) as raised:
        moduli(eq)
    assert raised.value.status is ms.Status.FLOPPY and "nan" in str(raised.value.result)
    axes = ms.plots.moduli(found)
    assert all(ax.get_ylim() == (0.0, 1.0) for ax in axes)


def test_what_is_derived_of_no_moduli_is_nan_or_zero_and_says_so():
    eq = ms.minimize(ring())
    for of, empty in ((zeros, lambda x: np.asarray(x) == 0.0), (ratios, np.isnan)):
        value, slope = elasticity.value_and_gradient(of, eq, throw=False)
        forward = elasticity.jvp(of, eq, {"length": 1.0}, throw=False)
        for found in (value, slope.value["length"], slope.value["stiffness"], forward.value):
            assert found.shape == (4,) and np.all(empty(found))
        for response in (slope, forward):
            assert np.all(np.asarray(response.stats.status) == ms.Status.FLOPPY)
        for door in (
            lambda of=of: elasticity.gradient(of, eq),
            lambda of=of: elasticity.jvp(of, eq, {"length": 1.0}),
        ):
            with pytest.raises(ms.ConvergenceError, match="not rigid"):
                door()
    solve_derivative = ms.gradient(lambda s: moduli(s).poisson, eq, throw=False)
    assert solve_derivative.status is ms.Status.NOT_FINITE and np.isnan(
        solve_derivative.value["length"]
    )


def test_a_ring_in_single_precision_has_none_either_and_one_with_tension_left_may_have_some():
    single = ms.minimize(ring(dtype=np.float32), tolerance=1e-5)
    found = moduli(single, throw=False)
    assert found.status is ms.Status.FLOPPY and float(found.bulk) == 0.0 and np.isnan(found.poisson)
    # a thousand times round-off is left of its tension
    pulled = ms.minimize(ring(pulled=1e-10), tolerance=1e-10)
    doubtful = moduli(pulled, throw=False)
    assert doubtful.status is ms.Status.STIFFNESS_UNSETTLED and not doubtful.status.good
    assert float(jnp.max(jnp.abs(doubtful.tensor))) > float(doubtful.round_off)


@pytest.mark.parametrize("diagonals", [0.0, 1e-9, 0.3])
def test_a_square_lattice_has_its_constants_however_small(diagonals):
    """K = (1 + 2 k) / 2, G = (1 + 2 k) / 4: a strain may cost nothing,
    or next to it, and the moduli stay.
    """
    found = moduli(ms.minimize(square_lattice(diagonals)))
    assert found.status is (ms.Status.CONVERGED if diagonals else ms.Status.SHAPE_HELD)
    a = elasticity.voigt(found.tensor)
    np.testing.assert_allclose(
        [a[0, 0], a[0, 1], a[2, 2]], [1.0 + diagonals, diagonals, diagonals], rtol=1e-6
    )
    assert found.bulk == pytest.approx(0.5 + diagonals) and found.shear == pytest.approx(
        0.25 + 0.5 * diagonals
    )
    young, poisson = elasticity.directional(found.tensor, [[1.0, 0.0], [1.0, 1.0]])
    # along the axis; across the squares K and C44 alone yield
    ratio = diagonals / (1.0 + diagonals)
    np.testing.assert_allclose(
        young,
        [
            1.0 + diagonals - diagonals * ratio,
            1.0 / (0.5 / (1.0 + 2.0 * diagonals) + 0.25 / diagonals) if diagonals else 0.0,
        ],
        rtol=1e-6,
    )
    assert poisson[0] == pytest.approx(ratio) and bool(np.isnan(poisson[1])) is not bool(diagonals)


def test_a_strain_that_costs_nothing_leaves_the_derivatives():
    """Longer springs of a square lattice in its cell are under pressure,
    and A44 is half their tension each: -1/2.
    """
    slope = elasticity.gradient(lambda m: m.tensor[0, 1, 0, 1], ms.minimize(square_lattice(0.0)))
    assert slope.status is ms.Status.SHAPE_HELD
    assert float(jnp.sum(slope.value["length"][:50])) == pytest.approx(-0.5, rel=1e-9)


def dense_tensor(system: ms.System) -> np.ndarray:
    """A in Mandel's form, by all second derivatives of the energy
    at once and numpy's pseudo-inverse.
    """
    size, units = system.positions.size, jnp.asarray(basis(2))

    def energy(x: jax.Array) -> jax.Array:
        return potential_energy(
            system, x[:size].reshape(-1, 2), strain=jnp.tensordot(x[size:], units, axes=1)
        )

    whole = np.asarray(
        jax.jit(jax.hessian(energy))(jnp.concatenate([system.positions.ravel(), jnp.zeros(3)]))
    )
    particles, coupling = whole[:size, :size], whole[:size, size:]
    relaxed = (
        whole[size:, size:]
        - coupling.T @ np.linalg.pinv(particles, rcond=1e-11, hermitian=True) @ coupling
    )
    return relaxed / float(system.volume)


def test_what_is_small_and_resolved_stays():
    """A packing of the data next to unjamming, G / K = 3e-4, where Poisson's ratio is 0.999."""
    eq = ms.minimize(packing(PACKINGS[0], 0), pressure=1e-6, tolerance=1e-13)
    found = moduli(eq)
    assert found.status.good and float(found.pressure) == pytest.approx(1e-6, rel=1e-6)
    assert float(found.shear) < 1e-3 * float(found.bulk) and float(found.shear) > 1e6 * float(
        found.round_off
    )
    want = dense_tensor(ms.linearize(eq).system)
    assert np.max(np.abs(elasticity.mandel(found.tensor) - want)) < 1e-9


def test_a_negative_shear_modulus_is_refused_with_its_figures_by_every_door():
    eq = discs_at_rest("unstable")
    found = moduli(eq, throw=False)
    want = dense_tensor(ms.linearize(eq).system)
    assert relative(elasticity.mandel(found.tensor), want) < 1e-9 and found.bulk > 0 > found.shear
    of_system = jax.jit(lambda s: moduli(s).stats.status)(eq.system)
    assert found.status is ms.Status.UNSTABLE and np.all(
        np.asarray(of_system) == ms.Status.UNSTABLE
    )
    figures = (
        rf"bulk modulus {float(found.bulk):.3g}, shear modulus {float(found.shear):.3g}, smallest"
        r" eigenvalue"
    )
    calls = (
        lambda **how: moduli(eq, **how),
        lambda **how: elasticity.gradient(lambda m: m.bulk, eq, **how),
        lambda **how: elasticity.value_and_gradient(lambda m: m.bulk, eq, **how)[1],
        lambda **how: elasticity.jvp(lambda m: m.bulk, eq, {"sigma": np.array([0.0, 1.0])}, **how),
    )
    for call in calls:
        with pytest.raises(ms.ConvergenceError, match=figures) as raised:
            call()
        assert raised.value.status is ms.Status.UNSTABLE and "\n" not in str(raised.value)
        assert call(throw=False).status is ms.Status.UNSTABLE
    # ratios of no solid, also where no status goes with them
    assert np.isnan(found.poisson) and np.isnan(found.young)
    assert ms.gradient(lambda s: moduli(s).poisson, eq, throw=False).status is ms.Status.NOT_FINITE
    slope, h = calls[1](throw=False).value["sigma"], 1e-6
    ends = [
        ms.minimize(
            eq.system, {"sigma": eq.params["sigma"] + s * np.array([0.0, 1.0])}, tolerance=1e-13
        )
        for s in (h, -h)
    ]
    bulk = [float(moduli(end, throw=False).bulk) for end in ends]
    # the number is what it is
    assert float(slope[1]) == pytest.approx((bulk[0] - bulk[1]) / (2 * h), rel=1e-4)


def test_a_strain_that_lowers_the_enthalpy_is_a_warning():
    """Moduli of a packing next to unjamming are averages over directions,
    in some of which it gives way.
    """
    found = moduli(discs_at_rest("sheared away"))
    assert found.status is ms.Status.SHAPE_HELD and found.status.good and found.status.warning
    assert found.bulk > 0 and found.shear > 0 > found.stability
    # Birch's tensor decides: of this one of the data A is positive definite,
    # and at its pressure it gives way
    eq = relaxed_packing(PACKINGS[0], 3)
    here = moduli(eq)
    assert (
        here.status is ms.Status.SHAPE_HELD
        and np.linalg.eigvalsh(elasticity.mandel(here.tensor))[0] > 0.08
    )
    birch = np.asarray(elasticity.mandel(here.birch))
    values, vectors = np.linalg.eigh(0.5 * (birch + birch.T))
    assert values[0] == pytest.approx(-0.0162, abs=1e-4)
    softest, h = np.tensordot(vectors[:, 0], basis(2), axes=1), 2e-4

    def enthalpy(system: ms.System) -> float:
        return float(ms.observables.energy(system)) + float(here.pressure) * float(system.volume)

    ends = [enthalpy(strained(eq, s * h * softest)) for s in (1.0, -1.0)]
    curvature = (ends[0] - 2.0 * enthalpy(eq.system) + ends[1]) / (h**2 * float(eq.system.volume))
    assert curvature < 0 and curvature == pytest.approx(float(values[0]), rel=0.3)
    assert moduli(relaxed_packing(PACKINGS[0], 0)).status is ms.Status.CONVERGED


# ── what it refuses, what it shows ──


def test_bad_input_is_refused():
    open_system = ms.System.create(
        np.array([[0.0, 0.0], [1.1, 0.0]]),
        None,
        ms.potentials.lennard_jones(),
        {"sigma": 1.0, "epsilon": 1.0},
    )
    with pytest.raises(ms.InputError, match="open boundaries: give the system a box"):
        moduli(ms.minimize(open_system))
    with pytest.raises(ms.InputError, match="open boundaries"):
        moduli(open_system)
    with pytest.raises(ms.InputError, match=r"loop over ms\.unstack"):
        moduli(ms.stack([packing(PACKINGS[0], 0), packing(PACKINGS[0], 1)]))
    with pytest.raises(ms.InputError, match="give a function of Moduli"):
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
    moved = relaxed.positions + 0.02 * jnp.asarray(
        np.random.default_rng(0).normal(size=relaxed.positions.shape)
    )
    smaller = relaxed.with_params({"sigma": 0.5 * relaxed.params["sigma"]})
    found = [
        moduli(s).stats.status
        for s in (relaxed, relaxed.replace(positions=moved).reallocate(), smaller)
    ]
    kinds = [ms.Status(int(jnp.max(code))) for code in found]
    assert kinds[0].good and kinds[1:] == [ms.Status.UNCONVERGED, ms.Status.UNJAMMED]


def test_tensors_and_directions_are_checked():
    found = moduli(relaxed_packing(PACKINGS[0], 0))
    with pytest.raises(
        ms.InputError, match=r"give one of its tensors, moduli\.tensor or moduli\.birch"
    ):
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
    for ax, values in zip(
        axes, elasticity.directional(found.birch, np.array([[1.0, 0.0], [0.0, 1.0]])), strict=True
    ):
        angle, radius = (np.asarray(part) for part in ax.lines[1].get_data())
        np.testing.assert_allclose(radius[[0, 90]], np.abs(values), rtol=1e-10)
        assert angle[90] == pytest.approx(np.pi / 2)
        assert "Birch" in ax.get_title()
    with pytest.raises(ms.InputError, match="in 2-D"):
        ms.plots.moduli(moduli(relaxed_packing(PACKINGS[1], 0)))
    with pytest.raises(ms.InputError, match=r"give what ms\.elasticity\.moduli returns"):
        ms.plots.moduli(3)  # type: ignore[arg-type]


# ── one way inside ──


def test_moduli_in_an_observable_compile_once_and_serve_a_batch():
    """``ms.gradient`` of a function of a System that takes its moduli:
    the numbers of ``elasticity.gradient``.
    """
    sizes = np.where(np.arange(12) % 3, 1.0, 0.7)

    def start(k: int) -> ms.System:
        positions = 3.0 * np.random.default_rng(k).random((12, 2))
        params = {"sigma": sizes, "epsilon": 1.0, "alpha": 2.0}
        return ms.System.create(positions, 3.0, ms.potentials.soft_sphere(), params)

    batch = ms.minimize(ms.stack([start(k) for k in range(3)]))

    def bulk(s: ms.System) -> jax.Array:
        return moduli(s).bulk

    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        listener := lambda event, *_, **__: compiled.append(event)
    )
    try:
        one, *others = ms.unstack(batch)
        found = [ms.gradient(bulk, one)]
        compiled.clear()
        found += [ms.gradient(bulk, eq) for eq in others]
        assert "/jax/core/compile/backend_compile_duration" not in compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    together = ms.gradient(bulk, batch)
    assert together.stats.status.tolist() == [ms.Status.CONVERGED] * 3
    for k, (eq, r) in enumerate(zip([one, *others], found, strict=True)):
        exact = elasticity.gradient(lambda m: m.bulk, eq)
        for name, slope in exact.value.items():
            assert (
                relative(r.value[name], slope) < 1e-9
                and relative(together.value[name][k], slope) < 1e-9
            )
    with pytest.raises(
        ms.InputError, match=r"moduli are of one system.*ms\.gradient\(lambda s: .*moduli\(s\)"
    ):
        elasticity.gradient(lambda m: m.bulk, batch)


def test_moduli_and_certificate_without_a_factor_are_those_with_one(monkeypatch):
    """Several strains by block conjugate gradients, single solves by blocks of pairs."""
    eq = relaxed_packing(PACKINGS[1], 0)
    want, certified = moduli(eq), ms.certify(eq, {"epsilon": 1.0})
    columns = ms.jacobian(eq, "sigma").value
    monkeypatch.setattr(hessian_factor, "FACTOR_PARTICLES_3D", 0)
    got, again = moduli(eq), ms.certify(eq, {"epsilon": 1.0})
    assert got.stats.solver == "block CG" and np.all(is_good(got.stats.status))
    np.testing.assert_allclose(got.tensor, want.tensor, atol=1e-7 * np.abs(want.tensor).max())
    for name in ("bulk", "shear"):
        assert abs(getattr(again.strain, name) / getattr(certified.strain, name) - 1) < 1e-7
    other = ms.jacobian(eq, "sigma").value
    np.testing.assert_allclose(other, columns, atol=1e-6 * float(jnp.abs(columns).max()))
