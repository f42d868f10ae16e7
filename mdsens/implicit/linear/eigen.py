"""The lowest eigenpairs of a symmetric operator off its known null space, with their residuals.

There are three methods. For a small operator, all eigenvalues of its dense matrix are computed. For
a sparse matrix, the method is shift-invert Lanczos with a sparse factorization, whose inertia also
counts the eigenvalues below the shift (Ericsson and Ruhe, Math. Comp. 35, 1251 (1980)). For an
operator that is known only by its products, the method is LOBPCG (Knyazev, SIAM J. Sci. Comput. 23,
517 (2001)).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse as sp
from jax.typing import DTypeLike
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from mdsens._util.attributes import Named
from mdsens._util.probe import chirp
from mdsens.implicit.linear.lobpcg import lobpcg
from mdsens.implicit.linear.sparse_ldl import SparseFactor, bound

__all__ = ["DENSE_SIZE", "NULL", "Iteration", "Spectrum", "lanczos", "lanczos_lowest", "lowest"]

# Products of a matrix with the columns of an (m, c) array.
Apply = Callable[[np.ndarray], np.ndarray]

# An eigenvalue below this part of the largest one is zero. Near jamming, null eigenvalues are near
# 1e-16 of the largest, and the others above 2.8e-6 of it down to a pressure of 1e-6.
NULL = 1e-12
# Largest number of unknowns for which all eigenvalues are computed; at this size it takes 0.5 s.
DENSE_SIZE = 1200
# Shift at which the inertia counts eigenvalues, in units of a bound of the largest eigenvalue:
# above the round-off of the factor, and below soft modes.
COUNT_SHIFT = 1e-10
# Steps of Lanczos' method for the largest eigenvalue: it is right to 1e-3.
TOP_STEPS = 30
# Largest relative residual of an eigenpair of LOBPCG, in units of the largest eigenvalue. Above it
# Lanczos is tried, and an eigenvalue is not counted as zero or hidden.
LOBPCG_RESIDUAL = 1e-5

_eigsh: Any = eigsh  # the type stubs of scipy accept only integers


def _linear_operator(size: int, apply: Apply) -> Any:
    make: Any = LinearOperator  # the type stubs of scipy do not know these arguments
    return make((size, size), matvec=apply, matmat=apply, dtype=float)


@dataclasses.dataclass(frozen=True)
class Iteration:
    """Options of LOBPCG, for an operator A that is known by its products.

    Attributes:
      precondition: the function that multiplies an approximation of A^-1, symmetric and positive,
        with the columns of an (m, c) array; None for none.
      soften: the function that multiplies A^-1 with the columns of an (m, c) array, to two digits,
        once before the iteration: random vectors then consist mostly of the lowest modes. None
        for none.
      accuracy: residual of an eigenpair at which to stop, in units of the lowest eigenvalue. The
        error of the eigenvalue is the square of the residual over the distance to the next one.
    """

    precondition: Apply | None = None
    soften: Apply | None = None
    accuracy: float = 1e-4


@dataclasses.dataclass(frozen=True)
class Spectrum(Named):
    """The lowest k eigenpairs of a symmetric operator A, outside of its known null space.

    A is a matrix (m, m).

    Attributes:
      values: (k,) eigenvalues, ascending; set to zero where the absolute value is within round-off,
        1e-12 of the largest eigenvalue.
      vectors: (m, k) eigenvectors, columns of norm one.
      residuals: (k,) |A v - lambda v| for each value lambda and vector v. An eigenvalue of A lies
        within this distance of the value.
      largest: the largest eigenvalue; by LOBPCG and shift-invert to a relative error of 1e-3.
      negative: number of eigenvalues below -1e-12 times the largest and below -floor. Where
        ``counted`` is False, only the computed eigenvalues are counted.
      zero: number of eigenvalues whose absolute value is at most 1e-12 times the largest, without
        the known null space. Where ``counted`` is False, only the computed ones are counted.
      hidden: number of computed eigenvalues that are not zero, but have an absolute value of at
        most ``floor``, so that their sign is not known.
      floor: absolute value below which the sign of an eigenvalue is not known.
      counted: whether ``negative`` and ``zero`` count the whole spectrum.
      method: name of the method that was used.
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
        """Return a mask (k,) of the computed eigenvalues that are positive beyond round-off."""
        return self.values > max(NULL * self.largest, self.floor)

    @property
    def settled(self) -> bool:
        """Return whether all computed eigenvalues are so far from zero that their sign is known."""
        return bool(np.all(np.abs(self.values) > max(NULL * self.largest, self.floor)))


def lowest(
    apply: Apply,
    size: int,
    k: int = 1,
    *,
    project: Apply,
    null: int,
    matrix: sp.csr_array | None = None,
    order: np.ndarray | None = None,
    iteration: Iteration = Iteration(),
    dtype: DTypeLike = float,
    floor: float = 0.0,
) -> Spectrum:
    """Compute the k lowest eigenpairs of the symmetric operator P A P on the range of P.

    P is the projector off the known null space of A.

    Args:
      apply: the function that multiplies A with the columns of an (m, c) array.
      size: number m of unknowns.
      k: number of eigenpairs, the algebraically lowest; the result has fewer where the range of P
        has a smaller dimension.
      project: the function that multiplies P with the columns of an (m, c) array.
      null: dimension of the known null space.
      matrix: A as a scipy sparse matrix, to factorize it; None for LOBPCG.
      order: order of the rows of the matrix in the factorization; minimum-degree order where
        None.
      iteration: options of LOBPCG.
      dtype: floating-point type of the products, whose round-off limits what counts as a zero
        eigenvalue.
      floor: absolute value below which the sign of an eigenvalue is not known.

    Returns:
      a :class:`Spectrum`, with all values NaN where products with A are not finite.
    """
    k = min(k, size - null)
    zero = NULL
    eps = float(np.finfo(dtype).eps)
    if eps > 1e-10:  # single precision
        zero = max(zero, 8.0 * size * eps)
    if k < 1:
        return _of_zeros(np.zeros((size, 0)), 0, floor, True, "empty range")
    # One product shows a NaN in A, on which scipy.linalg.eigh would raise a ValueError.
    probe = project(chirp((size, 1), float, np))
    if not np.isfinite(apply(probe)).all():
        return Spectrum(
            values=np.full(k, np.nan),
            vectors=np.full((size, k), np.nan),
            residuals=np.full(k, np.nan),
            largest=np.nan,
            negative=0,
            zero=0,
            hidden=0,
            floor=floor,
            counted=False,
            method="none: the operator is not finite",
        )
    spectrum = None
    if size <= DENSE_SIZE:
        spectrum = _dense(apply, size, k, project, null, zero, floor)
    elif matrix is not None:
        spectrum = _shift_invert(matrix, order, size, k, project, null, zero, floor)
    if spectrum is None:
        spectrum = _lobpcg(apply, size, k, project, zero, floor, iteration)
    is_zero = np.abs(spectrum.values) <= zero * spectrum.largest
    return dataclasses.replace(spectrum, values=np.where(is_zero, 0.0, spectrum.values))


def lanczos(
    apply: Callable[[jax.Array], jax.Array], start: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Run k steps of Lanczos' recurrence for a symmetric operator, traceable by jax.

    Source: Golub and Van Loan, Matrix Computations, section 10.1. The Lanczos vectors are not
    orthogonalized again: the extreme eigenvalues of the tridiagonal matrix are accurate without
    this, and the other eigenvalues appear several times. The vectors are not stored. To get an
    eigenvector of the operator, run the recurrence a second time, with the eigenvector of the
    tridiagonal matrix as weights.

    Args:
      apply: the function that multiplies the operator with a vector (m,).
      start: the first vector (m,), in the subspace whose eigenvalues are wanted.
      weights: (k,) weights of the k Lanczos vectors in the sum that is returned.

    Returns:
      the diagonal (k,) of the tridiagonal matrix, the off-diagonal (k,), and the weighted sum (m,)
      of the Lanczos vectors.
    """

    def step(
        carry: tuple[jax.Array, jax.Array, jax.Array, jax.Array], weight: jax.Array
    ) -> tuple[Any, Any]:
        before, v, beta, total = carry
        total = total + weight * v
        w = apply(v) - beta * before
        alpha = jnp.vdot(v, w)
        w = w - alpha * v
        size = jnp.linalg.norm(w)
        # a norm of zero: the Krylov space is invariant, and zeros follow
        return (v, w / jnp.where(size > 0, size, 1.0), size, total), (alpha, size)

    v = start / jnp.linalg.norm(start)
    carry = (jnp.zeros_like(v), v, jnp.zeros((), v.dtype), jnp.zeros_like(v))
    (_, _, _, total), (diagonal, off_diagonal) = jax.lax.scan(step, carry, weights)
    return diagonal, off_diagonal, total


def lanczos_lowest(
    apply: Apply, start: np.ndarray, steps: int
) -> tuple[np.ndarray, Callable[[], np.ndarray]] | None:
    """Run Lanczos' recurrence on the host, for an operator whose products are numpy's.

    As in :func:`lanczos`, the vectors are neither orthogonalized again nor stored: a second run
    sums them to the Ritz vector, where it is asked for.

    Args:
      apply: the function that multiplies the symmetric operator with a vector (m,).
      start: the first vector (m,).
      steps: number of products of a run.

    Returns:
      (ascending eigenvalues of the tridiagonal matrix, a function that returns the Ritz vector (m,)
      of the lowest one); None where a product is not finite.
    """
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    for alpha, beta, _ in _recurrence(apply, start, steps):
        if not np.isfinite(alpha + beta):
            return None
        diagonal.append(alpha)
        off_diagonal.append(beta)
    # the last entry would couple the last Lanczos vector to one that was not used
    values, vectors = scipy.linalg.eigh_tridiagonal(diagonal, off_diagonal[:-1])

    def lowest_vector() -> np.ndarray:
        weighted = zip(vectors[:, 0], _recurrence(apply, start, steps), strict=False)
        return np.asarray(sum(weight * v for weight, (_, _, v) in weighted))

    return values, lowest_vector


def _recurrence(
    apply: Apply, start: np.ndarray, steps: int
) -> Iterator[tuple[float, float, np.ndarray]]:
    """Yield diagonal, off-diagonal and vector of each step of Lanczos' recurrence.

    It ends where the Krylov space is invariant.
    """
    v = start / np.sqrt(_dot(start, start))
    before = np.zeros_like(v)
    beta = 0.0
    for _ in range(steps):
        w = apply(v) - beta * before
        alpha = _dot(v, w)
        w = w - alpha * v
        beta = float(np.sqrt(_dot(w, w)))
        yield alpha, beta, v
        if beta == 0.0:
            return
        before = v
        v = w / beta


def _dot(first: np.ndarray, second: np.ndarray) -> float:
    """Compute the inner product of two vectors without BLAS, whose threads would gain nothing."""
    return float(np.einsum("m,m->", first, second))


def _counts(values: np.ndarray, largest: float, zero: float, floor: float) -> tuple[int, int, int]:
    """Count the eigenvalues that are negative, that are zero, and whose sign is not known.

    Args:
      values: the eigenvalues.
      largest: the largest eigenvalue.
      zero: an eigenvalue counts as zero up to this fraction of the largest.
      floor: absolute value up to which the sign of another eigenvalue is not known.
    """
    is_zero = np.abs(values) <= zero * largest
    is_hidden = ~is_zero & (np.abs(values) <= floor)
    is_negative = (values < 0) & ~is_zero & ~is_hidden
    return int(np.sum(is_negative)), int(np.sum(is_zero)), int(np.sum(is_hidden))


def _rayleigh(
    apply: Apply, vectors: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the k lowest Rayleigh quotients v.A v of a symmetric operator A, for given vectors v.

    The vectors are columns, and are scaled to norm one. The error of a Rayleigh quotient is
    quadratic in the error of its vector.

    Returns:
      the quotients (k,), the columns (m, k) that have them, where m is the number of rows of A,
      and the residuals |A v - quotient v| (k,).
    """
    # a vector that the projector made zero stays zero instead of NaN
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=0), 1e-300)
    image = apply(vectors)
    values = np.einsum("mk,mk->k", vectors, image)
    order = np.argsort(values)[:k]
    residuals = np.linalg.norm(image - vectors * values, axis=0)
    return values[order], vectors[:, order], residuals[order]


def _dense(
    apply: Apply, size: int, k: int, project: Apply, null: int, zero: float, floor: float
) -> Spectrum:
    """Compute the k lowest eigenpairs of P A P from all eigenvalues of its dense matrix.

    P is the projector off the known null space of the symmetric operator A.
    """
    identity = np.eye(size)
    projector = project(identity)
    matrix = project(apply(projector))
    scale = float(np.abs(matrix).sum(axis=0).max())
    # The null space gets twice a bound of the largest eigenvalue, so that it comes last.
    null_part = 2.0 * (scale or 1.0) * (identity - projector)
    matrix = 0.5 * (matrix + matrix.T) + null_part
    values, vectors = scipy.linalg.eigh(matrix)
    values = values[: size - null]
    if not scale:  # A is zero, and the eigenvalues are round-off of the 2 in ``null_part``
        values = np.zeros(size - null)
    largest = float(np.abs(values).max())
    negative, zeros, hidden = _counts(values, largest, zero, floor)
    lowest_values, lowest_vectors, residuals = _rayleigh(apply, project(vectors[:, :k]), k)
    return Spectrum(
        values=lowest_values,
        vectors=lowest_vectors,
        residuals=residuals,
        largest=largest,
        negative=negative,
        zero=zeros,
        hidden=hidden,
        floor=floor,
        counted=True,
        method="dense",
    )


def _of_zeros(vectors: np.ndarray, zero: int, floor: float, counted: bool, method: str) -> Spectrum:
    """Return the :class:`Spectrum` of the operator A = 0, with given vectors as its eigenvectors.

    The vectors are orthonormal columns. All eigenvalues are zero.
    """
    k = vectors.shape[1]
    return Spectrum(
        values=np.zeros(k),
        vectors=vectors,
        residuals=np.zeros(k),
        largest=0.0,
        negative=0,
        zero=zero,
        hidden=0,
        floor=floor,
        counted=counted,
        method=method,
    )


def _range_vectors(size: int, k: int, project: Apply) -> np.ndarray:
    """Return k orthonormal random vectors in the range of a projector, as columns (size, k)."""
    # random, so that the projector leaves k independent ones; the same in every run
    vectors, _ = np.linalg.qr(project(np.random.default_rng(0).standard_normal((size, k))))
    return vectors


def _shift_invert(
    matrix: sp.csr_array,
    order: np.ndarray | None,
    size: int,
    k: int,
    project: Apply,
    null: int,
    zero: float,
    floor: float,
) -> Spectrum | None:
    """Compute the k lowest eigenpairs of a sparse matrix by Lanczos with its shifted inverse.

    The result is None where a factorization does not give the number of eigenvalues below the
    shift, or where Lanczos fails.
    """
    # a fixed seed: the same start, and the same digits, in every run
    rng = np.random.default_rng(0)
    start = project(rng.standard_normal((size, 1)))[:, 0]
    if not matrix.count_nonzero():  # Lanczos cannot start with a matrix of zeros
        vectors = _range_vectors(size, k, project)
        return _of_zeros(vectors, size - null, floor, True, "shift-invert")
    # three digits are enough: it only sets the scale of what counts as zero
    top = _eigsh(matrix, 1, which="LA", tol=1e-3, v0=start, return_eigenvectors=False)
    largest = max(float(top[0]), 1e-300)
    scale = bound(matrix)
    # The inertia of A + edge I counts the eigenvalues below -edge, that of A - edge I those below
    # edge. Of the second, the known null space is subtracted: its eigenvalues are zero.
    edge = max(COUNT_SHIFT * scale, floor)
    factor = SparseFactor(matrix, edge, order)
    upper_factor = SparseFactor(matrix, -edge, order)
    negative = factor.negative
    if negative is None or upper_factor.negative is None:
        return None
    small = upper_factor.negative - negative - null
    # Lanczos with a shift gives the eigenvalues closest to it. They are the lowest ones only if
    # none is below the shift: at a saddle point it is lowered until that is so.
    shift = edge
    while factor.negative != 0:
        shift *= 10.0
        if shift > 10.0 * scale:
            return None
        factor = SparseFactor(matrix, shift, order)
        if factor.negative is None:
            return None

    def solve(v: np.ndarray) -> np.ndarray:
        return project(factor.apply(project(v.reshape(size, -1)))).reshape(v.shape)

    inverse = _linear_operator(size, solve)
    # The small eigenvalues are computed too, to see which of them are zero.
    # ARPACK computes fewer eigenpairs than the space has dimensions, hence the - 1.
    wanted = min(k + max(small, 0), size - null - 1)
    basis_size = min(max(2 * wanted + 10, 20), size - 1)
    try:
        # OPinv must be the inverse of A - sigma I, and the factor is that of A + shift I.
        _, vectors = _eigsh(matrix, wanted, sigma=-shift, OPinv=inverse, v0=start, ncv=basis_size)
    except ArpackNoConvergence as error:
        if error.eigenvalues.size == 0:
            return None
        vectors = error.eigenvectors
    values, vectors, residuals = _rayleigh(lambda v: matrix @ v, project(vectors), wanted)
    # The inertia counts the small eigenvalues; the computed ones tell which of them are zero.
    _, computed_zeros, hidden = _counts(values, largest, zero, floor)
    zeros = max(small - hidden, computed_zeros) if computed_zeros else 0
    return Spectrum(
        values=values[:k],
        vectors=vectors[:, :k],
        residuals=residuals[:k],
        largest=largest,
        negative=negative,
        zero=zeros,
        hidden=hidden,
        floor=floor,
        counted=True,
        method="shift-invert",
    )


def _softened(vectors: np.ndarray, softer: np.ndarray) -> np.ndarray:
    """Return the columns of ``softer``, each of norm one; of ``vectors`` where it has none.

    A solve that fails, as for an indefinite matrix, may leave columns of zeros or NaN.
    """
    sizes = np.linalg.norm(softer, axis=0)
    kept = (sizes > 0) & np.isfinite(sizes)
    return np.where(kept, softer / np.where(kept, sizes, 1.0), vectors)


def _lobpcg(
    apply: Apply,
    size: int,
    k: int,
    project: Apply,
    zero: float,
    floor: float,
    iteration: Iteration,
) -> Spectrum:
    """Compute the k lowest eigenpairs of a symmetric operator from products alone, by LOBPCG.

    Where the residuals of LOBPCG are too large, Lanczos is tried, and the better result is kept.
    """
    # a fixed seed: the same start, and the same digits, in every run
    rng = np.random.default_rng(0)

    def restricted(v: np.ndarray) -> np.ndarray:
        # Lanczos and LOBPCG pass vectors of the range: one projection, of the product, is enough.
        return project(apply(v.reshape(size, -1))).reshape(v.shape)

    precondition = iteration.precondition
    inverse = None if precondition is None else lambda v: project(precondition(v))
    start = project(rng.standard_normal((size, 1)))[:, 0]
    if not np.any(restricted(start)):  # Lanczos cannot start with an operator of zeros
        return _of_zeros(_range_vectors(size, k, project), k, floor, False, "LOBPCG")
    # three digits are enough: it only sets the scale of what counts as zero
    ends = lanczos_lowest(restricted, start, TOP_STEPS)
    largest = np.nan if ends is None else float(np.abs(ends[0]).max())
    # A block of a few more vectors than are wanted converges faster.
    vectors = project(rng.standard_normal((size, k if k == 1 else k + min(4, size // 10))))
    tolerance = LOBPCG_RESIDUAL * largest
    if iteration.soften is not None:
        vectors = _softened(vectors, iteration.soften(vectors))
        # above the lowest eigenvalue, mostly by less than a factor of two
        quotients = np.abs(_rayleigh(restricted, vectors, k)[0])
        tolerance = min(tolerance, _tolerance(quotients, largest, iteration))
    # The second run starts from the first one's vectors and has the tolerance that the lowest
    # eigenvalue sets, which is known only then.
    for _ in range(2):
        vectors = lobpcg(restricted, vectors, k, tolerance, 3000, inverse)
        vectors = project(np.asarray(vectors))
        pairs = _rayleigh(restricted, vectors, k)
        values, _, residuals = pairs
        tolerance = _tolerance(values, largest, iteration)
        if residuals.max() <= tolerance:
            break
    # LOBPCG sometimes breaks down and returns what it has, perhaps NaN, for which ``not <=`` holds.
    if not pairs[2].max() <= LOBPCG_RESIDUAL * largest:
        by_lanczos = _restarted_lanczos(restricted, project, start, k, largest)
        # a NaN compares false with anything: as infinity it loses
        pairs = min(pairs, by_lanczos, key=lambda p: np.nan_to_num(p[2], nan=np.inf).max())
    values, vectors, residuals = pairs
    accurate = residuals <= LOBPCG_RESIDUAL * largest
    _, zeros, hidden = _counts(values[accurate], largest, zero, floor)
    # An eigenvalue lies within its residual of the value: the whole interval must be negative.
    negative = int(np.sum(values < -max(zero * largest, floor) - residuals))
    return Spectrum(
        values=values,
        vectors=vectors,
        residuals=residuals,
        largest=largest,
        negative=negative,
        zero=zeros,
        hidden=hidden,
        floor=floor,
        counted=False,
        method="LOBPCG",
    )


def _tolerance(values: np.ndarray, largest: float, iteration: Iteration) -> float:
    """Return the residual of an eigenpair at which LOBPCG is to stop, from the lowest values."""
    return max(iteration.accuracy * float(np.abs(values).min()), 1e-9 * largest)


def _restarted_lanczos(
    restricted: Apply, project: Apply, start: np.ndarray, k: int, largest: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the k lowest eigenpairs by ARPACK's Lanczos method, in the form of :func:`_rayleigh`.

    Args:
      restricted: the function that multiplies P A P with vectors of the range of P.
      project: the projector P off the known null space of A.
      start: the first vector (size,), in the range of P.
      k: number of eigenpairs.
      largest: the largest eigenvalue.
    """
    size = len(start)

    def lifted(v: np.ndarray) -> np.ndarray:
        in_range = project(v.reshape(size, -1)).reshape(v.shape)
        return restricted(in_range) + 2.0 * largest * (v - in_range)

    # Lanczos may skip one of the last eigenvalues, so a few more than are wanted. Round-off brings
    # the known null space in: ``lifted`` moves it to the top of the spectrum.
    more = min(k + 4, size - 1)
    basis_size = min(size - 1, 40 + 2 * more)
    vectors = _eigsh(
        _linear_operator(size, lifted), more, which="SA", v0=start, ncv=basis_size, maxiter=500
    )[1]
    return _rayleigh(restricted, project(vectors), k)
