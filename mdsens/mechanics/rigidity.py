"""This module finds the contacts, the backbone and the null space of the Hessian at a minimum.

The backbone is the system without the contacts of rattlers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mdsens._util.compilation import compiled
from mdsens._util.precision import full_precision
from mdsens._util.probe import chirp
from mdsens.mechanics import contacts
from mdsens.mechanics.contacts import Network
from mdsens.mechanics.hessian import hessian_product
from mdsens.mechanics.null_space import NullSpace, orthonormal, pseudo_inverse, turned
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.neighbors import filled_rows
from mdsens.model.system import System

__all__ = ["null_space", "analyze_rigidity"]


def null_space(system: System, net: Network) -> NullSpace:
    """Compute the null space of the Hessian that follows from symmetry and the contact network.

    It consists of displacements of rattlers and of rigid motions that cost no energy.

    Args:
      system: the system at a minimum.
      net: the contact network of the system.
    """
    n, d = system.positions.shape
    positions = jax.lax.stop_gradient(system.positions)
    in_network = jnp.where(net.rattlers, 0.0, 1.0).astype(positions.dtype)
    counts = jnp.maximum(jnp.zeros(n, positions.dtype).at[net.labels].add(in_network), 1.0)
    without_rotations = NullSpace(net.rattlers, net.labels, counts)
    if not system.potential.listed:
        motions = _free_motions(jax.lax.stop_gradient(system))
        return dataclasses.replace(without_rotations, motions=motions)
    total = without_rotations.cluster_total
    # A cluster that meets its periodic image cannot rotate: its arms are zero. One that meets its
    # images along a single axis can rotate about this axis.
    is_wire = jnp.sum(net.axes**2, axis=1) > 0
    rotates = jnp.where((net.wraps & ~is_wire)[net.labels], 0.0, in_network)[:, None]
    center = total(rotates * net.whole) / counts[:, None]
    arms = rotates * (jax.lax.stop_gradient(net.whole) - center[net.labels])
    along = net.axes[net.labels]
    arms = arms - jnp.sum(arms * along, axis=1, keepdims=True) * along
    squared = jnp.sum(arms**2, axis=1)
    if d == 2:
        inertia = total(squared[:, None])[:, :, None]
    else:
        of_particle = squared[:, None, None] * jnp.eye(3) - arms[:, :, None] * arms[:, None, :]
        inertia = total(of_particle.reshape(n, 9)).reshape(n, 3, 3)
    inverse = pseudo_inverse(inertia)
    if d == 3:
        about = net.axes[:, :, None] * net.axes[:, None, :]
        moment = total(squared[:, None])[:, :1, None]
        of_wire = jnp.where(moment > 0, about / jnp.where(moment > 0, moment, 1.0), 0.0)
        inverse = jnp.where(is_wire[:, None, None], of_wire, inverse)
    return dataclasses.replace(without_rotations, arms=arms, inverse_inertia=inverse)


@full_precision
def _free_motions(system: System) -> jax.Array:
    """Compute the rigid motions (k, n, d) of the whole system that have no stiffness.

    They are combinations of the translations, and of the rotations that the periodic axes allow:
    all without a cell, and that about the axis of a wire. They are orthonormal, or zeros. The
    function is for energies that are not sums over pairs, such as those with an external field.
    There are n particles in d dimensions.
    """
    n, d = system.positions.shape
    dtype = system.positions.dtype
    basis = jnp.broadcast_to(jnp.eye(d, dtype=dtype)[:, None, :], (d, n, d))
    axes = _axes_of_rotation(system)
    if len(axes):
        arms = system.positions - jnp.mean(system.positions, axis=0)
        size = jnp.sqrt(jnp.mean(arms**2))
        turns = jax.vmap(lambda axis: turned(jnp.broadcast_to(axis, (n, axis.size)), arms))(axes)
        # over the extent, so that a rotation is compared with translations independently of the
        # unit
        basis = jnp.concatenate([basis, turns / jnp.where(size > 0, size, 1.0)])
    rigid = orthonormal(basis.reshape(-1, n * d), 1e-9)
    product = hessian_product(system)

    def image(v: jax.Array) -> jax.Array:
        return product(Unknowns(v.reshape(n, d))).positions.ravel()

    # The stiffness against a fixed vector with entries of every size and sign sets the scale.
    probe = chirp(n * d, dtype)
    scale = jnp.linalg.norm(image(probe)) / jnp.linalg.norm(probe)
    # Singular values of H on the rigid motions: the norms of the forces that combinations make.
    combinations, costs, _ = jnp.linalg.svd(jax.lax.map(image, rigid), full_matrices=False)
    free = costs <= jnp.finfo(dtype).eps ** 0.5 * scale
    # the singular values are one or zero, so that any limit between these will do
    return orthonormal(jnp.where(free[:, None], combinations.T @ rigid, 0.0), 0.5).reshape(-1, n, d)


def _axes_of_rotation(system: System) -> jax.Array:
    """Return the axes about which a system can rotate as a whole: (1, 1) in 2-D, (k, 3) in 3-D.

    There are none in a cell, all three without one, and one for a wire, periodic along one axis.
    """
    dtype = system.positions.dtype
    box = system.box
    if box is None:
        return jnp.eye(1 if system.dimension == 2 else 3, dtype=dtype)
    if system.dimension == 3 and sum(system.periodic) == 1:
        side = box[:, system.periodic.index(True)]
        return (side / jnp.sqrt(jnp.sum(side**2)))[None]
    return jnp.zeros((0, 3), dtype)


def analyze_rigidity(
    system: System, max_force_left: jax.Array | float, least: int | None = None
) -> tuple[System, Network, NullSpace]:
    """Find the backbone, the contact network and the null space of the Hessian of a relaxed system.

    The backbone is the system without the contacts of rattlers. Every derivative at a minimum needs
    these three. For a batch, they are found for each of its systems.

    Args:
      system: a relaxed system, or a batch of them.
      max_force_left: the largest net force that the relaxation left on a particle.
      least: smallest number of contacts that holds a particle, see
        :func:`mdsens.mechanics.contacts.network`.
    """
    # The potential in its cheapest form at these parameters, and no empty rows of neighbors.
    compact = system.replace(
        potential=system.potential.specialize(system.params),
        neighbors=filled_rows(system.neighbors),
    )
    left: Any = max_force_left
    if not isinstance(left, Tracer):
        # One type for all numbers, so that the function is compiled once.
        left = np.asarray(left, system.positions.dtype)
    backbone, net, null = _analyze_rigidity(compact, left, least)
    # the general form again: the special one may have wrong derivatives by the parameters
    return backbone.replace(potential=system.potential), net, null


@compiled(static_argnames=("least",))
def _analyze_rigidity(
    system: System, max_force_left: jax.Array, least: int | None
) -> tuple[System, Network, NullSpace]:
    """Find backbone, contact network and null space: the compiled part of `analyze_rigidity`."""
    if system.batch is not None:
        return jax.vmap(functools.partial(_analyze_rigidity, least=least))(system, max_force_left)
    net = contacts.network(system, max_force_left, least)
    backbone = contacts.backbone(system, net)
    return backbone, net, null_space(backbone, net)
