"""The three kinds of a minimum, behind one protocol: in a fixed cell, at a pressure, under constraints.

Each says what the unknowns x are, the condition F(x, params) that is zero at the minimum, and how a
derivative of x is put into a right-hand side of the linear solve and read from its answer. The rest
of the room is written once for all three.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, Self

import jax
import jax.numpy as jnp

from mdsens._util.errors import InputError
from mdsens._util.portable import Portable
from mdsens._util.validation import real_array
from mdsens.implicit.linear.operator import Operator
from mdsens.mechanics import lagrangian
from mdsens.mechanics.cell import Cell, deformed, enthalpy_gradient
from mdsens.mechanics.hessian import (
    along,
    gradient,
    hessian_operator,
    mixed_product,
    mixed_transpose,
)
from mdsens.mechanics.kkt_operator import kkt_operator
from mdsens.mechanics.null_space import NullSpace
from mdsens.mechanics.strain import basis, from_mandel, to_mandel
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.system import System, box_at
from mdsens.relaxation.equilibrium import Equilibrium

if TYPE_CHECKING:
    from mdsens.sensitivity.linearization import Linearization

__all__ = ["AtPressureStructure", "ConstrainedStructure", "FixedCellStructure", "Structure"]

Params = Mapping[str, Any]


class Structure(Protocol):
    """What a derivative needs to know of the kind of minimum. ``lin`` is its Linearization."""

    @property
    def status(self) -> Any:
        """Why no derivative can be taken, an int32 array; None where nothing is against it."""

    def params(self, system: System) -> dict[str, Any]:
        """The parameters that derivatives are taken by."""
        ...

    def unknowns(self, system: System) -> Unknowns:
        """The unknowns at the minimum."""
        ...

    def moved(self, system: System, x: Unknowns, params: Params) -> System:
        """The system at other unknowns and parameters; traceable, its neighbor list stays."""
        ...

    def condition(self, lin: Linearization, x: Unknowns, params: Params) -> Unknowns:
        """F(x, params), zero at the minimum."""
        ...

    def operator(self, lin: Linearization) -> tuple[Operator, Unknowns | None]:
        """dF/dx of the positions (and multipliers), matrix-free, and the unit of each unknown in
        it; None for units of one.
        """
        ...

    def solved(self, side: Unknowns, x: Unknowns) -> Unknowns:
        """The answer for all unknowns, from that of the positions alone."""
        ...

    def stored(self, lin: Linearization, x: Unknowns) -> Any:
        """A change of the unknowns as users get it: of the stored positions (n, d), or of those
        and of the cell.
        """
        ...

    def unknown(self, lin: Linearization, value: Any) -> Unknowns:
        """The inverse of ``stored``."""
        ...

    def parameter_side(self, lin: Linearization, tangent: Params) -> Unknowns:
        """- dF/dp . dp, the right-hand side of ``jvp``."""
        ...

    def displacement(self, lin: Linearization, tangent: Params, x: Unknowns) -> tuple[Any, Any]:
        """(value, nonaffine) of ``jvp`` from the answer of the solve."""
        ...

    def cotangent(self, lin: Linearization, value: Unknowns, w: jax.Array) -> Unknowns:
        """A cotangent of what ``jvp`` gives, checked, as one of the unknowns; w that of positions."""
        ...

    def cotangent_side(self, lin: Linearization, cotangent: Unknowns) -> Unknowns:
        """The right-hand side of ``vjp``."""
        ...

    def parameter_gradient(
        self, lin: Linearization, cotangent: Unknowns, x: Unknowns
    ) -> dict[str, Any]:
        """The value of ``vjp`` from the answer of the solve."""
        ...

    def force_side(self, lin: Linearization, force: Unknowns) -> Unknowns:
        """The right-hand side of ``response``, of an external force on the particles."""
        ...

    def at(self, minimum: Equilibrium, system: System) -> Self:
        """The structure of another minimum nearby; ``system`` is its backbone."""
        ...


def _affine(system: System, tangent: Params, positions: jax.Array) -> jax.Array:
    """(d box / dp . dp) box^-1 R, (n, d): the motion of particles that follow the box."""
    if system.box is None:
        return jnp.zeros_like(positions)
    change = along(lambda p: box_at(system, p), system.params, tangent)
    return positions @ jnp.linalg.solve(box_at(system, system.params).T, change.T)


def _negative(x: Any) -> Any:
    return jax.tree.map(jnp.negative, x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FixedCellStructure(Portable):
    """Positions alone: F = dU/dR."""

    status = None

    def params(self, system: System) -> dict[str, Any]:
        return lagrangian.own_params(system)

    def unknowns(self, system: System) -> Unknowns:
        return Unknowns(system.positions)

    def moved(self, system: System, x: Unknowns, params: Params) -> System:
        return system.replace(
            positions=x.positions, params={name: params[name] for name in system.params}
        )

    def condition(self, lin: Linearization, x: Unknowns, params: Params) -> Unknowns:
        at = self.moved(lin.system, x, params)
        return Unknowns(gradient(at, Unknowns(at.positions), at.params).positions)

    def operator(self, lin: Linearization) -> tuple[Operator, Unknowns | None]:
        definite = not lin.equilibrium.order
        return hessian_operator(lin.system, lin.null, lin.blocks, definite=definite), None

    def solved(self, side: Unknowns, x: Unknowns) -> Unknowns:
        return x

    def stored(self, lin: Linearization, x: Unknowns) -> Any:
        return x.positions

    def unknown(self, lin: Linearization, value: Any) -> Unknowns:
        return value if isinstance(value, Unknowns) else Unknowns(value)

    def parameter_side(self, lin: Linearization, tangent: Params) -> Unknowns:
        return _negative(mixed_product(lin.system, tangent))

    def displacement(self, lin: Linearization, tangent: Params, x: Unknowns) -> tuple[Any, Any]:
        rest = x.positions - _affine(lin.system, tangent, lin.system.positions)
        return x.positions, lin.null.project(Unknowns(rest)).positions

    def cotangent(self, lin: Linearization, value: Unknowns, w: jax.Array) -> Unknowns:
        if value.strain is not None:
            raise InputError(
                "the cotangent has a strain, and this cell was given: give (n, d), one vector a"
                " particle."
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
class AtPressureStructure(FixedCellStructure):
    """Positions R and a strain of the cell: F = (dU/dR, d(U + P V)/dstrain).

    At a strain, positions stand at (1 + strain) R, so that R is fractional in spirit: the
    derivative by R is (1 + strain) times that by where the particles are.
    """

    cell: Cell

    @property
    def status(self) -> Any:
        return self.cell.status

    def params(self, system: System) -> dict[str, Any]:
        return {**lagrangian.own_params(system), "pressure": self.cell.pressure}

    def unknowns(self, system: System) -> Unknowns:
        return Unknowns(system.positions, jnp.zeros_like(self.cell.slope))

    def moved(self, system: System, x: Unknowns, params: Params) -> System:
        at = super().moved(system, x, params)
        if x.strain is None:
            return at
        return deformed(at, jnp.tensordot(x.strain, self.cell.along, axes=1))

    def condition(self, lin: Linearization, x: Unknowns, params: Params) -> Unknowns:
        slope = super().condition(lin, x, params).positions
        if x.strain is None:
            return Unknowns(slope)
        params_of_system = {name: params[name] for name in lin.system.params}
        at_strain = lin.system.replace(positions=x.positions, params=params_of_system)
        of_cell = enthalpy_gradient(at_strain, params["pressure"], self.cell.along, x.strain)
        strain = jnp.tensordot(x.strain, self.cell.along, axes=1)
        return Unknowns(slope + slope @ strain, of_cell)

    def solved(self, side: Unknowns, x: Unknowns) -> Unknowns:
        if side.strain is None:
            return x
        cell = self.cell
        strain = cell.compliance @ (
            side.strain + jnp.einsum("knd,nd->k", cell.motion, side.positions)
        )
        return Unknowns(x.positions + jnp.tensordot(strain, cell.motion, axes=1), strain)

    def stored(self, lin: Linearization, x: Unknowns) -> Any:
        if x.strain is None:
            return x.positions
        strain = jnp.tensordot(x.strain, self.cell.along, axes=1)
        return Unknowns(x.positions + lin.system.positions @ strain.T, to_mandel(strain))

    def unknown(self, lin: Linearization, value: Any) -> Unknowns:
        if not isinstance(value, Unknowns) or value.strain is None:
            return super().unknown(lin, value)
        free, strain = self.cell.along, from_mandel(value.strain)
        parts = jnp.linalg.solve(
            jnp.einsum("kde,lde->kl", free, free), jnp.einsum("kde,de->k", free, strain)
        )
        return Unknowns(value.positions - lin.system.positions @ strain.T, parts)

    def parameter_side(self, lin: Linearization, tangent: Params) -> Unknowns:
        return _negative(along(lambda p: lin.condition(lin.unknowns, p), lin.params, tangent))

    def displacement(self, lin: Linearization, tangent: Params, x: Unknowns) -> tuple[Any, Any]:
        # The cell follows no parameter here: all of the affine part is that of its strain.
        return self.stored(lin, x), lin.null.project(Unknowns(x.positions)).positions

    def cotangent(self, lin: Linearization, value: Unknowns, w: jax.Array) -> Unknowns:
        free, R = self.cell.along, lin.system.positions
        strain = jnp.einsum("nd,kde,ne->k", w, free, R)
        if value.strain is not None:
            of_strain = jnp.asarray(real_array("cotangent.strain", value.strain), w.dtype)
            m = R.shape[1] * (R.shape[1] + 1) // 2
            if of_strain.shape != (m,):
                raise InputError(
                    f"cotangent.strain has shape {of_strain.shape}: give ({m},), a Mandel vector."
                )
            strain = strain + jnp.einsum("m,mde,kde->k", of_strain, basis(R.shape[1]), free)
        return Unknowns(w, strain)

    def parameter_gradient(
        self, lin: Linearization, cotangent: Unknowns, x: Unknowns
    ) -> dict[str, Any]:
        return _negative(jax.vjp(lambda p: lin.condition(lin.unknowns, p), lin.params)[1](x)[0])

    def at(self, minimum: Equilibrium, system: System) -> Self:
        cell = dataclasses.replace(self.cell, pressure=minimum.pressure)
        return dataclasses.replace(self, cell=cell)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConstrainedStructure(Portable):
    """Positions, relaxed parameters and multipliers: F = (dL/dx, g), L = U + lambda . g.

    Coordinates at a bound or pinned move with the parameters that place them, dx/dp by themselves;
    the linear solve is for the others.

    Attributes:
      multipliers: of the equations, by the constraints' names.
      constraint_status: DEGENERATE_CONSTRAINT, REDUNDANT_CONSTRAINTS or CONVERGED.
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
        """dL/dx and g; of a constrained coordinate its distance from where the parameters put it."""
        slope = lagrangian.lagrangian_gradient(lin.system, x, params)
        here = Unknowns(x.positions, params=x.params)
        off = jax.tree.map(
            jnp.subtract, here, lagrangian.constrained_coordinates(lin.system, params)
        )
        fixed = Unknowns(off.positions, None, slope.multipliers, off.params)
        return _at_active_set(lin.null, fixed, slope)

    def operator(self, lin: Linearization) -> tuple[Operator, Unknowns | None]:
        return kkt_operator(lin.system, lin.unknowns, lin.null)

    def solved(self, side: Unknowns, x: Unknowns) -> Unknowns:
        return x

    def stored(self, lin: Linearization, x: Unknowns) -> Any:
        return x.positions

    def unknown(self, lin: Linearization, value: Any) -> Unknowns:
        return value if isinstance(value, Unknowns) else Unknowns(value)

    def read(self, lin: Linearization, x: Unknowns, params: Params) -> Unknowns:
        """What users get of the unknowns: positions, relaxed parameters, and the multiplier of every
        constraint, those of bounds and pins included.
        """
        at = {**params, **(x.params or {})}
        multipliers = lagrangian.multipliers_at(lin.system, x, at)
        return Unknowns(x.positions, None, multipliers, x.params)

    def motion(self, lin: Linearization, tangent: Params) -> Unknowns:
        """The derivative of the constrained coordinates along a change of the parameters; zero for
        the others.
        """
        rate = along(
            lambda p: lagrangian.constrained_coordinates(lin.system, p), lin.params, tangent
        )
        still = None
        if self.multipliers is not None:
            still = jax.tree.map(jnp.zeros_like, self.multipliers)
        return Unknowns(rate.positions, None, still, rate.params)

    def parameter_side(self, lin: Linearization, tangent: Params) -> Unknowns:
        place = lin.unknowns, lin.params
        change = self.motion(lin, tangent), _filled(lin, tangent)
        rate = jax.jvp(lambda x, p: _slope(lin, x, p), place, change)[1]
        return lin.null.free(_negative(rate))

    def displacement(self, lin: Linearization, tangent: Params, x: Unknowns) -> tuple[Any, Any]:
        whole = jax.tree.map(jnp.add, self.motion(lin, tangent), x)
        place, change = (lin.unknowns, lin.params), (whole, _filled(lin, tangent))
        value = jax.jvp(lambda x, p: self.read(lin, x, p), place, change)[1]
        return value, value.positions - _affine(lin.system, tangent, lin.system.positions)

    def cotangent(self, lin: Linearization, value: Unknowns, w: jax.Array) -> Unknowns:
        """Zero for the multipliers and relaxed parameters that ``value`` does not name."""
        shapes = jax.eval_shape(lambda c: self.read(c, c.unknowns, c.params), lin.traced(()))
        parts: dict[str, Any] = {}
        for field in ("multipliers", "params"):
            known, some = getattr(shapes, field), getattr(value, field) or {}
            for name, array in some.items():
                if known is None or name not in known:
                    raise InputError(
                        f"cotangent.{field} has {name!r}: give some of {list(known or ())}."
                    )
                if jnp.shape(array) != known[name].shape:
                    raise InputError(
                        f"cotangent.{field}[{name!r}] has shape {jnp.shape(array)}: give"
                        f" {known[name].shape}."
                    )
            parts[field] = known and {
                name: (
                    jnp.asarray(real_array(f"cotangent.{field}[{name!r}]", some[name]), w.dtype)
                    if name in some
                    else jnp.zeros(shape.shape, w.dtype)
                )
                for name, shape in known.items()
            }
        return Unknowns(w, None, parts["multipliers"], parts["params"])

    def cotangent_side(self, lin: Linearization, cotangent: Unknowns) -> Unknowns:
        return lin.null.free(self._pulled(lin, cotangent)[0])

    def parameter_gradient(
        self, lin: Linearization, cotangent: Unknowns, x: Unknowns
    ) -> dict[str, Any]:
        """The transpose of ``displacement`` after ``parameter_side``, step by step from its end."""
        of_unknowns, direct = self._pulled(lin, cotangent)
        pull = jax.vjp(lambda y, p: _slope(lin, y, p), lin.unknowns, lin.params)[1]
        by_slope, by_params = pull(x)
        owed = jax.tree.map(jnp.subtract, of_unknowns, by_slope)
        place = Unknowns(owed.positions, params=owed.params)
        pull = jax.vjp(lambda p: lagrangian.constrained_coordinates(lin.system, p), lin.params)[1]
        (by_place,) = pull(place)
        return jax.tree.map(lambda a, b, c: a - b + c, direct, by_params, by_place)

    def force_side(self, lin: Linearization, force: Unknowns) -> Unknowns:
        none = jax.tree.map(jnp.zeros_like, lin.unknowns)
        return lin.null.free(dataclasses.replace(none, positions=force.positions))

    def at(self, minimum: Equilibrium, system: System) -> Self:
        if self.multipliers is None:
            return self
        unknowns = lagrangian.unknowns_of(system, minimum.multipliers)
        return dataclasses.replace(self, multipliers=unknowns.multipliers)

    def _pulled(self, lin: Linearization, cotangent: Unknowns) -> tuple[Unknowns, Any]:
        """A cotangent of what users get, as one of the unknowns and the direct one of the
        parameters.
        """
        value, pull = jax.vjp(lambda x, p: self.read(lin, x, p), lin.unknowns, lin.params)
        none = jax.tree.map(jnp.zeros_like, value)
        multipliers, params = cotangent.multipliers, cotangent.params
        return pull(
            dataclasses.replace(
                cotangent,
                multipliers=none.multipliers if multipliers is None else multipliers,
                params=none.params if params is None else params,
            )
        )


def _slope(lin: Linearization, x: Unknowns, params: Params) -> Unknowns:
    return lagrangian.lagrangian_gradient(lin.system, x, params)


def _filled(lin: Linearization, tangent: Params) -> dict[str, Any]:
    """A change of all parameters: zero for those that ``tangent`` does not name."""
    return {
        name: tangent[name] if name in tangent else jnp.zeros_like(v)
        for name, v in lin.params.items()
    }


def _at_active_set(null: NullSpace, fixed: Unknowns, free: Unknowns) -> Unknowns:
    """``fixed`` where constraints fix a coordinate, ``free`` elsewhere."""
    mask = null.active_set
    assert mask is not None
    whole = Unknowns(mask.positions, None, mask.multipliers, mask.params)
    return jax.tree.map(jnp.where, whole, fixed, free)
