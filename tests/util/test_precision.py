"""Products of float32 matrices keep their digits on a GPU, whatever the user's own setting is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mdsens as ms
from mdsens._util.precision import full_precision
from mdsens.implicit import CG

FULL = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
PLACES = np.array([[0.0, 0.0, 0.0], [1.1, 0.1, 0.0], [0.2, 1.2, 0.1], [0.9, 1.0, 1.1]])
SKEW = np.array([[3.0, 0.4, 0.2], [0.0, 3.1, 0.3], [0.0, 0.0, 2.9]])


def products(jaxpr: Any) -> Iterator[Any]:
    """The precision of every product of matrices in a program, and in those within it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"]
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


def discs() -> ms.System:
    places = PLACES[:, :2].astype(np.float32)
    box = SKEW[:2, :2].astype(np.float32)
    params = {"sigma": 1.2, "epsilon": 1.0, "alpha": 2.0}
    return ms.System.create(places, box, ms.potentials.soft_sphere(), params)


def cluster() -> ms.System:
    charges = np.array([0.5, -0.5, 0.2, -0.2])
    params = {"charge": charges, "polarizability": 0.1, "damping": 0.4}
    return ms.System.create(PLACES, None, ms.potentials.induced_dipoles(), params)


def moduli(system: ms.System) -> jax.Array:
    return ms.elasticity.moduli(system, solve=CG()).tensor


def relaxed_energy(system: ms.System) -> jax.Array:
    return ms.observables.energy(ms.equilibrate(system, solve=CG()))


@pytest.mark.parametrize(
    ("system", "function"),
    [
        (discs, ms.observables.stress),
        (discs, moduli),
        (discs, relaxed_energy),
        (cluster, ms.observables.energy),
        (cluster, ms.observables.dipole),
    ],
)
def test_every_product_is_in_full_precision(
    system: Callable[[], ms.System], function: Callable[[ms.System], jax.Array]
):
    start = system()

    def total(params: dict[str, Any]) -> jax.Array:
        return jnp.sum(function(start.replace(params=params)))

    program = jax.make_jaxpr(jax.grad(total))(dict(start.params))
    found = list(products(program.jaxpr))
    assert [precision for precision in found if precision != FULL] == []


def test_a_product_without_it_is_seen():
    matrix = jnp.eye(2, dtype=jnp.float32)
    assert list(products(jax.make_jaxpr(lambda m: m @ m)(matrix).jaxpr)) == [None]
    assert list(products(jax.make_jaxpr(full_precision(lambda m: m @ m))(matrix).jaxpr)) == [FULL]
