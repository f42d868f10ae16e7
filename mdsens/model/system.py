"""A system: particles, box, potential and parameters; and its energy U(positions, params, strain), the
source of all else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.environment import require_sound_jax
from mdsens._util.errors import InputError
from mdsens._util.lattice import heights, nearest_image
from mdsens._util.portable import Portable
from mdsens._util.tables import Shown
from mdsens._util.validation import real_array, require_host, short
from mdsens.constraints import Constraint, check_constraints
from mdsens.model import neighbors
from mdsens.model.box import BoxFunction, box_rule, described
from mdsens.model.neighbors import Neighbors
from mdsens.potentials.base import PairTerm, check_params
from mdsens.potentials.parameters import Parameter

__all__ = [
    "System",
    "box_at",
    "diameters_at",
    "energy_of",
    "listed",
    "pair_distances",
    "pair_lengths",
    "pair_terms",
    "parameters_of",
    "potential_energy",
    "require_unconstrained",
]

Params = Mapping[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class System(Portable, Shown):
    """A configuration of particles and all that its energy needs. Frozen, and a pytree. Make it
    with ``create``.

    Attributes:
      positions: (n, d) Cartesian, d = 2 or 3; a batch has a leading axis here and on every other
        array.
      params: dict of float arrays; a pair parameter is a scalar, (S,) one a species, (n,) one a
        particle, or (S, S).
      boundary: the rule that gives the cell: fixed, following the packing fraction, a function, or
        open.
      potential: the potential, see :mod:`mdsens.potentials`.
      species: (n,) integers from 0, or None.
      neighbors: the list of pairs.
      species_count: S, 0 without species.
      constraints: records of :mod:`mdsens.constraints`; what they need in numbers are ``params``
        too.
      species_names: of species 0, 1, …, such as chemical symbols, or one where there are no
        species; empty where nobody said. They are for people, and for ``to_ase``.
    """

    positions: jax.Array
    params: dict[str, jax.Array]
    boundary: Any
    potential: Any
    species: jax.Array | None
    neighbors: Neighbors
    species_count: int = dataclasses.field(default=0, metadata={"static": True})
    constraints: tuple[Constraint, ...] = ()
    species_names: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})

    _title = "System"

    def _rows(self) -> list[tuple[str, str]]:
        many = f"batch of {self.batch}, each " if self.batch else ""
        alike = (
            f", all {self.species_names[0]}" if self.species is None and self.species_names else ""
        )
        rows = [("particles", f"{many}n = {self.n} in {self.dimension}-D{alike}")]
        if self.species is not None:
            rows.append(("species", self._species_in_words()))
        rows.append(("potential", self.potential.name))
        for name, value in self.params.items():
            shown = np.array2string(
                np.asarray(value), precision=6, threshold=8, edgeitems=2, separator=", "
            )
            rows.append((f"  {name}", " ".join(shown.split())))
        rows.append(("box", self._box_in_words()))
        held = ", ".join(f"{c.name} ({type(c).__name__})" for c in self.constraints)
        return [*rows, ("constraints", held)] if held else rows

    def species_label(self, k: int) -> str:
        """Species k as text: its name, or its number where it has none."""
        return self.species_names[k] if k < len(self.species_names) else str(k)

    def _species_in_words(self) -> str:
        """How many particles of each there are."""
        members = np.atleast_2d(np.asarray(self.species))
        counts = np.array([np.bincount(kinds, minlength=self.species_count) for kinds in members])
        if self.species_count > 12 or (counts != counts[0]).any():
            return f"{self.species_count}"
        kinds = [f"{self.species_names[k]} (species {k})" if k < len(self.species_names) else f"of species {k}"
                 for k in range(self.species_count)]  # fmt: skip
        return ", ".join(f"{count} {kind}" for count, kind in zip(counts[0], kinds, strict=True))

    def _box_in_words(self) -> str:
        first = self if self.batch is None else jax.tree.map(lambda leaf: leaf[0], self)
        of_first = "" if self.batch is None or first.box is None else "; that of the first"
        return f"{described(first.box)}{first.boundary.follows}{of_first}"

    @classmethod
    def create(
        cls,
        positions: Any,
        box: Any,
        potential: Any,
        params: Params,
        species: Any = None,
        *,
        constraints: Any = (),
    ) -> System:
        """Check everything and build the neighbor list.

        Args:
          positions: (n, d) Cartesian.
          box: a length, d lengths, a (d, d) matrix whose columns are the cell vectors (ASE's are
            rows), a ``PackingFraction``, a function of the parameters that returns the matrix, or
            None for open boundaries.
          potential: a potential of :mod:`mdsens.potentials`.
          params: the potential's parameters by name, and those of the constraints.
          species: (n,) integers from 0; needed where a parameter has one value a species.
          constraints: records of :mod:`mdsens.constraints`, each with a name of its own.

        Raises:
          InputError: with the field, the value and the remedy.
        """
        require_sound_jax()
        remedy = (
            "make it outside, and change it there by system.replace(params=...) or"
            " ms.equilibrate(system, params)"
        )
        require_host("System.create", remedy, positions, params)
        try:
            given = np.asarray(positions)
        except Exception as error:  # rows of different lengths, or an object that refuses
            raise InputError(
                f"positions are no array, {short(positions)}: give (n, 2) or (n, 3) numbers."
            ) from error
        if not (np.issubdtype(given.dtype, np.floating) or np.issubdtype(given.dtype, np.integer)):
            raise InputError(
                f"positions have type {given.dtype}: give (n, 2) or (n, 3) real numbers."
            )
        if np.issubdtype(given.dtype, np.floating) and given.dtype not in (np.float32, np.float64):
            raise InputError(f"positions have type {given.dtype}: give single or double precision.")
        if np.ma.is_masked(positions):
            raise InputError(
                "positions are masked in places: give every particle's, or leave those particles"
                " out."
            )
        if given.ndim != 2 or given.shape[1] not in (2, 3) or given.shape[0] < 1:
            raise InputError(
                f"positions have shape {given.shape}: give (n, 2) or (n, 3), of one particle or"
                " more."
            )
        bad = ~np.isfinite(given).all(axis=1)
        if bad.any():
            k = int(np.argmax(bad))
            raise InputError(
                f"positions[{k}] is {given[k].tolist()}: every coordinate must be finite."
            )
        n, dimension = given.shape
        dtype = given.dtype if np.issubdtype(given.dtype, np.floating) else np.dtype(float)
        floats = jnp.asarray(
            given, jax.dtypes.canonicalize_dtype(dtype)
        )  # float32 where x64 is off
        values, count = _as_params(params, floats.dtype), 0
        if not hasattr(potential, "terms"):
            raise InputError(
                f"potential is {short(potential)}: give a potential, such as ms.potentials.soft_sphere()."
            )
        if constraints != ():
            constraints = check_constraints(constraints, values, potential.parameters, n, dimension)
        own = _of_potential(values, constraints)
        if species is not None:
            kinds = np.asarray(real_array("species", species, f"give ({n},) integers from 0."))
            whole = np.issubdtype(kinds.dtype, np.integer)
            if (
                kinds.shape != (n,)
                or not whole
                or kinds.min() < 0
                or kinds.max() > np.iinfo(np.int32).max
            ):
                raise InputError(
                    f"species has shape {kinds.shape} and type {kinds.dtype}: give ({n},) integers"
                    " from 0."
                )
            if kinds.min() > 0:
                raise InputError(f"species start at {kinds.min()}: number them from 0.")
            count = _species_count(kinds, own)
            species = jnp.asarray(kinds, jnp.int32)
        check_params(potential, own, n, count)
        rule = box_rule(box, dimension, floats.dtype)
        system = cls(
            floats, values, rule, potential, species, neighbors.no_pairs(n), count, constraints
        )
        if isinstance(rule, BoxFunction):  # the user's function: check what it returns
            found = rule.function(values)
            cell = np.asarray(
                real_array("what the box function returns", found, "return a matrix of numbers.")
            )
            if cell.shape != (
                dimension,
                dimension,
            ):  # a length alone would do for a fixed box, not here
                raise InputError(
                    f"the box function returns shape {cell.shape} in {dimension} dimensions: return"
                    f" a ({dimension}, {dimension}) matrix whose columns are the cell vectors."
                )
            box_rule(cell, dimension, floats.dtype)
        if hasattr(potential, "check_at"):
            potential.check_at(system.positions, system.box, values, species, count)
        system = system.reallocate()
        _check_coincident(system)
        _check_reach(system)
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
        """``sigma`` at each particle (n,), None where the potential has no sigma of particles."""
        return diameters_at(self, self.params)

    @property
    def box(self) -> jax.Array | None:
        """The cell (d, d), columns the cell vectors, at the present parameters; None for open
        boundaries.
        """
        return box_at(self, self.params)

    @property
    def volume(self) -> jax.Array:
        """Volume (area in 2-D) of the cell; inf for open boundaries."""
        box = self.box
        return jnp.asarray(jnp.inf) if box is None else jnp.abs(jnp.linalg.det(box))

    @property
    def symbols(self) -> np.ndarray | None:
        """(n,) the name of each particle's species; None where its species have no names."""
        if not self.species_names:
            return None
        kinds = (
            np.zeros(self.positions.shape[:-1], int)
            if self.species is None
            else np.asarray(self.species)
        )
        labels = [self.species_label(k) for k in range(max(self.species_count, 1))]
        return np.array(labels)[kinds]

    @property
    def range(self) -> jax.Array:
        """The largest distance at which two particles interact at the present parameters."""
        return self.potential.range(self.params)

    def replace(self, **changes: Any) -> System:
        """A copy with some fields changed, unchecked; the neighbor list stays as it is unless
        given.
        """
        return dataclasses.replace(self, **changes)

    def with_params(self, params: Params) -> System:
        """A copy with some parameters changed, checked, its neighbor list complete again. Host
        code.
        """
        remedy = "take system.replace(params=...) there, whose list of neighbors stays as it is"
        require_host("with_params", remedy, self, params)
        merged = {**self.params, **_as_params(params, self.positions.dtype)}
        check_params(
            self.potential, _of_potential(merged, self.constraints), self.n, self.species_count
        )
        check_constraints(
            self.constraints, merged, self.potential.parameters, self.n, self.dimension
        )
        changed = self.replace(params=merged).reallocate(keep=True)
        _check_reach(changed)
        return changed

    def reallocate(self, room: float = 1.25, keep: bool = False) -> System:
        """A copy with a neighbor list that fits the present positions. Host code.

        Args:
          room: capacity over what is needed now.
          keep: keep the present list where it is still complete, and its capacity where it is not.
        """
        old, at = self.neighbors, (self.positions, self.box, pair_lengths(self), self.range)
        if keep and bool(neighbors.serves(old, *at)):
            return self
        like = old if keep else None
        found = neighbors.allocate(*at[:3], float(at[3]), room, like)
        return self.replace(neighbors=found)


def _of_potential(
    params: dict[str, jax.Array], constraints: tuple[Constraint, ...]
) -> dict[str, jax.Array]:
    """The parameters that are the potential's, those of constraints left out."""
    others = {name for c in constraints for name in c.parameters}
    return {name: value for name, value in params.items() if name not in others}


def _check_reach(system: System) -> None:
    """Refuse constraints on distances that reach farther than the nearest images do."""
    if not system.constraints or system.box is None:
        return
    smallest = float(np.min(heights(np.asarray(system.box))))
    for c in system.constraints:
        reach = c.reach(system.params)
        if reach > 0.5 * smallest:
            raise InputError(
                f"{c.name}: a length of {reach:.6g} is above half of the cell's smallest height"
                f" {smallest:.6g}, so that another image of its end may be nearer: repeat the cell,"
                " or take shorter ones."
            )


def parameters_of(system: System, params: Params | None = None) -> tuple[Parameter, ...]:
    """What derivatives are by: of a batch, its members' parameters.

    Args:
      params: some of the system's, and a pressure among them; the system's where None.
    """
    pairs, found = system.potential.pair_parameters, []
    for name, value in (system.params if params is None else params).items():
        shape = np.shape(value)[1:] if system.batch is not None else np.shape(value)
        found.append(Parameter(name, shape, name in pairs and len(shape) == 2))
    return tuple(found)


def require_unconstrained(system: System, what: str) -> None:
    """Raise InputError where a system has constraints, which ``what`` would not see."""
    if system.constraints:
        names = ", ".join(c.name for c in system.constraints)
        raise InputError(
            f"{what} knows no constraints, and this system has {names}: take one without."
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairLengths:
    """(i, j) -> l_ij, the length beyond which the two do not interact; a pytree whose leaves are
    the parameters.
    """

    potential: Any
    params: dict[str, jax.Array]
    species: jax.Array | None
    n: int = dataclasses.field(metadata={"static": True})
    species_count: int = dataclasses.field(metadata={"static": True})

    def __call__(self, i: jax.Array, j: jax.Array) -> Any:
        return self.potential.lengths(self.params, (i, j), self.n, self.species, self.species_count)


@jax.jit
def pair_lengths(system: System) -> PairLengths:
    """l_ij at the system's parameters."""
    count, species, params = system.species_count, system.species, dict(system.params)
    for (
        name,
        value,
    ) in (
        params.items()
    ):  # one value a particle in place of one a species is one look-up in place of two
        if species is not None and value.ndim == 1 and value.shape[0] == count:
            params[name] = value[species]
    return PairLengths(system.potential, params, species, system.n, 0)


def listed(
    system: System, positions: jax.Array | None = None, **how: Any
) -> tuple[Neighbors, jax.Array]:
    """The system's list brought up to date at ``positions``, its own where None; and whether it was
    rebuilt.

    Traceable. ``how`` goes to :func:`mdsens.model.neighbors.update`.
    """
    at = system.positions if positions is None else positions
    return neighbors.update(
        system.neighbors, at, system.box, pair_lengths(system), system.range, **how
    )


def _as_params(params: Params, dtype: Any) -> dict[str, jax.Array]:
    if not isinstance(params, Mapping):
        raise InputError(
            f"params is a {type(params).__name__}: give a dict of parameter names and values."
        )
    return {
        name: jnp.asarray(real_array(f"parameter {name}", value), dtype)
        for name, value in params.items()
    }


def _species_count(kinds: np.ndarray, params: Params) -> int:
    """S: what the species' numbers need, or what the parameters' shapes say where a species has no
    particle.
    """
    least = int(kinds.max()) + 1 if kinds.size else 0
    lengths = {np.shape(v)[0] for v in params.values() if np.ndim(v) in (1, 2)} - {kinds.shape[0]}
    longer = [m for m in lengths if m >= least]
    return min(longer) if longer else least


def diameters_at(system: System, params: Params) -> jax.Array | None:
    """``sigma`` at each particle (n,) at some parameters; None where the potential has none of particles."""
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


@jax.jit
def box_at(system: System, params: Params) -> jax.Array | None:
    """The cell at some parameters."""
    return system.boundary.matrix(params, diameters_at(system, params), system.dimension)


def pair_terms(system: System, params: Params | None = None) -> tuple[PairTerm, ...]:
    """The pair-like parts of the energy on the system's neighbor list."""
    return system.potential.terms(
        system.params if params is None else params,
        system.neighbors.pairs,
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
    vectors = _deform(nearest_image(positions[term.i] - positions[term.j], box), strain)
    squared = jnp.sum(vectors**2, axis=-1)
    return jnp.sqrt(
        jnp.where(term.mask, squared, 1.0)
    )  # sqrt(0) on padding would make NaN derivatives


def potential_energy(
    system: System,
    positions: jax.Array | None = None,
    params: Params | None = None,
    strain: jax.Array | None = None,
) -> jax.Array:
    """U(positions, params, strain), the one scalar of which everything is a derivative.

    Args:
      system: gives the potential, the box rule, the species and the list of pairs (taken as complete).
      positions: (n, d); the system's where None.
      params: the system's where None. The box follows them.
      strain: (d, d) symmetric; every vector between particles becomes (1 + strain) r.
    """
    positions = system.positions if positions is None else positions
    params = system.params if params is None else params
    return energy_of(
        system, pair_terms(system, params), positions, params, box_at(system, params), strain
    )


def energy_of(
    system: System,
    terms: Iterable[PairTerm],
    positions: jax.Array,
    params: Params,
    box: jax.Array | None,
    strain: jax.Array | None = None,
) -> jax.Array:
    """The energy of some pair-like parts, and of what is more than pairs."""
    total = jnp.zeros((), positions.dtype)
    for term in terms:
        total = total + jnp.sum(term.energy(pair_distances(term, positions, box, strain)))

    def displacement(a: jax.Array, b: jax.Array, **_: Any) -> jax.Array:
        return _deform(nearest_image(a - b, box), strain)

    potential, kinds = system.potential, (system.species, system.species_count)
    return total + potential.many_body(positions, params, displacement, *kinds)


def _check_coincident(system: System) -> None:
    for r, i, j in _nearest_pairs(system):
        if r == 0.0:
            raise InputError(
                f"positions[{i}] and positions[{j}] are the same point: move one of them."
            )


@jax.jit
def _nearest_pairs(system: System) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """The nearest pair of each term: (r, i, j)."""
    found = []
    for term in pair_terms(system):
        if term.i.shape[0]:
            r = jnp.where(term.mask, pair_distances(term, system.positions, system.box), jnp.inf)
            k = jnp.argmin(r)
            found.append((r[k], term.i[k], term.j[k]))
    return found
