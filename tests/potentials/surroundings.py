"""Energies of atoms in their surroundings, summed without the engine of mdsens:
neighbors by explicit images, in numpy.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Atoms(NamedTuple):
    """A configuration; ``cell`` has the cell vectors in its columns, None for open boundaries."""

    positions: np.ndarray
    species: np.ndarray
    cell: np.ndarray | None


class Surroundings(NamedTuple):
    """Neighbors of each atom as arrays, with room to spare, so that one compiled function serves
    several configurations: n atoms in the first rows, and K places for neighbors.
    """

    positions: np.ndarray  # (n, d)
    species: np.ndarray  # (n,)
    present: np.ndarray  # (n,) False for a row without atom
    mask: np.ndarray  # (n, K)
    neighbor: np.ndarray  # (n, K)
    shift: np.ndarray  # (n, K, d) lattice vector of the image
    padding: np.ndarray  # () length of the vectors of empty places


def neighbors(atoms: Atoms, cutoff: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each atom its neighbors nearer than the cutoff, their numbers and lattice vectors."""
    d = atoms.positions.shape[1]
    shifts = np.zeros((1, d))
    if atoms.cell is not None:
        # the rows of the inverse are one over the distances of lattice planes
        spread = np.linalg.norm(np.ptp(atoms.positions, axis=0))
        reach = np.linalg.norm(np.linalg.inv(atoms.cell), axis=1) * (cutoff + spread)
        counts = [range(-int(m) - 1, int(m) + 2) for m in reach]
        shifts = np.array(list(itertools.product(*counts))) @ atoms.cell.T
    lists = []
    for place in atoms.positions:
        vectors = atoms.positions[None, :] + shifts[:, None] - place
        r = np.linalg.norm(vectors, axis=2)
        image, j = np.nonzero((r < cutoff) & (r > 0.0))
        lists.append((j, shifts[image]))
    return lists


def surroundings(atoms: Atoms, cutoff: float, rows: int = 0, places: int = 0) -> Surroundings:
    """The arrays, for at least ``rows`` atoms and ``places`` neighbors, two of them to spare."""
    lists = neighbors(atoms, cutoff)
    n, d = atoms.positions.shape
    rows = max(rows, n)
    places = max(places, 2 + max(len(j) for j, _ in lists))
    made = Surroundings(
        np.zeros((rows, d)),
        np.zeros(rows, int),
        np.arange(rows) < n,
        np.zeros((rows, places), bool),
        np.zeros((rows, places), int),
        np.zeros((rows, places, d)),
        np.asarray(cutoff / 2),
    )
    made.positions[:n] = atoms.positions
    made.species[:n] = atoms.species
    for i, (j, vectors) in enumerate(lists):
        made.mask[i, : len(j)] = True
        made.neighbor[i, : len(j)] = j
        made.shift[i, : len(j)] = vectors
    return made


def expanded(
    params: Mapping[str, Any], shapes: Mapping[str, str], count: int
) -> dict[str, jax.Array]:
    """Scalars as the matrices that an energy function takes."""
    ranks = {"pair": 2, "triple": 3}
    return {
        name: jnp.broadcast_to(jnp.asarray(value, float), (count,) * ranks[shapes[name]])
        if name in shapes
        else jnp.asarray(value)
        for name, value in params.items()
    }


def total(
    fn: Callable[..., jax.Array],
    positions: jax.Array,
    params: Mapping[str, jax.Array],
    strain: jax.Array,
    near: Surroundings,
) -> jax.Array:
    """The energy of all atoms at a strain (d, d) of all vectors between them."""
    d = positions.shape[1]
    vectors = positions[near.neighbor] + near.shift - positions[:, None]
    vectors = vectors + vectors @ strain.T
    harmless = jnp.full(d, near.padding / np.sqrt(d))
    vectors = jnp.where(near.mask[..., None], vectors, harmless)
    # atoms along the last axis, as the engine has them
    energies = jax.vmap(fn, (-1, -1, -1, -1, None), -1)(
        jnp.moveaxis(vectors, 0, -1),
        jnp.asarray(near.mask).T,
        jnp.asarray(near.species),
        jnp.asarray(near.species)[near.neighbor].T,
        params,
    )
    return jnp.sum(jnp.where(near.present, energies, 0.0))


class Result(NamedTuple):
    """Energy, forces (n, d), and the virial dU / d strain (d, d), the stress times the volume."""

    energy: float
    forces: np.ndarray
    virial: np.ndarray


@functools.partial(jax.jit, static_argnums=0)
def _slopes(fn: Any, params: Any, near: Surroundings) -> Any:
    def energy(positions: jax.Array, strain: jax.Array) -> jax.Array:
        return total(fn, positions, params, strain, near)

    d = near.positions.shape[1]
    return jax.value_and_grad(energy, (0, 1))(near.positions, jnp.zeros((d, d)))


def evaluate(
    fn: Callable[..., jax.Array],
    params: Mapping[str, jax.Array],
    cutoff: float,
    atoms: Sequence[Atoms],
) -> list[Result]:
    """Energy, forces and virial by reverse mode; parameters of the shapes that ``fn`` takes."""
    lists = [neighbors(each, cutoff) for each in atoms]
    rows = max(len(each.positions) for each in atoms)
    places = max(len(j) for each in lists for j, _ in each) + 2
    results = []
    for each in atoms:
        near = surroundings(each, cutoff, rows, places)
        energy, (slope, virial) = _slopes(fn, params, jax.tree.map(jnp.asarray, near))
        n = len(each.positions)
        results.append(Result(float(energy), -np.asarray(slope)[:n], np.asarray(virial)))
    return results


def deviation(result: Result, other: Result) -> float:
    """The largest difference of energy, forces and virial, each relative to its own size, or to one
    thousandth of the largest force where it is near zero.
    """
    worst = 0.0
    for mine, theirs in zip(result, other, strict=True):
        scale = max(float(np.abs(theirs).max()), 1e-3 * float(np.abs(other.forces).max()), 1e-3)
        worst = max(worst, float(np.abs(mine - theirs).max()) / scale)
    return worst


def configurations(species: int, spacing: float, seed: int) -> dict[str, Atoms]:
    """Random atoms of 1 to 60, open and periodic, in cells from one atom up, skewed.

    The cells are triangular, as LAMMPS wants them; ``spacing`` is about the distance of neighbors.
    """
    random = np.random.default_rng(seed)

    def kinds(n: int) -> np.ndarray:
        return np.concatenate([np.arange(min(n, species)), random.integers(species, size=n)])[:n]

    def disturbed(cells: tuple[int, int, int], amount: float) -> np.ndarray:
        grid = np.array(list(itertools.product(*map(range, cells))), float) * spacing
        return grid + amount * spacing * random.uniform(-1, 1, grid.shape)

    edges = spacing * np.array([[1.0, 0.21, -0.32], [0.0, 1.1, 0.27], [0.0, 0.0, 0.94]])
    result = {}
    for name, cells in {"one": (1, 1, 1), "two": (2, 1, 1), "eight": (2, 2, 2)}.items():
        places = disturbed(cells, 0.2)
        cell = edges * np.array(cells, float)
        fractions = places / (spacing * np.array(cells, float))
        result[f"{name} in a skewed cell"] = Atoms(fractions @ cell.T, kinds(len(places)), cell)
    places = disturbed((4, 4, 3), 0.22)
    result["48 in a box"] = Atoms(places, kinds(48), np.diag(spacing * np.array([4.0, 4.0, 3.0])))
    places = disturbed((5, 4, 3), 0.25)
    result["60 in the open"] = Atoms(places, kinds(60), None)
    result["3 in the open"] = Atoms(disturbed((3, 1, 1), 0.2), kinds(3), None)
    result["1 in the open"] = Atoms(disturbed((1, 1, 1), 0.2), kinds(1), None)
    return result
