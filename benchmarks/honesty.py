"""How often does a solve that failed say so?
Packings towards unjamming, limits too small, forces with a null part.

``python -m benchmarks.honesty --sizes 256 --seeds 2 --limits 50 500 5000``

Each solver gets the same systems H x = b. Right is an error of 1e-6 or less against the factor,
after rows of rattlers and the mean motion were taken off: what a peer puts into the null space is
not held against it. A row counts the answers that are right; right but refused; wrong, and said so
(not finite counts as said); wrong without a word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mdsens as ms
from benchmarks import _peers
from benchmarks._common import arguments, discs, report
from benchmarks.jamming import at_pressure
from mdsens.implicit import CG, GMRES, MINRES, Auto, BiCGSTAB

RIGHT, RTOL = 1e-6, 1e-10


def sides(eq: ms.Equilibrium, held: np.ndarray, draws: int) -> Iterator[tuple[str, Any]]:
    """(name, right-hand side): a change of the parameters, else a force on the particles."""
    rng = np.random.default_rng(0)
    for _ in range(draws):
        force = rng.standard_normal(eq.positions.shape)
        free = held * (force - np.sum(held * force, axis=0) / held.sum())
        yield "growth", {"sigma": jnp.asarray(rng.standard_normal(2))}
        yield "force", free
        yield "force, net and on rattlers", force + 10.0
        yield "force in single precision", free.astype(np.float32).astype(float)


def ours(limits: list[int]) -> list[tuple[str, Any]]:
    """(name, option record), at each limit."""
    found: list[tuple[str, Any]] = [("mdsens Auto", Auto(rtol=RTOL))]
    for kind in (CG, MINRES, BiCGSTAB, GMRES):
        found += [
            (f"mdsens {kind.__name__}", kind(rtol=RTOL, max_iterations=limit)) for limit in limits
        ]
    return found


def answers(
    eq: ms.Equilibrium, draws: int, limits: list[int], peers: dict[str, list[Any]]
) -> Iterator[tuple[Any, ...]]:
    """(right-hand side, by, x, truth, whether it was called good, in what word)
    for every solver on one packing.
    """
    lin = ms.linearize(eq)
    held = ~np.asarray(lin.network.rattlers)[:, None]

    def judged(x: Any) -> np.ndarray:
        x = np.where(held & np.isfinite(x), x, 0.0)
        return x - held * x.sum(axis=0) / held.sum()

    energy, sigma = _peers.energy_of(eq.system), eq.params["sigma"]
    slope = jax.grad(energy)
    hessian = jax.jit(jax.hessian(energy))(eq.positions, sigma)
    for name, given in sides(eq, held, draws):
        door = ms.jvp if isinstance(given, dict) else ms.response
        truth = judged(door(lin, given, solve=Auto(rtol=1e-13), throw=False).value)
        for by, solve in ours(limits):
            found = door(lin, given, solve=solve, throw=False)
            yield name, by, judged(found.value), truth, found.status.good, found.status.name
        if isinstance(given, dict):
            given = -jax.jvp(lambda s: slope(eq.positions, s), (sigma,), (given["sigma"],))[1]
        for by, runs in peers.items():
            for run in runs:
                x, said = run(hessian, jnp.asarray(given))
                word = "no status" if said is None else "success" if said else "failure"
                yield (
                    name,
                    by,
                    judged(x),
                    truth,
                    (said is None or bool(said)) and bool(jnp.isfinite(x).all()),
                    word,
                )


def compiled(solver: _peers.Solver) -> Any:
    """A peer as a function of the Hessian, (n, d, n, d), and the right-hand side."""
    return jax.jit(lambda hessian, b: solver(lambda v: jnp.tensordot(hessian, v, 2), b))


def main() -> None:
    """Each solver on each right-hand side: counts over packings, seeds and limits."""
    asked = arguments(
        __doc__ or "",
        [256],
        seeds=1,
        pressures=[1e-1, 1e-3, 1e-5, 1e-6],
        draws=2,
        limits=[300, 5000],
        peers=1,
    )
    peers: dict[str, list[Any]] = {}
    for limit in asked.limits if asked.peers else []:
        for name, solver in _peers.solvers(RTOL, limit).items():
            peers.setdefault(name, []).append(compiled(solver))
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    words: dict[tuple[str, str], Counter[str]] = {}
    for n in asked.sizes:
        for seed in range(asked.seeds):
            system = discs(n, 0.95, seed)
            for pressure in asked.pressures:
                eq = at_pressure(system, pressure)
                system = eq.system
                for side, by, x, truth, good, word in answers(eq, asked.draws, asked.limits, peers):
                    error = float(np.linalg.norm(x - truth) / np.linalg.norm(truth))
                    right = error <= RIGHT
                    empty = {
                        "answers": 0,
                        "right": 0,
                        "right_refused": 0,
                        "wrong_said": 0,
                        "wrong_unsaid": 0,
                    }
                    row = rows.setdefault(
                        (by, side), {"by": by, "side": side, **empty, "error": 0.0}
                    )
                    kind = (
                        ("right" if good else "right_refused")
                        if right
                        else "wrong_unsaid"
                        if good
                        else "wrong_said"
                    )
                    row["answers"], row[kind] = row["answers"] + 1, row[kind] + 1
                    row["error"] = max(row["error"], error) if good else row["error"]
                    words.setdefault((by, side), Counter())[word] += 1
                print(f"n={n} seed={seed} pressure={pressure:.0e} done", flush=True)
    for key, row in rows.items():
        row["said"] = ", ".join(f"{count} {word}" for word, count in words[key].most_common())
    report("honesty", [rows[key] for key in sorted(rows)], asked.json)


if __name__ == "__main__":
    main()
