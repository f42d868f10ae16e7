"""The Hessian as the blocks of the pairs that interact, scaled by particle, for compiled
products.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.lattice import components
from mdsens._util.portable import Portable
from mdsens.mechanics.forces import ROWS

__all__ = ["BlockRows", "block_cholesky"]

# of a particle's largest stiffness that its others may be; and of the stiffest particle's, its
# largest
SOFTEST = 1e-3


def block_cholesky(blocked: Any) -> tuple[np.ndarray, np.ndarray]:
    """S and C = S^-1, lower triangular (d, d, n), with S D S^T = 1 for a particle's own block D of
    H in BSR form.

    By Cholesky, D = C C^T, written out over all particles at once. A particle that is loose in some
    direction, or at no minimum, has no such factor, or one that would cost digits: there C is a
    number, the root of D's largest diagonal.
    """
    n, d = blocked.shape[0] // blocked.blocksize[0], blocked.blocksize[0]
    at = blocked.indices == np.repeat(np.arange(n), np.diff(blocked.indptr))
    own = np.zeros((d, d, n))
    own[:, :, blocked.indices[at]] = np.moveaxis(blocked.data[at], 0, -1)
    largest = np.max(np.diagonal(own), axis=1)
    largest = np.maximum(largest, SOFTEST * (largest.max(initial=0.0) or 1.0))
    s, c = np.zeros((2, d, d, n))
    loose = np.zeros(n, bool)
    for b in range(d):
        pivot = own[b, b] - np.sum(c[b, :b] ** 2, axis=0)
        loose |= ~(pivot >= SOFTEST * largest)  # of a diagonal that is NaN as well
        c[b, b] = np.sqrt(np.where(loose, largest, pivot))
        for a in range(b + 1, d):
            c[a, b] = (own[a, b] - np.sum(c[a, :b] * c[b, :b], axis=0)) / c[b, b]
    c[:, :, loose] = np.eye(d)[:, :, None] * np.sqrt(largest[loose])
    for b in range(d):
        s[b, b] = 1.0 / c[b, b]
        for a in range(b + 1, d):
            s[a, b] = -np.sum(c[a, b:a] * s[b:a, b], axis=0) / c[a, a]
    return s, c


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockRows(Portable):
    """S H S^T by particle: at i it is sum_k B[:, :, k, i] w[:, others[k, i]], with w = S^-T v by
    components.

    Scaled, H has blocks of one on its diagonal, which spares conjugate gradients a quarter of their
    steps. The blocks are scaled once, beforehand, and vectors are (d, n) in between: both halve the
    time of a step in 3-D.

    Attributes:
      others: (k, n) the particles j that i interacts with, and i itself.
      blocks: (d, d, k, n), zero on padding.
      even: (d, d, n) S of each particle, lower triangular: see :func:`block_cholesky`.
      uneven: (d, d, n) S^-1.
    """

    others: jax.Array
    blocks: jax.Array
    scaling: jax.Array
    unscaling: jax.Array

    @classmethod
    def of(cls, matrix: Any, d: int, dtype: Any = np.float64) -> BlockRows:
        """The blocks of a symmetric sparse matrix; as many rows as its fullest particle, up to a
        multiple of 4.

        Scaled in double precision, and rounded to ``dtype`` last.
        """
        blocked = matrix.tobsr((d, d))
        n, counts = matrix.shape[0] // d, np.diff(blocked.indptr)
        row = np.arange(blocked.indices.size) - np.repeat(blocked.indptr[:-1], counts)
        i, j = np.repeat(np.arange(n), counts), blocked.indices
        scaling, unscaling = block_cholesky(blocked)
        capacity = 4 * math.ceil(counts.max(initial=1) / 4)
        others, blocks = np.zeros((capacity, n), np.int32), np.zeros((d, d, capacity, n))
        others[row, i] = j
        slot, flat = row * n + i, blocks.reshape(d, d, -1)
        block = np.ascontiguousarray(np.moveaxis(blocked.data, 0, -1))
        for a in range(d):
            left = [scaling[a, c][i] for c in range(a + 1)]
            half = [sum(left[c] * block[c, e] for c in range(a + 1)) for e in range(d)]
            for b in range(d):
                flat[a, b, slot] = sum(half[e] * scaling[b, e][j] for e in range(b + 1))
        return cls(
            jnp.asarray(others),
            *(jnp.asarray(part, dtype) for part in (blocks, scaling, unscaling)),
        )

    def product(self, v: jax.Array) -> jax.Array:
        """H v, (n, d)."""
        d = self.scaling.shape[0]
        x = components(v)

        def into(_: Any, w: jax.Array) -> jax.Array:
            return jnp.stack(
                [sum(self.unscaling[b, a] * x[b] for b in range(a, d)) for a in range(d)]
            )

        # A loop, for what it leaves lies in memory: fused, XLA on a CPU would evaluate it anew at
        # every gather.
        w = jax.lax.fori_loop(0, 2, into, jnp.zeros_like(v.T))
        w = self.scaled_product(w)
        return jnp.stack(
            [sum(self.unscaling[a, b] * w[b] for b in range(a + 1)) for a in range(d)], axis=-1
        )

    def scaled(self, v: jax.Array) -> jax.Array:
        """S v, (n, d) -> (d, n)."""
        x = components(v)
        return jnp.stack(
            [sum(self.scaling[a, b] * x[b] for b in range(a + 1)) for a in range(len(x))]
        )

    def scaled_product(self, w: jax.Array) -> jax.Array:
        """S H S^T w, (d, n); gathers alone, a few rows at a time (see
        mdsens.mechanics.forces.ROWS).
        """
        d = w.shape[0]
        total = [jnp.zeros_like(c) for c in w]
        for start in range(0, self.others.shape[0], ROWS):
            some = slice(start, start + ROWS)
            near = [c[self.others[some]] for c in w]
            for a in range(d):
                total[a] = total[a] + jnp.sum(
                    sum(self.blocks[a, b, some] * near[b] for b in range(d)), axis=0
                )
        return jnp.stack(total)
