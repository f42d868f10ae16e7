"""Systems in which nobody is near anybody: an answer or a sentence, never an error inside jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LONG

import mdsens as ms
from mdsens import cli, observables, verify
from mdsens.model import neighbors
from mdsens.model.system import listed, potential_energy

SOFT, SOFTLY = ms.potentials.soft_sphere(), {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0}
Status = ms.Status


def dilute(n: int, d: int = 2) -> ms.System:
    """Unit discs or spheres, ten diameters apart."""
    side = int(np.ceil(n ** (1 / d)))
    places = 10.0 * np.stack(np.unravel_index(np.arange(n), (side,) * d), axis=1) + 0.1
    return ms.System.create(places, 10.0 * side, SOFT, SOFTLY)


def far_atoms() -> ms.System:
    """Argon in angstrom with a sigma of 1, so that no atom is in range of another."""
    fcc = np.array([[0.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [0.0, 0.5, 0.5]])
    cells = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    places = 5.26 * (cells + fcc).reshape(-1, 3)
    return ms.System.create(
        places, 3 * 5.26, ms.potentials.lennard_jones(2.0, 2.5), {"sigma": 1.0, "epsilon": 1.0}
    )


SYSTEMS: dict[str, Any] = {
    "one disc": lambda: dilute(1),
    "two discs": lambda: dilute(2),
    "12 discs": lambda: dilute(12),
    "80 discs": lambda: dilute(80),
    "108 far atoms": far_atoms,
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_where_nothing_is_in_reach_there_is_a_status(name: str):
    system = SYSTEMS[name]()
    eq = ms.minimize(system, throw=False)
    assert Status(int(eq.status)).good and float(eq.max_force) == 0.0
    np.testing.assert_array_equal(eq.positions, system.positions)
    r = ms.jvp(eq, {"sigma": 1.0}, throw=False)
    assert r.status is Status.UNJAMMED and not np.any(np.asarray(r.value)) and str(r)
    with pytest.raises(ms.ConvergenceError, match="no contact carries force"):
        ms.vjp(eq, np.ones(system.positions.shape))
    assert ms.certify(eq).status is Status.UNJAMMED


def test_dilute_discs_find_each_other_at_a_pressure():
    """Twelve far discs are brought together; at no pressure they stay apart, with a status."""
    eq = ms.minimize(dilute(12), pressure=0.05, throw=False)
    status = Status(int(eq.status))
    assert status in (Status.NO_REST, Status.CONVERGED, Status.ROUND_OFF_LIMITED)
    if status.good:
        assert float(ms.observables.pressure(eq.system)) == pytest.approx(0.05, rel=1e-6)
    assert Status(int(ms.minimize(dilute(12), pressure=0.0, throw=False).status)) is Status.NO_REST


@pytest.mark.parametrize(
    "potential", [ms.potentials.lennard_jones(), ms.potentials.harmonic_bonds([])]
)
def test_where_an_attraction_reaches_nobody_it_is_said(potential: Any):
    params = (
        {"sigma": 1.0, "epsilon": 1.0}
        if potential.name == "lennard_jones"
        else {"stiffness": 1.0, "length": 1.0}
    )
    eq = ms.minimize(ms.System.create(np.array([[0.0, 0.0], [30.0, 0.0]]), None, potential, params))
    assert Status(int(eq.status)) is Status.NO_CONTACTS
    assert (
        ms.jvp(eq, {name: jnp.ones_like(v) for name, v in eq.params.items()}, throw=False).status
        is Status.UNJAMMED
    )


# ── every call ──


def nobody(positions: jax.Array, params: Any, displacement: Any) -> jax.Array:
    """A potential of more than pairs, whose particles see each other within a length."""
    i, j = np.triu_indices(positions.shape[0], 1)
    apart = jax.vmap(displacement)(positions[i], positions[j])
    return jnp.sum(jnp.maximum(params["sigma"] ** 2 - jnp.sum(apart**2, axis=-1), 0.0) ** 3)


def bonded(bonds: Any) -> ms.System:
    """Dilute discs with some bonds among them, of one rest length each."""
    at, pairs = dilute(80), np.reshape(np.asarray(bonds, int), (-1, 2))
    params = {**SOFTLY, "stiffness": 1.0, "length": np.full(len(pairs), 10.0)}
    return ms.System.create(
        at.positions, at.box, SOFT + ms.potentials.harmonic_bonds(pairs), params
    )


MORE: dict[str, Any] = {
    **SYSTEMS,
    "80 discs, open": lambda: ms.System.create(dilute(80).positions, None, SOFT, SOFTLY),
    "discs that the cell follows": lambda: ms.System.create(
        dilute(80).positions, ms.PackingFraction(0.005), SOFT, {**SOFTLY, "sigma": np.ones(80)}
    ),
    "no bonds": lambda: bonded([]),
    "no pairs": lambda: ms.System.create(
        dilute(9).positions, None, ms.potentials.from_energy(nobody, ("sigma",)), {"sigma": 1.0}
    ),
}


@cache
def at_rest(name: str) -> ms.Equilibrium:
    return ms.minimize(MORE[name](), throw=False)


@cache
def two(name: str) -> ms.Equilibrium:
    return ms.minimize(ms.stack([MORE[name]()] * 2), throw=False)


def sigma(at: ms.Equilibrium | ms.System) -> dict[str, jax.Array]:
    return {"sigma": jnp.ones_like(at.params["sigma"])}


def along_energy(s: ms.System, p: Any) -> jax.Array:
    return observables.energy(ms.equilibrate(s, p))


# Of a minimum where nothing is in reach: each is asked for without raising, and then with it.
OF_A_MINIMUM: dict[str, Callable[..., Any]] = {
    "linearize": lambda eq, **k: ms.linearize(eq, **k),
    "jvp": lambda eq, **k: ms.jvp(eq, sigma(eq), **k),
    "jvp by CG": lambda eq, **k: ms.jvp(eq, sigma(eq), solve=ms.implicit.CG(), **k),
    "jvp by GMRES": lambda eq, **k: ms.jvp(eq, sigma(eq), solve=ms.implicit.GMRES(), **k),
    "vjp": lambda eq, **k: ms.vjp(eq, np.ones(eq.positions.shape), **k),
    "jacobian": lambda eq, **k: ms.jacobian(eq, **k),
    "gradient": lambda eq, **k: ms.gradient(observables.energy, eq, **k),
    "response": lambda eq, **k: ms.response(eq, np.ones(eq.positions.shape), **k),
    "certify": lambda eq, **k: ms.certify(
        eq, sigma(eq), modes=2, observable=observables.energy, **k
    ),
    "smallest stiffness": lambda eq, **k: ms.modes.smallest_stiffness(eq, **k),
    "its gradient": lambda eq, **k: ms.modes.gradient(eq, **k),
    "moduli": lambda eq, **k: ms.elasticity.moduli(eq, **k),
    "their gradient": lambda eq, **k: ms.elasticity.gradient(lambda m: m.bulk, eq, **k),
    "their jvp": lambda eq, **k: ms.elasticity.jvp(lambda m: m.bulk, eq, sigma(eq), **k),
}
# And what gives a value, whatever is in reach, or refuses.
OTHERS: dict[str, Callable[[str], Any]] = {
    "Fire": lambda name: ms.minimize(MORE[name](), method=ms.relaxation.Fire()),
    "GradientDescent": lambda name: ms.minimize(
        MORE[name](), method=ms.relaxation.GradientDescent()
    ),
    "no pressure": lambda name: ms.minimize(MORE[name](), pressure=0.0, shape=True),
    "jvp of two": lambda name: ms.jvp(
        two(name), {k: jnp.stack([v, v]) for k, v in sigma(MORE[name]()).items()}
    ),
    "vjp of two": lambda name: ms.vjp(two(name), np.ones(two(name).positions.shape)),
    "moduli of a System": lambda name: ms.elasticity.moduli(at_rest(name).system),
    "equilibrate": lambda name: ms.equilibrate(MORE[name](), at_rest(name).params),
    "its gradient": lambda name: jax.grad(lambda p: along_energy(MORE[name](), p))(
        at_rest(name).params
    ),
    "compress": lambda name: ms.packing.compress(
        MORE[name](), 1.02 * float(observables.packing_fraction(MORE[name]()))
    ),
    "find_saddle": lambda name: ms.find_saddle(MORE[name](), max_steps=50),
    "finite_difference": lambda name: verify.finite_difference(at_rest(name), sigma(at_rest(name))),
    "derivative_test": lambda name: verify.derivative_test(
        at_rest(name), sigma(at_rest(name)), [1e-5]
    ),
    "adjoint": lambda name: verify.adjoint(at_rest(name)),
    "unrolled": lambda name: verify.unrolled(MORE[name](), sigma(MORE[name]()), [5]),
    "potential": lambda name: verify.potential(
        MORE[name]().potential,
        MORE[name]().params,
        positions=MORE[name]().positions,
        box=MORE[name]().box,
    ),
    "energy": lambda name: observables.energy(MORE[name]()),
    "stress": lambda name: observables.stress(MORE[name]()),
    "coordination": lambda name: observables.coordination(MORE[name]()),
    "smooth coordination": lambda name: observables.smooth_coordination(MORE[name](), 0.1),
    "bond order": lambda name: observables.bond_order(MORE[name](), 6, 1.5),
    "radial distribution": lambda name: observables.radial_distribution(
        MORE[name](), np.array([0.5, 1.0]), 0.1
    ),
    "distances": lambda name: observables.distances(MORE[name](), np.zeros((0, 2), int)),
}
# of a potential that tells no pairs nobody is known to be loose: it is floppy where it is looked at
NOT_ALONE = {"no pairs"}


def answered(call: Callable[[], Any]) -> Any:
    """What a call gives, with every number a number,
    or the error that it is refused with, in one line.
    """
    try:
        found = call()
    except ms.MdsensError as error:
        assert 10 < len(str(error)) < 500 and "\n" not in str(error), error
        return error
    for leaf in jax.tree.leaves(found):
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating):
            assert not np.isnan(np.asarray(leaf)).any()
    assert repr(found)
    return found


def status_of(found: Any) -> Status:
    stats = getattr(found, "stats", None)
    return Status(int(np.max(np.asarray(found.status if stats is None else stats.status))))


def check_minimum(name: str, call: str) -> None:
    eq = at_rest(name)
    found = answered(lambda: OF_A_MINIMUM[call](eq, throw=False))
    if isinstance(found, ms.InputError):  # moduli without a volume
        assert eq.system.box is None and "volume" in str(found)
        return
    if name not in NOT_ALONE:
        assert status_of(found) is Status.UNJAMMED
        raised = answered(lambda: OF_A_MINIMUM[call](eq, throw=True))
        assert isinstance(raised, ms.ConvergenceError) and raised.status is Status.UNJAMMED
    elif call in ("certify", "smallest stiffness"):
        assert status_of(found) is Status.FLOPPY and "nan" not in str(found)
    if isinstance(found, ms.Displacement) and "jvp" in call and found.nonaffine is not None:
        assert not np.any(np.asarray(found.nonaffine))


def check_other(name: str, call: str) -> None:
    found = answered(lambda: OTHERS[call](name))
    if isinstance(found, ms.ConvergenceError):
        assert found.status in (
            Status.UNJAMMED,
            Status.NO_REST,
            Status.NOT_A_SADDLE,
            Status.STAGNATED,
        )
    elif isinstance(found, ms.InputError):
        return
    elif call in ("energy", "stress", "coordination", "distances"):
        assert not np.any(np.asarray(found))
    elif call == "its gradient":
        assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(found))
    elif call in ("Fire", "GradientDescent", "equilibrate"):
        at = getattr(found, "system", found)
        np.testing.assert_allclose(at.positions, MORE[name]().positions, rtol=1e-14)


LISTED = (  # of a list made by search, where everything once ended in an error from inside jax
    "80 discs"
)


@pytest.mark.parametrize("call", OF_A_MINIMUM)
def test_what_is_asked_of_nothing_has_a_status(call: str):
    check_minimum(LISTED, call)


@pytest.mark.parametrize("call", OTHERS)
def test_what_is_computed_of_nothing_is_a_value_or_a_sentence(call: str):
    check_other(LISTED, call)


@LONG
@pytest.mark.parametrize("name", [name for name in MORE if name != LISTED])
def test_so_it_is_of_everything_that_is_nothing(name: str):
    for call in OF_A_MINIMUM:
        check_minimum(name, call)
    for call in OTHERS:
        check_other(name, call)


def test_the_first_pair_that_comes_near_finds_room():
    alone = dilute(80)
    near = alone.positions.at[1].set(alone.positions[0] + jnp.array([0.8, 0.0]))
    pairs, anew = jax.jit(listed)(alone, near)
    assert bool(anew) and not bool(pairs.overflowed)
    assert float(potential_energy(alone.replace(neighbors=pairs), near)) == pytest.approx(
        0.5 * 0.2**2
    )
    cut = alone.replace(
        neighbors=dataclasses.replace(alone.neighbors, rows=alone.neighbors.rows[:0])
    )
    pairs, _ = jax.jit(listed)(cut, near)  # a list cut down to none of its rows says so
    assert bool(pairs.overflowed)


@pytest.mark.parametrize("side", [1e3, 1e6, 1e12])
def test_a_dilute_gas_takes_no_more_cells_than_particles_warrant(side: float):
    places = side * np.random.default_rng(0).random((70, 3))
    gas = ms.System.create(places, side, SOFT, SOFTLY)
    assert 1 <= np.prod(np.asarray(gas.neighbors.cells)) <= neighbors.CELLS * 70
    assert not bool(gas.neighbors.overflowed) and float(observables.energy(gas)) == 0.0


CRYSTAL = """
description = "argon in angstrom, with a sigma that is none"
units = "mixed up"
dimension = 3
box = "positions"
[positions]
kind = "lattice"
lattice = "fcc"
constant = 5.26
cells = 3
[potential]
kind = "lennard_jones"
[parameters]
sigma = 1.0
epsilon = 0.0104
"""


def test_the_command_line_says_it_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "crystal.toml"
    path.write_text(CRYSTAL)
    for command in (
        ["relax"],
        ["sensitivity", "--wrt", "sigma"],
        ["certify", "--wrt", "sigma"],
        ["moduli"],
    ):
        code = cli.main([command[0], str(path), *command[1:]])
        said = capsys.readouterr()
        assert code == (0 if command == ["relax"] else 3), said
        assert len(said.err.splitlines()) <= 1 and "Traceback" not in said.out + said.err
        told = " ".join((said.out + said.err).split())
        assert "in contact" in told or "no contact carries force" in told
