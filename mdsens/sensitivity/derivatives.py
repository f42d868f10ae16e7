"""How a minimum moves: jvp, vjp, jacobian, gradient and response at an Equilibrium."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mdsens._util.batching import apart, in_chunks, joined, together
from mdsens._util.errors import InputError, raise_for_status
from mdsens._util.memory import require_memory
from mdsens._util.user_functions import Traceable
from mdsens._util.validation import real_array, short
from mdsens.implicit.linear.operators import Auto, Method, check_method
from mdsens.mechanics import lagrangian
from mdsens.mechanics.hessian import Unknowns
from mdsens.mechanics.not_finite import where_not_finite
from mdsens.mechanics.status import Status
from mdsens.model.system import System, parameters_of
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity._derivative_solve import (
    FORCE,
    JVP,
    VJP,
    DerivativeRule,
    aside,
    dropped_any,
    norms,
    solve_derivative,
    solve_derivative_batch,
    status_of_finite,
    without_round_off,
)
from mdsens.sensitivity.linearization import (
    Linearization,
    by_factor,
    changes,
    linearize,
    linearized,
    require_sound,
)
from mdsens.sensitivity.results import Derivative, Displacement, ParameterGradient

__all__ = [
    "Linearization",
    "gradient",
    "jacobian",
    "jvp",
    "linearize",
    "response",
    "vjp",
]

Params = Mapping[str, Any]
D = TypeVar("D", bound=Derivative)
CHUNK_BYTES = 2**27  # of right-hand sides solved together


def _judged(result: D, throw: bool, what: str, system: System | None = None) -> D:
    if throw:
        codes = np.atleast_1d(np.asarray(result.stats.status)).ravel()
        status = Status.worst_of(codes)
        residual = float(np.max(np.asarray(result.stats.residual), initial=0.0))
        where = (
            ""
            if codes.size == 1
            else f" ({int((codes == status.value).sum())} of {codes.size} solves)"
        )
        where += "" if system is None else where_not_finite(status, system)
        raise_for_status(
            status,
            f"{what} by {result.stats.solver} ended at residual {residual:.1e}{where}",
            result,
        )
    return result


def _by(
    result: ParameterGradient, system: System, params: Params | None = None
) -> ParameterGradient:
    """A derivative by all parameters, which knows so."""
    own = lagrangian.own_params(system) if params is None else params
    return result if result.wrt else dataclasses.replace(result, wrt=parameters_of(system, own))


def _over_members(function: Callable[[Equilibrium, Any], D], eq: Equilibrium, given: Any = ()) -> D:
    """A door on each member of a batch and on what is given for it, over the cores."""

    def some(part: tuple[Equilibrium, Any], count: int) -> list[D]:
        return [function(*member) for member in apart(part, count)]

    parts = in_chunks(some, (eq, given), eq.system.batch or 0, eq.system.n)
    return together([response for part in parts for response in part])


def _solve_batch(
    rule: DerivativeRule,
    alone: Callable[[Equilibrium, Any], Any],
    eq: Equilibrium,
    given: Any,
    solve: Method | None,
) -> Any:
    """A door on each member of a batch, with what is given for each, (members, …); ``alone`` on one
    where need be.
    """
    method = Auto() if solve is None else solve
    check_method(method)

    def some(part: tuple[Equilibrium, Any], count: int) -> tuple[Any | None, int]:
        return solve_derivative_batch(rule, *part, method), count

    if by_factor(eq.system, method) and eq.pressure is None and not eq.system.constraints:
        parts, counts = zip(
            *in_chunks(some, (eq, given), eq.system.batch or 0, eq.system.n), strict=True
        )
        if None not in parts:
            return joined(parts, counts)
    return _over_members(alone, eq, given)


def _for_members(name: str, given: Any, shape: tuple[int, ...], count: int) -> Any:
    """What is given for a batch, (members, …): it has a member's own shape and is shared, or a
    leading axis.
    """
    array = real_array(name, given)
    return jnp.broadcast_to(array, (count, *shape)) if array.shape == shape else array


def _batched(eq: Any) -> bool:
    return isinstance(eq, Equilibrium) and eq.system.batch is not None


def jvp(
    eq: Equilibrium | Linearization,
    dparams: Params,
    *,
    solve: Method | None = None,
    throw: bool = True,
) -> Displacement:
    """How the minimum moves along one direction in parameter space, dR = - H^+ (d2U/dR dp) dp.

    Args:
      eq: from ``minimize`` (a batch is done member by member) or ``linearize``.
      dparams: changes by parameter name, each shaped like the parameter; the others do not change.
        That of a symmetric matrix of species pairs is symmetric: entries (a, b) and (b, a) are one
        number, and change together.
      solve: the linear solver; Auto() where None.
      throw: raise unless the status is good.

    Returns:
      a :class:`Displacement` with ``value`` (n, d); at a pressure, whose change ``dparams`` may name,
      an ``Unknowns`` of ``positions`` (n, d) and of ``strain``, the cell's as a Mandel vector (xx,
      yy, sqrt(2) xy in 2-D; xx, yy, zz and sqrt(2) times yz, xz, xy in 3-D). Where the box follows
      the parameters, ``value`` contains the images' motion with the box; ``nonaffine`` does not.

    Raises:
      InputError: bad names or shapes. ConvergenceError: an unconverged or unjammed minimum, a
      saddle, a solve that did not converge.
    """
    if isinstance(dparams, Mapping) and not dparams:
        raise InputError("dparams is empty: give at least one parameter's name and its change.")
    if _batched(eq):
        assert isinstance(eq, Equilibrium)
        own = lagrangian.own_params(eq.system)
        own = own if eq.pressure is None else {**own, "pressure": eq.pressure}
        if isinstance(dparams, Mapping):
            shapes = {name: value.shape[1:] for name, value in own.items()}
            dparams = {
                name: _for_members(
                    f"dparams[{name!r}]", change, shapes.get(name, ()), eq.system.batch or 0
                )
                for name, change in dparams.items()
            }
        given = changes(eq.system, dparams, own)

        def alone(member: Equilibrium, change: Params) -> Displacement:
            return jvp(member, change, solve=solve, throw=False)

        return _judged(_solve_batch(JVP, alone, eq, given, solve), throw, "jvp")
    lin = linearized(eq, solve)
    given = changes(lin.system, dparams, lin.params)
    require_sound(lin, eq, throw)
    return _judged(solve_derivative(JVP, lin, given), throw, "jvp", lin.system)


def _cotangent(system: System, value: Any, name: str) -> jax.Array:
    array = jnp.asarray(real_array(name, value), system.positions.dtype)
    if array.shape != system.positions.shape:
        raise InputError(
            f"{name} has shape {array.shape}: give {system.positions.shape}, one vector a particle."
        )
    if not isinstance(array, Tracer) and not np.isfinite(np.asarray(array)).all():
        raise InputError(f"{name} is not finite: give finite numbers.")
    return array


def _unfolded(lin: Linearization, cotangent: Any) -> Unknowns:
    """A cotangent of stored positions and strain, as ``jvp`` gives them, as one of positions at a
    strain and of it.
    """
    given = cotangent if isinstance(cotangent, Unknowns) else Unknowns(cotangent)
    w = _cotangent(lin.system, given.positions, "cotangent")
    return lin.structure.cotangent(lin, given, w)


def vjp(
    eq: Equilibrium | Linearization,
    cotangent: Any,
    *,
    solve: Method | None = None,
    throw: bool = True,
) -> ParameterGradient:
    """The adjoint: what a linear functional of the positions owes to every parameter, -(d2U/dR
    dp)^T H^+ w.

    One solve for all parameters. The part of ``cotangent`` in the null space has no answer; it is
    dropped, and ``stats.dropped`` and the status say so.

    Args:
      eq: as in ``jvp``.
      cotangent: w, (n, d); at a pressure also ``Unknowns(w, strain)``, strain a Mandel vector.
      solve, throw: as in ``jvp``.

    Returns:
      a :class:`ParameterGradient` with ``value`` a dict shaped like the parameters. Of a symmetric matrix of
      species pairs, entries (a, b) and (b, a) are half each of the derivative by the one number
      that both are; ``component("sigma[0,1]")`` is the whole.
    """
    if _batched(eq):
        assert isinstance(eq, Equilibrium)
        given = _for_members("cotangent", cotangent, eq.positions.shape[1:], eq.system.batch or 0)
        side = Unknowns(_cotangent(eq.system, given, "cotangent"))

        def alone(member: Equilibrium, w: Unknowns) -> ParameterGradient:
            return vjp(member, w, solve=solve, throw=False)

        return _judged(_by(_solve_batch(VJP, alone, eq, side, solve), eq.system), throw, "vjp")
    lin = linearized(eq, solve)
    given = _unfolded(lin, cotangent)
    require_sound(lin, eq, throw)
    return _judged(
        _by(solve_derivative(VJP, lin, given), lin.system, lin.params), throw, "vjp", lin.system
    )


def response(
    eq: Equilibrium | Linearization, force: Any, *, solve: Method | None = None, throw: bool = True
) -> Displacement:
    """The displacement under an external force on the particles, H^+ f, to first order.

    Args:
      eq: as in ``jvp``.
      force: f, (n, d), energy a length. Its net part on each cluster and its part on rattlers have
        no answer and are dropped, as in ``vjp``. The cell is held, at a pressure too.

    Returns:
      a :class:`Displacement` with ``value`` (n, d).
    """
    if _batched(eq):
        assert isinstance(eq, Equilibrium)
        given = _for_members("force", force, eq.positions.shape[1:], eq.system.batch or 0)
        side = Unknowns(_cotangent(eq.system, given, "force"))

        def alone(member: Equilibrium, f: Unknowns) -> Displacement:
            return response(member, f.positions, solve=solve, throw=False)

        return _judged(_solve_batch(FORCE, alone, eq, side, solve), throw, "response")
    lin = linearized(eq, solve)
    side = Unknowns(_cotangent(lin.system, force, "force"))
    require_sound(lin, eq, throw)
    return _judged(solve_derivative(FORCE, lin, side), throw, "response", lin.system)


def _in_chunks(
    run: Callable[[Any], D], rows: Callable[[int, int], Any], count: int, width: int
) -> D:
    """``run`` on ``count`` right-hand sides, ``width`` at a time; the last chunk is filled up, to
    compile once.

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
        "take ms.vjp or ms.gradient, whose cost does not grow with the number of parameters, or"
        " ms.jvp by direction.",
    )


def jacobian(
    eq: Equilibrium | Linearization,
    wrt: str = "sigma",
    *,
    solve: Method | None = None,
    chunk: int | None = None,
    throw: bool = True,
) -> Displacement:
    """The derivative of every coordinate by every component of one parameter.

    Args:
      eq: as in ``jvp``.
      wrt: the parameter's name.
      chunk: right-hand sides solved together; None for what fits in cache-sized memory.
      solve, throw: as in ``jvp``.

    Returns:
      a :class:`Displacement` with ``value`` and ``nonaffine`` (n, d, *shape of the parameter), and
      stats of that shape. Of a symmetric matrix of species pairs, ``value[..., a, b]`` and
      ``value[..., b, a]`` are half each of the derivative by the one number that both entries are;
      ``component("sigma[0,1]")`` is the whole, (n, d).

    Raises:
      TooLargeError: with the size, where the result would take more than half of the free memory.
        Take ``vjp`` then: its cost does not grow with the number of parameters.
    """
    if _batched(eq):
        assert isinstance(eq, Equilibrium)
        if isinstance(wrt, str) and wrt in eq.params:
            _require_room(eq.system, wrt, eq.params[wrt].size // (eq.system.batch or 1))
        whole = _over_members(
            lambda e, _: jacobian(e, wrt, solve=solve, chunk=chunk, throw=False), eq
        )
        return _judged(whole, throw, "jacobian")
    lin = linearized(eq, solve)
    system = lin.system
    if not isinstance(wrt, str):
        raise InputError(
            f"wrt is {short(wrt)}: give a parameter's name, one of {', '.join(lin.params)}."
        )
    if chunk is not None and not (isinstance(chunk, int) and chunk >= 1):
        raise InputError(f"chunk is {short(chunk)}: give a whole number of at least 1, or None.")
    changes(system, {wrt: lin.params.get(wrt, 0.0)}, lin.params)  # the name's check
    shape, dtype = lin.params[wrt].shape, system.positions.dtype
    size, unknowns = int(np.prod(shape)), system.positions.size
    _require_room(system, wrt, lin.params[wrt].size)
    require_sound(lin, eq, throw)
    width = chunk or int(np.clip(CHUNK_BYTES // (dtype.itemsize * unknowns * 8), 1, 256))
    width = min(width, max(size, 1))

    def directions(start: int, stop: int) -> dict[str, jax.Array]:
        unit = np.zeros((stop - start, size))
        inside = np.arange(start, min(stop, size))
        unit[inside - start, inside] = 1.0
        return {wrt: jnp.asarray(unit.reshape(stop - start, *shape), dtype)}

    flat = _in_chunks(lambda t: solve_derivative(JVP, lin, t, many=True), directions, size, width)

    def shaped(leaf: jax.Array) -> jax.Array:
        return jnp.moveaxis(leaf, 0, -1).reshape(*leaf.shape[1:], *shape)

    result = Displacement(
        value=jax.tree.map(shaped, flat.value),
        stats=jax.tree.map(shaped, flat.stats),
        nonaffine=shaped(flat.nonaffine),
        max_force=lin.equilibrium.max_force,
        rattlers=lin.network.rattlers,
        wrt=parameters_of(system, {wrt: lin.params[wrt]}),
    )
    return _judged(result, throw, f"jacobian by {wrt}", system)


def gradient(
    observable: Callable[[System], Any],
    eq: Equilibrium | Linearization,
    *,
    solve: Method | None = None,
    throw: bool = True,
) -> ParameterGradient:
    """The total derivative of an observable by all parameters, dO/dp = @O/@p + (@O/@R) dR/dp, by
    one adjoint solve.

    Args:
      observable: a function of a System, traceable, returning a scalar or an array; see
        :mod:`mdsens.observables`.
      eq: as in ``jvp``.
      solve, throw: as in ``jvp``.

    Returns:
      a :class:`ParameterGradient` with ``value`` a dict: shape of the observable followed by the shape of
      each parameter. Of a symmetric matrix of species pairs, entries (a, b) and (b, a) are half
      each of the derivative by the one number that both are; ``component("sigma[0,1]")`` is the
      whole, of the observable's shape.
    """
    if _batched(eq):
        assert isinstance(eq, Equilibrium)
        whole = _over_members(lambda e, _: gradient(observable, e, solve=solve, throw=False), eq)
        return _judged(whole, throw, "gradient")
    return value_and_gradient(observable, eq, solve=solve, throw=throw)[1]


def value_and_gradient(
    observable: Callable[[System], Any],
    eq: Equilibrium | Linearization,
    *,
    solve: Method | None = None,
    throw: bool = True,
) -> tuple[jax.Array, ParameterGradient]:
    """What ``gradient`` gives of one minimum, with the observable's value before it."""
    of_system = observed(observable)
    lin = linearized(eq, solve)
    system = lin.equilibrium.system

    def observe(x: Unknowns, params: Params) -> jax.Array:
        return of_system(lin.moved(system, x, params))

    value, pull = jax.vjp(observe, lin.unknowns, lin.params)
    rows = unit_cotangents(lin, value)
    require_sound(lin, eq, throw)

    def pulled(pull: Any) -> tuple[Unknowns, Params]:
        cotangents, direct = jax.vmap(lambda w: pull(w))(
            rows
        )  # named: jax shows a vjp to name a bare one
        return dataclasses.replace(cotangents, multipliers=None), direct  # of an observable, zero

    def beside() -> Unknowns:
        return pulled(jax.vjp(observe, aside(lin).unknowns, lin.params)[1])[0]

    return value, total_derivative(lin, value, *pulled(pull), throw, beside)


def observed(observable: Any) -> Callable[[System], jax.Array]:
    """A user's observable as a function that returns an array, or an error that says what to give."""
    if not callable(observable):
        raise InputError(
            f"the observable is {short(observable)}: give a function of a System, such as"
            " ms.observables.pressure."
        )
    function = Traceable("the observable", observable)
    return lambda system: numbers(function(system))


def numbers(value: Any) -> jax.Array:
    """What an observable returns, as an array, or an error that says what to return."""
    try:
        array = jnp.asarray(value)
    except Exception as error:  # a dict, a text, rows of different lengths
        raise InputError(
            f"the observable returns {short(value)}: return a number or an array."
        ) from error
    if value is None or not array.size:
        raise InputError(f"the observable returns {short(value)}: return a number or an array.")
    return array


def unit_cotangents(lin: Linearization, value: jax.Array) -> jax.Array:
    """The unit vectors of an observable's value, (count, *shape), where its gradients have room."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise InputError(f"the observable returns {value.dtype}: return floating-point numbers.")
    require_memory(
        float(value.size)
        * (value.size + lin.system.positions.size + sum(v.size for v in lin.params.values())),
        value.dtype.itemsize,
        f"gradient of {value.size:,} observables",
        "ask for fewer observables at once.",
    )
    return jnp.eye(value.size, dtype=value.dtype).reshape(value.size, *value.shape)


def total_derivative(
    lin: Linearization,
    value: jax.Array,
    cotangents: Unknowns,
    direct: Params,
    throw: bool,
    beside: Callable[[], Unknowns],
) -> ParameterGradient:
    """The total derivative of an observable, by one adjoint solve for each of its numbers.

    Args:
      value: of the observable.
      cotangents: its derivatives by the unknowns, each with a leading axis over its numbers.
      direct: its partial derivatives by the parameters, likewise.
      beside: gives the cotangents a little beside the minimum, where these here are round-off.
    """
    count = value.size
    width = min(
        count,
        int(np.clip(CHUNK_BYTES // (value.dtype.itemsize * lin.system.positions.size * 8), 1, 256)),
    )

    def rows(start: int, stop: int) -> Unknowns:
        more = stop - min(stop, count)
        if not start and not more:
            return cotangents
        return jax.tree.map(
            lambda w: jnp.pad(w[start:stop], [(0, more), *[(0, 0)] * (w.ndim - 1)]), cotangents
        )

    flat = _in_chunks(lambda w: solve_derivative(VJP, lin, w, many=True), rows, count, width)
    value_of = {
        k: (flat.value[k] + direct[k]).reshape(*value.shape, *direct[k].shape[1:]) for k in direct
    }
    finite = [
        jnp.all(jnp.isfinite(t), axis=tuple(range(value.ndim, t.ndim))) for t in value_of.values()
    ]
    stats = flat.stats
    if dropped_any(stats.status):
        here, there = (norms(w, many=True) for w in (cotangents, beside()))
        stats = without_round_off(stats, here, there, lin.system.positions.dtype)
    stats = jax.tree.map(lambda leaf: leaf.reshape(value.shape), stats)
    stats = status_of_finite(stats, jnp.all(jnp.stack(finite), axis=0))
    result = ParameterGradient(
        value=value_of,
        stats=stats,
        max_force=lin.equilibrium.max_force,
        rattlers=lin.network.rattlers,
        wrt=parameters_of(lin.system, lin.params),
    )
    return _judged(result, throw, "gradient", lin.system)
