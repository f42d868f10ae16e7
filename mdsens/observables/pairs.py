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
from mdsens._util.lattice import Components, components, heights
from mdsens._util.validation import real_array, short
from mdsens.model import neighbors
from mdsens.model.neighbors import Neighbors
from mdsens.model.system import System, images_of
from mdsens.potentials.base import Pairs

__all__ = ["pairs_within", "positive", "rise", "list_within", "single", "summed"]

# number of particles up to which an observable may sum over all pairs: a second on one core
ALL_PAIRS = 4000
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
      range: a length. Beyond half the smallest height of the cell the list has several images of a
        particle, and its own.
    """
    length = positive("range", range)
    box = single(system).box
    if isinstance(system.positions, Tracer) or isinstance(box, Tracer):
        raise InputError(
            "pairs_within cannot run inside a function that jax traces (grad, jit, vmap): call it"
            " outside, and use the list in that function."
        )
    range_of_pair = _Range(jnp.asarray(length, system.positions.dtype))
    return neighbors.allocate(
        system.positions, box, range_of_pair, length, periodic=system.periodic
    )


def _check_height(system: System, length: float) -> None:
    """Raise InputError if the range of an observable is above half the smallest height of the cell.

    Within a longer range, a particle could meet two periodic images of the same particle, which
    needs a list of images. A cell that jax traces is not checked.
    """
    box = system.box
    if box is None or isinstance(box, Tracer):
        return
    across = heights(np.asarray(box))
    least = float(np.min(across, where=np.asarray(system.periodic), initial=np.inf))
    # exactly half the height is allowed, to round-off
    if 2.0 * length > least * (1.0 + 1e-12):
        raise InputError(
            f"the observable needs pairs up to {length:g}, beyond half the smallest height of the"
            f" cell, {least:g}, where a particle meets two images of another: give"
            f" pairs=ms.observables.pairs_within(system, {length:g}), a list made outside of the"
            " function that is differentiated."
        )


def list_within(system: System, length: float, pairs: Neighbors | None) -> Neighbors:
    """Return a list of the pairs within a range.

    The list may also hold pairs beyond the range ``length``. It is the list ``pairs``, after a
    check. If ``pairs`` is None, it is the system's neighbor list if this list covers the range;
    else it has all pairs, provided that the system is not too large.
    """
    n = system.n
    listed = system.neighbors
    if pairs is not None:
        checked = _check_pairs(system, length, pairs)
        if checked.images is None:
            _check_height(system, length)
        return checked
    if listed.images is None:
        _check_height(system, length)
    # all pairs; a list without pairs is complete, too, but has no rows
    if listed.complete and listed.rows.shape[0] == n - 1:
        return listed
    if not listed.complete and length <= _constant_range(system) < np.inf:
        return listed
    if n <= ALL_PAIRS and listed.images is None:
        return neighbors.all_pairs(n, periodic=system.periodic)
    raise InputError(
        f"the system's neighbor list does not reach the distance {length:g}, and a list of all"
        f" pairs of the {n:,} particles is too long, or too short for the images in a small cell:"
        f" give pairs=ms.observables.pairs_within(system, {length:g}),"
        " a list made outside of the function that is differentiated."
    )


def _constant_range(system: System) -> float:
    """Return the range of the potential if it is the same number for all pairs, else 0.

    Such a range depends on no parameter, so it is known in traced code as well.
    """
    # Which pairs does not matter: a range that is the same number for all pairs is a float.
    rows = system.neighbors.rows[:1]
    reach = system.potential.lengths(system.params, Pairs(rows, rows), system.n, system.species, 0)
    return reach if isinstance(reach, float) else 0.0


def _check_pairs(system: System, length: float, pairs: Neighbors) -> Neighbors:
    """Check a user's list of pairs, and return it.

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
        return pairs
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
    return pairs


def summed(system: System, listed: Neighbors, each: Each) -> tuple[jax.Array, ...]:
    """Sum quantities of pairs over the neighbors of each particle, or over all pairs.

    The sum is taken over chunks of the rows of a neighbor list. A derivative recomputes each chunk,
    so that the memory is that of one chunk.

    Args:
      system: one system.
      listed: the list of the pairs.
      each: function that returns the quantities of one chunk, summed over its rows. The arguments
        are the vectors R_j - R_i as a tuple of components, the distances, the indices j, and True
        for pairs, False for unused places; each array has the shape (rows of a chunk, n).
    """
    n = system.n
    d = system.dimension
    rows = -(-listed.rows.shape[0] // ROWS) * ROWS  # rounded up
    # no list is shortened here: ``resized`` adds empty rows at its end
    padded = listed.resized(rows)
    chunks = padded.rows.reshape(-1, ROWS, n)
    images = padded.images
    # a list of images has the shifts of R_j - R_i, which images_of subtracts
    shifts = None if images is None else -images.reshape(-1, ROWS, n, d)
    image_of = images_of(system, system.box)
    x = components(system.positions)

    @jax.checkpoint
    def sum_chunk(chunk: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, ...]:
        j, shift = chunk
        real = j < n
        j = jnp.where(real, j, 0)
        apart = tuple(c[j] - c for c in x)
        vectors = image_of(apart, None if shift is None else components(shift))
        # 1 on padding, where the derivative of sqrt(0) would be NaN
        r = jnp.sqrt(jnp.where(real, sum(v * v for v in vectors), 1.0))
        return each(vectors, r, j, real)

    def add(
        total: tuple[jax.Array, ...], chunk: tuple[jax.Array, jax.Array | None]
    ) -> tuple[tuple[jax.Array, ...], None]:
        return jax.tree.map(jnp.add, total, sum_chunk(chunk)), None

    first = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), (chunks, shifts))
    shapes = jax.eval_shape(sum_chunk, first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, (chunks, shifts))[0]
