"""The space of a certificate: positions and, at a pressure, the cell's strain, with one norm and
one solve for both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mdsens.mechanics import contact_changes, lagrangian
from mdsens.mechanics.contact_changes import Crossing
from mdsens.mechanics.hessian import Unknowns, force
from mdsens.mechanics.kkt_operator import flat
from mdsens.mechanics.status import Status
from mdsens.sensitivity.linearization import Linearization

__all__ = ["Motion", "Space", "on_host"]

Params = Mapping[str, Any]
Motion: TypeAlias = tuple[Unknowns, Params]  # of the unknowns and the parameters


@jax.jit
def _product(lin: Linearization, x: Unknowns) -> Unknowns:
    return jax.jvp(lambda y: lin.condition(y, lin.params), (lin.unknowns,), (x,))[1]


@jax.jit
def _second(lin: Linearization, first: Motion, second: Motion) -> Unknowns:
    def along(*place: Any) -> Unknowns:
        return jax.jvp(lin.condition, place, first)[1]

    return jax.jvp(along, (lin.unknowns, lin.params), second)[1]


@jax.jit
def _condition(lin: Linearization) -> Unknowns:
    return lin.condition(lin.unknowns, lin.params)


@jax.jit
def _constrained_side(lin: Linearization, tangent: Params) -> tuple[Unknowns, Unknowns]:
    structure: Any = lin.structure
    return structure.motion(lin, tangent), structure.parameter_side(lin, tangent)


@jax.jit
def _switch_times(lin: Linearization, x: Unknowns, tangent: Params) -> jax.Array:
    return lagrangian.switch_times(
        lin.system, (lin.unknowns, lin.params), (x, dict(tangent)), lin.network.rattlers
    )


def on_host(f: Callable[..., np.ndarray], *changes: Unknowns) -> Unknowns:
    """f of each part, by numpy: what jax would compile for it is not worth it."""
    return jax.tree.map(lambda *leaves: f(*(np.asarray(leaf) for leaf in leaves)), *changes)


class Space:
    """The unknowns of a minimum, the norms of their changes and of forces on them, and the solves
    between the two.

    In a given cell they are the positions. At a pressure a strain joins them, and counts as the
    motion that it gives to n particles spread evenly over the cell: |x|^2 = |dR|^2 + l^2
    |strain|^2, l^2 = n V^(2/d) / 12.

    Args:
      lin: the minimum.
      factor: of its Hessian in a fixed cell, a HessianFactor; under constraints a KKT.
    """

    def __init__(self, lin: Linearization, factor: Any):
        self.lin = lin
        self.factor = factor
        self.core = lin.traced(tuple(lin.system.params))
        n, d = lin.system.positions.shape
        self.length = (
            1.0 if lin.cell is None else (n / 12.0) ** 0.5 * float(lin.system.volume) ** (1.0 / d)
        )

    @property
    def still(self) -> Unknowns:
        """No change of the unknowns."""
        return on_host(np.zeros_like, self.lin.unknowns)

    def forces(self) -> Unknowns:
        """What is left to fall: the forces on the particles, and on the cell."""
        cell = self.lin.cell
        if self.lin.constrained:
            return on_host(np.negative, self.lin.null.free(_condition(self.core)))
        return Unknowns(force(self.lin.system), None if cell is None else -cell.slope)

    def size(self, x: Unknowns) -> float:
        """The norm of a change of the unknowns; of parameters that constraints relax as well, not
        of multipliers.
        """
        others = sum(float(np.sum(np.asarray(v) ** 2)) for v in jax.tree.leaves(x.params))
        return float(np.hypot(_norm(x.positions, x.strain, self.length), others**0.5))

    def strength(self, forces: Unknowns) -> float:
        """The norm of forces on the unknowns, off the null space; under constraints on the tangent
        space.
        """
        if self.lin.constrained:
            g = [
                self.factor.unit * np.ravel(np.asarray(leaf))
                for leaf in jax.tree.leaves(forces.multipliers)
            ]
            return float(np.linalg.norm(np.concatenate([self._tangent(forces), *g])))
        return _norm(self._off_null(forces.positions), forces.strain, 1.0 / self.length)

    def onward(self, forces: Unknowns) -> Unknowns:
        """The change of the unknowns that points where forces do, of a norm that is their strength."""
        if self.lin.constrained:
            kept = self.factor.unflat(self._tangent(forces))
            return on_host(lambda leaf: leaf.astype(self.lin.system.positions.dtype), kept)
        kept = dataclasses.replace(forces, positions=self._off_null(forces.positions))
        if kept.strain is not None:
            kept = dataclasses.replace(kept, strain=np.asarray(kept.strain) / self.length**2)
        dtype = self.lin.system.positions.dtype
        return on_host(lambda leaf: leaf.astype(dtype), kept)

    def solve(self, forces: Unknowns, rtol: float = 1e-12) -> tuple[Unknowns, float, Status]:
        """How the unknowns yield to forces: ``(x, relative residual, status)``."""
        x, residual, status = self.yields(forces, rtol)
        if self.lin.cell is None:
            return x, residual, status
        whole = self.strength(forces)
        rest = on_host(np.subtract, forces, _product(self.core, x))
        return (
            x,
            self.strength(rest) / whole if whole else 0.0,
            Status.worst_of([status, int(self.lin.cell.status)]),
        )

    def yields(self, forces: Unknowns, rtol: float = 1e-12) -> tuple[Unknowns, float, Status]:
        """The same, with the residual and status of the positions' solve alone."""
        if self.lin.constrained:
            return self.factor.solve_unknowns(self.lin.null.free(forces), rtol)
        found, residual, status = self.factor.solve(np.asarray(forces.positions), rtol)
        x = self.lin.structure.solved(
            forces, Unknowns(jnp.asarray(found, self.lin.system.positions.dtype))
        )
        return x, residual, status

    def response(self, tangent: Params, pull: Unknowns) -> tuple[Unknowns, float, Status]:
        """How the unknowns move along a direction: ``(x, relative residual, status)``.

        Args:
          pull: the derivative of the condition along it, the unknowns held.
        """
        if not self.lin.constrained:
            return self.solve(on_host(np.negative, pull))
        moves, side = _constrained_side(self.core, tangent)
        x, residual, status = self.solve(side)
        return on_host(np.add, moves, x), residual, status

    def switches(self, x: Unknowns, tangent: Params) -> tuple[float, float]:
        """The first t > 0 and -t > 0 at which a coordinate meets or leaves its bound; inf without
        bounds.
        """
        if not self.lin.constrained:
            return np.inf, np.inf
        times = np.asarray(_switch_times(self.core, x, tangent))
        ahead, behind = times[times >= 0], -times[times <= 0]
        return float(np.min(ahead, initial=np.inf)), float(np.min(behind, initial=np.inf))

    def second(self, first: Motion, second: Motion) -> Unknowns:
        """The second derivative of the condition by (unknowns, params) along two directions."""
        return _second(self.core, first, second)

    def crossings(self, x: Unknowns, tangent: Params) -> Crossing:
        """Where pairs cross a breakpoint along a change of the unknowns and of the parameters.

        Of the full system's pairs: what a rattler's neighbors do is left out by name.
        """
        eq, cell = self.lin.equilibrium, self.lin.cell
        own = {name: (x.params or {}).get(name, tangent.get(name)) for name in eq.system.params}
        strain = (
            None
            if cell is None
            else np.tensordot(np.asarray(x.strain), np.asarray(cell.along), axes=1)
        )
        return contact_changes.crossings(
            eq.system, x.positions, own, self.lin.network.rattlers, strain
        )

    def least(self, stiffness: float) -> float:
        """The smallest stiffness of all unknowns together, from that of the positions; 0 where it
        is not positive.

        At a pressure a lower bound, within a factor of 2: the inverse is H^+ + Y S^-1 Y^T, Y = (X,
        1), two parts neither of which is negative, so that its norm is at most the sum of theirs
        and at least the larger.
        """
        cell = self.lin.cell
        if cell is None or stiffness <= 0.0:
            return max(stiffness, 0.0)
        if not Status(int(cell.status)).good:
            return 0.0
        moved = np.asarray(cell.motion, float).reshape(len(cell.along), -1)
        metric = moved @ moved.T + self.length**2 * np.eye(len(moved))
        yields = np.linalg.eigvals(np.asarray(cell.compliance, float) @ metric).real.max()
        return 1.0 / (1.0 / stiffness + float(yields))

    def _tangent(self, forces: Unknowns) -> np.ndarray:
        return self.factor.tangent(flat(dataclasses.replace(forces, multipliers=None)))

    def _off_null(self, positions: Any) -> np.ndarray:
        flat = np.asarray(positions).ravel()
        return self.factor.project(flat).reshape(positions.shape)


def _norm(positions: Any, strain: Any, length: float) -> float:
    size = float(np.linalg.norm(np.asarray(positions)))
    return (
        size
        if strain is None
        else float(np.hypot(size, length * np.linalg.norm(np.asarray(strain))))
    )
