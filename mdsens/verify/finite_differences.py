"""Derivatives of a minimum by finite differences, at one safe step or over many step sizes.

For each finite difference the system is minimized again at changed parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from mdsens import sensitivity
from mdsens._util.compilation import compiled
from mdsens._util.errors import InputError, PrecisionError, raise_for_status
from mdsens._util.lattice import inverse
from mdsens._util.pytree import largest_entry
from mdsens._util.validation import real_array, real_number, short
from mdsens.mechanics import contact_changes, lagrangian
from mdsens.mechanics.rigidity import analyze_rigidity
from mdsens.mechanics.status import Status
from mdsens.mechanics.strain import from_mandel, to_mandel
from mdsens.mechanics.units import natural_units, round_off
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.system import System, crossing_terms, pair_distances
from mdsens.relaxation.cell_conditions import condition_of
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.relaxation.minimization import minimize
from mdsens.saddles.search import find_saddle
from mdsens.sensitivity.certificate.solution_space import on_host
from mdsens.sensitivity.linearization import Linearization, full_tangent, require_sound
from mdsens.sensitivity.results import Displacement
from mdsens.verify._settling import Settled, Settling
from mdsens.verify.records import DerivativeTest, FiniteDifference, gap, relative

__all__ = ["DerivativeTest", "FiniteDifference", "derivative_test", "finite_difference"]

Params = Mapping[str, Any]

# Round-off of the minima relative to the difference, at the default step: the step is as long as
# that takes. Measured on packings from a pressure of 0.1 down to 1e-4 and on a glass: there the
# truncation error is about as small.
NOISE = 3e-9
# Longest default step, in units of the parameters' size over the direction's. It limits the step
# where the response almost vanishes, for which round-off alone would ask for more.
LONGEST = 1e-4
# Root mean square relative error of rounding a number to the nearest one, in eps.
# It is eps / sqrt(12) for a mantissa of 1, and less for a larger one, which lies between 1 and 2.
ROUNDING = 0.2
# The truncation error goes with t^2, so the difference at t less that at t/2 is 3/4 of it.
WHOLE = 4.0 / 3.0
# A minimum is another one if a coordinate moved by more than AWAY lengths of the potential plus
# FASTER times what the derivative predicts.
AWAY = 1e-2
FASTER = 10.0
# Longest default step, in units of the distance to the first contact change.
INSIDE = 0.3
# Default steps of a derivative test, in units of the parameters' size over the direction's: from
# where round-off dominates to where contacts have changed, three steps a decade.
RANGE = (1e-9, 1e-2)
COUNT = 22


def _interacting(eq: Equilibrium) -> np.ndarray:
    """Return the k pairs in contact at a minimum, without rattlers, as rows of integers.

    A row has the two particle indices, and the image of the second particle where images are
    listed. A pair is in contact if it is nearer than a breakpoint, a distance at which a derivative
    of the potential jumps or diverges. A pair is listed once for each such breakpoint of each term
    of the potential.
    """
    rows = []
    # the function of all derivatives, which is compiled already
    _, net, _ = analyze_rigidity(eq.system, eq.max_force, eq.contacts_needed)
    rattlers = np.asarray(net.rattlers)
    for i, j, images, mask, inside in jax.device_get(_pairs_within_breakpoints(eq.system)):
        kept = mask & ~rattlers[i] & ~rattlers[j]
        # In the order of the indices: pairs of two minima are compared, whose lists may differ.
        if images is None and eq.system.neighbors.images is not None:
            images = np.zeros((len(i), eq.system.dimension))  # of a list of bonds
        pairs = contact_changes.named_pairs(np.stack([i, j], axis=1), images)
        for row in inside:
            rows.append(np.unique(pairs[row & kept], axis=0))
    return np.concatenate(rows) if rows else np.zeros((0, 2), int)


@compiled
def _pairs_within_breakpoints(system: System) -> list[tuple[Any, ...]]:
    """Compare the distance of each pair with the breakpoints of its potential.

    Returns:
      for each pair term of the energy the indices i and j (m,), the images (m, d) or None, the mask
      (m,) of the places that hold a pair, and for each breakpoint whether the pair is nearer,
      (breakpoints, m).
    """
    found = []
    for term in crossing_terms(system):
        distances = pair_distances(system, term, system.positions, system.box)
        inside = distances[None, :] < jnp.asarray(term.lengths())
        found.append((term.i, term.j, term.images, term.mask, inside))
    return found


@compiled
def _without_null_part(
    lin: Linearization, change: Unknowns
) -> tuple[jax.Array | Unknowns, jax.Array]:
    """Remove the part of a derivative in the null space: :meth:`_Line.without_null_part`."""
    positions = change.positions
    strain = change.strain
    null = lin.null
    if lin.constrained:
        kept = jnp.where(null.rattlers[:, None], 0.0, positions)
        motions: Any = null.motions
        kept = kept - jnp.tensordot(jnp.sum(motions * kept, axis=(1, 2)), motions, axes=1)
        return dataclasses.replace(change, positions=kept), kept
    if strain is None:
        rest = null.project(Unknowns(positions)).positions
        return rest, rest
    # A motion with the cell is no null motion, but the projection would take part of it away.
    with_cell = lin.equilibrium.positions @ from_mandel(strain).T
    rest = null.project(Unknowns(positions - with_cell)).positions
    return Unknowns(rest + with_cell, strain), rest


def _active_set(eq: Equilibrium) -> np.ndarray:
    """Return a mask of a minimum's coordinates that are pinned or at a bound.

    The mask is empty for a system without constraints.
    """
    return np.asarray(lagrangian.active_set(eq.system).positions if eq.system.constraints else [])


class _Difference(NamedTuple):
    """A central difference of two minima, at parameters on both sides of those of a given minimum.

    Attributes:
      value: the derivative of the relaxed positions, without its part in the null space (rattlers,
        translations); ``Unknowns`` where strain or multipliers are relaxed, too.
      nonaffine: (n, d) the derivative of the positions; for a relaxed cell, without the
        motion with the cell.
      noise: relative error of ``value`` that may come from round-off of minima and parameters.
      status: the worse status of the two minimizations.
      network_changed: whether a contact changed on one side, or a minimization ended in another
        minimum.
    """

    value: jax.Array | Unknowns
    nonaffine: jax.Array
    noise: float
    status: Status
    network_changed: bool


@dataclasses.dataclass(frozen=True)
class _Line:
    """Minima along the line params + t dparams of parameters, and finite differences between them.

    The line goes through the parameters ``params`` of a given minimum, at t = 0.

    Attributes:
      lin: the given minimum, linearized.
      settling: function that reduces the forces left at a minimum near the given one to round-off.
      tangent: dparams for every parameter, arrays or trees of arrays by name.
      response: the analytic derivative of the minimum by t.
      unit: the norm of the parameters over the norm of dparams: a step t = unit changes the
        parameters by about as much as their values.
      radius: the smallest |t| at which a contact changes, to first order.
      pairs: (k, 2) the pairs in contact at the given minimum.
      tolerance: the largest force that the minimizations leave.
    """

    lin: Linearization
    settling: Settling
    tangent: dict[str, Any]
    response: Displacement
    unit: float
    radius: float
    pairs: np.ndarray
    tolerance: float

    @property
    def active_set(self) -> np.ndarray:
        """Mask of the coordinates that are pinned or at a bound at the given minimum.

        The mask is empty for a system without constraints.
        """
        return _active_set(self.lin.equilibrium)

    def without_null_part(self, change: Unknowns) -> tuple[jax.Array | Unknowns, jax.Array]:
        """Remove the part of a derivative in the null space, such as translations and rattlers.

        Under constraints, the derivatives of constrained coordinates are kept: only motions that
        the constraints leave free and rattlers are removed.

        Args:
          change: the derivative of positions (n, d) and, if relaxed, of strain and multipliers.

        Returns:
          the derivative without this part; and of this derivative the positions alone, (n, d), for
          a relaxed cell without the motion with the cell.
        """
        return _without_null_part(self.lin.traced(()), change)

    def is_elsewhere(self, minimum: Equilibrium, t: float) -> bool:
        """Return whether a minimum at params +- t dparams is too far from the given minimum.

        No coordinate may differ by more than 0.01 of the length scale of the potential plus 10
        times the largest motion that the derivative predicts. Otherwise the minimum is taken to be
        in another basin.
        """
        value = self.response.value
        rate = np.asarray(value.positions if isinstance(value, Unknowns) else value)
        counted = ~np.asarray(self.lin.network.loose)
        moved = np.asarray(minimum.positions) - np.asarray(self.lin.equilibrium.positions)
        if not counted.any():  # a single rigid body, all of whose particles are loose: it may turn
            counted = ~counted
        length = float(natural_units(minimum.system)[0])
        farthest = AWAY * length + FASTER * t * np.abs(rate).max(initial=0.0)
        return bool(np.abs(moved[counted]).max(initial=0.0) > farthest)

    def minimize_at(self, side: float) -> tuple[Settled, Status, bool]:
        """Minimize again at the parameters params + side dparams; ``side`` is positive or negative.

        Returns:
          the minimum; the status of the minimization; whether contacts changed on the way or the
          minimization ended in another minimum.
        """
        relaxed = self._relax_at(side)
        settled = self.settling(relaxed)
        status = self._judge_minimum(relaxed, settled)
        minimum = settled.equilibrium
        changed = not np.array_equal(self.pairs, _interacting(minimum)) or not np.array_equal(
            self.active_set, _active_set(minimum)
        )
        return settled, status, changed or self.is_elsewhere(minimum, abs(side))

    def _relax_at(self, side: float) -> Equilibrium:
        """Find the relaxed configuration again at the parameters params + side dparams.

        A minimum is minimized again, and a saddle is located again.
        """
        eq = self.lin.equilibrium
        params = {
            name: on_host(lambda v, rate: v + side * rate, value, self.tangent[name])
            for name, value in eq.params.items()
            if name in self.tangent
        }
        load = eq.load
        if load is not None:
            moved = {
                name: on_host(lambda v, rate: v + side * rate, value, self.tangent[name])
                for name, value in load.params.items()
            }
            load = load.at(moved)
        options: dict[str, Any] = {"tolerance": self.tolerance, "throw": False, "progress": False}
        if eq.order:
            return find_saddle(eq.system, params, **options)
        return minimize(eq.system, params, cell=condition_of(eq, load), **options)

    def _judge_minimum(self, minimum: Equilibrium, settled: Settled) -> Status:
        """Return the status of a minimization that is followed by Newton steps to round-off.

        Args:
          minimum: the result of the minimization.
          settled: the same minimum after the Newton steps.
        """
        eq = self.lin.equilibrium
        if minimum.order != eq.order:
            return Status.NOT_A_SADDLE
        status = minimum.status
        # The minimizer may stop above the smaller tolerance asked for here, but within that of the
        # minimum itself: Newton steps then do the rest. In a relaxed cell max_force says nothing of
        # the stress.
        reached = max(float(eq.tolerance), float(eq.force_floor))
        nearly = float(minimum.max_force) <= reached and eq.load is None
        if status in (Status.MAX_STEPS_REACHED, Status.UNCONVERGED) and nearly:
            enough = settled.force <= self.tolerance
            return Status.CONVERGED if enough else Status.ROUND_OFF_LIMITED
        return status

    def difference(self, t: float) -> _Difference:
        """Compute (R(t) - R(-t)) / 2t, with the relaxed positions R(t) at params + t dparams.

        The part in the null space (rattlers, translations) is removed. What is relaxed with the
        positions, such as the cell, is differentiated in the same way.
        """
        eq = self.lin.equilibrium
        ahead, status_ahead, changed_ahead = self.minimize_at(t)
        behind, status_behind, changed_behind = self.minimize_at(-t)
        up = ahead.equilibrium
        down = behind.equilibrium
        # on the host, here and below: jax would compile a program for each operation
        slope = on_host(lambda a, b: (a - b) / (2.0 * t), _unknowns_at(up), _unknowns_at(down))
        if eq.load is not None:
            # Cell vectors are columns, and the cell is (1 + strain) box: strain = d(box) box^-1.
            apart = np.asarray(up.system.box) - np.asarray(down.system.box)
            strain = to_mandel(jnp.asarray(apart / (2.0 * t) @ inverse(np.asarray(eq.system.box))))
            slope = dataclasses.replace(slope, strain=strain)
        value, nonaffine = self.without_null_part(slope)
        return _Difference(
            value,
            nonaffine,
            self.noise(value, nonaffine, (ahead, behind), t),
            Status.worst_of([status_ahead, status_behind]),
            changed_ahead or changed_behind,
        )

    def noise(
        self,
        value: jax.Array | Unknowns,
        nonaffine: jax.Array,
        ends: Sequence[Settled],
        t: float,
    ) -> float:
        """Estimate the relative error of a finite difference with step t that is due to round-off.

        The error comes from rounding the parameters and the positions at params +- t dparams, and
        from the Newton steps that remain there.

        Args:
          value: the finite difference.
          nonaffine: (n, d) the part of ``value`` for the positions; for a relaxed cell,
            without the motion with the cell.
          ends: the minima at params +- t dparams.
          t: the step.
        """
        size, positions = (
            float(np.linalg.norm(np.asarray(x))) for x in (nonaffine, self.lin.system.positions)
        )
        # Rounding the parameters shifts t by ROUNDING eps unit. Rounding both minima adds the error
        # sqrt(2) ROUNDING eps |R| to their difference, which is divided by 2 t.
        rounding = ROUNDING * float(np.finfo(float).eps) / t
        error = rounding * np.hypot(self.unit, relative(positions / 2.0**0.5, size))
        for end in ends:
            rest, _ = self.without_null_part(on_host(lambda leaf: leaf / (2.0 * t), end.rest))
            error = np.hypot(error, gap(on_host(np.add, value, rest), value, nonaffine))
        # Not NaN, with which the result of min() depends on the order of its arguments.
        return float(error) if np.isfinite(error) else np.inf

    def safe_step(self) -> float:
        """Choose the default step t of finite differences, from round-off and contact changes.

        The step is so long that round-off of this minimum is a small part of the difference, but
        shorter than the t at which the first contact changes.
        """
        value, nonaffine = self.without_null_part(_as_unknowns(self.response.value))
        here = self.settling(self.lin.equilibrium)
        # The noise goes as 1 / t: if it is N at t = 1, it is NOISE at t = N / NOISE.
        noise = self.noise(value, nonaffine, (here, here), 1.0)
        return min(noise / NOISE, LONGEST * self.unit, INSIDE * self.radius)


def _unknowns_at(eq: Equilibrium) -> Unknowns:
    """Return the quantities of a minimum that ``jvp`` differentiates, other than the strain.

    These are the positions, the multipliers, and the parameters that constraints relax.
    """
    names = lagrangian.relaxed(eq.system)
    relaxed_params = {k: eq.params[k] for k in names}
    return Unknowns(eq.positions, params=relaxed_params or None, multipliers=eq.multipliers)


def _as_unknowns(value: jax.Array | Unknowns) -> Unknowns:
    """Return a derivative of a minimum as ``Unknowns``, with the positions as one of its fields.

    An array (n, d) is the derivative of the positions alone.
    """
    return value if isinstance(value, Unknowns) else Unknowns(value)


def _line(
    eq: Equilibrium,
    dparams: Params,
    tolerance: float | None,
    steps: ArrayLike | None,
    value: ArrayLike | Unknowns | None = None,
) -> _Line:
    """Prepare finite differences of a minimum along a change of the parameters; check arguments.

    Args:
      eq: the minimum.
      dparams: the change of the parameters, as in ``jvp``.
      tolerance: the largest force that the minimizations leave; None for the default.
      steps: one step size or several, only checked here.
      value: the derivative to test, only checked here.
    """
    lin = sensitivity.linearize(eq, throw=False)
    if eq.positions.dtype != jnp.float64:
        raise PrecisionError(
            f"`eq` is in {eq.positions.dtype}, in which differences of minima are round-off: work"
            " in double precision (in Python, call ms.enable_x64() before making the system)."
        )
    tangent = full_tangent(eq.system, dparams, lin.params)
    largest = largest_entry(tangent)
    if largest == 0.0:
        raise InputError("`dparams` is zero everywhere: give a change of at least one parameter.")
    _check_tolerance(tolerance)
    _check_steps(steps)
    if value is not None:
        _checked_derivative(value, eq)
    # After the arguments: one that is wrong is reported before the minimum is.
    require_sound(lin, eq, throw=True)
    unit = _choose_unit(lin, tangent, largest)
    response = sensitivity.jvp(lin, dparams, throw=False)
    radius = _first_contact_change(lin, response, tangent)
    if tolerance is None:
        # A hundredth of the minimum's own, but not below what round-off lets a relaxation reach.
        tolerance = max(
            0.01 * float(eq.tolerance), float(eq.force_floor), 0.1 * float(round_off(eq.system))
        )
    return _Line(
        lin=lin,
        settling=Settling(lin),
        tangent=tangent,
        response=response,
        unit=unit,
        radius=radius,
        pairs=_interacting(eq),
        tolerance=tolerance,
    )


def _first_contact_change(
    lin: Linearization, response: Displacement, tangent: dict[str, Any]
) -> float:
    """Compute the smallest |t| at which a contact or an active constraint changes, to first order.

    Args:
      lin: the linearized minimum at t = 0.
      response: the derivative of the minimum by t.
      tangent: the derivative of the parameters by t, arrays by name.
    """
    eq = lin.equilibrium
    velocity = response.value
    strain = None
    params = dict(tangent)
    switch = np.inf
    if isinstance(velocity, Unknowns) and velocity.strain is not None:
        strain = from_mandel(velocity.strain)
        velocity = response.nonaffine
    elif isinstance(velocity, Unknowns):
        params |= velocity.params or {}
        # Of the multipliers, those of equations are unknowns; those of pins and bounds are not.
        equations = {k: (velocity.multipliers or {})[k] for k in lin.multipliers or {}} or None
        rate = dataclasses.replace(velocity, multipliers=equations)
        times = np.abs(np.asarray(_switch_times(lin, rate, tangent)))
        switch = float(np.min(times, initial=np.inf))
        velocity = velocity.positions
    params = {name: params[name] for name in eq.params}
    crossing = contact_changes.crossings(eq.system, velocity, params, lin.network.rattlers, strain)
    return min(crossing.radius, switch)


@compiled
def _switch_times(lin: Linearization, rate: Unknowns, tangent: Params) -> jax.Array:
    """Compute the times t at which constraints become active or inactive, to first order.

    Args:
      lin: the linearized minimum at t = 0.
      rate: the derivative of positions and multipliers by t.
      tangent: the derivative of the parameters by t, arrays by name.
    """
    return lagrangian.switch_times(
        lin.system, (lin.unknowns, lin.params), (rate, dict(tangent)), lin.network.rattlers
    )


def _choose_unit(lin: Linearization, tangent: dict[str, Any], largest: float) -> float:
    """Return the step t that changes the parameters by about as much as their values.

    The result is 1 where all parameters that change are zero.

    Args:
      lin: the linearized minimum.
      tangent: the derivative of the parameters by t, arrays by name.
      largest: the largest absolute value in ``tangent``.
    """
    size = max(_parameter_size(lin, name) for name, v in tangent.items() if largest_entry(v) > 0)
    return size / largest if size > 0 else 1.0


def _parameter_size(lin: Linearization, name: str) -> float:
    """Return the largest absolute value of a parameter, as the unit of steps along the parameter.

    A pressure or a stress may be zero, so its unit is the change that strains the cell by 1.
    """
    if lin.cell is not None and name in lin.cell.load.params and name != "volume":
        stiffness = np.max(np.abs(np.asarray(lin.cell.stiffness)))
        return float(stiffness / np.asarray(lin.system.periodic_volume))
    return largest_entry(lin.params[name])


def finite_difference(
    eq: Equilibrium, dparams: Params, step: float | None = None, *, tolerance: float | None = None
) -> FiniteDifference:
    """Compute the derivative dR/dt of relaxed positions R by central differences.

    The difference is (R(t) - R(-t)) / 2t. R(t) and R(-t) are found by minimizing again from this
    minimum, at the parameters params + t dparams and params - t dparams. A relaxed cell is
    relaxed again under its load, or, where ``dparams`` has ``"pressure"`` or another parameter of
    the load, under loads a little to either side; the cell is differentiated with the positions. A
    saddle is located again by Newton steps.

    Args:
      eq: a minimum; not a batch.
      dparams: the change of the parameters along which to differentiate, as in ``jvp``.
      step: the step t. None chooses the step at which round-off of the positions, which is measured
        at the minimum, is 3e-9 of the difference. It is at most 0.3 of the t at which the first
        contact changes, and at most 1e-4 of the norm of the parameters over the norm of ``dparams``
        (for a pressure or a stress, the change that strains the cell by 1 stands for the norm).
      tolerance: the largest force that the minimizations leave. None takes 0.01 of the tolerance of
        the minimum, but not below round-off. Newton steps remove the force that the minimizations
        leave, see :mod:`mdsens.verify._settling`. If the force that remains is above this tolerance
        but within that of the minimum, the difference is computed all the same, and ``status`` says
        so.

    Returns:
      a :class:`FiniteDifference` v. To compare it with a derivative r that ``jvp`` returned, take
      ``v.disagreement(r.value)``.

    Raises:
      InputError: bad names, shapes, step or tolerance; a contact that changes at the minimum itself
        while ``step`` is None. PrecisionError: single precision. ConvergenceError: no minimum.

    Example:
      >>> import mdsens as ms
      >>> ms.enable_x64()
      >>> eq = ms.minimize(ms.load_system("dimer"))
      >>> exact = ms.jvp(eq, {"sigma": 1.0}).value
      >>> bool(ms.verify.finite_difference(eq, {"sigma": 1.0}).disagreement(exact) < 1e-7)
      True
    """
    line = _line(eq, dparams, tolerance, step)
    if step is None:
        step = line.safe_step()
        if step == 0.0:
            raise InputError(
                "a contact changes at this very minimum, so that the derivatives on its two sides"
                " differ and every step mixes both: change the parameters a little and minimize"
                " again, or give `step` to get such a mixture."
            )
    whole = line.difference(step)
    half = line.difference(0.5 * step)
    spread = gap(half.value, whole.value, whole.nonaffine)
    # The noise of the half step is twice that of the whole; the root of their mean square.
    noise = np.hypot(whole.noise, 0.5 * half.noise) / 2.0**0.5
    return FiniteDifference(
        value=whole.value,
        nonaffine=whole.nonaffine,
        error=float(np.hypot(WHOLE * spread, noise)),
        step=float(step),
        radius=line.radius,
        network_changed=whole.network_changed or half.network_changed,
        status=Status.worst_of([whole.status, half.status]),
    )


def _check_tolerance(tolerance: float | None) -> None:
    """Raise InputError unless the largest force that may be left is positive, or None."""
    if tolerance is None:
        return
    number = real_number("`tolerance`", tolerance, "give a positive number.")
    if not 0 < number < np.inf:
        raise InputError(f"`tolerance` is {short(tolerance)}: give a positive number.")


def _check_steps(steps: ArrayLike | None) -> None:
    """Raise InputError unless all step sizes of finite differences, one or several, are positive.

    None, which stands for the default, is accepted.
    """
    if steps is None:
        return
    array = np.asarray(real_array("`steps`", steps, "give positive numbers."), float)
    positive = np.isfinite(array).all() and (array > 0).all()
    if array.ndim > 1 or array.size == 0 or not positive:
        if array.ndim == 0:
            raise InputError(f"`step` is {short(steps)}: give a positive number.")
        raise InputError(f"`steps` is {short(steps)}: give positive numbers.")


def _checked_derivative(value: ArrayLike | Unknowns, eq: Equilibrium) -> Unknowns:
    """Check the shape of a derivative of a minimum that a user gives; return it as ``Unknowns``.

    The derivative must contain that of the positions, (n, d); in a relaxed cell also that of the
    strain of the cell; and under constraints also that of the multipliers.
    """
    if eq.system.constraints:
        if isinstance(value, Unknowns) and jax.tree.structure(value) == jax.tree.structure(
            _unknowns_at(eq)
        ):
            return value
        raise InputError(
            "`value` is not a derivative under constraints: give Unknowns as ms.jvp returns,"
            " multipliers included."
        )
    if isinstance(value, Unknowns):
        positions = value.positions
        strain = value.strain
    else:
        positions = value
        strain = None
    if eq.load is not None and strain is None:
        raise InputError(
            "`value` has no strain: in a relaxed cell give Unknowns(positions, strain), as ms.jvp"
            " returns."
        )
    n, d = eq.positions.shape
    positions = _checked_part("value", positions, eq, (n, d), "the derivative of the positions")
    if eq.load is None or strain is None:
        return Unknowns(positions)
    what = "the derivative of the strain, a Mandel vector"
    return Unknowns(positions, _checked_part("value.strain", strain, eq, (d * (d + 1) // 2,), what))


def _checked_part(
    name: str, part: ArrayLike, eq: Equilibrium, shape: tuple[int, ...], what: str
) -> jax.Array:
    """Return one part of a user's derivative as an array; raise InputError if it is not valid.

    Args:
      name: name of the part in the error message.
      part: the part.
      eq: the minimum that is differentiated.
      shape: the shape that the part must have; its values must be finite.
      what: the part in words, for the error message.
    """
    array = jnp.asarray(part, eq.positions.dtype)
    if array.shape != shape or not np.isfinite(np.asarray(array)).all():
        raise InputError(
            f"`{name}` has shape {array.shape} or is not finite: give {what}, finite and of shape"
            f" {shape}."
        )
    return array


def derivative_test(
    eq: Equilibrium,
    dparams: Params,
    steps: Sequence[float] | np.ndarray | None = None,
    *,
    value: ArrayLike | Unknowns | None = None,
    tolerance: float | None = None,
) -> DerivativeTest:
    """Compute the relative error of central differences against a derivative, over many steps.

    The error is |(R(t) - R(-t)) / 2t - dR/dt| / |dR/dt|. R(t) are the positions relaxed at
    params + t dparams, and dR/dt is the derivative under test. For each step t two minimizations
    are run, both from the given minimum: at params + t dparams and at params - t dparams.

    Args:
      eq: a minimum; not a batch.
      dparams: the change of the parameters along which to differentiate, as in ``jvp``.
      steps: the steps t, positive; None takes 22 steps from 1e-9 to 1e-2 of the norm of the
        parameters over the norm of ``dparams``.
      value: the derivative to test, (n, d), however it was computed; in a relaxed cell
        ``Unknowns``, as ``jvp`` returns. None tests the derivative by ``jvp``. The part of the
        derivative in the null space (translations, rattlers, rotations of a free cluster) is left
        out, because differences have no such part.
      tolerance: the largest force that the minimizations leave, as in ``finite_difference``.

    Returns:
      a :class:`DerivativeTest`; :func:`mdsens.plots.derivative_test` draws it.

    Raises:
      InputError: bad names, shapes or steps. PrecisionError: single precision. ConvergenceError: no
        minimum, or no derivative by ``jvp`` to test.
    """
    line = _line(eq, dparams, tolerance, steps, value)
    if value is None:
        problem = "jvp gives no derivative to test: give one as value"
        raise_for_status(line.response.status, problem, line.response)
    tested = line.response.value if value is None else value
    exact, nonaffine = line.without_null_part(_checked_derivative(tested, eq))
    if steps is None:
        chosen = line.unit * np.geomspace(*RANGE, COUNT)
    else:
        chosen = np.sort(np.atleast_1d(np.asarray(steps, float)))
    differences = [line.difference(float(t)) for t in chosen]
    return DerivativeTest(
        steps=chosen,
        errors=np.array([gap(d.value, exact, nonaffine) for d in differences]),
        network_changed=np.array([d.network_changed for d in differences]),
        radius=line.radius,
        statuses=tuple(d.status for d in differences),
    )
