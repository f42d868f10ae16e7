"""Makes the packings of this folder: bidisperse harmonic spheres,
decompressed towards jamming, relaxed to round-off.

A random start is relaxed well above jamming. The box is then widened step by step, the particles
going with it, and the packing relaxed after each step, down to each of the pressures in turn.
Relaxing is mdsens' FIRE as far as it pays, and Newton's method on the assembled sparse Hessian from
there. A seed counts only if it is rigid at every pressure.

With the package installed, ``python make.py`` writes all files and ``python make.py 2d_n64_seed0``
one. The seeds fix the random starts, but not the last digits on another machine, nor, after
thousands of steps, always the packing.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg as spl

import mdsens as ms
from mdsens.mechanics.hessian import max_force

HERE = Path(__file__).parent
PRESSURES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
SIGMA = np.array([1.0, 1.4])  # half of the particles each
# packing fraction of the random start: P is about 0.1 there, jamming at 0.84 and 0.65
START = {2: 1.0, 3: 0.8}
NAMES = (
    "2d_n64_seed0",
    "2d_n64_seed1",
    "2d_n256",
    "2d_n1024",
    "3d_n64_seed0",
    "3d_n64_seed1",
    "3d_n256",
    "3d_n1024",
)
ACCURACY = 1e-3  # of the pressure
DAMPING = (
    1e-12  # on the diagonal of the Hessian, in its own units of 1: makes the translations regular
)
# the largest force to reach: round-off of the positions of the largest packings leaves about that
FLOOR = 2e-14


@dataclasses.dataclass(frozen=True)
class Packing:
    """Particles in a periodic square or cubic box; kinds alternate.

    Attributes:
      positions: (n, d).
      length: of the box.
    """

    positions: np.ndarray
    length: float

    @property
    def species(self) -> np.ndarray:
        return np.arange(len(self.positions)) % 2

    def scaled(self, length: float) -> Packing:
        return Packing(self.positions * (length / self.length), length)

    def system(self) -> ms.System:
        params = {"sigma": SIGMA, "epsilon": 1.0, "alpha": 2.0}
        return ms.System.create(
            self.positions, self.length, ms.potentials.soft_sphere(), params, self.species
        )


@dataclasses.dataclass(frozen=True)
class Contacts:
    """The overlapping pairs of a packing.

    Attributes:
      i, j: (m,) particles.
      normal: (m, d) from j to i.
      r: (m,) distance.
      stiffness: (m,) 1 / s^2, s the sum of the radii.
      force: (m,) (1 - r / s) / s.
      net: (n, d) force on each particle.
    """

    i: np.ndarray
    j: np.ndarray
    normal: np.ndarray
    r: np.ndarray
    stiffness: np.ndarray
    force: np.ndarray
    net: np.ndarray

    @property
    def largest(self) -> float:
        return float(np.sqrt(np.max(np.sum(self.net**2, axis=1))))


def contacts(packing: Packing) -> Contacts:
    R, length = packing.positions, packing.length
    i, j = np.triu_indices(len(R), 1)
    difference = R[i] - R[j]
    difference -= length * np.round(difference / length)
    squared = np.einsum("md,md->m", difference, difference)
    diameter = SIGMA[packing.species]
    s = 0.5 * (diameter[i] + diameter[j])
    near = squared < s**2
    i, j, difference, s, r = i[near], j[near], difference[near], s[near], np.sqrt(squared[near])
    normal, force = difference / r[:, None], (1.0 - r / s) / s
    net = np.zeros_like(R)
    np.add.at(net, i, force[:, None] * normal)
    np.add.at(net, j, -force[:, None] * normal)
    return Contacts(i, j, normal, r, s**-2.0, force, net)


def pressure(packing: Packing) -> float:
    c, d = contacts(packing), packing.positions.shape[1]
    return float(np.sum(c.force * c.r)) / (d * packing.length**d)


def backbone(c: Contacts) -> tuple[np.ndarray, np.ndarray]:
    """(rattlers (n,), contacts kept (m,)): fewer than d + 1 contacts, deleted recursively.

    As in mdsens, a contact carries more than 10 times the largest net force.
    """
    n, d = c.net.shape
    kept = c.force > 10.0 * c.largest
    while True:
        count = np.bincount(np.concatenate([c.i[kept], c.j[kept]]), minlength=n)
        loose = count < d + 1
        fewer = kept & ~loose[c.i] & ~loose[c.j]
        if np.array_equal(fewer, kept):
            return count == 0, kept
        kept = fewer


def hessian(c: Contacts, use: np.ndarray, prestressed: np.ndarray) -> sp.csc_matrix:
    """The sum over the contacts in ``use`` of k n n' - (f / r) (1 - n n'),
    the second term of some alone.
    """
    n, d = c.net.shape
    outer = c.normal[use, :, None] * c.normal[use, None, :]
    tension = np.where(prestressed, c.force / c.r, 0.0)[use, None, None]
    block = c.stiffness[use, None, None] * outer - tension * (np.eye(d) - outer)
    i, j = c.i[use], c.j[use]
    first, second = np.concatenate([i, j, i, j]), np.concatenate([i, j, j, i])
    values = np.concatenate([block, block, -block, -block])
    axes = np.arange(d)
    rows = np.broadcast_to(d * first[:, None, None] + axes[:, None], values.shape)
    columns = np.broadcast_to(d * second[:, None, None] + axes[None, :], values.shape)
    return sp.csc_matrix((values.ravel(), (rows.ravel(), columns.ravel())), shape=(n * d, n * d))


def newton_step(packing: Packing, c: Contacts, damping: float) -> Packing:
    """Solve (H + damping) step = force. Rattlers' contacts count without their prestress: never
    unstable, those springs take the rattler to where it touches and no longer pushes.
    """
    _, kept = backbone(c)
    H = hessian(c, np.ones_like(kept), kept) + damping * sp.identity(c.net.size, format="csc")
    push = c.net - c.net.mean(axis=0)
    factor = spl.splu(
        H.tocsc(),
        permc_spec="MMD_AT_PLUS_A",
        diag_pivot_thresh=0.0,
        options={"SymmetricMode": True},
    )
    step = factor.solve(push.ravel()).reshape(push.shape)
    return Packing(packing.positions + step - step.mean(axis=0), packing.length)


def newton(packing: Packing, target: float) -> Packing:
    """Damped Newton steps, each accepted only if the largest force falls;
    ends at the target or where none does.
    """
    damping, c = DAMPING, contacts(packing)
    while c.largest > target and damping < 1e-2:
        trial = newton_step(packing, c, damping)
        after = contacts(trial)
        if after.largest < c.largest:
            packing, c, damping = trial, after, max(0.01 * damping, DAMPING)
        else:
            damping *= 100.0
    return packing


def centered(packing: Packing) -> Packing:
    """Every particle in the image nearest to the origin, where doubles are densest."""
    R, length = packing.positions, packing.length
    return Packing(R - length * np.round(R / length), length)


def relaxed(packing: Packing, scale: float, target: float) -> Packing:
    """FIRE to a fraction of the forces, then Newton to ``target``;
    further FIRE where Newton stops too early.

    It does where a contact opens or closes within a step: the Hessian jumps there,
    and only a small step helps.
    """
    for fraction in np.geomspace(1e-2, 1e-8, 7):
        tolerance = max(float(fraction) * scale, FLOOR)
        eq = ms.minimize(packing.system(), tolerance=tolerance, throw=False, progress=False)
        packing = centered(Packing(np.asarray(eq.positions), packing.length))
        if contacts(packing).largest == 0.0:
            return packing
        packing = newton(packing, target)
        if contacts(packing).largest <= target:
            break
    return packing


def polished(packing: Packing, seed: int, tries: int = 20) -> Packing:
    """Newton steps at round-off from shifted origins;
    the one that leaves the smallest largest force.
    """
    rng = np.random.default_rng(seed)
    best, least = packing, contacts(packing).largest
    for _ in range(tries):
        shift = rng.uniform(-0.5, 0.5, packing.positions.shape[1]) * packing.length
        trial = centered(Packing(best.positions + shift, packing.length))
        trial = newton_step(trial, contacts(trial), DAMPING)
        force = contacts(trial).largest
        if force < least:
            best, least = trial, force
    return best


def decompressed(
    packing: Packing, target: float, accuracy: float, slope: float
) -> tuple[Packing, float]:
    """Widen the box until the pressure is ``target``, by secants;
    also d P / d ln(length) for the next call.
    """
    P = pressure(packing)
    while abs(P / target - 1.0) > accuracy:
        change = (target - P) / slope
        while True:
            trial = relaxed(packing.scaled(packing.length * np.exp(change)), target, 1e-7 * target)
            Q = pressure(trial)
            if Q > 0.2 * target:
                break
            change *= 0.5  # the box fell apart, or nearly
        if abs(Q - P) > 1e-6 * P and (Q - P) / change < 0.0:
            slope = float(np.clip((Q - P) / change, 3.0 * slope, slope / 3.0))
        packing, P = trial, Q
    return packing, slope


def spectrum(packing: Packing) -> tuple[np.ndarray, int, int]:
    """Eigenvalues of the backbone's dense Hessian, rattlers, contacts."""
    c = contacts(packing)
    rattlers, kept = backbone(c)
    free = np.repeat(~rattlers, packing.positions.shape[1])
    dense = hessian(c, kept, kept).toarray()[np.ix_(free, free)]
    return (
        np.linalg.eigvalsh(dense) if free.any() else np.zeros(0),
        int(rattlers.sum()),
        int(kept.sum()),
    )


def chain(dimension: int, n: int, seed: int) -> dict[str, np.ndarray] | None:
    """One seed at all pressures; None where it is not rigid at one of them."""
    diameter = SIGMA[np.arange(n) % 2]
    volume = {2: np.pi / 4, 3: np.pi / 6}[dimension] * np.sum(diameter**dimension)
    length = float((volume / START[dimension]) ** (1 / dimension))
    start = Packing(np.random.default_rng(seed).random((n, dimension)) * length, length)
    packing, slope = relaxed(start, 0.1, 1e-8), -0.5 * dimension
    members = []
    for target in PRESSURES:
        packing, slope = decompressed(packing, 10**0.5 * target, 0.3, slope)
        packing, slope = decompressed(packing, target, ACCURACY, slope)
        final = polished(relaxed(packing, target, FLOOR), seed)
        values, rattlers, count = spectrum(final)
        zero = np.abs(values) < 1e-12 * values[-1] if len(values) else np.zeros(0, bool)
        if (
            zero.sum() != dimension
            or values[0] < -1e-12 * values[-1]
            or contacts(final).largest > FLOOR
        ):
            return None
        system = final.system()
        members.append(
            {
                "positions": final.positions,
                "length": final.length,
                "pressure": float(ms.observables.pressure(system)),
                "max_force": float(max_force(system)),
                "rattlers": rattlers,
                "contacts": count,
                "lambda_min": values[dimension],
                "lambda_max": values[-1],
            }
        )
        packing = final
    stacked = {name: np.stack([np.asarray(m[name]) for m in members]) for name in members[0]}
    return {
        **stacked,
        "sigma": SIGMA,
        "species": (np.arange(n) % 2).astype(np.int8),
        "seed": np.asarray(seed),
    }


def row(name: str, k: int, file: dict[str, np.ndarray]) -> str:
    n, rattlers, count = (
        file["positions"].shape[1],
        int(file["rattlers"][k]),
        int(file["contacts"][k]),
    )
    z = 2 * count / (n - rattlers)
    return (
        f"| `{name}` | {file['pressure'][k]:.4e} | {z:.4f} | {rattlers} "
        f"| {file['lambda_min'][k] / file['lambda_max'][k]:.2e} | {file['max_force'][k]:.1e} |"
    )


def main(names: list[str]) -> None:
    ms.enable_x64()
    for name in names:
        began = time.perf_counter()
        kind, size, *rest = name.split("_")
        seed = int(rest[0].removeprefix("seed")) if rest else 0
        while (file := chain(int(kind[0]), int(size[1:]), seed)) is None:
            print(f"{name}: seed {seed} is not rigid at every pressure")
            seed += 100
        np.savez(HERE / f"{name}.npz", allow_pickle=False, **file)
        for k in range(len(PRESSURES)):
            print(row(name, k, file))
        print(f"{name}: seed {seed}, {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(NAMES))
