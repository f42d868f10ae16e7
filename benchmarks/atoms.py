"""What do forces, Hessians and derivatives of atoms cost, beside LAMMPS and scipy on one core?

``python -m benchmarks.atoms --sizes 8000``: silicon by Stillinger and Weber's potential, copper by
tables of an embedded-atom potential and by Gupta's, all on one core, which is all that LAMMPS and
scipy's conjugate gradients use. Forces of the tables differ from LAMMPS's by its interpolation
between knots, near the lattice less than far from it. Other errors are those of a product against a
difference of forces, of the matrix against the product, and of the derivative against scipy's
answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg as sla

import mdsens as ms
from benchmarks import _lammps
from benchmarks._common import arguments, one_core, report
from mdsens.mechanics.forces import energy_gradient
from mdsens.mechanics.hessian import hessian_product, sparse_hessian
from mdsens.mechanics.unknowns import Unknowns

SILICON = {
    "epsilon": 2.1683,
    "sigma": 2.0951,
    "a": 1.8,
    "lambda": 21.0,
    "gamma": 1.2,
    "cos_theta0": -1 / 3,
    "A": 7.049556277,
    "B": 0.6022245584,
    "p": 4.0,
    "q": 0.0,
}
COPPER = {"A": 0.0855, "xi": 1.224, "p": 10.96, "q": 2.278, "r0": 3.615 / 2**0.5}
SITES = {
    "diamond": [
        (0, 0, 0),
        (0, 2, 2),
        (2, 0, 2),
        (2, 2, 0),
        (1, 1, 1),
        (1, 3, 3),
        (3, 1, 3),
        (3, 3, 1),
    ],
    "fcc": [(0, 0, 0), (0, 2, 2), (2, 0, 2), (2, 2, 0)],
}


def crystal(lattice: str, constant: float, n: int) -> tuple[np.ndarray, float]:
    """About n atoms of a cubic crystal, moved by 0.02 from their sites; the side of the cell."""
    sites = np.array(SITES[lattice]) / 4.0
    count = max(round((n / len(sites)) ** (1 / 3)), 1)
    cells = np.stack(np.meshgrid(*[np.arange(count)] * 3, indexing="ij"), -1).reshape(-1, 1, 3)
    places = constant * (cells + sites).reshape(-1, 3)
    noise = np.random.default_rng(0).standard_normal(places.shape)
    return places + 0.02 * noise, count * constant


def systems(n: int, peers: bool) -> dict[str, tuple[ms.System, tuple[str, str] | None]]:
    """The systems by name, each with the pair_style and the file of LAMMPS for it, if any."""
    places, side = crystal("diamond", 5.431, n)
    silicon = ms.System.create(places, side, ms.potentials.stillinger_weber(), SILICON)
    places, side = crystal("fcc", 3.615, n)
    gupta = ms.System.create(places, side, ms.potentials.gupta(5.8, 6.2), COPPER)
    made: dict[str, tuple[ms.System, tuple[str, str] | None]] = {
        "silicon": (silicon, ("sw", "Si.sw") if peers else None),
        "copper, Gupta": (gupta, None),
    }
    file = _lammps.potential_file("Cu_u3.eam")
    if peers and file is not None:
        potential, params = ms.io.read_potential(file, ["Cu"])
        tables = ms.System.create(places, side, potential, params)
        made["copper, EAM"] = (tables, ("eam", "Cu_u3.eam"))
    return made


def seconds(run: Callable[[], Any], runs: int) -> float:
    """Median of the times of some runs, after one that compiles."""
    jax.block_until_ready(run())
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def of_forces(
    name: str, system: ms.System, peer: tuple[str, str] | None, runs: int
) -> list[dict[str, Any]]:
    """Times of one evaluation of the forces, of a product with the Hessian and of its assembly."""
    slope = jax.jit(lambda s, R: energy_gradient(s)(R))
    forces = -np.asarray(slope(system, system.positions))
    base = {"system": name, "n": system.n, "status": "CONVERGED"}
    force = seconds(lambda: slope(system, system.positions), runs)
    row = {**base, "what": "forces", "seconds": force}
    if peer is not None and _lammps.available():
        found = _lammps.forces(system, *peer)
        row["over LAMMPS"] = force / found["seconds"]
        row["error"] = float(
            np.abs(forces - np.array(found["forces"])).max() / np.abs(forces).max()
        )
    rows = [row]
    product = jax.jit(lambda s, v: hessian_product(s)(Unknowns(v)).positions)
    v = jnp.asarray(np.random.default_rng(1).standard_normal(system.positions.shape))
    step = 1e-5
    difference = (
        slope(system, system.positions + step * v) - slope(system, system.positions - step * v)
    ) / (2 * step)
    exact = product(system, v)
    error = float(jnp.abs(difference - exact).max() / jnp.abs(exact).max())
    taken = seconds(lambda: product(system, v), runs)
    rows.append(
        {
            **base,
            "what": "Hessian product",
            "seconds": taken,
            "in forces": taken / force,
            "error": error,
        }
    )
    matrix = sparse_hessian(system)
    if matrix is not None:
        taken = seconds(lambda: sparse_hessian(system), min(runs, 3))
        error = float(
            np.abs(matrix @ np.asarray(v).ravel() - np.asarray(exact).ravel()).max()
            / jnp.abs(exact).max()
        )
        rows.append(
            {
                **base,
                "what": "Hessian assembled",
                "seconds": taken,
                "in forces": taken / force,
                "error": error,
            }
        )
    return rows


def of_derivative(n: int, runs: int) -> list[dict[str, Any]]:
    """Time of a derivative of silicon with a vacancy, beside scipy's conjugate gradients."""
    places, side = crystal("diamond", 5.431, n)
    system = ms.System.create(places[1:], side, ms.potentials.stillinger_weber(), SILICON)
    eq = ms.minimize(system, progress=False)
    lin = ms.linearize(eq)
    change = {"sigma": 1.0}
    response = ms.jvp(lin, change)
    taken = seconds(lambda: ms.jvp(lin, change).positions, runs)
    matrix = sparse_hessian(lin.system)
    assert matrix is not None
    right = np.asarray(matrix @ np.asarray(response.positions).ravel())
    goal = float(response.stats.residual)
    scale = 1.0 / np.sqrt(matrix.diagonal())
    # with the diagonal as preconditioner, which costs next to nothing
    jacobi = sla.LinearOperator(matrix.shape, lambda x: scale**2 * x)

    def solver(rtol: float) -> np.ndarray:
        return sla.cg(matrix, right, rtol=rtol, maxiter=20_000, M=jacobi)[0]

    rtol = max(goal, 1e-13)
    peer = seconds(lambda: solver(rtol), runs)
    x = solver(rtol).reshape(-1, 3)
    x -= x.mean(axis=0)
    ours = np.asarray(response.positions) - np.asarray(response.positions).mean(axis=0)
    return [
        {
            "system": "silicon less an atom",
            "n": system.n,
            "what": f"jvp by {response.stats.solver}",
            "seconds": taken,
            "over scipy CG": taken / peer,
            "residual": goal,
            "error": float(np.linalg.norm(x - ours) / np.linalg.norm(ours)),
            "status": response.status.name,
        }
    ]


def main() -> None:
    """Each system, then the derivative."""
    asked = arguments(__doc__ or "", [8000], derivative=1, peers=1)
    rows: list[dict[str, Any]] = []
    with one_core():
        for n in asked.sizes:
            for name, (system, peer) in systems(n, bool(asked.peers)).items():
                rows += of_forces(name, system, peer, asked.runs)
            if asked.derivative:
                rows += of_derivative(n, asked.runs)
    report("atoms", rows, asked.json)


if __name__ == "__main__":
    main()
