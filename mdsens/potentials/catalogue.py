"""Interaction potentials with named, checked parameters: pair, bonded and many-body, and sums of them.

A potential is a frozen record, equal by value, so that a system built twice compiles once. The pair potentials
are written here and not taken from ``jax_md.energy`` because its soft sphere has NaN derivatives by
``alpha`` at contact, and its Lennard-Jones switch is C1 only and moves with ``sigma``, so that
Hessians jump and derivatives by ``sigma`` move the cutoff. Many-body potentials of ``jax_md.energy`` come
in through :func:`from_energy`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.validation import real_array, real_number, short
from mdsens.potentials.base import (
    BondedPotential,
    EnergyPotential,
    FixedLengths,
    PairPotential,
    Phi,
)
from mdsens.potentials.parameters import Mixing, arithmetic

__all__ = [
    "from_energy",
    "from_pair",
    "geometric",
    "harmonic_bonds",
    "harmonic_morse",
    "lennard_jones",
    "morse",
    "soft_sphere",
    "switched",
]


def geometric(a: jax.Array, b: jax.Array) -> jax.Array:
    """Geometric mixing, sqrt(a b), for ``from_pair(..., mixing={"epsilon": geometric})``."""
    return jnp.sqrt(a * b)


@dataclasses.dataclass(frozen=True)
class switched:  # noqa: N801 - used as a function
    """phi times a C2 switch: 1 up to ``onset``, 0 from ``cutoff`` on, S(x) = 1 - x^3 (10 - 15 x + 6
    x^2) between.

    x = (r - onset) / (cutoff - onset). Both are lengths in the units of r, so they do not move with
    the parameters.
    """

    phi: Phi
    onset: float
    cutoff: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "onset", real_number("onset", self.onset, "give a length."))
        object.__setattr__(self, "cutoff", real_number("cutoff", self.cutoff, "give a length."))
        if not 0 < self.onset < self.cutoff < np.inf:
            raise InputError(
                f"onset {self.onset} and cutoff {self.cutoff}: give 0 < onset < cutoff."
            )

    def __call__(self, r: jax.Array, *values: jax.Array) -> jax.Array:
        return self.phi(r, *values) * _fading((r - self.onset) / (self.cutoff - self.onset))


def _fading(x: jax.Array) -> jax.Array:
    x = jnp.clip(x, 0.0, 1.0)
    return 1.0 - x**3 * (10.0 - 15.0 * x + 6.0 * x**2)


def _soft_sphere(r: jax.Array, sigma: jax.Array, epsilon: jax.Array, alpha: jax.Array) -> jax.Array:
    overlap = 1.0 - r / sigma
    inside = overlap > 0
    # where() inside the power: 0**alpha has a NaN tangent by alpha
    return jnp.where(inside, epsilon / alpha * jnp.where(inside, overlap, 1.0) ** alpha, 0.0)


def _harmonic_sphere(
    r: jax.Array, sigma: jax.Array, epsilon: jax.Array, alpha: jax.Array
) -> jax.Array:
    overlap = 1.0 - r * (1.0 / sigma)  # one division, where the derivative by r / sigma has two
    overlap = jnp.where(overlap > 0, overlap, 0.0)
    return 0.5 * epsilon * overlap * overlap


def _hertzian_sphere(
    r: jax.Array, sigma: jax.Array, epsilon: jax.Array, alpha: jax.Array
) -> jax.Array:
    overlap = 1.0 - r / sigma
    root = jnp.sqrt(
        jnp.where(overlap > 0, overlap, 1.0)
    )  # outside, the slope of a root at zero would be NaN
    return jnp.where(overlap > 0, 0.4 * epsilon * overlap * overlap * root, 0.0)


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


HARMONIC_MORSE_ENDS = (
    5.0,
    9.9,
)  # alpha (r - sigma) where the well begins to fade and where it is gone


def _harmonic_morse(
    r: jax.Array, sigma: jax.Array, epsilon: jax.Array, alpha: jax.Array, stiffness: jax.Array
) -> jax.Array:
    gap = r - sigma
    inside = gap < 0
    overlap = jnp.where(inside, gap, 0.0)
    apart = alpha * jnp.where(
        inside, 0.0, gap
    )  # where() inside the exponential: deep within contact it overflows
    bond = jnp.exp(-apart)
    onset, cutoff = HARMONIC_MORSE_ENDS
    well = epsilon * (bond * bond - 2.0 * bond) * _fading((apart - onset) / (cutoff - onset))
    return 0.5 * stiffness * overlap * overlap + well


def _harmonic_morse_points(sigma: Any, epsilon: Any, alpha: Any, stiffness: Any) -> tuple[Any, ...]:
    onset, cutoff = HARMONIC_MORSE_ENDS
    return sigma, sigma + onset / alpha, sigma + cutoff / alpha


def _harmonic_morse_end(sigma: Any, epsilon: Any, alpha: Any, stiffness: Any) -> Any:
    return sigma + HARMONIC_MORSE_ENDS[1] / alpha


def _spring(r: jax.Array, stiffness: jax.Array, length: jax.Array) -> jax.Array:
    return 0.5 * stiffness * (r - length) ** 2


def soft_sphere() -> PairPotential:
    """Repulsive soft spheres, phi(r) = epsilon / alpha (1 - r / sigma)^alpha for r < sigma, 0
    beyond.

    Parameters: ``sigma`` the sum of the two radii (a particle's value is its diameter), ``epsilon``
      an energy,
    ``alpha`` the exponent, above 1: 2 harmonic, 2.5 Hertzian. The cutoff is sigma, by the potential's
      definition, and so
    follows the parameters. Breakpoint: contact, r = sigma, where the second derivative jumps for
      alpha = 2 and the
    third diverges for 2.5. Source: O'Hern et al., Phys. Rev. E 68, 011306 (2003); the same as
    ``jax_md.energy.soft_sphere``.
    """
    names = ("sigma", "epsilon", "alpha")
    return PairPotential(
        "soft_sphere",
        _soft_sphere,
        names,
        _first,
        _at_contact,
        (arithmetic,) * 3,
        (0.0, 0.0, 1.0),
        repulsive=True,
        cases=((_harmonic_sphere, "alpha", 2.0), (_hertzian_sphere, "alpha", 2.5)),
    )


def lennard_jones(onset: float = 2.0, cutoff: float = 2.5) -> PairPotential:
    """Lennard-Jones, phi(r) = 4 epsilon ((sigma/r)^12 - (sigma/r)^6) S(r), with the C2 switch S of
    :class:`switched`.

    Parameters: ``sigma``, ``epsilon``. ``onset`` and ``cutoff`` are lengths in the units of r, not
    multiples of sigma: they stay where they are when sigma changes. Give them for sigma = 1 units
    or scale them yourself.
    """
    phi = switched(_lennard_jones, onset, cutoff)
    return from_pair(
        phi, ("sigma", "epsilon"), cutoff, (onset, cutoff), name="lennard_jones", positive=True
    )


def morse(onset: float = 2.0, cutoff: float = 2.5) -> PairPotential:
    """Morse, phi(r) = epsilon (exp(-2 alpha (r - sigma)) - 2 exp(-alpha (r - sigma))) S(r), S as in
    lennard_jones.

    Parameters: ``sigma`` the distance of the minimum, ``epsilon`` its depth, ``alpha`` an inverse
      width.
    """
    phi = switched(_morse, onset, cutoff)
    return from_pair(
        phi, ("sigma", "epsilon", "alpha"), cutoff, (onset, cutoff), name="morse", positive=True
    )


def harmonic_morse() -> PairPotential:
    """Harmonic-Morse discs or spheres: a spring within contact, the well of Morse beyond it.

        phi(r) = stiffness / 2 (sigma - r)^2 - epsilon,                                        r < sigma,
        phi(r) = epsilon (exp(-2 alpha (r - sigma)) - 2 exp(-alpha (r - sigma))) S(r),         r >= sigma.

    Parameters: ``sigma`` the sum of the two radii (a particle's value is its diameter), ``epsilon``
    the depth of the well, ``alpha`` an inverse width, ``stiffness`` an energy a squared length. S
    is the C2 switch of :class:`switched` from sigma + 5 / alpha, where 1.3 % of the depth are left,
    to sigma + 9.9 / alpha: by the potential's definition onset and
    cutoff follow the parameters. Breakpoints: contact, r = sigma, where the second derivative jumps
    from ``stiffness`` to 2 alpha^2 epsilon; the onset; the cutoff. Source: Zu and Goodrich,
    arXiv:2404.15101, who switch by a C1 polynomial in r^2, so that their second derivatives jump at
    onset and cutoff as well.
    """
    names = ("sigma", "epsilon", "alpha", "stiffness")
    return from_pair(
        _harmonic_morse,
        names,
        _harmonic_morse_end,
        _harmonic_morse_points,
        name="harmonic_morse",
        positive=True,
    )


def harmonic_bonds(bonds: Any) -> BondedPotential:
    """Springs between listed pairs, phi(r) = stiffness / 2 (r - length)^2.

    Args:
      bonds: (m, 2) particle indices.

    Parameters: ``stiffness`` and ``length`` (rest length), each a scalar or one value a bond. A
    bond joins the nearest images of its two particles, so it must stay shorter than half the
    smallest height of a periodic cell.
    """
    array = np.asarray(real_array("bonds", bonds, "give integers of shape (m, 2)."))
    array = np.zeros((0, 2), int) if array.shape in ((0,), (0, 2)) else array
    if array.ndim != 2 or array.shape[1] != 2 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(
            f"bonds have shape {array.shape} and type {array.dtype}: give integers of shape (m, 2)."
        )
    if (array[:, 0] == array[:, 1]).any():
        raise InputError(
            f"bond {int(np.argmax(array[:, 0] == array[:, 1]))} joins a particle to itself:"
            " remove it."
        )
    return BondedPotential(
        array, "harmonic_bonds", _spring, ("stiffness", "length"), (-np.inf, 0.0)
    )


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
) -> PairPotential:
    """A pair potential of your own, U = sum over pairs of phi(r_ij, p_ij).

    Args:
      phi: ``phi(r, *parameters)``, elementwise in jax.numpy, at least twice differentiable away
        from the breakpoints, and zero at and beyond the cutoff (wrap it in :class:`switched` to
        make it so). A system that is made with it tries it, and its derivatives up to the third,
        within the cutoff and beyond. A module-level function compiles once, and pickle takes it to
        other processes; a lambda made anew for each system compiles anew, and only cloudpickle
        takes it there.
      parameters: their names, in phi's order.
      cutoff: a length, or a function of the pair parameters (monotone in each) where the potential
        ties it to them; None for infinite range: all pairs, which suits up to a few thousand
        particles, open boundaries only.
      breakpoints: lengths, or a function of the pair parameters returning them, where a derivative
        of phi jumps or diverges. The validity radius of a sensitivity rests on them.
      mixing: how two particles' values make a pair's, by name; the arithmetic mean where nothing is
        said.
      positive: refuse parameters that are not positive.
      repulsive: declare that phi only repels and vanishes beyond its cutoff, so that rattlers are
        found by counting contacts.
    """
    names = _names(parameters)
    _check_takes(phi, names)
    if mixing is not None and not isinstance(mixing, Mapping):
        raise InputError(
            f"mixing is a {type(mixing).__name__}: give a dict of parameter names and functions."
        )
    mixing = dict(mixing or {})
    for key in mixing:
        if key not in names:
            raise InputError(
                f"mixing names {key!r}, which is no parameter: use one of {', '.join(names)}."
            )
    if cutoff is not None and not callable(cutoff):
        need = "give a positive length, or None for infinite range."
        cutoff = real_number("cutoff", cutoff, need)
        if not 0 < cutoff < np.inf:
            raise InputError(f"cutoff is {cutoff}: {need}")
    points = breakpoints if callable(breakpoints) else FixedLengths(_lengths(breakpoints))
    label = name or getattr(phi, "__name__", "pair potential")
    rules = tuple(mixing.get(n, arithmetic) for n in names)
    return PairPotential(
        label,
        phi,
        names,
        cutoff,
        points,
        rules,
        (0.0 if positive else -np.inf,) * len(names),
        repulsive,
    )


def _names(parameters: Any) -> tuple[str, ...]:
    """The names of a potential's parameters."""
    if isinstance(parameters, str | bytes) or not np.iterable(parameters):
        raise InputError(f"parameters is {short(parameters)}: give a tuple of names.")
    names = tuple(parameters)
    for name in names:
        if not isinstance(name, str):
            raise InputError(f"parameters has {short(name)} among them: give a tuple of names.")
    return names


def _lengths(breakpoints: Any) -> tuple[float, ...]:
    array = np.asarray(real_array("breakpoints", breakpoints, "give lengths."), float)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise InputError(f"breakpoints is {short(breakpoints)}: give lengths, in a tuple.")
    return tuple(array.tolist())


def _check_takes(phi: Phi, names: tuple[str, ...]) -> None:
    """phi must take r and as many parameters as are named."""
    if not callable(phi):
        raise InputError(f"phi is {short(phi)}: give a function of r and the parameters.")
    try:
        inspect.signature(phi).bind(*range(1 + len(names)))
    except TypeError as error:
        raise InputError(
            f"phi does not take r and the {len(names)} parameters {', '.join(names)} ({error}):"
            " name its parameters in its order."
        ) from error
    except ValueError:
        pass  # a builtin without a signature


def from_energy(
    fn: Callable[..., jax.Array],
    parameters: Sequence[str],
    *,
    shared: Sequence[str] = (),
    name: str | None = None,
) -> EnergyPotential:
    """Any other energy, ``fn(positions, params, displacement) -> scalar``, over all pairs.

    Args:
      fn: ``positions`` (n, d); ``params`` a dict of the named parameters; ``displacement(a, b)``
        the (deformed, nearest image) vector a - b of two points (d,). The many-body potentials of
        jax-md fit: ``lambda R, p, d: jax_md.energy.stillinger_weber(d, epsilon=p["epsilon"])(R)``.
      parameters: their names; any shapes.
      shared: those among them that another potential of a sum has as well: one value serves both.
    """
    if not callable(fn):
        raise InputError(
            f"fn is {short(fn)}: give a function of positions, params and displacement."
        )
    names = _names(parameters)
    unknown = [name for name in shared if name not in names]
    if isinstance(shared, str) or unknown:
        raise InputError(
            f"shared is {short(shared)}: give names among the parameters {list(names)}."
        )
    return EnergyPotential(
        name or getattr(fn, "__name__", "energy"), fn, names, names, tuple(shared)
    )
