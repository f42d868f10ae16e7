"""A system: particles, box, law and parameters; and its energy U(positions, params, strain), the source of all else."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens import boxes, neighbours
from mdsens._checks import real_array, short
from mdsens._tables import Shown
from mdsens.implicit.status import InputError, require_sound_jax
from mdsens.laws import PairTerm, check_params
from mdsens.neighbours import Neighbours

__all__ = ["System", "pair_distances", "pair_terms", "potential_energy", "stack", "unstack"]

Params = Mapping[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class System(Shown):
    """A configuration of particles and all that its energy needs. Frozen, and a pytree. Make it with ``create``.

    Attributes:
      positions: (n, d) Cartesian, d = 2 or 3; a batch has a leading axis here and on every other array.
      params: dict of float arrays; a pair parameter is a scalar, (S,) one a species, (n,) one a particle, or (S, S).
      boundary: the rule that gives the cell: fixed, following the packing fraction, a function, or open.
      potential: the law, see :mod:`mdsens.potentials`.
      species: (n,) integers from 0, or None.
      neighbours: the list of pairs.
      species_count: S, 0 without species.
    """

    positions: jax.Array
    params: dict[str, jax.Array]
    boundary: Any
    potential: Any
    species: jax.Array | None
    neighbours: Neighbours
    species_count: int = dataclasses.field(default=0, metadata={"static": True})

    _title = "System"

    def _rows(self) -> list[tuple[str, str]]:
        many = f"batch of {self.batch}, each " if self.batch else ""
        kinds = f", {self.species_count} species" if self.species is not None else ""
        rows = [("particles", f"{many}n = {self.n} in {self.dimension}-D{kinds}"), ("law", self.potential.name)]
        for name, value in self.params.items():
            shown = np.array2string(np.asarray(value), precision=6, threshold=8, edgeitems=2, separator=", ")
            rows.append((f"  {name}", " ".join(shown.split())))
        return [*rows, ("box", type(self.boundary).__name__)]

    @classmethod
    def create(cls, positions: Any, box: Any, potential: Any, params: Params, species: Any = None) -> System:
        """Check everything and build the neighbour list.

        Args:
          positions: (n, d) Cartesian.
          box: a length, d lengths, a (d, d) matrix whose columns are the cell vectors (ASE's are rows), a
            ``PackingFraction``, a function of the parameters that returns the matrix, or None for open boundaries.
          potential: a law of :mod:`mdsens.potentials`.
          params: the law's parameters by name.
          species: (n,) integers from 0; needed where a parameter has one value a species.

        Raises:
          InputError: with the field, the value and the remedy.
        """
        require_sound_jax()
        try:
            given = np.asarray(positions)
        except Exception as error:  # rows of different lengths, or an object that refuses
            raise InputError(f"positions are no array, {short(positions)}: give (n, 2) or (n, 3) numbers.") from error
        if not (np.issubdtype(given.dtype, np.floating) or np.issubdtype(given.dtype, np.integer)):
            raise InputError(f"positions have type {given.dtype}: give (n, 2) or (n, 3) real numbers.")
        if np.issubdtype(given.dtype, np.floating) and given.dtype not in (np.float32, np.float64):
            raise InputError(f"positions have type {given.dtype}: give single or double precision.")
        if np.ma.is_masked(positions):
            raise InputError("positions are masked in places: give every particle's, or leave those particles out.")
        if given.ndim != 2 or given.shape[1] not in (2, 3) or given.shape[0] < 1:
            raise InputError(f"positions have shape {given.shape}: give (n, 2) or (n, 3).")
        bad = ~np.isfinite(given).all(axis=1)
        if bad.any():
            k = int(np.argmax(bad))
            raise InputError(f"positions[{k}] is {given[k].tolist()}: every coordinate must be finite.")
        n, dimension = given.shape
        dtype = given.dtype if np.issubdtype(given.dtype, np.floating) else np.dtype(float)
        floats = jnp.asarray(given, jax.dtypes.canonicalize_dtype(dtype))  # float32 where x64 is off
        values, count = _as_params(params, floats.dtype), 0
        if species is not None:
            kinds = np.asarray(real_array("species", species, f"give ({n},) integers from 0."))
            whole = np.issubdtype(kinds.dtype, np.integer)
            if kinds.shape != (n,) or not whole or kinds.min() < 0 or kinds.max() > np.iinfo(np.int32).max:
                raise InputError(
                    f"species has shape {kinds.shape} and type {kinds.dtype}: give ({n},) integers from 0."
                )
            if kinds.min() > 0:
                raise InputError(f"species start at {kinds.min()}: number them from 0.")
            count = _species_count(kinds, values)
            species = jnp.asarray(kinds, jnp.int32)
        if not hasattr(potential, "terms"):
            raise InputError(f"potential is {short(potential)}: give a law, such as ms.potentials.soft_sphere().")
        check_params(potential, values, n, count)
        rule = boxes.box_rule(box, dimension, floats.dtype)
        empty = Neighbours(jnp.zeros((2, 0), jnp.int32), None, None, jnp.asarray(jnp.inf), jnp.zeros((), bool))
        system = cls(floats, values, rule, potential, species, empty, count)
        if isinstance(rule, boxes.BoxFunction):  # the user's function: check what it returns
            cell = np.asarray(real_array("what the box function returns", system.box, "return a matrix of numbers."))
            if cell.shape != (dimension, dimension):  # a length alone would do for a fixed box, not here
                raise InputError(
                    f"the box function returns shape {cell.shape} in {dimension} dimensions: return a ({dimension}, "
                    f"{dimension}) matrix whose columns are the cell vectors."
                )
            boxes.box_rule(cell, dimension, floats.dtype)
        system = system.reallocate()
        _check_coincident(system)
        return system

    @property
    def n(self) -> int:
        """Number of particles."""
        return self.positions.shape[-2]

    @property
    def dimension(self) -> int:
        """2 or 3."""
        return self.positions.shape[-1]

    @property
    def batch(self) -> int | None:
        """Number of members of a batch made by ``stack``; None for a single system."""
        return self.positions.shape[0] if self.positions.ndim == 3 else None

    @property
    def diameters(self) -> jax.Array | None:
        """``sigma`` at each particle (n,), None where the law has no sigma of particles."""
        return _diameters(self, self.params)

    @property
    def box(self) -> jax.Array | None:
        """The cell (d, d), columns the cell vectors, at the present parameters; None for open boundaries."""
        return box_at(self, self.params)

    @property
    def volume(self) -> jax.Array:
        """Volume (area in 2-D) of the cell; inf for open boundaries."""
        box = self.box
        return jnp.asarray(jnp.inf) if box is None else jnp.abs(jnp.linalg.det(box))

    @property
    def range(self) -> jax.Array:
        """The largest distance at which two particles interact at the present parameters."""
        return self.potential.range(self.params)

    def replace(self, **changes: Any) -> System:
        """A copy with some fields changed, unchecked; the neighbour list stays as it is unless given."""
        return dataclasses.replace(self, **changes)

    def with_params(self, params: Params) -> System:
        """A copy with some parameters changed, checked, its neighbour list complete again. Host code."""
        merged = {**self.params, **_as_params(params, self.positions.dtype)}
        check_params(self.potential, merged, self.n, self.species_count)
        return self.replace(params=merged).reallocate(keep=True)

    def reallocate(self, room: float = 1.25, keep: bool = False) -> System:
        """A copy with a neighbour list that fits the present positions. Host code.

        Args:
          room: capacity over what is needed now.
          keep: keep the present list where it is still complete, and its capacity where it is not.
        """
        old, box, needed = self.neighbours, self.box, self.range
        if keep and (old.complete or float(needed) > 0):
            if not old.complete or float(needed) < np.inf:
                fresh, _ = neighbours.update(
                    dataclasses.replace(old, overflowed=jnp.zeros((), bool)), self.positions, box, needed
                )
                if not bool(fresh.overflowed):
                    return self.replace(neighbours=fresh)
        found = neighbours.allocate(self.positions, box, float(needed), room, like=old if keep else None)
        return self.replace(neighbours=found)


def _as_params(params: Params, dtype: Any) -> dict[str, jax.Array]:
    if not isinstance(params, Mapping):
        raise InputError(f"params is a {type(params).__name__}: give a dict of parameter names and values.")
    return {name: jnp.asarray(real_array(f"parameter {name}", value), dtype) for name, value in params.items()}


def _species_count(kinds: np.ndarray, params: Params) -> int:
    """S: what the species' numbers need, or what the parameters' shapes say where a species has no particle."""
    least = int(kinds.max()) + 1 if kinds.size else 0
    lengths = {np.shape(v)[0] for v in params.values() if np.ndim(v) in (1, 2)} - {kinds.shape[0]}
    longer = [m for m in lengths if m >= least]
    return min(longer) if longer else least


def _diameters(system: System, params: Params) -> jax.Array | None:
    sigma = params.get("sigma")
    if sigma is None:
        return None
    if sigma.ndim == 2:
        sigma = jnp.diagonal(sigma)
    if sigma.ndim == 0:
        return jnp.broadcast_to(sigma, (system.n,))
    if system.species is not None and sigma.shape[0] == system.species_count:
        return sigma[system.species]
    return sigma if sigma.shape[0] == system.n else None


def box_at(system: System, params: Params) -> jax.Array | None:
    """The cell at some parameters."""
    return system.boundary.matrix(params, _diameters(system, params), system.dimension)


def pair_terms(system: System, params: Params | None = None) -> tuple[PairTerm, ...]:
    """The pair-like parts of the energy on the system's neighbour list."""
    return system.potential.terms(
        system.params if params is None else params,
        system.neighbours.pairs,
        system.n,
        system.species,
        system.species_count,
    )


def _deform(vectors: jax.Array, strain: jax.Array | None) -> jax.Array:
    return vectors if strain is None else vectors + vectors @ strain.T


def pair_distances(
    term: PairTerm, positions: jax.Array, box: jax.Array | None, strain: jax.Array | None = None
) -> jax.Array:
    """r of each pair of a term (m,), nearest images in the undeformed cell; 1 on padding."""
    vectors = _deform(boxes.nearest_image(positions[term.i] - positions[term.j], box), strain)
    squared = jnp.sum(vectors**2, axis=-1)
    return jnp.sqrt(jnp.where(term.mask, squared, 1.0))  # sqrt(0) on padding would make NaN derivatives


def potential_energy(
    system: System,
    positions: jax.Array | None = None,
    params: Params | None = None,
    strain: jax.Array | None = None,
) -> jax.Array:
    """U(positions, params, strain), the one scalar of which everything is a derivative.

    Args:
      system: gives the law, the box rule, the species and the list of pairs (taken as complete).
      positions: (n, d); the system's where None.
      params: the system's where None. The box follows them.
      strain: (d, d) symmetric; every vector between particles becomes (1 + strain) r.
    """
    positions = system.positions if positions is None else positions
    params = system.params if params is None else params
    box = box_at(system, params)
    total = jnp.zeros((), positions.dtype)
    for term in pair_terms(system, params):
        total = total + jnp.sum(term.energy(pair_distances(term, positions, box, strain)))

    def displacement(a: jax.Array, b: jax.Array, **_: Any) -> jax.Array:
        return _deform(boxes.nearest_image(a - b, box), strain)

    return total + system.potential.many_body(positions, params, displacement)


def _check_coincident(system: System) -> None:
    box = system.box
    for term in pair_terms(system):
        if term.i.shape[0] == 0:
            continue
        r = np.where(np.asarray(term.mask), np.asarray(pair_distances(term, system.positions, box)), np.inf)
        k = int(np.argmin(r))
        if r[k] == 0.0:
            i, j = int(term.i[k]), int(term.j[k])
            raise InputError(f"positions[{i}] and positions[{j}] are the same point: move one of them.")


def stack(systems: list[System] | tuple[System, ...]) -> System:
    """A batch: one System whose arrays have a leading axis, for ``vmap`` and for the loops of ``minimize`` and ``jvp``.

    All members need the same number of particles, law, kind of box and parameter shapes; their neighbour lists get the
    largest member's capacity.

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
            raise InputError(f"stack got a {type(system).__name__}: give systems, such as eq.system.")
        for field in ("positions", "params", "boundary", "potential", "species", "species_count"):
            ours, theirs = (
                jax.tree.map(jnp.shape, getattr(s, field)) if field != "species_count" else getattr(s, field)
                for s in (first, system)
            )
            if ours != theirs:
                raise InputError(
                    f"system {k} has other {field} than system 0 ({theirs} for {ours}): stack equal kinds."
                )
    systems = [s if s.neighbours.complete else s.reallocate(keep=True) for s in systems]
    complete = [s.neighbours.complete for s in systems]
    if any(complete) and not all(complete):
        raise InputError("some systems list all pairs and some do not: stack systems of one size and density.")
    if not any(complete):
        systems = _same_lists(systems)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *systems)


def _same_lists(systems: list[System]) -> list[System]:
    """The systems with lists of one shape that hold every pair of each."""
    lists = [s.neighbours for s in systems]
    capacity, cells = max(x.pairs.shape[1] for x in lists), min(x.cells for x in lists)
    cell_capacity = 0
    if cells:  # those of the coarsest grid hold more than those of a finer one
        lattices: list[Any] = [s.neighbours.reference_box if s.box is None else s.box for s in systems]
        fullest = [neighbours.fullest_cell(s.positions, b, cells) for s, b in zip(systems, lattices, strict=True)]
        cell_capacity = max([math.ceil(1.25 * max(fullest)), *(x.cell_capacity for x in lists if x.cells == cells)])
    while True:
        shape = dataclasses.replace(
            lists[0],
            pairs=jnp.full((2, capacity), systems[0].n, jnp.int32),
            cells=cells,
            cell_capacity=cell_capacity,
        )
        fitted = [_refit(s, shape) for s in systems]
        if not any(bool(x.overflowed) for x in fitted):
            return [s.replace(neighbours=x) for s, x in zip(systems, fitted, strict=True)]
        capacity, cell_capacity = math.ceil(1.25 * capacity), math.ceil(1.25 * cell_capacity)


def _refit(system: System, shape: Neighbours) -> Neighbours:
    """The system's list rebuilt in another list's capacities."""
    own = system.neighbours
    assert own.reference is not None  # complete lists have no capacity to fit
    stale = dataclasses.replace(
        shape, reference=own.reference + 2.0 * own.reach, reference_box=own.reference_box, reach=own.reach
    )
    return neighbours.update(stale, system.positions, system.box, system.range)[0]


def unstack(batch: Any) -> list[Any]:
    """The members of a batch: of a System that ``stack`` made, or of the Equilibrium that ``minimize`` made of it."""
    count = getattr(getattr(batch, "system", batch), "batch", None)
    if count is None:
        raise InputError(
            f"unstack got a {type(batch).__name__} that is no batch: give what ms.stack returned, or ms.minimize of it."
        )
    return [jax.tree.map(lambda leaf, k=k: leaf[k], batch) for k in range(count)]
