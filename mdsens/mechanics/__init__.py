"""Derivatives of the energy at a configuration: forces, Hessian, contact network, null space."""

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
