"""Compute the next step of an inverse design from derivatives of the properties to design."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.pytree import PyTree
from mdsens.design.ensemble import (
    Measurement,
    Problem,
    crossing_times,
    measure,
    moves,
    pair_motion,
    softened,
)
from mdsens.design.history import State
from mdsens.design.methods import LevenbergMarquardt, Optax, bounded_step
from mdsens.design.variables import Variables
from mdsens.mechanics.units import natural_units
from mdsens.sensitivity.linearization import Linearization

__all__ = [
    "bands_of",
    "first_trust",
    "gauss_newton",
    "leaves",
    "next_trust",
    "of_optimizer",
    "remembered",
]

# Largest width of an averaged potential, in units of the potential's length scale.
WIDEST = 0.2
# Factors of the trust region's radius after a step that went well, and after a refused one.
GROW = 1.7
SHRINK = 0.6
# Change of a feature, in its tolerances, for a change of 1 of the variables. A feature that changes
# by less does not depend on them.
IDLE = 1e-6
# How many fractions of the way to the targets are tried until the step fits in the trust region.
PARTS = 12
# Smallest first radius of the trust region.
SMALLEST_FIRST = 1e-4


def bands_of(state: State, values: np.ndarray, loosened: float) -> np.ndarray:
    """Compute the units (m,) in which distances of m properties from their targets are measured.

    A step of an inverse design is to reduce the sum of the squares of these distances. The unit is
    the tolerance of the target; it is larger for a property that has met its target while others
    are far from theirs.

    Args:
      state: the state of the design, with the target values and tolerances.
      values: (m,) the properties.
      loosened: how far a property that has met its target may leave the target again, as a fraction
        of the largest distance of a property from its target. For this comparison each distance
        is in units of its tolerance.
    """
    off = np.abs(values - state.wanted) / state.tolerance
    wide = max(1.0, loosened * float(off.max()))
    return state.tolerance * np.where(off <= wide, wide, 1.0)


def first_trust(problem: Problem, state: State, measurement: Measurement) -> float:
    """Compute the first radius of an inverse design's trust region.

    The radius limits the change of each variable (parameter component or its logarithm) in a step.
    At this radius a given fraction of the contacts opens or closes along the first step, to first
    order. A radius that the user has given is returned as it is.
    """
    method = problem.method
    assert isinstance(method, LevenbergMarquardt)
    if method.trust is not None:
        return float(method.trust)
    step = _least_step(problem, state, measurement, [measurement.jacobian], method.largest)
    tangent = problem.variables.tangent(state.x, step)
    fractions = []  # of the step, at which each member has that share of its contacts changed
    for lin, move in zip(measurement.lins, moves(state, measurement, tangent), strict=True):
        if lin is not None:
            times = np.sort(crossing_times(lin, move, tangent))
            # The times are sorted: up to times[k], breakpoints are crossed k + 1 times.
            k = int(method.changes * float(lin.network.pairs))
            fractions.append(times[k] if k < times.size else np.inf)
    fraction = min(1.0, float(np.median(fractions))) if fractions else 1.0
    radius = fraction * np.max(np.abs(step), initial=0.0)
    return float(np.clip(radius, SMALLEST_FIRST, method.largest))


def next_trust(
    trust: float, method: LevenbergMarquardt, enough: bool, accepted: bool, ratio: float
) -> float:
    """Compute the radius of the trust region of an inverse design after a step.

    Args:
      trust: the radius before the step.
      method: the method of the design, which gives the largest radius.
      enough: whether the properties to design could be computed for at least half of the systems
        after the step.
      accepted: whether the step was accepted.
      ratio: the decrease of the sum of squares in the step, divided by the decrease that the linear
        model predicted. The squares are those of the distances between the properties and their
        targets, in the units of :func:`bands_of`.
    """
    if not enough:
        return 0.5 * trust
    if not accepted:
        return SHRINK * trust
    if ratio > 0.5:
        return min(GROW * trust, method.largest)
    # A decrease by less than a tenth of the prediction: the model hardly holds at this radius.
    return trust * (0.7 if ratio < 0.1 else 1.0)


def gauss_newton(problem: Problem, state: State, measurement: Measurement) -> np.ndarray:
    """Compute the next step (p,) of an inverse design with p variables, by Levenberg-Marquardt.

    The step is a damped Gauss-Newton step from several Jacobians of the properties to design: the
    present Jacobian, earlier ones nearby, and those for averaged pair potentials.
    """
    method = problem.method
    assert isinstance(method, LevenbergMarquardt)
    distances = np.max(np.abs(state.memory_x - state.x), axis=1, initial=0.0)
    models = [measurement.jacobian, *state.memory[distances <= method.reach * state.trust]]
    step = _least_step(problem, state, measurement, models, state.trust)
    # With ``restart`` most members end in other minima than those that would be averaged about.
    if not method.widths or problem.initial is not None:
        return step
    try:
        for minima in _softened(problem, state, measurement, step):
            soft = measure(problem, minima, state.x, state.counts)
            if soft.enough:
                models.append(soft.jacobian)
    except InputError:  # the cell has no room for pairs that far apart
        return step
    return _least_step(problem, state, measurement, models, state.trust)


def _softened(
    problem: Problem, state: State, measurement: Measurement, step: np.ndarray
) -> list[tuple[Linearization, ...]]:
    """Linearize the minimum of each system with its pair potentials averaged over several widths.

    ``step`` is a step of the variables of the design. It is scaled to the length of the radius of
    the trust region. The widths are multiples of the root mean square change of pair distances,
    relative to their breakpoints such as contact, in the scaled step; they are cut to a largest
    width.

    Returns:
      for each width a tuple of the linearized minima, one for each system.
    """
    method = problem.method
    assert isinstance(method, LevenbergMarquardt)
    tangent = problem.variables.tangent(state.x, step)
    motion = pair_motion(measurement, moves(state, measurement, tangent), tangent)
    if not motion > 0:  # no potential has a breakpoint, or nothing is to be changed
        return []
    motion *= state.trust / float(np.max(np.abs(step)))
    widest = WIDEST * float(natural_units(state.equilibria[0].system)[0])
    # A set: where several widths are cut to the widest, one of them is enough.
    widths = sorted({min(width * motion, widest) for width in method.widths})
    return list(zip(*(softened(eq, widths, widest) for eq in state.equilibria), strict=True))


def _least_step(
    problem: Problem,
    state: State,
    measurement: Measurement,
    models: Sequence[np.ndarray],
    radius: float,
) -> np.ndarray:
    """Compute the shortest design step for which several linear models predict the target values.

    Where this step is longer than ``radius``, the step goes only part of the way to the targets.

    Args:
      problem: the task of the inverse design, with variables and method.
      state: the state of the design, with the targets.
      measurement: the properties to design at the present variables.
      models: for each linear model the Jacobian (m, p) of the m properties by the p variables.
      radius: radius of the trust region, the largest change of a variable.
    """
    method = problem.method
    variables = problem.variables
    assert isinstance(method, LevenbergMarquardt)
    bands = bands_of(state, measurement.values, method.loosened)
    left = state.wanted - measurement.values
    near = np.abs(left) <= state.tolerance
    # The m rows of the first model, then those of the next; np.tile repeats ``change`` likewise.
    A = np.concatenate([J / bands[:, None] for J in models])
    size = np.linalg.norm(A, axis=1)
    sensitive = size > IDLE  # a smaller row is round-off, which must not be scaled up
    A = np.where(sensitive[:, None], A, 0.0)
    size = np.where(sensitive, size, 1.0)
    # A step of zero is always allowed, also where round-off has put x beyond a bound.
    low = np.minimum(variables.low - state.x, 0.0)
    high = np.maximum(variables.high - state.x, 0.0)
    fraction = 1.0
    step = np.zeros_like(state.x)
    for _ in range(PARTS):
        # Features within their tolerance are brought to the target in full, the others in part.
        change = np.where(near, 1.0, fraction) * left / bands
        b = np.where(sensitive, np.tile(change, len(models)), 0.0)
        step = bounded_step(A / size[:, None], b / size, low, high, method.damping**2)
        largest = float(np.max(np.abs(step), initial=0.0))
        if largest <= radius:
            return step
        # The step is not proportional to the fraction, for the bounds and for the features that are
        # met: aim a little inside the radius, and shrink by a factor of ten at most.
        fraction *= max(0.9 * radius / largest, 0.1)
    return step * min(1.0, radius / largest)


def remembered(
    state: State, method: LevenbergMarquardt, one: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Add a Jacobian to the earlier Jacobians that an inverse design keeps, and drop the oldest.

    A Jacobian has the derivatives of the m properties to design by the p variables of the design.
    A Jacobian that is not finite is not added.

    Args:
      state: the state of the design, with the earlier Jacobians.
      method: the method of the design, which gives the number of Jacobians to keep.
      one: (x, J), the variables x (p,) at which the Jacobian J (m, p) was computed, and J.

    Returns:
      (k, p) the variables at which the k Jacobians that are kept were computed, and (k, m, p) the
      Jacobians.
    """
    x, jacobian = one
    if not np.isfinite(jacobian).all() or method.memory == 0:
        return state.memory_x, state.memory
    # A memory of 0 has returned above: a slice from -0 on would keep all.
    newest = slice(-method.memory, None)
    return (
        np.concatenate([state.memory_x, x[None]])[newest],
        np.concatenate([state.memory, jacobian[None]])[newest],
    )


def of_optimizer(
    method: Optax, variables: Variables, state: State, measurement: Measurement
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Compute the next step (p,) of an inverse design with p variables, by an optax optimizer.

    The step is cut at the bounds of the variables.

    Returns:
      the step, and the arrays of the optimizer's new state.
    """
    x = jnp.asarray(state.x)
    # The stored state is a flat list of arrays; a new one tells its structure.
    structure = jax.tree.structure(method.optimizer.init(x))
    memory = jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in state.optimizer])
    # The gradient by x of half the sum of ((feature - target) / tolerance)^2.
    slope = measurement.jacobian.T @ ((measurement.values - state.wanted) / state.tolerance**2)
    update, memory = method.optimizer.update(jnp.asarray(slope), memory, x)
    # For an optimizer, trust is no radius but a factor, 1 or, after refused steps, less.
    moved = np.clip(state.x + state.trust * np.asarray(update), variables.low, variables.high)
    return moved - state.x, leaves(memory)


def leaves(tree: PyTree) -> tuple[np.ndarray, ...]:
    """Return the arrays in an optax optimizer's state, a nested container, for ``ms.io.save``."""
    return tuple(np.asarray(leaf) for leaf in jax.tree.leaves(tree))
