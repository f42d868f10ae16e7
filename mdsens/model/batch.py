"""Several systems as one, and one as several."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mdsens._util.batching import apart, together
from mdsens._util.errors import InputError
from mdsens.model import neighbors
from mdsens.model.box import FixedBox
from mdsens.model.system import System, pair_lengths

__all__ = ["stack", "unstack"]

FIELDS = (
    "positions",
    "params",
    "boundary",
    "potential",
    "species",
    "species_count",
    "species_names",
    "constraints",
)


def stack(systems: list[System] | tuple[System, ...]) -> System:
    """A batch: one System whose arrays have a leading axis, for ``vmap`` and for the loops of
    ``minimize`` and ``jvp``.

    All members need the same number of particles, potential, kind of box and parameter shapes; their
    neighbor lists get the largest member's capacity.

    Raises:
      InputError: naming the first member that differs.
    """
    if not isinstance(systems, list | tuple):
        raise InputError(f"stack got a {type(systems).__name__}: give a list of systems.")
    if not systems:
        raise InputError("stack got no systems: give at least one.")
    first = systems[0]
    for k, system in enumerate(systems):
        if not isinstance(system, System):
            raise InputError(
                f"stack got a {type(system).__name__}: give systems, such as eq.system."
            )
        for field in FIELDS:
            if field == "boundary" and all(
                isinstance(s.boundary, FixedBox) for s in (first, system)
            ):
                continue
            ours, theirs = (
                (
                    getattr(s, field)
                    if field.startswith("species_")
                    else jax.tree.map(jnp.shape, getattr(s, field))
                )
                for s in (first, system)
            )
            if ours != theirs:
                raise InputError(
                    f"system {k} has other {field} than system 0 ({theirs} for {ours}): stack equal"
                    " kinds."
                )
    systems = [s if s.neighbors.complete else s.reallocate(keep=True) for s in systems]
    if len({s.boundary.orthogonal for s in systems}) > 1:
        systems = [
            s.replace(boundary=FixedBox(s.boundary.cell)) for s in systems
        ]  # the form that holds for all
    complete = [s.neighbors.complete for s in systems]
    if any(complete) and not all(complete):
        raise InputError(
            "some systems list all pairs and some do not: stack systems of one size and density."
        )
    kinds = {(s.neighbors.rows.shape, s.neighbors.cells, s.neighbors.run_capacity) for s in systems}
    if not any(complete) and len(kinds) > 1:
        systems = _same_lists(systems)
    return together(systems)


def _same_lists(systems: list[System]) -> list[System]:
    """The systems with lists of one shape that hold every pair of each."""
    cells = tuple(min(along) for along in zip(*(s.neighbors.cells for s in systems), strict=True))
    lists = []
    for s in systems:
        lattice: Any = s.neighbors.reference_box if s.box is None else s.box
        lists.append(
            neighbors.fitted(s.positions, s.box, lattice, pair_lengths(s), float(s.range), cells)
        )
    capacity, run_capacity = (
        max(k) for k in zip(*((x.rows.shape[0], x.run_capacity) for x in lists), strict=True)
    )
    return [
        s.replace(neighbors=dataclasses.replace(x.resized(capacity), run_capacity=run_capacity))
        for s, x in zip(systems, lists, strict=True)
    ]


def unstack(batch: Any) -> list[Any]:
    """The members of a batch: of a System that ``stack`` made, or of the Equilibrium that
    ``minimize`` made of it.
    """
    count = getattr(getattr(batch, "system", batch), "batch", None)
    if count is None:
        raise InputError(
            f"unstack got a {type(batch).__name__} that is no batch: give what ms.stack returned,"
            " or ms.minimize of it."
        )
    return apart(batch, count)
