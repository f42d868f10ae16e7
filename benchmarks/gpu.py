"""What does the device give: bandwidth of a Hessian product, solves a second, packings at once,
in float32 and float64?

``python -m benchmarks.gpu --sizes 1024 16384 131072 1000000 --members 1000``:
on whatever device jax has, a CPU too.

The bytes of a product are those that must move once: rows of neighbors, positions or blocks, the
vector, the output; beside them stands the device's own bandwidth, x + 1 on a large array in the
same run. Errors are relative to float64: of products to the assembled matrix, of solves to a solve
at 1e-13, of the batch to some members done one by one.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mdsens as ms
from benchmarks._common import arguments, discs, record_of, report, timed, write
from mdsens.implicit import CG, Auto
from mdsens.mechanics.hessian import hessian_operator
from mdsens.mechanics.units import round_off
from mdsens.mechanics.unknowns import Unknowns
from mdsens.relaxation.methods import Fire
from mdsens.relaxation.traced import relax

REPEATS = 20  # in one call, so that starting it does not count
RTOL = {"float32": 1e-5, "float64": 1e-10}
TANGENT = {"sigma": [0.0, 1.0]}


def repeated(step: Callable[..., jax.Array], runs: int, v: jax.Array, *given: Any) -> float:
    """Seconds of one step of v -> step(v, *given)."""

    @jax.jit
    def run(v: jax.Array, *given: Any) -> jax.Array:
        return jax.lax.fori_loop(0, REPEATS, lambda _, v: step(v, *given), v)

    return timed(lambda: run(v, *given), runs)["seconds"] / REPEATS


def in_precision(system: ms.System, dtype: str) -> ms.System:
    """The same particles in another precision."""
    positions, box = (np.asarray(x, dtype) for x in (system.positions, system.box))
    return ms.System.create(positions, box, system.potential, system.params, system.species)


def tolerance_of(system: ms.System) -> float:
    """1e-12, or what round-off of the positions leaves."""
    return max(1e-12, float(round_off(system)))


def difference(value: Any, truth: Any) -> float:
    return float(np.linalg.norm(np.asarray(value, float) - truth) / np.linalg.norm(truth))


def copying(dtype: str, megabytes: int, runs: int) -> dict[str, Any]:
    """The device's bandwidth."""
    x = jnp.zeros(megabytes * 2**20 // np.dtype(dtype).itemsize, dtype)
    seconds = repeated(lambda x: x + 1, runs, x)
    return {
        "what": "copy, x + 1",
        "n": x.size,
        "dtype": dtype,
        "seconds": seconds,
        "GB/s": 2e-9 * x.nbytes / seconds,
    }


def products(lin: ms.Linearization, exact: ms.Linearization, runs: int) -> list[dict[str, Any]]:
    """Products with the Hessian, from the positions and from its blocks, of ``lin``'s precision."""
    assert exact.factor is not None
    system = lin.system
    v = jnp.asarray(
        np.random.default_rng(0).standard_normal(system.positions.shape), system.positions.dtype
    )
    truth = (exact.factor.matrix @ np.asarray(v, float).ravel()).reshape(v.shape)
    blocks = exact.factor.blocks
    blocks = jax.tree.map(
        lambda x: x.astype(v.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, blocks
    )

    def product(v: jax.Array, lin: ms.Linearization, blocks: Any) -> jax.Array:
        return hessian_operator(lin.system, lin.null, blocks).matvec(Unknowns(v)).positions

    rows = []
    for what, given, read in (
        ("product, matrix-free", None, (system.neighbors.rows, system.positions)),
        ("product, blocks", blocks, blocks),
    ):
        core = lin.traced(())
        # divided by the largest stiffness or so, to stay finite
        seconds = repeated(lambda v, *at: product(v, *at) / 16, runs, v, core, given)
        moved = 2 * v.nbytes + sum(leaf.nbytes for leaf in jax.tree.leaves(read))
        row = {
            "what": what,
            "n": system.n,
            "dtype": str(v.dtype),
            "seconds": seconds,
            "GB/s": 1e-9 * moved / seconds,
        }
        rows.append(row | {"error": difference(product(v, core, given), truth)})
    return rows


def relaxing(start: ms.System, steps: int) -> tuple[ms.Equilibrium, dict[str, Any]]:
    """A minimum, and what it took; compilation included."""
    eq = ms.minimize(
        start, tolerance=tolerance_of(start), max_steps=steps, throw=False, progress=False
    )
    row = {"what": "minimize, with compiling", "n": start.n, "dtype": str(start.positions.dtype)}
    row |= {
        "seconds": float(eq.wall_time),
        "max_force": float(eq.max_force),
        "status": ms.Status(int(eq.status)).name,
    }
    return eq, row


def solving(lin: ms.Linearization, truth: np.ndarray, runs: int) -> dict[str, Any]:
    """One jvp by iteration, the linearization given."""
    dtype = str(lin.system.positions.dtype)
    found = timed(
        lambda: ms.jvp(lin, TANGENT, solve=CG(rtol=RTOL[dtype], degree=20), throw=False), runs
    )
    answer, seconds = found["answer"], found["seconds"]
    row = {
        "what": "jvp, CG(degree=20)",
        "n": lin.system.n,
        "dtype": dtype,
        "seconds": seconds,
        "a second": 1 / seconds,
    }
    row |= {"products": int(answer.stats.iterations), "error": difference(answer.value, truth)}
    return row | {"status": answer.status.name}


def batch(members: int, n: int, dtype: str, runs: int, steps: int) -> Iterator[dict[str, Any]]:
    """Many small packings, relaxed from random starts and differentiated in one call each."""
    starts = [in_precision(discs(n, 0.95, seed), dtype) for seed in range(members)]
    tolerance, whole = max(tolerance_of(s) for s in starts[:8]), ms.stack(starts)
    relaxed = jax.jit(jax.vmap(lambda s: relax(s, tolerance, steps, Fire())))
    found = timed(lambda: relaxed(whole), runs)
    eq, seconds = found["answer"], found["seconds"]
    codes = Counter(ms.Status(code).name for code in np.asarray(eq.status).tolist())
    row = {"what": f"{members} relaxed at once", "n": n, "dtype": dtype, "seconds": seconds}
    row |= {"a second": members / seconds, "max_force": float(jnp.max(eq.max_force))}
    yield row | {"status": ", ".join(f"{count} {name}" for name, count in codes.most_common())}

    solve = CG(rtol=RTOL[dtype])

    def moved(system: ms.System, change: jax.Array) -> tuple[jax.Array, jax.Array]:
        def positions(sigma: jax.Array) -> tuple[jax.Array, jax.Array]:
            now, stats = ms.equilibrate(
                system, {"sigma": sigma}, tolerance=tolerance, solve=solve, has_aux=True
            )
            return now.positions, stats.status

        _, motion, status = jax.jvp(positions, (system.params["sigma"],), (change,), has_aux=True)
        return motion, status

    good = [k for k, code in enumerate(np.asarray(eq.status).tolist()) if ms.Status(code).good]
    change = jnp.asarray(TANGENT["sigma"], dtype)
    derivative = jax.jit(jax.vmap(moved, in_axes=(0, None)))
    found = timed(lambda: derivative(eq.system, change), runs)
    motions, seconds = found["answer"][0], found["seconds"]
    errors = []
    for k in good[:4]:
        one = ms.minimize(in_precision(ms.unstack(eq)[k].system, "float64"), progress=False)
        errors.append(difference(motions[k], ms.jvp(one, TANGENT, throw=False).value))
    row = {"what": f"{members} differentiated at once", "n": n, "dtype": dtype, "seconds": seconds}
    row |= {"a second": members / seconds, "error": max(errors) if errors else None}
    yield row | {"status": f"{len(good)} of {members} good"}


def size(n: int, runs: int, steps: int) -> Iterator[dict[str, Any]]:
    """One packing of n discs: its relaxation, then products and a derivative in each precision."""
    eq, row = relaxing(discs(n, 0.95), steps)
    yield row
    exact = ms.linearize(eq, throw=False)
    truth = np.asarray(ms.jvp(exact, TANGENT, solve=Auto(rtol=1e-13), throw=False).value)
    for dtype in RTOL:
        lin = exact
        if dtype == "float32":  # from the same minimum: from the same start it might find another
            low, row = relaxing(in_precision(eq.system, dtype), steps)
            lin = ms.linearize(low, throw=False)
            yield row
        yield from products(lin, exact, runs)
        yield solving(lin, truth, runs)


def measured(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Copies, then each size in each precision, then the batch."""
    for dtype in RTOL:
        yield copying(dtype, asked.megabytes, asked.runs)
    for n in asked.sizes:
        yield from size(n, asked.runs, asked.steps)
    for dtype in RTOL if asked.members else ():
        yield from batch(asked.members, asked.small, dtype, asked.runs, asked.steps)


def main() -> None:
    """The record is written anew with each row:
    hours of a large size must not take the small ones with them.
    """
    asked = arguments(
        __doc__ or "", [1024, 4096], members=100, small=64, megabytes=128, steps=200_000
    )
    rows: list[dict[str, Any]] = []
    copied: dict[str, float] = {}
    for row in measured(asked):
        if "GB/s" in row:
            row["of copy"] = row["GB/s"] / copied.setdefault(row["dtype"], row["GB/s"])
        rows.append(row)
        print(row, flush=True)
        if asked.json is not None:
            write(record_of("gpu", rows), asked.json)
    report("gpu", rows, asked.json)


if __name__ == "__main__":
    main()
