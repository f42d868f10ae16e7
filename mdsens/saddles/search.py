"""First-order saddles of the energy: minimum-mode following, then Newton steps on the same F =
dU/dR = 0.

A saddle is a root of F like a minimum, so what holds of one holds of the other: H dR = - d2U/dR dp
. dp, with an H that has one negative eigenvalue. Only the way there differs, see
:mod:`mdsens.saddles._eigenvector_following` and :mod:`mdsens.saddles._elastic_band`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.errors import InputError, PrecisionError, raise_for_status
from mdsens._util.progress import Decades
from mdsens._util.validation import real_array, real_number, short
from mdsens.mechanics.not_finite import where_not_finite
from mdsens.mechanics.status import Status
from mdsens.mechanics.units import force_scale, natural_units, round_off
from mdsens.model.system import System, require_unconstrained
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.relaxation.minimization import minimize
from mdsens.saddles._eigenvector_following import (
    ROUND_OFF,
    EigenvectorFollowing,
    follow_eigenvector,
    loose_stiffness,
)
from mdsens.saddles._elastic_band import ElasticBand, climbing_image_band

__all__ = ["EigenvectorFollowing", "ElasticBand", "find_saddle", "sides"]

Params = Mapping[str, Any]
GOAL = 1e-10  # of the mean pair force: the largest force that counts as none at a saddle


def find_saddle(
    start: System | Equilibrium,
    params: Params | None = None,
    *,
    direction: Any = None,
    towards: System | Equilibrium | None = None,
    band: ElasticBand = ElasticBand(),
    tolerance: float | None = None,
    method: EigenvectorFollowing = EigenvectorFollowing(),
    max_steps: int = 1000,
    throw: bool = True,
    progress: bool | None = None,
) -> Equilibrium:
    """A first-order saddle, dU/dR = 0 with one negative mode: climbed to along the softest mode,
    then by Newton steps.

    The derivatives of what comes out, by ``jvp`` and its kin, are those of the saddle, and
    ``certify`` examines it as one. Its cell is given: it is not relaxed to a pressure.

    Args:
      start: a configuration near the saddle, or a minimum.
      params: parameters to change first; the others stay.
      direction: (n, d), along which to climb from a minimum until a mode turns negative; None for
        the softest mode.
      towards: the minimum on the other side: the walk begins at the highest image of a ``band``
        between the two.
      band: its options.
      tolerance: the largest force on a particle to reach, in the potential's units; where None,
        1e-10 of the mean pair force, or what round-off leaves if that is more.
      method: the options of the walk.
      max_steps: of the walk and of Newton's method together.
      throw: raise where no saddle is reached; with False the status says so instead.
      progress: show a progress bar; where None, in a terminal or notebook alone.

    Returns:
      an :class:`~mdsens.Equilibrium` whose ``order`` is the number of negative modes found: 1 where
      the status is good.

    Raises:
      InputError: bad parameters, direction or options. PrecisionError: a tolerance below round-off.
      ConvergenceError: with the status, MAX_STEPS_REACHED, NOT_FINITE, UNJAMMED where nobody
      touches anybody, or NOT_A_SADDLE where the forces vanish at a minimum or a saddle of higher
      order; and what was reached as ``result``.
    """
    began = time.perf_counter()
    system, tolerance = _checked(start, params, tolerance, method, max_steps)
    if towards is None:
        way = _direction(direction, system)
    else:
        system, way = climbing_image_band(
            system, _other_side(towards, system, direction, band), band
        )
    bar, begun = Decades(progress, tolerance), system
    try:
        system, largest, steps = follow_eigenvector(
            system, way, tolerance, method, int(max_steps), bar
        )
    finally:
        bar.close()
    floor = float(force_scale(system, *natural_units(system), largest).floor)
    system, status, order = _judged(
        system, largest, tolerance, max(floor, ROUND_OFF * round_off(system))
    )
    found = Equilibrium(
        system,
        jnp.asarray(status.value, jnp.int32),
        jnp.asarray(largest),
        jnp.asarray(steps),
        time.perf_counter() - began,
        tolerance,
        force_floor=jnp.asarray(floor),
        order=order,
    )
    if throw:
        what = (
            f"find_saddle stopped after {steps:,} steps at max_force"
            f" {largest:.3e}{where_not_finite(status, begun)}"
        )
        raise_for_status(status, what, found)
    return found


def _judged(
    system: System, largest: float, tolerance: float, floor: float
) -> tuple[System, Status, int]:
    """The system, what was reached, and how many of its modes are negative; floor is what round-off
    may leave.
    """
    if not np.isfinite(largest):
        return system, Status.NOT_FINITE, 0
    stiffness, null = loose_stiffness(system)
    if np.all(np.asarray(null.rattlers)):
        return system, Status.UNJAMMED, 0
    order = stiffness.unstable(3)
    if largest > max(tolerance, floor):
        return system, Status.MAX_STEPS_REACHED, order
    reached = Status.CONVERGED if largest <= tolerance else Status.ROUND_OFF_LIMITED
    return system, reached if order == 1 else Status.NOT_A_SADDLE, order


def sides(
    saddle: Equilibrium, *, step: float = 1e-2, tolerance: float | None = None
) -> tuple[Equilibrium, Equilibrium]:
    """The two minima that a saddle lies between: relaxed from a step to either side along its
    negative mode.

    Args:
      saddle: from ``find_saddle``.
      step: the longest move of a particle, as a fraction of the potential's length.
      tolerance: of the minimizations.

    Returns:
      two minima, particles under the same numbers.
    """
    if not isinstance(saddle, Equilibrium) or saddle.order != 1:
        raise InputError(
            f"saddle is {short(saddle)}: give the Equilibrium of order 1 that find_saddle returns."
        )
    if not 0 < real_number("step", step, "give a positive number.") < np.inf:
        raise InputError(f"step is {short(step)}: give a positive number.")
    stiffness, _ = loose_stiffness(saddle.system)
    mode = stiffness.lowest(1).vectors[:, 0].reshape(saddle.positions.shape)
    way = (
        step
        * float(natural_units(saddle.system)[0])
        / np.sqrt(np.max(np.sum(mode**2, axis=1)))
        * mode
    )

    def beside(sign: float) -> Equilibrium:
        return minimize(
            saddle.system.replace(positions=saddle.positions + sign * way), tolerance=tolerance
        )

    return beside(1.0), beside(-1.0)


def _checked(
    start: Any, params: Params | None, tolerance: Any, method: Any, max_steps: Any
) -> tuple[System, float]:
    system = start.system if isinstance(start, Equilibrium) else start
    if not isinstance(system, System):
        raise InputError(
            f"find_saddle got a {type(start).__name__}: give a System or an Equilibrium."
        )
    require_unconstrained(system, "find_saddle")
    if system.batch is not None:
        raise InputError(
            f"find_saddle takes one system and got a batch of {system.batch}: give a member."
        )
    if isinstance(start, Equilibrium) and start.pressure is not None:
        raise InputError(
            "find_saddle holds the cell, and this minimum is at a pressure: give its system."
        )
    if not isinstance(method, EigenvectorFollowing):
        raise InputError(f"method is {short(method)}: give EigenvectorFollowing() of ms.saddles.")
    if tolerance is not None and not 0 < real_number("tolerance", tolerance) <= sys.float_info.max:
        raise InputError(f"tolerance is {short(tolerance)}: give a positive number, or None.")
    if not real_number("max_steps", max_steps) >= 1:
        raise InputError(f"max_steps is {short(max_steps)}: give 1 or more.")
    system = system.reallocate(keep=True) if params is None else system.with_params(params)
    if tolerance is None:
        scale = force_scale(system, *natural_units(system), 0.0)
        return system, max(GOAL * float(scale.mean), float(scale.floor))
    floor = round_off(system)
    if tolerance < 0.05 * floor:
        raise PrecisionError(
            f"tolerance {tolerance:.0e} is out of reach in {system.positions.dtype}: raise it to"
            f" {floor:.0e} or more."
        )
    return system, tolerance


def _other_side(towards: Any, system: System, direction: Any, band: Any) -> System:
    other = towards.system if isinstance(towards, Equilibrium) else towards
    if not isinstance(other, System) or other.positions.shape != system.positions.shape:
        raise InputError(
            f"towards is {short(towards)}: give the minimum on the other side, of the same"
            " particles."
        )
    if direction is not None:
        raise InputError("direction and towards are both given: give one of them.")
    if not isinstance(band, ElasticBand):
        raise InputError(f"band is {short(band)}: give ElasticBand() of ms.saddles.")
    return system.replace(positions=other.positions).reallocate()


def _direction(direction: Any, system: System) -> jax.Array:
    if direction is None:
        return jnp.zeros_like(system.positions)
    given = jnp.asarray(real_array("direction", direction), system.positions.dtype)
    if (
        given.shape != system.positions.shape
        or not np.isfinite(np.asarray(given)).all()
        or not jnp.any(given != 0)
    ):
        raise InputError(
            f"direction has shape {given.shape}: give {system.positions.shape}, finite and not zero"
            " everywhere."
        )
    return given / jnp.linalg.norm(given)
