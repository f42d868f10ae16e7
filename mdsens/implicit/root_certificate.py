"""Whether a derivative at a root can be trusted: how far the root is, and what that does to the
derivative.

Of a relaxed system :func:`mdsens.certify` knows more; this is for any condition F, whatever found
x.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from mdsens._util.attributes import Named
from mdsens._util.outcome import is_good
from mdsens._util.portable import Portable
from mdsens._util.pytree import PyTree
from mdsens._util.user_functions import Traceable
from mdsens.implicit._validation import check_functions, unknowns
from mdsens.implicit.linear.operators import Auto, Method
from mdsens.implicit.linear.result import Result, SolveStats
from mdsens.implicit.root import Condition, NullSpace, Preconditioner, tangent

__all__ = ["RootCertificate", "certify"]

_AUTO = Auto()
# Kantorovich: Newton's method converges from x where h = |J^-1 F''| |e| is below 1/2, and |J^-1 F(x
# + e)| is at most h / 2 of |e| then. Steps, not residuals: where one direction is soft, a step
# along it raises forces in stiff ones.
_SETTLED = 0.25
# The part of the derivative from which on its estimated error is too large, as in mdsens.certify.
_INACCURATE = 0.1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class RootCertificate(Portable, Named):
    """The derivative of a root, and how far both are from exact.

    Attributes:
      status: a :class:`~mdsens.implicit.Result` as an int32 array. Not good: NOT_A_ROOT where
        Newton's step does not lead to a root, so that no figure below is an estimate; INACCURATE
        where ``error`` is above a tenth; else that of the linear solves.
      value: dx, the derivative at x along dargs.
      error: |dx' e| / |dx|, the sharp estimate of its relative error; dx' e is how dx changes along
        the step e. |dx' e| where dx is zero.
      corrected: dx + dx' e, more accurate where ``error`` is small: what is left goes with the
        square of the step.
      step: e = - (dF/dx)^-1 F(x), from x to the root, to first order.
      distance: |e| / |x|, or |e| where x is zero.
      residual: |F(x)|.
      settles: |(dF/dx)^-1 F(x + e)| / |e|, the part of the way left after the step: about |e| times
        F's curvature.
      solve: :class:`~mdsens.implicit.SolveStats` of the solve for dx.

    All norms are 2-norms over all leaves.
    """

    status: Array
    value: PyTree
    error: Array
    corrected: PyTree
    step: PyTree
    distance: Array
    residual: Array
    step_error: Array
    solve: SolveStats

    def __repr__(self) -> str:
        try:
            figures = {
                name: np.asarray(getattr(self, name))
                for name in ("status", "error", "distance", "step_error")
            }
        except jax.errors.TracerArrayConversionError:
            return "RootCertificate(traced)"
        names = ", ".join(Result(int(code)).name for code in np.unique(figures.pop("status")))
        largest = ", ".join(f"{name}={np.max(figure):.1e}" for name, figure in figures.items())
        return f"RootCertificate(status={names}, {largest})"


def certify(
    F: Condition,
    x: PyTree,
    args: Sequence[PyTree],
    dargs: Sequence[PyTree],
    solve: Method = _AUTO,
    symmetric: bool = False,
    positive_semidefinite: bool = False,
    null_space: NullSpace | None = None,
    preconditioner: Preconditioner | None = None,
) -> RootCertificate:
    """The change of a root by a change of its arguments, with an estimate of what it is off by
    since x is.

        (dF/dx) dx = - (dF/dargs) dargs,    (dF/dx) e = - F(x),    error = |dx' e| / |dx|

    A solver stops before the root, and :func:`root` and :func:`tangent` differentiate as if it had
    not. The Newton step e leads to the root, to first order, and the derivative of dx along e is
    what dx is off by. Costs four linear solves. The projector of ``null_space`` is held as it is at
    x; an F that has a part along the null space is no root, either. Traceable by jit and vmap.

    Args:
      F: ``F(x, *args)``, twice differentiable along the step; of a fixed point x - T(x, *args).
      x: what the solver returned.
      args: the arguments.
      dargs: the change of each; None for an argument that stays.
      solve: as in :func:`root`, and so the others.

    Returns:
      RootCertificate. Where a projection or another kink of F lies between x and the root, Newton's
      step does not lead there, and the status says NOT_A_ROOT; whether the root itself stands at
      one, :func:`mdsens.implicit.conditions.degeneracy.kinked` tells. It takes seconds to compile,
      at every call outside of jit.

    Raises:
      InputError: as :func:`tangent`.

    Source: The bound by distance is Theorem 1 of Blondel et al., arXiv:2105.15183; in place of its
      constants the estimate has the derivative along the step itself. ``step_error``: Kantorovich's
      condition in its affine-invariant form, Deuflhard, Newton Methods for Nonlinear Problems,
      Springer 2004, section 2.1.
    """
    check_functions(F=F, null_space=null_space, preconditioner=preconditioner)
    F, x = Traceable("the condition F", F), unknowns(x, "x is")
    sides = null_space if null_space is None else null_space(x, *args)
    by = preconditioner if preconditioner is None else preconditioner(x, *args)
    known: dict[str, Any] = {
        "solve": solve,
        "symmetric": symmetric,
        "positive_semidefinite": positive_semidefinite,
        "null_space": None if sides is None else lambda *_: sides,
        "preconditioner": None if by is None else lambda *_: by,
    }

    def derivative(y: PyTree) -> tuple[PyTree, SolveStats]:
        return tangent(F, y, args, dargs, **known)

    value, solved = derivative(x)
    left = F(x, *args)

    def step_against(residual: PyTree) -> tuple[PyTree, SolveStats]:
        """- (dF/dx)^-1 of the residual, at x."""

        def with_part(y: PyTree, part: Array) -> PyTree:
            return jax.tree.map(lambda now, more: now + part * more, F(y, *args), residual)

        return tangent(with_part, x, (jnp.zeros(()),), (jnp.ones(()),), **known)

    step, found = step_against(left)
    next_step, _ = step_against(F(jax.tree.map(jnp.add, x, step), *args))
    _, change = jax.jvp(lambda y: derivative(y)[0], (x,), (step,))

    residual, length, size = _size(left), _size(step), _size(x)
    step_error = _size(next_step) / jnp.where(length > 0, length, 1)
    error = _size(change) / jnp.where(_size(value) > 0, _size(value), 1)
    # Nearer than eps^(2/3) of x, what a step leaves may be round-off, and is not judged; nor, where
    # x is next to zero, nearer than that part of the way that x goes when the arguments change by
    # as much as they are.
    share, times = jnp.finfo(length.dtype).eps ** (2 / 3), _times(args, dargs)
    judged = length > share * jnp.maximum(size, _size(value) * times)
    # What is left along the null space no step takes off; it counts from that part of the forces
    # on, which x and the change of the arguments make.
    _, along = jax.linearize(lambda y: F(y, *args), x)
    of_x, of_value = _size(along(x)), _size(along(value))
    stuck = found.dropped * residual > share * jnp.maximum(of_x, of_value * times)
    codes = (
        (_bad(solved), solved.status),
        (_bad(found), found.status),
        (stuck | (judged & ~(step_error <= _SETTLED)), jnp.int32(Result.NOT_A_ROOT)),
        (~(error <= _INACCURATE), jnp.int32(Result.INACCURATE)),
    )
    status = jnp.select([bad for bad, _ in codes], [code for _, code in codes], solved.status)
    distance = length / jnp.where(size > 0, size, 1)
    return RootCertificate(
        status,
        value,
        error,
        jax.tree.map(jnp.add, value, change),
        step,
        distance,
        residual,
        step_error,
        solved,
    )


def _bad(stats: SolveStats) -> Array:
    return ~is_good(stats.status)


def _times(args: Sequence[PyTree], dargs: Sequence[PyTree]) -> Array:
    """How many times the change is as long as the arguments that change."""
    moving = [(arg, change) for arg, change in zip(args, dargs, strict=True) if change is not None]
    own, change = (
        _size(
            [
                leaf
                for leaf in jax.tree.leaves(trees)
                if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
            ]
        )
        for trees in ([pair[0] for pair in moving], [pair[1] for pair in moving])
    )
    return own / jnp.where(change > 0, change, jnp.inf)


def _size(tree: PyTree) -> Array:
    return jnp.linalg.norm(ravel_pytree(tree)[0])
