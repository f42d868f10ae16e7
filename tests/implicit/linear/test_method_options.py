"""Choice and options of a method, and bad input."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from mdsens.implicit import (
    CG,
    GMRES,
    MINRES,
    Auto,
    BiCGSTAB,
    Direct,
    InputError,
    LeastSquares,
    Neumann,
    NormalCG,
    Operator,
    SymmetricScaling,
    choose,
    solve,
)


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
