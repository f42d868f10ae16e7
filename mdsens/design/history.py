"""What a design has done so far: its steps, and all that it needs to go on."""

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
    """One step of a design: parameters that were tried, and what became of them.

    Attributes:
      x: (p,) the variables tried.
      values: (m,) of the features there, the mean over the members that count; nan where none does.
      predicted: (m,) by the linear model at the place before.
      status: (members,) of each member: CONVERGED, or why it does not count.
      accepted: whether the design went on from there.
      size: the largest change of a variable.
      trust: the radius of the trust region, with which it was made.
      reach: after what part of the step the first pair was to cross a breakpoint, to first order;
        of the member where that comes first. Above 1 the step lies within the certificate's radius.
      crossed: how many pairs were to cross one; of the member with most.
      strayed: how far a particle came to rest from where the linear response put it, at most, in
        units of the potential's length.
      left_basin: (members,) whether that is more than a tenth: a rearrangement, so that the design
        went on, if it did, from another minimum than the one whose derivatives it had.
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
    """A design between two steps: what ``ms.io.save`` stores after each, and ``fit(...,
    resume=state)`` goes on from.

    Attributes:
      x: (p,) the variables.
      equilibria: of each member, the minimum at x, or the last one that it had.
      counts: (members,) whether it is one at x.
      trust: radius of the trust region.
      memory_x, memory: (k, p) and (k, m, p) Jacobians met before, and where.
      optimizer: the arrays of an optax optimizer's state.
      wanted, tolerance: (m,) the targets as numbers.
      history: a tuple of :class:`Step`, the start first.
      about: what the design is of, which ``resume`` compares.
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
    """What a design came to, with all its steps. Print it.

    Attributes:
      status: CONVERGED where every target is met, else DESIGN_STAGNATED or BUDGET_SPENT.
      params: the free parameters' values, by name.
      names: (m,) of the targets.
      labels: (p,) of the variables.
      state: of the last step, to go on from.
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
        """The members' minima."""
        return self.state.equilibria

    @property
    def equilibrium(self) -> Equilibrium:
        """The minimum of a design of one system."""
        (one,) = self.state.equilibria
        return one

    @property
    def reached(self) -> Step:
        """The last step that was accepted."""
        return next(step for step in reversed(self.history) if step.accepted)

    @property
    def values(self) -> np.ndarray:
        """(m,) the features reached."""
        return self.reached.values

    @property
    def wanted(self) -> np.ndarray:
        """(m,) the values that were wanted."""
        return self.state.wanted

    @property
    def tolerance(self) -> np.ndarray:
        """(m,) how near was near enough."""
        return self.state.tolerance

    @property
    def relaxations(self) -> int:
        """How often each member was relaxed, but for the start."""
        return len(self.history) - 1

    _title = "Design"

    def _rows(self) -> list[tuple[str, str]]:
        start, last = self.history[0], self.reached
        rows = [("status", f"{self.status.name}: {self.status.sentence}")]
        for k, name in enumerate(self.names):
            left = abs(last.values[k] - self.wanted[k]) / self.tolerance[k]
            said = "met" if left <= 1.0 else f"{left:.1f} tolerances off"
            rows.append((
                name,
                f"{start.values[k]:.6g} -> {last.values[k]:.6g}, wanted {self.wanted[k]:.6g} +- "
                f"{self.tolerance[k]:.1g}: {said}",
            ))  # fmt: skip
        for name, value in self.params.items():
            few = value.size <= 6
            shown = (
                np.array2string(value, precision=6)
                if few
                else f"{value.size} values, {value.min():.5g} to {value.max():.5g}"
            )
            rows.append((name, " ".join(shown.split())))
        accepted = sum(step.accepted for step in self.history[1:])
        left = sum(bool(np.any(step.left_basin)) for step in self.history[1:] if step.accepted)
        gone = f", {left} of them to another basin" if left else ""
        rows.append(("relaxations", f"{self.relaxations}; {accepted} steps accepted{gone}"))
        if last.status.size > 1:
            good = int(np.sum(last.status == Status.CONVERGED.value))
            rows.append(("members", f"{good} of {last.status.size} count"))
        return rows

    def table(self) -> str:
        """The history as text, a line a step."""
        header = ["step", *self.names, "trust", "crossed", "max_displacement_error", "members", ""]
        rows = []
        for k, step in enumerate(self.history):
            good = int(np.sum(step.status == Status.CONVERGED.value))
            said = "" if step.accepted else "refused"
            said = ", ".join(
                filter(None, [said, "left its basin" if np.any(step.left_basin) else ""])
            )
            rows.append([
                f"{k}", *(f"{v:.6g}" for v in step.values), f"{step.trust:.2g}", f"{step.crossed}",
                f"{step.max_displacement_error:.1g}", f"{good}/{step.status.size}", said or "-",
            ])  # fmt: skip
        return tables.columns("", header, rows)
