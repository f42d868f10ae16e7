"""Projections and proximal operators: nearest, and right in every derivative, at kinks too."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from mdsens.implicit import InputError
from mdsens.implicit.conditions import projections, proximal

NORMALS = jnp.array([[1.0, 2.0, -1.0]])
Q = jnp.linalg.qr(jnp.array([[1.0, 2.0, 0.5], [-0.3, 1.0, 1.0], [0.7, -1.0, 2.0]]))[0]
REGULAR = ([0.9, -0.3, 0.2], [-2.5, 3.0, 0.7], [0.1, 0.2, 0.05])


def rotated(*values: float) -> list[list[float]]:
    """The symmetric matrix with these eigenvalues."""
    return np.asarray((Q * jnp.array(values)) @ Q.T).tolist()


OFF = np.eye(3) - np.outer(Q[:, 0], Q[:, 0])
# a matrix to its symmetric part
HALF = (np.eye(9) + np.eye(9)[[3 * j + i for i in range(3) for j in range(3)]]) / 2


@dataclasses.dataclass(frozen=True)
class Case:
    """f(x, p): a projection onto a set of size p, or a proximal operator of strength p.

    ``kinks`` are pairs of a point and the derivative there; ``g`` what the operator is proximal to,
    None for a set.
    """

    name: str
    f: Callable[[Array, Array], Array]
    p: float = 1.0
    regular: tuple[Any, ...] = REGULAR
    kinks: tuple[tuple[Any, Any], ...] = ()
    g: Callable[[np.ndarray, float], Any] | None = None


SCALING = 0.7
HALVES = [[0.5, -0.5, 0.0], [-0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]
CASES = [
    Case(
        "non_negative",
        lambda x, p: projections.non_negative(x),
        kinks=(([0.0, 1.0, -1.0], np.diag([0, 1, 0])),),
    ),
    Case(
        "box",
        lambda x, p: projections.box(x, -0.4, p),
        kinks=(([1.0, -0.4, 0.2], np.diag([0, 0, 1])),),
    ),
    Case("simplex", projections.simplex, kinks=(([0.5, 0.5, 0.0], HALVES),)),
    Case("l1_ball", projections.l1_ball, kinks=(([0.5, -0.5, 0.0], np.abs(HALVES)),)),
    Case(
        "ball",
        projections.ball,
        kinks=(
            ([0.6, 0.0, 0.8], np.eye(3) - np.outer([0.6, 0, 0.8], [0.6, 0, 0.8])),
            ([0.0] * 3, np.eye(3)),
        ),
    ),
    Case("affine", lambda x, p: projections.affine(x, NORMALS * p, 2 * p[None])),
    Case(
        "second_order_cone",
        lambda x, p: p * projections.second_order_cone(x),
        regular=(
            [0.2, 0.9, -0.4],
            [2.0, 0.3, 0.4],
            [-3.0, 0.3, 0.4],
            [0.0, 0.3, 0.1],
            [2.0, 0.0, 0.0],
        ),
        kinks=(
            ([1.0, 1.0, 0.0], [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]),
            ([0.0] * 3, np.zeros((3, 3))),
        ),
    ),
    Case(
        "semidefinite",
        lambda x, p: p * projections.semidefinite(x),
        # all eigenvalues apart; equal ones on both sides; all equal
        regular=(
            rotated(2.0, 0.3, -1.0),
            rotated(1.0, 1.0, -0.5),
            np.eye(3),
            -np.eye(3),
            rotated(1.0, -0.5, -0.5),
        ),
        kinks=(
            (np.zeros((3, 3)), np.zeros((9, 9))),
            (rotated(1.0, 0.0, 0.0), (np.eye(9) - np.kron(OFF, OFF)) @ HALF),
        ),
    ),
    Case(
        "lasso",
        lambda y, p: proximal.lasso(y, SCALING, p),
        0.5,
        g=lambda x, p: p * np.abs(x).sum(),
        kinks=(([0.35, -0.35, 1.0], np.diag([0, 0, 1])),),
    ),
    Case(
        "proximal.non_negative",
        lambda y, p: proximal.non_negative(y, SCALING, p),
        0.3,
        g=lambda x, p: p * x.sum() if x.min() >= 0 else np.inf,
        kinks=(([0.21, 1.0, 0.0], np.diag([0, 1, 0])),),
    ),
    Case(
        "ridge",
        lambda y, p: proximal.ridge(y, SCALING, p),
        0.5,
        g=lambda x, p: p / 2 * (x**2).sum(),
    ),
    Case(
        "elastic_net",
        lambda y, p: proximal.elastic_net(y, SCALING, p, 2 * p),
        0.3,
        g=lambda x, p: p * np.abs(x).sum() + p * (x**2).sum(),
        kinks=(([0.21, 0.0, 1.0], np.diag([0, 0, 1]) / 1.42),),
    ),
    Case(
        "group_lasso",
        lambda y, p: proximal.group_lasso(y, SCALING, p),
        0.5,
        g=lambda x, p: p * np.linalg.norm(x),
        regular=(*REGULAR, [0.0, 0.0, 0.0]),
        kinks=(([0.35, 0.0, 0.0], np.zeros((3, 3))),),
    ),
    Case(
        "lasso without strength", lambda y, p: proximal.lasso(y, p, 0.0), regular=([0.0, 0.0, 0.0],)
    ),
    Case(
        "group_lasso without strength",
        lambda y, p: proximal.group_lasso(y, p, 0.0),
        regular=([0.0, 0.0, 0.0],),
    ),
]
BY_NAME = {case.name: case for case in CASES}
over_cases = pytest.mark.parametrize("name", list(BY_NAME))


OWN_RULES = ("semidefinite",)  # derivatives not left to jax, so that each order has to be looked at


@functools.cache
def derivatives(name: str) -> Any:
    """(x, p) -> value, forward, reverse, and of a scalar of it the gradient
    and second derivatives in two orders.

    On x and p in one flat vector: x first.
    """
    case = BY_NAME[name]
    shape = np.shape(case.regular[0])

    def flat(xp: Array) -> Array:
        return jnp.ravel(case.f(xp[:-1].reshape(shape), xp[-1]))

    def scalar(xp: Array) -> Array:
        y = flat(xp)
        return jnp.sum(jnp.cos(jnp.arange(y.size)) * jnp.sin(y))

    def both(xp: Array) -> Any:
        gradient = jax.grad(scalar)
        first = flat(xp), jax.jacfwd(flat)(xp), jax.jacrev(flat)(xp)
        second = jax.jacfwd(gradient)(xp)
        return (
            *first,
            gradient(xp),
            second,
            jax.jacrev(gradient)(xp) if name in OWN_RULES else second,
        )

    return jax.jit(both)


def at(x: Any, p: float) -> Array:
    return jnp.append(jnp.ravel(jnp.asarray(x, float)), p)


@over_cases
def test_derivatives_are_those_of_differences(name: str) -> None:
    case, evaluate, h = BY_NAME[name], derivatives(name), 1e-5
    for x in case.regular:
        xp = at(x, case.p)
        _, forward, reverse, _, second, again = evaluate(xp)
        np.testing.assert_allclose(reverse, forward, atol=1e-13)
        np.testing.assert_allclose(again, second, atol=1e-12)
        shifted = [(evaluate(xp + h * e), evaluate(xp - h * e)) for e in jnp.eye(xp.size)]
        np.testing.assert_allclose(
            forward, np.stack([(a[0] - b[0]) / (2 * h) for a, b in shifted], 1), atol=1e-8
        )
        np.testing.assert_allclose(
            second, np.stack([(a[3] - b[3]) / (2 * h) for a, b in shifted], 1), atol=1e-7
        )


@pytest.mark.parametrize("name", [case.name for case in CASES if case.kinks])
def test_the_derivative_at_a_kink_is_that_of_one_side(name: str) -> None:
    case = BY_NAME[name]
    for x, slope in case.kinks:
        found = derivatives(name)(at(x, case.p))
        assert all(bool(jnp.all(jnp.isfinite(part))) for part in found)
        np.testing.assert_allclose(found[1][:, :-1], slope, atol=2e-15)


# Where p is not the size of a set or the strength of a penalty,
# the decomposition below is the check.
SIZED = [
    case.name
    for case in CASES
    if case.name not in ("second_order_cone", "semidefinite") and case.regular == REGULAR
]


@pytest.mark.parametrize("name", SIZED)
def test_no_other_point_is_nearer(name: str) -> None:
    """At the minimum of a function of curvature one, each q is above by |q - x|^2 / 2 or more."""
    case, rng = BY_NAME[name], np.random.default_rng(0)
    value = jax.jit(case.f)
    p = jnp.asarray(case.p)
    for y in case.regular:
        y = np.asarray(y)
        x = np.asarray(value(y, p))
        for scale in (1e-3, 0.3, 3.0):
            for _ in range(20):
                q = x + scale * rng.normal(size=x.shape)
                if case.g is None:  # of the set
                    q = np.asarray(value(q, p))
                    np.testing.assert_allclose(value(q, p), q, atol=1e-12)
                    rise = ((q - y) ** 2 - (x - y) ** 2).sum() / 2
                else:
                    rise = ((q - y) ** 2 - (x - y) ** 2).sum() / 2 + SCALING * (
                        case.g(q, case.p) - case.g(x, case.p)
                    )
                assert rise >= ((q - x) ** 2).sum() / 2 - 1e-12


@pytest.mark.parametrize("name", ["second_order_cone", "semidefinite"])
def test_a_point_is_the_sum_of_its_nearest_in_the_cone_and_in_the_polar_cone(name: str) -> None:
    """Moreau's decomposition: what is left is orthogonal,
    and has no positive product with the cone.
    """
    f = {
        "second_order_cone": projections.second_order_cone,
        "semidefinite": projections.semidefinite,
    }[name]
    for x in BY_NAME[name].regular:
        x = jnp.asarray(x, float)
        p = f(x)
        np.testing.assert_allclose(f(p), p, atol=1e-14)
        np.testing.assert_allclose(jnp.sum(p * (x - p)), 0.0, atol=1e-14)
        np.testing.assert_allclose(f(p - x), p - x, atol=1e-14)  # both cones are their own duals


def test_sets_take_trees_and_vmap_takes_rows() -> None:
    tree = {"a": jnp.array([0.9, -2.0]), "b": jnp.array(0.4)}
    boxed = projections.box(tree, {"a": -1.0, "b": 0.0}, {"a": jnp.array([0.5, 0.6]), "b": 0.3})
    np.testing.assert_array_equal(boxed["a"], [0.5, -1.0])
    assert float(boxed["b"]) == 0.3
    assert float(jnp.sum(projections.box(tree, -jnp.inf, 0.1)["a"])) == -1.9
    length = (
        jnp.hypot(*projections.ball(tree, 0.5)["a"]) ** 2 + projections.ball(tree, 0.5)["b"] ** 2
    )
    assert float(length) == pytest.approx(0.25, rel=1e-15)
    stack = jnp.asarray([rotated(1.0, 1.0, -0.5), rotated(2.0, 0.3, -1.0)])
    slopes = jax.jit(jax.vmap(jax.jacrev(projections.semidefinite)))(stack)
    for x, slope in zip(stack, slopes, strict=True):
        forward = derivatives("semidefinite")(at(x, 1.0))[1][:, :-1]
        np.testing.assert_allclose(slope.reshape(9, 9), forward, atol=1e-14)


def test_a_constraint_given_twice_holds_once() -> None:
    def twice(x: Array) -> Array:
        return projections.affine(x, jnp.tile(NORMALS, (2, 1)), jnp.full(2, 2.0))

    x = at(REGULAR[0], 1.0)
    value, slope = jax.jit(lambda x: (twice(x), jax.jacfwd(twice)(x)))(x[:-1])
    np.testing.assert_allclose(value, derivatives("affine")(x)[0], atol=1e-14)
    np.testing.assert_allclose(slope, derivatives("affine")(x)[1][:, :-1], atol=1e-14)


@pytest.mark.parametrize("name", ["simplex", "l1_ball", "semidefinite"])
def test_single_precision_stays_single(name: str) -> None:
    case = BY_NAME[name]
    x = jnp.asarray(case.regular[0], jnp.float32)
    slope = jax.jacfwd(case.f)(x, jnp.float32(case.p))
    assert slope.dtype == jnp.float32
    exact = derivatives(name)(at(case.regular[0], case.p))[1][:, :-1]
    np.testing.assert_allclose(slope.reshape(exact.shape), exact, atol=1e-5)


def test_a_far_point_of_the_simplex_keeps_its_digits() -> None:
    p = projections.simplex(jnp.array([1e9, 1e9 + 0.5, -1e9]))
    np.testing.assert_array_equal(p, [0.25, 0.75, 0.0])


@pytest.mark.parametrize("name", [*SIZED, "second_order_cone", "group_lasso"])
def test_not_finite_numbers_come_out(name: str) -> None:
    assert not bool(
        jnp.all(jnp.isfinite(derivatives(name)(at([np.nan, 0.5, 0.5], BY_NAME[name].p))[0]))
    )


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(InputError, match="vmap for the rows"):
        projections.second_order_cone(jnp.ones((2, 3)))
    with pytest.raises(InputError, match="square"):
        projections.semidefinite(jnp.ones((2, 3)))
