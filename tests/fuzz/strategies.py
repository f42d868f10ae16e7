"""Generated systems: shapes, and the cases of each.

A case is a handful of numbers, so that it prints in a few lines and a smaller one is easily found.
All cases of one :class:`Shape` share their compilations.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st
from sample_potentials import POTENTIALS, SCALED, cell_of

import mdsens as ms
from mdsens.implicit import CG, GMRES, MINRES, Auto, BiCGSTAB, Direct, Method

EPS = float(np.finfo(float).eps)


SOLVERS: dict[str, Callable[..., Method]] = {
    "Auto": Auto,
    "Direct": Direct,
    "CG": CG,
    "MINRES": MINRES,
    "GMRES": GMRES,
    "BiCGSTAB": BiCGSTAB,
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """What compiled code depends on; a case varies all else.

    Attributes:
      n, d: particles and dimension.
      potential: a key of ``POTENTIALS``, or "springs" (a chain and random bonds), or "ring" (a
        chain through the cell that closes on its own image), or a sum of keys with " + ".
      box: "open", "cube", "triclinic", "fraction" (follows the packing fraction), "tilted
        fraction", "function".
      sigma, epsilon: "scalar", "species" (two), "particle" or "matrix" (of two species).
      solver: that of the ordinary run; a long one takes ``long_solvers``.
      share: of the cases, relative to the other shapes.
    """

    n: int
    d: int
    potential: str
    box: str
    sigma: str = "scalar"
    epsilon: str = "scalar"
    solver: str = "Auto"
    share: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.potential}, {self.box}, n={self.n}, {self.d}-D"

    @property
    def long_solvers(self) -> tuple[str, ...]:
        """Every other solver, and the other ones for the next shape:
        each pair of them compiles for seconds.
        """
        return tuple(SOLVERS)[LONG_SHAPES.index(self) % 2 :: 2]


SHAPES = (
    Shape(2, 3, "lennard_jones", "open", solver="Auto"),
    Shape(4, 2, "lennard_jones", "open", "species", "matrix", solver="MINRES"),
    Shape(9, 2, "soft_sphere", "cube", "particle", solver="BiCGSTAB"),
    Shape(16, 2, "soft_sphere", "fraction", "species", "matrix", solver="CG"),
    Shape(12, 3, "soft_sphere + springs", "cube", "particle", solver="Direct"),
    Shape(5, 3, "soft_sphere + trap", "open", "particle", solver="GMRES"),
)


LONG_SHAPES = (
    *SHAPES,
    Shape(27, 3, "soft_sphere", "tilted fraction", "particle"),
    Shape(12, 2, "morse", "triclinic", "species", "matrix"),
    Shape(6, 2, "soft_sphere", "cube", "particle"),
    Shape(13, 3, "morse", "open", "species"),
    Shape(8, 2, "springs", "open"),
    Shape(10, 2, "bump", "function", "species", "particle"),
    Shape(6, 2, "mie", "open", "particle", "particle"),
    Shape(5, 2, "embedded", "open"),
    Shape(150, 2, "soft_sphere", "cube", "species", share=0.15),
    Shape(2, 2, "soft_sphere", "open"),
    Shape(3, 2, "soft_sphere", "cube", "particle"),
    Shape(6, 2, "soft_sphere", "triclinic", "species", "species"),
    Shape(8, 3, "soft_sphere", "cube"),
    Shape(64, 3, "soft_sphere", "fraction", "particle", share=0.3),
    Shape(30, 2, "lennard_jones", "cube", "species", "matrix"),
    Shape(4, 3, "morse + trap", "open"),
    Shape(7, 3, "springs", "triclinic"),
    Shape(5, 2, "embedded", "cube"),
    Shape(200, 3, "soft_sphere", "fraction", "species", share=0.05),
    Shape(5, 3, "all pairs", "open"),
    Shape(12, 2, "soft_sphere", "cube"),
    Shape(12, 2, "ring", "cube"),
    Shape(20, 2, "soft_sphere", "cube", "species"),
    Shape(100, 2, "soft_sphere", "cube", share=0.15),
    Shape(1, 2, "soft_sphere", "cube"),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One generated problem.

    Attributes:
      start: "random", "lattice", "collinear", "regular polygon", "twins" (two particles nearly at
        one place), "clumped", "rows" (parallel and evenly spaced), or the fractional coordinates
        themselves.
      jitter: what is added to a lattice, a line or a twin, relative to the cell.
      fill: the packing fraction; density where the potential has no sigma.
      sigma_decades, epsilon_decades: decades between the largest and smallest value.
      length, energy: the units, as powers of ten.
      bond_strain: how far rest lengths are from the distances at the start.
      trap: "round", "plane", "oblique" or "full".
      tolerance: of the relaxation in its units, relative; None for the default.
      pressure: at which the cell is relaxed too, in its units; None for a cell that stays.
      rtol: of the linear solver.
    """

    shape: Shape
    solver: str
    seed: int
    start: str | tuple[float, ...] = "random"
    jitter: float = 0.0
    fill: float = 1.0
    alpha: float = 2.0
    sigma_decades: float = 0.1
    epsilon_decades: float = 0.0
    length: float = 0.0
    energy: float = 0.0
    bond_strain: float = 0.0
    trap: str = "round"
    tolerance: float | None = None
    pressure: float | None = None
    rtol: float = 1e-10
    cotangent: str = "random"
    crowded: bool = False

    def __str__(self) -> str:
        changed = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return "Case(" + ", ".join(f"{name}={getattr(self, name)!r}" for name in changed) + ")"


def cases(shape: Shape, long: bool) -> st.SearchStrategy[Case]:
    """All cases of one shape, the plain ones first."""
    usual = st.sampled_from
    starts: Any = usual(
        ["random", "random", "lattice", "collinear", "twins", "clumped", "regular polygon", "rows"]
    )
    if shape.n <= 4:
        # special numbers, exact duplicates and denormals are what hypothesis draws here
        starts = starts | st.tuples(*[st.floats(0, 1)] * (shape.n * shape.d))
    decades = usual([0.0, 0.1, 0.1, 0.2, 0.5, 1.0, 3.0])
    scaled = all(potential in SCALED for potential in shape.potential.split(" + "))
    lengths = usual([0.0, 0.0, -3.0, 1.0, 3.0, -10.0, 10.0])
    energies = usual([0.0, 0.0, -3.0, 1.0, 3.0, -9.0, -20.0, 10.0])
    # what a cell at a pressure is held to is another oracle's:
    # these cases are judged by their statuses and moduli
    pressed = "soft_sphere" in shape.potential.split(" + ") and shape.box in ("cube", "triclinic")
    return st.builds(
        Case,
        shape=st.just(shape),
        solver=usual(shape.long_solvers if long else (shape.solver,)),
        seed=st.integers(0, 10_000),
        start=starts,
        jitter=usual([0.0, 1e-2, 1e-12, 1e-6, 1e-160]),
        fill=usual([0.9, 1.0, 1.2, 1.6, 2.5, 0.84, 0.6, 0.3, 0.01]) | st.floats(0.3, 3.0),
        alpha=usual([2.0, 2.0, 2.5, 3.0]),
        sigma_decades=decades,
        epsilon_decades=decades,
        length=lengths if scaled else st.just(0.0),
        energy=energies,
        bond_strain=usual([0.0, 0.05, 0.3, -0.3]),
        trap=usual(["round", "plane", "oblique", "full"]),
        tolerance=usual([None, None, 1e-12, 1e-9]),
        pressure=usual([None] * 7 + [1e-2, 1e-4, 1e-9]) if pressed else st.none(),
        rtol=st.just(1e-13 if LONG_SHAPES.index(shape) % 3 == 1 else 1e-10),  # each compiles anew
        cotangent=usual(["random", "random", "one particle", "translation", "zero"]),
        crowded=usual([False] * 9 + [True]),
    )


def _spread(kind: str, base: float, decades: float, n: int, rng: np.random.Generator) -> Any:
    """One parameter in one of its four forms, its largest value ``base``."""
    if kind == "scalar":
        return base
    if kind == "species":
        return base * 10.0 ** -np.array([0.0, decades])
    if kind == "particle":
        u = rng.random(n)
        u[0], u[-1] = 0.0, 1.0
        return base * 10.0 ** (-decades * u)
    return base * 10.0 ** -np.array([[0.0, decades], [decades, decades / 2]])


def _fractions(case: Case, rng: np.random.Generator) -> np.ndarray:
    """The start in units of the cell, (n, d)."""
    n, d = case.shape.n, case.shape.d
    if not isinstance(case.start, str):
        return np.asarray(case.start).reshape(n, d)
    if case.start == "random":
        return rng.random((n, d))
    noise = case.jitter * rng.standard_normal((n, d))
    if case.start == "lattice":
        side = int(np.ceil(n ** (1 / d) - 1e-9))
        return (np.stack(np.unravel_index(np.arange(n), (side,) * d), axis=1) + 0.5) / side + noise
    if case.start == "collinear":
        line = np.full((n, d), 0.5)
        line[:, 0] = (np.arange(n) + 0.5) / n if case.seed % 2 else rng.random(n)
        return line + noise
    if case.start == "regular polygon":
        turn = 2.0 * np.pi * np.arange(n) / n
        places = np.full((n, d), 0.5)
        places[:, 0], places[:, 1] = 0.5 + 0.3 * np.cos(turn), 0.5 + 0.3 * np.sin(turn)
        return places + noise
    if case.start == "rows":
        rows = max(1, round(n**0.5))
        places = np.full((n, d), 0.5)
        places[:, 0] = (np.arange(n) // rows + 0.5) / -(-n // rows)
        places[:, 1] = (np.arange(n) % rows + 0.5) / rows
        return places + noise
    if case.start == "twins":
        places = rng.random((n, d))
        places[-1] = places[0] + noise[0]
        return places
    return 0.5 + 0.1 * rng.standard_normal((n, d))  # clumped


def _bonds(n: int, rng: np.random.Generator) -> np.ndarray:
    """A chain and as many random bonds, repetitions allowed."""
    chain = np.stack([np.arange(n - 1), np.arange(1, n)], axis=1)
    first = rng.integers(0, n, 2 * n)
    second = (first + rng.integers(1, n, 2 * n)) % n
    return np.concatenate([chain, np.stack([first, second], axis=1)])


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What ``System.create`` gets."""

    positions: np.ndarray
    box: Any
    potential: Any
    params: dict[str, Any]
    species: np.ndarray | None


def inputs(case: Case) -> Inputs:
    """The arguments that a case stands for."""
    shape, rng = case.shape, np.random.default_rng(case.seed)
    n, d = shape.n, shape.d
    length, energy = 10.0**case.length, 10.0**case.energy
    names = shape.potential.split(" + ")
    params: dict[str, Any] = {}
    if {"soft_sphere", "lennard_jones", "morse", "bump", "mie"} & set(names):
        params["sigma"] = _spread(shape.sigma, length, case.sigma_decades, n, rng)
        params["epsilon"] = _spread(shape.epsilon, energy, case.epsilon_decades, n, rng)
    if {"soft_sphere", "morse"} & set(names):
        params["alpha"] = case.alpha
    if "morse" in names:
        params["alpha"] = 2.0 * case.alpha / length
    if "embedded" in names:
        params |= {"reach": length, "wanted": 2.0}
    if "all pairs" in names:
        params |= {"size": length, "depth": energy}
    if "trap" in names:
        rows = {
            "round": np.eye(d),
            "plane": np.eye(d)[:1].repeat(d, axis=0),
            "oblique": np.ones((d, d)),
            "full": rng.standard_normal((d, d)),
        }[case.trap]
        params["trap"] = np.sqrt(energy) / length * rows
    two = "species" in (shape.sigma, shape.epsilon) or "matrix" in (shape.sigma, shape.epsilon)
    species = rng.integers(0, 2, n) if two else None
    sizes = np.full(n, length)
    if "sigma" in params:
        sigma = np.asarray(params["sigma"])
        sizes = {"scalar": lambda: np.full(n, sigma), "particle": lambda: sigma}.get(
            shape.sigma, lambda: sigma[species]
        )()
    spheres = np.sum(np.pi / (2 * d) * sizes**d)
    fill = case.fill
    if not case.crowded:  # leave room for twice the range
        widest = max(
            [
                sizes.max(),
                *(2.5 for name in names if name in ("lennard_jones", "mie")),
                *(1.8 for name in names if name == "morse"),
            ]
        )
        fill = min(
            fill,
            spheres
            / (2.02 * widest) ** d
            * (0.6 if shape.box in ("triclinic", "tilted fraction") else 1.0),
        )
    volume = spheres / fill
    cell = np.eye(d)
    if shape.box in ("triclinic", "tilted fraction"):
        cell = np.triu(rng.uniform(-0.4, 0.4, (d, d)), 1) + np.diag(rng.uniform(0.8, 1.2, d))
    cell = cell * (volume / abs(np.linalg.det(cell))) ** (1 / d)
    box: Any = {
        "open": None,
        "cube": cell[0, 0],
        "triclinic": cell,
        "fraction": ms.PackingFraction(fill),
        "tilted fraction": ms.PackingFraction(fill, cell),
        "function": cell_of,
    }[shape.box]
    if shape.box == "function":
        cell = np.asarray(cell_of(params))
    positions = _fractions(case, rng) @ cell.T
    parts = [POTENTIALS[name] for name in names if name not in ("springs", "ring")]
    # each particle next to the one before it, and the last one next to the first one's image
    if "ring" in names:
        positions = (
            np.stack([(np.arange(n) + 0.5) / n, *[np.full(n, 0.5)] * (d - 1)], axis=1)
        ) @ cell.T
        positions = positions + case.jitter * cell[0, 0] * rng.standard_normal((n, d))
    if {"springs", "ring"} & set(names):
        bonds = (
            _bonds(n, rng)
            if "springs" in names
            else np.stack([np.arange(n), (np.arange(n) + 1) % n], axis=1)
        )
        vectors = positions[bonds[:, 0]] - positions[bonds[:, 1]]
        if box is not None:
            vectors = vectors - np.round(vectors @ np.linalg.inv(cell).T) @ cell.T
        strain = case.bond_strain * rng.random(len(bonds))
        params["stiffness"] = _spread(
            "particle", energy / length**2, case.epsilon_decades, len(bonds), rng
        )
        params["length"] = np.linalg.norm(vectors, axis=1) * (1 + strain) + 1e-3 * length
        parts.append(ms.potentials.harmonic_bonds(bonds))
    return Inputs(positions, box, functools.reduce(lambda a, b: a + b, parts), params, species)
