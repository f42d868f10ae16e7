"""This module finds the contacts, rattlers and clusters of a relaxed configuration.

A contact is a pair whose force is above 10 times the largest net force on a particle: a smaller
force cannot be distinguished from round-off. A rattler is a particle with fewer than d + 1 contacts
in d dimensions. The contacts of rattlers are deleted, and this is repeated until no rattler has a
contact.

A particle with fewer than d + 1 contacts is nevertheless no rattler if at least two of its contacts
carry a significant force (a single contact is never balanced): the particle is squeezed along a
line or in a plane. Such a particle buckles, and the Hessian shows that the configuration is a
saddle.

For potentials that attract, contacts are not counted: in such systems a rattler is a particle whose
pairs have no stiffness. Rigid bonds join particles to rigid bodies. A body with too few contacts is
cut off from the other particles as a whole, and is a cluster by itself. Walls count as contacts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mdsens._util.attributes import Named
from mdsens._util.compilation import compiled
from mdsens._util.lattice import Components, Images, components
from mdsens._util.portable import Portable
from mdsens.constraints import RigidBonds
from mdsens.implicit.closures import refusing_derivative
from mdsens.mechanics import lagrangian
from mdsens.mechanics.forces import row_terms
from mdsens.model.system import System, images_of, neighbor_vectors, potential_energy
from mdsens.potentials.base import PairTerm

__all__ = ["Network", "backbone", "coordination", "network", "pair_forces"]

# A contact carries more than this many times the largest net force on a particle.
FORCE_MARGIN = 10.0
# Smallest significant contact force, in units of the mean contact force. A particle with too few
# contacts whose forces are all smaller is still a rattler: its transverse stiffness, -force /
# distance, is below the resolution of a factor of the Hessian.
CARRIES = 1e-6
# Relative decrease of a pair's distance at which its force tells the stiffness that it has, or
# would have, in contact.
NEARLY = 1e-3
# Smallest stiffness of a pair that holds a particle, in units of the stiffest pair.
STIFFNESS_FLOOR = 1e-12


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Network(Portable, Named):
    """The contact network of a relaxed configuration of n particles in d dimensions.

    Attributes:
      rattlers: (n,) True where the particle is a rattler, and so no part of the network.
      loose: (n,) True for rattlers and for the particles of rigid bodies with too few contacts; the
        pairs of these particles with other bodies are not part of the network.
      contacts: (n,) number of contacts of each particle within the network.
      labels: (n,) the cluster of each particle, named by the lowest particle index in the cluster;
        a rattler is a cluster by itself.
      whole: (n, d) positions of the periodic images that put each cluster in one piece.
      wraps: (n,) entry c is True where the cluster with the label c is connected to its own
        periodic image, so that it cannot rotate, or about one axis alone.
      axes: (n, d) entry c is that axis, a unit vector, where the cluster with the label c is
        connected to its images along one direction only, as a wire is in 3-D; else zero.
      mean_force: mean force of the contacts, 0 without contacts.
      pairs: total number of contacts.
      touching: whether two particles that are no rattlers touch with a force so small that it may
        be zero, as in some symmetric packings. It is then not known whether the two particles are
        in contact, and so the Hessian, its negative modes and all derivatives are not known. A gap
        that the largest force left on a particle could close counts as touching.
    """

    rattlers: jax.Array
    loose: jax.Array
    contacts: jax.Array
    labels: jax.Array
    whole: jax.Array
    wraps: jax.Array
    axes: jax.Array
    mean_force: jax.Array
    pairs: jax.Array
    touching: jax.Array

    @property
    def unjammed(self) -> Any:
        """Whether no particle and no rigid body has enough contacts to be held in place.

        The value is False where all particles form a single rigid body, since its bonds fix its
        shape.
        """
        fields = (self.rattlers, self.loose, self.labels)
        if not any(isinstance(field, Tracer) for field in fields):
            # by numpy: single operations of jax outside of compiled code take half a millisecond
            fields = tuple(np.asarray(field) for field in fields)
        rattlers, loose, labels = fields
        several = (labels != labels[:1]).any()
        return rattlers.all() | (loose.all() & several)


def pair_forces(term: PairTerm, distances: jax.Array) -> jax.Array:
    """Compute the pair forces -phi'(r) of a pair potential phi at given distances r.

    The result has the shape of ``distances``. A repulsive force is positive.
    """
    return -jax.grad(lambda r: jnp.sum(term.energy(r)))(distances)


def _stiffness(term: PairTerm, r: jax.Array) -> jax.Array:
    """Compute the stiffness |phi''| + |phi'| / r of each pair, from its distance r.

    phi is the pair potential. The first term is the longitudinal, the second the transverse
    stiffness.
    """
    slope = jax.grad(lambda s: jnp.sum(term.energy(s)))
    first, second = jax.jvp(slope, (r,), (jnp.ones_like(r),))
    return jnp.abs(second) + jnp.abs(first) / r


class _Edges(NamedTuple):
    """Pairs of particles that may be contacts or bonds.

    The arrays have one of two layouts. Either they hold the neighbors of each of n particles in a
    column: then i is (1, n), the other arrays are (k, n) for up to k neighbors, and each pair
    appears twice. Or they hold a list of m pairs: then all arrays are (m,), and each pair appears
    once.

    Attributes:
      i, j: indices of the two particles.
      active: True where the pair is a contact or bond.
      bonds: the components of the vector R_i - R_j between the nearest images of the two particles.
      strong: True where the pair carries a significant force, above 1e-6 of the mean contact force;
        None for rigid bonds and for potentials that attract.
    """

    i: jax.Array
    j: jax.Array
    active: jax.Array
    bonds: tuple[jax.Array, ...]
    strong: jax.Array | None = None

    @property
    def rows(self) -> bool:
        """Whether pairs are stored in columns, one with the neighbors of each particle.

        If not, the pairs are stored as a plain list.
        """
        return self.j.ndim == 2

    @property
    def share(self) -> float:
        """Weight of one entry in a sum over pairs: 1/2 if each pair has two entries, else 1."""
        return 0.5 if self.rows else 1.0


def _count_contacts(edges: list[_Edges], n: int) -> jax.Array:
    """Count the active pairs (contacts or bonds) of each of the n particles, (n,)."""
    count = jnp.zeros(n, jnp.int32)
    for e in edges:
        active = e.active.astype(jnp.int32)
        if e.rows:
            count = count + jnp.sum(active, axis=0)
        else:
            count = count.at[e.i].add(active).at[e.j].add(active)
    return count


def _count_strong_contacts(edges: list[_Edges], n: int) -> jax.Array:
    """Count the contacts of each of the n particles that carry a significant force, (n,).

    A force is significant above 1e-6 of the mean contact force.
    """
    return _count_contacts(
        [e._replace(active=e.active & e.strong) for e in edges if e.strong is not None], n
    )


def _nearest_root(
    edges: list[_Edges], labels: jax.Array, whole: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Find the lowest cluster label among each particle and its neighbors: one step of a search.

    The label of a particle is the index of its root, the particle that stands for its cluster so
    far.

    Args:
      edges: the pairs of particles; only active pairs (contacts or bonds) connect neighbors.
      labels: (n,) label of each particle so far.
      whole: (n, d) displacement of each particle from its root, summed along bonds.

    Returns:
      the lowest label, (n,), and the displacement of each particle from the root of that label, (n,
        d).
    """
    n = labels.shape[0]
    lowest = labels
    displacement = whole
    for e in edges:
        if not e.j.shape[0]:
            continue
        if e.rows:
            # n is above all labels, so that a pair that is not active is never the lowest
            labels_j = jnp.where(e.active, labels[e.j], n)
            k = jnp.argmin(labels_j, axis=0)[None]
            low, other = (jnp.take_along_axis(x, k, axis=0)[0] for x in (labels_j, e.j))
            step = jnp.stack([jnp.take_along_axis(b, k, axis=0)[0] for b in e.bonds], axis=-1)
        else:
            index = jnp.arange(e.i.shape[0])
            bonds = jnp.stack(e.bonds, axis=-1)
            labels_i, labels_j = (jnp.where(e.active, labels[x], n) for x in (e.i, e.j))
            low = jnp.full(n, n, labels.dtype).at[e.i].min(labels_j).at[e.j].min(labels_i)
            # For each particle, of the bonds that lead to the lowest label the one with the highest
            # index.
            of_i, of_j = (
                jnp.where(e.active & (a == low[x]), index, -1)
                for a, x in ((labels_j, e.i), (labels_i, e.j))
            )
            # Without an active bond it stays -1, which reads the last bond. Nothing is made of it:
            # ``low`` is n there, and ``better`` False.
            chosen = jnp.full(n, -1).at[e.i].max(of_i).at[e.j].max(of_j)
            is_i = (e.i[chosen] == jnp.arange(n))[:, None]
            other = jnp.where(is_i[:, 0], e.j[chosen], e.i[chosen])
            step = jnp.where(is_i, bonds[chosen], -bonds[chosen])
        better = low < lowest
        lowest = jnp.where(better, low, lowest)
        # ``step`` is R_i - R_j: added to the displacement of j from the root, it gives that of i
        displacement = jnp.where(better[:, None], whole[other] + step, displacement)
    return lowest, displacement


def _clusters(edges: list[_Edges], n: int, d: int, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    """Find the clusters of particles that are connected by contacts or bonds.

    Each particle points to a root particle, and stores its displacement from the root. In each
    iteration a root takes over the lowest label that a bond of one of its particles leads to, and
    pointers are then shortened ("pointer jumping"). The number of iterations is the logarithm of
    the size of a cluster, whereas passing labels from neighbor to neighbor would take as many
    iterations as the cluster's diameter.

    Args:
      edges: the pairs; only active pairs connect particles.
      n: number of particles.
      d: dimension of space.

    Returns:
      labels, (n,): the lowest particle index in the cluster of each particle; and displacements (n,
        d), along bonds, from the particle with that index.
    """
    index = jnp.arange(n, dtype=jnp.int32)

    def spread(
        carry: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        labels, whole, _ = carry
        low, displacement = _nearest_root(edges, labels, whole)
        # For each root the lowest label that any of its particles has met, one of the particles
        # that have met it, and the displacement of the root from the new one through it.
        best = jnp.full(n, n, jnp.int32).at[labels].min(low)
        met_by = jnp.where(low == best[labels], index, -1)
        bearer = jnp.full(n, -1, jnp.int32).at[labels].max(met_by)
        # roots are the particles with their own index as label: these alone join another cluster
        joins = (best < index) & (labels == index)
        new = jnp.where(joins, best, low)
        through_bearer = displacement[bearer] - whole[bearer]
        displacement = jnp.where(joins[:, None], through_bearer, displacement)
        for _ in range(2):  # two jumps a round: from the root to its root, and again
            new, displacement = new[new], displacement + displacement[new]
        return new, displacement, jnp.any(new != labels)

    start = (index, jnp.zeros((n, d), dtype), jnp.ones((), bool))
    return jax.lax.while_loop(lambda carry: carry[2], spread, start)[:2]


def _rigid_edges(system: System, images: Images, x: Components) -> list[_Edges]:
    """Return the pairs of particles that rigid bonds connect, one set of pairs for each constraint.

    All of these pairs are marked as active, like contacts.

    Args:
      images: function that maps components of vectors to their nearest image.
      x: components of the positions.
    """
    edges = []
    for c in system.constraints:
        if isinstance(c, RigidBonds):
            i, j = c.bonds[:, 0], c.bonds[:, 1]
            bonds = images(tuple(y[i] - y[j] for y in x))
            edges.append(_Edges(i, j, jnp.ones(i.shape, bool), bonds))
    return edges


def _loose_of_particles(n: int, least: int) -> Callable[[list[_Edges]], jax.Array]:
    """Return a function that maps the pairs to a mask of the particles with too few contacts.

    The mask is (n,) for n particles. A particle has too few contacts if it has fewer than a given
    number, ``least``, and if fewer than two of them have a force above 1e-6 of the mean contact
    force.
    """

    def loose(edges: list[_Edges]) -> jax.Array:
        return (_count_contacts(edges, n) < least) & (_count_strong_contacts(edges, n) < 2)

    return loose


def _loose_of_bodies(
    system: System, bonds: list[_Edges], labels: jax.Array, least: int
) -> Callable[[list[_Edges]], jax.Array]:
    """Return a function that maps the pairs to a mask of the bodies with too few contacts.

    The mask is (n,), True for each of the n particles that belongs to such a rigid body.

    A rigid body with f degrees of freedom needs f + 1 contacts with other bodies and walls, as a
    single particle needs d + 1 in d dimensions. Pairs within the body do not count. A body that is
    pinned, f = 0, needs no contact.

    Args:
      bonds: the rigid bonds.
      labels: (n,) the body of each particle, as an index.
      least: number of contacts that a single particle needs.
    """
    n, d = system.positions.shape
    pinned, walls = lagrangian.supports(system)
    # entry c belongs to the body with the label c; entries of other indices stay zero
    freedoms = jnp.zeros(n, jnp.int32).at[labels].add(d - pinned)
    # each rigid bond removes one degree of freedom of its body
    for e in bonds:
        freedoms = freedoms.at[labels[e.i]].add(-1)
    # Where one contact holds a particle (least = 1, a potential that attracts), one holds a body.
    needed = freedoms + 1 if least > 1 else jnp.minimum(freedoms, 1)

    def loose(edges: list[_Edges]) -> jax.Array:
        others = [
            e._replace(active=e.active & (labels[e.i] != labels[jnp.minimum(e.j, n - 1)]))
            for e in edges
        ]
        count = (_count_contacts(others, n) + walls).astype(jnp.int32)
        contacts = jnp.zeros(n, jnp.int32).at[labels].add(count)
        count_strong = _count_strong_contacts(others, n).astype(jnp.int32)
        strong = jnp.zeros(n, jnp.int32).at[labels].add(count_strong)
        return ((contacts < needed) & (freedoms > 0) & (strong < 2))[labels]

    return loose


@compiled(static_argnames=("least",))
def network(system: System, max_force: jax.Array | float, least: int | None = None) -> Network:
    """Find the contacts, rattlers and clusters of a relaxed configuration.

    Args:
      system: a relaxed system with a complete neighbor list.
      max_force: the largest net force on a particle that the relaxation left.
      least: smallest number of contacts that keeps a particle in place. Where None, the number that
        a minimum needs: d + 1 in d dimensions for a potential that only repels, 1 for other
        potentials. At a saddle, two contacts that oppose each other are enough.

    Returns:
      a :class:`Network`. The function works inside ``jax.jit``; the result has no derivative.
    """
    system = jax.lax.stop_gradient(system)
    n = system.n
    potential = system.potential
    if not potential.listed:
        return _make_network_without_pairs(system)
    images = images_of(system, system.box)
    x = components(system.positions)
    terms = row_terms(system)
    bonds, distances = _compute_pair_vectors(terms, images, x)
    forces = [pair_forces(t, r) for t, r in zip(terms, distances, strict=True)]
    if potential.repulsive:
        # Every term has the same list of pairs, so that their forces can be added pair by pair.
        forces = [sum(forces[1:], forces[0])]
        edges = [_find_contacts(terms[0], bonds[0], forces[0], max_force)]
        least = least or system.dimension + 1
    else:
        edges = _find_stiff_pairs(terms, bonds, distances)
        least = least or 1
    if potential.of_neighbors:
        edges.append(_find_near(system))
        forces.append(jnp.zeros_like(edges[-1].bonds[0]))
    # The pairs of the potential come first, then the rigid bonds: only the former are contacts.
    pair_count = len(edges)
    find_loose = _loose_of_particles(n, least)
    bodies = jnp.arange(n, dtype=jnp.int32)  # without rigid bonds each particle is a body
    if system.constraints:
        rigid = _rigid_edges(system, images, x)
        bodies, _ = _clusters(rigid, n, system.dimension, system.positions.dtype)
        find_loose = _loose_of_bodies(system, rigid, bodies, least)
        edges = edges + rigid
    edges = _remove_loose(edges, pair_count, find_loose, bodies)
    loose = find_loose(edges[:pair_count])
    pairs, total_force = _sum_contacts(edges[:pair_count], forces)
    labels, offsets = _clusters(edges, n, system.dimension, system.positions.dtype)
    if system.box is None:
        whole = system.positions
        wraps = jnp.zeros(n, bool)
        axes = jnp.zeros_like(whole)
    else:
        whole = system.positions[labels] + offsets
        wraps, axes = _find_wraps(edges, labels, offsets)
    touching = jnp.zeros((), bool)
    if potential.repulsive:
        i, j = terms[0].i, jnp.minimum(terms[0].j, n - 1)  # padding has the index n
        excluded = loose[i] | loose[j] | (bodies[i] == bodies[j]) | ~terms[0].mask
        undecided = _may_touch(terms, distances[0], forces[0], max_force)
        touching = jnp.any(undecided & ~excluded)
    # The particles of a loose rigid body are no rattlers: only bodies of one particle are.
    single = jnp.zeros(n, jnp.int32).at[bodies].add(1)[bodies] == 1
    return Network(
        rattlers=loose & single,
        loose=loose,
        contacts=_count_contacts(edges, n),
        labels=labels,
        whole=whole,
        wraps=wraps,
        axes=axes,
        mean_force=total_force / jnp.maximum(pairs, 1),
        pairs=jnp.round(pairs).astype(jnp.int32),  # a sum of halves, of each pair twice
        touching=touching,
    )


def _make_network_without_pairs(system: System) -> Network:
    """Return the network of a potential without pairs: one cluster, no contacts, no rattlers."""
    zeros = jnp.zeros(system.n, jnp.int32)
    false = jnp.zeros(system.n, bool)
    return Network(
        rattlers=false,
        loose=false,
        contacts=zeros,
        labels=zeros,
        whole=system.positions,
        wraps=jnp.full(system.n, system.box is not None),
        axes=jnp.broadcast_to(_axis_of_wire(system), system.positions.shape),
        mean_force=jnp.zeros((), system.positions.dtype),
        pairs=jnp.zeros((), jnp.int32),
        touching=jnp.zeros((), bool),
    )


def _axis_of_wire(system: System) -> jax.Array:
    """Return the unit vector (d,) of the only periodic axis of a system in 3-D; else zero."""
    box = system.box
    if box is None or system.dimension == 2 or sum(system.periodic) != 1:
        return jnp.zeros(system.dimension, system.positions.dtype)
    side = box[:, system.periodic.index(True)]
    return side / jnp.sqrt(jnp.sum(side**2))


def _compute_pair_vectors(
    terms: tuple[PairTerm, ...], images: Images, x: Components
) -> tuple[list[Components], list[jax.Array]]:
    """Compute the vector R_i - R_j and the distance of each pair, for each term of the potential.

    A place in the neighbor list that holds no pair has the distance 1.

    Args:
      images: function that maps components of vectors to their nearest image.
      x: components of the positions R.
    """
    bonds = []
    distances = []
    for term in terms:
        apart = term.vectors(x, images)
        bonds.append(apart)
        distances.append(jnp.sqrt(jnp.where(term.mask, sum(v * v for v in apart), 1.0)))
    return bonds, distances


def _find_contacts(
    term: PairTerm, bonds: Components, force: jax.Array, max_force: jax.Array | float
) -> _Edges:
    """Return the pairs of a potential that only repels, with the contacts among them marked.

    A pair is a contact if its force is above 10 times the largest net force on a particle.

    Args:
      bonds: components of the vectors of the pairs.
      force: force of each pair.
      max_force: the largest net force on a particle.
    """
    size = jnp.abs(force)
    active = size > FORCE_MARGIN * max_force
    mean = jnp.sum(jnp.where(active, size, 0.0)) / jnp.maximum(jnp.sum(active), 1)
    return _Edges(term.i, term.j, active, bonds, size > CARRIES * mean)


def _find_stiff_pairs(
    terms: tuple[PairTerm, ...], bonds: list[Components], distances: list[jax.Array]
) -> list[_Edges]:
    """Return the pairs of a potential that attracts, with those that have a stiffness marked.

    Such pairs take the place of contacts, which are not defined for a potential that attracts.

    Args:
      bonds: components of the vectors of the pairs, for each term of the potential.
      distances: distances of the pairs, for each term.
    """
    if not terms:
        return []
    stiffness = [_stiffness(t, r) for t, r in zip(terms, distances, strict=True)]
    floor = STIFFNESS_FLOOR * jnp.max(jnp.stack([jnp.max(s, initial=0.0) for s in stiffness]))
    return [_Edges(t.i, t.j, s > floor, b) for t, s, b in zip(terms, stiffness, bonds, strict=True)]


def _find_near(system: System) -> _Edges:
    """Return the pairs of the neighbor list, with those within the range of the potential marked.

    They take the place of contacts for an energy that is a function of all neighbors of an atom.
    """
    listed = system.neighbors.columns
    species = system.species
    reach = system.potential.lengths(system.params, listed, system.n, species, system.species_count)
    # from the neighbor to the particle
    apart = tuple(-v for v in neighbor_vectors(system, system.positions, system.box))
    near = (listed.j < system.n) & (sum(v * v for v in apart) < jnp.asarray(reach) ** 2)
    return _Edges(listed.i, jnp.where(listed.j < system.n, listed.j, 0), near, apart)


def _remove_loose(
    edges: list[_Edges],
    pair_count: int,
    find_loose: Callable[[list[_Edges]], jax.Array],
    bodies: jax.Array,
) -> list[_Edges]:
    """Deactivate the contacts of particles with too few contacts, until no such particle has one.

    Args:
      edges: the pairs of each term of the potential, followed by the rigid bonds of each
        constraint.
      pair_count: number of terms of the potential; so many entries of ``edges`` come before those
        of rigid bonds.
      find_loose: function that maps the pairs to a mask of the particles with too few contacts.
      bodies: (n,) the rigid body of each particle, as an index.
    """

    def prune(carry: tuple[list[jax.Array], jax.Array]) -> tuple[list[jax.Array], jax.Array]:
        """Deactivate the contacts of particles that have too few contacts to be held in place.

        Contacts within a rigid body stay active.

        Args:
          carry: masks of the active contacts, and a flag that is not used.

        Returns:
          masks of the contacts that remain active, and whether any contact was deactivated.
        """
        now = [e._replace(active=a) for e, a in zip(edges, carry[0], strict=True)]
        loose = find_loose(now[:pair_count])
        left = [e.active & (~(loose[e.i] | loose[e.j]) | (bodies[e.i] == bodies[e.j])) for e in now]
        changed = [jnp.any(a != e.active) for a, e in zip(left, now, strict=True)]
        return left, jnp.any(jnp.stack(changed))

    start = ([e.active for e in edges], jnp.ones((), bool))
    active = jax.lax.while_loop(lambda carry: carry[1], prune, start)[0]
    return [e._replace(active=a) for e, a in zip(edges, active, strict=True)]


def _sum_contacts(
    contacts: list[_Edges], forces: list[jax.Array]
) -> tuple[jax.Array | int, jax.Array | int]:
    """Compute the number of contacts, and the sum of the absolute values of their forces.

    Args:
      contacts: the pairs of each term of the potential.
      forces: the forces of these pairs.
    """
    pairs = sum(e.share * jnp.sum(e.active) for e in contacts)
    total_force = sum(
        e.share * jnp.sum(jnp.where(e.active, jnp.abs(f), 0.0))
        for e, f in zip(contacts, forces, strict=True)
    )
    return pairs, total_force


def _find_wraps(
    edges: list[_Edges], labels: jax.Array, offsets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Find the clusters that are connected to their own periodic image, and in which directions.

    Args:
      edges: the pairs; only active pairs connect particles.
      labels: (n,) the cluster of each particle.
      offsets: (n, d) displacement of each particle from the first one of its cluster, along bonds.

    Returns:
      (wraps, axes): an array (n,), whose entry c is True for such a cluster with the label c, and
        unit vectors (n, d), the direction of its images where it has only one, in 3-D; else zero.
    """
    n, d = offsets.shape
    wraps = jnp.zeros(n, bool)
    # sum over the lattice vectors T between images of a cluster of T T^T
    spread = jnp.zeros((n, d, d), offsets.dtype)
    y = components(offsets)
    for e in edges:
        # A bond whose ends lie in different images of the cluster closes a loop around the cell:
        # its vector then differs from that of the unwrapped positions by a lattice vector. The
        # limit is 1e-3 of the bond's length, far above round-off.
        gaps = [a[e.i] - a[e.j] - b for a, b in zip(y, e.bonds, strict=True)]
        length_squared = sum(b * b for b in e.bonds)
        torn = e.active & (sum(g * g for g in gaps) > 1e-6 * length_squared)
        # of a list of bonds one end is enough, since both ends have the same label
        meets = jnp.any(torn, axis=0) if e.rows else jnp.zeros(n, bool).at[e.i].max(torn)
        wraps = wraps.at[labels].max(meets)
        if d == 3:
            ends = labels if e.rows else labels[e.i]
            spread = spread.at[ends].add(_squares([jnp.where(torn, g, 0.0) for g in gaps], e.rows))
    return wraps, _only_directions(spread)


def _squares(gap: list[jax.Array], rows: bool) -> jax.Array:
    """Return the products T T^T of lattice vectors with components ``gap``, (n, 3, 3).

    Of a neighbor list (``rows``) they are summed over the rows, of bonds there is one a bond: no
    array of all pairs has nine components.
    """
    products = [a * b for a in gap for b in gap] if not rows else _sums_of_products(gap)
    return jnp.stack(products, axis=-1).reshape(-1, 3, 3)


def _sums_of_products(gap: list[jax.Array]) -> list[jax.Array]:
    """Return the sum over the rows of a list of each product of two components, (n,) each."""
    return [jnp.sum(a * b, axis=0) for a in gap for b in gap]


def _only_directions(spread: jax.Array) -> jax.Array:
    """Return the direction of the vectors T of each cluster, (n, d), where they have only one.

    The result is a unit vector, or zero where the vectors have several directions or there are
    none. ``spread`` (n, d, d) is the sum of T T^T over the vectors of each cluster.
    """
    diagonal = jnp.diagonal(spread, axis1=1, axis2=2)
    size = jnp.sum(diagonal, axis=1)
    # of a single direction u the matrix is size u u^T, and each of its columns is along u
    column = jnp.take_along_axis(spread, jnp.argmax(diagonal, axis=1)[:, None, None], axis=2)[
        ..., 0
    ]
    norm = jnp.sqrt(jnp.sum(column**2, axis=1))
    u = column / jnp.where(norm > 0, norm, 1.0)[:, None]
    rest = spread - size[:, None, None] * u[:, :, None] * u[:, None, :]
    # 1e-6 is the round-off of lattice vectors in single precision, squared or not
    single = (size > 0) & (jnp.sum(rest**2, axis=(1, 2)) < 1e-6 * size**2)
    return jnp.where(single[:, None], u, 0.0)


def _may_touch(
    terms: tuple[PairTerm, ...], r: jax.Array, force: jax.Array, max_force: jax.Array | float
) -> jax.Array:
    """Return a mask of the pairs for which the forces do not decide whether they are in contact.

    The mask is for potentials that only repel. It is True where the force of the pair is at most 10
    times the largest net force left on a particle, ``max_force``, and where the pair would repel if
    it were nearer by the distance over which such a force can move the two particles.

    Args:
      r: distances of the pairs.
      force: forces of the pairs, at these distances.
    """
    # stiffness in contact, from below: the secant from r, where the force is small, to r (1 - 1e-3)
    force_nearer = sum(jnp.abs(pair_forces(t, r * (1.0 - NEARLY))) for t in terms)
    stiffness = force_nearer / (NEARLY * r)
    closable = FORCE_MARGIN * max_force / jnp.where(stiffness > 0, stiffness, 1.0)
    gap = jnp.where(stiffness > 0, closable, 0.0)
    gap = gap + 8.0 * jnp.finfo(r.dtype).eps * r  # and some units of round-off of the distance
    small = jnp.abs(force) <= FORCE_MARGIN * max_force
    return small & (sum(pair_forces(t, r - gap) for t in terms) > 0)


@compiled
def backbone(system: System, net: Network) -> System:
    """Return the backbone: the system without the contacts of rattlers and of loose rigid bodies.

    A body is loose if it has too few contacts to be held in place. The contacts are removed from
    the neighbor list: deleting the rows and columns of rattlers in the Hessian instead would leave
    springs that pin the neighbors of the rattlers. A system whose potential attracts is returned as
    it is.

    Args:
      net: the contact network of the system.
    """
    if not system.potential.repulsive:
        return system  # a rattler of an attractive potential has no stiffness to delete
    rows = system.neighbors.rows
    other = jnp.minimum(rows, system.n - 1)
    # pairs within a loose rigid body stay: its particles have one label
    cut = (net.loose | net.loose[other]) & (net.labels != net.labels[other])
    rows_left = jnp.where(cut, system.n, rows)  # the index n marks padding
    return system.replace(neighbors=dataclasses.replace(system.neighbors, rows=rows_left))


def coordination(system: System, net: Network | None = None) -> jax.Array:
    """Compute the mean number of contacts of non-rattlers, z = 2 N_c / (n - n_rattlers).

    N_c is the number of contacts, n the number of particles, and n_rattlers the number of rattlers.
    The result is 0 where all particles are rattlers. A contact is a pair whose force is above 10
    times the largest net force on a particle of the system, so that z has a meaning only at a
    minimum.

    Args:
      net: the contact network of the system; None to compute the network here.
    """
    contact_network = net
    if contact_network is None:
        slope = jax.grad(lambda R: potential_energy(system, R))(system.positions)
        contact_network = network(system, jnp.sqrt(jnp.max(jnp.sum(slope**2, axis=-1))))
    particles = jnp.maximum(jnp.sum(~contact_network.rattlers), 1)
    count = 2.0 * contact_network.pairs / particles
    why = (
        "`coordination` counts contacts, so that the result is piecewise constant and has no"
        " derivative: take ms.observables.smooth_coordination(system, width), or call"
        " coordination(jax.lax.stop_gradient(system)) where the result is to count as a constant."
    )
    return refusing_derivative(count, system, why)
