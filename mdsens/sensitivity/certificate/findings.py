"""The verdict of a certificate: what its figures put in doubt, each as a status and a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np

from mdsens.mechanics.status import Status
from mdsens.sensitivity.certificate.parts import (
    ConstraintState,
    DerivativeCertificate,
    StrainState,
)
from mdsens.sensitivity.certificate.record import Certificate, count
from mdsens.sensitivity.derivative_solve import (
    DOUBLE_PRECISION_EPS,
)
from mdsens.sensitivity.linearization import Linearization

__all__ = ["Finding", "list_findings"]

# A fault or warning, and a sentence that contains its figures.
Finding: TypeAlias = tuple[Status, str]
# Displacements that positions resolve, in units of their round-off.
RESOLVED = 10.0
# Relative error of a derivative above which no digit of it is known.
INACCURATE = 0.1


def list_findings(c: Certificate, lin: Linearization) -> list[Finding]:
    """List all faults and warnings of a certificate, gravest first.

    Where several are equally grave, causes, such as a relaxation that did not converge, come before
    their effects.

    Args:
      c: the certificate, without findings so far.
      lin: the linearization of the minimum.
    """
    positions = np.asarray(lin.equilibrium.system.positions)
    eps = float(np.finfo(positions.dtype).eps)
    findings = [
        *_judge_relaxation(c, lin),
        *_judge_negative_modes(c, lin),
        *_judge_constraints(c.constraints),
        *_judge_cell(c, lin),
        *_judge_soft_modes(c),
        *_judge_contacts(c, lin),
        *_judge_moduli(c.strain),
        *_judge_derivative(c, positions),
        *_judge_precision(c, eps),
        *_judge_observable(c.observable, eps),
        *_judge_direction(c.derivative),
        *_judge_shape(c.strain),
    ]
    # sorted is stable: findings of one severity keep the order above
    return sorted(findings, key=lambda finding: -finding[0].severity)


def _build_finding(status: Status, figures: str) -> Finding:
    """Return a status and its sentence, to which ``figures`` are added in brackets.

    The figures are numbers of the certificate, as text.
    """
    return status, f"{status.sentence} ({figures})"


def _judge_relaxation(c: Certificate, lin: Linearization) -> Iterator[Finding]:
    """Report a relaxation that failed, and a configuration without a rigid network of contacts."""
    status = lin.equilibrium.status
    if not status.good:
        yield _build_finding(status, f"max_force {c.max_force:.1e}")
    if bool(lin.network.unjammed) and not c.crossed_to_minimum:
        figures = "no rigid body is supported by contacts"
        if np.all(c.rattlers):
            figures = f"{c.rattlers.size} of {c.rattlers.size} particles are rattlers"
        yield _build_finding(Status.UNJAMMED, figures)


def _judge_negative_modes(c: Certificate, lin: Linearization) -> Iterator[Finding]:
    """Report a wrong number of negative modes: not 0 at a minimum, or not the order of a saddle.

    If the sign of the stiffness is not known for any mode, report the reason instead: the Hessian
    is not finite, or some particles touch without a force.
    """
    if not np.isfinite(c.spectrum.values).all():
        yield _build_finding(Status.NOT_FINITE, "the Hessian")
    elif bool(lin.network.touching):
        yield _build_finding(
            Status.CONTACTS_UNSETTLED,
            "some particles touch without a force: the sign of no stiffness is known",
        )
    elif c.negative_modes != c.order:
        yield _build_finding(
            Status.NOT_A_SADDLE if c.order else Status.INDEFINITE,
            f"{count(c.negative_modes, 'mode')} of negative stiffness, the lowest"
            f" {c.stiffness_min:.3g}",
        )


def _judge_constraints(constraints: ConstraintState | None) -> Iterator[Finding]:
    """Report redundant equations, and coordinates about to meet or leave their bound."""
    if constraints is None:
        return
    if constraints.redundant:
        yield _build_finding(
            Status.REDUNDANT_CONSTRAINTS,
            f"{constraints.redundant} of {count(constraints.equations, 'equation')}",
        )
    if constraints.switching:
        yield _build_finding(
            Status.DEGENERATE_CONSTRAINT, count(constraints.switching, "coordinate")
        )


def _judge_cell(c: Certificate, lin: Linearization) -> Iterator[Finding]:
    """Report a relaxed cell whose stiffness is not positive."""
    if c.cell is None or c.cell.stable:
        return
    floppy = lin.cell is not None and int(lin.cell.status) == Status.FLOPPY
    # ``not ... > 0`` rather than ``<= 0``: a stiffness that is NaN counts as well
    where = "at this pressure" if c.cell.hydrostatic else "under this load"
    if floppy or not c.cell.stiffness_min > 0:
        yield _build_finding(
            Status.FLOPPY if floppy else Status.INDEFINITE,
            f"of the cell {where}, whose stiffness is {c.cell.stiffness_min:.3g}",
        )


def _judge_soft_modes(c: Certificate) -> Iterator[Finding]:
    """Report modes whose stiffness is zero, or so small that its sign is in doubt."""
    if c.floppy_modes:
        yield _build_finding(Status.FLOPPY, count(c.floppy_modes, "floppy mode"))
    if c.unsettled_modes:
        yield _build_finding(
            Status.STIFFNESS_UNSETTLED,
            f"{count(c.unsettled_modes, 'mode')} below {c.spectrum.floor:.0e}, max_force"
            f" {c.max_force:.1e}",
        )


def _judge_contacts(c: Certificate, lin: Linearization) -> Iterator[Finding]:
    """Report contacts that may change on the way to the minimum."""
    good = lin.equilibrium.status.good
    # already reported with the negative modes where particles touch without a force
    if c.crossed_to_minimum and good and not lin.network.touching:
        yield _build_finding(
            Status.CONTACTS_UNSETTLED,
            f"{count(c.crossed_to_minimum, 'pair')} in doubt, max_force {c.max_force:.1e}",
        )


def _judge_moduli(strain: StrainState | None) -> Iterator[Finding]:
    """Report a negative bulk or shear modulus."""
    if strain is not None and strain.status is Status.UNSTABLE:
        yield _build_finding(
            strain.status,
            f"bulk modulus {strain.bulk:.3g}, shear modulus {strain.shear:.3g} in Birch's"
            " convention",
        )


def _judge_derivative(c: Certificate, positions: np.ndarray) -> Iterator[Finding]:
    """Report a failed linear solve, a large error, and too small a range of the derivative.

    The range is too small if the particles move by less than ten times the round-off of their
    positions before the first contact changes or a coordinate meets or leaves its bound.

    Args:
      c: the certificate.
      positions: the positions of the particles.
    """
    d = c.derivative
    if d is None:
        return
    if not d.status.good:
        yield _build_finding(d.status, f"residual {d.residual:.1e}")
    if d.vanishes:
        return
    # ``not <=`` reports an error of NaN as well
    if c.estimates_hold and not d.error <= INACCURATE:
        yield _build_finding(Status.INACCURATE, f"{d.error:.1e} of it")
    resolution = float(np.finfo(positions.dtype).eps) * float(np.abs(positions).max())
    motion_in_radius = d.radius * float(np.abs(d.positions).max())
    if np.isfinite(d.radius) and motion_in_radius < RESOLVED * resolution:
        yield _build_finding(Status.RADIUS_BELOW_ROUND_OFF, f"radius {d.radius:.1e}")


def _judge_precision(c: Certificate, eps: float) -> Iterator[Finding]:
    """Report single precision, with the relative error that it leaves in a linear solve.

    Args:
      c: the certificate.
      eps: relative round-off of the positions.
    """
    if eps > DOUBLE_PRECISION_EPS:
        # relative error of a solve: round-off times the condition number
        softest = abs(c.stiffness_min) if c.order else c.stiffness_min
        error = eps * c.stiffness_max / softest if softest > 0 else np.inf
        yield _build_finding(Status.SINGLE_PRECISION, f"{error:.0e} here")


def _judge_observable(observable: dict[str, float] | None, eps: float) -> Iterator[Finding]:
    """Report an observable whose gradient is not finite, or has parts without a derivative.

    Args:
      observable: shares of the gradient on rattlers and on rigid motions.
      eps: relative round-off of the positions.
    """
    if observable is None:
        return
    if not np.isfinite(list(observable.values())).all():
        yield _build_finding(Status.NOT_FINITE, "the observable's gradient")
    # shares below eps^(1/2), 1.5e-8 in double precision, are taken for round-off
    parts = [
        f"{share:.1e} of it on {name}" for name, share in observable.items() if share > eps**0.5
    ]
    if parts:
        yield _build_finding(
            Status.NULL_COMPONENT_DROPPED, f"the observable's gradient: {', '.join(parts)}"
        )


def _judge_direction(d: DerivativeCertificate | None) -> Iterator[Finding]:
    """Report a direction in parameter space that changes parameters of rattlers.

    This part of the direction has no effect on the derivative.
    """
    if d is not None and d.on_rattlers > 0:
        yield _build_finding(
            Status.NULL_COMPONENT_DROPPED, f"{d.on_rattlers:.1e} of the direction is on rattlers"
        )


def _judge_shape(strain: StrainState | None) -> Iterator[Finding]:
    """Report a shape that only the fixed cell keeps, since some strain lowers the enthalpy."""
    if strain is not None and strain.status is Status.SHAPE_HELD:
        yield _build_finding(
            strain.status, f"the smallest eigenvalue of Birch's tensor is {strain.smallest:.3g}"
        )
