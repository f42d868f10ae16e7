"""Detection of degenerate solutions, where a constraint is about to become active or inactive.

The derivative of a minimum under constraints jumps at a degenerate solution: it differs between a
change of the parameters and the opposite change. The conditions of
:mod:`mdsens.implicit.conditions.optimality` give at best one of the two derivatives. Almost no
solution is degenerate.
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
    """The outcome of a test whether the derivative of a solution jumps at this solution.

    Attributes:
      status: a :class:`Result` as an int32 array: DEGENERATE_CONSTRAINT where the derivative
        jumps, NOT_FINITE where ``value`` is NaN, else CONVERGED.
      value: the number that was tested, as :func:`complementarity` and :func:`kinked` define it.
    """

    status: Array
    value: Array


def _margin(value: Array, degenerate: Array) -> Margin:
    status = jnp.where(degenerate, int(Result.DEGENERATE_CONSTRAINT), int(Result.CONVERGED))
    # Last, since a comparison with NaN is False: ``degenerate`` would make NaN look converged.
    status = jnp.where(jnp.isnan(value), int(Result.NOT_FINITE), status)
    return Margin(status.astype(jnp.int32), value)


def complementarity(
    inequality: Callable[..., PyTree], x: KKTPoint, *args: PyTree, tolerance: float = 1e-7
) -> Margin:
    """Check strict complementarity: each inequality has a positive multiplier or a positive slack.

        value = min_i max(lambda_i, -g_i(x, *args))

    Inequality i is g_i(x, *args) <= 0, with the Lagrange multiplier lambda_i and the slack -g_i.
    Where the value is zero, the Jacobian of the condition
    :func:`mdsens.implicit.conditions.optimality.kkt` is singular, and the solution has one-sided
    derivatives only.

    Args:
      inequality: the function g.
      x: the solution with its multipliers.
      args: the other arguments of g.
      tolerance: largest value at which the status is DEGENERATE_CONSTRAINT, in the units of lambda
        and g; choose a tolerance above the error of the solver.

    Returns:
      the value and the status as a :class:`Margin`; without inequalities the value is infinite.
    """
    slack = Traceable("inequality", inequality)(x.primal, *args)
    check_same(
        slack,
        x.inequality,
        "inequality(x, *args)",
        "the multipliers x.inequality",
        "give one multiplier for each constraint",
    )
    margins = jax.tree.map(lambda force, g: jnp.maximum(force, -g), x.inequality, slack)
    value = jnp.min(ravel_pytree(margins)[0], initial=jnp.inf)
    return _margin(value, value <= tolerance)


# Number of probe directions. More than one, since a direction may lie along the kink and miss it;
# each has entries of every size and sign, and no two directions are alike.
_DIRECTIONS = 4
# Largest relative change of the derivative that does not count as a jump. Curvature alone changes
# the derivative, too, but far less than this over the 2e-6 of a unit between the two points.
_JUMP = 1e-3


def kinked(F: Callable[..., PyTree], x: PyTree, *args: PyTree, radius: float = 1e-6) -> Margin:
    """Probe whether the derivative of the function F(x, *args) jumps near a solution x.

    x solves F(x, *args) = 0, or is a fixed point, x = F(x, *args). The derivative jumps where a
    projection in F changes from one face of its set to another.

        value = max_v |J(p + r v) v - J(p - r v) v| / max(|J(p + r v) v|, |J(p - r v) v|)
        p = (x, args),  J = dF/dp

    The maximum is over four fixed directions v. These move every number in x and every
    floating-point number in args by about r times the root mean square of the array that contains
    the number (by about r where the root mean square is zero). |.| is the largest absolute entry.

    Args:
      F: the function ``F(x, *args)``, such as a condition F or a map T of
        :mod:`mdsens.implicit.conditions.optimality`. For the condition ``kkt`` use
        :func:`complementarity`, since the derivative of ``kkt`` never jumps.
      x: the solution.
      args: the other arguments of F.
      radius: the radius r, larger than the error of the solver. With a large radius, curvature is
        mistaken for a kink.

    Returns:
      a :class:`Margin` with the largest relative jump as its value, and with the status
      DEGENERATE_CONSTRAINT where the value is above 1e-3. The probe is no proof: it misses a
      smaller jump, and a kink that lies along all four directions.
    """
    F = Traceable("F", F)
    leaves, structure = jax.tree.flatten((x, args))
    moved = [
        i for i, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    ]
    flat, unravel = ravel_pytree([jnp.asarray(leaves[i]) for i in moved])
    sizes = [jnp.full_like(leaves[i], _root_mean_square(jnp.asarray(leaves[i]))) for i in moved]
    scale, _ = ravel_pytree(sizes)

    def image(flat: Array) -> Array:
        whole = list(leaves)
        for i, leaf in zip(moved, unravel(flat), strict=True):
            whole[i] = leaf
        y, others = jax.tree.unflatten(structure, whole)
        return ravel_pytree(F(y, *others))[0]

    def jump(k: Array) -> Array:
        """Compute the relative jump of the derivative of F at the solution x, along direction k.

        Direction k is one of a few fixed directions in which x and the other arguments of F are
        moved. The derivative a little ahead of the solution is compared with that a little behind.
        """
        entries = jnp.arange(1, flat.size + 1, dtype=flat.dtype)
        v = scale * jnp.cos((k + 1) * entries**2 + k)
        _, ahead = jax.jvp(image, (flat + radius * v,), (v,))
        _, behind = jax.jvp(image, (flat - radius * v,), (v,))
        largest = jnp.maximum(jnp.max(jnp.abs(ahead)), jnp.max(jnp.abs(behind)))
        return jnp.max(jnp.abs(ahead - behind)) / jnp.where(largest == 0, 1, largest)

    # lax.map and not a loop of Python, so that F is traced once for all directions.
    value = jnp.max(jax.lax.map(jump, jnp.arange(_DIRECTIONS)))
    return _margin(value, value > _JUMP)


def _root_mean_square(leaf: Array) -> Array:
    """Compute the root mean square of the entries of an array; 1 where all entries are zero."""
    size = jnp.sqrt(jnp.mean(leaf**2))
    return jnp.where(size > 0, size, 1.0)
