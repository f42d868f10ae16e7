"""Elastic constants of crystals in their smallest cells, and what parameters do to them."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LONG, quick, relative
from small_systems import DIAMOND, FCC, SILICON

import mdsens as ms
from mdsens.relaxation import AtPressure

GPA = 160.2176634  # an eV/Å^3
ARGON = ms.potentials.lennard_jones(6.8, 8.5), {"sigma": 3.4, "epsilon": 0.0104}


def at_rest(places: Any, box: Any, potential: Any, params: Any, **options: Any) -> Any:
    """The minimum, with options of ``minimize``."""
    return ms.minimize(ms.System.create(places, box, potential, params), **options)


@cache
def argon(count: int) -> ms.elasticity.Moduli:
    """Moduli of the bundled crystal in a cell of 1, 4 or 256 atoms."""
    if count == 256:
        return ms.elasticity.moduli(ms.minimize(ms.load_system("fcc_argon")))
    a = 5.267140220637
    primitive = 0.5 * a * (np.ones((3, 3)) - np.eye(3))
    places, cell = (np.zeros((1, 3)), primitive) if count == 1 else (a * FCC, a)
    return ms.elasticity.moduli(at_rest(places, cell, *ARGON))


@pytest.mark.parametrize("count", quick([4, 256], 4))
def test_argon_of_one_atom_is_that_of_more(count: int) -> None:
    one, more = argon(1), argon(count)
    assert relative(one.tensor, more.tensor) < 1e-9
    assert relative(one.birch, more.birch) < 1e-9
    # No strain moves atoms that are centers of symmetry.
    assert relative(one.affine, one.tensor) < 1e-13
    constants = np.asarray(ms.elasticity.voigt(one.birch))
    np.testing.assert_allclose(constants, constants.T, atol=1e-13 * constants[0, 0])
    # cubic, and central forces without stress: Cauchy's relation, C12 = C44
    np.testing.assert_allclose(constants[0, 1], constants[3, 3], rtol=1e-9)


@LONG
def test_hexagonal_argon_is_isotropic_in_its_plane() -> None:
    """Its two atoms move in the strain; c / a at rest is not the ideal ratio."""
    a, ratio = 3.72, (8 / 3) ** 0.5
    cell = a * np.array([[1.0, -0.5, 0.0], [0.0, 0.75**0.5, 0.0], [0.0, 0.0, ratio]])
    places = np.array([[0.0, 0.0, 0.0], [1 / 3, 2 / 3, 0.5]]) @ cell.T
    eq = at_rest(places, cell, *ARGON, cell=AtPressure(0.0, shape=True), tolerance=1e-14)
    box = np.asarray(eq.system.box)
    there = box[2, 2] / box[0, 0]
    assert 1e-5 < abs(there / ratio - 1) < 1e-2
    moduli = ms.elasticity.moduli(eq)
    C = np.asarray(ms.elasticity.voigt(moduli.birch))
    assert C[5, 5] == pytest.approx((C[0, 0] - C[0, 1]) / 2, rel=1e-9)
    size = C[0, 0]
    for pair in (C[0, 0] - C[1, 1], C[3, 3] - C[4, 4], C[0, 2] - C[1, 2], *C[:3, 3:].ravel()):
        assert abs(pair) < 1e-9 * size
    np.testing.assert_allclose(C, C.T, atol=1e-10 * size)
    assert relative(moduli.affine, moduli.tensor) > 1e-3


# -- silicon by Stillinger and Weber

PRIMITIVE = 5.431 / 2 * (np.ones((3, 3)) - np.eye(3))
POTENTIAL = ms.potentials.stillinger_weber()


@cache
def silicon() -> ms.relaxation.Equilibrium:
    return silicon_at({})


def silicon_at(params: dict[str, float]) -> ms.relaxation.Equilibrium:
    """Two atoms at zero pressure."""
    places = 5.431 * DIAMOND[[0, 4]]
    return at_rest(
        places,
        PRIMITIVE,
        POTENTIAL,
        {**SILICON, **params},
        cell=AtPressure(0.0, shape=True),
        tolerance=1e-12,
    )


def constants(moduli: Any) -> Any:
    """C11, C12, C44."""
    tensor = moduli.tensor
    return jnp.stack([tensor[0, 0, 0, 0], tensor[0, 0, 1, 1], tensor[0, 1, 0, 1]])


def lattice_constant(system: ms.System) -> Any:
    return (4.0 * system.volume) ** (1 / 3)


@LONG
def test_silicon_at_zero_pressure() -> None:
    """Cowley, Phys. Rev. Lett. 60, 2379 (1988)."""
    moduli = ms.elasticity.moduli(silicon())
    found = GPA * np.asarray(constants(moduli))
    assert found == pytest.approx((151.4, 76.4, 56.4), abs=0.05)
    # without internal strain
    assert GPA * float(moduli.affine[0, 1, 0, 1]) == pytest.approx(109.8, abs=0.05)


@cache
def derivatives() -> dict[str, np.ndarray]:
    """Of C11, C12, C44 and the lattice constant by each parameter."""
    eq = silicon()
    of_constants = ms.elasticity.gradient(constants, eq).value
    of_spacing = ms.gradient(lattice_constant, eq).value
    return {name: np.append(of_constants[name], of_spacing[name]) for name in SILICON}


def values(params: dict[str, float]) -> np.ndarray:
    eq = silicon_at(params)
    return np.append(constants(ms.elasticity.moduli(eq)), lattice_constant(eq.system))


@LONG
@pytest.mark.parametrize("name", SILICON)
def test_derivatives_of_silicon_are_those_of_relaxing_again(name: str) -> None:
    value = SILICON[name]
    step = 4e-3 * (abs(value) or 1.0)

    def slope(h: float) -> np.ndarray:
        return (values({name: value + h}) - values({name: value - h})) / (2 * h)

    whole, half, quarter = slope(step), slope(step / 2), slope(step / 4)
    fourth = (4 * half - whole) / 3, (4 * quarter - half) / 3
    expected = (16 * fourth[1] - fourth[0]) / 15
    size = np.abs(values({})) / (abs(value) or 1.0)
    np.testing.assert_allclose(derivatives()[name], expected, rtol=1e-6, atol=1e-7 * size.min())


@LONG
def test_derivatives_of_silicon_by_its_units() -> None:
    """The constants are proportional to epsilon / sigma^3, the lattice constant to sigma."""
    there = values({})
    exponents = {"epsilon": np.array([1, 1, 1, 0]), "sigma": np.array([-3, -3, -3, 1])}
    for name, exponent in exponents.items():
        expected = exponent * there / SILICON[name]
        np.testing.assert_allclose(
            derivatives()[name], expected, rtol=1e-9, atol=1e-9 * np.abs(there).min()
        )
    # epsilon s, A / s and lambda / s are the same potential
    null = sum(
        sign * SILICON[name] * derivatives()[name]
        for name, sign in {"epsilon": 1, "A": -1, "lambda": -1}.items()
    )
    np.testing.assert_allclose(null, 0.0, atol=1e-9 * np.abs(there).max())
