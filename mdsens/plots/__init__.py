"""Figures: the sensitivity of every particle, a derivative's test, the softest modes. They compute nothing costly."""

from mdsens.plots._curves import derivative_test, stiffness_spectrum
from mdsens.plots._map import sensitivity_map

__all__ = ["derivative_test", "sensitivity_map", "stiffness_spectrum"]
