"""Newton steps towards a minimum of the energy, by a sparse factorization or conjugate gradients.

Before each step the cheaper of both is chosen: the cost of the factor follows from the number of
particles and of their neighbors, that of conjugate gradients from the iterations of the last step.

The steps stay within a trust region, and both methods detect negative curvature of the energy. The
factorization, made outside of compiled code, is of H + mu I, with H the Hessian, I the identity and
mu a shift. mu is raised where the energy does not fall as the quadratic model of a step predicted,
or where a pivot of the last factorization is negative (Nocedal and Wright, Numerical Optimization,
2006, section 4.3). Conjugate gradients go to the edge of the trust region along the first direction
of negative curvature that they meet (Steihaug, SIAM J. Numer. Anal. 20, 626 (1983)). A step is
accepted where the energy falls by at least a tenth of the prediction of the quadratic model. If the
steps by factorization end at a saddle nevertheless, the next step is along a direction of negative
curvature, which the pivots give.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.compilation import compiled
from mdsens.implicit.linear.factor_estimate import FactorEstimate, product_seconds
from mdsens.implicit.linear.sparse_ldl import SHIFT, SparseFactor, bound, ordering
from mdsens.implicit.linear.vectors import dot
from mdsens.mechanics.forces import energy_gradient
from mdsens.mechanics.hessian import assembles, largest_force, sparse_hessian
from mdsens.model.system import System, potential_energy

__all__ = ["descend", "steihaug"]

# Longest step of a particle, in units of the potential's length scale.
LONGEST = 0.1
# Newton steps at most, before the first-order minimizer continues.
STEPS = 60
# Shifts mu, or radii of the trust region, that are tried for one step.
TRIALS = 8
# Steps in a row that do not halve the largest force, after which no more are made.
STALLED = 12
# Shift mu at the start, in units of the largest force over the potential's length scale.
FIRST = 0.1
# Stiffness of the softest mode of a packing, as a share of the stiffest. A factor with a smaller
# shift tells whether the Hessian has a negative eigenvalue.
SOFTEST = 1e-6
# Conjugate-gradient steps of one Newton step at most.
CG_STEPS = 4000
# Conjugate-gradient steps that a Newton step is expected to need before the first one was taken.
# From the force where Newton steps begin, to a hundredth of it: 270 for 4,096 discs, 400 for as
# many spheres near jamming, 180 for a glass of 4,000 Lennard-Jones particles; to 1e-6 of it two to
# three times as many.
EXPECTED = 500
# Largest residual of the Newton equation, relative to the force, and the smallest one. With a
# smaller one, round-off of forces along rigid motions, which have no stiffness, makes long steps.
LOOSEST = 0.1
TIGHTEST = 1e-4
# Difference of two energies that may be round-off, in units of eps |energy|: 1e-12 of the energy in
# double precision.
ENERGY_ROUND_OFF = 4500.0


@compiled
def _energy_and_gradient(system: System) -> tuple[jax.Array, jax.Array]:
    """Compute the energy U and its gradient dU/dR (n, d) at the positions of a system."""
    gradient = energy_gradient(system, used=system.neighbors.used)
    return potential_energy(system), gradient(system.positions)


def descend(
    system: System,
    tolerance: float,
    length: float,
    show: Callable[[int, float], None],
    round_off: float = 0.0,
    keep: Callable[[System], None] | None = None,
) -> tuple[System, float, int]:
    """Take Newton steps towards a minimum of the energy.

    The steps end before the tolerance is reached if they make no progress.

    Args:
      system: a system near a minimum, with a complete neighbor list.
      tolerance: the largest force to reach.
      length: length scale of the potential (contact distance, or the distance of the minimum of the
        pair energy), from ``natural_units``.
      show: function to call after each step with the number of steps and the largest force.
      round_off: a force at which round-off may begin. Once the largest force is below it, the first
        step that does not halve the largest force is the last one.
      keep: function to call with the system after each step, for a caller who keeps it where the
        steps are interrupted.

    Returns:
      (system after the last step, largest force on a particle, number of steps).
    """
    method = _choose_method(system, length)
    energy, slope = _energy_and_gradient(system)
    largest = float(largest_force(slope))
    taken = 0
    if not tolerance < largest < np.inf:  # a force that is not a number ends here as well
        return system, largest, taken
    # the largest force after the last step that made headway, and the number of steps since
    best = largest
    since = 0
    while taken < STEPS and since < STALLED:
        trial = _accepted_step(method, system, energy, slope) if largest > tolerance else None
        # A step may end at a saddle with a force below the tolerance, so this is asked there, too.
        if trial is None:
            trial = _step_off_saddle(method, system, energy, slope)
        if trial is None:
            break
        before = largest
        system, energy, slope = trial
        largest = float(largest_force(slope))
        taken += 1
        if keep is not None:
            keep(system)
        if _made_headway(method, before, largest, best):
            best = largest
            since = 0
        else:
            since += 1
        show(taken, largest)
        if since and tolerance < largest <= round_off:
            break
    return system, largest, taken


def _choose_method(system: System, length: float) -> Method:
    """Choose how Newton steps are computed, from what can be known before the first step.

    Where the Hessian is assembled, in double precision, the cost decides before each step. For
    other systems, conjugate gradients multiply by the linearized forces. ``length`` is the length
    scale of the potential.
    """
    if assembles(system) and system.positions.dtype == jnp.float64:
        return _ByCost(length)
    return _Krylov(length, None)


def _made_headway(method: Method, before: float, largest: float, best: float) -> bool:
    """Return whether a Newton step halved the largest force, or led down from a saddle.

    Args:
      method: the method, which knows whether its last step was along negative curvature.
      before, largest: the largest force before and after the step.
      best: the largest force after the last step that made headway.
    """
    # On the way down from a saddle the force rises, which is headway.
    left_saddle = largest > before and method.curved
    return largest < 0.5 * best or left_saddle


def _accepted_step(
    method: Method, system: System, energy: jax.Array, slope: jax.Array
) -> tuple[System, jax.Array, jax.Array] | None:
    """Try Newton steps until one lowers the energy enough; return the system after this step.

    A step is accepted if the energy falls by at least a tenth of the decrease that a quadratic
    model of the energy predicts.

    Returns:
      (system, energy, gradient dU/dR of the energy) after the step; None if no step is accepted.
    """
    largest = float(largest_force(slope))
    unresolved = ENERGY_ROUND_OFF * float(jnp.finfo(energy.dtype).eps) * abs(float(energy))
    for _ in range(TRIALS):
        step, promised = method(system, slope, largest)
        if step is None:
            return None
        moved = system.replace(positions=system.positions + step).reallocate(keep=True)
        energy_after, slope_after = _energy_and_gradient(moved)
        left = float(largest_force(slope_after))
        gained = float(energy - energy_after)
        largest_allowed = np.inf
        if promised <= unresolved:
            # The difference of the energies is too near to round-off. The forces at both ends give
            # it, up to the third order of the step, until they are round-off, too: a step that
            # doubles the largest force is not accepted.
            gained = -0.5 * float(jnp.sum((slope + slope_after) * step))
            largest_allowed = 2.0 * largest
        # The chained comparison also refuses a prediction of zero or less. All comparisons with NaN
        # are False, so that a step to a configuration without finite forces is refused, too.
        good = gained >= 0.1 * promised > 0.0 and left < largest_allowed
        method.adapt(gained / promised if good else 0.0)
        if good:
            return moved, energy_after, slope_after
    return None


def _step_off_saddle(
    method: Method, system: System, energy: jax.Array, slope: jax.Array
) -> tuple[System, jax.Array, jax.Array] | None:
    """Try steps along a direction of negative curvature until one lowers the energy enough.

    Returns:
      (system, energy, gradient dU/dR of the energy) after the step; None if the Hessian has no such
      direction or no step is accepted.
    """
    if not method.prepare_step_off_saddle(system):
        return None
    return _accepted_step(method, system, energy, slope)


class _Hessian:
    """The assembled Hessian of the system that Newton steps have reached.

    Attributes:
      system: the system whose Hessian is stored.
      matrix: the Hessian, a scipy sparse matrix.
    """

    def __init__(self) -> None:
        self.system: System | None = None
        self.matrix: Any = None

    def at(self, system: System) -> Any:
        """Return the Hessian of a system; it is assembled once for all trials of a step."""
        # By identity: every move makes a new System.
        if self.system is not system:
            self.matrix = sparse_hessian(system)
            self.system = system
        return self.matrix


class _ByCost:
    """Newton steps by the sparse factor or by conjugate gradients, whichever is estimated cheaper.

    Attributes:
      hessian: the assembled Hessian.
      by_factor, by_products: the two methods.
      method: the method of the current step.
      chosen_for: the system for which it was chosen.
      estimate: predicted cost of a factor; None before the first step.
    """

    def __init__(self, length: float):
        self.hessian = _Hessian()
        self.by_factor = _Factorized(length, self.hessian)
        self.by_products = _Krylov(length, self.hessian)
        self.method: _Factorized | _Krylov = self.by_factor
        self.chosen_for: System | None = None
        self.estimate: FactorEstimate | None = None

    @property
    def curved(self) -> bool:
        """Return whether the last step was along a direction of negative curvature."""
        return self.method.curved

    def __call__(
        self, system: System, slope: jax.Array, largest: float
    ) -> tuple[jax.Array | None, float]:
        """Compute a Newton step (n, d) and the decrease of the energy predicted for it."""
        if self.chosen_for is not system:
            self.method = self.by_factor if self.factor_is_cheaper(system) else self.by_products
            self.chosen_for = system
        return self.method(system, slope, largest)

    def factor_is_cheaper(self, system: System) -> bool:
        """Return whether a Newton step by a factor costs less than one by conjugate gradients.

        A step counts the factorizations, or the iterations, that the last step of its kind needed.
        """
        # A step along negative curvature that was prepared from a factor is taken by it.
        if self.by_factor.off_saddle is not None:
            return True
        matrix = self.hessian.at(system)
        rows = matrix.shape[0]
        if self.estimate is None:
            neighbors = matrix.nnz / (rows * system.dimension) - 1.0
            self.estimate = FactorEstimate.of(system.n, system.dimension, neighbors)
        by_factor = self.by_factor.factorizations * self.estimate.seconds
        return by_factor <= self.by_products.iterations * product_seconds(rows, matrix.nnz)

    def prepare_step_off_saddle(self, system: System) -> bool:
        """Prepare a step off a saddle, where the last step was by a factor of the Hessian."""
        return self.method.prepare_step_off_saddle(system)

    def adapt(self, ratio: float) -> None:
        """Adapt the method of this step to how well the step lowered the energy."""
        self.method.adapt(ratio)


class _Factorized:
    """Newton steps p = -(H + mu I)^-1 dU/dR, with H the Hessian, by a sparse factorization.

    I is the identity, and the shift mu is a multiple of the largest force divided by the length
    scale of the potential (contact distance, or the distance of the minimum of the pair energy).
    Twice that quotient is the negative curvature that a loose particle with a single contact can
    have. mu falls with the force, so that convergence is as good as quadratic.

    Attributes:
      length: length scale of the potential.
      multiple: mu in units of the largest force divided by ``length``.
      shift: mu of the last factorization.
      factorizations: number of factorizations of the last step.
      curved: whether the last step was along a direction of negative curvature.
      assembled_for: the system whose Hessian is ``matrix``, a scipy sparse matrix.
      order: the order of the rows of H in the factorization, chosen for few nonzero entries; None
        for the order of minimum degree.
      off_saddle: (n d,) the next step, along a direction of negative curvature; None for a Newton
        step.
    """

    def __init__(self, length: float, hessian: _Hessian):
        self.length = length
        self.hessian = hessian
        self.factorizations = 1
        self.multiple = FIRST
        self.shift = 0.0
        self.curved = False
        self.matrix: Any = None
        self.order: np.ndarray | None = None
        self.assembled_for: System | None = None
        self.off_saddle: np.ndarray | None = None

    def __call__(
        self, system: System, slope: jax.Array, largest: float
    ) -> tuple[jax.Array | None, float]:
        """Compute a Newton step (n, d), and the decrease of the energy predicted for it.

        The prediction is that of a quadratic model of the energy. The step is None if no shift of
        the Hessian that was tried gives a step downhill.
        """
        self._assemble(system)
        flat = np.asarray(slope).ravel()
        if self.off_saddle is None:
            step = self._shifted_step(flat, largest)
        else:
            # The curvature is the same in both directions; the slope chooses.
            step = self.off_saddle if flat @ self.off_saddle <= 0 else -self.off_saddle
        if step is None:
            return None, 0.0
        along = float(flat @ step)
        curvature = float(step @ (self.matrix @ step))
        self.curved = curvature < 0
        return jnp.asarray(step.reshape(slope.shape)), -(along + 0.5 * curvature)

    def _assemble(self, system: System) -> None:
        """Assemble the sparse Hessian of a system; the first call chooses the order of its rows."""
        if self.assembled_for is system:
            return
        self.matrix = self.hessian.at(system)
        self.assembled_for = system
        self.factorizations = 0
        self.scale = bound(self.matrix) or 1.0  # 1 for a matrix of zeros
        self.dimension = system.dimension
        if self.order is None:
            self.order = ordering(self.matrix, system.dimension)

    def _factorize(self, shift: float) -> bool:
        """Factorize H + shift I (H the Hessian, I the identity); return whether this succeeded."""
        self.factorizations += 1
        try:
            self.factor = SparseFactor(self.matrix, shift, self.order)
        except RuntimeError:  # exactly singular, in spite of the shift
            return False
        self.shift = shift
        return True

    def _shifted_step(self, flat: np.ndarray, largest: float) -> np.ndarray | None:
        """Compute a Newton step (n d,), raising the shift of the Hessian until it leads downhill.

        The result is None if no shift that was tried is large enough.

        Args:
          flat: the gradient dU/dR of the energy, (n d,).
          largest: the largest force on a particle.
        """
        for _ in range(TRIALS):
            if self._factorize(max(self.multiple * largest / self.length, SHIFT * self.scale)):
                step = -self.factor.apply(flat)
                size = self._longest_move(step)
                if np.isfinite(size) and flat @ step < 0:
                    return step * min(1.0, LONGEST * self.length / size)
            # A step uphill shows that H + mu I is not positive definite.
            self.multiple *= 8.0
        return None

    def _longest_move(self, step: np.ndarray) -> float:
        """Return the longest displacement of a single particle in a step (n d,)."""
        return float(np.sqrt(np.max(np.sum(step.reshape(-1, self.dimension) ** 2, axis=1))))

    def prepare_step_off_saddle(self, system: System) -> bool:
        """Prepare a step off a saddle; return whether the Hessian has a negative eigenvalue.

        The step is along a direction of negative curvature, from the pivots of the factorized
        Hessian.
        """
        # The factor of the last step tells as well, where its shift is small. Counting its negative
        # pivots costs half of a factorization.
        has_last_factor = self.assembled_for is not system and self.shift <= SOFTEST * self.scale
        if has_last_factor and self.factor.negative == 0:
            return False
        self._assemble(system)
        if not self._factorize(SHIFT * self.scale):
            return False
        direction = self.factor.negative_direction()
        if direction is None:
            return False
        self.off_saddle = LONGEST * self.length / self._longest_move(direction) * direction
        self.multiple = FIRST
        return True

    def adapt(self, ratio: float) -> None:
        """Adapt the shift of the Hessian to how well the last Newton step lowered the energy.

        Args:
          ratio: the decrease of the energy as a share of the predicted decrease; 0 for a step that
            was not accepted.
        """
        if self.off_saddle is not None:
            self.off_saddle = None if ratio > 0 else 0.25 * self.off_saddle
        elif ratio < 0.25:
            self.multiple *= 8.0
        elif ratio > 0.75:
            self.multiple = max(0.1 * self.multiple, 1e-3)


class _Krylov:
    """Newton steps by conjugate gradients within a ball, the trust region.

    The Newton equation H p = -dU/dR, with H the Hessian, is solved for the step p to a relative
    residual eta that follows the success of the last step: half the power 1.5 of the ratio by which
    that step reduced the forces (Eisenstat and Walker, SIAM J. Sci. Comput. 17, 16 (1996), choice
    2). Far from the minimum the solves are coarse, and near it convergence is superlinear.

    A block-Jacobi preconditioner would save a quarter to a third of the iterations and makes each
    of them half as long again, in scipy: it takes the same time for discs, spheres and glasses.

    Attributes:
      length: length scale of the potential.
      hessian: the assembled Hessian; None to multiply by the linearized forces.
      radius: radius of the trust region; None before the first step.
      reached: norm of the gradient at the last system; None before the first step.
      forcing: the relative residual eta.
      iterations: number of products with the Hessian in the last step.
      curved: whether conjugate gradients met negative curvature in the last step.
      size: norm of the last step.
    """

    def __init__(self, length: float, hessian: _Hessian | None):
        self.length = length
        self.hessian = hessian
        self.radius: float | None = None
        self.at: System | None = None
        self.reached: float | None = None
        self.forcing = LOOSEST
        self.iterations = EXPECTED
        self.curved = False
        self.size = 0.0

    def __call__(
        self, system: System, slope: jax.Array, largest: float
    ) -> tuple[jax.Array | None, float]:
        """Compute a Newton step (n, d), and the decrease of the energy predicted for it.

        The prediction is that of a quadratic model of the energy. The step is None if it is not
        finite.
        """
        if self.radius is None:
            # norm of a step in which all particles move by the longest step
            self.radius = LONGEST * self.length * system.n**0.5
        self._set_forcing(system, float(jnp.linalg.norm(slope)))
        step, promised, curved = self._minimize_model(system, slope)
        self.curved = bool(curved)
        longest = float(jnp.sqrt(jnp.max(jnp.sum(step**2, axis=1))))
        if not np.isfinite(longest):
            return None, 0.0
        if longest > LONGEST * self.length:
            # Of the shortened step s p the model is s g.p + s^2 p.H.p / 2, where
            # p.H.p / 2 = -(promised + g.p).
            share = LONGEST * self.length / longest
            along = float(jnp.sum(slope * step))
            promised = -share * along + share**2 * (float(promised) + along)
            step = share * step
        # The norm after shortening: a smaller radius has to shorten the step further.
        self.size = float(jnp.linalg.norm(step))
        return step, float(promised)

    def _set_forcing(self, system: System, size: float) -> None:
        """Set the accuracy of the solve, from the norm ``size`` of the gradient at a new system."""
        if self.at is system:
            return
        if self.reached:
            self.forcing = float(np.clip(0.5 * (size / self.reached) ** 1.5, TIGHTEST, LOOSEST))
        self.at = system
        self.reached = size

    def _minimize_model(self, system: System, slope: jax.Array) -> tuple[jax.Array, Any, Any]:
        """Minimize the quadratic model of the energy in the trust region, by ``steihaug``.

        Returns:
          (step (n, d), predicted decrease of the energy, whether negative curvature was met).
        """
        assert self.radius is not None
        if self.hessian is None:
            return _steihaug(system, slope, self.radius, self.forcing)
        matrix = self.hessian.at(system)
        step, promised, curved, self.iterations = steihaug_on_host(
            matrix, np.asarray(slope).ravel(), self.radius, self.forcing
        )
        return jnp.asarray(step.reshape(slope.shape)), promised, curved

    def prepare_step_off_saddle(self, _: System) -> bool:
        """Return False: conjugate gradients prepare no step off a saddle.

        Conjugate gradients move only along directions in which the forces have a part, and at a
        saddle the forces vanish.
        """
        return False

    def adapt(self, ratio: float) -> None:
        """Adapt the radius of the trust region to how well the last Newton step lowered the energy.

        Args:
          ratio: the decrease of the energy as a share of the predicted decrease; 0 for a step that
            was not accepted.
        """
        if ratio < 0.25:
            self.radius = 0.25 * self.size
        elif ratio > 0.75 and self.radius is not None and self.size > 0.9 * self.radius:
            # A step well inside of the ball does not tell whether a larger ball would be better.
            self.radius = 2.0 * self.radius


Method: TypeAlias = _ByCost | _Factorized | _Krylov


@compiled(loops=True)
def _steihaug(
    system: System, slope: jax.Array, radius: jax.Array | float, forcing: jax.Array | float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Minimize the quadratic model of a system's energy in a ball, by ``steihaug``.

    Args:
      slope: the gradient dU/dR of the energy, (n, d).
      radius: radius of the ball.
      forcing: norm of the residual at which to stop, relative to the norm of the gradient.

    Returns:
      (step (n, d), predicted decrease of the energy, whether negative curvature was met).
    """
    shape = slope.shape
    # linearize evaluates what depends on the positions once; each product then costs its linear
    # part alone.
    product = jax.linearize(energy_gradient(system), system.positions)[1]

    def apply(v: jax.Array) -> jax.Array:
        return product(v.reshape(shape)).ravel()

    step, promised, curved = steihaug(apply, slope.ravel(), radius, forcing)
    return step.reshape(shape), promised, curved


def steihaug(
    apply: Callable[[jax.Array], jax.Array],
    g: jax.Array,
    radius: jax.Array | float,
    forcing: jax.Array | float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Minimize the quadratic model g.p + p.H.p / 2 over p in a ball, by conjugate gradients.

    Args:
      apply: function from a vector (m,) to its product with the Hessian H, (m,).
      g: (m,), the gradient of the model at p = 0.
      radius: radius of the ball.
      forcing: norm of the residual at which to stop, relative to the norm of g.

    Returns:
      (step p, decrease of the model from 0 to p, whether negative curvature was met).
    """
    target = forcing * jnp.sqrt(dot(g, g))

    def unfinished(carry: tuple[jax.Array, ...]) -> jax.Array:
        _, _, r, _, k, ended, _ = carry
        return ~ended & (k < CG_STEPS) & (dot(r, r) > target**2)

    # p: step, hp: H p, r: residual -g - H p, d: search direction
    def body(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        p, hp, r, d, k, _, _ = carry
        hd = apply(d)
        curvature, rr = dot(d, hd), dot(r, r)
        # 1.0 is a stand-in: without positive curvature the step ends at the edge of the ball.
        alpha = rr / jnp.where(curvature > 0, curvature, 1.0)
        pd, dd, pp = dot(p, d), dot(d, d), dot(p, p)
        leaves = (curvature <= 0) | (pp + 2.0 * alpha * pd + alpha**2 * dd >= radius**2)
        # the positive root of |p + alpha d| = radius, where the search direction leaves the ball
        edge = (-pd + jnp.sqrt(pd**2 + dd * (radius**2 - pp))) / dd
        alpha = jnp.where(leaves, edge, alpha)
        p, hp, new = p + alpha * d, hp + alpha * hd, r - alpha * hd
        return p, hp, new, new + dot(new, new) / rr * d, k + 1, leaves, curvature <= 0

    never = jnp.zeros((), bool)
    start = (jnp.zeros_like(g), jnp.zeros_like(g), -g, -g, jnp.zeros((), jnp.int32), never, never)
    p, hp, *_, curved = jax.lax.while_loop(unfinished, body, start)
    return p, -(dot(g, p) + 0.5 * dot(p, hp)), curved


def steihaug_on_host(
    matrix: Any, g: np.ndarray, radius: float, forcing: float
) -> tuple[np.ndarray, float, bool, int]:
    """Minimize the quadratic model g.p + p.H.p / 2 over p in a ball, as :func:`steihaug`.

    For a matrix of many entries a product by scipy takes a third of the time of the linearized
    forces.

    Args:
      matrix: H, a scipy sparse matrix (m, m).
      g: (m,), the gradient of the model at p = 0.
      radius: radius of the ball.
      forcing: norm of the residual at which to stop, relative to the norm of g.

    Returns:
      (step p, decrease of the model from 0 to p, whether negative curvature was met, number of
      products).
    """
    p = np.zeros_like(g)
    hp = np.zeros_like(g)
    r = -g
    d = r
    rr = float(r @ r)
    target = forcing**2 * rr
    steps = 0
    while steps < CG_STEPS and rr > target:
        hd = matrix @ d
        steps += 1
        curvature = float(d @ hd)
        pp, pd, dd = (float(u @ v) for u, v in ((p, p), (p, d), (d, d)))
        # Without positive curvature the step ends at the edge of the ball.
        alpha = rr / curvature if curvature > 0 else np.inf
        if not pp + 2.0 * alpha * pd + alpha**2 * dd < radius**2:
            # the positive root of |p + alpha d| = radius
            edge = (-pd + np.sqrt(pd**2 + dd * max(radius**2 - pp, 0.0))) / dd
            p = p + edge * d
            hp = hp + edge * hd
            return p, _decrease(g, p, hp), curvature <= 0, steps
        p = p + alpha * d
        hp = hp + alpha * hd
        r = r - alpha * hd
        before = rr
        rr = float(r @ r)
        d = r + rr / before * d
    return p, _decrease(g, p, hp), False, steps


def _decrease(g: np.ndarray, p: np.ndarray, hp: np.ndarray) -> float:
    """Compute the decrease -(g.p + p.H.p / 2) of a quadratic model, with ``hp`` = H p."""
    return -float(g @ p + 0.5 * (p @ hp))
