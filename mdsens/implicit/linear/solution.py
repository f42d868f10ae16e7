"""Solution of linear systems ``A x = b`` with a known null space, with a residual and a status.

    x = P_R (P_L A P_R)^+ P_L b

``A`` is known by its products ``A v``, not as a matrix; ``x`` and ``b`` are arrays or nested
containers (trees) of arrays. The projectors ``P_R`` and ``P_L`` remove the right and the left null
space of ``A``, and ``+`` is the pseudo-inverse. The right-hand side is projected and scaled to norm
one, the system is solved on flat vectors, and the solution is projected. The residual is always
recomputed with ``A``; the residual that an iteration updates step by step is not relied on.
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

    The function is traceable by jit and vmap; for derivatives use :func:`linear_solve`.

    Args:
      operator: the linear map A and its null space.
      b: right-hand side, an array or nested containers (a tree) of real floating-point arrays; A v
        must have the same tree and shapes.
      method: the linear method. Keep Auto() unless your own benchmark shows a better method.
      not_finite: value of all entries of x where the status is NOT_FINITE. The default is zero; use
        NaN where the status is not passed on to the user.

    Returns:
      ``(x, stats)``, with the :class:`SolveStats` of the solve. Where the status is not good, x is
      the best iterate. A good status is CONVERGED or a warning such as NULL_COMPONENT_DROPPED.
      ``stats.residual`` is |P_L b - A x| / |P_L b|, recomputed with A, where the projector P_L
      removes the left null space of A.

    Raises:
      InputError: b and A b differ in tree or shape; b is not real floating point of one precision;
        the method is CG and A is not declared positive semi-definite; the method is MINRES and A is
        not declared symmetric.
    """
    rhs, unravel = _ravel(b)
    flat = _flatten(operator, rhs, unravel, b)
    x, stats = solve_flat(flat, rhs, choose(method, rhs.size, operator), not_finite)
    return unravel(x), stats


def linear_solve(
    operator: Operator, b: PyTree, method: Method = Auto(), *, not_finite: float = 0.0
) -> tuple[PyTree, SolveStats]:
    """Solve A x = b, as :func:`solve`, with derivatives in forward and reverse mode, of any order.

    The derivative is dx = A^+ (db - dA x), with the pseudo-inverse A^+. Reverse mode transposes the
    solve (``lax.custom_linear_solve``). So jax must be able to differentiate the function v -> A v
    by the variables on which A depends and, unless A is symmetric, to transpose this function. The
    derivative of the null space by the parameters is left out. Where the null space depends on the
    parameters, as for the rotations of a cluster, the derivative of x lacks its component in the
    null space, which does not affect invariant quantities.

    The arguments, results and errors are those of :func:`solve`. The statistics of the solve have
    no derivative.
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

    # jax gives ``backward`` its own transpose of the product as ``apply``. The exchanged projectors
    # and the transposed preconditioner come from flat.transpose.
    x, stats = lax.custom_linear_solve(
        flat.matvec, rhs, forward, backward, symmetric=flat.symmetric, has_aux=True
    )
    return unravel(x), stats


def _ravel(b: PyTree) -> tuple[Array, Callable[[Array], PyTree]]:
    """Flatten the right-hand side b, a tree (nested containers) of arrays, to one vector.

    Return the vector, and the function that turns such a vector back into a tree like b. Raise
    InputError unless b is real floating point of one precision.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(b):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise InputError(
                f"the right-hand side `b{jax.tree_util.keystr(path)}` has dtype"
                f" {jnp.result_type(leaf)}; give real floating-point arrays"
            )
    precisions = sorted({str(jnp.result_type(leaf)) for leaf in jax.tree.leaves(b)})
    # Of two precisions, the lower would limit the residual, while the higher would set the unit of
    # round-off, after the flattening: the solve could not converge.
    if len(precisions) > 1:
        raise InputError(
            f"the right-hand side `b` mixes {' and '.join(precisions)}; give all arrays of `b` in"
            " one precision"
        )
    return ravel_pytree(b)


def _flatten(
    operator: Operator, flat: Array, unravel: Callable[[Array], PyTree], b: PyTree
) -> Operator:
    """Rewrite a linear operator on trees (nested containers) of arrays as one on flat vectors.

    Args:
      operator: the operator A of A x = b, on trees.
      flat: the right-hand side b as one vector.
      unravel: function that turns such a vector into a tree like b.
      b: the right-hand side as a tree.
    """
    # Shapes are compared by tracing alone; no product is computed.
    shapes = jax.eval_shape(lambda: b)
    remedy = "the product must have the tree and shapes of `b`"
    product = Traceable("the operator's matvec", operator.matvec)
    check_same(jax.eval_shape(product, shapes), shapes, "A v", "the right-hand side `b`", remedy)
    if operator.preconditioner is not None:
        out = jax.eval_shape(Traceable("the preconditioner", operator.preconditioner), shapes)
        check_same(out, shapes, "preconditioner's M v", "the right-hand side `b`", remedy)

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
    """Rewrite the scaling S of an operator, a change of unknowns x = S^T w, for flat vectors.

    The result is None where the operator has no scaling.
    """
    if operator.scaling is None:
        return None
    change, product = operator.scaling
    _, unravel = ravel_pytree(b)
    # S v may have other shapes than v. ravel_pytree needs arrays, not the shapes of eval_shape.
    scaled = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(change, b))
    _, unravel_scaled = ravel_pytree(scaled)
    return SymmetricScaling(
        lambda v: ravel_pytree(change(unravel(v)))[0],
        lambda w: ravel_pytree(product(unravel_scaled(w)))[0],
    )
