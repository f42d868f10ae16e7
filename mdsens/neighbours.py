"""Lists of the pairs that can interact: jax-md's cell list behind a test that cannot lose a pair in silence.

A list holds every pair nearer than ``reach`` at the ``reference`` positions. Particles that have moved by d_i since, in
a cell deformed by M, keep every pair nearer than ``reach * lambda_min(M) - 2 max |d_i|`` on the list: while that is at
least the law's range, the list is complete, and where it is not the list is rebuilt. A rebuild that does not fit the
static capacity, or a range grown beyond the reach, sets ``overflowed``; host code allocates again, traced code reports
it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens.boxes import heights
from mdsens.implicit.status import InputError

__all__ = ["Neighbours", "allocate", "update"]

ALL_PAIRS_BELOW = 128  # particles; a step on a list is faster from about 50 on, but compiling it takes seconds more
SKIN = 0.25  # of the range: more rebuilds below, more padding above


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Neighbours:
    """Pairs of particles that may interact.

    Attributes:
      pairs: (2, capacity) particle indices, each pair once, padded with n.
      reference: (n, d) Cartesian positions when the list was built; None for all pairs.
      reference_box: (d, d) cell at that time (an enclosing one for open boundaries); None for all pairs.
      reach: every pair nearer than this at the reference is listed; inf for all pairs.
      overflowed: True where pairs were lost.
      cells: cells a side of jax-md's cell list, 0 for none (all pairs are candidates).
      cell_capacity: particles a cell.
    """

    pairs: jax.Array
    reference: jax.Array | None
    reference_box: jax.Array | None
    reach: jax.Array
    overflowed: jax.Array
    cells: int = dataclasses.field(default=0, metadata={"static": True})
    cell_capacity: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def complete(self) -> bool:
        """True for a list of all pairs, which never needs an update."""
        return self.reference is None


def _scaled_displacement(a: jax.Array, b: jax.Array, box: Any = None, **_: Any) -> jax.Array:
    difference = a - b
    difference = difference - jnp.round(difference)
    return difference if box is None else box @ difference


def _untyped(*functions: Any) -> tuple[Any, ...]:
    """jax-md's annotations do not hold: its dataclasses hide their fields, and a number is no Box to them."""
    return functions


@functools.cache
def _jax_md_list() -> Any:
    """One jax-md neighbour list for all systems: with lengths in units of the reach, nothing in it is of one system."""
    from jax_md import partition

    with jax.ensure_compile_time_eval():  # its constants would otherwise be tracers of whoever calls first
        (make,) = _untyped(partition.neighbor_list)
        return make(
            _scaled_displacement,
            1.0,
            r_cutoff=1.0,
            dr_threshold=0.0,
            capacity_multiplier=1.0,
            fractional_coordinates=True,
            format=partition.OrderedSparse,
        )


def _fractional(positions: jax.Array, box: jax.Array) -> jax.Array:
    return jnp.mod(positions @ jnp.linalg.inv(box).T, 1.0)


def _upper(box: jax.Array) -> jax.Array:
    """The cell rotated so that it is upper triangular, as jax-md wants it: distances are the same."""
    upper = jnp.linalg.qr(box)[1]
    return upper * jnp.where(jnp.diag(upper) < 0, -1.0, 1.0)[:, None]


def _search(
    positions: jax.Array, box: jax.Array, reach: jax.Array, neighbours: Neighbours
) -> tuple[jax.Array, jax.Array]:
    """All pairs nearer than ``reach``, in the capacity of ``neighbours``: (pairs, overflowed)."""
    from jax_md import partition

    functions = _jax_md_list()
    cells_of, make_list, make_error = _untyped(partition.cell_list, partition.NeighborList, partition.PartitionError)
    cell_list = None
    if neighbours.cells:
        # a hair under 1/cells: jax-md takes floor(1 / size)
        cell_list = cells_of(1.0, (1.0 - 1e-9) / neighbours.cells, 1.0)
    template = make_list(
        idx=jnp.zeros((2, neighbours.pairs.shape[1]), jnp.int32),
        reference_position=positions,
        error=make_error(jnp.zeros((), jnp.uint8)),
        cell_list_capacity=neighbours.cell_capacity or None,
        max_occupancy=neighbours.pairs.shape[1],
        format=partition.OrderedSparse,
        cell_size=1.0 / neighbours.cells if neighbours.cells else None,
        cell_list_fn=cell_list,
        update_fn=functions.update,
    )
    with warnings.catch_warnings():  # jax-md scatters int64 into int32, which jax announces to refuse one day
        warnings.filterwarnings("ignore", "scatter inputs have incompatible types", FutureWarning)
        found = functions.update(_fractional(positions, box), template, box=_upper(box) / reach)
    lost = (found.error.code & (1 | 2)) != 0  # lists too short; jax-md's other two bits do not hold for this use
    if neighbours.cells:
        lost = lost | (neighbours.cells * reach > (1.0 + 1e-6) * jnp.min(heights(box)))
    return found.idx, lost


_search_jit = jax.jit(_search)


def _margin(neighbours: Neighbours, positions: jax.Array, box: jax.Array) -> jax.Array:
    """The distance up to which the list is still complete."""
    deformation = box @ jnp.linalg.inv(neighbours.reference_box)
    moved = positions - neighbours.reference @ deformation.T
    stretch = 1.0 - jnp.linalg.norm(deformation - jnp.eye(box.shape[0], dtype=box.dtype))
    return neighbours.reach * stretch - 2.0 * jnp.sqrt(jnp.max(jnp.sum(moved**2, axis=1)))


def _lattice(neighbours: Neighbours, box: jax.Array | None) -> jax.Array:
    # open boundaries keep the enclosing cell: its images only add candidates, which lie beyond the range in open space
    return neighbours.reference_box if box is None else box  # type: ignore[return-value]


@jax.jit
def update(
    neighbours: Neighbours, positions: jax.Array, box: jax.Array | None, reach_needed: jax.Array
) -> tuple[Neighbours, jax.Array]:
    """A list complete up to ``reach_needed`` at ``positions``, or marked as overflowed; and whether it was rebuilt.

    Traceable. Nothing of it is differentiated.
    """
    positions, box, reach_needed = jax.lax.stop_gradient((positions, box, reach_needed))
    too_small = jnp.zeros((), bool) if box is None else 2.0 * reach_needed > jnp.min(heights(box))
    if neighbours.complete:
        return dataclasses.replace(neighbours, overflowed=neighbours.overflowed | too_small), jnp.zeros((), bool)
    lattice = _lattice(neighbours, box)

    def rebuild(old: Neighbours) -> Neighbours:
        pairs, lost = _search(positions, lattice, old.reach, old)
        lost = lost | (old.reach < reach_needed)
        if box is not None:
            lost = lost | (2.0 * old.reach > jnp.min(heights(lattice)))
        return dataclasses.replace(
            old, pairs=pairs, reference=positions, reference_box=lattice, overflowed=old.overflowed | lost | too_small
        )

    stale = ~(_margin(neighbours, positions, lattice) >= reach_needed)
    return jax.lax.cond(stale, rebuild, lambda old: old, neighbours), stale


def allocate(
    positions: jax.Array, box: jax.Array | None, reach_needed: float, room: float = 1.25, like: Neighbours | None = None
) -> Neighbours:
    """A new list at ``positions``, on the host.

    Args:
      positions: (n, d).
      box: the cell, None for open boundaries.
      reach_needed: the law's range; inf for all pairs, 0 where the law has no neighbour pairs.
      room: capacity over what is found now.
      like: take at least this list's capacities, so that compiled code can be used again.
    """
    n, dimension = positions.shape
    dtype = positions.dtype
    if box is not None and math.isfinite(reach_needed):
        smallest = float(jnp.min(heights(box)))
        if 2.0 * reach_needed > smallest:
            raise InputError(
                f"box: its smallest height is {smallest:.6g}, under twice the interaction range {reach_needed:.6g}, so "
                "a particle would meet two images of another: repeat the cell, or shorten the cutoff."
            )
    elif box is not None and reach_needed > 0:
        raise InputError("a law without a cutoff needs open boundaries: give it a cutoff, or no box.")
    never = jnp.zeros((), bool)
    if reach_needed == 0.0:
        return Neighbours(jnp.zeros((2, 0), jnp.int32), None, None, jnp.asarray(jnp.inf, dtype), never)
    reach = (1.0 + SKIN) * reach_needed
    if box is not None:
        reach = min(reach, 0.4999 * float(jnp.min(heights(box))))
    if n <= ALL_PAIRS_BELOW or not math.isfinite(reach) or reach < 1.02 * reach_needed:
        pairs = np.stack(np.triu_indices(n, 1)).astype(np.int32)
        return Neighbours(jnp.asarray(pairs), None, None, jnp.asarray(jnp.inf, dtype), never)
    lattice = _enclosing(positions, reach) if box is None else box
    smallest = float(jnp.min(heights(lattice)))
    cells = int(smallest / reach) if smallest >= 3.0 * reach else 0
    cell_capacity = _eights(room * fullest_cell(positions, lattice, cells)) if cells else 0
    ball = {2: math.pi, 3: 4.0 / 3.0 * math.pi}[dimension] * reach**dimension
    expected = 0.5 * n**2 * min(1.0, ball / abs(float(jnp.linalg.det(lattice))))
    capacity = _rounded(room * expected)
    if like is not None and not like.complete:
        capacity = max(capacity, like.pairs.shape[1])
        if like.cells == cells:
            cell_capacity = max(cell_capacity, like.cell_capacity)
    while True:
        empty = Neighbours(
            jnp.full((2, min(capacity, n * (n - 1) // 2)), n, jnp.int32),
            positions,
            lattice,
            jnp.asarray(reach, dtype),
            never,
            cells,
            cell_capacity,
        )
        pairs, lost = _search_jit(positions, lattice, empty.reach, empty)
        if not bool(lost):
            return dataclasses.replace(empty, pairs=pairs)
        if capacity >= n * (n - 1) // 2:  # there is room for every pair, so it is a cell that overflows
            cell_capacity = _eights(1.5 * cell_capacity)
        capacity = _rounded(1.5 * capacity)


def fullest_cell(positions: jax.Array, lattice: jax.Array, cells: int) -> int:
    """Particles in the fullest cell of the grid."""
    # as jax-md bins them: a coordinate of -1e-17 wraps to 1.0, which is the first cell, not the last
    where = (np.asarray(_fractional(positions, lattice)) / (1.0 / cells)).astype(int) % cells
    index = np.ravel_multi_index(where.T, (cells,) * where.shape[1])
    return int(np.bincount(index).max())


def _enclosing(positions: jax.Array, reach: float) -> jax.Array:
    span = np.ptp(np.asarray(positions), axis=0) + 2.0 * reach
    return jnp.diag(jnp.asarray(np.maximum(1.5 * span, 3.0 * reach), positions.dtype))


def _eights(count: float) -> int:
    """Up to the next multiple of 8: the fullest cell differs from one random start to the next."""
    return 8 * math.ceil(count / 8)


def _rounded(count: float) -> int:
    """Up to the next of eight sizes an octave, so that small changes of density keep the compiled shapes."""
    count = max(math.ceil(count), 64)
    grain = max(1, 2 ** (math.floor(math.log2(count)) - 3))
    return math.ceil(count / grain) * grain
