"""Solves in scaled unknowns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdsens.implicit import (
    CG,
    GMRES,
    MINRES,
    BiCGSTAB,
    InputError,
    Operator,
    Result,
    SymmetricScaling,
    linear_solve,
    solve,
)
from mdsens.implicit.linear.vectors import norm


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
    with pytest.raises(InputError, match="set symmetric=True"):
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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_numbers_next_to_the_largest_float_are_no_zeros(dtype) -> None:
    """1 / m is no normal number there: divided by m, such a vector was zero, and so its norm."""
    top = float(jnp.finfo(dtype).max)
    v = jnp.asarray([0.6 * top, 0.2 * top, 0.3 * top], dtype)
    assert float(jax.jit(norm)(v) / top) == pytest.approx(0.7, rel=1e-6)
    twice = Operator(lambda x: 2.0 * x, symmetric=True, positive_semidefinite=True)
    x, stats = solve(twice, v, CG())
    assert Result(int(stats.status)).good
    np.testing.assert_allclose(x / v, 0.5, rtol=1e-6)
