"""Induced dipoles and equalized charges: closed forms,
a dense explicit solve, and minimizing again.
"""

from __future__ import annotations

import inspect
import os
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LONG, quick, relative

import mdsens as ms
from mdsens import observables, potentials
from mdsens._util import memory
from mdsens.implicit import CG, GMRES, MINRES, Direct
from mdsens.model.system import potential_energy
from mdsens.potentials import self_consistent
from mdsens.sensitivity.linearization import Linearization

CORNERS = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)], float)


# ── closed forms ──


def cluster(potential, positions, **params) -> ms.System:
    return ms.System.create(np.asarray(positions, float), None, potential, params)


@jax.jit
def energy_and_slope(system: ms.System):
    return jax.value_and_grad(lambda R: potential_energy(system, R))(system.positions)


@jax.jit
def all_of(system: ms.System):
    return observables.energy(system), *moments(system)


@jax.jit
def moments(system: ms.System):
    return (
        observables.charges(system),
        observables.induced_dipoles(system),
        observables.dipole(system),
    )


@pytest.mark.parametrize("damped", [True, pytest.param(False, marks=LONG)])
def test_a_charge_and_a_polarizable_particle(damped):
    r, q, alpha, a = 1.7, 0.8, 0.3, 0.5
    given = {"charge": [q, 0.0], "polarizability": alpha, **({"damping": a} if damped else {})}
    system = cluster(potentials.induced_dipoles(damped), [[0, 0, 0], [0, 0, r]], **given)
    x = a * r**3 / alpha if damped else np.inf
    s = 1 - np.exp(-x)
    energy, charges, dipoles, dipole = all_of(system)
    assert float(energy) == pytest.approx(
        -0.5 * alpha * (q * s / r**2) ** 2 / (1 - _own(alpha, r, x)), rel=1e-13
    )
    np.testing.assert_allclose(charges, [q, 0.0])
    assert float(dipoles[1, 2]) == pytest.approx(
        alpha * q * s / r**2 / (1 - _own(alpha, r, x)), rel=1e-13
    )
    assert float(dipole[2]) == pytest.approx(
        float(dipoles[0, 2] + dipoles[1, 2]) - 0.5 * q * r, rel=1e-13
    )


def _own(alpha, r, x):
    """What the second dipole gets back of its own field from the first one:
    (alpha (3 t - s) / r^3)^2.
    """
    s, t = (1 - np.exp(-x), 1 - (1 + x) * np.exp(-x)) if np.isfinite(x) else (1.0, 1.0)
    return (alpha * (3 * t - s) / r**3) ** 2


@pytest.mark.parametrize("d", [3, pytest.param(2, marks=LONG)])
def test_two_polarizable_particles_in_a_field_are_those_of_silberstein(d):
    a, b, r = 0.4, 0.25, 1.3
    potential, positions = (
        potentials.induced_dipoles(damped=False),
        jnp.zeros((2, d)).at[1, 0].set(r),
    )

    @jax.jit
    def polarizability(positions, alpha):
        pairs = self_consistent.AllPairs.of(positions, lambda u, v: u - v)
        functional, _ = potential.functional(pairs, jnp.zeros(2), alpha)

        def total(field):
            there = functional._replace(field=jnp.broadcast_to(field, positions.shape))
            y, status = self_consistent.minimum(there, potential.solve)
            return jnp.sum(there.dipoles(y) * self_consistent.nan_where_failed(status), axis=0)

        return jax.vmap(total)(jnp.eye(d))

    along = (a + b + 4 * a * b / r**3) / (1 - 4 * a * b / r**6)
    across = (a + b - 2 * a * b / r**3) / (1 - a * b / r**6)
    expected = np.diag([along, *[across] * (d - 1)])
    np.testing.assert_allclose(
        polarizability(positions, jnp.array([a, b])), expected, rtol=1e-13, atol=1e-14
    )


@pytest.mark.as_shipped
@pytest.mark.parametrize("solve", [Direct(), pytest.param(MINRES(rtol=1e-14), marks=LONG)])
def test_two_charges_at_rest(solve):
    from scipy.special import erf

    chi, hard, w, r, total = (
        np.array([0.3, 1.1]),
        np.array([2.0, 3.0]),
        np.array([0.4, 0.6]),
        1.2,
        0.5,
    )
    potential = potentials.charge_equilibration(total, solve)
    system = cluster(potential, [[0, 0], [r, 0]], electronegativity=chi, hardness=hard, radius=w)
    gamma = erf(r / np.sqrt(2 * np.sum(w**2))) / r
    first = (chi[1] - chi[0] + total * (hard[1] - gamma)) / (np.sum(hard) - 2 * gamma)
    q = np.array([first, total - first])
    energy, charges, dipoles, dipole = all_of(system)
    np.testing.assert_allclose(charges, q, rtol=1e-13)
    assert float(energy) == pytest.approx(
        chi @ q + 0.5 * hard @ q**2 + gamma * q[0] * q[1], rel=1e-13
    )
    assert float(observables.chemical_potential(system)) == pytest.approx(
        chi[0] + hard[0] * q[0] + gamma * q[1]
    )
    assert not np.any(dipoles)
    # an origin for the dipole of what is charged: the centroid
    np.testing.assert_allclose(dipole, [0.5 * r * (q[1] - q[0]), 0.0], rtol=1e-13)


# ── derivatives of the unrelaxed energy, by a dense solve that jax differentiates ──


def explicit_dipoles(R, charge, alpha, damping):
    n, d = R.shape
    v, own = R[:, None] - R, jnp.eye(n)
    r = jnp.sqrt(jnp.sum(v**2, axis=-1) + own)
    x = jnp.sqrt(damping[:, None] * damping / (alpha[:, None] * alpha)) * r**3
    s, t = (1 - own) * (1 - jnp.exp(-x)), (1 - own) * (1 - (1 + x) * jnp.exp(-x))
    T = jnp.einsum("ij,ab->iajb", s / r**3 + own / alpha, jnp.eye(d))
    T = T - 3 * jnp.einsum("ij,ija,ijb->iajb", t / r**5, v, v)
    field = jnp.einsum("ij,j,ija->ia", s / r**3, charge, v).ravel()
    energy = 0.5 * charge @ ((1 - own) / r) @ charge
    return energy - 0.5 * field @ jnp.linalg.solve(T.reshape(n * d, n * d), field)


def explicit_charges(R, chi, hard, w):
    """For a total of 0.3."""
    K, q = charges_at_rest(R, chi, hard, w, 0.3)
    return chi @ q + 0.5 * q @ K @ q


def charges_at_rest(R, chi, hard, w, total):
    n = R.shape[0]
    r = jnp.sqrt(jnp.sum((R[:, None] - R) ** 2, axis=-1) + jnp.eye(n))
    K = jnp.where(
        jnp.eye(n) > 0, hard, jax.scipy.special.erf(r / jnp.sqrt(2 * (w[:, None] ** 2 + w**2))) / r
    )
    whole = jnp.block([[K, jnp.ones((n, 1))], [jnp.ones((1, n)), jnp.zeros((1, 1))]])
    return K, jnp.linalg.solve(whole, jnp.append(-chi, total))[:n]


CHOSEN = np.random.default_rng(3).uniform(0.5, 1.0, (3, 3))
EXPLICIT = {
    "dipoles in space": (potentials.induced_dipoles(), explicit_dipoles, 3, [1.0, 0.1, 0.6]),
    "dipoles in a plane, Cholesky": (
        potentials.induced_dipoles(solve=Direct()),
        explicit_dipoles,
        2,
        [1.0, 0.1, 0.6],
    ),
    "charges": (potentials.charge_equilibration(0.3), explicit_charges, 3, [1.0, 2.5, 0.5]),
    "charges in a plane, GMRES": (
        potentials.charge_equilibration(0.3, GMRES(rtol=1e-14)),
        explicit_charges,
        2,
        [1.0, 2.5, 0.5],
    ),
}


@pytest.mark.parametrize(
    "case", [pytest.param(k, marks=LONG if "plane" in k else ()) for k in EXPLICIT]
)
def test_second_derivatives_are_those_of_an_explicit_solve(case):
    potential, explicit, d, sizes = EXPLICIT[case]
    positions = np.array([[0.0, 0.0, 0.0], [1.1, 0.2, -0.1], [0.4, 1.0, 0.5]])[:, :d]
    values = CHOSEN * np.array(sizes)[:, None]
    system = cluster(potential, positions, **dict(zip(potential.parameters, values, strict=True)))
    x = jnp.asarray(np.concatenate([positions.ravel(), values.ravel()]))

    def split(x):
        return x[: 3 * d].reshape(3, d), x[3 * d :].reshape(3, 3)

    def energy(x):
        R, values = split(x)
        return potential_energy(system, R, dict(zip(potential.parameters, values, strict=True)))

    def derivatives(energy):
        return jax.jit(lambda x, v: jax.jvp(jax.value_and_grad(energy), (x,), (v,)))(
            x, jnp.cos(1 + x)
        )

    ours, theirs = derivatives(energy), derivatives(lambda x: explicit(split(x)[0], *split(x)[1]))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert relative(a, b) < 1e-12


@LONG
@pytest.mark.parametrize("case", EXPLICIT)
def test_third_derivatives_are_those_of_an_explicit_solve(case):
    potential, explicit, d, sizes = EXPLICIT[case]
    positions = jnp.array([[0.0, 0.0, 0.0], [1.1, 0.2, -0.1], [0.4, 1.0, 0.5]])[:, :d]
    values = jnp.asarray(CHOSEN * np.array(sizes)[:, None])
    system = cluster(potential, positions, **dict(zip(potential.parameters, values, strict=True)))
    changes = [
        (jnp.cos(k + jnp.arange(3.0 * d)).reshape(3, d), values * jnp.cos(k + CHOSEN))
        for k in (1, 2)
    ]

    def third(energy):
        for change in changes:
            energy = partial(lambda f, v, R, p: jax.jvp(f, (R, p), v)[1], energy, change)
        return jax.jit(jax.grad(energy, argnums=(0, 1)))(positions, values)

    ours = third(
        lambda R, p: potential_energy(system, R, dict(zip(potential.parameters, p, strict=True)))
    )
    for a, b in zip(ours, third(lambda R, p: explicit(R, *p)), strict=True):
        assert relative(a, b) < 1e-11


# ── relaxed clusters: through both levels ──

HELD = potentials.lennard_jones(5.0, 6.0)
PLANE = np.array([[0, 0], [1.1, 0], [0, 1.2], [1.2, 1.1], [2.2, 0.3], [2.1, 1.2]])


@cache
def relaxed(name: str) -> ms.Equilibrium:
    rng = np.random.default_rng(0)
    d = 2 if "plane" in name else 3
    positions = PLANE if d == 2 else 1.15 * CORNERS
    positions = positions + 0.05 * rng.normal(size=positions.shape)
    n, potential, params, species = (
        len(positions),
        HELD,
        {"sigma": rng.uniform(0.9, 1.1, len(positions))},
        None,
    )
    if "ions" in name:
        sign = 1 - 2 * (CORNERS.sum(1) % 2) if d == 3 else np.array([1, -1, -1, 1, 1, -1])
        potential += potentials.induced_dipoles()
        params |= {
            "charge": sign * rng.uniform(0.8, 1.2, n),
            "polarizability": rng.uniform(0.03, 0.1, n),
        }
        params |= {"damping": np.asarray(0.5)}
    if "charges" in name:
        potential, species = potential + potentials.charge_equilibration(), np.arange(n) % 3
        params |= {
            "electronegativity": [0.0, 1.0, 3.0],
            "hardness": [3.0, 2.5, 4.0],
            "radius": [0.4, 0.5, 0.3],
        }
    return ms.minimize(
        ms.System.create(positions, None, potential, {**params, "epsilon": 1.0}, species)
    )


@jax.jit
def measured(system: ms.System) -> jax.Array:
    """The energy and the squared dipole: what is left of it in open space, turning freely."""
    return jnp.stack([observables.energy(system), jnp.sum(observables.dipole(system) ** 2)])


@cache
def linearization(name: str) -> Linearization:
    return ms.linearize(relaxed(name))


def direction(name: str, key: str) -> np.ndarray:
    value = np.asarray(relaxed(name).params[key])
    return np.random.default_rng(1).uniform(0.5, 1.0, value.shape) * value


def check_by_minimizing_again(name: str, key: str, ours) -> None:
    system, change = relaxed(name).system, direction(name, key)

    def at(h):
        changed = system.with_params({key: system.params[key] + h * change})
        return measured(ms.minimize(changed, tolerance=1e-12).system)  # differences of 1e-9 need it

    h = 1e-3
    first, second = ((at(k * h) - at(-k * h)) / (2 * k * h) for k in (1, 2))
    np.testing.assert_allclose(ours, np.asarray(4 * first - second) / 3, rtol=1e-6, err_msg=key)


def weights(system: ms.System) -> jax.Array:
    return jnp.cos(1.0 + jnp.arange(system.positions.size)).reshape(system.positions.shape)


@cache
def gradients(name: str) -> dict[str, jax.Array]:
    """Of the two, and of a weighted sum of the positions, J^T w."""
    return ms.gradient(
        lambda s: jnp.append(measured(s), jnp.sum(weights(s) * s.positions)), linearization(name)
    ).value


@jax.jit
def along(system: ms.System, moved, change):
    def at(R, params):
        return measured(system.replace(positions=R, params=params))

    return jax.jvp(at, (system.positions, system.params), (moved, change))[1]


CLUSTERS = ["ions", "charges in a plane", "ions in a plane", "charges", "ions and charges"]


@pytest.mark.parametrize("name", quick(CLUSTERS, "ions"))
def test_gradients_of_relaxed_energy_and_dipole_are_those_of_minimizing_again(name):
    keys = ("charge", "damping") if "MDSENS_FUZZ_CASES" not in os.environ else gradients(name)
    for key in keys:
        found = gradients(name)[key]
        check_by_minimizing_again(
            name, key, [float(jnp.sum(of * direction(name, key))) for of in found[:2]]
        )


@LONG
@pytest.mark.parametrize("name", quick(CLUSTERS, "charges in a plane"))
def test_forward_derivatives_of_them_are_those_of_minimizing_again(name):
    eq = relaxed(name)
    for key in eq.params:
        change = {k: jnp.asarray(direction(name, k) * (k == key)) for k in eq.params}
        moved = ms.jvp(linearization(name), change).value
        check_by_minimizing_again(name, key, along(eq.system, moved, change))


@pytest.mark.parametrize("name", quick(CLUSTERS, "ions"))
def test_forward_and_reverse_are_adjoint(name):
    eq = relaxed(name)
    change = {k: jnp.asarray(direction(name, k)) for k in eq.params}
    forward = ms.jvp(linearization(name), change)
    assert forward.status.good
    reverse = sum(float(jnp.sum(found[2] * change[k])) for k, found in gradients(name).items())
    assert float(jnp.sum(weights(eq.system) * forward.value)) == pytest.approx(reverse, rel=1e-10)


@pytest.mark.parametrize("name", quick(CLUSTERS))
def test_other_doors_agree(name):
    eq, lin = relaxed(name), linearization(name)
    change = {k: jnp.asarray(direction(name, k)) for k in eq.params}
    forward = ms.jvp(lin, change).value
    assert ms.verify.finite_difference(eq, change).disagreement(forward) < 1e-5
    certificate = ms.certify(eq, change)
    assert certificate.status.good and certificate.zero_modes == 3 * (eq.system.dimension - 1)
    reverse = ms.vjp(lin, weights(eq.system)).value
    solve_derivative = jax.grad(lambda p: measured(ms.equilibrate(eq.system, p))[1])(eq.params)
    for k, found in gradients(name).items():
        np.testing.assert_allclose(reverse[k], found[2], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(solve_derivative[k], found[1], rtol=1e-7, atol=1e-9)


@LONG
def test_the_values_of_a_species_are_those_of_its_particles():
    eq = relaxed("charges in a plane")
    assert eq.system.species is not None
    values = [eq.params[k][eq.system.species] for k in ("electronegativity", "hardness", "radius")]
    _, expected = charges_at_rest(eq.positions, values[0], values[1], values[2], 0.0)
    np.testing.assert_allclose(observables.charges(eq.system), expected, rtol=1e-12)
    assert abs(float(jnp.sum(expected))) < 1e-14 and np.abs(expected).max() > 0.1


@LONG
def test_an_inner_residual_enters_the_energy_squared_and_forces_as_it_is():
    rng = np.random.default_rng(0)
    positions, charge = (
        1.1 * CORNERS + 0.1 * rng.normal(size=(8, 3)),
        1.0 - 2 * (CORNERS.sum(1) % 2),
    )

    def at(solve):
        potential = potentials.induced_dipoles(solve=solve)
        return energy_and_slope(
            cluster(potential, positions, charge=charge, polarizability=0.06, damping=0.5)
        )

    exact = at(Direct())
    loose = at(CG(rtol=1e-4))
    assert 1e-6 < relative(loose[1], exact[1]) < 1e-4
    assert 1e-13 < abs(float(loose[0] / exact[0] - 1)) < 1e-8


# ── what has no minimum, and what is refused ──


def collapsing(positions, **params) -> ms.System:
    return cluster(
        potentials.induced_dipoles(damped=False), positions, **{"polarizability": 0.2, **params}
    )


def test_a_polarization_catastrophe_is_no_energy():
    near = (4 * 0.2**2) ** (1 / 6)
    system = collapsing([[0, 0, 0], [1.01 * near, 0, 0]], charge=1.0)
    assert np.isfinite(energy_and_slope(system)[0])
    # equal charges polarize the two against each other,
    # and so see nothing of the mode that collapses
    inside = system.replace(positions=system.positions.at[1, 0].set(0.99 * near))
    energy, slope = energy_and_slope(inside)
    assert float(energy) == -np.inf
    assert (
        not np.isfinite(slope).all() and not np.isfinite(observables.induced_dipoles(inside)).all()
    )
    with pytest.raises(ms.InputError, match=r"polarization catastrophe.*farther apart"):
        collapsing([[0, 0, 0], [0.99 * near, 0, 0]], charge=1.0)


def test_a_relaxation_into_a_catastrophe_says_so():
    eq = relaxed("ions")
    there = {"epsilon": 1e-9, "polarizability": 0.4 * np.ones(8), "damping": 100.0}
    far = eq.system.replace(positions=2.0 * eq.positions).with_params(there)
    assert np.isfinite(observables.energy(far))
    with pytest.raises(ms.ConvergenceError, match="not finite") as raised:
        ms.minimize(far)
    assert raised.value.status is ms.Status.NOT_FINITE


@pytest.mark.parametrize("solve", [Direct(), pytest.param(MINRES(rtol=1e-14), marks=LONG)])
def test_soft_charges_close_together_have_no_minimum(solve):
    potential = potentials.charge_equilibration(solve=solve)
    params = {"electronegativity": 1.0, "hardness": 0.5, "radius": 0.1}
    assert np.isfinite(observables.energy(cluster(potential, [[0, 0], [2.5, 0]], **params)))
    with pytest.raises(ms.InputError, match="hardness above 1 / "):
        cluster(potential, [[0, 0], [1.5, 0]], **params)


TWO = [[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]]
PAIR = {"charge": 1.0, "polarizability": 0.1, "damping": 0.4}
REFUSED = {
    "a periodic cell": (
        lambda: ms.System.create(TWO, 9.0, potentials.induced_dipoles(), PAIR),
        "Ewald.*box=None",
    ),
    "a point twice": (
        lambda: cluster(potentials.induced_dipoles(), [TWO[0]] * 2, **PAIR),
        "the same point",
    ),
    "a shape": (
        lambda: cluster(potentials.induced_dipoles(), TWO, **{**PAIR, "charge": [1.0, 2.0, 3.0]}),
        r"charge has shape \(3,\)",
    ),
    "a sign": (
        lambda: cluster(
            potentials.induced_dipoles(), TWO, **{**PAIR, "polarizability": [0.1, 0.0]}
        ),
        r"polarizability\[1\] is 0.0: give a positive number",
    ),
    "a name": (
        lambda: cluster(potentials.induced_dipoles(damped=False), TWO, **PAIR),
        "no parameter 'damping'",
    ),
    "damped": (lambda: potentials.induced_dipoles(0.39), "`damped` is 0.39"),  # type: ignore[arg-type]
    "a solver": (lambda: potentials.charge_equilibration(solve="lu"), "solve='lu'"),  # type: ignore[arg-type]
    "a total": (lambda: potentials.charge_equilibration(total=np.nan), "`total` is nan"),
    "no charges": (
        lambda: observables.dipole(ms.load_system("dimer")),
        "lennard_jones has no charges",
    ),
    "no potential": (
        lambda: observables.chemical_potential(cluster(potentials.induced_dipoles(), TWO, **PAIR)),
        "0 potentials of charge equilibration",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_is_refused(what):
    make, message = REFUSED[what]
    with pytest.raises(ms.InputError, match=message):
        make()


def test_too_many_particles_are_refused(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 1e3)
    with pytest.raises(ms.TooLargeError, match="fewer particles"):
        cluster(potentials.induced_dipoles(), TWO, **PAIR)


@pytest.mark.parametrize(
    "potential", [potentials.induced_dipoles(), potentials.charge_equilibration()]
)
def test_documents_its_equation_and_every_parameter(potential):
    text = inspect.getdoc(getattr(potentials, potential.name)) or ""
    assert "U = " in text
    for name in potential.parameters:
        assert f"``{name}``" in text


@pytest.mark.parametrize(
    "potential",
    [
        potentials.induced_dipoles() + potentials.charge_equilibration(-1.5),
        potentials.induced_dipoles(damped=False).renamed({"charge": "valence"}),
    ],
)
def test_comes_back_from_a_file(potential, tmp_path):
    params = {"charge": 1.0, "valence": 1.0, "polarizability": 0.1, "damping": 0.4}
    params |= {"electronegativity": 1.0, "hardness": 2.0, "radius": 0.5}
    system = cluster(potential, TWO, **{k: params[k] for k in potential.parameters})
    ms.io.save(tmp_path / "there.npz", system)
    assert ms.io.load(tmp_path / "there.npz").potential == potential


def test_a_file_names_the_potentials_and_their_options(tmp_path):
    text = """
    description = "two particles"
    dimension = 2
    box = "open"
    positions = { kind = "list", values = [[0.0, 0.0], [2.0, 0.0]] }
    potential = { kind = "LAW", OPTION }
    parameters = { PARAMETERS }
    """

    def load(potential, option, parameters):
        content = (
            text.replace("LAW", potential)
            .replace("OPTION", option)
            .replace("PARAMETERS", parameters)
        )
        (tmp_path / "two.toml").write_text(content)
        return ms.load_system(tmp_path / "two.toml").potential

    charges = "electronegativity = 1.0, hardness = 2.0, radius = 0.5"
    assert load("charge_equilibration", "total = -0.5", charges) == potentials.charge_equilibration(
        -0.5
    )
    dipoles = "charge = [1.0, -1.0], polarizability = 0.1"
    assert load("induced_dipoles", "damped = false", dipoles) == potentials.induced_dipoles(
        damped=False
    )
    with pytest.raises(ms.InputError, match="`damped` is 'no'"):
        load("induced_dipoles", "damped = 'no'", dipoles)
    with pytest.raises(ms.InputError, match="total"):
        load("charge_equilibration", "total = 'none'", charges)
