"""Batches of systems: several systems stacked into one, and a batch taken apart again."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from mdsens._util.batching import stack_trees, unstack_tree
from mdsens._util.errors import InputError
from mdsens.model import neighbors
from mdsens.model.box import FixedBox
from mdsens.model.system import System, pair_lengths

__all__ = ["stack", "unstack"]

T = TypeVar("T")

# Fields that must agree between members. The neighbor list is not among them: lists whose shapes
# differ are built again with a common shape, see _with_equal_lists.
FIELDS = (
    "positions",
    "params",
    "boundary",
    "potential",
    "species",
    "species_count",
    "species_names",
    "periodic",
    "constraints",
    "masses",
    "tags",
)


def stack(systems: list[System] | tuple[System, ...]) -> System:
    """Stack systems into a batch: one System whose arrays have a leading axis over the systems.

    The systems in a batch are called its members. A batch can be given to ``jax.vmap``,
    ``minimize`` and ``jvp``. All members need the same number of particles, potential, kind of box
    and parameter shapes; all neighbor lists get the capacity of the largest one.

    Raises:
      InputError: a system differs from the first one in such a property; the message names both.

    Example:
      >>> import mdsens as ms
      >>> ms.enable_x64()
      >>> batch = ms.stack([ms.load_system("seed_packing_2d", seed=s) for s in (0, 1)])
      >>> batch.batch
      2
    """
    _check_systems(systems)
    systems = [s if s.neighbors.complete else s.reallocate(keep=True) for s in systems]
    # ``orthogonal`` is static, so that boxes that differ in it are trees that cannot be stacked
    if len({s.boundary.orthogonal for s in systems}) > 1:
        # a general cell: the form that is right for members with and without right angles
        systems = [s.replace(boundary=FixedBox(s.boundary.cell)) for s in systems]
    if _have_unequal_lists(systems):
        systems = _with_equal_lists(systems)
    return stack_trees(systems)


def _check_systems(systems: list[System] | tuple[System, ...]) -> None:
    """Raise InputError unless a user gives a list of systems that agree with the first one."""
    if not isinstance(systems, list | tuple):
        raise InputError(
            f"stack got an object of type {type(systems).__name__}: give a list of systems."
        )
    if not systems:
        raise InputError("stack got no systems: give at least one system.")
    for k, system in enumerate(systems):
        if not isinstance(system, System):
            raise InputError(
                f"stack got an object of type {type(system).__name__} in its list: give systems,"
                " such as eq.system."
            )
        _check_agreement(systems[0], system, k)


def _check_agreement(first: System, system: System, k: int) -> None:
    """Raise InputError if system k differs from the first one in a field that must agree."""
    for field in FIELDS:
        # fixed boxes may differ in what is known of their shape; that is settled in ``stack``
        if field == "boundary" and all(isinstance(s.boundary, FixedBox) for s in (first, system)):
            continue
        expected = _comparable(first, field)
        actual = _comparable(system, field)
        if expected != actual:
            raise InputError(
                f"system {k} differs from system 0 in {field} ({actual}, not {expected}): stack"
                " only systems that agree in it."
            )


def _comparable(system: System, field: str) -> Any:
    """Return the part of an attribute of System that all systems of a batch must have in common.

    For the number of species, their names and the periodic axes this is the value itself; for any
    other
    attribute ``field`` it is the shapes of the arrays in it.
    """
    value = getattr(system, field)
    # the tree keeps static fields, such as the function phi of a potential: they are compared, too
    plain = field.startswith("species_") or field == "periodic"
    return value if plain else jax.tree.map(jnp.shape, value)


def _have_unequal_lists(systems: list[System]) -> bool:
    """Return whether the neighbor lists of the systems differ in shape, so that none can be kept.

    Raises:
      InputError: some of the lists hold all pairs, and others do not.
    """
    complete = [s.neighbors.complete for s in systems]
    images = any(s.neighbors.images is not None for s in systems)
    if any(complete) and not all(complete) and not images:
        raise InputError(
            "the neighbor lists of some systems hold all pairs and those of others do not: stack"
            " systems of one size and density."
        )
    kinds = {(s.neighbors.rows.shape, s.neighbors.grid) for s in systems}
    return not all(complete) and len(kinds) > 1


def _with_equal_lists(systems: list[System]) -> list[System]:
    """Build new neighbor lists of one common shape, so that the systems can form a batch.

    Each list contains every interacting pair of its own system.
    """
    ranges = [float(s.range) for s in systems]
    lattices = [
        neighbors.lattice_of(s.positions, s.box, range_, s.periodic)
        for s, range_ in zip(systems, ranges, strict=True)
    ]
    like = systems[0].neighbors.grid
    grid, cells = neighbors.common_grid(systems[0].n, lattices, ranges, like)
    lists = [
        neighbors.fitted(s.positions, lattice, pair_lengths(s), range_, cells, grid)
        for s, lattice, range_ in zip(systems, lattices, ranges, strict=True)
    ]
    capacity = max(x.rows.shape[0] for x in lists)
    grid = dataclasses.replace(grid, run_capacity=max(x.grid.run_capacity for x in lists))
    return [
        s.replace(neighbors=dataclasses.replace(x.resized(capacity), grid=grid))
        for s, x in zip(systems, lists, strict=True)
    ]


def unstack(batch: T) -> list[T]:
    """Split a batch into the list of its members.

    The batch is a System made by ``stack``, or the Equilibrium that ``minimize`` returns for
    such a System.
    """
    count = getattr(getattr(batch, "system", batch), "batch", None)
    if count is None:
        raise InputError(
            f"unstack got an object of type {type(batch).__name__} that is not a batch: give the"
            " result of ms.stack, or of ms.minimize on such a batch."
        )
    return unstack_tree(batch, count)
