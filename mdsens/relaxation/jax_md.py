"""The one door to jax-md: its minimizers, loaded without the rest of it, behind one adapter.

``import jax_md`` brings neural networks along and takes five seconds; the minimizers alone take a
tenth of one. So ``jax_md.minimize`` is imported with a stand-in for the package around it, which
runs nothing, and of which Python forgets everything afterwards: a later ``import jax_md`` gets all
of it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mdsens._util.errors import InputError, short
from mdsens._util.validation import check_positive

__all__ = ["JaxMD", "jax_md_minimize"]


class _NotKeptError(ImportError):
    """Ends an import of a package that is not to be kept."""


class _MinimizeAlone(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands for ``jax_md`` during one import in one thread: a package that runs nothing but
    imports ``minimize``.

    It ends with an error, so that Python forgets the package. All of it is within Python's own
    import of ``jax_md``: another thread that imports that package waits, and then gets it whole.
    """

    module: Any = None

    def __init__(self, package: importlib.machinery.ModuleSpec):
        self.thread = threading.get_ident()
        self.spec = importlib.machinery.ModuleSpec(
            package.name, self, origin=package.origin, is_package=True
        )
        self.spec.submodule_search_locations = package.submodule_search_locations

    def find_spec(
        self, fullname: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        return (
            self.spec
            if fullname == self.spec.name and threading.get_ident() == self.thread
            else None
        )

    def exec_module(self, module: Any) -> None:
        try:
            from jax_md import minimize
        finally:
            for name in [
                name for name in list(sys.modules) if name.startswith(f"{self.spec.name}.")
            ]:
                del sys.modules[name]
        self.module = minimize
        # Python hands this stand-in to a thread that asked for jax_md while it was being made,
        # although its import fails: there, it passes on what the whole package has.
        module.__getattr__ = lambda name: getattr(importlib.import_module("jax_md"), name)
        raise _NotKeptError


_LOADING = threading.Lock()


@functools.cache  # the classes of its states must not change
def _imported() -> Any:
    if "jax_md" not in sys.modules:
        package = importlib.util.find_spec("jax_md")
        if package is None:
            raise ModuleNotFoundError("mdsens needs jax-md: pip install jax-md.", name="jax_md")
        alone = _MinimizeAlone(package)
        sys.meta_path.insert(0, alone)
        try:
            importlib.import_module("jax_md")  # returns where another thread has just imported it
        except _NotKeptError:
            return alone.module
        finally:
            sys.meta_path.remove(alone)
    from jax_md import minimize

    return minimize


def jax_md_minimize() -> Any:
    """The module jax_md.minimize. Where nobody has imported jax_md it comes alone, in a tenth of a
    second: the package as a whole brings neural networks along, for four seconds, and a later
    ``import jax_md`` still gets all of it.
    """
    with _LOADING:
        return _imported()


class JaxMDState(NamedTuple):
    """A state of jax-md's minimizer, and the forces at its positions."""

    inner: Any
    forces: jax.Array


@dataclasses.dataclass(frozen=True)
class JaxMD:
    """Any minimizer of jax-md, or one written like them, as a method of ``minimize``.

        ms.minimize(system, method=ms.relaxation.JaxMD(jax_md.minimize.fire_descent))

    It makes the steps that it makes in jax-md, on this package's neighbor list, until the tolerance
    is met: step sizes are in the units of the system, and nothing rescales them. ``Fire()`` is
    jax-md's FIRE in units of the potential, and serves where units are not those of unit discs.

    Attributes:
      minimizer: ``minimizer(force, shift) -> (init, apply)``, with ``init(positions) -> state`` and
        ``apply(state) -> state``; options by ``functools.partial``. A state is the positions, or
        has them as ``position``, and perhaps forces as ``force``.
      max_step: the longest move of a particle in one step, as a fraction of the potential's length;
        longer ones are cut to it.
    """

    minimizer: Callable[..., tuple[Callable[..., Any], Callable[..., Any]]]
    max_step: float = 0.1

    def __post_init__(self) -> None:
        check_positive(self, ("max_step",))
        if not callable(self.minimizer):
            raise InputError(
                f"JaxMD(minimizer={short(self.minimizer)}): give a function (force, shift) ->"
                " (init, apply), such as jax_md.minimize.fire_descent."
            )

    def functions(self, forces: Any, shift: Any, limits: Any) -> tuple[Any, Any]:
        """A pair of functions (init, apply) on :class:`JaxMDState`."""
        init, apply = self.minimizer(forces, shift)

        def start(positions: jax.Array) -> JaxMDState:
            # jax-md keeps step sizes in float16 where they fit, which a compiled loop cannot carry
            inner = jax.tree.map(lambda leaf: _widened(leaf, positions.dtype), init(positions))
            return JaxMDState(inner, jnp.zeros_like(positions))

        def step(state: JaxMDState) -> JaxMDState:
            inner = apply(state.inner)
            force = inner.force if hasattr(inner, "force") else forces(_position(inner))
            return JaxMDState(inner, force)

        return start, step

    def force_limit(self, longest: jax.Array, stiffness: jax.Array) -> jax.Array:
        """Larger than any force: the step is cut, not the force, whose use is not known here."""
        return 1e20 * longest * stiffness

    @staticmethod
    def positions(state: JaxMDState) -> jax.Array:
        return _position(state.inner)

    @staticmethod
    def with_forces(state: JaxMDState, forces: jax.Array) -> JaxMDState:
        inner = state.inner
        if hasattr(inner, "force"):
            inner = dataclasses.replace(inner, force=forces)
        return JaxMDState(inner, forces)

    @staticmethod
    def forces(state: JaxMDState) -> jax.Array:
        return state.forces

    @staticmethod
    def at_stiffness(state: JaxMDState, stiffness: jax.Array) -> JaxMDState:
        """The same: its steps keep to the options that it was made with."""
        return state


def _position(inner: Any) -> jax.Array:
    return getattr(inner, "position", inner)


def _widened(leaf: Any, dtype: Any) -> jax.Array:
    array = jnp.asarray(leaf)
    return array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array
