"""A linear system on flat vectors, solved in rounds: solve, recompute the residual, solve for what
is left of it.

The operator's maps take and give one vector here. Whatever the method, the right-hand side is
projected and scaled to norm one, the answer projected, and the status made from the residual that
the operator itself gives.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax.numpy as jnp
from jax import Array, lax

from mdsens._util.probe import chirp
from mdsens.implicit.linear._vectors import norm, safe_divide
from mdsens.implicit.linear.method import Method, same
from mdsens.implicit.linear.operator import Operator
from mdsens.implicit.linear.result import Result, SolveStats

__all__ = ["solve_flat"]


def solve_flat(
    operator: Operator, b: Array, method: Method, fill: float
) -> tuple[Array, SolveStats]:
    """:func:`mdsens.implicit.solve` on flat vectors, by a method that is none to be chosen and fits
    the operator.

    Args:
      operator: its maps take and give arrays (n,).
      b: right-hand side (n,).
      method: an option record other than Auto.
      fill: what x is filled with where the status is NOT_FINITE.
    """
    left = operator.left_project
    size, eps = b.size, jnp.finfo(b.dtype).eps
    zero = jnp.zeros((), b.dtype)
    if size == 0:
        ended = jnp.asarray(int(Result.CONVERGED), jnp.int32)
        return b, SolveStats(ended, zero, jnp.zeros((), jnp.int32), zero, _name(method))

    whole = norm(b)
    unit = b / jnp.where(whole > 0, whole, 1)
    # Twice, because the first pass leaves round-off of all of b, which is much where b lies mostly
    # in the null space.
    kept = unit if left is None else left(left(unit))
    length = norm(kept)
    dropped = zero if left is None else norm(unit - kept)
    # What is left of a right-hand side in the null space is round-off, and its solution would be
    # noise.
    length = jnp.where(length <= 8 * eps, 0, length)
    kept = jnp.where(length == 0, 0, kept / jnp.where(length == 0, 1, length))

    x, residual, applications, ended = method.run(operator, kept)

    finite = jnp.isfinite(residual) & jnp.all(jnp.isfinite(x)) & (ended != Result.NOT_FINITE)
    needed = finite & (residual > method.rtol)
    round_off, extra = _at_round_off(operator, x, residual, needed)
    free = ended == Result.NOT_UNIQUE
    good = jnp.where(
        dropped > jnp.sqrt(eps), int(Result.NULL_COMPONENT_DROPPED), int(Result.CONVERGED)
    )
    status = jnp.where(free, int(Result.SINGULAR), ended)
    status = jnp.where(round_off, jnp.where(free, ended, int(Result.ROUND_OFF_LIMITED)), status)
    status = jnp.where(residual <= method.rtol, jnp.where(free, ended, good), status)
    status = jnp.where(ended == Result.INDEFINITE, int(Result.INDEFINITE), status)
    status = jnp.where(finite, status, int(Result.NOT_FINITE)).astype(jnp.int32)
    answered = finite & ~((length > 0) & (residual >= 1.0))  # nothing was gained: zero is no answer
    x = jnp.where(answered, x * length * whole, fill)
    return x, SolveStats(status, residual, applications + extra, dropped, _name(method))


def _name(method: Method) -> str:
    fields = sorted(field.name for field in dataclasses.fields(cast(Any, method)))
    settings = ", ".join(
        f"{f}={getattr(method, f)}" for f in fields if getattr(method, f) is not None
    )
    return f"{type(method).__name__}({settings})"


def _at_round_off(
    operator: Operator, x: Array, residual: Array, needed: Array
) -> tuple[Array, Array]:
    """Whether the normwise backward error |r| / (|A| |x| + |b|) is round-off (|b| = 1), and the
    applications it took.

    |A| from below, by six power steps, so the test errs on the strict side. The residual must be
    small too: along a null direction that nobody declared |x| grows without bound, and the backward
    error of that noise looks perfect (seen at residuals from 6e-9, with errors of 1e7). 1e-9 leaves
    room for condition numbers of 1e6 in float64.
    """
    eps = jnp.finfo(x.dtype).eps
    off_right = operator.project or same
    small = jnp.where(eps < 1e-12, 1e-9, jnp.sqrt(eps))
    steps = jnp.where(needed & (residual < small), 6, 0).astype(jnp.int32)

    def body(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        v, size, k = state
        w = operator.matvec(off_right(v))
        length = norm(w)
        return safe_divide(w, length), jnp.maximum(size, length), k + 1

    start = off_right(chirp(x.size, x.dtype))
    start = safe_divide(start, norm(start))
    _, size, _ = lax.while_loop(
        lambda state: state[2] < steps, body, (start, jnp.zeros_like(residual), jnp.int32(0))
    )
    return (steps > 0) & (residual <= 16 * eps * (size * norm(x) + 1)), steps
