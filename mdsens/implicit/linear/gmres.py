"""Generalized minimal residuals with restarts, for linear systems with any operator."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap

from mdsens._util.validation import check_count
from mdsens.implicit.linear._chebyshev import smoothed
from mdsens.implicit.linear.method import IterativeMethod, Round, projected
from mdsens.implicit.linear.operator import Operator
from mdsens.implicit.linear.result import Result
from mdsens.implicit.linear.vectors import (
    CURVATURE_UNITS,
    Apply,
    Iterate,
    Pivot,
    dot,
    int32,
    next_pivot,
    norm,
    safe_divide,
)

__all__ = ["GMRES", "gmres_cycle"]

# Number of basis vectors that a vector is orthogonalized against at a time. Only blocks that are
# filled are read, which halved the time at 16,384 particles.
BLOCK = 16


@dataclasses.dataclass(frozen=True)
class GMRES(IterativeMethod):
    """Generalized minimal residuals with restarts, for A x = b with any operator A, on any device.

    Args:
      rtol: requested relative residual.
      max_iterations: largest number of products with A; where None, 10 times the number of
        unknowns, at least 1,000.
      restart: number of steps of a cycle. A cycle takes the memory of (restart + 1) vectors; raise
        the number where the status is STAGNATED, lower it where memory runs out.
      degree: degree of the polynomial preconditioner, see
        :func:`mdsens.implicit.linear._chebyshev.chebyshev`; 1 for no preconditioner. The
        polynomial is used only where A is declared positive semi-definite. A cycle then extends
        over ``restart * degree`` products with A, and only one in ``degree`` products makes a
        vector to orthogonalize. Near jamming, where restarts stagnate, GMRES converges only with
        the polynomial.
    """

    restart: int = 200
    degree: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("GMRES", "restart", self.restart)
        check_count("GMRES", "degree", self.degree)

    scalable: ClassVar[bool] = True
    # A round of the refinement is one cycle, so that restarts are rounds, without a limit to their
    # number. After a cycle that gains less than a thousandth, thousands more would be needed.
    rounds: ClassVar[int] = 2**31 - 1
    gain: ClassVar[float] = 0.999

    def iteration(self, operator: Operator, b: Array) -> tuple[Round, int]:
        apply, precondition = projected(operator)
        definite = operator.positive_semidefinite
        restart = self.restart
        if definite and self.degree > 1 and precondition is None:
            cycle = functools.partial(gmres_cycle, restart=restart, definite=True)
            return smoothed(cycle, apply, self.degree, b), 0

        def cycle_of(r: Array, tol: Array, limit: Array) -> Iterate:
            return gmres_cycle(apply, r, tol, limit, restart, definite, precondition)

        return cycle_of, 0


def gmres_cycle(
    apply: Apply,
    b: Array,
    tol: Array,
    limit: Array,
    restart: int,
    definite: bool = False,
    precondition: Apply | None = None,
) -> Iterate:
    """Run one cycle of GMRES (Saad and Schultz, 1986) for A x = b.

    The cycle minimizes |b - A x| over a Krylov space of dimension ``restart`` at most. The cycle
    ends early where the residual is at ``tol``, or where the Krylov space is invariant, and takes
    the memory of (restart + 1) n numbers.

    Where A should be symmetric and positive semi-definite (``definite``), the Hessenberg matrix is
    the Lanczos matrix of A, and the result is INDEFINITE as soon as this matrix proves a negative
    curvature. With a preconditioner only the curvatures along the basis vectors are tested, so that
    a negative curvature may be missed.

    Arnoldi's vectors are orthogonalized by two passes of Gram-Schmidt, which is as good as
    Householder. Gram-Schmidt is classical within blocks of vectors and modified between blocks, so
    that a step reads only the part of the basis that is filled. For a symmetric A nearly all of a
    product A v lies along the last two vectors, so that the first pass takes these two only. The
    Hessenberg matrix is reduced by Givens rotations. The product of the rotations is kept as one
    matrix ``q``, so that a step takes one product and no loop over the rotations.

    Args:
      apply: the function v -> A v.
      b: right-hand side (n,).
      tol: norm of the residual at which to stop.
      limit: largest number of products with A.
      restart: largest number of steps of the cycle.
      definite: whether A should be symmetric and positive semi-definite.
      precondition: the function v -> M v of a preconditioner M, applied from the right (A M); None
        for none.

    Returns:
      (x, number of products with A, :class:`Result` code).
    """
    eps = jnp.finfo(b.dtype).eps
    m = min(restart, b.size)
    index = jnp.arange(m + 1)
    lanczos = definite and precondition is None
    change = precondition or (lambda v: v)

    def going(state: tuple[Any, ...]) -> Array:
        j, done = state[4], state[6]
        return (j < m) & _any(~done)

    def body(state: tuple[Any, ...]) -> tuple[Any, ...]:
        basis, r, q, g, j, used, done, pivot, beta, size, scale, status = state
        v = change(basis[j])
        w = product = apply(v)
        length = norm(w)
        w, h = _off_last_two(w, basis, j) if lanczos else _orthogonal(w, basis, j)
        w, again = _orthogonal(w, basis, j)
        # The basis is padded to whole blocks; the components along its empty rows are zero.
        h, again = h[: m + 1], again[: m + 1]
        beyond = norm(w)
        # written with ~ so that NaN counts as invariant and ends the cycle
        invariant = ~(beyond > 8 * eps * length)
        beyond = jnp.where(invariant, 0, beyond)
        alpha = h[j] + again[j]
        size = jnp.where(done, size, jnp.sqrt(size**2 + alpha**2 + beta**2 + beyond**2))
        # The basis is built from the residual. As the residual falls, the relative size of its
        # round-off, which may lie in the null space, grows as |b| over the residual. The limit for
        # a negative curvature grows with it, since round-off proves nothing.
        lost = safe_divide(norm(b), jnp.abs(g[j]))
        pivot, negative = next_pivot(alpha, beta, pivot, size * lost)
        if not lanczos:
            # The limit is relative to the largest |A v| / |v| so far: where v is round-off, so is
            # its product, whose own norm would be too small a scale.
            scale = jnp.where(done, scale, jnp.maximum(scale, safe_divide(length, norm(v))))
            negative = dot(v, product) < -CURVATURE_UNITS * eps * lost * scale * dot(v, v)
        status = jnp.where(negative & definite & ~done, int32(Result.INDEFINITE), status)
        beta = beyond
        column = dot(q, h + again + jnp.where(index == j + 1, beyond, 0))
        rho = jnp.hypot(column[j], column[j + 1])
        # rho = 0 happens only for a singular operator: this direction does not reduce the residual.
        # It gets no rotation and no column of r (r is stored transposed, so a row), and nor does a
        # member of a batch that is done. Only slices are written, since a where over whole arrays
        # would copy them.
        useless = rho <= 8 * eps * length
        idle = done | useless
        c = jnp.where(idle, 1, safe_divide(column[j], rho))
        s = jnp.where(idle, 0, safe_divide(column[j + 1], rho))
        q = _write(q, jnp.stack([c * q[j] + s * q[j + 1], -s * q[j] + c * q[j + 1]]), j)
        g = _write(g, jnp.stack([c * g[j], -s * g[j]]), j)
        upper = jnp.where(index < j, column, 0) + jnp.where(index == j, rho, 0)
        r = _write(r, jnp.where(idle, r[j], upper[:m])[None], j)
        basis = _write(basis, jnp.where(idle, 0, safe_divide(w, beyond))[None], j + 1)
        used = jnp.where(idle, used, j + 1)
        done = (
            idle
            | invariant
            | ~(jnp.abs(g[j + 1]) > tol)
            | (j + 1 >= limit)
            | (status != Result.CONVERGED)
        )
        return basis, r, q, g, j + 1, used, done, pivot, beta, size, scale, status

    size = norm(b)
    rows = BLOCK * (m // BLOCK + 1)
    basis = jnp.zeros((rows, b.size), b.dtype).at[0].set(safe_divide(b, size))
    g = jnp.zeros(m + 1, b.dtype).at[0].set(size)
    idle = ~(size > tol) | (limit < 1)
    zero = jnp.zeros((), b.dtype)
    # r starts as the identity, so that it is regular also where the cycle ends early
    r = jnp.eye(m, dtype=b.dtype)
    q = jnp.eye(m + 1, dtype=b.dtype)
    pivot = Pivot(zero, zero)
    # basis, r, q, g, j, used, done, pivot, beta, size, scale, status
    start = (basis, r, q, g, int32(0), int32(0), idle, pivot, zero, zero, zero, int32(0))
    basis, r, _, g, _, used, _, _, _, _, _, status = lax.while_loop(going, body, start)
    # r.T is the upper triangular matrix. Rows beyond ``used`` are those of the identity, with a
    # right-hand side of zero.
    y = jax.scipy.linalg.solve_triangular(r.T, jnp.where(jnp.arange(m) < used, g[:m], 0))
    return change(dot(y, basis[:m])), used, status


def _orthogonal(w: Array, basis: Array, j: Array) -> tuple[Array, Array]:
    """Orthogonalize the vector w against the orthonormal rows of ``basis`` up to row j.

    Returns:
      the orthogonal part of w, and the components of w along all rows.
    """

    def against(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        w, h = carry
        block = lax.dynamic_slice_in_dim(basis, i * BLOCK, BLOCK)
        along = dot(block, w)
        return w - dot(along, block), lax.dynamic_update_slice_in_dim(h, along, i * BLOCK, 0)

    return lax.fori_loop(0, j // BLOCK + 1, against, (w, jnp.zeros(basis.shape[0], basis.dtype)))


def _off_last_two(w: Array, basis: Array, j: Array) -> tuple[Array, Array]:
    """Orthogonalize the vector w against rows j and j - 1 of ``basis``, whose rows are orthonormal.

    Returns:
      the orthogonal part of w, and a component of w for each row: zero for all rows but these two.
    """
    index = jnp.arange(basis.shape[0])
    h = jnp.zeros(basis.shape[0], basis.dtype)
    for k in (j, j - 1):
        # In the first step j - 1 is -1, which as an index is the last row.
        row = jnp.where(k < 0, 0, basis[k])
        along = dot(row, w)
        w = w - along * row
        h = h + jnp.where(index == k, along, 0)
    return w, h


def _write(array: Array, rows: Array, j: Array) -> Array:
    """Replace the rows of an array from row ``j`` on by ``rows``.

    The rows are replaced as one slice, which the compiler XLA writes in place; ``.at[].set`` would
    make a scatter.
    """
    return lax.dynamic_update_slice_in_dim(array, rows, j, 0)


@custom_vmap
def _any(flag: Array) -> Array:
    """Return the flag; for a batch of linear systems under ``jax.vmap``, whether any flag is set.

    The flag is the condition under which a loop goes on. Where the condition differs between the
    systems of the batch, jax copies all arrays of the loop, among them the Krylov basis, at each
    step: this is five times slower with 32 right-hand sides of 512 unknowns. With one condition for
    all systems, the body of the loop itself must leave the systems that are done unchanged.
    """
    return flag


@_any.def_vmap
def _any_of_batch(size: int, batched: list[bool], flags: Array) -> tuple[Array, bool]:
    # A call of _any itself, so that a vmap inside of another one is reduced as well. False: the
    # result has no batch axis.
    return _any(jnp.any(flags, axis=0)), False
