"""The certificate: its figures against dense truth and minimizing again,
and each state that it must tell by name.
"""

from __future__ import annotations

import json
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import discs_at_rest, ring

import mdsens as ms
from mdsens.mechanics.hessian import dense_hessian
from mdsens.model.box import FixedBox
from mdsens.sensitivity.certificate import derivative_error, solution_space

THETA = {"sigma": [0.0, 1.0]}


@cache
def relaxed(seed=0, name="seed_packing_2d"):
    return ms.minimize(ms.load_system(name, seed=seed))


@cache
def stopped(relative, seed=0, name="seed_packing_2d"):
    """A minimum that FIRE left early, and the one it was on the way to."""
    mean = float(ms.mechanics.network(relaxed(seed, name).system, 1e-12).mean_force)
    early = ms.minimize(
        ms.load_system(name, seed=seed),
        tolerance=relative * mean,
        method=ms.relaxation.Fire(),
        progress=False,
    )
    return early, ms.minimize(early.system, tolerance=1e-13, throw=False)


def certificate(eq, **options):
    return ms.certify(eq, THETA, **options)


def test_figures_are_the_dense_ones():
    eq = relaxed()
    c = certificate(eq, modes=4)
    values, vectors = np.linalg.eigh(np.asarray(dense_hessian(ms.linearize(eq).system)))
    np.testing.assert_allclose(c.spectrum.values, values[2:6], rtol=1e-9)
    assert c.stiffness_max == pytest.approx(values[-1], rel=1e-3)
    assert (c.zero_modes, c.translations, c.rotations, c.floppy_modes, c.negative_modes) == (
        2,
        2,
        0,
        0,
        0,
    )
    squares = (vectors[:, 2].reshape(-1, 2) ** 2).sum(axis=1)
    assert c.participation[0] == pytest.approx(
        squares.sum() ** 2 / (128 * (squares**2).sum()), rel=1e-6
    )
    assert c.status is ms.Status.CONVERGED and c.findings == ()
    assert c.max_force == float(eq.max_force) and c.newton_step_norm <= c.distance


def test_the_response_is_jvps_and_the_radius_is_where_a_contact_changes():
    eq = relaxed()
    c = certificate(eq)
    r = ms.jvp(eq, THETA)
    assert c.derivative is not None
    assert np.linalg.norm(c.derivative.response - r.value) < 1e-11 * c.derivative.norm
    v = ms.verify.finite_difference(eq, THETA)
    assert c.radius == pytest.approx(v.radius, rel=1e-9)
    assert c.derivative.crossed(0.99 * c.radius) == 0 and c.derivative.crossed(1.01 * c.radius) == 1

    def network(t):
        there = ms.minimize(eq.system, {"sigma": jnp.asarray([1.0, 0.6 + t])}, progress=False)
        return int(ms.mechanics.network(there.system, there.max_force).pairs)

    here = network(0.0)
    side = 1.0 if c.derivative.forward < c.derivative.backward else -1.0
    first = c.derivative.crossing.first(side > 0)
    assert first is not None and network(0.5 * side * c.radius) == here
    assert network(1.5 * side * c.radius) == here + (-1 if first[1] else 1)


@pytest.mark.parametrize("relative", [1e-3, 1e-5])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_sharp_estimate_is_the_error_and_the_correction_takes_it_off(relative, seed):
    early, late = stopped(relative, seed)
    c = certificate(early)
    assert c.derivative is not None and c.crossed_to_minimum == 0
    true = np.asarray(ms.jvp(late, THETA, throw=False).value)
    error = np.linalg.norm(c.derivative.response - true) / np.linalg.norm(true)
    assert error / 3 < c.error < 3 * error
    assert np.linalg.norm(c.derivative.corrected - true) / np.linalg.norm(true) < 0.1 * error
    assert c.bound > error
    assert c.newton_step_norm == pytest.approx(
        float(jnp.linalg.norm(late.positions - early.positions)), rel=0.05
    )
    assert c.newton_step_norm <= c.distance


def test_a_contact_that_changes_on_the_way_is_told():
    early, _ = stopped(4e-3, 3)
    c = certificate(early)
    assert ms.Status.CONTACTS_UNSETTLED in code(c) and c.crossed_to_minimum > 0
    assert "no estimate holds" in str(c)
    with pytest.raises(ms.ConvergenceError) as caught:
        certificate(early, throw=True)
    assert isinstance(caught.value.result, ms.Certificate)


def test_the_bound_is_the_same_by_a_matrix_and_by_products(monkeypatch):
    """The change of the Hessian along the Newton step is a matrix in large systems."""
    early, _ = stopped(1e-3)
    by_products = certificate(early).derivative
    monkeypatch.setattr(solution_space, "SMALL", 0)
    by_matrix = certificate(early).derivative
    assert by_products is not None and by_matrix is not None
    # power iteration gives the norm to a few per cent, from below
    assert by_matrix.error_bound >= by_products.error_bound * (1 - 1e-6)
    assert by_matrix.error_bound == pytest.approx(by_products.error_bound, rel=0.05)
    assert by_matrix.error_bound > 0


def test_the_norm_of_a_symmetric_matrix_by_lanczos():
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((60, 60))
    matrix = matrix + matrix.T
    matrix[:, 0] = matrix[0] = 0.0
    matrix[0, 0] = -40.0  # the largest in size, and negative
    start = rng.standard_normal(60)
    norm = derivative_error._largest_in_size(lambda v: matrix @ v, start)
    assert norm == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-3)
    assert derivative_error._largest_in_size(lambda v: 0.0 * v, start) == 0.0
    assert np.isnan(derivative_error._largest_in_size(lambda v: np.nan * v, start))


def test_it_prints_as_a_page_a_table_and_a_dict():
    c = certificate(relaxed(), observable=ms.observables.pressure)
    page = str(c)
    for part in (
        "Is it a minimum?",
        "Is it stable?",
        "How wrong",
        "How far",
        "then pair",
        "translations",
    ):
        assert part in page
    assert max(map(len, page.splitlines())) <= 110
    assert "<table>" in c._repr_html_()
    stored = json.loads(json.dumps(c.as_dict()))
    assert stored["status"] == "CONVERGED" and stored["derivative"]["radius"] == c.radius
    assert c.observable is not None and max(c.observable.values()) < 1e-10
    assert "How wrong" not in str(ms.certify(relaxed())) and np.isnan(ms.certify(relaxed()).error)
    assert "Is it stable?" not in c.page(derivative_only=True)


# ── states that must be told ──


def code(c):
    return [status for status, _ in c.findings]


def test_unjammed():
    eq = ms.minimize(ms.load_system("seed_packing_2d", box={"packing_fraction": 0.3}))
    c = certificate(eq)
    assert c.status is ms.Status.UNJAMMED and "128 of 128" in c.findings[0][1]
    assert c.derivative is None and np.isnan(c.error)


def test_a_saddle():
    row = np.array([[-1.1, 0.0], [0.0, 0.0], [1.1, 0.0]])  # three in a row stay in a row
    potential = ms.potentials.lennard_jones()
    eq = ms.minimize(
        ms.System.create(row, None, potential, {"sigma": 1.0, "epsilon": 1.0}), leave_saddles=False
    )
    c = ms.certify(eq, {"sigma": 1.0})
    assert (
        c.status is ms.Status.INDEFINITE
        and c.negative_modes == 1
        and "1 mode of negative" in c.findings[0][1]
    )
    for solver in (
        ms.implicit.CG(),
        ms.implicit.Direct(),
        ms.implicit.MINRES(),
        ms.implicit.GMRES(),
    ):
        bent = ms.response(
            eq, np.array([[0.0, 1.0], [0.0, -2.0], [0.0, 1.0]]), solve=solver, throw=False
        )
        assert bent.status is ms.Status.INDEFINITE


def test_a_floppy_network():
    # four rods without a diagonal
    square = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    potential = ms.potentials.harmonic_bonds([[0, 1], [1, 2], [2, 3], [3, 0]])
    eq = ms.minimize(ms.System.create(square, None, potential, {"stiffness": 1.0, "length": 1.0}))
    c = ms.certify(eq, {"length": 1.0})
    assert c.status is ms.Status.FLOPPY and c.floppy_modes == 1 and c.zero_modes == 4
    assert (c.translations, c.rotations) == (2, 1)


def test_a_minimum_that_its_cell_alone_holds():
    """Its shear modulus is negative:
    what is stable in the cell falls in enthalpy as the cell shears.
    """
    eq = discs_at_rest("unstable")
    c, m = ms.certify(eq, THETA), ms.elasticity.moduli(eq, throw=False)
    assert (
        c.status is ms.Status.UNSTABLE
        and not c.status.good
        and c.negative_modes == 0
        and c.strain is not None
    )
    birch = ms.elasticity.isotropic(m.birch)
    want = [float(birch.bulk), float(birch.shear), float(m.stability)]
    np.testing.assert_allclose([c.strain.bulk, c.strain.shear, c.strain.smallest], want, rtol=1e-9)
    assert f"shear modulus {want[1]:.3g}" in c.findings[0][1] and "against strain" in str(c)
    assert c.as_dict()["strain"] == {
        "bulk": c.strain.bulk,
        "shear": c.strain.shear,
        "smallest": c.strain.smallest,
        "status": "UNSTABLE",
    }
    # the derivative holds in the cell
    assert c.error < 1e-8 and c.derivative is not None and c.derivative.status.good
    with pytest.raises(ms.ConvergenceError, match="only the cell holds this configuration"):
        ms.certify(eq, throw=True)
    birches = np.asarray(ms.elasticity.mandel(m.birch))
    _, vectors = np.linalg.eigh(0.5 * (birches + birches.T))
    x, y, xy = vectors[:, 0]
    softest, h = np.array([[x, xy / 2**0.5], [xy / 2**0.5, y]]), 1e-4

    def enthalpy(strain):
        change, s = np.eye(2) + strain, eq.system
        moved = s.replace(positions=jnp.asarray(np.asarray(s.positions) @ change.T))
        there = moved.replace(
            boundary=FixedBox(jnp.asarray(change @ np.asarray(s.box)))
        ).reallocate()
        relaxed = ms.minimize(there, tolerance=1e-13).system
        return float(ms.observables.energy(relaxed)) + float(m.pressure) * float(relaxed.volume)

    middle, ends = enthalpy(0.0 * softest), [enthalpy(s * h * softest) for s in (1.0, -1.0)]
    curvature = (ends[0] - 2.0 * middle + ends[1]) / (h**2 * float(eq.system.volume))
    assert curvature == pytest.approx(c.strain.smallest, rel=0.05)


def test_a_minimum_that_some_strain_lowers_is_good_in_its_cell_with_a_warning():
    c = ms.certify(discs_at_rest("sheared away"), THETA)
    assert c.status is ms.Status.SHAPE_HELD and c.status.warning and len(c.warnings) == 1
    assert c.strain is not None and c.strain.shear > 0 > c.strain.smallest and c.error < 1e-8
    d = ms.certify(discs_at_rest("stable"), THETA)
    assert d.status is ms.Status.CONVERGED and d.strain is not None and d.strain.smallest > 0
    # at its pressure, with its size free, its shape is still held
    for kind in ("unstable", "sheared away"):
        eq = ms.minimize(
            discs_at_rest(kind).system,
            pressure=float(ms.observables.pressure(discs_at_rest(kind).system)),
        )
        assert ms.certify(eq).status is (
            ms.Status.UNSTABLE if kind == "unstable" else ms.Status.SHAPE_HELD
        )


def test_a_cluster_that_meets_no_image_of_itself_is_held_by_no_cell():
    three = [[5.0, 5.0], [6.12, 5.0], [5.56, 5.97]]
    potential = ms.potentials.lennard_jones()
    c = ms.certify(
        ms.minimize(ms.System.create(three, 20.0, potential, {"sigma": 1.0, "epsilon": 1.0}))
    )
    assert c.status is ms.Status.CONVERGED and c.rotations == 1
    assert c.strain is not None and c.strain.status in (
        ms.Status.FLOPPY,
        ms.Status.STIFFNESS_UNSETTLED,
    )
    assert max(map(abs, (c.strain.bulk, c.strain.shear, c.strain.smallest))) < 1e-13


def test_the_stiffness_of_a_ring_is_zero():
    c = ms.certify(ms.minimize(ring()))
    assert (
        c.status is ms.Status.FLOPPY
        and c.floppy_modes == 27
        and c.stiffness_min == 0.0
        and c.strain is None
    )


def test_an_unconverged_minimum():
    eq = ms.minimize(ms.load_system("seed_packing_2d"), max_steps=300, throw=False)
    c = certificate(eq)
    assert c.status is ms.Status.MAX_STEPS_REACHED and "max_force" in c.findings[0][1]


def test_an_observable_on_a_rattler():
    s = ms.load_system("packing_from_file")
    lin = ms.linearize(ms.minimize(s, **ms.io.relaxation_options("packing_from_file")))
    loose = np.flatnonzero(lin.network.rattlers)
    if not loose.size:  # make one: a particle too small to touch
        sigma = np.asarray(lin.system.params["sigma"]).copy()
        sigma[0] *= 0.05
        lin = ms.linearize(ms.minimize(s, {"sigma": sigma}))
        loose = np.flatnonzero(lin.network.rattlers)
    c = ms.certify(lin, observable=lambda s: s.positions[loose[0], 0])
    assert c.status is ms.Status.NULL_COMPONENT_DROPPED and c.status.warning
    assert c.observable is not None and c.observable["rattlers"] == pytest.approx(1.0)
    change = np.zeros(s.n)
    change[loose[0]] = 1.0
    d = ms.certify(lin, {"sigma": change})
    assert ms.Status.NULL_COMPONENT_DROPPED in code(d) and d.derivative is not None
    assert d.derivative.norm == 0.0 and d.derivative.on_rattlers == 1.0


def test_single_precision():
    eq = relaxed()
    s = eq.system
    single = ms.System.create(
        np.asarray(s.positions, np.float32),
        np.asarray(s.box, np.float32),
        s.potential,
        s.params,
        s.species,
    )
    relaxed_single = ms.minimize(single, tolerance=1e-5)
    c = certificate(relaxed_single)
    assert c.precision == "float32" and ms.Status.SINGLE_PRECISION in code(c)
    assert c.floppy_modes == 0 and c.stiffness_min == pytest.approx(
        certificate(eq).stiffness_min, rel=0.05
    )
    # a failure comes before this warning
    failing = ms.certify(relaxed_single, observable=lambda s: jnp.sum(s.positions) * jnp.nan)
    assert failing.status is ms.Status.NOT_FINITE
    severities = [status.severity for status, _ in failing.findings]
    assert severities == sorted(severities, reverse=True) and len(set(severities)) > 1


def test_bad_input():
    with pytest.raises(ms.InputError, match="modes is 0"):
        ms.certify(relaxed(), modes=0)
    with pytest.raises(ms.InputError, match="'sgima'"):
        ms.certify(relaxed(), {"sgima": 1.0})
    with pytest.raises(ms.InputError, match="got a batch"):
        ms.certify(ms.minimize(ms.stack([relaxed().system, relaxed().system])))


DANGLING = [[0, 1], [1, 2], [0, 2], [1, 3]]


@pytest.mark.parametrize(
    "stiffness, tolerance", [(1.0, 1e-12), (0.1, 1e-12), (0.01, 1e-12), (1.0, 1e-8)]
)
def test_a_dangling_bond_is_never_good_whatever_force_is_left(stiffness, tolerance):
    """The tension left in the bond gives its turning a stiffness of either sign."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        places = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 0.9], [2.0, 0.1]]) + 0.05 * rng.normal(
            size=(4, 2)
        )
        potential = ms.potentials.harmonic_bonds(DANGLING)
        system = ms.System.create(
            places, None, potential, {"stiffness": stiffness, "length": rng.uniform(0.8, 1.2, 4)}
        )
        c = ms.certify(ms.minimize(system, tolerance=tolerance), {"length": [1.0, 0.0, 0.0, 0.0]})
        assert c.status in (ms.Status.FLOPPY, ms.Status.STIFFNESS_UNSETTLED)
        assert c.floppy_modes + c.unsettled_modes == 1 and c.negative_modes == 0
        assert c.error == np.inf and c.distance == np.inf


def test_a_derivative_without_a_digit_is_not_good():
    atoms = ms.System.create(
        [[0.0, 0.0], [1.18, 0.0]],
        None,
        ms.potentials.lennard_jones(),
        {"sigma": 1.0, "epsilon": 1.0},
    )
    c = ms.certify(ms.minimize(atoms, tolerance=3.0), {"sigma": 1.0})
    assert c.status is ms.Status.INACCURATE and c.error > 0.1


def test_where_nothing_moves_no_error_is_relative_to_nothing():
    c = ms.certify(relaxed(), {"epsilon": 1.0})  # one scale of energy moves nothing
    assert c.status is ms.Status.CONVERGED
    assert c.derivative is not None and c.derivative.vanishes and c.derivative.norm < 1e-9
    assert "nothing moves" in str(c) and "sharp estimate" not in str(c)


def test_modes_and_saddles_give_the_same_verdict():
    row = ms.System.create(
        [[-1.1, 0.0], [0.0, 0.0], [1.1, 0.0]],
        None,
        ms.potentials.lennard_jones(),
        {"sigma": 1.0, "epsilon": 1.0},
    )
    eq = ms.minimize(row, leave_saddles=False)
    for modes in (1, 3):
        c = ms.certify(eq, {"sigma": 1.0}, modes=modes)
        assert c.status is ms.Status.INDEFINITE and c.distance == np.inf
        assert c.derivative is not None and np.isnan(c.derivative.linear_error)
        # three pairs, each of which crosses the switch's onset and its end
        assert c.derivative.crossed(100.0) == 3


def test_the_energy_touches_no_rigid_motion():
    c = ms.certify(relaxed(), observable=ms.observables.energy)
    assert c.observable is not None
    assert c.status is ms.Status.CONVERGED and c.observable["rigid motions"] < 1e-12


def test_the_dict_is_json_whatever_the_state():
    lost = ms.minimize(ms.load_system("seed_packing_2d"), max_steps=50, throw=False)
    for eq in (relaxed(), lost):
        kept = json.loads(json.dumps(certificate(eq).as_dict(), allow_nan=False))
    assert kept["distance"] is None and kept["status"] == "MAX_STEPS_REACHED"
    found = certificate(relaxed()).as_dict()["derivative"]
    assert found["pair_forward"]["opens"] in (True, False) and found["pair_forward"][
        "distance"
    ] in (0.6, 0.8, 1.0)
    assert found["estimates_hold"] and found["dparams"]["sigma"] == [0.0, 1.0]


def test_a_batch_is_taken_by_its_members():
    batch = ms.minimize(ms.stack([ms.load_system("seed_packing_2d", seed=k) for k in (0, 1)]))
    with pytest.raises(ms.InputError, match=r"batch of 2: .* ms\.unstack\(eq\)\[0\]"):
        ms.certify(batch)
    first, _ = ms.unstack(batch)
    assert ms.certify(first).stiffness_min == pytest.approx(
        ms.certify(relaxed()).stiffness_min, rel=1e-6
    )
    with pytest.raises(ms.InputError, match="not a batch"):
        ms.unstack(first)


@pytest.mark.parametrize(
    "options", [{"modes": 2.5}, {"modes": 0}, {"modes": True}, {"observable": 3}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(ms.InputError, match=r"(modes|observable) is"):
        ms.certify(relaxed(), **options)
