"""The interface of a constraint, and the check of a system's constraints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.pytree import require_array
from mdsens._util.validation import short

__all__ = ["Bounds", "Constraint", "check_constraints", "check_name"]

Params = Mapping[str, Any]
Displacement = Callable[[jax.Array, jax.Array], jax.Array]


class Bounds(NamedTuple):
    """Lower and upper bounds of the coordinates, broadcastable to (n, d); inf where unbounded."""

    lower: jax.Array
    upper: jax.Array


class Constraint:
    """Base class of all constraints; each kind of constraint overrides some of its methods.

    The base class alone constrains nothing.
    """

    name: str

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the constraint's parameters, which the system's ``params`` must contain."""
        return ()

    @property
    def relaxes(self) -> tuple[str, ...]:
        """Names of the potential's parameters that are relaxed together with the positions.

        The constraint restricts these parameters, for example to a fixed total.
        """
        return ()

    @property
    def bounded_by(self) -> tuple[str, ...]:
        """Names of the potential's parameters on which the constraint's bounds depend."""
        return ()

    def check(self, params: Params, n: int, d: int) -> None:
        """Raise InputError if the constraint does not fit n particles in d dimensions."""

    def pinned(self) -> jax.Array | None:
        """Return an array (n, d), True for coordinates that never move; None if all may move."""
        return None

    def bounds(
        self, params: Params, diameters: jax.Array | None, shape: tuple[int, ...]
    ) -> Bounds | None:
        """Return the bounds that a constraint sets to the coordinates; None if it sets none."""
        return None

    def least(self) -> float | None:
        """Return the lower bound of the parameters that relax under a constraint, or None.

        These are parameters of the potential that are unknowns like the positions. The result is
        None where they have no lower bound.
        """
        return None

    def reach(self, params: Params) -> float:
        """Return the longest of the distances between particles that a constraint fixes.

        The result is 0 for a constraint that fixes no distance.
        """
        return 0.0

    def residuals(
        self, positions: jax.Array, params: Params, displacement: Displacement
    ) -> jax.Array | None:
        """Return the residuals of a constraint, which are zero where the constraint holds.

        The residuals have the shape of the constraint's Lagrange multiplier. The result is None for
        a constraint without equations.
        """
        return None


def check_name(kind: str, name: object) -> None:
    """Raise InputError if the name of a constraint is not a valid identifier of Python."""
    if not isinstance(name, str) or not name.isidentifier():
        raise InputError(f"{kind}: `name` is {short(name)}: give a word, such as {kind.lower()!r}.")


def check_constraints(
    constraints: Constraint | Iterable[Constraint],
    params: Params,
    law_parameters: Sequence[str],
    n: int,
    d: int,
) -> tuple[Constraint, ...]:
    """Check the constraints that a user gives for a system, and return them as a tuple.

    This function cannot run in compiled code.

    Args:
      constraints: a constraint or an iterable of constraints.
      params: the parameters of the potential and of the constraints.
      law_parameters: names of the potential's parameters.
      n, d: numbers of particles and of dimensions.

    Raises:
      InputError: a constraint does not fit the system; the message says which and why.
    """
    if isinstance(constraints, Constraint):
        constraints = (constraints,)
    try:
        records = tuple(constraints)
    except TypeError:
        raise InputError(
            f"`constraints` is {short(constraints)}: give a list of constraints of"
            " mdsens.constraints."
        ) from None
    names: list[str] = []  # multipliers are stored by them
    for c in records:
        if not isinstance(c, Constraint):
            raise InputError(
                f"`constraints` contains {short(c)}: give constraints of mdsens.constraints, such"
                " as Pinned.particles(...)."
            )
        if c.name in names:
            raise InputError(f"two constraints are named {c.name!r}: give each a different name.")
        names.append(c.name)
        # before c.check, which reads the constraint's parameters by their names
        _check_parameters(c, params, law_parameters)
        c.check(params, n, d)
    # Only after all are known: the constraint that relaxes a parameter may come after the one whose
    # bounds depend on it.
    _check_fixed_bounds(records)
    return records


def _check_parameters(c: Constraint, params: Params, law_parameters: Sequence[str]) -> None:
    """Raise InputError unless a constraint's own parameters and those that it relaxes are valid.

    Args:
      c: the constraint.
      params: the parameters of the potential and of the constraints.
      law_parameters: names of the potential's parameters.
    """
    for name in c.parameters:
        if name in law_parameters:
            raise InputError(
                f"the potential and the constraint {c.name} both have a parameter {name!r}:"
                " give the constraint another name."
            )
        if name not in params:
            raise InputError(
                f"the constraint {c.name} needs the parameter {name!r}: give params[{name!r}]."
            )
        require_array(name, params[name], f"the constraint {c.name}")
        # the potential checks its parameters itself, but not these
        if not np.isfinite(np.asarray(params[name])).all():
            raise InputError(f"parameter {name} is not finite: give finite numbers.")
    for name in c.relaxes:
        if name not in law_parameters:
            raise InputError(
                f"the constraint {c.name} relaxes {name!r}, which the potential does not have:"
                f" give one of {list(law_parameters)}."
            )
    for name in (*c.relaxes, *c.bounded_by):
        if name in params:
            require_array(name, params[name], f"the constraint {c.name}")


def _check_fixed_bounds(constraints: Sequence[Constraint]) -> None:
    """Raise InputError if a constraint's bounds depend on a parameter that a constraint relaxes.

    A parameter that a constraint relaxes changes with the positions during a relaxation, and bounds
    must not move then.
    """
    relaxes = {name: c.name for c in constraints for name in c.relaxes}
    for c in constraints:
        for name in relaxes.keys() & set(c.bounded_by):
            raise InputError(
                f"the bounds of the constraint {c.name} depend on {name!r}, which the constraint"
                f" {relaxes[name]} relaxes, and bounds cannot move during a relaxation: leave"
                f" `clearance` 0, or keep {name!r} fixed."
            )
