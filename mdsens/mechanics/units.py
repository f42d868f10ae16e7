"""A system's own units: the length and stiffness of its potential, and what follows from them for steps
and tolerances.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.lattice import components, nearest_images
from mdsens.mechanics.forces import row_terms
from mdsens.mechanics.hessian import Unknowns, gradient, largest_force
from mdsens.model.system import System

__all__ = [
    "RELAXED",
    "ForceScale",
    "Limits",
    "doubtful_stiffness",
    "force_goal",
    "force_scale",
    "force_scales",
    "largest_stiffness",
    "round_off",
    "natural_units",
    "unrelaxed",
]

POWERS = 20  # of the Hessian, in a power iteration
MARGIN = (
    10.0  # of the force left over the potential's length: the stiffness that it can make or take
)
RELAXED = 1e-4  # of the mean pair force: a larger force left is that of no minimum
GOAL = 1e-12  # of the mean pair force: what a relaxation goes down to where no tolerance is given
# Units of round-off that the force on a particle is uncertain by, for the pairs that it is made of.
# Measured where FIRE comes to stand, on eight systems of 128 to 1,024 particles (discs and spheres
# of both exponents, a glass, a crystal with a vacancy, springs): the largest force is 0.6 to 1.3
# such units in the median, 2.7 at most, and grows with the number of particles among which it is
# the largest.
UNITS = 4.0
# of the potential's own force: a smaller one, that no contact exceeds, is an overlap that opens
IDLE = 1e-8
BENT = 0.01  # strain of a pair that attracts, whose force is a force of its potential
PROBES = 4  # random changes of the last digit, of a potential that is more than pairs


@jax.jit
def natural_units(system: System) -> tuple[jax.Array, jax.Array]:
    """The potential's own length and largest stiffness, (l, k): they make the minimizer's steps
    independent of the units.

    l is where the pair energy is least (contact, for a potential that only repels) and k the curvature
    there (at 0.9 l, for one that only repels) times the 2^(d+1) that a dense packing of such pairs
    reaches: 10 for harmonic discs and 900 for a Lennard-Jones crystal, against largest eigenvalues
    of 10 and 850. Both are medians over some pairs. Of a potential without pairs, l is the spacing of the
    particles and k the largest curvature of the energy where they are.
    """
    lengths, curvatures = [], []
    n, d = system.positions.shape
    extent = jnp.max(jnp.max(system.positions, axis=0) - jnp.min(system.positions, axis=0)) / max(
        n ** (1.0 / d) - 1, 1
    )
    spacing = (
        jnp.where(extent > 0, extent, 1.0)
        if system.box is None
        else (system.volume / n) ** (1.0 / d)
    )
    few = np.unique(
        np.linspace(0, n - 1, 8).astype(int)
    )  # whoever they are near: a list would have some kinds more
    pairs = few[np.stack(np.triu_indices(few.size, 1))]
    for term in system.potential.terms(
        system.params, pairs, n, system.species, system.species_count
    ):
        count = term.i.shape[0]
        if count == 0:
            continue
        some = np.unique(np.linspace(0, count - 1, 28).astype(int))
        values = tuple(v if v.ndim == 0 else v[some] for v in term.values)
        far = jnp.where(
            jnp.isfinite(system.range) & (system.range > 0), system.range, 4.0 * spacing
        )
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


_scales_each = jax.jit(jax.vmap(natural_units))


def _curvature(system: System) -> jax.Array:
    """The largest eigenvalue of the Hessian at the system's positions; 1 where it vanishes."""

    def slope(positions: jax.Array) -> jax.Array:
        return gradient(system, Unknowns(positions), system.params).positions

    return largest_stiffness(slope, system.positions, 1.0)


def largest_stiffness(
    slope: Callable[[jax.Array], jax.Array], positions: jax.Array, otherwise: Any
) -> jax.Array:
    """The largest eigenvalue of the Hessian at positions (n, d), by power iteration: from 0.94 of
    it up to all of it in packings and glasses; ``otherwise`` where it vanishes or is not finite.
    """

    def product(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        v, size = carry
        w = jax.jvp(slope, (positions,), (v / jnp.where(size > 0, size, 1.0),))[1]
        return w, jnp.sqrt(jnp.sum(w**2))

    start = jnp.cos(jnp.arange(positions.size, dtype=positions.dtype) ** 2).reshape(positions.shape)
    _, size = jax.lax.fori_loop(0, POWERS, product, (start, jnp.sqrt(jnp.sum(start**2))))
    return jnp.where((size > 0) & jnp.isfinite(size), size, otherwise)


def round_off(system: System) -> float:
    """The largest force that the resolution of the positions alone can leave on a particle: eps |R|
    k.

    k is the potential's largest stiffness. Minimizations reach between a tenth of it and all of it. Of a
    batch, the largest member's. Host code.
    """
    resolution = np.finfo(system.positions.dtype).eps * np.max(
        np.abs(np.asarray(system.positions)), initial=0.0
    )
    return float(
        resolution * jnp.max((natural_units if system.batch is None else _scales_each)(system)[1])
    )


class ForceScale(NamedTuple):
    """What the largest force left on a particle is judged against, at one configuration; energy a
    length.

    Attributes:
      mean: mean force of the pairs that interact. Of a potential that attracts, whose pair forces
        may cancel or vanish at its minimum, at least the force of a pair strained by 1 %; of one
        without pairs the same by its stiffness.
      floor: the largest force that round-off of the positions leaves on a particle, see
        ``force_scale``.
      idle: whether nothing is in contact. Of a potential that only repels: no pair has a force
        above 10 times the largest one left on a particle, and that one is 1e-8 at most of the
        potential's own. Of any other one that is made of pairs: none has a force or a stiffness.
    """

    mean: Any
    floor: Any
    idle: Any


@jax.jit
def force_scale(system: System, length: jax.Array, stiffness: jax.Array, left: Any) -> ForceScale:
    """The mean pair force and the force floor of a configuration.

    A coordinate is stored to eps |R|, and so is the vector between two particles, so that the force
    on particle i is uncertain by

        floor_i = 4 eps sqrt(sum_j (k_ij |R_ij|)^2 + f_ij^2),

    k_ij the stiffness of a pair, |phi''| or |phi'| / r, |R_ij| the mean size of the two positions,
    f_ij its force. No minimization goes below that of its worst particle. Of a potential that is
    more than pairs the floor is measured: by what the forces change where the last digits of the
    positions do. It is never below eps times the force that the length and stiffness of a pair
    make, which counts as none.

    Args:
      system: with a complete list.
      length, stiffness: from ``natural_units``.
      left: the largest force left on a particle, which tells contacts from round-off.

    Traceable. Nothing of it is differentiated.
    """
    system, length, stiffness = jax.lax.stop_gradient((system, length, stiffness))
    n = system.n
    dtype, x = system.positions.dtype, components(system.positions)
    eps, images = jnp.finfo(dtype).eps, nearest_images(system.box)
    size: Any = sum(c * c for c in x)
    total, count, contacts = jnp.zeros((), dtype), jnp.zeros((), dtype), jnp.zeros((), dtype)
    noise, reached = jnp.zeros(n, dtype), jnp.zeros((), bool)
    for term in row_terms(system):
        if not term.j.size:
            continue
        apart = images(tuple(c[term.i] - c[term.j] for c in x))
        r = jnp.sqrt(jnp.where(term.mask, sum(v * v for v in apart), 1.0))
        slope = jax.grad(lambda s, term=term: jnp.sum(term.energy(s)))
        force, curvature = jax.jvp(slope, (r,), (jnp.ones_like(r),))
        firm = jnp.maximum(jnp.abs(curvature), jnp.abs(force) / r)
        reached = reached | jnp.any(firm > 0)
        squared = firm**2 * 0.5 * (size[term.i] + size[term.j]) + force**2
        rows = term.j.ndim == 2
        noise = (
            noise + jnp.sum(squared, axis=0)
            if rows
            else noise.at[term.i].add(squared).at[term.j].add(squared)
        )
        share, f = 0.5 if rows else 1.0, jnp.abs(force)
        total, count = total + share * jnp.sum(f), count + share * jnp.sum(f > 0)
        contacts = contacts + share * jnp.sum(f > MARGIN * left)
    shaken: Any = 0.0
    if not system.potential.pairwise:
        length, stiffness = natural_units(
            system
        )  # its stiffness is that of one configuration: a crowded start's is larger
        shaken = _shaken(system)
    own = eps * length * _of_a_pair(system, stiffness)
    floor = jnp.maximum(
        jnp.maximum(UNITS * eps * jnp.sqrt(jnp.max(noise, initial=0.0)), own), shaken
    )
    mean = total / jnp.maximum(count, 1.0)
    mean = jnp.maximum(mean, _bent(system, length, stiffness))
    if system.potential.repulsive:
        idle = (contacts == 0) & (left <= IDLE * stiffness * length)
    else:
        idle = ~reached & system.potential.pairwise
    return ForceScale(mean, floor, idle)


force_scales = jax.jit(jax.vmap(force_scale))


def _shaken(system: System) -> jax.Array:
    """How much the largest force changes where the last digits of the positions do, twice the
    largest of some trials.

    Together, the particles' whole force counts: the probes are random, and the worst particle is
    found in few of them.
    """
    eps = jnp.finfo(system.positions.dtype).eps
    n, d = system.positions.shape

    def force(positions: jax.Array) -> jax.Array:
        return gradient(system, Unknowns(positions), system.params).positions

    def probe(key: jax.Array) -> jax.Array:
        aside = (
            eps * jnp.abs(system.positions) * jax.random.normal(key, (n, d), system.positions.dtype)
        )
        return largest_force(force(system.positions + aside) - force(system.positions))

    keys = jax.random.split(jax.random.PRNGKey(0), PROBES)
    return 2.0 * jnp.max(jax.lax.map(probe, keys))


def force_goal(scale: ForceScale, tolerance: Any) -> tuple[Any, Any]:
    """The largest force that counts as converged, and the one to stop at: (tolerance or 1e-12 of
    the mean pair force, the larger of it and the floor). Of arrays of numpy or jax.
    """
    goal = GOAL * scale.mean if tolerance is None else tolerance
    xp = jnp if isinstance(scale.floor, jax.Array) else np
    return goal, xp.maximum(goal, scale.floor)


class Limits(NamedTuple):
    """What keeps a minimizer's steps in the system's own units."""

    longest: Any  # step of a particle
    strongest: Any  # force on it
    stiffness: Any  # of the potential

    @classmethod
    def of(cls, scale: tuple[Any, Any], method: Any) -> Limits:
        """From the potential's length and stiffness."""
        length, stiffness = scale
        longest = method.max_step * length
        return cls(longest, method.force_limit(longest, stiffness), stiffness)


def unrelaxed(system: System, left: jax.Array, mean_force: jax.Array) -> jax.Array:
    """Whether the largest force left is that of no minimum, beside the mean force of the contacts.
    Traceable.

    Where nothing is in contact, the force of the potential's own length and stiffness takes its
    place. In single precision round-off alone leaves as much; what is then known of a derivative is
    said by its own status.
    """
    length, stiffness = natural_units(system)
    mean = jnp.maximum(mean_force, _bent(system, length, stiffness))
    resolved = jnp.finfo(system.positions.dtype).eps < 1e-10
    return ~jnp.isfinite(left) | (
        resolved & (left > RELAXED * jnp.where(mean > 0, mean, length * stiffness))
    )


def _bent(system: System, length: jax.Array, stiffness: jax.Array) -> jax.Array:
    """The force of a pair strained by 1 %, of a potential that does not only repel; without pairs
    by its stiffness.
    """
    if system.potential.repulsive:
        return jnp.zeros_like(length)
    return BENT * _of_a_pair(system, stiffness) * length


def _of_a_pair(system: System, stiffness: jax.Array) -> jax.Array:
    """The stiffness of one pair, where ``natural_units`` gives that of a dense packing; that of all
    without pairs.
    """
    return stiffness / 2.0 ** (system.dimension + 1) if system.potential.pairwise else stiffness


def doubtful_stiffness(left: Any, length: Any) -> float:
    """The stiffness below which the force left can make or take a mode's, so that its sign is not
    known; with the potential's length.
    """
    return MARGIN * float(left) / float(length)
