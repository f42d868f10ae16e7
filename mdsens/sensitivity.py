"""How a minimum moves: jvp, vjp, jacobian, gradient and response at an Equilibrium."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mdsens import lagrangian
from mdsens._checks import real_array, short
from mdsens._members import apart, in_chunks, joined, together
from mdsens._memory import require_memory
from mdsens.doors import (
    FORCE,
    JVP,
    VJP,
    Door,
    Response,
    aside,
    dropped_any,
    finite_or_said,
    norms,
    read,
    through,
    through_batch,
    without_round_off,
)
from mdsens.implicit._traceable import Traceable
from mdsens.implicit.operators import Auto, Method, check_method
from mdsens.implicit.status import InputError, Status, raise_for_status
from mdsens.linearization import Linearization, by_factor, changes, linearised, linearize, require_sound
from mdsens.not_finite import where_not_finite
from mdsens.relaxation import Equilibrium
from mdsens.stationarity import Unknowns
from mdsens.strains import basis
from mdsens.system import System, parameters_of

__all__ = ["Linearization", "Response", "gradient", "jacobian", "jvp", "linearize", "response", "vjp"]

Params = Mapping[str, Any]
CHUNK_BYTES = 2**27  # of right-hand sides solved together


def _judged(result: Response, throw: bool, what: str, system: System | None = None) -> Response:
    if throw:
        codes = np.atleast_1d(np.asarray(result.stats.status)).ravel()
        worst = Status(int(codes.max(initial=0)))
        residual = float(np.max(np.asarray(result.stats.residual), initial=0.0))
        where = "" if codes.size == 1 else f" ({int((codes == worst.value).sum())} of {codes.size} solves)"
        where += "" if system is None else where_not_finite(worst, system)
        raise_for_status(worst, f"{what} by {result.stats.solver} ended at residual {residual:.1e}{where}", result)
    return result


def _by(result: Response, system: System, params: Params | None = None) -> Response:
    """A derivative by all parameters, which knows so."""
    own = lagrangian.own_params(system) if params is None else params
    return result if result.wrt else dataclasses.replace(result, wrt=parameters_of(system, own))


def _over_members(door: Callable[[Equilibrium, Any], Response], eq: Equilibrium, given: Any = ()) -> Response:
    """A door on each member of a batch and on what is given for it, over the cores."""

    def some(part: tuple[Equilibrium, Any], count: int) -> list[Response]:
        return [door(*member) for member in apart(part, count)]

    parts = in_chunks(some, (eq, given), eq.system.batch or 0, eq.system.n)
    return together([response for part in parts for response in part])


def _batch_through(
    door: Door, alone: Callable[[Equilibrium, Any], Response], eq: Equilibrium, given: Any, solve: Method | None
) -> Response:
    """A door on each member of a batch, with what is given for each, (members, …); ``alone`` on one where need be."""
    method = Auto() if solve is None else solve
    check_method(method)

    def some(part: tuple[Equilibrium, Any], count: int) -> tuple[Response | None, int]:
        return through_batch(door, *part, method), count

    if by_factor(eq.system, method) and eq.pressure is None and not eq.system.constraints:
        parts, counts = zip(*in_chunks(some, (eq, given), eq.system.batch or 0, eq.system.n), strict=True)
        if None not in parts:
            return joined(parts, counts)
    return _over_members(alone, eq, given)


def _for_members(name: str, given: Any, shape: tuple[int, ...], count: int) -> Any:
    """What is given for a batch, (members, …): it has a member's own shape and is shared, or a leading axis."""
    array = real_array(name, given)
    return jnp.broadcast_to(array, (count, *shape)) if array.shape == shape else array


def _batched(at: Any) -> bool:
    return isinstance(at, Equilibrium) and at.system.batch is not None


def jvp(
    at: Equilibrium | Linearization, dparams: Params, *, solve: Method | None = None, throw: bool = True
) -> Response:
    """How the minimum moves along one direction in parameter space, dR = - H^+ (d2U/dR dp) dp.

    Args:
      at: from ``minimize`` (a batch is done member by member) or ``linearize``.
      dparams: changes by parameter name, each shaped like the parameter; the others do not change. That of a symmetric
        matrix of species pairs is symmetric: entries (a, b) and (b, a) are one number, and change together.
      solve: the linear solver; Auto() where None.
      throw: raise unless the status is good.

    Returns:
      a :class:`Response` with ``value`` (n, d); at a pressure, whose change ``dparams`` may name, an ``Unknowns`` of
      ``positions`` (n, d) and of ``strain``, the cell's as a Mandel vector (xx, yy, sqrt(2) xy in 2-D; xx, yy, zz and
      sqrt(2) times yz, xz, xy in 3-D). Where the box follows the parameters, ``value`` contains the images'
      motion with the box; ``nonaffine`` does not.

    Raises:
      InputError: bad names or shapes. ConvergenceError: an unconverged or unjammed minimum, a saddle, a solve that did
      not converge.
    """
    if isinstance(dparams, Mapping) and not dparams:
        raise InputError("dparams is empty: give at least one parameter's name and its change.")
    if _batched(at):
        assert isinstance(at, Equilibrium)
        own = lagrangian.own_params(at.system)
        own = own if at.pressure is None else {**own, "pressure": at.pressure}
        if isinstance(dparams, Mapping):
            shapes = {name: value.shape[1:] for name, value in own.items()}
            dparams = {
                name: _for_members(f"dparams[{name!r}]", change, shapes.get(name, ()), at.system.batch or 0)
                for name, change in dparams.items()
            }
        given = changes(at.system, dparams, own)

        def alone(member: Equilibrium, change: Params) -> Response:
            return jvp(member, change, solve=solve, throw=False)

        return _judged(_batch_through(JVP, alone, at, given, solve), throw, "jvp")
    lin = linearised(at, solve)
    given = changes(lin.system, dparams, lin.params)
    require_sound(lin, at, throw)
    return _judged(through(JVP, lin, given), throw, "jvp", lin.system)


def _cotangent(system: System, value: Any, name: str) -> jax.Array:
    array = jnp.asarray(real_array(name, value), system.positions.dtype)
    if array.shape != system.positions.shape:
        raise InputError(f"{name} has shape {array.shape}: give {system.positions.shape}, one vector a particle.")
    if not isinstance(array, Tracer) and not np.isfinite(np.asarray(array)).all():
        raise InputError(f"{name} is not finite: give finite numbers.")
    return array


def _unfolded(lin: Linearization, cotangent: Any) -> Unknowns:
    """A cotangent of stored positions and strain, as ``jvp`` gives them, as one of positions at a strain and of it."""
    given = cotangent if isinstance(cotangent, Unknowns) else Unknowns(cotangent)
    w = _cotangent(lin.system, given.positions, "cotangent")
    if lin.held is not None:
        return _of_constraints(lin, given, w)
    if lin.cell is None:
        if given.strain is not None:
            raise InputError("the cotangent has a strain, and this cell was given: give (n, d), one vector a particle.")
        return Unknowns(w)
    along, R = lin.cell.along, lin.system.positions
    strain = jnp.einsum("nd,kde,ne->k", w, along, R)
    if given.strain is not None:
        own, m = jnp.asarray(real_array("cotangent.strain", given.strain), w.dtype), R.shape[1] * (R.shape[1] + 1) // 2
        if own.shape != (m,):
            raise InputError(f"cotangent.strain has shape {own.shape}: give ({m},), a Mandel vector.")
        strain = strain + jnp.einsum("m,mde,kde->k", own, basis(R.shape[1]), along)
    return Unknowns(w, strain)


def _of_constraints(lin: Linearization, given: Unknowns, w: jax.Array) -> Unknowns:
    """A cotangent of positions, and where given of multipliers and relaxed parameters; zero where not."""
    shapes = jax.eval_shape(lambda c: read(c, c.unknowns, c.params), lin.traced(()))
    parts: dict[str, Any] = {}
    for field in ("multipliers", "params"):
        own, some = getattr(shapes, field), getattr(given, field) or {}
        for name, value in some.items():
            if own is None or name not in own:
                raise InputError(f"cotangent.{field} has {name!r}: give some of {list(own or ())}.")
            if jnp.shape(value) != own[name].shape:
                raise InputError(f"cotangent.{field}[{name!r}] has shape {jnp.shape(value)}: give {own[name].shape}.")
        parts[field] = own and {
            k: jnp.asarray(real_array(f"cotangent.{field}[{k!r}]", some[k]), w.dtype)
            if k in some
            else jnp.zeros(v.shape, w.dtype)
            for k, v in own.items()
        }
    return Unknowns(w, None, parts["multipliers"], parts["params"])


def vjp(
    at: Equilibrium | Linearization, cotangent: Any, *, solve: Method | None = None, throw: bool = True
) -> Response:
    """The adjoint: what a linear functional of the positions owes to every parameter, -(d2U/dR dp)^T H^+ w.

    One solve for all parameters. The part of ``cotangent`` in the null space has no answer; it is dropped, and
    ``stats.dropped`` and the status say so.

    Args:
      at: as in ``jvp``.
      cotangent: w, (n, d); at a pressure also ``Unknowns(w, strain)``, strain a Mandel vector.
      solve, throw: as in ``jvp``.

    Returns:
      a :class:`Response` with ``value`` a dict shaped like the parameters. Of a symmetric matrix of species pairs,
      entries (a, b) and (b, a) are half each of the derivative by the one number that both are;
      ``component("sigma[0,1]")`` is the whole.
    """
    if _batched(at):
        assert isinstance(at, Equilibrium)
        given = _for_members("cotangent", cotangent, at.positions.shape[1:], at.system.batch or 0)
        side = Unknowns(_cotangent(at.system, given, "cotangent"))

        def alone(member: Equilibrium, w: Unknowns) -> Response:
            return vjp(member, w, solve=solve, throw=False)

        return _judged(_by(_batch_through(VJP, alone, at, side, solve), at.system), throw, "vjp")
    lin = linearised(at, solve)
    given = _unfolded(lin, cotangent)
    require_sound(lin, at, throw)
    return _judged(_by(through(VJP, lin, given), lin.system, lin.params), throw, "vjp", lin.system)


def response(
    at: Equilibrium | Linearization, force: Any, *, solve: Method | None = None, throw: bool = True
) -> Response:
    """The displacement under an external force on the particles, H^+ f, to first order.

    Args:
      at: as in ``jvp``.
      force: f, (n, d), energy a length. Its net part on each cluster and its part on rattlers have no answer and are
        dropped, as in ``vjp``. The cell is held, at a pressure too.

    Returns:
      a :class:`Response` with ``value`` (n, d).
    """
    if _batched(at):
        assert isinstance(at, Equilibrium)
        given = _for_members("force", force, at.positions.shape[1:], at.system.batch or 0)
        side = Unknowns(_cotangent(at.system, given, "force"))

        def alone(member: Equilibrium, f: Unknowns) -> Response:
            return response(member, f.positions, solve=solve, throw=False)

        return _judged(_batch_through(FORCE, alone, at, side, solve), throw, "response")
    lin = linearised(at, solve)
    side = Unknowns(_cotangent(lin.system, force, "force"))
    require_sound(lin, at, throw)
    return _judged(through(FORCE, lin, side), throw, "response", lin.system)


def _in_chunks(run: Callable[[Any], Response], rows: Callable[[int, int], Any], count: int, width: int) -> Response:
    """``run`` on ``count`` right-hand sides, ``width`` at a time; the last chunk is filled up, to compile once.

    Of no right-hand side, one is run whose answer is dropped: it gives the shapes.
    """
    if count == width:
        return run(rows(0, width))
    parts = []
    for start in range(0, max(count, 1), width):
        part = run(rows(start, start + width))
        keep = min(width, count - start)
        parts.append(jax.tree.map(lambda leaf, keep=keep: leaf[:keep], part))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _require_room(system: System, wrt: str, components: int) -> None:
    """Refuse a Jacobian, or those of a batch, that does not fit."""
    whose = f" of {system.batch:,} systems" if system.batch else ""
    require_memory(
        2.0 * components * system.positions.size,
        system.positions.dtype.itemsize,
        f"jacobian by {components:,} components of {wrt}{whose}, with its non-affine part,",
        "take ms.vjp or ms.gradient, whose cost does not grow with the number of parameters, or ms.jvp by direction.",
    )


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
      wrt: the parameter's name.
      chunk: right-hand sides solved together; None for what fits in cache-sized memory.
      solve, throw: as in ``jvp``.

    Returns:
      a :class:`Response` with ``value`` and ``nonaffine`` (n, d, *shape of the parameter), and stats of that shape. Of
      a symmetric matrix of species pairs, ``value[..., a, b]`` and ``value[..., b, a]`` are half each of the derivative
      by the one number that both entries are; ``component("sigma[0,1]")`` is the whole, (n, d).

    Raises:
      TooLargeError: with the size, where the result would take more than half of the free memory. Take ``vjp`` then:
        its cost does not grow with the number of parameters.
    """
    if _batched(at):
        assert isinstance(at, Equilibrium)
        if isinstance(wrt, str) and wrt in at.params:
            _require_room(at.system, wrt, at.params[wrt].size // (at.system.batch or 1))
        whole = _over_members(lambda e, _: jacobian(e, wrt, solve=solve, chunk=chunk, throw=False), at)
        return _judged(whole, throw, "jacobian")
    lin = linearised(at, solve)
    system = lin.system
    if not isinstance(wrt, str):
        raise InputError(f"wrt is {short(wrt)}: give a parameter's name, one of {', '.join(lin.params)}.")
    if chunk is not None and not (isinstance(chunk, int) and chunk >= 1):
        raise InputError(f"chunk is {short(chunk)}: give a whole number of at least 1, or None.")
    changes(system, {wrt: lin.params.get(wrt, 0.0)}, lin.params)  # the name's check
    shape, dtype = lin.params[wrt].shape, system.positions.dtype
    size, unknowns = int(np.prod(shape)), system.positions.size
    _require_room(system, wrt, lin.params[wrt].size)
    require_sound(lin, at, throw)
    width = chunk or int(np.clip(CHUNK_BYTES // (dtype.itemsize * unknowns * 8), 1, 256))
    width = min(width, max(size, 1))

    def directions(start: int, stop: int) -> dict[str, jax.Array]:
        unit = np.zeros((stop - start, size))
        inside = np.arange(start, min(stop, size))
        unit[inside - start, inside] = 1.0
        return {wrt: jnp.asarray(unit.reshape(stop - start, *shape), dtype)}

    flat = _in_chunks(lambda t: through(JVP, lin, t, many=True), directions, size, width)

    def shaped(leaf: jax.Array) -> jax.Array:
        return jnp.moveaxis(leaf, 0, -1).reshape(*leaf.shape[1:], *shape)

    result = Response(
        jax.tree.map(shaped, flat.value),
        jax.tree.map(shaped, flat.stats),
        shaped(flat.nonaffine),
        lin.equilibrium.max_force,
        lin.network.rattlers,
        parameters_of(system, {wrt: lin.params[wrt]}),
    )
    return _judged(result, throw, f"jacobian by {wrt}", system)


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
      a :class:`Response` with ``value`` a dict: shape of the observable followed by the shape of each parameter. Of a
      symmetric matrix of species pairs, entries (a, b) and (b, a) are half each of the derivative by the one number
      that both are; ``component("sigma[0,1]")`` is the whole, of the observable's shape.
    """
    if _batched(at):
        assert isinstance(at, Equilibrium)
        whole = _over_members(lambda e, _: gradient(observable, e, solve=solve, throw=False), at)
        return _judged(whole, throw, "gradient")
    return value_and_gradient(observable, at, solve=solve, throw=throw)[1]


def value_and_gradient(
    observable: Callable[[System], Any],
    at: Equilibrium | Linearization,
    *,
    solve: Method | None = None,
    throw: bool = True,
) -> tuple[jax.Array, Response]:
    """What ``gradient`` gives of one minimum, with the observable's value before it."""
    of_system = observed(observable)
    lin = linearised(at, solve)
    system = lin.equilibrium.system

    def observe(x: Unknowns, params: Params) -> jax.Array:
        return of_system(lin.moved(system, x, params))

    value, pull = jax.vjp(observe, lin.unknowns, lin.params)
    rows = units(lin, value)
    require_sound(lin, at, throw)

    def pulled(pull: Any) -> tuple[Unknowns, Params]:
        cotangents, direct = jax.vmap(lambda w: pull(w))(rows)  # named: jax shows a vjp to name a bare one
        return dataclasses.replace(cotangents, multipliers=None), direct  # of an observable, zero

    def beside() -> Unknowns:
        return pulled(jax.vjp(observe, aside(lin).unknowns, lin.params)[1])[0]

    return value, total(lin, value, *pulled(pull), throw, beside)


def observed(observable: Any) -> Callable[[System], jax.Array]:
    """A user's observable as a function that returns an array, or an error that says what to give."""
    if not callable(observable):
        raise InputError(
            f"the observable is {short(observable)}: give a function of a System, such as ms.observables.pressure."
        )
    function = Traceable("the observable", observable)
    return lambda system: numbers(function(system))


def numbers(value: Any) -> jax.Array:
    """What an observable returns, as an array, or an error that says what to return."""
    try:
        array = jnp.asarray(value)
    except Exception as error:  # a dict, a text, rows of different lengths
        raise InputError(f"the observable returns {short(value)}: return a number or an array.") from error
    if value is None or not array.size:
        raise InputError(f"the observable returns {short(value)}: return a number or an array.")
    return array


def units(lin: Linearization, value: jax.Array) -> jax.Array:
    """The unit vectors of an observable's value, (count, *shape), where its gradients have room."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise InputError(f"the observable returns {value.dtype}: return floating-point numbers.")
    require_memory(
        float(value.size) * (value.size + lin.system.positions.size + sum(v.size for v in lin.params.values())),
        value.dtype.itemsize,
        f"gradient of {value.size:,} observables",
        "ask for fewer observables at once.",
    )
    return jnp.eye(value.size, dtype=value.dtype).reshape(value.size, *value.shape)


def total(
    lin: Linearization,
    value: jax.Array,
    cotangents: Unknowns,
    direct: Params,
    throw: bool,
    beside: Callable[[], Unknowns],
) -> Response:
    """The total derivative of an observable, by one adjoint solve for each of its numbers.

    Args:
      value: of the observable.
      cotangents: its derivatives by the unknowns, each with a leading axis over its numbers.
      direct: its partial derivatives by the parameters, likewise.
      beside: gives the cotangents a little beside the minimum, where these here are round-off.
    """
    count = value.size
    width = min(count, int(np.clip(CHUNK_BYTES // (value.dtype.itemsize * lin.system.positions.size * 8), 1, 256)))

    def rows(start: int, stop: int) -> Unknowns:
        more = stop - min(stop, count)
        if not start and not more:
            return cotangents
        return jax.tree.map(lambda w: jnp.pad(w[start:stop], [(0, more), *[(0, 0)] * (w.ndim - 1)]), cotangents)

    flat = _in_chunks(lambda w: through(VJP, lin, w, many=True), rows, count, width)
    value_of = {k: (flat.value[k] + direct[k]).reshape(*value.shape, *direct[k].shape[1:]) for k in direct}
    finite = [jnp.all(jnp.isfinite(t), axis=tuple(range(value.ndim, t.ndim))) for t in value_of.values()]
    stats = flat.stats
    if dropped_any(stats.status):
        here, there = (norms(w, many=True) for w in (cotangents, beside()))
        stats = without_round_off(stats, here, there, lin.system.positions.dtype)
    stats = jax.tree.map(lambda leaf: leaf.reshape(value.shape), stats)
    stats = finite_or_said(stats, jnp.all(jnp.stack(finite), axis=0))
    result = Response(value_of, stats, None, lin.equilibrium.max_force, lin.network.rattlers)
    result = _by(result, lin.system, lin.params)
    return _judged(result, throw, "gradient", lin.system)
