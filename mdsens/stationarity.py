"""The stationarity condition F = dU/dx = 0 and its derivatives: Hessian products, mixed products, the null space."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jax.core import Tracer

from mdsens import contacts
from mdsens.block_rows import BlockRows
from mdsens.boxes import components, nearest_images
from mdsens.contacts import Network
from mdsens.implicit.operators import Evening, Operator
from mdsens.neighbours import Neighbours
from mdsens.rigid_motions import NullSpace, orthonormal, pseudo_inverse, turned
from mdsens.slopes import energy_slope, row_terms
from mdsens.system import System
from mdsens.unknowns import Unknowns

__all__ = [
    "Unknowns",
    "along",
    "dense_hessian",
    "force",
    "gradient",
    "hessian_operator",
    "largest_force",
    "max_force",
    "mixed_product",
    "mixed_transpose",
    "null_space",
    "sparse_hessian",
]

Params = Mapping[str, Any]


def gradient(system: System, x: Unknowns, params: Params) -> Unknowns:
    """F(x, params) = dU/dx."""
    return Unknowns(energy_slope(system, params)(x.positions))


@jax.jit
def force(system: System) -> jax.Array:
    """-dU/dR, (n, d)."""
    return -gradient(system, Unknowns(system.positions), system.params).positions


@jax.jit
def largest_force(forces: jax.Array) -> jax.Array:
    """The largest norm of one particle's force, ASE's fmax."""
    return jnp.sqrt(jnp.max(jnp.sum(forces**2, axis=-1), initial=0.0))


@jax.jit
def max_force(system: System) -> jax.Array:
    """The largest norm of one particle's force in a system."""
    return largest_force(force(system))


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
    centre = plain._total(turns * net.whole) / counts[:, None]
    arms = turns * (jax.lax.stop_gradient(net.whole) - centre[net.labels])
    squared = jnp.sum(arms**2, axis=1)
    if d == 2:
        inertia = plain._total(squared[:, None])[:, :, None]
    else:
        each = squared[:, None, None] * jnp.eye(3) - arms[:, :, None] * arms[:, None, :]
        inertia = plain._total(each.reshape(n, 9)).reshape(n, 3, 3)
    return dataclasses.replace(plain, arms=arms, inverse_inertia=pseudo_inverse(inertia))


def _free_motions(system: System) -> jax.Array:
    """What costs nothing of the translations and, without a cell, the rotations of everything; (k, n, d)."""
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
    product = _hessian_product(system)

    def image(v: jax.Array) -> jax.Array:
        return product(Unknowns(v.reshape(n, d))).positions.ravel()

    probe = jnp.cos(jnp.arange(n * d, dtype=dtype) ** 2)
    scale = jnp.linalg.norm(image(probe)) / jnp.linalg.norm(probe)
    combinations, costs, _ = jnp.linalg.svd(jax.lax.map(image, rigid), full_matrices=False)
    free = costs <= jnp.finfo(dtype).eps ** 0.5 * scale
    return orthonormal(jnp.where(free[:, None], combinations.T @ rigid, 0.0), 0.5).reshape(-1, n, d)


def _hessian_product(system: System) -> Any:
    x = Unknowns(system.positions)
    return jax.linearize(lambda y: gradient(system, y, system.params), x)[1]


def hessian_operator(
    system: System, null: NullSpace, blocks: BlockRows | None = None, definite: bool = True
) -> Operator:
    """H = d2U/dx2 as products, linearised once at the system's positions, with its null space.

    Args:
      blocks: H as its blocks, where it is assembled.
      definite: whether it is that of a minimum; False at a saddle.
    """
    kind: dict[str, Any] = {"symmetric": True, "positive_semidefinite": definite}
    if blocks is None:
        return Operator(_hessian_product(system), **kind, project=null.project)

    def product(v: Unknowns) -> Unknowns:
        return Unknowns(blocks.product(v.positions))

    even = Evening(lambda v: blocks.evened(v.positions), blocks.evened_product)
    return Operator(product, **kind, project=null.project, even=even)


@jax.jit
def dense_hessian(system: System) -> jax.Array:
    """H as a matrix (n d, n d): for checks and for small systems."""
    n, d = system.positions.shape
    product = _hessian_product(system)
    rows = jax.vmap(lambda e: product(Unknowns(e.reshape(n, d))).positions.ravel())(jnp.eye(n * d))
    return rows


@jax.jit
def _pair_blocks(system: System) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """i, j and the block d2phi/dv2 (d, d, …) of each pair of each term, v the vector between the two.

    Of the list, each pair comes twice, as a row of each of its particles.
    """
    images, x = nearest_images(system.box), components(system.positions)
    blocks = []
    for term in row_terms(system):
        apart = images(tuple(c[term.i] - c[term.j] for c in x))
        r = jnp.sqrt(jnp.where(term.mask, sum(v * v for v in apart), 1.0))

        def slope(r: jax.Array, term: Any = term) -> jax.Array:
            return jax.grad(lambda s: jnp.sum(term.energy(s)))(r)

        first, second = jax.jvp(slope, (r,), (jnp.ones_like(r),))
        across, along = first / r, (second - first / r) / (r * r)
        block = [[along * v * w + (across if v is w else 0.0) for w in apart] for v in apart]
        blocks.append((term.i, term.j, jnp.stack([jnp.stack(line) for line in block])))
    return blocks


_pair_blocks_each = jax.jit(jax.vmap(_pair_blocks))


def sparse_hessian(system: System) -> sp.csr_array | None:
    """H as a scipy sparse matrix (n d, n d), from the pairs that interact; None for laws that are more than pairs.

    Of a batch, (members n d, members n d) with a block for each member.
    """
    if not system.potential.pairwise:
        return None
    n, d, members = system.n, system.dimension, system.batch
    total = n * (members or 1)
    fixed = system.replace(potential=system.potential.at(system.params), neighbours=_filled_rows(system.neighbours))
    firsts, seconds, blocks = [np.zeros(0, int)], [np.zeros(0, int)], [np.zeros((0, d, d))]
    for i, j, block in (_pair_blocks if members is None else _pair_blocks_each)(fixed):
        block, i, j = np.asarray(block, float), np.asarray(i), np.asarray(j)
        twice = j.ndim == (1 if members is None else 2)  # a list of bonds has each pair once
        if members is not None:
            shift = (n * np.arange(members)).reshape(-1, *[1] * (j.ndim - 1))
            block, i, j = np.moveaxis(block, 0, 2), i + shift, j + shift
        some = np.any(block != 0, axis=(0, 1))
        found = np.ascontiguousarray(np.moveaxis(block[:, :, some], -1, 0))
        one, other = np.broadcast_to(i, j.shape)[some], j[some]
        firsts += [one, other] if twice else [one]
        seconds += [other, one] if twice else [other]
        blocks += [found, found] if twice else [found]
    first, second, block = np.concatenate(firsts), np.concatenate(seconds), np.concatenate(blocks)
    own = np.stack([np.bincount(first, block[:, a, b], total) for a in range(d) for b in range(d)], axis=-1)
    particles = np.arange(total)
    first, second = np.concatenate([first, particles]), np.concatenate([second, particles])
    block = np.concatenate([-block, own.reshape(total, d, d)])
    order = np.argsort(first, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(first, minlength=total))])
    matrix = sp.bsr_array((block[order], second[order], starts), shape=(total * d, total * d)).tocsr()
    if len(blocks) > 2:  # two terms, or bonds, may hold the same pair
        matrix.sum_duplicates()
    return matrix


def _filled_rows(listed: Neighbours) -> Neighbours:
    """The list without the rows that are empty, but for some that make their number a multiple of 4. Host code."""
    if isinstance(listed.rows, Tracer):
        return listed
    rows = np.asarray(listed.rows)
    filled = np.any(rows < rows.shape[-1], axis=(*range(rows.ndim - 2), -1))
    used = int(np.max(np.flatnonzero(filled), initial=-1)) + 1
    fewer = 4 * math.ceil(used / 4)
    return listed if fewer >= rows.shape[-2] else dataclasses.replace(listed, rows=rows[..., :fewer, :])


def along(f: Callable[[dict[str, Any]], Any], params: Params, dparams: Params) -> Any:
    """The derivative of f(params) along changes of some of them."""
    moving = {name: params[name] for name in dparams}
    return jax.jvp(lambda some: f({**params, **some}), (moving,), (dict(dparams),))[1]


@jax.jit
def mixed_product(system: System, dparams: Params) -> Unknowns:
    """d2U/dx dp . dp, the change of the gradient along changes of some parameters."""
    x = Unknowns(system.positions)
    return along(lambda p: gradient(system, x, p), system.params, dparams)


def mixed_transpose(system: System, cotangent: Unknowns) -> dict[str, jax.Array]:
    """(d2U/dx dp)^T w, a dict shaped like the parameters."""
    x = Unknowns(system.positions)
    return jax.vjp(lambda p: gradient(system, x, p), dict(system.params))[1](cotangent)[0]


def linearisation(
    system: System, max_force_left: jax.Array | float, least: int | None = None
) -> tuple[System, Network, NullSpace]:
    """What every derivative at a minimum needs: the backbone, the network and the null space; of each in a batch.

    ``least`` contacts hold a particle, see :func:`mdsens.contacts.network`.
    """
    at = system.replace(potential=system.potential.at(system.params), neighbours=_filled_rows(system.neighbours))
    left: Any = max_force_left
    if not isinstance(left, jax.Array):
        left = np.asarray(left, system.positions.dtype)  # one type, compiled once
    held, net, null = _linearisation(at, left, least)
    return held.replace(potential=system.potential), net, null


@functools.partial(jax.jit, static_argnames=("least",))
def _linearisation(system: System, max_force_left: Any, least: int | None) -> tuple[System, Network, NullSpace]:
    if system.batch is not None:
        return jax.vmap(functools.partial(_linearisation, least=least))(system, max_force_left)
    net = contacts.network(system, max_force_left, least)
    held = contacts.backbone(system, net)
    return held, net, null_space(held, net)
