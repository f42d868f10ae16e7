"""Whether a solution stands where its derivative jumps: a constraint about to open or close.

Almost every solution stands elsewhere; where one does not, the derivative of
:mod:`mdsens.implicit.conditions.optimality`'s conditions is that of one side at best, and these say
so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from mdsens._util.portable import Portable
from mdsens._util.pytree import PyTree, check_same
from mdsens._util.user_functions import Traceable
from mdsens.implicit.conditions.optimality import KKTPoint
from mdsens.implicit.linear.result import Result

__all__ = ["Margin", "complementarity", "kinked"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Margin(Portable):
    """How far a solution is from where its derivative jumps.

    Attributes:
      status: CONVERGED or DEGENERATE_CONSTRAINT, as an int32 array.
      value: see the function that made it.
    """

    status: Array
    value: Array


def _margin(value: Array, degenerate: Array) -> Margin:
    status = jnp.where(degenerate, int(Result.DEGENERATE_CONSTRAINT), int(Result.CONVERGED))
    return Margin(
        jnp.where(jnp.isnan(value), int(Result.NOT_FINITE), status).astype(jnp.int32), value
    )


def complementarity(
    inequality: Callable[..., PyTree], x: KKTPoint, *args: PyTree, tolerance: float = 1e-7
) -> Margin:
    """Whether each inequality either holds with a force or has room (strict complementarity).

        value = min_i max(lambda_i, -g_i(x, *args))

    Where it is zero the Jacobian of :func:`mdsens.implicit.conditions.optimality.kkt` is singular,
    and the solution has a derivative to each side only.

    Args:
      inequality: g of :func:`mdsens.implicit.conditions.optimality.kkt`.
      x: the solution with its multipliers.
      tolerance: DEGENERATE_CONSTRAINT from here down, in the units of lambda and g; above the
        solver's error.

    Returns:
      Margin; the value is infinite without inequalities.
    """
    slack = Traceable("inequality", inequality)(x.primal, *args)
    check_same(
        slack,
        x.inequality,
        "inequality(x, *args)",
        "the multipliers x.inequality",
        "one a constraint",
    )
    either = jax.tree.map(lambda force, g: jnp.maximum(force, -g), x.inequality, slack)
    value = jnp.min(ravel_pytree(either)[0], initial=jnp.inf)
    return _margin(value, value <= tolerance)


# Four, because one may lie along the kink: each with entries of every size and sign, no two of them
# alike.
_DIRECTIONS = 4
# Curvature changes the derivative over 2e-6 of a unit, too, though far less than this.
_JUMP = 1e-3


def kinked(F: Callable[..., PyTree], x: PyTree, *args: PyTree, radius: float = 1e-6) -> Margin:
    """Whether the derivative of a condition F or a map T jumps nearby, as where a projection
    changes its face.

        value = max_v |J(p + r v) v - J(p - r v) v| / max(|J(p + r v) v|, |J(p - r v) v|),   p = (x, args)

    over four fixed directions v that move every unknown and every floating-point argument, by r in
    units of the root mean square of its leaf (of one, where that is zero). Norms are largest
    entries.

    Args:
      F: ``F(x, *args)`` or ``T(x, *args)`` as :mod:`mdsens.implicit.conditions.optimality` makes
        them; of ``kkt`` see :func:`complementarity`, since nothing in it jumps.
      x: the solution.
      args: as the root gets them.
      radius: how near counts; above the solver's error. Larger radii take a bend for a kink.

    Returns:
      Margin with the largest jump as its value: DEGENERATE_CONSTRAINT where it is above 1e-3. A
      probe, no proof: a jump is missed where it is smaller, or lies along all four directions.
    """
    F = Traceable("F", F)
    leaves, structure = jax.tree.flatten((x, args))
    moved = [
        i for i, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    ]
    flat, unravel = ravel_pytree([jnp.asarray(leaves[i]) for i in moved])
    scale, _ = ravel_pytree(
        [jnp.full_like(leaves[i], _size(jnp.asarray(leaves[i]))) for i in moved]
    )

    def image(flat: Array) -> Array:
        whole = list(leaves)
        for i, leaf in zip(moved, unravel(flat), strict=True):
            whole[i] = leaf
        y, others = jax.tree.unflatten(structure, whole)
        return ravel_pytree(F(y, *others))[0]

    def jump(k: Array) -> Array:
        entries = jnp.arange(1, flat.size + 1, dtype=flat.dtype)
        v = scale * jnp.cos((k + 1) * entries**2 + k)
        _, ahead = jax.jvp(image, (flat + radius * v,), (v,))
        _, behind = jax.jvp(image, (flat - radius * v,), (v,))
        largest = jnp.maximum(jnp.max(jnp.abs(ahead)), jnp.max(jnp.abs(behind)))
        return jnp.max(jnp.abs(ahead - behind)) / jnp.where(largest == 0, 1, largest)

    value = jnp.max(jax.lax.map(jump, jnp.arange(_DIRECTIONS)))
    return _margin(value, value > _JUMP)


def _size(leaf: Array) -> Array:
    size = jnp.sqrt(jnp.mean(leaf**2))
    return jnp.where(size > 0, size, 1.0)
