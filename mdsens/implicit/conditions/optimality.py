"""Optimality conditions: equations that the solution x of a minimization problem satisfies.

Each function in the table makes such an equation from the functions of the problem. f is the
function to minimize, under the constraints h = 0 and g <= 0 or in the set of a projection P; prox
is a proximal operator, s a step, and m a mirror map.

| function | condition | ingredients |
| --- | --- | --- |
| ``stationary`` | grad f = 0 | f |
| ``kkt`` | grad f + multipliers' forces = 0, h = 0, lambda g = 0 | f, h, g |
| ``projected_gradient`` | x = P(x - s grad f) | f, projection |
| ``proximal_gradient`` | x = prox(x - s grad f, s) | f, prox |
| ``block_proximal_gradient`` | x_j = prox_j(x_j - s_j grad_j f, s_j) | f, a prox and a step each |
| ``mirror_descent`` | x = P(m(x) - s grad f) | f, projection, mirror map |
| ``newton`` | x = x - s (dF/dx)^-1 F | F |
| ``conic_residual`` | the homogeneous self-dual embedding | cones; c, A, b are its args |

Pass a condition F(x, *args) = 0 to :func:`mdsens.implicit.root`, and a map T with x = T(x, *args)
to :func:`mdsens.implicit.fixed_point`. Every ingredient is a function of ``(x, *args)`` with the
same args, and may ignore some of these args:

    def in_box(x, theta):
        return projections.box(x, 0.0, 1.0)

    T = projected_gradient(energy, in_box)  # of energy(x, theta)
    solution = fixed_point(T)(any_solver)

The step of a fixed point changes neither the solution nor its derivative, only the conditioning of
the linear solve. Blondel et al., Efficient and Modular Implicit Differentiation, arXiv:2105.15183,
table 1.
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
from mdsens.implicit.closures import hoist
from mdsens.implicit.conditions.conic import conic_residual
from mdsens.implicit.linear import Auto, Method, Operator
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
    """Make F(x, *args) = grad_x f(x, *args), which is zero at a minimum, maximum or saddle of f.

    With this F, give :func:`mdsens.implicit.root` the option ``symmetric=True``, and at a minimum
    ``positive_semidefinite=True``, too.
    """
    return jax.grad(f)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KKTPoint(Portable):
    """A minimum under the constraints h = 0 and g <= 0, with its Lagrange multipliers.

    The function that :func:`kkt` makes takes a KKTPoint, and returns its residuals in another one,
    each residual in the place of the unknown that it belongs to.

    Attributes:
      primal: the minimum x, an array or nested containers (a tree) of arrays.
      equality: multipliers of h = 0, a tree like h(x, *args); None without equalities.
      inequality: multipliers of g <= 0, a tree like g(x, *args), none of them negative; None
        without inequalities.
    """

    primal: PyTree
    equality: PyTree = None
    inequality: PyTree = None


def kkt(
    f: Callable[..., Array],
    equality: Ingredient | None = None,
    inequality: Ingredient | None = None,
) -> Ingredient:
    """Make the function F whose root is a minimum of f under the constraints h = 0 and g <= 0.

        grad f + (dh/dx)^T nu + (dg/dx)^T lambda = 0,   h = 0,   lambda g = 0

    These are the conditions of Karush, Kuhn and Tucker, with the Lagrange multipliers nu and
    lambda >= 0. F returns the left-hand sides.

    Args:
      f: ``f(x, *args)``, a scalar.
      equality: ``h(x, *args)``, a tree of arrays, zero at the solution.
      inequality: ``g(x, *args)``, a tree of arrays, nowhere positive at the solution.

    Returns:
      F as a function of a :class:`KKTPoint`, so that the solver must return the multipliers, too,
      and the multipliers have derivatives. With equalities alone the Jacobian of F is symmetric and
      indefinite (give ``symmetric=True`` to root); with inequalities the Jacobian is not symmetric.
      The Jacobian is singular where the gradients of the active constraints are linearly dependent,
      and where lambda and g of an inequality are both zero: see
      :func:`mdsens.implicit.conditions.degeneracy.complementarity`.

    Raises:
      InputError: F is called with multipliers that are missing, too many, or of another shape than
        the constraint.
    """

    def F(x: KKTPoint, *args: PyTree) -> KKTPoint:
        gap = _constraint_value(equality, x.primal, x.equality, args, "equality")
        slack = _constraint_value(inequality, x.primal, x.inequality, args, "inequality")

        def lagrangian(primal: PyTree) -> Array:
            value = f(primal, *args)
            if equality is not None:
                value += _dot(x.equality, equality(primal, *args))
            if inequality is not None:
                value += _dot(x.inequality, inequality(primal, *args))
            return value

        # None is an empty tree to jax: without inequalities the last entry is None, too.
        return KKTPoint(
            jax.grad(lagrangian)(x.primal), gap, jax.tree.map(jnp.multiply, x.inequality, slack)
        )

    return F


def _constraint_value(
    constraint: Ingredient | None,
    x: PyTree,
    multipliers: PyTree,
    args: tuple[PyTree, ...],
    name: str,
) -> PyTree:
    """Evaluate a constraint function at x, and raise InputError unless its multipliers fit.

    There must be one Lagrange multiplier for each constraint. The value is None where there is
    neither a constraint nor a multiplier.
    """
    if constraint is not None and multipliers is None:
        raise InputError(
            f"`{name}` is a constraint without multipliers `x.{name}`; give both, or None for both"
        )
    if constraint is None and multipliers is not None:
        raise InputError(
            f"`x.{name}` are multipliers without a constraint `{name}`; give both, or None for both"
        )
    if constraint is None:
        return None
    value = constraint(x, *args)
    check_same(
        value,
        multipliers,
        f"{name}(x, *args)",
        f"the multipliers x.{name}",
        "give one multiplier for each constraint",
    )
    return value


def _dot(a: PyTree, b: PyTree) -> Array:
    """Compute the inner product of two trees (nested containers) of arrays of the same shapes."""
    return sum(
        (jnp.sum(u * v) for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)),
        jnp.zeros(()),
    )


def _descend(x: PyTree, gradient: PyTree, step: Array | float) -> PyTree:
    """Return x - step * gradient, for arrays or for trees (nested containers) of arrays."""
    return jax.tree.map(lambda x, g: x - step * g, x, gradient)


def projected_gradient(
    f: Callable[..., Array], projection: Ingredient, step: Array | float = 1.0
) -> Ingredient:
    """Make the map T(x, *args) = projection(x - step grad f(x, *args), *args).

    The fixed point x = T(x, *args) is a minimum of f in the convex set of the projection.

    Args:
      f: ``f(x, *args)``, a scalar.
      projection: ``projection(y, *args)``, the point of the set nearest to y, for example by a
        function of :mod:`mdsens.implicit.conditions.projections`.
      step: the step, a positive number. With a step of about the inverse of the curvature of f, the
        linear solve for the derivative is well conditioned.
    """
    gradient = jax.grad(f)

    def T(x: PyTree, *args: PyTree) -> PyTree:
        return projection(_descend(x, gradient(x, *args), step), *args)

    return T


def proximal_gradient(
    f: Callable[..., Array], prox: Ingredient, step: Array | float = 1.0
) -> Ingredient:
    """Make the map T(x, *args) = prox(x - step grad f(x, *args), step, *args).

    The fixed point x = T(x, *args) is a minimum of f + g, where the penalty g need not be smooth.

    Args:
      f: ``f(x, *args)``, a scalar, smooth.
      prox: ``prox(y, scaling, *args)``, the proximal operator of g, that is the x that minimizes
        |x - y|^2 / 2 + scaling g(x); for example an operator of
        :mod:`mdsens.implicit.conditions.proximal`.
      step: the step, a positive number, best about the inverse of the curvature of f.
    """
    gradient = jax.grad(f)

    def T(x: PyTree, *args: PyTree) -> PyTree:
        return prox(_descend(x, gradient(x, *args), step), step, *args)

    return T


def block_proximal_gradient(
    f: Callable[..., Array], proxes: PyTree, steps: PyTree = 1.0
) -> Ingredient:
    """Make the map T that takes a proximal gradient step in each block j of the unknowns x.

        T(x, *args)_j = prox_j(x_j - step_j grad_j f(x, *args), step_j, *args)

    The fixed point x = T(x, *args) is a minimum of f + sum_j g_j, with a penalty g_j of each block.

    Args:
      f: ``f(x, *args)``, a scalar, smooth.
      proxes: a tuple, list or dict of functions ``prox(y, scaling, *args)``, the proximal operators
        of the penalties. x must be a tuple, list or dict with the same entries; each entry of x is
        a block, which may contain several arrays. Use
        :func:`mdsens.implicit.conditions.proximal.free` for a block without a penalty.
      steps: the steps, positive numbers in the structure of ``proxes``, or one number for all
        blocks.
    """
    gradient = jax.grad(f)
    # The structure ends at the functions; flatten_up_to leaves the blocks of x whole below it.
    functions, structure = jax.tree.flatten(proxes)
    is_number = jax.tree_util.treedef_is_leaf(jax.tree.structure(steps))
    lengths = [steps] * len(functions) if is_number else structure.flatten_up_to(steps)

    def T(x: PyTree, *args: PyTree) -> PyTree:
        blocks = structure.flatten_up_to(x)
        gradients = structure.flatten_up_to(gradient(x, *args))
        moved = [
            prox(_descend(block, slope, step), step, *args)
            for prox, block, slope, step in zip(functions, blocks, gradients, lengths, strict=True)
        ]
        return jax.tree.unflatten(structure, moved)

    return T


def mirror_descent(
    f: Callable[..., Array],
    projection: Ingredient,
    map: Callable[[PyTree], PyTree],
    step: Array | float = 1.0,
) -> Ingredient:
    """Make the map T(x, *args) = projection(map(x) - step grad f(x, *args), *args).

    The fixed point x = T(x, *args) is a minimum of f in the convex set of the projection.

    Args:
      f: ``f(x, *args)``, a scalar.
      projection: ``projection(y, *args)`` from the dual space of the mirror map back into the set.
        The projection must belong to the mirror map: :func:`softmax` belongs to :func:`kl_map`.
      map: the mirror map, the gradient of a convex potential. With the identity as the mirror map,
        T is the map of :func:`projected_gradient`.
      step: the step, a positive number, best about the inverse of the curvature of f.
    """
    gradient = jax.grad(f)

    def T(x: PyTree, *args: PyTree) -> PyTree:
        return projection(_descend(map(x), gradient(x, *args), step), *args)

    return T


def kl_map(x: PyTree) -> PyTree:
    """Return log x, the mirror map of the Kullback-Leibler divergence for :func:`mirror_descent`.

    An entry of zero is replaced by the smallest normal floating-point number, so that the logarithm
    is finite. The function :func:`softmax` turns this logarithm into zero again, to round-off.
    """

    def log(x: Array) -> Array:
        # where() before the logarithm, so that its derivative at zero is zero and not NaN
        tiny = jnp.finfo(x.dtype).tiny
        return jnp.log(jnp.where(x > tiny, x, tiny))

    return jax.tree.map(log, x)


def softmax(y: PyTree, *args: PyTree) -> PyTree:
    """Return exp(y) / sum exp(y), where the sum is over all arrays in y together.

    This is the projection of exp(y) on the simplex (no negative entries, sum one) by the
    Kullback-Leibler divergence, for :func:`mirror_descent`. args are ignored.
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
    """Make Newton's map T(x, *args) = x - step (dF/dx)^-1 F(x, *args), with a cheap derivative.

        dT = (1 - step) dx - step (dF/dx)^-1 (dF/dargs) dargs

    The derivative dT that jax gets costs one linear solve, and no derivative of dF/dx. The terms
    that are left out of dT are multiples of F, which is zero at the fixed point: dT is the
    derivative of T at the fixed point only. The fixed point of T, which is the root of F, has the
    same derivatives as with :func:`mdsens.implicit.root`, in any order. I - dT/dx is ``step`` times
    the identity.

    Args:
      F: ``F(x, *args)``, with the tree and shapes of x; :func:`stationary` for a minimum.
      step: a number between 0 and 1; below 1 for the damped iteration.
      solve, symmetric, positive_semidefinite: linear method and properties of dF/dx, as in
        :func:`mdsens.implicit.root`.
    """

    def T(x: PyTree, *args: PyTree) -> PyTree:
        condition, values = hoist(lambda y: F(y, *args), x)
        check_same(
            jax.eval_shape(condition, values, x),
            x,
            "F(x, *args)",
            "x",
            "F must give one equation for each unknown",
        )

        def solve_jacobian(x: PyTree, values: list[Array], b: PyTree) -> PyTree:
            """Solve the linear system (dF/dx) y = b for y, with the Jacobian dF/dx at x."""
            _, jacobian = jax.linearize(functools.partial(condition, values), x)
            operator = Operator(jacobian, symmetric, positive_semidefinite)
            return linear_solve(operator, b, solve, not_finite=float("nan"))[0]

        @jax.custom_jvp
        def move(x: PyTree, values: list[Array]) -> PyTree:
            return _descend(x, solve_jacobian(x, values, condition(values, x)), step)

        # symbolic_zeros, so that no linear system is solved where only x changes
        @functools.partial(move.defjvp, symbolic_zeros=True)
        def rule(
            primals: tuple[PyTree, list[Any]], tangents: tuple[PyTree, list[Any]]
        ) -> tuple[PyTree, PyTree]:
            x, values = primals
            image = move(x, values)
            dimage = jax.tree.map(
                lambda leaf, t: (1 - step) * _without_symbolic_zero(leaf, t), x, tangents[0]
            )
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
                dimage = _descend(dimage, solve_jacobian(x, values, df), step)
            return image, dimage

        return move(x, values)

    return T


def _without_symbolic_zero(leaf: Array, tangent: Array | SymbolicZero) -> Array:
    """Return the forward-mode derivative (tangent) of an array as an array.

    For an array that is constant, jax passes the object SymbolicZero; zeros are returned for it.
    """
    return jnp.zeros_like(leaf) if isinstance(tangent, SymbolicZero) else tangent
