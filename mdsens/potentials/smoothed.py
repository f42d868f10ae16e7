"""Pair potentials phi(r), each replaced by its average phi_w over distances from r - w to r + w.

    phi_w(r) = 1 / 2w  integral from -w to w of phi(r + s) ds
    phi_w'(r) = (phi(r + w) - phi(r - w)) / 2w

The stiffness phi'' of a pair of soft discs jumps at contact (for the exponent alpha = 2), or the
slope of phi'' diverges there (alpha = 2.5). A derivative of the elastic moduli therefore misses a
contact that is about to form and overrates a contact that has just formed. With phi_w, a derivative
of the moduli counts all pairs within w of contact alike, and gives the change of the moduli over
steps of the size of w.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.portable import Portable
from mdsens.potentials.base import (
    Displacement,
    PairPotential,
    Pairs,
    PairTerm,
    Params,
    Phi,
    Potential,
    SumPotential,
    no_breakpoints,
)

__all__ = ["SmoothedPotential", "smoothed"]

# Gauss-Legendre quadrature on [-1, 1]; exact for polynomials of degree 7 with four nodes.
NODES, WEIGHTS = np.polynomial.legendre.leggauss(4)


def _mean(phi: Phi, r: jax.Array, width: jax.Array, values: tuple[jax.Array, ...]) -> jax.Array:
    """Compute the mean of phi over distances from r - width to r + width by Gauss quadrature."""
    total = jnp.zeros_like(r)
    for x, c in zip(NODES, WEIGHTS, strict=True):
        # 0.5, since the weights have the sum 2. float(), since numpy's float64 would promote arrays
        # of float32, which Python's numbers do not.
        total = total + 0.5 * float(c) * phi(r + float(x) * width, *values)
    return total


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _average(phi: Phi, r: jax.Array, width: jax.Array, values: tuple[jax.Array, ...]) -> jax.Array:
    """Compute the mean of phi over distances from r - width to r + width, a function of r.

    The mean is computed by Gauss quadrature, which does not resolve a jump of a derivative of phi
    between these distances. The derivative of the mean by r is exact nevertheless, since this
    derivative is (phi(r + width) - phi(r - width)) / (2 width).
    """
    return _mean(phi, r, width, values)


@_average.defjvp
def _average_jvp(
    phi: Phi,
    primals: tuple[jax.Array, jax.Array, tuple[jax.Array, ...]],
    tangents: tuple[jax.Array, jax.Array, tuple[jax.Array, ...]],
) -> tuple[jax.Array, jax.Array]:
    r, width, values = primals
    dr, _, dvalues = tangents  # the width is a constant
    # the derivative of the integral by r is the difference at its ends
    slope = (phi(r + width, *values) - phi(r - width, *values)) / (2.0 * width)
    # by the parameters there is no such formula: this derivative is that of the quadrature
    value, change = jax.jvp(lambda v: _mean(phi, r, width, v), (values,), (dvalues,))
    return value, slope * dr + change


@dataclasses.dataclass(frozen=True)
class _Averaged:
    """The mean of phi over distances from r - w to r + w, as a function (r, *values, w).

    phi is a pair potential and ``values`` are its parameters.
    """

    phi: Phi

    def __call__(self, r: jax.Array, *values: jax.Array) -> jax.Array:
        return _average(self.phi, r, values[-1], values[:-1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SmoothedPotential(Portable):
    """A pair potential phi(r) averaged over distances from r - w to r + w.

    The parameters of the averaged potential are those of phi.

    Attributes:
      potential: the pair potential phi.
      width: w, a length.
    """

    potential: PairPotential
    width: float | jax.Array

    @property
    def name(self) -> str:
        return self.potential.name

    @property
    def parameters(self) -> tuple[str, ...]:
        return self.potential.parameters

    @property
    def pair_parameters(self) -> tuple[str, ...]:
        return self.potential.pair_parameters

    @property
    def tree_parameters(self) -> tuple[str, ...]:
        return ()

    @property
    def pairwise(self) -> bool:
        return True

    @property
    def repulsive(self) -> bool:
        return self.potential.repulsive

    @property
    def finite_force(self) -> bool:
        return self.potential.finite_force

    @property
    def of_neighbors(self) -> bool:
        return False

    @property
    def listed(self) -> bool:
        return True

    def range(self, params: Params) -> jax.Array:
        return self.potential.range(params) + self.width

    def lengths(
        self, params: Params, pairs: Pairs, n: int, species: jax.Array | None, species_count: int
    ) -> jax.Array | float:
        # at a distance up to the width beyond the cutoff the average still reaches inside
        return self.potential.lengths(params, pairs, n, species, species_count) + self.width

    def terms(
        self, params: Params, pairs: Pairs, n: int, species: jax.Array | None, species_count: int
    ) -> tuple[PairTerm, ...]:
        (term,) = self.potential.terms(params, pairs, n, species, species_count)
        # an argument of phi rather than a constant in it, so that compiled code serves every width
        values = (*term.values, jnp.asarray(self.width))
        return (term._replace(phi=_Averaged(term.phi), values=values, breakpoints=no_breakpoints),)

    def crossing_terms(
        self, params: Params, pairs: Pairs, n: int, species: jax.Array | None, species_count: int
    ) -> tuple[PairTerm, ...]:
        return self.terms(params, pairs, n, species, species_count)

    def many_body(
        self,
        positions: jax.Array,
        params: Params,
        displacement: Displacement,
        species: jax.Array | None,
        species_count: int,
    ) -> jax.Array:
        return self.potential.many_body(positions, params, displacement, species, species_count)

    def specialize(self, params: Params, differentiated: Sequence[str] = ()) -> SmoothedPotential:
        return dataclasses.replace(
            self, potential=self.potential.specialize(params, differentiated)
        )

    def check(self, params: Params, n: int, species_count: int) -> None:
        self.potential.check(params, n, species_count)


def smoothed(potential: Potential, width: float | jax.Array) -> Any:
    """Return a potential with each of its pair potentials phi(r) averaged over r +- width.

    In a sum of potentials, those that are no pair potentials, such as those of bonds, stay as they
    are.
    """
    if isinstance(potential, SumPotential):
        return SumPotential(tuple(smoothed(part, width) for part in potential.parts))
    if isinstance(potential, PairPotential):
        return SmoothedPotential(potential, width)
    return potential
