"""The pairs that an observable sums over: rows of neighbors within a range, and sums over them in
little memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mdsens._util.errors import InputError
from mdsens._util.lattice import Components, components, heights, nearest_images
from mdsens._util.validation import real_array, short
from mdsens.model import neighbors
from mdsens.model.neighbors import Neighbors
from mdsens.model.system import System

__all__ = ["pairs_within", "positive", "rise", "rows_within", "single", "summed"]

ALL_PAIRS = 4000  # particles up to which all pairs are looked at: a second on one core
LISTED = 2.05  # a list needs a cell of this many ranges, so that it has a skin
ROWS = 16  # of neighbors that are looked at together

Each = Callable[[Components, jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]]


def single(system: System) -> System:
    """The system, or an error that says what to give instead."""
    if not isinstance(system, System):
        raise InputError(
            f"an observable is of a System and got a {type(system).__name__}: give eq.system."
        )
    if system.batch is not None:
        raise InputError(
            f"an observable is of one system: use jax.vmap(...)(batch) for these {system.batch}."
        )
    return system


def positive(name: str, value: Any) -> float:
    """A length that is a setting of an observable, checked."""
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
    """0 up to x = 0, 1 from x = 1 on, x^3 (10 - 15 x + 6 x^2) between: twice continuously
    differentiable.
    """
    x = jnp.clip(x, 0.0, 1.0)
    return x**3 * (10.0 - 15.0 * x + 6.0 * x**2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Range:
    """(i, j) -> one length for every pair."""

    length: jax.Array

    def __call__(self, i: jax.Array, j: jax.Array) -> jax.Array:
        return self.length


def pairs_within(system: System, range: float) -> Neighbors:
    """The pairs nearer than a range, for the ``pairs`` of observables that reach beyond the potential.
    Host code.

    By the cell search of the neighbor lists: its time goes with the number of particles. Make it
    outside of the observable, and let the function that is differentiated capture it:

        near = ms.observables.pairs_within(eq.system, 1.5)
        ms.gradient(lambda s: ms.observables.bond_order(s, 6, 1.5, near), eq)

    It also holds pairs up to a skin beyond the range, 0.3 of it or what the cell leaves room for.
    It is complete until a particle has moved by half the skin against the cell (``pairs.skin``):
    for a derivative at one configuration always, along a path of minimizations until then. On the
    host an observable refuses a list that is not complete any more; traced code cannot.

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
            "pairs_within is host code: call it outside of what is traced, and capture what it"
            " returns."
        )
    if (
        box is not None
        and system.n > ALL_PAIRS
        and LISTED * length > (least := float(np.min(heights(np.asarray(box)))))
    ):
        raise InputError(
            f"range is {length:g}, nearly half the smallest height of the cell, {least:g}, where a"
            f" list holds all pairs of {system.n:,} particles: give a shorter one."
        )
    each = _Range(jnp.asarray(length, system.positions.dtype))
    return neighbors.allocate(system.positions, box, each, length)


def _check_height(system: System, length: float) -> None:
    """Refuse a range in which a particle would meet two images of another, where the cell is known."""
    box = system.box
    if box is None or isinstance(box, Tracer):
        return
    least = float(np.min(heights(np.asarray(box))))
    if 2.0 * length > least * (1.0 + 1e-12):
        raise InputError(
            f"pairs are looked at up to {length:g}, beyond half the smallest height of the cell,"
            f" {least:g}, where a particle meets two images of another: give a shorter range, or a"
            " larger cell."
        )


def rows_within(system: System, length: float, pairs: Neighbors | None) -> jax.Array:
    """Rows (capacity, n) of neighbors, padded with n, that hold every pair nearer than ``length``,
    each twice.
    """
    _check_height(system, length)
    n, own = system.n, system.neighbors
    if pairs is not None:
        return _given(system, length, pairs)
    if own.complete and own.rows.shape[0] == n - 1:
        return own.rows
    reach = system.potential.lengths(
        system.params, (own.rows[:1], own.rows[:1]), n, system.species, 0
    )
    if (
        isinstance(reach, float) and length <= reach < np.inf and not own.complete
    ):  # fixed, so known in traced code too
        return own.rows
    if n <= ALL_PAIRS:
        return neighbors.all_pairs(n).rows
    raise InputError(
        f"the system's list of neighbors does not reach {length:g}, and {n:,} particles are too"
        f" many for all pairs: give pairs=ms.observables.pairs_within(system, {length:g}), made"
        " outside of what is differentiated."
    )


def _given(system: System, length: float, pairs: Neighbors) -> jax.Array:
    if not isinstance(pairs, Neighbors):
        raise InputError(
            f"pairs is {short(pairs)}: give what ms.observables.pairs_within(system, range)"
            " returns."
        )
    if pairs.rows.shape[1] != system.n:
        raise InputError(
            f"pairs are of {pairs.rows.shape[1]} particles and the system has {system.n}: make them"
            " anew."
        )
    if pairs.complete:
        return pairs.rows
    assert pairs.given is not None
    (reach,) = pairs.given
    if not isinstance(reach, Tracer) and length > float(reach) * (1.0 + 1e-6):
        raise InputError(
            f"pairs reach {float(reach):g}, and this looks at pairs up to {length:g}: give "
            f"ms.observables.pairs_within(system, {length:g})."
        )
    still = neighbors.within(system.positions, *neighbors.slack(pairs, system.box, reach))
    if not isinstance(still, Tracer) and not bool(still):
        raise InputError(
            "particles have moved by more than half the skin of the pairs, so that some may be"
            " missing: make them anew, ms.observables.pairs_within(system, range)."
        )
    return pairs.rows


def summed(system: System, rows: jax.Array, each: Each) -> tuple[jax.Array, ...]:
    """The sum over each particle's neighbors of some quantities of the pair, (n,) each or a number.

    In chunks of rows, computed again where they are differentiated, so that it takes the memory of
    one chunk.

    Args:
      rows: (capacity, n), padded with n.
      each: (vectors R_j - R_i as components, r, j, whether it is a pair), each (ROWS, n), -> what
        is summed, already summed over the rows of the chunk.
    """
    n, more = system.n, -rows.shape[0] % ROWS
    chunks = jnp.pad(rows, ((0, more), (0, 0)), constant_values=n).reshape(-1, ROWS, n)
    images, x = nearest_images(system.box, system.boundary.orthogonal), components(system.positions)

    @jax.checkpoint
    def part(j: jax.Array) -> tuple[jax.Array, ...]:
        real = j < n
        j = jnp.where(real, j, 0)
        apart = images(tuple(c[j] - c for c in x))
        r = jnp.sqrt(
            jnp.where(real, sum(v * v for v in apart), 1.0)
        )  # sqrt(0) on padding would make NaN derivatives
        return each(apart, r, j, real)

    def add(total: tuple[jax.Array, ...], j: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        return jax.tree.map(jnp.add, total, part(j)), None

    shapes = jax.eval_shape(part, jax.ShapeDtypeStruct((ROWS, n), rows.dtype))
    return jax.lax.scan(add, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), chunks)[0]
