"""Checks of a potential: its pair function along r, and its energy in a small configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from mdsens._util.errors import InputError, PrecisionError
from mdsens.model.system import System
from mdsens.potentials.base import Potential, SumPotential
from mdsens.potentials.local import LocalPotential
from mdsens.verify import _configuration
from mdsens.verify._findings import Finding, PotentialTest
from mdsens.verify._pair_function import PairFunction
from mdsens.verify._surroundings import surroundings

__all__ = ["potential"]

Params = Mapping[str, Any]


def potential(
    potential: Potential,
    params: Params,
    *,
    positions: ArrayLike | None = None,
    box: ArrayLike | None = None,
    species: ArrayLike | None = None,
    between: tuple[float, float] | None = None,
    seed: int = 0,
) -> PotentialTest:
    """Check a potential: its pair function, and its energy in a small configuration.

    For a pair potential, the pair function phi(r) is examined between two distances r, for up to
    six pairs with different parameters. A breakpoint is a distance at which a derivative of the
    potential jumps or diverges. The checks are:

    - at each declared breakpoint, which derivatives jump. phi'' may jump; phi and phi' may not,
      because no minimum can exist at such a jump;
    - elsewhere none of phi, phi', phi'' and phi''' jumps. A jump is located to round-off;
    - phi and phi' vanish beyond the cutoff; if the potential is declared repulsive, phi' is nowhere
      positive;
    - phi, phi', phi'' and the derivatives of phi and phi' by every parameter are finite,
      breakpoints included.

    For the energy of an atom in its surroundings, by ``from_local``, the checks are: it is finite,
    with its derivatives, without any neighbor; it does not depend on places of the neighbor list
    that hold no neighbor; and it vanishes smoothly where a neighbor passes the cutoff. Breakpoints
    inside of the cutoff that are not declared are looked for in energies of pairs alone.

    For any potential, the checks in a configuration of a few particles are:

    - the energy is that of the pairs within the range of the potential, whichever pairs beyond the
      range are in the neighbor list;
    - forces, products of the Hessian with vectors, and derivatives of the forces by every parameter
      agree with central differences;
    - the Hessian is symmetric.

    Args:
      potential: a potential of ``ms.potentials``: from the catalogue, by ``from_pair``,
        ``from_local``, ``from_edges`` or ``from_energy``, or a sum of these.
      params: parameters by name, as for ``System.create``.
      positions: (n, d) positions of a few particles; None takes 16 or more particles near the sites
        of a square lattice at about the distance of least energy, in open boundaries. A many-body
        potential needs ``positions``, because its length scale cannot be known.
      box, species: cell and species for ``positions``, as for ``System.create``. Without positions,
        a parameter with several values is taken to have one for each species.
      between: the two distances between which phi is examined. None takes 0.2 of the distance of
        least energy and 1.2 times the cutoff; without a cutoff, 3 times the distance of least
        energy.
      seed: seed of the random configuration and directions.

    Returns:
      a :class:`PotentialTest`. Its ``good`` is True if all checks passed; ``print`` shows the
      result of each check.

    Raises:
      InputError: parameters or positions that ``System.create`` refuses. PrecisionError: single
        precision.
    """
    _check_arguments(potential, params, positions, between)
    rng = np.random.default_rng(seed)
    if positions is None:
        system = _configuration.lattice(potential, params)
    else:
        system = _configuration.system_of(potential, params, positions, box, species)
    findings, distances = _check_pair_functions(potential, system, between)
    if positions is None:
        # Only now are the distances of least energy known, which set the spacing.
        system = _configuration.spread(system, float(np.median(distances or [1.0])), rng)
    findings += _configuration.findings(system, rng)
    return PotentialTest(potential.name, tuple(findings))


def _check_arguments(
    potential: Potential,
    params: Params,
    positions: ArrayLike | None,
    between: tuple[float, float] | None,
) -> None:
    """Raise an error if the arguments of ``potential``, or the precision, do not allow a test."""
    if not hasattr(potential, "terms"):
        raise InputError(
            f"`potential` is {potential!r}: give a potential, such as ms.potentials.soft_sphere()."
        )
    if not isinstance(params, Mapping):
        raise InputError(
            f"`params` is a {type(params).__name__}: give a dict of parameter names and values."
        )
    # In single precision, central differences at the steps used here are round-off.
    if jnp.zeros(()).dtype != jnp.float64:
        raise PrecisionError("verify.potential needs double precision: call ms.enable_x64() first.")
    if between is not None and not 0 < between[0] < between[1] < math.inf:
        raise InputError(f"`between` is {between}: give two distances, 0 < low < high.")
    if positions is None and not potential.pairwise:
        raise InputError(
            f"`positions` is None and {potential.name} acts on more than pairs, so that its length"
            " scale is not known: give the positions of a small configuration."
        )


def _check_pair_functions(
    potential: Potential, system: System, between: tuple[float, float] | None
) -> tuple[list[Finding], list[float]]:
    """Run the checks of every pair function phi(r) of a potential, and of the energy of an atom.

    Args:
      potential: the potential.
      system: a small configuration, whose pairs have the parameters of phi.
      between: the two distances between which to examine phi; None for the default.

    Returns:
      the results of the checks, and the distance of least energy of each pair that was examined.
    """
    findings: list[Finding] = []
    distances: list[float] = []
    # All pairs, near or far: what is wanted of them is their parameters.
    pairs = _configuration.all_pairs(system.n)
    for part in _configuration.parts(potential):
        label = f"{part.name}: " if isinstance(potential, SumPotential) else ""
        for term in part.terms(
            system.params, pairs, system.n, system.species, system.species_count
        ):
            function = PairFunction(part, term, between)
            distances += [kind.least for kind in function.kinds]
            findings += [Finding(label + f.check, f.good, f.sentence) for f in function.findings()]
        if isinstance(part, LocalPotential):
            of_atom = surroundings(part, system)
            findings += [Finding(label + f.check, f.good, f.sentence) for f in of_atom]
    return findings, distances
