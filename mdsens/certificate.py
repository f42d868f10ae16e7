"""Whether a sensitivity can be trusted: is the minimum one, is it stable, how wrong can its derivative be, how far does
it reach.

Every figure is computed at the minimum as it is. The bounds of the error are estimates: the constants in them hold
along the way to the true minimum, and are taken where it starts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens import _tables, contacts
from mdsens._tables import Rows, Shown
from mdsens.contacts import Network
from mdsens.implicit.eigen import Spectrum
from mdsens.implicit.status import ConvergenceError, InputError, Status
from mdsens.relaxation import Equilibrium, round_off
from mdsens.sensitivity import Linearization, full_tangent, linearize
from mdsens.stationarity import NullSpace, Unknowns, force, gradient, mixed_product
from mdsens.stiffness import Stiffness, participation
from mdsens.system import System

__all__ = ["Certificate", "Derivative", "certify"]

Params = Mapping[str, Any]
POWER_STEPS = 30  # for the norm of dH: a few per cent, and it stands in an estimate
RESOLVED = 10.0  # of the distance to the minimum and of round-off: motion below it is not resolved


@dataclasses.dataclass(frozen=True)
class Derivative:
    """What is known of the derivative of the minimum along one direction in parameter space.

    Errors are relative to the norm of the response; nan where there is none to be relative to.

    Attributes:
      dparams: the direction.
      response: J = dR/dt (n, d), as ``jvp`` gives it.
      norm: |J|.
      status: of the linear solve.
      residual: of the linear solve, relative.
      linear_error: |H^-1 r| <= |r| / lambda_min: the residual's share of the error, relative to |J|.
      error: the sharp estimate |dJ| / |J|, dJ the derivative of J along the Newton step to the minimum.
      corrected: J + dJ, more accurate than J where the estimates hold.
      theorem: the estimate after Theorem 1 of arXiv:2105.15183, (beta / alpha + gamma R / alpha^2) |x - x*|, relative:
        alpha the smallest stiffness, R = |B dp|, beta and gamma how fast B dp and H change along the Newton step.
      crossing: when pairs cross breakpoints along the path.
      radius: the largest |t| along params + t dparams within which no pair crosses a breakpoint, to first order.
      forward, backward: the same for t > 0 and t < 0.
      bend: |t| at which the path's curvature moves the particles as far as its slope does, 2 |J| / |d2R/dt2|: the scale
        on which a smooth law's response changes.
      on_rattlers: the part of dparams' norm in components of particles that are rattlers: they have no effect.
    """

    dparams: dict[str, jax.Array]
    response: np.ndarray
    norm: float
    status: Status
    residual: float
    linear_error: float
    error: float
    corrected: np.ndarray
    theorem: float
    crossing: contacts.Crossing
    forward: float
    backward: float
    bend: float
    on_rattlers: float

    @property
    def radius(self) -> float:
        return min(self.forward, self.backward)

    def crossed(self, change: float) -> int:
        """How many pairs cross a breakpoint within |t| <= change, to first order.

        Bulk properties of many particles survive single crossings; positions do not.
        """
        return int(np.sum(np.abs(np.asarray(self.crossing.times)) <= change))


@dataclasses.dataclass(frozen=True, repr=False)
class Certificate(Shown):
    """What is known of a minimum and, where a direction was given, of its derivative. Print it.

    Attributes:
      status: the gravest of ``findings``.
      findings: every status that is not CONVERGED, with a sentence and its figures, gravest first.
      max_force: the largest net force on a particle, energy a length.
      relative_force: the same over the mean force of a contact; nan where the law attracts too, or nothing touches.
      mean_force: that mean.
      distance: |x - x*| <= |F|_2 / lambda_min, off the null space; a length.
      newton: length of the Newton step H^+ F: the estimate of that distance.
      stiffness_min, stiffness_max: extreme eigenvalues of the Hessian off its null space, energy a length squared.
      spectrum: the lowest modes, each with its residual.
      participation: (k,) of those modes: 1 where all particles move alike, 1/n where one does.
      negative_modes: how many modes have a stiffness below -1e-12 of the largest.
      floppy_modes: how many have none (below 1e-12 of the largest) beyond the known null space.
      zero_modes: dimension of the null space, floppy modes included.
      translations, rotations: how many of these each are.
      rattlers: (n,) particles that nothing holds.
      crossed_to_minimum: how many pairs cross a breakpoint along the Newton step, or are in doubt.
      derivative: of the direction that was asked for; None without one.
      observable: shares of the observable's gradient by positions on ``rattlers`` and on rigid motions (``rigid``),
        which have no derivative; None without an observable.
      precision: of the positions.
    """

    status: Status
    findings: tuple[tuple[Status, str], ...]
    max_force: float
    relative_force: float
    mean_force: float
    distance: float
    newton: float
    stiffness_min: float
    stiffness_max: float
    spectrum: Spectrum
    participation: np.ndarray
    negative_modes: int
    floppy_modes: int
    zero_modes: int
    translations: int
    rotations: int
    rattlers: np.ndarray
    crossed_to_minimum: int
    derivative: Derivative | None
    observable: dict[str, float] | None
    precision: str

    @property
    def error(self) -> float:
        """Relative error of the derivative, the sharp estimate; nan without a direction."""
        return self.derivative.error if self.derivative else float("nan")

    @property
    def bound(self) -> float:
        """The estimate after Theorem 1, relative; nan without a direction."""
        return self.derivative.theorem if self.derivative else float("nan")

    @property
    def radius(self) -> float:
        """The validity radius along the direction; nan without one."""
        return self.derivative.radius if self.derivative else float("nan")

    @property
    def warnings(self) -> tuple[tuple[Status, str], ...]:
        """The findings that leave the numbers usable."""
        return tuple(f for f in self.findings if f[0].warning)

    def as_dict(self) -> dict[str, Any]:
        """Every figure as plain numbers and texts, for JSON."""
        keys = ("max_force", "relative_force", "mean_force", "distance", "newton", "stiffness_min", "stiffness_max")
        counts = ("negative_modes", "floppy_modes", "zero_modes", "translations", "rotations", "crossed_to_minimum")
        found: dict[str, Any] = {"status": self.status.name, "precision": self.precision}
        found["findings"] = [{"status": code.name, "sentence": said} for code, said in self.findings]
        found |= {key: float(getattr(self, key)) for key in keys} | {key: int(getattr(self, key)) for key in counts}
        found["rattlers"] = np.flatnonzero(self.rattlers).tolist()
        found["modes"] = {
            "stiffness": self.spectrum.values.tolist(),
            "residual": self.spectrum.residuals.tolist(),
            "participation": self.participation.tolist(),
            "method": self.spectrum.method,
        }
        if self.derivative is not None:
            d = self.derivative
            names = ("norm", "residual", "linear_error", "error", "theorem", "radius", "forward", "backward", "bend")
            derivative: dict[str, Any] = {name: float(getattr(d, name)) for name in names}
            derivative["status"] = d.status.name
            for side, ahead in (("pair_forward", d.crossing.first(True)), ("pair_backward", d.crossing.first(False))):
                derivative[side] = None if ahead is None else list(ahead[0])
            found["derivative"] = derivative
        if self.observable is not None:
            found["observable"] = dict(self.observable)
        return found

    _title = "Certificate"

    def _sections(self) -> list[tuple[str, Rows]]:
        said = [(code.name, sentence) for code, sentence in self.findings]
        verdict = [("status", f"{self.status.name}: {self.status.sentence}")] if not said else said
        sections: list[tuple[str, Rows]] = [("Certificate", verdict), ("Is it a minimum?", self._of_minimum())]
        sections.append(("Is it stable?", self._of_stability()))
        if self.derivative is not None:
            sections.append(("How wrong can the derivative be?", self._of_error(self.derivative)))
            sections.append(("How far does it reach?", self._of_reach(self.derivative)))
        if self.observable is not None:
            parts = [("on rattlers", self.observable["rattlers"]), ("on rigid motions", self.observable["rigid"])]
            rows = [(name, f"{share:.1e} of the observable's gradient by positions") for name, share in parts]
            sections.append(("What of the observable has no answer?", rows))
        return sections

    def _rows(self) -> list[tuple[str, str]]:
        return [row for _, rows in self._sections() for row in rows]

    def __str__(self) -> str:
        return self.page()

    def page(self, derivative_only: bool = False) -> str:
        """What ``print`` shows; or of it what belongs to the direction alone, where several share a minimum."""
        sections = self._sections()
        if derivative_only:
            sections = [s for s in sections if s[1] and s[0] not in ("Is it a minimum?", "Is it stable?")]
        width = max((len(name) for _, rows in sections for name, _ in rows), default=0)
        return "\n\n".join(
            _tables.text(title, [(f"{name:<{width}}", value) for name, value in rows]) for title, rows in sections
        )

    def _of_minimum(self) -> Rows:
        relative = "" if np.isnan(self.relative_force) else f", {self.relative_force:.1e} of the mean contact force"
        return [
            ("largest net force", f"{self.max_force:.2e} on a particle{relative}"),
            ("distance to the minimum", f"{self.newton:.1e} (Newton step), at most {self.distance:.1e}"),
            ("contacts on that way", f"{self.crossed_to_minimum or 'none'} in doubt"),
        ]

    def _of_stability(self) -> Rows:
        s = self.spectrum
        if not s.values.size:
            return [("smallest stiffness", "none: nothing is held")]
        ratio = self.stiffness_min / self.stiffness_max if self.stiffness_max else np.nan
        unsure = "" if s.counted else ", of the modes computed"
        kinds = ((self.translations, "translations"), (self.rotations, "rotations"), (self.floppy_modes, "floppy"))
        loose = int(self.rattlers.sum())
        parts = [f"{count} {name}" for count, name in kinds if count]
        if loose:
            parts.append(f"{self.zero_modes - sum(c for c, _ in kinds)} of {loose} rattlers")
        rows = [
            ("smallest stiffness", f"{self.stiffness_min:.6g}, {ratio:.1e} of the largest, {self.stiffness_max:.4g}"),
            ("", f"eigenvalue residual {s.residuals[0]:.0e}, {s.method}; participation {self.participation[0]:.2f}"),
            ("negative, floppy modes", f"{self.negative_modes or 'none'}, {self.floppy_modes or 'none'}{unsure}"),
            ("zero modes", f"{self.zero_modes}: {', '.join(parts) or 'none'}"),
        ]
        if s.values.size > 1:
            modes = [f"{v:.4g} ({p:.2f})" for v, p in zip(s.values, self.participation, strict=True)]
            rows.append(("lowest modes", "stiffness (participation): " + ", ".join(modes)))
        return rows

    def _of_error(self, d: Derivative) -> Rows:
        if not d.norm > 0:
            return [("response", "none: nothing moves")]
        unsettled = self.crossed_to_minimum > 0
        void = "no estimate holds: a contact changes on the way to the minimum"
        theorem = f"{d.theorem:.1e}" if d.theorem < 1.0 else f"{d.theorem:.1e}: not informative"
        rows = [
            ("norm of the response", f"{d.norm:.6g}; linear solve: {d.status.name}"),
            ("error, sharp estimate", void if unsettled else f"{d.error:.1e}, relative"),
            (
                "error, Theorem 1",
                void if unsettled else f"{theorem} (an estimate: its constants are taken at this point)",
            ),
            ("share of the linear solve", f"at most {d.linear_error:.1e} (residual {d.residual:.1e})"),
        ]
        if d.on_rattlers > 0:
            rows.append(("direction on rattlers", f"{d.on_rattlers:.1e} of it, without effect"))
        return rows

    def _of_reach(self, d: Derivative) -> Rows:
        rows = []
        for name, value, forward in (("forward, t < ", d.forward, True), ("backward, t > -", d.backward, False)):
            ahead = d.crossing.first(forward)
            if ahead is None:
                rows.append((name.split(",")[0], "no pair crosses a breakpoint of its law"))
            else:
                (i, j), opens = ahead
                rows.append((f"{name}{value:.2e}", f"then pair {i}-{j} {'opens' if opens else 'closes'}"))
        if np.isfinite(d.radius) and d.radius > 0:
            counts = ", ".join(f"{d.crossed(f * d.radius)} within {f * d.radius:.0e}" for f in (3, 10, 100))
            rows.append(("pairs that cross", f"{counts} (moduli survive single crossings, positions do not)"))
        if np.isfinite(d.bend):
            rows.append(
                ("scale of the curvature", f"{d.bend:.1e}: there curvature moves particles as far as the slope")
            )
        return rows


@jax.jit
def _newton_terms(
    system: System, null: NullSpace, tangent: Params, J: jax.Array, step: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """d(HJ + B dp) along the step; |d(B dp)| and |dH| a unit of it; and d2/dt2 of the force's negative on the path."""
    p = dict(system.params)

    def along(R: jax.Array, velocity: jax.Array, change: Params) -> jax.Array:
        """d/dt dU/dR at (R + t velocity, p + t change): H velocity + B change."""
        return jax.jvp(lambda r, q: gradient(system, Unknowns(r), q).positions, (R, p), (velocity, dict(change)))[1]

    def project(v: jax.Array) -> jax.Array:
        return null.project(Unknowns(v)).positions

    R, none = system.positions, jax.tree.map(jnp.zeros_like, p)
    length = jnp.linalg.norm(step)
    unit = step / jnp.where(length > 0, length, 1.0)
    pull = jax.jvp(lambda r: along(r, J, tangent), (R,), (step,))[1]
    mixed = jax.jvp(lambda r: along(r, jnp.zeros_like(R), tangent), (R,), (unit,))[1]

    def dH(v: jax.Array) -> jax.Array:
        return project(jax.jvp(lambda r: along(r, project(v), none), (R,), (unit,))[1])

    def power(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        v, _ = carry
        w = dH(v)
        size = jnp.linalg.norm(w)
        return w / jnp.where(size > 0, size, 1.0), size

    start = project(jnp.cos(jnp.arange(R.size, dtype=R.dtype) ** 2).reshape(R.shape))
    start = start / jnp.maximum(jnp.linalg.norm(start), 1e-300)
    _, spread = jax.lax.fori_loop(0, POWER_STEPS, power, (start, jnp.zeros((), R.dtype)))

    def slope(t: jax.Array) -> jax.Array:
        q = jax.tree.map(lambda value, change: value + t * change, p, dict(tangent))
        return jax.jvp(lambda r, q: gradient(system, Unknowns(r), q).positions, (R + t * J, q), (J, dict(tangent)))[1]

    zero = jnp.zeros((), R.dtype)
    bend = jax.jvp(slope, (zero,), (jnp.ones_like(zero),))[1]
    return pull, jnp.linalg.norm(project(mixed)), spread, bend


def _derivative(
    lin: Linearization, stiffness: Stiffness, dparams: Params, step: np.ndarray, least: float
) -> Derivative:
    system, loose = lin.system, np.asarray(lin.network.rattlers)
    tangent = full_tangent(system, dparams)
    pull = np.asarray(mixed_product(system, tangent).positions)
    J, residual, status = stiffness.solve(-pull)
    norm = float(np.linalg.norm(J))
    dtype = system.positions.dtype
    there = jnp.asarray(J, dtype), jnp.asarray(step, dtype)
    d_pull, beta, gamma, bend = _newton_terms(system, lin.null, tangent, *there)
    dJ, _, _ = stiffness.solve(-np.asarray(d_pull))
    J2, _, _ = stiffness.solve(-np.asarray(bend))
    R = float(np.linalg.norm(stiffness.project(pull.ravel())))
    unit, way = norm or np.nan, float(np.linalg.norm(step))
    alpha = max(least, 0.0) or np.nan
    theorem = (float(beta) / alpha + float(gamma) * R / alpha**2) * way
    # the full system's pairs: what a rattler's neighbours do is left out by name
    crossing = contacts.crossings(lin.equilibrium.system, there[0], tangent, lin.network.rattlers)
    on, whole = _on_rattlers(lin.equilibrium.system, tangent, loose), _on_rattlers(system, tangent, None)
    curved = float(np.linalg.norm(J2))
    return Derivative(
        tangent,
        J,
        norm,
        status,
        residual,
        residual * R / alpha / unit,
        float(np.linalg.norm(dJ)) / unit,
        J + dJ,
        theorem / unit,
        crossing,
        float(crossing.forward),
        float(crossing.backward),
        2.0 * norm / curved if curved > 1e-8 * norm else np.inf,  # below it is round-off
        float(np.sqrt(on / whole)) if whole else 0.0,
    )


def _on_rattlers(system: System, tangent: Params, loose: np.ndarray | None) -> float:
    """Sum of squares of a direction's components that belong to rattlers alone; of all, where ``loose`` is None."""
    total = 0.0
    for v in map(np.asarray, tangent.values()):
        kind = np.ones(v.shape[0] if v.ndim else 0, bool)  # which particles or species are rattlers
        if loose is not None and v.shape == (system.n,):
            kind = loose
        elif loose is not None and v.ndim and v.shape[0] == system.species_count:
            held = np.bincount(np.asarray(system.species)[~loose], minlength=system.species_count)
            kind = held == 0
        elif loose is not None:
            continue
        mask = kind[:, None] | kind if v.ndim == 2 else kind
        total += float(np.sum(v[mask] ** 2)) if v.ndim else float(v**2)
    return total


def _in_doubt(lin: Linearization, step: np.ndarray) -> int:
    """How many pairs cross a breakpoint along the Newton step, or hold a particle that counts as a rattler."""
    eq, net = lin.equilibrium, lin.network
    none = {name: jnp.zeros_like(value) for name, value in eq.system.params.items()}
    crossing = contacts.crossings(eq.system, jnp.asarray(step, eq.system.positions.dtype), none, net.rattlers)
    times = np.asarray(crossing.times)
    crossed = int(np.sum((times >= 0) & (times <= 1.0)))
    if eq.system.potential.repulsive:
        finest = contacts.network(eq.system, jnp.minimum(eq.max_force, round_off(eq.system)))
        crossed += int(np.sum(np.asarray(finest.rattlers) != np.asarray(net.rattlers)))
    return crossed


def _touched(observable: Callable[[System], Any], lin: Linearization, project: Any) -> dict[str, float]:
    """Shares of the observable's gradient by positions on rattlers and on rigid motions."""
    system = lin.equilibrium.system
    value, pull = jax.vjp(lambda R: jnp.asarray(observable(system.replace(positions=R))), system.positions)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise InputError(f"the observable returns {value.dtype}: return floating-point numbers.")
    # of an array the sum of its components would let them cancel
    weights = jnp.cos(jnp.arange(value.size, dtype=value.dtype) ** 2).reshape(value.shape)
    slope = np.asarray(pull(weights)[0])
    loose = np.asarray(lin.network.rattlers)
    whole = float(np.linalg.norm(slope)) or 1.0
    held = np.where(loose[:, None], 0.0, slope)
    rigid = float(np.linalg.norm(held.ravel() - project(held.ravel()))) / whole
    return {"rattlers": float(np.linalg.norm(slope[loose])) / whole, "rigid": rigid}


def certify(
    at: Equilibrium | Linearization,
    dparams: Params | None = None,
    *,
    modes: int = 1,
    observable: Callable[[System], Any] | None = None,
    throw: bool = False,
) -> Certificate:
    """Examine a minimum, and along ``dparams`` the derivative that ``jvp`` gives there.

    It costs an eigenvalue and a few linear solves on one factor of the Hessian: about a tenth of the relaxation.

    Args:
      at: from ``minimize`` or ``linearize``; not a batch. An unconverged minimum is examined too.
      dparams: the direction, as in ``jvp``; without it there is nothing about a derivative.
      modes: how many of the lowest modes to find.
      observable: a function of a System, as in ``gradient``: the parts of it that have no derivative are reported.
      throw: raise :class:`ConvergenceError` where the status is not good; the certificate is its ``result``.

    Returns:
      a :class:`Certificate`.

    Raises:
      InputError: bad names or shapes.
    """
    lin = at if isinstance(at, Linearization) else linearize(at, throw=False)
    if modes < 1:
        raise InputError(f"modes is {modes}: give 1 or more.")
    eq, net, null = lin.equilibrium, lin.network, lin.null
    system = eq.system
    loose = np.asarray(net.rattlers)
    stiffness = Stiffness(lin.system, null)
    finite = bool(np.isfinite(np.asarray(system.positions)).all())
    known = null.dimension if finite else 0
    if finite and not loose.all():
        spectrum = stiffness.lowest(modes)
    else:
        spectrum = Spectrum(np.zeros(0), np.zeros((system.positions.size, 0)), np.zeros(0), 0.0, 0, 0, True, "none")
    positive = spectrum.values[spectrum.stable]
    lowest = float(spectrum.values[0]) if spectrum.values.size else np.nan
    forces = stiffness.project(np.asarray(force(lin.system)).ravel())
    total = float(np.linalg.norm(forces))
    soft = float(positive.min()) if positive.size else np.nan
    step, derivative, doubt = np.zeros_like(np.asarray(system.positions)), None, 0
    if spectrum.values.size:
        step, _, _ = stiffness.solve(forces.reshape(step.shape))
    if finite:
        doubt = _in_doubt(lin, step)
    if dparams is not None:
        full_tangent(system, dparams)
        if spectrum.values.size:
            derivative = _derivative(lin, stiffness, dparams, step, soft if np.isfinite(soft) else 0.0)
    mean, largest = float(net.mean_force), float(eq.max_force)
    clusters = np.unique(np.asarray(net.labels)[~loose]).size
    translations = int(np.asarray(null.translations).sum()) * clusters
    made = Certificate(
        Status.CONVERGED,
        (),
        largest,
        largest / mean if mean > 0 and system.potential.repulsive else np.nan,
        mean,
        total / soft if np.isfinite(soft) else np.inf,
        float(np.linalg.norm(step)),
        lowest,
        spectrum.largest,
        spectrum,
        participation(spectrum.vectors, system.dimension),
        spectrum.negative,
        spectrum.zero,
        known + spectrum.zero,
        translations,
        known - translations - system.dimension * int(loose.sum()) if finite else 0,
        loose,
        doubt,
        derivative,
        None if observable is None else _touched(observable, lin, stiffness.project),
        str(system.positions.dtype),
    )
    findings = _findings(made, lin, net, step)
    status = findings[0][0] if findings else Status.CONVERGED
    certificate = dataclasses.replace(made, status=status, findings=tuple(findings))
    if throw and not status.good:
        raise ConvergenceError(f"certify: {findings[0][1]}.", status, certificate)
    return certificate


def _findings(c: Certificate, lin: Linearization, net: Network, step: np.ndarray) -> list[tuple[Status, str]]:
    """Everything that is not as it should be, gravest first, with its figures."""
    found: list[tuple[Status, str]] = []

    def add(status: Status, figures: str = "") -> None:
        found.append((status, f"{status.sentence}{f' ({figures})' if figures else ''}"))

    system, d = lin.equilibrium.system, c.derivative
    before = Status(int(lin.equilibrium.status))
    if not before.good:
        add(before, f"max_force {c.max_force:.1e}")
    if bool(np.all(c.rattlers)) and not c.crossed_to_minimum:
        add(Status.UNJAMMED, f"{c.rattlers.size} of {c.rattlers.size} particles are held by nothing")
    if c.negative_modes:
        add(
            Status.INDEFINITE,
            f"{_count(c.negative_modes, 'mode')} of negative stiffness, the lowest {c.stiffness_min:.3g}",
        )
    if c.floppy_modes:
        add(Status.FLOPPY, _count(c.floppy_modes, "floppy mode"))
    if c.crossed_to_minimum and before.good:
        add(Status.CONTACTS_UNSETTLED, f"{_count(c.crossed_to_minimum, 'pair')} in doubt, max_force {c.max_force:.1e}")
    if d is not None and not d.status.good:
        add(d.status, f"residual {d.residual:.1e}")
    eps = float(np.finfo(system.positions.dtype).eps)
    if d is not None and d.norm > 0:
        resolution = eps * float(np.abs(np.asarray(system.positions)).max()) + float(np.abs(step).max())
        if np.isfinite(d.radius) and d.radius * float(np.abs(d.response).max()) < RESOLVED * resolution:
            add(Status.RADIUS_BELOW_ROUND_OFF, f"radius {d.radius:.1e}")
    if eps > 1e-10:
        left = eps * c.stiffness_max / c.stiffness_min if c.stiffness_min > 0 else np.inf
        add(Status.SINGLE_PRECISION, f"{left:.0e} here")
    parts = [] if c.observable is None else [f"{v:.1e} of it on {k}" for k, v in c.observable.items() if v > eps**0.5]
    if parts:
        add(Status.NULL_COMPONENT_DROPPED, f"the observable's gradient: {', '.join(parts)}")
    if d is not None and d.on_rattlers > 0:
        add(Status.NULL_COMPONENT_DROPPED, f"{d.on_rattlers:.1e} of the direction is on rattlers")
    return found


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
