"""Result of a relaxation: the relaxed system, with the forces left and the status."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.batching import stack_trees
from mdsens._util.portable import Portable
from mdsens._util.tables import Shown
from mdsens.mechanics.load import CellLoad, PressureLoad
from mdsens.mechanics.status import Status, status_at
from mdsens.model.batch import stack
from mdsens.model.system import System

__all__ = ["Equilibrium", "batch_of", "largest_move"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Equilibrium(Portable, Shown):
    """A relaxed system, with the quality of the relaxation: status, forces left, number of steps.

    The class is a frozen dataclass and a jax pytree. For a batch of systems, every array has a
    leading axis over the systems.

    Attributes:
      system: the relaxed system.
      code: the code of the status, an integer array; ``status`` is the member of
        :class:`~mdsens.Status`.
      max_force: the largest norm of the force left on a particle (ASE's fmax), in energy per
        length.
      steps: number of steps of the minimizer.
      wall_time: wall time in seconds, compilation included; 0 inside traced code.
      tolerance: the force at or below which ``max_force`` counts as converged: the tolerance that
        was given, or 1e-12 of the mean pair force.
      force_floor: the largest force that round-off of the positions leaves on a particle, 4 eps
        sqrt(sum_j (k_ij |R_ij|)^2 + f_ij^2), with eps the machine precision, k_ij and f_ij the
        stiffness and the force of a pair, and |R_ij| the root mean square size of the positions of
        its two particles. No relaxation reaches smaller forces. Under constraints, and for a
        potential that is no sum over pairs, it is estimated in another way.
      saddles: number of saddles that the relaxation reached and left, each along a mode of negative
        stiffness.
      descent: energy of the first of these saddles minus the energy of the minimum.
      examined: whether the Hessian at the end was searched for modes of negative stiffness.
      pressure: pressure P at which the cell was relaxed as well, by AtPressure; else None.
      at_stress: the stress at which the cell was relaxed, by AtStress; else None. Its field
        ``stress`` is the target (d, d).
      at_volume: the volume at which the cell was relaxed, by AtVolume; else None. Its fields are
        ``volume`` and ``deviator``, the target (d, d) of the deviatoric stress.
      strains: (k, d, d) the k orthonormal strains by which the cell could deform in the relaxation;
        None if the cell was not relaxed.
      moved: the largest distance of a particle from its place at the start, beside the motion with
        the cell; None where it is not known, as in traced code. In a relaxation from positions that
        were relaxed already by another code, a distance that is not small tells that these were no
        minimum, and that the result is another configuration.
      multipliers: Lagrange multipliers, by the names of the constraints; None without constraints.
      order: number of modes of negative stiffness: 0 at a minimum, 1 at the saddle of
        ``find_saddle``.
    """

    system: System
    code: jax.Array
    max_force: jax.Array
    steps: jax.Array
    # Numbers, or arrays over the members of a batch: Any, since a union of both has no index.
    wall_time: Any
    tolerance: Any
    force_floor: Any = 0.0
    saddles: Any = 0
    descent: Any = 0.0
    examined: Any = False
    # Arrays where a cell or constraints were relaxed, else None.
    pressure: Any = None
    strains: Any = None
    at_stress: Any = None
    at_volume: Any = None
    multipliers: Any = None
    moved: Any = None
    # Static, since Python branches on it, as in ``contacts_needed``, also where jax traces. So all
    # members of a batch have the same order.
    order: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def status(self) -> Any:
        """Return how the relaxation ended, a :class:`~mdsens.Status`; for a batch the codes."""
        return status_at(self.code)

    @property
    def positions(self) -> jax.Array:
        """Return the positions of the relaxed particles, (n, d)."""
        return self.system.positions

    @property
    def params(self) -> dict[str, Any]:
        """Return the parameters of the relaxed system's potential, by name."""
        return self.system.params

    @property
    def load(self) -> CellLoad | None:
        """Return the load under which the cell was relaxed; None if the cell was not relaxed."""
        if self.pressure is not None:
            return PressureLoad(self.pressure)
        return self.at_volume if self.at_stress is None else self.at_stress

    @property
    def contacts_needed(self) -> int | None:
        """Return the number of contacts that keep a particle in place; fewer make it a rattler.

        The number is 2 at a saddle, where two contacts that oppose each other are enough. At a
        minimum the result is None, which stands for d + 1 for a potential that only repels, and for
        1 otherwise.
        """
        return 2 if self.order else None

    _title = "Equilibrium"

    def _rows(self) -> list[tuple[str, str]]:
        """Return the rows (name, value) of the table that describes the result of a relaxation."""
        s = self.system
        if s.batch is not None:
            good = sum(Status(int(code)).good for code in np.asarray(self.status))
            return [
                ("members", f"{s.batch} of n = {s.n}, {s.dimension}-D, {s.potential.name}"),
                ("converged", f"{good} of {s.batch}"),
                ("largest max_force", f"{float(jnp.max(self.max_force)):.2e}"),
            ]
        status = self.status
        limits = f"tolerance {float(self.tolerance):.0e}, round-off {float(self.force_floor):.0e}"
        rows = [
            ("system", f"n = {s.n}, {s.dimension}-D, {s.potential.name}"),
            ("status", f"{status.name}: {status.sentence}"),
        ]
        if self.order:
            rows.append(("kind", f"saddle of order {self.order}"))
        rows.append(("max_force", f"{float(self.max_force):.2e} ({limits})"))
        if self.moved is not None:
            rows.append(("moved", self.move_in_words()))
        if int(self.saddles):
            rows.append(("saddles", self.saddles_in_words()))
        if self.load is not None:
            rows.append((self.load.kind, self.cell_in_words()))
        rows.append(("steps", f"{int(self.steps):,} in {float(self.wall_time):.2f} s"))
        return rows

    def move_in_words(self) -> str:
        """Describe how far the particles moved in a relaxation, in words."""
        if self.moved is None:
            return ""
        if self.moved == 0.0:
            return "nothing: the particles were at rest at the start"
        beside = "" if self.load is None else ", beside the motion with the cell"
        return f"at most {float(self.moved):.2g} from the start{beside}"

    def saddles_in_words(self) -> str:
        """Describe the saddles that a relaxation left: their number, and the fall in energy."""
        count = "one was" if int(self.saddles) == 1 else f"{int(self.saddles)} were"
        return f"{count} left, {float(self.descent):.4g} down in energy"

    def cell_in_words(self) -> str:
        """Describe a cell that was relaxed, in words: its load, which strains relaxed, its volume.

        The text is empty where the cell was not relaxed.
        """
        if self.load is None:
            return ""
        count = sum(self.system.periodic)
        measures = {1: "length", 2: "area"}
        measure = "volume" if self.system.has_volume else measures[count]
        extent = f"{measure} {float(self.system.periodic_volume):.8g}"
        return self.load.in_words(self.strains, extent)


def largest_move(start: System, end: System) -> Any:
    """Return the largest distance of a particle from its start, a number for each of a batch.

    Where the cell changed, it is the distance beside the motion with the cell. Positions are
    compared by their nearest images.
    """
    first, last = (np.asarray(s.positions, float) for s in (start, end))
    boxes = [np.asarray(box, float) for s in (start, end) if (box := _boxes(s)) is not None]
    if boxes:
        old, new = boxes
        # columns are cell vectors: R = box @ fractions
        apart = last @ _turned(np.linalg.inv(new)) - first @ _turned(np.linalg.inv(old))
        apart -= np.where(end.periodic, np.round(apart), 0.0)
        apart = apart @ _turned(new)
    else:
        apart = last - first
    largest = np.sqrt((apart**2).sum(axis=-1)).max(axis=-1)
    return largest if largest.ndim else float(largest)


def _boxes(system: System) -> Any:
    """Return the cell matrix of a system, or those of a batch; None for open systems."""
    return system.box if system.batch is None else jax.vmap(lambda member: member.box)(system)


def _turned(matrices: np.ndarray) -> np.ndarray:
    return np.swapaxes(matrices, -1, -2)


def batch_of(members: list[Equilibrium]) -> Equilibrium:
    """Stack several relaxed systems (Equilibrium) of equal shapes into one batch."""
    # The systems are stacked by ``stack``, since their neighbor lists may differ in capacity.
    arrays = stack_trees([dataclasses.replace(member, system=None) for member in members])
    return dataclasses.replace(arrays, system=stack([member.system for member in members]))
