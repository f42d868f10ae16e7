"""How long does relaxing take, from a random start to a largest force of 1e-12,
beside jax-md's FIRE and LAMMPS?

``python -m benchmarks.relaxation --sizes 1024 16384 --fractions 0.95 0.86 --seeds 9``
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mdsens as ms
from benchmarks import _lammps
from benchmarks._common import arguments, discs, length_of, report, timed

TOLERANCE = 1e-12
ENOUGH = 60.0  # seconds, after which a minimizer gets no further seed


def by_jax_md(system: ms.System, runs: int, max_steps: int = 60_000) -> dict[str, Any]:
    """jax-md's FIRE, its list updated in each step and allocated anew where it overflows;
    the first run compiles.
    """
    from jax_md import energy, minimize, partition, space

    length = length_of(system)
    displacement, shift = space.periodic(length)
    sigma = np.asarray(system.params["sigma"])
    matrix = jnp.asarray(0.5 * (sigma[:, None] + sigma[None]))
    list_of, energy_fn = energy.soft_sphere_neighbor_list(
        displacement,
        length,
        species=system.species,
        sigma=matrix,
        epsilon=jnp.asarray(1.0),
        alpha=jnp.asarray(2.0),
        dr_threshold=0.3,
        format=partition.OrderedSparse,
    )
    descent: Any = minimize.fire_descent(energy_fn, shift)
    init, apply = descent
    start = jnp.mod(system.positions, length)

    @jax.jit
    def advance(state: Any, pairs: Any, budget: Any) -> Any:
        def going(carry: Any) -> jax.Array:
            state, pairs, k = carry
            largest = jnp.max(jnp.sum(state.force**2, axis=1))
            return (k < budget) & (largest > TOLERANCE**2) & (pairs.did_buffer_overflow == 0)

        def step(carry: Any) -> Any:
            state, pairs, k = carry
            state = apply(state, neighbor=pairs)
            return state, pairs.update(state.position), k + 1

        return jax.lax.while_loop(going, step, (state, pairs, 0))

    times, steps, largest, pairs = [], 0, np.inf, None
    for _ in range(1 + runs):
        # the extra is for each cell and particle; an allocation compiles all anew,
        # so the second run takes the first's
        pairs = list_of.allocate(start, extra_capacity=4) if pairs is None else pairs.update(start)
        state = init(start, neighbor=pairs)
        # it keeps step sizes in float16 where they fit, which a loop cannot carry
        state = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64) if jnp.result_type(x) == jnp.float16 else x, state
        )
        began, steps = time.perf_counter(), 0
        while steps < max_steps:
            state, pairs, k = advance(state, pairs, max_steps - steps)
            steps += int(k)
            if not pairs.did_buffer_overflow:
                break
            pairs = list_of.allocate(state.position, extra_capacity=4)
        times.append(time.perf_counter() - began)
        largest = float(jnp.sqrt(jnp.max(jnp.sum(state.force**2, axis=1))))
    return {
        "seconds": float(np.median(times[1:])),
        "first": times[0],
        "max_force": largest,
        "steps": steps,
    }


def by_mdsens(system: ms.System, runs: int, method: Any) -> dict[str, Any]:
    """Ours; the first run compiles."""
    found = timed(
        lambda: ms.minimize(
            system, tolerance=TOLERANCE, method=method, throw=False, progress=False
        ),
        runs,
    )
    eq = found.pop("answer")
    status = ms.Status(int(eq.status)).name
    return {**found, "max_force": float(eq.max_force), "steps": int(eq.steps), "status": status}


def by_lammps(system: ms.System, runs: int, style: str) -> dict[str, Any]:
    """LAMMPS, whose time is that of its minimize command alone."""
    found = [_lammps.relax(system, style, TOLERANCE) for _ in range(runs)]
    return sorted(found, key=lambda run: run["seconds"])[runs // 2]


def _of_seeds(name: str, way: Any, starts: list[ms.System], runs: int) -> list[dict[str, Any]]:
    """One result a start, the median of some runs; of large systems one run,
    and no more starts where it takes long.
    """
    small = starts[0].n <= 4096
    if name == "LAMMPS fire" and not small:
        return []  # minutes, where its cg takes seconds
    found, began = [], time.perf_counter()
    for start in starts:
        if small or time.perf_counter() - began < ENOUGH:
            found.append(way(start, runs if small else 1))
    return found


def main() -> None:
    """Each size, fraction and seed by every minimizer; medians over seeds,
    and of ratios to ours on the same seeds.
    """
    asked = arguments(__doc__ or "", [1024, 16384], fractions=[0.95, 0.86], seeds=9, peers=1)
    ways: dict[str, Any] = {
        "mdsens Newton()": lambda s, runs: by_mdsens(s, runs, ms.relaxation.Newton()),
        "mdsens Fire()": lambda s, runs: by_mdsens(s, runs, ms.relaxation.Fire()),
    }
    if asked.peers:
        ways["jax-md FIRE"] = by_jax_md
        if _lammps.available():
            ways["LAMMPS cg"] = lambda s, runs: by_lammps(s, runs, "cg")
            ways["LAMMPS fire"] = lambda s, runs: by_lammps(s, runs, "fire")
    rows = []
    for n in asked.sizes:
        for fraction in asked.fractions:
            ours: list[float] = []
            starts = [discs(n, fraction, seed) for seed in range(asked.seeds)]
            for name, way in ways.items():
                runs = _of_seeds(name, way, starts, asked.runs)
                if not runs:
                    continue
                seconds = [f["seconds"] for f in runs]
                ours = ours or seconds
                good = sum(f["max_force"] <= TOLERANCE for f in runs)
                row = {
                    "n": n,
                    "fraction": fraction,
                    "by": name,
                    "seconds": float(np.median(seconds)),
                }
                row |= {"least": min(seconds), "most": max(seconds)}
                row |= {
                    "times ours": float(
                        np.median([s / o for s, o in zip(seconds, ours, strict=False)])
                    )
                }
                row |= {
                    "reached": f"{good} of {len(runs)}",
                    "max_force": max(f["max_force"] for f in runs),
                }
                row |= (
                    {"steps": int(np.median([f["steps"] for f in runs]))}
                    if "steps" in runs[0]
                    else {}
                )
                row |= (
                    {"status": ", ".join(sorted({f["status"] for f in runs}))}
                    if "status" in runs[0]
                    else {}
                )
                rows.append(row)
                print(row, flush=True)
    report("relaxation", rows, asked.json)


if __name__ == "__main__":
    main()
