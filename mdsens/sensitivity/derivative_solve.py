"""The linear solve behind every derivative at a minimum.

Every derivative at a minimum of the energy U follows from one linear system H x = b, with the
Hessian H = d2U/dR2 by the positions R. For the change x = dR of the relaxed positions with the
parameters p, the right-hand side is b = - d2U/dR dp . dp. A :class:`DerivativeRule` computes the
right-hand side b of one kind of derivative, and that derivative from the solution x.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from mdsens._util.batching import stack_trees, unstack_tree
from mdsens._util.compilation import compiled
from mdsens._util.outcome import Severity, is_good, severity_of
from mdsens._util.probe import chirp
from mdsens._util.pytree import PyTree, count_numbers
from mdsens._util.validation import require_host
from mdsens.implicit.linear import Auto, Direct, Method
from mdsens.implicit.linear.result import SolveStats, dropped_any
from mdsens.implicit.linear.solution import solve as solve_linear
from mdsens.mechanics.hessian_factor import HessianFactor
from mdsens.mechanics.rigidity import analyze_rigidity
from mdsens.mechanics.status import Status
from mdsens.mechanics.strain import forces_of_strain
from mdsens.mechanics.units import natural_units
from mdsens.mechanics.unknowns import Unknowns, flat, scaled, unflat
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
    "status_of_finite",
    "norms",
    "unknowns_aside",
    "strain_is_silent",
    "solve_derivative",
    "solve_derivative_batch",
    "without_round_off",
]

Params = Mapping[str, Any]
# Of a rule: changes of the parameters (JVP), a cotangent (VJP), forces (FORCE), a strain (STRAIN).
Argument: TypeAlias = Params | Unknowns | jax.Array
# Largest number of particles for which several right-hand sides are solved for side by side on a
# CPU. In larger systems they are solved for one after the other: their vectors together no longer
# fit the cache of a processor, and six solves of 2,000 atoms took twice as long.
SIDE_BY_SIDE = 512
# Displacement from the minimum at which a right-hand side is compared with its value there, in
# units of the potential's length scale (see ``aside``).
ASIDE = 1e-3
# Forces that are round-off, in eps l k, see ``strain_is_silent``.
SILENT = 1e4
# Coarsest machine precision that counts as double precision: eps is 2e-16 in double precision and
# 1e-7 in single precision.
DOUBLE_PRECISION_EPS = 1e-10


def _with_outcome(lin: Linearization, stats: SolveStats, value: PyTree) -> SolveStats:
    """Return the statistics of a linear solve, with the status of the derivative computed from it.

    The status becomes the first of these that applies: the status of the minimum where that is not
    CONVERGED; NOT_FINITE where the solve is good and the derivative ``value`` is not finite;
    SINGLE_PRECISION where the solve is good and was done in single precision; the status of the
    solve.

    In single precision a good solve does not make the derivative good: round-off alone leaves a
    force on the particles, so that it is not known which of the weakest pairs are in contact. (In a
    packing of 16,384 discs the relative residual of the solve was 1e-5, and the relative error of
    the derivative 0.5.)
    """
    status_of_minimum = lin.code
    stats = status_of_finite(
        stats, jnp.all(jnp.stack([jnp.all(jnp.isfinite(v)) for v in jax.tree.leaves(value)]))
    )
    status = stats.status
    if jnp.finfo(lin.system.positions.dtype).eps > DOUBLE_PRECISION_EPS:
        status = jnp.where(
            severity_of(status) < Severity.WARNING, Status.SINGLE_PRECISION.value, status
        )
    unsound = status_of_minimum != Status.CONVERGED.value
    return dataclasses.replace(stats, status=jnp.where(unsound, status_of_minimum, status))


def status_of_finite(stats: SolveStats, finite: jax.Array) -> SolveStats:
    """Replace a good status of a linear solve by NOT_FINITE where the derivative is not finite.

    The derivative may be NaN or infinite after a good solve: the solution of the solve is combined
    with a derivative of the potential or of the observable, which may not be finite.

    Args:
      stats: statistics of the solve, with its status.
      finite: whether the derivative is finite.
    """
    good = is_good(stats.status)
    return dataclasses.replace(
        stats, status=jnp.where(good & ~finite, Status.NOT_FINITE.value, stats.status)
    )


def _fields_of_minimum(lin: Linearization) -> dict[str, Any]:
    """Return the largest force and the rattlers of a minimum, which each derivative reports."""
    return {"max_force": lin.equilibrium.max_force, "rattlers": lin.network.rattlers}


def _jvp_right_hand_side(lin: Linearization, tangent: Params) -> Unknowns:
    return lin.structure.parameter_side(lin, tangent)


def _jvp_result(
    lin: Linearization, tangent: Params, x: Unknowns, stats: SolveStats
) -> Displacement:
    value, nonaffine = lin.structure.displacement(lin, tangent, x)
    stats = _with_outcome(lin, stats, (value, nonaffine))
    return Displacement(value=value, nonaffine=nonaffine, stats=stats, **_fields_of_minimum(lin))


def _vjp_right_hand_side(lin: Linearization, cotangent: Unknowns) -> Unknowns:
    return lin.structure.cotangent_side(lin, cotangent)


def _vjp_result(
    lin: Linearization, cotangent: Unknowns, x: Unknowns, stats: SolveStats
) -> ParameterGradient:
    value = lin.structure.parameter_gradient(lin, cotangent, x)
    stats = _with_outcome(lin, stats, value)
    return ParameterGradient(value=value, stats=stats, **_fields_of_minimum(lin))


def _force_right_hand_side(lin: Linearization, force: Unknowns) -> Unknowns:
    return lin.structure.force_side(lin, force)


def _force_result(
    lin: Linearization, force: Unknowns | jax.Array, x: Unknowns, stats: SolveStats
) -> Displacement:
    """Return the displacement of the particles under forces as a result with status and statistics.

    The forces are external ones (the rule FORCE), or those that a strain causes (the rule STRAIN).

    Args:
      lin: the linearization of the minimum.
      force: the forces, or the strain; not used.
      x: the displacement, the solution of the linear solve.
      stats: statistics of the linear solve.
    """
    stats = _with_outcome(lin, stats, x.positions)
    return Displacement(
        value=x.positions, nonaffine=x.positions, stats=stats, **_fields_of_minimum(lin)
    )


def _strain_right_hand_side(lin: Linearization, strain: jax.Array) -> Unknowns:
    forces = forces_of_strain(lin.system, strain)
    # the response to forces that are round-off is zero
    return Unknowns(jnp.where(strain_is_silent(lin.system, forces), 0.0, forces))


def strain_is_silent(system: System, forces: jax.Array) -> jax.Array:
    """Return whether the forces (n, d) that a strain causes on the particles are only round-off.

    The forces are round-off in a crystal whose atoms are centers of symmetry. A force counts as
    round-off where it is below 1e4 eps l k, with the machine precision eps (1e4 eps is 2e-12 in
    double precision), the length scale l of the potential and its stiffness k, both from
    ``natural_units``. This function can be traced by jax.
    """
    return jnp.max(jnp.abs(forces)) <= SILENT * _force_unit(system)


def _force_unit(system: System) -> jax.Array:
    """Compute eps l k, with the machine precision eps and the units l and k of the potential."""
    length, stiffness = natural_units(system)
    return jnp.finfo(system.positions.dtype).eps * length * stiffness


class DerivativeRule(NamedTuple):
    """One kind of derivative: how its linear system H x = b is set up, and its result read from x.

    There are four rules, each named after the argument in which the derivative is linear: JVP
    (changes of the parameters), VJP (a cotangent, that is, weights w of the positions R whose sum
    w . R is differentiated by all parameters), FORCE (external forces) and STRAIN (a strain of the
    cell).

    Attributes:
      right_hand_side: function of ``(lin, argument)`` that returns the right-hand side b; ``lin``
        is the linearization of the minimum.
      result: function of ``(lin, argument, solution, stats)`` that returns the derivative, from the
        solution x and the statistics of the linear solve.
      parameters: function of ``(all parameters, argument)`` that returns the names of the
        parameters that the derivative is taken by.
      transposed: whether the matrix of the linear system is transposed. The Hessian is symmetric;
        the stiffness of a cell under a stress that is no pressure is not.
    """

    right_hand_side: Callable[[Linearization, Any], Unknowns]
    result: Callable[[Linearization, Any, Unknowns, SolveStats], Derivative]
    parameters: Callable[[Params, Any], Sequence[str]]
    transposed: bool = False


def _changed(params: Params, tangent: Params) -> tuple[str, ...]:
    return tuple(tangent)


def _all(params: Params, cotangent: Unknowns) -> tuple[str, ...]:
    return tuple(params)


def _none(params: Params, argument: Any) -> tuple[str, ...]:
    return ()


# Rules are static arguments of compiled code, and each is made once, here: a new rule would be
# compiled again. Their functions have names, by which another process finds compiled code.
JVP = DerivativeRule(_jvp_right_hand_side, _jvp_result, _changed)
VJP = DerivativeRule(_vjp_right_hand_side, _vjp_result, _all, transposed=True)
# By no parameter: the potential may take its cheapest form.
FORCE = DerivativeRule(_force_right_hand_side, _force_result, _none)
STRAIN = DerivativeRule(_strain_right_hand_side, _force_result, _none)


def solve_derivative(
    rule: DerivativeRule, lin: Linearization, argument: Argument, many: bool = False
) -> Any:
    """Compute one kind of derivative at a minimum, by a factor of the Hessian or by iteration.

    A sparse factor is computed on the CPU, outside compiled code. Without a factor, a linear solver
    in compiled code multiplies vectors with the Hessian.

    Args:
      rule: the kind of derivative: JVP, VJP, FORCE or STRAIN, see :class:`DerivativeRule`.
      lin: the linearization of the minimum.
      argument: what the derivative is linear in: changes of the parameters for JVP, weights of the
        positions for VJP, forces for FORCE, a strain for STRAIN. With ``many``, several of these
        along a leading axis.
      many: whether there are several arguments, which share one factor of the Hessian.
    """
    core = lin.traced(rule.parameters(lin.system.params, argument))
    factor = lin.factor
    together = many and _in_blocks(lin, argument)
    if factor is not None and (by_factor(lin.system, lin.solve, many) or together):
        assert isinstance(lin.solve, Auto | Direct)
        require_host(
            "a factor", "take solve=CG() or another iteration of mdsens.implicit there", argument
        )
        # jax computes these asynchronously, while the host factorizes in ``factor.factor`` below
        sides = _right_hand_sides(core, argument, rule, many)
        if together or factor.factor is not None:
            # The factor is that of the positions: the strain of a cell is solved for afterwards.
            columns = flat(dataclasses.replace(sides, strain=None), many)
            x, stats = factor.solve_many(columns if many else columns[:, None], lin.solve.rtol)
            # from (systems, columns), here of one system
            stats = jax.tree.map(lambda leaf: leaf[0] if many else leaf[0, 0], stats)
            like = dataclasses.replace(lin.unknowns, strain=None)
            x = unflat(x if many else x[:, 0], like, many)
            derivative = _results(core, argument, sides, x, stats, rule, many)
            return _without_dropped_round_off(rule, core, argument, derivative, many)
    # Without a factor the solver takes products, which use the assembled blocks if there are any.
    if isinstance(factor, HessianFactor):
        core = dataclasses.replace(core, blocks=factor.blocks)
    derivative = _solve_by_products(core, argument, rule, many)
    return _without_dropped_round_off(rule, core, argument, derivative, many)


def _in_blocks(lin: Linearization, argument: Argument) -> bool:
    """Return whether several right-hand sides are solved for by block conjugate gradients.

    They are where the solver is Auto, at a minimum, on a CPU, for an assembled Hessian that is not
    factorized. ``argument`` is that of the derivative; jax must not trace it.
    """
    factor = lin.factor
    return (
        isinstance(lin.solve, Auto)
        and isinstance(factor, HessianFactor)
        and not (factor.index or by_factor(lin.system, lin.solve, many=True))
        and jax.default_backend() == "cpu"
        and lin.system.positions.dtype == jnp.float64
        and not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(argument))
        and factor.matrix is not None
    )


def _solve_by_products(
    lin: Linearization, argument: Argument, rule: DerivativeRule, many: bool
) -> Any:
    """Compute one kind of derivative, or several of it (``many``), by products with the Hessian."""
    if not many or lin.system.n <= SIDE_BY_SIDE or jax.default_backend() != "cpu":
        return _solve_compiled(lin, argument, rule, many)
    count = len(jax.tree.leaves(argument)[0])
    each = unstack_tree(argument, count)
    return stack_trees([_solve_compiled(lin, one, rule, False) for one in each])


def solve_derivative_batch(
    rule: DerivativeRule, eq: Equilibrium, argument: Argument, solve: Method
) -> Any:
    """Compute one kind of derivative of all systems of a batch, with one factorization.

    The Hessians of all systems are factorized as one block-diagonal matrix. The result is None
    where no such factor exists or a position is not finite; the caller must then solve for each
    system alone.

    Args:
      rule: the kind of derivative: JVP, VJP, FORCE or STRAIN, see :class:`DerivativeRule`.
      eq: the minima of the batch.
      argument: what the derivative is linear in (changes of the parameters for JVP, weights of the
        positions for VJP, forces for FORCE, a strain for STRAIN), with a leading axis over the
        systems.
      solve: a linear solver that is to use the sparse factor of the Hessian, see :func:`by_factor`.
    """
    assert isinstance(solve, Auto | Direct)
    if not np.isfinite(np.asarray(eq.positions)).all():
        return None
    backbone, net, null = analyze_rigidity(eq.system, eq.max_force, eq.contacts_needed)
    factor = HessianFactor(backbone, null.simplified(), eq.order)
    force_status = force_left(eq.system, net, eq.max_force)
    lin = Linearization(eq, backbone, net, factor.null, solve, force_status=force_status)
    core = lin.traced(rule.parameters(eq.params, argument))
    # started before the host factorizes in ``factor.factor``
    sides = _right_hand_sides(core, argument, rule, False)
    if factor.factor is None:
        return None
    forces = np.asarray(sides.positions)
    # one column, in which the rows of all systems follow each other, as in the block matrix
    x, stats = factor.solve_many(forces.reshape(-1, 1), solve.rtol)
    stats = jax.tree.map(lambda leaf: leaf[:, 0], stats)
    solution = Unknowns(jnp.asarray(x.reshape(forces.shape)))
    derivatives = _results(core, argument, sides, solution, stats, rule, False)
    return _without_dropped_round_off(rule, core, argument, derivatives, False)


def aside(lin: Linearization) -> Linearization:
    """Return the linearization at positions moved slightly away from the minimum.

    Each coordinate moves by at most a thousandth of the length scale of the potential (contact
    distance, or the distance of the minimum of the pair energy). The displacements cos(k^2), k = 0,
    1, 2, …, have no symmetry, so that terms of a right-hand side that cancel at the minimum do not
    cancel at the moved positions.
    """
    system = lin.system
    if system.batch is None:
        length = natural_units(system)[0]
    else:
        length = jax.vmap(natural_units)(system)[0][:, None, None]
    R = system.positions
    moved = R + ASIDE * length * chirp(R.shape, R.dtype)
    return dataclasses.replace(lin, system=system.replace(positions=moved))


@compiled
def unknowns_aside(lin: Linearization) -> Unknowns:
    """Return the unknowns with positions slightly beside the minimum, see :func:`aside`."""
    return aside(lin).unknowns


@compiled(static_argnames="dtype")
def without_round_off(
    stats: SolveStats, size: jax.Array, beside: jax.Array, dtype: DTypeLike
) -> SolveStats:
    """Remove the warning that a part of a right-hand side was dropped, if that part is round-off.

    A linear solve drops the part of its right-hand side in the null space of the Hessian, and warns
    by the status NULL_COMPONENT_DROPPED. At the minimum the right-hand side may vanish: for the
    energy as an observable it is the net force, and on an atom at a center of symmetry it is zero
    by symmetry. Its value is then round-off, much of it along translations. So the norm of the
    dropped part is compared with the norm of the right-hand side at the minimum or, if that is
    larger, slightly beside the minimum.

    Args:
      stats: statistics of the solve.
      size: norm of the right-hand side at the minimum.
      beside: norm of the right-hand side slightly beside the minimum, see :func:`aside`.
      dtype: floating-point type of the right-hand side.
    """
    eps = float(jnp.finfo(dtype).eps)
    # tiny only avoids 0 / 0 where both norms are zero
    largest = jnp.maximum(jnp.maximum(size, beside), jnp.finfo(dtype).tiny)
    share = stats.dropped * size / largest
    good = Status.CONVERGED if eps < DOUBLE_PRECISION_EPS else Status.SINGLE_PRECISION
    # eps^(1/2), 1.5e-8 in double precision
    negligible = (stats.status == Status.NULL_COMPONENT_DROPPED.value) & (share <= eps**0.5)
    status = jnp.where(negligible, good.value, stats.status)
    return dataclasses.replace(
        stats, status=status, dropped=jnp.where(negligible, share, stats.dropped)
    )


def _without_dropped_round_off(
    rule: DerivativeRule,
    core: Linearization,
    argument: Argument,
    derivative: Derivative,
    many: bool,
) -> Any:
    """Remove the warning of a dropped part from a derivative, if that part is round-off.

    The test is that of :func:`without_round_off`. It is done for the rule JVP alone, whose
    right-hand side is a derivative at the minimum and may vanish there up to round-off. The
    right-hand side of the rules VJP and FORCE is the user's own, and that of STRAIN has been
    checked for round-off before.
    """
    if rule is not JVP or not dropped_any(derivative.stats.status):
        return derivative
    assert isinstance(argument, Mapping)
    # one program, which is compiled once for both
    here = _right_hand_side_norms(core, argument, rule, many)
    moved = core.system.replace(positions=unknowns_aside(core).positions)
    beside = _right_hand_side_norms(dataclasses.replace(core, system=moved), argument, rule, many)
    stats = _stats_without_round_off(core, argument, derivative.stats, here, beside, many)
    return dataclasses.replace(derivative, stats=stats)


@compiled(static_argnames="many")
def _stats_without_round_off(
    core: Linearization,
    argument: Params,
    stats: SolveStats,
    here: jax.Array,
    beside: jax.Array,
    many: bool,
) -> SolveStats:
    """Remove the warning of a dropped part from the statistics of a solve, if it is round-off.

    Args:
      core: the linearization of the minimum, for compiled code.
      argument: the changes of the parameters.
      stats: the statistics.
      here, beside: norms of the right-hand sides at the minimum, and slightly beside it.
      many: whether there are several changes.
    """
    # In a cell of one atom nothing changes beside the minimum: the terms cancel everywhere.
    here = jnp.where(here <= _round_off_of_change(core, argument, many), 0.0, here)
    return without_round_off(stats, here, beside, core.system.positions.dtype)


@compiled(static_argnames="many")
def _round_off_of_change(lin: Linearization, change: Params, many: bool) -> jax.Array:
    """Compute the forces that are round-off while the parameters change, as ``strain_is_silent``.

    They are 1e4 eps l k times the relative change of the parameters. The result is an array where
    there are several changes (``many``) or systems.
    """
    system = lin.system
    several = system.batch is not None

    def largest_of_array(value: ArrayLike, each: bool) -> jax.Array:
        sizes = jnp.abs(jnp.asarray(value))
        return jnp.max(sizes, axis=tuple(range(int(each), sizes.ndim)), initial=0.0)

    def largest(value: PyTree, each: bool) -> jax.Array:
        sizes = [largest_of_array(leaf, each) for leaf in jax.tree.leaves(value)]
        return functools.reduce(jnp.maximum, sizes)

    relative = jnp.zeros(())
    for name, value in change.items():
        if name in system.params and count_numbers(value):
            size = largest(system.params[name], several)
            moved = largest(value, several or many)
            relative = jnp.maximum(relative, jnp.where(size > 0, moved / size, 0.0))
    unit = (jax.vmap(_force_unit) if several else _force_unit)(system)
    return SILENT * unit * relative


@compiled(static_argnames=("rule", "many"))
def _right_hand_side_norms(
    lin: Linearization, argument: Argument, rule: DerivativeRule, many: bool
) -> jax.Array:
    """Compute the norm of the right-hand side of a linear solve, or of each of many.

    The right-hand side is that of the kind of derivative ``rule`` for its ``argument``.
    """
    sides = _right_hand_sides(lin, argument, rule, many)
    return norms(sides, many or lin.system.batch is not None)


@compiled(static_argnames="many")
def norms(sides: Unknowns, many: bool) -> jax.Array:
    """Compute the Euclidean norm of the right-hand side of a linear solve.

    With ``many`` there are several right-hand sides along a leading axis, and the result is an
    array of their norms. In a relaxed cell the part of a right-hand side that belongs to the strain
    is left out: the strain is computed after the solve, from the small stiffness matrix of the
    cell.
    """
    first_axis = 1 if many else 0
    leaves = jax.tree.leaves(dataclasses.replace(sides, strain=None))
    return jnp.sqrt(
        sum(jnp.sum(leaf**2, axis=tuple(range(first_axis, leaf.ndim))) for leaf in leaves)
    )


@compiled(static_argnames=("rule", "many"), loops=True)
def _solve_compiled(
    lin: Linearization, argument: Argument, rule: DerivativeRule, many: bool
) -> Any:
    """Compute one kind of derivative in compiled code, by products with the Hessian.

    Under constraints the products are with the matrix of the whole system of equations.
    """
    operator, unit = lin.structure.operator(lin)

    def derivative(argument: Argument) -> Any:
        side = rule.right_hand_side(lin, argument)
        b = dataclasses.replace(side, strain=None)
        x, stats = solve_linear(operator, b if unit is None else scaled(b, unit), lin.solve)
        x = lin.structure.solved(side, x if unit is None else scaled(x, unit), rule.transposed)
        return rule.result(lin, argument, x, stats)

    return jax.vmap(derivative)(argument) if many else derivative(argument)


@compiled(static_argnames=("rule", "many"))
def _right_hand_sides(
    lin: Linearization, argument: Argument, rule: DerivativeRule, many: bool
) -> Unknowns:
    """Compute the right-hand side of the linear solve for one kind of derivative.

    The result has a leading axis if there are several arguments (``many``), or several systems in a
    batch.
    """
    if lin.system.batch is not None:
        return jax.vmap(rule.right_hand_side)(lin, argument)
    right_hand_side = functools.partial(rule.right_hand_side, lin)
    return jax.vmap(right_hand_side)(argument) if many else right_hand_side(argument)


@compiled(static_argnames=("rule", "many"))
def _results(
    lin: Linearization,
    argument: Argument,
    sides: Unknowns,
    x: Unknowns,
    stats: SolveStats,
    rule: DerivativeRule,
    many: bool,
) -> Any:
    """Compute derivatives of one kind (``rule``) from the solutions ``x`` of linear solves."""

    def derivative(
        lin: Linearization, argument: Argument, side: Unknowns, x: Unknowns, stats: SolveStats
    ) -> Derivative:
        x = lin.structure.solved(side, x, rule.transposed)
        return rule.result(lin, argument, x, stats)

    if lin.system.batch is not None:
        return jax.vmap(derivative)(lin, argument, sides, x, stats)
    at_minimum = functools.partial(derivative, lin)
    if many:
        return jax.vmap(at_minimum)(argument, sides, x, stats)
    return at_minimum(argument, sides, x, stats)
