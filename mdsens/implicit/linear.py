"""Linear systems ``A x = b`` with a known null space, and the evidence that the answer is one.

    x = P_R (P_L A P_R)^+ P_L b

``A`` is a function on pytrees, never a matrix. ``P_R`` and ``P_L`` project off its right and left null space. The
right-hand side is projected and scaled to norm one, the system solved on flat vectors, the answer projected, and the
residual recomputed from the operator: no solver's own word is taken for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from mdsens.implicit import _krylov
from mdsens.implicit._dense import factor
from mdsens.implicit._krylov import Result, norm
from mdsens.implicit._tree import PyTree, check_same
from mdsens.implicit.operators import (
    CG,
    GMRES,
    MINRES,
    Auto,
    BiCGSTAB,
    Direct,
    Evening,
    LinearMap,
    Method,
    Operator,
    choose,
)
from mdsens.implicit.status import InputError, SolveStats, Status

__all__ = ["linear_solve", "solve"]

_Flat: TypeAlias = Callable[[Array], Array]
# Of the tolerance, in evened unknowns, since |S r| may fall under |r|.
_EVEN_SHARE = 0.5


def solve(
    operator: Operator, b: PyTree, method: Method = Auto(), *, not_finite: float = 0.0
) -> tuple[PyTree, SolveStats]:
    """Solve A x = b on the range of A: the answer of least norm, and what became of it.

    Traceable by jit and vmap; for derivatives take :func:`linear_solve`.

    Args:
      operator: the map and its null space.
      b: right-hand side, a tree of real floating-point arrays; A v must have the same tree and shapes.
      method: an option record. Auto() serves unless a benchmark of your own says otherwise.
      not_finite: what fills x where the status is NOT_FINITE. Zero; a caller without a status to show gives NaN.

    Returns:
      ``(x, stats)``. The status is good (CONVERGED, ROUND_OFF_LIMITED, NULL_COMPONENT_DROPPED) or names what failed;
      then x is the best iterate. ``stats.residual`` is |P_L b - A x| / |P_L b|, from the operator.

    Raises:
      InputError: b and A b differ in tree or shape; b is not real floating point of one precision; CG on an operator
        not declared positive semi-definite, MINRES on one not declared symmetric.
    """
    flat, unravel = _ravel(b)
    matvec, right, left = _flatten(operator, flat, unravel, b)
    method = _admit(choose(method, flat.size, operator), operator)
    x, stats = _solve(operator, matvec, right, left, _evening(operator, b), flat, method, not_finite)
    return unravel(x), stats


def linear_solve(
    operator: Operator, b: PyTree, method: Method = Auto(), *, not_finite: float = 0.0
) -> tuple[PyTree, SolveStats]:
    """:func:`solve` with derivatives: dx = A^+ (db - dA x), forward, reverse and of any order.

    By transposing the solve (``lax.custom_linear_solve``), so ``operator.matvec`` must be differentiable in what it
    closes over and, unless symmetric, transposable. The null space is taken not to move with the parameters: where it
    does (rotations of a cluster), derivatives of x lack their part in the null space, which nothing invariant sees.

    Args, returns and raises as :func:`solve`. ``stats`` have no derivative.
    """
    flat, unravel = _ravel(b)
    matvec, right, left = _flatten(operator, flat, unravel, b)
    method = _admit(choose(method, flat.size, operator), operator)

    even = _evening(operator, b)

    def forward(apply: _Flat, rhs: Array) -> tuple[Array, SolveStats]:
        return _solve(operator, apply, right, left, even, rhs, method, not_finite)

    def backward(apply: _Flat, rhs: Array) -> tuple[Array, SolveStats]:
        return _solve(operator, apply, left, right, even, rhs, method, not_finite)

    x, stats = lax.custom_linear_solve(matvec, flat, forward, backward, symmetric=operator.symmetric, has_aux=True)
    return unravel(x), stats


def _ravel(b: PyTree) -> tuple[Array, Callable[[Array], PyTree]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(b):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise InputError(
                f"the right-hand side b{jax.tree_util.keystr(path)} has dtype {jnp.result_type(leaf)}; give real "
                "floating-point arrays"
            )
    precisions = sorted({str(jnp.result_type(leaf)) for leaf in jax.tree.leaves(b)})
    if len(precisions) > 1:  # the coarsest would bound the residual, while the finest sets what counts as round-off
        raise InputError(f"the right-hand side b mixes {' and '.join(precisions)}; give all of it in one precision")
    return ravel_pytree(b)


def _flatten(
    operator: Operator, flat: Array, unravel: Callable[[Array], PyTree], b: PyTree
) -> tuple[_Flat, _Flat | None, _Flat | None]:
    shapes = jax.eval_shape(lambda: b)
    out = jax.eval_shape(operator.matvec, shapes)
    check_same(out, shapes, "A v", "the right-hand side b", "the operator must map the unknowns' space into itself")

    def flattened(f: LinearMap) -> _Flat:
        return lambda v: ravel_pytree(f(unravel(v)))[0].astype(flat.dtype)

    def projector(f: LinearMap | None) -> _Flat | None:
        return None if f is None else flattened(f)

    right = projector(operator.project)
    left = right if operator.left_project is operator.project else projector(operator.left_project)
    return flattened(operator.matvec), right, left


def _evening(operator: Operator, b: PyTree) -> Evening | None:
    """The change of unknowns on flat vectors."""
    if operator.even is None:
        return None
    change, product = operator.even
    _, unravel = ravel_pytree(b)
    evened = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(change, b))
    _, unravel_evened = ravel_pytree(evened)
    return Evening(
        lambda v: ravel_pytree(change(unravel(v)))[0],
        lambda w: ravel_pytree(product(unravel_evened(w)))[0],
    )


def _admit(method: Method, operator: Operator) -> Method:
    if isinstance(method, CG) and not operator.positive_semidefinite:
        raise InputError(
            "method=CG on an operator with positive_semidefinite=False may give a wrong answer; declare it, or take "
            "MINRES (symmetric) or GMRES (any)"
        )
    if isinstance(method, MINRES) and not operator.symmetric:
        raise InputError(
            "method=MINRES on an operator with symmetric=False gives a wrong answer; declare it symmetric, or take "
            "GMRES"
        )
    return method


def _name(method: Method) -> str:
    fields = sorted(field.name for field in dataclasses.fields(method))
    settings = ", ".join(f"{f}={getattr(method, f)}" for f in fields if getattr(method, f) is not None)
    return f"{type(method).__name__}({settings})"


def _solve(
    operator: Operator,
    matvec: _Flat,
    right: _Flat | None,
    left: _Flat | None,
    even: Evening | None,
    b: Array,
    method: Method,
    fill: float,
) -> tuple[Array, SolveStats]:
    """The pipeline on flat vectors; ``operator`` is read for its flags alone."""
    size, eps = b.size, jnp.finfo(b.dtype).eps
    zero = jnp.zeros((), b.dtype)
    if size == 0:
        ended = jnp.asarray(int(Status.CONVERGED), jnp.int32)
        return b, SolveStats(ended, zero, jnp.zeros((), jnp.int32), zero, _name(method))
    off_right = right or (lambda v: v)
    off_left = left or (lambda v: v)

    # what an iteration on a symmetric operator applies it to is a sum of projected vectors: one projection is enough
    inside = off_right if isinstance(method, Direct | Auto) or not operator.symmetric else lambda v: v

    def apply(v: Array) -> Array:
        return off_left(matvec(inside(v)))

    whole = norm(b)
    unit = b / jnp.where(whole > 0, whole, 1)
    # Twice, because the first pass leaves round-off of all of b, which is much where b lies mostly in the null space.
    kept = unit if left is None else off_left(off_left(unit))
    length = norm(kept)
    dropped = zero if left is None else norm(unit - kept)
    # What is left of a right-hand side in the null space is round-off, and its solution would be noise.
    length = jnp.where(length <= 8 * eps, 0, length)
    kept = jnp.where(length == 0, 0, kept / jnp.where(length == 0, 1, length))

    x, residual, applications, ended = _refine(method, operator, apply, matvec, off_right, right, left, even, kept)

    finite = jnp.isfinite(residual) & jnp.all(jnp.isfinite(x)) & (ended != Status.NOT_FINITE)
    needed = finite & (residual > method.rtol)
    round_off, extra = _at_round_off(matvec, off_right, x, residual, needed)
    good = jnp.where(dropped > jnp.sqrt(eps), int(Status.NULL_COMPONENT_DROPPED), int(Status.CONVERGED))
    status = jnp.where(round_off, int(Status.ROUND_OFF_LIMITED), ended)
    status = jnp.where(residual <= method.rtol, good, status)
    status = jnp.where(ended == Status.INDEFINITE, int(Status.INDEFINITE), status)
    status = jnp.where(finite, status, int(Status.NOT_FINITE)).astype(jnp.int32)
    x = jnp.where(finite, x * length * whole, fill)
    return x, SolveStats(status, residual, applications + extra, dropped, _name(method))


def _at_round_off(matvec: _Flat, off_right: _Flat, x: Array, residual: Array, needed: Array) -> tuple[Array, Array]:
    """Whether the normwise backward error |r| / (|A| |x| + |b|) is round-off (|b| = 1), and the applications it took.

    |A| from below, by six power steps, so the test errs on the strict side. The residual must be small too: along a
    null direction that nobody declared |x| grows without bound, and the backward error of that noise looks perfect
    (seen at residuals from 6e-9, with errors of 1e7). 1e-9 leaves room for condition numbers of 1e6 in float64.
    """
    eps = jnp.finfo(x.dtype).eps
    small = jnp.where(eps < 1e-12, 1e-9, jnp.sqrt(eps))
    steps = jnp.where(needed & (residual < small), 6, 0).astype(jnp.int32)

    def body(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        v, size, k = state
        w = matvec(off_right(v))
        length = norm(w)
        return _krylov.safe_divide(w, length), jnp.maximum(size, length), k + 1

    start = off_right(jnp.cos(jnp.arange(x.size, dtype=x.dtype) ** 2))  # a chirp holds every wavelength alike
    start = _krylov.safe_divide(start, norm(start))
    _, size, _ = lax.while_loop(lambda state: state[2] < steps, body, (start, jnp.zeros_like(residual), jnp.int32(0)))
    return (steps > 0) & (residual <= 16 * eps * (size * norm(x) + 1)), steps


def _refine(
    method: Method,
    operator: Operator,
    apply: _Flat,
    matvec: _Flat,
    off_right: _Flat,
    right: _Flat | None,
    left: _Flat | None,
    even: Evening | None,
    b: Array,
) -> tuple[Array, Array, Array, Array]:
    """Solve, recompute the residual from the operator, solve for it again while that helps.

    A round of GMRES is one cycle, so its restarts are these rounds, without a bound; the other iterations get three
    more, a factorisation, whose rounds cost next to nothing, seven.
    """
    eps = jnp.finfo(b.dtype).eps
    limit = jnp.int32(2**31 - 1)
    if not isinstance(method, Direct | Auto):
        limit = jnp.int32(method.max_iterations or max(1000, 10 * b.size))
    inner, setup = _inner(method, operator, apply, right, left, even, b)
    # A cycle that gains less than a thousandth would need thousands more; a repeated solve should gain digits.
    rounds, gain = {GMRES: (2**31 - 1, 0.999), Direct: (8, 0.5)}.get(type(method), (4, 0.5))

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
        r_new = b - matvec(x_new)
        size_new = norm(r_new)
        better = size_new < size
        more = better & (size_new < gain * size) & (ended != Status.INDEFINITE)
        ended = jnp.where(jnp.isfinite(size_new), ended, int(Status.NOT_FINITE))
        x, r, size = jnp.where(better, x_new, x), jnp.where(better, r_new, r), jnp.where(better, size_new, size)
        return x, r, size, k + used + 1, turn + 1, more, ended

    start = (jnp.zeros_like(b), b, norm(b), jnp.int32(0), jnp.int32(0), jnp.asarray(True), jnp.int32(0))
    x, _, size, k, _, _, ended = lax.while_loop(going, body, start)
    late = jnp.where(k >= limit, int(Status.MAX_STEPS_REACHED), int(Status.STAGNATED))
    return x, size, k + setup, jnp.where(ended == Status.CONVERGED, late, ended)


def _inner(
    method: Method,
    operator: Operator,
    apply: _Flat,
    right: _Flat | None,
    left: _Flat | None,
    even: Evening | None,
    b: Array,
) -> tuple[Callable[[Array, Array, Array], Result], int]:
    """The solver of one round, ``(r, tol, limit) -> (x, applications, status)``, and the applications to set it up."""
    if even is not None and not isinstance(method, Direct | Auto):
        return _evened(method, operator, even, b), 0
    definite = operator.positive_semidefinite
    if isinstance(method, CG | GMRES) and definite and method.degree > 1:
        return _preconditioned(method, apply, b), 0
    match method:
        case CG():
            return lambda r, tol, limit: _krylov.cg(apply, r, tol, limit), 0
        case MINRES():
            return lambda r, tol, limit: _krylov.minres(apply, r, tol, limit, definite), 0
        case BiCGSTAB():
            return lambda r, tol, limit: _krylov.bicgstab(apply, r, tol, limit, definite), 0
        case GMRES(restart=restart):
            return lambda r, tol, limit: _krylov.gmres_cycle(apply, r, tol, limit, restart, definite), 0
        case _:
            factored = factor(apply, right, left, operator.positive_semidefinite, b)
            return lambda r, tol, limit: factored(r), b.size


def _evened(method: Method, operator: Operator, even: Evening, b: Array) -> Callable[[Array, Array, Array], Result]:
    """The iteration on S A S^T w = S r, x = S^T w; ``even`` on flat vectors."""
    back = jax.linear_transpose(even.map, b)
    inside, _ = _inner(method, operator, even.matvec, None, None, None, b)

    def inner(r: Array, tol: Array, limit: Array) -> Result:
        side = even.map(r)
        size = norm(side)
        w, k, ended = inside(_krylov.safe_divide(side, size), _EVEN_SHARE * tol, limit)
        return back(w)[0] * size, k, ended

    return inner


def _preconditioned(method: CG | GMRES, apply: _Flat, b: Array) -> Callable[[Array, Array, Array], Result]:
    """The iteration on p(A) A x = p(A) r, p the Chebyshev polynomial of the method's degree."""
    degree = method.degree
    smooth = _krylov.chebyshev(apply, degree, b)

    def inner(r: Array, tol: Array, limit: Array) -> Result:
        side = smooth(r)
        size = norm(side)
        unit = _krylov.safe_divide(side, size)
        # p is large on soft modes and small on stiff ones, so that the residual of A x is larger than that of p(A) A x
        share, steps = 0.1 * tol, limit // degree

        def product(v: Array) -> Array:
            return smooth(apply(v))

        if isinstance(method, GMRES):
            x, k, ended = _krylov.gmres_cycle(product, unit, share, steps, method.restart, True)
        else:
            x, k, ended = _krylov.cg(product, unit, share, steps)
        return x * size, degree * (k + 1), ended

    return inner
