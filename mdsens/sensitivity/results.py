"""The results of derivatives at a minimum, each with status and residual of its linear solve.

A :class:`Displacement` is the derivative of the relaxed positions, with strain and multipliers if
any (``jvp``, ``jacobian``, ``response``). A :class:`ParameterGradient` is the derivative of an
observable by every parameter (``vjp``, ``gradient``). A :class:`DirectionalDerivative` is the
derivative of an observable along one direction in parameter space (``elasticity.jvp``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.portable import Portable
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
            derivative is by a change of the entry and its mirror image together.

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
        derivative = self.value[parameter.name] if isinstance(self.value, Mapping) else self.value
        return jax.tree.map(lambda leaf: parameter.whole(leaf, index), derivative)

    def _rows(self) -> list[tuple[str, str]]:
        # a Jacobian and a batch have many solves: their worst status and largest figures are shown
        codes = np.atleast_1d(np.asarray(self.stats.status)).ravel()
        status = Status.worst_of(codes)
        by_name = {parameter.name: parameter for parameter in self.wrt}
        rows = []
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.value):
            # A gradient has a leaf for each parameter, with its name. The leaves of a Jacobian,
            # positions or fields of Unknowns, are all by its one parameter.
            key = str(getattr(path[-1], "key", "")) if path else ""
            parameter = by_name.get(key, self.wrt[0]) if self.wrt else Parameter("", ())
            pairs = " by each pair of species once" if parameter.paired else ""
            text = f"shape {tuple(leaf.shape)}, norm {parameter.size(leaf):.6g}{pairs}"
            rows.append(("value" + jax.tree_util.keystr(path), text))
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

    _title = "Displacement"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class ParameterGradient(Derivative):
    """The derivative of an observable at a minimum by every parameter.

    Attributes:
      value: a dict: for each parameter an array, of the shape of the observable followed by the
        shape of the parameter.
      stats, max_force, rattlers, wrt: statistics of the solve, largest force, rattlers and
        parameters, as in :class:`Derivative`.

    In the derivative by a symmetric matrix of species pairs, entries (a, b) and (b, a) are each
    half of the derivative by the one physical number that both stand for; :meth:`component` gives
    the whole.
    """

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
