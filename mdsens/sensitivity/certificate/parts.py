"""The parts of a certificate: what is known of a cell, of constraints, and of the derivative along
a direction.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from mdsens._util.attributes import Named
from mdsens._util.portable import Portable
from mdsens._util.tables import Shown
from mdsens.mechanics.contact_changes import Crossing
from mdsens.mechanics.hessian import Unknowns
from mdsens.mechanics.status import Status

__all__ = ["CellState", "ConstraintState", "DerivativeCertificate", "StrainState"]


@dataclasses.dataclass(frozen=True)
class CellState(Named):
    """What is known of a cell that was relaxed to a pressure.

    Attributes:
      pressure: P, energy a volume.
      shape: True where the cell's shape was relaxed, not its size alone.
      pressure_left: the pressure less P.
      shear_left: the largest shear stress left; nan where the shape was not free.
      stiffness: (k,) eigenvalues of S / V, rising, S the second derivative of the enthalpy by the k
        strains that the cell is free to take, particles relaxed; energy a volume. Where its size
        alone is free there is one, d times Birch's bulk modulus. Positions and cell are stable
        together where the Hessian in the fixed cell and S are.
      stable: whether S is positive definite, and could be found.
      strain: norm of the strain in the Newton step.
    """

    pressure: float
    shape: bool
    pressure_left: float
    shear_left: float
    stiffness: np.ndarray
    stable: bool
    strain: float

    @property
    def stiffness_min(self) -> float:
        """The smallest eigenvalue of S / V."""
        return float(self.stiffness[0])


@dataclasses.dataclass(frozen=True)
class StrainState(Named):
    """What is known of the stiffness against strain of a minimum in a cell that takes it: of
    Birch's tensor, particles relaxed, energy a volume.

    Attributes:
      bulk, shear: the moduli, -V dP/dV and the average over directions; zero where they are
        round-off.
      smallest: the smallest eigenvalue of the symmetrized tensor: positive where no strain lowers
        the enthalpy (Born).
      status: what that makes of it, see :func:`mdsens.mechanics.stability.verdict`; or of the
        solves. FLOPPY is a cluster that meets no image of itself as well, however rigid.
    """

    bulk: float
    shear: float
    smallest: float
    status: Status


@dataclasses.dataclass(frozen=True, repr=False)
class DerivativeCertificate(Portable, Shown):
    """What is known of the derivative of the minimum along one direction in parameter space.

    Errors are relative to the norm of the response; nan where there is none to be relative to. At a
    pressure norms are of positions and cell, as the certificate's lengths are.

    Attributes:
      dparams: the direction.
      response: J = dR/dt (n, d), as ``jvp`` gives it; at a pressure ``Unknowns``, of positions and
        cell.
      norm: |J|; at a pressure of the motion from the affine places and of the strain.
      status: of the linear solve.
      residual: of the linear solve, relative.
      linear_error: |H^-1 r| <= |r| / lambda_min: the residual's share of the error, relative to
        |J|.
      error: the sharp estimate |dJ| / |J|, dJ the derivative of J along the Newton step to the
        minimum.
      corrected: J + dJ, more accurate than J where the estimates hold.
      theorem: the estimate after Theorem 1 of arXiv:2105.15183, (beta / alpha + gamma R / alpha^2)
        |x - x*|, relative: alpha the smallest stiffness (at a pressure a lower bound of that of
        positions and cell together), R = |B dp|, beta and gamma how fast B dp and H change along
        the Newton step. nan where the potential's third derivative diverges at a breakpoint
        (Hertzian contacts), so that gamma has no bound there: ``steps_to_crossing`` of the
        certificate takes its place.
      crossing: when pairs cross breakpoints along the path.
      radius: the largest |t| along params + t dparams within which no pair crosses a breakpoint and
        no coordinate meets or leaves its bound, to first order.
      forward, backward: the same for t > 0 and t < 0.
      bend: |t| at which the path's curvature moves the particles as far as its slope does, 2 |J| /
        |d2R/dt2|: the scale on which a smooth potential's response changes.
      on_rattlers: the part of dparams' norm in components of particles that are rattlers: they have
        no effect.
      vanishes: True where nothing moves: less than 1e-6 of the potential's length while the
        parameters change by their size. Errors relative to it, and the reach, are of no meaning
        then.
      switch: under constraints the first t > 0 and the first -t > 0 at which a coordinate meets or
        leaves its bound.
    """

    dparams: dict[str, jax.Array]
    response: Any
    norm: float
    status: Status
    residual: float
    linear_error: float
    error: float
    corrected: Any
    error_bound: float
    crossing: Crossing
    forward: float
    backward: float
    curvature_scale: float
    on_rattlers: float
    vanishes: bool
    switch: tuple[float, float] = (float("inf"), float("inf"))

    @property
    def radius(self) -> float:
        return min(self.forward, self.backward)

    @property
    def positions(self) -> np.ndarray:
        """(n, d), the response of the stored positions."""
        return np.asarray(
            self.response.positions if isinstance(self.response, Unknowns) else self.response
        )

    def crossed(self, change: float) -> int:
        """How many pairs cross a breakpoint within |t| <= change, to first order.

        Bulk properties of many particles survive single crossings; positions do not.
        """
        return self.crossing.within(change)

    _title = "DerivativeCertificate"

    def _rows(self) -> list[tuple[str, str]]:
        return [
            ("norm of the response", f"{self.norm:.6g}; linear solve: {self.status.name}"),
            (
                "error, sharp estimate",
                f"{self.error:.1e}, relative; where it holds, the certificate says",
            ),
            ("radius", f"-{self.backward:.2e} < t < {self.forward:.2e}"),
        ]


@dataclasses.dataclass(frozen=True)
class ConstraintState(Named):
    """What is known of the constraints at a minimum.

    Attributes:
      pinned: coordinates that never move.
      bound: coordinates, and parameters that constraints relax, that are at a bound and pushed
        against it.
      equations: how many.
      redundant: of these, how many repeat others.
      switching: coordinates that are about to meet or to leave their bound.
      violation: the largest |g| of the equations.
      largest: the largest multiplier by the constraint's name, in size.
    """

    pinned: int
    bound: int
    equations: int
    redundant: int
    switching: int
    violation: float
    largest: dict[str, float]
