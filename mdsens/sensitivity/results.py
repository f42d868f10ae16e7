"""The results of derivatives at a minimum, each with status and residual of its linear solve.

A :class:`Displacement` is the derivative of the relaxed positions, with strain and multipliers if
any (``jvp``, ``jacobian``, ``response``). A :class:`ParameterGradient` is the derivative of an
observable by every parameter (``vjp``, ``gradient``). A :class:`DirectionalDerivative` is the
derivative of an observable along one direction in parameter space (``elasticity.jvp``).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.portable import Portable
from mdsens._util.pytree import PyTree, is_leaf, named_leaves
from mdsens._util.tables import Shown
from mdsens.implicit.linear.result import SolveStats
from mdsens.mechanics.status import Status
from mdsens.mechanics.unknowns import Unknowns
from mdsens.potentials.parameters import Parameter, component

__all__ = ["Derivative", "DirectionalDerivative", "Displacement", "ParameterGradient"]


@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class Derivative(Portable, Shown):
    """The fields that all kinds of derivatives at a minimum share.

    Attributes:
      value: the derivative; each kind of derivative has its own shape.
      stats: statistics of the linear solve: status, relative residual, number of iterations, norm
        of the dropped part of the right-hand side (the part in the null space of the Hessian)
        relative to its whole norm, name of the solver.
      max_force: the largest force on a particle at the minimum, in energy/length.
      rattlers: (n,) True for particles with too few contacts to transmit a force; they do not move.
      wrt: the parameters that the derivative is taken by; empty for a derivative along one
        direction.
    """

    value: Any
    stats: SolveStats
    max_force: jax.Array
    rattlers: jax.Array
    wrt: tuple[Parameter, ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def status(self) -> Status:
        """The status of the linear solve as a member of Status; not available for a batch."""
        return Status(int(self.stats.status))

    def component(self, label: str) -> Any:
        """Return the derivative by a single number among the parameters.

        Args:
          label: name of the number: ``"epsilon"`` for a scalar, ``"sigma[3]"`` for an entry of a
            vector, or ``"sigma[0,1]"`` for an entry of a matrix of species pairs, where the
            derivative is by a change of the entry and its mirror image together. A leaf of a tree
            of arrays is named by its path, ``"weights.layers.0.w[3,2]"``.

        Returns:
          for a result of ``vjp`` and ``gradient`` the derivative of the observable, in the shape of
          the observable; for a result of ``jacobian`` the derivative of the positions, (n, d). At a
          pressure or under constraints it is a record ``mdsens.Unknowns``, which also has the
          derivatives of the strain or of the multipliers. For a batch, arrays have a leading axis
          over the systems.
        """
        if not self.wrt:
            raise InputError(
                "this derivative is along one direction, and has no components: take ms.jacobian."
            )
        parameter, index = component(self.wrt, label)
        return jax.tree.map(lambda leaf: parameter.whole(leaf, index), self._by(parameter))

    def _by(self, parameter: Parameter) -> PyTree:
        """Return the derivative by one of the parameters in ``wrt``, an array or ``Unknowns``."""
        return self.value

    def _parts(self) -> list[tuple[str, Any, Parameter]]:
        """List the arrays of ``value``, each with a name and the parameter that it is by."""
        return [("value", self.value, Parameter("", ()))]

    def _rows(self) -> list[tuple[str, str]]:
        # a Jacobian and a batch have many solves: their worst status and largest figures are shown
        codes = np.atleast_1d(np.asarray(self.stats.status)).ravel()
        status = Status.worst_of(codes)
        rows = []
        for name, leaf, parameter in self._parts():
            pairs = " by each pair of species once" if parameter.paired else ""
            if np.ndim(leaf) == 0:
                text = f"{float(leaf):.8g}"
            else:
                text = f"shape {tuple(leaf.shape)}, norm {parameter.size(leaf):.6g}{pairs}"
            rows.append((name, text))
        of_many = f" (worst of {codes.size})" if codes.size > 1 else ""
        # ``initial``, since a Jacobian by a parameter of size zero has no solves
        iterations = int(np.max(np.asarray(self.stats.iterations), initial=0))
        return [
            *rows,
            ("status", f"{status.name}: {status.sentence}{of_many}"),
            ("solver", f"{self.stats.solver}, {iterations:,} products"),
            ("residual", f"{float(np.max(np.asarray(self.stats.residual), initial=0.0)):.1e}"),
            ("dropped", f"{float(np.max(np.asarray(self.stats.dropped), initial=0.0)):.1e}"),
            ("max_force", f"{float(np.max(np.asarray(self.max_force), initial=0.0)):.1e}"),
            ("rattlers", f"{int(np.sum(np.asarray(self.rattlers)))}"),
        ]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class Displacement(Derivative):
    """The derivative of the relaxed positions R, along a direction or by a parameter.

    Attributes:
      value: for ``jvp`` and ``response`` the derivative of the Cartesian positions
        ``system.positions``, (n, d), which includes the motion with the cell; its mean over the
        particles is zero, and so are the rows of rattlers. For ``jacobian`` (n, d, *shape of the
        parameter). Where the cell is relaxed to a pressure, or under constraints, an ``Unknowns``
        with ``strain`` and ``multipliers`` beside ``positions``.
        By a parameter that is a tree of arrays, each of these is a tree of the same structure.
      nonaffine: the derivative of the positions minus its affine part (d box) box^-1 R; it does not
        depend on the choice of periodic images. Equal to ``positions`` where the box does not
        change.
      stats, max_force, rattlers, wrt: statistics of the solve, largest force, rattlers and
        parameters, as in :class:`Derivative`.

    The derivative by a symmetric matrix of species pairs is a symmetric matrix. Its entries (a, b)
    and (b, a) are each half of the derivative by the one physical number that both stand for. So
    the displacement under a symmetric change is the sum, over all entries, of derivative times
    change. :meth:`component` gives the whole derivative by the number.
    """

    nonaffine: Any

    @property
    def positions(self) -> jax.Array:
        """The derivative of the Cartesian positions, which includes their motion with the cell.

        It is (n, d) along a direction, and (n, d, *shape of the parameter) by a parameter.
        """
        return self.value.positions if isinstance(self.value, Unknowns) else self.value

    @property
    def strain(self) -> jax.Array | None:
        """The strain of the cell, d box = strain box, as a Mandel vector; None in a fixed cell.

        The components are xx, yy, sqrt(2) xy in 2-D; xx, yy, zz and sqrt(2) times yz, xz, xy in
        3-D.
        """
        return self.value.strain if isinstance(self.value, Unknowns) else None

    @property
    def multipliers(self) -> dict[str, jax.Array] | None:
        """Derivatives of the Lagrange multipliers, by constraint name; None without constraints."""
        return self.value.multipliers if isinstance(self.value, Unknowns) else None

    def _is_of_array(self, node: PyTree) -> bool:
        """Return whether a node of ``value`` stands for one array of the unknowns.

        By a parameter that is a tree, it is a tree of the parameter's structure, as ``nonaffine``.
        """
        return jax.tree.structure(node) == jax.tree.structure(self.nonaffine)

    def _by(self, parameter: Parameter) -> PyTree:
        # the leaves of a tree of arrays are in the order of ``wrt``; an array is its only leaf
        k = self.wrt.index(parameter)
        return jax.tree.map(
            lambda node: jax.tree.leaves(node)[k], self.value, is_leaf=self._is_of_array
        )

    def _parts(self) -> list[tuple[str, Any, Parameter]]:
        parts = []
        for path, node in jax.tree_util.tree_leaves_with_path(self.value, self._is_of_array):
            name = "value" + jax.tree_util.keystr(path)
            for parameter, leaf in zip(
                self.wrt or (Parameter("", ()),), jax.tree.leaves(node), strict=True
            ):
                label = name if is_leaf(node) else f"{name}[{parameter.name!r}]"
                parts.append((label, leaf, parameter))
        return parts

    _title = "Displacement"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class ParameterGradient(Derivative):
    """The derivative of an observable at a minimum by every parameter.

    Attributes:
      value: a dict: for each parameter an array, of the shape of the observable followed by the
        shape of the parameter; for a tree of arrays a tree of such arrays.
      stats, max_force, rattlers, wrt: statistics of the solve, largest force, rattlers and
        parameters, as in :class:`Derivative`.

    In the derivative by a symmetric matrix of species pairs, entries (a, b) and (b, a) are each
    half of the derivative by the one physical number that both stand for; :meth:`component` gives
    the whole.
    """

    def _by(self, parameter: Parameter) -> PyTree:
        return parameter.of(self.value)

    def _parts(self) -> list[tuple[str, Any, Parameter]]:
        by_name = {parameter.name: parameter for parameter in self.wrt}
        return [
            (f"value[{name!r}]", leaf, by_name.get(name, Parameter("", ())))
            for name, leaf in named_leaves(dict(sorted(self.value.items())))
        ]

    _title = "Gradient"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class DirectionalDerivative(Derivative):
    """The derivative of an observable along one direction in parameter space.

    Attributes:
      value: an array of the observable's shape.
      stats, max_force, rattlers: statistics of the solve, largest force and rattlers, as in
        :class:`Derivative`.
      wrt: empty, since the derivative is along one direction.
    """

    _title = "Directional derivative"
