"""This module judges mechanical stability, by the stiffness to strain and Born's criterion.

The stiffness tensor A is the second derivative of the energy by strain with relaxed particles, per
volume, and sigma the stress (:mod:`mdsens.elasticity`). Birch's tensor is B = dsigma/dstrain; under
a pressure P it is also the second derivative of the enthalpy U + P V, per volume, with the energy U
and the volume V. The module also estimates the round-off of A and B.

A configuration that is relaxed in a fixed cell is a minimum for any A and B, since the cell keeps
its shape. In a free cell under the same stress it is stable where the symmetrized B is positive
definite (Born; Wallace, Thermodynamics of Crystals, 1972). So B decides whether a configuration is
a solid. Where B is not positive definite, all that is computed in the fixed cell remains valid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.attributes import Named
from mdsens._util.compilation import compiled
from mdsens._util.portable import reduced
from mdsens._util.precision import full_precision
from mdsens.mechanics.status import Status
from mdsens.mechanics.strain import (
    basis,
    from_mandel,
    stiffnesses_along,
    strain_gradient,
    to_mandel,
)
from mdsens.mechanics.units import MARGIN, natural_units
from mdsens.model.system import System

__all__ = [
    "Isotropic",
    "Solid",
    "birch",
    "cleared",
    "isotropic_part",
    "resolution",
    "softest_strain",
    "solid",
]
__all__ += ["tensors", "verdict"]

# Margin of the round-off of a stiffness over its estimate, see :func:`resolution`.
ROUND_OFF = 10.0


class Isotropic(NamedTuple):
    """Moduli of the isotropic solid nearest to a stiffness tensor C: its average over directions.

    The moduli are in units of energy per volume; Poisson's ratio is a number. d is the dimension of
    space.

    Attributes:
      bulk: K = C_iijj / d^2.
      shear: G = (C_ijij - C_iijj / d) / ((d - 1) (d + 2)), Voigt's average.
      young: E = 2 d^2 K G / (d (d - 1) K + 2 G).
      poisson: nu = (d K - 2 G) / (d (d - 1) K + 2 G), between -1 and 1 in 2-D, -1 and 1/2 in 3-D.

    E and nu are NaN where K and G are both zero, and where one of them is negative: they have no
    meaning then.
    """

    bulk: jax.Array
    shear: jax.Array
    young: jax.Array
    poisson: jax.Array

    def __reduce__(self) -> Any:
        return reduced(self, self._asdict())

    if not TYPE_CHECKING:
        __getattr__ = Named.__getattr__  # a NamedTuple has no other base


class Solid(NamedTuple):
    """Stiffness and stability of a relaxed configuration against strain.

    Attributes:
      tensor: (d, d, d, d) A, the second derivative of the energy by strain with relaxed particles,
        in energy per volume; zero where all of it is round-off.
      affine: (d, d, d, d) A if particles followed the strain affinely.
      stress: (d, d) Cauchy stress, positive in tension.
      round_off: a stiffness up to this size counts as zero: the round-off of A that
        :func:`resolution` estimates. Where A is zero, this is the larger uncertainty of A that is
        due to the force left on the particles (the second result of :func:`resolution`), so that
        the stress of this force does not count as a stiffness.
      status: the result of :func:`verdict`, an int32 array.
    """

    tensor: jax.Array
    affine: jax.Array
    stress: jax.Array
    round_off: jax.Array
    status: jax.Array


@compiled
def tensors(system: System, motion: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute the relaxed and the affine stiffness tensor, and the stress, of a backbone.

    The stiffness tensor A is the second derivative of the energy by strain, per volume. For the
    affine A the particles follow the strain affinely; for the relaxed A they are displaced by
    ``motion`` in addition.

    Args:
      system: the backbone (the system without the contacts of rattlers).
      motion: (m, n, d) displacements of the n particles, relative to the affine ones, under each of
        the m strains of :func:`mdsens.mechanics.strain.basis`.

    Returns:
      (relaxed A, affine A, stress).
    """
    unit = jnp.asarray(basis(system.dimension), system.positions.dtype)
    volume = system.volume
    relaxed, affine = stiffnesses_along(system, unit, motion)
    stress = strain_gradient(system, unit) / volume
    return from_mandel(relaxed / volume), from_mandel(affine / volume), from_mandel(stress)


@compiled
def solid(
    system: System,
    motion: jax.Array,
    max_force: jax.Array | float,
    residuals: jax.Array | float,
) -> Solid:
    """Compute the stiffness and stability of a backbone against strain.

    The function works inside ``jax.jit``.

    Args:
      system: the backbone (the system without the contacts of rattlers).
      motion: (m, n, d) displacements of the n particles, relative to the affine ones, under each of
        the m independent strains, see :func:`tensors`.
      max_force: largest force that is left on a particle.
      residuals: relative residuals of the linear solves for ``motion``; the largest counts.
    """
    tensor, affine, stress = tensors(system, motion)
    round_off, doubt = resolution(system, affine, motion, max_force, jnp.max(residuals))
    tensor = cleared(tensor, round_off)
    code = verdict(tensor, stress, round_off, doubt)
    return Solid(tensor, affine, stress, jnp.where(jnp.any(tensor != 0), round_off, doubt), code)


def cleared(value: jax.Array, round_off: jax.Array | float) -> jax.Array:
    """Return an array as it is, or as zeros where none of its entries is above round-off.

    The array is multiplied by one or zero. So where a quotient of such arrays is 0 / 0, the
    derivative of the quotient is NaN, as the quotient itself is.

    Args:
      value: the array.
      round_off: the largest absolute value of an entry that counts as zero.
    """
    return value * jnp.where(jnp.max(jnp.abs(value)) <= round_off, 0.0, 1.0)


# jit, since a user's function of the moduli is traced at each call, and most of them call this.
@compiled
@full_precision
def isotropic_part(tensor: jax.Array, round_off: jax.Array | float = 0.0) -> Isotropic:
    """Compute the moduli of a stiffness tensor (d, d, d, d), averaged over directions.

    These are the bulk and the shear modulus, Young's modulus and Poisson's ratio.

    Args:
      round_off: the bulk modulus, and likewise the shear modulus, is set to zero where its absolute
        value is not above this.
    """
    d = tensor.shape[0]
    iijj, ijij = jnp.einsum("iijj->", tensor), jnp.einsum("ijij->", tensor)
    bulk = cleared(iijj / d**2, round_off)
    shear = cleared((ijij - iijj / d) / ((d - 1) * (d + 2)), round_off)
    denominator = d * (d - 1) * bulk + 2.0 * shear
    # 0 / 0, where both moduli are zero, is NaN anyway; a negative modulus would give a number
    denominator = jnp.where((bulk < 0) | (shear < 0), jnp.nan, denominator)
    young = 2.0 * d**2 * bulk * shear / denominator
    poisson = (d * bulk - 2.0 * shear) / denominator
    return Isotropic(bulk, shear, young, poisson)


@compiled
@full_precision
def birch(tensor: jax.Array, stress: jax.Array) -> jax.Array:
    """Compute Birch's tensor B from the stiffness tensor A and the stress.

    B is the derivative of the stress by strain. The formula is in :mod:`mdsens.elasticity`.

    Args:
      tensor: (d, d, d, d) A, the second derivative of the energy by strain, per volume.
      stress: (d, d) the stress, positive in tension.
    """
    unit = jnp.eye(stress.shape[0], dtype=stress.dtype)
    # the sum of stress_ik delta_jl over the exchanges of i with j and of k with l
    crossed = jnp.einsum("ik,jl->ijkl", stress, unit)
    crossed = crossed + jnp.swapaxes(crossed, 2, 3)
    crossed = crossed + jnp.swapaxes(crossed, 0, 1)
    return tensor + 0.25 * crossed - jnp.einsum("ij,kl->ijkl", stress, unit)


@compiled
def softest_strain(tensor: jax.Array) -> jax.Array:
    """Return the least stiffness to strain: the smallest eigenvalue of a symmetrized tensor.

    The tensor is made symmetric under exchange of its two pairs of indices.

    Args:
      tensor: (d, d, d, d) the stiffness tensor.
    """
    # where the stress is no pressure, stress_ij delta_kl in Birch's tensor lacks this symmetry
    symmetrized = 0.5 * (tensor + jnp.transpose(tensor, (2, 3, 0, 1)))
    return jnp.min(jnp.linalg.eigvalsh(to_mandel(symmetrized)))


@compiled
def resolution(
    system: System,
    affine: jax.Array | np.ndarray,
    motion: jax.Array | np.ndarray,
    max_force: jax.Array | float,
    residual: jax.Array | float,
) -> tuple[jax.Array, jax.Array]:
    """Estimate the round-off of a stiffness tensor, and its uncertainty due to the remaining force.

    *Round-off.* The relaxed tensor is the affine one minus the part that the relaxation of the
    particles takes away, and the two can be equal. Positions are stored to eps |R|, with the
    machine precision eps, so that the force of a pair of stiffness k is known to eps |R| k; when
    the pair is displaced by u across its bond, such a force adds force / l u^2 to the energy. The
    affine tensor is about n k l^2 / V, for n particles in the volume V. So

        round-off = 10 eps (1 + |R| / l) (1 + |X|^2 / (n l^2)) affine

    with l the length of the potential, |R| the largest coordinate, and X the displacements relative
    to the affine ones under a strain of norm one, and ``affine`` the largest entry of the affine
    tensor. X is small where particles follow the strain, and 100 l for each particle next to
    unjamming. In a packing of 64 discs this estimate is 1e-13 of the affine tensor, and 1e-12 to
    1e-11 next to unjamming. For comparison, all particles were moved by the same vector: the
    computed tensor then changed by at most a twentieth of the estimate. In networks of springs at
    rest without stiffness, rings and random networks of 12 to 300 nodes, the computed tensor is at
    most 0.014 of the round-off.

    *Doubt.* The force left on the particles has the same effect as such an error of the pair
    forces; each pair is taken to carry ten times the largest force left. The error of the linear
    solves for X is at most their residual times the affine tensor.

        doubt = 10 max_force l (1 + |X|^2 / (n l^2)) n / V + residual affine

    In packings stopped at 1e-3 to 1e-6 of the mean contact force, the error of the tensor was 0.02
    to 0.9 of the doubt; in packings stopped before their contacts were settled the error was
    larger.

    Args:
      system: the backbone (the system without the contacts of rattlers).
      affine: (d, d, d, d) or (m, m) affine stiffness.
      motion: (m, n, d) the displacements X under each of m strains.
      max_force: largest force that is left on a particle.
      residual: relative residual of the solves for X.

    Returns:
      (round-off, doubt) in energy per volume, the second never below the first. They have no
        derivative. The function works inside ``jax.jit``.
    """
    system, affine, motion = jax.lax.stop_gradient((system, affine, motion))
    length, _ = natural_units(system)
    return _levels(system.positions, system.volume, length, affine, motion, max_force, residual)


@compiled
def _levels(
    positions: jax.Array,
    volume: jax.Array,
    length: jax.Array,
    affine: jax.Array,
    motion: jax.Array,
    max_force: jax.Array | float,
    residual: jax.Array | float,
) -> tuple[jax.Array, jax.Array]:
    """Evaluate the formulas of :func:`resolution` for the round-off of a stiffness and its doubt.

    The doubt is the uncertainty due to the force left on the particles.
    """
    n = positions.shape[0]
    eps = jnp.finfo(positions.dtype).eps
    nonaffine = 1.0 + jnp.max(jnp.sum(motion**2, axis=(1, 2))) / (n * length**2)
    size = jnp.max(jnp.abs(affine))
    extent = jnp.max(jnp.abs(positions))
    # 1 + |R| / l, so that it is not below 10 eps where all positions are near the origin
    round_off = ROUND_OFF * eps * (1.0 + extent / length) * nonaffine * size
    doubt = MARGIN * max_force * length * nonaffine * n / volume + residual * size
    return round_off, jnp.maximum(round_off, doubt)


@compiled
def verdict(
    tensor: jax.Array,
    stress: jax.Array,
    round_off: jax.Array | float,
    doubt: jax.Array | float,
) -> jax.Array:
    """Decide whether a relaxed stiffness tensor A under a stress is stable.

    The result is a status, an int32 array. B is Birch's tensor, the derivative of the stress by
    strain; ``round_off`` and ``doubt`` are those of :func:`resolution`. The status is FLOPPY where
    a bulk or a shear modulus, of A or of B, is zero to round-off; STIFFNESS_UNSETTLED where the
    sign of a modulus is in doubt; UNSTABLE where a modulus is negative. Ratios of the moduli have
    no meaning in these cases. The status is SHAPE_HELD, a warning, where the moduli are positive
    and yet some strain costs nothing or lowers the enthalpy, the smallest eigenvalue of B not being
    above the doubt. The moduli, which are averages over directions, remain valid then. Most small
    packings near unjamming are of this kind (Dagois-Bohy et al., Phys. Rev. Lett. 109, 095703,
    2012).
    """
    tensor, stress, round_off, doubt = jax.lax.stop_gradient((tensor, stress, round_off, doubt))
    B = birch(tensor, stress)
    moduli = jnp.stack([*isotropic_part(tensor)[:2], *isotropic_part(B)[:2]])
    smallest = jnp.min(jnp.abs(moduli))
    # From the mildest to the most severe: the last condition that is true decides.
    code = jnp.where(softest_strain(B) <= doubt, Status.SHAPE_HELD.value, Status.CONVERGED.value)
    code = jnp.where(jnp.min(moduli) < 0, Status.UNSTABLE.value, code)
    code = jnp.where(smallest <= doubt, Status.STIFFNESS_UNSETTLED.value, code)
    code = jnp.where(smallest <= round_off, Status.FLOPPY.value, code)
    # last: every comparison with a NaN is False, which would leave CONVERGED
    finite = jnp.all(jnp.isfinite(tensor)) & jnp.all(jnp.isfinite(stress))
    return jnp.where(finite, code, Status.NOT_FINITE.value).astype(jnp.int32)
