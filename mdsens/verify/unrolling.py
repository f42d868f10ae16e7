"""Derivatives through the steps of a minimizer (unrolling), compared with the implicit derivative.

    R_k+1 = Phi(R_k, p),    T_k+1 = dPhi/dR T_k + dPhi/dp dp,    T_0 = 0.

Phi is one step of the minimizer, R_k are the positions after k steps, p the parameters, and T_k is
the derivative of R_k along the parameter change dp; dPhi/dR and dPhi/dp are partial derivatives. As
the run comes to rest, T_k becomes the derivative of the minimum. Before the run comes to rest, T_k
grows with the products of the matrices dPhi/dR, as perturbations of the start do (Metz, Freeman,
Schoenholz and Kachman, Gradients are Not All You Need, arXiv:2111.05803).
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
from mdsens._util.pytree import largest_entry
from mdsens._util.tables import Shown
from mdsens._util.validation import short
from mdsens.mechanics.hessian import largest_force
from mdsens.mechanics.status import Status
from mdsens.mechanics.unknowns import Unknowns
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
# Default numbers of steps, about two for each decade.
STEPS = (30, 100, 300, 1000, 3000)
# How many states forward mode keeps: of the run, the tangent, and the perturbation of the start.
FORWARD = 3
# Relative error below which the unrolled derivative counts as that of the minimum.
AGREES = 1e-4


@dataclasses.dataclass(frozen=True, repr=False)
class Unrolled(Shown):
    """Derivatives through k steps of a minimizer, against the implicit derivative of the minimum.

    T_k is the derivative of the positions after k steps along a change of the parameters; dR/dp is
    the implicit derivative, of the positions R at the minimum, along the same change. The parts in
    the null space (translations, rattlers) are left out of all derivatives and displacements.

    Attributes:
      steps: (m,) the numbers of steps k, ascending.
      errors: (m,) |T_k - dR/dp| / |dR/dp|.
      norms: (m,) |T_k|.
      max_forces: (m,) the largest force on a particle after k steps.
      growth: (m,) log(|d_k| / |d_0|) / k, where d_0 is a small random displacement of the start and
        d_k the displacement after k steps: the largest Lyapunov exponent of the run so far, per
        step. Above 0 the run is chaotic and T_k explodes; below 0 the run forgets its start.
      tangents: (m, n, d) T_k.
      exact: (n, d) the implicit derivative dR/dp.
      forward_bytes: memory of forward mode in bytes, the same for every k: the minimizer's state,
        T_k and d_k.
      reverse_bytes: memory of reverse mode at the last k in bytes, calculated: one state for each
        step. The steps are computed again on the way back; otherwise the memory would be several
        times larger.
      reverse: the measured result of reverse mode; None where reverse mode was not asked for.
      minimum: the minimum that the last step leads to.
      status: CONVERGED, or the worse status of the minimum and the implicit derivative; NOT_FINITE
        where a T_k is not finite.
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
        """The relative error of the derivative through all steps of the minimizer."""
        return float(self.errors[-1])

    @property
    def exponent(self) -> float:
        """The largest Lyapunov exponent of the minimizer's run, per step.

        It is the largest value of ``growth``. A run with an exponent above 0 is chaotic.
        """
        return float(np.max(self.growth))

    def agrees_from(self, tolerance: float = AGREES) -> int | None:
        """Return the number of steps from which on the error is at most ``tolerance``.

        The error is that of the derivative through the minimizer's steps, relative to the implicit
        derivative. The result is None if the error after the last step is still larger.
        """
        too_large = np.flatnonzero(~(self.errors <= tolerance))  # negated, so that NaN counts
        first = 0 if too_large.size == 0 else int(too_large[-1]) + 1
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
            if self.reverse.measured is None:
                memory = "the compiler does not say"
            else:
                memory = f"{_bytes(self.reverse.measured)} (the compiler's)"
            rows.append(("measured, reverse", f"{memory}; adjoint gap {self.reverse.gap:.1e}"))
        return [*rows, ("status", f"{self.status.name}: {self.status.sentence}")]


def _bytes(count: float) -> str:
    """Return a number of bytes as text, in the largest unit that fits (GiB, MiB, KiB, bytes)."""
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
    """Differentiate through k steps of a minimizer, and compare with the derivative of the minimum.

    The derivative of the positions after k steps is computed in forward mode, along with the steps.
    The starting positions, the time steps and the mass do not depend on the parameters. The
    implicit derivative is taken at the minimum that the last step leads to, so that both
    derivatives belong to the same basin.

    Args:
      start: the system to start from, not relaxed; not a batch.
      dparams: the change of the parameters along which to differentiate, as in ``jvp``.
      steps: the numbers of steps k, one number or several.
      method: the minimizer, ``Fire(...)`` or ``GradientDescent(...)`` of ms.relaxation, which are
        those of jax-md.
      reverse: whether to run reverse mode through the largest number of steps as well, and measure
        its memory. The neighbor list then holds all pairs.

    Returns:
      an :class:`Unrolled`; ``print`` shows a table.

    Raises:
      InputError: bad names, steps or method. TooLargeError: reverse mode would not fit in memory.
      ConvergenceError: the run after the last step leads to no minimum, or to one that cannot be
        differentiated.
    """
    system, counts = _checked(start, steps, method)
    require_unconstrained(system, "verify.unrolled")
    tangent = _checked_tangent(system, dparams)
    size = system.positions.size
    itemsize = system.positions.dtype.itemsize
    state_bytes = sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state_at_rest(system, method))
    )
    if reverse:
        # Reverse mode keeps one state a step.
        require_memory(
            counts[-1] * state_bytes / itemsize,
            itemsize,
            f"reverse mode through {counts[-1]:,} steps of {size:,} coordinates",
            "take fewer steps, or forward mode, whose memory does not grow with them.",
        )
        system = all_pairs(system)
    run = TangentRun(system, method, tangent, limits_of(system, method))
    # With their parts in the null space, which is known only at the minimum, after the run.
    raw_tangents: list[jax.Array] = []
    displacements: list[jax.Array] = []
    max_forces: list[float] = []
    for count in counts:
        run.advance(int(count))
        raw_tangents.append(run.tangent)
        displacements.append(run.perturbation)
        max_forces.append(float(largest_force(method.forces(run.state))))
    # From where the run ended, so that the minimum is that of the run's basin.
    eq = minimize(run.system.replace(positions=run.positions).reallocate(), progress=False)
    lin = linearize(eq)
    response = jvp(lin, dparams, throw=False)

    def without_null_part(v: jax.Array) -> np.ndarray:
        return np.asarray(lin.null.project(Unknowns(jnp.asarray(v))).positions)

    exact = without_null_part(response.value)
    tangents = np.array([without_null_part(v) for v in raw_tangents])
    scale = float(np.linalg.norm(exact)) or 1.0
    first = np.linalg.norm(without_null_part(run.aside))
    ratios = np.array([np.linalg.norm(without_null_part(v)) / first for v in displacements])
    # A displacement that has decayed to zero has no logarithm.
    growth = np.log(np.maximum(ratios, np.finfo(float).tiny)) / counts
    return Unrolled(
        steps=counts,
        errors=np.linalg.norm(tangents - exact, axis=(1, 2)) / scale,
        norms=np.linalg.norm(tangents, axis=(1, 2)),
        max_forces=np.array(max_forces),
        growth=growth,
        tangents=tangents,
        exact=exact,
        forward_bytes=FORWARD * state_bytes,
        reverse_bytes=int(counts[-1]) * state_bytes,
        reverse=reversed_run(run, system, tangent, int(counts[-1])) if reverse else None,
        minimum=eq,
        status=response.status if np.isfinite(tangents).all() else Status.NOT_FINITE,
    )


def _checked(
    start: System | Equilibrium, steps: int | Sequence[int], method: Fire | GradientDescent
) -> tuple[System, np.ndarray]:
    """Check the arguments of ``unrolled``; return the start and the numbers of steps, ascending."""
    system = start.system if isinstance(start, Equilibrium) else start
    if not isinstance(system, System) or system.batch is not None:
        raise InputError(f"`start` is a {type(start).__name__}: give one System, not a batch.")
    if not isinstance(method, Fire | GradientDescent):
        raise InputError(
            f"`method` is {short(method)}: give Fire() or GradientDescent() of ms.relaxation."
        )
    # Ascending, so that one run passes through all of them.
    counts = np.unique(np.atleast_1d(np.asarray(steps)))
    whole = counts.ndim == 1 and np.issubdtype(counts.dtype, np.integer)
    if not whole or not counts.size or counts[0] < 1:
        raise InputError(f"`steps` is {short(steps)}: give whole numbers of at least 1.")
    return system.reallocate(), counts


def _checked_tangent(system: System, dparams: Params) -> dict[str, Any]:
    """Return the change of every parameter, by name; raise InputError if all changes are zero."""
    tangent = jax.tree.map(jnp.asarray, full_tangent(system, dparams))
    if largest_entry(tangent) == 0.0:
        raise InputError("`dparams` is zero everywhere: give a change of at least one parameter.")
    return tangent
