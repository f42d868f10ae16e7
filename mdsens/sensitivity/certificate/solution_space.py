"""Displacements of particles and cell at a minimum: their norm and linear solves for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jax.typing import ArrayLike

from mdsens._util.compilation import compiled
from mdsens._util.pytree import PyTree
from mdsens.mechanics import contact_changes, lagrangian
from mdsens.mechanics.contact_changes import Crossing
from mdsens.mechanics.hessian import force, hessian_change
from mdsens.mechanics.hessian_factor import HessianFactor
from mdsens.mechanics.kkt_factor import KKT
from mdsens.mechanics.status import Status
from mdsens.mechanics.unknowns import Unknowns, flat
from mdsens.sensitivity.linearization import Linearization

__all__ = ["Motion", "Space", "on_host"]

Params = Mapping[str, Any]
# A change of the unknowns and of the parameters.
Motion: TypeAlias = tuple[Unknowns, Params]
# Number of coordinates up to which the derivative of the Hessian is not assembled: 30 products with
# it take less time than compiling its assembly.
SMALL = 1500


@compiled
def _product(lin: Linearization, x: Unknowns) -> Unknowns:
    """Multiply the derivative of the condition F of a minimum with a change x of the unknowns.

    F = 0 at the minimum. The unknowns are positions, strain and multipliers; in a fixed cell the
    derivative of F by them is the Hessian.
    """
    return jax.jvp(lambda y: lin.condition(y, lin.params), (lin.unknowns,), (x,))[1]


@compiled
def _second_derivative(lin: Linearization, first: Motion, second: Motion) -> Unknowns:
    def first_derivative(x: Unknowns, params: Params) -> Unknowns:
        return jax.jvp(lin.condition, (x, params), first)[1]

    return jax.jvp(first_derivative, (lin.unknowns, lin.params), second)[1]


@compiled
def _condition(lin: Linearization) -> Unknowns:
    """Evaluate the condition F of a minimum, such as dU/dR; it is zero at the exact minimum."""
    return lin.condition(lin.unknowns, lin.params)


@compiled
def _constrained_side(lin: Linearization, tangent: Params) -> tuple[Unknowns, Unknowns]:
    """Compute the motion of the constrained coordinates, and the right-hand side for the others.

    Constrained coordinates are pinned or at a bound, and follow the parameters alone; the others
    follow from a linear solve with this right-hand side. ``tangent`` holds the changes of the
    parameters by name.
    """
    structure: Any = lin.structure
    return structure.motion(lin, tangent), structure.parameter_side(lin, tangent)


@compiled
def _switch_times(lin: Linearization, x: Unknowns, tangent: Params) -> jax.Array:
    return lagrangian.switch_times(
        lin.system, (lin.unknowns, lin.params), (x, dict(tangent)), lin.network.rattlers
    )


def on_host(f: Callable[..., np.ndarray], *changes: PyTree) -> Any:
    """Apply ``f`` to each array of ``changes`` by numpy, since compiling ``f`` by jax takes longer.

    Each of ``changes`` is an array or a record of arrays: positions, strain, parameters and
    multipliers. The positions of the result are ``f(*positions of all changes)``, and so on for the
    other arrays.
    """
    return jax.tree.map(lambda *leaves: f(*(np.asarray(leaf) for leaf in leaves)), *changes)


class Space:
    """Norms of displacements and of forces at a minimum, and linear solves between the two.

    In a fixed cell the unknowns are the positions R. In a relaxed cell they contain a strain of the
    cell, which counts as the motion that it causes in n particles spread evenly over the cell: a
    change x of the unknowns has the norm |x|^2 = |dR|^2 + l^2 |strain|^2, l^2 = n V^(2/d) / 12,
    with the volume V in dimension d. (V^(2/d) / 12 is the variance of one coordinate over a cube of
    volume V.)

    Args:
      lin: the linearization of the minimum.
      factor: a factor of the Hessian in a fixed cell; under constraints, of the whole system of
        equations.
    """

    # A KKT has methods that a HessianFactor lacks; ``lin.constrained`` decides which are used.
    def __init__(self, lin: Linearization, factor: HessianFactor | KKT):
        self.lin = lin
        self.factor: Any = factor
        # the form for compiled code, where all parameters may be differentiated
        self.core = lin.traced(tuple(lin.system.params))
        n, d = lin.system.positions.shape
        self.length = 1.0
        if lin.cell is not None:
            self.length = (n / 12.0) ** 0.5 * float(lin.system.periodic_volume) ** (1.0 / d)

    @property
    def still(self) -> Unknowns:
        """Return a change of positions, strain and multipliers that is zero."""
        return on_host(np.zeros_like, self.lin.unknowns)

    def forces(self) -> Unknowns:
        """Compute the forces left on the particles and on the cell; zero at the exact minimum."""
        cell = self.lin.cell
        if self.lin.constrained:
            return on_host(np.negative, self.lin.null.free(_condition(self.core)))
        return Unknowns(force(self.lin.system), None if cell is None else -cell.slope)

    def size(self, x: Unknowns, tangent: Params | None = None) -> float:
        """Compute the norm of a displacement of particles and cell.

        Parameters that constraints relax contribute to the norm; multipliers of constraints do not.

        Args:
          x: the displacement.
          tangent: changes of the parameters by name, some of which may strain the cell themselves;
            None for no change.
        """
        of_params = sum(float(np.sum(np.asarray(v) ** 2)) for v in jax.tree.leaves(x.params))
        strain = self.lin.structure.strain(self.lin, x, tangent) if tangent else x.strain
        return float(np.hypot(_norm(x.positions, strain, self.length), of_params**0.5))

    def strength(self, forces: Unknowns) -> float:
        """Compute the norm of forces on particles and cell, without their part in the null space.

        The null space is that of the Hessian. Under constraints the norm is that of the forces'
        part along the tangent space and of the residuals of the constraints' equations together.
        """
        if self.lin.constrained:
            # times the potential's stiffness, the residuals g of the equations are forces
            g = [
                self.factor.unit * np.ravel(np.asarray(leaf))
                for leaf in jax.tree.leaves(forces.multipliers)
            ]
            return float(np.linalg.norm(np.concatenate([self._tangent(forces), *g])))
        # The norm dual to ``size``: a force on the strain is an energy, and over l it is a force.
        return _norm(self._off_null(forces.positions), forces.strain, 1.0 / self.length)

    def onward(self, forces: Unknowns) -> Unknowns:
        """Return the displacement that is parallel to given forces and has the norm of the forces.

        The norms are those that the methods ``size`` (for displacements of particles and cell) and
        ``strength`` (for forces) compute. Parts of the forces in the null space or along
        constraints are left out.
        """
        dtype = self.lin.system.positions.dtype
        if self.lin.constrained:
            change = self.factor.unflat(self._tangent(forces))
            return on_host(lambda leaf: leaf.astype(dtype), change)
        change = dataclasses.replace(forces, positions=self._off_null(forces.positions))
        if change.strain is not None:
            # size of the change: l |strain| / l^2, strength of the forces: |strain| / l
            change = dataclasses.replace(change, strain=np.asarray(change.strain) / self.length**2)
        return on_host(lambda leaf: leaf.astype(dtype), change)

    def solve(self, forces: Unknowns, rtol: float = 1e-12) -> tuple[Unknowns, float, Status]:
        """Compute the displacement of particles and cell under forces, by a linear solve.

        Args:
          forces: forces on the particles and on the cell.
          rtol: relative residual to which the solve is carried.

        Returns:
          the displacement, the relative residual and the status. In a relaxed cell the residual is
          that of positions and cell together.
        """
        x, residual, status = self.yields(forces, rtol)
        if self.lin.cell is None:
            return x, residual, status
        total = self.strength(forces)
        unbalanced = on_host(np.subtract, forces, _product(self.core, x))
        residual = self.strength(unbalanced) / total if total else 0.0
        return x, residual, Status.worst_of([status, int(self.lin.cell.status)])

    def yields(self, forces: Unknowns, rtol: float = 1e-12) -> tuple[Unknowns, float, Status]:
        """Compute the displacement of particles and cell under forces, by a linear solve.

        The relative residual and the status are those of the solve for the positions alone. (The
        method ``solve`` returns those of positions and cell together.)

        Args:
          forces: forces on the particles and on the cell.
          rtol: relative residual to which the solve is carried.

        Returns:
          the displacement, the relative residual and the status.
        """
        if self.lin.constrained:
            return self.factor.solve_unknowns(self.lin.null.free(forces), rtol)
        dR, residual, status = self.factor.solve(np.asarray(forces.positions), rtol)
        x = self.lin.structure.solved(
            forces, Unknowns(jnp.asarray(dR, self.lin.system.positions.dtype))
        )
        return x, residual, status

    def response(
        self, tangent: Params, pull: Unknowns, rtol: float
    ) -> tuple[Unknowns, float, Status]:
        """Compute the derivative of positions and strain along a direction in parameter space.

        Args:
          tangent: the direction, changes of all parameters by name.
          pull: the derivative of the minimum's condition F = 0 along the direction, at constant
            positions and strain.
          rtol: relative residual to which the solve is carried.

        Returns:
          the derivative, the residual of the linear solve relative to the right-hand side, and the
          status.
        """
        if not self.lin.constrained:
            return self.solve(on_host(np.negative, pull), rtol)
        motion, side = _constrained_side(self.core, tangent)
        x, residual, status = self.solve(side, rtol)
        return on_host(np.add, motion, x), residual, status

    def switches(self, x: Unknowns, tangent: Params) -> tuple[float, float]:
        """Compute when a coordinate first meets or leaves its bound as positions change by t ``x``.

        At the same time the parameters change by t ``tangent``. The results are the smallest
        t >= 0, and the smallest |t| of all t <= 0, at which this happens. Both are infinite
        without bounds.
        """
        if not self.lin.constrained:
            return np.inf, np.inf
        times = np.asarray(_switch_times(self.core, x, tangent))
        # a switch at t = 0 counts on both sides
        ahead = times[times >= 0]
        behind = -times[times <= 0]
        return float(np.min(ahead, initial=np.inf)), float(np.min(behind, initial=np.inf))

    def second(self, first: Motion, second: Motion) -> Unknowns:
        """Compute the second derivative of the condition F of a minimum along two directions.

        F, such as dU/dR, is zero at the minimum.

        Args:
          first, second: the two directions, each a change of the positions (and strain or
            multipliers) and a change of the parameters.
        """
        return _second_derivative(self.core, first, second)

    def hessian_change(self, along: Motion) -> sp.csr_array | None:
        """Assemble the derivative of the Hessian along a direction, as a sparse matrix (n d, n d).

        The result is None in small systems, for which compiling takes longer than products with
        second derivatives; where the unknowns are more than the positions; and for an energy that
        is not a sum over pairs.

        Args:
          along: the direction, which must be one of the positions alone.
        """
        system = self.lin.system
        if self.lin.constrained or self.lin.cell is not None or system.positions.size <= SMALL:
            return None
        return hessian_change(self.core.system, np.asarray(along[0].positions))

    def crossings(self, x: Unknowns, tangent: Params) -> Crossing:
        """Compute when pairs cross a breakpoint while positions, cell and parameters change.

        A breakpoint is a distance at which a derivative of the potential jumps or diverges. The
        pairs are those of the whole system, except pairs of rattlers.

        Args:
          x: the change of positions and strain.
          tangent: the change of the parameters by name.
        """
        eq = self.lin.equilibrium
        # parameters that constraints relax are unknowns, and change with x
        relaxed = x.params or {}
        changes = {name: relaxed.get(name, tangent.get(name)) for name in eq.system.params}
        strain = self.lin.structure.strain(self.lin, x, tangent)
        return contact_changes.crossings(
            eq.system, x.positions, changes, self.lin.network.rattlers, strain
        )

    def least(self, stiffness: float) -> float:
        """Compute the smallest stiffness of positions and cell together; 0 if it is not positive.

        In a relaxed cell the result is a lower bound. The inverse of the stiffness matrix of
        positions and cell is H^+ + Y S^-1 Y^T, with the Hessian H, the stiffness S of the cell, and
        Y = (X, 1), where X is the non-affine motion of the particles under each strain. The norm of
        the inverse is at most the sum of the terms' norms. Where S is symmetric, both terms are
        positive semidefinite, so that the norm is at least the larger one: the bound is within a
        factor of 2.

        Args:
          stiffness: the smallest stiffness of the positions in the fixed cell.
        """
        cell = self.lin.cell
        if cell is None or stiffness <= 0.0:
            return max(stiffness, 0.0)
        if not Status(int(cell.status)).good:
            return 0.0
        X = np.asarray(cell.motion, float).reshape(len(cell.along), -1)
        # Y^T Y = L L^T in the norm of this space: |Y S^-1 Y^T| = |L^T S^-1 L|
        root = np.linalg.cholesky(X @ X.T + self.length**2 * np.eye(len(X)))
        compliance = np.linalg.norm(root.T @ np.asarray(cell.compliance, float) @ root, 2)
        return 1.0 / (1.0 / stiffness + float(compliance))

    def _tangent(self, forces: Unknowns) -> np.ndarray:
        """Return the part of forces along the tangent space of the constraints, as a vector."""
        return self.factor.tangent(flat(dataclasses.replace(forces, multipliers=None)))

    def _off_null(self, positions: ArrayLike) -> np.ndarray:
        """Return forces (n, d) on the particles without their part in the Hessian's null space."""
        forces = np.asarray(positions)
        return self.factor.project(forces.ravel()).reshape(forces.shape)


def _norm(positions: ArrayLike, strain: ArrayLike | None, length: float) -> float:
    """Compute the norm of positions and strain together, the strain multiplied by ``length``."""
    size = float(np.linalg.norm(np.asarray(positions)))
    if strain is None:
        return size
    return float(np.hypot(size, length * np.linalg.norm(np.asarray(strain))))
