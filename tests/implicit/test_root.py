"""The derivative of a root, in every mode and order, against the derivative of the closed form."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax import Array
from jax.flatten_util import ravel_pytree
from problems import RootProblem, newton, root_problems

from mdsens.implicit import (
    CG,
    GMRES,
    MINRES,
    BiCGSTAB,
    Direct,
    InputError,
    LeastSquares,
    Neumann,
    NormalCG,
    Result,
    certify,
    fixed_point,
    root,
    tangent,
)
from mdsens.implicit.closures import refusing_derivative

PROBLEMS = root_problems()
BY_NAME = {problem.name: problem for problem in PROBLEMS}
over_problems = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)


def decorated(problem: RootProblem, **options: Any) -> Any:
    """theta -> the root, as one flat vector."""
    attach = fixed_point if problem.fixed_point else root
    known = {
        "symmetric": problem.symmetric,
        "positive_semidefinite": problem.positive_semidefinite,
        "null_space": problem.null_space,
    }
    solver = attach(problem.F, **(known | options))(problem.solver)
    return lambda theta: ravel_pytree(solver(problem.init, theta))[0]


CLOSED_FORMS = {
    p.name: jax.jit(lambda theta, p=p: ravel_pytree(p.answer(theta))[0]) for p in PROBLEMS
}


def closed_form(problem: RootProblem) -> Any:
    """theta -> the exact root: one function a problem, which compiles as a whole and once."""
    return CLOSED_FORMS[problem.name]


@functools.cache
def exact_jacobian(name: str) -> Array:
    problem = BY_NAME[name]
    return jax.jit(jax.jacfwd(closed_form(problem)))(problem.theta)


def close(a: Any, b: Any, rtol: float = 1e-9) -> None:
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * (1e-3 + np.abs(np.asarray(b)).max()))


@over_problems
def test_first_derivatives(problem: RootProblem) -> None:
    f, exact = decorated(problem), closed_form(problem)
    forward, reverse = jax.jit(lambda t: (jax.jacfwd(f)(t), jax.jacrev(f)(t)))(problem.theta)
    close(f(problem.theta), exact(problem.theta))
    close(forward, exact_jacobian(problem.name))
    close(reverse, exact_jacobian(problem.name))


ORDERS = {
    "forward over reverse": lambda f: jax.jacfwd(jax.jacrev(f)),
    "reverse over forward": lambda f: jax.jacrev(jax.jacfwd(f)),
    "reverse over reverse": lambda f: jax.jacrev(jax.jacrev(f)),
}


@pytest.mark.parametrize(
    ("name", "order"),
    [
        *(("rotation and shear", order) for order in ORDERS),
        ("quadratic with a null space", "forward over reverse"),
        ("quadratic with a null space", "reverse over reverse"),
        ("tree of unknowns", "forward over reverse"),
    ],
)
def test_second_derivatives(name: str, order: str) -> None:
    """Of a nonlinear function of the root, so that its first and second derivative both enter."""
    problem = BY_NAME[name]
    weights = jnp.linspace(0.5, 1.5, closed_form(problem)(problem.theta).size)

    def scalar(f: Any) -> Any:
        return lambda theta: jnp.sum(weights * f(theta) ** 2)

    hessian = jax.jit(ORDERS[order](scalar(decorated(problem))))(problem.theta)
    close(hessian, jax.jit(jax.hessian(scalar(closed_form(problem))))(problem.theta), rtol=1e-8)


@pytest.mark.parametrize(
    "name", ["rotation and shear", "quadratic with a null space", "scipy behind a callback"]
)
def test_finite_differences(name: str) -> None:
    problem = BY_NAME[name]
    f, theta, h = decorated(problem), problem.theta, 1e-5
    solved = jax.jit(f)
    columns = [
        (solved(theta + h * e) - solved(theta - h * e)) / (2 * h) for e in jnp.eye(theta.size)
    ]
    close(jax.jit(jax.jacfwd(f))(theta), jnp.stack(columns, axis=1), rtol=1e-8)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("quadratic with a null space", CG(rtol=1e-13)),
        ("spring chain", MINRES(rtol=1e-13)),
        ("quadratic with a null space", GMRES(rtol=1e-13)),
        ("rotation and shear", BiCGSTAB(rtol=1e-13)),
    ],
)
def test_adjoint_identity_with_each_solver(name: str, method: Any) -> None:
    problem = BY_NAME[name]
    f = decorated(problem, solve=method)
    rng = np.random.default_rng(0)
    v = jnp.asarray(rng.normal(size=problem.theta.shape))
    w = jnp.asarray(rng.normal(size=closed_form(problem)(problem.theta).shape))

    @jax.jit
    def both(theta: Array) -> tuple[Array, Array]:
        _, jv = jax.jvp(f, (theta,), (v,))
        _, pull = jax.vjp(f, theta)
        return jv, pull(w)[0]

    jv, jtw = both(problem.theta)
    assert float(w @ jv) == pytest.approx(float(jtw @ v), rel=1e-10)
    close(jv, exact_jacobian(name) @ v)


@pytest.mark.parametrize("name", ["spring chain", "scipy behind a callback"])
def test_vmap_equals_loop(name: str) -> None:
    problem = BY_NAME[name]
    f = decorated(problem)
    thetas = problem.theta * jnp.array([[1.0], [1.1], [0.7]])
    gradient = jax.grad(lambda theta: jnp.sum(jnp.sin(f(theta))))
    single = jax.jit(gradient)
    for theta, row in zip(thetas, jax.jit(jax.vmap(gradient))(thetas), strict=True):
        close(row, single(theta))


def cubic(x: Array, theta: Array) -> Array:
    return x**3 + x - theta


INIT, THETA = jnp.ones(3), BY_NAME["scipy behind a callback"].theta


cardano = closed_form(BY_NAME["scipy behind a callback"])


def slope_of_cardano() -> Array:
    """By each theta, at THETA."""
    return jnp.diag(exact_jacobian("scipy behind a callback"))


def closed_over(theta: Array) -> Array:
    """Both F and the solver take theta from around them, none as an argument."""

    @root(lambda x: cubic(x, theta), solve=Direct())
    def solver(init: Array) -> Array:
        return newton(cubic, init, theta)

    return solver(INIT)


def closed_over_jitted(theta: Array) -> Array:
    jitted = jax.jit(lambda x: cubic(x, theta))
    return root(lambda x: jitted(x), solve=Direct())(
        jax.jit(lambda init: newton(cubic, init, theta))
    )(INIT)


def closed_over_callback(theta: Array) -> Array:
    """jax refuses to differentiate a callback; the solver must not be asked for its derivative."""
    host = BY_NAME["scipy behind a callback"].solver
    return root(lambda x: cubic(x, theta))(functools.partial(lambda t, init: host(init, t), theta))(
        INIT
    )


class Holder:
    """theta as an attribute of the object that solver and F are methods of."""

    def __init__(self, theta: Array | None = None):
        self.theta = theta

    def F(self, x: Array) -> Array:
        assert self.theta is not None
        return cubic(x, self.theta)

    def solve(self, init: Array) -> Array:
        return BY_NAME["scipy behind a callback"].solver(init, self.theta)  # pyright: ignore[reportArgumentType]


HOLDER = Holder()


def closed_over_attribute(theta: Array) -> Array:
    HOLDER.theta = (
        theta  # the same methods at each call: nothing may be remembered from the last one
    )
    return root(HOLDER.F)(HOLDER.solve)(INIT)


@pytest.mark.parametrize(
    "f", [closed_over, closed_over_jitted, closed_over_callback, closed_over_attribute]
)
def test_traced_values_in_closures_have_their_derivative(f: Any) -> None:
    slope = slope_of_cardano()

    def summed(theta: Array) -> Array:
        return jnp.sum(f(theta))

    close(jax.grad(summed)(THETA), slope)
    rows = jnp.stack([THETA, 3 * THETA])
    close(jax.jit(jax.vmap(jax.grad(summed)))(rows)[0], slope)


def test_closures_under_the_other_transforms() -> None:
    slope = slope_of_cardano()

    def summed(theta: Array) -> Array:
        return jnp.sum(closed_over(theta))

    close(jax.grad(jax.jit(summed))(THETA), slope)
    close(jnp.diag(jax.jit(jax.jacfwd(closed_over))(THETA)), slope)
    close(
        jax.jit(jax.grad(lambda s: jnp.sum(jax.vmap(lambda k: closed_over(k * s))(jnp.ones(2)))))(
            THETA
        ),
        2 * slope,
    )


def test_second_derivative_of_a_closure() -> None:
    exact = jax.jit(jax.hessian(lambda theta: jnp.sum(cardano(theta))))(THETA)
    close(jax.jit(jax.hessian(lambda theta: jnp.sum(closed_over(theta))))(THETA), exact)


def test_plain_python_solver() -> None:
    """Outside of jit and vmap the solver sees values, so it may be numpy and a Python loop."""

    def bisect(init: Any, theta: Any) -> np.ndarray:
        low, high = np.full(3, -10.0), np.full(3, 10.0)
        while np.any(high - low > 4e-15 * (1 + np.abs(low))):
            middle = (low + high) / 2
            above = cubic(middle, np.asarray(theta)) > 0  # pyright: ignore[reportArgumentType]
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        return (low + high) / 2

    solver = root(cubic)(bisect)
    close(jax.grad(lambda theta: jnp.sum(solver(None, theta)))(THETA), slope_of_cardano())


def test_arguments_of_every_kind() -> None:
    """Integers, booleans, None and keys are carried; only floating point has a derivative."""

    def target(a: dict[str, Any]) -> Array:
        assert a["nothing"] is None
        return a["theta"] * a["count"] + jnp.where(a["mask"], a["shift"], 0)

    solver = root(lambda x, a: cubic(x, target(a)))(lambda init, a: newton(cubic, init, target(a)))
    a = {
        "theta": THETA,
        "count": jnp.array([1, 2, 3]),
        "mask": jnp.array([True, False, True]),
        "nothing": None,
        "shift": 0.25,
        "key": jax.random.key(0),
    }
    exact = jax.jit(
        jax.grad(
            lambda theta, shift: jnp.sum(cardano(target(a | {"theta": theta, "shift": shift}))),
            (0, 1),
        )
    )

    def ours(theta: Array, shift: Any) -> Array:
        return jnp.sum(solver(INIT, a | {"theta": theta, "shift": shift}))

    for mine, other in zip(
        jax.jit(jax.grad(ours, (0, 1)))(THETA, 0.25), exact(THETA, 0.25), strict=True
    ):
        close(mine, other)
    numbers = {name: a[name] for name in ("theta", "count", "mask", "shift")}
    out = jax.grad(lambda n: jnp.sum(solver(INIT, a | n)), allow_int=True)(numbers)
    close(out["theta"], exact(THETA, 0.25)[0])
    assert out["count"].dtype == jax.dtypes.float0


def test_starting_point_has_no_derivative() -> None:
    solver = root(cubic)(lambda init, theta: newton(cubic, init, theta))
    by_init, by_theta = jax.grad(lambda i, t: jnp.sum(solver(i, t)), (0, 1))(INIT, THETA)
    assert np.all(by_init == 0)
    assert np.all(by_theta != 0)


def test_auxiliary_output_passes_without_derivative() -> None:
    def solver(init: Array, theta: Array) -> Any:
        return newton(cubic, init, theta), {"energy": jnp.sum(theta**2), "name": "newton"}

    f = root(cubic, has_aux=True)(solver)
    x, aux = f(INIT, THETA)
    close(x, cardano(THETA))
    assert aux["name"] == "newton"
    assert float(aux["energy"]) == pytest.approx(float(jnp.sum(THETA**2)))
    by_x = jax.grad(lambda t: jnp.sum(f(INIT, t)[0]) + f(INIT, t)[1]["energy"])(THETA)
    close(by_x, slope_of_cardano())


def test_a_root_within_a_root() -> None:
    """y solves y = inner(theta) cos(y), and inner is itself a root."""
    inner = root(cubic)(lambda init, theta: newton(cubic, init, theta))

    def T(y: Array, theta: Array) -> Array:
        return inner(INIT, theta) * jnp.cos(y) / 2

    outer = fixed_point(T)(
        lambda init, theta: jax.lax.fori_loop(0, 80, lambda _, y: T(y, theta), init)
    )
    x, y = cardano(THETA), jax.jit(outer)(INIT, THETA)
    slope = jnp.cos(y) / 2 / (1 + x * jnp.sin(y) / 2) * slope_of_cardano()
    close(jax.jit(jax.grad(lambda theta: jnp.sum(outer(INIT, theta))))(THETA), slope)


@pytest.mark.parametrize("n", [3, 10])
def test_directions_that_nobody_declared_free_are_told(n: int) -> None:
    """F = A x - theta b with A singular: the shortest answer where there is one,
    and a status in either case.
    """
    rng = np.random.default_rng(n)
    A = rng.normal(size=(n, n))
    A[-1] = rng.normal(size=n - 1) @ A[:-1]
    x = rng.normal(size=n)
    inside, outside = A @ x, rng.normal(size=n)

    def along(b: np.ndarray) -> Any:
        return jax.jit(lambda x: tangent(lambda x, theta: A @ x - theta * b, x, (1.0,), (1.0,)))(x)

    dx, stats = along(inside)
    assert int(stats.status) == Result.NOT_UNIQUE
    close(dx, np.linalg.pinv(A) @ inside)
    assert int(along(outside)[1].status) == Result.SINGULAR


def test_a_free_cluster_is_told_and_has_its_shortest_answer() -> None:
    """A Lennard-Jones tetrahedron, its motions as a whole not declared:
    dR/dsigma = R / sigma about the center.
    """

    def energy(R: Array, sigma: Array) -> Array:
        i, j = np.triu_indices(4, 1)
        s6 = (sigma**2 / jnp.sum((R[i] - R[j]) ** 2, axis=1)) ** 3
        return 4 * jnp.sum(s6**2 - s6)

    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    corners = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1.0]]) @ turn
    R = jnp.asarray(2 ** (1 / 6) * corners / np.sqrt(8.0))
    dR, stats = jax.jit(lambda R: tangent(jax.grad(energy), R, (1.0,), (1.0,), symmetric=True))(R)
    assert int(stats.status) == Result.NOT_UNIQUE
    close(dR, R)


def test_inside_scan_and_checkpoint() -> None:
    solver = root(cubic)(lambda init, theta: newton(cubic, init, theta))

    def f(theta: Array) -> Array:
        step = jax.checkpoint(lambda c, _: (c + jnp.sum(solver(INIT, theta)), None))
        return jax.lax.scan(step, jnp.asarray(0.0), None, length=3)[0]

    close(jax.jit(jax.grad(f))(THETA), 3 * slope_of_cardano())


def test_two_null_spaces() -> None:
    """F = L(theta) (x0 + x1 - theta) (1, -2): singular, and unsymmetric,
    so that left and right null space differ.
    """
    right, left = jnp.array([1.0, 1.0]) / jnp.sqrt(2.0), jnp.array([1.0, -2.0]) / jnp.sqrt(5.0)

    def F(x: Array, theta: Array) -> Array:
        return theta**2 * (x[0] + x[1] - theta) * left

    def onto(u: Array) -> Any:
        return lambda v: u * (u @ v)

    f = root(F, null_space=lambda x, theta: (onto(right), onto(left)))(
        lambda _, theta: jnp.full(2, theta / 2)
    )
    forward, reverse = jax.jit(lambda t: (jax.jacfwd(f, 1)(None, t), jax.jacrev(f, 1)(None, t)))(
        1.7
    )
    close(forward, [0.5, 0.5])
    close(reverse, [0.5, 0.5])
    close(jax.jit(jax.grad(jax.grad(lambda t: jnp.sum(f(None, t) ** 3))))(1.7), 6 * 2 * 1.7 / 8)


def test_null_space_may_depend_on_the_arguments() -> None:
    """A particle on a ring of radius theta: F is radial, and only the radius is determined."""

    def F(x: Array, theta: Array) -> Array:
        r = jnp.sqrt(x @ x)
        return (r - theta) * x / r

    def radial(x: Array, theta: Array) -> Any:
        return lambda v: (x / theta) * ((x / theta) @ v)

    direction = jnp.array([0.6, 0.8])
    f = root(F, symmetric=True, null_space=radial)(lambda _, theta: theta * direction)
    jacobian, push = jax.jit(lambda t: (jax.jacrev(f, 1)(None, t), jax.jacfwd(f, 1)(None, t)))(2.0)
    close(jacobian, direction)
    close(push, direction)


def test_not_finite_derivative_is_not_zero() -> None:
    f = root(lambda x, t: cubic(x, t) * jnp.where(jnp.arange(3) == 1, jnp.nan, 1.0))(
        lambda i, t: newton(cubic, i, t)
    )
    assert np.all(np.isnan(jax.grad(lambda t: jnp.sum(f(INIT, t)))(THETA)))


def test_no_tracer_is_left_behind() -> None:
    solver = root(cubic, null_space=lambda x, theta: lambda v: v + 0 * theta)(
        lambda i, t: newton(cubic, i, t)
    )
    with jax.checking_leaks():
        slope = jax.jit(jax.grad(lambda theta: jnp.sum(solver(INIT, theta))))(THETA)
    close(slope, slope_of_cardano())


def test_single_precision() -> None:
    solver = root(cubic, solve=GMRES())(
        lambda i, t: jax.lax.fori_loop(0, 200, lambda _, x: x - cubic(x, t) / 9, i)
    )
    theta = THETA.astype(jnp.float32)
    slope = jax.jit(jax.grad(lambda theta: jnp.sum(solver(INIT.astype(jnp.float32), theta))))(theta)
    assert slope.dtype == jnp.float32
    close(slope, slope_of_cardano(), rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: root(cubic)(newton)(INIT, theta=THETA),  # pyright: ignore
            ["theta", "by position"],
        ),
        (
            lambda: root(lambda x, t: jnp.sum(x))(lambda i, t: i)(INIT, THETA),
            ["F(x, *args)", "()", "(3,)"],
        ),
        (
            lambda: root(lambda x, t: (x,))(lambda i, t: i)(INIT, THETA),
            ["F(x, *args)", "structure", "x"],
        ),
        (
            lambda: fixed_point(lambda x, t: x[:2])(lambda i, t: i)(INIT, THETA),
            ["T(x, *args)", "(2,)", "(3,)"],
        ),
        (lambda: root(cubic)(lambda i, t: jnp.arange(3))(INIT, THETA), ["unknown", "int"]),
        (
            lambda: root(cubic)(lambda i, t: scipy.optimize.OptimizeResult(x=i))(INIT, THETA),
            ["OptimizeResult", "entry x", "has_aux"],
        ),
        (
            lambda: root(cubic, null_space=lambda x, t: lambda v: v[:1])(lambda i, t: i)(
                INIT, THETA
            ),
            ["null_space", "(1,)", "(3,)"],
        ),
        (
            lambda: root(cubic, preconditioner=lambda x, t: lambda v: v[:1])(lambda i, t: i)(
                INIT, THETA
            ),
            ["preconditioner", "(1,)", "(3,)"],
        ),
        (
            lambda: root(cubic, preprocess=lambda i, t: i)(lambda i, t: i)(INIT, THETA),  # pyright: ignore
            ["preprocess", "(init, args)"],
        ),
        (lambda: root(cubic, static_argnums=(0,)), ["static_argnums=(0,)"]),
        (
            lambda: root(cubic, static_argnums=(2,))(lambda i, t: i)(INIT, THETA),
            ["static_argnums=(2,)", "1 arguments"],
        ),
        (
            lambda: jax.grad(
                lambda t: jnp.sum(root(cubic, static_argnums=(1,))(lambda i, t: i)(INIT, t))
            )(THETA),
            ["argument 1", "static_argnums=(1,)", "jit"],
        ),
        (lambda: root(3), ["F=3", "(x, *args)"]),  # pyright: ignore
        (lambda: fixed_point(None), ["T=None", "(x, *args)"]),  # pyright: ignore
        (
            lambda: root(cubic, preconditioner="jacobi"),  # pyright: ignore
            ["preconditioner='jacobi'"],
        ),
        (
            lambda: root(cubic, preprocess=3),  # pyright: ignore
            ["preprocess=3", "(init, *args)"],
        ),
        (
            lambda: tangent(cubic, INIT, (THETA,), (THETA,), null_space=3),  # pyright: ignore
            ["null_space=3"],
        ),
        (
            lambda: certify(cubic, INIT, (THETA,), (THETA,), null_space=3),  # pyright: ignore
            ["null_space=3"],
        ),
        (
            lambda: root(cubic, has_aux=True)(lambda i, t: i)(INIT, THETA),
            ["has_aux=True", "(x, aux)"],
        ),
        (
            lambda: root(cubic, static_argnums=2)(lambda i, t: i)(INIT, THETA),
            ["static_argnums=(2,)", "1 arguments"],
        ),
        (
            lambda: root(cubic)(lambda i, t: None)(INIT, THETA),
            ["the solver returned None", "array"],
        ),
        (lambda: certify(cubic, None, (THETA,), (THETA,)), ["x is None", "array"]),
        (
            lambda: tangent(lambda x, t: x - t, np.float16(2.0), (THETA[0],), (1.0,)),
            ["float16", "float64 or float32"],
        ),
        (lambda: tangent(cubic, INIT, (THETA,), ()), ["dargs", "`args` has 1"]),
        (lambda: tangent(cubic, INIT, (THETA,), (THETA[:2],)), ["dargs[0]", "(2,)", "(3,)"]),
        (
            lambda: tangent(lambda x, t: x - t, 2.0, (4,), (1.0,)),
            ["dargs", "4", "int", "floating-point"],
        ),
        (
            lambda: tangent(lambda x, t: x - t, np.float32(2.0), (THETA[0],), (1.0,)),
            ["float64", "float32", "precision"],
        ),
        (
            lambda: tangent(cubic, INIT, (THETA,), (THETA,), solve="cg"),  # pyright: ignore
            ["solve='cg'", "GMRES()"],
        ),
        (
            lambda: tangent(cubic, INIT, (THETA,), (THETA,), solve=Direct),  # pyright: ignore
            ["brackets"],
        ),
        (lambda: tangent(lambda x, t: x[:2], INIT, (THETA,), (THETA,)), ["F(x, *args)", "(2,)"]),
        (
            lambda: jax.grad(lambda t: jnp.sum(root(cubic, solve=CG())(lambda i, t: i)(INIT, t)))(
                THETA
            ),
            ["CG", "positive_semidefinite"],
        ),
    ],
)
def test_bad_input_is_named(call: Any, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        call()
    for word in words:
        assert word in str(error.value)


# ── before and after the root ──


def logarithmic(has_aux: bool) -> Any:
    """x^3 + x = theta in the unknown u = log x and the parameter log theta,
    back in x + theta, and twice of each.
    """

    @root(
        lambda u, theta, twice: cubic(jnp.exp(u), theta),
        has_aux=has_aux,
        preprocess=lambda init, logs: (init, (jnp.exp(logs), 2)),
        postprocess=lambda u, theta, twice: {"x": twice * jnp.exp(u), "theta": twice * theta},
    )
    def solver(init: Array, theta: Array, twice: int) -> Any:
        u = jnp.log(newton(cubic, init, theta))
        return (u, {"largest": jnp.max(theta), "name": "newton"}) if has_aux else u

    return solver


def test_before_and_after_in_every_mode() -> None:
    theta = jnp.array([0.8, 2.0, 5.0])
    logs, f, x = jnp.log(theta), logarithmic(has_aux=True), cardano(theta)
    names = []

    @jax.jit
    def output(logs: Array) -> Any:
        out, aux = f(INIT, logs)
        names.append(aux["name"])
        return out, aux["largest"]

    out, largest = output(logs)
    close(out["x"], 2 * x)
    close(out["theta"], 2 * theta)
    assert names == ["newton"]
    assert float(largest) == pytest.approx(float(jnp.max(theta)))

    def ours(logs: Array) -> Array:
        out, aux = f(INIT, logs)
        return jnp.sum(jnp.sin(out["x"]) * out["theta"]) + aux["largest"]

    def exact(logs: Array) -> Array:
        return jnp.sum(jnp.sin(2 * cardano(jnp.exp(logs))) * 2 * jnp.exp(logs))

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(g: Any, logs: Array) -> Any:
        return jax.jvp(g, (logs,), (INIT,))[1], jax.grad(g)(logs), jax.hessian(g)(logs)

    for mine, other in zip(derivatives(ours, logs), derivatives(exact, logs), strict=True):
        close(mine, other)
    plain, rows = logarithmic(has_aux=False), jnp.stack([logs, logs / 2])
    slopes = jax.jit(jax.vmap(jax.grad(lambda t: jnp.sum(plain(INIT, t)["x"]))))(rows)
    close(slopes[0], 2 * theta / (3 * x**2 + 1))


def test_the_example_of_the_documentation() -> None:
    @root(
        lambda x, theta: x**3 - theta - 1,
        has_aux=True,
        preprocess=lambda init, logarithm: (init, (jnp.exp(logarithm),)),
        postprocess=lambda x, theta: jnp.log(x),
    )
    def solver(init: float, theta: Array) -> Any:
        return jnp.cbrt(theta + 1), {"steps": 1}

    y, aux = solver(1.0, 0.5)
    assert float(y) == pytest.approx(np.log(np.exp(0.5) + 1) / 3)
    assert aux == {"steps": 1}
    slope = jax.jit(jax.grad(lambda t: solver(1.0, t)[0]))(0.5)
    assert float(slope) == pytest.approx(np.exp(0.5) / (np.exp(0.5) + 1) / 3)


# ── arguments that are no data ──


@dataclasses.dataclass(frozen=True)
class Power:
    """A record that jax knows nothing of."""

    exponent: int
    of: Any  # a function


def powered(x: Array, theta: Array, power: Power, mode: str) -> Array:
    assert mode == "plain"
    return power.of(x) ** power.exponent + x - theta


@pytest.mark.parametrize("declared", [(), (2, 3)])
def test_objects_as_arguments(declared: tuple[int, ...]) -> None:
    def solver(init: Array, theta: Array, power: Power, mode: str) -> Array:
        return newton(lambda x, theta: powered(x, theta, power, mode), init, theta)

    f = root(powered, static_argnums=declared)(solver)
    power, jitted = Power(3, lambda x: x), jax.jit(f, static_argnums=(2, 3))
    values_and_slopes = jax.jit(
        jax.vmap(jax.value_and_grad(lambda t: jnp.sum(jitted(INIT, t, power, "plain"))))
    )
    values, slopes = values_and_slopes(jnp.stack([THETA, THETA]))
    close(values[1], jnp.sum(cardano(THETA)))
    close(slopes[1], slope_of_cardano())


@pytest.mark.parametrize("declared", [(), (1,)])
def test_a_function_as_argument_closes_over_the_parameter(declared: tuple[int, ...]) -> None:
    """Its derivative is followed, and the solver, which has none, is not asked for one."""
    host = BY_NAME["scipy behind a callback"].solver

    def summed(theta: Array) -> Array:
        def solver(init: Array, shift: Any) -> Array:
            return host(init, -shift(jnp.zeros(3)))

        f = root(lambda x, shift: x**3 + shift(x), static_argnums=declared)(solver)
        return jnp.sum(f(INIT, lambda x: x - theta))

    close(jax.grad(summed)(THETA), slope_of_cardano())


def test_a_static_argument_is_the_object_itself() -> None:
    log: list[str] = []
    mixed = {1: "one", "two": 2}  # keys that jax cannot sort

    def solver(init: Array, theta: Array, log: list[str], mixed: dict[Any, Any]) -> Array:
        log.append(mixed[1])
        return newton(cubic, init, theta)

    f = root(lambda x, theta, log, mixed: cubic(x, theta), static_argnums=(2, 3))(solver)
    close(jax.grad(lambda t: jnp.sum(f(INIT, t, log, mixed)))(THETA), slope_of_cardano())
    assert log == ["one"]


# ── the linear systems ──

STIFF = jnp.geomspace(1.0, 1e3, 30)
MIXING = jnp.asarray(0.3 * np.random.default_rng(6).normal(size=(30, 30)))


def mixed_cubic(x: Array, theta: Array) -> Array:
    return theta[0] * STIFF * x + MIXING @ x + x**3 - theta[1]


def mixed_solver(init: Array, theta: Array) -> Array:
    return newton(mixed_cubic, jnp.zeros(30), theta)


def rough(x: Array, theta: Array) -> Any:
    return lambda v: v / (theta[0] * STIFF + 3 * x**2)


def test_a_preconditioner_changes_no_derivative() -> None:
    theta, direction = jnp.array([1.3, 40.0]), jnp.array([0.3, -1.0])

    def derivatives(solve: Any, preconditioner: Any) -> Any:
        f = root(mixed_cubic, solve, preconditioner=preconditioner)(mixed_solver)
        slope = jax.grad(lambda t: jnp.sum(jnp.cos(f(None, t))))
        return jax.jit(lambda t: jax.jvp(slope, (t,), (direction,)))(theta)

    exact = derivatives(Direct(rtol=1e-14), None)
    for mine, other in zip(derivatives(BiCGSTAB(rtol=1e-13), rough), exact, strict=True):
        close(mine, other, rtol=1e-10)
    x = mixed_solver(INIT, theta)

    @functools.partial(jax.jit, static_argnums=0)
    def steps(by: Any) -> Array:
        return tangent(
            mixed_cubic, x, (theta,), (direction,), BiCGSTAB(rtol=1e-13), preconditioner=by
        )[1].iterations

    assert 2 * int(steps(rough)) < int(steps(None))


def test_neumann_at_a_fixed_point() -> None:
    """x = cos(theta x) / 2 contracts by a half at most."""

    def T(x: Array, theta: Array) -> Array:
        return jnp.cos(theta * x) / 2

    f = fixed_point(T, Neumann(rtol=1e-13))(
        lambda i, theta: jax.lax.fori_loop(0, 80, lambda _, x: T(x, theta), i)
    )
    theta = jnp.array([0.2, 0.6, 1.0])
    x = f(INIT, theta)
    sine = jnp.sin(theta * x) / 2
    close(jax.jit(jax.grad(lambda t: jnp.sum(f(INIT, t))))(theta), -sine * x / (1 + theta * sine))


# ── the evidence of a derivative ──


def test_tangent_is_the_forward_derivative_with_its_status() -> None:
    def F(x: Array, a: dict[str, Any], shift: Array) -> Array:
        return cubic(x, a["theta"] * a["count"]) - shift

    count = jnp.array([1, 2, 3])
    x = cardano(THETA * count)

    @jax.jit
    def found(dtheta: Array) -> Any:
        a, da = {"theta": THETA, "count": count}, {"theta": dtheta, "count": count}
        return tangent(F, x, (a, jnp.zeros(3)), (da, None), BiCGSTAB())

    def f(theta: Array) -> Array:
        return root(F)(lambda i, a, shift: newton(cubic, i, a["theta"] * a["count"]))(
            INIT, {"theta": theta, "count": count}, jnp.zeros(3)
        )

    dx, stats = found(INIT)
    close(dx, jax.jvp(f, (THETA,), (INIT,))[1])
    assert Result(int(stats.status)) == Result.CONVERGED and float(stats.residual) <= 1e-10
    rows, stats = jax.vmap(found)(jnp.eye(3))
    close(jnp.sum(rows, axis=0), dx)
    assert stats.status.shape == (3,)


@pytest.mark.parametrize(
    "method", [LeastSquares(), NormalCG(), Direct()], ids=lambda m: type(m).__name__
)
def test_tangent_tells_of_a_root_that_is_not_unique(method: Any) -> None:
    """x0 + x1 = theta0 twice over: one equation for two unknowns,
    and for none of them where the two thetas differ.
    """

    def F(x: Array, theta: Array) -> Array:
        return x[0] + x[1] - theta

    x, theta = jnp.array([0.25, 0.75]), jnp.ones(2)
    one = {LeastSquares: Result.NOT_UNIQUE, NormalCG: Result.CONVERGED}.get(type(method))
    found = jax.jit(lambda dtheta: tangent(F, x, (theta,), (dtheta,), method))
    dx, stats = found(jnp.ones(2))
    if one is not None:
        assert Result(int(stats.status)) == one
        close(dx, [0.5, 0.5])
    dx, stats = found(jnp.array([1.0, 0.0]))
    status = Result(int(stats.status))
    assert not status.good and np.all(np.isfinite(dx))
    if one is not None:
        assert status == Result.SINGULAR
        close(dx, [0.25, 0.25])
        assert float(stats.residual) == pytest.approx(np.sqrt(0.5))


def test_a_piecewise_constant_result_with_integers_refuses_a_derivative_and_no_more() -> None:
    def counted(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        result = (jnp.sum(x > 0), 2.0 * jax.lax.stop_gradient(x))
        return refusing_derivative(result, x, "the count has no derivative")

    x = jnp.array([1.0, -1.0])
    with pytest.raises(InputError, match="the count has no derivative"):
        jax.grad(lambda x: jnp.sum(counted(x)[1]))(x)
    # a derivative by something else passes by
    slope = jax.grad(lambda y: y * jnp.sum(counted(x)[1] ** 2) + counted(x)[0])(3.0)
    assert float(slope) == 8.0
