"""Nearest images against brute force, the derivative by a moving cell,
the packing fraction; bad boxes refused.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative

import mdsens as ms
from mdsens._util.lattice import heights, nearest_image
from mdsens.model.box import FixedBox, box_rule
from mdsens.model.system import potential_energy

# Columns are the cell vectors; the last two are no triangles, so a transpose anywhere would show.
CELLS = {
    "square": np.diag([2.0, 2.0]),
    "skewed 2-D": np.array([[1.0, 0.45], [0.0, 0.8]]),
    "turned 2-D": np.array([[1.1, -0.3], [0.5, 0.9]]),
    "turned 3-D": np.array([[1.0, 0.3, -0.2], [0.4, 1.2, 0.3], [-0.1, 0.2, 0.9]]),
}
DISCS = {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0}


def shortest(difference: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """The shortest image, over all shifts of up to five cells."""
    shifts = np.array(list(itertools.product(range(-5, 6), repeat=len(cell))))
    images = difference - shifts @ cell.T
    return images[np.argmin(np.linalg.norm(images, axis=1))]


@pytest.mark.parametrize("name", CELLS)
def test_heights_are_volume_over_face(name):
    cell = CELLS[name]
    if len(cell) == 2:
        faces = np.linalg.norm(cell[:, ::-1], axis=0)
    else:
        a, b, c = cell.T
        faces = np.linalg.norm([np.cross(b, c), np.cross(c, a), np.cross(a, b)], axis=1)
    np.testing.assert_allclose(
        heights(jnp.asarray(cell)), abs(np.linalg.det(cell)) / faces, rtol=1e-14
    )


@pytest.mark.parametrize("name", CELLS)
def test_nearest_image_is_the_shortest_within_half_the_smallest_height(name):
    cell = CELLS[name]
    rng = np.random.default_rng(0)
    differences = rng.uniform(-1.5, 1.5, (300, len(cell))) @ cell.T
    got = np.asarray(nearest_image(jnp.asarray(differences), jnp.asarray(cell)))
    whole = (differences - got) @ np.linalg.inv(cell).T
    np.testing.assert_allclose(whole, np.round(whole), atol=1e-12)  # always an image
    truth = np.stack([shortest(d, cell) for d in differences])
    near = np.linalg.norm(truth, axis=1) < 0.5 * float(np.min(heights(jnp.asarray(cell))))
    assert 30 < near.sum() < 300
    np.testing.assert_allclose(got[near], truth[near], atol=1e-13)


def test_open_boundaries_have_no_images():
    difference = jnp.asarray([[100.0, -3.0]])
    assert nearest_image(difference, None) is difference
    system = ms.System.create([[0.0, 0.0], [0.5, 0.0]], None, ms.potentials.soft_sphere(), DISCS)
    assert system.box is None and float(system.volume) == np.inf


@pytest.mark.parametrize("name", CELLS)
def test_derivative_by_the_cell_is_the_finite_difference(name):
    # jax-md's periodic_general in Cartesian coordinates gets this one wrong:
    # its custom transform leaves the box out
    cell = jnp.asarray(CELLS[name])
    rng = np.random.default_rng(1)
    differences = jnp.asarray(rng.uniform(-1.4, 1.4, (6, len(cell))) @ cell.T)
    weights = rng.standard_normal(differences.shape)
    change = rng.standard_normal(cell.shape)

    def measured(box):
        return jnp.sum(weights * nearest_image(differences, box) ** 2)

    h = 1e-6
    exact = jax.jvp(measured, (cell,), (jnp.asarray(change),))[1]
    central = (measured(cell + h * change) - measured(cell - h * change)) / (2 * h)
    assert abs(float(exact)) > 0.1
    assert float(exact) == pytest.approx(float(central), rel=1e-8)


def test_box_is_a_length_lengths_or_a_matrix():
    for box in (3.0, [3.0, 3.0], 3.0 * np.eye(2)):
        system = ms.System.create([[0.0, 0.0], [0.5, 0.0]], box, ms.potentials.soft_sphere(), DISCS)
        np.testing.assert_array_equal(np.asarray(system.box), 3.0 * np.eye(2))
        assert float(system.volume) == pytest.approx(9.0, rel=1e-15)


# ── the packing fraction ──

SPECIES = np.array([0, 1, 1, 0])
SIGMAS = {
    "scalar": 1.1,
    "species": np.array([1.0, 1.4]),
    "particle": np.array([1.0, 1.1, 1.2, 1.3]),
    "matrix": np.array([[1.0, 1.3], [1.3, 1.4]]),
}


def diameters(kind: str) -> np.ndarray:
    sigma = np.asarray(SIGMAS[kind])
    if kind == "scalar":
        return np.full(4, sigma)
    if kind == "particle":
        return sigma
    return (np.diag(sigma) if kind == "matrix" else sigma)[SPECIES]


@pytest.mark.parametrize("shape", [None, "turned"])
@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("kind", SIGMAS)
def test_packing_fraction_is_what_was_asked_for(kind, dimension, shape):
    cell = None if shape is None else CELLS[f"turned {dimension}-D"]
    rule = box_rule(ms.PackingFraction(0.4, cell), dimension, jnp.float64)
    expected = diameters(kind)
    box = np.asarray(rule.matrix({}, jnp.asarray(expected), dimension))
    volumes = np.pi / 4 * expected**2 if dimension == 2 else np.pi / 6 * expected**3
    assert volumes.sum() / abs(np.linalg.det(box)) == pytest.approx(0.4, rel=1e-14)
    like = np.eye(dimension) if cell is None else cell
    np.testing.assert_allclose(box / box[0, 0], like / like[0, 0], atol=1e-14)


@pytest.mark.parametrize("kind", SIGMAS)
def test_diameters_reach_the_rule_from_every_kind_of_parameter(kind):
    positions = 2.0 * np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    params = {**DISCS, "sigma": SIGMAS[kind]}
    system = ms.System.create(
        positions, ms.PackingFraction(0.25), ms.potentials.soft_sphere(), params, SPECIES
    )
    np.testing.assert_array_equal(np.asarray(system.diameters), diameters(kind))
    assert np.pi / 4 * np.sum(diameters(kind) ** 2) / float(system.volume) == pytest.approx(
        0.25, rel=1e-14
    )


def test_energy_in_a_cell_that_follows_the_diameters_is_differentiated_with_it():
    rng = np.random.default_rng(5)
    sigma, direction = rng.uniform(0.9, 1.3, 12), rng.uniform(-1, 1, 12)
    rule = ms.PackingFraction(0.9, CELLS["turned 2-D"])
    params = {"sigma": sigma, "epsilon": 1.0, "alpha": 2.5}
    cell = np.asarray(rule.matrix({}, sigma, 2))
    positions = rng.uniform(-1, 2, (12, 2)) @ cell.T  # images in other cells, too
    system = ms.System.create(positions, rule, ms.potentials.soft_sphere(), params)

    @jax.jit
    def energy(t):
        return potential_energy(system, params={**system.params, "sigma": sigma + t * direction})

    h = 1e-5
    exact = float(jax.grad(energy)(0.0))
    assert exact == pytest.approx(float(energy(h) - energy(-h)) / (2 * h), rel=1e-6)
    held = system.replace(boundary=FixedBox(system.box))

    def without(t):
        return potential_energy(held, params={**held.params, "sigma": sigma + t * direction})

    assert relative(exact, jax.grad(without)(0.0)) > 0.01  # the cell's part is not small


def square_of(params):
    return params["sigma"] * jnp.asarray([[4.0, 1.0], [0.0, 4.0]])


def test_box_as_a_function_of_the_parameters():
    system = ms.System.create(
        [[0.0, 0.0], [0.5, 0.0]], square_of, ms.potentials.soft_sphere(), DISCS
    )
    np.testing.assert_array_equal(np.asarray(system.box), [[4.0, 1.0], [0.0, 4.0]])
    assert float(system.with_params({"sigma": 1.5}).volume) == pytest.approx(36.0)
    again = ms.System.create(
        [[0.0, 0.0], [0.5, 0.0]], square_of, ms.potentials.soft_sphere(), DISCS
    )
    assert jax.tree.structure(system) == jax.tree.structure(again)


# ── bad input ──


@pytest.mark.parametrize(
    "box, message",
    [
        (
            np.ones((2, 3)),
            r"`box` has shape \(2, 3\) in 2 dimensions: "
            r"give a length, 2 lengths, or a \(2, 2\) matrix",
        ),
        ([3.0, 3.0, 3.0], r"`box` has shape \(3,\) in 2 dimensions"),
        (np.ones((2, 2)), r"`box` \[\[1.0, 1.0\], \[1.0, 1.0\]\] has no volume: give independent"),
        (0.0, r"`box` .* has no volume"),
        (np.nan, r"`box` .*nan.* is not finite: give finite cell vectors"),
        ("large", r"box is 'large': give"),
        (ms.PackingFraction(-0.5), r"packing fraction is -0.5: give a positive number"),
        (ms.PackingFraction(np.nan), r"packing fraction is nan: give a positive number"),
        (ms.PackingFraction(0.1, np.ones((2, 2))), r"has no volume"),
        (
            lambda params: jnp.eye(3),
            r"box function returns shape \(3, 3\) in 2 dimensions: return a \(2, 2\)",
        ),
        (
            lambda params: 5.0 * params["sigma"],
            r"box function returns shape \(\) in 2 dimensions: return a \(2, 2\)",
        ),
        (lambda params: jnp.ones((2, 2)), r"has no volume"),
    ],
)
def test_bad_boxes_are_refused(box, message):
    with pytest.raises(ms.InputError, match=message):
        ms.System.create([[0.0, 0.0], [0.5, 0.0]], box, ms.potentials.soft_sphere(), DISCS)


def test_packing_fraction_needs_diameters():
    potential, params = ms.potentials.harmonic_bonds([[0, 1]]), {"stiffness": 1.0, "length": 1.0}
    with pytest.raises(
        ms.InputError, match=r"packing fraction needs the parameter 'sigma', .*: give the box"
    ):
        ms.System.create([[0.0, 0.0], [0.5, 0.0]], ms.PackingFraction(0.5), potential, params)


def test_a_potential_without_a_cutoff_needs_open_boundaries():
    potential = ms.potentials.from_pair(lambda r, sigma: sigma / r, ("sigma",))
    with pytest.raises(
        ms.InputError, match=r"without a cutoff needs open boundaries: give the potential a cutoff"
    ):
        ms.System.create([[0.0, 0.0], [0.5, 0.0]], 9.0, potential, {"sigma": 1.0})
