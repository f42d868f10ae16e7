"""The choice of a linear method by size and by what the operator declares."""

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

# Measured on spring networks of 5.6 bonds a particle in 2-D, two cores: at 512 unknowns Direct
# takes 13 ms, 10 of them to write the matrix out; CG 1.6 ms, and in proportion to the root of the
# condition number; GMRES 9 ms. So up to here the choice is for accuracy: the residual of Direct is
# 4e-15 whatever the condition number.
DIRECT_SIZE = 512


@dataclasses.dataclass(frozen=True)
class Auto(Method):
    """The method chosen by :func:`choose` from the size, symmetry and definiteness of the operator.

    For pair potentials, :mod:`mdsens.sensitivity` takes the sparse factor of the Hessian instead,
    on a CPU, in double precision and up to 1,500 particles in 3-D, 4,000 for many right-hand sides
    at once. Both rest on the times and errors of every solver in benchmarks/results/README.md, under
    "sensitivity" (by size and density) and "jamming" (by pressure).

    Args:
      rtol: relative residual asked for, as in :class:`CG`.
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
    """The concrete method that ``method`` stands for.

    Args:
      method: any option record; all but :class:`Auto` come back as they are.
      size: number of unknowns.
      operator: its declared symmetry and definiteness count, nothing is evaluated.

    Returns:
      Direct up to 512 unknowns; beyond, CG, MINRES or GMRES by what the operator declares.

    Raises:
      InputError: ``method`` is no option record, or gives wrong answers for such an operator.
    """
    check_method(method)
    concrete = method.concrete(size, operator)
    concrete.check(operator)
    return concrete
