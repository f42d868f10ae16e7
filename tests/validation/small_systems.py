"""A small system for each potential of the catalogue: crystals out of shape, clusters, a slab.

Each has no symmetry by which its particles would stay where they are as parameters change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from literature import SILICON

import mdsens as ms

TERSOFF_SILICON = {
    "A": 3264.7,
    "B": 95.373,
    "lambda1": 3.2394,
    "lambda2": 1.3258,
    "lambda3": 1.3258,
    "n": 22.956,
    "beta": 0.33675,
    "gamma": 1.0,
    "c": 4.8381,
    "d": 2.0417,
    "cos_theta0": 0.0,
    "R": 3.0,
    "D": 0.2,
}
COPPER = {"A": 0.0855, "xi": 1.224, "p": 10.960, "q": 2.278, "r0": 3.615 / 2**0.5}
IRON = {
    "A": 1.828905,
    "d": 3.569745,
    "beta": 1.8,
    "c": 3.40,
    "c0": 1.2371147,
    "c1": -0.3592185,
    "c2": -0.0385607,
}
# Carbon (species 0) and silicon, with the mixing of Tersoff, Phys. Rev. B 39, 5566 (1989).
TERSOFF_CARBIDE = {
    "A": [[1393.6, 1597.3], [1597.3, 1830.8]],
    "B": [[346.74, 395.13], [395.13, 471.18]],
    "lambda1": [[3.4879, 2.9839], [2.9839, 2.4799]],
    "lambda2": [[2.2119, 1.97205], [1.97205, 1.7322]],
    "n": [[0.72751, 0.72751], [0.78734, 0.78734]],
    "beta": [[1.5724e-7, 1.5724e-7], [1.1e-6, 1.1e-6]],
    "gamma": 1.0,
    "lambda3": 0.0,
    "c": [[[38049.0] * 2] * 2, [[100390.0] * 2] * 2],
    "d": [[[4.3484] * 2] * 2, [[16.217] * 2] * 2],
    "cos_theta0": [[[-0.57058] * 2] * 2, [[-0.59825] * 2] * 2],
    "R": [[[1.95, 2.36]] * 2, [[2.36, 2.85]] * 2],
    "D": 0.15,
}
# Nickel (species 0), aluminum, and their pairs: Cleri and Rosato, Phys. Rev. B 48, 22 (1993).
ALUMINIDE = {
    "A": [[0.0376, 0.0563], [0.0563, 0.1221]],
    "xi": [[1.070, 1.2349], [1.2349, 1.316]],
    "p": [[16.999, 14.997], [14.997, 8.612]],
    "q": [[1.189, 1.2823], [1.2823, 2.516]],
    "r0": [[2.491, 2.5222], [2.5222, 2.864]],
}
FCC = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
DIAMOND = np.concatenate([FCC, FCC + 0.25])
BCC = np.array([[0, 0, 0], [0.5, 0.5, 0.5]])
SIZES = np.random.default_rng(8).uniform(1.0, 1.4, 16)
# A strain of some percent, by which atoms move against each other.
SHEARED = np.array([[1.02, 0.05, -0.02], [0.0, 0.99, 0.04], [0.0, 0.0, 1.01]])


@dataclasses.dataclass(frozen=True)
class Small:
    """A system at its start, before the relaxation, and the parameter to design with."""

    make: Callable[[], ms.System]
    free: str = "sigma"


def crystal(
    basis: np.ndarray, spacing: float, cells: tuple[int, int, int], shape: np.ndarray = SHEARED
) -> tuple[np.ndarray, np.ndarray]:
    """Positions and cell of a crystal out of shape, its atoms a little off their sites."""
    corners = np.stack(np.meshgrid(*map(np.arange, cells), indexing="ij"), -1).reshape(-1, 1, 3)
    sites = spacing * (corners + basis).reshape(-1, 3)
    off = 0.01 * spacing * np.random.default_rng(len(sites)).normal(size=sites.shape)
    return (sites + off) @ shape.T, shape @ np.diag(spacing * np.array(cells, float))


def discs(potential: Any, params: dict[str, Any], length: float) -> ms.System:
    """Sixteen discs of several sizes near a square lattice."""
    j, i = np.divmod(np.arange(16), 4)
    sites = (np.stack([i, j], axis=1) + 0.2 * np.random.default_rng(4).normal(size=(16, 2))) / 4
    return ms.System.create(length * sites, length, potential, params)


def soft_sphere() -> ms.System:
    params = {"sigma": SIZES, "epsilon": 1.0, "alpha": 2.5}
    return discs(ms.potentials.soft_sphere(), params, 4.2)


def harmonic_morse() -> ms.System:
    params = {"sigma": SIZES, "epsilon": 1.0, "alpha": 8.0, "stiffness": 100.0}
    return discs(ms.potentials.harmonic_morse(), params, 4.6)


def lennard_jones() -> ms.System:
    """A cluster of eight atoms of two sizes."""
    places = np.array(np.meshgrid(*[[0.0, 1.1]] * 3)).reshape(3, -1).T
    places = places + 0.1 * np.random.default_rng(1).normal(size=places.shape)
    params = {"sigma": np.where(np.arange(8) % 3, 1.0, 0.9), "epsilon": 1.0}
    return ms.System.create(places, None, ms.potentials.lennard_jones(), params)


def morse() -> ms.System:
    """Eight atoms, all of other sizes, in a cell smaller than the cutoff."""
    places, cell = crystal(FCC, 1.7, (2, 1, 1))
    params = {"sigma": SIZES[:8], "epsilon": 1.0, "alpha": 5.0}
    return ms.System.create(places, cell, ms.potentials.morse(), params)


def harmonic_bonds() -> ms.System:
    """A network under tension, whose springs differ."""
    j, i = np.divmod(np.arange(16), 4)

    def bonds(right: int, up: int) -> np.ndarray:
        return np.stack([4 * j + i, 4 * ((j + up) % 4) + (i + right) % 4], axis=1)

    pairs = np.concatenate([bonds(1, 0), bonds(0, 1), bonds(1, 1)])
    random = np.random.default_rng(5)
    stiffness = random.uniform(0.5, 2.0, len(pairs))
    params = {"stiffness": stiffness, "length": random.uniform(0.7, 1.0, len(pairs))}
    sites = np.stack([i, j], axis=1) + 0.1 * random.normal(size=(16, 2))
    return ms.System.create(sites, 4.0, ms.potentials.harmonic_bonds(pairs), params)


def stillinger_weber() -> ms.System:
    places, cell = crystal(DIAMOND, 5.431, (1, 1, 1))
    return ms.System.create(places, cell, ms.potentials.stillinger_weber(), SILICON)


def stillinger_weber_of_two() -> ms.System:
    """Zincblende with every parameter a table."""
    potential = ms.potentials.stillinger_weber()
    random = np.random.default_rng(7)
    params = {}
    for name, axes in zip(potential.names, potential.axes, strict=True):
        off = random.uniform(-0.05, 0.05, (2,) * axes)
        # tables of pairs are symmetric, those of triples in their last two indices
        off = (off + off.swapaxes(-1, -2)) / 2
        params[name] = SILICON[name] * (1.0 + off) + (0.1 * off if name == "q" else 0.0)
    places, cell = crystal(DIAMOND, 5.431, (1, 1, 1))
    return ms.System.create(places, cell, potential, params, np.arange(8) // 4)


def tersoff() -> ms.System:
    places, cell = crystal(DIAMOND, 5.432, (1, 1, 1))
    return ms.System.create(places, cell, ms.potentials.tersoff(), TERSOFF_SILICON)


def tersoff_of_two() -> ms.System:
    places, cell = crystal(DIAMOND, 4.32, (1, 1, 1))
    species = np.arange(8) // 4
    return ms.System.create(places, cell, ms.potentials.tersoff(), TERSOFF_CARBIDE, species)


def gupta() -> ms.System:
    """A slab of four layers along (100), with two atoms in each, one missing, strained."""
    places, cell = crystal(FCC, 3.615, (1, 1, 2), np.diag([1.01, 0.98, 1.0]))
    potential = ms.potentials.gupta(4.0, 5.0)
    return ms.System.create(places, cell, potential, COPPER, periodic=(True, True, False))


def gupta_of_two() -> ms.System:
    """Ni3Al with a vacancy, in a cell smaller than the cutoff."""
    places, cell = crystal(FCC, 3.57, (2, 1, 1))
    species = np.array([1, 0, 0, 0, 1, 0, 0])
    potential = ms.potentials.gupta(4.0, 5.0)
    return ms.System.create(places[:7], cell, potential, ALUMINIDE, species)


def finnis_sinclair() -> ms.System:
    """Iron with a vacancy."""
    places, cell = crystal(BCC, 2.8665, (2, 2, 2))
    return ms.System.create(places[:15], cell, ms.potentials.finnis_sinclair(), IRON)


def eam_tables() -> dict[str, np.ndarray]:
    """Smooth tables, zero from 4.5 on: where the last knots are not, the spline ends in a slope."""
    r = 0.125 * np.arange(41)
    rho = 0.5 * np.arange(25)
    fade = np.clip((4.5 - r) / 1.5, 0.0, 1.0)
    fade = fade**3 * (10.0 - 15.0 * fade + 6.0 * fade**2)
    density = np.exp(-(r - 2.5)) * fade
    pair = 3.0 * np.exp(-2.0 * (r - 2.0)) * fade
    return {
        "embedding": -np.sqrt(0.1 + rho) + 0.02 * rho**2,
        "density": density,
        "pair": pair,
    }


def eam() -> ms.System:
    places, cell = crystal(FCC, 3.7, (1, 1, 2))
    potential = ms.potentials.eam(0.5, 0.125, 5.0)
    return ms.System.create(places[:7], cell, potential, eam_tables())


REACH = 2.2


def crowded(
    vectors: jax.Array, mask: jax.Array, species_i: jax.Array, species_j: jax.Array, params: Any
) -> jax.Array:
    """Attraction to a density, and repulsion of pairs; both fade as a third power."""
    r = jnp.sqrt(jnp.sum(vectors**2, axis=-1))
    sigma = params["sigma"][species_i, species_j]
    fade = jnp.where(mask, 1.0 - r / REACH, 0.0) ** 3
    density = jnp.sum(fade * jnp.exp(-r / sigma))
    return jnp.sum(fade * (sigma / r) ** 6) - params["depth"] * density / (1.0 + density)


def from_local() -> ms.System:
    potential = ms.potentials.from_local(
        crowded, ("sigma", "depth"), REACH, breakpoints=(REACH,), shapes={"sigma": "pair"}
    )
    return _of_two_kinds(potential, {"depth": 20.0})


def interacting(edges: ms.potentials.Edges, params: Any) -> jax.Array:
    """Repulsion of pairs, and a density of each atom's surroundings that is passed on once."""
    r = jnp.sqrt(jnp.sum(edges.vectors**2, axis=-1))
    sigma = params["sigma"][edges.species[edges.i], edges.species[edges.j]]
    fade = jnp.where(edges.mask, 1.0 - r / REACH, 0.0) ** 3
    n = edges.species.shape[0]
    density = jnp.zeros(n).at[edges.i].add(fade)
    passed = jnp.zeros(n).at[edges.i].add(fade * density[edges.j])
    pairs = jnp.sum(fade * (sigma / r) ** 6)
    return pairs - params["depth"] * jnp.sum(passed / (1.0 + passed))


def from_edges() -> ms.System:
    potential = ms.potentials.from_edges(
        interacting, ("sigma", "depth"), REACH, breakpoints=(REACH,), shapes={"sigma": "pair"}
    )
    return _of_two_kinds(potential, {"depth": 5.0})


def _of_two_kinds(potential: Any, params: dict[str, Any]) -> ms.System:
    """Eight atoms of two kinds in a cell smaller than twice the cutoff."""
    places, cell = crystal(FCC, 1.55, (2, 1, 1))
    sigma = np.array([[1.0, 1.05], [1.05, 1.12]])
    species = np.array([0, 1, 1, 0, 0, 0, 1, 0])
    return ms.System.create(places, cell, potential, {**params, "sigma": sigma}, species)


def sum_of_two() -> ms.System:
    """Silicon with a weak repulsion of all pairs."""
    places, cell = crystal(DIAMOND, 5.5, (1, 1, 1))
    pairs = ms.potentials.soft_sphere().renamed(
        {"sigma": "diameter", "epsilon": "strength", "alpha": "power"}
    )
    params = {**SILICON, "diameter": np.linspace(3.0, 4.0, 8), "strength": 0.5, "power": 3.0}
    return ms.System.create(places, cell, ms.potentials.stillinger_weber() + pairs, params)


SMALL = {
    "soft_sphere": Small(soft_sphere),
    "lennard_jones": Small(lennard_jones),
    "morse": Small(morse),
    "harmonic_morse": Small(harmonic_morse),
    "harmonic_bonds": Small(harmonic_bonds, "length"),
    "stillinger_weber": Small(stillinger_weber),
    "stillinger_weber of two species": Small(stillinger_weber_of_two),
    "tersoff": Small(tersoff, "lambda2"),
    "tersoff of two species": Small(tersoff_of_two, "lambda2"),
    "gupta": Small(gupta, "r0"),
    "gupta of two species": Small(gupta_of_two, "r0"),
    "finnis_sinclair": Small(finnis_sinclair, "d"),
    "eam": Small(eam, "density"),
    "from_local": Small(from_local),
    "from_edges": Small(from_edges),
    "sum": Small(sum_of_two),
}


@cache
def minimum(name: str) -> ms.relaxation.Equilibrium:
    """The system at rest."""
    return ms.minimize(SMALL[name].make())
