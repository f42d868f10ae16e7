"""Every function on every potential of the catalogue, in small systems, against dense matrices, and
against minimizing again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick, relative
from dense import Dense
from small_systems import SMALL, minimum

import mdsens as ms


@pytest.fixture(scope="module", params=quick(SMALL, "harmonic_bonds"))
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of a potential: all tests of one follow each other, and leave no compiled code behind."""
    yield request.param
    for cached in (minimum, dense_of, direction, moved):
        cached.cache_clear()
    jax.clear_caches()


@cache
def dense_of(name: str) -> Dense:
    return Dense(minimum(name).system)


@cache
def direction(name: str) -> dict[str, np.ndarray]:
    """A change of every parameter, about a tenth of it; tables as symmetric as they are."""
    random = np.random.default_rng(2)
    change = {}
    for key, value in minimum(name).params.items():
        off = random.uniform(-0.1, 0.1, value.shape)
        if value.ndim == 2 and np.array_equal(value, value.T):
            off = 0.5 * (off + off.T)
        change[key] = np.asarray(value) * off + (0.1 if not np.any(value) else 0.0)
    return change


@cache
def moved(name: str) -> np.ndarray:
    return dense_of(name).pushed(direction(name))


def weights(name: str) -> np.ndarray:
    """Of the positions, without translations and rotations."""
    here = dense_of(name)
    w = np.random.default_rng(4).normal(size=here.system.positions.shape).ravel()
    return (w - here.null @ (here.null.T @ w)).reshape(here.system.positions.shape)


def dotted(gradient: dict[str, Any], change: dict[str, Any]) -> float:
    return float(sum(np.sum(np.asarray(gradient[k]) * v) for k, v in change.items()))


def spread(system: ms.System) -> jax.Array:
    """A function of positions and parameters that is not stationary at a minimum."""
    first = jax.tree.leaves(system.params)[0]
    arms = system.positions - jnp.mean(system.positions, axis=0)
    return jnp.sum(first) * jnp.sum(jnp.sum(arms**2, axis=1) ** 2)


def observable(system: ms.System) -> Any:
    return ms.observables.pressure if system.has_volume else spread


def test_minimum_and_certificate(name: str) -> None:
    eq, here = minimum(name), dense_of(name)
    assert ms.Status(int(eq.status)).good
    # a strict minimum, of which the motions of a rigid body are the null space
    assert here.values.min() > 1e-6 * here.values.max()
    assert np.abs(here.hessian @ here.null).max() < 1e-10 * here.values.max()
    certificate = ms.certify(eq, direction(name))
    assert certificate.status.good
    assert certificate.zero_modes == here.null.shape[1]
    assert certificate.stiffness_min == pytest.approx(here.values[0], rel=1e-8)
    assert certificate.stiffness_max == pytest.approx(here.values[-1], rel=1e-2)
    assert certificate.derivative is not None and certificate.derivative.radius > 0
    assert certificate.derivative.error < 1e-8


def test_forward_reverse_and_jacobian(name: str) -> None:
    eq, here, change = minimum(name), dense_of(name), direction(name)
    lin = ms.linearize(eq)
    expected = moved(name)
    assert np.abs(expected).max() > 1e-3
    assert relative(ms.jvp(lin, change).value, expected) < 1e-9
    w = weights(name)
    value = ms.vjp(lin, w).value
    for key, of in here.pulled(w).items():
        _same_symmetric(value[key], of, 1e-8 * max(np.abs(of).max(), 1e-3))
    key = SMALL[name].free
    jacobian = here.jacobian(key)
    _same_symmetric(ms.jacobian(lin, key).value, jacobian, 1e-8 * np.abs(jacobian).max(), axes=2)
    found = ms.gradient(observable(eq.system), lin).value
    for key, of in here.gradient(observable(eq.system)).items():
        _same_symmetric(found[key], of, 1e-8 * max(np.abs(of).max(), 1e-3))
    assert ms.verify.adjoint(lin, change).gap < 1e-9


def _same_symmetric(value: Any, expected: Any, tolerance: float, axes: int = 0) -> None:
    """Equal, or equal in the symmetric part where the parameter is one matrix of pairs."""
    value, expected = np.asarray(value), np.asarray(expected)
    if value.ndim == axes + 2 and not np.allclose(value, expected, rtol=0.0, atol=tolerance):
        expected = 0.5 * (expected + expected.swapaxes(-1, -2))
    np.testing.assert_allclose(value, expected, rtol=0.0, atol=tolerance)


def test_moduli_and_modes(name: str) -> None:
    eq, here, change = minimum(name), dense_of(name), direction(name)
    (_, tensor), (turned, slope) = here.along(change, moved(name))
    modes = ms.modes.smallest_stiffness(eq)
    count = len(modes.values)
    np.testing.assert_allclose(modes.values, here.values[:count], rtol=1e-8)
    v = here.vectors[:, :count]
    expected = np.trace(v.T @ np.asarray(turned) @ v) / count
    found = dotted(ms.modes.gradient(eq).value, change)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-8 * here.values[0])
    if not eq.system.has_volume:
        with pytest.raises(ms.InputError):
            ms.elasticity.moduli(eq)
        return
    moduli = ms.elasticity.moduli(eq, throw=False)
    size = np.abs(tensor).max()
    np.testing.assert_allclose(moduli.tensor, tensor, atol=1e-9 * size)
    pushed = ms.elasticity.jvp(lambda m: m.tensor, eq, change, throw=False).value
    np.testing.assert_allclose(pushed, slope, atol=1e-7 * np.abs(slope).max())
    d = eq.system.dimension
    bulk = np.einsum("iijj->", slope) / d**2
    pulled = ms.elasticity.gradient(lambda m: m.bulk, eq, throw=False).value
    assert dotted(pulled, change) == pytest.approx(bulk, rel=1e-7, abs=1e-8 * size)


def test_minimizing_again(name: str) -> None:
    eq = minimum(name)
    differences = ms.verify.finite_difference(eq, direction(name))
    assert differences.disagreement(moved(name)) < 1e-6


def test_the_potential_passes_its_checks(name: str) -> None:
    system = SMALL[name].make()
    result = ms.verify.potential(
        system.potential,
        system.params,
        positions=system.positions,
        box=system.box if system.has_volume else None,
        species=system.species,
    )
    assert all(finding.good for finding in result.findings), str(result)


def test_pinned_atoms(name: str) -> None:
    system = minimum(name).system
    n, d = system.positions.shape
    pins = ms.constraints.Pinned.particles([0, n // 2, n - 1], n, d)
    pinned = ms.System.create(
        system.positions + 0.02 * weights(name),
        system.box,
        system.potential,
        system.params,
        system.species,
        constraints=pins,
        periodic=system.periodic if system.box is not None else True,
    )
    held = ms.minimize(pinned)
    free = np.flatnonzero(~np.asarray(pins.mask).ravel())
    expected = Dense(held.system).pushed(direction(name), free)
    assert relative(ms.jvp(held, direction(name)).positions, expected) < 1e-8


# whose energy has no saddle near, as far as the search goes
NO_SADDLE = ("harmonic_bonds",)
# Longer steps jump over the saddle, to where the stiffness jumps at Tersoff's cutoffs.
SHORT_STEPS = {"tersoff of two species": ms.saddles.EigenvectorFollowing(max_step=0.01)}


def test_saddle_and_barrier(name: str) -> None:
    eq = minimum(name)
    method = SHORT_STEPS.get(name, ms.saddles.EigenvectorFollowing())
    saddle = ms.find_saddle(eq, method=method, throw=False)
    status = ms.Status(int(saddle.status))
    assert status.good == (name not in NO_SADDLE), status
    if name in NO_SADDLE:
        return
    here = Dense(saddle.system)
    assert np.abs(here.slope).max() < 1e-9 * here.values.max()
    assert np.sum(here.values < 0) == 1
    barrier = ms.barrier(eq, saddle, direction(name))
    top, bottom = (ms.observables.energy(x.system) for x in (saddle, eq))
    assert barrier.value == pytest.approx(float(top - bottom), rel=1e-9)
    assert barrier.value > 0
    of_top, of_bottom = (dense.gradient(ms.observables.energy) for dense in (here, dense_of(name)))
    for key, value in barrier.gradient.items():
        _same_symmetric(value, of_top[key] - of_bottom[key], 1e-8 * np.abs(of_top[key]).max())


def test_two_steps_of_a_design(name: str) -> None:
    """Towards a pressure, or another number, two percent away."""
    eq = minimum(name)
    target = observable(eq.system)
    now = float(target(eq.system))
    wanted = ms.design.Target(target, 1.02 * now, 1e-4 * abs(now))
    design = ms.design.fit(wanted, eq.system, free=[SMALL[name].free], steps=3)
    assert design.status.good
    assert float(target(design.equilibrium.system)) == pytest.approx(1.02 * now, rel=1e-4)
