"""What a system asks of any constraint, and the check of some against a system."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.validation import short

__all__ = ["Bounds", "Constraint", "check_constraints", "check_name"]

Params = Mapping[str, Any]
Displacement = Callable[[jax.Array, jax.Array], jax.Array]


class Bounds(NamedTuple):
    """Where coordinates may be, (n, d) or as broadcasts to it; infinite where nothing bounds them."""

    lower: jax.Array
    upper: jax.Array


class Constraint:
    """What a system asks of a constraint; each kind overrides what it has to say."""

    name: str

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters of its own, which the system's ``params`` must hold."""
        return ()

    @property
    def relaxes(self) -> tuple[str, ...]:
        """The potential's parameters that become unknowns, relaxed with the positions."""
        return ()

    @property
    def bounded_by(self) -> tuple[str, ...]:
        """The potential's parameters that its bounds depend on."""
        return ()

    def check(self, params: Params, n: int, d: int) -> None:
        """Raise InputError where it does not fit a system of n particles in d dimensions."""

    def pinned(self) -> jax.Array | None:
        """(n, d) coordinates that never move; None for none."""
        return None

    def bounds(
        self, params: Params, diameters: jax.Array | None, shape: tuple[int, ...]
    ) -> Bounds | None:
        """Bounds of the coordinates; None for none."""
        return None

    def least(self) -> float | None:
        """The lower bound of the parameters it relaxes; None for none."""
        return None

    def reach(self, params: Params) -> float:
        """The longest distance between nearest images that it fixes; 0 for none. Host code."""
        return 0.0

    def residuals(
        self, positions: jax.Array, params: Params, displacement: Displacement
    ) -> jax.Array | None:
        """g, of the multiplier's shape, zero where the constraint is met; None where it has no
        equations.
        """
        return None


def check_name(kind: str, name: Any) -> None:
    """Refuse a constraint's name that is no word."""
    if not isinstance(name, str) or not name.isidentifier():
        raise InputError(f"{kind}: name is {short(name)}: give a word, such as {kind.lower()!r}.")


def check_constraints(
    constraints: Any, params: Params, law_parameters: Sequence[str], n: int, d: int
) -> tuple:
    """The constraints as a tuple, checked against a system; raises :class:`InputError`. Host code."""
    if isinstance(constraints, Constraint):
        constraints = (constraints,)
    try:
        found = tuple(constraints)
    except TypeError:
        raise InputError(
            f"constraints is {short(constraints)}: give a list of records of mdsens.constraints."
        ) from None
    names: list[str] = []
    for c in found:
        if not isinstance(c, Constraint):
            raise InputError(
                f"constraints has {short(c)}: give records of mdsens.constraints, such as"
                " Pinned.particles(...)."
            )
        if c.name in names:
            raise InputError(f"two constraints are named {c.name!r}: give each a name of its own.")
        names.append(c.name)
        for name in c.parameters:
            if name in law_parameters:
                raise InputError(
                    f"the potential has a parameter {name!r} as well as {c.name}: give that another name."
                )
            if name not in params:
                raise InputError(f"{c.name} needs the parameter {name!r}: give params[{name!r}].")
            if not np.isfinite(np.asarray(params[name])).all():
                raise InputError(f"parameter {name} is not finite: give finite numbers.")
        for name in c.relaxes:
            if name not in law_parameters:
                raise InputError(
                    f"{c.name} relaxes {name!r}, which the potential has not: give one of"
                    f" {list(law_parameters)}."
                )
        c.check(params, n, d)
    relaxes = {name: c.name for c in found for name in c.relaxes}
    for c in found:
        for name in relaxes.keys() & set(c.bounded_by):
            raise InputError(
                f"{c.name} stands off by {name!r}, which {relaxes[name]} relaxes, and a bound that"
                " moves with an unknown is none: leave its clearance 0, or give that parameter."
            )
    return found
