"""Functions with what they take from around them made explicit, so that jax sees it as an argument."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import CellType, MethodType, ModuleType
from typing import Any

import jax
import jax.numpy as jnp
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
    """f as g(values, *examples), where ``values`` are all the arrays f takes from around it.

    ``jax.closure_convert`` leaves behind the values that it thinks carry no derivative, and
    remembers f by identity, so that a second call may get the first one's tracers; here every value
    is taken, anew at each call.
    """
    closed, shape = jax.make_jaxpr(lambda *a: f(*a), return_shape=True)(*examples)
    # Without its values, which a rule that holds it would leak; from jax 0.12 on a bare jaxpr has
    # them too.
    jaxpr, structure = (
        core.ClosedJaxpr(closed.jaxpr, [None] * len(closed.consts)).jaxpr,
        jax.tree.structure(shape),
    )

    def g(values: list[Array], *inputs: PyTree) -> PyTree:
        out = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, values))(*jax.tree.leaves(inputs))
        return jax.tree.unflatten(structure, out)

    return g, list(closed.consts)


def without_derivative(tree: PyTree) -> PyTree:
    """Strip tangents; leaves that can have none, numpy arrays and other objects pass as they are."""

    def strip(leaf: Any) -> Any:
        return (
            lax.stop_gradient(leaf)
            if isinstance(leaf, Array) and jnp.issubdtype(leaf.dtype, jnp.inexact)
            else leaf
        )

    return jax.tree.map(strip, tree)


def refusing_derivative(tree: PyTree, of: PyTree, why: str) -> PyTree:
    """``tree`` itself, which raises InputError where it is differentiated by ``of``: it would be
    zero, and wrong.

    Args:
      of: what it depends on, as it was given.
      why: the message.
    """

    @jax.custom_jvp
    def same(tree: PyTree, of: PyTree) -> PyTree:
        return tree

    @functools.partial(same.defjvp, symbolic_zeros=True)
    def rule(primals: Any, tangents: Any) -> Any:
        moving = [
            t
            for t in jax.tree.leaves(tangents[1])
            if not isinstance(t, SymbolicZero) and t.dtype != float0
        ]
        if moving:
            raise InputError(why)
        return primals[0], jax.tree.map(jnp.zeros_like, primals[0])

    floats = [
        leaf for leaf in jax.tree.leaves(of) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    ]
    return same(tree, floats)


@dataclasses.dataclass(frozen=True)
class StaticArgument:
    """An argument that is no tree: a leaf to jax, whatever is in it."""

    value: Any


def without_wrappers(f: Callable[..., Any]) -> Callable[..., Any]:
    """f, called with what is held in those of its arguments that are held."""

    def call(*arguments: Any) -> Any:
        return f(*(a.value if isinstance(a, StaticArgument) else a for a in arguments))

    return call


def call_without_derivative(f: Callable[..., Any], arguments: tuple[PyTree, ...]) -> Any:
    """f(*arguments) on values without tangents, those included that f, or a function among the
    arguments, closes over.

    Stopping what comes out would do for the result. But jax would still differentiate f by what it
    closes over, which costs, fails behind ``pure_callback`` and, twice over a ``while_loop``,
    raises a TypeError (jax 0.10.1).
    """
    stopped = without_derivative(arguments)
    if not _reaches_tracer(
        [f, *(leaf for leaf in jax.tree.leaves(stopped) if not isinstance(leaf, Array))]
    ):
        return f(*stopped)  # not traced: outside of jit it may be plain Python
    hoisted, values = hoist(lambda: f(*stopped))
    return hoisted(without_derivative(values))


def _reaches_tracer(objects: list[Any]) -> bool:
    """Whether one of them reaches a tracer through closures, defaults, partials, ``self``, records
    or containers.

    Only a shortcut is at stake: a tracer hidden better is stopped where the result comes out.
    """
    pending, seen = list(objects), set()
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
            pending += [
                value.__func__,
                value.__self__,
                *getattr(value.__self__, "__dict__", {}).values(),
            ]
        elif callable(value):
            pending += [
                getattr(value, name, None)
                for name in ("__wrapped__", "__defaults__", "__kwdefaults__")
            ]
            pending += [
                cell.cell_contents
                for cell in getattr(value, "__closure__", None) or ()
                if _filled(cell)
            ]
        elif isinstance(value, Mapping):
            pending += value.values()
        elif dataclasses.is_dataclass(value):
            pending += [getattr(value, field.name, None) for field in dataclasses.fields(value)]
        else:
            pending += [leaf for leaf in jax.tree.leaves(value) if leaf is not value]
    return False


def _filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that is not bound yet
        return False
