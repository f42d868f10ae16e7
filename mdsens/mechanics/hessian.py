"""The stationarity condition F = dU/dx = 0 and its derivatives: Hessian products, mixed products,
the null space.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jax.core import Tracer

from mdsens._util.lattice import components, nearest_images
from mdsens.implicit.linear.operators import Operator, SymmetricScaling
from mdsens.mechanics.forces import energy_gradient, row_terms
from mdsens.mechanics.hessian_blocks import BlockRows
from mdsens.mechanics.null_space import NullSpace
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.neighbors import Neighbors
from mdsens.model.system import System

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
    "sparse_hessian",
]

Params = Mapping[str, Any]


def gradient(system: System, x: Unknowns, params: Params) -> Unknowns:
    """F(x, params) = dU/dx."""
    return Unknowns(energy_gradient(system, params)(x.positions))


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


def hessian_product(system: System) -> Any:
    x = Unknowns(system.positions)
    return jax.linearize(lambda y: gradient(system, y, system.params), x)[1]


def hessian_operator(
    system: System, null: NullSpace, blocks: BlockRows | None = None, definite: bool = True
) -> Operator:
    """H = d2U/dx2 as products, linearized once at the system's positions, with its null space.

    Args:
      blocks: H as its blocks, where it is assembled.
      definite: whether it is that of a minimum; False at a saddle.
    """
    kind: dict[str, Any] = {"symmetric": True, "positive_semidefinite": definite}
    if blocks is None:
        return Operator(hessian_product(system), **kind, project=null.project)

    def product(v: Unknowns) -> Unknowns:
        return Unknowns(blocks.product(v.positions))

    scaling = SymmetricScaling(lambda v: blocks.scaled(v.positions), blocks.scaled_product)
    return Operator(product, **kind, project=null.project, scaling=scaling)


@jax.jit
def dense_hessian(system: System) -> jax.Array:
    """H as a matrix (n d, n d): for checks and for small systems."""
    n, d = system.positions.shape
    product = hessian_product(system)
    rows = jax.vmap(lambda e: product(Unknowns(e.reshape(n, d))).positions.ravel())(jnp.eye(n * d))
    return rows


@jax.jit
def _pair_blocks(system: System) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """i, j and the block d2phi/dv2 (d, d, …) of each pair of each term, v the vector between the
    two.

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
    """H as a scipy sparse matrix (n d, n d), from the pairs that interact; None for potentials that are
    more than pairs.

    Of a batch, (members n d, members n d) with a block for each member.
    """
    if not system.potential.pairwise:
        return None
    n, d, members = system.n, system.dimension, system.batch
    total = n * (members or 1)
    fixed = system.replace(
        potential=system.potential.at(system.params), neighbors=filled_rows(system.neighbors)
    )
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
    own = np.stack(
        [np.bincount(first, block[:, a, b], total) for a in range(d) for b in range(d)], axis=-1
    )
    particles = np.arange(total)
    first, second = np.concatenate([first, particles]), np.concatenate([second, particles])
    block = np.concatenate([-block, own.reshape(total, d, d)])
    order = np.argsort(first, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(first, minlength=total))])
    matrix = sp.bsr_array(
        (block[order], second[order], starts), shape=(total * d, total * d)
    ).tocsr()
    if len(blocks) > 2:  # two terms, or bonds, may hold the same pair
        matrix.sum_duplicates()
    return matrix


def filled_rows(listed: Neighbors) -> Neighbors:
    """The list without the rows that are empty, but for some that make their number a multiple of
    4. Host code.
    """
    if isinstance(listed.rows, Tracer):
        return listed
    rows = np.asarray(listed.rows)
    filled = np.any(rows < rows.shape[-1], axis=(*range(rows.ndim - 2), -1))
    used = int(np.max(np.flatnonzero(filled), initial=-1)) + 1
    fewer = 4 * math.ceil(used / 4)
    return (
        listed
        if fewer >= rows.shape[-2]
        else dataclasses.replace(listed, rows=rows[..., :fewer, :])
    )


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
