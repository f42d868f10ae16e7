"""A path between two minima: a nudged elastic band whose highest image climbs to the saddle.

Images R_k between the two are pulled across the band by the energy and along it by springs,

    F_k = - (1 - t t^T) dU/dR_k + s (|R_k+1 - R_k| - |R_k - R_k-1|) t,

and the highest one up along it, F = - (1 - 2 t t^T) dU/dR (Henkelman, Uberuaga and Jonsson, J.
Chem. Phys. 113, 9901 (2000)); t is the tangent towards the higher neighbor (Henkelman and Jonsson,
J. Chem. Phys. 113, 9978 (2000)).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.lattice import nearest_image
from mdsens._util.validation import check_positive, short
from mdsens.mechanics.forces import energy_gradient
from mdsens.mechanics.hessian import largest_force
from mdsens.mechanics.units import Limits, natural_units
from mdsens.model.batch import stack
from mdsens.model.neighbors import slack, within
from mdsens.model.system import System, potential_energy
from mdsens.relaxation._fire_loop import shortened
from mdsens.relaxation.methods import Fire

__all__ = ["ElasticBand", "climbing_image_band"]

BESIDE = 1e-3  # of the potential's length: images are moved off the straight line, on which particles may meet
SAME = 1e-6  # of it: configurations that are no further apart are one


@dataclasses.dataclass(frozen=True)
class ElasticBand:
    """A climbing-image nudged elastic band.

    Attributes:
      images: between the two minima; more for a path that bends.
      spring: s, of the potential's largest stiffness.
      stop: the largest force left on the images, of the potential's stiffness times its length; the
        walk to the saddle begins there.
      max_steps: of FIRE.
      fire: its options.
    """

    images: int = 7
    spring: float = 0.02
    stop: float = 1e-3
    max_steps: int = 500
    fire: Fire = dataclasses.field(default_factory=Fire)

    def __post_init__(self) -> None:
        check_positive(self, ("spring", "stop"))
        if not isinstance(self.fire, Fire):
            raise InputError(f"ElasticBand(fire={short(self.fire)}): give Fire().")
        for name in ("images", "max_steps"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise InputError(f"ElasticBand({name}={short(value)}): give a whole number from 1.")


def climbing_image_band(
    one: System, other: System, band: ElasticBand = ElasticBand()
) -> tuple[System, jax.Array]:
    """The highest image of a band between two configurations, and the band's direction there.

    Args:
      one, other: minima of the same particles at the same parameters and in the same cell; each
        particle of the second is taken at its image next to where it is in the first, less their
        common translation and, without a cell, rotation.
      band: its options.

    Returns:
      the system at the image, and a unit vector (n, d).

    Raises:
      InputError: both are the same configuration.
    """
    first, last = np.asarray(one.positions), _beside(one, other)
    count = band.images
    shares = np.arange(1, count + 1)[:, None, None] / (count + 1)
    length, stiffness = (jnp.asarray(x, one.positions.dtype) for x in natural_units(one))
    if np.abs(last - first).max() <= SAME * float(length):
        raise InputError(
            "the other side is the configuration of the start, moved as a whole at most: give"
            " another minimum, or leave it out and give a direction to climb along."
        )
    bump = np.cos(np.arange(count * first.size) ** 2.0).reshape(count, *first.shape)
    chain = jnp.asarray(
        first + shares * (last - first) + BESIDE * float(length) * bump, one.positions.dtype
    )
    limits = Limits.of((length, stiffness), band.fire)
    ends = jnp.stack([one.positions, jnp.asarray(last, one.positions.dtype)])
    heights = jnp.stack([potential_energy(one), potential_energy(other)])
    steps, state = 0, band.fire.minimizer(lambda R, **_: jnp.zeros_like(R), None, limits)[0](chain)
    target = band.stop * length * stiffness
    while True:
        places = band.fire.positions(state)
        batch = stack([one.replace(positions=R).reallocate() for R in places])
        state, taken, left, top, tangent = _advance(
            batch, state, ends, heights, target, band, limits
        )
        steps += int(taken)
        if steps >= band.max_steps or not float(left) > float(target):
            break
    image = one.replace(positions=band.fire.positions(state)[int(top)]).reallocate()
    return image, tangent


def _beside(one: System, other: System) -> np.ndarray:
    """Where the second configuration is, next to the first."""
    here, box = np.asarray(one.positions), one.box
    move = np.asarray(nearest_image(other.positions - one.positions, box))
    move = move - move.mean(axis=0)
    if box is not None:
        return here + move
    middle = here.mean(axis=0)
    arms, turned = here - middle, here + move - middle
    left, _, right = np.linalg.svd(turned.T @ arms)
    sign = np.ones(here.shape[1])
    sign[-1] = np.sign(np.linalg.det(left @ right))  # a rotation, no reflection
    return middle + turned @ ((left * sign) @ right)


def _pulls(
    batch: System, chain: jax.Array, ends: jax.Array, heights: jax.Array, spring: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The force on each image, which one is the highest, and the tangents."""

    def of_one(system: System, R: jax.Array) -> tuple[jax.Array, jax.Array]:
        return potential_energy(system, R), energy_gradient(system)(R)

    def sums(v: jax.Array) -> jax.Array:
        return jnp.sum(v, axis=(1, 2), keepdims=True)

    energies, slopes = jax.vmap(of_one)(batch, chain)
    whole = jnp.concatenate([ends[:1], chain, ends[1:]])
    levels = jnp.concatenate([heights[:1], energies, heights[1:]])
    apart, rise = jnp.diff(whole, axis=0), jnp.diff(levels)
    behind, ahead, below, above = apart[:-1], apart[1:], rise[:-1], rise[1:]
    least, most = (
        jnp.minimum(jnp.abs(below), jnp.abs(above)),
        jnp.maximum(jnp.abs(below), jnp.abs(above)),
    )
    upward = levels[2:] > levels[:-2]
    front = jnp.where(
        (below > 0) & (above > 0), 1.0, jnp.where((below < 0) & (above < 0), 0.0, -1.0)
    )
    front = jnp.where(front < 0, jnp.where(upward, most, least), front)
    back = jnp.where(
        (below > 0) & (above > 0), 0.0, jnp.where((below < 0) & (above < 0), 1.0, -1.0)
    )
    back = jnp.where(back < 0, jnp.where(upward, least, most), back)
    tangent = front[:, None, None] * ahead + back[:, None, None] * behind
    tangent = tangent / jnp.maximum(jnp.sqrt(sums(tangent**2)), 1e-300)
    along = sums(slopes * tangent)
    stretch = jnp.sqrt(sums(ahead**2)) - jnp.sqrt(sums(behind**2))
    nudged = -slopes + (along + spring * stretch) * tangent
    top = jnp.argmax(energies)
    climbs = (jnp.arange(energies.size) == top)[:, None, None]
    return jnp.where(climbs, -slopes + 2.0 * along * tangent, nudged), top, tangent


@functools.partial(jax.jit, static_argnames=("band",))
def _advance(
    batch: System,
    state: Any,
    ends: jax.Array,
    heights: jax.Array,
    target: Any,
    band: ElasticBand,
    limits: Limits,
) -> tuple[Any, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Steps of FIRE while the images' lists hold: (state, steps, largest force, the highest image,
    its tangent).
    """
    method, spring = band.fire, band.spring * limits.stiffness
    anchors, distance = jax.vmap(lambda s: slack(s.neighbors, s.box, s.range))(batch)

    def forces(chain: jax.Array, **_: Any) -> jax.Array:
        return shortened(_pulls(batch, chain, ends, heights, spring)[0], limits.strongest)

    def shift(chain: jax.Array, step: jax.Array, **_: Any) -> jax.Array:
        return chain + shortened(step, limits.longest)

    def unfinished(carry: tuple[Any, jax.Array, jax.Array]) -> jax.Array:
        state, steps, left = carry
        inside = jax.vmap(within)(method.positions(state), anchors, distance)
        return (steps < band.max_steps) & (left > target) & jnp.all(inside)

    def one_more(carry: tuple[Any, jax.Array, jax.Array]) -> tuple[Any, jax.Array, jax.Array]:
        state, steps, _ = carry
        state = apply(state)
        return state, steps + 1, jnp.max(jax.vmap(largest_force)(method.forces(state)))

    _, apply = method.minimizer(forces, shift, limits)
    state = method.with_forces(state, forces(method.positions(state)))
    start = (state, jnp.zeros((), jnp.int32), jnp.asarray(jnp.inf, limits.stiffness.dtype))
    state, steps, left = jax.lax.while_loop(unfinished, one_more, start)
    _, top, tangents = _pulls(batch, method.positions(state), ends, heights, spring)
    return state, steps, left, top, tangents[top]
