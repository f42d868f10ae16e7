"""The derivative of a root x of F(x, theta) = 0, for any solver that computes the root.

    F(x, theta) = 0   =>   dF/dx dx = - dF/dtheta dtheta

Only the rule of forward mode (dx from dtheta) is written here. jax makes reverse mode by
transposing this rule, which is possible since the linear solve in the rule can be transposed. jax
makes higher orders by differentiating the rule: the root that enters the rule is the value of the
decorated function, which has the same rule. Source: Blondel et al., Efficient and Modular Implicit
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
from jax.typing import ArrayLike

from mdsens._util.environment import require_sound_jax
from mdsens._util.errors import InputError, short
from mdsens._util.pytree import PyTree, check_same
from mdsens._util.user_functions import Traceable
from mdsens._util.validation import is_integer
from mdsens.implicit._validation import check_functions, unknowns
from mdsens.implicit.closures import (
    StaticArgument,
    call_without_derivative,
    hoist,
    without_derivative,
    without_wrappers,
)
from mdsens.implicit.linear import Auto, LinearMap, Method, Operator
from mdsens.implicit.linear.result import SolveStats
from mdsens.implicit.linear.solution import linear_solve

__all__ = ["fixed_point", "root", "tangent"]

Condition: TypeAlias = Callable[..., PyTree]
Solver: TypeAlias = Callable[..., Any]
NullSpace: TypeAlias = Callable[..., LinearMap | tuple[LinearMap, LinearMap]]
Preconditioner: TypeAlias = Callable[..., LinearMap]
# Arrays that the projectors or the preconditioner close over, a list for each linear map.
MapValues: TypeAlias = list[list[Array]]
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
    """Decorate a solver of F(x, *args) = 0, so that its root has derivatives by ``args``.

        dx = - (dF/dx)^-1 (dF/dargs) dargs

    x are the unknowns, an array or nested containers (a tree) of arrays. The decorated solver
    composes with jvp, vjp, jacfwd, jacrev, hessian, vmap and jit of jax. The solver is only called,
    never differentiated: it may be a ``while_loop``, run outside of compiled code behind
    ``jax.pure_callback``, or, outside jit and vmap, be plain Python. The root also has a derivative
    by a value that is no argument of F, but that F uses (closes over) and that jax traces.

    Args:
      F: the function ``F(x, *args)``, whose values have the tree and shapes of x; traceable by jax,
        and twice differentiable for second derivatives.
      solve: method for the linear systems: Auto(), Direct(), GMRES() and the others of
        :mod:`mdsens.implicit`.
      symmetric: whether dF/dx is symmetric, as it is where F is a gradient. Symmetry halves the
        work of reverse mode and allows the method MINRES.
      positive_semidefinite: whether dF/dx is also positive semidefinite, as at a minimum. This
        allows the method CG.
      null_space: ``null_space(x, *args)`` returns the orthogonal projector that removes the null
        space of dF/dx, a linear function on trees like x; or a pair of projectors, for the right
        and the left null space. None where dF/dx is regular.
      has_aux: whether the solver returns ``(x, aux)``; the auxiliary output ``aux`` is passed on
        without a derivative.
      preconditioner: ``preconditioner(x, *args)`` returns a rough inverse of dF/dx, a linear
        function on trees like x; see :class:`~mdsens.implicit.Operator`. The preconditioner has no
        derivative, and the derivative of the root does not depend on it.
      preprocess: ``preprocess(init, *args)`` returns the pair ``(init, args)``. The tuple args in
        this pair replaces the arguments of the call, for the solver and for all other functions
        that are given to ``root``. jax differentiates ``preprocess``: use this function to convert
        units, or to map parameters that must stay positive.
      postprocess: the value of ``postprocess(x, *args)`` is returned in place of x. jax
        differentiates ``postprocess``: use this function for an F whose unknown is log x, or for a
        function of the root.
      static_argnums: positions in ``F(x, *args)``, x being 0, of arguments that are passed on as
        the objects they are and never taken apart into arrays: dataclasses, logs that the solver
        writes to, dicts with keys of mixed types. Functions, strings and other objects that are not
        containers need not be listed. Under jit, list the same arguments in ``static_argnums`` of
        jit as well.

    Returns:
      A decorator for ``solver(init, *args)``, with the initial guess ``init`` and any trees of
      arrays as args. The decorated solver has no derivative by ``init``, nor by entries of args
      that are not floating point (integers, booleans, None).

    Raises:
      InputError: F(x, *args) and x differ in tree or shape; x contains anything but real
        floating-point arrays; the solver is called with a keyword argument; an argument that
        ``static_argnums`` lists is traced by jax or missing; ``preprocess`` returns anything but
        (init, args).

    A derivative that jax computes cannot carry a status. Where the linear solve fails, the
    derivative is the best iterate of the solve. The derivative is NaN where there is no iterate (a
    singular matrix was factorized), or where the iterate is not finite. :func:`tangent` solves the
    same linear system and returns its status; :func:`~mdsens.implicit.certify` estimates how far
    from the root the solver stopped.

    Example:
      The equation x^3 = theta + 1 is solved, with log theta as the argument, log x as the result,
      and the number of steps as auxiliary output::

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
    for position in static_argnums:
        # bool is a subclass of int: True would otherwise pass as position 1
        if not (is_integer(position) and position >= 1):
            raise InputError(
                f"static_argnums={static_argnums!r} contains {position!r}, which is not the"
                " position of an argument; give whole numbers from 1, where 1 is the first argument"
                " after x in F(x, *args)"
            )
    F = without_wrappers(Traceable("the condition F", F))
    null_space = _without_wrappers_or_none(null_space)
    preconditioner = _without_wrappers_or_none(preconditioner)

    def decorate(solver: Solver) -> Solver:
        solving = Traceable("the solver", solver, "jax.pure_callback around all of it")

        @functools.wraps(solver)
        def solve_root(init: PyTree, *args: PyTree, **keywords: Any) -> Any:
            require_sound_jax()
            if keywords:
                raise InputError(
                    f"the keyword arguments {sorted(keywords)} have no place in F(x, *args); pass"
                    " these arguments by position, or bind them to the solver with"
                    " functools.partial before decorating the solver"
                )
            if preprocess is not None:
                # Outside of call_without_derivative, so that jax differentiates this function.
                init, args = _check_preprocessed(Traceable("preprocess", preprocess)(init, *args))
            args = _wrap_static(args, static_argnums)
            solution = call_without_derivative(without_wrappers(solving), (init, *args))
            if has_aux and not (isinstance(solution, tuple) and len(solution) == 2):
                raise InputError(
                    f"the solver returned {short(solution)}, but has_aux=True needs a pair; return"
                    " (x, aux) from the solver, or set has_aux=False"
                )
            x, aux = solution if has_aux else (solution, None)
            # The derivative comes from F alone, never from the steps of the solver.
            x = without_derivative(unknowns(x, "the solver returned"))
            x = _attach(
                F, x, args, solve, symmetric, positive_semidefinite, null_space, preconditioner
            )
            # x has its derivative from here on, and jax continues it through ``postprocess``.
            out = x
            if postprocess is not None:
                out = without_wrappers(Traceable("postprocess", postprocess))(x, *args)
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
    """Decorate a solver of x = T(x, *args), so that its fixed point has derivatives by ``args``.

        dx = (I - dT/dx)^-1 (dT/dargs) dargs

    This is :func:`root` with F(x, *args) = x - T(x, *args): the other arguments, the result and the
    errors are those of :func:`root`. ``symmetric``, ``positive_semidefinite``, ``null_space`` and
    ``preconditioner`` describe I - dT/dx, which is positive definite where T is a contraction with
    a symmetric derivative. For a contraction, the Neumann series ``solve=Neumann()`` needs the
    least memory.
    """
    check_functions(T=T)
    T = Traceable("the map T", T)

    def F(x: PyTree, *args: PyTree) -> PyTree:
        image = T(x, *args)
        check_same(image, x, "T(x, *args)", "x", "return from T a tree with the shapes of x")
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
    """Compute the change dx of a root of F(x, *args) = 0 from the changes dargs of its arguments.

        (dF/dx) dx = - (dF/dargs) dargs

    The change dx is the derivative, in forward mode, of a solver that :func:`root` decorates, by
    the same code. In addition, the status and the residual of the linear solve are returned, which
    a derivative of jax cannot carry. The function is traceable by jit and vmap.

    Args:
      F: the function ``F(x, *args)``; for a fixed point of T, the function x - T(x, *args).
      x: the root. Whether F is zero at x is not checked here, but by
        :func:`~mdsens.implicit.certify`.
      args: the other arguments of F, a tuple.
      dargs: the change of each argument, with the tree and shapes of the argument; None for an
        argument that is constant. An entry that is not floating point cannot change: give zero, or
        any value of the type of the entry, as its change.
      solve, symmetric, positive_semidefinite, null_space, preconditioner: as in :func:`root`.

    Returns:
      ``(dx, stats)``: dx with the tree and shapes of x, and the
      :class:`~mdsens.implicit.SolveStats` of the linear solve. Where the status of the solve is not
      good, dx is the best iterate, or zero where the iterate is not finite.

    Raises:
      InputError: args and dargs, or F(x, *args) and x, differ in number, tree, shape or precision;
        ``dargs`` changes a number that is not floating point.
    """
    check_functions(F=F, null_space=null_space, preconditioner=preconditioner)
    F = Traceable("the condition F", F)
    x = unknowns(x, "x is")
    moving = _find_moving_arguments(args, dargs)
    leaves, structure = jax.tree.flatten([args[i] for i in moving])
    changes = jax.tree.leaves([dargs[i] for i in moving])
    # The derivative is taken by the leaves with these indices; integers and booleans stay constant.
    floats = _find_floats(leaves, changes)

    def condition(values: list[Array], y: PyTree) -> PyTree:
        """Evaluate F(y, *args) with ``values`` in place of the arrays in args that change."""
        merged = list(leaves)
        full = list(args)
        for k, value in zip(floats, values, strict=True):
            merged[k] = value
        for i, arg in zip(moving, jax.tree.unflatten(structure, merged), strict=True):
            full[i] = arg
        return F(y, *full)

    values = [jnp.asarray(leaves[k]) for k in floats]
    _check_equations(jax.eval_shape(condition, values, x), x)
    projectors = _as_tuple(None if null_space is None else null_space(x, *args))
    rough_inverse = None if preconditioner is None else preconditioner(x, *args)
    to_operator = _operator_of(symmetric, positive_semidefinite, projectors, rough_inverse)
    dvalues = [
        jnp.asarray(changes[k], value.dtype) for k, value in zip(floats, values, strict=True)
    ]
    return _response(condition, values, dvalues, x, to_operator, solve, not_finite=0.0)


def _find_moving_arguments(args: Sequence[PyTree], dargs: Sequence[PyTree]) -> list[int]:
    """Check the arguments of F and their changes; return the indices of arguments that change.

    Raises:
      InputError: args and dargs are no tuples, or differ in number, tree or shape.
    """
    if not isinstance(args, list | tuple) or not isinstance(dargs, list | tuple):
        raise InputError(
            f"`args` is a {type(args).__name__} and `dargs` is a {type(dargs).__name__}; give each"
            " as a tuple with one entry for each argument of F after x"
        )
    if len(args) != len(dargs):
        raise InputError(
            f"`dargs` has {len(dargs)} entries, but `args` has {len(args)}; give one change for"
            " each argument, None for an argument that is constant"
        )
    moving = [i for i, change in enumerate(dargs) if change is not None]
    for i in moving:
        remedy = "give a change with the tree and shapes of the argument, or None"
        check_same(dargs[i], args[i], f"dargs[{i}]", f"args[{i}]", remedy)
    return moving


def _find_floats(leaves: Sequence[ArrayLike], changes: Sequence[ArrayLike]) -> list[int]:
    """Return the indices of the floating-point numbers or arrays among the leaves of arguments.

    ``changes`` holds the change of each leaf.

    Raises:
      InputError: the change of a leaf that is not floating point is not zero.
    """
    floats = [
        k for k, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    ]
    for k, (leaf, change) in enumerate(zip(leaves, changes, strict=True)):
        if k not in floats and _is_nonzero(change):
            raise InputError(
                f"`dargs` changes the entry {leaf!r} of `args`, whose type"
                f" {jnp.result_type(leaf)} has no derivative; give this entry as a floating-point"
                " number, or give None as the change of the argument"
            )
    return floats


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
    """Return the root x of F(x, *args) = 0 unchanged, but with a derivative that jax can use.

    The derivative of the root is by args and by every array that F uses without receiving this
    array as an argument.
    """
    # ``params`` are all arrays that F depends on besides x: args, and arrays that F closes over.
    # The lambda closes over args on purpose: ``hoist`` then treats both kinds of arrays alike.
    condition, params = hoist(lambda y: F(y, *args), x)
    _check_equations(jax.eval_shape(condition, params, x), x)
    project, project_values = _hoist_maps(null_space, "null_space's projector", x, args)
    precondition, precondition_values = _hoist_maps(preconditioner, "the preconditioner", x, args)

    @jax.custom_jvp
    def attached(x: PyTree, params: list[Array], map_values: tuple[MapValues, MapValues]) -> PyTree:
        return x

    @functools.partial(attached.defjvp, symbolic_zeros=True)
    def rule(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[PyTree, PyTree]:
        # Only the tangents of params are used: the solver's x is a constant, and the linear maps
        # have no derivative.
        x, params, map_values = primals
        # Not the x that came in, which is constant: for derivatives of higher order, this x depends
        # on params by this same rule.
        x = attached(x, params, map_values)
        # getattr, since the tangent of a Python number is a Python number, without a dtype
        constant = [
            isinstance(t, SymbolicZero) or getattr(t, "dtype", None) == float0 for t in tangents[1]
        ]
        active = [i for i, is_constant in enumerate(constant) if not is_constant]
        if not active:
            return x, jax.tree.map(jnp.zeros_like, x)

        def of_active(values: list[Array], y: PyTree) -> PyTree:
            merged = list(params)
            for i, value in zip(active, values, strict=True):
                merged[i] = value
            return condition(merged, y)

        project_values, precondition_values = map_values
        projectors = project(project_values, x)
        rough_inverse = next(iter(precondition(precondition_values, x)), None)
        to_operator = _operator_of(symmetric, positive_semidefinite, projectors, rough_inverse)
        values = [params[i] for i in active]
        changes = [jnp.asarray(tangents[1][i]) for i in active]
        # NaN, since a derivative of jax has no status that could tell of a failed solve
        nan = float("nan")
        dx, _ = _response(of_active, values, changes, x, to_operator, solve, not_finite=nan)
        return x, dx

    return attached(x, params, (project_values, precondition_values))


def _response(
    condition: Callable[[list[Array], PyTree], PyTree],
    values: list[Array],
    changes: list[Array],
    x: PyTree,
    to_operator: Callable[[LinearMap], Operator],
    solve: Method,
    not_finite: float,
) -> tuple[PyTree, SolveStats]:
    """Compute the change dx of a root x of condition(values, x) = 0 from changes of the values.

    Args:
      condition: the function whose root is x.
      values: the arrays, besides x, on which the condition depends.
      changes: the change of each array in values.
      to_operator: function that makes the operator of the linear system from the function v -> J v,
        with J the Jacobian of the condition by x.
      not_finite: value of the entries of dx where the solve gives a number that is not finite.
    """
    # df is (dF/dtheta) dtheta at constant x: the right-hand side, but for its sign.
    _, df = jax.jvp(lambda v: condition(v, x), (values,), (changes,))
    # linearize, not jvp: F is evaluated once, and each product of the solver is linear work only
    _, jacobian = jax.linearize(functools.partial(condition, values), x)
    right_side = jax.tree.map(jnp.negative, df)
    return linear_solve(to_operator(jacobian), right_side, solve, not_finite=not_finite)


def _operator_of(
    symmetric: bool,
    positive_semidefinite: bool,
    projectors: Sequence[LinearMap],
    rough_inverse: LinearMap | None,
) -> Callable[[LinearMap], Operator]:
    """Return a function that makes an :class:`Operator` from the products v -> J v of a Jacobian J.

    Args:
      symmetric, positive_semidefinite: whether J is symmetric, and whether J is semidefinite.
      projectors: projectors that remove the null space of J: none, one for both null spaces, or
        two, for the right and the left null space.
      rough_inverse: the products v -> M v with an approximate inverse M of J; None for none.
    """
    # A single projector serves both sides: left = None means the same as right.
    right, left = (*projectors, None, None)[:2]
    return lambda jacobian: Operator(
        jacobian, symmetric, positive_semidefinite, right, left, preconditioner=rough_inverse
    )


def _as_tuple(maps: LinearMap | tuple[LinearMap, ...] | None) -> tuple[LinearMap, ...]:
    """Return linear maps as a tuple: an empty one for None, a single map as its only entry."""
    if maps is None:
        return ()
    return maps if isinstance(maps, tuple) else (maps,)


def _hoist_maps(
    make: Callable[..., Any] | None, name: str, x: PyTree, args: tuple[PyTree, ...]
) -> tuple[Callable[[MapValues, PyTree], list[LinearMap]], MapValues]:
    """Turn the arrays that linear maps (projectors, a preconditioner) close over into an argument.

    A map closes over an array that it uses without receiving this array as an argument.

    Args:
      make: a function; ``make(x, *args)`` is a linear map on trees of arrays like x, or a tuple of
        such maps. None for no map.
      name: name of the maps, for error messages.
      x, args: the unknowns and the other arguments, as in F(x, *args) = 0.

    Returns:
      ``(maps, values)``: ``values`` are the arrays, and ``maps(values, x)`` is the list of the
      linear maps. No map has a derivative by x or args.
    """

    if make is None:
        return (lambda map_values, x: []), []
    make_maps = Traceable(name, make)

    def one_map(i: int) -> Callable[[PyTree, PyTree], PyTree]:
        def product(x: PyTree, v: PyTree) -> PyTree:
            maps = _as_tuple(make_maps(*without_derivative((x, *args))))
            return Traceable(name, maps[i])(v)

        return product

    # make_maps is called once here to count the maps, and again in each map when it is traced.
    hoisted = [hoist(one_map(i), x, x) for i in range(len(_as_tuple(make_maps(x, *args))))]
    functions = [g for g, _ in hoisted]
    map_values = [values for _, values in hoisted]
    for g, values in hoisted:
        check_same(
            jax.eval_shape(g, values, x, x), x, name, "x", "return a tree with the shapes of x"
        )

    def maps(map_values: MapValues, x: PyTree) -> list[LinearMap]:
        pairs = zip(functions, map_values, strict=True)
        return [functools.partial(g, values, x) for g, values in pairs]

    return maps, map_values


def _without_wrappers_or_none(f: Callable[..., Any] | None) -> Callable[..., Any] | None:
    return None if f is None else without_wrappers(f)


def _check_equations(image: PyTree, x: PyTree) -> None:
    """Raise InputError unless F(x, *args), given as ``image``, has the shapes and precision of x.

    F(x, *args) = 0 then has one equation for each unknown in x.
    """
    check_same(image, x, "F(x, *args)", "x", "F must give one equation for each unknown")
    for (path, leaf), unknown in zip(
        jax.tree_util.tree_leaves_with_path(image), jax.tree.leaves(x), strict=True
    ):
        if leaf.dtype != unknown.dtype:
            raise InputError(
                f"F(x, *args){jax.tree_util.keystr(path)} has dtype {leaf.dtype}, but x has dtype"
                f" {unknown.dtype}; give x and args in the same precision"
            )


def _is_nonzero(change: ArrayLike) -> bool:
    """Return whether the change of an argument is floating point, with an entry other than zero.

    The result is False for an array that jax traces, whose values are not known.
    """
    # a traced array has no values to look at yet
    if isinstance(change, Tracer) or not jnp.issubdtype(jnp.result_type(change), jnp.floating):
        return False
    return bool(np.any(np.asarray(change) != 0))


def _check_preprocessed(result: object) -> tuple[PyTree, tuple[PyTree, ...]]:
    """Return the result of the user's function ``preprocess``, or raise InputError.

    The result must be a pair (init, args): an initial guess and a tuple of arguments.
    """
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], tuple)):
        raise InputError(
            f"`preprocess` returned a {type(result).__name__} that is not a pair (init, args);"
            " return such a pair, with args as a tuple"
        )
    return result


def _wrap_static(args: tuple[PyTree, ...], positions: tuple[int, ...]) -> tuple[PyTree, ...]:
    """Wrap the arguments at the given positions, so that jax does not take them apart into arrays.

    Positions count the arguments of F(x, *args): x is 0, and the first entry of args is 1.
    """
    for position in positions:
        if position > len(args):
            raise InputError(
                f"static_argnums={positions!r} contains {position}, but this call of F(x, *args)"
                f" has {len(args)} arguments after x; pass argument {position}, or remove"
                f" {position} from static_argnums"
            )
        if isinstance(args[position - 1], Tracer):
            raise InputError(
                f"argument {position} is in static_argnums={positions!r}, but jax traces this"
                f" argument; remove {position} from static_argnums, or list the argument in"
                " static_argnums of jax.jit as well"
            )
    return tuple(StaticArgument(arg) if i + 1 in positions else arg for i, arg in enumerate(args))
