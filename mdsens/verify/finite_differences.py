"""The same derivatives by minimizing again: at one safe step, and over a range of steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
# What round-off of the minima may make of a difference, relative to it: the step is as long as that
# takes. Measured, on packings from a pressure of 0.1 down to 1e-4 and on a glass: truncation is
# about as small there.
NOISE = 3e-9
# of the parameters' size: where round-off asks for more, as of a response that is almost none
LONGEST = 1e-4
# of eps: the root mean square of what rounding to the nearest number does to one, of its size
ROUNDING = 0.2
WHOLE = (
    4.0 / 3.0
)  # of the difference from half the step: the error of the whole, which goes with its square
AWAY, FASTER = (
    1e-2,
    10.0,
)  # of the potential's length, and of t times the derivative: a minimum that is further is another
INSIDE = 0.3  # of the distance to the first contact change, at most
RANGE = (
    1e-9,
    1e-2,
)  # of the parameters' size: from where round-off rules to where contacts have changed
COUNT = 22  # three steps a decade


def _interacting(eq: Equilibrium) -> np.ndarray:
    """Which pairs touch, as rows of particle indices, padding and rattlers left out."""
    rows = []
    net = contacts.network(eq.system, eq.max_force, eq.contacts_needed)
    loose = np.asarray(net.rattlers)
    for term in pair_terms(eq.system):
        r = pair_distances(term, eq.system.positions, eq.system.box)
        points = np.asarray(term.lengths())
        inside = np.asarray(r)[None, :] < points
        kept = np.asarray(term.mask) & ~loose[np.asarray(term.i)] & ~loose[np.asarray(term.j)]
        i, j = np.asarray(term.i), np.asarray(term.j)
        low, high = np.minimum(i, j), np.maximum(i, j)
        for row in inside:
            rows.append(np.unique(np.stack([low, high], axis=1)[row & kept], axis=0))
    return np.concatenate(rows) if rows else np.zeros((0, 2), int)


def _active_set(eq: Equilibrium) -> np.ndarray:
    """Which coordinates constraints hold; empty without any."""
    return np.asarray(lagrangian.active_set(eq.system).positions if eq.system.constraints else [])


class _Difference(NamedTuple):
    """A central difference, the worst status of its two minimizations, and whether a contact
    changed within it, or one of the two ended in another minimum.

    ``nonaffine`` is the positions' part less a cell's motion at a pressure; in a given cell it is
    the ``value``. ``noise`` is what round-off of minima and parameters may make of it, relative as
    its error is.
    """

    value: Any
    nonaffine: jax.Array
    noise: float
    status: Status
    network_changed: bool


@dataclasses.dataclass(frozen=True)
class _Line:
    """A line params + t dparams through a minimum, on which to minimize again.

    Attributes:
      lin: the minimum.
      settling: what brings a minimum near it down to round-off.
      tangent: dparams, a full dict.
      response: the analytic derivative along it.
      unit: the parameters' size over the direction's.
      radius: the first change of a contact, to first order.
      pairs: which pairs touch at the minimum.
      tolerance: of the minimizations.
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
        """Which coordinates are pinned or at a bound at the minimum; empty without constraints."""
        return _active_set(self.lin.equilibrium)

    def off_null(self, found: Unknowns) -> tuple[Any, jax.Array]:
        """A derivative of positions, or of them and the cell, without its part in the null space;
        and ``nonaffine``.

        Under constraints what is held counts: it is the free motions and rattlers that are left
          out.
        """
        positions, strain, null = found.positions, found.strain, self.lin.null
        if self.lin.constraint_status is not None:
            kept = jnp.where(null.rattlers[:, None], 0.0, positions)
            motions: Any = null.motions
            kept = kept - jnp.tensordot(jnp.sum(motions * kept, axis=(1, 2)), motions, axes=1)
            return dataclasses.replace(found, positions=kept), kept
        cell_moves = (
            0.0 if strain is None else self.lin.equilibrium.positions @ from_mandel(strain).T
        )
        rest = self.lin.null.project(Unknowns(positions - cell_moves)).positions
        return (rest, rest) if strain is None else (Unknowns(rest + cell_moves, strain), rest)

    def left(self, there: Equilibrium, t: float) -> bool:
        """Whether a minimization ended further away than the derivative, or what may be found,
        leads: elsewhere.
        """
        value = self.response.value
        rate = np.asarray(value.positions if isinstance(value, Unknowns) else value)
        held = ~np.asarray(self.lin.network.loose)
        moved = np.asarray(there.positions - self.lin.equilibrium.positions)
        if not held.any():  # one rigid body alone, whose turns count
            held = ~held
        reach = AWAY * float(natural_units(there.system)[0]) + FASTER * t * np.abs(rate).max(
            initial=0.0
        )
        return bool(np.abs(moved[held]).max(initial=0.0) > reach)

    def end(self, side: float) -> tuple[Settled, Status, bool]:
        """The minimum at params + side dparams, the status of the way there, and whether it is
        another one.
        """
        eq = self.lin.equilibrium
        params = {k: v + side * self.tangent[k] for k, v in eq.params.items() if k in self.tangent}
        pressure = (
            None
            if eq.pressure is None
            else float(eq.pressure) + side * float(self.tangent["pressure"])
        )
        shape = eq.pressure is not None and len(eq.strains) > 1
        how: dict[str, Any] = {"tolerance": self.tolerance, "throw": False, "progress": False}
        if eq.order:
            there = find_saddle(eq.system, params, **how)
        else:
            there = minimize(eq.system, params, pressure=pressure, shape=shape, **how)
        status = Status(int(there.status)) if there.order == eq.order else Status.NOT_A_SADDLE
        reached = max(float(eq.tolerance), float(eq.force_floor))
        fell = (
            float(there.max_force) <= reached and pressure is None
        )  # no word of the cell's stress
        settled = self.settling(there)
        if status in (Status.MAX_STEPS_REACHED, Status.UNCONVERGED) and fell:
            status = (
                Status.CONVERGED if settled.force <= self.tolerance else Status.ROUND_OFF_LIMITED
            )
        there = settled.equilibrium
        changed = not np.array_equal(self.pairs, _interacting(there)) or not np.array_equal(
            self.active_set, _active_set(there)
        )
        return settled, status, changed or self.left(there, abs(side))

    def difference(self, t: float) -> _Difference:
        """(R(t) - R(-t)) / 2t, the null space projected out; at a pressure that of the cell too."""
        eq, (ahead, status, left), (behind, other, lost) = (
            self.lin.equilibrium,
            self.end(t),
            self.end(-t),
        )
        up, down = ahead.equilibrium, behind.equilibrium
        slope = jax.tree.map(lambda a, b: (a - b) / (2.0 * t), _reached(up), _reached(down))
        if eq.pressure is not None:
            apart = jnp.asarray(up.system.box) - jnp.asarray(down.system.box)
            strain = to_mandel(apart / (2.0 * t) @ inverse(eq.system.box))
            slope = dataclasses.replace(slope, strain=strain)
        value, nonaffine = self.off_null(slope)
        noise = self.noise(value, nonaffine, (ahead, behind), t)
        return _Difference(value, nonaffine, noise, Status.worst_of([status, other]), left or lost)

    def noise(self, value: Any, nonaffine: jax.Array, ends: Sequence[Settled], t: float) -> float:
        """What round-off may make of a difference over t, relative to its ``value``.

        Of the parameters on both sides, of the positions there, and by the Newton steps that are
        left at the ends.
        """
        size, positions = (
            float(jnp.linalg.norm(x)) for x in (nonaffine, self.lin.system.positions)
        )
        rounding = ROUNDING * float(np.finfo(float).eps) / t
        found = rounding * np.hypot(self.unit, relative(positions / 2.0**0.5, size))
        for end in ends:
            rest, _ = self.off_null(jax.tree.map(lambda leaf: leaf / (2.0 * t), end.rest))
            found = np.hypot(found, gap(jax.tree.map(jnp.add, value, rest), value, nonaffine))
        return float(found) if np.isfinite(found) else np.inf

    def safe_step(self) -> float:
        """As long as round-off of this minimum asks for, and inside the first change of a contact."""
        value, nonaffine = self.off_null(_unknowns(self.response.value))
        here = self.settling(self.lin.equilibrium)
        noise = self.noise(value, nonaffine, (here, here), 1.0)
        return min(noise / NOISE, LONGEST * self.unit, INSIDE * self.radius)


def _reached(eq: Equilibrium) -> Unknowns:
    """What the doors differentiate, at a minimum."""
    names = lagrangian.relaxed(eq.system)
    return Unknowns(eq.positions, None, eq.multipliers, {k: eq.params[k] for k in names} or None)


def _unknowns(value: Any) -> Unknowns:
    return value if isinstance(value, Unknowns) else Unknowns(value)


def _line(
    eq: Equilibrium, dparams: Params, tolerance: float | None, steps: Any, value: Any = None
) -> _Line:
    """The line through a minimum; ``steps`` and a ``value`` that is to be tested are looked at,
    too.
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
    if (
        tolerance is not None
        and not 0 < real_number("tolerance", tolerance, "give a positive number.") < np.inf
    ):
        raise InputError(f"tolerance is {short(tolerance)}: give a positive number.")
    _check_steps(steps)
    if value is not None:
        _checked(value, eq)
    require_sound(lin, eq, throw=True)
    size = max(_size(lin, k) for k, v in tangent.items() if v.size and jnp.any(v != 0))
    response = sensitivity.jvp(lin, dparams, throw=False)
    velocity, strain = response.value, None
    own, reach = dict(tangent), np.inf
    if isinstance(velocity, Unknowns) and velocity.strain is not None:
        velocity, strain = response.nonaffine, from_mandel(velocity.strain)
    elif isinstance(velocity, Unknowns):
        own |= velocity.params or {}
        equations = {k: (velocity.multipliers or {})[k] for k in lin.multipliers or {}} or None
        rate = dataclasses.replace(velocity, multipliers=equations)
        times = np.abs(np.asarray(_switches(lin, rate, tangent)))
        velocity, reach = velocity.positions, float(np.min(times, initial=np.inf))
    own = {name: own[name] for name in eq.params}
    crossing = contact_changes.crossings(eq.system, velocity, own, lin.network.rattlers, strain)
    if tolerance is None:
        tolerance = max(
            0.01 * float(eq.tolerance), float(eq.force_floor), 0.1 * float(round_off(eq.system))
        )
    return _Line(
        lin,
        Settling(lin),
        tangent,
        response,
        size / largest if size > 0 else 1.0,
        min(crossing.radius, reach),
        _interacting(eq),
        tolerance,
    )


@jax.jit
def _switches(lin: Linearization, rate: Unknowns, tangent: Params) -> jax.Array:
    return lagrangian.switch_times(
        lin.system, (lin.unknowns, lin.params), (rate, dict(tangent)), lin.network.rattlers
    )


def _size(lin: Linearization, name: str) -> float:
    """How large a parameter is; of the pressure what strains the cell by 1, for it may be zero."""
    if name == "pressure" and lin.cell is not None:
        return float(jnp.max(jnp.abs(lin.cell.stiffness)) / lin.system.volume)
    return float(jnp.max(jnp.abs(lin.params[name])))


def finite_difference(
    eq: Equilibrium, dparams: Params, step: float | None = None, *, tolerance: float | None = None
) -> FiniteDifference:
    """dR/dt at params + t dparams by central differences, (R(t) - R(-t)) / 2t, minimizing again
    from this minimum.

    A minimum at a pressure is minimized again at that pressure, or, where ``dparams`` has
    ``"pressure"``, at those a little to either side; its cell is differentiated with its positions.
    A saddle is found again by Newton steps.

    Args:
      eq: a minimum; not a batch.
      dparams: the direction, as in ``jvp``.
      step: t; where None, as long as it takes for round-off of the positions, which is measured at
        the minimum, to be 3e-9 of the difference, but inside 0.3 of the distance to the first
        change of a contact, and not above 1e-4 of the parameters' size a size of the direction (of
        a pressure's, what strains the cell by 1).
      tolerance: of the minimizations; where None, 0.01 of the minimum's own, but not below
        round-off. What force they leave is taken away by Newton steps, see
        :mod:`mdsens.verify._settling`; where some stays above it, yet within the minimum's own
        tolerance, it is taken as it is, and ``status`` says so.

    Returns:
      a :class:`FiniteDifference`. Compare with ``v.disagreement(r.value)``.
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
    whole, half = line.difference(step), line.difference(0.5 * step)
    spread = gap(half.value, whole.value, whole.nonaffine)
    noise = np.hypot(whole.noise, 0.5 * half.noise) / 2.0**0.5
    return FiniteDifference(
        whole.value,
        whole.nonaffine,
        float(np.hypot(WHOLE * spread, noise)),
        float(step),
        line.radius,
        whole.network_changed or half.network_changed,
        Status.worst_of([whole.status, half.status]),
    )


def _check_steps(steps: Any) -> None:
    """Refuse steps, or a step, that are no positive numbers; None is for the default ones."""
    if steps is None:
        return
    given = np.asarray(real_array("steps", steps, "give positive numbers."), float)
    if given.ndim > 1 or given.size == 0 or not (np.isfinite(given).all() and (given > 0).all()):
        what = f"step is {short(steps)}: give a positive number." if given.ndim == 0 else ""
        raise InputError(what or f"steps are {short(steps)}: give positive numbers.")


def _checked(value: Any, eq: Equilibrium) -> Unknowns:
    """A derivative that a user gives: of the positions, and at a pressure of the cell."""
    if eq.system.constraints:
        if isinstance(value, Unknowns) and jax.tree.structure(value) == jax.tree.structure(
            _reached(eq)
        ):
            return value
        raise InputError(
            "value is no derivative under constraints: give Unknowns as ms.jvp does, multipliers"
            " included."
        )
    given, dtype = value if isinstance(value, Unknowns) else Unknowns(value), eq.positions.dtype
    d = eq.positions.shape[1]
    wanted = [("value", given.positions, eq.positions.shape, "the derivative of the positions")]
    if eq.pressure is not None:
        if given.strain is None:
            raise InputError(
                "value has no strain: at a pressure give Unknowns(positions, strain), as ms.jvp"
                " does."
            )
        wanted.append(
            ("value.strain", given.strain, (d * (d + 1) // 2,), "that of the cell, a Mandel vector")
        )
    found = []
    for name, part, shape, what in wanted:
        array = jnp.asarray(part, dtype)
        if array.shape != shape or not np.isfinite(np.asarray(array)).all():
            raise InputError(f"{name} has shape {array.shape}: give {what}, finite and {shape}.")
        found.append(array)
    return Unknowns(found[0], found[1] if len(found) > 1 else None)


def derivative_test(
    eq: Equilibrium,
    dparams: Params,
    steps: Sequence[float] | np.ndarray | None = None,
    *,
    value: Any = None,
    tolerance: float | None = None,
) -> DerivativeTest:
    """The error of central differences against the derivative, over steps: |(R(t) - R(-t)) / 2t -
    dR/dt| / |dR/dt|.

    Each step minimizes twice again from this minimum, at params + t dparams and params - t dparams.

    Args:
      eq: a minimum; not a batch.
      dparams: the direction, as in ``jvp``.
      steps: t, positive; where None, 22 from 1e-9 to 1e-2 of the parameters' size over the
        direction's.
      value: the derivative to test, (n, d), at a pressure ``Unknowns`` as ``jvp`` gives them, from
        anywhere; where None, that of ``jvp``. Its part in the null space (translations, rattlers,
        rotations of a free cluster) is left out, as differences have none.
      tolerance: of the minimizations, as in ``finite_difference``.

    Returns:
      a :class:`DerivativeTest`; :func:`mdsens.plots.derivative_test` draws it.

    Raises:
      InputError: bad names, shapes or steps. PrecisionError: single precision. ConvergenceError: no
      minimum, or no derivative by ``jvp`` to test.
    """
    line = _line(eq, dparams, tolerance, steps, value)
    if value is None:
        raise_for_status(
            line.response.status,
            "jvp gives no derivative to test: give one as value",
            line.response,
        )
        value = line.response.value
    exact, nonaffine = line.off_null(_checked(value, eq))
    if steps is None:
        chosen = line.unit * np.geomspace(*RANGE, COUNT)
    else:
        chosen = np.sort(np.atleast_1d(np.asarray(steps, float)))
    found = [line.difference(float(t)) for t in chosen]
    return DerivativeTest(
        chosen,
        np.array([gap(d.value, exact, nonaffine) for d in found]),
        np.array([d.network_changed for d in found]),
        line.radius,
        tuple(d.status for d in found),
    )
