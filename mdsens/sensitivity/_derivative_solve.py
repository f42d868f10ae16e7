"""The one linear solve that stands behind every derivative at a minimum.

All of them are one rule, H dR = - d2U/dR dp . dp, at a point where dU/dR = 0; a :class:`DerivativeRule` says
what stands on the right of it and what is made of the answer.
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

from mdsens._util.outcome import Severity, is_good, severity_of
from mdsens._util.validation import require_host
from mdsens.implicit.linear.operators import Auto, Direct, Method
from mdsens.implicit.linear.result import SolveStats
from mdsens.implicit.linear.solution import solve as solve_linear
from mdsens.mechanics import lagrangian
from mdsens.mechanics.hessian import (
    Unknowns,
    along,
    hessian_operator,
    mixed_product,
    mixed_transpose,
)
from mdsens.mechanics.hessian_factor import HessianFactor
from mdsens.mechanics.kkt_operator import flat, kkt_operator, scaled, unflat
from mdsens.mechanics.rigidity import analyze_rigidity
from mdsens.mechanics.status import Status
from mdsens.mechanics.strain import forces_of_strain
from mdsens.mechanics.units import natural_units
from mdsens.model.system import System, box_at
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity.linearization import Linearization, by_factor, force_left
from mdsens.sensitivity.results import Derivative, Displacement, ParameterGradient

__all__ = [
    "FORCE",
    "JVP",
    "STRAIN",
    "VJP",
    "DerivativeRule",
    "aside",
    "dropped_any",
    "status_of_finite",
    "constrained_motion",
    "norms",
    "read",
    "strain_is_silent",
    "solve_derivative",
    "solve_derivative_batch",
    "without_round_off",
]

Params = Mapping[str, Any]
ASIDE = 1e-3  # of the potential's length


def _with_outcome(lin: Linearization, stats: SolveStats, value: Any) -> SolveStats:
    """The solve's stats, NOT_FINITE where the value is, under the minimum's own status where that
    is bad.

    In single precision a solve that went well does not make the derivative good: round-off alone
      leaves a force at
    which contacts are undecided (16,384 discs, residual 1e-5: an error of a half).
    """
    code = lin.status
    stats = status_of_finite(
        stats, jnp.all(jnp.stack([jnp.all(jnp.isfinite(v)) for v in jax.tree.leaves(value)]))
    )
    ended = stats.status
    if jnp.finfo(lin.system.positions.dtype).eps > 1e-10:
        ended = jnp.where(
            severity_of(ended) < Severity.WARNING, Status.SINGLE_PRECISION.value, ended
        )
    return dataclasses.replace(stats, status=jnp.where(code != Status.CONVERGED.value, code, ended))


def status_of_finite(stats: SolveStats, finite: jax.Array) -> SolveStats:
    """A good solve can still meet a derivative of the potential or the observable that is not finite."""
    good = is_good(stats.status)
    return dataclasses.replace(
        stats, status=jnp.where(good & ~finite, Status.NOT_FINITE.value, stats.status)
    )


def _affine(system: System, tangent: Params, positions: jax.Array) -> jax.Array:
    """(d box / dp . dp) box^-1 R, (n, d)."""
    if system.box is None:
        return jnp.zeros_like(positions)
    change = along(lambda p: box_at(system, p), system.params, tangent)
    return positions @ jnp.linalg.solve(box_at(system, system.params).T, change.T)


def _evidence(lin: Linearization) -> dict[str, Any]:
    """What a derivative says of its minimum."""
    return {"max_force": lin.equilibrium.max_force, "rattlers": lin.network.rattlers}


def constrained_motion(lin: Linearization, tangent: Params) -> Unknowns:
    """How what is held moves with the parameters; zero where nothing holds."""
    rate = along(lambda p: lagrangian.constrained_coordinates(lin.system, p), lin.params, tangent)
    still = None if lin.multipliers is None else jax.tree.map(jnp.zeros_like, lin.multipliers)
    return Unknowns(rate.positions, None, still, rate.params)


def _filled(lin: Linearization, tangent: Params) -> dict[str, Any]:
    return {
        name: tangent[name] if name in tangent else jnp.zeros_like(v)
        for name, v in lin.params.items()
    }


def _slope(lin: Linearization, x: Unknowns, params: Params) -> Unknowns:
    return lagrangian.lagrangian_gradient(lin.system, x, params)


def read(lin: Linearization, x: Unknowns, params: Params) -> Unknowns:
    """What the doors give of the unknowns: positions, relaxed parameters and every constraint's
    multiplier.
    """
    at = {**params, **(x.params or {})}
    return Unknowns(x.positions, None, lagrangian.multipliers_at(lin.system, x, at), x.params)


def _jvp_right_hand_side(lin: Linearization, tangent: Params) -> Unknowns:
    if lin.constraint_status is not None:
        motion = constrained_motion(lin, tangent)
        place, change = (lin.unknowns, lin.params), _filled(lin, tangent)
        rate = jax.jvp(lambda x, p: _slope(lin, x, p), place, (motion, change))[1]
        return lin.null.free(jax.tree.map(jnp.negative, rate))
    if lin.cell is None:
        return jax.tree.map(jnp.negative, mixed_product(lin.system, tangent))
    return jax.tree.map(
        jnp.negative, along(lambda p: lin.condition(lin.unknowns, p), lin.params, tangent)
    )


def _jvp_result(
    lin: Linearization, tangent: Params, x: Unknowns, stats: SolveStats
) -> Displacement:
    value, rest = lin.stored(x), x.positions
    if lin.constraint_status is not None:
        whole = jax.tree.map(jnp.add, constrained_motion(lin, tangent), x)
        place = lin.unknowns, lin.params
        value = jax.jvp(lambda x, p: read(lin, x, p), place, (whole, _filled(lin, tangent)))[1]
        rest = value.positions - _affine(lin.system, tangent, lin.system.positions)
        stats = _with_outcome(lin, stats, value)
        return Displacement(value=value, nonaffine=rest, stats=stats, **_evidence(lin))
    if x.strain is None:
        rest = rest - _affine(lin.system, tangent, lin.system.positions)
    nonaffine = lin.null.project(Unknowns(rest)).positions
    stats = _with_outcome(lin, stats, (value, nonaffine))
    return Displacement(value=value, nonaffine=nonaffine, stats=stats, **_evidence(lin))


def _force_right_hand_side(lin: Linearization, side: Unknowns) -> Unknowns:
    if lin.constraint_status is None:
        return side
    return lin.null.free(
        dataclasses.replace(jax.tree.map(jnp.zeros_like, lin.unknowns), positions=side.positions)
    )


def _pulled(lin: Linearization, cotangent: Unknowns) -> tuple[Unknowns, Any]:
    """A cotangent of what the doors give, as one of the unknowns and the direct one of the
    parameters.
    """
    value, pull = jax.vjp(lambda x, p: read(lin, x, p), lin.unknowns, lin.params)
    none = jax.tree.map(jnp.zeros_like, value)
    return pull(
        dataclasses.replace(
            cotangent,
            multipliers=(
                none.multipliers if cotangent.multipliers is None else cotangent.multipliers
            ),
            params=none.params if cotangent.params is None else cotangent.params,
        )
    )


def _vjp_right_hand_side(lin: Linearization, cotangent: Unknowns) -> Unknowns:
    return cotangent if lin.constraint_status is None else lin.null.free(_pulled(lin, cotangent)[0])


def _constrained_vjp(lin: Linearization, cotangent: Unknowns, x: Unknowns) -> Params:
    """The transpose of what ``jvp`` makes of the parameters' changes, step by step from its end."""
    of_unknowns, direct = _pulled(lin, cotangent)
    by_slope, by_params = jax.vjp(lambda y, p: _slope(lin, y, p), lin.unknowns, lin.params)[1](x)
    owed = jax.tree.map(jnp.subtract, of_unknowns, by_slope)
    place = Unknowns(owed.positions, params=owed.params)
    by_place = jax.vjp(lambda p: lagrangian.constrained_coordinates(lin.system, p), lin.params)[1](
        place
    )[0]
    return jax.tree.map(lambda a, b, c: a - b + c, direct, by_params, by_place)


def _vjp_result(
    lin: Linearization, cotangent: Unknowns, x: Unknowns, stats: SolveStats
) -> ParameterGradient:
    if lin.constraint_status is not None:
        value = _constrained_vjp(lin, cotangent, x)
        stats = _with_outcome(lin, stats, value)
        return ParameterGradient(value=value, stats=stats, **_evidence(lin))
    if x.strain is None:
        transposed = mixed_transpose(lin.system, x)
    else:
        transposed = jax.vjp(lambda p: lin.condition(lin.unknowns, p), lin.params)[1](x)[0]
    value = jax.tree.map(jnp.negative, transposed)
    stats = _with_outcome(lin, stats, value)
    return ParameterGradient(value=value, stats=stats, **_evidence(lin))


def _force_result(lin: Linearization, force: Any, x: Unknowns, stats: SolveStats) -> Displacement:
    stats = _with_outcome(lin, stats, x.positions)
    return Displacement(value=x.positions, nonaffine=x.positions, stats=stats, **_evidence(lin))


def _strain_right_hand_side(lin: Linearization, strain: jax.Array) -> Unknowns:
    forces = forces_of_strain(lin.system, strain)
    # what is round-off has no response
    return Unknowns(jnp.where(strain_is_silent(lin.system, forces), 0.0, forces))


def strain_is_silent(system: System, forces: jax.Array) -> jax.Array:
    """Whether the forces that a strain makes (n, d) are round-off, as in a crystal whose atoms are
    centers of symmetry. Traceable.
    """
    length, stiffness = natural_units(system)
    return jnp.max(jnp.abs(forces)) <= 1e4 * jnp.finfo(forces.dtype).eps * length * stiffness


class DerivativeRule(NamedTuple):
    """A derivative as the right-hand side of its solve, and as what is made of the answer.

    ``parameters`` are those by which it is taken, of all of them and of what is given.
    """

    right_hand_side: Callable[[Linearization, Any], Unknowns]
    result: Callable[[Linearization, Any, Unknowns, SolveStats], Derivative]
    parameters: Callable[[Params, Any], Sequence[str]]


JVP = DerivativeRule(_jvp_right_hand_side, _jvp_result, lambda params, tangent: tuple(tangent))
VJP = DerivativeRule(_vjp_right_hand_side, _vjp_result, lambda params, cotangent: tuple(params))
FORCE = DerivativeRule(_force_right_hand_side, _force_result, lambda params, force: ())
STRAIN = DerivativeRule(_strain_right_hand_side, _force_result, lambda params, strain: ())


def solve_derivative(
    rule: DerivativeRule, lin: Linearization, given: Any, many: bool = False
) -> Any:
    """A door's response to what is given, or to each of many; by the factor on the host, or all of
    it compiled.
    """
    core, held = lin.traced(rule.parameters(lin.system.params, given)), lin.stiffness
    if held is not None and by_factor(lin.system, lin.solve, many):
        assert isinstance(lin.solve, Auto | Direct)
        require_host(
            "a factor", "take solve=CG() or another iteration of mdsens.implicit there", given
        )
        sides = _right_hand_sides(core, given, rule, many)  # while the host factorizes
        if held.factor is not None:
            columns = flat(sides, many)
            x, stats = held.solve_many(columns if many else columns[:, None], lin.solve.rtol)
            stats = jax.tree.map(lambda leaf: leaf[0] if many else leaf[0, 0], stats)
            x = unflat(x if many else x[:, 0], lin.unknowns, many)
            return _without_round_off(
                rule, core, given, _results(core, given, sides, x, stats, rule, many), many
            )
    if held is not None and lin.constraint_status is None:
        core = dataclasses.replace(core, blocks=held.blocks)
    return _without_round_off(rule, core, given, _compiled(core, given, rule, many), many)


def solve_derivative_batch(rule: DerivativeRule, eq: Equilibrium, given: Any, solve: Method) -> Any:
    """A door's response of each member of a batch to what is given for it, by one factor of all
    their Hessians.

    None where there is no such factor: then each goes through by itself.

    Args:
      solve: one of which ``by_factor`` holds.
    """
    assert isinstance(solve, Auto | Direct)
    if not np.isfinite(np.asarray(eq.positions)).all():
        return None
    backbone, net, null = analyze_rigidity(eq.system, eq.max_force, eq.contacts_needed)
    stiffness = HessianFactor(backbone, null.simplified(), eq.order)
    judged = force_left(eq.system, net, eq.max_force)
    lin = Linearization(eq, backbone, net, stiffness.null, solve, judged=judged)
    core = lin.traced(rule.parameters(eq.params, given))
    sides = _right_hand_sides(core, given, rule, False)
    if stiffness.factor is None:
        return None
    forces = np.asarray(sides.positions)
    x, stats = stiffness.solve_many(forces.reshape(-1, 1), solve.rtol)
    stats = jax.tree.map(lambda leaf: leaf[:, 0], stats)
    found = _results(
        core, given, sides, Unknowns(jnp.asarray(x.reshape(forces.shape))), stats, rule, False
    )
    return _without_round_off(rule, core, given, found, False)


def dropped_any(status: Any) -> bool:
    """Whether one of some statuses says that a part of the right-hand side was dropped; traced ones
    do not tell.
    """
    return not isinstance(status, Tracer) and bool(
        np.any(np.asarray(status) == Status.NULL_COMPONENT_DROPPED.value)
    )


def aside(lin: Linearization) -> Linearization:
    """The same a little beside the minimum, by a thousandth of the potential's length: there, nothing
    cancels.
    """
    system = lin.system
    length = (
        natural_units(system)[0]
        if system.batch is None
        else jax.vmap(natural_units)(system)[0][:, None, None]
    )
    R = system.positions
    wave = jnp.cos(jnp.arange(R.size, dtype=R.dtype) ** 2).reshape(R.shape)
    return dataclasses.replace(lin, system=system.replace(positions=R + ASIDE * length * wave))


def without_round_off(stats: SolveStats, size: Any, beside: Any, dtype: Any) -> SolveStats:
    """The solve's stats, where what was dropped is measured against what the right-hand side is
    beside the minimum.

    At the minimum that may vanish, as the energy's own gradient does, or that of an atom that is a
    center of symmetry: what is left is round-off, much of it along translations, and no part of any
    answer.

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


def _without_round_off(
    rule: DerivativeRule, core: Linearization, given: Any, found: Any, many: bool
) -> Any:
    """For a door whose right-hand side is a derivative at the minimum, and not what was given."""
    if rule is not JVP or not dropped_any(found.stats.status):
        return found
    here, beside = (_sizes(at, given, rule, many) for at in (core, aside(core)))
    return dataclasses.replace(
        found, stats=without_round_off(found.stats, here, beside, core.system.positions.dtype)
    )


@functools.partial(jax.jit, static_argnames=("rule", "many"))
def _sizes(lin: Linearization, given: Any, rule: DerivativeRule, many: bool) -> jax.Array:
    """The norm of a door's right-hand side, or of each of many."""
    return norms(_right_hand_sides(lin, given, rule, many), many or lin.system.batch is not None)


def norms(sides: Unknowns, many: bool) -> jax.Array:
    """The norm of a solve's right-hand side, or of each of many: of all unknowns but the strain,
    which comes after.
    """
    first, leaves = 1 if many else 0, jax.tree.leaves(dataclasses.replace(sides, strain=None))
    return jnp.sqrt(sum(jnp.sum(leaf**2, axis=tuple(range(first, leaf.ndim))) for leaf in leaves))


@functools.partial(jax.jit, static_argnames=("rule", "many"))
def _compiled(lin: Linearization, given: Any, rule: DerivativeRule, many: bool) -> Any:
    if lin.constraint_status is None:
        operator, unit = (
            hessian_operator(lin.system, lin.null, lin.blocks, definite=not lin.equilibrium.order),
            None,
        )
    else:
        operator, unit = kkt_operator(lin.system, lin.unknowns, lin.null)

    def one(given: Any) -> Any:
        side = rule.right_hand_side(lin, given)
        b = dataclasses.replace(side, strain=None)
        x, stats = solve_linear(operator, b if unit is None else scaled(b, unit), lin.solve)
        return rule.result(
            lin, given, lin.solved(side, x if unit is None else scaled(x, unit)), stats
        )

    return jax.vmap(one)(given) if many else one(given)


@functools.partial(jax.jit, static_argnames=("rule", "many"))
def _right_hand_sides(lin: Linearization, given: Any, rule: DerivativeRule, many: bool) -> Unknowns:
    if lin.system.batch is not None:
        return jax.vmap(rule.right_hand_side)(lin, given)
    side = functools.partial(rule.right_hand_side, lin)
    return jax.vmap(side)(given) if many else side(given)


@functools.partial(jax.jit, static_argnames=("rule", "many"))
def _results(
    lin: Linearization,
    given: Any,
    sides: Unknowns,
    x: Any,
    stats: SolveStats,
    rule: DerivativeRule,
    many: bool,
) -> Any:
    def response(lin: Linearization, given: Any, side: Unknowns, x: Any, stats: SolveStats) -> Any:
        return rule.result(lin, given, lin.solved(side, x), stats)

    if lin.system.batch is not None:
        return jax.vmap(response)(lin, given, sides, x, stats)
    of_one = functools.partial(response, lin)
    return jax.vmap(of_one)(given, sides, x, stats) if many else of_one(given, sides, x, stats)
