"""Independent truth: derivatives by minimising again, the adjoint identity, and a law's own promises.

What checks ours checks a user's own potential.
"""

from mdsens.verify._adjoint import AdjointTest, adjoint
from mdsens.verify._difference_records import DerivativeTest, FiniteDifference
from mdsens.verify._differences import derivative_test, finite_difference
from mdsens.verify._laws import Finding, PotentialTest, potential
from mdsens.verify._unrolled import Unrolled, unrolled

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
