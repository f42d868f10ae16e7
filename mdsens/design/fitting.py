"""Inverse design: change parameters until a relaxed system has the wanted properties.

    wanted = [Target("poisson", 0.1, 2e-3, from_start=True), hold("pressure")]
    design = ms.design.fit(wanted, system, free={"sigma": Free(within=0.3)})

A feature is a property of the relaxed system, such as Poisson's ratio; a target is a feature with
its wanted value. Each step of the design uses the Jacobian of the features by the parameters. It
solves for a change of the parameters that meets the targets to first order, moves the particles by
their linear response to this change, and relaxes the system from there. The features of the relaxed
system are compared with the prediction of the linear model, and the trust region grows or shrinks
accordingly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mdsens._util.errors import ConvergenceError, InputError
from mdsens._util.progress import Trials
from mdsens._util.pytree import named_leaves
from mdsens._util.validation import is_integer, short
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
from mdsens.design.variables import Bounds, Free, Variables
from mdsens.mechanics.status import Status
from mdsens.model.batch import stack, unstack
from mdsens.model.system import System
from mdsens.relaxation.cell_conditions import CellCondition, FixedCell, cell_condition
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.relaxation.minimization import minimize, stop_if_interrupted

__all__ = ["fit"]

# In units of the potential's length scale: a particle that relaxes farther than this from its
# predicted position has taken part in a rearrangement, and the member is in another basin.
REARRANGED = 0.1
# Radius of the trust region below which the design has stagnated.
SMALLEST_TRUST = 1e-6
# Largest change of a variable below which a step is none: the bounds leave no room.
SMALLEST_STEP = 1e-9


def fit(
    targets: Target | Sequence[Target],
    system: System | Sequence[System],
    free: str | Sequence[str] | Mapping[str, Free],
    *,
    bounds: Bounds | None = None,
    method: LevenbergMarquardt | Optax | None = None,
    steps: int = 60,
    restart: bool = False,
    cell: CellCondition | None = None,
    pressure: float | None = None,
    shape: bool = False,
    tolerance: float | None = None,
    max_steps: int = 200_000,
    resume: State | None = None,
    callback: Callable[[State], object] | None = None,
    progress: bool | None = None,
    throw: bool = False,
) -> Design:
    """Change parameters until relaxed systems have the properties that are wanted.

    Args:
      targets: a :class:`Target` for each property that is to reach a value, and ``hold`` for each
        property that is to keep its value.
      system: the system to start from, relaxed or not. A batch made by ``stack``, or a list of
        systems that share the free parameters, is an ensemble, and the targets are for its mean. A
        system of the ensemble that does not relax to a rigid minimum is left out of the mean. Where
        a feature (the property of a target) is computed from moduli, a system whose bulk or shear
        modulus is not positive is left out, too.
      free: the parameters that may change: names, or a dict of :class:`Free` with their bounds.
      bounds: dict of names and (low, high), in place of the bounds in ``free``.
      method: ``LevenbergMarquardt()``, the default, or ``Optax(optimizer)`` with an optimizer of
        optax, such as ``optax.rmsprop(0.002)``.
      steps: the largest number of steps of the design, with one relaxation of each system in each;
        the relaxation at the start is not counted.
      restart: whether to relax every system from its initial positions at every step, instead of
        from the positions that its linear response predicts. Use ``restart=True`` where the
        parameters are to give the property to any packing of an ensemble, fresh packings included,
        and not only to the packings of ``system``. Most systems then relax to other minima than
        those at which their derivatives were taken. The Jacobian is therefore the median over the
        systems, which a few systems near an instability do not dominate.
      cell: the condition on the cell, as in ``minimize``, such as ``AtStress(stress)`` of
        ms.relaxation; None for a fixed cell. A System does not know under which condition it was
        relaxed: give the condition here again.
      pressure: a short form of ``cell=AtPressure(pressure, shape)``.
      shape: with ``pressure``, whether the shape of the cell relaxes as well as its size.
      tolerance: the tolerance of the forces in each relaxation, as in ``minimize``.
      max_steps: the largest number of steps of each relaxation, as in ``minimize``.
      resume: the :class:`State` from which to continue an earlier design of the same targets,
        parameters and method; None begins a new design.
      callback: function that is called with the State after each step. For example,
        ``lambda state: ms.io.save("design.npz", state)`` stores the State in a file.
      progress: whether to show a progress bar; None shows it only in a terminal or notebook.
      throw: whether to raise an error where the targets are not met.

    Returns:
      a :class:`Design`.

    Raises:
      InputError: bad targets, parameters or bounds; a state of another design.
      ConvergenceError: more than half of the systems do not relax to a rigid minimum at the start;
        with ``throw``, targets that are not met.
    """
    method = LevenbergMarquardt() if method is None else method
    check_method(method)
    _check_steps_and_resume(steps, resume)
    wanted = _checked_targets(targets)
    members = _checked_members(system)
    variables = Variables.of(members[0], free, bounds)
    _check_shared(members, variables)
    options = {"pressure": pressure, "shape": shape, "tolerance": tolerance}
    about = {
        **_describe_task(wanted, variables, method),
        "members": len(members),
        "restart": restart,
        # A design may be resumed with more steps for each relaxation, so max_steps is left out.
        **options,
        # Left out where there is none, as in the states of designs that had no such argument.
        **({} if cell is None else {"cell": repr(cell)}),
    }
    problem = Problem(
        targets=wanted,
        features=tuple(t.feature for t in wanted),
        variables=variables,
        method=method,
        relax=_make_relaxation({**options, "cell": cell, "max_steps": max_steps}),
        about=about,
        initial=tuple(members) if restart else None,
    )
    bar = Trials(steps, progress)
    try:
        state, measurement = _begin_design(problem, members, resume)
        while (status := _verdict(state, steps)) is None:
            bar.show(len(state.history) - 1, _distance(state))
            state, measurement = _advanced(problem, state, measurement)
            if callback is not None:
                callback(state)
    finally:
        bar.close()
    names = tuple(t.name for t in wanted)
    design = Design(status, variables.params(state.x), names, variables.labels, state)
    if throw and not status.good:
        raise ConvergenceError(f"fit: {status.sentence}.", status, design)
    return design


def _check_steps_and_resume(steps: int, resume: State | None) -> None:
    """Raise InputError unless ``fit`` gets a whole number of steps and a State to resume from."""
    if not is_integer(steps) or steps < 1:
        raise InputError(f"`steps` is {short(steps)}: give a whole number of at least 1.")
    if resume is not None and not isinstance(resume, State):
        raise InputError(
            f"`resume` is a {type(resume).__name__}: give a State, as ms.io.load returns or as"
            " `callback` is called with."
        )


def _make_relaxation(options: Mapping[str, Any]) -> Callable[[Sequence[System]], list[Equilibrium]]:
    """Return the function that relaxes systems and returns one minimum for each.

    Args:
      options: arguments of ``minimize`` by name, among them the condition on the cell.
    """
    condition = cell_condition(options["cell"], options["pressure"], options["shape"])
    fixed = isinstance(condition, FixedCell)

    def relax(starts: Sequence[System]) -> list[Equilibrium]:
        # One compiled call relaxes a batch; with their cells the members are relaxed one by one.
        if len(starts) > 1 and fixed:
            batch = minimize(stack(list(starts)), throw=False, progress=False, **options)
            stop_if_interrupted(batch)
            return unstack(batch)
        minima = []
        for start in starts:
            minima.append(minimize(start, throw=False, progress=False, **options))
            stop_if_interrupted(minima[-1])
        return minima

    return relax


def _describe_task(
    targets: Sequence[Target], variables: Variables, method: LevenbergMarquardt | Optax
) -> dict[str, Any]:
    """Describe what an inverse design seeks, what it may change, and how, as texts and numbers.

    A state is stored with this description, and only a design with the same one resumes from it.
    """
    bounds_of_x = zip(variables.low, variables.high, strict=True)
    return {
        "targets": [[t.name, t.value, t.tolerance, t.from_start, t.share] for t in targets],
        "variables": list(variables.labels),
        "logarithms": [bool(is_log) for is_log in variables.log],
        "bounds": [[float(low), float(high)] for low, high in bounds_of_x],
        # The repr of an optimizer of optax has addresses of functions, which differ in every run.
        "method": repr(method) if isinstance(method, LevenbergMarquardt) else str(method),
    }


def _checked_targets(targets: Target | Sequence[Target]) -> tuple[Target, ...]:
    """Check the targets of an inverse design, and return them as a tuple.

    A target is a property with a wanted value. Two targets must not have the same name.
    """
    if isinstance(targets, Target):
        return (targets,)
    # A text is a sequence too, of letters: it would be refused letter by letter.
    known = isinstance(targets, Sequence) and not isinstance(targets, str)
    several = tuple(targets) if known else ()
    if not several:
        raise InputError(f"`targets` is {short(targets)}: give at least one Target.")
    for target in several:
        if not isinstance(target, Target):
            raise InputError(
                f"`targets` contains {short(target)}: give ms.design.Target(...) for each target."
            )
    names = [t.name for t in several]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two targets are called {name!r}: give each a different name.")
    return several


def _checked_members(system: System | Sequence[System]) -> list[System]:
    """Return the systems that a user gave to an inverse design as a list; a batch is split up."""
    if isinstance(system, System):
        return [system] if system.batch is None else unstack(system)
    if isinstance(system, Equilibrium):
        raise InputError("`system` is an Equilibrium: give its System, as in `eq.system`.")
    members = list(system) if isinstance(system, (list, tuple)) else []
    if not members or not all(isinstance(s, System) and s.batch is None for s in members):
        raise InputError(
            f"`system` is {short(system)}: give a System, a batch made by ms.stack, or a list of"
            " Systems."
        )
    return members


def _check_shared(members: Sequence[System], variables: Variables) -> None:
    """Raise InputError unless all systems of a design have equal values of the free parameters."""
    for k, member in enumerate(members):
        values = dict(named_leaves(member.params))
        for name, value in variables.start.items():
            if not (name in values and np.array_equal(np.asarray(values[name]), value)):
                raise InputError(
                    f"system {k} has another `{name}` than system 0: give all systems the same"
                    " values of the free parameters."
                )


def _begin_design(
    problem: Problem, members: list[System], resume: State | None
) -> tuple[State, Measurement]:
    """Begin a new inverse design with relaxed systems, or continue the one of a stored state.

    Returns:
      the state, and the properties to design, measured on the relaxed systems.
    """
    return _initial(problem, members) if resume is None else _resumed(problem, resume)


def _initial(problem: Problem, members: list[System]) -> tuple[State, Measurement]:
    """Relax the systems of an inverse design, and make the state in which the design starts.

    Wanted values that are given relative to the starting values are converted to absolute values.

    Returns:
      the state, and the properties to design, measured on the relaxed systems.
    """
    equilibria = problem.relax(members)
    measurement = measure(problem, equilibria, problem.variables.x, np.ones(len(members), bool))
    good = measurement.status == Status.CONVERGED.value
    if not measurement.enough:
        worst = Status.worst_of(measurement.status)
        raise ConvergenceError(
            f"fit: {int((~good).sum())} of {len(members)} systems did not relax to a rigid minimum"
            f" at the start: {worst.sentence}.",
            worst,
            equilibria,
        )
    resolved = [
        target.resolved(float(value))
        for target, value in zip(problem.targets, measurement.values, strict=True)
    ]
    wanted = np.array([value for value, _ in resolved])
    tolerance = np.array([within for _, within in resolved])
    for target, value, least in zip(problem.targets, wanted, measurement.round_off, strict=True):
        # A share of a value that is zero to round-off is a tolerance that nothing can meet.
        if target.share and not abs(value) > least:
            raise InputError(
                f"target '{target.name}': the value is {value:.1g}, zero to round-off, so that a"
                " share of the value is no tolerance: give the tolerance itself, with share=False."
            )
    x = problem.variables.x
    method = problem.method
    if isinstance(method, Optax):
        trust = 1.0
        optimizer = leaves(method.optimizer.init(jnp.asarray(x)))
    else:
        trust, optimizer = np.nan, ()  # nan: the first step determines the radius
    first = Step(
        x=x,
        values=measurement.values,
        predicted=measurement.values,
        status=measurement.status,
        accepted=True,
        size=0.0,
        trust=trust,
        reach=np.inf,
        crossed=0,
        max_displacement_error=0.0,
        left_basin=np.zeros(len(members), bool),
    )
    state = State(
        x=x,
        equilibria=tuple(equilibria),
        counts=good,
        trust=trust,
        memory_x=np.zeros((0, x.size)),
        memory=np.zeros((0, len(problem.targets), x.size)),
        optimizer=optimizer,
        wanted=wanted,
        tolerance=tolerance,
        history=(first,),
        about=problem.about,
    )
    return state, measurement


def _resumed(problem: Problem, state: State) -> tuple[State, Measurement]:
    """Check that a stored state belongs to this inverse design, and measure its minima again.

    Returns:
      the state, and the properties to design, measured on the minima of the state.
    """
    for key, value in problem.about.items():
        if state.about.get(key) != value:
            raise InputError(
                f"`resume` is the state of another design: its {key} is"
                f" {short(state.about.get(key))}, but this design has {short(value)}; give the"
                " same, or leave out `resume`."
            )
    if isinstance(problem.method, Optax):
        initial = leaves(problem.method.optimizer.init(jnp.asarray(state.x)))
        if [leaf.shape for leaf in state.optimizer] != [leaf.shape for leaf in initial]:
            raise InputError(
                "`resume` is the state of a design with another optimizer: give the same optimizer,"
                " or leave out `resume`."
            )
    return state, measure(problem, state.equilibria, state.x, state.counts)


def _distance(state: State) -> float:
    """Compute the largest distance of a property from its target at a design's last accepted step.

    The distance is in units of the target's tolerance.
    """
    last = next(step for step in reversed(state.history) if step.accepted)
    return float(np.max(np.abs(last.values - state.wanted) / state.tolerance))


def _verdict(state: State, steps: int) -> Status | None:
    """Return the status with which an inverse design ends, or None if it must take another step.

    The design ends when all targets are met, when steps have become too short to make progress, or
    when the largest number of steps, ``steps``, has been taken.
    """
    if _distance(state) <= 1.0:
        return Status.CONVERGED
    no_step = len(state.history) > 1 and state.history[-1].size < SMALLEST_STEP
    if state.trust < SMALLEST_TRUST or no_step:
        return Status.DESIGN_STAGNATED
    return Status.BUDGET_SPENT if len(state.history) - 1 >= steps else None


def _advanced(
    problem: Problem, state: State, measurement: Measurement
) -> tuple[State, Measurement]:
    """Take one step of an inverse design: propose parameters, relax at them, accept or refuse.

    Returns:
      the state of the design after the step, and the properties to design at its parameters.
    """
    method = problem.method
    variables = problem.variables
    x = state.x
    if isinstance(method, LevenbergMarquardt):
        if not np.isfinite(state.trust):
            state = dataclasses.replace(state, trust=first_trust(problem, state, measurement))
        step = gauss_newton(problem, state, measurement)
        optimizer = state.optimizer
    else:
        step, optimizer = of_optimizer(method, variables, state, measurement)
    tangent = variables.tangent(x, step)
    responses = moves(state, measurement, tangent)
    reach, crossed = crossings(measurement, responses, tangent)
    tried = x + step
    equilibria, counts, max_displacement_error = relaxed(
        problem, state, responses, variables.params(tried)
    )
    now = measure(problem, equilibria, tried, counts)
    # With restart the error is nan, and the comparison False: basins are not tracked there.
    left_basin = max_displacement_error > REARRANGED
    predicted = measurement.values + measurement.jacobian @ step
    if isinstance(method, LevenbergMarquardt):
        bands = bands_of(state, measurement.values, method.loosened)
        before, after, hoped = (
            float(np.sum(((values - state.wanted) / bands) ** 2))
            for values in (measurement.values, now.values, predicted)
        )
        accepted = now.enough and after < before
        # 1e-300 only avoids a division by zero where the model promises nothing.
        ratio = (before - after) / max(before - hoped, 1e-300)
        trust = next_trust(state.trust, method, now.enough, accepted, ratio)
        # An accepted step leaves x behind; of a refused one the Jacobian on the far side is kept.
        model = (x, measurement.jacobian) if accepted else (tried, now.jacobian)
        memory_x, memory = remembered(state, method, model)
    else:
        accepted = now.enough
        memory_x = state.memory_x
        memory = state.memory
        # Every step of an optimizer is taken; it is halved only while too few members count.
        trust = min(1.0, 2.0 * state.trust) if accepted else 0.5 * state.trust
    record = Step(
        x=tried,
        values=now.values,
        predicted=predicted,
        status=now.status,
        accepted=accepted,
        size=float(np.max(np.abs(step), initial=0.0)),
        trust=state.trust,
        reach=reach,
        crossed=crossed,
        max_displacement_error=float(np.max(max_displacement_error, initial=0.0)),
        left_basin=left_basin,
    )
    state = dataclasses.replace(
        state, trust=trust, memory_x=memory_x, memory=memory, history=(*state.history, record)
    )
    if not accepted:
        return state, measurement
    good = now.status == Status.CONVERGED.value
    minima = _update_minima(equilibria, state.equilibria, good)
    # A refused step has returned above, and leaves the optimizer's state as it was.
    state = dataclasses.replace(state, x=tried, equilibria=minima, counts=good, optimizer=optimizer)
    return state, now


def _update_minima(
    new: Sequence[Equilibrium], old: Sequence[Equilibrium], good: np.ndarray
) -> tuple[Equilibrium, ...]:
    """Return the minimum of each system after an accepted step of an inverse design.

    Args:
      new, old: the minima after the step and before it.
      good: for each system, whether the properties to design could be computed at its new minimum.
        If not, the system keeps its old minimum, and starts from it in the next step.
    """
    return tuple(after if ok else before for after, before, ok in zip(new, old, good, strict=True))
