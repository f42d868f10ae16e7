"""A minimum made ready to be differentiated, and the one linear solve that stands behind every derivative.

All of them are one rule, H dR = - d2U/dR dp . dp, at a point where dU/dR = 0; a :class:`Door` says what stands on the
right of it and what is made of the answer.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mdsens._checks import real_array, short
from mdsens._tables import Shown
from mdsens.block_rows import BlockRows
from mdsens.contacts import Network
from mdsens.enthalpy import Cell, deformed, enthalpy_slope
from mdsens.implicit.linear import solve as solve_linear
from mdsens.implicit.operators import Auto, Direct, Method
from mdsens.implicit.status import InputError, SolveStats, Status, raise_for_status, require_sound_jax
from mdsens.relaxation import Equilibrium
from mdsens.scales import scales
from mdsens.stationarity import (
    NullSpace,
    Unknowns,
    along,
    gradient,
    hessian_operator,
    linearisation,
    mixed_product,
    mixed_transpose,
)
from mdsens.stiffness import Stiffness, factorises
from mdsens.strains import forces_of_strain, to_mandel
from mdsens.system import System, box_at

__all__ = ["FORCE", "JVP", "STRAIN", "VJP", "Door", "Linearization", "Response", "by_factor", "changes", "check_method"]
__all__ += ["finite_or_said", "full_tangent", "linearised", "linearize", "through", "through_batch"]

Params = Mapping[str, Any]
# In 3-D, a factor takes 0.27 s at 2,000 spheres, one solve by CG 0.07 s, and 0.15 s at a pressure of 4e-4.
ONE_SOLVE_3D = 1500


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Response(Shown):
    """A derivative at a minimum, with its evidence.

    Attributes:
      value: of ``jvp`` and ``response`` the derivative of the stored positions, (n, d), mean displacement zero and
        rows of rattlers zero; of ``jacobian`` (n, d, *shape of the parameter); of ``vjp`` and ``gradient`` a dict
        shaped like the parameters. At a pressure, of positions and cell: ``Unknowns``, with ``strain`` the change of
        the cell, d box = strain box, as a Mandel vector (m,).
      stats: of the linear solve: status, relative residual, iterations, part dropped, solver.
      nonaffine: ``value`` less the affine part (d box) box^-1 R, which is free of the choice of images; equal to
        ``value`` where the box does not move; None where ``value`` is a dict.
      max_force: of the minimum.
      rattlers: (n,) particles that are held by nothing, whose rows are zero.
    """

    value: Any
    stats: SolveStats
    nonaffine: Any
    max_force: jax.Array
    rattlers: jax.Array

    @property
    def status(self) -> Status:
        """The status of a single response."""
        return Status(int(self.stats.status))

    _title = "Response"

    def _rows(self) -> list[tuple[str, str]]:
        codes = np.atleast_1d(np.asarray(self.stats.status)).ravel()
        worst = Status(int(codes.max(initial=0)))
        leaves = jax.tree_util.tree_leaves_with_path(self.value)
        rows = []
        for path, leaf in leaves:
            label = "value" + jax.tree_util.keystr(path)
            size = float(jnp.linalg.norm(jnp.ravel(leaf)))
            rows.append((label, f"shape {tuple(leaf.shape)}, norm {size:.6g}"))
        return [
            *rows,
            ("status", f"{worst.name}: {worst.sentence}" + (f" (worst of {codes.size})" if codes.size > 1 else "")),
            ("solver", f"{self.stats.solver}, {int(np.max(np.asarray(self.stats.iterations))):,} products"),
            ("residual", f"{float(np.max(np.asarray(self.stats.residual))):.1e}"),
            ("dropped", f"{float(np.max(np.asarray(self.stats.dropped))):.1e}"),
            ("max_force", f"{float(np.max(np.asarray(self.max_force))):.1e}"),
            ("rattlers", f"{int(np.sum(np.asarray(self.rattlers)))}"),
        ]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linearization:
    """A minimum ready to be differentiated: every door takes one in place of the Equilibrium.

    Attributes:
      equilibrium: the minimum.
      system: its backbone, the rattlers' contacts deleted: the Hessian is this system's.
      network: contacts, rattlers, clusters.
      null: the null space.
      solve: the option record of the linear solver.
      blocks: the Hessian assembled, for products; None for a law that is more than pairs.
      stiffness: the Hessian on the host with its factor, which the first solve makes; None inside traced code.
      cell: of a minimum at a pressure; None where the cell was given.
    """

    equilibrium: Equilibrium
    system: System
    network: Network
    null: NullSpace
    solve: Method = dataclasses.field(default=Auto(), metadata={"static": True})
    blocks: BlockRows | None = None
    stiffness: Stiffness | None = dataclasses.field(default=None, metadata={"static": True}, compare=False)
    cell: Cell | None = None

    @property
    def params(self) -> dict[str, Any]:
        """What derivatives are taken by: the system's parameters and, where the cell is an unknown, the pressure."""
        return dict(self.system.params) if self.cell is None else {**self.system.params, "pressure": self.cell.pressure}

    def condition(self, params: Params) -> Unknowns:
        """What is zero at the minimum: dU/dR, and where the cell is an unknown the enthalpy's derivative by strain."""
        own = {name: params[name] for name in self.system.params}
        slope = gradient(self.system, Unknowns(self.system.positions), own)
        if self.cell is None:
            return slope
        at = self.system.replace(params=own)
        return dataclasses.replace(slope, strain=enthalpy_slope(at, params["pressure"], self.cell.along))

    def moved(self, system: System, x: Unknowns, params: Params) -> System:
        """A system of this configuration at other unknowns and parameters; traceable, its list stays."""
        at = system.replace(positions=x.positions, params={name: params[name] for name in system.params})
        if self.cell is None or x.strain is None:
            return at
        return deformed(at, jnp.tensordot(x.strain, self.cell.along, axes=1))

    @property
    def unknowns(self) -> Unknowns:
        """The unknowns at the minimum: positions, and no strain where the cell is one."""
        return Unknowns(self.system.positions, None if self.cell is None else jnp.zeros_like(self.cell.slope))

    def solved(self, side: Unknowns, x: jax.Array) -> Unknowns:
        """The answer of H x = side for positions alone, as that for positions and cell."""
        if self.cell is None or side.strain is None:
            return Unknowns(x)
        cell = self.cell
        strain = cell.compliance @ (side.strain + jnp.einsum("knd,nd->k", cell.motion, side.positions))
        return Unknowns(x + jnp.tensordot(strain, cell.motion, axes=1), strain)

    def traced(self, moving: Sequence[str]) -> Linearization:
        """What compiled code takes: without the host's part, and with the cheapest form of the law.

        Args:
          moving: parameters whose derivatives are to be taken.
        """
        system = self.system.replace(potential=self.system.potential.at(self.system.params, moving))
        return dataclasses.replace(self, system=system, stiffness=None)

    @property
    def status(self) -> Any:
        """CONVERGED, or why no derivative can be taken here: the minimisation's own status, UNJAMMED, or the cell's."""
        code = _outcome(self.equilibrium.status, self.network.rattlers)
        return code if self.cell is None else (jnp if isinstance(code, Tracer) else np).maximum(code, self.cell.status)


def by_factor(system: System, solve: Method, many: bool = False) -> bool:
    """Whether the solver that is asked for takes the sparse factor of H wherever H has one, for one solve or many."""
    pays = many or system.dimension == 2 or system.n <= ONE_SOLVE_3D
    wanted = isinstance(solve, Direct) or (isinstance(solve, Auto) and pays and jax.default_backend() == "cpu")
    return wanted and factorises(system)


def _outcome(status: Any, rattlers: Any) -> Any:
    xp = jnp if isinstance(rattlers, Tracer) else np
    code = xp.where(xp.all(rattlers), Status.UNJAMMED.value, Status.CONVERGED.value)
    return xp.where(xp.asarray(status) != Status.CONVERGED.value, status, code)


def linearize(eq: Equilibrium, solve: Method = Auto(), throw: bool = True) -> Linearization:
    """Find the network, the rattlers and the null space of a minimum, once for many derivatives.

    Args:
      eq: from ``minimize``; not a batch.
      solve: GMRES(), CG(), MINRES(), BiCGSTAB(), Direct() or Auto(), which chooses.
      throw: raise where the minimum cannot be differentiated; with False every door's status says so.

    Raises:
      ConvergenceError: an unconverged minimum, or one without contacts (UNJAMMED).
    """
    require_sound_jax()
    if not isinstance(eq, Equilibrium):
        raise InputError(f"got a {type(eq).__name__}: give the Equilibrium that ms.minimize returns.")
    check_method(solve)
    if eq.system.batch is not None:
        raise InputError(
            f"linearize takes one minimum and got a batch of {eq.system.batch}: give a member, ms.unstack(eq)[0]."
        )
    backbone, net, null = linearisation(eq.system, eq.max_force)
    null = null.simplified()
    stiffness = Stiffness(backbone, null)
    cell = None if eq.pressure is None else Cell.of(backbone, stiffness, eq.pressure, np.asarray(eq.strains))
    lin = Linearization(
        eq, backbone, net, null, solve, stiffness=stiffness if backbone.potential.pairwise else None, cell=cell
    )
    if throw:
        raise_for_status(Status(int(lin.status)), "this minimum cannot be differentiated", lin)
    return lin


def check_method(solve: Any) -> None:
    """Refuse what is no option record of a linear solver."""
    if not isinstance(solve, Method):
        raise InputError(
            f"solve is {short(solve)}: give Auto(), Direct(), CG(), MINRES(), GMRES() or BiCGSTAB() of mdsens.implicit."
        )


def linearised(at: Equilibrium | Linearization, solve: Method | None, throw: bool) -> Linearization:
    """What a door is given, as a Linearization with the solver that is asked for."""
    if solve is not None:
        check_method(solve)
    if isinstance(at, Linearization):
        return at if solve is None else dataclasses.replace(at, solve=solve)
    if not isinstance(at, Equilibrium):
        raise InputError(
            f"got a {type(at).__name__}: give the Equilibrium that ms.minimize returns, or a Linearization."
        )
    return linearize(at, Auto() if solve is None else solve, throw)


def full_tangent(system: System, dparams: Params) -> dict[str, Any]:
    """A full dict of parameter changes from a partial one, checked."""
    given = changes(system, dparams)
    return {k: given[k] if k in given else np.zeros(v.shape, v.dtype) for k, v in system.params.items()}


def changes(system: System, dparams: Params, params: Params | None = None) -> dict[str, Any]:
    """Changes of some parameters, checked; of a Linearization's ``params`` where they are given."""
    valid = system.params if params is None else params
    if not isinstance(dparams, Mapping):
        raise InputError(f"dparams is a {type(dparams).__name__}: give a dict of parameter names and their changes.")
    for name, change in dparams.items():
        if name not in valid:
            near = difflib.get_close_matches(str(name), valid, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(map(repr, valid))}."
            raise InputError(f"{name!r} is no parameter of {system.potential.name}: {hint}")
        given = real_array(f"dparams[{name!r}]", change)
        want, got = valid[name].shape, given.shape
        if want != got:
            raise InputError(f"dparams[{name!r}] has shape {got}: the parameter has {want}, give that.")
        if not isinstance(given, Tracer) and not np.isfinite(np.asarray(given, float)).all():
            raise InputError(f"dparams[{name!r}] is not finite: give finite changes.")
    return {
        name: real_array(f"dparams[{name!r}]", change).astype(valid[name].dtype) for name, change in dparams.items()
    }


def _with_outcome(lin: Linearization, stats: SolveStats, value: Any) -> SolveStats:
    """The solve's stats, NOT_FINITE where the value is, under the minimum's own status where that is bad."""
    code = lin.status
    stats = finite_or_said(stats, jnp.all(jnp.stack([jnp.all(jnp.isfinite(v)) for v in jax.tree.leaves(value)])))
    return dataclasses.replace(stats, status=jnp.where(code > 0, code, stats.status))


def finite_or_said(stats: SolveStats, finite: jax.Array) -> SolveStats:
    """A good solve can still meet a derivative of the law or the observable that is not finite."""
    good = stats.status <= Status.NULL_COMPONENT_DROPPED.value
    return dataclasses.replace(stats, status=jnp.where(good & ~finite, Status.NOT_FINITE.value, stats.status))


def _affine(system: System, tangent: Params, positions: jax.Array) -> jax.Array:
    """(d box / dp . dp) box^-1 R, (n, d)."""
    if system.box is None:
        return jnp.zeros_like(positions)
    change = along(lambda p: box_at(system, p), system.params, tangent)
    return positions @ jnp.linalg.solve(box_at(system, system.params).T, change.T)


def _jvp_side(lin: Linearization, tangent: Params) -> Unknowns:
    if lin.cell is None:
        return jax.tree.map(jnp.negative, mixed_product(lin.system, tangent))
    return jax.tree.map(jnp.negative, along(lin.condition, lin.params, tangent))


def _jvp_response(lin: Linearization, tangent: Params, x: Unknowns, stats: SolveStats) -> Response:
    positions = lin.system.positions
    if x.strain is not None and lin.cell is not None:
        strain = jnp.tensordot(x.strain, lin.cell.along, axes=1)
        rest, value = x.positions, Unknowns(x.positions + positions @ strain.T, to_mandel(strain))
    else:
        rest, value = x.positions - _affine(lin.system, tangent, positions), x.positions
    nonaffine = lin.null.project(Unknowns(rest)).positions
    stats = _with_outcome(lin, stats, (value, nonaffine))
    return Response(value, stats, nonaffine, lin.equilibrium.max_force, lin.network.rattlers)


def _given(lin: Linearization, side: Unknowns) -> Unknowns:
    return side


def _vjp_response(lin: Linearization, cotangent: Unknowns, x: Unknowns, stats: SolveStats) -> Response:
    if x.strain is None:
        transposed = mixed_transpose(lin.system, x)
    else:
        transposed = jax.vjp(lin.condition, lin.params)[1](x)[0]
    value = jax.tree.map(jnp.negative, transposed)
    stats = _with_outcome(lin, stats, value)
    return Response(value, stats, None, lin.equilibrium.max_force, lin.network.rattlers)


def _force_response(lin: Linearization, given: Any, x: Unknowns, stats: SolveStats) -> Response:
    stats = _with_outcome(lin, stats, x.positions)
    return Response(x.positions, stats, x.positions, lin.equilibrium.max_force, lin.network.rattlers)


def _strain_side(lin: Linearization, strain: jax.Array) -> Unknowns:
    forces = forces_of_strain(lin.system, strain)
    length, stiffness = scales(lin.system)
    least = 1e4 * jnp.finfo(forces.dtype).eps * length * stiffness
    # in a crystal whose atoms are centres of symmetry they are round-off, and have no response
    return Unknowns(jnp.where(jnp.max(jnp.abs(forces)) > least, forces, 0.0))


class Door(NamedTuple):
    """A derivative as the right-hand side of its solve, and as what is made of the answer.

    ``moving`` are the parameters by which it is taken, of all of them and of what is given.
    """

    side: Callable[[Linearization, Any], Unknowns]
    response: Callable[[Linearization, Any, Unknowns, SolveStats], Response]
    moving: Callable[[Params, Any], Sequence[str]]


JVP = Door(_jvp_side, _jvp_response, lambda params, tangent: tuple(tangent))
VJP = Door(_given, _vjp_response, lambda params, cotangent: tuple(params))
FORCE = Door(_given, _force_response, lambda params, force: ())
STRAIN = Door(_strain_side, _force_response, lambda params, strain: ())


def through(door: Door, lin: Linearization, given: Any, many: bool = False) -> Response:
    """A door's response to what is given, or to each of many; by the factor on the host, or all of it compiled."""
    core, held = lin.traced(door.moving(lin.system.params, given)), lin.stiffness
    if held is not None and by_factor(lin.system, lin.solve, many):
        assert isinstance(lin.solve, Auto | Direct)
        sides = _sides(core, given, door, many)  # while the host factorises
        if held.factor is not None:
            forces = np.asarray(sides.positions)
            x, stats = held.solve_many(forces.reshape(len(forces) if many else 1, -1).T, lin.solve.rtol)
            stats = jax.tree.map(lambda leaf: leaf[0] if many else leaf[0, 0], stats)
            return _responses(core, given, sides, x.T.reshape(forces.shape), stats, door, many)
    if held is not None:
        core = dataclasses.replace(core, blocks=held.blocks)
    return _compiled(core, given, door, many)


def through_batch(door: Door, eq: Equilibrium, given: Any, solve: Method) -> Response | None:
    """A door's response of each member of a batch to what is given for it, by one factor of all their Hessians.

    None where there is no such factor: then each goes through by itself.

    Args:
      solve: one of which ``by_factor`` holds.
    """
    assert isinstance(solve, Auto | Direct)
    if not np.isfinite(np.asarray(eq.positions)).all():
        return None
    backbone, net, null = linearisation(eq.system, eq.max_force)
    stiffness = Stiffness(backbone, null.simplified())
    core = Linearization(eq, backbone, net, stiffness.null, solve).traced(door.moving(eq.params, given))
    sides = _sides(core, given, door, False)
    if stiffness.factor is None:
        return None
    forces = np.asarray(sides.positions)
    x, stats = stiffness.solve_many(forces.reshape(-1, 1), solve.rtol)
    stats = jax.tree.map(lambda leaf: leaf[:, 0], stats)
    return _responses(core, given, sides, x.reshape(forces.shape), stats, door, False)


@functools.partial(jax.jit, static_argnames=("door", "many"))
def _compiled(lin: Linearization, given: Any, door: Door, many: bool) -> Response:
    operator = hessian_operator(lin.system, lin.null, lin.blocks)

    def one(given: Any) -> Response:
        side = door.side(lin, given)
        x, stats = solve_linear(operator, Unknowns(side.positions), lin.solve)
        return door.response(lin, given, lin.solved(side, x.positions), stats)

    return jax.vmap(one)(given) if many else one(given)


@functools.partial(jax.jit, static_argnames=("door", "many"))
def _sides(lin: Linearization, given: Any, door: Door, many: bool) -> Unknowns:
    if lin.system.batch is not None:
        return jax.vmap(door.side)(lin, given)
    side = functools.partial(door.side, lin)
    return jax.vmap(side)(given) if many else side(given)


@functools.partial(jax.jit, static_argnames=("door", "many"))
def _responses(
    lin: Linearization, given: Any, sides: Unknowns, x: Any, stats: SolveStats, door: Door, many: bool
) -> Response:
    def response(lin: Linearization, given: Any, side: Unknowns, x: Any, stats: SolveStats) -> Response:
        return door.response(lin, given, lin.solved(side, x), stats)

    if lin.system.batch is not None:
        return jax.vmap(response)(lin, given, sides, x, stats)
    of_one = functools.partial(response, lin)
    return jax.vmap(of_one)(given, sides, x, stats) if many else of_one(given, sides, x, stats)
