"""Symmetric strains as vectors, and the energy's derivatives by them: stress, forces that a strain
makes, stiffness.

A strain is taken at fixed fractions of the cell: every vector between particles becomes (1 +
strain) r, F = 1 + strain symmetric. As a vector it is in Mandel's form, its components along an
orthonormal basis of the symmetric matrices: the diagonal, then sqrt(2) times yz, xz, xy (in 2-D
xy). Lengths and inner products are then those of the matrices.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mdsens.model.system import System, potential_energy

__all__ = [
    "basis",
    "forces_of_strain",
    "from_mandel",
    "stiffness_along",
    "strain_gradient",
    "to_mandel",
    "uniform",
]


@functools.cache
def basis(dimension: int) -> np.ndarray:
    """(m, d, d) orthonormal symmetric matrices, m = d (d + 1) / 2, in Voigt's order: xx, yy, (zz,
    yz, xz,) xy.
    """
    pairs = [(k, k) for k in range(dimension)]
    pairs += [(0, 1)] if dimension == 2 else [(1, 2), (0, 2), (0, 1)]
    found = np.zeros((len(pairs), dimension, dimension))
    for row, (i, j) in zip(found, pairs, strict=True):
        row[i, j] = row[j, i] = 1.0 if i == j else 0.5**0.5
    return found


@functools.cache
def uniform(dimension: int) -> np.ndarray:
    """(1, d, d) the isotropic strain of norm 1."""
    return np.eye(dimension)[None] / dimension**0.5


def to_mandel(tensor: jax.Array) -> jax.Array:
    """A symmetric (d, d) as (m,), or a (d, d, d, d) with minor symmetries as (m, m)."""
    unit = basis(tensor.shape[0])
    if tensor.ndim == 2:
        return jnp.einsum("aij,ij->a", unit, tensor)
    return jnp.einsum("aij,ijkl,bkl->ab", unit, tensor, unit)


def from_mandel(vector: jax.Array) -> jax.Array:
    """The inverse of :func:`to_mandel`."""
    unit = basis({3: 2, 6: 3}[vector.shape[0]])
    if vector.ndim == 1:
        return jnp.einsum("a,aij->ij", vector, unit)
    return jnp.einsum("aij,ab,bkl->ijkl", unit, vector, unit)


def strain_gradient(system: System, along: jax.Array | np.ndarray) -> jax.Array:
    """dU/dstrain along each of (k, d, d) at strain 0, (k,): the volume times the stress's
    components.
    """
    none = jnp.zeros(along.shape[0], system.positions.dtype)
    return jax.grad(lambda s: potential_energy(system, strain=jnp.tensordot(s, along, axes=1)))(
        none
    )


def forces_of_strain(system: System, strain: jax.Array) -> jax.Array:
    """-d2U/dR dstrain . strain, (n, d): the forces that a small affine strain (d, d) puts on the
    particles.
    """

    def slope(e: jax.Array) -> jax.Array:
        return jax.grad(lambda R: potential_energy(system, R, strain=e))(system.positions)

    return -jax.jvp(slope, (jnp.zeros_like(strain),), (strain,))[1]


def stiffness_along(system: System, along: jax.Array | np.ndarray, motion: jax.Array) -> jax.Array:
    """The second derivative of U along strains (k, d, d) with displacements (k, n, d) that go with
    them, (k, k).

    With the displacements zero it is affine. With those that bring the forces back to zero, H^+ f
    of ``forces_of_strain``, it is relaxed, and stationary in the displacements: an error of theirs
    counts squared, and the derivative by anything else may hold them fixed.
    """
    none = jnp.zeros(along.shape[0], system.positions.dtype)

    def energy(s: jax.Array) -> jax.Array:
        moved = system.positions + jnp.tensordot(s, motion, axes=1)
        return potential_energy(system, moved, strain=jnp.tensordot(s, along, axes=1))

    return jax.hessian(energy)(none)
