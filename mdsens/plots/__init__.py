"""Figures of sensitivities, derivative tests, softest modes, moduli, designs and other numbers.

The functions draw results that were computed before, and compute little themselves.
"""

from mdsens.plots.curves import derivative_test, stiffness_spectrum, unrolled
from mdsens.plots.design import before_after, design_history, feature_response
from mdsens.plots.maps import sensitivity_map
from mdsens.plots.moduli import moduli, nonaffine_field
from mdsens.plots.scalars import histogram, scalar_map

__all__ = [
    "before_after",
    "derivative_test",
    "design_history",
    "feature_response",
    "histogram",
    "moduli",
    "nonaffine_field",
    "scalar_map",
    "sensitivity_map",
    "stiffness_spectrum",
    "unrolled",
]
