"""The methods of a design, and the bounded least step on which Levenberg-Marquardt is built."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.validation import check_positive, check_whole, real_number, short

__all__ = ["LevenbergMarquardt", "Optax", "bounded_step", "check_method"]

# The remedy in an error message about ``widths``.
NUMBERS = "give a tuple of positive numbers, or ()."


@dataclasses.dataclass(frozen=True)
class LevenbergMarquardt:
    """Damped Gauss-Newton steps in a trust region, from several Jacobians of the features at once.

    A step s of the variables x is the least one that every linear model of the features nearby
    agrees on,

        min |s|^2 / 2 + sum_k |J_k s - t (target - f)|^2 / (2 mu),   low <= x + s <= high,

    each row divided by its norm, with the largest t up to 1 for which no variable changes by more
    than the radius of the trust region. The J_k are of three kinds:

    - the Jacobian at x;
    - Jacobians computed near x a few steps ago, at refused steps too. The features of a packing
      have a kink or a jump where a contact changes, so the Jacobian on one side does not describe
      the other. A step that the Jacobians of both sides agree on moves along the kink. Steps by one
      Jacobian alone are refused on both sides in turn until the trust region has shrunk to nothing;
    - Jacobians at x, of the same particles, with potentials averaged over a width of r
      (:mod:`mdsens.potentials.smoothed`), for pairs just within and just beyond contact alike. They
      prevent steps that follow what a single contact that has just formed seems to promise.

    Attributes:
      trust: the first radius of the trust region: the largest change of a variable (for a variable
        that is a logarithm, a relative change of the parameter). None chooses the radius at which
        the share ``changes`` of the contacts changes, by the same crossings that the certificate's
        radius is computed from.
      changes: the share of the contacts that may change in the first step where ``trust`` is None.
      largest: the largest radius of the trust region.
      memory: how many earlier Jacobians are kept beside the one at x.
      reach: the largest distance from x at which earlier Jacobians are used, in units of the radius
        of the trust region.
      damping: the square root of mu: at 0.03 a contradiction between two models of less than 3 % of
        a row does not hold the step back.
      loosened: features that are met may leave their tolerance while others are far off, by this
        share of the distance that the farthest one still has to go, each in tolerances. Features
        that are kept too tightly on the way stop the design.
      widths: widths of the averages of the potentials, each a multiple of the root mean square
        motion of pairs in a step as long as the radius; () uses no averaged potentials.
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
        first_radius = () if self.trust is None else ("trust",)
        check_positive(self, (*first_radius, "changes", "largest", "reach", "damping"))
        if self.loosened != 0:
            check_positive(self, ("loosened",))
        check_whole(self, "memory")
        if not isinstance(self.widths, tuple | list):
            raise InputError(f"{type(self).__name__}(widths={short(self.widths)}): {NUMBERS}")
        widths = tuple(real_number("widths", width, NUMBERS) for width in self.widths)
        if not all(0 < width < np.inf for width in widths):
            raise InputError(f"{type(self).__name__}(widths={short(self.widths)}): {NUMBERS}")
        # The record is frozen; a list becomes a tuple, so that it stays hashable.
        object.__setattr__(self, "widths", widths)

    def __str__(self) -> str:
        return "Levenberg-Marquardt"


@dataclasses.dataclass(frozen=True)
class Optax:
    """Any optimizer of optax, applied to half the sum of ((feature - target) / tolerance)^2.

    Every step is taken.

    Attributes:
      optimizer: an optimizer of optax, such as ``optax.rmsprop(0.002)``; its learning rate is a
        change of the variables (the parameters, or their logarithms: see ``Free.log``).
      name: name of the optimizer in tables and figures.
    """

    optimizer: Any
    name: str = "optax"

    def __post_init__(self) -> None:
        # Duck typing: optax is not imported for the sake of a check.
        functions = (getattr(self.optimizer, name, None) for name in ("init", "update"))
        if not all(callable(function) for function in functions):
            raise InputError(
                f"optimizer is {short(self.optimizer)}: give an optimizer of optax, such as"
                " optax.rmsprop(0.002)."
            )

    def __str__(self) -> str:
        return str(self.name)


def check_method(method: object) -> None:
    """Raise InputError for an object that is not a method of a design."""
    if not isinstance(method, LevenbergMarquardt | Optax):
        raise InputError(
            f"method is {short(method)}: give LevenbergMarquardt() or Optax(optimizer) of"
            " ms.design, or None."
        )


def bounded_step(
    A: np.ndarray, b: np.ndarray, low: np.ndarray, high: np.ndarray, mu: float
) -> np.ndarray:
    """Solve min |s|^2 / 2 + |A s - b|^2 / (2 mu) with low <= s <= high: (p,).

    With few rows and many columns it is solved in its dual, s = clip(A^T y, low, high), with one
    multiplier y for each row: with 3 rows and 1,000 columns in 0.6 ms, for which
    ``scipy.optimize.lsq_linear`` takes 2.6 s and gives the same to 1e-13.
    """
    # Imported here, so that importing mdsens does not import scipy.optimize.
    from scipy.optimize import minimize

    unit = np.eye(len(b))

    def value(y: np.ndarray) -> tuple[float, np.ndarray]:
        """The dual function and its gradient."""
        free = A.T @ y
        s = np.clip(free, low, high)
        return float(free @ s - 0.5 * s @ s + 0.5 * mu * y @ y - b @ y), A @ s + mu * y - b

    def curvature(y: np.ndarray) -> np.ndarray:
        """The Hessian of the dual: only variables strictly inside their bounds contribute."""
        free = A.T @ y
        inside = A[:, (free > low) & (free < high)]
        return inside @ inside.T + mu * unit

    y = np.linalg.solve(A @ A.T + mu * unit, b)  # exact where no bound is met
    size = float(np.linalg.norm(y))
    if size == 0.0:
        return np.clip(np.zeros(A.shape[1]), low, high)
    # scipy's defaults for these three are absolute numbers. Here they are relative to the scales of
    # the problem, so that the solution does not depend on the units of b.
    options = {
        "gtol": 1e-9 * float(np.linalg.norm(b)),
        "initial_trust_radius": size,
        "max_trust_radius": 1e6 * size,
    }
    solution = minimize(value, y, jac=True, hess=curvature, method="trust-exact", options=options)
    return np.clip(A.T @ solution.x, low, high)
