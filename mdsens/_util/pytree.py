"""Comparison of trees (nested dicts, lists and tuples) of arrays, by structure and shapes."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from mdsens._util.errors import InputError

__all__ = ["PyTree", "check_same"]

# Nested dicts, lists, tuples and registered dataclasses of arrays.
PyTree: TypeAlias = Any


def check_same(tree: PyTree, like: PyTree, name: str, like_name: str, remedy: str) -> None:
    """Raise InputError if two nested structures of arrays differ in structure or in a shape.

    Args:
      tree: the nested dicts, lists and tuples of arrays to check.
      like: a tree with the right structure and shapes.
      name, like_name: names of ``tree`` and ``like``, for the message.
      remedy: what the user can do, for the message.
    """
    if jax.tree.structure(tree) != jax.tree.structure(like):
        raise InputError(
            f"{name} has the structure {jax.tree.structure(tree)}, but {like_name} has"
            f" {jax.tree.structure(like)}; {remedy}"
        )
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(like), strict=True
    ):
        if jnp.shape(leaf) != jnp.shape(other):
            raise InputError(
                f"{name}{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, but {like_name}"
                f" has {jnp.shape(other)}; {remedy}"
            )
