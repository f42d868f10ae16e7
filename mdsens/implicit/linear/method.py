"""The base classes of all methods that solve a linear system A x = b.

To add such a method, write one class in a new file, derived from :class:`Method`. The options of
the method are fields of this frozen dataclass, validated in ``__post_init__``, and the function
:meth:`Method.iteration` is the algorithm.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from mdsens._util.errors import InputError, short
from mdsens._util.validation import check_count, is_number
from mdsens.implicit.linear.operator import Operator
from mdsens.implicit.linear.result import Result
from mdsens.implicit.linear.vectors import Apply, Iterate, norm, safe_divide

__all__ = [
    "IterativeMethod",
    "Method",
    "Round",
    "check_method",
    "check_rtol",
    "projected",
    "refine",
    "same",
]

# Solver of one round of the refinement, (r, tol, limit) -> (x, applications, result).
Round: TypeAlias = Callable[[Array, Array, Array], Iterate]

# Part of the tolerance that is asked for in scaled unknowns, since |S r| may be smaller than |r|.
SCALED_SHARE = 0.5


class Method(abc.ABC):
    """A method that solves a linear system A x = b: its options, and its iteration on flat vectors.

    A solve takes several rounds of iterative refinement. Each round solves for the residual that
    the round before has left, scaled to norm one; then the residual is recomputed with A.

    Attributes:
      rtol: requested relative residual.
      rounds: largest number of rounds of refinement.
      gain: the refinement ends after a round that leaves more than this fraction of the residual.
      scalable: whether the iteration runs on S A S^T where A has a scaling S, see
        :class:`SymmetricScaling`.
    """

    rtol: float
    rounds: ClassVar[int] = 4
    gain: ClassVar[float] = 0.5  # a repeated solve should gain digits
    scalable: ClassVar[bool] = False

    @abc.abstractmethod
    def iteration(self, operator: Operator, b: Array) -> tuple[Round, int]:
        """Return a function that solves A x = r for one round of iterative refinement.

        In each round, r is the residual that the round before has left. The number of products with
        A that are needed to make this function is returned, too.

        Args:
          operator: A, as an operator whose functions map arrays (n,) to arrays (n,).
          b: the first right-hand side (n,), which gives size and type.

        Returns:
          the function ``(r, tol, limit) -> (x, applications, result)``, and the number of products.
          tol is the norm of the residual at which to stop, limit the largest number of products
          with A, applications the number of products with A that were taken, and result a
          :class:`Result` code.
        """

    def check(self, operator: Operator) -> None:  # noqa: B027 - most methods take any operator
        """Raise InputError where this method gives wrong solutions of A x = b for an operator A."""

    def concrete(self, size: int, operator: Operator) -> Method:
        """Return the method that solves A x = b for an operator A on ``size`` unknowns.

        A method returns itself, except for :class:`Auto`, which chooses one.
        """
        return self

    def limit(self, size: int) -> int:
        """Return the largest number of products with A that a solve of A x = b may take.

        ``size`` is the number of unknowns.
        """
        return 2**31 - 1  # the largest int32, the type in which products are counted

    def run(self, operator: Operator, b: Array) -> tuple[Array, Array, Array, Array]:
        """Solve P A P x = b for a right-hand side b of norm one in the range of P.

        P is the projector that removes the null space of A.

        Returns:
          (x, norm of the residual, number of products with A, :class:`Result` code).
        """
        return refine(self, operator, b)


def check_method(solve: object) -> None:
    """Raise InputError unless ``solve`` is a method for linear systems, such as CG()."""
    if not isinstance(solve, Method):
        is_class = isinstance(solve, type)
        value = f"{solve.__name__} (a class, without brackets)" if is_class else short(solve)
        raise InputError(
            f"solve={value} is not a linear method; give Auto(), Direct(), CG(), MINRES(),"
            " GMRES(), BiCGSTAB(), NormalCG(), Neumann() or LeastSquares() of mdsens.implicit."
        )


def check_rtol(name: str, rtol: float) -> None:
    """Raise InputError unless the relative residual ``rtol`` is between 0 and 1.

    ``name`` is the name of the linear method that has this option.
    """
    if not (is_number(rtol) and 0.0 < rtol < 1.0):
        raise InputError(
            f"{name}: rtol={rtol!r} is not a relative residual; give a number between 0 and 1, such"
            " as 1e-10"
        )


@dataclasses.dataclass(frozen=True)
class IterativeMethod(Method):
    """Base class of the iterative methods for A x = b, which stop at a relative residual.

    The number of products with A that a solve takes is not known in advance.

    Attributes:
      rtol: requested relative residual.
      max_iterations: largest number of products with A; where None, 10 times the number of
        unknowns, at least 1,000.
    """

    rtol: float = 1e-10
    max_iterations: int | None = None

    def __post_init__(self) -> None:
        check_rtol(type(self).__name__, self.rtol)
        check_count(type(self).__name__, "max_iterations", self.max_iterations)

    def limit(self, size: int) -> int:
        return self.max_iterations or max(1000, 10 * size)


def same(v: Array) -> Array:
    """Return the vector v unchanged: the projector for an operator that has no null space."""
    return v


def projected(operator: Operator, both: bool = False) -> tuple[Apply, Apply | None]:
    """Return the products with P_L A P_R, and with P_R M where there is a preconditioner M.

    P_R and P_L are the projectors that remove the right and the left null space of the operator A.

    Args:
      operator: A, with its projectors and its preconditioner.
      both: whether the products must be right for any vector; else only for vectors that are
        projected already.

    Returns:
      two functions, v -> P_L A P_R v and r -> P_R M r; the second is None where there is no M.
    """
    right = operator.project or same
    left = operator.left_project or same
    # For a symmetric operator P_L and P_R are equal, and an iteration applies it only to sums of
    # projected vectors: the projection on the right changes nothing.
    inside = right if both or not operator.symmetric else same
    precondition = operator.preconditioner

    def apply(v: Array) -> Array:
        return left(operator.matvec(inside(v)))

    return apply, None if precondition is None else lambda r: right(precondition(r))


def refine(method: Method, operator: Operator, b: Array) -> tuple[Array, Array, Array, Array]:
    """Solve P A P x = b by iterative refinement, with P the projector off the null space of A.

    After each solve the residual is recomputed with A, and the next round solves for this residual.
    The rounds end where the last one has left more than the fraction ``method.gain`` of the
    residual. For GMRES a round is one cycle, so that its restarts are the rounds, without a limit
    to their number. The other iterations have up to three more rounds after the first, and a
    factorization, whose rounds cost next to nothing, has up to seven.

    Returns:
      (x, norm of the residual, number of products with A, :class:`Result` code).
    """
    eps = jnp.finfo(b.dtype).eps
    limit = jnp.int32(method.limit(b.size))
    project = operator.project or same
    left = operator.left_project
    if method.scalable and operator.scaling is not None:
        inner = _scaled(method, operator, b)
        setup = 0
    else:
        inner, setup = method.iteration(operator, b)

    def going(state: tuple[Array, ...]) -> Array:
        _, _, size, k, turn, more, _ = state
        return more & (size > method.rtol) & (turn < method.rounds) & (k < limit)

    def body(state: tuple[Array, ...]) -> tuple[Array, ...]:
        x, r, size, k, turn, _, _ = state
        unit = jnp.where(size > 0, size, 1)
        # A tenth below the target: the residual that the recursion of an iteration carries drifts
        # from the true one, and a residual slightly above the target costs another round.
        tol = jnp.clip(0.9 * method.rtol / unit, eps, 0.9)
        step, used, ended = inner((r if left is None else left(r)) / unit, tol, limit - k)
        # a method may return integers of another type, such as the entries of Result
        used = jnp.asarray(used, jnp.int32)
        ended = jnp.asarray(ended, jnp.int32)
        x_new = project(x + size * step)
        # The residual is that of the operator without projectors: where these are not those of its
        # null space, it stays large.
        r_new = b - operator.matvec(x_new)
        size_new = norm(r_new)
        better = size_new < size
        more = better & (size_new < method.gain * size) & (ended != Result.INDEFINITE)
        ended = jnp.where(jnp.isfinite(size_new), ended, int(Result.NOT_FINITE))
        x = jnp.where(better, x_new, x)
        r = jnp.where(better, r_new, r)
        size = jnp.where(better, size_new, size)
        # The 1 is the product of the recomputed residual.
        return x, r, size, k + used + 1, turn + 1, more, ended

    zero = jnp.int32(0)
    # x, r, |r|, applications, rounds, whether another round may help, result
    start = (jnp.zeros_like(b), b, norm(b), zero, zero, jnp.asarray(True), zero)
    x, _, size, k, _, _, ended = lax.while_loop(going, body, start)
    # CONVERGED here is the last round's own opinion, or the start where no round was needed. Where
    # the true residual is small, ``solve_flat`` replaces the code by a good one.
    late = jnp.where(k >= limit, int(Result.MAX_STEPS_REACHED), int(Result.STAGNATED))
    return x, size, k + setup, jnp.where(ended == Result.CONVERGED, late, ended)


def _scaled(method: Method, operator: Operator, b: Array) -> Round:
    """Return a function that solves A x = r in scaled unknowns: S A S^T w = S r, x = S^T w.

    S is the scaling of the operator A. The function is called in each round of iterative
    refinement, with the residual r.
    """
    scaling = operator.scaling
    assert scaling is not None
    transposed_map = jax.linear_transpose(scaling.map, b)
    scaled = Operator(scaling.matvec, operator.symmetric, operator.positive_semidefinite)
    inside, _ = method.iteration(scaled, b)

    def inner(r: Array, tol: Array, limit: Array) -> Iterate:
        right_side = scaling.map(r)
        size = norm(right_side)
        w, k, ended = inside(safe_divide(right_side, size), SCALED_SHARE * tol, limit)
        # linear_transpose returns a tuple with one entry for each argument.
        return transposed_map(w)[0] * size, k, ended

    return inner
