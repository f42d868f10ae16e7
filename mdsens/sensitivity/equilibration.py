"""The relaxed system as a function of its parameters, which jax.grad and jax.jit can take."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from mdsens._util.compilation import compiled
from mdsens._util.errors import InputError
from mdsens._util.outcome import is_good
from mdsens._util.pytree import matching
from mdsens._util.validation import short
from mdsens.implicit.closures import refusing_derivative
from mdsens.implicit.linear import Auto, Method
from mdsens.implicit.linear.result import SolveStats
from mdsens.implicit.root import root
from mdsens.mechanics.hessian import gradient as energy_gradient
from mdsens.mechanics.rigidity import analyze_rigidity
from mdsens.mechanics.status import Status
from mdsens.mechanics.units import unrelaxed
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.system import System, parameters_of, require_unconstrained
from mdsens.potentials.parameters import check_symmetric
from mdsens.relaxation.methods import Fire, GradientDescent
from mdsens.relaxation.traced import relax, solve_stats
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
    """Relax a system, as a function of its parameters that jax differentiates.

    The function is differentiable in forward and reverse mode, to any order. Use it under jax.grad,
    jacfwd, jacrev, hessian, vmap and jit: ``jax.grad(lambda p:
    ms.observables.pressure(ms.equilibrate(system, p)))(params)``. The derivative is that of ``jvp``
    and ``vjp``, with the same treatment of the null space and of rattlers.

    The cell is fixed, or is the system's function of the parameters. For a cell that responds at a
    constant pressure take ``gradient`` at ``minimize(system, pressure=P)``.

    Traced code cannot raise an error. With ``has_aux`` the function returns the statistics of the
    relaxation, whose status tells whether the relaxation converged; only ``certify`` tells whether
    the relaxed configuration is stable and rigid. The status of the linear solve inside a
    derivative cannot be returned: where that status matters take ``jvp`` or ``gradient``. The
    neighbor list keeps the capacity of the list of ``system``, so start from a relaxed system
    (``ms.minimize(...).system``): an overflow of the list is reported in the status.

    Args:
      system: the start of the relaxation. The derivative by its positions is zero: the minimum
        stays where it is as the start moves a little. The cell of ``system`` has no derivative
        here: to differentiate a box, make it a function of the parameters.
      params: the parameters at which to relax, all or some; those of the system where None. Only
        the symmetric part of a matrix of species pairs counts: in ``jax.grad`` by the matrix,
        entries (a, b) and (b, a) are each half of the derivative by the one physical number that
        both stand for, and their sum is the whole derivative.
      tolerance, method, max_steps: the force at which the relaxation ends, the algorithm and the
        largest number of steps, as in ``minimize``.
      solve: the linear solver of the derivative.
      has_aux: whether to return ``(System, SolveStats)`` instead of the System alone.

    Example:
      >>> import jax
      >>> import mdsens as ms
      >>> ms.enable_x64()
      >>> system = ms.minimize(ms.load_system("dimer")).system
      >>> energy = lambda p: ms.observables.energy(ms.equilibrate(system, p))
      >>> print(f"{float(jax.grad(energy)(system.params)['epsilon']):.6f}")
      -1.000000
    """
    _check_arguments(system, tolerance)
    all_params = dict(system.params)
    if params is not None:
        all_params |= _check_params(system, params)
    why = (
        "equilibrate is differentiated by the parameters alone, and here the derivative is taken by"
        " its cell: give a box that is a function of the parameters,"
        " System.create(positions, lambda params: ..., ...)."
    )
    system = system.replace(positions=refusing_derivative(system.positions, system.boundary, why))
    relaxed, stats = _equilibrate(system, all_params, tolerance, max_steps, method, solve)
    return (relaxed, stats) if has_aux else relaxed


def _check_arguments(system: System, tolerance: float | None) -> None:
    """Raise InputError unless the system is one without constraints and the tolerance positive."""
    if not isinstance(system, System):
        raise InputError(f"equilibrate got a {type(system).__name__}: give a System.")
    if tolerance is not None and not isinstance(tolerance, Tracer) and not 0 < tolerance:
        raise InputError(f"tolerance is {short(tolerance)}: give a positive number, or None.")
    if system.batch is not None:
        raise InputError(
            f"equilibrate takes one system and got a batch of {system.batch}: use"
            " jax.vmap(lambda s, p: ms.equilibrate(s, p))(batch, params)."
        )
    require_unconstrained(system, "equilibrate")


def _check_params(system: System, params: Params) -> dict[str, Any]:
    """Check the values that a user gives some parameters; return them as arrays by name.

    Names, shapes and symmetry are checked.

    Args:
      system: the system.
      params: the values by parameter name, which may be traced.
    """
    if not isinstance(params, Mapping):
        raise InputError(
            f"params is a {type(params).__name__}: give a dict of parameter names and values."
        )
    dtype = system.positions.dtype

    def as_array(label: str, value: Any, like: Any) -> jax.Array:
        return jnp.asarray(value, dtype)

    checked = {}
    for name, value in params.items():
        # an unknown name, which is refused below, has no structure to compare with
        like = system.params.get(name, value)
        checked[name] = matching(as_array, value, like, name, "params")
        # checks the name and the shape; the values may be traced
        full_tangent(system, {name: jax.tree.map(jnp.zeros_like, checked[name])})
    for parameter in parameters_of(system, checked):
        if parameter.paired:
            check_symmetric(f"params[{parameter.name!r}]", checked[parameter.name])
    return checked


@compiled(static_argnames=("method", "solve"))
def _equilibrate(
    system: System,
    params: dict[str, Any],
    tolerance: float | jax.Array | None,
    max_steps: int | jax.Array,
    method: Fire | GradientDescent,
    solve: Method,
) -> tuple[System, SolveStats]:
    """Relax a system at given parameters in compiled code, with the derivative by the parameters.

    Returns the relaxed system and the statistics of the relaxation; the arguments are those of
    ``equilibrate``.
    """
    # jax has no reverse mode through a while_loop: no derivative may enter the relaxation.
    start = jax.lax.stop_gradient(system.replace(params=params))
    eq = jax.lax.stop_gradient(relax(start, tolerance, max_steps, method))
    backbone, net, null = analyze_rigidity(eq.system, eq.max_force)

    def condition(x: Unknowns, p: Params) -> Unknowns:
        return energy_gradient(backbone, x, p)

    # The minimum is found above, without a derivative. The decorated function returns it as it is
    # and has the derivative of the root of ``condition``.
    @root(
        condition,
        solve=solve,
        symmetric=True,
        positive_semidefinite=True,
        null_space=lambda x, p: null.project,
    )
    def minimum(init: Unknowns, p: Params) -> Unknowns:
        return init

    x = minimum(Unknowns(eq.system.positions), params)
    stats = solve_stats(eq, method)
    # A tolerance of the user may be met by forces that are still large in the system's own units.
    if tolerance is not None:
        far = unrelaxed(eq.system, eq.max_force, net.mean_force) & (is_good(stats.status))
        stats = dataclasses.replace(
            stats, status=jnp.where(far, Status.UNCONVERGED.value, stats.status)
        )
    # ``params`` once more, since those in ``eq.system`` have their derivative stopped
    return eq.system.replace(positions=x.positions, params=params), stats
