"""What is measured on a configuration: functions of a System, traceable and differentiable."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mdsens import contacts
from mdsens.implicit.status import InputError
from mdsens.system import System, potential_energy

__all__ = ["coordination", "energy", "pressure", "stress"]


def _single(system: System) -> System:
    """The system, or an error that says what to give instead."""
    if not isinstance(system, System):
        raise InputError(f"an observable is of a System and got a {type(system).__name__}: give eq.system.")
    if system.batch is not None:
        raise InputError(f"an observable is of one system: use jax.vmap(...)(batch) for these {system.batch}.")
    return system


@jax.jit
def energy(system: System) -> jax.Array:
    """U, the potential energy, in the potential's unit of energy."""
    return potential_energy(_single(system))


@jax.jit
def stress(system: System) -> jax.Array:
    """The Cauchy stress of the configuration as it is, sigma = V^-1 dU/dstrain at strain 0; positive in tension.

    Returns:
      (d, d), symmetric, energy a volume (an area in 2-D).

    Raises:
      InputError: open boundaries, which have no volume.
    """
    if _single(system).box is None:
        raise InputError("stress and pressure need a volume, and this system has open boundaries: give it a box.")
    zero = jnp.zeros((system.dimension, system.dimension), system.positions.dtype)

    def strained(strain: jax.Array) -> jax.Array:
        return potential_energy(system, strain=0.5 * (strain + strain.T))

    return jax.grad(strained)(zero) / system.volume


@jax.jit
def pressure(system: System) -> jax.Array:
    """P = -tr(stress) / d, positive in compression."""
    return -jnp.trace(stress(_single(system))) / system.dimension


@jax.jit
def coordination(system: System) -> jax.Array:
    """Mean number of contacts of a particle that is no rattler, z = 2 N_c / (n - n_rattlers). Not differentiable."""
    return contacts.coordination(_single(system)).astype(system.positions.dtype)
