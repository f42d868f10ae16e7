"""What does the gradient of Poisson's ratio by every diameter take,
in evaluations of the relaxed moduli?

``python -m benchmarks.elasticity --sizes 1024``: both from the minimum on, with the contact
network, the assembly and the factor of each. The error is that of the gradient along a random
direction, against minimizing again on both sides.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

import mdsens as ms
from benchmarks._common import arguments, discs, report, timed
from mdsens.elasticity import gradient, moduli

# the best of them counts: round-off on one side, a contact that changes on the other
STEPS = (1e-4, 3e-5, 1e-5, 3e-6)


def error_of(eq: ms.Equilibrium, slope: np.ndarray) -> float:
    """Of the derivative along a random direction,
    relative to differences at the step that fits best.
    """
    direction = np.random.default_rng(0).normal(size=slope.size)
    direction /= np.linalg.norm(direction)
    found = float(slope @ direction)

    def poisson(t: float) -> float:
        end = ms.minimize(
            eq.system, {"sigma": eq.params["sigma"] + t * direction}, tolerance=3e-14, throw=False
        )
        return float(moduli(end).poisson)

    def difference(t: float) -> float:  # extrapolated from t and t / 2: the error falls as t^4
        whole, half = ((poisson(s) - poisson(-s)) / (2 * s) for s in (t, 0.5 * t))
        return (4 * half - whole) / 3

    return min(abs(difference(t) / found - 1.0) for t in STEPS)


def main() -> None:
    """Each size: the moduli, the gradient, and their ratio."""
    asked = arguments(__doc__ or "", [1024], fraction=0.95)
    rows = []
    for n in asked.sizes:
        eq = ms.minimize(discs(n, asked.fraction, each=True), tolerance=1e-13)
        whole: dict[str, Any] = timed(lambda eq=eq: moduli(eq), asked.runs)
        slope = timed(lambda eq=eq: gradient(lambda m: m.poisson, eq).value["sigma"], asked.runs)
        stats = whole["answer"].stats
        row = {
            "n": n,
            "fraction": asked.fraction,
            "moduli": whole["seconds"],
            "gradient": slope["seconds"],
        }
        row |= {"evaluations": slope["seconds"] / whole["seconds"], "first": slope["first"]}
        row |= {
            "error": error_of(eq, np.asarray(slope["answer"])),
            "residual": float(jnp.max(stats.residual)),
        }
        row |= {"status": ms.Status(int(jnp.max(stats.status))).name, "solver": stats.solver}
        rows.append(row)
        print(row, flush=True)
    report("elasticity", rows, asked.json)


if __name__ == "__main__":
    main()
