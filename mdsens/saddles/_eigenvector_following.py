"""Walking uphill to a first-order saddle: along the softest mode, down across it, and Newton steps
on dU/dR = 0.

Along the softest mode the energy is climbed, across it the energy falls (Henkelman and Jonsson, J.
Chem. Phys. 111, 7010 (1999); Munro and Wales, Phys. Rev. B 59, 3969 (1999)); the mode is found by
Lanczos steps on exact Hessian products. From a minimum the way is uphill along a direction until
the softest mode turns negative (Malek and Mousseau, Phys. Rev. E 62, 7723 (2000)).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.progress import Decades
from mdsens._util.validation import check_positive, short
from mdsens.mechanics.forces import energy_gradient
from mdsens.mechanics.hessian import Unknowns, largest_force
from mdsens.mechanics.hessian_factor import HessianFactor
from mdsens.mechanics.null_space import NullSpace
from mdsens.mechanics.rigidity import analyze_rigidity
from mdsens.mechanics.units import natural_units, round_off
from mdsens.model.system import System
from mdsens.relaxation._newton import steihaug

__all__ = ["ROUND_OFF", "EigenvectorFollowing", "loose_stiffness", "follow_eigenvector"]

FORCING = 0.1  # residual of the step across the mode: Newton steps take over where more would pay
NEWTON_STEPS = 30
ROUND_OFF = 2.0  # forces that the resolution of the positions leaves, of ``round_off``
MODE_STARTS = (
    1e-3  # of a chirp in the first vector of a cycle: a mode found once would hide a softer one
)
KICKS, OFF_SADDLE = (
    6,
    1e-3,
)  # times that a saddle of higher order is left; the step off it, of the potential's length
CYCLES = 20  # of Lanczos for one step
RESOLVED = 0.1  # residual of the mode, of its stiffness


@dataclasses.dataclass(frozen=True)
class EigenvectorFollowing:
    """Up along the softest mode, down across it, p = s v - (1 - v v^T) (H^-1 g), within a radius of
    trust.

    Attributes:
      max_step: the longest move of a particle in one step, as a fraction of the potential's length.
        Lower it where the walk jumps over a saddle that is near.
      vectors: of a Lanczos cycle that finds the softest mode; more for thousands of particles.
    """

    max_step: float = 0.1
    vectors: int = 16

    def __post_init__(self) -> None:
        check_positive(self, ("max_step",))
        if not (isinstance(self.vectors, int) and self.vectors >= 2):
            raise InputError(
                f"EigenvectorFollowing(vectors={short(self.vectors)}): give a whole number from 2."
            )


@jax.jit
def _slope(system: System) -> jax.Array:
    return energy_gradient(system, used=system.neighbors.used)(system.positions)


def _softest(
    apply: Any, start: jax.Array, direction: jax.Array, vectors: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The lowest Ritz pair of Lanczos cycles from ``start``: (v, its stiffness, the residual).

    Of several that are negative, the one that is most along ``direction``: near a saddle of higher order
    the lowest one leads back up to it.
    """
    size = min(vectors, start.size)

    def grow(k: Any, carry: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        basis, images, v = carry
        for _ in range(2):  # once leaves round-off of what is taken out
            v = v - basis.T @ (basis @ v)
        length = jnp.linalg.norm(v)
        v = jnp.where(
            length > 1e-10, v / jnp.where(length > 0, length, 1.0), 0.0
        )  # 0: the space is exhausted
        image = apply(v)
        scale = jnp.linalg.norm(image)
        return basis.at[k].set(v), images.at[k].set(image), image / jnp.where(scale > 0, scale, 1.0)

    def cycle(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        v, _, _, count = carry
        none = jnp.zeros((size, v.size), v.dtype)
        basis, images, _ = jax.lax.fori_loop(0, size, grow, (none, none, v))
        small = basis @ images.T
        missing = jnp.where(jnp.sum(basis**2, axis=1) > 0.5, 0.0, 1.0 + jnp.sum(jnp.abs(small)))
        values, turns = jnp.linalg.eigh(0.5 * (small + small.T) + jnp.diag(missing))
        along = jnp.where(values < 0, jnp.abs((basis @ direction) @ turns), 0.0)
        chosen = jnp.argmax(along)  # the first where none is negative, or the way not known
        v, image, value = turns[:, chosen] @ basis, turns[:, chosen] @ images, values[chosen]
        return v, value, jnp.linalg.norm(image - value * v), count + 1

    def unresolved(carry: tuple[jax.Array, ...]) -> jax.Array:
        _, value, residual, count = carry
        return (residual > RESOLVED * jnp.abs(value)) & (count < CYCLES)

    zero = jnp.zeros((), start.dtype)
    start = (
        start
        + MODE_STARTS * apply(jnp.cos(jnp.arange(start.size, dtype=start.dtype) ** 2)) / start.size
    )
    first = cycle((start, zero, zero, jnp.int32(0)))
    v, value, residual, _ = jax.lax.while_loop(unresolved, cycle, first)
    return v, value, residual


@functools.partial(jax.jit, static_argnames=("vectors",))
def _proposal(
    system: System,
    null: NullSpace,
    mode: jax.Array,
    direction: jax.Array,
    radius: Any,
    vectors: int,
) -> tuple[jax.Array, ...]:
    """A step (n, d): (the step, the slope it predicts, the mode, the way it climbs, whether the
    radius cut it).

    Args:
      mode: the softest so far.
      way: where to climb while no mode is negative; zero for the softest mode. It is kept to, since
        of modes that are equally soft another one comes out of every cycle.
      radius: of a particle's move.
    """
    shape = system.positions.shape

    def off_null(v: jax.Array) -> jax.Array:
        return null.project(Unknowns(v.reshape(shape))).positions.ravel()

    slope, product = jax.linearize(energy_gradient(system), system.positions)
    g = off_null(slope)

    def apply(v: jax.Array) -> jax.Array:
        return off_null(product(off_null(v).reshape(shape)))

    def longest(v: jax.Array) -> jax.Array:
        return largest_force(v.reshape(shape))

    v, stiffness, _ = _softest(apply, off_null(mode), off_null(direction), vectors)
    guided = (stiffness >= 0) & jnp.any(direction != 0)
    up = jnp.where(guided, off_null(direction), v)
    up = up / jnp.maximum(
        jnp.linalg.norm(up), 1e-300
    )  # zero where nothing has a stiffness: there is no way up
    along = jnp.vdot(g, up)
    most = radius / jnp.maximum(longest(up), 1e-300)
    newton = jnp.abs(along) / jnp.where(stiffness < 0, -stiffness, 1.0)
    sign = jnp.where(guided | (along >= 0), 1.0, -1.0)
    climb = sign * jnp.where(stiffness < 0, jnp.minimum(newton, most), most)

    def across(w: jax.Array) -> jax.Array:
        return w - jnp.vdot(w, up) * up

    fall, _, _ = steihaug(
        lambda w: across(apply(across(w))), across(g), radius * system.n**0.5, FORCING
    )
    fall = fall * jnp.minimum(1.0, radius / jnp.maximum(longest(fall), 1e-300))
    step = climb * up + fall
    free = (stiffness < 0) & (newton < most) & (longest(fall) < 0.99 * radius)
    return (
        step.reshape(shape),
        (g + apply(step)).reshape(shape),
        v.reshape(shape),
        (sign * up).reshape(shape),
        ~free,
    )


def loose_stiffness(system: System) -> tuple[HessianFactor, NullSpace]:
    """H off its null space. On the way particles are out of balance: whatever touches another one
    counts as held.
    """
    backbone, _, null = analyze_rigidity(system, 0.0, 1)
    null = null.simplified()
    return HessianFactor(backbone, null, 1), null


def _newton(
    system: System, tolerance: float, longest: float, before: int, bar: Decades
) -> tuple[System, float, int] | None:
    """Newton steps on dU/dR = 0: (system, largest force, steps); None where they leave the region
    of one negative mode or make no headway.
    """
    slope = _slope(system)
    largest = float(largest_force(slope))
    for k in range(NEWTON_STEPS):
        stiffness, _ = loose_stiffness(system)
        if stiffness.unstable(2) != 1:
            return None
        if largest <= tolerance:
            return system, largest, before + k
        step, _, _ = stiffness.solve(-np.asarray(slope))
        if not float(largest_force(jnp.asarray(step))) <= longest:
            return None
        there = system.replace(positions=system.positions + step).reallocate(keep=True)
        its = _slope(there)
        left = float(largest_force(its))
        if not left < 0.9 * largest:
            return (
                (system, largest, before + k) if largest <= ROUND_OFF * round_off(system) else None
            )
        system, slope, largest = there, its, left
        bar.show(before + k + 1, largest)
    return None


def follow_eigenvector(
    system: System,
    direction: jax.Array,
    tolerance: float,
    method: EigenvectorFollowing,
    max_steps: int,
    bar: Decades,
) -> tuple[System, float, int]:
    """Steps up the softest mode and Newton steps: (system, largest force, steps)."""
    length = float(natural_units(system)[0])
    longest, steps = method.max_step * length, 0
    radius, mode, near = (
        longest,
        direction,
        True,
    )  # at a saddle that is known Newton steps alone lead to the next
    if not np.any(np.asarray(direction)):
        mode = jnp.cos(jnp.arange(system.positions.size, dtype=direction.dtype) ** 2).reshape(
            direction.shape
        )
    slope = _slope(system)
    largest = float(largest_force(slope))
    tried, kicks = np.inf, 0
    while steps < max_steps and np.isfinite(largest):
        if near and largest < 0.5 * tried:
            tried = largest
            reached = _newton(system, tolerance, longest, steps, bar)
            if reached is not None:
                return reached
            if largest <= tolerance and (off_it := _off_higher(system, length)) is not None:
                if kicks == KICKS:
                    break
                (system, mode), kicks, tried = off_it, kicks + 1, np.inf
                direction = mode
                slope = _slope(system)
                largest = float(largest_force(slope))
        _, null = loose_stiffness(system)
        step, expected, mode, direction, cut = _proposal(
            system, null, mode, direction, radius, method.vectors
        )
        if not np.isfinite(np.asarray(step)).all():
            return system, np.nan, steps
        if not np.any(np.asarray(step)):
            break  # nothing leads up, and nothing down
        there = system.replace(positions=system.positions + step).reallocate(keep=True)
        its = _slope(there)
        off = float(jnp.linalg.norm(its - expected)) / max(
            float(jnp.linalg.norm(expected - slope)), 1e-300
        )
        steps += 1
        near = not bool(cut)
        tried = tried if near else np.inf
        if off < 1.5 or radius < 1e-6 * length:
            system, slope, largest = there, its, float(largest_force(its))
        if not off < 0.5:
            radius = 0.4 * radius
        elif off < 0.2:
            radius = min(2.0 * radius, longest)
        bar.show(steps, largest)
    return system, largest, steps


def _off_higher(system: System, length: float) -> tuple[System, jax.Array] | None:
    """A step off a saddle of higher order along its second mode, which no slope points to, and its
    first mode; None where it is no such saddle.
    """
    found, _ = loose_stiffness(system)
    if found.unstable(2) < 2:
        return None
    first, second = found.lowest(2).vectors.T.reshape(2, *system.positions.shape)
    step = OFF_SADDLE * length / np.abs(second).max() * second
    return system.replace(positions=system.positions + step).reallocate(keep=True), jnp.asarray(
        first
    )
