"""Proximal operators of common penalties, with derivatives that are finite everywhere.

    prox(y, scaling, ...) = argmin_x |x - y|^2 / 2 + scaling g(x, ...)

The arguments are the point y, the scaling (the step of
:func:`mdsens.implicit.conditions.optimality.proximal_gradient`) and the parameters of the penalty
g. Where the arguments ``args`` of the fixed-point map T(x, *args) are just these parameters, the
operator itself can be given to ``proximal_gradient``; otherwise wrap the operator in a function of
``(y, scaling, *args)``. Nested containers (trees) of arrays are treated array by array. A strength,
the factor of a penalty, is a scalar, or broadcasts to each array. At a kink, where an entry (or a
group of entries) is about to leave zero, the derivative is that of an entry that is constantly
zero; with a strength of zero there is no kink.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from mdsens._util.pytree import PyTree

__all__ = ["elastic_net", "free", "group_lasso", "lasso", "non_negative", "ridge"]


def lasso(y: PyTree, scaling: Array | float, strength: Array | float = 1.0) -> PyTree:
    """Apply a soft threshold to y: the proximal operator of the penalty g = strength sum |x|.

    Each entry of y moves towards zero by scaling * strength, and stops at zero. ``scaling`` is the
    step of the proximal gradient.
    """
    threshold = scaling * strength

    def soften(y: Array) -> Array:
        # without a threshold an entry of zero is no kink: its derivative is one, not zero
        is_zero = (jnp.abs(y) <= threshold) & (threshold > 0)
        return jnp.where(is_zero, 0.0, y - jnp.sign(y) * threshold)

    return jax.tree.map(soften, y)


def non_negative(y: PyTree, scaling: Array | float, strength: Array | float = 0.0) -> PyTree:
    """Return max(y - scaling strength, 0), the proximal operator of g = strength sum x on x >= 0.

    The penalty g is infinite where an entry of x is negative. ``scaling`` is the step of the
    proximal gradient.
    """
    # relu has the derivative 0 at 0; jnp.maximum would have 1/2, that of neither side.
    return jax.tree.map(lambda y: jax.nn.relu(y - scaling * strength), y)


def ridge(y: PyTree, scaling: Array | float, strength: Array | float = 1.0) -> PyTree:
    """Return y / (1 + scaling strength), the proximal operator of g = strength / 2 sum x^2.

    ``scaling`` is the step of the proximal gradient.
    """
    return jax.tree.map(lambda y: y / (1 + scaling * strength), y)


def elastic_net(
    y: PyTree, scaling: Array | float, lasso_strength: Array | float, ridge_strength: Array | float
) -> PyTree:
    """Apply :func:`lasso` to y, then :func:`ridge`: the proximal operator of the sum of penalties.

    The penalty is g = lasso_strength sum |x| + ridge_strength / 2 sum x^2.
    """
    return ridge(lasso(y, scaling, lasso_strength), scaling, ridge_strength)


def group_lasso(y: PyTree, scaling: Array | float, strength: Array | float = 1.0) -> PyTree:
    """Shorten y by a soft threshold of the norm |y|: the proximal operator of g = strength |x|.

        prox = max(1 - scaling strength / |y|, 0) y

    ``scaling`` is the step of the proximal gradient. The norm is over all arrays in y together,
    which form one group. To make each row of an array a group, use
    ``jax.vmap(group_lasso, (0, None, None))``.
    """
    flat, unravel = ravel_pytree(y)
    threshold = scaling * strength
    square = jnp.sum(flat**2)
    is_zero = (square <= threshold**2) & (threshold > 0)
    # The root of zero has no derivative, not even where a later jnp.where leaves it out.
    size = jnp.sqrt(jnp.where(is_zero | (square == 0), 1.0, square))
    return unravel(jnp.where(is_zero, 0.0, 1 - threshold / size) * flat)


def free(y: PyTree, scaling: Array | float, *args: PyTree) -> PyTree:
    """Return y unchanged: the proximal operator of a block of unknowns without a penalty.

    The function is meant for
    :func:`mdsens.implicit.conditions.optimality.block_proximal_gradient`.
    """
    return y
