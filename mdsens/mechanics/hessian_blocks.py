"""This module stores the Hessian as scaled (d, d) blocks of interacting pairs, for fast products.

The products are compiled by JAX. Each particle has its own scaling.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jax.typing import DTypeLike

from mdsens._util.lattice import components
from mdsens._util.portable import Portable
from mdsens.mechanics.forces import ROWS

__all__ = ["BlockRows", "block_cholesky"]

# Smallest stiffness of a particle that Cholesky's method is used for, in units of the particle's
# largest stiffness. The largest stiffness itself counts as at least this part of that of the
# stiffest particle.
SOFTEST = 1e-3


def block_cholesky(blocked: sp.bsr_array) -> tuple[np.ndarray, np.ndarray]:
    """Compute the Cholesky factor C, and its inverse S, of each particle's block of the Hessian.

    The block is the diagonal block D (d, d) of the particle, with D = C C^T and S D S^T = 1. The
    method is written out for all particles at once. A block that is singular or not positive has no
    such factor, or a factor that would lose digits: this happens where a particle has no stiffness
    in some direction, or away from a minimum. For such a particle, C is the identity times the
    square root of the largest diagonal entry of D.

    Args:
      blocked: the Hessian as a scipy BSR matrix with blocks of (d, d).

    Returns:
      (S, C), lower triangular, stored as (d, d, n) each, for n particles.
    """
    d = blocked.blocksize[0]
    n = len(blocked.indptr) - 1
    is_diagonal = blocked.indices == np.repeat(np.arange(n), np.diff(blocked.indptr))
    diagonal = np.zeros((d, d, n))
    # a particle whose block is not stored keeps zeros, and counts as soft below
    diagonal[:, :, blocked.indices[is_diagonal]] = np.moveaxis(blocked.data[is_diagonal], 0, -1)
    largest = np.max(np.diagonal(diagonal), axis=1)
    # never zero, since its square root is divided by; ``or 1.0`` is for a Hessian of zeros
    largest = np.maximum(largest, SOFTEST * (largest.max(initial=0.0) or 1.0))
    s, c = np.zeros((2, d, d, n))
    soft = np.zeros(n, bool)
    for b in range(d):
        pivot = diagonal[b, b] - np.sum(c[b, :b] ** 2, axis=0)
        soft |= ~(pivot >= SOFTEST * largest)  # written so that a NaN counts as soft
        # any positive number will do for soft particles, whose factor is replaced after the loop
        c[b, b] = np.sqrt(np.where(soft, largest, pivot))
        for a in range(b + 1, d):
            c[a, b] = (diagonal[a, b] - np.sum(c[a, :b] * c[b, :b], axis=0)) / c[b, b]
    c[:, :, soft] = np.eye(d)[:, :, None] * np.sqrt(largest[soft])
    # S = C^-1 by forward substitution
    for b in range(d):
        s[b, b] = 1.0 / c[b, b]
        for a in range(b + 1, d):
            s[a, b] = -np.sum(c[a, b:a] * s[b:a, b], axis=0) / c[a, a]
    return s, c


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockRows(Portable):
    """The scaled Hessian S H S^T of n particles, stored as a (d, d) block for each pair.

    H is the Hessian in d dimensions. S scales the components of each particle, by a lower
    triangular matrix (d, d), such that the diagonal blocks of S H S^T are identity matrices. This
    saves conjugate gradients a quarter of their steps. The blocks are scaled once, beforehand, and
    vectors are stored as (d, n): each of these two choices halves the time of a step in 3-D.

    The product of S H S^T with a vector w (d, n) is sum_k B[:, :, k, i] w[:, others[k, i]] at
    particle i, where B is the array ``blocks``. To multiply a vector v by H itself, S H S^T is
    applied to w = S^-T v, and the result is multiplied by S^-1.

    Attributes:
      others: (k, n) indices of the at most k particles that each particle i interacts with, i
        included.
      blocks: (d, d, k, n) the scaled blocks of these pairs, zero on padding.
      scaling: (d, d, n) S of each particle, see :func:`block_cholesky`.
      unscaling: (d, d, n) S^-1 of each particle.
    """

    others: jax.Array
    blocks: jax.Array
    scaling: jax.Array
    unscaling: jax.Array

    @classmethod
    def of(cls, matrix: sp.csr_array, d: int, dtype: DTypeLike = np.float64) -> BlockRows:
        """Convert the Hessian, a symmetric scipy sparse matrix (n d, n d), to scaled blocks (d, d).

        Space is left for as many blocks per particle as the particle with the most neighbors needs,
        rounded up to a multiple of 4. The blocks are scaled in double precision, and rounded to
        ``dtype`` at the end.
        """
        blocked = matrix.tobsr((d, d))
        n = len(blocked.indptr) - 1
        counts = np.diff(blocked.indptr)
        # the number of each block among those of its particle i, from 0: the index k of ``blocks``
        row = np.arange(blocked.indices.size) - np.repeat(blocked.indptr[:-1], counts)
        i = np.repeat(np.arange(n), counts)
        j = blocked.indices
        scaling, unscaling = block_cholesky(blocked)
        capacity = 4 * math.ceil(counts.max(initial=1) / 4)
        # padding points to particle 0, which exists, and its block is zero
        others = np.zeros((capacity, n), np.int32)
        others[row, i] = j
        blocks = np.zeros((d, d, capacity, n))
        flat = blocks.reshape(d, d, -1)  # a view: what is written to it is written to blocks
        # the last two axes (capacity, n) are one axis in ``flat``
        slot = row * n + i
        # The product S_i B S_j^T of all blocks at once, entry by entry, since S is triangular.
        block = np.ascontiguousarray(np.moveaxis(blocked.data, 0, -1))
        for a in range(d):
            left = [scaling[a, c][i] for c in range(a + 1)]
            half = [sum(left[c] * block[c, e] for c in range(a + 1)) for e in range(d)]
            for b in range(d):
                flat[a, b, slot] = sum(half[e] * scaling[b, e][j] for e in range(b + 1))
        return cls(
            others=jnp.asarray(others),
            blocks=jnp.asarray(blocks, dtype),
            scaling=jnp.asarray(scaling, dtype),
            unscaling=jnp.asarray(unscaling, dtype),
        )

    def product(self, v: jax.Array) -> jax.Array:
        """Multiply the Hessian by displacements v (n, d) of n particles; the result is (n, d)."""
        d = self.scaling.shape[0]
        x = components(v)

        def unscaled(_: jax.Array, w: jax.Array) -> jax.Array:
            """Compute w = S^-T v, (d, n), from a vector v (n, d) and the scaling S.

            S is a lower triangular matrix (d, d) for each of n particles.
            """
            return jnp.stack(
                [sum(self.unscaling[b, a] * x[b] for b in range(a, d)) for a in range(d)]
            )

        # The loop makes XLA store its result in memory. Fused with the product, XLA on a CPU would
        # compute it again at every gather.
        w = jax.lax.fori_loop(0, 2, unscaled, jnp.zeros_like(v.T))
        w = self.scaled_product(w)
        return jnp.stack(
            [sum(self.unscaling[a, b] * w[b] for b in range(a + 1)) for a in range(d)], axis=-1
        )

    def scaled(self, v: jax.Array) -> jax.Array:
        """Multiply the components of each particle by its scaling S, from v (n, d) to S v (d, n).

        S is the inverse Cholesky factor of the particle's diagonal block of the Hessian, see
        :func:`block_cholesky`.
        """
        x = components(v)
        return jnp.stack(
            [sum(self.scaling[a, b] * x[b] for b in range(a + 1)) for a in range(len(x))]
        )

    def scaled_product(self, w: jax.Array) -> jax.Array:
        """Multiply the scaled Hessian S H S^T by a vector w (d, n); the result is (d, n).

        H is the Hessian, and S the scaling of each particle, from :func:`block_cholesky`. For every
        particle the entries of its neighbors are read and summed, a few neighbors at a time, as in
        :mod:`mdsens.mechanics.forces`.
        """
        d = w.shape[0]
        total = [jnp.zeros_like(c) for c in w]
        # ``BlockRows.of`` makes the capacity a multiple of 4, so that every slice has ROWS rows
        for start in range(0, self.others.shape[0], ROWS):
            rows = slice(start, start + ROWS)
            neighbors = [c[self.others[rows]] for c in w]
            for a in range(d):
                part = sum(self.blocks[a, b, rows] * neighbors[b] for b in range(d))
                total[a] = total[a] + jnp.sum(part, axis=0)
        return jnp.stack(total)
