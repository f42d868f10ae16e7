"""The three kinds of minimum: in a fixed cell, in a relaxed cell, and under constraints.

Each kind has its unknowns x (the positions; also the strain of a cell at a pressure, a stress or a
volume, or the multipliers of constraints) and its condition F(x, params), which is zero at the
minimum. Each kind sets up the right-hand sides of the linear solves with dF/dx, and computes
derivatives from their solutions. All else in ``mdsens.sensitivity`` is common to the three.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp

from mdsens._util.errors import InputError
from mdsens._util.portable import Portable
from mdsens._util.precision import full_precision
from mdsens._util.validation import real_array
from mdsens.implicit.linear.operator import Operator
from mdsens.mechanics import lagrangian
from mdsens.mechanics.cell import Cell, deformed
from mdsens.mechanics.hessian import (
    along,
    gradient,
    hessian_operator,
    mixed_product,
    mixed_transpose,
)
from mdsens.mechanics.kkt_operator import kkt_operator
from mdsens.mechanics.load import load_slope
from mdsens.mechanics.null_space import NullSpace
from mdsens.mechanics.strain import from_mandel, to_mandel
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.system import System, box_at
from mdsens.relaxation.equilibrium import Equilibrium

if TYPE_CHECKING:
    # for annotations only: ``linearization`` imports this module
    from mdsens.sensitivity.linearization import Linearization

__all__ = ["ConstrainedStructure", "FixedCellStructure", "RelaxedCellStructure", "Structure"]

Params = Mapping[str, Any]
Tree = TypeVar("Tree", Unknowns, dict[str, jax.Array])


class Structure(Protocol):
    """The three kinds of minimum as a protocol: in a fixed or relaxed cell, and under constraints.

    A structure says what the unknowns x are, which condition F(x, params) is zero at the minimum,
    and how derivatives follow from linear solves with dF/dx. In its methods, ``lin`` is the
    linearization of the minimum and ``params`` are the parameters by name.
    """

    @property
    def status(self) -> Any:
        """Return the status of the cell or of the constraints of a minimum.

        The status says why the minimum cannot be differentiated; it is CONVERGED or None where
        nothing prevents this.
        """

    def params(self, system: System) -> dict[str, Any]:
        """Return the parameters by which a minimum can be differentiated, by name."""
        ...

    def unknowns(self, system: System) -> Unknowns:
        """Return the unknowns at the minimum: positions, and strain or multipliers if any."""
        ...

    def moved(self, system: System, x: Unknowns, params: Params) -> System:
        """Return a system with unknowns x and parameters ``params``, and the same neighbor list.

        Args:
          system: the system.
          x: the unknowns: positions, and strain of the cell or parameters that relax, if any.
          params: the other parameters by name.
        """
        ...

    def condition(self, lin: Linearization, x: Unknowns, params: Params) -> Unknowns:
        """Evaluate the condition F(x, params), which is zero at the minimum.

        F contains the derivatives of the energy (or enthalpy, or Lagrangian) by the unknowns x.
        """
        ...

    def operator(self, lin: Linearization) -> tuple[Operator, jax.Array | None]:
        """Return the matrix of the linear solves as an operator, which multiplies it with vectors.

        The matrix is the Hessian d2U/dR2. Under constraints it has further rows and columns: the
        derivatives of the constraints' equations. The second result is the stiffness in whose units
        the multipliers are measured; it is None where multipliers are no unknowns.
        """
        ...

    def solved(self, side: Unknowns, x: Unknowns, transposed: bool = False) -> Unknowns:
        """Complete the solution x of a linear solve by the strain of the cell, if the cell relaxes.

        In a relaxed cell the linear solve is for the positions alone, and the strain of the cell is
        computed here.

        Args:
          side: the right-hand side, for positions and strain.
          x: the solution of the linear solve.
          transposed: whether the system of equations has the transposed matrix, as that of ``vjp``.
            The matrix is symmetric, except in a cell under a stress that is no pressure.
        """
        ...

    def strain(self, lin: Linearization, x: Unknowns, tangent: Params) -> jax.Array | None:
        """Compute the whole strain (d, d) of the cell in a response; None where it is fixed.

        Args:
          lin: the linearization of the minimum.
          x: the change of the unknowns.
          tangent: the changes of the parameters, some of which may strain the cell themselves.
        """
        ...

    def stored(self, lin: Linearization, x: Unknowns, tangent: Params) -> Any:
        """Convert the solution x of a linear solve to the displacement that users get.

        Users get the change of the Cartesian positions, (n, d), which includes the motion of the
        particles with the cell. In a relaxed cell they get an ``Unknowns`` of this change and of
        the strain of the cell, a Mandel vector. The arguments are those of ``strain``.
        """
        ...

    def unknown(self, lin: Linearization, value: jax.Array | Unknowns) -> Unknowns:
        """Convert a change of positions and strain from the form that users get; undoes ``stored``.

        The result is the change of the unknowns of the linear solve; in a relaxed cell its
        positions leave out the motion of the particles with the cell.
        """
        ...

    def parameter_side(self, lin: Linearization, tangent: Params) -> Unknowns:
        """Compute - dF/dp . dp, the right-hand side of ``jvp``, for changes dp of the parameters.

        F is the condition that is zero at the minimum, and ``tangent`` holds dp by parameter name.
        """
        ...

    def displacement(self, lin: Linearization, tangent: Params, x: Unknowns) -> tuple[Any, Any]:
        """Compute the results ``(value, nonaffine)`` of ``jvp`` from the solution x of its solve.

        ``value`` is the derivative of the positions (and of strain or multipliers), and
        ``nonaffine`` that of the positions without the affine motion with the box. ``tangent``
        holds the changes of the parameters by name.
        """
        ...

    def cotangent(self, lin: Linearization, value: Unknowns, w: jax.Array) -> Unknowns:
        """Check the weights w of the sum w . R that ``vjp`` differentiates; R are the positions.

        The sum may also contain strain, multipliers and relaxed parameters with weights of their
        own.

        Args:
          lin: the linearization of the minimum.
          value: all the weights, as the user gave them.
          w: the weights of the positions, (n, d), checked already.

        Returns:
          weights of the unknowns of the linear solve, for the same sum.
        """
        ...

    def cotangent_side(self, lin: Linearization, cotangent: Unknowns) -> Unknowns:
        """Compute the right-hand side of the linear solve of ``vjp``.

        ``cotangent`` holds the weights of the unknowns, whose weighted sum ``vjp`` differentiates.
        """
        ...

    def parameter_gradient(
        self, lin: Linearization, cotangent: Unknowns, x: Unknowns
    ) -> dict[str, Any]:
        """Compute the result of ``vjp``, a dict over the parameters, from the solution x.

        x solves the linear system of ``vjp``, and ``cotangent`` holds the weights of the unknowns,
        whose weighted sum ``vjp`` differentiates.
        """
        ...

    def force_side(self, lin: Linearization, force: Unknowns) -> Unknowns:
        """Compute the right-hand side of ``response`` for external forces (n, d) on particles."""
        ...

    def at(self, minimum: Equilibrium, system: System) -> Self:
        """Return the structure (unknowns, condition and linear system) for another minimum nearby.

        Args:
          minimum: the other minimum.
          system: the backbone of ``minimum``, that is, the system without the contacts of rattlers.
        """
        ...


@full_precision
def _affine(system: System, tangent: Params, positions: jax.Array) -> jax.Array:
    """Compute the motion (n, d) of particles that follow the box, for a change of the parameters.

    The motion is (d box / dp . dp) box^-1 R, with the positions R and the changes dp by name in
    ``tangent``; zero without a box.
    """
    if system.box is None:
        return jnp.zeros_like(positions)
    change = along(lambda p: box_at(system, p), system.params, tangent)
    # for positions as rows: R box^-T (d box)^T
    return positions @ jnp.linalg.solve(box_at(system, system.params).T, change.T)


def _negative(x: Tree) -> Tree:
    return jax.tree.map(jnp.negative, x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FixedCellStructure(Portable):
    """A minimum in a fixed cell: the unknowns are the positions R, and F = dU/dR is zero.

    U is the potential energy.
    """

    # Without an annotation it is no field: a fixed cell has no status of its own.
    status = None

    def params(self, system: System) -> dict[str, Any]:
        return lagrangian.own_params(system)

    def unknowns(self, system: System) -> Unknowns:
        return Unknowns(system.positions)

    def moved(self, system: System, x: Unknowns, params: Params) -> System:
        # In a relaxed cell ``params`` contains those of the load too, which the system lacks.
        return system.replace(
            positions=x.positions, params={name: params[name] for name in system.params}
        )

    def condition(self, lin: Linearization, x: Unknowns, params: Params) -> Unknowns:
        system = self.moved(lin.system, x, params)
        return Unknowns(gradient(system, Unknowns(system.positions), system.params).positions)

    def operator(self, lin: Linearization) -> tuple[Operator, jax.Array | None]:
        # at a saddle the Hessian has negative eigenvalues
        definite = not lin.equilibrium.order
        return hessian_operator(lin.system, lin.null, lin.blocks, definite=definite), None

    def solved(self, side: Unknowns, x: Unknowns, transposed: bool = False) -> Unknowns:
        return x

    def strain(self, lin: Linearization, x: Unknowns, tangent: Params) -> jax.Array | None:
        return None

    def stored(self, lin: Linearization, x: Unknowns, tangent: Params) -> Any:
        return x.positions

    def unknown(self, lin: Linearization, value: jax.Array | Unknowns) -> Unknowns:
        return value if isinstance(value, Unknowns) else Unknowns(value)

    def parameter_side(self, lin: Linearization, tangent: Params) -> Unknowns:
        return _negative(mixed_product(lin.system, tangent))

    def displacement(self, lin: Linearization, tangent: Params, x: Unknowns) -> tuple[Any, Any]:
        nonaffine = x.positions - _affine(lin.system, tangent, lin.system.positions)
        # the affine part has a mean displacement and moves rattlers
        return x.positions, lin.null.project(Unknowns(nonaffine)).positions

    def cotangent(self, lin: Linearization, value: Unknowns, w: jax.Array) -> Unknowns:
        if value.strain is not None:
            raise InputError(
                "the cotangent has a strain, and the cell of this minimum is fixed: give an array"
                " (n, d), one vector for each particle."
            )
        return Unknowns(w)

    def cotangent_side(self, lin: Linearization, cotangent: Unknowns) -> Unknowns:
        return cotangent

    def parameter_gradient(
        self, lin: Linearization, cotangent: Unknowns, x: Unknowns
    ) -> dict[str, Any]:
        return _negative(mixed_transpose(lin.system, x))

    def force_side(self, lin: Linearization, force: Unknowns) -> Unknowns:
        return force

    def at(self, minimum: Equilibrium, system: System) -> Self:
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RelaxedCellStructure(FixedCellStructure):
    """A minimum in a relaxed cell: the unknowns are the positions R and a strain of the cell.

    The condition is that F = (dU/dR, G) is zero, with the energy U and the stress G that the load
    leaves unbalanced (:mod:`mdsens.mechanics.load`); at a pressure P, G is the derivative of the
    enthalpy U + P V by the strain. At a strain the particles are at (1 + strain) R, so that R plays
    the role of fractional coordinates: the derivative by R is (1 + strain) times the derivative by
    the actual positions of the particles.

    Attributes:
      cell: the cell, with its load and the strains ``cell.along`` that it can take. The strain
        among the unknowns is described by its components along these strains. At a fixed volume
        the cell also has a strain that a change of the volume imposes.
    """

    cell: Cell

    @property
    def status(self) -> Any:
        return self.cell.status

    def params(self, system: System) -> dict[str, Any]:
        return {**lagrangian.own_params(system), **self.cell.load.params}

    def unknowns(self, system: System) -> Unknowns:
        return Unknowns(system.positions, jnp.zeros_like(self.cell.slope))

    @full_precision
    def moved(self, system: System, x: Unknowns, params: Params) -> System:
        moved = super().moved(system, x, params)
        if x.strain is None:
            return moved
        load = self.cell.load.at(params)
        return deformed(moved, load.strain(x.strain, self.cell.along, system.periodic_volume))

    @full_precision
    def condition(self, lin: Linearization, x: Unknowns, params: Params) -> Unknowns:
        by_positions = super().condition(lin, x, params).positions
        if x.strain is None:
            return Unknowns(by_positions)
        load = self.cell.load.at(params)
        params_of_system = {name: params[name] for name in lin.system.params}
        unstrained = lin.system.replace(positions=x.positions, params=params_of_system)
        unbalanced = load_slope(unstrained, load, self.cell.along, x.strain)
        strain = load.strain(x.strain, self.cell.along, lin.system.periodic_volume)
        # dU/dR = (1 + strain) dU/dr at the actual positions r = (1 + strain) R
        return Unknowns(by_positions + by_positions @ strain, unbalanced)

    @full_precision
    def solved(self, side: Unknowns, x: Unknowns, transposed: bool = False) -> Unknowns:
        """Compute the strain of the cell, and add the motion that it causes in the particles.

        Args:
          side: the right-hand side, for positions and strain.
          x: the solution of the linear solve for the positions, at a strain of zero.
          transposed: whether to take the transposed stiffness of the cell.
        """
        if side.strain is None:
            return x
        # The positions are eliminated first: S strain = f_strain + X^T f_R, with the stiffness S of
        # the cell and the motion X of the particles under each strain (see ``mechanics.cell``). The
        # transposed equations differ by S^T alone, since d2U/dR dstrain has no order.
        cell = self.cell
        compliance = cell.compliance.T if transposed else cell.compliance
        strain = compliance @ (side.strain + jnp.einsum("knd,nd->k", cell.motion, side.positions))
        return Unknowns(x.positions + jnp.tensordot(strain, cell.motion, axes=1), strain)

    def strain(self, lin: Linearization, x: Unknowns, tangent: Params) -> jax.Array | None:
        if x.strain is None:
            return None
        strain = jnp.tensordot(x.strain, self.cell.along, axes=1)
        imposed = self.cell.load.imposed(tangent, self.cell.along)
        return strain if imposed is None else strain + imposed

    @full_precision
    def stored(self, lin: Linearization, x: Unknowns, tangent: Params) -> Any:
        strain = self.strain(lin, x, tangent)
        if strain is None:
            return x.positions
        return Unknowns(x.positions + lin.system.positions @ strain.T, to_mandel(strain))

    @full_precision
    def unknown(self, lin: Linearization, value: jax.Array | Unknowns) -> Unknowns:
        if not isinstance(value, Unknowns) or value.strain is None:
            return super().unknown(lin, value)
        free_strains = self.cell.along
        strain = from_mandel(value.strain)
        # components of the strain along the strains that the cell can take, by least squares
        components = jnp.linalg.solve(
            jnp.einsum("kde,lde->kl", free_strains, free_strains),
            jnp.einsum("kde,de->k", free_strains, strain),
        )
        return Unknowns(value.positions - lin.system.positions @ strain.T, components)

    def parameter_side(self, lin: Linearization, tangent: Params) -> Unknowns:
        return _negative(along(lambda p: lin.condition(lin.unknowns, p), lin.params, tangent))

    def displacement(self, lin: Linearization, tangent: Params, x: Unknowns) -> tuple[Any, Any]:
        # The affine part is due to the strain of the cell alone, and ``x.positions`` leaves it out.
        return self.stored(lin, x, tangent), lin.null.project(Unknowns(x.positions)).positions

    @full_precision
    def cotangent(self, lin: Linearization, value: Unknowns, w: jax.Array) -> Unknowns:
        """Convert weights w of the positions R in a sum w . R to weights of the unknowns.

        The unknowns are the positions at constant cell, and the strain of the cell. Since R moves
        with the cell, w contributes to the weights of the strain. This is the transpose of
        ``stored``. The field ``params`` of the result is the derivative of the sum by the
        parameters that strain the cell themselves; None if there are none.

        Args:
          lin: the linearization of the minimum.
          value: the user's weights of positions and, if given, strain (a Mandel vector).
          w: the weights of the positions, (n, d), checked already.
        """
        R = lin.system.positions
        # stored positions move by R strain^T, so that w has a part by the strain
        weights = w.T @ R
        if value.strain is not None:
            mandel = jnp.asarray(real_array("cotangent.strain", value.strain), w.dtype)
            m = R.shape[1] * (R.shape[1] + 1) // 2
            if mandel.shape != (m,):
                raise InputError(
                    f"cotangent.strain has shape {mandel.shape}: give a Mandel vector ({m},)."
                )
            weights = weights + from_mandel(mandel)
        free_strains = self.cell.along
        direct = self.cell.load.imposed_gradient(weights, free_strains)
        return Unknowns(w, jnp.einsum("de,kde->k", weights, free_strains), params=direct or None)

    def cotangent_side(self, lin: Linearization, cotangent: Unknowns) -> Unknowns:
        return dataclasses.replace(cotangent, params=None)

    def parameter_gradient(
        self, lin: Linearization, cotangent: Unknowns, x: Unknowns
    ) -> dict[str, Any]:
        by_condition = jax.vjp(lambda p: lin.condition(lin.unknowns, p), lin.params)[1](x)[0]
        gradient = _negative(by_condition)
        for name, direct in (cotangent.params or {}).items():
            gradient[name] = gradient[name] + direct
        return gradient

    def at(self, minimum: Equilibrium, system: System) -> Self:
        # Of the cell the condition takes the load and the free strains, and nothing else.
        assert minimum.load is not None
        return dataclasses.replace(self, cell=dataclasses.replace(self.cell, load=minimum.load))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConstrainedStructure(Portable):
    """A minimum under constraints: F = (dL/dx, g) is zero, with the Lagrangian L = U + lambda . g.

    U is the energy. The unknowns x are the positions, the parameters that constraints relax, and
    the multipliers lambda of the equations g = 0. Coordinates that are pinned or at a bound are
    constrained: the parameters alone determine their values, and so their derivatives. The linear
    solve is for the other coordinates.

    Attributes:
      multipliers: multipliers of the equations, by the names of the constraints; None without
        equations.
      constraint_status: REDUNDANT_CONSTRAINTS where some equations repeat others;
        DEGENERATE_CONSTRAINT where a coordinate is about to meet or leave its bound, so that the
        derivative differs on the two sides; else CONVERGED.
    """

    multipliers: dict[str, jax.Array] | None
    constraint_status: jax.Array

    @property
    def status(self) -> Any:
        return self.constraint_status

    def params(self, system: System) -> dict[str, Any]:
        return lagrangian.own_params(system)

    def unknowns(self, system: System) -> Unknowns:
        return lagrangian.unknowns_of(system, self.multipliers)

    def moved(self, system: System, x: Unknowns, params: Params) -> System:
        return lagrangian.with_unknowns(system, x, params)

    def condition(self, lin: Linearization, x: Unknowns, params: Params) -> Unknowns:
        """Compute F(x, params), which is zero at a minimum under constraints.

        F contains the derivatives of the Lagrangian by the free coordinates, the distance of each
        pinned coordinate or coordinate at a bound from its prescribed value, and the values of the
        constraints' equations.
        """
        slope = lagrangian.lagrangian_gradient(lin.system, x, params)
        coordinates = Unknowns(x.positions, params=x.params)
        distance = jax.tree.map(
            jnp.subtract, coordinates, lagrangian.constrained_coordinates(lin.system, params)
        )
        fixed = Unknowns(distance.positions, params=distance.params, multipliers=slope.multipliers)
        return _at_active_set(lin.null, fixed, slope)

    def operator(self, lin: Linearization) -> tuple[Operator, jax.Array | None]:
        return kkt_operator(lin.system, lin.unknowns, lin.null)

    def solved(self, side: Unknowns, x: Unknowns, transposed: bool = False) -> Unknowns:
        return x

    def strain(self, lin: Linearization, x: Unknowns, tangent: Params) -> jax.Array | None:
        return None

    def stored(self, lin: Linearization, x: Unknowns, tangent: Params) -> Any:
        return x.positions

    def unknown(self, lin: Linearization, value: jax.Array | Unknowns) -> Unknowns:
        return value if isinstance(value, Unknowns) else Unknowns(value)

    def read(self, lin: Linearization, x: Unknowns, params: Params) -> Unknowns:
        """Return the positions, relaxed parameters and multipliers that users get.

        The multipliers are those of all constraints, bounds and pins included; the parameters are
        those that constraints relax.

        Args:
          lin: the linearization of the minimum.
          x: the unknowns: positions, relaxed parameters, and multipliers of the constraints'
            equations.
          params: the other parameters by name.
        """
        all_params = {**params, **(x.params or {})}
        multipliers = lagrangian.multipliers_at(lin.system, x, all_params)
        return Unknowns(x.positions, params=x.params, multipliers=multipliers)

    def motion(self, lin: Linearization, tangent: Params) -> Unknowns:
        """Compute how pinned coordinates and those at a bound move with the parameters.

        The result is the derivative along the changes of the parameters in ``tangent``; it is zero
        for the other coordinates and for the multipliers.
        """
        rate = along(
            lambda p: lagrangian.constrained_coordinates(lin.system, p), lin.params, tangent
        )
        # the tree must be that of the unknowns, which has no multipliers without equations
        no_change = None
        if self.multipliers is not None:
            no_change = jax.tree.map(jnp.zeros_like, self.multipliers)
        return Unknowns(rate.positions, params=rate.params, multipliers=no_change)

    def parameter_side(self, lin: Linearization, tangent: Params) -> Unknowns:
        # dL/dx changes with the parameters, and with the constrained coordinates that they move
        point = lin.unknowns, lin.params
        change = self.motion(lin, tangent), _all_changes(lin, tangent)
        rate = jax.jvp(lambda x, p: _lagrangian_gradient(lin, x, p), point, change)[1]
        return lin.null.free(_negative(rate))

    def displacement(self, lin: Linearization, tangent: Params, x: Unknowns) -> tuple[Any, Any]:
        # x is zero along constrained coordinates, their motion is zero along the others
        motion = jax.tree.map(jnp.add, self.motion(lin, tangent), x)
        point = lin.unknowns, lin.params
        change = motion, _all_changes(lin, tangent)
        value = jax.jvp(lambda x, p: self.read(lin, x, p), point, change)[1]
        return value, value.positions - _affine(lin.system, tangent, lin.system.positions)

    def cotangent(self, lin: Linearization, value: Unknowns, w: jax.Array) -> Unknowns:
        """Complete the weights of a sum that ``vjp`` differentiates, by zeros where none is given.

        The sum is over the positions, the multipliers of all constraints, and the parameters that
        constraints relax.

        Args:
          lin: the linearization of the minimum.
          value: the user's weights; those of multipliers and relaxed parameters are dicts by name.
          w: the weights of the positions, (n, d), checked already.
        """
        # ``read`` has multipliers of all constraints, also those that are no unknowns
        shapes = jax.eval_shape(lambda c: self.read(c, c.unknowns, c.params), lin.traced(()))
        multipliers = _checked_by_name("multipliers", value.multipliers, shapes.multipliers, w)
        params = _checked_by_name("params", value.params, shapes.params, w)
        return Unknowns(w, params=params, multipliers=multipliers)

    def cotangent_side(self, lin: Linearization, cotangent: Unknowns) -> Unknowns:
        return lin.null.free(self._pulled_through_read(lin, cotangent)[0])

    def parameter_gradient(
        self, lin: Linearization, cotangent: Unknowns, x: Unknowns
    ) -> dict[str, Any]:
        """Compute the derivative by all parameters of a weighted sum of positions and multipliers.

        The parameters act in three ways: by the right-hand side of the linear solve; by the motion
        of coordinates that are pinned or at a bound; and on the multipliers of these coordinates,
        which are no unknowns of the solve and are computed from the forces afterwards.

        Args:
          lin: the linearization of the minimum.
          cotangent: the weights in the sum.
          x: the solution of the linear solve that has the weights as its right-hand side.
        """
        by_unknowns, direct = self._pulled_through_read(lin, cotangent)
        pull = jax.vjp(lambda y, p: _lagrangian_gradient(lin, y, p), lin.unknowns, lin.params)[1]
        through_solve, by_params = pull(x)
        # cotangent of the motion of the constrained coordinates
        of_motion = jax.tree.map(jnp.subtract, by_unknowns, through_solve)
        of_coordinates = Unknowns(of_motion.positions, params=of_motion.params)
        pull = jax.vjp(lambda p: lagrangian.constrained_coordinates(lin.system, p), lin.params)[1]
        (by_coordinates,) = pull(of_coordinates)
        # of the three ways above: a on the multipliers, b by the right-hand side, c by the motion
        return jax.tree.map(lambda a, b, c: a - b + c, direct, by_params, by_coordinates)

    def force_side(self, lin: Linearization, force: Unknowns) -> Unknowns:
        zero = jax.tree.map(jnp.zeros_like, lin.unknowns)
        return lin.null.free(dataclasses.replace(zero, positions=force.positions))

    def at(self, minimum: Equilibrium, system: System) -> Self:
        if self.multipliers is None:
            return self
        unknowns = lagrangian.unknowns_of(system, minimum.multipliers)
        return dataclasses.replace(self, multipliers=unknowns.multipliers)

    def _pulled_through_read(self, lin: Linearization, cotangent: Unknowns) -> tuple[Unknowns, Any]:
        """Differentiate a weighted sum of results by the unknowns and by the parameters.

        The results are those that users get from ``read``: positions, relaxed parameters, and the
        multipliers of all constraints. ``cotangent`` holds the weights.
        """
        value, pull = jax.vjp(lambda x, p: self.read(lin, x, p), lin.unknowns, lin.params)
        zero = jax.tree.map(jnp.zeros_like, value)
        multipliers = cotangent.multipliers
        if multipliers is None:
            multipliers = zero.multipliers
        params = zero.params if cotangent.params is None else cotangent.params
        return pull(dataclasses.replace(cotangent, multipliers=multipliers, params=params))


def _checked_by_name(
    field: str,
    cotangents: Mapping[str, Any] | None,
    shapes: dict[str, jax.ShapeDtypeStruct] | None,
    w: jax.Array,
) -> dict[str, jax.Array] | None:
    """Check a user's weights of multipliers or of parameters; a missing name gets zeros.

    The weights are those of a sum that ``vjp`` differentiates.

    Args:
      field: "multipliers" or "params", for messages.
      cotangents: weights that the user gave, by name.
      shapes: the shapes that the weights must have, by name; None or empty without names.
      w: the weights of the positions, for their floating-point type.
    """
    named = cotangents or {}
    for name, array in named.items():
        if shapes is None or name not in shapes:
            remedy = f"use one of {', '.join(map(repr, shapes))}." if shapes else "leave it out."
            raise InputError(
                f"cotangent.{field} has a key {name!r}, which is none of this minimum: {remedy}"
            )
        if jnp.shape(array) != shapes[name].shape:
            raise InputError(
                f"cotangent.{field}[{name!r}] has shape {jnp.shape(array)}: give an"
                f" array of shape {shapes[name].shape}."
            )
    if shapes is None:
        return None
    checked = {}
    for name, shape in shapes.items():
        if name in named:
            array = real_array(f"cotangent.{field}[{name!r}]", named[name])
            checked[name] = jnp.asarray(array, w.dtype)
        else:
            checked[name] = jnp.zeros(shape.shape, w.dtype)
    return checked


def _lagrangian_gradient(lin: Linearization, x: Unknowns, params: Params) -> Unknowns:
    return lagrangian.lagrangian_gradient(lin.system, x, params)


def _all_changes(lin: Linearization, tangent: Params) -> dict[str, Any]:
    """Return changes of all parameters: those in ``tangent``, and zeros for the others."""
    return {
        name: tangent[name] if name in tangent else jax.tree.map(jnp.zeros_like, v)
        for name, v in lin.params.items()
    }


def _at_active_set(null: NullSpace, fixed: Unknowns, free: Unknowns) -> Unknowns:
    """Return entries of ``fixed`` where constraints fix a coordinate, of ``free`` elsewhere.

    Args:
      null: the null space, which records which coordinates are pinned or at a bound.
      fixed, free: values for all unknowns.
    """
    mask = null.active_set
    assert mask is not None
    whole = Unknowns(mask.positions, params=mask.params, multipliers=mask.multipliers)
    return jax.tree.map(jnp.where, whole, fixed, free)
