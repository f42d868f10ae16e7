"""The systems of a design, its members: measuring features, predicting motion, relaxing them."""

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

# Fraction of the members that must count for a step to be taken.
ENOUGH = 0.5


class Problem(NamedTuple):
    """Everything about a design that stays the same from step to step.

    Attributes:
      targets: the targets.
      features: (m,) the feature of each target.
      variables: the free parameters as a vector within bounds.
      method: method that chooses a step.
      relax: function that relaxes systems and returns one minimum for each.
      about: description of the design, which ``resume`` compares with the description in a stored
        state.
      initial: with ``restart`` the systems from which every step relaxes; else None.
    """

    targets: tuple[Target, ...]
    features: tuple[Feature, ...]
    variables: Variables
    method: LevenbergMarquardt | Optax
    relax: Callable[[Sequence[System]], list[Equilibrium]]
    about: dict[str, Any]
    initial: tuple[System, ...] | None


class Measurement(NamedTuple):
    """The features at one point x, averaged over the members that count.

    Attributes:
      lins: the linearized minimum of each member; None for a member that does not count.
      values: (m,) mean of the features; nan where no member counts.
      round_off: (m,) mean of the features' round-off.
      jacobian: (m, p) mean of the features' derivatives by the variables; with ``restart`` the
        median.
      status: (members,) CONVERGED, or the code of why a member does not count.
    """

    lins: list[Linearization | None]
    values: np.ndarray
    round_off: np.ndarray
    jacobian: np.ndarray
    status: np.ndarray

    @property
    def enough(self) -> bool:
        """Whether at least half of the members count."""
        return bool(np.mean(self.status == Status.CONVERGED.value) >= ENOUGH)


def measure(
    problem: Problem,
    minima: Sequence[Equilibrium | Linearization],
    x: np.ndarray,
    counts: np.ndarray,
) -> Measurement:
    """Measure the features and their Jacobian on the members that count.

    Args:
      minima: the minimum of each member; a linearized minimum is used as it is.
      x: (p,) the variables at these minima.
      counts: (members,) False for a member to leave out.
    """
    lins: list[Linearization | None] = []
    measured: list[FeatureValues] = []
    status = np.full(len(minima), Status.UNCONVERGED.value)
    for k, minimum in enumerate(minima):
        lins.append(None)
        if not counts[k]:
            continue
        status[k] = int(minimum.status)
        if not Status(int(minimum.status)).good:
            continue
        if isinstance(minimum, Linearization):
            lin = minimum
        else:
            lin = linearize(minimum, throw=False)
        status[k] = int(lin.status)
        if not Status(int(lin.status)).good:
            continue
        features = evaluate_features(problem.features, lin)
        finite = Status.CONVERGED if np.isfinite(features.values).all() else Status.NOT_FINITE
        status[k] = finite.value if features.status.good else features.status.value
        if status[k] == Status.CONVERGED.value:
            lins[k] = lin
            measured.append(features)
    if not measured:
        no_values = np.full(len(problem.features), np.nan)
        no_jacobian = np.full((no_values.size, x.size), np.nan)
        return Measurement(lins, no_values, no_values, no_jacobian, status)
    jacobians = [problem.variables.pulled(x, features.slopes) for features in measured]
    if problem.initial is None:
        jacobian = np.mean(jacobians, axis=0)
    else:
        # Members that restart are at new minima each time. A few of these are near an instability,
        # where derivatives are so large that they would dominate a mean.
        jacobian = np.median(jacobians, axis=0)
    return Measurement(
        lins,
        np.mean([features.values for features in measured], axis=0),
        np.mean([features.round_off for features in measured], axis=0),
        jacobian,
        status,
    )


def moves(
    state: State, measurement: Measurement, tangent: Mapping[str, np.ndarray]
) -> list[Unknowns]:
    """Compute the linear response of each member's particles and cell to a parameter change.

    The response is zero for a member that does not count, or whose solve fails.
    """
    responses = []
    for eq, lin in zip(state.equilibria, measurement.lins, strict=True):
        value = None
        if lin is not None:
            response = jvp(lin, tangent, throw=False)
            value = response.value if response.status.good else None
        if value is None:
            value = jnp.zeros_like(eq.positions)
        responses.append(value if isinstance(value, Unknowns) else Unknowns(value))
    return responses


def crossings(
    measurement: Measurement, moves: Sequence[Unknowns], tangent: Mapping[str, np.ndarray]
) -> tuple[float, int]:
    """Predict at which fraction of a step the first pair crosses a breakpoint, and how many cross.

    A breakpoint is a distance at which a derivative of the potential jumps or diverges. The
    prediction is to first order. The fraction is the smallest over the members, the number of pairs
    the largest.
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
    """Compute the times at which pairs reach a breakpoint along the step, which ends at time 1.

    A breakpoint is a distance at which a derivative of the potential jumps or diverges. The times
    are to first order. Pairs whose distance moves away from the breakpoint, or does not change
    relative to it, are left out.
    """
    times = np.asarray(contact_changes.crossings(*_contact_path(lin, move, tangent)).times)
    return times[(times >= 0) & np.isfinite(times)]


def _contact_path(
    lin: Linearization, move: Unknowns, tangent: Mapping[str, np.ndarray]
) -> tuple[System, jax.Array, dict[str, Any], jax.Array, jax.Array | None]:
    """Return a step for ``contact_changes``: system, velocity, parameters, rattlers, strain."""
    system = lin.equilibrium.system
    full = full_tangent(system, tangent)
    if move.strain is None:
        return system, move.positions, full, lin.network.rattlers, None
    # ``contact_changes`` adds the cell's motion itself: the velocity is what is left of it.
    strain = from_mandel(jnp.asarray(move.strain))
    velocity = move.positions - system.positions @ strain.T
    return system, velocity, full, lin.network.rattlers, strain


def pair_motion(
    measurement: Measurement, moves: Sequence[Unknowns], tangent: Mapping[str, np.ndarray]
) -> float:
    """Compute by how much pairs approach or leave their breakpoints in a step (root mean square).

    A breakpoint is a distance at which a derivative of the potential jumps or diverges. The result
    is a length, the median over the members; zero where no member counts.
    """
    rates = [
        float(contact_changes.gap_rate(*_contact_path(lin, move, tangent)))
        for lin, move in zip(measurement.lins, moves, strict=True)
        if lin is not None
    ]
    return float(np.median(rates)) if rates else 0.0


def softened(eq: Equilibrium, widths: Sequence[float], widest: float) -> list[Linearization]:
    """Linearize a minimum with its pair potentials averaged over each width.

    The particles stay where they are, and the averaged potentials leave a force on them. The
    derivatives are those of an energy landscape without the kinks that are narrower than the width.

    Args:
      widths: widths of the averages, lengths.
      widest: the largest width; pairs up to this length beyond their range are listed.

    Raises:
      InputError: the cell is too small for pairs at their range plus ``widest``.
    """
    potential = eq.system.potential
    # One neighbor list for all widths: its shape is then the same, and nothing compiles again.
    listed = eq.system.replace(potential=smoothed(potential, widest)).reallocate(keep=True)
    linearizations = []
    for width in widths:
        soft = listed.replace(potential=smoothed(potential, width))
        # Averaging gives a force to pairs that do not touch. The network counts a pair as a contact
        # above 10 times ``max_force`` (``contacts.FORCE_MARGIN``): a tenth of the force that a pair
        # has just at contact leaves those pairs out.
        threshold = jnp.maximum(eq.max_force, 0.1 * _force_at_contact(soft))
        lin = linearize(dataclasses.replace(eq, system=soft, max_force=threshold), throw=False)
        # That force only decides which pairs are contacts. It is no force left by a relaxation, so
        # it must not cast doubt on the stiffness.
        minimum = dataclasses.replace(lin.equilibrium, max_force=eq.max_force)
        linearizations.append(dataclasses.replace(lin, equilibrium=minimum))
    return linearizations


@jax.jit
def _force_at_contact(system: System) -> jax.Array:
    """Compute the largest force of a smoothed pair at the range of its unsmoothed potential.

    The forces of several terms are added. A pair with a smaller force is no contact of the
    unsmoothed potential. The result is zero for a potential that also attracts.
    """
    total = jnp.zeros(())
    if not system.potential.repulsive:
        return total
    for term in pair_terms(system):
        width = term.values[-1]  # smoothed() appends it to the parameters of phi
        reach = system.potential.lengths(
            system.params, system.neighbors.pairs, system.n, system.species, system.species_count
        )
        forces = jnp.where(term.mask, jnp.abs(pair_forces(term, reach - width)), 0.0)
        total += jnp.max(forces, initial=0.0)
    return total


def relaxed(
    problem: Problem, state: State, moves: Sequence[Unknowns], params: Mapping[str, np.ndarray]
) -> tuple[list[Equilibrium], np.ndarray, np.ndarray]:
    """Relax the members at other parameters, each from the positions that linear response predicts.

    With ``restart`` each starts from its initial positions instead.

    Returns:
      the minima; (members,) whether each was relaxed, False for all where the cell is too small for
      the range at these parameters; (members,) how far each ended from its start, in units of the
      length scale of the potential (contact distance, or the distance of the minimum of the pair
      energy), nan with ``restart``.
    """
    starts: list[System] = []
    try:
        for k, (eq, move) in enumerate(zip(state.equilibria, moves, strict=True)):
            start = _predicted(eq, move) if problem.initial is None else problem.initial[k]
            starts.append(start.with_params(params))
    except InputError:  # the cell no longer holds the range of the interactions
        zeros = np.zeros(len(state.equilibria))
        return list(state.equilibria), zeros.astype(bool), zeros
    equilibria = problem.relax(starts)
    if problem.initial is not None:
        return equilibria, np.ones(len(starts), bool), np.full(len(starts), np.nan)
    max_displacement_error = [
        _max_displacement_error(start, eq) for start, eq in zip(starts, equilibria, strict=True)
    ]
    return equilibria, np.ones(len(starts), bool), np.array(max_displacement_error)


def _predicted(eq: Equilibrium, move: Unknowns) -> System:
    """Return the system of a minimum with particles and cell moved."""
    moved = eq.positions + move.positions
    if move.strain is None:
        return eq.system.replace(positions=moved)
    strained = deformed(eq.system, from_mandel(jnp.asarray(move.strain)), eq.positions)
    return strained.replace(positions=moved)


def _max_displacement_error(start: System, eq: Equilibrium) -> float:
    """Compute the largest distance between predicted and relaxed position, in potential lengths.

    A common translation, which costs no energy, is taken off as the median over the particles: the
    few that rearrange do not shift it.
    """
    apart = np.asarray(nearest_image(eq.positions - start.positions, eq.system.box))
    farthest = float(np.max(np.linalg.norm(apart - np.median(apart, axis=0), axis=1)))
    return farthest / float(natural_units(start)[0])
