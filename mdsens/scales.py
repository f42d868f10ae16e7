"""A system's own units: the length and stiffness of its law, and what follows from them for steps and tolerances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdsens.stationarity import Unknowns, gradient
from mdsens.system import System

__all__ = ["Limits", "doubtful_stiffness", "largest_stiffness", "round_off", "scales", "unrelaxed"]

POWERS = 20  # of the Hessian, in a power iteration
MARGIN = 10.0  # of the force left over the law's length: the stiffness that it can make or take
RELAXED = 1e-4  # of the mean contact force: a larger force left is that of no minimum


@jax.jit
def scales(system: System) -> tuple[jax.Array, jax.Array]:
    """The law's own length and largest stiffness, (l, k): they make the minimiser's steps independent of the units.

    l is where the pair energy is least (contact, for a law that only repels) and k the curvature there (at 0.9 l, for
    one that only repels) times the 2^(d+1) that a dense packing of such pairs reaches: 10 for harmonic discs and 900
    for a Lennard-Jones crystal, against largest eigenvalues of 10 and 850. Both are medians over some pairs. Of a law
    without pairs, l is the spacing of the particles and k the largest curvature of the energy where they are.
    """
    lengths, curvatures = [], []
    n, d = system.positions.shape
    extent = jnp.max(jnp.max(system.positions, axis=0) - jnp.min(system.positions, axis=0)) / max(n ** (1.0 / d) - 1, 1)
    spacing = jnp.where(extent > 0, extent, 1.0) if system.box is None else (system.volume / n) ** (1.0 / d)
    few = np.unique(np.linspace(0, n - 1, 8).astype(int))  # whoever they are near: a list would have some kinds more
    pairs = few[np.stack(np.triu_indices(few.size, 1))]
    for term in system.potential.terms(system.params, pairs, n, system.species, system.species_count):
        count = term.i.shape[0]
        if count == 0:
            continue
        some = np.unique(np.linspace(0, count - 1, 28).astype(int))
        values = tuple(v if v.ndim == 0 else v[some] for v in term.values)
        far = jnp.where(jnp.isfinite(system.range) & (system.range > 0), system.range, 4.0 * spacing)
        r = far * jnp.linspace(0.05, 1.0, 400)[:, None] * jnp.ones(some.shape[0])

        def phi(r: jax.Array, term: Any = term, values: Any = values) -> jax.Array:
            return term.phi(r, *values)

        energies = phi(r)
        least = jnp.argmin(jnp.where(jnp.isfinite(energies), energies, jnp.inf), axis=0)
        at = jnp.take_along_axis(r, least[None], axis=0)
        at_least = jnp.take_along_axis(energies, least[None], axis=0)
        slope = jax.grad(lambda r, phi=phi: jnp.sum(phi(r)))
        where = jnp.where(at_least < 0, at, 0.9 * at)
        curvature = jax.jvp(slope, (where,), (jnp.ones_like(where),))[1]
        lengths.append(jnp.median(at))
        curvatures.append(jnp.median(jnp.abs(curvature)))
    if not lengths:
        return spacing, _curvature(system)
    stiffness = 2.0 ** (d + 1) * jnp.max(jnp.stack(curvatures))
    return jnp.min(jnp.stack(lengths)), jnp.where(stiffness > 0, stiffness, 1.0)


_scales_each = jax.jit(jax.vmap(scales))


def _curvature(system: System) -> jax.Array:
    """The largest eigenvalue of the Hessian at the system's positions; 1 where it vanishes."""

    def slope(positions: jax.Array) -> jax.Array:
        return gradient(system, Unknowns(positions), system.params).positions

    return largest_stiffness(slope, system.positions, 1.0)


def largest_stiffness(slope: Callable[[jax.Array], jax.Array], positions: jax.Array, otherwise: Any) -> jax.Array:
    """The largest eigenvalue of the Hessian at positions (n, d), by power iteration: from 0.94 of it up to all of it in
    packings and glasses; ``otherwise`` where it vanishes or is not finite.
    """

    def product(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        v, size = carry
        w = jax.jvp(slope, (positions,), (v / jnp.where(size > 0, size, 1.0),))[1]
        return w, jnp.sqrt(jnp.sum(w**2))

    start = jnp.cos(jnp.arange(positions.size, dtype=positions.dtype) ** 2).reshape(positions.shape)
    _, size = jax.lax.fori_loop(0, POWERS, product, (start, jnp.sqrt(jnp.sum(start**2))))
    return jnp.where((size > 0) & jnp.isfinite(size), size, otherwise)


def round_off(system: System) -> float:
    """The largest force that the resolution of the positions alone can leave on a particle: eps |R| k.

    k is the law's largest stiffness. Minimisations reach between a tenth of it and all of it. Of a batch, the largest
    member's. Host code.
    """
    resolution = np.finfo(system.positions.dtype).eps * np.max(np.abs(np.asarray(system.positions)), initial=0.0)
    return float(resolution * jnp.max((scales if system.batch is None else _scales_each)(system)[1]))


class Limits(NamedTuple):
    """What keeps a minimiser's steps in the system's own units."""

    longest: Any  # step of a particle
    strongest: Any  # force on it
    stiffness: Any  # of the law

    @classmethod
    def of(cls, scale: tuple[Any, Any], method: Any) -> Limits:
        """From the law's length and stiffness."""
        length, stiffness = scale
        longest = method.max_step * length
        return cls(longest, method.force_limit(longest, stiffness), stiffness)


def unrelaxed(system: System, left: jax.Array, mean_force: jax.Array) -> jax.Array:
    """Whether the largest force left is that of no minimum: told by the contacts' mean force, or the law's own units.

    Traceable, for what is given a System without the status of its relaxation.
    """
    length, stiffness = scales(system)
    return left > RELAXED * jnp.where(mean_force > 0, mean_force, length * stiffness)


def doubtful_stiffness(system: System, left: float) -> float:
    """The stiffness below which the force left can make or take a mode's, so that its sign is not known."""
    return MARGIN * float(left) / float(scales(system)[0])
