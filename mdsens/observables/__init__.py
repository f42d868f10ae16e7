"""What is measured on a configuration: functions of a System, traceable and differentiable.

Each is a function of a ``System`` and of settings: ``ms.gradient(lambda s:
ms.observables.bond_order(s, 6, 1.5), eq)`` is its total derivative by all parameters, and
``jax.grad`` through ``ms.equilibrate`` gives the same.

What looks at pairs beyond the range of the potential takes ``pairs``: where None, the system's own list
where the potential reaches as far, or all pairs of up to 4,000 particles; beyond that, a list that
:func:`pairs_within` makes.
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
