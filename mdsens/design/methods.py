"""Methods that choose the steps of an inverse design: Levenberg-Marquardt, and optax."""

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

    A feature is a property of the relaxed systems with a target value. A variable is a free
    component of a parameter, or its logarithm. A step s from the variables x is the shortest one
    with which several linear models of the features f approach the targets together,

        min |s|^2 / 2 + sum_k |J_k s - t (target - f)|^2 / (2 mu),   low <= x + s <= high.

    J_k is the Jacobian of the features in model k. Each row of J_k belongs to one feature. The row
    and the feature's component of t (target - f) are both divided by the norm of the row. low and
    high are the bounds of the variables. t is 1, or less where a variable would otherwise change by
    more than the radius of the trust region; for features within the tolerance of their target t is
    always 1. The Jacobians J_k are of three kinds:

    - the Jacobian at x;
    - Jacobians computed near x in earlier steps, refused steps included. The features of a packing
      have a kink or a jump where a contact opens or closes, so that the Jacobian on one side does
      not describe the other side. A step from the Jacobians of both sides moves along the kink.
      With the Jacobian of one side alone, steps are refused on both sides in turn, until the trust
      region has shrunk to nothing;
    - Jacobians at x for the same particle positions and averaged pair potentials. For a width w,
      the potential at the distance r is its average over distances from r - w to r + w
      (:mod:`mdsens.potentials.smoothed`). The average treats pairs just within and just beyond
      contact alike. These Jacobians prevent steps that rely on the derivative due to a single
      contact that has just formed.

    Attributes:
      trust: the first radius of the trust region: the largest change of a variable (for a variable
        that is a logarithm, a relative change of the parameter). None chooses the radius at which
        the fraction ``changes`` of the contacts opens or closes. The changes of contacts are
        predicted to first order, as in the certificate of a derivative.
      changes: the fraction of the contacts that may open or close in the first step, where
        ``trust`` is None.
      largest: the largest radius of the trust region.
      memory: how many earlier Jacobians are kept in addition to the Jacobian at x.
      reach: the largest distance from x at which earlier Jacobians are used, in units of the radius
        of the trust region.
      damping: the square root of mu. At 0.03, a contradiction between two models does not shorten
        the step if their rows for a feature differ by less than 3 % of the norm of a row.
      loosened: how far features that have met their targets may leave them again while others are
        far from theirs, as a fraction of the largest distance of any feature from its target. Each
        distance is in units of the tolerance of its target. Without this freedom, features that
        have met their targets can stop the design.
      widths: the widths w of the averaged potentials; () uses no averaged potentials. The unit is
        the root mean square change of r - b over the pairs, in a step that is as long as the radius
        of the trust region. r is the distance of a pair, and b its breakpoint, such as contact.
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
        widths = tuple(real_number("`widths`", width, NUMBERS) for width in self.widths)
        if not all(0 < width < np.inf for width in widths):
            raise InputError(f"{type(self).__name__}(widths={short(self.widths)}): {NUMBERS}")
        # The record is frozen; a list becomes a tuple, so that it stays hashable.
        object.__setattr__(self, "widths", widths)

    def __str__(self) -> str:
        return "Levenberg-Marquardt"


@dataclasses.dataclass(frozen=True)
class Optax:
    """Any optimizer of optax, applied to half the sum of ((feature - target) / tolerance)^2.

    The sum is over the features, that is, the properties that the design is to bring to target
    values. Steps are accepted even if the sum grows. A step is refused, and the next one halved,
    only where the features could be computed for less than half of the systems.

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
                f"`optimizer` is {short(self.optimizer)}: give an optimizer of optax, such as"
                " optax.rmsprop(0.002)."
            )

    def __str__(self) -> str:
        return str(self.name)


def check_method(method: object) -> None:
    """Raise InputError unless ``method`` is a ``LevenbergMarquardt`` or an ``Optax``."""
    if not isinstance(method, LevenbergMarquardt | Optax):
        raise InputError(
            f"`method` is {short(method)}: give LevenbergMarquardt() or Optax(optimizer) of"
            " ms.design, or None."
        )


def bounded_step(
    A: np.ndarray, b: np.ndarray, low: np.ndarray, high: np.ndarray, mu: float
) -> np.ndarray:
    """Return the vector s that minimizes |s|^2 / 2 + |A s - b|^2 / (2 mu) with low <= s <= high.

    The matrix A has few rows and many columns. The solution therefore uses the dual problem,
    s = clip(A^T y, low, high), whose unknowns y are one multiplier for each row of A. For 3 rows
    and 1,000 columns this takes 0.6 ms; ``scipy.optimize.lsq_linear`` takes 2.6 s and gives the
    same s to 1e-13.

    Args:
      A: (m, p) matrix.
      b: (m,) right-hand side.
      low, high: (p,) bounds of s.
      mu: positive number; the smaller, the closer A s comes to b.
    """
    # Imported here, so that importing mdsens does not import scipy.optimize.
    from scipy.optimize import minimize

    unit = np.eye(len(b))

    def value(y: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the value and the gradient, at y, of the function that the dual problem minimizes.

        It is the dual of the least squares problem with bounds that ``bounded_step`` solves; y has
        one multiplier for each row of the matrix A.
        """
        free = A.T @ y
        s = np.clip(free, low, high)
        # (A^T y) s - |s|^2 / 2 at its maximum over s within the bounds, s = clip(A^T y), plus
        # mu |y|^2 / 2 - b y; the gradient is zero where b - A s = mu y.
        return float(free @ s - 0.5 * s @ s + 0.5 * mu * y @ y - b @ y), A @ s + mu * y - b

    def curvature(y: np.ndarray) -> np.ndarray:
        """Return the Hessian, at y, of the function that the dual problem minimizes.

        It is the dual of the least squares problem with bounds that ``bounded_step`` solves; y has
        one multiplier for each row of the matrix A. Only components of A^T y that are strictly
        inside the bounds contribute.
        """
        free = A.T @ y
        inside = A[:, (free > low) & (free < high)]
        return inside @ inside.T + mu * unit

    y = np.linalg.solve(A @ A.T + mu * unit, b)  # exact where no bound is met
    size = float(np.linalg.norm(y))
    # b is zero, and no step is needed; scipy refuses a trust region of radius 0.
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
