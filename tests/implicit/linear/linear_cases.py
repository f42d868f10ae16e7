"""Operators, methods and right-hand sides that the tests of linear solves share."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from problems import SIZE, LinearProblem, linear_problems

from mdsens.implicit import (
    CG,
    GMRES,
    MINRES,
    BiCGSTAB,
    Direct,
    Method,
    Neumann,
    NormalCG,
    Operator,
    Result,
    SolveStats,
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


RANK = SIZE - 4


_U, _ = np.linalg.qr(np.random.default_rng(20).normal(size=(SIZE, SIZE)))


_V, _ = np.linalg.qr(np.random.default_rng(21).normal(size=(SIZE, SIZE)))


_S = np.where(np.arange(SIZE) < RANK, np.geomspace(1, 0.03, SIZE), 0.0)


DEFICIENT = (_U * _S) @ _V.T


OUTSIDE = np.random.default_rng(22).normal(size=SIZE)


def alone(matrix: np.ndarray, b: np.ndarray, method: Method, kind: str = "two null spaces") -> Any:
    """Nothing declared of the null space."""
    eye = np.eye(SIZE, dtype=matrix.dtype)
    x, stats = solve_dense(matrix, b, eye, eye, kind, method)
    return np.asarray(x), Result(int(stats.status)), stats


_C = np.random.default_rng(30).normal(size=(SIZE, SIZE))


CONTRACTION = 0.5 * _C / np.linalg.norm(_C, 2)
