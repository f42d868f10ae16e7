"""How long do glasses and crystals take to relax, and what do derivatives cost, beside LAMMPS?

``python -m benchmarks.glass --sizes 1000 4000 --systems glass silicon copper spheres``: a
Kob-Andersen glass (80:20, density 1.2, cut at 2.5 with LAMMPS's switch lj/smooth from 2.0 on) from
a packing of soft spheres, silicon with a vacancy (Stillinger and Weber), copper with a vacancy
(Gupta), soft spheres of two sizes (harmonic, packing fraction 0.7) from a random start. All on one
core, from the same positions; LAMMPS's energy at the start is compared with ours, and both relax to
the same largest force on a particle. LAMMPS has no potential of Gupta's form.

A derivative by pairs is also compared with the conjugate gradients of scipy on the Hessian as a CSR
matrix: the same right-hand side, to the residual that the derivative reaches. The error of both is
that against a solve to round-off.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg

import mdsens as ms
from benchmarks import _lammps
from benchmarks._common import arguments, one_core, peak_memory, report, spheres
from benchmarks.atoms import COPPER, SILICON, crystal
from mdsens.mechanics.hessian import mixed_product, sparse_hessian

ONSET = 2.0
CUTOFF = 2.5
SIGMA = np.array([[1.0, 0.8], [0.8, 0.88]])
EPSILON = np.array([[1.0, 1.5], [1.5, 0.5]])


def smooth(r: jax.Array, sigma: jax.Array, epsilon: jax.Array) -> jax.Array:
    """The pair energy of LAMMPS's lj/smooth, shifted to zero at the cutoff.

    From the onset on the force is a cubic polynomial in r, with the force and its slope continuous
    there, and both zero at the cutoff.
    """

    def lennard_jones(x: jax.Array | float) -> jax.Array:
        return 4.0 * epsilon * ((sigma / x) ** 12 - (sigma / x) ** 6)

    s6 = (sigma / ONSET) ** 6
    width = CUTOFF - ONSET
    first = epsilon * (48.0 * s6 * s6 - 24.0 * s6) / ONSET
    second = -epsilon * (624.0 * s6 * s6 - 168.0 * s6) / ONSET**2
    third = -3.0 / width**2 * (first + 2.0 / 3.0 * second * width)
    fourth = -(second + 2.0 * third * width) / (3.0 * width**2)

    def polynomial(t: jax.Array | float) -> jax.Array:
        return -(first * t + second * t**2 / 2 + third * t**3 / 3 + fourth * t**4 / 4)

    shift = lennard_jones(ONSET) + polynomial(width)
    beyond = jnp.clip(r - ONSET, 0.0, width)
    inner = lennard_jones(jnp.minimum(r, ONSET)) + polynomial(beyond) - shift
    return jnp.where(r < CUTOFF, inner, 0.0)


def glass(n: int, seed: int = 0) -> ms.System:
    """Kob and Andersen's mixture, after 200 steps of FIRE as soft spheres of the same diameters."""
    kinds = (np.arange(n) >= 0.8 * n).astype(int)
    length = (n / 1.2) ** (1 / 3)
    places = np.random.default_rng(seed).random((n, 3)) * length
    params = {"sigma": SIGMA, "epsilon": 1.0, "alpha": 2.0}
    soft = ms.System.create(places, length, ms.potentials.soft_sphere(), params, kinds)
    fire = ms.relaxation.Fire()
    apart = ms.minimize(
        soft, method=fire, max_steps=200, leave_saddles=False, throw=False, progress=False
    )
    potential = ms.potentials.from_pair(
        smooth,
        ("sigma", "epsilon"),
        CUTOFF,
        (ONSET, CUTOFF),
        name="lj_smooth",
        positive=True,
    )
    pair = {"sigma": SIGMA, "epsilon": EPSILON}
    return ms.System.create(apart.positions, length, potential, pair, kinds)


def silicon(n: int) -> ms.System:
    """A crystal of silicon less an atom, the others 0.02 from their sites."""
    places, side = crystal("diamond", 5.431, n)
    return ms.System.create(places[1:], side, ms.potentials.stillinger_weber(), SILICON)


def copper(n: int) -> ms.System:
    """The same of copper."""
    places, side = crystal("fcc", 3.615, n)
    return ms.System.create(places[1:], side, ms.potentials.gupta(5.8, 6.2), COPPER)


def packing(n: int) -> ms.System:
    """Soft spheres of diameters 1 and 1.4."""
    return spheres(n, 0.7)


# name -> (system, parameter of the derivative, largest force)
SYSTEMS: dict[str, tuple[Callable[[int], ms.System], str, float]] = {
    "glass": (glass, "sigma", 1e-10),
    "silicon": (silicon, "sigma", 1e-10),
    "copper": (copper, "r0", 1e-10),
    "spheres": (packing, "sigma", 1e-12),
}
_HARMONIC = "\n".join(
    f"pair_coeff {a} {b} {0.5 / s**2!r} {s!r}"
    for a, b, s in ((1, 1, 1.0), (1, 2, 1.2), (2, 2, 1.4))
)
# name -> (units, pair commands, skin of the list)
PEERS = {
    "glass": (
        "lj",
        f"pair_style lj/smooth {ONSET} {CUTOFF}\npair_modify shift yes\n"
        "pair_coeff 1 1 1.0 1.0\npair_coeff 1 2 1.5 0.8\npair_coeff 2 2 0.5 0.88",
        0.3,
    ),
    "silicon": ("metal", "pair_style sw\npair_coeff * * {file} Si", 0.5),
    "spheres": ("lj", f"pair_style harmonic/cut\n{_HARMONIC}", 0.3),
}


def clock(run: Callable[[], Any], runs: int) -> tuple[dict[str, float], Any]:
    """Median of the wall times of some runs after the first one, which compiles, and the answer.

    ``core`` is the time on the core alone: on a machine with other work the wall time is longer.
    """
    began = time.perf_counter()
    answer = jax.block_until_ready(run())
    first = time.perf_counter() - began
    walls, cores = [], []
    for _ in range(runs):
        began = time.perf_counter()
        core = time.process_time()
        answer = jax.block_until_ready(run())
        cores.append(time.process_time() - core)
        walls.append(time.perf_counter() - began)
    seconds = {"seconds": float(np.median(walls)), "core": float(np.median(cores)), "first": first}
    return seconds, answer


def of_system(name: str, n: int, runs: int) -> list[dict[str, Any]]:
    """Relaxing one system, one derivative, its certificate and the elastic moduli."""
    make, parameter, force = SYSTEMS[name]
    start = make(n)
    base = {"system": name, "n": start.n, "by": "mdsens"}

    def relax() -> ms.Equilibrium:
        return ms.minimize(start, tolerance=force, throw=False, progress=False)

    times, eq = clock(relax, runs)
    error = {"max_force": float(eq.max_force), "target": force}
    row = {**base, "what": "relax", **times, **error, "steps": int(eq.steps)}
    row |= {"energy": float(ms.observables.energy(eq.system)), "peak_GiB": peak_memory()}
    rows = [{**row, "status": ms.Status(int(eq.status)).name}]
    if not ms.Status(int(eq.status)).good:
        return rows
    value = jnp.asarray(eq.params[parameter])
    change = {parameter: jnp.ones_like(value)}
    calls: dict[str, Callable[[], Any]] = {
        "jvp": lambda: ms.jvp(eq, change, throw=False),
        "certificate": lambda: ms.certify(eq, change),
        "moduli": lambda: ms.elasticity.moduli(eq, throw=False),
    }
    for what, call in calls.items():
        times, answer = clock(call, 1)
        row = {**base, "what": what, **times, **error, "peak_GiB": peak_memory()}
        if what == "jvp":
            row["error"] = float(answer.stats.residual)
            row["solver"] = answer.stats.solver
        rows.append({**row, "status": _status(answer)})
        if what == "jvp" and eq.system.potential.pairwise:
            rows.append({**base, "by": "scipy", "what": what, **of_scipy(eq, change, answer, runs)})
    return rows


def of_scipy(
    eq: ms.Equilibrium, change: dict[str, jax.Array], ours: ms.Displacement, runs: int
) -> dict[str, Any]:
    """The same derivative by scipy's conjugate gradients on the Hessian, and the error of both."""
    lin = ms.linearize(eq)
    matrix = sparse_hessian(lin.system)
    assert matrix is not None
    side = np.ravel(mixed_product(lin.system, change).positions)
    side = -np.ravel(lin.null.project_columns(side[:, None]))
    reached = float(ours.stats.residual)
    times, x = clock(lambda: conjugate_gradients(matrix, side, reached), runs)
    # the residual of that solve is solved for, to 1e-14 of the right-hand side
    tight = x + conjugate_gradients(matrix, side - matrix @ x, 1e-14 / reached)
    size = float(np.linalg.norm(tight))
    return {
        **times,
        "residual": float(np.linalg.norm(side - matrix @ x) / np.linalg.norm(side)),
        "error": float(np.linalg.norm(x - tight)) / size,
        "error of mdsens": float(np.linalg.norm(np.ravel(ours.value) - tight)) / size,
    }


def conjugate_gradients(matrix: sp.csr_array, side: np.ndarray, rtol: float) -> np.ndarray:
    """Solve by scipy's conjugate gradients, without a preconditioner."""
    return scipy.sparse.linalg.cg(matrix, side, rtol=rtol, atol=0.0, maxiter=10 * side.size)[0]


def _status(answer: Any) -> str:
    """The status of an answer by name."""
    code = answer.status
    return code.name if isinstance(code, ms.Status) else ms.Status(int(code)).name


def of_lammps(name: str, n: int, styles: list[str]) -> list[dict[str, Any]]:
    """LAMMPS on the same start, by each ``min_style``; its time is that of the minimize command."""
    make, _, force = SYSTEMS[name]
    start = make(n)
    ours = float(ms.observables.energy(start))
    units, commands, skin = PEERS[name]
    rows = []
    for style in styles:
        pair = commands.format(file=_lammps.potential_file("Si.sw"))
        found = _lammps.relax_atoms(start, units, pair, skin, style, force)
        rows.append(
            {
                "system": name,
                "n": start.n,
                "by": f"LAMMPS {style}",
                "what": "relax",
                "seconds": found["seconds"],
                "core": found["core"],
                "max_force": found["max_force"],
                "target": force,
                "energy": found["energy"],
                "energy at start": abs(found["start"] - ours) / abs(ours),
                "stopped": found["stopped"],
            }
        )
    return rows


def main() -> None:
    """Each system at each size, ours and LAMMPS's one after the other."""
    names = ["glass", "silicon"]
    asked = arguments(__doc__ or "", [1000], systems=names, styles=["cg", "fire"], peers=1)
    rows: list[dict[str, Any]] = []
    with one_core():
        for n in asked.sizes:
            for name in asked.systems:
                rows += of_system(name, n, asked.runs)
                if asked.peers and name in PEERS and _lammps.available():
                    rows += of_lammps(name, n, asked.styles)
                print(rows[-1], flush=True)
    report("glass", rows, asked.json)


if __name__ == "__main__":
    main()
