"""Independent checks of derivatives of relaxed positions, and of potentials.

Derivatives are checked by minimizing again at changed parameters (finite differences), and by the
adjoint identity between forward and reverse mode. Potentials, a user's own included, are tested for
the properties that they declare, such as breakpoints (the distances at which a derivative of the
potential jumps or diverges).
"""

from mdsens.verify.adjoint_test import AdjointTest, adjoint
from mdsens.verify.finite_differences import derivative_test, finite_difference
from mdsens.verify.potential_test import Finding, PotentialTest, potential
from mdsens.verify.records import DerivativeTest, FiniteDifference
from mdsens.verify.unrolling import Unrolled, unrolled

__all__ = [
    "AdjointTest",
    "DerivativeTest",
    "Finding",
    "FiniteDifference",
    "PotentialTest",
    "Unrolled",
    "adjoint",
    "derivative_test",
    "finite_difference",
    "potential",
    "unrolled",
]
