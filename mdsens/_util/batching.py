"""Batches of configurations, split into members, stacked, and processed in chunks on all cores."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.custom_batching import sequential_vmap
from jax.typing import ArrayLike

from mdsens._util.compilation import compiled
from mdsens._util.pytree import PyTree

__all__ = [
    "concatenate_trees",
    "in_chunks",
    "one_by_one",
    "stack_trees",
    "take_members",
    "unstack_tree",
]

T = TypeVar("T")
# Largest number of particles in the members that one call processes together. With fewer particles
# a call, the time goes into Python rather than into arithmetic: Python took half the time of a
# small member, and kept the cores from working side by side.
PARTICLES = 4096


def _has_tracer(tree: PyTree) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def unstack_tree(batch: PyTree, count: int) -> list[Any]:
    """Split a batch into a list of its first ``count`` members.

    A batch is a nested structure of arrays that all have a leading axis, one entry for each member,
    here of length ``count`` or more.
    """
    leaves, structure = jax.tree.flatten(batch)
    if _has_tracer(leaves):
        return [
            structure.unflatten([jnp.asarray(leaf)[k] for leaf in leaves]) for k in range(count)
        ]
    # Slices of numpy arrays cost next to nothing; each slice of a jax array is a dispatch.
    arrays = [np.asarray(leaf) for leaf in leaves]
    return [structure.unflatten([jnp.asarray(array[k]) for array in arrays]) for k in range(count)]


def stack_trees(members: Sequence[PyTree]) -> Any:
    """Stack the members of a batch, nested structures of arrays, along a new leading axis."""
    if _has_tracer(members):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)

    def stack(*leaves: Any) -> jax.Array:
        return jnp.asarray(np.stack([np.asarray(leaf) for leaf in leaves]))

    return jax.tree.map(stack, *members)


def concatenate_trees(parts: Sequence[PyTree], counts: Sequence[int]) -> Any:
    """Join several batches into one batch that has the members of all of them.

    A batch is a nested structure of arrays with a leading axis, one entry for each member.
    ``parts`` is the list of the batches; of batch ``parts[i]`` the first ``counts[i]`` members are
    taken.
    """
    if _has_tracer(parts):
        return jax.tree.map(
            lambda *x: jnp.concatenate([a[:k] for a, k in zip(x, counts, strict=True)]), *parts
        )

    def join(*leaves: Any) -> jax.Array:
        kept = [np.asarray(x)[:k] for x, k in zip(leaves, counts, strict=True)]
        return jnp.asarray(np.concatenate(kept))

    return jax.tree.map(join, *parts)


@compiled
def take_members(batch: PyTree, which: ArrayLike) -> Any:
    """Select members of a batch by their indices ``which``, and return them as a new batch.

    A batch is a nested structure of arrays with a leading axis, one entry for each member.
    """
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[which], batch)


def _thread_settings() -> tuple[Any, ...]:
    """Return the floating-point type and the device that jax uses in the current thread.

    Both can differ between threads, because a ``with`` statement of jax sets them for one thread.
    """
    array = jnp.zeros(())
    return array.dtype, array.devices()


def in_chunks(
    run: Callable[[Any, int], T],
    batch: PyTree,
    count: int,
    n: int,
    interrupt: Callable[[], None] | None = None,
) -> list[T]:
    """Process a batch in chunks of members, on all cores, and return the result of each chunk.

    All chunks have the same size, so that the same compiled code serves every chunk: the last chunk
    is filled up by repeating the last member. Threads work side by side, since compiled code and
    factorizations release Python's lock. A batch that jax traces is processed in one thread.

    Args:
      run: function that is called as ``run(chunk, k)`` for each chunk; only the first k members of
        the chunk are to be used, the others are repetitions.
      batch: a nested structure of arrays with a leading axis of length ``count``.
      count: number of members.
      n: number of particles of a member; the more particles, the fewer members are in a chunk.
      interrupt: function that makes all calls of ``run`` return early, to be called at Ctrl-C,
        which reaches the main thread alone; None to raise KeyboardInterrupt at once.
    """
    cores = min(os.cpu_count() or 1, count)
    size = min(math.ceil(count / cores), max(1, PARTICLES // max(n, 1)))
    # the same number of chunks, of sizes as equal as possible
    size = math.ceil(count / math.ceil(count / size))

    def run_chunk(start: int) -> T:
        which = np.minimum(np.arange(start, start + size), count - 1)
        return run(take_members(batch, which), min(size, count - start))

    starts = range(0, count, size)
    if cores < 2 or len(starts) < 2 or _has_tracer(batch):
        return [run_chunk(start) for start in starts]
    pool = ThreadPoolExecutor(cores)
    try:
        # A new thread does not see what a ``with jax.enable_x64(…)`` of this thread has set.
        if pool.submit(_thread_settings).result() != _thread_settings():
            return [run_chunk(start) for start in starts]
        results = [pool.submit(run_chunk, start) for start in starts]
        try:
            return [result.result() for result in results]
        except KeyboardInterrupt:
            if interrupt is None:
                raise
            interrupt()
            return [result.result() for result in results]
    finally:
        # after an error, chunks that have not begun are dropped
        pool.shutdown(cancel_futures=True)


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that ``jax.vmap`` on a CPU calls it for one member after the other.

    On a CPU, jaxlib factorizes a batch of matrices in a pool of threads, and waits for the results
    on a thread of the same pool. Two such factorizations that run at the same time on two cores
    then wait forever (observed with jaxlib 0.10.1).
    """
    in_sequence = sequential_vmap(function)

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        return (in_sequence if jax.default_backend() == "cpu" else function)(*arguments)

    return run
