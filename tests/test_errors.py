"""What a user gets wrong is named in one line: functions that jax cannot trace, names that are not there, arguments."""

from __future__ import annotations

import math
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
from mdsens.implicit import Operator, certify, fixed_point, root, solve, tangent
from mdsens.implicit.degeneracy import kinked

POINTS = np.array([[0.0, 0.0], [1.2, 0.1], [0.5, 1.0]])
HERE = Path(__file__)


@cache
def trimer() -> ms.Equilibrium:
    law = ms.potentials.lennard_jones()
    return ms.minimize(ms.System.create(POINTS, None, law, {"sigma": 1.0, "epsilon": 1.0}))


@cache
def packing() -> ms.Equilibrium:
    positions = 3.5 * np.random.default_rng(0).random((16, 2))
    params = {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0}
    return ms.minimize(ms.System.create(positions, 3.5, ms.potentials.soft_sphere(), params))


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message and message.endswith(".")
    return message


# ── functions that jax cannot trace ──


def length(s: ms.System) -> Any:
    return np.linalg.norm(s.positions[0] - s.positions[1])  # a numpy call


def first(s: ms.System) -> Any:
    return jnp.asarray(float(s.positions[0, 0]))  # a float call


def root_of(s: ms.System) -> Any:
    return math.sqrt(s.params["sigma"])  # a math call


def again(s: ms.System) -> Any:
    return ms.minimize(s).max_force  # a call of host code


def decay(r: Any, length: Any) -> Any:
    return np.exp(-r / length)  # a pair potential


def tether(R: Any, params: Any, displacement: Any) -> Any:
    return params["stiffness"] * np.linalg.norm(R)  # a many-body energy


def cell(params: Any) -> Any:
    return 6.0 * float(params["sigma"]) * np.eye(2)  # a box


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


def created(law: Any, params: Any, box: Any = None) -> ms.System:
    return ms.System.create(POINTS, box, law, params)


def of_pairs(phi: Any, values: Any = 1.0, box: Any = None, **how: Any) -> ms.System:
    return created(ms.potentials.from_pair(phi, ("length",), **how), {"length": values}, box)


THREE = [1.0, 1.1, 1.2]
lj = ms.potentials.lennard_jones()
UNTRACEABLE: dict[str, tuple[Callable[..., Any], Callable[[], Any], str]] = {
    "observable, numpy": (length, lambda: ms.gradient(length, trimer()), "jax.numpy in place of numpy"),
    "observable, float": (first, lambda: ms.gradient(first, trimer()), "in place of float()"),
    "observable, math": (root_of, lambda: ms.gradient(root_of, trimer()), "in place of float(), int() and math"),
    "observable, host code": (again, lambda: ms.gradient(again, trimer()), "minimize works on numbers alone"),
    "certified observable": (length, lambda: ms.certify(trimer(), observable=length), "jax.numpy"),
    "moduli": (poisson, lambda: ms.elasticity.gradient(poisson, packing()), "float()"),
    "feature": (length, lambda: ms.design.feature_response([length], trimer()), "jax.numpy"),
    "elastic feature": (
        poisson,
        lambda: ms.design.feature_response([ms.design.Elastic(poisson)], packing()),
        "float()",
    ),
    "pair potential": (decay, lambda: ms.minimize(of_pairs(decay)), "jax.numpy"),
    "mixing": (geometric, lambda: of_pairs(smooth, THREE, mixing={"length": geometric}), "jax.numpy"),
    "cutoff": (twice, lambda: ms.minimize(of_pairs(ended, THREE, 6.0, cutoff=twice)), "float()"),
    "breakpoints": (
        ends,
        lambda: ms.certify(ms.minimize(of_pairs(smooth, THREE, breakpoints=ends)), {"length": THREE}),
        "jax.numpy",
    ),
    "energy": (
        tether,
        lambda: ms.minimize(created(ms.potentials.from_energy(tether, ("stiffness",)), {"stiffness": 1.0})),
        "jax.numpy",
    ),
    "box": (cell, lambda: created(lj, {"sigma": 1.0, "epsilon": 1.0}, cell), "float()"),
    "root": (sine, lambda: jax.grad(lambda t: root(sine)(lambda x, p: jnp.arcsin(p))(0.1, t))(0.2), "jax.numpy"),
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
    "certified condition": (sine, lambda: certify(sine, jnp.asarray(0.1), (0.2,), (1.0,)), "jax.numpy"),
    "kinked": (sine, lambda: kinked(sine, jnp.asarray(0.1), 0.2), "jax.numpy"),
    "operator": (np.linalg.norm, lambda: solve(Operator(lambda v: v * np.linalg.norm(v)), jnp.ones(2)), "jax.numpy"),
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
        assert f"{function.__name__} ({HERE}:{line_of(function)}, `return " in message
    else:  # a lambda of this file
        assert f"<lambda> ({HERE}:" in message
    assert isinstance(error.value.__cause__, jax.errors.JAXTypeError)  # what jax said, for whoever wants it


def test_a_function_without_a_source_is_named_all_the_same():
    names: dict[str, Any] = {"np": np}
    exec(compile("def norm(s):\n    return np.linalg.norm(s.positions)\n", "<typed in>", "exec"), names)
    with pytest.raises(ms.InputError, match=re.escape("in norm (<typed in>:2): take jax.numpy")):
        ms.gradient(names["norm"], trimer())


def test_other_errors_of_a_function_stay_as_they_are():
    def wrong(s: ms.System) -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        ms.gradient(wrong, trimer())
