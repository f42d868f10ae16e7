"""The stationarity condition F = dU/dx = 0 and its derivatives: Hessian products, mixed products, the null space."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from mdsens import contacts
from mdsens.boxes import nearest_image
from mdsens.contacts import Network
from mdsens.implicit.linear import Operator
from mdsens.system import System, pair_terms, potential_energy

__all__ = [
    "NullSpace",
    "Unknowns",
    "dense_hessian",
    "force",
    "gradient",
    "hessian_operator",
    "largest_force",
    "max_force",
    "mixed_product",
    "mixed_transpose",
    "null_space",
    "sparse_hessian",
]

Params = Mapping[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unknowns:
    """What the stationarity condition is solved for.

    Attributes:
      positions: (n, d).
      strain: Mandel vector of d (d + 1) / 2 where the cell is relaxed too, else None.
      multipliers: of constraints, else None.
    """

    positions: jax.Array
    strain: jax.Array | None = None
    multipliers: jax.Array | None = None


def gradient(system: System, x: Unknowns, params: Params) -> Unknowns:
    """F(x, params) = dU/dx."""

    def energy(unknowns: Unknowns) -> jax.Array:
        return potential_energy(system, unknowns.positions, params)

    return jax.grad(energy)(x)


@jax.jit
def force(system: System) -> jax.Array:
    """-dU/dR, (n, d)."""
    return -gradient(system, Unknowns(system.positions), system.params).positions


def largest_force(forces: jax.Array) -> jax.Array:
    """The largest norm of one particle's force, ASE's fmax."""
    return jnp.sqrt(jnp.max(jnp.sum(forces**2, axis=-1), initial=0.0))


@jax.jit
def max_force(system: System) -> jax.Array:
    """The largest norm of one particle's force in a system."""
    return largest_force(force(system))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NullSpace:
    """The directions that cost no energy to second order, known beforehand.

    Rattlers, translations of each cluster, rotations of each one that does not meet its own image. Where the energy is
    more than pairs, of the translations and rotations of everything those combinations that the Hessian finds free: an
    external field may hold the others.

    Attributes:
      rattlers: (n,).
      labels: (n,) cluster of each particle.
      counts: (n,) particles in the cluster of that label, at least 1.
      arms: (n, d) positions from their cluster's centroid, zero where it cannot turn; None where none can.
      inverse_inertia: (n, k, k) pseudo-inverse of each label's inertia, k = 1 in 2-D and 3 in 3-D; None likewise.
      motions: (k, n, d) orthonormal motions, or zeros, in place of those of clusters; None where the law is of pairs.
    """

    rattlers: jax.Array
    labels: jax.Array
    counts: jax.Array
    arms: jax.Array | None = None
    inverse_inertia: jax.Array | None = None
    motions: jax.Array | None = None

    def project(self, x: Unknowns) -> Unknowns:
        """The part of ``x`` off the null space: an orthogonal projection."""
        v = jnp.where(self.rattlers[:, None], 0.0, x.positions)
        if self.motions is not None:
            shares = jnp.sum(self.motions * v, axis=(1, 2))
            return dataclasses.replace(x, positions=v - jnp.tensordot(shares, self.motions, axes=1))
        mean = self._total(v) / self.counts[:, None]
        v = v - mean[self.labels]
        if self.arms is not None and self.inverse_inertia is not None:
            angular = self._total(_cross(self.arms, v))
            turn = jnp.einsum("nij,nj->ni", self.inverse_inertia, angular)[self.labels]
            v = v - _turned(turn, self.arms)
        v = jnp.where(self.rattlers[:, None], 0.0, v)
        return dataclasses.replace(x, positions=v)

    def dimensions(self, d: int) -> tuple[int, int, int]:
        """How many directions in d dimensions are of rattlers, are translations, are rotations. Host code."""
        loose, labels = np.asarray(self.rattlers), np.asarray(self.labels)
        free = d * int(loose.sum())
        if self.motions is not None:
            rows = np.asarray(self.motions)
            total = round(float(np.sum(rows**2)))
            along = np.linalg.svd(rows.sum(axis=1) / np.sqrt(rows.shape[1]), compute_uv=False)
            translations = int(np.sum(along > 1 - 1e-6))
            return free, translations, total - translations
        clusters, rotations = np.unique(labels[~loose]), 0
        if self.inverse_inertia is not None:
            rotations = int(np.linalg.matrix_rank(np.asarray(self.inverse_inertia)[clusters], hermitian=True).sum())
        return free, d * clusters.size, rotations

    def without_idle_turns(self) -> NullSpace:
        """The same where something can turn; else without arms, to spare every projection the work. Host code."""
        if self.inverse_inertia is None or bool(jnp.any(self.inverse_inertia != 0)):
            return self
        return dataclasses.replace(self, arms=None, inverse_inertia=None)

    def _total(self, v: jax.Array) -> jax.Array:
        return jnp.zeros((self.labels.shape[0], v.shape[1]), v.dtype).at[self.labels].add(v)


def _cross(arms: jax.Array, v: jax.Array) -> jax.Array:
    """Moment of v about the centroid, (n, 1) in 2-D and (n, 3) in 3-D."""
    if arms.shape[1] == 2:
        return (arms[:, 0] * v[:, 1] - arms[:, 1] * v[:, 0])[:, None]
    return jnp.cross(arms, v)


def _turned(turn: jax.Array, arms: jax.Array) -> jax.Array:
    """Displacement of a rotation about the centroid."""
    if arms.shape[1] == 2:
        return turn * jnp.stack([-arms[:, 1], arms[:, 0]], axis=1)
    return jnp.cross(turn, arms)


def null_space(system: System, net: Network) -> NullSpace:
    """The null space of the Hessian that symmetry and the contact network give.

    Args:
      system: at a minimum.
      net: its mechanical network.
    """
    n, d = system.positions.shape
    positions = jax.lax.stop_gradient(system.positions)
    held = jnp.where(net.rattlers, 0.0, 1.0).astype(positions.dtype)
    counts = jnp.maximum(jnp.zeros(n, positions.dtype).at[net.labels].add(held), 1.0)
    plain = NullSpace(net.rattlers, net.labels, counts)
    if not system.potential.pairwise:
        return dataclasses.replace(plain, motions=_free_motions(jax.lax.stop_gradient(system)))
    turns = jnp.where(net.wraps[net.labels], 0.0, held)[:, None]
    centre = plain._total(turns * net.whole) / counts[:, None]
    arms = turns * (jax.lax.stop_gradient(net.whole) - centre[net.labels])
    squared = jnp.sum(arms**2, axis=1)
    if d == 2:
        inertia = plain._total(squared[:, None])[:, :, None]
    else:
        each = squared[:, None, None] * jnp.eye(3) - arms[:, :, None] * arms[:, None, :]
        inertia = plain._total(each.reshape(n, 9)).reshape(n, 3, 3)
    inverse = jnp.linalg.pinv(inertia, rtol=1e-9, hermitian=True)
    return dataclasses.replace(plain, arms=arms, inverse_inertia=inverse)


def _free_motions(system: System) -> jax.Array:
    """What costs nothing of the translations and, without a cell, the rotations of everything; (k, n, d)."""
    n, d = system.positions.shape
    dtype = system.positions.dtype
    basis = jnp.broadcast_to(jnp.eye(d, dtype=dtype)[:, None, :], (d, n, d))
    if system.box is None:
        arms = system.positions - jnp.mean(system.positions, axis=0)
        size = jnp.sqrt(jnp.mean(arms**2))
        axes = jnp.eye(1 if d == 2 else 3, dtype=dtype)
        turns = jax.vmap(lambda axis: _turned(jnp.broadcast_to(axis, (n, axis.size)), arms))(axes)
        basis = jnp.concatenate([basis, turns / jnp.where(size > 0, size, 1.0)])
    rigid = _orthonormal(basis.reshape(-1, n * d), 1e-9)
    product = _hessian_product(system)

    def image(v: jax.Array) -> jax.Array:
        return product(Unknowns(v.reshape(n, d))).positions.ravel()

    probe = jnp.cos(jnp.arange(n * d, dtype=dtype) ** 2)
    scale = jnp.linalg.norm(image(probe)) / jnp.linalg.norm(probe)
    combinations, costs, _ = jnp.linalg.svd(jax.lax.map(image, rigid), full_matrices=False)
    free = costs <= jnp.finfo(dtype).eps ** 0.5 * scale
    return _orthonormal(jnp.where(free[:, None], combinations.T @ rigid, 0.0), 0.5).reshape(-1, n, d)


def _orthonormal(rows: jax.Array, floor: float) -> jax.Array:
    """Orthonormal rows with the same span; zeros for what is below ``floor`` of the largest singular value."""
    _, sizes, kept = jnp.linalg.svd(rows, full_matrices=False)
    return jnp.where((sizes > floor * sizes[0])[:, None], kept, 0.0)


def _hessian_product(system: System) -> Any:
    x = Unknowns(system.positions)
    return jax.linearize(lambda y: gradient(system, y, system.params), x)[1]


def hessian_operator(system: System, null: NullSpace) -> Operator:
    """H = d2U/dx2 as products, linearised once at the system's positions, with its null space."""
    return Operator(_hessian_product(system), symmetric=True, positive_semidefinite=True, project=null.project)


@jax.jit
def dense_hessian(system: System) -> jax.Array:
    """H as a matrix (n d, n d): for checks and for small systems."""
    n, d = system.positions.shape
    product = _hessian_product(system)
    rows = jax.vmap(lambda e: product(Unknowns(e.reshape(n, d))).positions.ravel())(jnp.eye(n * d))
    return rows


@jax.jit
def _pair_blocks(system: System) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """i, j and the block d2phi/dv2 (m, d, d) of each pair of each term, v the vector between the two."""
    box, blocks = system.box, []
    for term in pair_terms(system):
        vectors = nearest_image(system.positions[term.i] - system.positions[term.j], box)
        vectors = jnp.where(term.mask[:, None], vectors, 1.0)

        def slope(v: jax.Array, term: Any = term) -> jax.Array:
            return jax.grad(lambda u: jnp.sum(term.energy(jnp.sqrt(jnp.sum(u**2, axis=-1)))))(v)

        # pairs do not know of each other, so one product gives a column of every pair's block
        columns = [
            jax.jvp(slope, (vectors,), (jnp.zeros_like(vectors).at[:, a].set(1.0),))[1] for a in range(system.dimension)
        ]
        blocks.append((term.i, term.j, jnp.stack(columns, axis=-1)))
    return blocks


def sparse_hessian(system: System) -> sp.csc_array | None:
    """H as a scipy sparse matrix (n d, n d), from the pairs that interact; None for laws that are more than pairs."""
    if not system.potential.pairwise:
        return None
    n, d = system.n, system.dimension
    rows, columns, entries = [], [], []
    axes = np.arange(d)
    for i, j, block in _pair_blocks(system):
        block = np.asarray(block, float)
        some = np.any(block != 0, axis=(1, 2))
        i, j, block = np.asarray(i)[some], np.asarray(j)[some], block[some]
        for a, b, sign in ((i, i, 1.0), (j, j, 1.0), (i, j, -1.0), (j, i, -1.0)):
            rows.append(np.broadcast_to((a[:, None] * d + axes)[:, :, None], block.shape).ravel())
            columns.append(np.broadcast_to((b[:, None] * d + axes)[:, None, :], block.shape).ravel())
            entries.append((sign * block).ravel())
    where = (np.concatenate(rows), np.concatenate(columns)) if rows else (np.zeros(0, int), np.zeros(0, int))
    return sp.coo_array((np.concatenate(entries) if rows else np.zeros(0), where), shape=(n * d, n * d)).tocsc()


@jax.jit
def mixed_product(system: System, dparams: Params) -> Unknowns:
    """d2U/dx dp . dp, the change of the gradient along a full dict of parameter changes."""
    x = Unknowns(system.positions)
    return jax.jvp(lambda p: gradient(system, x, p), (dict(system.params),), (dict(dparams),))[1]


def mixed_transpose(system: System, cotangent: Unknowns) -> dict[str, jax.Array]:
    """(d2U/dx dp)^T w, a dict shaped like the parameters."""
    x = Unknowns(system.positions)
    return jax.vjp(lambda p: gradient(system, x, p), dict(system.params))[1](cotangent)[0]


def linearisation(system: System, max_force_left: jax.Array | float) -> tuple[System, Network, NullSpace]:
    """What every derivative at a minimum needs: the backbone, the network and the null space."""
    return _linearisation(system, jnp.asarray(max_force_left, system.positions.dtype))  # one type, compiled once


@jax.jit
def _linearisation(system: System, max_force_left: jax.Array) -> tuple[System, Network, NullSpace]:
    net = contacts.network(system, max_force_left)
    held = contacts.backbone(system, net)
    return held, net, null_space(held, net)
