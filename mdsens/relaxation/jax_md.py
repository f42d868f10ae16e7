"""Minimizers of jax-md, imported without the rest of jax-md, and the relaxation method ``JaxMD``.

Only this module imports jax-md. ``import jax_md`` also imports libraries of neural networks and
takes five seconds; the minimizers alone take a tenth of a second. So ``jax_md.minimize`` is
imported while a stand-in takes the place of the package ``jax_md``. The stand-in runs none of the
package's own code, and Python forgets the stand-in afterwards, so that a later ``import jax_md``
gets the whole package.
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
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mdsens._util.errors import InputError, short
from mdsens._util.pytree import PyTree
from mdsens._util.validation import check_positive
from mdsens.mechanics.units import Limits

__all__ = ["JaxMD", "jax_md_minimize"]


class _NotKeptError(ImportError):
    """Error that ends the import of the stand-in for ``jax_md``.

    A module whose import fails is not kept in ``sys.modules``.
    """


class _MinimizeAlone(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import hook that puts a stand-in in the place of ``jax_md``, during one import in one thread.

    The stand-in, as a package, only imports ``jax_md.minimize`` and then ends with an error, so
    that Python forgets the stand-in. All this happens within Python's own import of ``jax_md``:
    another thread that imports ``jax_md`` meanwhile waits, and then gets the whole package.

    Attributes:
      module: ``jax_md.minimize``; None before the import.
    """

    module: ModuleType | None = None

    def __init__(self, package: importlib.machinery.ModuleSpec):
        self.thread = threading.get_ident()
        self.spec = importlib.machinery.ModuleSpec(
            package.name, self, origin=package.origin, is_package=True
        )
        self.spec.submodule_search_locations = package.submodule_search_locations

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        # Other threads are not served: they get the whole package.
        is_here = threading.get_ident() == self.thread
        return self.spec if is_here and fullname == self.spec.name else None

    def exec_module(self, module: ModuleType) -> None:
        try:
            from jax_md import minimize
        finally:
            # Python forgets the package alone: its submodules are removed here.
            prefix = f"{self.spec.name}."
            for name in [name for name in list(sys.modules) if name.startswith(prefix)]:
                del sys.modules[name]
        self.module = minimize
        # A thread that asks for jax_md while the stand-in is imported gets the stand-in from
        # Python, although its import fails. There it passes on the attributes of the whole package.
        module.__getattr__ = lambda name: getattr(importlib.import_module("jax_md"), name)
        raise _NotKeptError


# Threads that relax at the same time import the minimizers once.
_LOADING = threading.Lock()


# Cached, since a second import would make other classes of states, and those must not change.
@functools.cache
def _imported() -> ModuleType:
    if "jax_md" not in sys.modules:
        package = importlib.util.find_spec("jax_md")
        if package is None:
            raise ModuleNotFoundError(
                "mdsens needs the package jax-md: run `pip install jax-md`.", name="jax_md"
            )
        alone = _MinimizeAlone(package)
        # before Python's own finders, which would import the whole package
        sys.meta_path.insert(0, alone)
        try:
            # This ends in _NotKeptError, or returns where another thread has just imported jax_md.
            importlib.import_module("jax_md")
        except _NotKeptError:
            assert alone.module is not None
            return alone.module
        finally:
            sys.meta_path.remove(alone)
    from jax_md import minimize

    return minimize


def jax_md_minimize() -> Any:
    """Return the module ``jax_md.minimize``.

    If jax_md is not imported yet, only ``jax_md.minimize`` is imported, in a tenth of a second. The
    whole package takes four seconds more, for libraries of neural networks. A later
    ``import jax_md`` still gets the whole package.
    """
    with _LOADING:
        return _imported()


class JaxMDState(NamedTuple):
    """State of a minimizer of jax-md, ``inner``, and the forces (n, d) at its positions."""

    inner: Any
    forces: jax.Array


@dataclasses.dataclass(frozen=True)
class JaxMD:
    """Method of ``minimize`` that runs any minimizer of jax-md, or one with the same interface.

        ms.minimize(system, method=ms.relaxation.JaxMD(jax_md.minimize.fire_descent))

    The minimizer takes the same steps as in jax-md, with the neighbor list of mdsens, until the
    tolerance of ``minimize`` is met. The step sizes are in the units of the system, and are not
    rescaled. ``Fire()`` is jax-md's FIRE with step sizes in units of the potential, for systems
    whose particles do not have diameters and energies of about 1.

    Attributes:
      minimizer: ``minimizer(force, shift) -> (init, apply)``, with ``init(positions) -> state`` and
        ``apply(state) -> state``. Here ``force(positions)`` gives the forces, and
        ``shift(positions, displacements)`` the displaced positions. Set options of the minimizer
        with ``functools.partial``. A state is the positions, or an object with the attribute
        ``position`` and perhaps ``force``.
      max_step: the longest move of a particle in one step, as a fraction of the length scale of the
        potential (contact distance, or the distance of the minimum of the pair energy); longer
        moves are shortened to this length.
    """

    # The method is a static argument of compiled code, and a functools.partial equals only itself:
    # one that is made anew for each call has everything compiled again.
    minimizer: Callable[..., tuple[Callable[..., Any], Callable[..., Any]]]
    max_step: float = 0.1

    def __post_init__(self) -> None:
        check_positive(self, ("max_step",))
        if not callable(self.minimizer):
            raise InputError(
                f"JaxMD(minimizer={short(self.minimizer)}): give a function (force, shift) ->"
                " (init, apply), such as jax_md.minimize.fire_descent."
            )

    def functions(
        self,
        forces: Callable[..., jax.Array],
        shift: Callable[..., jax.Array],
        limits: Limits,
    ) -> tuple[Callable[[jax.Array], JaxMDState], Callable[[JaxMDState], JaxMDState]]:
        """Return the functions (init, apply) of the minimizer, on states :class:`JaxMDState`.

        ``init`` makes a state from positions (n, d), and ``apply`` takes one step.

        Args:
          forces: function from positions (n, d) to forces (n, d).
          shift: function from positions and displacements to the displaced positions.
          limits: not used; the minimizer has its own step sizes.
        """
        init, apply = self.minimizer(forces, shift)

        def start(positions: jax.Array) -> JaxMDState:
            # jax-md stores step sizes as float16 where they fit. Steps give them another type,
            # which a compiled loop does not allow.
            inner = jax.tree.map(lambda leaf: _widened(leaf, positions.dtype), init(positions))
            return JaxMDState(inner, jnp.zeros_like(positions))

        def step(state: JaxMDState) -> JaxMDState:
            inner = apply(state.inner)
            force = inner.force if hasattr(inner, "force") else forces(_position(inner))
            return JaxMDState(inner, force)

        return start, step

    def force_limit(self, longest: jax.Array, stiffness: jax.Array) -> jax.Array:
        """Return a force so large that only steps are shortened, and never forces.

        How a minimizer of jax-md computes its step from the force is not known, so the force that
        belongs to the longest step is not known either.
        """
        # finite in single precision, too, whose largest number is 3e38
        return 1e20 * longest * stiffness

    @staticmethod
    def positions(state: JaxMDState) -> jax.Array:
        """Return the positions (n, d) in a state of a jax-md minimizer."""
        return _position(state.inner)

    @staticmethod
    def with_forces(state: JaxMDState, forces: jax.Array) -> JaxMDState:
        """Return a state of a jax-md minimizer with its forces replaced by ``forces``, (n, d)."""
        inner = state.inner
        if hasattr(inner, "force"):
            inner = dataclasses.replace(inner, force=forces)
        return JaxMDState(inner, forces)

    @staticmethod
    def forces(state: JaxMDState) -> jax.Array:
        """Return the forces (n, d) in a state of a jax-md minimizer."""
        return state.forces

    @staticmethod
    def at_stiffness(state: JaxMDState, stiffness: jax.Array) -> JaxMDState:
        """Return the state unchanged: minimizers of jax-md do not use a measured stiffness."""
        return state


def _position(inner: PyTree) -> jax.Array:
    """Return the positions in a jax-md state: its attribute ``position``, or the state itself."""
    return getattr(inner, "position", inner)


def _widened(leaf: ArrayLike, dtype: np.dtype) -> jax.Array:
    """Convert an array of a minimizer's state to jax; floating-point numbers become ``dtype``."""
    array = jnp.asarray(leaf)
    return array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array
