"""This module computes the natural units of a system: length and stiffness of its potential.

It also computes the scales of the forces. Step sizes of minimizers and tolerances of forces are set
in these units.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.compilation import compiled
from mdsens._util.lattice import components
from mdsens.mechanics.forces import row_terms
from mdsens.mechanics.hessian import gradient, largest_force, largest_stiffness
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.system import System, images_of
from mdsens.potentials.base import Pairs, PairTerm

__all__ = [
    "RELAXED",
    "ForceScale",
    "Limits",
    "doubtful_stiffness",
    "force_goal",
    "force_scale",
    "force_scales",
    "natural_units",
    "round_off",
    "step_off_saddle",
    "unrelaxed",
]

# Stiffness that the largest force left on a particle can add to a mode, or take from it, in units
# of that force over the potential's length. It also tells contacts from round-off: their forces
# are larger than the force left by this factor.
MARGIN = 10.0
# Largest displacement of a coordinate along the mode in a step off a saddle, in units of the
# potential's length: far below the distance between neighbors, far above round-off.
OFF_SADDLE = 1e-3
# Largest force left at a minimum, in units of the mean pair force.
RELAXED = 1e-4
# Force at which a relaxation without a given tolerance ends, in units of the mean pair force.
GOAL = 1e-12
# Uncertainty of the force on a particle, in units of the round-off of its pairs (see
# ``force_scale``). Measured where FIRE no longer lowers the forces, on eight systems of 128 to
# 1,024 particles (discs and spheres of both exponents, a glass, a crystal with a vacancy, springs):
# the largest force is 0.6 to 1.3 such units in the median and 2.7 at most. It grows with the number
# of particles, since it is the largest of so many.
UNITS = 4.0
# Largest force left where nothing is in contact, in units of the potential's stiffness times its
# length: it belongs to an overlap that is about to open.
IDLE = 1e-8
# Strain of a pair whose force is the typical force of a potential that attracts.
BENT = 0.01
# Random changes of the last digits of the positions that measure the round-off of the forces, for
# a potential that is not a sum over pairs.
PROBES = 4


@compiled
def natural_units(system: System) -> tuple[jax.Array, jax.Array]:
    """Return the length scale l and the largest stiffness k of the potential, (l, k).

    The steps of minimizers are set in units of l and k, so that they do not depend on the units of
    the user. l is the distance of least pair energy (contact, for a potential that only repels). k
    is the curvature there (at 0.9 l, for a potential that only repels) times 2^(d+1) in d
    dimensions, the factor of a dense packing of such pairs: k is 10 for harmonic discs and 900 for
    a Lennard-Jones crystal, where the largest eigenvalues of the Hessian are 10 and 850. Both l and
    k are medians over some pairs. For a potential without pairs, l is the spacing of the particles,
    and k the largest curvature of the energy at their positions. Where a part of the energy is a
    function of all neighbors of an atom, l is at most the range, and k at least this curvature.
    """
    lengths = []
    curvatures = []
    n, d = system.positions.shape
    of_neighbors = system.potential.of_neighbors
    spacing = _spacing(system)
    if of_neighbors:
        # a molecule in a large cell has no longer steps than in a small one
        spacing = jnp.minimum(spacing, system.range)
    # All pairs of 8 particles spread over the indices, wherever they are: pairs of the neighbor
    # list would contain some pairs of species more often than others.
    sample = np.unique(np.linspace(0, n - 1, 8).astype(int))
    # a single particle only meets its own images
    pairs = Pairs(*sample[np.stack(np.triu_indices(sample.size, min(n - 1, 1)))])
    for term in system.potential.terms(
        system.params, pairs, n, system.species, system.species_count
    ):
        count = term.i.shape[0]
        if count == 0:
            continue
        # 28 pairs of 8 particles, or as many of the bonds
        chosen = np.unique(np.linspace(0, count - 1, 28).astype(int))
        values = tuple(v if v.ndim == 0 else v[chosen] for v in term.values)
        # the range is inf without a cutoff, and zero for bonds alone, which have a length, too
        has_range = jnp.isfinite(system.range) & (system.range > 0)
        longest = jnp.where(has_range, system.range, 4.0 * spacing)
        # (400, pairs) distances at which the energy is scanned for its minimum
        r = longest * jnp.linspace(0.05, 1.0, 400)[:, None] * jnp.ones(chosen.shape[0])

        # The arguments with defaults bind the values of this turn of the loop.
        def phi(
            r: jax.Array, term: PairTerm = term, values: tuple[jax.Array, ...] = values
        ) -> jax.Array:
            return term.phi(r, *values)

        energies = phi(r)
        # of equal energies argmin takes the first: contact, where the energy of a pair becomes zero
        least = jnp.argmin(jnp.where(jnp.isfinite(energies), energies, jnp.inf), axis=0)
        r_least = jnp.take_along_axis(r, least[None], axis=0)
        energy_least = jnp.take_along_axis(energies, least[None], axis=0)
        slope = jax.grad(lambda r, phi=phi: jnp.sum(phi(r)))
        # A potential that only repels has its least energy, zero, at contact and beyond.
        r_curvature = jnp.where(energy_least < 0, r_least, 0.9 * r_least)
        curvature = jax.jvp(slope, (r_curvature,), (jnp.ones_like(r_curvature),))[1]
        lengths.append(jnp.median(r_least))
        curvatures.append(jnp.median(jnp.abs(curvature)))
    if not lengths:
        return spacing, _curvature(system)
    stiffness = 2.0 ** (d + 1) * jnp.max(jnp.stack(curvatures))
    if of_neighbors:  # the pairs may be a small part of the energy
        stiffness = jnp.maximum(stiffness, _curvature(system))
    return jnp.min(jnp.stack(lengths)), jnp.where(stiffness > 0, stiffness, 1.0)


def _spacing(system: System) -> jax.Array:
    """Compute the spacing of the particles, from their number and the size of the system."""
    n, d = system.positions.shape
    if system.has_volume:
        return (system.volume / n) ** (1.0 / d)
    sides = jnp.eye(d) if system.box is None else system.box
    lengths = jnp.sqrt(jnp.sum(sides**2, axis=0))
    along = system.positions @ (sides / lengths)
    sizes = jnp.max(along, axis=0) - jnp.min(along, axis=0)
    periodic = np.asarray(system.periodic or (False,) * d)
    # n^(1/d) particles along an open edge have one spacing fewer than particles
    rows = n ** (1.0 / d)
    extent = jnp.max(jnp.where(periodic, lengths / rows, sizes / max(rows - 1, 1)))
    return jnp.where(extent > 0, extent, 1.0)


_natural_units_each = compiled(jax.vmap(natural_units))


def _curvature(system: System) -> jax.Array:
    """Compute the largest eigenvalue of the Hessian at the system's positions; 1 if it is zero."""

    def slope(positions: jax.Array) -> jax.Array:
        return gradient(system, Unknowns(positions), system.params).positions

    return largest_stiffness(slope, system.positions, 1.0)


def round_off(system: System) -> float:
    """Estimate the largest force on a particle that is due to round-off of the positions.

    The estimate is eps |R| k. eps is the machine precision, |R| the largest coordinate and k the
    largest stiffness of the potential. The largest force that minimizations reach is between a
    tenth of this estimate and all of it. For a batch, the result is the largest over its systems.
    The function does not work inside ``jax.jit``.
    """
    extent = np.max(np.abs(np.asarray(system.positions)), initial=0.0)
    resolution = np.finfo(system.positions.dtype).eps * extent
    units = natural_units if system.batch is None else _natural_units_each
    _, stiffness = units(system)
    return float(resolution * np.max(np.asarray(stiffness)))


class ForceScale(NamedTuple):
    """Scales of the forces at one configuration, for judging the largest force left on a particle.

    Forces are in energy per length. The entries are arrays of jax or numpy, or numbers.

    Attributes:
      mean: mean force of the pairs that interact. For a potential that attracts, at least the force
        of a pair strained by 1 %, since pair forces may cancel or be zero at a minimum. For a
        potential without pairs, the force of 1 % strain by the stiffness of the potential.
      floor: the largest force that round-off of the positions leaves on a particle, see
        ``force_scale``.
      idle: whether nothing is in contact. For a potential that only repels: no pair has a force
        above 10 times the largest force left on a particle, and this force is at most 1e-8 of l k,
        length scale times stiffness of the potential from :func:`natural_units`. For other pair
        potentials: no pair has a force or a stiffness.
    """

    mean: Any
    floor: Any
    idle: Any


@compiled
def force_scale(
    system: System, length: jax.Array, stiffness: jax.Array, left: jax.Array | float
) -> ForceScale:
    """Compute the mean pair force of a configuration, and the floor that round-off sets.

    The floor is the largest force on a particle that is due to round-off. A coordinate is stored to
    eps |R|, with the machine precision eps, and so is the vector between two particles. So the
    force on particle i is uncertain by

        floor_i = 4 eps sqrt(sum_j [(k_ij |R_ij|)^2 + f_ij^2]),

    with k_ij the stiffness of a pair, the larger of |phi''| and |phi'| / r for the pair potential
    phi at the distance r, |R_ij| the root mean square size of the two positions, and f_ij the force
    of the pair. The floor is that of the worst particle, since no minimization reaches a force
    below it. For a potential that is not a sum over pairs the floor is measured, as the change of
    the forces when the last digits of the positions change. The floor is never below eps l k_1, a
    force that counts as zero, with l the length scale of the potential and k_1 the stiffness of one
    pair.

    Args:
      system: a system with a complete neighbor list.
      length, stiffness: length and stiffness of the potential, from ``natural_units``.
      left: the largest force left on a particle, by which contacts are distinguished from
        round-off.

    The function works inside ``jax.jit``. The results have no derivative.
    """
    system, length, stiffness = jax.lax.stop_gradient((system, length, stiffness))
    n = system.n
    dtype = system.positions.dtype
    x = components(system.positions)
    eps = jnp.finfo(dtype).eps
    images = images_of(system, system.box)
    size_squared: Any = sum(c * c for c in x)  # |R_i|^2
    total = jnp.zeros((), dtype)
    count = jnp.zeros((), dtype)
    contacts = jnp.zeros((), dtype)
    noise_squared = jnp.zeros(n, dtype)
    interacts = jnp.zeros((), bool)
    for term in row_terms(system):
        if not term.j.size:
            continue
        apart = term.vectors(x, images)
        r = jnp.sqrt(jnp.where(term.mask, sum(v * v for v in apart), 1.0))
        # the default binds the term of this turn of the loop
        slope = jax.grad(lambda s, term=term: jnp.sum(term.energy(s)))
        force, curvature = jax.jvp(slope, (r,), (jnp.ones_like(r),))
        pair_stiffness = jnp.maximum(jnp.abs(curvature), jnp.abs(force) / r)
        interacts = interacts | jnp.any(pair_stiffness > 0)
        # half the sum of |R_i|^2 and |R_j|^2 is the mean square size of the two positions
        sizes_squared = size_squared[term.i] + size_squared[term.j]
        squared = pair_stiffness**2 * 0.5 * sizes_squared + force**2
        # Rows of neighbors have each pair twice, once for each particle; a list has it once.
        is_rows = term.j.ndim == 2
        if is_rows:
            noise_squared = noise_squared + jnp.sum(squared, axis=0)
        else:
            noise_squared = noise_squared.at[term.i].add(squared).at[term.j].add(squared)
        share = 0.5 if is_rows else 1.0
        size = jnp.abs(force)
        total = total + share * jnp.sum(size)
        count = count + share * jnp.sum(size > 0)
        contacts = contacts + share * jnp.sum(size > MARGIN * left)
    measured: Any = 0.0
    if not system.potential.pairwise:
        # The stiffness of such a potential is that of one configuration, and larger where the
        # particles are crowded, as at a random start: so it is computed here again.
        length, stiffness = natural_units(system)
        measured = _measured_round_off(system)
    smallest = eps * length * _pair_stiffness(system, stiffness)
    of_pairs = UNITS * eps * jnp.sqrt(jnp.max(noise_squared, initial=0.0))
    floor = jnp.maximum(jnp.maximum(of_pairs, smallest), measured)
    mean = total / jnp.maximum(count, 1.0)
    mean = jnp.maximum(mean, _strained_pair_force(system, length, stiffness))
    if system.potential.repulsive:
        idle = (contacts == 0) & (left <= IDLE * stiffness * length)
    else:
        idle = ~interacts & system.potential.pairwise
    return ForceScale(mean, floor, idle)


force_scales = compiled(jax.vmap(force_scale))


def _measured_round_off(system: System) -> jax.Array:
    """Measure the round-off of the forces by random changes of the last digits of the positions.

    In each of a few trials all particles are displaced at once, each by its own random vector, and
    the norm of the change of the force on each particle is computed. The result is twice the
    largest of these norms. A few trials are enough for the particle with the largest round-off to
    show about its largest change.
    """
    eps = jnp.finfo(system.positions.dtype).eps
    n, d = system.positions.shape

    def force(positions: jax.Array) -> jax.Array:
        return gradient(system, Unknowns(positions), system.params).positions

    def probe(key: jax.Array) -> jax.Array:
        noise = jax.random.normal(key, (n, d), system.positions.dtype)
        displacement = eps * jnp.abs(system.positions) * noise
        return largest_force(force(system.positions + displacement) - force(system.positions))

    # a fixed key: the same displacements, and the same status, in every run
    keys = jax.random.split(jax.random.PRNGKey(0), PROBES)
    return 2.0 * jnp.max(jax.lax.map(probe, keys))


def force_goal(
    scale: ForceScale, tolerance: float | np.ndarray | jax.Array | None
) -> tuple[Any, Any]:
    """Compute the largest force that counts as converged, and the force at which to stop.

    The first is the tolerance, or 1e-12 of the mean pair force where ``tolerance`` is None. The
    second is the larger of the first and the floor, the force that round-off leaves. The function
    is for arrays of numpy or jax.

    Args:
      scale: the mean pair force and the floor.
      tolerance: the largest force on a particle that the user accepts.
    """
    goal = GOAL * scale.mean if tolerance is None else tolerance
    xp = jnp if isinstance(scale.floor, jax.Array) else np
    return goal, xp.maximum(goal, scale.floor)


# Force on a particle that overlaps deeply with another, in units of the largest force that a
# particle may have. Soft discs at random positions do not reach it.
EXTREME = 10.0


class _Stepping(Protocol):
    """Protocol of the options that limit the steps of a minimizer of :mod:`mdsens.relaxation`.

    ``max_step`` is the longest step of a particle, in units of the length of the potential.
    ``force_limit`` returns the force that moves a particle by the length ``longest`` in one step.
    """

    @property
    def max_step(self) -> float: ...
    def force_limit(self, longest: jax.Array, stiffness: jax.Array) -> jax.Array: ...


class Limits(NamedTuple):
    """Limits of the steps of a minimizer, from the natural units of the system.

    Attributes:
      longest: longest step of a particle, a length.
      strongest: the force on a particle to which larger forces are shortened.
      stiffness: largest stiffness of the potential.
      extreme: the force above which a particle overlaps deeply with another; None for a potential
        of finite forces, whose random starts do not reach it.
    """

    longest: Any  # longest step of a particle
    strongest: Any  # largest force on a particle; larger ones are shortened to it
    stiffness: Any  # largest stiffness of the potential
    extreme: Any = None

    @classmethod
    def of(cls, scale: tuple[Any, Any], method: _Stepping, finite_force: bool) -> Limits:
        """Compute the limits of the steps for a method of :mod:`mdsens.relaxation`.

        Args:
          scale: length and stiffness of the potential, from ``natural_units``.
          method: the method, which gives its longest step in units of this length.
          finite_force: whether the potential's force is finite at every distance.
        """
        length, stiffness = scale
        longest = method.max_step * length
        strongest = method.force_limit(longest, stiffness)
        return cls(longest, strongest, stiffness, None if finite_force else EXTREME * strongest)


def unrelaxed(system: System, left: jax.Array, mean_force: jax.Array) -> jax.Array:
    """Return whether the largest force left on a particle is too large for a minimum.

    A force is too large above 1e-4 of the mean force of the contacts. Where nothing is in contact,
    it is too large above 1e-4 of l k: l is the length scale of the potential and k its stiffness,
    both from :func:`natural_units`. In single precision round-off alone can leave forces above this
    limit, so only a force that is not finite counts as too large. The status of a derivative then
    tells how accurate the derivative is. The function works inside ``jax.jit``.

    Args:
      left: the largest force left on a particle.
      mean_force: mean force of the contacts, 0 without contacts.
    """
    length, stiffness = natural_units(system)
    mean = jnp.maximum(mean_force, _strained_pair_force(system, length, stiffness))
    # eps is 2e-16 in double precision and 1e-7 in single precision
    double_precision = jnp.finfo(system.positions.dtype).eps < 1e-10
    limit = RELAXED * jnp.where(mean > 0, mean, length * stiffness)
    return ~jnp.isfinite(left) | (double_precision & (left > limit))


def _strained_pair_force(system: System, length: jax.Array, stiffness: jax.Array) -> jax.Array:
    """Compute the force of a pair that is strained by 1 %; 0 for a potential that only repels.

    Args:
      length, stiffness: length and stiffness of the potential, from ``natural_units``.
    """
    if system.potential.repulsive:
        return jnp.zeros_like(length)
    return BENT * _pair_stiffness(system, stiffness) * length


def _pair_stiffness(system: System, stiffness: jax.Array) -> jax.Array:
    """Compute the stiffness k = phi'' of a single pair from the stiffness of the potential.

    The stiffness of the potential is an estimate of the largest eigenvalue of the Hessian of a
    dense packing, 2^(d+1) k in d dimensions. For a potential that is no sum over pairs, it is
    returned as it is.

    Args:
      system: gives the potential and d.
      stiffness: stiffness of the potential, from ``natural_units``.
    """
    return stiffness / 2.0 ** (system.dimension + 1) if system.potential.pairwise else stiffness


def doubtful_stiffness(left: jax.Array | float, length: jax.Array | float) -> float:
    """Compute the stiffness below which the sign of a mode's stiffness is in doubt.

    The doubt comes from the force that the relaxation left on the particles.

    Args:
      left: the largest force left on a particle.
      length: length of the potential, from ``natural_units``.
    """
    return MARGIN * float(left) / float(length)


def step_off_saddle(
    mode: np.ndarray | jax.Array, length: float, least: float = 0.0
) -> np.ndarray | jax.Array:
    """Return a small displacement that leaves a saddle along its mode of negative stiffness.

    The mode is scaled such that the coordinate that moves most moves by a thousandth of ``length``
    or by ``least``, whichever is larger.

    Args:
      mode: the mode, of any shape and size.
      length: length of the potential, from ``natural_units``.
      least: smallest displacement of the coordinate that moves most.
    """
    return max(OFF_SADDLE * length, least) / abs(mode).max() * mode
