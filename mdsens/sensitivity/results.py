"""Derivatives at a minimum, each with the evidence of its linear solve.

A :class:`Displacement` is the derivative of the unknowns (``jvp``, ``jacobian``, ``response``), a
:class:`ParameterGradient` that of a number by every parameter (``vjp``, ``gradient``), and a
:class:`DirectionalDerivative` that of an observable along one direction (``elasticity.jvp``).
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
    """Fields that every derivative at a minimum has.

    Attributes:
      value: the derivative; its subclasses give the shape.
      stats: of the linear solve: status, relative residual, iterations, norm of the part that was
        dropped, solver.
      max_force: the largest force on a particle at the minimum, energy a length.
      rattlers: (n,) True for particles with too few contacts to transmit a force; they do not move.
      wrt: the parameters that ``value`` is by; empty for a derivative along one direction.
    """

    value: Any
    stats: SolveStats
    max_force: jax.Array
    rattlers: jax.Array
    wrt: tuple[Parameter, ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def status(self) -> Status:
        """The status of the linear solve; of a single derivative."""
        return Status(int(self.stats.status))

    def component(self, label: str) -> Any:
        """The derivative by one number among the parameters.

        Args:
          label: as on the command line: ``"epsilon"`` of a scalar, ``"sigma[3]"``, or of a matrix
            of species pairs ``"sigma[0,1]"``, which is the derivative as that entry and its mirror
            image change together.

        Returns:
          of ``vjp`` and ``gradient`` the derivative of the observable, of its shape; of
          ``jacobian`` that of the positions, (n, d), or ``Unknowns``. Of a batch, with its leading
          axis.
        """
        if not self.wrt:
            raise InputError(
                "this derivative is along one direction, and has no components: take ms.jacobian."
            )
        parameter, index = component(self.wrt, label)
        derivative = self.value[parameter.name] if isinstance(self.value, Mapping) else self.value
        return jax.tree.map(lambda leaf: parameter.whole(leaf, index), derivative)

    def _rows(self) -> list[tuple[str, str]]:
        codes = np.atleast_1d(np.asarray(self.stats.status)).ravel()
        status = Status.worst_of(codes)
        by_name = {parameter.name: parameter for parameter in self.wrt}
        rows = []
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.value):
            key = str(getattr(path[-1], "key", "")) if path else ""
            parameter = by_name.get(key, self.wrt[0]) if self.wrt else Parameter("", ())
            pairs = " by each pair of species once" if parameter.paired else ""
            text = f"shape {tuple(leaf.shape)}, norm {parameter.size(leaf):.6g}{pairs}"
            rows.append(("value" + jax.tree_util.keystr(path), text))
        of_many = f" (worst of {codes.size})" if codes.size > 1 else ""
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
    """The derivative of a minimum, dR/dt along a direction or dR/dp by a parameter, with its evidence.

    Attributes:
      value: of ``jvp`` and ``response`` the derivative of the stored positions, (n, d), with mean
        displacement zero and rows of rattlers zero; of ``jacobian`` (n, d, *shape of the
        parameter). Where the cell is relaxed to a pressure, or under constraints, an ``Unknowns``
        with ``strain`` and ``multipliers`` beside ``positions``.
      nonaffine: the derivative of the positions less its affine part (d box) box^-1 R, which does
        not depend on the choice of periodic images; equal to ``positions`` where the box does not
        move.
      stats, max_force, rattlers, wrt: as in :class:`Derivative`.

    The derivative by a symmetric matrix of species pairs is a symmetric matrix: its entries (a, b)
    and (b, a) are half each of the derivative by the one physical number that both stand for, so
    that the sum of its product with a symmetric change is what that change gives. :meth:`component`
    gives the whole.
    """

    nonaffine: Any

    @property
    def positions(self) -> jax.Array:
        """The derivative of the stored positions, (n, d)."""
        return self.value.positions if isinstance(self.value, Unknowns) else self.value

    @property
    def strain(self) -> jax.Array | None:
        """That of the cell, d box = strain box, as a Mandel vector (xx, yy, sqrt(2) xy in 2-D; xx,
        yy, zz and sqrt(2) times yz, xz, xy in 3-D); None where the cell is fixed.
        """
        return self.value.strain if isinstance(self.value, Unknowns) else None

    @property
    def multipliers(self) -> dict[str, jax.Array] | None:
        """That of the constraints' multipliers, by name; None without constraints."""
        return self.value.multipliers if isinstance(self.value, Unknowns) else None

    _title = "Displacement"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class ParameterGradient(Derivative):
    """The derivative of a function of the minimum by every parameter, with its evidence.

    Attributes:
      value: a dict: for each parameter an array of the function's shape followed by the
        parameter's.
      stats, max_force, rattlers, wrt: as in :class:`Derivative`.

    Entries (a, b) and (b, a) of the derivative by a symmetric matrix of species pairs are half each
    of that by the one number that both stand for; :meth:`component` gives the whole.
    """

    _title = "Gradient"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class DirectionalDerivative(Derivative):
    """The derivative of an observable along one direction of the parameters, with its evidence.

    Attributes:
      value: an array of the observable's shape.
      stats, max_force, rattlers, wrt: as in :class:`Derivative`; ``wrt`` is empty.
    """

    _title = "Directional derivative"
