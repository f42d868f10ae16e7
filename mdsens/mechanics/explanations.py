"""Longer explanations of the outcomes: where each arises, why, and what to do about it."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

import numpy as np

from mdsens._util.errors import ConvergenceError, InputError
from mdsens._util.suggestions import did_you_mean
from mdsens.implicit.linear.result import Result
from mdsens.mechanics.status import Status

__all__ = ["Explanation", "explain"]

WIDTH = 88


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """What an outcome means and what to do about it; prints as a page of text.

    Attributes:
      status: the outcome.
      origin: the calls whose results can have it.
      cause: what happened, physically and numerically.
      remedies: what to try, the most common remedy first; empty where nothing is wrong.
    """

    status: Status
    origin: str
    cause: str
    remedies: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """How far the result can be used: "success", "warning" or "failure"."""
        if self.status.warning:
            return "warning"
        return "success" if self.status.good else "failure"

    def __str__(self) -> str:
        lines = [f"{self.status.name} ({self.kind}, code {int(self.status)})", ""]
        lines += textwrap.wrap(f"{self.status.sentence}.", WIDTH)
        lines += ["", *textwrap.wrap(f"From: {self.origin}.", WIDTH, subsequent_indent="  ")]
        lines += ["", *textwrap.wrap(self.cause, WIDTH)]
        if self.remedies:
            lines += ["", "What to do:"]
            for remedy in self.remedies:
                lines += textwrap.wrap(
                    remedy, WIDTH, initial_indent="  - ", subsequent_indent="    "
                )
        return "\n".join(lines)

    __repr__ = __str__


def explain(outcome: Any) -> Explanation:
    """Explain an outcome: where it arises, what causes it, and what to do about it.

    Args:
      outcome: a :class:`mdsens.Status`, its name or code, a result that has one (such as an
        Equilibrium, a Displacement or a Certificate), or an error that mdsens raised.

    Raises:
      InputError: there is no such outcome, or the argument has none.

    Example:
      >>> import mdsens as ms
      >>> ms.explain("FLOPPY").remedies[0]
      'Compress it, or raise the pressure.'
    """
    return EXPLANATIONS[_status_of(outcome)]


def _status_of(outcome: Any) -> Status:
    """Return the outcome that an argument of :func:`explain` names or has."""
    if isinstance(outcome, str):
        name = outcome.strip().split(":")[0].upper()
        if name in Status.__members__:
            return Status[name]
        hint = did_you_mean(name, Status.__members__)
        raise InputError(f"`outcome` is {outcome!r}, which is no status: {hint}")
    if isinstance(outcome, ConvergenceError):
        outcome = outcome.status
    elif not isinstance(outcome, Result | Status) and hasattr(outcome, "status"):
        outcome = outcome.status
    elif not isinstance(outcome, Result | Status) and hasattr(outcome, "stats"):
        outcome = outcome.stats.status
    try:
        code = np.asarray(outcome)
        if code.dtype.kind not in "iu":
            raise ValueError
        return Status(Status.worst_of(code))
    except (TypeError, ValueError):
        raise InputError(
            f"`outcome` is a {type(outcome).__name__}, which has no status: give a status, its name"
            " or code, a result, or an error that mdsens raised."
        ) from None


_DERIVATIVES = "jvp, vjp, jacobian, gradient, response, and what stands on them"
_EVERYWHERE = "every call"


def _table(*rows: Explanation) -> dict[Status, Explanation]:
    return {row.status: row for row in rows}


EXPLANATIONS = _table(
    Explanation(
        Status.CONVERGED,
        _EVERYWHERE,
        "The computation met its tolerance. For a relaxation this means that the largest force on"
        " a particle is at most the tolerance; for a derivative, that the recomputed residual of"
        " the linear system is. The error of a derivative can be larger than its residual by up to"
        " the condition number of the Hessian: ms.certify estimates it.",
    ),
    Explanation(
        Status.ROUND_OFF_LIMITED,
        "ms.minimize, linear solves, ms.verify.finite_difference",
        "The forces are sums of larger terms that cancel, and what round-off leaves of them is"
        " above the tolerance. More steps do not help. The result is as good as the precision"
        " allows, and usually as good as one that converged.",
        (
            "Nothing, in most cases; the relaxation reports this floor as eq.force_floor.",
            "Compute in double precision (ms.enable_x64()) if you do not yet.",
            "Leave out `tolerance`, or ask for no less than a few 1e-13 of a typical pair force.",
        ),
    ),
    Explanation(
        Status.NULL_COMPONENT_DROPPED,
        _DERIVATIVES,
        "The right-hand side has a part along motions without stiffness: translations, rotations of"
        " a free cluster, rattlers. Along these there is no response to compute, so this part was"
        " removed; `dropped` tells its share. A net force on a periodic system, or a force on a"
        " rattler, is of this kind.",
        (
            "If the share is at round-off, nothing.",
            "For an external force, subtract its mean, or let something hold the system"
            " (ms.constraints.Pinned).",
            "For an observable that depends on where the whole system is, use differences of"
            " positions.",
        ),
    ),
    Explanation(
        Status.SINGLE_PRECISION,
        _DERIVATIVES,
        "In single precision the relaxation ends at forces of about 1e-7 of a pair's force, and the"
        " error of a derivative is this over the smallest relative stiffness. For 16,384 discs half"
        " of the derivative was wrong, though its linear solve had converged.",
        ("Call ms.enable_x64() before any array is made.",),
    ),
    Explanation(
        Status.RADIUS_BELOW_ROUND_OFF,
        "ms.certify",
        "A pair stands at a breakpoint of its potential, such as two discs that just touch, to"
        " the accuracy of the positions. On the two sides of it the derivative differs; this one"
        " is that of the side on which the positions came out.",
        (
            "Move the parameters or the packing fraction a little and relax again.",
            "In symmetric arrangements, where many pairs touch at once, treat the derivative as"
            " one-sided.",
        ),
    ),
    Explanation(
        Status.DEGENERATE,
        "ms.modes.smallest_stiffness and its gradient",
        "Several modes have the same stiffness, as symmetry makes it, and you asked for fewer of"
        " them than there are. A change of the parameters mixes them, so that none has a"
        " derivative of its own. The mean of their stiffnesses has one, and this is what is"
        " returned.",
        ("Ask for all of them together with `count`.",),
    ),
    Explanation(
        Status.NOT_UNIQUE,
        "mdsens.implicit.root and fixed_point, linear solves",
        "The linear system has many solutions: the operator is singular beyond the null space that"
        " was declared, and the right-hand side is in its range. The shortest solution was taken.",
        (
            "Add the conditions that fix the free directions to F, or declare them as"
            " `null_space`.",
            "If only quantities that all solutions share are used, the result is valid.",
        ),
    ),
    Explanation(
        Status.NO_CONTACTS,
        "ms.minimize",
        "The system came to rest at zero energy: no pair is within the range of the"
        " interactions, as in a packing below jamming. Every such configuration is a minimum,"
        " and none has a derivative.",
        (
            "Raise the packing fraction (ms.packing.compress) or relax at a pressure"
            " (cell=ms.relaxation.AtPressure).",
            "Check that positions, box and diameters are in one unit of length.",
        ),
    ),
    Explanation(
        Status.SHAPE_HELD,
        "ms.elasticity.moduli, ms.certify",
        "Bulk and shear modulus are positive, but some strain of the cell lowers the enthalpy:"
        " the smallest eigenvalue of Birch's tensor is not positive (Born's criterion). In the"
        " fixed cell the configuration is stable, and results in this cell are valid. At the"
        " same pressure in a cell of free shape it would shear away.",
        (
            "Relax the shape as well: cell=ms.relaxation.AtPressure(P, shape=True).",
            "Take more particles: small packings near jamming are often held by their cell.",
        ),
    ),
    Explanation(
        Status.MAX_STEPS_REACHED,
        "ms.minimize, ms.find_saddle, iterative linear solves",
        "The limit on steps or iterations was reached before the tolerance. Near jamming and"
        " near an instability, the slowest mode takes long; a system that still flows has found"
        " no basin yet.",
        (
            "Raise `max_steps`, or `max_iterations` of the linear method.",
            "Go on from where it stopped: ms.minimize(eq.system).",
            "For a linear solve, take Direct where the system fits in memory.",
        ),
    ),
    Explanation(
        Status.STAGNATED,
        "iterative linear solves",
        "The residual stopped falling above the tolerance: the method has found all that it can"
        " at this accuracy. A very small eigenvalue, or a null vector that was not declared, is"
        " the usual reason.",
        (
            "Use Direct, or the default Auto.",
            "For GMRES, a longer `restart`.",
            "Look for floppy modes: print(ms.certify(eq)).",
        ),
    ),
    Explanation(
        Status.BREAKDOWN,
        "CG, MINRES and BiCGSTAB",
        "The recurrence of the method divided by zero. BiCGSTAB can do this for any matrix; CG"
        " does it where the operator or the preconditioner is not positive definite.",
        ("Use GMRES or Direct.",),
    ),
    Explanation(
        Status.INDEFINITE,
        "ms.minimize, all derivatives, linear solves",
        "The Hessian has a direction of negative curvature: forces vanish, but the energy falls"
        " along it, so this is a saddle. Derivatives of a saddle exist, but are not the response"
        " of a solid.",
        (
            "Minimize again with `leave_saddles=True`, which is the default, or from positions that"
            " are perturbed slightly.",
            "If the saddle is what you want, ms.find_saddle returns it as one, with derivatives.",
            "For a linear system of your own, declare it symmetric alone, and use MINRES, GMRES or"
            " Direct.",
        ),
    ),
    Explanation(
        Status.NOT_FINITE,
        _EVERYWHERE,
        "A number became infinite or NaN. Two particles at one point, a potential without a core"
        " such as one with charges, or a parameter of zero or NaN does this.",
        (
            "Look at the positions and parameters; the message names the first bad value where it"
            " can.",
            "Start from a configuration whose particles are apart, for example relaxed as soft"
            " spheres first.",
            "Try a potential of your own with ms.verify.potential.",
        ),
    ),
    Explanation(
        Status.NEIGHBORS_OVERFLOWED,
        "compiled code: ms.equilibrate inside jit, ms.observables of a moved system",
        "A particle has more neighbors than the list has rows for. Compiled code cannot make a"
        " larger list, and pairs were lost, so that energy and forces are wrong.",
        (
            "Outside of jit: system = system.reallocate(), then repeat.",
            "Use ms.minimize, which makes room by itself.",
        ),
    ),
    Explanation(
        Status.UNJAMMED,
        f"{_DERIVATIVES}, ms.certify, ms.elasticity",
        "No contact carries a force: the configuration is not held by anything, so that no"
        " response exists. This is the state of a packing below jamming, or of particles out of"
        " range of each other.",
        (
            "Raise the packing fraction (ms.packing.compress) or the pressure"
            " (cell=ms.relaxation.AtPressure).",
            "Check that positions, box and diameters are in one unit of length.",
        ),
    ),
    Explanation(
        Status.UNCONVERGED,
        f"{_DERIVATIVES}, ms.elasticity, ms.modes",
        "The largest force is too large for a minimum: the derivative would be that of a point"
        " on the way to it, whose contacts may not be those of the minimum.",
        (
            "Minimize the system first, or to a smaller tolerance; without `tolerance`, the default"
            " is 1e-12 of the mean pair force.",
            "If ms.minimize itself ended early, look at its status.",
        ),
    ),
    Explanation(
        Status.FLOPPY,
        "ms.certify, ms.modes, ms.elasticity",
        "There are motions without stiffness other than translations, rotations and rattlers, so"
        " that the configuration is not rigid. Fewer contacts than degrees of freedom, or a"
        " cluster that hangs together by one particle, is the usual reason.",
        (
            "Compress it, or raise the pressure.",
            "Add bonds or constraints that hold the free parts.",
            "print(ms.certify(eq)) counts the floppy modes.",
        ),
    ),
    Explanation(
        Status.CONTACTS_UNSETTLED,
        f"ms.certify, {_DERIVATIVES}",
        "The configuration is a small distance from its minimum, which the force left tells, and on"
        " this way a pair crosses a breakpoint of its potential: a contact opens or closes. The"
        " derivative here may therefore be that of another contact network than the minimum's.",
        (
            "Minimize to a smaller tolerance, so that the distance shrinks.",
            "Where particles just touch, as in crystals of discs, move the parameters a little.",
            "With a potential whose force is smooth at contact (Hertzian) the question matters"
            " less: its derivative is continuous there.",
        ),
    ),
    Explanation(
        Status.STIFFNESS_UNSETTLED,
        "ms.certify, ms.modes, ms.elasticity",
        "The softest mode is so soft that the forces left could change the sign of its"
        " stiffness. It may be floppy, unstable or merely soft.",
        (
            "Minimize to a smaller tolerance.",
            "Where that changes nothing, treat the configuration as floppy.",
        ),
    ),
    Explanation(
        Status.INACCURATE,
        "ms.certify, mdsens.implicit.certify",
        "The estimated error of the derivative is above a tenth of the derivative. The estimate"
        " is a correction that Newton's method would make, and can be added to the derivative.",
        (
            "Minimize to a smaller tolerance: the error is about the force left over the smallest"
            " stiffness.",
            "Solve to a smaller residual, or with Direct.",
        ),
    ),
    Explanation(
        Status.NO_REST,
        "ms.minimize with a condition on the cell",
        "The cell found no size or shape at which the load is balanced: it grew until nothing"
        " was in contact, or shrank without end. A pressure that the potential cannot balance"
        " does this, and so does a shear stress above the yield stress.",
        (
            "Start nearer to the state at this load, or raise the load in steps.",
            "Check the sign: pressure is positive in compression, stress is positive in tension.",
            "Take more particles.",
        ),
    ),
    Explanation(
        Status.DESIGN_STAGNATED,
        "ms.design.fit",
        "No step within the trust region and the bounds leads nearer to all targets. Either the"
        " targets contradict each other, or the bounds are reached, or the features bend so"
        " strongly (contacts that open and close) that no step is accepted.",
        (
            "design.table() shows which targets are met and which parameters are at their bounds.",
            "ms.design.feature_response tells whether the features can be moved independently.",
            "Widen the bounds, free more parameters, or ask for less.",
        ),
    ),
    Explanation(
        Status.BUDGET_SPENT,
        "ms.design.fit",
        "The number of relaxations allowed was used before every target was met.",
        (
            "Go on from the stored state: `mdsens design FILE --resume`, or a larger budget.",
            "If the history has flattened, see DESIGN_STAGNATED.",
        ),
    ),
    Explanation(
        Status.UNRESOLVED,
        "ms.modes",
        "The next mode is so close in stiffness that the lowest modes cannot be told from it. The"
        " derivative may be that of a mixture.",
        (
            "Minimize to a smaller force.",
            "Take more modes together with `count`, up to the next gap.",
        ),
    ),
    Explanation(
        Status.UNSTABLE,
        "ms.elasticity.moduli and gradient, ms.certify",
        "The bulk or the shear modulus is not positive. The configuration is at rest in its"
        " cell, yet it is no solid: under its pressure alone it would rearrange. Its Poisson's"
        " ratio has no meaning. Small packings next to unjamming are often of this kind.",
        (
            "Compress it, or take more particles.",
            "Relax the cell's shape as well, which leads to another packing:"
            " cell=ms.relaxation.AtPressure(P, shape=True), or AtVolume() at its own volume.",
            "With throw=False the tensor is returned as it is, and its bulk modulus may be used.",
        ),
    ),
    Explanation(
        Status.DEGENERATE_CONSTRAINT,
        f"{_DERIVATIVES} under constraints, mdsens.implicit.optimality",
        "An inequality is met as an equality but carries no force, such as a particle that"
        " touches a wall without pressing on it. It is about to open or to close, and the"
        " derivatives on the two sides differ.",
        (
            "Change the parameters or the clearance slightly, so that it is clearly open or"
            " closed.",
            "Treat the derivative as that of one side.",
        ),
    ),
    Explanation(
        Status.SINGULAR,
        "mdsens.implicit.root and fixed_point, NormalCG, LeastSquares",
        "The operator is singular and the right-hand side is partly outside of its range, so"
        " that the linear system has no solution; the least-squares solution was returned. The"
        " root does not move differentiably along that direction.",
        (
            "Declare the null space, or add conditions that fix the free directions.",
            "Check that F is the condition that the solver solves.",
        ),
    ),
    Explanation(
        Status.NOT_A_SADDLE,
        "ms.find_saddle, and derivatives of what it returned",
        "The number of modes of negative stiffness is not the order of the saddle: the search"
        " ended at a minimum, or at a saddle of another order.",
        (
            "Start along another direction, or further along it.",
            "Give both minima: ms.find_saddle(eq, towards=other) searches between them.",
        ),
    ),
    Explanation(
        Status.REDUNDANT_CONSTRAINTS,
        f"{_DERIVATIVES} under constraints",
        "Some constraints follow from others, such as a bond between two pinned particles. Their"
        " multipliers are not unique, and the value of one alone cannot be changed.",
        ("Leave out the constraints that repeat others; the message counts them.",),
    ),
    Explanation(
        Status.CONSTRAINTS_UNMET,
        "ms.minimize under constraints",
        "The relaxation ended where an equation of the constraints is not fulfilled: they"
        " contradict each other, or the start was too far from where they hold.",
        (
            "Check the lengths and values: can all of them hold in this cell?",
            "Start from positions that fulfil them roughly.",
        ),
    ),
    Explanation(
        Status.INTERRUPTED,
        "ms.minimize",
        "Ctrl-C, or another interruption, ended the relaxation. The last complete state is kept.",
        (
            "Go on with ms.minimize(eq.system), or ms.minimize(error.result.system) where an error"
            " was raised.",
        ),
    ),
    Explanation(
        Status.NOT_A_ROOT,
        "mdsens.implicit.certify",
        "Newton's step from the solution does not lead to a root of F. The solver stopped far"
        " from a root, or F has a kink in between, or F is not the condition that this solver"
        " solves.",
        (
            "Use a smaller tolerance in the solver.",
            "Evaluate F at the solution: it should vanish to the solver's tolerance.",
        ),
    ),
)
