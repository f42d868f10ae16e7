"""Interaction potentials with named, checked parameters: pair, bonded, many-body, and sums."""

from mdsens.potentials.base import BondedPotential, EnergyPotential, PairPotential, SumPotential
from mdsens.potentials.catalogue import (
    from_energy,
    from_pair,
    geometric,
    harmonic_bonds,
    harmonic_morse,
    lennard_jones,
    morse,
    soft_sphere,
    switched,
)
from mdsens.potentials.electrostatics import (
    ChargeEquilibration,
    InducedDipoles,
    charge_equilibration,
    induced_dipoles,
)

__all__ = [
    "BondedPotential",
    "ChargeEquilibration",
    "EnergyPotential",
    "InducedDipoles",
    "PairPotential",
    "SumPotential",
    "charge_equilibration",
    "from_energy",
    "from_pair",
    "geometric",
    "harmonic_bonds",
    "harmonic_morse",
    "induced_dipoles",
    "lennard_jones",
    "morse",
    "soft_sphere",
    "switched",
]
