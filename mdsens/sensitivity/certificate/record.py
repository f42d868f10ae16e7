"""What is known of a minimum and of its derivative: the figures, and the page that a physicist
reads.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mdsens._util import tables
from mdsens._util.tables import Rows, Shown
from mdsens.implicit.linear.eigen import Spectrum
from mdsens.mechanics.status import Status
from mdsens.sensitivity.certificate.parts import (
    CellState,
    ConstraintState,
    DerivativeCertificate,
    StrainState,
)

__all__ = ["Certificate", "count"]


@dataclasses.dataclass(frozen=True, repr=False)
class Certificate(Shown):
    """What is known of a minimum and, where a direction was given, of its derivative. Print it.

    Attributes:
      status: the gravest of ``findings``.
      findings: every status that is not CONVERGED, with a sentence and its figures, gravest first.
      max_force: the largest net force on a particle, energy a length.
      relative_force: the same over the mean force of a contact; nan where the potential attracts
        too, or nothing touches.
      mean_force: that mean.
      distance: |F|_2 / lambda_min, off the null space: |x - x*| is no longer, to first order (the
        stiffness is taken here, not along the way); a length. inf where not all modes are stable.
      newton: length of the Newton step H^+ F: the estimate of that distance; nan where nothing is
        held.
      stiffness_min, stiffness_max: extreme eigenvalues of the Hessian off its null space, energy a
        length squared.
      spectrum: the lowest modes, each with its residual.
      participation: (k,) of those modes: 1 where all particles move alike, 1/n where one does.
      negative_modes: how many modes have a stiffness below -1e-12 of the largest.
      floppy_modes: how many have none (below 1e-12 of the largest) beyond the known null space.
      unsettled_modes: how many of the ones computed have less than the force left can make or take,
        10 max_force over the potential's length, so that it is not known which they are.
      zero_modes: dimension of the null space, floppy modes included.
      translations, rotations: how many of these each are.
      rattlers: (n,) particles that nothing holds.
      crossed_to_minimum: how many pairs cross a breakpoint along the Newton step, or are in doubt.
      steps_to_crossing: how many times the Newton step until the first pair crosses one, to first
        order.
      derivative: of the direction that was asked for; None without one.
      observable: shares of the observable's gradient by positions on ``rattlers`` and on ``rigid
        motions``, which have no derivative; None without an observable.
      precision: of the positions.
      cell: of a minimum at a pressure; None in a given cell. Lengths are then of positions and cell
        together: a strain counts as the motion that it gives to n particles spread evenly over the
        cell, n^(1/2) V^(1/d) / 12^(1/2) times its norm. The stiffness of modes stays that in the
        fixed cell.
      constraints: what is known of them; None without. Stiffness and modes are then those on the
        tangent space: what is held stays, and the equations hold to first order.
      order: of the saddle that was examined, the number of negative modes that it is to have; 0 of
        a minimum. What is said of a minimum is then said of the saddle.
      strain: how stiff the configuration is against strains that its cell takes, the size's or all;
        None without a cell, where its shape was relaxed too (``cell`` says it then), under
        constraints, and where it is no stable minimum to begin with.
    """

    status: Status
    findings: tuple[tuple[Status, str], ...]
    max_force: float
    relative_force: float
    mean_force: float
    distance: float
    newton_step_norm: float
    stiffness_min: float
    stiffness_max: float
    spectrum: Spectrum
    participation: np.ndarray
    negative_modes: int
    floppy_modes: int
    unsettled_modes: int
    zero_modes: int
    translations: int
    rotations: int
    rattlers: np.ndarray
    crossed_to_minimum: int
    steps_to_crossing: float
    derivative: DerivativeCertificate | None
    observable: dict[str, float] | None
    precision: str
    cell: CellState | None = None
    order: int = 0
    constraints: ConstraintState | None = None
    strain: StrainState | None = None

    @property
    def estimates_hold(self) -> bool:
        """Whether the way to the minimum lies within one contact network, and leads to a minimum."""
        loose = self.negative_modes != self.order or self.floppy_modes or self.unsettled_modes
        return not (self.crossed_to_minimum or loose) and (self.cell is None or self.cell.stable)

    @property
    def error(self) -> float:
        """Relative error of the derivative, the sharp estimate; inf where it does not hold, nan
        without a direction.
        """
        return self._of_direction("error")

    @property
    def bound(self) -> float:
        """The estimate after Theorem 1, relative; inf where it does not hold, nan without a
        direction.
        """
        return self._of_direction("error_bound")

    def _of_direction(self, name: str) -> float:
        if self.derivative is None:
            return float("nan")
        return getattr(self.derivative, name) if self.estimates_hold else float("inf")

    @property
    def radius(self) -> float:
        """The validity radius along the direction; nan without one."""
        return self.derivative.radius if self.derivative else float("nan")

    @property
    def warnings(self) -> tuple[tuple[Status, str], ...]:
        """The findings that leave the numbers usable."""
        return tuple(f for f in self.findings if f[0].warning)

    def as_dict(self) -> dict[str, Any]:
        """Every figure as plain numbers and texts, for JSON: None stands for what is infinite or
        not a number.

        Units are the potential's: forces in energy/length, distances in length, stiffness in
        energy/length^2; errors are relative, and radii changes of t in params + t dparams.
        """
        keys = (
            "max_force",
            "relative_force",
            "mean_force",
            "distance",
            "newton_step_norm",
            "stiffness_min",
            "stiffness_max",
        )
        keys += ("steps_to_crossing",)
        counts = (
            "negative_modes",
            "floppy_modes",
            "unsettled_modes",
            "zero_modes",
            "translations",
            "rotations",
        )
        counts += ("crossed_to_minimum", "order")
        found: dict[str, Any] = {"status": self.status.name, "precision": self.precision}
        found["findings"] = [
            {"status": code.name, "sentence": said} for code, said in self.findings
        ]
        found |= {key: float(getattr(self, key)) for key in keys} | {
            key: int(getattr(self, key)) for key in counts
        }
        found["rattlers"] = np.flatnonzero(self.rattlers).tolist()
        found["modes"] = {
            "stiffness": self.spectrum.values.tolist(),
            "residual": self.spectrum.residuals.tolist(),
            "participation": self.participation.tolist(),
            "method": self.spectrum.method,
        }
        if self.cell is not None:
            given = dataclasses.asdict(self.cell)
            found["cell"] = {
                name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in given.items()
            }
        if self.constraints is not None:
            found["constraints"] = dataclasses.asdict(self.constraints)
        if self.strain is not None:
            found["strain"] = dataclasses.asdict(self.strain) | {"status": self.strain.status.name}
        if self.derivative is not None:
            d = self.derivative
            names = (
                "norm",
                "residual",
                "linear_error",
                "radius",
                "forward",
                "backward",
                "curvature_scale",
                "on_rattlers",
            )
            derivative: dict[str, Any] = {name: float(getattr(d, name)) for name in names}
            derivative |= {
                "error": self.error,
                "error_bound": self.bound,
                "estimates_hold": self.estimates_hold,
            }
            derivative |= {"status": d.status.name, "vanishes": d.vanishes}
            derivative["dparams"] = {
                name: np.asarray(change).tolist() for name, change in d.dparams.items()
            }
            for side, ahead in (
                ("pair_forward", d.crossing.first(True)),
                ("pair_backward", d.crossing.first(False)),
            ):
                pair = ahead and dict(
                    zip(
                        ("particles", "opens", "distance"),
                        (list(ahead[0]), *ahead[1:]),
                        strict=True,
                    )
                )
                derivative[side] = pair
            finite = d.radius if 0 < d.radius < np.inf else 0.0
            derivative["pairs_crossed"] = [
                {"within": f * finite, "pairs": d.crossed(f * finite)} for f in (3, 10, 100)
            ]
            found["derivative"] = derivative
        if self.observable is not None:
            found["observable"] = dict(self.observable)
        return _plain(found)

    _title = "Certificate"

    def _sections(self) -> list[tuple[str, Rows]]:
        said = [(code.name, sentence) for code, sentence in self.findings]
        if said and self.derivative is None and not self.spectrum.values.size:
            said.append(("derivative", self._loose))
        verdict = [("status", f"{self.status.name}: {self.status.sentence}")] if not said else said
        sections: list[tuple[str, Rows]] = [
            ("Certificate", verdict),
            (f"Is it a {self._place}?", self._of_minimum()),
        ]
        sections.append(("Is it stable?", self._of_stability()))
        if self.derivative is not None:
            sections.append(("How wrong can the derivative be?", self._of_error(self.derivative)))
            sections.append(("How far does it reach?", self._of_reach(self.derivative)))
        if self.observable is not None:
            parts = [
                ("on rattlers", self.observable["rattlers"]),
                ("on rigid motions", self.observable["rigid motions"]),
            ]
            rows = [
                (name, f"{share:.1e} of the observable's gradient by positions")
                for name, share in parts
            ]
            sections.append(("What of the observable has no answer?", rows))
        return sections

    def _rows(self) -> list[tuple[str, str]]:
        (_, first), *others = self._sections()
        return [*first, *(row for title, rows in others for row in [(title, ""), *rows])]

    def __str__(self) -> str:
        return self.page()

    def page(self, derivative_only: bool = False) -> str:
        """What ``print`` shows; or of it what belongs to the direction alone, where several share a
        minimum.
        """
        sections = self._sections()
        if derivative_only:
            sections = [
                s
                for s in sections
                if s[1] and s[0] not in (f"Is it a {self._place}?", "Is it stable?")
            ]
        width = max((len(name) for _, rows in sections for name, _ in rows), default=0)
        return "\n\n".join(
            tables.text(title, [(f"{name:<{width}}", value) for name, value in rows])
            for title, rows in sections
        )

    @property
    def _place(self) -> str:
        return f"saddle of order {self.order}" if self.order else "minimum"

    @property
    def _no_place(self) -> str:
        return f"this is no {self._place} of a rigid state"

    @property
    def _loose(self) -> str:
        """Why there is no figure where nothing can move: every particle is a rattler, or
        constraints hold them all.
        """
        if self.constraints is not None and not np.all(self.rattlers):
            return "none: the constraints leave nothing to move"
        doubt = "not known: no contact carries 10 times the force left"
        return doubt if self.crossed_to_minimum else "none: nothing is held"

    def _of_minimum(self) -> Rows:
        steps, cell = self.steps_to_crossing, self.cell
        strained = "" if cell is None else f", in which the cell strains by {cell.strain:.1e}"
        ahead = f"; the first changes after {steps:.0e} such steps" if 1.0 < steps < np.inf else ""
        relative = (
            ""
            if np.isnan(self.relative_force)
            else f", {self.relative_force:.1e} of the mean contact force"
        )
        distance = (
            f"length {self.newton_step_norm:.1e} (Newton step{strained}), at most {self.distance:.1e} to"
            " first order"
        )
        if not np.isfinite(self.distance):
            distance = (
                self._loose if np.isnan(self.newton_step_norm) else f"not known: {self._no_place}"
            )
        return [
            ("largest net force", f"{self.max_force:.2e} energy/length, on a particle{relative}"),
            *([] if cell is None else [("stress left", _stress_left(cell))]),
            *([] if self.constraints is None else _constraint_rows(self.constraints)),
            (f"distance to the {self._place}", distance),
            ("contacts on that way", f"{self.crossed_to_minimum or 'none'} in doubt{ahead}"),
        ]

    def _of_stability(self) -> Rows:
        s = self.spectrum
        if not s.values.size:
            return [("smallest stiffness", self._loose)]
        share = ", as all the others have"
        if self.stiffness_max:
            share = (
                f", {self.stiffness_min / self.stiffness_max:.1e} of the largest"
                f" ({self.stiffness_max:.4g})"
            )
        unsure = "" if s.counted else ", of the modes computed"
        kinds = (
            (self.translations, "translation"),
            (self.rotations, "rotation"),
            (self.floppy_modes, "floppy mode"),
        )
        loose = int(self.rattlers.sum())
        parts = [count(number, name) for number, name in kinds if number]
        if loose:
            parts.append(
                f"{count(self.zero_modes - sum(c for c, _ in kinds), 'motion')} of"
                f" {count(loose, 'rattler')}"
            )
        unsettled = (
            f"; {self.unsettled_modes} in doubt, below {s.floor:.0e}"
            if self.unsettled_modes
            else ""
        )
        rows = [
            (
                "smallest stiffness",
                f"{self.stiffness_min:.6g} energy/length^2{share}",
            ),
            (
                "how it was found",
                (
                    f"eigenvalue residual {s.residuals[0]:.0e}, {s.method}; participation"
                    f" {self.participation[0]:.2f}"
                ),
            ),
            (
                "negative, floppy modes",
                (
                    f"{self.negative_modes or 'none'},"
                    f" {self.floppy_modes or 'none'}{unsure}{unsettled}"
                ),
            ),
            *([] if self.cell is None else [("stiffness of the cell", _cell_stiffness(self.cell))]),
            *([] if self.strain is None else [("against strain", _strain_stiffness(self.strain))]),
            ("zero modes", f"{self.zero_modes}: {', '.join(parts) or 'none'}"),
        ]
        if s.values.size > 1:
            modes = [
                f"{v:.4g} ({p:.2f})" for v, p in zip(s.values, self.participation, strict=True)
            ]
            rows.append(("lowest modes", "stiffness (participation): " + ", ".join(modes)))
        return rows

    def _of_error(self, d: DerivativeCertificate) -> Rows:
        if d.vanishes:
            return [
                (
                    "response",
                    f"none: nothing moves (norm {d.norm:.1e}; linear solve: {d.status.name})",
                )
            ]
        unsettled = self.crossed_to_minimum > 0
        why = f"a contact changes on the way to the {self._place}" if unsettled else self._no_place
        void = f"no estimate holds: {why}"
        error_bound = f"{d.error_bound:.1e} (an estimate: its constants are taken at this point)"
        if not d.error_bound < 1.0:
            error_bound = f"not informative: {d.error_bound:.1e}"
        if np.isnan(d.error_bound):
            error_bound = "none: the potential's third derivative diverges at a contact; see when the first changes"
        share = f"at most {d.linear_error:.1e}" if np.isfinite(d.linear_error) else "not known"
        rows = [
            ("norm of the response", f"{d.norm:.6g}; linear solve: {d.status.name}"),
            ("error, sharp estimate", f"{d.error:.1e}, relative" if self.estimates_hold else void),
            ("error, Theorem 1", error_bound if self.estimates_hold else void),
            ("share of the linear solve", f"{share} (residual {d.residual:.1e})"),
        ]
        if d.on_rattlers > 0:
            rows.append(("direction on rattlers", f"{d.on_rattlers:.1e} of it, without effect"))
        return rows

    def _of_reach(self, d: DerivativeCertificate) -> Rows:
        if d.vanishes:
            return [("change", "none has an effect")]
        rows = []
        for name, value, forward in (
            ("forward, t < ", d.forward, True),
            ("backward, t > -", d.backward, False),
        ):
            ahead = d.crossing.first(forward)
            if value == d.switch[0 if forward else 1] < np.inf:
                rows.append((f"{name}{value:.2e}", "then a coordinate meets or leaves its bound"))
            elif ahead is None:
                rows.append((name.split(",")[0], "no pair crosses a breakpoint of its potential"))
            else:
                (i, j), opens, length = ahead
                way = f"{'opens' if opens else 'closes'}, at distance {length:.4g}"
                rows.append((f"{name}{value:.2e}", f"then pair {i}-{j} {way}"))
        if np.isfinite(d.radius) and d.radius > 0:
            counts = ", ".join(
                f"{d.crossed(f * d.radius)} within {f * d.radius:.1e}" for f in (3, 10, 100)
            )
            rows.append(
                (
                    "pairs that cross",
                    f"{counts} (moduli survive single crossings, positions do not)",
                )
            )
        if np.isfinite(d.curvature_scale):
            rows.append(
                (
                    "scale of the curvature",
                    f"{d.curvature_scale:.1e}: there curvature moves particles as far as the slope",
                )
            )
        return rows


def _stress_left(cell: CellState) -> str:
    share = f", {abs(cell.pressure_left / cell.pressure):.1e} of it" if cell.pressure else ""
    shear = f"; a shear stress of {cell.shear_left:.1e}" if cell.shape else "; the shape was given"
    return (
        f"the pressure is off {cell.pressure:.6g} by {cell.pressure_left:.1e}"
        f" energy/volume{share}{shear}"
    )


def _constraint_rows(c: ConstraintState) -> Rows:
    parts = [count(c.pinned, "pinned coordinate")] if c.pinned else []
    parts += [f"{c.bound} at a bound"] if c.bound or c.switching else []
    parts += [f"{c.switching} of these about to meet or leave it"] if c.switching else []
    parts += [f"{count(c.equations, 'equation')}, met to {c.violation:.1e}"] if c.equations else []
    parts += [f"{c.redundant} of them redundant"] if c.redundant else []
    largest = ", ".join(f"{name} {value:.4g}" for name, value in c.largest.items())
    return [
        ("constraints", ", ".join(parts) or "none holds anything"),
        ("largest multipliers", largest),
    ]


def _cell_stiffness(cell: CellState) -> str:
    which = (
        f"the smallest of {len(cell.stiffness)}" if cell.shape else "against a change of its size"
    )
    return f"{cell.stiffness_min:.6g} energy/volume at this pressure, particles relaxed, {which}"


def _strain_stiffness(strain: StrainState) -> str:
    if np.isnan(strain.smallest):
        return f"not known: {strain.status.name} in the linear solves"
    doubt = {
        Status.FLOPPY: "; nothing, to round-off",
        Status.STIFFNESS_UNSETTLED: "; of either sign, for the force left",
    }
    return (
        f"bulk modulus {strain.bulk:.4g}, shear modulus {strain.shear:.4g}, smallest eigenvalue"
        f" {strain.smallest:.4g} energy/volume, of Birch's tensor{doubt.get(strain.status, '')}"
    )


def count(number: int, noun: str) -> str:
    """A number of things, in words."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _plain(value: Any) -> Any:
    """The same with None for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
