"""Potentials of the generated cases: those of the catalogue, and some of a user's own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mdsens as ms


def _bump(r: jax.Array, sigma: jax.Array, epsilon: jax.Array) -> jax.Array:
    inside = jnp.maximum(1.0 - (r / sigma) ** 2, 0.0)
    return epsilon * inside**3


def _mie(r: jax.Array, sigma: jax.Array, epsilon: jax.Array) -> jax.Array:
    s3 = (sigma / r) ** 3
    return epsilon * (s3**3 - s3**2)


def _first(sigma: Any, *rest: Any) -> Any:
    return sigma


def _trap(positions: jax.Array, params: Any, displacement: Any) -> jax.Array:
    """Springs to the planes through the origin whose normals are the rows of ``trap``."""
    return 0.5 * jnp.sum((positions @ params["trap"].T) ** 2)


def _embedded(positions: jax.Array, params: Any, displacement: Any) -> jax.Array:
    """U = sum_i (density_i - wanted)^2, density_i = sum_j exp(-r_ij^2 / reach^2)."""
    vectors = jax.vmap(lambda a: jax.vmap(lambda b: displacement(a, b))(positions))(positions)
    density = jnp.sum(jnp.exp(-jnp.sum(vectors**2, axis=-1) / params["reach"] ** 2), axis=1) - 1.0
    return jnp.sum((density - params["wanted"]) ** 2)


def _all_pairs(positions: jax.Array, params: Any, displacement: Any) -> jax.Array:
    """Lennard-Jones, as an energy of which nothing is known but its value."""
    i, j = np.triu_indices(positions.shape[0], 1)
    s6 = (params["size"] ** 2 / jnp.sum((positions[i] - positions[j]) ** 2, axis=-1)) ** 3
    return 4.0 * params["depth"] * jnp.sum(s6 * s6 - s6)


POTENTIALS: dict[str, Any] = {
    "all pairs": ms.potentials.from_energy(_all_pairs, ("size", "depth")),
    "soft_sphere": ms.potentials.soft_sphere(),
    "lennard_jones": ms.potentials.lennard_jones(2.0, 2.5),
    "morse": ms.potentials.morse(1.5, 1.8),
    "bump": ms.potentials.from_pair(
        _bump, ("sigma", "epsilon"), _first, _first, positive=True, repulsive=True
    ),
    "mie": ms.potentials.from_pair(
        ms.potentials.switched(_mie, 2.0, 2.5),
        ("sigma", "epsilon"),
        2.5,
        (2.0, 2.5),
        {"epsilon": ms.potentials.geometric},
        positive=True,
    ),
    "trap": ms.potentials.from_energy(_trap, ("trap",)),
    "embedded": ms.potentials.from_energy(_embedded, ("reach", "wanted")),
}


# no length in them is fixed, so any unit will do
SCALED = {"soft_sphere", "bump", "springs", "ring", "trap", "embedded", "all pairs"}


def cell_of(params: Any) -> jax.Array:
    """A box as a function of the parameters: its area follows the sum of squared sigmas."""
    return jnp.diag(jnp.array([1.0, 1.1])) * jnp.sqrt(jnp.mean(params["sigma"] ** 2)) * 2.6
