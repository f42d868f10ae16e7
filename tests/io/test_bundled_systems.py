"""Every bundled system builds, relaxes with the defaults,
and has the derivative that minimizing again gives.
"""

import tomllib

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LONG, relative

import mdsens as ms
from mdsens.io.system_toml import systems_folder

NAMES = sorted(ms.io.bundled_systems())
# Where symmetry or a single energy scale leaves nothing to respond, the difference is absolute.
SILENT = {"fcc_argon"}
SLOW = {
    "argon_vacancy",
    "binary_lj_glass",
    "bidisperse_3d",
    "harmonic_morse_2d",
    "packing_from_file",
    "polarizable_cluster",
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=LONG if name in SLOW else ()) for name in NAMES],
)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def eq(name):
    return ms.minimize(ms.load_system(name), **ms.io.relaxation_options(name))


def direction(system: ms.System) -> dict[str, np.ndarray]:
    """Every parameter at once, each by its own size, pairs of species symmetrically."""
    rng = np.random.default_rng(1)
    chosen = {}
    for name, value in sorted(system.params.items()):
        change = rng.uniform(-1.0, 1.0, value.shape)
        change = change + change.T if change.ndim == 2 else change
        chosen[name] = np.asarray(value) * change
    return chosen


def test_relaxes_with_the_defaults(name, eq):
    assert ms.io.relaxation_options(name) == {}
    assert ms.Status(int(eq.status)) in (ms.Status.CONVERGED, ms.Status.ROUND_OFF_LIMITED)
    assert float(eq.max_force) <= max(float(eq.tolerance), float(eq.force_floor)) <= 1e-11


def test_passes_its_finite_difference_check(name, eq):
    dparams = direction(eq.system)
    response = ms.jvp(eq, dparams)
    check = ms.verify.finite_difference(eq, dparams)
    assert not check.network_changed
    if name in SILENT:
        assert float(jnp.linalg.norm(response.value)) < 1e-9
        assert float(jnp.linalg.norm(check.value)) < 1e-6
    else:
        assert check.disagreement(response.value) < 1e-6


def test_is_documented(name):
    assert f"| `{name}` |" in (systems_folder() / "README.md").read_text()
    assert ms.io.bundled_systems()[name]
    assert tomllib.loads((systems_folder() / f"{name}.toml").read_text())["units"]


def test_seed_packing_is_the_one_of_the_paper():
    system = ms.load_system("seed_packing_2d", seed=5)
    length = np.sqrt(64 * np.pi * (0.6**2 + 1) / (4 * 0.98))
    start = np.random.default_rng(5).random((128, 2)) * length
    np.testing.assert_allclose(system.positions, start, rtol=1e-15)
    assert system.box is not None
    np.testing.assert_allclose(system.box, length * np.eye(2), rtol=1e-15)
    assert np.array_equal(np.asarray(system.species), np.repeat([0, 1], 64))
    grown = system.with_params({"sigma": jnp.array([1.0, 0.7])})
    assert float(grown.volume) > length**2  # the cell follows


def test_dimer_rests_at_its_known_distance():
    eq = ms.minimize(
        ms.load_system(
            "dimer", parameters={"sigma": 1.3}, positions={"values": [[0, 0, 0], [1.5, 0, 0]]}
        )
    )
    assert float(jnp.linalg.norm(eq.positions[0] - eq.positions[1])) == pytest.approx(
        1.3 * 2 ** (1 / 6), rel=1e-12
    )


def test_argon_is_at_zero_pressure():
    system = ms.load_system("fcc_argon")
    # in eV / Å^3; its bulk modulus is about 0.02
    assert abs(float(ms.observables.pressure(system))) < 1e-12
    assert ms.load_system("argon_vacancy").n == system.n - 1


def test_glass_has_the_parameters_of_kob_and_andersen():
    system = ms.load_system("binary_lj_glass")
    assert np.bincount(np.asarray(system.species)).tolist() == [400, 100]
    assert float(system.n / system.volume) == pytest.approx(1.2)


def test_harmonic_morse_discs_are_those_of_the_paper():
    system = ms.load_system("harmonic_morse_2d")
    assert np.bincount(np.asarray(system.species)).tolist() == [184, 184]
    # the volume of its stored configuration
    assert float(system.volume) == pytest.approx(15.1657508881031013**2, rel=1e-14)


def test_polydisperse_discs_have_a_diameter_each_in_a_box_that_stays():
    system = ms.load_system("polydisperse_2d", seed=3)
    sigma = np.asarray(system.params["sigma"])
    assert sigma.shape == (256,) and 0.7 < sigma.min() < 0.72 and 1.28 < sigma.max() < 1.3
    assert float(np.pi / 4 * np.sum(sigma**2) / system.volume) == pytest.approx(1.23, rel=1e-12)
    grown = system.with_params({"sigma": 1.1 * sigma})
    assert float(grown.volume) == float(system.volume)


def test_spring_network_is_over_constrained():
    system = ms.load_system("spring_network")
    bonds = system.potential.bonds
    assert len(bonds) > 1.2 * 2 * system.n
    assert np.bincount(bonds.ravel()).min() >= 3
    assert system.params["length"].shape == system.params["stiffness"].shape == (len(bonds),)


@pytest.mark.parametrize("file", ["2d_polydisperse_N64_p1e-1", "3d_bidisperse_N128_p1e-4"])
def test_stored_packings_are_minima_with_the_energy_of_the_other_code(file):
    dimension = int(file[0])
    stored = np.load(systems_folder() / "data" / f"{file}.npz", allow_pickle=False)
    # extxyz has 8 decimals
    for ending, force, close in [("npz", 1e-12, 1e-9), ("extxyz", 1e-7, 1e-4)]:
        place = {"file": f"data/{file}.{ending}", "index": 3}
        system = ms.load_system("packing_from_file", dimension=dimension, positions=place)
        eq = ms.minimize(system, tolerance=force)
        assert int(eq.steps) == 0
        assert relative(ms.observables.energy(system), stored["energy"][3]) < close
