"""The interface of a constraint, and the check of a system's constraints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.validation import short

__all__ = ["Bounds", "Constraint", "check_constraints", "check_name"]

Params = Mapping[str, Any]
Displacement = Callable[[jax.Array, jax.Array], jax.Array]


class Bounds(NamedTuple):
    """Bounds of the coordinates, broadcastable to (n, d); infinite where unbounded."""

    lower: jax.Array
    upper: jax.Array


class Constraint:
    """Base class of all constraints, which constrains nothing. Each kind overrides some methods."""

    name: str

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the constraint's parameters, which the system's ``params`` must contain."""
        return ()

    @property
    def relaxes(self) -> tuple[str, ...]:
        """Names of the potential's parameters that the constraint relaxes with the positions."""
        return ()

    @property
    def bounded_by(self) -> tuple[str, ...]:
        """The names of the potential's parameters that the constraint's bounds depend on."""
        return ()

    def check(self, params: Params, n: int, d: int) -> None:
        """Raise InputError if the constraint does not fit n particles in d dimensions."""

    def pinned(self) -> jax.Array | None:
        """Mask (n, d) of the coordinates that never move; None where all may move."""
        return None

    def bounds(
        self, params: Params, diameters: jax.Array | None, shape: tuple[int, ...]
    ) -> Bounds | None:
        """Return the bounds of the coordinates; None without bounds."""
        return None

    def least(self) -> float | None:
        """The lower bound of the parameters that the constraint relaxes; None without a bound."""
        return None

    def reach(self, params: Params) -> float:
        """Return the longest distance between nearest images that is fixed; 0 where none is."""
        return 0.0

    def residuals(
        self, positions: jax.Array, params: Params, displacement: Displacement
    ) -> jax.Array | None:
        """Return the residuals g, zero where the constraint holds; None without equations.

        g has the shape of the multiplier.
        """
        return None


def check_name(kind: str, name: object) -> None:
    """Raise InputError where a constraint's name is not an identifier."""
    if not isinstance(name, str) or not name.isidentifier():
        raise InputError(f"{kind}: name is {short(name)}: give a word, such as {kind.lower()!r}.")


def check_constraints(
    constraints: Constraint | Iterable[Constraint],
    params: Params,
    law_parameters: Sequence[str],
    n: int,
    d: int,
) -> tuple[Constraint, ...]:
    """Return the constraints as a tuple, checked against a system. Not for compiled code.

    Args:
      constraints: a constraint or an iterable of them.
      params: the parameters of the potential and of the constraints.
      law_parameters: names of the potential's parameters.
      n, d: particles and dimensions of the system.

    Raises:
      InputError: a constraint does not fit; the message says which and why.
    """
    if isinstance(constraints, Constraint):
        constraints = (constraints,)
    try:
        records = tuple(constraints)
    except TypeError:
        raise InputError(
            f"constraints is {short(constraints)}: give a list of records of mdsens.constraints."
        ) from None
    names: list[str] = []  # multipliers are stored by them
    for c in records:
        if not isinstance(c, Constraint):
            raise InputError(
                f"constraints has {short(c)}: give records of mdsens.constraints, such as"
                " Pinned.particles(...)."
            )
        if c.name in names:
            raise InputError(f"two constraints are named {c.name!r}: give each a different name.")
        names.append(c.name)
        for name in c.parameters:
            if name in law_parameters:
                raise InputError(
                    f"the potential and the constraint {c.name} both have a parameter {name!r}:"
                    " give the constraint another name."
                )
            if name not in params:
                raise InputError(f"{c.name} needs the parameter {name!r}: give params[{name!r}].")
            # the potential checks its parameters itself, but not these
            if not np.isfinite(np.asarray(params[name])).all():
                raise InputError(f"parameter {name} is not finite: give finite numbers.")
        for name in c.relaxes:
            if name not in law_parameters:
                raise InputError(
                    f"{c.name} relaxes {name!r}, which is not a parameter of the potential: give"
                    f" one of {list(law_parameters)}."
                )
        c.check(params, n, d)
    # Only after all are known: the constraint that relaxes a parameter may come after the one whose
    # bounds depend on it.
    relaxes = {name: c.name for c in records for name in c.relaxes}
    for c in records:
        for name in relaxes.keys() & set(c.bounded_by):
            raise InputError(
                f"{c.name} has bounds that depend on {name!r}, which {relaxes[name]} relaxes:"
                " bounds cannot move with an unknown, so leave the clearance 0, or keep"
                f" {name!r} fixed."
            )
    return records
