"""Rows of the particles that can interact with each: a cell search behind a test that cannot lose a
pair in silence.

rows[:, i] names the particles j that stood nearer to i than l_ij + skin at the ``reference``
positions, l_ij the length beyond which the potential is zero for the two. A pair stands in the rows of
both, so that a force is a sum over rows, gathered and never scattered: half the time of a list of
pairs on one core, and the same sum on every run. Once particles have moved by d_i, in a cell
deformed by M, all that interact are still listed while

    skin lambda_min(M) - (1 - lambda_min(M)) max l_ij - 2 max |d_i| >= 0

and the parameters that give l_ij are the same; where not, the list is rebuilt. A rebuild that does
not fit the static capacities sets ``overflowed``; host code allocates again, traced code reports
it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.lattice import components, heights, inverse, nearest_images
from mdsens._util.portable import Portable

__all__ = [
    "Lengths",
    "Neighbors",
    "all_pairs",
    "allocate",
    "fitted",
    "no_pairs",
    "serves",
    "slack",
    "update",
    "within",
]

# particles; a search compiles in a second, and a step on all pairs costs as much from there on
ALL_PAIRS_BELOW = 64
SKIN = 0.3  # of the range: more rebuilds below, more padding above
# of a grid for each particle, at most: a liquid takes less than one, and more find nothing in a
# dilute gas
CELLS = 64
WORD = 32  # candidates that are marked as near in the bits of one integer
ROUND_OFF = 16  # eps of a height, which is computed by two divisions and a root

Lengths: TypeAlias = Callable[
    [jax.Array, jax.Array], Any
]  # of particles i and j; a pytree whose leaves are parameters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Neighbors(Portable):
    """The particles that each particle may interact with.

    Attributes:
      rows: (capacity, n) particle indices, rows[:, i] those near i, padded with n.
      reference: (n, d) Cartesian positions when the list was built; None for all pairs.
      reference_box: (d, d) cell at that time (an enclosing one for open boundaries); None for all
        pairs.
      given: the arrays that gave l_ij at that time; None for all pairs.
      skin: pairs nearer than l_ij + skin at the reference are listed; inf for all pairs.
      overflowed: True where pairs were lost.
      cells: cells along each cell vector; empty for all pairs.
      run_capacity: particles in a run of three cells along the last cell vector.
    """

    rows: jax.Array
    reference: jax.Array | None
    reference_box: jax.Array | None
    given: tuple[jax.Array, ...] | None
    skin: jax.Array
    overflowed: jax.Array
    cells: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    run_capacity: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def complete(self) -> bool:
        """True for a list of all pairs, which never needs an update."""
        return self.reference is None

    @property
    def pairs(self) -> jax.Array:
        """(2, capacity n) particle indices, each pair once, padded with n."""
        n = self.rows.shape[1]
        once = (self.rows > jnp.arange(n, dtype=self.rows.dtype)) & (self.rows < n)
        own = jnp.broadcast_to(jnp.arange(n, dtype=self.rows.dtype), self.rows.shape)
        return jnp.stack([jnp.where(once, own, n).ravel(), jnp.where(once, self.rows, n).ravel()])

    @property
    @jax.jit
    def used(self) -> jax.Array:
        """Rows up to the last one that is not empty."""
        filled = jnp.any(self.rows < self.rows.shape[1], axis=1)
        return jnp.max(filled * jnp.arange(1, self.rows.shape[0] + 1, dtype=jnp.int32), initial=0)

    def resized(self, capacity: int) -> Neighbors:
        """The same list in another number of rows, at least as many as are used."""
        more = max(capacity - self.rows.shape[0], 0)
        rows = jnp.pad(self.rows, ((0, more), (0, 0)), constant_values=self.rows.shape[1])
        return dataclasses.replace(self, rows=rows[:capacity])


def no_pairs(n: int, dtype: Any = float) -> Neighbors:
    """The empty list, for potentials without pairs; complete as long as the range is zero."""
    rows = jnp.zeros((0, n), jnp.int32)
    return Neighbors(rows, None, None, None, jnp.asarray(jnp.inf, dtype), jnp.zeros((), bool))


def all_pairs(n: int, dtype: Any = float) -> Neighbors:
    """The list in which everybody is near, always."""
    rows = jnp.asarray((np.arange(n)[None] + np.arange(1, n)[:, None]) % max(n, 1), jnp.int32)
    return Neighbors(rows, None, None, None, jnp.asarray(jnp.inf, dtype), jnp.zeros((), bool))


def _cell_of(positions: Any, box: Any, cells: tuple[int, ...]) -> Any:
    """The cell of each particle along each cell vector, (d, n)."""
    xp: Any = positions.__array_namespace__()
    fractional = positions @ inverse(box).T
    fractional = fractional - xp.floor(fractional)
    # a coordinate of -1e-17 wraps to 1.0, which is the first cell, not the last
    return xp.stack([(fractional[:, a] * m).astype(xp.int32) % m for a, m in enumerate(cells)])


def _fullest_run(positions: np.ndarray, box: np.ndarray, cells: tuple[int, ...]) -> int:
    """Particles in the fullest run of three cells along the last cell vector."""
    counts = np.zeros(cells, int)
    np.add.at(counts, tuple(_cell_of(positions, box, cells)), 1)
    if cells[-1] > 2:
        counts = np.roll(counts, 1, axis=-1) + counts + np.roll(counts, -1, axis=-1)
    else:
        counts = np.sum(counts, axis=-1)
    return int(np.max(counts, initial=0))


class _Grid(NamedTuple):
    """Particles in the order of their cells: a run of cells along the last cell vector is a range
    of ``order``.
    """

    order: jax.Array  # (n,)
    where: jax.Array  # (d, n)
    first: jax.Array  # (cells,) where the run around each cell begins
    length: jax.Array  # (cells,) of the run
    line: jax.Array  # (lines,) where the line of cells that it wraps around in begins
    line_end: jax.Array  # (lines,)


def _order(index: jax.Array, count: int) -> jax.Array:
    """The particles by their cell, those of one cell in their own order."""
    n, wide = index.shape[0], jax.dtypes.canonicalize_dtype(jnp.int64)
    if count * n > jnp.iinfo(wide).max:
        return jnp.argsort(index).astype(jnp.int32)
    # one number for both, since sorting by one while carrying another takes XLA six times as long
    return (jax.lax.sort(index.astype(wide) * n + jnp.arange(n, dtype=wide)) % n).astype(jnp.int32)


def _grid(positions: jax.Array, box: jax.Array, cells: tuple[int, ...]) -> _Grid:
    where, last = _cell_of(positions, box, cells), cells[-1]
    index = where[0]
    for at, m in zip(where[1:], cells[1:], strict=True):
        index = index * m + at
    order = _order(index, math.prod(cells))
    ends = (
        jnp.cumsum(jnp.zeros(math.prod(cells), jnp.int32).at[index].add(1))
        .astype(jnp.int32)
        .reshape(-1, last)
    )
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends.ravel()[:-1]]).reshape(-1, last)
    line, line_end = starts[:, 0], ends[:, -1]
    if last > 2:
        counts = ends - starts
        first, length = (
            jnp.roll(starts, 1, axis=1),
            jnp.roll(counts, 1, axis=1) + counts + jnp.roll(counts, -1, axis=1),
        )
    else:
        first, length = (
            jnp.broadcast_to(x[:, None], starts.shape) for x in (line, line_end - line)
        )
    return _Grid(order, where, first.ravel(), length.ravel(), line, line_end)


@functools.partial(jax.jit, static_argnames=("cells", "run_capacity", "capacity"))
def _search(
    positions: jax.Array,
    box: jax.Array,
    lengths: Lengths,
    skin: jax.Array,
    cells: tuple[int, ...],
    run_capacity: int,
    capacity: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All pairs nearer than l_ij + skin: (rows, most neighbors of one particle, particles in the
    fullest run).
    """
    n, words = positions.shape[0], -(-run_capacity // WORD)
    grid, x, images = _grid(positions, box, cells), components(positions), nearest_images(box)
    sorted_x, own = components(positions[grid.order]), jnp.arange(n, dtype=jnp.int32)
    longest = jnp.max(grid.length)

    def place(line: jax.Array, k: jax.Array) -> jax.Array:
        """Where in the grid's order the k-th candidate of each particle on its line of cells is,
        (n,).
        """
        first, end = grid.first[line * cells[-1] + grid.where[-1]], grid.line_end[line]
        at = first + k
        return jnp.minimum(jnp.where(at >= end, at - (end - grid.line[line]), at), n - 1)

    def search_line(offset: jax.Array) -> tuple[jax.Array, jax.Array]:
        line = jnp.zeros(n, jnp.int32)
        for at, by, m in zip(grid.where, offset, cells, strict=False):
            line = line * m + jnp.mod(at + by, m)
        length = grid.length[line * cells[-1] + grid.where[-1]]

        def test(k: jax.Array, marks: jax.Array) -> jax.Array:
            at = place(line, k)
            apart, j = (
                images(tuple(c - s[at] for c, s in zip(x, sorted_x, strict=True))),
                grid.order[at],
            )
            near = (
                (sum(v * v for v in apart) < (lengths(own, j) + skin) ** 2)
                & (k < length)
                & (j != own)
            )
            bit = jnp.where(near, jnp.uint32(1) << (k % WORD).astype(jnp.uint32), jnp.uint32(0))
            return jnp.where(jnp.arange(words)[:, None] == k // WORD, marks | bit, marks)

        none = jnp.zeros((words, n), jnp.uint32)
        return line, jax.lax.fori_loop(0, jnp.minimum(longest, run_capacity), test, none)

    sides = [(0,) if m == 1 else (0, 1) if m == 2 else (-1, 0, 1) for m in cells[:-1]]
    offsets = jnp.asarray(list(itertools.product(*sides)), jnp.int32)
    lines, marks = jax.lax.map(search_line, offsets)
    marks = marks.reshape(-1, n)
    most = jnp.max(jnp.sum(jax.lax.population_count(marks), axis=0), initial=0).astype(jnp.int32)
    each = jnp.arange(marks.shape[0], dtype=jnp.int32)[:, None]

    def take(r: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows, marks = carry
        which = jnp.argmax(marks != 0, axis=0).astype(jnp.int32)
        word = jnp.max(jnp.where(each == which, marks, 0), axis=0)
        k = jax.lax.population_count((word & -word) - 1).astype(jnp.int32) + which % words * WORD
        j = grid.order[
            place(jnp.max(jnp.where(each[: len(lines)] == which // words, lines, 0), axis=0), k)
        ]
        rows = rows.at[r].set(jnp.where(word != 0, j, n))
        return rows, jnp.where(each == which, word & (word - 1), marks)

    rows = jnp.full((capacity, n), n, jnp.int32)
    # of a list cut down to its filled rows, whose particles are all alone, there is none to write
    if capacity:
        rows, _ = jax.lax.fori_loop(0, jnp.minimum(most, capacity), take, (rows, marks))
    return rows, most, longest


def _skin(
    range_: Any, lattice: Any, cells: tuple[int, ...], periodic: bool, share: Any = SKIN
) -> jax.Array:
    """The skin that the grid and the cell leave room for; below zero where they are too small for
    the range.
    """
    xp: Any = lattice.__array_namespace__()
    # of two cells or one, all are looked through
    sides = heights(lattice) / np.asarray([m if m > 2 else 1 for m in cells], lattice.dtype)
    skin = xp.minimum(share * range_, xp.min(sides) * (1.0 + 1e-6) - range_)
    return xp.minimum(skin, 0.4999 * xp.min(heights(lattice)) - range_) if periodic else skin


def _lattice(neighbors: Neighbors, box: jax.Array | None) -> jax.Array:
    # open boundaries keep the enclosing cell: its images only add candidates, which lie beyond the
    # range in open space
    return neighbors.reference_box if box is None else box  # type: ignore[return-value]


def slack(
    neighbors: Neighbors, box: jax.Array | None, range_: jax.Array
) -> tuple[jax.Array | None, jax.Array]:
    """Where each particle was, carried along with the cell, and how far it may have moved:
    (anchors, distance).

    While no particle is farther than that from its anchor, the list is complete; below zero, it is
    not.
    """
    if neighbors.complete:
        return None, jnp.asarray(jnp.inf, neighbors.skin.dtype)
    lattice = _lattice(neighbors, box)
    deformation = lattice @ inverse(neighbors.reference_box)
    stretch = 1.0 - jnp.linalg.norm(deformation - jnp.eye(lattice.shape[0], dtype=lattice.dtype))
    return neighbors.reference @ deformation.T, 0.5 * (
        neighbors.skin * stretch - (1.0 - stretch) * range_
    )


def within(positions: jax.Array, anchors: jax.Array | None, distance: jax.Array) -> jax.Array:
    """Whether no particle is farther than ``distance`` from its anchor."""
    if anchors is None:
        return jnp.ones((), bool)
    return (jnp.max(jnp.sum((positions - anchors) ** 2, axis=1)) <= distance**2) & (distance >= 0)


def _still_complete(
    neighbors: Neighbors,
    positions: jax.Array,
    box: jax.Array | None,
    lengths: Lengths,
    range_: jax.Array,
) -> jax.Array:
    found, leaves = within(positions, *slack(neighbors, box, range_)), jax.tree.leaves(lengths)
    if neighbors.given is not None and len(neighbors.given) != len(leaves):
        return jnp.zeros((), bool)  # made for another potential
    for then, now in zip(neighbors.given or leaves, leaves, strict=True):
        found = found & jnp.all(then == now)
    return found


def _too_small(range_: Any, box: Any, times: float) -> Any:
    """Whether a cell's smallest height is under twice the range, by more than so many times its
    round-off.

    Compiled code rounds otherwise than the host, and must not refuse a cell of just that size which
    the host took: it would ask for a larger list for ever.
    """
    if box is None:
        return jnp.zeros((), bool)
    least = heights(box).min() * (1.0 + times * ROUND_OFF * np.finfo(box.dtype).eps)
    return ~(2.0 * range_ <= least)  # so that NaN is too small


@jax.jit
def serves(
    neighbors: Neighbors,
    positions: jax.Array,
    box: jax.Array | None,
    lengths: Lengths,
    range_: jax.Array,
) -> jax.Array:
    """Whether the list holds every pair that interacts at ``positions``, as it is."""
    if neighbors.complete:
        return (range_ > 0) & ~_too_small(range_, box, 2.0)
    return ~neighbors.overflowed & _still_complete(neighbors, positions, box, lengths, range_)


@jax.jit
def update(
    neighbors: Neighbors,
    positions: jax.Array,
    box: jax.Array | None,
    lengths: Lengths,
    range_: jax.Array,
    skin: Any = SKIN,
    anew: Any = False,
) -> tuple[Neighbors, jax.Array]:
    """A list complete at ``positions``, or marked as overflowed; and whether it was rebuilt.

    Args:
      neighbors: the list so far.
      positions: (n, d).
      box: the cell, None for open boundaries.
      lengths: l_ij at the present parameters.
      range_: their largest.
      skin: of a list that is rebuilt, as a share of the range.
      anew: rebuild whatever is listed.

    Traceable. Nothing of it is differentiated.
    """
    positions, box, lengths, range_ = jax.lax.stop_gradient((positions, box, lengths, range_))
    too_small = _too_small(range_, box, 2.0)
    if neighbors.complete:
        return dataclasses.replace(
            neighbors, overflowed=neighbors.overflowed | too_small
        ), jnp.zeros((), bool)
    lattice = _lattice(neighbors, box)

    def rebuild(old: Neighbors) -> Neighbors:
        capacity, skin_now = (
            old.rows.shape[0],
            _skin(range_, lattice, old.cells, box is not None, skin),
        )
        rows, most, fullest = _search(
            positions, lattice, lengths, skin_now, old.cells, old.run_capacity, capacity
        )
        lost = (most > capacity) | (fullest > old.run_capacity) | (skin_now < 0) | too_small
        return dataclasses.replace(
            old,
            rows=rows,
            reference=positions,
            reference_box=lattice,
            given=tuple(jax.tree.leaves(lengths)),
            skin=skin_now.astype(old.skin.dtype),
            overflowed=old.overflowed | lost,
        )

    stale = jnp.asarray(anew) | ~_still_complete(neighbors, positions, box, lengths, range_)
    return jax.lax.cond(stale, rebuild, lambda old: old, neighbors), stale


def allocate(
    positions: jax.Array,
    box: jax.Array | None,
    lengths: Lengths,
    range_: float,
    room: float = 1.25,
    like: Neighbors | None = None,
) -> Neighbors:
    """A new list at ``positions``, on the host.

    Args:
      positions: (n, d).
      box: the cell, None for open boundaries.
      lengths: l_ij.
      range_: their largest; inf for all pairs, 0 where the potential has no neighbor pairs.
      room: capacity over what is found now.
      like: take at least this list's capacities, so that compiled code can be used again.
    """
    n, dtype = positions.shape[0], positions.dtype
    if math.isnan(range_):
        raise InputError(
            f"the range of the interactions is {range_}: mend the cutoff's function, or the"
            " parameters."
        )
    if box is not None and math.isfinite(range_):
        cell = np.asarray(box)
        smallest = float(np.min(heights(cell)))
        if _too_small(range_, cell, 1.0):
            raise InputError(
                f"box: its smallest height is {smallest:.6g}, under twice the interaction range"
                f" {range_:.6g}, so a particle would meet two images of another: repeat the cell,"
                " or shorten the cutoff."
            )
    elif box is not None and range_ > 0:
        raise InputError(
            "a potential without a cutoff needs open boundaries: give it a cutoff, or no box."
        )
    if range_ == 0.0:
        return no_pairs(n, dtype)
    reach = (1.0 + SKIN) * range_
    if n <= ALL_PAIRS_BELOW or not math.isfinite(reach):
        return all_pairs(n, dtype)
    lattice = _enclosing(positions, reach) if box is None else box
    sides = np.asarray(lattice)
    cells = _cells(heights(sides), reach, n)
    if not float(_skin(range_, sides, cells, box is not None)) > 0.02 * range_:
        return all_pairs(n, dtype)  # the cell is hardly larger than twice the range
    return fitted(positions, box, lattice, lengths, range_, cells, room, like)


def _cells(across: np.ndarray, reach: float, n: int) -> tuple[int, ...]:
    """Cells along each cell vector, no narrower than ``reach``, and wider where a gas so dilute
    would fill memory.
    """
    count = np.clip(np.floor(across / reach), 1.0, 2.0**20)
    while np.prod(count) > CELLS * n:
        count = np.where(count == np.max(count), np.ceil(0.5 * count), count)
    return tuple(int(m) for m in count)


def fitted(
    positions: jax.Array,
    box: jax.Array | None,
    lattice: jax.Array,
    lengths: Lengths,
    range_: float,
    cells: tuple[int, ...],
    room: float = 1.25,
    like: Neighbors | None = None,
) -> Neighbors:
    """A list of one grid, with the capacities that the positions need, or those of ``like`` if
    larger.
    """
    (n, d), sides = positions.shape, np.asarray(lattice)
    skin = jnp.asarray(_skin(range_, sides, cells, box is not None), positions.dtype)
    run_capacity = min(_eights(room * _fullest_run(np.asarray(positions), sides, cells)), n)
    if like is not None and like.cells == cells:
        run_capacity = max(run_capacity, like.run_capacity)
    ball = {2: math.pi, 3: 4.0 / 3.0 * math.pi}[d] * (range_ + float(skin)) ** d
    mean = n * min(1.0, ball / abs(float(np.linalg.det(sides))))
    guess = _eights(mean + 3.0 * math.sqrt(mean))
    while True:
        rows, most, _ = _search(positions, lattice, lengths, skin, cells, run_capacity, guess)
        if int(most) <= guess:
            break
        guess = _eights(room * int(most))
    # rows for a first few, where nobody is near anybody: then the first pair that comes near finds
    # room
    capacity = min(_eights(max(room * int(most), 1.0)), n - 1)
    if like is not None and not like.complete:
        capacity = max(capacity, like.rows.shape[0])
    given, never = tuple(jax.tree.leaves(lengths)), jnp.zeros((), bool)
    return Neighbors(rows, positions, lattice, given, skin, never, cells, run_capacity).resized(
        capacity
    )


def _enclosing(positions: jax.Array, reach: float) -> jax.Array:
    span = np.ptp(np.asarray(positions), axis=0) + 2.0 * reach
    return jnp.diag(jnp.asarray(np.maximum(1.5 * span, 3.0 * reach), positions.dtype))


def _eights(count: float) -> int:
    """Up to the next multiple of 8, so that one random start and the next have the same compiled
    shapes.
    """
    return 8 * math.ceil(count / 8)
