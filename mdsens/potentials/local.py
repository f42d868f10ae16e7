"""Potentials of an atom's surroundings, U = sum_i e_i, and energies of a graph of neighbors.

e_i is the energy of atom i, a function of the vectors to its neighbors within a cutoff: bond-order
and embedded-atom potentials are of this form. The energies of all atoms are computed at once, by
``jax.vmap`` of the function of one atom. The other potential of this module is one function of all
neighbors at once, such as a message-passing neural network.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.compilation import compiled
from mdsens._util.errors import InputError
from mdsens._util.lattice import Components
from mdsens._util.portable import Portable
from mdsens._util.pytree import named_leaves
from mdsens._util.user_functions import Traceable
from mdsens._util.validation import short
from mdsens.potentials.base import FixedLengths, NamedPotential, Pairs, PairTerm, Params
from mdsens.potentials.parameters import (
    check_finite,
    checked_cutoff,
    checked_lengths,
    checked_names,
)

__all__ = [
    "Edges",
    "EdgePotential",
    "Embedded",
    "EmbeddedForm",
    "LocalPotential",
    "from_edges",
    "from_local",
    "kinds_of",
    "parts_of_neighbors",
]

Species: TypeAlias = jax.Array | None
# Shapes of a parameter with values for pairs or triples of species: its number of axes.
AXES = {"pair": 2, "triple": 3}


class Edges(NamedTuple):
    """The neighbors of all atoms, as a list of m directed edges from atom i to its neighbor j.

    Each pair within the cutoff is there twice, once from either atom.

    Attributes:
      i, j: (m,) indices of the two atoms; 0 in places that hold no edge.
      images: (m, d) integers t, the image of atom j that is meant: the vector is R_j - R_i +
        box @ t with the positions R as they are stored; None where each pair is that of nearest
        images.
      vectors: (m, d) the vector from atom i to its neighbor j.
      mask: (m,) True where a place holds an edge, of length below the cutoff. In other places the
        vector is a harmless one, of half the cutoff.
      species: (n,) species of the n atoms, integers from 0.
    """

    i: jax.Array
    j: jax.Array
    images: jax.Array | None
    vectors: jax.Array
    mask: jax.Array
    species: jax.Array


class EmbeddedForm(Protocol):
    """The functions that an embedded atom's energy is made of, methods of a frozen record.

    It must be hashable, and equal to another record of the same form, as a frozen dataclass is.
    """

    def tables(self, params: dict[str, jax.Array]) -> Any:
        """Return what the other two functions need, computed from the parameters once."""
        ...

    def pairs(
        self, r: jax.Array, species_i: jax.Array, species_j: jax.Array, tables: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Return p and f at distances r, elementwise in arrays that broadcast."""
        ...

    def embed(self, rho: jax.Array, species_i: jax.Array, tables: Any) -> jax.Array:
        """Return F of one atom with the density rho."""
        ...


@dataclasses.dataclass(frozen=True)
class Embedded:
    """The energy of an atom whose neighbors count by their distances alone, in two sums.

        e_i = sum_j p(r_ij) + F(rho_i),     rho_i = sum_j f(r_ij)

    It is a function of one atom for :func:`from_local`, whose forces are computed by two sums over
    the neighbors, like those of a pair potential.

    Attributes:
      form: the functions p, f and F.
    """

    form: EmbeddedForm

    def __call__(
        self,
        vectors: jax.Array,
        mask: jax.Array,
        species_i: jax.Array,
        species_j: jax.Array,
        params: dict[str, jax.Array],
    ) -> jax.Array:
        r = jnp.sqrt(jnp.sum(vectors * vectors, axis=-1))
        tables = self.form.tables(params)
        pair, density = self.form.pairs(r, species_i, species_j, tables)
        rho = jnp.sum(jnp.where(mask, density, 0.0))
        return jnp.sum(jnp.where(mask, pair, 0.0)) + self.form.embed(rho, species_i, tables)


def no_energy(r: jax.Array) -> jax.Array:
    """Return zero: the pair energy of a term that only marks distances, see ``crossing_terms``."""
    return jnp.zeros_like(r)


@dataclasses.dataclass(frozen=True)
class NeighborPotential(Portable, NamedPotential):
    """Base class of the potentials whose energy is a function of the vectors to all neighbors.

    Attributes:
      name: name of the potential in messages and tables.
      fn: the energy function of the user.
      names: the parameters' names in the system.
      keys: the names of the same parameters in the ``params`` of fn, in the same order.
      cutoff: the distance beyond which atoms do not interact, a length, or a function of the
        parameters that returns a length, or a matrix (S, S) of a length for each pair of species.
      breakpoints: function of the parameters that returns the distances where a derivative of the
        energy jumps or diverges, each a length or a matrix (S, S).
      axes: for each parameter 2 for one value per pair of species, (S, S), 3 for one per triple of
        species, (S, S, S), 0 for any shape. Where a pair or a triple has a value, one value may
        also stand for all.
      above: for each parameter the value that it must exceed; -inf if any value is allowed.
      elements: the chemical symbols of species 0, 1, …, as of a potential from a file; empty where
        species may be any elements.
    """

    name: str = dataclasses.field(metadata={"static": True})
    fn: Callable[..., jax.Array] = dataclasses.field(metadata={"static": True})
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    keys: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    cutoff: float | Callable[..., Any] = dataclasses.field(metadata={"static": True})
    breakpoints: Callable[..., tuple[Any, ...]] = dataclasses.field(metadata={"static": True})
    axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    above: tuple[float, ...] = dataclasses.field(metadata={"static": True})
    elements: tuple[str, ...] = dataclasses.field(
        default=(), compare=False, metadata={"static": True}
    )

    @property
    def tree_parameters(self) -> tuple[str, ...]:
        # the energies that come with mdsens take arrays alone; an embedded atom's is its form's
        owner = getattr(self.fn, "form", self.fn)
        if (getattr(owner, "__module__", None) or "").startswith("mdsens."):
            return ()
        return tuple(name for name, axes in zip(self.names, self.axes, strict=True) if not axes)

    @property
    def pairwise(self) -> bool:
        return False

    @property
    def of_neighbors(self) -> bool:
        return True

    def values(self, params: Params, species_count: int) -> dict[str, Any]:
        """Return the parameters as fn gets them: those of pairs and triples with all their axes."""
        count = max(species_count, 1)
        values = {}
        for key, name, axes in zip(self.keys, self.names, self.axes, strict=True):
            value = jax.tree.map(jnp.asarray, params[name])
            values[key] = jnp.broadcast_to(value, (count,) * axes) if axes else value
        return values

    def range(self, params: Params) -> jax.Array:
        """Return the largest distance at which two atoms interact."""
        if not callable(self.cutoff):
            return jnp.asarray(float(self.cutoff))
        # values for one species broadcast to those of any number of species
        return jnp.max(jnp.asarray(self._cutoff_at(params, 1)))

    def _cutoff_at(self, params: Params, species_count: int) -> Any:
        """Compute the cutoff from the parameters: a length, or one for each pair of species."""
        assert callable(self.cutoff)
        cutoff = Traceable(f"the cutoff of {self.name}", self.cutoff)
        return cutoff(self._of_any_count(params, species_count))

    def _of_any_count(self, params: Params, species_count: int) -> dict[str, Any]:
        """Return the parameters as fn gets them, where the number of species may be unknown.

        The number is then that of the parameters' values; 1 where all are single numbers.
        """
        sizes = [
            np.shape(params[n])[0]
            for n, a in zip(self.names, self.axes, strict=True)
            if a and np.ndim(params[n])
        ]
        return self.values(params, max([species_count, *sizes]))

    def lengths(
        self, params: Params, pairs: Pairs, n: int, species: Species, species_count: int
    ) -> jax.Array | float:
        if not callable(self.cutoff):
            return float(self.cutoff)
        return _of_species(self._cutoff_at(params, species_count), pairs, n, species)

    def crossing_terms(
        self, params: Params, pairs: Pairs, n: int, species: Species, species_count: int
    ) -> tuple[PairTerm, ...]:
        points = Traceable(f"the function of breakpoints of {self.name}", self.breakpoints)
        lengths = points(self._of_any_count(params, species_count))
        of_pairs = tuple(_of_species(jnp.asarray(b), pairs, n, species) for b in lengths)
        mask = (pairs.i < n) & (pairs.j < n)
        i = jnp.where(pairs.i < n, pairs.i, 0)
        j = jnp.where(pairs.j < n, pairs.j, 0)
        return (PairTerm(i, j, mask, no_energy, (), _Constant(of_pairs), pairs.images),)

    def near(
        self,
        params: Params,
        pairs: Pairs,
        vectors: Components,
        n: int,
        species: Species,
        count: int,
    ) -> tuple[jax.Array, Components]:
        """Return which places of a neighbor list hold a neighbor within the cutoff, and vectors.

        The vectors are those to the neighbors. In other places they are replaced by a vector of
        half the cutoff, where every energy is finite.
        """
        reach = jnp.asarray(self.lengths(params, pairs, n, species, count))
        mask = (pairs.j < n) & (sum(v * v for v in vectors) < reach**2)
        harmless = 0.5 * jax.lax.stop_gradient(jnp.asarray(self.range(params)))
        first, *others = vectors
        safe = [jnp.where(mask, first, harmless.astype(first.dtype))]
        return mask, (*safe, *(jnp.where(mask, v, 0.0) for v in others))

    def check(self, params: Params, n: int, species_count: int) -> None:
        for name, axes, above in zip(self.names, self.axes, self.above, strict=True):
            for label, leaf in named_leaves({name: params[name]}):
                check_finite(label, np.asarray(leaf, float), above)
            if axes:
                _check_shape(name, np.shape(params[name]), axes, species_count)
        reach = np.asarray(_range(self, dict(params)), float)
        if not (np.isfinite(reach) and reach > 0):
            raise InputError(
                f"the cutoff of {self.name} is {float(reach):g} at these parameters: give a cutoff"
                " or parameters that make it a positive length."
            )


@compiled
def _range(potential: LocalPotential, params: Params) -> jax.Array:
    """Return the largest distance at which two atoms interact, by one compiled program."""
    return potential.range(params)


def _check_shape(name: str, shape: tuple[int, ...], axes: int, species_count: int) -> None:
    """Raise InputError unless a parameter of pairs or triples of species has such a shape.

    Args:
      name: name of the parameter.
      shape: shape of its value; one number stands for all.
      axes: 2 for pairs of species, 3 for triples.
      species_count: number of species; 0 without species.
    """
    count = max(species_count, 1)
    if shape in ((), (count,) * axes):
        return
    if not species_count:
        raise InputError(
            f"parameter {name} has shape {shape}, and the particles have no species: give a scalar,"
            " or `species`, too."
        )
    what = {2: "pairs", 3: "triples"}[axes]
    sizes = ", ".join([str(count)] * axes)
    raise InputError(
        f"parameter {name} has shape {shape}: give a scalar, or ({sizes}) for {what} of species."
    )


def _of_species(value: Any, pairs: Pairs, n: int, species: Species) -> jax.Array:
    """Return the value for each pair: one for all, or the entry of a matrix of species pairs."""
    array = jnp.asarray(value)
    if array.ndim == 0:
        return array
    if species is None or array.shape == (1, 1):  # one number for all species
        return array[0, 0]
    i = jnp.where(pairs.i < n, pairs.i, 0)
    j = jnp.where(pairs.j < n, pairs.j, 0)
    return array[species[i], species[j]]


class _Constant(NamedTuple):
    """Breakpoints of each pair that are known already, as the function of a :class:`PairTerm`."""

    lengths: tuple[jax.Array, ...]

    def __call__(self) -> tuple[jax.Array, ...]:
        return self.lengths


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LocalPotential(NeighborPotential):
    """A potential of an atom's surroundings, U = sum_i e_i, made by :func:`from_local`."""

    def atom(self, params: Params, species_count: int) -> Callable[..., jax.Array]:
        """Return the energy of one atom, a function (vectors, mask, species_i, species_j)."""
        values = self.values(params, species_count)
        fn = Traceable(f"the energy {self.name}", self.fn)

        def energy(*surroundings: jax.Array) -> jax.Array:
            return _one_number(self.name, fn(*surroundings, values), "its neighbors")

        return energy

    def energies(
        self,
        params: Params,
        pairs: Pairs,
        vectors: Components,
        n: int,
        species: Species,
        count: int,
    ) -> jax.Array:
        """Compute the energies of c atoms, (c,).

        Args:
          params: the parameters by name.
          pairs: the places (capacity, c) of the neighbor list of the c atoms.
          vectors: components (capacity, c) of the vectors from each atom to its neighbors.
          n: number of all atoms, the index of places without a neighbor.
          species: (n,) species of all atoms; None without species.
          count: number of species.
        """
        mask, vectors = self.near(params, pairs, vectors, n, species, count)
        kind, kinds = kinds_of(pairs, n, species)
        # The neighbors are the last axis but that of the components: sums over them run through
        # memory in its order, which takes a quarter of the time.
        by_atom = jnp.stack(vectors, axis=-1).swapaxes(0, 1)
        return jax.vmap(self.atom(params, count))(by_atom, mask.T, kind, kinds.T)


def _one_number(name: str, energy: jax.Array, of_what: str) -> jax.Array:
    """Return what a user's energy function returned, after a check that it is one number."""
    if jnp.shape(energy):
        raise InputError(
            f"the energy {name} returned an array of shape {jnp.shape(energy)}: return one number,"
            f" the sum over {of_what}."
        )
    return energy


def parts_of_neighbors(potential: Any) -> tuple[NeighborPotential, ...]:
    """Return the parts of a potential that are functions of all neighbors of an atom."""
    parts = getattr(potential, "parts", (potential,))
    return tuple(part for part in parts if isinstance(part, NeighborPotential))


def kinds_of(pairs: Pairs, n: int, species: Species) -> tuple[jax.Array, jax.Array]:
    """Return the species of c atoms, (c,), and of their neighbors, (capacity, c).

    Without species they are 0. Places that hold no neighbor have the index n, the number of atoms.
    """
    if species is None:
        return jnp.zeros(pairs.j.shape[-1], jnp.int32), jnp.zeros(pairs.j.shape, jnp.int32)
    return species[pairs.i[0]], species[jnp.where(pairs.j < n, pairs.j, 0)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EdgePotential(NeighborPotential):
    """A potential that is a function of all neighbors of all atoms, made by :func:`from_edges`."""

    def energy_of_edges(
        self, params: Params, pairs: Pairs, vectors: Components, species: Species, count: int
    ) -> jax.Array:
        """Compute the energy of all atoms, a scalar.

        Args:
          params: the parameters by name.
          pairs: the places (capacity, n) of the neighbor list.
          vectors: components (capacity, n) of the vectors from each atom to its neighbors.
          species: (n,) species of the atoms; None without species.
          count: number of species.
        """
        n = pairs.j.shape[-1]
        mask, vectors = self.near(params, pairs, vectors, n, species, count)
        i = jnp.broadcast_to(pairs.i, mask.shape)
        j = jnp.where(mask, pairs.j, 0)
        images = pairs.images
        edges = Edges(
            i=jnp.where(mask, i, 0).ravel(),
            j=j.ravel(),
            images=None if images is None else images.reshape(-1, len(vectors)),
            vectors=jnp.stack(vectors, axis=-1).reshape(-1, len(vectors)),
            mask=mask.ravel(),
            species=jnp.zeros(n, jnp.int32) if species is None else species,
        )
        fn = Traceable(f"the energy {self.name}", self.fn)
        return _one_number(self.name, fn(edges, self.values(params, count)), "all edges")


def from_local(
    fn: Callable[..., jax.Array],
    parameters: Sequence[str],
    cutoff: float | Callable[..., Any],
    *,
    breakpoints: Sequence[float] | Callable[..., tuple[Any, ...]] = (),
    shapes: Mapping[str, str] | None = None,
    name: str | None = None,
    positive: Sequence[str] = (),
) -> LocalPotential:
    """Make a potential of an atom's surroundings, U = sum_i e_i, of a user's function.

        e_i = fn(vectors, mask, species_i, species_j, params)

    Args:
      fn: function that returns the energy of one atom, in jax.numpy, twice differentiable away from
        the breakpoints. ``vectors`` (K, d) are those from the atom to its neighbors, all images
        within the cutoff; ``mask`` (K,) is True where a place holds a neighbor nearer than the
        cutoff, and fn must leave other places out, ``jnp.where(mask, ..., 0.0)``; their vectors
        have half the cutoff as their length. ``species_i`` and ``species_j`` (K,) are the species
        of the atom and of its neighbors, integers from 0, and ``params`` is a dict of the
        parameters. Where a neighbor passes the cutoff, the energy must go to zero smoothly.
      parameters: the parameters' names.
      cutoff: the distance beyond which atoms do not interact: a length, or a function of
        ``params`` that returns a length, or a matrix (S, S) of lengths for S species.
      breakpoints: distances where a derivative of the energy jumps or diverges, or a function of
        ``params`` that returns a tuple of them, each a length or a matrix (S, S).
      shapes: dict from the names of parameters that have a value for each pair of species,
        ``"pair"``, or for each triple, ``"triple"``. fn gets them as arrays (S, S), [species of the
        atom, of the neighbor], and (S, S, S), [atom, neighbor, other neighbor]; they need not be
        symmetric. The user may give one value for all. Other parameters have any shape, and may
        be trees of arrays (dicts, lists and tuples of them).
      name: name of the potential in messages and tables; the name of fn where None.
      positive: names of the parameters that must be positive.

    Returns:
      The potential. Its Hessian is assembled from the second derivatives of each e_i where a row of
      it is short; else products with it are computed without a matrix.
    """
    fields = _fields(fn, parameters, cutoff, breakpoints, shapes, name, positive)
    return LocalPotential(**fields)


def from_edges(
    fn: Callable[[Edges, dict[str, Any]], jax.Array],
    parameters: Sequence[str],
    cutoff: float | Callable[..., Any],
    *,
    breakpoints: Sequence[float] | Callable[..., tuple[Any, ...]] = (),
    shapes: Mapping[str, str] | None = None,
    name: str | None = None,
    positive: Sequence[str] = (),
) -> EdgePotential:
    """Make a potential of a user's function of all neighbors, U = fn(edges, params).

    It is for energies in which an atom depends on more than its own neighbors, such as
    message-passing neural networks. The Hessian is not assembled: its products are computed by
    differentiating fn.

    Args:
      fn: function that returns the energy of all atoms, a scalar, from the list of neighbors
        ``edges``, an :class:`Edges`, and ``params``, a dict of the parameters. It must leave out
        the places where ``edges.mask`` is False. A parameter that is a tree of arrays, such as the
        weights of all layers, comes as the user gave it: with ``parameters=("weights",)`` fn reads
        ``params["weights"]["layers"][0]["w"]``.
      parameters, cutoff, breakpoints, shapes, name, positive: as in :func:`from_local`.
    """
    return EdgePotential(**_fields(fn, parameters, cutoff, breakpoints, shapes, name, positive))


def _fields(
    fn: Callable[..., jax.Array],
    parameters: Sequence[str],
    cutoff: float | Callable[..., Any],
    breakpoints: Sequence[float] | Callable[..., tuple[Any, ...]],
    shapes: Mapping[str, str] | None,
    name: str | None,
    positive: Sequence[str],
) -> dict[str, Any]:
    """Check the arguments of :func:`from_local`, and return the fields of the potential."""
    if not callable(fn):
        raise InputError(f"`fn` is {short(fn)}: give a function.")
    names = checked_names(parameters)
    axes = _checked_shapes(shapes, names)
    for other in positive:
        if other not in names:
            raise InputError(f"`positive` names {other!r}, which is no parameter: remove it.")
    need = "give a positive length, or a function of the parameters."
    points = breakpoints if callable(breakpoints) else FixedLengths(checked_lengths(breakpoints))
    return {
        "name": name or getattr(fn, "__name__", "local potential"),
        "fn": fn,
        "names": names,
        "keys": names,
        "cutoff": cutoff if callable(cutoff) else checked_cutoff(cutoff, need),
        "breakpoints": points,
        "axes": tuple(axes.get(n, 0) for n in names),
        "above": tuple(0.0 if n in positive else -math.inf for n in names),
    }


def _checked_shapes(shapes: Mapping[str, str] | None, names: tuple[str, ...]) -> dict[str, int]:
    """Check the shapes of parameters that a user gives, and return the number of axes of each."""
    axes = {}
    for name, shape in (shapes or {}).items():
        if name not in names:
            raise InputError(
                f"`shapes` names {name!r}, which is no parameter: use one of {', '.join(names)}."
            )
        if shape not in AXES:
            raise InputError(
                f"`shapes` has {short(shape)} for {name}: give 'pair' or 'triple', or leave it out."
            )
        axes[name] = AXES[shape]
    return axes
