"""When contacts open and close: the next breakpoint of each pair along a path of the parameters."""

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
    """When each pair meets each breakpoint of its potential along a path, to first order.

    Attributes:
      times: (k,) t of the path; negative behind, inf where a pair's distance to the breakpoint does
        not change.
      pairs: (k, 2) particles.
      inside: (k,) True where the pair is now nearer than the breakpoint, so that it opens there;
        else it closes.
      lengths: (k,) of the breakpoint.
    """

    times: jax.Array
    pairs: jax.Array
    inside: jax.Array
    lengths: jax.Array

    def __reduce__(self) -> Any:
        return reduced(self, self._asdict())

    @property
    def forward(self) -> float:
        """The smallest t > 0; inf where no pair crosses."""
        times = np.asarray(self.times)
        return float(np.min(times[times >= 0], initial=np.inf))

    @property
    def backward(self) -> float:
        """The smallest -t > 0."""
        times = np.asarray(self.times)
        return float(np.min(-times[times <= 0], initial=np.inf))

    @property
    def radius(self) -> float:
        """The smaller of the two."""
        return min(self.forward, self.backward)

    def within(self, change: float) -> int:
        """How many pairs cross a breakpoint in |t| <= change. Host code."""
        crossed = np.abs(np.asarray(self.times)) <= change
        return np.unique(np.sort(np.asarray(self.pairs)[crossed], axis=1), axis=0).shape[0]

    def first(self, forward: bool = True) -> tuple[tuple[int, int], bool, float] | None:
        """The pair that crosses first on one side, whether it opens, and the breakpoint's length;
        None where none does.

        Host code.
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
    """b - r of each term's pairs and breakpoints (k, m), and how fast it changes."""

    def gaps(positions: jax.Array, params: Any, strain: Any) -> list[jax.Array]:
        box = box_at(system, params)
        return [
            t.lengths() - pair_distances(t, positions, box, strain)
            for t in pair_terms(system, params)
        ]

    here = system.positions, dict(system.params), None if strain is None else jnp.zeros_like(strain)
    return jax.jvp(gaps, here, (velocity, dict(dparams), strain))


@jax.jit
def crossings(
    system: System,
    velocity: jax.Array,
    dparams: Mapping[str, Any],
    rattlers: jax.Array | None = None,
    strain: jax.Array | None = None,
) -> Crossing:
    """Where pairs cross a breakpoint (contact, onset, cutoff) along params + t dparams, to first
    order.

    t = -(r - b) / d(r - b)/dt, over all pairs and breakpoints b.

    Args:
      system: relaxed; its list must reach beyond the breakpoints, as minimized systems' lists do.
      velocity: (n, d) derivative of the positions along the path.
      dparams: the direction, a full dict of parameters.
      rattlers: (n,) particles whose pairs are left out.
      strain: (d, d) rate at which the cell strains, and its particles with it; ``velocity`` is then
        that from their affine places.
    """
    now, rates = _gaps(system, velocity, dparams, strain)
    times, firsts, seconds, inside = (
        [jnp.zeros(0)],
        [jnp.zeros(0, jnp.int32)],
        [jnp.zeros(0, jnp.int32)],
        [],
    )
    lengths = [jnp.zeros(0)]
    for term, gap, rate in zip(pair_terms(system), now, rates, strict=True):
        real = term.mask if rattlers is None else term.mask & ~rattlers[term.i] & ~rattlers[term.j]
        times.append(
            jnp.where(real & (rate != 0), -gap / jnp.where(rate == 0, 1.0, rate), jnp.inf).ravel()
        )
        firsts.append(jnp.broadcast_to(term.i, gap.shape).ravel())
        seconds.append(jnp.broadcast_to(term.j, gap.shape).ravel())
        inside.append((gap > 0).ravel())
        lengths.append(jnp.broadcast_to(term.lengths(), gap.shape).ravel())
    pairs = jnp.stack([jnp.concatenate(firsts), jnp.concatenate(seconds)], axis=1)
    sides = jnp.concatenate([jnp.zeros(0, bool), *inside])
    return Crossing(jnp.concatenate(times), pairs, sides, jnp.concatenate(lengths))


@jax.jit
def gap_rate(
    system: System,
    velocity: jax.Array,
    dparams: Mapping[str, Any],
    rattlers: jax.Array,
    strain: jax.Array | None = None,
) -> jax.Array:
    """How fast interacting pairs move towards or away from their breakpoints: the root mean square
    of d(r - b)/dt.

    The arguments are those of :func:`crossings`. 0 of a potential without breakpoints.
    """
    now, rates = _gaps(system, velocity, dparams, strain)
    total, count = jnp.zeros(()), jnp.zeros(())
    for term, gap, rate in zip(pair_terms(system), now, rates, strict=True):
        near = (gap > 0) & term.mask & ~rattlers[term.i] & ~rattlers[term.j]
        total, count = total + jnp.sum(jnp.where(near, rate**2, 0.0)), count + jnp.sum(near)
    return jnp.sqrt(total / jnp.maximum(count, 1))
