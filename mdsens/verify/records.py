"""Results of derivatives by finite differences: with one step size, and over a range of sizes."""

from __future__ import annotations

import dataclasses

import jax
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
    """Return the error ``off`` of a quantity relative to its ``size``.

    The error is not divided where ``size`` is at most 1e-6, which is round-off of finite
    differences.
    """
    return off / size if size > NOTHING else off


def gap(value: ArrayLike | Unknowns, exact: jax.Array | Unknowns, nonaffine: jax.Array) -> float:
    """Compute the relative difference of two derivatives of a minimum.

    Positions, strain, multipliers and relaxed parameters are compared one by one, and the result is
    the largest relative difference. For the positions it is relative to the norm of ``nonaffine``,
    for the others to the norm of the same quantity in ``exact``.

    Args:
      value: the derivative to compare: of positions (n, d), or ``Unknowns`` where the cell,
        multipliers or parameters are relaxed, too.
      exact: the derivative that is taken as right, in the same form.
      nonaffine: (n, d) the part of ``exact`` for the positions; for a relaxed cell,
        without the motion with the cell.
    """
    if not isinstance(exact, Unknowns):
        return relative(_norm(np.asarray(value) - np.asarray(exact)), _norm(nonaffine))
    if isinstance(value, Unknowns) and exact.multipliers is not None:
        return _compare_constrained(value, exact, nonaffine)
    if not isinstance(value, Unknowns) or value.strain is None or exact.strain is None:
        raise InputError(
            "`value` has no strain, and this is a derivative in a relaxed cell: give"
            " Unknowns(positions, strain), as ms.jvp returns."
        )
    of_positions = relative(_distance(value.positions, exact.positions), _norm(nonaffine))
    of_cell = relative(_distance(value.strain, exact.strain), _norm(exact.strain))
    return float(np.maximum(of_positions, of_cell))  # NaN if one is NaN


def _compare_constrained(value: Unknowns, exact: Unknowns, nonaffine: jax.Array) -> float:
    """Compute the relative difference of two derivatives of a minimum under constraints.

    Multipliers and relaxed parameters have other units than positions, so each kind of unknown is
    compared by itself. The arguments are those of :func:`gap`.
    """
    parts = [relative(_distance(value.positions, exact.positions), _norm(nonaffine))]
    for tested, right in ((value.multipliers, exact.multipliers), (value.params, exact.params)):
        differences = [
            np.ravel(np.asarray(a) - np.asarray(b))
            for a, b in zip(jax.tree.leaves(tested), jax.tree.leaves(right), strict=True)
        ]
        rights = [np.ravel(leaf) for leaf in jax.tree.leaves(right)]
        if rights:
            off = _norm(np.concatenate(differences))
            parts.append(relative(off, _norm(np.concatenate(rights))))
    return float(np.max(parts))  # NaN if one is NaN, which Python's max may pass over


def _distance(a: ArrayLike, b: ArrayLike) -> float:
    """Compute the norm of the difference of two arrays, by numpy: jax would compile it."""
    return _norm(np.asarray(a) - np.asarray(b))


def _norm(x: ArrayLike) -> float:
    """Compute the norm of an array: the root of the sum of the squares of all its elements."""
    return float(np.linalg.norm(np.asarray(x)))


@dataclasses.dataclass(frozen=True, repr=False)
class FiniteDifference(Portable, Shown):
    """The derivative of relaxed positions by finite differences, from minimizing again.

    The minimizations are at the parameters params + t dparams and params - t dparams, on both sides
    of the parameters of a given minimum.

    Attributes:
      value: (n, d) central differences of the relaxed positions, without their part in the null
        space (rattlers, translations). In a relaxed cell, ``Unknowns`` of positions and cell as
        ``jvp`` returns them, with ``strain`` a Mandel vector.
      nonaffine: (n, d) the derivative of the positions; for a relaxed cell, without the
        motion with the cell.
      error: estimate of the relative error of ``value``, defined as in ``disagreement``. It
        combines the truncation error, taken from the difference between the results at step t and
        at half that step, with the round-off of positions and parameters, which is measured.
      step: the step t.
      radius: the smallest |t| at which a contact changes, to first order.
      network_changed: True where the contacts on one side differ from those of the given minimum,
        or the minimization on one side ended in another minimum. The differences are then no
        derivative.
      status: CONVERGED, or the worst status of the minimizations.
    """

    value: jax.Array | Unknowns
    nonaffine: jax.Array
    error: float
    step: float
    radius: float
    network_changed: bool
    status: Status

    def disagreement(self, value: ArrayLike | Unknowns) -> float:
        """Return the relative difference of a derivative ``value`` from these finite differences.

        It is |value - differences| / |differences|; it is not divided where |differences| is
        round-off. For a relaxed cell it is the larger of two relative differences, that of
        the strain and that of the positions. The difference of the positions is then divided by the
        norm of their derivative without the motion with the cell, because relative to this motion
        any error would look small.
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
    """The error of central differences against a derivative of a minimum, for k step sizes t.

    The differences are of minima at the parameters params + t dparams and params - t dparams. On
    logarithmic axes the errors of a right derivative form a V over the step t. Round-off of the
    minima makes an error that falls as 1/t, and truncation makes an error that grows as t^2. Beyond
    the first change of a contact the difference quotient is no approximation of the derivative. The
    error of a wrong derivative stays above a constant value at every step.

    Attributes:
      steps: (k,) the steps t, ascending.
      errors: (k,) norm of the central difference less the derivative, relative to the norm of the
        derivative (absolute where this norm is below 1e-6, which is round-off of the differences).
      network_changed: (k,) True where on one side a contact opened or closed within the step, or
        the minimization ended in another minimum.
      radius: the smallest |t| at which a contact changes, to first order.
      statuses: (k,) CONVERGED, or the worse status of the two minimizations of a step.
    """

    steps: np.ndarray
    errors: np.ndarray
    network_changed: np.ndarray
    radius: float
    statuses: tuple[Status, ...]

    @property
    def status(self) -> Status:
        """The worst status of the minimizations of all steps."""
        return Status.worst_of(self.statuses)

    @property
    def sound(self) -> np.ndarray:
        """Mask (k,) of the steps at which both minimizations converged and no contact changed."""
        return ~self.network_changed & np.array([status.good for status in self.statuses])

    @property
    def best(self) -> float:
        """The smallest error among the steps without a contact change; inf without such a step.

        Both minimizations of the step must have converged, too.
        """
        return float(np.min(self.errors[self.sound], initial=np.inf))

    @property
    def branch(self) -> np.ndarray:
        """Mask (k,) of the steps whose error is due to truncation, which grows with the step.

        These are the steps longer than the step of least error, with errors between 3 times the
        least error and 0.1. Both minimizations must have converged, and no contact changed.
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
        """Exponent with which the truncation error grows with the step t, error ~ t^slope.

        It is 2 for a smooth energy, and None if truncation dominates the error of fewer than 3
        steps.
        """
        branch = self.branch
        # A line goes through any two points, so that their slope would say nothing.
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
