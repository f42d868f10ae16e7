"""First-order saddles of the energy: minimum-mode following, then Newton steps on the same F = dU/dR = 0.

A saddle is a root of F like a minimum, so what holds of one holds of the other: H dR = - d2U/dR dp . dp, with an H that
has one negative eigenvalue. Only the way there differs. Along the softest mode the energy is climbed, across it the
energy falls (Henkelman and Jonsson, J. Chem. Phys. 111, 7010 (1999); Munro and Wales, Phys. Rev. B 59, 3969 (1999));
the mode is found by Lanczos steps on exact Hessian products. From a minimum the way is uphill along a direction until
the softest mode turns negative (Malek and Mousseau, Phys. Rev. E 62, 7723 (2000)).
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._checks import check_positive, real_array, real_number, short
from mdsens._progress import Decades
from mdsens.implicit.status import InputError, PrecisionError, Status, raise_for_status
from mdsens.newton import steihaug
from mdsens.relaxation import Equilibrium, minimize
from mdsens.scales import round_off, scales
from mdsens.slopes import energy_slope
from mdsens.stationarity import NullSpace, Unknowns, largest_force, linearisation
from mdsens.stiffness import Stiffness
from mdsens.system import System, require_unconstrained

__all__ = ["EigenvectorFollowing", "find_saddle", "sides"]

Params = Mapping[str, Any]
FORCING = 0.1  # residual of the step across the mode: Newton steps take over where more would pay
NEWTON_STEPS = 30
ROUND_OFF = 2.0  # forces that the resolution of the positions leaves, of ``round_off``
MODE_STARTS = 1e-3  # of a chirp in the first vector of a cycle: a mode found once would hide a softer one
CYCLES = 20  # of Lanczos for one step
RESOLVED = 0.1  # residual of the mode, of its stiffness


@dataclasses.dataclass(frozen=True)
class EigenvectorFollowing:
    """Up along the softest mode, down across it, p = s v - (1 - v v^T) (H^-1 g), within a radius of trust.

    Attributes:
      max_step: the longest move of a particle in one step, as a fraction of the law's length. Lower it where the walk
        jumps over a saddle that is near.
      vectors: of a Lanczos cycle that finds the softest mode; more for thousands of particles.
    """

    max_step: float = 0.1
    vectors: int = 16

    def __post_init__(self) -> None:
        check_positive(self, ("max_step",))
        if not (isinstance(self.vectors, int) and self.vectors >= 2):
            raise InputError(f"EigenvectorFollowing(vectors={short(self.vectors)}): give a whole number from 2.")


@jax.jit
def _slope(system: System) -> jax.Array:
    return energy_slope(system, used=system.neighbours.used)(system.positions)


def _softest(apply: Any, start: jax.Array, vectors: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The lowest Ritz pair of Lanczos cycles from ``start``: (v, its stiffness, the residual)."""
    size = min(vectors, start.size)

    def grow(k: Any, carry: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        basis, images, v = carry
        for _ in range(2):  # once leaves round-off of what is taken out
            v = v - basis.T @ (basis @ v)
        length = jnp.linalg.norm(v)
        v = jnp.where(length > 1e-10, v / jnp.where(length > 0, length, 1.0), 0.0)  # 0: the space is exhausted
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
        v, image = turns[:, 0] @ basis, turns[:, 0] @ images
        return v, values[0], jnp.linalg.norm(image - values[0] * v), count + 1

    def unresolved(carry: tuple[jax.Array, ...]) -> jax.Array:
        _, value, residual, count = carry
        return (residual > RESOLVED * jnp.abs(value)) & (count < CYCLES)

    zero = jnp.zeros((), start.dtype)
    start = start + MODE_STARTS * apply(jnp.cos(jnp.arange(start.size, dtype=start.dtype) ** 2)) / start.size
    first = cycle((start, zero, zero, jnp.int32(0)))
    return jax.lax.while_loop(unresolved, cycle, first)[:3]


@functools.partial(jax.jit, static_argnames=("vectors",))
def _proposal(
    system: System, null: NullSpace, mode: jax.Array, way: jax.Array, radius: Any, vectors: int
) -> tuple[jax.Array, ...]:
    """A step (n, d): (the step, the slope it predicts, the mode, the way it climbs, whether the radius cut it).

    Args:
      mode: the softest so far.
      way: where to climb while no mode is negative; zero for the softest mode. It is kept to, since of modes that are
        equally soft another one comes out of every cycle.
      radius: of a particle's move.
    """
    shape = system.positions.shape

    def off_null(v: jax.Array) -> jax.Array:
        return null.project(Unknowns(v.reshape(shape))).positions.ravel()

    slope, product = jax.linearize(energy_slope(system), system.positions)
    g = off_null(slope)

    def apply(v: jax.Array) -> jax.Array:
        return off_null(product(off_null(v).reshape(shape)))

    def longest(v: jax.Array) -> jax.Array:
        return largest_force(v.reshape(shape))

    v, stiffness, _ = _softest(apply, off_null(mode), vectors)
    guided = (stiffness >= 0) & jnp.any(way != 0)
    up = jnp.where(guided, off_null(way), v)
    up = up / jnp.linalg.norm(up)
    along = jnp.vdot(g, up)
    most = radius / longest(up)
    newton = jnp.abs(along) / jnp.where(stiffness < 0, -stiffness, 1.0)
    sign = jnp.where(guided | (along >= 0), 1.0, -1.0)
    climb = sign * jnp.where(stiffness < 0, jnp.minimum(newton, most), most)

    def across(w: jax.Array) -> jax.Array:
        return w - jnp.vdot(w, up) * up

    fall, _, _ = steihaug(lambda w: across(apply(across(w))), across(g), radius * system.n**0.5, FORCING)
    fall = fall * jnp.minimum(1.0, radius / jnp.maximum(longest(fall), 1e-300))
    step = climb * up + fall
    free = (stiffness < 0) & (newton < most) & (longest(fall) < 0.99 * radius)
    return step.reshape(shape), (g + apply(step)).reshape(shape), v.reshape(shape), (sign * up).reshape(shape), ~free


def _stiffness(system: System) -> tuple[Stiffness, NullSpace]:
    """H off its null space, every contact that carries a force counted."""
    backbone, _, null = linearisation(system, round_off(system))
    null = null.simplified()
    return Stiffness(backbone, null, 1), null


def _newton(
    system: System, tolerance: float, longest: float, before: int, bar: Decades
) -> tuple[System, float, int] | None:
    """Newton steps on dU/dR = 0: (system, largest force, steps); None where they leave the region of one negative mode
    or make no headway.
    """
    slope = _slope(system)
    largest = float(largest_force(slope))
    for k in range(NEWTON_STEPS):
        stiffness, _ = _stiffness(system)
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
            return (system, largest, before + k) if largest <= ROUND_OFF * round_off(system) else None
        system, slope, largest = there, its, left
        bar.show(before + k + 1, largest)
    return None


def find_saddle(
    start: System | Equilibrium,
    params: Params | None = None,
    *,
    direction: Any = None,
    tolerance: float = 1e-10,
    method: EigenvectorFollowing = EigenvectorFollowing(),
    max_steps: int = 1000,
    throw: bool = True,
    progress: bool | None = None,
) -> Equilibrium:
    """A first-order saddle, dU/dR = 0 with one negative mode: climbed to along the softest mode, then by Newton steps.

    The derivatives of what comes out, by ``jvp`` and its kin, are those of the saddle, and ``certify`` examines it as
    one. Its cell is given: it is not relaxed to a pressure.

    Args:
      start: a configuration near the saddle, or a minimum.
      params: parameters to change first; the others stay.
      direction: (n, d), along which to climb from a minimum until a mode turns negative; None for the softest mode.
      tolerance: the largest force on a particle to reach, in the potential's units.
      method: the options of the walk.
      max_steps: of the walk and of Newton's method together.
      throw: raise where no saddle is reached; with False the status says so instead.
      progress: show a progress bar; where None, in a terminal or notebook alone.

    Returns:
      an :class:`~mdsens.Equilibrium` whose ``order`` is the number of negative modes found: 1 where the status is good.

    Raises:
      InputError: bad parameters, direction or options. PrecisionError: a tolerance below round-off. ConvergenceError:
      with the status, MAX_STEPS_REACHED, NOT_FINITE, or NOT_A_SADDLE where the forces vanish at a minimum or a saddle
      of higher order; and what was reached as ``result``.
    """
    began = time.perf_counter()
    system = _checked(start, params, tolerance, method, max_steps)
    way = _direction(direction, system)
    bar = Decades(tolerance, progress)
    try:
        system, largest, steps = _walk(system, way, tolerance, method, int(max_steps), bar)
    finally:
        bar.close()
    system, status, order = _judged(system, largest, tolerance)
    found = Equilibrium(
        system,
        jnp.asarray(status.value, jnp.int32),
        jnp.asarray(largest),
        jnp.asarray(steps),
        time.perf_counter() - began,
        tolerance,
        order=order,
    )
    if throw:
        raise_for_status(status, f"find_saddle stopped after {steps:,} steps at max_force {largest:.3e}", found)
    return found


def _walk(
    system: System, way: jax.Array, tolerance: float, method: EigenvectorFollowing, max_steps: int, bar: Decades
) -> tuple[System, float, int]:
    """Steps up the softest mode and Newton steps: (system, largest force, steps)."""
    length = float(scales(system)[0])
    longest, steps = method.max_step * length, 0
    radius, mode, near = longest, way, True  # at a saddle that is known Newton steps alone lead to the next
    if not np.any(np.asarray(way)):
        mode = jnp.cos(jnp.arange(system.positions.size, dtype=way.dtype) ** 2).reshape(way.shape)
    slope = _slope(system)
    largest = float(largest_force(slope))
    tried = np.inf
    while steps < max_steps and np.isfinite(largest):
        if near and largest < 0.5 * tried:
            tried = largest
            reached = _newton(system, tolerance, longest, steps, bar)
            if reached is not None:
                return reached
        _, null = _stiffness(system)
        step, expected, mode, way, cut = _proposal(system, null, mode, way, radius, method.vectors)
        there = system.replace(positions=system.positions + step).reallocate(keep=True)
        its = _slope(there)
        off = float(jnp.linalg.norm(its - expected)) / max(float(jnp.linalg.norm(expected - slope)), 1e-300)
        steps += 1
        near = not bool(cut)
        if off < 1.5 or radius < 1e-6 * length:
            system, slope, largest = there, its, float(largest_force(its))
        if not off < 0.5:
            radius = 0.4 * radius
        elif off < 0.2:
            radius = min(2.0 * radius, longest)
        bar.show(steps, largest)
    return system, largest, steps


def _judged(system: System, largest: float, tolerance: float) -> tuple[System, Status, int]:
    """The system, what was reached, and how many of its modes are negative."""
    if not np.isfinite(largest):
        return system, Status.NOT_FINITE, 0
    stiffness, _ = _stiffness(system)
    order = stiffness.unstable(3)
    limited = largest <= ROUND_OFF * round_off(system)
    if largest > tolerance and not limited:
        return system, Status.MAX_STEPS_REACHED, order
    reached = Status.CONVERGED if largest <= tolerance else Status.ROUND_OFF_LIMITED
    return system, reached if order == 1 else Status.NOT_A_SADDLE, order


def sides(saddle: Equilibrium, *, step: float = 1e-2, tolerance: float = 1e-12) -> tuple[Equilibrium, Equilibrium]:
    """The two minima that a saddle lies between: relaxed from a step to either side along its negative mode.

    Args:
      saddle: from ``find_saddle``.
      step: the longest move of a particle, as a fraction of the law's length.
      tolerance: of the minimisations.

    Returns:
      two minima, in the order of their energies.
    """
    stiffness, _ = _stiffness(saddle.system)
    mode = stiffness.lowest(1).vectors[:, 0].reshape(saddle.positions.shape)
    way = step * float(scales(saddle.system)[0]) / np.sqrt(np.max(np.sum(mode**2, axis=1))) * mode
    found = [
        minimize(saddle.system.replace(positions=saddle.positions + s * way), tolerance=tolerance) for s in (1.0, -1.0)
    ]
    return found[0], found[1]


def _checked(start: Any, params: Params | None, tolerance: Any, method: Any, max_steps: Any) -> System:
    system = start.system if isinstance(start, Equilibrium) else start
    if not isinstance(system, System):
        raise InputError(f"find_saddle got a {type(start).__name__}: give a System or an Equilibrium.")
    require_unconstrained(system, "find_saddle")
    if system.batch is not None:
        raise InputError(f"find_saddle takes one system and got a batch of {system.batch}: give a member.")
    if isinstance(start, Equilibrium) and start.pressure is not None:
        raise InputError("find_saddle holds the cell, and this minimum is at a pressure: give its system.")
    if not isinstance(method, EigenvectorFollowing):
        raise InputError(f"method is {short(method)}: give EigenvectorFollowing() of ms.saddles.")
    if not 0 < real_number("tolerance", tolerance) <= sys.float_info.max:
        raise InputError(f"tolerance is {short(tolerance)}: give a positive number.")
    if not real_number("max_steps", max_steps) >= 1:
        raise InputError(f"max_steps is {short(max_steps)}: give 1 or more.")
    system = system.reallocate(keep=True) if params is None else system.with_params(params)
    floor = round_off(system)
    if tolerance < 0.05 * floor:
        raise PrecisionError(
            f"tolerance {tolerance:.0e} is out of reach in {system.positions.dtype}: raise it to {floor:.0e} or more."
        )
    return system


def _direction(direction: Any, system: System) -> jax.Array:
    if direction is None:
        return jnp.zeros_like(system.positions)
    given = jnp.asarray(real_array("direction", direction), system.positions.dtype)
    if given.shape != system.positions.shape or not np.isfinite(np.asarray(given)).all() or not jnp.any(given != 0):
        raise InputError(
            f"direction has shape {given.shape}: give {system.positions.shape}, finite and not zero everywhere."
        )
    return given / jnp.linalg.norm(given)
