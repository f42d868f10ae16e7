"""Neighbor lists: for each particle, the particles that it can interact with.

A cell search builds the list; a test of its completeness makes sure that no pair is lost unnoticed.

rows[:, i] lists the particles j that were nearer to i than l_ij + skin at the ``reference``
positions, where l_ij is the length beyond which the potential of the two is zero. A pair stands in
the rows of both its particles, so that a force is a sum over rows, gathered and never scattered:
half the time of a list of pairs on one core, and the same sum on every run. Once the particles have
moved by d_i, in a cell deformed by M, all interacting pairs are still listed while

    skin lambda_min(M) - (1 - lambda_min(M)) max l_ij - 2 max |d_i| >= 0

(lambda_min(M) is the least factor by which M stretches a vector) and the parameters that determine
l_ij are unchanged; otherwise the list is rebuilt. A rebuild that does not fit the static capacities
sets ``overflowed``: code on the host then allocates a larger list, traced code reports it.
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
    """The particles that each particle may interact with.

    Attributes:
      rows: (capacity, n) particle indices; rows[:, i] are those near i, padded with n.
      reference: (n, d) Cartesian positions when the list was built; None for all pairs.
      reference_box: (d, d) cell when the list was built (an enclosing cell for open boundaries);
        None for all pairs.
      given: the parameter arrays that determined l_ij when the list was built; None for all pairs.
      skin: pairs nearer than l_ij + skin at the reference are listed; inf for all pairs.
      overflowed: True where pairs were lost.
      cells: number of grid cells along each cell vector; empty for all pairs.
      run_capacity: capacity for the particles in a run of three grid cells along the last cell
        vector.
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
        first = jnp.broadcast_to(jnp.arange(n, dtype=self.rows.dtype), self.rows.shape)
        return jnp.stack([jnp.where(once, first, n).ravel(), jnp.where(once, self.rows, n).ravel()])

    @property
    @jax.jit
    def used(self) -> jax.Array:
        """Number of rows up to the last one that is not empty."""
        filled = jnp.any(self.rows < self.rows.shape[1], axis=1)
        return jnp.max(filled * jnp.arange(1, self.rows.shape[0] + 1, dtype=jnp.int32), initial=0)

    def resized(self, capacity: int) -> Neighbors:
        """Return the list with another number of rows, at least as many as are used."""
        more = max(capacity - self.rows.shape[0], 0)
        rows = jnp.pad(self.rows, ((0, more), (0, 0)), constant_values=self.rows.shape[1])
        return dataclasses.replace(self, rows=rows[:capacity])


def no_pairs(n: int, dtype: DTypeLike = float) -> Neighbors:
    """Return the empty list, for potentials without pairs; complete while the range is zero."""
    return _complete_list(jnp.zeros((0, n), jnp.int32), dtype)


def all_pairs(n: int, dtype: DTypeLike = float) -> Neighbors:
    """Return the list of all pairs, which stays complete wherever the particles move."""
    rows = jnp.asarray((np.arange(n)[None] + np.arange(1, n)[:, None]) % max(n, 1), jnp.int32)
    return _complete_list(rows, dtype)


def _complete_list(rows: jax.Array, dtype: DTypeLike) -> Neighbors:
    """Return a list of these rows that never needs an update."""
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
    """Index of each particle's grid cell along each cell vector, (d, n)."""
    xp: Any = positions.__array_namespace__()
    fractional = positions @ inverse(box).T
    fractional = fractional - xp.floor(fractional)
    # a coordinate of -1e-17 wraps to 1.0, which is the first cell, not the last
    return xp.stack([(fractional[:, a] * m).astype(xp.int32) % m for a, m in enumerate(cells)])


def _fullest_run(positions: np.ndarray, box: np.ndarray, cells: tuple[int, ...]) -> int:
    """Particles in the fullest run of three grid cells along the last cell vector."""
    counts = np.zeros(cells, int)
    np.add.at(counts, tuple(_cell_of(positions, box, cells)), 1)
    if cells[-1] > 2:
        counts = np.roll(counts, 1, axis=-1) + counts + np.roll(counts, -1, axis=-1)
    else:  # a run is the whole line, each cell once
        counts = np.sum(counts, axis=-1)
    return int(np.max(counts, initial=0))


class _Grid(NamedTuple):
    """Particles sorted by their grid cells.

    A run of cells along the last cell vector is a range of ``order``; a line is all cells along it.
    """

    order: jax.Array  # (n,) particle indices, those of one cell together
    where: jax.Array  # (d, n) index of each particle's cell along each cell vector
    first: jax.Array  # (cells,) where in order the run around each cell begins
    length: jax.Array  # (cells,) particles in the run
    line: jax.Array  # (lines,) where in order each line of cells begins: a run wraps around in it
    line_end: jax.Array  # (lines,) where it ends


def _order(index: jax.Array, count: int) -> jax.Array:
    """The particles sorted by cell, those of one cell by their own number.

    Args:
      index: (n,) cell of each particle.
      count: number of cells.
    """
    n = index.shape[0]
    wide = jax.dtypes.canonicalize_dtype(jnp.int64)
    if count * n > jnp.iinfo(wide).max:
        return jnp.argsort(index).astype(jnp.int32)
    # One key of both numbers: sorting by one while carrying the other takes XLA six times as long.
    return (jax.lax.sort(index.astype(wide) * n + jnp.arange(n, dtype=wide)) % n).astype(jnp.int32)


def _grid(positions: jax.Array, box: jax.Array, cells: tuple[int, ...]) -> _Grid:
    """The particles sorted into a grid of cells."""
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
    """Find all pairs nearer than l_ij + skin; the pair energy of i and j ends at l_ij.

    First the candidates near each particle are marked, one bit each, line of cells by line; then
    the marks are taken off one at a time and written as rows of particle indices.

    Returns:
      (rows, most neighbors of one particle, particles in the fullest run). Pairs are lost where the
      last two exceed ``capacity`` and ``run_capacity``.
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
        """Index in grid.order of the k-th candidate of each particle on a line of cells, (n,)."""
        first = grid.first[line * cells[-1] + grid.where[-1]]
        end = grid.line_end[line]
        index = first + k
        # a run that reaches the end of its line goes on at the line's beginning
        wrapped = jnp.where(index >= end, index - (end - grid.line[line]), index)
        return jnp.minimum(wrapped, n - 1)

    def search_line(offset: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The line at this offset from each particle's line (n,), and its marks (words, n)."""
        line = jnp.zeros(n, jnp.int32)
        # offsets are along all cell vectors but the last, along which the line runs
        for along, by, m in zip(grid.where, offset, cells, strict=False):
            line = line * m + jnp.mod(along + by, m)
        length = grid.length[line * cells[-1] + grid.where[-1]]

        def mark(k: jax.Array, marks: jax.Array) -> jax.Array:
            """Sets the bit of the k-th candidate where it is near."""
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
    marks = marks.reshape(-1, n)
    most = jnp.max(jnp.sum(jax.lax.population_count(marks), axis=0), initial=0).astype(jnp.int32)
    numbers = jnp.arange(marks.shape[0], dtype=jnp.int32)[:, None]

    def take(r: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Writes row r from the first mark left for each particle, and takes that mark off."""
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
    """Compute the largest skin that grid and cell allow; negative where they are too small.

    Args:
      range_: the largest l_ij.
      lattice: (d, d) the cell that the grid divides.
      cells: grid cells along each cell vector.
      periodic: whether the cell is periodic, or encloses a system with open boundaries.
      share: the requested skin, as a share of the range.
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
    """Return the cell that the grid divides: the box, or the enclosing cell if open."""
    # Open boundaries keep the enclosing cell they have: its images only add candidates, which lie
    # beyond the range in open space.
    return neighbors.reference_box if box is None else box  # type: ignore[return-value]


@full_precision
def slack(
    neighbors: Neighbors, box: jax.Array | None, range_: jax.Array
) -> tuple[jax.Array | None, jax.Array]:
    """Compute how far each particle may move before pairs could be lost: (anchors, distance).

    The anchors (n, d) are the reference positions, deformed with the cell. The list is complete
    while no particle is farther than ``distance`` from its anchor; where ``distance`` is below
    zero, the list is not complete.
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
    """Return whether no particle is farther than ``distance`` from its anchor."""
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
    """Return whether the list is still complete after particles and parameters have changed."""
    complete = within(positions, *slack(neighbors, box, range_))
    leaves = jax.tree.leaves(lengths)
    if neighbors.given is not None and len(neighbors.given) != len(leaves):
        return jnp.zeros((), bool)  # made for another potential
    for then, now in zip(neighbors.given or leaves, leaves, strict=True):
        complete = complete & jnp.all(then == now)
    return complete


def _too_small(range_: float | jax.Array, box: np.ndarray | jax.Array | None, times: float) -> Any:
    """Return whether a cell's smallest height is less than twice the range, beyond round-off.

    ``times`` is the tolerance in units of a height's round-off. Compiled code rounds differently
    from the host and must not refuse a cell of just that size which the host accepted: it would ask
    for a larger list for ever.
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
    """Return whether the list contains every pair that interacts at ``positions``."""
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
    skin: ArrayLike = SKIN,
    anew: ArrayLike = False,
) -> tuple[Neighbors, jax.Array]:
    """Return a list complete at ``positions`` or marked as overflowed, and whether it was rebuilt.

    Args:
      neighbors: the list so far.
      positions: (n, d).
      box: the cell; None for open boundaries.
      lengths: l_ij, the distance at which the pair energy of i and j ends, at the present
        parameters.
      range_: the largest l_ij.
      skin: the skin of a list that is rebuilt, as a share of the range.
      anew: whether to rebuild even a list that is still complete.

    The function is traceable. The list has no derivative.
    """
    positions, box, lengths, range_ = jax.lax.stop_gradient((positions, box, lengths, range_))
    too_small = _too_small(range_, box, 2.0)
    if neighbors.complete:
        marked = dataclasses.replace(neighbors, overflowed=neighbors.overflowed | too_small)
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
    """Build a new list at ``positions``. Not for compiled code.

    Args:
      positions: (n, d).
      box: the cell; None for open boundaries.
      lengths: l_ij, the distance at which the pair energy of i and j ends.
      range_: the largest l_ij; inf for all pairs, 0 where the potential has no neighbor pairs.
      room: capacity as a multiple of what the positions need.
      like: an earlier list; the new list gets at least its capacities, so that compiled code can be
        used again.
    """
    n = positions.shape[0]
    dtype = positions.dtype
    if math.isnan(range_):
        raise InputError(
            f"the range of the interactions is {range_}: mend the cutoff's function, or the"
            " parameters."
        )
    if box is not None and math.isfinite(range_):
        cell = np.asarray(box)
        smallest = float(np.min(heights(cell)))
        # once the round-off, where compiled code allows twice: it must not refuse what passes here
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
    # a cell hardly larger than twice the range leaves a skin of under 2 % of the range
    if not float(_skin(range_, sides, cells, box is not None)) > 0.02 * range_:
        return all_pairs(n, dtype)
    return fitted(positions, box, lattice, lengths, range_, cells, room, like)


def _cells(across: np.ndarray, reach: float, n: int) -> tuple[int, ...]:
    """Number of grid cells along each cell vector, each cell no narrower than ``reach``.

    Cells are wider in a gas so dilute that the grid would fill memory: at most CELLS per particle.
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
    """Build a new list on a given grid, with the capacities that the positions need.

    Not for compiled code.

    Args:
      positions, box, lengths, range_, room: as in :func:`allocate`.
      lattice: (d, d) the cell that the grid divides; an enclosing one for open boundaries.
      cells: grid cells along each cell vector.
      like: an earlier list, whose capacities are taken where they are larger.
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
    """A rectangular cell (d, d) around a system with open boundaries, with room to spread.

    Its sides are 1.5 times the extent of the particles with ``reach`` on both sides, and at least
    3 ``reach``, so that the grid has three cells or more along each.
    """
    span = np.ptp(np.asarray(positions), axis=0) + 2.0 * reach
    return jnp.diag(jnp.asarray(np.maximum(1.5 * span, 3.0 * reach), positions.dtype))


def _eights(count: float) -> int:
    """``count`` rounded up to a multiple of 8, so that random starts share compiled shapes."""
    return 8 * math.ceil(count / 8)


def filled_rows(listed: Neighbors) -> Neighbors:
    """Remove empty rows from a neighbor list, down to a multiple of 4 rows.

    Not for compiled code.

    The multiple of 4 limits the number of shapes for which functions are compiled.
    """
    if isinstance(listed.rows, Tracer):
        return listed
    rows = np.asarray(listed.rows)
    filled = np.any(rows < rows.shape[-1], axis=(*range(rows.ndim - 2), -1))
    used = int(np.max(np.flatnonzero(filled), initial=-1)) + 1
    fewer = 4 * math.ceil(used / 4)
    if fewer >= rows.shape[-2]:
        return listed
    return dataclasses.replace(listed, rows=rows[..., :fewer, :])
