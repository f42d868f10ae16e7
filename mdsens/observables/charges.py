"""Charges and dipoles of a configuration, for potentials that have them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mdsens._util.compilation import compiled
from mdsens._util.errors import InputError
from mdsens._util.precision import full_precision
from mdsens.model.system import System
from mdsens.observables.pairs import single
from mdsens.potentials.base import Potential
from mdsens.potentials.electrostatics import ChargeEquilibration, InducedDipoles

__all__ = ["charges", "chemical_potential", "dipole", "induced_dipoles"]


@compiled
def charges(system: System) -> jax.Array:
    """Return the charge q of each particle, (n,).

    For a potential of induced dipoles these are the fixed charges among the parameters; for a
    potential of charge equilibration they are the charges that minimize the energy.

    Raises:
      InputError: the system's potential has no charges.
    """
    return _moments(system)[0]


@compiled
def induced_dipoles(system: System) -> jax.Array:
    """Return the induced dipole of each particle, (n, d), in units of charge times length.

    The dipoles are zero for a potential of charge equilibration.

    Raises:
      InputError: the system's potential has no charges.
    """
    return _moments(system)[1]


@compiled
@full_precision
def dipole(system: System) -> jax.Array:
    """Compute the total dipole moment (d,), sum over particles of q_i (r_i - r_c) + mu_i.

    q_i are the charges, mu_i the induced dipoles, r_i the positions and r_c their mean; for a
    neutral cluster the dipole moment does not depend on r_c. The unit is charge times length.
    Without a cell the orientation of a relaxed cluster is arbitrary, so that only
    rotation-invariant functions of the dipole moment have a derivative: take
    ``jnp.sum(dipole**2)``, not a component.

    Raises:
      InputError: the system's potential has no charges.
    """
    charge, induced = _moments(system)
    # relative to the centroid, so that the dipole of a charged cluster does not change with a
    # translation
    arms = system.positions - jnp.mean(system.positions, axis=0)
    return charge @ arms + jnp.sum(induced, axis=0)


@compiled
def chemical_potential(system: System) -> jax.Array:
    """Compute the chemical potential of charge, the derivative of the energy by the total charge.

    It is the electronegativity that all particles share at equilibrium, an energy per charge.

    Raises:
      InputError: the system's potential has no charge equilibration, or is a sum in which more
        than one term is a charge equilibration.
    """
    # each charge equilibration in a sum has a total charge and a multiplier of its own
    parts = [
        potential for potential in _parts(system) if isinstance(potential, ChargeEquilibration)
    ]
    if len(parts) != 1:
        raise InputError(
            f"{system.potential.name} has {len(parts)} potentials of charge equilibration, but a"
            " chemical potential is defined for exactly one: take a potential with one"
            " ms.potentials.charge_equilibration()."
        )
    return parts[0].potential(system.positions, system.params, system.species, system.species_count)


def _parts(system: System) -> tuple[Potential, ...]:
    """Return the terms of a system's potential if this is a sum, else the potential in a tuple."""
    potential = single(system).potential
    return getattr(potential, "parts", (potential,))


def _moments(system: System) -> tuple[jax.Array, jax.Array]:
    """Return the charges (n,) and the induced dipoles (n, d) of the particles.

    If the system's potential is a sum, the charges and dipoles of all its terms are added.
    """
    parts = [
        potential
        for potential in _parts(system)
        if isinstance(potential, InducedDipoles | ChargeEquilibration)
    ]
    if not parts:
        raise InputError(
            f"the potential {system.potential.name} has no charges: add"
            " ms.potentials.induced_dipoles() or ms.potentials.charge_equilibration()."
        )
    configuration = (system.positions, system.params, system.species, system.species_count)
    moments = [potential.moments(*configuration) for potential in parts]
    charge = jnp.sum(jnp.stack([q for q, _ in moments]), axis=0)
    induced = jnp.sum(jnp.stack([mu for _, mu in moments]), axis=0)
    return charge, induced
