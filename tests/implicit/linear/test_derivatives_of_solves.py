"""Batches of solves, and their derivatives, forward and reverse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from linear_cases import (
    BY_NAME,
    CONTRACTION,
    DEFICIENT,
    METHODS,
    OUTSIDE,
    operator,
    run,
    solve_dense,
)
from problems import SIZE, spectral

from mdsens.implicit import (
    CG,
    GMRES,
    Auto,
    BiCGSTAB,
    Direct,
    LeastSquares,
    Method,
    Neumann,
    NormalCG,
    Operator,
    Result,
    linear_solve,
    solve,
)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_batch_equals_loop(method: Method) -> None:
    """Members that need 0, 1, few and many steps side by side: none disturbs another."""
    if isinstance(method, GMRES):
        # alone it is told that the operator is positive definite
        method = GMRES(rtol=method.rtol, degree=1)
    problem = BY_NAME["positive definite"]
    _, q = spectral(np.geomspace(1e-3, 1, SIZE), 0)
    bs = np.stack([np.zeros(SIZE), q[:, 4], q[:, 2] - q[:, 9], problem.b, np.full(SIZE, np.nan)])
    eye = np.eye(SIZE)
    kind = "two null spaces" if isinstance(method, GMRES | BiCGSTAB) else "positive"
    batched = jax.vmap(lambda b: solve_dense(problem.matrix, b, eye, eye, kind, method))
    # GMRES's loop condition is shared by hand, at every level of vmap
    nested = isinstance(method, GMRES)
    x, stats = (
        jax.tree.map(lambda leaf: leaf[0], jax.vmap(batched)(bs[None])) if nested else batched(bs)
    )
    for i, b in enumerate(bs):
        alone, status, single = run(problem, method, b)
        assert Result(int(stats.status[i])) == status
        # Two answers within rtol of one system of condition number 1e3.
        np.testing.assert_allclose(
            x[i], alone, rtol=0, atol=2e-7 * max(1.0, float(np.linalg.norm(alone)))
        )
        if not isinstance(method, Direct):  # whose factorization is shared
            # Compiled for a batch it rounds otherwise,
            # and BiCGSTAB's number of steps hangs on that.
            assert (
                abs(int(stats.iterations[i]) - int(single.iterations))
                <= 2 + int(single.iterations) // 10
            )


DERIVATIVES = [
    ("indefinite and singular", Direct(rtol=1e-13)),
    ("unsymmetric", Direct(rtol=1e-13)),
    ("left and right null spaces", Direct(rtol=1e-13)),
    ("left and right null spaces", GMRES(rtol=1e-13)),
]


@pytest.mark.parametrize(("name", "method"), DERIVATIVES)
def test_derivatives_of_linear_solve(name: str, method: Method) -> None:
    problem = BY_NAME[name]
    right, left = map(jnp.asarray, problem.projectors())
    inverse = np.linalg.pinv(problem.matrix, rcond=1e-12)
    rng = np.random.default_rng(2)
    v, w = rng.normal(size=(2, SIZE))

    @jax.jit
    def derivatives(b: Array) -> tuple[Array, Array, Array]:
        def f(b: Array) -> Array:
            return linear_solve(
                operator(jnp.asarray(problem.matrix), right, left, problem.kind), b, method
            )[0]

        x, jv = jax.jvp(f, (b,), (jnp.asarray(v),))
        return x, jv, jax.linear_transpose(f, b)(jnp.asarray(w))[0]

    x, jv, jtw = (np.asarray(out) for out in derivatives(jnp.asarray(problem.b)))
    np.testing.assert_allclose(x, inverse @ problem.b, atol=1e-9)
    np.testing.assert_allclose(jv, inverse @ v, atol=1e-9)
    np.testing.assert_allclose(jtw, inverse.T @ w, atol=1e-9)  # the projectors swap
    assert w @ jv == pytest.approx(jtw @ v, rel=1e-9)


def test_derivative_by_the_operator() -> None:
    """d(A^-1 b) = - A^-1 dA A^-1 b, and its derivative, for A = diag(t) + coupling."""
    coupling = np.random.default_rng(4).normal(size=(4, 4)) / 5
    b = jnp.arange(1.0, 5.0)

    def ours(t: Array) -> Array:
        return linear_solve(Operator(lambda v: t * v + coupling @ v), b, Direct(rtol=1e-14))[
            0
        ].sum()

    def dense(t: Array) -> Array:
        return jnp.linalg.solve(jnp.diag(t) + coupling, b).sum()

    t = jnp.array([2.0, 3.0, 4.0, 2.5])
    gradient, hessian = jax.jit(lambda t: (jax.grad(ours)(t), jax.hessian(ours)(t)))(t)
    np.testing.assert_allclose(gradient, jax.grad(dense)(t), rtol=1e-10)
    np.testing.assert_allclose(hessian, jax.hessian(dense)(t), rtol=1e-9, atol=1e-12)


def test_trees_keep_their_form_and_types() -> None:
    b = {"a": jnp.ones((2, 3), jnp.float32), "b": (jnp.asarray(2.0, jnp.float32), None)}
    four = Operator(lambda v: jax.tree.map(lambda leaf: 4 * leaf, v))
    x, stats = jax.jit(lambda b: solve(four, b, Direct(rtol=1e-6)))(b)
    assert jax.tree.structure(x) == jax.tree.structure(b)
    assert x["a"].dtype == jnp.float32
    np.testing.assert_allclose(x["a"], 0.25, rtol=1e-6)
    assert float(x["b"][0]) == pytest.approx(0.5, rel=1e-6)
    assert Result(int(stats.status)) == Result.CONVERGED


def test_no_unknowns() -> None:
    x, stats = solve(Operator(lambda v: v), jnp.zeros((0, 2)))
    assert x.shape == (0, 2)
    assert Result(int(stats.status)) == Result.CONVERGED


def test_transpose_swaps_the_null_spaces() -> None:
    problem = BY_NAME["left and right null spaces"]
    right, left = problem.projectors()
    transposed = operator(jnp.asarray(problem.matrix), right, left, problem.kind).transpose(
        jnp.zeros(SIZE)
    )
    v = jnp.asarray(problem.b)
    np.testing.assert_allclose(transposed.matvec(v), problem.matrix.T @ problem.b, atol=1e-13)
    assert transposed.project is not None and transposed.left_project is not None
    np.testing.assert_allclose(transposed.project(v), left @ problem.b)
    np.testing.assert_allclose(transposed.left_project(v), right @ problem.b)


def test_stats_name_the_method_and_count_applications() -> None:
    problem = BY_NAME["positive definite"]
    _, _, stats = run(problem, GMRES(degree=1, restart=200, rtol=1e-10))
    assert stats.solver == "GMRES(degree=1, restart=200, rtol=1e-10)"
    assert stats.iterations == SIZE + 1  # the whole space, and the residual
    assert (
        run(problem, CG(rtol=1e-6, max_iterations=99))[2].solver
        == "CG(degree=1, max_iterations=99, rtol=1e-06)"
    )
    _, _, stats = run(problem, Auto())
    assert stats.solver == "Direct(rtol=1e-10)"


@pytest.mark.parametrize(
    ("matrix", "method"),
    [
        (DEFICIENT, NormalCG(rtol=1e-13)),
        (DEFICIENT, LeastSquares()),
        (np.eye(SIZE) - CONTRACTION, Neumann(rtol=1e-13)),
    ],
    ids=["NormalCG", "LeastSquares", "Neumann"],
)
def test_derivatives_forward_and_back(matrix: np.ndarray, method: Method) -> None:
    inverse = np.linalg.pinv(matrix, rcond=1e-12)
    w = np.random.default_rng(3).normal(size=SIZE)

    @jax.jit
    def derivatives(b: Array) -> tuple[Array, Array]:
        f = lambda b: linear_solve(Operator(lambda v: jnp.asarray(matrix) @ v), b, method)[0]  # noqa: E731
        return jax.jvp(f, (b,), (b,))[1], jax.linear_transpose(f, b)(jnp.asarray(w))[0]

    jv, jtw = derivatives(jnp.asarray(OUTSIDE))
    np.testing.assert_allclose(jv, inverse @ OUTSIDE, atol=1e-9)
    np.testing.assert_allclose(jtw, inverse.T @ w, atol=1e-9)
