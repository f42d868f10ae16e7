"""Potentials of metals, in which the energy of an atom depends on the density of its neighbors.

U = sum over i of (F(rho_i) + 1/2 sum over j of phi(r_ij)),     rho_i = sum over j of f(r_ij)
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mdsens._util.errors import InputError
from mdsens._util.validation import check_positive, real_number
from mdsens.potentials.catalogue import switched
from mdsens.potentials.local import Embedded, LocalPotential, from_local
from mdsens.potentials.neighborhood import Params, pair_values, root
from mdsens.potentials.spline import FEWEST_KNOTS, Spline, spline

__all__ = ["eam", "finnis_sinclair", "gupta"]

GUPTA_SHAPES = {"A": "pair", "xi": "pair", "p": "pair", "q": "pair", "r0": "pair"}
# A of finnis_sinclair belongs to an atom: a scalar, or (S,) by the species of the center.
FINNIS_SINCLAIR_SHAPES: dict[str, str] = dict.fromkeys(("d", "beta", "c", "c0", "c1", "c2"), "pair")


def gupta(onset: float, cutoff: float) -> LocalPotential:
    """Make Gupta's potential, the second-moment approximation of tight binding, for metals.

        U = sum over i of (sum over j of A exp(-p (r_ij / r0 - 1)) S(r_ij)
                           - sqrt(sum over j of xi^2 exp(-2 q (r_ij / r0 - 1)) S(r_ij)))

    S is the smooth switch of :class:`~mdsens.potentials.switched`, 1 up to ``onset`` and 0 from
    ``cutoff`` on.

    Args:
      onset, cutoff: lengths in the units of r; they do not move with the parameters.

    Parameters: ``A`` and ``xi`` energies, ``p`` and ``q`` numbers without unit, ``r0`` a length,
    each a scalar or a matrix (S, S) of species pairs. An atom without neighbors has no energy. The
    second derivatives diverge where the only neighbor of an atom leaves at the cutoff, as those of
    a square root.

    Copper, whose lattice constant is 3.615 angstroms, in eV and angstroms:

        {"A": 0.0855, "xi": 1.224, "p": 10.960, "q": 2.278, "r0": 3.615 / 2**0.5}

    These numbers of the source are for sums up to the fifth shell of neighbors, which is at 5.72
    angstroms: give for example onset 5.8 and cutoff 6.2. Source: Cleri and Rosato, Phys. Rev. B 48,
    22 (1993).

    Raises:
      InputError: not 0 < onset < cutoff.
    """
    form = Gupta(onset, cutoff)
    return from_local(
        Embedded(form),
        tuple(GUPTA_SHAPES),
        form.cutoff,
        breakpoints=(form.onset, form.cutoff),
        shapes=GUPTA_SHAPES,
        name="gupta",
        positive=("r0",),
    )


@dataclasses.dataclass(frozen=True)
class Gupta:
    """The sums of Gupta's potential, switched off between onset and cutoff."""

    onset: float
    cutoff: float

    def __post_init__(self) -> None:
        # `switched` checks both, and raises for those that do not fit
        checked = self.switch
        object.__setattr__(self, "onset", checked.onset)
        object.__setattr__(self, "cutoff", checked.cutoff)

    @property
    def switch(self) -> switched:
        """The switch S(r) alone."""
        return switched(jnp.ones_like, self.onset, self.cutoff)

    def tables(self, params: Params) -> Params:
        """Return the parameters, which are all that the functions need."""
        return params

    def pairs(
        self, r: jax.Array, species_i: jax.Array, species_j: jax.Array, tables: Params
    ) -> tuple[jax.Array, jax.Array]:
        """Compute what each neighbor adds to the repulsion and to the squared band energy."""
        A, xi, p, q, r0 = (pair_values(tables[name], species_i, species_j) for name in GUPTA_SHAPES)
        switch = self.switch(r)
        stretch = r / r0 - 1.0
        repulsion = A * jnp.exp(-p * stretch) * switch
        return repulsion, xi * xi * jnp.exp(-2.0 * q * stretch) * switch

    def embed(self, rho: jax.Array, species_i: jax.Array, tables: Params) -> jax.Array:
        """Compute the band energy of an atom from its square, rho."""
        return -root(rho)


def finnis_sinclair() -> LocalPotential:
    """Make the potential of Finnis and Sinclair, for transition metals.

        U = 1/2 sum over i, j of V(r_ij) - sum over i of A sqrt(sum over j of phi(r_ij))

        V(r) = (r - c)^2 (c0 + c1 r + c2 r^2),     r <= c;     0 beyond

        phi(r) = (r - d)^2 + beta (r - d)^3 / d,     r <= d;     0 beyond

    Parameters: ``A`` an energy per length, a scalar or (S,) by the species of the atom i; ``d`` and
    ``c`` lengths, ``beta`` a number without unit, ``c0``, ``c1`` and ``c2`` energies per length
    to the power of 2, 3 and 4, each a scalar or a matrix (S, S) of species pairs.

    The cutoff is the larger one of c and d. At both distances second derivatives jump. Where the
    only neighbor of an atom leaves at d, its force jumps: sqrt(phi) is linear there.

    The iron of the source, in eV and angstroms:

        {"A": 1.828905, "d": 3.569745, "beta": 1.8, "c": 3.40,
         "c0": 1.2371147, "c1": -0.3592185, "c2": -0.0385607}

    Source: Finnis and Sinclair, Phil. Mag. A 50, 45 (1984), and the erratum, 53, 161 (1986).
    """
    return from_local(
        Embedded(FinnisSinclair()),
        ("A", *FINNIS_SINCLAIR_SHAPES),
        finnis_sinclair_cutoffs,
        breakpoints=finnis_sinclair_breakpoints,
        shapes=FINNIS_SINCLAIR_SHAPES,
        name="finnis_sinclair",
        positive=("d", "c"),
    )


def finnis_sinclair_cutoffs(params: Params) -> jax.Array:
    """Compute the cutoff of each pair of species, the larger one of c and d, (S, S)."""
    return jnp.maximum(params["c"], params["d"])


def finnis_sinclair_breakpoints(params: Params) -> tuple[jax.Array, ...]:
    """Return the distances at which second derivatives jump, c and d."""
    return params["c"], params["d"]


@dataclasses.dataclass(frozen=True)
class FinnisSinclair:
    """The sums of the potential of Finnis and Sinclair."""

    def tables(self, params: Params) -> Params:
        """Return the parameters, which are all that the functions need."""
        return params

    def pairs(
        self, r: jax.Array, species_i: jax.Array, species_j: jax.Array, tables: Params
    ) -> tuple[jax.Array, jax.Array]:
        """Compute half of the repulsion V of each neighbor, and its density phi."""
        value = {
            name: pair_values(tables[name], species_i, species_j) for name in FINNIS_SINCLAIR_SHAPES
        }
        beyond = r - value["d"]
        density = beyond * beyond * (1.0 + value["beta"] * beyond / value["d"])
        overlap = r - value["c"]
        repulsion = overlap * overlap * (value["c0"] + r * (value["c1"] + r * value["c2"]))
        return 0.5 * jnp.where(overlap < 0.0, repulsion, 0.0), jnp.where(beyond < 0.0, density, 0.0)

    def embed(self, rho: jax.Array, species_i: jax.Array, tables: Params) -> jax.Array:
        """Compute the band energy of an atom with the density rho."""
        strength = tables["A"] if tables["A"].ndim == 0 else tables["A"][species_i]
        return -strength * root(rho)


def eam(rho_spacing: float, r_spacing: float, cutoff: float) -> LocalPotential:
    """Make an embedded-atom potential of tables.

        U = sum over i of F_i(rho_i) + 1/2 sum over i, j of z_ij(r_ij) / r_ij

        rho_i = sum over j of f_ij(r_ij)

    F, f and z = r phi are cubic splines, twice continuously differentiable, through tables with
    equidistant knots from 0 on ("not-a-knot" at the ends). The values at the knots are the
    parameters. Files of such tables are read by :func:`mdsens.io.read_potential`.

    Args:
      rho_spacing: distance of the knots of F.
      r_spacing: distance of the knots of f and z.
      cutoff: distance from which on f and phi are zero, at most that of the last knot.

    Parameters: ``embedding`` (Nrho,) or (S, Nrho), the energies F; ``density`` (Nr,), (S, Nr) by
    the species of the neighbor, or (S, S, Nr) by the species of the atom and of its neighbor;
    ``pair`` (Nr,) or (S, S, Nr), z = r phi, an energy times a length.

    Above the last knot of F, F continues linearly, with its slope there, as in LAMMPS; its second
    derivative jumps. Below 0 the first cubic polynomial continues. The tables should end with
    zeros: a value that is left at the cutoff is a jump of the energy, as in any other code.

    LAMMPS interpolates the same tables by polynomials that are only once continuously
    differentiable: its energies differ by the fourth power of the spacing. ASE's splines are those
    used here, but of phi and not of r phi. Tables that do not end in several zeros, as those of
    Cu_u3.eam, leave a slope at the cutoff, where the force then jumps: ``verify.potential`` tells.
    The cutoff is a breakpoint of the certificate.

    Source: Daw and Baskes, Phys. Rev. B 29, 6443 (1984).

    Raises:
      InputError: a spacing or the cutoff is not a positive number.
    """
    form = Tables(rho_spacing, r_spacing, cutoff)
    names = ("embedding", "density", "pair")
    return from_local(Embedded(form), names, form.cutoff, breakpoints=(form.cutoff,), name="eam")


@dataclasses.dataclass(frozen=True)
class Tables:
    """The energy of one atom by tables of F, f and r phi with equidistant knots."""

    rho_spacing: float
    r_spacing: float
    cutoff: float

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = real_number(field.name, getattr(self, field.name), "give a positive number.")
            object.__setattr__(self, field.name, value)
        check_positive(self, ("rho_spacing", "r_spacing", "cutoff"))

    def tables(self, params: Params) -> Splines:
        """Make the splines through the tables.

        Args:
          params: by name, the values at the knots.

        Raises:
          InputError: a table ends before the cutoff, or has less than four knots.
        """
        self._check(params)
        spacings = {
            "embedding": self.rho_spacing,
            "density": self.r_spacing,
            "pair": self.r_spacing,
        }
        made = {
            name: spline(params[name].reshape(-1, params[name].shape[-1]), spacing)
            for name, spacing in spacings.items()
        }
        return Splines(**made)

    def pairs(
        self, r: jax.Array, species_i: jax.Array, species_j: jax.Array, tables: Splines
    ) -> tuple[jax.Array, jax.Array]:
        """Compute half of the pair energy of each neighbor, and what it adds to the density."""
        near = r < self.cutoff
        count = tables.embedding.rows
        density = _of_neighbors(tables.density, count, r, species_i, species_j)
        pair = _of_neighbors(tables.pair, count, r, species_i, species_j) / r
        return 0.5 * jnp.where(near, pair, 0.0), jnp.where(near, density, 0.0)

    def embed(self, rho: jax.Array, species_i: jax.Array, tables: Splines) -> jax.Array:
        """Evaluate F at the density rho, with a straight line beyond the last knot."""
        made = tables.embedding
        row = species_i if made.rows > 1 else 0
        beyond = rho > made.end
        line = jnp.where(beyond, rho - made.end, 0.0) * made.slope_at_end(row)
        return made(jnp.where(beyond, made.end, rho), row) + line

    def _check(self, params: Params) -> None:
        """Raise InputError if a table is too short."""
        for name in ("embedding", "density", "pair"):
            count = params[name].shape[-1] if params[name].ndim else 0
            if count < FEWEST_KNOTS:
                raise InputError(
                    f"the table {name} of eam has {count} knots: give at least {FEWEST_KNOTS}."
                )
            end = (count - 1) * self.r_spacing
            # by a part in 1e9: a cutoff at the last knot is one after round-off, too
            if name != "embedding" and end < self.cutoff * (1.0 - 1e-9):
                raise InputError(
                    f"the table {name} of eam ends at {end:g}, before the cutoff {self.cutoff:g}:"
                    " give a longer table or a smaller cutoff."
                )


class Splines(NamedTuple):
    """The splines of an embedded-atom potential, one for each row of its tables."""

    embedding: Spline
    density: Spline
    pair: Spline


def _of_neighbors(
    made: Spline, count: int, r: jax.Array, species_i: jax.Array, species_j: jax.Array
) -> jax.Array:
    """Evaluate the splines of a table at the distances of neighbors.

    The table has one spline, one for each of ``count`` species of the neighbor, or one for each
    species of the atom and of the neighbor.
    """
    if made.rows == 1:
        return made(r)
    return made(r, species_j if made.rows == count else species_i * count + species_j)
