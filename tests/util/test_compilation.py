"""Functions compiled with the effort that their arguments are worth."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.compilation import SMALL, compiled


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


def test_small_arguments_are_compiled_with_fewer_optimizations():
    quick, thorough = chained.versions  # type: ignore[attr-defined]
    counts = quick._cache_size(), thorough._cache_size()
    chained(jnp.ones(7))
    assert (quick._cache_size(), thorough._cache_size()) == (counts[0] + 1, counts[1])
    chained(jnp.ones(SMALL + 2))
    assert (quick._cache_size(), thorough._cache_size()) == (counts[0] + 1, counts[1] + 1)
