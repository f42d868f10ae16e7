"""Potentials of electrostatics: induced dipoles, and charge equilibration.

Both are minima over inner variables, see :mod:`mdsens.potentials.self_consistent`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mdsens._util.errors import InputError
from mdsens._util.precision import full_precision
from mdsens._util.validation import real_number, short
from mdsens.implicit.linear import CG, Direct, LinearMap, Method, check_method
from mdsens.implicit.linear.result import Result
from mdsens.potentials.base import Params
from mdsens.potentials.self_consistent import (
    AllPairs,
    SelfConsistentPotential,
    Species,
    nan_where_failed,
)

__all__ = ["ChargeEquilibration", "InducedDipoles", "charge_equilibration", "induced_dipoles"]


class _DipoleFunctional(NamedTuple):
    """The energy W of induced dipoles; its variables are y = mu / sqrt(alpha), (n, d).

    In these variables all dipoles are equally stiff, however small some polarizabilities are. The
    interaction of two dipoles is T = across - along v v, with the vector v between them.

    Attributes:
      root: (n,) square roots of the polarizabilities.
      field: (n, d) the charges' field at each particle.
      vectors: (n, n, d) vectors r_i - r_j.
      across, along: (n, n) the two factors of T.
    """

    root: jax.Array
    field: jax.Array
    vectors: jax.Array
    across: jax.Array
    along: jax.Array

    @property
    def definite(self) -> bool:
        return True

    def start(self) -> jax.Array:
        return jnp.zeros_like(self.field)

    def dipoles(self, y: jax.Array) -> jax.Array:
        """Compute the dipoles mu (n, d) from the variables y."""
        return self.root[:, None] * y

    @full_precision
    def tensor(self, mu: jax.Array) -> jax.Array:
        """Compute T mu, minus the field of the dipoles mu, (n, d)."""
        # i: the particle at which the field is, j: the dipole that it comes from
        share = self.along * jnp.einsum("ijd,jd->ij", self.vectors, mu)
        return self.across @ mu - jnp.einsum("ij,ijd->id", share, self.vectors)

    def energy(self, y: jax.Array) -> jax.Array:
        """Compute the energy W of the dipoles.

        W is the sum of the energy of polarization, the interaction of the dipoles, and their energy
        in the charges' field.
        """
        mu = self.dipoles(y)
        return 0.5 * jnp.sum(y**2) + jnp.sum(mu * (0.5 * self.tensor(mu) - self.field))

    def conditions(self, y: jax.Array) -> jax.Array:
        """Compute the derivative of the energy W of the dipoles by the variables y, (n, d)."""
        return y + self.root[:, None] * (self.tensor(self.dipoles(y)) - self.field)

    def curvature(self) -> tuple[LinearMap, jax.Array]:
        # the conditions are linear but for a constant, so that any y gives their derivative
        return jax.linearize(self.conditions, self.field)[1], self.field


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InducedDipoles(SelfConsistentPotential):
    """Point charges and induced dipoles; made by :func:`induced_dipoles`."""

    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    solve: Method = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(default="induced_dipoles", metadata={"static": True})
    above: tuple[float, ...] = dataclasses.field(
        default=(-math.inf, 0.0, 0.0), metadata={"static": True}
    )

    @full_precision
    def functional(
        self, pairs: AllPairs, *values: jax.Array
    ) -> tuple[_DipoleFunctional, jax.Array]:
        charge, alpha, *damping = values
        across = along = pairs.inverse**3
        if damping:
            # Thole's x = a r^3 / sqrt(alpha_i alpha_j), a the geometric mean of the two dampings
            rate = jnp.sqrt(damping[0][:, None] * damping[0] / (alpha[:, None] * alpha))
            x = rate * pairs.lengths**3
            # expm1, since 1 - exp(-x) loses its digits where x is small
            across = -jnp.expm1(-x) * across
            along = -(jnp.expm1(-x) + x * jnp.exp(-x)) * along
        # at particle i, of the charges j
        field = jnp.einsum("ij,j,ijd->id", across, charge, pairs.vectors)
        along = 3.0 * along * pairs.inverse**2
        functional = _DipoleFunctional(jnp.sqrt(alpha), field, pairs.vectors, across, along)
        return functional, 0.5 * charge @ pairs.inverse @ charge

    def moments(
        self, positions: jax.Array, params: Params, species: Species, species_count: int
    ) -> tuple[jax.Array, jax.Array]:
        """Return the particles' charges (n,) and dipoles (n, d); not finite if the solve failed."""
        functional, y, status = self.at_rest(positions, params, species, species_count)
        charge, *_ = self.values(params, positions.shape[0], species, species_count)
        return charge, functional.dipoles(y) * nan_where_failed(status)

    def _without_minimum(self, status: Result) -> str:
        if status is not Result.INDEFINITE:
            return super()._without_minimum(status)
        return (
            "polarization catastrophe: at these positions the dipoles have no minimum of energy,"
            " since they attract each other more than polarizing costs. Start farther apart, or"
            " give smaller polarizabilities or a smaller damping (a smaller value damps more)."
        )


class _ChargeFunctional(NamedTuple):
    """The energy W of charges that equilibrate; its variables are (charges, chemical potential).

    The chemical potential is the Lagrange multiplier of the total charge.

    Attributes:
      electronegativity: (n,) electronegativities chi, energy per charge.
      hardness: (n,) hardnesses J, energy per squared charge.
      coulomb: (n, n) Coulomb matrix of the Gaussian charges, zero on the diagonal.
      total: the charge of all particles together.
    """

    electronegativity: jax.Array
    hardness: jax.Array
    coulomb: jax.Array
    total: jax.Array

    @property
    def definite(self) -> bool:
        return False  # with a Lagrange multiplier the stationary point is a saddle point

    def start(self) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros_like(self.hardness), jnp.zeros_like(self.total)

    @full_precision
    def field(self, q: jax.Array) -> jax.Array:
        """Compute the part of dW/dq that is linear in the charges."""
        return self.hardness * q + self.coulomb @ q

    @full_precision
    def energy(self, y: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Compute the energy W with the term of the multiplier, which is zero at the minimum.

        With this term, an error of the total charge enters U only as its square.
        """
        q, potential = y
        energy = q @ (self.electronegativity + 0.5 * self.field(q))
        return energy + potential * (self.total - jnp.sum(q))

    def conditions(self, y: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Compute the two residuals that are zero at equilibrium.

        They are dW/dq minus the chemical potential, with W the energy of the charges q, and the
        prescribed minus the actual total charge.
        """
        q, potential = y
        return self.electronegativity + self.field(q) - potential, self.total - jnp.sum(q)

    def curvature(self) -> tuple[LinearMap, jax.Array]:
        def projected(q: jax.Array) -> jax.Array:
            """Apply d2W/dq2 (W the energy) to charges q of sum zero; leave equal charges as is."""
            mean = jnp.mean(q)
            field = self.field(q - mean)
            return field - jnp.mean(field) + mean

        return projected, self.hardness


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChargeEquilibration(SelfConsistentPotential):
    """Charges that equilibrate; made by :func:`charge_equilibration`."""

    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    total: float = dataclasses.field(metadata={"static": True})
    solve: Method = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(default="charge_equilibration", metadata={"static": True})
    above: tuple[float, ...] = dataclasses.field(
        default=(-math.inf, 0.0, 0.0), metadata={"static": True}
    )

    def functional(
        self, pairs: AllPairs, *values: jax.Array
    ) -> tuple[_ChargeFunctional, jax.Array]:
        electronegativity, hardness, radius = values
        # the width of the Gaussian that two Gaussian charges make together
        width = jnp.sqrt(2.0 * (radius[:, None] ** 2 + radius**2))
        # zero on the diagonal, where pairs.inverse is: a charge's own field is in its hardness
        coulomb = jax.scipy.special.erf(pairs.lengths / width) * pairs.inverse
        total = jnp.asarray(self.total, coulomb.dtype)
        functional = _ChargeFunctional(electronegativity, hardness, coulomb, total)
        return functional, jnp.zeros((), coulomb.dtype)

    def moments(
        self, positions: jax.Array, params: Params, species: Species, species_count: int
    ) -> tuple[jax.Array, jax.Array]:
        """Return the charge (n,) of each particle, and dipoles (n, d), which are zero.

        Charges are not finite where the inner solve failed.
        """
        _, (charges, _), status = self.at_rest(positions, params, species, species_count)
        return charges * nan_where_failed(status), jnp.zeros_like(positions)

    def potential(
        self, positions: jax.Array, params: Params, species: Species, species_count: int
    ) -> jax.Array:
        """Return the chemical potential of charge, dU / dtotal; not finite if the solve failed."""
        _, (_, potential), status = self.at_rest(positions, params, species, species_count)
        return potential * nan_where_failed(status)

    def _without_minimum(self, status: Result) -> str:
        if status is not Result.INDEFINITE:
            return super()._without_minimum(status)
        return (
            "at these positions the charges have no minimum of energy, since charges of opposite"
            f" sign gain more than their {self.names[1]} costs: give {self.names[1]} above 1 /"
            f" (sqrt(pi) {self.names[2]}), for which there always is a minimum, or a larger"
            f" {self.names[2]}."
        )


def induced_dipoles(damped: bool = True, solve: Method = CG(rtol=1e-14)) -> InducedDipoles:
    """Make a potential of point charges and the dipoles that they induce, with Thole's damping.

        U = sum over pairs of q_i q_j / r + min over mu of
            [sum |mu_i|^2 / (2 alpha_i) - sum mu_i . E_i + sum over pairs of mu_i . T_ij mu_j]
        E_i = sum_j q_j s(r) v / r^3,      T_ij = s(r) / r^3 - 3 t(r) v v / r^5,      v = r_i - r_j
        s = 1 - exp(-x),   t = 1 - (1 + x) exp(-x),   x = a r^3 / sqrt(alpha_i alpha_j)

    The unit of charge is such that two unit charges at distance 1 have the energy 1: with lengths
    in Angstrom and energies in eV, an elementary charge is sqrt(14.4) of these units. In 2-D the
    dipoles are those of three dimensions, since nothing drives them out of the plane. The potential
    does not keep particles apart: add a repulsive potential. Parameters, each a number, one value
    per species or one per particle: ``charge``; ``polarizability``, a volume, positive (1e-9 is
    nearly none); ``damping``, a pure number, positive: a is the geometric mean of the two
    particles' values. 0.39 is AMOEBA's; a smaller value damps more. The interaction of charges with
    each other is not damped.

    Args:
      damped: False for s = t = 1, without the parameter ``damping``. There is then no minimum where
        two particles come nearer than (4 alpha_i alpha_j)^(1/6), and in clusters already at larger
        distances: the polarization catastrophe.
      solve: the solver for the dipoles. CG to round-off takes about 20 steps; with Direct(), a
        Cholesky factorization, a force takes as long for 27 particles and 40 times as long for 216.
        A larger rtol makes a relative error of forces of about that size.

    Raises:
      InputError: when a System is made with a periodic cell, with two particles at the same point,
        or where there is no minimum.
      TooLargeError: more particles than fit in memory, at 3.2 KB per pair (0.8 GB for 500).

    Source: Thole, Chem. Phys. 59, 341 (1981); Ren and Ponder, J. Phys. Chem. B 107, 5933 (2003) for
    s and t.
    """
    if not isinstance(damped, bool):
        raise InputError(f"damped is {short(damped)}: give True or False.")
    check_method(solve)
    names = ("charge", "polarizability", "damping")
    return InducedDipoles(names if damped else names[:2], solve)


def charge_equilibration(total: float = 0.0, solve: Method = Direct()) -> ChargeEquilibration:
    """Make a potential of charges that spread until all particles have equal electronegativity.

        U = min over q with sum q_i = total of [sum chi_i q_i + 1/2 sum J_i q_i^2 + sum over pairs
            of q_i q_j erf(r / sqrt(2 (w_i^2 + w_j^2))) / r]

    The Lagrange multiplier of the total is the chemical potential, dU / dtotal, which all particles
    share. Charges are Gaussians of standard deviation w; units are those of
    :func:`induced_dipoles`. In a sum of both potentials, the charges of one do not interact with
    those of the other. The potential does not keep particles apart: add one that does.

    Parameters, each a number, one value per species or one per particle: ``electronegativity`` chi,
    an energy per charge; ``hardness`` J, an energy per squared charge, positive, which includes the
    Gaussian's energy in its own field, 1 / (sqrt(pi) w): above that value there is a minimum
    wherever the particles are; ``radius`` w, a length, positive.

    Args:
      total: the charge of all particles together.
      solve: the solver of the conditions, whose matrix is symmetric and indefinite: Direct() (LU)
        for up to some hundred particles, MINRES(rtol=1e-14) for more. A larger rtol makes a
        relative error of forces of about that size.

    Raises:
      InputError: when a System is made with a periodic cell, with two particles at the same point,
        or where there is no minimum.
      TooLargeError: more particles than fit in memory, at 3.2 KB per pair (0.8 GB for 500).

    Source: Rappe and Goddard, J. Phys. Chem. 95, 3358 (1991); the Gaussians of Ko et al., Nat.
    Commun. 12, 398 (2021), whose hardness excludes the energy of a charge in its own field.
    """
    check_method(solve)
    charge = real_number("total", total, "give the total charge.")
    if not math.isfinite(charge):
        raise InputError(f"total is {charge}: give the total charge.")
    return ChargeEquilibration(("electronegativity", "hardness", "radius"), charge, solve)
