"""Measure, predict and relax the systems of an ensemble whose parameters a design changes.

A design changes parameters, such as particle diameters, until properties of the relaxed systems
(features) have wanted values. A member is one system of the ensemble.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.compilation import compiled
from mdsens._util.errors import InputError
from mdsens._util.lattice import nearest_image
from mdsens.design.history import State
from mdsens.design.methods import LevenbergMarquardt, Optax
from mdsens.design.targets import Feature, FeatureValues, Target, evaluate_features
from mdsens.design.variables import Variables
from mdsens.mechanics import contact_changes
from mdsens.mechanics.cell import deformed
from mdsens.mechanics.contacts import pair_forces
from mdsens.mechanics.status import Status
from mdsens.mechanics.strain import from_mandel
from mdsens.mechanics.units import natural_units
from mdsens.mechanics.unknowns import Unknowns
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
    """The task of an inverse design: targets, variables and method, the same at every step.

    Attributes:
      targets: m targets, each a property of the relaxed systems with its wanted value.
      features: (m,) the feature of each target, that is, the property itself.
      variables: the free parameters as a vector within bounds.
      method: method that chooses each step, Levenberg-Marquardt or an optimizer of optax.
      relax: function that relaxes systems and returns one minimum for each.
      about: description of the design. A design is resumed from a stored state only if the state
        holds the same description.
      initial: the systems from which every step relaxes, if ``fit`` was called with ``restart``;
        else None.
    """

    targets: tuple[Target, ...]
    features: tuple[Feature, ...]
    variables: Variables
    method: LevenbergMarquardt | Optax
    relax: Callable[[Sequence[System]], list[Equilibrium]]
    about: dict[str, Any]
    initial: tuple[System, ...] | None


class Measurement(NamedTuple):
    """The m features at given values of the p variables of a design, averaged over the ensemble.

    A feature is a property of a relaxed system, such as the pressure; a variable is a free
    component of a parameter, or its logarithm. A system of the ensemble counts in the mean if its
    minimum is rigid and all its features could be computed.

    Attributes:
      lins: the linearized minimum of each system, that is, the minimum with its Hessian; None for a
        system that does not count.
      values: (m,) mean of each feature; nan where no system counts.
      round_off: (m,) mean round-off error of each feature.
      jacobian: (m, p) mean of the derivatives of the features by the variables; the median instead
        of the mean if ``fit`` was called with ``restart``.
      status: one code for each system: CONVERGED if the system counts, else the code of the reason
        why it does not.
    """

    lins: list[Linearization | None]
    values: np.ndarray
    round_off: np.ndarray
    jacobian: np.ndarray
    status: np.ndarray

    @property
    def enough(self) -> bool:
        """Whether the properties to design could be computed for at least half of the systems."""
        return bool(np.mean(self.status == Status.CONVERGED.value) >= ENOUGH)


def measure(
    problem: Problem,
    minima: Sequence[Equilibrium | Linearization],
    x: np.ndarray,
    counts: np.ndarray,
) -> Measurement:
    """Compute the features of each system of an ensemble and their Jacobian, and average both.

    A feature is a property of a relaxed system, such as the pressure. Systems whose minimum is not
    rigid, or whose features are not finite, are left out of the average.

    Args:
      problem: the task of the design, with the features.
      minima: the minimum of each system; a minimum that is linearized already is used as it is.
      x: (p,) the variables of the design at these minima.
      counts: one truth value for each system, False for each system to leave out.
    """
    lins: list[Linearization | None] = [None] * len(minima)
    measured: list[FeatureValues] = []
    # This stays the status of a member that is not measured, where ``counts`` is False.
    status = np.full(len(minima), Status.UNCONVERGED.value)
    for k, minimum in enumerate(minima):
        if not counts[k]:
            continue
        outcome, lins[k], features = _measure_member(problem.features, minimum)
        status[k] = outcome.value
        if features is not None:
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


def _measure_member(
    features: Sequence[Feature], minimum: Equilibrium | Linearization
) -> tuple[Status, Linearization | None, FeatureValues | None]:
    """Compute the features of one system of an ensemble at its minimum.

    Returns:
      (CONVERGED if the system counts in the mean, else the reason why it does not; its linearized
      minimum; the values of its features), with None for the last two if it does not count.
    """
    status = minimum.status
    if not status.good:
        return status, None, None
    lin = minimum if isinstance(minimum, Linearization) else linearize(minimum, throw=False)
    status = lin.status
    if not status.good:
        return status, None, None
    measured = evaluate_features(features, lin)
    if not measured.status.good:
        return measured.status, None, None
    if not np.isfinite(measured.values).all():
        return Status.NOT_FINITE, None, None
    return Status.CONVERGED, lin, measured


def moves(
    state: State, measurement: Measurement, tangent: Mapping[str, np.ndarray]
) -> list[Unknowns]:
    """Compute each system's linear response, of particles and cell, to a change of the parameters.

    The response is zero for a system without a linearized minimum, or whose linear solve fails.

    Args:
      state: the state of the design, with the minimum of each system.
      measurement: the linearized minimum of each system.
      tangent: the change of the parameters, arrays by name.
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
    """Predict when in a step the first pair crosses a breakpoint, and how many pairs cross one.

    A step is a change ``tangent`` of the parameters with the linear response ``moves`` of each
    system. A breakpoint is a distance at which a derivative of the potential jumps or diverges. The
    prediction is to first order. The time is given as a fraction of the step.

    Returns:
      the smallest fraction over the systems of the ensemble, and the largest number of pairs that
      cross in one system.
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
    """Compute the times at which pairs reach a breakpoint along a step, which ends at time 1.

    A breakpoint is a distance at which a derivative of the potential jumps or diverges. The times
    are to first order. Pairs whose distance moves away from the breakpoint, or does not change
    relative to the breakpoint, are left out.

    Args:
      lin: the linearized minimum at time 0.
      move: the linear response of particles and cell in the step.
      tangent: the change of the parameters in the step, arrays by name.
    """
    times = np.asarray(contact_changes.crossings(*_contact_path(lin, move, tangent)).times)
    return times[(times >= 0) & np.isfinite(times)]


def _contact_path(
    lin: Linearization, move: Unknowns, tangent: Mapping[str, np.ndarray]
) -> tuple[System, jax.Array, dict[str, Any], jax.Array, jax.Array | None]:
    """Prepare the prediction of the contacts that open or close in a step of the parameters.

    The results are the arguments of the functions in ``mdsens.mechanics.contact_changes``, which
    make the prediction from the linear response of particles and cell to the step.

    Returns:
      the system; the linear response (n, d) of the positions, less the motion with the cell; the
      change of all parameters; a mask (n,) of the rattlers; the strain of the cell, or None for a
      fixed cell.
    """
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
    """Compute how much pairs approach or leave their breakpoints in a step, to first order.

    A breakpoint b is a distance at which a derivative of the potential jumps or diverges. For each
    system of the ensemble the root mean square of the change of r - b is taken over the pairs of
    non-rattlers with distance r < b. The result is a length, the median over the systems; zero
    where no system has a linearized minimum.
    """
    rates = [
        float(contact_changes.gap_rate(*_contact_path(lin, move, tangent)))
        for lin, move in zip(measurement.lins, moves, strict=True)
        if lin is not None
    ]
    return float(np.median(rates)) if rates else 0.0


def softened(eq: Equilibrium, widths: Sequence[float], widest: float) -> list[Linearization]:
    """Linearize a minimum with averaged pair potentials, once for each of several widths.

    For the width w, the potential at the distance r is replaced by its average over distances from
    r - w to r + w. The particles stay where they are, and the averaged potentials leave a force on
    them. The derivatives are those of an energy landscape without the kinks that are narrower than
    the width.

    Args:
      eq: the minimum of the potentials without averages.
      widths: the widths w of the averages, lengths.
      widest: the largest width; the neighbor list holds pairs up to this length beyond the range of
        the potential.

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


@compiled
def _force_at_contact(system: System) -> jax.Array:
    """Compute the force of the smoothed pair potential at the range of the unsmoothed potential.

    The result is the largest such force over all pairs, summed over the terms of the potential. A
    pair with a smaller force is not in contact under the unsmoothed potential. For a potential that
    also attracts, the result is zero.
    """
    total = jnp.zeros(())
    if not system.potential.repulsive:
        return total
    for term in pair_terms(system):
        width = term.values[-1]  # smoothed() appends it to the parameters of phi
        # ``lengths`` of an averaged potential contains the width, which is subtracted below.
        reach = system.potential.lengths(
            system.params, system.neighbors.pairs, system.n, system.species, system.species_count
        )
        forces = jnp.where(term.mask, jnp.abs(pair_forces(term, reach - width)), 0.0)
        total += jnp.max(forces, initial=0.0)
    return total


def relaxed(
    problem: Problem, state: State, moves: Sequence[Unknowns], params: Mapping[str, np.ndarray]
) -> tuple[list[Equilibrium], np.ndarray, np.ndarray]:
    """Relax every system at new parameters, from the positions that linear response predicts.

    If ``fit`` was called with ``restart``, each system starts from its initial positions instead.

    Args:
      problem: the task of the design.
      state: the state of the design, with the minimum of each system at the old parameters.
      moves: the linear response of particles and cell of each system.
      params: the new parameters, by name.

    Returns:
      three sequences with an entry for each system: the minimum; whether the system was relaxed,
      False for all systems where the cell is too small for the range of the potential at these
      parameters; and the largest distance of a relaxed particle from its start, less a translation
      of all particles, in units of the length scale of the potential (contact distance, or the
      distance of the minimum of the pair energy), nan with ``restart``.
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
    """Return the system of a minimum with particles and cell moved by their linear response.

    The result is the configuration predicted for changed parameters.
    """
    moved = eq.positions + move.positions
    if move.strain is None:
        return eq.system.replace(positions=moved)
    strained = deformed(eq.system, from_mandel(jnp.asarray(move.strain)), eq.positions)
    # ``move.positions`` contains the motion with the cell, so the positions that ``deformed``
    # has strained are replaced, and not moved further.
    return strained.replace(positions=moved)


def _max_displacement_error(start: System, eq: Equilibrium) -> float:
    """Compute the largest distance of a relaxed particle from its predicted position.

    The distance is in units of the length scale of the potential. A translation of all particles,
    which costs no energy, is removed: it is the median of the displacements, which the few
    particles that rearrange do not shift.
    """
    displacement = eq.positions - start.positions
    apart = np.asarray(nearest_image(displacement, eq.system.box, eq.system.periodic))
    farthest = float(np.max(np.linalg.norm(apart - np.median(apart, axis=0), axis=1)))
    return farthest / float(natural_units(start)[0])
