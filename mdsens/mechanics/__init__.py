"""This package computes the forces, the Hessian and the contact network of a configuration.

It also computes the null space of the Hessian, and the mechanical stability of the configuration.
"""

from mdsens.mechanics.contacts import Network, coordination, network, pair_forces
from mdsens.mechanics.hessian import dense_hessian, force, max_force, sparse_hessian
from mdsens.mechanics.unknowns import Unknowns

__all__ = [
    "Network",
    "Unknowns",
    "coordination",
    "dense_hessian",
    "force",
    "max_force",
    "network",
    "pair_forces",
    "sparse_hessian",
]
