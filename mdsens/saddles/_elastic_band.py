"""A path between two minima: a nudged elastic band whose highest image climbs to the saddle.

The images R_k are configurations between the two minima. The forces of the energy U act on them
perpendicular to the band, and the forces of springs with stiffness s act along the band,

    F_k = - (1 - t t^T) dU/dR_k + s (|R_k+1 - R_k| - |R_k - R_k-1|) t.

The image of highest energy is driven up along the band instead, F = - (1 - 2 t t^T) dU/dR
(Henkelman, Uberuaga and Jonsson, J. Chem. Phys. 113, 9901 (2000)). t is the unit tangent, which
points to the neighboring image of higher energy (Henkelman and Jonsson, J. Chem. Phys. 113, 9978
(2000)).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.compilation import compiled
from mdsens._util.errors import InputError
from mdsens._util.lattice import circular_mean, nearest_image
from mdsens._util.probe import chirp
from mdsens._util.pytree import PyTree
from mdsens._util.validation import check_positive, is_integer, short
from mdsens.mechanics.forces import energy_gradient
from mdsens.mechanics.hessian import largest_force
from mdsens.mechanics.units import Limits, natural_units
from mdsens.model.batch import stack
from mdsens.model.neighbors import slack, within
from mdsens.model.system import System, potential_energy
from mdsens.relaxation.fire_loop import at_rest, limited_minimizer
from mdsens.relaxation.methods import Fire

__all__ = ["ElasticBand", "climbing_image_band"]

# The images start this far off the straight line between the minima, in units of the potential's
# length: on the line two particles may meet.
OFF_LINE = 1e-3
# configurations whose coordinates differ by no more than this, in the same units, are the same
SAME = 1e-6


@dataclasses.dataclass(frozen=True)
class ElasticBand:
    """Options of a nudged elastic band between two minima, whose highest image climbs to a saddle.

    Attributes:
      images: number of images (configurations) between the two minima; more for a path that bends.
      spring: stiffness of the springs between images, in units of the largest stiffness of the
        potential.
      stop: the largest force on the images at which the relaxation of the band ends; a search for
        the saddle then begins at the highest image. The unit is the largest stiffness of the
        potential times its length scale (contact distance, or the distance of the minimum of the
        pair energy).
      max_steps: largest number of steps of FIRE.
      fire: the options of FIRE, which relaxes the band.
    """

    images: int = 7
    spring: float = 0.02
    stop: float = 1e-3
    max_steps: int = 500
    fire: Fire = dataclasses.field(default_factory=Fire)

    def __post_init__(self) -> None:
        check_positive(self, ("spring", "stop"))
        if not isinstance(self.fire, Fire):
            raise InputError(f"ElasticBand(fire={short(self.fire)}): give Fire() of ms.relaxation.")
        for name in ("images", "max_steps"):
            value = getattr(self, name)
            if not (is_integer(value) and value >= 1):
                raise InputError(f"ElasticBand({name}={short(value)}): give a whole number from 1.")


def climbing_image_band(
    start: System, end: System, band: ElasticBand = ElasticBand()
) -> tuple[System, jax.Array]:
    """Find the image of highest energy of an elastic band, and the direction of the band there.

    Args:
      start, end: the two minima between which the band runs, of the same particles at the same
        parameters and in the same cell. First each particle of ``end`` is taken at the periodic
        image nearest to its position in ``start``. Then a common translation of all particles of
        ``end`` and, without a cell, a common rotation are removed.
      band: the options of the band.

    Returns:
      (the system at the highest image, a unit vector (n, d) along the band).

    Raises:
      InputError: ``start`` and ``end`` are the same configuration.
    """
    first = np.asarray(start.positions)
    last = _align(start, end)
    dtype = start.positions.dtype
    count = band.images
    length, stiffness = (jnp.asarray(x, dtype) for x in natural_units(start))
    if np.abs(last - first).max() <= SAME * float(length):
        raise InputError(
            "`towards` is the same configuration as `start`, or `start` moved as a whole: give"
            " another minimum for `towards`, or leave `towards` out and give `direction`, the"
            " direction in which to climb."
        )
    shares = np.arange(1, count + 1)[:, None, None] / (count + 1)
    bump = chirp((count, *first.shape), float, np)
    chain = jnp.asarray(first + shares * (last - first) + OFF_LINE * float(length) * bump, dtype)
    limits = Limits.of((length, stiffness), band.fire, start.potential.finite_force)
    ends = jnp.stack([start.positions, jnp.asarray(last, dtype)])
    end_energies = jnp.stack([potential_energy(start), potential_energy(end)])
    # only the initial state is needed here; the forces come with each call of _advance
    state = at_rest(chain, limits, band.fire)
    target = band.stop * length * stiffness
    steps = 0
    while True:
        # new neighbor lists at the present positions; _advance stops where they may lose a pair
        batch = stack(
            [start.replace(positions=R).reallocate(keep=True) for R in band.fire.positions(state)]
        )
        state, taken, largest, top, tangent = _advance(
            batch, state, ends, end_energies, target, band.max_steps - steps, band, limits
        )
        steps += int(taken)
        if steps >= band.max_steps or not float(largest) > float(target):
            break
    image = start.replace(positions=band.fire.positions(state)[int(top)]).reallocate(keep=True)
    return image, tangent


def _align(start: System, end: System) -> np.ndarray:
    """Move the configuration ``end`` as a whole next to ``start``; return its positions (n, d).

    Before this, each particle is taken at the periodic image nearest to its position in ``start``.
    Without a cell the particles are rotated together, too, by the rotation that minimizes the
    distance from ``start`` (Kabsch).
    """
    first = np.asarray(start.positions)
    box = start.box
    displacement = end.positions - start.positions
    if box is not None:
        # Without the common translation before, a translation of half the cell would bring some
        # particles to other images than their neighbors.
        displacement = displacement - circular_mean(
            displacement, box, np.ones(len(first)), start.periodic
        )
        displacement = nearest_image(displacement, box, start.periodic)
    displacement = np.asarray(displacement)
    displacement = displacement - displacement.mean(axis=0)
    if box is not None:
        return first + displacement
    center = first.mean(axis=0)
    arms = first - center
    turned = first + displacement - center
    # Particles are rows, so that a rotation Q acts as x Q; Q = left right brings ``turned`` nearest
    # to ``arms``. The sign is changed for the smallest singular value, where this costs least.
    left, _, right = np.linalg.svd(turned.T @ arms)
    # a rotation has determinant 1; a reflection, determinant -1, would be another configuration
    sign = np.ones(first.shape[1])
    sign[-1] = np.sign(np.linalg.det(left @ right))
    return center + turned @ ((left * sign) @ right)


def _band_forces(
    batch: System, chain: jax.Array, ends: jax.Array, end_energies: jax.Array, spring: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute the force on each image of an elastic band, and the tangents of the band.

    Args:
      batch: the system at each image, with its neighbor list.
      chain: (images, n, d), the positions of the images.
      ends: (2, n, d), positions of the two minima.
      end_energies: (2,), energies of the two minima.
      spring: stiffness of the springs between images, energy per length squared.

    Returns:
      (forces (images, n, d), index of the image of highest energy, unit tangents (images, n, d)).
    """

    def evaluate(system: System, R: jax.Array) -> tuple[jax.Array, jax.Array]:
        return potential_energy(system, R), energy_gradient(system)(R)

    def total(v: jax.Array) -> jax.Array:
        return jnp.sum(v, axis=(1, 2), keepdims=True)

    energies, gradients = jax.vmap(evaluate)(batch, chain)
    path = jnp.concatenate([ends[:1], chain, ends[1:]])
    levels = jnp.concatenate([end_energies[:1], energies, end_energies[1:]])
    segments = jnp.diff(path, axis=0)
    rises = jnp.diff(levels)
    # from the previous image to each image, and from it to the next
    behind, ahead = segments[:-1], segments[1:]
    below, above = rises[:-1], rises[1:]
    least = jnp.minimum(jnp.abs(below), jnp.abs(above))
    most = jnp.maximum(jnp.abs(below), jnp.abs(above))
    # On a slope the tangent is the segment on the higher side. At an extremum of the energy along
    # the band it is a weighted sum of both, which changes continuously.
    uphill = (below > 0) & (above > 0)
    downhill = (below < 0) & (above < 0)
    next_higher = levels[2:] > levels[:-2]
    front = jnp.where(next_higher, most, least)
    front = jnp.where(uphill, 1.0, jnp.where(downhill, 0.0, front))
    back = jnp.where(next_higher, least, most)
    back = jnp.where(uphill, 0.0, jnp.where(downhill, 1.0, back))
    tangent = front[:, None, None] * ahead + back[:, None, None] * behind
    # 1e-300 keeps a tangent of zero, where images coincide, from becoming NaN
    tangent = tangent / jnp.maximum(jnp.sqrt(total(tangent**2)), 1e-300)
    along = total(gradients * tangent)
    stretch = jnp.sqrt(total(ahead**2)) - jnp.sqrt(total(behind**2))
    nudged = -gradients + (along + spring * stretch) * tangent
    climbing = -gradients + 2.0 * along * tangent
    top = jnp.argmax(energies)
    is_top = (jnp.arange(energies.size) == top)[:, None, None]
    return jnp.where(is_top, climbing, nudged), top, tangent


@compiled(static_argnames=("band",), loops=True)
def _advance(
    batch: System,
    state: PyTree,
    ends: jax.Array,
    end_energies: jax.Array,
    target: jax.Array,
    budget: jax.Array | int,
    band: ElasticBand,
    limits: Limits,
) -> tuple[Any, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Take steps of FIRE for an elastic band, as long as all neighbor lists are complete.

    Args:
      batch: the system at each image, with its neighbor list.
      state: state of jax-md's minimizer, for all images together.
      ends, end_energies: positions (2, n, d) and energies (2,) of the two minima.
      target: the largest force at which to stop.
      budget: largest number of steps.
      band: the options of the band.
      limits: the longest step and the largest force of a particle.

    Returns:
      (state, number of steps, largest force, index of the image of highest energy, unit tangent (n,
      d) of the band there).
    """
    method = band.fire
    spring = band.spring * limits.stiffness
    anchors, distance = jax.vmap(lambda s: slack(s.neighbors, s.box, s.range))(batch)

    def forces(chain: jax.Array) -> jax.Array:
        return _band_forces(batch, chain, ends, end_energies, spring)[0]

    def unfinished(carry: tuple[Any, jax.Array, jax.Array]) -> jax.Array:
        state, steps, largest = carry
        inside = jax.vmap(within)(method.positions(state), anchors, distance)
        return (steps < budget) & (largest > target) & jnp.all(inside)

    def take_step(carry: tuple[Any, jax.Array, jax.Array]) -> tuple[Any, jax.Array, jax.Array]:
        state, steps, _ = carry
        state = apply(state)
        return state, steps + 1, jnp.max(jax.vmap(largest_force)(method.forces(state)))

    _, apply, limited_forces = limited_minimizer(method, forces, limits)
    state = method.with_forces(state, limited_forces(method.positions(state)))
    # inf, since a step is always taken first: it measures the largest force
    start = (state, jnp.zeros((), jnp.int32), jnp.asarray(jnp.inf, limits.stiffness.dtype))
    state, steps, largest = jax.lax.while_loop(unfinished, take_step, start)
    _, top, tangents = _band_forces(batch, method.positions(state), ends, end_energies, spring)
    return state, steps, largest, top, tangents[top]
