"""This module lists the outcomes of relaxations, derivatives and designs.

They include the outcomes of linear solves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.core import Tracer

from mdsens._util.outcome import Outcome, Severity
from mdsens.implicit.linear.result import Result

__all__ = ["Status", "status_at"]


class Status(Outcome):
    """The outcome of a relaxation, of a derivative or of a design.

    Each outcome has a sentence that names the cause and the remedy. ``good`` is True where the
    result that comes with the outcome can be used, ``warning`` where the user should also read the
    sentence. Inside ``jax.jit`` a status is an int32 array; ``Status(int(value))`` turns such an
    array ``value`` back into an outcome. A status prints as its name and sentence;
    ``f"{status:d}"``, ``int(status)`` and json give the code.
    """

    # An ``entry`` of Result has the same code, severity and sentence here, so that the status of a
    # linear solve is one of these members.
    CONVERGED = Result.CONVERGED.entry
    ROUND_OFF_LIMITED = Result.ROUND_OFF_LIMITED.entry
    NULL_COMPONENT_DROPPED = (
        2,
        Severity.WARNING,
        (
            "converged; the part of the right-hand side in the null space (translations, "
            "rattlers, rotations of a free cluster) has no answer and was dropped"
        ),
    )
    SINGLE_PRECISION = (
        3,
        Severity.WARNING,
        (
            "single precision leaves few digits of a derivative, eps lambda_max / lambda_min at "
            "best; call ms.enable_x64() for more"
        ),
    )
    RADIUS_BELOW_ROUND_OFF = (
        4,
        Severity.WARNING,
        (
            "a pair stands so near to its next breakpoint that the positions cannot tell on "
            "which side: the derivative is that of one side; move the parameters a little"
        ),
    )
    DEGENERATE = (
        5,
        Severity.WARNING,
        (
            "the lowest modes are equally stiff, more of them than were asked for, so that each "
            "alone has no derivative; value and derivative are those of their mean"
        ),
    )
    NOT_UNIQUE = Result.NOT_UNIQUE.entry
    NO_CONTACTS = (
        7,
        Severity.WARNING,
        (
            "at rest at zero energy: nothing is in contact, so there is nothing to "
            "differentiate; raise the packing fraction or pressure to jam it, or give positions "
            "and lengths in one unit"
        ),
    )
    SHAPE_HELD = (
        8,
        Severity.WARNING,
        (
            "some strain of the cell costs nothing or lowers the enthalpy (Born), so that only "
            "the fixed cell keeps this shape: results in this cell are valid, but under its "
            "pressure alone it would shear away; relax the shape as well, or take more particles"
        ),
    )
    MAX_STEPS_REACHED = (
        10,
        Severity.FAILURE,
        "the step limit came before the tolerance; raise max_steps (max_iterations of a linear"
        " method) or loosen the tolerance",
    )
    STAGNATED = Result.STAGNATED.entry
    BREAKDOWN = Result.BREAKDOWN.entry
    INDEFINITE = (
        13,
        Severity.FAILURE,
        (
            "the operator has a direction of negative curvature, so this is a saddle and no "
            "minimum; perturb the configuration and minimize again"
        ),
    )
    NOT_FINITE = (
        14,
        Severity.FAILURE,
        (
            "a value was not finite; look for overlapping particles, a step that is too long, or "
            "bad parameters"
        ),
    )
    NEIGHBORS_OVERFLOWED = (
        15,
        Severity.FAILURE,
        (
            "the neighbor list was too short for this configuration, so pairs were lost; "
            "allocate it again outside of jit (system.reallocate()) or start from ms.minimize"
        ),
    )
    UNJAMMED = (
        16,
        Severity.FAILURE,
        (
            "no contact carries force, so there is nothing to differentiate; raise the packing "
            "fraction or pressure, or give positions and lengths in one unit"
        ),
    )
    UNCONVERGED = (
        17,
        Severity.FAILURE,
        (
            "the configuration is no minimum: the largest force left is above the tolerance, or "
            "not small beside the mean force of the pairs, so that contacts and derivatives may "
            "be those of another one; minimize further, to a smaller tolerance (or leave "
            "tolerance out)"
        ),
    )
    FLOPPY = (
        18,
        Severity.FAILURE,
        (
            "there are modes without stiffness beyond translations, rotations and rattlers: the "
            "configuration is not rigid, and its response not unique; compress it, or add what "
            "holds it"
        ),
    )
    CONTACTS_UNSETTLED = (
        19,
        Severity.FAILURE,
        (
            "on the way from here to the minimum a pair crosses a breakpoint of its potential (a "
            "contact opens or closes), so the derivative may be that of another contact network; "
            "minimize to a smaller force, or where particles just touch, as in symmetric "
            "arrangements, move the parameters a little"
        ),
    )
    STIFFNESS_UNSETTLED = (
        20,
        Severity.FAILURE,
        (
            "a mode is so soft that the force left on the particles could account for its "
            "stiffness, which may have either sign: it may be floppy, unstable or neither; "
            "minimize to a smaller force, or take it as floppy"
        ),
    )
    INACCURATE = (
        21,
        Severity.FAILURE,
        (
            "the estimated error of the derivative is above a tenth of it; solve to a smaller "
            "residual (force)"
        ),
    )
    NO_REST = (
        22,
        Severity.FAILURE,
        (
            "no state of rest was found at this pressure or stress: the cell grows until nothing "
            "holds it, or shrinks without end; change the load, "
            "start nearer to it, or take more particles"
        ),
    )
    DESIGN_STAGNATED = (
        23,
        Severity.FAILURE,
        (
            "no step leads nearer to all targets: the trust region or the bounds leave none; "
            "widen the bounds, free more parameters, or ask for less"
        ),
    )
    BUDGET_SPENT = (
        24,
        Severity.FAILURE,
        "the steps were spent before every target was met; resume with more, or ask for less",
    )
    UNRESOLVED = (
        25,
        Severity.FAILURE,
        (
            "the gap to the next mode is too small to tell the lowest ones from it, so that the "
            "derivative may be that of a mixture; minimize to a smaller force, take more modes "
            "together (count), or loosen the accuracy"
        ),
    )
    UNSTABLE = (
        26,
        Severity.FAILURE,
        (
            "the bulk or the shear modulus is not positive, so that only the cell holds this "
            "configuration on its way to a rearrangement, and its Poisson's ratio means nothing; "
            "compress it, or take more particles"
        ),
    )
    DEGENERATE_CONSTRAINT = Result.DEGENERATE_CONSTRAINT.entry
    SINGULAR = Result.SINGULAR.entry
    NOT_A_SADDLE = (
        29,
        Severity.FAILURE,
        (
            "the modes of negative stiffness are not as many as a saddle of this order has: this "
            "is a minimum, or a saddle of another order; start nearer to the saddle, along "
            "another direction, or between its two minima"
        ),
    )
    REDUNDANT_CONSTRAINTS = (
        30,
        Severity.FAILURE,
        (
            "some constraints repeat others, so that their multipliers are not unique and their "
            "values cannot change one by one; leave out those that repeat others"
        ),
    )
    CONSTRAINTS_UNMET = (
        31,
        Severity.FAILURE,
        (
            "the constraints cannot be met together, or not from this start: an equation is not "
            "fulfilled; change the constraints, or start nearer to a solution"
        ),
    )
    INTERRUPTED = (
        33,
        Severity.FAILURE,
        (
            "the relaxation was interrupted, as by Ctrl-C, and this is the last state that it"
            " reached; go on from there by ms.minimize(eq.system), or ms.minimize(error.result"
            ".system) where an error was raised"
        ),
    )
    NOT_A_ROOT = Result.NOT_A_ROOT.entry


def status_at(code: Any) -> Any:
    """Return the status of a code; in traced code, and for the codes of a batch, these as they are.

    Args:
      code: an integer array.
    """
    return code if isinstance(code, Tracer) or np.ndim(code) else Status(int(code))
