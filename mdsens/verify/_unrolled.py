"""The derivative through the steps of the minimiser, beside the implicit one: what unrolling gives, and what it takes.

    R_k+1 = Phi(R_k, p),    T_k+1 = @Phi/@R T_k + @Phi/@p dp,    T_0 = 0.

T_k is the derivative of what k steps return, whether they have come to rest or not. Where they come to rest it becomes
that of the minimum; before, it grows with the products of @Phi/@R, as perturbations of the start do (Metz, Freeman,
Schoenholz and Kachman, Gradients are Not All You Need, arXiv:2111.05803).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdsens import neighbours
from mdsens._checks import short
from mdsens._loop import shortened
from mdsens._memory import require_memory
from mdsens._tables import Shown
from mdsens.implicit.status import InputError, Status
from mdsens.linearization import full_tangent, linearize
from mdsens.minimisers import Fire, GradientDescent
from mdsens.neighbours import slack, within
from mdsens.relaxation import Equilibrium, minimize
from mdsens.scales import Limits, round_off, scales
from mdsens.sensitivity import jvp
from mdsens.slopes import energy_slope
from mdsens.stationarity import Unknowns, largest_force
from mdsens.system import System

__all__ = ["Unrolled", "unrolled"]

Params = Mapping[str, Any]
STEPS = (30, 100, 300, 1000, 3000)
FORWARD = 3  # states that forward mode holds: the run, the tangent, and the perturbation of the start
AGREES = 1e-4  # error from which on the unrolled derivative is taken as that of the minimum
TOLERANCE = 1e-12  # of the minimum that the run leads to


class Reverse(NamedTuple):
    """What reverse mode through the same steps gave and took.

    Attributes:
      gap: |<w, T> - <T^T w, dp>|, relative, w a random cotangent: both modes are one derivative.
      measured: bytes of the compiled program's temporaries; None where the compiler does not say.
    """

    gap: float
    measured: int | None


@dataclasses.dataclass(frozen=True, repr=False)
class Unrolled(Shown):
    """Derivatives through k steps of a minimiser, over k, against the implicit derivative of the minimum they lead to.

    Attributes:
      steps: (k,) how many, rising.
      errors: (k,) |T_k - dR/dp| / |dR/dp|, both without their part in the null space (translations, rattlers).
      norms: (k,) |T_k|, likewise.
      max_forces: (k,) the largest force left after so many steps.
      growth: (k,) log(|d_k| / |d_0|) / k of a small random displacement d_0 of the start, a step, likewise: the largest
        Lyapunov exponent of the run so far. Above 0 the run is chaotic and T_k explodes, below it forgets its start.
      tangents: (k, n, d), T_k, likewise.
      exact: (n, d), the implicit derivative.
      forward_bytes: that forward mode holds, whatever k is: the state, T and d.
      reverse_bytes: that reverse mode holds at the last k, a state each step, each recomputed on the way back
        (computed; what a run without that takes is several times more).
      reverse: what reverse mode gave and took, measured; None where it was not asked for.
      minimum: that the last of the steps leads to.
      status: CONVERGED, or the worse of the minimum's and of the implicit derivative's; NOT_FINITE where T is not.
    """

    steps: np.ndarray
    errors: np.ndarray
    norms: np.ndarray
    max_forces: np.ndarray
    growth: np.ndarray
    tangents: np.ndarray
    exact: np.ndarray
    forward_bytes: int
    reverse_bytes: int
    reverse: Reverse | None
    minimum: Equilibrium
    status: Status

    @property
    def error(self) -> float:
        """After the last step."""
        return float(self.errors[-1])

    @property
    def exponent(self) -> float:
        """The largest of ``growth``."""
        return float(np.max(self.growth))

    def agrees_from(self, tolerance: float = AGREES) -> int | None:
        """The first number of steps from which on the error stays below ``tolerance``; None where it never does."""
        late = np.flatnonzero(~(self.errors <= tolerance))
        first = 0 if late.size == 0 else int(late[-1]) + 1
        return int(self.steps[first]) if first < self.steps.size else None

    _title = "Unrolled derivative"

    def _rows(self) -> list[tuple[str, str]]:
        exact = float(np.linalg.norm(self.exact))
        rows = [("steps", "error, norm over the implicit one's, max_force, growth a step")]
        for k, error, norm, force, rate in zip(
            self.steps, self.errors, self.norms, self.max_forces, self.growth, strict=True
        ):
            share = norm / exact if exact > 0 else np.nan
            rows.append((f"{k:,}", f"{error:.1e}, {share:.3g}, {force:.1e}, {rate:+.2e}"))
        agrees = self.agrees_from()
        measured = self.reverse and self.reverse.measured
        rows += [
            ("agrees", "never" if agrees is None else f"to {AGREES:.0e} from {agrees:,} steps on"),
            ("implicit norm", f"{exact:.6g}"),
            ("memory, forward", f"{_bytes(self.forward_bytes)}, whatever the steps (computed)"),
            ("memory, reverse", f"{_bytes(self.reverse_bytes)} at {int(self.steps[-1]):,} steps (computed)"),
        ]
        if self.reverse is not None:
            said = "the compiler does not say" if measured is None else f"{_bytes(measured)} (the compiler's)"
            rows.append(("measured, reverse", f"{said}; adjoint gap {self.reverse.gap:.1e}"))
        return [*rows, ("status", f"{self.status.name}: {self.status.sentence}")]


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


def unrolled(
    start: System | Equilibrium,
    dparams: Params,
    steps: int | Sequence[int] = STEPS,
    *,
    method: Fire | GradientDescent = Fire(),
    reverse: bool = False,
) -> Unrolled:
    """Differentiate through k steps of a minimiser, and tell how far that is from the derivative of the minimum.

    Forward mode: T_k is carried along with the run. The first positions, the time steps and the mass do not depend on
    the parameters. The implicit derivative is taken at the minimum that the last step leads to, so that both are of one
    basin.

    Args:
      start: where to start, unrelaxed; not a batch.
      dparams: the direction, as in ``jvp``.
      steps: k, one number or several.
      method: ``Fire(...)`` or ``GradientDescent(...)``, jax-md's.
      reverse: run reverse mode through the last k, too, and measure its memory. It lists all pairs.

    Returns:
      an :class:`Unrolled`; print it.

    Raises:
      InputError: bad names, steps or method. TooLargeError: reverse mode would not fit in memory.
      ConvergenceError: no minimum, or none that can be differentiated, lies ahead of the last step.
    """
    system, counts = _checked(start, steps, method)
    tangent = {k: jnp.asarray(v) for k, v in full_tangent(system, dparams).items()}
    size, itemsize = system.positions.size, system.positions.dtype.itemsize
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(_at_rest(system, method)))
    if reverse:
        require_memory(
            counts[-1] * state_bytes / itemsize, itemsize,
            f"reverse mode through {counts[-1]:,} steps of {size:,} coordinates",
            "take fewer steps, or forward mode, whose memory does not grow with them.",
        )  # fmt: skip
        system = _all_pairs(system)
    run = _Run(system, method, tangent, _limits(system, method))
    rows = []
    for count in counts:
        run.advance(int(count))
        rows.append((run.positions, run.tangent, run.perturbation, float(largest_force(method.forces(run.state)))))
    tolerance = max(TOLERANCE, round_off(system))
    eq = minimize(run.system.replace(positions=run.positions).reallocate(), tolerance=tolerance, progress=False)
    lin = linearize(eq)
    response = jvp(lin, dparams, throw=False)

    def off_null(v: Any) -> np.ndarray:
        return np.asarray(lin.null.project(Unknowns(jnp.asarray(v))).positions)

    exact, tangents = off_null(response.value), np.array([off_null(row[1]) for row in rows])
    scale = float(np.linalg.norm(exact)) or 1.0
    whole = np.linalg.norm(off_null(run.aside))
    grown = np.array([np.linalg.norm(off_null(row[2])) / whole for row in rows])
    growth = np.log(np.maximum(grown, np.finfo(float).tiny)) / counts
    return Unrolled(
        counts,
        np.linalg.norm(tangents - exact, axis=(1, 2)) / scale,
        np.linalg.norm(tangents, axis=(1, 2)),
        np.array([row[3] for row in rows]),
        growth,
        tangents,
        exact,
        FORWARD * state_bytes,
        int(counts[-1]) * state_bytes,
        _reversed(run, system, tangent, int(counts[-1])) if reverse else None,
        eq,
        response.status if np.isfinite(tangents).all() else Status.NOT_FINITE,
    )


def _checked(start: Any, steps: Any, method: Any) -> tuple[System, np.ndarray]:
    system = start.system if isinstance(start, Equilibrium) else start
    if not isinstance(system, System) or system.batch is not None:
        raise InputError(f"unrolled got a {type(start).__name__}: give one System, not a batch.")
    if not isinstance(method, Fire | GradientDescent):
        raise InputError(f"method is {short(method)}: give Fire() or GradientDescent() of ms.relaxation.")
    counts = np.unique(np.atleast_1d(np.asarray(steps)))
    if counts.ndim != 1 or not np.issubdtype(counts.dtype, np.integer) or not counts.size or counts[0] < 1:
        raise InputError(f"steps are {short(steps)}: give whole numbers from 1.")
    return system.reallocate(), counts


def _all_pairs(system: System) -> System:
    n, dtype = system.n, system.positions.dtype
    return system if system.neighbours.complete else system.replace(neighbours=neighbours.all_pairs(n, dtype))


def _limits(system: System, method: Any) -> Limits:
    """The limits in the law's units, which the run holds."""
    length, stiffness = (jnp.asarray(x, system.positions.dtype) for x in scales(system))
    return Limits.of((length, stiffness), method)


def _at_rest(system: System, method: Any) -> Any:
    """The shapes of the minimiser's state."""
    limits = _limits(system, method)
    return jax.eval_shape(lambda R: _machine(system, system.params, method, limits)[0](R), system.positions)


def _machine(system: System, params: Params, method: Any, limits: Limits) -> tuple[Any, Any]:
    """The minimiser at some parameters: (init, apply). Every row is summed, so that reverse mode can."""
    slope = energy_slope(system, params)

    def forces(R: jax.Array, **_: Any) -> jax.Array:
        return shortened(-slope(R), limits.strongest)

    def shift(R: jax.Array, dR: jax.Array, **_: Any) -> jax.Array:
        return R + shortened(dR, limits.longest)

    return method.minimizer(forces, shift, limits.stiffness)


def _floats(state: Any) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _with_floats(state: Any, floats: Sequence[jax.Array]) -> Any:
    leaves, kind = jax.tree.flatten(state)
    given = iter(floats)
    return kind.unflatten([next(given) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf for leaf in leaves])


def _pushed(f: Any, place: tuple[Any, Any], moves: tuple[Any, Any]) -> tuple[Any, list[jax.Array]]:
    """A state f(…), and its changes along several moves, stacked."""

    def along(move: tuple[Any, Any]) -> Any:
        return jax.jvp(lambda *at: ((new := f(*at)) and _floats(new), new), place, move, has_aux=True)

    _, changes, state = jax.vmap(along, out_axes=(None, 0, None))(moves)
    return state, changes


@functools.partial(jax.jit, static_argnames=("method",))
def _first(system: System, moves: tuple[Any, Any], method: Any, limits: Limits) -> tuple[Any, list[jax.Array]]:
    """The state at rest, and its changes with positions and parameters."""
    place = system.positions, dict(system.params)
    return _pushed(lambda R, p: _machine(system, p, method, limits)[0](R), place, moves)


@functools.partial(jax.jit, static_argnames=("method",))
def _advance(
    system: System, state: Any, changes: list[jax.Array], dparams: Params, count: Any, method: Any, limits: Limits
) -> tuple[Any, list[jax.Array], jax.Array]:
    """Steps, with what changes the state carried along, as long as the list holds every pair: (…, steps taken)."""
    anchors, distance = slack(system.neighbours, system.box, system.range)

    def step(carry: tuple[Any, list[jax.Array], jax.Array]) -> tuple[Any, list[jax.Array], jax.Array]:
        state, changes, k = carry

        def phi(floats: list[jax.Array], params: Params) -> Any:
            return _machine(system, params, method, limits)[1](_with_floats(state, floats))

        state, changes = _pushed(phi, (_floats(state), dict(system.params)), (changes, dparams))
        return state, changes, k + 1

    def going(carry: tuple[Any, list[jax.Array], jax.Array]) -> jax.Array:
        state, _, k = carry  # the next step has to end on the list, too
        return (k < count) & within(method.positions(state), anchors, distance - limits.longest)

    return jax.lax.while_loop(going, step, (state, changes, jnp.zeros((), jnp.int32)))


class _Run:
    """A run of the minimiser with two moves carried along: of the parameters, and of the start."""

    def __init__(self, system: System, method: Any, tangent: Params, limits: Limits):
        self.method, self.limits, self.steps = method, limits, 0
        aside = jnp.asarray(np.random.default_rng(0).normal(size=system.positions.shape), system.positions.dtype)
        self.aside = aside
        self.dparams = {k: jnp.stack([v, jnp.zeros_like(v)]) for k, v in tangent.items()}
        self.system = self._listed(system)
        moves = jnp.stack([jnp.zeros_like(aside), aside]), self.dparams
        self.state, self.changes = _first(self.system, moves, method, self.limits)

    def _listed(self, system: System) -> System:
        """With a list on which a step fits."""
        found = system.reallocate(keep=True)
        anchors, distance = slack(found.neighbours, found.box, found.range)
        room = within(found.positions, anchors, distance - self.limits.longest)
        if bool(room):
            return found
        found = found.reallocate()
        anchors, distance = slack(found.neighbours, found.box, found.range)
        return found if bool(distance > 1.01 * self.limits.longest) else _all_pairs(found)

    def advance(self, until: int) -> None:
        """Up to so many steps in all."""
        while self.steps < until:
            given = (self.system, self.state, self.changes, self.dparams, until - self.steps, self.method, self.limits)
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


def _reversed(run: _Run, start: System, tangent: Params, count: int) -> Reverse:
    """Reverse mode through so many steps, each recomputed from its state on the way back."""
    w = jnp.cos(jnp.arange(start.positions.size, dtype=start.positions.dtype) ** 2).reshape(start.positions.shape)

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
    return Reverse(abs(back - forth) / (abs(forth) or 1.0), None if measured is None else int(measured))
