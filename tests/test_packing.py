"""Packings compressed and decompressed to a packing fraction."""

from __future__ import annotations

import numpy as np
import pytest

import mdsens as ms


@pytest.fixture(scope="module")
def discs() -> ms.Equilibrium:
    sigma = np.random.default_rng(3).uniform(0.8, 1.2, 64)
    length = float(np.sqrt(np.pi / 4 * np.sum(sigma**2) / 0.95))
    potential, params = ms.potentials.soft_sphere(), {"sigma": sigma, "epsilon": 1.0, "alpha": 2.0}
    start = ms.System.create(
        np.random.default_rng(4).random((64, 2)) * length, length, potential, params
    )
    return ms.minimize(start)


def test_there_and_back_along_the_same_packing(discs: ms.Equilibrium) -> None:
    there = ms.packing.compress(discs, 0.97)
    np.testing.assert_allclose(ms.observables.packing_fraction(there.system), 0.97, rtol=1e-12)
    assert int(there.status) == 0 and float(there.max_force) <= 1e-12
    assert float(ms.observables.pressure(there.system)) > float(
        ms.observables.pressure(discs.system)
    )
    back = ms.packing.compress(there, 0.95, step=0.002)
    np.testing.assert_allclose(
        np.asarray(back.system.box), np.asarray(discs.system.box), rtol=1e-12
    )
    # the bulk modulus of Birch says how the pressure rises: V = N / phi
    near = ms.packing.compress(discs, 0.95 * (1 + 1e-7))
    rise = float(ms.observables.pressure(near.system)) - float(
        ms.observables.pressure(discs.system)
    )
    bulk = float(ms.elasticity.isotropic(ms.elasticity.moduli(discs).birch).bulk)
    assert rise / 1e-7 == pytest.approx(bulk, rel=1e-4)


def test_a_relaxation_that_stops_short_says_where(discs: ms.Equilibrium) -> None:
    with pytest.raises(ms.ConvergenceError, match=r"compress stopped at packing fraction 0\.9[56]"):
        ms.packing.compress(discs, 0.99, max_steps=2)
    kept = ms.packing.compress(discs, 0.99, max_steps=2, throw=False)
    assert int(kept.status) == ms.Status.MAX_STEPS_REACHED


def test_bad_input_is_named(discs: ms.Equilibrium) -> None:
    with pytest.raises(ms.InputError, match="`packing_fraction` is -1"):
        ms.packing.compress(discs, -1.0)
    with pytest.raises(ms.InputError, match="`step` is 0"):
        ms.packing.compress(discs, 0.97, step=0.0)
    with pytest.raises(ms.InputError, match="give a System"):
        ms.packing.compress(3, 0.9)  # type: ignore[arg-type]
    with pytest.raises(ms.InputError, match="open"):
        ms.packing.compress(ms.load_system("dimer"), 0.9)
