"""Energy barriers between minima, and their derivatives by every parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mdsens._util.errors import InputError, raise_for_status
from mdsens._util.portable import Portable
from mdsens._util.tables import Shown
from mdsens.mechanics.status import Status
from mdsens.model.system import System, parameters_of, potential_energy
from mdsens.potentials.parameters import Parameter, component
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity.derivatives import jvp
from mdsens.sensitivity.linearization import full_tangent

__all__ = ["Barrier", "barrier"]

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, repr=False)
class Barrier(Portable, Shown):
    """The energy from a minimum up to a saddle, and its derivatives.

    Attributes:
      value: U(saddle) - U(minimum), energy.
      gradient: its derivative by every parameter, a dict shaped like them; in a symmetric matrix of
        species pairs half of the derivative in each of two entries, and the whole in
        :meth:`component`.
      second: the derivative of ``gradient`` along the direction that was asked for, likewise; None
        without one.
      statuses: of the minimum and of the saddle; where a direction was asked for, the worse of that
        and of the linear solve's.
      max_forces: left at the minimum and at the saddle, energy a length. To first order the value
        does not feel them.
      wrt: the parameters that the derivatives are by.
    """

    value: float
    gradient: dict[str, jax.Array]
    second: dict[str, jax.Array] | None
    statuses: tuple[Status, Status]
    max_forces: tuple[float, float]
    wrt: tuple[Parameter, ...] = ()

    @property
    def status(self) -> Status:
        """The worse of the two."""
        return Status.worst_of(self.statuses)

    def component(self, label: str) -> jax.Array:
        """The derivative of the height by one number among the parameters, ``"epsilon"`` or
        ``"sigma[0,1]"``.
        """
        parameter, index = component(self.wrt, label)
        return parameter.whole(self.gradient[parameter.name], index)

    _title = "Barrier"

    def _rows(self) -> list[tuple[str, str]]:
        rows = [("height", f"{self.value:.8g}")]
        for parameter in self.wrt:
            name, change = parameter.name, self.gradient[parameter.name]
            size = f"shape {change.shape}, norm {parameter.size(change):.6g}"
            rows.append((f"by {name}", size if change.ndim else f"{float(change):.8g}"))
        if self.second is not None:
            rows += [
                (f"second, by {p.name}", f"norm {p.size(self.second[p.name]):.6g}")
                for p in self.wrt
            ]
        return [
            *rows,
            (
                "max_force",
                f"{self.max_forces[0]:.1e} at the minimum, {self.max_forces[1]:.1e} at the saddle",
            ),
            ("status", f"{self.status.name}: {self.status.sentence}"),
        ]


@jax.jit
def _partial(system: System) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The energy, and its derivative by the parameters with the particles where they are."""
    return jax.value_and_grad(lambda p: potential_energy(system, params=p))(dict(system.params))


@jax.jit
def _partial_along(system: System, motion: jax.Array, dparams: Params) -> dict[str, jax.Array]:
    """d/dt of the partial derivative, along R + t motion and params + t dparams."""

    def partial(positions: jax.Array, params: Params) -> dict[str, jax.Array]:
        return jax.grad(lambda p: potential_energy(system, positions, p))(dict(params))

    return jax.jvp(partial, (system.positions, dict(system.params)), (motion, dict(dparams)))[1]


def barrier(
    minimum: Equilibrium, saddle: Equilibrium, dparams: Params | None = None, *, throw: bool = True
) -> Barrier:
    """The height of a barrier and its derivative by every parameter, in one call.

        B = U(R_s, p) - U(R_m, p),    dB/dp = @U/@p (R_s, p) - @U/@p (R_m, p).

    Both ends are stationary, dU/dR = 0, so how they move does not count to first order (Hellmann
    and Feynman): no linear solve is needed, and the error is of the second order in the forces left
    for B, of the first for dB/dp. Second derivatives feel the motion, d2B/dp2 . dp = [@2U/@p2 . dp
    + @2U/@p@R . dR] at the saddle less that at the
    minimum, with dR of ``jvp`` at each: that is what ``dparams`` asks for.

    Args:
      minimum: from ``minimize``, not at a pressure.
      saddle: from ``find_saddle``, of the same system at the same parameters.
      dparams: the direction of the second derivatives, as in ``jvp``; None for none.
      throw: raise unless the status is good.

    Returns:
      a :class:`Barrier`.

    Raises:
      InputError: ends of different systems or parameters, a minimum that is a saddle, a saddle that
        is a minimum.
      ConvergenceError: an end that did not converge, or a solve.
    """
    _check_ends(minimum, saddle)
    codes = [Status(int(np.asarray(eq.status))) for eq in (minimum, saddle)]
    (low, of_low), (high, of_high) = _partial(minimum.system), _partial(saddle.system)
    second = None
    if dparams is not None:
        tangent, parts = full_tangent(minimum.system, dparams), []
        for k, eq in enumerate((minimum, saddle)):
            moved = jvp(eq, dparams, throw=False)
            codes[k] = Status.worst_of([codes[k], moved.status])
            parts.append(_partial_along(eq.system, moved.value, tangent))
        second = {name: parts[1][name] - parts[0][name] for name in of_low}
    found = Barrier(
        float(high - low),
        {name: of_high[name] - of_low[name] for name in of_low},
        second,
        (codes[0], codes[1]),
        (float(minimum.max_force), float(saddle.max_force)),
        parameters_of(minimum.system),
    )
    if throw:
        raise_for_status(found.status, "barrier between ends that are not both sound", found)
    return found


def _check_ends(minimum: Any, saddle: Any) -> None:
    for name, eq in (("minimum", minimum), ("saddle", saddle)):
        if not isinstance(eq, Equilibrium) or eq.system.batch is not None:
            raise InputError(f"{name} is a {type(eq).__name__}: give one Equilibrium, not a batch.")
        if eq.pressure is not None:
            raise InputError(
                f"{name} is at a pressure, and barriers are of a given cell: relax it in one."
            )
        if (eq.order == 0) != (name == "minimum"):
            raise InputError(
                f"{name} has order {eq.order}: give barrier(minimum, saddle), of order 0 and 1."
            )
    one, other = minimum.system, saddle.system
    if one.positions.shape != other.positions.shape or one.params.keys() != other.params.keys():
        raise InputError("minimum and saddle are of different systems: give the two of one.")
    boxes = {} if one.box is None or other.box is None else {"the cell": (one.box, other.box)}
    for name, (here, there) in {
        **{k: (v, other.params[k]) for k, v in one.params.items()},
        **boxes,
    }.items():
        if not np.array_equal(np.asarray(here), np.asarray(there)):
            raise InputError(
                f"minimum and saddle differ in {name}: find the saddle from that minimum."
            )
