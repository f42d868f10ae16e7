"""Generalized minimal residuals, restarted, for any operator."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap

from mdsens.implicit.linear._chebyshev import smoothed
from mdsens.implicit.linear._vectors import (
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
from mdsens.implicit.linear.method import IterativeMethod, Round, check_count, projected
from mdsens.implicit.linear.operator import Operator
from mdsens.implicit.linear.result import Result

__all__ = ["GMRES", "gmres_cycle"]

BLOCK = 16  # vectors of the basis that GMRES orthogonalizes against at a time


@dataclasses.dataclass(frozen=True)
class GMRES(IterativeMethod):
    """Generalized minimal residuals, restarted: any operator, on any device.

    Args:
      rtol: relative residual asked for, as in :class:`CG`.
      max_iterations: operator applications; 10 times the number of unknowns, at least 1,000, where
        None.
      restart: length of a cycle. Memory is (restart + 1) vectors; raise it where the status is
        STAGNATED, lower it where memory runs out.
      degree: of the polynomial of the operator that preconditions, see
        :func:`mdsens.implicit.linear._polynomials.chebyshev`, for an operator declared positive
        semi-definite; one is none, and what any other gets. A cycle then reaches over ``restart *
        degree`` applications, of which it orthogonalizes one in ``degree``: near jamming, where
        restarts stagnate, that is the difference between an answer and none.
    """

    restart: int = 200
    degree: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("GMRES", "restart", self.restart)
        check_count("GMRES", "degree", self.degree)

    scalable: ClassVar[bool] = True
    # A round is one cycle, so that restarts are rounds, without a bound. A cycle that gains less
    # than a thousandth would need thousands more.
    rounds: ClassVar[int] = 2**31 - 1
    gain: ClassVar[float] = 0.999

    def iteration(self, operator: Operator, b: Array) -> tuple[Round, int]:
        apply, precondition = projected(operator)
        definite, restart = operator.positive_semidefinite, self.restart
        if definite and self.degree > 1 and precondition is None:
            cycle = functools.partial(gmres_cycle, restart=restart, definite=True)
            return smoothed(cycle, apply, self.degree, b), 0
        return (
            lambda r, tol, limit: gmres_cycle(
                apply, r, tol, limit, restart, definite, precondition
            ),
            0,
        )


def gmres_cycle(
    apply: Apply,
    b: Array,
    tol: Array,
    limit: Array,
    restart: int,
    definite: bool = False,
    precondition: Apply | None = None,
) -> Iterate:
    """One cycle of GMRES (Saad and Schultz, 1986): the least residual over a Krylov space of at
    most ``restart``.

    Where the operator should be symmetric positive semi-definite (``definite``), the Hessenberg
    matrix is its Lanczos matrix: INDEFINITE at the first proof that it is not. With a
    preconditioner only the curvature along its basis is looked at, so that it may end without
    meeting a negative one.

    Arnoldi by Gram-Schmidt done twice, which is as orthogonal as Householder, classical within
    blocks of vectors and modified between them, so that a step reads no more of the basis than is
    filled. Of a symmetric operator's product nearly all lies along the last two vectors, so that
    there the first time is theirs alone. The Hessenberg matrix is reduced by Givens rotations kept
    as one matrix ``q``, so that a step is a product and not a loop over the rotations. Leaves early
    at ``tol`` or where the Krylov space is invariant. Memory (restart + 1) x n.
    """
    eps = jnp.finfo(b.dtype).eps
    m = min(restart, b.size)
    at = jnp.arange(m + 1)
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
        h, again = h[: m + 1], again[: m + 1]
        beyond = norm(w)
        invariant = ~(beyond > 8 * eps * length)
        beyond = jnp.where(invariant, 0, beyond)
        alpha = h[j] + again[j]
        size = jnp.where(done, size, jnp.sqrt(size**2 + alpha**2 + beta**2 + beyond**2))
        # As the residual falls, the basis is made of what is left: its share of round-off, which
        # may lie in the null space, is |b| over the residual times as large, and proves nothing.
        lost = safe_divide(norm(b), jnp.abs(g[j]))
        pivot, negative = next_pivot(alpha, beta, pivot, size * lost)
        # against the largest stretch so far: of a vector of round-off the product is round-off as
        # well
        if not lanczos:
            scale = jnp.where(done, scale, jnp.maximum(scale, safe_divide(length, norm(v))))
            negative = dot(v, product) < -CURVATURE_UNITS * eps * lost * scale * dot(v, v)
        status = jnp.where(negative & definite & ~done, int32(Result.INDEFINITE), status)
        beta = beyond
        column = dot(q, h + again + jnp.where(at == j + 1, beyond, 0))
        rho = jnp.hypot(column[j], column[j + 1])
        # rho = 0 happens on a singular operator alone: that direction gains nothing. Neither it nor
        # a member that is done gets a rotation or a column (a row of r, kept transposed). Only
        # slices are written: a choice between whole arrays would copy them.
        useless = rho <= 8 * eps * length
        idle = done | useless
        c = jnp.where(idle, 1, safe_divide(column[j], rho))
        s = jnp.where(idle, 0, safe_divide(column[j + 1], rho))
        q = _write(q, jnp.stack([c * q[j] + s * q[j + 1], -s * q[j] + c * q[j + 1]]), j)
        g = _write(g, jnp.stack([c * g[j], -s * g[j]]), j)
        upper = jnp.where(at < j, column, 0) + jnp.where(at == j, rho, 0)
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
    square, whole = jnp.eye(m, dtype=b.dtype), jnp.eye(m + 1, dtype=b.dtype)
    start = (
        basis,
        square,
        whole,
        g,
        int32(0),
        int32(0),
        idle,
        Pivot(zero, zero),
        zero,
        zero,
        zero,
        int32(0),
    )
    basis, r, _, g, _, used, _, _, _, _, _, status = lax.while_loop(going, body, start)
    y = jax.scipy.linalg.solve_triangular(r.T, jnp.where(jnp.arange(m) < used, g[:m], 0))
    return change(dot(y, basis[:m])), used, status


def _orthogonal(w: Array, basis: Array, j: Array) -> tuple[Array, Array]:
    """What of w is orthogonal to the rows of the basis up to the j-th, and its components along all
    rows.
    """

    def against(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        w, h = carry
        block = lax.dynamic_slice_in_dim(basis, i * BLOCK, BLOCK)
        along = dot(block, w)
        return w - dot(along, block), lax.dynamic_update_slice_in_dim(h, along, i * BLOCK, 0)

    return lax.fori_loop(0, j // BLOCK + 1, against, (w, jnp.zeros(basis.shape[0], basis.dtype)))


def _off_last_two(w: Array, basis: Array, j: Array) -> tuple[Array, Array]:
    """The same with the j-th row and the one before it alone."""
    at, h = jnp.arange(basis.shape[0]), jnp.zeros(basis.shape[0], basis.dtype)
    for k in (j, j - 1):
        row = jnp.where(k < 0, 0, basis[k])
        along = dot(row, w)
        w, h = w - along * row, h + jnp.where(at == k, along, 0)
    return w, h


def _write(array: Array, rows: Array, j: Array) -> Array:
    """The array with ``rows`` in place of those from ``j`` on: as a slice, in place, where ``.at``
    would scatter.
    """
    return lax.dynamic_update_slice_in_dim(array, rows, j, 0)


@custom_vmap
def _any(flag: Array) -> Array:
    """The flag; under vmap, whether any member's is set, the same for all.

    A loop whose condition differs between members makes jax copy its whole state at each step, here
    the basis: five times slower with 32 right-hand sides of 512 unknowns. A loop on this leaves
    freezing the finished to its body.
    """
    return flag


@_any.def_vmap
def _any_of_batch(size: int, batched: list[bool], flags: Array) -> tuple[Array, bool]:
    return _any(jnp.any(flags, axis=0)), False
