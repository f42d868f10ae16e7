"""Checks of the energy of one atom in its surroundings, for potentials made by ``from_local``.

The energy must not depend on the places of a neighbor list that hold no neighbor, it must be finite
with its derivatives where an atom has no neighbor, and it must go to zero smoothly where a neighbor
passes the cutoff.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdsens.model.system import System
from mdsens.potentials.base import Pairs
from mdsens.potentials.local import LocalPotential
from mdsens.verify._findings import Finding

__all__ = ["surroundings"]

Params = Mapping[str, Any]
# Distances at which a neighbor is placed, in cutoffs: of a bond, and of one that is nearly gone.
BOND = 0.6
WEAK = 0.9
# How far inside of the cutoff the energy is examined, in cutoffs: at two places, since what is not
# zero at the first may still go to zero. It does if it is less by this factor at the second.
INSIDE = (1e-7, 1e-9)
LESS = 0.3
# Largest energy, force and stiffness there that count as zero, in units of the energy at WEAK and
# of the cutoff: those of a potential that vanishes like the third power are 1e-15, 1e-11 and 1e-5.
ZERO = (1e-6, 1e-4, 1e-2)
NAMES = ("energy", "force", "stiffness")
# Species of which pairs are examined, at most.
KINDS = 4


class _Atom(NamedTuple):
    """One atom with three places for neighbors, in three dimensions.

    Attributes:
      energy: the energy of the atom, a function (vectors (3, 3), mask (3,), species of the atom,
        species of the neighbors (3,)).
      reach: (S, S) the cutoff of each pair of species.
    """

    energy: Callable[..., jax.Array]
    reach: np.ndarray


def surroundings(part: LocalPotential, system: System) -> Iterator[Finding]:
    """Run the checks of the energy of one atom; yield the result of each.

    Args:
      part: the potential.
      system: gives the parameters and the species.
    """
    count = max(system.species_count, 1)
    kinds = np.arange(count)
    pairs = Pairs(*(jnp.asarray(k.ravel()) for k in np.meshgrid(kinds, kinds, indexing="ij")))
    # one atom of each species, so that indices of atoms are species
    reach = part.lengths(system.params, pairs, count, jnp.asarray(kinds), count)
    atom = _Atom(
        part.atom(system.params, count),
        np.broadcast_to(np.asarray(reach, float).reshape(-1), count**2).reshape(count, count),
    )
    yield _isolated(atom, count)
    yield _empty_places(atom)
    yield _cutoff(atom, _breakpoints(part, system, pairs, count), count)


def _breakpoints(part: LocalPotential, system: System, pairs: Pairs, count: int) -> np.ndarray:
    """Return the distances where derivatives may jump, (k, S, S) for each pair of species."""
    kinds = jnp.arange(count)
    (term,) = part.crossing_terms(system.params, pairs, count, kinds, count)
    return np.asarray(term.lengths(), float).reshape(-1, count, count)


def _isolated(atom: _Atom, count: int) -> Finding:
    """Check that the energy of an atom without neighbors is finite, with two derivatives."""
    vectors = 0.5 * np.max(atom.reach) * np.eye(3)
    nobody = np.zeros(3, bool)
    finite = True
    for a in range(min(count, KINDS)):
        args = (nobody, a, np.full(3, a))
        orders = (
            atom.energy(vectors, *args),
            jax.grad(atom.energy)(vectors, *args),
            jax.hessian(atom.energy)(vectors, *args),
        )
        finite = finite and all(bool(jnp.all(jnp.isfinite(x))) for x in orders)
    if finite:
        sentence = "energy, force and stiffness of an atom without neighbors are finite."
        return Finding("isolated atom", True, sentence)
    sentence = (
        "energy, force or stiffness of an atom without neighbors is not finite; put a where()"
        " inside of roots and powers whose argument is then zero."
    )
    return Finding("isolated atom", False, sentence)


def _empty_places(atom: _Atom) -> Finding:
    """Check that the energy does not depend on places that hold no neighbor."""
    vectors = BOND * atom.reach[0, 0] * np.eye(3)
    kinds = np.zeros(3, int)
    energies = [
        float(atom.energy(jnp.asarray(vectors * scale), np.array([True, False, False]), 0, kinds))
        for scale in (np.ones((3, 1)), np.array([[1.0], [0.7], [1.1]]))
    ]
    if energies[0] == energies[1]:
        sentence = "places of the neighbor list that hold no neighbor do not count."
        return Finding("empty places", True, sentence)
    sentence = (
        "the energy depends on places of the neighbor list that hold no neighbor; multiply by"
        " jnp.where(mask, 1.0, 0.0), or put the terms in jnp.where(mask, ..., 0.0)."
    )
    return Finding("empty places", False, sentence)


def _cutoff(atom: _Atom, breakpoints: np.ndarray, count: int) -> Finding:
    """Check that the energy vanishes smoothly where a neighbor passes the cutoff.

    The atom has another neighbor besides, so that terms of three atoms count, too. The stiffness
    may jump where the cutoff is declared as a breakpoint.
    """
    kinds = range(min(count, KINDS))
    for a, b in itertools.product(kinds, kinds):
        reach = float(atom.reach[a, b])
        values = _at_cutoff(atom, reach, a, b)
        if values is None:
            continue
        declared = np.isclose(breakpoints[:, a, b], reach, rtol=1e-9).any()
        for name, value, nearer, zero in zip(NAMES, *values, ZERO, strict=True):
            # written so that NaN is bad
            vanishes = value <= zero or nearer <= LESS * value
            if not vanishes and not (name == "stiffness" and declared):
                remedy = "make it go to zero smoothly"
                if name == "stiffness":
                    remedy += ", or declare the cutoff as a breakpoint"
                sentence = (
                    f"where a neighbor passes the cutoff {reach:.6g} of species {a} and {b}, the"
                    f" {name} jumps by {nearer:.0e}, in units of the energy at {WEAK} of it;"
                    f" {remedy}."
                )
                return Finding("cutoff", False, sentence)
    return Finding("cutoff", True, "a neighbor that passes the cutoff has no energy and no force.")


def _at_cutoff(atom: _Atom, reach: float, a: int, b: int) -> list[list[float]] | None:
    """Compute energy, force and stiffness of a neighbor at two places just inside of the cutoff.

    They are in units of the neighbor's energy at 0.9 of the cutoff, and of the cutoff. The result
    is None where there is no such energy.
    """
    kinds = np.array([b, b, b])
    # at an angle of 108 degrees, with which no term is zero by symmetry
    direction = np.array([-0.3, np.sqrt(1.0 - 0.3**2), 0.0])
    first = BOND * reach * np.array([1.0, 0.0, 0.0])

    def energy(r: float | jax.Array) -> jax.Array:
        vectors = jnp.stack([jnp.asarray(first), r * jnp.asarray(direction), jnp.asarray(first)])
        with_it = atom.energy(vectors, np.array([True, True, False]), a, kinds)
        return with_it - atom.energy(vectors, np.array([True, False, False]), a, kinds)

    size = abs(float(energy(WEAK * reach)))
    if size == 0.0:
        return None
    slope = jax.grad(energy)
    ends = [reach * (1.0 - inside) for inside in INSIDE]
    orders = [(energy(r), reach * slope(r), reach**2 * jax.grad(slope)(r)) for r in ends]
    return [[abs(float(x)) / size for x in at_end] for at_end in orders]
