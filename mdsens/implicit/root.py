"""The derivative of a root, whatever found it.

    F(x, theta) = 0   =>   dF/dx dx = - dF/dtheta dtheta

One forward rule. Reverse mode and higher orders come by transposing and differentiating it: the linear solve in it is
transposable, and the root that enters it is the decorated function's own value, so that it carries the same rule.
Blondel et al., Efficient and Modular Implicit Differentiation, arXiv:2105.15183, equation 2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CellType, MethodType, ModuleType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
from jax.dtypes import float0
from jax.extend import core

from mdsens.implicit._tree import PyTree, check_same
from mdsens.implicit.linear import linear_solve
from mdsens.implicit.operators import Auto, LinearMap, Method, Operator
from mdsens.implicit.status import InputError, require_sound_jax

__all__ = ["fixed_point", "root"]

Condition: TypeAlias = Callable[..., PyTree]
Solver: TypeAlias = Callable[..., Any]
NullSpace: TypeAlias = Callable[..., LinearMap | tuple[LinearMap, LinearMap]]
_AUTO = Auto()


def root(
    F: Condition,
    solve: Method = _AUTO,
    symmetric: bool = False,
    positive_semidefinite: bool = False,
    null_space: NullSpace | None = None,
    has_aux: bool = False,
) -> Callable[[Solver], Solver]:
    """Give any solver of F(x, *args) = 0 the derivative of the root by ``args``.

        dx = - (dF/dx)^-1 (dF/dargs) dargs

    The decorated solver composes with jvp, vjp, jacfwd, jacrev, hessian, vmap and jit. The solver is only called,
    never differentiated: it may be a ``while_loop``, run on the host behind ``jax.pure_callback``, or, outside jit and
    vmap, be plain Python. Where F closes over a traced value, its derivative is followed like an argument's.

    Args:
      F: ``F(x, *args)``, with the tree and shapes of x; traceable, and twice differentiable for second derivatives.
      solve: how the linear systems are solved; an option record of :mod:`mdsens.implicit.operators`.
      symmetric: dF/dx is symmetric, as for a gradient. Halves the work of reverse mode and opens MINRES.
      positive_semidefinite: dF/dx is so too, as at a minimum. Opens CG.
      null_space: ``null_space(x, *args)`` gives the orthogonal projector off the null space of dF/dx (or the pair off
        the right and the left one), a linear function on trees like x. None where dF/dx is regular.
      has_aux: the solver returns ``(x, aux)``; ``aux`` is passed on, and has no derivative.

    Returns:
      A decorator for ``solver(init, *args)``. ``init`` has no derivative; args are any trees, and leaves that are not
      floating point (integers, booleans, None) have none.

    Raises:
      InputError: F(x, *args) and x differ in tree or shape; x holds anything but real floating-point arrays; a keyword
        argument.

    The derivative has no status to carry: a linear system that fails gives its best iterate, NaN where a number in it
    is not finite. Solve with :func:`mdsens.implicit.solve` on the same operator to see how it went.
    """

    def decorate(solver: Solver) -> Solver:
        @functools.wraps(solver)
        def solve_root(init: PyTree, *args: PyTree, **keywords: Any) -> Any:
            require_sound_jax()
            if keywords:
                raise InputError(
                    f"the keyword arguments {sorted(keywords)} have no place in F(x, *args); pass them by position, or "
                    "bind them with functools.partial before decorating"
                )
            found = _call_without_derivative(solver, init, args)
            x, aux = found if has_aux else (found, None)
            x = _without_derivative(jax.tree.map(_as_unknown, x))
            x = _attach(F, x, args, solve, symmetric, positive_semidefinite, null_space)
            return (x, _without_derivative(aux)) if has_aux else x

        return solve_root

    return decorate


def fixed_point(
    T: Condition,
    solve: Method = _AUTO,
    symmetric: bool = False,
    positive_semidefinite: bool = False,
    null_space: NullSpace | None = None,
    has_aux: bool = False,
) -> Callable[[Solver], Solver]:
    """Give any solver of x = T(x, *args) the derivative of the fixed point: :func:`root` of x - T(x, *args).

        dx = (I - dT/dx)^-1 (dT/dargs) dargs

    Args, returns and raises as :func:`root`; ``symmetric``, ``positive_semidefinite`` and ``null_space`` speak of
    I - dT/dx, which is positive definite where T is a contraction with a symmetric derivative.
    """

    def F(x: PyTree, *args: PyTree) -> PyTree:
        image = T(x, *args)
        check_same(image, x, "T(x, *args)", "x", "T must map the unknowns' space into itself")
        return jax.tree.map(jnp.subtract, x, image)

    return root(F, solve, symmetric, positive_semidefinite, null_space, has_aux)


def _attach(
    F: Condition,
    x: PyTree,
    args: tuple[PyTree, ...],
    solve: Method,
    symmetric: bool,
    positive_semidefinite: bool,
    null_space: NullSpace | None,
) -> PyTree:
    """x itself, with the derivative of the root of F by everything that F depends on."""
    condition, params = _hoist(lambda y: F(y, *args), x)
    check_same(jax.eval_shape(condition, params, x), x, "F(x, *args)", "x", "F must give one equation an unknown")
    project, frame = _hoist_null_space(null_space, x, args)

    @jax.custom_jvp
    def attached(x: PyTree, params: list[Array], frame: list[Array]) -> PyTree:
        return x

    @functools.partial(attached.defjvp, symbolic_zeros=True)
    def rule(primals: Any, tangents: Any) -> tuple[PyTree, PyTree]:
        x, params, frame = primals
        # The value of the rule itself, not the x that came in: of higher order, it depends on params by this rule.
        x = attached(x, params, frame)
        active = [i for i, t in enumerate(tangents[1]) if not (isinstance(t, SymbolicZero) or t.dtype == float0)]
        if not active:
            return x, jax.tree.map(jnp.zeros_like, x)

        def of_active(values: list[Array]) -> PyTree:
            merged = list(params)
            for i, value in zip(active, values, strict=True):
                merged[i] = value
            return condition(merged, x)

        _, df = jax.jvp(of_active, ([params[i] for i in active],), ([tangents[1][i] for i in active],))
        _, jacobian = jax.linearize(functools.partial(condition, params), x)
        right, left = project(frame, x)
        operator = Operator(jacobian, symmetric, positive_semidefinite, right, left)
        dx, _ = linear_solve(operator, jax.tree.map(jnp.negative, df), solve, not_finite=float("nan"))
        return x, dx

    return attached(x, params, frame)


def _hoist(f: Callable[..., PyTree], *examples: PyTree) -> tuple[Callable[..., PyTree], list[Array]]:
    """f as g(values, *examples), where ``values`` are all the arrays f takes from around it.

    ``jax.closure_convert`` leaves behind the values that it thinks carry no derivative, and remembers f by identity,
    so that a second call may get the first one's tracers; here every value is taken, anew at each call.
    """
    closed, shape = jax.make_jaxpr(lambda *a: f(*a), return_shape=True)(*examples)
    # Without its values, which a rule that holds it would leak; from jax 0.12 on a bare jaxpr has them too.
    jaxpr, structure = core.ClosedJaxpr(closed.jaxpr, [None] * len(closed.consts)).jaxpr, jax.tree.structure(shape)

    def g(values: list[Array], *inputs: PyTree) -> PyTree:
        out = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, values))(*jax.tree.leaves(inputs))
        return jax.tree.unflatten(structure, out)

    return g, list(closed.consts)


def _call_without_derivative(solver: Solver, init: PyTree, args: tuple[PyTree, ...]) -> Any:
    """solver(init, *args) on values without tangents, those that it closes over included.

    Stopping what comes out would do for the result. But jax would still differentiate the solver by what it closes
    over, which costs, fails behind ``pure_callback`` and, twice over a ``while_loop``, raises a TypeError (jax 0.10.1).
    """
    stopped = _without_derivative((init, *args))
    if not _closes_over_tracer(solver):
        return solver(*stopped)  # not traced: outside of jit it may be plain Python
    hoisted, values = _hoist(lambda: solver(*stopped))
    return hoisted(_without_derivative(values))


def _closes_over_tracer(f: Any) -> bool:
    """Whether a function reaches a tracer through closures, defaults, partials, ``self`` or containers.

    Only a shortcut is at stake: a tracer hidden better is stopped where the result comes out.
    """
    pending, seen = [f], set()
    while pending:
        value = pending.pop()
        if isinstance(value, Tracer):
            return True
        if id(value) in seen or isinstance(value, type | ModuleType):
            continue
        seen.add(id(value))
        if isinstance(value, functools.partial):
            pending += [value.func, value.args, value.keywords]
        elif isinstance(value, MethodType):
            pending += [value.__func__, value.__self__, *getattr(value.__self__, "__dict__", {}).values()]
        elif callable(value):
            pending += [getattr(value, name, None) for name in ("__wrapped__", "__defaults__", "__kwdefaults__")]
            pending += [cell.cell_contents for cell in getattr(value, "__closure__", None) or () if _filled(cell)]
        else:
            pending += [leaf for leaf in jax.tree.leaves(value) if leaf is not value]
    return False


def _filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that is not bound yet
        return False


_Projectors: TypeAlias = tuple[LinearMap | None, LinearMap | None]


def _hoist_null_space(
    null_space: NullSpace | None, x: PyTree, args: tuple[PyTree, ...]
) -> tuple[Callable[[list[list[Array]], PyTree], _Projectors], list[list[Array]]]:
    """The projectors as a function of hoisted values and x; one projector serves both sides."""
    if null_space is None:
        return (lambda frame, x: (None, None)), []
    made = null_space(x, *args)
    sides = 2 if isinstance(made, tuple) else 1

    def side(i: int) -> Callable[[PyTree, PyTree], PyTree]:
        def apply(x: PyTree, v: PyTree) -> PyTree:
            made = null_space(*_without_derivative((x, *args)))
            return (made[i] if isinstance(made, tuple) else made)(v)

        return apply

    hoisted = [_hoist(side(i), x, x) for i in range(sides)]
    functions, frame = [g for g, _ in hoisted], [values for _, values in hoisted]
    for g, values in hoisted:
        check_same(
            jax.eval_shape(g, values, x, x), x, "null_space's projector", "x", "it must map x's space into itself"
        )

    def project(frame: list[list[Array]], x: PyTree) -> _Projectors:
        maps = [functools.partial(g, values, x) for g, values in zip(functions, frame, strict=True)]
        return (maps[0], maps[1]) if sides == 2 else (maps[0], None)

    return project, frame


def _without_derivative(tree: PyTree) -> PyTree:
    """Strip tangents; leaves that can have none, numpy arrays and other objects pass as they are."""

    def strip(leaf: Any) -> Any:
        return lax.stop_gradient(leaf) if isinstance(leaf, Array) and jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf

    return jax.tree.map(strip, tree)


def _as_unknown(leaf: Any) -> Array:
    array = jnp.asarray(leaf)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise InputError(f"the solver returned an unknown of dtype {array.dtype}; x must be real floating-point arrays")
    return array
