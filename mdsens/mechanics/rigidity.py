"""Rigid parts of a relaxed configuration: contact network, rattlers, null space."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens.mechanics import contacts
from mdsens.mechanics.contacts import Network
from mdsens.mechanics.hessian import filled_rows, hessian_product
from mdsens.mechanics.null_space import NullSpace, orthonormal, pseudo_inverse, turned
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.system import System

__all__ = ["null_space", "analyze_rigidity"]


def null_space(system: System, net: Network) -> NullSpace:
    """The null space of the Hessian that symmetry and the contact network give.

    Args:
      system: at a minimum.
      net: its mechanical network.
    """
    n, d = system.positions.shape
    positions = jax.lax.stop_gradient(system.positions)
    held = jnp.where(net.rattlers, 0.0, 1.0).astype(positions.dtype)
    counts = jnp.maximum(jnp.zeros(n, positions.dtype).at[net.labels].add(held), 1.0)
    plain = NullSpace(net.rattlers, net.labels, counts)
    if not system.potential.pairwise:
        return dataclasses.replace(plain, motions=_free_motions(jax.lax.stop_gradient(system)))
    turns = jnp.where(net.wraps[net.labels], 0.0, held)[:, None]
    center = plain._total(turns * net.whole) / counts[:, None]
    arms = turns * (jax.lax.stop_gradient(net.whole) - center[net.labels])
    squared = jnp.sum(arms**2, axis=1)
    if d == 2:
        inertia = plain._total(squared[:, None])[:, :, None]
    else:
        each = squared[:, None, None] * jnp.eye(3) - arms[:, :, None] * arms[:, None, :]
        inertia = plain._total(each.reshape(n, 9)).reshape(n, 3, 3)
    return dataclasses.replace(plain, arms=arms, inverse_inertia=pseudo_inverse(inertia))


def _free_motions(system: System) -> jax.Array:
    """What costs nothing of the translations and, without a cell, the rotations of everything; (k,
    n, d).
    """
    n, d = system.positions.shape
    dtype = system.positions.dtype
    basis = jnp.broadcast_to(jnp.eye(d, dtype=dtype)[:, None, :], (d, n, d))
    if system.box is None:
        arms = system.positions - jnp.mean(system.positions, axis=0)
        size = jnp.sqrt(jnp.mean(arms**2))
        axes = jnp.eye(1 if d == 2 else 3, dtype=dtype)
        turns = jax.vmap(lambda axis: turned(jnp.broadcast_to(axis, (n, axis.size)), arms))(axes)
        basis = jnp.concatenate([basis, turns / jnp.where(size > 0, size, 1.0)])
    rigid = orthonormal(basis.reshape(-1, n * d), 1e-9)
    product = hessian_product(system)

    def image(v: jax.Array) -> jax.Array:
        return product(Unknowns(v.reshape(n, d))).positions.ravel()

    probe = jnp.cos(jnp.arange(n * d, dtype=dtype) ** 2)
    scale = jnp.linalg.norm(image(probe)) / jnp.linalg.norm(probe)
    combinations, costs, _ = jnp.linalg.svd(jax.lax.map(image, rigid), full_matrices=False)
    free = costs <= jnp.finfo(dtype).eps ** 0.5 * scale
    return orthonormal(jnp.where(free[:, None], combinations.T @ rigid, 0.0), 0.5).reshape(-1, n, d)


def analyze_rigidity(
    system: System, max_force_left: jax.Array | float, least: int | None = None
) -> tuple[System, Network, NullSpace]:
    """What every derivative at a minimum needs: the backbone, the network and the null space; of
    each in a batch.

    ``least`` contacts hold a particle, see :func:`mdsens.mechanics.contacts.network`.
    """
    at = system.replace(
        potential=system.potential.at(system.params), neighbors=filled_rows(system.neighbors)
    )
    left: Any = max_force_left
    if not isinstance(left, jax.Array):
        left = np.asarray(left, system.positions.dtype)  # one type, compiled once
    held, net, null = _analyze_rigidity(at, left, least)
    return held.replace(potential=system.potential), net, null


@functools.partial(jax.jit, static_argnames=("least",))
def _analyze_rigidity(
    system: System, max_force_left: Any, least: int | None
) -> tuple[System, Network, NullSpace]:
    if system.batch is not None:
        return jax.vmap(functools.partial(_analyze_rigidity, least=least))(system, max_force_left)
    net = contacts.network(system, max_force_left, least)
    held = contacts.backbone(system, net)
    return held, net, null_space(held, net)
