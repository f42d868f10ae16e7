"""The classes of interaction potentials: pair, bonded and many-body potentials, and their sums.

A potential is an immutable object with named, checked parameters. Two potentials with the same
content are equal, so that the code for a system that is built twice is compiled once. The
ready-made potentials are in :mod:`mdsens.potentials.catalogue`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mdsens._util.compilation import compiled
from mdsens._util.errors import InputError, short
from mdsens._util.lattice import Components, Images, components, nearest_image
from mdsens._util.portable import Portable
from mdsens._util.pytree import named_leaves, require_array
from mdsens._util.user_functions import Traceable
from mdsens.potentials.pair_trial import Few, Trial, check_end, check_trial, trial_of
from mdsens.potentials.parameters import (
    Mixing,
    arithmetic,
    check_finite,
    check_leaf_names,
    check_names,
    check_pair_shape,
    checked_names,
    of_pairs,
)

__all__ = [
    "BondedPotential",
    "EnergyPotential",
    "FixedLengths",
    "Pairs",
    "Potential",
    "PairPotential",
    "PairTerm",
    "SumPotential",
    "check_params",
    "no_breakpoints",
]

# What to do with a parameter that is a tree and may not be one.
_TREES = (
    "give an array, or a potential by from_edges, from_local or from_energy, whose function gets"
    " the tree as it is."
)
Params = Mapping[str, Any]
Phi = Callable[..., jax.Array]
Displacement = Callable[[jax.Array, jax.Array], jax.Array]


class Pairs(NamedTuple):
    """Pairs of particles, or places in a neighbor list.

    Attributes:
      i, j: indices of the two particles, two arrays that broadcast together; n, the number of
        particles, in places that hold no pair.
      images: (…, d) integers t, the image of particle j that is meant: the vector from i to it is
        R_j - R_i + box @ t, with the positions R as they are stored; None where each pair is that
        of nearest images.
    """

    i: jax.Array
    j: jax.Array
    images: jax.Array | None = None


class PairTerm(NamedTuple):
    """The pairs over which a potential sums its pair energy phi(r, *values), r the distance.

    For a plain list of m pairs, the arrays have the shape (m,). For a neighbor list with up to
    ``capacity`` neighbors of each of n particles, i has the shape (1, n) and the other arrays have
    the shape (capacity, n); every pair is then there twice.

    Attributes:
      i, j: indices of the two particles of each pair.
      mask: True for a pair, False for a place of the arrays that holds no pair (padding).
      phi: the pair energy, an elementwise function.
      values: the parameters of phi, each an array with a value for each pair, or a scalar.
      breakpoints: function of the values that returns the distances where a derivative of phi jumps
        or diverges.
      images: the image of particle j that each pair means, as in :class:`Pairs`; None for the
        nearest one.
    """

    i: jax.Array
    j: jax.Array
    mask: jax.Array
    phi: Phi
    values: tuple[jax.Array, ...]
    breakpoints: Callable[..., tuple[jax.Array, ...]]
    images: jax.Array | None = None

    @property
    def shifts(self) -> Components | None:
        """The d components of ``images``; None where the pairs are those of nearest images."""
        return None if self.images is None else components(self.images)

    def vectors(self, x: Components, images: Images) -> Components:
        """Compute the vector R_i - R_j of each pair, from i's image of particle j to particle i.

        Args:
          x: the d components of the positions R, each (n,).
          images: function that maps vectors to their periodic images.
        """
        return images(tuple(c[self.i] - c[self.j] for c in x), self.shifts)

    def rows(self, k: int | jax.Array) -> PairTerm:
        """Return the pairs of one chunk of a neighbor list that is divided into chunks.

        The arrays have the shape (chunks, rows, n) with n particles; ``k`` is the chunk's number.
        """
        # A scalar parameter serves all chunks, as does i, the particle of each column.
        values = tuple(v[k] if v.ndim == 3 else v for v in self.values)
        images = None if self.images is None else self.images[k]
        return self._replace(j=self.j[k], mask=self.mask[k], values=values, images=images)

    def energy(self, r: jax.Array) -> jax.Array:
        """Compute the energy of each pair at the distances r; zero where a place holds no pair."""
        # On padding phi and its derivatives must be finite, too (pair_distances gives r = 1 there):
        # where() multiplies them by zero, and zero times NaN is NaN.
        return jnp.where(self.mask, self.phi(r, *self.values), 0.0)

    def lengths(self) -> jax.Array:
        """Compute the k distances at which a derivative of a pair's energy jumps or diverges.

        The shape is (k, m) for m pairs.
        """
        points = [jnp.broadcast_to(b, self.mask.shape) for b in self.breakpoints(*self.values)]
        return jnp.stack(points) if points else jnp.zeros((0, *self.mask.shape))


class Potential(Protocol):
    """The properties and methods that a :class:`~mdsens.System` needs of its potential.

    ``range`` returns the largest distance at which a pair interacts, ``lengths`` this distance for
    each pair, ``terms`` the energies that are sums over pairs, ``many_body`` the rest of the energy
    (zero where ``listed``), and ``specialize`` the cheapest form of the potential that has the same
    energy. Energies of all neighbors of an atom (``of_neighbors``) are in
    :mod:`mdsens.potentials.local`. ``crossing_terms`` returns the terms whose ``lengths`` are the
    distances where a derivative of the energy jumps. ``check`` raises InputError if the parameters
    do not fit the potential. ``tree_parameters`` are the names of those parameters that may be
    trees of arrays; all others are arrays.
    """

    @property
    def name(self) -> str: ...
    @property
    def parameters(self) -> tuple[str, ...]: ...
    @property
    def pair_parameters(self) -> tuple[str, ...]: ...
    @property
    def tree_parameters(self) -> tuple[str, ...]: ...
    @property
    def pairwise(self) -> bool: ...
    @property
    def repulsive(self) -> bool: ...
    @property
    def finite_force(self) -> bool: ...
    @property
    def of_neighbors(self) -> bool: ...
    @property
    def listed(self) -> bool: ...
    def range(self, params: Params) -> jax.Array: ...
    def lengths(
        self, params: Params, pairs: Pairs, n: int, species: jax.Array | None, species_count: int
    ) -> jax.Array | float: ...
    def terms(
        self, params: Params, pairs: Pairs, n: int, species: jax.Array | None, species_count: int
    ) -> tuple[PairTerm, ...]: ...
    def crossing_terms(
        self, params: Params, pairs: Pairs, n: int, species: jax.Array | None, species_count: int
    ) -> tuple[PairTerm, ...]: ...
    def many_body(
        self,
        positions: jax.Array,
        params: Params,
        displacement: Displacement,
        species: jax.Array | None,
        species_count: int,
    ) -> jax.Array: ...
    def specialize(self, params: Params, differentiated: Sequence[str] = ()) -> Self: ...
    def check(self, params: Params, n: int, species_count: int) -> None: ...


class _Addable:
    """Base class of the potentials, which can be added with the operator +."""

    def __add__(self, other: object) -> SumPotential:
        if not isinstance(other, _Addable):
            return NotImplemented
        return SumPotential(_flatten(self) + _flatten(other))


def _flatten(potential: _Addable) -> tuple[Any, ...]:
    """Return the single potentials of a sum, or a potential that is no sum in a tuple of one."""
    return potential.parts if isinstance(potential, SumPotential) else (potential,)


def _check_renaming(potential: NamedPotential, names: Mapping[str, str]) -> None:
    """Raise InputError where new names of a potential's parameters cannot be used."""
    for name in names:
        if name not in potential.names:
            raise InputError(
                f"{potential.name} has no parameter {name!r} to rename: its parameters are"
                f" {', '.join(potential.names)}."
            )
    renamed = checked_names([names.get(n, n) for n in potential.names])
    for k, name in enumerate(renamed):
        if name in renamed[:k]:
            raise InputError(
                f"two parameters of {potential.name} would be named {name!r}: give each a name of"
                " its own."
            )


class NamedPotential(_Addable):
    """Base class of the potentials with named parameters.

    The energy of this class is zero; subclasses override the methods that return terms of the
    energy.
    """

    name: str
    names: tuple[str, ...]

    # True for potentials without attraction alone, see PairPotential
    repulsive = False
    # True for potentials whose force is finite at every distance alone, see PairPotential
    finite_force = False

    @property
    def parameters(self) -> tuple[str, ...]:
        return self.names

    @property
    def pair_parameters(self) -> tuple[str, ...]:
        """Names of the parameters that have a value for each pair of particles.

        Such a parameter may be given as a symmetric matrix of species pairs.
        """
        return ()

    @property
    def tree_parameters(self) -> tuple[str, ...]:
        """Names of the parameters that a user's function gets as they are, arrays or trees."""
        return ()

    @property
    def pairwise(self) -> bool:
        """Whether the energy is a sum over pairs, ``terms`` alone."""
        return True

    @property
    def of_neighbors(self) -> bool:
        """Whether a part of the energy is a function of all neighbors of an atom together."""
        return False

    @property
    def listed(self) -> bool:
        """Whether the energy only depends on pairs of the neighbor list and on bonds."""
        return self.pairwise or self.of_neighbors

    def renamed(self, names: Mapping[str, str]) -> Self:
        """Return the potential with some parameters renamed.

        Potentials that are added may need this, since each parameter name may occur only once.

        Args:
          names: dict from the present to the new names.

        Raises:
          InputError: a name is none of the potential's, or two parameters would have one name.
        """
        _check_renaming(self, names)
        record: Any = self
        return dataclasses.replace(record, names=tuple(names.get(n, n) for n in self.names))

    def range(self, params: Params) -> jax.Array:
        return jnp.zeros(())

    def lengths(
        self, params: Params, pairs: Pairs, n: int, species: jax.Array | None, species_count: int
    ) -> jax.Array | float:
        return 0.0

    def terms(
        self, params: Params, pairs: Pairs, n: int, species: jax.Array | None, species_count: int
    ) -> tuple[PairTerm, ...]:
        return ()

    def crossing_terms(
        self, params: Params, pairs: Pairs, n: int, species: jax.Array | None, species_count: int
    ) -> tuple[PairTerm, ...]:
        """Return terms whose ``lengths`` are the breakpoints: the pair terms, unless overridden."""
        return self.terms(params, pairs, n, species, species_count)

    def many_body(
        self,
        positions: jax.Array,
        params: Params,
        displacement: Displacement,
        species: jax.Array | None,
        species_count: int,
    ) -> jax.Array:
        return jnp.zeros((), positions.dtype)

    def check_at(
        self,
        positions: jax.Array,
        box: Callable[[], jax.Array | None],
        params: Params,
        species: jax.Array | None,
        species_count: int,
    ) -> None:
        """Raise InputError if the energy of the potential is not defined at a configuration.

        The function ``box`` returns the cell (d, d), or None for open boundaries. This method
        cannot run in compiled code.
        """

    def specialize(self, params: Params, differentiated: Sequence[str] = ()) -> Self:
        """Return the cheapest form of the potential with the same energy at these parameters.

        The energy is the same at all positions. Derivatives by the parameters in ``differentiated``
        are right; derivatives by other parameters may be wrong.
        """
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairPotential(Portable, NamedPotential):
    """A pair potential, U = sum over pairs of phi(r_ij, p_ij).

    r_ij is the distance of two particles, and p_ij are the parameters of the pair. phi is zero at
    and beyond a finite cutoff, or has infinite range.

    Attributes:
      name: name of the potential in messages and tables.
      phi: the pair energy ``phi(r, *pair_parameters)``, an elementwise function.
      names: the parameters' names, in phi's order.
      cutoff: a length, or a function of the pair parameters, monotone in each; None for infinite
        range.
      breakpoints: function of the pair parameters that returns the distances where a derivative of
        phi jumps or diverges.
      mixing: for each parameter the function that computes a pair's value from the two particles'
        values; the pair's value must lie between the two.
      above: for each parameter the value that it must exceed; -inf if any value is allowed.
      repulsive: True if phi only repels and vanishes beyond contact; rattlers are then determined
        from contacts.
      finite_force: True if the force is finite at every distance, so that no start is too violent
        for a minimizer.
      cases: cheaper forms of phi, such as a square in place of a power, each a tuple (form, name,
        value). The form is equal to phi where the parameter with this name has this value.
    """

    # All fields are static, part of the key of compiled code: each must have a hash and compare
    # equal to the same field of an equal potential.
    name: str = dataclasses.field(metadata={"static": True})
    phi: Phi = dataclasses.field(metadata={"static": True})
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    cutoff: float | Callable[..., Any] | None = dataclasses.field(metadata={"static": True})
    breakpoints: Callable[..., tuple[Any, ...]] = dataclasses.field(metadata={"static": True})
    mixing: tuple[Mixing, ...] = dataclasses.field(metadata={"static": True})
    above: tuple[float, ...] = dataclasses.field(metadata={"static": True})
    repulsive: bool = dataclasses.field(default=False, metadata={"static": True})
    finite_force: bool = dataclasses.field(default=False, metadata={"static": True})
    cases: tuple[tuple[Phi, str, float], ...] = dataclasses.field(
        default=(), metadata={"static": True}
    )

    @property
    def pair_parameters(self) -> tuple[str, ...]:
        return self.names

    def range(self, params: Params) -> jax.Array:
        """Return the largest distance at which any pair can interact; inf without a cutoff.

        The cutoff is monotone in each parameter, and a pair's parameter lies between the values of
        the two particles. The largest cutoff is therefore that of some combination of the smallest
        and largest values of the parameters.
        """
        if self.cutoff is None:
            return jnp.asarray(jnp.inf)
        if not callable(self.cutoff):
            return jnp.asarray(float(self.cutoff))
        extremes = []
        for name in self.names:
            value = params[name]
            extremes.append((value,) if np.ndim(value) == 0 else (jnp.min(value), jnp.max(value)))
        corners = itertools.product(*extremes)
        return jnp.max(jnp.stack([jnp.asarray(self._cutoff_at(*corner)) for corner in corners]))

    def _cutoff_at(self, *values: Any) -> Any:
        """Compute the cutoff distance of a pair from the parameters of the pair."""
        # for the type checker: every caller has handled a cutoff that is None or a number
        assert callable(self.cutoff)
        return Traceable(f"the cutoff of {self.name}", self.cutoff)(*values)

    def lengths(
        self, params: Params, pairs: Pairs, n: int, species: jax.Array | None, species_count: int
    ) -> jax.Array | float:
        """Return the distance beyond which each pair's energy is zero; inf without a cutoff."""
        if self.cutoff is None:
            return math.inf
        if not callable(self.cutoff):
            return float(self.cutoff)
        (term,) = self.terms(params, pairs, n, species, species_count)
        return jnp.asarray(self._cutoff_at(*term.values))

    def terms(
        self, params: Params, pairs: Pairs, n: int, species: jax.Array | None, species_count: int
    ) -> tuple[PairTerm, ...]:
        # on padding any index will do that exists; the mask leaves the result out
        i = jnp.where(pairs.i < n, pairs.i, 0)
        j = jnp.where(pairs.j < n, pairs.j, 0)
        mask = (pairs.i < n) & (pairs.j < n)
        values = []
        for name, mix in zip(self.names, self.mixing, strict=True):
            mixing = Traceable(f"the mixing of {name}", mix)
            value = jnp.asarray(params[name])
            values.append(of_pairs(value, i, j, species, species_count, mixing))
        points = Traceable(f"the function of breakpoints of {self.name}", self.breakpoints)
        phi = self._traceable_phi()
        return (PairTerm(i, j, mask, phi, tuple(values), points, pairs.images),)

    def renamed(self, names: Mapping[str, str]) -> Self:
        record = super().renamed(names)
        # each case names the parameter on which it depends
        cases = tuple((phi, names.get(name, name), value) for phi, name, value in self.cases)
        return dataclasses.replace(record, cases=cases)

    def specialize(self, params: Params, differentiated: Sequence[str] = ()) -> PairPotential:
        for phi, name, value in self.cases:
            actual = params[name]
            # a traced parameter has no value to compare
            if (
                name not in differentiated
                and not isinstance(actual, Tracer)
                and np.all(np.asarray(actual) == value)
            ):
                return dataclasses.replace(self, phi=phi)
        return self

    def check(self, params: Params, n: int, species_count: int) -> None:
        for name, mix, above in zip(self.names, self.mixing, self.above, strict=True):
            value = np.asarray(params[name], float)
            check_pair_shape(name, value, n, species_count)
            check_finite(name, value, above)
            # a plausible mistake: a cutoff in multiples of sigma, as jax-md takes it
            if (
                name == "sigma"
                and isinstance(self.cutoff, float)
                and self.cutoff < value.max(initial=0.0)
            ):
                raise InputError(
                    f"`cutoff` of {self.name} is {self.cutoff:g}, below sigma = {value.max():g}:"
                    " cutoff and onset are lengths in the units of the positions, not multiples of"
                    " sigma; give a larger cutoff and onset."
                )
            # the range and the neighbor list rest on mixing that stays between the extremes
            if value.ndim == 1 and mix is not arithmetic:
                low = value.min()
                high = value.max()
                mixed = float(mix(jnp.asarray(low), jnp.asarray(high)))
                # 1e-6: allowance for round-off, in single precision too
                if not low * (1 - 1e-6) <= mixed <= high * (1 + 1e-6):
                    raise InputError(
                        f"mixing of {name} gives {mixed} from {low} and {high}: the result must lie"
                        f" between the two values, or pairs could be lost; give {name} as a matrix"
                        " of species pairs instead."
                    )
        self._check_end(params)

    def _traceable_phi(self) -> Traceable:
        """Return the pair energy phi, wrapped so that errors in tracing it name the potential."""
        return Traceable(f"phi of {self.name}", self.phi)

    def _is_from_catalogue(self) -> bool:
        """Return whether the pair energy phi is one that mdsens provides.

        The package's tests examine these pair energies, so that they are not checked again.
        """
        phi = getattr(self.phi, "phi", self.phi)  # the phi inside of a `switched`
        return (getattr(phi, "__module__", None) or "").startswith("mdsens.")

    def _check_end(self, params: Params) -> None:
        """Raise InputError if phi is not zero at its cutoff, or breakpoints are no tuple.

        phi, the pair energy, is evaluated once, with the median of each parameter.
        """
        if self._is_from_catalogue():
            return
        # a single evaluation, at the median of each parameter, however many pairs there are
        values = [jnp.asarray(np.median(np.asarray(params[name], float))) for name in self.names]
        points = Traceable(f"the function of breakpoints of {self.name}", self.breakpoints)(*values)
        # a bare array would be taken apart into numbers, one breakpoint for each pair
        if not isinstance(points, tuple | list):
            raise InputError(
                f"the function of breakpoints of {self.name} returns {short(points)}: return a"
                " tuple of distances, (b,) for a single one."
            )
        if self.cutoff is None:
            return
        end = float(self._cutoff_at(*values) if callable(self.cutoff) else self.cutoff)
        check_end(self.name, self._traceable_phi(), end, values)

    def check_at(
        self,
        positions: jax.Array,
        box: Callable[[], jax.Array | None],
        params: Params,
        species: jax.Array | None,
        species_count: int,
    ) -> None:
        if self._is_from_catalogue():
            return
        values = {name: params[name] for name in self.names}
        few = Few.of(positions, values, species, species_count)
        if few is not None:
            check_trial(self.name, self.names, _trial(self, box(), few, species_count))


# species_count is static, since of_pairs compares it with the shapes of the parameters.
@compiled(static_argnames="species_count")
def _trial(potential: PairPotential, box: jax.Array | None, few: Few, species_count: int) -> Trial:
    """Evaluate a pair energy and its derivatives at a few distances, for a few of the pairs."""
    n = few.positions.shape[0]
    i, j = few.pairs
    kinds = Pairs(i, j), n, few.species, species_count
    (term,) = potential.terms(few.params, *kinds)
    squared = jnp.sum(nearest_image(few.positions[i] - few.positions[j], box) ** 2, axis=-1)
    # two particles at the same point are refused elsewhere, by an error that names them
    apart = jnp.sqrt(jnp.where(squared > 0, squared, 1.0))
    ends = jnp.asarray(potential.lengths(few.params, *kinds), apart.dtype)
    ends = jnp.broadcast_to(ends, apart.shape)
    return trial_of(term.phi, f"phi of {potential.name}", apart, ends, term.lengths(), term.values)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)  # == of dataclasses fails on arrays: see __eq__
class BondedPotential(Portable, NamedPotential):
    """A potential of bonds, U = sum over listed bonds of phi(r_b, p_b).

    r_b is the length of bond b, and p_b are the parameters of the bond.

    Attributes:
      bonds: (m, 2) indices of the particles that each bond joins.
      name: name of the potential in messages and tables.
      phi: the energy of a bond ``phi(r, *parameters)``, an elementwise function.
      names: the parameters' names, in phi's order; each a scalar or one value per bond.
      above: for each parameter the value that it must exceed; -inf if any value is allowed.
    """

    # not static like the other fields, since an array has no hash
    bonds: Any
    name: str = dataclasses.field(metadata={"static": True})
    phi: Phi = dataclasses.field(metadata={"static": True})
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    above: tuple[float, ...] = dataclasses.field(metadata={"static": True})

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, BondedPotential)
            and (self.name, self.phi, self.names) == (other.name, other.phi, other.names)
            and self.above == other.above
            and np.array_equal(np.asarray(self.bonds), np.asarray(other.bonds))
        )

    def __hash__(self) -> int:
        # without the bonds: arrays have no hash, and equal records need equal hashes, no more
        return hash((self.name, self.phi, self.names))

    def terms(
        self, params: Params, pairs: Pairs, n: int, species: jax.Array | None, species_count: int
    ) -> tuple[PairTerm, ...]:
        bonds = jnp.asarray(self.bonds)
        values = tuple(jnp.asarray(params[name]) for name in self.names)
        # all bonds count, whatever the neighbor list holds
        mask = jnp.ones(bonds.shape[0], bool)
        return (PairTerm(bonds[:, 0], bonds[:, 1], mask, self.phi, values, no_breakpoints),)

    def check(self, params: Params, n: int, species_count: int) -> None:
        bonds = np.asarray(self.bonds)
        m = bonds.shape[0]
        if m and (bonds.min() < 0 or bonds.max() >= n):
            worst = bonds.max() if bonds.max() >= n else bonds.min()
            raise InputError(
                f"`bonds` names particle {worst}, but there are {n} particles: use indices 0 to"
                f" {n - 1}."
            )
        for name, above in zip(self.names, self.above, strict=True):
            value = np.asarray(params[name], float)
            if value.shape not in ((), (m,)):
                raise InputError(
                    f"parameter {name} has shape {value.shape}: give a scalar, or ({m},) for one"
                    " value per bond."
                )
            check_finite(name, value, above)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EnergyPotential(Portable, NamedPotential):
    """A potential whose energy is a user's function, U = fn(positions, params, displacement).

    fn gets the positions of all particles, a dict of the parameters (arrays, or trees of arrays),
    and a function ``displacement(a, b)`` that returns the vector a - b between nearest images of
    two points. It gets no neighbor list, so that the cost grows with the number of particles as the
    cost of fn does.

    Attributes:
      name: name of the potential in messages and tables.
      fn: function that returns the energy, a scalar.
      names: the parameters' names in the system.
      keys: the names of the same parameters in the ``params`` of fn, in the same order.
      shared: names of parameters that another potential in a sum has as well; both use one value.
    """

    name: str = dataclasses.field(metadata={"static": True})
    fn: Callable[..., jax.Array] = dataclasses.field(metadata={"static": True})
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    keys: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    shared: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def tree_parameters(self) -> tuple[str, ...]:
        return self.names

    @property
    def pairwise(self) -> bool:
        return False

    def many_body(
        self,
        positions: jax.Array,
        params: Params,
        displacement: Displacement,
        species: jax.Array | None,
        species_count: int,
    ) -> jax.Array:
        # names change by renamed(), keys do not
        values = {key: params[name] for key, name in zip(self.keys, self.names, strict=True)}
        return Traceable(f"the energy {self.name}", self.fn)(positions, values, displacement)

    def check_at(
        self,
        positions: jax.Array,
        box: Callable[[], jax.Array | None],
        params: Params,
        species: jax.Array | None,
        species_count: int,
    ) -> None:
        cell = box()

        def energy(positions: jax.Array, params: Params) -> jax.Array:
            # The energies of jax-md pass keyword arguments of their own on to this function.
            def displacement(a: jax.Array, b: jax.Array, **_: Any) -> jax.Array:
                return nearest_image(a - b, cell)

            return jnp.asarray(
                self.many_body(positions, params, displacement, species, species_count)
            )

        # shape and type alone: nothing is computed
        result = jax.eval_shape(energy, positions, {name: params[name] for name in self.names})
        if result.shape or not jnp.issubdtype(result.dtype, jnp.floating):
            raise InputError(
                f"the energy {self.name} returns {result.dtype} of shape {result.shape}: return one"
                " real number, the sum over all particles."
            )

    def check(self, params: Params, n: int, species_count: int) -> None:
        # their shapes are the user's: only fn knows which are right
        for name, value in named_leaves({name: params[name] for name in self.names}):
            check_finite(name, np.asarray(value, float), -math.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SumPotential(_Addable):
    """The sum of several potentials.

    A parameter name may occur in two potentials only if one of them declares the parameter as
    shared.
    """

    parts: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not all(hasattr(potential, "parameters") for potential in self.parts):
            return  # jax rebuilds a pytree with placeholders in place of its parts
        owners: dict[str, Any] = {}
        for potential in self.parts:
            for name in potential.parameters:
                if name not in owners:
                    owners[name] = potential
                    continue
                owner = owners[name]
                shared = {*getattr(potential, "shared", ()), *getattr(owner, "shared", ())}
                if name not in shared:
                    raise InputError(
                        f"{owner.name} and {potential.name} both have a parameter {name!r}: rename"
                        f' one, potential.renamed({{"{name}": "{name}_2"}}).'
                    )

    @property
    def name(self) -> str:
        return " + ".join(potential.name for potential in self.parts)

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(
            dict.fromkeys(name for potential in self.parts for name in potential.parameters)
        )

    @property
    def pair_parameters(self) -> tuple[str, ...]:
        return tuple(
            dict.fromkeys(name for potential in self.parts for name in potential.pair_parameters)
        )

    @property
    def tree_parameters(self) -> tuple[str, ...]:
        # a parameter that two share is a tree only where either takes trees
        return tuple(
            name
            for name in self.parameters
            if all(name in p.tree_parameters for p in self.parts if name in p.parameters)
        )

    @property
    def pairwise(self) -> bool:
        return all(potential.pairwise for potential in self.parts)

    @property
    def repulsive(self) -> bool:
        return all(potential.repulsive for potential in self.parts)

    @property
    def finite_force(self) -> bool:
        return all(potential.finite_force for potential in self.parts)

    @property
    def of_neighbors(self) -> bool:
        return any(potential.of_neighbors for potential in self.parts)

    @property
    def listed(self) -> bool:
        return all(potential.listed for potential in self.parts)

    def range(self, params: Params) -> jax.Array:
        return jnp.max(jnp.stack([potential.range(params) for potential in self.parts]))

    def lengths(
        self, params: Params, pairs: Pairs, n: int, species: jax.Array | None, species_count: int
    ) -> jax.Array | float:
        longest = jnp.zeros(())
        for potential in self.parts:
            lengths = potential.lengths(params, pairs, n, species, species_count)
            longest = jnp.maximum(longest, lengths)
        return longest

    def terms(
        self, params: Params, pairs: Pairs, n: int, species: jax.Array | None, species_count: int
    ) -> tuple[PairTerm, ...]:
        return tuple(
            term
            for potential in self.parts
            for term in potential.terms(params, pairs, n, species, species_count)
        )

    def crossing_terms(
        self, params: Params, pairs: Pairs, n: int, species: jax.Array | None, species_count: int
    ) -> tuple[PairTerm, ...]:
        return tuple(
            term
            for potential in self.parts
            for term in potential.crossing_terms(params, pairs, n, species, species_count)
        )

    def many_body(
        self,
        positions: jax.Array,
        params: Params,
        displacement: Displacement,
        species: jax.Array | None,
        species_count: int,
    ) -> jax.Array:
        total = jnp.zeros((), positions.dtype)
        for potential in self.parts:
            total = total + potential.many_body(
                positions, params, displacement, species, species_count
            )
        return total

    def specialize(self, params: Params, differentiated: Sequence[str] = ()) -> SumPotential:
        return SumPotential(
            tuple(potential.specialize(params, differentiated) for potential in self.parts)
        )

    def check(self, params: Params, n: int, species_count: int) -> None:
        for potential in self.parts:
            potential.check(params, n, species_count)

    def check_at(
        self,
        positions: jax.Array,
        box: Callable[[], jax.Array | None],
        params: Params,
        species: jax.Array | None,
        species_count: int,
    ) -> None:
        for potential in self.parts:
            # The protocol Potential does not ask for check_at: SmoothedPotential has none.
            if hasattr(potential, "check_at"):
                potential.check_at(positions, box, params, species, species_count)


def check_params(potential: Potential, params: Params, n: int, species_count: int) -> None:
    """Raise InputError if names, shapes or values of the parameters do not fit the potential.

    This function cannot run in compiled code.
    """
    check_names(params, potential.parameters, potential.name)
    for name in potential.parameters:
        if name not in potential.tree_parameters:
            require_array(name, params[name], potential.name, _TREES)
    check_leaf_names(params)
    potential.check(params, n, species_count)


def no_breakpoints(*values: Any) -> tuple[Any, ...]:
    """Return an empty tuple: there is no distance at which a derivative of the potential jumps.

    Smooth potentials have this function as their attribute ``breakpoints``.
    """
    return ()


@dataclasses.dataclass(frozen=True)
class FixedLengths:
    """Distances where a derivative of a pair potential jumps or diverges, the same for all pairs.

    The distances do not depend on the parameters.
    """

    # A record and not a closure, so that equal breakpoints make equal potentials.
    lengths: tuple[float, ...]

    def __call__(self, *values: Any) -> tuple[Any, ...]:
        return tuple(jnp.asarray(b) for b in self.lengths)
