"""The search of a neighbor list on a grid of cells.

The particles are sorted into grid cells at least as wide as the range of the search, so that only
those in a particle's own cell and the cells around it can be its neighbors. Where the system's cell
is so short along a cell vector that a particle can meet several periodic images of another, or its
own images, the images along that vector are added to the particles that are searched. The grid then
divides a cell that contains all of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.compilation import compiled
from mdsens._util.lattice import components, inverse, nearest_images
from mdsens._util.portable import Portable
from mdsens._util.precision import full_precision

__all__ = [
    "SKIN",
    "Found",
    "Grid",
    "Lengths",
    "fullest_run",
    "nearer_rows",
    "search",
    "search_cell",
]

# Candidates whose nearness is marked in the bits of one integer (uint32).
WORD = 32
# Skin of a neighbor list as a share of the range. Smaller, the list is rebuilt more often; larger,
# its rows hold more particles that do not interact.
SKIN = 0.3
# Largest number of cell vectors, along one direction, between a particle and an image of another:
# images are stored as int8.
FARTHEST = 127

# (i, j) -> l_ij of particles i and j; a pytree whose leaves are the parameters that determine it
Lengths: TypeAlias = Callable[[jax.Array, jax.Array], Any]

# host code (numpy) and traced code (jax) share the functions that take these
A = TypeVar("A", jax.Array, np.ndarray)


@dataclasses.dataclass(frozen=True)
class Grid(Portable):
    """How neighbors are searched: what is fixed when the search is compiled.

    The number of grid cells along each cell vector is no part of it: it is data, ``cells`` of the
    neighbor list, so that systems of slightly different density share compiled code.

    Attributes:
      visited: for each cell vector the number of grid cells that the search visits along it: one or
        two where there are no more, else three. Empty without a grid, for a list of all pairs.
      cell_capacity: number of grid cells that the search allows in all.
      run_capacity: number of particles that the search allows in three grid cells that follow each
        other along the last cell vector.
      reach: for each cell vector the number of images to either side that are searched beside the
        particles; 0 along a vector where the nearest image is enough. Empty where it is enough
        along every vector; the pairs that are found are then those of nearest images.
      periodic: for each cell vector whether the system is periodic along it; empty where it is
        periodic along all vectors, or along none.
      skin: the skin of the list, as a share of the range.
    """

    visited: tuple[int, ...] = ()
    cell_capacity: int = 0
    run_capacity: int = 0
    reach: tuple[int, ...] = ()
    periodic: tuple[bool, ...] = ()
    skin: float = SKIN

    def fitting(self, cells: Sequence[int], n: int) -> Grid:
        """Return this grid for numbers of grid cells along the cell vectors, and n particles.

        There is room for n / 2 grid cells, more than a dense system has, or for 4, 16, ... times
        as many: systems of one size share compiled code.
        """
        everyone = n * math.prod(2 * m + 1 for m in self.reach)
        capacity = -(-everyone // 2)
        while capacity < math.prod(cells):
            capacity *= 4
        return dataclasses.replace(
            self, visited=tuple(min(m, 3) for m in cells), cell_capacity=capacity
        )

    def run_of(self, count: float) -> int:
        """Round a number of particles up to a run capacity: full integers of marks.

        There are 1, 2, 3, 4, 6, 8, 12, 16, ... integers: few numbers, so that similar systems share
        compiled code.
        """
        words = max(math.ceil(count / WORD), 1)
        step = 2 ** max(math.floor(math.log2(words)) - 1, 0)
        return WORD * step * math.ceil(words / step)


class Found(NamedTuple):
    """The result of a search, (capacity, n) pairs of n particles.

    Pairs are lost where ``most`` exceeds the capacity, where ``longest`` exceeds the run capacity
    of the grid, or where ``far`` is True.

    Attributes:
      rows: (capacity, n) particle indices; column i has the neighbors of particle i, and n in
        places that are not used.
      images: (capacity, n, d) the image of each neighbor j, as int8: the vector from particle i to
        it is R_j - R_i + box @ image. None for a search of nearest images.
      most: the most neighbors of one particle.
      longest: the most particles in three successive grid cells.
      far: whether an image is too many cell vectors away to be stored.
    """

    rows: jax.Array
    images: jax.Array | None
    most: jax.Array
    longest: jax.Array
    far: jax.Array


def search_cell(lattice: A, reach: tuple[int, ...]) -> A:
    """Return the cell (d, d) that the grid divides: the system's cell, or a multiple of it.

    Along a cell vector with m images of each particle to either side, it is 2 m + 2 cells long.
    The images fill 2 m + 1 of them, so that none is nearest to a particle across the boundary.
    """
    return lattice * np.asarray([2 * m + 2 if m else 1 for m in reach]) if reach else lattice


def _shifts(reach: tuple[int, ...]) -> np.ndarray:
    """Return the integer shifts (G, d) of all images that are searched, that of no shift first."""
    sides = [sorted(range(-m, m + 1), key=abs) for m in reach]
    return np.array(list(itertools.product(*sides)))


def _cells_away(positions: A, lattice: A, periodic: tuple[bool, ...]) -> A:
    """Return by how many cell vectors (n, d) each particle is outside of the cell; whole numbers.

    Along a cell vector where the system is not periodic, the number is 0.
    """
    xp: Any = positions.__array_namespace__()
    away = xp.floor(positions @ inverse(lattice).T)
    return away * np.asarray(periodic, lattice.dtype) if periodic else away


@full_precision
def with_images(positions: A, lattice: A, grid: Grid) -> A:
    """Return the particles and their images to be searched, (G n, d), the n particles first.

    Where there are images, the particles are moved into the cell. Without images the positions are
    returned as they are.
    """
    if not grid.reach:
        return positions
    wrapped = positions - _cells_away(positions, lattice, grid.periodic) @ lattice.T
    steps = _shifts(grid.reach) @ lattice.T
    return (wrapped[None] + steps[:, None]).reshape(-1, positions.shape[1])


@full_precision
def _image_of_pairs(
    rows: jax.Array, positions: jax.Array, lattice: jax.Array, grid: Grid
) -> jax.Array:
    """Compute which image of its neighbor each pair means, (capacity, n, d) integers.

    Args:
      rows: (capacity, n) numbers of particles among those of :func:`with_images`; their number in
        places that are not used.
      positions: (n, d) positions as they are stored, inside the cell or not.
      lattice: (d, d) the cell.
      grid: the images that were searched.
    """
    n = positions.shape[0]
    table = _shifts(grid.reach)
    real = rows < n * len(table)
    j = rows % n
    away = _cells_away(positions, lattice, grid.periodic)
    image = jnp.asarray(table)[jnp.where(real, rows // n, 0)] - away[j] + away[None]
    # along a vector without images it is the nearest one
    apart = (positions[j] - positions[None]) @ inverse(lattice).T + image
    nearest = np.array([m == 0 for m in grid.reach]) & np.array(grid.periodic or True)
    image = image - jnp.where(nearest, jnp.round(apart), 0.0)
    return jnp.where(real[..., None], image, 0.0).astype(jnp.int32)


@full_precision
def cell_of(positions: A, box: A, cells: A) -> A:
    """Compute the index of each particle's grid cell along each of the d cell vectors, (d, n).

    ``cells`` (d,) are the numbers of grid cells along the cell vectors.
    """
    xp: Any = positions.__array_namespace__()
    fractional = positions @ inverse(box).T
    fractional = fractional - xp.floor(fractional)
    # a coordinate of -1e-17 wraps to 1.0, which is the first cell, not the last
    counts = [cells[a] for a in range(box.shape[0])]
    return xp.stack([(fractional[:, a] * m).astype(xp.int32) % m for a, m in enumerate(counts)])


def fullest_run(positions: np.ndarray, box: np.ndarray, cells: tuple[int, ...]) -> int:
    """Return the largest number of particles in three successive grid cells.

    The three grid cells follow each other along the last cell vector.
    """
    counts = np.zeros(cells, int)
    # counts[…] += 1 would count several particles of one cell once
    np.add.at(counts, tuple(cell_of(positions, box, np.asarray(cells, np.int32))), 1)
    if cells[-1] > 2:
        counts = np.roll(counts, 1, axis=-1) + counts + np.roll(counts, -1, axis=-1)
    else:  # a run is the whole line, each cell once
        counts = np.sum(counts, axis=-1)
    return int(np.max(counts, initial=0))


class _Sorted(NamedTuple):
    """The particles sorted by grid cell, for a search of neighbors.

    A line of grid cells is all of them along the last cell vector. A run is a grid cell with the
    one before and the one after it in its line; the line closes on itself. The particles of a run
    follow each other in the sorted array ``order``.
    """

    order: jax.Array  # (n,) particle indices, those of one cell together
    where: jax.Array  # (d, n) index of each particle's cell along each cell vector
    # The rest is for each cell, (cell capacity,). There are no particles in cells beyond their
    # number.
    first: jax.Array  # where in order the run around the cell begins
    length: jax.Array  # particles in the run
    line: jax.Array  # where in order the line of the cell begins: a run wraps around in it
    line_end: jax.Array  # where it ends


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


def _sort(positions: jax.Array, box: jax.Array, cells: jax.Array, grid: Grid) -> _Sorted:
    """Sort the particles by the cells of a grid, ``cells`` (d,) of them along each cell vector."""
    capacity = grid.cell_capacity
    where = cell_of(positions, box, cells)
    last = cells[-1]
    # number of each particle's cell; neighbors along the last cell vector follow each other
    index = where[0]
    for a in range(1, where.shape[0]):
        index = index * cells[a] + where[a]
    counts = jnp.zeros(capacity, jnp.int32).at[index].add(1)
    ends = jnp.cumsum(counts).astype(jnp.int32)
    starts = ends - counts
    number = jnp.arange(capacity, dtype=jnp.int32)
    # the first and the last cell in the line of each cell
    begin = number // last * last
    final = jnp.minimum(begin + last - 1, capacity - 1)
    line = starts[begin]
    line_end = ends[final]
    if grid.visited[-1] > 2:  # the run of a cell is the cell before it, itself and the cell after
        before = jnp.where(number == begin, final, number - 1)
        after = jnp.where(number == final, begin, number + 1)
        first = starts[before]
        length = counts[before] + counts + counts[after]
    else:  # the run is the whole line
        first = line
        length = line_end - line
    return _Sorted(_order(index, capacity), where, first, length, line, line_end)


class _Run(NamedTuple):
    """The run that the search of each of n particles visits in one line of grid cells, (n,) each.

    Attributes:
      first: where in the sorted particles the run begins.
      length: particles in the run.
      end: where the line ends.
      line_length: particles in the line.
    """

    first: jax.Array
    length: jax.Array
    end: jax.Array
    line_length: jax.Array

    def place(self, k: jax.Array) -> jax.Array:
        """Return where in the sorted particles the k-th particle of each run is."""
        index = self.first + k
        # a run that reaches the end of its line goes on at the line's beginning
        return jnp.where(index >= self.end, index - self.line_length, index)


def _marked(
    near: Callable[[jax.Array], jax.Array], words: int, count: jax.Array, n: int
) -> jax.Array:
    """Mark those among ``count`` candidates of each of n particles that are near, (words, n).

    Bit b of word w in column i is the mark of candidate number 32 w + b of particle i.

    Args:
      near: function from the number k of a candidate to whether the k-th candidate of each
        particle is near, (n,).
    """

    def word(w: jax.Array, marks: jax.Array) -> jax.Array:
        def mark(bit: jax.Array, integers: jax.Array) -> jax.Array:
            one = jnp.uint32(1) << bit.astype(jnp.uint32)
            return integers | jnp.where(near(w * WORD + bit), one, jnp.uint32(0))

        last = jnp.minimum(count - w * WORD, WORD)
        integers = jax.lax.fori_loop(0, last, mark, jnp.zeros(n, jnp.uint32))
        return marks.at[w].set(integers)

    none = jnp.zeros((words, n), jnp.uint32)
    return jax.lax.fori_loop(0, -(-count // WORD), word, none)


def _taken(
    marks: jax.Array,
    neighbor: Callable[[jax.Array, jax.Array], jax.Array],
    capacity: int,
    unused: int,
) -> tuple[jax.Array, jax.Array]:
    """Write the marked candidates as rows of a neighbor list, in the order of their marks.

    Args:
      marks: (words, n) the marks of the candidates of each of n particles.
      neighbor: function from a word and a bit, (n,) each, to the candidate of each particle, (n,).
      capacity: number of rows. Candidates beyond them are lost.
      unused: what fills places that are not used.

    Returns:
      (rows (capacity, n), the most candidates that one particle has marked).
    """
    words, n = marks.shape
    most = jnp.max(jnp.sum(jax.lax.population_count(marks), axis=0), initial=0).astype(jnp.int32)
    rows = jnp.full((capacity, n), unused, jnp.int32)
    if not (capacity and words):  # every particle is alone
        return rows, most
    particles = jnp.arange(n, dtype=jnp.int32)

    def earlier(following: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Find the first word with a mark among those after word w, or the last word."""
        return jnp.where(marks[w] != 0, w, following), following

    last = jnp.full(n, words - 1, jnp.int32)
    first, following = jax.lax.scan(earlier, last, jnp.arange(words, dtype=jnp.int32), reverse=True)

    def take(
        r: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Write row r: the first candidate of each particle whose mark is left in ``integers``."""
        rows, word, integers = carry
        # the lowest bit that is set: its position is the number of bits below it
        bit = jax.lax.population_count((integers & -integers) - 1).astype(jnp.int32)
        j = neighbor(word, jnp.minimum(bit, WORD - 1))
        rows = rows.at[r].set(jnp.where(integers != 0, j, unused))
        left = integers & (integers - 1)  # without that bit
        after = following[word, particles]
        go_on = (left == 0) & (after > word)
        return rows, jnp.where(go_on, after, word), jnp.where(go_on, marks[after, particles], left)

    start = (rows, first, marks[first, particles])
    return jax.lax.fori_loop(0, jnp.minimum(most, capacity), take, start)[0], most


@compiled(static_argnames=("grid", "capacity"))
def search(
    positions: jax.Array,
    lattice: jax.Array,
    lengths: Lengths,
    skin: jax.Array,
    cells: jax.Array,
    grid: Grid,
    capacity: int,
) -> Found:
    """Find all pairs nearer than l_ij + skin, where the pair energy of i and j is zero beyond l_ij.

    The particles in nearby grid cells are candidates. First the candidates that are near enough are
    marked, by one bit for each. Then the marks are taken off one at a time, and the marked
    particles written as rows of particle indices.

    Args:
      positions: (n, d) positions of the particles.
      lattice: (d, d) the periodic cell, or for open boundaries a cell that encloses the system.
      lengths: the function (i, j) -> l_ij.
      skin: a length.
      cells: (d,) number of grid cells along each cell vector.
      grid: the grid, and the images that are searched.
      capacity: number of rows of the result.
    """
    n, d = positions.shape
    words = -(-grid.run_capacity // WORD)  # integers that hold a mark per candidate, rounded up
    everyone = with_images(positions, lattice, grid)
    total = everyone.shape[0]
    box = search_cell(lattice, grid.reach)
    by_cell = _sort(everyone, box, cells, grid)
    where = by_cell.where[:, :n]
    x = components(everyone[:n])
    images = nearest_images(box)
    sorted_x = components(everyone[by_cell.order])
    particles = jnp.arange(n, dtype=jnp.int32)
    longest = jnp.max(by_cell.length)

    def of_particle(j: jax.Array) -> jax.Array:
        """Return the index of the particle of which j is an image."""
        return j % n if grid.reach else j

    def run_in(offset: jax.Array) -> _Run:
        """Return the run of each particle in the line of grid cells at ``offset`` from its own.

        Offsets are along all cell vectors but the last, along which the line runs.
        """
        cell = jnp.zeros(n, jnp.int32)
        for a in range(d - 1):
            cell = cell * cells[a] + jnp.mod(where[a] + offset[a], cells[a])
        cell = cell * cells[-1] + where[-1]
        end = by_cell.line_end[cell]
        return _Run(by_cell.first[cell], by_cell.length[cell], end, end - by_cell.line[cell])

    def search_line(offset: jax.Array) -> jax.Array:
        """Mark the particles near each particle in the line of grid cells at an offset from it.

        Returns:
          marks as integers (words, n). Each bit of the integers in column i is the mark of one
          candidate neighbor of particle i.
        """
        run = run_in(offset)

        def near(k: jax.Array) -> jax.Array:
            """Return whether the k-th candidate neighbor j of each particle i is near enough.

            It is near enough below the distance l_ij + skin, where l_ij is the distance beyond
            which the pair energy is zero.
            """
            # in range also where k is beyond the run, whose candidates are left out
            index = jnp.minimum(run.place(k), total - 1)
            apart = images(tuple(c - s[index] for c, s in zip(x, sorted_x, strict=True)))
            j = by_cell.order[index]
            return (
                (sum(v * v for v in apart) < (lengths(particles, of_particle(j)) + skin) ** 2)
                & (k < run.length)
                & (j != particles)
            )

        return _marked(near, words, jnp.minimum(longest, grid.run_capacity), n)

    # neighboring lines; of one or two along a cell vector each is visited once
    sides = [((0,), (0, 1), (-1, 0, 1))[m - 1] for m in grid.visited[:-1]]
    offsets = jnp.asarray(list(itertools.product(*sides)), jnp.int32)
    # row r of the marks belongs to the line r // words and is its word r % words
    marks = jax.lax.map(search_line, offsets).reshape(-1, n)
    runs = jax.lax.map(run_in, offsets)

    def neighbor(word: jax.Array, bit: jax.Array) -> jax.Array:
        """Return for each particle the neighbor with the mark ``bit`` (n,) of the word (n,)."""
        run = jax.tree.map(lambda of_lines: of_lines[word // words, particles], runs)
        return by_cell.order[run.place(word % words * WORD + bit)]

    rows, most = _taken(marks, neighbor, capacity, total)
    if not grid.reach:
        return Found(rows, None, most, longest, jnp.zeros((), bool))
    shifts = _image_of_pairs(rows, positions, lattice, grid)
    far = jnp.any(jnp.abs(shifts) > FARTHEST)
    j = jnp.where(rows < total, rows % n, n)
    return Found(j, shifts.astype(jnp.int8), most, longest, far)


def nearer_rows(
    rows: jax.Array,
    positions: jax.Array,
    images: Callable[[tuple[jax.Array, ...]], tuple[jax.Array, ...]],
    lengths: Lengths,
    skin: jax.Array,
) -> jax.Array:
    """Copy those pairs of a neighbor list that are nearer than l_ij + skin, (capacity, n).

    A search among the neighbors of a wide list takes as long as one or two evaluations of the
    forces, a tenth of a search on a grid. This function can be traced by jax.

    Args:
      rows: (capacity, n) the neighbors of each particle, and n in places that are not used.
      positions: (n, d) positions of the particles.
      images: the function that maps the components of vectors to nearest images.
      lengths: the function (i, j) -> l_ij, beyond which the pair energy of i and j is zero.
      skin: a length.
    """
    capacity, n = rows.shape
    x = components(positions)
    particles = jnp.arange(n, dtype=jnp.int32)

    def near(k: jax.Array) -> jax.Array:
        """Return whether the k-th neighbor of each particle is near enough, as in search."""
        j = rows[k]
        some = jnp.minimum(j, n - 1)
        apart = images(tuple(c - c[some] for c in x))
        squared = sum(v * v for v in apart)
        return (squared < (lengths(particles, some) + skin) ** 2) & (j < n)

    used = jnp.max(jnp.sum(rows < n, axis=0), initial=0).astype(jnp.int32)
    marks = _marked(near, -(-capacity // WORD), used, n)
    return _taken(marks, lambda word, bit: rows[word * WORD + bit, particles], capacity, n)[0]
