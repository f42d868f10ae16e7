"""The state of a configuration: energy, stress, volume, contacts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mdsens._util.compilation import compiled
from mdsens._util.errors import InputError
from mdsens._util.lattice import BALL_OF_UNIT_DIAMETER, Components
from mdsens.mechanics import contacts
from mdsens.model.system import System, pair_lengths, potential_energy, require_volume
from mdsens.observables.pairs import positive, rise, single, summed

__all__ = [
    "coordination",
    "energy",
    "packing_fraction",
    "pressure",
    "smooth_coordination",
    "stress",
    "volume",
]


@compiled
def energy(system: System) -> jax.Array:
    """Return the potential energy of a system, in the potential's unit of energy."""
    return potential_energy(single(system))


@compiled
def stress(system: System) -> jax.Array:
    """Compute the Cauchy stress (dU/dstrain) / V at strain 0, positive in tension.

    U is the energy and V the volume of the cell. The derivative is taken at constant fractional
    coordinates, without the motion of particles in response to the strain.

    Returns:
      (d, d), symmetric, energy per volume (per area in 2-D).

    Raises:
      InputError: the system is not periodic along all axes, and so has no volume.
    """
    require_volume(single(system), "stress and pressure need")
    zero = jnp.zeros((system.dimension, system.dimension), system.positions.dtype)

    # by the symmetric part of the strain, so that the result is symmetric
    def energy_at(strain: jax.Array) -> jax.Array:
        return potential_energy(system, strain=0.5 * (strain + strain.T))

    return jax.grad(energy_at)(zero) / system.volume


@compiled
def pressure(system: System) -> jax.Array:
    """Compute the pressure -tr(stress) / d in d dimensions, positive in compression."""
    return -jnp.trace(stress(single(system))) / system.dimension


@compiled
def volume(system: System) -> jax.Array:
    """Return the volume of the cell, an area in 2-D.

    Raises:
      InputError: the system is not periodic along all axes.
    """
    require_volume(single(system), "the volume and the packing fraction need")
    return system.volume


@compiled
def packing_fraction(system: System) -> jax.Array:
    """Compute the packing fraction phi = sum_i v(sigma_i) / V; overlaps count twice.

    V is the volume of the cell, and v the volume of a particle of diameter sigma: pi/4 sigma^2 in
    2-D and pi/6 sigma^3 in 3-D.

    Raises:
      InputError: the system is not periodic along all axes, or its potential has no parameter
        ``sigma`` that gives the diameters of the particles.
    """
    cell_volume = volume(system)
    if system.diameters is None:
        raise InputError(
            f"a packing fraction needs the diameters of the particles, and {system.potential.name}"
            " has no parameter 'sigma' for each particle: divide the volume of the particles by"
            " ms.observables.volume."
        )
    d = system.dimension
    return jnp.sum(BALL_OF_UNIT_DIAMETER[d] * system.diameters**d) / cell_volume


@compiled
def coordination(system: System) -> jax.Array:
    """Compute the mean number of contacts of non-rattlers, z = 2 N_c / (n - n_rattlers).

    N_c is the number of contacts, n that of particles. z is piecewise constant, so that its
    derivative raises InputError, which recommends :func:`smooth_coordination`.
    """
    return contacts.coordination(single(system)).astype(system.positions.dtype)


def smooth_coordination(system: System, width: float) -> jax.Array:
    """Compute the mean number of contacts of a particle, each contact weighted by its overlap.

        z = 2 / n sum_pairs S((l_ij - r_ij) / width),    S(x) = x^3 (10 - 15 x + 6 x^2),

    where S is 0 below x = 0 and 1 above x = 1. r_ij is the distance of a pair, and l_ij the
    distance beyond which the potential of the pair is zero: sigma_ij of soft spheres, the cutoff of
    Lennard-Jones.

    This smooth z depends on the width, and is not the contact number of a packing, which
    ``coordination`` gives. z lies below the contact number, since contacts with overlaps below the
    width count only in part, and since z is a mean over all particles, rattlers included. The
    derivative of z comes only from contacts with overlaps below the width, which are about to open.
    The derivative is zero if the width is below every overlap; a width of about the mean overlap
    includes most contacts in the derivative.

    Args:
      system: one system, its neighbor list complete.
      width: the overlap from which a contact counts fully; a length.

    Returns:
      The mean number z.

    Raises:
      InputError: the potential is not a sum over neighboring pairs, or has infinite range.
    """
    full_overlap = positive("width", width)
    potential = single(system).potential
    reach = system.range
    # a range that depends on traced parameters has no value yet and cannot be checked
    known = not isinstance(reach, Tracer)
    if not potential.pairwise or (known and not 0 < float(reach) < np.inf):
        raise InputError(
            f"the potential {potential.name} has no distance at which neighbors begin to interact:"
            " take a pair potential with a finite range."
        )
    return _smooth_coordination(system, full_overlap)


@compiled
def _smooth_coordination(system: System, width: float) -> jax.Array:
    """Compute the mean number of contacts of a particle, each contact weighted by its overlap.

    This is the compiled part of :func:`smooth_coordination`, a sum over the neighbor list.
    """
    # (1, n), to go with the rows (ROWS, n) of neighbors j
    i = jnp.arange(system.n, dtype=jnp.int32)[None]
    lengths = pair_lengths(system)

    def each(
        vectors: Components, r: jax.Array, j: jax.Array, real: jax.Array
    ) -> tuple[jax.Array, ...]:
        overlap = (lengths(i, j) - r) / width
        return (jnp.sum(jnp.where(real, rise(overlap), 0.0)),)

    # the rows contain every pair twice, which is the factor 2 of z
    return summed(system, system.neighbors, each)[0] / system.n
