"""How long does one product with the Hessian take, beside scipy's with the same matrix?

``python -m benchmarks.product --sizes 1024 16384``: ours is compiled, without a host callback, from the blocks of the
pairs; matrix-free is jax's linearisation of the force, which needs no blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mdsens as ms
from benchmarks._common import arguments, discs, report
from mdsens.block_rows import BlockRows
from mdsens.stationarity import Unknowns, hessian_operator, linearisation, sparse_hessian


def fastest(run: Callable[[Any], Any], v: Any, runs: int) -> float:
    """Seconds for one product, the median over the runs of the mean over many."""
    jax.block_until_ready(run(v))
    times, many = [], max(20, int(3e6) // v.size)
    for _ in range(runs):
        began = time.perf_counter()
        for _ in range(many):
            answer = run(v)
        jax.block_until_ready(answer)
        times.append((time.perf_counter() - began) / many)
    return float(np.median(times))


def main() -> None:
    """Each size by each way."""
    asked = arguments(__doc__ or "", [1024, 16384], fractions=[0.95])
    rows = []
    for n in asked.sizes:
        for fraction in asked.fractions:
            eq = ms.minimize(discs(n, fraction), progress=False)
            backbone, _, null = linearisation(eq.system, eq.max_force)
            matrix = sparse_hessian(backbone)
            assert matrix is not None
            blocks, plain = BlockRows.of(matrix, 2), hessian_operator(backbone, null.simplified())
            v = np.random.default_rng(0).standard_normal((n, 2))
            truth, x = (matrix @ v.ravel()).reshape(v.shape), jnp.asarray(v)
            compiled = jax.jit(lambda blocks, v: blocks.product(v))
            free = jax.jit(lambda v, plain=plain: plain.matvec(Unknowns(v)).positions)
            peer = fastest(lambda v, matrix=matrix: matrix @ v, v.ravel(), asked.runs)
            for name, run in (("blocks", lambda v, c=compiled, b=blocks: c(b, v)), ("matrix-free", free)):
                error = float(np.linalg.norm(np.asarray(run(x)) - truth) / np.linalg.norm(truth))
                seconds = fastest(run, x, asked.runs)
                row = {"n": n, "fraction": fraction, "by": f"mdsens, {name}", "seconds": seconds, "error": error}
                rows.append(row | {"status": "CONVERGED", "over scipy": seconds / peer})
                print(rows[-1], flush=True)
            rows.append({"n": n, "fraction": fraction, "by": "scipy CSR", "seconds": peer, "error": 0.0})
    report("product", rows, asked.json)


if __name__ == "__main__":
    main()
