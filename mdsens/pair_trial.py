"""A pair potential tried at a few distances: phi and its derivatives up to the third, as the package takes them.

Where one of them is no number, everything that is made of it ends in one: forces take the first, Hessians the second,
derivatives of moduli the third. It is told when a system is made, where it names the potential and the distance, and
not when a minimisation ends in NOT_FINITE.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens.implicit.status import InputError

__all__ = ["NAMES", "check_end", "check_kinds", "derivatives", "few_pairs"]

NAMES = ("phi", "phi'", "phi''", "phi'''")
INSIDE = (0.53, 0.71, 0.92)  # of the cutoff; no round numbers, where breakpoints may stand
BEYOND = (1.07, 1.31)  # of the cutoff: pairs that a list of neighbours holds beside those within it
END = 1e-6  # of phi inside: what may be left of it at the cutoff
PADDING = 1.0  # the distance that stands in the empty places of lists
PARTICLES, PAIRS = 8, 28  # that are tried at most: the pairs of so many particles
GUARD = "where() takes derivatives of both its sides, so guard the argument inside of it as well"
SWITCH = "wrap it, ms.potentials.switched(phi, onset, cutoff)"


def derivatives(phi: Any, r: Any, values: Any) -> np.ndarray:
    """phi(r, *values) and its derivatives by r up to the third, (4, *shape of r). phi must be equal by value.

    Raises:
      InputError: phi is not elementwise, or not real.
    """
    return np.asarray(_derivatives(phi, jnp.asarray(r), tuple(values)))


@functools.partial(jax.jit, static_argnames="phi")
def _derivatives(phi: Any, r: jax.Array, values: tuple[Any, ...]) -> jax.Array:
    def energy(r: jax.Array) -> jax.Array:
        found = jnp.asarray(phi(r, *values))
        if found.shape not in ((), r.shape):
            raise InputError(
                f"{phi.what} returns shape {found.shape} for distances of shape {r.shape}: return one number for each."
            )
        if not jnp.issubdtype(found.dtype, jnp.floating):
            raise InputError(f"{phi.what} returns {found.dtype}: return real floating-point numbers.")
        return jnp.broadcast_to(found, r.shape)

    # in reverse mode first, as forces are: forward mode is spared the NaN of a where() without a guard
    slope, ones = jax.grad(lambda r: jnp.sum(energy(r))), jnp.ones_like(r)

    def second(r: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(slope, (r,), (ones,))

    (first, bent), (_, third) = jax.jvp(second, (r,), (ones,))
    return jnp.stack([energy(r), first, bent, third])


def few_pairs(params: Any, n: int, species: Any, species_count: int) -> np.ndarray:
    """Pairs of particles (2, PAIRS) that between them have most values of the parameters, some more than once."""
    chosen: list[int] = []
    if species is None:
        for value in params.values():
            if np.shape(value) == (n,):
                chosen += [int(np.argmin(value)), int(np.argmax(value))]
        chosen += np.linspace(0, n - 1, PARTICLES).astype(int).tolist()
    else:
        kinds = np.asarray(species)
        there = np.unique(kinds)
        some = there[np.unique(np.linspace(0, there.size - 1, PARTICLES // 2).astype(int))]
        for kind in some:  # two of each, for the pairs of a kind with itself
            chosen += np.flatnonzero(kinds == kind)[:2].tolist()
        chosen += np.linspace(0, n - 1, PARTICLES).astype(int).tolist()
    few = np.array(list(dict.fromkeys(chosen))[:PARTICLES])
    pairs = few[np.stack(np.triu_indices(few.size, 1))]
    return np.resize(pairs.T, (PAIRS, 2)).T if pairs.size else np.zeros((2, 0), int)


def check_end(name: str, phi: Any, end: float, values: Any) -> None:
    """Refuse a potential that is not zero at its cutoff: a jump of the energy is a force that nobody sees."""
    found = _tried(phi, jnp.full(PAIRS, end), values)[1][0, : len(INSIDE) + 1, 0]
    left, inside = abs(float(found[-1])), np.abs(found[:-1])
    if not np.isfinite(left):
        raise InputError(f"{name} is {found[-1]:.3g} at its cutoff {end:g}, where it must be zero: {GUARD}.")
    if left > END * np.max(inside, initial=0.0, where=np.isfinite(inside)):
        raise InputError(f"{name} is {left:.3g} at its cutoff {end:g}, where it must be zero: shift it, or {SWITCH}.")


def check_kinds(name: str, phi: Any, names: Any, ends: Any, apart: Any, values: Any) -> None:
    """Refuse a potential that is no number where pairs of particles may stand.

    Within the cutoff it may be infinite, in a steep core; at the cutoff itself derivatives may jump or diverge, so that
    these are looked at to both sides of it; beyond, they must be finite and phi zero.

    Args:
      phi: equal by value.
      names: of its parameters.
      ends: (k,) the cutoff of each pair; inf for none.
      apart: (k,) the pairs' distances, where a potential without a cutoff is tried.
      values: of each parameter, (k,) or a number.
    """
    limited = bool(jnp.all(jnp.isfinite(ends)))
    if limited:  # a pair that does not interact at all is tried wherever it may stand
        r, found = _tried(phi, jnp.where(ends > 0, ends, PADDING), values)
    else:
        r, found = np.asarray(apart[None]), derivatives(phi, apart[None], values)
    columns = [np.broadcast_to(np.asarray(v), r.shape) for v in values]

    def refuse(rows: slice, orders: int, wrong: Any, where: str, remedy: str) -> None:
        """Refuse the lowest order that is wrong in some rows, at the first place."""
        bad = wrong(found[:orders, rows])
        if bad.any():
            order, row, k = (int(i) for i in np.argwhere(bad)[0])
            shown = ", ".join(f"{n} = {c[rows][row, k]:.6g}" for n, c in zip(names, columns, strict=True))
            value, at = found[order, rows][row, k], r[rows][row, k]
            place = f"r = {at:.6g}{f' with {shown}' if shown else ''}"
            raise InputError(f"{NAMES[order]} of {name} is {value:.3g} at {place}{where}: {remedy}.")

    within, end, beyond, padding = slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 7)
    if not limited:
        refuse(slice(0, 1), 4, np.isnan, ", where particles stand", f"check its parameters; {GUARD}")
        return
    refuse(within, 4, np.isnan, ", within its cutoff", f"check its parameters; {GUARD}")
    refuse(end, 1, _not_finite, ", its cutoff, where it must be zero", GUARD)
    refuse(beyond, 4, _not_finite, ", beyond its cutoff, where it must be zero", GUARD)
    empty = ", the distance that stands in the empty places of lists of neighbours"
    refuse(padding, 4, _not_finite, empty, f"{GUARD}, or take units of another size")
    inside, left = np.abs(found[0, within]), np.abs(found[0, end])
    most = np.maximum(END * np.max(inside, axis=0, initial=0.0, where=np.isfinite(inside)), left)

    def grown(orders: np.ndarray) -> np.ndarray:
        return np.abs(orders) > most

    remedy = f"take jnp.where(r < cutoff, ..., 0), or {SWITCH}"
    refuse(beyond, 1, grown, ", beyond its cutoff, where it must be zero", remedy)


def _tried(phi: Any, ends: jax.Array, values: Any) -> tuple[np.ndarray, np.ndarray]:
    """The distances within the cutoff, at it, beyond it and of empty places (7, k), and what phi is there (4, 7, k)."""
    shares = jnp.array([*INSIDE, 1.0, *BEYOND], ends.dtype)[:, None]
    r = jnp.concatenate([shares * ends, jnp.full((1, ends.size), PADDING, ends.dtype)])
    return np.asarray(r), derivatives(phi, r, [jnp.broadcast_to(v, r.shape) for v in values])


def _not_finite(x: np.ndarray) -> np.ndarray:
    return ~np.isfinite(x)
