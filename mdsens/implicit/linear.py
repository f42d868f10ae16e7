"""Linear systems ``A x = b`` with a known null space, and the evidence that the answer is one.

    x = P_R (P_L A P_R)^+ P_L b

``A`` is a function on pytrees, never a matrix. ``P_R`` and ``P_L`` project off its right and left null space. The
right-hand side is projected and scaled to norm one, the system solved on flat vectors, the answer projected, and the
residual recomputed from the operator: no solver's own word is taken for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from mdsens.implicit import _krylov
from mdsens.implicit._dense import factor
from mdsens.implicit._krylov import Result, norm
from mdsens.implicit._tree import PyTree, check_same
from mdsens.implicit.status import InputError, SolveStats, Status

__all__ = [
    "CG",
    "GMRES",
    "MINRES",
    "Auto",
    "BiCGSTAB",
    "Direct",
    "Evening",
    "Method",
    "Operator",
    "choose",
    "linear_solve",
    "solve",
]

LinearMap: TypeAlias = Callable[[PyTree], PyTree]
_Flat: TypeAlias = Callable[[Array], Array]


class Evening(NamedTuple):
    """A symmetric preconditioner, S^T S for A^-1, in a form that needs no product with it in an iteration.

    Attributes:
      map: v -> S v, invertible and linear, into a tree of its own: S the inverse of the root of A's diagonal, or of
        the Cholesky factors of its diagonal blocks.
      matvec: w -> S A S^T w on that tree. Nothing is projected between two of these: where A has a null space, what
        this gives must lie off that of S A S^T to round-off, which it does where it is a symmetric matrix to round-off.
    """

    map: LinearMap
    matvec: LinearMap


@dataclasses.dataclass(frozen=True)
class Operator:
    """A square linear map on pytrees, what is known of it, and its null space.

    Attributes:
      matvec: v -> A v, both with the tree and shapes of the unknowns; linear in v, traceable.
      symmetric: A equals its transpose. Declared, not checked.
      positive_semidefinite: no direction has negative curvature; implies ``symmetric``.
      project: orthogonal projector off the right null space of A, a symmetric linear map; None where there is none.
        It must be complete: along a null direction left out, the answer is arbitrary where the right-hand side has
        next to nothing there, and the solve fails where it has more.
      left_project: the same for the left null space; ``project`` where None, which is right for a symmetric A.
      even: a change of unknowns that makes a symmetric A better conditioned; None for none. Krylov iterations then run
        on S A S^T; residuals are of A all the same.
    """

    matvec: LinearMap
    symmetric: bool = False
    positive_semidefinite: bool = False
    project: LinearMap | None = None
    left_project: LinearMap | None = None
    even: Evening | None = None

    def __post_init__(self) -> None:
        if self.positive_semidefinite and not self.symmetric:
            object.__setattr__(self, "symmetric", True)
        if self.even is not None and not self.symmetric:
            raise InputError(
                f"even={self.even!r} on an operator with symmetric=False; declare it symmetric, or leave it out"
            )
        if self.left_project is not None and self.left_project is not self.project:
            if self.symmetric:
                raise InputError(
                    f"left_project={self.left_project!r} differs from project on a symmetric operator, whose two null "
                    "spaces are one; leave left_project out, or declare symmetric=False"
                )
        else:
            object.__setattr__(self, "left_project", self.project)

    def transpose(self, example: PyTree) -> Operator:
        """The transposed operator; ``example`` is an array tree (or its shapes) like the unknowns."""
        if self.symmetric:
            return self
        transposed = jax.linear_transpose(self.matvec, example)
        return Operator(lambda w: transposed(w)[0], project=self.left_project, left_project=self.project)


def _check_rtol(name: str, rtol: float) -> None:
    if not (isinstance(rtol, int | float) and 0.0 < rtol < 1.0):
        raise InputError(f"{name}: rtol={rtol!r} is no relative residual; give a number between 0 and 1, such as 1e-10")


def _check_count(name: str, field: str, value: int | None) -> None:
    if value is not None and not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        raise InputError(f"{name}: {field}={value!r} is no count; give a whole number of at least 1")


@dataclasses.dataclass(frozen=True)
class _Iterative:
    rtol: float = 1e-10
    max_iterations: int | None = None

    def __post_init__(self) -> None:
        _check_rtol(type(self).__name__, self.rtol)
        _check_count(type(self).__name__, "max_iterations", self.max_iterations)


@dataclasses.dataclass(frozen=True)
class CG(_Iterative):
    """Conjugate gradients: the fastest where the operator is positive semi-definite; refuses any other.

    Args:
      rtol: relative residual asked for. Residual is not error, the condition number stands between: lower it to 1e-13
        near unjamming.
      max_iterations: operator applications; 10 times the number of unknowns, at least 1,000, where None.
      degree: of the polynomial of the operator that preconditions, see :func:`mdsens.implicit._krylov.chebyshev`. One
        is none: it saves inner products, not applications.
    """

    degree: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("CG", "degree", self.degree)


@dataclasses.dataclass(frozen=True)
class MINRES(_Iterative):
    """Minimal residuals on the Lanczos recurrence: for a symmetric operator that may be indefinite.

    Args:
      rtol: relative residual asked for, as in :class:`CG`.
      max_iterations: operator applications; 10 times the number of unknowns, at least 1,000, where None.
    """


@dataclasses.dataclass(frozen=True)
class BiCGSTAB(_Iterative):
    """Stabilised bi-conjugate gradients: any operator, little memory, but it may break down; GMRES where it does.

    Args:
      rtol: relative residual asked for, as in :class:`CG`.
      max_iterations: operator applications (two a step); 10 times the number of unknowns, at least 1,000, where None.
    """


@dataclasses.dataclass(frozen=True)
class GMRES(_Iterative):
    """Generalised minimal residuals, restarted: any operator, on any device.

    Args:
      rtol: relative residual asked for, as in :class:`CG`.
      max_iterations: operator applications; 10 times the number of unknowns, at least 1,000, where None.
      restart: length of a cycle. Memory is (restart + 1) vectors; raise it where the status is STAGNATED, lower it
        where memory runs out.
      degree: of the polynomial of the operator that preconditions, see :func:`mdsens.implicit._krylov.chebyshev`, for
        an operator declared positive semi-definite; one is none, and what any other gets. A cycle then reaches over
        ``restart * degree`` applications, of which it orthogonalises one in ``degree``: near jamming, where restarts
        stagnate, that is the difference between an answer and none.
    """

    restart: int = 200
    degree: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("GMRES", "restart", self.restart)
        _check_count("GMRES", "degree", self.degree)


@dataclasses.dataclass(frozen=True)
class Direct:
    """A dense factorisation: the operator is written out as a matrix, so up to some thousand unknowns.

    Cholesky where positive semi-definite, LU where not, of ``P A P + s (I - P)``; singular values where left and right
    null space differ.

    Args:
      rtol: relative residual that makes the status good; refinement aims at it.
    """

    rtol: float = 1e-10

    def __post_init__(self) -> None:
        _check_rtol("Direct", self.rtol)


@dataclasses.dataclass(frozen=True)
class Auto:
    """Let :func:`choose` pick by size, symmetry, definiteness and number of right-hand sides.

    For a law of pairs, :mod:`mdsens.sensitivity` takes the sparse factor of the Hessian instead, on a CPU, in double
    precision and up to 1,500 particles in 3-D, 4,000 for many right-hand sides at once. Both rest on the times and
    errors of every solver in benchmarks/results/README.md, under "sensitivity" (by size and density) and "jamming" (by
    pressure).

    Args:
      rtol: relative residual asked for, as in :class:`CG`.
    """

    rtol: float = 1e-10

    def __post_init__(self) -> None:
        _check_rtol("Auto", self.rtol)


Method: TypeAlias = GMRES | CG | MINRES | BiCGSTAB | Direct | Auto

# Measured on spring networks of 5.6 bonds a particle in 2-D, two cores: at 512 unknowns Direct takes 13 ms, 10 of them
# to write the matrix out, and each further right-hand side next to nothing; CG 1.6 ms for one, 90 for 32, and in
# proportion to the root of the condition number; GMRES 9 ms. So up to here the choice is accuracy: the residual of
# Direct is 4e-15 whatever the condition number. At 1,024 they cross near 64 right-hand sides.
_DIRECT_SIZE, _DIRECT_SIZE_SHARED, _UNKNOWNS_PER_RHS = 512, 2048, 16
# Of the tolerance, in evened unknowns, since |S r| may fall under |r|.
_EVEN_SHARE = 0.5


def choose(method: Method, size: int, operator: Operator, rhs: int = 1) -> Method:
    """The concrete method that ``method`` stands for.

    Args:
      method: any option record; all but :class:`Auto` come back as they are.
      size: number of unknowns.
      operator: its declared symmetry and definiteness count, nothing is evaluated.
      rhs: right-hand sides that will share one factorisation.

    Returns:
      Direct up to 512 unknowns, up to 2,048 where at least one right-hand side for 16 unknowns shares the factor;
      beyond, CG, MINRES or GMRES by what the operator declares.
    """
    if not isinstance(method, Auto):
        return method
    if size <= (_DIRECT_SIZE_SHARED if rhs * _UNKNOWNS_PER_RHS >= size else _DIRECT_SIZE):
        return Direct(rtol=method.rtol)
    if operator.positive_semidefinite:
        return CG(rtol=method.rtol)
    return MINRES(rtol=method.rtol) if operator.symmetric else GMRES(rtol=method.rtol)


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
