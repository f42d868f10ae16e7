"""Potentials of an atom's surroundings: sums over pairs and triples in numpy, values of the
literature, derivatives where an expression is singular, and derivatives by each parameter.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick
from literature import SILICON
from scipy.interpolate import CubicSpline
from surroundings import Atoms, configurations, evaluate, neighbors, surroundings, total

import mdsens as ms
from mdsens.potentials.spline import spline
from mdsens.potentials.tersoff import _bond_order as bond_order
from mdsens.potentials.tersoff import breakpoints

TERSOFF_SILICON = {
    "A": 3264.7,
    "B": 95.373,
    "lambda1": 3.2394,
    "lambda2": 1.3258,
    "lambda3": 1.3258,
    "n": 22.956,
    "beta": 0.33675,
    "gamma": 1.0,
    "c": 4.8381,
    "d": 2.0417,
    "cos_theta0": 0.0,
    "R": 3.0,
    "D": 0.2,
}
COPPER = {"A": 0.0855, "xi": 1.224, "p": 10.960, "q": 2.278, "r0": 3.615 / 2**0.5}
IRON = {
    "A": 1.828905,
    "d": 3.569745,
    "beta": 1.8,
    "c": 3.40,
    "c0": 1.2371147,
    "c1": -0.3592185,
    "c2": -0.0385607,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A potential with its parameters for two species, different in every entry."""

    potential: Any
    params: Mapping[str, np.ndarray]
    spacing: float  # of neighbors

    @property
    def values(self) -> dict[str, jax.Array]:
        return self.potential.values(self.params, 2)

    @property
    def range(self) -> float:
        return float(self.potential.range(self.params))


def varied(potential: Any, params: Mapping[str, float], seed: int) -> dict[str, np.ndarray]:
    """Up to 10 % off in each entry; cos_theta0, which may be zero, by 0.1."""
    random = np.random.default_rng(seed)
    result = {}
    for name, axes in zip(potential.names, potential.axes, strict=True):
        off = random.uniform(-0.1, 0.1, (2,) * (axes or 1))
        value = params[name]
        result[name] = value + off if name == "cos_theta0" else value * (1.0 + off)
    return result


def eam_tables() -> dict[str, np.ndarray]:
    """Smooth tables for two species, zero at 5, with a density for each ordered pair."""
    r = 0.1 * np.arange(51)
    rho = 0.2 * np.arange(61)
    fade = np.clip((5.0 - r) / 1.5, 0.0, 1.0)
    fade = fade**3 * (10.0 - 15.0 * fade + 6.0 * fade**2)
    sizes = np.array([[1.0, 1.2], [0.8, 1.1]])
    density = sizes[..., None] * np.exp(-(r - 2.5)) * fade
    pair = np.array([[1.0, 0.9], [0.9, 1.3]])[..., None] * 3.0 * np.exp(-2.0 * (r - 2.0)) * fade
    embedding = -np.array([[1.0], [1.3]]) * np.sqrt(0.1 + rho) + 0.02 * rho**2
    return {"embedding": embedding, "density": density, "pair": pair}


@cache
def case(name: str) -> Case:
    potentials = ms.potentials
    if name == "Stillinger-Weber":
        potential = potentials.stillinger_weber()
        return Case(potential, varied(potential, SILICON, 1), 2.4)
    if name == "Tersoff":
        potential = potentials.tersoff()
        return Case(potential, varied(potential, TERSOFF_SILICON, 2), 2.3)
    if name == "Tersoff, n < 1":
        # as carbon's bond order, whose derivative by zeta diverges at zero
        potential = potentials.tersoff(1)
        carbon = TERSOFF_SILICON | {"n": 0.7, "beta": 2e-3, "c": 50.0, "lambda3": 0.3}
        return Case(potential, varied(potential, carbon, 3), 2.3)
    if name == "Gupta":
        potential = potentials.gupta(4.0, 5.0)
        return Case(potential, varied(potential, COPPER, 4), 2.6)
    if name == "Finnis-Sinclair":
        potential = potentials.finnis_sinclair()
        return Case(potential, varied(potential, IRON, 5), 2.5)
    return Case(potentials.eam(0.2, 0.1, 5.0), eam_tables(), 2.5)


NAMES = ["Stillinger-Weber", "Tersoff", "Tersoff, n < 1", "Gupta", "Finnis-Sinclair", "eam"]


# References, term by term. ``of`` maps a parameter's name to its values; i, j, k are species.
def near(atoms: Atoms, cutoff: float) -> list[tuple[int, list[tuple[np.ndarray, float, int]]]]:
    """For each atom its species, and vector, distance and species of each neighbor."""
    result = []
    for k, (j, shifts) in enumerate(neighbors(atoms, cutoff)):
        vectors = atoms.positions[j] + shifts - atoms.positions[k]
        lengths = np.linalg.norm(vectors, axis=1)
        species = atoms.species[j]
        result.append((int(atoms.species[k]), list(zip(vectors, lengths, species, strict=True))))
    return result


def stillinger_weber_sum(of: Mapping[str, np.ndarray], atoms: Atoms, cutoff: float) -> float:
    energy = 0.0
    for i, around in near(atoms, cutoff):

        def factor(r: float, j: int, length: float, i: int = i) -> float:
            end = of["a"][i, j] * of["sigma"][i, j]
            return np.exp(length / (r - end)) if r < end else 0.0

        for _, r, j in around:
            s = of["sigma"][i, j]
            powers = of["B"][i, j] * (s / r) ** of["p"][i, j] - (s / r) ** of["q"][i, j]
            energy += 0.5 * of["A"][i, j] * of["epsilon"][i, j, j] * powers * factor(r, j, s)
        for (v, r, j), (w, q, k) in itertools.permutations(around, 2):
            off = v @ w / (r * q) - of["cos_theta0"][i, j, k]
            both = factor(r, j, of["gamma"][i, j] * of["sigma"][i, j])
            both *= factor(q, k, of["gamma"][i, k] * of["sigma"][i, k])
            energy += 0.5 * of["lambda"][i, j, k] * of["epsilon"][i, j, k] * off**2 * both
    return energy


def tersoff_sum(m: int) -> Callable[..., float]:
    def energy_of(of: Mapping[str, np.ndarray], atoms: Atoms, cutoff: float) -> float:
        def fade(r: float, *ijk: int) -> float:
            x = (r - of["R"][ijk]) / of["D"][ijk]
            return 0.5 * (1.0 - np.sin(0.5 * np.pi * np.clip(x, -1.0, 1.0)))

        energy = 0.0
        for i, around in near(atoms, cutoff):
            for index, (v, r, j) in enumerate(around):
                zeta = 0.0
                for other, (w, q, k) in enumerate(around):
                    if other == index:
                        continue
                    c, d = of["c"][i, j, k], of["d"][i, j, k]
                    off = of["cos_theta0"][i, j, k] - v @ w / (r * q)
                    g = of["gamma"][i, j, k] * (1 + c**2 / d**2 - c**2 / (d**2 + off**2))
                    exponent = (of["lambda3"][i, j, k] * (r - q)) ** m
                    zeta += fade(q, i, j, k) * g * np.exp(np.clip(exponent, -69.0776, 69.0776))
                n = of["n"][i, j]
                with np.errstate(over="ignore"):
                    b = (1.0 + (of["beta"][i, j] * zeta) ** n) ** (-0.5 / n)
                bond = of["A"][i, j] * np.exp(-of["lambda1"][i, j] * r)
                bond -= b * of["B"][i, j] * np.exp(-of["lambda2"][i, j] * r)
                energy += 0.5 * fade(r, i, j, j) * bond
        return energy

    return energy_of


def gupta_sum(of: Mapping[str, np.ndarray], atoms: Atoms, cutoff: float) -> float:
    energy = 0.0
    for i, around in near(atoms, cutoff):
        moment = 0.0
        for _, r, j in around:
            x = np.clip(r - 4.0, 0.0, 1.0)
            switch = 1.0 - 10.0 * x**3 + 15.0 * x**4 - 6.0 * x**5
            stretch = r / of["r0"][i, j] - 1.0
            energy += of["A"][i, j] * np.exp(-of["p"][i, j] * stretch) * switch
            moment += of["xi"][i, j] ** 2 * np.exp(-2.0 * of["q"][i, j] * stretch) * switch
        energy -= np.sqrt(moment)
    return energy


def finnis_sinclair_sum(of: Mapping[str, np.ndarray], atoms: Atoms, cutoff: float) -> float:
    energy = 0.0
    for i, around in near(atoms, cutoff):
        density = 0.0
        for _, r, j in around:
            c, d = of["c"][i, j], of["d"][i, j]
            powers = sum(of[f"c{k}"][i, j] * r**k for k in range(3))
            energy += 0.5 * (r - c) ** 2 * powers if r < c else 0.0
            density += (r - d) ** 2 + of["beta"][i, j] * (r - d) ** 3 / d if r < d else 0.0
        energy -= of["A"][i] * np.sqrt(density)
    return energy


def eam_sum(of: Mapping[str, np.ndarray], atoms: Atoms, cutoff: float) -> float:
    r_knots = 0.1 * np.arange(of["density"].shape[-1])
    rho_knots = 0.2 * np.arange(of["embedding"].shape[-1])
    density, pair = (CubicSpline(r_knots, of[name], axis=-1) for name in ("density", "pair"))
    embedding = CubicSpline(rho_knots, of["embedding"], axis=-1)
    energy = 0.0
    for i, around in near(atoms, cutoff):
        rho = sum(density(r)[i, j] for _, r, j in around)
        energy += sum(0.5 * pair(r)[i, j] / r for _, r, j in around)
        end = rho_knots[-1]
        energy += embedding(min(rho, end))[i] + embedding(end, 1)[i] * max(rho - end, 0.0)
    return energy


SUMS = {
    "Stillinger-Weber": stillinger_weber_sum,
    "Tersoff": tersoff_sum(3),
    "Tersoff, n < 1": tersoff_sum(1),
    "Gupta": gupta_sum,
    "Finnis-Sinclair": finnis_sinclair_sum,
    "eam": eam_sum,
}


@pytest.mark.parametrize("name", NAMES)
def test_energies_are_sums_over_pairs_and_triples(name: str) -> None:
    here = case(name)
    atoms = list(configurations(2, here.spacing, seed=7).values())
    results = evaluate(here.potential.fn, here.values, here.range, atoms)
    of = {key: np.asarray(value) for key, value in here.values.items()}
    for each, result in zip(atoms, results, strict=True):
        expected = SUMS[name](of, each, here.range)
        # terms of a few eV per atom, of both signs
        assert result.energy == pytest.approx(expected, rel=1e-13, abs=1e-13 * len(each.species))


@pytest.mark.parametrize("name", NAMES)
def test_forces_virials_and_derivatives_by_parameters_are_differences_of_energies(
    name: str,
) -> None:
    """Along one random direction of all positions, of the strain, and of each parameter."""
    here = case(name)
    atoms = configurations(2, here.spacing, seed=8)["eight in a skewed cell"]
    # no neighbor enters or leaves for so small a change
    lists = jax.tree.map(jnp.asarray, surroundings(atoms, here.range))
    random = np.random.default_rng(9)
    point = (jnp.asarray(atoms.positions), here.values, jnp.zeros((3, 3)))
    energy = jax.jit(lambda x: total(here.potential.fn, x[0], x[1], x[2], lists))
    slope = jax.jit(jax.grad(lambda x: total(here.potential.fn, x[0], x[1], x[2], lists)))(point)
    leaves, structure = jax.tree.flatten(point)
    slopes = jax.tree.leaves(slope)
    assert len(leaves) == 2 + len(here.params)
    for k, leaf in enumerate(leaves):
        # short, so that no pair passes a distance where second derivatives jump
        scale = float(jnp.max(jnp.abs(leaf))) or 1.0
        step = 3e-5 * scale * jnp.asarray(random.uniform(-1.0, 1.0, leaf.shape))

        def at(x: float, k: int = k, step: jax.Array = step) -> float:
            moved = [*leaves]
            moved[k] = leaves[k] + x * step
            return float(energy(jax.tree.unflatten(structure, moved)))

        # of sixth order in the step
        ends = [at(x) - at(-x) for x in (0.25, 0.5, 0.75)]
        difference = (45.0 * ends[0] - 9.0 * ends[1] + ends[2]) / (60.0 * 0.25)
        expected = float(jnp.sum(slopes[k] * step))
        size = float(jnp.linalg.norm(slopes[k].ravel()) * jnp.linalg.norm(step.ravel()))
        assert expected == pytest.approx(difference, abs=1e-7 * size + 1e-11), (name, k)


PLACES = 4


@cache
def third_derivative(name: str) -> Callable[..., Any]:
    """Forward twice over reverse, of one atom's energy, by vectors and parameters together."""
    fn = case(name).potential.fn

    def derivatives(vectors: jax.Array, mask: jax.Array, species: jax.Array, along: Any) -> Any:
        def energy(point: Any) -> jax.Array:
            return fn(point[0], mask, species[0], species[1:], point[1])

        def second(point: Any) -> Any:
            return jax.jvp(jax.grad(energy), (point,), (along,))

        return jax.jvp(second, ((vectors, case(name).values),), (along,))

    return jax.jit(derivatives)


def singular_places(end: float, spacing: float) -> dict[str, list[list[float]]]:
    """Neighbors of one atom; ``end`` is the cutoff of its bond with the last of them."""
    bond = [spacing, 0.0, 0.0]
    places = {"no neighbor": [], "one neighbor": [bond], "in a line": [bond, [-spacing, 0.0, 0.0]]}
    for what, r in {
        "at": end,
        "just inside": np.nextafter(end, 0.0),
        "just outside": np.nextafter(end, 9.0),
        "a part in 1e6 inside": end * (1 - 1e-6),
    }.items():
        places[f"a neighbor {what} the cutoff"] = [[0.0, r, 0.0]]
        places[f"a second neighbor {what} the cutoff"] = [bond, [0.0, r, 0.0]]
    return places


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_are_finite_at_singular_places(name: str) -> None:
    here = case(name)
    reach = here.potential.cutoff
    ends = reach if isinstance(reach, float) else reach(here.values)[0, 1]
    species = jnp.asarray([0, 1, 1, 0, 1])
    random = np.random.default_rng(1)
    along = jax.tree.map(
        lambda x: jnp.asarray(random.uniform(-1, 1, x.shape)),
        (jnp.zeros((PLACES, 3)), here.values),
    )
    for what, places in singular_places(float(ends), here.spacing).items():
        count = len(places)
        # in empty places vectors of half the cutoff
        vectors = np.full((PLACES, 3), here.range / 2 / 3**0.5)
        vectors[:count] = np.reshape(places, (count, 3))
        mask = (np.arange(PLACES) < count) & (np.linalg.norm(vectors, axis=1) < here.range)
        (slope, second), (_, third) = third_derivative(name)(
            jnp.asarray(vectors), jnp.asarray(mask), species, along
        )
        orders = (slope, second, third)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(orders)), what
        assert not any(np.asarray(order[0])[count:].any() for order in orders), what
        # an embedding has a derivative by its table where the density is zero, too
        if count == 0 and name != "eam":
            assert not any(np.any(leaf) for leaf in jax.tree.leaves(orders))


@pytest.mark.parametrize(
    ("spacing", "tolerance"), [(5.431, 1e-13), (5.2, 1e-13)], ids=["at rest", "compressed"]
)
def test_silicon_in_the_diamond_structure(spacing: float, tolerance: float) -> None:
    """Its energy is that of two bonds of depth epsilon an atom, and forces cancel."""
    cell = np.array([[0, 0, 0], [0, 2, 2], [2, 0, 2], [2, 2, 0]])
    places = np.concatenate([cell, cell + 1]) * spacing / 4
    atoms = Atoms(places, np.zeros(8, int), spacing * np.eye(3))
    potential = ms.potentials.stillinger_weber()
    (result,) = evaluate(potential.fn, potential.values(SILICON, 1), 3.77118, [atoms])
    assert np.abs(result.forces).max() < tolerance
    if spacing == 5.431:
        assert result.energy / 8 == pytest.approx(-2 * SILICON["epsilon"], rel=1e-6)
        assert np.abs(result.virial).max() < 0.02


def cubic(basis: list[list[float]], spacing: float) -> Atoms:
    return Atoms(spacing * np.array(basis), np.zeros(len(basis), int), spacing * np.eye(3))


@pytest.mark.parametrize("metal", ["copper", "iron"])
def test_lattice_constants_and_cohesive_energies_of_the_sources(metal: str) -> None:
    """The sources fit the parameters to them: 3.615 A and 3.544 eV, 2.8665 A and 4.28 eV."""
    if metal == "copper":
        basis, spacing = [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]], 3.615
        potential, params, energy = ms.potentials.gupta(5.8, 6.2), COPPER, -3.544
    else:
        basis, spacing = [[0, 0, 0], [0.5, 0.5, 0.5]], 2.8665
        potential, params, energy = ms.potentials.finnis_sinclair(), IRON, -4.28
    reach = float(potential.range(params))
    atoms = cubic(basis, spacing)
    (result,) = evaluate(potential.fn, potential.values(params, 1), reach, [atoms])
    assert result.energy / len(basis) == pytest.approx(energy, abs=5e-4)
    # The strain to the lattice constant at rest is the pressure over three bulk moduli, of more
    # than 100 GPa.
    pressure = 160.2177 * abs(np.trace(result.virial)) / 3 / spacing**3
    assert pressure / (3 * 100) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_system_has_the_same_energy_and_stress(name: str) -> None:
    """Through the neighbor lists of mdsens, with a cutoff for each pair of species."""
    here = case(name)
    atoms = configurations(2, here.spacing, seed=11)["eight in a skewed cell"]
    assert atoms.cell is not None
    (expected,) = evaluate(here.potential.fn, here.values, here.range, [atoms])
    system = ms.System.create(
        atoms.positions, atoms.cell, here.potential, dict(here.params), species=atoms.species
    )
    assert float(ms.observables.energy(system)) == pytest.approx(expected.energy, rel=1e-12)
    stress = np.asarray(ms.observables.stress(system)) * np.linalg.det(atoms.cell)
    np.testing.assert_allclose(stress, expected.virial, atol=1e-11 * np.abs(expected.virial).max())


# In GPa. Stillinger-Weber: Cowley, Phys. Rev. Lett. 60, 2379 (1988). Tersoff: Balamane, Halicioglu
# and Tiller, Phys. Rev. B 46, 2250 (1992). Copper: the source of the parameters.
ELASTIC = {
    "Stillinger-Weber": (151.4, 76.4, 56.4),
    "Tersoff": (121.7, 85.8, 10.3),
    "copper": (176.0, 125.0, 82.0),
}


@pytest.mark.parametrize("name", quick(ELASTIC, "Stillinger-Weber"))
def test_elastic_constants_of_the_literature(name: str) -> None:
    """From disturbed positions, so that the atoms of the diamond structure relax in the strain."""
    face = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    places = {"copper": face}.get(name, np.concatenate([face, face + 0.25]))
    potential, params, spacing = {
        "Stillinger-Weber": (ms.potentials.stillinger_weber(), SILICON, 5.43095),
        "Tersoff": (ms.potentials.tersoff(), TERSOFF_SILICON, 5.432),
        "copper": (ms.potentials.gupta(5.8, 6.2), COPPER, 3.615),
    }[name]
    places = spacing * places + 0.02 * np.random.default_rng(1).normal(size=places.shape)
    system = ms.System.create(places, spacing, potential, params)
    equilibrium = ms.minimize(system, tolerance=1e-10)
    tensor = 160.2177 * np.asarray(ms.elasticity.moduli(equilibrium).tensor)
    found = tensor[0, 0, 0, 0], tensor[0, 0, 1, 1], tensor[0, 1, 0, 1]
    assert found == pytest.approx(ELASTIC[name], rel=5e-3 if name != "copper" else 1e-2)


@pytest.mark.parametrize("count", [4, 5, 6, 33, 34, 200])
def test_splines_are_those_of_scipy(count: int) -> None:
    random = np.random.default_rng(count)
    # a spacing that is a power of two: scipy takes the differences of its knots
    spacing = 0.125
    values = random.normal(size=(2, count))
    theirs = CubicSpline(spacing * np.arange(count), values, axis=1)
    made = spline(jnp.asarray(values), spacing)
    # between knots, where all derivatives exist
    x = spacing * (np.arange(count - 1) + 0.3)
    x = np.concatenate([x, x + 0.6 * spacing])

    def derivatives(place: jax.Array, row: int) -> list[jax.Array]:
        one = jnp.ones(())
        function = lambda z: made(z, row)  # noqa: E731
        results = [function(place)]
        for _ in range(3):
            function = lambda z, of=function: jax.jvp(of, (z,), (one,))[1]  # noqa: E731
            results.append(function(place))
        return results

    mine = jax.jit(jax.vmap(derivatives, (0, None)))
    for row in range(2):
        for order, values_of_order in enumerate(mine(jnp.asarray(x), row)):
            expected = theirs(x, order)[row]
            off = np.abs(np.asarray(values_of_order) - expected).max()
            assert off < 1e-12 * np.abs(expected).max()
    assert made.slope_at_end(1) == pytest.approx(theirs(made.end, 1)[1], rel=1e-12)


@pytest.mark.parametrize("n", [0.7, 22.956])
def test_bond_orders_of_all_sizes_of_zeta(n: float) -> None:
    """By logarithms in numpy: a power of zeta overflows, and its third derivative at small zeta."""
    beta = 0.3
    zeta = np.array([0.0, 5e-324, 1e-300, 1e-60, 1e-12, 0.3, 7.0, 1e30, 1e300])

    def orders(z: jax.Array) -> list[jax.Array]:
        one = jnp.ones(())
        function = lambda x: bond_order(x, jnp.asarray(beta), jnp.asarray(n))  # noqa: E731
        results = [function(z)]
        for _ in range(3):
            function = lambda x, of=function: jax.jvp(of, (x,), (one,))[1]  # noqa: E731
            results.append(function(z))
        return results

    values, *derivatives = jax.jit(jax.vmap(orders))(jnp.asarray(zeta))
    with np.errstate(divide="ignore"):
        logarithms = n * np.log(beta * zeta)
    np.testing.assert_allclose(values, np.exp(-0.5 / n * np.logaddexp(0.0, logarithms)), rtol=1e-13)
    for derivative in derivatives:
        assert np.isfinite(derivative).all()
        # too small to change b
        assert not np.asarray(derivative)[:4].any()


def test_the_exponent_of_zeta_is_limited() -> None:
    """Neighbors at 1.6 and 2.9 with lambda3 = 9: exp(1600) would overflow."""
    places = np.array([[0.0, 0.0, 0.0], [1.6, 0.0, 0.0], [0.0, 2.9, 0.0]])
    atoms = Atoms(places, np.array([0, 1, 0]), None)
    here = case("Tersoff")
    values = here.values | {"lambda3": jnp.full((2, 2, 2), 9.0)}
    (result,) = evaluate(here.potential.fn, values, here.range, [atoms])
    of = {key: np.asarray(value) for key, value in values.items()}
    assert result.energy == pytest.approx(tersoff_sum(3)(of, atoms, here.range), rel=1e-13)
    assert np.isfinite(result.forces).all()


def test_breakpoints_of_tersoff_are_the_ends_of_each_triple_s_range() -> None:
    here = case("Tersoff")
    lengths = np.array(breakpoints(here.values))
    for i, j, k in itertools.product(range(2), repeat=3):
        for sign in (-1.0, 1.0):
            end = here.params["R"][i, j, k] + sign * here.params["D"][i, j, k]
            assert end in lengths[:, i, k]


def test_options_are_checked() -> None:
    with pytest.raises(ms.InputError, match="`m` of tersoff is 2: give 1 or 3"):
        ms.potentials.tersoff(2)
    with pytest.raises(ms.InputError, match="give 0 < onset < cutoff"):
        ms.potentials.gupta(5.0, 4.0)
    with pytest.raises(ms.InputError, match="give a positive number"):
        ms.potentials.eam(0.1, -0.1, 4.0)
    short = {**eam_tables(), "pair": eam_tables()["pair"][..., :40]}
    here = case("eam")
    with pytest.raises(ms.InputError, match=r"table pair of eam ends at 3\.9, before the cutoff 5"):
        evaluate(here.potential.fn, here.potential.values(short, 2), 5.0, [cubic([[0, 0, 0]], 3.0)])
