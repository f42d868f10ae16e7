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
from mdsens.mechanics.hessian import (
    Unknowns,
)
from mdsens.mechanics.hessian_factor import HessianFactor
from mdsens.mechanics.kkt_operator import flat, scaled, unflat
from mdsens.mechanics.rigidity import analyze_rigidity
from mdsens.mechanics.status import Status
from mdsens.mechanics.strain import forces_of_strain
from mdsens.mechanics.units import natural_units
from mdsens.model.system import System
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
    "norms",
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


def _evidence(lin: Linearization) -> dict[str, Any]:
    """What a derivative says of its minimum."""
    return {"max_force": lin.equilibrium.max_force, "rattlers": lin.network.rattlers}


def _jvp_side(lin: Linearization, tangent: Params) -> Unknowns:
    return lin.structure.parameter_side(lin, tangent)


def _jvp_result(
    lin: Linearization, tangent: Params, x: Unknowns, stats: SolveStats
) -> Displacement:
    value, nonaffine = lin.structure.displacement(lin, tangent, x)
    stats = _with_outcome(lin, stats, (value, nonaffine))
    return Displacement(value=value, nonaffine=nonaffine, stats=stats, **_evidence(lin))


def _vjp_side(lin: Linearization, cotangent: Unknowns) -> Unknowns:
    return lin.structure.cotangent_side(lin, cotangent)


def _vjp_result(
    lin: Linearization, cotangent: Unknowns, x: Unknowns, stats: SolveStats
) -> ParameterGradient:
    value = lin.structure.parameter_gradient(lin, cotangent, x)
    stats = _with_outcome(lin, stats, value)
    return ParameterGradient(value=value, stats=stats, **_evidence(lin))


def _force_side(lin: Linearization, force: Unknowns) -> Unknowns:
    return lin.structure.force_side(lin, force)


def _force_result(lin: Linearization, force: Any, x: Unknowns, stats: SolveStats) -> Displacement:
    stats = _with_outcome(lin, stats, x.positions)
    return Displacement(value=x.positions, nonaffine=x.positions, stats=stats, **_evidence(lin))


def _strain_side(lin: Linearization, strain: jax.Array) -> Unknowns:
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


JVP = DerivativeRule(_jvp_side, _jvp_result, lambda params, tangent: tuple(tangent))
VJP = DerivativeRule(_vjp_side, _vjp_result, lambda params, cotangent: tuple(params))
FORCE = DerivativeRule(_force_side, _force_result, lambda params, force: ())
STRAIN = DerivativeRule(_strain_side, _force_result, lambda params, strain: ())


def solve_derivative(
    rule: DerivativeRule, lin: Linearization, given: Any, many: bool = False
) -> Any:
    """A door's response to what is given, or to each of many; by the factor on the host, or all of
    it compiled.
    """
    core = lin.traced(rule.parameters(lin.system.params, given))
    factor = lin.factor
    if factor is not None and by_factor(lin.system, lin.solve, many):
        assert isinstance(lin.solve, Auto | Direct)
        require_host(
            "a factor", "take solve=CG() or another iteration of mdsens.implicit there", given
        )
        sides = _right_hand_sides(core, given, rule, many)  # while the host factorizes
        if factor.factor is not None:
            columns = flat(sides, many)
            x, stats = factor.solve_many(columns if many else columns[:, None], lin.solve.rtol)
            stats = jax.tree.map(lambda leaf: leaf[0] if many else leaf[0, 0], stats)
            x = unflat(x if many else x[:, 0], lin.unknowns, many)
            return _without_round_off(
                rule, core, given, _results(core, given, sides, x, stats, rule, many), many
            )
    if isinstance(factor, HessianFactor):
        core = dataclasses.replace(core, blocks=factor.blocks)
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
    factor = HessianFactor(backbone, null.simplified(), eq.order)
    judged = force_left(eq.system, net, eq.max_force)
    lin = Linearization(eq, backbone, net, factor.null, solve, force_status=judged)
    core = lin.traced(rule.parameters(eq.params, given))
    sides = _right_hand_sides(core, given, rule, False)
    if factor.factor is None:
        return None
    forces = np.asarray(sides.positions)
    x, stats = factor.solve_many(forces.reshape(-1, 1), solve.rtol)
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
    operator, unit = lin.structure.operator(lin)

    def one(given: Any) -> Any:
        side = rule.right_hand_side(lin, given)
        b = dataclasses.replace(side, strain=None)
        x, stats = solve_linear(operator, b if unit is None else scaled(b, unit), lin.solve)
        return rule.result(
            lin, given, lin.structure.solved(side, x if unit is None else scaled(x, unit)), stats
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
        return rule.result(lin, given, lin.structure.solved(side, x), stats)

    if lin.system.batch is not None:
        return jax.vmap(response)(lin, given, sides, x, stats)
    of_one = functools.partial(response, lin)
    return jax.vmap(of_one)(given, sides, x, stats) if many else of_one(given, sides, x, stats)
