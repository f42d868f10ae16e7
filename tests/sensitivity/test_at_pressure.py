"""Certificates and checks of minima at a pressure:
against dense truth, and against minimizing again there.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from conftest import quick

import mdsens as ms
from mdsens.elasticity import isotropic, moduli
from mdsens.mechanics.contacts import network
from mdsens.mechanics.hessian import max_force
from mdsens.mechanics.hessian_factor import HessianFactor
from mdsens.mechanics.strain import basis, from_mandel, to_mandel
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.box import FixedBox
from mdsens.model.system import potential_energy
from mdsens.sensitivity.certificate.solution_space import Space
from mdsens.sensitivity.derivatives import Linearization

KINDS = ("size", "shape")
PRESSURE = 0.05


@cache
def discs() -> ms.System:
    rng = np.random.default_rng(0)
    params = {"sigma": np.linspace(0.8, 1.2, 32), "epsilon": 1.0, "alpha": 2.0}
    return ms.System.create(5.3 * rng.random((32, 2)), 5.3, ms.potentials.soft_sphere(), params)


@cache
def at_rest(kind: str) -> ms.Equilibrium:
    return ms.minimize(discs(), pressure=PRESSURE, shape=kind == "shape")


@cache
def linearized(kind: str) -> Linearization:
    return ms.linearize(at_rest(kind))


DIRECTION: dict[str, Any] = {"sigma": np.linspace(-1.0, 1.0, 32), "pressure": 0.5}


@cache
def certificate(kind: str) -> ms.Certificate:
    return ms.certify(linearized(kind), DIRECTION)


def again(
    eq: ms.Equilibrium, dparams: dict[str, Any], t: float, tolerance: float = 1e-12
) -> ms.Equilibrium:
    params = {k: eq.params[k] + t * v for k, v in dparams.items() if k != "pressure"}
    pressure = float(eq.pressure) + t * dparams.get("pressure", 0.0)
    return ms.minimize(
        eq.system, params, pressure=pressure, shape=len(eq.strains) > 1, tolerance=tolerance
    )


# ── the certificate ──


@jax.jit
def joint_hessian(system: ms.System) -> jax.Array:
    """Of the enthalpy by positions and by every strain, dense."""
    size = system.positions.size

    def enthalpy(x: jax.Array) -> jax.Array:
        strain = jnp.tensordot(x[size:], basis(2), axes=1)
        volume = system.volume * jnp.linalg.det(jnp.eye(2) + strain)
        return potential_energy(system, x[:size].reshape(-1, 2), strain=strain) + PRESSURE * volume

    return jax.hessian(enthalpy)(jnp.concatenate([system.positions.ravel(), jnp.zeros(3)]))


def test_the_energy_has_a_slope_by_the_strain_alone():
    """At a pressure, -P V: the forces on the particles are round-off,
    and no part of the gradient worth a warning.
    """
    g = ms.gradient(ms.observables.energy, linearized("shape"))
    assert g.status is ms.Status.CONVERGED and float(g.stats.dropped) < 1e-8


@pytest.mark.parametrize("kind", quick(KINDS, "shape"))
def test_the_figures_are_those_of_the_dense_joint_hessian(kind):
    eq, c, lin = at_rest(kind), certificate(kind), linearized(kind)
    system, size = eq.system, eq.positions.size
    free = np.eye(3) if kind == "shape" else np.array([[1.0], [1.0], [0.0]]) / 2**0.5
    k = free.shape[1]
    keep = scipy.linalg.block_diag(np.eye(size), free)
    joint = keep.T @ np.asarray(joint_hessian(system.replace(boundary=FixedBox(system.box)))) @ keep
    length = float(np.sqrt(system.n / 12) * system.volume**0.5)
    particles, coupling = joint[:size, :size], joint[:size, size:]
    relaxed = (
        joint[size:, size:]
        - coupling.T @ np.linalg.pinv(particles, rcond=1e-10, hermitian=True) @ coupling
    )
    assert c.cell is not None and c.cell.stable
    held = kind == "size"  # this packing would shear away at its pressure
    assert c.status is (ms.Status.SHAPE_HELD if held else ms.Status.CONVERGED)
    assert (
        c.strain is not None and c.strain.smallest == pytest.approx(float(moduli(eq).stability))
    ) is held
    np.testing.assert_allclose(
        c.cell.stiffness, np.linalg.eigvalsh(relaxed) / float(system.volume), rtol=1e-9
    )
    assert c.stiffness_min == pytest.approx(np.linalg.eigvalsh(particles)[2], rel=1e-9)
    # both are positive, and so is the whole
    assert (np.linalg.eigvalsh(joint) > 1e-10).sum() == size + k - 2
    # what a strain counts for: the bound of the smallest stiffness
    # of both together, and |F| over it
    weight = np.concatenate([np.ones(size), np.full(k, length)])
    least = np.linalg.eigvalsh(joint / np.outer(weight, weight))[2]
    assert (
        0.5 * least
        <= Space(lin, HessianFactor(lin.system, lin.null)).least(c.stiffness_min)
        <= least
    )
    if kind == "size":
        assert c.cell.stiffness_min == pytest.approx(
            2 * float(isotropic(moduli(eq).birch).bulk), rel=1e-9
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_radius_is_where_a_contact_changes(kind):
    eq, c = at_rest(kind), certificate(kind)
    d = c.derivative
    assert d is not None and not d.vanishes and c.error < 1e-8
    r = ms.jvp(linearized(kind), DIRECTION).value
    np.testing.assert_allclose(d.positions, r.positions, atol=1e-10 * d.norm)
    np.testing.assert_allclose(d.response.strain, r.strain, atol=1e-10 * d.norm)
    side = 1.0 if d.forward < d.backward else -1.0
    first = d.crossing.first(side > 0)
    assert first is not None

    def pairs(t: float) -> int:
        there = again(eq, DIRECTION, side * t)
        return int(network(there.system, there.max_force).pairs)

    here, low, high = pairs(0.0), 0.0, 2.0 * c.radius
    assert pairs(high) != here
    for _ in range(5):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if pairs(middle) == here else (low, middle)
    assert pairs(high) == here + (-1 if first[1] else 1)
    share = 0.01 + c.radius / d.curvature_scale  # what first order leaves out of it
    assert (1 - share) * c.radius <= high and low <= (1 + share) * c.radius


@pytest.mark.parametrize("kind", KINDS)
def test_the_sharp_estimate_is_the_error_and_the_correction_takes_it_off(kind):
    late, cell = at_rest(kind), np.asarray(at_rest(kind).system.box)
    rng = np.random.default_rng(3)
    strain = 1e-6 * (np.eye(2) if kind == "size" else np.array([[1.0, 0.5], [0.5, -0.3]]))
    moved = late.positions + 1e-6 * rng.normal(size=late.positions.shape)
    box = FixedBox(jnp.asarray(cell + strain @ cell))
    system = late.system.replace(positions=moved + moved @ strain.T, boundary=box)
    early = dataclasses.replace(late, system=system, max_force=max_force(system))
    c, lin = ms.certify(early, DIRECTION), linearized(kind)
    d, told = c.derivative, c.cell
    assert d is not None and told is not None and c.crossed_to_minimum == 0
    # what both hold of the way between them: from the affine places, and of the cell
    box = np.asarray(early.system.box)
    back = np.asarray(late.system.box) @ np.linalg.inv(box)
    off = np.linalg.solve(back, np.asarray(late.positions).T).T - np.asarray(early.positions)
    length = np.sqrt(32 / 12) * float(early.system.volume) ** 0.5
    way = np.hypot(
        np.linalg.norm(off - off.mean(axis=0)), length * np.linalg.norm(back - np.eye(2))
    )
    assert c.newton_step_norm == pytest.approx(way, rel=1e-3) and way <= 1.001 * c.distance
    assert told.strain == pytest.approx(np.linalg.norm(strain), rel=1e-3)
    stress = ms.observables.stress(early.system)
    assert told.pressure_left == pytest.approx(-float(jnp.trace(stress)) / 2 - PRESSURE, rel=1e-9)

    def parts(r: Unknowns, at: ms.Equilibrium) -> np.ndarray:
        """A response as it counts: motion from the affine places,
        without translation, and the strain.
        """
        strain = np.asarray(from_mandel(jnp.asarray(r.strain)))
        rest = np.asarray(r.positions) - np.asarray(at.positions) @ strain.T
        return np.concatenate([np.ravel(rest - rest.mean(axis=0)), length * np.asarray(r.strain)])

    true = parts(ms.jvp(lin, DIRECTION).value, late)
    size = np.linalg.norm(true)
    error = np.linalg.norm(parts(d.response, early) - true) / size
    assert d.norm == pytest.approx(size, rel=1e-3)
    assert error / 2 < c.error < 2 * error < c.bound
    assert np.linalg.norm(parts(d.corrected, early) - true) / size < 0.1 * error


def test_it_says_what_the_cell_is_and_is_json():
    for kind, said in (("size", "against a change of its size"), ("shape", "the smallest of 3")):
        page = " ".join(str(certificate(kind)).split())
        assert (
            "stiffness of the cell" in page
            and said in page
            and "the pressure is off 0.05 by" in page
        )
    stored = json.loads(json.dumps(certificate("shape").as_dict(), allow_nan=False))
    assert stored["cell"]["stable"] and stored["derivative"]["dparams"]["pressure"] == 0.5
    assert certificate("size").as_dict()["cell"]["shear_left"] is None


def test_a_cell_that_would_not_stay_is_told():
    # free to change its size alone; under a shape that is free too, it may shear
    eq = at_rest("size")
    lin = linearized("size")
    assert lin.cell is not None
    cell = dataclasses.replace(
        lin.cell,
        stiffness=-lin.cell.stiffness,
        status=jnp.asarray(ms.Status.INDEFINITE.value, jnp.int32),
    )
    structure = dataclasses.replace(lin.structure, cell=cell)  # type: ignore[call-arg]
    c = ms.certify(dataclasses.replace(lin, structure=structure), {"pressure": 1.0})
    assert c.status is ms.Status.INDEFINITE and "of the cell at this pressure" in c.findings[0][1]
    assert c.error == np.inf and c.distance == np.inf and c.negative_modes == 0
    assert ms.certify(dataclasses.replace(eq, pressure=None, strains=None)).cell is None


def test_what_did_not_come_to_rest_is_examined_too():
    eq = ms.minimize(discs(), pressure=-0.1, throw=False)
    c = ms.certify(eq, {"pressure": 1.0})
    assert c.status is ms.Status.NO_REST and not c.status.good


# ── minimizing again ──


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dparams", [{"pressure": 1.0}, DIRECTION], ids=["pressure", "both"])
def test_finite_differences_are_the_response(kind, dparams):
    eq = at_rest(kind)
    r = ms.jvp(linearized(kind), dparams)
    v = ms.verify.finite_difference(eq, dparams)
    assert v.status.good and not v.network_changed and v.disagreement(r.value) < 1e-6
    assert v.radius == pytest.approx(ms.certify(linearized(kind), dparams).radius, rel=1e-9)
    off = dataclasses.replace(r.value, strain=1.01 * r.value.strain)
    # a wrong cell is seen beside right positions
    assert v.disagreement(off) == pytest.approx(0.01, rel=1e-3)
    assert "of its strain" in str(v)


@pytest.mark.parametrize("kind", quick(KINDS, "shape"))
def test_moduli_at_a_pressure_forward_are_their_gradient_and_minimizing_again(kind):
    eq, h = at_rest(kind), 3e-6

    def features(m: ms.elasticity.Moduli) -> jax.Array:
        return jnp.stack([m.poisson, m.bulk, m.tensor[0, 0, 0, 1]])

    forward = ms.elasticity.jvp(features, linearized(kind), DIRECTION).value
    slopes = ms.elasticity.gradient(features, linearized(kind)).value
    reverse = slopes["sigma"] @ DIRECTION["sigma"] + slopes["pressure"] * DIRECTION["pressure"]
    assert np.abs(forward - reverse).max() < 1e-9 * np.abs(reverse).max()
    ends = [features(ms.elasticity.moduli(again(eq, DIRECTION, t, 1e-14))) for t in (h, -h)]
    assert np.abs(forward - (ends[0] - ends[1]) / (2 * h)).max() < 1e-6 * np.abs(forward).max()


def test_a_derivative_test_falls_to_its_foot_and_shows_a_wrong_derivative():
    eq, steps = at_rest("shape"), np.geomspace(1e-6, 1e-4, 3)
    right = ms.verify.derivative_test(eq, DIRECTION, steps)
    assert right.status.good and right.best < 1e-6
    r = ms.jvp(linearized("shape"), DIRECTION).value
    held = Unknowns(r.positions, jnp.zeros(3))
    assert ms.verify.derivative_test(eq, DIRECTION, steps[:1], value=held).best > 0.5
    with pytest.raises(ms.InputError, match="`value` has no strain"):
        ms.verify.derivative_test(eq, DIRECTION, steps, value=r.positions)
    with pytest.raises(
        ms.InputError, match=r"`value.strain` has shape \(2,\).*give the derivative of the strain"
    ):
        ms.verify.derivative_test(eq, DIRECTION, steps, value=Unknowns(r.positions, jnp.zeros(2)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_adjoint_is_the_transpose(kind):
    lin = linearized(kind)
    w = jnp.asarray(np.random.default_rng(2).normal(size=(32, 2)))
    for dparams, cotangent in (
        (None, None),
        ({"pressure": 1.0}, w),
        (DIRECTION, Unknowns(w, to_mandel(jnp.eye(2)))),
    ):
        found = ms.verify.adjoint(lin, dparams, cotangent)
        assert found.gap < 1e-9 and found.status.good
