"""Differentiate through the steps of a minimizer, in forward and in reverse mode.

In forward mode, the derivatives of the minimizer's state by the parameters and by the starting
positions are computed along with the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.compilation import compiled
from mdsens._util.errors import InputError
from mdsens._util.probe import chirp
from mdsens._util.pytree import PyTree
from mdsens.mechanics.forces import energy_gradient
from mdsens.mechanics.units import Limits, natural_units
from mdsens.model import neighbors
from mdsens.model.neighbors import slack, within
from mdsens.model.system import System
from mdsens.relaxation.fire_loop import limited_minimizer
from mdsens.relaxation.methods import Fire, GradientDescent

__all__ = ["Reverse", "TangentRun", "all_pairs", "limits_of", "reversed_run", "state_at_rest"]

Params = Mapping[str, Any]
Minimizer: TypeAlias = Fire | GradientDescent


class Reverse(NamedTuple):
    """Result of reverse-mode differentiation through the steps of a minimizer.

    Attributes:
      gap: relative difference from forward mode through the same steps,
        |<w, T> - <g, dp>| / |<w, T>|: T is the derivative of the positions along the change dp of
        the parameters by forward mode, w a fixed cotangent, and g the derivative of <w, R> by the
        parameters by reverse mode, with the positions R. The gap is zero if both modes give the
        same derivative.
      measured: bytes of temporary memory of the compiled program; None if the compiler does not
        report it.
    """

    gap: float
    measured: int | None


def all_pairs(system: System) -> System:
    """Return the system with a neighbor list of all pairs, which is complete after any step."""
    if system.neighbors.complete:
        return system
    if system.neighbors.images is not None:
        raise InputError(
            "this run needs a list of all pairs, which a cell smaller than twice the range of the"
            " interactions does not have: repeat the cell."
        )
    every_pair = neighbors.all_pairs(system.n, system.positions.dtype, system.periodic)
    return system.replace(neighbors=every_pair)


def limits_of(system: System, method: Minimizer) -> Limits:
    """Compute the longest step and the largest force that a minimizer allows for a particle.

    Both follow from the length scale and the stiffness of the potential.
    """
    length, stiffness = (jnp.asarray(x, system.positions.dtype) for x in natural_units(system))
    return Limits.of((length, stiffness), method, system.potential.finite_force)


def state_at_rest(system: System, method: Minimizer) -> Any:
    """Return the shapes and types of the arrays in a minimizer's state, without computing them."""
    limits = limits_of(system, method)
    return jax.eval_shape(
        lambda R: _functions(system, system.params, method, limits)[0](R), system.positions
    )


def _functions(
    system: System, params: Params, method: Minimizer, limits: Limits
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the minimizer at given parameters as two functions, for the first and the next state.

    The first function takes positions to the minimizer's state, the second a state to the state
    after one step. The energy gradient is summed over a fixed number of neighbors, empty entries of
    the neighbor list included, because reverse mode needs a fixed number.
    """
    slope = energy_gradient(system, params)
    initialize, apply, _ = limited_minimizer(method, lambda R: -slope(R), limits)
    return initialize, apply


def _floats(state: PyTree) -> list[jax.Array]:
    """Return the floating-point arrays of a minimizer's state, which have derivatives.

    Integers in the state, such as counters, are left out.
    """
    return [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _with_floats(state: PyTree, floats: Sequence[jax.Array]) -> Any:
    """Return a minimizer's state with its floating-point arrays replaced by ``floats``."""
    leaves, structure = jax.tree.flatten(state)
    replacements = iter(floats)
    return structure.unflatten(
        [
            next(replacements) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
            for leaf in leaves
        ]
    )


def _state_and_changes(
    f: Callable[..., Any], arguments: tuple[Any, Any], directions: tuple[Any, Any]
) -> tuple[Any, list[jax.Array]]:
    """Compute a minimizer's state f(*arguments), and its derivatives along several directions.

    Args:
      f: function that returns the state.
      arguments: the arguments of f.
      directions: changes of the arguments, with the directions along a leading axis.

    Returns:
      the state, and the derivatives of its floating-point arrays, with the same leading axis.
    """

    # The state itself goes out as ``has_aux``: jax.jvp would give tangents of type float0 to its
    # integers.
    def floats_and_state(*arguments: Any) -> tuple[list[jax.Array], Any]:
        state = f(*arguments)
        return _floats(state), state

    def along(direction: tuple[Any, Any]) -> tuple[list[jax.Array], list[jax.Array], Any]:
        return jax.jvp(floats_and_state, arguments, direction, has_aux=True)

    # out_axes None: the state is the same along every direction, and computed once.
    _, changes, state = jax.vmap(along, out_axes=(None, 0, None))(directions)
    return state, changes


# method is static, because it decides which code runs; the limits are arrays, so that another
# system of the same shape needs no new compilation.
@compiled(static_argnames=("method",))
def _first(
    system: System, directions: tuple[jax.Array, Params], method: Minimizer, limits: Limits
) -> tuple[Any, list[jax.Array]]:
    """Compute the first state of a minimizer, and its derivatives along several directions.

    Each direction is a change of the starting positions and of the parameters.
    """
    return _state_and_changes(
        lambda R, params: _functions(system, params, method, limits)[0](R),
        (system.positions, dict(system.params)),
        directions,
    )


@compiled(static_argnames=("method",), loops=True)
def _advance(
    system: System,
    state: PyTree,
    changes: list[jax.Array],
    dparams: Params,
    count: jax.Array | int,
    method: Minimizer,
    limits: Limits,
) -> tuple[Any, list[jax.Array], jax.Array]:
    """Take up to ``count`` steps of a minimizer, as long as the neighbor list stays complete.

    The derivatives ``changes`` of the state along several directions are updated in each step.

    Returns:
      the state, its derivatives along the directions, and how many steps were taken.
    """
    anchors, distance = slack(system.neighbors, system.box, system.range)

    def step(
        carry: tuple[Any, list[jax.Array], jax.Array],
    ) -> tuple[Any, list[jax.Array], jax.Array]:
        state, changes, k = carry

        def phi(floats: list[jax.Array], params: Params) -> Any:
            return _functions(system, params, method, limits)[1](_with_floats(state, floats))

        arguments = _floats(state), dict(system.params)
        state, changes = _state_and_changes(phi, arguments, (changes, dparams))
        return state, changes, k + 1

    def going(carry: tuple[Any, list[jax.Array], jax.Array]) -> jax.Array:
        state, _, k = carry
        # The list has to be complete after the next step as well, which may be limits.longest long.
        return (k < count) & within(method.positions(state), anchors, distance - limits.longest)

    return jax.lax.while_loop(going, step, (state, changes, jnp.zeros((), jnp.int32)))


class TangentRun:
    """A run of a minimizer, with the derivatives of its positions along two directions.

    The derivatives are by forward mode. The first direction is a change of the parameters; the
    derivative along it is ``tangent``. The second direction is a random displacement of the
    starting positions; the derivative along it is ``perturbation``.

    Args:
      system: the system at the start.
      method: the minimizer.
      tangent: the change of every parameter.
      limits: limits of the steps, from :func:`limits_of`.
    """

    def __init__(self, system: System, method: Minimizer, tangent: Params, limits: Limits):
        self.method = method
        self.limits = limits
        self.steps = 0
        # a fixed seed: the same start in every run
        aside = jnp.asarray(
            np.random.default_rng(0).normal(size=system.positions.shape), system.positions.dtype
        )
        self.aside = aside  # the random displacement of the start
        # Along the leading axis the two directions: 0 changes the parameters, 1 the start.
        self.dparams = jax.tree.map(lambda v: jnp.stack([v, jnp.zeros_like(v)]), dict(tangent))
        self.system = self._with_list(system)
        directions = jnp.stack([jnp.zeros_like(aside), aside]), self.dparams
        self.state, self.changes = _first(self.system, directions, method, self.limits)

    def _with_list(self, system: System) -> System:
        """Return the system with a neighbor list that is complete for at least one more step."""
        listed = system.reallocate(keep=True)
        anchors, distance = slack(listed.neighbors, listed.box, listed.range)
        if bool(within(listed.positions, anchors, distance - self.limits.longest)):
            return listed
        listed = listed.reallocate()
        _, distance = slack(listed.neighbors, listed.box, listed.range)
        # If particles may move less than the longest step, no list stays complete for one step.
        # ``advance`` would then repeat a call that takes no step, without end.
        return listed if bool(distance > 1.01 * self.limits.longest) else all_pairs(listed)

    def advance(self, until: int) -> None:
        """Continue the minimizer's run until ``until`` steps have been taken in all."""
        while self.steps < until:
            self.state, self.changes, taken = _advance(
                self.system,
                self.state,
                self.changes,
                self.dparams,
                until - self.steps,
                self.method,
                self.limits,
            )
            self.steps += int(taken)
            if not np.isfinite(np.asarray(self.positions)).all():
                self.steps = until  # further steps stay NaN
            elif self.steps < until:
                # It stopped early: the neighbor list was about to become incomplete.
                self.system = self._with_list(self.system.replace(positions=self.positions))

    @property
    def positions(self) -> jax.Array:
        """The positions (n, d) after the minimizer's last step."""
        return self.method.positions(self.state)

    @property
    def tangent(self) -> jax.Array:
        """The derivative (n, d) of the present positions along the change of the parameters."""
        return self.method.positions(_with_floats(self.state, [c[0] for c in self.changes]))

    @property
    def perturbation(self) -> jax.Array:
        """The derivative (n, d) of the positions along the displacement of starting positions."""
        return self.method.positions(_with_floats(self.state, [c[1] for c in self.changes]))


def reversed_run(run: TangentRun, start: System, tangent: Params, count: int) -> Reverse:
    """Differentiate through ``count`` steps of a minimizer in reverse mode.

    The derivative is compared with that of forward mode. On the way back through the steps, each
    step is computed again from the state before it, since only the states are stored.

    Args:
      run: a run of as many steps in forward mode, with which the derivative is compared.
      start: the system at the start of that run, with a neighbor list of all pairs.
      tangent: the change of the parameters in that run, arrays by name.
      count: the number of steps.
    """
    # A cotangent without symmetry that is the same in every run.
    w = chirp(start.positions.shape, start.positions.dtype)

    def weighted_positions(params: Params) -> jax.Array:
        """Compute <w, R>, with the positions R after the minimizer's steps and fixed weights w."""
        init, apply = _functions(start, params, run.method, run.limits)
        # scan, and not while_loop as in forward mode: jax has no reverse mode of a loop whose
        # number of steps is not known beforehand.
        step = jax.checkpoint(lambda state, _: (apply(state), None))
        state, _ = jax.lax.scan(step, init(start.positions), None, length=count)
        return jnp.vdot(w, run.method.positions(state))

    # Compiled by hand, because only the compiled program reports its memory.
    program = jax.jit(jax.grad(weighted_positions)).lower(dict(start.params)).compile()
    gradient = program(dict(start.params))
    products = jax.tree.map(lambda slope, v: float(jnp.vdot(slope, v)), gradient, dict(tangent))
    by_reverse = sum(jax.tree.leaves(products))
    by_forward = float(jnp.vdot(w, run.tangent))
    gap = abs(by_reverse - by_forward) / (abs(by_forward) or 1.0)
    measured = getattr(program.memory_analysis(), "temp_size_in_bytes", None)
    return Reverse(gap, None if measured is None else int(measured))
