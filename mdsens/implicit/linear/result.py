"""Outcome codes of linear solves and of derivatives of roots, and the statistics of a solve."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jax.core import Tracer

from mdsens._util.attributes import Named
from mdsens._util.outcome import Outcome, Severity, name_of
from mdsens._util.portable import Portable

__all__ = [
    "Result",
    "SolveStats",
    "dropped_any",
]


class Result(Outcome):
    """The outcome of a linear solve or of the derivative of a root: a code with its explanation.

    Each outcome is an :class:`~mdsens._util.outcome.Outcome`. The codes are shared with
    :class:`mdsens.Status`.
    """

    # The codes are shared with mdsens.Status, which adds outcomes: a new code must be free in both.
    CONVERGED = (
        0,
        Severity.NONE,
        "converged to the tolerance",
    )
    ROUND_OFF_LIMITED = (
        1,
        Severity.NOTE,
        (
            "the residual is at round-off, above the requested tolerance; the solution is as "
            "accurate as this precision allows"
        ),
    )
    NULL_COMPONENT_DROPPED = (
        2,
        Severity.WARNING,
        (
            "converged; the component of the right-hand side in the null space has no solution and "
            "was dropped"
        ),
    )
    NOT_UNIQUE = (
        6,
        Severity.WARNING,
        (
            "the operator is singular beyond its declared null space and the right-hand side lies "
            "in its range: this is the shortest of many solutions; where another one is wanted, "
            "add conditions that fix the free directions"
        ),
    )
    MAX_STEPS_REACHED = (
        10,
        Severity.FAILURE,
        "the iteration limit was reached before the tolerance; raise max_iterations or rtol",
    )
    STAGNATED = (
        11,
        Severity.FAILURE,
        (
            "the residual stopped falling above the tolerance; try a longer restart, another "
            "solver (Direct where it fits), or check that the null space is complete"
        ),
    )
    BREAKDOWN = (
        12,
        Severity.FAILURE,
        (
            "the recurrence broke down (division by zero, or a preconditioner that is not "
            "positive definite); use GMRES or Direct"
        ),
    )
    INDEFINITE = (
        13,
        Severity.FAILURE,
        (
            "the operator has a direction of negative curvature, though it was declared positive "
            "semi-definite; declare it symmetric alone and take MINRES, GMRES or Direct"
        ),
    )
    NOT_FINITE = (
        14,
        Severity.FAILURE,
        "a value was not finite; look at the operator, the right-hand side and the parameters",
    )
    INACCURATE = (
        21,
        Severity.FAILURE,
        (
            "the estimated error of the derivative is above a tenth of it; solve to a smaller "
            "residual"
        ),
    )
    SINGULAR = (
        28,
        Severity.FAILURE,
        (
            "the operator is singular and the right-hand side lies partly outside its range: "
            "this is the least-squares solution, not a derivative; declare the null space "
            "(null_space), add conditions that fix the free directions, or check the condition F"
        ),
    )
    NOT_A_ROOT = (
        32,
        Severity.FAILURE,
        (
            "a Newton step from the solution does not lead to a root of the condition: the "
            "solution is far from a root, or the condition has a kink in between; use a smaller "
            "tolerance in the solver, or check that F is the condition that it solves"
        ),
    )
    DEGENERATE_CONSTRAINT = (
        27,
        Severity.FAILURE,
        (
            "a constraint is met but exerts no force, so it is about to open or close: the "
            "derivative is that of one side only; change the parameters slightly"
        ),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class SolveStats(Portable, Named):
    """Status, residual and cost of the solution of a linear system A x = b, or of a relaxation.

    Attributes:
      status: a :class:`Result` or :class:`mdsens.Status` as an int32 array, which passes through
        jit and vmap.
      residual: norm of ``b - A x``, recomputed with A, relative to the norm of ``b``, both without
        their components in the null space; for a relaxation, the largest force on a particle.
      iterations: number of products with A in the solve, or of steps of a relaxation.
      dropped: norm of the component of ``b`` in the left null space, relative to the norm of ``b``.
      solver: name of the linear method that was used, with its settings.
    """

    status: jax.Array
    residual: jax.Array
    iterations: jax.Array
    dropped: jax.Array
    solver: str = dataclasses.field(default="", metadata={"static": True})

    def __repr__(self) -> str:
        # Of a batch, all statuses and the largest of each number.
        try:
            codes = sorted({int(code) for code in np.ravel(np.asarray(self.status))})
        except jax.errors.TracerArrayConversionError:
            return f"SolveStats(traced, solver={self.solver!r})"
        names = ", ".join(name_of(code) for code in codes)
        return (
            f"SolveStats(status={names}, residual={np.max(self.residual, initial=0.0):.2e},"
            f" iterations={np.max(self.iterations, initial=0)},"
            f" dropped={np.max(self.dropped, initial=0.0):.1e}, solver={self.solver!r})"
        )


def dropped_any(status: jax.Array) -> bool:
    """Return whether a status says that a part of the right-hand side of A x = b was dropped.

    This part lies in the null space, where there is no solution. ``status`` is an array of
    :class:`Result` codes; for an array that jax traces, without known values, the result is False.
    """
    return not isinstance(status, Tracer) and bool(
        np.any(np.asarray(status) == Result.NULL_COMPONENT_DROPPED.value)
    )
