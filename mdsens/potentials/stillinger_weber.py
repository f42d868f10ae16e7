"""The potential of Stillinger and Weber: bonds, and angles that have a preferred cosine."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mdsens.potentials.local import LocalPotential, from_local
from mdsens.potentials.neighborhood import (
    Params,
    bond_values,
    distances,
    pair_values,
    vanishing_exponential,
)

__all__ = ["stillinger_weber"]

# How each parameter depends on the species: of a pair, or of a triple with its center first.
SHAPES = {
    "epsilon": "triple",
    "sigma": "pair",
    "a": "pair",
    "lambda": "triple",
    "gamma": "pair",
    "cos_theta0": "triple",
    "A": "pair",
    "B": "pair",
    "p": "pair",
    "q": "pair",
}
_OF_BONDS = tuple(name for name, shape in SHAPES.items() if shape == "pair")


def stillinger_weber() -> LocalPotential:
    """Make the potential of Stillinger and Weber, for silicon and other tetrahedral solids.

        U = sum over pairs i < j of phi2(r_ij) + sum over atoms i, neighbors j < k of phi3_ijk

        phi2(r) = A epsilon (B (sigma / r)^p - (sigma / r)^q) exp(sigma / (r - a sigma))

        phi3_ijk = lambda epsilon (cos theta - cos_theta0)^2
                   exp(gamma sigma / (r_ij - a sigma)) exp(gamma sigma / (r_ik - a sigma))

    theta is the angle at atom i between the bonds to j and k. Both functions and all of their
    derivatives vanish at the cutoff, r = a sigma, which follows the parameters.

    Parameters: ``epsilon`` an energy, ``sigma`` a length, the others numbers without unit. ``A``,
    ``B``, ``p``, ``q``, ``sigma``, ``a`` and ``gamma`` are a scalar or a matrix (S, S) of species
    pairs [i, j], where sigma, a and gamma of each exponential are those of its bond. ``epsilon``,
    ``lambda`` and ``cos_theta0`` are a scalar or (S, S, S), with the species of the center i first;
    phi2 takes ``epsilon[i, j, j]``. These are the entries of a file for LAMMPS's ``pair_style sw``,
    which :func:`mdsens.io.read_potential` reads.

    Where tables are not symmetric, a pair has the mean of phi2 by [i, j] and by [j, i], and an
    angle the mean of phi3 by [i, j, k] and by [i, k, j]. LAMMPS takes one of the two, depending on
    how it numbers and sorts atoms. The energies are the same as LAMMPS's with ``tol`` = 0 where the
    parameters of pairs, ``epsilon[i, j, j]``, ``cos_theta0[i, j, k]`` and the product of ``lambda``
    and ``epsilon`` of [i, j, k] are symmetric: so they are in LAMMPS's files, up to their rounding.

    The silicon of the source:

        {"epsilon": 2.1683, "sigma": 2.0951, "a": 1.80, "lambda": 21.0, "gamma": 1.20,
         "cos_theta0": -1 / 3, "A": 7.049556277, "B": 0.6022245584, "p": 4.0, "q": 0.0}

    in eV and angstroms. Source: Stillinger and Weber, Phys. Rev. B 31, 5262 (1985).
    """
    return from_local(
        atom_energy,
        tuple(SHAPES),
        cutoffs,
        shapes=SHAPES,
        name="stillinger_weber",
        positive=("sigma", "a"),
    )


def cutoffs(params: Params) -> jax.Array:
    """Compute the cutoff of each pair of species, a sigma, (S, S)."""
    return params["a"] * params["sigma"]


def atom_energy(
    vectors: jax.Array,
    mask: jax.Array,
    species_i: jax.Array,
    species_j: jax.Array,
    params: Params,
) -> jax.Array:
    """Compute the energy of one atom: half of its bonds, and the angles of which it is the center.

    Args:
      vectors: (K, d) from the atom to its neighbors.
      mask: (K,) False for a place without neighbor.
      species_i, species_j: () and (K,) species of the atom and its neighbors.
      params: by name, of the shapes in ``SHAPES``.
    """
    r = distances(vectors)
    value = {name: pair_values(params[name], species_i, species_j) for name in _OF_BONDS}
    gap = value["a"] * value["sigma"] - r
    weight = vanishing_exponential(value["gamma"] * value["sigma"], gap, mask)
    epsilon = bond_values(params["epsilon"], species_i, species_j)
    energy = _bonds(r, gap, mask & (gap > 0.0), {**value, "epsilon": epsilon})
    moments = _moments(vectors, r, weight, species_j, params["epsilon"].shape[0])
    return energy + _angles(moments, species_i, params)


def _bonds(r: jax.Array, gap: jax.Array, inside: jax.Array, value: Params) -> jax.Array:
    """Compute half of the sum of phi2 over the neighbors, whose distances to the cutoff are gap."""
    sigma = value["sigma"]
    # 1 where there is no bond: a parameter sigma = 0, which some files have there, has no logarithm
    logarithm = jnp.log(jnp.where(inside, sigma / r, 1.0))
    # exp(p log x) in place of x^p, since the two powers share the logarithm
    powers = value["B"] * jnp.exp(value["p"] * logarithm) - jnp.exp(value["q"] * logarithm)
    decay = vanishing_exponential(sigma, gap, inside)
    return 0.5 * jnp.sum(value["A"] * value["epsilon"] * powers * decay)


class _Moments(NamedTuple):
    """Sums over the neighbors of one species, of powers of weights g and unit vectors u.

    Attributes:
      weights: () sum of g.
      vectors: (d,) sum of g u.
      tensors: (d, d) sum of g u u.
      squares: () sum of g^2.
    """

    weights: jax.Array
    vectors: jax.Array
    tensors: jax.Array
    squares: jax.Array


def _moments(
    vectors: jax.Array, r: jax.Array, weight: jax.Array, species_j: jax.Array, count: int
) -> list[_Moments]:
    """Compute the sums of which the energy of all angles at an atom consists, by species."""
    unit = vectors / r[:, None]
    moments = []
    for species in range(count):
        g = weight if count == 1 else jnp.where(species_j == species, weight, 0.0)
        first = g[:, None] * unit
        second = jnp.sum(first[:, :, None] * unit[:, None, :], axis=0)
        moments.append(_Moments(jnp.sum(g), jnp.sum(first, axis=0), second, jnp.sum(g * g)))
    return moments


def _angles(moments: list[_Moments], species_i: jax.Array, params: Params) -> jax.Array:
    """Compute the energy of the angles at one atom, in a time linear in the neighbors.

    With cos theta = u_j . u_k, the sum over j and k of g_j g_k (cos theta - x0)^2 is that of

        (g u u)_j : (g u u)_k - 2 x0 (g u)_j . (g u)_k + x0^2 g_j g_k

    in which each product is one of sums over the neighbors. The terms with j = k, whose cosine is
    1, are then taken off: (1 - x0)^2 times the sum of g^2.
    """
    strength = (params["lambda"] * params["epsilon"])[species_i]
    cosine = params["cos_theta0"][species_i]
    energy = jnp.zeros((), strength.dtype)
    for (b, left), (c, right) in itertools.product(enumerate(moments), repeat=2):
        x0 = cosine[b, c]
        angles = jnp.sum(left.tensors * right.tensors)
        angles = angles - 2.0 * x0 * jnp.sum(left.vectors * right.vectors)
        angles = angles + x0 * x0 * left.weights * right.weights
        if b == c:
            angles = angles - (1.0 - x0) * (1.0 - x0) * left.squares
        energy = energy + 0.5 * strength[b, c] * angles
    return energy
