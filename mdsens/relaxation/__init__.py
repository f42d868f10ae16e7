"""Relaxation of a system to a minimum of its energy or enthalpy."""

from mdsens.relaxation.cell_conditions import AtPressure, AtStress, AtVolume, FixedCell
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.relaxation.jax_md import JaxMD
from mdsens.relaxation.methods import Fire, GradientDescent, Newton
from mdsens.relaxation.minimization import minimize

__all__ = [
    "AtPressure",
    "AtStress",
    "AtVolume",
    "Equilibrium",
    "Fire",
    "FixedCell",
    "GradientDescent",
    "JaxMD",
    "Newton",
    "minimize",
]
