"""What a linear system is, and what one may ask of its solver: the operator, and a frozen record
for each method.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax

from mdsens._util.errors import InputError, short
from mdsens._util.pytree import PyTree

__all__ = [
    "CG",
    "GMRES",
    "MINRES",
    "Auto",
    "BiCGSTAB",
    "Direct",
    "SymmetricScaling",
    "LeastSquares",
    "LinearMap",
    "Method",
    "Neumann",
    "NormalCG",
    "Operator",
    "check_method",
    "choose",
]

LinearMap: TypeAlias = Callable[[PyTree], PyTree]


class SymmetricScaling(NamedTuple):
    """A symmetric preconditioner, S^T S for A^-1, in a form that needs no product with it in an
    iteration.

    Attributes:
      map: v -> S v, invertible and linear, into a tree of its own: S the inverse of the root of A's
        diagonal, or of the Cholesky factors of its diagonal blocks.
      matvec: w -> S A S^T w on that tree. Nothing is projected between two of these: where A has a
        null space, what this gives must lie off that of S A S^T to round-off, which it does where
        it is a symmetric matrix to round-off.
    """

    map: LinearMap
    matvec: LinearMap


@dataclasses.dataclass(frozen=True)
class Operator:
    """A square linear map on pytrees, what is known of it, and its null space.

    Attributes:
      matvec: v -> A v, both with the tree and shapes of the unknowns; linear in v, traceable.
      symmetric: A equals its transpose. Declared, not checked.
      positive_semidefinite: no direction has negative curvature; implies ``symmetric``.
      project: orthogonal projector off the right null space of A, a symmetric linear map; None
        where there is none. It must be complete: along a null direction left out, the answer is
        arbitrary where the right-hand side has next to nothing there, and the solve fails where it
        has more.
      left_project: the same for the left null space; ``project`` where None, which is right for a
        symmetric A.
      even: a change of unknowns that makes a symmetric A better conditioned; None for none. CG,
        MINRES, BiCGSTAB and GMRES then run on S A S^T; residuals are of A all the same. For a
        symmetric A that can be written out scaled, as an assembled Hessian can: no product with a
        preconditioner is left, and Chebyshev's polynomial goes on top.
      preconditioner: v -> M v, linear, a rough inverse of A on the unknowns' tree, for an A that is
        known only by its products or is not symmetric; None for none. It changes the iterations,
        never the answer: GMRES, BiCGSTAB and Neumann solve A M y = b, x = M y, and the transposed
        system with the transpose of M; CG and MINRES take their inner products by M, which must be
        symmetric positive definite (BREAKDOWN where it shows that it is not). Polynomials of A
        (``degree``) are left out beside it. Direct has no use for it; NormalCG and LeastSquares
        leave it and ``scaling`` out, since in other unknowns another solution is the shortest.
    """

    matvec: LinearMap
    symmetric: bool = False
    positive_semidefinite: bool = False
    project: LinearMap | None = None
    left_project: LinearMap | None = None
    scaling: SymmetricScaling | None = None
    preconditioner: LinearMap | None = None

    def __post_init__(self) -> None:
        if self.positive_semidefinite and not self.symmetric:
            object.__setattr__(self, "symmetric", True)
        if self.scaling is not None and not self.symmetric:
            raise InputError(
                f"scaling={self.scaling!r} on an operator with symmetric=False; declare it symmetric, or"
                " leave it out"
            )
        if self.scaling is not None and self.preconditioner is not None:
            raise InputError(
                f"scaling={self.scaling!r} and preconditioner={self.preconditioner!r} both precondition;"
                " leave one out"
            )
        if self.left_project is not None and self.left_project is not self.project:
            if self.symmetric:
                raise InputError(
                    f"left_project={self.left_project!r} differs from project on a symmetric"
                    " operator, whose two null spaces are one; leave left_project out, or declare"
                    " symmetric=False"
                )
        else:
            object.__setattr__(self, "left_project", self.project)

    def transpose(self, example: PyTree) -> Operator:
        """The transposed operator; ``example`` is an array tree (or its shapes) like the unknowns."""
        if self.symmetric:
            return self

        def transposed(f: LinearMap) -> LinearMap:
            return lambda w: jax.linear_transpose(f, example)(w)[0]

        return Operator(
            transposed(self.matvec),
            project=self.left_project,
            left_project=self.project,
            preconditioner=None if self.preconditioner is None else transposed(self.preconditioner),
        )


def _check_rtol(name: str, rtol: float) -> None:
    if not (isinstance(rtol, int | float) and 0.0 < rtol < 1.0):
        raise InputError(
            f"{name}: rtol={rtol!r} is no relative residual; give a number between 0 and 1, such as"
            " 1e-10"
        )


def _check_count(name: str, field: str, value: int | None) -> None:
    if value is not None and not (
        isinstance(value, int) and not isinstance(value, bool) and value >= 1
    ):
        raise InputError(
            f"{name}: {field}={value!r} is no count; give a whole number of at least 1"
        )


@dataclasses.dataclass(frozen=True)
class _Iterative:
    rtol: float = 1e-10
    max_iterations: int | None = None

    def __post_init__(self) -> None:
        _check_rtol(type(self).__name__, self.rtol)
        _check_count(type(self).__name__, "max_iterations", self.max_iterations)


@dataclasses.dataclass(frozen=True)
class CG(_Iterative):
    """Conjugate gradients: the fastest where the operator is positive semi-definite; refuses any
    other.

    Args:
      rtol: relative residual asked for. Residual is not error, the condition number stands between:
        lower it to 1e-13 near unjamming.
      max_iterations: operator applications; 10 times the number of unknowns, at least 1,000, where
        None.
      degree: of the polynomial of the operator that preconditions, see
        :func:`mdsens.implicit.linear._polynomials.chebyshev`. One is none: it saves inner products,
        not applications.
    """

    degree: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("CG", "degree", self.degree)


@dataclasses.dataclass(frozen=True)
class MINRES(_Iterative):
    """Minimal residuals on the Lanczos recurrence: for a symmetric operator that may be indefinite.

    Args:
      rtol: relative residual asked for, as in :class:`CG`.
      max_iterations: operator applications; 10 times the number of unknowns, at least 1,000, where
        None.
    """


@dataclasses.dataclass(frozen=True)
class BiCGSTAB(_Iterative):
    """Stabilized bi-conjugate gradients: any operator, little memory, but it may break down; GMRES
    where it does.

    Args:
      rtol: relative residual asked for, as in :class:`CG`.
      max_iterations: operator applications (two a step); 10 times the number of unknowns, at least
        1,000, where None.
    """


@dataclasses.dataclass(frozen=True)
class GMRES(_Iterative):
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
        _check_count("GMRES", "restart", self.restart)
        _check_count("GMRES", "degree", self.degree)


@dataclasses.dataclass(frozen=True)
class NormalCG(_Iterative):
    """Conjugate gradients on A^T A x = A^T b, for any operator: the shortest of the x that make |b
    - A x| least.

    In the form that never squares the residual (CGLS; Björck, *Numerical Methods for Least Squares
    Problems*, 1996, section 7.4). It needs no null space declared. Where b lies outside of A's
    range, |A^T r| falls to ``rtol`` |A| |r| above a residual r that cannot: status SINGULAR. It
    cannot tell a unique answer from the shortest of many, which LeastSquares does, and its steps go
    by the condition number where those of GMRES or MINRES go by less: for an operator that may be
    singular and is too large to write out.

    Args:
      rtol: relative residual asked for, as in :class:`CG`. Of a least-squares solution the error is
        up to the square of the condition number times as large.
      max_iterations: applications of A and of A^T together (two a step); 10 times the number of
        unknowns, at least 1,000, where None.
    """


@dataclasses.dataclass(frozen=True)
class Neumann(_Iterative):
    """Neumann's series, x = sum over k of alpha (I - alpha A)^k b, for A = I - C with C a
    contraction: a fixed point's.

    One application a term and two vectors of memory. The rest falls by |I - alpha A| a term, which
    must be below one; where the series grows or stands the status is STAGNATED.

    Args:
      rtol: relative residual asked for, as in :class:`CG`.
      max_iterations: operator applications; 10 times the number of unknowns, at least 1,000, where
        None.
      alpha: the step. One suits a fixed point; for a symmetric positive definite A anything below 2
        over its largest eigenvalue converges, and 2 / (largest + smallest) fastest.
      terms: sum exactly so many terms, for a cheap and rough answer: where its residual is above
        ``rtol`` the status says that it is cut off (MAX_STEPS_REACHED), or worse than none
        (STAGNATED). None for as many as ``rtol`` takes.

    Source: Lorraine, Vicol and Duvenaud, *Optimizing Millions of Hyperparameters by Implicit
    Differentiation*, arXiv:1911.02590.
    """

    alpha: float = 1.0
    terms: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("Neumann", "terms", self.terms)
        if not (
            isinstance(self.alpha, int | float) and math.isfinite(self.alpha) and self.alpha != 0
        ):
            raise InputError(
                f"Neumann: alpha={self.alpha!r} is no step; give a finite number other than zero,"
                " such as 1"
            )


@dataclasses.dataclass(frozen=True)
class LeastSquares:
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
        _check_rtol("LeastSquares", self.rtol)
        share = self.rank_tolerance
        if share is not None and not (isinstance(share, int | float) and 0.0 <= share < 1.0):
            raise InputError(
                f"LeastSquares: rank_tolerance={share!r} is no share; give a number from 0 to 1,"
                " such as 1e-8"
            )


@dataclasses.dataclass(frozen=True)
class Direct:
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
        _check_rtol("Direct", self.rtol)


@dataclasses.dataclass(frozen=True)
class Auto:
    """Let :func:`choose` pick by size, symmetry, definiteness and number of right-hand sides.

    For a potential of pairs, :mod:`mdsens.sensitivity` takes the sparse factor of the Hessian instead, on
    a CPU, in double precision and up to 1,500 particles in 3-D, 4,000 for many right-hand sides at
    once. Both rest on the times and errors of every solver in benchmarks/results/README.md, under
    "sensitivity" (by size and density) and "jamming" (by pressure).

    Args:
      rtol: relative residual asked for, as in :class:`CG`.
    """

    rtol: float = 1e-10

    def __post_init__(self) -> None:
        _check_rtol("Auto", self.rtol)


Method: TypeAlias = (
    GMRES | CG | MINRES | BiCGSTAB | NormalCG | Neumann | Direct | LeastSquares | Auto
)

# Measured on spring networks of 5.6 bonds a particle in 2-D, two cores: at 512 unknowns Direct
# takes 13 ms, 10 of them to write the matrix out, and each further right-hand side next to nothing;
# CG 1.6 ms for one, 90 for 32, and in proportion to the root of the condition number; GMRES 9 ms.
# So up to here the choice is accuracy: the residual of Direct is 4e-15 whatever the condition
# number. At 1,024 they cross near 64 right-hand sides.
_DIRECT_SIZE, _DIRECT_SIZE_SHARED, _UNKNOWNS_PER_RHS = 512, 2048, 16


def check_method(solve: Any) -> None:
    """Refuse what is no option record of a linear solver."""
    if not isinstance(solve, Method):
        given = (
            f"the class {solve.__name__}, without brackets"
            if isinstance(solve, type)
            else short(solve)
        )
        raise InputError(
            f"solve is {given}: give Auto(), Direct(), CG(), MINRES(), GMRES(), BiCGSTAB(),"
            " NormalCG(), Neumann() or LeastSquares() of mdsens.implicit."
        )


def choose(method: Method, size: int, operator: Operator, rhs: int = 1) -> Method:
    """The concrete method that ``method`` stands for.

    Args:
      method: any option record; all but :class:`Auto` come back as they are.
      size: number of unknowns.
      operator: its declared symmetry and definiteness count, nothing is evaluated.
      rhs: right-hand sides that will share one factorization.

    Returns:
      Direct up to 512 unknowns, up to 2,048 where at least one right-hand side for 16 unknowns
      shares the factor; beyond, CG, MINRES or GMRES by what the operator declares.

    Raises:
      InputError: ``method`` is no option record.
    """
    check_method(method)
    if not isinstance(method, Auto):
        return method
    if size <= (_DIRECT_SIZE_SHARED if rhs * _UNKNOWNS_PER_RHS >= size else _DIRECT_SIZE):
        return Direct(rtol=method.rtol)
    if operator.positive_semidefinite:
        return CG(rtol=method.rtol)
    return MINRES(rtol=method.rtol) if operator.symmetric else GMRES(rtol=method.rtol)
