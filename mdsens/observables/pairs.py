"""Pairs of particles within a range, for observables, and sums over these pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from numpy.typing import ArrayLike

from mdsens._util.errors import InputError
from mdsens._util.lattice import Components, components, heights, nearest_images
from mdsens._util.validation import real_array, short
from mdsens.model import neighbors
from mdsens.model.neighbors import Neighbors
from mdsens.model.system import System

__all__ = ["pairs_within", "positive", "rise", "rows_within", "single", "summed"]

# number of particles up to which an observable may sum over all pairs: a second on one core
ALL_PAIRS = 4000
# Smallest height of the cell, in ranges, for a list shorter than all pairs. Nearest images need 2;
# the rest leaves room for the skin of the list.
LISTED = 2.05
# rows of neighbors in one chunk of a sum
ROWS = 16

# (vectors R_j - R_i as components, distances, j, whether it is a pair) -> sums over the rows
Each = Callable[[Components, jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]]


def single(system: System) -> System:
    """Check that the argument of an observable is one System, not a batch, and return it."""
    if not isinstance(system, System):
        raise InputError(
            f"an observable takes a System and got an object of type {type(system).__name__}: give"
            " a System, such as eq.system."
        )
    if system.batch is not None:
        raise InputError(
            f"an observable takes one system and got a batch of {system.batch}: use"
            " jax.vmap(observable)(batch)."
        )
    return system


def positive(name: str, value: ArrayLike) -> float:
    """Check that a setting of an observable is a positive length, and return it as a float."""
    need = "give a positive length."
    array = real_array(name, value, need)
    if isinstance(array, Tracer):
        raise InputError(
            f"`{name}` is traced by jax, but this setting cannot be differentiated: give a number."
        )
    if array.ndim or not 0 < float(array) < np.inf:
        raise InputError(f"`{name}` is {short(value)}: {need}")
    return float(array)


def rise(x: jax.Array) -> jax.Array:
    """Compute a smooth step of x: 0 for x < 0, x^3 (10 - 15 x + 6 x^2) up to x = 1, then 1.

    The step is twice continuously differentiable.
    """
    x = jnp.clip(x, 0.0, 1.0)
    return x**3 * (10.0 - 15.0 * x + 6.0 * x**2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Range:
    """A function that returns the range up to which a neighbor list has the pair (i, j).

    A neighbor list asks for such a function of the particle indices i and j; here the range is the
    same length for all pairs.
    """

    length: jax.Array

    def __call__(self, i: jax.Array, j: jax.Array) -> jax.Array:
        return self.length


def pairs_within(system: System, range: float) -> Neighbors:
    """List the pairs nearer than a range, for the argument ``pairs`` of observables.

    Observables of pairs at distances where the potential is zero need such a list. The list is made
    by a search over grid cells, in a time proportional to the number of particles. This function
    cannot run in compiled code: make the list outside, and use it in the function that is
    differentiated, as in this example with a minimum eq from ``ms.minimize``:

        near = ms.observables.pairs_within(eq.system, 1.5)
        ms.gradient(lambda s: ms.observables.bond_order(s, 6, 1.5, near), eq)

    The list also contains pairs up to a skin (``pairs.skin``) beyond the range. The skin is 0.3 of
    the range, or less in a small cell. The list is complete as long as no particle has moved by
    more than half the skin relative to the cell. For a derivative at one configuration the list is
    always complete; along a path of minimizations it may become incomplete. Outside of compiled
    code an observable refuses an incomplete list; in compiled code no check is possible.

    Args:
      system: one system.
      range: a length, at most half the smallest height of the cell.

    Raises:
      InputError: the range is too long for the cell.
    """
    length = positive("range", range)
    _check_height(single(system), length)
    box = system.box
    if isinstance(system.positions, Tracer) or isinstance(box, Tracer):
        raise InputError(
            "pairs_within cannot run inside a function that jax traces (grad, jit, vmap): call it"
            " outside, and use the list in that function."
        )
    if box is not None and system.n > ALL_PAIRS:
        least = _smallest_height(box)
        if LISTED * length > least:
            raise InputError(
                f"`range` is {length:g}, nearly half the smallest height of the cell, which is"
                f" {least:g}: a list of this range would contain all pairs of the {system.n:,}"
                " particles, too many to store; give a shorter range."
            )
    range_of_pair = _Range(jnp.asarray(length, system.positions.dtype))
    return neighbors.allocate(system.positions, box, range_of_pair, length)


def _smallest_height(box: jax.Array) -> float:
    """Return the smallest distance between opposite faces of a cell with the matrix (d, d)."""
    return float(np.min(heights(np.asarray(box))))


def _check_height(system: System, length: float) -> None:
    """Raise InputError if the range of an observable is above half the smallest height of the cell.

    Within a longer range, a particle could meet two periodic images of the same particle. A cell
    that jax traces is not checked.
    """
    box = system.box
    if box is None or isinstance(box, Tracer):
        return
    least = _smallest_height(box)
    # exactly half the height is allowed, to round-off
    if 2.0 * length > least * (1.0 + 1e-12):
        raise InputError(
            f"the observable needs pairs up to {length:g}, beyond half the smallest height of the"
            f" cell, {least:g}, where a particle meets two images of another: give a shorter range,"
            " or a larger cell."
        )


def rows_within(system: System, length: float, pairs: Neighbors | None) -> jax.Array:
    """Return an array (capacity, n) whose column i has the particles within a range of particle i.

    The array may also hold particles beyond the range ``length``. Places of the array that are not
    used hold n, the number of particles. The array is taken from the list ``pairs``. If ``pairs``
    is None, the array is taken from the system's neighbor list if this list covers the range; else
    the array has all pairs, provided that the system is not too large.
    """
    _check_height(system, length)
    n = system.n
    listed = system.neighbors
    if pairs is not None:
        return _check_pairs(system, length, pairs)
    # all pairs; a list without pairs is complete, too, but has no rows
    if listed.complete and listed.rows.shape[0] == n - 1:
        return listed.rows
    # Which pairs does not matter: a range that is the same number for all pairs is a float.
    reach = system.potential.lengths(
        system.params, (listed.rows[:1], listed.rows[:1]), n, system.species, 0
    )
    # a range that is a float depends on no parameter, so it is known in traced code as well
    if isinstance(reach, float) and length <= reach < np.inf and not listed.complete:
        return listed.rows
    if n <= ALL_PAIRS:
        return neighbors.all_pairs(n).rows
    raise InputError(
        f"the system's neighbor list does not reach the distance {length:g}, and {n:,} particles"
        f" are too many for all pairs: give pairs=ms.observables.pairs_within(system, {length:g}),"
        " a list made outside of the function that is differentiated."
    )


def _check_pairs(system: System, length: float, pairs: Neighbors) -> jax.Array:
    """Check a user's list of pairs, and return its array of particle indices.

    The list must be of this system, complete, and cover the range ``length``.
    """
    if not isinstance(pairs, Neighbors):
        raise InputError(
            f"`pairs` is {short(pairs)}: give a list made by ms.observables.pairs_within(system,"
            " range)."
        )
    if pairs.rows.shape[1] != system.n:
        raise InputError(
            f"`pairs` is for {pairs.rows.shape[1]} particles and the system has {system.n}: make a"
            " new list by ms.observables.pairs_within(system, range)."
        )
    if pairs.complete:
        return pairs.rows
    # only complete lists have no ``given``; a ``_Range`` has one array, its length
    assert pairs.given is not None
    (reach,) = pairs.given
    # 1e-6, because the range may be stored in single precision
    if not isinstance(reach, Tracer) and length > float(reach) * (1.0 + 1e-6):
        raise InputError(
            f"`pairs` reaches {float(reach):g}, and the observable needs {length:g}: give"
            f" pairs=ms.observables.pairs_within(system, {length:g})."
        )
    complete = neighbors.within(system.positions, *neighbors.slack(pairs, system.box, reach))
    if not isinstance(complete, Tracer) and not bool(complete):
        raise InputError(
            "particles have moved by more than half the skin of the list `pairs`, which may now"
            " lack some pairs: make a new list by ms.observables.pairs_within(system, range)."
        )
    return pairs.rows


def summed(system: System, rows: jax.Array, each: Each) -> tuple[jax.Array, ...]:
    """Sum quantities of pairs over the neighbors of each particle, or over all pairs.

    The sum is taken over chunks of the rows of a neighbor list. A derivative recomputes each chunk,
    so that the memory is that of one chunk.

    Args:
      system: one system.
      rows: (capacity, n) particle indices; column i has the neighbors j of particle i, and n in
        places that are not used.
      each: function that returns the quantities of one chunk, summed over its rows. The arguments
        are the vectors R_j - R_i as a tuple of components, the distances, the indices j, and True
        for pairs, False for unused places; each array has the shape (rows of a chunk, n).
    """
    n = system.n
    padding = -rows.shape[0] % ROWS
    chunks = jnp.pad(rows, ((0, padding), (0, 0)), constant_values=n).reshape(-1, ROWS, n)
    nearest = nearest_images(system.box, system.boundary.orthogonal)
    x = components(system.positions)

    @jax.checkpoint
    def sum_chunk(j: jax.Array) -> tuple[jax.Array, ...]:
        real = j < n
        j = jnp.where(real, j, 0)
        vectors = nearest(tuple(c[j] - c for c in x))
        # 1 on padding, where the derivative of sqrt(0) would be NaN
        r = jnp.sqrt(jnp.where(real, sum(v * v for v in vectors), 1.0))
        return each(vectors, r, j, real)

    def add(total: tuple[jax.Array, ...], j: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        return jax.tree.map(jnp.add, total, sum_chunk(j)), None

    shapes = jax.eval_shape(sum_chunk, jax.ShapeDtypeStruct((ROWS, n), rows.dtype))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, chunks)[0]
