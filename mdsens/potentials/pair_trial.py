"""Test of a pair potential phi(r) at a few distances r, made when a system is created.

phi and its first three derivatives are evaluated as the package evaluates them. A value that is NaN
or infinite would spoil everything computed from it: forces are computed from the first derivative,
Hessians from the second, derivatives of the moduli from the third. The test raises an error that
names the potential and the distance. Without the test, a minimization would only end with the
status NOT_FINITE.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mdsens._util.errors import InputError

__all__ = ["NAMES", "Few", "Trial", "check_end", "check_trial", "derivatives", "trial_of"]

NAMES = ("phi", "phi'", "phi''", "phi'''")
# Distances inside and outside, in units of the cutoff: no round numbers, where breakpoints may be.
# Outside, because a neighbor list also holds pairs somewhat farther apart than the cutoff.
INSIDE = (0.53, 0.71, 0.92)
BEYOND = (1.07, 1.31)
# What may be left of phi at the cutoff, as a share of its largest value inside.
END = 1e-6
# The distance that stands in the empty places of neighbor lists.
PADDING = 1.0
# Particles tested at most, and the number of their pairs.
PARTICLES = 8
PAIRS = 28
# The remedies of error messages.
GUARD = "where() takes derivatives of both its sides, so guard the argument inside of it as well"
SWITCH = "wrap it, ms.potentials.switched(phi, onset, cutoff)"


def derivatives(
    phi: Callable[..., Any], what: str, r: jax.Array, values: Sequence[ArrayLike]
) -> jax.Array:
    """Compute a pair energy phi(r, *values) and its first three derivatives by the distance r.

    The result has the shape (4, *shape of r). This function can be traced by jax.

    Raises:
      InputError: phi is not elementwise, or not real; the message calls phi ``what``.
    """

    def energy(r: jax.Array) -> jax.Array:
        return _checked_energy(phi(r, *values), what, r)

    # The first derivative in reverse mode, as forces are computed: forward mode does not have the
    # NaN of a where() without a guard.
    # phi is elementwise, so that the gradient of the sum has the derivative at each distance.
    slope = jax.grad(lambda r: jnp.sum(energy(r)))
    ones = jnp.ones_like(r)

    def first_and_second(r: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(slope, (r,), (ones,))

    (first, second), (_, third) = jax.jvp(first_and_second, (r,), (ones,))
    return jnp.stack([energy(r), first, second, third])


def _checked_energy(energy: ArrayLike, what: str, r: jax.Array) -> jax.Array:
    """Return the values of a pair energy at distances r as an array.

    Raises:
      InputError: there is not one real number for each distance; the message calls the pair energy
        ``what``.
    """
    array = jnp.asarray(energy)
    if array.shape != r.shape:
        raise InputError(
            f"{what} returns shape {array.shape} for distances of shape {r.shape}: return one"
            " number for each distance."
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise InputError(f"{what} returns {array.dtype}: return real floating-point numbers.")
    return array


class Few(NamedTuple):
    """A few particles of a system, chosen so that their pairs cover most values of the parameters.

    Attributes:
      positions: (k, d) positions of the k chosen particles.
      species: (k,) species of the chosen particles; None without species.
      params: the parameters of the potential; a parameter with one value per particle has only the
        values of the chosen particles.
      pairs: (2, m) pairs of different particles, each particle given by its number from 0 to k - 1
        among the chosen; some pairs are repeated.
    """

    positions: Any
    species: Any
    params: dict[str, Any]
    pairs: Any

    @classmethod
    def of(
        cls,
        positions: jax.Array,
        params: Mapping[str, Any],
        species: jax.Array | None,
        species_count: int,
    ) -> Few | None:
        """Choose a few particles of a system and some of their pairs.

        The result is None for a system of a single particle, which has no pairs.
        """
        n = positions.shape[0]
        chosen = []
        if species is None:
            # the particles with the least and the largest value of each parameter
            for value in params.values():
                if np.shape(value) == (n,):
                    chosen += [int(np.argmin(value)), int(np.argmax(value))]
        else:
            # two particles of each of some species, for the pairs of a species with itself
            kinds = np.asarray(species)
            present = np.unique(kinds)
            spread = np.unique(np.linspace(0, present.size - 1, PARTICLES // 2).astype(int))
            for kind in present[spread]:
                chosen += np.flatnonzero(kinds == kind)[:2].tolist()
        chosen += np.linspace(0, n - 1, PARTICLES).astype(int).tolist()
        # A dict keeps the order and drops repetitions: the particles that were chosen first stay.
        indices = np.array(list(dict.fromkeys(chosen))[:PARTICLES])
        pairs = np.stack(np.triu_indices(indices.size, 1))
        if not pairs.size:
            return None
        # Repeated up to a fixed number, so that one compilation serves every system. It must differ
        # from the number of species, or values per particle would be taken for values per species.
        count = PARTICLES + (species_count == PARTICLES)
        # np.resize repeats the array, unlike the method of the same name, which appends zeros.
        indices = np.resize(indices, count)
        # with as many species as particles, (n,) values are per species
        per_particle = species is None or n != species_count

        def of_few(value: ArrayLike) -> np.ndarray:
            array = np.asarray(value)
            return array[indices] if per_particle and np.shape(value) == (n,) else array

        return cls(
            positions=np.asarray(positions)[indices],
            species=None if species is None else np.asarray(species)[indices],
            params={name: of_few(value) for name, value in params.items()},
            # np.resize works on the flat array: with a pair in each row, pairs stay whole.
            pairs=np.resize(pairs.T, (PAIRS, 2)).T,
        )


class Trial(NamedTuple):
    """A pair potential evaluated at a few distances for each of k pairs.

    Attributes:
      r: (7, k) distances: three within the cutoff, the cutoff, two beyond the cutoff, and 1, the
        distance in those places of a neighbor list that hold no pair. For a pair without a cutoff,
        all seven are the actual distance of the pair.
      orders: (4, 7, k) the pair energy and its first three derivatives at these distances.
      ends: (k,) the cutoff of each pair; inf without a cutoff.
      points: (m, k) m breakpoints of each pair, distances at which a derivative of the potential
        jumps or diverges.
      values: the parameters, each an array (k,) of the pairs' values.
    """

    r: Any
    orders: Any
    ends: Any
    points: Any
    values: Any


def trial_of(
    phi: Callable[..., Any],
    what: str,
    apart: jax.Array,
    ends: jax.Array,
    points: jax.Array,
    values: Sequence[jax.Array],
) -> Trial:
    """Evaluate a pair potential and its first three derivatives at seven distances for k pairs.

    This function can be traced by jax.

    Args:
      phi: the pair potential.
      what: name of the potential in errors.
      apart: (k,) distances of the pairs.
      ends: (k,) cutoffs of the pairs; inf without a cutoff.
      points: (m, k) breakpoints, distances where a derivative of the potential jumps or diverges.
      values: the parameters, each (k,) or a scalar.
    """
    shares = jnp.array([*INSIDE, 1.0, *BEYOND], apart.dtype)[:, None]
    # a pair with a cutoff of zero never interacts; it is evaluated as if its cutoff were PADDING
    lengths = jnp.where(ends > 0, ends, PADDING)
    limited = jnp.concatenate([shares * lengths, jnp.full((1, apart.size), PADDING, apart.dtype)])
    r = jnp.where(jnp.isinf(ends), apart, limited)
    values = [jnp.broadcast_to(v, apart.shape) for v in values]
    orders = derivatives(phi, what, r, [jnp.broadcast_to(v, r.shape) for v in values])
    return Trial(r, orders, ends, points, values)


def check_end(name: str, phi: Callable[..., Any], end: float, values: Sequence[jax.Array]) -> None:
    """Raise InputError if a pair potential is not zero at its cutoff.

    The energy would jump at the cutoff, and no derivative would show the force that belongs to the
    jump.

    Args:
      name: name of the potential.
      phi: the pair potential.
      end: the cutoff of the potential.
      values: the parameters of phi, scalars.
    """
    r = end * jnp.array([1.0, *INSIDE])
    energies = _checked_energy(phi(r, *values), f"phi of {name}", r)
    left, *inside = np.asarray(energies).tolist()
    if not np.isfinite(left):
        raise InputError(
            f"{name} is {left:.3g} at its cutoff {end:g}, where it must be zero: {GUARD}."
        )
    if abs(left) > END * max((abs(x) for x in inside if np.isfinite(x)), default=0.0):
        raise InputError(
            f"{name} is {abs(left):.3g} at its cutoff {end:g}, where it must be zero: shift it, or"
            f" {SWITCH}."
        )


def check_trial(name: str, names: Sequence[str], trial: Trial) -> None:
    """Raise InputError if a pair potential is not finite at distances that pairs may have.

    Within the cutoff the potential and its derivatives may be infinite, in a steep core, but not
    NaN. At the cutoff derivatives may jump or diverge, so that the derivatives are tested only on
    both sides of the cutoff. Beyond the cutoff the derivatives must be finite and the potential
    zero.

    Args:
      name: name of the potential.
      names: names of the potential's parameters.
      trial: values and derivatives of the potential at the tested distances.
    """
    r, orders, ends, points, values = jax.tree.map(np.asarray, trial)
    if np.isnan(ends).any() or np.isnan(points).any():
        which = "breakpoints" if np.isnan(points).any() else "cutoff"
        raise InputError(
            f"the function of the {which} of {name} gives nan: correct this function, or the"
            " parameters."
        )
    limited = np.isfinite(ends)

    def refuse(rows: slice, count: int, bad: np.ndarray, where: str, remedy: str) -> None:
        """Raise InputError if the potential or one of its derivatives is bad at some distances.

        Args:
          rows: the slice of the seven tested distances to which the second axis of ``bad`` belongs.
          count: how many orders are tested, from the potential itself (order 0) upward.
          bad: True where the derivative of an order is bad, (order, distance, pair).
          where: words of the message that say where the distance lies.
          remedy: words of the message that say what to do.
        """
        if bad[:count].any():
            order, row, k = (int(i) for i in np.argwhere(bad[:count])[0])
            shown = ", ".join(f"{n} = {v[k]:.6g}" for n, v in zip(names, values, strict=True))
            place = f"r = {r[rows][row, k]:.6g}{f' with {shown}' if shown else ''}"
            value = orders[order, rows][row, k]
            raise InputError(
                f"{NAMES[order]} of {name} is {value:.3g} at {place}{where}: {remedy}."
            )

    # rows of Trial.r
    within = slice(0, 3)
    end = slice(3, 4)
    beyond = slice(4, 6)
    padding = slice(6, 7)
    infinite = ~np.isfinite(orders) & limited
    nan = np.isnan(orders)
    check = f"check its parameters; {GUARD}"
    # without a cutoff all seven rows are the same distance, and one look is enough
    refuse(within, 4, nan[:, within] & ~limited, ", where particles stand", check)
    refuse(within, 4, nan[:, within], ", within its cutoff", check)
    refuse(end, 1, infinite[:, end], ", its cutoff, where it must be zero", GUARD)
    refuse(beyond, 4, infinite[:, beyond], ", beyond its cutoff, where it must be zero", GUARD)
    empty = ", the distance that stands in the empty places of lists of neighbors"
    refuse(padding, 4, infinite[:, padding], empty, f"{GUARD}, or take units of another size")
    # beyond the cutoff, what is left of phi may be END of its largest value inside, or as much as
    # is left at the cutoff
    inside = np.abs(orders[0, within])
    left = np.abs(orders[0, end])
    most = np.maximum(END * np.max(inside, axis=0, initial=0.0, where=np.isfinite(inside)), left)
    grown = (np.abs(orders[:, beyond]) > most) & limited
    remedy = f"take jnp.where(r < cutoff, ..., 0), or {SWITCH}"
    refuse(beyond, 1, grown, ", beyond its cutoff, where it must be zero", remedy)
