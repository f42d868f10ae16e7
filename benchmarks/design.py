"""How many packings can be designed to another Poisson's ratio by their diameters,
in how many relaxations?

``python -m benchmarks.design --seeds 10``: 256 polydisperse Hertzian discs at a pressure of 0.1,
Poisson's ratio (of A) 0.1 above and 0.1 below where it starts, to 2e-3, diameters within 30 % of
theirs, in 60 relaxations. Three problems: the pressure held to 1 % in a cell that stays; the shear
modulus held to 1 % as well; and the shear modulus held to 1 % in a cell that is relaxed to the
pressure. Each answer is relaxed again from beside it, for the error.

``poisson_bound`` is what no packing exceeds with pressure and shear modulus held in its cell:
nu = (K - G) / (K + G), and K is at most what it were if discs followed the strain, 1 / 4V sum of
k r^2 over the contacts. With an overlap d, k r^2 = 3/2 d^(1/2) (1 - d)^2 is a concave function of
f r = d^(3/2) (1 - d), whose sum is 2 P V, so that the sum is largest where all contacts are alike,
and as many as they can be: three a disc, as in any planar network.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import optax

import mdsens as ms
from benchmarks._common import arguments, report
from mdsens.design import Design, Free, LevenbergMarquardt, Optax, Target, fit, hold

PROBLEMS = {
    "pressure held": ([hold("pressure")], False),
    "pressure and shear modulus held": ([hold("pressure"), hold("shear")], False),
    "shear modulus held, at the pressure": ([hold("shear")], True),
}


def methods(rates: list[float], steps: int) -> dict[str, LevenbergMarquardt | Optax]:
    """Ours, and RMSProp as arXiv:2404.15101 takes it, at some learning rates,
    constant and with cosine decay.
    """
    found: dict[str, LevenbergMarquardt | Optax] = {"Levenberg-Marquardt": LevenbergMarquardt()}
    for rate in rates:
        found[f"RMSProp {rate:g}"] = Optax(optax.rmsprop(rate), f"RMSProp {rate:g}")
    for rate in rates[-1:]:
        name = f"RMSProp {rate:g}, cosine decay"
        found[name] = Optax(optax.rmsprop(optax.cosine_decay_schedule(rate, steps)), name)
    return found


def error_of(design: Design) -> float:
    """Of the features, relaxing again in the cell found from a little beside the positions:
    the largest, relative.
    """
    found_at = design.equilibrium.system
    aside = 1e-5 * np.random.default_rng(0).standard_normal(found_at.positions.shape)
    again = ms.minimize(
        found_at.replace(positions=found_at.positions + aside), throw=False, progress=False
    )
    moduli = ms.elasticity.moduli(again, throw=False)
    found = {"poisson": moduli.poisson, "pressure": moduli.pressure, "shear": moduli.shear}
    return max(
        abs(float(found[name]) / value - 1.0)
        for name, value in zip(design.names, design.values, strict=True)
    )


def poisson_bound(start: ms.System) -> float:
    """The largest Poisson's ratio at 1 % more pressure and 1 % less shear modulus,
    in the same cell.
    """
    moduli, volume = ms.elasticity.moduli(ms.minimize(start, progress=False)), float(start.volume)
    overlap = np.linspace(0.0, 0.4, 400_001)
    pull, stiffness = overlap**1.5 * (1.0 - overlap), 1.5 * np.sqrt(overlap) * (1.0 - overlap) ** 2
    contacts = 3 * start.n
    bulk = (
        contacts
        / (4.0 * volume)
        * np.interp(1.01 * float(moduli.pressure) * 2.0 * volume / contacts, pull, stiffness)
    )
    shear = 0.99 * float(moduli.shear)
    return float((bulk - shear) / (bulk + shear))


def main() -> None:
    """Every problem, the first by every method, over packings and both ways."""
    asked = arguments(
        __doc__ or "",
        [256],
        seeds=10,
        steps=60,
        change=0.1,
        rates=[0.002, 0.005],
        problems=[0, 1, 2],
        peers=1,
    )
    rows: list[dict[str, Any]] = []
    for n in asked.sizes:
        for number in asked.problems:
            problem = list(PROBLEMS)[number]
            held, pressed = PROBLEMS[problem]
            for name, method in methods(
                asked.rates if asked.peers and number == 0 else [], asked.steps
            ).items():
                for seed in range(asked.seeds):
                    start = ms.minimize(
                        ms.load_system("polydisperse_2d", seed=seed, count=n), progress=False
                    ).system
                    pressure = float(ms.observables.pressure(start)) if pressed else None
                    bound = {"poisson_bound": poisson_bound(start)} if number == 1 else {}
                    for change in (asked.change, -asked.change):
                        wanted = [Target("poisson", change, 2e-3, from_start=True), *held]
                        free, began = {"sigma": Free(within=0.3)}, time.perf_counter()
                        row = {
                            "problem": problem,
                            "by": name,
                            "n": n,
                            "seed": seed,
                            "change": change,
                        }
                        try:
                            design = fit(
                                wanted,
                                start,
                                free,
                                method=method,
                                steps=asked.steps,
                                pressure=pressure,
                                progress=False,
                            )
                        except ms.ConvergenceError as error:  # no rigid minimum to begin with
                            rows.append(
                                row | {"met": False, "relaxations": 0, "outcome": error.status.name}
                            )
                            continue
                        ratio = design.params["sigma"] / np.asarray(start.params["sigma"])
                        off = np.abs(design.values - design.wanted) / design.tolerance
                        row |= {
                            "met": design.status == ms.Status.CONVERGED,
                            "relaxations": design.relaxations,
                        }
                        row |= {"poisson_from": float(design.history[0].values[0])}
                        row |= {
                            "poisson": float(design.values[0]),
                            **bound,
                            "tolerances_off": float(off.max()),
                        }
                        row |= {
                            "smallest_ratio": float(ratio.min()),
                            "largest_ratio": float(ratio.max()),
                        }
                        row |= {"outcome": design.status.name, "error": error_of(design)}
                        rows.append(row | {"seconds": time.perf_counter() - began})
                met = [
                    row
                    for row in rows
                    if (row["problem"], row["by"], row["n"]) == (problem, name, n)
                ]
                print(f"{problem}, {name}: {sum(r['met'] for r in met)} of {len(met)}", flush=True)
            report("design", rows, asked.json)  # so far


if __name__ == "__main__":
    main()
