"""Constraints on where particles are: pinned coordinates, walls, rigid bonds and bodies."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.portable import Portable
from mdsens._util.validation import real_array, short
from mdsens.constraints.base import Bounds, Constraint, Displacement, check_name

__all__ = ["Pinned", "RigidBonds", "Wall"]

Params = Mapping[str, Any]
FLAT = 1e-6  # of a body's extent: less does not span a dimension


def _indices(name: str, given: Any, remedy: str) -> np.ndarray:
    array = np.asarray(real_array(name, given, remedy))
    if array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{name} has shape {array.shape} and type {array.dtype}: {remedy}")
    return array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pinned(Portable, Constraint):
    """Coordinates that stay where the system's positions put them.

    Its multiplier is the force (n, d) that the support exerts, dL/dR there, and zero where nothing
    is pinned. Make it with :meth:`particles` or :meth:`coordinates`.

    Attributes:
      mask: (n, d), True where pinned.
      name: of its multiplier.
    """

    mask: jax.Array
    name: str = dataclasses.field(default="pinned", metadata={"static": True})

    @classmethod
    def particles(
        cls,
        indices: Any,
        n: int,
        d: int,
        *,
        axes: Sequence[int] | None = None,
        name: str = "pinned",
    ) -> Pinned:
        """Some particles, whole or along some axes.

        Args:
          indices: which particles; integers from 0.
          n, d: particles and dimensions of the system.
          axes: along which they are pinned; all where None.
          name: of its multiplier.
        """
        which = _indices(
            "Pinned: indices", indices, "give the numbers of some particles, from 0."
        ).ravel()
        if which.min() < 0 or which.max() >= n:
            raise InputError(
                f"Pinned: indices has {which.min()} to {which.max()}: give numbers from 0 to"
                f" {n - 1}."
            )
        along = list(range(d)) if axes is None else np.ravel(np.asarray(axes)).tolist()
        if not along or any(a not in range(d) for a in along):
            raise InputError(f"Pinned: axes is {axes!r}: give some of 0 to {d - 1}, or None.")
        mask = np.zeros((n, d), bool)
        mask[which[:, None], along] = True
        return cls.coordinates(mask, name=name)

    @classmethod
    def coordinates(cls, mask: Any, *, name: str = "pinned") -> Pinned:
        """The coordinates where an (n, d) array of booleans is True."""
        check_name("Pinned", name)
        given = np.asarray(mask)
        if given.dtype != bool or given.ndim != 2 or given.shape[1] not in (2, 3):
            raise InputError(
                f"Pinned: mask has shape {given.shape} and type {given.dtype}: give (n, d)"
                " booleans."
            )
        return cls(jnp.asarray(given), name)

    def check(self, params: Params, n: int, d: int) -> None:
        if self.mask.shape != (n, d):
            raise InputError(f"{self.name}: the mask has shape {self.mask.shape}: give ({n}, {d}).")

    def pinned(self) -> jax.Array:
        return self.mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Wall(Constraint):
    """A hard plane across an axis that particles cannot pass: x >= w + c sigma / 2, or x <= w - c
    sigma / 2.

    w is the parameter ``<name>_position``, a scalar or one value a particle, so that any bounds on
    coordinates can be given. Its multiplier is the force (n,) with which the wall pushes each
    particle, zero or more; walls at one place share it.

    Attributes:
      axis: 0, 1 or 2.
      above: True where particles are above the wall, at larger coordinates.
      name: of its multiplier and parameter.
      clearance: c, of a particle's radius sigma / 2: 1 for a wall that stops surfaces, 0 for one
        that stops centers. A sigma that :class:`FixedTotal` relaxes has none.
    """

    axis: int = dataclasses.field(metadata={"static": True})
    above: bool = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(default="wall", metadata={"static": True})
    clearance: float = dataclasses.field(default=0.0, metadata={"static": True})

    def __post_init__(self) -> None:
        check_name("Wall", self.name)
        if isinstance(self.axis, bool) or self.axis not in (0, 1, 2):
            raise InputError(f"Wall: axis is {short(self.axis)}: give 0, 1 or 2.")
        if not isinstance(self.above, bool):
            raise InputError(
                f"Wall: above is {short(self.above)}: give True where particles are above the wall."
            )
        if not (isinstance(self.clearance, int | float) and 0.0 <= self.clearance < np.inf):
            raise InputError(
                f"Wall: clearance is {short(self.clearance)}: give 0 or more, in radii."
            )

    @property
    def position(self) -> str:
        """The name of its parameter."""
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
                f"{self.name}: axis is {self.axis} in {d} dimensions: give 0 to {d - 1}."
            )
        if np.shape(params[self.position]) not in ((), (n,)):
            raise InputError(
                f"parameter {self.position} has shape {np.shape(params[self.position])}: give a"
                f" scalar, or ({n},) for one a particle."
            )
        if self.clearance and "sigma" not in params:
            raise InputError(
                f"{self.name}: clearance needs the parameter 'sigma', which the potential has not: leave"
                " it 0."
            )

    def bounds(self, params: Params, diameters: jax.Array | None, shape: tuple[int, ...]) -> Bounds:
        at = jnp.broadcast_to(params[self.position], shape[:1])
        if self.clearance and diameters is not None:
            at = at + (0.5 if self.above else -0.5) * self.clearance * diameters
        free = jnp.full(shape, jnp.inf, at.dtype)
        if self.above:
            return Bounds((-free).at[:, self.axis].set(at), free)
        return Bounds(-free, free.at[:, self.axis].set(at))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RigidBonds(Portable, Constraint):
    """Distances that cannot change: r_ij = l_ij, nearest images, for each bond of a list.

    l is the parameter ``<name>_length``, a scalar or one value a bond. Its multiplier is the
    tension (m,) of each bond, positive where it pulls its ends together: the energy of the minimum
    changes by -tension with a bond's length.

    Attributes:
      bonds: (m, 2) particles.
      name: of its multiplier and parameter.
    """

    bonds: jax.Array
    name: str = dataclasses.field(default="bond", metadata={"static": True})

    @classmethod
    def between(cls, bonds: Any, *, name: str = "bond") -> RigidBonds:
        """The bonds of a list (m, 2) of particle numbers from 0, checked."""
        check_name("RigidBonds", name)
        pairs = _indices("RigidBonds: bonds", bonds, "give (m, 2) particle numbers from 0.")
        if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.min() < 0:
            raise InputError(
                f"RigidBonds: bonds have shape {pairs.shape}: give (m, 2) particle numbers from 0."
            )
        if np.any(pairs[:, 0] == pairs[:, 1]):
            k = int(np.argmax(pairs[:, 0] == pairs[:, 1]))
            raise InputError(
                f"RigidBonds: bond {k} joins particle {pairs[k, 0]} to itself: give two particles."
            )
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
        cls, positions: Any, members: Sequence[Sequence[int]], *, name: str = "bond"
    ) -> RigidBonds:
        """Bonds that make rigid bodies of some particles each: as many as it takes, and no more.

        The first d + 1 particles that span a body are bonded all to all, each further one to d of
        them: in all d m - d (d + 1) / 2 bonds for m particles, so that no distance is fixed twice.

        Args:
          positions: (n, d), with each body in one piece.
          members: the particles of each body, at least two.
          name: of the multiplier and parameter.
        """
        x = np.asarray(real_array("positions", positions, "give (n, d) numbers."), float)
        bonds: list[tuple[int, int]] = []
        if x.ndim != 2:
            raise InputError(f"positions has shape {x.shape}: give (n, d) numbers.")
        for k, body in enumerate(members if isinstance(members, Iterable) else [members]):
            need = "give a list of bodies, each the numbers of two or more particles."
            some = _indices(f"RigidBonds: body {k}", body, need).ravel().tolist()
            if len(set(some)) != len(some) or len(some) < 2 or min(some) < 0 or max(some) >= len(x):
                raise InputError(
                    f"RigidBonds: body {k} is {some}: give two or more particles, each once."
                )
            bonds += _isostatic(x, some, k)
        return cls.between(bonds, name=name)

    @property
    def length(self) -> str:
        """The name of its parameter."""
        return f"{self.name}_length"

    @property
    def parameters(self) -> tuple[str, ...]:
        return (self.length,)

    def lengths_of(self, positions: Any) -> np.ndarray:
        """(m,) the bonds' lengths at some positions, each bond in one piece: what ``<name>_length``
        may be set to.
        """
        x, bonds = np.asarray(positions, float), np.asarray(self.bonds)
        return np.linalg.norm(x[bonds[:, 0]] - x[bonds[:, 1]], axis=1)

    def check(self, params: Params, n: int, d: int) -> None:
        m = self.bonds.shape[0]
        if int(np.max(np.asarray(self.bonds))) >= n:
            raise InputError(
                f"{self.name}: bonds go up to particle {int(np.max(np.asarray(self.bonds)))} of"
                f" {n}."
            )
        length = np.asarray(params[self.length])
        if length.shape not in ((), (m,)):
            raise InputError(
                f"parameter {self.length} has shape {length.shape}: give a scalar, or ({m},) for"
                " the bonds."
            )
        if not (length > 0).all():
            raise InputError(f"parameter {self.length} has {length.min()}: give positive lengths.")

    def reach(self, params: Params) -> float:
        return float(np.max(np.asarray(params[self.length])))

    def residuals(
        self, positions: jax.Array, params: Params, displacement: Displacement
    ) -> jax.Array:
        i, j = self.bonds[:, 0], self.bonds[:, 1]
        r = jnp.sqrt(jnp.sum(displacement(positions[i], positions[j]) ** 2, axis=-1))
        return r - params[self.length]


def _isostatic(x: np.ndarray, body: list[int], k: int) -> list[tuple[int, int]]:
    """Bonds of one body: all of a simplex, and each further particle to the corners from which it
    is best seen.
    """
    d = x.shape[1]
    corners, others = body[:1], []
    for i in body[1:]:
        arms = x[[*corners[1:], i]] - x[corners[0]]
        spread = np.linalg.svd(arms, compute_uv=False)
        new = len(corners) <= d and spread[-1] > FLAT * spread[0]
        (corners if new else others).append(i)
    if others and len(corners) <= d:
        raise InputError(
            f"RigidBonds: the particles of body {k} lie on a"
            f" {'line' if len(corners) == 2 else 'plane'}, and bonds along it do not keep it"
            " straight: leave out some, or give one more beside it."
        )
    bonds = list(itertools.combinations(corners, 2))
    for i in others:

        def seen(some: tuple[int, ...], i: int = i) -> float:
            arms = x[list(some)] - x[i]
            return float(
                np.linalg.svd(arms / np.linalg.norm(arms, axis=1)[:, None], compute_uv=False)[-1]
            )

        bonds += [(a, i) for a in max(itertools.combinations(corners, d), key=seen)]
    return bonds
