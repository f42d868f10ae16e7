"""The Hessian of an energy that is a sum over atoms, assembled from a block of each atom.

The energy e_i of atom i is a function of the vectors r_ik to its K neighbors k. Its second
derivatives by these vectors are a block (K d, K d). With r_ik = R_k - R_i, the block B_kl of two
neighbors is added to the Hessian at (k, l), and with the opposite sign at (i, l) and (k, i); at
(i, i) stands the sum over all blocks.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from mdsens._util.compilation import as_jax, compiled
from mdsens._util.lattice import Components
from mdsens.model.system import System, neighbor_vectors
from mdsens.potentials.base import Pairs
from mdsens.potentials.local import LocalPotential, kinds_of

__all__ = ["atom_hessian", "near_rows"]

# Numbers of the blocks of the atoms that are computed together: 8 MB of them. It takes a quarter
# less time than 64 MB; less than 1 MB takes longer, for the calls.
CHUNK = 1_000_000


@compiled
def _distances(system: System) -> jax.Array:
    """Compute how far inside the cutoff each place of the neighbor list is, in its square, (K, n).

    It is negative beyond the cutoff, and in places that hold no neighbor.
    """
    listed = system.neighbors.columns
    vectors = neighbor_vectors(system, system.positions, system.box)
    reach = system.potential.lengths(
        system.params, listed, system.n, system.species, system.species_count
    )
    inside = jnp.asarray(reach) ** 2 - sum(v * v for v in vectors)
    return jnp.where(listed.j < system.n, inside, -1.0)


def near_rows(system: System) -> System:
    """Return the system with a neighbor list of those within the cutoff alone, at its positions.

    The list serves for derivatives at these positions; it is not complete anywhere else. The
    function does not work inside ``jax.jit``.
    """
    near = np.asarray(_distances(system)) > 0
    most = int(near.sum(axis=0).max(initial=0))
    # a multiple of 4, so that similar configurations share compiled code
    count = min(4 * math.ceil(most / 4), near.shape[0])
    order = np.argsort(~near, axis=0, kind="stable")[:count]
    kept = np.take_along_axis(near, order, axis=0)
    listed = system.neighbors
    rows = np.take_along_axis(np.asarray(listed.rows), order, axis=0)
    images = listed.images
    if images is not None:
        images = np.take_along_axis(np.asarray(images), order[..., None], axis=0)
    kept_rows = as_jax(np.where(kept, rows, system.n), np.int32)
    images = None if images is None else as_jax(images)
    return system.replace(neighbors=dataclasses.replace(listed, rows=kept_rows, images=images))


@compiled
def _vectors(system: System) -> Components:
    """Compute the vectors from each atom to its neighbors, components (K, n)."""
    return neighbor_vectors(system, system.positions, system.box)


@compiled(static_argnames=("n",))
def _blocks(system: System, columns: Pairs, vectors: Components, n: int) -> jax.Array:
    """Compute the second derivatives of some atoms' energies by the vectors to their neighbors.

    Args:
      system: gives the potential and its parameters.
      columns: the places (K, c) of the neighbor list of c atoms.
      vectors: components (K, c) of the vectors to the neighbors.
      n: number of atoms, the index of places without a neighbor.

    Returns:
      the blocks (c, K, d, K, d).
    """
    species = system.species
    count = system.species_count
    total: jax.Array | float = 0.0
    for part in getattr(system.potential, "parts", (system.potential,)):
        if not isinstance(part, LocalPotential):
            continue
        mask, harmless = part.near(system.params, columns, vectors, n, species, count)
        second = jax.hessian(part.atom(system.params, count))
        of_each = jax.vmap(second, in_axes=(-1, -1, -1, -1))
        blocks = of_each(jnp.stack(harmless, axis=1), mask, *kinds_of(columns, n, species))
        real = mask.T
        both = real[:, :, None, None, None] & real[:, None, None, :, None]
        total = total + jnp.where(both, blocks, 0.0)
    return jnp.asarray(total)


def atom_hessian(system: System) -> sp.csr_array:
    """Assemble the Hessian (n d, n d) of the parts of an energy that are sums over atoms.

    The system has n atoms in d dimensions. For a batch of systems the result is a block-diagonal
    matrix. The function does not work inside ``jax.jit``.
    """
    if system.batch is not None:
        members = [jax.tree.map(lambda leaf, k=k: leaf[k], system) for k in range(system.batch)]
        return sp.csr_array(sp.block_diag([atom_hessian(m) for m in members], format="csr"))
    near = near_rows(system)
    n, d = system.positions.shape
    rows = np.asarray(near.neighbors.rows)
    count = rows.shape[0]
    if not count:
        return sp.csr_array((n * d, n * d))
    vectors = [np.asarray(v) for v in _vectors(near)]
    # chunks of one size, so that they share compiled code
    chunks = math.ceil(n * (count * d) ** 2 / CHUNK)
    size = math.ceil(n / chunks)
    entries = []
    for start in range(0, n, size):
        some = np.minimum(np.arange(start, start + size), n - 1)
        repeated = np.arange(start, start + size) >= n  # the last atom, to fill the last chunk
        neighbors = np.where(repeated, n, rows[:, some])
        columns = Pairs(as_jax(some[None], np.int32), as_jax(neighbors))
        blocks = _blocks(near, columns, tuple(v[:, some] for v in vectors), n)
        entries.append(_entries(np.asarray(blocks, float), some, neighbors.T, n))
    keys, blocks = (np.concatenate(arrays) for arrays in zip(*entries, strict=True))
    return _summed(keys, blocks, n)


def _entries(
    blocks: np.ndarray, atoms: np.ndarray, neighbors: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the entries of the Hessian that the energies of some atoms contribute.

    Args:
      blocks: (c, K, d, K, d) second derivatives by the vectors to the neighbors.
      atoms: (c,) indices of the atoms.
      neighbors: (c, K) indices of their neighbors; n in places that hold none.
      n: number of all atoms.

    Returns:
      (row times n plus column (m,), blocks (m, d, d)), where rows and columns are atoms.
    """
    c, count, d = blocks.shape[:3]
    # the atom itself comes first: its rows and columns are minus the sum of those of its neighbors
    whole = np.zeros((c, count + 1, d, count + 1, d))
    whole[:, 1:, :, 1:] = blocks
    whole[:, 0, :, 1:] = -blocks.sum(axis=1)
    whole[:, :, :, 0] = -whole[:, :, :, 1:].sum(axis=3)
    members = np.concatenate([atoms[:, None], neighbors], axis=1)
    real = members < n
    both = real[:, :, None] & real[:, None, :]
    keys = members[:, :, None].astype(np.int64) * n + members[:, None, :]
    return keys[both], np.moveaxis(whole, 2, 3)[both]


def _summed(keys: np.ndarray, blocks: np.ndarray, n: int) -> sp.csr_array:
    """Sum the blocks (m, d, d) that stand at one place of a matrix (n d, n d).

    ``keys`` (m,) are the places, row times n plus column.
    """
    d = blocks.shape[-1]
    order = np.argsort(keys, kind="stable")
    sorted_keys = keys[order]
    starts = np.flatnonzero(np.diff(sorted_keys, prepend=-1))
    total = np.add.reduceat(blocks[order].reshape(-1, d * d), starts, axis=0).reshape(-1, d, d)
    rows, columns = np.divmod(sorted_keys[starts], n)
    pointers = np.searchsorted(rows, np.arange(n + 1))
    matrix = sp.bsr_array((total, columns, pointers), shape=(n * d, n * d))
    return sp.csr_array(matrix.tocsr())
