"""What an interaction potential is: pair, bonded and many-body records with named, checked parameters,
and sums of them.

A potential is a frozen record, equal by value, so that a system built twice compiles once. The catalogue
of ready ones is in :mod:`mdsens.potentials`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mdsens._util.errors import InputError
from mdsens._util.lattice import nearest_image
from mdsens._util.portable import Portable
from mdsens._util.user_functions import Traceable
from mdsens.potentials.pair_trial import Few, Trial, check_end, check_trial, trial_of
from mdsens.potentials.parameters import (
    Mixing,
    arithmetic,
    check_finite,
    check_names,
    check_pair_shape,
    of_pairs,
)

__all__ = [
    "BondedPotential",
    "EnergyPotential",
    "FixedLengths",
    "Potential",
    "PairPotential",
    "PairTerm",
    "SumPotential",
    "check_params",
    "no_breakpoints",
]

Params = Mapping[str, Any]
Pairs = Any  # two arrays of particle indices that broadcast together, padded with n
Phi = Callable[..., jax.Array]
Displacement = Callable[[jax.Array, jax.Array], jax.Array]


class PairTerm(NamedTuple):
    """The pairs of one potential: particle indices, which entries are real, and phi(r, *values).

    A list of pairs has shape (m,); rows of neighbors have i (1, n) and the rest (capacity, n), each
    pair twice.
    """

    i: jax.Array
    j: jax.Array
    mask: jax.Array
    phi: Phi
    values: tuple[jax.Array, ...]
    breakpoints: Callable[..., tuple[jax.Array, ...]]

    def rows(self, k: Any) -> PairTerm:
        """The k-th of some chunks of rows, (chunks, rows, n)."""
        values = tuple(v[k] if v.ndim == 3 else v for v in self.values)
        return self._replace(j=self.j[k], mask=self.mask[k], values=values)

    def energy(self, r: jax.Array) -> jax.Array:
        """phi of each pair, zero on padding."""
        return jnp.where(self.mask, self.phi(r, *self.values), 0.0)

    def lengths(self) -> jax.Array:
        """Lengths at which a derivative of the potential jumps or diverges, (k, m)."""
        points = [jnp.broadcast_to(b, self.mask.shape) for b in self.breakpoints(*self.values)]
        return jnp.stack(points) if points else jnp.zeros((0, *self.mask.shape))


class Potential(Protocol):
    """What a :class:`~mdsens.System` asks of its potential."""

    @property
    def parameters(self) -> tuple[str, ...]: ...
    @property
    def pair_parameters(self) -> tuple[str, ...]: ...
    @property
    def pairwise(self) -> bool: ...
    @property
    def repulsive(self) -> bool: ...
    def range(self, params: Params) -> jax.Array: ...
    def lengths(
        self, params: Params, pairs: Pairs, n: int, species: jax.Array | None, species_count: int
    ) -> jax.Array | float: ...
    def terms(
        self, params: Params, pairs: Pairs, n: int, species: jax.Array | None, species_count: int
    ) -> tuple[PairTerm, ...]: ...
    def many_body(
        self,
        positions: jax.Array,
        params: Params,
        displacement: Displacement,
        species: Any,
        species_count: int,
    ) -> jax.Array: ...
    def at(self, params: Params, differentiated: Sequence[str] = ()) -> Self: ...
    def check(self, params: Params, n: int, species_count: int) -> None: ...


class _Addable:
    def __add__(self, other: Any) -> SumPotential:
        if not isinstance(other, _Addable):
            return NotImplemented
        return SumPotential(_flatten(self) + _flatten(other))


def _flatten(potential: Any) -> tuple[Any, ...]:
    return potential.parts if isinstance(potential, SumPotential) else (potential,)


class _NamedPotential(_Addable):
    """What potentials with parameters of their own share; a potential overrides what it does otherwise."""

    name: str
    names: tuple[str, ...]

    repulsive = False

    @property
    def parameters(self) -> tuple[str, ...]:
        return self.names

    @property
    def pair_parameters(self) -> tuple[str, ...]:
        """Those of pairs: given as a matrix, one of species pairs, which is symmetric."""
        return ()

    @property
    def pairwise(self) -> bool:
        return True

    def renamed(self, names: Mapping[str, str]) -> Self:
        """The same potential with some parameters renamed, so that two potentials of a sum keep theirs apart."""
        own: Any = self
        return dataclasses.replace(own, names=tuple(names.get(n, n) for n in self.names))

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

    def many_body(
        self,
        positions: jax.Array,
        params: Params,
        displacement: Displacement,
        species: Any,
        species_count: int,
    ) -> jax.Array:
        return jnp.zeros((), positions.dtype)

    def check_at(
        self, positions: jax.Array, box: Any, params: Params, species: Any, species_count: int
    ) -> None:
        """Refuse a configuration at which the potential has no energy. On the host alone."""

    def at(self, params: Params, differentiated: Sequence[str] = ()) -> Self:
        """The potential in its cheapest form at these parameters: the same function of r.

        Its derivatives by the parameters in ``differentiated`` are the potential's; those by others may not be.
        """
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairPotential(Portable, _NamedPotential):
    """U = sum over pairs of phi(r_ij, p_ij), phi zero at and beyond a finite cutoff (or of infinite
    range).

    Attributes:
      name: shown in messages and tables.
      phi: ``phi(r, *pair_parameters)``, elementwise.
      names: the parameters' names, in phi's order.
      cutoff: a length, or a function of the pair parameters, monotone in each; None for infinite
        range.
      breakpoints: function of the pair parameters to the lengths where a derivative jumps or
        diverges.
      mixing: one function a parameter, of the two particles' values; its result lies between them.
      above: what each parameter must exceed; -inf for any.
      repulsive: True where phi only repels and vanishes beyond contact: rattlers are then found
        from contacts.
      cases: cheaper forms of phi, each with a parameter's name and the value of it at which it is
        the same function of r and of the other parameters (a power that is a square).
    """

    name: str = dataclasses.field(metadata={"static": True})
    phi: Phi = dataclasses.field(metadata={"static": True})
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    cutoff: float | Callable[..., Any] | None = dataclasses.field(metadata={"static": True})
    breakpoints: Callable[..., tuple[Any, ...]] = dataclasses.field(metadata={"static": True})
    mixing: tuple[Mixing, ...] = dataclasses.field(metadata={"static": True})
    above: tuple[float, ...] = dataclasses.field(metadata={"static": True})
    repulsive: bool = dataclasses.field(default=False, metadata={"static": True})
    cases: tuple[tuple[Phi, str, float], ...] = dataclasses.field(
        default=(), metadata={"static": True}
    )

    @property
    def pair_parameters(self) -> tuple[str, ...]:
        return self.names

    def range(self, params: Params) -> jax.Array:
        """The largest length at which a pair can interact, over each parameter's extremes; inf
        without a cutoff.
        """
        if self.cutoff is None:
            return jnp.asarray(jnp.inf)
        if not callable(self.cutoff):
            return jnp.asarray(float(self.cutoff))
        corners = itertools.product(
            *[
                (
                    (params[n],)
                    if np.ndim(params[n]) == 0
                    else (jnp.min(params[n]), jnp.max(params[n]))
                )
                for n in self.names
            ]
        )
        return jnp.max(jnp.stack([jnp.asarray(self._end(*c)) for c in corners]))

    def _end(self, *values: Any) -> Any:
        """The cutoff of a pair with these parameters, where it is a function of them."""
        assert callable(self.cutoff)
        return Traceable(f"the cutoff of {self.name}", self.cutoff)(*values)

    def lengths(
        self, params: Params, pairs: Pairs, n: int, species: jax.Array | None, species_count: int
    ) -> jax.Array | float:
        """The length beyond which phi of each pair is zero; inf without a cutoff."""
        if self.cutoff is None:
            return math.inf
        if not callable(self.cutoff):
            return float(self.cutoff)
        (term,) = self.terms(params, pairs, n, species, species_count)
        return jnp.asarray(self._end(*term.values))

    def terms(
        self, params: Params, pairs: Pairs, n: int, species: jax.Array | None, species_count: int
    ) -> tuple[PairTerm, ...]:
        i, j = (jnp.where(side < n, side, 0) for side in pairs)
        mask = (pairs[0] < n) & (pairs[1] < n)
        values = tuple(
            of_pairs(
                jnp.asarray(params[name]),
                i,
                j,
                species,
                species_count,
                Traceable(f"the mixing of {name}", mix),
            )
            for name, mix in zip(self.names, self.mixing, strict=True)
        )
        points = Traceable(f"the function of breakpoints of {self.name}", self.breakpoints)
        return (PairTerm(i, j, mask, self._traceable(), values, points),)

    def at(self, params: Params, differentiated: Sequence[str] = ()) -> PairPotential:
        for phi, name, value in self.cases:
            given = params[name]
            if (
                name not in differentiated
                and not isinstance(given, Tracer)
                and np.all(np.asarray(given) == value)
            ):
                return dataclasses.replace(self, phi=phi)
        return self

    def check(self, params: Params, n: int, species_count: int) -> None:
        for name, mix, above in zip(self.names, self.mixing, self.above, strict=True):
            value = np.asarray(params[name], float)
            check_pair_shape(name, value, n, species_count)
            check_finite(name, value, above)
            if (
                name == "sigma"
                and isinstance(self.cutoff, float)
                and self.cutoff < value.max(initial=0.0)
            ):
                raise InputError(
                    f"cutoff {self.cutoff:g} of {self.name} is below sigma = {value.max():g}:"
                    " cutoff and onset are lengths in the units of the positions, not multiples of"
                    " sigma; give larger ones."
                )
            if value.ndim == 1 and mix is not arithmetic:
                low, high = value.min(), value.max()
                mixed = float(mix(jnp.asarray(low), jnp.asarray(high)))
                if not low * (1 - 1e-6) <= mixed <= high * (1 + 1e-6):
                    raise InputError(
                        f"mixing of {name} gives {mixed} from {low} and {high}: it must lie between"
                        f" them, or pairs could be lost; give {name} as a matrix of species pairs"
                        " instead."
                    )
        self._check_end(params)

    def _traceable(self) -> Traceable:
        """phi, called with traced arrays."""
        return Traceable(f"phi of {self.name}", self.phi)

    def _tested(self) -> bool:
        """Whether phi is one of the catalogue's, which tests of this package have tried at every
        distance.
        """
        phi = getattr(self.phi, "phi", self.phi)  # of one that is switched
        return getattr(phi, "__module__", "").startswith("mdsens.")

    def _check_end(self, params: Params) -> None:
        if self.cutoff is None or self._tested():
            return
        values = [jnp.asarray(np.median(np.asarray(params[name], float))) for name in self.names]
        end = float(self._end(*values) if callable(self.cutoff) else self.cutoff)
        check_end(self.name, self._traceable(), end, values)

    def check_at(
        self, positions: jax.Array, box: Any, params: Params, species: Any, species_count: int
    ) -> None:
        if self._tested():
            return
        few = Few.of(positions, {name: params[name] for name in self.names}, species, species_count)
        if few is not None:
            check_trial(self.name, self.names, _trial(self, box, few, species_count))


@functools.partial(jax.jit, static_argnames="species_count")
def _trial(potential: PairPotential, box: Any, few: Few, species_count: int) -> Trial:
    n, (i, j) = few.positions.shape[0], few.pairs
    kinds = few.pairs, n, few.species, species_count
    (term,) = potential.terms(few.params, *kinds)
    squared = jnp.sum(nearest_image(few.positions[i] - few.positions[j], box) ** 2, axis=-1)
    apart = jnp.sqrt(jnp.where(squared > 0, squared, 1.0))  # two in one place are refused as such
    ends = jnp.broadcast_to(
        jnp.asarray(potential.lengths(few.params, *kinds), apart.dtype), apart.shape
    )
    return trial_of(term.phi, f"phi of {potential.name}", apart, ends, term.lengths(), term.values)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)  # arrays are compared by hand
class BondedPotential(Portable, _NamedPotential):
    """U = sum over listed bonds of phi(r_ij, p_b); each parameter a scalar or one value a bond."""

    bonds: Any  # (m, 2) particle indices
    name: str = dataclasses.field(metadata={"static": True})
    phi: Phi = dataclasses.field(metadata={"static": True})
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    above: tuple[float, ...] = dataclasses.field(metadata={"static": True})

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, BondedPotential)
            and (self.name, self.phi, self.names) == (other.name, other.phi, other.names)
            and np.array_equal(np.asarray(self.bonds), np.asarray(other.bonds))
        )

    def __hash__(self) -> int:
        return hash((self.name, self.phi, self.names))

    def terms(
        self, params: Params, pairs: Pairs, n: int, species: jax.Array | None, species_count: int
    ) -> tuple[PairTerm, ...]:
        bonds = jnp.asarray(self.bonds)
        values = tuple(jnp.asarray(params[name]) for name in self.names)
        mask = jnp.ones(bonds.shape[0], bool)
        return (PairTerm(bonds[:, 0], bonds[:, 1], mask, self.phi, values, no_breakpoints),)

    def check(self, params: Params, n: int, species_count: int) -> None:
        bonds = np.asarray(self.bonds)
        m = bonds.shape[0]
        if m and (bonds.min() < 0 or bonds.max() >= n):
            worst = bonds.max() if bonds.max() >= n else bonds.min()
            raise InputError(
                f"bonds name particle {worst} but there are {n}: use indices 0 to {n - 1}."
            )
        for name, above in zip(self.names, self.above, strict=True):
            value = np.asarray(params[name], float)
            if value.shape not in ((), (m,)):
                raise InputError(
                    f"parameter {name} has shape {value.shape}: give a scalar or ({m},), one a"
                    " bond."
                )
            check_finite(name, value, above)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EnergyPotential(Portable, _NamedPotential):
    """U = fn(positions, params, displacement): anything, over all pairs, with the scaling its
    author gives it.
    """

    name: str = dataclasses.field(metadata={"static": True})
    fn: Callable[..., jax.Array] = dataclasses.field(metadata={"static": True})
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    keys: tuple[str, ...] = dataclasses.field(metadata={"static": True})  # what fn calls them
    shared: tuple[str, ...] = dataclasses.field(
        default=(), metadata={"static": True}
    )  # those of another potential of a sum

    @property
    def pairwise(self) -> bool:
        return False

    def many_body(
        self,
        positions: jax.Array,
        params: Params,
        displacement: Displacement,
        species: Any,
        species_count: int,
    ) -> jax.Array:
        given = {key: params[name] for key, name in zip(self.keys, self.names, strict=True)}
        return Traceable(f"the energy {self.name}", self.fn)(positions, given, displacement)

    def check_at(
        self, positions: jax.Array, box: Any, params: Params, species: Any, species_count: int
    ) -> None:
        def energy(positions: jax.Array, params: Params) -> jax.Array:
            def displacement(a: jax.Array, b: jax.Array, **_: Any) -> jax.Array:
                return nearest_image(a - b, box)

            return jnp.asarray(
                self.many_body(positions, params, displacement, species, species_count)
            )

        found = jax.eval_shape(energy, positions, {name: params[name] for name in self.names})
        if found.shape or not jnp.issubdtype(found.dtype, jnp.floating):
            raise InputError(
                f"the energy {self.name} returns {found.dtype} of shape {found.shape}: return one"
                " real number, the sum over all particles."
            )

    def check(self, params: Params, n: int, species_count: int) -> None:
        for name in self.names:
            check_finite(name, np.asarray(params[name], float), -math.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SumPotential(_Addable):
    """The sum of several potentials; each parameter belongs to one of them, and others may declare that
    they share it.
    """

    parts: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not all(hasattr(potential, "parameters") for potential in self.parts):
            return  # a pytree rebuilt with placeholders
        seen: dict[str, Any] = {}
        for potential in self.parts:
            for name in potential.parameters:
                if name in seen and name in {
                    *getattr(potential, "shared", ()),
                    *getattr(seen[name], "shared", ()),
                }:
                    continue
                if name in seen:
                    raise InputError(
                        f"{seen[name].name} and {potential.name} both have a parameter {name!r}: rename"
                        " one, "
                        f'potential.renamed({{"{name}": "{name}_2"}}).'
                    )
                seen[name] = potential

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
    def pairwise(self) -> bool:
        return all(potential.pairwise for potential in self.parts)

    @property
    def repulsive(self) -> bool:
        return all(potential.repulsive for potential in self.parts)

    def range(self, params: Params) -> jax.Array:
        return jnp.max(jnp.stack([potential.range(params) for potential in self.parts]))

    def lengths(
        self, params: Params, pairs: Pairs, n: int, species: jax.Array | None, species_count: int
    ) -> jax.Array | float:
        found = jnp.zeros(())
        for potential in self.parts:
            found = jnp.maximum(found, potential.lengths(params, pairs, n, species, species_count))
        return found

    def terms(
        self, params: Params, pairs: Pairs, n: int, species: jax.Array | None, species_count: int
    ) -> tuple[PairTerm, ...]:
        return tuple(
            t
            for potential in self.parts
            for t in potential.terms(params, pairs, n, species, species_count)
        )

    def many_body(
        self,
        positions: jax.Array,
        params: Params,
        displacement: Displacement,
        species: Any,
        species_count: int,
    ) -> jax.Array:
        total = jnp.zeros((), positions.dtype)
        for potential in self.parts:
            total = total + potential.many_body(
                positions, params, displacement, species, species_count
            )
        return total

    def at(self, params: Params, differentiated: Sequence[str] = ()) -> SumPotential:
        return SumPotential(tuple(potential.at(params, differentiated) for potential in self.parts))

    def check(self, params: Params, n: int, species_count: int) -> None:
        for potential in self.parts:
            potential.check(params, n, species_count)

    def check_at(
        self, positions: jax.Array, box: Any, params: Params, species: Any, species_count: int
    ) -> None:
        for potential in self.parts:
            if hasattr(potential, "check_at"):
                potential.check_at(positions, box, params, species, species_count)


def check_params(potential: Any, params: Params, n: int, species_count: int) -> None:
    """Names, shapes and values of ``params`` against ``potential``; raises :class:`InputError`. On the
    host alone.
    """
    check_names(params, potential.parameters, potential.name)
    potential.check(params, n, species_count)


def no_breakpoints(*values: Any) -> tuple[Any, ...]:
    """The breakpoints of a potential that is smooth everywhere."""
    return ()


@dataclasses.dataclass(frozen=True)
class FixedLengths:
    """Fixed breakpoints."""

    lengths: tuple[float, ...]

    def __call__(self, *values: Any) -> tuple[Any, ...]:
        return tuple(jnp.asarray(b) for b in self.lengths)
