"""Relaxation of a system to a minimum of its energy or enthalpy."""

from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.relaxation.jax_md import JaxMD
from mdsens.relaxation.methods import Fire, GradientDescent, Newton
from mdsens.relaxation.minimization import minimize
from mdsens.relaxation.options import AtPressure, FixedCell

__all__ = [
    "AtPressure",
    "Equilibrium",
    "Fire",
    "FixedCell",
    "GradientDescent",
    "JaxMD",
    "Newton",
    "minimize",
]
