"""Inverse design: parameters that give a relaxed system the properties that are wanted.

    wanted = [Target("poisson", 0.1, 2e-3, from_start=True), hold("pressure")]
    design = ms.design.fit(wanted, system, free={"sigma": Free(within=0.3)})

Each step solves for a change of the parameters by which the features' Jacobian meets the targets,
puts the particles where their linear response says they will be, and relaxes them there. What came
out is compared with what the linear model said, and the trust region grows or shrinks by it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mdsens._util.errors import ConvergenceError, InputError
from mdsens._util.progress import Trials
from mdsens._util.validation import short
from mdsens.design.ensemble import Measurement, Problem, crossings, measure, moves, relaxed
from mdsens.design.history import Design, State, Step
from mdsens.design.methods import LevenbergMarquardt, Optax, check_method
from mdsens.design.proposal import (
    bands_of,
    first_trust,
    gauss_newton,
    leaves,
    next_trust,
    of_optimizer,
    remembered,
)
from mdsens.design.targets import Target
from mdsens.design.variables import Free, Variables
from mdsens.mechanics.status import Status
from mdsens.model.batch import stack, unstack
from mdsens.model.system import System
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.relaxation.minimization import minimize

__all__ = ["fit", "hold"]

# of the potential's length: farther from where linear response puts a particle, it is a rearrangement
STRAYED = 0.1
SMALLEST = 1e-6  # radius of a trust region: below, the design has stagnated
NOTHING = 1e-9  # of a step: the bounds leave none


def hold(of: Any, share: float = 0.01, name: str = "") -> Target:
    """The target to hold a feature at its start, within a share of it."""
    return Target(of, 0.0, share, name, from_start=True, share=True)


def fit(
    targets: Target | Sequence[Target],
    system: System | Sequence[System],
    free: str | Sequence[str] | Mapping[str, Free],
    *,
    bounds: Mapping[str, Any] | None = None,
    method: LevenbergMarquardt | Optax | None = None,
    steps: int = 60,
    restart: bool = False,
    pressure: float | None = None,
    shape: bool = False,
    tolerance: float | None = None,
    max_steps: int = 200_000,
    resume: State | None = None,
    callback: Callable[[State], Any] | None = None,
    progress: bool | None = None,
    throw: bool = False,
) -> Design:
    """Change parameters until relaxed systems have the properties that are wanted.

    Args:
      targets: what is wanted, :class:`Target` each, and ``hold`` for what is to stay.
      system: where to start, relaxed or not; a batch made by ``stack`` or a list of systems that
        share the free parameters: an ensemble, whose mean is aimed at. A member that is no rigid
        minimum does not count in a mean, nor, where a feature is made of moduli, one whose bulk or
        shear modulus is not positive.
      free: the parameters that may change: names, or a dict of :class:`Free` with their bounds.
      bounds: name -> (low, high), in place of those in ``free``.
      method: ``LevenbergMarquardt()``, the default, or ``Optax(optax.rmsprop(0.002))`` and its kin.
      steps: relaxations of each member at most, the start's not counted.
      anew: relax every member from where it began, at every step, in place of from where its linear
        response puts it: for parameters whose ensemble is to have a property, fresh packings too,
        and not these packings alone. Most members then end in other minima than their derivatives
        are of, so the Jacobian is the median over them, which the few that are near an instability
        do not rule.
      pressure, shape: as in ``minimize``: the cell is an unknown, and the pressure held exactly.
      tolerance, max_steps: of each relaxation, as in ``minimize``.
      resume: the :class:`State` after some step of a design of the same targets, parameters and
        method.
      callback: called with the State after each step: ``lambda s: ms.io.save("design.npz", s)``
        keeps it.
      progress: show a progress bar; where None, in a terminal or notebook alone.
      throw: raise where the targets are not met.

    Returns:
      a :class:`Design`.

    Raises:
      InputError: bad targets, parameters or bounds; a state of another design. ConvergenceError: no
      member is a rigid minimum to begin with; with ``throw``, targets that are not met.
    """
    method = LevenbergMarquardt() if method is None else method
    check_method(method)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise InputError(f"steps is {short(steps)}: give a whole number from 1.")
    if resume is not None and not isinstance(resume, State):
        raise InputError(
            f"resume is a {type(resume).__name__}: give the State that ms.io.load reads, or that"
            " callback got."
        )
    chosen, members = _targets(targets), _members(system)
    variables = Variables.of(members[0], free, bounds)
    _check_shared(members, variables)
    how = {"pressure": pressure, "shape": shape, "tolerance": tolerance, "max_steps": max_steps}

    def relax(starts: Sequence[System]) -> list[Equilibrium]:
        if len(starts) > 1 and pressure is None:
            return unstack(minimize(stack(list(starts)), throw=False, progress=False, **how))
        return [minimize(start, throw=False, progress=False, **how) for start in starts]

    about = {
        "targets": [[t.name, t.value, t.tolerance, t.from_start, t.share] for t in chosen],
        "variables": list(variables.labels),
        "bounds": [[float(a), float(b)] for a, b in zip(variables.low, variables.high, strict=True)],
        "method": repr(method) if isinstance(method, LevenbergMarquardt) else str(method),
        "members": len(members),
        "restart": restart,
        **{key: value for key, value in how.items() if key != "max_steps"},
    }  # fmt: skip
    initial = tuple(members) if restart else None
    problem = Problem(
        chosen, tuple(t.feature for t in chosen), variables, method, relax, about, initial
    )
    bar = Trials(steps, progress)
    try:
        state, measurement = (
            _resumed(problem, resume) if resume is not None else _initial(problem, members)
        )
        while (status := _verdict(state, steps)) is None:
            bar.show(len(state.history) - 1, _distance(state))
            state, measurement = _advanced(problem, state, measurement)
            if callback is not None:
                callback(state)
    finally:
        bar.close()
    names = tuple(t.name for t in chosen)
    design = Design(status, variables.params(state.x), names, variables.labels, state)
    if throw and not status.good:
        raise ConvergenceError(f"fit: {status.sentence}.", status, design)
    return design


def _targets(given: Any) -> tuple[Target, ...]:
    targets = (
        (given,)
        if isinstance(given, Target)
        else ()
        if isinstance(given, str)
        else tuple(given or ())
    )
    if not targets:
        raise InputError(f"targets is {short(given)}: give at least one Target.")
    for target in targets:
        if not isinstance(target, Target):
            raise InputError(
                f"targets has {short(target)} among them: give ms.design.Target(...) each."
            )
    names = [t.name for t in targets]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two targets are called {name!r}: give each a name of its own.")
    return targets


def _members(system: Any) -> list[System]:
    if isinstance(system, System):
        return [system] if system.batch is None else unstack(system)
    if isinstance(system, Equilibrium):
        raise InputError("system is an Equilibrium: give the System in it, eq.system.")
    members = list(system) if isinstance(system, (list, tuple)) else []
    if not members or not all(isinstance(s, System) and s.batch is None for s in members):
        raise InputError(
            f"system is {short(system)}: give a System, a batch made by ms.stack, or a list of"
            " Systems."
        )
    return members


def _check_shared(members: Sequence[System], variables: Variables) -> None:
    for k, member in enumerate(members):
        for name, value in variables.start.items():
            if name not in member.params or not np.array_equal(
                np.asarray(member.params[name]), value
            ):
                raise InputError(
                    f"system {k} has another {name} than system 0: members share what is free."
                )


def _initial(problem: Problem, members: list[System]) -> tuple[State, Measurement]:
    """The start: every member relaxed as it is, and the targets as numbers."""
    equilibria = problem.relax(members)
    measurement = measure(problem, equilibria, problem.variables.x, np.ones(len(members), bool))
    good = measurement.status == Status.CONVERGED.value
    if not measurement.enough:
        worst = Status.worst_of(measurement.status)
        raise ConvergenceError(
            f"fit: {int((~good).sum())} of {len(members)} systems are no rigid minimum to begin"
            f" with: {worst.sentence}.",
            worst,
            equilibria,
        )
    wanted, near = zip(
        *(t.resolved(float(v)) for t, v in zip(problem.targets, measurement.values, strict=True)),
        strict=True,
    )
    for target, value, least in zip(problem.targets, wanted, measurement.round_off, strict=True):
        if target.share and not abs(value) > least:
            raise InputError(
                f"target {target.name}: a share of the value {value:.1g}, zero to round-off, is no"
                " tolerance: give one with share=False."
            )
    x, method = problem.variables.x, problem.method
    if isinstance(method, Optax):
        trust, optimizer = 1.0, leaves(method.optimizer.init(jnp.asarray(x)))
    else:
        trust, optimizer = np.nan, ()
    none = np.zeros(len(members), bool)
    first = Step(
        x,
        measurement.values,
        measurement.values,
        measurement.status,
        True,
        0.0,
        trust,
        np.inf,
        0,
        0.0,
        none,
    )
    count, p = len(problem.targets), x.size
    state = State(
        x, tuple(equilibria), good, trust, np.zeros((0, p)), np.zeros((0, count, p)), optimizer,
        np.array(wanted), np.array(near), (first,), problem.about,
    )  # fmt: skip
    return state, measurement


def _resumed(problem: Problem, state: State) -> tuple[State, Measurement]:
    for key, value in problem.about.items():
        if state.about.get(key) != value:
            raise InputError(
                f"the state to resume from is that of another design: its {key} is"
                f" {short(state.about.get(key))}, here {short(value)}; give the same, or begin"
                " anew."
            )
    if isinstance(problem.method, Optax):
        shapes = [
            leaf.shape for leaf in leaves(problem.method.optimizer.init(jnp.asarray(state.x)))
        ]
        if [leaf.shape for leaf in state.optimizer] != shapes:
            raise InputError(
                "the state to resume from is that of another optimizer: give the same, or begin"
                " anew."
            )
    return state, measure(problem, state.equilibria, state.x, state.counts)


def _distance(state: State) -> float:
    """The farthest feature from its target, in tolerances, at the last place accepted."""
    last = next(step for step in reversed(state.history) if step.accepted)
    return float(np.max(np.abs(last.values - state.wanted) / state.tolerance))


def _verdict(state: State, steps: int) -> Status | None:
    if _distance(state) <= 1.0:
        return Status.CONVERGED
    if state.trust < SMALLEST or (len(state.history) > 1 and state.history[-1].size < NOTHING):
        return Status.DESIGN_STAGNATED
    return Status.BUDGET_SPENT if len(state.history) - 1 >= steps else None


def _advanced(
    problem: Problem, state: State, measurement: Measurement
) -> tuple[State, Measurement]:
    """One step: proposed, predicted, relaxed, judged."""
    method, variables, x = problem.method, problem.variables, state.x
    if isinstance(method, LevenbergMarquardt):
        if not np.isfinite(state.trust):
            state = dataclasses.replace(state, trust=first_trust(problem, state, measurement))
        step = gauss_newton(problem, state, measurement)
        optimizer = state.optimizer
    else:
        step, optimizer = of_optimizer(method, variables, state, measurement)
    tangent = variables.tangent(x, step)
    places = moves(state, measurement, tangent)
    reach, crossed = crossings(measurement, places, tangent)
    there = x + step
    equilibria, counts, max_displacement_error = relaxed(
        problem, state, places, variables.params(there)
    )
    now = measure(problem, equilibria, there, counts)
    left = max_displacement_error > STRAYED  # not known of members relaxed anew
    predicted = measurement.values + measurement.jacobian @ step
    if isinstance(method, LevenbergMarquardt):
        bands = bands_of(state, measurement.values, method.loosened)
        before, after, hoped = (
            float(np.sum(((v - state.wanted) / bands) ** 2))
            for v in (measurement.values, now.values, predicted)
        )
        accepted = now.enough and after < before
        trust = next_trust(
            state.trust,
            method,
            now.enough,
            accepted,
            (before - after) / max(before - hoped, 1e-300),
        )
        memory_x, memory = remembered(
            state, method, (x, measurement.jacobian) if accepted else (there, now.jacobian)
        )
    else:
        accepted, memory_x, memory = now.enough, state.memory_x, state.memory
        trust = min(1.0, 2.0 * state.trust) if accepted else 0.5 * state.trust
    made = Step(
        there, now.values, predicted, now.status, accepted, float(np.max(np.abs(step), initial=0.0)), state.trust,
        reach, crossed, float(np.max(max_displacement_error, initial=0.0)), left,
    )  # fmt: skip
    history = (*state.history, made)
    kept = {"trust": trust, "memory_x": memory_x, "memory": memory, "history": history}
    if not accepted:
        return dataclasses.replace(state, **kept), measurement
    good = now.status == Status.CONVERGED.value
    minima = tuple(
        new if ok else old for new, old, ok in zip(equilibria, state.equilibria, good, strict=True)
    )
    return (
        dataclasses.replace(
            state, x=there, equilibria=minima, counts=good, optimizer=optimizer, **kept
        ),
        now,
    )
