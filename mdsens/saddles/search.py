"""First-order saddles of the energy: eigenvector following, then Newton steps on dU/dR = 0.

The forces vanish at a saddle as at a minimum. So a saddle moves with the parameters p by the same
equation as a minimum, H dR = - d2U/dR dp . dp, with U the energy and dR the change of the
positions. The Hessian H has one negative eigenvalue at a saddle. Only the search for the
configuration differs, see :mod:`mdsens.saddles._eigenvector_following` and
:mod:`mdsens.saddles._elastic_band`.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

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
# default tolerance: the largest force that counts as zero at a saddle, over the mean pair force
GOAL = 1e-10


def find_saddle(
    start: System | Equilibrium,
    params: Params | None = None,
    *,
    direction: ArrayLike | None = None,
    towards: System | Equilibrium | None = None,
    band: ElasticBand = ElasticBand(),
    tolerance: float | None = None,
    method: EigenvectorFollowing = EigenvectorFollowing(),
    max_steps: int = 1000,
    throw: bool = True,
    progress: bool | None = None,
) -> Equilibrium:
    """Find a first-order saddle of the energy, dU/dR = 0 with one mode of negative stiffness.

    The search climbs along the softest mode and ends with Newton steps. Derivatives of the result,
    by ``jvp`` and the like, are those of the saddle, and ``certify`` examines the result as a
    saddle. The cell is fixed: it is not relaxed to a pressure.

    Args:
      start: a configuration near the saddle, or a minimum.
      params: parameters to change before the search; the others keep their values.
      direction: (n, d), the direction in which to climb from a minimum until the stiffness of a
        mode becomes negative; None for the direction of the softest mode.
      towards: the minimum on the other side of the saddle. If given, the search begins at the
        highest image of an elastic band between ``start`` and this minimum.
      band: options of the elastic band, an :class:`ElasticBand`.
      tolerance: the largest force on a particle to reach, in the unit of the potential. None for
        1e-10 of the mean pair force, or for the force that round-off leaves if that is larger.
      method: options of the search, an :class:`EigenvectorFollowing`.
      max_steps: largest number of steps of the search and of Newton's method together.
      throw: whether to raise an error where no saddle is reached; if False, only the status shows
        this.
      progress: whether to show a progress bar; None shows it only in a terminal or a notebook.

    Returns:
      an :class:`~mdsens.Equilibrium`. Its ``order`` is the number of modes of negative stiffness
      that were counted, which is 1 where the status is good.

    Raises:
      InputError: the parameters, the direction or the options are not valid.
      PrecisionError: the tolerance is below round-off.
      ConvergenceError: no saddle was reached. The status is MAX_STEPS_REACHED, NOT_FINITE, UNJAMMED
        where no particles touch, or NOT_A_SADDLE where the forces vanish at a minimum or at a
        saddle of higher order. The last configuration is the ``result`` of the error.
    """
    began = time.perf_counter()
    system, tolerance = _check_arguments(start, params, tolerance, method, max_steps)
    if towards is None:
        climb = _check_direction(direction, system)
    else:
        other_side = _check_other_side(towards, system, direction, band)
        system, climb = climbing_image_band(system, other_side, band)
    bar = Decades(progress, tolerance)
    # a message about NaN looks for the part of the energy at fault at the start of the search
    initial = system
    try:
        system, largest, steps = follow_eigenvector(
            system, climb, tolerance, method, int(max_steps), bar
        )
    finally:
        bar.close()
    floor = float(force_scale(system, *natural_units(system), largest).floor)
    status, order = _judge_saddle(
        system, largest, tolerance, max(floor, ROUND_OFF * round_off(system))
    )
    saddle = Equilibrium(
        system=system,
        code=jnp.asarray(status.value, jnp.int32),
        max_force=jnp.asarray(largest),
        steps=jnp.asarray(steps),
        wall_time=time.perf_counter() - began,
        tolerance=tolerance,
        force_floor=jnp.asarray(floor),
        order=order,
    )
    if throw:
        message = (
            f"find_saddle stopped after {steps:,} steps at max_force"
            f" {largest:.3e}{where_not_finite(status, initial)}"
        )
        raise_for_status(status, message, saddle)
    return saddle


def _judge_saddle(
    system: System, largest: float, tolerance: float, floor: float
) -> tuple[Status, int]:
    """Return the status of a search for a saddle, and the number of negative modes at its end.

    Args:
      system: the system at the end of the search.
      largest: the largest force left on a particle.
      tolerance: the largest force that was to be reached.
      floor: the largest force that round-off may leave.
    """
    if not np.isfinite(largest):
        return Status.NOT_FINITE, 0
    stiffness, null = loose_stiffness(system)
    if np.all(np.asarray(null.rattlers)):
        return Status.UNJAMMED, 0
    # where no factor counts the negative modes, at most 3 are computed: more than one is enough
    order = stiffness.unstable(3)
    if largest > max(tolerance, floor):
        return Status.MAX_STEPS_REACHED, order
    if order != 1:
        return Status.NOT_A_SADDLE, order
    return Status.CONVERGED if largest <= tolerance else Status.ROUND_OFF_LIMITED, order


def sides(
    saddle: Equilibrium, *, step: float = 1e-2, tolerance: float | None = None
) -> tuple[Equilibrium, Equilibrium]:
    """Find the two minima that a saddle connects.

    The energy is minimized from two configurations, displaced from the saddle to either side along
    the mode of negative stiffness.

    Args:
      saddle: a saddle from ``find_saddle``.
      step: the longest displacement of a particle from the saddle, as a fraction of the length
        scale of the potential (contact distance, or the distance of the minimum of the pair
        energy).
      tolerance: the largest force that the minimizations leave, as in ``minimize``.

    Returns:
      two minima; the particles keep their indices.
    """
    if not isinstance(saddle, Equilibrium) or saddle.order != 1:
        raise InputError(
            f"`saddle` is {short(saddle)}: give the Equilibrium of order 1 from find_saddle."
        )
    if not 0 < real_number("step", step, "give a positive number.") < np.inf:
        raise InputError(f"`step` is {short(step)}: give a positive number.")
    stiffness, _ = loose_stiffness(saddle.system)
    # The sign of a mode is arbitrary, and with it the order of the two minima in the result.
    mode = stiffness.lowest(1).vectors[:, 0].reshape(saddle.positions.shape)
    length = float(natural_units(saddle.system)[0])
    # scaled so that the particle that moves most moves by ``step`` lengths
    longest = np.sqrt(np.max(np.sum(mode**2, axis=1)))
    displacement = step * length / longest * mode

    def relax_beside(sign: float) -> Equilibrium:
        positions = saddle.positions + sign * displacement
        return minimize(saddle.system.replace(positions=positions), tolerance=tolerance)

    return relax_beside(1.0), relax_beside(-1.0)


def _check_arguments(
    start: System | Equilibrium,
    params: Params | None,
    tolerance: float | None,
    method: object,
    max_steps: object,
) -> tuple[System, float]:
    """Validate the arguments of ``find_saddle``.

    Returns:
      (the system at the given parameters, the tolerance as a number).
    """
    system = _check_start(start)
    if not isinstance(method, EigenvectorFollowing):
        raise InputError(f"`method` is {short(method)}: give EigenvectorFollowing() of ms.saddles.")
    # up to the largest float: infinity and NaN are refused
    if tolerance is not None and not 0 < real_number("tolerance", tolerance) <= sys.float_info.max:
        raise InputError(f"`tolerance` is {short(tolerance)}: give a positive number, or None.")
    if not 1 <= real_number("max_steps", max_steps) < math.inf:
        raise InputError(f"`max_steps` is {short(max_steps)}: give a finite number from 1.")
    # either way the neighbor list is allocated for the configuration at hand
    system = system.reallocate(keep=True) if params is None else system.with_params(params)
    return system, _choose_tolerance(tolerance, system)


def _check_start(start: System | Equilibrium) -> System:
    """Validate ``start`` of ``find_saddle``; return its system, one without constraints."""
    system = start.system if isinstance(start, Equilibrium) else start
    if not isinstance(system, System):
        raise InputError(f"`start` is a {type(start).__name__}: give a System or an Equilibrium.")
    require_unconstrained(system, "find_saddle")
    if system.batch is not None:
        raise InputError(
            f"`start` is a batch of {system.batch} systems, and find_saddle takes one system: give"
            " one system of the batch, such as ms.unstack(batch)[0]."
        )
    if isinstance(start, Equilibrium) and start.load is not None:
        raise InputError(
            f"`start` is a minimum that was relaxed at a {start.load.kind}, and find_saddle keeps"
            " the cell fixed: give the system of the minimum, start.system."
        )
    return system


def _choose_tolerance(tolerance: float | None, system: System) -> float:
    """Return the largest force to reach at a saddle; raise PrecisionError if it is out of reach.

    Without a tolerance of the user it is a fixed share (GOAL) of the mean pair force, or the force
    that round-off leaves if that is larger.
    """
    if tolerance is None:
        scale = force_scale(system, *natural_units(system), 0.0)
        return max(GOAL * float(scale.mean), float(scale.floor))
    # minimizations end between a tenth of ``round_off`` and all of it, so half of that tenth is
    # certainly out of reach
    floor = round_off(system)
    if tolerance < 0.05 * floor:
        raise PrecisionError(
            f"tolerance={tolerance:.0e} is out of reach in {system.positions.dtype}: raise"
            f" `tolerance` to {floor:.0e} or more."
        )
    return tolerance


def _check_other_side(
    towards: System | Equilibrium, system: System, direction: ArrayLike | None, band: ElasticBand
) -> System:
    """Validate ``towards`` of ``find_saddle``, the minimum on the other side of the saddle.

    Returns:
      the system at the positions of this minimum.
    """
    other = towards.system if isinstance(towards, Equilibrium) else towards
    if not isinstance(other, System) or other.positions.shape != system.positions.shape:
        raise InputError(
            f"`towards` is {short(towards)}: give the minimum on the other side of the saddle, an"
            " Equilibrium or a System with the same particles as `start`."
        )
    if direction is not None:
        raise InputError("`direction` and `towards` are both given: give one of them.")
    if not isinstance(band, ElasticBand):
        raise InputError(f"`band` is {short(band)}: give ElasticBand() of ms.saddles.")
    # box and parameters are those of ``start``; only the positions of the other side are taken
    return system.replace(positions=other.positions).reallocate(keep=True)


def _check_direction(direction: ArrayLike | None, system: System) -> jax.Array:
    """Validate ``direction`` of ``find_saddle``; return a unit vector (n, d), or zeros for None."""
    if direction is None:
        return jnp.zeros_like(system.positions)
    vector = jnp.asarray(real_array("direction", direction), system.positions.dtype)
    if (
        vector.shape != system.positions.shape
        or not np.isfinite(np.asarray(vector)).all()
        or not jnp.any(vector != 0)
    ):
        raise InputError(
            f"`direction` has shape {vector.shape}: give an array of shape"
            f" {system.positions.shape}, finite and not zero everywhere."
        )
    return vector / jnp.linalg.norm(vector)
