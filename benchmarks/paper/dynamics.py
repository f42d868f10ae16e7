"""How far is a packing's sensitivity to a diameter from the truth, after so many steps?
The paper's molecular dynamics.

``python -m benchmarks.paper.dynamics``

128 harmonic discs, half of diameter 1, half of diameter theta = 0.6, in a periodic cell that keeps
the packing fraction at 0.98 whatever theta is, from random places
(``ms.load_system("seed_packing_2d", seed=k)``), relaxed by jax-md's FIRE.

    implicit at k   H(R_k) dR = - d2U/dR dtheta, at where FIRE stands after k steps
    unrolled        forward: a tangent through the k steps;
                    reverse: of <w, R_k>, every step kept, or made anew

Truth is ``ms.jvp`` at the minimum that the same run of FIRE reaches at a largest force of 1e-12,
itself held against finite differences of minimizing again. An error is that of the whole vector,
relative; sizes are L1 norms, as in the paper; both without translations and the rows of rattlers,
which the minimum does not determine. Particles are not wrapped into the cell, so that all
derivatives are of the same images. The linear solver is MINRES, which gives the shortest answer
where a rattler makes H singular, and goes on where H is indefinite, as it is before the minimum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from matplotlib.figure import Figure

import mdsens as ms
from benchmarks._common import length_of, timed
from benchmarks.paper._common import (
    FOURTH,
    IMPLICIT,
    THIRD,
    UNROLLED,
    Row,
    asked,
    finish,
    measured,
)
from mdsens.implicit import MINRES, root
from mdsens.implicit.conditions.optimality import stationary
from mdsens.mechanics.units import Limits

STEPS = (50, 100, 200, 300, 500, 700, 1000, 1500, 2000)
REVERSED = (100, 300, 1000)  # numbers of steps for reverse mode, a compilation each
TOLERANCE, LIMIT = 1e-12, 50_000
FIRE = ms.relaxation.Fire()
CHECKED = 3  # packings whose truth is held against finite differences
RIGHT = 1e-3  # a relative error below which a sensitivity counts as right
MOST = 2000.0  # MB of temporaries above which reverse mode is compiled, and not run


@dataclasses.dataclass(frozen=True)
class Discs:
    """The packing as jax-md's users would write it: all pairs, the minimum image, no list.

    Attributes:
      small: (n,) which discs have the diameter theta; the others have 1.
      fraction: the packing fraction that the cell keeps.
    """

    small: np.ndarray
    fraction: float = 0.98

    def energy(self, R: Array, theta: Array) -> Array:
        """U(R, theta), half the square of each pair's relative overlap."""
        sigma = jnp.where(self.small, theta, 1.0)
        length = jnp.sqrt(jnp.pi * jnp.sum(sigma**2) / (4 * self.fraction))
        apart = R[:, None] - R[None]
        apart = apart - length * jnp.round(apart / length)
        itself = jnp.eye(len(R), dtype=bool)
        distance = jnp.sqrt(jnp.where(itself, 1.0, jnp.sum(apart**2, axis=-1)))
        overlap = jnp.where(
            itself, 0.0, jnp.maximum(1.0 - 2.0 * distance / (sigma[:, None] + sigma), 0.0)
        )
        return 0.25 * jnp.sum(overlap**2)

    def fire(self, theta: Array) -> tuple[Callable[[Array], Any], Callable[[Any], Any]]:
        """jax-md's FIRE at its own settings, (init, step)."""
        force = jax.grad(lambda R: -self.energy(R, theta))
        limits = Limits.of((jnp.asarray(1.0), jnp.asarray(10.0)), FIRE)
        return FIRE.functions(lambda R, **_: force(R), lambda R, dR, **_: R + dR, limits)

    def after(self, steps: int | Array, start: Array, theta: Array) -> Array:
        """R_k; k may be traced, for forward mode alone."""
        init, step = self.fire(theta)
        return FIRE.positions(lax.fori_loop(0, steps, lambda _, state: step(state), init(start)))

    def scanned(self, steps: int, start: Array, theta: Array, again: bool) -> Array:
        """R_k for reverse mode: all of each step kept, or its state alone, the rest made again."""
        init, step = self.fire(theta)
        one = jax.checkpoint(step) if again else step
        return FIRE.positions(
            lax.scan(lambda state, _: (one(state), None), init(start), length=steps)[0]
        )

    def relaxed(self, start: Array, theta: Array) -> tuple[Array, Array]:
        """Where FIRE comes to rest, and its steps."""
        init, step = self.fire(theta)

        def moving(carry: tuple[Any, Array]) -> Array:
            return (jnp.max(jnp.linalg.norm(FIRE.forces(carry[0]), axis=1)) > TOLERANCE) & (
                carry[1] < LIMIT
            )

        state, steps = lax.while_loop(
            moving, lambda c: (step(c[0]), c[1] + 1), (init(start), jnp.zeros((), int))
        )
        return FIRE.positions(state), steps

    def solution(self, steps: int | Array | None) -> Callable[[Array, Array], Array]:
        """R_k(start, theta), the minimum where k is None, with the implicit derivative there."""

        def solver(start: Array, theta: Array) -> Array:
            return (
                self.relaxed(start, theta)[0] if steps is None else self.after(steps, start, theta)
            )

        def off_translations(R: Array, theta: Array) -> Callable[[Array], Array]:
            return lambda v: v - jnp.mean(v, axis=0)

        return root(
            stationary(self.energy),
            solve=MINRES(rtol=1e-12),
            symmetric=True,
            null_space=off_translations,
        )(solver)


def sensitivity(
    solver: Callable[[Array, Array], Array],
) -> Callable[[Array, Array], tuple[Array, Array]]:
    """(R, dR/dtheta) of a solver by forward mode."""
    return lambda start, theta: jax.jvp(
        lambda t: solver(start, t), (theta,), (jnp.ones_like(theta),)
    )


@dataclasses.dataclass(frozen=True)
class Truth:
    """What the derivatives of one packing are held against.

    Attributes:
      value: (n, 2), dR/dtheta by ``ms.jvp`` at the minimum.
      rattlers: (n,) which discs nothing holds; their rows of ``value`` are zero.
      difference: how far finite differences of minimizing again are from it; None where they were
        not taken.
    """

    value: np.ndarray
    rattlers: np.ndarray
    difference: float | None

    @staticmethod
    def at(system: ms.System, R: Array, checked: bool) -> Truth:
        """Of the minimum R."""
        dparams = {"sigma": jnp.asarray([0.0, 1.0])}
        eq = ms.minimize(
            system.replace(positions=R).reallocate(), tolerance=TOLERANCE, progress=False
        )
        lin = ms.linearize(eq)
        rattlers = np.asarray(lin.network.rattlers)
        value = _held(ms.jvp(lin, dparams, throw=False).value, rattlers)
        found = _held(ms.verify.finite_difference(eq, dparams).value, rattlers) if checked else None
        return Truth(value, rattlers, None if found is None else _distance(found, value))

    def held(self, v: Any) -> np.ndarray:
        """v without translations and the rows of rattlers, which the minimum does not determine."""
        return _held(v, self.rattlers)

    def error(self, v: Any) -> float:
        return _distance(self.held(v), self.value)


def _held(v: Any, rattlers: np.ndarray) -> np.ndarray:
    v = np.array(v)
    return np.where(rattlers[:, None], 0.0, v - v[~rattlers].mean(axis=0))


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def reverse_rows(
    discs: Discs, start: Array, theta: Array, counts: Sequence[int], truth: Truth, runs: int
) -> list[Row]:
    """Reverse mode on one packing: of <w, R>, implicit and unrolled;
    errors are those of <w, dR/dtheta>.
    """
    w = truth.held(np.random.default_rng(0).normal(size=start.shape))
    wanted = float(np.sum(w * truth.value))
    rows: list[Row] = []
    for steps in counts:
        ways = {
            "implicit, reverse": discs.solution(steps),
            "unrolled, reverse": lambda R, t, k=steps: discs.scanned(k, R, t, again=False),
            "unrolled, reverse, steps made anew": lambda R, t, k=steps: discs.scanned(
                k, R, t, again=True
            ),
        }
        for by, solver in ways.items():
            slope = jax.grad(lambda t, R, s=solver: jnp.sum(w * s(R, t)))
            took = measured(slope, theta, start, runs=runs, most=MOST)
            row: Row = {"steps": steps, "by": by, "packings": 1}
            if took.answer is not None:
                row |= {"error": abs(float(took.answer) / wanted - 1.0), "seconds": took.seconds}
            rows.append(row | {"MB": took.MB})
    return rows


def forward_rows(
    systems: Sequence[ms.System], discs: Discs, counts: Sequence[int], checked: int, runs: int
) -> tuple[list[Row], list[Row], Truth]:
    """(table, packings, truth of the first): a row a number of steps and way over all packings;
    each packing alone.

    Args:
      checked: packings, from the first, whose truth is held against finite differences.
    """
    theta, start = systems[0].params["sigma"][1], systems[0].positions
    found = jax.jit(discs.relaxed)
    at_rest = measured(sensitivity(discs.solution(None)), start, theta, runs=runs)

    def implicit(start: Array, theta: Array, k: Array) -> tuple[Array, Array]:
        return sensitivity(discs.solution(k))(start, theta)

    def unrolled(start: Array, theta: Array, k: Array) -> tuple[Array, Array]:
        return sensitivity(lambda R, t: discs.after(k, R, t))(start, theta)

    ways = {
        by: measured(way, start, theta, 1, runs=0)
        for by, way in (("implicit", implicit), ("unrolled", unrolled))
    }
    force = jax.jit(jax.grad(discs.energy))
    packings, truths = [], []
    for seed, system in enumerate(systems):
        R, steps = found(system.positions, theta)
        truth = Truth.at(system, R, checked=seed < checked)
        norm, rattlers = float(np.sum(np.abs(truth.value))), int(truth.rattlers.sum())
        row: Row = {"seed": seed, "steps": int(steps), "rattlers": rattlers, "norm": norm}
        row |= {
            "difference": truth.difference,
            "at_rest": truth.error(at_rest.run(system.positions, theta)[1]),
        }
        row |= {
            "implicit": [],
            "unrolled": [],
            "implicit_norm": [],
            "unrolled_norm": [],
            "max_force": [],
        }
        for k in counts:
            for by, way in ways.items():
                here, value = way.run(system.positions, theta, k)
                row[by].append(truth.error(value))
                row[f"{by}_norm"].append(float(np.sum(np.abs(truth.held(value)))))
            row["max_force"].append(float(jnp.max(jnp.linalg.norm(force(here, theta), axis=1))))
        packings.append(row)
        truths.append(truth)
    rows = []
    for by, way in ways.items():
        for i, k in enumerate(counts):
            took = timed(lambda w=way, k=k: w.run(start, theta, k), runs)
            ratios = [p[f"{by}_norm"][i] / p["norm"] for p in packings]
            row = {
                "steps": k,
                "by": f"{by}, forward",
                **_errors([p[by][i] for p in packings], ratios),
            }
            rows.append(row | {"seconds": took["seconds"], "MB": way.MB})
    steps, errors = [p["steps"] for p in packings], [p["at_rest"] for p in packings]
    last: Row = {"steps": f"{min(steps)} to {max(steps)}", "by": "implicit at rest, forward"}
    last |= _errors(errors, [1.0] * len(packings)) | {"seconds": at_rest.seconds, "MB": at_rest.MB}
    return [*rows, last], packings, truths[0]


def _errors(errors: Sequence[float], ratios: Sequence[float]) -> Row:
    row: Row = {"packings": len(errors), "right": sum(error < RIGHT for error in errors)}
    return row | {
        "error": float(np.median(errors)),
        "worst": max(errors),
        "norm_ratio": float(np.median(ratios)),
    }


def figure(record: Row) -> Figure:
    """Error, size and memory against the number of steps."""
    counts, packings, rows = record["counts"], record["packings"], record["rows"]
    made = Figure(figsize=(11.0, 4.0), layout="constrained")
    left, middle, right = made.subplots(1, 3)
    for key, label, color in (
        ("implicit", "implicit, at k", IMPLICIT),
        ("unrolled", "unrolled", UNROLLED),
    ):
        errors = np.array([p[key] for p in packings])
        ratios = np.array([np.array(p[f"{key}_norm"]) / p["norm"] for p in packings])
        for ax, values in ((left, errors), (middle, ratios)):
            ax.loglog(counts, np.clip(values.T, 1e-13, None), color=color, lw=0.5, alpha=0.35)
            ax.loglog(
                counts,
                np.median(values, axis=0),
                "o-",
                color=color,
                ms=4,
                lw=1.6,
                label=f"{label}, median",
            )
    left.set_ylabel("relative error of dR/dθ")
    left.axhline(1.0, color="black", lw=0.7, ls=":")
    left.legend(fontsize=8)
    middle.axhline(1.0, color="black", lw=0.7, ls=":")
    middle.set_ylabel("L1 norm of dR/dθ over that of the truth")
    curves = {
        "implicit, forward": IMPLICIT,
        "unrolled, forward": UNROLLED,
        "unrolled, reverse": FOURTH,
        "unrolled, reverse, steps made anew": THIRD,
    }
    for by, color in curves.items():
        some = [row for row in rows if row["by"] == by and row.get("MB") is not None]
        right.loglog(
            [row["steps"] for row in some],
            [row["MB"] for row in some],
            "o-",
            ms=4,
            lw=1,
            color=color,
            label=by,
        )
    right.set_ylabel("temporaries, MB")
    right.legend(fontsize=8)
    for ax in (left, middle, right):
        ax.set_xlabel("steps of FIRE, k")
        ax.grid(alpha=0.3)
    return made


def main(argv: Sequence[str] | None = None) -> Row:
    """Every packing by every way: the table, the packings, the figure."""
    wanted = asked("dynamics", __doc__, argv)
    counts, reversed_, seeds = ((100, 1000), (), 1) if wanted.smoke else (STEPS, REVERSED, 10)
    size = {"count": 24} if wanted.smoke else {}
    systems = [ms.load_system("seed_packing_2d", seed=seed, **size) for seed in range(seeds)]
    discs = Discs(np.asarray(systems[0].species) == 1)
    theta = systems[0].params["sigma"][1]
    rows, packings, truth = forward_rows(
        systems, discs, counts, 0 if wanted.smoke else CHECKED, wanted.runs
    )
    rows += reverse_rows(discs, systems[0].positions, theta, reversed_, truth, wanted.runs)
    more = {"counts": list(counts), "packings": packings, "length": float(length_of(systems[0]))}
    return finish("dynamics", wanted, rows, more, figure)


if __name__ == "__main__":
    main()
