"""The derivative through the steps of the minimizer, beside the implicit one: what unrolling gives,
and what it takes.

    R_k+1 = Phi(R_k, p),    T_k+1 = @Phi/@R T_k + @Phi/@p dp,    T_0 = 0.

T_k is the derivative of what k steps return, whether they have come to rest or not. Where they come
to rest it becomes that of the minimum; before, it grows with the products of @Phi/@R, as
perturbations of the start do (Metz, Freeman, Schoenholz and Kachman, Gradients are Not All You
Need, arXiv:2111.05803).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.memory import require_memory
from mdsens._util.tables import Shown
from mdsens._util.validation import short
from mdsens.mechanics.hessian import Unknowns, largest_force
from mdsens.mechanics.status import Status
from mdsens.model.system import System, require_unconstrained
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.relaxation.methods import Fire, GradientDescent
from mdsens.relaxation.minimization import minimize
from mdsens.sensitivity.derivatives import jvp
from mdsens.sensitivity.linearization import full_tangent, linearize
from mdsens.verify.tangent_run import (
    Reverse,
    TangentRun,
    all_pairs,
    limits_of,
    reversed_run,
    state_at_rest,
)

__all__ = ["Unrolled", "unrolled"]

Params = Mapping[str, Any]
STEPS = (30, 100, 300, 1000, 3000)
FORWARD = (
    3  # states that forward mode holds: the run, the tangent, and the perturbation of the start
)
AGREES = 1e-4  # error from which on the unrolled derivative is taken as that of the minimum


@dataclasses.dataclass(frozen=True, repr=False)
class Unrolled(Shown):
    """Derivatives through k steps of a minimizer, over k, against the implicit derivative of the
    minimum they lead to.

    Attributes:
      steps: (k,) how many, rising.
      errors: (k,) |T_k - dR/dp| / |dR/dp|, both without their part in the null space (translations,
        rattlers).
      norms: (k,) |T_k|, likewise.
      max_forces: (k,) the largest force left after so many steps.
      growth: (k,) log(|d_k| / |d_0|) / k of a small random displacement d_0 of the start, a step,
        likewise: the largest Lyapunov exponent of the run so far. Above 0 the run is chaotic and
        T_k explodes, below it forgets its start.
      tangents: (k, n, d), T_k, likewise.
      exact: (n, d), the implicit derivative.
      forward_bytes: that forward mode holds, whatever k is: the state, T and d.
      reverse_bytes: that reverse mode holds at the last k, a state each step, each recomputed on
        the way back (computed; what a run without that takes is several times more).
      reverse: what reverse mode gave and took, measured; None where it was not asked for.
      minimum: that the last of the steps leads to.
      status: CONVERGED, or the worse of the minimum's and of the implicit derivative's; NOT_FINITE
        where T is not.
    """

    steps: np.ndarray
    errors: np.ndarray
    norms: np.ndarray
    max_forces: np.ndarray
    growth: np.ndarray
    tangents: np.ndarray
    exact: np.ndarray
    forward_bytes: int
    reverse_bytes: int
    reverse: Reverse | None
    minimum: Equilibrium
    status: Status

    @property
    def error(self) -> float:
        """After the last step."""
        return float(self.errors[-1])

    @property
    def exponent(self) -> float:
        """The largest of ``growth``."""
        return float(np.max(self.growth))

    def agrees_from(self, tolerance: float = AGREES) -> int | None:
        """The first number of steps from which on the error stays below ``tolerance``; None where
        it never does.
        """
        late = np.flatnonzero(~(self.errors <= tolerance))
        first = 0 if late.size == 0 else int(late[-1]) + 1
        return int(self.steps[first]) if first < self.steps.size else None

    _title = "Unrolled derivative"

    def _rows(self) -> list[tuple[str, str]]:
        exact = float(np.linalg.norm(self.exact))
        rows = [("steps", "error, norm over the implicit one's, max_force, growth a step")]
        for k, error, norm, force, rate in zip(
            self.steps, self.errors, self.norms, self.max_forces, self.growth, strict=True
        ):
            share = norm / exact if exact > 0 else np.nan
            rows.append((f"{k:,}", f"{error:.1e}, {share:.3g}, {force:.1e}, {rate:+.2e}"))
        agrees = self.agrees_from()
        measured = self.reverse and self.reverse.measured
        rows += [
            ("agrees", "never" if agrees is None else f"to {AGREES:.0e} from {agrees:,} steps on"),
            ("implicit norm", f"{exact:.6g}"),
            ("memory, forward", f"{_bytes(self.forward_bytes)}, whatever the steps (computed)"),
            (
                "memory, reverse",
                f"{_bytes(self.reverse_bytes)} at {int(self.steps[-1]):,} steps (computed)",
            ),
        ]
        if self.reverse is not None:
            said = (
                "the compiler does not say"
                if measured is None
                else f"{_bytes(measured)} (the compiler's)"
            )
            rows.append(("measured, reverse", f"{said}; adjoint gap {self.reverse.gap:.1e}"))
        return [*rows, ("status", f"{self.status.name}: {self.status.sentence}")]


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


def unrolled(
    start: System | Equilibrium,
    dparams: Params,
    steps: int | Sequence[int] = STEPS,
    *,
    method: Fire | GradientDescent = Fire(),
    reverse: bool = False,
) -> Unrolled:
    """Differentiate through k steps of a minimizer, and tell how far that is from the derivative of
    the minimum.

    Forward mode: T_k is carried along with the run. The first positions, the time steps and the
    mass do not depend on the parameters. The implicit derivative is taken at the minimum that the
    last step leads to, so that both are of one basin.

    Args:
      start: where to start, unrelaxed; not a batch.
      dparams: the direction, as in ``jvp``.
      steps: k, one number or several.
      method: ``Fire(...)`` or ``GradientDescent(...)``, jax-md's.
      reverse: run reverse mode through the last k, too, and measure its memory. It lists all pairs.

    Returns:
      an :class:`Unrolled`; print it.

    Raises:
      InputError: bad names, steps or method. TooLargeError: reverse mode would not fit in memory.
      ConvergenceError: no minimum, or none that can be differentiated, lies ahead of the last step.
    """
    system, counts = _checked(start, steps, method)
    require_unconstrained(system, "verify.unrolled")
    tangent = {k: jnp.asarray(v) for k, v in full_tangent(system, dparams).items()}
    if not any(bool(jnp.any(v != 0)) for v in tangent.values()):
        raise InputError("dparams is zero everywhere: give a direction.")
    size, itemsize = system.positions.size, system.positions.dtype.itemsize
    state_bytes = sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state_at_rest(system, method))
    )
    if reverse:
        require_memory(
            counts[-1] * state_bytes / itemsize, itemsize,
            f"reverse mode through {counts[-1]:,} steps of {size:,} coordinates",
            "take fewer steps, or forward mode, whose memory does not grow with them.",
        )  # fmt: skip
        system = all_pairs(system)
    run = TangentRun(system, method, tangent, limits_of(system, method))
    rows = []
    for count in counts:
        run.advance(int(count))
        rows.append(
            (
                run.positions,
                run.tangent,
                run.perturbation,
                float(largest_force(method.forces(run.state))),
            )
        )
    eq = minimize(run.system.replace(positions=run.positions).reallocate(), progress=False)
    lin = linearize(eq)
    response = jvp(lin, dparams, throw=False)

    def off_null(v: Any) -> np.ndarray:
        return np.asarray(lin.null.project(Unknowns(jnp.asarray(v))).positions)

    exact, tangents = off_null(response.value), np.array([off_null(row[1]) for row in rows])
    scale = float(np.linalg.norm(exact)) or 1.0
    whole = np.linalg.norm(off_null(run.aside))
    grown = np.array([np.linalg.norm(off_null(row[2])) / whole for row in rows])
    growth = np.log(np.maximum(grown, np.finfo(float).tiny)) / counts
    return Unrolled(
        counts,
        np.linalg.norm(tangents - exact, axis=(1, 2)) / scale,
        np.linalg.norm(tangents, axis=(1, 2)),
        np.array([row[3] for row in rows]),
        growth,
        tangents,
        exact,
        FORWARD * state_bytes,
        int(counts[-1]) * state_bytes,
        reversed_run(run, system, tangent, int(counts[-1])) if reverse else None,
        eq,
        response.status if np.isfinite(tangents).all() else Status.NOT_FINITE,
    )


def _checked(start: Any, steps: Any, method: Any) -> tuple[System, np.ndarray]:
    system = start.system if isinstance(start, Equilibrium) else start
    if not isinstance(system, System) or system.batch is not None:
        raise InputError(f"unrolled got a {type(start).__name__}: give one System, not a batch.")
    if not isinstance(method, Fire | GradientDescent):
        raise InputError(
            f"method is {short(method)}: give Fire() or GradientDescent() of ms.relaxation."
        )
    counts = np.unique(np.atleast_1d(np.asarray(steps)))
    if (
        counts.ndim != 1
        or not np.issubdtype(counts.dtype, np.integer)
        or not counts.size
        or counts[0] < 1
    ):
        raise InputError(f"steps are {short(steps)}: give whole numbers from 1.")
    return system.reallocate(), counts
