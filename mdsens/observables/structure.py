"""Structure of a configuration: pair distances, bond order, g(r), distance to a target."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from numpy.typing import ArrayLike

from mdsens._util.compilation import compiled
from mdsens._util.errors import InputError
from mdsens._util.lattice import Components, circular_mean, nearest_image
from mdsens._util.precision import full_precision
from mdsens._util.validation import is_integer, is_real, real_array, short
from mdsens.model.neighbors import Neighbors
from mdsens.model.system import System, displacement_in, require_volume
from mdsens.observables.pairs import list_within, positive, rise, single, summed

__all__ = ["bond_order", "bond_orientation", "distance_to", "distances", "radial_distribution"]

# share of the range up to which a neighbor counts fully
ONSET = 0.75
# widths at which a Gaussian is cut off; 2e-9 of it lie beyond
REACH = 6.0


def distances(system: System, pairs: ArrayLike) -> jax.Array:
    """Compute the distances r_ij = |R_i - R_j| of given pairs, between nearest images.

    R_i are the positions. The distances are exact up to half the smallest height of the cell; for
    longer ones, an image that is not the nearest may be taken.

    Args:
      system: one system.
      pairs: (m, 2) particle indices, two different particles in each pair.

    Returns:
      The distances of the m pairs, (m,).

    Raises:
      InputError: an index is out of range, or a particle is paired with itself.
    """
    n = single(system).n
    need = f"give (m, 2) whole numbers from 0 to {n - 1}."
    indices = real_array("pairs", pairs, need)
    if indices.ndim != 2 or indices.shape[1] != 2 or not np.issubdtype(indices.dtype, np.integer):
        raise InputError(f"`pairs` has shape {indices.shape} and type {indices.dtype}: {need}")
    if not isinstance(indices, Tracer):
        values = np.asarray(indices)
        outside = (values < 0).any(axis=1) | (values >= n).any(axis=1)
        if outside.any():
            k = int(np.argmax(outside))
            raise InputError(
                f"pairs[{k}] is {values[k].tolist()} and there are {n} particles: {need}"
            )
        same = values[:, 0] == values[:, 1]
        if same.any():
            k = int(np.argmax(same))
            raise InputError(
                f"pairs[{k}] is {values[k].tolist()}, a particle with itself: give two particles."
            )
    return _distances(system, jnp.asarray(indices, jnp.int32))


@compiled
def _distances(system: System, pairs: jax.Array) -> jax.Array:
    """Compute the distances of given pairs (m, 2) between nearest images, in compiled code."""
    i, j = pairs[:, 0], pairs[:, 1]
    vectors = displacement_in(system, system.box)(system.positions[i], system.positions[j])
    return jnp.sqrt(jnp.sum(vectors**2, axis=-1))


def bond_orientation(
    system: System, m: int, range: float, pairs: Neighbors | None = None
) -> jax.Array:
    """Compute the bond-orientational order psi_m of each particle in 2-D.

        psi_m(k) = sum_j w(r_kj) exp(i m theta_kj) / h(sum_j w(r_kj))

    The sum is over the neighbors j of particle k, r_kj is the distance and theta_kj the angle of
    the vector from k to j. The weight w is 1 up to 0.75 of the range. From there to the range it
    falls to 0 as 1 - x^3 (10 - 15 x + 6 x^2), where x rises linearly from 0 to 1; w is twice
    continuously differentiable. For a sum of weights s of at least 1, the divisor is h(s) = s, so
    that psi_m is the weighted mean of exp(i m theta). For smaller s, h(s) = s + (1 - s)^3 / 3, so
    that psi_m goes to 0 as the last neighbor leaves and is 0 without neighbors, with all
    derivatives finite.

    Args:
      system: one system, in 2-D.
      m: the order, a whole number from 1: 6 for triangular, 4 for square.
      range: a length that lies between the first and the second shell of neighbors, 1.4 diameters
        or so.
      pairs: list of pairs from ``pairs_within``; None for the system's neighbor list or all pairs,
        see :mod:`mdsens.observables`.

    Returns:
      (n, 2), the real and the imaginary part. ``jnp.sum(psi**2, axis=1)`` is the local order of
      each particle. ``jnp.sum(jnp.mean(psi, axis=0)**2)`` is the global order, which is smaller
      where grains have different orientations.

    Raises:
      InputError: the system is 3-D, for which mdsens has no bond order; or ``pairs`` is None, the
        system's neighbor list is not known to cover the range, and there are more than 4,000
        particles.
    """
    if single(system).dimension != 2:
        raise InputError(
            "bond order by exp(i m theta) is for 2-D systems, and this system is 3-D, where"
            " Steinhardt's bond order, which mdsens lacks, would be needed: take"
            " radial_distribution or smooth_coordination."
        )
    if not is_integer(m) or m < 1:
        raise InputError(
            f"`m` is {short(m)}: give a whole number from 1, such as 6 for triangular order."
        )
    length = positive("range", range)
    return _bond_orientation(system, list_within(system, length, pairs), length, int(m))


# m is static: the loop over its binary digits, in ``_multiply_angle``, needs the number
@compiled(static_argnames=("m",))
def _bond_orientation(system: System, listed: Neighbors, range_: float, m: int) -> jax.Array:
    """Compute the bond-orientational order psi_m of each particle by a sum over a neighbor list.

    This is the compiled part of :func:`bond_orientation`. The result (n, 2) has the real and the
    imaginary part of psi_m.
    """

    def each(
        vectors: Components, r: jax.Array, j: jax.Array, real: jax.Array
    ) -> tuple[jax.Array, ...]:
        weight = jnp.where(real, 1.0 - rise((r / range_ - ONSET) / (1.0 - ONSET)), 0.0)
        cosine, sine = _multiply_angle(vectors[0] / r, vectors[1] / r, m)
        return (
            jnp.sum(weight, axis=0),
            jnp.sum(weight * cosine, axis=0),
            jnp.sum(weight * sine, axis=0),
        )

    total, real_part, imaginary_part = summed(system, listed, each)
    # h(total) of the docstring of bond_orientation
    missing = jnp.maximum(1.0 - total, 0.0)
    divisor = total + missing**3 / 3.0
    return jnp.stack([real_part, imaginary_part], axis=1) / divisor[:, None]


def _multiply_angle(cosine: jax.Array, sine: jax.Array, m: int) -> tuple[jax.Array, jax.Array]:
    """Compute cos(m theta) and sin(m theta) from cos(theta) and sin(theta).

    They are the real and the imaginary part of (cos(theta) + i sin(theta))^m, computed by repeated
    squaring. The angle theta is not computed, because an angle jumps by 2 pi at some
    direction.
    """
    real_part = jnp.ones_like(cosine)
    imaginary_part = jnp.zeros_like(sine)
    while m:
        if m % 2:
            real_part, imaginary_part = (
                real_part * cosine - imaginary_part * sine,
                real_part * sine + imaginary_part * cosine,
            )
        cosine, sine = cosine**2 - sine**2, 2.0 * cosine * sine
        m = m // 2
    return real_part, imaginary_part


def bond_order(system: System, m: int, range: float, pairs: Neighbors | None = None) -> jax.Array:
    """Compute the bond-orientational order in 2-D: the mean over particles of |psi_m|^2.

    psi_m of a particle is in essence the weighted mean of exp(i m theta) over its neighbors, with
    the angle theta of the vector to the neighbor. The order lies between 0 and 1. The order is 1 if
    the angles between the bonds of every particle are multiples of 2 pi / m, as in a perfect
    lattice, whatever the orientation of the lattice or of its grains. The order is about 1 / z for
    z neighbors in random directions. The mean is over squares because |psi_m|^2 is smooth where
    psi_m is zero, while |psi_m| is not. Particles without neighbors count as 0.

    Args:
      system, m, range, pairs: as in :func:`bond_orientation`, which defines psi_m and the weights
        of the neighbors.

    Returns:
      The order, a number.
    """
    psi = bond_orientation(system, m, range, pairs)
    return jnp.mean(jnp.sum(psi**2, axis=1))


def radial_distribution(
    system: System, r: ArrayLike, width: float, pairs: Neighbors | None = None
) -> jax.Array:
    """Compute the radial distribution function g(r), smoothed by a Gaussian.

        g(r) = V / (n (n - 1)) sum_{i != j} G(r - r_ij) / integral_0^inf S(s) G(r - s) ds

    g(r) is the density of particles at distance r from another particle, over the mean density. V
    is the volume of the cell, n the number of particles and r_ij the distance of two particles. G
    is the normalized Gaussian of standard deviation ``width``, and S(s) is the size of a shell of
    radius s: 2 pi s in 2-D, 4 pi s^2 in 3-D. Because of the division by the integral and by
    n (n - 1), an ideal gas has g = 1 at every r down to 0 and for any width. Particles of all
    species count alike.

    Args:
      system: one system, in a cell.
      r: (k,) radii, not negative.
      width: standard deviation of the Gaussian, a length. No peak of g is narrower. The smaller the
        width, the smaller are the parameter changes over which a derivative is valid.
      pairs: list of pairs from ``pairs_within(system, max(r) + 6 * width)``; None for the system's
        neighbor list or all pairs, see :mod:`mdsens.observables`.

    Returns:
      g at each radius, (k,), a number without unit.

    Raises:
      InputError: the system is not periodic along all axes; or ``pairs`` is None, the system's
        neighbor list is not known to cover the distance max(r) + 6 * width, and this distance is
        above half the smallest height of the cell or there are more than 4,000 particles. The cell
        is not checked in compiled code.
    """
    require_volume(single(system), "g(r) is relative to a mean density and needs")
    if system.n < 2:
        raise InputError("g(r) is for pairs, and this system has one particle: give two or more.")
    need = "give (k,) radii that are not negative."
    radii = real_array("r", r, need)
    if isinstance(radii, Tracer):
        raise InputError("`r` is traced by jax, but radii cannot be differentiated: give numbers.")
    radii = np.asarray(radii, float)
    if radii.ndim != 1 or not radii.size or not (np.isfinite(radii) & (radii >= 0)).all():
        raise InputError(f"`r` is {short(r)}: {need}")
    smoothing = positive("width", width)
    listed = list_within(system, float(radii.max()) + REACH * smoothing, pairs)
    dtype = system.positions.dtype
    return _radial_distribution(
        system, listed, jnp.asarray(radii, dtype), jnp.asarray(smoothing, dtype)
    )


@compiled
def _radial_distribution(
    system: System, listed: Neighbors, radii: jax.Array, width: jax.Array
) -> jax.Array:
    """Compute g(r) at each radius (k,) by one sum over a neighbor list, in compiled code."""

    def gaussian(x: jax.Array) -> jax.Array:
        return jnp.exp(-0.5 * (x / width) ** 2) / (width * (2.0 * np.pi) ** 0.5)

    def each(
        vectors: Components, r: jax.Array, j: jax.Array, real: jax.Array
    ) -> tuple[jax.Array, ...]:
        # radii one after the other: all at once would take k times the memory
        at_radius = jax.checkpoint(
            lambda radius: jnp.sum(jnp.where(real, gaussian(radius - r), 0.0))
        )
        return (jax.lax.map(at_radius, radii),)

    (counts,) = summed(system, listed, each)
    # the integral of S(s) G(r - s) over s from 0 on, in closed form
    inside = jax.scipy.special.ndtr(radii / width)
    edge = width**2 * gaussian(radii)
    if system.dimension == 2:
        shell = 2.0 * np.pi * (radii * inside + edge)
    else:
        shell = 4.0 * np.pi * ((radii**2 + width**2) * inside + radii * edge)
    return system.volume * counts / (system.n * (system.n - 1) * shell)


def distance_to(system: System, target: ArrayLike, weights: ArrayLike | None = None) -> jax.Array:
    """Compute the root mean square displacement from a target configuration, up to a translation.

        D = sqrt(sum_i w_i |u_i - u|^2 / sum_i w_i),    u = sum_i w_i u_i / sum_i w_i,

    with u_i = R_i - T_i between nearest images, R_i the position of particle i, T_i that of
    particle i in the target, and w_i its weight. A common translation of all particles, also
    through the faces of the cell, does not count. D has a cusp at the target; there, to round-off
    of the positions, D and its derivative are returned as 0. D**2 is smooth, and the better
    objective near the target.

    The positions of rattlers are those at which the minimization left them, so their contribution
    to D is arbitrary and has no derivative: give them the weight 0,
    ``weights=~ms.linearize(eq).network.rattlers``.

    Args:
      system: one system.
      target: (n, d) positions, in the same cell.
      weights: (n,) weights w_i, not negative; equal weights where None.

    Returns:
      The distance D, a length.
    """
    n = single(system).n
    need = f"give {system.positions.shape}, a position for each particle."
    positions = jnp.asarray(real_array("target", target, need), system.positions.dtype)
    if positions.shape != system.positions.shape:
        raise InputError(f"`target` has shape {positions.shape}: {need}")
    if not isinstance(positions, Tracer) and not np.isfinite(np.asarray(positions)).all():
        raise InputError("`target` is not finite: give finite positions.")
    if weights is None:
        share = jnp.full(n, 1.0 / n, positions.dtype)
    else:
        share = _normalize_weights(weights, n, positions.dtype)
    return _distance_to(system, positions, share)


def _normalize_weights(weights: ArrayLike, n: int, dtype: np.dtype) -> jax.Array:
    """Check the weights of the particles, and divide them by their sum."""
    need = f"give ({n},) numbers that are not negative, some of them positive."
    # a mask of truth values is allowed, which real_array would refuse
    array = weights if isinstance(weights, jax.Array) else np.asarray(weights)
    if array.shape != (n,) or not (is_real(array.dtype) or array.dtype == bool):
        raise InputError(f"weights are {short(weights)}: {need}")
    if not isinstance(array, Tracer):
        values = np.asarray(array, float)
        if not (np.isfinite(values) & (values >= 0)).all() or not values.any():
            raise InputError(f"weights are {short(weights)}: {need}")
    share = jnp.asarray(array, dtype)
    return share / jnp.sum(share)


@compiled
@full_precision
def _distance_to(system: System, target: jax.Array, share: jax.Array) -> jax.Array:
    """Compute the distance between the configuration and a target configuration, in compiled code.

    Args:
      system: the configuration.
      target: (n, d) positions of the target configuration.
      share: (n,) weight of each particle in the mean squared displacement; the sum is 1.
    """
    displacement = system.positions - target
    box = system.box
    if box is not None:
        # Images nearest to the mean displacement, which is a circular mean.
        # Images nearest to zero would separate particles where a translation carries some of them
        # past half the cell.
        # The shift only chooses images: the mean displacement itself is subtracted below.
        shift = jax.lax.stop_gradient(circular_mean(displacement, box, share, system.periodic))
        displacement = nearest_image(displacement - shift, box, system.periodic)
    displacement = displacement - jnp.sum(share[:, None] * displacement, axis=0)
    squared = jnp.sum(share * jnp.sum(displacement**2, axis=1))
    extent = jnp.maximum(jnp.max(jnp.abs(system.positions)), jnp.max(jnp.abs(target)))
    resolution = 8.0 * jnp.finfo(displacement.dtype).eps * extent
    # below the resolution the direction of the displacements is round-off, and the derivative of
    # sqrt(0) is infinite
    resolved = squared > resolution**2
    return jnp.where(resolved, jnp.sqrt(jnp.where(resolved, squared, 1.0)), 0.0)
