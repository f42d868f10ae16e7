"""How do time and memory grow with the number of particles?
Relaxing, one jvp, and a gradient by every diameter.

``python -m benchmarks.scaling --sizes 4096 16384 65536 131072``
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

import mdsens as ms
from benchmarks._common import arguments, discs, peak_memory, report, spheres, timed


def main() -> None:
    """Each size; then the exponents of the whole range."""
    asked = arguments(__doc__ or "", [1024, 4096, 16384], fractions=[0.95], dimension=2)
    rows: list[dict[str, Any]] = []
    for n in asked.sizes:
        make = (
            discs(n, asked.fractions[0], each=True)
            if asked.dimension == 2
            else spheres(n, asked.fractions[0])
        )
        relaxed = timed(lambda make=make: ms.minimize(make, progress=False), 1)
        eq = relaxed["answer"]
        sigma = eq.params["sigma"]
        dparams = {"sigma": jnp.asarray(np.random.default_rng(0).standard_normal(sigma.shape))}
        row = {"n": n, "relax": relaxed["seconds"], "status": ms.Status(int(eq.status)).name}
        jvp = timed(lambda eq=eq, d=dparams: ms.jvp(eq, d), asked.runs)
        gradient = timed(lambda eq=eq: ms.gradient(ms.observables.pressure, eq), asked.runs)
        answer = jvp["answer"]
        # the two directions of one derivative have to agree:
        # sum of dR_i . dR by the tangent and by the adjoint
        left = float(jnp.sum(answer.value**2))
        right = float(jnp.sum(ms.vjp(eq, answer.value).value["sigma"] * dparams["sigma"]))
        row |= {
            "jvp": jvp["seconds"],
            "gradient": gradient["seconds"],
            "residual": float(answer.stats.residual),
        }
        row |= {
            "solver": answer.stats.solver,
            "adjoint": abs(left - right) / left,
            "peak_GiB": peak_memory(),
        }
        rows.append(row)
        print(row, flush=True)
    if len(rows) > 1:
        logs = np.log([r["n"] for r in rows])
        exponents = {
            k: float(np.polyfit(logs, np.log([r[k] for r in rows]), 1)[0])
            for k in ("relax", "jvp", "gradient")
        }
        rows.append({"n": "exponent", **exponents})
    report("scaling", rows, asked.json)


if __name__ == "__main__":
    main()
