"""This module finds where on a path pairs of particles cross a breakpoint, such as contact.

On the path, the parameters and the positions change linearly with a number t. A breakpoint is a
distance at which a derivative of the pair potential jumps or diverges: contact, the onset of a
smooth cutoff, the cutoff.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from mdsens._util.compilation import compiled
from mdsens._util.portable import reduced
from mdsens.model.system import System, box_at, crossing_terms, pair_distances

__all__ = ["Crossing", "FirstCrossing", "crossings", "gap_rate", "named_pairs"]


class FirstCrossing(NamedTuple):
    """The pair that is the first to cross a breakpoint of its potential along a path.

    Attributes:
      pair: indices of the two particles.
      opens: whether its contact opens; else it closes.
      distance: the breakpoint.
      image: the image of the second particle that is meant, as in :class:`Crossing`; None where it
        is the nearest one.
    """

    pair: tuple[int, int]
    opens: bool
    distance: float
    image: tuple[int, ...] | None

    def __str__(self) -> str:
        i, j = self.pair
        image = ""
        if self.image is not None and any(self.image):
            image = f" (image {' '.join(map(str, self.image))} of it)"
        event = "opens" if self.opens else "closes"
        return f"pair {i}-{j}{image} {event}, at distance {self.distance:.4g}"


def named_pairs(pairs: ArrayLike, images: ArrayLike | None) -> np.ndarray:
    """Return rows that name each pair, (k, 2) or (k, 2 + d), the same for both orders of a pair.

    A row has the lower and the higher index of the two particles, and the image of the second one
    where images are given.

    Args:
      pairs: (k, 2) indices of the two particles.
      images: (k, d) the image of the second particle of each pair; None for nearest images.
    """
    ends = np.asarray(pairs)
    rows = np.sort(ends, axis=1)
    if images is None:
        return rows
    # seen from the second particle, the image of the first one is the opposite
    swapped = ends[:, :1] > ends[:, 1:]
    return np.concatenate([rows, np.where(swapped, -1, 1) * np.asarray(images, int)], axis=1)


class Crossing(NamedTuple):
    """The pairs that cross breakpoints of the potential along a path, and the place on the path.

    A breakpoint is a distance at which a derivative of the pair potential jumps or diverges, such
    as contact. Positions and parameters change linearly with the path parameter t, as given to
    :func:`crossings`; the distances of the pairs are taken to first order in t. There are k
    entries, one for each pair and each breakpoint of its potential.

    Attributes:
      times: (k,) value of t at the crossing; negative where the pair crosses at t < 0, inf where
        the distance of the pair to the breakpoint does not change.
      pairs: (k, 2) indices of the two particles.
      images: (k, d) integers t, the image of the second particle that is meant, as in the system's
        neighbor list; None where each pair is that of nearest images.
      inside: (k,) True where the pair is nearer than the breakpoint at t = 0, so that the pair
        opens at the crossing; False where it closes.
      lengths: (k,) the breakpoint, a distance.
    """

    times: jax.Array
    pairs: jax.Array
    inside: jax.Array
    lengths: jax.Array
    images: jax.Array | None = None

    def __reduce__(self) -> Any:
        return reduced(self, self._asdict())

    @property
    def forward(self) -> float:
        """The smallest path parameter t >= 0 at which a pair crosses a breakpoint.

        Positions and parameters change linearly with t, along a path that begins at t = 0. The
        value is inf where no pair crosses. A breakpoint is a distance at which a derivative of the
        pair potential jumps, such as contact.
        """
        # t = 0, a pair just at its breakpoint, counts here and in ``backward``
        times = np.asarray(self.times)
        return float(np.min(times[times >= 0], initial=np.inf))

    @property
    def backward(self) -> float:
        """The smallest -t >= 0 such that a pair crosses a breakpoint at the path parameter t.

        The value is inf where no pair crosses. A breakpoint is a distance at which a derivative of
        the pair potential jumps, such as contact. The path of positions and parameters begins at t
        = 0; t < 0 is the opposite direction.
        """
        times = np.asarray(self.times)
        return float(np.min(-times[times <= 0], initial=np.inf))

    @property
    def radius(self) -> float:
        """The smallest |t| such that a pair crosses a breakpoint at the path parameter t.

        Positions and parameters change linearly with t, in both directions from t = 0. The value is
        inf where no pair crosses. A breakpoint is a distance at which a derivative of the pair
        potential jumps, such as contact.
        """
        return min(self.forward, self.backward)

    def within(self, change: float) -> int:
        """Count the pairs that cross a breakpoint of their potential on a piece of the path.

        Positions and parameters change along the path with a number t, and the piece is |t| <=
        ``change``. A breakpoint is a distance at which a derivative of the potential jumps, such as
        contact. The function does not work inside ``jax.jit``.
        """
        crossed = np.abs(np.asarray(self.times)) <= change
        # A pair counts once, whatever the number of terms and breakpoints that it crosses.
        return np.unique(named_pairs(self.pairs, self.images)[crossed], axis=0).shape[0]

    def first(self, forward: bool = True) -> FirstCrossing | None:
        """Return the pair that is the first to cross a breakpoint of its potential along a path.

        A breakpoint is a distance at which a derivative of the potential jumps or diverges, such as
        contact. Positions and parameters change along the path with the parameter t. The function
        does not work inside ``jax.jit``.

        Args:
          forward: whether t grows from 0; if False, t falls from 0.

        Returns:
          the pair and its breakpoint, see :class:`FirstCrossing`; None where no pair crosses a
            breakpoint.
        """
        times = np.asarray(self.times) * (1.0 if forward else -1.0)
        ahead = np.where(times >= 0, times, np.inf)
        if not ahead.size or not np.isfinite(ahead.min()):
            return None
        k = int(np.argmin(ahead))
        i, j = (int(p) for p in np.asarray(self.pairs)[k])
        image = None
        if self.images is not None:
            image = tuple(int(t) for t in np.asarray(self.images)[k])
        inside = np.asarray(self.inside)
        lengths = np.asarray(self.lengths)
        return FirstCrossing((i, j), bool(inside[k]), float(lengths[k]), image)


def _gaps(
    system: System, velocity: jax.Array, dparams: Mapping[str, Any], strain: jax.Array | None
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Compute the gap b - r of each pair to each breakpoint, and its rate of change on a path.

    r is the distance of the pair, and b a breakpoint: a distance at which a derivative of the
    potential jumps or diverges.

    Args:
      velocity: (n, d) derivative of the positions by the path parameter.
      dparams: derivatives of all parameters by the path parameter, by parameter name.
      strain: (d, d) derivative of the cell's strain by the path parameter; None for a fixed cell.

    Returns:
      the gaps and their rates: for each term of the potential two arrays (k, m), for the k
        breakpoints of each of its m pairs.
    """

    def gaps(
        positions: jax.Array, params: Mapping[str, Any], strain: jax.Array | None
    ) -> list[jax.Array]:
        # Breakpoints depend on the parameters, and the cell may depend on them, too.
        box = box_at(system, params)
        return [
            t.lengths() - pair_distances(system, t, positions, box, strain)
            for t in crossing_terms(system, params)
        ]

    # for jvp, None is a tree without arrays: a fixed cell then has no tangent
    no_strain = None if strain is None else jnp.zeros_like(strain)
    point = system.positions, dict(system.params), no_strain
    return jax.jvp(gaps, point, (velocity, dict(dparams), strain))


@compiled
def crossings(
    system: System,
    velocity: jax.Array,
    dparams: Mapping[str, Any],
    rattlers: jax.Array | None = None,
    strain: jax.Array | None = None,
) -> Crossing:
    """Compute at which path parameters t pairs cross a breakpoint of their potential.

    The parameters of the system change along the path as params + t dparams, and its positions with
    them. A breakpoint b is a distance at which a derivative of the potential jumps or diverges:
    contact, the onset of a smooth cutoff, the cutoff. A pair at distance r crosses b, to first
    order, at t = -(r - b) / d(r - b)/dt. The result is a :class:`Crossing`.

    Args:
      system: a relaxed system, whose neighbor list reaches beyond the breakpoints, as the lists of
        minimized systems do.
      velocity: (n, d) derivative of the positions by t.
      dparams: derivatives of all parameters by t, by parameter name.
      rattlers: (n,) True for particles whose pairs are left out.
      strain: (d, d) derivative by t of the strain of the cell, which the particles follow affinely;
        ``velocity`` is then relative to this affine motion. None for a fixed cell.
    """
    gaps, rates = _gaps(system, velocity, dparams, strain)
    # Empty first entries, so that a potential without pairs gives arrays of length zero.
    times = [jnp.zeros(0)]
    firsts = [jnp.zeros(0, jnp.int32)]
    seconds = [jnp.zeros(0, jnp.int32)]
    inside = [jnp.zeros(0, bool)]
    lengths = [jnp.zeros(0)]
    images = [jnp.zeros((0, system.dimension), jnp.int8)]
    for term, gap, rate in zip(crossing_terms(system), gaps, rates, strict=True):
        real = term.mask if rattlers is None else term.mask & ~rattlers[term.i] & ~rattlers[term.j]
        # where() inside as well, against a division by zero
        time = jnp.where(real & (rate != 0), -gap / jnp.where(rate == 0, 1.0, rate), jnp.inf)
        times.append(time.ravel())
        # gaps are (breakpoints, pairs): the indices are repeated for each breakpoint
        firsts.append(jnp.broadcast_to(term.i, gap.shape).ravel())
        seconds.append(jnp.broadcast_to(term.j, gap.shape).ravel())
        inside.append((gap > 0).ravel())
        lengths.append(jnp.broadcast_to(term.lengths(), gap.shape).ravel())
        if term.images is None:
            of_pairs = jnp.zeros((*gap.shape, system.dimension), jnp.int8)
        else:
            of_pairs = jnp.broadcast_to(term.images, (*gap.shape, system.dimension))
        images.append(of_pairs.reshape(-1, system.dimension))
    pairs = jnp.stack([jnp.concatenate(firsts), jnp.concatenate(seconds)], axis=1)
    return Crossing(
        jnp.concatenate(times),
        pairs,
        jnp.concatenate(inside),
        jnp.concatenate(lengths),
        None if system.neighbors.images is None else jnp.concatenate(images),
    )


@compiled
def gap_rate(
    system: System,
    velocity: jax.Array,
    dparams: Mapping[str, Any],
    rattlers: jax.Array,
    strain: jax.Array | None = None,
) -> jax.Array:
    """Compute the root mean square rate at which pairs approach or leave their breakpoints.

    A breakpoint b is a distance at which a derivative of the potential jumps or diverges, such as
    contact. The rate is d(r - b)/dt, with r the distance of the pair and t the parameter of a path
    of positions and parameters; the mean is over the pairs with r < b. The arguments are those of
    :func:`crossings`. The result is 0 for a potential without breakpoints.
    """
    gaps, rates = _gaps(system, velocity, dparams, strain)
    total = jnp.zeros(())
    count = jnp.zeros(())
    for term, gap, rate in zip(crossing_terms(system), gaps, rates, strict=True):
        # b - r > 0: the pair is nearer than the breakpoint, inside the range of the force
        interacting = (gap > 0) & term.mask & ~rattlers[term.i] & ~rattlers[term.j]
        total = total + jnp.sum(jnp.where(interacting, rate**2, 0.0))
        count = count + jnp.sum(interacting)
    return jnp.sqrt(total / jnp.maximum(count, 1))
