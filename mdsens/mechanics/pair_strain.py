"""Derivatives of the energy by strain for potentials that are sums over pairs, in one pass each.

A strain e turns the vector v between two particles into (1 + e) v. With phi the energy of the pair,
r = |v|, the gradient g = phi'(r) v / r and the second derivative K of phi by v, the derivatives of
phi follow from the change of v alone. Differentiating the energy of all pairs once for each strain
instead takes ten times as long.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mdsens._util.lattice import Components, components
from mdsens.mechanics.forces import in_chunks, row_terms, stiffness_of_pairs
from mdsens.model.system import System, images_of
from mdsens.potentials.base import PairTerm

__all__ = ["pair_forces", "pair_stiffness"]


class _Chunks(NamedTuple):
    """The pairs of one term of a potential, in chunks that are summed one after the other.

    Attributes:
      count: number of chunks.
      chunk: the function that maps the number of a chunk to its pairs.
      weight: 1/2 where the term has every pair twice, else 1.
    """

    count: int
    chunk: Callable[[jax.Array], PairTerm]
    weight: float


def _chunks(system: System) -> Iterator[_Chunks]:
    """Yield the pairs of each term of a potential: neighbor lists in chunks, bonds in one."""
    for term in row_terms(system):
        if term.j.ndim == 1:
            yield _Chunks(1, functools.partial(_all_of, term), 1.0)
        elif term.j.shape[0]:
            rows = in_chunks(term)
            yield _Chunks(rows.j.shape[0], rows.rows, 0.5)


def _all_of(term: PairTerm, _: jax.Array) -> PairTerm:
    """Return the pairs of a term as its only chunk."""
    return term


def pair_forces(system: System, strain: jax.Array) -> jax.Array:
    """Compute the forces (n, d) on the particles due to a small affine strain, by pairs.

    The force on particle i is -sum_k (K e v + e g) over its neighbors k, with v the vector from k
    to i, g the gradient of the pair's energy by v and K its second derivative. (The second term
    sums to e times the net force on the particle, which is round-off at a minimum.)

    Args:
      system: the system, with a potential that is a sum over pairs.
      strain: e, (d, d).
    """
    x = components(system.positions)
    images = images_of(system, system.box)
    d = len(x)

    def slopes(term: PairTerm) -> Components:
        apart = term.vectors(x, images)
        across, along = stiffness_of_pairs(term, apart)
        strained = [sum(strain[a, b] * apart[b] for b in range(d)) for a in range(d)]
        longitudinal = along * sum(v * s for v, s in zip(apart, strained, strict=True))
        # across e v twice: once of K e v, once of e g
        return tuple(
            longitudinal * v + 2.0 * across * s for v, s in zip(apart, strained, strict=True)
        )

    total = tuple(jnp.zeros_like(c) for c in x)
    for pairs in _chunks(system):
        if pairs.weight == 1.0:
            bonds = pairs.chunk(jnp.int32(0))
            total = tuple(
                t.at[bonds.i].add(s).at[bonds.j].add(-s)
                for t, s in zip(total, slopes(bonds), strict=True)
            )
            continue

        def add(total: Components, k: jax.Array, pairs: _Chunks = pairs) -> tuple[Components, None]:
            parts = slopes(pairs.chunk(k))
            return tuple(t + jnp.sum(s, axis=0) for t, s in zip(total, parts, strict=True)), None

        # recomputed in reverse mode, where storing all chunks would take gigabytes
        body = jax.checkpoint(add, prevent_cse=False)
        total, _ = jax.lax.scan(body, total, jnp.arange(pairs.count))
    return -jnp.stack(total, axis=-1)


def pair_stiffness(
    system: System, along: jax.Array, motion: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Compute the second derivatives of the energy by k strains, relaxed and affine, (k, k) each.

    Under the amplitudes s of the strains e_a, with the displacements u_a of a pair's particles
    relative to each other, the vector of the pair becomes (1 + s_a e_a) (v + s_b u_b). So

        d2U/ds_a ds_b = sum over pairs of dv_a . K dv_b + g . (e_a u_b + e_b u_a),

    with dv_a = e_a v + u_a; for the affine one u = 0.

    Args:
      system: the system, with a potential that is a sum over pairs.
      along: (k, d, d) the strains e_a.
      motion: (k, n, d) displacements of the particles, relative to the affine ones, per unit of
        each strain.

    Returns:
      (relaxed, affine).
    """
    x = components(system.positions)
    images = images_of(system, system.box)
    k = along.shape[0]
    # the displacements of a particle side by side in memory, (n, d, k), for the gather
    moved = jnp.transpose(motion, (1, 2, 0))

    def of_pairs(term: PairTerm, weight: float) -> tuple[jax.Array, jax.Array]:
        apart = term.vectors(x, images)
        across, longitudinal = (weight * v for v in stiffness_of_pairs(term, apart))
        vectors = jnp.stack(apart, axis=-1)
        affine = jnp.einsum("aij,...j->...ia", along, vectors)
        relative = moved[term.i] - moved[term.j]
        total = affine + relative
        cross = _contract("...ia,...ib->ab", across, affine, relative)
        both = []
        for change in (total, affine):
            stretch = jnp.einsum("...i,...ia->...a", vectors, change)
            both.append(
                _contract("...a,...b->ab", longitudinal, stretch, stretch)
                + _contract("...ia,...ib->ab", across, change, change)
            )
        # g . e_a u_b = phi'/r (e_a v) . u_b: the strains are symmetric
        return both[0] + cross + cross.T, both[1]

    sums = (jnp.zeros((k, k), motion.dtype), jnp.zeros((k, k), motion.dtype))
    for pairs in _chunks(system):

        def add(
            sums: tuple[jax.Array, jax.Array], number: jax.Array, pairs: _Chunks = pairs
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            relaxed, affine = of_pairs(pairs.chunk(number), pairs.weight)
            return (sums[0] + relaxed, sums[1] + affine), None

        body = jax.checkpoint(add, prevent_cse=False)
        sums, _ = jax.lax.scan(body, sums, jnp.arange(pairs.count))
    return sums


def _contract(
    subscripts: str, weights: jax.Array, first: jax.Array, second: jax.Array
) -> jax.Array:
    """Sum weighted products of two arrays over all pairs; ``subscripts`` are those of einsum."""
    missing = first.ndim - weights.ndim
    weighted = weights.reshape(*weights.shape, *[1] * missing) * first
    return jnp.einsum(subscripts.replace("...", "pq"[-weights.ndim :]), weighted, second)
