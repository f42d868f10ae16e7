"""Packings just above jamming, held by hardly more contacts than they need:
the data, and sensitivities on them.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from conftest import relative

import mdsens as ms
from mdsens.mechanics.hessian import dense_hessian
from mdsens.model.box import FixedBox

FOLDER = Path(__file__).parent / "jammed"
PRESSURES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
# as `make fuzz` has it: each file compiles for half a minute
LONG = "MDSENS_FUZZ_CASES" in os.environ
SMALL = ["2d_n64_seed0", "3d_n64_seed0"]
SMALL += ["2d_n64_seed1", "3d_n64_seed1", "2d_n256", "3d_n256"] if LONG else []
NAMES = [*SMALL, "2d_n1024", *(["3d_n1024"] if LONG else [])]
LARGER = {"sigma": [0.0, 1.0]}  # the larger species grows

members = pytest.mark.parametrize("member", range(5), ids=[f"P={P:g}" for P in PRESSURES])
# A scope, so that all tests of one file run after each other,
# in one process: each size compiles anew.
every_file = pytest.mark.parametrize("name", NAMES, scope="module")
small_files = pytest.mark.parametrize("name", SMALL, scope="module")


@cache
def packings(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


@cache
def _densest(name: str) -> ms.System:
    file = packings(name)
    params = {"sigma": file["sigma"], "epsilon": 1.0, "alpha": 2.0}
    potential = ms.potentials.soft_sphere()
    return ms.System.create(
        file["positions"][0], float(file["length"][0]), potential, params, file["species"]
    )


def jammed(name: str, member: int) -> ms.System:
    """A packing at its stored positions, with a list of the capacity
    that the densest of its file needs.
    """
    file, dense = packings(name), _densest(name)
    box = FixedBox(jnp.asarray(file["length"][member] * np.eye(dense.dimension)))
    return dense.replace(positions=jnp.asarray(file["positions"][member]), boundary=box).reallocate(
        keep=True
    )


@cache
def minimum(name: str, member: int) -> ms.Linearization:
    """Relaxed already, so that minimizing takes no step."""
    eq = ms.minimize(jammed(name, member), tolerance=2e-14)
    assert int(eq.steps) == 0
    return ms.linearize(eq)


def response_in_closed_form(name: str, member: int, rattlers: np.ndarray) -> np.ndarray:
    """dR by the larger species' diameter, H^+ dF, from nothing but the file and the rattlers.

    A contact of overlap 1 - r / s pushes with f = (1 - r / s) / s along n. So k = 1 / s^2 along n
    and -f / r across it, and df / ds = (2 r / s - 1) / s^2. The pseudo-inverse is that of H on the
    range of translations removed: (H + t t')^-1 with t the normalized translations, on a right-hand
    side without them.
    """
    file = packings(name)
    R, L, species = file["positions"][member], file["length"][member], file["species"]
    n, d = R.shape
    i, j = np.triu_indices(n, 1)
    difference = R[i] - R[j]
    difference -= L * np.round(difference / L)
    r = np.linalg.norm(difference, axis=1)
    s = 0.5 * (file["sigma"][species[i]] + file["sigma"][species[j]])
    held = (r < s) & ~rattlers[i] & ~rattlers[j]
    i, j, r, s = i[held], j[held], r[held], s[held]
    normal = difference[held] / r[:, None]
    f = (1 - r / s) / s
    outer = normal[:, :, None] * normal[:, None, :]
    block = outer / s[:, None, None] ** 2 - (f / r)[:, None, None] * (np.eye(d) - outer)
    H = np.zeros((n, n, d, d))
    np.add.at(H, (i, i), block)
    np.add.at(H, (j, j), block)
    H[i, j] -= block
    H[j, i] -= block
    grown = 0.5 * (species[i] + species[j])  # ds
    change = ((2 * r / s - 1) / s**2 * grown)[:, None] * normal
    dF = np.zeros((n, d))
    np.add.at(dF, i, change)
    np.add.at(dF, j, -change)

    free = np.repeat(~rattlers, d)
    H = H.transpose(0, 2, 1, 3).reshape(n * d, n * d)[np.ix_(free, free)]
    moving = (~rattlers).sum()
    H += np.tile(np.eye(d), (moving, moving)) / moving
    factor = scipy.linalg.cho_factor(H, lower=True)
    x = scipy.linalg.cho_solve(factor, dF.ravel()[free])
    x += scipy.linalg.cho_solve(factor, dF.ravel()[free] - H @ x)
    response = np.zeros((n, d))
    response[~rattlers] = x.reshape(moving, d)
    return response


@every_file
@members
def test_packing_is_what_its_file_says(name, member):
    """At rest to round-off, at its pressure, with its rattlers,
    and between isostatic and a little above.
    """
    file, lin = packings(name), minimum(name, member)
    system, net = lin.equilibrium.system, lin.network
    assert float(lin.equilibrium.max_force) < 2e-14
    assert float(lin.equilibrium.max_force) < 2e-8 * float(net.mean_force)
    pressure = float(ms.observables.pressure(system))
    assert pressure == pytest.approx(PRESSURES[member], rel=1e-2)
    assert pressure == pytest.approx(float(file["pressure"][member]), rel=1e-9)
    assert int(net.rattlers.sum()) == file["rattlers"][member]
    assert int(net.pairs) == file["contacts"][member]
    d, z = system.dimension, float(ms.observables.coordination(system))
    moving = system.n - int(net.rattlers.sum())
    # one contact more than the degrees of freedom is the least that carries pressure;
    # the rest opens as the root of it
    assert z >= 2 * d - 2 * (d - 1) / moving - 1e-12
    assert z - 2 * d < (8, 20)[d - 2] * PRESSURES[member] ** 0.5


@small_files
@members
def test_packing_is_rigid(name, member):
    file, lin = packings(name), minimum(name, member)
    values = np.linalg.eigvalsh(np.asarray(dense_hessian(lin.system)))
    zero = np.abs(values) < 1e-12 * values[-1]
    d = lin.system.dimension
    assert zero.sum() == d * (file["rattlers"][member] + 1)
    assert values[~zero][0] == pytest.approx(float(file["lambda_min"][member]), rel=1e-6)
    assert values[-1] == pytest.approx(float(file["lambda_max"][member]), rel=1e-10)


@every_file
@members
def test_jvp_is_the_pseudo_inverse_on_the_backbone(name, member):
    """However close to jamming; and the adjoint identity <w, J ds> = <J' w, ds>."""
    lin = minimum(name, member)
    rattlers = np.asarray(lin.network.rattlers)
    r = ms.jvp(lin, LARGER)
    assert r.status is ms.Status.CONVERGED
    assert relative(r.value, response_in_closed_form(name, member, rattlers)) < 1e-8
    assert not np.asarray(r.value)[rattlers].any()
    w = np.random.default_rng(member).normal(size=r.value.shape)
    left, right = np.vdot(w, r.value), float(ms.vjp(lin, w).value["sigma"][1])
    assert abs(left - right) < 1e-8 * np.linalg.norm(w) * np.linalg.norm(r.value)


@every_file
@members
def test_certificate_is_the_dense_truth(name, member):
    """Rattlers, zero modes and the smallest stiffness are those
    of the dense Hessian (computed once, in the file).
    """
    file, lin = packings(name), minimum(name, member)
    c = ms.certify(lin, LARGER)
    assert c.rattlers.sum() == file["rattlers"][member]
    assert c.zero_modes == lin.system.dimension * (file["rattlers"][member] + 1)
    assert c.stiffness_min == pytest.approx(float(file["lambda_min"][member]), rel=1e-6)
    assert c.negative_modes == c.floppy_modes == c.crossed_to_minimum == 0
    assert c.strain is not None and c.error < 1e-3
    # next to unjamming the shear modulus of one in four or so is negative: only its cell holds it
    assert (
        c.status is ms.Status.UNSTABLE if min(c.strain.bulk, c.strain.shear) < 0 else c.status.good
    )
    assert c.derivative is not None
    assert relative(c.derivative.response, ms.jvp(lin, LARGER).value) < 1e-8
