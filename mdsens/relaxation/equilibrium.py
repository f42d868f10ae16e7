"""A relaxed configuration, with the evidence that it is one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.batching import together
from mdsens._util.portable import Portable
from mdsens._util.tables import Shown
from mdsens.mechanics.status import Status
from mdsens.model.batch import stack
from mdsens.model.system import System

__all__ = ["Equilibrium", "batch_of"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Equilibrium(Portable, Shown):
    """A relaxed system with the evidence. Frozen, and a pytree; of a batch, every array has a
    leading axis.

    Attributes:
      system: relaxed.
      status: a :class:`~mdsens.Status`, as an integer array.
      max_force: the largest norm of a particle's force left (ASE's fmax), in energy a length.
      steps: of the minimizer.
      wall_time: seconds, compilation included; 0 inside traced code.
      tolerance: what max_force was to reach: the one that was asked for, or 1e-12 of the mean pair
        force.
      force_floor: the largest force that round-off of the positions leaves on a particle,
        4 eps sqrt(sum_j (k_ij |R|)^2 + f_ij^2): no relaxation goes below it.
      saddles: how many saddles were left on the way, each along a mode of negative stiffness.
      descent: how far down in energy the minimum is from the first of them.
      examined: whether the Hessian there was looked at for negative stiffness.
      pressure: at which the cell was relaxed, too; None in a cell that was given.
      strains: (k, d, d) orthonormal strains that the cell was free to take; None likewise.
      multipliers: of the system's constraints, by their names; None without constraints.
      order: how many modes have a negative stiffness: 0 at a minimum, 1 at the saddle of
        ``find_saddle``.
    """

    system: System
    status: jax.Array
    max_force: jax.Array
    steps: jax.Array
    wall_time: Any
    tolerance: Any
    force_floor: Any = 0.0
    saddles: Any = 0
    descent: Any = 0.0
    examined: Any = False
    pressure: Any = None
    strains: Any = None
    multipliers: Any = None
    order: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def positions(self) -> jax.Array:
        """(n, d), the system's."""
        return self.system.positions

    @property
    def params(self) -> dict[str, jax.Array]:
        """The system's."""
        return self.system.params

    @property
    def contacts_needed(self) -> int | None:
        """How many contacts hold a particle here: at a saddle two that oppose each other; None for
        what a minimum needs.
        """
        return 2 if self.order else None

    _title = "Equilibrium"

    def _rows(self) -> list[tuple[str, str]]:
        s = self.system
        if s.batch is not None:
            good = int(sum(Status(int(k)).good for k in np.asarray(self.status)))
            return [
                ("members", f"{s.batch} of n = {s.n}, {s.dimension}-D, {s.potential.name}"),
                ("converged", f"{good} of {s.batch}"),
                ("largest max_force", f"{float(jnp.max(self.max_force)):.2e}"),
            ]
        return [
            ("system", f"n = {s.n}, {s.dimension}-D, {s.potential.name}"),
            ("status", f"{Status(int(self.status)).name}: {Status(int(self.status)).sentence}"),
            *([("kind", f"saddle of order {self.order}")] if self.order else []),
            (
                "max_force",
                (
                    f"{float(self.max_force):.2e} (tolerance {float(self.tolerance):.0e}, round-off"
                    f" {float(self.force_floor):.0e})"
                ),
            ),
            *([("saddles", self.saddles_in_words())] if int(self.saddles) else []),
            *([] if self.pressure is None else [("pressure", self.cell_in_words())]),
            ("steps", f"{int(self.steps):,} in {float(self.wall_time):.2f} s"),
        ]

    def saddles_in_words(self) -> str:
        """How many saddles were left on the way, and how far down."""
        times = "one was" if int(self.saddles) == 1 else f"{int(self.saddles)} were"
        return f"{times} left, {float(self.descent):.4g} down in energy"

    def cell_in_words(self) -> str:
        """What the cell was relaxed to, and its volume; of a minimum at a pressure."""
        free = (
            "the size of the cell was"
            if len(self.strains) == 1
            else "the size and shape of the cell were"
        )
        return (
            f"{float(self.pressure):.6g}, to which {free} relaxed: volume"
            f" {float(self.system.volume):.8g}"
        )


def batch_of(members: list[Equilibrium]) -> Equilibrium:
    """One batch of several equilibria of one kind."""
    arrays = together([dataclasses.replace(member, system=None) for member in members])
    return dataclasses.replace(arrays, system=stack([member.system for member in members]))
