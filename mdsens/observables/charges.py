"""Charges and dipoles of a configuration, for potentials that have them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mdsens._util.errors import InputError
from mdsens._util.precision import full_precision
from mdsens.model.system import System
from mdsens.observables.pairs import single
from mdsens.potentials.base import Potential
from mdsens.potentials.electrostatics import ChargeEquilibration, InducedDipoles

__all__ = ["charges", "chemical_potential", "dipole", "induced_dipoles"]


@jax.jit
def charges(system: System) -> jax.Array:
    """Return the charge q of each particle, (n,).

    For induced dipoles these are the fixed charges among the parameters, for charge equilibration
    the charges that minimize the energy.

    Raises:
      InputError: a potential without charges.
    """
    return _moments(system)[0]


@jax.jit
def induced_dipoles(system: System) -> jax.Array:
    """Return the induced dipole mu of each particle, (n, d), charge times length.

    The dipoles are zero for charge equilibration.

    Raises:
      InputError: a potential without charges.
    """
    return _moments(system)[1]


@jax.jit
@full_precision
def dipole(system: System) -> jax.Array:
    """Compute the total dipole moment, sum_i q_i (r_i - r_c) + mu_i, (d,), charge times length.

    r_c is the centroid; for a neutral cluster every origin gives the same dipole. Without a cell
    the orientation of a relaxed cluster is arbitrary, so only rotation-invariant functions of the
    dipole have a derivative: take ``jnp.sum(dipole**2)``, not a component.

    Raises:
      InputError: a potential without charges.
    """
    charge, induced = _moments(system)
    # relative to the centroid, so that the dipole of a charged cluster does not change with a
    # translation
    arms = system.positions - jnp.mean(system.positions, axis=0)
    return charge @ arms + jnp.sum(induced, axis=0)


@jax.jit
def chemical_potential(system: System) -> jax.Array:
    """Compute the electronegativity that all particles share, dU / dtotal, energy per charge.

    ``total`` is the total charge.

    Raises:
      InputError: a potential without charge equilibration, or a sum with two of them.
    """
    # each charge equilibration in a sum has a total charge and a multiplier of its own
    parts = [
        potential for potential in _parts(system) if isinstance(potential, ChargeEquilibration)
    ]
    if len(parts) != 1:
        raise InputError(
            f"{system.potential.name} has {len(parts)} potentials of charge equilibration, and a"
            " chemical potential belongs to one: take a potential with one"
            " ms.potentials.charge_equilibration()."
        )
    return parts[0].potential(system.positions, system.params, system.species, system.species_count)


def _parts(system: System) -> tuple[Potential, ...]:
    """Return the terms of the potential if it is a sum, else the potential itself."""
    potential = single(system).potential
    return getattr(potential, "parts", (potential,))


def _moments(system: System) -> tuple[jax.Array, jax.Array]:
    """Return charges (n,) and dipoles (n, d), summed over all potentials that have them."""
    parts = [
        potential
        for potential in _parts(system)
        if isinstance(potential, InducedDipoles | ChargeEquilibration)
    ]
    if not parts:
        raise InputError(
            f"{system.potential.name} has no charges: take ms.potentials.induced_dipoles() or"
            " charge_equilibration()."
        )
    configuration = (system.positions, system.params, system.species, system.species_count)
    moments = [potential.moments(*configuration) for potential in parts]
    charge = jnp.sum(jnp.stack([q for q, _ in moments]), axis=0)
    induced = jnp.sum(jnp.stack([mu for _, mu in moments]), axis=0)
    return charge, induced
