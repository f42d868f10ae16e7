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
    Evening,
    InputError,
    Method,
    Operator,
    SolveStats,
    Status,
    choose,
    linear_solve,
    solve,
)

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
def solve_dense(matrix: Any, b: Any, right: Any, left: Any, kind: str, method: Method) -> tuple[Array, SolveStats]:
    return solve(operator(matrix, right, left, kind), b, method)


def run(problem: LinearProblem, method: Method, b: np.ndarray | None = None) -> tuple[Any, Status, SolveStats]:
    right, left = problem.projectors()
    # Whether it is symmetric these two do not ask, and compile once under the widest.
    free = isinstance(method, GMRES | BiCGSTAB) and problem.kind != "positive"
    kind = "two null spaces" if free else problem.kind
    x, stats = solve_dense(problem.matrix, problem.b if b is None else b, right, left, kind, method)
    return np.asarray(x), Status(int(stats.status)), stats


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
    for method in METHODS
    # BiCGSTAB breaks down on the shift, which has its own test.
    if fits(method, problem.kind) and not (problem.name == "cyclic shift" and isinstance(method, BiCGSTAB))
]


@pytest.mark.parametrize(("problem", "method"), CASES)
def test_answer_is_the_pseudo_inverse(problem: LinearProblem, method: Method) -> None:
    x, status, stats = run(problem, method)
    singular = problem.right.shape[1] > 0
    assert status == (Status.NULL_COMPONENT_DROPPED if singular else Status.CONVERGED)
    assert stats.residual <= 1e-10
    assert stats.residual == pytest.approx(true_residual(problem, x), rel=1e-3, abs=1e-14)
    # The residual is bounded by 1e-10, so the error by the condition number (1e3 at most) times that.
    np.testing.assert_allclose(x, problem.answer(), rtol=0, atol=1e-7 * float(np.linalg.norm(problem.answer())))
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
    assert status == Status.CONVERGED
    np.testing.assert_allclose(x, x0 - x0.mean(), atol=1e-7)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_right_hand_side_in_the_null_space_has_answer_zero(method: Method) -> None:
    x, status, stats = run(BY_NAME["ring of springs, pushed off balance"], method, np.ones(SIZE))
    assert status == Status.NULL_COMPONENT_DROPPED
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
        assert status == Status.STAGNATED


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_wrong_projector_is_never_good(method: Method) -> None:
    problem = BY_NAME["positive definite"]
    _, status, _ = run(LinearProblem("wrong", "positive", problem.matrix, problem.b, np.eye(SIZE)[:, :2]), method)
    assert not status.good


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_zero_right_hand_side(method: Method) -> None:
    x, status, stats = run(BY_NAME["positive definite"], method, np.zeros(SIZE))
    assert status == Status.CONVERGED
    assert np.all(x == 0)
    assert float(stats.residual) == 0


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_right_hand_side(method: Method, bad: float) -> None:
    problem = BY_NAME["positive definite"]
    x, status, _ = run(problem, method, np.where(np.arange(SIZE) == 3, bad, problem.b))
    assert status == Status.NOT_FINITE
    assert np.all(x == 0)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_not_finite_operator(method: Method) -> None:
    problem = BY_NAME["positive definite"]
    matrix = problem.matrix.copy()
    matrix[3, 3] = np.nan
    x, status, _ = run(LinearProblem("nan", "positive", matrix, problem.b), method)
    assert status == Status.NOT_FINITE
    assert np.all(x == 0)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("scale", [1e-250, 1e250])
def test_scale_of_the_right_hand_side_does_not_matter(method: Method, scale: float) -> None:
    problem = BY_NAME["positive definite"]
    x, status, _ = run(problem, method, problem.b * scale)
    expected, _, _ = run(problem, method)
    assert status == Status.CONVERGED
    np.testing.assert_allclose(x / scale, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "method", [GMRES(max_iterations=5), CG(max_iterations=5), MINRES(max_iterations=5), BiCGSTAB(max_iterations=6)]
)
def test_early_stop_is_admitted(method: Method) -> None:
    problem = BY_NAME["positive definite"]
    x, status, stats = run(problem, method)
    assert status == Status.MAX_STEPS_REACHED
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
    assert status == Status.STAGNATED
    assert float(stats.residual) == pytest.approx(1)
    x, status, _ = run(problem, GMRES())
    assert status == Status.CONVERGED
    np.testing.assert_allclose(x, np.eye(SIZE)[-1], atol=1e-12)


def test_bicgstab_breaks_down_on_a_skew_operator() -> None:
    g = np.random.default_rng(0).normal(size=(SIZE, SIZE))
    problem = LinearProblem("skew", "general", g - g.T, np.ones(SIZE))
    assert run(problem, BiCGSTAB())[1] == Status.BREAKDOWN
    assert run(problem, GMRES())[1] == Status.CONVERGED


@pytest.mark.parametrize("method", [CG(), Direct(), MINRES(), GMRES(), BiCGSTAB()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("lowest", [-0.5, -1e-4, -1e-8])
def test_negative_curvature_is_seen(method: Method, lowest: float) -> None:
    values = np.linspace(0.1, 1, SIZE)
    values[0], values[1] = lowest, 0.0
    matrix, q = spectral(values, 5)
    b = np.random.default_rng(1).normal(size=SIZE)
    _, status, _ = run(LinearProblem("saddle", "positive", matrix, b, q[:, 1:2]), method)
    assert status == Status.INDEFINITE


def test_restart_shorter_than_the_problem_still_converges() -> None:
    problem = BY_NAME["unsymmetric"]
    x, status, stats = run(problem, GMRES(restart=6))
    assert status == Status.CONVERGED
    assert stats.iterations > 6
    np.testing.assert_allclose(x, problem.answer(), atol=1e-9)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_single_precision_says_where_it_ends(method: Method) -> None:
    matrix, _ = spectral(np.geomspace(0.05, 1, SIZE), 9)
    b = np.ones(SIZE, np.float32)
    eye = np.eye(SIZE, dtype=np.float32)
    x, stats = solve_dense(matrix.astype(np.float32), b, eye, eye, "positive", method)
    assert x.dtype == jnp.float32
    assert Status(int(stats.status)) == Status.ROUND_OFF_LIMITED  # 1e-10 is out of float32's reach
    assert 1e-10 < stats.residual < 1e-5
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=0, atol=2e-5 * np.abs(x).max())


RANDOM = [GMRES(rtol=1e-9), CG(rtol=1e-9), MINRES(rtol=1e-9), BiCGSTAB(rtol=1e-9), Direct(rtol=1e-9)]


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
    residual = np.linalg.norm(kept - np.einsum("mij,mj->mi", a, x), axis=1) / np.linalg.norm(kept, axis=1)
    # Two evaluations of one residual differ by the round-off of A x.
    size = np.linalg.norm(a, 2, axis=(1, 2)) * np.linalg.norm(x, axis=1) / np.linalg.norm(kept, axis=1) + 1
    round_off = 4 * np.finfo(float).eps * size
    assert np.all(np.abs(stats.residual - residual) <= round_off)
    statuses = [Status(int(s)) for s in stats.status]
    good = [i for i, s in enumerate(statuses) if s.good]
    assert 5 <= len(good) < count  # both outcomes are there, or this proves nothing
    for i in good:
        if statuses[i] == Status.ROUND_OFF_LIMITED:
            assert residual[i] <= 20 * np.finfo(float).eps * size[i]
        else:
            assert residual[i] <= 1e-9 + round_off[i]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_batch_equals_loop(method: Method) -> None:
    """Members that need 0, 1, few and many steps side by side: none disturbs another."""
    if isinstance(method, GMRES):
        method = GMRES(rtol=method.rtol, degree=1)  # alone it is told that the operator is positive definite
    problem = BY_NAME["positive definite"]
    _, q = spectral(np.geomspace(1e-3, 1, SIZE), 0)
    bs = np.stack([np.zeros(SIZE), q[:, 4], q[:, 2] - q[:, 9], problem.b, np.full(SIZE, np.nan)])
    eye = np.eye(SIZE)
    kind = "two null spaces" if isinstance(method, GMRES | BiCGSTAB) else "positive"
    batched = jax.vmap(lambda b: solve_dense(problem.matrix, b, eye, eye, kind, method))
    nested = isinstance(method, GMRES)  # whose loop condition is shared by hand, at every level of vmap
    x, stats = jax.tree.map(lambda leaf: leaf[0], jax.vmap(batched)(bs[None])) if nested else batched(bs)
    for i, b in enumerate(bs):
        alone, status, single = run(problem, method, b)
        assert Status(int(stats.status[i])) == status
        # Two answers within rtol of one system of condition number 1e3.
        np.testing.assert_allclose(x[i], alone, rtol=0, atol=2e-7 * max(1.0, float(np.linalg.norm(alone))))
        if not isinstance(method, Direct):  # whose factorisation is shared
            # Compiled for a batch it rounds otherwise, and BiCGSTAB's number of steps hangs on that.
            assert abs(int(stats.iterations[i]) - int(single.iterations)) <= 2 + int(single.iterations) // 10


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
            return linear_solve(operator(jnp.asarray(problem.matrix), right, left, problem.kind), b, method)[0]

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
        return linear_solve(Operator(lambda v: t * v + coupling @ v), b, Direct(rtol=1e-14))[0].sum()

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
    assert Status(int(stats.status)) == Status.CONVERGED


def test_no_unknowns() -> None:
    x, stats = solve(Operator(lambda v: v), jnp.zeros((0, 2)))
    assert x.shape == (0, 2)
    assert Status(int(stats.status)) == Status.CONVERGED


def test_transpose_swaps_the_null_spaces() -> None:
    problem = BY_NAME["left and right null spaces"]
    right, left = problem.projectors()
    transposed = operator(jnp.asarray(problem.matrix), right, left, problem.kind).transpose(jnp.zeros(SIZE))
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
    assert run(problem, CG(rtol=1e-6, max_iterations=99))[2].solver == "CG(degree=1, max_iterations=99, rtol=1e-06)"
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
    assert choose(Auto(), 1_000, of(positive_semidefinite=True), rhs=100) == Direct()
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
        (lambda: BiCGSTAB(max_iterations=2.5), ["BiCGSTAB", "max_iterations=2.5"]),  # pyright: ignore[reportArgumentType]
        (lambda: Operator(jnp.sin, symmetric=True, left_project=jnp.cos), ["left_project", "symmetric"]),
        (lambda: solve(Operator(lambda v: v), jnp.ones(3), CG()), ["CG", "positive_semidefinite"]),
        (lambda: solve(Operator(lambda v: v), jnp.ones(3), MINRES()), ["MINRES", "symmetric"]),
        (lambda: solve(Operator(lambda v: v[:2]), jnp.ones(3)), ["(2,)", "(3,)"]),
        (lambda: solve(Operator(lambda v: (v, v)), jnp.ones(3)), ["tree", "right-hand side"]),
        (lambda: solve(Operator(lambda v: v), jnp.arange(3)), ["int", "floating-point"]),
        (
            lambda: solve(Operator(lambda v: v), (jnp.ones(3, jnp.float32), jnp.ones(2, jnp.float64))),
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


def test_factorisations_of_a_batch_are_one_by_one_on_a_cpu():
    """Two batched ones at the same time wait for each other for ever on two cores, in jaxlib 0.10.1."""
    matrices = jnp.stack([jnp.diag(jnp.arange(1.0, 6.0) + k) for k in range(7)])

    def solved(matrix: Array) -> Array:
        operator = Operator(lambda v: matrix @ v, symmetric=True, positive_semidefinite=True)
        return solve(operator, jnp.ones(5), Direct())[0]

    batch = jax.jit(jax.vmap(solved))
    lines = [line for line in batch.lower(matrices).as_text().splitlines() if "potrf" in line or "cholesky" in line]
    assert lines and not any("tensor<7x5x5" in line for line in lines)
    np.testing.assert_allclose(batch(matrices), 1 / (jnp.arange(1.0, 6.0) + jnp.arange(7.0)[:, None]), rtol=1e-14)


# ── evened out ──


@pytest.mark.parametrize("method", [CG(), MINRES(), BiCGSTAB(), GMRES(), CG(degree=10), GMRES(degree=1)])
def test_a_change_of_unknowns_is_left_without_a_trace(method):
    """A graph's Laplacian with weights over four decades; its null space is not that of the evened one."""
    rng = np.random.default_rng(0)
    n = 120
    weights = np.triu(np.where(rng.random((n, n)) < 0.1, 10.0 ** rng.uniform(-2, 2, (n, n)), 0.0), 1)
    weights += np.diag(np.ones(n - 1), 1)
    A = jnp.asarray(np.diag((weights + weights.T).sum(axis=0)) - weights - weights.T)
    s = 1.0 / jnp.sqrt(jnp.diagonal(A))
    b = jnp.asarray(rng.standard_normal(n))

    def found(even):
        def off_mean(v):
            return v - jnp.mean(v)

        plain = Operator(lambda v: A @ v, positive_semidefinite=True, project=off_mean, even=even)
        return jax.jit(lambda b: solve(plain, b, method))(b)

    even = Evening(
        lambda v: {"of its own": (s * v)[::-1]}, lambda w: {"of its own": (s * (A @ (s * w["of its own"][::-1])))[::-1]}
    )
    x, stats = found(even)
    want = np.linalg.pinv(A, hermitian=True) @ b
    assert Status(int(stats.status)) in (Status.CONVERGED, Status.NULL_COMPONENT_DROPPED)
    assert np.linalg.norm(x - want) <= 1e-7 * np.linalg.norm(want)
    rest = (b - b.mean()) - A @ x
    assert float(stats.residual) == pytest.approx(np.linalg.norm(rest) / np.linalg.norm(b - b.mean()), abs=1e-13)
    assert int(stats.iterations) <= int(found(None)[1].iterations)
    assert abs(np.mean(x)) < 1e-12 * np.abs(x).max()


def test_a_change_of_unknowns_does_not_hide_negative_curvature():
    A = jnp.diag(jnp.linspace(-1.0, 5.0, 50))
    s = 1.0 / jnp.sqrt(jnp.abs(jnp.diagonal(A)))
    even = Evening(lambda v: s * v, lambda w: s * (A @ (s * w)))
    for method in (CG(), MINRES(), GMRES(), GMRES(degree=1)):
        stats = solve(Operator(lambda v: A @ v, positive_semidefinite=True, even=even), jnp.ones(50), method)[1]
        assert Status(int(stats.status)) is Status.INDEFINITE


def test_a_change_of_unknowns_needs_a_symmetric_operator():
    with pytest.raises(InputError, match="declare it symmetric"):
        Operator(lambda v: v, even=Evening(lambda v: v, lambda w: w))


def test_derivatives_pass_through_a_change_of_unknowns():
    A = jnp.diag(jnp.linspace(1.0, 50.0, 20)) + 0.1

    def answer(p, evened):
        matrix = p * A
        s = 1.0 / jnp.sqrt(jnp.diagonal(matrix))
        even = Evening(lambda v: s * v, lambda w: s * (matrix @ (s * w))) if evened else None
        operator = Operator(lambda v: matrix @ v, positive_semidefinite=True, even=even)
        return linear_solve(operator, jnp.ones(20), CG(rtol=1e-12))[0]

    for derivative in (jax.jacfwd, jax.jacrev):
        found, want = (jax.jit(derivative(lambda p, e=e: answer(p, e)))(2.0) for e in (True, False))
        np.testing.assert_allclose(found, want, rtol=1e-9)
        np.testing.assert_allclose(found, -0.5 * np.asarray(answer(2.0, False)), rtol=1e-9)
