"""Derivatives of a root of F(x, theta) = 0 that any solver returns, and the linear solves for them.

The modules of this package are mathematics alone: nothing in them is about particles.
"""

from mdsens._util.errors import (
    ConvergenceError,
    InputError,
    MdsensError,
    PrecisionError,
    TooLargeError,
    UnsupportedVersionError,
    raise_for_status,
)
from mdsens.implicit.conditions import conic, degeneracy, optimality, projections, proximal
from mdsens.implicit.linear import (
    CG,
    GMRES,
    MINRES,
    Auto,
    BiCGSTAB,
    Direct,
    LeastSquares,
    Method,
    Neumann,
    NormalCG,
    Operator,
    SymmetricScaling,
    choose,
)
from mdsens.implicit.linear.result import Result, SolveStats
from mdsens.implicit.linear.solution import linear_solve, solve
from mdsens.implicit.root import fixed_point, root, tangent
from mdsens.implicit.root_certificate import RootCertificate, certify

__all__ = [
    "CG",
    "GMRES",
    "MINRES",
    "Auto",
    "BiCGSTAB",
    "ConvergenceError",
    "Direct",
    "SymmetricScaling",
    "InputError",
    "LeastSquares",
    "MdsensError",
    "Method",
    "Neumann",
    "NormalCG",
    "Operator",
    "PrecisionError",
    "RootCertificate",
    "SolveStats",
    "Result",
    "TooLargeError",
    "UnsupportedVersionError",
    "certify",
    "choose",
    "conic",
    "degeneracy",
    "fixed_point",
    "linear_solve",
    "optimality",
    "projections",
    "proximal",
    "raise_for_status",
    "root",
    "solve",
    "tangent",
]
