"""Each row of the catalogue against closed forms,
differences of solutions found anew, and the other rows.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from conftest import LONG
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from mdsens.implicit import InputError, Result, fixed_point, root
from mdsens.implicit.conditions import degeneracy, projections, proximal
from mdsens.implicit.conditions import optimality as opt
from mdsens.implicit.conditions.conic import (
    ConicSolution,
    NonNegative,
    SecondOrder,
    Semidefinite,
    Zero,
    conic_residual,
    embed,
    matrix,
    read,
    vector,
)

# f(x, theta) = x H x / 2 - c x, theta = (c, p):
# p is the size of the set, or the strength of the penalty
H = np.array([[2.0, 0.3, -0.5], [0.3, 1.5, 0.2], [-0.5, 0.2, 1.0]])
NORMAL = np.array([1.0, 2.0, -1.0])
LOWER, RIDGE, STEP = -0.3, 0.4, 0.3
# x, and dx/dtheta by the equations of the constraints that hold
Solution = tuple[np.ndarray, np.ndarray]


def f(x: Array, theta: Array) -> Array:
    return x @ H @ x / 2 - theta[:3] @ x


def held(free: list[int], at: Callable[[float], np.ndarray], theta: np.ndarray) -> Solution:
    """The minimum over the free entries, with the others at(p), which is linear in p."""
    c, p = theta[:3], theta[3]
    x, dx = at(p), np.zeros((3, 4))
    dx[:, 3] = at(1.0) - at(0.0)
    fixed = [i for i in range(3) if i not in free]
    block = np.linalg.inv(H[np.ix_(free, free)])
    x[free] = block @ (c[free] - H[np.ix_(free, fixed)] @ x[fixed])
    dx[np.ix_(free, free)] = block
    dx[free, 3] = -block @ H[np.ix_(free, fixed)] @ dx[fixed, 3]
    return x, dx


def boxed(theta: np.ndarray) -> Solution:
    for sides in itertools.product((0, -1, 1), repeat=3):
        s = np.array(sides)
        x, dx = held(
            [i for i in range(3) if not s[i]],
            lambda p, s=s: np.choose(s + 1, [LOWER, 0.0, p]),
            theta,
        )
        force = theta[:3] - H @ x
        if np.all(x >= LOWER) and np.all(x <= theta[3]) and np.all(s * force >= 0):
            return x, dx
    raise AssertionError


def sparse(theta: np.ndarray, ridge: float = 0.0) -> Solution:
    """Lasso: for each pattern of signs a linear system."""
    c, p, stiff = theta[:3], theta[3], H + ridge * np.eye(3)
    for signs in itertools.product((0, -1, 1), repeat=3):
        s, x, dx = np.array(signs), np.zeros(3), np.zeros((3, 4))
        free = np.flatnonzero(s)
        block = np.linalg.inv(stiff[np.ix_(free, free)])
        x[free] = block @ (c - p * s)[free]
        dx[np.ix_(free, free)], dx[free, 3] = block, -block @ s[free]
        if np.array_equal(np.sign(x), s) and np.all(np.abs((c - stiff @ x)[s == 0]) <= p):
            return x, dx
    raise AssertionError


def on_plane(
    theta: np.ndarray, normal: np.ndarray = NORMAL, free: tuple[int, ...] = (0, 1, 2)
) -> Solution:
    """The free entries with normal x = p, the others zero."""
    k = list(free)
    system = np.block([[H[np.ix_(k, k)], normal[k][:, None]], [normal[k][None], np.zeros((1, 1))]])
    inverse, x, dx = np.linalg.inv(system), np.zeros(3), np.zeros((3, 4))
    x[k] = (inverse @ np.append(theta[k], theta[3]))[:-1]
    dx[np.ix_(k, [*k, 3])] = inverse[:-1]
    return x, dx


def on_simplex(theta: np.ndarray) -> Solution:
    for size in (3, 2, 1):
        for free in itertools.combinations(range(3), size):
            x, dx = on_plane(theta, np.ones(3), free)
            slope = H @ x - theta[:3]
            if np.all(x >= 0) and np.all(slope >= slope[free[0]] - 1e-12):
                return x, dx
    raise AssertionError


def refined(
    residual: Callable[[np.ndarray], np.ndarray],
    slope: Callable[[np.ndarray], np.ndarray],
    x: np.ndarray,
):
    for _ in range(60):
        x = x - np.linalg.solve(slope(x), residual(x))
    assert np.abs(residual(x)).max() < 1e-13
    return x


def in_ball(theta: np.ndarray) -> Solution:
    c, p = theta[:3], theta[3]
    x, dx = np.linalg.solve(H, c), np.hstack([np.linalg.inv(H), np.zeros((3, 1))])
    if np.linalg.norm(x) <= p:
        return x, dx

    def beyond(force: float) -> float:
        return float(np.linalg.norm(np.linalg.solve(H + force * np.eye(3), c)) - p)

    force = float(scipy.optimize.brentq(beyond, 0, 100, xtol=1e-15))  # pyright: ignore[reportArgumentType]

    def system(z: np.ndarray) -> np.ndarray:
        return np.block([[H + z[3] * np.eye(3), z[:3, None]], [z[:3][None], np.zeros((1, 1))]])

    start = np.append(np.linalg.solve(H + force * np.eye(3), c), force)
    z = refined(
        lambda z: np.append((H + z[3] * np.eye(3)) @ z[:3] - c, (z[:3] @ z[:3] - p**2) / 2),
        system,
        start,
    )
    return z[:3], (np.linalg.inv(system(z)) @ np.diag([1, 1, 1, p]))[:3]


def grouped(theta: np.ndarray) -> Solution:
    c, p = theta[:3], theta[3]
    if np.linalg.norm(c) <= p:
        return np.zeros(3), np.zeros((3, 4))

    def slope(x: np.ndarray) -> np.ndarray:
        size = np.linalg.norm(x)
        return H + p / size * (np.eye(3) - np.outer(x, x) / size**2)

    x = refined(
        lambda x: H @ x - c + p * x / np.linalg.norm(x),
        slope,
        np.linalg.solve(H + 0.1 * np.eye(3), c),
    )
    return x, np.linalg.inv(slope(x)) @ np.column_stack([np.eye(3), -x / np.linalg.norm(x)])


def quartic(x: Array, theta: Array) -> Array:
    return f(x, theta) + theta[3] * jnp.sum(x**4) / 4


def in_quartic(theta: np.ndarray) -> Solution:
    def slope(x: np.ndarray) -> np.ndarray:
        return H + 3 * theta[3] * np.diag(x**2)

    x = refined(lambda x: H @ x - theta[:3] + theta[3] * x**3, slope, np.zeros(3))
    return x, np.linalg.inv(slope(x)) @ np.column_stack([np.eye(3), -(x**3)])


def box(x: Array, theta: Array) -> Array:
    return projections.box(x, LOWER, theta[3])


def outside(x: Array, theta: Array) -> tuple[Array, Array]:
    return LOWER - x, x - theta[3]


def forces(
    x: np.ndarray, theta: np.ndarray, exact: Callable[[np.ndarray], Solution]
) -> opt.KKTPoint:
    force = theta[:3] - H @ x
    if exact is boxed:
        return opt.KKTPoint(
            x, None, (np.where(x == LOWER, -force, 0.0), np.where(x == theta[3], force, 0.0))
        )
    return opt.KKTPoint(x, (NORMAL @ force / (NORMAL @ NORMAL))[None])


def cone_of(x: Array, theta: Array) -> tuple[Array, Array, Array]:
    """c, A, b of: minimize t - theta x, |L^T x|^2 / 2 <= t, in the box; unknowns (x, t)."""
    L = jnp.linalg.cholesky(jnp.asarray(H))
    one, none = jnp.ones((1, 1)), jnp.zeros((3, 1))
    cone = jnp.block(
        [[jnp.zeros((1, 3)), -one], [-jnp.sqrt(2.0) * L.T, none], [jnp.zeros((1, 3)), -one]]
    )
    A = jnp.concatenate([jnp.block([[-jnp.eye(3), none], [jnp.eye(3), none]]), cone])
    b = jnp.concatenate(
        [jnp.full(3, -LOWER), jnp.full(3, theta[3]), jnp.array([1.0, 0, 0, 0, -1.0])]
    )
    return jnp.append(-theta[:3], 1.0), A, b


BOX_CONE = (NonNegative(6), SecondOrder(5))


def embedded(x: np.ndarray, theta: np.ndarray) -> Array:
    _, A, b = cone_of(jnp.asarray(x), jnp.asarray(theta))
    unknowns = jnp.append(x, x @ H @ x / 2)
    s, kkt = b - A @ unknowns, forces(x, theta, boxed).inequality
    return embed(ConicSolution(unknowns, jnp.concatenate([*kkt, s[6:7] / 2, -s[7:] / 2]), s))


def half_sparse(theta: np.ndarray) -> Solution:
    """The penalty on the last entry alone."""
    for sign in (0.0, -1.0, 1.0):
        free = [0, 1, 2] if sign else [0, 1]
        shifted = np.append(theta[:3] - theta[3] * sign * np.eye(3)[2], 0.0)
        x, dx = held(free, lambda p: np.zeros(3), shifted)
        dx[:, 3] = -sign * dx[:, 2]
        if np.sign(x[2]) == sign and (sign or abs(theta[2] - H[2] @ x) <= theta[3]):
            return x, dx
    raise AssertionError


def blocks(x: Array, theta: Array) -> Array:
    proxes = (proximal.free, lambda y, s, theta: proximal.lasso(y, s, theta[3]))
    T = opt.block_proximal_gradient(
        lambda x, theta: f(jnp.append(x[0], x[1]), theta), proxes, (0.2, 0.4)
    )
    return jnp.append(*T((x[:2], x[2]), theta))


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the catalogue, on one problem.

    ``lift`` makes the condition's unknown of the exact x and theta, ``lower`` x of the unknown.
    """

    name: str
    condition: Callable[..., Any]
    exact: Callable[[np.ndarray], Solution]
    thetas: tuple[list[float], ...]
    attach: Callable[..., Any] = fixed_point
    lift: Callable[[np.ndarray, np.ndarray], Any] = lambda x, theta: x
    lower: Callable[[Any], Any] = lambda z: z


def primal(z: opt.KKTPoint) -> Array:
    return z.primal


def nearest_on_plane(x: Array, theta: Array) -> Array:
    return projections.affine(x, jnp.asarray(NORMAL)[None], theta[3:])


symmetric = functools.partial(root, symmetric=True)
definite = functools.partial(root, positive_semidefinite=True)
# both bounds; none; all at bounds
IN_BOX = ([0.5, -2.0, 1.0, 0.6], [0.2, 0.1, 0.3, 2.0], [3.0, 3.0, -4.0, 0.6])
IN_SIMPLEX = ([0.5, 0.6, 0.9, 1.3], [0.5, -2.0, 1.0, 0.6], [5.0, 0.0, 0.0, 1.0])  # support 3, 2, 1
LASSO = ([0.5, -2.0, 1.0, 0.6], [3.0, 2.0, 1.0, 0.1], [0.2, 0.1, 0.3, 0.9])
ANY = ([0.5, -2.0, 1.0, 0.6],)
ROWS = [
    Row("stationary", opt.stationary(quartic), in_quartic, ANY, definite),
    Row("newton", opt.newton(opt.stationary(quartic), 0.5), in_quartic, ANY),
    Row(
        "kkt, equality",
        opt.kkt(f, lambda x, theta: NORMAL[None] @ x - theta[3:]),
        on_plane,
        ANY,
        symmetric,
        lambda x, theta: forces(x, theta, on_plane),
        primal,
    ),
    Row(
        "kkt, inequality",
        opt.kkt(f, None, outside),
        boxed,
        IN_BOX,
        root,
        lambda x, theta: forces(x, theta, boxed),
        primal,
    ),
    Row("projected_gradient, box", opt.projected_gradient(f, box, STEP), boxed, IN_BOX),
    Row(
        "conic, box",
        lambda z, theta: conic_residual(BOX_CONE)(z, *cone_of(z, theta)),
        boxed,
        IN_BOX,
        root,
        embedded,
        lambda z: z[:3],
    ),
    Row(
        "projected_gradient, plane",
        opt.projected_gradient(f, nearest_on_plane, STEP),
        on_plane,
        ANY,
    ),
    Row(
        "projected_gradient, simplex",
        opt.projected_gradient(f, lambda x, theta: projections.simplex(x, theta[3]), STEP),
        on_simplex,
        IN_SIMPLEX,
    ),
    Row(
        "mirror_descent, simplex",
        opt.mirror_descent(f, lambda y, theta: theta[3] * opt.softmax(y), opt.kl_map, STEP),
        on_simplex,
        IN_SIMPLEX,
    ),
    Row(
        "projected_gradient, ball",
        opt.projected_gradient(f, lambda x, theta: projections.ball(x, theta[3]), STEP),
        in_ball,
        ([0.5, -2.0, 1.0, 0.6], [0.2, 0.1, 0.3, 2.0]),
    ),
    Row(
        "proximal_gradient, lasso",
        opt.proximal_gradient(f, lambda y, s, theta: proximal.lasso(y, s, theta[3]), STEP),
        sparse,
        LASSO,
    ),
    Row(
        "proximal_gradient, elastic net",
        opt.proximal_gradient(
            f, lambda y, s, theta: proximal.elastic_net(y, s, theta[3], RIDGE), STEP
        ),
        lambda theta: sparse(theta, RIDGE),
        LASSO,
    ),
    Row(
        "proximal_gradient, group",
        opt.proximal_gradient(f, lambda y, s, theta: proximal.group_lasso(y, s, theta[3]), STEP),
        grouped,
        ([0.5, -2.0, 1.0, 0.6], [0.2, 0.1, 0.3, 0.9]),
    ),
    Row(
        "block_proximal_gradient",
        blocks,
        half_sparse,
        ([0.5, -2.0, 1.0, 0.6], [0.5, -2.0, 0.3, 0.9]),
    ),
]
BY_NAME = {row.name: row for row in ROWS}


def projected_steps(init: Array, theta: Array) -> Array:
    def body(state: tuple[Array, Array]) -> tuple[Array, Array]:
        x, _ = state
        moved = box(x - STEP * (H @ x - theta[:3]), theta)
        return moved, jnp.max(jnp.abs(moved - x))

    return lax.while_loop(lambda state: state[1] > 1e-15, body, (init, jnp.array(jnp.inf)))[0]


def accelerated_steps(init: Array, theta: Array) -> Array:
    """FISTA, restarted where it turns uphill."""

    def body(_: int, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        x, y, t = state
        moved = box(y - STEP * (H @ y - theta[:3]), theta)
        t_next = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
        uphill = (y - moved) @ (moved - x) > 0
        ahead = moved + jnp.where(uphill, 0.0, (t - 1) / t_next) * (moved - x)
        return moved, ahead, jnp.where(uphill, 1.0, t_next)

    return lax.fori_loop(0, 400, body, (init, init, jnp.array(1.0)))[0]


def on_the_host(init: Array, theta: Array) -> Array:
    def bounded(theta: np.ndarray) -> np.ndarray:
        theta, upper = np.asarray(theta), np.linalg.cholesky(H).T
        target = np.linalg.solve(upper.T, theta[:3])
        return scipy.optimize.lsq_linear(
            upper, target, (LOWER, theta[3]), method="bvls", tol=1e-15
        ).x

    return jax.pure_callback(bounded, jax.ShapeDtypeStruct((3,), init.dtype), theta)


BEHIND: list[Callable[[Any, np.ndarray], Any]] = [lambda init, theta: init]


def given(init: Any, theta: Array) -> Any:
    """What stands in BEHIND when it is called, on the host:
    a closed form's solution as it is, or any solver.
    """
    return jax.pure_callback(
        lambda z, theta: BEHIND[0](z, theta), jax.eval_shape(lambda z: z, init), init, theta
    )


SOLVERS = [given, projected_steps, accelerated_steps, on_the_host]


# The maps on plain vectors without a solve of their own, as one:
# compiling the linear solve is nearly all the time.
NESTED = ("newton", "projected_gradient, plane")
MAPS = [
    row
    for row in ROWS
    if row.attach is fixed_point and row.lift is Row.lift and row.name not in NESTED
]


def any_map(x: Array, theta: Array, which: Array, by: Array) -> Array:
    return lax.switch(which, [row.condition for row in MAPS], x, theta)


def any_solver(init: Array, theta: Array, which: Array, by: Array) -> Array:
    return lax.switch(by, SOLVERS, init, theta)


@functools.cache
def compiled(name: str | None) -> Any:
    """(init, theta) -> x, residual, forward and reverse Jacobian;
    None for any of MAPS by any of SOLVERS.
    """
    row = BY_NAME[name] if name else Row("any", any_map, boxed, ())
    solver = row.attach(row.condition)(given if name else any_solver)

    @jax.jit
    def both(init: Any, theta: Array, *which: int) -> tuple[Array, Array, Array, Array]:
        def x(theta: Array) -> Array:
            return row.lower(solver(init, theta, *which))

        z = solver(init, theta, *which)
        residual, _ = ravel_pytree(row.condition(z, theta, *which))
        wanted = ravel_pytree(z)[0] if row.attach is fixed_point else jnp.zeros_like(residual)
        return (
            row.lower(z),
            jnp.max(jnp.abs(residual - wanted)),
            jax.jacfwd(x)(theta),
            jax.jacrev(x)(theta),
        )

    return both


def derivatives(
    name: str, init: Any, theta: np.ndarray, by: Any = given
) -> tuple[Array, Array, Array, Array]:
    row = BY_NAME[name]
    if row not in MAPS:
        return compiled(name)(init, theta)
    return compiled(None)(init, theta, MAPS.index(row), SOLVERS.index(by))


@pytest.mark.parametrize("name", list(BY_NAME))
def test_each_row_has_the_derivative_of_the_closed_form(name: str) -> None:
    row, h = BY_NAME[name], 1e-5
    for values in row.thetas:
        theta = np.array(values)
        x, slope = row.exact(theta)
        again = np.stack(
            [
                (row.exact(theta + h * e)[0] - row.exact(theta - h * e)[0]) / (2 * h)
                for e in np.eye(4)
            ],
            1,
        )
        np.testing.assert_allclose(slope, again, atol=1e-7)  # what the closed form is worth
        _, residual, forward, reverse = derivatives(
            name, jax.tree.map(jnp.asarray, row.lift(x, theta)), theta
        )
        assert residual < 1e-12  # the exact solution meets the condition
        np.testing.assert_allclose(forward, slope, atol=1e-10)
        np.testing.assert_allclose(reverse, slope, atol=1e-10)


@LONG
def test_second_derivatives() -> None:
    """Of Newton's map, whose first derivative leaves out a term:
    against differences of the closed form's Jacobian.
    """
    row, theta, h = BY_NAME["newton"], np.array(ANY[0]), 1e-5
    solver = row.attach(row.condition)(given)
    z = jnp.asarray(row.exact(theta)[0])
    found = jax.jit(jax.jacfwd(jax.jacrev(lambda theta: solver(z, theta))))(theta)
    again = [
        (row.exact(theta + h * e)[1] - row.exact(theta - h * e)[1]) / (2 * h) for e in np.eye(4)
    ]
    np.testing.assert_allclose(found, np.stack(again, -1), atol=1e-7)


@pytest.mark.parametrize("by", SOLVERS[1:], ids=lambda solver: solver.__name__)
def test_the_derivative_does_not_depend_on_the_solver(by: Callable[..., Array]) -> None:
    for values in IN_BOX[:2]:
        theta = np.array(values)
        exact, slope = boxed(theta)  # by active sets: the fourth
        x, residual, forward, reverse = derivatives(
            "projected_gradient, box", jnp.zeros(3), theta, by
        )
        assert residual < 1e-14
        np.testing.assert_allclose(x, exact, atol=1e-13)
        np.testing.assert_allclose(forward, slope, atol=1e-10)
        np.testing.assert_allclose(reverse, slope, atol=1e-10)


class Host:
    """Solvers of one row on the host, from near its solution; they know its condition alone."""

    def __init__(self, row: Row):
        def left(flat: Array, theta: Array, z: Any) -> Array:
            unknown = ravel_pytree(z)[1](flat)
            image = ravel_pytree(row.condition(unknown, theta))[0]
            return flat - image if row.attach is fixed_point else image

        self.row, self.left, self.slope = row, jax.jit(left), jax.jit(jax.jacfwd(left))

    def newton(self, x: np.ndarray, *rest: Any) -> np.ndarray:
        for _ in range(30):
            x = x - np.linalg.lstsq(self.slope(x, *rest), self.left(x, *rest))[0]
        return x

    def powell(self, x: np.ndarray, *rest: Any) -> np.ndarray:
        found = scipy.optimize.root(
            lambda y: np.asarray(self.left(y, *rest)), x, method="hybr", options={"xtol": 1e-15}
        )
        return found.x

    def iteration(self, x: np.ndarray, *rest: Any) -> np.ndarray:
        """The row's own map, over and over; of a root, steps of least squares by trust region."""
        if self.row.attach is not fixed_point:
            how = {
                "jac": lambda y: np.asarray(self.slope(y, *rest)),
                "xtol": 1e-15,
                "ftol": 1e-15,
                "gtol": 1e-15,
            }
            return scipy.optimize.least_squares(
                lambda y: np.asarray(self.left(y, *rest)), x, **how
            ).x
        for _ in range(2000):
            x, before = x - np.asarray(self.left(x, *rest)), x
            if np.abs(x - before).max() < 1e-16:
                break
        return x


@pytest.mark.parametrize("name", list(BY_NAME))
def test_three_solvers_behind_one_condition_give_one_derivative(name: str) -> None:
    row, host = BY_NAME[name], Host(BY_NAME[name])
    theta = np.array(row.thetas[0])
    x, slope = row.exact(theta)
    exact = jax.tree.map(jnp.asarray, row.lift(x, theta))
    vector, back = ravel_pytree(exact)
    # what is zero stays zero
    start = back(vector * (1.0 + 1e-3 * np.cos(np.arange(vector.size) ** 2.0)))
    for solver in (host.newton, host.powell, host.iteration):
        asked = []

        def solve(z: Any, theta: np.ndarray, solver: Any = solver, asked: list = asked) -> Any:
            asked.append(solver)
            return jax.tree.map(
                np.asarray, back(jnp.asarray(solver(np.asarray(ravel_pytree(z)[0]), theta, z)))
            )

        BEHIND[0] = solve
        try:
            found, residual, forward, reverse = jax.block_until_ready(
                derivatives(name, start, theta)
            )
        finally:
            BEHIND[0] = lambda init, theta: init
        assert asked and residual < 1e-11, solver.__name__
        np.testing.assert_allclose(found, x, rtol=0, atol=1e-9)
        np.testing.assert_allclose(forward, slope, rtol=0, atol=1e-8)
        np.testing.assert_allclose(reverse, slope, rtol=0, atol=1e-8)


# ── conic programs ──


def solved(x: np.ndarray, y: np.ndarray, s: np.ndarray) -> ConicSolution:
    return ConicSolution(jnp.asarray(x), jnp.asarray(y), jnp.asarray(s))


def conic_case(
    name: str,
) -> tuple[Any, tuple[np.ndarray, ...], Callable[..., np.ndarray], ConicSolution]:
    """Cones, (c, A, b), x as a function of them, and the whole solution."""
    if name == "linear":
        A = np.array(
            [
                [1.0, 1.0, 1.0],
                [-1.0, 0.2, 0.0],
                [0.1, -1.0, 0.3],
                [1.0, 0.5, -0.2],
                [0.3, 0.0, -1.0],
            ]
        )
        b, c, holds = np.array([1.0, 0.1, 0.2, 5.0, 4.0]), np.array([1.0, 1.5, 0.7]), [0, 1, 2]

        def vertex(c: np.ndarray, A: np.ndarray, b: np.ndarray) -> np.ndarray:
            return np.linalg.solve(A[holds], b[holds])

        x, y = vertex(c, A, b), np.zeros(5)
        y[holds] = np.linalg.solve(A[holds].T, -c)
        solution = solved(x, y, b - A @ x)
        assert np.all(y[1:] >= 0) and np.all(solution.s[1:] >= -1e-15)
        return (Zero(1), NonNegative(4)), (c, A, b), vertex, solution
    # minimize <C, X> over X >= 0 of trace one: the projector on the lowest mode. The other two are
    # equally stiff, and so are two eigenvalues of y - s.
    q = np.linalg.qr(np.array([[1.0, 2.0, 0.5], [-0.3, 1.0, 1.0], [0.7, -1.0, 2.0]]))[0]
    C = (q * np.array([1.0, 3.0, 3.0])) @ q.T
    A, b = np.vstack([np.asarray(vector(jnp.eye(3))), -np.eye(6)]), np.append(1.0, np.zeros(6))

    def lowest(c: np.ndarray, A: np.ndarray, b: np.ndarray) -> np.ndarray:
        v = np.linalg.eigh(np.asarray(matrix(jnp.asarray(c))))[1][:, 0]
        return b[0] * np.asarray(vector(jnp.asarray(np.outer(v, v))))

    c = np.asarray(vector(jnp.asarray(C)))
    x = lowest(c, A, b)
    y = np.append(-1.0, c - np.asarray(vector(jnp.eye(3))))
    return (Zero(1), Semidefinite(3)), (c, A, b), lowest, solved(x, y, b - A @ x)


@pytest.mark.parametrize("name", ["linear", "semidefinite"])
def test_conic_programs(name: str) -> None:
    cones, data, exact, solution = conic_case(name)
    rng, h = np.random.default_rng(0), 1e-6
    F = conic_residual(cones)
    solver = root(F)(lambda init, *data: init)
    # A of the semidefinite program is its structure: the closed form knows c and b alone
    moves = tuple(
        rng.normal(size=part.shape) * (name == "linear" or i != 1) for i, part in enumerate(data)
    )
    moves[2][1 if name == "semidefinite" else len(data[2]) :] = 0.0
    weights = jnp.asarray(rng.normal(size=solution.x.shape))

    def x(*data: Array) -> Array:
        return read(solver(z, *data), cones).x

    @jax.jit
    def both(*data: Array) -> Any:
        value, forward = jax.jvp(x, data, tuple(map(jnp.asarray, moves)))
        return F(z, *data), value, forward, jax.vjp(x, *data)[1](weights), jax.jacfwd(F)(z, *data)

    z = embed(solution)
    residual, value, forward, reverse, jacobian = both(*map(jnp.asarray, data))
    np.testing.assert_allclose(residual, 0.0, atol=1e-14)
    np.testing.assert_allclose(value, solution.x, atol=1e-14)
    ahead, behind = (
        [part + sign * h * move for part, move in zip(data, moves, strict=True)] for sign in (1, -1)
    )
    np.testing.assert_allclose(forward, (exact(*ahead) - exact(*behind)) / (2 * h), atol=1e-8)
    pulled = sum(np.sum(np.asarray(part) * move) for part, move in zip(reverse, moves, strict=True))
    assert float(pulled) == pytest.approx(float(weights @ forward), rel=1e-11)

    # The residual without its last term, by least squares, as Agrawal et al. have it;
    # its two null vectors.
    plain = np.array(jacobian)
    plain[-1, -1] -= 1
    found = read(z, cones)
    np.testing.assert_allclose(plain @ z, 0.0, atol=1e-14)
    np.testing.assert_allclose(np.concatenate([found.x, found.y, [1.0]]) @ plain, 0.0, atol=1e-13)
    np.testing.assert_allclose(found.y, solution.y, atol=1e-14)
    np.testing.assert_allclose(found.s, solution.s, atol=1e-14)
    (dc, dA, db), n = moves, solution.x.size
    change = np.concatenate(
        [dA.T @ found.y + dc, db - dA @ found.x, [-dc @ found.x - db @ found.y]]
    )
    dz = -np.linalg.lstsq(plain, change, rcond=1e-12)[0]
    np.testing.assert_allclose(dz[:n] - dz[-1] * solution.x, forward, atol=1e-12)


# ── where the derivative jumps ──

# x, p, the force that the constraint or the penalty takes beside grad f, and where to push
KINKS = {
    "projected_gradient, box": (np.array([0.6, 0.1, -0.2]), 0.6, np.zeros(3), np.eye(3)[0]),
    "projected_gradient, simplex": (np.array([0.5, 0.5, 0.0]), 1.0, np.full(3, 0.3), np.eye(3)[2]),
    "projected_gradient, ball": (
        np.array([0.6, 0.0, 0.8]),
        1.0,
        np.zeros(3),
        np.array([0.6, 0.0, 0.8]),
    ),
    "proximal_gradient, lasso": (
        np.array([0.5, -0.2, 0.0]),
        0.6,
        np.array([0.6, -0.6, 0.6]),
        np.eye(3)[2],
    ),
}


@functools.cache
def probe() -> Any:
    return jax.jit(lambda x, theta, which: degeneracy.kinked(any_map, x, theta, which, 0))


@pytest.mark.parametrize("name", list(KINKS))
def test_a_degenerate_solution_says_so_and_has_the_derivative_of_a_side(name: str) -> None:
    x, p, force, push = KINKS[name]
    theta, row = np.append(H @ x + force, p), BY_NAME[name]
    which = MAPS.index(row)
    margin = probe()(jnp.asarray(x), jnp.asarray(theta), which)
    assert Result(int(margin.status)) == Result.DEGENERATE_CONSTRAINT and margin.value > 0.1
    _, residual, forward, _ = derivatives(name, jnp.asarray(x), theta)
    assert residual < 1e-15
    sides = [theta + 1e-4 * sign * np.append(push, 0) for sign in (1, -1)]
    errors = [np.abs(forward - row.exact(side)[1]).max() for side in sides]
    assert min(errors) < 2e-3 < 0.1 < max(errors)
    for side in sides:
        near = row.exact(side)[0]
        margin = probe()(jnp.asarray(near), jnp.asarray(side), which)
        assert Result(int(margin.status)) == Result.CONVERGED and margin.value < 1e-4


def test_complementarity() -> None:
    x, p, *_ = KINKS["projected_gradient, box"]
    theta = np.append(H @ x, p)
    z = jax.tree.map(jnp.asarray, forces(x, theta, boxed))
    margin = degeneracy.complementarity(outside, z, theta)
    assert Result(int(margin.status)) == Result.DEGENERATE_CONSTRAINT and margin.value < 1e-15
    theta[0] += 0.01
    margin = degeneracy.complementarity(
        outside, jax.tree.map(jnp.asarray, forces(x, theta, boxed)), theta
    )
    assert Result(int(margin.status)) == Result.CONVERGED and float(margin.value) == pytest.approx(
        0.01
    )
    nowhere = opt.KKTPoint(jnp.full(3, jnp.nan), None, z.inequality)
    assert (
        Result(int(degeneracy.complementarity(outside, nowhere, theta).status)) == Result.NOT_FINITE
    )
    assert not Result.DEGENERATE_CONSTRAINT.good


# ── what is refused ──


def test_multipliers_that_do_not_fit_are_named() -> None:
    x, theta = jnp.zeros(3), np.array(ANY[0])
    F = opt.kkt(f, lambda x, theta: x[:1], outside)
    with pytest.raises(InputError, match="`equality` is a constraint without multipliers"):
        F(opt.KKTPoint(x), theta)
    with pytest.raises(
        InputError, match=r"inequality\(x, \*args\).*one multiplier for each constraint"
    ):
        F(opt.KKTPoint(x, jnp.zeros(1), jnp.zeros(6)), theta)
    with pytest.raises(InputError, match=r"`x\.equality` are multipliers without a constraint"):
        opt.kkt(f)(opt.KKTPoint(x, jnp.zeros(1)), theta)


def test_cones_that_do_not_fit_are_named() -> None:
    c, A, b = jnp.zeros(2), jnp.zeros((3, 2)), jnp.zeros(3)
    with pytest.raises(InputError, match=r"`cone` has shape \(4,\), but .* requires \(3,\)"):
        conic_residual(NonNegative(4))(jnp.zeros(6), c, A, b)
    with pytest.raises(InputError, match="`b` has shape"):
        conic_residual(NonNegative(3))(jnp.zeros(6), c, A, jnp.zeros(2))
    with pytest.raises(InputError, match="size=0"):
        NonNegative(0)
    with pytest.raises(InputError, match="order=-1"):
        Semidefinite(-1)
    with pytest.raises(InputError, match="length 4"):
        matrix(jnp.zeros(4))


def test_blocks_may_be_a_dict_of_trees_with_one_step() -> None:
    def g(x: dict[str, Any]) -> Array:
        return jnp.sum(x["a"][0] ** 2) + jnp.sum(x["b"] * x["a"][0])

    x = {"a": (jnp.array([1.0, -2.0]),), "b": jnp.array([3.0, 0.5])}
    moved = opt.block_proximal_gradient(g, {"a": proximal.free, "b": proximal.lasso}, 0.5)(x)
    np.testing.assert_allclose(moved["a"][0], x["a"][0] - 0.5 * (2 * x["a"][0] + x["b"]))
    np.testing.assert_allclose(moved["b"], proximal.lasso(x["b"] - 0.5 * x["a"][0], 0.5))
