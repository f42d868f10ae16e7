"""Estimate the error in the derivative of a root that is due to the distance of x from the root.

The estimate works for any condition F(x, *args) = 0 and any solver of this condition. For a relaxed
configuration of particles :func:`mdsens.certify` checks more.
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
from mdsens.implicit.linear import Auto, Method
from mdsens.implicit.linear.result import Result, SolveStats
from mdsens.implicit.root import Condition, NullSpace, Preconditioner, tangent

__all__ = ["RootCertificate", "certify"]

_AUTO = Auto()
# Largest length of the second Newton step, in units of the first step |e|, at which x counts as
# near a root. Kantorovich: Newton's method converges from x where h = |J^-1 F''| |e| is below 1/2,
# and then |J^-1 F(x + e)| is at most h / 2 of |e|. Steps are compared, not residuals: where one
# direction is soft, a step along it raises forces in stiff ones.
_SETTLED = 0.25
# Largest estimated relative error of a derivative that counts as accurate, as in mdsens.certify.
_INACCURATE = 0.1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class RootCertificate(Portable, Named):
    """The derivative dx of a root of F(x, *args) = 0, with estimates of the errors of dx and of x.

    x is the point where a solver stopped, near the root. e is the Newton step from x.

    Attributes:
      status: a :class:`~mdsens.implicit.Result` as an int32 array. The status is NOT_A_ROOT where
        the Newton step does not lead to a root, so that no number below is an estimate; INACCURATE
        where ``error`` is above a tenth; else the status of the linear solves.
      value: dx, the change of the root when the arguments change by dargs, computed at x.
      error: |dx' e| / |dx|, the sharp estimate of the relative error of dx. dx' e is the change of
        dx when x moves by the step e. Where dx is zero, the error is |dx' e|.
      corrected: dx + dx' e. This is more accurate than dx where ``error`` is small, with an error
        that is proportional to the square of the step.
      step: e = - (dF/dx)^-1 F(x), the step from x to the root, to first order.
      distance: |e| / |x|, or |e| where x is zero.
      residual: |F(x)|.
      step_error: |(dF/dx)^-1 F(x + e)| / |e|, the distance to the root that is left after the step,
        in units of the step: about |e| times the curvature of F.
      solve: :class:`~mdsens.implicit.SolveStats` of the linear solve for dx.

    |v| is the 2-norm over all entries of all arrays in v.
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
            numbers = {
                name: np.asarray(getattr(self, name))
                for name in ("status", "error", "distance", "step_error")
            }
        except jax.errors.TracerArrayConversionError:
            return "RootCertificate(traced)"
        # Under vmap each field has an entry for each member: all statuses and the largest numbers.
        names = ", ".join(Result(int(code)).name for code in np.unique(numbers.pop("status")))
        largest = ", ".join(f"{name}={np.max(number):.1e}" for name, number in numbers.items())
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
    """Compute the derivative dx of a root of F(x, *args) = 0, and estimate the error of dx.

        (dF/dx) dx = - (dF/dargs) dargs,    (dF/dx) e = - F(x),    error = |dx' e| / |dx|

    A solver stops before it reaches the root, but :func:`root` and :func:`tangent` differentiate as
    if x were the root. To first order, the Newton step e leads from x to the root, and the
    derivative dx' e of dx along e is the error of dx. The function takes four linear solves and is
    traceable by jit and vmap. The projector of ``null_space`` is computed at x alone and used at
    all points. An x where F has a component along the null space is not a root.

    Args:
      F: the function ``F(x, *args)``, twice differentiable along the step e; for a fixed point of
        T, the function x - T(x, *args).
      x: the unknowns that the solver returned.
      args: the other arguments of F, a tuple.
      dargs: the change of each argument; None for an argument that is constant.
      solve, symmetric, positive_semidefinite, null_space, preconditioner: as in :func:`root`.

    Returns:
      a :class:`RootCertificate`. Where a projection or another kink of F lies between x and the
      root, the Newton step does not lead to the root, and the status is NOT_A_ROOT. The function
      :func:`mdsens.implicit.conditions.degeneracy.kinked` tells whether the root itself is at a
      kink. Outside of jit, ``certify`` compiles for seconds at every call.

    Raises:
      InputError: in the same cases as :func:`tangent`.

    Source: Theorem 1 of Blondel et al., arXiv:2105.15183, bounds the error by the distance; the
      estimate replaces the constants of the theorem by the derivative along the step.
      ``step_error`` is Kantorovich's condition in affine-invariant form: Deuflhard, Newton Methods
      for Nonlinear Problems, Springer 2004, section 2.1.
    """
    check_functions(F=F, null_space=null_space, preconditioner=preconditioner)
    F = Traceable("the condition F", F)
    x = unknowns(x, "x is")
    # Computed at x once, and constant from here on: they are not differentiated along the step.
    projectors = null_space if null_space is None else null_space(x, *args)
    rough_inverse = preconditioner if preconditioner is None else preconditioner(x, *args)
    options: dict[str, Any] = {
        "solve": solve,
        "symmetric": symmetric,
        "positive_semidefinite": positive_semidefinite,
        "null_space": None if projectors is None else lambda *_: projectors,
        "preconditioner": None if rough_inverse is None else lambda *_: rough_inverse,
    }

    def derivative(y: PyTree) -> tuple[PyTree, SolveStats]:
        return tangent(F, y, args, dargs, **options)

    value, value_stats = derivative(x)
    residual = F(x, *args)

    def newton_step(vector: PyTree) -> tuple[PyTree, SolveStats]:
        """Return - (dF/dx)^-1 times a vector, with the Jacobian dF/dx at x, and the SolveStats.

        This is the derivative, by the number ``part``, of the root y of F(y) + part * vector = 0.
        """

        def with_part(y: PyTree, part: Array) -> PyTree:
            return jax.tree.map(lambda f, v: f + part * v, F(y, *args), vector)

        # of the precision of x: a float64 zero would turn an F of float32 into float64
        zero = jnp.zeros((), jnp.result_type(*jax.tree.leaves(x)))
        return tangent(with_part, x, (zero,), (jnp.ones_like(zero),), **options)

    step, step_stats = newton_step(residual)
    next_step, _ = newton_step(F(jax.tree.map(jnp.add, x, step), *args))
    _, change = jax.jvp(lambda y: derivative(y)[0], (x,), (step,))

    residual_norm = _norm(residual)
    step_norm = _norm(step)
    x_norm = _norm(x)
    step_error = _norm(next_step) / jnp.where(step_norm > 0, step_norm, 1)
    error = _norm(change) / jnp.where(_norm(value) > 0, _norm(value), 1)
    # A step shorter than eps^(2/3) |x| is not judged, since the second step may then be round-off.
    # Where x is next to zero, |x| is replaced by the distance that the root moves when the
    # arguments change by as much as their own norm.
    # The share is 4e-11 in double precision and 2e-5 in single precision.
    share = jnp.finfo(step_norm.dtype).eps ** (2 / 3)
    relative_size = _size_over_change(args, dargs)
    judged = step_norm > share * jnp.maximum(x_norm, _norm(value) * relative_size)
    # No step removes the part of F along the null space. It is judged against J x and J dx, the
    # values of F that x and the change of the arguments make.
    _, jacobian = jax.linearize(lambda y: F(y, *args), x)
    scale_of_x = _norm(jacobian(x))
    scale_of_value = _norm(jacobian(value))
    # ``dropped`` is relative to the right-hand side of that solve, which is F(x).
    null_part = step_stats.dropped * residual_norm
    stuck = null_part > share * jnp.maximum(scale_of_x, scale_of_value * relative_size)
    # The first condition that is true decides. Each is written with ~(... <= ...), so that NaN
    # counts as a failure.
    codes = (
        (_has_failed(value_stats), value_stats.status),
        (_has_failed(step_stats), step_stats.status),
        (stuck | (judged & ~(step_error <= _SETTLED)), jnp.int32(Result.NOT_A_ROOT)),
        (~(error <= _INACCURATE), jnp.int32(Result.INACCURATE)),
    )
    status = jnp.select([bad for bad, _ in codes], [code for _, code in codes], value_stats.status)
    return RootCertificate(
        status=status,
        value=value,
        error=error,
        corrected=jax.tree.map(jnp.add, value, change),
        step=step,
        distance=step_norm / jnp.where(x_norm > 0, x_norm, 1),
        residual=residual_norm,
        step_error=step_error,
        solve=value_stats,
    )


def _has_failed(stats: SolveStats) -> Array:
    return ~is_good(stats.status)


def _size_over_change(args: Sequence[PyTree], dargs: Sequence[PyTree]) -> Array:
    """Compute |args| / |dargs|, the norm of the arguments of F over the norm of their changes.

    The ratio times a change of the root tells how far the root moves when the arguments change by
    as much as their own norm. Arguments without a change (None in dargs) are left out; the ratio is
    zero where none changes.
    """
    moving = [(arg, change) for arg, change in zip(args, dargs, strict=True) if change is not None]
    size = _norm(_floats([arg for arg, _ in moving]))
    change = _norm(_floats([change for _, change in moving]))
    # Dividing by infinity gives the zero that the docstring promises, without a 0 / 0.
    return size / jnp.where(change > 0, change, jnp.inf)


def _floats(tree: PyTree) -> list[Any]:
    """List the floating-point arrays and numbers in a tree (nested containers)."""
    leaves = jax.tree.leaves(tree)
    return [leaf for leaf in leaves if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]


def _norm(tree: PyTree) -> Array:
    """Compute the 2-norm over all entries of all arrays in a tree (nested containers)."""
    return jnp.linalg.norm(ravel_pytree(tree)[0])
