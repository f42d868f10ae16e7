"""A run of a minimizer with moves of its start and of the parameters carried along, and reverse
mode through it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdsens.mechanics.forces import energy_gradient
from mdsens.mechanics.units import Limits, natural_units
from mdsens.model import neighbors
from mdsens.model.neighbors import slack, within
from mdsens.model.system import System
from mdsens.relaxation._fire_loop import shortened

__all__ = ["Reverse", "TangentRun", "all_pairs", "limits_of", "reversed_run", "state_at_rest"]

Params = Mapping[str, Any]


class Reverse(NamedTuple):
    """What reverse mode through the same steps gave and took.

    Attributes:
      gap: |<w, T> - <T^T w, dp>|, relative, w a random cotangent: both modes are one derivative.
      measured: bytes of the compiled program's temporaries; None where the compiler does not say.
    """

    gap: float
    measured: int | None


def all_pairs(system: System) -> System:
    """The system with a list of all pairs, which no step can outrun."""
    n, dtype = system.n, system.positions.dtype
    return (
        system
        if system.neighbors.complete
        else system.replace(neighbors=neighbors.all_pairs(n, dtype))
    )


def limits_of(system: System, method: Any) -> Limits:
    """The limits in the potential's units, which the run holds."""
    length, stiffness = (jnp.asarray(x, system.positions.dtype) for x in natural_units(system))
    return Limits.of((length, stiffness), method)


def state_at_rest(system: System, method: Any) -> Any:
    """The shapes of the minimizer's state."""
    limits = limits_of(system, method)
    return jax.eval_shape(
        lambda R: _machine(system, system.params, method, limits)[0](R), system.positions
    )


def _machine(system: System, params: Params, method: Any, limits: Limits) -> tuple[Any, Any]:
    """The minimizer at some parameters: (init, apply). Every row is summed, so that reverse mode
    can.
    """
    slope = energy_gradient(system, params)

    def forces(R: jax.Array, **_: Any) -> jax.Array:
        return shortened(-slope(R), limits.strongest)

    def shift(R: jax.Array, dR: jax.Array, **_: Any) -> jax.Array:
        return R + shortened(dR, limits.longest)

    return method.minimizer(forces, shift, limits)


def _floats(state: Any) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _with_floats(state: Any, floats: Sequence[jax.Array]) -> Any:
    leaves, kind = jax.tree.flatten(state)
    given = iter(floats)
    return kind.unflatten(
        [next(given) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf for leaf in leaves]
    )


def _pushed(f: Any, place: tuple[Any, Any], moves: tuple[Any, Any]) -> tuple[Any, list[jax.Array]]:
    """A state f(…), and its changes along several moves, stacked."""

    def along(move: tuple[Any, Any]) -> Any:
        return jax.jvp(
            lambda *at: ((new := f(*at)) and _floats(new), new), place, move, has_aux=True
        )

    _, changes, state = jax.vmap(along, out_axes=(None, 0, None))(moves)
    return state, changes


@functools.partial(jax.jit, static_argnames=("method",))
def _first(
    system: System, moves: tuple[Any, Any], method: Any, limits: Limits
) -> tuple[Any, list[jax.Array]]:
    """The state at rest, and its changes with positions and parameters."""
    place = system.positions, dict(system.params)
    return _pushed(lambda R, p: _machine(system, p, method, limits)[0](R), place, moves)


@functools.partial(jax.jit, static_argnames=("method",))
def _advance(
    system: System,
    state: Any,
    changes: list[jax.Array],
    dparams: Params,
    count: Any,
    method: Any,
    limits: Limits,
) -> tuple[Any, list[jax.Array], jax.Array]:
    """Steps, with what changes the state carried along, as long as the list holds every pair: (…,
    steps taken).
    """
    anchors, distance = slack(system.neighbors, system.box, system.range)

    def step(
        carry: tuple[Any, list[jax.Array], jax.Array],
    ) -> tuple[Any, list[jax.Array], jax.Array]:
        state, changes, k = carry

        def phi(floats: list[jax.Array], params: Params) -> Any:
            return _machine(system, params, method, limits)[1](_with_floats(state, floats))

        state, changes = _pushed(phi, (_floats(state), dict(system.params)), (changes, dparams))
        return state, changes, k + 1

    def going(carry: tuple[Any, list[jax.Array], jax.Array]) -> jax.Array:
        state, _, k = carry  # the next step has to end on the list, too
        return (k < count) & within(method.positions(state), anchors, distance - limits.longest)

    return jax.lax.while_loop(going, step, (state, changes, jnp.zeros((), jnp.int32)))


class TangentRun:
    """A run of the minimizer with two moves carried along: of the parameters, and of the start."""

    def __init__(self, system: System, method: Any, tangent: Params, limits: Limits):
        self.method, self.limits, self.steps = method, limits, 0
        aside = jnp.asarray(
            np.random.default_rng(0).normal(size=system.positions.shape), system.positions.dtype
        )
        self.aside = aside
        self.dparams = {k: jnp.stack([v, jnp.zeros_like(v)]) for k, v in tangent.items()}
        self.system = self._listed(system)
        moves = jnp.stack([jnp.zeros_like(aside), aside]), self.dparams
        self.state, self.changes = _first(self.system, moves, method, self.limits)

    def _listed(self, system: System) -> System:
        """With a list on which a step fits."""
        found = system.reallocate(keep=True)
        anchors, distance = slack(found.neighbors, found.box, found.range)
        room = within(found.positions, anchors, distance - self.limits.longest)
        if bool(room):
            return found
        found = found.reallocate()
        anchors, distance = slack(found.neighbors, found.box, found.range)
        return found if bool(distance > 1.01 * self.limits.longest) else all_pairs(found)

    def advance(self, until: int) -> None:
        """Up to so many steps in all."""
        while self.steps < until:
            given = (
                self.system,
                self.state,
                self.changes,
                self.dparams,
                until - self.steps,
                self.method,
                self.limits,
            )
            self.state, self.changes, taken = _advance(*given)
            self.steps += int(taken)
            if not np.isfinite(np.asarray(self.positions)).all():
                self.steps = until  # nothing more comes of it
            elif self.steps < until:
                self.system = self._listed(self.system.replace(positions=self.positions))

    @property
    def positions(self) -> jax.Array:
        return self.method.positions(self.state)

    @property
    def tangent(self) -> jax.Array:
        """T, (n, d)."""
        return self.method.positions(_with_floats(self.state, [c[0] for c in self.changes]))

    @property
    def perturbation(self) -> jax.Array:
        """d, (n, d)."""
        return self.method.positions(_with_floats(self.state, [c[1] for c in self.changes]))


def reversed_run(run: TangentRun, start: System, tangent: Params, count: int) -> Reverse:
    """Reverse mode through so many steps, each recomputed from its state on the way back."""
    w = jnp.cos(jnp.arange(start.positions.size, dtype=start.positions.dtype) ** 2).reshape(
        start.positions.shape
    )

    def reached(params: Params) -> jax.Array:
        init, apply = _machine(start, params, run.method, run.limits)
        step = jax.checkpoint(lambda state, _: (apply(state), None))
        state, _ = jax.lax.scan(step, init(start.positions), None, length=count)
        return jnp.vdot(w, run.method.positions(state))

    program = jax.jit(jax.grad(reached)).lower(dict(start.params)).compile()
    found = program(dict(start.params))
    back = sum(float(jnp.vdot(found[k], v)) for k, v in tangent.items())
    forth = float(jnp.vdot(w, run.tangent))
    analysis = program.memory_analysis()
    measured = getattr(analysis, "temp_size_in_bytes", None)
    return Reverse(
        abs(back - forth) / (abs(forth) or 1.0), None if measured is None else int(measured)
    )
