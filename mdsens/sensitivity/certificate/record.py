"""The certificate of a minimum and of its derivative: all figures, and the text printed of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mdsens._util import tables
from mdsens._util.pytree import named_leaves
from mdsens._util.tables import Rows, Shown
from mdsens.implicit.linear.eigen import Spectrum
from mdsens.mechanics.contact_changes import FirstCrossing
from mdsens.mechanics.status import Status
from mdsens.sensitivity.certificate.parts import (
    CellState,
    ConstraintState,
    DerivativeCertificate,
    StrainState,
)

__all__ = ["Certificate", "count"]

# Multiples of the validity radius for which the number of crossing pairs is reported.
RADII_SHOWN = (3, 10, 100)


@dataclasses.dataclass(frozen=True, repr=False)
class Certificate(Shown):
    """The figures on a minimum and, where a direction was given, on its derivative.

    ``print`` shows the figures on one page. x is where the relaxation ended and x* the exact
    minimum, F = dU/dR the condition that is zero at x*, H the Hessian, and lambda_min its smallest
    stiffness.

    Attributes:
      status: the gravest of ``findings``.
      findings: every status that is not CONVERGED, with a sentence and its figures, gravest first.
      max_force: the largest net force on a particle, in energy/length.
      relative_force: ``max_force`` over ``mean_force``; NaN where the potential attracts too, or
        where there are no contacts.
      mean_force: the mean force of a contact.
      distance: |F|_2 / lambda_min, outside of the null space, a length: to first order an upper
        bound of |x - x*|, with the stiffness at x and not along the way to x*. Infinite where not
        all modes are stable.
      newton_step_norm: norm of the Newton step H^+ F, the estimate of |x - x*|; NaN where nothing
        can move.
      stiffness_min, stiffness_max: extreme eigenvalues of the Hessian outside of its null space, in
        energy/length^2.
      spectrum: the lowest modes, each with its residual.
      participation: (k,) participation ratio of each of the k lowest modes: 1 where all particles
        move alike, 1/n where a single particle moves.
      negative_modes: number of modes whose stiffness is below -1e-12 of the largest.
      floppy_modes: number of modes beyond the known null space whose stiffness is zero (below 1e-12
        of the largest).
      unsettled_modes: number of the computed modes whose stiffness is smaller than what the force
        left on the particles can add or remove, 10 max_force over the length scale of the potential
        (contact distance, or the distance of the minimum of the pair energy). It is not known
        whether these modes are stable.
      zero_modes: dimension of the null space, floppy modes included.
      translations, rotations: number of translations and of rotations in the null space.
      rattlers: (n,) True for particles with too few contacts to be part of the network.
      crossed_to_minimum: number of pairs that cross a breakpoint along the Newton step, or for
        which it is not known whether they do. A breakpoint is a distance at which a derivative of
        the potential jumps or diverges.
      steps_to_crossing: to first order, the number of Newton steps of length ``newton_step_norm``
        until the first pair crosses a breakpoint.
      derivative: the certificate of the derivative along ``dparams``; None without a direction.
      observable: a dict with the keys "rattlers" and "rigid motions": the share of the observable's
        gradient by the positions that lies on them, and has no derivative by the parameters. None
        without an observable.
      precision: dtype of the positions.
      cell: the cell where it was relaxed; None in a fixed cell. In a relaxed cell, lengths such as
        ``distance`` are norms of positions and cell together: a strain counts as the motion that
        it causes in n particles spread evenly over the cell, n^(1/2) V^(1/d) / 12^(1/2) times the
        norm of the strain, with the volume V in dimension d. The stiffness of modes is still that
        in the fixed cell.
      order: order of a saddle, the number of negative modes that it must have; 0 for a minimum. At
        a saddle, what is written here on a minimum applies to the saddle.
      constraints: the state of the constraints; None without constraints. Under constraints,
        stiffness and modes are those on the tangent space: coordinates that are pinned or at a
        bound are fixed, and the constraints' equations hold to first order.
      strain: stiffness against all strains, for a minimum whose cell prevents some of them. None
        without a cell, where the cell's shape was relaxed too (``cell`` contains the stiffness
        then), under constraints, and where the configuration is no stable minimum.
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
        """Whether the Newton step leads to a stable minimum without any change of contacts.

        Only then do the estimates of the error of the derivative hold.
        """
        # unsettled modes count as unstable: any of them may have a negative stiffness
        unstable = self.negative_modes != self.order or self.floppy_modes or self.unsettled_modes
        cell_is_stable = self.cell is None or self.cell.stable
        return not (self.crossed_to_minimum or unstable) and cell_is_stable

    # As attributes of the certificate the estimates are infinite where they do not hold, so that no
    # comparison takes them for small; ``derivative`` has the plain figures.
    @property
    def error(self) -> float:
        """The sharp estimate of the derivative's relative error.

        It is the change of the derivative along the Newton step to the exact minimum. The value is
        infinite where the estimate does not hold, and NaN where no derivative was examined.
        """
        return self._estimate("error")

    @property
    def bound(self) -> float:
        """The estimate of the derivative's relative error by Theorem 1 of arXiv:2105.15183.

        The value is infinite where the estimate does not hold, and NaN where no derivative was
        examined. The formula is in :class:`DerivativeCertificate`, under ``error_bound``.
        """
        return self._estimate("error_bound")

    def _estimate(self, name: str) -> float:
        """Return an estimate of the derivative's error; infinite if the estimates do not hold.

        The value is NaN where no derivative was examined.

        Args:
          name: which estimate, "error" or "error_bound" of :class:`DerivativeCertificate`.
        """
        if self.derivative is None:
            return float("nan")
        return getattr(self.derivative, name) if self.estimates_hold else float("inf")

    @property
    def radius(self) -> float:
        """The largest |t| along params + t dparams up to which the derivative is valid.

        Up to this |t| no pair crosses a breakpoint, a distance at which a derivative of the
        potential jumps or diverges, and no coordinate meets or leaves its bound. NaN where no
        direction ``dparams`` was given.
        """
        return self.derivative.radius if self.derivative else float("nan")

    @property
    def warnings(self) -> tuple[tuple[Status, str], ...]:
        """The findings that are warnings only: the results can be used in spite of them."""
        return tuple(finding for finding in self.findings if finding[0].warning)

    def as_dict(self) -> dict[str, Any]:
        """Return every figure as plain numbers and texts, for JSON.

        None replaces numbers that are infinite or NaN. Units are those of the potential: forces in
        energy/length, distances in length, stiffness in energy/length^2. Errors are relative, and
        radii are changes of t in params + t dparams.
        """
        numbers = (
            "max_force",
            "relative_force",
            "mean_force",
            "distance",
            "newton_step_norm",
            "stiffness_min",
            "stiffness_max",
            "steps_to_crossing",
        )
        counts = (
            "negative_modes",
            "floppy_modes",
            "unsettled_modes",
            "zero_modes",
            "translations",
            "rotations",
            "crossed_to_minimum",
            "order",
        )
        figures: dict[str, Any] = {"status": self.status.name, "precision": self.precision}
        figures["findings"] = [
            {"status": status.name, "sentence": sentence} for status, sentence in self.findings
        ]
        figures |= {name: float(getattr(self, name)) for name in numbers}
        figures |= {name: int(getattr(self, name)) for name in counts}
        figures["rattlers"] = np.flatnonzero(self.rattlers).tolist()
        figures["modes"] = {
            "stiffness": self.spectrum.values.tolist(),
            "residual": self.spectrum.residuals.tolist(),
            "participation": self.participation.tolist(),
            "method": self.spectrum.method,
        }
        if self.cell is not None:
            figures["cell"] = _with_lists(dataclasses.asdict(self.cell))
        if self.constraints is not None:
            figures["constraints"] = dataclasses.asdict(self.constraints)
        if self.strain is not None:
            strain = dataclasses.asdict(self.strain)
            # json would write the status, an integer, as its code
            figures["strain"] = strain | {"status": self.strain.status.name}
        if self.derivative is not None:
            figures["derivative"] = self._figures_of_derivative(self.derivative)
        if self.observable is not None:
            figures["observable"] = dict(self.observable)
        return _without_nan(figures)

    def _figures_of_derivative(self, d: DerivativeCertificate) -> dict[str, Any]:
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
        figures: dict[str, Any] = {name: float(getattr(d, name)) for name in names}
        # not those of ``d``: infinite where the estimates do not hold, which JSON shows as null
        figures |= {
            "error": self.error,
            "error_bound": self.bound,
            "estimates_hold": self.estimates_hold,
            "status": d.status.name,
            "vanishes": d.vanishes,
        }
        figures["dparams"] = {
            name: np.asarray(change).tolist() for name, change in named_leaves(d.dparams)
        }
        for name, forward in (("pair_forward", True), ("pair_backward", False)):
            crossing = d.crossing.first(forward)
            figures[name] = None
            if crossing is not None:
                figures[name] = {
                    "particles": list(crossing.pair),
                    "image": None if crossing.image is None else list(crossing.image),
                    "opens": crossing.opens,
                    "distance": crossing.distance,
                }
        # without a finite radius the list has zeros
        radius = d.radius if 0 < d.radius < np.inf else 0.0
        figures["pairs_crossed"] = [
            {"within": factor * radius, "pairs": d.crossed(factor * radius)}
            for factor in RADII_SHOWN
        ]
        return figures

    _title = "Certificate"

    def _sections(self) -> list[tuple[str, Rows]]:
        """Return the printed text of the certificate as sections, each a title with rows.

        A row is a name and a text.
        """
        verdict = [(status.name, sentence) for status, sentence in self.findings]
        if verdict and self.derivative is None and not self.spectrum.values.size:
            verdict.append(("derivative", self._why_nothing_moves))
        if not verdict:
            verdict = [("status", f"{self.status.name}: {self.status.sentence}")]
        sections: list[tuple[str, Rows]] = [
            ("Certificate", verdict),
            (f"Is it a {self._kind}?", self._rows_of_minimum()),
            ("Is it stable?", self._rows_of_stability()),
        ]
        if self.derivative is not None:
            error = self._rows_of_error(self.derivative)
            sections.append(("How wrong can the derivative be?", error))
            sections.append(("How far does it reach?", self._rows_of_range(self.derivative)))
        if self.observable is not None:
            parts = [
                ("on rattlers", self.observable["rattlers"]),
                ("on rigid motions", self.observable["rigid motions"]),
            ]
            rows = [
                (name, f"{share:.1e} of the observable's gradient by positions")
                for name, share in parts
            ]
            sections.append(("Which part of the observable has no derivative?", rows))
        return sections

    def _rows(self) -> list[tuple[str, str]]:
        (_, first), *others = self._sections()
        return [*first, *(row for title, rows in others for row in [(title, ""), *rows])]

    def __str__(self) -> str:
        return self.page()

    def page(self, derivative_only: bool = False) -> str:
        """Return the text that ``print`` shows for the certificate.

        Args:
          derivative_only: whether to leave out the sections on the minimum, which the certificates
            of several directions share.
        """
        sections = self._sections()
        if derivative_only:
            of_minimum = (f"Is it a {self._kind}?", "Is it stable?")
            sections = [
                (title, rows) for title, rows in sections if rows and title not in of_minimum
            ]
        # one width for all sections, so that their columns align
        width = max((len(name) for _, rows in sections for name, _ in rows), default=0)
        return "\n\n".join(
            tables.text(title, [(f"{name:<{width}}", value) for name, value in rows])
            for title, rows in sections
        )

    @property
    def _kind(self) -> str:
        """The kind of stationary point in words, such as "minimum" or "saddle of order 1"."""
        return f"saddle of order {self.order}" if self.order else "minimum"

    @property
    def _not_of_this_kind(self) -> str:
        return f"this is no {self._kind} of a rigid state"

    @property
    def _why_nothing_moves(self) -> str:
        """Text that says why nothing moves: particles are rattlers, or fixed by constraints."""
        if self.constraints is not None and not np.all(self.rattlers):
            return "none: the constraints leave nothing to move"
        if self.crossed_to_minimum:
            # contacts are pairs whose force is above 10 times the largest net force on a particle
            return "not known: no contact carries 10 times the force left"
        return "none: nothing here resists a displacement"

    def _rows_of_minimum(self) -> Rows:
        steps = self.steps_to_crossing
        cell = self.cell
        ahead = ""
        if 1.0 < steps < np.inf:
            ahead = f"; the first changes after {steps:.0e} such steps"
        relative = ""
        if not np.isnan(self.relative_force):
            relative = f", {self.relative_force:.1e} of the mean contact force"
        if np.isfinite(self.distance):
            strained = "" if cell is None else f", in which the cell strains by {cell.strain:.1e}"
            distance = (
                f"length {self.newton_step_norm:.1e} (Newton step{strained}), at most"
                f" {self.distance:.1e} to first order"
            )
        elif np.isnan(self.newton_step_norm):
            distance = self._why_nothing_moves
        else:
            distance = f"not known: {self._not_of_this_kind}"
        rows = [
            ("largest net force", f"{self.max_force:.2e} energy/length, on a particle{relative}")
        ]
        if cell is not None:
            rows.append(("stress left", _stress_left(cell)))
        if self.constraints is not None:
            rows += _constraint_rows(self.constraints)
        return [
            *rows,
            (f"distance to the {self._kind}", distance),
            ("contacts on that way", f"{self.crossed_to_minimum or 'none'} in doubt{ahead}"),
        ]

    def _rows_of_stability(self) -> Rows:
        s = self.spectrum
        if not s.values.size:
            return [("smallest stiffness", self._why_nothing_moves)]
        rows = [
            ("smallest stiffness", self._smallest_stiffness_in_words()),
            (
                "how it was found",
                f"eigenvalue residual {s.residuals[0]:.0e}, {s.method}; participation"
                f" {self.participation[0]:.2f}",
            ),
            (
                "negative, floppy modes",
                f"{self.negative_modes or 'none'}, {self.floppy_modes or 'none'}"
                f"{'' if s.counted else ', of the modes computed'}"
                f"{self._unsettled_modes_in_words()}",
            ),
        ]
        if self.cell is not None:
            rows.append(("stiffness of the cell", _cell_stiffness(self.cell)))
        if self.strain is not None:
            rows.append(("against strain", _strain_stiffness(self.strain)))
        rows.append(("zero modes", f"{self.zero_modes}: {self._zero_modes_in_words() or 'none'}"))
        if s.values.size > 1:
            modes = [
                f"{v:.4g} ({p:.2f})" for v, p in zip(s.values, self.participation, strict=True)
            ]
            rows.append(("lowest modes", "stiffness (participation): " + ", ".join(modes)))
        return rows

    def _smallest_stiffness_in_words(self) -> str:
        """Describe the smallest stiffness in words, with its ratio to the largest."""
        stiffness = f"{self.stiffness_min:.6g} energy/length^2"
        # without any stiffness, as in a floppy network without stress, there is no ratio to it
        if not self.stiffness_max:
            return f"{stiffness}, as all the others have"
        return (
            f"{stiffness}, {self.stiffness_min / self.stiffness_max:.1e} of the largest"
            f" ({self.stiffness_max:.4g})"
        )

    def _unsettled_modes_in_words(self) -> str:
        if not self.unsettled_modes:
            return ""
        return f"; {self.unsettled_modes} in doubt, below {self.spectrum.floor:.0e}"

    def _zero_modes_in_words(self) -> str:
        kinds = (
            (self.translations, "translation"),
            (self.rotations, "rotation"),
            (self.floppy_modes, "floppy mode"),
        )
        parts = [count(number, name) for number, name in kinds if number]
        rattlers = int(self.rattlers.sum())
        if rattlers:
            # all other zero modes are motions of rattlers
            motions = self.zero_modes - sum(number for number, _ in kinds)
            parts.append(f"{count(motions, 'motion')} of {count(rattlers, 'rattler')}")
        return ", ".join(parts)

    def _rows_of_error(self, d: DerivativeCertificate) -> Rows:
        solve = f"linear solve: {d.status.name}"
        if d.vanishes:
            return [("response", f"none: nothing moves (norm {d.norm:.1e}; {solve})")]
        if self.estimates_hold:
            error = f"{d.error:.1e}, relative"
            error_bound = self._error_bound_in_words(d)
        else:
            why = self._not_of_this_kind
            if self.crossed_to_minimum > 0:
                why = f"a contact changes on the way to the {self._kind}"
            error = f"no estimate holds: {why}"
            error_bound = error
        share = f"at most {d.linear_error:.1e}" if np.isfinite(d.linear_error) else "not known"
        rows = [
            ("norm of the response", f"{d.norm:.6g}; {solve}"),
            ("error, sharp estimate", error),
            ("error, Theorem 1", error_bound),
            ("share of the linear solve", f"{share} (residual {d.residual:.1e})"),
        ]
        if d.on_rattlers > 0:
            rows.append(("direction on rattlers", f"{d.on_rattlers:.1e} of it, without effect"))
        return rows

    def _error_bound_in_words(self, d: DerivativeCertificate) -> str:
        if np.isnan(d.error_bound):
            return (
                "none: the potential's third derivative diverges at a contact; see when the first"
                " changes"
            )
        # an error above the response itself says nothing
        if not d.error_bound < 1.0:
            return f"not informative: {d.error_bound:.1e}"
        return f"{d.error_bound:.1e} (an estimate: its constants are taken at this point)"

    def _rows_of_range(self, d: DerivativeCertificate) -> Rows:
        if d.vanishes:
            return [("change", "none moves the particles; a property may still depend on them")]
        rows = [
            _range_row("forward, t < ", d.forward, d.switch[0], d.crossing.first(True)),
            _range_row("backward, t > -", d.backward, d.switch[1], d.crossing.first(False)),
        ]
        if np.isfinite(d.radius) and d.radius > 0:
            counts = ", ".join(
                f"{d.crossed(factor * d.radius)} within {factor * d.radius:.1e}"
                for factor in RADII_SHOWN
            )
            what = "at each the slope may change; moduli of harmonic discs jump"
            rows.append(("pairs that cross", f"{counts} ({what})"))
        if np.isfinite(d.curvature_scale):
            rows.append(
                (
                    "scale of the curvature",
                    f"{d.curvature_scale:.1e}: there curvature moves particles as far as the slope",
                )
            )
        return rows


def _range_row(
    name: str,
    value: float,
    switch: float,
    crossing: FirstCrossing | None,
) -> tuple[str, str]:
    """Format a row of the printed certificate: the range of t in which the derivative is valid.

    The range is for t > 0 or for t < 0, where the parameters are params + t dparams.

    Args:
      name: name of the row, to be followed by ``value``.
      value: the range: the smallest |t| at which a pair crosses a breakpoint or a coordinate meets
        or leaves its bound. A breakpoint is a distance at which a derivative of the potential jumps
        or diverges.
      switch: |t| at which the first coordinate meets or leaves its bound.
      crossing: the first pair that crosses a breakpoint; None if no pair crosses one.
    """
    # ``value`` is the smaller of the two times, so that equality tells which event comes first
    if value == switch < np.inf:
        return f"{name}{value:.2e}", "then a coordinate meets or leaves its bound"
    if crossing is None:
        return name.split(",")[0], "no pair crosses a breakpoint of its potential"
    return f"{name}{value:.2e}", f"then {crossing}"


def _stress_left(cell: CellState) -> str:
    """Describe in words the stress that the relaxation has left in a cell."""
    if not cell.hydrostatic:
        left = float(np.max(np.abs(cell.stress_left)))
        return f"the stress is off the target ({cell.load}) by {left:.1e} energy/volume"
    share = f", {abs(cell.pressure_left / cell.pressure):.1e} of it" if cell.pressure else ""
    shear = f"; a shear stress of {cell.shear_left:.1e}" if cell.shape else "; the shape is fixed"
    return (
        f"the pressure is off {cell.pressure:.6g} by {cell.pressure_left:.1e}"
        f" energy/volume{share}{shear}"
    )


def _constraint_rows(c: ConstraintState) -> list[tuple[str, str]]:
    parts = []
    if c.pinned:
        parts.append(count(c.pinned, "pinned coordinate"))
    if c.bound or c.switching:
        parts.append(f"{c.bound} at a bound")
    if c.switching:
        parts.append(f"{c.switching} of these about to meet or leave it")
    if c.equations:
        parts.append(f"{count(c.equations, 'equation')}, met to {c.violation:.1e}")
    if c.redundant:
        parts.append(f"{c.redundant} of them redundant")
    largest = ", ".join(f"{name} {value:.4g}" for name, value in c.largest.items())
    return [
        ("constraints", ", ".join(parts) or "none is active"),
        ("largest multipliers", largest),
    ]


def _cell_stiffness(cell: CellState) -> str:
    """Describe in words the stiffness of a relaxed cell."""
    which = "against a change of its size"
    if cell.shape:
        which = f"the smallest of {len(cell.stiffness)}"
    where = "at this pressure" if cell.hydrostatic else "under this load"
    return f"{cell.stiffness_min:.6g} energy/volume {where}, particles relaxed, {which}"


def _strain_stiffness(strain: StrainState) -> str:
    """Describe in words the stiffness of a configuration against strain."""
    # NaN only where the linear solves failed
    if np.isnan(strain.smallest):
        return f"not known: {strain.status.name} in the linear solves"
    doubt = {
        Status.FLOPPY: "; zero to round-off",
        Status.STIFFNESS_UNSETTLED: "; of unknown sign, because of the force left",
    }
    return (
        f"bulk modulus {strain.bulk:.4g}, shear modulus {strain.shear:.4g}, smallest eigenvalue"
        f" {strain.smallest:.4g} energy/volume, of Birch's tensor{doubt.get(strain.status, '')}"
    )


def count(number: int, noun: str) -> str:
    """Format a number and a noun, in the plural where the number is not 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _with_lists(fields: dict[str, Any]) -> dict[str, Any]:
    """Replace the arrays in a dict by lists, for JSON."""
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in fields.items()}


def _without_nan(value: object) -> Any:
    """Replace infinite numbers and NaN, which JSON lacks, by None in nested dicts and lists."""
    if isinstance(value, dict):
        return {key: _without_nan(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
