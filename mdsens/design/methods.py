"""One step of a design: the change of the variables that a linear model of the features asks for."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from scipy.optimize import minimize

from mdsens._util.errors import InputError
from mdsens._util.validation import check_positive, check_whole, real_number, short

__all__ = ["LevenbergMarquardt", "Optax", "bounded_step", "check_method"]

NUMBERS = "give a tuple of positive numbers, or ()."


@dataclasses.dataclass(frozen=True)
class LevenbergMarquardt:
    """Damped Gauss-Newton steps on the Jacobian of the features, in a trust region, from several
    linear models at once.

    A step s of the variables x is the least one that every model of the features nearby agrees on,

        min |s|^2 / 2 + sum_k |J_k s - t (target - f)|^2 / (2 mu),   low <= x + s <= high,

    each row over its norm, with the largest t up to 1 by which no variable changes more than the
    trust region allows. One of the J_k is the Jacobian at x; the others were met near x a few steps
    ago, tried and refused ones among them. The features of a packing bend, or jump, where a contact
    changes, so that the Jacobian here says nothing of the other side; a step that the Jacobians of
    both sides agree on passes along the bend, where steps on one alone are refused back and forth
    until the trust region is nothing. Others yet are Jacobians at x of the same particles with
    potentials that are averaged over a width of r (:mod:`mdsens.potentials.smoothed`), for pairs
    just within and just beyond contact alike: with them, no step is made for what a single contact
    that has just formed seems to promise.

    Attributes:
      trust: the first radius of the trust region, the largest change of a variable (for one that
        varies by its logarithm, a share); None for where ``changes`` of the contacts change, by the
        crossings that the certificate's radius is made of.
      changes: that share of the contacts.
      largest: the largest radius.
      memory: how many Jacobians are kept beside the one at x.
      reach: how far from x they may have been taken, in radii.
      damping: mu under a root: at 0.03 what two models contradict each other in by less than 3 % of
        a row is followed.
      loosened: features that are met already may leave their tolerance by this share of the way
        that the others still have to go, each in tolerances: held too tightly on the way, they stop
        it.
    """

    trust: float | None = None
    changes: float = 0.03
    largest: float = 0.1
    memory: int = 8
    reach: float = 3.0
    damping: float = 0.03
    loosened: float = 0.1
    widths: tuple[float, ...] = (24.0, 12.0, 6.0, 3.0)

    def __post_init__(self) -> None:
        given = () if self.trust is None else ("trust",)
        check_positive(self, (*given, "changes", "largest", "reach", "damping"))
        if self.loosened != 0:
            check_positive(self, ("loosened",))
        check_whole(self, "memory")
        if not isinstance(self.widths, tuple | list):
            raise InputError(f"{type(self).__name__}(widths={short(self.widths)}): {NUMBERS}")
        widths = tuple(real_number("widths", width, NUMBERS) for width in self.widths)
        if not all(0 < width < np.inf for width in widths):
            raise InputError(f"{type(self).__name__}(widths={short(self.widths)}): {NUMBERS}")
        object.__setattr__(self, "widths", widths)

    def __str__(self) -> str:
        return "Levenberg-Marquardt"


@dataclasses.dataclass(frozen=True)
class Optax:
    """Any optimizer of optax, on half the sum of squares of (feature - target) / tolerance; every
    step is taken.

    Attributes:
      optimizer: such as ``optax.rmsprop(0.002)``; its learning rate is a change of the variables
        (see ``Free.log``).
      name: for tables and figures.
    """

    optimizer: Any
    name: str = "optax"

    def __post_init__(self) -> None:
        if not (
            callable(getattr(self.optimizer, "init", None))
            and callable(getattr(self.optimizer, "update", None))
        ):
            raise InputError(
                f"optimizer is {short(self.optimizer)}: give one of optax, such as"
                " optax.rmsprop(0.002)."
            )

    def __str__(self) -> str:
        return str(self.name)


def check_method(method: Any) -> None:
    """Refuse what is no method of a design."""
    if not isinstance(method, LevenbergMarquardt | Optax):
        raise InputError(
            f"method is {short(method)}: give LevenbergMarquardt() or Optax(optimizer) of"
            " ms.design, or None."
        )


def bounded_step(
    A: np.ndarray, b: np.ndarray, low: np.ndarray, high: np.ndarray, mu: float
) -> np.ndarray:
    """min |s|^2 / 2 + |A s - b|^2 / (2 mu) with low <= s <= high: (p,).

    With few rows and many columns it is solved in its dual, s = clip(A^T y, low, high), over one
    multiplier a row.
    """
    unit = np.eye(len(b))

    def value(y: np.ndarray) -> tuple[float, np.ndarray]:
        free = A.T @ y
        s = np.clip(free, low, high)
        return float(free @ s - 0.5 * s @ s + 0.5 * mu * y @ y - b @ y), A @ s + mu * y - b

    def curvature(y: np.ndarray) -> np.ndarray:
        free = A.T @ y
        inside = A[:, (free > low) & (free < high)]
        return inside @ inside.T + mu * unit

    y = np.linalg.solve(A @ A.T + mu * unit, b)
    size = float(np.linalg.norm(y))
    if size == 0.0:
        return np.clip(np.zeros(A.shape[1]), low, high)
    options = {
        "gtol": 1e-9 * float(np.linalg.norm(b)),
        "initial_trust_radius": size,
        "max_trust_radius": 1e6 * size,
    }
    found = minimize(value, y, jac=True, hess=curvature, method="trust-exact", options=options)
    return np.clip(A.T @ found.x, low, high)
