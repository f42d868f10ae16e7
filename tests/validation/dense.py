"""The truth about a small minimum by dense matrices: the Hessian of the energy by jax, and its
pseudo-inverse. The neighbor list is that of the minimum; everything else is plain algebra.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mdsens as ms
from mdsens.model.system import potential_energy

Params = Mapping[str, Any]


def energy_of(system: ms.System, places: jax.Array, params: Params, strain: Any = None) -> Any:
    """The energy at other positions (n d,), parameters, and a symmetric strain (d, d)."""
    positions = places.reshape(system.positions.shape)
    if strain is None:
        return potential_energy(system, positions, params)
    return potential_energy(system, positions, params, strain=0.5 * (strain + strain.T))


def hessian_of(system: ms.System, places: jax.Array, params: Params) -> jax.Array:
    """d2U/dR2, (n d, n d)."""
    return jax.hessian(functools.partial(energy_of, system), 0)(places, params)


def tensor_of(
    system: ms.System, null: jax.Array, places: jax.Array, params: Params, hessian: jax.Array
) -> jax.Array:
    """The moduli V^-1 (d2U/dstrain2 - d2U/dstrain dR H^+ d2U/dR dstrain), (d, d, d, d)."""
    d = system.dimension
    at = (places, params, jnp.zeros((d, d)))
    energy = functools.partial(energy_of, system)
    affine = jax.jacfwd(jax.grad(energy, 2), 2)(*at)
    mixed = jax.jacfwd(jax.grad(energy, 0), 2)(*at).reshape(-1, d * d)
    relaxed = mixed.T @ jnp.linalg.solve(hessian + null @ null.T, mixed)
    return (affine - relaxed.reshape(affine.shape)) / system.volume


@jax.jit
def _matrices(system: ms.System, places: jax.Array, params: Params) -> Any:
    slope = jax.grad(functools.partial(energy_of, system))
    mixed = jax.jacfwd(slope, 1)(places, params)
    return slope(places, params), hessian_of(system, places, params), mixed


@jax.jit
def _along(
    system: ms.System, null: jax.Array, places: jax.Array, params: Params, change: Any
) -> Any:
    """The Hessian and the moduli, and how both change along positions and parameters."""

    def values(places: jax.Array, params: Params) -> Any:
        hessian = hessian_of(system, places, params)
        if not system.has_volume:
            return hessian, None
        return hessian, tensor_of(system, null, places, params, hessian)

    return jax.jvp(values, (places, params), change)


class Dense:
    """Dense matrices at a stationary point.

    Attributes:
      slope: (n d,) the gradient of the energy, zero there.
      null: (n d, k) orthonormal motions that cost nothing, those of a rigid body.
      values, vectors: eigenvalues and modes of the rest.
    """

    def __init__(self, system: ms.System) -> None:
        self.system = system
        self.params = dict(system.params)
        self.places = system.positions.ravel()
        slope, hessian, mixed = _matrices(system, self.places, self.params)
        self.slope = np.asarray(slope)
        self.hessian = np.asarray(hessian)
        self.mixed = {k: np.asarray(m).reshape(len(self.places), -1) for k, m in mixed.items()}
        self.null = self._rigid()
        basis = np.linalg.svd(self.null)[0][:, self.null.shape[1] :]
        self.values, modes = np.linalg.eigh(basis.T @ self.hessian @ basis)
        self.vectors = basis @ modes

    def _rigid(self) -> np.ndarray:
        n, d = self.system.positions.shape
        motions = [np.tile(axis, n) for axis in np.eye(d)]
        arms = np.asarray(self.system.positions)
        arms = arms - arms.mean(axis=0)
        for a in range(d if self.system.box is None else 0):
            for b in range(a):
                turn = np.zeros((d, d))
                turn[a, b], turn[b, a] = 1.0, -1.0
                motions.append((arms @ turn.T).ravel())
        return np.linalg.qr(np.array(motions).T)[0]

    def solve(self, b: np.ndarray, free: np.ndarray | None = None) -> np.ndarray:
        """H^+ b; or with some coordinates pinned, all but those in ``free``."""
        flat = np.asarray(b).reshape(len(self.places), -1)
        if free is None:
            return self.vectors @ ((self.vectors.T @ flat) / self.values[:, None])
        result = np.zeros_like(flat)
        result[free] = np.linalg.solve(self.hessian[np.ix_(free, free)], flat[free])
        return result

    def pushed(self, change: Params, free: np.ndarray | None = None) -> np.ndarray:
        """dR along a change of the parameters, (n, d)."""
        forces = [self.mixed[k] @ np.ravel(v) for k, v in change.items()]
        return -self.solve(np.sum(forces, axis=0), free).reshape(self.system.positions.shape)

    def jacobian(self, name: str) -> np.ndarray:
        """dR / dp, (n, d, *shape of p)."""
        shape = self.system.positions.shape + np.shape(self.params[name])
        return -self.solve(self.mixed[name]).reshape(shape)

    def pulled(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """d(w . R) / dp."""
        adjoint = self.solve(weights)[:, 0]
        return {k: -(adjoint @ m).reshape(np.shape(self.params[k])) for k, m in self.mixed.items()}

    def gradient(self, observable: Callable[[ms.System], jax.Array]) -> dict[str, np.ndarray]:
        """The total derivative of a number by each parameter."""
        slopes = _slopes(observable, self.system)
        pulled = self.pulled(slopes.positions)
        return {k: np.asarray(slopes.params[k]) + v for k, v in pulled.items()}

    def along(self, change: Params, moved: np.ndarray) -> Any:
        """((Hessian, moduli), (their derivatives along both)); moduli None without a volume."""
        tangent = (jnp.asarray(moved).ravel(), {k: jnp.asarray(v) for k, v in change.items()})
        return _along(self.system, jnp.asarray(self.null), self.places, self.params, tangent)


@functools.partial(jax.jit, static_argnums=0)
def _slopes(observable: Callable[[ms.System], jax.Array], system: ms.System) -> ms.System:
    return jax.grad(observable, allow_int=True)(system)
