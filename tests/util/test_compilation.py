"""Functions compiled with the effort that their arguments are worth."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.compilation import MEDIUM, MEDIUM_LOOP, SMALL, compiled


@compiled
def chained(x: jax.Array) -> jax.Array:
    for _ in range(5):
        x = jnp.sin(x) + jnp.cumsum(x)
    return x


@compiled(static_argnames="power", loops=True)
def powers(x: jax.Array, power: int) -> jax.Array:
    return jax.lax.fori_loop(0, 10, lambda _, y: y * chained(x) ** power, x)


def test_values_are_those_of_the_function_at_any_size_and_in_any_transformation():
    for size in (4, SMALL + 1):
        x = np.linspace(0.0, 1.0, size)
        want = x
        for _ in range(5):
            want = np.sin(want) + np.cumsum(want)
        np.testing.assert_allclose(chained(x), want, rtol=1e-12)
    x = jnp.linspace(0.1, 1.0, 5)
    slope = jax.grad(lambda x: jnp.sum(powers(x, power=2)))(x)
    step = 1e-6 * jnp.eye(5)
    each = jax.vmap(lambda s: jnp.sum(powers(x + s, power=2)) - jnp.sum(powers(x - s, power=2)))
    np.testing.assert_allclose(slope, each(step) / 2e-6, rtol=1e-6)
    np.testing.assert_array_equal(jax.jit(chained)(x), jax.jit(chained.__wrapped__)(x))


def test_smaller_arguments_are_compiled_with_fewer_optimizations():
    def counts() -> list[int]:
        versions = chained.versions  # type: ignore[attr-defined]
        return [version._cache_size() for version in versions]

    # quick, plain, thorough
    for k, size in enumerate((SMALL - 1, MEDIUM - 1, MEDIUM + 1)):
        before = counts()
        chained(jnp.ones(size))
        assert counts() == [count + (k == m) for m, count in enumerate(before)]


def test_loops_are_never_compiled_quickly():
    quick, plain, thorough = powers.versions  # type: ignore[attr-defined]
    before = quick._cache_size(), plain._cache_size(), thorough._cache_size()
    powers(jnp.ones(MEDIUM_LOOP), power=1)
    powers(jnp.ones(MEDIUM_LOOP + 1), power=1)
    after = quick._cache_size(), plain._cache_size(), thorough._cache_size()
    assert after == (before[0], before[1] + 1, before[2] + 1)
