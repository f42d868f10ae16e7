"""Where a function of one length and its derivatives jump: found by bisection against their own
integrals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["APART", "ORDERS", "Break", "edges_of", "find_breaks", "nearby", "with_derivatives"]

ORDERS = 4  # phi, phi', phi'', phi''': a kink of phi'' is a jump of phi'''
CELLS = 2000  # of the first grid, of equal ratio
WIDTH = 8192  # lengths evaluated together: one compilation serves every grid
HALVINGS = 40  # of a cell of a thousandth of r, down to round-off
JUMP = 1e-5  # of the function's size nearby; what is less is no jump
NEARBY = 10  # cells to each side that make up a function's size nearby
APART = 1e-6  # of r: breaks nearer than this are one
ASIDE = (
    1e-12,
    1e-9,
)  # of r: a jump is taken from so far on both sides, free of what phi does at the very point
STEADY = (
    0.05  # by how much a jump may differ between the two: what shrinks is none, what grows diverges
)
TINY = 1e-30  # of the function's largest size

Evaluate = Callable[..., np.ndarray]
Derivatives = Callable[[jax.Array], tuple[jax.Array, ...]]


@dataclasses.dataclass(frozen=True)
class Break:
    """A length at which a derivative jumps or diverges.

    Attributes:
      length: r.
      jumps: the jump (right less left) of each order that has one; inf where it diverges.
    """

    length: float
    jumps: dict[int, float]


def with_derivatives(phi: Callable[..., jax.Array]) -> Evaluate:
    """``(r (m,), *values) -> (ORDERS + 1, m)``: phi, elementwise, and its derivatives by r.
    Compiled once.
    """

    def raised(f: Derivatives) -> Derivatives:
        """The same with one derivative more."""

        def more(r: jax.Array) -> tuple[jax.Array, ...]:
            known, slopes = jax.jvp(f, (r,), (jnp.ones_like(r),))
            return *known, slopes[-1]

        return more

    @jax.jit
    def compiled(r: jax.Array, *values: jax.Array) -> jax.Array:
        def alone(r: jax.Array) -> tuple[jax.Array, ...]:
            return (jnp.broadcast_to(phi(r, *values), r.shape),)

        f: Derivatives = alone
        for _ in range(ORDERS):
            f = raised(f)
        return jnp.stack(f(r))

    def evaluate(r: np.ndarray, *values: float) -> np.ndarray:
        parts = []
        for start in range(0, r.size, WIDTH):
            part = r[start : start + WIDTH]
            padded = np.concatenate([part, np.full(WIDTH - part.size, part[-1])])
            parts.append(
                np.asarray(compiled(jnp.asarray(padded), *map(jnp.asarray, values)))[:, : part.size]
            )
        return np.concatenate(parts, axis=1)

    return evaluate


def edges_of(low: float, high: float, points: Sequence[float]) -> np.ndarray:
    """The first grid: equal ratios from ``low`` to ``high``, with a narrow cell of its own around
    each point.
    """
    own = np.array([p * (1.0 + side * APART) for p in points for side in (-1.0, 1.0)])
    edges = np.unique(np.concatenate([np.geomspace(low, high, CELLS + 1), own]))
    kept = (edges >= low) & (edges <= high)
    for p in points:  # the grid's own edges must not split the narrow cells
        kept &= ~((edges > p * (1.0 - APART)) & (edges < p * (1.0 + APART)))
    return edges[kept]


def nearby(f: np.ndarray, r: np.ndarray) -> np.ndarray:
    """The size of each derivative near each r, (ORDERS, m): that of the lower orders over powers of
    r included.
    """
    from scipy.ndimage import maximum_filter1d

    size = np.nan_to_num(np.abs(f[:ORDERS]), nan=0.0, posinf=0.0)
    size = maximum_filter1d(size, 2 * NEARBY + 1, axis=1, mode="nearest")
    for k in range(1, ORDERS):
        size[k] += size[k - 1] / r
    return size


def _excess(
    a: np.ndarray, b: np.ndarray, fa: np.ndarray, fb: np.ndarray, ga: np.ndarray, gb: np.ndarray
) -> np.ndarray:
    """f(b) - f(a) less the trapezoid of its derivative g: the jump, or of third order in b - a
    where f is smooth.

    What autodiff calls f' knows nothing of a jump of f.
    """
    return np.nan_to_num(fb - fa - 0.5 * (b - a) * (ga + gb), nan=0.0, posinf=0.0, neginf=0.0)


def find_breaks(
    evaluate: Evaluate, values: Sequence[float], edges: np.ndarray, f: np.ndarray | None = None
) -> list[Break]:
    """Every jump of phi, phi', phi'' and phi''' between the edges, rising.

    Each cell is halved, for each order by itself, towards the half whose change is not the integral
    of the next derivative. Where nothing jumps that difference shrinks to round-off; a jump stays.
    Of two jumps of one order within a cell, a thousandth of r wide, the larger is found.

    Args:
      evaluate: from ``with_derivatives``.
      values: of phi's parameters.
      edges: (m,) of the cells.
      f: (ORDERS + 1, m) what ``evaluate`` gives there, where it is known.
    """
    f = evaluate(edges, *values) if f is None else f
    size = nearby(f, edges)
    size = np.maximum(size[:, :-1], size[:, 1:])
    a, b = (np.repeat(side[None], ORDERS, axis=0) for side in (edges[:-1], edges[1:]))
    fa, fb, ga, gb = f[:-1, :-1], f[:-1, 1:], f[1:, :-1], f[1:, 1:]

    def at(r: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """At each length the function of one order, and its derivative."""
        rows, each = evaluate(r.ravel(), *values), np.arange(r.size)
        which = np.broadcast_to(which, r.shape).ravel()
        return rows[which, each].reshape(r.shape), rows[which + 1, each].reshape(r.shape)

    def across(r: np.ndarray, which: np.ndarray, aside: float) -> np.ndarray:
        """The jump of one order across each length."""
        before, after = r * (1.0 - aside), r * (1.0 + aside)
        (fa, ga), (fb, gb) = at(before, which), at(after, which)
        return _excess(before, after, fa, fb, ga, gb)

    with np.errstate(invalid="ignore", over="ignore"):
        for _ in range(HALVINGS):
            c = 0.5 * (a + b)
            fc, gc = at(c, np.arange(ORDERS)[:, None])
            lower = np.abs(_excess(a, c, fa, fc, ga, gc)) >= np.abs(_excess(c, b, fc, fb, gc, gb))
            a, fa, ga = (np.where(lower, old, new) for old, new in ((a, c), (fa, fc), (ga, gc)))
            b, fb, gb = (np.where(lower, new, old) for old, new in ((b, c), (fb, fc), (gb, gc)))
        # f at its smallest may underflow, and that is no jump
        rough = np.abs(_excess(a, b, fa, fb, ga, gb)) > JUMP * (
            size + TINY * size.max(axis=1, keepdims=True)
        )
        cell, order = np.nonzero(rough.T)
        if not cell.size:
            return []
        length = b[order, cell]
        nearer, farther = (across(length, order, aside) for aside in ASIDE)
    found: list[Break] = []
    for r, k, near, far, own in zip(length, order, nearer, farther, size[order, cell], strict=True):
        if not abs(near) > JUMP * own:
            continue  # a value at one point alone, such as the mean that maximum() takes at a tie
        if abs(near) < (1.0 - STEADY) * abs(far):
            continue  # continuous, of infinite slope: the next order diverges
        if not found or r - found[-1].length > APART * r:
            found.append(Break(float(r), {}))
        found[-1].jumps.setdefault(
            int(k), np.inf if abs(near) > (1.0 + STEADY) * abs(far) else float(near)
        )
    return found
