"""Ctrl-C ends a relaxation at the last complete state: in FIRE, in Newton steps, with the cell,
in a batch, under constraints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest

import mdsens as ms
from mdsens import cli
from mdsens._util.errors import InterruptionError
from mdsens.mechanics.hessian import max_force
from mdsens.mechanics.status import Status
from mdsens.model.system import potential_energy
from mdsens.relaxation import _augmented_lagrangian, _batch_driver, _driver, newton


def packing(seed: int = 0, n: int = 40) -> ms.System:
    """Discs from a random start."""
    sigma = np.where(np.arange(n) % 2, 1.0, 1.4)
    length = float(np.sqrt(np.pi / 4 * np.sum(sigma**2) / 0.95))
    places = length * np.random.default_rng(seed).random((n, 2))
    params = {"sigma": sigma, "epsilon": 1.0, "alpha": 2.0}
    return ms.System.create(places, length, ms.potentials.soft_sphere(), params)


def after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which is interrupted in place of its next call after some."""
    count = 0

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == calls + 1:
            raise KeyboardInterrupt
        return function(*args, **options)

    return interrupted


def energy(system: ms.System) -> float:
    return float(potential_energy(system))


def check_goes_on(start: ms.System, eq: ms.Equilibrium) -> None:
    """The state has its own force and status, and a relaxation from it ends well."""
    assert Status(int(eq.status)) is Status.INTERRUPTED and not Status.INTERRUPTED.good
    assert float(eq.max_force) == pytest.approx(float(max_force(eq.system)), rel=1e-12)
    assert 0 < energy(eq.system) < energy(start)
    assert "ms.minimize(eq.system)" in repr(eq)
    assert Status(int(ms.minimize(eq.system, progress=False).status)).good


def test_fire_ends_at_the_state_after_its_last_call():
    start = packing()
    fast = mock.patch.object(_driver, "STEPS_PER_CALL", 20)
    with fast, mock.patch.object(_driver, "_advance", after(3, _driver._advance)):
        eq = ms.minimize(start, throw=False, progress=False)
    assert int(eq.steps) == 60
    check_goes_on(start, eq)


def test_newton_steps_end_at_the_state_after_the_last_of_them():
    start = packing()
    method = ms.relaxation.Newton(begin=1e-2, patience=50)
    with (
        mock.patch.object(_driver, "WORTH", 0),
        mock.patch.object(_driver, "WATCHED", 20),
        mock.patch.object(newton, "_accepted_step", after(1, newton._accepted_step)),
    ):
        eq = ms.minimize(start, method=method, throw=False, progress=False)
    check_goes_on(start, eq)


def test_an_error_is_raised_that_has_the_state_and_stops_like_ctrl_c():
    stopped = mock.patch.object(_driver, "_advance", after(0, _driver._advance))
    with stopped, pytest.raises(KeyboardInterrupt, match="interrupted") as caught:
        ms.minimize(packing(), progress=False)
    assert isinstance(caught.value, InterruptionError) and isinstance(
        caught.value, ms.ConvergenceError
    )
    assert caught.value.status is Status.INTERRUPTED
    assert np.array_equal(caught.value.result.positions, packing().positions)  # not one step


@pytest.mark.parametrize("relaxations", [0, 2])
def test_a_cell_ends_at_the_last_that_it_kept(relaxations):
    start, kept = packing(), []
    whole = _driver.RelaxationState.to_minimum

    def stopped(run: Any, *args: Any) -> None:
        if len(kept) == relaxations:
            raise KeyboardInterrupt
        whole(run, *args)
        kept.append(run.system)

    with mock.patch.object(_driver.RelaxationState, "to_minimum", stopped):
        eq = ms.minimize(start, pressure=0.1, throw=False, progress=False)
    assert Status(int(eq.status)) is Status.INTERRUPTED and float(eq.pressure) == 0.1
    last = kept[-1] if kept else start
    assert np.array_equal(eq.positions, last.positions)
    assert np.array_equal(np.asarray(eq.system.box), np.asarray(last.box))
    assert eq.strains is not None
    assert Status(int(ms.minimize(eq.system, pressure=0.1, progress=False).status)).good


def test_a_batch_keeps_what_has_relaxed_and_says_which_have_not():
    starts = [packing(seed) for seed in range(3)]
    calls = after(1, _batch_driver._advance_each)
    with (
        mock.patch.object(_batch_driver, "_advance_each", calls),
        mock.patch("os.cpu_count", lambda: 1),
    ):
        eq = ms.minimize(ms.stack(starts), throw=False, progress=False)
    codes = [Status(int(code)) for code in np.asarray(eq.status)]
    assert Status.INTERRUPTED in codes
    for code, member, start in zip(codes, ms.unstack(eq), starts, strict=True):
        assert code is Status.INTERRUPTED or code.good
        assert float(member.max_force) == pytest.approx(float(max_force(member.system)), abs=1e-14)
        assert energy(member.system) < energy(start)
    again = ms.minimize(eq.system, progress=False)
    assert all(Status(int(code)).good for code in np.asarray(again.status))


def test_the_members_after_an_interrupted_one_stay_where_they_are():
    starts = [packing(seed) for seed in range(3)]
    calls = after(1, _driver._advance)
    with mock.patch.object(_driver, "_advance", calls):
        eq = ms.minimize(ms.stack(starts), pressure=0.1, throw=False, progress=False)
    assert [Status(int(code)) for code in np.asarray(eq.status)] == 3 * [Status.INTERRUPTED]
    for member, start in list(zip(ms.unstack(eq), starts, strict=True))[1:]:
        assert np.array_equal(member.positions, start.positions)


def test_under_constraints_the_state_is_the_last_one():
    start = packing()
    pinned = start.replace(constraints=(ms.constraints.Pinned.particles([0], 40, 2),))
    relaxation = _augmented_lagrangian._Relaxation
    with mock.patch.object(relaxation, "newton", after(0, relaxation.newton)):
        eq = ms.minimize(pinned, throw=False, progress=False)
    assert Status(int(eq.status)) is Status.INTERRUPTED
    assert energy(eq.system) < energy(start)
    assert Status(int(ms.minimize(eq.system, progress=False).status)).good


def test_the_command_line_exits_with_130(capsys: pytest.CaptureFixture[str]):
    with mock.patch.object(_driver, "_advance", after(0, _driver._advance)):
        assert cli.main(["relax", "seed_packing_2d"]) == 130
