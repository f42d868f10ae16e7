"""Pressure and stress against finite differences by volume and strain, closed forms, and another code's values."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import packing, packing_file, relative, relaxed_packing

import mdsens as ms
from mdsens import boxes
from mdsens.system import potential_energy

LAW = ms.potentials.soft_sphere()


def deformed(system: ms.System, strain: np.ndarray) -> float:
    """The energy of the system after positions and cell are deformed by 1 + strain."""
    deformation = jnp.eye(system.dimension) + jnp.asarray(strain)
    box = deformation @ jnp.asarray(system.box)
    moved = system.replace(positions=system.positions @ deformation.T, boundary=boxes.FixedBox(box))
    return float(potential_energy(moved))


def discs() -> ms.System:
    rng = np.random.default_rng(0)
    params = {"sigma": rng.uniform(0.8, 1.2, 12), "epsilon": 1.0, "alpha": 2.5}
    return ms.System.create(3.0 * rng.random((12, 2)), [[3.0, 0.4], [-0.3, 3.2]], LAW, params)


def test_pressure_is_minus_the_slope_of_the_energy_by_volume():
    system = discs()
    h = 1e-5
    ahead, behind = (deformed(system, ((1 + s * h) ** 0.5 - 1) * np.eye(2)) for s in (1, -1))  # V (1 ± h)
    central = -(ahead - behind) / (2 * h * float(system.volume))
    assert float(ms.observables.pressure(system)) == pytest.approx(central, rel=1e-7)
    assert central > 0.01  # repulsion pushes outwards


def test_stress_is_the_slope_of_the_energy_by_strain():
    system = discs()
    stress = np.asarray(ms.observables.stress(system))
    np.testing.assert_allclose(stress, stress.T, atol=1e-15)
    h = 1e-6
    for strain in (np.diag([1.0, 0.0]), np.diag([0.0, 1.0]), np.array([[0.0, 0.5], [0.5, 0.0]])):
        central = (deformed(system, h * strain) - deformed(system, -h * strain)) / (2 * h * float(system.volume))
        assert np.sum(stress * strain) == pytest.approx(central, rel=1e-6)
    assert float(ms.observables.pressure(system)) == pytest.approx(-np.trace(stress) / 2, rel=1e-15)


def test_a_stretched_spring_pulls():
    law = ms.potentials.harmonic_bonds([[0, 1]])
    params = {"stiffness": 3.0, "length": 1.0}
    system = ms.System.create([[0.0, 0.0], [1.2, 0.0]], [4.0, 5.0], law, params)
    tension = 3.0 * 0.2 * 1.2 / 20.0  # force times distance over volume: the virial
    np.testing.assert_allclose(ms.observables.stress(system), [[tension, 0.0], [0.0, 0.0]], atol=1e-16)
    assert float(ms.observables.pressure(system)) == pytest.approx(-tension / 2, rel=1e-13)
    assert float(ms.observables.energy(system)) == pytest.approx(0.5 * 3.0 * 0.04, rel=1e-13)


def test_overlapping_spheres_push_in_three_dimensions():
    params = {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0}
    system = ms.System.create([[0.0, 0.0, 0.0], [0.0, 0.0, 0.8]], 4.0, LAW, params)
    expected = np.zeros((3, 3))
    expected[2, 2] = -0.2 * 0.8 / 64.0
    np.testing.assert_allclose(ms.observables.stress(system), expected, atol=1e-17)
    assert float(ms.observables.pressure(system)) == pytest.approx(0.16 / 192.0, rel=1e-12)


def test_stress_needs_a_volume():
    system = ms.System.create([[0.0, 0.0], [0.8, 0.0]], None, LAW, {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0})
    for observable in (ms.observables.stress, ms.observables.pressure):
        with pytest.raises(ms.InputError, match="need a volume, and this system has open boundaries: give it a box"):
            observable(system)


@pytest.mark.parametrize("index", [0, 7])
def test_energy_and_stress_are_those_of_another_code(packing_name, index):
    file = packing_file(packing_name)
    system = packing(packing_name, index)
    assert float(ms.observables.energy(system)) == pytest.approx(file["energy"][index], rel=1e-9)
    assert relative(ms.observables.stress(system), file["stress"][index]) < 1e-8
    pressure = -np.trace(file["stress"][index]) / system.dimension
    assert pressure > 0 and float(ms.observables.pressure(system)) == pytest.approx(pressure, rel=1e-8)


def test_polishing_the_minimum_leaves_its_stress(packing_name):
    file = packing_file(packing_name)
    relaxed = ms.observables.stress(relaxed_packing(packing_name, 0).system)
    assert relative(relaxed, file["stress"][0]) < 1e-8  # the files stop at a force of 1e-13
