"""What a potential's energy promises in a configuration: the derivatives of one scalar, whatever pairs
are listed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.lattice import nearest_image
from mdsens.mechanics.hessian import Unknowns, gradient
from mdsens.model import neighbors
from mdsens.model.system import System, pair_distances, pair_terms, potential_energy
from mdsens.potentials.base import BondedPotential, PairPotential, SumPotential
from mdsens.verify._findings import Finding

__all__ = ["all_pairs", "findings", "lattice", "parts", "spread", "system_of"]

Params = Mapping[str, Any]
ENTRIES = 8  # of a parameter of many particles that are taken, at most
PARTICLES = 16  # of a configuration made here, at least
SPACING, JITTER = (
    0.95,
    0.1,
)  # of a configuration made here: of the distance of least energy, of the spacing
STEP = 1e-5  # of central differences: of the spacing, and a tenth of it of a parameter
CLEAR = 20.0  # steps between every pair and its breakpoints, so that no difference straddles one
AGREEMENT = 1e-6  # of analytic derivatives with central differences
ROUND_OFF = 1e-10  # of what should be equal
DIRECTIONS = 4  # random ones


# ── configurations ──


def parts(potential: Any) -> tuple[Any, ...]:
    """The potentials that a potential is the sum of."""
    return potential.parts if isinstance(potential, SumPotential) else (potential,)


def lattice(potential: Any, params: Params) -> System:
    """A system on the sites of a square lattice of spacing 1, in open boundaries; several values
    are species'.
    """
    values = {name: np.asarray(value) for name, value in params.items()}
    paired = [
        p
        for potential in parts(potential)
        if isinstance(potential, PairPotential)
        for p in potential.names
        if p in values
    ]
    for name in paired:
        if not values[name].size:
            raise InputError(
                f"parameter {name} has shape {values[name].shape}: give a scalar, or one value a"
                " species."
            )
    sizes = {size for name in paired for size in values[name].shape}
    if len(sizes) > 1:
        raise InputError(
            f"the parameters have {' and '.join(map(str, sorted(sizes)))} values: give positions"
            " and species, which tell values of species from values of particles."
        )
    bonds = [
        np.asarray(part.bonds) for part in parts(potential) if isinstance(part, BondedPotential)
    ]
    n = max(PARTICLES, *(int(b.max(initial=-1)) + 1 for b in bonds), 0)
    side = math.ceil(math.sqrt(n))
    sites = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2)[:n]
    species = None
    if sizes:
        few = np.unique(np.linspace(0, max(sizes) - 1, ENTRIES).astype(int))
        species = np.arange(n) % few.size
        for name in paired:
            for axis in range(values[name].ndim):
                values[name] = np.take(values[name], few, axis=axis)
    return system_of(potential, values, sites.astype(float), None, species)


def system_of(potential: Any, params: Params, positions: Any, box: Any, species: Any) -> System:
    """``System.create`` with all its checks but one: a potential that does not end at its cutoff is here
    to be shown.
    """
    silent = [
        dataclasses.replace(p, phi=_nothing) if isinstance(p, PairPotential) else p
        for p in parts(potential)
    ]
    stand_in = SumPotential(tuple(silent)) if isinstance(potential, SumPotential) else silent[0]
    return System.create(np.asarray(positions, float), box, stand_in, params, species).replace(
        potential=potential
    )


def _nothing(r: jax.Array, *values: Any) -> jax.Array:
    return jnp.zeros_like(r)


def spread(sites: System, least: float, rng: np.random.Generator) -> System:
    """Particles near the sites, at about the distance of least energy, every pair clear of its
    breakpoints.
    """
    spacing, there = SPACING * least, sites
    for _ in range(100):
        noise = JITTER * rng.uniform(-1.0, 1.0, sites.positions.shape)
        there = sites.replace(positions=spacing * (sites.positions + noise)).reallocate()
        if _clearance(there) > CLEAR * STEP * spacing:
            break
    return there


def _clearance(system: System) -> float:
    """The distance of the nearest pair to a breakpoint of its potential."""
    gaps = [
        jnp.where(
            t.mask, jnp.abs(t.lengths() - pair_distances(t, system.positions, system.box)), jnp.inf
        )
        for t in pair_terms(system)
    ]
    return min((float(jnp.min(gap)) for gap in gaps if gap.size), default=math.inf)


def all_pairs(n: int) -> jax.Array:
    """Every pair of particles once, (2, n (n - 1) / 2)."""
    return jnp.asarray(np.stack(np.triu_indices(n, 1)), jnp.int32)


# ── checks ──

_energy = jax.jit(potential_energy)


@jax.jit
def _slope(system: System, R: jax.Array, params: Params) -> jax.Array:
    """dU/dR."""
    return gradient(system, Unknowns(R), params).positions


@jax.jit
def _push(system: System, v: jax.Array) -> jax.Array:
    """H v."""
    return jax.jvp(lambda R: _slope(system, R, system.params), (system.positions,), (v,))[1]


@jax.jit
def _pull(system: System, change: Params) -> jax.Array:
    """d2U/dR dp . change."""
    return jax.jvp(
        lambda p: _slope(system, system.positions, p), (dict(system.params),), (dict(change),)
    )[1]


def _central(f: Callable[[float], jax.Array], step: float) -> np.ndarray:
    return np.asarray((f(step) - f(-step)) / (2.0 * step))


def _share(gap: Any, *sizes: Any) -> float:
    """|gap| over the largest of the sizes; as it is where they all vanish."""
    size = max(float(np.linalg.norm(s)) for s in sizes)
    return float(np.linalg.norm(gap)) / size if size > 0 else float(np.linalg.norm(gap))


def _largest(errors: list[float]) -> float:
    """The largest error; NaN where one is, which Python's ``max`` may pass over."""
    return float(np.max(errors))


def findings(system: System, rng: np.random.Generator) -> Iterator[Finding]:
    """What the checks of the energy find in one configuration."""
    slope = _slope(system, system.positions, system.params)
    if not bool(jnp.all(jnp.isfinite(slope))) or not bool(jnp.isfinite(_energy(system))):
        yield Finding(
            "configuration",
            False,
            "its energy or forces are not finite: see above, or give positions.",
        )
        return
    if not bool(jnp.any(slope != 0)):
        yield Finding(
            "configuration",
            False,
            "no force acts, so that it shows nothing: give positions nearer by.",
        )
        return
    if system.potential.pairwise and 0 < float(system.range) < math.inf:
        yield _range(system)
    units = rng.uniform(-1.0, 1.0, (DIRECTIONS, *system.positions.shape))
    directions = [jnp.asarray(u / np.abs(u).max()) for u in units]
    pushed = [np.asarray(_push(system, v)) for v in directions]
    h = STEP * _spacing(system)
    yield _forces(system, slope, directions, h)
    yield _stiffness(system, directions, pushed, h)
    yield _symmetry(directions, pushed)
    if system.params:
        yield _parameters(system, slope, rng)


def _range(system: System) -> Finding:
    every_pair, reach = neighbors.all_pairs(system.n), float(system.range)
    rows = every_pair.rows
    vectors = nearest_image(system.positions[None] - system.positions[rows], system.box)
    near = jnp.sum(vectors**2, axis=-1) < reach**2

    def on(chosen: jax.Array) -> System:
        return system.replace(neighbors=dataclasses.replace(every_pair, rows=chosen))

    within, every = float(_energy(on(jnp.where(near, rows, system.n)))), float(_energy(on(rows)))
    terms = pair_terms(on(rows))
    size = sum(
        float(jnp.sum(jnp.abs(t.energy(pair_distances(t, system.positions, system.box)))))
        for t in terms
    )
    listed = float(_energy(system))
    share = max(abs(within - every), abs(listed - every)) / (size or 1.0)
    if share <= ROUND_OFF:
        counts = f"{int(near.sum()) // 2:,} of {near.size // 2:,} pairs"
        return Finding(
            "range",
            True,
            f"{counts} are nearer than the range {reach:.6g} and have the whole energy.",
        )
    remedy = (
        "phi must end at the cutoff for every pair, and a cutoff that follows parameters be"
        " monotone in each"
    )
    return Finding(
        "range",
        False,
        f"pairs beyond the range {reach:.6g} hold {share:.0e} of the energy; {remedy}.",
    )


def _forces(system: System, slope: jax.Array, directions: list[jax.Array], h: float) -> Finding:
    errors = []
    for v in directions:
        exact = np.asarray(slope * v)
        found = _central(lambda t, v=v: _energy(system, system.positions + t * v), h)
        errors.append(_share(float(found) - exact.sum(), exact))
    return _compared("forces", "forces and central differences of the energy", _largest(errors))


def _stiffness(
    system: System, directions: list[jax.Array], pushed: list[np.ndarray], h: float
) -> Finding:
    errors = []
    for v, exact in zip(directions, pushed, strict=True):
        found = _central(lambda t, v=v: _slope(system, system.positions + t * v, system.params), h)
        errors.append(_share(found - exact, exact, found))
    return _compared(
        "stiffness", "Hessian products and central differences of the forces", _largest(errors)
    )


def _symmetry(directions: list[jax.Array], pushed: list[np.ndarray]) -> Finding:
    errors = []
    for u, Hu, v, Hv in zip(directions, pushed, directions[1:], pushed[1:], strict=False):
        left, right = np.asarray(u) * Hv, np.asarray(v) * Hu
        errors.append(_share(left.sum() - right.sum(), left, right))
    error = _largest(errors)
    if error <= ROUND_OFF:
        return Finding("symmetry", True, f"<u, H v> and <v, H u> are equal to {error:.0e}.")
    remedy = "the force is the derivative of no energy; look for a derivative rule of its own"
    return Finding("symmetry", False, f"<u, H v> and <v, H u> differ by {error:.0e}: {remedy}.")


def _parameters(system: System, slope: jax.Array, rng: np.random.Generator) -> Finding:
    R, params, errors = system.positions, dict(system.params), {}
    for name, value in params.items():
        change = jnp.where(value != 0, value, 1.0) * rng.uniform(0.5, 1.0, value.shape)
        exact = np.asarray(_pull(system, {**jax.tree.map(jnp.zeros_like, params), name: change}))
        found = _central(
            lambda t, k=name, c=change: _slope(system, R, {**params, k: params[k] + t * c}),
            0.1 * STEP,
        )
        # against the forces as well: what does not depend on a parameter leaves round-off of theirs
        errors[name] = _share(found - exact, exact, found, 1e-3 * np.asarray(slope))
    worst = list(errors)[int(np.argmax(list(errors.values())))]  # of a NaN, too
    names = ", ".join(errors) if errors[worst] <= AGREEMENT else worst
    what = f"derivatives of the forces by {names} and their central differences"
    return _compared("parameters", what, errors[worst])


def _compared(check: str, what: str, error: float) -> Finding:
    if error <= AGREEMENT:
        return Finding(check, True, f"{what} agree to {error:.0e}.")
    remedy = (
        "look for stop_gradient, a derivative rule of its own, numpy on a traced value, or a jump"
        " nearby"
    )
    return Finding(check, False, f"{what} differ by {error:.0e}; {remedy}.")


def _spacing(system: System) -> float:
    """The median distance of nearest neighbors."""
    from scipy.spatial import KDTree

    positions = np.asarray(system.positions)
    return (
        float(np.median(KDTree(positions).query(positions, k=2)[0][:, 1])) if system.n > 1 else 1.0
    )
