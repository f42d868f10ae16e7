"""A dense factorisation of an operator on its range, on flat vectors, for problems of up to some thousand unknowns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jax import Array, lax

from mdsens.implicit._krylov import Apply, Result, dot
from mdsens.implicit.status import Status

__all__ = ["factor"]


def factor(
    apply: Apply, right: Apply | None, left: Apply | None, positive_semidefinite: bool, b: Array
) -> Callable[[Array], Result]:
    """A dense factorisation of the operator on its range: r -> (x, 0 applications, status)."""
    n, eps = b.size, jnp.finfo(b.dtype).eps
    # Columns in chunks: all at once, the intermediate arrays of a Hessian product would come n times over.
    matrix = lax.map(apply, jnp.eye(n, dtype=b.dtype), batch_size=min(n, 32)).T
    if right is not left:
        return _pseudo_inverse(matrix, eps)
    largest = jnp.max(jnp.abs(matrix))
    if right is not None:
        projector = lax.map(right, jnp.eye(n, dtype=b.dtype), batch_size=min(n, 32)).T
        matrix = matrix + jnp.where(largest > 0, largest, 1) * (jnp.eye(n, dtype=b.dtype) - projector)
    none, fine = jnp.int32(0), jnp.int32(Status.CONVERGED)

    if not positive_semidefinite:
        lu = jsl.lu_factor(matrix)
        regular = jnp.all(jnp.isfinite(lu[0])) & jnp.all(jnp.diagonal(lu[0]) != 0)
        # A zero pivot is a null direction nobody declared; not-finite numbers that went in come out as they are.
        singular = jnp.where(jnp.all(jnp.isfinite(matrix)), int(Status.STAGNATED), int(Status.NOT_FINITE))

        def by_lu(r: Array) -> Result:
            return jnp.where(regular, jsl.lu_solve(lu, r), 0), none, jnp.where(regular, fine, singular)

        return by_lu

    def lower_factor(raised: float) -> Array:
        return jnp.linalg.cholesky(matrix + raised * jnp.where(largest > 0, largest, 1) * jnp.eye(n, dtype=b.dtype))

    def semidefinite() -> Array:
        # Cholesky fails on a negative direction and, by round-off, on a null one that nobody declared. Raised by the
        # round-off of the factorisation it fails on the first alone; raised by sqrt(eps) it leaves little of the
        # second in the answer, and refinement takes the raise back out of the rest.
        probe = lower_factor(n * float(eps))
        return jnp.where(jnp.all(jnp.isfinite(probe)), lower_factor(float(eps) ** 0.5), probe)

    lower = lower_factor(0.0)
    lower = lax.cond(jnp.all(jnp.isfinite(lower)), lambda: lower, semidefinite)
    definite = jnp.all(jnp.isfinite(lower))
    negative = jnp.where(jnp.all(jnp.isfinite(matrix)), int(Status.INDEFINITE), int(Status.NOT_FINITE))

    def by_cholesky(r: Array) -> Result:
        x = jsl.cho_solve((lower, True), r)
        return jnp.where(definite, x, 0), none, jnp.where(definite, fine, negative)

    return by_cholesky


def _pseudo_inverse(matrix: Array, eps: Any) -> Callable[[Array], Result]:
    """Least squares by singular values, for an operator whose left and right null space differ."""
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    inverse = jnp.where(s > matrix.shape[0] * eps * s[0], 1 / jnp.where(s == 0, 1, s), 0)
    ended = jnp.where(jnp.all(jnp.isfinite(s)), int(Status.CONVERGED), int(Status.NOT_FINITE)).astype(jnp.int32)
    return lambda r: (dot(inverse * dot(r, u), vt), jnp.int32(0), ended)
