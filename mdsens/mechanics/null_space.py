"""Directions that cost no energy, known beforehand: rattlers, rigid motions of clusters, and what
constraints hold.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.portable import Portable
from mdsens.mechanics.unknowns import Unknowns

__all__ = ["NullSpace", "left_motions", "orthonormal", "pseudo_inverse", "turned"]

ROD = 1e-9  # moment of inertia about an axis, of those across it, that counts as none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NullSpace(Portable):
    """The directions that cost no energy to second order, known beforehand.

    Rattlers, translations of each cluster, rotations of each one that does not meet its own image.
    Where the energy is more than pairs, of the translations and rotations of everything those
    combinations that the Hessian finds free: an external field may hold the others.

    Attributes:
      rattlers: (n,).
      labels: (n,) cluster of each particle; None where all that are no rattlers are one cluster,
        which cannot turn.
      counts: (n,) particles in the cluster of that label, at least 1; of the one cluster, a number.
      arms: (n, d) positions from their cluster's centroid, zero where it cannot turn; None where
        none can.
      inverse_inertia: (n, k, k) pseudo-inverse of each label's inertia, k = 1 in 2-D and 3 in 3-D;
        None likewise.
      motions: (k, n, d) orthonormal motions, or zeros, in place of those of clusters; None where
        the potential is of pairs.
      active_set: True where constraints fix a coordinate, of positions, relaxed parameters and, for equations
        that bind rattlers alone, multipliers; None without constraints.
    """

    rattlers: jax.Array
    labels: jax.Array | None
    counts: jax.Array
    arms: jax.Array | None = None
    inverse_inertia: jax.Array | None = None
    motions: jax.Array | None = None
    active_set: Unknowns | None = None

    def free(self, x: Unknowns) -> Unknowns:
        """``x`` with zeros where constraints hold."""
        if self.active_set is None:
            return x

        def some(part: Any, fixed: Any) -> Any:
            return (
                part
                if part is None
                else jax.tree.map(lambda leaf, mask: jnp.where(mask, 0.0, leaf), part, fixed)
            )

        h = self.active_set
        return dataclasses.replace(
            x,
            positions=jnp.where(h.positions, 0.0, x.positions),
            multipliers=some(x.multipliers, h.multipliers),
            params=some(x.params, h.params),
        )

    def project(self, x: Unknowns) -> Unknowns:
        """The part of ``x`` off the null space: an orthogonal projection."""
        x = self.free(x)
        if self.labels is None:
            return dataclasses.replace(x, positions=self._centered(x.positions, jnp))
        v = jnp.where(self.rattlers[:, None], 0.0, x.positions)
        if self.motions is not None:
            shares = jnp.sum(self.motions * v, axis=(1, 2))
            return dataclasses.replace(x, positions=v - jnp.tensordot(shares, self.motions, axes=1))
        mean = self._total(v) / self.counts[:, None]
        v = v - mean[self.labels]
        if self.arms is not None and self.inverse_inertia is not None:
            angular = self._total(_cross(self.arms, v))
            turn = jnp.einsum("nij,nj->ni", self.inverse_inertia, angular)[self.labels]
            v = v - turned(turn, self.arms)
        v = jnp.where(self.rattlers[:, None], 0.0, v)
        return dataclasses.replace(x, positions=v)

    def project_columns(self, columns: np.ndarray) -> np.ndarray:
        """The same of each column of (n d, c); of a batch, whose members' columns stand below each
        other. Host code.
        """
        if self.labels is not None:
            return np.asarray(_projections(self, columns))
        return self._centered(columns.reshape(*self.rattlers.shape, -1), np).reshape(columns.shape)

    def _centered(self, v: Any, xp: Any) -> Any:
        """v (…, n, k) off a translation of what is no rattler, where that is one cluster."""
        loose = xp.asarray(self.rattlers)[..., None]
        held = xp.where(loose, 0.0, v)
        mean = xp.sum(held, axis=-2, keepdims=True) / xp.asarray(self.counts)[..., None, None]
        return xp.where(loose, 0.0, held - mean)

    def dimensions(self, d: int) -> tuple[int, int, int]:
        """How many directions in d dimensions are of rattlers, are translations, are rotations.
        Host code.
        """
        loose = np.asarray(self.rattlers)
        free = d * int(loose.sum())
        if self.labels is None:
            return free, d, 0
        if self.motions is not None:
            rows = np.asarray(self.motions)
            total = round(float(np.sum(rows**2)))
            along = np.linalg.svd(rows.sum(axis=1) / np.sqrt(rows.shape[1]), compute_uv=False)
            translations = int(np.sum(along > 1 - 1e-6))
            return free, translations, total - translations
        clusters, rotations = np.unique(np.asarray(self.labels)[~loose]), 0
        if self.inverse_inertia is not None:
            rotations = int(
                np.linalg.matrix_rank(
                    np.asarray(self.inverse_inertia)[clusters], hermitian=True
                ).sum()
            )
        return free, d * clusters.size, rotations

    def simplified(self) -> NullSpace:
        """The same without arms where nothing can turn, without labels where there is one cluster.
        Host code.

        It spares every projection their work. A batch is simplified as far as each of its members
        can be.
        """
        if self.active_set is not None or (
            self.inverse_inertia is not None and np.any(np.asarray(self.inverse_inertia))
        ):
            return self
        if self.motions is not None or self.labels is None:
            return self
        plain = dataclasses.replace(self, arms=None, inverse_inertia=None)
        loose, labels = np.asarray(self.rattlers), np.asarray(self.labels)
        held = np.argmin(loose, axis=-1)[
            ..., None
        ]  # one that is no rattler, or rattlers are all there are
        label = np.take_along_axis(labels, held, axis=-1)
        if np.any(np.where(loose, loose.all(axis=-1, keepdims=True), labels != label)):
            return plain
        counts = np.take_along_axis(np.asarray(self.counts), label, axis=-1)[..., 0]
        return dataclasses.replace(plain, labels=None, counts=counts)

    def _total(self, v: jax.Array) -> jax.Array:
        return jnp.zeros_like(v).at[self.labels].add(v)


@jax.jit
def _projections(null: NullSpace, columns: Any) -> jax.Array:
    def of_member(null: NullSpace, columns: jax.Array) -> jax.Array:
        def one(v: jax.Array) -> jax.Array:
            return null.project(Unknowns(v.reshape(null.rattlers.shape[0], -1))).positions.ravel()

        return jax.lax.map(one, columns.T, batch_size=min(32, columns.shape[1])).T

    if null.rattlers.ndim == 1:
        return of_member(null, columns)
    members = null.rattlers.shape[0]
    return jax.vmap(of_member)(null, columns.reshape(members, -1, columns.shape[1])).reshape(
        columns.shape
    )


def _cross(arms: jax.Array, v: jax.Array) -> jax.Array:
    """Moment of v about the centroid, (n, 1) in 2-D and (n, 3) in 3-D."""
    if arms.shape[1] == 2:
        return (arms[:, 0] * v[:, 1] - arms[:, 1] * v[:, 0])[:, None]
    return jnp.cross(arms, v)


def turned(turn: jax.Array, arms: jax.Array) -> jax.Array:
    """Displacement of a rotation about the centroid."""
    if arms.shape[1] == 2:
        return turn * jnp.stack([-arms[:, 1], arms[:, 0]], axis=1)
    return jnp.cross(turn, arms)


def pseudo_inverse(inertia: jax.Array) -> jax.Array:
    """Of moments of inertia, (n, 1, 1) or (n, 3, 3): of everything, a rod (which has two equal
    moments) and nothing.

    Written out: XLA on a CPU may wait for ever where two threads have LAPACK factorize batches of
      matrices.
    """
    if inertia.shape[1] == 1:
        return jnp.where(inertia > 0, 1.0 / jnp.where(inertia > 0, inertia, 1.0), 0.0)
    mean = 0.5 * jnp.trace(inertia, axis1=1, axis2=2)  # either moment of a rod
    scaled = inertia / jnp.where(mean > 0, mean, 1.0)[:, None, None]
    faces = jnp.stack(
        [jnp.cross(scaled[:, (k + 1) % 3], scaled[:, (k + 2) % 3]) for k in range(3)], axis=1
    )
    volume = jnp.sum(faces[:, 0] * scaled[:, 0], axis=1)[:, None, None]
    solid = volume > ROD
    inverse = jnp.where(solid, faces / jnp.where(solid, volume, 1.0), scaled)
    return inverse / jnp.where(mean > 0, mean, 1.0)[:, None, None]


def orthonormal(rows: jax.Array, floor: float) -> jax.Array:
    """Orthonormal rows with the same span; zeros for what is below ``floor`` of the largest
    singular value.
    """
    _, sizes, kept = jnp.linalg.svd(rows, full_matrices=False)
    return jnp.where((sizes > floor * sizes[0])[:, None], kept, 0.0)


def left_motions(
    x: np.ndarray, wraps: bool, stuck: np.ndarray, some: np.ndarray, n: int
) -> list[np.ndarray]:
    """Orthonormal rigid motions (n, d) of some particles that leave their held coordinates where
    they are.
    """
    count, d = x.shape
    basis = [np.broadcast_to(np.eye(d)[k], (count, d)) for k in range(d)]
    if not wraps:
        arms = x - x.mean(axis=0)
        size = np.sqrt(np.mean(arms**2)) or 1.0
        for a, b in [(0, 1), (1, 2), (0, 2)][: 1 if d == 2 else 3]:
            turn = np.zeros((count, d))
            turn[:, a], turn[:, b] = -arms[:, b] / size, arms[:, a] / size
            basis.append(turn)
    rows = np.array([b.ravel() for b in basis])
    _, sizes, rows = np.linalg.svd(rows, full_matrices=False)
    rows = rows[sizes > 1e-9 * sizes[0]]
    at_stuck = rows[:, stuck.ravel()]
    if at_stuck.shape[1]:
        # the combinations that vanish there: null vectors of a small matrix
        values, vectors = np.linalg.eigh(at_stuck @ at_stuck.T)
        rows = vectors[:, values < 1e-12].T @ rows
    found = []
    for row in rows:
        motion = np.zeros((n, d))
        motion[some] = row.reshape(count, d)
        found.append(motion)
    return found
