"""Potentials of electrostatics: induced dipoles, and charge equilibration.

Each energy is a minimum over inner variables, the dipoles or the charges of the particles: see
:mod:`mdsens.potentials.self_consistent`.
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
    """The energy W of induced dipoles mu as a function of y = mu / sqrt(alpha), (n, d).

    alpha are the polarizabilities. In the variables y all dipoles are equally stiff, however small
    some polarizabilities are. Two dipoles with the vector v between them interact by the energy
    mu_i . T mu_j with the tensor T = across 1 - along v v.

    Attributes:
      root: (n,) sqrt(alpha) of each particle.
      field: (n, d) the electric field of the charges at each particle.
      vectors: (n, n, d) vectors v = r_i - r_j between the particles.
      across, along: (n, n) the two factors of T for each pair.
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
        """Compute the dipoles mu = sqrt(alpha) y, (n, d), from the scaled dipoles y.

        alpha are the polarizabilities.
        """
        return self.root[:, None] * y

    @full_precision
    def tensor(self, mu: jax.Array) -> jax.Array:
        """Compute T mu, (n, d), which is minus the electric field of the dipoles mu.

        T is the matrix of the interactions between dipoles.
        """
        # i: the particle at which the field is, j: the dipole that it comes from
        share = self.along * jnp.einsum("ijd,jd->ij", self.vectors, mu)
        return self.across @ mu - jnp.einsum("ij,ijd->id", share, self.vectors)

    def energy(self, y: jax.Array) -> jax.Array:
        """Compute the energy W of induced dipoles mu = sqrt(alpha) y as a function of y, (n, d).

        alpha are the polarizabilities. W is the sum of the energy of polarization, y^2 / 2, the
        interaction of the dipoles with each other, and their energy in the field of the charges.
        """
        mu = self.dipoles(y)
        # The sum over particles has each pair of dipoles twice, but each dipole in the field once.
        return 0.5 * jnp.sum(y**2) + jnp.sum(mu * (0.5 * self.tensor(mu) - self.field))

    def conditions(self, y: jax.Array) -> jax.Array:
        """Compute dW/dy (n, d), the derivative of the energy W of induced dipoles mu.

        y = mu / sqrt(alpha) are scaled dipoles, and alpha are the polarizabilities.
        """
        return y + self.root[:, None] * (self.tensor(self.dipoles(y)) - self.field)

    def curvature(self) -> tuple[LinearMap, jax.Array]:
        # the conditions are linear but for a constant, so that any y gives their derivative
        return jax.linearize(self.conditions, self.field)[1], self.field


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InducedDipoles(SelfConsistentPotential):
    """The potential of point charges and induced dipoles; made by :func:`induced_dipoles`."""

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
        # zero on the diagonal, so that no particle acts on itself
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
        # 0.5, since the sum over i and j has each pair twice
        return functional, 0.5 * charge @ pairs.inverse @ charge

    def moments(
        self, positions: jax.Array, params: Params, species: Species, species_count: int
    ) -> tuple[jax.Array, jax.Array]:
        """Return the charges (n,) and the induced dipoles (n, d) of the particles.

        The dipoles are not finite if the linear solve for them failed.
        """
        functional, y, status = self.at_rest(positions, params, species, species_count)
        charge, *_ = self.values(params, positions.shape[0], species, species_count)
        return charge, functional.dipoles(y) * nan_where_failed(status)

    def _without_minimum(self, status: Result) -> str:
        if status is not Result.INDEFINITE:
            return super()._without_minimum(status)
        return (
            "polarization catastrophe: at these positions the energy has no minimum over the"
            " dipoles, since the dipoles gain more energy by attracting each other than their"
            " polarization costs. Start with the particles farther apart, or give smaller"
            " polarizabilities or a smaller 'damping' (a smaller value damps more)."
        )


class _ChargeFunctional(NamedTuple):
    """The energy W of charges that equilibrate, and the conditions for its minimum.

    The variables are the charges and the chemical potential, which is the Lagrange multiplier that
    keeps the total charge at its prescribed value.

    Attributes:
      electronegativity: (n,) electronegativities chi, energy per charge.
      hardness: (n,) hardnesses J, energy per squared charge.
      coulomb: (n, n) Coulomb matrix of the Gaussian charges, zero on the diagonal.
      total: the prescribed charge of all particles together.
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
        """Compute J_i q_i + sum_j C_ij q_j (n,), the part of dW/dq linear in the charges q.

        W is the energy of the charges, J are the hardnesses and C is the Coulomb matrix.
        """
        return self.hardness * q + self.coulomb @ q

    @full_precision
    def energy(self, y: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Compute the energy W of the charges plus mu times (prescribed - actual total charge).

        mu is the chemical potential, and the added term is zero at the minimum. Because of this
        term, an error of the total charge changes the minimal energy only by its square.
        """
        q, potential = y
        energy = q @ (self.electronegativity + 0.5 * self.field(q))
        return energy + potential * (self.total - jnp.sum(q))

    def conditions(self, y: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Compute the two residuals that are zero when the charges q are in equilibrium.

        The first is dW/dq (n,) minus the chemical potential, with W the energy of the charges. The
        second is the prescribed minus the actual total charge.
        """
        q, potential = y
        return self.electronegativity + self.field(q) - potential, self.total - jnp.sum(q)

    def curvature(self) -> tuple[LinearMap, jax.Array]:
        def projected(q: jax.Array) -> jax.Array:
            """Multiply charges q (n,) of sum zero by d2W/dq2, and make the sum of the result zero.

            W is the energy of the charges. The sum is made zero by subtracting the mean. A vector q
            of equal entries, the direction that changes the total charge, is returned unchanged.
            """
            mean = jnp.mean(q)
            field = self.field(q - mean)
            return field - jnp.mean(field) + mean

        return projected, self.hardness


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChargeEquilibration(SelfConsistentPotential):
    """The potential of charges that equilibrate; made by :func:`charge_equilibration`."""

    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    # static, hence without a derivative; dU / dtotal is the chemical potential
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
        """Return the charge (n,) of each particle, and zero dipoles (n, d).

        The charges are not finite if the solve for the equilibrium charges failed.
        """
        _, (charges, _), status = self.at_rest(positions, params, species, species_count)
        return charges * nan_where_failed(status), jnp.zeros_like(positions)

    def potential(
        self, positions: jax.Array, params: Params, species: Species, species_count: int
    ) -> jax.Array:
        """Return the chemical potential: the derivative of the energy by the total charge.

        The value is not finite if the solve for the equilibrium charges failed.
        """
        _, (_, potential), status = self.at_rest(positions, params, species, species_count)
        return potential * nan_where_failed(status)

    def _without_minimum(self, status: Result) -> str:
        if status is not Result.INDEFINITE:
            return super()._without_minimum(status)
        return (
            "at these positions the energy has no minimum over the charges, since charges of"
            f" opposite sign gain more energy than their {self.names[1]} costs: give"
            f" {self.names[1]} above 1 / (sqrt(pi) {self.names[2]}), for which the energy always"
            f" has a minimum, or a larger {self.names[2]}."
        )


def induced_dipoles(damped: bool = True, solve: Method = CG(rtol=1e-14)) -> InducedDipoles:
    """Make a potential of point charges q and the dipoles mu they induce, with Thole's damping.

        U = sum over pairs of q_i q_j / r + min over mu of
            [sum |mu_i|^2 / (2 alpha_i) - sum mu_i . E_i + sum over pairs of mu_i . T_ij mu_j]
        E_i = sum_j q_j s(r) v / r^3,      T_ij = s(r) / r^3 - 3 t(r) v v / r^5,      v = r_i - r_j
        s = 1 - exp(-x),   t = 1 - (1 + x) exp(-x),   x = a r^3 / sqrt(alpha_i alpha_j)

    E_i is the field of the charges at particle i, T_ij the interaction of two dipoles, s and t are
    the factors of the damping. Two unit charges at distance 1 have the energy 1: with lengths in
    Angstrom and energies in eV, an elementary charge is sqrt(14.4) of these units. In 2-D the
    dipoles are those of three dimensions, since nothing drives them out of the plane. The potential
    does not keep particles apart: add a repulsive potential.

    Parameters, each a number, one value per species or one per particle: ``charge`` q;
    ``polarizability`` alpha, a volume, positive (1e-9 is nearly none); ``damping``, a pure number,
    positive: a is the geometric mean of the two particles' values. The force field AMOEBA has 0.39;
    a smaller value damps more. The interaction of charges with each other is not damped.

    Args:
      damped: whether to damp. With False, s = t = 1, and there is no parameter ``damping``; the
        energy then has no minimum over mu where two particles come nearer than
        (4 alpha_i alpha_j)^(1/6), in clusters already at larger distances: the polarization
        catastrophe.
      solve: the solver for the dipoles. CG (conjugate gradients) to round-off takes about 20 steps.
        With Direct(), a Cholesky factorization, computing the forces of 27 particles takes as long
        as with CG, and those of 216 particles 40 times as long as with CG. A larger ``rtol`` of the
        solver makes a relative error of the forces of about the size of ``rtol``.

    Raises:
      InputError: when a System is made with a periodic cell, with two particles at the same point,
        or at positions where the energy has no minimum over mu.
      TooLargeError: more particles than fit in memory, at 3.2 KB per pair of particles (0.8 GB for
        500 particles).

    Source: Thole, Chem. Phys. 59, 341 (1981); Ren and Ponder, J. Phys. Chem. B 107, 5933 (2003) for
    s and t.
    """
    if not isinstance(damped, bool):
        raise InputError(f"`damped` is {short(damped)}: give True or False.")
    check_method(solve)
    names = ("charge", "polarizability", "damping")
    return InducedDipoles(names if damped else names[:2], solve)


def charge_equilibration(total: float = 0.0, solve: Method = Direct()) -> ChargeEquilibration:
    """Make a potential of charges that spread until all particles have equal electronegativity.

        U = min over q with sum q_i = total of [sum chi_i q_i + 1/2 sum J_i q_i^2 + sum over pairs
            of q_i q_j erf(r / sqrt(2 (w_i^2 + w_j^2))) / r]

    q are the charges. The Lagrange multiplier of the total charge is the chemical potential,
    dU / dtotal, which all particles share. Charges are Gaussians of standard deviation w. Units are
    those of :func:`induced_dipoles`; if the two potentials are added, the charges of one do not
    interact with the charges and dipoles of the other. The potential does not keep particles apart:
    add a repulsive potential.

    Parameters, each a number, one value per species or one per particle: ``electronegativity`` chi,
    an energy per charge; ``hardness`` J, an energy per squared charge, positive; ``radius`` w, a
    length, positive. J includes the energy of the Gaussian in its own field, 1 / (sqrt(pi) w). For
    J above this energy, U has a minimum over q wherever the particles are.

    Args:
      total: the charge of all particles together.
      solve: the solver of the linear equations for the charges, whose matrix is symmetric and
        indefinite: Direct(), an LU factorization, for up to some hundred particles, or
        MINRES(rtol=1e-14) for more. A larger ``rtol`` makes a relative error of the forces of about
        the size of ``rtol``.

    Raises:
      InputError: when a System is made with a periodic cell, with two particles at the same point,
        or at positions where the energy has no minimum over q.
      TooLargeError: more particles than fit in memory, at 3.2 KB per pair of particles (0.8 GB for
        500 particles).

    Source: Rappe and Goddard, J. Phys. Chem. 95, 3358 (1991). The Gaussians are those of Ko et al.,
    Nat. Commun. 12, 398 (2021), where the hardness excludes the energy of a charge in its own
    field.
    """
    check_method(solve)
    charge = real_number("total", total, "give the total charge.")
    if not math.isfinite(charge):
        raise InputError(f"`total` is {charge}: give the total charge, a finite number.")
    return ChargeEquilibration(("electronegativity", "hardness", "radius"), charge, solve)
