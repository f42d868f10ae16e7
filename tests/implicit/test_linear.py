"""Linear solves: each method against the dense answer, and a status that says what happened."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from problems import SIZE, LinearProblem, linear_problems, spectral

from mdsens.implicit import (
    CG,
    GMRES,
    MINRES,
    Auto,
    BiCGSTAB,
    Direct,
    InputError,
    LeastSquares,
    Method,
    Neumann,
    NormalCG,
    Operator,
    Result,
    SolveStats,
    SymmetricScaling,
    choose,
    linear_solve,
    solve,
)
from mdsens.implicit.linear.minres import minres

PROBLEMS = linear_problems()
BY_NAME = {problem.name: problem for problem in PROBLEMS}
METHODS = [GMRES(), CG(), MINRES(), BiCGSTAB(), Direct()]


def operator(matrix: Any, right: Any, left: Any, kind: str) -> Operator:
    """A dense matrix and its projectors as an operator that declares ``kind``."""
    return Operator(
        lambda v: jnp.matmul(matrix, v, precision="highest"),
        symmetric=kind == "symmetric",
        positive_semidefinite=kind == "positive",
        project=lambda v: right @ v,
        left_project=(lambda v: left @ v) if kind == "two null spaces" else None,
    )


@functools.partial(jax.jit, static_argnums=(4, 5))
def solve_dense(
    matrix: Any, b: Any, right: Any, left: Any, kind: str, method: Method
) -> tuple[Array, SolveStats]:
    return solve(operator(matrix, right, left, kind), b, method)


def run(
    problem: LinearProblem, method: Method, b: np.ndarray | None = None
) -> tuple[Any, Result, SolveStats]:
    right, left = problem.projectors()
    # Whether it is symmetric these two do not ask, and compile once under the widest.
    free = isinstance(method, GMRES | BiCGSTAB | NormalCG | Neumann) and problem.kind != "positive"
    kind = "two null spaces" if free else problem.kind
    x, stats = solve_dense(problem.matrix, problem.b if b is None else b, right, left, kind, method)
    return np.asarray(x), Result(int(stats.status)), stats


def true_residual(problem: LinearProblem, x: np.ndarray) -> float:
    _, left = problem.projectors()
    b = left @ problem.b
    return float(np.linalg.norm(b - problem.matrix @ x) / np.linalg.norm(b))


def fits(method: Method, kind: str) -> bool:
    if isinstance(method, CG):
        return kind == "positive"
    return kind in ("positive", "symmetric") if isinstance(method, MINRES) else True


CASES = [
    pytest.param(problem, method, id=f"{problem.name}-{type(method).__name__}")
    for problem in PROBLEMS
    for method in [*METHODS, NormalCG(), LeastSquares()]
    # BiCGSTAB breaks down on the shift, which has its own test.
    if fits(method, problem.kind)
    and not (problem.name == "cyclic shift" and isinstance(method, BiCGSTAB))
]


@pytest.mark.parametrize(("problem", "method"), CASES)
def test_answer_is_the_pseudo_inverse(problem: LinearProblem, method: Method) -> None:
    x, status, stats = run(problem, method)
    singular = problem.right.shape[1] > 0
    assert status == (Result.NULL_COMPONENT_DROPPED if singular else Result.CONVERGED)
    assert stats.residual <= 1e-10
    assert stats.residual == pytest.approx(true_residual(problem, x), rel=1e-3, abs=1e-14)
    # The residual is bounded by 1e-10,
    # so the error by the condition number (1e3 at most) times that.
    np.testing.assert_allclose(
        x, problem.answer(), rtol=0, atol=1e-7 * float(np.linalg.norm(problem.answer()))
    )
    left = problem.right if problem.left is None else problem.left
    dropped = np.linalg.norm(left.T @ problem.b) / np.linalg.norm(problem.b)
    assert float(stats.dropped) == pytest.approx(dropped, abs=1e-14)
    np.testing.assert_allclose(problem.right.T @ x, 0, atol=1e-12 * float(np.linalg.norm(x)))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_round_off_in_the_null_space_is_not_reported(method: Method) -> None:
    problem = BY_NAME["ring of springs, pushed off balance"]
    x0 = np.random.default_rng(0).normal(size=SIZE)
    b = problem.matrix @ x0  # in the range, but for round-off
    assert 0 < np.abs(problem.right.T @ b)[0] < 1e-14
    x, status, _ = run(problem, method, b)
    assert status == Result.CONVERGED
    np.testing.assert_allclose(x, x0 - x0.mean(), atol=1e-7)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_right_hand_side_in_the_null_space_has_answer_zero(method: Method) -> None:
    x, status, stats = run(BY_NAME["ring of springs, pushed off balance"], method, np.ones(SIZE))
    assert status == Result.NULL_COMPONENT_DROPPED
    assert float(stats.dropped) == pytest.approx(1)
    assert np.all(x == 0)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_undeclared_null_space_is_never_good(method: Method) -> None:
    declared = BY_NAME["three null directions"]
    problem = LinearProblem("undeclared", "positive", declared.matrix, declared.b)
    x, status, stats = run(problem, method)
    assert not status.good
    assert np.all(np.isfinite(x))
    assert stats.residual > 0.1  # what lies in the null space cannot be reached
    if not isinstance(method, BiCGSTAB):
        assert status == Result.STAGNATED


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_wrong_projector_is_never_good(method: Method) -> None:
    problem = BY_NAME["positive definite"]
    _, status, _ = run(
        LinearProblem("wrong", "positive", problem.matrix, problem.b, np.eye(SIZE)[:, :2]), method
    )
    assert not status.good


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_zero_right_hand_side(method: Method) -> None:
    x, status, stats = run(BY_NAME["positive definite"], method, np.zeros(SIZE))
    assert status == Result.CONVERGED
    assert np.all(x == 0)
    assert float(stats.residual) == 0


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_right_hand_side(method: Method, bad: float) -> None:
    problem = BY_NAME["positive definite"]
    x, status, _ = run(problem, method, np.where(np.arange(SIZE) == 3, bad, problem.b))
    assert status == Result.NOT_FINITE
    assert np.all(x == 0)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_not_finite_operator(method: Method) -> None:
    problem = BY_NAME["positive definite"]
    matrix = problem.matrix.copy()
    matrix[3, 3] = np.nan
    x, status, _ = run(LinearProblem("nan", "positive", matrix, problem.b), method)
    assert status == Result.NOT_FINITE
    assert np.all(x == 0)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("scale", [1e-250, 1e250])
def test_scale_of_the_right_hand_side_does_not_matter(method: Method, scale: float) -> None:
    problem = BY_NAME["positive definite"]
    x, status, _ = run(problem, method, problem.b * scale)
    expected, _, _ = run(problem, method)
    assert status == Result.CONVERGED
    np.testing.assert_allclose(x / scale, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "method",
    [
        GMRES(max_iterations=5),
        CG(max_iterations=5),
        MINRES(max_iterations=5),
        BiCGSTAB(max_iterations=6),
    ],
)
def test_early_stop_is_admitted(method: Method) -> None:
    problem = BY_NAME["positive definite"]
    x, status, stats = run(problem, method)
    assert status == Result.MAX_STEPS_REACHED
    assert stats.residual > 1e-10
    if np.any(x != 0):
        assert float(stats.residual) == pytest.approx(true_residual(problem, x), rel=1e-10)
    else:  # the last iterate was worse than none
        assert float(stats.residual) == pytest.approx(1)


def test_gmres_stagnates_on_the_cyclic_shift() -> None:
    """The classic example: the residual does not fall before the last step of the full space."""
    matrix = np.roll(np.eye(SIZE), 1, axis=0)
    first = np.eye(SIZE)[0]
    problem = LinearProblem("shift", "general", matrix, first)
    x, status, stats = run(problem, GMRES(restart=6))
    assert status == Result.STAGNATED
    assert float(stats.residual) == pytest.approx(1)
    x, status, _ = run(problem, GMRES())
    assert status == Result.CONVERGED
    np.testing.assert_allclose(x, np.eye(SIZE)[-1], atol=1e-12)


def test_bicgstab_breaks_down_on_a_skew_operator() -> None:
    g = np.random.default_rng(0).normal(size=(SIZE, SIZE))
    problem = LinearProblem("skew", "general", g - g.T, np.ones(SIZE))
    assert run(problem, BiCGSTAB())[1] == Result.BREAKDOWN
    assert run(problem, GMRES())[1] == Result.CONVERGED


@pytest.mark.parametrize(
    "method", [CG(), Direct(), MINRES(), GMRES(), BiCGSTAB()], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("lowest", [-0.5, -1e-4, -1e-8])
def test_negative_curvature_is_seen(method: Method, lowest: float) -> None:
    values = np.linspace(0.1, 1, SIZE)
    values[0], values[1] = lowest, 0.0
    matrix, q = spectral(values, 5)
    b = np.random.default_rng(1).normal(size=SIZE)
    _, status, _ = run(LinearProblem("saddle", "positive", matrix, b, q[:, 1:2]), method)
    assert status == Result.INDEFINITE


def test_restart_shorter_than_the_problem_still_converges() -> None:
    problem = BY_NAME["unsymmetric"]
    x, status, stats = run(problem, GMRES(restart=6))
    assert status == Result.CONVERGED
    assert stats.iterations > 6
    np.testing.assert_allclose(x, problem.answer(), atol=1e-9)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_single_precision_says_where_it_ends(method: Method) -> None:
    matrix, _ = spectral(np.geomspace(0.05, 1, SIZE), 9)
    b = np.ones(SIZE, np.float32)
    eye = np.eye(SIZE, dtype=np.float32)
    x, stats = solve_dense(matrix.astype(np.float32), b, eye, eye, "positive", method)
    assert x.dtype == jnp.float32
    assert Result(int(stats.status)) == Result.ROUND_OFF_LIMITED  # 1e-10 is out of float32's reach
    assert 1e-10 < stats.residual < 1e-5
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=0, atol=2e-5 * np.abs(x).max())


RANDOM = [
    GMRES(rtol=1e-9),
    CG(rtol=1e-9),
    MINRES(rtol=1e-9),
    BiCGSTAB(rtol=1e-9),
    Direct(rtol=1e-9),
    NormalCG(rtol=1e-9),
    LeastSquares(rtol=1e-9),
]


@pytest.mark.parametrize("method", RANDOM, ids=lambda m: type(m).__name__)
def test_a_good_status_is_true(method: Method) -> None:
    """Random spectra over 12 decades, some with undeclared null directions, solved as one batch."""
    rng = np.random.default_rng(11)
    count = 40
    matrices, rights = [], []
    for seed in range(count):
        values = 10.0 ** rng.uniform(-rng.uniform(0, 12), 0, size=SIZE)
        null = seed % 4
        values[:null] = 0
        matrix, q = spectral(values, 100 + seed)
        declared = null if seed % 3 else max(null - 1, 0)
        matrices.append(matrix)
        rights.append(np.eye(SIZE) - q[:, :declared] @ q[:, :declared].T)
    a, p, b = np.stack(matrices), np.stack(rights), rng.normal(size=(count, SIZE))
    x, stats = jax.vmap(lambda a, b, p: solve_dense(a, b, p, p, "positive", method))(a, b, p)
    kept = np.einsum("mij,mj->mi", p, b)  # the part of b in the declared range
    residual = np.linalg.norm(kept - np.einsum("mij,mj->mi", a, x), axis=1) / np.linalg.norm(
        kept, axis=1
    )
    # Two evaluations of one residual differ by the round-off of A x.
    size = (
        np.linalg.norm(a, 2, axis=(1, 2)) * np.linalg.norm(x, axis=1) / np.linalg.norm(kept, axis=1)
        + 1
    )
    round_off = 4 * np.finfo(float).eps * size
    assert np.all(np.abs(stats.residual - residual) <= round_off)
    statuses = [Result(int(s)) for s in stats.status]
    good = [i for i, s in enumerate(statuses) if s.good]
    assert 5 <= len(good) < count  # both outcomes are there, or this proves nothing
    for i in good:
        if statuses[i] == Result.ROUND_OFF_LIMITED:
            assert residual[i] <= 20 * np.finfo(float).eps * size[i]
        else:
            assert residual[i] <= 1e-9 + round_off[i]


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


def test_choose() -> None:
    def of(symmetric: bool = False, positive_semidefinite: bool = False) -> Operator:
        return Operator(lambda v: v, symmetric, positive_semidefinite)

    assert choose(Auto(1e-8), 100, of()) == Direct(1e-8)
    assert choose(Auto(1e-8), 10_000, of()) == GMRES(1e-8)
    assert choose(Auto(1e-8), 10_000, of(symmetric=True)) == MINRES(1e-8)
    assert choose(Auto(1e-8), 10_000, of(positive_semidefinite=True)) == CG(1e-8)
    assert choose(Auto(), 1_000, of(positive_semidefinite=True)) == CG()
    assert choose(GMRES(restart=7), 10, of(symmetric=True)) == GMRES(restart=7)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GMRES(rtol=0.0), ["GMRES", "rtol=0.0"]),
        (lambda: CG(rtol=2.0), ["CG", "rtol=2.0"]),
        (lambda: Direct(rtol=-1e-3), ["Direct", "rtol=-0.001"]),
        (lambda: Auto(rtol=float("nan")), ["Auto", "rtol=nan"]),
        (lambda: GMRES(restart=0), ["GMRES", "restart=0"]),
        (lambda: MINRES(max_iterations=0), ["MINRES", "max_iterations=0"]),
        (lambda: NormalCG(rtol=0.0), ["NormalCG", "rtol=0.0"]),
        (lambda: Neumann(alpha=0.0), ["Neumann", "alpha=0.0"]),
        (lambda: Neumann(terms=0), ["Neumann", "terms=0"]),
        (lambda: LeastSquares(rank_tolerance=-1.0), ["LeastSquares", "rank_tolerance=-1.0"]),
        (
            lambda: Operator(
                lambda v: v,
                True,
                scaling=SymmetricScaling(lambda v: v, lambda v: v),
                preconditioner=lambda v: v,
            ),
            ["scaling", "preconditioner"],
        ),
        (
            lambda: solve(Operator(lambda v: v, preconditioner=lambda v: v[:2]), jnp.ones(3)),
            ["preconditioner", "(2,)"],
        ),
        (
            lambda: BiCGSTAB(max_iterations=2.5),  # pyright: ignore
            ["BiCGSTAB", "max_iterations=2.5"],
        ),
        (
            lambda: Operator(jnp.sin, symmetric=True, left_project=jnp.cos),
            ["left_project", "symmetric"],
        ),
        (lambda: solve(Operator(lambda v: v), jnp.ones(3), CG()), ["CG", "positive_semidefinite"]),
        (lambda: solve(Operator(lambda v: v), jnp.ones(3), MINRES()), ["MINRES", "symmetric"]),
        (lambda: solve(Operator(lambda v: v[:2]), jnp.ones(3)), ["(2,)", "(3,)"]),
        (lambda: solve(Operator(lambda v: (v, v)), jnp.ones(3)), ["tree", "right-hand side"]),
        (lambda: solve(Operator(lambda v: v), jnp.arange(3)), ["int", "floating-point"]),
        (
            lambda: solve(
                Operator(lambda v: v), (jnp.ones(3, jnp.float32), jnp.ones(2, jnp.float64))
            ),
            ["float32 and float64", "one precision"],
        ),
    ],
)
def test_bad_input_is_named(make: Any, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        make()
    for word in words:
        assert word in str(error.value)


def test_positive_semidefinite_implies_symmetric() -> None:
    assert Operator(lambda v: v, positive_semidefinite=True).symmetric


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of the CPU alone")
def test_factorizations_of_a_batch_are_one_by_one_on_a_cpu():
    """Two batched ones at the same time wait for each other
    for ever on two cores, in jaxlib 0.10.1.
    """
    matrices = jnp.stack([jnp.diag(jnp.arange(1.0, 6.0) + k) for k in range(7)])

    def solved(matrix: Array) -> Array:
        operator = Operator(lambda v: matrix @ v, symmetric=True, positive_semidefinite=True)
        return solve(operator, jnp.ones(5), Direct())[0]

    batch = jax.jit(jax.vmap(solved))
    lines = [
        line
        for line in batch.lower(matrices).as_text().splitlines()
        if "potrf" in line or "cholesky" in line
    ]
    assert lines and not any("tensor<7x5x5" in line for line in lines)
    np.testing.assert_allclose(
        batch(matrices), 1 / (jnp.arange(1.0, 6.0) + jnp.arange(7.0)[:, None]), rtol=1e-14
    )


# ── scaled ──


@pytest.mark.parametrize(
    "method", [CG(), MINRES(), BiCGSTAB(), GMRES(), CG(degree=10), GMRES(degree=1)]
)
def test_a_change_of_unknowns_is_left_without_a_trace(method):
    """A graph's Laplacian with weights over four decades;
    its null space is not that of the scaled one.
    """
    rng = np.random.default_rng(0)
    n = 120
    weights = np.triu(
        np.where(rng.random((n, n)) < 0.1, 10.0 ** rng.uniform(-2, 2, (n, n)), 0.0), 1
    )
    weights += np.diag(np.ones(n - 1), 1)
    A = jnp.asarray(np.diag((weights + weights.T).sum(axis=0)) - weights - weights.T)
    s = 1.0 / jnp.sqrt(jnp.diagonal(A))
    b = jnp.asarray(rng.standard_normal(n))

    def found(scaling):
        def off_mean(v):
            return v - jnp.mean(v)

        plain = Operator(
            lambda v: A @ v, positive_semidefinite=True, project=off_mean, scaling=scaling
        )
        return jax.jit(lambda b: solve(plain, b, method))(b)

    scaling = SymmetricScaling(
        lambda v: {"of its own": (s * v)[::-1]},
        lambda w: {"of its own": (s * (A @ (s * w["of its own"][::-1])))[::-1]},
    )
    x, stats = found(scaling)
    want = np.linalg.pinv(A, hermitian=True) @ b
    assert Result(int(stats.status)) in (Result.CONVERGED, Result.NULL_COMPONENT_DROPPED)
    assert np.linalg.norm(x - want) <= 1e-7 * np.linalg.norm(want)
    rest = (b - b.mean()) - A @ x
    assert float(stats.residual) == pytest.approx(
        np.linalg.norm(rest) / np.linalg.norm(b - b.mean()), abs=1e-13
    )
    assert int(stats.iterations) <= int(found(None)[1].iterations)
    assert abs(np.mean(x)) < 1e-12 * np.abs(x).max()


def test_a_change_of_unknowns_does_not_hide_negative_curvature():
    A = jnp.diag(jnp.linspace(-1.0, 5.0, 50))
    s = 1.0 / jnp.sqrt(jnp.abs(jnp.diagonal(A)))
    scaling = SymmetricScaling(lambda v: s * v, lambda w: s * (A @ (s * w)))
    for method in (CG(), MINRES(), GMRES(), GMRES(degree=1)):
        stats = solve(
            Operator(lambda v: A @ v, positive_semidefinite=True, scaling=scaling),
            jnp.ones(50),
            method,
        )[1]
        assert Result(int(stats.status)) is Result.INDEFINITE


def test_a_change_of_unknowns_needs_a_symmetric_operator():
    with pytest.raises(InputError, match="declare it symmetric"):
        Operator(lambda v: v, scaling=SymmetricScaling(lambda v: v, lambda w: w))


def test_derivatives_pass_through_a_change_of_unknowns():
    A = jnp.diag(jnp.linspace(1.0, 50.0, 20)) + 0.1

    def answer(p, scaled):
        matrix = p * A
        s = 1.0 / jnp.sqrt(jnp.diagonal(matrix))
        scaling = (
            SymmetricScaling(lambda v: s * v, lambda w: s * (matrix @ (s * w))) if scaled else None
        )
        operator = Operator(lambda v: matrix @ v, positive_semidefinite=True, scaling=scaling)
        return linear_solve(operator, jnp.ones(20), CG(rtol=1e-12))[0]

    for derivative in (jax.jacfwd, jax.jacrev):
        found, want = (jax.jit(derivative(lambda p, e=e: answer(p, e)))(2.0) for e in (True, False))
        np.testing.assert_allclose(found, want, rtol=1e-9)
        np.testing.assert_allclose(found, -0.5 * np.asarray(answer(2.0, False)), rtol=1e-9)


# ── singular in directions that nobody declared ──

RANK = SIZE - 4
_U, _ = np.linalg.qr(np.random.default_rng(20).normal(size=(SIZE, SIZE)))
_V, _ = np.linalg.qr(np.random.default_rng(21).normal(size=(SIZE, SIZE)))
_S = np.where(np.arange(SIZE) < RANK, np.geomspace(1, 0.03, SIZE), 0.0)
DEFICIENT = (_U * _S) @ _V.T
PSEUDO_INVERSE = np.linalg.pinv(DEFICIENT, rcond=1e-12)
OUTSIDE = np.random.default_rng(22).normal(size=SIZE)
WITHIN = DEFICIENT @ OUTSIDE


def alone(matrix: np.ndarray, b: np.ndarray, method: Method, kind: str = "two null spaces") -> Any:
    """Nothing declared of the null space."""
    eye = np.eye(SIZE, dtype=matrix.dtype)
    x, stats = solve_dense(matrix, b, eye, eye, kind, method)
    return np.asarray(x), Result(int(stats.status)), stats


@pytest.mark.parametrize("method", [NormalCG(), LeastSquares()], ids=lambda m: type(m).__name__)
def test_least_squares_of_a_singular_operator(method: Method) -> None:
    x, status, stats = alone(DEFICIENT, WITHIN, method)
    assert status == (Result.NOT_UNIQUE if isinstance(method, LeastSquares) else Result.CONVERGED)
    assert status.good and status.warning == isinstance(method, LeastSquares)
    assert float(stats.residual) <= 1e-10
    np.testing.assert_allclose(x, PSEUDO_INVERSE @ WITHIN, atol=1e-8)
    np.testing.assert_allclose(_V[:, RANK:].T @ x, 0, atol=1e-13)  # the shortest

    x, status, stats = alone(DEFICIENT, OUTSIDE, method)
    assert status == Result.SINGULAR and not status.good
    np.testing.assert_allclose(x, PSEUDO_INVERSE @ OUTSIDE, atol=1e-8 * float(np.linalg.norm(x)))
    least = np.linalg.norm(_U[:, RANK:].T @ OUTSIDE) / np.linalg.norm(OUTSIDE)
    assert float(stats.residual) == pytest.approx(least, rel=1e-12)

    bs = np.stack([WITHIN, OUTSIDE, np.zeros(SIZE), _U[:, -1]])  # the last is outside as a whole
    eye = np.eye(SIZE)
    batched = jax.vmap(lambda b: solve_dense(DEFICIENT, b, eye, eye, "two null spaces", method))
    xs, stats = batched(bs)
    np.testing.assert_allclose(xs, bs @ PSEUDO_INVERSE.T, atol=1e-7)
    free = Result.NOT_UNIQUE if isinstance(method, LeastSquares) else Result.CONVERGED
    codes = [Result(int(code)) for code in stats.status]
    assert codes[:2] == [free, Result.SINGULAR] and codes[2].good and codes[3] == Result.SINGULAR
    assert np.all(np.asarray(xs[2]) == 0) and float(stats.residual[2]) == 0


@pytest.mark.parametrize("method", [NormalCG(), LeastSquares()], ids=lambda m: type(m).__name__)
def test_least_squares_in_single_precision(method: Method) -> None:
    single = DEFICIENT.astype(np.float32)
    x, status, _ = alone(single, OUTSIDE.astype(np.float32), method)
    assert x.dtype == np.float32 and status == Result.SINGULAR
    np.testing.assert_allclose(x, PSEUDO_INVERSE @ OUTSIDE, atol=2e-4 * float(np.linalg.norm(x)))
    x, status, _ = alone(single, WITHIN.astype(np.float32), method)
    assert status == (
        Result.NOT_UNIQUE if isinstance(method, LeastSquares) else Result.ROUND_OFF_LIMITED
    )
    np.testing.assert_allclose(x, PSEUDO_INVERSE @ WITHIN, atol=1e-4 * float(np.linalg.norm(x)))


def test_direct_tells_where_it_takes_singular_values() -> None:
    """Left and right null space given apart, here as none."""
    for b, expected in ((WITHIN, Result.NOT_UNIQUE), (OUTSIDE, Result.SINGULAR)):
        x, status, _ = alone(DEFICIENT, b, Direct())
        assert status == expected
        np.testing.assert_allclose(x, PSEUDO_INVERSE @ b, atol=1e-11 * float(np.linalg.norm(x)))


def test_least_squares_declared_symmetric() -> None:
    """By eigenvalues, of either sign; a negative one is no minimum's, however near to zero."""
    values = np.where(np.arange(SIZE) < 3, 0.0, np.linspace(-1, 1, SIZE))
    matrix, _ = spectral(values, 8)
    inside, outside = matrix @ OUTSIDE, OUTSIDE
    want = np.linalg.pinv(matrix, rcond=1e-12, hermitian=True)
    for b, expected in ((inside, Result.NOT_UNIQUE), (outside, Result.SINGULAR)):
        x, status, _ = alone(matrix, b, LeastSquares(), "symmetric")
        assert status == expected
        np.testing.assert_allclose(x, want @ b, atol=1e-11 * float(np.linalg.norm(x)))
    saddle, _ = spectral(np.linspace(0.1, 1, SIZE) - 0.1 - 1e-8, 5)
    assert alone(saddle, OUTSIDE, LeastSquares(), "positive")[1] == Result.INDEFINITE
    assert (
        alone(spectral(np.linspace(-0.5, 1, SIZE), 5)[0], OUTSIDE, NormalCG(), "positive")[1]
        == Result.INDEFINITE
    )


def test_rank_tolerance_decides_what_is_zero() -> None:
    matrix = (_U * np.where(np.arange(SIZE) < RANK, 1.0, 1e-7)) @ _V.T
    b = matrix @ OUTSIDE
    x, status, _ = alone(matrix, b, LeastSquares(rtol=1e-9))
    assert status == Result.CONVERGED
    np.testing.assert_allclose(x, OUTSIDE, atol=1e-7)
    x, status, _ = alone(matrix, b, LeastSquares(rtol=1e-6, rank_tolerance=1e-6))
    assert status == Result.NOT_UNIQUE
    np.testing.assert_allclose(x, _V[:, :RANK] @ (_V[:, :RANK].T @ OUTSIDE), atol=1e-12)


# ── Neumann's series ──

_C = np.random.default_rng(30).normal(size=(SIZE, SIZE))
CONTRACTION = 0.5 * _C / np.linalg.norm(_C, 2)
LONG = Neumann()


def test_neumann_on_a_contraction() -> None:
    matrix = np.eye(SIZE) - CONTRACTION
    x, status, stats = alone(matrix, OUTSIDE, LONG)
    assert status == Result.CONVERGED and float(stats.residual) <= 1e-10
    np.testing.assert_allclose(x, np.linalg.solve(matrix, OUTSIDE), atol=1e-9)
    assert int(stats.iterations) <= 36  # the rest falls by a half a term, or faster
    with_null = np.eye(SIZE)
    with_null[0, 0] = 0.0  # what lies along the first stands, whatever the number of terms
    x, status, stats = alone(with_null, OUTSIDE, LONG)
    assert status == Result.STAGNATED and int(stats.iterations) < 100
    x, status, stats = alone(np.eye(SIZE) + 3 * _C / np.linalg.norm(_C, 2), OUTSIDE, LONG)
    assert status == Result.STAGNATED and np.all(np.isfinite(x)) and int(stats.iterations) < 100
    assert alone(np.eye(SIZE) * 1e30, OUTSIDE, LONG)[1] == Result.STAGNATED


@pytest.mark.parametrize("terms", [1, 5])
def test_neumann_cut_off_says_so(terms: int) -> None:
    matrix = np.eye(SIZE) - CONTRACTION
    x, status, stats = alone(matrix, OUTSIDE, Neumann(terms=terms))
    powers = [np.linalg.matrix_power(CONTRACTION, k) for k in range(terms + 1)]
    np.testing.assert_allclose(x, sum(powers[:terms]) @ OUTSIDE, rtol=1e-13, atol=1e-13)
    assert status == Result.MAX_STEPS_REACHED
    want = np.linalg.norm(powers[terms] @ OUTSIDE) / np.linalg.norm(OUTSIDE)
    assert float(stats.residual) == pytest.approx(want, rel=1e-10)
    error = np.linalg.norm(x - np.linalg.solve(matrix, OUTSIDE))
    assert error <= 0.5**terms / (1 - 0.5) * np.linalg.norm(OUTSIDE)
    # worse than no answer
    assert alone(-2 * np.eye(SIZE), OUTSIDE, Neumann(terms=terms))[1] == Result.STAGNATED
    assert alone(np.eye(SIZE), OUTSIDE, Neumann(terms=terms))[1] == Result.CONVERGED


def test_neumann_with_a_step() -> None:
    """Eigenvalues from 1 to 10: the step of one grows, that of 2 / 11 falls fastest."""
    matrix, _ = spectral(np.linspace(1, 10, SIZE), 3)
    assert alone(matrix, OUTSIDE, LONG)[1] == Result.STAGNATED
    x, status, stats = alone(matrix, OUTSIDE, Neumann(alpha=2 / 11))
    assert status == Result.CONVERGED
    assert int(stats.iterations) <= 1 + np.ceil(np.log(1e10) / np.log(11 / 9))
    np.testing.assert_allclose(x, np.linalg.solve(matrix, OUTSIDE), atol=1e-9)


# ── preconditioned ──

WIDE = 60
_rng = np.random.default_rng(40)
DIAGONAL = np.geomspace(1, 1e3, WIDE)
_LOW, _RANK = 0.7 * _rng.normal(size=(2, WIDE, 3))
ILL = {"positive": np.diag(DIAGONAL) + _LOW @ _LOW.T, "general": np.diag(DIAGONAL) + _LOW @ _RANK.T}
_SHEAR = np.triu(0.02 * _rng.normal(size=(WIDE, WIDE)), 1)
# Rough inverses: symmetric for the symmetric operator, unsymmetric for the other,
# so that its transpose matters.
ROUGH = {
    "positive": np.diag(1 / DIAGONAL),
    "general": np.diag(1 / DIAGONAL) @ (np.eye(WIDE) + _SHEAR),
}
FORCE, FIELD = _rng.normal(size=(2, WIDE))


@functools.partial(jax.jit, static_argnums=(1, 2))
def preconditioned(rough: Any, kind: str, method: Method) -> Any:
    """The answer and its evidence, and the answer's derivatives forward and back;
    ``rough`` may be left out.
    """
    matrix = jnp.asarray(ILL[kind])
    by = None if rough is None else (lambda v: {"v": rough @ v["v"]})

    def answer(b: Array) -> tuple[Array, SolveStats]:
        plain = Operator(
            lambda v: {"v": matrix @ v["v"]},
            positive_semidefinite=kind == "positive",
            preconditioner=by,
        )
        x, stats = linear_solve(plain, {"v": b}, method)
        return x["v"], stats

    x, pull, stats = jax.vjp(answer, jnp.asarray(FORCE), has_aux=True)
    return x, pull(jnp.asarray(FIELD))[0], stats


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("positive", CG(rtol=1e-13)),
        ("positive", MINRES(rtol=1e-13)),
        ("general", GMRES(rtol=1e-13)),
        ("general", BiCGSTAB(rtol=1e-13)),
    ],
)
def test_a_preconditioner_changes_the_iterations_alone(kind: str, method: Method) -> None:
    plain, rough = preconditioned(None, kind, method), preconditioned(ROUGH[kind], kind, method)
    for x, back, stats in (plain, rough):
        assert Result(int(stats.status)).good
        rest = np.linalg.norm(FORCE - ILL[kind] @ np.asarray(x)) / np.linalg.norm(FORCE)
        assert float(stats.residual) == pytest.approx(rest, abs=1e-14)
        want = np.linalg.solve(ILL[kind], FORCE)
        np.testing.assert_allclose(x, want, rtol=0, atol=1e-10 * float(np.linalg.norm(want)))
        want = np.linalg.solve(ILL[kind].T, FIELD)
        np.testing.assert_allclose(back, want, rtol=0, atol=1e-10 * float(np.linalg.norm(want)))
    assert 2 * int(rough[-1].iterations) < int(plain[-1].iterations)


def test_the_transposed_system_has_the_transposed_preconditioner() -> None:
    """The inverse itself leaves one step to either, and its transpose would leave them all."""
    inverse, method = np.linalg.inv(ILL["general"]), BiCGSTAB(max_iterations=4)
    x, back, stats = preconditioned(inverse, "general", method)
    assert Result(int(stats.status)) == Result.CONVERGED
    np.testing.assert_allclose(back, inverse.T @ FIELD, atol=1e-9)
    assert (
        Result(int(preconditioned(inverse.T, "general", method)[-1].status))
        == Result.MAX_STEPS_REACHED
    )
    matrix = jnp.asarray(ILL["general"])
    known = Operator(lambda v: matrix @ v, preconditioner=lambda v: inverse @ v).transpose(
        jnp.zeros(WIDE)
    )
    x, stats = jax.jit(lambda b: solve(known, b, method))(jnp.asarray(FIELD))
    assert Result(int(stats.status)) == Result.CONVERGED
    np.testing.assert_allclose(x, inverse.T @ FIELD, atol=1e-9)


@pytest.mark.parametrize(
    "method", [CG(rtol=1e-13), MINRES(rtol=1e-13)], ids=lambda m: type(m).__name__
)
def test_a_preconditioner_that_is_not_positive_definite(method: Method) -> None:
    for signs in (np.where(np.arange(WIDE) % 2, -1.0, 1.0), -np.ones(WIDE)):
        x, _, stats = preconditioned(ROUGH["positive"] * signs, "positive", method)
        assert Result(int(stats.status)) == Result.BREAKDOWN
        assert np.all(np.isfinite(x)) and float(stats.residual) > 1e-10


def test_a_preconditioner_beside_a_null_space_and_negative_curvature() -> None:
    """The springs of a ring of uneven stiffness;
    its preconditioner knows nothing of the null space.
    """
    stiffness = np.geomspace(1, 1e3, SIZE)
    first = np.eye(SIZE) - np.roll(np.eye(SIZE), 1, axis=0)
    laplacian = first.T @ (stiffness[:, None] * first)
    want = np.linalg.pinv(laplacian, rcond=1e-12, hermitian=True) @ OUTSIDE
    rough = jnp.asarray(1 / np.diagonal(laplacian))

    @functools.partial(jax.jit, static_argnums=1)
    def found(matrix: Any, method: Method) -> tuple[Array, SolveStats]:
        known = Operator(
            lambda v: matrix @ v,
            positive_semidefinite=True,
            project=lambda v: v - jnp.mean(v),
            preconditioner=lambda v: rough * v,
        )
        return solve(known, jnp.asarray(OUTSIDE), method)

    saddle = laplacian - 20.0 * (np.eye(SIZE) - 1 / SIZE)
    for method in (CG(), MINRES(), BiCGSTAB(), GMRES()):
        x, stats = found(laplacian, method)
        assert Result(int(stats.status)) == Result.NULL_COMPONENT_DROPPED
        np.testing.assert_allclose(x, want, atol=1e-7 * float(np.linalg.norm(want)))
        assert abs(float(jnp.mean(x))) < 1e-14
        assert Result(int(found(saddle, method)[1].status)) == Result.INDEFINITE


# ── the derivatives of the other methods ──


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


def test_preconditioned_minres_knows_its_residual() -> None:
    """It minimizes another norm;
    it ends with the first step whose residual itself is under the tolerance.
    """
    matrix, rough = (
        jnp.asarray(ILL["positive"]),
        jnp.asarray((2 + np.sin(np.arange(WIDE))) / DIAGONAL),
    )
    b = jnp.asarray(FORCE / np.linalg.norm(FORCE))

    @jax.jit
    def ended(tol: Any, limit: Any) -> tuple[Array, Array]:
        x, k, _ = minres(lambda v: matrix @ v, b, tol, limit, False, lambda r: rough * r)
        return jnp.linalg.norm(b - matrix @ x), k

    for steps in range(1, 6):
        residual = float(ended(0.0, steps)[0])
        assert int(ended((1 + 1e-9) * residual, 100)[1]) == steps
        assert int(ended((1 - 1e-9) * residual, 100)[1]) == steps + 1
