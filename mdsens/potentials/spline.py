"""Cubic splines through equidistant knots, linear in the values at the knots.

The spline is twice continuously differentiable. At its ends it is one cubic polynomial over the
first two intervals, and one over the last two ("not-a-knot"), as in scipy's ``CubicSpline``. Source
of the equations: de Boor, A Practical Guide to Splines, chapter IV.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["FEWEST_KNOTS", "Spline", "spline"]

FEWEST_KNOTS = 4

# Distances of the knots that are combined in each step of the elimination below. After the last,
# what couples knots 32 apart is 1e-18 of the diagonal, and is left out.
_STEPS = (1, 2, 4, 8, 16)


class Spline(NamedTuple):
    """Splines with the same knots, x = 0, spacing, 2 spacing, …

    Attributes:
      coefficients: four arrays (rows, N - 1), the factors of 1, t, t^2 and t^3 in each of the N - 1
        intervals of each spline, with t from 0 to 1 in the interval.
      spacing: distance of two knots.
    """

    coefficients: tuple[jax.Array, ...]
    spacing: float

    @property
    def rows(self) -> int:
        """The number of splines."""
        return self.coefficients[0].shape[0]

    @property
    def end(self) -> float:
        """The place of the last knot."""
        return self.coefficients[0].shape[1] * self.spacing

    def __call__(self, x: jax.Array, row: jax.Array | int = 0) -> jax.Array:
        """Evaluate the splines with the numbers ``row`` at x.

        Outside of the knots the cubic polynomial of the first or the last interval continues.
        """
        count = self.coefficients[0].shape[1]
        scaled = x / self.spacing
        knot = jnp.clip(jax.lax.stop_gradient(scaled).astype(jnp.int32), 0, count - 1)
        t = scaled - knot
        place = row * count + knot
        # the place is within the array, which jax need not check
        zeroth, first, second, third = (
            array.ravel().at[place].get(mode="promise_in_bounds", wrap_negative_indices=False)
            for array in self.coefficients
        )
        return zeroth + t * (first + t * (second + t * third))

    def slope_at_end(self, row: jax.Array | int = 0) -> jax.Array:
        """Compute the first derivative at the last knot of the splines with the numbers ``row``."""
        _, first, second, third = (array[row, -1] for array in self.coefficients)
        return (first + 2.0 * second + 3.0 * third) / self.spacing


def spline(values: jax.Array, spacing: float) -> Spline:
    """Make the splines through values (rows, N) at knots that are ``spacing`` apart, N >= 4.

    The second derivatives M at the knots obey, with the second differences D of the values,

        M_(k-1) + 4 M_k + M_(k+1) = 6 D_k

    and at the ends M_1 = D_1 and M_(N-2) = D_(N-2), where the third derivative does not jump.
    """
    differences = (values[:, :-2] - 2.0 * values[:, 1:-1] + values[:, 2:]) / spacing**2
    first = differences[:, :1]
    last = differences[:, -1:]
    # A straight line solves the equations where D is that line. What remains is zero at both ends.
    line = first + (last - first) * np.linspace(0.0, 1.0, differences.shape[1])
    inner = line + _solved(6.0 * (differences - line))
    left = 2.0 * inner[:, :1] - inner[:, 1:2]
    right = 2.0 * inner[:, -1:] - inner[:, -2:-1]
    bends = jnp.concatenate([left, inner, right], axis=1) * (spacing**2 / 6.0)
    rises = values[:, 1:] - values[:, :-1]
    slopes = rises - 2.0 * bends[:, :-1] - bends[:, 1:]
    coefficients = (values[:, :-1], slopes, 3.0 * bends[:, :-1], bends[:, 1:] - bends[:, :-1])
    return Spline(coefficients, spacing)


def _solved(right: jax.Array) -> jax.Array:
    """Solve x_(k-1) + 4 x_k + x_(k+1) = right_k, where right and x are zero at both ends.

    By elimination: with E_s x = x_(k-s) + x_(k+s), (4 + E_1) (4 - E_1) = 14 - E_2, then
    (14 - E_2) (14 + E_2) = 194 - E_4, and so on, until the diagonal is all that counts. Every step
    is elementwise, and serves at all knots at once. An odd reflection at both ends keeps the zeros
    there.
    """
    reach = sum(_STEPS)
    x = jnp.pad(right, ((0, 0), (reach, reach)), mode="reflect", reflect_type="odd")
    diagonal = 4.0
    sign = -1.0
    x = x / diagonal
    for step in _STEPS:
        following = diagonal * diagonal - 2.0
        coupled = x[:, : -2 * step] + x[:, 2 * step :]
        x = (diagonal / following) * (diagonal * x[:, step:-step] + sign * coupled)
        diagonal = following
        sign = 1.0
    return x
