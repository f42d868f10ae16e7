"""Interaction laws with named, checked parameters: pair, bonded and many-body, and sums of them.

A law is a frozen record, equal by value, so that a system built twice compiles once. The pair laws are written here and
not taken from ``jax_md.energy`` because its soft sphere has NaN derivatives by ``alpha`` at contact, and its
Lennard-Jones switch is C1 only and moves with ``sigma``, so that Hessians jump and derivatives by ``sigma`` move the
cutoff. Many-body laws of ``jax_md.energy`` come in through :func:`from_energy`.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mdsens.implicit.status import InputError

__all__ = [
    "BondLaw",
    "EnergyLaw",
    "Law",
    "PairLaw",
    "PairTerm",
    "SumLaw",
    "from_energy",
    "from_pair",
    "geometric",
    "harmonic_bonds",
    "lennard_jones",
    "morse",
    "soft_sphere",
    "switched",
]

Params = Mapping[str, Any]
Phi = Callable[..., jax.Array]
Mixing = Callable[[jax.Array, jax.Array], jax.Array]
Displacement = Callable[[jax.Array, jax.Array], jax.Array]


class PairTerm(NamedTuple):
    """The pairs of one law: particle indices (m,), which entries are real (m,), and phi(r, *values)."""

    i: jax.Array
    j: jax.Array
    mask: jax.Array
    phi: Phi
    values: tuple[jax.Array, ...]
    breakpoints: Callable[..., tuple[jax.Array, ...]]

    def energy(self, r: jax.Array) -> jax.Array:
        """phi of each pair (m,), zero on padding."""
        return jnp.where(self.mask, self.phi(r, *self.values), 0.0)

    def lengths(self) -> jax.Array:
        """Lengths at which a derivative of the law jumps or diverges, (k, m)."""
        points = [jnp.broadcast_to(b, self.i.shape) for b in self.breakpoints(*self.values)]
        return jnp.stack(points) if points else jnp.zeros((0, *self.i.shape))


class Law(Protocol):
    """What a :class:`~mdsens.System` asks of its potential."""

    @property
    def parameters(self) -> tuple[str, ...]: ...
    @property
    def pairwise(self) -> bool: ...
    @property
    def repulsive(self) -> bool: ...
    def range(self, params: Params) -> jax.Array: ...
    def terms(
        self, params: Params, pairs: jax.Array, n: int, species: jax.Array | None, species_count: int
    ) -> tuple[PairTerm, ...]: ...
    def many_body(self, positions: jax.Array, params: Params, displacement: Displacement) -> jax.Array: ...
    def check(self, params: Params, n: int, species_count: int) -> None: ...


def _arithmetic(a: jax.Array, b: jax.Array) -> jax.Array:
    return 0.5 * (a + b)


def geometric(a: jax.Array, b: jax.Array) -> jax.Array:
    """Geometric mixing, sqrt(a b), for ``from_pair(..., mixing={"epsilon": geometric})``."""
    return jnp.sqrt(a * b)


def _of_pairs(value: jax.Array, i: jax.Array, j: jax.Array, species: Any, species_count: int, mix: Mixing) -> jax.Array:
    """One parameter at each pair: a scalar, one a species, one a particle, or a matrix of species pairs."""
    if value.ndim == 0:
        return value
    if value.ndim == 2:
        value = 0.5 * (value + value.T)
        return value[species[i], species[j]]
    if species is not None and value.shape[0] == species_count:
        return mix(value[species[i]], value[species[j]])
    return mix(value[i], value[j])


def _check_names(given: Params, valid: Sequence[str], law: str) -> None:
    for name in given:
        if name not in valid:
            near = difflib.get_close_matches(name, valid, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "remove it."
            raise InputError(f"{law} has no parameter {name!r} (it has {', '.join(map(repr, valid))}): {hint}")
    for name in valid:
        if name not in given:
            raise InputError(f"{law} needs the parameter {name!r}: give params[{name!r}].")


def _check_finite(name: str, value: np.ndarray, positive: bool) -> None:
    bad = ~np.isfinite(value)
    if positive:
        bad |= ~(value > 0)
    if bad.any():
        where = tuple(int(k) for k in np.argwhere(bad)[0])
        label = f"{name}{list(where)}" if where else name
        need = "a positive number" if positive else "a finite number"
        raise InputError(f"parameter {label} is {value[where]}: give {need}.")


def _check_pair_shape(name: str, value: np.ndarray, n: int, species_count: int) -> None:
    s = species_count
    if value.ndim == 0 or (value.ndim == 1 and (value.shape[0] == n or (s and value.shape[0] == s))):
        return
    if value.ndim == 2 and s and value.shape == (s, s):
        if not np.array_equal(value, value.T):
            raise InputError(f"parameter {name} is not symmetric: give a symmetric ({s}, {s}) matrix of species pairs.")
        return
    allowed = f"a scalar, ({n},) for one a particle" + (
        f", ({s},) for one a species or ({s}, {s}) for species pairs" if s else " (give species= for one a species)"
    )
    raise InputError(f"parameter {name} has shape {value.shape}: give {allowed}.")


class _Addable:
    def __add__(self, other: Any) -> SumLaw:
        if not isinstance(other, _Addable):
            return NotImplemented
        return SumLaw(_flatten(self) + _flatten(other))


def _flatten(law: Any) -> tuple[Any, ...]:
    return law.laws if isinstance(law, SumLaw) else (law,)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairLaw(_Addable):
    """U = sum over pairs of phi(r_ij, p_ij), phi zero at and beyond a finite cutoff (or of infinite range).

    Attributes:
      name: shown in messages and tables.
      phi: ``phi(r, *pair_parameters)``, elementwise.
      names: the parameters' names, in phi's order.
      cutoff: a length, or a function of the pair parameters, monotone in each; None for infinite range.
      breakpoints: function of the pair parameters to the lengths where a derivative jumps or diverges.
      mixing: one function a parameter, of the two particles' values; its result lies between them.
      positive: which parameters must be positive.
      repulsive: True where phi only repels and vanishes beyond contact: rattlers are then found from contacts.
    """

    name: str = dataclasses.field(metadata={"static": True})
    phi: Phi = dataclasses.field(metadata={"static": True})
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    cutoff: float | Callable[..., Any] | None = dataclasses.field(metadata={"static": True})
    breakpoints: Callable[..., tuple[Any, ...]] = dataclasses.field(metadata={"static": True})
    mixing: tuple[Mixing, ...] = dataclasses.field(metadata={"static": True})
    positive: tuple[bool, ...] = dataclasses.field(metadata={"static": True})
    repulsive: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def parameters(self) -> tuple[str, ...]:
        return self.names

    @property
    def pairwise(self) -> bool:
        return True

    def renamed(self, names: Mapping[str, str]) -> PairLaw:
        """The same law with some parameters renamed, so that two laws of a sum keep theirs apart."""
        return dataclasses.replace(self, names=tuple(names.get(n, n) for n in self.names))

    def range(self, params: Params) -> jax.Array:
        """The largest length at which a pair can interact, over each parameter's extremes; inf without a cutoff."""
        if self.cutoff is None:
            return jnp.asarray(jnp.inf)
        if not callable(self.cutoff):
            return jnp.asarray(float(self.cutoff))
        corners = itertools.product(
            *[(params[n],) if np.ndim(params[n]) == 0 else (jnp.min(params[n]), jnp.max(params[n])) for n in self.names]
        )
        return jnp.max(jnp.stack([jnp.asarray(self.cutoff(*c)) for c in corners]))

    def terms(
        self, params: Params, pairs: jax.Array, n: int, species: jax.Array | None, species_count: int
    ) -> tuple[PairTerm, ...]:
        mask = pairs[0] < n
        i, j = jnp.where(mask, pairs[0], 0), jnp.where(mask, pairs[1], 0)
        values = tuple(
            _of_pairs(jnp.asarray(params[name]), i, j, species, species_count, mix)
            for name, mix in zip(self.names, self.mixing, strict=True)
        )
        return (PairTerm(i, j, mask, self.phi, values, self.breakpoints),)

    def many_body(self, positions: jax.Array, params: Params, displacement: Displacement) -> jax.Array:
        return jnp.zeros((), positions.dtype)

    def check(self, params: Params, n: int, species_count: int) -> None:
        for name, mix, positive in zip(self.names, self.mixing, self.positive, strict=True):
            value = np.asarray(params[name], float)
            _check_pair_shape(name, value, n, species_count)
            _check_finite(name, value, positive)
            if value.ndim == 1 and mix is not _arithmetic:
                low, high = value.min(), value.max()
                mixed = float(mix(jnp.asarray(low), jnp.asarray(high)))
                if not low * (1 - 1e-6) <= mixed <= high * (1 + 1e-6):
                    raise InputError(
                        f"mixing of {name} gives {mixed} from {low} and {high}: it must lie between them, or pairs "
                        f"could be lost; give {name} as a matrix of species pairs instead."
                    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no one truth value to compare by
class BondLaw(_Addable):
    """U = sum over listed bonds of phi(r_ij, p_b); each parameter a scalar or one value a bond."""

    bonds: Any  # (m, 2) particle indices
    name: str = dataclasses.field(metadata={"static": True})
    phi: Phi = dataclasses.field(metadata={"static": True})
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    positive: tuple[bool, ...] = dataclasses.field(metadata={"static": True})

    repulsive = False

    @property
    def parameters(self) -> tuple[str, ...]:
        return self.names

    @property
    def pairwise(self) -> bool:
        return True

    def renamed(self, names: Mapping[str, str]) -> BondLaw:
        """The same law with some parameters renamed, so that two laws of a sum keep theirs apart."""
        return dataclasses.replace(self, names=tuple(names.get(n, n) for n in self.names))

    def range(self, params: Params) -> jax.Array:
        return jnp.zeros(())

    def terms(
        self, params: Params, pairs: jax.Array, n: int, species: jax.Array | None, species_count: int
    ) -> tuple[PairTerm, ...]:
        bonds = jnp.asarray(self.bonds)
        values = tuple(jnp.asarray(params[name]) for name in self.names)
        mask = jnp.ones(bonds.shape[0], bool)
        return (PairTerm(bonds[:, 0], bonds[:, 1], mask, self.phi, values, _no_breakpoints),)

    def many_body(self, positions: jax.Array, params: Params, displacement: Displacement) -> jax.Array:
        return jnp.zeros((), positions.dtype)

    def check(self, params: Params, n: int, species_count: int) -> None:
        bonds = np.asarray(self.bonds)
        m = bonds.shape[0]
        if m and (bonds.min() < 0 or bonds.max() >= n):
            worst = bonds.max() if bonds.max() >= n else bonds.min()
            raise InputError(f"bonds name particle {worst} but there are {n}: use indices 0 to {n - 1}.")
        for name, positive in zip(self.names, self.positive, strict=True):
            value = np.asarray(params[name], float)
            if value.shape not in ((), (m,)):
                raise InputError(f"parameter {name} has shape {value.shape}: give a scalar or ({m},), one a bond.")
            _check_finite(name, value, positive)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EnergyLaw(_Addable):
    """U = fn(positions, params, displacement): anything, over all pairs, with the scaling its author gives it."""

    name: str = dataclasses.field(metadata={"static": True})
    fn: Callable[..., jax.Array] = dataclasses.field(metadata={"static": True})
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    keys: tuple[str, ...] = dataclasses.field(metadata={"static": True})  # what fn calls them

    repulsive = False

    @property
    def parameters(self) -> tuple[str, ...]:
        return self.names

    @property
    def pairwise(self) -> bool:
        return False

    def renamed(self, names: Mapping[str, str]) -> EnergyLaw:
        """The same law with some parameters renamed, so that two laws of a sum keep theirs apart."""
        return dataclasses.replace(self, names=tuple(names.get(n, n) for n in self.names))

    def range(self, params: Params) -> jax.Array:
        return jnp.zeros(())

    def terms(
        self, params: Params, pairs: jax.Array, n: int, species: jax.Array | None, species_count: int
    ) -> tuple[PairTerm, ...]:
        return ()

    def many_body(self, positions: jax.Array, params: Params, displacement: Displacement) -> jax.Array:
        given = {key: params[name] for key, name in zip(self.keys, self.names, strict=True)}
        return self.fn(positions, given, displacement)

    def check(self, params: Params, n: int, species_count: int) -> None:
        for name in self.names:
            _check_finite(name, np.asarray(params[name], float), False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SumLaw(_Addable):
    """The sum of several laws; each parameter belongs to one of them."""

    laws: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not all(hasattr(law, "parameters") for law in self.laws):
            return  # a pytree rebuilt with placeholders
        seen: dict[str, Any] = {}
        for law in self.laws:
            for name in law.parameters:
                if name in seen:
                    raise InputError(
                        f"{seen[name].name} and {law.name} both have a parameter {name!r}: rename one, "
                        f'law.renamed({{"{name}": "{name}_2"}}).'
                    )
                seen[name] = law

    @property
    def name(self) -> str:
        return " + ".join(law.name for law in self.laws)

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(name for law in self.laws for name in law.parameters)

    @property
    def pairwise(self) -> bool:
        return all(law.pairwise for law in self.laws)

    @property
    def repulsive(self) -> bool:
        return all(law.repulsive for law in self.laws)

    def range(self, params: Params) -> jax.Array:
        return jnp.max(jnp.stack([law.range(params) for law in self.laws]))

    def terms(
        self, params: Params, pairs: jax.Array, n: int, species: jax.Array | None, species_count: int
    ) -> tuple[PairTerm, ...]:
        return tuple(t for law in self.laws for t in law.terms(params, pairs, n, species, species_count))

    def many_body(self, positions: jax.Array, params: Params, displacement: Displacement) -> jax.Array:
        total = jnp.zeros((), positions.dtype)
        for law in self.laws:
            total = total + law.many_body(positions, params, displacement)
        return total

    def check(self, params: Params, n: int, species_count: int) -> None:
        for law in self.laws:
            law.check(params, n, species_count)


def check_params(law: Any, params: Params, n: int, species_count: int) -> None:
    """Names, shapes and values of ``params`` against ``law``; raises :class:`InputError`. On the host alone."""
    _check_names(params, law.parameters, law.name)
    law.check(params, n, species_count)


def _no_breakpoints(*values: Any) -> tuple[Any, ...]:
    return ()


@dataclasses.dataclass(frozen=True)
class _Lengths:
    """Fixed breakpoints."""

    lengths: tuple[float, ...]

    def __call__(self, *values: Any) -> tuple[Any, ...]:
        return tuple(jnp.asarray(b) for b in self.lengths)


@dataclasses.dataclass(frozen=True)
class switched:  # noqa: N801 - used as a function
    """phi times a C2 switch: 1 up to ``onset``, 0 from ``cutoff`` on, S(x) = 1 - x^3 (10 - 15 x + 6 x^2) between.

    x = (r - onset) / (cutoff - onset). Both are lengths in the units of r, so they do not move with the parameters.
    """

    phi: Phi
    onset: float
    cutoff: float

    def __post_init__(self) -> None:
        if not 0 < self.onset < self.cutoff < np.inf:
            raise InputError(f"onset {self.onset} and cutoff {self.cutoff}: give 0 < onset < cutoff.")

    def __call__(self, r: jax.Array, *values: jax.Array) -> jax.Array:
        x = jnp.clip((r - self.onset) / (self.cutoff - self.onset), 0.0, 1.0)
        return self.phi(r, *values) * (1.0 - x**3 * (10.0 - 15.0 * x + 6.0 * x**2))


def _soft_sphere(r: jax.Array, sigma: jax.Array, epsilon: jax.Array, alpha: jax.Array) -> jax.Array:
    overlap = 1.0 - r / sigma
    inside = overlap > 0
    # where() inside the power: 0**alpha has a NaN tangent by alpha
    return jnp.where(inside, epsilon / alpha * jnp.where(inside, overlap, 1.0) ** alpha, 0.0)


def _first(sigma: Any, *rest: Any) -> Any:
    return sigma


def _at_contact(sigma: Any, *rest: Any) -> tuple[Any, ...]:
    return (sigma,)


def _lennard_jones(r: jax.Array, sigma: jax.Array, epsilon: jax.Array) -> jax.Array:
    s6 = (sigma / r) ** 6
    return 4.0 * epsilon * (s6 * s6 - s6)


def _morse(r: jax.Array, sigma: jax.Array, epsilon: jax.Array, alpha: jax.Array) -> jax.Array:
    bond = jnp.exp(-alpha * (r - sigma))
    return epsilon * (bond * bond - 2.0 * bond)


def _spring(r: jax.Array, stiffness: jax.Array, length: jax.Array) -> jax.Array:
    return 0.5 * stiffness * (r - length) ** 2


def soft_sphere() -> PairLaw:
    """Repulsive soft spheres, phi(r) = epsilon / alpha (1 - r / sigma)^alpha for r < sigma, 0 beyond.

    Parameters: ``sigma`` the sum of the two radii (a particle's value is its diameter), ``epsilon`` an energy,
      ``alpha``
    the exponent: 2 harmonic, 2.5 Hertzian. The cutoff is sigma, by the law's definition, and so follows the parameters.
    Breakpoint: contact, r = sigma, where the second derivative jumps for alpha = 2 and the third diverges for 2.5.
    Source: O'Hern et al., Phys. Rev. E 68, 011306 (2003); the same as ``jax_md.energy.soft_sphere``.
    """
    names = ("sigma", "epsilon", "alpha")
    return PairLaw(
        "soft_sphere", _soft_sphere, names, _first, _at_contact, (_arithmetic,) * 3, (True, True, True), repulsive=True
    )


def lennard_jones(onset: float = 2.0, cutoff: float = 2.5) -> PairLaw:
    """Lennard-Jones, phi(r) = 4 epsilon ((sigma/r)^12 - (sigma/r)^6) S(r), with the C2 switch S of :class:`switched`.

    Parameters: ``sigma``, ``epsilon``. ``onset`` and ``cutoff`` are lengths in the units of r, not multiples of sigma:
    they stay where they are when sigma changes. Give them for sigma = 1 units or scale them yourself.
    """
    phi = switched(_lennard_jones, float(onset), float(cutoff))
    return from_pair(phi, ("sigma", "epsilon"), cutoff, (onset, cutoff), name="lennard_jones", positive=True)


def morse(onset: float = 2.0, cutoff: float = 2.5) -> PairLaw:
    """Morse, phi(r) = epsilon (exp(-2 alpha (r - sigma)) - 2 exp(-alpha (r - sigma))) S(r), S as in lennard_jones.

    Parameters: ``sigma`` the distance of the minimum, ``epsilon`` its depth, ``alpha`` an inverse width.
    """
    phi = switched(_morse, float(onset), float(cutoff))
    return from_pair(phi, ("sigma", "epsilon", "alpha"), cutoff, (onset, cutoff), name="morse", positive=True)


def harmonic_bonds(bonds: Any) -> BondLaw:
    """Springs between listed pairs, phi(r) = stiffness / 2 (r - length)^2.

    Args:
      bonds: (m, 2) particle indices.

    Parameters: ``stiffness`` and ``length`` (rest length), each a scalar or one value a bond. A bond joins the nearest
    images of its two particles, so it must stay shorter than half the smallest height of a periodic cell.
    """
    array = np.asarray(bonds)
    if array.ndim != 2 or array.shape[1] != 2 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"bonds have shape {array.shape} and type {array.dtype}: give integers of shape (m, 2).")
    if (array[:, 0] == array[:, 1]).any():
        raise InputError(f"bond {int(np.argmax(array[:, 0] == array[:, 1]))} joins a particle to itself: remove it.")
    return BondLaw(array, "harmonic_bonds", _spring, ("stiffness", "length"), (False, True))


def from_pair(
    phi: Phi,
    parameters: Sequence[str],
    cutoff: float | Callable[..., Any] | None = None,
    breakpoints: Sequence[float] | Callable[..., tuple[Any, ...]] = (),
    mixing: Mapping[str, Mixing] | None = None,
    *,
    name: str | None = None,
    positive: bool = False,
    repulsive: bool = False,
) -> PairLaw:
    """A pair law of your own, U = sum over pairs of phi(r_ij, p_ij).

    Args:
      phi: ``phi(r, *parameters)``, elementwise in jax.numpy, at least twice differentiable away from the breakpoints,
        and zero at and beyond the cutoff (wrap it in :class:`switched` to make it so). A module-level function compiles
        once; a lambda made anew for each system compiles anew.
      parameters: their names, in phi's order.
      cutoff: a length, or a function of the pair parameters (monotone in each) where the law ties it to them; None for
        infinite range: all pairs, which suits up to a few thousand particles, open boundaries only.
      breakpoints: lengths, or a function of the pair parameters returning them, where a derivative of phi jumps or
        diverges. The validity radius of a sensitivity rests on them.
      mixing: how two particles' values make a pair's, by name; the arithmetic mean where nothing is said.
      positive: refuse parameters that are not positive.
      repulsive: declare that phi only repels and vanishes beyond its cutoff, so that rattlers are found by counting
        contacts.
    """
    names = tuple(parameters)
    mixing = dict(mixing or {})
    for key in mixing:
        if key not in names:
            raise InputError(f"mixing names {key!r}, which is no parameter: use one of {', '.join(names)}.")
    if cutoff is not None and not callable(cutoff):
        if not 0 < float(cutoff) < np.inf:
            raise InputError(f"cutoff is {cutoff}: give a positive length, or None for infinite range.")
        cutoff = float(cutoff)
    points = breakpoints if callable(breakpoints) else _Lengths(tuple(float(b) for b in breakpoints))
    label = name or getattr(phi, "__name__", "pair law")
    rules = tuple(mixing.get(n, _arithmetic) for n in names)
    return PairLaw(label, phi, names, cutoff, points, rules, (positive,) * len(names), repulsive)


def from_energy(fn: Callable[..., jax.Array], parameters: Sequence[str], *, name: str | None = None) -> EnergyLaw:
    """Any other energy, ``fn(positions, params, displacement) -> scalar``, over all pairs.

    Args:
      fn: ``positions`` (n, d); ``params`` a dict of the named parameters; ``displacement(a, b)`` the (deformed, nearest
        image) vector a - b of two points (d,). The many-body laws of jax-md fit:
        ``lambda R, p, d: jax_md.energy.stillinger_weber(d, epsilon=p["epsilon"])(R)``.
      parameters: their names; any shapes.
    """
    return EnergyLaw(name or getattr(fn, "__name__", "energy"), fn, tuple(parameters), tuple(parameters))
