"""The structure of a configuration: distances, order of bonds, pair distribution, distance to a
target.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mdsens._util.errors import InputError
from mdsens._util.lattice import Components, inverse, nearest_image
from mdsens._util.validation import is_real, real_array, short
from mdsens.model.neighbors import Neighbors
from mdsens.model.system import System
from mdsens.observables.pairs import positive, rise, rows_within, single, summed

__all__ = ["bond_order", "bond_orientation", "distance_to", "distances", "radial_distribution"]

ONSET = 0.75  # of the range: up to there a neighbor counts whole
REACH = 6.0  # widths of a Gaussian, 2e-9 of which lie beyond


def distances(system: System, pairs: Any) -> jax.Array:
    """r_ij = |R_i - R_j| of given pairs, nearest images.

    Exact up to half the smallest height of the cell; beyond, an image that is not the nearest may
    be taken.

    Args:
      system: one system.
      pairs: (m, 2) particle indices, the two of a pair different.

    Returns:
      (m,), a length.

    Raises:
      InputError: indices of no particle, a particle with itself.
    """
    n = single(system).n
    need = f"give (m, 2) whole numbers from 0 to {n - 1}."
    given = real_array("pairs", pairs, need)
    if given.ndim != 2 or given.shape[1] != 2 or not np.issubdtype(given.dtype, np.integer):
        raise InputError(f"pairs have shape {given.shape} and type {given.dtype}: {need}")
    if not isinstance(given, Tracer):
        known = np.asarray(given)
        bad = (known < 0).any(axis=1) | (known >= n).any(axis=1)
        if bad.any():
            k = int(np.argmax(bad))
            raise InputError(
                f"pairs[{k}] is {known[k].tolist()} and there are {n} particles: {need}"
            )
        same = known[:, 0] == known[:, 1]
        if same.any():
            k = int(np.argmax(same))
            raise InputError(
                f"pairs[{k}] is {known[k].tolist()}, a particle with itself: give two particles."
            )
    return _distances(system, jnp.asarray(given, jnp.int32))


@jax.jit
def _distances(system: System, pairs: jax.Array) -> jax.Array:
    apart = nearest_image(system.positions[pairs[:, 0]] - system.positions[pairs[:, 1]], system.box)
    return jnp.sqrt(jnp.sum(apart**2, axis=-1))


def bond_orientation(
    system: System, m: int, range: float, pairs: Neighbors | None = None
) -> jax.Array:
    """psi_m of each particle, the mean of exp(i m theta) over its neighbors, weighted; in 2-D.

        psi_i = sum_j w(r_ij) exp(i m theta_ij) / h(sum_j w(r_ij))

    theta_ij is the angle of R_j - R_i. w is 1 up to 0.75 of the range and falls to 0 at the range
    by the switch 1 - x^3 (10 - 15 x + 6 x^2), twice continuously differentiable. h(s) = s from s =
    1 on, so that psi is the weighted mean; below, h(s) = s + (1 - s)^3 / 3, so that psi goes to 0
    as the last neighbor leaves, and is 0 without neighbors, with all derivatives finite.

    Args:
      system: one system, in 2-D.
      m: the order, a whole number from 1: 6 for triangular, 4 for square.
      range: a length that lies between the first and the second shell of neighbors, 1.4 diameters
        or so.
      pairs: from ``pairs_within``; None for the system's own list or all pairs, see
        :mod:`mdsens.observables`.

    Returns:
      (n, 2), the real and the imaginary part. ``jnp.sum(psi**2, axis=1)`` is the local order of
      each particle, and ``jnp.sum(jnp.mean(psi, axis=0)**2)`` that of the whole, which is less
      where grains are turned against each other.

    Raises:
      InputError: a system in 3-D, whose bond order is Steinhardt's, which is not there; more than
        4,000 particles whose own list is too short, without ``pairs``.
    """
    if single(system).dimension != 2:
        raise InputError(
            "bond order by exp(i m theta) is of 2-D systems, and this one is in 3-D: Steinhardt's"
            " bond-orientational order is not there, take radial_distribution or"
            " smooth_coordination."
        )
    if not isinstance(m, int | np.integer) or isinstance(m, bool) or m < 1:
        raise InputError(
            f"m is {short(m)}: give a whole number from 1, such as 6 for triangular order."
        )
    length = positive("range", range)
    return _bond_orientation(system, rows_within(system, length, pairs), length, int(m))


@functools.partial(jax.jit, static_argnames=("m",))
def _bond_orientation(system: System, rows: jax.Array, range_: Any, m: int) -> jax.Array:
    def each(
        apart: Components, r: jax.Array, j: jax.Array, real: jax.Array
    ) -> tuple[jax.Array, ...]:
        weight = jnp.where(real, 1.0 - rise((r / range_ - ONSET) / (1.0 - ONSET)), 0.0)
        even, odd = _turned(apart[0] / r, apart[1] / r, m)
        return (
            jnp.sum(weight, axis=0),
            jnp.sum(weight * even, axis=0),
            jnp.sum(weight * odd, axis=0),
        )

    total, even, odd = summed(system, rows, each)
    below = jnp.maximum(1.0 - total, 0.0)
    return jnp.stack([even, odd], axis=1) / (total + below**3 / 3.0)[:, None]


def _turned(cosine: jax.Array, sine: jax.Array, m: int) -> tuple[jax.Array, jax.Array]:
    """cos(m theta), sin(m theta): powers of one complex number by squaring, without the angle and
    its cut.
    """
    even, odd = jnp.ones_like(cosine), jnp.zeros_like(sine)
    while m:
        if m % 2:
            even, odd = even * cosine - odd * sine, even * sine + odd * cosine
        cosine, sine, m = cosine**2 - sine**2, 2.0 * cosine * sine, m // 2
    return even, odd


def bond_order(system: System, m: int, range: float, pairs: Neighbors | None = None) -> jax.Array:
    """The bond-orientational order of a 2-D configuration, the mean over particles of |psi_m|^2,
    between 0 and 1.

    1 where the bonds of every particle stand at multiples of 2 pi / m, as in a perfect lattice,
    whatever its orientation and that of its grains; about 1 / z for z neighbors at random. Of the
    square, which is smooth where psi is zero and |psi| is not; particles without neighbors count
    with 0.

    Args:
      system, m, range, pairs: as in :func:`bond_orientation`, which gives psi_m and says how
        neighbors are weighted.

    Returns:
      a number.
    """
    psi = bond_orientation(system, m, range, pairs)
    return jnp.mean(jnp.sum(psi**2, axis=1))


def radial_distribution(
    system: System, r: Any, width: float, pairs: Neighbors | None = None
) -> jax.Array:
    """g(r), the density of particles at distance r from another over the mean density, smoothed by
    a Gaussian.

        g(r) = V / (n (n - 1)) sum_{i != j} G(r - r_ij) / integral_0^inf S(s) G(r - s) ds

    G is the normalized Gaussian of ``width``, S(s) = 2 pi s or 4 pi s^2 the measure of a shell.
    Divided by the smoothed shell and by n (n - 1), an ideal gas has 1 at every r, down to 0 and for
    any width. Of kinds of particles, all count alike.

    Args:
      system: one system, in a cell.
      r: (k,) radii, not negative.
      width: of the Gaussian, a length. No peak is narrower; the smaller it is, the shorter
        derivatives reach.
      pairs: from ``pairs_within(system, max(r) + 6 * width)``; None for the system's own list or
        all pairs, see :mod:`mdsens.observables`.

    Returns:
      (k,), a number at each radius.

    Raises:
      InputError: open boundaries; radii whose Gaussians reach, at 6 widths, beyond half the
        smallest height of the cell, where nearest images are not all there are; more than 4,000
        particles without ``pairs``. The cell is checked where it is known, that is outside of
        compiled code.
    """
    if single(system).box is None:
        raise InputError(
            "g(r) needs a mean density, and this system has open boundaries: give it a box."
        )
    if system.n < 2:
        raise InputError("g(r) is of pairs, and this system has one particle: give more.")
    need = "give (k,) radii that are not negative."
    radii = real_array("r", r, need)
    if isinstance(radii, Tracer):
        raise InputError("r is traced: radii are settings and not differentiated, give numbers.")
    radii = np.asarray(radii, float)
    if radii.ndim != 1 or not radii.size or not (np.isfinite(radii) & (radii >= 0)).all():
        raise InputError(f"r is {short(r)}: {need}")
    sharp = positive("width", width)
    rows = rows_within(system, float(radii.max()) + REACH * sharp, pairs)
    dtype = system.positions.dtype
    return _radial_distribution(system, rows, jnp.asarray(radii, dtype), jnp.asarray(sharp, dtype))


@jax.jit
def _radial_distribution(
    system: System, rows: jax.Array, radii: jax.Array, width: jax.Array
) -> jax.Array:
    def gaussian(x: jax.Array) -> jax.Array:
        return jnp.exp(-0.5 * (x / width) ** 2) / (width * (2.0 * np.pi) ** 0.5)

    def each(
        apart: Components, r: jax.Array, j: jax.Array, real: jax.Array
    ) -> tuple[jax.Array, ...]:
        at = jax.checkpoint(lambda radius: jnp.sum(jnp.where(real, gaussian(radius - r), 0.0)))
        return (jax.lax.map(at, radii),)  # one by one: all together would take k times the memory

    (found,) = summed(system, rows, each)
    inside, edge = jax.scipy.special.ndtr(radii / width), width**2 * gaussian(radii)
    if system.dimension == 2:
        shell = 2.0 * np.pi * (radii * inside + edge)
    else:
        shell = 4.0 * np.pi * ((radii**2 + width**2) * inside + radii * edge)
    return system.volume * found / (system.n * (system.n - 1) * shell)


def distance_to(system: System, target: Any, weights: Any = None) -> jax.Array:
    """How far the configuration is from a target, the root mean square displacement off a
    translation.

        D = sqrt(sum_i w_i |u_i - u|^2 / sum_i w_i),    u_i = R_i - T_i, nearest images,    u their weighted mean

    Particle i is compared with target i. A translation of all, through the cell's faces too, does
    not count. At the target itself, to round-off of the positions, D has a cusp; it and its
    derivative are given as 0 there. D**2 is smooth, and the better objective near it.

    Rattlers stand where the minimization left them, so their part of D means nothing and has no
    derivative: give them the weight 0, ``weights=~ms.linearize(eq).network.rattlers``.

    Args:
      system: one system.
      target: (n, d) positions, in the same cell.
      weights: (n,) not negative; all alike where None.

    Returns:
      a length.
    """
    n = single(system).n
    need = f"give {system.positions.shape}, a position for each particle."
    aim = jnp.asarray(real_array("target", target, need), system.positions.dtype)
    if aim.shape != system.positions.shape:
        raise InputError(f"target has shape {aim.shape}: {need}")
    if not isinstance(aim, Tracer) and not np.isfinite(np.asarray(aim)).all():
        raise InputError("target is not finite: give finite positions.")
    share = jnp.full(n, 1.0 / n, aim.dtype) if weights is None else _shares(weights, n, aim.dtype)
    return _distance_to(system, aim, share)


def _shares(weights: Any, n: int, dtype: Any) -> jax.Array:
    need = f"give ({n},) numbers that are not negative, some of them positive."
    given = np.asarray(weights) if not isinstance(weights, jax.Array) else weights
    if given.shape != (n,) or not (is_real(given.dtype) or given.dtype == bool):
        raise InputError(f"weights are {short(weights)}: {need}")
    if not isinstance(given, Tracer):
        known = np.asarray(given, float)
        if not (np.isfinite(known) & (known >= 0)).all() or not known.any():
            raise InputError(f"weights are {short(weights)}: {need}")
    share = jnp.asarray(given, dtype)
    return share / jnp.sum(share)


@jax.jit
def _distance_to(system: System, target: jax.Array, share: jax.Array) -> jax.Array:
    apart, box = system.positions - target, system.box
    if box is not None:
        # images nearest to the mean along each cell vector, an angle: those nearest to zero would
        # part particles that a translation carries past half the cell
        turns = 2.0 * np.pi * jax.lax.stop_gradient(apart @ inverse(box).T)
        mean = [jnp.sum(share[:, None] * f(turns), axis=0) for f in (jnp.sin, jnp.cos)]
        shift = jax.lax.stop_gradient(box @ (jnp.arctan2(*mean) / (2.0 * np.pi)))
        apart = nearest_image(apart - shift, box)
    apart = apart - jnp.sum(share[:, None] * apart, axis=0)
    squared = jnp.sum(share * jnp.sum(apart**2, axis=1))
    extent = jnp.maximum(jnp.max(jnp.abs(system.positions)), jnp.max(jnp.abs(target)))
    resolved = 8.0 * jnp.finfo(apart.dtype).eps * extent
    some = (
        squared > resolved**2
    )  # nearer than that the direction is one of round-off, and a root of 0 has no slope
    return jnp.where(some, jnp.sqrt(jnp.where(some, squared, 1.0)), 0.0)
