"""A linear system on flat vectors, solved in rounds: solve, recompute the residual, solve for what
is left of it.

The operator's maps take and give one vector here. Whatever the method, the right-hand side is
projected and scaled to norm one, the answer projected, and the status made from the residual that
the operator itself gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from mdsens.implicit.linear import _krylov
from mdsens.implicit.linear._cgls import cgls
from mdsens.implicit.linear._dense import factor, pseudo_inverse
from mdsens.implicit.linear._krylov import Apply, Iterate, norm, safe_divide
from mdsens.implicit.linear._polynomials import chebyshev, neumann, neumann_terms
from mdsens.implicit.linear.operators import (
    CG,
    GMRES,
    MINRES,
    Auto,
    BiCGSTAB,
    Direct,
    LeastSquares,
    Method,
    Neumann,
    NormalCG,
    Operator,
    SymmetricScaling,
)
from mdsens.implicit.linear.result import Result, SolveStats

__all__ = ["solve_flat"]

_Round: TypeAlias = Callable[[Array, Array, Array], Iterate]
# Of the tolerance, in scaled unknowns, since |S r| may fall under |r|.
_EVEN_SHARE = 0.5


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

    if isinstance(method, Neumann) and method.terms is not None:
        x, residual, applications, ended = _cut_off(operator, kept, method.terms, method.alpha)
    else:
        x, residual, applications, ended = _refine(method, operator, kept)

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
    fields = sorted(field.name for field in dataclasses.fields(method))
    settings = ", ".join(
        f"{f}={getattr(method, f)}" for f in fields if getattr(method, f) is not None
    )
    return f"{type(method).__name__}({settings})"


def _same(v: Array) -> Array:
    return v


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
    off_right = operator.project or _same
    small = jnp.where(eps < 1e-12, 1e-9, jnp.sqrt(eps))
    steps = jnp.where(needed & (residual < small), 6, 0).astype(jnp.int32)

    def body(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        v, size, k = state
        w = operator.matvec(off_right(v))
        length = norm(w)
        return safe_divide(w, length), jnp.maximum(size, length), k + 1

    start = off_right(
        jnp.cos(jnp.arange(x.size, dtype=x.dtype) ** 2)
    )  # a chirp holds every wavelength alike
    start = safe_divide(start, norm(start))
    _, size, _ = lax.while_loop(
        lambda state: state[2] < steps, body, (start, jnp.zeros_like(residual), jnp.int32(0))
    )
    return (steps > 0) & (residual <= 16 * eps * (size * norm(x) + 1)), steps


def _refine(method: Method, operator: Operator, b: Array) -> tuple[Array, Array, Array, Array]:
    """Solve, recompute the residual from the operator, solve for it again while that helps.

    A round of GMRES is one cycle, so its restarts are these rounds, without a bound; the other
    iterations get three more, a factorization, whose rounds cost next to nothing, seven.
    """
    eps = jnp.finfo(b.dtype).eps
    limit = jnp.int32(2**31 - 1)
    if not isinstance(method, Direct | LeastSquares | Auto):
        limit = jnp.int32(method.max_iterations or max(1000, 10 * b.size))
    off_right, left = operator.project or _same, operator.left_project
    inner, setup = _inner(method, operator, b)
    # A cycle that gains less than a thousandth would need thousands more; a repeated solve should
    # gain digits.
    rounds, gain = {GMRES: (2**31 - 1, 0.999), Direct: (8, 0.5), LeastSquares: (8, 0.5)}.get(
        type(method), (4, 0.5)
    )

    def going(state: tuple[Array, ...]) -> Array:
        _, _, size, k, turn, more, _ = state
        return more & (size > method.rtol) & (turn < rounds) & (k < limit)

    def body(state: tuple[Array, ...]) -> tuple[Array, ...]:
        x, r, size, k, turn, _, _ = state
        unit = jnp.where(size > 0, size, 1)
        # A little under the target, so that drift of the recursion does not cost another round.
        tol = jnp.clip(0.9 * method.rtol / unit, eps, 0.9)
        step, used, ended = inner((r if left is None else left(r)) / unit, tol, limit - k)
        x_new = off_right(x + size * step)
        # With the plain operator: an answer that the projectors do not fit shows here.
        r_new = b - operator.matvec(x_new)
        size_new = norm(r_new)
        better = size_new < size
        more = better & (size_new < gain * size) & (ended != Result.INDEFINITE)
        ended = jnp.where(jnp.isfinite(size_new), ended, int(Result.NOT_FINITE))
        x, r, size = (
            jnp.where(better, x_new, x),
            jnp.where(better, r_new, r),
            jnp.where(better, size_new, size),
        )
        return x, r, size, k + used + 1, turn + 1, more, ended

    start = (
        jnp.zeros_like(b),
        b,
        norm(b),
        jnp.int32(0),
        jnp.int32(0),
        jnp.asarray(True),
        jnp.int32(0),
    )
    x, _, size, k, _, _, ended = lax.while_loop(going, body, start)
    late = jnp.where(k >= limit, int(Result.MAX_STEPS_REACHED), int(Result.STAGNATED))
    return x, size, k + setup, jnp.where(ended == Result.CONVERGED, late, ended)


def _cut_off(
    operator: Operator, b: Array, terms: int, alpha: float
) -> tuple[Array, Array, Array, Array]:
    """So many terms of Neumann's series: MAX_STEPS_REACHED, or STAGNATED where the residual is
    larger than b.
    """
    apply, precondition = _projected(operator)
    x = (operator.project or _same)(neumann_terms(apply, b, terms, alpha, precondition))
    residual = norm(b - operator.matvec(x))
    worse = residual > norm(b)
    ended = jnp.where(worse, jnp.int32(Result.STAGNATED), jnp.int32(Result.MAX_STEPS_REACHED))
    return x, residual, jnp.int32(terms), ended


def _projected(operator: Operator, both: bool = False) -> tuple[Apply, Apply | None]:
    """P_L A P_R and P_R M, on vectors that P_L leaves as they are, or on any where ``both``."""
    right, left = operator.project or _same, operator.left_project or _same
    # What an iteration on a symmetric operator applies it to is a sum of projected vectors: one
    # projection is enough.
    inside = right if both or not operator.symmetric else _same
    precondition = operator.preconditioner

    def apply(v: Array) -> Array:
        return left(operator.matvec(inside(v)))

    return apply, None if precondition is None else lambda r: right(precondition(r))


def _inner(method: Method, operator: Operator, b: Array) -> tuple[_Round, int]:
    """The solver of one round, ``(r, tol, limit) -> (x, applications, status)``, and the
    applications to set it up.
    """
    if operator.scaling is not None and isinstance(method, CG | GMRES | MINRES | BiCGSTAB):
        return _scaled(method, operator, operator.scaling, b), 0
    definite = operator.positive_semidefinite
    apply, by = _projected(operator, isinstance(method, Direct | LeastSquares | Auto))
    if isinstance(method, CG | GMRES) and definite and method.degree > 1 and by is None:
        return _smoothed(method, apply, b), 0
    match method:
        case CG():
            return lambda r, tol, limit: _krylov.cg(apply, r, tol, limit, by), 0
        case MINRES():
            return lambda r, tol, limit: _krylov.minres(apply, r, tol, limit, definite, by), 0
        case BiCGSTAB():
            return lambda r, tol, limit: _krylov.bicgstab(apply, r, tol, limit, definite, by), 0
        case GMRES(restart=restart):
            return (
                lambda r, tol, limit: _krylov.gmres_cycle(
                    apply, r, tol, limit, restart, definite, by
                ),
                0,
            )
        case NormalCG(rtol=rtol):
            transposed, _ = _projected(operator.transpose(b))
            flat = max(rtol, 16 * float(jnp.finfo(b.dtype).eps))
            return lambda r, tol, limit: cgls(apply, transposed, r, tol, limit, flat, definite), 0
        case Neumann(alpha=alpha):
            return lambda r, tol, limit: neumann(apply, r, tol, limit, alpha, definite, by), 0
        case LeastSquares(rank_tolerance=share):
            found = pseudo_inverse(apply, operator.project, operator.symmetric, definite, b, share)
            return lambda r, tol, limit: found(r), b.size
        case _:
            factored = factor(apply, operator.project, operator.left_project, definite, b)
            return lambda r, tol, limit: factored(r), b.size


def _scaled(method: Method, operator: Operator, scaling: SymmetricScaling, b: Array) -> _Round:
    """The iteration on S A S^T w = S r, x = S^T w; ``scaling`` on flat vectors."""
    back = jax.linear_transpose(scaling.map, b)
    scaled = Operator(scaling.matvec, operator.symmetric, operator.positive_semidefinite)
    inside, _ = _inner(method, scaled, b)

    def inner(r: Array, tol: Array, limit: Array) -> Iterate:
        side = scaling.map(r)
        size = norm(side)
        w, k, ended = inside(safe_divide(side, size), _EVEN_SHARE * tol, limit)
        return back(w)[0] * size, k, ended

    return inner


def _smoothed(method: CG | GMRES, apply: Apply, b: Array) -> _Round:
    """The iteration on p(A) A x = p(A) r, p the Chebyshev polynomial of the method's degree."""
    degree = method.degree
    smooth = chebyshev(apply, degree, b)

    def inner(r: Array, tol: Array, limit: Array) -> Iterate:
        side = smooth(r)
        size = norm(side)
        unit = safe_divide(side, size)
        # p is large on soft modes and small on stiff ones, so that the residual of A x is larger
        # than that of p(A) A x
        share, steps = 0.1 * tol, limit // degree

        def product(v: Array) -> Array:
            return smooth(apply(v))

        if isinstance(method, GMRES):
            x, k, ended = _krylov.gmres_cycle(product, unit, share, steps, method.restart, True)
        else:
            x, k, ended = _krylov.cg(product, unit, share, steps)
        return x * size, degree * (k + 1), ended

    return inner
