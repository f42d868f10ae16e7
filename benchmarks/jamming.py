"""What does a solve take as a packing nears unjamming? Each solver, pressure 1e-1 to 1e-6.

``python -m benchmarks.jamming --sizes 1024``: one packing,
compressed or decompressed to each pressure in turn.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

import mdsens as ms
from benchmarks._common import arguments, discs, report, timed
from mdsens.implicit import CG, GMRES, MINRES, Auto, BiCGSTAB


def at_pressure(start: ms.System, pressure: float) -> ms.Equilibrium:
    """The packing with its diameters scaled until the pressure is within a tenth:
    steps along its compliance.
    """
    eq, scale = ms.minimize(start, progress=False), 1.0
    for _ in range(60):
        now = float(ms.observables.pressure(eq.system))
        if abs(now / pressure - 1.0) < 0.1:
            break
        # harmonic discs: the pressure is proportional to the distance from jamming, to first order
        slope = float(
            jnp.sum(
                ms.gradient(ms.observables.pressure, eq, throw=False).value["sigma"]
                * eq.params["sigma"]
            )
        )
        change = np.clip((pressure - now) / slope, -0.5 * now / slope, 0.02)
        scale *= 1.0 + float(change)
        eq = ms.minimize(
            eq.system, {"sigma": start.params["sigma"] * scale}, progress=False, throw=False
        )
    return eq


def main() -> None:
    """Each pressure by each solver."""
    asked = arguments(__doc__ or "", [1024], pressures=[1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
    solvers = {
        "Auto": Auto(),
        "CG": CG(),
        "CG(degree=20)": CG(degree=20),
        "MINRES": MINRES(),
        "BiCGSTAB": BiCGSTAB(),
        "GMRES": GMRES(),
        "GMRES(degree=1)": GMRES(degree=1),
    }
    rows = []
    for n in asked.sizes:
        system = discs(n, 0.95)
        for pressure in asked.pressures:
            eq = at_pressure(system, pressure)
            system = eq.system
            tangent = {"sigma": jnp.asarray([0.0, 1.0])}
            factored, iterated = (
                ms.jvp(eq, tangent, solve=exact, throw=False).value
                for exact in (Auto(rtol=1e-13), CG(rtol=1e-14))
            )
            for name, solve in solvers.items():
                found = timed(
                    lambda eq=eq, t=tangent, m=solve: ms.jvp(eq, t, solve=m, throw=False),
                    asked.runs,
                )
                answer = found.pop("answer")
                truth = iterated if name == "Auto" else factored  # no solver is its own judge
                error = float(jnp.linalg.norm(answer.value - truth) / jnp.linalg.norm(truth))
                row = {"n": n, "pressure": float(ms.observables.pressure(eq.system)), "by": name}
                row |= {
                    "seconds": found["seconds"],
                    "products": int(answer.stats.iterations),
                    "error": error,
                }
                rows.append(row | {"status": answer.status.name})
                print(rows[-1], flush=True)
    report("jamming", rows, asked.json)


if __name__ == "__main__":
    main()
