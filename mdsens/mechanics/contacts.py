"""Who carries force: contacts, rattlers, clusters, coordination.

A contact is a pair whose force is above 10 times the largest net force on a particle: below that it
cannot be told from round-off. A rattler has fewer than d + 1 contacts; its contacts are deleted,
and so on until none is left. But one whose few contacts carry a force that matters, two of them at
least, since one is never balanced, is squeezed along a
line or in a plane. It is no rattler: it buckles, and the Hessian tells that the configuration is a
  saddle. For
potentials that attract, contacts do not count: there a rattler is a particle that no pair holds with any
  stiffness. Rigid
bonds join particles to bodies: one that too little holds is cut off from the others as a whole, a
cluster of its own. Walls count as contacts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mdsens._util.attributes import Named
from mdsens._util.lattice import components, nearest_images
from mdsens._util.portable import Portable
from mdsens.constraints import RigidBonds
from mdsens.implicit._closures import refusing_derivative
from mdsens.mechanics import lagrangian
from mdsens.mechanics.forces import row_terms
from mdsens.model.system import System, potential_energy
from mdsens.potentials.base import PairTerm

__all__ = ["Network", "backbone", "coordination", "network", "pair_forces"]

FORCE_MARGIN = 10.0  # contacts carry this many times the largest net force
# Of the mean contact force: what a particle with too few contacts may carry and still be a rattler.
# Its transverse stiffness, -force / distance, is then below what a factor of the Hessian resolves.
CARRIES = 1e-6
NEARLY = (
    1e-3  # of a distance: what a pair is brought nearer by, to see whether it would be in contact
)
STIFFNESS_FLOOR = 1e-12  # of the stiffest pair; below it a pair holds nothing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Network(Portable, Named):
    """The mechanical network of a relaxed configuration.

    Attributes:
      rattlers: (n,) True where the particle is not part of the network.
      loose: (n,) rattlers, and the particles of rigid bodies that too little holds: pairs with
        others do not count.
      contacts: (n,) number of contacts of each particle within the network.
      labels: (n,) the cluster a particle belongs to, named by its lowest index; a rattler is its
        own.
      whole: (n, d) positions with each cluster in one piece: images chosen along its bonds.
      wraps: (n,) by label, True where the cluster meets its own image, so that it cannot turn.
      mean_force: mean force of the contacts, 0 where there is none.
      pairs: number of contacts in all.
      touching: whether two particles that are no rattlers touch with a force so small that it may
        be none, as the rows of some symmetric packings do. They may be in contact or not, and so
        the Hessian, its negative modes and all derivatives are not known. A gap counts that the
        largest force left could close.
    """

    rattlers: jax.Array
    loose: jax.Array
    contacts: jax.Array
    labels: jax.Array
    whole: jax.Array
    wraps: jax.Array
    mean_force: jax.Array
    pairs: jax.Array
    touching: jax.Array

    @property
    def unjammed(self) -> jax.Array:
        """True where nothing holds any particle, or any of several rigid bodies; one body alone has
        its shape.
        """
        several = (self.labels != self.labels[:1]).any()
        return self.rattlers.all() | (self.loose.all() & several)


def pair_forces(term: PairTerm, distances: jax.Array) -> jax.Array:
    """-phi'(r) of each pair (m,), positive in repulsion."""
    return -jax.grad(lambda r: jnp.sum(term.energy(r)))(distances)


def _stiffness(term: PairTerm, r: jax.Array) -> jax.Array:
    """|phi''| + |phi'| / r of each pair: what it can hold a particle with."""
    slope = jax.grad(lambda s: jnp.sum(term.energy(s)))
    first, second = jax.jvp(slope, (r,), (jnp.ones_like(r),))
    return jnp.abs(second) + jnp.abs(first) / r


class _Edges(NamedTuple):
    """Pairs that may hold: of a list as rows, i (1, n) and the rest (k, n), each pair twice; or
    listed once, (m,).

    ``bonds`` are the components of R_i - R_j, nearest images; ``strong`` those that carry a force
    that matters, where few contacts make a rattler.
    """

    i: jax.Array
    j: jax.Array
    active: jax.Array
    bonds: tuple[jax.Array, ...]
    strong: jax.Array | None = None

    @property
    def rows(self) -> bool:
        return self.j.ndim == 2

    @property
    def share(self) -> float:
        """Of a pair, that one entry is."""
        return 0.5 if self.rows else 1.0


def _touches(edges: list[_Edges], n: int) -> jax.Array:
    """How many active pairs each particle has, (n,)."""
    count = jnp.zeros(n, jnp.int32)
    for e in edges:
        one = e.active.astype(jnp.int32)
        count = count + jnp.sum(one, axis=0) if e.rows else count.at[e.i].add(one).at[e.j].add(one)
    return count


def _carries(edges: list[_Edges], n: int) -> jax.Array:
    """How many contacts of each particle carry a force that matters, (n,)."""
    return _touches(
        [e._replace(active=e.active & e.strong) for e in edges if e.strong is not None], n
    )


def _nearest_root(
    edges: list[_Edges], labels: jax.Array, whole: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The lowest label among each particle and its neighbors, and where the particle is from that
    label's root.
    """
    n = labels.shape[0]
    lowest, place = labels, whole
    for e in edges:
        if not e.j.shape[0]:
            continue
        if e.rows:
            theirs = jnp.where(e.active, labels[e.j], n)
            k = jnp.argmin(theirs, axis=0)[None]
            low, other = (jnp.take_along_axis(x, k, axis=0)[0] for x in (theirs, e.j))
            step = jnp.stack([jnp.take_along_axis(b, k, axis=0)[0] for b in e.bonds], axis=-1)
        else:
            index, bonds = jnp.arange(e.i.shape[0]), jnp.stack(e.bonds, axis=-1)
            mine, theirs = (jnp.where(e.active, labels[x], n) for x in (e.i, e.j))
            low = jnp.full(n, n, labels.dtype).at[e.i].min(theirs).at[e.j].min(mine)
            of_i, of_j = (
                jnp.where(e.active & (a == low[x]), index, -1)
                for a, x in ((theirs, e.i), (mine, e.j))
            )
            chosen = jnp.full(n, -1).at[e.i].max(of_i).at[e.j].max(of_j)
            is_i = (e.i[chosen] == jnp.arange(n))[:, None]
            other = jnp.where(is_i[:, 0], e.j[chosen], e.i[chosen])
            step = jnp.where(is_i, bonds[chosen], -bonds[chosen])
        better = low < lowest
        lowest = jnp.where(better, low, lowest)
        place = jnp.where(better[:, None], whole[other] + step, place)
    return lowest, place


def _clusters(edges: list[_Edges], n: int, d: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The lowest index in each particle's cluster, and where the particle is from it along the
    cluster's bonds.

    Labels pass over bonds, from each particle to the root it has so far, and on by jumping
    pointers, each with the vector it came along: as many rounds as the logarithm of a cluster's
    size, not as its diameter.
    """
    own = jnp.arange(n, dtype=jnp.int32)

    def spread(
        carry: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        labels, whole, _ = carry
        low, place = _nearest_root(edges, labels, whole)
        # to the root so far: the lowest label that one of its particles has met, and the way there
        # by that particle
        best = jnp.full(n, n, jnp.int32).at[labels].min(low)
        bearer = jnp.full(n, -1, jnp.int32).at[labels].max(jnp.where(low == best[labels], own, -1))
        hooked = (best < own) & (labels == own)
        new = jnp.where(hooked, best, low)
        place = jnp.where(hooked[:, None], place[bearer] - whole[bearer], place)
        for _ in range(2):
            new, place = new[new], place + place[new]
        return new, place, jnp.any(new != labels)

    start = (own, jnp.zeros((n, d), dtype), jnp.ones((), bool))
    return jax.lax.while_loop(lambda carry: carry[2], spread, start)[:2]


def _rigid_edges(system: System, images: Any, x: tuple[jax.Array, ...]) -> list[_Edges]:
    """The rigid bonds, which hold as contacts do."""
    found = []
    for c in system.constraints:
        if isinstance(c, RigidBonds):
            i, j = c.bonds[:, 0], c.bonds[:, 1]
            found.append(
                _Edges(i, j, jnp.ones(i.shape, bool), images(tuple(y[i] - y[j] for y in x)))
            )
    return found


def _loose_of_particles(n: int, least: int) -> Callable[[list[_Edges]], jax.Array]:
    """Which particles too few pairs hold, (n,)."""
    return lambda edges: (_touches(edges, n) < least) & (_carries(edges, n) < 2)


def _loose_of_bodies(
    system: System, bonds: list[_Edges], labels: jax.Array, least: int
) -> Callable[[list[_Edges]], jax.Array]:
    """The same where bonds join particles to bodies: of a body with f freedoms left, f + 1 pairs
    and walls are to hold it, as d + 1 hold one particle; pairs within it do not count, and one that
    is pinned is held.
    """
    n, d = system.positions.shape
    stuck, walls = lagrangian.supports(system)
    freedoms = jnp.zeros(n, jnp.int32).at[labels].add(d - stuck)
    for e in bonds:
        freedoms = freedoms.at[labels[e.i]].add(-1)
    needed = freedoms + 1 if least > 1 else jnp.minimum(freedoms, 1)

    def loose(edges: list[_Edges]) -> jax.Array:
        others = [
            e._replace(active=e.active & (labels[e.i] != labels[jnp.minimum(e.j, n - 1)]))
            for e in edges
        ]
        held = (
            jnp.zeros(n, jnp.int32).at[labels].add((_touches(others, n) + walls).astype(jnp.int32))
        )
        strong = jnp.zeros(n, jnp.int32).at[labels].add(_carries(others, n).astype(jnp.int32))
        return ((held < needed) & (freedoms > 0) & (strong < 2))[labels]

    return loose


@functools.partial(jax.jit, static_argnames=("least",))
def network(system: System, max_force: jax.Array | float, least: int | None = None) -> Network:
    """Contacts, rattlers and clusters of a relaxed configuration.

    Args:
      system: relaxed, with a complete neighbor list.
      max_force: the largest net force left on a particle.
      least: contacts that hold a particle; where None, as many as a minimum needs: d + 1 of a
        potential that only repels, 1 of another. At a saddle two that oppose each other do.

    Returns:
      a :class:`Network`. Traceable; nothing of it is differentiated.
    """
    system = jax.lax.stop_gradient(system)
    n, potential = system.n, system.potential
    if not potential.pairwise:  # nothing is known about who holds whom
        zeros = jnp.zeros(n, jnp.int32)
        zero = jnp.zeros((), system.positions.dtype)
        wraps = jnp.full(n, system.box is not None)
        none = jnp.zeros(n, bool)
        never = jnp.zeros((), bool)
        return Network(
            none, none, zeros, zeros, system.positions, wraps, zero, jnp.zeros((), jnp.int32), never
        )
    images, x = nearest_images(system.box), components(system.positions)
    terms, bonds, distances = row_terms(system), [], []
    for term in terms:
        apart = images(tuple(c[term.i] - c[term.j] for c in x))
        bonds.append(apart)
        distances.append(jnp.sqrt(jnp.where(term.mask, sum(v * v for v in apart), 1.0)))
    forces = [pair_forces(t, r) for t, r in zip(terms, distances, strict=True)]
    if potential.repulsive:  # every term runs over the same list
        total = sum(forces[1:], forces[0])
        size = jnp.abs(total)
        active = size > FORCE_MARGIN * max_force
        mean = jnp.sum(jnp.where(active, size, 0.0)) / jnp.maximum(jnp.sum(active), 1)
        edges = [_Edges(terms[0].i, terms[0].j, active, bonds[0], size > CARRIES * mean)]
        forces, least = [total], least or system.dimension + 1
    else:
        stiffness = [_stiffness(t, r) for t, r in zip(terms, distances, strict=True)]
        floor = STIFFNESS_FLOOR * jnp.max(jnp.stack([jnp.max(s, initial=0.0) for s in stiffness]))
        edges = [
            _Edges(t.i, t.j, s > floor, b) for t, s, b in zip(terms, stiffness, bonds, strict=True)
        ]
        least = least or 1
    real = len(edges)
    loose_among, bodies = _loose_of_particles(n, least), jnp.arange(n, dtype=jnp.int32)
    if system.constraints:
        bonds_of = _rigid_edges(system, images, x)
        bodies, _ = _clusters(bonds_of, n, system.dimension, system.positions.dtype)
        loose_among = _loose_of_bodies(system, bonds_of, bodies, least)
        edges = edges + bonds_of

    def prune(carry: tuple[list[jax.Array], jax.Array]) -> tuple[list[jax.Array], jax.Array]:
        now = [e._replace(active=a) for e, a in zip(edges, carry[0], strict=True)]
        loose = loose_among(now[:real])
        left = [e.active & (~(loose[e.i] | loose[e.j]) | (bodies[e.i] == bodies[e.j])) for e in now]
        return left, jnp.any(
            jnp.stack([jnp.any(a != e.active) for a, e in zip(left, now, strict=True)])
        )

    start = ([e.active for e in edges], jnp.ones((), bool))
    active = jax.lax.while_loop(lambda carry: carry[1], prune, start)[0]
    edges = [e._replace(active=a) for e, a in zip(edges, active, strict=True)]
    contacts, loose = _touches(edges, n), loose_among(edges[:real])
    pairs = sum(e.share * jnp.sum(e.active) for e in edges[:real])
    pull = sum(
        e.share * jnp.sum(jnp.where(e.active, jnp.abs(f), 0.0))
        for e, f in zip(edges[:real], forces, strict=True)
    )
    labels, offsets = _clusters(edges, n, system.dimension, system.positions.dtype)
    whole, wraps = system.positions, jnp.zeros(n, bool)
    if system.box is not None:
        whole = system.positions[labels] + offsets
        for e in edges:
            y = components(offsets)
            gaps = [a[e.i] - a[e.j] - b for a, b in zip(y, e.bonds, strict=True)]
            length = sum(b * b for b in e.bonds)
            torn = e.active & (sum(g * g for g in gaps) > 1e-6 * length)
            met = jnp.any(torn, axis=0) if e.rows else jnp.zeros(n, bool).at[e.i].max(torn)
            wraps = wraps.at[labels].max(met)
    count = jnp.round(pairs).astype(jnp.int32)
    touch = jnp.zeros((), bool)
    if potential.repulsive:
        other = jnp.minimum(terms[0].j, n - 1)
        apart = (
            loose[terms[0].i]
            | loose[other]
            | (bodies[terms[0].i] == bodies[other])
            | ~terms[0].mask
        )
        touch = jnp.any(_may_touch(terms, distances[0], forces[0], max_force) & ~apart)
    alone = jnp.zeros(n, jnp.int32).at[bodies].add(1)[bodies] == 1
    return Network(
        loose & alone,
        loose,
        contacts,
        labels,
        whole,
        wraps,
        pull / jnp.maximum(pairs, 1),
        count,
        touch,
    )


def _may_touch(
    terms: tuple[PairTerm, ...], r: jax.Array, force: jax.Array, max_force: Any
) -> jax.Array:
    """Pairs of potentials that only repel that the largest force left leaves in contact or not."""
    stiffness = sum(jnp.abs(pair_forces(t, r * (1.0 - NEARLY))) for t in terms) / (
        NEARLY * r
    )  # in contact, at least
    gap = jnp.where(
        stiffness > 0, FORCE_MARGIN * max_force / jnp.where(stiffness > 0, stiffness, 1.0), 0.0
    )
    gap = gap + 8.0 * jnp.finfo(r.dtype).eps * r
    small = jnp.abs(force) <= FORCE_MARGIN * max_force
    return small & (sum(pair_forces(t, r - gap) for t in terms) > 0)


def backbone(system: System, net: Network) -> System:
    """The system without its rattlers' contacts: their pairs are taken off the list.

    Slicing their rows out of the Hessian instead would leave springs that pin the neighbors.
    """
    if not system.potential.repulsive:
        return system  # a rattler of an attractive potential has no stiffness to delete
    rows = system.neighbors.rows
    other = jnp.minimum(rows, system.n - 1)
    cut = (net.loose | net.loose[other]) & (net.labels != net.labels[other])
    kept = jnp.where(cut, system.n, rows)
    return system.replace(neighbors=dataclasses.replace(system.neighbors, rows=kept))


def coordination(system: System, net: Network | None = None) -> jax.Array:
    """Mean number of contacts of a particle that is no rattler, z = 2 N_c / (n - n_rattlers); 0
    where there is none.

    Contacts are counted against the largest net force in the system as it is, so it means something
    at a minimum alone.
    """
    found = net
    if found is None:
        slope = jax.grad(lambda R: potential_energy(system, R))(system.positions)
        found = network(system, jnp.sqrt(jnp.max(jnp.sum(slope**2, axis=-1))))
    count = 2.0 * found.pairs / jnp.maximum(jnp.sum(~found.rattlers), 1)
    why = (
        "coordination counts contacts, so that it is piecewise constant and has no derivative: take"
        " ms.observables.smooth_coordination(system, width), or give it"
        " jax.lax.stop_gradient(system) where it is to stay as it is."
    )
    return refusing_derivative(count, system, why)
