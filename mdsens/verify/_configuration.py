"""Checks of a potential's energy in one configuration.

Forces, products of the Hessian with vectors, and parameter derivatives have to be derivatives of
one scalar, the energy. The energy must not depend on which pairs beyond the range of the potential
are in the neighbor list.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from mdsens._util.compilation import compiled
from mdsens._util.errors import InputError
from mdsens._util.pytree import advanced
from mdsens.mechanics.hessian import gradient
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model import neighbors
from mdsens.model.system import (
    System,
    displacement_in,
    pair_distances,
    pair_terms,
    potential_energy,
)
from mdsens.potentials.base import (
    BondedPotential,
    PairPotential,
    Pairs,
    Potential,
    SumPotential,
)
from mdsens.verify._findings import Finding

__all__ = ["all_pairs", "findings", "lattice", "parts", "spread", "system_of"]

Params = Mapping[str, Any]
# How many values of a parameter with one value a species the configuration uses at most.
ENTRIES = 8
# How many particles a configuration has at least that is made here.
PARTICLES = 16
# Lattice spacing of a configuration made here, in units of the distance of least energy, and the
# amplitude of the random displacements from its sites, in units of the spacing.
SPACING = 0.95
JITTER = 0.1
# Step of central differences: of positions in units of the spacing; of parameters, as a share of
# their values, a tenth of it.
STEP = 1e-5
# Smallest distance of a pair from its breakpoints, in steps, so that no difference straddles one.
CLEAR = 20.0
# How many random configurations are tried until all pairs are clear of their breakpoints.
TRIALS = 100
# Relative error up to which analytic derivatives and central differences agree.
AGREEMENT = 1e-6
# Relative error up to which two numbers that should be equal are.
ROUND_OFF = 1e-10
# How many random directions are tried.
DIRECTIONS = 4


# ── configurations ──


def parts(potential: Potential) -> tuple[Any, ...]:
    """Return the terms of a sum of potentials, as a tuple of potentials.

    For a potential that is no sum, the tuple contains this potential alone.
    """
    return potential.parts if isinstance(potential, SumPotential) else (potential,)


def lattice(potential: Potential, params: Params) -> System:
    """Make a system with particles on a square lattice of spacing 1, in open boundaries.

    A parameter of a pair potential with several values is taken to have one value for each species.
    """
    paired = [name for name in _list_pair_parameters(potential) if name in params]
    # other parameters stay as they are: they may be trees of arrays
    values = {**params, **{name: np.asarray(params[name]) for name in paired}}
    count = _count_species([(name, values[name]) for name in paired])
    sites = _make_sites(potential)
    species = None
    if count:
        # The configuration has few particles: of many species, some that are evenly spread.
        chosen = np.unique(np.linspace(0, count - 1, ENTRIES).astype(int))
        species = np.arange(len(sites)) % chosen.size
        for name in paired:
            for axis in range(values[name].ndim):
                values[name] = np.take(values[name], chosen, axis=axis)
    return system_of(potential, values, sites, None, species)


def _list_pair_parameters(potential: Potential) -> list[str]:
    """Return the names of the parameters of all pair potentials of which a potential consists."""
    pairs = [part for part in parts(potential) if isinstance(part, PairPotential)]
    return [name for part in pairs for name in part.names]


def _count_species(values: list[tuple[str, np.ndarray]]) -> int:
    """Return the number of species: the length of every axis of every parameter that is no scalar.

    The result is 0 if all parameters are scalars.

    Args:
      values: (name, value) of each parameter.

    Raises:
      InputError: the parameters have different numbers of values, or one has none.
    """
    for name, value in values:
        if not value.size:
            raise InputError(
                f"parameter `{name}` has shape {value.shape}: give a scalar, or one value for each"
                " species."
            )
    sizes = {size for _, value in values for size in value.shape}
    if len(sizes) > 1:
        raise InputError(
            f"the parameters have {' and '.join(map(str, sorted(sizes)))} values, so that the"
            " number of species is not known: give `positions` and `species`."
        )
    return max(sizes, default=0)


def _make_sites(potential: Potential) -> np.ndarray:
    """Return the n sites (n, 2) of a square lattice of spacing 1, at which to place particles.

    n is 16, or more if the bonds of the potential name more particles.
    """
    bonds = [
        np.asarray(part.bonds) for part in parts(potential) if isinstance(part, BondedPotential)
    ]
    # initial=-1: a list of no bonds needs no particle. The 0 at the end: without potentials of
    # bonds, max() would get one number alone, which it takes for a sequence and refuses.
    n = max(PARTICLES, *(int(b.max(initial=-1)) + 1 for b in bonds), 0)
    side = math.ceil(math.sqrt(n))
    sites = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2)[:n]
    return sites.astype(float)


def system_of(
    potential: Potential,
    params: Params,
    positions: ArrayLike,
    box: ArrayLike | None,
    species: ArrayLike | None,
) -> System:
    """Make a System from potential, parameters and positions; do not check the potential's cutoff.

    ``System.create`` would refuse a potential that is not zero at its cutoff. ``verify.potential``
    reports such a potential as the result of a check instead.
    """
    zeroed = [
        dataclasses.replace(part, phi=_zero) if isinstance(part, PairPotential) else part
        for part in parts(potential)
    ]
    stand_in = SumPotential(tuple(zeroed)) if isinstance(potential, SumPotential) else zeroed[0]
    system = System.create(np.asarray(positions, float), box, stand_in, params, species)
    return system.replace(potential=potential)


def _zero(r: jax.Array, *values: Any) -> jax.Array:
    """Return the energy 0 for every pair distance r; stands in for the energy of a potential."""
    return jnp.zeros_like(r)


def spread(sites: System, least: float, rng: np.random.Generator) -> System:
    """Move particles to random positions near lattice sites, at about the distance of least energy.

    Positions are drawn until no pair distance is close to a breakpoint, a distance at which a
    derivative of the potential jumps or diverges. After 100 trials the last positions are taken.

    Args:
      sites: the system from :func:`lattice`, on a square lattice of spacing 1.
      least: the distance of least pair energy.
      rng: random generator for the displacements from the sites.
    """
    spacing = SPACING * least
    moved = sites
    for _ in range(TRIALS):
        noise = JITTER * rng.uniform(-1.0, 1.0, sites.positions.shape)
        # The neighbor list of the sites is for a spacing of 1 and must not be kept.
        moved = sites.replace(positions=spacing * (sites.positions + noise)).reallocate()
        if _clearance(moved) > CLEAR * STEP * spacing:
            break
    return moved


def _clearance(system: System) -> float:
    """Compute the smallest difference |r - b| of a pair distance r and a breakpoint b of its pair.

    A breakpoint is a distance at which a derivative of the potential jumps or diverges. The result
    is infinite for a potential without breakpoints.
    """
    gaps = []
    for term in pair_terms(system):
        distances = pair_distances(system, term, system.positions, system.box)
        gaps.append(jnp.where(term.mask, jnp.abs(term.lengths() - distances), jnp.inf))
    # Without breakpoints a gap has the shape (0, pairs), and jnp.min fails for an empty array.
    return min((float(jnp.min(gap)) for gap in gaps if gap.size), default=math.inf)


def all_pairs(n: int) -> Pairs:
    """Return the indices (n (n - 1) / 2,) of both particles of every pair of n particles."""
    return Pairs(*jnp.asarray(np.stack(np.triu_indices(n, 1)), jnp.int32))


# ── checks ──

_energy = compiled(potential_energy)


@compiled
def _energy_slope(system: System, R: jax.Array, params: Params) -> jax.Array:
    """Compute the gradient dU/dR (n, d) of the energy U at the positions R (n, d)."""
    return gradient(system, Unknowns(R), params).positions


@compiled
def _hessian_product(system: System, v: jax.Array) -> jax.Array:
    """Compute the product H v (n, d) of the Hessian H of the energy with displacements v (n, d)."""
    return jax.jvp(lambda R: _energy_slope(system, R, system.params), (system.positions,), (v,))[1]


@compiled
def _slope_by_parameters(system: System, change: Params) -> jax.Array:
    """Compute the derivative (n, d) of the energy gradient dU/dR along a change of parameters.

    The derivative is d2U/dR dp . dp, with the energy U, the positions R and the change dp of the
    parameters p.
    """
    return jax.jvp(
        lambda p: _energy_slope(system, system.positions, p),
        (dict(system.params),),
        (dict(change),),
    )[1]


def _central_difference(f: Callable[[float], jax.Array], step: float) -> np.ndarray:
    """Compute the central difference (f(step) - f(-step)) / (2 step) of a function f."""
    return np.asarray((f(step) - f(-step)) / (2.0 * step))


def _relative_norm(difference: ArrayLike, *references: ArrayLike) -> float:
    """Divide the norm of a difference by the largest norm of the reference arrays.

    If all reference arrays are zero, the norm of the difference is not divided.
    """
    size = max(float(np.linalg.norm(reference)) for reference in references)
    norm = float(np.linalg.norm(difference))
    return norm / size if size > 0 else norm


def _largest(errors: list[float]) -> float:
    """Return the largest of several errors, or NaN if one is NaN (which ``max`` may pass over)."""
    return float(np.max(errors))


def findings(system: System, rng: np.random.Generator) -> Iterator[Finding]:
    """Run every check of a potential's energy in one configuration; yield the result of each."""
    slope = _energy_slope(system, system.positions, system.params)
    if not bool(jnp.all(jnp.isfinite(slope))) or not bool(jnp.isfinite(_energy(system))):
        sentence = "its energy or forces are not finite: see above, or give positions."
        yield Finding("configuration", False, sentence)
        return
    if not bool(jnp.any(slope != 0)):
        sentence = "no force acts, so that it shows nothing: give positions nearer by."
        yield Finding("configuration", False, sentence)
        return
    # The range is 0 for bonds alone, which are in no neighbor list, and inf without a cutoff,
    # where no pair is beyond the range.
    has_all_pairs = system.potential.pairwise and system.neighbors.images is None
    if has_all_pairs and 0 < float(system.range) < math.inf:
        yield _range(system)
    units = rng.uniform(-1.0, 1.0, (DIRECTIONS, *system.positions.shape))
    directions = [jnp.asarray(u / np.abs(u).max()) for u in units]
    products = [np.asarray(_hessian_product(system, v)) for v in directions]
    h = STEP * _spacing(system)
    yield _forces(system, slope, directions, h)
    yield _stiffness(system, directions, products, h)
    yield _symmetry(directions, products)
    if system.params:
        yield _parameters(system, slope, rng)


def _range(system: System) -> Finding:
    """Check that the energy of all pairs is that of the pairs within the range of the potential.

    The energy of the pairs in the system's own neighbor list must be the same, too.
    """
    every_pair = neighbors.all_pairs(system.n, periodic=system.periodic)
    reach = float(system.range)
    # Shape (n - 1, n): column i holds the neighbors of particle i.
    rows = every_pair.rows
    displacement = displacement_in(system, system.box)
    vectors = displacement(system.positions[None], system.positions[rows])
    near = jnp.sum(vectors**2, axis=-1) < reach**2

    def with_rows(chosen: jax.Array) -> System:
        return system.replace(neighbors=dataclasses.replace(every_pair, rows=chosen))

    # The index n is padding: it takes the pairs beyond the range out of the list.
    within = float(_energy(with_rows(jnp.where(near, rows, system.n))))
    every = float(_energy(with_rows(rows)))
    listed = float(_energy(system))
    # The sum of absolute values: pair energies of both signs may cancel in the energy itself.
    size = sum(
        float(jnp.sum(jnp.abs(t.energy(pair_distances(system, t, system.positions, system.box)))))
        for t in pair_terms(with_rows(rows))
    )
    share = max(abs(within - every), abs(listed - every)) / (size or 1.0)
    if share <= ROUND_OFF:
        # Rows have every pair twice.
        counts = f"{int(near.sum()) // 2:,} of {near.size // 2:,} pairs"
        sentence = f"{counts} are nearer than the range {reach:.6g} and have the whole energy."
        return Finding("range", True, sentence)
    remedy = (
        "phi must end at the cutoff for every pair, and a cutoff that follows parameters be"
        " monotone in each"
    )
    sentence = f"pairs beyond the range {reach:.6g} hold {share:.0e} of the energy; {remedy}."
    return Finding("range", False, sentence)


def _forces(system: System, slope: jax.Array, directions: list[jax.Array], h: float) -> Finding:
    """Compare the forces with central differences of the energy along several directions.

    Args:
      system: the configuration.
      slope: (n, d) the gradient of the energy, which is the negative of the forces.
      directions: displacements (n, d).
      h: the step of the differences.
    """
    errors = []
    for v in directions:
        exact = np.asarray(slope * v)
        difference = _central_difference(
            lambda t, v=v: _energy(system, system.positions + t * v), h
        )
        # Relative to the norm of the terms, because their sum may be near zero.
        errors.append(_relative_norm(float(difference) - exact.sum(), exact))
    return _compared("forces", "forces and central differences of the energy", _largest(errors))


def _stiffness(
    system: System, directions: list[jax.Array], products: list[np.ndarray], h: float
) -> Finding:
    """Compare products of the Hessian with central differences of the forces.

    Args:
      system: the configuration.
      directions: displacements v (n, d).
      products: H v for each displacement, with the Hessian H.
      h: the step of the differences.
    """
    errors = []
    for v, exact in zip(directions, products, strict=True):
        difference = _central_difference(
            lambda t, v=v: _energy_slope(system, system.positions + t * v, system.params), h
        )
        errors.append(_relative_norm(difference - exact, exact, difference))
    return _compared(
        "stiffness", "Hessian products and central differences of the forces", _largest(errors)
    )


def _symmetry(directions: list[jax.Array], products: list[np.ndarray]) -> Finding:
    """Check that the Hessian H is symmetric: <u, H v> = <v, H u> for pairs of displacements u, v.

    Args:
      directions: displacements (n, d); each is paired with the next.
      products: the product of H with each displacement.
    """
    errors = []
    for u, Hu, v, Hv in zip(directions, products, directions[1:], products[1:], strict=False):
        left = np.asarray(u) * Hv
        right = np.asarray(v) * Hu
        errors.append(_relative_norm(left.sum() - right.sum(), left, right))
    error = _largest(errors)
    if error <= ROUND_OFF:
        return Finding("symmetry", True, f"<u, H v> and <v, H u> are equal to {error:.0e}.")
    remedy = "the force is the derivative of no energy; look for a derivative rule of its own"
    return Finding("symmetry", False, f"<u, H v> and <v, H u> differ by {error:.0e}: {remedy}.")


def _parameters(system: System, slope: jax.Array, rng: np.random.Generator) -> Finding:
    """Compare derivatives of the forces by each parameter with central differences of the forces.

    ``slope`` is the gradient of the energy, (n, d).
    """
    R = system.positions
    params = dict(system.params)
    errors = {}
    for name, value in params.items():
        change = jax.tree.map(
            lambda v: jnp.where(v != 0, v, 1.0) * rng.uniform(0.5, 1.0, v.shape), value
        )
        alone = {**jax.tree.map(jnp.zeros_like, params), name: change}
        exact = np.asarray(_slope_by_parameters(system, alone))
        difference = _central_difference(
            lambda t, k=name, c=change: _energy_slope(
                system, R, {**params, k: advanced(params[k], c, t)}
            ),
            0.1 * STEP,
        )
        # Relative to the forces as well: where they do not depend on the parameter, the difference
        # is their round-off.
        errors[name] = _relative_norm(
            difference - exact, exact, difference, 1e-3 * np.asarray(slope)
        )
    worst = list(errors)[int(np.argmax(list(errors.values())))]  # argmax finds a NaN, max may not
    names = ", ".join(errors) if errors[worst] <= AGREEMENT else worst
    what = f"derivatives of the forces by {names} and their central differences"
    return _compared("parameters", what, errors[worst])


def _compared(check: str, what: str, error: float) -> Finding:
    """Return the result of a check that compares derivatives with central differences.

    Args:
      check: name of the check.
      what: the quantities compared, in words.
      error: their relative difference; the check is passed up to 1e-6.
    """
    if error <= AGREEMENT:
        return Finding(check, True, f"{what} agree to {error:.0e}.")
    remedy = (
        "look for stop_gradient, a derivative rule of its own, numpy on a traced value, or a jump"
        " nearby"
    )
    return Finding(check, False, f"{what} differ by {error:.0e}; {remedy}.")


def _spacing(system: System) -> float:
    """Compute the median distance of particles from their nearest neighbors.

    Periodic images count as neighbors. The result is 1 for a single particle.
    """
    # Imported here, so that importing this package does not import scipy.spatial.
    from scipy.spatial import KDTree

    if system.n < 2:
        return 1.0
    positions = np.asarray(system.positions)
    if system.box is not None:
        apart = displacement_in(system, system.box)(positions[:, None], positions[None])
        lengths = np.linalg.norm(np.asarray(apart), axis=-1)
        return float(np.median(np.partition(lengths, 1, axis=1)[:, 1]))  # the least is its own, 0
    distances, _ = KDTree(positions).query(positions, k=2)  # the nearest is the particle itself
    return float(np.median(distances[:, 1]))
