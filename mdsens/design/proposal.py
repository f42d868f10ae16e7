"""The step that a design takes next, from what it knows where it is and what it remembers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.errors import InputError
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

WIDEST = 0.2  # of the potential's length: over more, no potential is averaged
GROW, SHRINK = 1.7, 0.6  # of the trust region
# tolerances by a whole unit of the variables: a feature that moves by less does not depend on them
IDLE = 1e-6
PARTS = 12  # tries of a part of the way that fits into it


def bands_of(state: State, values: np.ndarray, loosened: float) -> np.ndarray:
    """(m,) the scale of each feature in the merit: its tolerance, or wider where it is met and
    others are far off.
    """
    off = np.abs(values - state.wanted) / state.tolerance
    wide = max(1.0, loosened * float(off.max()))
    return state.tolerance * np.where(off <= wide, wide, 1.0)


def first_trust(problem: Problem, state: State, measurement: Measurement) -> float:
    """The radius at which a share of the contacts changes along the first step, to first order."""
    method = problem.method
    assert isinstance(method, LevenbergMarquardt)
    if method.trust is not None:
        return float(method.trust)
    step = _least_step(problem, state, measurement, [measurement.jacobian], method.largest)
    tangent = problem.variables.tangent(state.x, step)
    parts = []
    for lin, move in zip(measurement.lins, moves(state, measurement, tangent), strict=True):
        if lin is not None:
            times = np.sort(crossing_times(lin, move, tangent))
            k = int(method.changes * float(lin.network.pairs))
            parts.append(times[k] if k < times.size else np.inf)
    part = min(1.0, float(np.median(parts))) if parts else 1.0
    return float(np.clip(part * np.max(np.abs(step), initial=0.0), 1e-4, method.largest))


def next_trust(
    trust: float, method: LevenbergMarquardt, enough: bool, accepted: bool, ratio: float
) -> float:
    """The radius after a step: ``ratio`` is the fall of the merit over what the linear model
    promised.
    """
    if not enough:
        return 0.5 * trust
    if not accepted:
        return SHRINK * trust
    return (
        min(GROW * trust, method.largest) if ratio > 0.5 else trust * (0.7 if ratio < 0.1 else 1.0)
    )


def gauss_newton(problem: Problem, state: State, measurement: Measurement) -> np.ndarray:
    """The step of :class:`LevenbergMarquardt`."""
    method = problem.method
    assert isinstance(method, LevenbergMarquardt)
    far = np.max(np.abs(state.memory_x - state.x), axis=1, initial=0.0)
    models = [measurement.jacobian, *state.memory[far <= method.reach * state.trust]]
    step = _least_step(problem, state, measurement, models, state.trust)
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
    """The members' minima with their potentials averaged over multiples of what pairs move in a step of
    the trust region.
    """
    method = problem.method
    assert isinstance(method, LevenbergMarquardt)
    tangent = problem.variables.tangent(state.x, step)
    motion = pair_motion(measurement, moves(state, measurement, tangent), tangent)
    if not motion > 0:  # no potential has a breakpoint, or nothing is to be changed
        return []
    motion *= state.trust / float(np.max(np.abs(step)))
    widest = WIDEST * float(natural_units(state.equilibria[0].system)[0])
    widths = sorted({min(width * motion, widest) for width in method.widths})
    return list(zip(*(softened(eq, widths, widest) for eq in state.equilibria), strict=True))


def _least_step(
    problem: Problem,
    state: State,
    measurement: Measurement,
    models: Sequence[np.ndarray],
    radius: float,
) -> np.ndarray:
    """The least step that the models agree on, as much of the way to the targets as the trust
    region has room for.
    """
    method, variables = problem.method, problem.variables
    assert isinstance(method, LevenbergMarquardt)
    bands = bands_of(state, measurement.values, method.loosened)
    left = state.wanted - measurement.values
    near = np.abs(left) <= state.tolerance
    A = np.concatenate([J / bands[:, None] for J in models])
    size = np.linalg.norm(A, axis=1)
    felt = size > IDLE  # else the row is round-off, which must not be scaled up
    A, size = np.where(felt[:, None], A, 0.0), np.where(felt, size, 1.0)
    low, high = np.minimum(variables.low - state.x, 0.0), np.maximum(variables.high - state.x, 0.0)
    part, step = 1.0, np.zeros_like(state.x)
    for _ in range(PARTS):
        b = np.where(felt, np.tile(np.where(near, 1.0, part) * left / bands, len(models)), 0.0)
        step = bounded_step(A / size[:, None], b / size, low, high, method.damping**2)
        largest = float(np.max(np.abs(step), initial=0.0))
        if largest <= radius:
            return step
        part *= max(0.9 * radius / largest, 0.1)
    return step * min(1.0, radius / largest)


def remembered(
    state: State, method: LevenbergMarquardt, one: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The places and Jacobians to keep, with one more, (x, J); the oldest goes. Nothing that is not
    finite is kept.
    """
    x, jacobian = one
    if not np.isfinite(jacobian).all() or method.memory == 0:
        return state.memory_x, state.memory
    kept = slice(-method.memory, None)
    return (
        np.concatenate([state.memory_x, x[None]])[kept],
        np.concatenate([state.memory, jacobian[None]])[kept],
    )


def of_optimizer(
    method: Optax, variables: Variables, state: State, measurement: Measurement
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """The step of an optimizer of optax within the bounds, and its state after it as
    :func:`leaves`.
    """
    x = jnp.asarray(state.x)
    kind = jax.tree.structure(method.optimizer.init(x))
    kept = jax.tree.unflatten(kind, [jnp.asarray(leaf) for leaf in state.optimizer])
    slope = measurement.jacobian.T @ ((measurement.values - state.wanted) / state.tolerance**2)
    update, kept = method.optimizer.update(jnp.asarray(slope), kept, x)
    there = np.clip(state.x + state.trust * np.asarray(update), variables.low, variables.high)
    return there - state.x, leaves(kept)


def leaves(tree: Any) -> tuple[np.ndarray, ...]:
    """An optimizer's state as arrays, which ``io.save`` stores."""
    return tuple(np.asarray(leaf) for leaf in jax.tree.leaves(tree))
