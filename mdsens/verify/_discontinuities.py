"""Locate by bisection the distances at which a pair function or a derivative of it jumps.

Where a derivative jumps, the change of this derivative over an interval is not the integral of the
next derivative.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.compilation import compiled

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
    """A distance r at which a pair function phi(r) or a derivative of phi jumps or diverges.

    Attributes:
      length: the distance r.
      jumps: dict of derivatives that jump at r, by their order (0 is phi itself): the size of the
        jump, right minus left; inf for a derivative that diverges.
    """

    length: float
    jumps: dict[int, float]


def with_derivatives(phi: Callable[..., jax.Array]) -> Evaluate:
    """Make a function that evaluates a pair function phi and its first four derivatives by r.

    The function takes distances r (m,) and the values of the parameters of phi, and returns an
    array (5, m) with phi in the first row. It is compiled once.

    Args:
      phi: function of r and its parameters, which acts elementwise on r.
    """

    def with_next(f: Derivatives) -> Derivatives:
        """Extend a function f of r, which returns phi and its first derivatives, by one derivative.

        The new function returns all values of f, and the derivative of the last value by r.
        """

        def extended(r: jax.Array) -> tuple[jax.Array, ...]:
            # phi acts elementwise: a tangent of ones gives the derivative at each r by itself.
            known, slopes = jax.jvp(f, (r,), (jnp.ones_like(r),))
            return *known, slopes[-1]

        return extended

    @compiled
    def values_of(r: jax.Array, *values: jax.Array) -> jax.Array:
        def phi_alone(r: jax.Array) -> tuple[jax.Array, ...]:
            # phi may return a constant, without the shape of r.
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
            rows = np.asarray(values_of(jnp.asarray(padded), *map(jnp.asarray, values)))
            parts.append(rows[:, : part.size])
        return np.concatenate(parts, axis=1)

    return evaluate


def edges_of(low: float, high: float, points: Sequence[float]) -> np.ndarray:
    """Divide the distances from ``low`` to ``high`` into cells, in which to search for jumps.

    Each edge is the same multiple of the edge before it. In addition, each breakpoint has a narrow
    cell for itself alone, so that it does not hide a jump nearby.

    Args:
      low, high: the smallest and the largest distance.
      points: the declared breakpoints, distances at which a derivative of the potential jumps or
        diverges.

    Returns:
      the edges of the cells, ascending.
    """
    narrow = np.array([p * (1.0 + side * APART) for p in points for side in (-1.0, 1.0)])
    edges = np.unique(np.concatenate([np.geomspace(low, high, CELLS + 1), narrow]))
    kept = (edges >= low) & (edges <= high)
    for p in points:  # other edges must not split the narrow cells
        kept &= ~((edges > p * (1.0 - APART)) & (edges < p * (1.0 + APART)))
    return edges[kept]


def nearby(f: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Estimate the magnitude of a pair function phi and of its derivatives near each distance r.

    The estimate is the largest absolute value among the ten nearest distances on each side, plus
    the magnitudes of the lower derivatives divided by powers of r.

    Args:
      f: (5, m) phi and its first four derivatives at r.
      r: (m,) the distances, ascending.

    Returns:
      (4, m) the magnitudes of phi and of its first three derivatives.
    """
    # Imported here, so that importing this package does not import scipy.ndimage.
    from scipy.ndimage import maximum_filter1d

    size = np.nan_to_num(np.abs(f[:ORDERS]), nan=0.0, posinf=0.0)
    size = maximum_filter1d(size, 2 * NEARBY + 1, axis=1, mode="nearest")
    # In ascending order: size[k - 1] contains the lower orders already, so that order j enters
    # order k as its size over r^(k - j).
    for k in range(1, ORDERS):
        size[k] += size[k - 1] / r
    return size


def _excess(
    a: np.ndarray, b: np.ndarray, fa: np.ndarray, fb: np.ndarray, ga: np.ndarray, gb: np.ndarray
) -> np.ndarray:
    """Compute the jump of a function f in the interval from a to b.

    The jump is f(b) - f(a) minus the integral of the derivative g of f by the trapezoidal rule; g
    is computed by automatic differentiation, and does not contain the jump. Where f is smooth, the
    result is of third order in b - a.

    Args:
      a, b: the ends of the interval.
      fa, fb: f at the two ends.
      ga, gb: g at the two ends.
    """
    # What is not finite counts as no jump here; ``PairFunction._finite`` reports it.
    return np.nan_to_num(fb - fa - 0.5 * (b - a) * (ga + gb), nan=0.0, posinf=0.0, neginf=0.0)


def find_breaks(
    evaluate: Evaluate, values: Sequence[float], edges: np.ndarray, f: np.ndarray | None = None
) -> list[Break]:
    """Locate every jump of a pair function phi and of its first three derivatives, by bisection.

    The distances are divided into cells, a thousandth of the distance wide. Each cell is halved
    repeatedly, separately for phi and each derivative. Of two halves, the one is kept in which the
    change of the function differs more from the integral of the next derivative. Without a jump
    this difference shrinks to round-off; a jump remains. Of two jumps of the same function within a
    cell, the larger is located.

    Args:
      evaluate: function from ``with_derivatives``, which evaluates phi and its derivatives.
      values: values of the parameters of phi.
      edges: (m,) edges of the cells, ascending distances.
      f: (5, m) the result of ``evaluate`` at the edges, if it is known already.

    Returns:
      the jumps, in ascending order of the distance.
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
        """Return a derivative of the pair function phi at distances r, and the next derivative.

        ``order`` is the order of the derivative, 0 for phi itself.
        """
        rows = evaluate(r.ravel(), *values)
        columns = np.arange(r.size)
        order = np.broadcast_to(order, r.shape).ravel()
        return rows[order, columns].reshape(r.shape), rows[order + 1, columns].reshape(r.shape)

    def jump_across(r: np.ndarray, order: np.ndarray, aside: float) -> np.ndarray:
        """Compute the jump of a derivative of the pair function phi at each distance r.

        ``order`` is the order of the derivative, 0 for phi itself. The derivative is evaluated on
        both sides of r, at the relative distance ``aside``.
        """
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
        # a and b are equal to round-off by now, so that either is the place of the jump.
        length = b[order, cell]
        nearer, farther = (jump_across(length, order, aside) for aside in ASIDE)
    return _collect_breaks(length, order, nearer, farther, size[order, cell])


def _collect_breaks(
    length: np.ndarray,
    order: np.ndarray,
    nearer: np.ndarray,
    farther: np.ndarray,
    size: np.ndarray,
) -> list[Break]:
    """Return the candidates that are jumps; jumps at the same distance are one break.

    Args:
      length: (m,) distance of each candidate, ascending.
      order: (m,) order of the derivative that may jump there, 0 for phi itself.
      nearer, farther: (m,) the jump as measured at points very near to the candidate on both sides
        (relative distance 1e-12), and as measured at points farther from it (1e-9).
      size: (m,) magnitude of the derivative nearby.
    """
    breaks: list[Break] = []
    for r, k, near, far, scale in zip(length, order, nearer, farther, size, strict=True):
        if not abs(near) > JUMP * scale:
            continue  # a value at one point alone, such as the mean that maximum() takes at a tie
        if abs(near) < (1.0 - STEADY) * abs(far):
            continue  # continuous, with an infinite slope: the next order diverges
        if not breaks or r - breaks[-1].length > APART * r:
            breaks.append(Break(float(r), {}))
        diverges = abs(near) > (1.0 + STEADY) * abs(far)
        breaks[-1].jumps.setdefault(int(k), np.inf if diverges else float(near))
    return breaks
