"""The peers' side: the energy as a user without mdsens would write it,
and other packages' solvers of H x = b.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mdsens as ms
from benchmarks._common import length_of

Solver = Callable[[Any, jax.Array], tuple[jax.Array, Any]]


def energy_of(system: ms.System) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The energy of harmonic particles, U(R, sigma), over the pairs that are near here."""
    i, j = (np.asarray(side) for side in system.neighbors.pairs[:2])
    i, j = (jnp.asarray(side[i < system.n]) for side in (i, j))
    kinds = jnp.arange(system.n) if system.species is None else jnp.asarray(system.species)
    length = length_of(system)

    def energy(R: jax.Array, sigma: jax.Array) -> jax.Array:
        apart = R[i] - R[j]
        apart = apart - length * jnp.round(apart / length)
        mean = 0.5 * (sigma[kinds[i]] + sigma[kinds[j]])
        overlap = jnp.maximum(1.0 - jnp.sqrt(jnp.sum(apart**2, axis=1)) / mean, 0.0)
        return 0.5 * jnp.sum(overlap**2)

    return energy


def solvers(rtol: float, limit: int) -> dict[str, Solver]:
    """Name -> solve(A, b), giving x and whether the package says that it solved;
    None where it says nothing.

    Args:
      limit: products with A, of which a step of CG takes one, of BiCGSTAB and of CG on the normal
        equations two.
    """
    scipy, cycles = jax.scipy.sparse.linalg, max(1, limit // 30)

    def gmres(A: Any, b: jax.Array) -> tuple[jax.Array, Any]:
        x, info = scipy.gmres(
            A, b, tol=rtol, restart=30, maxiter=cycles, solve_method="incremental"
        )
        return x, info == 0

    found: dict[str, Solver] = {
        "jax.scipy cg": lambda A, b: (scipy.cg(A, b, tol=rtol, maxiter=limit)[0], None),
        "jax.scipy bicgstab": lambda A, b: (
            scipy.bicgstab(A, b, tol=rtol, maxiter=limit // 2)[0],
            None,
        ),
        "jax.scipy gmres(30)": gmres,
    }
    if importlib.util.find_spec("lineax"):
        import lineax as lx

        def by_lineax(solver: Any) -> Solver:
            def solve(A: Any, b: jax.Array) -> tuple[jax.Array, Any]:
                operator = lx.FunctionLinearOperator(
                    A, jax.eval_shape(lambda: b), lx.positive_semidefinite_tag
                )
                size = jnp.linalg.norm(b)
                answer = lx.linear_solve(operator, b / size, solver, throw=False)
                return size * answer.value, answer.result == lx.RESULTS.successful

            return solve

        # its tolerance is one of each component:
        # with atol = 0 a component of b that is zero is never reached
        same: dict[str, Any] = {"rtol": rtol, "atol": rtol, "norm": jnp.linalg.norm}
        found["lineax CG"] = by_lineax(lx.CG(**same, max_steps=limit))
        # of these cycles the first is none
        found["lineax GMRES(30)"] = by_lineax(lx.GMRES(**same, restart=30, max_steps=cycles + 1))
    if importlib.util.find_spec("jaxopt"):
        from jaxopt import linear_solve

        def by_jaxopt(solver: Any) -> Solver:
            return lambda A, b: (solver(A, b, tol=rtol, maxiter=limit // 2), None)

        found["jaxopt BiCGSTAB (the paper's)"] = by_jaxopt(linear_solve.solve_bicgstab)
        found["jaxopt normal CG (its default)"] = by_jaxopt(linear_solve.solve_normal_cg)
    return found
