"""Unrolled derivatives: closed forms, the implicit answer, what reverse mode takes;
and where they mislead.
"""

from __future__ import annotations

import os
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LONG

import mdsens as ms
from mdsens._util import memory
from mdsens.mechanics.units import natural_units
from mdsens.relaxation.methods import Fire, GradientDescent
from mdsens.verify import Unrolled, unrolled
from mdsens.verify.tangent_run import TangentRun, limits_of

THETA = {"sigma": [0.0, 1.0]}
LENGTH, SPRING = 1.0, 2.0


def spring(r: jax.Array, sigma: jax.Array, k: jax.Array) -> jax.Array:
    return 0.5 * k * (r - sigma) ** 2


def pair() -> ms.System:
    """Two particles on a spring that is a little too long."""
    potential = ms.potentials.from_pair(spring, ("sigma", "k"), None)
    return ms.System.create(
        [[0.0, 0.0], [0.6, 0.83]], None, potential, {"sigma": LENGTH, "k": SPRING}
    )


@cache
def packing() -> Unrolled:
    """32 discs from a random start."""
    return unrolled(ms.load_system("seed_packing_2d", seed=0, count=32), THETA, (1, 30, 1500))


@LONG
def test_gradient_descent_on_a_spring_is_known():
    """r_k = sigma + (r_0 - sigma) q^k and dr_k/dsigma = 1 - q^k, q = 1 - 2 h k: the error is q^k,
    and so is what is left of a displacement, whose exponent is log q.
    """
    system, counts, step = pair(), (1, 2, 8, 20), 0.4
    q = 1.0 - 2.0 * SPRING * step / float(natural_units(system)[1])
    u = unrolled(
        system, {"sigma": 1.0}, counts, method=GradientDescent(step_size=step), reverse=True
    )
    np.testing.assert_allclose(u.errors, q ** np.array(counts), rtol=1e-7)
    np.testing.assert_allclose(
        u.exact, np.asarray(u.minimum.positions - u.minimum.positions.mean(axis=0)), atol=1e-12
    )
    np.testing.assert_allclose(u.growth, np.log(q), rtol=1e-6)
    assert u.reverse is not None and u.reverse.gap < 1e-12


def test_a_packing_at_rest_has_the_implicit_derivative():
    u = packing()
    assert u.status is ms.Status.CONVERGED and u.error < 1e-6 and u.agrees_from() == 1500
    assert float(u.max_forces[-1]) < 1e-10 and u.growth[-1] < 0
    np.testing.assert_allclose(ms.jvp(u.minimum, THETA).value, u.exact, atol=1e-8)


def test_before_it_rests_the_derivative_is_far_off_and_grows():
    u = packing()
    assert u.errors[1] > 0.5 and u.exponent > 0.01 and u.max_forces[1] > 1e-3
    assert "never" not in str(u) and "1,500" in str(u)


def test_the_tangent_is_that_of_the_steps():
    """Against differences of the run itself, unconverged as it is; its mass and limits are held."""
    start, t = ms.load_system("seed_packing_2d", seed=0, count=32), 1e-6
    held, still = limits_of(start, Fire()), {k: jnp.zeros_like(v) for k, v in start.params.items()}
    ends = []
    for side in (t, -t):
        run = TangentRun(start.with_params({"sigma": [1.0, 0.6 + side]}), Fire(), still, held)
        run.advance(30)
        ends.append(run.positions)
    slope = np.asarray(ends[0] - ends[1]) / (2 * t)
    slope = slope - slope.mean(axis=0)  # forces that are cut have a sum
    assert np.linalg.norm(slope - packing().tangents[1]) < 1e-5 * np.linalg.norm(slope)


def test_the_curve_tells_the_chaotic_part_apart():
    from matplotlib.figure import Figure

    u = packing()
    ax = ms.plots.unrolled(u, Figure().subplots())
    drawn = {str(line.get_label()): np.asarray(line.get_xydata()) for line in ax.lines}
    np.testing.assert_allclose(drawn["error"], np.column_stack([u.steps, u.errors])[u.growth <= 0])
    np.testing.assert_allclose(drawn["error, chaotic so far"][:, 0], [1, 30])
    np.testing.assert_allclose(drawn["largest force"][:, 1], u.max_forces)
    assert ax.get_title() == "" and ax.get_xscale() == ax.get_yscale() == "log"
    with pytest.raises(ms.InputError, match=r"ms.verify.unrolled"):
        ms.plots.unrolled(ms.verify)  # type: ignore[arg-type]


def test_reverse_mode_has_to_fit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 1e4)
    with pytest.raises(ms.TooLargeError, match="forward mode"):
        unrolled(pair(), {"sigma": 1.0}, 1000, method=GradientDescent(), reverse=True)


@pytest.mark.parametrize(
    ("start", "options", "says"),
    [
        (ms.relaxation.Fire(), {}, "one System"),
        (None, {"method": ms.relaxation.Newton()}, "Fire"),
        (None, {"steps": 0}, "whole numbers"),
        (None, {"steps": [1.5]}, "whole numbers"),
        (None, {"dparams": {"sgima": 1.0}}, "did you mean"),
    ],
)
def test_bad_input_is_refused(start, options, says):
    given = {"dparams": {"sigma": 1.0}, **options}
    with pytest.raises(ms.InputError, match=says):
        unrolled(pair() if start is None else start, **given)


@pytest.mark.skipif("MDSENS_FUZZ_CASES" not in os.environ, reason="long: make fuzz")
def test_the_seeds_packings_are_wrong_at_300_steps_and_right_at_1000():
    """L1 norms over the implicit one's, of 20 packings of 128 discs: several times it, and it."""
    ratios = []
    for seed in range(20):
        u = unrolled(ms.load_system("seed_packing_2d", seed=seed), THETA, (300, 1000))
        ratios.append(np.abs(u.tangents).sum(axis=(1, 2)) / np.abs(u.exact).sum())
    early, late = np.array(ratios).T
    print(
        f"median at 300 steps: {np.median(early):.3g}; within 1 % at 1,000:"
        f" {np.mean(abs(late - 1) < 0.01):.2f}"
    )
    assert np.median(early) > 5.0 and np.mean(np.abs(late - 1.0) < 0.01) >= 0.8


@pytest.mark.skipif("MDSENS_FUZZ_CASES" not in os.environ, reason="long: make fuzz")
def test_both_modes_are_one_derivative_on_both_kinds_of_list():
    start = ms.load_system("seed_packing_2d", seed=0, count=80)
    u = unrolled(start, THETA, 60, reverse=True)
    np.testing.assert_allclose(u.tangents, unrolled(start, THETA, 60).tangents, atol=1e-9)
    assert u.reverse is not None and u.reverse.gap < 1e-9
    assert u.reverse.measured is None or 0.5 < u.reverse.measured / u.reverse_bytes < 20.0
