"""Results of finite differences: at one step, and over a range of steps."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from mdsens._util.errors import InputError
from mdsens._util.portable import Portable
from mdsens._util.tables import Shown
from mdsens.mechanics.status import Status
from mdsens.mechanics.unknowns import Unknowns

__all__ = ["DerivativeTest", "FiniteDifference", "gap", "relative"]

# A response smaller than this is round-off of the differences, and errors are absolute.
NOTHING = 1e-6
# Largest error of the best step at which the differences agree with the derivative. For a right
# derivative it is some 1e-7 near jamming, else 1e-9.
AGREES = 1e-4
# Truncation alone makes the errors above this multiple of the least error, and below this error
# relative to the derivative.
BRANCH = (3.0, 0.1)


def relative(off: float, size: float) -> float:
    """Divide ``off`` by ``size``; do not divide where ``size`` is round-off of the differences."""
    return off / size if size > NOTHING else off


def gap(value: ArrayLike | Unknowns, exact: jax.Array | Unknowns, nonaffine: jax.Array) -> float:
    """Compute the relative difference of two derivatives of a minimum.

    The result is the largest of these: the difference of positions relative to ``nonaffine``, of
    strains relative to the strain, of multipliers and of relaxed parameters relative to their own
    norms.
    """
    if not isinstance(exact, Unknowns):
        return relative(_norm(jnp.asarray(value) - exact), _norm(nonaffine))
    if isinstance(value, Unknowns) and exact.multipliers is not None:
        # Under constraints. Multipliers and relaxed parameters have other units than positions, so
        # each kind of unknown is compared by itself.
        parts = [relative(_norm(value.positions - exact.positions), _norm(nonaffine))]
        for tested, right in ((value.multipliers, exact.multipliers), (value.params, exact.params)):
            differences = [
                jnp.ravel(a - b)
                for a, b in zip(jax.tree.leaves(tested), jax.tree.leaves(right), strict=True)
            ]
            rights = [jnp.ravel(leaf) for leaf in jax.tree.leaves(right)]
            if rights:
                off = _norm(jnp.concatenate(differences))
                parts.append(relative(off, _norm(jnp.concatenate(rights))))
        return float(np.max(parts))  # NaN if one is NaN, which Python's max may pass over
    if not isinstance(value, Unknowns) or value.strain is None or exact.strain is None:
        raise InputError(
            "this is a derivative at a pressure: give Unknowns(positions, strain), as ms.jvp does."
        )
    of_positions = relative(_norm(value.positions - exact.positions), _norm(nonaffine))
    of_cell = relative(_norm(value.strain - exact.strain), _norm(exact.strain))
    return float(np.maximum(of_positions, of_cell))  # NaN if one is NaN


def _norm(x: jax.Array) -> float:
    """The norm of an array, over all its elements."""
    return float(jnp.linalg.norm(x))


@dataclasses.dataclass(frozen=True, repr=False)
class FiniteDifference(Portable, Shown):
    """A derivative by finite differences: minimizing again on both sides.

    Attributes:
      value: (n, d), central differences of the relaxed positions, null space projected out; at a
        pressure, of positions and cell as ``jvp`` gives them: ``Unknowns``, with ``strain`` a
        Mandel vector.
      nonaffine: at a pressure (n, d), the derivative of the positions less the motion of the cell;
        else equal to ``value``.
      error: estimate of the relative error of ``value``, defined as in ``disagreement``. It
        combines the truncation error, taken from the difference between the results at step t and
        at half that step, with the round-off of positions and parameters, which is measured.
      step: t of the steps params +- t dparams.
      radius: t of the first change of a contact along the direction, to first order (the smaller of
        the two sides).
      network_changed: True where the contacts on one side differ from the minimum's, or the
        minimization there ended in another minimum. The differences are then no derivative.
      status: CONVERGED, or the worst of the minimizations.
    """

    value: jax.Array | Unknowns
    nonaffine: jax.Array
    error: float
    step: float
    radius: float
    network_changed: bool
    status: Status

    def disagreement(self, value: ArrayLike | Unknowns) -> float:
        """Return |value - self.value| / |self.value|; undivided if |self.value| is round-off.

        At a pressure this is the larger of the disagreements of the strain and of the positions.
        The disagreement of the positions is relative to ``nonaffine``: relative to the motion with
        the cell any error would look small.
        """
        return gap(value, self.value, self.nonaffine)

    _title = "Finite differences"

    def _rows(self) -> list[tuple[str, str]]:
        cell = self.value.strain if isinstance(self.value, Unknowns) else None
        strain = ""
        if cell is not None:
            strain = f" of the motion less the cell's, {_norm(cell):.6g} of its strain"
        changed = ", contacts changed within the step" if self.network_changed else ""
        return [
            ("norm", f"{_norm(self.nonaffine):.6g}{strain}"),
            ("step", f"{self.step:.1e} (first contact change at {self.radius:.1e})"),
            ("own error", f"{self.error:.1e}"),
            ("status", f"{self.status.name}{changed}"),
        ]


@dataclasses.dataclass(frozen=True, repr=False)
class DerivativeTest(Shown):
    """The error of central differences against a derivative, over a range of steps.

    On logarithmic axes the errors of a right derivative form a V. Round-off of the minima makes an
    error that falls as 1/t, truncation one that grows as t^2. Beyond the first change of a contact
    the difference quotient is no approximation of the derivative. The errors of a wrong derivative
    do not fall below a floor at any step.

    Attributes:
      steps: (k,) t of the steps params +- t dparams, ascending.
      errors: (k,) norm of the central difference less the derivative, relative to the norm of the
        derivative (absolute where that is below 1e-6, which is round-off of the differences).
      network_changed: (k,) True where on one side a contact opened or closed within the step, or
        the minimization ended in another minimum.
      radius: t of the first change of a contact along the direction, to first order (the smaller of
        the two sides).
      statuses: (k,) CONVERGED, or the worst of a step's two minimizations.
    """

    steps: np.ndarray
    errors: np.ndarray
    network_changed: np.ndarray
    radius: float
    statuses: tuple[Status, ...]

    @property
    def status(self) -> Status:
        """The worst status of all steps."""
        return Status.worst_of(self.statuses)

    @property
    def sound(self) -> np.ndarray:
        """(k,) True for steps that relaxed on both sides, with the contacts of the minimum."""
        return ~self.network_changed & np.array([status.good for status in self.statuses])

    @property
    def best(self) -> float:
        """The smallest error among the steps in ``sound``; inf where no step is sound."""
        return float(np.min(self.errors[self.sound], initial=np.inf))

    @property
    def branch(self) -> np.ndarray:
        """(k,) True on the truncation branch of the V.

        Sound steps longer than the best one, with errors from 3 times that of the best to a tenth.
        """
        sound = self.sound
        low, high = BRANCH
        if not sound.any():
            return sound
        # Shorter steps than the best one are on the branch of round-off.
        foot = self.steps[sound][np.argmin(self.errors[sound])]
        return sound & (self.steps > foot) & (self.errors > low * self.best) & (self.errors < high)

    @property
    def slope(self) -> float | None:
        """Exponent of the truncation branch, error ~ t^slope: 2 for a smooth energy.

        None with fewer than 3 steps on the branch.
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
            cells = [f"{error:.1e}"]
            if changed:
                cells.append("contacts changed")
            if not status.good:
                cells.append(status.name)
            rows.append((f"{t:.1e}", ", ".join(cells)))
        doubt = ""
        if not self.best <= AGREES:
            doubt = ": at no step do the differences agree with this derivative"
        if self.slope is None:
            truncation = "too few steps on the branch to tell"
        else:
            truncation = f"error ~ t^{self.slope:.2f}"
        return [
            *rows,
            ("best", f"{self.best:.1e}{doubt}"),
            ("truncation", truncation),
            ("radius", f"first contact change at {self.radius:.1e}"),
            ("status", f"{self.status.name}: {self.status.sentence}"),
        ]
