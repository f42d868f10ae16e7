"""Does a dictionary that knows its task beat one that does not? Task-driven dictionary learning, section 4.3.

``python -m benchmarks.paper.dictionary``

    x*(D) = argmin_x |x D - A|^2 / 2 + l1 |x|_1 + l2 |x|^2 / 2,      sparse codes of the rows of A over the atoms D
    min over D, w, b  of  mean log(1 + exp(-y (x*(D) w + b))) + decay |w|^2 / 2,   y = +-1

A is scikit-learn's breast cancer data, 569 patients with 30 features, standardised; half of them train and half judge,
over five splits. Codes come by k steps of FISTA, and have the derivative of the fixed point of proximal gradient;
Adam (optax) moves D, w and b from the unsupervised dictionary, which minimises the reconstruction alone, its atoms of
norm 1. Beside it: a logistic regression on the codes of the unsupervised dictionary, and one on the 30 features, with
the same decay. The score is the area under the ROC curve on the half that judges.

The gradient by D of k steps, implicit and unrolled in reverse mode, is held against the closed form of the codes on
their support, x_S = (D_S D_S^T + l2)^-1 (D_S a - l1 sign x_S), differentiated as it is written.
"""

from __future__ import annotations

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

from benchmarks.paper._common import IMPLICIT, THIRD, UNROLLED, Row, asked, finish, measured, relative
from mdsens.implicit import GMRES, fixed_point, proximal
from mdsens.implicit.optimality import proximal_gradient

LASSO, RIDGE, DECAY = 0.5, 0.1, 0.01
ATOMS, CODING, SPLITS = 10, 100, 5
UNSUPERVISED, SUPERVISED, RATE = 150, 100, 0.02  # steps of Adam, and its rate
STEPS = (10, 30, 100, 300)

Coder: TypeAlias = Callable[[Array, Array, Array], Array]
Weights: TypeAlias = tuple[Array, Array, Array]


def data(smoke: bool) -> tuple[np.ndarray, np.ndarray]:
    """A (m, p), standardised, and y (m,) of +-1."""
    if smoke:
        rng = np.random.default_rng(0)
        A = rng.normal(size=(40, 6))
        return A, np.where(A[:, 0] + A[:, 1] + 0.5 * rng.normal(size=40) > 0, 1.0, -1.0)
    from sklearn.datasets import load_breast_cancer

    A, kind = load_breast_cancer(return_X_y=True)
    return (A - A.mean(axis=0)) / A.std(axis=0), np.where(kind == 1, 1.0, -1.0)


def step_of(D: Array) -> Array:
    """The inverse of the curvature of |x D - A|^2 / 2; the fixed point does not depend on it."""
    return 1 / jnp.linalg.eigvalsh(lax.stop_gradient(D @ D.T))[-1]


def condition(x: Array, D: Array, A: Array) -> Array:
    """The map whose fixed point the codes are."""

    def misfit(x: Array) -> Array:
        return 0.5 * jnp.sum((x @ D - A) ** 2)

    return proximal_gradient(misfit, lambda y, step: proximal.elastic_net(y, step, LASSO, RIDGE), step_of(D))(x)


def fista(steps: int) -> Coder:
    """Accelerated proximal gradient from ``init``, in a form that reverse mode takes."""

    def coder(init: Array, D: Array, A: Array) -> Array:
        def step(carry: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], None]:
            x, ahead, t = carry
            new, later = condition(ahead, D, A), (1 + jnp.sqrt(1 + 4 * t**2)) / 2
            return (new, new + (t - 1) / later * (new - x), later), None

        return lax.scan(step, (init, init, jnp.ones(())), length=steps)[0][0]

    return coder


def attached(steps: int) -> Coder:
    """The same codes, with the derivative of the fixed point."""
    return fixed_point(condition, solve=GMRES(rtol=1e-10, restart=100))(fista(steps))


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
    """The penalised loss of labels."""
    return jnp.mean(jnp.logaddexp(0.0, -y * (features @ w + b))) + 0.5 * DECAY * jnp.sum(w**2)


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
    """The dictionary of least reconstruction error, atoms of norm 1; at the minimum D's slope is the direct one."""
    adam = optax.adam(RATE)

    def unit(D: Array) -> Array:
        return D / jnp.linalg.norm(D, axis=1, keepdims=True)

    def misfit(D: Array, x: Array) -> Array:
        return 0.5 * jnp.mean(jnp.sum((x @ D - A) ** 2, axis=1))

    def move(carry: tuple[Array, optax.OptState], _: None) -> tuple[tuple[Array, optax.OptState], None]:
        D, state = carry
        change, state = adam.update(jax.grad(misfit)(D, codes(fista(coding), D, A)), state)
        return (unit(optax.apply_updates(D, change)), state), None

    return lax.scan(move, (unit(D), adam.init(D)), length=steps)[0][0]


@functools.partial(jax.jit, static_argnums=(3, 4))
def supervised(given: Weights, A: Array, y: Array, coding: int, steps: int) -> tuple[Weights, Array]:
    """D, w, b that predict the labels, and the loss before each step."""
    adam, coder = optax.adam(RATE), attached(coding)

    def loss(moving: Weights) -> Array:
        return logistic(codes(coder, moving[0], A), *moving[1:], y)

    def move(carry: tuple[Weights, optax.OptState], _: None) -> tuple[tuple[Weights, optax.OptState], Array]:
        moving, state = carry
        value, slope = jax.value_and_grad(loss)(moving)
        change, state = adam.update(slope, state)
        return (optax.apply_updates(moving, change), state), value

    (found, _), losses = lax.scan(move, (given, adam.init(given)), length=steps)
    return found, losses


def split(A: np.ndarray, y: np.ndarray, seed: int, sizes: tuple[int, int, int, int]) -> tuple[Row, Array, np.ndarray]:
    """A row of scores, the unsupervised dictionary, and the losses of Adam."""
    atoms, coding, blind, seeing = sizes
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(y))
    train, judge = order[: len(y) // 2], order[len(y) // 2 :]
    code = jax.jit(lambda D, A: codes(fista(coding), D, A))
    fit = jax.jit(regression)
    plain = fit(A[train], y[train])
    D = unsupervised(jnp.asarray(rng.normal(size=(atoms, A.shape[1]))), A[train], coding, blind)
    weights = fit(code(D, A[train]), y[train])
    began = time.perf_counter()
    (E, w, b), losses = jax.block_until_ready(
        supervised((D, weights[:-1], weights[-1]), jnp.asarray(A[train]), jnp.asarray(y[train]), coding, seeing)
    )
    took = time.perf_counter() - began
    row: Row = {
        "split": seed,
        "raw": area(A[judge] @ np.asarray(plain[:-1]) + float(plain[-1]), y[judge]),
        "unsupervised": area(np.asarray(code(D, A[judge]) @ weights[:-1] + weights[-1]), y[judge]),
        "task-driven": area(np.asarray(code(E, A[judge]) @ w + b), y[judge]),
        "loss_before": float(losses[0]),
        "loss_after": float(losses[-1]),
        "training_s": took,
    }
    return row, D, np.asarray(losses)


def gradient_rows(D: Array, A: Array, y: Array, counts: Sequence[int], runs: int) -> list[Row]:
    """A row a number of FISTA's steps and way to differentiate: time, memory, errors of codes and of dL/dD."""
    exact = jax.jit(lambda D: codes(fista(5000), D, A))(D)
    w = regression(exact, y)

    def slope(coded: Callable[[Array], Array]) -> Callable[[Array], tuple[Array, Array]]:
        def loss(D: Array) -> tuple[Array, Array]:
            x = coded(D)
            return logistic(x, w[:-1], w[-1], y), x

        return jax.grad(loss, has_aux=True)

    truth, form = jax.jit(slope(lambda D: closed(exact, D, A)))(D)
    rows: list[Row] = []
    for steps in counts:
        ways = {"implicit": attached(steps), "unrolled": fista(steps)}
        for way, coder in ways.items():
            took = measured(slope(lambda D, c=coder: codes(c, D, A)), D, runs=runs)
            row: Row = {"fista": steps, "way": way, "seconds": took.seconds, "MB": took.MB}
            row |= {"codes": relative(took.answer[1], exact), "error": relative(took.answer[0], truth)}
            rows.append(row | {"closed_form": relative(form, exact)})
    return rows


def figure(record: Row) -> Figure:
    """Scores of the splits, the loss of Adam, and errors and times of the gradient."""
    made = Figure(figsize=(9.6, 7.0), layout="constrained")
    (scores, training), (errors, times) = made.subplots(2, 2)
    splits = [row for row in record["rows"] if "split" in row]
    names = {"raw": "black", "unsupervised": THIRD, "task-driven": IMPLICIT}
    for place, (name, colour) in enumerate(names.items()):
        values = [row[name] for row in splits]
        scores.plot(place + np.linspace(-0.15, 0.15, len(values)), values, "o", color=colour, ms=5)
        scores.plot([place - 0.25, place + 0.25], [np.mean(values)] * 2, color=colour, lw=1)
    scores.set_xticks(range(3), ["L2 logistic\non features", "unsupervised\ndictionary", "task-driven\ndictionary"])
    scores.set_ylabel("area under the ROC curve, a point a split")
    for losses in record["losses"]:
        training.plot(losses, color=IMPLICIT, lw=1)
    training.set_xlabel("steps of Adam, a line a split")
    training.set_ylabel("penalised logistic loss")
    slopes = [row for row in record["rows"] if "way" in row]
    for way, colour in {"implicit": IMPLICIT, "unrolled": UNROLLED}.items():
        some = [row for row in slopes if row["way"] == way]
        errors.loglog([r["fista"] for r in some], [r["error"] for r in some], "o-", color=colour, lw=1, label=way)
        times.loglog([r["fista"] for r in some], [r["seconds"] for r in some], "o-", color=colour, lw=1, label=way)
    errors.set_ylabel("relative error of dL/dD")
    times.set_ylabel("seconds a gradient")
    for ax in (errors, times):
        ax.set_xlabel("steps of FISTA")
        ax.legend(fontsize=8)
    for ax in (scores, training, errors, times):
        ax.grid(alpha=0.3)
    return made


def main(argv: Sequence[str] | None = None) -> Row:
    """The splits, then the gradient on the first of them; the table, the figure."""
    wanted = asked("dictionary", __doc__, argv)
    A, y = data(wanted.smoke)
    sizes = (3, 30, 5, 5) if wanted.smoke else (ATOMS, CODING, UNSUPERVISED, SUPERVISED)
    made = [split(A, y, seed, sizes) for seed in range(1 if wanted.smoke else SPLITS)]
    train = np.random.default_rng(0).permutation(len(y))[: len(y) // 2]
    rows = [row for row, *_ in made]
    counts = (30,) if wanted.smoke else STEPS
    rows += gradient_rows(made[0][1], jnp.asarray(A[train]), jnp.asarray(y[train]), counts, wanted.runs)
    more: Row = {"losses": [losses.tolist() for *_, losses in made], "shape": list(A.shape), "atoms": sizes[0]}
    return finish("dictionary", wanted, rows, more, figure)


if __name__ == "__main__":
    main()
