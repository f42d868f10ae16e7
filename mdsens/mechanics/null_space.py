"""This module projects out the null space of the Hessian, as far as it is known beforehand.

Displacements of rattlers and rigid motions of clusters cost no energy to second order. Coordinates
that constraints fix are removed by the same projection.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.compilation import compiled
from mdsens._util.portable import Portable
from mdsens._util.precision import full_precision
from mdsens.mechanics.unknowns import Unknowns

__all__ = ["NullSpace", "left_motions", "orthonormal", "pseudo_inverse", "turned"]

# Moment of inertia about its axis below which a cluster counts as a rod, in units of the moment
# across the axis. It is the determinant of the inertia tensor in these units.
ROD = 1e-9


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NullSpace(Portable):
    """Directions that cost no energy to second order, and are known without solving for them.

    For a potential of pairs these are the displacements of rattlers, the translations of each
    cluster, and the rotations of each cluster that is not connected to its periodic image. Where
    the energy is not a sum over pairs, they are the combinations of translations and rotations of
    the whole system that have no stiffness in the Hessian: an external field may give other motions
    a stiffness. There are n particles in d dimensions.

    Attributes:
      rattlers: (n,) True for rattlers.
      labels: (n,) cluster of each particle, as an index; None where all particles but rattlers are
        one cluster that cannot rotate.
      counts: (n,) entry c is the number of particles in the cluster with label c, or 1 where there
        is no such cluster; a single number where ``labels`` is None.
      arms: (n, d) positions relative to the centroid of the cluster, zero where the cluster cannot
        rotate; None where no cluster can.
      inverse_inertia: (n, k, k) entry c is the pseudo-inverse of the inertia tensor of the cluster
        with label c, k = 1 in 2-D and 3 in 3-D; None where no cluster can rotate.
      motions: (k, n, d) orthonormal motions or zeros, which replace the motions of clusters where
        the energy is not a sum over pairs, or where there are constraints; else None.
      active_set: masks of the unknowns that cannot change: True for coordinates and relaxed
        parameters that constraints fix, and for the multiplier of a rigid bond to a rattler; None
        without constraints.
    """

    rattlers: jax.Array
    labels: jax.Array | None
    counts: jax.Array
    arms: jax.Array | None = None
    inverse_inertia: jax.Array | None = None
    motions: jax.Array | None = None
    active_set: Unknowns | None = None

    def free(self, x: Unknowns) -> Unknowns:
        """Replace the coordinates that constraints fix by zeros in ``x``.

        Args:
          x: a vector of displacements, with changes of relaxed parameters and of multipliers where
            there are any.
        """
        if self.active_set is None:
            return x

        def zero_fixed(
            part: dict[str, jax.Array] | None, fixed: dict[str, jax.Array] | None
        ) -> Any:
            if part is None:
                return None
            return jax.tree.map(lambda leaf, mask: jnp.where(mask, 0.0, leaf), part, fixed)

        fixed = self.active_set
        return dataclasses.replace(
            x,
            positions=jnp.where(fixed.positions, 0.0, x.positions),
            multipliers=zero_fixed(x.multipliers, fixed.multipliers),
            params=zero_fixed(x.params, fixed.params),
        )

    @full_precision
    def project(self, x: Unknowns) -> Unknowns:
        """Project the null space of the Hessian out of ``x``, orthogonally.

        Args:
          x: a vector of displacements, with changes of relaxed parameters and of multipliers where
            there are any.
        """
        x = self.free(x)
        if self.labels is None:
            return dataclasses.replace(x, positions=self._centered(x.positions, jnp))
        v = jnp.where(self.rattlers[:, None], 0.0, x.positions)
        if self.motions is not None:
            shares = jnp.sum(self.motions * v, axis=(1, 2))
            return dataclasses.replace(x, positions=v - jnp.tensordot(shares, self.motions, axes=1))
        mean = self.cluster_total(v) / self.counts[:, None]
        v = v - mean[self.labels]
        if self.arms is not None and self.inverse_inertia is not None:
            # The best rigid rotation of each cluster: its angular momentum by its inertia.
            angular_momentum = self.cluster_total(_cross(self.arms, v))
            angle = jnp.einsum("nij,nj->ni", self.inverse_inertia, angular_momentum)[self.labels]
            v = v - turned(angle, self.arms)
        v = jnp.where(self.rattlers[:, None], 0.0, v)
        return dataclasses.replace(x, positions=v)

    def project_columns(self, columns: np.ndarray) -> np.ndarray:
        """Project the null space of the Hessian out of each of the c columns of a matrix (n d, c).

        The matrix is an array of numpy. For a batch, the rows of its systems stand one after the
        other, (systems n d, c).
        """
        if self.labels is not None:
            return np.asarray(_projections(self, columns))
        return self._centered(columns.reshape(*self.rattlers.shape, -1), np).reshape(columns.shape)

    def _centered(self, v: np.ndarray | jax.Array, xp: ModuleType) -> Any:
        """Subtract from displacements v their mean over the particles that are no rattlers.

        The result is zero for rattlers. This projects out the null space where all other particles
        are one cluster that cannot rotate.

        Args:
          v: (…, n, k) the displacements, of n particles.
          xp: numpy, or jax.numpy, according to the type of v.
        """
        rattlers = xp.asarray(self.rattlers)[..., None]
        v = xp.where(rattlers, 0.0, v)
        mean = xp.sum(v, axis=-2, keepdims=True) / xp.asarray(self.counts)[..., None, None]
        return xp.where(rattlers, 0.0, v - mean)

    def dimensions(self, d: int) -> tuple[int, int, int]:
        """Count the directions without stiffness: of rattlers, of translations and of rotations.

        The function does not work inside ``jax.jit``.

        Args:
          d: dimension of space.
        """
        rattlers = np.asarray(self.rattlers)
        free = d * int(rattlers.sum())
        if self.labels is None:
            return free, d, 0
        if self.motions is not None:
            rows = np.asarray(self.motions)
            total = round(float(np.sum(rows**2)))  # rows are of norm one or zero
            # Cosines of the angles between the span of the motions and that of the translations.
            cosines = np.linalg.svd(rows.sum(axis=1) / np.sqrt(rows.shape[1]), compute_uv=False)
            # the cosine of a translation among the motions is 1 up to round-off
            translations = int(np.sum(cosines > 1 - 1e-6))
            return free, translations, total - translations
        clusters = np.unique(np.asarray(self.labels)[~rattlers])
        rotations = 0
        if self.inverse_inertia is not None:
            # the rank is 3 for a solid cluster in 3-D, 2 for a rod, 0 for one that cannot rotate
            inertia = np.asarray(self.inverse_inertia)[clusters]
            rotations = int(np.linalg.matrix_rank(inertia, hermitian=True).sum())
        return free, d * clusters.size, rotations

    def simplified(self) -> NullSpace:
        """Return this null space of a Hessian without the data that its projections do not need.

        Projections are then cheaper. The data of rotations is dropped where no cluster can rotate,
        and cluster labels where there is only one cluster. A batch is simplified as far as all of
        its systems allow. The function does not work inside ``jax.jit``.
        """
        if self.active_set is not None:
            return self
        if self.inverse_inertia is not None and np.any(np.asarray(self.inverse_inertia)):
            return self
        # ``project`` looks at ``motions`` only where there are labels, so that these are kept
        if self.motions is not None or self.labels is None:
            return self
        without_arms = dataclasses.replace(self, arms=None, inverse_inertia=None)
        rattlers = np.asarray(self.rattlers)
        labels = np.asarray(self.labels)
        # The first particle that is no rattler, and its label. Where all particles are rattlers, or
        # one particle has another label, the labels are needed.
        first = np.argmin(rattlers, axis=-1)[..., None]
        label = np.take_along_axis(labels, first, axis=-1)
        all_rattlers = rattlers.all(axis=-1, keepdims=True)
        if np.any(np.where(rattlers, all_rattlers, labels != label)):
            return without_arms
        counts = np.take_along_axis(np.asarray(self.counts), label, axis=-1)[..., 0]
        return dataclasses.replace(without_arms, labels=None, counts=counts)

    def cluster_total(self, v: jax.Array) -> jax.Array:
        """Sum the vectors v of the particles over each cluster of particles.

        The sum stands in the row whose index is the label of the cluster.
        """
        return jnp.zeros_like(v).at[self.labels].add(v)


@compiled
def _projections(null: NullSpace, columns: jax.Array) -> jax.Array:
    """Project the null space of the Hessian out of each column of a matrix (m, c).

    The rows are the coordinates of the particles; for a batch, those of its systems one after the
    other, and each system has its own null space.
    """

    def of_member(null: NullSpace, columns: jax.Array) -> jax.Array:
        def project(v: jax.Array) -> jax.Array:
            return null.project(Unknowns(v.reshape(null.rattlers.shape[0], -1))).positions.ravel()

        # 32 columns at a time, which bounds the memory
        return jax.lax.map(project, columns.T, batch_size=min(32, columns.shape[1])).T

    if null.rattlers.ndim == 1:
        return of_member(null, columns)
    members = null.rattlers.shape[0]
    by_member = columns.reshape(members, -1, columns.shape[1])
    return jax.vmap(of_member)(null, by_member).reshape(columns.shape)


def _cross(arms: jax.Array, v: jax.Array) -> jax.Array:
    """Compute the angular momentum of each particle about the centroid of its cluster.

    The result is (n, 1) in 2-D and (n, 3) in 3-D, for n particles of mass 1. v are their
    velocities, and ``arms`` their positions relative to the centroid.
    """
    if arms.shape[1] == 2:
        return (arms[:, 0] * v[:, 1] - arms[:, 1] * v[:, 0])[:, None]
    return jnp.cross(arms, v)


def turned(turn: jax.Array, arms: jax.Array) -> jax.Array:
    """Compute the displacements (n, d) of a small rotation about the centroid, to first order.

    Args:
      turn: (n, 1) angle in 2-D, (n, 3) rotation vector in 3-D, for each of n particles.
      arms: (n, d) positions relative to the centroid.
    """
    if arms.shape[1] == 2:
        return turn * jnp.stack([-arms[:, 1], arms[:, 0]], axis=1)
    return jnp.cross(turn, arms)


def pseudo_inverse(inertia: jax.Array) -> jax.Array:
    """Compute the pseudo-inverse of n inertia tensors, (n, 1, 1) in 2-D or (n, 3, 3) in 3-D.

    A tensor in 3-D is regular, or belongs to a rod (two equal moments and a third of zero), or is
    zero. The formula is written out: LAPACK called from two threads may make XLA on a CPU wait for
    ever.
    """
    if inertia.shape[1] == 1:
        return jnp.where(inertia > 0, 1.0 / jnp.where(inertia > 0, inertia, 1.0), 0.0)
    mean = 0.5 * jnp.trace(inertia, axis1=1, axis2=2)  # the moment of a rod across its axis
    scaled = inertia / jnp.where(mean > 0, mean, 1.0)[:, None, None]
    # The inverse is the adjugate over the determinant; cross products of rows are the adjugate's.
    # They are its columns, and stand as rows here: the adjugate of a symmetric matrix is symmetric.
    adjugate = jnp.stack(
        [jnp.cross(scaled[:, (k + 1) % 3], scaled[:, (k + 2) % 3]) for k in range(3)], axis=1
    )
    determinant = jnp.sum(adjugate[:, 0] * scaled[:, 0], axis=1)[:, None, None]
    regular = determinant > ROD
    # The scaled tensor of a rod is a projector, and so its own pseudo-inverse.
    inverse = jnp.where(regular, adjugate / jnp.where(regular, determinant, 1.0), scaled)
    return inverse / jnp.where(mean > 0, mean, 1.0)[:, None, None]


def orthonormal(rows: jax.Array, floor: float) -> jax.Array:
    """Return orthonormal rows that span the same space as given rows.

    Rows of zeros fill the place where the given rows are linearly dependent.

    Args:
      rows: (k, m) the given rows.
      floor: a singular value below this part of the largest one counts as zero.
    """
    _, sizes, basis = jnp.linalg.svd(rows, full_matrices=False)
    return jnp.where((sizes > floor * sizes[0])[:, None], basis, 0.0)


@full_precision
def _rotations(arms: np.ndarray, axis: np.ndarray | None) -> list[np.ndarray]:
    """Return the rotations of a cluster about its center, or about one axis, (count, d) each.

    They are divided by the size of the cluster, so that their norms are like those of translations:
    one limit, 1e-9, then tells which are independent, in any unit of length.

    Args:
      arms: (count, d) vectors from the center to the particles.
      axis: None for all rotations; else the axis (d,), zero where there is no rotation.
    """
    if axis is not None:
        if not axis.any():
            return []
        turn = np.cross(axis, arms)
        return [turn / (np.sqrt(np.mean(turn**2)) or 1.0)]
    size = np.sqrt(np.mean(arms**2)) or 1.0
    rotations = []
    # one rotation in each plane of coordinates: xy in 2-D; xy, yz and xz in 3-D
    for a, b in [(0, 1), (1, 2), (0, 2)][: 1 if arms.shape[1] == 2 else 3]:
        rotation = np.zeros(arms.shape)
        rotation[:, a] = -arms[:, b] / size
        rotation[:, b] = arms[:, a] / size
        rotations.append(rotation)
    return rotations


def left_motions(
    x: np.ndarray, axis: np.ndarray | None, stuck: np.ndarray, some: np.ndarray, n: int
) -> list[np.ndarray]:
    """Return the rigid motions of some particles that leave their pinned coordinates in place.

    Args:
      x: (count, d) positions of these particles.
      axis: None where the particles are not connected to their periodic image. Else the axis (d,)
        about which they can still rotate, as a wire does in 3-D; zero where they cannot rotate.
      stuck: (count, d) True for pinned coordinates.
      some: indices of these particles among all, or a mask.
      n: number of all particles of the system.

    Returns:
      orthonormal motions, (n, d) each, zero for the other particles.
    """
    count, d = x.shape
    translations = [np.broadcast_to(np.eye(d)[k], (count, d)) for k in range(d)]
    rows = np.array([b.ravel() for b in [*translations, *_rotations(x - x.mean(axis=0), axis)]])
    _, sizes, rows = np.linalg.svd(rows, full_matrices=False)
    # Fewer motions are independent where the particles lie on a line, or there is only one.
    rows = rows[sizes > 1e-9 * sizes[0]]
    at_stuck = rows[:, stuck.ravel()]
    if at_stuck.shape[1]:
        # the combinations that vanish at the pinned coordinates: null vectors of a small matrix
        values, vectors = np.linalg.eigh(at_stuck @ at_stuck.T)
        # eigenvalues are squares, and rows have norm 1: at most 1e-6 of a motion is
        # at these coordinates
        rows = vectors[:, values < 1e-12].T @ rows
    motions = []
    for row in rows:
        motion = np.zeros((n, d))
        motion[some] = row.reshape(count, d)
        motions.append(motion)
    return motions
