"""Relaxing a system to a minimum: jax-md's minimisers in a loop that owns the list, the tolerance and the status."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
import time
from collections.abc import Mapping
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens import neighbours
from mdsens._checks import short
from mdsens._tables import Shown
from mdsens.implicit.status import (
    ConvergenceError,
    InputError,
    PrecisionError,
    SolveStats,
    Status,
    raise_for_status,
)
from mdsens.minimisers import Fire, GradientDescent, Newton
from mdsens.neighbours import Neighbours
from mdsens.stationarity import Unknowns, force, gradient, largest_force, linearisation, max_force
from mdsens.stiffness import Stiffness
from mdsens.system import System, box_at, pair_terms, stack, unstack

__all__ = ["Equilibrium", "Fire", "GradientDescent", "Newton", "minimize", "relax", "scales"]

Params = Mapping[str, Any]
STEPS_PER_CALL = 500  # between two looks of the host: progress, reallocation, interrupts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Equilibrium(Shown):
    """A relaxed system with the evidence. Frozen, and a pytree; of a batch, every array has a leading axis.

    Attributes:
      system: relaxed.
      status: a :class:`~mdsens.Status`, as an integer array.
      max_force: the largest norm of a particle's force left (ASE's fmax), in energy a length.
      steps: of the minimiser.
      wall_time: seconds, compilation included; 0 inside traced code.
      tolerance: what max_force was to reach.
    """

    system: System
    status: jax.Array
    max_force: jax.Array
    steps: jax.Array
    wall_time: Any
    tolerance: Any

    @property
    def positions(self) -> jax.Array:
        """(n, d), the system's."""
        return self.system.positions

    @property
    def params(self) -> dict[str, jax.Array]:
        """The system's."""
        return self.system.params

    _title = "Equilibrium"

    def _rows(self) -> list[tuple[str, str]]:
        s = self.system
        if s.batch is not None:
            good = int(sum(Status(int(k)).good for k in np.asarray(self.status)))
            return [
                ("members", f"{s.batch} of n = {s.n}, {s.dimension}-D, {s.potential.name}"),
                ("converged", f"{good} of {s.batch}"),
                ("largest max_force", f"{float(jnp.max(self.max_force)):.2e}"),
            ]
        return [
            ("system", f"n = {s.n}, {s.dimension}-D, {s.potential.name}"),
            ("status", f"{Status(int(self.status)).name}: {Status(int(self.status)).sentence}"),
            ("max_force", f"{float(self.max_force):.2e} (tolerance {float(self.tolerance):.0e})"),
            ("steps", f"{int(self.steps):,} in {float(self.wall_time):.2f} s"),
        ]


def scales(system: System) -> tuple[jax.Array, jax.Array]:
    """The law's own length and largest stiffness, (l, k): they make the minimiser's steps independent of the units.

    l is where the pair energy is least (contact, for a law that only repels) and k the curvature there (at 0.9 l, for
    one that only repels) times the 2^(d+1) that a dense packing of such pairs reaches: 10 for harmonic discs and 900
    for a Lennard-Jones crystal, against largest eigenvalues of 10 and 850. Both are medians over some pairs. Of a law
    without pairs, l is the spacing of the particles and k the largest curvature of the energy where they are.
    """
    lengths, curvatures = [], []
    n, d = system.positions.shape
    extent = jnp.max(jnp.max(system.positions, axis=0) - jnp.min(system.positions, axis=0)) / max(n ** (1.0 / d) - 1, 1)
    spacing = extent if system.box is None else (system.volume / n) ** (1.0 / d)
    for term in pair_terms(system):
        count = term.i.shape[0]
        if count == 0:
            continue
        some = np.unique(np.linspace(0, count - 1, 16).astype(int))
        values = tuple(v if v.ndim == 0 else v[some] for v in term.values)
        far = jnp.where(jnp.isfinite(system.range) & (system.range > 0), system.range, 4.0 * spacing)
        r = far * jnp.linspace(0.05, 1.0, 400)[:, None] * jnp.ones(some.shape[0])

        def phi(r: jax.Array, term: Any = term, values: Any = values) -> jax.Array:
            return term.phi(r, *values)

        energies = phi(r)
        least = jnp.argmin(jnp.where(jnp.isfinite(energies), energies, jnp.inf), axis=0)
        at = jnp.take_along_axis(r, least[None], axis=0)
        at_least = jnp.take_along_axis(energies, least[None], axis=0)
        slope = jax.grad(lambda r, phi=phi: jnp.sum(phi(r)))
        where = jnp.where(at_least < 0, at, 0.9 * at)
        curvature = jax.jvp(slope, (where,), (jnp.ones_like(where),))[1]
        lengths.append(jnp.median(at))
        curvatures.append(jnp.median(jnp.abs(curvature)))
    if not lengths:
        return spacing, _curvature(system)
    stiffness = 2.0 ** (d + 1) * jnp.max(jnp.stack(curvatures))
    return jnp.min(jnp.stack(lengths)), jnp.where(stiffness > 0, stiffness, 1.0)


def _curvature(system: System) -> jax.Array:
    """The size of the Hessian at the system's positions, from a few steps of power iteration; 1 where it vanishes."""
    R = system.positions

    def slope(positions: jax.Array) -> jax.Array:
        return gradient(system, Unknowns(positions), system.params).positions

    def product(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        v, size = carry
        w = jax.jvp(slope, (R,), (v / jnp.where(size > 0, size, 1.0),))[1]
        return w, jnp.sqrt(jnp.sum(w**2))

    start = jnp.cos(jnp.arange(R.size, dtype=R.dtype) ** 2).reshape(R.shape)
    _, size = jax.lax.fori_loop(0, 10, product, (start, jnp.sqrt(jnp.sum(start**2))))
    return jnp.where((size > 0) & jnp.isfinite(size), size, 1.0)


@functools.partial(jax.jit, static_argnames=("method",))
def _begin(system: System, method: Any) -> tuple[Any, Neighbours]:
    pairs, _ = neighbours.update(system.neighbours, system.positions, system.box, system.range)
    init, _, _ = _machine(system, method)
    return init(system.positions, pairs), pairs


def _machine(system: System, method: Any) -> tuple[Any, Any, Any]:
    """jax-md's minimiser on this system: (init, apply, forces).

    Overlaps of a random start make forces of 1e20 in a Lennard-Jones law, and FIRE never forgets such a momentum. So a
    particle's force counts up to the size that moves it by the longest step, and its step is cut there too. Neither
    touches the neighbourhood of a minimum.
    """
    # a fixed cutoff is a double where x64 is on: positions in single precision keep theirs through the loop
    longest, strongest, stiffness = _limits(system, method)

    def forces(R: jax.Array, pairs: Neighbours, **_: Any) -> jax.Array:
        pull = -gradient(system.replace(neighbours=pairs), Unknowns(R), system.params).positions
        return _shortened(pull, strongest)

    def shift(R: jax.Array, dR: jax.Array, **_: Any) -> jax.Array:
        return R + _shortened(dR, longest)

    init, apply = method.minimizer(forces, shift, stiffness)
    return init, apply, forces


def _limits(system: System, method: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The longest step of a particle, the strongest force on it, and the law's stiffness."""
    length, stiffness = (jax.lax.stop_gradient(x).astype(system.positions.dtype) for x in scales(system))
    longest = method.max_step * length
    return longest, method.force_limit(longest, stiffness), stiffness


@functools.partial(jax.jit, static_argnames=("method",))
def _uncut(system: System, method: Any, tolerance: Any) -> jax.Array:
    """The tolerance, but below the size that forces are cut to: what was cut is not small."""
    return jnp.minimum(tolerance, 0.5 * _limits(system, method)[1])


def _shortened(vectors: jax.Array, longest: jax.Array) -> jax.Array:
    """Each row cut to a length."""
    # by their largest component, whose square may overflow: a force of 1e200 would come out as none at all
    largest = jnp.max(jnp.abs(vectors), axis=-1, keepdims=True)
    unit = vectors / jnp.where(largest > 0, largest, 1.0)
    size = largest * jnp.sqrt(jnp.sum(unit**2, axis=-1, keepdims=True))
    return vectors * jnp.minimum(1.0, longest / jnp.where(size > 0, size, 1.0))


def _advance(
    system: System, state: Any, pairs: Neighbours, tolerance: Any, budget: Any, method: Any
) -> tuple[Any, Neighbours, jax.Array]:
    """Up to ``budget`` steps; stops at the tolerance, at a list that overflowed, at a force that is not finite."""
    _, apply, forces = _machine(system, method)
    box, needed = box_at(system, system.params), system.range

    def unfinished(carry: tuple[Any, Neighbours, jax.Array]) -> jax.Array:
        state, pairs, step = carry
        largest = largest_force(method.forces(state))
        return (step < budget) & (largest > tolerance) & jnp.isfinite(largest) & ~pairs.overflowed

    def advance(carry: tuple[Any, Neighbours, jax.Array]) -> tuple[Any, Neighbours, jax.Array]:
        state, pairs, step = carry
        state = apply(state, pairs=pairs)
        here = method.positions(state)
        pairs, rebuilt = neighbours.update(pairs, here, box, needed)
        # the step used the list of its start; where that fell short, the force is taken again, so that the force
        # that is tested against the tolerance always comes from a complete list
        fresh = jax.lax.cond(rebuilt, lambda: forces(here, pairs), lambda: method.forces(state))
        return method.with_forces(state, fresh), pairs, step + 1

    return jax.lax.while_loop(unfinished, advance, (state, pairs, jnp.zeros((), jnp.int32)))


@functools.partial(jax.jit, static_argnames=("method",))
def _forces(system: System, method: Any) -> jax.Array:
    """The forces that the minimiser works with, at the system's positions."""
    return _machine(system, method)[2](system.positions, system.neighbours)


_advance_jit = functools.partial(jax.jit, static_argnames=("method",))(_advance)


def _final_force(relaxed: System, tested: jax.Array, tolerance: Any) -> jax.Array:
    """The largest force: the one that met the tolerance, or, where none did, the whole force without its limit."""
    return jnp.where(tested <= tolerance, tested, max_force(relaxed))


def _status(largest: Any, tolerance: Any, overflowed: Any) -> jax.Array:
    """CONVERGED, NEIGHBOURS_OVERFLOWED, NOT_FINITE or MAX_STEPS_REACHED."""
    code = jnp.where(largest <= tolerance, Status.CONVERGED.value, Status.MAX_STEPS_REACHED.value)
    code = jnp.where(jnp.isfinite(largest), code, Status.NOT_FINITE.value)
    return jnp.where(overflowed, Status.NEIGHBOURS_OVERFLOWED.value, code).astype(jnp.int32)


def relax(system: System, tolerance: Any, max_steps: Any, method: Any) -> Equilibrium:
    """Relax inside traced code: no reallocation, no errors; the status says what happened."""
    state, pairs = _begin(system, method)
    tested = _uncut(system, method, tolerance)
    state, pairs, steps = _advance(system, state, pairs, tested, max_steps, method)
    relaxed = system.replace(positions=method.positions(state), neighbours=pairs)
    largest = _final_force(relaxed, largest_force(method.forces(state)), tested)
    code = _status(largest, tolerance, pairs.overflowed)
    zero = jnp.zeros((), system.positions.dtype)
    return Equilibrium(relaxed, code, largest, steps, zero, jnp.asarray(tolerance, zero.dtype))


def minimize(
    system: System,
    params: Params | None = None,
    *,
    tolerance: float = 1e-12,
    method: Newton | Fire | GradientDescent | None = None,
    max_steps: int = 200_000,
    throw: bool = True,
    progress: bool | None = None,
) -> Equilibrium:
    """Relax a system to a minimum of its energy, dU/dR = 0.

    Args:
      system: where to start; a batch made by ``stack`` relaxes member by member.
      params: parameters to change first; the others stay.
      tolerance: the largest force on a particle to reach, in the potential's units. The error of every derivative is
        this over the smallest stiffness, so it is small by default; raise it where round-off stands above it.
      method: ``Newton()`` (the default: FIRE, and Newton steps where it crawls), ``Fire()`` or ``GradientDescent()``.
      max_steps: of the minimiser.
      throw: raise where the tolerance is not reached; with False the status says so instead.
      progress: show a progress bar; where None, in a terminal or notebook alone.

    Returns:
      an :class:`Equilibrium`.

    Raises:
      InputError: bad parameters or tolerance. PrecisionError: a tolerance below round-off at this precision.
      ConvergenceError: with the status, and what was reached as ``result``.
    """
    method = Newton() if method is None else method
    _check_kinds(system, method)
    if not (isinstance(tolerance, Real) and 0 < tolerance <= sys.float_info.max):
        raise InputError(f"tolerance is {short(tolerance)}: give a positive number.")
    if not (isinstance(max_steps, Real) and max_steps >= 1):
        raise InputError(f"max_steps is {short(max_steps)}: give 1 or more.")
    if system.batch is not None:
        return _minimize_batch(system, params, tolerance, method, max_steps, throw, progress)
    if params is not None:
        system = system.with_params(params)
    _check_precision(system, tolerance)
    began = time.perf_counter()
    newton, method = (method, method.first) if isinstance(method, Newton) else (None, method)
    system = system.reallocate(keep=True)
    state, pairs = _begin(system, method)
    steps, room, bar = 0, 1.25, _Progress(tolerance, progress)
    tested = float(_uncut(system, method, tolerance))
    target, patience = tested, newton.patience if newton else max_steps
    try:
        while True:
            budget = min(STEPS_PER_CALL, max_steps - steps)
            state, pairs, done = _advance_jit(system, state, pairs, target, budget, method)
            steps += int(done)
            largest = float(largest_force(method.forces(state)))
            bar.show(steps, largest)
            if bool(pairs.overflowed) and np.isfinite(np.asarray(method.positions(state))).all():
                room = min(1.25 * room, 4.0) if int(done) <= 1 else 1.25
                here = system.replace(positions=method.positions(state), neighbours=pairs).reallocate(room)
                system, pairs = here, here.neighbours
                state = method.with_forces(state, _forces(here, method))
                largest = float(
                    largest_force(method.forces(state))
                )  # what stood there came from a list that lost pairs
                if steps < max_steps:
                    continue
            if not (largest > tested and steps < max_steps and np.isfinite(largest)):
                break
            if newton and steps >= patience:
                here = system.replace(positions=method.positions(state), neighbours=pairs)
                _, net, _ = linearisation(here, largest)
                near = newton.begin * float(net.mean_force)
                if largest > near:  # how far FIRE has still to go
                    target = max(near, tested)
                    continue
                here, largest, taken = _newton_steps(here, largest, tested)
                steps, target, patience = steps + taken, tested, steps + newton.patience
                if taken:
                    system = here
                    state, pairs = _begin(system, method)
                    bar.show(steps, largest)
                if largest <= tested:
                    break
    finally:
        bar.close()
    relaxed = system.replace(positions=method.positions(state), neighbours=pairs)
    largest = float(_final_force(relaxed, jnp.asarray(largest), tested))
    status = Status(int(_status(largest, tolerance, pairs.overflowed)))
    eq = Equilibrium(
        relaxed,
        jnp.asarray(status.value, jnp.int32),
        jnp.asarray(largest),
        jnp.asarray(steps),
        time.perf_counter() - began,
        tolerance,
    )
    if throw:
        raise_for_status(status, f"minimize stopped after {steps:,} steps at max_force {largest:.3e}", eq)
    return eq


def _newton_steps(system: System, largest: float, tolerance: float) -> tuple[System, float, int]:
    """Newton steps while each of them halves the largest force at least: (system, its largest force, steps)."""
    taken, longest = 0, 0.1 * float(scales(system)[0])
    while largest > tolerance:
        backbone, _, null = linearisation(system, largest)
        stiffness = Stiffness(backbone, null)
        if stiffness.factor is not None and stiffness.factor.negative:
            break
        step, _, status = stiffness.solve(np.asarray(force(backbone)))
        if not (status.good and np.isfinite(step).all() and np.abs(step).max(initial=0.0) < longest):
            break
        there = system.replace(positions=system.positions + jnp.asarray(step, system.positions.dtype))
        there = there.reallocate(keep=True)
        left = float(max_force(there))
        if not left < 0.5 * largest:
            break
        system, largest, taken = there, left, taken + 1
    return system, largest, taken


def _minimize_batch(
    batch: System, params: Params | None, tolerance: float, method: Any, max_steps: int, throw: bool, progress: Any
) -> Equilibrium:
    members = []
    for member in unstack(batch):
        members.append(
            minimize(
                member, params, tolerance=tolerance, method=method, max_steps=max_steps, throw=False, progress=progress
            )
        )
    whole = stack([m.system for m in members])
    eq = Equilibrium(
        whole,
        jnp.stack([m.status for m in members]),
        jnp.stack([m.max_force for m in members]),
        jnp.stack([m.steps for m in members]),
        jnp.asarray([m.wall_time for m in members]),
        jnp.full(len(members), tolerance),
    )
    if throw:
        bad = [k for k, m in enumerate(members) if not Status(int(m.status)).good]
        if bad:
            status = Status(int(members[bad[0]].status))
            raise ConvergenceError(
                f"{len(bad)} of {len(members)} members did not relax, the first is member {bad[0]}: {status.sentence}.",
                status,
                eq,
            )
    return eq


def stats(eq: Equilibrium, method: Any) -> SolveStats:
    """The relaxation's evidence in the form that a solve has."""
    return SolveStats(eq.status, eq.max_force, eq.steps, jnp.zeros_like(eq.max_force), type(method).__name__)


@jax.jit
def round_off(system: System) -> jax.Array:
    """The largest force that the resolution of the positions alone can leave on a particle: eps |R| k.

    k is the law's largest stiffness. Minimisations reach between a tenth of it and all of it.
    """
    resolution = jnp.finfo(system.positions.dtype).eps * jnp.max(jnp.abs(system.positions), initial=0.0)
    return resolution * scales(system)[1]


def _check_kinds(system: Any, method: Any) -> None:
    if not isinstance(system, System):
        raise InputError(f"minimize got a {type(system).__name__}: give a System, such as ms.load_system gives.")
    if not isinstance(method, Newton | Fire | GradientDescent):
        raise InputError(f"method is {short(method)}: give Newton(), Fire() or GradientDescent() of ms.relaxation.")


def _check_precision(system: System, tolerance: float) -> None:
    floor = float(round_off(system))
    if tolerance < 0.05 * floor:
        remedy = f"raise it to {floor:.0e} or more"
        if system.positions.dtype != jnp.float64:
            remedy += ", or work in double precision (in Python, ms.enable_x64() before making the system)"
        raise PrecisionError(
            f"tolerance {tolerance:.0e} is out of reach in {system.positions.dtype}, where round-off of the positions "
            f"leaves forces of about {floor:.0e}: {remedy}."
        )


class _Progress:
    """A tqdm bar over the decades of force still to go; off where nobody watches."""

    def __init__(self, tolerance: float, wanted: bool | None):
        self.tolerance, self.first, self.bar = tolerance, None, None
        watched = sys.stderr.isatty() or "ipykernel" in sys.modules
        if not (watched if wanted is None else wanted):
            return
        if importlib.util.find_spec("ipywidgets"):
            from tqdm.auto import tqdm
        else:  # without them tqdm.auto warns in a notebook
            from tqdm import tqdm
        self.bar = tqdm(
            total=100,
            leave=False,
            desc="relaxing",
            bar_format="{desc} {bar} {elapsed}{postfix}",
            delay=0.5,
        )

    def show(self, steps: int, largest: float) -> None:
        if self.bar is None or not (np.isfinite(largest) and largest > 0):
            return
        self.first = max(largest, self.first or largest)
        decades = np.log(self.first / self.tolerance)
        done = 100.0 * np.log(self.first / max(largest, self.tolerance)) / decades if decades > 0 else 100.0
        self.bar.n = int(done)
        self.bar.set_postfix_str(f"step {steps:,}, max_force {largest:.1e}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
