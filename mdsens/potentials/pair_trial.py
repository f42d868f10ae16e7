"""A pair potential tried at a few distances: phi and its derivatives up to the third, as the
package takes them.

Where one of them is no number, everything that is made of it ends in one: forces take the first,
Hessians the second, derivatives of moduli the third. It is told when a system is made, where it
names the potential and the distance, and not when a minimization ends in NOT_FINITE.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.errors import InputError

__all__ = ["NAMES", "Few", "Trial", "check_end", "check_trial", "derivatives", "trial_of"]

NAMES = ("phi", "phi'", "phi''", "phi'''")
INSIDE = (0.53, 0.71, 0.92)  # of the cutoff; no round numbers, where breakpoints may stand
BEYOND = (1.07, 1.31)  # of the cutoff: pairs that a list of neighbors holds beside those within it
END = 1e-6  # of phi inside: what may be left of it at the cutoff
PADDING = 1.0  # the distance that stands in the empty places of lists
PARTICLES, PAIRS = 8, 28  # that are tried at most: the pairs of so many particles
GUARD = "where() takes derivatives of both its sides, so guard the argument inside of it as well"
SWITCH = "wrap it, ms.potentials.switched(phi, onset, cutoff)"


def derivatives(phi: Any, what: str, r: jax.Array, values: Any) -> jax.Array:
    """phi(r, *values) and its derivatives by r up to the third, (4, *shape of r). Traceable.

    Raises:
      InputError: phi is not elementwise, or not real; ``what`` names it.
    """

    def energy(r: jax.Array) -> jax.Array:
        return _real(phi(r, *values), what, r)

    # in reverse mode first, as forces are: forward mode is spared the NaN of a where() without a
    # guard
    slope, ones = jax.grad(lambda r: jnp.sum(energy(r))), jnp.ones_like(r)

    def second(r: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(slope, (r,), (ones,))

    (first, bent), (_, third) = jax.jvp(second, (r,), (ones,))
    return jnp.stack([energy(r), first, bent, third])


def _real(energy: Any, what: str, r: jax.Array) -> jax.Array:
    """phi of some distances, or an error where it is not elementwise or not real."""
    found = jnp.asarray(energy)
    if found.shape != r.shape:
        raise InputError(
            f"{what} returns shape {found.shape} for distances of shape {r.shape}: return one"
            " number for each."
        )
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise InputError(f"{what} returns {found.dtype}: return real floating-point numbers.")
    return found


class Few(NamedTuple):
    """A few particles of a system, whose pairs have most values of the parameters between them.

    Attributes:
      positions: (PARTICLES, d).
      species: (PARTICLES,), None without species.
      params: those of particles for these alone.
      pairs: (2, PAIRS) different particles among them, some pairs more than once.
    """

    positions: Any
    species: Any
    params: dict[str, Any]
    pairs: Any

    @classmethod
    def of(cls, positions: Any, params: Any, species: Any, species_count: int) -> Few | None:
        """Of a system; None of one particle."""
        n, chosen = positions.shape[0], []
        if species is None:
            for value in params.values():
                if np.shape(value) == (n,):
                    chosen += [int(np.argmin(value)), int(np.argmax(value))]
        else:
            kinds = np.asarray(species)
            there = np.unique(kinds)
            some = there[np.unique(np.linspace(0, there.size - 1, PARTICLES // 2).astype(int))]
            for kind in some:  # two of each, for the pairs of a kind with itself
                chosen += np.flatnonzero(kinds == kind)[:2].tolist()
        chosen += np.linspace(0, n - 1, PARTICLES).astype(int).tolist()
        few = np.array(list(dict.fromkeys(chosen))[:PARTICLES])
        pairs = np.stack(np.triu_indices(few.size, 1))
        if not pairs.size:
            return None
        # always so many, so that one compilation serves every system; not as many as species, whose
        # values these would be taken for
        count = PARTICLES + (species_count == PARTICLES)
        few = np.resize(few, count)
        of_particles = (n,) if species is None or n != species_count else ()

        def of_few(value: Any) -> Any:
            return (
                np.asarray(value)[few]
                if np.shape(value) == of_particles and of_particles
                else np.asarray(value)
            )

        return cls(
            np.asarray(positions)[few],
            None if species is None else np.asarray(species)[few],
            {name: of_few(value) for name, value in params.items()},
            np.resize(pairs.T, (PAIRS, 2)).T,
        )


class Trial(NamedTuple):
    """A pair potential at a few distances of each of some pairs.

    Attributes:
      r: (7, k) within the cutoff, at it, beyond it and of empty places; of a pair without one, its
        own distance.
      orders: (4, 7, k) phi and its derivatives there.
      ends: (k,) the cutoff; inf for none.
      points: (m, k) the breakpoints.
      values: (k,) of each parameter.
    """

    r: Any
    orders: Any
    ends: Any
    points: Any
    values: Any


def trial_of(
    phi: Any, what: str, apart: jax.Array, ends: jax.Array, points: jax.Array, values: Any
) -> Trial:
    """The trial of pairs with these distances, cutoffs, breakpoints and parameters. Traceable."""
    shares = jnp.array([*INSIDE, 1.0, *BEYOND], apart.dtype)[:, None]
    some = jnp.where(
        ends > 0, ends, PADDING
    )  # a pair that does not interact at all is tried wherever it may stand
    limited = jnp.concatenate([shares * some, jnp.full((1, apart.size), PADDING, apart.dtype)])
    r = jnp.where(jnp.isinf(ends), apart, limited)
    values = [jnp.broadcast_to(v, apart.shape) for v in values]
    orders = derivatives(phi, what, r, [jnp.broadcast_to(v, r.shape) for v in values])
    return Trial(r, orders, ends, points, values)


def check_end(name: str, phi: Callable[..., Any], end: float, values: Any) -> None:
    """Refuse a potential that is not zero at its cutoff: a jump of the energy is a force that
    nobody sees.
    """
    r = end * jnp.array([1.0, *INSIDE])
    left, *inside = np.asarray(_real(phi(r, *values), f"phi of {name}", r)).tolist()
    if not np.isfinite(left):
        raise InputError(
            f"{name} is {left:.3g} at its cutoff {end:g}, where it must be zero: {GUARD}."
        )
    if abs(left) > END * max((abs(x) for x in inside if np.isfinite(x)), default=0.0):
        raise InputError(
            f"{name} is {abs(left):.3g} at its cutoff {end:g}, where it must be zero: shift it, or"
            f" {SWITCH}."
        )


def check_trial(name: str, names: Any, trial: Trial) -> None:
    """Refuse a potential that is no number where pairs of particles may stand.

    Within the cutoff it may be infinite, in a steep core; at the cutoff itself derivatives may jump
    or diverge, so that these are looked at to both sides of it; beyond, they must be finite and phi
    zero.
    """
    r, orders, ends, points, values = jax.tree.map(np.asarray, trial)
    if np.isnan(ends).any() or np.isnan(points).any():
        which = "breakpoints" if np.isnan(points).any() else "cutoff"
        raise InputError(
            f"the function of the {which} of {name} gives nan: mend it, or the parameters."
        )
    limited = np.isfinite(ends)

    def refuse(rows: slice, count: int, bad: np.ndarray, where: str, remedy: str) -> None:
        """Refuse the lowest order that is bad in some rows, at the first place."""
        if bad[:count].any():
            order, row, k = (int(i) for i in np.argwhere(bad[:count])[0])
            shown = ", ".join(f"{n} = {v[k]:.6g}" for n, v in zip(names, values, strict=True))
            place = f"r = {r[rows][row, k]:.6g}{f' with {shown}' if shown else ''}"
            value = orders[order, rows][row, k]
            raise InputError(
                f"{NAMES[order]} of {name} is {value:.3g} at {place}{where}: {remedy}."
            )

    within, end, beyond, padding = slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 7)
    infinite = ~np.isfinite(orders) & limited
    nan = np.isnan(orders)
    check = f"check its parameters; {GUARD}"
    refuse(within, 4, nan[:, within] & ~limited, ", where particles stand", check)
    refuse(within, 4, nan[:, within], ", within its cutoff", check)
    refuse(end, 1, infinite[:, end], ", its cutoff, where it must be zero", GUARD)
    refuse(beyond, 4, infinite[:, beyond], ", beyond its cutoff, where it must be zero", GUARD)
    empty = ", the distance that stands in the empty places of lists of neighbors"
    refuse(padding, 4, infinite[:, padding], empty, f"{GUARD}, or take units of another size")
    inside, left = np.abs(orders[0, within]), np.abs(orders[0, end])
    most = np.maximum(END * np.max(inside, axis=0, initial=0.0, where=np.isfinite(inside)), left)
    grown = (np.abs(orders[:, beyond]) > most) & limited
    remedy = f"take jnp.where(r < cutoff, ..., 0), or {SWITCH}"
    refuse(beyond, 1, grown, ", beyond its cutoff, where it must be zero", remedy)
