"""The truth about a generated case, from its dense Hessian and minimizing again."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse.csgraph import connected_components
from strategies import EPS

import mdsens as ms
from mdsens._util.lattice import heights
from mdsens.mechanics.hessian import dense_hessian, max_force
from mdsens.mechanics.units import natural_units
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model import neighbors
from mdsens.model.system import box_at, pair_distances, pair_terms, potential_energy


@jax.jit
def _mixed(system: ms.System) -> dict[str, jax.Array]:
    """d2U/dR dp by parameter name, (n, d, *shape)."""

    def slope(params: Any) -> jax.Array:
        return jax.grad(lambda R: potential_energy(system, R, params))(system.positions)

    return jax.jacfwd(slope)(dict(system.params))


@jax.jit
def _box_derivative(system: ms.System) -> Any:
    return jax.jacfwd(lambda p: box_at(system, p))(dict(system.params))


@functools.partial(jax.jit, static_argnames=("observable",))
def slopes_of(observable: Any, system: ms.System) -> Any:
    def value(R: jax.Array, p: Any) -> jax.Array:
        return observable(system.replace(positions=R, params=p))

    return jax.grad(value, argnums=(0, 1))(system.positions, dict(system.params))


def true_force(system: ms.System) -> float:
    """The largest force with every pair counted, whatever the system's list says."""
    if system.neighbors.complete:
        return float(max_force(system))
    system = _repeated(system)
    return float(max_force(system.replace(neighbors=neighbors.all_pairs(system.n))))


def _repeated(system: ms.System) -> ms.System:
    """The same crystal in a cell so large that the pairs in range are those of nearest images."""
    if system.box is None:
        return system
    cell, n = np.asarray(system.box), system.n
    counts = np.ceil(2.0 * float(system.range) / heights(cell) * (1.0 + 1e-9)).astype(int)
    counts = np.maximum(counts, 1)
    if counts.max() == 1:
        return system
    copies = int(counts.prod())
    shifts = np.indices(counts).reshape(len(counts), -1).T @ cell.T
    positions = (shifts[:, None] + np.asarray(system.positions)).reshape(-1, len(cell))

    params = dict(system.params)
    species = system.species
    if species is not None:
        species = np.tile(np.asarray(species), copies)
    else:  # one value for each particle
        params = {k: np.tile(v, copies) if np.shape(v) == (n,) else v for k, v in params.items()}
    return ms.System.create(positions, cell * counts, system.potential, params, species)


def _nearest(vectors: np.ndarray, box: np.ndarray | None) -> np.ndarray:
    return vectors if box is None else vectors - np.round(vectors @ np.linalg.inv(box).T) @ box.T


def _in_one_piece(
    places: np.ndarray, joined: np.ndarray, box: np.ndarray | None
) -> tuple[np.ndarray, bool]:
    """A cluster's positions, images chosen along its bonds; whether it meets its own image."""
    whole, done, queue = places.copy(), {0}, [0]
    for i in queue:
        for j in np.flatnonzero(joined[i]):
            if int(j) not in done:
                whole[j] = whole[i] + _nearest(places[j] - places[i], box)
                done.add(int(j))
                queue.append(int(j))
    i, j = np.nonzero(joined)
    torn = np.abs(whole[i] - whole[j] - _nearest(places[i] - places[j], box))
    return whole, bool(box is not None and torn.size and torn.max() > 1e-6 * np.abs(box).max())


def _motions(places: np.ndarray, turns: bool) -> Iterator[np.ndarray]:
    """Rigid motions of some points: displacements like ``places``."""
    n, d = places.shape
    extent = np.abs(places).max() or 1.0  # of the size of a turn, in any unit
    for axis in range(d):
        yield extent * np.eye(d)[axis] * np.ones((n, 1))
    arms = places - places.mean(axis=0)
    for a in range(d if turns else 0):
        for b in range(a):
            turn = np.zeros((d, d))
            turn[a, b], turn[b, a] = 1.0, -1.0
            yield arms @ turn.T


def observable_of(door: str) -> Any:
    return getattr(ms.observables, door.removeprefix("gradient of "))


def _pair_forces(system: ms.System) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """i, j and |phi'| of all pairs of the list."""
    found = []
    for term in pair_terms(system):
        if term.i.size:
            r = pair_distances(system, term, system.positions, system.box)
            slope = jax.grad(lambda r, term=term: jnp.sum(term.energy(r)))(r)
            found.append((np.asarray(term.i), np.asarray(term.j), np.abs(np.asarray(slope))))
    return found


def strongest_pair(system: ms.System) -> float:
    """The largest force of a pair; inf where the energy is more than pairs. Of a potential that
    attracts, whose pairs may all be at rest, at least that of a pair strained by 1 %.
    """
    if not system.potential.pairwise:
        return np.inf
    length, stiffness = (float(x) for x in natural_units(system))
    least = (
        0.0
        if system.potential.repulsive
        else 0.01 * length * stiffness / 2 ** (system.dimension + 1)
    )
    return max((float(f.max(initial=0.0)) for *_, f in _pair_forces(system)), default=0.0) + least


@jax.jit
def _strained(system: ms.System) -> tuple[jax.Array, jax.Array, jax.Array]:
    """d2U/dstrain2 (d, d, d, d), d2U/dR dstrain (n, d, d, d) and the volume."""

    def energy(R: jax.Array, strain: jax.Array) -> jax.Array:
        return potential_energy(system, R, strain=0.5 * (strain + strain.T))

    place = system.positions, jnp.zeros((system.dimension, system.dimension))
    affine = jax.jacfwd(jax.grad(energy, argnums=1), argnums=1)(*place)
    mixed = jax.jacfwd(jax.grad(energy, argnums=0), argnums=1)(*place)
    return affine, mixed, system.volume


class Oracle:
    """Dense linear algebra at a minimum, on its backbone.

    Attributes:
      state: "unjammed", "saddle", "floppy" (a zero mode beyond rigid motions of clusters and
        rattlers), "marginal" (a negative eigenvalue too small to be told from zero) or "stable".
      condition: largest over smallest eigenvalue off the null space.
      null: orthonormal basis of the known null space, (n d, k).
    """

    def __init__(self, eq: ms.Equilibrium):
        self.system = eq.system
        n, d = self.n, self.d = eq.system.n, eq.system.dimension
        lin = ms.linearize(eq, throw=False)
        self.backbone, self.rattlers = lin.system, np.asarray(lin.network.rattlers)
        hessian = np.asarray(dense_hessian(self.backbone))
        self.hessian = (hessian + hessian.T) / 2
        self.box = None if eq.system.box is None else np.asarray(eq.system.box)
        self.positions = np.asarray(eq.positions)
        self.null = self._known_null_space()
        basis = (
            np.linalg.svd(self.null, full_matrices=True)[0] if self.null.shape[1] else np.eye(n * d)
        )
        self.range = basis[:, self.null.shape[1] :]
        self.values, vectors = np.linalg.eigh(self.range.T @ self.hessian @ self.range)
        self.vectors = self.range @ vectors
        everything = np.linalg.eigvalsh(self.hessian)
        self.largest = float(np.max(np.abs(everything)))
        self.zeros = int(np.sum(np.abs(everything) <= 1e-12 * self.largest))
        v = np.cos(np.arange(n * d) ** 2.0)
        theirs = np.ravel(lin.null.project(Unknowns(jnp.asarray(v.reshape(n, d)))).positions)
        self.null_space_off = float(np.linalg.norm(theirs - self.off_null(v)) / np.linalg.norm(v))
        self.state, self.condition = self._state()
        self.mixed = {
            name: np.asarray(m).reshape(n * d, -1) for name, m in _mixed(self.backbone).items()
        }
        self.extent = float(np.max(np.abs(self.positions)))
        self.doubtful = 10.0 * float(eq.max_force) / float(natural_units(eq.system)[0])
        self.carried = np.zeros(n)
        self.touching = False
        for i, j, f in _pair_forces(eq.system):
            np.maximum.at(self.carried, i, f)
            np.maximum.at(self.carried, j, f)
            weak = (
                (f > 0) & (f <= 10.0 * float(eq.max_force)) & ~(self.rattlers[i] | self.rattlers[j])
            )
            self.touching = self.touching or bool(eq.system.potential.repulsive and weak.any())

    def moduli(self) -> np.ndarray:
        """V^-1 (d2U/dstrain2 - d2U/dstrain dR H^+ d2U/dR dstrain), (d, d, d, d)."""
        affine, mixed, volume = (np.asarray(x) for x in _strained(self.backbone))
        d = self.d
        columns = mixed.reshape(self.n * d, d * d)
        relaxed = np.array([self.solve(column) for column in columns.T]).T
        return (affine - (columns.T @ relaxed).reshape(d, d, d, d)) / volume

    def _state(self) -> tuple[str, float]:
        if self.rattlers.all():
            return "unjammed", np.inf
        if not self.values.size:
            # particles that their own images press, and that no neighbor holds in place
            return "marginal", np.inf
        if self.largest == 0:
            return "floppy", np.inf
        scaled = self.values / self.largest
        if scaled.min() < -1e-10:
            return "saddle", np.inf
        if np.abs(scaled).min() <= 1e-12:
            return "floppy", np.inf
        if scaled.min() < 0:
            return "marginal", np.inf
        return "stable", 1.0 / float(scaled.min())

    def _known_null_space(self) -> np.ndarray:
        n, d = self.n, self.d
        blocks = np.linalg.norm(self.hessian.reshape(n, d, n, d).swapaxes(1, 2), axis=(2, 3))
        joined = blocks > 1e-12 * blocks.max(initial=0.0)
        pairwise = self.system.potential.pairwise
        labels = connected_components(joined)[1] if pairwise else np.zeros(n, int)
        motions = []
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            if pairwise:
                whole, wraps = _in_one_piece(
                    self.positions[members], joined[np.ix_(members, members)], self.box
                )
            else:
                whole, wraps = self.positions, self.box is not None
            for motion in _motions(whole, turns=not wraps):
                size = np.abs(motion).max()  # whose square does not underflow
                if size > 1e-9 * np.abs(whole).max():  # a point alone does not turn
                    row = np.zeros((n, d))
                    row[members] = motion / size / np.linalg.norm(motion / size)
                    motions.append(row.ravel())
        u, s, _ = np.linalg.svd(np.array(motions).T, full_matrices=False)
        known = u[:, s > 1e-6]
        if pairwise and self.system.neighbors.images is None:
            return known
        # A field may hold some of these motions, and so may a second image of a neighbor, which the
        # nearest images do not tell of: keep the combinations that cost nothing.
        cost = self.hessian @ known / max(np.linalg.norm(self.hessian, 2), 1e-300)
        _, s, vt = np.linalg.svd(cost)
        return known @ vt[s <= 1e-9].T

    def solve(self, b: np.ndarray) -> np.ndarray:
        """H^+ b, flat."""
        kept = np.abs(self.values) > 1e-12 * self.largest
        v = self.vectors[:, kept]
        return v @ ((v.T @ b.ravel()) / self.values[kept])

    def off_null(self, v: np.ndarray) -> np.ndarray:
        flat = v.ravel()
        return flat - self.null @ (self.null.T @ flat)

    def natural(self, name: str) -> float:
        """Size of d2U/dR dp where nothing cancels: what its round-off is relative to."""
        largest = float(np.max(np.abs(np.asarray(self.system.params[name])), initial=0.0))
        return self.largest * self.extent / (largest or 1.0)

    def verdict(
        self, off: np.ndarray, size: Any, noise: Any, amplified: Any
    ) -> tuple[float, float]:
        """Error and what is allowed for it, relative to ``size``.

        Allowed is 1e-7, or the round-off that the condition number amplifies, or what the residual
        that the door itself reports may amount to, whichever is most; and the round-off of a
        right-hand side whose parts cancel.
        """
        floor = 100 * EPS * float(noise)
        unit = max(float(size), 1e7 * floor, 1e-300)
        allowed = max(1e-7, 100 * EPS * self.condition) + float(amplified) / unit
        return float(np.linalg.norm(off)) / unit, allowed

    def right_hand_side(
        self, door: str, dparams: dict[str, np.ndarray], w: np.ndarray
    ) -> np.ndarray:
        """What the solve behind a door is for, flat."""
        if door == "jvp":
            return -np.sum([self.mixed[k] @ dp.ravel() for k, dp in dparams.items()], axis=0)
        return np.ravel(w if door == "vjp" else slopes_of(observable_of(door), self.system)[0])

    def attainable(self, door: str, dparams: dict[str, np.ndarray], w: np.ndarray) -> float:
        """The relative residual that no solver can be asked to go below.

        The force that is left turns with a free cluster, so that its rotations cost a little, and
        the right-hand side is known to round-off alone.
        """
        b = self.right_hand_side(door, dparams, w)
        size = np.linalg.norm(self.off_null(b))
        if size <= 1e-12 * np.linalg.norm(b):
            return np.inf
        x = np.linalg.norm(self.solve(b))
        leak = np.linalg.norm(self.hessian @ self.null, 2) if self.null.size else 0.0
        return float((leak + 16 * EPS * self.largest) * x / size)

    @property
    def softest(self) -> float:
        stiff = np.abs(self.values[np.abs(self.values) > 1e-12 * self.largest])
        return float(np.min(stiff, initial=np.inf))

    def affine(self, dparams: dict[str, np.ndarray]) -> np.ndarray:
        """(d box / dp . dp) box^-1 R."""
        if self.box is None:
            return np.zeros_like(self.positions)
        slopes = _box_derivative(self.system)
        change = sum(
            np.tensordot(np.asarray(slopes[k]), dp, np.ndim(dp)) for k, dp in dparams.items()
        )
        return self.positions @ np.linalg.inv(self.box).T @ np.asarray(change).T
