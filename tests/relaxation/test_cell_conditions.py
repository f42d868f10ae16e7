"""Cells that relax to a stress or at a volume, with all strains free or some: they come to rest
where it was asked, wherever they start, and what cannot be asked is refused.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from cells import (
    ALONG_X,
    DEVIATOR,
    IN_PLANE,
    STRESS,
    STRESS_3D,
    TENSION,
    TOLERANCE,
    at_rest,
    discs,
    with_load,
)
from conftest import LONG, PACKINGS, packing, quick, relative

import mdsens as ms
from mdsens.mechanics.cell import deformed
from mdsens.mechanics.load import StressLoad
from mdsens.mechanics.strain import basis
from mdsens.relaxation import AtPressure, AtStress, AtVolume, FixedCell
from mdsens.relaxation.cell_conditions import condition_of, strains_of

PERIODIC = {2: (True, True), 3: (True, True, True)}


# -- coming to rest


@pytest.mark.parametrize(
    ("kind", "target", "free"),
    [
        ("stress", STRESS, np.ones((2, 2), bool)),
        ("along x", -0.05 * np.eye(2), ALONG_X),
        ("spheres", STRESS_3D, np.ones((3, 3), bool)),
        ("vacancy", TENSION, IN_PLANE),
    ],
)
def test_the_stress_is_the_one_asked_for_where_the_cell_is_free(kind, target, free):
    eq = at_rest(kind)
    stress = np.asarray(ms.observables.stress(eq.system))
    assert ms.Status(int(eq.status)) is ms.Status.CONVERGED
    np.testing.assert_allclose(stress[free], target[free], atol=1e-12)
    assert free.all() or np.abs((stress - target)[~free]).max() > 1e-4


def test_what_is_not_free_does_not_change():
    box, start = np.asarray(at_rest("along x").system.box), np.asarray(discs().box)
    np.testing.assert_array_equal(box[:, 1], start[:, 1])
    assert box[1, 0] == 0.0 and abs(box[0, 0] / start[0, 0] - 1) > 1e-3
    assert at_rest("along x").system.boundary.orthogonal
    box = np.asarray(at_rest("vacancy").system.box)
    start = np.asarray(ms.load_system("argon_vacancy").box)
    np.testing.assert_array_equal(box[2], start[2])
    np.testing.assert_array_equal(box[:2, 2], 0.0)


def test_the_volume_is_kept_to_round_off_and_the_deviator_reached():
    eq = at_rest("volume")
    assert float(eq.system.volume) == pytest.approx(float(discs().volume), rel=1e-14)
    stress = np.asarray(ms.observables.stress(eq.system))
    np.testing.assert_allclose(stress - np.trace(stress) / 2 * np.eye(2), DEVIATOR, atol=1e-12)
    # 26 along both axes, which stay where they are; xy is not asked for
    free = np.eye(2, dtype=bool)
    eq = ms.minimize(discs(), cell=AtVolume(DEVIATOR, volume=26.0, free=free), tolerance=TOLERANCE)
    assert float(eq.system.volume) == pytest.approx(26.0, rel=1e-14)
    stress = np.asarray(ms.observables.stress(eq.system))
    assert stress[0, 0] - stress[1, 1] == pytest.approx(2 * DEVIATOR[0, 0], abs=1e-12)
    assert abs(stress[0, 1] - DEVIATOR[0, 1]) > 1e-5
    assert np.asarray(eq.system.box)[0, 1] == 0.0


def test_a_stress_without_shear_is_a_pressure():
    """Relaxed by itself, and in its derivatives at the same configuration."""
    at_pressure = AtPressure(0.05, shape=True)
    one = ms.minimize(discs(), cell=at_pressure, tolerance=TOLERANCE)
    other = ms.minimize(discs(), cell=AtStress(-0.05 * np.eye(2)), tolerance=TOLERANCE)
    assert relative(other.positions, one.positions) < 1e-12
    assert relative(other.system.box, one.system.box) < 1e-12
    same = ms.linearize(with_load(one, at_stress=StressLoad(-0.05 * jnp.eye(2))))
    lin = ms.linearize(one)
    rng = np.random.default_rng(0)
    w = ms.Unknowns(jnp.asarray(rng.normal(size=(32, 2))), jnp.asarray(rng.normal(size=3)))
    change = {"sigma": rng.normal(size=32)}
    for here, there in (
        (ms.jvp(lin, change).value, ms.jvp(same, change).value),
        (ms.jvp(lin, {"pressure": 1.0}).value, ms.jvp(same, {"stress": -np.eye(2)}).value),
    ):
        np.testing.assert_allclose(there.positions, here.positions, atol=1e-12 * 32)
        np.testing.assert_allclose(there.strain, here.strain, atol=1e-12)
    here, there = ms.vjp(lin, w).value, ms.vjp(same, w).value
    np.testing.assert_allclose(there["sigma"], here["sigma"], rtol=1e-11)
    # the pressure moves the trace
    assert -np.trace(there["stress"]) == pytest.approx(float(here["pressure"]), rel=1e-11)


def test_the_cell_strains_without_a_rotation_and_by_any_path(monkeypatch):
    eq = at_rest("stress")
    F = np.asarray(eq.system.box) @ np.linalg.inv(np.asarray(discs().box))
    assert abs(F[0, 1]) > 1e-3
    np.testing.assert_allclose(F, F.T, atol=1e-14)
    # from near the root, by steps of two sizes that do not commute with the strain
    start = deformed(eq.system, jnp.asarray([[0.004, 0.003], [0.003, -0.002]])).reallocate()
    there = ms.minimize(start, cell=AtStress(STRESS), tolerance=TOLERANCE)
    monkeypatch.setattr("mdsens.mechanics.cell.LONGEST", 5e-4)
    slowly = ms.minimize(start, cell=AtStress(STRESS), tolerance=TOLERANCE)
    assert int(slowly.steps) > int(there.steps)
    box = np.asarray(there.system.box)
    np.testing.assert_allclose(np.asarray(slowly.system.box), box, atol=1e-12)
    # without the rotation back, the two would differ by the commutator of their strains


@LONG
def test_a_stress_is_reached_next_to_unjamming():
    start = packing(PACKINGS[1], 0)  # at a pressure of 1e-4
    target = -1e-4 * np.diag([1.02, 0.99, 1.0])
    eq = ms.minimize(start, cell=AtStress(target))
    stress = np.asarray(ms.observables.stress(eq.system))
    np.testing.assert_allclose(stress, target, atol=1e-9 * 1e-4 + 1e-13)
    cell = ms.linearize(eq).cell
    assert cell is not None and int(cell.status) == ms.Status.CONVERGED


@pytest.mark.parametrize("seed", quick(range(4), 1))
def test_a_packing_is_compressed_from_an_unjammed_start(seed):
    start = discs(seed)
    loose = deformed(start, 0.2 * jnp.eye(2)).reallocate()
    eq = ms.minimize(loose, cell=AtStress(STRESS))
    np.testing.assert_allclose(ms.observables.stress(eq.system), STRESS, atol=1e-11)


def test_a_load_under_which_nothing_rests_has_a_status():
    eq = ms.minimize(discs(), cell=AtStress(np.diag([0.1, 0.05])), throw=False)
    assert ms.Status(int(eq.status)) is ms.Status.NO_REST
    with pytest.raises(ms.ConvergenceError, match=r"at stress xx 0\.1, yy 0\.05, xy 0 stopped"):
        ms.minimize(discs(), cell=AtStress(np.diag([0.1, 0.05])))
    # at a volume where nothing touches, the shape is anybody's
    eq = ms.minimize(discs(), cell=AtVolume(volume=45.0), throw=False)
    assert ms.Status(int(eq.status)) is ms.Status.FLOPPY
    assert float(eq.system.volume) == pytest.approx(45.0, rel=1e-14)


def test_the_table_says_what_was_asked_for():
    texts = {kind: " ".join(str(at_rest(kind)).split()) for kind in ("stress", "volume", "along x")}
    assert (
        "stress xx -0.06, yy -0.05, xy 0.004, to which the size and shape of the cell"
        in texts["stress"]
    )
    assert (
        "volume 28.09, in which the shape of the cell was relaxed to a stress deviator xx"
        in (texts["volume"])
    )
    assert "pressure 0.05, to which the strain xx of the cell was relaxed" in texts["along x"]
    # of the component that is not free nothing was asked
    assert "stress xx 0.0005, yy -0.0003, xy 0.0002, to which the strains xx, yy, xy" in " ".join(
        str(at_rest("vacancy")).split()
    )


@pytest.mark.parametrize("kind", ["stress", "volume"])
def test_it_is_stored_and_read_again(kind, tmp_path):
    eq = at_rest(kind)
    ms.io.save(tmp_path / "eq.npz", eq)
    back = ms.io.load(tmp_path / "eq.npz")
    assert type(back.load) is type(eq.load)
    for name, value in eq.load.params.items():
        np.testing.assert_array_equal(back.load.params[name], value)
    change = {next(iter(eq.load.params)): 1e-3 * np.eye(2) if kind == "stress" else 1.0}
    np.testing.assert_array_equal(
        ms.jvp(back, change).value.strain, ms.jvp(eq, change).value.strain
    )


def test_members_of_a_batch_come_to_rest_each_and_respond_each():
    starts = [discs(0), discs(2)]
    batch = ms.minimize(ms.stack(starts), cell=AtStress(STRESS), tolerance=TOLERANCE)
    change = {"epsilon": 1.0, "stress": np.array([[0.3, 0.1], [0.1, 0.0]])}
    w = np.random.default_rng(0).normal(size=(32, 2))
    alone = at_rest("stress")
    first: Any = ms.unstack(batch)[0]
    assert relative(first.system.box, alone.system.box) < 1e-12
    np.testing.assert_allclose(
        ms.jvp(batch, change).value.strain[0], ms.jvp(alone, change).value.strain, rtol=1e-9
    )
    pulled = ms.vjp(batch, w)
    np.testing.assert_allclose(
        pulled.value["stress"][0], ms.vjp(alone, w).value["stress"], rtol=1e-7
    )
    assert [p.paired for p in pulled.wrt if p.name == "stress"] == [True]


# -- the strains that are free


@pytest.mark.parametrize("dimension", [2, 3])
def test_strains_are_an_orthonormal_basis_of_what_is_free(dimension):
    d, every = dimension, PERIODIC[dimension]
    m = d * (d + 1) // 2
    in_plane = np.zeros((d, d), bool)
    in_plane[:2, :2] = True
    for condition, k in (
        (AtPressure(0.1), 1),
        (AtPressure(0.1, shape=True), m),
        (AtPressure(0.1, shape=True, free=np.eye(d, dtype=bool)), d),
        (AtStress(np.eye(d)), m),
        (AtStress(np.eye(d), in_plane), 3),
        (AtVolume(), m - 1),
        (AtVolume(free=in_plane), 2),
    ):
        strains = strains_of(condition, d, every)
        np.testing.assert_allclose(
            np.einsum("aij,bij->ab", strains, strains), np.eye(k), atol=1e-15
        )
        np.testing.assert_array_equal(strains, np.swapaxes(strains, 1, 2))
        traces = np.einsum("aii->a", strains)
        assert isinstance(condition, AtVolume) == (np.abs(traces).max() < 1e-15)
    np.testing.assert_array_equal(strains_of(AtPressure(0.1, shape=True), d, every), basis(d))


def test_no_strain_involves_an_axis_without_a_period():
    slab = (True, True, False)
    for condition, k in (
        (AtPressure(0.1), 1),
        (AtPressure(0.1, shape=True), 3),
        (AtStress(np.eye(3)), 3),
        (AtVolume(), 2),
    ):
        strains = strains_of(condition, 3, slab)
        assert len(strains) == k and not strains[:, 2].any() and not strains[:, :, 2].any()
    np.testing.assert_allclose(strains_of(AtPressure(0.1), 3, slab)[0][:2, :2], np.eye(2) / 2**0.5)
    assert not len(strains_of(AtVolume(), 3, (True, False, False)))


def test_the_condition_is_known_from_the_minimum():
    for kind in ("stress", "volume", "along x"):
        eq = at_rest(kind)
        condition: Any = condition_of(eq, eq.load)
        np.testing.assert_array_equal(strains_of(condition, 2, (True, True)), eq.strains)
    plain = with_load(at_rest("stress"))
    assert plain.load is None and condition_of(plain, None) == FixedCell()
    same = AtStress(STRESS.tolist(), [[True, True], [True, True]])
    assert same == AtStress(STRESS, np.ones((2, 2), bool)) and hash(same) == hash(same)


# -- what is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AtStress([[1.0, 0.2], [0.1, 1.0]]), r"`stress` is 0.2 at \[0,1\] and 0.1 at"),
        (lambda: AtStress(0.1), r"`stress` has shape \(\): give a symmetric \(d, d\) matrix"),
        (lambda: AtStress(np.diag([1.0, np.nan])), "`stress` is .*nan.*: give finite numbers"),
        (lambda: AtStress("high"), "`stress` is 'high': give a symmetric"),
        (lambda: AtStress(np.eye(2), [[True, False], [True, True]]), "`free` is False at"),
        (lambda: AtStress(np.eye(2), np.zeros((2, 2), bool)), "`free` is False everywhere"),
        (lambda: AtStress(np.eye(2), np.ones((2, 2))), "matrix of True and False"),
        (
            lambda: AtStress(np.eye(2), [[False, True], [True, True]]),
            "`free` has yy, xy and not xx, without which",
        ),
        (
            lambda: AtStress(np.eye(3), np.eye(3, k=1) + np.eye(3, k=-1) + np.eye(3) > 0),
            "`free` has xx, yy, zz, xy, yz and not xz",
        ),
        (lambda: AtPressure(0.1, free=np.eye(2, dtype=bool)), "give shape=True with `free`"),
        (lambda: AtVolume(np.diag([1.0, 0.0])), "`deviator` has the trace 1"),
        (lambda: AtVolume(volume=-1.0), "`volume` is -1.0: give a positive number"),
    ],
)
def test_a_condition_that_makes_no_sense_is_refused(make, message):
    with pytest.raises(ms.InputError, match=message):
        make()


def named(name: str) -> ms.System:
    """Spheres whose potential has a parameter of this name."""
    potential = ms.potentials.from_pair(lambda r, k: k * jnp.maximum(1 - r, 0) ** 3, ("k",), 1.0)
    places = np.random.default_rng(0).random((8, 2)) * 3
    return ms.System.create(places, 3.0, potential.renamed({"k": name}), {name: 1.0})


@pytest.mark.parametrize(
    ("system", "cell", "message"),
    [
        (discs, AtStress(np.eye(3)), r"`stress` has shape \(3, 3\), and the system is in 2-D"),
        (discs, AtVolume(DEVIATOR, free=np.eye(3, dtype=bool)), r"`free` has shape \(3, 3\)"),
        (discs, AtVolume(free=ALONG_X), "AtVolume needs two axes that are free to stretch"),
        (lambda: ms.load_system("dimer"), AtStress(np.eye(2)), "open boundaries: give it a box"),
        (lambda: ms.load_system("dimer"), AtVolume(), "`volume` needs a cell"),
        (discs, "stress", r"`cell` is 'stress': give FixedCell\(\), AtPressure\(P\), AtStress"),
    ],
)
def test_a_system_that_cannot_follow_is_refused(system, cell, message):
    with pytest.raises(ms.InputError, match=message):
        ms.minimize(system(), cell=cell)


def test_a_potential_may_not_have_a_parameter_of_that_name():
    for name, cell in (("stress", AtStress(np.eye(2))), ("volume", AtVolume())):
        with pytest.raises(ms.InputError, match=f"has a parameter '{name}', which is also"):
            ms.minimize(named(name), cell=cell)


def test_constraints_and_saddles_are_refused():
    pinned = discs().replace(constraints=(ms.constraints.Pinned.particles([0], 32, 2),))
    with pytest.raises(ms.InputError, match="a cell at a stress does not support constraints"):
        AtStress(STRESS).check(pinned)
    with pytest.raises(ms.InputError, match="was relaxed at a volume, and find_saddle keeps"):
        ms.saddles.find_saddle(at_rest("volume"))


def test_a_change_of_a_load_is_checked():
    eq: Any = at_rest("stress")
    with pytest.raises(ms.InputError, match="which is not symmetric: give a symmetric change"):
        ms.jvp(eq, {"stress": np.array([[0.0, 1.0], [0.0, 0.0]])})
    with pytest.raises(ms.InputError, match=r"dparams\['stress'\] has shape \(\)"):
        ms.jvp(eq, {"stress": 1.0})
    with pytest.raises(ms.InputError, match="not relaxed at a volume; do so by"):
        ms.jvp(eq, {"volume": 1.0})
    with pytest.raises(ms.InputError, match="not at a stress; relax a cell that follows a stress"):
        ms.jvp(at_rest("volume"), {"stress": np.eye(2)})
