"""Do parameters that were designed on some packings serve packings that were never used?

``python -m benchmarks.ensemble --members 64``: harmonic-Morse discs of two species, the model of
arXiv:2404.15101. Its two diameters and three wells are changed until the mean of Poisson's ratio
(of A) over the members, relaxed anew from their random starts at every step, is 0.1 above, or 0.1
below, within 0.01. As many fresh packings are then relaxed.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

import mdsens as ms
from benchmarks._common import arguments, report
from mdsens.design import Free, LevenbergMarquardt, Target, fit

# wells of 0.3 tear the solid
FREE = {"sigma": Free(within=0.3), "epsilon": Free(low=0.01, high=0.25)}
FRESH = 1000  # the first seed of the packings that the design never saw


def ratios(params: dict[str, Any], count: int, n: int) -> tuple[list[float], int]:
    """Poisson's ratio of fresh packings, and how many of them are no rigid minimum."""
    fields = {name: np.asarray(value).tolist() for name, value in params.items()}
    starts = [
        ms.load_system("harmonic_morse_2d", seed=FRESH + seed, count=n, parameters=fields)
        for seed in range(count)
    ]
    found = []
    for eq in ms.unstack(ms.minimize(ms.stack(starts), throw=False, progress=False)):
        lin = ms.linearize(eq, throw=False)
        if int(lin.status) == ms.Status.CONVERGED:
            moduli = ms.elasticity.moduli(lin, throw=False)
            if ms.Status(int(np.max(np.asarray(moduli.stats.status)))).good:
                found.append(float(moduli.poisson))
    return found, count - len(found)


def main() -> None:
    """Both ways."""
    asked = arguments(__doc__ or "", [368], members=64, steps=20, change=0.1, trust=0.1)
    rows: list[dict[str, Any]] = []
    for n in asked.sizes:
        members = [
            ms.load_system("harmonic_morse_2d", seed=seed, count=n) for seed in range(asked.members)
        ]
        for change in (asked.change, -asked.change):
            began = time.perf_counter()
            design = fit(
                Target("poisson", change, 0.01, from_start=True),
                members,
                FREE,
                restart=True,
                steps=asked.steps,
                method=LevenbergMarquardt(trust=asked.trust, largest=0.3),
                progress=False,
            )
            seconds = time.perf_counter() - began
            fresh, lost = ratios(dict(design.params), asked.members, n)
            row = {
                "n": n,
                "members": asked.members,
                "change": change,
                "outcome": design.status.name,
            }
            row |= {
                "relaxations": design.relaxations,
                "poisson_from": float(design.history[0].values[0]),
            }
            row |= {"wanted": float(design.wanted[0]), "poisson": float(design.values[0])}
            row |= {
                "fresh": float(np.mean(fresh)),
                "fresh_error": float(np.std(fresh) / len(fresh) ** 0.5),
            }
            row |= {"fresh_off": float(np.mean(fresh) - design.wanted[0]), "not_rigid": lost}
            row |= {name: str(np.round(value, 4).tolist()) for name, value in design.params.items()}
            rows.append(row | {"seconds": seconds})
            print(rows[-1], flush=True)
    report("ensemble", rows, asked.json)


if __name__ == "__main__":
    main()
