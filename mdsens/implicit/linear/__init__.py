"""Solution of linear systems with a known null space, and computation of lowest eigenvalues."""

from mdsens.implicit.linear.auto import Auto, choose
from mdsens.implicit.linear.bicgstab import BiCGSTAB
from mdsens.implicit.linear.cg import CG
from mdsens.implicit.linear.direct import Direct, LeastSquares
from mdsens.implicit.linear.gmres import GMRES
from mdsens.implicit.linear.method import Method, check_method
from mdsens.implicit.linear.minres import MINRES
from mdsens.implicit.linear.neumann import Neumann
from mdsens.implicit.linear.normal_cg import NormalCG
from mdsens.implicit.linear.operator import LinearMap, Operator, SymmetricScaling
from mdsens.implicit.linear.result import Result, SolveStats
from mdsens.implicit.linear.solution import linear_solve, solve

__all__ = [
    "CG",
    "GMRES",
    "MINRES",
    "Auto",
    "BiCGSTAB",
    "Direct",
    "LeastSquares",
    "LinearMap",
    "Method",
    "Neumann",
    "NormalCG",
    "Operator",
    "Result",
    "SolveStats",
    "SymmetricScaling",
    "check_method",
    "choose",
    "linear_solve",
    "solve",
]
