"""Independent truth: derivatives by minimizing again, the adjoint identity, and a potential's own
promises.

What checks ours checks a user's own potential.
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
