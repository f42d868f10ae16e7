"""Neighbor lists: for each particle, the particles that it can interact with.

A search over grid cells builds the list. A test of the list's completeness makes sure that no pair
is lost unnoticed.

The array ``rows`` of a list has in column i the particles j that were nearer to particle i than
l_ij + skin when the list was built; l_ij is the distance beyond which the potential of the pair is
zero. A pair is in the columns of both its particles. The force on a particle is therefore a sum
over its own column, which takes half the time of a list of pairs on one core, and gives the same
sum on every run. After the particles have moved by d_i, in a cell deformed by M, the list still
contains all interacting pairs if

    skin lambda_min(M) - (1 - lambda_min(M)) max l_ij - 2 max |d_i| >= 0

(lambda_min(M) is the least factor by which M stretches a vector) and the parameters that determine
l_ij are unchanged; otherwise the list is rebuilt. The list has a fixed capacity. If the neighbors
do not fit in, the list is marked as ``overflowed``: a larger list is then allocated outside of
compiled code, while compiled code only reports the overflow.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from mdsens._util.errors import InputError
from mdsens._util.lattice import (
    BALL_OF_UNIT_DIAMETER,
    components,
    heights,
    inverse,
    nearest_images,
)
from mdsens._util.portable import Portable
from mdsens._util.precision import full_precision

__all__ = [
    "Lengths",
    "Neighbors",
    "all_pairs",
    "allocate",
    "filled_rows",
    "fitted",
    "no_pairs",
    "serves",
    "slack",
    "update",
    "within",
]

# Particles up to which all pairs are listed. Compiling a search takes a second, and from about this
# size on a step on all pairs costs as much as one on a list (2-D packings: from about 50 on).
ALL_PAIRS_BELOW = 64
# Skin as a share of the range. Smaller, the list is rebuilt more often; larger, its rows hold more
# particles that do not interact.
SKIN = 0.3
# Grid cells per particle, at most. A liquid takes fewer than one; in a dilute gas more of them find
# no more pairs and would fill memory.
CELLS = 64
# Candidates whose nearness is marked in the bits of one integer (uint32).
WORD = 32
# Round-off of a height in units of eps: it is computed by two divisions and a square root.
ROUND_OFF = 16

# (i, j) -> l_ij of particles i and j; a pytree whose leaves are the parameters that determine it
Lengths: TypeAlias = Callable[[jax.Array, jax.Array], Any]

# host code (numpy) and traced code (jax) share the functions that take these
A = TypeVar("A", jax.Array, np.ndarray)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Neighbors(Portable):
    """A neighbor list: for each of n particles, the particles with which it may interact.

    l_ij is the distance beyond which particles i and j do not interact.

    Attributes:
      rows: (capacity, n) particle indices; rows[:, i] are the particles near particle i, and n in
        places that are not used.
      reference: (n, d) Cartesian positions when the list was built; None for a list of all pairs.
      reference_box: (d, d) cell when the list was built (an enclosing cell for open boundaries);
        None for a list of all pairs.
      given: the parameter arrays that determined l_ij when the list was built; None for a list of
        all pairs.
      skin: pairs nearer than l_ij + skin were listed when the list was built; inf for all pairs.
      overflowed: True if pairs were lost because the list was too small.
      cells: number of cells along each cell vector of the grid by which neighbors are searched;
        empty for a list of all pairs.
      run_capacity: number of particles that the search allows in three grid cells that follow each
        other along the last cell vector.
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
        """True if the neighbor list never needs an update, such as a list of all pairs."""
        return self.reference is None

    @property
    def pairs(self) -> jax.Array:
        """Particle indices of the pairs in the neighbor list, (2, m), each pair once.

        Places that hold no pair have the index n, which is the number of particles.
        """
        n = self.rows.shape[1]
        once = (self.rows > jnp.arange(n, dtype=self.rows.dtype)) & (self.rows < n)
        first = jnp.broadcast_to(jnp.arange(n, dtype=self.rows.dtype), self.rows.shape)
        return jnp.stack([jnp.where(once, first, n).ravel(), jnp.where(once, self.rows, n).ravel()])

    @property
    @jax.jit
    def used(self) -> jax.Array:
        """Number of rows of the neighbor list that are in use, up to the last that is not empty."""
        filled = jnp.any(self.rows < self.rows.shape[1], axis=1)
        return jnp.max(filled * jnp.arange(1, self.rows.shape[0] + 1, dtype=jnp.int32), initial=0)

    def resized(self, capacity: int) -> Neighbors:
        """Return the neighbor list with ``capacity`` rows, at least as many as are in use."""
        more = max(capacity - self.rows.shape[0], 0)
        rows = jnp.pad(self.rows, ((0, more), (0, 0)), constant_values=self.rows.shape[1])
        return dataclasses.replace(self, rows=rows[:capacity])


def no_pairs(n: int, dtype: DTypeLike = float) -> Neighbors:
    """Return an empty neighbor list of n particles, for potentials without pair interactions.

    The list is complete as long as the range of the interactions is zero.
    """
    return _complete_list(jnp.zeros((0, n), jnp.int32), dtype)


def all_pairs(n: int, dtype: DTypeLike = float) -> Neighbors:
    """Return the list of all pairs of n particles, complete wherever the particles move."""
    # row k is shifted by k + 1 in a circle: no row has a particle as its own neighbor
    rows = jnp.asarray((np.arange(n)[None] + np.arange(1, n)[:, None]) % max(n, 1), jnp.int32)
    return _complete_list(rows, dtype)


def _complete_list(rows: jax.Array, dtype: DTypeLike) -> Neighbors:
    """Return a neighbor list, with given rows of particle indices, that never needs an update."""
    return Neighbors(
        rows=rows,
        reference=None,
        reference_box=None,
        given=None,
        skin=jnp.asarray(jnp.inf, dtype),
        overflowed=jnp.zeros((), bool),
    )


@full_precision
def _cell_of(positions: A, box: A, cells: tuple[int, ...]) -> A:
    """Compute the index of each particle's grid cell along each of the d cell vectors, (d, n).

    ``cells`` are the numbers of grid cells along the cell vectors.
    """
    xp: Any = positions.__array_namespace__()
    fractional = positions @ inverse(box).T
    fractional = fractional - xp.floor(fractional)
    # a coordinate of -1e-17 wraps to 1.0, which is the first cell, not the last
    return xp.stack([(fractional[:, a] * m).astype(xp.int32) % m for a, m in enumerate(cells)])


def _fullest_run(positions: np.ndarray, box: np.ndarray, cells: tuple[int, ...]) -> int:
    """Return the largest number of particles in three successive grid cells.

    The three grid cells follow each other along the last cell vector.
    """
    counts = np.zeros(cells, int)
    # counts[…] += 1 would count several particles of one cell once
    np.add.at(counts, tuple(_cell_of(positions, box, cells)), 1)
    if cells[-1] > 2:
        counts = np.roll(counts, 1, axis=-1) + counts + np.roll(counts, -1, axis=-1)
    else:  # a run is the whole line, each cell once
        counts = np.sum(counts, axis=-1)
    return int(np.max(counts, initial=0))


class _Grid(NamedTuple):
    """The particles sorted by grid cell, for a search of neighbors.

    A line of grid cells is all of them along the last cell vector. A run is a grid cell with the
    one before and the one after it in its line; the line closes on itself. The particles of a run
    follow each other in the sorted array ``order``.
    """

    order: jax.Array  # (n,) particle indices, those of one cell together
    where: jax.Array  # (d, n) index of each particle's cell along each cell vector
    first: jax.Array  # (cells,) where in order the run around each cell begins
    length: jax.Array  # (cells,) particles in the run
    line: jax.Array  # (lines,) where in order each line of cells begins: a run wraps around in it
    line_end: jax.Array  # (lines,) where it ends


def _order(index: jax.Array, count: int) -> jax.Array:
    """Return the particle indices (n,) sorted by grid cell, and by index within a grid cell.

    Args:
      index: (n,) number of each particle's grid cell.
      count: number of grid cells.
    """
    n = index.shape[0]
    wide = jax.dtypes.canonicalize_dtype(jnp.int64)
    if count * n > jnp.iinfo(wide).max:
        return jnp.argsort(index).astype(jnp.int32)
    # One key of both numbers: sorting by one while carrying the other takes XLA six times as long.
    return (jax.lax.sort(index.astype(wide) * n + jnp.arange(n, dtype=wide)) % n).astype(jnp.int32)


def _grid(positions: jax.Array, box: jax.Array, cells: tuple[int, ...]) -> _Grid:
    """Sort the particles by the cells of a grid, ``cells`` of them along each cell vector."""
    where = _cell_of(positions, box, cells)
    last = cells[-1]
    # number of each particle's cell; neighbors along the last cell vector follow each other
    index = where[0]
    for along, m in zip(where[1:], cells[1:], strict=True):
        index = index * m + along
    order = _order(index, math.prod(cells))
    counts = jnp.zeros(math.prod(cells), jnp.int32).at[index].add(1)
    ends = jnp.cumsum(counts).astype(jnp.int32).reshape(-1, last)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends.ravel()[:-1]]).reshape(-1, last)
    line = starts[:, 0]
    line_end = ends[:, -1]
    if last > 2:  # the run of a cell is the cell before it, itself and the cell after it
        counts = ends - starts
        first = jnp.roll(starts, 1, axis=1)
        length = jnp.roll(counts, 1, axis=1) + counts + jnp.roll(counts, -1, axis=1)
    else:  # the run is the whole line
        first = jnp.broadcast_to(line[:, None], starts.shape)
        length = jnp.broadcast_to((line_end - line)[:, None], starts.shape)
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
    """Find all pairs nearer than l_ij + skin, where the pair energy of i and j is zero beyond l_ij.

    The particles in nearby grid cells are candidates. First the candidates that are near enough are
    marked, by one bit for each. Then the marks are taken off one at a time, and the marked
    particles written as rows of particle indices.

    Returns:
      (rows of particle indices (capacity, n), the most neighbors of one particle, the most
      particles in three successive grid cells). Pairs are lost where the second number exceeds
      ``capacity`` or the third ``run_capacity``.
    """
    n = positions.shape[0]
    words = -(-run_capacity // WORD)  # integers that hold one mark per candidate, rounded up
    grid = _grid(positions, box, cells)
    x = components(positions)
    images = nearest_images(box)
    sorted_x = components(positions[grid.order])
    particles = jnp.arange(n, dtype=jnp.int32)
    longest = jnp.max(grid.length)

    def place(line: jax.Array, k: jax.Array) -> jax.Array:
        """Find the k-th candidate neighbor of each particle in a line of grid cells.

        The result (n,) gives its place in the array of particles sorted by grid cell.
        """
        first = grid.first[line * cells[-1] + grid.where[-1]]
        end = grid.line_end[line]
        index = first + k
        # a run that reaches the end of its line goes on at the line's beginning
        wrapped = jnp.where(index >= end, index - (end - grid.line[line]), index)
        # in range also where k is beyond the run: ``mark`` leaves such a candidate out
        return jnp.minimum(wrapped, n - 1)

    def search_line(offset: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mark the particles near each particle in one line of grid cells.

        The line is at ``offset`` from the particle's own line of grid cells.

        Returns:
          (number of the line for each particle (n,), marks as integers (words, n)). Each bit of the
          integers in column i is the mark of one candidate neighbor of particle i.
        """
        line = jnp.zeros(n, jnp.int32)
        # offsets are along all cell vectors but the last, along which the line runs
        for along, by, m in zip(grid.where, offset, cells, strict=False):
            line = line * m + jnp.mod(along + by, m)
        length = grid.length[line * cells[-1] + grid.where[-1]]

        def mark(k: jax.Array, marks: jax.Array) -> jax.Array:
            """Set a bit for the k-th candidate neighbor j of each particle i, if it is near enough.

            It is near enough below the distance l_ij + skin, where l_ij is the distance beyond
            which the pair energy is zero.
            """
            index = place(line, k)
            apart = images(tuple(c - s[index] for c, s in zip(x, sorted_x, strict=True)))
            j = grid.order[index]
            near = (
                (sum(v * v for v in apart) < (lengths(particles, j) + skin) ** 2)
                & (k < length)
                & (j != particles)
            )
            bit = jnp.where(near, jnp.uint32(1) << (k % WORD).astype(jnp.uint32), jnp.uint32(0))
            return jnp.where(jnp.arange(words)[:, None] == k // WORD, marks | bit, marks)

        none = jnp.zeros((words, n), jnp.uint32)
        return line, jax.lax.fori_loop(0, jnp.minimum(longest, run_capacity), mark, none)

    # neighboring lines; of one or two along a cell vector each is visited once
    sides = [(0,) if m == 1 else (0, 1) if m == 2 else (-1, 0, 1) for m in cells[:-1]]
    offsets = jnp.asarray(list(itertools.product(*sides)), jnp.int32)
    lines, marks = jax.lax.map(search_line, offsets)
    # row r of the result belongs to the line r // words and is its word r % words
    marks = marks.reshape(-1, n)
    most = jnp.max(jnp.sum(jax.lax.population_count(marks), axis=0), initial=0).astype(jnp.int32)
    numbers = jnp.arange(marks.shape[0], dtype=jnp.int32)[:, None]

    def take(r: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Write row r of the neighbor list: one marked neighbor of each particle.

        It is the first neighbor whose mark is left, and this mark is removed.
        """
        rows, marks = carry
        which = jnp.argmax(marks != 0, axis=0).astype(jnp.int32)  # the first word with a mark left
        word = jnp.max(jnp.where(numbers == which, marks, 0), axis=0)
        # word & -word is its lowest bit alone, whose position is the number of bits below it
        k = jax.lax.population_count((word & -word) - 1).astype(jnp.int32) + which % words * WORD
        line = jnp.max(jnp.where(numbers[: len(lines)] == which // words, lines, 0), axis=0)
        j = grid.order[place(line, k)]
        rows = rows.at[r].set(jnp.where(word != 0, j, n))
        return rows, jnp.where(numbers == which, word & (word - 1), marks)  # without that bit

    rows = jnp.full((capacity, n), n, jnp.int32)
    # a list cut down to its filled rows has none where every particle is alone: nothing to write
    if capacity:
        rows, _ = jax.lax.fori_loop(0, jnp.minimum(most, capacity), take, (rows, marks))
    return rows, most, longest


def _skin(
    range_: float | jax.Array,
    lattice: jax.Array | np.ndarray,
    cells: tuple[int, ...],
    periodic: bool,
    share: ArrayLike = SKIN,
) -> jax.Array:
    """Compute the skin of a neighbor list: the requested one, or less if the cell is too small.

    The skin is the distance beyond the interaction range up to which pairs are listed. It is
    negative if the cell or its grid cells are too small for the range.

    Args:
      range_: the largest distance at which two particles interact.
      lattice: (d, d) the cell that the grid divides.
      cells: number of grid cells along each cell vector.
      periodic: True if the cell is periodic, False if it encloses a system with open boundaries.
      share: the requested skin, as a fraction of the range.
    """
    xp: Any = lattice.__array_namespace__()
    # along a vector with one or two grid cells all are searched: its whole height bounds the skin
    sides = heights(lattice) / np.asarray([m if m > 2 else 1 for m in cells], lattice.dtype)
    # A side that was divided so as to be the range may come out smaller than it by round-off.
    above = 1.0 + 8.0 * float(np.finfo(lattice.dtype).eps)
    skin = xp.minimum(share * range_, xp.min(sides) * above - range_)
    # nearest images are found by rounding, which is right up to half of the smallest height
    return xp.minimum(skin, 0.4999 * xp.min(heights(lattice)) - range_) if periodic else skin


def _lattice(neighbors: Neighbors, box: jax.Array | None) -> jax.Array:
    """Return the cell (d, d) that the grid of the neighbor search divides.

    It is the periodic box, or for open boundaries the cell that encloses the system.
    """
    # Open boundaries keep the enclosing cell they have: its images only add candidates, which lie
    # beyond the range in open space.
    return neighbors.reference_box if box is None else box  # type: ignore[return-value]


@full_precision
def slack(
    neighbors: Neighbors, box: jax.Array | None, range_: jax.Array
) -> tuple[jax.Array | None, jax.Array]:
    """Compute how far particles may move before a neighbor list could miss a pair.

    The list contains all interacting pairs while no particle is farther than ``distance`` from its
    anchor, which is its position when the list was built, deformed with the cell.

    Returns:
      (anchors (n, d), distance). The anchors are None for a list of all pairs. A distance below
      zero means that the list is not complete.
    """
    if neighbors.complete:
        return None, jnp.asarray(jnp.inf, neighbors.skin.dtype)
    # only the list of all pairs has no reference, and it is complete
    assert neighbors.reference is not None and neighbors.reference_box is not None
    lattice = _lattice(neighbors, box)
    deformation = lattice @ inverse(neighbors.reference_box)
    # 1 - |M - 1| in the Frobenius norm: a lower bound of lambda_min(M)
    stretch = 1.0 - jnp.linalg.norm(deformation - jnp.eye(lattice.shape[0], dtype=lattice.dtype))
    distance = 0.5 * (neighbors.skin * stretch - (1.0 - stretch) * range_)
    return neighbors.reference @ deformation.T, distance


def within(positions: jax.Array, anchors: jax.Array | None, distance: jax.Array) -> jax.Array:
    """Return whether no particle is farther than ``distance`` from its anchor.

    The anchors (n, d) are the positions at which a neighbor list was built; None for a list of all
    pairs, which allows any distance.
    """
    if anchors is None:
        return jnp.ones((), bool)
    # a negative distance fails, although its square would pass
    return (jnp.max(jnp.sum((positions - anchors) ** 2, axis=1)) <= distance**2) & (distance >= 0)


def _still_complete(
    neighbors: Neighbors,
    positions: jax.Array,
    box: jax.Array | None,
    lengths: Lengths,
    range_: jax.Array,
) -> jax.Array:
    """Return whether a neighbor list is complete after a change of positions or parameters."""
    complete = within(positions, *slack(neighbors, box, range_))
    leaves = jax.tree.leaves(lengths)
    if neighbors.given is not None and len(neighbors.given) != len(leaves):
        return jnp.zeros((), bool)  # made for another potential
    for then, now in zip(neighbors.given or leaves, leaves, strict=True):
        complete = complete & jnp.all(then == now)
    return complete


def _too_small(range_: float | jax.Array, box: np.ndarray | jax.Array | None, times: float) -> Any:
    """Return whether a cell's smallest height is less than twice the interaction range.

    ``times`` is the tolerance in units of the round-off of a height. Compiled code rounds
    differently from other code and needs a larger tolerance: if it refused a cell of just twice the
    range that other code accepts, it would ask for a larger list forever.
    """
    if box is None:
        return jnp.zeros((), bool)
    least = heights(box).min() * (1.0 + times * ROUND_OFF * np.finfo(box.dtype).eps)
    return ~(2.0 * range_ <= least)  # not >, so that NaN counts as too small


@jax.jit
def serves(
    neighbors: Neighbors,
    positions: jax.Array,
    box: jax.Array | None,
    lengths: Lengths,
    range_: jax.Array,
) -> jax.Array:
    """Return whether a neighbor list contains every pair that interacts at ``positions``."""
    if neighbors.complete:
        # at a range of zero ``allocate`` makes a list without pairs instead
        return (range_ > 0) & ~_too_small(range_, box, 2.0) & ~_lacks_pairs(neighbors, range_)
    return ~neighbors.overflowed & _still_complete(neighbors, positions, box, lengths, range_)


def _lacks_pairs(neighbors: Neighbors, range_: jax.Array) -> jax.Array:
    """Return whether a list without pairs, from :func:`no_pairs`, is used where pairs interact.

    Pairs interact where the range, the largest distance of an interaction, is above zero.
    """
    count, n = neighbors.rows.shape
    return (range_ > 0) & (count == 0) & (n > 1)


@jax.jit
def update(
    neighbors: Neighbors,
    positions: jax.Array,
    box: jax.Array | None,
    lengths: Lengths,
    range_: jax.Array,
    skin: ArrayLike = SKIN,
    anew: ArrayLike = False,
) -> tuple[Neighbors, jax.Array]:
    """Update a neighbor list; return the list and whether it was rebuilt.

    The list returned is complete at ``positions``, or marked as overflowed if it was too small.
    This function can be traced by jax. The list has no derivative.

    Args:
      neighbors: the list so far.
      positions: (n, d) positions of the particles.
      box: the cell; None for open boundaries.
      lengths: the function (i, j) -> l_ij, the distance beyond which the pair energy of particles i
        and j is zero, at the present parameters.
      range_: the largest l_ij.
      skin: the skin of a list that is rebuilt, as a fraction of the range: pairs up to this
        distance beyond l_ij are listed.
      anew: True to rebuild even a list that is still complete.
    """
    positions, box, lengths, range_ = jax.lax.stop_gradient((positions, box, lengths, range_))
    too_small = _too_small(range_, box, 2.0)
    if neighbors.complete:
        lost = too_small | _lacks_pairs(neighbors, range_)
        marked = dataclasses.replace(neighbors, overflowed=neighbors.overflowed | lost)
        return marked, jnp.zeros((), bool)
    lattice = _lattice(neighbors, box)

    def rebuild(old: Neighbors) -> Neighbors:
        capacity = old.rows.shape[0]
        skin_now = _skin(range_, lattice, old.cells, box is not None, skin)
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
    """Build a new neighbor list for the particles at ``positions``.

    This function cannot run in compiled code.

    Args:
      positions: (n, d) positions of the particles.
      box: the cell; None for open boundaries.
      lengths: the function (i, j) -> l_ij, the distance beyond which the pair energy of particles i
        and j is zero.
      range_: the largest l_ij; inf for a list of all pairs, 0 if the potential has no pair
        interactions.
      room: capacity of the list as a multiple of what the positions need.
      like: an earlier list or None; the new list gets at least the capacity of the earlier one, so
        that compiled code can be used again.
    """
    n = positions.shape[0]
    dtype = positions.dtype
    _check_range(range_, box)
    if range_ == 0.0:
        return no_pairs(n, dtype)
    reach = (1.0 + SKIN) * range_
    if n <= ALL_PAIRS_BELOW or not math.isfinite(reach):
        return all_pairs(n, dtype)
    lattice = _enclosing(positions, reach) if box is None else box
    sides = np.asarray(lattice)
    cells = _cells(heights(sides), reach, n)
    # a cell hardly larger than twice the range leaves a skin of under 2 % of the range
    if not float(_skin(range_, sides, cells, box is not None)) > 0.02 * range_:
        return all_pairs(n, dtype)
    return fitted(positions, box, lattice, lengths, range_, cells, room, like)


def _check_range(range_: float, box: jax.Array | None) -> None:
    """Raise InputError if the interaction range is NaN, or above half the cell's smallest height.

    ``box`` is the cell; None for open boundaries, which allow any range.
    """
    if math.isnan(range_):
        raise InputError(
            f"the range of the interactions is {range_}: correct the function of the cutoff, or"
            " the parameters."
        )
    if box is not None and math.isfinite(range_):
        cell = np.asarray(box)
        smallest = float(np.min(heights(cell)))
        # once the round-off, where compiled code allows twice: it must not refuse what passes here
        if _too_small(range_, cell, 1.0):
            raise InputError(
                f"the smallest height of `box` is {smallest:.6g}, less than twice the interaction"
                f" range {range_:.6g}, so that a particle would meet two images of another: repeat"
                " the cell, or shorten the cutoff."
            )
    elif box is not None and range_ > 0:
        raise InputError(
            "a potential without a cutoff needs open boundaries: give the potential a cutoff, or"
            " give box=None."
        )


def _cells(across: np.ndarray, reach: float, n: int) -> tuple[int, ...]:
    """Choose the number of grid cells along each cell vector for a search of neighbors.

    No grid cell is narrower than ``reach``, the interaction range with the skin. In a very dilute
    gas, where the grid would fill the memory, the grid cells are wider.

    Args:
      across: (d,) heights of the cell, the distances between opposite faces.
      reach: the least width of a grid cell.
      n: number of particles.
    """
    # the upper limit keeps the count finite where the reach is next to nothing
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
    """Build a new neighbor list by a search on a given grid of cells.

    The capacity of the list is what the positions need. This function cannot run in compiled code.

    Args:
      positions, box, lengths, range_, room: as in :func:`allocate`.
      lattice: (d, d) the cell that the grid divides; for open boundaries, a cell that encloses the
        system.
      cells: number of grid cells along each cell vector.
      like: an earlier list or None; the new list gets at least the capacity of the earlier one.
    """
    n, d = positions.shape
    sides = np.asarray(lattice)
    skin = jnp.asarray(_skin(range_, sides, cells, box is not None), positions.dtype)
    run_capacity = min(_eights(room * _fullest_run(np.asarray(positions), sides, cells)), n)
    if like is not None and like.cells == cells:
        run_capacity = max(run_capacity, like.run_capacity)
    # first guess of the rows: neighbors at the mean density, and three standard deviations more
    ball = BALL_OF_UNIT_DIAMETER[d] * (2.0 * (range_ + float(skin))) ** d
    mean = n * min(1.0, ball / abs(float(np.linalg.det(sides))))
    guess = _eights(mean + 3.0 * math.sqrt(mean))
    while True:
        # the runs fit, as they have been counted: the rows alone may be too few
        rows, most, _ = _search(positions, lattice, lengths, skin, cells, run_capacity, guess)
        if int(most) <= guess:
            break
        guess = _eights(room * int(most))
    # A few rows even where no two particles are near, so that the first pair that comes near fits.
    capacity = min(_eights(max(room * int(most), 1.0)), n - 1)
    if like is not None and not like.complete:
        capacity = max(capacity, like.rows.shape[0])
    neighbors = Neighbors(
        rows=rows,
        reference=positions,
        reference_box=lattice,
        given=tuple(jax.tree.leaves(lengths)),
        skin=skin,
        overflowed=jnp.zeros((), bool),
        cells=cells,
        run_capacity=run_capacity,
    )
    return neighbors.resized(capacity)


def _enclosing(positions: jax.Array, reach: float) -> jax.Array:
    """Return a rectangular cell (d, d) that encloses a system with open boundaries.

    Each side is 1.5 (extent of the particles + 2 ``reach``), so that the system may expand, and at
    least 3 ``reach``, so that the grid of the neighbor search has at least three cells along each
    side. ``reach`` is the interaction range plus the skin.
    """
    span = np.ptp(np.asarray(positions), axis=0) + 2.0 * reach
    return jnp.diag(jnp.asarray(np.maximum(1.5 * span, 3.0 * reach), positions.dtype))


def _eights(count: float) -> int:
    """Round ``count`` up to a multiple of 8, so that similar systems can use one compiled code."""
    return 8 * math.ceil(count / 8)


def filled_rows(listed: Neighbors) -> Neighbors:
    """Remove unused rows at the end of a neighbor list, down to a multiple of 4 rows.

    The multiple of 4 limits the number of shapes for which functions are compiled. A list that jax
    traces is returned unchanged.
    """
    if isinstance(listed.rows, Tracer):
        return listed
    rows = np.asarray(listed.rows)
    # over the particles, and over the systems of a batch, which need one number of rows
    filled = np.any(rows < rows.shape[-1], axis=(*range(rows.ndim - 2), -1))
    used = int(np.max(np.flatnonzero(filled), initial=-1)) + 1
    fewer = 4 * math.ceil(used / 4)
    if fewer >= rows.shape[-2]:
        return listed
    return dataclasses.replace(listed, rows=rows[..., :fewer, :])
