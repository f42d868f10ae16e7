"""This module finds which part of the energy is NaN or infinite after a computation failed.

The result is a part of the message for the status NOT_FINITE, in words.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.compilation import compiled
from mdsens._util.probe import chirp
from mdsens.mechanics.status import Status
from mdsens.model.system import System, displacement_in, pair_distances
from mdsens.potentials.base import PairTerm, Potential
from mdsens.potentials.pair_trial import NAMES, derivatives

__all__ = ["where_not_finite"]

# Names of the derivatives of a potential that is not a sum over pairs, by order.
OF_ENERGY = ("the energy", "a force", "the Hessian", "the third derivative")
# The commonest cause of an infinite force: a matrix of all distances has zeros on its diagonal.
OF_A_ROOT = (
    " although the energy is a number (most often by a root or norm of zero, which has no"
    " derivative, not even where jnp.where passes it over: replace the zero before the root, r2 ="
    " jnp.where(r2 > 0, r2, 1.0))"
)


def where_not_finite(status: Status, system: System) -> str:
    """Return words that tell which derivative of the energy is NaN or infinite.

    The words are part of an error message. They begin with ", where" and name the potential, the
    pair and the lowest derivative that is not finite. The text is empty for a status other than
    NOT_FINITE, for a batch, and where all derivatives are finite or the positions themselves are
    not. The function does not work inside ``jax.jit``, and compiles each potential, which is slow:
    it is meant for errors only.

    Args:
      status: the status of the computation that failed.
      system: the system at the positions where the computation failed.
    """
    positions = np.asarray(system.positions)
    if (
        status is not Status.NOT_FINITE
        or system.batch is not None
        or not np.isfinite(positions).all()
    ):
        return ""
    # a sum of potentials has parts; any other potential is its only part
    for potential in getattr(system.potential, "parts", (system.potential,)):
        pairs = (system.neighbors.pairs, system.n, system.species, system.species_count)
        terms = potential.terms(system.params, *pairs)
        messages = [_describe_pair(potential.name, term, system) for term in terms]
        if not potential.pairwise:
            messages.append(_describe_potential(potential, system))
        for message in messages:
            if message:
                return f", where {message}"
    return ""


def _describe_pair(name: str, term: PairTerm, system: System) -> str:
    """Describe in words the lowest derivative of a pair potential that is NaN or infinite.

    The text names a pair for which this derivative is not finite. The text is empty where all
    derivatives, up to the third, are finite.

    Args:
      name: name of the potential.
      term: the potential with its pairs.
      system: the system with the positions.
    """
    r = pair_distances(system, term, system.positions, system.box)
    values = [jnp.broadcast_to(v, r.shape) for v in term.values]
    # phi and its derivatives, (orders, pairs)
    orders = np.asarray(derivatives(term.phi, f"phi of {name}", r, values))
    bad = ~np.isfinite(orders) & np.asarray(term.mask)
    if not bad.any():
        return ""
    # argwhere runs through the orders first, so that its first entry is of the lowest order
    order, k = (int(i) for i in np.argwhere(bad)[0])
    i, j = int(term.i[k]), int(term.j[k])
    value = orders[order, k]
    return (
        f"{NAMES[order]} of {name} is {value:.3g} at r = {float(r[k]):.6g}, the distance of"
        f" particles {i} and {j}"
    )


def _describe_potential(potential: Potential, system: System) -> str:
    """Describe the lowest derivative of a many-body energy that is NaN or infinite, in words.

    The text is empty where all derivatives, up to the third, are finite.
    """
    for order, size in enumerate(np.asarray(_norms_of_derivatives(potential, system))):
        if not np.isfinite(size):
            message = f"{OF_ENERGY[order]} of {potential.name} is {size:.3g} at these positions"
            return message + OF_A_ROOT if order == 1 else message
    return ""


@compiled
def _norms_of_derivatives(potential: Potential, system: System) -> jax.Array:
    """Compute a many-body energy and the norms of its first three derivatives, (4,).

    The second and third derivatives are taken along one fixed direction (a Hessian product and its
    derivative), in forward mode as in the rest of the package: an energy can be finite where such a
    derivative is not.
    """
    displacement = displacement_in(system, system.box)

    def energy(R: jax.Array) -> jax.Array:
        return potential.many_body(
            R, system.params, displacement, system.species, system.species_count
        )

    R = system.positions
    slope = jax.grad(energy)
    # a fixed direction with entries of every size and sign
    along = chirp(R.shape, R.dtype)

    def second(R: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(slope, (R,), (along,))

    (force, product), (_, third) = jax.jvp(second, (R,), (along,))
    # in the order of OF_ENERGY
    return jnp.stack([energy(R), *(jnp.linalg.norm(x) for x in (force, product, third))])
