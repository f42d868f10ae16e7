"""The Krylov iterations, on flat vectors: each starts at zero and reports how it ended, never
whether that is good.

Every function solves ``A x = b`` with ``b`` of norm one, to an absolute residual ``tol`` of its own
recursion, within ``limit`` operator applications, and returns ``(x, applications, status)``. The
recursion's residual drifts from the true one, so :mod:`mdsens.implicit.linear.solution` recomputes
it. A ``while_loop`` under ``vmap`` freezes the members whose condition is false, so a finished
member stays what it was.

``precondition`` is a linear M, roughly the inverse of A, on whose Krylov space the iteration then
runs. ``tol`` is of ``b - A x`` all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap

from mdsens.implicit.linear.result import Result

__all__ = [
    "CURVATURE_UNITS",
    "Iterate",
    "bicgstab",
    "cg",
    "dot",
    "gmres_cycle",
    "minres",
    "norm",
    "safe_divide",
]

Apply: TypeAlias = Callable[[Array], Array]
Iterate: TypeAlias = tuple[Array, Array, Array]

# Curvature below this many units of round-off of |A| counts as zero. An operator product is wrong
# by a few units; a packing's softest stiffness stands at 1e-6 of its stiffest, nine decades above.
CURVATURE_UNITS = 100.0


def dot(a: Array, b: Array) -> Array:
    """Matrix or inner product in full precision: float32 on a GPU would otherwise round to
    TensorFloat32.
    """
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def norm(v: Array) -> Array:
    """Euclidean norm that neither overflows nor underflows: |v| = m |v / m| with m the largest
    entry.
    """
    largest = jnp.max(jnp.abs(v))
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    scaled = v / unit
    return unit * jnp.sqrt(dot(scaled, scaled))


def safe_divide(a: Array, b: Array) -> Array:
    """a / b, and zero where b is zero."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


class _Pivot(NamedTuple):
    """The last pivot of the L D L^T of a Lanczos matrix T, and |z|^2 of the z = L^-T e_k with z.Tz
    = pivot.
    """

    value: Array
    weight: Array


def _pivot(alpha: Array, beta: Array, last: _Pivot, size: Array) -> tuple[_Pivot, Array]:
    """The next pivot, and whether it proves negative curvature: what conjugate gradients see in
    their p.Ap / p.p.

    The curvature along z is pivot / |z|^2. One that is zero to round-off leaves nothing that later
    pivots could be computed from: not a number from there on, and no proof.
    """
    zero = CURVATURE_UNITS * jnp.finfo(alpha.dtype).eps * size
    ratio = safe_divide(beta, last.value)
    value = alpha - ratio * beta
    weight = 1 + ratio**2 * last.weight
    value = jnp.where(jnp.abs(value) <= zero * weight, jnp.nan, value)
    return _Pivot(value, weight), value < -zero * weight


def _int(value: int | Result) -> Array:
    return jnp.asarray(int(value), jnp.int32)


def _preconditioned(precondition: Apply | None, r: Array) -> tuple[Array, Array]:
    """M r and r.M r."""
    z = r if precondition is None else precondition(r)
    return z, dot(r, z)


def cg(
    apply: Apply, b: Array, tol: Array, limit: Array, precondition: Apply | None = None
) -> Iterate:
    """Conjugate gradients (Hestenes and Stiefel, 1952), for a positive semi-definite operator.

    The curvatures p.Ap are the pivots of the Lanczos matrix, so one of them is negative as soon as
    the Krylov space holds a direction of negative curvature: status INDEFINITE. One that is zero to
    round-off is a null direction that the right-hand side excites: STAGNATED. A residual r with r.M
    r no longer positive: BREAKDOWN.
    """
    eps = jnp.finfo(b.dtype).eps

    def broken(r: Array, z: Array, rr: Array, rz: Array) -> Array:
        return (
            (rr > tol**2) & ~(rz > eps * norm(r) * norm(z))
            if precondition is not None
            else jnp.asarray(False)
        )

    def going(state: tuple[Any, ...]) -> Array:
        _, _, _, rr, _, _, k, status = state
        return (rr > tol**2) & (k < limit) & (status == Result.CONVERGED)

    def body(state: tuple[Any, ...]) -> tuple[Any, ...]:
        x, r, p, rr, rz, size, k, _ = state
        ap = apply(p)
        pp, pap = dot(p, p), dot(p, ap)
        size = jnp.maximum(size, jnp.sqrt(safe_divide(dot(ap, ap), pp)))
        zero = CURVATURE_UNITS * eps * size * pp
        status = jnp.where(
            pap < -zero,
            _int(Result.INDEFINITE),
            jnp.where(pap > zero, _int(0), _int(Result.STAGNATED)),
        )
        step = jnp.where(pap > zero, safe_divide(rz, pap), 0)
        x, r = x + step * p, r - step * ap
        rr = dot(r, r)
        z, rz_new = _preconditioned(precondition, r)
        status = jnp.where(
            (status == Result.CONVERGED) & broken(r, z, rr, rz_new), _int(Result.BREAKDOWN), status
        )
        return x, r, z + safe_divide(rz_new, rz) * p, rr, rz_new, size, k + 1, status

    z, rz = _preconditioned(precondition, b)
    rr = dot(b, b)
    begun = jnp.where(broken(b, z, rr, rz), _int(Result.BREAKDOWN), _int(0))
    x, *_, k, status = lax.while_loop(
        going, body, (jnp.zeros_like(b), b, z, rr, rz, jnp.zeros((), b.dtype), _int(0), begun)
    )
    return x, k, status


BLOCK = 16  # vectors of the basis that GMRES orthogonalizes against at a time


def minres(
    apply: Apply,
    b: Array,
    tol: Array,
    limit: Array,
    definite: bool = False,
    precondition: Apply | None = None,
) -> Iterate:
    """MINRES (Paige and Saunders, 1975), for a symmetric operator, definite or not.

    Where the operator should be positive semi-definite (``definite``), INDEFINITE at the first
    proof that it is not.

    STAGNATED where |A r| / (|A| |r|) falls under the square root of round-off, which is as low as
    it was seen to come on singular systems (1e-11 to 6e-9): what is left of the residual lies in
    the null space. On a soft direction it stands at that stiffness over the largest one, in
    packings above 1e-6; in float32 the bound must stay under that.

    With a preconditioner the residual is least in the norm of M, so that the one asked for is
    carried along. BREAKDOWN where a Lanczos vector r has r.M r negative.
    """
    eps = jnp.finfo(b.dtype).eps
    null = jnp.minimum(jnp.sqrt(eps), 1e-5)
    zero, none = jnp.zeros((), b.dtype), jnp.zeros_like(b)
    plain = precondition is None

    def going(state: tuple[Any, ...]) -> Array:
        beta, phi_bar, rest, k, status = state[3], state[7], state[-3], state[-2], state[-1]
        return (
            ((phi_bar if plain else norm(rest)) > tol)
            & (beta > 0)
            & (k < limit)
            & (status == Result.CONVERGED)
        )

    def body(state: tuple[Any, ...]) -> tuple[Any, ...]:
        (
            x,
            r1,
            r2,
            beta,
            beta_old,
            d_bar,
            epsilon,
            phi_bar,
            cs,
            sn,
            w1,
            w2,
            size,
            pivot,
            z,
            rest,
            k,
            _,
        ) = state
        v = (r2 if plain else z) / beta
        y = apply(v) - safe_divide(beta, beta_old) * r1
        alpha = dot(v, y)
        y = y - (alpha / beta) * r2
        r1, r2, beta_old = r2, y, beta
        if plain:
            beta, broken = norm(r2), jnp.asarray(False)
        else:
            z, square = _preconditioned(precondition, r2)
            beta, broken = jnp.sqrt(jnp.maximum(square, 0)), square < -eps * norm(r2) * norm(z)
        size = jnp.sqrt(
            size**2 + alpha**2 + beta_old**2 * (k > 0) + beta**2
        )  # Frobenius norm of the Lanczos matrix
        pivot, negative = _pivot(alpha, jnp.where(k > 0, beta_old, 0), pivot, size)
        # A Lanczos vector at round-off has no direction left: the Krylov space is invariant and the
        # loop ends.
        beta = jnp.where(beta > eps * size, beta, 0)
        epsilon_old, delta, gamma_bar = epsilon, cs * d_bar + sn * alpha, sn * d_bar - cs * alpha
        epsilon, d_bar = sn * beta, -cs * beta
        stalled = jnp.hypot(gamma_bar, d_bar) <= null * size
        gamma = jnp.maximum(jnp.hypot(gamma_bar, beta), eps * size)
        cs, sn = gamma_bar / gamma, beta / gamma
        phi, phi_bar = cs * phi_bar, sn * phi_bar
        w1, w2 = w2, (v - epsilon_old * w1 - delta * w2) / gamma
        # After a stall the step would be a division by round-off along a null direction: leave x as
        # it is.
        x = jnp.where(stalled, x, x + phi * w2)
        if not plain:
            rest = sn**2 * rest - safe_divide(phi_bar * cs, beta) * r2
        status = jnp.where(stalled, _int(Result.STAGNATED), _int(0))
        status = jnp.where(negative & definite, _int(Result.INDEFINITE), status)
        status = jnp.where(broken, _int(Result.BREAKDOWN), status)
        return (
            x,
            r1,
            r2,
            beta,
            beta_old,
            d_bar,
            epsilon,
            phi_bar,
            cs,
            sn,
            w1,
            w2,
            size,
            pivot,
            z,
            rest,
            k + 1,
            status,
        )

    if plain:
        length, z, rest, begun = norm(b), zero, zero, _int(0)
    else:
        z, square = _preconditioned(precondition, b)
        length, rest = jnp.sqrt(jnp.maximum(square, 0)), b
        begun = jnp.where(square < -eps * norm(b) * norm(z), _int(Result.BREAKDOWN), _int(0))
    start = (
        none,
        none,
        b,
        length,
        zero,
        zero,
        zero,
        length,
        -jnp.ones_like(zero),
        zero,
        none,
        none,
        zero,
        _Pivot(zero, zero),
        z,
        rest,
    )
    final = lax.while_loop(going, body, (*start, _int(0), begun))
    return final[0], final[-2], final[-1]


def bicgstab(
    apply: Apply,
    b: Array,
    tol: Array,
    limit: Array,
    definite: bool = False,
    precondition: Apply | None = None,
) -> Iterate:
    """BiCGSTAB (van der Vorst, 1992), for any operator; two applications a step, no memory beyond
    seven vectors.

    Where the operator should be positive semi-definite (``definite``), INDEFINITE at a search
    direction of negative curvature; it may end without meeting one.

    BREAKDOWN where an inner product that it divides by vanishes to round-off (for a skew-symmetric
    operator at once).
    """
    eps = jnp.finfo(b.dtype).eps
    shadow = b
    change = precondition or (lambda v: v)

    def going(state: tuple[Any, ...]) -> Array:
        _, r, _, _, _, k, status = state
        return (dot(r, r) > tol**2) & (k < limit) & (status == Result.CONVERGED)

    def body(state: tuple[Any, ...]) -> tuple[Any, ...]:
        x, r, p, rho, scale, k, _ = state
        p_changed = change(p)
        ap = apply(p_changed)
        along = dot(shadow, ap)
        broken = jnp.abs(along) <= eps * norm(shadow) * norm(ap)
        alpha = jnp.where(broken, 0, safe_divide(rho, along))
        s = r - alpha * ap
        s_changed = change(s)
        t = apply(s_changed)
        st, tt = dot(t, s), dot(t, t)
        # s = 0 is convergence half a step early, and no breakdown.
        done = dot(s, s) <= tol**2
        broken = broken | (~done & (jnp.abs(st) <= eps * norm(t) * norm(s)))
        omega = safe_divide(st, tt)
        x, r = x + alpha * p_changed + omega * s_changed, s - omega * t
        rho_new = dot(shadow, r)
        broken = broken | (~done & (jnp.abs(rho_new) <= eps * norm(shadow) * norm(r)))
        pp, ss = dot(p_changed, p_changed), dot(s_changed, s_changed)
        scale = jnp.maximum(
            scale, jnp.sqrt(jnp.maximum(safe_divide(dot(ap, ap), pp), safe_divide(tt, ss)))
        )
        least = -CURVATURE_UNITS * eps * scale
        negative = (dot(p_changed, ap) < least * pp) | (~done & (dot(t, s_changed) < least * ss))
        p = r + safe_divide(rho_new, rho) * safe_divide(alpha, omega) * (p - omega * ap)
        status = jnp.where(broken, _int(Result.BREAKDOWN), _int(0))
        status = jnp.where(negative & definite, _int(Result.INDEFINITE), status)
        return x, r, p, rho_new, scale, k + 2, status

    start = (jnp.zeros_like(b), b, b, dot(b, b), jnp.zeros((), b.dtype), _int(0), _int(0))
    x, _, _, _, _, k, status = lax.while_loop(going, body, start)
    return x, k, status


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
        pivot, negative = _pivot(alpha, beta, pivot, size * lost)
        # against the largest stretch so far: of a vector of round-off the product is round-off as
        # well
        if not lanczos:
            scale = jnp.where(done, scale, jnp.maximum(scale, safe_divide(length, norm(v))))
            negative = dot(v, product) < -CURVATURE_UNITS * eps * lost * scale * dot(v, v)
        status = jnp.where(negative & definite & ~done, _int(Result.INDEFINITE), status)
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
        _int(0),
        _int(0),
        idle,
        _Pivot(zero, zero),
        zero,
        zero,
        zero,
        _int(0),
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
