"""The search for a first-order saddle by eigenvector following, and Newton steps on dU/dR = 0.

Each step of the search goes up in energy U along the softest mode, and down in all directions
perpendicular to this mode (Henkelman and Jonsson, J. Chem. Phys. 111, 7010 (1999); Munro and Wales,
Phys. Rev. B 59, 3969 (1999)). The mode comes from Lanczos steps on exact Hessian products. From a
minimum the search climbs along a given direction until the softest mode becomes negative (Malek and
Mousseau, Phys. Rev. E 62, 7723 (2000)).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.compilation import compiled
from mdsens._util.errors import InputError
from mdsens._util.precision import full_precision
from mdsens._util.probe import chirp
from mdsens._util.progress import Decades
from mdsens._util.validation import check_positive, is_integer, short
from mdsens.mechanics.forces import energy_gradient
from mdsens.mechanics.hessian import largest_force
from mdsens.mechanics.hessian_factor import HessianFactor
from mdsens.mechanics.null_space import NullSpace
from mdsens.mechanics.rigidity import analyze_rigidity
from mdsens.mechanics.units import natural_units, round_off, step_off_saddle
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.system import System
from mdsens.relaxation.newton import steihaug

__all__ = ["ROUND_OFF", "EigenvectorFollowing", "loose_stiffness", "follow_eigenvector"]

# Relative residual of the step across the mode. A more accurate step would pay only near the
# saddle, where Newton steps take over.
FORCING = 0.1
# the most Newton steps in one attempt
NEWTON_STEPS = 30
# forces up to this many times ``round_off`` can be due to the resolution of the positions
ROUND_OFF = 2.0
# Share of a chirp in the first vector of the Lanczos cycles. Without it the search would keep the
# mode of the last step and miss a softer one that has no component along it.
CHIRP = 1e-3
# how often a saddle of higher order is left before the search gives up
KICKS = 6
# the most Lanczos cycles in one step
CYCLES = 20
# residual of the mode, relative to its stiffness, at which the cycles stop
RESOLVED = 0.1


@dataclasses.dataclass(frozen=True)
class EigenvectorFollowing:
    """Search for a saddle by steps up along the softest mode and down perpendicular to this mode.

    A step is p = s v - (1 - v v^T) H^-1 g, with v the softest mode, s the step along v, g = dU/dR
    the gradient of the energy and H the Hessian. Every step stays within a trust radius.

    Attributes:
      max_step: the longest move of a particle in one step, as a fraction of the length scale of the
        potential (contact distance, or the distance of the minimum of the pair energy). Lower it
        where the search jumps over a saddle that is near.
      vectors: number of vectors in a Lanczos cycle for the softest mode; take more for thousands of
        particles.
    """

    max_step: float = 0.1
    vectors: int = 16

    def __post_init__(self) -> None:
        check_positive(self, ("max_step",))
        if not (is_integer(self.vectors) and self.vectors >= 2):
            raise InputError(
                f"EigenvectorFollowing(vectors={short(self.vectors)}): give a whole number from 2."
            )


@compiled
def _compute_gradient(system: System) -> jax.Array:
    """Compute the gradient dU/dR of the energy at the positions of a system, (n, d)."""
    return energy_gradient(system, used=system.neighbors.used)(system.positions)


@full_precision
def _softest_mode(
    apply: Callable[[jax.Array], jax.Array], start: jax.Array, direction: jax.Array, vectors: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute the softest mode v of a Hessian by Lanczos cycles.

    v is the Ritz vector of the lowest Ritz value. But where several Ritz values are negative, as
    near a saddle of higher order, v is the one of their Ritz vectors that is most parallel to
    ``direction``: a step along the lowest one would lead back up to this saddle.

    Args:
      apply: function from a vector (n d,) to its product with the Hessian, (n d,).
      start: (n d,), the first Lanczos vector.
      direction: (n d,), the preferred direction; zero without a preference.
      vectors: number of Lanczos vectors in one cycle.

    Returns:
      (v, the stiffness along v, the residual of v).
    """
    size = min(vectors, start.size)

    def grow(
        k: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        basis, images, v = carry
        # twice, since one projection leaves round-off of what it removes
        for _ in range(2):
            v = v - basis.T @ (basis @ v)
        length = jnp.linalg.norm(v)
        # 0 where the vectors so far already span the whole space
        v = jnp.where(length > 1e-10, v / jnp.where(length > 0, length, 1.0), 0.0)
        image = apply(v)
        scale = jnp.linalg.norm(image)
        return basis.at[k].set(v), images.at[k].set(image), image / jnp.where(scale > 0, scale, 1.0)

    def cycle(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        v, _, _, count = carry
        empty = jnp.zeros((size, v.size), v.dtype)
        basis, images, _ = jax.lax.fori_loop(0, size, grow, (empty, empty, v))
        small = basis @ images.T
        # rows of zeros get a large positive value, so that they are never the lowest pair
        missing = jnp.where(jnp.sum(basis**2, axis=1) > 0.5, 0.0, 1.0 + jnp.sum(jnp.abs(small)))
        values, rotation = jnp.linalg.eigh(0.5 * (small + small.T) + jnp.diag(missing))
        overlap = jnp.where(values < 0, jnp.abs((basis @ direction) @ rotation), 0.0)
        # argmax takes the first, the lowest, where no value is negative or the direction is zero
        chosen = jnp.argmax(overlap)
        v = rotation[:, chosen] @ basis
        image = rotation[:, chosen] @ images
        value = values[chosen]
        return v, value, jnp.linalg.norm(image - value * v), count + 1

    def unresolved(carry: tuple[jax.Array, ...]) -> jax.Array:
        _, value, residual, count = carry
        return (residual > RESOLVED * jnp.abs(value)) & (count < CYCLES)

    zero = jnp.zeros((), start.dtype)
    probe = chirp(start.size, start.dtype)
    start = start + CHIRP * apply(probe) / start.size
    first = cycle((start, zero, zero, jnp.int32(0)))
    v, value, residual, _ = jax.lax.while_loop(unresolved, cycle, first)
    return v, value, residual


@compiled(static_argnames=("vectors",), loops=True)
@full_precision
def _propose_step(
    system: System,
    null: NullSpace,
    mode: jax.Array,
    direction: jax.Array,
    radius: float,
    vectors: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Compute the next step of the search for a saddle.

    Args:
      system: the system at its present positions.
      null: the null space of the Hessian, along which no step goes.
      mode: (n, d), the softest mode of the last step.
      direction: (n, d), the direction in which to climb as long as no mode is negative; zero for
        the softest mode. The search keeps to this direction, because among equally soft modes every
        Lanczos cycle finds a different one.
      radius: the longest move of a particle.
      vectors: number of vectors in a Lanczos cycle.

    Returns:
      (the step, the gradient of the energy that is predicted after the step, the softest mode, the
      direction of climbing, each (n, d); whether the radius limited the step).
    """
    shape = system.positions.shape

    def off_null(v: jax.Array) -> jax.Array:
        return null.project(Unknowns(v.reshape(shape))).positions.ravel()

    gradient, product = jax.linearize(energy_gradient(system), system.positions)
    g = off_null(gradient)

    def apply(v: jax.Array) -> jax.Array:
        return off_null(product(off_null(v).reshape(shape)))

    def longest(v: jax.Array) -> jax.Array:
        # the largest norm of one particle's row, of a displacement as of a force
        return largest_force(v.reshape(shape))

    v, stiffness, _ = _softest_mode(apply, off_null(mode), off_null(direction), vectors)
    guided = (stiffness >= 0) & jnp.any(direction != 0)
    up = jnp.where(guided, off_null(direction), v)
    # 1e-300 keeps up zero where nothing has a stiffness and no direction leads up
    up = up / jnp.maximum(jnp.linalg.norm(up), 1e-300)
    along = jnp.vdot(g, up)
    most = radius / jnp.maximum(longest(up), 1e-300)
    newton = jnp.abs(along) / jnp.where(stiffness < 0, -stiffness, 1.0)
    sign = jnp.where(guided | (along >= 0), 1.0, -1.0)
    # a negative mode has a maximum along it, which the Newton step reaches; a positive one has none
    climb = sign * jnp.where(stiffness < 0, jnp.minimum(newton, most), most)

    def across(w: jax.Array) -> jax.Array:
        return w - jnp.vdot(w, up) * up

    # The ball bounds the norm over all particles, that of n moves by ``radius`` each. The longest
    # move of a single particle is limited afterwards.
    fall, _, _ = steihaug(
        lambda w: across(apply(across(w))), across(g), radius * system.n**0.5, FORCING
    )
    fall = fall * jnp.minimum(1.0, radius / jnp.maximum(longest(fall), 1e-300))
    step = climb * up + fall
    # 0.99: a fall that was shortened has the length ``radius`` up to round-off
    free = (stiffness < 0) & (newton < most) & (longest(fall) < 0.99 * radius)
    return (
        step.reshape(shape),
        (g + apply(step)).reshape(shape),
        v.reshape(shape),
        (sign * up).reshape(shape),
        ~free,
    )


def loose_stiffness(system: System) -> tuple[HessianFactor, NullSpace]:
    """Compute the factorized Hessian and its null space at a configuration with unbalanced forces.

    During the search for a saddle a particle may be pushed by a single contact. So no particle that
    touches another one is left out of the Hessian as a rattler.
    """
    # force left 0.0: every overlap is a contact; 1: a single contact holds a particle
    backbone, _, null = analyze_rigidity(system, 0.0, 1)
    null = null.simplified()
    return HessianFactor(backbone, null, 1), null


def _newton(
    system: System, tolerance: float, longest: float, before: int, bar: Decades
) -> tuple[System, float, int] | None:
    """Take Newton steps on dU/dR = 0 to a first-order saddle.

    Args:
      system: the system, near a saddle.
      tolerance: the largest force to reach.
      longest: the longest move of a particle in one step.
      before: number of steps that the search took before these Newton steps.
      bar: the progress bar.

    Returns:
      (system, largest force, total number of steps); None where the steps leave the region of
      exactly one negative mode or stop reducing the force.
    """
    gradient = _compute_gradient(system)
    largest = float(largest_force(gradient))
    for k in range(NEWTON_STEPS):
        stiffness, _ = loose_stiffness(system)
        # Two modes are enough to tell one negative mode from several.
        if stiffness.unstable(2) != 1:
            return None
        if largest <= tolerance:
            return system, largest, before + k
        step, _, _ = stiffness.solve(-np.asarray(gradient))
        # "not <=" refuses NaN as well
        if not float(largest_force(jnp.asarray(step))) <= longest:
            return None
        moved = system.replace(positions=system.positions + step).reallocate(keep=True)
        moved_gradient = _compute_gradient(moved)
        moved_largest = float(largest_force(moved_gradient))
        if not moved_largest < 0.9 * largest:
            # no further progress: at the saddle if what is left is round-off
            if largest <= ROUND_OFF * round_off(system):
                return system, largest, before + k
            return None
        system = moved
        gradient = moved_gradient
        largest = moved_largest
        bar.show(before + k + 1, largest)
    return None


class _Climb:
    """State of a search for a saddle; its methods continue the search.

    Attributes:
      system: the system so far.
      gradient: (n, d), the gradient dU/dR of the energy.
      largest: the largest force; NaN where a step is not finite.
      mode: (n, d), the softest mode of the last step.
      direction: (n, d), the direction in which to climb until a mode is negative; zero for the
        softest mode.
      length: length scale of the potential.
      longest: the longest move of a particle in one step.
      radius: the longest move of a particle in the next step.
      vectors: number of vectors in a Lanczos cycle.
      near: whether Newton's method may succeed: the radius did not limit the last step.
      tried: the largest force on a particle when Newton's method was last tried, which is tried
        again once the force is below half of this; inf where it is to be tried at any force.
      kicks: how often a saddle of higher order was left.
    """

    def __init__(self, system: System, direction: jax.Array, method: EigenvectorFollowing):
        self.length = float(natural_units(system)[0])
        self.longest = method.max_step * self.length
        self.radius = self.longest
        self.vectors = method.vectors
        self.direction = direction
        self.mode = direction
        if not np.any(np.asarray(direction)):
            self.mode = chirp(direction.shape, direction.dtype)
        # Newton's method is tried at the start as well: from a saddle at other parameters it alone
        # leads to the saddle at these
        self.near = True
        self.tried = np.inf
        self.kicks = 0
        self.system = system
        self.gradient = _compute_gradient(system)
        self.largest = float(largest_force(self.gradient))

    def leave_higher_order(self) -> bool:
        """Take a step off a saddle of higher order, if the system is at one.

        Returns:
          whether the search goes on; False where it has left too many such saddles.
        """
        kicked = _leave_higher_order(self.system, self.length)
        if kicked is None:
            return True
        if self.kicks == KICKS:
            return False
        self.system, self.mode = kicked
        self.direction = self.mode
        self.kicks += 1
        self.tried = np.inf
        self.gradient = _compute_gradient(self.system)
        self.largest = float(largest_force(self.gradient))
        return True

    def step(self) -> bool:
        """Take one step up along the softest mode and down perpendicular to this mode.

        Returns:
          whether a step was taken; False where it is zero or not finite.
        """
        _, null = loose_stiffness(self.system)
        step, expected, self.mode, self.direction, limited = _propose_step(
            self.system, null, self.mode, self.direction, self.radius, self.vectors
        )
        if not np.isfinite(np.asarray(step)).all():
            self.largest = np.nan
            return False
        if not np.any(np.asarray(step)):
            return False  # nothing leads up, and nothing down
        positions = self.system.positions + step
        moved = self.system.replace(positions=positions).reallocate(keep=True)
        moved_gradient = _compute_gradient(moved)
        # how far the gradient is from its linear prediction, relative to the predicted change
        predicted = max(float(jnp.linalg.norm(expected - self.gradient)), 1e-300)
        error = float(jnp.linalg.norm(moved_gradient - expected)) / predicted
        self.near = not bool(limited)
        if not self.near:
            self.tried = np.inf
        # A step with a wrong prediction is rejected. At the smallest radius every step is accepted,
        # so that the search goes on.
        if error < 1.5 or self.radius < 1e-6 * self.length:
            self.system = moved
            self.gradient = moved_gradient
            self.largest = float(largest_force(moved_gradient))
        # "not <" reduces the radius for NaN as well
        if not error < 0.5:
            self.radius = 0.4 * self.radius
        elif error < 0.2:
            self.radius = min(2.0 * self.radius, self.longest)
        return True


def follow_eigenvector(
    system: System,
    direction: jax.Array,
    tolerance: float,
    method: EigenvectorFollowing,
    max_steps: int,
    bar: Decades,
) -> tuple[System, float, int]:
    """Climb to a first-order saddle by steps along the softest mode, then by Newton steps.

    Args:
      system: the system at the start.
      direction: (n, d), the direction in which to climb until a mode is negative; zero for the
        softest mode.
      tolerance: the largest force to reach.
      method: the options of the search.
      max_steps: largest number of steps of the search and of Newton's method together.
      bar: the progress bar.

    Returns:
      (system, largest force, steps); the force is NaN where a step is not finite.
    """
    climb = _Climb(system, direction, method)
    steps = 0
    while steps < max_steps and np.isfinite(climb.largest):
        if climb.near and climb.largest < 0.5 * climb.tried:
            # An attempt takes several solves with the Hessian: the next waits for half the force.
            climb.tried = climb.largest
            reached = _newton(climb.system, tolerance, climb.longest, steps, bar)
            if reached is not None:
                return reached
            if climb.largest <= tolerance and not climb.leave_higher_order():
                break
        if not climb.step():
            break
        steps += 1
        bar.show(steps, climb.largest)
    return climb.system, climb.largest, steps


def _leave_higher_order(system: System, length: float) -> tuple[System, jax.Array] | None:
    """Take a step off a saddle of higher order, along the mode of second lowest stiffness.

    At the saddle the forces vanish, so that no gradient leads away.

    Returns:
      (the displaced system, the mode of lowest stiffness (n, d)); None where fewer than two modes
      have a negative stiffness.
    """
    stiffness, _ = loose_stiffness(system)
    if stiffness.unstable(2) < 2:
        return None
    first, second = stiffness.lowest(2).vectors.T.reshape(2, *system.positions.shape)
    positions = system.positions + step_off_saddle(second, length)
    moved = system.replace(positions=positions).reallocate(keep=True)
    return moved, jnp.asarray(first)
