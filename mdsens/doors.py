"""The one linear solve that stands behind every derivative at a minimum.

All of them are one rule, H dR = - d2U/dR dp . dp, at a point where dU/dR = 0; a :class:`Door` says what stands on the
right of it and what is made of the answer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mdsens import lagrangian
from mdsens._checks import require_host
from mdsens._tables import Shown
from mdsens.constrained import flat, kkt_operator, scaled, unflat
from mdsens.implicit.linear import solve as solve_linear
from mdsens.implicit.operators import Auto, Direct, Method
from mdsens.implicit.status import InputError, Portable, SolveStats, Status
from mdsens.linearization import Linearization, by_factor, force_left
from mdsens.parameters import Parameter, component
from mdsens.relaxation import Equilibrium
from mdsens.scales import scales
from mdsens.stationarity import Unknowns, along, hessian_operator, linearisation, mixed_product, mixed_transpose
from mdsens.stiffness import Stiffness
from mdsens.strains import forces_of_strain
from mdsens.system import System, box_at

__all__ = [
    "FORCE",
    "JVP",
    "STRAIN",
    "VJP",
    "Door",
    "Response",
    "aside",
    "dropped_any",
    "finite_or_said",
    "held_motion",
    "norms",
    "read",
    "strain_is_silent",
    "through",
    "through_batch",
    "without_round_off",
]

Params = Mapping[str, Any]
ASIDE = 1e-3  # of the law's length


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Response(Portable, Shown):
    """A derivative at a minimum, with its evidence.

    Attributes:
      value: of ``jvp`` and ``response`` the derivative of the stored positions, (n, d), mean displacement zero and
        rows of rattlers zero; of ``jacobian`` (n, d, *shape of the parameter); of ``vjp`` and ``gradient`` a dict
        shaped like the parameters. At a pressure, of positions and cell: ``Unknowns``, with ``strain`` the change of
        the cell, d box = strain box, as a Mandel vector (m,).
      stats: of the linear solve: status, relative residual, iterations, part dropped, solver.
      nonaffine: ``value`` less the affine part (d box) box^-1 R, which is free of the choice of images; equal to
        ``value`` where the box does not move; None where ``value`` is a dict.
      max_force: of the minimum.
      rattlers: (n,) particles that are held by nothing, whose rows are zero.
      wrt: the parameters that ``value`` is by, of ``jacobian``, ``vjp`` and ``gradient``; else empty.

    The derivative by a symmetric matrix of species pairs is a symmetric matrix as well: entries (a, b) and (b, a) are
    half each of the derivative by the one physical number that both stand for, so that the sum of its product with a
    symmetric change is what that change gives. :meth:`component` gives the whole.
    """

    value: Any
    stats: SolveStats
    nonaffine: Any
    max_force: jax.Array
    rattlers: jax.Array
    wrt: tuple[Parameter, ...] = dataclasses.field(default=(), metadata={"static": True})

    def component(self, label: str) -> Any:
        """The derivative by one number among the parameters.

        Args:
          label: as on the command line: ``"epsilon"`` of a scalar, ``"sigma[3]"``, or of a matrix of species pairs
            ``"sigma[0,1]"``, which is the derivative as that entry and its mirror image change together.

        Returns:
          of ``vjp`` and ``gradient`` the derivative of the observable, of its shape; of ``jacobian`` that of the
          positions, (n, d), or ``Unknowns``. Of a batch, with its leading axis.
        """
        if not self.wrt:
            raise InputError("this derivative is along one direction, and has no components: take ms.jacobian.")
        parameter, index = component(self.wrt, label)
        derivative = self.value[parameter.name] if isinstance(self.value, Mapping) else self.value
        return jax.tree.map(lambda leaf: parameter.whole(leaf, index), derivative)

    @property
    def status(self) -> Status:
        """The status of a single response."""
        return Status(int(self.stats.status))

    _title = "Response"

    def _rows(self) -> list[tuple[str, str]]:
        codes = np.atleast_1d(np.asarray(self.stats.status)).ravel()
        worst = Status(int(codes.max(initial=0)))
        named, rows = {parameter.name: parameter for parameter in self.wrt}, []
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.value):
            key = str(getattr(path[-1], "key", "")) if path else ""
            parameter = named.get(key, self.wrt[0]) if self.wrt else Parameter("", ())
            pairs = " by each pair of species once" if parameter.paired else ""
            text = f"shape {tuple(leaf.shape)}, norm {parameter.size(leaf):.6g}{pairs}"
            rows.append(("value" + jax.tree_util.keystr(path), text))
        return [
            *rows,
            ("status", f"{worst.name}: {worst.sentence}" + (f" (worst of {codes.size})" if codes.size > 1 else "")),
            ("solver", f"{self.stats.solver}, {int(np.max(np.asarray(self.stats.iterations), initial=0)):,} products"),
            ("residual", f"{float(np.max(np.asarray(self.stats.residual), initial=0.0)):.1e}"),
            ("dropped", f"{float(np.max(np.asarray(self.stats.dropped), initial=0.0)):.1e}"),
            ("max_force", f"{float(np.max(np.asarray(self.max_force), initial=0.0)):.1e}"),
            ("rattlers", f"{int(np.sum(np.asarray(self.rattlers)))}"),
        ]


def _with_outcome(lin: Linearization, stats: SolveStats, value: Any) -> SolveStats:
    """The solve's stats, NOT_FINITE where the value is, under the minimum's own status where that is bad.

    In single precision a solve that went well does not make the derivative good: round-off alone leaves a force at
    which contacts are undecided (16,384 discs, residual 1e-5: an error of a half).
    """
    code = lin.status
    stats = finite_or_said(stats, jnp.all(jnp.stack([jnp.all(jnp.isfinite(v)) for v in jax.tree.leaves(value)])))
    ended = stats.status
    if jnp.finfo(lin.system.positions.dtype).eps > 1e-10:
        ended = jnp.where(ended <= Status.ROUND_OFF_LIMITED.value, Status.SINGLE_PRECISION.value, ended)
    return dataclasses.replace(stats, status=jnp.where(code > 0, code, ended))


def finite_or_said(stats: SolveStats, finite: jax.Array) -> SolveStats:
    """A good solve can still meet a derivative of the law or the observable that is not finite."""
    good = stats.status < Status.MAX_STEPS_REACHED.value
    return dataclasses.replace(stats, status=jnp.where(good & ~finite, Status.NOT_FINITE.value, stats.status))


def _affine(system: System, tangent: Params, positions: jax.Array) -> jax.Array:
    """(d box / dp . dp) box^-1 R, (n, d)."""
    if system.box is None:
        return jnp.zeros_like(positions)
    change = along(lambda p: box_at(system, p), system.params, tangent)
    return positions @ jnp.linalg.solve(box_at(system, system.params).T, change.T)


def held_motion(lin: Linearization, tangent: Params) -> Unknowns:
    """How what is held moves with the parameters; zero where nothing holds."""
    rate = along(lambda p: lagrangian.placed(lin.system, p), lin.params, tangent)
    still = None if lin.multipliers is None else jax.tree.map(jnp.zeros_like, lin.multipliers)
    return Unknowns(rate.positions, None, still, rate.params)


def _filled(lin: Linearization, tangent: Params) -> dict[str, Any]:
    return {name: tangent[name] if name in tangent else jnp.zeros_like(v) for name, v in lin.params.items()}


def _slope(lin: Linearization, x: Unknowns, params: Params) -> Unknowns:
    return lagrangian.lagrangian_slope(lin.system, x, params)


def read(lin: Linearization, x: Unknowns, params: Params) -> Unknowns:
    """What the doors give of the unknowns: positions, relaxed parameters and every constraint's multiplier."""
    at = {**params, **(x.params or {})}
    return Unknowns(x.positions, None, lagrangian.multipliers_at(lin.system, x, at), x.params)


def _jvp_side(lin: Linearization, tangent: Params) -> Unknowns:
    if lin.held is not None:
        motion = held_motion(lin, tangent)
        place, change = (lin.unknowns, lin.params), _filled(lin, tangent)
        rate = jax.jvp(lambda x, p: _slope(lin, x, p), place, (motion, change))[1]
        return lin.null.free(jax.tree.map(jnp.negative, rate))
    if lin.cell is None:
        return jax.tree.map(jnp.negative, mixed_product(lin.system, tangent))
    return jax.tree.map(jnp.negative, along(lambda p: lin.condition(lin.unknowns, p), lin.params, tangent))


def _jvp_response(lin: Linearization, tangent: Params, x: Unknowns, stats: SolveStats) -> Response:
    value, rest = lin.stored(x), x.positions
    if lin.held is not None:
        whole = jax.tree.map(jnp.add, held_motion(lin, tangent), x)
        place = lin.unknowns, lin.params
        value = jax.jvp(lambda x, p: read(lin, x, p), place, (whole, _filled(lin, tangent)))[1]
        rest = value.positions - _affine(lin.system, tangent, lin.system.positions)
        stats = _with_outcome(lin, stats, value)
        return Response(value, stats, rest, lin.equilibrium.max_force, lin.network.rattlers)
    if x.strain is None:
        rest = rest - _affine(lin.system, tangent, lin.system.positions)
    nonaffine = lin.null.project(Unknowns(rest)).positions
    stats = _with_outcome(lin, stats, (value, nonaffine))
    return Response(value, stats, nonaffine, lin.equilibrium.max_force, lin.network.rattlers)


def _given(lin: Linearization, side: Unknowns) -> Unknowns:
    if lin.held is None:
        return side
    return lin.null.free(dataclasses.replace(jax.tree.map(jnp.zeros_like, lin.unknowns), positions=side.positions))


def _pulled(lin: Linearization, cotangent: Unknowns) -> tuple[Unknowns, Any]:
    """A cotangent of what the doors give, as one of the unknowns and the direct one of the parameters."""
    value, pull = jax.vjp(lambda x, p: read(lin, x, p), lin.unknowns, lin.params)
    none = jax.tree.map(jnp.zeros_like, value)
    return pull(
        dataclasses.replace(
            cotangent,
            multipliers=none.multipliers if cotangent.multipliers is None else cotangent.multipliers,
            params=none.params if cotangent.params is None else cotangent.params,
        )
    )


def _vjp_side(lin: Linearization, cotangent: Unknowns) -> Unknowns:
    return cotangent if lin.held is None else lin.null.free(_pulled(lin, cotangent)[0])


def _held_vjp(lin: Linearization, cotangent: Unknowns, x: Unknowns) -> Params:
    """The transpose of what ``jvp`` makes of the parameters' changes, step by step from its end."""
    of_unknowns, direct = _pulled(lin, cotangent)
    by_slope, by_params = jax.vjp(lambda y, p: _slope(lin, y, p), lin.unknowns, lin.params)[1](x)
    owed = jax.tree.map(jnp.subtract, of_unknowns, by_slope)
    place = Unknowns(owed.positions, params=owed.params)
    by_place = jax.vjp(lambda p: lagrangian.placed(lin.system, p), lin.params)[1](place)[0]
    return jax.tree.map(lambda a, b, c: a - b + c, direct, by_params, by_place)


def _vjp_response(lin: Linearization, cotangent: Unknowns, x: Unknowns, stats: SolveStats) -> Response:
    if lin.held is not None:
        value = _held_vjp(lin, cotangent, x)
        stats = _with_outcome(lin, stats, value)
        return Response(value, stats, None, lin.equilibrium.max_force, lin.network.rattlers)
    if x.strain is None:
        transposed = mixed_transpose(lin.system, x)
    else:
        transposed = jax.vjp(lambda p: lin.condition(lin.unknowns, p), lin.params)[1](x)[0]
    value = jax.tree.map(jnp.negative, transposed)
    stats = _with_outcome(lin, stats, value)
    return Response(value, stats, None, lin.equilibrium.max_force, lin.network.rattlers)


def _force_response(lin: Linearization, given: Any, x: Unknowns, stats: SolveStats) -> Response:
    stats = _with_outcome(lin, stats, x.positions)
    return Response(x.positions, stats, x.positions, lin.equilibrium.max_force, lin.network.rattlers)


def _strain_side(lin: Linearization, strain: jax.Array) -> Unknowns:
    forces = forces_of_strain(lin.system, strain)
    # what is round-off has no response
    return Unknowns(jnp.where(strain_is_silent(lin.system, forces), 0.0, forces))


def strain_is_silent(system: System, forces: jax.Array) -> jax.Array:
    """Whether the forces that a strain makes (n, d) are round-off, as in a crystal whose atoms are centres of symmetry.
    Traceable.
    """
    length, stiffness = scales(system)
    return jnp.max(jnp.abs(forces)) <= 1e4 * jnp.finfo(forces.dtype).eps * length * stiffness


class Door(NamedTuple):
    """A derivative as the right-hand side of its solve, and as what is made of the answer.

    ``moving`` are the parameters by which it is taken, of all of them and of what is given.
    """

    side: Callable[[Linearization, Any], Unknowns]
    response: Callable[[Linearization, Any, Unknowns, SolveStats], Response]
    moving: Callable[[Params, Any], Sequence[str]]


JVP = Door(_jvp_side, _jvp_response, lambda params, tangent: tuple(tangent))
VJP = Door(_vjp_side, _vjp_response, lambda params, cotangent: tuple(params))
FORCE = Door(_given, _force_response, lambda params, force: ())
STRAIN = Door(_strain_side, _force_response, lambda params, strain: ())


def through(door: Door, lin: Linearization, given: Any, many: bool = False) -> Response:
    """A door's response to what is given, or to each of many; by the factor on the host, or all of it compiled."""
    core, held = lin.traced(door.moving(lin.system.params, given)), lin.stiffness
    if held is not None and by_factor(lin.system, lin.solve, many):
        assert isinstance(lin.solve, Auto | Direct)
        require_host("a factor", "take solve=CG() or another iteration of mdsens.implicit there", given)
        sides = _sides(core, given, door, many)  # while the host factorises
        if held.factor is not None:
            columns = flat(sides, many)
            x, stats = held.solve_many(columns if many else columns[:, None], lin.solve.rtol)
            stats = jax.tree.map(lambda leaf: leaf[0] if many else leaf[0, 0], stats)
            x = unflat(x if many else x[:, 0], lin.unknowns, many)
            return _without_round_off(door, core, given, _responses(core, given, sides, x, stats, door, many), many)
    if held is not None and lin.held is None:
        core = dataclasses.replace(core, blocks=held.blocks)
    return _without_round_off(door, core, given, _compiled(core, given, door, many), many)


def through_batch(door: Door, eq: Equilibrium, given: Any, solve: Method) -> Response | None:
    """A door's response of each member of a batch to what is given for it, by one factor of all their Hessians.

    None where there is no such factor: then each goes through by itself.

    Args:
      solve: one of which ``by_factor`` holds.
    """
    assert isinstance(solve, Auto | Direct)
    if not np.isfinite(np.asarray(eq.positions)).all():
        return None
    backbone, net, null = linearisation(eq.system, eq.max_force, eq.held_by)
    stiffness = Stiffness(backbone, null.simplified(), eq.order)
    judged = force_left(eq.system, net, eq.max_force)
    lin = Linearization(eq, backbone, net, stiffness.null, solve, judged=judged)
    core = lin.traced(door.moving(eq.params, given))
    sides = _sides(core, given, door, False)
    if stiffness.factor is None:
        return None
    forces = np.asarray(sides.positions)
    x, stats = stiffness.solve_many(forces.reshape(-1, 1), solve.rtol)
    stats = jax.tree.map(lambda leaf: leaf[:, 0], stats)
    found = _responses(core, given, sides, Unknowns(jnp.asarray(x.reshape(forces.shape))), stats, door, False)
    return _without_round_off(door, core, given, found, False)


def dropped_any(status: Any) -> bool:
    """Whether one of some statuses says that a part of the right-hand side was dropped; traced ones do not tell."""
    return not isinstance(status, Tracer) and bool(np.any(np.asarray(status) == Status.NULL_COMPONENT_DROPPED.value))


def aside(lin: Linearization) -> Linearization:
    """The same a little beside the minimum, by a thousandth of the law's length: there, nothing cancels."""
    system = lin.system
    length = scales(system)[0] if system.batch is None else jax.vmap(scales)(system)[0][:, None, None]
    R = system.positions
    wave = jnp.cos(jnp.arange(R.size, dtype=R.dtype) ** 2).reshape(R.shape)
    return dataclasses.replace(lin, system=system.replace(positions=R + ASIDE * length * wave))


def without_round_off(stats: SolveStats, size: Any, beside: Any, dtype: Any) -> SolveStats:
    """The solve's stats, where what was dropped is measured against what the right-hand side is beside the minimum.

    At the minimum that may vanish, as the energy's own gradient does, or that of an atom that is a centre of symmetry:
    what is left is round-off, much of it along translations, and no part of any answer.

    Args:
      size: norm of the right-hand side.
      beside: that at :func:`aside`.
      dtype: of the right-hand side.
    """
    eps = float(jnp.finfo(dtype).eps)
    share = stats.dropped * size / jnp.maximum(jnp.maximum(size, beside), jnp.finfo(dtype).tiny)
    good = Status.CONVERGED if eps < 1e-10 else Status.SINGLE_PRECISION
    gone = (stats.status == Status.NULL_COMPONENT_DROPPED.value) & (share <= eps**0.5)
    status = jnp.where(gone, good.value, stats.status)
    return dataclasses.replace(stats, status=status, dropped=jnp.where(gone, share, stats.dropped))


def _without_round_off(door: Door, core: Linearization, given: Any, found: Response, many: bool) -> Response:
    """For a door whose right-hand side is a derivative at the minimum, and not what was given."""
    if door is not JVP or not dropped_any(found.stats.status):
        return found
    here, beside = (_sizes(at, given, door, many) for at in (core, aside(core)))
    return dataclasses.replace(found, stats=without_round_off(found.stats, here, beside, core.system.positions.dtype))


@functools.partial(jax.jit, static_argnames=("door", "many"))
def _sizes(lin: Linearization, given: Any, door: Door, many: bool) -> jax.Array:
    """The norm of a door's right-hand side, or of each of many."""
    return norms(_sides(lin, given, door, many), many or lin.system.batch is not None)


def norms(sides: Unknowns, many: bool) -> jax.Array:
    """The norm of a solve's right-hand side, or of each of many: of all unknowns but the strain, which comes after."""
    first, leaves = 1 if many else 0, jax.tree.leaves(dataclasses.replace(sides, strain=None))
    return jnp.sqrt(sum(jnp.sum(leaf**2, axis=tuple(range(first, leaf.ndim))) for leaf in leaves))


@functools.partial(jax.jit, static_argnames=("door", "many"))
def _compiled(lin: Linearization, given: Any, door: Door, many: bool) -> Response:
    if lin.held is None:
        operator, unit = hessian_operator(lin.system, lin.null, lin.blocks, definite=not lin.equilibrium.order), None
    else:
        operator, unit = kkt_operator(lin.system, lin.unknowns, lin.null)

    def one(given: Any) -> Response:
        side = door.side(lin, given)
        b = dataclasses.replace(side, strain=None)
        x, stats = solve_linear(operator, b if unit is None else scaled(b, unit), lin.solve)
        return door.response(lin, given, lin.solved(side, x if unit is None else scaled(x, unit)), stats)

    return jax.vmap(one)(given) if many else one(given)


@functools.partial(jax.jit, static_argnames=("door", "many"))
def _sides(lin: Linearization, given: Any, door: Door, many: bool) -> Unknowns:
    if lin.system.batch is not None:
        return jax.vmap(door.side)(lin, given)
    side = functools.partial(door.side, lin)
    return jax.vmap(side)(given) if many else side(given)


@functools.partial(jax.jit, static_argnames=("door", "many"))
def _responses(
    lin: Linearization, given: Any, sides: Unknowns, x: Any, stats: SolveStats, door: Door, many: bool
) -> Response:
    def response(lin: Linearization, given: Any, side: Unknowns, x: Any, stats: SolveStats) -> Response:
        return door.response(lin, given, lin.solved(side, x), stats)

    if lin.system.batch is not None:
        return jax.vmap(response)(lin, given, sides, x, stats)
    of_one = functools.partial(response, lin)
    return jax.vmap(of_one)(given, sides, x, stats) if many else of_one(given, sides, x, stats)
