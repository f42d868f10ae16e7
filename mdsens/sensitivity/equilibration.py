"""The relaxed system as a differentiable function of its parameters: the door for jax.grad,
hessian, vmap and jit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from mdsens._util.errors import InputError
from mdsens._util.outcome import is_good
from mdsens._util.validation import short
from mdsens.implicit._closures import refusing_derivative
from mdsens.implicit.linear.operators import Auto, Method
from mdsens.implicit.linear.result import SolveStats
from mdsens.implicit.root import root
from mdsens.mechanics.hessian import Unknowns
from mdsens.mechanics.hessian import gradient as energy_gradient
from mdsens.mechanics.rigidity import analyze_rigidity
from mdsens.mechanics.status import Status
from mdsens.mechanics.units import unrelaxed
from mdsens.model.system import System, parameters_of, require_unconstrained
from mdsens.potentials.parameters import check_symmetric
from mdsens.relaxation._traced import relax, solve_stats
from mdsens.relaxation.methods import Fire, GradientDescent
from mdsens.sensitivity.linearization import full_tangent

__all__ = ["equilibrate"]

Params = Mapping[str, Any]


def equilibrate(
    system: System,
    params: Params | None = None,
    *,
    tolerance: float | None = None,
    method: Fire | GradientDescent = Fire(),
    max_steps: int = 200_000,
    solve: Method = Auto(),
    has_aux: bool = False,
) -> Any:
    """The relaxed System as a function of the parameters, differentiable in forward and reverse
    mode, to any order.

    For use under jax.grad, jacfwd, jacrev, hessian, vmap and jit: ``jax.grad(lambda p:
    ms.observables.pressure(ms.equilibrate(system, p)))(params)``. The derivative is that of ``jvp``
    and ``vjp``, with the same treatment of the null space and of rattlers.

    The cell is the system's, or follows the parameters: for one that responds at a pressure take
    ``gradient`` at ``minimize(system, pressure=P)``.

    It cannot raise, since traced code cannot: with ``has_aux`` it returns the relaxation's stats,
    whose status tells whether it converged. That what it converged to is stable and rigid,
    ``certify`` tells alone.
    The status of the linear solve inside a derivative cannot be carried out: where it matters take
    ``jvp`` or ``gradient``. The neighbor list keeps the capacity that ``system`` brings, so start
    from a relaxed system (``ms.minimize(...).system``): the list's overflow is in the status.

    Args:
      system: where to start. The derivative by its positions is zero: the minimum stays where it is
        as the start moves a little. By its cell there is none here: a box that is to be
        differentiated is a function of the parameters.
      params: the parameters to relax at, all or some; the system's where None. A matrix of species
        pairs counts by its symmetric part: of ``jax.grad`` by it, entries (a, b) and (b, a) are
        half each of the derivative by the one number that both are, and their sum is the whole.
      tolerance, method, max_steps: as in ``minimize``.
      solve: the linear solver of the derivative.
      has_aux: return ``(System, SolveStats)``.
    """
    if not isinstance(system, System):
        raise InputError(f"equilibrate got a {type(system).__name__}: give a System.")
    if tolerance is not None and not isinstance(tolerance, Tracer) and not 0 < tolerance:
        raise InputError(f"tolerance is {short(tolerance)}: give a positive number, or None.")
    if system.batch is not None:
        raise InputError(
            "equilibrate takes one system: use jax.vmap(lambda s, p: ms.equilibrate(s, p))(batch,"
            " params)."
        )
    require_unconstrained(system, "equilibrate")
    if params is not None and not isinstance(params, Mapping):
        raise InputError(
            f"params is a {type(params).__name__}: give a dict of parameter names and values."
        )
    given = full_tangent(system, {}) if params is None else params
    for name in given:
        full_tangent(
            system, {name: jnp.zeros_like(jnp.asarray(given[name]))}
        )  # the name's and shape's check
    for parameter in parameters_of(system, given):
        if parameter.paired:
            check_symmetric(f"params[{parameter.name!r}]", given[parameter.name])
    dtype = system.positions.dtype
    full = (
        dict(system.params)
        if params is None
        else {**system.params, **{k: jnp.asarray(v, dtype) for k, v in params.items()}}
    )
    why = (
        "equilibrate is differentiated by the parameters alone, and here its cell is what the"
        " derivative is taken by: give a box that is a function of the parameters,"
        " System.create(positions, lambda params: ..., ...)."
    )
    system = system.replace(positions=refusing_derivative(system.positions, system.boundary, why))
    relaxed, stats = _equilibrate(system, full, tolerance, max_steps, method, solve)
    return (relaxed, stats) if has_aux else relaxed


@functools.partial(jax.jit, static_argnames=("method", "solve"))
def _equilibrate(
    system: System,
    params: dict[str, jax.Array],
    tolerance: Any,
    max_steps: Any,
    method: Any,
    solve: Method,
) -> tuple[System, SolveStats]:
    """``equilibrate``, compiled once for each system shape and transformation."""
    start = jax.lax.stop_gradient(system.replace(params=params))
    eq = jax.lax.stop_gradient(relax(start, tolerance, max_steps, method))
    held, net, null = analyze_rigidity(eq.system, eq.max_force)

    def condition(x: Unknowns, p: Params) -> Unknowns:
        return energy_gradient(held, x, p)

    @root(
        condition,
        solve=solve,
        symmetric=True,
        positive_semidefinite=True,
        null_space=lambda x, p: null.project,
    )
    def found(init: Unknowns, p: Params) -> Unknowns:
        return init

    x = found(Unknowns(eq.system.positions), params)
    stats = solve_stats(eq, method)
    if tolerance is not None:  # one that is small in no unit of the system's
        far = unrelaxed(eq.system, eq.max_force, net.mean_force) & (is_good(stats.status))
        stats = dataclasses.replace(
            stats, status=jnp.where(far, Status.UNCONVERGED.value, stats.status)
        )
    return eq.system.replace(positions=x.positions, params=params), stats
