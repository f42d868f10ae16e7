"""How wrong is the Jacobian at a solution that is not exact? Theorem 1 of the paper, and its figure 3, on ridge regression.

``python -m benchmarks.paper.ridge``

    x*(theta) = argmin_x |A x - y|^2 / 2 + sum_i theta_i x_i^2 / 2,    J = dx*/dtheta = -(A^T A + diag theta)^-1 diag x*

one strength a feature, by k steps of gradient descent. The implicit Jacobian is the theorem's J(x_k): the linear system
at x_k, exact or not. Theorem 1 bounds its error by that of x_k. Here dF/dx = A^T A + diag theta does not depend on x,
and dF/dtheta = diag x has a Lipschitz constant of 1, so that the bound is

    |J(x_k) - J| <= |x_k - x*| / lambda_min(A^T A + diag theta)

Unrolling differentiates the k steps. Truth is the closed form; norms of Jacobians are spectral ones, the theorem's.
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
from mdsens.implicit.optimality import stationary

STRENGTH = 0.01
STEPS = (1, 3, 10, 30, 100, 200, 400, 700, 1000, 1400, 2000, 3000)


def problem(smoke: bool) -> tuple[Array, Array]:
    """A (m, p) and y (m,): the diabetes data that scikit-learn ships, 442 patients; made ones where it is not needed."""
    if smoke:
        rng = np.random.default_rng(0)
        A = rng.normal(size=(20, 4)) / np.sqrt(20)
        return jnp.asarray(A), jnp.asarray(A @ rng.normal(size=4) + 0.1 * rng.normal(size=20))
    from sklearn.datasets import load_diabetes

    A, y = load_diabetes(return_X_y=True)
    return jnp.asarray(A), jnp.asarray((y - y.mean()) / y.std())


def descent(A: Array, y: Array, steps: int, curvature: float) -> Callable[[Array, Array], Array]:
    """k steps of gradient descent from ``init``, each as long as the inverse of the largest curvature."""

    def solver(init: Array, theta: Array) -> Array:
        def step(x: Array, _: None) -> tuple[Array, None]:
            return x - (A.T @ (A @ x - y) + theta * x) / curvature, None

        return lax.scan(step, init, length=steps)[0]

    return solver


def rows_of(A: Array, y: Array, counts: Sequence[int], runs: int) -> list[Row]:
    """A row a number of steps: errors of the solution and of each Jacobian, the bound, time and memory."""
    theta, init = jnp.full(A.shape[1], STRENGTH), jnp.zeros(A.shape[1])
    curved = A.T @ A + jnp.diag(theta)
    exact = jnp.linalg.solve(curved, A.T @ y)
    truth = -jnp.linalg.solve(curved, jnp.diag(exact))
    least, most = (float(value) for value in jnp.linalg.eigvalsh(curved)[jnp.asarray([0, -1])])

    def loss(x: Array, theta: Array) -> Array:
        return 0.5 * jnp.sum((A @ x - y) ** 2) + 0.5 * jnp.sum(theta * x**2)

    attach = root(stationary(loss), solve=Direct(), symmetric=True, positive_semidefinite=True)
    rows = []
    for steps in counts:
        solver = descent(A, y, steps, most)
        ways = {
            "implicit": jax.jacfwd(lambda theta, s=solver: attach(s)(init, theta)),
            "forward": jax.jacfwd(lambda theta, s=solver: s(init, theta)),
            "reverse": jax.jacrev(lambda theta, s=solver: s(init, theta)),
        }
        away = float(jnp.linalg.norm(solver(init, theta) - exact))
        row: Row = {"steps": steps, "solution": away, "bound": away / least}
        cost: Row = {}
        for name, way in ways.items():
            took = measured(way, theta, runs=runs)
            row[name] = float(jnp.linalg.norm(took.answer - truth, 2))
            cost |= {f"{name}_ms": 1e3 * took.seconds, f"{name}_MB": took.MB}
        rows.append({**row, "truth": float(jnp.linalg.norm(truth, 2)), **cost})
    return rows


def figure(record: Row) -> Figure:
    """Errors of the Jacobians against that of the solution, and against steps."""
    rows = record["rows"]
    made = Figure(figsize=(9.6, 3.9), layout="constrained")
    left, middle, right = made.subplots(1, 3)
    away = np.array([row["solution"] for row in rows])
    steps = np.array([row["steps"] for row in rows])
    lines = {
        "unrolled": ("forward", UNROLLED, "s-"),
        "implicit": ("implicit", IMPLICIT, "o-"),
        "bound of theorem 1": ("bound", "black", "--"),
    }
    for ax, across in ((left, away), (middle, steps)):
        for label, (key, colour, style) in lines.items():
            ax.loglog(across, [row[key] for row in rows], style, color=colour, ms=4, lw=1, label=label)
        ax.grid(alpha=0.3)
    left.invert_xaxis()
    left.set_xlabel("error of the solution, |x_k − x*|  (better to the right)")
    left.set_ylabel("error of the Jacobian, spectral norm")
    left.legend(fontsize=8)
    middle.set_xlabel("steps of gradient descent, k")
    costs = {"implicit": IMPLICIT, "forward": UNROLLED, "reverse": FOURTH}
    for key, colour in costs.items():
        label = key if key == "implicit" else f"unrolled, {key}"
        right.loglog(steps, [row[f"{key}_MB"] for row in rows], "o-", color=colour, ms=4, lw=1, label=label)
    right.set_xlabel("steps of gradient descent, k")
    right.set_ylabel("temporaries of the whole Jacobian, MB")
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    return made


def main(argv: Sequence[str] | None = None) -> Row:
    """Every number of steps: the row, the table, the figure."""
    wanted = asked("ridge", __doc__, argv)
    A, y = problem(wanted.smoke)
    rows = rows_of(A, y, (3, 30) if wanted.smoke else STEPS, wanted.runs)
    return finish("ridge", wanted, rows, {"shape": list(A.shape), "strength": STRENGTH}, figure)


if __name__ == "__main__":
    main()
