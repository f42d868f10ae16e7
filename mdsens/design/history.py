"""Data classes of an inverse design: one step, the state to resume from, and the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mdsens._util import tables
from mdsens._util.attributes import Named
from mdsens._util.pytree import named_leaves
from mdsens._util.tables import Shown
from mdsens.mechanics.status import Status
from mdsens.relaxation.equilibrium import Equilibrium

__all__ = ["Design", "State", "Step"]


@dataclasses.dataclass(frozen=True)
class Step(Named):
    """One step of an inverse design: the parameters that were tried, and the outcome.

    The design changes p variables until m features of the relaxed systems have wanted values. A
    feature is a property, such as the pressure; a variable is a free component of a parameter, or
    its logarithm. A member is one system of the ensemble.

    Attributes:
      x: (p,) the variables tried.
      values: (m,) the features at x: the mean over the members whose features could be computed;
        nan where there is no such member.
      predicted: (m,) the features that the linear model at the previous x predicted.
      status: (members,) CONVERGED, or the code of the reason why the member is left out of the
        mean.
      accepted: whether the design continued from x.
      size: the largest change of a variable.
      trust: the radius of the trust region for this step.
      reach: the fraction of the step at which the first pair was predicted to cross a breakpoint,
        to first order; the smallest such fraction over the members. A breakpoint is a distance at
        which a derivative of the potential jumps or diverges. If the fraction is above 1, no pair
        is predicted to cross in the step: the step lies within the radius up to which the
        derivative is valid according to its certificate.
      crossed: how many pairs were predicted to cross a breakpoint in the step; the largest such
        number over the members.
      max_displacement_error: the largest distance of a relaxed particle from the position that
        linear response predicted, in units of the length scale of the potential (contact distance,
        or the distance of the minimum of the pair energy).
      left_basin: (members,) whether the ``max_displacement_error`` of the member is more than 0.1,
        so that particles have rearranged. If such a step was accepted, the design continued from
        another minimum than the one at which the derivatives were taken.
    """

    x: np.ndarray
    values: np.ndarray
    predicted: np.ndarray
    status: np.ndarray
    accepted: bool
    size: float
    trust: float
    reach: float
    crossed: int
    max_displacement_error: float
    left_basin: np.ndarray


@dataclasses.dataclass(frozen=True)
class State(Named):
    """A design between two steps, as stored by ``ms.io.save`` and resumed by ``fit(resume=state)``.

    The design changes p variables until m features of the relaxed systems have wanted values. A
    feature is a property, such as the pressure. A member is one system of the ensemble.

    Attributes:
      x: (p,) the variables: the free components of the parameters, or their logarithms.
      equilibria: for each member the minimum at x; its latest minimum if it has none at x.
      counts: (members,) whether the member has a minimum at x, and counts in means over the
        ensemble.
      trust: radius of the trust region; nan before the first step determines the radius.
      memory_x: (k, p) the values of the variables at which the k earlier Jacobians were computed.
      memory: (k, m, p) the Jacobians of the features at ``memory_x``.
      optimizer: the arrays of an optax optimizer's state; empty for Levenberg-Marquardt.
      wanted: (m,) the target value of each feature.
      tolerance: (m,) the tolerance of each target, in the feature's units.
      history: a tuple of :class:`Step`, in order; the first entry is the start.
      about: description of the design: targets, variables, bounds, method, relaxation.
        ``fit(resume=state)`` refuses a state with another description.
    """

    x: np.ndarray
    equilibria: tuple[Equilibrium, ...]
    counts: np.ndarray
    trust: float
    memory_x: np.ndarray
    memory: np.ndarray
    optimizer: tuple[np.ndarray, ...]
    wanted: np.ndarray
    tolerance: np.ndarray
    history: tuple[Step, ...]
    about: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, repr=False)
class Design(Shown):
    """The result of an inverse design, with all of its steps; ``print`` shows a summary.

    Attributes:
      status: CONVERGED where every target is met, DESIGN_STAGNATED where no step leads nearer to
        all targets, BUDGET_SPENT where all steps were taken before every target was met.
      params: values of the free parameters at the end, arrays or trees of arrays by name.
      names: (m,) names of the m targets.
      labels: (p,) labels of the p variables (free components of parameters), such as ``sigma[1]``.
      state: the state after the last step, from which the design can be resumed.
    """

    status: Status
    params: Mapping[str, Any]
    names: tuple[str, ...]
    labels: tuple[str, ...]
    state: State

    @property
    def history(self) -> tuple[Step, ...]:
        """The steps of the inverse design in order, a tuple; the first entry is the start."""
        return self.state.history

    @property
    def equilibria(self) -> tuple[Equilibrium, ...]:
        """The energy minimum of each system at the end of the inverse design, a tuple."""
        return self.state.equilibria

    @property
    def equilibrium(self) -> Equilibrium:
        """The energy minimum at the end of the inverse design, if it was of a single system."""
        (minimum,) = self.state.equilibria
        return minimum

    @property
    def reached(self) -> Step:
        """The last accepted step of the inverse design; the start counts as accepted."""
        # The start counts as accepted, so that there is always one.
        return next(step for step in reversed(self.history) if step.accepted)

    @property
    def values(self) -> np.ndarray:
        """The values (m,) of the m properties to design at the last accepted step."""
        return self.reached.values

    @property
    def wanted(self) -> np.ndarray:
        """The target values (m,) of the m properties to design."""
        return self.state.wanted

    @property
    def tolerance(self) -> np.ndarray:
        """The tolerances (m,) of the m targets, each in the unit of the property to design."""
        return self.state.tolerance

    @property
    def relaxations(self) -> int:
        """How many times each system was relaxed in the inverse design, after the start."""
        return len(self.history) - 1

    _title = "Design"

    def _rows(self) -> list[tuple[str, str]]:
        start = self.history[0]
        last = self.reached
        rows = [("status", f"{self.status.name}: {self.status.sentence}")]
        for k, name in enumerate(self.names):
            # In tolerances, the unit in which fit decides whether a target is met.
            distance = abs(last.values[k] - self.wanted[k]) / self.tolerance[k]
            outcome = "met" if distance <= 1.0 else f"{distance:.1f} tolerances off"
            values = f"{start.values[k]:.6g} -> {last.values[k]:.6g}"
            wanted = f"wanted {self.wanted[k]:.6g} +- {self.tolerance[k]:.1g}"
            rows.append((name, f"{values}, {wanted}: {outcome}"))
        for name, value in named_leaves(self.params):
            # Six numbers of six digits fit in one line of the table.
            if value.size <= 6:
                text = np.array2string(value, precision=6)
            else:
                text = f"{value.size} values, {value.min():.5g} to {value.max():.5g}"
            rows.append((name, " ".join(text.split())))  # numpy breaks the lines of matrices
        accepted = sum(step.accepted for step in self.history[1:])
        left = sum(bool(np.any(step.left_basin)) for step in self.history[1:] if step.accepted)
        basins = f", {left} of them to another basin" if left else ""
        rows.append(("relaxations", f"{self.relaxations}; {accepted} steps accepted{basins}"))
        if last.status.size > 1:
            good = int(np.sum(last.status == Status.CONVERGED.value))
            rows.append(("members", f"{good} of {last.status.size} count"))
        return rows

    def table(self) -> str:
        """Return a text table of the steps of the inverse design, one line for each step.

        Beside each feature stands what the linear model at the step before predicted.
        """
        header = ["step", *(h for name in self.names for h in (name, "predicted"))]
        header += ["trust", "crossed", "max_displacement_error", "members", ""]
        rows = []
        for k, step in enumerate(self.history):
            good = int(np.sum(step.status == Status.CONVERGED.value))
            notes = []
            if not step.accepted:
                notes.append("refused")
            if np.any(step.left_basin):
                notes.append("left its basin")
            row = [f"{k}"]
            for value, predicted in zip(step.values, step.predicted, strict=True):
                row += [f"{value:.6g}", number(predicted) if k else "-"]
            row += [number(step.trust, 2), f"{step.crossed}", f"{step.max_displacement_error:.2g}"]
            row += [f"{good}/{step.status.size}", ", ".join(notes) or "-"]
            rows.append(row)
        return tables.columns("", header, rows)


def number(value: float, digits: int = 6) -> str:
    """Return a number as text; a dash for NaN, where the start has no such number."""
    return "-" if np.isnan(value) else f"{value:.{digits}g}"
