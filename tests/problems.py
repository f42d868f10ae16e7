"""Problems whose answer is known in closed form, tagged by what they exercise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax import Array

PyTree = Any
SIZE = 24  # of every linear problem, so that one compiled solver serves them all


@dataclasses.dataclass(frozen=True)
class LinearProblem:
    """A x = b with orthonormal bases of its null spaces; the answer is the pseudo-inverse's.

    ``kind`` is what may be declared of A: "positive", "symmetric", "general", "two null spaces".
    """

    name: str
    kind: str
    matrix: np.ndarray
    b: np.ndarray
    right: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((SIZE, 0)))
    left: np.ndarray | None = None

    def projectors(self) -> tuple[np.ndarray, np.ndarray]:
        left = self.right if self.left is None else self.left
        return np.eye(SIZE) - self.right @ self.right.T, np.eye(SIZE) - left @ left.T

    def answer(self) -> np.ndarray:
        return np.linalg.pinv(self.matrix, rcond=1e-12) @ self.b


def spectral(eigenvalues: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A symmetric matrix with these eigenvalues, and its eigenvectors."""
    q, _ = np.linalg.qr(
        np.random.default_rng(seed).normal(size=(len(eigenvalues), len(eigenvalues)))
    )
    return (q * eigenvalues) @ q.T, q


def ring_laplacian(n: int) -> np.ndarray:
    """Springs of stiffness one in a ring: a uniform translation costs nothing."""
    return 2 * np.eye(n) - np.roll(np.eye(n), 1, axis=0) - np.roll(np.eye(n), -1, axis=0)


def linear_problems() -> list[LinearProblem]:
    rng = np.random.default_rng(7)
    b = rng.normal(size=SIZE)
    uniform = np.full((SIZE, 1), SIZE**-0.5)
    positive, _ = spectral(np.geomspace(1e-3, 1, SIZE), 0)
    values = np.geomspace(1e-3, 1, SIZE)
    values[:3] = 0
    null3, q3 = spectral(values, 1)
    signs = np.where(np.arange(SIZE) % 3 == 0, -1.0, 1.0)
    indefinite, _ = spectral(signs * np.linspace(0.1, 1, SIZE), 2)
    saddle, qs = spectral(np.where(np.arange(SIZE) < 2, 0.0, signs * np.linspace(0.1, 1, SIZE)), 3)
    general = 3 * np.eye(SIZE) + rng.normal(size=(SIZE, SIZE)) / 4
    right, _ = np.linalg.qr(rng.normal(size=(SIZE, 2)))
    left, _ = np.linalg.qr(rng.normal(size=(SIZE, 2)))
    two_sided = (np.eye(SIZE) - left @ left.T) @ general @ (np.eye(SIZE) - right @ right.T)
    return [
        LinearProblem("positive definite", "positive", positive, b),
        LinearProblem(
            "ring of springs, pushed off balance", "positive", ring_laplacian(SIZE), b, uniform
        ),
        LinearProblem("three null directions", "positive", null3, b, q3[:, :3]),
        LinearProblem("indefinite", "symmetric", indefinite, b),
        LinearProblem("indefinite and singular", "symmetric", saddle, b, qs[:, :2]),
        LinearProblem("unsymmetric", "general", general, b),
        LinearProblem("cyclic shift", "general", np.roll(np.eye(SIZE), 1, axis=0), b),
        LinearProblem("left and right null spaces", "two null spaces", two_sided, b, right, left),
    ]


@dataclasses.dataclass(frozen=True)
class RootProblem:
    """F(x, theta) = 0, a solver for it, and its root as a function of the vector theta."""

    name: str
    F: Callable[[PyTree, Array], PyTree]
    solver: Callable[[PyTree, Array], PyTree]
    init: PyTree
    theta: Array
    answer: Callable[[Array], PyTree]
    symmetric: bool = False
    positive_semidefinite: bool = False
    null_space: Callable[..., Any] | None = None
    fixed_point: bool = False  # F is then T, of x = T(x, theta)
    host: bool = False


def newton(F: Callable[[Array, Array], Array], init: Array, theta: Array) -> Array:
    """Newton's method in a while_loop, which reverse mode cannot go through."""

    def going(state: tuple[Array, Array]) -> Array:
        x, k = state
        return (jnp.max(jnp.abs(F(x, theta))) > 1e-14) & (k < 50)

    def body(state: tuple[Array, Array]) -> tuple[Array, Array]:
        x, k = state
        return x - jnp.linalg.solve(jax.jacfwd(F)(x, theta), F(x, theta)), k + 1

    return jax.lax.while_loop(going, body, (init, jnp.asarray(0)))[0]


def _linear_system() -> RootProblem:
    matrix = jnp.array([[3.0, 1.0, 0.0], [-2.0, 4.0, 1.0], [0.5, 0.0, 2.0]])

    def F(x: Array, theta: Array) -> Array:
        return theta[0] * matrix @ x - theta[1:] ** 2

    def answer(theta: Array) -> Array:
        return jnp.linalg.solve(theta[0] * matrix, theta[1:] ** 2)

    return RootProblem(
        "linear system", F, lambda _, t: answer(t), None, jnp.array([1.5, 1.0, -2.0, 0.5]), answer
    )


def _ridge() -> RootProblem:
    rng = np.random.default_rng(3)
    features, labels = jnp.asarray(rng.normal(size=(8, 3))), jnp.asarray(rng.normal(size=8))

    def F(w: Array, theta: Array) -> Array:
        return features.T @ (features @ w - theta[1] * labels) + theta[0] * w

    def answer(theta: Array) -> Array:
        return jnp.linalg.solve(
            features.T @ features + theta[0] * jnp.eye(3), theta[1] * features.T @ labels
        )

    return RootProblem(
        "ridge regression",
        F,
        lambda init, t: newton(F, init, t),
        jnp.zeros(3),
        jnp.array([0.7, 1.3]),
        answer,
        symmetric=True,
        positive_semidefinite=True,
    )


def _singular_quadratic() -> RootProblem:
    difference = jnp.asarray(np.eye(5) - np.roll(np.eye(5), 1, axis=0))
    # sums to zero: it pulls, it does not push off balance
    load = jnp.array([1.0, -2.0, 0.5, 1.5, -1.0])

    def F(x: Array, theta: Array) -> Array:
        return difference.T @ (theta * (difference @ x)) - theta[0] * load

    def answer(theta: Array) -> Array:
        # The pseudo-inverse of a ring's Laplacian,
        # whose derivative has no trouble with equal singular values.
        laplacian = difference.T @ (theta[:, None] * difference) + jnp.ones((5, 5)) / 5
        return jnp.linalg.solve(laplacian, theta[0] * load)

    return RootProblem(
        "quadratic with a null space",
        F,
        lambda _, t: answer(t),
        None,
        jnp.array([1.0, 2.0, 0.5, 1.5, 0.8]),
        answer,
        symmetric=True,
        positive_semidefinite=True,
        null_space=lambda x, theta: lambda v: v - jnp.mean(v),
    )


def _rotation_shear() -> RootProblem:
    def frame(theta: Array) -> Array:
        c, s = jnp.cos(theta[0]), jnp.sin(theta[0])
        return jnp.array([[c, -s], [s, c]]) @ (
            jnp.eye(2) + theta[1] * jnp.array([[0.0, 1.0], [0.0, 0.0]])
        )

    def F(x: Array, theta: Array) -> Array:
        y = frame(theta) @ x
        return jnp.stack([y[0] - theta[2] + y[1], y[1] ** 3 - theta[3]])

    def answer(theta: Array) -> Array:
        y1 = jnp.cbrt(theta[3])
        return jnp.linalg.solve(frame(theta), jnp.stack([theta[2] - y1, y1]))

    theta = jnp.array([0.4, 0.9, 1.2, 2.0])
    return RootProblem(
        "rotation and shear", F, lambda i, t: newton(F, i, t), jnp.array([0.1, 1.0]), theta, answer
    )


def _contraction() -> RootProblem:
    def T(x: Array, theta: Array) -> Array:
        return x - 0.3 * (x**2 - theta)

    def solver(init: Array, theta: Array) -> Array:
        return jax.lax.fori_loop(0, 120, lambda _, x: T(x, theta), init)

    return RootProblem(
        "fixed point",
        T,
        solver,
        jnp.ones(3),
        jnp.array([0.8, 1.0, 2.0]),
        jnp.sqrt,
        symmetric=True,
        fixed_point=True,
    )


def _pytree() -> RootProblem:
    def F(x: PyTree, theta: Array) -> PyTree:
        return {
            "square": x["square"] ** 2 - theta,
            "log": (jnp.exp(x["log"][0]) - theta[0] * x["square"][1], None),
        }

    def answer(theta: Array) -> PyTree:
        return {"square": jnp.sqrt(theta), "log": (jnp.log(theta[0] * jnp.sqrt(theta[1])), None)}

    return RootProblem(
        "tree of unknowns", F, lambda _, t: answer(t), None, jnp.array([1.3, 0.7]), answer
    )


def _host_solver() -> RootProblem:
    def F(x: Array, theta: Array) -> Array:
        return x**3 + x - theta

    def on_host(init: np.ndarray, theta: np.ndarray) -> np.ndarray:
        found = scipy.optimize.root(lambda x: x**3 + x - np.asarray(theta), init, tol=1e-14)
        return np.asarray(found.x)

    def solver(init: Array, theta: Array) -> Array:
        shape = jax.ShapeDtypeStruct(init.shape, init.dtype)
        return jax.pure_callback(on_host, shape, init, theta, vmap_method="sequential")

    def answer(theta: Array) -> Array:  # Cardano
        d = jnp.sqrt(theta**2 / 4 + 1 / 27)
        return jnp.cbrt(d + theta / 2) - jnp.cbrt(d - theta / 2)

    theta = jnp.array([1.0, 2.0, -0.5])
    return RootProblem(
        "scipy behind a callback", F, solver, jnp.ones(3), theta, answer, symmetric=True, host=True
    )


def _spring_chain() -> RootProblem:
    """Springs in series, one end held, the other pulled:
    theta holds three stiffnesses, a rest length and the pull.
    """

    def energy(x: Array, theta: Array) -> Array:
        k, rest, pull = theta[:3], theta[3], theta[4]
        return 0.5 * jnp.sum(k * (jnp.diff(x, prepend=0.0) - rest) ** 2) - pull * x[-1]

    F = jax.grad(energy)

    def answer(theta: Array) -> Array:
        return jnp.cumsum(theta[3] + theta[4] / theta[:3])

    return RootProblem(
        "spring chain",
        F,
        lambda init, t: newton(F, init, t),
        jnp.array([1.0, 2.0, 3.0]),
        jnp.array([1.0, 2.0, 0.5, 1.1, 0.3]),
        answer,
        symmetric=True,
        positive_semidefinite=True,
    )


def root_problems() -> list[RootProblem]:
    return [
        _linear_system(),
        _ridge(),
        _singular_quadratic(),
        _rotation_shear(),
        _contraction(),
        _pytree(),
        _host_solver(),
        _spring_chain(),
    ]
