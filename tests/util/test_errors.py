"""What a user gets wrong is named in one line: functions that jax cannot trace,
names that are not there, arguments.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import json
import math
import pickle
import pkgutil
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mdsens as ms
from mdsens._util.attributes import Named
from mdsens.design import Elastic
from mdsens.implicit import CG, Operator, certify, fixed_point, root, solve, tangent
from mdsens.implicit.conditions.degeneracy import kinked
from mdsens.model.box import FixedBox

POINTS = np.array([[0.0, 0.0], [1.2, 0.1], [0.5, 1.0]])
HERE = Path(__file__)


@cache
def trimer() -> ms.Equilibrium:
    potential = ms.potentials.lennard_jones()
    return ms.minimize(ms.System.create(POINTS, None, potential, {"sigma": 1.0, "epsilon": 1.0}))


@cache
def packing() -> ms.Equilibrium:
    positions = 3.5 * np.random.default_rng(0).random((16, 2))
    params = {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0}
    return ms.minimize(ms.System.create(positions, 3.5, ms.potentials.soft_sphere(), params))


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message and message[-1] in ".?"
    return message


# ── functions that jax cannot trace ──


def length(s: ms.System) -> Any:
    return np.linalg.norm(s.positions[0] - s.positions[1])  # a numpy call


def first(s: ms.System) -> Any:
    return jnp.asarray(float(s.positions[0, 0]))  # a float call


def root_of(s: ms.System) -> Any:
    return math.sqrt(s.params["sigma"])  # a math call


def again(s: ms.System) -> Any:
    return ms.io.to_ase(s).get_positions()  # a call of host code


def decay(r: Any, length: Any) -> Any:
    return np.exp(-r / length)  # a pair potential


def tether(R: Any, params: Any, displacement: Any) -> Any:
    return params["stiffness"] * np.linalg.norm(R)  # a many-body energy


def cell(params: Any) -> Any:
    return 6.0 * float(params["sigma"]) * np.eye(2)  # a box


def step(r: Any, length: Any) -> Any:
    return 1.0 if r < length else 0.0  # a branch on an array


def filled(r: Any, length: Any) -> Any:
    r[0] = length  # an assignment
    return r


def smooth(r: Any, length: Any) -> Any:
    return jnp.exp(-r / length)


def ended(r: Any, length: Any) -> Any:
    return jnp.maximum(1.0 - r / length, 0.0) ** 4


def poisson(m: ms.elasticity.Moduli) -> Any:
    return float(m.poisson)  # of the moduli


def sine(x: Any, p: Any) -> Any:
    return np.sin(x) - p  # a condition


def positive(x: Any, p: Any) -> Any:
    return x - p if x > 0 else x + p  # a branch


def arcsine(start: Any, p: Any) -> Any:
    return np.arcsin(p)  # a solver


def geometric(a: Any, b: Any) -> Any:
    return np.sqrt(a * b)  # a mixing rule


def twice(length: Any) -> Any:
    return 2.0 * float(length)  # a cutoff


def ends(length: Any) -> Any:
    return (np.asarray(length),)  # breakpoints


def created(potential: Any, params: Any, box: Any = None) -> ms.System:
    return ms.System.create(POINTS, box, potential, params)


def of_pairs(phi: Any, values: Any = 1.0, box: Any = None, **how: Any) -> ms.System:
    return created(ms.potentials.from_pair(phi, ("length",), **how), {"length": values}, box)


THREE = [1.0, 1.1, 1.2]
lj = ms.potentials.lennard_jones()
UNTRACEABLE: dict[str, tuple[Callable[..., Any], Callable[[], Any], str]] = {
    "observable, numpy": (
        length,
        lambda: ms.gradient(length, trimer()),
        "jax.numpy in place of numpy",
    ),
    "observable, float": (first, lambda: ms.gradient(first, trimer()), "in place of float()"),
    "observable, math": (
        root_of,
        lambda: ms.gradient(root_of, trimer()),
        "in place of float(), int() and math",
    ),
    "observable, host code": (
        again,
        lambda: ms.gradient(again, trimer()),
        "mdsens's to_ase works on numbers",
    ),
    "certified observable": (length, lambda: ms.certify(trimer(), observable=length), "jax.numpy"),
    "moduli": (poisson, lambda: ms.elasticity.gradient(poisson, packing()), "float()"),
    "feature": (length, lambda: ms.design.feature_response([length], trimer()), "jax.numpy"),
    "elastic feature": (
        poisson,
        lambda: ms.design.feature_response([Elastic(poisson)], packing()),
        "float()",
    ),
    "pair potential, branch": (step, lambda: of_pairs(step), "jnp.where"),
    "pair potential, assignment": (filled, lambda: of_pairs(filled), "x.at[k].set(value)"),
    "pair potential": (decay, lambda: of_pairs(decay), "jax.numpy"),
    "mixing": (
        geometric,
        lambda: of_pairs(smooth, THREE, mixing={"length": geometric}),
        "jax.numpy",
    ),
    "cutoff": (twice, lambda: of_pairs(ended, THREE, 6.0, cutoff=twice), "float()"),
    "breakpoints": (
        ends,
        lambda: of_pairs(smooth, THREE, breakpoints=ends),
        "jax.numpy",
    ),
    "energy": (
        tether,
        lambda: created(ms.potentials.from_energy(tether, ("stiffness",)), {"stiffness": 1.0}),
        "jax.numpy",
    ),
    "box": (cell, lambda: created(lj, {"sigma": 1.0, "epsilon": 1.0}, cell), "float()"),
    "root": (
        sine,
        lambda: jax.grad(lambda t: root(sine)(lambda x, p: jnp.arcsin(p))(0.1, t))(0.2),
        "jax.numpy",
    ),
    "root, branch": (positive, lambda: root(positive)(lambda x, p: p)(0.1, 0.2), "jnp.where"),
    "fixed point": (
        sine,
        lambda: jax.grad(lambda t: fixed_point(sine)(lambda x, p: jnp.arcsin(p))(0.1, t))(0.2),
        "jax.numpy",
    ),
    "solver": (
        arcsine,
        lambda: jax.jit(lambda t: root(lambda x, p: jnp.sin(x) - p)(arcsine)(0.1, t))(0.2),
        "jax.pure_callback",
    ),
    "tangent": (sine, lambda: tangent(sine, jnp.asarray(0.1), (0.2,), (1.0,)), "jax.numpy"),
    "certified condition": (
        sine,
        lambda: certify(sine, jnp.asarray(0.1), (0.2,), (1.0,)),
        "jax.numpy",
    ),
    "kinked": (sine, lambda: kinked(sine, jnp.asarray(0.1), 0.2), "jax.numpy"),
    "operator": (
        np.linalg.norm,
        lambda: solve(Operator(lambda v: v * np.linalg.norm(v)), jnp.ones(2)),
        "jax.numpy",
    ),
}


def line_of(function: Callable[..., Any]) -> int:
    """The line of the test's function that cannot be traced: its first statement."""
    return function.__code__.co_firstlineno + 1


@pytest.mark.parametrize("kind", UNTRACEABLE)
def test_a_function_that_cannot_be_traced_is_named_by_its_line(kind: str):
    function, call, remedy = UNTRACEABLE[kind]
    with pytest.raises(ms.InputError) as error:
        call()
    message = one_line(error)
    assert remedy in message
    if hasattr(function, "__code__"):
        assert f"{function.__name__} ({HERE}:{line_of(function)}, `" in message
    else:  # a lambda of this file
        assert f"<lambda> ({HERE}:" in message
    assert error.value.__cause__ is not None  # what jax said, for whoever wants it


def test_a_function_without_a_source_is_named_all_the_same():
    names: dict[str, Any] = {"np": np}
    exec(
        compile("def norm(s):\n    return np.linalg.norm(s.positions)\n", "<typed in>", "exec"),
        names,
    )
    with pytest.raises(ms.InputError, match=re.escape("in norm (<typed in>:2): use jax.numpy")):
        ms.gradient(names["norm"], trimer())


def test_host_code_in_what_jax_traces_is_named_with_what_goes_there():
    system, eq = packing().system, packing()
    calls: dict[str, Callable[[Any], Any]] = {
        r"minimize works on numbers.*take ms\.equilibrate\(system, params\) there": lambda p: (
            ms.minimize(system, {"sigma": p}).max_force
        ),
        r"System\.create works on numbers.*make it outside": lambda p: ms.observables.energy(
            ms.System.create(POINTS, None, lj, {"sigma": p, "epsilon": 1.0})
        ),
        r"with_params works on numbers.*system\.replace": lambda p: ms.observables.energy(
            system.with_params({"sigma": p})
        ),
        r"a factor works on numbers.*take solve=CG\(\)": lambda p: jnp.sum(
            ms.jvp(eq, {"sigma": p}).value
        ),
    }
    for message, call in calls.items():
        with pytest.raises(ms.InputError, match=message) as error:
            jax.grad(call)(1.0)
        one_line(error)
    with pytest.raises(
        ms.InputError, match=r"a function of an Equilibrium works on numbers.*call it outside"
    ):
        jax.jit(lambda p: p * ms.elasticity.moduli(eq).bulk)(1.0)
    many = jax.vmap(lambda p: ms.jvp(eq, {"sigma": p}, solve=CG(), throw=False).value)(jnp.ones(2))
    # an iteration goes there
    assert np.allclose(many[0], ms.jvp(eq, {"sigma": 1.0}).value, atol=1e-8)


def test_other_errors_of_a_function_stay_as_they_are():
    def wrong(s: ms.System) -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        ms.gradient(wrong, trimer())


# ── names that are not there ──


def records() -> list[type]:
    """Every kind of record that answers with its names, but those that have none of their own."""
    for module in pkgutil.walk_packages(ms.__path__, "mdsens."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found, pending = [], [Named]
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        found += (
            [kind]
            if dataclasses.is_dataclass(kind) and kind.__module__.startswith("mdsens.")
            else []
        )
    return found


def test_every_record_names_what_it_has_and_keeps_to_the_protocols():
    kinds = records()
    assert {
        ms.System,
        ms.Equilibrium,
        ms.Displacement,
        ms.Certificate,
        ms.SolveStats,
        ms.Linearization,
    } <= set(kinds)
    assert {
        ms.elasticity.Moduli,
        ms.design.Design,
        ms.saddles.Barrier,
        ms.verify.FiniteDifference,
    } <= set(kinds)
    for kind in kinds:
        bare: Any = object.__new__(kind)  # as copy and pickle make one, with nothing in it yet
        assert not hasattr(bare, "no_such_name") and getattr(bare, "no_such_name", 3) == 3
        with pytest.raises(AttributeError) as error:
            _ = bare.no_such_name
        first = dataclasses.fields(kind)[0].name
        assert f"{kind.__name__!r} object has no attribute 'no_such_name': it has {first}" in str(
            error.value
        )
        assert (error.value.name, error.value.obj) == ("no_such_name", bare)
        with pytest.raises(AttributeError, match=r"has no attribute '__jax_array__'$"):
            _ = bare.__jax_array__
        with pytest.raises(AttributeError, match=r"has no attribute '_private'$"):
            _ = bare._private


def test_the_name_that_was_meant():
    eq: Any = packing()
    r: Any = ms.jvp(eq, {"sigma": 1.0})
    moduli: Any = ms.elasticity.moduli(eq)
    isotropic: Any = ms.elasticity.isotropic(moduli.tensor)
    wanted: list[tuple[Any, str, str]] = [
        (moduli, "shear_modulus", "shear"),
        (moduli, "poisson_ratio", "poisson"),
        (isotropic, "Bulk", "bulk"),
        (r, "residual", "stats.residual"),
        (r, "rattler", "rattlers"),
        (r.stats, "iteration", "iterations"),
        (eq, "volume", "system.volume"),
        (eq.system, "sigma", "params['sigma']"),
        (ms.certify(eq, {"sigma": 1.0}), "radious", "radius"),
    ]
    for record, name, meant in wanted:
        with pytest.raises(AttributeError) as error:
            getattr(record, name)
        assert f"has no attribute {name!r}: did you mean {meant}? It has " in one_line(error)
    # and nothing of a tuple
    with pytest.raises(AttributeError, match=r"it has bulk, shear, young, poisson\.$"):
        _ = isotropic.nu
    for record in (eq, r, moduli, eq.system):
        for twin in (copy.copy(record), copy.deepcopy(record), pickle.loads(pickle.dumps(record))):
            assert str(twin) == str(record) and type(twin) is type(record)


def test_the_error_of_a_property_is_not_hidden():
    response: Any = dataclasses.replace(ms.jvp(packing(), {"sigma": 1.0}), stats=None)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'status'"):
        _ = response.status


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("pressure", "it is mdsens.observables.pressure."),
        ("moduli", "it is mdsens.elasticity.moduli or mdsens.plots.moduli."),
        ("gmres", "did you mean mdsens.implicit.GMRES?"),
        ("minimise", "did you mean mdsens.minimize?"),
        ("presure", "did you mean mdsens.observables.pressure?"),
        ("xyzzy", "dir(mdsens) lists its names."),
    ],
)
def test_a_name_that_the_package_has_elsewhere(name: str, remedy: str):
    assert not hasattr(ms, name)
    with pytest.raises(
        AttributeError, match=re.escape(f"module 'mdsens' has no attribute {name!r}: {remedy}")
    ):
        getattr(ms, name)
    with pytest.raises(AttributeError, match=r"has no attribute '__wrapped__'$"):
        _ = ms.__wrapped__  # type: ignore[attr-defined]


# ── arguments come before contacts ──


@cache
def gas() -> ms.Equilibrium:
    """Discs that touch nobody, so that there is nothing to differentiate."""
    positions = 20.0 * np.random.default_rng(0).random((8, 2))
    params = {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0}
    eq = ms.minimize(ms.System.create(positions, 20.0, ms.potentials.soft_sphere(), params))
    assert int(ms.linearize(eq, throw=False).status) == ms.Status.UNJAMMED
    return eq


def nothing(at: Any) -> Any:
    return None


def whole(at: Any) -> Any:
    return jnp.arange(3)


def pressure_of(moduli: Any) -> Any:
    return moduli.pressure


DIRECTION = {"sigma": 1.0}
ALONG: dict[str, Any] = {
    "no such name": {"diameter": 1.0},
    "shape": {"sigma": [1.0, 1.0]},
    "kind": 3.0,
    "text": {"sigma": "a"},
}
# Of each call on a minimum, the arguments that are right, and what is wrong with them one by one.
SOLVE = {"solve": {"text": "cg"}}
ARGUMENTS: dict[Any, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    ms.jvp: ({"dparams": DIRECTION}, {"dparams": {**ALONG, "empty": {}}, **SOLVE}),
    ms.vjp: (
        {"cotangent": np.ones((8, 2))},
        {"cotangent": {"shape": np.ones(8), "nan": np.full((8, 2), np.nan)}, **SOLVE},
    ),
    ms.response: (
        {"force": np.ones((8, 2))},
        {"force": {"shape": np.ones(8), "text": "a"}, **SOLVE},
    ),
    ms.jacobian: (
        {"wrt": "sigma"},
        {"wrt": {"no such name": "diameter", "kind": 3}, "chunk": {"zero": 0}, **SOLVE},
    ),
    ms.gradient: (
        {"observable": ms.observables.energy},
        {
            "observable": {
                "kind": 3,
                "returns nothing": nothing,
                "returns integers": whole,
                "numpy": length,
            },
            **SOLVE,
        },
    ),
    ms.linearize: ({}, {"solve": {"text": "cg"}}),
    ms.elasticity.moduli: ({}, SOLVE),
    ms.elasticity.gradient: (
        {"observable": pressure_of},
        {
            "observable": {
                "kind": 3,
                "returns nothing": nothing,
                "returns integers": whole,
                "float": poisson,
            },
            **SOLVE,
        },
    ),
    ms.elasticity.value_and_gradient: (
        {"observable": pressure_of},
        {"observable": {"kind": 3, "returns nothing": nothing}, **SOLVE},
    ),
    ms.elasticity.jvp: (
        {"observable": pressure_of, "dparams": DIRECTION},
        {"observable": {"kind": 3, "returns nothing": nothing}, "dparams": ALONG, **SOLVE},
    ),
    ms.modes.smallest_stiffness: ({}, {"count": {"zero": 0}, "accuracy": {"two": 2.0}}),
    ms.modes.gradient: ({}, {"count": {"zero": 0}, "accuracy": {"two": 2.0}, **SOLVE}),
    ms.certify: (
        {"throw": True},
        {
            "dparams": ALONG,
            "modes": {"zero": 0},
            "observable": {
                "kind": 3,
                "returns nothing": nothing,
                "returns integers": whole,
                "numpy": length,
            },
        },
    ),
    ms.verify.finite_difference: (
        {"dparams": DIRECTION},
        {
            "dparams": {**ALONG, "zero": {"sigma": 0.0}},
            "step": {"negative": -1.0, "text": "a"},
            "tolerance": {"zero": 0.0},
        },
    ),
    ms.verify.derivative_test: (
        {"dparams": DIRECTION},
        {
            "dparams": ALONG,
            "steps": {"negative": [-1.0], "none": []},
            "value": {"shape": np.ones(3)},
            "tolerance": {"nan": np.nan},
        },
    ),
    ms.verify.adjoint: (
        {"dparams": DIRECTION},
        {"dparams": ALONG, "cotangent": {"shape": np.ones(8)}, **SOLVE},
    ),
    ms.design.feature_response: (
        {"features": ["pressure"]},
        {
            "features": {
                "no such name": ["pressur"],
                "none": [],
                "nothing": [nothing],
                "float": [Elastic(poisson)],
            },
            "wrt": {"no such name": "diameter"},
            "scales": {"zero": [0.0]},
        },
    ),
}


def test_every_call_on_a_minimum_is_looked_at():
    rooms = (ms, ms.elasticity, ms.modes, ms.verify, ms.design)
    calls = {
        getattr(room, name)
        for room in rooms
        for name in room.__all__
        if inspect.isfunction(getattr(room, name))
        and "throw" in (names := inspect.signature(getattr(room, name)).parameters)
        and {"at", "eq"} & set(names)
    }
    assert {ms.jvp, ms.elasticity.gradient, ms.modes.gradient} <= calls <= set(ARGUMENTS)


@pytest.mark.parametrize("call", ARGUMENTS, ids=lambda call: f"{call.__module__}.{call.__name__}")
def test_arguments_are_looked_at_before_contacts(call: Any):
    right, wrong = ARGUMENTS[call]
    for name, values in wrong.items():
        for label, value in values.items():
            with pytest.raises(ms.InputError) as error:
                call(**{"eq": gas(), **right, name: value})
            assert len(one_line(error)) > 10, (name, label)
    # all of it right but the minimum
    with pytest.raises(ms.ConvergenceError, match="no contact carries force"):
        call(**{"eq": gas(), **right})


# ── what a status looks like ──


def test_a_status_prints_its_name_and_sentence_and_stays_a_number():
    status = ms.jvp(packing(), {"sigma": 1.0}).status
    assert status is ms.Status.CONVERGED
    assert str(status) == f"{status}" == "CONVERGED: converged to the tolerance"
    assert str(ms.certify(gas()).status).startswith("UNJAMMED: no contact carries force")
    assert (
        f"{status:>40}" == f"{status!s:>40}"
        and f"{ms.Status.UNJAMMED:3d}" == " 16"
        and f"{status:d}" == "0"
    )
    assert json.dumps({"status": ms.Status.UNJAMMED}) == '{"status": 16}'
    assert json.loads(json.dumps([ms.Status.UNJAMMED])) == [16]
    assert (
        status == 0
        and ms.Status.UNJAMMED > ms.Status.CONVERGED
        and max(ms.Status.UNJAMMED, status) == 16
    )
    assert (
        np.asarray(ms.Status.UNJAMMED).dtype.kind == "i" and repr(status) == "<Status.CONVERGED: 0>"
    )
    for member in ms.Status:
        assert pickle.loads(pickle.dumps(member)) is member and ms.Status(int(member)) is member


# ── what has no derivative ──


def test_what_counts_contacts_is_refused_a_derivative_by_name():
    eq, z = packing(), ms.observables.coordination
    assert float(z(eq.system)) == 6.0  # of a triangular lattice
    remedy = r"piecewise constant.*take ms\.observables\.smooth_coordination\(system, width\)"
    for take in (
        lambda: ms.gradient(z, eq),
        lambda: ms.gradient(lambda s: jnp.stack([ms.observables.energy(s), z(s)]), eq),
        lambda: ms.certify(eq, observable=z),
        lambda: ms.design.feature_response([z], eq),
        lambda: ms.gradient(ms.mechanics.coordination, eq),
        lambda: jax.grad(lambda p: z(ms.equilibrate(eq.system, p)))(eq.params),
    ):
        with pytest.raises(ms.InputError, match=remedy) as error:
            take()
        one_line(error)
    still = ms.gradient(lambda s: ms.observables.energy(s) * z(jax.lax.stop_gradient(s)), eq)
    assert np.allclose(
        still.value["epsilon"], 6.0 * ms.gradient(ms.observables.energy, eq).value["epsilon"]
    )
    many = jax.jit(jax.vmap(z))(ms.stack([eq.system] * 2))
    assert many.tolist() == [6.0, 6.0]


def test_every_observable_has_a_derivative_or_says_that_it_has_none():
    """None is zero in silence where it changes as the particles do:
    a small random move changes each, but the count.
    """
    eq, away = packing(), jnp.asarray(np.random.default_rng(1).normal(size=(16, 2)))
    of = ms.observables
    chosen = {
        of.bond_order: lambda s: of.bond_order(s, 4, 1.2),
        of.bond_orientation: lambda s: of.bond_orientation(s, 6, 1.2),
        of.distance_to: lambda s: of.distance_to(s, eq.positions + 0.01 * away),
        of.distances: lambda s: of.distances(s, [[0, 1]]),
        of.radial_distribution: lambda s: of.radial_distribution(s, [0.9], 0.05),
        of.smooth_coordination: lambda s: of.smooth_coordination(s, 0.3),
    }
    plain = {of.energy, of.pressure, of.stress}
    of_the_cell = {of.volume, of.packing_fraction}  # which is given
    not_of_this_law = {of.charges, of.chemical_potential, of.dipole, of.induced_dipoles}
    others = {of.pairs_within, of.coordination}
    every = {getattr(of, name) for name in of.__all__}
    assert every == set(chosen) | plain | of_the_cell | not_of_this_law | others
    start = eq.system.replace(positions=eq.positions + 0.03 * away)
    for f in [*chosen.values(), *plain]:
        tangent = jax.jvp(
            lambda R, f=f: f(start.replace(positions=R)), (start.positions,), (away,)
        )[1]
        assert float(jnp.abs(tangent).max()) > 1e-6, f


def test_equilibrate_is_not_differentiated_by_where_it_starts():
    eq = packing()

    def energy(positions: Any) -> Any:
        return ms.observables.energy(ms.equilibrate(eq.system.replace(positions=positions)))

    assert not np.any(jax.grad(energy)(eq.positions))

    def of_cell(side: Any) -> Any:
        return ms.observables.energy(
            ms.equilibrate(eq.system.replace(boundary=FixedBox(side * jnp.eye(2))))
        )

    with pytest.raises(
        ms.InputError,
        match=r"differentiated by the parameters alone.*a box that is a function of the",
    ):
        jax.grad(of_cell)(3.5)
    assert float(jax.jit(of_cell)(3.5)) == pytest.approx(
        float(ms.observables.energy(eq.system)), rel=1e-10
    )


OPTION_RECORDS = sorted(
    {
        record
        for room in (ms.implicit, ms.relaxation, ms.design, ms.saddles)
        for record in map(room.__dict__.get, room.__all__)
        if inspect.isclass(record) and dataclasses.is_dataclass(record)
    },
    key=lambda record: record.__name__,
)


@pytest.mark.parametrize(
    ("record", "field"),
    [
        pytest.param(record, field.name, id=f"{record.__name__}.{field.name}")
        for record in OPTION_RECORDS
        for field in dataclasses.fields(record)
        # options have defaults for all fields; other records are results
        if type(field.default) in (int, float)
        and all(f.default is not dataclasses.MISSING for f in dataclasses.fields(record))
    ],
)
def test_true_is_no_number(record: type, field: str) -> None:
    """True is an int of Python: ``Fire(max_step=True)`` would be a step of 1."""
    with pytest.raises(ms.InputError, match=field):
        record(**{field: True})
