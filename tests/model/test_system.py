"""A system is checked when made, frozen afterwards,
and its energy under strain is that of the deformed system.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mdsens as ms
from mdsens.model.box import FixedBox
from mdsens.model.system import potential_energy

LAW = ms.potentials.soft_sphere()
DISCS = {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0}
PLACES = np.array([[0.1, 0.2], [0.9, 0.3], [0.4, 1.0], [2.5, 2.6]])


def discs(**changes) -> ms.System:
    return ms.System.create(PLACES, 3.0, LAW, {**DISCS, **changes})


# ── what create refuses ──


def places(k, value):
    changed = PLACES.copy()
    changed[k] = value
    return changed


@pytest.mark.parametrize(
    "positions, box, species, message",
    [
        (PLACES.ravel(), 3.0, None, r"`positions` has shape \(8,\): give \(n, 2\) or \(n, 3\)"),
        (np.zeros((4, 1)), 3.0, None, r"`positions` has shape \(4, 1\): give"),
        (np.zeros((4, 4)), 3.0, None, r"`positions` has shape \(4, 4\): give"),
        (np.zeros((0, 2)), 3.0, None, r"`positions` has shape \(0, 2\): give"),
        (PLACES[None], 3.0, None, r"`positions` has shape \(1, 4, 2\): give"),
        ([["a", "b"]], 3.0, None, r"`positions` has type <U1: give .* real numbers"),
        ([[0.0, 1.0], [2.0]], 3.0, None, r"`positions` is no array, .*give"),
        (PLACES + 1j, 3.0, None, r"`positions` has type complex128: give .* real numbers"),
        (
            places(2, [np.nan, 1.0]),
            3.0,
            None,
            r"positions\[2\] is \[nan, 1.0\]: every coordinate must be finite",
        ),
        (
            places(3, [0.0, -np.inf]),
            3.0,
            None,
            r"positions\[3\] is \[0.0, -inf\]: every coordinate must be finite",
        ),
        (
            places(3, PLACES[1]),
            3.0,
            None,
            r"positions\[1\] and positions\[3\] are the same point, up to cell vectors",
        ),
        (
            PLACES,
            3.0,
            [0, 1, 0],
            r"`species` has shape \(3,\) and type int64: give \(4,\) integers from 0",
        ),
        (
            PLACES,
            3.0,
            [0.0, 1.0, 0.0, 1.0],
            r"`species` has shape \(4,\) and type float64: give \(4,\) integers",
        ),
        (PLACES, 3.0, [0, -1, 0, 1], r"`species` .*give \(4,\) integers from 0"),
    ],
)
def test_create_refuses_and_names_what_is_wrong(positions, box, species, message):
    with pytest.raises(ms.InputError, match=message):
        ms.System.create(positions, box, LAW, DISCS, species)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("masses", [1.0, 2.0], r"`masses` has shape \(2,\): give \(4,\) positive numbers"),
        ("masses", 1.0, r"`masses` has shape \(\): give \(4,\)"),
        ("masses", [1.0, 2.0, 0.0, 1.0], r"masses\[2\] is 0.0: every mass must be positive"),
        ("masses", [1.0, np.nan, 1.0, 1.0], r"masses\[1\] is nan"),
        ("masses", [1.0, 1.0, 1.0, np.inf], r"masses\[3\] is inf"),
        ("masses", ["H"] * 4, "masses is an array of <U1: give"),
        ("tags", [0, 1], r"`tags` has shape \(2,\) and type int64: give \(4,\) integers"),
        ("tags", [0.5] * 4, "type float64: give"),
        ("tags", [0, 1, 2, 2**40], "integers of 32 bits"),
    ],
)
def test_masses_and_tags_are_checked(field, value, message):
    with pytest.raises(ms.InputError, match=message):
        ms.System.create(PLACES, 3.0, LAW, DISCS, **{field: value})


def test_masses_and_tags_stay_with_the_particles():
    masses = np.array([1, 2, 3, 4])
    system = ms.System.create(PLACES, 3.0, LAW, DISCS, masses=masses, tags=[3, -1, 0, 0])
    assert system.masses is not None and system.masses.dtype == system.positions.dtype
    np.testing.assert_array_equal(system.masses, masses)
    relaxed = ms.minimize(system, max_steps=1, throw=False).system
    batch = ms.stack([relaxed, system.replace(masses=2.0 * system.masses)])
    np.testing.assert_array_equal(batch.masses, [masses, 2 * masses])
    np.testing.assert_array_equal(ms.unstack(batch)[1].tags, [3, -1, 0, 0])
    with pytest.raises(ms.InputError, match="system 1 differs from system 0 in masses"):
        ms.stack([system, discs()])


def test_params_must_be_a_dict():
    with pytest.raises(ms.InputError, match="`params` is a list: give a dict"):
        ms.System.create(PLACES, 3.0, LAW, [1.0, 1.0, 2.0])  # type: ignore[arg-type]


def test_a_coincident_image_is_found_as_well():
    with pytest.raises(
        ms.InputError, match=r"positions\[0\] and positions\[1\] are the same point"
    ):
        ms.System.create([[0.5, 0.25], [4.5, 0.25], [1.0, 1.0]], 4.0, LAW, DISCS)


# ── what it makes ──


def test_precision_follows_the_positions():
    single = ms.System.create(PLACES.astype(np.float32), 3.0, LAW, {**DISCS, "sigma": np.ones(4)})
    leaves = jax.tree.leaves((single.positions, single.params, single.boundary))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    assert potential_energy(single).dtype == jnp.float32
    assert float(potential_energy(single)) == pytest.approx(
        float(potential_energy(discs())), rel=1e-5
    )
    whole = ms.System.create([[0, 0], [1, 0]], 4, LAW, {"sigma": 2, "epsilon": 1, "alpha": 2})
    assert whole.positions.dtype == jnp.float64 and float(potential_energy(whole)) == 0.125


def test_properties():
    system = ms.System.create(PLACES, [3.0, 4.0], LAW, {**DISCS, "sigma": [1.0, 1.2]}, [0, 1, 1, 0])
    assert (system.n, system.dimension, system.batch, system.species_count) == (4, 2, None, 2)
    assert float(system.volume) == pytest.approx(12.0) and float(system.range) == 1.2
    np.testing.assert_array_equal(np.asarray(system.diameters), [1.0, 1.2, 1.2, 1.0])


def test_a_species_without_particles_keeps_its_parameters():
    system = ms.System.create(PLACES, 3.0, LAW, {**DISCS, "sigma": [1.0, 1.2, 1.4]}, [0, 1, 1, 0])
    assert system.species_count == 3
    slope = jax.grad(lambda p: potential_energy(system, params=p))(dict(system.params))["sigma"]
    assert slope.shape == (3,) and float(slope[2]) == 0.0 and float(slope[1]) != 0.0


def test_frozen_and_a_pytree():
    system = discs()
    with pytest.raises(dataclasses.FrozenInstanceError):
        system.positions = system.positions  # type: ignore[misc]
    leaves, structure = jax.tree.flatten(system)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert float(potential_energy(jax.tree.unflatten(structure, leaves))) == float(
        potential_energy(system)
    )


def test_with_params_changes_some_and_leaves_the_original():
    system = discs()
    grown = system.with_params({"sigma": [1.0, 1.1, 1.2, 1.3]})
    assert system.params["sigma"].shape == () and grown.params["sigma"].shape == (4,)
    assert float(grown.params["alpha"]) == 2.0
    assert float(potential_energy(grown)) == pytest.approx(
        float(potential_energy(discs(sigma=[1.0, 1.1, 1.2, 1.3]))), rel=1e-15
    )


@pytest.mark.parametrize(
    "params, message",
    [
        ({"sgima": 1.0}, r"no parameter 'sgima' .*did you mean 'sigma'"),
        ({"sigma": -1.0}, r"sigma is -1.0: give a positive number"),
        ({"sigma": [1.0, 2.0, 3.0]}, r"sigma has shape \(3,\): give a scalar, \(4,\)"),
    ],
)
def test_with_params_checks_as_create_does(params, message):
    with pytest.raises(ms.InputError, match=message):
        discs().with_params(params)


def test_replace_changes_a_field_unchecked():
    moved = discs().replace(positions=discs().positions + 1.0)
    assert float(potential_energy(moved)) == pytest.approx(
        float(potential_energy(discs())), rel=1e-12
    )


# ── energy under strain ──


def triangle(positions, params, displacement):
    """A three-body energy: the squared area spanned by the first three particles."""
    a, b = displacement(positions[1], positions[0]), displacement(positions[2], positions[0])
    return params["weight"] * (a[0] * b[1] - a[1] * b[0]) ** 2


SKEWED = np.array([[3.4, 0.5], [-0.4, 3.2]])
SYSTEMS = {
    "periodic": (SKEWED, LAW, DISCS),
    "open": (None, LAW, DISCS),
    "sum": (
        SKEWED,
        LAW
        + ms.potentials.harmonic_bonds([[0, 1], [1, 3]])
        + ms.potentials.from_energy(triangle, ("weight",)),
        {**DISCS, "stiffness": [1.0, 2.0], "length": 0.9, "weight": 0.7},
    ),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_strain_is_deforming_positions_and_box(name):
    box, potential, params = SYSTEMS[name]
    system = ms.System.create(PLACES, box, potential, params)
    strain = jnp.asarray([[0.03, 0.02], [0.02, -0.05]])
    deformation = np.eye(2) + np.asarray(strain)
    deformed_box = None if box is None else deformation @ box
    deformed = ms.System.create(PLACES @ deformation.T, deformed_box, potential, params)
    strained, unstrained = (
        float(potential_energy(system, strain=s)) for s in (strain, 0.0 * strain)
    )
    assert strained == pytest.approx(float(potential_energy(deformed)), rel=1e-12)
    assert strained != pytest.approx(unstrained, rel=1e-3)
    assert unstrained == pytest.approx(float(potential_energy(system)), rel=1e-14)


def test_explicit_positions_and_params_stand_for_the_systems():
    system, other = discs(), discs(sigma=1.3)
    moved = system.positions * 0.9
    given = potential_energy(system, moved, other.params)
    assert float(given) == pytest.approx(
        float(potential_energy(other.replace(positions=moved))), rel=1e-15
    )


# ── batches ──


def test_energy_maps_over_a_batch():
    members = [discs(sigma=s) for s in (1.0, 1.1, 1.2)]
    whole = ms.stack(members)
    assert whole.batch == 3 and whole.n == 4 and whole.dimension == 2
    energies = jax.vmap(potential_energy)(whole)
    np.testing.assert_allclose(energies, [potential_energy(m) for m in members], rtol=1e-14)
    for back, member in zip(ms.unstack(whole), members, strict=True):
        assert jax.tree.structure(back) == jax.tree.structure(member)
        assert all(
            np.array_equal(a, b)
            for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(member), strict=True)
        )
    with pytest.raises(ms.InputError, match="of type System that is not a batch"):
        ms.unstack(members[0])


@pytest.mark.parametrize(
    "other, message",
    [
        (lambda: discs(sigma=np.ones(4)), "system 1 differs from system 0 in params"),
        (
            lambda: ms.System.create(PLACES[:3], 3.0, LAW, DISCS),
            "system 1 differs from system 0 in positions",
        ),
        (
            lambda: ms.System.create(PLACES, 3.0, ms.potentials.morse(0.5, 1.0), DISCS),
            "system 1 differs from system 0 in potential",
        ),
        (
            lambda: ms.System.create(PLACES, 3.0, LAW, DISCS, [0, 1, 0, 1]),
            "system 1 differs from system 0 in species",
        ),
    ],
)
def test_batches_of_other_kinds_are_refused(other, message):
    with pytest.raises(ms.InputError, match=message):
        ms.stack([discs(), other()])


def test_an_empty_batch_is_refused():
    with pytest.raises(ms.InputError, match="stack got no systems: give at least one"):
        ms.stack([])


def test_a_batch_may_mix_values_not_kinds_of_boxes():
    other = ms.System.create(PLACES, ms.PackingFraction(0.4), LAW, DISCS)
    with pytest.raises(ms.InputError, match="system 1 differs from system 0 in boundary"):
        ms.stack([discs(), other])
    whole = ms.stack([discs(), discs().replace(boundary=FixedBox(4.0 * jnp.eye(2)))])
    np.testing.assert_array_equal(jax.vmap(lambda s: s.volume)(whole).round(9), [9.0, 16.0])
