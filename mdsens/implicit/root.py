"""The derivative of a root, whatever found it.

    F(x, theta) = 0   =>   dF/dx dx = - dF/dtheta dtheta

One forward rule. Reverse mode and higher orders come by transposing and differentiating it: the
linear solve in it is transposable, and the root that enters it is the decorated function's own
value, so that it carries the same rule. Blondel et al., Efficient and Modular Implicit
Differentiation, arXiv:2105.15183, equation 2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
from jax.dtypes import float0

from mdsens._util.environment import require_sound_jax
from mdsens._util.errors import InputError, short
from mdsens._util.pytree import PyTree, check_same
from mdsens._util.user_functions import Traceable
from mdsens.implicit._closures import (
    StaticArgument,
    call_without_derivative,
    hoist,
    without_derivative,
    without_wrappers,
)
from mdsens.implicit._validation import check_functions, unknowns
from mdsens.implicit.linear.operators import Auto, LinearMap, Method, Operator
from mdsens.implicit.linear.result import SolveStats
from mdsens.implicit.linear.solution import linear_solve

__all__ = ["fixed_point", "root", "tangent"]

Condition: TypeAlias = Callable[..., PyTree]
Solver: TypeAlias = Callable[..., Any]
NullSpace: TypeAlias = Callable[..., LinearMap | tuple[LinearMap, LinearMap]]
Preconditioner: TypeAlias = Callable[..., LinearMap]
_AUTO = Auto()


def root(
    F: Condition,
    solve: Method = _AUTO,
    symmetric: bool = False,
    positive_semidefinite: bool = False,
    null_space: NullSpace | None = None,
    has_aux: bool = False,
    preconditioner: Preconditioner | None = None,
    preprocess: Callable[..., tuple[PyTree, tuple[PyTree, ...]]] | None = None,
    postprocess: Callable[..., PyTree] | None = None,
    static_argnums: int | tuple[int, ...] = (),
) -> Callable[[Solver], Solver]:
    """Give any solver of F(x, *args) = 0 the derivative of the root by ``args``.

        dx = - (dF/dx)^-1 (dF/dargs) dargs

    The decorated solver composes with jvp, vjp, jacfwd, jacrev, hessian, vmap and jit. The solver
    is only called, never differentiated: it may be a ``while_loop``, run on the host behind
    ``jax.pure_callback``, or, outside jit and vmap, be plain Python. Where F closes over a traced
    value, its derivative is followed like an argument's.

    Args:
      F: ``F(x, *args)``, with the tree and shapes of x; traceable, and twice differentiable for
        second derivatives.
      solve: how the linear systems are solved; an option record of
        :mod:`mdsens.implicit.linear.operators`.
      symmetric: dF/dx is symmetric, as for a gradient. Halves the work of reverse mode and opens
        MINRES.
      positive_semidefinite: dF/dx is so too, as at a minimum. Opens CG.
      null_space: ``null_space(x, *args)`` gives the orthogonal projector off the null space of
        dF/dx (or the pair off the right and the left one), a linear function on trees like x. None
        where dF/dx is regular.
      has_aux: the solver returns ``(x, aux)``; ``aux`` is passed on, and has no derivative.
      preconditioner: ``preconditioner(x, *args)`` gives a rough inverse of dF/dx, a linear function
        on trees like x; see :class:`~mdsens.implicit.Operator`. It has no derivative, and changes
        none.
      preprocess: ``preprocess(init, *args)`` gives ``(init, args)``, a tuple of args in place of
        those of the call for the solver and all other functions here. Its derivative is followed:
        it is where a call's units, or parameters that must stay positive, become those of F.
      postprocess: ``postprocess(x, *args)`` is returned in place of x, and differentiated as it is
        written: for F in log x, or a function of the root.
      static_argnums: places in ``F(x, *args)``, x being 0, of arguments that are handed on as the
        object they are and never taken apart as trees: records, logs that the solver writes to,
        dicts with keys of mixed types. Functions, strings and other objects that are no trees need
        not be named. Under jit name them to jit as well.

    Returns:
      A decorator for ``solver(init, *args)``. ``init`` has no derivative; args are any trees, and
      leaves that are not floating point (integers, booleans, None) have none.

    Raises:
      InputError: F(x, *args) and x differ in tree or shape; x holds anything but real
        floating-point arrays; a keyword argument; a static argument that is traced, or is not
        there; ``preprocess`` gives anything but (init, args).

    The derivative has no status to carry: a linear system that fails gives its best iterate, NaN
    where it has none (a singular one by a factor) or where a number in it is not finite.
    :func:`tangent` solves the same system and tells how it went, :func:`~mdsens.implicit.certify`
    how far the solver stopped from the root.

    Example:
      x^3 = theta + 1 with theta given by its logarithm and x wanted by its own, and how many steps
      it took::

        @root(
            lambda x, theta: x**3 - theta - 1,
            has_aux=True,
            preprocess=lambda init, logarithm: (init, (jnp.exp(logarithm),)),
            postprocess=lambda x, theta: jnp.log(x),
        )
        def solver(init, theta):
            return jnp.cbrt(theta + 1), {"steps": 1}

        y, aux = solver(1.0, 0.5)
        slope = jax.grad(lambda t: solver(1.0, t)[0])(0.5)
    """
    check_functions(
        F=F,
        null_space=null_space,
        preconditioner=preconditioner,
        preprocess=preprocess,
        postprocess=postprocess,
    )
    static_argnums = (static_argnums,) if isinstance(static_argnums, int) else static_argnums
    for place in static_argnums:
        if not (isinstance(place, int) and not isinstance(place, bool) and place >= 1):
            raise InputError(
                f"static_argnums={static_argnums!r}: {place!r} is no argument of F(x, *args) after"
                " x, from 1"
            )
    F = without_wrappers(Traceable("the condition F", F))
    null_space, preconditioner = _without_wrappers(null_space), _without_wrappers(preconditioner)

    def decorate(solver: Solver) -> Solver:
        solving = Traceable("the solver", solver, "jax.pure_callback around all of it")

        @functools.wraps(solver)
        def solve_root(init: PyTree, *args: PyTree, **keywords: Any) -> Any:
            require_sound_jax()
            if keywords:
                raise InputError(
                    f"the keyword arguments {sorted(keywords)} have no place in F(x, *args); pass"
                    " them by position, or bind them with functools.partial before decorating"
                )
            if preprocess is not None:
                init, args = _prepared(Traceable("preprocess", preprocess)(init, *args))
            args = _held(args, static_argnums)
            found = call_without_derivative(without_wrappers(solving), (init, *args))
            if has_aux and not (isinstance(found, tuple) and len(found) == 2):
                raise InputError(
                    f"the solver returned {short(found)} and has_aux is True: return (x, aux)"
                )
            x, aux = found if has_aux else (found, None)
            x = without_derivative(unknowns(x, "the solver returned"))
            x = _attach(
                F, x, args, solve, symmetric, positive_semidefinite, null_space, preconditioner
            )
            out = (
                x
                if postprocess is None
                else without_wrappers(Traceable("postprocess", postprocess))(x, *args)
            )
            return (out, without_derivative(aux)) if has_aux else out

        return solve_root

    return decorate


def fixed_point(
    T: Condition,
    solve: Method = _AUTO,
    symmetric: bool = False,
    positive_semidefinite: bool = False,
    null_space: NullSpace | None = None,
    has_aux: bool = False,
    preconditioner: Preconditioner | None = None,
    preprocess: Callable[..., tuple[PyTree, tuple[PyTree, ...]]] | None = None,
    postprocess: Callable[..., PyTree] | None = None,
    static_argnums: int | tuple[int, ...] = (),
) -> Callable[[Solver], Solver]:
    """Give any solver of x = T(x, *args) the derivative of the fixed point: :func:`root` of x -
    T(x, *args).

        dx = (I - dT/dx)^-1 (dT/dargs) dargs

    Args, returns and raises as :func:`root`; ``symmetric``, ``positive_semidefinite``,
    ``null_space`` and ``preconditioner`` speak of I - dT/dx, which is positive definite where T is
    a contraction with a symmetric derivative. Of a contraction, ``solve=Neumann()`` needs the least
    memory.
    """
    check_functions(T=T)
    T = Traceable("the map T", T)

    def F(x: PyTree, *args: PyTree) -> PyTree:
        image = T(x, *args)
        check_same(image, x, "T(x, *args)", "x", "T must map the unknowns' space into itself")
        return jax.tree.map(jnp.subtract, x, image)

    return root(
        F,
        solve,
        symmetric,
        positive_semidefinite,
        null_space,
        has_aux,
        preconditioner,
        preprocess,
        postprocess,
        static_argnums,
    )


def tangent(
    F: Condition,
    x: PyTree,
    args: Sequence[PyTree],
    dargs: Sequence[PyTree],
    solve: Method = _AUTO,
    symmetric: bool = False,
    positive_semidefinite: bool = False,
    null_space: NullSpace | None = None,
    preconditioner: Preconditioner | None = None,
) -> tuple[PyTree, SolveStats]:
    """The change of a root by a change of its arguments, and the evidence that it is one.

        (dF/dx) dx = - (dF/dargs) dargs

    What :func:`root` gives in forward mode, by the same code, with the status and the residual that
    a derivative of jax has no place for. Traceable by jit and vmap.

    Args:
      F: ``F(x, *args)``; of a fixed point x - T(x, *args).
      x: the root. That F is zero there is not checked: :func:`~mdsens.implicit.certify` does.
      args: the arguments.
      dargs: the change of each, with its tree and shapes; None for an argument that stays. A leaf
        that is not floating point cannot change: give zero, or anything of its own type.
      solve: as in :func:`root`, and so the others.

    Returns:
      ``(dx, stats)`` as :func:`mdsens.implicit.solve`: dx with the tree of x, and the best iterate,
      or zero where it is not finite, under a status that is not good.

    Raises:
      InputError: args and dargs, or F(x, *args) and x, differ in number, tree, shape or precision;
        a number that is no floating-point one is to change.
    """
    check_functions(F=F, null_space=null_space, preconditioner=preconditioner)
    F, x = Traceable("the condition F", F), unknowns(x, "x is")
    if not isinstance(args, list | tuple) or not isinstance(dargs, list | tuple):
        raise InputError(
            f"args is a {type(args).__name__} and dargs a {type(dargs).__name__}; give tuples, one"
            " entry an argument"
        )
    if len(args) != len(dargs):
        raise InputError(
            f"dargs has {len(dargs)} changes for {len(args)} args; give one each, None where it"
            " stays"
        )
    moving = [i for i, change in enumerate(dargs) if change is not None]
    for i in moving:
        check_same(
            dargs[i], args[i], f"dargs[{i}]", f"args[{i}]", "give a change of its form, or None"
        )
    leaves, structure = jax.tree.flatten([args[i] for i in moving])
    changes = jax.tree.leaves([dargs[i] for i in moving])
    float_at = [
        k for k, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    ]
    for k, (leaf, change) in enumerate(zip(leaves, changes, strict=True)):
        if k not in float_at and _changes(change):
            raise InputError(
                f"dargs changes {leaf!r} of args, of type {jnp.result_type(leaf)}, which has no"
                " derivative; give it as a floating-point number, or a change of None"
            )

    def condition(values: list[Array], y: PyTree) -> PyTree:
        merged, full = list(leaves), list(args)
        for k, value in zip(float_at, values, strict=True):
            merged[k] = value
        for i, arg in zip(moving, jax.tree.unflatten(structure, merged), strict=True):
            full[i] = arg
        return F(y, *full)

    values = [jnp.asarray(leaves[k]) for k in float_at]
    _check_equations(jax.eval_shape(condition, values, x), x)
    sides = _maps(None if null_space is None else null_space(x, *args))
    by = None if preconditioner is None else preconditioner(x, *args)
    declared = _declared(symmetric, positive_semidefinite, sides, by)
    dvalues = [
        jnp.asarray(changes[k], value.dtype) for k, value in zip(float_at, values, strict=True)
    ]
    return _response(condition, values, dvalues, x, declared, solve, not_finite=0.0)


def _attach(
    F: Condition,
    x: PyTree,
    args: tuple[PyTree, ...],
    solve: Method,
    symmetric: bool,
    positive_semidefinite: bool,
    null_space: NullSpace | None,
    preconditioner: Preconditioner | None,
) -> PyTree:
    """x itself, with the derivative of the root of F by everything that F depends on."""
    condition, params = hoist(lambda y: F(y, *args), x)
    _check_equations(jax.eval_shape(condition, params, x), x)
    project, frame = _hoist_maps(null_space, "null_space's projector", x, args)
    precondition, by = _hoist_maps(preconditioner, "the preconditioner", x, args)

    @jax.custom_jvp
    def attached(x: PyTree, params: list[Array], frames: Any) -> PyTree:
        return x

    @functools.partial(attached.defjvp, symbolic_zeros=True)
    def rule(primals: Any, tangents: Any) -> tuple[PyTree, PyTree]:
        x, params, frames = primals
        # The value of the rule itself, not the x that came in: of higher order, it depends on
        # params by this rule.
        x = attached(x, params, frames)
        # a Python number comes as it is, without a dtype
        still = [
            isinstance(t, SymbolicZero) or getattr(t, "dtype", None) == float0 for t in tangents[1]
        ]
        active = [i for i, stays in enumerate(still) if not stays]
        if not active:
            return x, jax.tree.map(jnp.zeros_like, x)

        def of_active(values: list[Array], y: PyTree) -> PyTree:
            merged = list(params)
            for i, value in zip(active, values, strict=True):
                merged[i] = value
            return condition(merged, y)

        frame, by = frames
        declared = _declared(
            symmetric,
            positive_semidefinite,
            project(frame, x),
            next(iter(precondition(by, x)), None),
        )
        values, changes = [params[i] for i in active], [jnp.asarray(tangents[1][i]) for i in active]
        return (
            x,
            _response(of_active, values, changes, x, declared, solve, not_finite=float("nan"))[0],
        )

    return attached(x, params, (frame, by))


def _response(
    condition: Callable[[list[Array], PyTree], PyTree],
    values: list[Array],
    changes: list[Array],
    x: PyTree,
    declared: Callable[[LinearMap], Operator],
    solve: Method,
    not_finite: float,
) -> tuple[PyTree, SolveStats]:
    """dx at a root of condition(values, x) for changes of the values."""
    _, df = jax.jvp(lambda v: condition(v, x), (values,), (changes,))
    _, jacobian = jax.linearize(functools.partial(condition, values), x)
    return linear_solve(
        declared(jacobian), jax.tree.map(jnp.negative, df), solve, not_finite=not_finite
    )


def _declared(
    symmetric: bool, positive_semidefinite: bool, sides: Sequence[LinearMap], by: LinearMap | None
) -> Callable[[LinearMap], Operator]:
    """The Jacobian as an operator with what is known of it; one projector serves both sides."""
    right, left = (*sides, None, None)[:2]
    return lambda jacobian: Operator(
        jacobian, symmetric, positive_semidefinite, right, left, preconditioner=by
    )


def _maps(made: Any) -> tuple[LinearMap, ...]:
    return () if made is None else made if isinstance(made, tuple) else (made,)


def _hoist_maps(
    make: Callable[..., Any] | None, name: str, x: PyTree, args: tuple[PyTree, ...]
) -> tuple[Callable[[list[list[Array]], PyTree], list[LinearMap]], list[list[Array]]]:
    """The linear maps that ``make(x, *args)`` gives, as a function of hoisted values and x; none
    have a derivative.
    """

    if make is None:
        return (lambda frame, x: []), []
    made = Traceable(name, make)

    def side(i: int) -> Callable[[PyTree, PyTree], PyTree]:
        return lambda x, v: Traceable(name, _maps(made(*without_derivative((x, *args))))[i])(v)

    hoisted = [hoist(side(i), x, x) for i in range(len(_maps(made(x, *args))))]
    functions, frame = [g for g, _ in hoisted], [values for _, values in hoisted]
    for g, values in hoisted:
        check_same(
            jax.eval_shape(g, values, x, x), x, name, "x", "it must map x's space into itself"
        )

    def maps(frame: list[list[Array]], x: PyTree) -> list[LinearMap]:
        return [functools.partial(g, values, x) for g, values in zip(functions, frame, strict=True)]

    return maps, frame


def _without_wrappers(f: Callable[..., Any] | None) -> Callable[..., Any] | None:
    return None if f is None else without_wrappers(f)


def _check_equations(image: PyTree, x: PyTree) -> None:
    """Refuse an F that does not give one equation an unknown, of its precision."""
    check_same(image, x, "F(x, *args)", "x", "F must give one equation an unknown")
    for (path, leaf), unknown in zip(
        jax.tree_util.tree_leaves_with_path(image), jax.tree.leaves(x), strict=True
    ):
        if leaf.dtype != unknown.dtype:
            raise InputError(
                f"F(x, *args){jax.tree_util.keystr(path)} is of {leaf.dtype}, but x of"
                f" {unknown.dtype}; give x and args in one precision"
            )


def _changes(change: Any) -> bool:
    """Whether a change is a floating-point number other than zero, as far as can be seen."""
    if isinstance(change, Tracer) or not jnp.issubdtype(jnp.result_type(change), jnp.floating):
        return False
    return bool(np.any(np.asarray(change) != 0))


def _prepared(made: Any) -> tuple[PyTree, tuple[PyTree, ...]]:
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], tuple)):
        raise InputError(
            f"preprocess gave a {type(made).__name__} that is not (init, args); return a pair, args"
            " as a tuple"
        )
    return made


def _held(args: tuple[PyTree, ...], places: tuple[int, ...]) -> tuple[PyTree, ...]:
    """The arguments, those at ``places`` counted from 1 held as they are."""
    for place in places:
        if place > len(args):
            raise InputError(
                f"static_argnums={places!r}, but F(x, *args) has {len(args)} args after x here;"
                " mend it"
            )
        if isinstance(args[place - 1], Tracer):
            raise InputError(
                f"the argument {place} is in static_argnums={places!r} and is traced by jax; leave"
                " it out there, or name it to jax.jit as static, too"
            )
    return tuple(StaticArgument(arg) if i + 1 in places else arg for i, arg in enumerate(args))
