"""Energy barriers between minima, and their derivatives by every parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.compilation import compiled
from mdsens._util.errors import InputError, raise_for_status
from mdsens._util.portable import Portable
from mdsens._util.pytree import PyTree, named_leaves
from mdsens._util.tables import Shown
from mdsens.implicit.linear import Method
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
    """The energy barrier from a minimum up to a saddle, and its derivatives by the parameters.

    Attributes:
      value: the barrier U(saddle) - U(minimum), an energy.
      gradient: derivative of ``value`` by every parameter, a dict shaped like the parameters. In a
        symmetric matrix of species pairs, each of the two entries of a pair has half of the
        derivative; :meth:`component` gives the whole derivative.
      second: derivative of ``gradient`` along the direction ``dparams`` of the parameters, a dict
        of the same shapes; None without a direction.
      statuses: statuses of the minimum and of the saddle. With a direction, each is the worse of
        the status of the configuration and the status of the linear solve there.
      max_forces: the largest forces left at the minimum and at the saddle, energy per length. These
        forces change the barrier only to second order.
      wrt: the parameters by which the derivatives are taken.
    """

    value: float
    gradient: dict[str, PyTree]
    second: dict[str, PyTree] | None
    statuses: tuple[Status, Status]
    max_forces: tuple[float, float]
    wrt: tuple[Parameter, ...] = ()

    @property
    def status(self) -> Status:
        """Return the worse of the statuses of the minimum and of the saddle."""
        return Status.worst_of(self.statuses)

    def component(self, label: str) -> jax.Array:
        """Return the derivative of an energy barrier by a single number of the parameters.

        Args:
          label: name of the number, such as ``"epsilon"`` or ``"sigma[0,1]"``.
        """
        parameter, index = component(self.wrt, label)
        return parameter.whole(parameter.of(self.gradient), index)

    _title = "Barrier"

    def _rows(self) -> list[tuple[str, str]]:
        rows = [("height", f"{self.value:.8g}")]
        # a single number is printed, an array by its shape and norm
        for parameter in self.wrt:
            name = parameter.name
            change = parameter.of(self.gradient)
            if change.ndim:
                text = f"shape {change.shape}, norm {parameter.size(change):.6g}"
            else:
                text = f"{float(change):.8g}"
            rows.append((f"by {name}", text))
        if self.second is not None:
            rows += [
                (f"second, by {p.name}", f"norm {p.size(p.of(self.second)):.6g}") for p in self.wrt
            ]
        low, high = self.max_forces
        rows.append(("max_force", f"{low:.1e} at the minimum, {high:.1e} at the saddle"))
        rows.append(("status", f"{self.status.name}: {self.status.sentence}"))
        return rows


@compiled
def _energy_and_gradient(system: System) -> tuple[jax.Array, dict[str, Any]]:
    """Compute the energy, and its partial derivatives by the parameters at constant positions."""
    return jax.value_and_grad(lambda p: potential_energy(system, params=p))(dict(system.params))


@compiled
def _gradient_rate(system: System, motion: jax.Array, dparams: Mapping[str, Any]) -> dict[str, Any]:
    """Compute the rate of change of the energy's partial derivatives by the parameters.

    The rate is d/dt at t = 0, for positions R + t ``motion`` and parameters that change by t
    ``dparams``.
    """

    def partial(positions: jax.Array, params: Mapping[str, Any]) -> dict[str, Any]:
        return jax.grad(lambda p: potential_energy(system, positions, p))(dict(params))

    return jax.jvp(partial, (system.positions, dict(system.params)), (motion, dict(dparams)))[1]


def barrier(
    minimum: Equilibrium,
    saddle: Equilibrium,
    dparams: Params | None = None,
    *,
    solve: Method | None = None,
    throw: bool = True,
) -> Barrier:
    """Compute the height B of an energy barrier and its derivatives by all parameters p.

        B = U(R_s, p) - U(R_m, p),    dB/dp = @U/@p (R_s, p) - @U/@p (R_m, p).

    U is the energy, R_m are the positions at the minimum and R_s those at the saddle; @ marks
    partial derivatives. Both configurations are stationary, dU/dR = 0, so that their motion with
    the parameters does not contribute to first order (Hellmann and Feynman). Hence no linear solve
    is needed. The error is of second order in the remaining forces for B and of first order for
    dB/dp. The motion does contribute to the second derivatives,

        d2B/dp2 . dp = [@2U/@p2 . dp + @2U/@p@R . dR]_saddle - [the same]_minimum,

    with dR, the motion of the positions, from ``jvp`` at the saddle and at the minimum. The second
    derivatives are computed where ``dparams`` is given.

    Args:
      minimum: a minimum from ``minimize`` in a fixed cell.
      saddle: a saddle from ``find_saddle``, of the same system at the same parameters.
      dparams: the direction dp of the second derivatives, as in ``jvp``; None for no second
        derivatives.
      solve: the linear solver for the second derivatives, as in ``jvp``.
      throw: whether to raise an error if the status is not good.

    Returns:
      a :class:`Barrier`.

    Raises:
      InputError: ``minimum`` and ``saddle`` differ in system or parameters, ``minimum`` is no
        minimum, or ``saddle`` is no first-order saddle.
      ConvergenceError: the minimum, the saddle or a linear solve did not converge.
    """
    _check_ends(minimum, saddle)
    statuses = [Status(int(np.asarray(eq.status))) for eq in (minimum, saddle)]
    low, gradient_low = _energy_and_gradient(minimum.system)
    high, gradient_high = _energy_and_gradient(saddle.system)
    second = None
    if dparams is not None:
        tangent = full_tangent(minimum.system, dparams)
        rates = []
        for k, eq in enumerate((minimum, saddle)):
            # the status is raised for both ends together, below
            moved = jvp(eq, dparams, solve=solve, throw=False)
            statuses[k] = Status.worst_of([statuses[k], moved.status])
            rates.append(_gradient_rate(eq.system, moved.value, tangent))
        # saddle minus minimum, as for the value
        second = jax.tree.map(jnp.subtract, rates[1], rates[0])
    result = Barrier(
        # a difference of two total energies, with the round-off of these
        value=float(high - low),
        gradient=jax.tree.map(jnp.subtract, gradient_high, gradient_low),
        second=second,
        statuses=(statuses[0], statuses[1]),
        max_forces=(float(minimum.max_force), float(saddle.max_force)),
        wrt=parameters_of(minimum.system),
    )
    if throw:
        message = "barrier between a minimum and a saddle that are not both converged"
        raise_for_status(result.status, message, result)
    return result


def _check_ends(minimum: Equilibrium, saddle: Equilibrium) -> None:
    """Raise InputError unless a minimum and a saddle of one system have the same parameters."""
    _check_end("minimum", minimum)
    _check_end("saddle", saddle)
    low: System = minimum.system
    high: System = saddle.system
    same_parameters = jax.tree.structure(low.params) == jax.tree.structure(high.params)
    if low.positions.shape != high.positions.shape or not same_parameters:
        raise InputError(
            "`minimum` and `saddle` are of different systems: give a minimum and a saddle of the"
            " same system."
        )
    # exact equality, since parameters and cell of the saddle are copied from its minimum
    at_saddle = dict(named_leaves(high.params))
    pairs = {name: (value, at_saddle[name]) for name, value in named_leaves(low.params)}
    if low.box is not None and high.box is not None:
        pairs["the cell"] = (low.box, high.box)
    for name, (one, other) in pairs.items():
        if not np.array_equal(np.asarray(one), np.asarray(other)):
            raise InputError(
                f"`minimum` and `saddle` differ in {name}: give a saddle found from this minimum."
            )


def _check_end(name: str, eq: Equilibrium) -> None:
    """Raise InputError unless one end of a barrier is a single configuration in a fixed cell.

    Args:
      name: ``"minimum"`` or ``"saddle"``, which the end has to be.
      eq: the configuration at this end.
    """
    if not isinstance(eq, Equilibrium) or eq.system.batch is not None:
        raise InputError(f"`{name}` is a {type(eq).__name__}: give one Equilibrium, not a batch.")
    if eq.load is not None:
        raise InputError(
            f"`{name}` was relaxed at a {eq.load.kind}, and a barrier is between configurations in"
            f" one fixed cell: relax `{name}` in a fixed cell."
        )
    # the order is the number of negative modes
    if (eq.order == 0) != (name == "minimum"):
        raise InputError(
            f"`{name}` has order {eq.order}, the number of modes of negative stiffness: give"
            " barrier(minimum, saddle) a minimum of order 0 and a saddle of order 1."
        )
