"""Relaxing under constraints: an augmented Lagrangian to get near, Newton steps on the optimality
condition to arrive.

    L_rho = U + sum_k (lambda_k g_k + rho_k g_k^2 / 2),   lower <= x <= upper

scipy's L-BFGS-B finds its minimum in the bounds, lambda grows by rho g, and so on until g is small
(Nocedal and Wright, Numerical Optimization, 2006, section 17.4). Then what is at a bound and pushed
against it is held, and Newton steps of x and lambda together square the distance to the minimum.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize
from scipy.sparse.linalg import lsqr

from mdsens._util.errors import InputError
from mdsens._util.progress import Decades
from mdsens.mechanics.kkt_factor import KKT
from mdsens.mechanics.kkt_operator import constrained_null_space, flat, unflat
from mdsens.mechanics.lagrangian import (
    bounds,
    equations,
    lagrangian_gradient,
    multipliers_at,
    own_params,
    pinned,
    unknowns_of,
    with_unknowns,
)
from mdsens.mechanics.null_space import NullSpace
from mdsens.mechanics.rigidity import analyze_rigidity
from mdsens.mechanics.status import Status
from mdsens.mechanics.units import (
    doubtful_stiffness,
    force_goal,
    force_scale,
    natural_units,
    round_off,
)
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.system import System, potential_energy
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.relaxation.options import Options

__all__ = ["relax_constrained"]

ROUNDS = 30  # of the multipliers
NEAR = 2e-4  # of the potential's length and force: where Newton steps begin
NEARER = 0.1  # of that, each time that they made no headway
CLOSE = 1e-2  # of the potential's length and force: a start next to a minimum
RETURNS = 12  # to the augmented Lagrangian from Newton steps that made no headway
STEPS, TRIALS, STALLED = (
    60,
    8,
    12,
)  # Newton steps in a row; shifts of one; of them that do not halve the force
FIRST, RISEN = (
    0.1,
    10.0,
)  # multiple that shifts start with; what a step may raise the force to that lowers the energy
LONGEST = 0.1  # step of a coordinate, of the potential's length
PENALTY, RISE = (
    1.0,
    5.0,
)  # rho of the potential's stiffness to begin with; where g does not fall to a quarter, times this
UNMET, EPS = (
    1e-6,
    1e-14,
)  # of the potential's length: an equation that is off by more is not met; of a coordinate, none
SADDLES, OFF_SADDLE, DOWN = (
    3,
    1e-2,
    1e-10,
)  # times that one is left; the step off it; how far down from there
ROUND_OFF = 3.0  # times what round-off leaves of forces: nothing is gained from there
UNSEEN = 4500.0  # units of round-off of the energy: a difference below them tells nothing
MEMORY = 30  # pairs that L-BFGS-B keeps


@jax.jit
def _augmented(system: System, multipliers: Any, penalties: Any) -> tuple[jax.Array, Unknowns, Any]:
    """L_rho, its slope by positions and relaxed parameters, and g."""
    own = own_params(system)

    def value(x: Unknowns) -> tuple[jax.Array, Any]:
        at = {**own, **(x.params or {})}
        g = equations(system, x.positions, at)
        extra = sum(
            (jnp.sum(multipliers[k] * g[k] + 0.5 * penalties[k] * g[k] ** 2) for k in g),
            jnp.zeros(()),
        )
        return potential_energy(system, x.positions, at) + extra, g

    x = dataclasses.replace(unknowns_of(system), multipliers=None)
    (energy, g), slope = jax.value_and_grad(value, has_aux=True)(x)
    return energy, slope, g


@jax.jit
def _slope(system: System, multipliers: Any) -> Unknowns:
    return lagrangian_gradient(system, unknowns_of(system, multipliers), own_params(system))


@jax.jit
def _slope_rate(system: System, multipliers: Any, change: Unknowns) -> Unknowns:
    """How the slope changes with positions and relaxed parameters."""
    x, own = unknowns_of(system, multipliers), own_params(system)
    whole = dataclasses.replace(change, multipliers=jax.tree.map(jnp.zeros_like, x.multipliers))
    return jax.jvp(lambda y: lagrangian_gradient(system, y, own), (x,), (whole,))[1]


@jax.jit
def _limits(system: System) -> tuple[Unknowns, Unknowns]:
    low, high = bounds(system, system.params)
    stuck = pinned(system)
    at = (
        jnp.where(stuck, system.positions, low.positions),
        jnp.where(stuck, system.positions, high.positions),
    )
    return dataclasses.replace(low, positions=at[0]), dataclasses.replace(high, positions=at[1])


class _Descent:
    """The state of one relaxation: system, multipliers, and how many slopes were taken."""

    def __init__(self, system: System, asked: float | None, max_steps: int, bar: Decades):
        self.max_steps, self.asked, self.show, self.bar = max_steps, asked, bar.show, bar
        self.length, self.stiffness = (float(s) for s in natural_units(system))
        low, high = _limits(system)
        _check_limits(system, low, high)
        self.low, self.high = flat(low), flat(high)
        self.count = self.low.size
        self.like = dataclasses.replace(unknowns_of(system), multipliers=None)
        x = np.clip(flat(self.like), self.low, self.high)
        self.system = system
        self.round_off = ROUND_OFF * round_off(system)
        self.system = self.at(x)
        self.tolerance = 0.0
        self.aim()
        self.multipliers = unknowns_of(self.system).multipliers
        self.steps = 0

    def aim(self) -> None:
        """Set the force that counts as converged by the pairs as they are now."""
        dtype = self.system.positions.dtype.type
        scale = force_scale(self.system, dtype(self.length), dtype(self.stiffness), dtype(0.0))
        self.tolerance = float(
            np.fmin(force_goal(scale, self.asked)[0], self.stiffness * self.length)
        )
        self.bar.tolerance = max(self.tolerance, self.round_off)

    def at(self, z: np.ndarray) -> System:
        """The system at some unknowns, its list complete."""
        x = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, self.system.positions.dtype), unflat(z, self.like)
        )
        return with_unknowns(self.system, x, own_params(self.system)).reallocate(keep=True)

    @property
    def z(self) -> np.ndarray:
        return flat(dataclasses.replace(unknowns_of(self.system), multipliers=None)).astype(float)

    def left(self, slope: Unknowns, z: np.ndarray) -> tuple[np.ndarray, float]:
        """What of the slope nothing balances, and its size as a force, equations included.

        It is that of a step of projected gradient, k (z - clip(z - slope / k)): zero at a bound
        that is pushed against, and small where one is near that will be.
        """
        along = flat(dataclasses.replace(slope, multipliers=None)).astype(float)
        kept = self.stiffness * (z - np.clip(z - along / self.stiffness, self.low, self.high))
        n, d = self.system.positions.shape
        forces = np.linalg.norm(kept[: n * d].reshape(n, d), axis=1)
        others = np.abs(kept[n * d :])
        g = [
            np.max(np.abs(np.asarray(leaf)), initial=0.0)
            for leaf in jax.tree.leaves(slope.multipliers)
        ]
        size = max(
            forces.max(initial=0.0), others.max(initial=0.0), self.stiffness * max(g, default=0.0)
        )
        return kept, float(size)

    def conditions(self, stuck: np.ndarray) -> KKT:
        """The optimality conditions, some unknowns held where they are."""
        mask = unflat(stuck, self.like)
        none = jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), bool), self.multipliers)
        n, d = self.system.positions.shape
        null = NullSpace(
            jnp.zeros(n, bool), None, jnp.asarray(float(n)), motions=jnp.zeros((0, n, d)),
            active_set=Unknowns(jnp.asarray(mask.positions), None, none, jax.tree.map(jnp.asarray, mask.params)),
        )  # fmt: skip
        return KKT(self.system, null, self.multipliers)

    def balance(self) -> None:
        """Multipliers that balance most of the forces where the descent starts, if it starts next
        to a minimum.

        The augmented Lagrangian would find them too, but may leave for another minimum with the
        forces unbalanced.
        """
        if self.multipliers is None:
            return
        z = self.z
        system = self.conditions((z <= self.low) | (z >= self.high))
        if system.equations is None:
            return
        along = flat(
            dataclasses.replace(_slope(self.system, self.multipliers), multipliers=None)
        ).astype(float)
        pulls = lsqr(
            system.equations.T,
            -np.where(system.moves[: self.count], along, 0.0),
            atol=EPS,
            btol=EPS,
        )[0]
        like = dataclasses.replace(self.like, multipliers=self.multipliers)
        found = unflat(np.concatenate([z, system.unit * pulls]), like).multipliers
        found = jax.tree.map(lambda leaf: jnp.asarray(leaf, self.system.positions.dtype), found)
        if self.left(_slope(self.system, found), z)[1] <= CLOSE * self.stiffness * self.length:
            self.multipliers = found

    def near(self, share: float) -> None:
        """To where forces and g are a share of the potential's own, by the augmented Lagrangian."""
        force = share * self.stiffness * self.length
        penalties = self._penalties()
        broken = np.inf
        for _ in range(ROUNDS):
            system = self.system

            last: list[Any] = [0.0, self.z]

            def evaluate(
                z: np.ndarray, penalties: Any = penalties, last: Any = last
            ) -> tuple[float, np.ndarray]:
                self.system = self.at(z)
                energy, slope, _ = _augmented(self.system, self.multipliers or {}, penalties)
                self.steps += 1
                along = flat(slope).astype(float)
                if self.steps % 50 == 0:
                    self.show(self.steps, float(np.max(np.abs(along), initial=0.0)))
                if not (np.isfinite(float(energy)) and np.isfinite(along).all()):
                    back = z - last[1]  # uphill, so that the line search turns round
                    steep = 1e3 * self.stiffness
                    return last[0] + steep * float(back @ back), 2.0 * steep * back
                last[:] = float(energy), z.copy()
                return float(energy), along

            budget = max(self.max_steps - self.steps, 1)
            inside = list(zip(self.low, self.high, strict=True))
            how = {
                "maxcor": MEMORY,
                "maxfun": budget,
                "maxiter": budget,
                "ftol": 0.0,
                "gtol": force,
                "maxls": 50,
            }
            start = self.z
            found = minimize(
                evaluate, start, jac=True, method="L-BFGS-B", bounds=inside, options=how
            )
            self.system = system
            self.system = self.at(np.clip(found.x, self.low, self.high))
            if self.multipliers is None:
                return
            _, _, g = _augmented(self.system, self.multipliers, penalties)
            self.multipliers = {k: self.multipliers[k] + penalties[k] * g[k] for k in g}
            worst = max(
                float(np.max(np.abs(np.asarray(v)), initial=0.0)) for v in jax.tree.leaves(g)
            )
            if worst <= share * self.length or self.steps >= self.max_steps:
                return
            if worst > 0.25 * broken:
                penalties = {k: RISE * v for k, v in penalties.items()}
            broken = worst

    def _penalties(self) -> dict[str, jax.Array]:
        """rho of each equation, so that rho |grad g|^2 is the potential's stiffness times a number for
        each.
        """
        own = own_params(self.system)
        x = dataclasses.replace(unknowns_of(self.system), multipliers=None)

        def sizes(x: Unknowns) -> dict[str, jax.Array]:
            return equations(self.system, x.positions, {**own, **(x.params or {})})

        g, pull = jax.vjp(sizes, x)
        found = {}
        for name in g:
            one = {k: jnp.ones_like(v) if k == name else jnp.zeros_like(v) for k, v in g.items()}
            squared = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(pull(one)[0]))
            each = squared / max(int(np.size(g[name])), 1)
            found[name] = jnp.asarray(PENALTY * self.stiffness / max(each, 1e-300))
        return found

    def arrive(self) -> float:
        """To the tolerance, or as far as it goes; the force that is left."""
        share = NEAR
        size = self.left(_slope(self.system, self.multipliers), self.z)[1]
        if not size <= NEAR * self.stiffness * self.length:
            self.near(share)
        for _ in range(RETURNS):
            size = self.newton()
            self.aim()
            if size <= max(self.tolerance, self.round_off) or self.steps >= self.max_steps:
                break
            share = max(share * NEARER, 0.1 * self.tolerance / (self.stiffness * self.length))
            self.near(share)
        return size

    def unmet(self) -> str:
        """The equation that is furthest from being met, in words; empty where all are met as far as
        forces are.
        """
        slope, worst, said = _slope(self.system, self.multipliers), UNMET * self.length, ""
        for name, g in (slope.multipliers or {}).items():
            off = np.abs(np.atleast_1d(np.asarray(g))).ravel()
            if off.max(initial=0.0) > worst:
                k = int(np.argmax(off))
                worst, said = float(off[k]), f"{name}[{k}] is off by {off[k]:.3g}"
        return said

    def leave_saddle(self, size: float) -> bool:
        """A step along the lowest mode on the tangent space where it has a negative one; whether
        there was one.
        """
        backbone, net, null = analyze_rigidity(self.system, size)
        system = KKT(
            backbone,
            constrained_null_space(backbone, net, null, self.multipliers),
            self.multipliers,
        )
        if not system.negative[0] > 0:
            return False
        spectrum = system.lowest(1, doubtful_stiffness(size, self.length))
        if not spectrum.negative:  # the pivot of a free motion may be negative by round-off
            return False
        mode = spectrum.vectors[:, 0]
        step = OFF_SADDLE * self.length / np.abs(mode).max() * mode
        self.system = self.at(np.clip(self.z + step, self.low, self.high))
        return True

    def newton(self) -> float:
        """Newton steps on the optimality condition as long as they make headway; the force that is
        left.

        H_L has a multiple of the force over the potential's length added to it, which grows where a step
        lowers neither what is left nor the augmented Lagrangian, and falls where it does.
        """
        slope, z, multiple = _slope(self.system, self.multipliers), self.z, FIRST
        size = self.left(slope, z)[1]
        best, since, start = size, 0, (size, self.system, self.multipliers)
        penalties = self._penalties() if self.multipliers is not None else {}
        for _ in range(STEPS):
            if (
                not (np.isfinite(size) and size > self.tolerance)
                or self.steps >= self.max_steps
                or since >= STALLED
            ):
                break
            for _ in range(TRIALS):
                step = self._step(slope, z, multiple * size / self.length)
                found = self._try(z, step)
                if found[-1] < 0.9 * size or (
                    found[-1] < RISEN * size and self._lower(found, z, penalties)
                ):
                    break
                multiple *= 8.0
            else:
                break
            self.system, self.multipliers, slope, z, size = found
            multiple = max(0.1 * multiple, 1e-3)
            best, since = (size, 0) if size < 0.5 * best else (best, since + 1)
            self.show(self.steps, size)
        if size > start[0]:
            size, self.system, self.multipliers = start
        return size

    def _lower(self, found: tuple[Any, ...], z: np.ndarray, penalties: Any) -> bool:
        """Whether the augmented Lagrangian with a step's multipliers is lower at its end than where
        it began.

        Where the difference is round-off, the slopes at both ends tell.
        """
        ends = [_augmented(s, found[1] or {}, penalties) for s in (self.system, found[0])]
        before, after = (float(energy) for energy, *_ in ends)
        if abs(after - before) > UNSEEN * float(np.finfo(float).eps) * abs(before):
            return after < before
        return sum(float(flat(slope) @ (found[3] - z)) for _, slope, _ in ends) < 0.0

    def _step(self, slope: Unknowns, z: np.ndarray, shift: float) -> np.ndarray:
        """The change of unknowns and multipliers; what is pushed against a bound goes to it, or
        stays there.
        """
        along = flat(dataclasses.replace(slope, multipliers=None)).astype(float)
        ahead = z - along / self.stiffness
        stuck = (self.low == self.high) | (ahead <= self.low) | (ahead >= self.high)
        onto = np.where(stuck, np.clip(ahead, self.low, self.high) - z, 0.0)
        rate = _slope_rate(
            self.system, self.multipliers, jax.tree.map(jnp.asarray, unflat(onto, self.like))
        )
        system = self.conditions(stuck)
        side = -(flat(slope) + flat(rate)).astype(float)
        units = np.where(np.arange(system.size) < system.primal, 1.0, system.unit)
        step = units * system.direction(np.where(system.moves, units * side, 0.0), shift)
        step[: self.count] += onto
        longest = np.max(np.abs(step[: self.count]), initial=0.0)
        return step * min(1.0, LONGEST * self.length / longest) if longest > 0 else step

    def _try(self, z: np.ndarray, step: np.ndarray) -> tuple[Any, ...]:
        """Where a step ends: system, multipliers, slope, unknowns, what is left."""
        there = np.clip(z + step[: self.count], self.low, self.high)
        system = self.at(there)
        multipliers = self.multipliers
        if multipliers is not None:
            change = unflat(
                step, dataclasses.replace(self.like, multipliers=multipliers)
            ).multipliers
            multipliers = jax.tree.map(lambda a, b: a + jnp.asarray(b), multipliers, change)
        slope = _slope(system, multipliers)
        self.steps += 1
        _, size = self.left(slope, there)
        return system, multipliers, slope, there, size if np.isfinite(size) else np.inf


def relax_constrained(system: System, options: Options, bar: Decades) -> tuple[Equilibrium, str]:
    """A minimum under constraints, and where the relaxation ended, in words.

    ``max_force`` of the result is the largest norm of a particle's force that nothing balances, or
    what counts as one: the slope along a relaxed parameter, or g times the potential's stiffness.
    ``steps`` are evaluations of the slope. What is off its bounds at the start is put on them.
    """
    run = _Descent(system, options.tolerance, options.max_steps, bar)
    run.balance()
    size = run.arrive()
    saddles, highest, stuck = 0, 0.0, False
    while options.leave_saddles and size <= max(run.tolerance, run.round_off):
        energy = float(potential_energy(run.system))
        if not run.leave_saddle(size):
            break
        if saddles == SADDLES:
            stuck = True
            break
        highest = highest if saddles else energy
        saddles += 1
        run.near(DOWN)
        size = run.arrive()
    unmet = run.unmet()
    if stuck:
        status = Status.INDEFINITE
    elif size <= run.tolerance:
        status = Status.CONVERGED
    elif unmet:
        status = Status.CONSTRAINTS_UNMET
    elif size <= run.round_off:
        status = Status.ROUND_OFF_LIMITED
    elif not np.isfinite(size):
        status = Status.NOT_FINITE
    else:
        more = run.steps < options.max_steps
        status = Status.UNCONVERGED if more else Status.MAX_STEPS_REACHED
    relaxed = run.system
    unknowns = unknowns_of(relaxed, run.multipliers)
    eq = Equilibrium(
        system=relaxed,
        status=jnp.asarray(status.value, jnp.int32),
        max_force=jnp.asarray(size),
        steps=jnp.asarray(run.steps),
        wall_time=0.0,
        tolerance=run.tolerance,
        force_floor=run.round_off,
        saddles=saddles,
        descent=highest - float(potential_energy(relaxed)) if saddles else 0.0,
        examined=options.leave_saddles,
        multipliers=multipliers_at(relaxed, unknowns, own_params(relaxed)),
    )
    ended = f"minimize under constraints stopped after {run.steps:,} steps at max_force {size:.3e}"
    return eq, f"{ended}; {unmet}" if unmet else ended


def _check_limits(system: System, low: Unknowns, high: Unknowns) -> None:
    """Raise InputError where bounds leave no room, or a pinned coordinate is beyond one."""
    inside = bounds(system, system.params)
    lower, upper, at = (
        np.asarray(x, float) for x in (inside[0].positions, inside[1].positions, system.positions)
    )
    if (lower > upper).any():
        i, a = (int(k) for k in np.argwhere(lower > upper)[0])
        raise InputError(
            f"the walls leave particle {i} no room along axis {a}: it may be from {lower[i, a]:g}"
            f" to {upper[i, a]:g}; move them apart."
        )
    beyond = np.asarray(pinned(system)) & (
        (at < lower - ROUND_OFF * EPS * abs(at)) | (at > upper + ROUND_OFF * EPS * abs(at))
    )
    if beyond.any():
        i, a = (int(k) for k in np.argwhere(beyond)[0])
        raise InputError(
            f"particle {i} is pinned at {at[i, a]:g} along axis {a}, beyond a wall, which leaves it"
            f" {lower[i, a]:g} to {upper[i, a]:g}: move the pin or the wall."
        )
