"""Starts whose symmetry keeps the forces from leaving a saddle:
every one ends in a minimum, or says that it does not.

Checked by all eigenvalues of the dense Hessian, or, of large systems, by Lanczos on the assembled
one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LONG
from scipy.sparse.linalg import eigsh

import mdsens as ms
from mdsens.mechanics.hessian import dense_hessian, sparse_hessian
from mdsens.mechanics.hessian_factor import HessianFactor
from mdsens.relaxation.methods import Fire

Status = ms.Status
SOFT, SOFTLY = ms.potentials.soft_sphere(), {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0}
LONG_RANGE, SHORT_RANGE = (
    ms.potentials.lennard_jones(4.0, 5.0),
    ms.potentials.lennard_jones(2.0, 2.5),
)
UNIT = {"sigma": 1.0, "epsilon": 1.0}


def lennard_jones(R: jax.Array, params: Any, displacement: Any) -> jax.Array:
    i, j = np.triu_indices(R.shape[0], 1)
    s6 = 1.0 / jnp.sum((R[i] - R[j]) ** 2, axis=-1) ** 3
    return 4.0 * params["epsilon"] * jnp.sum(s6 * s6 - s6)


BY_ENERGY = ms.potentials.from_energy(lennard_jones, ("epsilon",))


def polygon(m: int, d: int) -> np.ndarray:
    turn, places = 2.0 * np.pi * np.arange(m) / m, np.zeros((m, d))
    places[:, 0], places[:, 1] = np.cos(turn), np.sin(turn)
    return 0.6 / np.sin(np.pi / m) * places


def line(m: int, d: int) -> np.ndarray:
    return np.stack([1.1 * np.arange(m), *[np.zeros(m)] * (d - 1)], axis=1)


def lattice(m: int, d: int, constant: float) -> np.ndarray:
    return constant * np.stack(np.meshgrid(*[np.arange(m)] * d, indexing="ij"), -1).reshape(-1, d)


def cluster(places: np.ndarray, potential: Any = LONG_RANGE) -> ms.System:
    return ms.System.create(
        places, None, potential, {"epsilon": 1.0} if potential is BY_ENERGY else UNIT
    )


def crystal(m: int, d: int, impurity: float = 1.0) -> ms.System:
    """A square or simple cubic lattice of soft spheres, one of them of another size."""
    places = lattice(m, d, 0.85)
    sigma = np.ones(len(places))
    sigma[len(places) // 2] = impurity
    return ms.System.create(places, 0.85 * m, SOFT, {**SOFTLY, "sigma": sigma})


def triangular(m: int, impurity: float) -> ms.System:
    places = 0.95 * np.array(
        [[i + 0.5 * (j % 2), j * np.sqrt(3) / 2] for j in range(m) for i in range(m)]
    )
    sigma = np.ones(m * m)
    sigma[m * m // 2 + m // 2] = impurity
    return ms.System.create(
        places, [0.95 * m, 0.95 * m * np.sqrt(3) / 2], SOFT, {**SOFTLY, "sigma": sigma}
    )


def row(d: int) -> ms.System:
    """Five discs that press on each other through the cell, in a straight line."""
    places = np.full((5, d), 2.0)
    places[:, 0] = 0.8 * np.arange(5)
    return ms.System.create(places, 4.0, SOFT, SOFTLY)


STARTS: dict[str, Callable[[], ms.System]] = {
    "pentagon in space, an energy": lambda: cluster(polygon(5, 3), BY_ENERGY),
    "line in the plane": lambda: cluster(line(5, 2)),
    "row": lambda: row(2),
    "row in space": lambda: row(3),
}
LONG_STARTS: dict[str, Callable[[], ms.System]] = {
    "square lattice, 100": lambda: crystal(10, 2),
    **{
        f"polygon of {m} in space, an energy": lambda m=m: cluster(polygon(m, 3), BY_ENERGY)
        for m in (4, 6, 7)
    },
    **{f"polygon of {m} in the plane": lambda m=m: cluster(polygon(m, 2)) for m in (4, 5, 6, 8)},
    **{f"polygon of {m} in space": lambda m=m: cluster(polygon(m, 3)) for m in (4, 5, 6)},
    **{f"line of {m} in the plane": lambda m=m: cluster(line(m, 2)) for m in (3, 8)},
    **{f"line of {m} in space": lambda m=m: cluster(line(m, 3)) for m in (3, 5)},
    **{
        f"line of {m} in space, an energy": lambda m=m: cluster(line(m, 3), BY_ENERGY)
        for m in (3, 5)
    },
    **{f"cube of {m**3}": lambda m=m: cluster(lattice(m, 3, 1.1)) for m in (2, 3)},
    "cube of 8, an energy": lambda: cluster(lattice(2, 3, 1.1), BY_ENERGY),
    **{f"square lattice, {m * m}": lambda m=m: crystal(m, 2) for m in (16, 30, 54)},
    **{f"simple cubic lattice, {m**3}": lambda m=m: crystal(m, 3) for m in (5, 8, 10, 14)},
    **{
        f"square lattice of Lennard-Jones, {m * m}": lambda m=m: ms.System.create(
            lattice(m, 2, 1.1), 1.1 * m, SHORT_RANGE, UNIT
        )
        for m in (10, 20)
    },
    **{
        f"simple cubic lattice of Lennard-Jones, {m**3}": lambda m=m: ms.System.create(
            lattice(m, 3, 1.08), 1.08 * m, SHORT_RANGE, UNIT
        )
        for m in (5, 7)
    },
    "square lattice, a large impurity": lambda: crystal(11, 2, 1.5),
    "square lattice, a small impurity": lambda: crystal(11, 2, 0.5),
    "simple cubic lattice, a large impurity": lambda: crystal(5, 3, 1.4),
    "triangular lattice, a large impurity": lambda: triangular(12, 1.6),
    "triangular lattice": lambda: triangular(12, 1.0),
    "plane in space": lambda: ms.System.create(
        np.c_[lattice(5, 2, 0.8), np.full(25, 2.0)], 4.0, SOFT, SOFTLY
    ),
}


def lowest(eq: ms.Equilibrium) -> float:
    """The lowest eigenvalue of the whole Hessian, of the largest one."""
    if eq.positions.size <= 1000:
        values = np.linalg.eigvalsh(np.asarray(dense_hessian(eq.system)))
        return float(values[0] / values[-1]) if values[-1] > 0 else 0.0  # nothing in contact
    matrix: Any = sparse_hessian(eq.system)
    start = np.random.default_rng(0).standard_normal(matrix.shape[0])
    solve: Any = eigsh  # whose stubs take whole numbers alone
    top = solve(matrix, 1, which="LA", tol=1e-3, v0=start, return_eigenvectors=False)[0]
    bottom = solve(
        matrix, 1, which="SA", tol=1e-6, v0=start, maxiter=20_000, ncv=60, return_eigenvectors=False
    )[0]
    return float(bottom / top)


@pytest.mark.parametrize(
    "name", [*STARTS, *[pytest.param(name, marks=LONG) for name in LONG_STARTS]]
)
def test_a_symmetric_start_ends_in_a_minimum(name: str):
    eq = ms.minimize({**STARTS, **LONG_STARTS}[name](), throw=False)
    assert Status(int(eq.status)).good, Status(int(eq.status)).name
    assert lowest(eq) > -1e-8
    assert int(eq.saddles) == 0 or float(eq.descent) > 0


def test_the_pentagon_becomes_a_bipyramid():
    """Known: -5.556 is the pentagon's energy, -9.103852 that of the triangular bipyramid."""
    start = cluster(polygon(5, 3), BY_ENERGY)
    saddle, eq = ms.minimize(start, leave_saddles=False), ms.minimize(start)
    assert Status(int(saddle.status)).good and not saddle.examined and int(saddle.saddles) == 0
    assert float(ms.observables.energy(saddle.system)) == pytest.approx(-5.556, abs=1e-3)
    assert float(ms.observables.energy(eq.system)) == pytest.approx(-9.103852, abs=1e-6)
    assert int(eq.saddles) == 1 and float(eq.descent) == pytest.approx(9.103852 - 5.556, abs=1e-3)
    assert "one was left" in str(eq)
    change = {"epsilon": 1.0}
    calls: dict[str, Any] = {
        "jvp": lambda **kw: ms.jvp(saddle, change, **kw),
        "vjp": lambda **kw: ms.vjp(saddle, np.ones((5, 3)), **kw),
        "gradient": lambda **kw: ms.gradient(ms.observables.energy, saddle, **kw),
        "jacobian": lambda **kw: ms.jacobian(saddle, "epsilon", **kw),
        "response": lambda **kw: ms.response(saddle, np.eye(5, 3), **kw),
    }
    for name, call in calls.items():
        assert int(np.max(call(throw=False).stats.status)) == Status.INDEFINITE, name
        with pytest.raises(ms.ConvergenceError, match="saddle"):
            call()


def test_members_of_a_batch_leave_their_saddles_each_for_itself():
    sizes = [1.0, 1.05]
    starts = [row(2).with_params({"sigma": s}) for s in sizes]
    batch = ms.minimize(ms.stack(starts))
    for member, start in zip(ms.unstack(batch), starts, strict=True):
        alone = ms.minimize(start)
        assert int(member.saddles) == int(alone.saddles) >= 1
        assert float(ms.observables.energy(member.system)) == pytest.approx(
            float(ms.observables.energy(alone.system)), abs=1e-12
        )


def test_lanczos_finds_what_all_eigenvalues_show():
    eq = ms.minimize(crystal(10, 2), method=Fire(), leave_saddles=False)
    lin = ms.linearize(eq, throw=False)
    stiffness = HessianFactor(lin.system, lin.null)
    stiffness.__dict__["factor"] = None  # as of a potential that is more than pairs
    found = stiffness.negative_mode()
    assert found is not None
    hessian = np.asarray(dense_hessian(lin.system))
    value, mode = found
    flat = mode.ravel()
    assert np.linalg.norm(flat) == pytest.approx(1.0, rel=1e-9)
    assert value == pytest.approx(flat @ hessian @ flat, rel=1e-9)
    assert value == pytest.approx(np.linalg.eigvalsh(hessian)[0], rel=1e-2)


# ── what carries force is no rattler ──


def test_a_row_under_pressure_buckles():
    """In a cell that follows a pressure, too: a straight row is a saddle of the enthalpy."""
    eq = ms.minimize(row(2), pressure=0.02, throw=False)
    assert int(eq.status) != Status.CONVERGED or lowest(eq) > -1e-8
    held = ms.minimize(row(2), leave_saddles=False)
    assert float(ms.observables.pressure(held.system)) > 0.01
    r = ms.jvp(held, {"sigma": 1.0}, throw=False)
    assert r.status is Status.INDEFINITE and not np.any(r.rattlers)


def test_rows_that_only_just_touch_are_told():
    """A minimum whose rows touch without a force: two derivatives, and the contacts say so."""
    places = 4.0 * np.random.default_rng(0).random((20, 2))
    eq = ms.minimize(ms.System.create(places, 4.0, SOFT, SOFTLY))
    assert float(ms.observables.pressure(eq.system)) == pytest.approx(0.059016994, abs=1e-8)
    r = ms.jvp(eq, {"sigma": 1.0}, throw=False)
    assert r.status is Status.CONTACTS_UNSETTLED and not np.any(r.rattlers)
    assert [code for code, _ in ms.certify(eq).findings] == [Status.CONTACTS_UNSETTLED]
    # it is a minimum: from next to it the relaxation comes back
    aside = 1e-4 * np.random.default_rng(1).standard_normal((20, 2))
    again = ms.minimize(eq.system.replace(positions=eq.positions + aside))
    assert float(ms.observables.energy(again.system)) == pytest.approx(
        float(ms.observables.energy(eq.system)), rel=1e-9
    )
