"""How a minimum moves: jvp, vjp, jacobian, gradient and response at an Equilibrium; equilibrate under jax.grad.

All of them are one rule, H dR = - d2U/dR dp . dp, at a point where dU/dR = 0.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mdsens._checks import real_array, short
from mdsens._members import each, together
from mdsens._tables import Shown
from mdsens.contacts import Network
from mdsens.implicit.linear import Auto, Direct, Method
from mdsens.implicit.linear import solve as solve_linear
from mdsens.implicit.status import (
    InputError,
    SolveStats,
    Status,
    TooLargeError,
    raise_for_status,
    require_sound_jax,
)
from mdsens.relaxation import Equilibrium
from mdsens.stationarity import (
    BlockRows,
    NullSpace,
    Unknowns,
    hessian_operator,
    linearisation,
    mixed_product,
    mixed_transpose,
)
from mdsens.stiffness import Stiffness, factorises
from mdsens.system import System, box_at, unstack

__all__ = [
    "Linearization",
    "Response",
    "gradient",
    "jacobian",
    "jvp",
    "linearize",
    "response",
    "vjp",
]

Params = Mapping[str, Any]
CHUNK_BYTES = 2**27  # of right-hand sides solved together
MEMORY_SHARE = 0.5  # of what is free, at most, for one result


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Response(Shown):
    """A derivative at a minimum, with its evidence.

    Attributes:
      value: of ``jvp`` and ``response`` the derivative of the stored positions, (n, d), mean displacement zero and
        rows of rattlers zero; of ``jacobian`` (n, d, *shape of the parameter); of ``vjp`` and ``gradient`` a dict
        shaped like the parameters.
      stats: of the linear solve: status, relative residual, iterations, part dropped, solver.
      nonaffine: ``value`` less the affine part (d box / dp) box^-1 R, which is free of the choice of images; equal to
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
    """

    equilibrium: Equilibrium
    system: System
    network: Network
    null: NullSpace
    solve: Method = dataclasses.field(default=Auto(), metadata={"static": True})
    blocks: BlockRows | None = None
    stiffness: Stiffness | None = dataclasses.field(default=None, metadata={"static": True}, compare=False)

    @property
    def factorised(self) -> bool:
        """Whether solves take the sparse factor: what Auto() and Direct() do wherever there is one."""
        wanted = isinstance(self.solve, Direct) or (isinstance(self.solve, Auto) and jax.default_backend() == "cpu")
        return wanted and self.stiffness is not None and factorises(self.system) and self.stiffness.factor is not None

    def traced(self) -> Linearization:
        """What compiled code takes: without the host's part, with the blocks."""
        held = self.stiffness
        if held is None:
            return self
        return dataclasses.replace(self, stiffness=None, blocks=None if self.factorised else held.blocks)

    @property
    def status(self) -> jax.Array:
        """CONVERGED, or why no derivative can be taken here: the minimisation's own status, or UNJAMMED."""
        return _outcome(self.equilibrium.status, self.network.rattlers)


@jax.jit
def _outcome(status: jax.Array, rattlers: jax.Array) -> jax.Array:
    code = jnp.where(jnp.all(rattlers), Status.UNJAMMED.value, Status.CONVERGED.value)
    return jnp.where(status != Status.CONVERGED.value, status, code)


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
    _check_method(solve)
    if eq.system.batch is not None:
        raise InputError(
            f"linearize takes one minimum and got a batch of {eq.system.batch}: give a member, ms.unstack(eq)[0]."
        )
    backbone, net, null = linearisation(eq.system, eq.max_force)
    null = null.simplified()
    held = Stiffness(backbone, null) if backbone.potential.pairwise else None
    lin = Linearization(eq, backbone, net, null, solve, stiffness=held)
    if throw:
        raise_for_status(Status(int(lin.status)), "this minimum cannot be differentiated", lin)
    return lin


def _check_method(solve: Any) -> None:
    if not isinstance(solve, Method):
        raise InputError(
            f"solve is {short(solve)}: give Auto(), Direct(), CG(), MINRES(), GMRES() or BiCGSTAB() of mdsens.implicit."
        )


def _linearised(at: Equilibrium | Linearization, solve: Method | None, throw: bool) -> Linearization:
    if solve is not None:
        _check_method(solve)
    if isinstance(at, Linearization):
        return at if solve is None else dataclasses.replace(at, solve=solve)
    if not isinstance(at, Equilibrium):
        raise InputError(
            f"got a {type(at).__name__}: give the Equilibrium that ms.minimize returns, or a Linearization."
        )
    return linearize(at, Auto() if solve is None else solve, throw)


def full_tangent(system: System, dparams: Params) -> dict[str, Any]:
    """A full dict of parameter changes from a partial one, checked."""
    if not isinstance(dparams, Mapping):
        raise InputError(f"dparams is a {type(dparams).__name__}: give a dict of parameter names and their changes.")
    for name, change in dparams.items():
        if name not in system.params:
            near = difflib.get_close_matches(str(name), system.params, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(map(repr, system.params))}."
            raise InputError(f"{name!r} is no parameter of {system.potential.name}: {hint}")
        given = real_array(f"dparams[{name!r}]", change)
        want, got = system.params[name].shape, given.shape
        if want != got:
            raise InputError(f"dparams[{name!r}] has shape {got}: the parameter has {want}, give that.")
        if not isinstance(given, Tracer) and not np.isfinite(np.asarray(given, float)).all():
            raise InputError(f"dparams[{name!r}] is not finite: give finite changes.")
    return {
        name: jnp.asarray(dparams[name], value.dtype) if name in dparams else np.zeros(value.shape, value.dtype)
        for name, value in system.params.items()
    }


def _with_outcome(lin: Linearization, stats: SolveStats, value: Any) -> SolveStats:
    """The solve's stats, NOT_FINITE where the value is, under the minimum's own status where that is bad."""
    code = lin.status
    stats = _finite_or_said(stats, jnp.all(jnp.stack([jnp.all(jnp.isfinite(v)) for v in jax.tree.leaves(value)])))
    return dataclasses.replace(stats, status=jnp.where(code > 0, code, stats.status))


def _finite_or_said(stats: SolveStats, finite: jax.Array) -> SolveStats:
    """A good solve can still meet a derivative of the law or the observable that is not finite."""
    good = stats.status <= Status.NULL_COMPONENT_DROPPED.value
    return dataclasses.replace(stats, status=jnp.where(good & ~finite, Status.NOT_FINITE.value, stats.status))


def _affine(system: System, tangent: Params, positions: jax.Array) -> jax.Array:
    """(d box / dp . dp) box^-1 R, (n, d)."""
    if system.box is None:
        return jnp.zeros_like(positions)
    box, change = jax.jvp(lambda p: box_at(system, p), (dict(system.params),), (dict(tangent),))
    return positions @ jnp.linalg.solve(box.T, change.T)


def _jvp_side(lin: Linearization, tangent: Params) -> jax.Array:
    return -mixed_product(lin.system, tangent).positions


def _jvp_response(lin: Linearization, tangent: Params, x: jax.Array, stats: SolveStats) -> Response:
    rest = x - _affine(lin.system, tangent, lin.system.positions)
    nonaffine = lin.null.project(Unknowns(rest)).positions
    stats = _with_outcome(lin, stats, (x, nonaffine))
    return Response(x, stats, nonaffine, lin.equilibrium.max_force, lin.network.rattlers)


def _given(lin: Linearization, side: jax.Array) -> jax.Array:
    return side


def _vjp_response(lin: Linearization, cotangent: jax.Array, x: jax.Array, stats: SolveStats) -> Response:
    value = jax.tree.map(jnp.negative, mixed_transpose(lin.system, Unknowns(x)))
    stats = _with_outcome(lin, stats, value)
    return Response(value, stats, None, lin.equilibrium.max_force, lin.network.rattlers)


def _force_response(lin: Linearization, force: jax.Array, x: jax.Array, stats: SolveStats) -> Response:
    stats = _with_outcome(lin, stats, x)
    return Response(x, stats, x, lin.equilibrium.max_force, lin.network.rattlers)


class _Door(NamedTuple):
    """A derivative as the right-hand side of its solve, and as what is made of the answer."""

    side: Callable[[Linearization, Any], jax.Array]
    response: Callable[[Linearization, Any, jax.Array, SolveStats], Response]


_JVP, _VJP, _FORCE = _Door(_jvp_side, _jvp_response), _Door(_given, _vjp_response), _Door(_given, _force_response)


def _through(door: _Door, lin: Linearization, given: Any, many: bool = False) -> Response:
    """A door's response to what is given, or to each of many; by the factor on the host, or all of it compiled."""
    core = lin.traced()
    if not lin.factorised:
        return _compiled(core, given, door, many)
    assert lin.stiffness is not None and isinstance(lin.solve, Auto | Direct)
    sides = np.asarray(_sides(core, given, door, many))
    columns = sides.reshape(sides.shape[0] if many else 1, -1).T
    x, stats = lin.stiffness.solve_many(columns, lin.solve.rtol)
    if not many:
        stats = jax.tree.map(lambda leaf: leaf[0], stats)
    return _responses(core, given, jnp.asarray(x.T.reshape(sides.shape)), stats, door, many)


@functools.partial(jax.jit, static_argnames=("door", "many"))
def _compiled(lin: Linearization, given: Any, door: _Door, many: bool) -> Response:
    operator = hessian_operator(lin.system, lin.null, lin.blocks)

    def one(given: Any) -> Response:
        x, stats = solve_linear(operator, Unknowns(door.side(lin, given)), lin.solve)
        return door.response(lin, given, x.positions, stats)

    return jax.vmap(one)(given) if many else one(given)


@functools.partial(jax.jit, static_argnames=("door", "many"))
def _sides(lin: Linearization, given: Any, door: _Door, many: bool) -> jax.Array:
    side = functools.partial(door.side, lin)
    return jax.vmap(side)(given) if many else side(given)


@functools.partial(jax.jit, static_argnames=("door", "many"))
def _responses(lin: Linearization, given: Any, x: jax.Array, stats: SolveStats, door: _Door, many: bool) -> Response:
    response = functools.partial(door.response, lin)
    return jax.vmap(response)(given, x, stats) if many else response(given, x, stats)


def _judged(result: Response, throw: bool, what: str) -> Response:
    if throw:
        codes = np.atleast_1d(np.asarray(result.stats.status)).ravel()
        worst = Status(int(codes.max(initial=0)))
        residual = float(np.max(np.asarray(result.stats.residual), initial=0.0))
        where = "" if codes.size == 1 else f" ({int((codes == worst.value).sum())} of {codes.size} solves)"
        raise_for_status(worst, f"{what} by {result.stats.solver} ended at residual {residual:.1e}{where}", result)
    return result


def _over_members(door: Callable[[Equilibrium, int], Response], eq: Any) -> Response:
    """A door on each member of a batch, over the cores."""
    members = unstack(eq)
    return together(each(lambda k: door(members[k], k), len(members)))


def _of_member(given: Any, k: int, shape: tuple[int, ...]) -> Any:
    """Member k's part of what is given for a batch: it has the member's own shape and is shared, or a leading axis."""
    return given[k] if np.ndim(given) == len(shape) + 1 else given


def _batched(at: Any) -> bool:
    return isinstance(at, Equilibrium) and at.system.batch is not None


def jvp(
    at: Equilibrium | Linearization, dparams: Params, *, solve: Method | None = None, throw: bool = True
) -> Response:
    """How the minimum moves along one direction in parameter space, dR = - H^+ (d2U/dR dp) dp.

    Args:
      at: from ``minimize`` (a batch is done member by member) or ``linearize``.
      dparams: changes by parameter name, each shaped like the parameter; the others do not change.
      solve: the linear solver; Auto() where None.
      throw: raise unless the status is good.

    Returns:
      a :class:`Response` with ``value`` (n, d). Where the box follows the parameters, ``value`` contains the images'
      motion with the box; ``nonaffine`` does not.

    Raises:
      InputError: bad names or shapes. ConvergenceError: an unconverged or unjammed minimum, a saddle, a solve that did
      not converge.
    """
    if isinstance(dparams, Mapping) and not dparams:
        raise InputError("dparams is empty: give at least one parameter's name and its change.")
    if _batched(at):
        assert isinstance(at, Equilibrium)
        shapes = {name: value.shape[1:] for name, value in at.params.items()}

        def member(eq: Equilibrium, k: int) -> Response:
            own = {name: _of_member(change, k, shapes.get(name, ())) for name, change in dparams.items()}
            return jvp(eq, own, solve=solve, throw=False)

        return _judged(_over_members(member, at), throw, "jvp")
    lin = _linearised(at, solve, throw)
    return _judged(_through(_JVP, lin, full_tangent(lin.system, dparams)), throw, "jvp")


def _cotangent(system: System, value: Any, name: str) -> jax.Array:
    array = jnp.asarray(real_array(name, value), system.positions.dtype)
    if array.shape != system.positions.shape:
        raise InputError(f"{name} has shape {array.shape}: give {system.positions.shape}, one vector a particle.")
    if not isinstance(array, Tracer) and not np.isfinite(np.asarray(array)).all():
        raise InputError(f"{name} is not finite: give finite numbers.")
    return array


def vjp(
    at: Equilibrium | Linearization, cotangent: Any, *, solve: Method | None = None, throw: bool = True
) -> Response:
    """The adjoint: what a linear functional of the positions owes to every parameter, -(d2U/dR dp)^T H^+ w.

    One solve for all parameters. The part of ``cotangent`` in the null space has no answer; it is dropped, and
    ``stats.dropped`` and the status say so.

    Args:
      at: as in ``jvp``.
      cotangent: w, (n, d).
      solve, throw: as in ``jvp``.

    Returns:
      a :class:`Response` with ``value`` a dict shaped like the parameters.
    """
    if _batched(at):
        assert isinstance(at, Equilibrium)
        shape = at.positions.shape[1:]
        whole = _over_members(lambda e, k: vjp(e, _of_member(cotangent, k, shape), solve=solve, throw=False), at)
        return _judged(whole, throw, "vjp")
    lin = _linearised(at, solve, throw)
    return _judged(_through(_VJP, lin, _cotangent(lin.system, cotangent, "cotangent")), throw, "vjp")


def response(
    at: Equilibrium | Linearization, force: Any, *, solve: Method | None = None, throw: bool = True
) -> Response:
    """The displacement under an external force on the particles, H^+ f, to first order.

    Args:
      at: as in ``jvp``.
      force: f, (n, d), energy a length. Its net part on each cluster and its part on rattlers have no answer and are
        dropped, as in ``vjp``.

    Returns:
      a :class:`Response` with ``value`` (n, d).
    """
    if _batched(at):
        assert isinstance(at, Equilibrium)
        shape = at.positions.shape[1:]
        whole = _over_members(lambda e, k: response(e, _of_member(force, k, shape), solve=solve, throw=False), at)
        return _judged(whole, throw, "response")
    lin = _linearised(at, solve, throw)
    return _judged(_through(_FORCE, lin, _cotangent(lin.system, force, "force")), throw, "response")


def _available_memory() -> float:
    """Bytes free for a new result."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable"):
                    return 1024.0 * float(line.split()[1])
    except OSError:
        pass
    try:
        return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return float("inf")


def _require_memory(entries: float, itemsize: int, what: str, remedy: str) -> None:
    needed, free = float(entries) * itemsize, _available_memory()
    if needed > MEMORY_SHARE * free:
        raise TooLargeError(f"{what} takes {needed / 2**30:.3g} GiB and {free / 2**30:.3g} GiB are free: {remedy}")


def _in_chunks(run: Callable[[Any], Response], rows: Callable[[int, int], Any], count: int, width: int) -> Response:
    """``run`` on ``count`` right-hand sides, ``width`` at a time; the last chunk is filled up, to compile once."""
    parts = []
    for start in range(0, count, width):
        part = run(rows(start, start + width))
        keep = min(width, count - start)
        parts.append(jax.tree.map(lambda leaf, keep=keep: leaf[:keep], part))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def jacobian(
    at: Equilibrium | Linearization,
    wrt: str = "sigma",
    *,
    solve: Method | None = None,
    chunk: int | None = None,
    throw: bool = True,
) -> Response:
    """The derivative of every coordinate by every component of one parameter.

    Args:
      at: as in ``jvp``.
      wrt: the parameter's name. Of a matrix of species pairs, entry (a, b) changes alone, which is half of the
        symmetric change.
      chunk: right-hand sides solved together; None for what fits in cache-sized memory.
      solve, throw: as in ``jvp``.

    Returns:
      a :class:`Response` with ``value`` and ``nonaffine`` (n, d, *shape of the parameter), and stats of that shape.

    Raises:
      TooLargeError: with the size, where the result would take more than half of the free memory. Take ``vjp`` then:
        its cost does not grow with the number of parameters.
    """
    if _batched(at):
        assert isinstance(at, Equilibrium)
        whole = _over_members(lambda e, k: jacobian(e, wrt, solve=solve, chunk=chunk, throw=False), at)
        return _judged(whole, throw, "jacobian")
    lin = _linearised(at, solve, throw)
    system = lin.system
    if not isinstance(wrt, str):
        raise InputError(f"wrt is {short(wrt)}: give a parameter's name, one of {', '.join(system.params)}.")
    if chunk is not None and not (isinstance(chunk, int) and chunk >= 1):
        raise InputError(f"chunk is {short(chunk)}: give a whole number of at least 1, or None.")
    full_tangent(system, {wrt: system.params.get(wrt, 0.0)})  # the name's check
    shape, dtype = system.params[wrt].shape, system.positions.dtype
    size, unknowns = int(np.prod(shape)), system.positions.size
    _require_memory(
        2.0 * size * unknowns,
        dtype.itemsize,
        f"jacobian by {size:,} components of {wrt}, with its non-affine part,",
        "take ms.vjp or ms.gradient, whose cost does not grow with the number of parameters, or ms.jvp by direction.",
    )
    width = chunk or int(np.clip(CHUNK_BYTES // (dtype.itemsize * unknowns * 8), 1, 256))
    width = min(width, max(size, 1))

    def directions(start: int, stop: int) -> dict[str, jax.Array]:
        unit = np.zeros((stop - start, size))
        inside = np.arange(start, min(stop, size))
        unit[inside - start, inside] = 1.0
        tangent = {k: jnp.zeros((stop - start, *v.shape), v.dtype) for k, v in system.params.items()}
        return {**tangent, wrt: jnp.asarray(unit.reshape(stop - start, *shape), dtype)}

    flat = _in_chunks(lambda t: _through(_JVP, lin, t, many=True), directions, size, width)

    def shaped(leaf: jax.Array) -> jax.Array:
        return jnp.moveaxis(leaf, 0, -1).reshape(*leaf.shape[1:], *shape)

    result = Response(
        shaped(flat.value),
        jax.tree.map(shaped, flat.stats),
        shaped(flat.nonaffine),
        lin.equilibrium.max_force,
        lin.network.rattlers,
    )
    return _judged(result, throw, f"jacobian by {wrt}")


def gradient(
    observable: Callable[[System], Any],
    at: Equilibrium | Linearization,
    *,
    solve: Method | None = None,
    throw: bool = True,
) -> Response:
    """The total derivative of an observable by all parameters, dO/dp = @O/@p + (@O/@R) dR/dp, by one adjoint solve.

    Args:
      observable: a function of a System, traceable, returning a scalar or an array; see :mod:`mdsens.observables`.
      at: as in ``jvp``.
      solve, throw: as in ``jvp``.

    Returns:
      a :class:`Response` with ``value`` a dict: shape of the observable followed by the shape of each parameter.
    """
    if _batched(at):
        assert isinstance(at, Equilibrium)
        whole = _over_members(lambda e, k: gradient(observable, e, solve=solve, throw=False), at)
        return _judged(whole, throw, "gradient")
    if not callable(observable):
        raise InputError(
            f"the observable is {short(observable)}: give a function of a System, such as ms.observables.pressure."
        )
    lin = _linearised(at, solve, throw)
    system = lin.equilibrium.system

    def observe(positions: jax.Array, params: Params) -> jax.Array:
        value = observable(system.replace(positions=positions, params=dict(params)))
        try:
            array = jnp.asarray(value)
        except Exception as error:  # a dict, a text, rows of different lengths
            raise InputError(f"the observable returns {short(value)}: return a number or an array.") from error
        if value is None or not array.size:
            raise InputError(f"the observable returns {short(value)}: return a number or an array.")
        return array

    value, pull = jax.vjp(observe, system.positions, dict(system.params))
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise InputError(f"the observable returns {value.dtype}: return floating-point numbers.")
    count = int(np.prod(value.shape))
    _require_memory(
        float(count) * (system.positions.size + sum(v.size for v in system.params.values())),
        value.dtype.itemsize,
        f"gradient of {count:,} observables",
        "ask for fewer observables at once.",
    )
    units = jnp.eye(count, dtype=value.dtype).reshape(count, *value.shape)
    cotangents, direct = jax.vmap(pull)(units)
    width = min(count, int(np.clip(CHUNK_BYTES // (value.dtype.itemsize * system.positions.size * 8), 1, 256)))

    def rows(start: int, stop: int) -> jax.Array:
        part = cotangents[start:stop]
        return jnp.concatenate([part, jnp.zeros((stop - start - part.shape[0], *part.shape[1:]), part.dtype)])

    flat = _in_chunks(lambda w: _through(_VJP, lin, w, many=True), rows, count, width)
    total = {k: (flat.value[k] + direct[k]).reshape(*value.shape, *direct[k].shape[1:]) for k in direct}
    finite = [jnp.all(jnp.isfinite(t), axis=tuple(range(value.ndim, t.ndim))) for t in total.values()]
    stats = jax.tree.map(lambda leaf: leaf.reshape(value.shape), flat.stats)
    stats = _finite_or_said(stats, jnp.all(jnp.stack(finite), axis=0))
    result = Response(total, stats, None, lin.equilibrium.max_force, lin.network.rattlers)
    return _judged(result, throw, "gradient")
