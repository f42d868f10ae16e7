"""Implicit differentiation of any solver's root, and the linear solves behind it. Knows no particle."""

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
from mdsens.implicit.root import fixed_point, root
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
    "SolveStats",
    "Status",
    "TooLargeError",
    "UnsupportedVersionError",
    "choose",
    "fixed_point",
    "linear_solve",
    "raise_for_status",
    "root",
    "solve",
]
