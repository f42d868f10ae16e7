"""Choice of a linear method by the size and the declared properties of an operator."""

from __future__ import annotations

import dataclasses

from jax import Array

from mdsens.implicit.linear.cg import CG
from mdsens.implicit.linear.direct import Direct
from mdsens.implicit.linear.gmres import GMRES
from mdsens.implicit.linear.method import Method, Round, check_method, check_rtol
from mdsens.implicit.linear.minres import MINRES
from mdsens.implicit.linear.operator import Operator

__all__ = ["Auto", "choose"]

# Largest number of unknowns for which Auto takes Direct. Measured on spring networks of 5.6 bonds
# a particle in 2-D, on two cores: at 512 unknowns Direct takes 13 ms, 10 of them to write the
# matrix out; CG takes 1.6 ms, in proportion to the root of the condition number; GMRES 9 ms. So up
# to this size the choice is for accuracy: the residual of Direct is 4e-15 at any condition number.
DIRECT_SIZE = 512


@dataclasses.dataclass(frozen=True)
class Auto(Method):
    """The linear method that :func:`choose` takes for the size and the properties of an operator.

    For the Hessian of a pair potential, :mod:`mdsens.sensitivity` uses a sparse factorization
    instead, if on a CPU and in double precision: in 2-D for any number of particles; in 3-D for up
    to 1,500 particles, or up to 4,000 with many right-hand sides at once. Both choices follow from
    the times and errors of all solvers in benchmarks/results/README.md, under "sensitivity" (by
    size and density) and "jamming" (by pressure).

    Args:
      rtol: requested relative residual.
    """

    rtol: float = 1e-10

    def __post_init__(self) -> None:
        check_rtol("Auto", self.rtol)

    def concrete(self, size: int, operator: Operator) -> Method:
        if size <= DIRECT_SIZE:
            return Direct(rtol=self.rtol)
        if operator.positive_semidefinite:
            return CG(rtol=self.rtol)
        return MINRES(rtol=self.rtol) if operator.symmetric else GMRES(rtol=self.rtol)

    def iteration(self, operator: Operator, b: Array) -> tuple[Round, int]:
        return self.concrete(b.size, operator).iteration(operator, b)


def choose(method: Method, size: int, operator: Operator) -> Method:
    """Choose the method that solves a linear system A x = b, for an operator A.

    Args:
      method: any linear method; a method other than :class:`Auto` is returned unchanged.
      size: number of unknowns in x.
      operator: A. Only the declared symmetry and definiteness are used; no product is evaluated.

    Returns:
      For Auto: Direct up to 512 unknowns; for more unknowns, CG where the operator is declared
      positive semi-definite, MINRES where it is declared symmetric, else GMRES.

    Raises:
      InputError: ``method`` is not a linear method, or gives wrong solutions for such an operator.
    """
    check_method(method)
    concrete = method.concrete(size, operator)
    concrete.check(operator)
    return concrete
