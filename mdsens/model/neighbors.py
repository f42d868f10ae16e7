"""Neighbor lists: for each particle, the particles that it can interact with.

A search over grid cells, in :mod:`mdsens.model.neighbor_search`, builds the list. A test of the
list's completeness makes sure that no pair is lost unnoticed.

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

Where every height of the cell is at least twice the range, a pair is that of the nearest images of
its two particles. In a smaller cell a particle can meet several images of another particle, and its
own images. The array ``images`` then tells which image of each neighbor is meant, relative to the
positions as they are stored: a particle that leaves the cell takes its pairs along.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from mdsens._util.compilation import SMALL, as_jax, compiled
from mdsens._util.errors import InputError
from mdsens._util.lattice import BALL_OF_UNIT_DIAMETER, Images, heights, inverse
from mdsens._util.memory import require_memory
from mdsens._util.portable import Portable
from mdsens._util.precision import full_precision
from mdsens.model.neighbor_search import (
    FARTHEST,
    SKIN,
    WORD,
    Grid,
    Lengths,
    fullest_run,
    nearer_rows,
    search,
    search_cell,
    with_images,
)
from mdsens.potentials.base import Pairs

__all__ = [
    "Grid",
    "Lengths",
    "Neighbors",
    "all_pairs",
    "allocate",
    "common_grid",
    "filled_rows",
    "fitted",
    "lattice_of",
    "narrowed",
    "no_pairs",
    "serves",
    "slack",
    "update",
    "within",
]

# Particles up to which all pairs are listed. Compiling a search takes a second, and from about this
# size on a step on all pairs costs as much as one on a list (2-D packings: from about 50 on).
ALL_PAIRS_BELOW = 64
# Grid cells per particle, at most. A liquid takes fewer than one; in a dilute gas more of them find
# no more pairs and would fill memory.
CELLS = 64
# Round-off of a height in units of eps: it is computed by two divisions and a square root.
ROUND_OFF = 16


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
      images: (capacity, n, d) integers t, the image of each neighbor that is meant: the vector from
        particle i to its neighbor j is R_j - R_i + box @ t, with the positions R as they are
        stored, inside the cell or not. A particle's own images are among its neighbors. None where
        each pair is that of nearest images.
      cells: (d,) number of cells along each cell vector of the grid by which neighbors are
        searched; None for a list of all pairs.
      grid: what else determines the search; and the directions in which the system is periodic.
    """

    rows: jax.Array
    reference: jax.Array | None
    reference_box: jax.Array | None
    given: tuple[jax.Array, ...] | None
    skin: jax.Array
    overflowed: jax.Array
    images: jax.Array | None = None
    cells: jax.Array | None = None
    grid: Grid = dataclasses.field(default=Grid(), metadata={"static": True})

    @property
    def complete(self) -> bool:
        """True if the neighbor list never needs an update, such as a list of all pairs."""
        return self.reference is None

    @property
    def columns(self) -> Pairs:
        """The pairs as they are listed, (capacity, n): particle i of column i with its neighbors.

        Each pair is there twice. The indices i are (1, n).
        """
        i = jnp.arange(self.rows.shape[1], dtype=self.rows.dtype)[None]
        return Pairs(i, self.rows, self.images)

    @property
    def pairs(self) -> Pairs:
        """The pairs in the neighbor list, (m,), each pair once.

        Places that hold no pair have the index n, which is the number of particles.
        """
        n = self.rows.shape[1]
        i, j, images = self.columns
        once = (j > i) & (j < n)
        if images is not None:
            # of a particle's own images t and -t the one whose first number but zero is positive
            sign = jnp.zeros(j.shape, jnp.int8)
            for a in reversed(range(images.shape[-1])):
                sign = jnp.where(images[..., a] != 0, images[..., a], sign)
            once = once | ((j == i) & (sign > 0))
            images = images.reshape(-1, images.shape[-1])
        first = jnp.where(once, jnp.broadcast_to(i, j.shape), n).ravel()
        return Pairs(first, jnp.where(once, j, n).ravel(), images)

    @property
    @compiled
    def used(self) -> jax.Array:
        """Number of rows of the neighbor list that are in use, up to the last that is not empty."""
        filled = jnp.any(self.rows < self.rows.shape[1], axis=1)
        return jnp.max(filled * jnp.arange(1, self.rows.shape[0] + 1, dtype=jnp.int32), initial=0)

    def resized(self, capacity: int) -> Neighbors:
        """Return the neighbor list with ``capacity`` rows, at least as many as are in use."""
        if capacity == self.rows.shape[0]:
            return self
        # by numpy on the host, where jax would compile a program for each capacity
        xp: Any = jnp if isinstance(self.rows, Tracer) else np
        more = max(capacity - self.rows.shape[0], 0)
        rows = xp.asarray(self.rows)[:capacity]
        rows = xp.pad(rows, ((0, more), (0, 0)), constant_values=rows.shape[1])
        images = self.images
        if images is not None:
            images = xp.pad(xp.asarray(images)[:capacity], ((0, more), (0, 0), (0, 0)))
            images = images if xp is jnp else as_jax(images)
        return dataclasses.replace(self, rows=rows if xp is jnp else as_jax(rows), images=images)


def no_pairs(n: int, dtype: DTypeLike = float, periodic: tuple[bool, ...] = ()) -> Neighbors:
    """Return an empty neighbor list of n particles, for potentials without pair interactions.

    The list is complete as long as the range of the interactions is zero.
    """
    return _complete_list(as_jax(np.zeros((0, n), np.int32)), dtype, periodic)


def all_pairs(n: int, dtype: DTypeLike = float, periodic: tuple[bool, ...] = ()) -> Neighbors:
    """Return the list of all pairs of n particles, complete wherever the particles move.

    The pairs are those of nearest images, along the cell vectors for which ``periodic`` is True;
    along all of them where it is empty.
    """
    # row k is shifted by k + 1 in a circle: no row has a particle as its own neighbor
    rows = (np.arange(n)[None] + np.arange(1, n)[:, None]) % max(n, 1)
    return _complete_list(as_jax(rows, np.int32), dtype, periodic)


def _complete_list(rows: jax.Array, dtype: DTypeLike, periodic: tuple[bool, ...]) -> Neighbors:
    """Return a neighbor list, with given rows of particle indices, that never needs an update."""
    return Neighbors(
        rows=rows,
        reference=None,
        reference_box=None,
        given=None,
        skin=as_jax(np.inf, dtype),
        overflowed=as_jax(False),
        grid=Grid(periodic=periodic),
    )


def _skin(
    range_: float | jax.Array,
    lattice: jax.Array | np.ndarray,
    cells: jax.Array | np.ndarray,
    grid: Grid,
    share: ArrayLike | None = None,
) -> jax.Array:
    """Compute the skin of a neighbor list: the requested one, or less if the cell is too small.

    The skin is the distance beyond the interaction range up to which pairs are listed. It is
    negative if the cell or its grid cells are too small for the range.

    Args:
      range_: the largest distance at which two particles interact.
      lattice: (d, d) the cell, see ``_lattice``.
      cells: (d,) number of grid cells along each cell vector.
      grid: the images that are searched, and the requested skin.
      share: the requested skin, as a fraction of the range; None for that of the grid.
    """
    xp: Any = lattice.__array_namespace__()
    cell: Any = search_cell(lattice, grid.reach)  # type: ignore[type-var] - of either kind
    # along a vector with one or two grid cells all are searched: its whole height bounds the skin
    sides = heights(cell) / xp.where(cells > 2, cells, 1).astype(lattice.dtype)
    # A side that was divided so as to be the range may come out smaller than it by round-off.
    above = 1.0 + 8.0 * float(np.finfo(lattice.dtype).eps)
    wanted = (grid.skin if share is None else share) * range_
    skin = xp.minimum(wanted, xp.min(sides) * above - range_)
    return xp.minimum(skin, xp.min(heights(lattice) * _farthest(grid)) - range_)


def _farthest(grid: Grid) -> np.ndarray:
    """Return the largest distance (d,) of pairs that a search finds, in heights of the cell.

    Along each cell vector m images to either side reach m heights. The nearest image alone is found
    by rounding, which is right up to half of a height. It is inf where there are no images.
    """
    reach = np.asarray(grid.reach or (0,), float)
    farthest = np.where(reach > 0, reach, 0.4999)
    return np.where(np.asarray(grid.periodic or (True,)), farthest, np.inf)


def _lattice(neighbors: Neighbors, box: jax.Array | None) -> jax.Array:
    """Return the periodic cell (d, d), whose open sides are replaced by sides around the system."""
    # Open sides stay as they are: their images only add candidates, which lie beyond the range in
    # open space.
    enclosing: Any = neighbors.reference_box
    if box is None:
        return enclosing
    periodic = neighbors.grid.periodic
    return jnp.where(np.asarray(periodic), box, enclosing) if not all(periodic) else box


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


def _too_small(
    range_: float | jax.Array, box: np.ndarray | jax.Array | None, grid: Grid, times: float
) -> Any:
    """Return whether a cell is too small for pairs to be those of nearest images.

    It is if, along a cell vector whose images are not searched, the cell's height is less than
    twice the interaction range.

    Args:
      range_: the largest distance at which two particles interact.
      box: the cell; None for open boundaries.
      grid: the directions in which the system is periodic, and the images that are searched.
      times: the tolerance in units of the round-off of a height. Compiled code rounds differently
        from other code and needs a larger tolerance: if it refused a cell of just twice the range
        that other code accepts, it would ask for a larger list forever.
    """
    if box is None:
        return jnp.zeros((), bool)
    nearest = [not m for m in grid.reach] if grid.reach else [True] * len(box)
    if grid.periodic:
        nearest = [a and b for a, b in zip(nearest, grid.periodic, strict=True)]
    if not any(nearest):
        return jnp.zeros((), bool)
    least = heights(box)[np.asarray(nearest)].min()
    least = least * (1.0 + times * ROUND_OFF * np.finfo(box.dtype).eps)
    return ~(2.0 * range_ <= least)  # not >, so that NaN counts as too small


@compiled
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
        fits = ~_too_small(range_, box, neighbors.grid, 2.0)
        return (range_ > 0) & fits & ~_lacks_pairs(neighbors, range_)
    return ~neighbors.overflowed & _still_complete(neighbors, positions, box, lengths, range_)


def _lacks_pairs(neighbors: Neighbors, range_: jax.Array) -> jax.Array:
    """Return whether a list without pairs, from :func:`no_pairs`, is used where pairs interact.

    Pairs interact where the range, the largest distance of an interaction, is above zero.
    """
    count, n = neighbors.rows.shape
    return (range_ > 0) & (count == 0) & (n > 1)


@compiled
def update(
    neighbors: Neighbors,
    positions: jax.Array,
    box: jax.Array | None,
    lengths: Lengths,
    range_: jax.Array,
    skin: ArrayLike | None = None,
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
        distance beyond l_ij are listed. None for the skin that the list was made with.
      anew: True to rebuild even a list that is still complete.
    """
    positions, box, lengths, range_ = jax.lax.stop_gradient((positions, box, lengths, range_))
    grid = neighbors.grid
    too_small = _too_small(range_, box, grid, 2.0)
    if neighbors.complete:
        lost = too_small | _lacks_pairs(neighbors, range_)
        marked = dataclasses.replace(neighbors, overflowed=neighbors.overflowed | lost)
        return marked, jnp.zeros((), bool)
    lattice = _lattice(neighbors, box)

    def rebuild(old: Neighbors) -> Neighbors:
        capacity = old.rows.shape[0]
        assert old.cells is not None  # only a list of all pairs has none, and it is complete
        skin_now = _skin(range_, lattice, old.cells, grid, skin)
        found = search(positions, lattice, lengths, skin_now, old.cells, grid, capacity)
        lost = (found.most > capacity) | (found.longest > grid.run_capacity) | found.far
        lost = lost | (skin_now < 0) | too_small
        return dataclasses.replace(
            old,
            rows=found.rows,
            images=found.images,
            reference=positions,
            reference_box=lattice,
            given=tuple(jax.tree.leaves(lengths)),
            skin=skin_now.astype(old.skin.dtype),
            overflowed=old.overflowed | lost,
        )

    stale = jnp.asarray(anew) | ~_still_complete(neighbors, positions, box, lengths, range_)
    return jax.lax.cond(stale, rebuild, lambda old: old, neighbors), stale


def narrowed(
    neighbors: Neighbors,
    positions: jax.Array,
    box: jax.Array | None,
    lengths: Lengths,
    images: Images,
    skin: jax.Array,
) -> Neighbors:
    """Copy a neighbor list without the pairs farther apart than l_ij + skin, at these positions.

    The result is complete for as long as a list of this skin made at the positions, provided that
    no particle has moved by more than half of the difference of both skins since the list was
    built. It needs a list of nearest images. This function can be traced by jax.

    Args:
      neighbors: the list with the wider skin.
      positions, box, lengths: as in :func:`update`.
      images: the function that maps the components of vectors to their nearest images.
      skin: the skin of the result, a length.
    """
    positions, lengths = jax.lax.stop_gradient((positions, lengths))
    return dataclasses.replace(
        neighbors,
        rows=nearer_rows(neighbors.rows, positions, images, lengths, skin),
        reference=positions,
        reference_box=_lattice(neighbors, box),
        skin=skin.astype(neighbors.skin.dtype),
    )


def allocate(
    positions: jax.Array,
    box: jax.Array | None,
    lengths: Lengths,
    range_: float,
    room: float = 1.25,
    like: Neighbors | None = None,
    periodic: tuple[bool, ...] = (),
    skin: float = SKIN,
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
      periodic: for each cell vector whether the system is periodic along it; empty where it is
        periodic along all of them, or where ``box`` is None.
      skin: the skin, as a fraction of the range.
    """
    n = positions.shape[0]
    dtype = positions.dtype
    _check_range(range_, box)
    if range_ == 0.0:
        return no_pairs(n, dtype, periodic)
    along = (False,) * positions.shape[1] if box is None else periodic
    grid = Grid(periodic=along, skin=skin)
    reach = (1.0 + skin) * range_
    # once the round-off, where compiled code allows twice: it must not refuse what passes here
    small = bool(_too_small(range_, None if box is None else np.asarray(box), grid, 1.0))
    if not small and (n <= ALL_PAIRS_BELOW or not math.isfinite(reach)):
        return all_pairs(n, dtype, along)
    lattice = lattice_of(positions, box, range_, along)
    sides = np.asarray(lattice)
    cells = _cells(heights(sides), reach, n)
    # a cell hardly larger than twice the range leaves a skin of under 2 % of the range
    if small or not float(_skin(range_, sides, np.asarray(cells), grid)) > 0.02 * range_:
        grid = dataclasses.replace(grid, reach=_images_within(heights(sides), reach, along))
        _check_images(positions, sides, grid, reach)
        cells = _cells(heights(search_cell(sides, grid.reach)), reach, n)
    grid = grid.fitting(cells, n)
    return fitted(positions, lattice, lengths, range_, cells, grid, room, like)


def common_grid(
    n: int, lattices: list[jax.Array], ranges: list[float], like: Grid
) -> tuple[Grid, tuple[int, ...]]:
    """Return a grid for the neighbor search of several systems of n particles each, and its cells.

    It is the coarsest, whose grid cells are wide enough for each system, and has as many images as
    any of them needs. This function cannot run in compiled code.

    Args:
      n: number of particles of one system.
      lattices: (d, d) the cell of each system, from :func:`lattice_of`.
      ranges: the interaction range of each system.
      like: gives the skin, and for each cell vector whether the systems are periodic along it.
    """
    periodic = like.periodic
    sides = [np.asarray(lattice) for lattice in lattices]
    reaches = [(1.0 + like.skin) * range_ for range_ in ranges]
    grid = Grid(periodic=periodic, skin=like.skin)
    small = [_too_small(r, s, grid, 1.0) for r, s in zip(ranges, sides, strict=True)]
    if any(small):
        images = [
            _images_within(heights(s), r, periodic) for s, r in zip(sides, reaches, strict=True)
        ]
        grid = dataclasses.replace(grid, reach=tuple(int(m) for m in np.max(images, axis=0)))
    cells = [
        _cells(heights(search_cell(s, grid.reach)), r, n)
        for s, r in zip(sides, reaches, strict=True)
    ]
    common = tuple(int(m) for m in np.min(cells, axis=0))
    return grid.fitting(common, n), common


def _check_range(range_: float, box: jax.Array | None) -> None:
    """Raise InputError if the interaction range is NaN, or infinite in a periodic cell.

    ``box`` is the cell; None for open boundaries, which allow any range.
    """
    if math.isnan(range_):
        raise InputError(
            f"the range of the interactions is {range_}: correct the function of the cutoff, or"
            " the parameters."
        )
    if box is not None and not math.isfinite(range_) and range_ > 0:
        raise InputError(
            "a potential without a cutoff needs open boundaries: give the potential a cutoff, or"
            " give box=None."
        )


def _images_within(across: np.ndarray, reach: float, periodic: tuple[bool, ...]) -> tuple[int, ...]:
    """Return how many images to either side a particle can meet along each cell vector.

    The number is 0 where the nearest image is enough, and where the system is not periodic.

    Args:
      across: (d,) heights of the cell, the distances between opposite faces.
      reach: the interaction range with the skin.
      periodic: as in :func:`allocate`.
    """
    # the factor keeps a cell of just twice the reach from a skin that is cut short, see ``_skin``
    counts = np.where(2.0 * reach < 0.999 * across, 0, np.ceil(reach / across)).astype(int)
    return tuple(int(m) for m in counts * np.asarray(periodic or (True,)))


def _check_images(positions: jax.Array, sides: np.ndarray, grid: Grid, reach: float) -> None:
    """Raise an error if the images within the range are too many, or too far from each other.

    Args:
      positions: (n, d) positions of the particles.
      sides: (d, d) the cell.
      grid: the images to be searched.
      reach: the interaction range with the skin.

    Raises:
      TooLargeError: the list of neighbors would not fit in memory.
      InputError: two particles are stored more than 127 cells apart, or the cell is so skewed that
        images in the range are.
    """
    n, d = positions.shape
    images = float(np.prod([2.0 * m + 1.0 for m in grid.reach]))
    ball = BALL_OF_UNIT_DIAMETER[d] * (2.0 * reach) ** d
    listed = min(n * ball / abs(float(np.linalg.det(sides))), n * images)
    # of each image d coordinates, its grid cell and its place in the order; of each neighbor a
    # vector, a mark and an index, twice over while the list is made
    entries = int(n * images * (d + 4) + 2.0 * n * listed * (d + 2))
    what = f"a list of about {listed:,.0f} neighbors for each of {n:,} particles"
    remedy = f"shorten the cutoff; with the skin of the list it is {reach:.6g}."
    require_memory(entries, positions.dtype.itemsize, what, remedy)
    spread = np.ptp(np.asarray(positions) @ inverse(sides).T, axis=0)
    farthest = float(np.max(spread * np.asarray(grid.periodic or (True,)), initial=0.0))
    if max(grid.reach) + 1 > FARTHEST:
        raise InputError(
            f"images up to {max(grid.reach):,} cell vectors away are within the range, and"
            f" {FARTHEST - 1} are possible: shorten the cutoff, or where the cell is skewed, give a"
            " reduced cell of the same lattice, as by ase.build.minkowski_reduce, with positions"
            " wrapped into it."
        )
    if farthest + max(grid.reach) + 1 > FARTHEST:
        raise InputError(
            f"`positions` are stored up to {farthest:,.0f} cells apart, more than the"
            f" {FARTHEST - max(grid.reach) - 1} that are possible in a cell smaller than twice the"
            " range: wrap the positions into the cell."
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
    lattice: jax.Array,
    lengths: Lengths,
    range_: float,
    cells: tuple[int, ...],
    grid: Grid,
    room: float = 1.25,
    like: Neighbors | None = None,
) -> Neighbors:
    """Build a new neighbor list by a search on a grid whose cells are prescribed.

    The capacity of the list is what the positions need. This function cannot run in compiled code.

    Args:
      positions, lengths, range_, room: as in :func:`allocate`.
      lattice: (d, d) the cell; its open sides are those of a cell that encloses the system.
      cells: number of grid cells along each cell vector.
      grid: the grid for these cells; its run capacity is that of the result at least.
      like: an earlier list or None; the new list gets at least the capacity of the earlier one.
    """
    n, d = positions.shape
    sides = np.asarray(lattice)
    skin = as_jax(_skin(range_, sides, np.asarray(cells), grid), positions.dtype)
    everyone = with_images(np.asarray(positions), sides, grid)
    fullest = fullest_run(everyone, search_cell(sides, grid.reach), cells)
    grid = dataclasses.replace(
        grid, run_capacity=max(grid.run_of(room * fullest), grid.run_capacity)
    )
    grid = _at_least(grid, like)
    counts = as_jax(np.asarray(cells), np.int32)
    # first guess of the rows: neighbors at the mean density, and three standard deviations more
    ball = BALL_OF_UNIT_DIAMETER[d] * (2.0 * (range_ + float(skin))) ** d
    share = ball / abs(float(np.linalg.det(sides)))
    mean = n * (share if grid.reach else min(1.0, share))
    guess = _eights(mean + 3.0 * math.sqrt(mean))
    while True:
        found = search(positions, lattice, lengths, skin, counts, grid, guess)
        most = int(found.most)
        longest = int(found.longest)
        # A particle on the border of two grid cells, as in a crystal, may be counted in the one
        # here and searched in the other there: numpy and compiled code round differently.
        if longest > grid.run_capacity:
            grid = dataclasses.replace(grid, run_capacity=grid.run_of(room * longest))
        elif most <= guess:
            break
        else:
            guess = _eights(room * most)
    # A few rows even where no two particles are near, so that the first pair that comes near fits.
    capacity = _eights(max(room * most, 1.0))
    if not grid.reach:
        capacity = min(capacity, n - 1)
    if like is not None and not like.complete:
        capacity = max(capacity, like.rows.shape[0])
    neighbors = Neighbors(
        rows=found.rows,
        reference=positions,
        reference_box=lattice,
        given=tuple(jax.tree.leaves(lengths)),
        skin=skin,
        overflowed=as_jax(False),
        images=found.images,
        cells=counts,
        grid=grid,
    )
    return neighbors.resized(capacity)


def _at_least(grid: Grid, like: Neighbors | None) -> Grid:
    """Return a grid with at least the capacities of an earlier list, if it is alike otherwise."""
    if like is None:
        return grid
    larger = dataclasses.replace(
        grid,
        cell_capacity=max(grid.cell_capacity, like.grid.cell_capacity),
        run_capacity=max(grid.run_capacity, like.grid.run_capacity),
    )
    alike = dataclasses.replace(
        like.grid, cell_capacity=larger.cell_capacity, run_capacity=larger.run_capacity
    )
    return larger if alike == larger else grid


def lattice_of(
    positions: jax.Array, box: jax.Array | None, range_: float, periodic: tuple[bool, ...]
) -> jax.Array:
    """Return the cell (d, d) for a search, whose open sides enclose the system.

    Each open side is 1.5 (extent of the particles + 2 l), so that the system may expand, and at
    least 3 l, so that the grid of the neighbor search has at least three cells along each open
    side. l is the interaction range plus the skin. This function cannot run in compiled code.

    Args:
      positions: (n, d) positions of the particles.
      box: the cell, whose open sides are unit vectors normal to the others; None for open
        boundaries.
      range_: the interaction range.
      periodic: as in :func:`allocate`.
    """
    reach = (1.0 + SKIN) * range_
    if box is not None and all(periodic):
        return box
    directions = np.eye(positions.shape[1]) if box is None else np.asarray(box)
    span = np.ptp(np.asarray(positions) @ directions, axis=0) + 2.0 * reach
    sides = np.maximum(1.5 * span, 3.0 * reach)
    lattice = directions * np.where(np.asarray(periodic), 1.0, sides)
    return jnp.asarray(lattice, positions.dtype)


def _eights(count: float) -> int:
    """Round a number of rows up, so that similar systems can use one compiled code.

    Up to 128 the result is a multiple of 8, and beyond it is at most an eighth too large.
    """
    step = max(8, 2 ** (math.floor(math.log2(max(count, 1.0))) - 3))
    return step * math.ceil(count / step)


def filled_rows(listed: Neighbors) -> Neighbors:
    """Remove unused rows at the end of a neighbor list, down to a multiple of 8 rows.

    The multiple of 8 limits the number of shapes for which functions are compiled; in a large list,
    where the rows count for more than the compilation, it is a multiple of 4. A list that jax
    traces is returned unchanged.
    """
    if isinstance(listed.rows, Tracer):
        return listed
    rows = np.asarray(listed.rows)
    # over the particles, and over the systems of a batch, which need one number of rows
    filled = np.any(rows < rows.shape[-1], axis=(*range(rows.ndim - 2), -1))
    used = int(np.max(np.flatnonzero(filled), initial=-1)) + 1
    step = 8 if rows.size <= SMALL else 4
    fewer = step * math.ceil(used / step)
    if listed.grid.visited:
        # such a list is read, not searched again: the capacity of the search is no difference
        grid = dataclasses.replace(listed.grid, run_capacity=WORD)
        listed = dataclasses.replace(listed, grid=grid)
    if fewer >= rows.shape[-2]:
        return listed
    images = listed.images
    if images is not None:
        images = np.asarray(images)[..., :fewer, :, :]
    return dataclasses.replace(listed, rows=rows[..., :fewer, :], images=images)
