"""Pairs of an observable: rows of neighbors within a range, and sums over them in little memory."""

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
    """Check that the argument is one System, not a batch, and return it."""
    if not isinstance(system, System):
        raise InputError(
            f"an observable takes a System and got a {type(system).__name__}: give eq.system."
        )
    if system.batch is not None:
        raise InputError(
            f"an observable is of one system: use jax.vmap(...)(batch) for these {system.batch}."
        )
    return system


def positive(name: str, value: ArrayLike) -> float:
    """Check a length that is a setting of an observable, and return it as a float."""
    need = "give a positive length."
    array = real_array(name, value, need)
    if isinstance(array, Tracer):
        raise InputError(
            f"{name} is traced: it is a setting and not differentiated, give a number."
        )
    if array.ndim or not 0 < float(array) < np.inf:
        raise InputError(f"{name} is {short(value)}: {need}")
    return float(array)


def rise(x: jax.Array) -> jax.Array:
    """A smooth step: 0 up to x = 0, x^3 (10 - 15 x + 6 x^2) up to x = 1, and 1 beyond.

    This function is twice continuously differentiable.
    """
    x = jnp.clip(x, 0.0, 1.0)
    return x**3 * (10.0 - 15.0 * x + 6.0 * x**2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Range:
    """The function (i, j) -> range of the pair that neighbor lists take; here the same for all."""

    length: jax.Array

    def __call__(self, i: jax.Array, j: jax.Array) -> jax.Array:
        return self.length


def pairs_within(system: System, range: float) -> Neighbors:
    """List the pairs nearer than a range, for the argument ``pairs`` of observables.

    The list is for observables that reach beyond the potential. It is made by the cell search of
    the neighbor lists, in a time proportional to the number of particles. This function cannot run
    in compiled code: call it outside of the observable, and let the function that is differentiated
    use the list, as in this example with a minimum eq from ``ms.minimize``:

        near = ms.observables.pairs_within(eq.system, 1.5)
        ms.gradient(lambda s: ms.observables.bond_order(s, 6, 1.5, near), eq)

    The list also contains pairs up to a skin (``pairs.skin``) beyond the range, 0.3 of the range or
    what the cell leaves room for. The list is complete as long as no particle has moved by more
    than half the skin relative to the cell. For a derivative at one configuration the list is
    always complete; along a path of minimizations it may not be. Outside of compiled code an
    observable refuses a list that is no longer complete; inside, no check is possible.

    Args:
      system: one system.
      range: a length, at most half the smallest height of the cell.

    Raises:
      InputError: a range that is too long for the cell.
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
    """The smallest distance between opposite faces of a cell."""
    return float(np.min(heights(np.asarray(box))))


def _check_height(system: System, length: float) -> None:
    """Refuse a range in which a particle meets two images of another; a traced cell passes."""
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
    """Return rows of neighbors (capacity, n) with each pair nearer than ``length`` twice.

    The rows are padded with n.

    The rows come from ``pairs``; where this is None, from the neighbor list of the system if it
    reaches as far, else from all pairs of a small system.
    """
    _check_height(system, length)
    n = system.n
    listed = system.neighbors
    if pairs is not None:
        return _check_pairs(system, length, pairs)
    if listed.complete and listed.rows.shape[0] == n - 1:
        return listed.rows
    reach = system.potential.lengths(
        system.params, (listed.rows[:1], listed.rows[:1]), n, system.species, 0
    )
    # a range that is a float depends on no parameter, so it is known in traced code as well
    if isinstance(reach, float) and length <= reach < np.inf and not listed.complete:
        return listed.rows
    if n <= ALL_PAIRS:
        return neighbors.all_pairs(n).rows
    raise InputError(
        f"the system's list of neighbors does not reach {length:g}, and {n:,} particles are too"
        f" many for all pairs: give pairs=ms.observables.pairs_within(system, {length:g}), made"
        " outside of what is differentiated."
    )


def _check_pairs(system: System, length: float, pairs: Neighbors) -> jax.Array:
    """Check that the user's list is of this system and complete, and return its rows."""
    if not isinstance(pairs, Neighbors):
        raise InputError(
            f"pairs is {short(pairs)}: give what ms.observables.pairs_within(system, range)"
            " returns."
        )
    if pairs.rows.shape[1] != system.n:
        raise InputError(
            f"pairs are of {pairs.rows.shape[1]} particles and the system has {system.n}: make a"
            " new list, ms.observables.pairs_within(system, range)."
        )
    if pairs.complete:
        return pairs.rows
    assert pairs.given is not None
    (reach,) = pairs.given
    # 1e-6, because the range may be stored in single precision
    if not isinstance(reach, Tracer) and length > float(reach) * (1.0 + 1e-6):
        raise InputError(
            f"`pairs` reaches {float(reach):g}, and the observable needs {length:g}: give "
            f"ms.observables.pairs_within(system, {length:g})."
        )
    complete = neighbors.within(system.positions, *neighbors.slack(pairs, system.box, reach))
    if not isinstance(complete, Tracer) and not bool(complete):
        raise InputError(
            "particles have moved by more than half the skin of the pairs, so that some may be"
            " missing: make a new list, ms.observables.pairs_within(system, range)."
        )
    return pairs.rows


def summed(system: System, rows: jax.Array, each: Each) -> tuple[jax.Array, ...]:
    """Sum pair quantities over the neighbors of each particle, (n,) each, or over all pairs.

    The rows are summed in chunks. A derivative recomputes each chunk, so that the memory is that of
    one chunk.

    Args:
      system: one system.
      rows: (capacity, n), padded with n.
      each: (vectors R_j - R_i as components, distances r, indices j, whether it is a pair), each of
        shape (ROWS, n), -> the quantities, already summed over the rows of the chunk.
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
