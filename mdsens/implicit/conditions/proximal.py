"""Proximal operators: one step against a penalty, with derivatives that are finite everywhere.

    prox(y, scaling, ...) = argmin_x |x - y|^2 / 2 + scaling g(x, ...)

Arguments are the point, the scaling (the step of
:func:`mdsens.implicit.conditions.optimality.proximal_gradient`), then what g takes, so that an
operator may be handed to it as it is where the root's arguments are the penalty's. On trees, leaf
by leaf; strengths are scalars or broadcast to each leaf. At a kink, where an entry (a group) is
about to leave zero, the derivative is that of the entry held at zero; without a strength there is
no kink.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from mdsens._util.pytree import PyTree

__all__ = ["elastic_net", "free", "group_lasso", "indicator", "lasso", "non_negative", "ridge"]


def lasso(y: PyTree, scaling: Array | float, strength: Array | float = 1.0) -> PyTree:
    """Soft threshold, g = strength sum |x|: each entry is moved towards zero by scaling strength,
    and not past it.
    """
    by = scaling * strength

    def threshold(y: Array) -> Array:
        return jnp.where((jnp.abs(y) <= by) & (by > 0), 0.0, y - jnp.sign(y) * by)

    return jax.tree.map(threshold, y)


def non_negative(y: PyTree, scaling: Array | float, strength: Array | float = 0.0) -> PyTree:
    """max(y - scaling strength, 0), g = strength sum x where no entry is negative, and infinite
    elsewhere.
    """
    return jax.tree.map(lambda y: jax.nn.relu(y - scaling * strength), y)


def ridge(y: PyTree, scaling: Array | float, strength: Array | float = 1.0) -> PyTree:
    """y / (1 + scaling strength), g = strength / 2 sum x^2."""
    return jax.tree.map(lambda y: y / (1 + scaling * strength), y)


def elastic_net(
    y: PyTree, scaling: Array | float, lasso_strength: Array | float, ridge_strength: Array | float
) -> PyTree:
    """Soft threshold, then shrinkage: g = lasso_strength sum |x| + ridge_strength / 2 sum x^2."""
    return ridge(lasso(y, scaling, lasso_strength), scaling, ridge_strength)


def group_lasso(y: PyTree, scaling: Array | float, strength: Array | float = 1.0) -> PyTree:
    """Soft threshold of a norm, g = strength |x|, over all leaves of the tree together.

        prox = max(1 - scaling strength / |y|, 0) y

    A group for each row of an array: ``jax.vmap(group_lasso, (0, None, None))``.
    """
    flat, unravel = ravel_pytree(y)
    by, square = scaling * strength, jnp.sum(flat**2)
    held = (square <= by**2) & (by > 0)
    size = jnp.sqrt(jnp.where(held | (square == 0), 1.0, square))
    return unravel(jnp.where(held, 0.0, 1 - by / size) * flat)


def free(y: PyTree, scaling: Array | float, *args: PyTree) -> PyTree:
    """y, g = 0: for a block of
    :func:`mdsens.implicit.conditions.optimality.block_proximal_gradient` without a penalty.
    """
    return y


def indicator(projection: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """A projection(y, *args) as the proximal operator of its set: g is zero in it and infinite
    outside.
    """
    return lambda y, scaling, *args: projection(y, *args)
