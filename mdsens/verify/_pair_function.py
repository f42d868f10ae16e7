"""What a pair function promises: smooth where it says so, zero where it says so, finite
derivatives.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens.potentials.base import BondedPotential, PairTerm
from mdsens.verify._discontinuities import (
    APART,
    Break,
    Evaluate,
    edges_of,
    find_breaks,
    nearby,
    with_derivatives,
)
from mdsens.verify._findings import Finding

__all__ = ["PairFunction"]

# different pairs of a potential that are looked at, at most; and places of a rough one that are told
KINDS = 6
NEAR, FAR = 0.2, 3.0  # of the distance of least energy: where a pair function is looked at
BEYOND = 1.2  # of the cutoff, likewise
ROUND_OFF = 1e-10  # of what should be zero
NAMES = ("phi", "phi'", "phi''", "phi'''")


@dataclasses.dataclass(frozen=True)
class _Kind:
    """One kind of pair: its parameters' values, and phi with its derivatives along r.

    Attributes:
      label: the values by name.
      values: of phi's parameters.
      points: the declared breakpoints, rising.
      cutoff: where phi must end; inf where nothing is said.
      least: the distance of least energy; 1 where there is none.
      r: (m,) where phi was looked at.
      f: (ORDERS + 1, m) phi and its derivatives there.
      breaks: what was found to jump.
    """

    label: str
    values: tuple[float, ...]
    points: tuple[float, ...]
    cutoff: float
    least: float
    r: np.ndarray
    f: np.ndarray
    breaks: list[Break]

    def declared(self, found: Break) -> bool:
        """Whether a breakpoint is declared there."""
        return any(abs(found.length - p) <= APART * p for p in self.points)

    def jump(self, point: float, order: int) -> float:
        """The jump of one order at a declared breakpoint."""
        return next(
            (
                b.jumps.get(order, 0.0)
                for b in self.breaks
                if abs(b.length - point) <= APART * point
            ),
            0.0,
        )


class PairFunction:
    """phi(r) of one potential for its different pairs, and what the checks find of it."""

    def __init__(self, potential: Any, term: PairTerm, between: tuple[float, float] | None):
        self.potential, self.phi = potential, term.phi
        self.names: tuple[str, ...] = tuple(potential.parameters)
        self.bonded = isinstance(potential, BondedPotential)
        self.evaluate = with_derivatives(term.phi)
        columns = [np.broadcast_to(np.asarray(v, float), term.i.shape) for v in term.values]
        rows = np.unique(np.stack(columns, axis=1), axis=0) if columns else np.zeros((1, 0))
        chosen = np.unique(np.linspace(0, len(rows) - 1, KINDS).astype(int)) if len(rows) else []
        self.kinds = [self._kind(tuple(map(float, rows[k])), term, between) for k in chosen]

    def _kind(
        self, values: tuple[float, ...], term: PairTerm, between: tuple[float, float] | None
    ) -> _Kind:
        arrays = tuple(map(jnp.asarray, values))
        label = ", ".join(f"{name} = {v:.6g}" for name, v in zip(self.names, values, strict=True))
        points = tuple(
            sorted({p for p in map(float, term.breakpoints(*arrays)) if 0 < p < math.inf})
        )
        cutoff = (
            math.inf
            if self.bonded
            else float(self.potential.range(dict(zip(self.names, arrays, strict=True))))
        )
        least = _least(self.evaluate, values, cutoff)
        low, high = NEAR * least, BEYOND * cutoff if math.isfinite(cutoff) else FAR * least
        if points:
            low, high = min(low, 0.5 * points[0]), max(high, BEYOND * points[-1])
        edges = edges_of(*(between or (low, high)), points)
        f = self.evaluate(edges, *values)
        breaks = find_breaks(self.evaluate, values, edges, f)
        return _Kind(
            f" with {label}" if label else "", values, points, cutoff, least, edges, f, breaks
        )

    def findings(self) -> Iterator[Finding]:
        """One a declared breakpoint, one or more on what is not declared, then the rest."""
        if not self.kinds:
            yield Finding(
                "pairs",
                False,
                "there is none, so that nothing was looked at: give bonds or more particles.",
            )
            return
        for k in range(max(len(kind.points) for kind in self.kinds)):
            yield self._at_declared(k)
        yield from self._elsewhere()
        if any(math.isfinite(kind.cutoff) for kind in self.kinds):
            yield self._beyond()
        if self.potential.repulsive:
            yield self._repels()
        yield self._finite()

    def _at_declared(self, k: int) -> Finding:
        kinds = [kind for kind in self.kinds if len(kind.points) > k]
        where = _span([kind.points[k] for kind in kinds])
        kinds = [kind for kind in kinds if kind.r[0] < kind.points[k] < kind.r[-1]]
        if not kinds:
            return Finding(
                f"breakpoint {k + 1}", True, f"declared at {where}, not between the lengths given."
            )
        largest = [
            max((kind.jump(kind.points[k], order) for kind in kinds), key=abs)
            for order in range(len(NAMES))
        ]
        smooth = [name for name, jump in zip(NAMES[:-1], largest, strict=False) if not jump]
        parts = [f"{_listed(smooth)} continuous"] if smooth else []
        parts += [
            f"{name} {_jumps(jump)}" for name, jump in zip(NAMES, largest, strict=True) if jump
        ]
        good = not largest[0] and not largest[1]
        remedy = (
            ""
            if good
            else "; no minimum can stand there: shift phi, or wrap it in ms.potentials.switched"
        )
        return Finding(
            f"breakpoint {k + 1}", good, f"declared at {where}: {', '.join(parts)}{remedy}."
        )

    def _elsewhere(self) -> Iterator[Finding]:
        found = [(kind, b) for kind in self.kinds for b in kind.breaks if not kind.declared(b)]
        for kind, b in found[:KINDS]:
            said = ", ".join(
                f"{NAMES[order]} {_jumps(jump)}" for order, jump in sorted(b.jumps.items())
            )
            remedy = "declare it in breakpoints=, or the radius of a sensitivity does not see it"
            if self.bonded:
                remedy = (
                    "bonds declare no breakpoint, and the radius of a sensitivity does not see it"
                )
            if 0 in b.jumps or 1 in b.jumps:
                remedy = "no minimum can stand there: make phi and phi' continuous"
            yield Finding(
                "undeclared", False, f"at r = {b.length:.10g}{kind.label}, {said}; {remedy}."
            )
        if len(found) > KINDS:
            yield Finding("undeclared", False, f"{len(found) - KINDS} more.")
        if not found:
            low, high = (
                min(kind.r[0] for kind in self.kinds),
                max(kind.r[-1] for kind in self.kinds),
            )
            span = f"from r = {low:.3g} to {high:.3g}"
            yield Finding(
                "undeclared",
                True,
                f"{span}, phi to phi''' jump nowhere but at declared breakpoints.",
            )

    def _beyond(self) -> Finding:
        worst, place = 0.0, ""
        for kind in self.kinds:
            if not math.isfinite(kind.cutoff):
                continue
            within = kind.f[:2, (kind.r >= 0.5 * kind.cutoff) & (kind.r <= kind.cutoff)]
            r = kind.cutoff * np.array([1.0, 1.0 + 1e-9, 1.01, 1.1, 1.25, 1.5, 2.0, 3.0])
            left = np.abs(self.evaluate(r, *kind.values)[:2])
            left[1, 0] = 0.0  # the slope may jump at the very end, which is told by its breakpoint
            size = np.abs(within).max(axis=1, initial=0.0)[:, None]
            share = np.nan_to_num(left / np.where(size > 0, size, 1.0), nan=np.inf)
            order, k = np.unravel_index(np.argmax(share), share.shape)
            if share[order, k] > max(worst, ROUND_OFF):
                worst = float(share[order, k])
                place = f"{NAMES[order]} is {left[order, k]:.3g} at r = {r[k]:.6g}{kind.label}"
        ends = _span([kind.cutoff for kind in self.kinds])
        if worst:
            remedy = (
                "a list may hold such pairs or not, so make it zero there: ms.potentials.switched"
            )
            return Finding(
                "cutoff", False, f"{place}, where it is to vanish from {ends} on; {remedy}."
            )
        return Finding("cutoff", True, f"phi and phi' vanish from {ends} on.")

    def _repels(self) -> Finding:
        for kind in self.kinds:
            pull = np.nan_to_num(kind.f[1], nan=0.0)
            k = int(np.argmax(pull))
            if pull[k] > ROUND_OFF * nearby(kind.f, kind.r)[1, k]:
                sentence = (
                    f"declared repulsive, but phi' is {pull[k]:.3g} at r ="
                    f" {kind.r[k]:.6g}{kind.label}, a pull"
                )
                return Finding(
                    "repulsion",
                    False,
                    f"{sentence}: leave repulsive out, or rattlers are misjudged.",
                )
        return Finding("repulsion", True, "phi' never pulls, as declared.")

    def _finite(self) -> Finding:
        """phi, phi', phi'', and d/dp of phi and phi', on the grid and at and beside every
        breakpoint.

        In reverse mode, as forces are: forward mode is spared the NaN of a where() without a guard.
        """
        by = tuple(range(1 + len(self.names)))

        @jax.jit
        def slopes_of(r: jax.Array, values: tuple[jax.Array, ...]) -> Any:
            both = (jax.grad(f, argnums=by) for f in (self.phi, jax.grad(self.phi)))
            return tuple(jax.vmap(lambda s, f=f: f(s, *values))(r) for f in both)

        for kind in self.kinds:
            special = [
                x for p in kind.points for x in (np.nextafter(p, 0.0), p, np.nextafter(p, np.inf))
            ]
            special += [kind.cutoff] if math.isfinite(kind.cutoff) else []
            r = np.concatenate([special, kind.r])
            known = [("phi", self.evaluate(r, *kind.values)[0])]
            slopes = slopes_of(jnp.asarray(r), tuple(map(jnp.asarray, kind.values)))
            for order, (by_r, *by_parameters) in enumerate(slopes):
                known.append((NAMES[order + 1], by_r))
                known += [
                    (f"d {NAMES[order]} / d {p}", c)
                    for p, c in zip(self.names, by_parameters, strict=True)
                ]
            for what, column in known:
                column = np.asarray(column)
                if not np.isfinite(column).all():
                    place = (
                        f"{what} is not finite at r ="
                        f" {r[np.argmin(np.isfinite(column))]:.10g}{kind.label}"
                    )
                    remedy = (
                        "where() takes derivatives of both its sides: guard the argument inside as"
                        " well"
                    )
                    return Finding("finite", False, f"{place}; {remedy}.")
        more = (
            f", and the derivatives of phi and phi' by {_listed(self.names)}" if self.names else ""
        )
        return Finding("finite", True, f"phi, phi' and phi''{more}.")


def _least(evaluate: Evaluate, values: tuple[float, ...], cutoff: float) -> float:
    """The distance of least energy: contact, for a potential that only repels up to a cutoff."""
    r = (
        cutoff * np.geomspace(1e-2, 1.0, 1000)
        if math.isfinite(cutoff)
        else np.geomspace(1e-3, 1e3, 6000)
    )
    energy = evaluate(r, *values)[0]
    k = int(np.argmin(np.where(np.isfinite(energy), energy, np.inf)))
    if math.isfinite(cutoff):
        return (
            float(r[k]) if k > 0 else 0.5 * cutoff
        )  # a well at the origin has no distance of its own
    return float(r[k]) if 0 < k and energy[k] < energy[-1] else 1.0


def _jumps(jump: float) -> str:
    return "diverges" if math.isinf(jump) else f"jumps by {jump:.3g}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _span(lengths: Sequence[float]) -> str:
    low, high = min(lengths), max(lengths)
    return f"r = {low:.6g}" if math.isclose(low, high) else f"r = {low:.6g} to {high:.6g}"
