"""Each potential against its closed form and jax-md's; kinds of parameters, sums, mixing;
every bad input refused by name.
"""

from __future__ import annotations

import dataclasses
import re
from functools import cache, partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative

import mdsens as ms
from mdsens import potentials
from mdsens.model import neighbors
from mdsens.model.system import pair_terms, potential_energy


def derivatives(phi, r, *values):
    """phi, phi' and phi'' at each r."""
    return _derivatives(phi, jnp.asarray(r, float), *(jnp.asarray(v, float) for v in values))


@partial(jax.jit, static_argnums=0)
def _derivatives(phi, r, *values):
    first = jax.grad(phi)
    return jax.vmap(
        lambda s: jnp.stack([phi(s, *values), first(s, *values), jax.grad(first)(s, *values)])
    )(r)


# ── closed forms ──


def soft_sphere_form(r, s, e, a):
    x = np.maximum(1 - r / s, 0)
    return (
        e / a * x**a,
        -e / s * x ** (a - 1),
        np.where(x > 0, e / s**2 * (a - 1) * x ** (a - 2), 0),
    )


def lennard_jones_form(r, s, e):
    q = (s / r) ** 6
    return 4 * e * (q**2 - q), 4 * e / r * (6 * q - 12 * q**2), 4 * e / r**2 * (156 * q**2 - 42 * q)


def morse_form(r, s, e, a):
    b = np.exp(-a * (r - s))
    return e * (b**2 - 2 * b), 2 * e * a * (b - b**2), 2 * e * a**2 * (2 * b**2 - b)


CLOSED = {
    "soft_sphere harmonic": (
        potentials.soft_sphere(),
        soft_sphere_form,
        (1.3, 0.7, 2.0),
        [0.2, 0.9, 1.29, 1.31, 5.0],
    ),
    "soft_sphere Hertzian": (
        potentials.soft_sphere(),
        soft_sphere_form,
        (0.8, 2.0, 2.5),
        [0.2, 0.5, 0.79, 0.81],
    ),
    "lennard_jones": (
        potentials.lennard_jones(),
        lennard_jones_form,
        (1.1, 0.7),
        [0.9, 1.1 * 2 ** (1 / 6), 1.5, 1.99],
    ),
    "morse": (potentials.morse(), morse_form, (1.2, 0.7, 3.0), [0.5, 1.2, 1.7, 1.99]),
}


@pytest.mark.parametrize("case", CLOSED)
def test_energy_force_and_stiffness_are_the_closed_form(case):
    potential, form, values, r = CLOSED[case]
    expected = np.stack(form(np.asarray(r), *values), axis=1)
    np.testing.assert_allclose(
        derivatives(potential.phi, r, *values), expected, rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize("case", CLOSED)
def test_potentials_are_those_of_jax_md(case):
    from jax_md import energy

    potential, _, values, r = CLOSED[case]
    theirs = derivatives(getattr(energy, potential.name), r, *values)
    np.testing.assert_allclose(
        derivatives(potential.phi, r, *values), theirs, rtol=1e-12, atol=1e-13
    )


def test_harmonic_bond_is_the_closed_form():
    potential = potentials.harmonic_bonds(np.array([[0, 1]]))
    got = derivatives(potential.phi, [0.7, 1.3], 3.0, 1.2)
    np.testing.assert_allclose(got, [[1.5 * 0.25, -1.5, 3.0], [1.5 * 0.01, 0.3, 3.0]], rtol=1e-13)


def test_alpha_of_the_soft_sphere_has_both_derivatives_at_and_beyond_contact():
    # jax-md's has NaN tangents there: 0**alpha
    phi = potentials.soft_sphere().phi
    s, e, a = 1.25, 0.7, 2.5
    first = jax.jit(jax.grad(lambda v: phi(*v)))
    second = jax.jit(jax.hessian(lambda v: phi(*v)))
    for r in (s, np.nextafter(s, 2.0), 1.5):
        assert np.array_equal(first(jnp.array([r, s, e, a])), np.zeros(4))
        assert np.array_equal(second(jnp.array([r, s, e, a])), np.zeros((4, 4)))
    r = 0.8
    gradient, hessian = first(jnp.array([r, s, e, a])), second(jnp.array([r, s, e, a]))
    x = 1 - r / s
    by_alpha = e / a * x**a * (np.log(x) - 1 / a)
    twice = e / a * x**a * ((np.log(x) - 1 / a) ** 2 + 1 / a**2)
    assert float(gradient[3]) == pytest.approx(by_alpha, rel=1e-13)
    assert float(hessian[3, 3]) == pytest.approx(twice, rel=1e-13)
    assert float(hessian[0, 3]) == pytest.approx(-e / s * x ** (a - 1) * np.log(x), rel=1e-13)


@pytest.mark.parametrize(
    "potential, bare, values",
    [
        (potentials.lennard_jones(1.3, 1.7), lennard_jones_form, (1.1, 0.7)),
        (potentials.morse(1.3, 1.7), morse_form, (1.2, 0.7, 3.0)),
    ],
)
def test_switch_is_twice_continuously_differentiable(potential, bare, values):
    onset, cutoff = 1.3, 1.7
    around = [np.nextafter(onset, 0), onset, np.nextafter(onset, 2)]
    unswitched = np.stack(bare(np.asarray(around), *values), axis=1)
    assert np.abs(unswitched[:, 2]).min() > 0.1  # a jump would show
    np.testing.assert_allclose(derivatives(potential.phi, around, *values), unswitched, rtol=1e-12)
    around = [np.nextafter(cutoff, 0), cutoff, np.nextafter(cutoff, 2), 3.0]
    np.testing.assert_allclose(
        derivatives(potential.phi, around, *values), np.zeros((4, 3)), atol=1e-11
    )
    # between: half the energy in the middle, where S = 1/2
    middle = 0.5 * (onset + cutoff)
    assert float(potential.phi(middle, *values)) == pytest.approx(
        0.5 * bare(middle, *values)[0], rel=1e-13
    )


WELL = (1.1, 0.3, 5.0, 4.0)  # sigma, epsilon, alpha, stiffness


def harmonic_morse_form(r, s, e, a, k):
    """The spring; the well times the switch, by the product rule."""
    x = np.clip((a * (r - s) - 5.0) / 4.9, 0, 1)
    fades = np.stack(
        [
            1 - x**3 * (10 - 15 * x + 6 * x**2),
            -30 * x**2 * (1 - x) ** 2,
            -60 * x * (1 - x) * (1 - 2 * x),
        ]
    )
    f0, f1, f2 = fades * (a / 4.9) ** np.arange(3)[:, None]
    m0, m1, m2 = morse_form(r, s, e, a)
    well = m0 * f0, m1 * f0 + m0 * f1, m2 * f0 + 2 * m1 * f1 + m0 * f2
    spring = k / 2 * (s - r) ** 2 - e, k * (r - s), np.full_like(r, k)
    return np.where(r < s, spring, well)


def test_harmonic_morse_is_its_equations_on_both_sides_of_every_breakpoint():
    potential, (s, e, a, k) = potentials.harmonic_morse(), WELL
    points = np.array([s, s + 5 / a, s + 9.9 / a])
    np.testing.assert_allclose(potential.breakpoints(*WELL), points, rtol=1e-15)
    sides = np.concatenate([np.nextafter(points, 0), np.nextafter(points, 9)])
    r = np.concatenate([[0.01, 0.4, 1.0, 1.2, 1.6, 2.05, 2.15, 2.6, 3.0, 3.2, 40.0], points, sides])
    got, expected = derivatives(potential.phi, r, *WELL), harmonic_morse_form(r, *WELL).T
    np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-13)
    jumps = np.abs(got[-3:] - got[-6:-3])
    # a jump of the second derivative at contact, and of nothing else
    assert jumps[0, 2] == pytest.approx(abs(2 * a**2 * e - k))
    assert jumps[0, :2].max() < 1e-13 and jumps[1:].max() < 1e-11
    assert not np.any(derivatives(potential.phi, [points[2] * (1 + 1e-15), 9.0], *WELL))


def test_harmonic_morse_has_the_finite_differences_of_its_equations_by_r_and_by_every_parameter():
    potential, h = potentials.harmonic_morse(), 1e-6
    points = np.array(potential.breakpoints(*WELL))
    r = np.concatenate([points - 1e-3, points + 1e-3, [0.3, 1.5, 2.5]])
    by_all = jax.jit(jax.vmap(jax.jacfwd(jax.value_and_grad(lambda v: potential.phi(*v)))))
    value, slope = by_all(
        jnp.stack([jnp.asarray(r), *(jnp.full(r.shape, v) for v in WELL)], axis=1)
    )
    for k in range(5):  # of the energy and of the force
        ahead, behind = (
            harmonic_morse_form(*(v + sign * h * (j == k) for j, v in enumerate((r, *WELL))))
            for sign in (1, -1)
        )
        np.testing.assert_allclose(value[:, k], (ahead[0] - behind[0]) / (2 * h), atol=1e-8)
        np.testing.assert_allclose(slope[:, 0, k], (ahead[1] - behind[1]) / (2 * h), atol=1e-7)


def test_harmonic_morse_has_no_overflow_deep_within_contact():
    steep = (1.0, 0.1, 2000.0, 5.0)  # exp(2 alpha sigma) is inf
    first = jax.grad(lambda v: potentials.harmonic_morse().phi(*v))
    np.testing.assert_allclose(
        first(jnp.array([0.1, *steep])), [-4.5, 4.5, -1.0, 0.0, 0.405], rtol=1e-13
    )


def test_cutoff_of_harmonic_morse_follows_sigma_and_alpha():
    params = {
        "sigma": [0.8, 1.0],
        "epsilon": [[0.1, 0.2], [0.2, 0.3]],
        "alpha": [6.0, 5.0],
        "stiffness": 5.0,
    }
    potential = potentials.harmonic_morse()
    system = ms.System.create(PLACES, 9.0, potential, params, [0, 1, 0, 1])
    assert float(system.range) == pytest.approx(1.0 + 9.9 / 5.0, rel=1e-15)
    (term,) = pair_terms(system)
    lengths = {
        (int(i), int(j)): term.lengths()[:, m]
        for m, (i, j) in enumerate(zip(term.i, term.j, strict=True))
    }
    np.testing.assert_allclose(lengths[0, 1], [0.9, 0.9 + 5 / 5.5, 0.9 + 9.9 / 5.5], rtol=1e-15)


def test_cutoff_does_not_move_with_sigma():
    potential = potentials.lennard_jones()
    assert (
        float(potential.range({"sigma": jnp.asarray([0.9, 1.4]), "epsilon": jnp.asarray(1.0)}))
        == 2.5
    )
    assert float(jax.grad(potential.phi, argnums=1)(2.5, 1.4, 1.0)) == 0.0


# ── kinds of parameters ──

N, BOX = 80, 8.0
SPECIES = np.arange(N) % 3


@cache
def gas():
    """80 discs with three species, by a list and by all pairs;
    Hertzian, so that energies are smooth.
    """
    positions = BOX * np.random.default_rng(3).random((N, 2))
    potential, params = potentials.soft_sphere(), {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.5}
    with mock.patch.object(neighbors, "ALL_PAIRS_BELOW", 32):
        listed = ms.System.create(positions, BOX, potential, params, SPECIES)
    assert not listed.neighbors.complete
    return listed, listed.replace(neighbors=neighbors.all_pairs(N))


value_and_slope = jax.jit(
    jax.value_and_grad(lambda params, system: potential_energy(system, params=params))
)
KINDS = {"scalar": (), "species": (3,), "particle": (N,), "matrix": (3, 3)}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_equal_values_give_the_same_energy(kind):
    reference = value_and_slope(dict(gas()[0].params), gas()[0])
    params = {k: jnp.full(KINDS[kind], v) for k, v in gas()[0].params.items()}
    for system in gas():
        energy, slope = value_and_slope(params, system)
        assert float(energy) == pytest.approx(float(reference[0]), rel=1e-13)
        for name in params:  # moving every entry together is moving the scalar
            assert slope[name].shape == KINDS[kind]
            assert float(jnp.sum(slope[name])) == pytest.approx(
                float(reference[1][name]), rel=1e-11
            )


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_by_a_parameter_is_the_finite_difference_with_and_without_a_list(kind):
    # jax-md's differ by a factor of 2 between its two forms
    rng = np.random.default_rng(4)
    params, step = {}, {}
    for name, value in gas()[0].params.items():
        noise, direction = rng.uniform(-0.1, 0.1, KINDS[kind]), rng.uniform(-1, 1, KINDS[kind])
        if kind == "matrix":
            noise = 0.5 * (noise + noise.T)
        params[name], step[name] = value * (1 + noise), value * direction
    values = [value_and_slope(params, system) for system in gas()]
    assert float(values[0][0]) == pytest.approx(float(values[1][0]), rel=1e-13)
    for name in params:
        assert relative(values[0][1][name], values[1][1][name]) < 1e-12
    h = 1e-5
    for system, (_, slope) in zip(gas(), values, strict=True):
        for name in params:  # one at a time: no name may hide behind another
            ahead, behind = (
                value_and_slope({**params, name: params[name] + s * h * step[name]}, system)[0]
                for s in (1, -1)
            )
            exact = float(jnp.sum(slope[name] * step[name]))
            assert abs(float(ahead - behind) / (2 * h) - exact) < 1e-7 * float(
                jnp.sum(jnp.abs(slope[name]))
            )


def test_a_matrix_counts_symmetrically():
    matrix = jnp.asarray([[1.0, 0.9, 1.1], [0.9, 1.2, 0.8], [1.1, 0.8, 0.95]])
    slope = value_and_slope({**gas()[0].params, "sigma": matrix}, gas()[0])[1]["sigma"]
    np.testing.assert_allclose(slope, slope.T, rtol=1e-12)


def test_species_win_where_there_are_as_many_as_particles():
    positions = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.5]])
    species, sigma = np.array([2, 0, 1]), np.array([1.0, 2.0, 3.0])
    params = {"sigma": sigma, "epsilon": 1.0, "alpha": 2.0}
    system = ms.System.create(positions, None, potentials.soft_sphere(), params, species)
    np.testing.assert_array_equal(np.asarray(system.diameters), sigma[species])
    r = np.array([1.0, 1.5, np.hypot(1.0, 1.5)])
    sums = 0.5 * (sigma[species][[0, 0, 1]] + sigma[species][[1, 2, 2]])
    expected = np.sum(0.5 * np.maximum(1 - r / sums, 0) ** 2)
    assert float(potential_energy(system)) == pytest.approx(expected, rel=1e-14)
    assert float(potential_energy(system.replace(species=None))) != pytest.approx(
        expected, rel=1e-3
    )


# ── mixing, sums, own potentials ──


def power(r, sigma, epsilon):
    """A user's own potential: epsilon (1 - (r / sigma)^2)^3 inside sigma."""
    return epsilon * jnp.maximum(1.0 - (r / sigma) ** 2, 0.0) ** 3


def contact(sigma, epsilon):
    return (sigma,)


def reach(sigma, epsilon):
    return sigma


def own_potential(mixing=None):
    return potentials.from_pair(
        power, ("sigma", "epsilon"), cutoff=reach, breakpoints=contact, mixing=mixing
    )


def test_own_pair_potential_with_geometric_mixing():
    positions = np.array([[0.0, 0.0, 0.0], [0.6, 0.0, 0.0], [0.0, 0.7, 0.0]])
    sigma, epsilon = np.array([1.0, 0.8, 1.4]), np.array([1.0, 4.0, 9.0])
    potential = own_potential({"epsilon": potentials.geometric})
    system = ms.System.create(positions, 6.0, potential, {"sigma": sigma, "epsilon": epsilon})
    i, j = np.array([0, 0, 1]), np.array([1, 2, 2])
    mean, depth = 0.5 * (sigma[i] + sigma[j]), np.array([2.0, 3.0, 6.0])
    r = np.linalg.norm(positions[i] - positions[j], axis=1)
    expected = np.sum(depth * np.maximum(1 - (r / mean) ** 2, 0) ** 3)
    assert float(potential_energy(system)) == pytest.approx(expected, rel=1e-14)
    (term,) = pair_terms(system)
    of_pair = {(int(a), int(b)): length for a, b, length in zip(i, j, mean, strict=True)}
    listed = zip(term.i[term.mask], term.j[term.mask], term.lengths()[0, term.mask], strict=True)
    assert {(int(a), int(b)): pytest.approx(float(length)) for a, b, length in listed} == of_pair
    # the range of the largest value, which no pair of different particles exceeds
    assert float(system.range) == 1.4


def test_breakpoints_as_lengths():
    potential = potentials.from_pair(
        power, ("sigma", "epsilon"), cutoff=2.0, breakpoints=(0.5, 2.0)
    )
    system = ms.System.create(
        [[0.0, 0.0], [1.0, 0.0]], None, potential, {"sigma": 2.0, "epsilon": 1.0}
    )
    (term,) = pair_terms(system)
    np.testing.assert_array_equal(term.lengths()[:, term.mask], [[0.5], [2.0]])


def test_infinite_range_takes_all_pairs():
    potential = potentials.from_pair(inverse, ("charge",))
    positions = np.random.default_rng(0).random((70, 3))
    system = ms.System.create(positions, None, potential, {"charge": 2.0})
    i, j = np.triu_indices(70, 1)
    expected = np.sum(2.0 / np.linalg.norm(positions[i] - positions[j], axis=1))
    assert float(potential_energy(system)) == pytest.approx(expected, rel=1e-13)


def inverse(r, charge):
    return charge / r


def test_sum_of_potentials_is_the_sum_of_energies():
    positions = np.random.default_rng(1).random((6, 2)) * 2.0
    bonds = np.array([[0, 1], [2, 5], [3, 4]])
    springs = {"stiffness": np.array([1.0, 2.0, 3.0]), "length": 0.7}
    discs = {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0}
    both = potentials.soft_sphere() + potentials.harmonic_bonds(bonds)
    assert both.parameters == ("sigma", "epsilon", "alpha", "stiffness", "length")
    assert not both.repulsive and both.pairwise
    parts = [
        ms.System.create(positions, 6.0, potentials.soft_sphere(), discs),
        ms.System.create(positions, 6.0, potentials.harmonic_bonds(bonds), springs),
    ]
    whole = ms.System.create(positions, 6.0, both, {**discs, **springs})
    assert float(potential_energy(whole)) == pytest.approx(
        sum(float(potential_energy(p)) for p in parts), rel=1e-14
    )
    r = np.linalg.norm(positions[bonds[:, 0]] - positions[bonds[:, 1]], axis=1)
    expected = np.sum(0.5 * springs["stiffness"] * (r - 0.7) ** 2)
    assert float(potential_energy(parts[1])) == pytest.approx(expected, rel=1e-13)


def test_name_conflict_is_refused_and_renaming_resolves_it():
    with pytest.raises(
        ms.InputError, match=r"soft_sphere and lennard_jones both have a parameter 'sigma'.*renamed"
    ):
        _ = potentials.soft_sphere() + potentials.lennard_jones()
    attraction = potentials.lennard_jones().renamed({"sigma": "sigma_lj", "epsilon": "epsilon_lj"})
    potential = potentials.soft_sphere() + attraction
    params = {"sigma": 1.2, "epsilon": 1.0, "alpha": 2.0, "sigma_lj": 1.0, "epsilon_lj": 0.3}
    system = ms.System.create([[0.0, 0.0], [1.1, 0.0]], None, potential, params)
    expected = soft_sphere_form(1.1, 1.2, 1.0, 2.0)[0] + lennard_jones_form(1.1, 1.0, 0.3)[0]
    assert float(potential_energy(system)) == pytest.approx(expected, rel=1e-13)


def test_a_renamed_exponent_still_makes_the_cheapest_form():
    """And two names that are exchanged are not mixed up."""
    renamed = potentials.soft_sphere().renamed({"alpha": "sigma", "sigma": "alpha"})
    at = {"alpha": jnp.asarray(1.0), "sigma": jnp.asarray(2.5), "epsilon": jnp.asarray(1.0)}
    cheapest = renamed.specialize(at)
    assert cheapest.phi is not renamed.phi
    assert float(cheapest.phi(0.8, 1.0, 1.0, 2.5)) == pytest.approx(0.4 * 0.2**2.5)
    assert renamed.specialize({**at, "sigma": jnp.asarray(3.0)}).phi is renamed.phi


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            {"sgima": "s"},
            "no parameter 'sgima' to rename: its parameters are sigma",
        ),
        ({"sigma": "epsilon"}, "two parameters of soft_sphere would be named 'epsilon'"),
    ],
)
def test_bad_names_of_parameters_are_refused(names, message):
    with pytest.raises(ms.InputError, match=message):
        potentials.soft_sphere().renamed(names)


def silicon(positions, params, displacement):
    from jax_md import energy

    return energy.stillinger_weber(displacement, sigma=2.0951, epsilon=params["well"])(positions)


def test_many_body_potential_of_jax_md():
    from jax_md import energy, space

    positions = jnp.asarray(np.random.default_rng(2).random((5, 3)) * 4.0)
    potential = potentials.from_energy(silicon, ("well",))
    assert not potential.pairwise
    system = ms.System.create(positions, None, potential, {"well": 2.0})
    theirs = energy.stillinger_weber(space.free()[0], epsilon=2.0)(positions)
    energy_, slope = jax.value_and_grad(lambda p: potential_energy(system, params=p))(
        dict(system.params)
    )
    assert float(energy_) == pytest.approx(float(theirs), rel=1e-13)
    # the energy is linear in it
    assert float(slope["well"]) == pytest.approx(float(theirs) / 2.0, rel=1e-12)


# ── potentials are values ──

MAKERS = {
    "soft_sphere": lambda: potentials.soft_sphere(),
    "lennard_jones": lambda: potentials.lennard_jones(2.0, 2.4),
    "morse": lambda: potentials.morse(),
    "harmonic_morse": lambda: potentials.harmonic_morse(),
    "from_pair": lambda: own_potential({"epsilon": potentials.geometric}),
    "from_energy": lambda: potentials.from_energy(silicon, ("well",)),
    "sum": lambda: (
        potentials.soft_sphere()
        + potentials.lennard_jones().renamed({"sigma": "s", "epsilon": "e"})
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_potentials_made_alike_are_equal(name):
    one, other = MAKERS[name](), MAKERS[name]()
    assert one is not other and one == other and hash(one) == hash(other)
    assert jax.tree.structure(one) == jax.tree.structure(other)


def test_potentials_with_other_options_differ():
    assert potentials.lennard_jones(2.0, 2.4) != potentials.lennard_jones(2.0, 2.5)
    bonds = np.array([[0, 1]])
    assert jax.tree.structure(potentials.harmonic_bonds(bonds)) == jax.tree.structure(
        potentials.harmonic_bonds(bonds)
    )
    springs = potentials.harmonic_bonds(bonds)
    assert springs != dataclasses.replace(springs, above=tuple(-1.0 for _ in springs.above))


def test_a_system_built_twice_compiles_once():
    traced = []

    @jax.jit
    def energy(system):
        traced.append(1)
        return potential_energy(system)

    bonds = np.array([[0, 1], [1, 2]])
    for stretch in (1.0, 1.1):
        potential = potentials.lennard_jones() + potentials.harmonic_bonds(bonds)
        params = {"sigma": stretch, "epsilon": 1.0, "stiffness": 1.0, "length": 1.0}
        energy(
            ms.System.create(stretch * np.array([[0.0, 0], [1, 0], [0, 1]]), 9.0, potential, params)
        )
    assert len(traced) == 1


# ── bad input ──

DISCS = {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0}
PLACES = [[0.0, 0.0], [0.9, 0.0], [0.0, 0.9], [2.0, 2.0]]


@pytest.mark.parametrize(
    "changes, species, message",
    [
        ({"sgima": 1.0}, None, r"no parameter 'sgima' .*did you mean 'sigma'\?"),
        (
            {"pressure": 1.0},
            None,
            r"no parameter 'pressure' .*'sigma', 'epsilon', 'alpha'.*remove it",
        ),
        ({"alpha": None}, None, r"needs the parameter 'alpha': give params\['alpha'\]"),
        ({"sigma": [1.0, 2.0]}, None, r"sigma has shape \(2,\): give a scalar, \(4,\).*species"),
        (
            {"sigma": [1.0]},
            [0, 1, 0, 1],
            r"sigma has shape \(1,\): give .*\(2,\) for one value per species or \(2, 2\)",
        ),
        ({"sigma": np.ones((4, 4))}, None, r"sigma has shape \(4, 4\): give a scalar"),
        (
            {"sigma": np.ones((2, 2, 2))},
            [0, 1, 0, 1],
            r"sigma has shape \(2, 2, 2\): give .*\(2, 2\) for species pairs",
        ),
        (
            {"sigma": [[1.0, 2.0], [1.5, 1.0]]},
            [0, 1, 0, 1],
            r"sigma is not symmetric: give a symmetric \(2, 2\)",
        ),
        ({"sigma": [1.0, np.nan, 1.0, 1.0]}, None, r"sigma\[1\] is nan: give a positive number"),
        ({"epsilon": np.inf}, None, r"epsilon is inf: give a positive number"),
        ({"sigma": [1.0, 1.0, -0.5, 1.0]}, None, r"sigma\[2\] is -0.5: give a positive number"),
        ({"sigma": 0.0}, None, r"sigma is 0.0: give a positive number"),
        ({"sigma": "large"}, None, r"sigma is 'large': give numbers"),
    ],
)
def test_bad_parameters_are_refused_by_name_value_and_remedy(changes, species, message):
    params = {k: v for k, v in {**DISCS, **changes}.items() if v is not None}
    with pytest.raises(ms.InputError, match=message):
        ms.System.create(PLACES, None, potentials.soft_sphere(), params, species)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: potentials.lennard_jones(2.5, 2.5),
            r"`onset` is 2.5 and `cutoff` is 2.5: give 0 < onset < cutoff",
        ),
        (lambda: potentials.morse(0.0, 2.5), r"`onset` is 0.0 and `cutoff` is 2.5: give 0 < onset"),
        (
            lambda: potentials.lennard_jones(2.0, np.inf),
            r"`onset` is 2.0 and `cutoff` is inf: give 0 < onset < cutoff",
        ),
        (
            lambda: potentials.switched(power, 3.0, 2.0),
            r"`onset` is 3.0 and `cutoff` is 2.0: give 0 < onset < cutoff",
        ),
        (
            lambda: potentials.from_pair(power, ("sigma", "epsilon"), cutoff=-1.0),
            r"`cutoff` is -1.0: give a positive length",
        ),
        (
            lambda: own_potential({"epsillon": potentials.geometric}),
            r"'epsillon', which is no parameter: use one of sigma",
        ),
        (
            lambda: potentials.harmonic_bonds([[0, 1, 2]]),
            r"`bonds` has shape \(1, 3\).*give integers of shape \(m, 2\)",
        ),
        (
            lambda: potentials.harmonic_bonds([[0.0, 1.0]]),
            r"`bonds` has shape \(1, 2\) and type float64: give integers",
        ),
        (
            lambda: potentials.harmonic_bonds([[0, 1], [2, 2]]),
            r"bond 1 joins a particle to itself: remove this bond",
        ),
    ],
)
def test_bad_potentials_are_refused_when_made(make, message):
    with pytest.raises(ms.InputError, match=message):
        make()


@pytest.mark.parametrize(
    "bonds, params, message",
    [
        ([[0, 4]], {}, r"`bonds` names particle 4, but there are 4 particles: use indices 0 to 3"),
        ([[-1, 2]], {}, r"`bonds` names particle -1, but there are 4 particles: use indices 0"),
        (
            [[0, 1]],
            {"stiffness": [1.0, 2.0]},
            r"stiffness has shape \(2,\): give a scalar, or \(1,\) for one value per bond",
        ),
        ([[0, 1]], {"length": -1.0}, r"length is -1.0: give a positive number"),
    ],
)
def test_bad_bonds_are_refused_with_the_system(bonds, params, message):
    with pytest.raises(ms.InputError, match=message):
        ms.System.create(
            PLACES,
            None,
            potentials.harmonic_bonds(bonds),
            {"stiffness": 1.0, "length": 1.0, **params},
        )


def test_mixing_outside_its_two_values_is_refused():
    params = {"sigma": [1.0, 2.0, 1.0, 1.0], "epsilon": 1.0}
    with pytest.raises(
        ms.InputError,
        match=r"mixing of sigma gives 3.0 from 1.0 and 2.0: the result must lie between.*matrix",
    ):
        ms.System.create(PLACES, None, own_potential({"sigma": jnp.add}), params)


def test_parameters_of_a_many_body_potential_must_be_finite():
    with pytest.raises(ms.InputError, match=r"well is nan: give a finite number"):
        ms.System.create(
            np.eye(3), None, potentials.from_energy(silicon, ("well",)), {"well": np.nan}
        )


def test_what_no_minimum_can_stand_on_is_refused() -> None:
    points, box = np.array([[0.0, 0.0], [1.4, 0.0]]), 5.0
    with pytest.raises(ms.InputError, match=r"alpha is 1\.0: give a number above 1"):
        ms.System.create(
            points, box, potentials.soft_sphere(), {"sigma": 1.5, "epsilon": 1.0, "alpha": 1.0}
        )
    jumping = potentials.from_pair(lambda r, a: a / r, ("a",), cutoff=2.0, name="bare")
    with pytest.raises(ms.InputError, match=r"bare is 0\.5 at its cutoff 2, where it must be zero"):
        ms.System.create(points, box, jumping, {"a": 1.0})
    with pytest.raises(ms.InputError, match="`phi` does not take r and the 1 parameters a"):
        potentials.from_pair(lambda r, a, b: a / r + b, ("a",), cutoff=2.0)


def test_the_cheapest_form_keeps_the_derivatives_that_are_asked_for():
    potential, r = ms.potentials.soft_sphere(), jnp.asarray([0.4, 0.9, 1.2])
    values = {"sigma": jnp.asarray(1.1), "epsilon": jnp.asarray(0.7), "alpha": jnp.asarray(2.0)}

    def derivative(of, name):
        return jax.jacobian(lambda x: of.phi(r, *({**values, name: x}[k] for k in of.names)))(
            values[name]
        )

    assert potential.specialize(values).phi is not potential.phi
    assert potential.specialize({**values, "alpha": jnp.asarray(2.2)}) == potential
    for name in values:
        np.testing.assert_allclose(
            derivative(potential.specialize(values, (name,)), name),
            derivative(potential, name),
            rtol=1e-14,
        )
    assert not np.any(derivative(potential.specialize(values), "alpha")) and np.any(
        derivative(potential, "alpha")
    )


# ── a potential is tried before it is used ──


def hertzian(r, sigma):
    return jnp.where(r < sigma, jnp.where(r < sigma, 1.0 - r / sigma, 1.0) ** 2.5, 0.0)


def hertzian_unguarded(r, sigma):
    return jnp.where(r < sigma, (1.0 - r / sigma) ** 2.5, 0.0)


def hertzian_clipped(r, sigma):
    """Its third derivative is 0 times infinity wherever two do not touch."""
    return jnp.maximum(1.0 - r / sigma, 0.0) ** 2.5


def logarithm(r, sigma):
    return (sigma - r) ** 2 * jnp.log(jnp.maximum(sigma - r, 0.0) / sigma)


def bump(r, sigma):
    """All its derivatives vanish at its end, where this one divides by zero."""
    return jnp.where(r < sigma, jnp.exp(-1.0 / (1.0 - (r / sigma) ** 2)), 0.0)


def open_end(r, sigma):
    return (1.0 - r / sigma) ** 2


def imaginary(r, sigma):
    return (1.0 - r / sigma + 0j) ** 2.5


def added(r, sigma):
    return jnp.sum(jnp.maximum(1.0 - r / sigma, 0.0) ** 4, axis=0)


def truth(r, sigma):
    return r < sigma


def steep(r, sigma):
    """Overflows at half its range."""
    return (sigma / r) ** 2000 * jnp.maximum(1.0 - r / sigma, 0.0) ** 4


def stepped(r, sigma):
    """A well whose bottom has a kink, and which ends with a slope."""
    return jnp.minimum(jnp.abs(r - 0.71 * sigma), 0.29 * sigma) - 0.29 * sigma


def first(sigma):
    return sigma


def on_points(potential, params):
    points = np.array([[0.0, 0.0], [0.7, 0.1], [0.2, 0.8]])
    return ms.System.create(points, 5.0, potential, params)


GUARD = "where() takes derivatives of both its sides, so guard the argument inside of it as well"
BEYOND = "at r = 1.284 with sigma = 1.2, beyond its cutoff, where it must be zero"
UNFIT = {
    logarithm: (1.2, f"mine is nan at its cutoff 1.2, where it must be zero: {GUARD}."),
    hertzian_unguarded: (1.2, f"phi' of mine is nan {BEYOND}: {GUARD}."),
    hertzian_clipped: (1.2, f"phi''' of mine is nan {BEYOND}: {GUARD}."),
    bump: (
        1.0,
        (
            "phi' of mine is nan at r = 1 with sigma = 1, the distance that stands in the empty"
            " places of lists"
        ),
    ),
    open_end: (
        1.2,
        (
            f"phi of mine is 0.0049 {BEYOND}: take jnp.where(r < cutoff, ..., 0), or wrap it,"
            " ms.potentials."
        ),
    ),
    imaginary: (1.2, "phi of mine returns complex128: return real floating-point numbers."),
    added: (
        1.2,
        "phi of mine returns shape () for distances of shape (4,): return one number for each",
    ),
    truth: (1.2, "phi of mine returns bool: return real floating-point numbers."),
}


@pytest.mark.parametrize("phi", UNFIT)
def test_a_pair_potential_that_is_no_number_is_refused_with_the_system(phi):
    sigma, message = UNFIT[phi]
    potential = potentials.from_pair(phi, ("sigma",), first, name="mine")
    with pytest.raises(ms.InputError, match=re.escape(message)) as error:
        on_points(potential, {"sigma": sigma})
    assert "\n" not in str(error.value)
    with pytest.raises(ms.InputError, match=re.escape(message)):  # of a sum, the one of them
        on_points(
            potentials.harmonic_bonds([[0, 1]]) + potential,
            {"sigma": sigma, "stiffness": 1.0, "length": 1.0},
        )


@pytest.mark.parametrize(
    "phi, sigma", [(hertzian, 1.0), (hertzian, 1.2), (bump, 1.2), (steep, 1.2), (stepped, 1.0)]
)
def test_what_a_pair_potential_may_do_is_taken(phi, sigma):
    """A third derivative that diverges at contact, a core that overflows,
    kinks, a slope at the end.
    """
    on_points(
        potentials.from_pair(phi, ("sigma",), first, lambda s: (0.71 * s, s)), {"sigma": sigma}
    )


def test_every_kind_of_pair_is_tried():
    """Of species one by one: what is no number for one kind alone is refused for that kind."""
    potential = potentials.from_pair(
        lambda r, a: jnp.maximum(1.0 - r, 0.0) ** 4 * jnp.sqrt(a), ("a",), 1.0, name="mine"
    )
    species = np.zeros(200, int)
    species[[57, 133]] = 1
    points = 10.0 * np.random.default_rng(0).random((200, 2))
    ms.System.create(points, 10.0, potential, {"a": [[1.0, 2.0], [2.0, 4.0]]}, species)
    wrong = {"a": [[1.0, 2.0], [2.0, -1.0]]}
    with pytest.raises(
        ms.InputError, match=r"phi of mine is nan at r = 0\.53 with a = -1, within its cutoff"
    ):
        ms.System.create(points, 10.0, potential, wrong, species)
    species[133] = 0  # then there is no such pair
    ms.System.create(points, 10.0, potential, wrong, species)
    values = np.linspace(1.0, 2.0, 200)
    values[101] = -3.0
    with pytest.raises(ms.InputError, match="phi of mine is nan at"):
        ms.System.create(points, 10.0, potential, {"a": values})


def test_a_potential_without_a_cutoff_is_tried_where_particles_stand():
    chain = potentials.from_pair(
        lambda r, reach: -jnp.log(1.0 - (r / reach) ** 2), ("reach",), name="chain"
    )
    points = np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    ms.System.create(points, None, chain, {"reach": 2.1})
    with pytest.raises(
        ms.InputError,
        match=r"phi of chain is nan at r = 2 with reach = 1\.5, where particles stand: ",
    ):
        ms.System.create(points, None, chain, {"reach": 1.5})


def test_lengths_that_are_no_numbers_are_refused():
    def reach(s):
        return jnp.sqrt(s - 2.0)

    phi = potentials.switched(inverse, 1.0, 2.0)
    potential = potentials.from_pair(phi, ("s",), 2.0, lambda s: (reach(s),), name="mine")
    on_points(potential, {"s": 6.0})
    with pytest.raises(
        ms.InputError, match="function of the breakpoints of mine gives nan: correct this function"
    ):
        on_points(potential, {"s": 1.0})
    potential = potentials.from_pair(phi, ("s",), reach, name="mine")
    system = on_points(potential, {"s": 6.0})
    for make in (lambda: on_points(potential, {"s": 1.0}), lambda: system.with_params({"s": 1.0})):
        with pytest.raises(
            ms.InputError, match="mine is nan at its cutoff nan, where it must be zero"
        ):
            make()


@pytest.mark.parametrize(
    "fn, message",
    [
        (
            lambda R, p, d: jnp.sum(R**2, axis=1),
            "the energy mine returns float64 of shape (3,): return one real number",
        ),
        (
            lambda R, p, d: jnp.sum(jnp.sqrt(R + 0j)),
            "the energy mine returns complex128 of shape (): return one real",
        ),
    ],
)
def test_an_energy_that_is_no_number_is_refused_with_the_system(fn, message):
    with pytest.raises(ms.InputError, match=re.escape(message)):
        on_points(potentials.from_energy(fn, (), name="mine"), {})


def looped(R, p, d):
    """The distance of a particle to itself is among those summed, and its root has no slope."""
    r = jnp.sqrt(jnp.sum((R[:, None] - R[None]) ** 2, axis=-1))
    return p["k"] * jnp.sum(jnp.where(r > 0, (r - 1.0) ** 2, 0.0))


def bent(R, p, d):
    """A force without a slope wherever a coordinate is negative."""
    return p["k"] * jnp.sum(jnp.maximum(R, 0.0) ** 1.5) + jnp.sum((R - p["at"]) ** 2)


def test_what_ends_in_not_finite_names_the_potential():
    loop = potentials.lennard_jones() + potentials.from_energy(looped, ("k",))
    with pytest.raises(
        ms.ConvergenceError,
        match=r"max_force nan, where a force of looped is nan at these positions although .*r2 > 0",
    ):
        ms.minimize(on_points(loop, {"k": 1.0, "sigma": 1.0, "epsilon": 1.0}))
    near = ms.System.create(
        [[0.0, 0.0], [1e-40, 0.0]], None, potentials.lennard_jones(), {"sigma": 1.0, "epsilon": 1.0}
    )
    for take in (
        lambda: ms.minimize(near),
        lambda: ms.minimize(ms.stack([near] * 2)),
        lambda: ms.find_saddle(near),
    ):
        with pytest.raises(
            ms.ConvergenceError,
            match=r", where phi of lennard_jones is \S+ at r = 1e-40, the distance",
        ):
            take()
    rest = ms.minimize(on_points(potentials.from_energy(bent, ("k", "at")), {"k": 1.0, "at": -1.0}))
    for call in (lambda: ms.jvp(rest, {"at": 1.0}), lambda: ms.elasticity.moduli(rest)):
        with pytest.raises(
            ms.ConvergenceError, match="where the Hessian of bent is nan at these positions"
        ):
            call()
    assert ms.certify(rest).status is ms.Status.NOT_FINITE
    assert ms.modes.smallest_stiffness(rest, throw=False).status is ms.Status.NOT_FINITE
    test = ms.verify.potential(rest.system.potential, rest.params, positions=rest.positions)
    assert {"stiffness", "symmetry"} <= {finding.check for finding in test.bad}


def test_breakpoints_are_a_tuple():
    """A bare array would be taken apart into one breakpoint a pair, in silence."""
    bare = potentials.from_pair(
        lambda r, s: jnp.where(r < s, (s - r) ** 2, 0.0),
        ("s",),
        cutoff=lambda s: s,
        breakpoints=lambda s: s,  # type: ignore[arg-type]
    )
    with pytest.raises(ms.InputError, match="return a tuple of distances"):
        ms.System.create([[0.0, 0.0], [0.9, 0.0]], 4.0, bare, {"s": 1.0})
