"""Figures: the sensitivity of every particle, a derivative's test, the softest modes, moduli. They compute little."""

from mdsens.plots._curves import derivative_test, stiffness_spectrum
from mdsens.plots._map import sensitivity_map
from mdsens.plots._moduli import moduli

__all__ = ["derivative_test", "moduli", "sensitivity_map", "stiffness_spectrum"]
