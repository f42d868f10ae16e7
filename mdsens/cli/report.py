"""What the command line says of a system, a minimum and a sensitivity, in a physicist's words."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mdsens._util import tables
from mdsens._util.errors import InputError
from mdsens.io.system_toml import nearest
from mdsens.mechanics.contacts import Network
from mdsens.mechanics.hessian import Unknowns
from mdsens.mechanics.status import Status
from mdsens.model.box import PackingFraction, described
from mdsens.model.system import System, parameters_of
from mdsens.observables import pressure
from mdsens.potentials.base import BondedPotential
from mdsens.potentials.parameters import Parameter
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity.derivatives import Linearization, jvp
from mdsens.sensitivity.results import Displacement, ParameterGradient
from mdsens.verify import FiniteDifference, finite_difference

__all__ = [
    "ADJOINT",
    "AGREEMENT",
    "AXES",
    "Component",
    "Finding",
    "components",
    "examined",
    "random_cotangent",
    "random_direction",
    "ranking",
    "relaxation",
    "sensitivity",
    "system",
    "verification",
]

AXES = ("x", "y", "z")
# Central differences at a step of 1e-6 are themselves right to 1e-9 in stiff systems and to some
# 1e-5 in soft ones, where round-off of the minimum is divided by the softest stiffness and the
# step. A wrong derivative (a term missing, a factor 2, a tether) is off by percents. The limit
# stands between.
AGREEMENT = 1e-4
# <w, J v> and <J^T w, v> come from two solves to residuals of 1e-10, and errors that the condition
# number makes larger.
ADJOINT = 1e-6
# of a particle spacing per relative change of the parameter: finite differences end there, too
NEGLIGIBLE = 1e-6


class Component(NamedTuple):
    """One number among the parameters: its name, and the change of the parameters that it stands
    for.
    """

    label: str
    direction: dict[str, np.ndarray]


def components(
    given: System, name: str, index: tuple[int, ...] | None, pressure: float | None = None
) -> list[Component]:
    """What ``name[index]`` stands for; without an index every component, of a symmetric matrix each
    pair once.

    Args:
      pressure: where the system is relaxed to one, it is a parameter as well.
    """
    if name == "pressure" and pressure is not None and index is None:
        return [Component(name, {name: np.ones(())})]
    if name not in given.params:
        raise InputError(
            f"--wrt {name}: {given.potential.name} has no such parameter,"
            f" {nearest(name, list(given.params))}"
        )
    (parameter,) = parameters_of(given, {name: given.params[name]})
    shape = parameter.shape
    if index is None:
        return [_component(parameter, i) for i in parameter.indices]
    if len(index) != len(shape):
        kind, form = {
            0: ("one number", name),
            1: (f"{shape[0] if shape else 0} numbers", f"{name}[i], or {name} for all of them"),
            2: ("a matrix", f"{name}[i,j], or {name} for all of it"),
        }[len(shape)]
        raise InputError(f"--wrt: {name} is {kind}: write {form}.")
    for i, size in zip(index, shape, strict=True):
        if not 0 <= i < size:
            raise InputError(
                f"--wrt: {name} has no component {i}: its indices go from 0 to {size - 1}."
            )
    return [_component(parameter, index)]


def _component(parameter: Parameter, index: tuple[int, ...]) -> Component:
    return Component(parameter.label(index), {parameter.name: parameter.unit(index)})


def system(name: str, given: System, about: dict[str, Any]) -> str:
    """Who and what: particles, potential, cell."""
    d, species = given.dimension, "all alike"
    if given.species is not None:
        counts = np.bincount(np.asarray(given.species), minlength=given.species_count)
        names = [f" {name}" for name in given.species_names]
        parts = [
            f"{count}{name}"
            for count, name in itertools.zip_longest(counts, names[: counts.size], fillvalue="")
        ]
        species = f"{given.species_count} species ({' + '.join(parts)})"
    elif any(v.shape == (given.n,) and given.n > 1 for v in given.params.values()):
        species = "each with parameters of its own"
    rows = [
        ("particles", f"n = {given.n:,} in {d}-D, {species}"),
        ("potential", given.potential.name),
        *((f"  {k}", _values(np.asarray(v))) for k, v in given.params.items()),
        ("box", described(given.box)),
    ]
    if given.box is not None and given.diameters is not None and given.potential.repulsive:
        unit = {2: np.pi / 4, 3: np.pi / 6}[d]
        fraction = unit * float(np.sum(np.asarray(given.diameters) ** d)) / float(given.volume)
        held = (
            "; the box follows the diameters" if isinstance(given.boundary, PackingFraction) else ""
        )
        rows.append(("packing fraction", f"{fraction:.6g}{held}"))
    elif given.box is not None:
        rows.append(("number density", f"{given.n / float(given.volume):.6g}"))
    if about.get("units"):
        rows.append(("units", str(about["units"])))
    what = f": {about['description']}" if about.get("description") else ""
    return tables.text(_folded(f"System {name}{what}"), rows)


def _folded(title: str) -> str:
    return "\n".join(tables.textwrap.wrap(title, tables.WIDTH, subsequent_indent="  "))


def _values(value: np.ndarray) -> str:
    if value.ndim == 0:
        return f"{value:.6g}"
    if value.ndim == 1 and value.size > 6:
        return f"{value.size} values from {value.min():.6g} to {value.max():.6g}"
    rows = [", ".join(f"{v:.6g}" for v in row) for row in np.atleast_2d(value)]
    return "; ".join(rows) + (" (a row for each species)" if value.ndim == 2 else "")


def relaxation(eq: Equilibrium, net: Network, more: tables.Rows = ()) -> str:
    """How the minimum was found, and what holds it."""
    given, status = eq.system, Status(int(eq.status))
    largest, mean, pairs = float(eq.max_force), float(net.mean_force), int(net.pairs)
    reach = f"tolerance {float(eq.tolerance):.0e}, round-off {float(eq.force_floor):.0e}"
    force = f"{largest:.2e} on any particle ({reach})"
    rattlers = int(np.sum(np.asarray(net.rattlers)))
    rows = [
        ("status", f"{status.name}: {status.sentence}"),
        ("steps", f"{int(eq.steps):,} in {eq.wall_time:.1f} s"),
    ]
    if eq.pressure is not None:
        rows.append(("pressure", eq.cell_in_words()))
    if int(eq.saddles):
        rows.append(("saddles", eq.saddles_in_words()))
    if given.potential.repulsive:
        z = 2.0 * pairs / max(given.n - rattlers, 1)
        if pairs:
            rows.append(
                ("largest net force", f"{force}, {largest / mean:.1e} of the mean contact force")
            )
            rows.append(("mean contact force", f"{mean:.4g}"))
        else:
            rows.append(("largest net force", force))
        rows.append(
            ("contacts", f"{pairs:,}, coordination z = {z:.3f} (isostatic {2 * given.dimension})")
        )
    else:
        rows.append(("largest net force", force))
        if given.potential.pairwise:
            rows.append(("interacting pairs", f"{pairs:,}, {2.0 * pairs / given.n:.1f} a particle"))
    if given.potential.pairwise:
        held = ", held by nothing: their rows of a sensitivity are zero" if rattlers else ""
        rows.append(("rattlers", f"{rattlers} of {given.n:,}{held}"))
    return tables.text("Relaxation", [*rows, *more])


def parts_of(value: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """A response of the positions, or of positions and cell, as the two: (n, d), and the strain or
    None.
    """
    if not isinstance(value, Unknowns):
        return np.asarray(value), None
    return np.asarray(value.positions), None if value.strain is None else np.asarray(value.strain)


def spacing(given: System, component: Component) -> float:
    """A particle spacing per relative change of the parameter 1: what a response is large or small
    against.
    """
    (name, direction), d = next(iter(component.direction.items())), given.dimension
    extent = np.ptp(np.asarray(given.positions), axis=0).max() / max(
        given.n ** (1.0 / d) - 1.0, 1.0
    )
    length = extent if given.box is None else (float(given.volume) / given.n) ** (1.0 / d)
    value = (
        pressure(given) if name == "pressure" and name not in given.params else given.params[name]
    )
    size = np.max(np.abs(np.asarray(value)[np.asarray(direction) != 0]), initial=0.0)
    return float(length / size) if size > 0 else float(length)


def negligible(given: System, component: Component, response: Displacement) -> bool:
    """True where nothing moves but with the box, to within what finite differences can tell."""
    largest = np.linalg.norm(np.asarray(response.nonaffine), axis=1).max()
    return bool(largest < NEGLIGIBLE * spacing(given, component))


def scale(given: System, component: Component, response: Displacement, value: Any) -> float:
    """What errors are relative to: the norm of ``value``; where nothing moves, that of a spacing
    for each particle.
    """
    if negligible(given, component, response):
        return spacing(given, component) * given.n**0.5
    return float(np.linalg.norm(parts_of(value)[0]))


class Finding(NamedTuple):
    """A response with what was found of it.

    Attributes:
      part, system, response: of what, where, and the response itself.
      differences: finite differences; None where they were not taken.
      error, own: of the response against them, and of themselves; relative to the non-affine part,
        and of a cell that responds to its strain, the worse of the two. nan without them.
      forward, reverse: <w, J v> and <J^T w, v>; nan where not asked for.
      reason: why not to trust it; empty where there is none.
    """

    part: Component
    system: System
    response: Displacement
    differences: FiniteDifference | None
    error: float
    own: float
    forward: float
    reverse: float
    reason: str

    @property
    def size(self) -> float:
        """Norm of the non-affine part."""
        return float(np.linalg.norm(np.asarray(self.response.nonaffine)))

    @property
    def gap(self) -> float:
        """Relative difference of forward and adjoint."""
        return abs(self.forward - self.reverse) / scale(
            self.system, self.part, self.response, self.response.value
        )


def examined(
    eq: Equilibrium,
    lin: Linearization,
    part: Component,
    check: bool = True,
    adjoint: tuple[Any, ParameterGradient] | None = None,
) -> Finding:
    """Solve for one response, and hold it against finite differences and an adjoint (the cotangent,
    its vjp).
    """
    response = jvp(lin, part.direction, throw=False)
    found, error, own, forward, reverse = None, np.nan, np.nan, np.nan, np.nan
    if check and response.status.good:
        found = finite_difference(eq, part.direction)
        # both relative to the non-affine part: against the box's own motion any error would look
        # small
        unit = scale(eq.system, part, response, response.nonaffine)
        size = float(np.linalg.norm(found.nonaffine))
        (moved, strain), (wanted, cell) = parts_of(response.value), parts_of(found.value)
        error = float(np.linalg.norm(moved - wanted)) / unit
        if strain is not None and cell is not None:
            of_cell = float(np.linalg.norm(strain - cell)) / max(
                float(np.linalg.norm(cell)), NEGLIGIBLE
            )
            error = float(np.maximum(error, of_cell))  # NaN where one is
        own = found.error * (size if size > 1e-6 else 1.0) / unit  # verify's own convention
    if adjoint is not None:
        forward = float(np.sum(adjoint[0] * parts_of(response.value)[0]))
        reverse = float(
            sum(np.sum(np.asarray(adjoint[1].value[k]) * v) for k, v in part.direction.items())
        )
    finding = Finding(part, eq.system, response, found, error, own, forward, reverse, "")
    return finding._replace(reason=_reason(finding))


def _reason(finding: Finding) -> str:
    status, found, error = finding.response.status, finding.differences, finding.error
    if not status.good:
        return status.sentence
    if finding.gap > ADJOINT:  # NaN where no adjoint was asked for
        return f"forward and adjoint differ by {finding.gap:.0e}, the limit is {ADJOINT:.0e}"
    if found is None:
        return ""
    if not found.status.good:
        return f"relaxing again for finite differences failed: {found.status.sentence}"
    if found.network_changed:
        return (
            f"contacts changed within the finite differences' step of {found.step:.0e}, so that"
            " they say nothing"
        )
    if error <= AGREEMENT:
        return ""
    if finding.own > 0.1 * error:
        return (
            f"finite differences are themselves uncertain by {finding.own:.0e} here, and cannot"
            " confirm it"
        )
    return f"finite differences disagree by {error:.0e}, the limit is {AGREEMENT:.0e}"


def random_direction(parts: Sequence[Component]) -> Component:
    """A unit direction through many components of one parameter, always the same."""
    (name,) = parts[0].direction
    rng = np.random.default_rng(0)
    v = np.sum([rng.standard_normal() * part.direction[name] for part in parts], axis=0)
    return Component(f"{name}, random direction", {name: v / np.linalg.norm(v)})


def random_cotangent(given: System) -> np.ndarray:
    """A vector on every particle, always the same."""
    return np.random.default_rng(1).standard_normal(given.positions.shape)


def verification(findings: Sequence[Finding]) -> str:
    """The table of ``mdsens verify``."""
    rows = []
    for f in findings:
        found = f.differences
        step, change = (
            ("-", "-") if found is None else (f"{found.step:.0e}", _ahead(found) or "none")
        )
        rows.append(
            [
                f.part.label,
                f"{f.error:.0e}",
                step,
                change,
                f"{f.forward:.9g}",
                f"{f.reverse:.9g}",
                f"{f.gap:.0e}",
            ]
        )
    above = ["", "error against", "", "first contact", "", "", "relative"]
    header = [
        "component",
        "finite differences",
        "step",
        "change",
        "<w, J v>",
        "<J^T w, v>",
        "difference",
    ]
    title = "Response J v to each component v, and the adjoint J^T of one random w"
    return tables.columns(title, above, [header, *rows])


def _ahead(found: FiniteDifference) -> str:
    """Where the first contact changes; empty where that is a thousand times the parameter away."""
    return f"{found.radius:.1e}" if found.radius < 1e9 * found.step else ""


def box_moves(response: Displacement) -> bool:
    """True where part of the response is the box's own motion."""
    value, rest = parts_of(response.value)[0], np.asarray(response.nonaffine)
    return not np.allclose(
        value, rest, rtol=1e-9, atol=1e-9 * float(np.abs(value).max(initial=0.0))
    )


def sensitivity(finding: Finding) -> str:
    """Status, solver, norms and error of one response, and the particles that move most."""
    response, found = finding.response, finding.differences
    stats, moving = response.stats, box_moves(response)
    still = negligible(finding.system, finding.part, response)
    rows = [
        ("status", f"{response.status.name}: {response.status.sentence}"),
        (
            "solver",
            (
                f"{stats.solver}, {int(stats.iterations):,} Hessian products, residual"
                f" {float(stats.residual):.1e}"
            ),
        ),
    ]
    value, strain = parts_of(response.value)
    parts = [("whole response", value, "all components of all particles")]
    if moving:
        parts.append(("non-affine part", response.nonaffine, "the motion less that of the box"))
    for name, value, note in parts:
        l1, l2 = float(np.abs(np.asarray(value)).sum()), float(np.linalg.norm(np.asarray(value)))
        rows.append((name, f"L1 norm {l1:<10.6g}  L2 norm {l2:<10.6g}  ({note})"))
    if strain is not None:
        change = float(strain[: finding.system.dimension].sum())
        rows.append(
            (
                "cell",
                (
                    f"strain of norm {float(np.linalg.norm(strain)):.6g}, of which the volume's"
                    f" {change:.6g}"
                ),
            )
        )
    if found is not None:
        ahead = (
            f"first contact change at {_ahead(found)}"
            if _ahead(found)
            else "no contact change ahead"
        )
        of = ", in particle spacings," if still else " of the non-affine part," if moving else ""
        rows.append(
            (
                "error",
                (
                    f"{finding.error:.1e}{of} against finite differences, step {found.step:.1e}"
                    f" ({ahead})"
                ),
            )
        )
    table = tables.text(f"Sensitivity dR/d {finding.part.label}", rows)
    if not response.status.good:
        return table
    if still:
        return (
            f"{table}\n\nNo particle moves{', but with the box' if moving else ''}: all is"
            " round-off."
        )
    return f"{table}\n\n{_movers(finding, moving)}"


def _movers(finding: Finding, moving: bool, count: int = 5) -> str:
    given, v = finding.system, np.asarray(finding.response.nonaffine)
    d, sizes = given.dimension, np.linalg.norm(v, axis=1)
    chosen = np.argsort(-sizes, kind="stable")[: min(count, given.n)]
    numbers = tables.numbers([*v[chosen].ravel(), *sizes[chosen]])
    rows = [
        [
            str(i),
            *_species(given, int(i)),
            *numbers[k * d : (k + 1) * d],
            numbers[len(chosen) * d + k],
        ]
        for k, i in enumerate(chosen)
    ]
    title = (
        f"Particles that move most{', non-affine part' if moving else ''}, per unit of"
        f" {finding.part.label}"
    )
    species = ["species"] if given.species is not None else []
    return tables.columns(title, ["particle", *species, *(f"d{a}" for a in AXES[:d]), "|dR|"], rows)


def _species(given: System, i: int) -> list[str]:
    return [] if given.species is None else [given.species_label(int(np.asarray(given.species)[i]))]


def ranking(
    lin: Linearization, parts: Sequence[Component], whole: Displacement, count: int
) -> tuple[str, int]:
    """The components that move the others most, from the jacobian, and which of ``parts`` is the
    first of them.
    """
    given, (name,) = lin.system, parts[0].direction
    terms = getattr(given.potential, "parts", (given.potential,))
    bonds = [
        np.asarray(potential.bonds)
        for potential in terms
        if isinstance(potential, BondedPotential) and name in potential.parameters
    ]
    units = np.stack([part.direction[name] for part in parts])
    moved = np.tensordot(
        units, np.moveaxis(np.asarray(whole.nonaffine), (0, 1), (-2, -1)), units.ndim - 1
    )
    sizes = np.linalg.norm(moved, axis=2)  # (component, particle)
    own = not bonds and given.params[name].shape == (given.n,)
    if own:
        np.fill_diagonal(sizes, 0.0)
    norms, most = np.linalg.norm(sizes, axis=1), sizes.argmax(axis=1)
    best = np.argsort(-norms, kind="stable")[:count]
    values = [np.asarray(given.params[name])[units[k] != 0][0] for k in best]
    cells = [tables.numbers(column) for column in (values, norms[best], sizes[best, most[best]])]
    rows = []
    for k, value, norm, largest in zip(best, *cells, strict=True):
        between = ["{}-{}".format(*bonds[0][k])] if bonds else []
        rows.append([parts[k].label, *between, value, norm, str(most[k]), largest])
    others, part = "the other" if own else "the", ", non-affine part" if box_moves(whole) else ""
    title = (
        f"The {len(best)} of {len(parts):,} components of {name} that move {others} particles"
        f" most{part}"
    )
    header = [
        "component",
        *(["bond"] if bonds else []),
        "value",
        "L2 norm",
        "moves most",
        "by |dR|",
    ]
    return tables.columns(title, header, rows), int(best[0])
