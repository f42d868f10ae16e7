"""How long does the derivative of every position by every diameter take,
beside vmapped BiCGSTAB as the paper had it?

``python -m benchmarks.jacobian --sizes 1024``
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mdsens as ms
from benchmarks import _peers
from benchmarks._common import arguments, discs, report, timed


def by_jaxopt(eq: ms.Equilibrium, rtol: float) -> Any:
    """All columns at once: jaxopt's root_jvp under vmap."""
    from jaxopt import implicit_diff, linear_solve

    energy = _peers.energy_of(eq.system)
    solve = functools.partial(linear_solve.solve_bicgstab, tol=rtol, maxiter=20_000)

    @jax.jit
    def columns(R: jax.Array, sigma: jax.Array, units: jax.Array) -> jax.Array:
        return jax.vmap(
            lambda u: implicit_diff.root_jvp(jax.grad(energy), R, (sigma,), (u,), solve=solve)
        )(units)

    n = eq.system.n
    return lambda: jnp.moveaxis(columns(eq.positions, eq.params["sigma"], jnp.eye(n)), 0, -1)


def main() -> None:
    """Each size by each way."""
    asked = arguments(__doc__ or "", [1024], fractions=[0.95], peers=1)
    rows = []
    for n in asked.sizes:
        for fraction in asked.fractions:
            eq = ms.minimize(discs(n, fraction, each=True), progress=False)
            held = ~np.asarray(ms.linearize(eq).network.rattlers)
            some = np.random.default_rng(0).choice(np.flatnonzero(held), 8, replace=False)
            truth = np.stack(
                [
                    ms.jvp(
                        eq,
                        {"sigma": jnp.zeros(n).at[k].set(1.0)},
                        solve=ms.implicit.CG(rtol=1e-14),
                        throw=False,
                    ).value
                    for k in some
                ],
                axis=-1,
            )
            ways: dict[str, Any] = {
                "mdsens jacobian": lambda eq=eq: ms.jacobian(eq, "sigma", throw=False)
            }
            if asked.peers and importlib.util.find_spec("jaxopt"):
                ways["jaxopt BiCGSTAB, vmapped"] = by_jaxopt(eq, 1e-10)
            for name, way in ways.items():
                found = timed(way, asked.runs if name.startswith("mdsens") else 1)
                answer = found.pop("answer")
                value = np.asarray(answer.value if isinstance(answer, ms.Displacement) else answer)[
                    :, :, some
                ]
                value = value - np.mean(value[held], axis=0) * held[:, None, None]
                error = float(np.linalg.norm(value - truth) / np.linalg.norm(truth))
                row = {
                    "n": n,
                    "fraction": fraction,
                    "by": name,
                    "seconds": found["seconds"],
                    "error": error,
                }
                if isinstance(answer, ms.Displacement):
                    row["status"] = ms.Status(int(np.max(np.asarray(answer.stats.status)))).name
                rows.append(row)
                print(row, flush=True)
    report("jacobian", rows, asked.json)


if __name__ == "__main__":
    main()
