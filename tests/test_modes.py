"""The smallest stiffness against dense eigenvalues, and its derivative against minimizing again."""

from __future__ import annotations

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PACKINGS, packing, relative, relaxed_packing, ring

import mdsens as ms
from mdsens import modes
from mdsens.implicit.linear import eigen
from mdsens.mechanics.hessian import dense_hessian
from mdsens.modes import smallest_stiffness

LAW = ms.potentials.soft_sphere()


@cache
def crystal(larger: float = 0.0) -> ms.Equilibrium:
    """64 discs in a triangular lattice, overlapping by 5 %, one of them larger;
    of the shape of the packing.
    """
    j, i = np.divmod(np.arange(64), 8)
    places = 0.95 * np.stack([i + 0.5 * (j % 2), 0.75**0.5 * j], axis=1)
    sigma = np.ones(64)
    sigma[0] += larger
    box = 8 * 0.95 * np.diag([1.0, 0.75**0.5])
    system = ms.System.create(places, box, LAW, {"sigma": sigma, "epsilon": 1.0, "alpha": 2.0})
    return ms.minimize(system, tolerance=1e-13)


def dense(eq: ms.Equilibrium) -> np.ndarray:
    """Eigenvalues off the null space, in numpy."""
    lin = ms.linearize(eq)
    return np.linalg.eigvalsh(np.asarray(dense_hessian(lin.system)))[
        sum(lin.null.dimensions(eq.system.dimension)) :
    ]


# ── the value ──


@pytest.mark.parametrize("sparse", [False, True])
def test_it_is_the_lowest_eigenvalue_of_the_dense_hessian(sparse, monkeypatch):
    eq = relaxed_packing(PACKINGS[0], 0)
    if sparse:  # as of larger systems
        monkeypatch.setattr(eigen, "DENSE_SIZE", 0)
        monkeypatch.setattr(modes, "DENSE_SIZE", 0)
    found, want = smallest_stiffness(eq), dense(eq)
    assert found.method == ("shift-invert" if sparse else "dense")
    assert found.value == pytest.approx(want[0], rel=1e-9) and found.gap == pytest.approx(
        want[1] - want[0], rel=1e-8
    )
    assert found.status is ms.Status.CONVERGED and found.residuals[0] < 1e-9
    lin = ms.linearize(eq)
    image = np.asarray(dense_hessian(lin.system)) @ found.vectors[0].ravel()
    np.testing.assert_allclose(image, found.value * found.vectors[0].ravel(), atol=1e-9)
    several = smallest_stiffness(lin, 3)
    np.testing.assert_allclose(several.values, want[:3], rtol=1e-9)
    assert several.value == pytest.approx(want[:3].mean()) and several.vectors.shape == (3, 64, 2)


@pytest.mark.parametrize("sparse", [False, True])
def test_equal_eigenvalues_of_a_crystal_are_taken_together(sparse, monkeypatch):
    eq = crystal()
    want = dense(eq)
    many = int(np.sum(want < 1.001 * want[0]))
    if sparse:
        monkeypatch.setattr(eigen, "DENSE_SIZE", 0)
        monkeypatch.setattr(modes, "DENSE_SIZE", 0)
    found = smallest_stiffness(eq)
    assert many > 1 and len(found.values) == many  # of a wave vector and its negative
    assert found.status is ms.Status.DEGENERATE and found.status.warning
    assert found.value == pytest.approx(want[0], rel=1e-9) and found.gap == pytest.approx(
        want[many] - want[0]
    )
    assert smallest_stiffness(eq, many).status is ms.Status.CONVERGED


# ── its derivative ──


def test_the_gradient_is_finite_differences_of_minimizing_again():
    eq, h = relaxed_packing(PACKINGS[0], 0), 1e-6
    found = modes.gradient(eq)
    assert found.status is ms.Status.CONVERGED
    # the stiffness is of degree one in energy
    assert float(found.value["epsilon"]) == pytest.approx(smallest_stiffness(eq).value, rel=1e-9)
    slope = np.asarray(found.value["sigma"])
    for k in np.argsort(-np.abs(slope))[:3]:
        values = []
        for t in (h, -h):
            sigma = eq.params["sigma"] + t * (np.arange(64) == k)
            values.append(
                smallest_stiffness(ms.minimize(eq.system, {"sigma": sigma}, tolerance=3e-14)).value
            )
        assert slope[k] == pytest.approx(
            (values[0] - values[1]) / (2 * h), abs=1e-5 * np.abs(slope).max()
        )


def test_the_gradient_of_equal_ones_is_that_of_their_mean():
    eq, h = crystal(), 1e-4
    found, many = modes.gradient(eq), len(smallest_stiffness(eq).values)
    assert found.status is ms.Status.DEGENERATE
    values = []
    for t in (h, -h):  # one disc larger or smaller: they part, at once
        there = smallest_stiffness(
            ms.minimize(eq.system, {"sigma": eq.params["sigma"].at[0].add(t)}), many
        )
        values.append(there.values)
    assert np.ptp(values[0]) > 1e-6 * values[0][0]
    want = (values[0].mean() - values[1].mean()) / (2 * h)
    slope = np.asarray(found.value["sigma"])
    assert slope[0] == pytest.approx(want, rel=1e-5)
    np.testing.assert_allclose(slope, slope[0], rtol=1e-8)  # all discs are alike


def test_at_a_pressure_the_cell_moves_too():
    eq = ms.minimize(packing(PACKINGS[0], 0), pressure=0.1, tolerance=1e-13)
    found, h = modes.gradient(eq).value, 1e-6
    values = [
        smallest_stiffness(ms.minimize(eq.system, pressure=0.1 + t, tolerance=1e-13)).value
        for t in (h, -h)
    ]
    assert float(found["pressure"]) == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-5)
    # lengths and energies: lambda has degree -2 in length, pressure -d;
    # and one in energy, as pressure
    value = smallest_stiffness(eq).value
    by_length = float(found["sigma"] @ eq.params["sigma"]) - 2 * 0.1 * float(found["pressure"])
    assert by_length == pytest.approx(-2 * value, rel=1e-8)
    assert float(found["epsilon"]) + 0.1 * float(found["pressure"]) == pytest.approx(
        value, rel=1e-8
    )


def test_through_equilibrate_it_is_the_same():
    eq = relaxed_packing(PACKINGS[0], 0)

    def softest(p):
        return modes.stiffness(ms.equilibrate(eq.system, p, tolerance=1e-13))

    value, slope = jax.value_and_grad(softest)(dict(eq.params))
    assert float(value) == pytest.approx(smallest_stiffness(eq).value, rel=1e-10)
    assert relative(slope["sigma"], modes.gradient(eq).value["sigma"]) < 1e-8
    with pytest.raises(ms.InputError, match="a first derivative only"):
        jax.grad(
            jax.grad(lambda x: modes.stiffness(eq.system.replace(positions=x * eq.positions)))
        )(1.0)


# ── what it says of doubt ──


def test_a_gap_below_what_the_force_left_can_change_is_said():
    near = crystal(1e-3)
    assert smallest_stiffness(near).status is ms.Status.CONVERGED
    loose = dataclasses.replace(near, max_force=jnp.asarray(1e-6))
    with pytest.raises(
        ms.ConvergenceError, match="the gap to the next mode is too small"
    ) as caught:
        modes.gradient(loose)
    assert caught.value.status is ms.Status.UNRESOLVED and caught.value.result.mixing > 1e-3
    assert modes.gradient(loose, throw=False).status is ms.Status.UNRESOLVED
    # the two together stand apart
    assert smallest_stiffness(loose, 2).status is ms.Status.CONVERGED


def test_the_status_of_a_system_is_carried_out():
    eq = relaxed_packing(PACKINGS[0], 0)
    moved = eq.positions + 0.02 * jnp.asarray(
        np.random.default_rng(0).normal(size=eq.positions.shape)
    )
    systems = [
        eq.system,
        eq.system.replace(positions=moved),
        eq.system.replace(params={**eq.params, "sigma": 0.1 * eq.params["sigma"]}),
    ]
    found = [modes.stiffness(s, has_aux=True) for s in systems]
    kinds = [ms.Status(int(code)) for _, code in found]
    assert kinds == [ms.Status.CONVERGED, ms.Status.UNCONVERGED, ms.Status.UNJAMMED]
    assert float(found[2][0]) == 0.0
    together, code = modes.stiffness(crystal().system, has_aux=True)
    assert ms.Status(int(code)) is ms.Status.DEGENERATE
    assert float(together) == pytest.approx(smallest_stiffness(crystal()).value, rel=1e-10)


def test_what_is_zero_to_round_off_is_zero():
    """A ring of 30 springs at rest has 60 coordinates, 30 springs and 3 rigid motions:
    27 modes without stiffness.
    """
    eq = ms.minimize(ring())
    found = smallest_stiffness(eq, throw=False)
    assert (
        found.status is ms.Status.FLOPPY
        and found.values.tolist() == [0.0] * 27
        and found.value == 0.0
    )
    assert found.gap > 1e-3  # to a mode that has some
    assert modes.gradient(eq, throw=False).status is ms.Status.FLOPPY
    with pytest.raises(
        ms.ConvergenceError, match="the smallest stiffness is 0, by dense: there are modes without"
    ):
        modes.gradient(eq)
    value, code = modes.stiffness(eq.system, has_aux=True)
    assert float(value) == 0.0 and ms.Status(int(code)) is ms.Status.FLOPPY


def test_an_unjammed_system_and_bad_input_are_refused():
    eq = relaxed_packing(PACKINGS[0], 0)
    loose = ms.minimize(eq.system, {"sigma": 0.1 * eq.params["sigma"]})
    with pytest.raises(ms.ConvergenceError, match="no contact carries force"):
        smallest_stiffness(loose)
    found = modes.gradient(loose, throw=False)
    assert found.status is ms.Status.UNJAMMED and not np.any(found.value["sigma"])
    for call, message in [
        (lambda: smallest_stiffness(eq, 0), "count is 0: give a whole number from 1"),
        (
            lambda: smallest_stiffness(eq, accuracy=0),
            "accuracy is 0: give a number between 0 and 1",
        ),
        (lambda: smallest_stiffness(eq.system), "give the Equilibrium"),  # type: ignore[arg-type]
        (lambda: modes.stiffness(eq), "give a System"),  # type: ignore[arg-type]
        (
            lambda: modes.stiffness(ms.stack([eq.system, eq.system])),
            "the stiffness is of one system",
        ),
        (
            lambda: modes.stiffness(ms.load_system("binary_lj_glass")),
            r"the system has 1,500 coordinates",
        ),
    ]:
        with pytest.raises(ms.InputError, match=message):
            call()


def test_the_table_says_what_was_found():
    text = str(smallest_stiffness(crystal()))
    assert "mean of" in text and "DEGENERATE" in text and "gap to the next" in text
