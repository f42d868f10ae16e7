"""Derivatives by finite differences: minimizing again, at one safe step or over many steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from mdsens import sensitivity
from mdsens._util.errors import InputError, PrecisionError, raise_for_status
from mdsens._util.lattice import inverse
from mdsens._util.validation import real_array, real_number, short
from mdsens.mechanics import contact_changes, contacts, lagrangian
from mdsens.mechanics.hessian import Unknowns
from mdsens.mechanics.status import Status
from mdsens.mechanics.strain import from_mandel, to_mandel
from mdsens.mechanics.units import natural_units, round_off
from mdsens.model.system import pair_distances, pair_terms
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.relaxation.minimization import minimize
from mdsens.saddles.search import find_saddle
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
    """(k, 2) particle indices of the pairs that touch, without padding and rattlers.

    These are the pairs nearer than a breakpoint, for each breakpoint of each term. A breakpoint is
    a distance at which a derivative of the potential jumps or diverges.
    """
    rows = []
    network = contacts.network(eq.system, eq.max_force, eq.contacts_needed)
    rattlers = np.asarray(network.rattlers)
    for term in pair_terms(eq.system):
        i = np.asarray(term.i)
        j = np.asarray(term.j)
        distances = np.asarray(pair_distances(term, eq.system.positions, eq.system.box))
        inside = distances[None, :] < np.asarray(term.lengths())
        kept = np.asarray(term.mask) & ~rattlers[i] & ~rattlers[j]
        pairs = np.stack([np.minimum(i, j), np.maximum(i, j)], axis=1)
        for row in inside:
            rows.append(np.unique(pairs[row & kept], axis=0))
    return np.concatenate(rows) if rows else np.zeros((0, 2), int)


def _active_set(eq: Equilibrium) -> np.ndarray:
    """True for coordinates that are pinned or at a bound; empty without constraints."""
    return np.asarray(lagrangian.active_set(eq.system).positions if eq.system.constraints else [])


class _Difference(NamedTuple):
    """A central difference of two minima.

    Attributes:
      value: the derivative, without its null-space part.
      nonaffine: that of the positions less the motion of the cell, at a pressure; else ``value``.
      noise: error that round-off of minima and parameters may make, relative as in ``gap``.
      status: the worst of the two minimizations.
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
    """The line params + t dparams through a minimum, along which to minimize again.

    Attributes:
      lin: the minimum at t = 0.
      settling: brings a minimum near it down to round-off.
      tangent: dparams, for every parameter.
      response: the analytic derivative along the line.
      unit: the norm of the parameters over that of the direction: a step t = unit changes the
        parameters by about as much as their values.
      radius: t of the first change of a contact, to first order.
      pairs: the pairs that touch at the minimum.
      tolerance: the largest force that the minimizations leave.
    """

    lin: Linearization
    settling: Settling
    tangent: dict[str, jax.Array]
    response: Displacement
    unit: float
    radius: float
    pairs: np.ndarray
    tolerance: float

    @property
    def active_set(self) -> np.ndarray:
        """True for coordinates that are pinned or at a bound at the minimum; may be empty."""
        return _active_set(self.lin.equilibrium)

    def without_null_part(self, change: Unknowns) -> tuple[jax.Array | Unknowns, jax.Array]:
        """A derivative without its part in the null space, and its ``nonaffine``.

        Under constraints, constrained coordinates are kept: only free motions and rattlers are left
        out.
        """
        positions = change.positions
        strain = change.strain
        null = self.lin.null
        if self.lin.constrained:
            kept = jnp.where(null.rattlers[:, None], 0.0, positions)
            motions: Any = null.motions
            kept = kept - jnp.tensordot(jnp.sum(motions * kept, axis=(1, 2)), motions, axes=1)
            return dataclasses.replace(change, positions=kept), kept
        if strain is None:
            rest = null.project(Unknowns(positions)).positions
            return rest, rest
        # A motion with the cell is no null motion, but the projection would take part of it away.
        with_cell = self.lin.equilibrium.positions @ from_mandel(strain).T
        rest = null.project(Unknowns(positions - with_cell)).positions
        return Unknowns(rest + with_cell, strain), rest

    def is_elsewhere(self, minimum: Equilibrium, t: float) -> bool:
        """Whether a minimum at params +- t dparams is farther away than the derivative predicts."""
        value = self.response.value
        rate = np.asarray(value.positions if isinstance(value, Unknowns) else value)
        counted = ~np.asarray(self.lin.network.loose)
        moved = np.asarray(minimum.positions - self.lin.equilibrium.positions)
        if not counted.any():  # a single rigid body, all of whose particles are loose: it may turn
            counted = ~counted
        length = float(natural_units(minimum.system)[0])
        farthest = AWAY * length + FASTER * t * np.abs(rate).max(initial=0.0)
        return bool(np.abs(moved[counted]).max(initial=0.0) > farthest)

    def minimize_at(self, side: float) -> tuple[Settled, Status, bool]:
        """Minimize at params + side dparams.

        Returns:
          the minimum; the status of the minimization; whether its contacts changed, or it is
          another minimum.
        """
        eq = self.lin.equilibrium
        params = {k: v + side * self.tangent[k] for k, v in eq.params.items() if k in self.tangent}
        pressure = None
        if eq.pressure is not None:
            pressure = float(eq.pressure) + side * float(self.tangent["pressure"])
        shape = eq.pressure is not None and len(eq.strains) > 1
        options: dict[str, Any] = {"tolerance": self.tolerance, "throw": False, "progress": False}
        if eq.order:
            minimum = find_saddle(eq.system, params, **options)
        else:
            minimum = minimize(eq.system, params, pressure=pressure, shape=shape, **options)
        same_order = minimum.order == eq.order
        status = Status(int(minimum.status)) if same_order else Status.NOT_A_SADDLE
        # The minimizer may stop above the smaller tolerance asked for here, but within that of the
        # minimum itself: Newton steps then do the rest. At a pressure max_force says nothing of the
        # cell's stress.
        reached = max(float(eq.tolerance), float(eq.force_floor))
        nearly = float(minimum.max_force) <= reached and pressure is None
        settled = self.settling(minimum)
        if status in (Status.MAX_STEPS_REACHED, Status.UNCONVERGED) and nearly:
            enough = settled.force <= self.tolerance
            status = Status.CONVERGED if enough else Status.ROUND_OFF_LIMITED
        minimum = settled.equilibrium
        changed = not np.array_equal(self.pairs, _interacting(minimum)) or not np.array_equal(
            self.active_set, _active_set(minimum)
        )
        return settled, status, changed or self.is_elsewhere(minimum, abs(side))

    def difference(self, t: float) -> _Difference:
        """(R(t) - R(-t)) / 2t, the null space projected out; at a pressure that of the cell too."""
        eq = self.lin.equilibrium
        ahead, status_ahead, changed_ahead = self.minimize_at(t)
        behind, status_behind, changed_behind = self.minimize_at(-t)
        up = ahead.equilibrium
        down = behind.equilibrium
        slope = jax.tree.map(lambda a, b: (a - b) / (2.0 * t), _unknowns_at(up), _unknowns_at(down))
        if eq.pressure is not None:
            apart = jnp.asarray(up.system.box) - jnp.asarray(down.system.box)
            strain = to_mandel(apart / (2.0 * t) @ inverse(jnp.asarray(eq.system.box)))
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
        """Error of a difference over t that round-off may make, relative to its ``value``.

        The error comes from rounding the parameters on both sides, from rounding the positions
        there, and from the Newton steps that remain at the two ends.
        """
        size, positions = (
            float(jnp.linalg.norm(x)) for x in (nonaffine, self.lin.system.positions)
        )
        rounding = ROUNDING * float(np.finfo(float).eps) / t
        error = rounding * np.hypot(self.unit, relative(positions / 2.0**0.5, size))
        for end in ends:
            rest, _ = self.without_null_part(jax.tree.map(lambda leaf: leaf / (2.0 * t), end.rest))
            error = np.hypot(error, gap(jax.tree.map(jnp.add, value, rest), value, nonaffine))
        return float(error) if np.isfinite(error) else np.inf

    def safe_step(self) -> float:
        """The default step: above round-off of this minimum, below the first contact change."""
        value, nonaffine = self.without_null_part(_as_unknowns(self.response.value))
        here = self.settling(self.lin.equilibrium)
        noise = self.noise(value, nonaffine, (here, here), 1.0)
        return min(noise / NOISE, LONGEST * self.unit, INSIDE * self.radius)


def _unknowns_at(eq: Equilibrium) -> Unknowns:
    """The quantities at a minimum that ``jvp`` differentiates."""
    names = lagrangian.relaxed(eq.system)
    return Unknowns(eq.positions, None, eq.multipliers, {k: eq.params[k] for k in names} or None)


def _as_unknowns(value: jax.Array | Unknowns) -> Unknowns:
    """A derivative as ``Unknowns``, also where it is of positions alone."""
    return value if isinstance(value, Unknowns) else Unknowns(value)


def _line(
    eq: Equilibrium,
    dparams: Params,
    tolerance: float | None,
    steps: ArrayLike | None,
    value: ArrayLike | Unknowns | None = None,
) -> _Line:
    """The line through a minimum along dparams; refuses arguments that are wrong.

    Args:
      tolerance: the largest force that the minimizations leave; None for the default.
      steps: a step or several, only checked here.
      value: the derivative to test, only checked here.
    """
    lin = sensitivity.linearize(eq, throw=False)
    if eq.positions.dtype != jnp.float64:
        raise PrecisionError(
            f"differences of minima in {eq.positions.dtype} are round-off: work in double precision"
            " (in Python, ms.enable_x64() before making the system)."
        )
    tangent = full_tangent(eq.system, dparams, lin.params)
    largest = max((float(jnp.max(jnp.abs(v))) for v in tangent.values() if v.size), default=0.0)
    if largest == 0.0:
        raise InputError("dparams is zero everywhere: give a direction.")
    if tolerance is not None:
        number = real_number("tolerance", tolerance, "give a positive number.")
        if not 0 < number < np.inf:
            raise InputError(f"tolerance is {short(tolerance)}: give a positive number.")
    _check_steps(steps)
    if value is not None:
        _checked_derivative(value, eq)
    # After the arguments: one that is wrong is reported before the minimum is.
    require_sound(lin, eq, throw=True)
    size = max(
        _parameter_size(lin, name) for name, v in tangent.items() if v.size and jnp.any(v != 0)
    )
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
        unit=size / largest if size > 0 else 1.0,
        radius=radius,
        pairs=_interacting(eq),
        tolerance=tolerance,
    )


def _first_contact_change(
    lin: Linearization, response: Displacement, tangent: dict[str, jax.Array]
) -> float:
    """Smallest |t| at which a contact or an active constraint changes along the response."""
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


@jax.jit
def _switch_times(lin: Linearization, rate: Unknowns, tangent: Params) -> jax.Array:
    """Times at which constraints become active or inactive along a response, to first order."""
    return lagrangian.switch_times(
        lin.system, (lin.unknowns, lin.params), (rate, dict(tangent)), lin.network.rattlers
    )


def _parameter_size(lin: Linearization, name: str) -> float:
    """The size of a parameter; of the pressure, which may be zero, what strains the cell by 1."""
    if name == "pressure" and lin.cell is not None:
        return float(jnp.max(jnp.abs(lin.cell.stiffness)) / lin.system.volume)
    return float(jnp.max(jnp.abs(lin.params[name])))


def finite_difference(
    eq: Equilibrium, dparams: Params, step: float | None = None, *, tolerance: float | None = None
) -> FiniteDifference:
    """Compute dR/dt at params + t dparams by central differences, (R(t) - R(-t)) / 2t.

    R(t) and R(-t) are minimized again from this minimum. A minimum at a pressure is minimized again
    at that pressure, or, where ``dparams`` has ``"pressure"``, at pressures a little to either
    side; its cell is differentiated with its positions. A saddle is located again by Newton steps.

    Args:
      eq: a minimum; not a batch.
      dparams: the direction, as in ``jvp``.
      step: the step t. None chooses the step at which round-off of the positions, which is measured
        at the minimum, is 3e-9 of the difference; but at most 0.3 of the distance to the first
        change of a contact, and at most 1e-4 of the norm of the parameters over that of the
        direction (for a pressure, the change that strains the cell by 1 stands for the norm).
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
    """
    line = _line(eq, dparams, tolerance, step)
    if step is None:
        step = line.safe_step()
        if step == 0.0:
            raise InputError(
                "a contact changes at this very minimum, so that its two sides have two derivatives"
                " and no step stays on one: move the parameters a little and minimize again, or"
                " give a step to see them mixed."
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


def _check_steps(steps: ArrayLike | None) -> None:
    """Refuse steps, or a single step, that are not positive numbers; None is for the default."""
    if steps is None:
        return
    array = np.asarray(real_array("steps", steps, "give positive numbers."), float)
    positive = np.isfinite(array).all() and (array > 0).all()
    if array.ndim > 1 or array.size == 0 or not positive:
        if array.ndim == 0:
            raise InputError(f"step is {short(steps)}: give a positive number.")
        raise InputError(f"steps are {short(steps)}: give positive numbers.")


def _checked_derivative(value: ArrayLike | Unknowns, eq: Equilibrium) -> Unknowns:
    """A derivative that a user gives: of the positions, and at a pressure of the cell."""
    if eq.system.constraints:
        if isinstance(value, Unknowns) and jax.tree.structure(value) == jax.tree.structure(
            _unknowns_at(eq)
        ):
            return value
        raise InputError(
            "value is no derivative under constraints: give Unknowns as ms.jvp does, multipliers"
            " included."
        )
    if isinstance(value, Unknowns):
        positions = value.positions
        strain = value.strain
    else:
        positions = value
        strain = None
    if eq.pressure is not None and strain is None:
        raise InputError(
            "value has no strain: at a pressure give Unknowns(positions, strain), as ms.jvp does."
        )
    n, d = eq.positions.shape
    positions = _checked_part("value", positions, eq, (n, d), "the derivative of the positions")
    if eq.pressure is None or strain is None:
        return Unknowns(positions)
    what = "that of the cell, a Mandel vector"
    return Unknowns(positions, _checked_part("value.strain", strain, eq, (d * (d + 1) // 2,), what))


def _checked_part(
    name: str, part: ArrayLike, eq: Equilibrium, shape: tuple[int, ...], what: str
) -> jax.Array:
    """A part of a derivative as an array; refuses another shape and what is not finite."""
    array = jnp.asarray(part, eq.positions.dtype)
    if array.shape != shape or not np.isfinite(np.asarray(array)).all():
        raise InputError(f"{name} has shape {array.shape}: give {what}, finite and {shape}.")
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
      dparams: the direction, as in ``jvp``.
      steps: the steps t, positive; None takes 22 steps from 1e-9 to 1e-2 of the norm of the
        parameters over that of the direction.
      value: the derivative to test, (n, d), however it was computed; at a pressure ``Unknowns``, as
        ``jvp`` gives them. None tests the derivative by ``jvp``. The part of the derivative in the
        null space (translations, rattlers, rotations of a free cluster) is left out, because
        differences have no such part.
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
