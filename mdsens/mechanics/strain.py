"""This module writes strains as vectors, and computes derivatives of the energy by strain.

The derivatives are the stress, the forces of a strain on the particles, and the stiffness. A strain
is applied at fixed fractional coordinates: every vector r between particles becomes (1 + strain) r,
with a symmetric deformation gradient F = 1 + strain. As a vector a strain is in Mandel's form, its
components along an orthonormal basis of the symmetric matrices: the diagonal, then sqrt(2) times
yz, xz, xy (in 2-D xy). Lengths and inner products of these vectors are then those of the matrices.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.precision import full_precision
from mdsens.mechanics.pair_strain import pair_forces, pair_stiffness
from mdsens.model.system import System, potential_energy

__all__ = [
    "basis",
    "forces_of_strain",
    "from_mandel",
    "stiffness_along",
    "stiffnesses_along",
    "strain_gradient",
    "to_mandel",
    "uniform",
]


@functools.cache
def basis(dimension: int) -> np.ndarray:
    """Return an orthonormal basis (m, d, d) of the symmetric matrices in d dimensions.

    It has m = d (d + 1) / 2 matrices in Voigt's order: xx, yy, xy in 2-D and xx, yy, zz, yz, xz, xy
    in 3-D.
    """
    # cached: all callers share the array, and none may write to it
    pairs = [(k, k) for k in range(dimension)]
    pairs += [(0, 1)] if dimension == 2 else [(1, 2), (0, 2), (0, 1)]
    matrices = np.zeros((len(pairs), dimension, dimension))
    for matrix, (i, j) in zip(matrices, pairs, strict=True):
        # a shear stands in the matrix twice, so that 1/sqrt(2) gives it norm 1
        matrix[i, j] = matrix[j, i] = 1.0 if i == j else 0.5**0.5
    return matrices


@functools.cache
def uniform(dimension: int) -> np.ndarray:
    """Return the isotropic strain of norm 1 in d dimensions, (1, d, d)."""
    return np.eye(dimension)[None] / dimension**0.5


@full_precision
def to_mandel(tensor: jax.Array) -> jax.Array:
    """Write a symmetric matrix (d, d) as a vector (m,), or a stiffness tensor as a matrix (m, m).

    The form is Mandel's, with m = d (d + 1) / 2 components in an orthonormal basis. The tensor is
    (d, d, d, d) with minor symmetries.
    """
    unit = basis(tensor.shape[0])
    if tensor.ndim == 2:
        return jnp.einsum("aij,ij->a", unit, tensor)
    return jnp.einsum("aij,ijkl,bkl->ab", unit, tensor, unit)


@full_precision
def from_mandel(vector: jax.Array) -> jax.Array:
    """Write a vector (m,) as a symmetric matrix (d, d), or (m, m) as a tensor (d, d, d, d).

    This is the inverse of `to_mandel`, with m = d (d + 1) / 2.
    """
    unit = basis({3: 2, 6: 3}[vector.shape[0]])  # d from m
    if vector.ndim == 1:
        return jnp.einsum("a,aij->ij", vector, unit)
    return jnp.einsum("aij,ab,bkl->ijkl", unit, vector, unit)


@full_precision
def strain_gradient(system: System, along: jax.Array | np.ndarray) -> jax.Array:
    """Compute the derivative of the energy by strain along each of k strains, (k,).

    The derivative is taken at zero strain. It is the volume times the components of the stress
    along the strains.

    Args:
      along: (k, d, d) the strains.
    """

    def energy(s: jax.Array) -> jax.Array:
        return potential_energy(system, strain=jnp.tensordot(s, along, axes=1))

    return jax.grad(energy)(jnp.zeros(along.shape[0], system.positions.dtype))


def forces_of_strain(system: System, strain: jax.Array) -> jax.Array:
    """Compute the forces (n, d) on the particles due to a small affine strain.

    The forces are -d2U/dR dstrain times the strain, with the energy U and the positions R.

    Args:
      strain: the strain, (d, d).
    """
    if system.potential.pairwise:
        return pair_forces(system, strain)

    def slope(e: jax.Array) -> jax.Array:
        return jax.grad(lambda R: potential_energy(system, R, strain=e))(system.positions)

    # forward over reverse: one jvp of the gradient, without the matrix d2U/dR dstrain
    return -jax.jvp(slope, (jnp.zeros_like(strain),), (strain,))[1]


@full_precision
def stiffness_along(system: System, along: jax.Array | np.ndarray, motion: jax.Array) -> jax.Array:
    """Compute the second derivative of the energy by k strains of the system, (k, k).

    The particles follow each strain affinely, and are displaced by ``motion`` in addition. The
    arguments and the result are the first of :func:`stiffnesses_along`.
    """
    if system.potential.pairwise:
        return pair_stiffness(system, jnp.asarray(along, motion.dtype), motion)[0]
    return _stiffness_of_energy(system, along, motion)


@full_precision
def stiffnesses_along(
    system: System, along: jax.Array | np.ndarray, motion: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Compute the second derivatives of the energy by k strains, relaxed and affine, (k, k) each.

    The particles follow each strain affinely, and for the relaxed one are displaced by ``motion``
    in addition. It is the relaxed stiffness with the displacements H^+ f that bring the forces f of
    :func:`forces_of_strain` back to zero, H^+ being the pseudo-inverse of the Hessian. The relaxed
    stiffness is stationary in the displacements: an error of the displacements changes the
    stiffness to second order only, and its derivative by parameters can be taken at constant
    displacements.

    Args:
      along: (k, d, d) symmetric strains.
      motion: (k, n, d) displacements relative to the affine ones, per unit of each strain.

    Returns:
      (relaxed, affine).
    """
    if system.potential.pairwise:
        return pair_stiffness(system, jnp.asarray(along, motion.dtype), motion)
    # both by one compiled function
    both = jnp.stack([motion, jnp.zeros_like(motion)])
    relaxed, affine = jax.lax.map(lambda m: _stiffness_of_energy(system, along, m), both)
    return relaxed, affine


def _stiffness_of_energy(
    system: System, along: jax.Array | np.ndarray, motion: jax.Array
) -> jax.Array:
    """Compute the relaxed stiffness of :func:`stiffnesses_along` for an energy of any kind."""
    no_strain = jnp.zeros(along.shape[0], system.positions.dtype)

    def energy(s: jax.Array) -> jax.Array:
        moved = system.positions + jnp.tensordot(s, motion, axes=1)
        # The strain deforms the displacements, too. At a minimum this adds nothing: the term is the
        # forces, which are zero, times the deformed displacements.
        return potential_energy(system, moved, strain=jnp.tensordot(s, along, axes=1))

    slope = jax.grad(energy)

    def derivative_of_slope(s: jax.Array) -> jax.Array:
        return jax.jvp(slope, (no_strain,), (s,))[1]

    # One strain after the other: all at once, large systems took five times as long, since their
    # arrays do not fit the cache of a processor.
    return jax.lax.map(derivative_of_slope, jnp.eye(len(no_strain), dtype=no_strain.dtype))
