"""Linear systems ``A x = b`` with a known null space, and the evidence that the answer is one.

    x = P_R (P_L A P_R)^+ P_L b

``A`` is a function on pytrees, never a matrix. ``P_R`` and ``P_L`` project off its right and left
null space. The right-hand side is projected and scaled to norm one, the system solved on flat
vectors, the answer projected, and the residual recomputed from the operator: no solver's own word
is taken for it.
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
    """Solve A x = b on the range of A: the answer of least norm, and what became of it.

    Traceable by jit and vmap; for derivatives take :func:`linear_solve`.

    Args:
      operator: the map and its null space.
      b: right-hand side, a tree of real floating-point arrays; A v must have the same tree and
        shapes.
      method: an option record. Auto() serves unless a benchmark of your own says otherwise.
      not_finite: what fills x where the status is NOT_FINITE. Zero; a caller without a status to
        show gives NaN.

    Returns:
      ``(x, stats)``. The status is good (CONVERGED, or a warning such as NULL_COMPONENT_DROPPED) or
      names what failed; then x is the best iterate. ``stats.residual`` is |P_L b - A x| / |P_L b|,
      from the operator.

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
    """:func:`solve` with derivatives: dx = A^+ (db - dA x), forward, reverse and of any order.

    By transposing the solve (``lax.custom_linear_solve``), so ``operator.matvec`` must be
    differentiable in what it closes over and, unless symmetric, transposable. The null space is
    taken not to move with the parameters: where it does (rotations of a cluster), derivatives of x
    lack their part in the null space, which nothing invariant sees.

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
    for path, leaf in jax.tree_util.tree_leaves_with_path(b):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise InputError(
                f"the right-hand side b{jax.tree_util.keystr(path)} has dtype"
                f" {jnp.result_type(leaf)}; give real floating-point arrays"
            )
    precisions = sorted({str(jnp.result_type(leaf)) for leaf in jax.tree.leaves(b)})
    if (
        len(precisions) > 1
    ):  # the coarsest would bound the residual, while the finest sets what counts as round-off
        raise InputError(
            f"the right-hand side b mixes {' and '.join(precisions)}; give all of it in one"
            " precision"
        )
    return ravel_pytree(b)


def _flatten(
    operator: Operator, flat: Array, unravel: Callable[[Array], PyTree], b: PyTree
) -> Operator:
    """The operator on flat vectors."""
    shapes = jax.eval_shape(lambda: b)
    remedy = "the operator must map the unknowns' space into itself"
    product = Traceable("the operator's matvec", operator.matvec)
    check_same(jax.eval_shape(product, shapes), shapes, "A v", "the right-hand side b", remedy)
    if operator.preconditioner is not None:
        out = jax.eval_shape(Traceable("the preconditioner", operator.preconditioner), shapes)
        check_same(out, shapes, "preconditioner's M v", "the right-hand side b", remedy)

    def flattened(f: LinearMap) -> LinearMap:
        return lambda v: ravel_pytree(f(unravel(v)))[0].astype(flat.dtype)

    def each(f: LinearMap | None) -> LinearMap | None:
        return None if f is None else flattened(f)

    right = each(operator.project)
    return dataclasses.replace(
        operator,
        matvec=flattened(product),
        project=right,
        left_project=(
            right if operator.left_project is operator.project else each(operator.left_project)
        ),
        scaling=_scaled_operator(operator, b),
        preconditioner=each(operator.preconditioner),
    )


def _scaled_operator(operator: Operator, b: PyTree) -> SymmetricScaling | None:
    """The change of unknowns on flat vectors."""
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
