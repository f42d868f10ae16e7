"""Are many packings relaxed and differentiated faster as a batch than one after the other?

``python -m benchmarks.batch --sizes 256 --members 64``
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

import mdsens as ms
from benchmarks._common import arguments, discs, report

GROW = {"sigma": np.array([0.0, 1.0])}


def one_after_the_other(batch: ms.System) -> list[Any]:
    """Each member's relaxation and response."""
    found = []
    for member in ms.unstack(batch):
        eq = ms.minimize(member, throw=False, progress=False)
        found.append(ms.jvp(eq, GROW, throw=False))
    return found


def main() -> None:
    """Each size both ways; the answers are compared member by member."""
    asked = arguments(__doc__ or "", [256], fractions=[0.95], members=64)
    rows = []
    for n in asked.sizes:
        for fraction in asked.fractions:
            batch = ms.stack([discs(n, fraction, seed) for seed in range(asked.members)])
            ways: dict[str, Any] = {
                "one after the other": lambda batch=batch: one_after_the_other(batch),
                "batch": lambda batch=batch: ms.jvp(
                    ms.minimize(batch, throw=False, progress=False), GROW, throw=False
                ),
            }
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            answers = {name: way() for name, way in ways.items()}
            for _ in range(asked.runs):
                for name, way in ways.items():
                    began = time.perf_counter()
                    way()
                    seconds[name].append(time.perf_counter() - began)
            alone, whole = answers["one after the other"], answers["batch"]
            errors = [
                float(np.linalg.norm(whole.value[k] - r.value) / np.linalg.norm(r.value))
                for k, r in enumerate(alone)
            ]
            good = sum(ms.Status(int(code)).good for code in np.asarray(whole.stats.status))
            base = float(np.median(seconds["one after the other"]))
            for name in ways:
                row = {"n": n, "fraction": fraction, "members": asked.members, "by": name}
                row |= {
                    "seconds": float(np.median(seconds[name])),
                    "error": max(errors),
                    "good": good,
                }
                rows.append(row | {"share": row["seconds"] / base})
    report("batch", rows, asked.json)


if __name__ == "__main__":
    main()
