"""This module computes the gradient of the energy by the positions, dU/dR.

The contribution of the pairs is a sum over the neighbors of each particle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mdsens._util.lattice import Components, components
from mdsens.mechanics.atom_forces import neighbor_gradient
from mdsens.model.system import System, box_at, energy_of, images_of
from mdsens.potentials.base import PairTerm

__all__ = ["ROWS", "energy_gradient", "in_chunks", "row_terms", "stiffness_of_pairs"]

Params = Mapping[str, Any]
ROWS = 2  # rows of the neighbor list that are summed in one step of the loop


def row_terms(system: System, params: Params | None = None) -> tuple[PairTerm, ...]:
    """Return the terms of the potential with their pairs listed as the neighbors of each particle.

    A term holds a pair potential, its parameters and its pairs i, j. In the result, the neighbors
    of a particle stand in one column: the array i is (1, n) for n particles, and all other arrays
    are (capacity, n), with space for ``capacity`` neighbors; each pair appears twice. Bonds remain
    a list of m pairs, with arrays (m,).

    Args:
      params: parameters of the potential by name; None for the parameters of the system.
    """
    return system.potential.terms(
        system.params if params is None else params,
        system.neighbors.columns,
        system.n,
        system.species,
        system.species_count,
    )


def energy_gradient(
    system: System, params: Params | None = None, used: jax.Array | None = None
) -> Callable[[jax.Array], jax.Array]:
    """Return the function that maps positions R (n, d) to the gradient of the energy dU/dR (n, d).

    Make this function once before a loop over R: then everything that does not depend on R is
    computed before the loop.

    The contributions of the neighbor list are summed over the neighbors k of each particle i,
    dU/dR_i = sum_k d phi(|v_ik|) / d v_ik, with the pair potential phi and v_ik = R_i - R_k.
    Automatic differentiation of U would instead add the force of every pair to two particles.

    Args:
      system: a system whose neighbor list is assumed to be complete.
      params: parameters of the potential by name; None for the parameters of the system.
      used: number of rows of the neighbor list that are not empty, where row k holds the k-th
        neighbor of every particle. The other rows are left out; most rows are empty once a random
        start has relaxed. None for all rows; reverse-mode differentiation needs None, since the
        number of rows must then be known before the computation runs.
    """
    params = system.params if params is None else params
    box = box_at(system, params)
    terms = row_terms(system, params)
    images = images_of(system, box)
    bonds = [term for term in terms if term.j.ndim == 1]
    listed = [in_chunks(term) for term in terms if term.j.ndim == 2 and term.j.shape[0]]
    of_neighbors = neighbor_gradient(system, params, box, used)
    row_count = system.neighbors.rows.shape[0] if used is None else used
    steps = -(-row_count // ROWS)  # rounded up

    def slope(positions: jax.Array) -> jax.Array:
        # the bonds and the energy that is no sum over pairs; the neighbor list follows in ``add``
        total = jax.grad(lambda R: energy_of(system, bonds, R, params, box))(positions)
        x = components(positions)

        def add(k: jax.Array, total: Components) -> Components:
            for chunks in listed:
                part = chunks.rows(k)
                # v_ik = R_i - R_k; i is the column of a row, so that R_i is taken without a gather
                apart = images(tuple(c - c[part.j] for c in x), part.shifts)
                slopes = _row_gradients(part, apart)
                total = tuple(t + jnp.sum(s, axis=0) for t, s in zip(total, slopes, strict=True))
            return total

        if listed:
            rows = jax.lax.fori_loop(0, steps, add, tuple(jnp.zeros_like(c) for c in x))
            total = total + jnp.stack(rows, axis=-1)
        for part in of_neighbors:
            total = total + part(positions)
        return total

    return slope


def in_chunks(term: PairTerm) -> PairTerm:
    """Reshape the arrays of a pair term from (K, n) to (K / ROWS, ROWS, n), for a loop over chunks.

    Each of the K rows holds one neighbor of each of the n particles; ROWS rows are summed in one
    step of the loop. Where K is no multiple of ROWS, the last row is repeated, and the copies are
    masked.
    """
    padding = -term.j.shape[0] % ROWS

    def chunks(x: jax.Array) -> jax.Array:
        # copies of a row have valid parameters, with which phi is finite; with zeros it may not be
        return jnp.pad(x, ((0, padding), (0, 0)), mode="edge").reshape(-1, ROWS, x.shape[1])

    mask = chunks(term.mask)
    if padding:
        mask = mask.at[-1, ROWS - padding :].set(False)
    values = tuple(chunks(v) if v.ndim == 2 else v for v in term.values)
    images = term.images
    if images is not None:
        images = jnp.stack([chunks(images[..., a]) for a in range(images.shape[-1])], axis=-1)
    return term._replace(j=chunks(term.j), mask=mask, values=values, images=images)


def _row_gradients(term: PairTerm, apart: Components) -> Components:
    """Compute the gradient d phi(|v|)/dv = phi'(r) v / r of the potential phi of each pair.

    v is the vector between the two particles, and r = |v|. The formula is written out, since
    automatic differentiation of the square root takes a third longer.

    Args:
      term: the pairs and their potential.
      apart: components of the vectors v.

    Returns:
      components of the gradients.
    """
    # 1 on padding: a distance of zero there would make NaN
    r = jnp.sqrt(jnp.where(term.mask, sum(v * v for v in apart), 1.0))
    over_r = jax.grad(lambda r: jnp.sum(term.energy(r)))(r) / r
    return tuple(over_r * v for v in apart)


def stiffness_of_pairs(term: PairTerm, apart: Components) -> tuple[jax.Array, jax.Array]:
    """Compute the two numbers that the second derivative of each pair's energy by its vector has.

    With the energy phi(|v|), d2phi/dv2 = a 1 + b v v^T with a = phi'/r, b = (phi'' - phi'/r) / r^2
    and r = |v|.

    Args:
      term: the pairs and their potential.
      apart: components of the vectors v.

    Returns:
      (a, b), of each pair.
    """
    r = jnp.sqrt(jnp.where(term.mask, sum(v * v for v in apart), 1.0))

    def slope(r: jax.Array) -> jax.Array:
        return jax.grad(lambda s: jnp.sum(term.energy(s)))(r)

    # Each energy depends on its own r alone: the gradient of the sum is phi' of each pair, and the
    # derivative of this gradient along a vector of ones is phi''.
    first, second = jax.jvp(slope, (r,), (jnp.ones_like(r),))
    across = first / r
    return across, (second - across) / (r * r)
