"""Solution of a linear system A x = b on flat vectors, with iterative refinement and a status.

For every linear method, the component of b in the null space of A is removed and b is scaled to
norm one. The null space is removed from the solution x, too, and the status follows from the
residual b - A x, recomputed with A. The refinement repeats the solve: each round solves for the
residual that the round before has left, and adds the result to x.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax.numpy as jnp
from jax import Array, lax

from mdsens._util.probe import chirp
from mdsens.implicit.linear.method import Method, same
from mdsens.implicit.linear.operator import Operator
from mdsens.implicit.linear.result import Result, SolveStats
from mdsens.implicit.linear.vectors import norm, safe_divide

__all__ = ["solve_flat"]


def solve_flat(
    operator: Operator, b: Array, method: Method, fill: float
) -> tuple[Array, SolveStats]:
    """Solve A x = b for a vector b; return x and the statistics, as :func:`mdsens.implicit.solve`.

    Args:
      operator: A, as an operator whose functions map arrays (n,) to arrays (n,).
      b: right-hand side (n,).
      method: a linear method other than Auto, which accepts the operator.
      fill: value of all entries of x where the status is NOT_FINITE.
    """
    left = operator.left_project
    eps = jnp.finfo(b.dtype).eps
    zero = jnp.zeros((), b.dtype)
    # norm() takes the largest entry, and jax raises an error where there is none.
    if b.size == 0:
        ended = jnp.asarray(int(Result.CONVERGED), jnp.int32)
        return b, SolveStats(ended, zero, jnp.zeros((), jnp.int32), zero, _name(method))

    whole = norm(b)
    # at most an eighth of the largest float, whose reciprocal is a normal number; see ``norm``
    scale = jnp.minimum(jnp.where(whole > 0, whole, 1), jnp.finfo(b.dtype).max / 8)
    unit = b / scale
    # Projected twice, because the first projection leaves round-off in proportion to |b|. Where b
    # lies mostly in the null space, that is much beside the rest of b.
    kept = unit if left is None else left(left(unit))
    length = norm(kept)
    dropped = zero if left is None else norm(unit - kept)
    # Of a right-hand side in the null space only round-off is left, whose solution would be noise.
    length = jnp.where(length <= 8 * eps, 0, length)
    kept = jnp.where(length == 0, 0, kept / jnp.where(length == 0, 1, length))

    x, residual, applications, ended = method.run(operator, kept)

    finite = jnp.isfinite(residual) & jnp.all(jnp.isfinite(x)) & (ended != Result.NOT_FINITE)
    needed = finite & (residual > method.rtol)
    round_off, extra = _at_round_off(operator, x, residual, needed)
    not_unique = ended == Result.NOT_UNIQUE
    # A part of b in the null space below a root of round-off is taken for round-off.
    good = jnp.where(
        dropped > jnp.sqrt(eps), int(Result.NULL_COMPONENT_DROPPED), int(Result.CONVERGED)
    )
    # From the weakest to the strongest reason: a later line overrides an earlier one. A solution
    # that is not unique stays so where its residual is small; else there is no solution, SINGULAR.
    status = jnp.where(not_unique, int(Result.SINGULAR), ended)
    at_limit = jnp.where(not_unique, ended, int(Result.ROUND_OFF_LIMITED))
    status = jnp.where(round_off, at_limit, status)
    status = jnp.where(residual <= method.rtol, jnp.where(not_unique, ended, good), status)
    status = jnp.where(ended == Result.INDEFINITE, int(Result.INDEFINITE), status)
    status = jnp.where(finite, status, int(Result.NOT_FINITE)).astype(jnp.int32)
    # A residual of 1 is that of x = 0: the method has gained nothing, and zero is no solution.
    answered = finite & ~((length > 0) & (residual >= 1.0))
    x = jnp.where(answered, x * length * scale, fill)
    return x, SolveStats(status, residual, applications + extra, dropped, _name(method))


def _name(method: Method) -> str:
    """Return the name of a linear method with its settings, such as CG(degree=1, rtol=1e-10)."""
    fields = sorted(field.name for field in dataclasses.fields(cast(Any, method)))
    settings = ", ".join(
        f"{f}={getattr(method, f)}" for f in fields if getattr(method, f) is not None
    )
    return f"{type(method).__name__}({settings})"


def _at_round_off(
    operator: Operator, x: Array, residual: Array, needed: Array
) -> tuple[Array, Array]:
    """Test whether the residual r = b - A x of a solution x is round-off.

    The residual is round-off where the normwise backward error |r| / (|A| |x| + |b|) is at most 16
    units of round-off, with |b| = 1. |A| is estimated from below by six steps of the power method,
    so that the test is on the strict side.

    In float64 the residual must be below 1e-9 as well (in float32, below the square root of
    round-off). Along a null direction that is not declared, |x| grows without bound, so that the
    backward error is tiny although x is noise. Residuals of 6e-9 and more were observed in such
    cases, with errors of 1e7 in x. For condition numbers of A up to about 1e6, round-off stays
    below the limit of 1e-9.

    Args:
      operator: A, on flat vectors.
      x: the solution (n,).
      residual: |r|.
      needed: whether to make the test; where False, the result of the test is False.

    Returns:
      the result of the test, and the number of products with A that the test took.
    """
    eps = jnp.finfo(x.dtype).eps
    project = operator.project or same
    # in float32, 1e-9 is below round-off: there a root of round-off
    small = jnp.where(eps < 1e-12, 1e-9, jnp.sqrt(eps))
    steps = jnp.where(needed & (residual < small), 6, 0).astype(jnp.int32)

    def body(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        v, size, k = state
        w = operator.matvec(project(v))
        length = norm(w)
        return safe_divide(w, length), jnp.maximum(size, length), k + 1

    start = project(chirp(x.size, x.dtype))
    start = safe_divide(start, norm(start))
    _, size, _ = lax.while_loop(
        lambda state: state[2] < steps, body, (start, jnp.zeros_like(residual), jnp.int32(0))
    )
    return (steps > 0) & (residual <= 16 * eps * (size * norm(x) + 1)), steps
