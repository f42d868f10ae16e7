"""Parts of a certificate: the state of cell, constraints and strain, and the derivative's error."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mdsens._util.attributes import Named
from mdsens._util.portable import Portable
from mdsens._util.pytree import PyTree
from mdsens._util.tables import Shown
from mdsens.mechanics.contact_changes import Crossing
from mdsens.mechanics.status import Status
from mdsens.mechanics.unknowns import Unknowns

__all__ = ["CellState", "ConstraintState", "DerivativeCertificate", "StrainState"]


@dataclasses.dataclass(frozen=True)
class CellState(Named):
    """Stress and stiffness of a cell that was relaxed under a load.

    Attributes:
      pressure: the pressure P to which the cell was relaxed, in energy/volume: -tr(target) / d.
      shape: True where the cell's shape was relaxed, and not its size alone.
      pressure_left: the actual pressure minus P, in the free strains of the cell.
      shear_left: the largest shear stress left; NaN where the shape was not free.
      stiffness: (k,) eigenvalues of the symmetric part of S / V in ascending order, in
        energy/volume. V is the volume, and S the derivative of V (sigma - target) by the k strains
        that the cell is free to take, with relaxed particles; sigma is the stress. At a pressure S
        is the second derivative of the enthalpy. Where only the size is free, k = 1 and the
        eigenvalue is d times Birch's bulk modulus, in dimension d. Positions and cell together are
        stable where the Hessian in the fixed cell and this part of S are both positive definite.
      stable: whether S could be computed and its symmetric part is positive definite.
      strain: norm of the cell's strain in the Newton step to the exact minimum.
      hydrostatic: True where the cell was relaxed to a pressure and all axes were free to stretch.
      load: the load in words, such as "pressure 0.05".
      target: (d, d) the stress to which the cell was relaxed, positive in tension: at a pressure
        -P 1; at a volume the deviatoric part of the stress.
      stress_left: (d, d) the part along the free strains of stress minus ``target``.
    """

    pressure: float
    shape: bool
    pressure_left: float
    shear_left: float
    stiffness: np.ndarray
    stable: bool
    strain: float
    hydrostatic: bool
    load: str
    target: np.ndarray
    stress_left: np.ndarray

    @property
    def stiffness_min(self) -> float:
        """The smallest stiffness of the cell, with relaxed particles, in energy/volume."""
        return float(self.stiffness[0])


@dataclasses.dataclass(frozen=True)
class StrainState(Named):
    """Stiffness against strain of a minimum in a cell of fixed size or fixed shape.

    The stiffness is Birch's tensor (the derivative of the stress by the strain) with relaxed
    particles, in energy/volume.

    Attributes:
      bulk: bulk modulus -V dP/dV; zero where it is round-off.
      shear: shear modulus, averaged over all directions; zero where it is round-off.
      smallest: the smallest eigenvalue of the symmetrized tensor; positive where no strain lowers
        the enthalpy (Born).
      status: the stability that follows from the moduli, see
        :func:`mdsens.mechanics.stability.verdict`; or the status of the linear solves where they
        failed. A cluster that is not connected to its periodic image is FLOPPY too, even if the
        cluster itself is rigid.
    """

    bulk: float
    shear: float
    smallest: float
    status: Status


@dataclasses.dataclass(frozen=True, repr=False)
class DerivativeCertificate(Portable, Shown):
    """Error and range of the derivative of the minimum along a direction in parameter space.

    Errors are relative to the norm of the response; they are NaN where that norm is zero. In a
    relaxed cell all norms are of positions and cell together.

    Attributes:
      dparams: the direction in parameter space, by parameter name.
      response: the derivative J = dR/dt of the relaxed positions R (n, d) at t = 0, for parameters
        params + t dparams, as ``jvp`` returns it; in a relaxed cell ``Unknowns`` with the strain of
        the cell.
      norm: the norm |J|; in a relaxed cell that of the strain and the non-affine motion together.
      status: status of the linear solve.
      residual: relative residual of the linear solve.
      linear_error: bound of the error due to the residual r of the linear solve, |H^-1 r| <= |r| /
        lambda_min, relative to |J|. H is the Hessian, and lambda_min its smallest stiffness.
      error: the sharp estimate of the error, |dJ| / |J|, where dJ is the derivative of J along the
        Newton step to the minimum.
      corrected: J + dJ, more accurate than J where the estimates hold.
      error_bound: the estimate by Theorem 1 of arXiv:2105.15183, relative to |J|,
        (beta / alpha + gamma |B dp| / alpha^2) |x - x*|. Here x is where the relaxation ended, x*
        the minimum, and B dp the derivative of the condition F = 0 of the minimum along
        ``dparams``. alpha is the smallest stiffness (in a relaxed cell a lower bound of the
        stiffness of positions and cell together), and beta and gamma are the rates at which B dp
        and H change along the Newton step. NaN where alpha is not known to be positive, and where
        the potential's third derivative diverges at a breakpoint (Hertzian contacts), so that gamma
        has no bound there. The attribute ``steps_to_crossing`` of the ``Certificate`` then tells
        after how many Newton steps a pair crosses a breakpoint.
      crossing: the values of t at which pairs cross breakpoints along params + t dparams. A
        breakpoint is a distance at which a derivative of the potential jumps or diverges.
      forward, backward: the derivative is valid for -backward < t < forward along params +
        t dparams: to first order, no pair crosses a breakpoint in this range, and no coordinate
        meets or leaves its bound.
      curvature_scale: |t| at which the curvature of the relaxed positions R(t) moves the particles
        as far as their slope does, 2 |J| / |d2R/dt2|: the scale on which the response of a smooth
        potential changes.
      on_rattlers: norm of the part of ``dparams`` in parameters of rattlers, which have no effect,
        relative to the norm of ``dparams``.
      vanishes: True where nothing moves: less than 1e-6 of the length scale of the potential
        (contact distance, or the distance of the minimum of the pair energy) while the parameters
        change by as much as their values. The relative errors and the range have no meaning then.
      switch: under constraints, two numbers: the smallest t > 0, and the smallest |t| of all t < 0,
        at which a coordinate meets or leaves its bound.
    """

    dparams: dict[str, PyTree]
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
        """The largest |t| along params + t dparams up to which no pair crosses a breakpoint.

        A breakpoint is a distance at which a derivative of the potential jumps or diverges. Under
        constraints, no coordinate meets or leaves its bound up to this |t| either.
        """
        return min(self.forward, self.backward)

    @property
    def positions(self) -> np.ndarray:
        """The response of the Cartesian positions, (n, d), including their motion with the cell."""
        # in a relaxed cell and under constraints the response has further parts
        return np.asarray(
            self.response.positions if isinstance(self.response, Unknowns) else self.response
        )

    def crossed(self, change: float) -> int:
        """Count the pairs that cross a breakpoint while the parameters are params + t dparams.

        Pairs that cross at |t| <= ``change`` are counted, to first order. A breakpoint is a
        distance at which a derivative of the potential jumps or diverges. Where single pairs cross,
        linear predictions of positions are no longer valid, but those of bulk properties of many
        particles are.
        """
        return self.crossing.within(change)

    _title = "DerivativeCertificate"

    def _rows(self) -> list[tuple[str, str]]:
        return [
            ("norm of the response", f"{self.norm:.6g}; linear solve: {self.status.name}"),
            (
                "error, sharp estimate",
                f"{self.error:.1e}, relative; the certificate says whether it holds",
            ),
            ("radius", f"-{self.backward:.2e} < t < {self.forward:.2e}"),
        ]


@dataclasses.dataclass(frozen=True)
class ConstraintState(Named):
    """The state of the constraints at a minimum.

    Attributes:
      pinned: number of coordinates that are pinned.
      bound: number of coordinates, and of parameters that constraints relax, that are at a bound
        and pushed against the bound.
      equations: number of equations g = 0.
      redundant: number of equations that repeat others.
      switching: number of coordinates that are about to meet or to leave their bound.
      violation: the largest |g| of the equations g = 0.
      largest: the largest absolute multiplier of each constraint, by constraint name.
    """

    pinned: int
    bound: int
    equations: int
    redundant: int
    switching: int
    violation: float
    largest: dict[str, float]
