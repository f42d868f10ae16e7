"""The surroundings of atoms: chunks of some atoms at a time, and lists of the near neighbors alone.

On a CPU the energies of a few dozen atoms at a time are computed from arrays that stay in the
cache, which takes a sixth of the time of arrays for all atoms. Most places of a neighbor list are
empty, or hold a neighbor beyond the cutoff, within the skin: of silicon's 24 places four are near.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from mdsens._util.lattice import Components, Images, components
from mdsens.potentials.base import Pairs

__all__ = ["near_places", "over_atoms", "shorter_lists", "taken", "vectors_to_neighbors"]

# Places of the neighbor list in one chunk of atoms. Between 1,000 and 16,000 the time is the same
# to 10 % for Stillinger and Weber's silicon; above, the arrays leave the cache.
PLACES = 4096
# From this many chunks on, neighbors that are near are listed first. It takes two compilations more
# of the energy, and for a batch, where all of them are run, it takes longer.
CHUNKS = 4

T = TypeVar("T")


def vectors_to_neighbors(listed: Pairs, x: Components, n: int, images: Images) -> Components:
    """Compute the vectors from each atom to its neighbors, components (capacity, c) for c atoms.

    Args:
      listed: the places (capacity, c) of the neighbor list of c atoms.
      x: the d components of all positions, each (n,).
      n: number of all atoms, the index of places without a neighbor.
      images: function that maps vectors to their periodic images.
    """
    # in places without a neighbor any atom will do
    j = jnp.where(listed.j < n, listed.j, 0)
    shifts = None if listed.images is None else components(listed.images)
    # from the neighbor to the atom, as ``images`` subtracts the shifts of R_j - R_i
    apart = images(tuple(c[listed.i] - c[j] for c in x), shifts)
    return tuple(-v for v in apart)


def over_atoms(of_some: Callable[[Pairs], T], listed: Pairs, n: int) -> T:
    """Apply a function to the neighbors of a chunk of atoms, for all chunks; return all results.

    Args:
      of_some: function of the places (capacity, c) of c atoms, which returns arrays whose last axis
        is that of the atoms. A derivative of it computes it again, so that the memory is that of
        one chunk.
      listed: the places (capacity, n) of all n atoms.
      n: number of atoms, the index of places without a neighbor.

    Returns:
      the arrays of all chunks, with n as their last axis.
    """
    capacity = listed.j.shape[0]
    size = max(PLACES // max(capacity, 1), 1)
    if n <= size or jax.default_backend() != "cpu":
        return of_some(listed)
    count = math.ceil(n / size)
    # chunks of nearly one size
    size = math.ceil(n / count)
    padding = count * size - n

    def chunks(array: jax.Array, fill: int) -> jax.Array:
        """Divide an array (rows, n, …) into chunks (count, rows, size, …)."""
        widths = [(0, 0), (0, padding)] + [(0, 0)] * (array.ndim - 2)
        padded = jnp.pad(array, widths, constant_values=fill)
        shape = (array.shape[0], count, size, *array.shape[2:])
        return jnp.moveaxis(padded.reshape(shape), 1, 0)

    images = None if listed.images is None else chunks(listed.images, 0)
    # atoms that fill the last chunk are atom 0, without neighbors
    pairs = Pairs(chunks(listed.i, 0), chunks(listed.j, n), images)
    results = jax.lax.map(jax.checkpoint(of_some), pairs)

    def joined(array: jax.Array) -> jax.Array:
        """Join the results (count, …, size) of all chunks to one array (…, n)."""
        moved = jnp.moveaxis(array, 0, -2)
        return moved.reshape(*moved.shape[:-2], -1)[..., :n]

    return jax.tree.map(joined, results)


def shorter_lists(capacity: int, n: int) -> tuple[int, ...]:
    """Return the numbers of places of shorter lists that are worth while; none for small systems.

    Args:
      capacity: number of places of an atom in the neighbor list.
      n: number of atoms.
    """
    if jax.default_backend() != "cpu" or n * capacity < CHUNKS * PLACES or capacity < 8:
        return ()
    return capacity // 3, capacity // 2


def near_places(
    near: Callable[[jax.Array], jax.Array], steps: int | jax.Array, size: int, n: int
) -> tuple[jax.Array, jax.Array]:
    """List the places of each atom that hold a near neighbor, at most ``size`` of them.

    Args:
      near: function of a row k of the neighbor list that returns a mask (n,), True where the k-th
        place of an atom holds a near neighbor.
      steps: number of rows.
      size: number of rows of the result.
      n: number of atoms.

    Returns:
      (places (size, n), -1 where there are fewer; the largest number of near neighbors that an atom
      has, which may be larger than ``size``).
    """
    slots = jnp.arange(size, dtype=jnp.int32)[:, None]

    def add(k: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        places, count = carry
        here = near(k)
        places = jnp.where((slots == count) & here, k, places)
        return places, count + here.astype(jnp.int32)

    start = (jnp.full((size, n), -1, jnp.int32), jnp.zeros(n, jnp.int32))
    places, count = jax.lax.fori_loop(0, steps, add, start)
    return places, jnp.max(count, initial=0)


def taken(listed: Pairs, places: jax.Array, n: int) -> Pairs:
    """Return the neighbor list (size, n) of some places (size, n) of each atom; -1 for none."""
    some = jnp.maximum(places, 0)
    rows = jnp.where(places >= 0, jnp.take_along_axis(listed.j, some, axis=0), n)
    images = listed.images
    if images is not None:
        images = jnp.take_along_axis(images, some[..., None], axis=0)
    return Pairs(listed.i, rows, images)
