"""Linear solves against dense answers: exact, singular, not finite, cut off, indefinite."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_cases import BY_NAME, METHODS, PROBLEMS, run, solve_dense
from problems import SIZE, LinearProblem, spectral

from mdsens.implicit import (
    CG,
    GMRES,
    MINRES,
    BiCGSTAB,
    Direct,
    LeastSquares,
    Method,
    NormalCG,
    Result,
)


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
