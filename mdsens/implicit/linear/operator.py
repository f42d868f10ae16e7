"""A square linear map on pytrees, and what is declared of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax

from mdsens._util.errors import InputError
from mdsens._util.pytree import PyTree

__all__ = ["LinearMap", "Operator", "SymmetricScaling"]

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
      scaling: a change of unknowns that makes a symmetric A better conditioned; None for none. CG,
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
                f"scaling={self.scaling!r} on an operator with symmetric=False; declare it"
                " symmetric, or leave it out"
            )
        if self.scaling is not None and self.preconditioner is not None:
            raise InputError(
                f"scaling={self.scaling!r} and preconditioner={self.preconditioner!r} both"
                " precondition; leave one out"
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
        """The transposed operator; ``example`` is a tree of arrays or shapes like the unknowns."""
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
