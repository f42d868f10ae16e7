"""The members of a design: what is measured on them, where a step takes them, and what they relax
to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.lattice import nearest_image
from mdsens.design.history import State
from mdsens.design.methods import LevenbergMarquardt, Optax
from mdsens.design.targets import Feature, FeatureValues, Target, evaluate_features
from mdsens.design.variables import Variables
from mdsens.mechanics import contact_changes
from mdsens.mechanics.cell import deformed
from mdsens.mechanics.contacts import pair_forces
from mdsens.mechanics.hessian import Unknowns
from mdsens.mechanics.status import Status
from mdsens.mechanics.strain import from_mandel
from mdsens.mechanics.units import natural_units
from mdsens.model.system import System, pair_terms
from mdsens.potentials.smoothed import smoothed
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity.derivatives import jvp
from mdsens.sensitivity.linearization import Linearization, full_tangent, linearize

__all__ = [
    "Problem",
    "Measurement",
    "crossings",
    "crossing_times",
    "measure",
    "moves",
    "pair_motion",
    "relaxed",
    "softened",
]

HALF = 0.5  # of the members must count for a step to be taken


class Problem(NamedTuple):
    """What a design is of."""

    targets: tuple[Target, ...]
    features: tuple[Feature, ...]
    variables: Variables
    method: LevenbergMarquardt | Optax
    relax: Callable[[Sequence[System]], list[Equilibrium]]
    about: dict[str, Any]
    initial: tuple[System, ...] | None


class Measurement(NamedTuple):
    """What was measured on the members at one place: the means over those that count."""

    lins: list[Linearization | None]
    values: np.ndarray
    round_off: np.ndarray
    jacobian: np.ndarray
    status: np.ndarray

    @property
    def enough(self) -> bool:
        return bool(np.mean(self.status == Status.CONVERGED.value) >= HALF)


def measure(
    problem: Problem,
    minima: Sequence[Equilibrium | Linearization],
    x: np.ndarray,
    counts: np.ndarray,
) -> Measurement:
    """Measure the features and their Jacobian on the members that count."""
    lins: list[Linearization | None] = []
    found: list[FeatureValues] = []
    status = np.full(len(minima), Status.UNCONVERGED.value)
    for k, at in enumerate(minima):
        lins.append(None)
        if not counts[k]:
            continue
        status[k] = int(at.status)
        if not Status(int(at.status)).good:
            continue
        lin = at if isinstance(at, Linearization) else linearize(at, throw=False)
        status[k] = int(lin.status)
        if not Status(int(lin.status)).good:
            continue
        measurement = evaluate_features(problem.features, lin)
        finite = Status.CONVERGED if np.isfinite(measurement.values).all() else Status.NOT_FINITE
        status[k] = finite.value if measurement.status.good else measurement.status.value
        if status[k] == Status.CONVERGED.value:
            lins[k] = lin
            found.append(measurement)
    if not found:
        nothing = np.full(len(problem.features), np.nan)
        return Measurement(lins, nothing, nothing, np.full((nothing.size, x.size), np.nan), status)
    values = np.mean([measurement.values for measurement in found], axis=0)
    jacobians = [problem.variables.pulled(x, measurement.slopes) for measurement in found]
    jacobian = (
        np.mean(jacobians, axis=0) if problem.initial is None else np.median(jacobians, axis=0)
    )
    return Measurement(
        lins,
        values,
        np.mean([measurement.round_off for measurement in found], axis=0),
        jacobian,
        status,
    )


def moves(
    state: State, measurement: Measurement, tangent: Mapping[str, np.ndarray]
) -> list[Unknowns]:
    """Where each member's particles and cell go, to first order; nowhere where a member does not
    count.
    """
    found = []
    for eq, lin in zip(state.equilibria, measurement.lins, strict=True):
        value = None
        if lin is not None:
            response = jvp(lin, tangent, throw=False)
            value = response.value if response.status.good else None
        if value is None:
            value = jnp.zeros_like(eq.positions)
        found.append(value if isinstance(value, Unknowns) else Unknowns(value))
    return found


def crossings(
    measurement: Measurement, moves: Sequence[Unknowns], tangent: Mapping[str, np.ndarray]
) -> tuple[float, int]:
    """After what part of the step the first pair crosses a breakpoint, and how many do in all of
    it.
    """
    times = [
        crossing_times(lin, move, tangent)
        for lin, move in zip(measurement.lins, moves, strict=True)
        if lin is not None
    ]
    first = min((float(np.min(t, initial=np.inf)) for t in times), default=np.inf)
    return first, max((int(np.sum(t <= 1.0)) for t in times), default=0)


def crossing_times(
    lin: Linearization, move: Unknowns, tangent: Mapping[str, np.ndarray]
) -> np.ndarray:
    """When the pairs ahead cross a breakpoint along the step, of 1."""
    times = np.asarray(contact_changes.crossings(*_path(lin, move, tangent)).times)
    return times[(times >= 0) & np.isfinite(times)]


def _path(lin: Linearization, move: Unknowns, tangent: Mapping[str, np.ndarray]) -> tuple[Any, ...]:
    """The step as ``contacts`` takes it: system, velocity, parameters, rattlers, strain."""
    system = lin.equilibrium.system
    full = full_tangent(system, tangent)
    strain = None if move.strain is None else from_mandel(jnp.asarray(move.strain))
    velocity = move.positions if strain is None else move.positions - system.positions @ strain.T
    return system, velocity, full, lin.network.rattlers, strain


def pair_motion(
    measurement: Measurement, moves: Sequence[Unknowns], tangent: Mapping[str, np.ndarray]
) -> float:
    """How far pairs come nearer to their breakpoints in a step, or leave them: a root mean square,
    a length.
    """
    rates = [
        float(contact_changes.gap_rate(*_path(lin, move, tangent)))
        for lin, move in zip(measurement.lins, moves, strict=True)
        if lin is not None
    ]
    return float(np.median(rates)) if rates else 0.0


def softened(eq: Equilibrium, widths: Sequence[float], widest: float) -> list[Linearization]:
    """A minimum with its pair potentials averaged over widths, held by what forces that leaves: its
    derivatives are those of a landscape without the bends that are narrower.

    Raises:
      InputError: the cell has no room for pairs as far apart as ``widest`` makes them.
    """
    potential = eq.system.potential
    roomy = eq.system.replace(potential=smoothed(potential, widest)).reallocate(
        keep=True
    )  # one list, one shape, for all
    found = []
    for width in widths:
        soft = roomy.replace(potential=smoothed(potential, width))
        still = jnp.maximum(eq.max_force, 0.1 * _touching_force(soft))
        lin = linearize(dataclasses.replace(eq, system=soft, max_force=still), throw=False)
        # that force says who holds whom: it is not left over, and puts no stiffness in doubt
        at = dataclasses.replace(lin.equilibrium, max_force=eq.max_force)
        found.append(dataclasses.replace(lin, equilibrium=at))
    return found


@jax.jit
def _touching_force(system: System) -> jax.Array:
    """The largest force of a smoothed pair at its potential's own range: what is weaker is no contact of
    that potential.
    """
    found = jnp.zeros(())
    if not system.potential.repulsive:
        return found
    for term in pair_terms(system):
        width = term.values[-1]
        reach = system.potential.lengths(
            system.params, system.neighbors.pairs, system.n, system.species, system.species_count
        )
        found += jnp.max(
            jnp.where(term.mask, jnp.abs(pair_forces(term, reach - width)), 0.0), initial=0.0
        )
    return found


def relaxed(
    problem: Problem, state: State, moves: Sequence[Unknowns], params: Mapping[str, np.ndarray]
) -> tuple[list[Equilibrium], np.ndarray, np.ndarray]:
    """The members relaxed at other parameters, from where linear response puts them: (minima, which
    relaxed, how far each ended from there).
    """
    starts: list[System] = []
    try:
        for k, (eq, move) in enumerate(zip(state.equilibria, moves, strict=True)):
            at = _predicted(eq, move) if problem.initial is None else problem.initial[k]
            starts.append(at.with_params(params))
    except InputError:  # the cell no longer holds the range of the interactions
        nothing = np.zeros(len(state.equilibria))
        return list(state.equilibria), nothing.astype(bool), nothing
    equilibria = problem.relax(starts)
    if problem.initial is not None:
        return equilibria, np.ones(len(starts), bool), np.full(len(starts), np.nan)
    max_displacement_error = [
        _max_displacement_error(start, eq) for start, eq in zip(starts, equilibria, strict=True)
    ]
    return equilibria, np.ones(len(starts), bool), np.array(max_displacement_error)


def _predicted(eq: Equilibrium, move: Unknowns) -> System:
    """A minimum's system, its particles and its cell moved."""
    there = eq.positions + move.positions
    if move.strain is None:
        return eq.system.replace(positions=there)
    return deformed(eq.system, from_mandel(jnp.asarray(move.strain)), eq.positions).replace(
        positions=there
    )


def _max_displacement_error(start: System, eq: Equilibrium) -> float:
    """The farthest that a particle came to rest from where it started, the mean motion aside, over
    the potential's length.
    """
    apart = np.asarray(nearest_image(eq.positions - start.positions, eq.system.box))
    return float(np.max(np.linalg.norm(apart - np.median(apart, axis=0), axis=1))) / float(
        natural_units(start)[0]
    )
