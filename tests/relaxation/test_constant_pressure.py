"""Minima at a pressure: the cell comes to rest, and responds,
as minimizing again at other parameters says.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LONG, PACKINGS, packing, quick, relative, relaxed_packing, square_lattice

import mdsens as ms
from mdsens import elasticity
from mdsens.elasticity import isotropic, moduli
from mdsens.mechanics.strain import from_mandel
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.box import FixedBox


def discs(n: int, fraction: float, seed: int = 0, follows: bool = False) -> ms.System:
    """Discs in a square that is given, or that follows the packing fraction."""
    rng = np.random.default_rng(seed)
    sigma = np.linspace(0.8, 1.2, n)
    length = np.sqrt(np.pi / 4 * np.sum(sigma**2) / fraction)
    params = {"sigma": sigma, "epsilon": 1.0, "alpha": 2.0}
    box = ms.PackingFraction(fraction) if follows else length
    return ms.System.create(rng.random((n, 2)) * length, box, ms.potentials.soft_sphere(), params)


@cache
def at_rest(kind: str) -> ms.Equilibrium:
    if kind == "size":
        return ms.minimize(discs(64, 0.9), pressure=0.05, tolerance=3e-14)
    if kind == "shape":
        return ms.minimize(discs(64, 0.9), pressure=0.05, shape=True, tolerance=3e-14)
    # spheres, with rattlers
    return ms.minimize(packing(PACKINGS[1], 2), pressure=1e-3, tolerance=3e-14)


KINDS = ("size", "shape", "spheres")


def fraction(system: ms.System) -> Any:
    unit = {2: np.pi / 4, 3: np.pi / 6}[system.dimension]
    return unit * jnp.sum(system.params["sigma"] ** system.dimension) / system.volume


# ── coming to rest ──


@pytest.mark.parametrize("kind", quick(KINDS, "shape"))
def test_the_stress_is_the_pressure_asked_for(kind):
    eq = at_rest(kind)
    stress = np.asarray(ms.observables.stress(eq.system))
    assert ms.Status(int(eq.status)).good and float(eq.max_force) <= 3e-14
    assert float(ms.observables.pressure(eq.system)) == pytest.approx(float(eq.pressure), abs=1e-12)
    if kind == "shape":
        np.testing.assert_allclose(stress, -0.05 * np.eye(2), atol=1e-12)
    else:
        # what no shape relaxed is left
        assert np.abs(stress - np.diag(np.diag(stress))).max() > 1e-7
    assert str(eq).count("pressure") == 1


def test_a_packing_is_compressed_from_an_unjammed_start_and_expanded_from_a_dense_one():
    for start in (discs(64, 0.5), discs(64, 1.3)):
        eq = ms.minimize(start, pressure=0.01)
        assert float(ms.observables.pressure(eq.system)) == pytest.approx(0.01, abs=1e-11)
        assert 0.84 < float(fraction(eq.system)) < 1.0


def small(seed: int) -> ms.System:
    """Two dozen discs from a random start."""
    sigma = np.where(np.arange(24) % 2, 1.0, 1.4)
    places = 5.5 * np.random.default_rng(seed).random((24, 2))
    params = {"sigma": sigma, "epsilon": 1.0, "alpha": 2.0}
    return ms.System.create(places, 5.5, ms.potentials.soft_sphere(), params)


@pytest.mark.parametrize("pressure", quick([1e-4, 1e-7], 1e-7))
def test_packings_are_decompressed_to_next_to_nothing(pressure):
    # a Newton step of the cell may take the last contact away: it is shortened
    for seed in range(4):
        eq = ms.minimize(small(seed), pressure=pressure)
        assert float(ms.observables.pressure(eq.system)) == pytest.approx(pressure, rel=1e-4)
        assert not ms.linearize(eq).network.rattlers.all()


@pytest.mark.parametrize("pressure", [0.0, -0.1, 1e6])
def test_a_pressure_at_which_nothing_rests_has_a_status(pressure):
    eq = ms.minimize(small(1), pressure=pressure, throw=False)
    assert ms.Status(int(eq.status)) is ms.Status.NO_REST
    with pytest.raises(ms.ConvergenceError, match="no state of rest was found at this pressure"):
        ms.minimize(small(1), pressure=pressure)


def test_the_step_limit_is_of_all_relaxations_together():
    eq = ms.minimize(small(1), pressure=1e-4, max_steps=1000, throw=False)
    assert ms.Status(int(eq.status)) is ms.Status.MAX_STEPS_REACHED and int(eq.steps) <= 1100


def test_a_strain_of_the_cell_that_costs_nothing_is_told():
    """Springs on a square lattice do not resist a shear:
    of a cell free to take it the compliance has no part there.
    """
    eq = ms.minimize(square_lattice(0.0), pressure=0.0, shape=True, throw=False)
    lin = ms.linearize(eq, throw=False)
    assert lin.cell is not None and ms.Status(int(lin.cell.status)) is ms.Status.FLOPPY
    # C11 = 1 along each axis, times the volume
    np.testing.assert_allclose(lin.cell.stiffness, 25.0 * np.diag([1.0, 1.0, 0.0]), atol=1e-12)
    np.testing.assert_allclose(lin.cell.compliance, np.diag([0.04, 0.04, 0.0]), rtol=1e-12)
    assert (
        ms.Status(int(eq.status)) is ms.Status.FLOPPY and ms.certify(eq).status is ms.Status.FLOPPY
    )
    assert ms.jvp(eq, {"stiffness": np.ones(100)}, throw=False).status is ms.Status.FLOPPY
    braced = ms.minimize(square_lattice(1e-9), pressure=0.0, shape=True)
    stiffness = np.linalg.eigvalsh(np.asarray(ms.linearize(braced).cell.stiffness))  # type: ignore[union-attr]
    np.testing.assert_allclose(stiffness[0], 25.0 * 2e-9, rtol=1e-6)  # 2 C44: small, and there


@LONG
def test_a_crystal_under_no_pressure_has_its_lattice_constant():
    cell = {"kind": "lattice", "lattice": "fcc", "constant": 5.35, "cells": 4}
    eq = ms.minimize(ms.load_system("fcc_argon", positions=cell), pressure=0.0, shape=True)
    np.testing.assert_allclose(np.asarray(eq.system.box), 4 * 5.267140220637 * np.eye(3), atol=1e-8)


def test_the_cell_follows_no_parameter_any_more():
    start = discs(64, 0.9, follows=True)
    assert not isinstance(start.boundary, FixedBox)
    eq = ms.minimize(start, pressure=0.05, tolerance=3e-14)
    assert isinstance(eq.system.boundary, FixedBox)
    # as if the cell had been given
    assert relative(eq.system.box, at_rest("size").system.box) < 1e-9


def test_members_of_a_batch_come_to_rest_each_and_respond_each():
    starts = [discs(64, 0.9, seed) for seed in range(2)]
    alone = [ms.minimize(s, pressure=0.05, tolerance=3e-14) for s in starts]
    batch = ms.minimize(ms.stack(starts), pressure=0.05, tolerance=3e-14)
    dparams = {"epsilon": 1.0, "pressure": 0.3}
    w = np.random.default_rng(0).normal(size=(64, 2))
    for k, (eq, member) in enumerate(zip(alone, ms.unstack(batch), strict=True)):
        np.testing.assert_allclose(
            np.asarray(member.system.box), np.asarray(eq.system.box), rtol=1e-12
        )
        np.testing.assert_allclose(
            ms.jvp(batch, dparams).value.strain[k],
            ms.jvp(eq, dparams).value.strain,
            rtol=1e-6,
            atol=1e-10,
        )
        np.testing.assert_allclose(
            ms.vjp(batch, w).value["pressure"][k],
            ms.vjp(eq, w).value["pressure"],
            rtol=1e-6,
            atol=1e-8,
        )


# ── responding ──


def directions(eq: ms.Equilibrium) -> dict[str, dict[str, Any]]:
    rng = np.random.default_rng(1)
    shape = eq.params["sigma"].shape
    return {
        "sigma": {"sigma": rng.normal(size=shape)},
        "epsilon": {"epsilon": 1.0},
        "pressure": {"pressure": 100.0 * float(eq.pressure)},
        "both": {"sigma": 0.1 * rng.normal(size=shape), "pressure": 0.02},
    }


def slope(f: Any, h: float) -> Any:
    """Central differences at h and h / 2, extrapolated: the error falls as h^4."""
    whole, half = ((f(t) - f(-t)) / (2 * t) for t in (h, 0.5 * h))
    return (4 * half - whole) / 3


def again(eq: ms.Equilibrium, dparams: dict[str, Any], t: float) -> ms.Equilibrium:
    params = {k: eq.params[k] + t * v for k, v in dparams.items() if k != "pressure"}
    pressure = float(eq.pressure) + t * dparams.get("pressure", 0.0)
    return ms.minimize(
        eq.system, params, pressure=pressure, shape=len(eq.strains) > 1, tolerance=3e-14
    )


@pytest.mark.parametrize("kind", quick(KINDS, "size", "shape"))
@pytest.mark.parametrize("which", ["sigma", "epsilon", "pressure", "both"])
def test_responses_are_finite_differences_of_minimizing_again(kind, which):
    eq = at_rest(kind)
    dparams, lin = directions(eq)[which], ms.linearize(at_rest(kind))
    observables = (lambda s: s.volume, fraction, ms.observables.energy)

    def measured(t: float) -> Any:
        there = again(eq, dparams, t).system
        return np.concatenate(
            [
                np.ravel(there.positions),
                np.ravel(np.asarray(there.box)),
                [float(o(there)) for o in observables],
            ]
        )

    n, d = eq.positions.shape
    whole = slope(measured, 1e-5)
    moved, box, wanted = whole[: n * d].reshape(n, d), whole[n * d : -3].reshape(d, d), whole[-3:]
    r = ms.jvp(lin, dparams)
    strain = np.asarray(from_mandel(r.value.strain))
    assert relative(strain @ np.asarray(eq.system.box), box) < 1e-6
    held = ~np.asarray(r.rattlers)
    gap = (moved - np.asarray(r.value.positions))[held]
    gap -= gap.mean(axis=0)  # a translation costs nothing
    assert np.linalg.norm(gap) < 1e-6 * np.linalg.norm(moved[held])
    for observable, want in zip(observables, wanted, strict=True):
        g = ms.gradient(observable, lin).value
        found = sum(float(np.sum(np.asarray(g[k]) * v)) for k, v in dparams.items())
        assert found == pytest.approx(want, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_adjoint_agree_and_the_jacobian_has_the_columns(kind):
    eq = at_rest(kind)
    lin, rng = ms.linearize(eq), np.random.default_rng(5)
    d = eq.system.dimension
    w = Unknowns(
        jnp.asarray(rng.normal(size=eq.positions.shape)),
        jnp.asarray(rng.normal(size=d * (d + 1) // 2)),
    )
    w = dataclasses.replace(w, positions=lin.null.project(w).positions)
    pulled = ms.vjp(lin, w).value
    for dparams in directions(eq).values():
        r = ms.jvp(lin, dparams).value
        # a translation is no response: the adjoint has none of the mean motion that the cell brings
        moved = lin.null.project(Unknowns(r.positions)).positions
        forward = float(jnp.sum(w.positions * moved) + w.strain @ r.strain)
        backward = sum(float(np.sum(np.asarray(pulled[k]) * v)) for k, v in dparams.items())
        assert forward == pytest.approx(backward, rel=1e-9, abs=1e-9)
    jacobian = ms.jacobian(lin, "pressure").value
    one = ms.jvp(lin, {"pressure": 1.0}).value
    np.testing.assert_allclose(jacobian.strain, one.strain, rtol=1e-12)
    np.testing.assert_allclose(jacobian.positions, one.positions, rtol=1e-9, atol=1e-12)


def test_compressibility_is_birchs_bulk_modulus():
    for kind in KINDS:
        eq = at_rest(kind)
        g = float(ms.gradient(lambda s: s.volume, eq).value["pressure"])
        birch = elasticity.mandel(moduli(eq).birch)
        unit = np.concatenate(
            [np.ones(eq.system.dimension), np.zeros(birch.shape[0] - eq.system.dimension)]
        )
        if kind == "shape":  # a cell free in shape is softer: 1 / K = 1:S:1
            bulk = 1.0 / float(unit @ np.linalg.solve(np.asarray(0.5 * (birch + birch.T)), unit))
        else:
            bulk = float(isotropic(moduli(eq).birch).bulk)
        assert -float(eq.system.volume) / g == pytest.approx(bulk, rel=1e-8)
        found = slope(
            lambda t, eq=eq: float(again(eq, {"pressure": 1.0}, t).system.volume),
            2e-4 * float(eq.pressure),
        )
        assert -float(eq.system.volume) / found == pytest.approx(bulk, rel=1e-5)


@pytest.mark.parametrize("kind", quick(["size", "shape"], "shape"))
def test_gradients_of_moduli_at_a_pressure_are_finite_differences(kind):
    eq = at_rest(kind)
    dparams = directions(eq)["both"]

    def features(m: elasticity.Moduli) -> Any:
        return jnp.stack([*isotropic(m.tensor), *isotropic(m.birch), m.tensor[0, 0, 0, 1]])

    g = elasticity.gradient(features, eq).value
    found = sum(
        np.tensordot(np.asarray(g[k]), np.asarray(v, float), axes=np.ndim(v))
        for k, v in dparams.items()
    )
    want = slope(lambda t: np.asarray(features(moduli(again(eq, dparams, t)))), 1e-5)
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-7)


def test_moduli_at_a_pressure_are_those_in_the_same_cell():
    eq = at_rest("size")
    same = dataclasses.replace(eq, pressure=None, strains=None)
    np.testing.assert_array_equal(moduli(eq).tensor, moduli(same).tensor)


# ── what it refuses ──


def test_bad_input_is_refused():
    system = discs(16, 0.9)
    with pytest.raises(ms.InputError, match="pressure is 'high'"):
        ms.minimize(system, pressure="high")  # type: ignore[arg-type]
    with pytest.raises(ms.InputError, match="`pressure` is nan: give a finite number"):
        ms.minimize(system, pressure=np.nan)
    with pytest.raises(ms.InputError, match="`shape` is 1: give True or False"):
        ms.minimize(system, pressure=1.0, shape=1)  # type: ignore[arg-type]
    with pytest.raises(ms.InputError, match="shape=True needs `pressure`"):
        ms.minimize(system, shape=True)
    with pytest.raises(ms.InputError, match=r"pressure has shape \(2,\): give one number"):
        ms.minimize(ms.stack([small(0), small(1)]), pressure=[0.1, 0.2])  # type: ignore[arg-type]
    with pytest.raises(ms.InputError, match="open boundaries: give it a box"):
        ms.minimize(ms.load_system("dimer"), pressure=0.0)
    potential = ms.potentials.from_pair(
        lambda r, pressure: pressure * jnp.maximum(1 - r, 0) ** 3, ("pressure",), 1.0
    )
    named = ms.System.create(
        np.random.default_rng(0).random((8, 2)) * 3, 3.0, potential, {"pressure": 1.0}
    )
    with pytest.raises(ms.InputError, match="the potential has a parameter 'pressure'"):
        ms.minimize(named, pressure=0.1)
    eq = at_rest("size")
    with pytest.raises(ms.InputError, match="'pressure' is no parameter"):
        ms.jvp(relaxed_packing(PACKINGS[0], 0), {"pressure": 1.0})
    with pytest.raises(ms.InputError, match=r"cotangent\.strain has shape \(2,\)"):
        ms.vjp(eq, Unknowns(jnp.zeros((64, 2)), jnp.zeros(2)))
    with pytest.raises(ms.InputError, match="the cell of this minimum is fixed"):
        ms.vjp(relaxed_packing(PACKINGS[0], 0), Unknowns(jnp.zeros((64, 2)), jnp.zeros(3)))


def test_it_is_stored_and_read_again(tmp_path):
    eq = at_rest("shape")
    r = ms.jvp(eq, {"pressure": 1.0})
    for name, result in (("eq", eq), ("r", r)):
        ms.io.save(tmp_path / f"{name}.npz", result)
    found, response = (ms.io.load(tmp_path / f"{name}.npz") for name in ("eq", "r"))
    assert float(found.pressure) == 0.05 and np.array_equal(found.strains, eq.strains)
    assert np.array_equal(response.value.strain, r.value.strain)
    np.testing.assert_array_equal(ms.jvp(found, {"pressure": 1.0}).value.strain, r.value.strain)
