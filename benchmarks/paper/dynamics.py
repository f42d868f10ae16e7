"""How far is a packing's sensitivity to a diameter from the truth, after so many steps? The paper's molecular dynamics.

``python -m benchmarks.paper.dynamics``

128 harmonic discs, half of diameter 1, half of diameter theta = 0.6, in a periodic cell that keeps the packing fraction
at 0.98 whatever theta is, from random places (``ms.load_system("seed_packing_2d", seed=k)``), relaxed by jax-md's FIRE.

    implicit at k   H(R_k) dR = - d2U/dR dtheta, translations projected off, at where FIRE stands after k steps
    unrolled        forward: a tangent through the k steps; reverse: of <w, R_k>, every step kept, or made anew

Truth is ``ms.jvp`` at the minimum that the same run of FIRE reaches at a largest force of 1e-12, itself held against
finite differences of minimising again. An error is that of the whole vector, relative; sizes are L1 norms, as in the
paper. Particles are not wrapped into the cell, so that all derivatives are of the same images.
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
from benchmarks._common import length_of
from benchmarks.paper._common import (
    FOURTH,
    IMPLICIT,
    THIRD,
    UNROLLED,
    Measured,
    Row,
    asked,
    finish,
    measured,
    relative,
    temporaries,
)
from mdsens.implicit import Direct, root
from mdsens.implicit.optimality import stationary

STEPS = (50, 100, 200, 300, 500, 700, 1000, 1500, 2000)
REVERSED = (100, 300, 1000)  # numbers of steps for reverse mode, a compilation each
TOLERANCE, LIMIT = 1e-12, 50_000
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
        overlap = jnp.where(itself, 0.0, jnp.maximum(1.0 - 2.0 * distance / (sigma[:, None] + sigma), 0.0))
        return 0.25 * jnp.sum(overlap**2)

    def fire(self, theta: Array) -> tuple[Callable[[Array], Any], Callable[[Any], Any]]:
        """jax-md's FIRE at its own settings, (init, step)."""
        force = jax.grad(lambda R: -self.energy(R, theta))
        return ms.relaxation.Fire().minimizer(lambda R, **_: force(R), lambda R, dR, **_: R + dR, jnp.asarray(10.0))

    def after(self, steps: int | Array, start: Array, theta: Array) -> Array:
        """R_k; k may be traced, for forward mode alone."""
        init, step = self.fire(theta)
        return lax.fori_loop(0, steps, lambda _, state: step(state), init(start)).position

    def scanned(self, steps: int, start: Array, theta: Array, again: bool) -> Array:
        """R_k for reverse mode: all of each step kept, or its state alone and the rest made again."""
        init, step = self.fire(theta)
        one = jax.checkpoint(step) if again else step
        return lax.scan(lambda state, _: (one(state), None), init(start), length=steps)[0].position

    def relaxed(self, start: Array, theta: Array) -> tuple[Array, Array]:
        """Where FIRE comes to rest, and its steps."""
        init, step = self.fire(theta)

        def moving(carry: tuple[Any, Array]) -> Array:
            return (jnp.max(jnp.linalg.norm(carry[0].force, axis=1)) > TOLERANCE) & (carry[1] < LIMIT)

        state, steps = lax.while_loop(moving, lambda c: (step(c[0]), c[1] + 1), (init(start), jnp.zeros((), int)))
        return state.position, steps

    def solution(self, steps: int | Array | None) -> Callable[[Array, Array], Array]:
        """R_k(start, theta), the minimum where k is None, with the implicit derivative there."""

        def solver(start: Array, theta: Array) -> Array:
            return self.relaxed(start, theta)[0] if steps is None else self.after(steps, start, theta)

        def off_translations(R: Array, theta: Array) -> Callable[[Array], Array]:
            return lambda v: v - jnp.mean(v, axis=0)

        return root(stationary(self.energy), solve=Direct(), symmetric=True, null_space=off_translations)(solver)


def sensitivity(solver: Callable[[Array, Array], Array]) -> Callable[[Array, Array], tuple[Array, Array]]:
    """(R, dR/dtheta) of a solver by forward mode."""
    return lambda start, theta: jax.jvp(lambda t: solver(start, t), (theta,), (jnp.ones_like(theta),))


def truth_of(system: ms.System, R: Array) -> tuple[Array, float, int]:
    """dR/dtheta at the minimum R, how far finite differences are from it, and the number of rattlers."""
    eq = ms.minimize(system.replace(positions=R).reallocate(), tolerance=TOLERANCE, progress=False)
    response = ms.jvp(eq, {"sigma": jnp.asarray([0.0, 1.0])}, throw=False)
    by_difference = ms.verify.finite_difference(eq, {"sigma": jnp.asarray([0.0, 1.0])}).value
    rattlers = int(np.sum(np.asarray(ms.linearize(eq).network.rattlers)))
    return response.value, relative(by_difference, response.value), rattlers


def reverse_rows(discs: Discs, start: Array, theta: Array, counts: Sequence[int], truth: Array, runs: int) -> list[Row]:
    """Reverse mode on one packing: of <w, R>, implicit and unrolled; errors are those of <w, dR/dtheta>."""
    w = jax.random.normal(jax.random.key(0), start.shape)
    wanted = jnp.sum(w * truth)
    rows: list[Row] = []
    for steps in counts:
        ways = {
            "implicit at k, reverse": discs.solution(steps),
            "unrolled, reverse": lambda R, t, k=steps: discs.scanned(k, R, t, again=False),
            "unrolled, reverse, steps made anew": lambda R, t, k=steps: discs.scanned(k, R, t, again=True),
        }
        for by, solver in ways.items():
            slope = jax.grad(lambda t, R, s=solver: jnp.sum(w * s(R, t)))
            row: Row = {"steps": steps, "by": by, "seeds": 1}
            size = temporaries(jax.jit(slope).lower(theta, start).compile())
            if size is not None and size > MOST:
                rows.append({**row, "MB": size})
                continue
            took = measured(slope, theta, start, runs=runs)
            rows.append({**row, "error": relative(took.answer, wanted), "seconds": took.seconds, "MB": took.MB})
    return rows


def forward_rows(
    systems: Sequence[ms.System], discs: Discs, counts: Sequence[int], runs: int
) -> tuple[list[Row], list[Row]]:
    """(table, packings): a row a number of steps and way over all packings; and each packing alone."""
    theta = systems[0].params["sigma"][1]
    start = systems[0].positions
    found = measured(discs.relaxed, start, theta, runs=0).run
    at_rest = measured(sensitivity(discs.solution(None)), start, theta, runs=runs)
    implicit = jax.jit(lambda k, R, t: sensitivity(discs.solution(k))(R, t))
    unrolled = jax.jit(lambda k, R, t: sensitivity(lambda R, t: discs.after(k, R, t))(R, t))
    force = jax.jit(jax.grad(discs.energy))
    packings: list[Row] = []
    for seed, system in enumerate(systems):
        R, steps = found(system.positions, theta)
        truth, difference, rattlers = truth_of(system, R)
        row: Row = {"seed": seed, "steps": int(steps), "rattlers": rattlers, "norm": float(jnp.sum(jnp.abs(truth)))}
        row |= {"difference": difference, "at_rest": relative(at_rest.run(system.positions, theta)[1], truth)}
        row |= {"implicit": [], "unrolled": [], "implicit_norm": [], "unrolled_norm": [], "max_force": []}
        for k in counts:
            for by, way in (("implicit", implicit), ("unrolled", unrolled)):
                here, value = way(k, system.positions, theta)
                row[by].append(relative(value, truth))
                row[f"{by}_norm"].append(float(jnp.sum(jnp.abs(value))))
            row["max_force"].append(float(jnp.max(jnp.linalg.norm(force(here, theta), axis=1))))
        packings.append(row)
    rows = [_summary("implicit at k", k, i, "implicit", packings) for i, k in enumerate(counts)]
    rows += [_summary("unrolled, forward", k, i, "unrolled", packings) for i, k in enumerate(counts)]
    for row in rows:
        solver = discs.solution(row["steps"]) if row["by"].startswith("implicit") else None
        took = _cost(solver or (lambda R, t, k=row["steps"]: discs.after(k, R, t)), start, theta, runs)
        row |= {"seconds": took.seconds, "MB": took.MB}
    steps, errors = [p["steps"] for p in packings], [p["at_rest"] for p in packings]
    last: Row = {"steps": f"{min(steps)} to {max(steps)}", "by": "implicit at rest", "seeds": len(packings)}
    last |= _errors(errors, [1.0] * len(packings))
    return [*rows, last | {"seconds": at_rest.seconds, "MB": at_rest.MB}], packings


def _cost(solver: Callable[[Array, Array], Array], start: Array, theta: Array, runs: int) -> Measured:
    return measured(sensitivity(solver), start, theta, runs=runs)


def _summary(by: str, steps: int, i: int, key: str, packings: Sequence[Row]) -> Row:
    """One way after one number of steps, over all packings."""
    ratios = [p[f"{key}_norm"][i] / p["norm"] for p in packings]
    return {"steps": steps, "by": by, "seeds": len(packings)} | _errors([p[key][i] for p in packings], ratios)


def _errors(errors: Sequence[float], ratios: Sequence[float]) -> Row:
    right = sum(error < RIGHT for error in errors)
    return {
        "error": float(np.median(errors)),
        "worst": max(errors),
        "right": right,
        "norm_ratio": float(np.median(ratios)),
    }


def figure(record: Row) -> Figure:
    """Error, size and memory against the number of steps."""
    counts, packings, rows = record["counts"], record["packings"], record["rows"]
    made = Figure(figsize=(11.0, 4.0), layout="constrained")
    left, middle, right = made.subplots(1, 3)
    for key, label, colour in (("implicit", "implicit, at k", IMPLICIT), ("unrolled", "unrolled", UNROLLED)):
        errors = np.array([p[key] for p in packings])
        ratios = np.array([np.array(p[f"{key}_norm"]) / p["norm"] for p in packings])
        for ax, values in ((left, errors), (middle, ratios)):
            ax.loglog(counts, np.clip(values.T, 1e-13, None), color=colour, lw=0.5, alpha=0.35)
            ax.loglog(counts, np.median(values, axis=0), "o-", color=colour, ms=4, lw=1.6, label=f"{label}, median")
    left.set_ylabel("relative error of dR/dθ")
    left.axhline(1.0, color="black", lw=0.7, ls=":")
    left.legend(fontsize=8)
    middle.axhline(1.0, color="black", lw=0.7, ls=":")
    middle.set_ylabel("L1 norm of dR/dθ over that of the truth")
    curves = {
        "implicit at k": IMPLICIT, "unrolled, forward": UNROLLED, "unrolled, reverse": FOURTH,
        "unrolled, reverse, steps made anew": THIRD,
    }  # fmt: skip
    for by, colour in curves.items():
        some = [row for row in rows if row["by"] == by and row.get("MB") is not None]
        right.loglog(
            [row["steps"] for row in some], [row["MB"] for row in some], "o-", ms=4, lw=1, color=colour, label=by
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
    rows, packings = forward_rows(systems, discs, counts, wanted.runs)
    R = discs.relaxed(systems[0].positions, theta)[0]
    rows += reverse_rows(discs, systems[0].positions, theta, reversed_, truth_of(systems[0], R)[0], wanted.runs)
    more = {"counts": list(counts), "packings": packings, "length": float(length_of(systems[0]))}
    return finish("dynamics", wanted, rows, more, figure)


if __name__ == "__main__":
    main()
