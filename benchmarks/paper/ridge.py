"""How wrong is the Jacobian at a solution that is not exact?
The paper's theorem 1 and figure 3, on ridge regression.

``python -m benchmarks.paper.ridge``

    x*(theta) = argmin_x |A x - y|^2 / 2 + sum_i theta_i x_i^2 / 2
    J = dx*/dtheta = -(A^T A + diag theta)^-1 diag x*

one strength a feature, by k steps of gradient descent. The implicit Jacobian is the theorem's
J(x_k): the linear system at x_k, exact or not. Theorem 1 bounds its error by that of x_k. Here
dF/dx = A^T A + diag theta does not depend on x, and dF/dtheta = diag x has a Lipschitz constant of
1, so that the bound is

    |J(x_k) - J| <= |x_k - x*| / lambda_min(A^T A + diag theta)

Unrolling differentiates the k steps. Truth is the closed form; norms of Jacobians are spectral
ones, the theorem's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from matplotlib.figure import Figure

from benchmarks.paper._common import FOURTH, IMPLICIT, UNROLLED, Row, asked, finish, measured
from mdsens.implicit import Direct, root
from mdsens.implicit.conditions.optimality import stationary

STRENGTH = 0.01
STEPS = (10, 30, 100, 300, 600, 1000, 2000, 3000)


def problem(smoke: bool) -> tuple[Array, Array]:
    """A (m, p) and y (m,): the diabetes data that scikit-learn ships,
    442 patients; or small ones, made here.
    """
    if smoke:
        rng = np.random.default_rng(0)
        A = rng.normal(size=(20, 4)) / np.sqrt(20)
        return jnp.asarray(A), jnp.asarray(A @ rng.normal(size=4) + 0.1 * rng.normal(size=20))
    from sklearn.datasets import load_diabetes

    A, y = (np.asarray(side) for side in load_diabetes(return_X_y=True))
    return jnp.asarray(A), jnp.asarray((y - y.mean()) / y.std())


def loss(x: Array, theta: Array, A: Array, y: Array) -> Array:
    return 0.5 * jnp.sum((A @ x - y) ** 2) + 0.5 * jnp.sum(theta * x**2)


def descent(steps: int) -> Callable[..., Array]:
    """k steps of gradient descent from ``init``,
    each as long as the inverse of the largest curvature.
    """

    def solver(init: Array, theta: Array, A: Array, y: Array) -> Array:
        length = 1.0 / lax.stop_gradient(jnp.linalg.eigvalsh(A.T @ A + jnp.diag(theta))[-1])
        slope = jax.grad(loss)
        return lax.scan(
            lambda x, _: (x - length * slope(x, theta, A, y), None), init, length=steps
        )[0]

    return solver


def rows_of(A: Array, y: Array, counts: Sequence[int], runs: int) -> list[Row]:
    """A row a number of steps: errors of the solution and of each Jacobian,
    the bound, time and memory.
    """
    theta, init = jnp.full(A.shape[1], STRENGTH), jnp.zeros(A.shape[1])
    curved = A.T @ A + jnp.diag(theta)
    exact = jnp.linalg.solve(curved, A.T @ y)
    truth = -jnp.linalg.solve(curved, jnp.diag(exact))
    least = float(jnp.linalg.eigvalsh(curved)[0])
    attach = root(stationary(loss), solve=Direct(), symmetric=True, positive_semidefinite=True)
    rows = []
    for steps in counts:
        solver = descent(steps)
        ways = {
            "implicit": jax.jacfwd(attach(solver), 1),
            "forward": jax.jacfwd(solver, 1),
            "reverse": jax.jacrev(solver, 1),
        }
        away = float(jnp.linalg.norm(jax.jit(solver)(init, theta, A, y) - exact))
        row: Row = {"steps": steps, "solution": away, "bound": away / least}
        cost: Row = {}
        for name, way in ways.items():
            took = measured(way, init, theta, A, y, runs=runs)
            row[name] = float(jnp.linalg.norm(took.answer - truth, 2))
            cost |= {f"{name}_ms": 1e3 * took.seconds, f"{name}_MB": took.MB}
        rows.append({**row, "truth": float(jnp.linalg.norm(truth, 2)), **cost})
    return rows


def figure(record: Row) -> Figure:
    """Errors of the Jacobians against that of the solution; time and memory against steps."""
    rows = record["rows"]
    made = Figure(figsize=(10.5, 3.8), layout="constrained")
    left, middle, right = made.subplots(1, 3)
    lines = {
        "unrolled": ("forward", UNROLLED, "s-"),
        "implicit": ("implicit", IMPLICIT, "o-"),
        "bound of theorem 1": ("bound", "black", "--"),
    }
    for label, (key, color, style) in lines.items():
        left.loglog(
            [r["solution"] for r in rows],
            [r[key] for r in rows],
            style,
            color=color,
            ms=4,
            lw=1,
            label=label,
        )
    left.invert_xaxis()
    left.set_xlabel(r"error of the solution, $|x_k - x^*|$")
    left.set_ylabel("error of the Jacobian, spectral norm")
    costs = {"implicit": IMPLICIT, "forward": UNROLLED, "reverse": FOURTH}
    for ax, key, words in (
        (middle, "ms", "time of solution and Jacobian, ms"),
        (right, "MB", "temporaries, MB"),
    ):
        for by, color in costs.items():
            label = by if by == "implicit" else f"unrolled, {by}"
            across, up = [row["steps"] for row in rows], [row[f"{by}_{key}"] for row in rows]
            ax.loglog(across, up, "o-", color=color, ms=4, lw=1, label=label)
        ax.set_xlabel("steps of gradient descent, k")
        ax.set_ylabel(words)
    for ax in (left, middle, right):
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    return made


def main(argv: Sequence[str] | None = None) -> Row:
    """Every number of steps: the row, the table, the figure."""
    wanted = asked("ridge", __doc__, argv)
    A, y = problem(wanted.smoke)
    rows = rows_of(A, y, (3, 30) if wanted.smoke else STEPS, wanted.runs)
    return finish("ridge", wanted, rows, {"shape": list(A.shape), "strength": STRENGTH}, figure)


if __name__ == "__main__":
    main()
