"""Trees (nested dicts, lists and tuples) of arrays: names of their leaves, comparison, sums.

An array is a tree of one leaf. A parameter may be a tree, such as the weights of a neural network;
the name of each of its leaves is its path, ``weights.layers.0.w``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.errors import InputError, short

__all__ = [
    "PyTree",
    "advanced",
    "arrays_of",
    "check_same",
    "count_numbers",
    "described",
    "from_named",
    "is_leaf",
    "largest_entry",
    "matched_leaves",
    "matching",
    "named_leaves",
    "require_array",
    "split_last_axis",
]

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


def is_leaf(value: object) -> bool:
    """Return whether a value is a leaf of trees, such as an array, and no container of leaves."""
    return jax.tree_util.all_leaves([value])


def arrays_of(values: Mapping[str, PyTree]) -> dict[str, Any]:
    """Return those of some values by name that are arrays, without those that are trees."""
    return {name: value for name, value in values.items() if is_leaf(value)}


def named_leaves(values: Mapping[str, PyTree]) -> list[tuple[str, Any]]:
    """List the leaves of trees by name, each with its own name.

    The name of an array is its name among ``values``; that of a leaf of a tree is its path, such as
    ``weights.layers.0.w``. The order is that of ``values``, and within a tree that of jax.
    """
    return [
        (_extended(name, path), leaf)
        for name, value in values.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(value)
    ]


def from_named(like: Mapping[str, PyTree], leaves: Mapping[str, Any]) -> dict[str, PyTree]:
    """Return trees by name with the structures of ``like``, of leaves by their own names.

    This undoes :func:`named_leaves`.
    """
    return {
        name: jax.tree_util.tree_map_with_path(
            lambda path, _, name=name: leaves[_extended(name, path)], tree
        )
        for name, tree in like.items()
    }


def _extended(name: str, path: tuple[Any, ...]) -> str:
    """Append the path of a node to the name of its tree."""
    if not path:
        return name
    return f"{name}.{jax.tree_util.keystr(path, simple=True, separator='.')}"


def matching(
    function: Callable[[str, Any, Any], Any], value: object, like: PyTree, name: str, argument: str
) -> Any:
    """Apply a function to each leaf of a user's tree, which must have the structure of another.

    Args:
      function: function of a leaf's name, of what the user gives for it (an array, a number, or a
        list of numbers), and of the leaf of ``like``.
      value: the tree that the user gives.
      like: the tree with the right structure; for an array any ``value`` goes to ``function``.
      name: name of the parameter, with which the names of its leaves begin.
      argument: name of the argument that has the tree under this name, for messages.

    Returns:
      the results, in the structure of ``like``.

    Raises:
      InputError: the structures differ; the message names the first place where they do.
    """
    if is_leaf(like):
        return function(name, value, like)
    results = [function(*leaf) for leaf in matched_leaves(value, like, name, argument)]
    return jax.tree.structure(like).unflatten(results)


def matched_leaves(
    value: object, like: PyTree, name: str, argument: str
) -> list[tuple[str, Any, Any]]:
    """List the leaves of two trees of one structure: name, what the user gives, leaf of ``like``.

    The arguments and the error are those of :func:`matching`.
    """
    difference = _first_difference(value, like, ())
    if difference is not None:
        path, actual, expected = difference
        raise InputError(
            f"{argument}[{_extended(name, path)!r}] is {described(actual)}, and the parameter has"
            f" {described(expected)} there: give a tree of the same structure."
        )
    named = jax.tree_util.tree_leaves_with_path(like)
    leaves = jax.tree.structure(like).flatten_up_to(value)
    return [
        (_extended(name, path), leaf, other)
        for (path, other), leaf in zip(named, leaves, strict=True)
    ]


def _first_difference(
    value: object, like: PyTree, path: tuple[Any, ...]
) -> tuple[tuple[Any, ...], Any, Any] | None:
    """Find the first node at which two trees differ, as (path, node, node of ``like``), or None.

    Where ``like`` has a leaf, any value will do: a list of numbers may stand for an array.
    """
    if is_leaf(like):
        return None
    children, structure = _children(like)
    others, other_structure = _children(value)
    if structure != other_structure:
        return path, value, like
    for (key, child), (_, other) in zip(children, others, strict=True):
        difference = _first_difference(other, child, (*path, *key))
        if difference is not None:
            return difference
    return None


def _children(tree: PyTree) -> tuple[list[tuple[Any, Any]], Any]:
    """Return the children of a tree with their keys, and the structure of its first level."""
    try:
        return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)
    except (TypeError, ValueError) as error:  # keys of a dict that have no order
        raise InputError(
            f"{described(tree)} is no tree of jax: give each dict keys of one kind, such as texts."
        ) from error


def described(value: object) -> str:
    """Describe a node of a tree in a few words, for messages."""
    if value is None:
        return "None"
    if isinstance(value, Mapping):
        keys = ", ".join(map(str, value))
        return f"a {type(value).__name__} with {keys}" if keys else "an empty dict"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    if is_leaf(value):
        shape = getattr(value, "shape", None)
        return short(value) if shape is None else f"an array of shape {shape}"
    return f"a {type(value).__name__}"


def require_array(name: str, value: PyTree, user: str, remedy: str = "give an array.") -> None:
    """Raise InputError if the value of a parameter is a tree and no array.

    Args:
      name: name of the parameter.
      value: its value.
      user: the potential or constraint that has the parameter, for the message.
      remedy: what to do, for the message.
    """
    if not is_leaf(value):
        raise InputError(
            f"parameter {name} is a tree, {described(value)}, and {user} takes one array: {remedy}"
        )


def count_numbers(tree: PyTree) -> int:
    """Return how many numbers all arrays of a tree have together."""
    return sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(tree))


def largest_entry(tree: PyTree) -> float:
    """Return the largest absolute value of all arrays of a tree; 0 where it has no numbers."""
    sizes = [np.max(np.abs(np.asarray(leaf)), initial=0.0) for leaf in jax.tree.leaves(tree)]
    # numpy's maximum is NaN where one of them is, unlike Python's
    return float(np.max(sizes, initial=0.0))


def advanced(values: PyTree, rates: PyTree, t: float) -> Any:
    """Return values + t rates, for two trees of one structure."""
    return jax.tree.map(lambda value, rate: value + t * rate, values, rates)


def split_last_axis(array: Any, like: PyTree) -> Any:
    """Take the last axis of an array for all numbers of a tree, one after the other.

    Args:
      array: (..., m), of jax or of numpy.
      like: a tree of arrays of m numbers together.

    Returns:
      a tree of the structure of ``like``, of arrays (..., *shape of the leaf).
    """
    leaves, structure = jax.tree.flatten(like)
    parts = []
    start = 0
    for leaf in leaves:
        part = array if len(leaves) == 1 else array[..., start : start + leaf.size]
        parts.append(part.reshape(*array.shape[:-1], *leaf.shape))
        start += leaf.size
    return structure.unflatten(parts)
