"""Checks of a pair function phi(r): continuity, zero at the cutoff, repulsion, finite values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.compilation import compiled
from mdsens.potentials.base import BondedPotential, PairTerm, Potential
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

# How many different pairs of a potential are examined, and how many undeclared breaks are reported,
# at most.
KINDS = 6
# The lengths between which a pair function is examined, in units of the distance of least energy.
NEAR = 0.2
FAR = 3.0
# With a cutoff or breakpoints, it is examined up to this multiple of the longest of them.
BEYOND = 1.2
# Lengths at which a pair function has to vanish, in units of its cutoff.
OUTSIDE = np.array([1.0, 1.0 + 1e-9, 1.01, 1.1, 1.25, 1.5, 2.0, 3.0])
# Relative size up to which a number that should be zero is zero.
ROUND_OFF = 1e-10
NAMES = ("phi", "phi'", "phi''", "phi'''")


@dataclasses.dataclass(frozen=True)
class _Kind:
    """Pairs with the same parameters: their pair function phi(r) and its derivatives, tabulated.

    Attributes:
      label: the values of the parameters with their names, for messages.
      values: values of the parameters of phi.
      points: the declared breakpoints, distances at which a derivative of the potential jumps or
        diverges, ascending.
      cutoff: distance from which on phi must vanish; inf where the potential declares no cutoff.
      least: the distance of least energy; 1 where the energy has no minimum.
      r: (m,) distances at which phi was evaluated.
      f: (5, m) phi and its first four derivatives at these distances.
      breaks: the jumps of phi and of its derivatives that were found.
    """

    label: str
    values: tuple[float, ...]
    points: tuple[float, ...]
    cutoff: float
    least: float
    r: np.ndarray
    f: np.ndarray
    breaks: list[Break]

    def declared(self, located: Break) -> bool:
        """Return whether the potential declares a breakpoint at the distance of a jump found.

        A breakpoint is a distance at which a derivative of the potential jumps or diverges.
        """
        return any(abs(located.length - p) <= APART * p for p in self.points)

    def jump(self, point: float, order: int) -> float:
        """Return the jump of a derivative of the pair function phi at a declared breakpoint.

        ``order`` is the order of the derivative, 0 for phi itself. The result is 0 where the
        derivative does not jump.
        """
        for located in self.breaks:
            if abs(located.length - point) <= APART * point:
                return located.jumps.get(order, 0.0)
        return 0.0


class PairFunction:
    """Checks of the pair function phi(r) of one potential, for pairs with different parameters.

    Args:
      potential: a pair potential, or a potential of bonds.
      term: the pairs of the potential, with the values of their parameters.
      between: the two distances between which to examine phi; None for the default.
    """

    def __init__(self, potential: Potential, term: PairTerm, between: tuple[float, float] | None):
        self.potential = potential
        self.phi = term.phi
        self.names: tuple[str, ...] = tuple(potential.parameters)
        self.bonded = isinstance(potential, BondedPotential)
        self.evaluate = with_derivatives(term.phi)
        columns = [np.broadcast_to(np.asarray(v, float), term.i.shape) for v in term.values]
        # A row for each different pair; without parameters all pairs are the same.
        rows = np.unique(np.stack(columns, axis=1), axis=0) if columns else np.zeros((1, 0))
        chosen = np.unique(np.linspace(0, len(rows) - 1, KINDS).astype(int)) if len(rows) else []
        self.kinds = [self._kind(tuple(map(float, rows[k])), term, between) for k in chosen]

    def _kind(
        self, values: tuple[float, ...], term: PairTerm, between: tuple[float, float] | None
    ) -> _Kind:
        """Tabulate the pair function phi(r) for one set of parameters, and locate its jumps.

        Args:
          values: values of the parameters of phi.
          term: the pairs of the potential.
          between: the two distances between which to examine phi; None for the default.
        """
        arrays = tuple(map(jnp.asarray, values))
        label = ", ".join(f"{name} = {v:.6g}" for name, v in zip(self.names, values, strict=True))
        declared = {float(point) for point in term.breakpoints(*arrays)}
        points = tuple(sorted(point for point in declared if 0 < point < math.inf))
        if self.bonded:
            cutoff = math.inf
        else:
            cutoff = float(self.potential.range(dict(zip(self.names, arrays, strict=True))))
        least = _least_energy_distance(self.evaluate, values, cutoff)
        low = NEAR * least
        high = BEYOND * cutoff if math.isfinite(cutoff) else FAR * least
        if points:
            low = min(low, 0.5 * points[0])
            high = max(high, BEYOND * points[-1])
        edges = edges_of(*(between or (low, high)), points)
        f = self.evaluate(edges, *values)
        return _Kind(
            label=f" with {label}" if label else "",
            values=values,
            points=points,
            cutoff=cutoff,
            least=least,
            r=edges,
            f=f,
            breaks=find_breaks(self.evaluate, values, edges, f),
        )

    def findings(self) -> Iterator[Finding]:
        """Run all checks of the pair function, and yield the result of each.

        The first checks are of each declared breakpoint, a distance at which a derivative of the
        potential jumps or diverges.
        """
        if not self.kinds:
            sentence = "there is none, so that nothing was looked at: give bonds or more particles."
            yield Finding("pairs", False, sentence)
            return
        for k in range(max(len(kind.points) for kind in self.kinds)):
            yield self._at_declared(k)
        yield from self._undeclared()
        if any(math.isfinite(kind.cutoff) for kind in self.kinds):
            yield self._vanishing()
        if self.potential.repulsive:
            yield self._repulsion()
        yield self._finite()

    def _at_declared(self, k: int) -> Finding:
        """Check that the pair function phi and phi' are continuous at the declared breakpoint k.

        A breakpoint is a distance at which a derivative of the potential jumps or diverges; k
        counts from 0, in the order of the distances.
        """
        check = f"breakpoint {k + 1}"
        kinds = [kind for kind in self.kinds if len(kind.points) > k]
        where = _span([kind.points[k] for kind in kinds])
        kinds = [kind for kind in kinds if kind.r[0] < kind.points[k] < kind.r[-1]]
        if not kinds:
            return Finding(check, True, f"declared at {where}, not between the lengths given.")
        largest = [
            max((kind.jump(kind.points[k], order) for kind in kinds), key=abs)
            for order in range(len(NAMES))
        ]
        # Orders 0 and 1, phi and phi'; jumps of phi'' and phi''' are what breakpoints are for.
        good = not any(largest[:2])
        remedy = ""
        if not good:
            remedy = "; no minimum can stand there: shift phi, or wrap it in ms.potentials.switched"
        continuity = _describe_continuity(largest)
        return Finding(check, good, f"declared at {where}: {continuity}{remedy}.")

    def _undeclared(self) -> Iterator[Finding]:
        """Check that the pair function phi and phi' to phi''' jump only at declared breakpoints.

        A breakpoint is a distance at which a derivative of the potential jumps or diverges.
        """
        undeclared = [
            (kind, located)
            for kind in self.kinds
            for located in kind.breaks
            if not kind.declared(located)
        ]
        for kind, located in undeclared[:KINDS]:
            jumps = ", ".join(
                f"{NAMES[order]} {_jumps(jump)}" for order, jump in sorted(located.jumps.items())
            )
            remedy = self._choose_remedy(located)
            sentence = f"at r = {located.length:.10g}{kind.label}, {jumps}; {remedy}."
            yield Finding("undeclared", False, sentence)
        if len(undeclared) > KINDS:
            yield Finding("undeclared", False, f"{len(undeclared) - KINDS} more.")
        if not undeclared:
            low = min(kind.r[0] for kind in self.kinds)
            high = max(kind.r[-1] for kind in self.kinds)
            sentence = (
                f"from r = {low:.3g} to {high:.3g}, phi to phi''' jump nowhere but at declared"
                " breakpoints."
            )
            yield Finding("undeclared", True, sentence)

    def _choose_remedy(self, located: Break) -> str:
        """Return what the user can do about an undeclared jump of phi or of a derivative of phi."""
        if 0 in located.jumps or 1 in located.jumps:
            return "no minimum can stand there: make phi and phi' continuous"
        if self.bonded:
            return "bonds declare no breakpoint, and the radius of a sensitivity does not see it"
        return "declare it in breakpoints=, or the radius of a sensitivity does not see it"

    def _vanishing(self) -> Finding:
        """Check that the pair function phi(r) and phi' vanish from the cutoff on."""
        worst = 0.0
        place = ""
        for kind in self.kinds:
            if not math.isfinite(kind.cutoff):
                continue
            # The unit is the size in the outer half of the range: near r = 0, phi may be so large
            # that any value left at the cutoff would pass as round-off.
            within = kind.f[:2, (kind.r >= 0.5 * kind.cutoff) & (kind.r <= kind.cutoff)]
            r = kind.cutoff * OUTSIDE
            outside = np.abs(self.evaluate(r, *kind.values)[:2])
            # phi' may jump at the cutoff itself, which the check of that breakpoint reports.
            outside[1, 0] = 0.0
            size = np.abs(within).max(axis=1, initial=0.0)[:, None]
            # argmax would find a NaN, but every comparison with it below is false
            share = np.nan_to_num(outside / np.where(size > 0, size, 1.0), nan=np.inf)
            order, k = np.unravel_index(np.argmax(share), share.shape)
            if share[order, k] > max(worst, ROUND_OFF):
                worst = float(share[order, k])
                value = f"{NAMES[order]} is {outside[order, k]:.3g}"
                place = f"{value} at r = {r[k]:.6g}{kind.label}"
        ends = _span([kind.cutoff for kind in self.kinds])
        if not worst:
            return Finding("cutoff", True, f"phi and phi' vanish from {ends} on.")
        remedy = "a list may hold such pairs or not, so make it zero there: ms.potentials.switched"
        sentence = f"{place}, where it is to vanish from {ends} on; {remedy}."
        return Finding("cutoff", False, sentence)

    def _repulsion(self) -> Finding:
        """Check that the derivative phi' of a repulsive pair function is nowhere positive."""
        for kind in self.kinds:
            # argmax would choose a NaN, which is reported by ``_finite``.
            slope = np.nan_to_num(kind.f[1], nan=0.0)
            k = int(np.argmax(slope))
            if slope[k] > ROUND_OFF * nearby(kind.f, kind.r)[1, k]:
                sentence = (
                    f"declared repulsive, but phi' is {slope[k]:.3g} at r ="
                    f" {kind.r[k]:.6g}{kind.label}, a pull: leave repulsive out, or rattlers are"
                    " misjudged."
                )
                return Finding("repulsion", False, sentence)
        return Finding("repulsion", True, "phi' never pulls, as declared.")

    def _finite(self) -> Finding:
        """Check that the pair function phi(r), its derivatives by r and by parameters are finite.

        These are phi, phi', phi'', and the derivatives of phi and phi' by every parameter. They are
        evaluated on a grid of distances r, and at and beside every breakpoint (a distance at which
        a derivative of the potential jumps or diverges). The derivatives are taken in reverse mode,
        as for the forces. If one side of a ``where()`` is not finite, reverse mode may give NaN
        even where the other side is chosen; forward mode does not show this.
        """
        argnums = tuple(range(1 + len(self.names)))  # r and every parameter

        @compiled
        def slopes_of(
            r: jax.Array, values: tuple[jax.Array, ...]
        ) -> tuple[tuple[jax.Array, ...], ...]:
            """Return derivatives of the pair function phi and of phi' by r and every parameter."""
            gradients = (jax.grad(f, argnums=argnums) for f in (self.phi, jax.grad(self.phi)))
            return tuple(jax.vmap(lambda s, f=f: f(s, *values))(r) for f in gradients)

        for kind in self.kinds:
            # A breakpoint and its two neighbors among the floating-point numbers: at each of them,
            # another side of a where() may be chosen.
            special = [
                r for p in kind.points for r in (np.nextafter(p, 0.0), p, np.nextafter(p, np.inf))
            ]
            special += [kind.cutoff] if math.isfinite(kind.cutoff) else []
            r = np.concatenate([special, kind.r])
            columns: list[tuple[str, Any]] = [("phi", self.evaluate(r, *kind.values)[0])]
            slopes = slopes_of(jnp.asarray(r), tuple(map(jnp.asarray, kind.values)))
            for order, (by_r, *by_parameters) in enumerate(slopes):
                columns.append((NAMES[order + 1], by_r))
                columns += [
                    (f"d {NAMES[order]} / d {name}", by_parameter)
                    for name, by_parameter in zip(self.names, by_parameters, strict=True)
                ]
            for what, column in columns:
                finite = np.isfinite(np.asarray(column))
                if not finite.all():
                    sentence = (
                        f"{what} is not finite at r = {r[np.argmin(finite)]:.10g}{kind.label};"
                        " where() takes derivatives of both its sides: guard the argument inside as"
                        " well."
                    )
                    return Finding("finite", False, sentence)
        derivatives = ""
        if self.names:
            derivatives = f", and the derivatives of phi and phi' by {_listed(self.names)}"
        return Finding("finite", True, f"phi, phi' and phi''{derivatives}.")


def _least_energy_distance(evaluate: Evaluate, values: tuple[float, ...], cutoff: float) -> float:
    """Return the distance of least pair energy; the cutoff for a repulsive potential that has one.

    Without a cutoff the distance is searched from 1e-3 to 1e3; the result is 1 where the energy has
    no minimum there. With a cutoff, the result is half the cutoff if the energy is least at r = 0.

    Args:
      evaluate: function of r and of the parameters that returns the pair energy in its first row.
      values: values of the parameters.
      cutoff: the cutoff; may be infinite.
    """
    # A grid in ratios of 0.5 % and 0.2 % is fine enough: the result only sets a scale of length.
    if math.isfinite(cutoff):
        r = cutoff * np.geomspace(1e-2, 1.0, 1000)
    else:
        r = np.geomspace(1e-3, 1e3, 6000)
    energy = evaluate(r, *values)[0]
    k = int(np.argmin(np.where(np.isfinite(energy), energy, np.inf)))
    if math.isfinite(cutoff):
        # A well at the origin (k = 0) has no distance of least energy: take half the cutoff.
        return float(r[k]) if k > 0 else 0.5 * cutoff
    return float(r[k]) if 0 < k and energy[k] < energy[-1] else 1.0


def _describe_continuity(jumps: Sequence[float]) -> str:
    """Describe in words which of phi, phi', phi'' are continuous, and which of them or phi''' jump.

    ``jumps`` holds the jump of each of the four, 0 for one that does not jump.
    """
    # phi''' is not named as continuous: it is the last order that is examined.
    smooth = [name for name, jump in zip(NAMES[:-1], jumps, strict=False) if not jump]
    parts = [f"{_listed(smooth)} continuous"] if smooth else []
    parts += [f"{name} {_jumps(jump)}" for name, jump in zip(NAMES, jumps, strict=True) if jump]
    return ", ".join(parts)


def _jumps(jump: float) -> str:
    """Describe the jump of a function in words: its size, or that the function diverges."""
    return "diverges" if math.isinf(jump) else f"jumps by {jump:.3g}"


def _listed(names: Sequence[str]) -> str:
    """Join names by commas, the last two by "and"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _span(lengths: Sequence[float]) -> str:
    """Describe distances in words, as "r = 1", or as "r = 1 to 2" if they differ."""
    low = min(lengths)
    high = max(lengths)
    return f"r = {low:.6g}" if math.isclose(low, high) else f"r = {low:.6g} to {high:.6g}"
