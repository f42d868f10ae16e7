"""Which part of the energy is no number where a computation ended in NOT_FINITE, in words."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.lattice import nearest_image
from mdsens.mechanics.status import Status
from mdsens.model.system import System, pair_distances
from mdsens.potentials.base import PairTerm
from mdsens.potentials.pair_trial import NAMES, derivatives

__all__ = ["where_not_finite"]

# Of a potential that is more than pairs, along one direction, as forces, Hessian products and their
# derivatives are taken.
OF_ENERGY = ("the energy", "a force", "the Hessian", "the third derivative")
# The commonest cause, as a matrix of all distances has it on its diagonal.
OF_A_ROOT = (
    " although the energy is a number (most often by a root or norm of zero, which has no"
    " derivative, not even where jnp.where passes it over: replace the zero before the root, r2 ="
    " jnp.where(r2 > 0, r2, 1.0))"
)


def where_not_finite(status: Status, system: System) -> str:
    """ ", where ..." for the message of a status: the potential, the pair and the lowest derivative that
    is not finite.

    Nothing for any other status than NOT_FINITE, where all are finite at the system's positions, or
    where these are not. Host code, and as slow as compiling each potential: for errors alone.
    """
    positions = np.asarray(system.positions)
    if (
        status is not Status.NOT_FINITE
        or system.batch is not None
        or not np.isfinite(positions).all()
    ):
        return ""
    for potential in getattr(system.potential, "parts", (system.potential,)):
        kinds = (system.neighbors.pairs, system.n, system.species, system.species_count)
        found = [
            _of_pairs(potential.name, term, system)
            for term in potential.terms(system.params, *kinds)
        ]
        found += [] if potential.pairwise else [_of_potential(potential, system)]
        for said in found:
            if said:
                return f", where {said}"
    return ""


def _of_pairs(name: str, term: PairTerm, system: System) -> str:
    r = pair_distances(term, system.positions, system.box)
    orders = np.asarray(
        derivatives(
            term.phi, f"phi of {name}", r, [jnp.broadcast_to(v, r.shape) for v in term.values]
        )
    )
    bad = ~np.isfinite(orders) & np.asarray(term.mask)
    if not bad.any():
        return ""
    order, k = (int(i) for i in np.argwhere(bad)[0])
    i, j = int(term.i[k]), int(term.j[k])
    value = orders[order, k]
    return (
        f"{NAMES[order]} of {name} is {value:.3g} at r = {float(r[k]):.6g}, the distance of"
        f" particles {i} and {j}"
    )


def _of_potential(potential: Any, system: System) -> str:
    for order, size in enumerate(np.asarray(_orders(potential, system))):
        if not np.isfinite(size):
            said = f"{OF_ENERGY[order]} of {potential.name} is {size:.3g} at these positions"
            return said + OF_A_ROOT if order == 1 else said
    return ""


@jax.jit
def _orders(potential: Any, system: System) -> jax.Array:
    """The energy, the size of the forces, of a Hessian product and of its derivative."""
    box = system.box

    def displacement(a: jax.Array, b: jax.Array, **_: Any) -> jax.Array:
        return nearest_image(a - b, box)

    def energy(R: jax.Array) -> jax.Array:
        return potential.many_body(
            R, system.params, displacement, system.species, system.species_count
        )

    R, slope = system.positions, jax.grad(energy)
    along = jnp.cos(jnp.arange(R.size, dtype=R.dtype) ** 2).reshape(R.shape)

    def second(R: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(slope, (R,), (along,))

    (force, product), (_, third) = jax.jvp(second, (R,), (along,))
    return jnp.stack([energy(R), *(jnp.linalg.norm(x) for x in (force, product, third))])
