"""The slope of the energy, dU/dR, as sums over rows of neighbors."""

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
ROWS = 2  # of the neighbors' rows that are summed at a time


def row_terms(system: System, params: Params | None = None) -> tuple[PairTerm, ...]:
    """The same, with the pairs of the list as rows of each particle's neighbors; bonds stay a list."""
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
    """R -> dU/dR, (n, d) both. Made once, so that a loop over R computes all that does not depend
    on R beforehand.

    What the pairs of the list contribute is summed over each particle's row, dU/dR_i = sum_k d
    phi(|v_ik|) / d v_ik, where automatic differentiation of U would scatter every pair's force to
    two particles.

    Args:
      system: its list is taken as complete.
      params: the system's where None.
      used: how many of the list's rows are not empty: the others, most of them once a random start
        has relaxed, are left out. Reverse differentiation needs to know the number beforehand, so
        it takes all rows, as None does.
    """
    params = system.params if params is None else params
    box, terms = box_at(system, params), row_terms(system, params)
    images = nearest_images(box, system.boundary.orthogonal)
    bonds = [term for term in terms if term.j.ndim == 1]
    listed = [_in_chunks(term) for term in terms if term.j.ndim == 2 and term.j.shape[0]]
    count = -(-(system.neighbors.rows.shape[0] if used is None else used) // ROWS)

    def slope(positions: jax.Array) -> jax.Array:
        total = jax.grad(lambda R: energy_of(system, bonds, R, params, box))(positions)
        x = components(positions)

        def add(k: Any, total: Components) -> Components:
            for chunks in listed:
                part = chunks.rows(k)
                slopes = _row_gradients(part, images(tuple(c - c[part.j] for c in x)))
                total = tuple(t + jnp.sum(s, axis=0) for t, s in zip(total, slopes, strict=True))
            return total

        if listed:
            rows = jax.lax.fori_loop(0, count, add, tuple(jnp.zeros_like(c) for c in x))
            total = total + jnp.stack(rows, axis=-1)
        return total

    return slope


def _in_chunks(term: PairTerm) -> PairTerm:
    """The rows of a term (K, n) as (K / ROWS, ROWS, n), padded if need be, for a loop over the
    first axis.
    """
    more = -term.j.shape[0] % ROWS

    def chunks(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, more), (0, 0)), mode="edge").reshape(-1, ROWS, x.shape[1])

    mask = chunks(term.mask)
    if more:
        mask = mask.at[-1, ROWS - more :].set(False)
    values = tuple(chunks(v) if v.ndim == 2 else v for v in term.values)
    return term._replace(j=chunks(term.j), mask=mask, values=values)


def _row_gradients(term: PairTerm, apart: Components) -> Components:
    """d phi(|v|) / dv, written out as phi'(r) v / r: the chain rule through the root takes XLA a
    third longer.
    """
    r = jnp.sqrt(jnp.where(term.mask, sum(v * v for v in apart), 1.0))
    over_r = jax.grad(lambda r: jnp.sum(term.energy(r)))(r) / r
    return tuple(over_r * v for v in apart)
