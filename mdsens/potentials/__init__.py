"""Interaction potentials with named, checked parameters: pair, bonded, many-body, and sums."""

from mdsens.potentials import catalogue
from mdsens.potentials.base import BondedPotential, EnergyPotential, PairPotential, SumPotential
from mdsens.potentials.catalogue import *  # noqa: F403 - a new potential is added in one file
from mdsens.potentials.electrostatics import (
    ChargeEquilibration,
    InducedDipoles,
    charge_equilibration,
    induced_dipoles,
)
from mdsens.potentials.embedded_atom import eam, finnis_sinclair, gupta
from mdsens.potentials.local import (
    EdgePotential,
    Edges,
    LocalPotential,
    from_edges,
    from_local,
)
from mdsens.potentials.stillinger_weber import stillinger_weber
from mdsens.potentials.tersoff import tersoff

__all__ = [
    "BondedPotential",
    "ChargeEquilibration",
    "EdgePotential",
    "Edges",
    "EnergyPotential",
    "InducedDipoles",
    "LocalPotential",
    "PairPotential",
    "SumPotential",
    "charge_equilibration",
    "eam",
    "finnis_sinclair",
    "from_edges",
    "from_local",
    "gupta",
    "induced_dipoles",
    "stillinger_weber",
    "tersoff",
]
__all__ += catalogue.__all__
