"""Solution of linear systems ``A x = b`` with a known null space, with a residual and a status.

    x = P_R (P_L A P_R)^+ P_L b

``A`` is a function on pytrees, not a matrix. ``P_R`` and ``P_L`` project off its right and left
null space. The right-hand side is projected and scaled to norm one, the system is solved on flat
vectors, and the solution is projected. The residual is always recomputed with the operator; the
residual that an iteration carries is not relied on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from mdsens._util.errors import InputError
from mdsens._util.pytree import PyTree, check_same
from mdsens._util.user_functions import Traceable
from mdsens.implicit.linear._flat_solve import solve_flat
from mdsens.implicit.linear.auto import Auto, choose
from mdsens.implicit.linear.method import Method
from mdsens.implicit.linear.operator import LinearMap, Operator, SymmetricScaling
from mdsens.implicit.linear.result import SolveStats

__all__ = ["linear_solve", "solve"]


def solve(
    operator: Operator, b: PyTree, method: Method = Auto(), *, not_finite: float = 0.0
) -> tuple[PyTree, SolveStats]:
    """Solve A x = b on the range of A; return the solution of least norm and the statistics.

    Traceable by jit and vmap; for derivatives use :func:`linear_solve`.

    Args:
      operator: the linear map A and its null space.
      b: right-hand side, a tree of real floating-point arrays; A v must have the same tree and
        shapes.
      method: the linear method. Keep Auto() unless your own benchmark shows a better one.
      not_finite: value of all entries of x where the status is NOT_FINITE. Zero by default; use NaN
        where the status is not passed on to the user.

    Returns:
      ``(x, stats)``. Where the status is not good, x is the best iterate. A good status is
      CONVERGED or a warning such as NULL_COMPONENT_DROPPED. ``stats.residual`` is
      |P_L b - A x| / |P_L b|, recomputed with the operator.

    Raises:
      InputError: b and A b differ in tree or shape; b is not real floating point of one precision;
        CG on an operator not declared positive semi-definite, MINRES on one not declared symmetric.
    """
    rhs, unravel = _ravel(b)
    flat = _flatten(operator, rhs, unravel, b)
    x, stats = solve_flat(flat, rhs, choose(method, rhs.size, operator), not_finite)
    return unravel(x), stats


def linear_solve(
    operator: Operator, b: PyTree, method: Method = Auto(), *, not_finite: float = 0.0
) -> tuple[PyTree, SolveStats]:
    """Solve A x = b, as :func:`solve`, with derivatives in forward and reverse mode, of any order.

    The derivative is dx = A^+ (db - dA x). Reverse mode transposes the solve
    (``lax.custom_linear_solve``). So ``operator.matvec`` must be differentiable by the variables
    that it closes over and, unless it is symmetric, transposable. The derivative of the null space
    by the parameters is left out. Where the null space depends on them, as for the rotations of a
    cluster, the derivative of x lacks its component in the null space, which does not affect
    invariant quantities.

    Args, returns and raises as :func:`solve`. ``stats`` have no derivative.
    """
    rhs, unravel = _ravel(b)
    flat = _flatten(operator, rhs, unravel, b)
    method = choose(method, rhs.size, operator)

    def forward(apply: LinearMap, r: Array) -> tuple[Array, SolveStats]:
        return solve_flat(dataclasses.replace(flat, matvec=apply), r, method, not_finite)

    def backward(apply: LinearMap, r: Array) -> tuple[Array, SolveStats]:
        return solve_flat(
            dataclasses.replace(flat.transpose(r), matvec=apply), r, method, not_finite
        )

    x, stats = lax.custom_linear_solve(
        flat.matvec, rhs, forward, backward, symmetric=flat.symmetric, has_aux=True
    )
    return unravel(x), stats


def _ravel(b: PyTree) -> tuple[Array, Callable[[Array], PyTree]]:
    """Validate the right-hand side and flatten it; return it with the inverse of the flattening."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(b):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise InputError(
                f"the right-hand side b{jax.tree_util.keystr(path)} has dtype"
                f" {jnp.result_type(leaf)}; give real floating-point arrays"
            )
    precisions = sorted({str(jnp.result_type(leaf)) for leaf in jax.tree.leaves(b)})
    # Of two precisions, the lower would limit the residual, while the higher would set the unit of
    # round-off, after the flattening: the solve could not converge.
    if len(precisions) > 1:
        raise InputError(
            f"the right-hand side b mixes {' and '.join(precisions)}; give all of it in one"
            " precision"
        )
    return ravel_pytree(b)


def _flatten(
    operator: Operator, flat: Array, unravel: Callable[[Array], PyTree], b: PyTree
) -> Operator:
    """Return the operator on flat vectors.

    Args:
      operator: on trees.
      flat: the flat right-hand side.
      unravel: function from a flat vector to a tree.
      b: the right-hand side as a tree.
    """
    # Shapes are compared by tracing alone; no product is computed.
    shapes = jax.eval_shape(lambda: b)
    remedy = "the operator must map the unknowns' space into itself"
    product = Traceable("the operator's matvec", operator.matvec)
    check_same(jax.eval_shape(product, shapes), shapes, "A v", "the right-hand side b", remedy)
    if operator.preconditioner is not None:
        out = jax.eval_shape(Traceable("the preconditioner", operator.preconditioner), shapes)
        check_same(out, shapes, "preconditioner's M v", "the right-hand side b", remedy)

    def flattened(f: LinearMap) -> LinearMap:
        return lambda v: ravel_pytree(f(unravel(v)))[0].astype(flat.dtype)

    def flattened_or_none(f: LinearMap | None) -> LinearMap | None:
        return None if f is None else flattened(f)

    # Equal projectors stay the same object, by which they are known to be equal.
    right = flattened_or_none(operator.project)
    left = right
    if operator.left_project is not operator.project:
        left = flattened_or_none(operator.left_project)
    return dataclasses.replace(
        operator,
        matvec=flattened(product),
        project=right,
        left_project=left,
        scaling=_flatten_scaling(operator, b),
        preconditioner=flattened_or_none(operator.preconditioner),
    )


def _flatten_scaling(operator: Operator, b: PyTree) -> SymmetricScaling | None:
    """Return the change of unknowns on flat vectors; None where the operator has none."""
    if operator.scaling is None:
        return None
    change, product = operator.scaling
    _, unravel = ravel_pytree(b)
    scaled = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(change, b))
    _, unravel_scaled = ravel_pytree(scaled)
    return SymmetricScaling(
        lambda v: ravel_pytree(change(unravel(v)))[0],
        lambda w: ravel_pytree(product(unravel_scaled(w)))[0],
    )
