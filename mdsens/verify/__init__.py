"""Independent checks: finite differences, the adjoint identity, properties of a potential.

The derivatives of this package are checked by minimizing again, and its potentials are tested for
the properties that they declare, such as breakpoints. The same checks serve for a user's own
potential.
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
