"""Relaxation under constraints: an augmented Lagrangian to approach the minimum, then Newton steps.

    L_rho = U + sum_k (lambda_k g_k + rho_k g_k^2 / 2),   lower <= x <= upper

U is the energy, and x are the positions and the parameters that constraints relax with the
positions. The equations g_k = 0 of the constraints have the multipliers lambda_k and the penalties
rho_k. scipy's L-BFGS-B minimizes L_rho within the bounds of x; then lambda_k grows by rho_k g_k.
Both are repeated until g is small (Nocedal and Wright, Numerical Optimization, 2006, section 17.4).
Near the minimum, coordinates that are at a bound and pushed against this bound are fixed there.
Then Newton steps solve the optimality condition for x and lambda together; each Newton step squares
the distance to the minimum.

In this module z is one vector of all positions, followed by the relaxed parameters, that is, the
parameters that constraints relax with the positions.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse.linalg import lsqr

from mdsens._util.compilation import compiled
from mdsens._util.errors import InputError
from mdsens._util.progress import Decades
from mdsens.mechanics.kkt_factor import KKT
from mdsens.mechanics.kkt_operator import constrained_null_space
from mdsens.mechanics.lagrangian import (
    bounds,
    equations,
    lagrangian_gradient,
    multipliers_at,
    own_params,
    pinned,
    unknowns_of,
    with_unknowns,
)
from mdsens.mechanics.null_space import NullSpace
from mdsens.mechanics.rigidity import analyze_rigidity
from mdsens.mechanics.status import Status
from mdsens.mechanics.units import (
    doubtful_stiffness,
    force_goal,
    force_scale,
    natural_units,
    round_off,
    step_off_saddle,
)
from mdsens.mechanics.unknowns import Unknowns, flat, unflat
from mdsens.model.system import System, energy_number, potential_energy
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.relaxation.newton import ENERGY_ROUND_OFF
from mdsens.relaxation.options import Options

__all__ = ["relax_constrained"]

# Forces and lengths below are in units of the potential's: its length l, and l times its stiffness.

# Updates of the multipliers in one descent of the augmented Lagrangian, at most.
ROUNDS = 30
# Force and g at which Newton steps begin. An earlier version, without shifts of H_L, had 1e-3.
NEAR = 2e-4
# Factor on that, each time that Newton steps made no headway.
NEARER = 0.1
# Largest force at a start that counts as next to a minimum.
CLOSE = 1e-2
# Times that the augmented Lagrangian goes on after Newton steps that made no headway, at most.
RETURNS = 12
# Newton steps in a row at most, shifts that are tried for one step, and steps in a row that do not
# halve the force, after which no more are made.
STEPS = 60
TRIALS = 8
STALLED = 12
# Shift of H_L at the start, in units of the force over the potential's length scale.
FIRST = 0.1
# A step that lowers the augmented Lagrangian may raise the force by less than this factor.
RISEN = 10.0
# Longest step of a coordinate.
LONGEST = 0.1
# rho |grad g|^2 of each equation at the start, in units of the potential's stiffness. An earlier
# version had 10.
PENALTY = 1.0
# Draws of random signs from which the mean |grad g|^2 is estimated, to some ten percent.
DRAWS = 4
# Factor on rho where a round does not lower g to a quarter.
RISE = 5.0
# An equation that is off by more than this is not met.
UNMET = 1e-6
# Round-off of a coordinate, relative.
EPS = 1e-14
# Saddles that one relaxation leaves at most.
SADDLES = 3
# Force and g to which the augmented Lagrangian is minimized after that step.
DOWN = 1e-10
# Force that counts as round-off, in units of ``round_off``: no relaxation goes on from there.
ROUND_OFF = 3.0
# Pairs of steps and gradients that L-BFGS-B keeps.
MEMORY = 30

# Multipliers or values of the equations, by the name of the constraint.
ByName: TypeAlias = dict[str, jax.Array]


class _Trial(NamedTuple):
    """State of a relaxation under constraints after a trial step of Newton's method.

    The relaxation goes on from this state only if the step makes progress.
    """

    system: System
    multipliers: ByName | None
    slope: Unknowns
    z: np.ndarray
    force: float  # the largest force left, inf where it is not finite


@compiled
def _augmented(
    system: System, multipliers: ByName, penalties: ByName
) -> tuple[jax.Array, Unknowns, ByName]:
    """Compute the augmented Lagrangian L_rho, its gradient, and the residuals g of equations g = 0.

        L_rho = U + sum_k (lambda_k g_k + rho_k g_k^2 / 2)

    The gradient is by the positions and by the parameters that constraints relax with the
    positions.

    Args:
      system: the system, with the energy U.
      multipliers: the Lagrange multipliers lambda.
      penalties: the penalty rho of each equation, a scalar.
    """
    own = own_params(system)

    def value(x: Unknowns) -> tuple[jax.Array, ByName]:
        params = {**own, **(x.params or {})}
        g = equations(system, x.positions, params)
        extra = sum(
            (jnp.sum(multipliers[k] * g[k] + 0.5 * penalties[k] * g[k] ** 2) for k in g),
            jnp.zeros(()),
        )
        return potential_energy(system, x.positions, params) + extra, g

    (energy, g), slope = jax.value_and_grad(value, has_aux=True)(_primal(system))
    return energy, slope, g


def _primal(system: System) -> Unknowns:
    """Return the positions of a system and the parameters that relax with the positions."""
    return dataclasses.replace(unknowns_of(system), multipliers=None)


def _flat_primal(x: Unknowns) -> np.ndarray:
    """Return the positions and relaxed parameters in ``x`` as one vector of doubles.

    Relaxed parameters are those that constraints relax with the positions. Lagrange multipliers in
    ``x`` are left out.
    """
    return flat(dataclasses.replace(x, multipliers=None)).astype(float)


@compiled
def _slope(system: System, multipliers: ByName | None) -> Unknowns:
    """Compute the gradient dL/dx of the Lagrangian L and the residuals g of equations g = 0.

    x are the positions and the parameters that constraints relax with the positions.
    """
    return lagrangian_gradient(system, unknowns_of(system, multipliers), own_params(system))


@compiled
def _slope_rate(system: System, multipliers: ByName | None, change: Unknowns) -> Unknowns:
    """Compute the change of dL/dx and g for a change of x, at constant Lagrange multipliers.

    L is the Lagrangian, x are the positions and the parameters that constraints relax with the
    positions, and g are the residuals of the equations g = 0. ``change`` is the change of x.
    """
    x = unknowns_of(system, multipliers)
    own = own_params(system)
    tangent = dataclasses.replace(change, multipliers=jax.tree.map(jnp.zeros_like, x.multipliers))
    return jax.jvp(lambda y: lagrangian_gradient(system, y, own), (x,), (tangent,))[1]


@compiled
def _limits(system: System) -> tuple[Unknowns, Unknowns]:
    """Return lower and upper bounds of the positions and of the parameters that relax with them.

    Both bounds of a pinned coordinate are its position.
    """
    low, high = bounds(system, system.params)
    stuck = pinned(system)
    lower = jnp.where(stuck, system.positions, low.positions)
    upper = jnp.where(stuck, system.positions, high.positions)
    return dataclasses.replace(low, positions=lower), dataclasses.replace(high, positions=upper)


class _Relaxation:
    """State of one relaxation under constraints; its methods continue the relaxation.

    z is the vector of positions and of the parameters that constraints relax with the positions.

    Attributes:
      system: the system so far.
      multipliers: Lagrange multipliers of the equations; None without equations.
      steps: number of evaluations of the gradient of the Lagrangian so far.
      requested: the tolerance that the user asked for, or None.
      tolerance: the largest force that counts as converged, for the pairs that interact now.
      round_off: the largest force that counts as round-off.
      length, stiffness: length scale and stiffness of the potential, from ``natural_units``.
      low, high: bounds of z.
      like: the arrays (positions and relaxed parameters) whose shapes are used to divide z.
      count: number of entries of z.
    """

    def __init__(self, system: System, requested: float | None, max_steps: int, bar: Decades):
        self.max_steps = max_steps
        self.requested = requested
        self.bar = bar
        length, stiffness = natural_units(system)
        self.length = float(length)
        self.stiffness = float(stiffness)
        _check_limits(system)
        low, high = _limits(system)
        self.low = flat(low)
        self.high = flat(high)
        self.count = self.low.size
        self.like = _primal(system)
        self.system = system
        self.round_off = ROUND_OFF * round_off(system)
        # Coordinates that are beyond their bounds at the start are put on them.
        self.system = self.system_at(np.clip(flat(self.like), self.low, self.high))
        self.tolerance = 0.0
        self.aim()
        self.multipliers: ByName | None = unknowns_of(self.system).multipliers
        self.steps = 0
        self.force = np.inf
        self.saddles = 0
        self.highest = 0.0
        self.at_saddle = False

    def aim(self) -> None:
        """Set the largest force that counts as converged.

        This force is the tolerance of the user, or else 1e-12 of the mean force of the pairs that
        interact now.
        """
        dtype = self.system.positions.dtype.type
        # no force left, so that all pairs with a force count
        scale = force_scale(self.system, dtype(self.length), dtype(self.stiffness), dtype(0.0))
        goal, _ = force_goal(scale, self.requested)
        # at most the potential's own force; fmin takes that also where the goal is not a number
        self.tolerance = float(np.fmin(goal, self.stiffness * self.length))
        self.bar.tolerance = max(self.tolerance, self.round_off)

    def system_at(self, z: np.ndarray) -> System:
        """Return the system at other positions and relaxed parameters, given as one vector ``z``.

        Relaxed parameters are those that constraints relax with the positions. The neighbor list of
        the result is complete.
        """
        dtype = self.system.positions.dtype
        x = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), unflat(z, self.like))
        return with_unknowns(self.system, x, own_params(self.system)).reallocate(keep=True)

    @property
    def z(self) -> np.ndarray:
        """Return the positions and the parameters that relax with them, as one vector."""
        return _flat_primal(unknowns_of(self.system))

    @property
    def slope(self) -> Unknowns:
        """Compute the gradient of the Lagrangian and the residuals g of the equations g = 0."""
        return _slope(self.system, self.multipliers)

    def force_left(self, slope: Unknowns, z: np.ndarray) -> float:
        """Compute the largest unbalanced force, the residuals of equations included.

        The unbalanced force is k (z - clip(z - slope / k)), which is k times a step of projected
        gradient descent. Here z are the positions and the parameters that relax with them, the
        slope is the gradient of the Lagrangian by z, k is the stiffness of the potential from
        ``natural_units``, and clip moves coordinates beyond a bound to that bound. The unbalanced
        force is zero at a bound that a coordinate is pushed against, and small near a bound that
        the coordinate will be pushed against. A slope along a parameter counts as a force, and so
        does k g for a constraint with an equation g = 0.
        """
        along = _flat_primal(slope)
        left = self.stiffness * (z - np.clip(z - along / self.stiffness, self.low, self.high))
        n, d = self.system.positions.shape
        forces = np.linalg.norm(left[: n * d].reshape(n, d), axis=1)
        others = np.abs(left[n * d :])
        g = [
            np.max(np.abs(np.asarray(leaf)), initial=0.0)
            for leaf in jax.tree.leaves(slope.multipliers)
        ]
        return float(
            max(
                forces.max(initial=0.0),
                others.max(initial=0.0),
                self.stiffness * max(g, default=0.0),
            )
        )

    def kkt_system(self, fixed: np.ndarray) -> KKT:
        """Return the linear system of a Newton step on the optimality conditions of the Lagrangian.

        Args:
          fixed: (count,) True for the positions, and the parameters that relax with them, that the
            step does not change.
        """
        mask = jax.tree.map(jnp.asarray, unflat(fixed, self.like))
        no_equation = jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), bool), self.multipliers)
        n, d = self.system.positions.shape
        # No rattlers and no free motions: the shift of a Newton step makes the system regular.
        null = NullSpace(
            jnp.zeros(n, bool),
            None,
            jnp.asarray(float(n)),
            motions=jnp.zeros((0, n, d)),
            active_set=Unknowns(mask.positions, params=mask.params, multipliers=no_equation),
        )
        return KKT(self.system, null, self.multipliers)

    def balance_forces(self) -> None:
        """Set Lagrange multipliers that balance most of the forces, if a minimum is near the start.

        The augmented Lagrangian would find these multipliers, too, but with unbalanced forces it
        may go to another minimum.
        """
        if self.multipliers is None:
            return
        z = self.z
        system = self.kkt_system((z <= self.low) | (z >= self.high))
        # A^T lambda = -dL/dx on the free coordinates, by least squares
        along = _flat_primal(self.slope)
        # lsqr gives the shortest solution where equations are redundant and A A^T is singular.
        balancing = lsqr(
            system.equations.T,
            -np.where(system.moves[: self.count], along, 0.0),
            atol=EPS,
            btol=EPS,
        )[0]
        like = dataclasses.replace(self.like, multipliers=self.multipliers)
        # KKT has A in units of ``unit``, so that lambda is ``unit`` times the solution.
        multipliers = unflat(np.concatenate([z, system.unit * balancing]), like).multipliers
        dtype = self.system.positions.dtype
        multipliers = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), multipliers)
        force = self.force_left(_slope(self.system, multipliers), z)
        if force <= CLOSE * self.stiffness * self.length:
            self.multipliers = multipliers

    def minimize_augmented(self, share: float) -> None:
        """Minimize the augmented Lagrangian until forces and residuals of equations are small.

        Args:
          share: one number for both limits: the largest residual of an equation, in units of the
            potential's length scale l, and the largest force, in units of l times the potential's
            stiffness.
        """
        penalties = self._penalties()
        largest_before = np.inf
        for _ in range(ROUNDS):
            self._minimize_in_bounds(penalties, share * self.stiffness * self.length)
            if self.multipliers is None:
                return
            _, _, g = _augmented(self.system, self.multipliers, penalties)
            self.multipliers = {k: self.multipliers[k] + penalties[k] * g[k] for k in g}
            largest = max(
                float(np.max(np.abs(np.asarray(v)), initial=0.0)) for v in jax.tree.leaves(g)
            )
            if largest <= share * self.length or self.steps >= self.max_steps:
                return
            if largest > 0.25 * largest_before:
                penalties = {k: RISE * v for k, v in penalties.items()}
            largest_before = largest

    def _minimize_in_bounds(self, penalties: ByName, force: float) -> None:
        """Minimize the augmented Lagrangian within the bounds, at constant Lagrange multipliers.

        The variables are the positions and the parameters that constraints relax with the
        positions.

        Args:
          penalties: the penalty rho of each equation.
          force: the largest component of the projected gradient at which to stop.
        """
        start = self.z
        system = self.system
        last_energy = 0.0
        last_z = start

        def evaluate(z: np.ndarray) -> tuple[float, np.ndarray]:
            nonlocal last_energy, last_z
            self.system = self.system_at(z)
            energy, slope, _ = _augmented(self.system, self.multipliers or {}, penalties)
            self.steps += 1
            along = flat(slope).astype(float)
            if self.steps % 50 == 0:
                self.bar.show(self.steps, float(np.max(np.abs(along), initial=0.0)))
            if not (np.isfinite(float(energy)) and np.isfinite(along).all()):
                # A steep parabola about the last point with a finite energy: the line search turns
                # round.
                back = z - last_z
                steep = 1e3 * self.stiffness
                return last_energy + steep * float(back @ back), 2.0 * steep * back
            last_energy = float(energy)
            last_z = z.copy()
            return last_energy, along

        # Imported here, so that importing mdsens does not import scipy.optimize.
        from scipy.optimize import minimize

        budget = max(self.max_steps - self.steps, 1)
        result = minimize(
            evaluate,
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=list(zip(self.low, self.high, strict=True)),
            options={
                "maxcor": MEMORY,
                "maxfun": budget,
                "maxiter": budget,
                "ftol": 0.0,  # the gradient alone ends the search
                "gtol": force,
                "maxls": 50,
            },
        )
        # The last evaluation need not be at the minimum. The neighbor list is made from the one
        # before the search.
        self.system = system
        self.system = self.system_at(np.clip(result.x, self.low, self.high))

    def _penalties(self) -> ByName:
        """Choose the penalty rho of each equation g = 0 of the augmented Lagrangian.

        rho |grad g|^2 is a fixed multiple (PENALTY) of the potential's stiffness from
        ``natural_units``, which is an estimate of the largest eigenvalue of the Hessian. Where the
        equation g = 0 of a constraint has several components, |grad g|^2 is the mean over these.
        """
        own = own_params(self.system)

        def values(x: Unknowns) -> ByName:
            return equations(self.system, x.positions, {**own, **(x.params or {})})

        g, transpose = jax.vjp(values, _primal(self.system))
        penalties = {}
        rng = np.random.default_rng(0)  # a fixed seed: the same penalties in every run
        for name in g:
            # The gradients of the components with random signs: the mean of their squared sum is
            # the sum of the squares. Without the signs they may cancel, as along a ring of bonds.
            draws = []
            for _ in range(DRAWS):
                signs = jax.tree.map(jnp.zeros_like, g)
                signs[name] = jnp.asarray(rng.choice([-1.0, 1.0], g[name].shape), g[name].dtype)
                gradient = jax.tree.leaves(transpose(signs)[0])
                draws.append(sum(float(jnp.sum(leaf**2)) for leaf in gradient))
            mean_squared = float(np.mean(draws)) / max(int(np.size(g[name])), 1)
            # 1e-300 only avoids a division by zero
            penalties[name] = jnp.asarray(PENALTY * self.stiffness / max(mean_squared, 1e-300))
        return penalties

    def relax(self) -> float:
        """Relax the system to the tolerance, or as far as possible; return the force left.

        The force is the largest unbalanced force on a particle.
        """
        share = NEAR
        force = self.force_left(self.slope, self.z)
        # not (<=) rather than >, so that a force that is not a number counts as large
        if not force <= NEAR * self.stiffness * self.length:
            self.minimize_augmented(share)
        for _ in range(RETURNS):
            force = self.newton()
            self.aim()
            if force <= max(self.tolerance, self.round_off) or self.steps >= self.max_steps:
                break
            # no nearer than a tenth of the tolerance
            share = max(share * NEARER, 0.1 * self.tolerance / (self.stiffness * self.length))
            self.minimize_augmented(share)
        return force

    def to_minimum(self, leave_saddles: bool) -> None:
        """Relax the system, and leave the saddles that it comes to.

        Sets the force left, ``force``; the number of saddles left, ``saddles``; the energy of the
        first one, ``highest``; and whether the system is still at one, ``at_saddle``.
        """
        self.balance_forces()
        self.force = self.relax()
        while leave_saddles and self.force <= max(self.tolerance, self.round_off):
            energy = energy_number(self.system)
            here = self.system
            if not self.leave_saddle(self.force):
                break
            if self.saddles == SADDLES:
                self.at_saddle = True
                self.system = here  # where ``force`` is the force that is left
                break
            self.highest = self.highest if self.saddles else energy
            self.saddles += 1
            # The augmented Lagrangian goes down from here; Newton steps on the optimality condition
            # may return to the saddle.
            self.minimize_augmented(DOWN)
            self.force = self.relax()

    def unmet_equation(self) -> str:
        """Describe the equation with the largest residual; the text is empty where all are met.

        An equation of a constraint is met if its residual is at most a fixed fraction (UNMET) of
        the potential's length scale.
        """
        largest = UNMET * self.length
        message = ""
        for name, g in (self.slope.multipliers or {}).items():
            off = np.abs(np.atleast_1d(np.asarray(g))).ravel()
            if off.max(initial=0.0) > largest:
                k = int(np.argmax(off))
                largest = float(off[k])
                message = f"{name}[{k}] is off by {off[k]:.3g}"
        return message

    def judge(self, force: float, unmet: str) -> Status:
        """Return the status of a relaxation that ended with a largest force ``force``.

        Args:
          force: the largest unbalanced force on a particle.
          unmet: the equation that is not met, from ``unmet_equation``; empty where all are met.
        """
        if force <= self.tolerance:
            return Status.CONVERGED
        if unmet:
            return Status.CONSTRAINTS_UNMET
        if force <= self.round_off:
            return Status.ROUND_OFF_LIMITED
        if not np.isfinite(force):
            return Status.NOT_FINITE
        return Status.UNCONVERGED if self.steps < self.max_steps else Status.MAX_STEPS_REACHED

    def leave_saddle(self, force: float) -> bool:
        """Take a step along the mode of lowest stiffness, if this stiffness is negative.

        The mode is the lowest among the displacements that the equations of the constraints allow.

        Args:
          force: the largest force left.

        Returns:
          whether a step was taken.
        """
        backbone, net, null = analyze_rigidity(self.system, force)
        constrained = constrained_null_space(backbone, net, null, self.multipliers)
        system = KKT(backbone, constrained, self.multipliers)
        if system.negative[0] == 0:
            return False
        # The pivot of a free motion may be negative by round-off, and without a factor the pivots
        # are not known: the eigenvalue decides.
        spectrum = system.lowest(1, doubtful_stiffness(force, self.length))
        if not spectrum.negative:
            return False
        step = step_off_saddle(spectrum.vectors[:, 0], self.length)
        self.system = self.system_at(np.clip(self.z + step, self.low, self.high))
        return True

    def newton(self) -> float:
        """Take Newton steps on the optimality condition, as long as they make progress.

        The condition is that the derivative of the Lagrangian vanishes, and the Newton steps use
        H_L, the second derivative. A multiple of the largest force divided by the length scale of
        the potential (contact distance, or the distance of the minimum of the pair energy) is added
        to the diagonal of H_L. The multiple grows until a step makes progress, and falls after such
        a step. A step makes progress where it lowers the largest force left, or lowers the
        augmented Lagrangian and hardly raises this force.

        Returns:
          the largest force that is left.
        """
        slope = self.slope
        z = self.z
        multiple = FIRST
        force = self.force_left(slope, z)
        start = (force, self.system, self.multipliers)
        # the force after the last step that made headway, and the number of steps since
        best = force
        since = 0
        penalties = self._penalties() if self.multipliers is not None else {}
        for _ in range(STEPS):
            converged = not (np.isfinite(force) and force > self.tolerance)
            if converged or self.steps >= self.max_steps or since >= STALLED:
                break
            trial, multiple = self._find_trial(slope, z, force, multiple, penalties)
            if trial is None:
                break
            self.system, self.multipliers, slope, z, force = trial
            multiple = max(0.1 * multiple, 1e-3)
            if force < 0.5 * best:
                best = force
                since = 0
            else:
                since += 1
            self.bar.show(self.steps, force)
        if force > start[0]:
            force, self.system, self.multipliers = start
        return force

    def _find_trial(
        self, slope: Unknowns, z: np.ndarray, force: float, multiple: float, penalties: ByName
    ) -> tuple[_Trial | None, float]:
        """Try Newton steps with larger and larger shifts of H_L until one makes progress.

        H_L is the second derivative of the Lagrangian. A step makes progress where it lowers the
        largest force, or lowers the augmented Lagrangian and hardly raises the force.

        Args:
          slope: the gradient of the Lagrangian at z, and the residuals g of the equations g = 0.
          z: the positions and relaxed parameters as one vector.
          force: the largest force left at z.
          multiple: the first shift, in units of the force over the potential's length scale.
          penalties: the penalty rho of each equation in the augmented Lagrangian.

        Returns:
          (the end of the step, None where no step makes progress; the multiple of the last shift).
        """
        for _ in range(TRIALS):
            trial = self._try(z, self._step(slope, z, multiple * force / self.length))
            if trial.force < 0.9 * force:
                return trial, multiple
            if trial.force < RISEN * force and self._is_lower(trial, z, penalties):
                return trial, multiple
            multiple *= 8.0
        return None, multiple

    def _is_lower(self, trial: _Trial, z: np.ndarray, penalties: ByName) -> bool:
        """Return whether a trial Newton step lowers the augmented Lagrangian.

        Its values before and after the step are compared, both with the Lagrange multipliers that
        hold after the step. Where the difference of the two values is round-off, the gradients
        before and after the step decide.
        """
        multipliers = trial.multipliers or {}
        ends = [_augmented(s, multipliers, penalties) for s in (self.system, trial.system)]
        before, after = (float(energy) for energy, *_ in ends)
        if abs(after - before) > ENERGY_ROUND_OFF * float(np.finfo(float).eps) * abs(before):
            return after < before
        # twice the difference by the trapezoidal rule
        return sum(float(flat(slope) @ (trial.z - z)) for _, slope, _ in ends) < 0.0

    def _step(self, slope: Unknowns, z: np.ndarray, shift: float) -> np.ndarray:
        """Compute a Newton step of the positions, relaxed parameters and Lagrange multipliers.

        Relaxed parameters are those that constraints relax with the positions. The result is one
        vector: positions, relaxed parameters, multipliers. A coordinate that is pushed against a
        bound goes to the bound, or stays there.

        Args:
          slope: the gradient of the Lagrangian at z, and the residuals g of the equations g = 0.
          z: the positions and relaxed parameters as one vector.
          shift: number to add to the diagonal of H_L, the second derivative of the Lagrangian.
        """
        along = _flat_primal(slope)
        # Where a gradient step of size 1 / stiffness ends at a bound or beyond, the coordinate is
        # taken to be constrained there.
        ahead = z - along / self.stiffness
        fixed = (self.low == self.high) | (ahead <= self.low) | (ahead >= self.high)
        onto_bounds = np.where(fixed, np.clip(ahead, self.low, self.high) - z, 0.0)
        # The other unknowns answer to the slope after these coordinates have moved.
        change = jax.tree.map(jnp.asarray, unflat(onto_bounds, self.like))
        rate = _slope_rate(self.system, self.multipliers, change)
        system = self.kkt_system(fixed)
        right_side = -(flat(slope) + flat(rate)).astype(float)
        # Equations and multipliers in the units of KKT, where all rows are of similar size.
        units = np.where(np.arange(system.size) < system.primal, 1.0, system.unit)
        step = units * system.direction(np.where(system.moves, units * right_side, 0.0), shift)
        step[: self.count] += onto_bounds
        longest = np.max(np.abs(step[: self.count]), initial=0.0)
        return step * min(1.0, LONGEST * self.length / longest) if longest > 0 else step

    def _try(self, z: np.ndarray, step: np.ndarray) -> _Trial:
        """Take a trial step of Newton's method, and return the state of the relaxation after it.

        The state contains the gradient of the Lagrangian and the largest unbalanced force there.

        Args:
          z: one vector of the positions and of the parameters that constraints relax, before the
            step.
          step: the changes of z and of the Lagrange multipliers, as one vector. Coordinates beyond
            their bounds after the step are put on the bounds.
        """
        z_after = np.clip(z + step[: self.count], self.low, self.high)
        system = self.system_at(z_after)
        multipliers = self.multipliers
        if multipliers is not None:
            like = dataclasses.replace(self.like, multipliers=multipliers)
            change = unflat(step, like).multipliers
            multipliers = jax.tree.map(lambda a, b: a + jnp.asarray(b), multipliers, change)
        slope = _slope(system, multipliers)
        self.steps += 1
        force = self.force_left(slope, z_after)
        return _Trial(
            system=system,
            multipliers=multipliers,
            slope=slope,
            z=z_after,
            force=force if np.isfinite(force) else np.inf,
        )


def relax_constrained(system: System, options: Options, bar: Decades) -> tuple[Equilibrium, str]:
    """Minimize the energy of a system under its constraints.

    ``max_force`` of the result is the largest of three kinds of numbers: the norm of the unbalanced
    force on each particle; the unbalanced derivative of the Lagrangian by each parameter that a
    constraint relaxes; and |g| times the potential's stiffness, for each equation g = 0 of a
    constraint. ``steps`` of the result is the number of evaluations of the gradient of the
    Lagrangian. Coordinates that are beyond their bounds at the start are put on these bounds.

    Returns:
      (the relaxed system, text for an error message that tells where the relaxation ended).
    """
    run = _Relaxation(system, options.tolerance, options.max_steps, bar)
    interrupted = options.interrupted
    try:
        if not interrupted:
            run.to_minimum(options.leave_saddles)
    except KeyboardInterrupt:
        interrupted = True
    force = run.force_left(run.slope, run.z) if interrupted else run.force
    saddles = run.saddles
    highest = run.highest
    unmet = run.unmet_equation()
    status = Status.INDEFINITE if run.at_saddle else run.judge(force, unmet)
    if interrupted:
        status = Status.INTERRUPTED
    relaxed = run.system
    unknowns = unknowns_of(relaxed, run.multipliers)
    eq = Equilibrium(
        system=relaxed,
        code=jnp.asarray(status.value, jnp.int32),
        max_force=jnp.asarray(force),
        steps=jnp.asarray(run.steps),
        wall_time=0.0,
        tolerance=run.tolerance,
        force_floor=run.round_off,
        saddles=saddles,
        descent=highest - energy_number(relaxed) if saddles else 0.0,
        examined=options.leave_saddles,
        multipliers=multipliers_at(relaxed, unknowns, own_params(relaxed)),
    )
    message = (
        f"minimize under constraints stopped after {run.steps:,} steps at max_force {force:.3e}"
    )
    return eq, f"{message}; {unmet}" if unmet else message


def _check_limits(system: System) -> None:
    """Raise InputError if walls leave a particle no room or a pinned particle is beyond a wall."""
    low, high = bounds(system, system.params)
    lower = np.asarray(low.positions, float)
    upper = np.asarray(high.positions, float)
    positions = np.asarray(system.positions, float)
    if (lower > upper).any():
        i, axis = (int(k) for k in np.argwhere(lower > upper)[0])
        raise InputError(
            f"the walls leave particle {i} no room along axis {axis}: its lower bound"
            f" {lower[i, axis]:g} is above its upper bound {upper[i, axis]:g}; move the walls"
            " apart."
        )
    margin = ROUND_OFF * EPS * abs(positions)
    beyond = (positions < lower - margin) | (positions > upper + margin)
    beyond &= np.asarray(pinned(system))
    if beyond.any():
        i, axis = (int(k) for k in np.argwhere(beyond)[0])
        raise InputError(
            f"particle {i} is pinned at {positions[i, axis]:g} along axis {axis}, beyond a wall:"
            f" the walls allow {lower[i, axis]:g} to {upper[i, axis]:g}; move the particle or the"
            " wall."
        )
