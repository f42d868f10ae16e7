"""Whether a configuration is a solid: its stiffness against strain, how much of it is resolved, and
Born's criterion.

With A the relaxed second derivative of the energy by a strain and sigma the stress
(:mod:`mdsens.elasticity`), Birch's tensor B = dsigma/dstrain is, under a pressure P, also the
second derivative of the enthalpy U + P V, both a volume. A configuration relaxed in a fixed cell is
a minimum whatever the two are: the cell takes every strain. Without it, under the same stress, it
stays as it is where the symmetrized B is positive definite (Born; Wallace, Thermodynamics of
Crystals, 1972). So B decides what a solid is, and of a tensor that is not positive definite
everything computed in the cell still holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from mdsens._util.attributes import Named
from mdsens._util.portable import reduced
from mdsens.mechanics.status import Status
from mdsens.mechanics.strain import basis, from_mandel, stiffness_along, strain_gradient, to_mandel
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

ROUND_OFF = 10.0


class Isotropic(NamedTuple):
    """The isotropic solid nearest to a tensor: what an average over all directions sees. Energy a
    volume; nu a number.

    Attributes:
      bulk: K = C_iijj / d^2.
      shear: G = (C_ijij - C_iijj / d) / ((d - 1) (d + 2)), Voigt's average.
      young: E = 2 d^2 K G / (d (d - 1) K + 2 G).
      poisson: nu = (d K - 2 G) / (d (d - 1) K + 2 G), between -1 and 1 in 2-D, -1 and 1/2 in 3-D.

    E and nu are NaN where K and G are both zero, and where one of them is negative: no solid has
      them then.
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
    """What a relaxed configuration is against strain.

    Attributes:
      tensor: (d, d, d, d) A, energy a volume; zero where all of it is round-off.
      affine: (d, d, d, d) what A would be if particles followed the strain.
      stress: (d, d) Cauchy, positive in tension.
      round_off: a stiffness as small is none; see :func:`resolution`. Where A is none it is the
        doubt, so that the stress of the force left makes no stiffness either.
      status: of :func:`verdict`, an int32 array.
    """

    tensor: jax.Array
    affine: jax.Array
    stress: jax.Array
    round_off: jax.Array
    status: jax.Array


@jax.jit
def tensors(system: System, motion: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(A, A if affine, stress) of a backbone whose particles move by (m, n, d) beside the affine
    strains.
    """
    unit, volume = jnp.asarray(basis(system.dimension), system.positions.dtype), system.volume
    both = jnp.stack([motion, jnp.zeros_like(motion)])
    relaxed, affine = jax.vmap(lambda m: stiffness_along(system, unit, m))(both) / volume
    return (
        from_mandel(relaxed),
        from_mandel(affine),
        from_mandel(strain_gradient(system, unit) / volume),
    )


def solid(system: System, motion: jax.Array, max_force: Any, residual: Any) -> Solid:
    """What a backbone is against strain, with (m, n, d) how its particles relax beside each;
    traceable.

    Args:
      max_force: left on a particle.
      residual: of the solves for the motion, relative.
    """
    tensor, affine, stress = tensors(system, motion)
    round_off, doubt = resolution(system, affine, motion, max_force, residual)
    tensor = cleared(tensor, round_off)
    code = verdict(tensor, stress, round_off, doubt)
    return Solid(tensor, affine, stress, jnp.where(jnp.any(tensor != 0), round_off, doubt), code)


def cleared(value: jax.Array, round_off: Any) -> jax.Array:
    """The value; zero where none of it is above round-off. By a factor, so that 0 / 0 is NaN in
    derivatives too.
    """
    return value * jnp.where(jnp.max(jnp.abs(value)) <= round_off, 0.0, 1.0)


# a function of the moduli is differentiated anew at each call, and this is in most of them
@jax.jit
def isotropic_part(tensor: jax.Array, round_off: Any = 0.0) -> Isotropic:
    """The isotropic part of a stiffness tensor (d, d, d, d); K and G are zero where they are not
    above round-off.
    """
    d = tensor.shape[0]
    iijj, ijij = jnp.einsum("iijj->", tensor), jnp.einsum("ijij->", tensor)
    bulk = cleared(iijj / d**2, round_off)
    shear = cleared((ijij - iijj / d) / ((d - 1) * (d + 2)), round_off)
    whole = d * (d - 1) * bulk + 2.0 * shear
    whole = jnp.where((bulk < 0) | (shear < 0), jnp.nan, whole)
    return Isotropic(
        bulk, shear, 2.0 * d**2 * bulk * shear / whole, (d * bulk - 2.0 * shear) / whole
    )


@jax.jit
def birch(tensor: jax.Array, stress: jax.Array) -> jax.Array:
    """B of A and the stress; the equation is in :mod:`mdsens.elasticity`."""
    unit = jnp.eye(stress.shape[0], dtype=stress.dtype)
    crossed = jnp.einsum("ik,jl->ijkl", stress, unit)
    crossed = crossed + jnp.swapaxes(crossed, 2, 3)
    crossed = crossed + jnp.swapaxes(crossed, 0, 1)
    return tensor + 0.25 * crossed - jnp.einsum("ij,kl->ijkl", stress, unit)


@jax.jit
def softest_strain(tensor: jax.Array) -> jax.Array:
    """The smallest eigenvalue of a tensor, symmetrized: the stiffness against the softest strain."""
    return jnp.min(
        jnp.linalg.eigvalsh(to_mandel(0.5 * (tensor + jnp.transpose(tensor, (2, 3, 0, 1)))))
    )


def resolution(
    system: System, affine: Any, motion: Any, max_force: Any, residual: Any
) -> tuple[jax.Array, jax.Array]:
    """How large a stiffness, energy a volume, is nothing but round-off, and how large a one may be.

    The tensor is a difference, affine less relaxed, of two that can be equal. Positions are stored
    to eps |R|, so that the force of a pair of stiffness k is known to eps |R| k, and turned by u it
    adds force / l u^2 to the energy. The affine tensor is about n k l^2 / V, so of that

        round-off = 10 eps |R| / l (1 + |X|^2 / (n l^2)) affine

    with l the potential's length, |R| the largest coordinate and X the displacements beside the affine
    strain of norm one: few where particles follow the strain, 100 l for each of them next to
    unjamming. In a packing of 64 discs it is 1e-13 of the affine tensor, next to unjamming 1e-12 to
    1e-11: 20 times and more what moving all particles by the same vector makes. Of networks of
    springs at rest without stiffness, rings and random ones of 12 to 300 nodes, what is left is
    0.014 of it at most. Likewise the force left on the particles, as if each contact carried ten
    times as much, and the error of the solves, at most the residual's share of the affine tensor,
    make

        doubt = 10 max_force l (1 + |X|^2 / (n l^2)) n / V + residual affine.

    Of packings stopped at 1e-3 to 1e-6 of the mean contact force the tensor was off by 0.02 to 0.9
    of that, of those stopped before their contacts were settled by more.

    Args:
      system: the backbone.
      affine: (d, d, d, d) or (m, m), of the energy a volume.
      motion: (m, n, d) X of each strain.
      max_force: left on a particle.
      residual: of the solves for X, relative.

    Returns:
      (round-off, doubt), the second never below the first. Traceable; it is not differentiated.
    """
    system, affine, motion = jax.lax.stop_gradient((system, affine, motion))
    return _levels(
        system.positions,
        system.volume,
        natural_units(system)[0],
        affine,
        motion,
        max_force,
        residual,
    )


@jax.jit
def _levels(
    positions: jax.Array,
    volume: Any,
    length: Any,
    affine: Any,
    motion: Any,
    max_force: Any,
    residual: Any,
) -> tuple[jax.Array, jax.Array]:
    n, eps = positions.shape[0], jnp.finfo(positions.dtype).eps
    farther = 1.0 + jnp.max(jnp.sum(motion**2, axis=(1, 2))) / (n * length**2)
    size, extent = jnp.max(jnp.abs(affine)), jnp.max(jnp.abs(positions))
    round_off = ROUND_OFF * eps * (1.0 + extent / length) * farther * size
    doubt = MARGIN * max_force * length * farther * n / volume + residual * size
    return round_off, jnp.maximum(round_off, doubt)


@jax.jit
def verdict(tensor: jax.Array, stress: jax.Array, round_off: Any, doubt: Any) -> jax.Array:
    """What a relaxed tensor A under a stress is the stiffness of, as a status.

    FLOPPY where a bulk or a shear modulus, of A or of B, is zero to round-off; STIFFNESS_UNSETTLED
    where its sign is in doubt; UNSTABLE where it is negative: no ratio of the moduli means anything
    then. SHAPE_HELD, a warning, where they are positive and yet some strain costs nothing or lowers
    the enthalpy, the smallest eigenvalue of B not above the doubt: moduli are averages over
    directions, and stay what they are. Most small packings near unjamming are of this kind
    (Dagois-Bohy et al., Phys. Rev. Lett. 109, 095703, 2012).
    """
    tensor, stress, round_off, doubt = jax.lax.stop_gradient((tensor, stress, round_off, doubt))
    seen = birch(tensor, stress)
    moduli = jnp.stack([*isotropic_part(tensor)[:2], *isotropic_part(seen)[:2]])
    nearest = jnp.min(jnp.abs(moduli))
    code = jnp.where(softest_strain(seen) <= doubt, Status.SHAPE_HELD.value, Status.CONVERGED.value)
    code = jnp.where(jnp.min(moduli) < 0, Status.UNSTABLE.value, code)
    code = jnp.where(nearest <= doubt, Status.STIFFNESS_UNSETTLED.value, code)
    code = jnp.where(nearest <= round_off, Status.FLOPPY.value, code)
    finite = jnp.all(jnp.isfinite(tensor)) & jnp.all(jnp.isfinite(stress))
    return jnp.where(finite, code, Status.NOT_FINITE.value).astype(jnp.int32)
