"""Tersoff's potential: bonds that are the weaker, the more other bonds their atoms have."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from mdsens._util.errors import InputError, short
from mdsens._util.validation import is_integer
from mdsens.potentials.local import LocalPotential, from_local
from mdsens.potentials.neighborhood import (
    Params,
    bond_values,
    distances,
    pair_values,
    triple_values,
)

__all__ = ["tersoff"]

# How each parameter depends on the species: of a pair, or of a triple with its center first.
SHAPES = {
    "A": "pair",
    "B": "pair",
    "lambda1": "pair",
    "lambda2": "pair",
    "n": "pair",
    "beta": "pair",
    "gamma": "triple",
    "lambda3": "triple",
    "c": "triple",
    "d": "triple",
    "cos_theta0": "triple",
    "R": "triple",
    "D": "triple",
}

# ln 1e30: exp is not taken of larger numbers, nor of smaller ones than -ln 1e30, as in LAMMPS.
_LARGEST_EXPONENT = 69.0776
# (beta zeta)^n below this share of 2 n does not change b, in double precision: b = 1 - share.
_SMALLEST_SHARE = 1e-16


def tersoff(m: int = 3) -> LocalPotential:
    """Make Tersoff's potential, for silicon, carbon and their compounds.

        U = 1/2 sum over i, j != i of fC(r_ij) (A exp(-lambda1 r_ij) - b_ij B exp(-lambda2 r_ij))

        b_ij = (1 + (beta zeta_ij)^n)^(-1 / (2 n))

        zeta_ij = sum over k != i, j of fC(r_ik) g(cos theta_ijk) exp((lambda3 (r_ij - r_ik))^m)

        g(x) = gamma (1 + c^2 / d^2 - c^2 / (d^2 + (cos_theta0 - x)^2))

        fC(r) = 1 below R - D, (1 - sin(pi / 2 (r - R) / D)) / 2 up to R + D, 0 beyond

    Args:
      m: the exponent in zeta, 3 or 1.

    Parameters: ``A`` and ``B`` energies, ``lambda1``, ``lambda2`` and ``lambda3`` inverse lengths,
    ``R`` and ``D`` lengths, ``n``, ``beta``, ``gamma``, ``c``, ``d`` and ``cos_theta0`` numbers
    without unit. ``A``, ``B``, ``lambda1``, ``lambda2``, ``n`` and ``beta`` are a scalar or a
    matrix (S, S) of species pairs [i, j], the others a scalar or (S, S, S), with the species of the
    center i first and of the bonded atom j second. The cutoff of zeta takes ``R[i, j, k]`` and
    ``D[i, j, k]``, that of the bond ``R[i, j, j]`` and ``D[i, j, j]``. These are the entries of a
    file for LAMMPS's ``pair_style tersoff``, which :func:`mdsens.io.read_potential` reads. LAMMPS
    takes ``A`` and ``lambda1`` of one of the two atoms, this potential the mean of the repulsion by
    [i, j] and by [j, i]: the energies are the same where these tables are symmetric.

    fC is once continuously differentiable: at R - D and at R + D the second derivatives of U jump.
    For n < 1 they even diverge where the last neighbor that takes part in zeta leaves. At zeta = 0,
    b = 1 and its derivatives are zero. The exponent of zeta is limited to +- 69.08, as in LAMMPS.

    The silicon of the source:

        {"A": 3264.7, "B": 95.373, "lambda1": 3.2394, "lambda2": 1.3258, "lambda3": 1.3258,
         "n": 22.956, "beta": 0.33675, "gamma": 1.0, "c": 4.8381, "d": 2.0417, "cos_theta0": 0.0,
         "R": 3.0, "D": 0.2}

    in eV and angstroms, with m = 3. Source: Tersoff, Phys. Rev. B 37, 6991 (1988).

    Raises:
      InputError: m is neither 1 nor 3.
    """
    return from_local(
        Tersoff(m),
        tuple(SHAPES),
        cutoffs,
        breakpoints=breakpoints,
        shapes=SHAPES,
        name="tersoff",
        positive=("n", "d", "R"),
    )


def cutoffs(params: Params) -> jax.Array:
    """Compute the cutoff of each pair of species [i, k], (S, S), the largest R + D of [i, j, k]."""
    return jnp.max(params["R"] + params["D"], axis=1)


def breakpoints(params: Params) -> tuple[jax.Array, ...]:
    """Return the distances of pairs [i, k] at which second derivatives jump, matrices (S, S).

    These are R - D and R + D of [i, j, k], for each species of j.
    """
    ends = (params["R"] - params["D"], params["R"] + params["D"])
    return tuple(end[:, j] for end in ends for j in range(end.shape[1]))


@dataclasses.dataclass(frozen=True)
class Tersoff:
    """The energy of one atom by Tersoff's potential, with the exponent m in zeta."""

    m: int = 3

    def __post_init__(self) -> None:
        if not (is_integer(self.m) and self.m in (1, 3)):
            raise InputError(f"`m` of tersoff is {short(self.m)}: give 1 or 3.")

    def __call__(
        self,
        vectors: jax.Array,
        mask: jax.Array,
        species_i: jax.Array,
        species_j: jax.Array,
        params: Params,
    ) -> jax.Array:
        """Compute half of the energy of the bonds of one atom, each with its own b_ij.

        Args:
          vectors: (K, d) from the atom to its neighbors.
          mask: (K,) False for a place without neighbor.
          species_i, species_j: () and (K,) species of the atom and its neighbors.
          params: by name, of the shapes in ``SHAPES``.
        """
        r = distances(vectors)
        of_bonds = {
            name: pair_values(params[name], species_i, species_j)
            for name, shape in SHAPES.items()
            if shape == "pair"
        }
        of_triples = {
            name: triple_values(params[name], species_i, species_j)
            for name, shape in SHAPES.items()
            if shape == "triple"
        }
        zeta = self._zeta(vectors, r, mask, of_triples)
        repulsion = of_bonds["A"] * jnp.exp(-of_bonds["lambda1"] * r)
        attraction = of_bonds["B"] * jnp.exp(-of_bonds["lambda2"] * r)
        bonds = repulsion - _bond_order(zeta, of_bonds["beta"], of_bonds["n"]) * attraction
        range_of_bond = (bond_values(params[name], species_i, species_j) for name in ("R", "D"))
        return 0.5 * jnp.sum(jnp.where(mask, _fade(r, *range_of_bond) * bonds, 0.0))

    def _zeta(self, vectors: jax.Array, r: jax.Array, mask: jax.Array, value: Params) -> jax.Array:
        """Compute zeta_ij for each neighbor j; ``value`` are the parameters of j and k, (K, K)."""
        unit = vectors / r[:, None]
        cosine = jnp.sum(unit[:, None, :] * unit[None, :, :], axis=2)
        difference = value["cos_theta0"] - cosine
        square = difference * difference
        d2 = value["d"] * value["d"]
        c2 = value["c"] * value["c"]
        # 1 + c^2 / d^2 - c^2 / (d^2 + square), without the difference of two large numbers
        angular = value["gamma"] * (1.0 + c2 * square / (d2 * (d2 + square)))
        exponent = value["lambda3"] * (r[:, None] - r[None, :])
        if self.m == 3:
            exponent = exponent * exponent * exponent
        limited = jnp.clip(exponent, -_LARGEST_EXPONENT, _LARGEST_EXPONENT)
        fade = _fade(jnp.broadcast_to(r[None, :], cosine.shape), value["R"], value["D"])
        third = mask[None, :] & ~jnp.eye(len(r), dtype=bool)
        return jnp.sum(jnp.where(third, fade * angular * jnp.exp(limited), 0.0), axis=1)


def _fade(r: jax.Array, middle: jax.Array, half_width: jax.Array) -> jax.Array:
    """Compute fC, which falls from 1 at middle - half_width to 0 at middle + half_width."""
    between = jnp.abs(r - middle) < half_width
    # (1 - sin(pi x / 2)) / 2 = sin^2(pi (1 - x) / 4), which keeps its digits near zero, x = 1
    left = jnp.where(between, middle + half_width - r, 0.0)
    # a half width of zero is allowed; where() keeps the division out of its derivative
    sine = jnp.sin(0.25 * math.pi * left / jnp.where(half_width > 0.0, half_width, 1.0))
    return jnp.where(between, sine * sine, jnp.where(r < middle, 1.0, 0.0))


def _bond_order(zeta: jax.Array, beta: jax.Array, n: jax.Array) -> jax.Array:
    """Compute b = (1 + (beta zeta)^n)^(-1 / (2 n)).

    b is 1, with derivatives of zero, where (beta zeta)^n is too small to change it: for n < 1 the
    derivative diverges at zeta = 0. By logarithms, since (beta zeta)^n may overflow.
    """
    product = beta * zeta
    positive = (product > 0.0) & (n > 0.0)
    safe_n = jnp.where(positive, n, 1.0)
    x = safe_n * jnp.log(jnp.where(positive, product, 1.0))
    counts = positive & (x > jnp.log(2.0 * safe_n * _SMALLEST_SHARE))
    order = jnp.exp(-0.5 * jax.nn.softplus(jnp.where(counts, x, 0.0)) / safe_n)
    return jnp.where(counts, order, 1.0)
