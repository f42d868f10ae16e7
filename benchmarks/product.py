"""How long does one product with the Hessian take, beside scipy's with the same matrix?

``python -m benchmarks.product --sizes 1024 16384``: ours is compiled, without a host callback, from
the blocks of the pairs; matrix-free is jax's linearization of the force, which needs no blocks.
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
from mdsens.mechanics.hessian import hessian_operator, sparse_hessian
from mdsens.mechanics.hessian_blocks import BlockRows
from mdsens.mechanics.rigidity import analyze_rigidity
from mdsens.mechanics.unknowns import Unknowns


def one(run: Callable[[], Any], size: int) -> float:
    """Seconds for one product, the mean over many."""
    many = max(20, int(3e6) // size)
    began = time.perf_counter()
    for _ in range(many):
        answer = run()
    jax.block_until_ready(answer)
    return (time.perf_counter() - began) / many


def main() -> None:
    """Each size by each way."""
    asked = arguments(__doc__ or "", [1024, 16384], fractions=[0.95])
    rows: list[dict[str, Any]] = []
    for n in asked.sizes:
        for fraction in asked.fractions:
            eq = ms.minimize(discs(n, fraction), progress=False)
            backbone, _, null = analyze_rigidity(eq.system, eq.max_force)
            matrix = sparse_hessian(backbone)
            assert matrix is not None
            blocks, plain = BlockRows.of(matrix, 2), hessian_operator(backbone, null.simplified())
            v = np.random.default_rng(0).standard_normal((n, 2))
            x, w, truth = jnp.asarray(v), jnp.asarray(v.T), matrix @ v.ravel()
            product = jax.jit(lambda blocks, v: blocks.product(v))
            scaled = jax.jit(lambda blocks, w: blocks.scaled_product(w))
            free = jax.jit(lambda v, plain=plain: plain.matvec(Unknowns(v)).positions)
            ways = {
                "scipy CSR": lambda matrix=matrix, u=v.ravel(): matrix @ u,
                "mdsens, blocks": lambda b=blocks, x=x, f=product: f(b, x),
                "mdsens, blocks of S H S^T": lambda b=blocks, w=w, f=scaled: f(b, w),
                "mdsens, matrix-free": lambda x=x, f=free: f(x),
            }
            found = {
                name: np.asarray(jax.block_until_ready(run())).ravel() for name, run in ways.items()
            }
            # scaled, it is S H x at x = S^T w
            back = jax.linear_transpose(blocks.scaled, x)(w)[0]
            truths = dict.fromkeys(ways, truth)
            truths["mdsens, blocks of S H S^T"] = np.asarray(
                blocks.scaled(jnp.asarray((matrix @ np.asarray(back).ravel()).reshape(v.shape)))
            ).ravel()
            times = {name: [] for name in ways}
            for _ in range(asked.runs):  # in turn, so that none has the quiet minute to itself
                for name, run in ways.items():
                    times[name].append(one(run, v.size))
            for name in ways:
                seconds = float(np.median(times[name]))
                error = float(
                    np.linalg.norm(found[name] - truths[name]) / np.linalg.norm(truths[name])
                )
                row = {"n": n, "fraction": fraction, "by": name, "seconds": seconds, "error": error}
                rows.append(
                    row
                    | {
                        "status": "CONVERGED",
                        "over scipy": seconds / float(np.median(times["scipy CSR"])),
                    }
                )
                print(rows[-1], flush=True)
    report("product", rows, asked.json)


if __name__ == "__main__":
    main()
