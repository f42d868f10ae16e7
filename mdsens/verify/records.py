"""What differences of minima gave: at one step, and over a range of steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.portable import Portable
from mdsens._util.tables import Shown
from mdsens.mechanics.status import Status
from mdsens.mechanics.unknowns import Unknowns

__all__ = ["DerivativeTest", "FiniteDifference", "gap", "relative"]

NOTHING = 1e-6  # a response smaller than this is round-off of the differences
AGREES = 1e-4  # error of the best step of a right derivative: near jamming some 1e-7, else 1e-9
BRANCH = (
    3.0,
    0.1,
)  # of the least error, and of the derivative: between them the error is truncation alone


def relative(off: float, size: float) -> float:
    """``off`` against ``size``; as it is where the size is round-off of the differences."""
    return off / size if size > NOTHING else off


def gap(value: Any, exact: Any, nonaffine: jax.Array) -> float:
    """How far a derivative is from another: of positions relative to ``nonaffine``, of a cell to
    its strain.
    """
    if not isinstance(exact, Unknowns):
        return relative(_norm(jnp.asarray(value) - exact), _norm(nonaffine))
    if isinstance(value, Unknowns) and exact.multipliers is not None:
        parts = [relative(_norm(value.positions - exact.positions), _norm(nonaffine))]
        for ours, theirs in ((value.multipliers, exact.multipliers), (value.params, exact.params)):
            gaps = [
                jnp.ravel(a - b)
                for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
            ]
            sizes = [jnp.ravel(leaf) for leaf in jax.tree.leaves(theirs)]
            if sizes:
                parts.append(relative(_norm(jnp.concatenate(gaps)), _norm(jnp.concatenate(sizes))))
        return float(np.max(parts))  # NaN where one is, which Python's max may pass over
    if not isinstance(value, Unknowns) or value.strain is None or exact.strain is None:
        raise InputError(
            "the derivative is one at a pressure: give Unknowns(positions, strain), as ms.jvp does."
        )
    moved = relative(_norm(value.positions - exact.positions), _norm(nonaffine))
    return float(
        np.maximum(moved, relative(_norm(value.strain - exact.strain), _norm(exact.strain)))
    )


def _norm(x: Any) -> float:
    return float(jnp.linalg.norm(x))


@dataclasses.dataclass(frozen=True, repr=False)
class FiniteDifference(Portable, Shown):
    """A derivative by minimizing again on both sides.

    Attributes:
      value: (n, d), central differences of the relaxed positions, null space projected out; at a
        pressure, of positions and cell as ``jvp`` gives them: ``Unknowns``, with ``strain`` a
        Mandel vector.
      nonaffine: at a pressure (n, d), the positions' part less the cell's motion; else ``value``.
      error: estimate of its own error, relative as a ``disagreement`` is: the difference from half
        the step, which shows what the straight line misses, and what round-off of positions and
        parameters makes, which is measured.
      step: t of the steps params +- t dparams.
      radius: the first change of a contact along the direction, to first order (the smaller of the
        two sides).
      network_changed: True where the contacts on one side differ from the minimum's, or the
        minimization there ended in another minimum, so that the differences say nothing.
      status: CONVERGED, or the worst of the minimizations.
    """

    value: Any
    nonaffine: jax.Array
    error: float
    step: float
    radius: float
    network_changed: bool
    status: Status

    def disagreement(self, value: Any) -> float:
        """|value - self.value| relative to |self.value|; absolute where that is round-off of the
        differences.

        At a pressure the worse of the cell's and of that of the positions, relative to
        ``nonaffine``: against the cell's own motion any error would look small.
        """
        return gap(value, self.value, self.nonaffine)

    _title = "Finite differences"

    def _rows(self) -> list[tuple[str, str]]:
        cell = self.value.strain if isinstance(self.value, Unknowns) else None
        strain = (
            ""
            if cell is None
            else f" of the motion less the cell's, {_norm(cell):.6g} of its strain"
        )
        return [
            ("norm", f"{_norm(self.nonaffine):.6g}{strain}"),
            ("step", f"{self.step:.1e} (first contact change at {self.radius:.1e})"),
            ("own error", f"{self.error:.1e}"),
            (
                "status",
                f"{self.status.name}"
                + (", contacts changed within the step" if self.network_changed else ""),
            ),
        ]


@dataclasses.dataclass(frozen=True, repr=False)
class DerivativeTest(Shown):
    """The error of central differences over a range of steps: a derivative is right where it falls
    to the V's foot.

    Round-off of the minima makes an error that falls as 1/t, truncation one that grows as t^2, and
    at the first change of a contact the difference quotient breaks: beyond it there is no
    derivative to agree with. A wrong derivative shows as a floor that no step goes below.

    Attributes:
      steps: (k,) t of the steps params +- t dparams, rising.
      errors: (k,) norm of the central difference less the derivative, relative to the derivative's
        (absolute where that is below 1e-6, which is round-off of the differences).
      network_changed: (k,) True where a contact opened or closed within the step, or the minimum
        was left, on a side.
      radius: the first change of a contact along the direction, to first order (the smaller of the
        two sides).
      statuses: (k,) CONVERGED, or the worst of a step's two minimizations.
    """

    steps: np.ndarray
    errors: np.ndarray
    network_changed: np.ndarray
    radius: float
    statuses: tuple[Status, ...]

    @property
    def status(self) -> Status:
        """The worst of all steps'."""
        return Status.worst_of(self.statuses)

    @property
    def sound(self) -> np.ndarray:
        """(k,) True where a step says something: it relaxed on both sides, within one contact
        network.
        """
        return ~self.network_changed & np.array([status.good for status in self.statuses])

    @property
    def best(self) -> float:
        """The smallest error of a sound step; inf where there is none."""
        return float(np.min(self.errors[self.sound], initial=np.inf))

    @property
    def branch(self) -> np.ndarray:
        """(k,) True on the truncation branch: sound steps above the best, from 3 times its error to
        a tenth.
        """
        sound, (low, high) = self.sound, BRANCH
        if not sound.any():
            return sound
        foot = self.steps[sound][np.argmin(self.errors[sound])]
        return sound & (self.steps > foot) & (self.errors > low * self.best) & (self.errors < high)

    @property
    def slope(self) -> float | None:
        """Exponent of the truncation branch, error ~ t^slope: 2 for a smooth energy. None where
        under 3 steps show.
        """
        branch = self.branch
        if branch.sum() < 3:
            return None
        return float(np.polyfit(np.log(self.steps[branch]), np.log(self.errors[branch]), 1)[0])

    _title = "Derivative test"

    def _rows(self) -> list[tuple[str, str]]:
        rows = [("step", "error")]
        for t, error, changed, status in zip(
            self.steps, self.errors, self.network_changed, self.statuses, strict=True
        ):
            notes = (["contacts changed"] if changed else []) + (
                [] if status.good else [status.name]
            )
            rows.append((f"{t:.1e}", ", ".join([f"{error:.1e}", *notes])))
        doubt = (
            ""
            if self.best <= AGREES
            else ": at no step do the differences agree with this derivative"
        )
        slope = (
            "too few steps on the branch to tell"
            if self.slope is None
            else f"error ~ t^{self.slope:.2f}"
        )
        return [
            *rows,
            ("best", f"{self.best:.1e}{doubt}"),
            ("truncation", slope),
            ("radius", f"first contact change at {self.radius:.1e}"),
            ("status", f"{self.status.name}: {self.status.sentence}"),
        ]
