"""The examination of a configuration: whether it is a minimum or saddle, and what is in doubt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.compilation import compiled
from mdsens._util.errors import ConvergenceError, InputError
from mdsens._util.probe import chirp
from mdsens._util.validation import is_integer, short
from mdsens.implicit.linear.eigen import Spectrum
from mdsens.mechanics import lagrangian
from mdsens.mechanics.hessian_factor import HessianFactor, participation
from mdsens.mechanics.kkt_factor import KKT
from mdsens.mechanics.kkt_operator import about_to_switch
from mdsens.mechanics.load import PressureLoad
from mdsens.mechanics.rigidity import analyze_rigidity
from mdsens.mechanics.stability import Solid, birch, cleared, isotropic_part, softest_strain, solid
from mdsens.mechanics.status import Status
from mdsens.mechanics.strain import basis
from mdsens.mechanics.units import doubtful_stiffness, natural_units, round_off
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.system import System
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity.certificate.derivative_error import ESTIMATE, derivative
from mdsens.sensitivity.certificate.findings import list_findings
from mdsens.sensitivity.certificate.parts import (
    CellState,
    ConstraintState,
    StrainState,
)
from mdsens.sensitivity.certificate.record import Certificate
from mdsens.sensitivity.certificate.solution_space import Space
from mdsens.sensitivity.derivative_solve import (
    ASIDE,
    STRAIN,
    solve_derivative,
)
from mdsens.sensitivity.derivatives import observed
from mdsens.sensitivity.linearization import Linearization, full_tangent, linearize

__all__ = ["certify"]

Params = Mapping[str, Any]
# Residual of the modes in units of the lowest stiffness, where the Hessian is not factorized. The
# error of the lowest stiffness is the square of it over the relative distance to the next one.
ACCURACY = 1e-3


def _contacts_in_doubt(space: Space, step: Unknowns) -> tuple[int, float]:
    """Count the contacts that may change on the way from the configuration to the minimum.

    A pair is in doubt where it crosses a breakpoint along the Newton step to the minimum. A
    breakpoint is a distance at which a derivative of the potential jumps or diverges, such as the
    contact distance. For a potential that only repels, contacts that are too weak compared with the
    force left on the particles are not counted as contacts. A particle that is a rattler only for
    this reason adds one to the number of pairs in doubt.

    Args:
      space: norms and linear solves at the configuration.
      step: the Newton step.

    Returns:
      the number of pairs in doubt, and the number of Newton steps after which the first pair
      crosses a breakpoint (infinite if none does). No pair is in doubt where positions are NaN.
    """
    if not _has_finite_positions(space.lin):
        return 0, np.inf
    eq = space.lin.equilibrium
    net = space.lin.network
    no_change = jax.tree.map(np.zeros_like, space.lin.params)
    times = np.asarray(space.crossings(step, no_change).times)
    ahead = times[times >= 0]
    crossed = int(np.sum(ahead <= 1.0))
    if eq.system.potential.repulsive:
        # At the force left, weak contacts may not count, so that a particle appears as a rattler.
        # The network at the round-off of the forces shows whether it is one.
        _, finest, _ = analyze_rigidity(
            eq.system, min(float(eq.max_force), round_off(eq.system)), eq.contacts_needed
        )
        crossed += int(np.sum(np.asarray(finest.rattlers) != np.asarray(net.rattlers)))
    return crossed, float(np.min(ahead, initial=np.inf))


def _parts_without_derivative(
    observable: Callable[[System], Any],
    lin: Linearization,
    project: Callable[[np.ndarray], np.ndarray],
) -> dict[str, float]:
    """Compute which shares of an observable's gradient lie on rattlers and on rigid motions.

    The gradient is by the positions, and each share is the norm of a part of it over the norm of
    the whole, at the minimum or, if that is larger, slightly beside it. These parts have no
    derivative by the parameters, since the motion of rattlers, and rigid motions such as
    translations, are not determined by the parameters.

    Args:
      observable: function of a System.
      lin: the linearization of the minimum.
      project: function that removes rigid motions from a vector of all coordinates.
    """
    system = lin.equilibrium.system
    of_system = observed(observable)

    def observe(R: jax.Array) -> jax.Array:
        return of_system(system.replace(positions=R))

    value, pull = jax.vjp(observe, system.positions)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise InputError(f"the observable returns {value.dtype}: return floating-point numbers.")
    # Of an array, the derivative of a weighted sum: in the plain sum components could cancel.
    weights = chirp(value.shape, value.dtype)
    slope = np.asarray(pull(weights)[0])
    rattlers = np.asarray(lin.network.rattlers)
    # The gradient of the energy is round-off at a minimum. So shares are relative to the gradient
    # a little beside the minimum where that is larger.
    displacement = ASIDE * natural_units(system)[0] * chirp(slope.shape, slope.dtype)
    _, pull = jax.vjp(observe, system.positions + displacement)
    norm_here = float(np.linalg.norm(slope))
    norm_beside = float(np.linalg.norm(np.asarray(pull(weights)[0])))
    scale = max(norm_here, norm_beside) or 1.0
    on_backbone = np.where(rattlers[:, None], 0.0, slope).ravel()
    rigid = float(np.linalg.norm(on_backbone - project(on_backbone))) / scale
    return {"rattlers": float(np.linalg.norm(slope[rattlers])) / scale, "rigid motions": rigid}


def _examine_cell(lin: Linearization, step: Unknowns) -> CellState | None:
    """Compute the stress left in a relaxed cell, and the cell's stiffness.

    The result is None where the cell is fixed.

    Args:
      lin: the linearization of the minimum.
      step: the Newton step of positions and cell to the exact minimum.
    """
    cell = lin.cell
    if cell is None:
        return None
    volume = float(lin.system.periodic_volume)
    d = lin.system.dimension
    assert step.strain is not None
    along = np.asarray(cell.along, float)
    # stress - target, in the space of the strains that the cell can take
    stress_left = np.tensordot(np.asarray(cell.slope, float) / volume, along, axes=1)
    shear_left = stress_left - np.trace(stress_left) / d * np.eye(d)
    stiffness = np.asarray(cell.stiffness, float) / volume
    finite = bool(np.isfinite(stiffness).all())
    # one strain of several axes stretches all of them equally
    shape_is_free = len(along) > 1 or not np.allclose(along[0], along[0, 0, 0] * np.eye(d))
    axes_stretch = np.any(np.diagonal(along, axis1=1, axis2=2) != 0, axis=0)
    target = np.asarray(cell.load.target(d), float)
    return CellState(
        # + 0.0, lest a pressure of zero be shown as -0
        pressure=-float(np.trace(target)) / d + 0.0,
        shape=shape_is_free,
        # stress is positive in tension, pressure in compression
        pressure_left=-float(np.trace(stress_left)) / d,
        shear_left=float(np.linalg.norm(shear_left, 2)) if shape_is_free and finite else np.nan,
        stiffness=_eigenvalues(stiffness) if finite else np.full(len(along), np.nan),
        stable=Status(int(cell.status)).good,
        strain=float(np.linalg.norm(np.asarray(step.strain))),
        hydrostatic=isinstance(cell.load, PressureLoad) and bool(axes_stretch.all()),
        load=cell.load.goal_in_words(),
        target=target,
        stress_left=stress_left,
    )


def _eigenvalues(matrix: np.ndarray) -> np.ndarray:
    """Compute the eigenvalues of the symmetric part of a matrix, in ascending order."""
    return np.linalg.eigvalsh(0.5 * (matrix + matrix.T))


def _examine_strain(lin: Linearization, spectrum: Spectrum) -> StrainState | None:
    """Compute the stiffness of a stable minimum against strain, by d (d + 1) / 2 linear solves.

    The result is None where the certificate is not to contain this stiffness.

    Args:
      lin: the linearization of the minimum.
      spectrum: the lowest modes of the Hessian.
    """
    if not _is_strain_examined(lin, spectrum):
        return None
    system = lin.system
    strains = jnp.asarray(basis(system.dimension), system.positions.dtype)
    strained = solve_derivative(STRAIN, lin, strains, many=True)
    worst = Status.worst_of(strained.stats.status)
    if not worst.good:
        return StrainState(bulk=np.nan, shear=np.nan, smallest=np.nan, status=worst)
    residuals = strained.stats.residual
    stiffness = solid(system, strained.value, lin.equilibrium.max_force, residuals)
    bulk, shear, smallest = (float(x) for x in _moduli_of_strain(stiffness))
    return StrainState(
        bulk=bulk, shear=shear, smallest=smallest, status=Status(int(stiffness.status))
    )


@compiled
def _moduli_of_strain(stiffness: Solid) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute bulk modulus, shear modulus and least stiffness to strain, from Birch's tensor."""
    birch_tensor = cleared(birch(stiffness.tensor, stiffness.stress), stiffness.round_off)
    bulk, shear, *_ = isotropic_part(birch_tensor, stiffness.round_off)
    return bulk, shear, softest_strain(birch_tensor)


def _is_strain_examined(lin: Linearization, spectrum: Spectrum) -> bool:
    """Return whether the certificate is to contain the stiffness against strain.

    It contains this stiffness for a stable minimum in a cell that prevents some strain. Where the
    cell is free to take all strains, the stiffness of the cell already contains the answer.

    Args:
      lin: the linearization of the minimum.
      spectrum: the lowest modes of the Hessian.
    """
    eq = lin.equilibrium
    all_strains = len(basis(lin.system.dimension))
    prevents_strain = (
        not lin.constrained
        and eq.system.has_volume
        and (lin.cell is None or len(lin.cell.along) < all_strains)
    )
    stable = spectrum.values.size and spectrum.settled and not (spectrum.negative or eq.order)
    converged = eq.status.good
    return bool(prevents_strain and stable and converged and not bool(lin.network.unjammed))


def _projection_off_motions(
    lin: Linearization, factor: HessianFactor
) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that projects rigid motions out of a vector of all coordinates.

    Rigid motions that constraints prevent are kept in the vector.
    """
    if not lin.constrained:
        return factor.project
    motions = np.asarray(lin.null.motions)
    motions = motions.reshape(len(motions), lin.system.positions.size)
    return lambda v: v - motions.T @ (motions @ v)


def _examine_constraints(lin: Linearization, factor: KKT) -> ConstraintState:
    """Count the constraints of a minimum by kind, and check its equations and multipliers."""
    eq = lin.equilibrium
    mask = lin.null.active_set
    assert mask is not None
    pinned = int(np.asarray(lagrangian.pinned(eq.system)).sum())
    constrained = int(np.sum(np.asarray(mask.positions))) + sum(
        int(np.sum(v)) for v in jax.tree.leaves(mask.params)
    )
    g = jax.tree.leaves(_values_of_equations(eq.system))
    largest = {
        name: float(np.max(np.abs(np.asarray(v)), initial=0.0))
        for name, v in eq.multipliers.items()
    }
    return ConstraintState(
        pinned=pinned,
        bound=constrained - pinned,
        equations=sum(int(np.size(v)) for v in g),
        redundant=factor.redundant,
        switching=about_to_switch(eq.system, eq.multipliers, lin.null, float(eq.max_force)),
        violation=max((float(np.max(np.abs(np.asarray(v)), initial=0.0)) for v in g), default=0.0),
        largest=largest,
    )


@compiled
def _values_of_equations(system: System) -> dict[str, jax.Array]:
    """Compute the values g of the constraints' equations g = 0, by name of the constraint."""
    return lagrangian.equations(system, system.positions, system.params)


def certify(
    eq: Equilibrium | Linearization,
    dparams: Params | None = None,
    *,
    modes: int = 1,
    observable: Callable[[System], Any] | None = None,
    throw: bool = False,
) -> Certificate:
    """Examine a minimum, and the derivative that ``jvp`` computes there along ``dparams``.

    In a relaxed cell the unknowns are the positions and the strain of the cell: at a pressure the
    minimum is one of the enthalpy, the Newton step to the minimum and the response change the cell
    too, and the certificate's ``cell`` gives the stress and the stiffness of the cell.

    A saddle of order k must have exactly k modes of negative stiffness. The estimates of errors use
    the smallest stiffness in absolute value.

    A cell of fixed size or fixed shape prevents some strains. Where the configuration would not
    keep its shape or its size without the cell, the status says so, from the stiffness against
    strain (:func:`mdsens.mechanics.stability.verdict`): UNSTABLE where a modulus is negative;
    SHAPE_HELD, a warning, where the moduli are positive and yet some strain lowers the enthalpy.
    Derivatives in the cell are valid in both cases.

    The cost is that of an eigenvalue and a few linear solves with one factor of the Hessian,
    d (d + 1) / 2 of them for the strains: about a tenth of the relaxation.

    Args:
      eq: a minimum or saddle, from ``minimize``, ``find_saddle`` or ``linearize``; not a batch. An
        unconverged minimum is examined too.
      dparams: the direction in parameter space, as in ``jvp``; in a relaxed cell it may contain
        the load, such as ``"pressure"``. Where None, no derivative is examined.
      modes: number of the lowest modes to compute.
      observable: a function of a System, as in ``gradient``. The certificate reports how much of
        the observable's gradient lies on rattlers and rigid motions, which have no derivative.
      throw: raise :class:`ConvergenceError` where the status is not good; the error's ``result`` is
        the certificate.

    Returns:
      a :class:`Certificate`.

    Raises:
      InputError: a name is no parameter's, or a shape is wrong.

    Example:
      >>> import mdsens as ms
      >>> ms.enable_x64()
      >>> eq = ms.minimize(ms.load_system("seed_packing_2d", seed=0))
      >>> c = ms.certify(eq, {"sigma": [0.0, 1.0]})
      >>> c.status.name
      'CONVERGED'
    """
    if isinstance(eq, Equilibrium) and eq.system.batch is not None:
        raise InputError(
            f"certify takes one minimum and got a batch of {eq.system.batch}: give one minimum"
            " of the batch, ms.unstack(eq)[0]."
        )
    if not is_integer(modes) or modes < 1:
        raise InputError(f"modes is {short(modes)}: give a whole number from 1.")
    lin = eq if isinstance(eq, Linearization) else linearize(eq, throw=False)
    examined = _examine_minimum(lin, dparams, modes, observable)
    findings = list_findings(examined, lin)
    status = findings[0][0] if findings else Status.CONVERGED
    certificate = dataclasses.replace(examined, status=status, findings=tuple(findings))
    if throw and not status.good:
        raise ConvergenceError(f"certify: {findings[0][1]}.", status, certificate)
    return certificate


def _examine_minimum(
    lin: Linearization,
    dparams: Params | None,
    modes: int,
    observable: Callable[[System], Any] | None,
) -> Certificate:
    """Compute all figures of a certificate, without its findings and its status.

    Args:
      lin: the linearization of the minimum.
      dparams, modes, observable: the direction in parameter space, the number of modes and the
        function of a System, as in ``certify``.
    """
    minimum = lin.equilibrium
    system = minimum.system
    factor = _choose_factor(lin)
    finite = _has_finite_positions(lin)
    free, translations, rotations = lin.null.dimensions(system.dimension) if finite else (0, 0, 0)
    spectrum = _compute_modes(lin, factor, modes)
    has_modes = bool(spectrum.values.size)
    space = Space(lin, factor)
    forces = space.forces()
    smallest_stiffness = _find_smallest_stiffness(space, spectrum)
    step = space.still
    if has_modes:
        # the Newton step H^+ F, to the few digits that the estimates need
        step, _, _ = space.solve(forces, ESTIMATE)
    crossed_to_minimum, steps_to_crossing = _contacts_in_doubt(space, step)
    derivative_certificate = None
    if dparams is not None:
        full_tangent(system, dparams, lin.params)  # checks the names and shapes
        if has_modes:
            derivative_certificate = derivative(space, dparams, step, smallest_stiffness)
    parts_without_derivative = None
    if observable is not None:
        project = _projection_off_motions(lin, factor)
        parts_without_derivative = _parts_without_derivative(observable, lin, project)
    return Certificate(
        # of the findings, which are known later
        status=Status.CONVERGED,
        findings=(),
        max_force=float(minimum.max_force),
        relative_force=_compute_relative_force(lin),
        mean_force=float(lin.network.mean_force),
        distance=space.strength(forces) / smallest_stiffness if smallest_stiffness > 0 else np.inf,
        newton_step_norm=space.size(step) if has_modes else np.nan,
        stiffness_min=float(spectrum.values[0]) if has_modes else np.nan,
        stiffness_max=spectrum.largest,
        spectrum=spectrum,
        # under constraints the modes have components of relaxed parameters after the positions
        participation=participation(spectrum.vectors[: system.positions.size], system.dimension),
        negative_modes=spectrum.negative,
        floppy_modes=spectrum.zero,
        unsettled_modes=spectrum.hidden,
        zero_modes=free + translations + rotations + spectrum.zero,
        translations=translations,
        rotations=rotations,
        rattlers=np.asarray(lin.network.rattlers),
        crossed_to_minimum=crossed_to_minimum,
        steps_to_crossing=steps_to_crossing,
        derivative=derivative_certificate,
        observable=parts_without_derivative,
        precision=str(system.positions.dtype),
        cell=_examine_cell(lin, step),
        order=minimum.order,
        constraints=_examine_constraints(lin, factor) if lin.constrained else None,
        strain=_examine_strain(lin, spectrum),
    )


def _has_finite_positions(lin: Linearization) -> bool:
    """Return whether no position of a configuration is infinite or NaN."""
    return bool(np.isfinite(np.asarray(lin.equilibrium.system.positions)).all())


def _choose_factor(lin: Linearization) -> Any:
    """Return the factorized Hessian of a linearization, or make one where it has none.

    Under constraints the result is the factorized matrix of the whole system of equations instead.
    """
    if lin.factor is None:
        return HessianFactor(lin.system, lin.null, lin.equilibrium.order)
    return lin.factor


def _compute_modes(lin: Linearization, factor: HessianFactor, modes: int) -> Spectrum:
    """Compute the lowest modes; none where all particles are rattlers or positions are NaN.

    Args:
      lin: the linearization of the minimum.
      factor: the Hessian, with its factor.
      modes: number of the lowest modes to compute; at a saddle there may be more.
    """
    minimum = lin.equilibrium
    if not _has_finite_positions(lin) or np.asarray(lin.network.rattlers).all():
        return _empty_spectrum(minimum.system.positions.size)
    # at a saddle of order k, the lowest k modes and the softest positive one
    return factor.lowest(
        max(modes, minimum.order + 1),
        doubtful_stiffness(minimum.max_force, natural_units(minimum.system)[0]),
        ACCURACY,
    )


def _empty_spectrum(size: int) -> Spectrum:
    """Return a spectrum without modes, for a minimum that cannot move or has NaN positions."""
    return Spectrum(
        values=np.zeros(0),
        vectors=np.zeros((size, 0)),
        residuals=np.zeros(0),
        largest=0.0,
        negative=0,
        zero=0,
        hidden=0,
        floor=0.0,
        counted=True,
        method="none",
    )


def _find_smallest_stiffness(space: Space, spectrum: Spectrum) -> float:
    """Compute the smallest stiffness of all unknowns, in absolute value at a saddle.

    The result is zero where it is not known to be positive, so that no estimate uses it.

    Args:
      space: norms and linear solves at the configuration.
      spectrum: the lowest modes of the Hessian.
    """
    order = space.lin.equilibrium.order
    if spectrum.values.size and spectrum.settled and spectrum.negative == order:
        return space.least(float(np.abs(spectrum.values).min()))
    return 0.0


def _compute_relative_force(lin: Linearization) -> float:
    """Compute the largest force left, relative to the mean force of a contact.

    The result is NaN where the potential attracts too, or where there are no contacts.
    """
    mean_force = float(lin.network.mean_force)
    if mean_force > 0 and lin.equilibrium.system.potential.repulsive:
        return float(lin.equilibrium.max_force) / mean_force
    return np.nan
