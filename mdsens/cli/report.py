"""Tables of a system, a relaxation and its sensitivities, and the checks of a sensitivity."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mdsens._util import tables
from mdsens._util.errors import InputError
from mdsens._util.pytree import arrays_of, named_leaves
from mdsens._util.suggestions import did_you_mean
from mdsens.mechanics.contacts import Network
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.box import PackingFraction, described
from mdsens.model.system import System, parameters_of
from mdsens.observables import packing_fraction, pressure
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

AXES = ("x", "y", "z")  # names of the coordinates
MOST = 30  # numbers of a parameter that are shown one by one; of more, the range
# Largest relative difference from finite differences. Central differences at a step of 1e-6 are
# themselves right to 1e-9 in stiff systems and to some 1e-5 in soft ones, where round-off of the
# minimum is divided by the softest stiffness and the step. A wrong derivative (a term missing, a
# factor 2, a tether) is off by percents. The limit lies between.
AGREEMENT = 1e-4
# Largest relative difference of <w, J v> and <J^T w, v>: they come from two solves to residuals of
# 1e-10, and the condition number makes the errors larger than the residuals.
ADJOINT = 1e-6
# In particle spacings per relative change of the parameter: a smaller response counts as zero.
# Finite differences resolve nothing smaller either.
NEGLIGIBLE = 1e-6


class Component(NamedTuple):
    """One component of a parameter, such as sigma[1], by which a minimum is differentiated.

    Attributes:
      label: the component's name.
      direction: the change of the whole parameter when the component changes by 1: a dict with one
        array, by the name of the parameter.
    """

    label: str
    direction: dict[str, np.ndarray]


def components(
    system: System, name: str, index: tuple[int, ...] | None, pressure: float | None = None
) -> list[Component]:
    """Return the components of a parameter that the text ``name[index]`` refers to.

    Args:
      system: the system with the parameter.
      name: name of the parameter.
      index: index of one component; None for all components, where each pair of off-diagonal
        entries of a symmetric matrix counts once.
      pressure: pressure that the cell is relaxed to, which is a parameter too; None if the cell is
        fixed.

    Raises:
      InputError: no such parameter or component.
    """
    if name == "pressure" and pressure is not None and index is None:
        return [Component(name, {name: np.ones(())})]
    if name not in system.params:
        raise InputError(
            f"--wrt {name}: {system.potential.name} has no such parameter,"
            f" {did_you_mean(name, system.params)}"
        )
    (parameter,) = parameters_of(system, {name: system.params[name]})
    if index is None:
        return [_component(parameter, i) for i in parameter.indices]
    _check_index(name, index, parameter.shape)
    return [_component(parameter, index)]


def _check_index(name: str, index: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raise InputError if a parameter ``name`` of this shape has no component with this index."""
    if len(index) != len(shape):
        # all three values are made, also for a parameter without axes: hence the check of ``shape``
        kind, form = {
            0: ("one number", name),
            1: (f"{shape[0] if shape else 0} numbers", f"{name}[i], or {name} for all of them"),
            2: ("a matrix", f"{name}[i,j], or {name} for all of it"),
            3: ("a number for each triple of species", f"{name}[i,j,k], or {name} for all of them"),
        }[len(shape)]
        raise InputError(f"--wrt: {name} is {kind}: write {form}.")
    for i, size in zip(index, shape, strict=True):
        if not 0 <= i < size:
            raise InputError(
                f"--wrt: {name} has no component {i}: its indices go from 0 to {size - 1}."
            )


def _component(parameter: Parameter, index: tuple[int, ...]) -> Component:
    """Make the record of one component of a parameter, such as ``sigma[1]``.

    The record has the label of the component, and the change of the whole parameter when the
    component changes by 1. The change is an array of the parameter's shape: 1 at the given index
    and 0 elsewhere; in a symmetric matrix also 1 at the mirror image of the index.
    """
    return Component(parameter.label(index), {parameter.name: parameter.unit(index)})


def system(name: str, system: System, content: dict[str, Any]) -> str:
    """Format the table of a system: particles, potential, parameters, cell.

    Args:
      name: name of the system, for the title.
      system: the system.
      content: content of the system's TOML file, of which ``description`` and ``units`` are shown.
    """
    rows = [
        ("particles", f"n = {system.n:,} in {system.dimension}-D, {_describe_kinds(system)}"),
        ("potential", system.potential.name),
        *((f"  {k}", _values(np.asarray(v))) for k, v in arrays_of(system.params).items()),
        *((f"  {k}", _range_of(np.asarray(v))) for k, v in _leaves_of_trees(system)),
        ("box", described(system.box, system.periodic)),
    ]
    if system.has_volume:
        rows.append(_format_density(system))
    if content.get("units"):
        rows.append(("units", str(content["units"])))
    description = f": {content['description']}" if content.get("description") else ""
    return tables.text(_folded(f"System {name}{description}"), rows)


def _describe_kinds(system: System) -> str:
    """Say in words which kinds of particles a system has.

    The words give the species with their numbers of particles. Without species, they say that each
    particle has parameters of its own, or that all particles are alike.
    """
    if system.species is not None:
        counts = np.bincount(np.asarray(system.species), minlength=system.species_count)
        names = [f" {name}" for name in system.species_names]
        # species without a chemical symbol are shown by their number of particles alone
        parts = [
            f"{count}{name}"
            for count, name in itertools.zip_longest(counts, names[: counts.size], fillvalue="")
        ]
        return f"{system.species_count} species ({' + '.join(parts)})"
    if any(v.shape == (system.n,) and system.n > 1 for v in arrays_of(system.params).values()):
        return "each with parameters of its own"
    return f"all {system.species_names[0]}" if system.species_names else "all alike"


def _format_density(system: System) -> tuple[str, str]:
    """Format the density of a system as a name and a value for a table.

    The density is the packing fraction; for particles that attract or have no diameter, it is the
    number of particles per volume.
    """
    if system.diameters is None or not system.potential.repulsive:
        return "number density", f"{system.n / float(system.volume):.6g}"
    fraction = float(packing_fraction(system))
    follows = isinstance(system.boundary, PackingFraction)
    remark = "; the box follows the diameters" if follows else ""
    return "packing fraction", f"{fraction:.6g}{remark}"


def _folded(title: str) -> str:
    """Wrap a title into lines that fit into a terminal."""
    return "\n".join(tables.textwrap.wrap(title, tables.WIDTH, subsequent_indent="  "))


def _leaves_of_trees(system: System) -> list[tuple[str, Any]]:
    """List the arrays in the parameters of a system that are trees, each with its name."""
    trees = {name: v for name, v in system.params.items() if name not in arrays_of(system.params)}
    return named_leaves(trees)


def _range_of(value: np.ndarray) -> str:
    """Format an array of a tree by its shape and the range of its numbers."""
    if not value.size or not value.ndim:
        return f"{value:.6g}" if value.size else "no numbers"
    return f"shape {value.shape}, from {value.min():.6g} to {value.max():.6g}"


def _values(value: np.ndarray) -> str:
    """Format a parameter's value: up to 6 numbers and matrices in full, more numbers as a range.

    Tables of triples of species have one line for each species of the center.
    """
    if value.ndim == 0:
        return f"{value:.6g}"
    if value.ndim == 3 and value.size <= MOST:
        centers = "; ".join(f"{k}: {_rows_of(table)}" for k, table in enumerate(value))
        return f"{centers} (by the species of the center)"
    if value.size > MOST or (value.ndim == 1 and value.size > 6):
        return f"{value.size} values from {value.min():.6g} to {value.max():.6g}"
    return _rows_of(np.atleast_2d(value)) + (" (a row for each species)" if value.ndim == 2 else "")


def _rows_of(matrix: np.ndarray) -> str:
    """Format a matrix in one line, its rows one after the other."""
    return "; ".join(", ".join(f"{v:.6g}" for v in row) for row in matrix)


def relaxation(eq: Equilibrium, net: Network, more: tables.Rows = ()) -> str:
    """Format the table of a relaxation: status, forces, pressure, contacts and rattlers.

    Args:
      eq: the minimum that the relaxation found.
      net: contact network of the minimum.
      more: rows to append to the table, each a name and a value.
    """
    system = eq.system
    status = eq.status
    largest = float(eq.max_force)
    mean = float(net.mean_force)
    pairs = int(net.pairs)
    limits = f"tolerance {float(eq.tolerance):.0e}, round-off {float(eq.force_floor):.0e}"
    force = f"{largest:.2e} on any particle ({limits})"
    rattlers = int(np.sum(np.asarray(net.rattlers)))
    rows = [
        ("status", f"{status.name}: {status.sentence}"),
        ("steps", f"{int(eq.steps):,} in {eq.wall_time:.1f} s"),
    ]
    if eq.load is not None:
        rows.append((eq.load.kind, eq.cell_in_words()))
    if eq.moved is not None:
        rows.append(("moved", eq.move_in_words()))
    if int(eq.saddles):
        rows.append(("saddles", eq.saddles_in_words()))
    # A pair of a repulsive potential is a contact; attractive particles interact up to the cutoff,
    # and the number of their pairs says nothing about rigidity.
    if system.potential.repulsive:
        z = 2.0 * pairs / max(system.n - rattlers, 1)
        if pairs:
            rows.append(
                ("largest net force", f"{force}, {largest / mean:.1e} of the mean contact force")
            )
            rows.append(("mean contact force", f"{mean:.4g}"))
        else:
            rows.append(("largest net force", force))
        rows.append(
            ("contacts", f"{pairs:,}, coordination z = {z:.3f} (isostatic {2 * system.dimension})")
        )
    else:
        rows.append(("largest net force", force))
        if system.potential.pairwise:
            per_particle = 2.0 * pairs / system.n
            rows.append(("interacting pairs", f"{pairs:,}, {per_particle:.1f} a particle"))
    if system.potential.pairwise:
        remark = ", held by nothing: their rows of a sensitivity are zero" if rattlers else ""
        rows.append(("rattlers", f"{rattlers} of {system.n:,}{remark}"))
    return tables.text("Relaxation", [*rows, *more])


def parts_of(value: jax.Array | np.ndarray | Unknowns) -> tuple[np.ndarray, np.ndarray | None]:
    """Split a response into the displacements of the particles, (n, d), and the strain of the cell.

    The strain is a vector of Mandel components, or None where the cell is fixed.
    """
    if not isinstance(value, Unknowns):
        return np.asarray(value), None
    return np.asarray(value.positions), None if value.strain is None else np.asarray(value.strain)


def spacing(system: System, component: Component) -> float:
    """Compute a natural unit for the derivative of a position by a parameter component.

    If the derivative has the size of one unit, a relative change of the parameter by 1 moves the
    particle by one particle spacing, to first order. The unit is therefore the particle spacing
    divided by a value of the parameter: the largest absolute value among the entries that the
    component changes. Where this value is zero, the unit is the spacing.
    """
    name, direction = next(iter(component.direction.items()))
    d = system.dimension
    if not system.has_volume:  # n^(1/d) particles in a row along the longest side
        # a row has one gap less than particles
        sides = max(system.n ** (1.0 / d) - 1.0, 1.0)
        length = np.ptp(np.asarray(system.positions), axis=0).max() / sides
    else:
        length = (float(system.volume) / system.n) ** (1.0 / d)
    if name == "pressure" and name not in system.params:
        value = pressure(system)
    else:
        value = system.params[name]
    size = np.max(np.abs(np.asarray(value)[np.asarray(direction) != 0]), initial=0.0)
    return float(length / size) if size > 0 else float(length)


def negligible(system: System, component: Component, response: Displacement) -> bool:
    """Return whether the non-affine displacements in a response are so small that they count as 0.

    Finite differences cannot check displacements as small as these. ``component`` is the parameter
    component that the particles respond to.
    """
    largest = np.linalg.norm(np.asarray(response.nonaffine), axis=1).max()
    return bool(largest < NEGLIGIBLE * spacing(system, component))


def scale(
    system: System,
    component: Component,
    response: Displacement,
    value: jax.Array | np.ndarray | Unknowns,
) -> float:
    """Compute the norm by which the error of a response is divided, to make it a relative error.

    It is the norm of the particles' displacements ``value``, which the caller takes from the
    response: all of it, or its non-affine part. If the non-affine displacements in ``response``
    are negligible, it is the norm that the displacements would have if each particle moved by the
    unit that :func:`spacing` returns.
    """
    if negligible(system, component, response):
        return spacing(system, component) * system.n**0.5
    return float(np.linalg.norm(parts_of(value)[0]))


class Finding(NamedTuple):
    """The response of a minimum to one parameter component, with the results of its checks.

    The response is J v: J is the Jacobian of the positions by the parameters, and v the change of
    the parameters. The adjoint J^T is right if <w, J v> = <J^T w, v> for a random vector w, (n, d).

    Attributes:
      part: the component v that the minimum is differentiated by.
      system: the relaxed system.
      response: the derivative of the minimum by the component.
      differences: the derivative by finite differences; None if none were taken.
      error: difference between the response and the finite differences, relative to the norm of the
        non-affine displacements (where these are negligible, see :func:`scale`). Where the cell
        responds too, the larger one of this error and the error of the strain relative to the
        strain's norm. NaN without finite differences.
      own: estimated error of the finite differences themselves, relative to the norm of the
        non-affine displacements. NaN without finite differences.
      forward: <w, J v>; NaN if the adjoint was not computed.
      reverse: <J^T w, v>; NaN if the adjoint was not computed.
      reason: why the response is not to be trusted; empty if it passes all checks.
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
        """Euclidean norm of the particles' non-affine displacements in the response."""
        return float(np.linalg.norm(np.asarray(self.response.nonaffine)))

    @property
    def gap(self) -> float:
        """Error of the adjoint J^T: |<w, J v> - <J^T w, v>| in units of the norm of J v.

        J is the Jacobian of the positions by the parameters, v the change of the parameters, and w
        a random vector. For a correct adjoint the two products are equal. Where the non-affine
        displacements are negligible, the unit is another norm, see :func:`scale`.
        """
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
    """Compute the response of a minimum to one parameter component, and check the response.

    The checks are a comparison with finite differences and one with the adjoint J^T of J, the
    Jacobian of the positions by the parameters.

    Args:
      eq: the minimum.
      lin: the linearization at the minimum (Hessian and solver).
      part: the component to differentiate by.
      check: whether to take finite differences.
      adjoint: a vector w (n, d) and J^T w, as ``vjp`` computes it; None for no such comparison.
    """
    response = jvp(lin, part.direction, throw=False)
    differences = None
    error = own_error = np.nan
    if check and response.status.good:
        differences = finite_difference(eq, part.direction)
        # Both errors are relative to the non-affine part: beside the affine motion, which can be
        # much larger, any error would look small.
        unit = scale(eq.system, part, response, response.nonaffine)
        displacement, strain = parts_of(response.value)
        expected_displacement, expected_strain = parts_of(differences.value)
        error = float(np.linalg.norm(displacement - expected_displacement)) / unit
        if strain is not None and expected_strain is not None:
            size_of_strain = max(float(np.linalg.norm(expected_strain)), NEGLIGIBLE)
            strain_error = float(np.linalg.norm(strain - expected_strain)) / size_of_strain
            error = float(np.maximum(error, strain_error))  # unlike max, NaN if either is NaN
        # differences.error is relative to their norm, and absolute where that is below 1e-6
        size = float(np.linalg.norm(differences.nonaffine))
        own_error = differences.error * (size if size > 1e-6 else 1.0) / unit
    forward = reverse = np.nan
    if adjoint is not None:
        cotangent, gradient = adjoint
        forward = float(np.sum(cotangent * parts_of(response.value)[0]))
        reverse = float(
            sum(np.sum(np.asarray(gradient.value[k]) * v) for k, v in part.direction.items())
        )
    finding = Finding(
        part=part,
        system=eq.system,
        response=response,
        differences=differences,
        error=error,
        own=own_error,
        forward=forward,
        reverse=reverse,
        reason="",
    )
    return finding._replace(reason=_reason_for_doubt(finding))


def _reason_for_doubt(finding: Finding) -> str:
    """Return the reason why a response is not to be trusted; empty if it passes all checks."""
    status = finding.response.status
    differences = finding.differences
    error = finding.error
    if not status.good:
        return status.sentence
    if finding.gap > ADJOINT:  # False for NaN: no adjoint was asked for
        return f"forward and adjoint differ by {finding.gap:.0e}, the limit is {ADJOINT:.0e}"
    if differences is None:
        return ""
    if not differences.status.good:
        return f"relaxing again for finite differences failed: {differences.status.sentence}"
    if differences.network_changed:
        return (
            f"contacts changed within the finite differences' step of {differences.step:.0e}, so"
            " that they say nothing"
        )
    if error <= AGREEMENT:
        return ""
    # where a tenth of the disagreement or more can come from the differences, they do not tell
    # which of the two is wrong
    if finding.own > 0.1 * error:
        return (
            f"finite differences are themselves uncertain by {finding.own:.0e} here, and cannot"
            " confirm it"
        )
    return f"finite differences disagree by {error:.0e}, the limit is {AGREEMENT:.0e}"


def random_direction(parts: Sequence[Component]) -> Component:
    """Draw a random unit direction of all components of one parameter, the same in every run."""
    (name,) = parts[0].direction
    rng = np.random.default_rng(0)
    v = np.sum([rng.standard_normal() * part.direction[name] for part in parts], axis=0)
    return Component(f"{name}, random direction", {name: v / np.linalg.norm(v)})


def random_cotangent(system: System) -> np.ndarray:
    """Draw a random vector for each particle, (n, d), the same in every run, to test adjoints."""
    return np.random.default_rng(1).standard_normal(system.positions.shape)


def verification(findings: Sequence[Finding]) -> str:
    """Format the table in which responses are compared with finite differences and the adjoint."""
    rows = []
    for finding in findings:
        step = change = "-"
        if finding.differences is not None:
            step = f"{finding.differences.step:.0e}"
            change = _first_contact_change(finding.differences) or "none"
        rows.append(
            [
                finding.part.label,
                f"{finding.error:.0e}",
                step,
                change,
                f"{finding.forward:.9g}",
                f"{finding.reverse:.9g}",
                f"{finding.gap:.0e}",
            ]
        )
    # the header takes two lines
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


def _first_contact_change(differences: FiniteDifference) -> str:
    """Format the parameter change at which the first contact opens or closes.

    The text is empty if that change is above 1e9 times the step of the finite differences. For a
    step of 1e-6 of the parameter, this limit is about a thousand times the parameter.
    """
    near = differences.radius < 1e9 * differences.step
    return f"{differences.radius:.1e}" if near else ""


def box_moves(response: Displacement) -> bool:
    """Return whether a response contains the affine motion of the particles with the box."""
    value = parts_of(response.value)[0]
    nonaffine = np.asarray(response.nonaffine)
    # equal up to round-off, of which 1e-9 leaves plenty
    smallest = 1e-9 * float(np.abs(value).max(initial=0.0))
    return not np.allclose(value, nonaffine, rtol=1e-9, atol=smallest)


def sensitivity(finding: Finding) -> str:
    """Format the table of a response: status, solver, norms, error, largest displacements.

    The response is the derivative of the positions by one parameter component.
    """
    response = finding.response
    stats = response.stats
    affine = box_moves(response)
    zero = negligible(finding.system, finding.part, response)
    solver = f"{stats.solver}, {int(stats.iterations):,} Hessian products"
    rows = [
        ("status", f"{response.status.name}: {response.status.sentence}"),
        ("solver", f"{solver}, residual {float(stats.residual):.1e}"),
    ]
    rows += _format_norms(response, affine, finding.system.dimension)
    differences = finding.differences
    if differences is not None:
        first_change = _first_contact_change(differences)
        ahead = f"first contact change at {first_change}" if first_change else ""
        if zero:
            unit = ", in particle spacings,"
        else:
            unit = " of the non-affine part," if affine else ""
        error = f"{finding.error:.1e}{unit} against finite differences"
        step = f"step {differences.step:.1e} ({ahead or 'no contact change ahead'})"
        rows.append(("error", f"{error}, {step}"))
    table = tables.text(f"Sensitivity dR/d {finding.part.label}", rows)
    if not response.status.good:
        return table
    if zero:
        exception = ", but with the box" if affine else ""
        return f"{table}\n\nNo particle moves{exception}: all is round-off."
    return f"{table}\n\n{_largest_displacements(finding, affine)}"


def _format_norms(response: Displacement, affine: bool, d: int) -> list[tuple[str, str]]:
    """Format the norms of the particles' displacements and, where the cell moves, of its strain.

    Args:
      response: the response.
      affine: whether the box moves; if so, the norms of the non-affine part have a row of their
        own.
      d: dimension of space.
    """
    rows = []
    value, strain = parts_of(response.value)
    parts = [("whole response", value, "all components of all particles")]
    if affine:
        parts.append(("non-affine part", response.nonaffine, "the motion less that of the box"))
    for name, part, note in parts:
        l1 = float(np.abs(np.asarray(part)).sum())
        l2 = float(np.linalg.norm(np.asarray(part)))
        rows.append((name, f"L1 norm {l1:<10.6g}  L2 norm {l2:<10.6g}  ({note})"))
    if strain is not None:
        size = float(np.linalg.norm(strain))
        # relative volume change: the trace, which is the first d of the Mandel components
        trace = float(strain[:d].sum())
        rows.append(("cell", f"strain of norm {size:.6g}, of which the volume's {trace:.6g}"))
    return rows


def _largest_displacements(finding: Finding, affine: bool, count: int = 5) -> str:
    """Format the table of the ``count`` particles with the largest non-affine displacements.

    ``affine`` says whether the box moves; if so, the title calls the displacements non-affine.
    """
    system = finding.system
    d = system.dimension
    displacements = np.asarray(finding.response.nonaffine)
    sizes = np.linalg.norm(displacements, axis=1)
    chosen = np.argsort(-sizes, kind="stable")[: min(count, system.n)]
    # formatted together, so that all columns have the same decimals: components, then sizes
    numbers = tables.numbers([*displacements[chosen].ravel(), *sizes[chosen]])
    rows = []
    for k, i in enumerate(chosen):
        species = _species_label(system, int(i))
        rows.append([str(i), *species, *numbers[k * d : (k + 1) * d], numbers[len(chosen) * d + k]])
    motion = ", non-affine part" if affine else ""
    title = f"Particles that move most{motion}, per unit of {finding.part.label}"
    species = ["species"] if system.species is not None else []
    header = ["particle", *species, *(f"d{axis}" for axis in AXES[:d]), "|dR|"]
    return tables.columns(title, header, rows)


def _species_label(system: System, i: int) -> list[str]:
    """Return the species of particle i for a row of a table, as a list with one entry.

    For a system without species the list is empty.
    """
    if system.species is None:
        return []
    return [system.species_label(int(np.asarray(system.species)[i]))]


def ranking(
    lin: Linearization, parts: Sequence[Component], whole: Displacement, count: int
) -> tuple[str, int]:
    """Rank the components of a parameter by how much they move the particles.

    The measure is the norm of the non-affine displacements in response to a component. If the
    parameter has one value for each particle, the value of particle i is ranked by the motion of
    the other particles: that of particle i does not count.

    Args:
      lin: the linearization at the minimum.
      parts: all components of the parameter.
      whole: the Jacobian of the minimum by the parameter.
      count: how many components to list.

    Returns:
      the table, and the index in ``parts`` of the component that ranks first.
    """
    system = lin.system
    (name,) = parts[0].direction
    bonds = _find_bonds(system, name)
    sizes = _measure_displacements(parts, whole)
    one_a_particle = not bonds and system.params[name].shape == (system.n,)
    if one_a_particle:  # then component k belongs to particle k
        np.fill_diagonal(sizes, 0.0)
    norms = np.linalg.norm(sizes, axis=1)
    most = sizes.argmax(axis=1)
    best = np.argsort(-norms, kind="stable")[:count]
    values = [np.asarray(system.params[name])[parts[k].direction[name] != 0][0] for k in best]
    cells = [tables.numbers(column) for column in (values, norms[best], sizes[best, most[best]])]
    rows = []
    for k, value, norm, largest in zip(best, *cells, strict=True):
        bond = ["{}-{}".format(*bonds[0][k])] if bonds else []
        rows.append([parts[k].label, *bond, value, norm, str(most[k]), largest])
    particles = "the other particles" if one_a_particle else "the particles"
    motion = ", non-affine part" if box_moves(whole) else ""
    title = (
        f"The {len(best)} of {len(parts):,} components of {name} that move {particles} most{motion}"
    )
    bond = ["bond"] if bonds else []
    header = ["component", *bond, "value", "L2 norm", "moves most", "by |dR|"]
    return tables.columns(title, header, rows), int(best[0])


def _find_bonds(system: System, name: str) -> list[np.ndarray]:
    """List the bonds that a parameter of a system belongs to, as particle indices (bonds, 2).

    The list has one array for each potential of bonds that has a parameter of this name; it is
    empty for a parameter that does not belong to bonds.
    """
    terms = getattr(system.potential, "parts", (system.potential,))
    return [
        np.asarray(potential.bonds)
        for potential in terms
        if isinstance(potential, BondedPotential) and name in potential.parameters
    ]


def _measure_displacements(parts: Sequence[Component], whole: Displacement) -> np.ndarray:
    """Compute how far each particle moves in response to each component of a parameter.

    Args:
      parts: all components of the parameter.
      whole: the Jacobian of the minimum by the parameter, of which the non-affine part counts.

    Returns:
      the lengths of the displacements, with a row for each component and a column for each
      particle.
    """
    (name,) = parts[0].direction
    units = np.stack([part.direction[name] for part in parts])
    # (n, d, *shape of the parameter) -> (component, n, d)
    jacobian = np.moveaxis(np.asarray(whole.nonaffine), (0, 1), (-2, -1))
    displacements = np.tensordot(units, jacobian, units.ndim - 1)
    return np.linalg.norm(displacements, axis=2)
