"""The gradient dU/dR of energies that are functions of all neighbors of an atom.

An energy sum_i e_i of surroundings has the gradient

    dU/dR_i = sum_k (g_ki - g_ik),     g_ik = d e_i / d r_ik,     r_ik = R_k - R_i,

where g is computed for a chunk of atoms at a time, in large systems from a list of the neighbors
that are within the cutoff at these positions. For an energy of embedded atoms,
e_i = sum_k p_ik(r_ik) + F_i(rho_i) with rho_i = sum_k f_ik(r_ik), it is a sum over the neighbors of
each atom, like that of a pair potential, in two passes:

    dU/dR_i = sum_k d/dr [p_ik + p_ki + F_i'(rho_i) f_ik + F_k'(rho_k) f_ki] (R_i - R_k) / r_ik
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from mdsens._util.lattice import Components, components
from mdsens.model.surroundings import near_places, over_atoms, shorter_lists, taken
from mdsens.model.system import System, images_of, neighbor_vectors
from mdsens.potentials.base import Pairs
from mdsens.potentials.local import (
    EdgePotential,
    Embedded,
    LocalPotential,
    NeighborPotential,
    parts_of_neighbors,
)

__all__ = ["neighbor_gradient"]

Params = Mapping[str, Any]
Slope: TypeAlias = Callable[[jax.Array], jax.Array]
# Rows of the neighbor list that are summed in one step of the loop.
ROWS = 2


def neighbor_gradient(
    system: System, params: Params, box: jax.Array | None, used: jax.Array | None
) -> list[Slope]:
    """Return the functions that map positions (n, d) to the parts of the gradient dU/dR (n, d).

    There is one function for each part of the potential that is a function of all neighbors of an
    atom. The arguments are those of :func:`mdsens.mechanics.forces.energy_gradient`.
    """
    return [
        _slope(system, part, params, box, used) for part in parts_of_neighbors(system.potential)
    ]


def _slope(
    system: System,
    part: NeighborPotential,
    params: Params,
    box: jax.Array | None,
    used: jax.Array | None,
) -> Slope:
    """Return the gradient of one part of the energy, see :func:`neighbor_gradient`."""
    if isinstance(part, EdgePotential):
        return _of_edges(system, part, params, box)
    assert isinstance(part, LocalPotential)
    if isinstance(part.fn, Embedded):
        return _of_embedded_atoms(system, part, params, box, used)
    return _of_surroundings(system, part, params, box)


def _of_edges(system: System, part: EdgePotential, params: Params, box: jax.Array | None) -> Slope:
    """Return the gradient of an energy of all neighbors, by automatic differentiation."""
    listed = system.neighbors.columns

    def energy(positions: jax.Array) -> jax.Array:
        vectors = neighbor_vectors(system, positions, box)
        return part.energy_of_edges(params, listed, vectors, system.species, system.species_count)

    return jax.grad(energy)


def _of_surroundings(
    system: System,
    part: LocalPotential,
    params: Params,
    box: jax.Array | None,
) -> Slope:
    """Return the gradient of an energy of atoms in their surroundings."""
    n = system.n
    listed = system.neighbors.columns
    capacity = listed.j.shape[0]
    sizes = shorter_lists(capacity, n)
    if not sizes:
        return lambda positions: _gradient_by_list(system, part, params, box, listed, positions)

    def slope(positions: jax.Array) -> jax.Array:
        # which neighbors are near has no derivative
        x, values, cell = jax.lax.stop_gradient((positions, params, box))

        def near(k: jax.Array) -> jax.Array:
            images = None if listed.images is None else listed.images[k][None]
            row = Pairs(listed.i, listed.j[k][None], images)
            vectors = neighbor_vectors(system, x, cell, None, row)
            mask, _ = part.near(values, row, vectors, n, system.species, system.species_count)
            return mask[0]

        places, most = near_places(near, system.neighbors.used, sizes[-1], n)
        shorter = [taken(listed, places[:size], n) for size in sizes]

        def gradient(some: Pairs) -> Slope:
            return lambda R: _gradient_by_list(system, part, params, box, some, R)

        # the first list that is long enough
        which = jnp.searchsorted(jnp.asarray(sizes), most)
        return jax.lax.switch(which, [gradient(some) for some in (*shorter, listed)], positions)

    return slope


def _gradient_by_list(
    system: System,
    part: LocalPotential,
    params: Params,
    box: jax.Array | None,
    listed: Pairs,
    positions: jax.Array,
) -> jax.Array:
    """Compute the gradient (n, d) of an energy of atoms in the surroundings that a list gives."""
    n = system.n
    species = system.species

    def of_some(some: Pairs) -> Components:
        """Compute g of some atoms, components (capacity, c)."""

        def energy(vectors: Components) -> jax.Array:
            energies = part.energies(params, some, vectors, n, species, system.species_count)
            return jnp.sum(energies)

        return jax.grad(energy)(neighbor_vectors(system, positions, box, None, some))

    gradients = over_atoms(of_some, listed, n)
    # the index n of places without a neighbor is out of range, and is dropped
    return jnp.stack(
        [
            jnp.zeros_like(positions[:, 0]).at[listed.j].add(g) - jnp.sum(g, axis=0)
            for g in gradients
        ],
        axis=-1,
    )


class _Rows(NamedTuple):
    """The neighbor list in chunks of rows, (chunks, ROWS, n), with the species of the neighbors."""

    j: jax.Array
    mask: jax.Array
    images: jax.Array | None
    kinds: jax.Array

    def chunk(self, k: int | jax.Array) -> _Rows:
        """Return the rows of chunk k."""
        images = None if self.images is None else self.images[k]
        return _Rows(self.j[k], self.mask[k], images, self.kinds[k])


def _rows_of(system: System) -> _Rows:
    """Divide the neighbor list of a system into chunks of rows."""
    n = system.n
    count = -(-system.neighbors.rows.shape[0] // ROWS)  # rounded up
    listed = system.neighbors.resized(count * ROWS)
    mask = listed.rows < n
    j = jnp.where(mask, listed.rows, 0)
    kinds = jnp.zeros_like(j) if system.species is None else system.species[j]

    def chunks(array: jax.Array) -> jax.Array:
        return array.reshape(count, ROWS, *array.shape[1:])

    images = None if listed.images is None else chunks(listed.images)
    return _Rows(chunks(j), chunks(mask), images, chunks(kinds))


def _of_embedded_atoms(
    system: System,
    part: LocalPotential,
    params: Params,
    box: jax.Array | None,
    used: jax.Array | None,
) -> Slope:
    """Return the gradient of an energy of embedded atoms, by two sums over their neighbors."""
    assert isinstance(part.fn, Embedded)
    form = part.fn.form
    n = system.n
    species = jnp.zeros(n, jnp.int32) if system.species is None else system.species
    values = part.values(params, system.species_count)
    tables = form.tables(values)
    rows = _rows_of(system)
    images = images_of(system, box)
    steps = rows.j.shape[0] if used is None else -(-used // ROWS)
    # one species: what an atom adds to its neighbor is what the neighbor adds to it
    alike = system.species is None or system.species_count == 1

    def pairs_of(x: Components, some: _Rows) -> tuple[jax.Array, Components, jax.Array]:
        """Return which places hold a neighbor within the cutoff, the vectors and the distances."""
        shifts = None if some.images is None else components(some.images)
        vectors = images(tuple(c - c[some.j] for c in x), shifts)
        squared = sum(v * v for v in vectors)
        columns = Pairs(jnp.arange(n, dtype=jnp.int32)[None], some.j)
        reach = part.lengths(params, columns, n, system.species, system.species_count)
        near = some.mask & (squared < jnp.asarray(reach) ** 2)
        # half the cutoff in other places, where every energy is finite
        harmless = 0.25 * jnp.asarray(part.range(params)) ** 2
        return near, vectors, jnp.sqrt(jnp.where(near, squared, harmless))

    def slope(positions: jax.Array) -> jax.Array:
        x = components(positions)

        def add_density(k: jax.Array, total: jax.Array) -> jax.Array:
            some = rows.chunk(k)
            near, _, r = pairs_of(x, some)
            _, density = form.pairs(r, species[None], some.kinds, tables)
            return total + jnp.sum(jnp.where(near, density, 0.0), axis=0)

        rho = jax.lax.fori_loop(0, steps, add_density, jnp.zeros_like(x[0]))
        embed = jax.vmap(lambda rho, kind: form.embed(rho, kind, tables))
        response = jax.grad(lambda rho: jnp.sum(embed(rho, species)))(rho)

        def add_force(k: jax.Array, total: Components) -> Components:
            some = rows.chunk(k)
            near, vectors, r = pairs_of(x, some)
            of_neighbor = response[some.j]

            def energy(r: jax.Array) -> jax.Array:
                pair, density = form.pairs(r, species[None], some.kinds, tables)
                if alike:
                    both = 2.0 * pair + (response + of_neighbor) * density
                else:
                    back, density_back = form.pairs(r, some.kinds, species[None], tables)
                    both = pair + back + response * density + of_neighbor * density_back
                return jnp.sum(jnp.where(near, both, 0.0))

            over_r = jax.grad(energy)(r) / r
            return tuple(
                t + jnp.sum(over_r * v, axis=0) for t, v in zip(total, vectors, strict=True)
            )

        zeros = tuple(jnp.zeros_like(c) for c in x)
        return jnp.stack(jax.lax.fori_loop(0, steps, add_force, zeros), axis=-1)

    return slope
