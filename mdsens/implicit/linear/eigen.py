"""The lowest eigenpairs of a symmetric operator off its known null space, each with its residual.

Three ways, by what there is: all eigenvalues of a dense matrix where it is small; shift-invert
Lanczos on a sparse factor, whose inertia also counts what lies below (Ericsson and Ruhe, Math.
Comp. 35, 1251 (1980)); LOBPCG (Knyazev, SIAM J. Sci. Comput. 23, 517 (2001)) where there are
products alone.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh, lobpcg

from mdsens._util.attributes import Named
from mdsens._util.probe import chirp
from mdsens.implicit.linear.sparse_ldl import SparseFactor, bound

__all__ = ["DENSE_SIZE", "NULL", "Spectrum", "lanczos", "lowest"]

Apply = Callable[[np.ndarray], np.ndarray]

NULL = 1e-12  # of the largest eigenvalue: below it an eigenvalue is zero
DENSE_SIZE = 1200  # unknowns up to which every eigenvalue is computed: half a second there
# of the largest: where inertia is taken, clear of round-off of the factor and of soft modes
COUNT_SHIFT = 1e-10


_eigsh: Any = eigsh  # whose stubs take whole numbers alone


def _operator(size: int, apply: Apply) -> Any:
    make: Any = LinearOperator
    return make((size, size), matvec=apply, matmat=apply, dtype=float)


@dataclasses.dataclass(frozen=True)
class Spectrum(Named):
    """The lowest eigenpairs off the known null space.

    Attributes:
      values: (k,) ascending; zero where they are within round-off of it, 1e-12 of the largest.
      vectors: (m, k), columns of norm one.
      residuals: (k,) |A v - lambda v|: there is an eigenvalue within that distance of each value.
      largest: the largest eigenvalue; under LOBPCG and shift-invert to a part in a thousand.
      negative: how many eigenvalues lie below -1e-12 of the largest and below -floor; of the ones
        computed, where ``counted`` is False.
      zero: how many lie within 1e-12 of the largest of zero, beyond the known null space; likewise.
      hidden: how many of the ones computed are not zero and yet within ``floor`` of it, so that
        their sign is open.
      floor: the size down to which eigenvalues mean something.
      counted: whether ``negative`` and ``zero`` are of the whole spectrum.
      method: how they were found.
    """

    values: np.ndarray
    vectors: np.ndarray
    residuals: np.ndarray
    largest: float
    negative: int
    zero: int
    hidden: int
    floor: float
    counted: bool
    method: str

    @property
    def stable(self) -> np.ndarray:
        """(k,) which of them are positive."""
        return self.values > max(NULL * self.largest, self.floor)

    @property
    def settled(self) -> bool:
        """Whether the sign of each of them is known."""
        return bool(np.all(np.abs(self.values) > max(NULL * self.largest, self.floor)))


def lowest(
    apply: Apply,
    size: int,
    k: int = 1,
    *,
    project: Apply,
    null: int,
    matrix: Any = None,
    order: np.ndarray | None = None,
    precondition: Apply | None = None,
    dtype: Any = float,
    floor: float = 0.0,
) -> Spectrum:
    """The ``k`` algebraically lowest eigenpairs of P A P on the range of P.

    Args:
      apply: A times the columns of an (m, c) array.
      size: m.
      k: how many; fewer come back where the range has fewer.
      project: the orthogonal projector P off the known null space, on the columns of an (m, c)
        array.
      null: dimension of that null space.
      matrix: A as a scipy sparse matrix, for the factor; None for LOBPCG.
      order: of its rows, for the factor; minimum degree where None.
      precondition: for LOBPCG, about A^-1 times the columns of an (m, c) array, symmetric and
        positive.
      dtype: precision of the products: what counts as zero cannot be under its round-off.
      floor: eigenvalues that are smaller may be of either sign.

    Returns:
      a :class:`Spectrum`, all of it NaN where products with A are not finite.
    """
    k = min(k, size - null)
    zero = max(
        NULL, 8.0 * size * float(np.finfo(dtype).eps) if np.finfo(dtype).eps > 1e-10 else 0.0
    )
    if k < 1:
        return Spectrum(
            np.zeros(0), np.zeros((size, 0)), np.zeros(0), 0.0, 0, 0, 0, floor, True, "empty range"
        )
    probe = project(chirp((size, 1), float, np))
    if not np.isfinite(apply(probe)).all():
        nothing = np.full(k, np.nan), np.full((size, k), np.nan), np.full(k, np.nan)
        return Spectrum(*nothing, np.nan, 0, 0, 0, floor, False, "none: the operator is not finite")
    found = None
    if size <= DENSE_SIZE:
        found = _dense(apply, size, k, project, null, zero, floor)
    elif matrix is not None:
        found = _shift_invert(matrix, order, size, k, project, null, zero, floor)
    if found is None:
        found = _lobpcg(apply, size, k, project, zero, floor, precondition)
    nothing = np.abs(found.values) <= zero * found.largest
    return dataclasses.replace(found, values=np.where(nothing, 0.0, found.values))


def lanczos(
    apply: Callable[[jax.Array], jax.Array], start: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lanczos' recurrence for a symmetric operator (Golub and Van Loan, Matrix Computations,
    section 10.1).

    Its vectors are not made orthogonal again: the extreme eigenvalues of the tridiagonal matrix are
    right all the same, others come several times. None of them is kept, so that a second run, with
    the eigenvector of the tridiagonal matrix as weights, gives the one of the operator.

    Args:
      apply: (m,) -> (m,).
      start: (m,), in the range that is asked about.
      weights: (k,) of the k vectors in the sum that is returned.

    Returns:
      (k,) the diagonal of the tridiagonal matrix, (k,) what stands beside it, and the sum (m,).
      Traceable.
    """

    def step(carry: Any, weight: jax.Array) -> tuple[Any, Any]:
        before, v, beta, total = carry
        total = total + weight * v
        w = apply(v) - beta * before
        alpha = jnp.vdot(v, w)
        w = w - alpha * v
        size = jnp.linalg.norm(w)
        return (v, w / jnp.where(size > 0, size, 1.0), size, total), (alpha, size)

    v = start / jnp.linalg.norm(start)
    carry = (jnp.zeros_like(v), v, jnp.zeros((), v.dtype), jnp.zeros_like(v))
    (_, _, _, total), (diagonal, beside) = jax.lax.scan(step, carry, weights)
    return diagonal, beside, total


def _counts(values: np.ndarray, largest: float, zero: float, floor: float) -> tuple[int, int, int]:
    """How many are negative, zero and hidden."""
    nothing = np.abs(values) <= zero * largest
    hidden = ~nothing & (np.abs(values) <= floor)
    return int(np.sum((values < 0) & ~nothing & ~hidden)), int(np.sum(nothing)), int(np.sum(hidden))


def _pairs(apply: Apply, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rayleigh quotients, as good as the square of their vectors, the vectors and the residuals;
    the k lowest.
    """
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=0), 1e-300)
    image = apply(vectors)
    values = np.einsum("mk,mk->k", vectors, image)
    order = np.argsort(values)[:k]
    residuals = np.linalg.norm(image - vectors * values, axis=0)
    return values[order], vectors[:, order], residuals[order]


def _dense(
    apply: Apply, size: int, k: int, project: Apply, null: int, zero: float, floor: float
) -> Spectrum:
    identity = np.eye(size)
    kept = project(identity)
    matrix = project(apply(kept))
    scale = float(np.abs(matrix).sum(axis=0).max())
    matrix = 0.5 * (matrix + matrix.T) + 2.0 * (scale or 1.0) * (
        identity - kept
    )  # the null space goes to the top
    values, vectors = scipy.linalg.eigh(matrix)
    inside = (
        values[: size - null] if scale else np.zeros(size - null)
    )  # of no matrix at all, round-off of the 2 above
    largest = float(np.abs(inside).max())
    counts = _counts(inside, largest, zero, floor)
    return Spectrum(
        *_pairs(apply, project(vectors[:, :k]), k), largest, *counts, floor, True, "dense"
    )


def _all_zero(size: int, k: int, project: Apply, zero: int, floor: float, method: str) -> Spectrum:
    """Of a matrix of zeros, which Lanczos cannot begin with: any vectors of its range, ``zero`` of
    them counted.
    """
    vectors, _ = np.linalg.qr(project(np.random.default_rng(0).standard_normal((size, k))))
    return Spectrum(
        np.zeros(k), vectors, np.zeros(k), 0.0, 0, zero, 0, floor, method == "shift-invert", method
    )


def _shift_invert(
    matrix: Any,
    order: np.ndarray | None,
    size: int,
    k: int,
    project: Apply,
    null: int,
    zero: float,
    floor: float,
) -> Spectrum | None:
    """None where no factor tells how many eigenvalues lie below its shift."""
    rng = np.random.default_rng(0)
    start = project(rng.standard_normal((size, 1)))[:, 0]
    if not matrix.count_nonzero():
        return _all_zero(size, k, project, size - null, floor, "shift-invert")
    top = _eigsh(matrix, 1, which="LA", tol=1e-3, v0=start, return_eigenvectors=False)
    largest = max(float(top[0]), 1e-300)
    scale = bound(matrix)
    edge = max(COUNT_SHIFT * scale, floor)
    below, above = SparseFactor(matrix, edge, order), SparseFactor(matrix, -edge, order)
    if below.negative is None or above.negative is None:
        return None
    # the known null space counts as zero: above the upper shift's side, not below the lower one's
    negative, small = below.negative, above.negative - below.negative - null
    shift, factor = edge, below
    while factor.negative != 0:  # a saddle: go down until nothing is left below
        shift *= 10.0
        if shift > 10.0 * scale:
            return None
        factor = SparseFactor(matrix, shift, order)
        if factor.negative is None:
            return None
    inverse = _operator(
        size, lambda v: project(factor.apply(project(v.reshape(size, -1)))).reshape(v.shape)
    )
    ask = min(k + max(small, 0), size - null - 1)
    try:
        values, vectors = _eigsh(
            matrix,
            ask,
            sigma=-shift,
            OPinv=inverse,
            v0=start,
            ncv=min(max(2 * ask + 10, 20), size - 1),
        )
    except ArpackNoConvergence as error:
        if error.eigenvalues.size == 0:
            return None
        values, vectors = error.eigenvalues, error.eigenvectors
    values, vectors, residuals = _pairs(lambda v: matrix @ v, project(vectors), ask)
    # inertia counts what is small, the values say which of it is zero
    _, nulls, hidden = _counts(values, largest, zero, floor)
    zeros = max(small - hidden, nulls) if nulls else 0
    found = values[:k], vectors[:, :k], residuals[:k]
    return Spectrum(*found, largest, negative, zeros, hidden, floor, True, "shift-invert")


def _lobpcg(
    apply: Apply,
    size: int,
    k: int,
    project: Apply,
    zero: float,
    floor: float,
    precondition: Apply | None,
) -> Spectrum:
    rng = np.random.default_rng(0)

    def restricted(v: np.ndarray) -> np.ndarray:
        return project(apply(v.reshape(size, -1))).reshape(
            v.shape
        )  # of vectors that are on the range already

    operator, inverse = _operator(size, restricted), None
    if precondition is not None:
        given = precondition
        inverse = _operator(size, lambda v: project(given(v.reshape(size, -1))).reshape(v.shape))
    start = project(rng.standard_normal((size, 1)))[:, 0]
    if not np.any(restricted(start)):
        return _all_zero(size, k, project, k, floor, "LOBPCG")
    largest = float(
        _eigsh(operator, 1, which="LM", tol=1e-3, v0=start, return_eigenvectors=False)[0]
    )
    largest = abs(largest)
    vectors = project(rng.standard_normal((size, k if k == 1 else k + min(4, size // 10))))
    tolerance = 1e-5 * largest
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # it warns where the tolerance is not met; the residuals say so
            vectors = lobpcg(
                operator, vectors, M=inverse, tol=tolerance, maxiter=3000, largest=False
            )[1]
        vectors = project(np.asarray(vectors))
        found = _pairs(restricted, vectors, k)
        # a value is as good as the square of its residual over the gap: 1e-4 of the lowest is
        # plenty
        tolerance = max(1e-4 * float(np.abs(found[0]).min()), 1e-9 * largest)
        if found[2].max() <= tolerance:
            break
    if not found[2].max() <= 1e-5 * largest:  # it breaks down now and then, and returns what it has

        def lifted(v: np.ndarray) -> np.ndarray:
            on = project(v.reshape(size, -1)).reshape(v.shape)
            return restricted(on) + 2.0 * largest * (v - on)

        more = min(k + 4, size - 1)  # Lanczos may skip one of the last it is asked for
        above = _operator(size, lifted)  # the known null space at the top: round-off lets it in
        vectors = _eigsh(
            above, more, which="SA", v0=start, ncv=min(size - 1, 40 + 2 * more), maxiter=500
        )[1]
        again = _pairs(restricted, project(vectors), k)
        found = min(found, again, key=lambda pairs: np.nan_to_num(pairs[2], nan=np.inf).max())
    values, vectors, residuals = found
    sure = residuals <= 1e-5 * largest
    _, zeros, hidden = _counts(values[sure], largest, zero, floor)
    negative = int(np.sum(values < -max(zero * largest, floor) - residuals))
    return Spectrum(
        values, vectors, residuals, largest, negative, zeros, hidden, floor, False, "LOBPCG"
    )
