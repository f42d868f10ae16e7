"""May the solver and the derivative be chosen apart?
The paper's multiclass support vector machine, section 4.1.

``python -m benchmarks.paper.svm``

    x*(theta) = argmin_x |V(x)|^2 / (2 theta) + <x, Y>,   each row of x in the simplex
    V(x) = X^T (Y - x)
    L(lambda) = |X_val W - Y_val|^2 / 2,   W = V(x*) / theta,   theta = exp lambda

m samples, p features, 5 classes one-hot in Y: the dual of the machine, W its weights, L the loss on
50 more samples, and dL/dlambda the hypergradient. Solvers: mirror descent with the Kullback-Leibler
map, projected gradient, and block coordinate descent over rows. Each is differentiated three ways:

    implicit PG    x = P(x - s grad f),                the fixed point of projected gradient
    implicit MD    x = softmax(log x - 2 s grad f),    that of mirror descent, whatever the solver
    unrolled       reverse mode through every step

with s = theta / |X X^T|.

Truth is the dense implicit derivative at a solution to 1e-13, itself held against central
differences of solving again. Rows of X are scaled by 1 / sqrt(p), so that one lambda suits every p:
less leaves a hard margin, where W does not depend on it, more a margin that every sample is inside,
where x* does not. p is above m: below, x* is not unique.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.paper._common import (
    IMPLICIT,
    THIRD,
    UNROLLED,
    Row,
    asked,
    finish,
    measured,
    relative,
)
from mdsens.implicit import GMRES, fixed_point
from mdsens.implicit.conditions import projections
from mdsens.implicit.conditions.optimality import (
    kl_map,
    mirror_descent,
    projected_gradient,
    softmax,
)
from mdsens.implicit.linear import Method

CLASSES, LAMBDA = 5, 1.0
FEATURES = (150, 500, 1500)
TOLERANCE, LIMIT = 1e-13, 200_000
WAYS = {"implicit PG": (IMPLICIT, "o-"), "implicit MD": (THIRD, "^-"), "unrolled": (UNROLLED, "s-")}

Solver = Callable[[Array, Array], Array]
on_simplices = jax.vmap(projections.simplex)


def samples(rng: np.random.Generator, m: int, centers: np.ndarray) -> tuple[Array, Array]:
    """m samples X (m, p) about the centers (5, p) of their classes, and Y (m, 5)."""
    kind = np.arange(m) % CLASSES
    X = centers[kind] + rng.normal(size=(m, centers.shape[1]))
    return jnp.asarray(X / np.sqrt(centers.shape[1])), jnp.asarray(np.eye(CLASSES)[kind])


@dataclasses.dataclass(frozen=True)
class Machine:
    """Samples to fit, samples to judge by, and what the solvers share."""

    X: Array
    Y: Array
    X_val: Array
    Y_val: Array
    curvature: Array

    @classmethod
    def made(cls, m: int, held: int, features: int) -> Machine:
        """A tenth of the features tells the classes apart."""
        rng = np.random.default_rng(features)
        centers = np.zeros((CLASSES, features))
        centers[:, : max(2, features // 10)] = rng.normal(size=(CLASSES, max(2, features // 10)))
        X, Y = samples(rng, m, centers)
        return cls(X, Y, *samples(rng, held, centers), jnp.linalg.norm(X @ X.T, 2))

    def f(self, x: Array, theta: Array) -> Array:
        """The dual objective."""
        return jnp.sum((self.X.T @ (self.Y - x)) ** 2) / (2 * theta) + jnp.sum(x * self.Y)

    def loss(self, x: Array, theta: Array) -> Array:
        """L of a dual solution."""
        W = self.X.T @ (self.Y - x) / theta
        return 0.5 * jnp.sum((self.X_val @ W - self.Y_val) ** 2)

    def projected(self, x: Array, theta: Array) -> Array:
        """One step of projected gradient."""
        T = projected_gradient(self.f, lambda y, theta: on_simplices(y), theta / self.curvature)
        return T(x, theta)

    def mirrored(self, x: Array, theta: Array) -> Array:
        """One step of mirror descent. Between points of a simplex |d|_1^2 >= 2 |d|^2:
        the step may be twice as long.
        """
        T = mirror_descent(
            self.f, lambda y, theta: jax.vmap(softmax)(y), kl_map, 2 * theta / self.curvature
        )
        return T(x, theta)

    def descended(self, x: Array, theta: Array) -> Array:
        """One step of block coordinate descent over every row, V kept up to date."""

        def row(V: Array, given: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            features, label, old = given
            slope = label - features @ V / theta
            new = projections.simplex(old - theta / jnp.sum(features**2) * slope)
            return V - jnp.outer(features, new - old), new

        return lax.scan(row, self.X.T @ (self.Y - x), (self.X, self.Y, x))[1]

    def start(self) -> Array:
        return jnp.full(self.Y.shape, 1 / CLASSES)

    def exact(self, init: Array, theta: Array) -> Array:
        """The solution to 1e-13, by block coordinate descent."""

        def going(carry: tuple[Array, Array, Array]) -> Array:
            return (carry[1] > TOLERANCE) & (carry[2] < LIMIT)

        def again(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            moved = self.descended(carry[0], theta)
            return moved, jnp.max(jnp.abs(moved - carry[0])), carry[2] + 1

        return lax.while_loop(going, again, (init, jnp.asarray(jnp.inf), jnp.zeros((), int)))[0]

    def dense(self, x: Array, exponent: Array) -> Array:
        """dL/dlambda at a solution, by the dense Jacobian of projected gradient and LU."""

        def T(flat: Array, exponent: Array) -> Array:
            return jnp.ravel(self.projected(flat.reshape(x.shape), jnp.exp(exponent)))

        def loss(flat: Array, exponent: Array) -> Array:
            return self.loss(flat.reshape(x.shape), jnp.exp(exponent))

        flat = jnp.ravel(x)
        across, along = jax.grad(loss, (0, 1))(flat, exponent)
        moved, moving = jax.jacfwd(T, (0, 1))(flat, exponent)
        return along + across @ jnp.linalg.solve(jnp.eye(flat.size) - moved, moving)

    def hypergradient(self, solver: Solver) -> Callable[[Array], tuple[Array, Array]]:
        """(x, dL/dlambda) of a solver by reverse mode."""

        def value(exponent: Array) -> tuple[Array, Array]:
            theta = jnp.exp(exponent)
            x = solver(self.start(), theta)
            return self.loss(x, theta), x

        def both(exponent: Array) -> tuple[Array, Array]:
            slope, x = jax.grad(value, has_aux=True)(exponent)
            return x, slope

        return both


def repeated(step: Callable[[Array, Array], Array], steps: int) -> Solver:
    """x after so many steps, in a form that reverse mode takes."""
    return lambda init, theta: lax.scan(lambda x, _: (step(x, theta), None), init, length=steps)[0]


def truth_of(machine: Machine) -> tuple[Array, Array, float]:
    """(x*, dL/dlambda, how far central differences are from it)."""
    exact = jax.jit(machine.exact)
    x = exact(machine.start(), jnp.exp(LAMBDA))
    slope = jax.jit(machine.dense)(x, jnp.asarray(LAMBDA))

    def value(exponent: float) -> Array:
        theta = jnp.exp(exponent)
        return machine.loss(exact(x, theta), theta)

    h = 1e-4
    return x, slope, relative((value(LAMBDA + h) - value(LAMBDA - h)) / (2 * h), slope)


def rows_of(machine: Machine, counts: dict[str, int], solve: Method, runs: int) -> list[Row]:
    """A row a solver and way to differentiate it."""
    x, truth, apart = truth_of(machine)
    steps = {"MD": machine.mirrored, "PG": machine.projected, "BCD": machine.descended}
    rows: list[Row] = []
    for name, count in counts.items():
        solver = repeated(steps[name], count)
        ways = {
            "implicit PG": fixed_point(machine.projected, solve=solve)(solver),
            "implicit MD": fixed_point(machine.mirrored, solve=solve)(solver),
            "unrolled": solver,
        }
        alone = measured(solver, machine.start(), jnp.exp(LAMBDA), runs=runs).seconds
        for way, differentiated in ways.items():
            took = measured(machine.hypergradient(differentiated), jnp.asarray(LAMBDA), runs=runs)
            row: Row = {
                "p": machine.X.shape[1],
                "solver": name,
                "steps": count,
                "way": way,
                "seconds": took.seconds,
            }
            row |= {"solver_alone": alone, "MB": took.MB, "solution": relative(took.answer[0], x)}
            rows.append(
                row
                | {
                    "error": relative(took.answer[1], truth),
                    "truth": float(truth),
                    "differences": apart,
                }
            )
    return rows


def figure(record: Row) -> Figure:
    """Time, memory and error against the number of features, a column a solver."""
    rows = record["rows"]
    names, sizes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("solver", "p"))
    made = Figure(figsize=(9.6, 7.4), layout="constrained")
    kinds = {
        "seconds": "seconds a hypergradient",
        "MB": "temporaries, MB",
        "error": "relative error",
    }
    axes = made.subplots(len(kinds), len(names), sharex=True, sharey="row", squeeze=False)
    for line, (key, label) in zip(axes, kinds.items(), strict=True):
        for ax, name in zip(line, names, strict=True):
            for way, (color, style) in WAYS.items():
                some = [row for row in rows if row["solver"] == name and row["way"] == way]
                across, up = [r["p"] for r in some], [max(r[key], 1e-16) for r in some]
                ax.loglog(across, up, style, color=color, ms=4, lw=1, label=way)
            ax.set_xticks(sizes, [str(p) for p in sizes])
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.grid(alpha=0.3)
        line[0].set_ylabel(label)
    for k, name in enumerate(names):
        count = next(row["steps"] for row in rows if row["solver"] == name)
        axes[0, k].set_title(f"{record['titles'][name]}, {count} steps", fontsize=10)
        axes[-1, k].set_xlabel("features, p")
        counts = sorted({row["p"] for row in rows})
        axes[-1, k].set_xticks(counts, [str(p) for p in counts])
        axes[-1, k].set_xticks([], minor=True)
    axes[0, 0].legend(fontsize=8)
    return made


def main(argv: Sequence[str] | None = None) -> Row:
    """Every number of features: its rows, the table, the figure."""
    wanted = asked("svm", __doc__, argv)
    m, held = (10, 5) if wanted.smoke else (100, 50)
    counts = {"PG": 20} if wanted.smoke else {"MD": 1000, "PG": 300, "BCD": 30}
    rows: list[Row] = []
    for p in (30,) if wanted.smoke else FEATURES:
        rows += rows_of(Machine.made(m, held, p), counts, GMRES(), wanted.runs)
    titles = {"MD": "mirror descent", "PG": "projected gradient", "BCD": "block coordinates"}
    return finish(
        "svm",
        wanted,
        rows,
        {"m": m, "classes": CLASSES, "lambda": LAMBDA, "titles": titles},
        figure,
    )


if __name__ == "__main__":
    main()
