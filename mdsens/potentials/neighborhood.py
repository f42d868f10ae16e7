"""What the energies of atoms in their surroundings share: distances, parameters of pairs, decay.

Every function here is elementwise over the neighbors of one atom. Derivatives of all orders are
finite on padding, too, where an array holds no neighbor.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp

__all__ = [
    "Params",
    "bond_values",
    "distances",
    "pair_values",
    "root",
    "triple_values",
    "vanishing_exponential",
]

Params: TypeAlias = Mapping[str, jax.Array]

# exp(-700) is 1e-304, still above the smallest double: products with its derivatives, which grow
# like a power of 700, stay finite, and are zero for all purposes.
_LARGEST_EXPONENT = 700.0


def distances(vectors: jax.Array) -> jax.Array:
    """Compute the lengths (K,) of K vectors (K, d), none of which is zero."""
    # over all components at once: the derivative of a single one is an array of zeros beside it
    return jnp.sqrt(jnp.sum(vectors * vectors, axis=1))


def pair_values(value: jax.Array, species_i: jax.Array, species_j: jax.Array) -> jax.Array:
    """Return the parameter of pairs of atoms, by their species.

    Args:
      value: (S, S) parameter by the species of the atom and of its neighbor.
      species_i, species_j: species of the atoms and of their neighbors, arrays that broadcast.

    Returns:
      entries [i, j], of the shape to which the species broadcast; () where S = 1, since all are the
      same number there.
    """
    count = value.shape[0]
    # A chain of where() in place of an index: it stays elementwise, forward and in reverse, where
    # an index would gather and scatter. S is small.
    chosen = value[0, 0]
    for a, b in itertools.product(range(count), repeat=2):
        if count > 1:
            chosen = jnp.where((species_i == a) & (species_j == b), value[a, b], chosen)
    return chosen


def triple_values(value: jax.Array, species_i: jax.Array, species_j: jax.Array) -> jax.Array:
    """Return the parameter of the triples of an atom with two of its neighbors, j and k.

    Args:
      value: (S, S, S) parameter by the species of the atom, of j and of k.
      species_i: () species of the atom.
      species_j: (K,) species of its neighbors.

    Returns:
      (K, K) entries [i, j, k]; () where S = 1.
    """
    count = value.shape[0]
    if count == 1:
        return value[0, 0, 0]
    table = value[species_i]
    chosen = table[0, 0]
    for b, c in itertools.product(range(count), repeat=2):
        here = (species_j == b)[:, None] & (species_j == c)[None, :]
        chosen = jnp.where(here, table[b, c], chosen)
    return chosen


def bond_values(value: jax.Array, species_i: jax.Array, species_j: jax.Array) -> jax.Array:
    """Return the entries [i, j, j] of a parameter of triples (S, S, S) for an atom's neighbors.

    Potential files keep the parameters of the bond of i with j there. The shape is (K,), or ()
    where S = 1.
    """
    return pair_values(jnp.diagonal(value, axis1=1, axis2=2), species_i, species_j)


def vanishing_exponential(length: jax.Array, gap: jax.Array, mask: jax.Array) -> jax.Array:
    """Compute exp(-length / gap) for gap > 0, and 0 for gap <= 0, where all derivatives vanish.

    Args:
      length: a positive length, a number or (K,).
      gap: (K,) distance that is left to the cutoff.
      mask: (K,) False for the places whose value is 0 whatever the gap.
    """
    inside = mask & (gap > 0.0) & (gap * _LARGEST_EXPONENT > length)
    # where() inside: at gap = 0 the derivatives are zero times infinity
    return jnp.where(inside, jnp.exp(-length / jnp.where(inside, gap, 1.0)), 0.0)


def root(x: jax.Array) -> jax.Array:
    """Compute the square root of x >= 0 with derivatives that are zero at x = 0, not infinite.

    An atom without neighbors then has no energy and no force. Numbers below the cube root of the
    smallest positive normal one count as zero, so that third derivatives do not overflow.
    """
    positive = x > jnp.finfo(x.dtype).tiny ** (1.0 / 3.0)
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)
