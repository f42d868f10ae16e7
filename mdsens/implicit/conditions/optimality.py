"""The catalogue of optimality conditions: what a solution satisfies, made from the ingredients of
its problem.

| row | condition | ingredients |
| --- | --- | --- |
| ``stationary`` | grad f = 0 | f |
| ``kkt`` | grad f + multipliers' forces = 0, h = 0, lambda g = 0 | f, h, g |
| ``projected_gradient`` | x = P(x - s grad f) | f, projection |
| ``proximal_gradient`` | x = prox(x - s grad f, s) | f, prox |
| ``block_proximal_gradient`` | x_j = prox_j(x_j - s_j grad_j f, s_j) | f, a prox and a step each |
| ``mirror_descent`` | x = P(m(x) - s grad f) | f, projection, mirror map |
| ``newton`` | x = x - s (dF/dx)^-1 F | F |
| ``conic_residual`` | the homogeneous self-dual embedding | cones; c, A, b are its args |

A condition F(x, *args) = 0 goes to :func:`mdsens.implicit.root`, a map with x = T(x, *args) to
:func:`mdsens.implicit.fixed_point`. Every ingredient takes ``(x, *args)`` with the same args, and
picks what it needs:

    T = projected_gradient(lambda x, theta: energy(x, theta), lambda x, theta: projections.box(x,
    0.0, 1.0)) solution = fixed_point(T)(any_solver)

The step of a fixed point changes neither its solution nor the derivative, only the conditioning of
the solve. Blondel et al., Efficient and Modular Implicit Differentiation, arXiv:2105.15183, table
1.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.dtypes import float0
from jax.flatten_util import ravel_pytree

from mdsens._util.errors import InputError
from mdsens._util.portable import Portable
from mdsens._util.pytree import PyTree, check_same
from mdsens.implicit._closures import hoist
from mdsens.implicit.conditions.conic import conic_residual
from mdsens.implicit.linear.operators import Auto, Method, Operator
from mdsens.implicit.linear.solution import linear_solve

__all__ = [
    "KKTPoint",
    "block_proximal_gradient",
    "conic_residual",
    "kkt",
    "kl_map",
    "mirror_descent",
    "newton",
    "projected_gradient",
    "proximal_gradient",
    "softmax",
    "stationary",
]

Ingredient: TypeAlias = Callable[..., PyTree]
_AUTO = Auto()


def stationary(f: Callable[..., Array]) -> Ingredient:
    """F(x, *args) = grad_x f(x, *args), for a minimum, maximum or saddle of f.

    Declare ``symmetric=True`` to root, at a minimum ``positive_semidefinite=True`` too.
    """
    return jax.grad(f)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KKTPoint(Portable):
    """The unknowns of a constrained minimum, and the equations that hold there.

    Attributes:
      primal: the minimum, any tree.
      equality: multipliers, a tree like h(x, *args); None where there are no equalities.
      inequality: multipliers, a tree like g(x, *args), none negative; None where there are no
        inequalities.
    """

    primal: PyTree
    equality: PyTree = None
    inequality: PyTree = None


def kkt(
    f: Callable[..., Array],
    equality: Ingredient | None = None,
    inequality: Ingredient | None = None,
) -> Ingredient:
    """F of a minimum of f subject to h = 0 and g <= 0, with its multipliers (Karush, Kuhn, Tucker).

        grad f + (dh/dx)^T nu + (dg/dx)^T lambda = 0,   h = 0,   lambda g = 0

    Args:
      f: ``f(x, *args)``, a scalar.
      equality: ``h(x, *args)``, a tree of arrays, zero at the solution.
      inequality: ``g(x, *args)``, a tree of arrays, nowhere positive at the solution.

    Returns:
      F on :class:`KKTPoint`: the solver returns the multipliers, and they have derivatives. Its
      Jacobian is symmetric and indefinite with equalities alone (declare ``symmetric=True``),
      unsymmetric with inequalities. It is singular where the gradients of what holds depend on each
      other, and where both lambda and g are zero: see
      :func:`mdsens.implicit.conditions.degeneracy.complementarity`.

    Raises:
      InputError: when called, multipliers missing, too many, or not shaped like their constraint.
    """

    def F(x: KKTPoint, *args: PyTree) -> KKTPoint:
        gap = _held(equality, x.primal, x.equality, args, "equality")
        slack = _held(inequality, x.primal, x.inequality, args, "inequality")

        def lagrangian(primal: PyTree) -> Array:
            value = f(primal, *args)
            if equality is not None:
                value += _dot(x.equality, equality(primal, *args))
            if inequality is not None:
                value += _dot(x.inequality, inequality(primal, *args))
            return value

        return KKTPoint(
            jax.grad(lagrangian)(x.primal), gap, jax.tree.map(jnp.multiply, x.inequality, slack)
        )

    return F


def _held(
    constraint: Ingredient | None,
    x: PyTree,
    multipliers: PyTree,
    args: tuple[PyTree, ...],
    name: str,
) -> PyTree:
    """The constraint's value, with multipliers known to fit it."""
    if (constraint is None) != (multipliers is None):
        there, lacks = (
            ("constraint", "multipliers") if multipliers is None else ("multipliers", "constraint")
        )
        raise InputError(f"{name} has {there} but no {lacks}; give both, or None for both")
    if constraint is None:
        return None
    value = constraint(x, *args)
    check_same(
        value,
        multipliers,
        f"{name}(x, *args)",
        f"the multipliers x.{name}",
        "give one multiplier a constraint",
    )
    return value


def _dot(a: PyTree, b: PyTree) -> Array:
    return sum(
        (jnp.sum(u * v) for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)),
        jnp.zeros(()),
    )


def _descend(x: PyTree, gradient: PyTree, step: Array | float) -> PyTree:
    return jax.tree.map(lambda x, g: x - step * g, x, gradient)


def projected_gradient(
    f: Callable[..., Array], projection: Ingredient, step: Array | float = 1.0
) -> Ingredient:
    """T(x, *args) = projection(x - step grad f(x, *args), *args), for a minimum of f in a convex
    set.

    Args:
      f: ``f(x, *args)``, a scalar.
      projection: ``projection(y, *args)``, such as made of
        :mod:`mdsens.implicit.conditions.projections`.
      step: positive; about the inverse of f's curvature keeps the linear solve well conditioned.
    """
    gradient = jax.grad(f)

    def T(x: PyTree, *args: PyTree) -> PyTree:
        return projection(_descend(x, gradient(x, *args), step), *args)

    return T


def proximal_gradient(
    f: Callable[..., Array], prox: Ingredient, step: Array | float = 1.0
) -> Ingredient:
    """T(x, *args) = prox(x - step grad f(x, *args), step, *args), for a minimum of f + g, g not
    smooth.

    Args:
      f: ``f(x, *args)``, a scalar, smooth.
      prox: ``prox(y, scaling, *args)``, such as made of :mod:`mdsens.implicit.conditions.proximal`.
      step: as in :func:`projected_gradient`.
    """
    gradient = jax.grad(f)

    def T(x: PyTree, *args: PyTree) -> PyTree:
        return prox(_descend(x, gradient(x, *args), step), step, *args)

    return T


def block_proximal_gradient(
    f: Callable[..., Array], proxes: PyTree, steps: PyTree = 1.0
) -> Ingredient:
    """T(x, *args)_j = prox_j(x_j - step_j grad_j f(x, *args), step_j, *args), for f + sum_j g_j on
    blocks of x.

    Args:
      f: ``f(x, *args)``, a scalar, smooth.
      proxes: a tuple, list or dict of ``prox(y, scaling, *args)``, one a block: the outer structure
        of x, whose blocks may be trees themselves. :func:`mdsens.implicit.conditions.proximal.free`
        for a block without a penalty.
      steps: as proxes, or one number for all blocks.
    """
    gradient = jax.grad(f)
    functions, structure = jax.tree.flatten(proxes)
    alone = jax.tree_util.treedef_is_leaf(jax.tree.structure(steps))
    lengths = [steps] * len(functions) if alone else structure.flatten_up_to(steps)

    def T(x: PyTree, *args: PyTree) -> PyTree:
        blocks, slopes = structure.flatten_up_to(x), structure.flatten_up_to(gradient(x, *args))
        moved = [
            prox(_descend(block, slope, step), step, *args)
            for prox, block, slope, step in zip(functions, blocks, slopes, lengths, strict=True)
        ]
        return jax.tree.unflatten(structure, moved)

    return T


def mirror_descent(
    f: Callable[..., Array],
    projection: Ingredient,
    map: Callable[[PyTree], PyTree],
    step: Array | float = 1.0,
) -> Ingredient:
    """T(x, *args) = projection(map(x) - step grad f(x, *args), *args), for a minimum of f in a
    convex set.

    Args:
      f: ``f(x, *args)``, a scalar.
      projection: ``projection(y, *args)`` from the mirror's space back into the set, the map's own:
        :func:`softmax` belongs to :func:`kl_map`.
      map: the gradient of the mirror's potential; the identity makes it :func:`projected_gradient`.
      step: as in :func:`projected_gradient`.
    """
    gradient = jax.grad(f)

    def T(x: PyTree, *args: PyTree) -> PyTree:
        return projection(_descend(map(x), gradient(x, *args), step), *args)

    return T


def kl_map(x: PyTree) -> PyTree:
    """log x, the mirror map of the Kullback-Leibler divergence. An entry of zero has a finite image
    and stays zero.
    """

    def log(x: Array) -> Array:
        tiny = jnp.finfo(x.dtype).tiny
        return jnp.log(jnp.where(x > tiny, x, tiny))

    return jax.tree.map(log, x)


def softmax(y: PyTree, *args: PyTree) -> PyTree:
    """The point of the simplex that is nearest to exp(y) by the Kullback-Leibler divergence; args
    are not read.
    """
    flat, unravel = ravel_pytree(y)
    return unravel(jax.nn.softmax(flat))


def newton(
    F: Ingredient,
    step: float = 1.0,
    solve: Method = _AUTO,
    symmetric: bool = False,
    positive_semidefinite: bool = False,
) -> Ingredient:
    """T(x, *args) = x - step (dF/dx)^-1 F(x, *args): Newton's map, whose derivative costs one solve
    and nothing third.

        dT = (1 - step) dx - step (dF/dx)^-1 (dF/dargs) dargs

    What is left out multiplies F, which is zero at the fixed point: there, and there alone, this is
    T's derivative. The fixed point's derivative is that of ``root(F)``, of any order, and I - dT/dx
    is ``step`` times the identity.

    Args:
      F: ``F(x, *args)``, with the tree and shapes of x; :func:`stationary` for a minimum.
      step: between 0 and 1; below one the damped iteration.
      solve, symmetric, positive_semidefinite: of dF/dx, as in :func:`mdsens.implicit.root`.
    """

    def T(x: PyTree, *args: PyTree) -> PyTree:
        condition, values = hoist(lambda y: F(y, *args), x)
        check_same(
            jax.eval_shape(condition, values, x),
            x,
            "F(x, *args)",
            "x",
            "F must give one equation an unknown",
        )

        def solved(x: PyTree, values: list[Array], b: PyTree) -> PyTree:
            _, jacobian = jax.linearize(functools.partial(condition, values), x)
            operator = Operator(jacobian, symmetric, positive_semidefinite)
            return linear_solve(operator, b, solve, not_finite=float("nan"))[0]

        @jax.custom_jvp
        def move(x: PyTree, values: list[Array]) -> PyTree:
            return _descend(x, solved(x, values, condition(values, x)), step)

        @functools.partial(move.defjvp, symbolic_zeros=True)
        def rule(primals: Any, tangents: Any) -> tuple[PyTree, PyTree]:
            x, values = primals
            image = move(x, values)
            dimage = jax.tree.map(lambda leaf, t: (1 - step) * _filled(leaf, t), x, tangents[0])
            active = [
                i
                for i, t in enumerate(tangents[1])
                if not (isinstance(t, SymbolicZero) or t.dtype == float0)
            ]
            if active:

                def of_active(moving: list[Array]) -> PyTree:
                    merged = list(values)
                    for i, value in zip(active, moving, strict=True):
                        merged[i] = value
                    return condition(merged, x)

                _, df = jax.jvp(
                    of_active, ([values[i] for i in active],), ([tangents[1][i] for i in active],)
                )
                dimage = _descend(dimage, solved(x, values, df), step)
            return image, dimage

        return move(x, values)

    return T


def _filled(leaf: Array, tangent: Any) -> Array:
    return jnp.zeros_like(leaf) if isinstance(tangent, SymbolicZero) else tangent
