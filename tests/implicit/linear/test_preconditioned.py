"""Preconditioned iterations."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from linear_cases import OUTSIDE
from problems import SIZE

from mdsens.implicit import (
    CG,
    GMRES,
    MINRES,
    BiCGSTAB,
    Method,
    Operator,
    Result,
    SolveStats,
    linear_solve,
    solve,
)
from mdsens.implicit.linear.minres import minres

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
