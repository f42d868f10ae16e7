"""Forward and reverse mode through the steps of a minimizer.

In forward mode the run carries along the derivative of its state by the parameters, and by its
starting positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.probe import chirp
from mdsens._util.pytree import PyTree
from mdsens.mechanics.forces import energy_gradient
from mdsens.mechanics.units import Limits, natural_units
from mdsens.model import neighbors
from mdsens.model.neighbors import slack, within
from mdsens.model.system import System
from mdsens.relaxation._fire_loop import limited_minimizer
from mdsens.relaxation.methods import Fire, GradientDescent

__all__ = ["Reverse", "TangentRun", "all_pairs", "limits_of", "reversed_run", "state_at_rest"]

Params = Mapping[str, Any]
Minimizer: TypeAlias = Fire | GradientDescent


class Reverse(NamedTuple):
    """Result of reverse mode through the same steps as forward mode.

    Attributes:
      gap: |<w, T> - <T^T w, dp>| / |<w, T>|, T the derivative by forward mode and w a cotangent:
        zero if both modes give the same derivative.
      measured: bytes of temporary memory of the compiled program; None if the compiler does not
        report it.
    """

    gap: float
    measured: int | None


def all_pairs(system: System) -> System:
    """The system with a list of all pairs, which no step can make incomplete."""
    if system.neighbors.complete:
        return system
    return system.replace(neighbors=neighbors.all_pairs(system.n, system.positions.dtype))


def limits_of(system: System, method: Minimizer) -> Limits:
    """The longest step and the strongest force of a particle, in the potential's units."""
    length, stiffness = (jnp.asarray(x, system.positions.dtype) for x in natural_units(system))
    return Limits.of((length, stiffness), method)


def state_at_rest(system: System, method: Minimizer) -> Any:
    """Shapes and types of the minimizer's state, without computing it."""
    limits = limits_of(system, method)
    return jax.eval_shape(
        lambda R: _functions(system, system.params, method, limits)[0](R), system.positions
    )


def _functions(
    system: System, params: Params, method: Minimizer, limits: Limits
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The minimizer at given parameters as functions: positions to state, and state to next state.

    The energy gradient sums every row of the neighbor list, which reverse mode needs.
    """
    slope = energy_gradient(system, params)
    initialize, apply, _ = limited_minimizer(method, lambda R: -slope(R), limits)
    return initialize, apply


def _floats(state: PyTree) -> list[jax.Array]:
    """The floating-point arrays of a minimizer's state; counters among it have no derivative."""
    return [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _with_floats(state: PyTree, floats: Sequence[jax.Array]) -> Any:
    """A minimizer's state with its floating-point arrays replaced."""
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
    """A state f(*arguments), and its derivatives along several directions, stacked."""

    def floats_and_state(*arguments: Any) -> tuple[list[jax.Array], Any]:
        state = f(*arguments)
        return _floats(state), state

    def along(direction: tuple[Any, Any]) -> tuple[list[jax.Array], list[jax.Array], Any]:
        return jax.jvp(floats_and_state, arguments, direction, has_aux=True)

    # out_axes None: the state is the same along every direction, and computed once.
    _, changes, state = jax.vmap(along, out_axes=(None, 0, None))(directions)
    return state, changes


@functools.partial(jax.jit, static_argnames=("method",))
def _first(
    system: System, directions: tuple[jax.Array, Params], method: Minimizer, limits: Limits
) -> tuple[Any, list[jax.Array]]:
    """The first state, and its derivatives along directions of the positions and parameters."""
    return _state_and_changes(
        lambda R, params: _functions(system, params, method, limits)[0](R),
        (system.positions, dict(system.params)),
        directions,
    )


@functools.partial(jax.jit, static_argnames=("method",))
def _advance(
    system: System,
    state: PyTree,
    changes: list[jax.Array],
    dparams: Params,
    count: jax.Array | int,
    method: Minimizer,
    limits: Limits,
) -> tuple[Any, list[jax.Array], jax.Array]:
    """Take up to ``count`` steps, as long as the neighbor list is complete.

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
    """A run of a minimizer with its derivatives along two directions, by forward mode.

    The first direction is a change of the parameters, which gives ``tangent``; the second a random
    displacement of the starting positions, which gives ``perturbation``.

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
        self.dparams = {k: jnp.stack([v, jnp.zeros_like(v)]) for k, v in tangent.items()}
        self.system = self._with_list(system)
        directions = jnp.stack([jnp.zeros_like(aside), aside]), self.dparams
        self.state, self.changes = _first(self.system, directions, method, self.limits)

    def _with_list(self, system: System) -> System:
        """The system with a neighbor list that stays complete for one step at least."""
        listed = system.reallocate(keep=True)
        anchors, distance = slack(listed.neighbors, listed.box, listed.range)
        if bool(within(listed.positions, anchors, distance - self.limits.longest)):
            return listed
        listed = listed.reallocate()
        _, distance = slack(listed.neighbors, listed.box, listed.range)
        # If particles may move less than the longest step, no list stays complete for one step.
        return listed if bool(distance > 1.01 * self.limits.longest) else all_pairs(listed)

    def advance(self, until: int) -> None:
        """Continue the run until it has taken ``until`` steps in all."""
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
        """The positions after the last step, (n, d)."""
        return self.method.positions(self.state)

    @property
    def tangent(self) -> jax.Array:
        """The derivative T of the positions along the change of the parameters, (n, d)."""
        return self.method.positions(_with_floats(self.state, [c[0] for c in self.changes]))

    @property
    def perturbation(self) -> jax.Array:
        """The derivative d of the positions along the displacement of the start, (n, d)."""
        return self.method.positions(_with_floats(self.state, [c[1] for c in self.changes]))


def reversed_run(run: TangentRun, start: System, tangent: Params, count: int) -> Reverse:
    """Run reverse mode through ``count`` steps, each recomputed from its state on the way back.

    Args:
      run: a forward run of as many steps, with whose derivative T the result is compared.
      start: the system at the start of that run, with a list of all pairs.
      tangent: the change of the parameters in that run.
      count: the number of steps.
    """
    # A cotangent without symmetry that is the same in every run.
    w = chirp(start.positions.shape, start.positions.dtype)

    def weighted_positions(params: Params) -> jax.Array:
        """Compute <w, R>, with the positions R after the steps and the cotangent w."""
        init, apply = _functions(start, params, run.method, run.limits)
        step = jax.checkpoint(lambda state, _: (apply(state), None))
        state, _ = jax.lax.scan(step, init(start.positions), None, length=count)
        return jnp.vdot(w, run.method.positions(state))

    # Compiled by hand, because only the compiled program reports its memory.
    program = jax.jit(jax.grad(weighted_positions)).lower(dict(start.params)).compile()
    gradient = program(dict(start.params))
    by_reverse = sum(float(jnp.vdot(gradient[k], v)) for k, v in tangent.items())
    by_forward = float(jnp.vdot(w, run.tangent))
    gap = abs(by_reverse - by_forward) / (abs(by_forward) or 1.0)
    measured = getattr(program.memory_analysis(), "temp_size_in_bytes", None)
    return Reverse(gap, None if measured is None else int(measured))
