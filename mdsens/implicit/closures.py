"""Turn arrays that a function closes over into arguments, by which jax can differentiate.

A function *closes over* a value that it uses without receiving this value as an argument.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import CellType, MethodType, ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
from jax.dtypes import float0
from jax.extend import core

from mdsens._util.errors import InputError
from mdsens._util.pytree import PyTree

__all__ = [
    "StaticArgument",
    "call_without_derivative",
    "hoist",
    "without_wrappers",
    "refusing_derivative",
    "without_derivative",
]


def hoist(f: Callable[..., PyTree], *examples: PyTree) -> tuple[Callable[..., PyTree], list[Array]]:
    """Rewrite f(*inputs) as g(values, *inputs), where ``values`` are all arrays that f closes over.

    f closes over an array that it uses without receiving this array as an argument. The function
    ``jax.closure_convert`` leaves out arrays that it believes to have no derivative. It also
    remembers f by identity, so that a second call may get tracers (jax's stand-ins for arrays) of
    the first call. Here every array is taken, and jax traces f again at each call.

    Args:
      f: a function of trees (nested containers) of arrays, traceable by jax.
      examples: inputs with the shapes and types of the inputs of later calls of g.

    Returns:
      the function g and the list ``values``.
    """
    # A new lambda at each call, since jax remembers what it traced by the identity of a function.
    closed, shape = jax.make_jaxpr(lambda *a: f(*a), return_shape=True)(*examples)
    # The constants are replaced by None: a derivative rule that keeps g would otherwise keep, and
    # so leak, the tracers among them. From jax 0.12 on, a bare jaxpr contains its constants, too.
    jaxpr = core.ClosedJaxpr(closed.jaxpr, [None] * len(closed.consts)).jaxpr
    structure = jax.tree.structure(shape)

    def g(values: list[Array], *inputs: PyTree) -> PyTree:
        out = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, values))(*jax.tree.leaves(inputs))
        return jax.tree.unflatten(structure, out)

    return g, list(closed.consts)


def without_derivative(tree: PyTree) -> PyTree:
    """Return a tree (nested containers) of arrays that jax treats as constants in derivatives.

    The derivative is stopped at every floating-point or complex jax array. Numpy arrays and other
    objects, which cannot have a derivative, are returned unchanged.
    """

    def strip(leaf: object) -> Any:
        if isinstance(leaf, Array) and jnp.issubdtype(leaf.dtype, jnp.inexact):
            return lax.stop_gradient(leaf)
        return leaf

    return jax.tree.map(strip, tree)


def refusing_derivative(tree: PyTree, of: PyTree, why: str) -> PyTree:
    """Return ``tree`` unchanged, but raise InputError when jax differentiates ``tree`` by ``of``.

    This is for a result that is piecewise constant, such as a number of contacts: jax would give a
    derivative of zero, which is wrong.

    Args:
      tree: the result, an array or nested containers of arrays.
      of: the input from which ``tree`` was computed, before any derivative was stopped.
      why: the text of the error message.
    """

    @jax.custom_jvp
    def same(tree: PyTree, of: PyTree) -> PyTree:
        return tree

    # symbolic_zeros: an input that does not change has a SymbolicZero as its tangent, which can be
    # told from a tangent whose value happens to be zero.
    @functools.partial(same.defjvp, symbolic_zeros=True)
    def rule(primals: tuple[PyTree, PyTree], tangents: tuple[PyTree, PyTree]) -> Any:
        moving = [
            t
            for t in jax.tree.leaves(tangents[1])
            if not isinstance(t, SymbolicZero) and t.dtype != float0  # float0: of an integer
        ]
        if moving:
            raise InputError(why)
        return primals[0], jax.tree.map(_zero_tangent, primals[0])

    floats = [
        leaf for leaf in jax.tree.leaves(of) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    ]
    return same(tree, floats)


def _zero_tangent(value: jax.Array) -> jax.Array | np.ndarray:
    """Return the tangent of an array that does not change: zeros, of the type that jax wants."""
    if jnp.issubdtype(jnp.result_type(value), jnp.inexact):
        return jnp.zeros_like(value)
    # integers and truth values have tangents of a type without content
    return np.zeros(jnp.shape(value), float0)


@dataclasses.dataclass(frozen=True)
class StaticArgument:
    """A wrapper around any object, which jax then passes on whole.

    Without the wrapper, jax would take a container such as a dict apart into the arrays in it.
    """

    value: Any


def without_wrappers(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that unwraps each StaticArgument among its arguments and then calls f.

    A :class:`StaticArgument` is the wrapper of an argument that jax must not take apart.
    """

    def call(*arguments: Any) -> Any:
        return f(*(a.value if isinstance(a, StaticArgument) else a for a in arguments))

    return call


def call_without_derivative(f: Callable[..., Any], arguments: tuple[PyTree, ...]) -> Any:
    """Call f(*arguments), and let jax differentiate f neither by arguments nor closed-over values.

    Closed-over values are those that f, or a function among the arguments, uses without receiving
    them as arguments. Stopping the derivative at the result would be enough for the result itself,
    but jax would still differentiate f by the closed-over values. That work costs time, fails
    behind ``pure_callback`` and, for a second derivative over a ``while_loop``, raises a TypeError
    (jax 0.10.1).
    """
    stopped = without_derivative(arguments)
    # Tracers are of the type Array, too, but the derivative by those is stopped already. What is
    # left are functions and other objects, inside of which tracers may be hidden.
    objects = [f, *(leaf for leaf in jax.tree.leaves(stopped) if not isinstance(leaf, Array))]
    if not _reaches_tracer(objects):
        # Called directly, without tracing: outside jit f may be plain Python, such as scipy.
        return f(*stopped)
    hoisted, values = hoist(lambda: f(*stopped))
    return hoisted(without_derivative(values))


def _reaches_tracer(objects: list[Any]) -> bool:
    """Return whether any of the objects refers to a tracer, jax's stand-in for an array.

    The search covers closures, default arguments, partials, ``self``, dataclasses and containers.
    Where no object refers to a tracer, the caller takes a shortcut: it calls a function directly,
    without turning closed-over arrays into arguments. Should the search miss a tracer, the
    derivative by this tracer is still stopped at the result of the function.
    """
    pending = list(objects)
    visited = set()
    while pending:
        value = pending.pop()
        if isinstance(value, Tracer):
            return True
        # ``visited`` ends the search where objects refer to each other in a circle.
        if id(value) in visited or isinstance(value, type | ModuleType):
            continue
        visited.add(id(value))
        pending += _list_references(value) if callable(value) else _list_contents(value)
    return False


def _list_references(f: Callable[..., Any]) -> list[Any]:
    """Return the objects that a function can use without receiving them as arguments.

    These are default arguments, closed-over values, ``self``, arguments that a partial binds, and
    the function that a decorator wraps.
    """
    if isinstance(f, functools.partial):
        return [f.func, f.args, f.keywords]
    if isinstance(f, MethodType):
        # To jax an ordinary object is a single leaf, so its attributes are listed here.
        attributes = getattr(f.__self__, "__dict__", {})
        return [f.__func__, f.__self__, *attributes.values()]
    names = ("__wrapped__", "__defaults__", "__kwdefaults__")
    cells = getattr(f, "__closure__", None) or ()
    contents = [cell.cell_contents for cell in cells if _is_filled(cell)]
    return [*(getattr(f, name, None) for name in names), *contents]


def _list_contents(value: Any) -> list[Any]:
    """Return the objects in a dict, in a dataclass, or in nested containers of another kind."""
    if isinstance(value, Mapping):
        return list(value.values())
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    return [leaf for leaf in jax.tree.leaves(value) if leaf is not value]


def _is_filled(cell: CellType) -> bool:
    """Return whether a closure cell (the slot of one captured variable) is set and not None."""
    try:
        return cell.cell_contents is not None
    except ValueError:  # the closed-over name has not been assigned yet
        return False
