"""Inverse design: its steps against another solver,
its answers against closed forms and relaxing again.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pytest
from conftest import LONG, ring, sixteen_discs, square_lattice
from scipy.optimize import lsq_linear

import mdsens as ms
from mdsens.design import (
    Free,
    LevenbergMarquardt,
    Optax,
    Softest,
    Target,
    feature_response,
    fit,
    hold,
)
from mdsens.design.methods import bounded_step
from mdsens.design.variables import Variables
from mdsens.implicit import CG
from mdsens.io.design_toml import load_design

RISE = 2.0 ** (1.0 / 6.0)  # of a Lennard-Jones pair's distance by sigma


def distance(system: ms.System) -> jnp.ndarray:
    return jnp.linalg.norm(system.positions[0] - system.positions[1])


@pytest.fixture(scope="module")
def packing() -> ms.System:
    """64 polydisperse Hertzian discs, at rest."""
    rng = np.random.default_rng(5)
    sigma = rng.uniform(0.7, 1.3, 64)
    length = float(np.sqrt(np.pi / 4 * np.sum(sigma**2) / 1.2))
    potential, params = ms.potentials.soft_sphere(), {"sigma": sigma, "epsilon": 1.0, "alpha": 2.5}
    start = ms.System.create(rng.random((64, 2)) * length, length * np.eye(2), potential, params)
    return ms.minimize(start, tolerance=1e-12).system


WANTED = [Target("poisson", 0.03, 2e-3, from_start=True), hold("pressure", 0.01)]


# -- the step


@pytest.mark.parametrize(("rows", "columns"), [(2, 5), (6, 40), (24, 256), (5, 3)])
def test_step_is_the_bounded_minimum(rows: int, columns: int) -> None:
    rng = np.random.default_rng(rows)
    A, b = rng.standard_normal((rows, columns)), 3.0 * rng.standard_normal(rows)
    low, high, mu = -rng.uniform(0.01, 0.2, columns), rng.uniform(0.01, 0.2, columns), 1e-3
    found = bounded_step(A, b, low, high, mu)
    whole = (
        np.concatenate([A / mu**0.5, np.eye(columns)]),
        np.concatenate([b / mu**0.5, np.zeros(columns)]),
    )
    truth = lsq_linear(*whole, bounds=(low, high), tol=1e-14).x
    assert (found >= low).all() and (found <= high).all()

    def cost(s: np.ndarray) -> float:
        return float(0.5 * s @ s + 0.5 * np.sum((A @ s - b) ** 2) / mu)

    assert cost(found) <= cost(truth) * (1 + 1e-9)
    at_rest = np.clip(A.T @ (b - A @ found) / mu, low, high)  # the condition of a minimum
    np.testing.assert_allclose(found, at_rest, atol=1e-6)


def test_step_without_a_right_hand_side_is_none() -> None:
    assert not bounded_step(np.ones((2, 4)), np.zeros(2), -np.ones(4), np.ones(4), 1e-3).any()


# -- the variables


def _glass() -> ms.System:
    potential = ms.potentials.lennard_jones(2.0, 2.5)
    positions = np.array([[0.0, 0.0], [1.1, 0.0], [0.5, 1.0], [1.6, 0.9]])
    params = {"sigma": [1.0, 0.9], "epsilon": [[1.0, 1.5], [1.5, 0.5]]}
    return ms.System.create(positions, None, potential, params, species=[0, 0, 1, 1])


def test_a_matrix_of_pairs_stays_symmetric_and_its_derivative_counts_both_entries() -> None:
    only = np.array([[False, True], [True, True]])
    variables = Variables.of(
        _glass(), {"epsilon": Free(only=only), "sigma": Free(log=False, low=0.5, high=2.0)}
    )
    assert variables.labels == ("epsilon[0,1]", "epsilon[1,1]", "sigma[0]", "sigma[1]")
    x = variables.x + np.array([0.1, -0.2, 0.05, 0.0])
    params = variables.params(x)
    np.testing.assert_array_equal(params["epsilon"], params["epsilon"].T)
    assert params["epsilon"][0, 0] == 1.0
    np.testing.assert_allclose(params["epsilon"][0, 1], 1.5 * np.exp(0.1))
    weights = {"epsilon": np.arange(4.0).reshape(2, 2), "sigma": np.array([2.0, -1.0])}

    def feature(at: np.ndarray) -> float:
        return sum(
            float(np.sum(weights[name] * value)) for name, value in variables.params(at).items()
        )

    pulled = variables.pulled(x, {name: w[None] for name, w in weights.items()})[0]
    for k in range(x.size):
        h = 1e-6 * np.eye(x.size)[k]
        np.testing.assert_allclose(pulled[k], (feature(x + h) - feature(x - h)) / 2e-6, rtol=1e-7)
    step = 1e-7 * np.array([1.0, -2.0, 3.0, 0.5])
    after, before = variables.params(x + step), variables.params(x - step)
    for name, change in variables.tangent(x, step).items():
        np.testing.assert_allclose(change, 0.5 * (after[name] - before[name]), atol=1e-15)


def test_a_tree_of_parameters_is_a_vector_and_a_tree_again() -> None:
    potential = ms.potentials.from_energy(lambda R, p, d: jnp.sum(R**2), ("weights",))
    tree = {"w": np.array([[1.0, -2.0], [0.5, 0.0]]), "b": [np.array([0.3]), None]}
    system = ms.System.create(np.eye(2), None, potential, {"weights": tree})
    variables = Variables.of(system, "weights", {"weights": (-3.0, 3.0)})
    assert variables.labels[0] == "weights.b.0[0]" and variables.labels[3] == "weights.w[1,0]"
    np.testing.assert_allclose(variables.high * variables.scale, 3.0)
    x = variables.x + np.array([0.1, -0.2, 0.05, 0.3, -0.1])
    slopes = {"weights.b.0": np.array([[2.0]]), "weights.w": np.arange(4.0).reshape(1, 2, 2)}

    def feature(at: np.ndarray) -> float:
        params = variables.params(at)["weights"]
        assert jax.tree.structure(params) == jax.tree.structure(tree)
        return float(2.0 * params["b"][0][0] + np.sum(np.arange(4.0).reshape(2, 2) * params["w"]))

    for k, slope in enumerate(variables.pulled(x, slopes)[0]):
        h = 1e-6 * np.eye(x.size)[k]
        np.testing.assert_allclose(slope, (feature(x + h) - feature(x - h)) / 2e-6, rtol=1e-8)
    change = variables.tangent(x, np.ones(5))["weights"]
    np.testing.assert_allclose(change["w"], 2.0)  # steps are in units of the largest entry


@pytest.mark.parametrize(
    ("free", "bounds", "said"),
    [
        ("sgima", None, "no parameter"),
        ((), None, "`free` is empty"),
        ({"sigma": 0.3}, None, "give ms.design.Free"),
        ({"sigma": Free(within=-1.0)}, None, "positive share"),
        ({"sigma": Free(low=2.0)}, None, "do not contain the starting value"),
        ({"sigma": Free(low=np.nan)}, None, "do not contain the starting value"),
        ({"sigma": Free(only=np.array([True]))}, None, "booleans of shape"),
        ({"epsilon": Free(only=np.array([[False, True], [False, True]]))}, None, "mirror"),
        ({"sigma": Free(only=np.zeros(2, bool))}, None, "no component"),
        ("sigma", {"epsilon": (0.0, 1.0)}, "not free"),
        ("sigma", {"sigma": 1.0}, "give \\(low, high\\)"),
    ],
)
def test_bad_variables_are_named(free: Any, bounds: Any, said: str) -> None:
    with pytest.raises(ms.InputError, match=said):
        Variables.of(_glass(), free, bounds)


def test_a_share_and_a_bound_of_a_scalar_hold_together() -> None:
    variables = Variables.of(ms.load_system("dimer"), {"sigma": Free(within=0.05, low=0.99)}, None)
    np.testing.assert_allclose(np.exp([variables.low[0], variables.high[0]]), [0.99, 1.05])


# -- answers that are known


def test_a_pair_is_designed_to_a_distance() -> None:
    dimer = ms.load_system("dimer")
    found = fit(Target(distance, 1.3, 1e-9), dimer, "sigma")
    assert found.status == ms.Status.CONVERGED
    np.testing.assert_allclose(found.params["sigma"], 1.3 / RISE, atol=1e-9)
    assert "met" in str(found) and "sigma" in str(found)
    assert found.table().count("\n") == found.relaxations + 1
    first, second = found.table().splitlines()[1:3]
    # the start has neither a prediction nor a trust region; a step has what the linear model gave
    assert "nan" not in first and first.split()[2] == "-"
    assert float(second.split()[2]) == pytest.approx(found.history[1].predicted[0], rel=1e-5)


def test_bounds_hold_and_a_design_that_they_stop_says_so() -> None:
    found = fit(
        Target(distance, 1.3, 1e-9), ms.load_system("dimer"), {"sigma": Free(within=0.05)}, steps=40
    )
    assert found.status == ms.Status.DESIGN_STAGNATED
    np.testing.assert_allclose(found.params["sigma"], 1.05, atol=1e-9)
    with pytest.raises(ms.ConvergenceError, match="steps were spent") as raised:
        fit(Target(distance, 1.3, 1e-9), ms.load_system("dimer"), "sigma", steps=1, throw=True)
    assert raised.value.result.relaxations == 1


def test_an_optimizer_of_optax_gets_there_too() -> None:
    method = Optax(optax.adam(0.02), "adam")
    found = fit(
        Target(distance, 1.2, 1e-3), ms.load_system("dimer"), "sigma", method=method, steps=200
    )
    assert found.status == ms.Status.CONVERGED
    np.testing.assert_allclose(found.params["sigma"], 1.2 / RISE, atol=1e-3)
    assert all(step.accepted for step in found.history)


def test_a_packing_is_designed_and_relaxing_again_agrees(packing: ms.System) -> None:
    found = fit(WANTED, packing, {"sigma": Free(within=0.3)})
    assert found.status == ms.Status.CONVERGED
    start = np.asarray(packing.params["sigma"])
    assert (np.abs(found.params["sigma"] / start - 1.0) <= 0.3 + 1e-12).all()
    again = ms.minimize(found.equilibrium.system, found.params)
    moduli = ms.elasticity.moduli(again)
    np.testing.assert_allclose([moduli.poisson, moduli.pressure], found.values, rtol=1e-7)
    assert (np.abs(found.values - found.wanted) <= found.tolerance).all()
    first = found.history[1]
    assert first.reach > 0 and first.trust <= 0.1 and first.crossed >= (first.reach <= 1.0)


@LONG
def test_at_a_pressure_the_cell_responds(packing: ms.System) -> None:
    P = float(ms.observables.pressure(packing))
    found = fit(WANTED[0], packing, {"sigma": Free(within=0.3)}, pressure=P, steps=12)
    np.testing.assert_allclose(ms.observables.pressure(found.equilibrium.system), P, rtol=1e-9)
    assert abs(found.values[0] - found.wanted[0]) < abs(
        found.history[0].values[0] - found.wanted[0]
    )
    predicted = found.history[1].predicted[0] - found.history[0].values[0]
    assert np.isfinite(predicted) and predicted > 0


# -- ensembles


def test_members_without_a_rigid_minimum_are_left_out_of_the_mean(packing: ms.System) -> None:
    rng = np.random.default_rng(6)
    other = packing.replace(
        positions=jnp.asarray(rng.random((64, 2)) @ np.asarray(packing.box).T)
    ).reallocate()
    loose = packing.replace(
        boundary=dataclasses.replace(packing.boundary, cell=2.0 * jnp.asarray(packing.box))
    )
    loose = loose.replace(positions=2.0 * loose.positions).reallocate()
    found = fit(
        Target("pressure", 0.005, 1e-4, from_start=True),
        [packing, other, loose],
        "epsilon",
        steps=6,
    )
    assert found.status == ms.Status.CONVERGED
    assert [int(code) for code in found.reached.status] == [0, 0, ms.Status.UNJAMMED]
    mean = np.mean([float(ms.observables.pressure(eq.system)) for eq in found.equilibria[:2]])
    np.testing.assert_allclose(found.values[0], mean, rtol=1e-12)
    assert "2 of 3 count" in str(found)
    with pytest.raises(ms.ConvergenceError, match="3 of 3 systems"):
        fit(Target("pressure", 0.1, 1e-3), [loose] * 3, "epsilon")


def test_members_share_what_is_free() -> None:
    one, other = ms.load_system("dimer"), ms.load_system("dimer", parameters={"sigma": 1.1})
    with pytest.raises(ms.InputError, match="system 1 has another `sigma`"):
        fit(Target(distance, 1.2, 1e-3), [one, other], "sigma")


def test_members_relaxed_anew_come_from_their_starts(packing: ms.System) -> None:
    rng = np.random.default_rng(7)
    starts = [
        packing.replace(
            positions=jnp.asarray(rng.random((64, 2)) @ np.asarray(packing.box).T)
        ).reallocate()
        for _ in range(2)
    ]
    wanted, free = Target("pressure", 0.003, 1e-9, from_start=True), {"sigma": Free(within=0.1)}
    found = fit(wanted, starts, free, restart=True, steps=1)
    step = found.history[1]
    assert np.isnan(step.max_displacement_error) and not step.left_basin.any()
    again = [ms.minimize(start, Variables.of(starts[0], free).params(step.x)) for start in starts]
    mean = np.mean([float(ms.observables.pressure(eq.system)) for eq in again])
    np.testing.assert_allclose(step.values[0], mean, rtol=1e-9)


# -- figures


def test_figures_are_drawn_on_the_axes_given(packing: ms.System) -> None:
    matplotlib.use("agg")
    from matplotlib import pyplot

    design = fit(Target(distance, 1.3, 1e-9), ms.load_system("dimer"), "sigma", steps=1)
    eq = ms.minimize(packing)
    moduli = ms.elasticity.moduli(eq)
    figure, axes = pyplot.subplots(4, 2)
    try:
        drawn = ms.plots.design_history(design, axes[:3, 0])
        assert list(drawn) == list(axes[:3, 0]) and design.status.name in drawn[0].get_title()
        low, high = drawn[0].get_ylim()
        assert low < 1.3 < high  # the target is in sight
        assert ms.plots.nonaffine_field(eq, moduli, ax=axes[0, 1]) is axes[0, 1]
        ms.plots.feature_response(
            feature_response(["pressure", "energy"], eq), (axes[1, 1], axes[2, 1])
        )
        assert "fully independent" in axes[1, 1].get_title() and len(axes[2, 1].patches) == 4
        ms.plots.before_after(eq, eq, (axes[3, 0], axes[3, 1]))
        assert [ax.get_title() for ax in axes[3]] == ["before", "after"]
        figure.canvas.draw()
    finally:
        pyplot.close(figure)
    with pytest.raises(ms.InputError, match="give 3, one per feature"):
        ms.plots.design_history(design, axes[:2, 0])
    with pytest.raises(ms.InputError, match="fit returns"):
        ms.plots.design_history(eq)  # type: ignore[arg-type]
    with pytest.raises(ms.InputError, match="symmetric"):
        ms.plots.nonaffine_field(eq, moduli, strain=np.array([[0.0, 1.0], [0.0, 0.0]]))


# -- going on


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for field in dataclasses.fields(a):
            np.testing.assert_array_equal(
                getattr(a, field.name), getattr(b, field.name), err_msg=field.name
            )


@pytest.mark.parametrize(
    "method", [LevenbergMarquardt(), Optax(optax.rmsprop(0.003), "rmsprop")], ids=str
)
def test_a_resumed_design_is_the_same_to_the_last_bit(
    packing: ms.System, tmp_path: Path, method: Any
) -> None:
    free = {"sigma": Free(within=0.3)}
    far = [Target("poisson", 0.2, 1e-6, from_start=True), hold("pressure", 0.01)]
    whole = fit(far, packing, free, method=method, steps=6)
    part = fit(
        far,
        packing,
        free,
        method=method,
        steps=3,
        callback=lambda s: ms.io.save(tmp_path / "s.npz", s),
    )
    state = ms.io.load(tmp_path / "s.npz")
    _same(part.history, state.history)
    rest = fit(far, packing, free, method=method, steps=6, resume=state)
    _same(whole.history, rest.history)
    with pytest.raises(ms.InputError, match="another design: its targets"):
        fit(WANTED, packing, free, method=method, resume=state)
    with pytest.raises(ms.InputError, match="another design: its bounds"):
        fit(far, packing, {"sigma": Free(within=0.2)}, method=method, resume=state)


DESIGN = """
system = "seed_packing_2d"
steps = 8
[fields]
box = { packing_fraction = 0.98, follows = "nothing" }
[[target]]
feature = "poisson"
change = 0.2
tolerance = 1e-6
[[target]]
feature = "pressure"
hold = true
share = 0.01
[free.sigma]
within = 0.3
[free.epsilon]
low = 0.5
high = 2.0
"""


@LONG
def test_a_design_killed_at_any_moment_resumes_to_the_same_history(tmp_path: Path) -> None:
    silent: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "d.toml").write_text(DESIGN)
    command = [sys.executable, "-m", "mdsens", "design", "d.toml", "--resume"]
    state = tmp_path / "killed" / "d.npz"
    whole = subprocess.Popen(command, cwd=tmp_path / "whole", **silent)
    run = subprocess.Popen(command, cwd=state.parent, **silent)
    while run.poll() is None and not state.exists():
        time.sleep(0.002)
    time.sleep(0.05 * np.random.default_rng().random())  # a step or so later; seven are still to go
    assert run.poll() is None
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    cut_off = ms.io.load(state)  # whole, whenever it was cut off
    assert subprocess.run(command, cwd=state.parent, check=False, **silent).returncode == 3
    assert whole.wait() == 3
    history = ms.io.load(state).history
    assert 1 < len(cut_off.history) < len(history)
    _same(ms.io.load(tmp_path / "whole" / "d.npz").history, history)


# -- files


@pytest.mark.parametrize("wanted", [0.0, pytest.param(0.1, marks=LONG)], ids=["held", "impossible"])
def test_a_feature_that_nothing_free_moves_does_not_rule_the_step(wanted: float) -> None:
    """A common factor of all energies scales the pressure and leaves Poisson's ratio:
    its derivatives are round-off.
    """
    start = ms.minimize(ms.load_system("polydisperse_2d", count=64), progress=False).system
    targets = [Target("pressure", 0.1, 1e-4), Target("poisson", wanted, 1e-3, from_start=True)]
    free = {"epsilon": Free(low=0.5, high=2.0)}
    design = fit(targets, start, free, progress=False)
    assert abs(design.values[0] - 0.1) < 1e-4
    assert design.status is (ms.Status.CONVERGED if wanted == 0.0 else ms.Status.DESIGN_STAGNATED)
    assert design.status is not ms.Status.CONVERGED or design.relaxations <= 4
    alone = fit(targets[1], start, free, progress=False)
    assert alone.relaxations <= 1 and float(alone.params["epsilon"]) == 1.0


@LONG
def test_a_member_on_the_verge_of_rearranging_does_not_count() -> None:
    """Of the sixteen, one has a negative shear modulus and a Poisson's ratio of -77,
    which would rule the mean.
    """
    box, potential = {"packing_fraction": 1.0, "follows": "nothing"}, {"alpha": 2.5}
    members = [
        ms.load_system("seed_packing_2d", seed=k, count=64, box=box, parameters=potential)
        for k in (12, 13, 14)
    ]
    verge = ms.elasticity.moduli(ms.minimize(members[1], progress=False), throw=False)
    assert verge.poisson < -10 and verge.shear < 0
    design = fit(
        Target("poisson", 0.0, 1.0, from_start=True),
        members,
        {"sigma": Free(within=0.3)},
        progress=False,
    )
    assert list(design.history[0].status) == [
        ms.Status.CONVERGED,
        ms.Status.UNSTABLE,
        ms.Status.CONVERGED,
    ]
    assert 0.5 < design.values[0] < 0.6


def test_a_member_of_a_negative_modulus_does_not_count() -> None:
    """Poisson's ratios of 0.51, none and 0.80: the second is no solid,
    the third one that its cell holds.
    """
    members = [sixteen_discs(kind) for kind in ("stable", "unstable", "sheared away")]
    ratios = [
        float(ms.elasticity.moduli(ms.minimize(m, progress=False), throw=False).poisson)
        for m in members
    ]
    wide = Target("poisson", 0.0, 10.0, from_start=True)
    design = fit(wide, members, {"sigma": Free(within=0.3)}, progress=False)
    assert list(design.history[0].status) == [
        ms.Status.CONVERGED,
        ms.Status.UNSTABLE,
        ms.Status.CONVERGED,
    ]
    assert np.isnan(ratios[1]) and design.values[0] == pytest.approx(
        0.5 * (ratios[0] + ratios[2]), rel=1e-6
    )
    with pytest.raises(ms.ConvergenceError, match="the bulk or the shear modulus is not positive"):
        feature_response(["bulk", "poisson"], ms.minimize(members[1], progress=False))
    pressure = fit(Target("pressure", 0.0, 1.0, from_start=True), members, "sigma", progress=False)
    assert not pressure.history[0].status.any()  # no modulus is asked for


def test_a_feature_without_a_value_is_refused() -> None:
    with pytest.raises(
        ms.ConvergenceError, match="1 of 1 systems did not relax to a rigid minimum"
    ) as raised:
        fit(Target("poisson", 0.1, 1e-3), ring(), "stiffness", progress=False)
    assert raised.value.status is ms.Status.FLOPPY
    eq = ms.minimize(ring(), progress=False)
    seen = feature_response(["birch_poisson", "bulk"], eq, wrt="stiffness", throw=False)
    assert seen.status is ms.Status.FLOPPY and np.isnan(seen.values[0]) and seen.values[1] == 0.0


def test_a_value_that_is_round_off_is_no_scale() -> None:
    """Springs at rest are under no pressure:
    what is computed of it would otherwise be what others are measured in.
    """
    braced = square_lattice(0.3)
    rounded = 2.0**-52 * np.random.default_rng(0).choice([-1.0, 1.0], 100)
    eq = ms.minimize(
        braced.with_params({"length": braced.params["length"] * (1.0 + rounded)}), progress=False
    )
    found = feature_response(["pressure", "bulk"], eq, wrt="length")
    assert 0 < abs(found.values[0]) < 1e-15
    assert found.scales[0] == 1.0 and found.scales[1] == pytest.approx(0.8)
    assert 1e-3 < np.abs(found.jacobian[0]).max() < 1.0
    with pytest.raises(
        ms.InputError,
        match=r"target 'pressure': the value is .*, zero to round-off, so that a share",
    ):
        fit(hold("pressure"), eq.system, "length", progress=False)


def test_a_design_file_sets_every_field_of_the_method(tmp_path: Path) -> None:
    method = LevenbergMarquardt(0.01, 0.1, 0.2, 3, 2.0, 0.1, 0.2, (8.0, 2.0))
    fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    lines = [
        f"{name} = {list(value) if isinstance(value, tuple) else value}"
        for name, value in fields.items()
    ]
    (tmp_path / "d.toml").write_text(DESIGN + "\n[method]\n" + "\n".join(lines))
    assert load_design(tmp_path / "d.toml").options["method"] == method


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('system = "seed_packing_2d"', 'system = "seed_packing"', "seed_packing_2d"),
        (
            'feature = "poisson"',
            'feature = "posson"',
            "target\\[0\\].feature is 'posson': did you mean 'poisson'",
        ),
        ("change = 0.2", "change = 0.2\nvalue = 0.6", "2 of value, change and hold"),
        ("hold = true", "hold = false", "target\\[1\\].hold is False"),
        ("share = 0.01", "share = -0.01", "target\\[1\\].share is -0.01"),
        ("share = 0.01", "", "0 of tolerance and share"),
        (
            "[free.sigma]",
            "[free.sgima]",
            "free.sgima is no parameter of the system: did you mean 'sigma'",
        ),
        ("within = 0.3", 'within = "30 %"', "free.sigma.within is '30 %'"),
        ("within = 0.3", "log = 1", "free.sigma.log is 1"),
        ("low = 0.5", "lower = 0.5", "free.epsilon.lower is no key"),
        ("steps = 8", "steps = 0", "steps is 0"),
        ("steps = 8", "seeds = [1, 1]", "seeds is"),
        ("[fields]", "seeds = [1, 2]\n[fields]\nseed = 3", "fields.seed is 3 and seeds is"),
        ("[fields]", "[fields]\nname = 3", "name is no key of the format"),
        ("steps = 8", "steps = 8\n[method]\nkind = 'rmsprop'", "method.learning_rate is missing"),
        ("steps = 8", "steps = 8\n[method]\nkind = 'newton'", "method.kind is 'newton'"),
        (
            "steps = 8",
            "steps = 8\n[relaxation]\npressure = 'high'",
            "relaxation.pressure is 'high'",
        ),
        ("steps = 8", "steps 12", "no whole TOML file"),
    ],
)
def test_bad_design_files_are_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in DESIGN
    (tmp_path / "d.toml").write_text(DESIGN.replace(old, new))
    with pytest.raises(ms.InputError, match=said) as raised:
        load_design(tmp_path / "d.toml")
    assert "d.toml" in str(raised.value)


@pytest.mark.parametrize(
    ("make", "said"),
    [  # pyright: ignore
        (lambda: Target("posson", 0.1, 1e-3), "did you mean 'poisson'"),
        (lambda: Target("poisson", np.nan, 1e-3), "finite"),
        (lambda: Target("poisson", 0.1, 0.0), "tolerance"),
        (lambda: Target(3, 0.1, 1e-3), "give a name such as"),
        (lambda: LevenbergMarquardt(trust=-1.0), "trust"),
        (lambda: LevenbergMarquardt(memory=-1), "memory"),
        (lambda: LevenbergMarquardt(widths=(3.0, -1.0)), "widths"),
        (lambda: LevenbergMarquardt(widths=3.0), "widths"),  # type: ignore[arg-type]
        (lambda: Optax("adam"), "optimizer"),
        (lambda: fit([], ms.load_system("dimer"), "sigma"), r"`targets` is \[\]: give"),
        (lambda: fit(3, ms.load_system("dimer"), "sigma"), r"`targets` is 3: give"),  # type: ignore
        (
            lambda: fit(hold("energy"), 3, "sigma"),  # type: ignore[arg-type]
            "`system` is 3",
        ),
        (lambda: fit(hold("energy"), ms.load_system("dimer"), "sigma", steps=0), "`steps` is 0"),
        (
            lambda: fit(hold("energy"), ms.load_system("dimer"), "sigma", method="adam"),  # type: ignore[arg-type]
            "`method` is",
        ),
        (
            lambda: fit([hold("energy"), hold("energy")], ms.load_system("dimer"), "sigma"),
            "two targets",
        ),
        (
            lambda: fit(Target(lambda s: s.positions, 0.0, 1.0), ms.load_system("dimer"), "sigma"),
            "one number for each",
        ),
    ],
)
def test_bad_calls_are_named(make: Any, said: str) -> None:
    with pytest.raises(ms.InputError, match=said):
        make()


# -- many features


def test_features_that_are_independent_can_be_moved_alone(packing: ms.System) -> None:
    eq = ms.minimize(packing)
    found = feature_response(["poisson", "pressure", "shear"], eq)
    assert found.independent and found.rank == 3
    np.testing.assert_allclose(found.jacobian @ found.alone.T, np.eye(3), atol=1e-8)
    assert (found.susceptibility <= found.free * (1 + 1e-12)).all()
    change = found.change("shear", 1e-6)
    ends = [
        ms.elasticity.moduli(
            ms.minimize(
                eq.system,
                {"sigma": eq.params["sigma"] + s * change["sigma"]},
                tolerance=3e-14,
                throw=False,
            )
        )
        for s in (1.0, -1.0)
    ]
    moved = np.array([[float(m.poisson), float(m.pressure), float(m.shear)] for m in ends])
    np.testing.assert_allclose(0.5 * (moved[0] - moved[1]), [0.0, 0.0, 1e-6], atol=1e-9)


def test_features_that_say_the_same_are_told(packing: ms.System) -> None:
    twice = {"P": "pressure", "2P": lambda s: 2.0 * ms.observables.pressure(s), "K": "bulk"}
    found = feature_response(twice, ms.minimize(packing))
    assert found.rank == 2 and not found.independent
    assert list(found.susceptibility > 0) == [False, False, True]
    assert "rank 2" in str(found)
    with pytest.raises(ms.InputError, match="cannot be changed alone"):
        found.change("P")
    with pytest.raises(ms.InputError, match="give 3 positive numbers"):
        feature_response(twice, ms.minimize(packing), scales=[1.0])


def test_one_feature_needs_no_list_and_what_is_no_feature_is_named(packing: ms.System) -> None:
    eq = ms.minimize(packing)
    single = feature_response(ms.design.Elastic(lambda m: m.bulk), eq)
    np.testing.assert_array_equal(single.jacobian, feature_response(["bulk"], eq).jacobian)
    with pytest.raises(ms.InputError, match="the feature is 3"):
        feature_response(3, eq)  # type: ignore[arg-type]
    with pytest.raises(ms.InputError, match="`free` is 3"):
        feature_response("bulk", eq, wrt=3)  # type: ignore[arg-type]


def test_the_jacobian_of_features_takes_a_solver(packing: ms.System) -> None:
    eq = ms.minimize(packing)
    default = feature_response(["pressure"], eq)
    chosen = feature_response(["pressure"], eq, solve=CG(rtol=1e-12))
    np.testing.assert_allclose(chosen.jacobian, default.jacobian, rtol=1e-8, atol=1e-12)
    with pytest.raises(ms.ConvergenceError):
        feature_response(["pressure"], eq, solve=CG(max_iterations=2))


def test_features_of_every_kind_have_the_gradients_of_their_modules(packing: ms.System) -> None:
    lin = ms.linearize(ms.minimize(packing))
    found = feature_response(["shear", "energy", Softest(2)], lin)
    want = [
        ms.elasticity.gradient(lambda m: m.shear, lin),
        ms.gradient(ms.observables.energy, lin),
        ms.modes.gradient(lin, 2),
    ]
    sigma = np.asarray(packing.params["sigma"])
    for k, response in enumerate(want):
        slope = np.asarray(response.value["sigma"]) * sigma / found.scales[k]
        np.testing.assert_allclose(
            found.jacobian[k], slope, rtol=1e-9, atol=1e-9 * np.abs(slope).max()
        )
