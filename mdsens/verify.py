"""Independent truth: the same derivatives by minimising again. What checks ours checks a user's own potential."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens import contacts, sensitivity
from mdsens._tables import Shown
from mdsens.implicit.status import InputError, Status
from mdsens.relaxation import Equilibrium, Fire, minimize, round_off
from mdsens.stationarity import Unknowns
from mdsens.system import pair_distances, pair_terms

__all__ = ["FiniteDifference", "finite_difference"]

Params = Mapping[str, Any]
STEP = 1e-6  # of the parameters' size: truncation and the minimum's own round-off are both small there
INSIDE = 0.3  # of the distance to the first contact change, at most


@dataclasses.dataclass(frozen=True, repr=False)
class FiniteDifference(Shown):
    """A derivative by minimising again on both sides.

    Attributes:
      value: (n, d), central differences of the relaxed positions, null space projected out.
      error: estimate of its own error relative to its norm: the difference from half the step.
      step: t of the steps params +- t dparams.
      radius: the first change of a contact along the direction, to first order (the smaller of the two sides).
      network_changed: True where the contacts on one side differ from the minimum's, so that the differences straddle a
        kink and say nothing.
      status: CONVERGED, or the worst of the minimisations.
    """

    value: jax.Array
    error: float
    step: float
    radius: float
    network_changed: bool
    status: Status

    def disagreement(self, value: Any) -> float:
        """|value - self.value| relative to |self.value|; absolute where that is round-off of the differences."""
        size = float(jnp.linalg.norm(self.value))
        gap = float(jnp.linalg.norm(jnp.asarray(value) - self.value))
        return gap / size if size > 1e-6 else gap

    _title = "Finite differences"

    def _rows(self) -> list[tuple[str, str]]:
        return [
            ("norm", f"{float(jnp.linalg.norm(self.value)):.6g}"),
            ("step", f"{self.step:.1e} (first contact change at {self.radius:.1e})"),
            ("own error", f"{self.error:.1e}"),
            ("status", f"{self.status.name}" + (", contacts changed within the step" if self.network_changed else "")),
        ]


def _interacting(eq: Equilibrium) -> np.ndarray:
    """Which pairs touch, as rows of particle indices, padding and rattlers left out."""
    rows = []
    net = contacts.network(eq.system, eq.max_force)
    loose = np.asarray(net.rattlers)
    for term in pair_terms(eq.system):
        r = pair_distances(term, eq.system.positions, eq.system.box)
        points = np.asarray(term.lengths())
        inside = np.asarray(r)[None, :] < points
        kept = np.asarray(term.mask) & ~loose[np.asarray(term.i)] & ~loose[np.asarray(term.j)]
        i, j = np.asarray(term.i), np.asarray(term.j)
        low, high = np.minimum(i, j), np.maximum(i, j)
        for row in inside:
            rows.append(np.unique(np.stack([low, high], axis=1)[row & kept], axis=0))
    return np.concatenate(rows) if rows else np.zeros((0, 2), int)


def finite_difference(
    eq: Equilibrium, dparams: Params, step: float | None = None, *, tolerance: float | None = None
) -> FiniteDifference:
    """dR/dt at params + t dparams by central differences, (R(t) - R(-t)) / 2t, minimising again from this minimum.

    Args:
      eq: a minimum; not a batch.
      dparams: the direction, as in ``jvp``.
      step: t; where None, 1e-6 of the parameters' size a size of the direction, and inside 0.3 of the distance to the
        first change of a contact.
      tolerance: of the minimisations; where None, 0.01 of the minimum's own, but not below round-off. Minimisations
        that stop above it, yet within the minimum's own tolerance, are taken as they are, and ``error`` shows it.

    Returns:
      a :class:`FiniteDifference`. Compare with ``v.disagreement(r.value)``.
    """
    lin = sensitivity.linearize(eq)
    tangent = sensitivity.full_tangent(eq.system, dparams)
    velocity = sensitivity.jvp(lin, dparams, throw=False).value
    radius = float(contacts.crossings(eq.system, velocity, tangent, lin.network.rattlers).radius)
    if step is None:
        largest = max((float(jnp.max(jnp.abs(v))) for v in tangent.values() if v.size), default=0.0)
        if largest == 0.0:
            raise InputError("dparams is zero everywhere: give a direction.")
        sizes = [float(jnp.max(jnp.abs(eq.params[k]))) for k, v in tangent.items() if v.size and jnp.any(v != 0)]
        step = min(STEP * max(sizes) / largest if max(sizes) > 0 else STEP, INSIDE * radius)
    if not (np.isfinite(step) and step > 0):
        raise InputError(f"step is {step!r}: give a positive number; the first contact change is at {radius:.1e}.")
    if tolerance is None:
        tolerance = max(0.01 * float(eq.tolerance), float(round_off(eq.system)))
    own = _interacting(eq)
    worst, changed = Status.CONVERGED, False

    def relaxed(t: float) -> jax.Array:
        nonlocal worst, changed
        params = {k: v + t * tangent[k] for k, v in eq.params.items()}
        there = minimize(
            eq.system, params, tolerance=tolerance, method=Fire(), max_steps=20_000, throw=False, progress=False
        )
        status = Status(int(there.status))
        if status is Status.MAX_STEPS_REACHED and float(there.max_force) <= float(eq.tolerance):
            status = Status.ROUND_OFF_LIMITED
        worst = max(worst, status)
        changed = changed or not np.array_equal(own, _interacting(there))
        return there.positions

    def difference(t: float) -> jax.Array:
        slope = (relaxed(t) - relaxed(-t)) / (2.0 * t)
        return lin.null.project(Unknowns(slope)).positions

    whole, half = difference(step), difference(0.5 * step)
    size = float(jnp.linalg.norm(whole))
    gap = float(jnp.linalg.norm(whole - half))
    return FiniteDifference(whole, gap / size if size > 1e-6 else gap, float(step), radius, changed, worst)
