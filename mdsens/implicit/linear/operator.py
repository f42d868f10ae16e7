"""A square linear map on pytrees, with its declared properties."""

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
    """A symmetric preconditioner S^T S, an approximation of A^-1, as a change of unknowns.

    With this form an iteration needs no product with the preconditioner.

    Attributes:
      map: function v -> S v, linear and invertible; S v may have another tree than v. S is for
        example the inverse square root of the diagonal of A, or the inverse of the Cholesky factors
        of its diagonal blocks.
      matvec: function w -> S A S^T w, on the tree of S v. An iteration does not project between two
        of these products. So where A has a null space, the product must be orthogonal to the null
        space of S A S^T to round-off. This is so where S A S^T is a symmetric matrix to round-off.
    """

    map: LinearMap
    matvec: LinearMap


@dataclasses.dataclass(frozen=True)
class Operator:
    """A square linear map A on pytrees, with its declared properties and its null space.

    Attributes:
      matvec: v -> A v, both with the tree and shapes of the unknowns; linear in v, traceable.
      symmetric: A equals its transpose. This is declared by the user and not checked.
      positive_semidefinite: no direction has negative curvature; implies ``symmetric``.
      project: orthogonal projector off the right null space of A, a symmetric linear map; None
        where A has no null space. The projector must remove the whole null space. Along a null
        direction that it leaves in, the solution is arbitrary where the right-hand side has almost
        no component along this direction, and the solve fails where the component is larger.
      left_project: orthogonal projector off the left null space; where None, ``project``, which is
        right for a symmetric A.
      scaling: a change of unknowns that makes a symmetric A better conditioned; None for none. CG,
        MINRES, BiCGSTAB and GMRES then run on S A S^T; residuals are still those of A. A scaling is
        for a symmetric A whose scaled matrix can be computed, such as an assembled Hessian. Then no
        products with a preconditioner are needed, and the Chebyshev polynomial may be used as well.
      preconditioner: v -> M v, linear, an approximate inverse of A on the tree of the unknowns;
        None for none. A preconditioner is for an A that is known only by its products, or is not
        symmetric. It changes the iterations, not the solution. GMRES, BiCGSTAB and Neumann solve A
        M y = b for x = M y, and the transposed system with the transpose of M. CG and MINRES use M
        in their inner products. There M must be symmetric and positive definite; the result is
        BREAKDOWN where an inner product shows that it is not. Beside M no polynomial of A
        (``degree``) is used. Direct does not need it. NormalCG and LeastSquares use neither it nor
        ``scaling``, since in other unknowns another solution is the shortest.
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
                f"scaling={self.scaling!r} on an operator with symmetric=False; declare it"
                " symmetric, or leave it out"
            )
        if self.scaling is not None and self.preconditioner is not None:
            raise InputError(
                f"scaling={self.scaling!r} and preconditioner={self.preconditioner!r} both"
                " precondition; leave one of them out"
            )
        if self.left_project is not None and self.left_project is not self.project:
            if self.symmetric:
                raise InputError(
                    f"left_project={self.left_project!r} differs from project on a symmetric"
                    " operator, whose two null spaces are one; leave left_project out, or declare"
                    " symmetric=False"
                )
        else:
            # The same object, by which Direct knows that the two null spaces are equal.
            object.__setattr__(self, "left_project", self.project)

    def transpose(self, example: PyTree) -> Operator:
        """Return the transposed operator; ``example`` is a tree of arrays or shapes like b."""
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
