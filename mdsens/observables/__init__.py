"""Observables of a configuration: functions of a System that jax can differentiate and compile.

Each observable is a function of a ``System`` and of settings. For example ``ms.gradient(lambda s:
ms.observables.bond_order(s, 6, 1.5), eq)``, with a minimum eq from ``ms.minimize``, is the total
derivative of the bond order by all parameters; ``jax.grad`` through ``ms.equilibrate`` gives the
same derivative.

Observables of pairs beyond the range of the potential have an argument ``pairs``. Where ``pairs``
is None, they use the neighbor list of the system if the range of the potential covers that of the
observable, else all pairs of up to 4,000 particles. For more particles give a list made by
:func:`pairs_within`.
"""

from mdsens.observables import state, structure
from mdsens.observables.charges import charges, chemical_potential, dipole, induced_dipoles
from mdsens.observables.pairs import pairs_within
from mdsens.observables.state import *  # noqa: F403 - a new observable is added in one file
from mdsens.observables.structure import *  # noqa: F403

__all__ = ["charges", "chemical_potential", "dipole", "induced_dipoles", "pairs_within"]
__all__ += state.__all__
__all__ += structure.__all__
