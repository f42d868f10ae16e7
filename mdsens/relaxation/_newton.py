"""Newton steps down the energy under a trust region: by a sparse factor on the host, or by
conjugate gradients.

Both see negative curvature. The factor is of H + mu I, with mu raised where a step does not keep
its promise or a pivot of the last one is negative (Nocedal and Wright, Numerical Optimization,
2006, section 4.3). The conjugate gradients leave along the first direction of negative curvature
(Steihaug, SIAM J. Numer. Anal. 20, 626 (1983)). A step is taken where the energy falls by a tenth
at least of what the quadratic model promised. Where the factor's steps end at a saddle after all,
the next one goes along a direction of negative curvature that its pivots give.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens.implicit.linear._vectors import dot
from mdsens.implicit.linear.sparse_ldl import SHIFT, SparseFactor, bound, ordering
from mdsens.mechanics.forces import energy_gradient
from mdsens.mechanics.hessian import largest_force, sparse_hessian
from mdsens.mechanics.hessian_factor import factorizes
from mdsens.model.system import System, potential_energy

__all__ = ["descend", "steihaug"]

LONGEST = 0.1  # step of a particle, of the potential's length
STEPS = 60  # before the minimizer that brought it here has another go
TRIALS = 8  # of a shift or radius for one step
STALLED = 12  # steps that do not halve the force, in a row
FIRST, SOFTEST = (
    0.1,
    1e-6,
)  # multiple that shifts start with; the softest mode of a packing, of the stiffest
CG_STEPS = 4000  # of one Newton step, at most


@jax.jit
def _energy_and_gradient(system: System) -> tuple[jax.Array, jax.Array]:
    return potential_energy(system), energy_gradient(system, used=system.neighbors.used)(
        system.positions
    )


def descend(
    system: System,
    tolerance: float,
    length: float,
    show: Callable[[int, float], None],
    round_off: float = 0.0,
) -> tuple[System, float, int]:
    """Newton steps to a minimum: (system, its largest force, steps); short of the tolerance where
    they make no headway.

    Args:
      system: near a minimum, its list complete.
      tolerance: of the largest force.
      length: the potential's own.
      show: called with the steps taken and the largest force.
      round_off: a largest force from which on a step that does not halve it is the last one.
    """
    step_of: Any = _Factorized(length) if factorizes(system) else _Krylov(length)
    energy, slope = _energy_and_gradient(system)
    largest, taken = float(largest_force(slope)), 0
    if not (np.isfinite(largest) and largest > tolerance):
        return system, largest, taken
    best, since = largest, 0
    while taken < STEPS and since < STALLED:
        found = _trials(step_of, system, energy, slope) if largest > tolerance else None
        if found is None and step_of.at_saddle(system):
            found = _trials(step_of, system, energy, slope)
        if found is None:
            break
        system, energy, slope = found
        before, largest, taken = largest, float(largest_force(slope)), taken + 1
        headway = largest < 0.5 * best or (
            largest > before and step_of.curved
        )  # off a saddle the force rises
        best, since = (largest, 0) if headway else (best, since + 1)
        show(taken, largest)
        if since and tolerance < largest <= round_off:
            break
    return system, largest, taken


def _trials(
    step_of: Any, system: System, energy: jax.Array, slope: jax.Array
) -> tuple[System, Any, Any] | None:
    """The first step that keeps its promise: (system, energy, slope) after it; None where none
    does.
    """
    largest = float(largest_force(slope))
    # 1e-12 of the energy in double precision: what is gained is too near round-off to see there
    unseen = 4500.0 * float(jnp.finfo(energy.dtype).eps) * abs(float(energy))
    for _ in range(TRIALS):
        step, promised = step_of(system, slope, largest)
        if step is None:
            return None
        there = system.replace(positions=system.positions + step).reallocate(keep=True)
        its_energy, its_slope = _energy_and_gradient(there)
        left, gained = float(largest_force(its_slope)), float(energy - its_energy)
        risen = np.inf
        if (
            promised <= unseen
        ):  # the forces see it, to the third order of the step, until they are round-off too
            gained, risen = -0.5 * float(jnp.sum((slope + its_slope) * step)), 2.0 * largest
        good = gained >= 0.1 * promised > 0.0 and left < risen
        step_of.judge(gained / promised if good else 0.0)
        if good:
            return there, its_energy, its_slope
    return None


class _Factorized:
    """p = -(H + mu I)^-1 dU/dR, mu a multiple of the largest force over the potential's length.

    Twice that is the negative curvature that a loose particle's one contact can have. It falls with
    the force, so that convergence is as good as quadratic.
    """

    def __init__(self, length: float):
        self.length, self.multiple, self.shift, self.curved = length, FIRST, 0.0, False
        self.matrix: Any = None
        self.order, self.at, self.way_off = None, None, None

    def __call__(
        self, system: System, slope: jax.Array, largest: float
    ) -> tuple[jax.Array | None, float]:
        self._assemble(system)
        flat = np.asarray(slope).ravel()
        if self.way_off is None:
            step = self._shifted(flat, largest)
        else:
            step = self.way_off if flat @ self.way_off <= 0 else -self.way_off
        if step is None:
            return None, 0.0
        along, curvature = float(flat @ step), float(step @ (self.matrix @ step))
        self.curved = curvature < 0
        return jnp.asarray(step.reshape(slope.shape)), -(along + 0.5 * curvature)

    def _assemble(self, system: System) -> None:
        if self.at is not system:
            self.matrix, self.at = sparse_hessian(system), system
            self.scale, self.dimension = bound(self.matrix) or 1.0, system.dimension
            if self.order is None:
                self.order = ordering(self.matrix, system.dimension)

    def _factorize(self, shift: float) -> bool:
        try:
            self.factor, self.shift = SparseFactor(self.matrix, shift, self.order), shift
        except RuntimeError:  # singular, shift and all
            return False
        return True

    def _shifted(self, flat: np.ndarray, largest: float) -> np.ndarray | None:
        for _ in range(TRIALS):
            if self._factorize(max(self.multiple * largest / self.length, SHIFT * self.scale)):
                step = -self.factor.apply(flat)
                size = self._size(step)
                if np.isfinite(size) and flat @ step < 0:
                    return step * min(1.0, LONGEST * self.length / size)
            self.multiple *= 8.0  # uphill: not positive definite
        return None

    def _size(self, step: np.ndarray) -> float:
        return float(np.sqrt(np.max(np.sum(step.reshape(-1, self.dimension) ** 2, axis=1))))

    def at_saddle(self, system: System) -> bool:
        """Whether the Hessian has a negative eigenvalue; the next step then goes along negative
        curvature.
        """
        # the last step's factor tells as well; counting its pivots costs half of factorizing
        if (
            self.at is not system
            and self.shift <= SOFTEST * self.scale
            and self.factor.negative == 0
        ):
            return False
        self._assemble(system)
        way = self.factor.negative_direction() if self._factorize(SHIFT * self.scale) else None
        if way is None:
            return False
        self.way_off, self.multiple = LONGEST * self.length / self._size(way) * way, FIRST
        return True

    def judge(self, ratio: float) -> None:
        if self.way_off is not None:
            self.way_off = None if ratio > 0 else 0.25 * self.way_off
        elif ratio < 0.25:
            self.multiple *= 8.0
        elif ratio > 0.75:
            self.multiple = max(0.1 * self.multiple, 1e-3)


class _Krylov:
    """Conjugate gradients inside a ball, to a residual that falls with the force."""

    def __init__(self, length: float):
        self.length, self.radius, self.first, self.curved = (
            length,
            None,
            None,
            False,
        )  # curved: met negative curvature

    def __call__(
        self, system: System, slope: jax.Array, largest: float
    ) -> tuple[jax.Array | None, float]:
        self.first = self.first or largest
        if self.radius is None:
            self.radius = LONGEST * self.length * system.n**0.5
        forcing = min(0.1, (largest / self.first) ** 0.5)
        step, promised, curved = _steihaug(system, slope, self.radius, forcing)
        self.curved = bool(curved)
        size = float(jnp.sqrt(jnp.max(jnp.sum(step**2, axis=1))))
        if not np.isfinite(size):
            return None, 0.0
        if size > LONGEST * self.length:
            share = LONGEST * self.length / size
            along = float(jnp.sum(slope * step))
            promised = -share * along + share**2 * (float(promised) + along)
            step = share * step
        self.size = float(
            jnp.linalg.norm(step)
        )  # of what is left of it: a smaller radius is to shorten that
        return step, float(promised)

    def at_saddle(self, _: System) -> bool:
        """Conjugate gradients cannot tell: along a direction without a force they never look."""
        return False

    def judge(self, ratio: float) -> None:
        if ratio < 0.25:
            self.radius = 0.25 * self.size
        elif ratio > 0.75 and self.radius is not None and self.size > 0.9 * self.radius:
            self.radius = 2.0 * self.radius


@jax.jit
def _steihaug(
    system: System, slope: jax.Array, radius: Any, forcing: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The step of ``steihaug`` for the energy."""
    shape = slope.shape
    product = jax.linearize(energy_gradient(system), system.positions)[1]
    found = steihaug(lambda v: product(v.reshape(shape)).ravel(), slope.ravel(), radius, forcing)
    return found[0].reshape(shape), *found[1:]


def steihaug(
    apply: Callable[[jax.Array], jax.Array], g: jax.Array, radius: Any, forcing: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The step that conjugate gradients find for a quadratic model in a ball, what it promises, and
    whether it met negative curvature.

    Args:
      apply: (m,) -> (m,), the Hessian.
      g: (m,), the slope.
      radius: of the ball.
      forcing: residual to leave, of the slope.
    """
    target = forcing * jnp.sqrt(dot(g, g))

    def going(carry: Any) -> jax.Array:
        _, _, r, _, k, ended, _ = carry
        return ~ended & (k < CG_STEPS) & (dot(r, r) > target**2)

    def body(carry: Any) -> Any:
        p, hp, r, d, k, _, _ = carry
        hd = apply(d)
        curvature, rr = dot(d, hd), dot(r, r)
        alpha = rr / jnp.where(curvature > 0, curvature, 1.0)
        pd, dd, pp = dot(p, d), dot(d, d), dot(p, p)
        leaves = (curvature <= 0) | (pp + 2.0 * alpha * pd + alpha**2 * dd >= radius**2)
        edge = (-pd + jnp.sqrt(pd**2 + dd * (radius**2 - pp))) / dd
        alpha = jnp.where(leaves, edge, alpha)
        p, hp, new = p + alpha * d, hp + alpha * hd, r - alpha * hd
        return p, hp, new, new + dot(new, new) / rr * d, k + 1, leaves, curvature <= 0

    never = jnp.zeros((), bool)
    start = (jnp.zeros_like(g), jnp.zeros_like(g), -g, -g, jnp.zeros((), jnp.int32), never, never)
    p, hp, *_, curved = jax.lax.while_loop(going, body, start)
    return p, -(dot(g, p) + 0.5 * dot(p, hp)), curved
