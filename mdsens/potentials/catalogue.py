"""Ready-made interaction potentials, and functions that make a potential of a user's energy.

The pair potentials are written here and not taken from ``jax_md.energy``. The soft sphere of jax-md
has NaN derivatives by ``alpha`` at contact. Its Lennard-Jones potential has a switch that is only
once continuously differentiable, so that Hessians jump, and that moves with ``sigma``, so that
derivatives by ``sigma`` move the cutoff. Many-body potentials of ``jax_md.energy`` can be used by
:func:`from_energy`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from mdsens._util.errors import InputError
from mdsens._util.validation import real_array, real_number, short
from mdsens.potentials.base import (
    BondedPotential,
    EnergyPotential,
    FixedLengths,
    PairPotential,
    Phi,
)
from mdsens.potentials.parameters import (
    Mixing,
    arithmetic,
    checked_cutoff,
    checked_lengths,
    checked_names,
)

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
    """Return sqrt(a b), the geometric mean of two particles' values, for a parameter of their pair.

    For use as ``from_pair(..., mixing={"epsilon": geometric})``.
    """
    return jnp.sqrt(a * b)


@dataclasses.dataclass(frozen=True)
class switched:  # noqa: N801 - used as a function
    """A pair potential phi(r) times a switch S, which is 1 up to ``onset``, 0 from ``cutoff`` on.

        S(x) = 1 - x^3 (10 - 15 x + 6 x^2),     x = (r - onset) / (cutoff - onset),     in between

    S is twice continuously differentiable. Onset and cutoff are lengths in the units of r, so that
    they do not move with the parameters.
    """

    # A record and not a closure: two switches of the same phi, onset and cutoff are equal, so that
    # code compiled for the one serves the other.
    phi: Phi
    onset: float
    cutoff: float

    def __post_init__(self) -> None:
        # a frozen record allows no other way to store the checked floats
        object.__setattr__(self, "onset", real_number("onset", self.onset, "give a length."))
        object.__setattr__(self, "cutoff", real_number("cutoff", self.cutoff, "give a length."))
        if not 0 < self.onset < self.cutoff < np.inf:
            raise InputError(
                f"`onset` is {self.onset} and `cutoff` is {self.cutoff}: give 0 < onset < cutoff."
            )

    def __call__(self, r: jax.Array, *values: jax.Array) -> jax.Array:
        return self.phi(r, *values) * _switch((r - self.onset) / (self.cutoff - self.onset))


def _switch(x: jax.Array) -> jax.Array:
    """Compute the switch 1 - x^3 (10 - 15 x + 6 x^2), with x limited to 0 <= x <= 1.

    The switch falls from 1 to 0, and its first two derivatives are zero at x = 0 and x = 1.
    """
    # outside of 0 to 1 the polynomial would grow again
    x = jnp.clip(x, 0.0, 1.0)
    return 1.0 - x**3 * (10.0 - 15.0 * x + 6.0 * x**2)


def _soft_sphere(r: jax.Array, sigma: jax.Array, epsilon: jax.Array, alpha: jax.Array) -> jax.Array:
    """Compute the pair energy of soft spheres, epsilon / alpha (1 - r / sigma)^alpha for r < sigma.

    The energy is 0 beyond sigma.
    """
    overlap = 1.0 - r / sigma
    inside = overlap > 0
    # where() inside the power: 0**alpha has a NaN tangent by alpha
    return jnp.where(inside, epsilon / alpha * jnp.where(inside, overlap, 1.0) ** alpha, 0.0)


def _harmonic_sphere(
    r: jax.Array, sigma: jax.Array, epsilon: jax.Array, alpha: jax.Array
) -> jax.Array:
    """Compute the pair energy of soft spheres for the exponent alpha = 2.

    The energy is a square here, which is computed faster than a general power."""
    overlap = 1.0 - r * (1.0 / sigma)  # one division, where the derivative by r / sigma has two
    # A zero needs no guard here, since the slope of a square is finite at zero.
    overlap = jnp.where(overlap > 0, overlap, 0.0)
    return 0.5 * epsilon * overlap * overlap


def _hertzian_sphere(
    r: jax.Array, sigma: jax.Array, epsilon: jax.Array, alpha: jax.Array
) -> jax.Array:
    """Compute the pair energy of soft spheres for the exponent alpha = 2.5.

    The energy is a square times a square root here, which is computed faster than a general power.
    """
    overlap = 1.0 - r / sigma
    # where() inside the root: its slope at zero is infinite, which times zero is NaN
    root = jnp.sqrt(jnp.where(overlap > 0, overlap, 1.0))
    return jnp.where(overlap > 0, 0.4 * epsilon * overlap * overlap * root, 0.0)


def _contact(sigma: jax.Array, *rest: jax.Array) -> jax.Array:
    """Return the cutoff of soft spheres, r = sigma, where their surfaces touch."""
    return sigma


def _contact_breakpoint(sigma: jax.Array, *rest: jax.Array) -> tuple[jax.Array, ...]:
    """Return r = sigma, contact, where a derivative of the energy of soft spheres jumps."""
    return (sigma,)


def _lennard_jones(r: jax.Array, sigma: jax.Array, epsilon: jax.Array) -> jax.Array:
    s6 = (sigma / r) ** 6  # squared below: one power in place of two
    return 4.0 * epsilon * (s6 * s6 - s6)


def _morse(r: jax.Array, sigma: jax.Array, epsilon: jax.Array, alpha: jax.Array) -> jax.Array:
    bond = jnp.exp(-alpha * (r - sigma))
    return epsilon * (bond * bond - 2.0 * bond)


# alpha (r - sigma) where the well begins to fade, and where it is zero: Zu and Goodrich's values.
HARMONIC_MORSE_ENDS = (5.0, 9.9)


def _harmonic_morse(
    r: jax.Array, sigma: jax.Array, epsilon: jax.Array, alpha: jax.Array, stiffness: jax.Array
) -> jax.Array:
    gap = r - sigma
    inside = gap < 0
    overlap = jnp.where(inside, gap, 0.0)
    # where() inside the exponential: deep within contact it overflows
    apart = alpha * jnp.where(inside, 0.0, gap)
    bond = jnp.exp(-apart)
    onset, cutoff = HARMONIC_MORSE_ENDS
    # Inside contact ``apart`` is 0 and the well is -epsilon, the constant of the docstring.
    well = epsilon * (bond * bond - 2.0 * bond) * _switch((apart - onset) / (cutoff - onset))
    return 0.5 * stiffness * overlap * overlap + well


def _harmonic_morse_breakpoints(
    sigma: jax.Array, epsilon: jax.Array, alpha: jax.Array, stiffness: jax.Array
) -> tuple[jax.Array, ...]:
    """Return the distances where a derivative of the harmonic-Morse potential jumps.

    These are contact, sigma, and the onset and the cutoff of the switch of the well.
    """
    onset, cutoff = HARMONIC_MORSE_ENDS
    return sigma, sigma + onset / alpha, sigma + cutoff / alpha


def _harmonic_morse_cutoff(
    sigma: jax.Array, epsilon: jax.Array, alpha: jax.Array, stiffness: jax.Array
) -> jax.Array:
    return sigma + HARMONIC_MORSE_ENDS[1] / alpha


def _spring(r: jax.Array, stiffness: jax.Array, length: jax.Array) -> jax.Array:
    return 0.5 * stiffness * (r - length) ** 2


def soft_sphere() -> PairPotential:
    """Make the potential of repulsive soft spheres or discs, with an energy for their overlap.

        phi(r) = epsilon / alpha (1 - r / sigma)^alpha,     r < sigma;     0 beyond.

    Parameters: ``sigma`` the sum of the two radii (a particle's value is its diameter), ``epsilon``
    an energy, ``alpha`` the exponent, above 1: 2 harmonic, 2.5 Hertzian.

    The cutoff is sigma by definition, so that the cutoff follows the parameters. At contact,
    r = sigma, the second derivative of phi jumps for alpha = 2, and the third diverges for
    alpha = 2.5. Source: O'Hern et al., Phys. Rev. E 68, 011306 (2003); phi is the same as that of
    ``jax_md.energy.soft_sphere``.
    """
    names = ("sigma", "epsilon", "alpha")
    return PairPotential(
        name="soft_sphere",
        phi=_soft_sphere,
        names=names,
        cutoff=_contact,
        breakpoints=_contact_breakpoint,
        mixing=(arithmetic,) * 3,
        above=(0.0, 0.0, 1.0),  # at alpha = 1 the force would jump at contact
        repulsive=True,
        finite_force=True,
        cases=((_harmonic_sphere, "alpha", 2.0), (_hertzian_sphere, "alpha", 2.5)),
    )


def lennard_jones(onset: float = 2.0, cutoff: float = 2.5) -> PairPotential:
    """Make the Lennard-Jones potential, phi(r) = 4 epsilon ((sigma/r)^12 - (sigma/r)^6) S(r).

    S is the smooth switch of :class:`switched`, 1 up to ``onset`` and 0 from ``cutoff`` on.
    Parameters: ``sigma``, ``epsilon``. ``onset`` and ``cutoff`` are lengths in the units of r, not
    multiples of sigma: they stay where they are when sigma changes. Their defaults are for
    sigma = 1; scale them for another sigma.
    """
    phi = switched(_lennard_jones, onset, cutoff)
    return from_pair(
        phi, ("sigma", "epsilon"), cutoff, (onset, cutoff), name="lennard_jones", positive=True
    )


def morse(onset: float = 2.0, cutoff: float = 2.5) -> PairPotential:
    """Make the Morse potential.

        phi(r) = epsilon (exp(-2 alpha (r - sigma)) - 2 exp(-alpha (r - sigma))) S(r)

    S is the smooth switch of :class:`switched`, 1 up to ``onset`` and 0 from ``cutoff`` on.
    Parameters: ``sigma`` the distance of the minimum, ``epsilon`` the depth of the minimum,
    ``alpha`` an inverse width. ``onset`` and ``cutoff`` are lengths in the units of r, as in
    :func:`lennard_jones`.
    """
    phi = switched(_morse, onset, cutoff)
    return from_pair(
        phi, ("sigma", "epsilon", "alpha"), cutoff, (onset, cutoff), name="morse", positive=True
    )


def harmonic_morse() -> PairPotential:
    """Make the potential of harmonic-Morse spheres: a spring in contact, a Morse well beyond.

        phi(r) = stiffness / 2 (sigma - r)^2 - epsilon,                                   r < sigma,
        phi(r) = epsilon (exp(-2 alpha (r - sigma)) - 2 exp(-alpha (r - sigma))) S(r),    r >= sigma

    Parameters: ``sigma`` the sum of the two radii (a particle's value is its diameter), ``epsilon``
    the depth of the well, ``alpha`` an inverse width, ``stiffness`` an energy per squared length. S
    is the smooth switch of :class:`switched`. It falls from 1 at the onset, sigma + 5 / alpha,
    where 1.3 % of the depth are left, to 0 at the cutoff, sigma + 9.9 / alpha: by the potential's
    definition onset and cutoff follow the parameters.

    At contact, r = sigma, the second derivative of phi jumps from ``stiffness`` to
    2 alpha^2 epsilon. At the onset and at the cutoff the third derivative jumps. Source: Zu and
    Goodrich, arXiv:2404.15101. Their switch is a polynomial in r^2 that is only once continuously
    differentiable, so that their second derivatives jump at onset and cutoff as well.
    """
    names = ("sigma", "epsilon", "alpha", "stiffness")
    return from_pair(
        _harmonic_morse,
        names,
        _harmonic_morse_cutoff,
        _harmonic_morse_breakpoints,
        name="harmonic_morse",
        positive=True,
    )


def harmonic_bonds(bonds: ArrayLike) -> BondedPotential:
    """Make a potential of springs between listed pairs, phi(r) = stiffness / 2 (r - length)^2.

    Args:
      bonds: (m, 2) indices of the particles that each spring joins.

    Parameters: ``stiffness`` and ``length`` (rest length), each a scalar or one value per bond. A
    bond joins the nearest images of its two particles, so it must stay shorter than half the
    smallest height of a periodic cell.
    """
    array = np.asarray(real_array("bonds", bonds, "give integers of shape (m, 2)."))
    # an empty list is an array of floats, which the test for integers would refuse
    array = np.zeros((0, 2), int) if array.shape in ((0,), (0, 2)) else array
    if array.ndim != 2 or array.shape[1] != 2 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(
            f"`bonds` has shape {array.shape} and type {array.dtype}: give integers of shape (m,"
            " 2)."
        )
    if (array[:, 0] == array[:, 1]).any():
        raise InputError(
            f"bond {int(np.argmax(array[:, 0] == array[:, 1]))} joins a particle to itself:"
            " remove this bond."
        )
    names = ("stiffness", "length")
    above = (-np.inf, 0.0)  # any stiffness, a positive length
    return BondedPotential(array, "harmonic_bonds", _spring, names, above)


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
    """Make a pair potential of a user's function phi, U = sum over pairs of phi(r_ij, p_ij).

    r_ij is the distance of two particles, and p_ij are the parameters of the pair.

    Args:
      phi: ``phi(r, *parameters)``, elementwise in jax.numpy, at least twice differentiable away
        from the breakpoints, and zero at and beyond the cutoff (wrap phi in :class:`switched` to
        make it zero there). ``System.create`` evaluates phi and its first three derivatives within
        the cutoff and beyond. A module-level function compiles once, and pickle can send it to
        other processes; a lambda that is defined again for each system compiles again, and only
        cloudpickle can send it.
      parameters: the parameters' names, in phi's order.
      cutoff: a length, or a function of the pair parameters (monotone in each) that returns the
        length; None for infinite range. All pairs then interact, which is feasible for up to a few
        thousand particles, with open boundaries only.
      breakpoints: distances where a derivative of phi jumps or diverges, or a function of the pair
        parameters that returns these distances. The range over which a sensitivity is valid is
        computed from them.
      mixing: dict from parameter names to functions that compute a pair's value from the two
        particles' values; parameters that are not named take the arithmetic mean.
      name: name of the potential in messages and tables; the name of phi where None.
      positive: True to refuse parameters that are not positive.
      repulsive: True to declare that phi only repels and vanishes beyond its cutoff, so that
        rattlers are determined by counting contacts.
    """
    names = checked_names(parameters)
    _check_arguments(phi, names)
    rules = _checked_mixing(mixing, names)
    if cutoff is not None and not callable(cutoff):
        cutoff = checked_cutoff(cutoff, "give a positive length, or None for infinite range.")
    points = breakpoints if callable(breakpoints) else FixedLengths(checked_lengths(breakpoints))
    return PairPotential(
        name=name or getattr(phi, "__name__", "pair potential"),
        phi=phi,
        names=names,
        cutoff=cutoff,
        breakpoints=points,
        mixing=tuple(rules.get(n, arithmetic) for n in names),
        above=(0.0 if positive else -np.inf,) * len(names),
        repulsive=repulsive,
    )


def _checked_mixing(
    mixing: Mapping[str, Mixing] | None, names: tuple[str, ...]
) -> dict[str, Mixing]:
    """Check the mixing functions that a user gives, and return them as a dict by parameter name.

    ``names`` are the names of all parameters; the dict is empty for None.
    """
    if mixing is not None and not isinstance(mixing, Mapping):
        raise InputError(
            f"`mixing` is a {type(mixing).__name__}: give a dict of parameter names and functions."
        )
    rules = dict(mixing or {})
    for key in rules:
        if key not in names:
            raise InputError(
                f"`mixing` names {key!r}, which is no parameter: use one of {', '.join(names)}."
            )
    return rules


def _check_arguments(phi: Phi, names: tuple[str, ...]) -> None:
    """Raise InputError unless a user's phi takes a distance r and one argument per parameter name.

    phi is the function that computes the pair energy.
    """
    if not callable(phi):
        raise InputError(f"`phi` is {short(phi)}: give a function of r and the parameters.")
    try:
        # bind() takes any values: only their number counts
        inspect.signature(phi).bind(*range(1 + len(names)))
    except TypeError as error:
        raise InputError(
            f"`phi` does not take r and the {len(names)} parameters {', '.join(names)} ({error}):"
            " name the parameters of phi, in the order of its arguments."
        ) from error
    except ValueError:
        pass  # a built-in function without a signature: nothing to check


def from_energy(
    fn: Callable[..., jax.Array],
    parameters: Sequence[str],
    *,
    shared: Sequence[str] = (),
    name: str | None = None,
) -> EnergyPotential:
    """Make a potential of any energy function ``fn(positions, params, displacement) -> scalar``.

    Args:
      fn: function that returns the energy, summed over all pairs or particles. Its arguments are
        ``positions`` (n, d); ``params``, a dict of the named parameters; and ``displacement``, a
        function of two points a and b (d,) that returns the vector a - b between nearest images,
        deformed by the strain. The many-body potentials of jax-md can be used:
        ``lambda R, p, d: jax_md.energy.stillinger_weber(d, epsilon=p["epsilon"])(R)``.
      parameters: the parameters' names; their values may have any shape, and be trees of arrays
        (dicts, lists and tuples of them).
      shared: names of parameters that another potential in a sum has as well; both use the same
        value.
      name: name of the potential in messages and tables; the name of fn where None.
    """
    if not callable(fn):
        raise InputError(
            f"`fn` is {short(fn)}: give a function of positions, params and displacement."
        )
    names = checked_names(parameters)
    unknown = [name for name in shared if name not in names]
    if isinstance(shared, str) or unknown:
        raise InputError(
            f"`shared` is {short(shared)}: give names among the parameters {list(names)}."
        )
    label = name or getattr(fn, "__name__", "energy")
    return EnergyPotential(label, fn, names=names, keys=names, shared=tuple(shared))
