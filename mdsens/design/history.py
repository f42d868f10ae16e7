"""The records of a design: its steps, the state that it can resume from, and its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mdsens._util import tables
from mdsens._util.attributes import Named
from mdsens._util.tables import Shown
from mdsens.mechanics.status import Status
from mdsens.relaxation.equilibrium import Equilibrium

__all__ = ["Design", "State", "Step"]


@dataclasses.dataclass(frozen=True)
class Step(Named):
    """One step of a design: the parameters that were tried, and the outcome.

    Attributes:
      x: (p,) the variables tried.
      values: (m,) the features at x, mean over the members that count; nan where none counts.
      predicted: (m,) the features that the linear model at the previous x predicted.
      status: for each system of the ensemble (member) CONVERGED, or the code of the reason why it
        does not count in the means.
      accepted: whether the design continued from x.
      size: the largest change of a variable (a variable is a free component of a parameter, or its
        logarithm).
      trust: the radius of the trust region for this step.
      reach: fraction of the step at which the first pair was predicted to cross a breakpoint, to
        first order, in the member where that comes first. Above 1 the step lies within the
        certificate's radius.
      crossed: how many pairs were predicted to cross a breakpoint, in the member with most. A
        breakpoint is a distance at which a derivative of the potential jumps or diverges.
      max_displacement_error: the largest distance of a relaxed particle from the position that
        linear response predicted, in units of the length scale of the potential (contact distance,
        or the distance of the minimum of the pair energy).
      left_basin: for each member whether ``max_displacement_error`` is more than 0.1, so that
        particles have rearranged. If such a step was accepted, the design continued from another
        minimum than that of the derivatives.
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

    Attributes:
      x: (p,) the variables: the free components of the parameters, or their logarithms.
      equilibria: for each member its minimum at x, or its last minimum where it has none at x.
      counts: (members,) whether the member has a minimum at x, and counts in the means.
      trust: radius of the trust region; nan before the first step has determined it.
      memory_x: (k, p) the points at which earlier Jacobians were computed.
      memory: (k, m, p) the Jacobians at ``memory_x``.
      optimizer: the arrays of an optax optimizer's state.
      wanted: (m,) the target values as numbers.
      tolerance: (m,) the tolerances of the targets as numbers.
      history: a tuple of :class:`Step`, the start first.
      about: description of the design: targets, variables, bounds, method, relaxation. ``resume``
        refuses a state with another description.
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
    """The result of a design, with all its steps; ``print`` shows a summary.

    Attributes:
      status: CONVERGED where every target is met, else DESIGN_STAGNATED or BUDGET_SPENT.
      params: values of the free parameters, by name.
      names: (m,) names of the targets.
      labels: (p,) labels of the variables, such as ``sigma[1]``.
      state: the state after the last step, from which the design can be resumed.
    """

    status: Status
    params: Mapping[str, np.ndarray]
    names: tuple[str, ...]
    labels: tuple[str, ...]
    state: State

    @property
    def history(self) -> tuple[Step, ...]:
        """The steps, the start first."""
        return self.state.history

    @property
    def equilibria(self) -> tuple[Equilibrium, ...]:
        """The minima of the systems of the ensemble, a list."""
        return self.state.equilibria

    @property
    def equilibrium(self) -> Equilibrium:
        """The minimum of a design of one system."""
        (minimum,) = self.state.equilibria
        return minimum

    @property
    def reached(self) -> Step:
        """The last step that was accepted."""
        # The start counts as accepted, so that there is always one.
        return next(step for step in reversed(self.history) if step.accepted)

    @property
    def values(self) -> np.ndarray:
        """(m,) the features at the last accepted step."""
        return self.reached.values

    @property
    def wanted(self) -> np.ndarray:
        """(m,) the target values."""
        return self.state.wanted

    @property
    def tolerance(self) -> np.ndarray:
        """(m,) the tolerances of the targets."""
        return self.state.tolerance

    @property
    def relaxations(self) -> int:
        """How many times each member was relaxed, the start not counted."""
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
        for name, value in self.params.items():
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
        """The history as a table in text, one line for each step."""
        header = ["step", *self.names, "trust", "crossed", "max_displacement_error", "members", ""]
        rows = []
        for k, step in enumerate(self.history):
            good = int(np.sum(step.status == Status.CONVERGED.value))
            notes = []
            if not step.accepted:
                notes.append("refused")
            if np.any(step.left_basin):
                notes.append("left its basin")
            row = [f"{k}", *(f"{value:.6g}" for value in step.values)]
            row += [f"{step.trust:.2g}", f"{step.crossed}", f"{step.max_displacement_error:.1g}"]
            row += [f"{good}/{step.status.size}", ", ".join(notes) or "-"]
            rows.append(row)
        return tables.columns("", header, rows)
