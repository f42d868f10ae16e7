"""A batch is its members: what is relaxed and differentiated together is what each is alone,
whatever becomes of it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LONG

import mdsens as ms
from mdsens._util import batching, memory
from mdsens.implicit import CG
from mdsens.mechanics import rigidity
from mdsens.mechanics.contacts import network
from mdsens.mechanics.hessian_factor import HessianFactor
from mdsens.relaxation import _batch_driver
from mdsens.relaxation._batch_driver import BatchRelaxation
from mdsens.relaxation.methods import Fire, Newton

N = 96
SPECIES = np.arange(N) % 2


def discs(fraction: float, seed: int, epsilon: float = 1.0, spread: float = 1.0) -> ms.System:
    """Half of the discs have 0.6 of the others' diameter;
    ``spread`` is the part of the cell that they start in.
    """
    sigma = np.array([1.0, 0.6])
    side = float(np.sqrt(np.pi / 4 * np.sum(sigma[SPECIES] ** 2) / fraction))
    start = spread * side * np.random.default_rng(seed).random((N, 2))
    params = {"sigma": sigma, "epsilon": epsilon, "alpha": 2.0}
    return ms.System.create(start, side, ms.potentials.soft_sphere(), params, species=SPECIES)


@functools.cache
def members() -> tuple[ms.System, ...]:
    """Jammed, near jamming, stiff, unjammed, and one whose list is soon too short."""
    kinds = [(0.95, 0), (0.86, 1), (0.95, 2, 8.0), (0.5, 3), (0.95, 4), (0.9, 5), (0.95, 6)]
    return tuple(ms.unstack(ms.stack([discs(*kind) for kind in kinds])))


def crowded(system: ms.System) -> ms.System:
    """The same list, the particles in a third of the cell:
    there are more near by than the list has room for.
    """
    return system.replace(positions=0.33 * system.positions)


@functools.cache
def alone(k: int) -> ms.Equilibrium:
    return ms.minimize(starts()[k], throw=False)


@functools.cache
def starts() -> tuple[ms.System, ...]:
    some = list(members())
    some[4] = crowded(some[4])
    return tuple(some)


@functools.cache
def relaxed() -> ms.Equilibrium:
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "PARTICLES", 2 * N)  # two at a time, and a last one with a stand-in
        return ms.minimize(batch, throw=False)


def test_members_end_where_they_end_alone():
    eq = relaxed()
    assert not np.any(eq.system.neighbors.overflowed)
    for k, member in enumerate(ms.unstack(eq)):
        want = alone(k)
        assert ms.Status(int(member.status)) is ms.Status(int(want.status))
        assert float(member.max_force) <= max(float(eq.tolerance[k]), float(eq.force_floor[k]))
        # another program, another round-off
        assert int(member.steps) == pytest.approx(int(want.steps), rel=0.02)
        np.testing.assert_allclose(member.positions, want.positions, rtol=0, atol=1e-8)


def test_the_starts_are_what_they_are_meant_to_be():
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts())
    runs = BatchRelaxation(batch, Fire(), 1e-12, 200_000, len(starts()) - 1)
    runs.advance(runs.tested, 200)
    lost = np.asarray(runs.systems.neighbors.overflowed)
    assert lost[4] and not np.any(np.delete(lost, 4))
    # it does not count
    assert runs.steps[-1] == 0 and np.array_equal(runs.systems.positions[-1], batch.positions[-1])
    assert 4 in runs.on_their_own(False)
    assert bool(np.all(ms.linearize(alone(3), throw=False).network.rattlers))


@pytest.mark.parametrize("solve", [None, CG()])
@pytest.mark.parametrize("door", ["jvp", "vjp", "response", "gradient", "jacobian"])
def test_doors_answer_for_each_member(door, solve):
    eq = relaxed()
    rng = np.random.default_rng(0)
    own = {"sigma": rng.normal(size=(len(starts()), 2))}
    forces = rng.normal(size=eq.positions.shape)
    calls = {
        "jvp": lambda at, k: ms.jvp(
            at, own if k is None else {"sigma": own["sigma"][k]}, solve=solve, throw=False
        ),
        "vjp": lambda at, k: ms.vjp(
            at, forces if k is None else forces[k], solve=solve, throw=False
        ),
        "response": lambda at, k: ms.response(
            at, forces if k is None else forces[k], solve=solve, throw=False
        ),
        "gradient": lambda at, k: ms.gradient(
            ms.observables.pressure, at, solve=solve, throw=False
        ),
        "jacobian": lambda at, k: ms.jacobian(at, "sigma", solve=solve, throw=False),
    }
    whole = calls[door](eq, None)
    for k, member in enumerate(ms.unstack(eq)):
        want = calls[door](member, k)
        assert np.array_equal(whole.stats.status[k], want.stats.status)
        assert np.array_equal(whole.rattlers[k], want.rattlers)
        if ms.Status(int(np.max(want.stats.status))).good:
            assert np.all(np.asarray(whole.stats.residual[k]) < 1e-9)
            scale = max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(want.value))
            for ours, theirs in zip(
                jax.tree.leaves(whole.value), jax.tree.leaves(want.value), strict=True
            ):
                np.testing.assert_allclose(
                    ours[k], theirs, rtol=0, atol=1e-6 * scale if solve else 1e-10 * scale
                )
    codes = {ms.Status(int(code)) for code in np.asarray(whole.stats.status).ravel()}
    assert ms.Status.UNJAMMED in codes and {True, False} == {code.good for code in codes}


def test_jacobians_that_do_not_fit_are_refused_before_they_are_made(monkeypatch):
    one = 2 * 2 * 96 * 2 * 8  # its non-affine part as well
    monkeypatch.setattr(memory, "available_memory", lambda: 6.5 * one)
    assert ms.jacobian(ms.unstack(relaxed())[0], "sigma", throw=False).value.shape == (N, 2, 2)
    with pytest.raises(
        ms.TooLargeError, match=r"jacobian by 2 components of sigma of 7 systems, .* take ms.vjp"
    ):
        ms.jacobian(relaxed(), "sigma", throw=False)


def test_one_change_serves_all_members():
    eq = relaxed()
    change = np.array([0.0, 1.0])
    shared = ms.jvp(eq, {"sigma": change}, throw=False)
    each = ms.jvp(eq, {"sigma": np.tile(change, (len(starts()), 1))}, throw=False)
    assert np.array_equal(shared.value, each.value, equal_nan=True)
    with pytest.raises(ms.InputError, match=r"has shape \(3,\)"):
        ms.jvp(eq, {"sigma": np.ones(3)})
    with pytest.raises(ms.InputError, match="cotangent has shape"):
        ms.vjp(eq, np.ones((N, 3)))


def test_a_member_that_is_no_number_spoils_no_other():
    eq = relaxed()
    bad = eq.positions.at[1, 0, 0].set(jnp.nan)
    spoilt = dataclasses.replace(
        eq,
        system=eq.system.replace(positions=bad),
        code=eq.status.at[1].set(ms.Status.NOT_FINITE.value),
    )
    got, want = (ms.jvp(at, {"sigma": np.array([0.0, 1.0])}, throw=False) for at in (spoilt, eq))
    assert not ms.Status(int(got.stats.status[1])).good
    np.testing.assert_allclose(got.value[0], want.value[0], rtol=1e-9, atol=1e-9)
    start = eq.system.replace(positions=bad)
    again = ms.minimize(start, throw=False)
    assert ms.Status(int(again.status[1])) is ms.Status.NOT_FINITE
    assert all(ms.Status(int(code)).good for code in np.delete(np.asarray(again.status), 1))


def test_parameters_for_a_batch_are_for_each_member():
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members()[:2])
    eq = ms.minimize(batch, {"epsilon": 3.0}, method=Fire())
    assert np.array_equal(eq.params["epsilon"], [3.0, 3.0])
    np.testing.assert_allclose(
        eq.positions[0],
        ms.minimize(members()[0], {"epsilon": 3.0}, method=Fire()).positions,
        atol=1e-8,
    )


def row(off: float) -> ms.System:
    """Three Lennard-Jones particles, the middle one off the line of the others, a saddle."""
    places = 2 ** (1 / 6) * np.array([[0.0, 0.0], [1.0, off], [2.0, 0.0]])
    return ms.System.create(
        places, None, ms.potentials.lennard_jones(), {"sigma": 1.0, "epsilon": 1.0}
    )


@LONG
def test_saddles_of_members_are_left():
    batch = ms.stack([row(0.0), row(0.3), row(0.0)])
    straight = ms.minimize(batch, method=Fire(), leave_saddles=False)
    backbone, _, null = rigidity.analyze_rigidity(straight.system, straight.max_force)
    assert list(HessianFactor(backbone, null.simplified()).negative) == [1, 0, 1]
    eq = ms.minimize(batch, method=Newton())
    np.testing.assert_allclose(jax.vmap(ms.observables.energy)(eq.system), -3.0, atol=1e-9)
    status = ms.jvp(straight, {"sigma": 1.0}, throw=False).stats.status
    assert [ms.Status(int(code)).good for code in status] == [False, True, False]


def forget(function: Any) -> None:
    """Forget the programs that a function of the package was compiled to."""
    for version in function.versions:
        version.clear_cache()


def test_members_at_once_are_members_one_after_the_other(monkeypatch):
    """Off a CPU the members of a chunk step side by side; those done stay where they are."""
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members()[:3])
    want = ms.minimize(batch, method=Fire())
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        patch.delattr(jax.lax, "map")  # what a CPU takes
        forget(_batch_driver._advance_each)
        eq = ms.minimize(batch, method=Fire())
    forget(_batch_driver._advance_each)
    assert np.all(eq.max_force <= np.maximum(eq.tolerance, eq.force_floor)) and np.all(
        eq.force_floor < 1e-12
    )
    # rattlers rest anywhere
    held = ~np.stack([network(m, 1e-12).rattlers for m in ms.unstack(want.system)])
    assert 0.9 < held.mean() < 1.0
    for k in range(3):  # but for a drift of all particles, which no force opposes
        moved = np.asarray(eq.positions[k] - want.positions[k])[held[k]]
        np.testing.assert_allclose(
            moved, np.broadcast_to(moved.mean(axis=0), moved.shape), rtol=0, atol=1e-8
        )
