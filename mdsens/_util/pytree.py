"""What trees of arrays must have in common."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from mdsens._util.errors import InputError

__all__ = ["PyTree", "check_same"]

PyTree: TypeAlias = Any


def check_same(tree: PyTree, like: PyTree, name: str, like_name: str, remedy: str) -> None:
    """Raise InputError naming both where two trees differ in structure or in the shape of a leaf."""
    if jax.tree.structure(tree) != jax.tree.structure(like):
        raise InputError(
            f"{name} has the tree {jax.tree.structure(tree)}, but {like_name} has"
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
