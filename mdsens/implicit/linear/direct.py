"""Dense factorizations of an operator on its range, for up to some thousand unknowns."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jax import Array, lax
from jax.custom_batching import sequential_vmap

from mdsens._util.errors import InputError
from mdsens.implicit.linear._vectors import Apply, Iterate, dot
from mdsens.implicit.linear.method import Method, Round, check_rtol, projected
from mdsens.implicit.linear.operator import Operator
from mdsens.implicit.linear.result import Result

__all__ = ["Direct", "LeastSquares", "one_by_one"]


@dataclasses.dataclass(frozen=True)
class Direct(Method):
    """A dense factorization: the operator is written out as a matrix, so up to some thousand
    unknowns.

    Cholesky where positive semi-definite, LU where not, of ``P A P + s (I - P)``; singular values
    where left and right null space differ, or where LU meets a direction without stiffness that
    nobody declared: the statuses are then those of LeastSquares.

    Args:
      rtol: relative residual that makes the status good; refinement aims at it.
    """

    rtol: float = 1e-10

    def __post_init__(self) -> None:
        check_rtol("Direct", self.rtol)

    rounds: ClassVar[int] = 8  # each costs next to nothing

    def iteration(self, operator: Operator, b: Array) -> tuple[Round, int]:
        apply, _ = projected(operator, both=True)
        factored = factor(
            apply, operator.project, operator.left_project, operator.positive_semidefinite, b
        )
        return lambda r, tol, limit: factored(r), b.size


@dataclasses.dataclass(frozen=True)
class LeastSquares(Method):
    """The dense pseudo-inverse, for an operator that may be singular: the shortest of the x that
    make |b - A x| least.

    By singular values, or eigenvalues where the operator is symmetric: some ten times the work of
    Direct. NOT_UNIQUE where A is singular beyond the null space declared but has b in its range,
    and SINGULAR where b lies partly outside, so that the residual cannot vanish. Direct comes to it
    by itself where LU finds A singular to round-off; this one draws the line at ``rank_tolerance``,
    and for a positive semi-definite A, too.

    Args:
      rtol: relative residual that makes the status good.
      rank_tolerance: singular values up to this share of the largest count as zero; the number of
        unknowns times round-off where None. Raise it to the error of A's entries, where these come
        from an experiment or a solver.
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

    rounds: ClassVar[int] = 8  # each costs next to nothing

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


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """Under vmap on a CPU, the function on one member after the other.

    There jaxlib shares a batch of matrices out over a pool of threads and waits for them on a
    thread of that pool: two factorizations that run at the same time on two cores wait for ever
    (seen with 0.10.1).
    """
    in_sequence = sequential_vmap(function)

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        return (in_sequence if jax.default_backend() == "cpu" else function)(*arguments)

    return run


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
    """The lower factor of a positive semi-definite matrix; not finite where it has a negative
    direction.
    """
    n, eps = matrix.shape[0], float(jnp.finfo(matrix.dtype).eps)

    def raised(by: float) -> Array:
        return jnp.linalg.cholesky(
            matrix + by * jnp.where(largest > 0, largest, 1) * jnp.eye(n, dtype=matrix.dtype)
        )

    def semidefinite() -> Array:
        # Cholesky fails on a negative direction and, by round-off, on a null one that nobody
        # declared. Raised by the round-off of the factorization it fails on the first alone; raised
        # by sqrt(eps) it leaves little of the second in the answer, and refinement takes the raise
        # back out of the rest.
        probe = raised(n * eps)
        return jnp.where(jnp.all(jnp.isfinite(probe)), raised(eps**0.5), probe)

    lower = raised(0.0)
    return lax.cond(jnp.all(jnp.isfinite(lower)), lambda: lower, semidefinite)


def _written_out(apply: Apply, b: Array) -> Array:
    """The operator's matrix, by columns in chunks: all at once, a product's intermediate arrays
    would come n times.
    """
    return lax.map(apply, jnp.eye(b.size, dtype=b.dtype), batch_size=min(b.size, 32)).T


# Of the number of unknowns times round-off: a pivot below is looked at by singular values, which
# decide.
_SUSPECT = 1e3


def _by_lu(matrix: Array) -> Callable[[Array], Iterate]:
    """LU; where a pivot is next to nothing, a null direction that nobody declared perhaps, singular
    values.

    Their answer is then the shortest and the status NOT_UNIQUE, as of :func:`pseudo_inverse`, where
    LU would add any multiple of that direction and leave no trace of it in the residual.
    """
    n, eps = matrix.shape[0], float(jnp.finfo(matrix.dtype).eps)
    lu, pivots = _lu(matrix)
    sizes = jnp.abs(jnp.diagonal(lu))
    finite = jnp.all(jnp.isfinite(matrix))
    regular = jnp.all(jnp.isfinite(lu)) & (jnp.min(sizes) > _SUSPECT * n * eps * jnp.max(sizes))
    inverse, rank = _inverted(matrix, finite & ~regular)
    singular = jnp.where(rank < n, int(Result.NOT_UNIQUE), int(Result.CONVERGED))
    ended = jnp.where(
        regular, int(Result.CONVERGED), jnp.where(finite, singular, int(Result.NOT_FINITE))
    )

    def solution(r: Array) -> Iterate:
        x = jnp.where(regular, _lu_solve(lu, pivots, r), dot(r, inverse))
        return jnp.where(finite, x, 0), jnp.int32(0), ended.astype(jnp.int32)

    return solution


@one_by_one
def _inverted(matrix: Array, needed: Array) -> tuple[Array, Array]:
    """The transposed pseudo-inverse and the rank; zeros where not needed."""
    n, eps = matrix.shape[0], float(jnp.finfo(matrix.dtype).eps)

    def by_values() -> tuple[Array, Array]:
        left, sizes, rows = jnp.linalg.svd(matrix, full_matrices=False)
        kept = sizes > n * eps * jnp.max(sizes)
        return (left * jnp.where(kept, 1 / jnp.where(kept, sizes, 1), 0)) @ rows, jnp.sum(kept)

    return lax.cond(needed, by_values, lambda: (jnp.zeros_like(matrix), jnp.zeros((), int)))


def factor(
    apply: Apply, right: Apply | None, left: Apply | None, positive_semidefinite: bool, b: Array
) -> Callable[[Array], Iterate]:
    """A dense factorization of the operator on its range: r -> (x, 0 applications, status)."""
    n = b.size
    if right is not left:
        return pseudo_inverse(apply, right, False, False, b, None)
    matrix = _written_out(apply, b)
    largest = jnp.max(jnp.abs(matrix))
    if right is not None:
        matrix = matrix + jnp.where(largest > 0, largest, 1) * (
            jnp.eye(n, dtype=b.dtype) - _written_out(right, b)
        )
    none, fine = jnp.int32(0), jnp.int32(Result.CONVERGED)

    if not positive_semidefinite:
        return _by_lu(matrix)

    lower = _cholesky(matrix, largest)
    definite = jnp.all(jnp.isfinite(lower))
    negative = jnp.where(
        jnp.all(jnp.isfinite(matrix)), int(Result.INDEFINITE), int(Result.NOT_FINITE)
    )

    def by_cholesky(r: Array) -> Iterate:
        x = _cholesky_solve(lower, r)
        return jnp.where(definite, x, 0), none, jnp.where(definite, fine, negative)

    return by_cholesky


def pseudo_inverse(
    apply: Apply,
    right: Apply | None,
    symmetric: bool,
    definite: bool,
    b: Array,
    tolerance: float | None,
) -> Callable[[Array], Iterate]:
    """Least squares by singular values, or eigenvalues where symmetric: r -> (x, 0 applications,
    status).

    NOT_UNIQUE where more singular values than ``right`` projects off are at most ``tolerance``
    times the largest, the number of unknowns times round-off where None; INDEFINITE where
    ``definite`` and an eigenvalue is below minus that.
    """
    n, eps = b.size, float(jnp.finfo(b.dtype).eps)
    matrix = _written_out(apply, b)
    if symmetric:
        eigenvalues, right_vectors = _eigh(matrix)
        sizes, left_vectors = jnp.abs(eigenvalues), right_vectors
        smallest = jnp.min(eigenvalues)
        values = eigenvalues
    else:
        left_vectors, sizes, rows = _svd(matrix)
        right_vectors, values, smallest = rows.T, sizes, jnp.zeros((), b.dtype)
    zero = (n * eps if tolerance is None else tolerance) * jnp.max(sizes)
    kept = sizes > zero
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    rank = n if right is None else jnp.trace(_written_out(right, b))
    ended = jnp.where(jnp.sum(kept) < rank - 0.5, int(Result.NOT_UNIQUE), int(Result.CONVERGED))
    ended = jnp.where(definite & (smallest < -zero), int(Result.INDEFINITE), ended)
    ended = jnp.where(jnp.all(jnp.isfinite(sizes)), ended, int(Result.NOT_FINITE)).astype(jnp.int32)
    return lambda r: (dot(right_vectors, inverse * dot(r, left_vectors)), jnp.int32(0), ended)
