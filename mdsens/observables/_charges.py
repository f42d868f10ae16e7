"""Charges and dipoles of a configuration, for laws that have them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mdsens.electrostatics import ChargeEquilibration, InducedDipoles
from mdsens.implicit.status import InputError
from mdsens.observables._pairs import single
from mdsens.system import System

__all__ = ["charges", "chemical_potential", "dipole", "induced_dipoles"]


@jax.jit
def charges(system: System) -> jax.Array:
    """q of each particle, (n,): the given ones of induced dipoles, those that minimise of charge equilibration.

    Raises:
      InputError: a law without charges.
    """
    return _moments(system)[0]


@jax.jit
def induced_dipoles(system: System) -> jax.Array:
    """mu of each particle, (n, d), a charge times a length; zero of charge equilibration.

    Raises:
      InputError: a law without charges.
    """
    return _moments(system)[1]


@jax.jit
def dipole(system: System) -> jax.Array:
    """The dipole of everything, sum_i q_i (r_i - r_c) + mu_i with r_c the centroid, (d,): a charge times a length.

    Of a neutral cluster any origin gives the same. In open space nothing holds the cluster's orientation, so that of a
    relaxed one only what turns not with it has a derivative: take ``jnp.sum(dipole**2)``, not a component.

    Raises:
      InputError: a law without charges.
    """
    charge, induced = _moments(system)
    return charge @ (system.positions - jnp.mean(system.positions, axis=0)) + jnp.sum(induced, axis=0)


@jax.jit
def chemical_potential(system: System) -> jax.Array:
    """The electronegativity that all particles share, dU / dtotal: energy a charge.

    Raises:
      InputError: a law without charge equilibration, or a sum with two of them.
    """
    laws = [law for law in _parts(system) if isinstance(law, ChargeEquilibration)]
    if len(laws) != 1:
        raise InputError(
            f"{system.potential.name} has {len(laws)} laws of charge equilibration, and a chemical potential belongs "
            "to one: take a potential with one ms.potentials.charge_equilibration()."
        )
    return laws[0].potential(system.positions, system.params, system.species, system.species_count)


def _parts(system: System) -> tuple:
    law = single(system).potential
    return getattr(law, "laws", (law,))


def _moments(system: System) -> tuple[jax.Array, jax.Array]:
    """Charges and dipoles, of all laws that have them together."""
    laws = [law for law in _parts(system) if isinstance(law, InducedDipoles | ChargeEquilibration)]
    if not laws:
        raise InputError(
            f"{system.potential.name} has no charges: take ms.potentials.induced_dipoles() or charge_equilibration()."
        )
    at = (system.positions, system.params, system.species, system.species_count)
    found = [law.moments(*at) for law in laws]
    return jnp.sum(jnp.stack([q for q, _ in found]), axis=0), jnp.sum(jnp.stack([mu for _, mu in found]), axis=0)
