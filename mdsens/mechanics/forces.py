"""The gradient of the energy, dU/dR, as sums over each particle's row of neighbors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mdsens._util.lattice import Components, components, nearest_images
from mdsens.model.system import System, box_at, energy_of
from mdsens.potentials.base import PairTerm

__all__ = ["ROWS", "energy_gradient", "row_terms"]

Params = Mapping[str, Any]
ROWS = 2  # rows of the neighbor list that are summed in one step of the loop


def row_terms(system: System, params: Params | None = None) -> tuple[PairTerm, ...]:
    """Return the pair terms of the potential, with neighbors as one column for each particle.

    In these terms the array i is (1, n) and all others are (capacity, n), and each pair appears
    twice. Bonds remain a list of pairs, (m,).

    Args:
      params: parameters; those of the system where None.
    """
    return system.potential.terms(
        system.params if params is None else params,
        (jnp.arange(system.n, dtype=jnp.int32)[None], system.neighbors.rows),
        system.n,
        system.species,
        system.species_count,
    )


def energy_gradient(
    system: System, params: Params | None = None, used: jax.Array | None = None
) -> Callable[[jax.Array], jax.Array]:
    """Return the function R -> dU/dR, both (n, d).

    Make it once before a loop over R: then everything that does not depend on R is computed before
    the loop.

    The contributions of the neighbor list are summed over each particle's row, dU/dR_i =
    sum_k d phi(|v_ik|) / d v_ik. Automatic differentiation of U would instead scatter the force of
    every pair to two particles.

    Args:
      system: a system whose neighbor list is assumed to be complete.
      params: parameters; those of the system where None.
      used: number of rows of the list that are not empty. The other rows are left out; most rows
        are empty once a random start has relaxed. None for all rows, which reverse mode needs,
        since it must know the number of rows before it runs.
    """
    params = system.params if params is None else params
    box = box_at(system, params)
    terms = row_terms(system, params)
    images = nearest_images(box, system.boundary.orthogonal)
    bonds = [term for term in terms if term.j.ndim == 1]
    listed = [_in_chunks(term) for term in terms if term.j.ndim == 2 and term.j.shape[0]]
    row_count = system.neighbors.rows.shape[0] if used is None else used
    steps = -(-row_count // ROWS)  # rounded up

    def slope(positions: jax.Array) -> jax.Array:
        total = jax.grad(lambda R: energy_of(system, bonds, R, params, box))(positions)
        x = components(positions)

        def add(k: jax.Array, total: Components) -> Components:
            for chunks in listed:
                part = chunks.rows(k)
                # v_ik = R_i - R_k; i is the column of a row, so that R_i is taken without a gather
                slopes = _row_gradients(part, images(tuple(c - c[part.j] for c in x)))
                total = tuple(t + jnp.sum(s, axis=0) for t, s in zip(total, slopes, strict=True))
            return total

        if listed:
            rows = jax.lax.fori_loop(0, steps, add, tuple(jnp.zeros_like(c) for c in x))
            total = total + jnp.stack(rows, axis=-1)
        return total

    return slope


def _in_chunks(term: PairTerm) -> PairTerm:
    """Reshape the rows of a term from (K, n) to (K / ROWS, ROWS, n), for a loop over chunks.

    Where K is no multiple of ROWS, the last row is repeated, and masked.
    """
    padding = -term.j.shape[0] % ROWS

    def chunks(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, padding), (0, 0)), mode="edge").reshape(-1, ROWS, x.shape[1])

    mask = chunks(term.mask)
    if padding:
        mask = mask.at[-1, ROWS - padding :].set(False)
    values = tuple(chunks(v) if v.ndim == 2 else v for v in term.values)
    return term._replace(j=chunks(term.j), mask=mask, values=values)


def _row_gradients(term: PairTerm, apart: Components) -> Components:
    """Compute d phi(|v|) / dv of each pair, by components, as phi'(r) v / r.

    The formula is written out, since XLA takes a third longer for the chain rule through the root.

    Args:
      apart: components of the vectors v between the two particles.
    """
    # 1 on padding: a distance of zero there would make NaN
    r = jnp.sqrt(jnp.where(term.mask, sum(v * v for v in apart), 1.0))
    over_r = jax.grad(lambda r: jnp.sum(term.energy(r)))(r) / r
    return tuple(over_r * v for v in apart)
