"""A square linear map A, known by its products A v, with its symmetry, null space and scaling."""

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
    """A preconditioner S^T S of a symmetric A, used as the change of unknowns x = S^T w.

    S^T S approximates A^-1. An iteration for w uses S A S^T, and needs no product with S^T S.

    Attributes:
      map: function v -> S v, linear and invertible; S v may be a tree of other shapes than v. S is
        for example the inverse square root of the diagonal of A, or the inverse of the Cholesky
        factors of the diagonal blocks of A.
      matvec: function w -> S A S^T w, for w with the tree and shapes of S v. An iteration does not
        project between two of these products. So where A has a null space, the product must be
        orthogonal to the null space of S A S^T to round-off. This is so where S A S^T is a
        symmetric matrix to round-off.
    """

    map: LinearMap
    matvec: LinearMap


@dataclasses.dataclass(frozen=True)
class Operator:
    """The square matrix A of a linear system A x = b, known by its products, with its null space.

    x and b are arrays, or nested containers (trees) of arrays.

    Attributes:
      matvec: the function v -> A v, where v and A v have the tree and shapes of x; linear in v and
        traceable by jax.
      symmetric: whether A equals its transpose. This is declared by the user and not checked.
      positive_semidefinite: whether no direction has negative curvature; implies ``symmetric``.
      project: orthogonal projector that removes the right null space of A, a symmetric linear map;
        None where A has no null space. The projector must remove the whole null space. Along a null
        direction that is not removed, the solution is arbitrary where the right-hand side has
        almost no component along this direction; the solve fails where the component is larger.
      left_project: orthogonal projector that removes the left null space; where None, ``project``,
        which is right for a symmetric A.
      scaling: a :class:`SymmetricScaling` S, a change of unknowns x = S^T w that makes a symmetric
        A better conditioned; None for none. CG, MINRES, BiCGSTAB and GMRES then run on S A S^T;
        residuals are still those of A. A scaling is for a symmetric A for which S A S^T can be
        computed, such as an assembled Hessian. Then no products with a preconditioner are needed,
        and the Chebyshev polynomial preconditioner may be used as well.
      preconditioner: the function v -> M v, linear, with M an approximate inverse of A; None for
        none. A preconditioner is for an A that is known only by its products, or is not symmetric.
        M changes the iterations, not the solution. GMRES, BiCGSTAB and Neumann solve A M y = b for
        x = M y, and the transposed system with the transpose of M. CG and MINRES use M in their
        inner products. For CG and MINRES, M must be symmetric and positive definite; the result is
        BREAKDOWN where an inner product shows that M is not. With M, the polynomial preconditioner
        of CG and GMRES (their option ``degree``) is not used. Direct does not need M. NormalCG and
        LeastSquares use neither M nor ``scaling``, since in other unknowns another solution is the
        shortest.
    """

    matvec: LinearMap
    symmetric: bool = False
    positive_semidefinite: bool = False
    project: LinearMap | None = None
    left_project: LinearMap | None = None
    scaling: SymmetricScaling | None = None
    preconditioner: LinearMap | None = None

    def __post_init__(self) -> None:
        # A frozen dataclass sets its fields in ``__post_init__`` by object.__setattr__.
        if self.positive_semidefinite and not self.symmetric:
            object.__setattr__(self, "symmetric", True)
        if self.scaling is not None and not self.symmetric:
            raise InputError(
                f"scaling={self.scaling!r} is given for an operator with symmetric=False; set"
                " symmetric=True if the operator is symmetric, or leave scaling out"
            )
        if self.scaling is not None and self.preconditioner is not None:
            raise InputError(
                f"scaling={self.scaling!r} and preconditioner={self.preconditioner!r} are both"
                " given, and both precondition the operator; leave one of the two out"
            )
        if self.left_project is not None and self.left_project is not self.project:
            if self.symmetric:
                raise InputError(
                    f"left_project={self.left_project!r} differs from project={self.project!r}, but"
                    " the left and right null space of a symmetric operator are equal; leave"
                    " left_project out, or set symmetric=False"
                )
        else:
            # The same object, by which Direct knows that the two null spaces are equal.
            object.__setattr__(self, "left_project", self.project)

    def transpose(self, example: PyTree) -> Operator:
        """Return the transposed operator A^T, with the left and right null space exchanged.

        ``example`` is a tree of arrays, or of shapes, like the right-hand side b of A x = b.
        """
        if self.symmetric:
            return self

        def transposed(f: LinearMap) -> LinearMap:
            return lambda w: jax.linear_transpose(f, example)(w)[0]

        # There is no scaling to pass on: only a symmetric operator has one.
        return Operator(
            transposed(self.matvec),
            project=self.left_project,
            left_project=self.project,
            preconditioner=None if self.preconditioner is None else transposed(self.preconditioner),
        )
