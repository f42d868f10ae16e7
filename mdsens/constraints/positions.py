"""Constraints on positions: pinned coordinates, walls, rigid bonds and bodies."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from mdsens._util.errors import InputError
from mdsens._util.portable import Portable
from mdsens._util.validation import is_number, real_array, short
from mdsens.constraints.base import Bounds, Constraint, Displacement, check_name

__all__ = ["Pinned", "RigidBonds", "Wall"]

Params = Mapping[str, Any]
# Thickness of a body as a share of its extent, below which it does not span that dimension.
FLAT = 1e-6


def _indices(name: str, value: ArrayLike, remedy: str) -> np.ndarray:
    """Check the particle indices that a user gives, and return them as an array of integers."""
    array = np.asarray(real_array(name, value, remedy))
    if array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{name} has shape {array.shape} and type {array.dtype}: {remedy}")
    return array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pinned(Portable, Constraint):
    """Constraint that keeps coordinates at their values in the system's positions.

    The Lagrange multiplier is the force (n, d) that holds the pinned coordinates in place. This is
    the derivative, by the pinned coordinates, of the energy plus the terms of the other constraints
    (multiplier times residual); it is zero for coordinates that are not pinned. Make the constraint
    with ``Pinned.particles`` or ``Pinned.coordinates``.

    Attributes:
      mask: (n, d), True where a coordinate is pinned.
      name: name under which the multiplier is stored.
    """

    mask: jax.Array
    name: str = dataclasses.field(default="pinned", metadata={"static": True})

    @classmethod
    def particles(
        cls,
        indices: ArrayLike,
        n: int,
        d: int,
        *,
        axes: Sequence[int] | None = None,
        name: str = "pinned",
    ) -> Pinned:
        """Pin some particles, in all their coordinates or along some axes.

        Args:
          indices: indices of the particles, integers from 0.
          n, d: numbers of particles and of dimensions of the system.
          axes: the axes along which the particles are pinned; None for all axes.
          name: name under which the multiplier is stored.
        """
        remedy = "give the numbers of some particles, from 0."
        which = _indices("Pinned: indices", indices, remedy).ravel()
        if which.min() < 0 or which.max() >= n:
            raise InputError(
                f"Pinned: `indices` go from {which.min()} to {which.max()}: give numbers from 0 to"
                f" {n - 1}."
            )
        along = list(range(d)) if axes is None else np.ravel(np.asarray(axes)).tolist()
        if not along or any(a not in range(d) for a in along):
            raise InputError(f"Pinned: `axes` is {axes!r}: give some of 0 to {d - 1}, or None.")
        mask = np.zeros((n, d), bool)
        mask[which[:, None], along] = True  # every particle with every axis
        return cls.coordinates(mask, name=name)

    @classmethod
    def coordinates(cls, mask: ArrayLike, *, name: str = "pinned") -> Pinned:
        """Pin the coordinates for which ``mask``, an (n, d) array of booleans, is True."""
        check_name("Pinned", name)
        array = np.asarray(mask)
        if array.dtype != bool or array.ndim != 2 or array.shape[1] not in (2, 3):
            raise InputError(
                f"Pinned: `mask` has shape {array.shape} and type {array.dtype}: give (n, d)"
                " booleans."
            )
        return cls(jnp.asarray(array), name)

    def check(self, params: Params, n: int, d: int) -> None:
        if self.mask.shape != (n, d):
            raise InputError(f"{self.name}: `mask` has shape {self.mask.shape}: give ({n}, {d}).")

    def pinned(self) -> jax.Array:
        return self.mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Wall(Constraint):
    """A hard plane perpendicular to an axis, which particles cannot pass.

        x >= w + c sigma / 2  (above),      x <= w - c sigma / 2  (below)

    x is the coordinate of a particle along the axis, and sigma the diameter of the particle. The
    position w of the wall is the parameter ``<name>_position``, a scalar or one value per particle,
    so that any bounds on coordinates can be given. The Lagrange multiplier of a wall is the force
    (n,) with which the wall pushes each particle, zero or more; walls at the same place share this
    force.

    Attributes:
      axis: the axis perpendicular to the wall, 0, 1 or 2.
      above: True if particles are above the wall, at larger coordinates.
      name: name under which the multiplier is stored, and beginning of the parameter's name.
      clearance: c, in units of a particle's radius sigma / 2: 1 for a wall that stops surfaces, 0
        for one that stops centers. c must be 0 if :class:`FixedTotal` relaxes sigma.
    """

    axis: int = dataclasses.field(metadata={"static": True})
    above: bool = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(default="wall", metadata={"static": True})
    clearance: float = dataclasses.field(default=0.0, metadata={"static": True})

    def __post_init__(self) -> None:
        check_name("Wall", self.name)
        # for Python, True is a 1
        if isinstance(self.axis, bool) or self.axis not in (0, 1, 2):
            raise InputError(f"Wall: `axis` is {short(self.axis)}: give 0, 1 or 2.")
        if not isinstance(self.above, bool):
            raise InputError(
                f"Wall: `above` is {short(self.above)}: give True if particles are above the wall,"
                " else False."
            )
        if not (is_number(self.clearance) and 0.0 <= self.clearance < np.inf):
            raise InputError(
                f"Wall: `clearance` is {short(self.clearance)}: give 0 or more, in radii."
            )

    @property
    def position(self) -> str:
        """Name of the parameter that gives the position of the wall."""
        return f"{self.name}_position"

    @property
    def parameters(self) -> tuple[str, ...]:
        return (self.position,)

    @property
    def bounded_by(self) -> tuple[str, ...]:
        return ("sigma",) if self.clearance else ()

    def check(self, params: Params, n: int, d: int) -> None:
        if self.axis >= d:
            raise InputError(
                f"{self.name}: `axis` is {self.axis} in {d} dimensions: give 0 to {d - 1}."
            )
        if np.shape(params[self.position]) not in ((), (n,)):
            raise InputError(
                f"parameter {self.position} has shape {np.shape(params[self.position])}: give a"
                f" scalar, or ({n},) for one value per particle."
            )
        if self.clearance and "sigma" not in params:
            raise InputError(
                f"{self.name}: `clearance` needs the parameter 'sigma', which the potential lacks:"
                " leave `clearance` 0."
            )

    def bounds(self, params: Params, diameters: jax.Array | None, shape: tuple[int, ...]) -> Bounds:
        limit = jnp.broadcast_to(params[self.position], shape[:1])
        if self.clearance and diameters is not None:
            limit = limit + (0.5 if self.above else -0.5) * self.clearance * diameters
        # only the coordinates along the axis are bounded, and only to one side
        unbounded = jnp.full(shape, jnp.inf, limit.dtype)
        if self.above:
            return Bounds((-unbounded).at[:, self.axis].set(limit), unbounded)
        return Bounds(-unbounded, unbounded.at[:, self.axis].set(limit))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RigidBonds(Portable, Constraint):
    """Constraint that fixes the distance of two particles, r_ij = l_ij, for each bond of a list.

    r_ij is the distance between nearest images. The lengths l_ij are the parameter
    ``<name>_length``, a scalar or one value per bond. The Lagrange multiplier is the tension of
    each bond, (m,), positive if the bond pulls the two particles together: the derivative of the
    relaxed energy by a bond's length is -tension.

    Attributes:
      bonds: (m, 2) indices of the two particles of each bond.
      name: name under which the multiplier is stored, and beginning of the parameter's name.
    """

    bonds: jax.Array
    name: str = dataclasses.field(default="bond", metadata={"static": True})

    @classmethod
    def between(cls, bonds: ArrayLike, *, name: str = "bond") -> RigidBonds:
        """Make rigid bonds between listed pairs (m, 2) of particle indices from 0."""
        check_name("RigidBonds", name)
        pairs = _indices("RigidBonds: bonds", bonds, "give (m, 2) particle numbers from 0.")
        if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.min() < 0:
            raise InputError(
                f"RigidBonds: `bonds` has shape {pairs.shape}: give (m, 2) particle numbers from 0."
            )
        if np.any(pairs[:, 0] == pairs[:, 1]):
            k = int(np.argmax(pairs[:, 0] == pairs[:, 1]))
            raise InputError(
                f"RigidBonds: bond {k} joins particle {pairs[k, 0]} to itself: give two particles."
            )
        # a bond listed twice, in either order, would fix one distance twice
        _, first, times = np.unique(
            np.sort(pairs, axis=1), axis=0, return_index=True, return_counts=True
        )
        k = int(np.argmax(times))
        if times[k] > 1:
            i, j = pairs[first[k]]
            raise InputError(
                f"RigidBonds: the bond of particles {i} and {j} is given {times[k]} times: give it"
                " once."
            )
        return cls(jnp.asarray(pairs, jnp.int32), name)

    @classmethod
    def bodies(
        cls, positions: ArrayLike, members: Sequence[Sequence[int]], *, name: str = "bond"
    ) -> RigidBonds:
        """Make the smallest set of rigid bonds that makes each group of particles a rigid body.

        In d dimensions, the first d + 1 particles that span a body are bonded all to all, and each
        further particle is bonded to d of these. A body of m particles gets d m - d (d + 1) / 2
        bonds, none of them redundant.

        Args:
          positions: (n, d) positions, with each body in one piece, not split by the periodic
            boundary.
          members: the indices of the particles of each body, at least two.
          name: name under which the multiplier is stored, and beginning of the parameter's name.
        """
        x = np.asarray(real_array("positions", positions, "give (n, d) numbers."), float)
        bonds: list[tuple[int, int]] = []
        if x.ndim != 2:
            raise InputError(f"`positions` has shape {x.shape}: give (n, d) numbers.")
        for k, body in enumerate(members if isinstance(members, Iterable) else [members]):
            need = "give a list of bodies, each the numbers of two or more particles."
            numbers = _indices(f"RigidBonds: body {k}", body, need).ravel().tolist()
            distinct = len(set(numbers)) == len(numbers)
            if not distinct or len(numbers) < 2 or min(numbers) < 0 or max(numbers) >= len(x):
                raise InputError(
                    f"RigidBonds: body {k} is {numbers}: give two or more particles, each once."
                )
            if len(np.unique(x[numbers], axis=0)) < len(numbers):
                raise InputError(
                    f"RigidBonds: two particles of body {k}, {numbers}, are at the same position:"
                    " give positions that are apart."
                )
            bonds += _isostatic_bonds(x, numbers, k)
        return cls.between(bonds, name=name)

    @property
    def length(self) -> str:
        """Name of the parameter that gives the lengths of the bonds."""
        return f"{self.name}_length"

    @property
    def parameters(self) -> tuple[str, ...]:
        return (self.length,)

    def lengths_of(self, positions: ArrayLike) -> np.ndarray:
        """Compute the length of each rigid bond at ``positions`` (n, d), as an array (m,).

        The array can be given as the parameter of the bond lengths. Each bond must be in one piece,
        not split by the periodic boundary.
        """
        x = np.asarray(positions, float)
        bonds = np.asarray(self.bonds)
        return np.linalg.norm(x[bonds[:, 0]] - x[bonds[:, 1]], axis=1)

    def check(self, params: Params, n: int, d: int) -> None:
        m = self.bonds.shape[0]
        largest = int(np.max(np.asarray(self.bonds)))
        if largest >= n:
            raise InputError(
                f"{self.name}: `bonds` names particle {largest} of {n}: give numbers from 0 to"
                f" {n - 1}."
            )
        length = np.asarray(params[self.length])
        if length.shape not in ((), (m,)):
            raise InputError(
                f"parameter {self.length} has shape {length.shape}: give a scalar, or ({m},) for"
                " one value per bond."
            )
        if not (length > 0).all():
            raise InputError(f"parameter {self.length} has {length.min()}: give positive lengths.")

    def reach(self, params: Params) -> float:
        return float(np.max(np.asarray(params[self.length])))

    def residuals(
        self, positions: jax.Array, params: Params, displacement: Displacement
    ) -> jax.Array:
        i, j = self.bonds[:, 0], self.bonds[:, 1]
        # no guard of sqrt(0): lengths are positive, so the ends of a bond that holds do not meet
        r = jnp.sqrt(jnp.sum(displacement(positions[i], positions[j]) ** 2, axis=-1))
        # With this sign the multiplier is a tension: positive where the bond pulls.
        return r - params[self.length]


def _isostatic_bonds(x: np.ndarray, body: list[int], k: int) -> list[tuple[int, int]]:
    """Choose the bonds that make a group of particles a rigid body, none of them redundant.

    The first d + 1 particles that span the body, its corners, are bonded all to all. Each further
    particle is bonded to the d corners that determine its position best.

    Args:
      x: (n, d) positions.
      body: indices of the particles of the body.
      k: number of the body, for the error message.
    """
    d = x.shape[1]
    corners = body[:1]
    others = []
    for i in body[1:]:
        # the particle is a new corner if it adds a dimension to what the corners span
        arms = x[[*corners[1:], i]] - x[corners[0]]
        # Singular values come in descending order. With more arms than dimensions the last one is
        # not zero although the new arm adds nothing: hence the test of the number of corners.
        spread = np.linalg.svd(arms, compute_uv=False)
        adds_dimension = len(corners) <= d and spread[-1] > FLAT * spread[0]
        (corners if adds_dimension else others).append(i)
    if others and len(corners) <= d:
        raise InputError(
            f"RigidBonds: the particles of body {k} lie on a"
            f" {'line' if len(corners) == 2 else 'plane'}, which bonds between them do not keep"
            " straight: leave some of the particles out, or add a particle beside them."
        )
    bonds = list(itertools.combinations(corners, 2))
    # i = i below binds the i of this turn; a closure looks its variables up only when called.
    for i in others:

        def conditioning(ends: tuple[int, ...], i: int = i) -> float:
            """Compute how well bonds from particle i to the particles ``ends`` fix its position.

            The result is the least singular value of the unit vectors from particle i to the other
            particles; the larger it is, the better do the bonds determine the position.
            """
            arms = x[list(ends)] - x[i]
            directions = arms / np.linalg.norm(arms, axis=1)[:, None]
            return float(np.linalg.svd(directions, compute_uv=False)[-1])

        ends = max(itertools.combinations(corners, d), key=conditioning)
        bonds += [(corner, i) for corner in ends]
    return bonds
