"""Dense factorizations of an operator on its range, for up to a few thousand unknowns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jax import Array, lax

from mdsens._util.batching import one_by_one
from mdsens._util.errors import InputError
from mdsens._util.precision import full_precision
from mdsens.implicit.linear._vectors import Apply, Iterate, dot
from mdsens.implicit.linear.method import Method, Round, check_rtol, projected
from mdsens.implicit.linear.operator import Operator
from mdsens.implicit.linear.result import Result

__all__ = ["Direct", "LeastSquares"]


@dataclasses.dataclass(frozen=True)
class Direct(Method):
    """A dense factorization, for up to a few thousand unknowns.

    The operator is written out as a matrix, ``P A P + s (I - P)`` with the projector P off the null
    space and s the largest entry. It is factorized by Cholesky where A is declared positive
    semi-definite, else by LU. Where the left and right null spaces differ, or where LU finds a null
    direction that is not declared, singular values are used, and the statuses are those of
    LeastSquares.

    Args:
      rtol: relative residual at which the status is good; refinement stops there.
    """

    rtol: float = 1e-10

    def __post_init__(self) -> None:
        check_rtol("Direct", self.rtol)

    rounds: ClassVar[int] = 8  # with a factor, each costs next to nothing

    def iteration(self, operator: Operator, b: Array) -> tuple[Round, int]:
        apply, _ = projected(operator, both=True)
        factored = factor(
            apply, operator.project, operator.left_project, operator.positive_semidefinite, b
        )
        return lambda r, tol, limit: factored(r), b.size


@dataclasses.dataclass(frozen=True)
class LeastSquares(Method):
    """The dense pseudo-inverse, for an operator that may be singular.

    It gives the shortest x of those that minimize |b - A x|, from singular values, or from
    eigenvalues where the operator is symmetric. This takes about ten times the work of Direct.

    The status is NOT_UNIQUE where A is singular beyond the declared null space and b lies in its
    range. It is SINGULAR where b lies partly outside of the range, so that the residual cannot
    vanish. Direct does the same where LU finds that A is singular to round-off. LeastSquares takes
    the limit ``rank_tolerance`` instead of round-off, and also for a positive semi-definite A.

    Args:
      rtol: relative residual at which the status is good.
      rank_tolerance: singular values up to this part of the largest count as zero; where None, the
        number of unknowns times round-off. Where the entries of A come from an experiment or a
        solver, set it to their relative error.
    """

    rtol: float = 1e-10
    rank_tolerance: float | None = None

    def __post_init__(self) -> None:
        check_rtol("LeastSquares", self.rtol)
        share = self.rank_tolerance
        if share is not None and not (isinstance(share, int | float) and 0.0 <= share < 1.0):
            raise InputError(
                f"LeastSquares: rank_tolerance={share!r} is no share; give a number from 0 to 1,"
                " such as 1e-8"
            )

    rounds: ClassVar[int] = 8  # with the pseudo-inverse, each costs next to nothing

    def iteration(self, operator: Operator, b: Array) -> tuple[Round, int]:
        apply, _ = projected(operator, both=True)
        inverse = pseudo_inverse(
            apply,
            operator.project,
            operator.symmetric,
            operator.positive_semidefinite,
            b,
            self.rank_tolerance,
        )
        return lambda r, tol, limit: inverse(r), b.size


@one_by_one
def _lu(matrix: Array) -> tuple[Array, Array]:
    return jsl.lu_factor(matrix)


@one_by_one
def _lu_solve(lu: Array, pivots: Array, r: Array) -> Array:
    return jsl.lu_solve((lu, pivots), r)


@one_by_one
def _svd(matrix: Array) -> tuple[Array, Array, Array]:
    return tuple(jnp.linalg.svd(matrix, full_matrices=False))


@one_by_one
def _eigh(matrix: Array) -> tuple[Array, Array]:
    return tuple(jnp.linalg.eigh(matrix))


@one_by_one
def _cholesky_solve(lower: Array, r: Array) -> Array:
    return jsl.cho_solve((lower, True), r)


@one_by_one
def _cholesky(matrix: Array, largest: Array) -> Array:
    """Compute the lower Cholesky factor of a positive semi-definite matrix.

    The factor is not finite where the matrix has a negative eigenvalue.

    Args:
      matrix: (n, n).
      largest: its largest entry.
    """
    n = matrix.shape[0]
    eps = float(jnp.finfo(matrix.dtype).eps)

    def shifted_factor(shift: float) -> Array:
        scale = jnp.where(largest > 0, largest, 1)
        return jnp.linalg.cholesky(matrix + shift * scale * jnp.eye(n, dtype=matrix.dtype))

    def semidefinite() -> Array:
        # Cholesky fails where there is a negative eigenvalue and, by round-off, where there is a
        # null direction that is not declared. With a shift by the round-off of the factorization it
        # fails only in the first case. With a shift by sqrt(eps) the null direction contributes
        # little to the solution, and refinement removes the error that the shift makes in the rest.
        probe = shifted_factor(n * eps)
        return jnp.where(jnp.all(jnp.isfinite(probe)), shifted_factor(eps**0.5), probe)

    lower = shifted_factor(0.0)
    return lax.cond(jnp.all(jnp.isfinite(lower)), lambda: lower, semidefinite)


def _written_out(apply: Apply, b: Array) -> Array:
    """Compute the matrix of the operator, (n, n)."""
    # 32 columns at a time: with all at once, the intermediate arrays of a product would take n
    # times their memory.
    return lax.map(apply, jnp.eye(b.size, dtype=b.dtype), batch_size=min(b.size, 32)).T


# Where a pivot of LU is below this many times n eps of the largest, the singular values decide
# whether the matrix is singular: a pivot may be larger than the smallest singular value.
_SUSPECT = 1e3


def _by_lu(matrix: Array) -> Callable[[Array], Iterate]:
    """Factorize a matrix by LU, or by singular values where it may be singular.

    A very small pivot may belong to a null direction that is not declared. LU would add an
    arbitrary multiple of that direction to the solution, which the residual does not show. Singular
    values give the shortest solution, with the result NOT_UNIQUE, as :func:`pseudo_inverse`.

    Returns:
      r -> (x, 0 applications, result).
    """
    n = matrix.shape[0]
    eps = float(jnp.finfo(matrix.dtype).eps)
    lu, pivots = _lu(matrix)
    sizes = jnp.abs(jnp.diagonal(lu))
    finite = jnp.all(jnp.isfinite(matrix))
    regular = jnp.all(jnp.isfinite(lu)) & (jnp.min(sizes) > _SUSPECT * n * eps * jnp.max(sizes))
    inverse, rank = _inverted(matrix, finite & ~regular)
    ended = jnp.where(rank < n, int(Result.NOT_UNIQUE), int(Result.CONVERGED))
    ended = jnp.where(finite, ended, int(Result.NOT_FINITE))
    ended = jnp.where(regular, int(Result.CONVERGED), ended)

    def solution(r: Array) -> Iterate:
        x = jnp.where(regular, _lu_solve(lu, pivots, r), dot(r, inverse))
        return jnp.where(finite, x, 0), jnp.int32(0), ended.astype(jnp.int32)

    return solution


@one_by_one
@full_precision
def _inverted(matrix: Array, needed: Array) -> tuple[Array, Array]:
    """Compute the transposed pseudo-inverse and the rank of a matrix; zeros where not needed."""
    n = matrix.shape[0]
    eps = float(jnp.finfo(matrix.dtype).eps)

    def by_values() -> tuple[Array, Array]:
        left, sizes, rows = jnp.linalg.svd(matrix, full_matrices=False)
        # the threshold of numpy.linalg.matrix_rank
        kept = sizes > n * eps * jnp.max(sizes)
        return (left * jnp.where(kept, 1 / jnp.where(kept, sizes, 1), 0)) @ rows, jnp.sum(kept)

    return lax.cond(needed, by_values, lambda: (jnp.zeros_like(matrix), jnp.zeros((), int)))


def factor(
    apply: Apply, right: Apply | None, left: Apply | None, positive_semidefinite: bool, b: Array
) -> Callable[[Array], Iterate]:
    """Factorize the operator on its range.

    Args:
      apply: v -> P_L A P_R v.
      right, left: projectors off the null spaces; None where there are none. The same object where
        the null spaces are equal.
      positive_semidefinite: whether A is declared so.
      b: an array (n,) with the type of the right-hand sides.

    Returns:
      r -> (x, 0 applications, result).
    """
    n = b.size
    if right is not left:
        return pseudo_inverse(apply, right, False, False, b, None)
    matrix = _written_out(apply, b)
    largest = jnp.max(jnp.abs(matrix))
    if right is not None:
        # The null space gets the stiffness ``largest``, so that the matrix is regular.
        matrix = matrix + jnp.where(largest > 0, largest, 1) * (
            jnp.eye(n, dtype=b.dtype) - _written_out(right, b)
        )
    if not positive_semidefinite:
        return _by_lu(matrix)

    lower = _cholesky(matrix, largest)
    definite = jnp.all(jnp.isfinite(lower))
    finite = jnp.all(jnp.isfinite(matrix))
    failure = jnp.where(finite, int(Result.INDEFINITE), int(Result.NOT_FINITE))

    def by_cholesky(r: Array) -> Iterate:
        x = _cholesky_solve(lower, r)
        ended = jnp.where(definite, jnp.int32(Result.CONVERGED), failure)
        return jnp.where(definite, x, 0), jnp.int32(0), ended

    return by_cholesky


def pseudo_inverse(
    apply: Apply,
    right: Apply | None,
    symmetric: bool,
    definite: bool,
    b: Array,
    tolerance: float | None,
) -> Callable[[Array], Iterate]:
    """Compute the pseudo-inverse by singular values, or by eigenvalues where A is symmetric.

    The result is NOT_UNIQUE where more singular values than ``right`` projects off are at most
    ``tolerance`` times the largest. It is INDEFINITE where A should be positive semi-definite
    (``definite``) and an eigenvalue is below minus that.

    Args:
      apply: v -> P_L A P_R v.
      right: projector off the right null space; None where there is none.
      symmetric: whether A is symmetric.
      definite: whether A should be positive semi-definite.
      b: an array (n,) with the type of the right-hand sides.
      tolerance: singular values up to this part of the largest count as zero; where None, the
        number of unknowns times round-off.

    Returns:
      r -> (x, 0 applications, result).
    """
    n = b.size
    eps = float(jnp.finfo(b.dtype).eps)
    matrix = _written_out(apply, b)
    if symmetric:
        values, right_vectors = _eigh(matrix)
        left_vectors = right_vectors
        sizes = jnp.abs(values)
        smallest = jnp.min(values)
    else:
        left_vectors, sizes, rows = _svd(matrix)
        right_vectors = rows.T
        values = sizes
        smallest = jnp.zeros((), b.dtype)
    zero = (n * eps if tolerance is None else tolerance) * jnp.max(sizes)
    kept = sizes > zero
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    # the trace of a projector is its rank
    rank = n if right is None else jnp.trace(_written_out(right, b))
    ended = jnp.where(jnp.sum(kept) < rank - 0.5, int(Result.NOT_UNIQUE), int(Result.CONVERGED))
    ended = jnp.where(definite & (smallest < -zero), int(Result.INDEFINITE), ended)
    ended = jnp.where(jnp.all(jnp.isfinite(sizes)), ended, int(Result.NOT_FINITE)).astype(jnp.int32)
    return lambda r: (dot(right_vectors, inverse * dot(r, left_vectors)), jnp.int32(0), ended)
