"""How long does one jvp take, to a true error of 1e-8,
beside what else solves the same linear system?

``python -m benchmarks.sensitivity --sizes 1024 16384 --fractions 0.95 0.86 --spheres 8192``

Ours is timed whole: contacts, rattlers, null space, assembly, factor. A peer gets the energy over
the list of pairs as its user would write it, and is timed for the derivative of the force by the
parameter and the solve.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mdsens as ms
from benchmarks import _peers
from benchmarks._common import arguments, discs, report, spheres, timed
from mdsens.implicit import CG, GMRES, Auto

RTOL = 1e-10


def peers(eq: ms.Equilibrium, tangent: Any) -> dict[str, Callable[[], Any]]:
    """Name -> a function of nothing that solves for the derivative;
    jaxopt by its own rule, the others by ours.
    """
    force, sigma = jax.grad(_peers.energy_of(eq.system)), eq.params["sigma"]

    def derivative(name: str, solver: _peers.Solver) -> Callable[[], Any]:
        def solve(A: Any, b: jax.Array) -> jax.Array:
            return solver(A, b)[0]

        @jax.jit
        def run(R: jax.Array, sigma: jax.Array) -> jax.Array:
            if name.startswith("jaxopt"):
                from jaxopt import implicit_diff

                return implicit_diff.root_jvp(force, R, (sigma,), (tangent,), solve=solve)
            pull = jax.jvp(lambda s: force(R, s), (sigma,), (tangent,))[1]
            return solve(jax.linearize(lambda R: force(R, sigma), R)[1], -pull)

        return lambda: run(eq.positions, sigma)

    solvers = _peers.solvers(RTOL, 40_000)
    # half a minute each, where CG takes a second; the normal equations' answer is wrong as well
    if eq.system.n > 4096:
        solvers = {
            name: f
            for name, f in solvers.items()
            if "gmres" not in name.lower() and "normal" not in name
        }
    return {name: derivative(name, solver) for name, solver in solvers.items()}


def ours(eq: ms.Equilibrium, dparams: Any) -> dict[str, Callable[[], Any]]:
    """The same for ours; and for finite differences, where they do not take minutes."""
    methods = {
        "Auto": Auto(),
        "CG": CG(rtol=RTOL),
        "CG(degree=20)": CG(rtol=RTOL, degree=20),
        "GMRES": GMRES(rtol=RTOL),
    }
    ways: dict[str, Callable[[], Any]] = {
        f"mdsens {name}": lambda m=method: ms.jvp(eq, dparams, solve=m, throw=False)
        for name, method in methods.items()
    }
    if eq.system.n <= 1024:
        ways["finite difference"] = lambda: ms.verify.finite_difference(eq, dparams).value
    return ways


def cases(asked: Any) -> list[tuple[str, ms.System]]:
    """The systems asked for, at random places."""
    flat = [(f"2-D phi={f}", discs(n, f)) for n in asked.sizes for f in asked.fractions]
    return flat + [("3-D phi=0.7", spheres(n, 0.7)) for n in asked.spheres if n]


def main() -> None:
    """Each system by each way: time, first time, error, status."""
    asked = arguments(__doc__ or "", [1024, 16384], fractions=[0.95, 0.86], spheres=[8192], peers=1)
    rows = []
    for label, start in cases(asked):
        eq = ms.minimize(start, progress=False)
        tangent = jnp.asarray([0.0, 1.0])
        dparams = {"sigma": tangent}
        truth = ms.jvp(eq, dparams, solve=CG(rtol=1e-14), throw=False).value
        rattlers = np.asarray(ms.linearize(eq).network.rattlers)
        ways = ours(eq, dparams) | (peers(eq, tangent) if asked.peers else {})
        for name, way in ways.items():
            found = timed(way, asked.runs)
            answer = found.pop("answer")
            value = np.where(
                rattlers[:, None],
                0.0,
                answer.value if isinstance(answer, ms.Displacement) else answer,
            )
            value = value - value[~rattlers].mean(axis=0) * ~rattlers[:, None]
            error = float(np.linalg.norm(value - truth) / np.linalg.norm(truth))
            row = {
                "system": label,
                "n": start.n,
                "by": name,
                "seconds": found["seconds"],
                "first": found["first"],
            }
            row |= {"error": error, "rattlers": int(rattlers.sum())}
            if isinstance(answer, ms.Displacement):
                row |= {"status": answer.status.name, "products": int(answer.stats.iterations)}
            rows.append(row)
            print(row, flush=True)
    report("sensitivity", rows, asked.json)


if __name__ == "__main__":
    main()
