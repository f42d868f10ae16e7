"""Does a dictionary that knows its task beat one that does not?
Task-driven dictionary learning, section 4.3.

``python -m benchmarks.paper.dictionary``

    x*(D) = argmin_x |x D - A|^2 / 2 + l1 |x|_1 + l2 |x|^2 / 2
    min over D, w, b  of  mean log(1 + exp(-y (x*(D) w + b))) + decay |w|^2 / 2,   y = +-1

x* are sparse codes of the rows of A over the atoms D. A is scikit-learn's breast cancer data, 569
patients with 30 features, standardized; half of them train and half judge, over five splits, with
ten atoms and with two. Codes come by k steps of FISTA, and have the derivative of the fixed point
of proximal gradient; Adam (optax) moves D, w and b from the unsupervised dictionary, which
minimizes the reconstruction alone, its atoms of norm 1. Beside it: a logistic regression on the
codes of the unsupervised dictionary, and one on the 30 features, with the same decay. The score is
the area under the ROC curve on the half that judges. The paper's own data, the expression of 7,399
genes in 299 patients, does not come with scikit-learn.

The gradient by D of k steps, implicit and unrolled in reverse mode, is held against the closed form
of the codes on their support, x_S = (D_S D_S^T + l2)^-1 (D_S a - l1 sign x_S), differentiated as it
is written.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from matplotlib.figure import Figure

from benchmarks.paper._common import (
    IMPLICIT,
    THIRD,
    UNROLLED,
    Row,
    asked,
    finish,
    measured,
    relative,
    table,
)
from mdsens.implicit import GMRES, fixed_point
from mdsens.implicit.conditions import proximal
from mdsens.implicit.conditions.optimality import proximal_gradient

LASSO, RIDGE, DECAY = 0.5, 0.1, 0.01
ATOMS, CODING, SPLITS = (2, 10), 100, 5
UNSUPERVISED, SUPERVISED, RATE = 150, 100, 0.02  # steps of Adam, and its rate
STEPS = (10, 30, 100, 300)

Coder: TypeAlias = Callable[[Array, Array, Array], Array]
Weights: TypeAlias = tuple[Array, Array, Array]
Slope: TypeAlias = Callable[[Weights, Array, Array], tuple[Weights, tuple[Array, Array]]]


def data(smoke: bool) -> tuple[np.ndarray, np.ndarray]:
    """A (m, p), standardized, and y (m,) of +-1."""
    if smoke:
        rng = np.random.default_rng(0)
        A = rng.normal(size=(40, 6))
        return A, np.where(A[:, 0] + A[:, 1] + 0.5 * rng.normal(size=40) > 0, 1.0, -1.0)
    from sklearn.datasets import load_breast_cancer

    A, kind = load_breast_cancer(return_X_y=True)
    A = np.asarray(A)
    return (A - A.mean(axis=0)) / A.std(axis=0), np.where(kind == 1, 1.0, -1.0)


def step_of(D: Array) -> Array:
    """The inverse of the curvature of |x D - A|^2 / 2; the fixed point does not depend on it."""
    return 1 / jnp.linalg.eigvalsh(lax.stop_gradient(D @ D.T))[-1]


def moved(x: Array, D: Array, A: Array, step: Array) -> Array:
    """One step of proximal gradient."""

    def misfit(x: Array) -> Array:
        return 0.5 * jnp.sum((x @ D - A) ** 2)

    return proximal_gradient(
        misfit, lambda y, step: proximal.elastic_net(y, step, LASSO, RIDGE), step
    )(x)


def fista(steps: int) -> Coder:
    """Accelerated proximal gradient from ``init``, in a form that reverse mode takes."""

    def coder(init: Array, D: Array, A: Array) -> Array:
        length = step_of(D)

        def step(
            carry: tuple[Array, Array, Array], _: None
        ) -> tuple[tuple[Array, Array, Array], None]:
            x, ahead, t = carry
            new, later = moved(ahead, D, A, length), (1 + jnp.sqrt(1 + 4 * t**2)) / 2
            return (new, new + (t - 1) / later * (new - x), later), None

        return lax.scan(step, (init, init, jnp.ones(())), length=steps)[0][0]

    return coder


def attached(steps: int) -> Coder:
    """The same codes, with the derivative of the fixed point."""
    return fixed_point(
        lambda x, D, A: moved(x, D, A, step_of(D)), solve=GMRES(rtol=1e-10, restart=40)
    )(fista(steps))


def closed(x: Array, D: Array, A: Array) -> Array:
    """The codes on the support of x, and with its signs."""

    def row(code: Array, a: Array) -> Array:
        on = (code != 0).astype(a.dtype)
        system = jnp.outer(on, on) * (D @ D.T) + jnp.diag(RIDGE * on + (1 - on))
        return jnp.linalg.solve(system, on * (D @ a - LASSO * jnp.sign(code)))

    return jax.vmap(row)(lax.stop_gradient(x), A)


def codes(coder: Coder, D: Array, A: Array) -> Array:
    return coder(jnp.zeros((len(A), len(D))), D, A)


def logistic(features: Array, w: Array, b: Array, y: Array) -> Array:
    """The penalized loss of labels."""
    return jnp.mean(jnp.logaddexp(0.0, -y * (features @ w + b))) + 0.5 * DECAY * jnp.sum(w**2)


@jax.jit
def regression(features: Array, y: Array) -> Array:
    """(w, b) of the logistic regression, by Newton's method; features (m, d)."""
    columns = jnp.column_stack([features, jnp.ones(len(y))])
    penalty = DECAY * jnp.ones(columns.shape[1]).at[-1].set(0.0)

    def step(_: int, w: Array) -> Array:
        odds = jax.nn.sigmoid(-y * (columns @ w))
        slope = -(columns.T @ (y * odds)) / len(y) + penalty * w
        curved = (columns.T * (odds * (1 - odds))) @ columns / len(y) + jnp.diag(penalty)
        return w - jnp.linalg.solve(curved, slope)

    return lax.fori_loop(0, 15, step, jnp.zeros(columns.shape[1]))


def area(score: np.ndarray, y: np.ndarray) -> float:
    """The area under the ROC curve: how often a positive scores above a negative."""
    apart = score[y > 0][:, None] - score[y < 0][None]
    return float(np.mean(apart > 0) + 0.5 * np.mean(apart == 0))


@functools.partial(jax.jit, static_argnums=(2, 3))
def unsupervised(D: Array, A: Array, coding: int, steps: int) -> Array:
    """The dictionary of least reconstruction error, atoms of norm 1;
    codes minimize, and pass on no derivative.
    """
    adam = optax.adam(RATE)

    def unit(D: Array) -> Array:
        return D / jnp.linalg.norm(D, axis=1, keepdims=True)

    def misfit(D: Array, x: Array) -> Array:
        return 0.5 * jnp.mean(jnp.sum((x @ D - A) ** 2, axis=1))

    def move(
        carry: tuple[Array, optax.OptState], _: None
    ) -> tuple[tuple[Array, optax.OptState], None]:
        D, state = carry
        change, state = adam.update(jax.grad(misfit)(D, codes(fista(coding), D, A)), state)
        return (unit(jax.tree.map(jnp.add, D, change)), state), None

    return lax.scan(move, (unit(D), adam.init(D)), length=steps)[0][0]


def supervised(
    slope: Slope, given: Weights, A: Array, y: Array, steps: int
) -> tuple[Weights, list[float], float]:
    """D, w, b that predict the labels, the loss before each step, and seconds a step."""
    adam = optax.adam(RATE)

    @jax.jit
    def move(
        moving: Weights, slopes: Weights, state: optax.OptState
    ) -> tuple[Weights, optax.OptState]:
        change, state = adam.update(slopes, state)
        return jax.tree.map(jnp.add, moving, change), state

    moving, state, losses, began = given, adam.init(given), [], 0.0
    for k in range(steps):
        began = time.perf_counter() if k == 1 else began  # the first step compiles
        slopes, (value, _) = slope(moving, A, y)
        losses.append(float(value))
        moving, state = move(moving, slopes, state)
    jax.block_until_ready(moving)
    return moving, losses, (time.perf_counter() - began) / (steps - 1)


def slope_of(coder: Callable[[Array, Array], Array]) -> Slope:
    """The gradient by (D, w, b), and (loss, codes), of a coder(D, A)."""

    def loss(moving: Weights, A: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
        x = coder(moving[0], A)
        value = logistic(x, *moving[1:], y)
        return value, (value, x)

    return jax.grad(loss, has_aux=True)


@dataclasses.dataclass(frozen=True)
class Split:
    """Patients that train and judge, and what the unsupervised dictionary makes of them."""

    A: Array
    y: Array
    A_judge: Array
    y_judge: Array
    start: Weights

    @classmethod
    def made(
        cls, A: np.ndarray, y: np.ndarray, seed: int, atoms: int, coding: int, steps: int
    ) -> Split:
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(y))
        half = len(y) // 2
        train, judge = order[:half], order[half : 2 * half]
        B, labels = jnp.asarray(A[train]), jnp.asarray(y[train])
        D = unsupervised(jnp.asarray(rng.normal(size=(atoms, A.shape[1]))), B, coding, steps)
        w = regression(coded(D, B, coding), labels)
        return cls(B, labels, jnp.asarray(A[judge]), jnp.asarray(y[judge]), (D, w[:-1], w[-1]))

    def score(self, weights: Weights, coding: int) -> float:
        """The area under the curve of a dictionary and its weights."""
        D, w, b = weights
        return area(np.asarray(coded(D, self.A_judge, coding) @ w + b), np.asarray(self.y_judge))

    def raw(self) -> float:
        """That of the logistic regression on the features."""
        w = regression(self.A, self.y)
        return area(np.asarray(self.A_judge @ w[:-1] + w[-1]), np.asarray(self.y_judge))


@functools.partial(jax.jit, static_argnums=2)
def coded(D: Array, A: Array, coding: int) -> Array:
    """Codes without a derivative."""
    return codes(fista(coding), D, A)


def score_rows(
    splits: Sequence[Split], slope: Slope, coding: int, steps: int
) -> tuple[list[Row], list[list[float]]]:
    """A row a split, and the losses of Adam."""
    rows, curves = [], []
    for number, split in enumerate(splits):
        found, losses, took = supervised(slope, split.start, split.A, split.y, steps)
        row: Row = {"atoms": len(split.start[0]), "split": number, "raw": split.raw()}
        row |= {
            "unsupervised": split.score(split.start, coding),
            "task-driven": split.score(found, coding),
        }
        rows.append(
            row | {"loss_before": losses[0], "loss_after": losses[-1], "step_ms": 1e3 * took}
        )
        curves.append(losses)
    return rows, curves


def gradient_rows(
    split: Split, counts: Sequence[int], runs: int
) -> tuple[list[Row], dict[int, Slope]]:
    """A row a number of FISTA's steps and way to differentiate,
    and the implicit gradients, compiled.

    Times and memory are of the whole gradient by (D, w, b); errors of the codes and of dL/dD.
    """
    given = (split.start, split.A, split.y)
    exact = coded(split.start[0], split.A, 5000)
    truth, (_, form) = jax.jit(slope_of(lambda D, A: closed(exact, D, A)))(*given)
    rows: list[Row] = []
    compiled: dict[int, Slope] = {}
    for steps in counts:
        ways = {"unrolled": fista(steps), "implicit": attached(steps)}
        for way, coder in ways.items():
            took = measured(slope_of(functools.partial(codes, coder)), *given, runs=runs)
            slopes, (_, x) = took.answer
            row: Row = {
                "atoms": len(split.start[0]),
                "fista": steps,
                "way": way,
                "gradient_ms": 1e3 * took.seconds,
            }
            row |= {
                "MB": took.MB,
                "codes": relative(x, exact),
                "error": relative(slopes[0], truth[0]),
            }
            rows.append(row | {"closed_form": relative(form, exact)})
            if way == "implicit":
                compiled[steps] = took.run
    return rows, compiled


def figure(record: Row) -> Figure:
    """Scores of the splits, the loss of Adam, and errors and times of the gradient."""
    made = Figure(figsize=(9.6, 7.4), layout="constrained")
    (scores, training), (errors, times) = made.subplots(2, 2)
    rows = [row for row in record["rows"] if "split" in row]
    few, many = min(record["atoms"]), max(record["atoms"])
    columns = {"30 features": ("raw", many, "black")}
    for atoms in dict.fromkeys((few, many)):
        columns |= {f"blind\n{atoms} atoms": ("unsupervised", atoms, THIRD)}
        columns |= {f"task\n{atoms} atoms": ("task-driven", atoms, IMPLICIT)}
    for place, (name, atoms, color) in enumerate(columns.values()):
        values = [row[name] for row in rows if row["atoms"] == atoms]
        scores.plot(place + np.linspace(-0.15, 0.15, len(values)), values, "o", color=color, ms=4)
        scores.plot([place - 0.3, place + 0.3], [np.mean(values)] * 2, color=color, lw=1)
    scores.set_xticks(range(len(columns)), list(columns), fontsize=8)
    scores.set_ylabel("area under the ROC curve, a point a split")
    for row, losses in zip(rows, record["losses"], strict=True):
        style, label = (
            ("-" if row["atoms"] == many else "--"),
            f"{row['atoms']} atoms" if row["split"] == 0 else None,
        )
        training.plot(losses, style, color=IMPLICIT, lw=1, label=label)
    training.legend(fontsize=8)
    training.set_xlabel("steps of Adam, a line a split")
    training.set_ylabel("penalized logistic loss")
    slopes = [row for row in record["rows"] if "way" in row and row["atoms"] == many]
    for way, color in {"implicit": IMPLICIT, "unrolled": UNROLLED}.items():
        some = [row for row in slopes if row["way"] == way]
        errors.loglog(
            [r["fista"] for r in some],
            [r["error"] for r in some],
            "o-",
            color=color,
            lw=1,
            label=way,
        )
        times.loglog(
            [r["fista"] for r in some],
            [r["gradient_ms"] for r in some],
            "o-",
            color=color,
            lw=1,
            label=way,
        )
    errors.set_ylabel("relative error of dL/dD")
    times.set_ylabel("milliseconds a gradient")
    for ax in (errors, times):
        ax.set_xlabel("steps of FISTA")
        ax.legend(fontsize=8)
    for ax in (scores, training, errors, times):
        ax.grid(alpha=0.3)
    return made


def main(argv: Sequence[str] | None = None) -> Row:
    """Each number of atoms: the gradient on the first split, then all splits;
    the table, the figure.
    """
    wanted = asked("dictionary", __doc__, argv)
    A, y = data(wanted.smoke)
    atoms, coding, blind, seeing = (
        ((3,), 60, 5, 5) if wanted.smoke else (ATOMS, CODING, UNSUPERVISED, SUPERVISED)
    )
    slopes: list[Row] = []
    scores: list[Row] = []
    losses: list[list[float]] = []
    for number in atoms:
        splits = [
            Split.made(A, y, seed, number, coding, blind)
            for seed in range(1 if wanted.smoke else SPLITS)
        ]
        counts = STEPS if number == max(atoms) and not wanted.smoke else (coding,)
        rows, compiled = gradient_rows(splits[0], counts, wanted.runs)
        slopes += rows
        rows, curves = score_rows(splits, compiled[coding], coding, seeing)
        scores += rows
        losses += curves
    names = ("raw", "unsupervised", "task-driven")
    means = [
        {
            "atoms": k,
            **{n: float(np.mean([r[n] for r in scores if r["atoms"] == k])) for n in names},
        }
        for k in atoms
    ]
    print(table(means))
    return finish(
        "dictionary",
        wanted,
        scores + slopes,
        {"means": means, "losses": losses, "atoms": atoms},
        figure,
    )


if __name__ == "__main__":
    main()
