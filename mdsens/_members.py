"""The members of a batch, one after the other on each core."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

__all__ = ["apart", "each", "together"]


def apart(batch: Any, count: int) -> list[Any]:
    """The trees that a tree of arrays with a leading axis of ``count`` holds."""
    leaves, kind = jax.tree.flatten(batch)
    return [kind.unflatten(parts) for parts in zip(*(list(jnp.asarray(leaf)) for leaf in leaves), strict=True)][:count]


def together(members: Sequence[Any]) -> Any:
    """One tree whose arrays have a leading axis, from trees of one kind."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


def _settings() -> tuple[Any, ...]:
    """What a ``with`` of jax may have set for this thread alone: precision and device."""
    array = jnp.zeros(())
    return array.dtype, array.devices()


def each(run: Callable[[int], Any], count: int, done: Callable[[], None] = lambda: None) -> list[Any]:
    """``run(k)`` for each k below ``count``, as many at a time as there are cores; ``done`` after each.

    A core that is done with a member takes the next one. The first goes alone, so that what it compiles is there for
    the others. Compiled code and factorisations let go of Python's lock; what is traced stays in one thread.
    """

    def one(k: int) -> Any:
        answer = run(k)
        done()
        return answer

    cores = min(os.cpu_count() or 1, count - 1)
    if cores < 2 or isinstance(jnp.zeros(()), Tracer):
        return [one(k) for k in range(count)]
    pool = ThreadPoolExecutor(cores)
    try:
        if pool.submit(_settings).result() != _settings():
            return [one(k) for k in range(count)]
        return [one(0), *pool.map(one, range(1, count))]
    finally:
        pool.shutdown(cancel_futures=True)
