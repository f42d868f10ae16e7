"""The base of every linear method: a frozen record of options that knows its own iteration.

Adding a method is adding one class, in one file: its options as fields, checked when it is made,
and :meth:`Method.iteration`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from mdsens._util.errors import InputError, short
from mdsens.implicit.linear._vectors import Apply, Iterate, norm, safe_divide
from mdsens.implicit.linear.operator import Operator
from mdsens.implicit.linear.result import Result

__all__ = [
    "IterativeMethod",
    "Method",
    "Round",
    "check_count",
    "check_method",
    "check_rtol",
    "projected",
    "refine",
    "same",
]

Round: TypeAlias = Callable[[Array, Array, Array], Iterate]


# Of the tolerance, in scaled unknowns, since |S r| may fall under |r|.
SCALED_SHARE = 0.5


class Method(abc.ABC):
    """A linear method: its options, and its iteration on flat vectors.

    A solve is done in rounds. In each the right-hand side is what is left of it, scaled to norm
    one; the residual is then recomputed from the operator.

    Attributes:
      rtol: relative residual asked for.
      rounds: how many at most.
      gain: a round must leave less than this part of the residual, or it is the last one.
      scalable: whether the iteration runs on S A S^T where the operator has a scaling S.
    """

    rtol: float
    rounds: ClassVar[int] = 4
    gain: ClassVar[float] = 0.5  # a repeated solve should gain digits
    scalable: ClassVar[bool] = False

    @abc.abstractmethod
    def iteration(self, operator: Operator, b: Array) -> tuple[Round, int]:
        """The solver of one round, ``(r, tol, limit) -> (x, applications, result)``, and the
        applications of the operator that setting it up takes.

        Args:
          operator: its maps take and give arrays (n,).
          b: the first right-hand side, for its size and type.
        """

    def check(self, operator: Operator) -> None:  # noqa: B027 - most methods take any operator
        """Raise InputError for an operator that the method gives wrong answers for."""

    def concrete(self, size: int, operator: Operator) -> Method:
        """The method that this one stands for, of an operator on ``size`` unknowns."""
        return self

    def limit(self, size: int) -> int:
        """Applications of the operator at most."""
        return 2**31 - 1

    def run(self, operator: Operator, b: Array) -> tuple[Array, Array, Array, Array]:
        """(x, residual, applications, result) of P A P x = b for b of norm one in its range."""
        return refine(self, operator, b)


def check_method(solve: Any) -> None:
    """Refuse what is no option record of a linear solver."""
    if not isinstance(solve, Method):
        is_class = isinstance(solve, type)
        value = f"the class {solve.__name__}, without brackets" if is_class else short(solve)
        raise InputError(
            f"solve is {value}: give Auto(), Direct(), CG(), MINRES(), GMRES(), BiCGSTAB(),"
            " NormalCG(), Neumann() or LeastSquares() of mdsens.implicit."
        )


def check_rtol(name: str, rtol: float) -> None:
    """Raise InputError unless ``rtol`` is between 0 and 1."""
    if not (isinstance(rtol, int | float) and 0.0 < rtol < 1.0):
        raise InputError(
            f"{name}: rtol={rtol!r} is no relative residual; give a number between 0 and 1, such as"
            " 1e-10"
        )


def check_count(name: str, field: str, value: int | None) -> None:
    """Raise InputError unless ``value`` is None or a positive whole number."""
    if value is not None and not (
        isinstance(value, int) and not isinstance(value, bool) and value >= 1
    ):
        raise InputError(
            f"{name}: {field}={value!r} is no count; give a whole number of at least 1"
        )


@dataclasses.dataclass(frozen=True)
class IterativeMethod(Method):
    """A method that takes some number of applications of the operator.

    Attributes:
      rtol: relative residual asked for.
      max_iterations: operator applications; 10 times the number of unknowns, at least 1,000, where
        None.
    """

    rtol: float = 1e-10
    max_iterations: int | None = None

    def __post_init__(self) -> None:
        check_rtol(type(self).__name__, self.rtol)
        check_count(type(self).__name__, "max_iterations", self.max_iterations)

    def limit(self, size: int) -> int:
        return self.max_iterations or max(1000, 10 * size)


def same(v: Array) -> Array:
    """The identity, where an operator has no projector."""
    return v


def projected(operator: Operator, both: bool = False) -> tuple[Apply, Apply | None]:
    """P_L A P_R and P_R M, on vectors that P_L leaves as they are, or on any where ``both``."""
    right, left = operator.project or same, operator.left_project or same
    # What an iteration on a symmetric operator applies it to is a sum of projected vectors: one
    # projection is enough.
    inside = right if both or not operator.symmetric else same
    precondition = operator.preconditioner

    def apply(v: Array) -> Array:
        return left(operator.matvec(inside(v)))

    return apply, None if precondition is None else lambda r: right(precondition(r))


def refine(method: Method, operator: Operator, b: Array) -> tuple[Array, Array, Array, Array]:
    """Solve, recompute the residual from the operator, solve for it again while that helps.

    A round of GMRES is one cycle, so its restarts are these rounds, without a bound; the other
    iterations get three more, a factorization, whose rounds cost next to nothing, seven.
    """
    eps = jnp.finfo(b.dtype).eps
    limit = jnp.int32(method.limit(b.size))
    off_right, left = operator.project or same, operator.left_project
    scaled = method.scalable and operator.scaling is not None
    inner, setup = (_scaled(method, operator, b), 0) if scaled else method.iteration(operator, b)

    def going(state: tuple[Array, ...]) -> Array:
        _, _, size, k, turn, more, _ = state
        return more & (size > method.rtol) & (turn < method.rounds) & (k < limit)

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
        more = better & (size_new < method.gain * size) & (ended != Result.INDEFINITE)
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


def _scaled(method: Method, operator: Operator, b: Array) -> Round:
    """The iteration on S A S^T w = S r, x = S^T w, with the operator's scaling S."""
    scaling = operator.scaling
    assert scaling is not None
    back = jax.linear_transpose(scaling.map, b)
    scaled = Operator(scaling.matvec, operator.symmetric, operator.positive_semidefinite)
    inside, _ = method.iteration(scaled, b)

    def inner(r: Array, tol: Array, limit: Array) -> Iterate:
        side = scaling.map(r)
        size = norm(side)
        w, k, ended = inside(safe_divide(side, size), SCALED_SHARE * tol, limit)
        return back(w)[0] * size, k, ended

    return inner
