"""Systems in which nobody is near anybody: an answer or a sentence, never an error from inside jax."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import mdsens as ms

SOFT, SOFTLY = ms.potentials.soft_sphere(), {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0}
Status = ms.Status


def dilute(n: int, d: int = 2) -> ms.System:
    """Unit discs or spheres, ten diameters apart."""
    side = int(np.ceil(n ** (1 / d)))
    places = 10.0 * np.stack(np.unravel_index(np.arange(n), (side,) * d), axis=1) + 0.1
    return ms.System.create(places, 10.0 * side, SOFT, SOFTLY)


def far_atoms() -> ms.System:
    """Argon in angstrom with a sigma of 1, so that no atom is in range of another."""
    fcc = np.array([[0.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [0.0, 0.5, 0.5]])
    cells = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    places = 5.26 * (cells + fcc).reshape(-1, 3)
    return ms.System.create(places, 3 * 5.26, ms.potentials.lennard_jones(2.0, 2.5), {"sigma": 1.0, "epsilon": 1.0})


SYSTEMS: dict[str, Any] = {
    "one disc": lambda: dilute(1),
    "two discs": lambda: dilute(2),
    "12 discs": lambda: dilute(12),
    "80 discs": lambda: dilute(80),
    "108 far atoms": far_atoms,
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_where_nothing_is_in_reach_there_is_a_status(name: str):
    system = SYSTEMS[name]()
    eq = ms.minimize(system, throw=False)
    assert Status(int(eq.status)).good and float(eq.max_force) == 0.0
    np.testing.assert_array_equal(eq.positions, system.positions)
    r = ms.jvp(eq, {"sigma": 1.0}, throw=False)
    assert r.status is Status.UNJAMMED and not np.any(np.asarray(r.value)) and str(r)
    with pytest.raises(ms.ConvergenceError, match="no contact carries force"):
        ms.vjp(eq, np.ones(system.positions.shape))
    assert ms.certify(eq).status is Status.UNJAMMED


def test_dilute_discs_find_each_other_at_a_pressure():
    """Twelve far discs are brought together; at no pressure they stay apart, with a status."""
    eq = ms.minimize(dilute(12), pressure=0.05, throw=False)
    status = Status(int(eq.status))
    assert status in (Status.NO_REST, Status.CONVERGED, Status.ROUND_OFF_LIMITED)
    if status.good:
        assert float(ms.observables.pressure(eq.system)) == pytest.approx(0.05, rel=1e-6)
    assert Status(int(ms.minimize(dilute(12), pressure=0.0, throw=False).status)) is Status.NO_REST
