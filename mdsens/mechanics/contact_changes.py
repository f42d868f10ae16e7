"""Opening and closing of contacts: when pairs cross a breakpoint along a path of parameters.

A breakpoint is a distance at which a derivative of the pair potential jumps or diverges: contact,
the onset of a smooth cutoff, the cutoff.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.portable import reduced
from mdsens.model.system import System, box_at, pair_distances, pair_terms

__all__ = ["Crossing", "crossings", "gap_rate"]


class Crossing(NamedTuple):
    """Values of t at which pairs cross breakpoints of the potential, to first order in t.

    A breakpoint is a distance at which a derivative of the potential jumps or diverges. Positions
    and parameters change linearly with t, as given to :func:`crossings`.

    Attributes:
      times: (k,) value of t at the crossing; negative where the pair crosses at t < 0, inf where
        the distance of the pair to the breakpoint does not change.
      pairs: (k, 2) indices of the two particles.
      inside: (k,) True where the pair is now nearer than the breakpoint, so that it opens at the
        crossing; else it closes.
      lengths: (k,) distance at the breakpoint.
    """

    times: jax.Array
    pairs: jax.Array
    inside: jax.Array
    lengths: jax.Array

    def __reduce__(self) -> Any:
        return reduced(self, self._asdict())

    @property
    def forward(self) -> float:
        """The smallest t >= 0 at which a pair crosses a breakpoint; inf where no pair does."""
        times = np.asarray(self.times)
        return float(np.min(times[times >= 0], initial=np.inf))

    @property
    def backward(self) -> float:
        """The smallest -t >= 0 at which a pair crosses a breakpoint; inf where no pair does."""
        times = np.asarray(self.times)
        return float(np.min(-times[times <= 0], initial=np.inf))

    @property
    def radius(self) -> float:
        """The smaller of ``forward`` and ``backward``."""
        return min(self.forward, self.backward)

    def within(self, change: float) -> int:
        """Count the pairs that cross a breakpoint in |t| <= change. Not for compiled code."""
        crossed = np.abs(np.asarray(self.times)) <= change
        # A pair counts once, whatever the number of terms and breakpoints that it crosses.
        return np.unique(np.sort(np.asarray(self.pairs)[crossed], axis=1), axis=0).shape[0]

    def first(self, forward: bool = True) -> tuple[tuple[int, int], bool, float] | None:
        """Return the pair whose distance is the first to cross a breakpoint of the potential.

        A breakpoint is a distance at which a derivative of the potential jumps or diverges, such as
        contact. t is that of ``times``. Not for compiled code.

        Args:
          forward: whether t grows from 0; if False, t falls from 0.

        Returns:
          the pair, whether its contact opens, and the distance of the breakpoint; None where no
          pair crosses a breakpoint.
        """
        times = np.asarray(self.times) * (1.0 if forward else -1.0)
        ahead = np.where(times >= 0, times, np.inf)
        if not ahead.size or not np.isfinite(ahead.min()):
            return None
        k = int(np.argmin(ahead))
        i, j = (int(p) for p in np.asarray(self.pairs[k]))
        return (i, j), bool(self.inside[k]), float(self.lengths[k])


def _gaps(
    system: System, velocity: jax.Array, dparams: Mapping[str, Any], strain: jax.Array | None
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Compute b - r, (k, m), for k breakpoints b of m pairs of each term, and its rate of change.

    r is the distance of the pair, and b a distance at which a derivative of the potential jumps or
    diverges.
    """

    def gaps(
        positions: jax.Array, params: Mapping[str, Any], strain: jax.Array | None
    ) -> list[jax.Array]:
        # Breakpoints depend on the parameters, and the cell may depend on them, too.
        box = box_at(system, params)
        return [
            t.lengths() - pair_distances(t, positions, box, strain)
            for t in pair_terms(system, params)
        ]

    no_strain = None if strain is None else jnp.zeros_like(strain)
    point = system.positions, dict(system.params), no_strain
    return jax.jvp(gaps, point, (velocity, dict(dparams), strain))


@jax.jit
def crossings(
    system: System,
    velocity: jax.Array,
    dparams: Mapping[str, Any],
    rattlers: jax.Array | None = None,
    strain: jax.Array | None = None,
) -> Crossing:
    """Compute when pairs cross a breakpoint (contact, onset, cutoff) along params + t dparams.

    A breakpoint b is a distance at which a derivative of the potential jumps or diverges. A pair at
    distance r crosses it, to first order, at t = -(r - b) / d(r - b)/dt.

    Args:
      system: a relaxed system, whose neighbor list reaches beyond the breakpoints, as the lists of
        minimized systems do.
      velocity: (n, d) derivative of the positions by t.
      dparams: the direction, a dict of all parameters.
      rattlers: (n,) True for particles whose pairs are left out.
      strain: (d, d) strain rate of the cell and, affinely, of its particles; ``velocity`` is then
        relative to the affine motion.
    """
    gaps, rates = _gaps(system, velocity, dparams, strain)
    # Empty first entries, so that a potential without pairs gives arrays of length zero.
    times = [jnp.zeros(0)]
    firsts = [jnp.zeros(0, jnp.int32)]
    seconds = [jnp.zeros(0, jnp.int32)]
    inside = [jnp.zeros(0, bool)]
    lengths = [jnp.zeros(0)]
    for term, gap, rate in zip(pair_terms(system), gaps, rates, strict=True):
        real = term.mask if rattlers is None else term.mask & ~rattlers[term.i] & ~rattlers[term.j]
        # where() inside as well, against a division by zero
        time = jnp.where(real & (rate != 0), -gap / jnp.where(rate == 0, 1.0, rate), jnp.inf)
        times.append(time.ravel())
        firsts.append(jnp.broadcast_to(term.i, gap.shape).ravel())
        seconds.append(jnp.broadcast_to(term.j, gap.shape).ravel())
        inside.append((gap > 0).ravel())
        lengths.append(jnp.broadcast_to(term.lengths(), gap.shape).ravel())
    pairs = jnp.stack([jnp.concatenate(firsts), jnp.concatenate(seconds)], axis=1)
    return Crossing(
        jnp.concatenate(times), pairs, jnp.concatenate(inside), jnp.concatenate(lengths)
    )


@jax.jit
def gap_rate(
    system: System,
    velocity: jax.Array,
    dparams: Mapping[str, Any],
    rattlers: jax.Array,
    strain: jax.Array | None = None,
) -> jax.Array:
    """Compute the root mean square rate at which pairs approach or leave their breakpoints.

    A breakpoint b is a distance at which a derivative of the potential jumps or diverges. The rate
    is d(r - b)/dt, with r the distance of the pair; the mean is over the pairs with r < b. The
    arguments are those of :func:`crossings`. The result is 0 for a potential without breakpoints.
    """
    gaps, rates = _gaps(system, velocity, dparams, strain)
    total = jnp.zeros(())
    count = jnp.zeros(())
    for term, gap, rate in zip(pair_terms(system), gaps, rates, strict=True):
        # b - r > 0: the pair is nearer than the breakpoint, inside the range of the force
        interacting = (gap > 0) & term.mask & ~rattlers[term.i] & ~rattlers[term.j]
        total = total + jnp.sum(jnp.where(interacting, rate**2, 0.0))
        count = count + jnp.sum(interacting)
    return jnp.sqrt(total / jnp.maximum(count, 1))
