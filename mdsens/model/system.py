"""A system of particles, with its box, potential and parameters, and the energy of the system.

Forces, stresses, Hessians and sensitivities are derivatives of this energy by the positions, the
parameters and a strain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from mdsens._util.compilation import as_jax, compiled
from mdsens._util.environment import require_sound_jax
from mdsens._util.errors import InputError
from mdsens._util.lattice import (
    Components,
    Images,
    components,
    heights,
    nearest_image,
    nearest_images,
)
from mdsens._util.portable import Portable
from mdsens._util.precision import full_precision
from mdsens._util.pytree import PyTree, arrays_of, is_leaf, named_leaves
from mdsens._util.tables import Shown
from mdsens._util.validation import real_array, require_host, short
from mdsens.constraints import Constraint, check_constraints
from mdsens.model import neighbors
from mdsens.model.box import (
    BoxFunction,
    BoxRule,
    PackingFraction,
    box_rule,
    described,
    periodic_axes,
)
from mdsens.model.neighbors import Neighbors
from mdsens.model.surroundings import over_atoms, vectors_to_neighbors
from mdsens.potentials.base import Pairs, PairTerm, Potential, check_params
from mdsens.potentials.local import EdgePotential, LocalPotential, parts_of_neighbors
from mdsens.potentials.parameters import Parameter

__all__ = [
    "System",
    "atom_energies",
    "box_at",
    "crossing_terms",
    "diameters_at",
    "displacement_in",
    "energy_number",
    "energy_of",
    "images_of",
    "listed",
    "neighbor_vectors",
    "pair_distances",
    "pair_lengths",
    "pair_terms",
    "parameters_of",
    "potential_energy",
    "require_unconstrained",
    "require_volume",
]

Params = Mapping[str, Any]

# Skin of the neighbor list for an energy that is a function of all neighbors, in ranges: at 0.3 the
# list would be 1.7 times as long, and the atoms of a crystal hardly move.
NARROW_SKIN = 0.1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class System(Portable, Shown):
    """A configuration of particles and everything that its energy depends on.

    A System is immutable, and a pytree of jax. Make a System with ``System.create``.

    Attributes:
      positions: (n, d) Cartesian coordinates, d = 2 or 3; in a batch this and every other array has
        a leading axis over the systems.
      params: dict of float arrays. A pair parameter is a scalar, (S,) with one value per species,
        (n,) with one value per particle, or (S, S) with one value per pair of species. A parameter
        of a potential by ``from_edges``, ``from_local`` or ``from_energy`` may also be a tree of
        arrays, such as ``{"embed": W0, "layers": [{"w": W, "b": b}]}``, the weights of a network.
        Its leaves are named by their paths, ``weights.layers.0.w``.
      boundary: the rule that gives the cell: a fixed cell, a cell that follows the packing
        fraction, a function of the parameters, or open boundaries.
      potential: the potential, see :mod:`mdsens.potentials`.
      species: (n,) the species of each particle, an integer from 0; None without species.
      neighbors: the neighbor list.
      species_count: S, the number of species; 0 without species.
      constraints: constraints of :mod:`mdsens.constraints`, whose parameters are in ``params`` too.
      species_names: names of species 0, 1, …, such as chemical symbols, for printed tables and
        ``to_ase``; a single name where there are no species; empty where no names were given.
      periodic: for each cell vector whether the system is periodic along it; all False for open
        boundaries. Where only some are, as for a slab or a wire, the others are unit vectors normal
        to these and to each other.
      masses: (n,) mass of each particle, in a unit of the user's choice (atomic mass units from
        ``from_ase``); None where no masses were given. The energy does not depend on them.
      tags: (n,) integers that mark particles for the user, such as the layers of a slab in ASE;
        None without them. Nothing in mdsens depends on them.
    """

    positions: jax.Array
    params: dict[str, Any]
    boundary: Any
    potential: Any
    species: jax.Array | None
    neighbors: Neighbors
    species_count: int = dataclasses.field(default=0, metadata={"static": True})
    constraints: tuple[Constraint, ...] = ()
    species_names: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    periodic: tuple[bool, ...] = dataclasses.field(default=(), metadata={"static": True})
    masses: jax.Array | None = None
    tags: jax.Array | None = None

    _title = "System"  # heading of the printed table

    def _rows(self) -> list[tuple[str, str]]:
        """Return the lines of the table that describes the system: pairs (name, text)."""
        many = f"batch of {self.batch}, each " if self.batch else ""
        alike = ""
        if self.species is None and self.species_names:
            alike = f", all {self.species_names[0]}"
        rows = [("particles", f"{many}n = {self.n} in {self.dimension}-D{alike}")]
        if self.species is not None:
            rows.append(("species", self._describe_species()))
        if self.masses is not None:
            rows.append(("masses", _describe_masses(np.unique(np.asarray(self.masses)))))
        rows.append(("potential", self.potential.name))
        for name, value in named_leaves(self.params):
            shown = np.array2string(
                np.asarray(value), precision=6, threshold=8, edgeitems=2, separator=", "
            )
            rows.append((f"  {name}", " ".join(shown.split())))
        rows.append(("box", self._describe_box()))
        if self.constraints:
            names = ", ".join(f"{c.name} ({type(c).__name__})" for c in self.constraints)
            rows.append(("constraints", names))
        return rows

    def species_label(self, k: int) -> str:
        """Return the name of species k, or its number as text where it has no name."""
        return self.species_names[k] if k < len(self.species_names) else str(k)

    def _describe_species(self) -> str:
        """Return a text with the number of particles of each species."""
        members = np.atleast_2d(np.asarray(self.species))
        counts = np.array([np.bincount(kinds, minlength=self.species_count) for kinds in members])
        # too many to list, or a batch whose members differ: only the number of species
        if self.species_count > 12 or (counts != counts[0]).any():
            return f"{self.species_count}"
        words = []
        for k, count in enumerate(counts[0]):
            if k < len(self.species_names):
                words.append(f"{count} {self.species_names[k]} (species {k})")
            else:
                words.append(f"{count} of species {k}")
        return ", ".join(words)

    def _describe_box(self) -> str:
        """Return a text that describes the cell; for a batch, the cell of the first system."""
        # boxes of a batch may differ, and each rule expects the arrays of a single system
        first = self if self.batch is None else jax.tree.map(lambda leaf: leaf[0], self)
        of_first = "" if self.batch is None or first.box is None else "; that of the first"
        return f"{described(first.box, self.periodic)}{first.boundary.follows}{of_first}"

    @classmethod
    def create(
        cls,
        positions: ArrayLike,
        box: ArrayLike | BoxRule | Callable[[Params], jax.Array] | None,
        potential: Potential,
        params: Params,
        species: ArrayLike | None = None,
        *,
        constraints: Constraint | Iterable[Constraint] = (),
        periodic: bool | Sequence[bool] = True,
        masses: ArrayLike | None = None,
        tags: ArrayLike | None = None,
    ) -> System:
        """Make a System, with its neighbor list, from input that is checked.

        Args:
          positions: (n, d) Cartesian coordinates.
          box: a length, d lengths, a (d, d) matrix whose columns are the cell vectors (in ASE they
            are the rows), a ``PackingFraction``, a function of the parameters that returns the
            matrix, or None for open boundaries.
          potential: a potential of :mod:`mdsens.potentials`.
          params: dict of the parameters of the potential and of the constraints by name. Where a
            parameter may be a tree of arrays, dicts, lists and tuples of arrays are one; a list of
            numbers is an array.
          species: (n,) the species of each particle, an integer from 0; needed where a parameter
            has one value per species.
          constraints: a constraint of :mod:`mdsens.constraints`, or several with different names.
          periodic: for each cell vector whether the system is periodic along it, for example
            ``(True, True, False)`` for a slab. A cell vector along which it is not may be given as
            zeros, and becomes a unit vector normal to the others. One value stands for all cell
            vectors; False is the same as ``box=None``.
          masses: (n,) mass of each particle, positive, in any unit; the energy does not depend on
            them.
          tags: (n,) integers that mark particles, which are kept for the user.

        Raises:
          InputError: bad input; the message gives the field, the value and the remedy.
        """
        require_sound_jax()
        remedy = (
            "make it outside, and change it there by system.replace(params=...) or"
            " ms.equilibrate(system, params)"
        )
        require_host("System.create", remedy, positions, params, masses)
        coordinates = _checked_positions(positions)
        n, dimension = coordinates.shape
        trees = getattr(potential, "tree_parameters", ())  # what is no potential is refused below
        values = _as_params(params, coordinates.dtype, trees)
        if not hasattr(potential, "terms"):
            raise InputError(
                f"`potential` is {short(potential)}: give a potential, such as"
                " ms.potentials.soft_sphere()."
            )
        # () is the default; what else is empty may still be of a wrong type
        records: tuple[Constraint, ...] = ()
        if constraints != ():
            records = check_constraints(constraints, values, potential.parameters, n, dimension)
        potential_params = _params_of_potential(values, records)
        kinds = None
        count = 0
        if species is not None:
            numbers = _checked_species(species, n)
            count = _species_count(numbers, potential_params)
            _check_first_species(numbers, potential_params)
            kinds = as_jax(numbers, np.int32)
        check_params(potential, potential_params, n, count)
        along = periodic_axes(periodic, box, dimension)
        rule = box_rule(box, dimension, coordinates.dtype, along)
        system = cls(
            positions=coordinates,
            params=values,
            boundary=rule,
            potential=potential,
            species=kinds,
            neighbors=neighbors.no_pairs(n),  # until reallocate() below builds the list
            species_count=count,
            constraints=records,
            periodic=along,
            masses=_checked_masses(masses, n, coordinates.dtype),
            tags=_checked_tags(tags, n),
        )
        if isinstance(rule, BoxFunction):  # a function of the user: check the cell that it returns
            _check_box_function(rule, values, dimension, coordinates.dtype)
        # not every potential has a check of a configuration: SmoothedPotential has none
        check_at = getattr(potential, "check_at", None)
        if check_at is not None:
            # the cell as a function: few potentials need it, and jax compiles a program for it
            check_at(system.positions, lambda: system.box, values, kinds, count)
        system = system.reallocate()
        _check_coincident(system)  # on the list, so that it costs no loop over all pairs
        _check_reach(system)
        return system

    @property
    def n(self) -> int:
        """Number of particles."""
        return self.positions.shape[-2]

    @property
    def dimension(self) -> int:
        """The dimension of space, 2 or 3."""
        return self.positions.shape[-1]

    @property
    def batch(self) -> int | None:
        """Number of systems in a batch that ``stack`` has made; None for a single system."""
        return self.positions.shape[0] if self.positions.ndim == 3 else None

    @property
    def diameters(self) -> jax.Array | None:
        """Diameter of each particle, (n,), from the parameter ``sigma``; None without sigma."""
        return diameters_at(self, self.params)

    @property
    def box(self) -> jax.Array | None:
        """Cell matrix (d, d) at the present parameters; its columns are the cell vectors.

        The matrix is None for open boundaries.
        """
        return box_at(self, self.params)

    @property
    def volume(self) -> jax.Array:
        """Volume of the cell, in 2-D the area; inf where an axis is not periodic."""
        return self.periodic_volume if self.has_volume else jnp.asarray(jnp.inf)

    @property
    def periodic_volume(self) -> jax.Array:
        """The volume that the periodic cell vectors span; in 3-D the area of a slab.

        For a wire it is the length of its period. It is inf for open boundaries.
        """
        return _periodic_volume(self)

    @property
    def has_volume(self) -> bool:
        """Whether the system is periodic along every axis, so that its cell has a volume."""
        return bool(self.periodic) and all(self.periodic)

    @property
    def symbols(self) -> np.ndarray | None:
        """Name of each particle's species, (n,); None where the species have no names."""
        if not self.species_names:
            return None
        if self.species is None:
            kinds = np.zeros(self.positions.shape[:-1], int)
        else:
            kinds = np.asarray(self.species)
        labels = [self.species_label(k) for k in range(max(self.species_count, 1))]
        return np.array(labels)[kinds]

    @property
    def range(self) -> jax.Array:
        """The largest distance at which two particles interact at the present parameters."""
        return self.potential.range(self.params)

    def replace(self, **changes: Any) -> System:
        """Return a copy of the system with some fields changed.

        The new values are not checked, and the neighbor list is not updated.
        """
        return dataclasses.replace(self, **changes)

    def with_params(self, params: Params) -> System:
        """Return a copy of the system with some parameters changed.

        The new parameters are checked, and the neighbor list is updated. This method cannot run in
        compiled code.
        """
        remedy = "take system.replace(params=...) there, whose list of neighbors stays as it is"
        require_host("with_params", remedy, self, params)
        trees = self.potential.tree_parameters
        merged = {**self.params, **_as_params(params, self.positions.dtype, trees)}
        potential_params = _params_of_potential(merged, self.constraints)
        check_params(self.potential, potential_params, self.n, self.species_count)
        check_constraints(
            self.constraints, merged, self.potential.parameters, self.n, self.dimension
        )
        changed = self.replace(params=merged).reallocate(keep=True)
        _check_reach(changed)
        return changed

    def reallocate(self, room: float = 1.25, keep: bool = False) -> System:
        """Return a copy of the system with a neighbor list that fits its positions.

        This method cannot run in compiled code.

        Args:
          room: capacity of the list as a multiple of what the positions need.
          keep: True to keep the present list if it is still complete, and otherwise to give the new
            list at least the capacity of the present one.
        """
        old = self.neighbors
        if keep:
            (box, lengths, range_), serves = _search_inputs_and_completeness(self)
            if bool(serves):
                return self
        else:
            box, lengths, range_ = _search_inputs(self.replace(neighbors=None))
        # of the old capacities, so that code compiled for them can be used again
        like = old if keep else None
        fitting = neighbors.allocate(
            self.positions,
            box,
            lengths,
            float(range_),
            room,
            like,
            self.periodic,
            # an energy of all neighbors together takes longer, with the number of those listed
            NARROW_SKIN if self.potential.of_neighbors else neighbors.SKIN,
        )
        return self.replace(neighbors=fitting)


def _describe_masses(distinct: np.ndarray) -> str:
    """Describe masses in words: the distinct values, which are in order, or the range of many."""
    if distinct.size > 6:
        return f"{distinct[0]:.6g} to {distinct[-1]:.6g}"
    return ", ".join(f"{mass:.6g}" for mass in distinct)


def _checked_positions(positions: ArrayLike) -> jax.Array:
    """Convert a user's positions to a finite array (n, d) in single or double precision."""
    try:
        array = np.asarray(positions)
    except Exception as error:  # rows of different lengths, or an object that refuses
        raise InputError(
            f"`positions` is no array, {short(positions)}: give (n, 2) or (n, 3) numbers."
        ) from error
    dtype = _choose_precision(array.dtype)
    if np.ma.is_masked(positions):
        raise InputError(
            "`positions` has masked entries: give all positions, or leave those particles out."
        )
    if array.ndim != 2 or array.shape[1] not in (2, 3) or array.shape[0] < 1:
        raise InputError(
            f"`positions` has shape {array.shape}: give (n, 2) or (n, 3), of one particle or more."
        )
    bad = ~np.isfinite(array).all(axis=1)
    if bad.any():
        k = int(np.argmax(bad))
        raise InputError(f"positions[{k}] is {array[k].tolist()}: every coordinate must be finite.")
    # jax computes in float32 where x64 is not enabled
    return jnp.asarray(array, jax.dtypes.canonicalize_dtype(dtype))


def _choose_precision(dtype: np.dtype) -> np.dtype:
    """Return the precision in which positions of a given type are stored: integers as doubles.

    Raises:
      InputError: the type is not of integers or of real numbers in single or double precision.
    """
    # by type and not by conversion, which would read texts as numbers and drop imaginary parts
    if np.issubdtype(dtype, np.integer):
        return np.dtype(float)
    if not np.issubdtype(dtype, np.floating):
        raise InputError(f"`positions` has type {dtype}: give (n, 2) or (n, 3) real numbers.")
    if dtype not in (np.float32, np.float64):
        raise InputError(f"`positions` has type {dtype}: give single or double precision.")
    return dtype


def _checked_species(species: ArrayLike, n: int) -> np.ndarray:
    """Check the species of the particles that a user gives: (n,) integers from 0."""
    kinds = np.asarray(real_array("species", species, f"give ({n},) integers from 0."))
    if (
        kinds.shape != (n,)
        or not np.issubdtype(kinds.dtype, np.integer)
        or kinds.min() < 0
        or kinds.max() > np.iinfo(np.int32).max  # they are stored in this type
    ):
        raise InputError(
            f"`species` has shape {kinds.shape} and type {kinds.dtype}: give ({n},) integers from"
            " 0."
        )
    return kinds


def _check_first_species(kinds: np.ndarray, params: Params) -> None:
    """Raise InputError if no particle is of species 0 and no parameter has values for it either.

    A table of parameters may have species of which there are no particles.
    """
    arrays = arrays_of(params).values()
    has_table = any(np.ndim(v) and np.shape(v)[0] > kinds.max() for v in arrays)
    if kinds.min() > 0 and not has_table:
        raise InputError(f"`species` starts at {kinds.min()}: number the species from 0.")


def _checked_masses(masses: ArrayLike | None, n: int, dtype: np.dtype) -> jax.Array | None:
    """Check the masses of the particles that a user gives: (n,) positive numbers, or None."""
    if masses is None:
        return None
    values = np.asarray(real_array("masses", masses, f"give ({n},) positive numbers."))
    if values.shape != (n,):
        raise InputError(f"`masses` has shape {values.shape}: give ({n},) positive numbers.")
    bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        k = int(np.argmax(bad))
        raise InputError(f"masses[{k}] is {values[k]}: every mass must be positive and finite.")
    return jnp.asarray(values, dtype)


def _checked_tags(tags: ArrayLike | None, n: int) -> jax.Array | None:
    """Check the tags of the particles that a user gives: (n,) integers, or None."""
    if tags is None:
        return None
    values = np.asarray(real_array("tags", tags, f"give ({n},) integers."))
    limits = np.iinfo(np.int32)  # the type in which they are stored
    if (
        values.shape != (n,)
        or not np.issubdtype(values.dtype, np.integer)
        or values.min() < limits.min
        or values.max() > limits.max
    ):
        raise InputError(
            f"`tags` has shape {values.shape} and type {values.dtype}: give ({n},) integers of 32"
            " bits."
        )
    return jnp.asarray(values, jnp.int32)


def _check_box_function(
    rule: BoxFunction, params: dict[str, Any], dimension: int, dtype: np.dtype
) -> None:
    """Raise InputError if a user's function of the box does not return a cell matrix (d, d)."""
    returned = rule.function(params)
    need = "return a matrix of numbers."
    cell = np.asarray(real_array("what the box function returns", returned, need))
    # checked here, since a length alone would do for a fixed box
    if cell.shape != (dimension, dimension):
        raise InputError(
            f"the box function returns shape {cell.shape} in {dimension} dimensions: return"
            f" a ({dimension}, {dimension}) matrix whose columns are the cell vectors."
        )
    box_rule(cell, dimension, dtype)


def _params_of_potential(
    params: dict[str, Any], constraints: tuple[Constraint, ...]
) -> dict[str, Any]:
    """Return the parameters of the potential: all parameters but those of the constraints."""
    others = {name for c in constraints for name in c.parameters}
    return {name: value for name, value in params.items() if name not in others}


def _check_reach(system: System) -> None:
    """Raise InputError if a constraint fixes a distance above half the cell's smallest height.

    At a longer distance from a particle, another periodic image of its partner may be nearer, and
    distances are always those of nearest images.
    """
    if not system.constraints or system.box is None:
        return
    across = heights(np.asarray(system.box))
    smallest = float(np.min(across, where=np.asarray(system.periodic), initial=np.inf))
    for c in system.constraints:
        reach = c.reach(system.params)
        # nearest images are right for vectors shorter than half of the smallest height
        if reach > 0.5 * smallest:
            raise InputError(
                f"the constraint {c.name} fixes a length of {reach:.6g}, above half of the cell's"
                f" smallest height {smallest:.6g}, so that another image of a particle may be"
                " nearer: repeat the cell, or take shorter lengths."
            )


def parameters_of(system: System, params: Params | None = None) -> tuple[Parameter, ...]:
    """List the parameters by which derivatives are taken, with the shape of each.

    Each leaf of a tree of arrays is listed by its own name, such as ``weights.layers.0.w``. For a
    batch, the shapes are those of one system.

    Args:
      params: dict of some of the system's parameters, which may include a pressure; None for all
        parameters of the system.
    """
    pair_names = system.potential.pair_parameters
    parameters = []
    for name, value in named_leaves(system.params if params is None else params):
        # the first axis of a batch is that of its members
        shape = np.shape(value)[1:] if system.batch is not None else np.shape(value)
        parameters.append(Parameter(name, shape, name in pair_names and len(shape) == 2))
    return tuple(parameters)


def require_volume(system: System, what: str) -> None:
    """Raise InputError if a system is not periodic along all axes, so that it has no volume.

    ``what`` is what needs the volume, for the message, such as "elastic moduli need".
    """
    if system.has_volume:
        return
    if system.box is None:
        raise InputError(
            f"{what} a volume, and this system has open boundaries: give the system a box."
        )
    axes = " and ".join(str(a + 1) for a, along in enumerate(system.periodic) if not along)
    raise InputError(
        f"{what} a volume, and this system is not periodic along cell vector {axes}: give it a cell"
        " that is periodic along all vectors, periodic=True."
    )


def require_unconstrained(system: System, what: str) -> None:
    """Raise InputError if a system has constraints.

    ``what`` names the function that does not support constraints, for the message.
    """
    if system.constraints:
        names = ", ".join(c.name for c in system.constraints)
        raise InputError(
            f"{what} does not support constraints, and this system has {names}: take a system"
            " without constraints."
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairLengths:
    """The function (i, j) -> l_ij, the distance beyond which particles i and j do not interact.

    The object is a pytree whose arrays are the parameters that determine l_ij.
    """

    potential: Potential
    params: dict[str, Any]
    species: jax.Array | None
    n: int = dataclasses.field(metadata={"static": True})
    species_count: int = dataclasses.field(metadata={"static": True})

    def __call__(self, i: jax.Array, j: jax.Array) -> jax.Array | float:
        pairs = Pairs(i, j)
        return self.potential.lengths(self.params, pairs, self.n, self.species, self.species_count)


@compiled
def pair_lengths(system: System) -> PairLengths:
    """Return the function (i, j) -> l_ij at the parameters of a system.

    l_ij is the distance beyond which the pair energy of particles i and j is zero.
    """
    count = system.species_count
    species = system.species
    params = dict(system.params)
    for name in system.potential.pair_parameters:
        value = params[name]
        # with one value per particle each l_ij takes one look-up, with one per species two
        if species is not None and value.ndim == 1 and value.shape[0] == count:
            params[name] = value[species]
    # no species count: no value is per species any more, and none may be taken for one
    return PairLengths(system.potential, params, species, system.n, 0)


@compiled
def _search_inputs(system: System) -> tuple[jax.Array | None, PairLengths, jax.Array]:
    """Return what a search of neighbors needs: the cell, the function (i, j) -> l_ij, the range."""
    return system.box, pair_lengths(system), system.range


@compiled
def _search_inputs_and_completeness(
    system: System,
) -> tuple[tuple[jax.Array | None, PairLengths, jax.Array], jax.Array]:
    """Return what a search of neighbors needs, and whether the present list is still complete.

    Both are in one function, so that one program is compiled for them.
    """
    inputs = _search_inputs(system)
    box, lengths, range_ = inputs
    return inputs, neighbors.serves(system.neighbors, system.positions, box, lengths, range_)


def listed(
    system: System, positions: jax.Array | None = None, **how: Any
) -> tuple[Neighbors, jax.Array]:
    """Update the neighbor list of a system; return the list and whether it was rebuilt.

    This function can be traced by jax.

    Args:
      positions: (n, d) positions at which the list must be complete; those of the system where
        None.
      how: options of :func:`mdsens.model.neighbors.update`. An option that is given is an argument
        of the compiled code; the default of any other option is a constant in this code.
    """
    positions = system.positions if positions is None else positions
    return neighbors.update(
        system.neighbors, positions, system.box, pair_lengths(system), system.range, **how
    )


def _as_params(params: Params, dtype: np.dtype, trees: Sequence[str]) -> dict[str, Any]:
    """Convert parameters that a user gives to arrays of real numbers, or to trees of them.

    Args:
      params: the parameters by name.
      dtype: type of the arrays.
      trees: names of the parameters that may be trees. A list for any other is an array; a dict for
        any other becomes a tree here, which ``check_params`` refuses.
    """
    if not isinstance(params, Mapping):
        raise InputError(
            f"`params` is a {type(params).__name__}: give a dict of parameter names and values."
        )
    return {name: _as_parameter(name, v, dtype, name in trees) for name, v in params.items()}


def _as_parameter(name: str, value: object, dtype: np.dtype, may_be_tree: bool) -> Any:
    """Convert the value that a user gives a parameter to an array, or to a tree of arrays."""
    if _is_tree(value, may_be_tree):
        return _as_tree(name, value, dtype)
    return jnp.asarray(real_array(f"parameter {name}", value), dtype)


def _is_tree(value: object, lists: bool) -> bool:
    """Return whether the value that a user gives a parameter is a tree of arrays, not one array.

    A list or tuple of numbers, nested or not, is an array. One of arrays, dicts or None is a tree
    where ``lists`` is True, and otherwise an array, of the rows that it holds.
    """
    if value is None or is_leaf(value):
        return False
    if not isinstance(value, list | tuple):
        return True
    # a named tuple is a record, also where its fields are numbers
    return lists and not (type(value) in (list, tuple) and _holds_numbers_alone(value))


def _holds_numbers_alone(value: object) -> bool:
    """Return whether nested lists and tuples hold nothing but numbers, or what is none by mistake.

    A text, for example, is a mistake that the conversion to an array reports.
    """
    if isinstance(value, list | tuple):
        return all(map(_holds_numbers_alone, value))
    return is_leaf(value) and getattr(value, "ndim", 0) == 0


def _as_tree(name: str, value: PyTree, dtype: np.dtype) -> Any:
    """Convert a tree that a user gives a parameter to a tree of arrays of floating-point numbers.

    Raises:
      InputError: a leaf is of another kind; the message has its path.
    """
    try:
        structure = jax.tree.structure(value)
    except (TypeError, ValueError) as error:  # keys of a dict that have no order
        raise InputError(
            f"parameter {name} is no tree of jax ({error}): give each dict keys of one kind, such"
            " as texts."
        ) from error
    need = "keep arrays of floating-point numbers alone in the tree, and close over the rest."
    leaves = []
    for label, leaf in named_leaves({name: value}):
        array = real_array(f"parameter {label}", leaf, need)
        # an integer is a setting, such as a number of layers, and would come back as a float
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise InputError(f"parameter {label} is {short(leaf)}, of type {array.dtype}: {need}")
        leaves.append(jnp.asarray(array, dtype))
    return structure.unflatten(leaves)


def _species_count(kinds: np.ndarray, params: Params) -> int:
    """Return the number of species S.

    S is the largest species number plus 1, or more where a parameter has values for more species
    than have particles.
    """
    least = int(kinds.max()) + 1 if kinds.size else 0
    # a vector with n values is taken to have one per particle, and does not tell S
    # nor do the leaves of a tree
    arrays = [v for v in arrays_of(params).values() if np.ndim(v) in (1, 2)]
    lengths = {np.shape(v)[0] for v in arrays} - {kinds.shape[0]}
    longer = [m for m in lengths if m >= least]
    return min(longer) if longer else least


@compiled
def diameters_at(system: System, params: Params) -> jax.Array | None:
    """Return the diameter of each particle, (n,), which is the parameter ``sigma`` in ``params``.

    If sigma is a matrix of species pairs, its diagonal has the diameters of the species. The result
    is None without a sigma, and for a sigma of any other shape.
    """
    sigma = params.get("sigma")
    if sigma is None or not is_leaf(sigma):  # a tree of this name holds no diameters
        return None
    if sigma.ndim == 2:
        # jnp.diagonal traces sixty operations
        kinds = np.arange(sigma.shape[0])
        sigma = sigma[kinds, kinds]
    if sigma.ndim == 0:
        return jnp.broadcast_to(sigma, (system.n,))
    # first per species, as in `of_pairs`: it matters where there are as many species as particles
    if system.species is not None and sigma.shape[0] == system.species_count:
        return sigma[system.species]
    return sigma if sigma.shape[0] == system.n else None


@compiled
def _periodic_volume(system: System) -> jax.Array:
    """Compute the volume that the periodic cell vectors span; inf for open boundaries."""
    box = system.box
    if box is None:
        return jnp.asarray(jnp.inf)
    # Open sides have length one. abs(), since the cell vectors may be left-handed.
    return jnp.abs(jnp.linalg.det(box))


@compiled
def box_at(system: System, params: Params) -> jax.Array | None:
    """Compute the cell matrix (d, d) at the parameters ``params``; None for open boundaries."""
    # no other rule for the cell takes the diameters
    follows = isinstance(system.boundary, PackingFraction)
    diameters = diameters_at(system, params) if follows else None
    return system.boundary.matrix(params, diameters, system.dimension)


def pair_terms(system: System, params: Params | None = None) -> tuple[PairTerm, ...]:
    """Return the terms of a system's energy that are sums over pairs, each with its pairs."""
    return system.potential.terms(
        system.params if params is None else params,
        system.neighbors.pairs,
        system.n,
        system.species,
        system.species_count,
    )


@full_precision
def _deform(vectors: jax.Array, strain: jax.Array | None) -> jax.Array:
    """Deform vectors r (..., d) by a strain (d, d), to (1 + strain) r; None leaves r unchanged."""
    # transposed, since the vectors are rows
    return vectors if strain is None else vectors + vectors @ strain.T


def images_of(system: System, box: jax.Array | None) -> Images:
    """Return the function that maps vectors to their periodic images in a cell of the system.

    The cell is ``box``, which may be another one than the system's own, such as a deformed one.
    """
    return nearest_images(box, system.boundary.orthogonal, system.periodic)


def displacement_in(
    system: System, box: jax.Array | None, strain: jax.Array | None = None
) -> Callable[..., jax.Array]:
    """Return the function of two points a and b (…, d) that gives a - b between nearest images.

    ``box`` is the cell, and ``strain`` (d, d) deforms the vectors; None leaves them as they are.
    """

    # energies of jax-md may pass keywords to it, which have no meaning here
    def displacement(a: jax.Array, b: jax.Array, **_: Any) -> jax.Array:
        return _deform(nearest_image(a - b, box, system.periodic), strain)

    return displacement


def pair_distances(
    system: System,
    term: PairTerm,
    positions: jax.Array,
    box: jax.Array | None,
    strain: jax.Array | None = None,
) -> jax.Array:
    """Compute the distance of each pair in a term of the energy; 1 where a place holds no pair.

    The vector between the two particles is that between the images that the term means, in the
    undeformed cell; ``strain`` (d, d) then deforms this vector.
    """
    apart = positions[term.i] - positions[term.j]
    vectors = _deform(nearest_image(apart, box, system.periodic, term.images), strain)
    squared = jnp.sum(vectors**2, axis=-1)
    # sqrt(0) on padding would make NaN derivatives
    return jnp.sqrt(jnp.where(term.mask, squared, 1.0))


def neighbor_vectors(
    system: System,
    positions: jax.Array,
    box: jax.Array | None,
    strain: jax.Array | None = None,
    listed: Pairs | None = None,
) -> Components:
    """Compute the vectors from each particle to its neighbors in the list.

    They are given by their components, each (capacity, n). The vectors are those in the cell
    ``box``, deformed by ``strain`` (d, d).

    Args:
      listed: the places (capacity, c) of the list for c of the particles; None for all.
    """
    places = system.neighbors.columns if listed is None else listed
    images = images_of(system, box)
    vectors = vectors_to_neighbors(places, components(positions), system.n, images)
    if strain is None:
        return vectors
    return tuple(
        v + sum(strain[a, b] * w for b, w in enumerate(vectors)) for a, v in enumerate(vectors)
    )


def atom_energies(
    system: System,
    part: LocalPotential,
    positions: jax.Array,
    params: Params,
    box: jax.Array | None,
    strain: jax.Array | None = None,
) -> jax.Array:
    """Compute the energy of each atom, (n,), by a potential of its surroundings.

    Args:
      system: gives the neighbor list and the species.
      part: the potential, or the part of it that is a sum over atoms.
      positions, params, box, strain: as in :func:`energy_of`.
    """
    n = system.n

    def of_some(listed: Pairs) -> jax.Array:
        vectors = neighbor_vectors(system, positions, box, strain, listed)
        return part.energies(params, listed, vectors, n, system.species, system.species_count)

    return over_atoms(of_some, system.neighbors.columns, n)


def crossing_terms(system: System, params: Params | None = None) -> tuple[PairTerm, ...]:
    """Return terms whose lengths are the distances where a derivative of the energy jumps.

    Each has the pairs of the neighbor list, every pair once.
    """
    return system.potential.crossing_terms(
        system.params if params is None else params,
        system.neighbors.pairs,
        system.n,
        system.species,
        system.species_count,
    )


def potential_energy(
    system: System,
    positions: jax.Array | None = None,
    params: Params | None = None,
    strain: jax.Array | None = None,
) -> jax.Array:
    """Compute the potential energy U of a system at given positions, parameters and strain.

    Args:
      system: the system, whose neighbor list must contain all pairs that interact at ``positions``.
      positions: (n, d); those of the system where None.
      params: the parameters, which also determine the box; those of the system where None.
      strain: (d, d) symmetric; every vector r between particles becomes (1 + strain) r.
    """
    positions = system.positions if positions is None else positions
    params = system.params if params is None else params
    box = box_at(system, params)
    of_terms = energy_of(system, pair_terms(system, params), positions, params, box, strain)
    return of_terms + neighbor_energy(system, positions, params, box, strain)


@compiled
def _potential_energy(system: System) -> jax.Array:
    return potential_energy(system)


def energy_number(system: System) -> float:
    """Return the potential energy of a system as a number, by one compiled program.

    The function does not work inside ``jax.jit``.
    """
    return float(_potential_energy(system))


def energy_of(
    system: System,
    terms: Iterable[PairTerm],
    positions: jax.Array,
    params: Params,
    box: jax.Array | None,
    strain: jax.Array | None = None,
) -> jax.Array:
    """Compute a part of the energy of a system: given pair terms plus the many-body energy.

    The energy of all neighbors of an atom, :func:`neighbor_energy`, is not included.
    """
    total = jnp.zeros((), positions.dtype)
    for term in terms:
        distances = pair_distances(system, term, positions, box, strain)
        total = total + jnp.sum(term.energy(distances))
    displacement = displacement_in(system, box, strain)
    return total + system.potential.many_body(
        positions, params, displacement, system.species, system.species_count
    )


def neighbor_energy(
    system: System,
    positions: jax.Array,
    params: Params,
    box: jax.Array | None,
    strain: jax.Array | None = None,
) -> jax.Array:
    """Compute the energy of a system that is a function of all neighbors of an atom.

    The arguments are those of :func:`energy_of`.
    """
    total = jnp.zeros((), positions.dtype)
    for part in parts_of_neighbors(system.potential):
        if isinstance(part, LocalPotential):
            total = total + jnp.sum(atom_energies(system, part, positions, params, box, strain))
        elif isinstance(part, EdgePotential):
            vectors = neighbor_vectors(system, positions, box, strain)
            total = total + part.energy_of_edges(
                params, system.neighbors.columns, vectors, system.species, system.species_count
            )
    return total


def _check_coincident(system: System) -> None:
    """Raise InputError if two interacting particles are at the same point."""
    for r, i, j in _nearest_pairs(system):
        if float(r) == 0.0:
            raise InputError(
                f"positions[{i}] and positions[{j}] are the same point"
                f"{'' if system.box is None else ', up to cell vectors'}: move one of them."
            )


@compiled
def _nearest_pairs(system: System) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """Find the nearest pair in each pair term of the energy, as (distance, index i, index j)."""
    nearest = []
    for term in crossing_terms(system):
        if term.i.shape[0]:  # argmin of nothing raises
            distances = pair_distances(system, term, system.positions, system.box)
            r = jnp.where(term.mask, distances, jnp.inf)
            k = jnp.argmin(r)
            nearest.append((r[k], term.i[k], term.j[k]))
    return nearest
