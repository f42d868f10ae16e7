"""Who carries force: contacts, rattlers, clusters, coordination, and the next breakpoint of each pair.

A contact is a pair whose force is above 10 times the largest net force on a particle: below that it cannot be told
from round-off. A rattler has fewer than d + 1 contacts; its contacts are deleted, and so on until none is left. For
laws that attract, contacts do not count: there a rattler is a particle that no pair holds with any stiffness.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdsens.boxes import nearest_image
from mdsens.laws import PairTerm
from mdsens.system import System, box_at, pair_distances, pair_terms, potential_energy

__all__ = ["Crossing", "Network", "backbone", "coordination", "crossings", "network", "pair_forces"]

FORCE_MARGIN = 10.0  # contacts carry this many times the largest net force
STIFFNESS_FLOOR = 1e-12  # of the stiffest pair; below it a pair holds nothing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Network:
    """The mechanical network of a relaxed configuration.

    Attributes:
      rattlers: (n,) True where the particle is not part of the network.
      contacts: (n,) number of contacts of each particle within the network.
      labels: (n,) the cluster a particle belongs to, named by its lowest index; a rattler is its own.
      whole: (n, d) positions with each cluster in one piece: images chosen along its bonds.
      wraps: (n,) by label, True where the cluster meets its own image, so that it cannot turn.
      mean_force: mean force of the contacts, 0 where there is none.
      pairs: number of contacts in all.
    """

    rattlers: jax.Array
    contacts: jax.Array
    labels: jax.Array
    whole: jax.Array
    wraps: jax.Array
    mean_force: jax.Array
    pairs: jax.Array


def pair_forces(term: PairTerm, distances: jax.Array) -> jax.Array:
    """-phi'(r) of each pair (m,), positive in repulsion."""
    return -jax.grad(lambda r: jnp.sum(term.energy(r)))(distances)


def _stiffness(term: PairTerm, r: jax.Array) -> jax.Array:
    """|phi''| + |phi'| / r of each pair: what it can hold a particle with."""
    slope = jax.grad(lambda s: jnp.sum(term.energy(s)))
    first, second = jax.jvp(slope, (r,), (jnp.ones_like(r),))
    return jnp.abs(second) + jnp.abs(first) / r


def _touches(i: jax.Array, j: jax.Array, active: jax.Array, n: int) -> jax.Array:
    count = jnp.zeros(n, jnp.int32)
    return count.at[i].add(active.astype(jnp.int32)).at[j].add(active.astype(jnp.int32))


def _clusters(i: jax.Array, j: jax.Array, active: jax.Array, n: int) -> jax.Array:
    """Lowest index in each particle's connected cluster, by passing labels over active pairs and jumping pointers."""

    def spread(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        labels, _ = carry
        low = jnp.where(active, jnp.minimum(labels[i], labels[j]), n - 1)
        new = labels.at[i].min(low).at[j].min(low)
        new = jnp.minimum(new, new[new])
        return new, jnp.any(new != labels)

    start = (jnp.arange(n, dtype=jnp.int32), jnp.ones((), bool))
    return jax.lax.while_loop(lambda carry: carry[1], spread, start)[0]


def _in_one_piece(
    i: jax.Array, j: jax.Array, active: jax.Array, labels: jax.Array, positions: jax.Array, box: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Positions with each cluster unwrapped outwards from its first particle; and which meet their own image."""
    n = positions.shape[0]
    bonds = nearest_image(positions[i] - positions[j], box)
    own, index = jnp.arange(n), jnp.arange(i.shape[0])

    def grow(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        whole, placed, _ = carry
        to_i, to_j = active & placed[j] & ~placed[i], active & placed[i] & ~placed[j]
        bond = jnp.full(n, -1).at[i].max(jnp.where(to_i, index, -1)).at[j].max(jnp.where(to_j, index, -1))
        found = bond >= 0
        is_i = i[bond] == own
        other = jnp.where(is_i, j[bond], i[bond])
        step = jnp.where(is_i[:, None], bonds[bond], -bonds[bond])
        return jnp.where(found[:, None], whole[other] + step, whole), placed | found, jnp.any(found)

    start = (positions, labels == own, jnp.ones((), bool))
    whole = jax.lax.while_loop(lambda carry: carry[2], grow, start)[0]
    torn = active & (jnp.sum((whole[i] - whole[j] - bonds) ** 2, axis=1) > 1e-6 * jnp.sum(bonds**2, axis=1))
    return whole, jnp.zeros(n, bool).at[labels[i]].max(torn)


@jax.jit
def network(system: System, max_force: jax.Array | float) -> Network:
    """Contacts, rattlers and clusters of a relaxed configuration.

    Args:
      system: relaxed, with a complete neighbour list.
      max_force: the largest net force left on a particle.

    Returns:
      a :class:`Network`. Traceable; nothing of it is differentiated.
    """
    system = jax.lax.stop_gradient(system)
    n, law = system.n, system.potential
    if not law.pairwise:  # nothing is known about who holds whom
        zeros = jnp.zeros(n, jnp.int32)
        zero = jnp.zeros((), system.positions.dtype)
        wraps = jnp.full(n, system.box is not None)
        return Network(jnp.zeros(n, bool), zeros, zeros, system.positions, wraps, zero, jnp.zeros((), jnp.int32))
    terms = pair_terms(system)
    box = system.box
    distances = [pair_distances(t, system.positions, box) for t in terms]
    forces = [pair_forces(t, r) for t, r in zip(terms, distances, strict=True)]
    if law.repulsive:  # every term runs over the same list
        i, j, total = terms[0].i, terms[0].j, sum(forces[1:], forces[0])
        touching = jnp.abs(total) > FORCE_MARGIN * max_force
        least = system.dimension + 1
    else:
        i, j = jnp.concatenate([t.i for t in terms]), jnp.concatenate([t.j for t in terms])
        stiffness = jnp.concatenate([_stiffness(t, r) for t, r in zip(terms, distances, strict=True)])
        total = jnp.concatenate(forces)
        touching = stiffness > STIFFNESS_FLOOR * jnp.max(stiffness, initial=0.0)
        least = 1

    def prune(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        active, _ = carry
        loose = _touches(i, j, active, n) < least
        left = active & ~loose[i] & ~loose[j]
        return left, jnp.any(left != active)

    active, _ = jax.lax.while_loop(lambda carry: carry[1], prune, (touching, jnp.ones((), bool)))
    contacts = _touches(i, j, active, n)
    pairs = jnp.sum(active)
    mean = jnp.sum(jnp.where(active, jnp.abs(total), 0.0)) / jnp.maximum(pairs, 1)
    labels = _clusters(i, j, active, n)
    whole, wraps = system.positions, jnp.zeros(n, bool)
    if box is not None:
        whole, wraps = _in_one_piece(i, j, active, labels, system.positions, box)
    return Network(contacts == 0, contacts, labels, whole, wraps, mean, pairs)


def backbone(system: System, net: Network) -> System:
    """The system without its rattlers' contacts: their pairs are taken off the list.

    Slicing their rows out of the Hessian instead would leave springs that pin the neighbours.
    """
    if not system.potential.repulsive:
        return system  # a rattler of an attractive law has no stiffness to delete
    pairs = system.neighbours.pairs
    i, j = jnp.minimum(pairs[0], system.n - 1), jnp.minimum(pairs[1], system.n - 1)
    loose = net.rattlers[i] | net.rattlers[j]
    kept = jnp.where(loose, system.n, pairs)
    return system.replace(neighbours=dataclasses.replace(system.neighbours, pairs=kept))


def coordination(system: System, net: Network | None = None) -> jax.Array:
    """Mean number of contacts of a particle that is no rattler, z = 2 N_c / (n - n_rattlers); 0 where there is none.

    Contacts are counted against the largest net force in the system as it is, so it means something at a minimum alone.
    """
    found = net
    if found is None:
        slope = jax.grad(lambda R: potential_energy(system, R))(system.positions)
        found = network(system, jnp.sqrt(jnp.max(jnp.sum(slope**2, axis=-1))))
    return 2.0 * found.pairs / jnp.maximum(jnp.sum(~found.rattlers), 1)


class Crossing(NamedTuple):
    """When each pair meets each breakpoint of its law along a path, to first order.

    Attributes:
      times: (k,) t of the path; negative behind, inf where a pair's distance to the breakpoint does not change.
      pairs: (k, 2) particles.
      inside: (k,) True where the pair is now nearer than the breakpoint, so that it opens there; else it closes.
      lengths: (k,) of the breakpoint.
    """

    times: jax.Array
    pairs: jax.Array
    inside: jax.Array
    lengths: jax.Array

    @property
    def forward(self) -> float:
        """The smallest t > 0; inf where no pair crosses."""
        times = np.asarray(self.times)
        return float(np.min(times[times >= 0], initial=np.inf))

    @property
    def backward(self) -> float:
        """The smallest -t > 0."""
        times = np.asarray(self.times)
        return float(np.min(-times[times <= 0], initial=np.inf))

    @property
    def radius(self) -> float:
        """The smaller of the two."""
        return min(self.forward, self.backward)

    def within(self, change: float) -> int:
        """How many pairs cross a breakpoint in |t| <= change. Host code."""
        crossed = np.abs(np.asarray(self.times)) <= change
        return np.unique(np.sort(np.asarray(self.pairs)[crossed], axis=1), axis=0).shape[0]

    def first(self, forward: bool = True) -> tuple[tuple[int, int], bool, float] | None:
        """The pair that crosses first on one side, whether it opens, and the breakpoint's length; None where none does.

        Host code.
        """
        times = np.asarray(self.times) * (1.0 if forward else -1.0)
        ahead = np.where(times >= 0, times, np.inf)
        if not ahead.size or not np.isfinite(ahead.min()):
            return None
        k = int(np.argmin(ahead))
        i, j = (int(p) for p in np.asarray(self.pairs[k]))
        return (i, j), bool(self.inside[k]), float(self.lengths[k])


@jax.jit
def crossings(
    system: System, velocity: jax.Array, dparams: Mapping[str, Any], rattlers: jax.Array | None = None
) -> Crossing:
    """Where pairs cross a breakpoint (contact, onset, cutoff) along params + t dparams, to first order.

    t = -(r - b) / d(r - b)/dt, over all pairs and breakpoints b.

    Args:
      system: relaxed; its list must reach beyond the breakpoints, as minimised systems' lists do.
      velocity: (n, d) derivative of the positions along the path.
      dparams: the direction, a full dict of parameters.
      rattlers: (n,) particles whose pairs are left out.
    """

    def gaps(positions: jax.Array, params: Any) -> list[jax.Array]:
        box = box_at(system, params)
        return [t.lengths() - pair_distances(t, positions, box) for t in pair_terms(system, params)]

    now, rates = jax.jvp(gaps, (system.positions, dict(system.params)), (velocity, dict(dparams)))
    times, firsts, seconds, inside = [jnp.zeros(0)], [jnp.zeros(0, jnp.int32)], [jnp.zeros(0, jnp.int32)], []
    lengths = [jnp.zeros(0)]
    for term, gap, rate in zip(pair_terms(system), now, rates, strict=True):
        real = term.mask if rattlers is None else term.mask & ~rattlers[term.i] & ~rattlers[term.j]
        times.append(jnp.where(real & (rate != 0), -gap / jnp.where(rate == 0, 1.0, rate), jnp.inf).ravel())
        firsts.append(jnp.broadcast_to(term.i, gap.shape).ravel())
        seconds.append(jnp.broadcast_to(term.j, gap.shape).ravel())
        inside.append((gap > 0).ravel())
        lengths.append(jnp.broadcast_to(term.lengths(), gap.shape).ravel())
    pairs = jnp.stack([jnp.concatenate(firsts), jnp.concatenate(seconds)], axis=1)
    sides = jnp.concatenate([jnp.zeros(0, bool), *inside])
    return Crossing(jnp.concatenate(times), pairs, sides, jnp.concatenate(lengths))
