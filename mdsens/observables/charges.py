"""Charges and dipoles of a configuration, for potentials that have them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mdsens._util.errors import InputError
from mdsens.model.system import System
from mdsens.observables.pairs import single
from mdsens.potentials.electrostatics import ChargeEquilibration, InducedDipoles

__all__ = ["charges", "chemical_potential", "dipole", "induced_dipoles"]


@jax.jit
def charges(system: System) -> jax.Array:
    """q of each particle, (n,): the given ones of induced dipoles, those that minimize of charge
    equilibration.

    Raises:
      InputError: a potential without charges.
    """
    return _moments(system)[0]


@jax.jit
def induced_dipoles(system: System) -> jax.Array:
    """mu of each particle, (n, d), a charge times a length; zero of charge equilibration.

    Raises:
      InputError: a potential without charges.
    """
    return _moments(system)[1]


@jax.jit
def dipole(system: System) -> jax.Array:
    """The dipole of everything, sum_i q_i (r_i - r_c) + mu_i with r_c the centroid, (d,): a charge
    times a length.

    Of a neutral cluster any origin gives the same. In open space nothing holds the cluster's
    orientation, so that of a relaxed one only what turns not with it has a derivative: take
    ``jnp.sum(dipole**2)``, not a component.

    Raises:
      InputError: a potential without charges.
    """
    charge, induced = _moments(system)
    return charge @ (system.positions - jnp.mean(system.positions, axis=0)) + jnp.sum(
        induced, axis=0
    )


@jax.jit
def chemical_potential(system: System) -> jax.Array:
    """The electronegativity that all particles share, dU / dtotal: energy a charge.

    Raises:
      InputError: a potential without charge equilibration, or a sum with two of them.
    """
    parts = [
        potential for potential in _parts(system) if isinstance(potential, ChargeEquilibration)
    ]
    if len(parts) != 1:
        raise InputError(
            f"{system.potential.name} has {len(parts)} potentials of charge equilibration, and a chemical"
            " potential belongs to one: take a potential with one"
            " ms.potentials.charge_equilibration()."
        )
    return parts[0].potential(system.positions, system.params, system.species, system.species_count)


def _parts(system: System) -> tuple:
    potential = single(system).potential
    return getattr(potential, "parts", (potential,))


def _moments(system: System) -> tuple[jax.Array, jax.Array]:
    """Charges and dipoles, of all potentials that have them together."""
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
    at = (system.positions, system.params, system.species, system.species_count)
    found = [potential.moments(*at) for potential in parts]
    return jnp.sum(jnp.stack([q for q, _ in found]), axis=0), jnp.sum(
        jnp.stack([mu for _, mu in found]), axis=0
    )
