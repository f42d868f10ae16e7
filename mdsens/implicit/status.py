"""What became of a computation: an integer that jit can carry, a sentence that a person can act on, and the errors.

Also what a record needs to reach another process as it is: :class:`Portable`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import types
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any

import jax
import numpy as np

from mdsens.implicit._attributes import Named

__all__ = [
    "ConvergenceError",
    "InputError",
    "MdsensError",
    "Portable",
    "PrecisionError",
    "SolveStats",
    "Status",
    "TooLargeError",
    "UnsupportedVersionError",
    "array_types",
    "raise_for_status",
    "reduced",
    "require_sound_jax",
    "restored",
    "short",
]


NUMERIC = tuple("bcdoxXn")  # what ends a format of whole numbers


class Status(IntEnum):
    """The outcome of a relaxation or a solve: each member is a sentence that names the cause and what to do.

    Members below ``MAX_STEPS_REACHED`` are good: the number beside them can be used; from ``NULL_COMPONENT_DROPPED`` on
    they are warnings. Inside ``jit`` a status is an int32 array; ``Status(int(value))`` turns it back into a member.
    Printed, it is its name and sentence; ``f"{status:d}"``, ``int(status)`` and json give the number.
    """

    sentence: str

    def __new__(cls, value: int, sentence: str) -> Status:
        member = int.__new__(cls, value)
        member._value_ = value
        member.sentence = sentence
        return member

    CONVERGED = 0, "converged to the tolerance"
    ROUND_OFF_LIMITED = (
        1,
        "the residual stands at round-off, above the tolerance asked for; the answer is as good as this precision "
        "allows",
    )
    NULL_COMPONENT_DROPPED = (
        2,
        "converged; the part of the right-hand side in the null space (translations, rattlers, rotations of a free "
        "cluster) has no answer and was dropped",
    )
    SINGLE_PRECISION = (
        3,
        "single precision leaves few digits of a derivative, eps lambda_max / lambda_min at best; call ms.enable_x64() "
        "for more",
    )
    RADIUS_BELOW_ROUND_OFF = (
        4,
        "a pair stands so near to its next breakpoint that the positions cannot tell on which side: the derivative is "
        "that of one side; move the parameters a little",
    )
    DEGENERATE = (
        5,
        "the lowest modes are equally stiff, more of them than were asked for, so that each alone has no derivative; "
        "value and derivative are those of their mean",
    )
    NOT_UNIQUE = (
        6,
        "the operator is singular beyond what was declared and the right-hand side lies in its range: of the many "
        "solutions this is the shortest; where the others matter, state what holds the free directions",
    )
    NO_CONTACTS = (
        7,
        "at rest at zero energy: nothing is in contact, so there is nothing to differentiate; raise the packing "
        "fraction or pressure to jam it, or give positions and lengths in one unit",
    )
    SHAPE_HELD = (
        8,
        "some strain of the cell costs nothing or lowers the enthalpy (Born), so that the cell alone holds this shape: "
        "what is computed in it stands, but left to its pressure it would shear away; relax the shape as well, or take "
        "more particles",
    )
    MAX_STEPS_REACHED = 10, "the step limit came before the tolerance; raise max_steps or loosen the tolerance"
    STAGNATED = (
        11,
        "the residual stopped falling above the tolerance; try a longer restart, another solver (Direct where it "
        "fits), or check that the null space is complete",
    )
    BREAKDOWN = (
        12,
        "the recurrence broke down (division by zero, or a preconditioner that is not positive definite); use GMRES or "
        "Direct",
    )
    INDEFINITE = (
        13,
        "the operator has a direction of negative curvature, so this is a saddle and no minimum; perturb the "
        "configuration and minimise again",
    )
    NOT_FINITE = (
        14,
        "a value was not finite; look for overlapping particles, a step that is too long, or bad parameters",
    )
    NEIGHBOURS_OVERFLOWED = (
        15,
        "the neighbour list was too short for this configuration, so pairs were lost; allocate it again outside of jit "
        "(system.reallocate()) or start from ms.minimize",
    )
    UNJAMMED = (
        16,
        "no contact carries force, so there is nothing to differentiate; raise the packing fraction or pressure, or "
        "give positions and lengths in one unit",
    )
    UNCONVERGED = (
        17,
        "the configuration is no minimum: the largest force left is above the tolerance, or not small beside the mean "
        "force of the pairs, so that contacts and derivatives may be those of another one; minimize further, to a "
        "smaller tolerance (or leave tolerance out)",
    )

    FLOPPY = (
        18,
        "there are modes without stiffness beyond translations, rotations and rattlers: the configuration is not "
        "rigid, and its response not unique; compress it, or add what holds it",
    )
    CONTACTS_UNSETTLED = (
        19,
        "on the way from here to the minimum a pair crosses a breakpoint of its law (a contact opens or closes), so "
        "the derivative may be that of another contact network; minimise to a smaller force, or where particles just "
        "touch, as in symmetric arrangements, move the parameters a little",
    )
    STIFFNESS_UNSETTLED = (
        20,
        "a mode is so soft that the force left could make its stiffness, of either sign: it may be floppy, unstable or "
        "neither; minimise to a smaller force, or take it as floppy",
    )
    INACCURATE = (
        21,
        "the estimated error of the derivative is above a tenth of it; solve to a smaller residual (force)",
    )

    NO_REST = (
        22,
        "no state of rest was found at this pressure: the cell grows until nothing holds it, or shrinks below twice "
        "the range of the interactions; change the pressure, start nearer to it, or take more particles",
    )

    DESIGN_STAGNATED = (
        23,
        "no step leads nearer to all targets: the trust region or the bounds leave none; widen the bounds, free more "
        "parameters, or ask for less",
    )
    BUDGET_SPENT = 24, "the steps were spent before every target was met; resume with more, or ask for less"

    UNRESOLVED = (
        25,
        "the gap to the next mode is too small to tell the lowest ones from it, so that the derivative may be that of "
        "a mixture; minimise to a smaller force, take more modes together (count), or loosen the accuracy",
    )
    UNSTABLE = (
        26,
        "the bulk or the shear modulus is not positive, so that only the cell holds this configuration on its way to a "
        "rearrangement, and its Poisson's ratio means nothing; compress it, or take more particles",
    )

    DEGENERATE_CONSTRAINT = (
        27,
        "a constraint is met without a force on it, so it is about to open or close: the derivative is that of one "
        "side; move the parameters a little",
    )
    SINGULAR = (
        28,
        "the operator is singular and the right-hand side lies partly outside its range: this is the least-squares "
        "solution, not a derivative; state what holds the free directions (null_space), or check the condition F",
    )
    NOT_A_SADDLE = (
        29,
        "the modes of negative stiffness are not as many as a saddle of this order has: this is a minimum, or a saddle "
        "of another order; start nearer to the saddle, along another direction, or between its two minima",
    )
    REDUNDANT_CONSTRAINTS = (
        30,
        "some constraints repeat others, so that their multipliers are not unique and their values cannot change one "
        "by one; leave out as many as repeat",
    )

    CONSTRAINTS_UNMET = (
        31,
        "the constraints cannot be met together, or not from this start: an equation is left open; change what they "
        "ask for, or start nearer to it",
    )
    NOT_A_ROOT = (
        32,
        "Newton's step from here does not lead to a root of the condition: it is far from one, or the condition has a "
        "kink between; solve more tightly, or check that F is the condition that the solver solves",
    )

    def __str__(self) -> str:
        return f"{self.name}: {self.sentence}"

    def __format__(self, spec: str) -> str:
        """As a number where the format is one of whole numbers, else as its text."""
        return int.__format__(self, spec) if spec[-1:] in NUMERIC else format(str(self), spec)

    @property
    def good(self) -> bool:
        """True where the number beside this status can be used."""
        return self.value < Status.MAX_STEPS_REACHED.value

    @property
    def warning(self) -> bool:
        """True where the number can be used, and its user should know what the sentence says."""
        return Status.NULL_COMPONENT_DROPPED.value <= self.value < Status.MAX_STEPS_REACHED.value


class MdsensError(Exception):
    """Base of every error that mdsens raises on purpose."""


class InputError(MdsensError, ValueError):
    """Bad input: the message names the field, the value and the remedy."""


class PrecisionError(InputError):
    """This floating-point precision does not do: for the tolerance asked for, or for what was made in a higher one."""


class TooLargeError(MdsensError, MemoryError):
    """The result would not fit in memory; the message gives the size."""


class UnsupportedVersionError(MdsensError, ImportError):
    """A dependency is installed in a version known to give wrong numbers."""


class ConvergenceError(MdsensError, RuntimeError):
    """A computation ended without a usable number; ``status`` says how, ``result`` holds what there is."""

    def __init__(self, message: str, status: Status, result: Any = None):
        super().__init__(message)
        self.status = status
        self.result = result

    def __reduce__(self) -> Any:
        # an exception is made anew from its ``args``, which are the message alone: a pool of processes would break
        return type(self), (str(self), self.status, self.result)


def array_types(value: Any, seen: frozenset[int] = frozenset()) -> list[str]:
    """The types of the jax arrays in a field of a record: in dicts, lists, tuples, and in what functions close over.

    Args:
      seen: what it is part of; a function may close over itself.
    """
    if isinstance(value, jax.Array):
        return [str(value.dtype)]
    if id(value) in seen or isinstance(value, Portable):  # a record tells its own
        return []
    parts: list[Any] = []
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = list(value)
    elif isinstance(value, types.FunctionType):
        cells = [cell for cell in value.__closure__ or () if cell != types.CellType()]  # but for empty ones
        parts = [*(cell.cell_contents for cell in cells), value.__defaults__, value.__kwdefaults__]
    elif isinstance(value, functools.partial):
        parts = [value.func, value.args, value.keywords]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = list(vars(value).values())
    return [name for part in parts for name in array_types(part, seen | {id(value)})]


def reduced(record: Any, fields: dict[str, Any]) -> Any:
    """What pickle makes a record anew from, as the ``__reduce__`` of its class: :func:`restored` of its fields."""
    return restored, (type(record), fields, {name: array_types(value) for name, value in fields.items()})


def restored(kind: Callable[..., Any], fields: dict[str, Any], had: dict[str, list[str]]) -> Any:
    """A record out of its unpickled fields, whose arrays must be of the types that they had.

    Raises:
      PrecisionError: they are not, since jax makes float32 of float64, in silence, in a process without x64.
    """
    require_sound_jax()
    for name, value in fields.items():
        for then, now in zip(had[name], array_types(value), strict=False):
            if then != now:
                raise PrecisionError(
                    f"{getattr(kind, '__name__', kind)}.{name} is {then}, and this process computes in {now}: call "
                    "ms.enable_x64() in it before unpickling, in a pool of processes by initializer=ms.enable_x64."
                )
    return kind(**fields)


class Portable:
    """A frozen record whose arrays come out of pickle, and of ``copy``, as they went in to the last bit, or not at all.

    A named tuple of arrays cannot inherit it, and calls :func:`reduced` itself.
    """

    def __reduce__(self) -> Any:
        record: Any = self
        return reduced(record, {field.name: getattr(record, field.name) for field in dataclasses.fields(record)})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class SolveStats(Portable, Named):
    """The evidence beside a solution.

    Attributes:
      status: a :class:`Status` as an int32 array (so that jit and vmap carry it).
      residual: norm of ``b - A x``, recomputed from the operator, relative to the norm of ``b`` (both projected off
        the null space); for a relaxation, the largest force on a particle.
      iterations: operator applications in the solve, or steps of a relaxation.
      dropped: norm of the part of ``b`` in the left null space relative to the norm of ``b``.
      solver: the name of the method that ran, with its settings.
    """

    status: jax.Array
    residual: jax.Array
    iterations: jax.Array
    dropped: jax.Array
    solver: str = dataclasses.field(default="", metadata={"static": True})

    def __repr__(self) -> str:
        try:
            codes = sorted({int(code) for code in np.ravel(np.asarray(self.status))})
        except jax.errors.TracerArrayConversionError:
            return f"SolveStats(traced, solver={self.solver!r})"
        names = ", ".join(Status(code).name for code in codes)
        return (
            f"SolveStats(status={names}, residual={np.max(self.residual, initial=0.0):.2e}, "
            f"iterations={np.max(self.iterations, initial=0)}, dropped={np.max(self.dropped, initial=0.0):.1e}, "
            f"solver={self.solver!r})"
        )


_BAD_JAX = {
    "0.10.2": "miscompiles neighbour lists on CPU and drops pairs in silence (jax issue 39103)",
    "0.11.0": "gives wrong values on some GPUs (jax issue 40633)",
    "0.11.1": "gives wrong values on some GPUs (jax issue 40633)",
}


def short(value: Any) -> str:
    """A value as it may stand in a message: on one line, 60 characters at most."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # what cannot be shown must not hide what is wrong with it
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


_first_process: int | None = None  # in which jax was first used by us


def require_sound_jax() -> None:
    """Refuse the releases of jax that are known to compute wrongly, and a process in which it would hang.

    Raises:
      UnsupportedVersionError: with the reason and the remedy.
      MdsensError: this process was forked from one in which jax was in use, and has none of its threads.
    """
    global _first_process
    _first_process = _first_process or os.getpid()
    if os.getpid() != _first_process:
        raise MdsensError(
            "this process was forked from one in which jax was in use, where any computation of jax hangs: start "
            'processes with multiprocessing.get_context("spawn").'
        )
    if jax.__version__ in _BAD_JAX:
        raise UnsupportedVersionError(
            f"jax {jax.__version__} {_BAD_JAX[jax.__version__]}: install another release, "
            "pip install 'jax>=0.10.0,!=0.10.2,!=0.11.0,!=0.11.1,<0.13'."
        )


def raise_for_status(status: Status, what: str, result: Any = None) -> None:
    """Raise :class:`ConvergenceError` where ``status`` is not good. Called on the host alone."""
    if not status.good:
        raise ConvergenceError(f"{what}: {status.sentence}.", status, result)
