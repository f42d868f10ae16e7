"""Results of linear solves and roots, and the evidence beside a solution."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from mdsens._util.attributes import Named
from mdsens._util.outcome import Outcome, Severity, name_of
from mdsens._util.portable import Portable

__all__ = ["Result", "SolveStats"]


class Result(Outcome):
    """The outcome of a linear solve, or of a root: see :class:`~mdsens._util.outcome.Outcome`."""

    CONVERGED = (
        0,
        Severity.NONE,
        "converged to the tolerance",
    )
    ROUND_OFF_LIMITED = (
        1,
        Severity.NOTE,
        (
            "the residual stands at round-off, above the tolerance asked for; the answer is as "
            "good as this precision allows"
        ),
    )
    NULL_COMPONENT_DROPPED = (
        2,
        Severity.WARNING,
        (
            "converged; the part of the right-hand side in the null space has no answer and was "
            "dropped"
        ),
    )
    NOT_UNIQUE = (
        6,
        Severity.WARNING,
        (
            "the operator is singular beyond what was declared and the right-hand side lies in "
            "its range: of the many solutions this is the shortest; where the others matter, "
            "state what holds the free directions"
        ),
    )
    MAX_STEPS_REACHED = (
        10,
        Severity.FAILURE,
        "the iteration limit came before the tolerance; raise max_iterations or loosen rtol",
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
            "this is the least-squares solution, not a derivative; state what holds the free "
            "directions (null_space), or check the condition F"
        ),
    )
    NOT_A_ROOT = (
        32,
        Severity.FAILURE,
        (
            "Newton's step from here does not lead to a root of the condition: it is far from "
            "one, or the condition has a kink between; solve more tightly, or check that F is "
            "the condition that the solver solves"
        ),
    )
    DEGENERATE_CONSTRAINT = (
        27,
        Severity.FAILURE,
        (
            "a constraint is met without a force on it, so it is about to open or close: the "
            "derivative is that of one side; move the parameters a little"
        ),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class SolveStats(Portable, Named):
    """The evidence beside a solution.

    Attributes:
      status: a :class:`Result`, or :class:`mdsens.Status`, as an int32 array, which jit and vmap
        carry.
      residual: norm of ``b - A x``, recomputed from the operator, relative to the norm of ``b``
        (both projected off the null space); for a relaxation, the largest force on a particle.
      iterations: operator applications in the solve, or steps of a relaxation.
      dropped: norm of the part of ``b`` in the left null space relative to the norm of ``b``.
      solver: the name of the method that ran, with its settings.
    """

    status: jax.Array
    residual: jax.Array
    iterations: jax.Array
    dropped: jax.Array
    solver: str = dataclasses.field(default="", metadata={"static": True})

    def __repr__(self) -> str:
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
