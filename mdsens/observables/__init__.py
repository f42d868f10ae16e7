"""Observables of a configuration: functions of a System, traceable and differentiable.

Each is a function of a ``System`` and of settings. ``ms.gradient(lambda s:
ms.observables.bond_order(s, 6, 1.5), eq)`` is its total derivative by all parameters, and
``jax.grad`` through ``ms.equilibrate`` gives the same.

Observables of pairs beyond the range of the potential have an argument ``pairs``. Where it is None,
they use the neighbor list of the system if the potential reaches as far, else all pairs of up to
4,000 particles. For more particles give a list made by :func:`pairs_within`.
"""

from mdsens.observables.charges import charges, chemical_potential, dipole, induced_dipoles
from mdsens.observables.pairs import pairs_within
from mdsens.observables.state import (
    coordination,
    energy,
    packing_fraction,
    pressure,
    smooth_coordination,
    stress,
    volume,
)
from mdsens.observables.structure import (
    bond_order,
    bond_orientation,
    distance_to,
    distances,
    radial_distribution,
)

__all__ = [
    "bond_order",
    "bond_orientation",
    "charges",
    "chemical_potential",
    "coordination",
    "dipole",
    "distance_to",
    "distances",
    "energy",
    "induced_dipoles",
    "packing_fraction",
    "pairs_within",
    "pressure",
    "radial_distribution",
    "smooth_coordination",
    "stress",
    "volume",
]
