"""Is the minimum one, or the saddle, is it stable, and what is in doubt: the examination behind a
certificate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.errors import ConvergenceError, InputError
from mdsens._util.validation import short
from mdsens.implicit.linear.eigen import Spectrum
from mdsens.mechanics import lagrangian
from mdsens.mechanics.hessian import Unknowns
from mdsens.mechanics.hessian_factor import HessianFactor, participation
from mdsens.mechanics.kkt_factor import KKT
from mdsens.mechanics.kkt_operator import about_to_switch
from mdsens.mechanics.rigidity import analyze_rigidity
from mdsens.mechanics.stability import birch, cleared, isotropic_part, softest_strain, solid
from mdsens.mechanics.status import Status
from mdsens.mechanics.strain import basis
from mdsens.mechanics.units import doubtful_stiffness, natural_units, round_off
from mdsens.model.system import System
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity._derivative_solve import STRAIN, solve_derivative
from mdsens.sensitivity.certificate.derivative_error import ESTIMATE, derivative
from mdsens.sensitivity.certificate.parts import CellState, ConstraintState, StrainState
from mdsens.sensitivity.certificate.record import Certificate, count
from mdsens.sensitivity.certificate.solution_space import Space
from mdsens.sensitivity.derivatives import observed
from mdsens.sensitivity.linearization import Linearization, full_tangent, linearize

__all__ = ["certify"]

Params = Mapping[str, Any]
RESOLVED = 10.0  # of round-off: motion below it is not resolved
INACCURATE = 0.1  # of the derivative: where its error is larger, no digit is known


def _in_doubt(space: Space, step: Unknowns) -> tuple[int, float]:
    """How many pairs cross a breakpoint along the Newton step, or hold a particle that counts as a
    rattler; and how many such steps it takes until the first one crosses.
    """
    eq, net = space.lin.equilibrium, space.lin.network
    none = {name: jnp.zeros_like(value) for name, value in space.lin.params.items()}
    times = np.asarray(space.crossings(step, none).times)
    ahead = times[times >= 0]
    crossed = int(np.sum(ahead <= 1.0))
    if eq.system.potential.repulsive:
        _, finest, _ = analyze_rigidity(
            eq.system, jnp.minimum(eq.max_force, round_off(eq.system)), eq.contacts_needed
        )
        crossed += int(np.sum(np.asarray(finest.rattlers) != np.asarray(net.rattlers)))
    return crossed, float(np.min(ahead, initial=np.inf))


def _touched(
    observable: Callable[[System], Any], lin: Linearization, project: Any
) -> dict[str, float]:
    """Shares of the observable's gradient by positions on rattlers and on rigid motions."""
    system, of_system = lin.equilibrium.system, observed(observable)

    def observe(R: jax.Array) -> jax.Array:
        return of_system(system.replace(positions=R))

    value, pull = jax.vjp(observe, system.positions)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise InputError(f"the observable returns {value.dtype}: return floating-point numbers.")
    # of an array the sum of its components would let them cancel
    weights = jnp.cos(jnp.arange(value.size, dtype=value.dtype) ** 2).reshape(value.shape)
    slope = np.asarray(pull(weights)[0])
    loose = np.asarray(lin.network.rattlers)
    # at a minimum the energy's is round-off of what it is a little beside
    aside = (
        1e-3
        * natural_units(system)[0]
        * jnp.cos(jnp.arange(slope.size, dtype=slope.dtype) ** 2).reshape(slope.shape)
    )
    _, pull = jax.vjp(observe, system.positions + aside)
    whole = (
        max(float(np.linalg.norm(slope)), float(np.linalg.norm(np.asarray(pull(weights)[0]))))
        or 1.0
    )
    held = np.where(loose[:, None], 0.0, slope)
    rigid = float(np.linalg.norm(held.ravel() - project(held.ravel()))) / whole
    return {"rattlers": float(np.linalg.norm(slope[loose])) / whole, "rigid motions": rigid}


def _cell(lin: Linearization, step: Unknowns) -> CellState:
    """What is known of the cell of a minimum at a pressure."""
    cell, volume, d = lin.cell, float(lin.system.volume), lin.system.dimension
    assert cell is not None and step.strain is not None
    along = np.asarray(cell.along, float)
    left = np.tensordot(
        np.asarray(cell.slope, float) / volume, along, axes=1
    )  # stress + P, as far as the cell is free
    shear = left - np.trace(left) / d * np.eye(d)
    matrix = np.asarray(cell.stiffness, float) / volume
    finite = bool(np.isfinite(matrix).all())
    return CellState(
        float(cell.pressure),
        len(along) > 1,
        -float(np.trace(left)) / d,
        float(np.linalg.norm(shear, 2)) if len(along) > 1 and finite else np.nan,
        np.linalg.eigvalsh(matrix) if finite else np.full(len(along), np.nan),
        Status(int(cell.status)).good,
        float(np.linalg.norm(np.asarray(step.strain))),
    )


def _strain(lin: Linearization) -> StrainState:
    """How stiff a stable minimum is against strains, d (d + 1) / 2 solves, and what that makes of
    it.
    """
    system = lin.system
    strained = solve_derivative(
        STRAIN, lin, jnp.asarray(basis(system.dimension), system.positions.dtype), many=True
    )
    worst = Status.worst_of(strained.stats.status)
    if not worst.good:
        return StrainState(np.nan, np.nan, np.nan, worst)
    found = solid(
        system, strained.value, lin.equilibrium.max_force, jnp.max(strained.stats.residual)
    )
    seen = cleared(birch(found.tensor, found.stress), found.round_off)
    bulk, shear, *_ = (float(x) for x in isotropic_part(seen, found.round_off))
    return StrainState(bulk, shear, float(softest_strain(seen)), Status(int(found.status)))


def _off_motions(lin: Linearization, stiffness: Any) -> Callable[[np.ndarray], np.ndarray]:
    """The projection off rigid motions; what constraints hold is no motion."""
    if not lin.constrained:
        return stiffness.project
    rows = np.asarray(lin.null.motions)
    rows = rows.reshape(len(rows), lin.system.positions.size)
    return lambda v: v - rows.T @ (rows @ v)


def _constraints(lin: Linearization, stiffness: KKT) -> ConstraintState:
    """What is known of the constraints of a minimum."""
    eq, mask = lin.equilibrium, lin.null.active_set
    assert mask is not None
    stuck = np.asarray(lagrangian.pinned(eq.system))
    held = int(np.sum(np.asarray(mask.positions))) + sum(
        int(np.sum(v)) for v in jax.tree.leaves(mask.params)
    )
    g = jax.tree.leaves(_violations(eq.system))
    largest = {
        name: float(np.max(np.abs(np.asarray(v)), initial=0.0))
        for name, v in eq.multipliers.items()
    }
    return ConstraintState(
        int(stuck.sum()),
        held - int(stuck.sum()),
        sum(int(np.size(v)) for v in g),
        stiffness.redundant,
        about_to_switch(eq.system, eq.multipliers, lin.null, float(eq.max_force)),
        max((float(np.max(np.abs(np.asarray(v)), initial=0.0)) for v in g), default=0.0),
        largest,
    )


@jax.jit
def _violations(system: System) -> dict[str, jax.Array]:
    return lagrangian.equations(system, system.positions, system.params)


def certify(
    eq: Equilibrium | Linearization,
    dparams: Params | None = None,
    *,
    modes: int = 1,
    observable: Callable[[System], Any] | None = None,
    throw: bool = False,
) -> Certificate:
    """Examine a minimum, and along ``dparams`` the derivative that ``jvp`` gives there.

    At a pressure the unknowns are positions and cell: the minimum is one of the enthalpy, the step
    to it and the response move the cell too, and the ``cell`` of the certificate tells its stress
    and its stiffness.

    At a saddle of order k exactly k modes of negative stiffness are right, and the smallest
    stiffness that stands in the estimates is the smallest in size.

    A minimum in a cell is held by it against every strain that it is not free to take. Where the
    configuration would not keep its shape, or its size, without that, the certificate says so by
    its stiffness against strain (:func:`mdsens.mechanics.stability.verdict`): UNSTABLE where a
    modulus is negative; SHAPE_HELD, a warning, where only some strain lowers the enthalpy.
    Derivatives in the cell hold either way.

    It costs an eigenvalue and a few linear solves on one factor of the Hessian, d (d + 1) / 2 of
    them for the strains: about a tenth of the relaxation.

    Args:
      eq: from ``minimize`` or ``linearize``; not a batch. An unconverged minimum is examined too.
      dparams: the direction, as in ``jvp``, at a pressure also of the ``"pressure"``; without it
        there is nothing about a derivative.
      modes: how many of the lowest modes to find.
      observable: a function of a System, as in ``gradient``: the parts of it that have no
        derivative are reported.
      throw: raise :class:`ConvergenceError` where the status is not good; the certificate is its
        ``result``.

    Returns:
      a :class:`Certificate`.

    Raises:
      InputError: bad names or shapes.
    """
    if isinstance(eq, Equilibrium) and eq.system.batch is not None:
        raise InputError(
            f"certify takes one minimum and got a batch of {eq.system.batch}: give a member,"
            " ms.unstack(eq)[0]."
        )
    if not isinstance(modes, int) or isinstance(modes, bool) or modes < 1:
        raise InputError(f"modes is {short(modes)}: give a whole number from 1.")
    lin = eq if isinstance(eq, Linearization) else linearize(eq, throw=False)
    minimum, net, null = lin.equilibrium, lin.network, lin.null
    system = minimum.system
    loose = np.asarray(net.rattlers)
    stiffness: Any = (
        HessianFactor(lin.system, null, minimum.order) if lin.factor is None else lin.factor
    )
    finite = bool(np.isfinite(np.asarray(system.positions)).all())
    free, translations, rotations = null.dimensions(system.dimension) if finite else (0, 0, 0)
    if finite and not loose.all():
        spectrum = stiffness.lowest(
            max(modes, minimum.order + 1),
            doubtful_stiffness(minimum.max_force, natural_units(system)[0]),
        )
    else:
        nothing = np.zeros(0), np.zeros((system.positions.size, 0)), np.zeros(0)
        spectrum = Spectrum(*nothing, 0.0, 0, 0, 0, 0.0, True, "none")
    lowest = float(spectrum.values[0]) if spectrum.values.size else np.nan
    space = Space(lin, stiffness)
    forces = space.forces()
    total, soft = space.strength(forces), 0.0
    if spectrum.values.size and spectrum.settled and spectrum.negative == minimum.order:
        soft = space.least(float(np.abs(spectrum.values).min()))
    step, along, doubt = space.still, None, (0, np.inf)
    if spectrum.values.size:
        step, _, _ = space.solve(forces, ESTIMATE)
    if finite:
        doubt = _in_doubt(space, step)
    if dparams is not None:
        full_tangent(system, dparams, lin.params)
        if spectrum.values.size:
            along = derivative(space, dparams, step, soft)
    mean, largest = float(net.mean_force), float(minimum.max_force)
    made = Certificate(
        Status.CONVERGED,
        (),
        largest,
        largest / mean if mean > 0 and system.potential.repulsive else np.nan,
        mean,
        total / soft if soft > 0 else np.inf,
        space.size(step) if spectrum.values.size else np.nan,
        lowest,
        spectrum.largest,
        spectrum,
        participation(spectrum.vectors[: system.positions.size], system.dimension),
        spectrum.negative,
        spectrum.zero,
        spectrum.hidden,
        free + translations + rotations + spectrum.zero,
        translations,
        rotations,
        loose,
        *doubt,
        along,
        None if observable is None else _touched(observable, lin, _off_motions(lin, stiffness)),
        str(system.positions.dtype),
        None if lin.cell is None else _cell(lin, step),
        minimum.order,
        None if not lin.constrained else _constraints(lin, stiffness),
        _strain(lin) if _strainable(lin, spectrum) else None,
    )
    findings = _findings(made, lin)
    status = findings[0][0] if findings else Status.CONVERGED
    certificate = dataclasses.replace(made, status=status, findings=tuple(findings))
    if throw and not status.good:
        raise ConvergenceError(f"certify: {findings[0][1]}.", status, certificate)
    return certificate


def _strainable(lin: Linearization, spectrum: Spectrum) -> bool:
    """Whether it is a stable minimum in a cell that takes some strain, which S does not tell of
    already.
    """
    eq, most = lin.equilibrium, len(basis(lin.system.dimension))
    taken = (
        not lin.constrained
        and eq.system.box is not None
        and (lin.cell is None or len(lin.cell.along) < most)
    )
    rigid = spectrum.values.size and spectrum.settled and not (spectrum.negative or eq.order)
    return bool(taken and rigid and Status(int(eq.status)).good and not bool(lin.network.unjammed))


def _findings(c: Certificate, lin: Linearization) -> list[tuple[Status, str]]:
    """Everything that is not as it should be, gravest first, with its figures."""
    found: list[tuple[Status, str]] = []

    def add(status: Status, figures: str = "") -> None:
        found.append((status, f"{status.sentence}{f' ({figures})' if figures else ''}"))

    system, d = lin.equilibrium.system, c.derivative
    before = Status(int(lin.equilibrium.status))
    if not before.good:
        add(before, f"max_force {c.max_force:.1e}")
    if bool(lin.network.unjammed) and not c.crossed_to_minimum:
        every = f"{c.rattlers.size} of {c.rattlers.size} particles are held by nothing"
        add(Status.UNJAMMED, every if np.all(c.rattlers) else "no rigid body is held by another")
    if not np.isfinite(c.spectrum.values).all():
        add(Status.NOT_FINITE, "the Hessian")
    elif bool(lin.network.touching):
        add(
            Status.CONTACTS_UNSETTLED,
            "some particles touch without a force: no stiffness is known to be of one sign",
        )
    elif c.negative_modes != c.order:
        add(
            Status.NOT_A_SADDLE if c.order else Status.INDEFINITE,
            f"{count(c.negative_modes, 'mode')} of negative stiffness, the lowest"
            f" {c.stiffness_min:.3g}",
        )
    constraints = c.constraints
    if constraints is not None and constraints.redundant:
        add(
            Status.REDUNDANT_CONSTRAINTS,
            f"{constraints.redundant} of {count(constraints.equations, 'equation')}",
        )
    if constraints is not None and constraints.switching:
        add(Status.DEGENERATE_CONSTRAINT, count(constraints.switching, "coordinate"))
    floppy = lin.cell is not None and int(lin.cell.status) == Status.FLOPPY
    if c.cell is not None and not c.cell.stable and (floppy or not c.cell.stiffness_min > 0):
        code = Status.FLOPPY if floppy else Status.INDEFINITE
        add(code, f"of the cell at this pressure, whose stiffness is {c.cell.stiffness_min:.3g}")
    if c.floppy_modes:
        add(Status.FLOPPY, count(c.floppy_modes, "floppy mode"))
    if c.unsettled_modes:
        add(
            Status.STIFFNESS_UNSETTLED,
            f"{count(c.unsettled_modes, 'mode')} below {c.spectrum.floor:.0e}, max_force"
            f" {c.max_force:.1e}",
        )
    if c.crossed_to_minimum and before.good and not lin.network.touching:
        add(
            Status.CONTACTS_UNSETTLED,
            f"{count(c.crossed_to_minimum, 'pair')} in doubt, max_force {c.max_force:.1e}",
        )
    s = c.strain
    if s is not None and s.status is Status.UNSTABLE:
        add(
            s.status,
            f"bulk modulus {s.bulk:.3g}, shear modulus {s.shear:.3g} in Birch's convention",
        )
    if d is not None and not d.status.good:
        add(d.status, f"residual {d.residual:.1e}")
    if d is not None and not d.vanishes and c.estimates_hold and not d.error <= INACCURATE:
        add(Status.INACCURATE, f"{d.error:.1e} of it")
    eps = float(np.finfo(system.positions.dtype).eps)
    if d is not None and not d.vanishes:
        resolution = eps * float(np.abs(np.asarray(system.positions)).max())
        if (
            np.isfinite(d.radius)
            and d.radius * float(np.abs(d.positions).max()) < RESOLVED * resolution
        ):
            add(Status.RADIUS_BELOW_ROUND_OFF, f"radius {d.radius:.1e}")
    if eps > 1e-10:
        softest = abs(c.stiffness_min) if c.order else c.stiffness_min
        left = eps * c.stiffness_max / softest if softest > 0 else np.inf
        add(Status.SINGLE_PRECISION, f"{left:.0e} here")
    if c.observable is not None and not np.isfinite(list(c.observable.values())).all():
        add(Status.NOT_FINITE, "the observable's gradient")
    parts = (
        []
        if c.observable is None
        else [f"{v:.1e} of it on {k}" for k, v in c.observable.items() if v > eps**0.5]
    )
    if parts:
        add(Status.NULL_COMPONENT_DROPPED, f"the observable's gradient: {', '.join(parts)}")
    if d is not None and d.on_rattlers > 0:
        add(Status.NULL_COMPONENT_DROPPED, f"{d.on_rattlers:.1e} of the direction is on rattlers")
    if s is not None and s.status is Status.SHAPE_HELD:
        add(s.status, f"the smallest eigenvalue of Birch's tensor is {s.smallest:.3g}")
    return found
