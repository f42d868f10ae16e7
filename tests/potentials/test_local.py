"""Potentials of an atom's surroundings and of all neighbors: a pair potential written as either.

What is right for a sum over pairs is known, so that every function can be compared with it.
"""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mdsens as ms
from mdsens.mechanics.hessian import dense_hessian, sparse_hessian
from mdsens.potentials.catalogue import switched

PAIR = ms.potentials.lennard_jones(1.3, 1.9)
CUT = switched(lambda r, s, e: 4.0 * e * ((s / r) ** 12 - (s / r) ** 6), 1.3, 1.9)
SHAPES = {"sigma": "pair", "epsilon": "pair"}


def half_of_the_pairs(vectors, mask, species_i, species_j, params):
    r = jnp.sqrt(jnp.sum(vectors**2, axis=-1))
    sigma, epsilon = (params[name][species_i, species_j] for name in ("sigma", "epsilon"))
    return 0.5 * jnp.sum(jnp.where(mask, CUT(r, sigma, epsilon), 0.0))


def of_all_edges(edges, params):
    r = jnp.sqrt(jnp.sum(edges.vectors**2, axis=-1))
    kinds = edges.species[edges.i], edges.species[edges.j]
    sigma, epsilon = (params[name][kinds] for name in ("sigma", "epsilon"))
    return 0.5 * jnp.sum(jnp.where(edges.mask, CUT(r, sigma, epsilon), 0.0))


LOCAL = ms.potentials.from_local(
    half_of_the_pairs, ("sigma", "epsilon"), 1.9, breakpoints=(1.3, 1.9), shapes=SHAPES
)
EDGES = ms.potentials.from_edges(
    of_all_edges, ("sigma", "epsilon"), 1.9, breakpoints=(1.3, 1.9), shapes=SHAPES
)
PARAMS = {
    "sigma": np.array([[1.0, 0.9], [0.9, 0.85]]),
    "epsilon": np.array([[1.0, 1.3], [1.3, 0.7]]),
}


@cache
def minimum(potential: ms.potentials.LocalPotential) -> ms.relaxation.Equilibrium:
    """Sixteen particles of two species in a cell smaller than twice the range."""
    rng = np.random.default_rng(4)
    sites = np.stack(np.meshgrid(*[np.arange(4.0)] * 2), -1).reshape(-1, 2)
    places = 0.93 * sites + 0.05 * rng.standard_normal(sites.shape)
    species = np.arange(16) % 3 // 2
    system = ms.System.create(places, 3.72, potential, PARAMS, species)
    assert system.neighbors.images is not None
    return ms.minimize(system, tolerance=1e-11)


@pytest.mark.parametrize("potential", [LOCAL, EDGES], ids=["local", "edges"])
def test_every_derivative_is_that_of_the_sum_over_pairs(potential):
    of_pairs = minimum(PAIR)
    system = of_pairs.system.replace(potential=potential).reallocate()
    eq = ms.minimize(system, tolerance=1e-11)
    expected = of_pairs.system
    assert float(ms.observables.energy(eq.system)) == pytest.approx(
        float(ms.observables.energy(expected)), rel=1e-13
    )
    np.testing.assert_allclose(eq.positions, of_pairs.positions, atol=1e-10)
    hessian = np.asarray(dense_hessian(of_pairs.system))
    got = sparse_hessian(eq.system)
    assert (got is None) == (potential is EDGES)
    if got is not None:
        np.testing.assert_allclose(got.toarray(), hessian, atol=1e-9 * np.abs(hessian).max())
    change = {"sigma": np.array([[0.3, 1.0], [1.0, -0.5]])}
    ours, theirs = ms.jvp(eq, change), ms.jvp(of_pairs, change)
    np.testing.assert_allclose(ours.positions, theirs.positions, atol=1e-8)
    weights = np.random.default_rng(0).standard_normal(eq.positions.shape)
    weights -= weights.mean(axis=0)
    pulled, expected_pull = ms.vjp(eq, weights).value, ms.vjp(of_pairs, weights).value
    for name in PARAMS:
        # a matrix of species need not be symmetric here: its two halves together are the number
        both = pulled[name] + pulled[name].T
        np.testing.assert_allclose(both, 2.0 * expected_pull[name], atol=1e-8)
    # the square lattice resists no shear: its moduli are not stable, and still the same
    tensors = [ms.elasticity.moduli(m, throw=False).tensor for m in (eq, of_pairs)]
    np.testing.assert_allclose(*tensors, rtol=1e-8, atol=1e-7 * np.abs(tensors[1]).max())


def test_the_certificate_sees_the_breakpoints():
    change = {"sigma": np.array([[0.3, 1.0], [1.0, -0.5]])}
    eq = ms.minimize(minimum(PAIR).system.replace(potential=LOCAL).reallocate(), tolerance=1e-11)
    ours = ms.certify(eq, change)
    theirs = ms.certify(minimum(PAIR), change)
    assert ours.derivative is not None and theirs.derivative is not None
    assert ours.derivative.radius == pytest.approx(theirs.derivative.radius, rel=1e-6)
    first = ours.derivative.crossing.first()
    other = theirs.derivative.crossing.first()
    assert first is not None and other is not None and first.distance == other.distance
    assert first.image is not None and sorted(first.pair) == sorted(other.pair)
    assert ours.zero_modes == theirs.zero_modes == 2
    assert ours.stiffness_min == pytest.approx(theirs.stiffness_min, rel=1e-6)


def test_a_sum_of_potentials_and_a_batch():
    of_pairs = minimum(PAIR).system
    both = (
        ms.potentials.from_pair(CUT, ("sigma", "epsilon"), 1.9, (1.3, 1.9), name="pairs").renamed(
            {"sigma": "sigma_2", "epsilon": "epsilon_2"}
        )
        + LOCAL
    )
    params = {**PARAMS, "sigma_2": PARAMS["sigma"], "epsilon_2": PARAMS["epsilon"]}
    system = ms.System.create(of_pairs.positions, of_pairs.box, both, params, of_pairs.species)
    assert not system.potential.pairwise and system.potential.listed
    expected = sparse_hessian(of_pairs)
    got = sparse_hessian(system)
    assert got is not None and expected is not None
    np.testing.assert_allclose(got.toarray(), 2.0 * expected.toarray(), atol=1e-8)
    alone = of_pairs.replace(potential=LOCAL).reallocate()
    batch = ms.stack([alone, alone.replace(positions=alone.positions + 0.01)])
    matrix = sparse_hessian(batch)
    assert matrix is not None
    block = matrix.toarray()[:32, :32]
    np.testing.assert_allclose(block, expected.toarray(), atol=1e-8)


def test_clusters_and_lone_atoms_are_told_apart():
    """Two triangles that do not meet, and an atom far from all."""
    triangle = 0.95 * np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 0.8]])
    places = np.concatenate([triangle, triangle + np.array([5.0, 0.0]), [[0.0, 5.0]]])
    params = {name: np.array([[1.0]]) for name in PARAMS}
    eq = ms.minimize(ms.System.create(places, None, LOCAL, params), tolerance=1e-12)
    null = ms.linearize(eq).null
    assert null.dimensions(2) == (2, 4, 2)
    values = np.linalg.eigvalsh(np.asarray(dense_hessian(eq.system)))
    assert np.sum(np.abs(values) < 1e-9) == 8


def test_the_cutoff_may_follow_the_parameters():
    def energy(vectors, mask, species_i, species_j, params):
        r = jnp.sqrt(jnp.sum(vectors**2, axis=-1))
        gap = jnp.where(mask, params["reach"][species_i, species_j] - r, 0.0)
        return jnp.sum(gap**3)

    potential = ms.potentials.from_local(
        energy, ("reach",), lambda p: p["reach"], shapes={"reach": "pair"}, positive=("reach",)
    )
    places = np.array([[0.0, 0.0], [0.9, 0.0], [1.8, 0.0]])
    reach = np.array([[1.0, 2.0], [2.0, 1.0]])
    system = ms.System.create(places, None, potential, {"reach": reach}, np.array([0, 0, 1]))
    assert float(system.range) == 2.0
    expected = 2 * (0.1**3 + 1.1**3 + 0.2**3)
    assert float(ms.observables.energy(system)) == pytest.approx(expected)
    moved = jax.grad(lambda p: ms.observables.energy(system.replace(params=p)))(system.params)
    expected_matrix = 3 * np.array([[2 * 0.1**2, 1.1**2 + 0.2**2], [1.1**2 + 0.2**2, 0.0]])
    np.testing.assert_allclose(moved["reach"], expected_matrix, rtol=1e-12)


def test_verify_finds_what_is_wrong_with_an_energy():
    places = 0.8 * np.random.default_rng(0).standard_normal((8, 3))

    def checked(fn, **options):
        potential = ms.potentials.from_local(fn, ("k",), 2.0, name="energy", **options)
        result = ms.verify.potential(potential, {"k": 1.0}, positions=places)
        return {finding.check for finding in result.findings if not finding.good}

    def lengths(vectors):
        return jnp.sqrt(jnp.sum(vectors**2, axis=-1))

    def right(vectors, mask, species_i, species_j, params):
        return params["k"] * jnp.sum(jnp.where(mask, (2.0 - lengths(vectors)) ** 3, 0.0)) ** 2

    def quadratic(vectors, mask, species_i, species_j, params):
        return params["k"] * jnp.sum(jnp.where(mask, (2.0 - lengths(vectors)) ** 2, 0.0))

    def unmasked(vectors, mask, species_i, species_j, params):
        return params["k"] * jnp.sum((2.0 - lengths(vectors)) ** 3)

    def singular(vectors, mask, species_i, species_j, params):
        return params["k"] * jnp.log(jnp.sum(jnp.where(mask, (2.0 - lengths(vectors)) ** 3, 0.0)))

    assert checked(right) == set()
    assert checked(quadratic) == {"cutoff"} and checked(quadratic, breakpoints=(2.0,)) == set()
    assert "empty places" in checked(unmasked)
    assert "isolated atom" in checked(singular)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fn": 3.0}, r"`fn` is 3\.0: give a function"),
        ({"parameters": "sigma"}, r"`parameters` is 'sigma': give a tuple of names"),
        ({"cutoff": -1.0}, r"`cutoff` is -1\.0: give a positive length, or a function"),
        ({"breakpoints": (np.inf,)}, r"`breakpoints` is .*: give finite lengths"),
        ({"shapes": {"sgima": "pair"}}, r"`shapes` names 'sgima', which is no parameter"),
        ({"shapes": {"sigma": "matrix"}}, r"has 'matrix' for sigma: give 'pair' or 'triple'"),
        ({"positive": ("alpha",)}, r"`positive` names 'alpha', which is no parameter"),
    ],
)
def test_bad_arguments_are_refused_with_the_remedy(change, message):
    arguments = {
        "fn": half_of_the_pairs,
        "parameters": ("sigma", "epsilon"),
        "cutoff": 1.9,
        **change,
    }
    with pytest.raises(ms.InputError, match=message):
        ms.potentials.from_local(
            arguments.pop("fn"), arguments.pop("parameters"), arguments.pop("cutoff"), **arguments
        )


def test_bad_parameters_are_refused_with_the_remedy():
    places, kinds = np.array([[0.0, 0.0], [1.0, 0.0]]), np.array([0, 1])
    for sigma, message in (
        (np.ones(2), r"sigma has shape \(2,\): give a scalar, or \(2, 2\) for pairs of species"),
        (np.array([[1.0, np.nan], [1.0, 1.0]]), "sigma.* is nan: give a finite number"),
    ):
        with pytest.raises(ms.InputError, match=message):
            ms.System.create(places, None, LOCAL, {"sigma": sigma, "epsilon": 1.0}, kinds)
    potential = ms.potentials.from_local(
        half_of_the_pairs, ("sigma", "epsilon"), lambda p: 2.0 * p["sigma"], shapes=SHAPES
    )
    with pytest.raises(ms.InputError, match="cutoff of half_of_the_pairs is -2 at these"):
        ms.System.create(places, None, potential, {"sigma": -1.0, "epsilon": 1.0})
    with pytest.raises(
        ms.InputError, match=r"positions\[0\] and positions\[1\] are the same point"
    ):
        ms.System.create(np.zeros((2, 2)), None, LOCAL, {"sigma": 1.0, "epsilon": 1.0})


def test_an_energy_that_is_no_number_is_refused():
    """A sum over its entries would be a number, and wrong."""
    places = np.random.default_rng(0).random((6, 3))
    each = ms.potentials.from_local(lambda vectors, *_: vectors, (), 0.6, name="each")
    of_edges = ms.potentials.from_edges(lambda edges, _: edges.vectors, (), 0.6, name="edges")
    for potential, wanted in ((each, "the sum over its neighbors"), (of_edges, "all edges")):
        system = ms.System.create(places, 2.0, potential, {})
        with pytest.raises(ms.InputError, match=f"returned an array of shape .* {wanted}"):
            ms.observables.energy(system)
