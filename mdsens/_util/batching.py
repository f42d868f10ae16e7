"""The members of a batch: apart, together, and some at a time on each core."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

__all__ = ["apart", "in_chunks", "joined", "taken", "together"]

T = TypeVar("T")
PARTICLES = (
    4096  # of the members that are served by one call: fewer, and it is Python that takes the time
)


def _traced(tree: Any) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def apart(batch: Any, count: int) -> list[Any]:
    """The trees that a tree of arrays with a leading axis of ``count`` or more holds."""
    leaves, kind = jax.tree.flatten(batch)
    if _traced(leaves):
        return [kind.unflatten([jnp.asarray(leaf)[k] for leaf in leaves]) for k in range(count)]
    arrays = [np.asarray(leaf) for leaf in leaves]  # slices of them cost next to nothing
    return [kind.unflatten([jnp.asarray(array[k]) for array in arrays]) for k in range(count)]


def together(members: Sequence[Any]) -> Any:
    """One tree whose arrays have a leading axis, from trees of one kind."""
    if _traced(members):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    return jax.tree.map(
        lambda *leaves: jnp.asarray(np.stack([np.asarray(leaf) for leaf in leaves])), *members
    )


def joined(parts: Sequence[Any], counts: Sequence[int]) -> Any:
    """One batch from several of one kind, and of each its first members, so many."""
    if _traced(parts):
        return jax.tree.map(
            lambda *x: jnp.concatenate([a[:k] for a, k in zip(x, counts, strict=True)]), *parts
        )

    def join(*leaves: Any) -> jax.Array:
        return jnp.asarray(
            np.concatenate([np.asarray(x)[:k] for x, k in zip(leaves, counts, strict=True)])
        )

    return jax.tree.map(join, *parts)


@jax.jit
def taken(batch: Any, which: Any) -> Any:
    """Some members of a batch."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[which], batch)


def _settings() -> tuple[Any, ...]:
    """What a ``with`` of jax may have set for this thread alone: precision and device."""
    array = jnp.zeros(())
    return array.dtype, array.devices()


def in_chunks(run: Callable[[Any, int], T], batch: Any, count: int, n: int) -> list[T]:
    """``run(some, k)`` for some members of a batch at a time, of which the first k count; on all
    cores.

    The last ones are made up to the size of the others by repeating a member, so that all are
    served by the same compiled code. That and factorizations let go of Python's lock; what is
    traced stays in one thread.

    Args:
      batch: a tree of arrays with a leading axis of ``count``.
      n: particles of a member.
    """
    cores = min(os.cpu_count() or 1, count)
    size = min(math.ceil(count / cores), max(1, PARTICLES // max(n, 1)))
    size = math.ceil(count / math.ceil(count / size))

    def one(start: int) -> T:
        which = np.minimum(np.arange(start, start + size), count - 1)
        return run(taken(batch, which), min(size, count - start))

    starts = range(0, count, size)
    if cores < 2 or len(starts) < 2 or _traced(batch):
        return [one(start) for start in starts]
    pool = ThreadPoolExecutor(cores)
    try:
        if pool.submit(_settings).result() != _settings():
            return [one(start) for start in starts]
        return list(pool.map(one, starts))
    finally:
        pool.shutdown(cancel_futures=True)
