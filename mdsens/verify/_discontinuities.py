"""Lengths at which a pair function or one of its derivatives jumps, located by bisection.

Where a derivative jumps, its change over an interval is not the integral of the next derivative.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["APART", "ORDERS", "Break", "edges_of", "find_breaks", "nearby", "with_derivatives"]

# Orders that are examined: phi, phi', phi'' and phi'''. A kink of phi'' is a jump of phi'''.
ORDERS = 4
# Cells of the first grid, each a constant ratio of lengths wide.
CELLS = 2000
# Lengths that are evaluated together: with a fixed number, one compilation serves every grid.
WIDTH = 8192
# How often a cell is halved: from a thousandth of r down to round-off.
HALVINGS = 40
# A smaller change, in units of the function's size nearby, is no jump.
JUMP = 1e-5
# How many cells on each side make up the function's size nearby.
NEARBY = 10
# Relative distance below which two breaks are one.
APART = 1e-6
# The two relative distances from a break at which the function is evaluated on both sides for its
# jump, so that the value at the very point does not enter.
ASIDE = (1e-12, 1e-9)
# Relative difference allowed between the jumps measured at those two distances. A change that is
# smaller at the nearer one is no jump; one that is larger there diverges.
STEADY = 0.05
# In units of the function's largest size: added to its size nearby, so that a function that
# underflows to zero does not jump there.
TINY = 1e-30

Evaluate = Callable[..., np.ndarray]
Derivatives = Callable[[jax.Array], tuple[jax.Array, ...]]


@dataclasses.dataclass(frozen=True)
class Break:
    """A length at which phi or one of its derivatives jumps or diverges.

    Attributes:
      length: the distance r of the break.
      jumps: dict by order of the derivative: its jump at r (right minus left); inf where it
        diverges. Orders that do not jump are left out.
    """

    length: float
    jumps: dict[int, float]


def with_derivatives(phi: Callable[..., jax.Array]) -> Evaluate:
    """Make the function (r (m,), *values) -> (ORDERS + 1, m): phi and its derivatives by r.

    phi acts elementwise on r. The function is compiled once.
    """

    def with_next(f: Derivatives) -> Derivatives:
        """The function that returns what f does, and the derivative of the last."""

        def extended(r: jax.Array) -> tuple[jax.Array, ...]:
            known, slopes = jax.jvp(f, (r,), (jnp.ones_like(r),))
            return *known, slopes[-1]

        return extended

    @jax.jit
    def compiled(r: jax.Array, *values: jax.Array) -> jax.Array:
        def phi_alone(r: jax.Array) -> tuple[jax.Array, ...]:
            return (jnp.broadcast_to(phi(r, *values), r.shape),)

        f: Derivatives = phi_alone
        for _ in range(ORDERS):
            f = with_next(f)
        return jnp.stack(f(r))

    def evaluate(r: np.ndarray, *values: float) -> np.ndarray:
        parts = []
        for start in range(0, r.size, WIDTH):
            part = r[start : start + WIDTH]
            padded = np.concatenate([part, np.full(WIDTH - part.size, part[-1])])
            rows = np.asarray(compiled(jnp.asarray(padded), *map(jnp.asarray, values)))
            parts.append(rows[:, : part.size])
        return np.concatenate(parts, axis=1)

    return evaluate


def edges_of(low: float, high: float, points: Sequence[float]) -> np.ndarray:
    """Make the edges of the first grid: equal ratios, and a narrow cell at each breakpoint.

    Args:
      points: the declared breakpoints, distances at which a derivative jumps or diverges. Each is
        alone in its narrow cell, so that it does not hide another break nearby.
    """
    narrow = np.array([p * (1.0 + side * APART) for p in points for side in (-1.0, 1.0)])
    edges = np.unique(np.concatenate([np.geomspace(low, high, CELLS + 1), narrow]))
    kept = (edges >= low) & (edges <= high)
    for p in points:  # other edges must not split the narrow cells
        kept &= ~((edges > p * (1.0 - APART)) & (edges < p * (1.0 + APART)))
    return edges[kept]


def nearby(f: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Estimate the magnitude of phi and its derivatives near each r, (ORDERS, m).

    The estimate is the largest absolute value among some cells on each side, plus the magnitudes of
    the lower orders over powers of r.
    """
    # Imported here, so that importing this package does not import scipy.ndimage.
    from scipy.ndimage import maximum_filter1d

    size = np.nan_to_num(np.abs(f[:ORDERS]), nan=0.0, posinf=0.0)
    size = maximum_filter1d(size, 2 * NEARBY + 1, axis=1, mode="nearest")
    for k in range(1, ORDERS):
        size[k] += size[k - 1] / r
    return size


def _excess(
    a: np.ndarray, b: np.ndarray, fa: np.ndarray, fb: np.ndarray, ga: np.ndarray, gb: np.ndarray
) -> np.ndarray:
    """Compute f(b) - f(a) minus the integral of the derivative g of f, by the trapezoidal rule.

    This is the jump of f between a and b; where f is smooth it is of third order in b - a. A
    derivative by automatic differentiation does not contain the jump.
    """
    return np.nan_to_num(fb - fa - 0.5 * (b - a) * (ga + gb), nan=0.0, posinf=0.0, neginf=0.0)


def find_breaks(
    evaluate: Evaluate, values: Sequence[float], edges: np.ndarray, f: np.ndarray | None = None
) -> list[Break]:
    """Locate every jump of phi, phi', phi'' and phi''' between the edges, in ascending order.

    Each cell is halved, for each order separately, towards the half whose change differs more from
    the integral of the next derivative. Where nothing jumps that difference shrinks to round-off; a
    jump stays. Of two jumps of one order within a cell, which is a thousandth of r wide, the larger
    is located.

    Args:
      evaluate: function from ``with_derivatives``.
      values: values of the parameters of phi.
      edges: (m,) edges of the cells.
      f: (ORDERS + 1, m) the result of ``evaluate`` at the edges, where it is known already.
    """
    f = evaluate(edges, *values) if f is None else f
    size = nearby(f, edges)
    size = np.maximum(size[:, :-1], size[:, 1:])
    # The ends of every cell, a row for each order, (ORDERS, m - 1); there the function f of that
    # order, and its derivative g.
    a, b = (np.repeat(side[None], ORDERS, axis=0) for side in (edges[:-1], edges[1:]))
    fa, fb = f[:-1, :-1], f[:-1, 1:]
    ga, gb = f[1:, :-1], f[1:, 1:]

    def value_and_slope(r: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The derivative of phi of each order at each length, and the next one."""
        rows = evaluate(r.ravel(), *values)
        columns = np.arange(r.size)
        order = np.broadcast_to(order, r.shape).ravel()
        return rows[order, columns].reshape(r.shape), rows[order + 1, columns].reshape(r.shape)

    def jump_across(r: np.ndarray, order: np.ndarray, aside: float) -> np.ndarray:
        """The jump of each order across each length."""
        before = r * (1.0 - aside)
        after = r * (1.0 + aside)
        f_before, g_before = value_and_slope(before, order)
        f_after, g_after = value_and_slope(after, order)
        return _excess(before, after, f_before, f_after, g_before, g_after)

    with np.errstate(invalid="ignore", over="ignore"):
        for _ in range(HALVINGS):
            c = 0.5 * (a + b)
            fc, gc = value_and_slope(c, np.arange(ORDERS)[:, None])
            lower = np.abs(_excess(a, c, fa, fc, ga, gc)) >= np.abs(_excess(c, b, fc, fb, gc, gb))
            a, fa, ga = (np.where(lower, old, new) for old, new in ((a, c), (fa, fc), (ga, gc)))
            b, fb, gb = (np.where(lower, new, old) for old, new in ((b, c), (fb, fc), (gb, gc)))
        threshold = JUMP * (size + TINY * size.max(axis=1, keepdims=True))
        rough = np.abs(_excess(a, b, fa, fb, ga, gb)) > threshold
        # Transposed: the candidates come by cell first, and so in ascending order of r.
        cell, order = np.nonzero(rough.T)
        if not cell.size:
            return []
        length = b[order, cell]
        nearer, farther = (jump_across(length, order, aside) for aside in ASIDE)
    breaks: list[Break] = []
    for r, k, near, far, scale in zip(
        length, order, nearer, farther, size[order, cell], strict=True
    ):
        if not abs(near) > JUMP * scale:
            continue  # a value at one point alone, such as the mean that maximum() takes at a tie
        if abs(near) < (1.0 - STEADY) * abs(far):
            continue  # continuous, with an infinite slope: the next order diverges
        if not breaks or r - breaks[-1].length > APART * r:
            breaks.append(Break(float(r), {}))
        diverges = abs(near) > (1.0 + STEADY) * abs(far)
        breaks[-1].jumps.setdefault(int(k), np.inf if diverges else float(near))
    return breaks
