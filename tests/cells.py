"""Small systems in relaxed cells: under a stress, at a volume, with some strains free."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from conftest import relative

import mdsens as ms
from mdsens.mechanics.load import CellLoad
from mdsens.mechanics.strain import from_mandel, to_mandel
from mdsens.relaxation import AtPressure, AtStress, AtVolume
from mdsens.relaxation.cell_conditions import condition_of

TOLERANCE = 3e-14
STRESS = np.array([[-0.06, 0.004], [0.004, -0.05]])
DEVIATOR = np.array([[-0.004, 0.002], [0.002, 0.004]])
IN_PLANE = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 0]], bool)
ALONG_X = np.array([[True, False], [False, False]])
STRESS_3D = np.array([[-0.05, 0.003, 0.0], [0.003, -0.04, 0.002], [0.0, 0.002, -0.045]])
# In eV/Å^3, 80 MPa of tension and 32 MPa of shear: a strain of about a hundredth.
TENSION = np.array([[5e-4, 2e-4, 0.0], [2e-4, -3e-4, 0.0], [0.0, 0.0, 9.9]])

KINDS = ("stress", "volume", "along x", "spheres", "vacancy")


@cache
def discs(seed: int = 0) -> ms.System:
    rng = np.random.default_rng(seed)
    params = {"sigma": np.linspace(0.8, 1.2, 32), "epsilon": 1.0, "alpha": 2.0}
    return ms.System.create(5.3 * rng.random((32, 2)), 5.3, ms.potentials.soft_sphere(), params)


@cache
def spheres() -> ms.System:
    rng = np.random.default_rng(3)
    params = {"sigma": np.linspace(0.9, 1.3, 32), "epsilon": 1.0, "alpha": 2.0}
    return ms.System.create(3.1 * rng.random((32, 3)), 3.1, ms.potentials.soft_sphere(), params)


@cache
def at_rest(kind: str) -> Any:
    start, condition = {
        "stress": (discs, AtStress(STRESS)),
        "volume": (discs, AtVolume(DEVIATOR)),
        "along x": (discs, AtPressure(0.05, shape=True, free=ALONG_X)),
        "spheres": (spheres, AtStress(STRESS_3D)),
        # its component zz is off, since the cell does not strain along z
        "vacancy": (lambda: ms.load_system("argon_vacancy"), AtStress(TENSION, IN_PLANE)),
    }[kind]
    return ms.minimize(start(), cell=condition, tolerance=TOLERANCE)


@cache
def linearized(kind: str) -> Any:
    return ms.linearize(at_rest(kind))


def directions(kind: str) -> dict[str, dict[str, Any]]:
    """Changes of the parameters, of the load, and of both."""
    eq = at_rest(kind)
    rng = np.random.default_rng(1)
    sigma = np.asarray(eq.params["sigma"])
    changes: dict[str, dict[str, Any]] = {"sigma": {"sigma": rng.normal(size=sigma.shape)}}
    for name, value in eq.load.params.items():
        change = rng.normal(size=value.shape)
        changes[name] = {name: change + change.T}
    changes["all"] = {k: v for one in changes.values() for k, v in one.items()}
    return changes


def again(
    eq: ms.Equilibrium, dparams: dict[str, Any], t: float, tolerance: float = TOLERANCE
) -> ms.Equilibrium:
    """The minimum at params + t dparams, minimized from this one."""
    load: CellLoad | None = eq.load
    assert load is not None
    params = {k: eq.params[k] + t * v for k, v in dparams.items() if k in eq.params}
    load = load.at({k: v + t * dparams.get(k, 0.0) for k, v in load.params.items()})
    return ms.minimize(eq.system, params, cell=condition_of(eq, load), tolerance=tolerance)


def slope(f: Any, h: float) -> Any:
    """Central differences at h and h / 2, extrapolated: the error falls as h^4."""
    whole, half = ((f(t) - f(-t)) / (2 * t) for t in (h, 0.5 * h))
    return (4 * half - whole) / 3


def along(gradient: dict[str, Any], dparams: dict[str, Any]) -> Any:
    """The derivative along a direction, from that by each parameter."""
    return sum(
        np.tensordot(np.asarray(gradient[k]), np.asarray(v, float), axes=np.ndim(v))
        for k, v in dparams.items()
    )


def with_load(eq: ms.Equilibrium, **fields: Any) -> ms.Equilibrium:
    """The same configuration, as if it had been relaxed under another load."""
    none = {"pressure": None, "at_stress": None, "at_volume": None}
    return dataclasses.replace(eq, **(none | fields))


def observables(system: ms.System) -> jax.Array:
    """Energy, volume, and the stress that no load fixes; of a slab, energy and area."""
    if not system.has_volume:
        return jnp.stack([ms.observables.energy(system), system.periodic_volume])
    return jnp.concatenate(
        [
            jnp.stack([ms.observables.energy(system), system.volume]),
            to_mandel(ms.observables.stress(system)),
        ]
    )


def assert_responds_as_minimized_again(
    lin: ms.Linearization, dparams: dict[str, Any], h: float
) -> None:
    """Positions, cell, energy, volume and stress change as they do by minimizing again."""
    eq = lin.equilibrium
    n, d = eq.positions.shape

    def measured(t: float) -> Any:
        there = again(eq, dparams, t).system
        return np.concatenate(
            [np.ravel(there.positions), np.ravel(np.asarray(there.box)), observables(there)]
        )

    whole = slope(measured, h)
    moved, box = whole[: n * d].reshape(n, d), whole[n * d : n * d + d * d].reshape(d, d)
    r = ms.jvp(lin, dparams)
    strain = np.asarray(from_mandel(r.value.strain))
    assert r.status is ms.Status.CONVERGED
    assert relative(strain @ np.asarray(eq.system.box), box) < 1e-6
    counted = ~np.asarray(r.rattlers)
    gap = (moved - np.asarray(r.value.positions))[counted]
    gap -= gap.mean(axis=0)  # a translation costs nothing
    assert np.linalg.norm(gap) < 1e-6 * np.linalg.norm(moved[counted])
    slopes = along(ms.gradient(observables, lin).value, dparams)
    wanted = whole[n * d + d * d :]
    np.testing.assert_allclose(slopes, wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())
