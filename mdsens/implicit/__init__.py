"""Implicit differentiation of any solver's root, and the linear solves behind it. Knows no particle."""

from mdsens.implicit import conic, degeneracy, optimality, projections, proximal
from mdsens.implicit.evidence import RootCertificate, certify
from mdsens.implicit.linear import linear_solve, solve
from mdsens.implicit.operators import (
    CG,
    GMRES,
    MINRES,
    Auto,
    BiCGSTAB,
    Direct,
    Evening,
    LeastSquares,
    Method,
    Neumann,
    NormalCG,
    Operator,
    choose,
)
from mdsens.implicit.root import fixed_point, root, tangent
from mdsens.implicit.status import (
    ConvergenceError,
    InputError,
    MdsensError,
    PrecisionError,
    SolveStats,
    Status,
    TooLargeError,
    UnsupportedVersionError,
    raise_for_status,
)

__all__ = [
    "CG",
    "GMRES",
    "MINRES",
    "Auto",
    "BiCGSTAB",
    "ConvergenceError",
    "Direct",
    "Evening",
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
    "Status",
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
