"""Dense factorizations of a linear operator off its null space, up to a few thousand unknowns."""

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
from mdsens._util.validation import is_number
from mdsens.implicit.linear.method import Method, Round, check_rtol, projected
from mdsens.implicit.linear.operator import Operator
from mdsens.implicit.linear.result import Result
from mdsens.implicit.linear.vectors import Apply, Iterate, dot

__all__ = ["Direct", "LeastSquares"]


@dataclasses.dataclass(frozen=True)
class Direct(Method):
    """The solution of A x = b by a dense factorization, for up to a few thousand unknowns.

    The operator A is written out as the matrix ``P A P + s (I - P)``, where the projector P removes
    the null space of A and s is the largest absolute entry of P A P. The matrix is factorized by
    Cholesky where A is declared positive semi-definite, else by LU. Where the left and right null
    spaces differ, or where LU finds a null direction that is not declared, singular values are
    used, and the statuses are those of :class:`LeastSquares`.

    Args:
      rtol: relative residual at which the status is good and the refinement stops.
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
    """The least-squares solution of A x = b by the dense pseudo-inverse, where A may be singular.

    Of all x that minimize |b - A x| the solution is the shortest. It is computed from singular
    values, or from eigenvalues where A is symmetric. This takes about ten times the work of
    :class:`Direct`.

    The status is NOT_UNIQUE where A is singular beyond the declared null space and b lies in the
    range of A. The status is SINGULAR where b lies partly outside of the range, so that the
    residual cannot vanish. :class:`Direct` gives the same solution and statuses where LU finds that
    A is singular to round-off. LeastSquares gives them for a positive semi-definite A as well, and
    ``rank_tolerance`` sets how small a singular value counts as zero.

    Args:
      rtol: relative residual at which the status is good.
      rank_tolerance: singular values up to this fraction of the largest count as zero; where None,
        the fraction is the number of unknowns times round-off. Where the entries of A come from an
        experiment or a solver, set ``rank_tolerance`` to the relative error of the entries.
    """

    rtol: float = 1e-10
    rank_tolerance: float | None = None

    def __post_init__(self) -> None:
        check_rtol("LeastSquares", self.rtol)
        share = self.rank_tolerance
        if share is not None and not (is_number(share) and 0.0 <= share < 1.0):
            raise InputError(
                f"LeastSquares: rank_tolerance={share!r} is not a fraction; give a number from 0 up"
                " to but not including 1, such as 1e-8"
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
      matrix: the matrix, (n, n).
      largest: the largest absolute entry of the matrix.
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
    # On a CPU one_by_one keeps this a branch; a batch under vmap would compute both sides.
    return lax.cond(jnp.all(jnp.isfinite(lower)), lambda: lower, semidefinite)


def _written_out(apply: Apply, b: Array) -> Array:
    """Compute the matrix (n, n) of the linear map ``apply`` on vectors like b (n,)."""
    # 32 columns at a time: with all at once, the intermediate arrays of a product would take n
    # times their memory.
    # The products are stacked as rows, hence the transpose.
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
      the function r -> (x, 0, result), where x solves the linear system of the matrix with the
      right-hand side r, 0 is the number of products that this takes, and result is a
      :class:`Result` code.
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
        # ``inverse`` is stored transposed, and is zero where the factors are used.
        x = jnp.where(regular, _lu_solve(lu, pivots, r), dot(r, inverse))
        return jnp.where(finite, x, 0), jnp.int32(0), ended.astype(jnp.int32)

    return solution


@one_by_one
@full_precision
def _inverted(matrix: Array, needed: Array) -> tuple[Array, Array]:
    """Compute the transposed pseudo-inverse and the rank of a matrix by singular values.

    Where the flag ``needed`` is False, nothing is computed, and both are returned as zeros.
    """
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
    """Factorize a linear operator A off its null space, and return a function that solves A x = r.

    Args:
      apply: the function v -> P_L A P_R v, with the projectors of ``left`` and ``right``.
      right, left: the projectors P_R and P_L that remove the right and the left null space; None
        where there is no null space. Where the two null spaces are equal, give the same object
        twice.
      positive_semidefinite: whether A is declared positive semi-definite.
      b: an array (n,) with the type of the right-hand sides.

    Returns:
      the function r -> (x, 0, result), where 0 is the number of products with A that a solve takes,
      and result is a :class:`Result` code.
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
    """Compute the pseudo-inverse of an operator A, and return a function that solves A x = r by it.

    The pseudo-inverse is computed by singular values, or by eigenvalues where A is symmetric. The
    result of a solve is NOT_UNIQUE where more singular values count as zero than the null space has
    dimensions. The result is INDEFINITE where A should be positive semi-definite (``definite``) and
    an eigenvalue is negative by more than the limit at which singular values count as zero.

    Args:
      apply: the function v -> P_L A P_R v; P_R and P_L remove the right and left null space of A.
      right: the projector P_R; None where there is no null space.
      symmetric: whether A is symmetric.
      definite: whether A should be positive semi-definite.
      b: an array (n,) with the type of the right-hand sides.
      tolerance: singular values up to this fraction of the largest count as zero; where None, the
        fraction is the number of unknowns times round-off.

    Returns:
      the function r -> (x, 0, result), where 0 is the number of products with A that a solve takes,
      and result is a :class:`Result` code.
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
    # The trace has round-off: 0.5 below is safely between two whole numbers.
    ended = jnp.where(jnp.sum(kept) < rank - 0.5, int(Result.NOT_UNIQUE), int(Result.CONVERGED))
    ended = jnp.where(definite & (smallest < -zero), int(Result.INDEFINITE), ended)
    ended = jnp.where(jnp.all(jnp.isfinite(sizes)), ended, int(Result.NOT_FINITE)).astype(jnp.int32)
    return lambda r: (dot(right_vectors, inverse * dot(r, left_vectors)), jnp.int32(0), ended)
