"""Derivatives of a relaxed configuration and of its observables by the model's parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from mdsens._util.batching import concatenate_trees, in_chunks, stack_trees, unstack_tree
from mdsens._util.compilation import as_jax, compiled
from mdsens._util.errors import InputError, raise_for_status
from mdsens._util.memory import require_memory
from mdsens._util.pytree import PyTree, count_numbers, is_leaf, matching, split_last_axis
from mdsens._util.user_functions import Traceable
from mdsens._util.validation import is_integer, real_array, short
from mdsens.implicit.linear import Auto, Method, check_method
from mdsens.implicit.linear.result import SolveStats, dropped_any
from mdsens.mechanics import lagrangian
from mdsens.mechanics.load import differentiated
from mdsens.mechanics.not_finite import where_not_finite
from mdsens.mechanics.status import Status
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.system import System
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity.derivative_solve import (
    FORCE,
    JVP,
    VJP,
    DerivativeRule,
    norms,
    solve_derivative,
    solve_derivative_batch,
    status_of_finite,
    unknowns_aside,
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
# Memory in bytes, 128 MiB, for the work arrays of right-hand sides that are solved together. Of
# each right-hand side 8 vectors are counted.
CHUNK_BYTES = 2**27
# Largest number of right-hand sides that are solved together.
MAX_CHUNK = 256


def _chunk_width(itemsize: int, unknowns: int) -> int:
    """Return how many right-hand sides are solved together, within a bound on memory.

    Args:
      itemsize: bytes of one number.
      unknowns: number of coordinates, n d.
    """
    return int(np.clip(CHUNK_BYTES // (itemsize * unknowns * 8), 1, MAX_CHUNK))


def _raise_unless_good(result: D, throw: bool, what: str, system: System | None = None) -> D:
    """Return a derivative, or raise ConvergenceError if its worst status is not good.

    Args:
      result: the derivative.
      throw: whether to raise.
      what: the kind of derivative, for the message.
      system: the system, for naming particles in the message where a derivative is not finite.
    """
    if throw:
        codes = np.atleast_1d(np.asarray(result.stats.status)).ravel()
        status = Status.worst_of(codes)
        residual = float(np.max(np.asarray(result.stats.residual), initial=0.0))
        where = ""
        if codes.size != 1:
            where = f" ({int((codes == status.value).sum())} of {codes.size} solves)"
        if system is not None:
            where += where_not_finite(status, system)
        raise_for_status(
            status,
            f"{what} by {result.stats.solver} ended at residual {residual:.1e}{where}",
            result,
        )
    return result


def _with_parameters(
    result: ParameterGradient, system: System, params: Params | None = None
) -> ParameterGradient:
    """Record in a gradient by which parameters it is taken, in the field ``wrt``.

    Args:
      result: the gradient; returned as it is if the field is filled already.
      system: the system.
      params: the parameters by name; those of the system where None.
    """
    if result.wrt:
        return result
    by = lagrangian.own_params(system) if params is None else params
    return dataclasses.replace(result, wrt=differentiated(system, by))


def _over_members(
    function: Callable[[Equilibrium, Any], D], eq: Equilibrium, argument: PyTree = ()
) -> D:
    """Compute a derivative for each system of a batch by itself, on all cores.

    Args:
      function: function of one minimum and of its part of ``argument`` that returns the derivative.
      eq: the minima of the batch.
      argument: arrays whose leading axis is over the systems.
    """

    def for_part(part: tuple[Equilibrium, Any], count: int) -> list[D]:
        return [function(*member) for member in unstack_tree(part, count)]

    parts = in_chunks(for_part, (eq, argument), eq.system.batch or 0, eq.system.n)
    return stack_trees([derivative for part in parts for derivative in part])


def _solve_batch(
    rule: DerivativeRule,
    for_member: Callable[[Equilibrium, Any], Any],
    eq: Equilibrium,
    argument: PyTree,
    solve: Method | None,
) -> Any:
    """Compute the derivative of each system of a batch, several systems at a time if possible.

    Where possible, the block-diagonal matrix of the Hessians of several systems is factorized at
    once.

    Args:
      rule: the kind of derivative.
      for_member: function that computes the derivative of one system, for use where systems cannot
        be factorized together.
      eq: the minima of the batch.
      argument: what the derivative is linear in (a change of the parameters, a cotangent or a
        force), for each system, along a leading axis.
      solve: the linear solver; Auto() where None.
    """
    method = Auto() if solve is None else solve
    check_method(method)

    def for_part(part: tuple[Equilibrium, Any], count: int) -> tuple[Any | None, int]:
        return solve_derivative_batch(rule, *part, method), count

    # in relaxed cells and under constraints each member has further unknowns, and its own factor
    if by_factor(eq.system, method) and eq.load is None and not eq.system.constraints:
        parts, counts = zip(
            *in_chunks(for_part, (eq, argument), eq.system.batch or 0, eq.system.n), strict=True
        )
        # None: a part without a factor
        if None not in parts:
            return concatenate_trees(parts, counts)
    return _over_members(for_member, eq, argument)


def _for_members(name: str, value: object, shape: tuple[int, ...], count: int) -> jax.Array:
    """Give a user's argument a leading axis over the systems of a batch, if it has none.

    Args:
      name: name of the argument, for messages.
      value: the argument, either shaped for one system and shared by all, or with a leading axis
        over the systems.
      shape: shape of the argument for one system.
      count: number of systems.
    """
    array = real_array(name, value)
    return jnp.broadcast_to(array, (count, *shape)) if array.shape == shape else array


def _batched(eq: object) -> bool:
    return isinstance(eq, Equilibrium) and eq.system.batch is not None


def jvp(
    eq: Equilibrium | Linearization,
    dparams: Params,
    *,
    solve: Method | None = None,
    throw: bool = True,
) -> Displacement:
    """Differentiate the relaxed positions along a direction in parameter space.

    The derivative is dR = - H^+ (d2U/dR dp) dp, with the energy U, the positions R, the parameters
    p, and the pseudo-inverse H^+ of the Hessian H = d2U/dR2.

    Args:
      eq: a minimum, from ``minimize`` (for a batch, the derivative of each system is computed) or
        ``linearize``.
      dparams: the direction: changes dp by parameter name, each shaped like the parameter (that of
        a tree of arrays is a tree of the same structure); parameters that are not named do not
        change. In a relaxed cell ``dparams`` may contain ``"pressure"``; or ``"stress"``; or
        ``"volume"`` and ``"deviator"``, whose trace does not count. The change of a symmetric
        matrix (of species pairs, or a stress) is symmetric: entries (a, b) and (b, a) are one
        number, and change together.
      solve: the linear solver; Auto() where None.
      throw: whether to raise an error unless the status is good.

    Returns:
      a :class:`Displacement` with ``value`` (n, d). In a relaxed cell ``value`` is an ``Unknowns``
      with ``positions`` (n, d) and ``strain``, the strain of the cell as a Mandel vector (xx, yy,
      sqrt(2) xy in 2-D; xx, yy, zz and sqrt(2) times yz, xz, xy in 3-D). Where the box follows the
      parameters, ``value`` contains the motion of the periodic images with the box; the attribute
      ``nonaffine`` is the derivative without this motion.

    Raises:
      InputError: a name is no parameter's, or a shape is wrong.
      ConvergenceError: the minimum is unconverged, unjammed or a saddle, or the solve did not
        converge.

    Example:
      >>> import mdsens as ms
      >>> ms.enable_x64()
      >>> eq = ms.minimize(ms.load_system("dimer"))
      >>> r = ms.jvp(eq, {"sigma": 1.0})
      >>> apart = r.value[0] - r.value[1]
      >>> print(f"{float((apart**2).sum()) ** 0.5:.6f}")  # 2^(1/6)
      1.122462
    """
    if isinstance(dparams, Mapping) and not dparams:
        raise InputError("dparams is empty: give at least one parameter's name and its change.")
    if _batched(eq):
        assert isinstance(eq, Equilibrium)
        tangent = _changes_of_members(eq, dparams)

        def for_member(member: Equilibrium, change: Params) -> Displacement:
            return jvp(member, change, solve=solve, throw=False)

        result = _solve_batch(JVP, for_member, eq, tangent, solve)
        return _raise_unless_good(result, throw, "jvp")
    # the arguments are checked before the minimum is: see ``require_sound``
    lin = linearized(eq, solve)
    tangent = changes(lin.system, dparams, lin.params)
    require_sound(lin, eq, throw)
    return _raise_unless_good(solve_derivative(JVP, lin, tangent), throw, "jvp", lin.system)


def _changes_of_members(eq: Equilibrium, dparams: Params) -> dict[str, Any]:
    """Check the changes of the parameters that ``jvp`` gets for a batch of minima.

    Returns:
      the changes, each with a leading axis over the members of the batch, which the user's own may
      lack.
    """
    params = lagrangian.own_params(eq.system)
    if eq.load is not None:
        params = {**params, **eq.load.params}

    def of_members(name: str, change: Any, value: jax.Array) -> jax.Array:
        shape = value.shape[1:]  # of one member
        return _for_members(f"dparams[{name!r}]", change, shape, eq.system.batch or 0)

    if isinstance(dparams, Mapping):
        # A name that is no parameter's is refused by ``changes``.
        known = {name: change for name, change in dparams.items() if name in params}
        dparams = {
            **dparams,
            **{
                name: matching(of_members, change, params[name], name, "dparams")
                for name, change in known.items()
            },
        }
    return changes(eq.system, dparams, params)


def _vectors_of_particles(system: System, value: ArrayLike, name: str) -> jax.Array:
    """Check a user's cotangent or force, which has one vector for each particle.

    Args:
      system: the system, or a batch of systems.
      value: the vectors, (n, d).
      name: name of the argument, for messages.
    """
    array = jnp.asarray(real_array(name, value), system.positions.dtype)
    if array.shape != system.positions.shape:
        raise InputError(
            f"{name} has shape {array.shape}: give {system.positions.shape}, one vector for each"
            " particle."
        )
    if not isinstance(array, Tracer) and not np.isfinite(np.asarray(array)).all():
        raise InputError(f"{name} is not finite: give finite numbers.")
    return array


def _cotangent_of_unknowns(lin: Linearization, cotangent: Any) -> Unknowns:
    """Check the weights of the sum of relaxed positions that ``vjp`` differentiates.

    Args:
      lin: the linearization of the minimum.
      cotangent: the weights that the user gave: (n, d) for the positions; or ``Unknowns`` of these
        and of weights for the strain of the cell, or for multipliers and relaxed parameters.

    Returns:
      the weights of the unknowns of the linear solve, for the same sum. In a relaxed cell they
      differ from the user's, since the positions move with the cell.
    """
    value = cotangent if isinstance(cotangent, Unknowns) else Unknowns(cotangent)
    w = _vectors_of_particles(lin.system, value.positions, "cotangent")
    return lin.structure.cotangent(lin, value, w)


def vjp(
    eq: Equilibrium | Linearization,
    cotangent: ArrayLike | Unknowns,
    *,
    solve: Method | None = None,
    throw: bool = True,
) -> ParameterGradient:
    """Differentiate w . R by all parameters, for relaxed positions R and constant weights w.

    The derivative is -(d2U/dR dp)^T H^+ w, with the energy U, the parameters p, and the
    pseudo-inverse H^+ of the Hessian. This is the adjoint (transpose) of ``jvp``, and takes one
    linear solve for all parameters. The linear system has no solution for the part of w in the null
    space of the Hessian (translations, rattlers); that part is dropped, which ``stats.dropped`` and
    the status of the result report.

    Args:
      eq: the minimum, as in ``jvp``.
      cotangent: the weights w of the positions, (n, d); in a relaxed cell also ``Unknowns(w,
        strain)``, where ``strain`` holds weights of the cell's strain, as a Mandel vector.
      solve, throw: the linear solver, and whether to raise an error, as in ``jvp``.

    Returns:
      a :class:`ParameterGradient` with ``value`` a dict shaped like the parameters. In a symmetric
      matrix of species pairs, entries (a, b) and (b, a) are one physical number, and each has half
      of the derivative by that number; the result's method ``component("sigma[0,1]")`` gives the
      whole derivative.

    Example:
      >>> import mdsens as ms
      >>> ms.enable_x64()
      >>> eq = ms.minimize(ms.load_system("dimer"))
      >>> apart = eq.positions[1] - eq.positions[0]
      >>> bond = ms.vjp(eq, [-apart, apart])  # weights: half of the squared distance r^2 = 2^(1/3)
      >>> print(f"{float(bond.value['sigma']):.6f}")  # r dr/dsigma = 2^(1/3)
      1.259921
    """
    if _batched(eq):
        assert isinstance(eq, Equilibrium)
        w = _for_members("cotangent", cotangent, eq.positions.shape[1:], eq.system.batch or 0)
        cotangents = Unknowns(_vectors_of_particles(eq.system, w, "cotangent"))

        def for_member(member: Equilibrium, w: Unknowns) -> ParameterGradient:
            return vjp(member, w, solve=solve, throw=False)

        result = _solve_batch(VJP, for_member, eq, cotangents, solve)
        return _raise_unless_good(_with_parameters(result, eq.system), throw, "vjp")
    lin = linearized(eq, solve)
    checked = _cotangent_of_unknowns(lin, cotangent)
    require_sound(lin, eq, throw)
    result = _with_parameters(solve_derivative(VJP, lin, checked), lin.system, lin.params)
    return _raise_unless_good(result, throw, "vjp", lin.system)


def response(
    eq: Equilibrium | Linearization,
    force: ArrayLike,
    *,
    solve: Method | None = None,
    throw: bool = True,
) -> Displacement:
    """Compute the displacement H^+ f under external forces f on the particles, to first order.

    H^+ is the pseudo-inverse of the Hessian H.

    Args:
      eq: the minimum, as in ``jvp``.
      force: the force f on each particle, (n, d), in energy/length. Nothing balances the net force
        on a cluster, or the force on rattlers; these parts are dropped, which ``stats.dropped`` and
        the status of the result report. The cell stays fixed, even if it was relaxed.
      solve, throw: the linear solver, and whether to raise an error, as in ``jvp``.

    Returns:
      a :class:`Displacement` with ``value`` (n, d).

    Example:
      >>> import mdsens as ms
      >>> ms.enable_x64()
      >>> eq = ms.minimize(ms.load_system("dimer"))
      >>> apart = eq.positions[1] - eq.positions[0]
      >>> unit = apart / float((apart**2).sum()) ** 0.5
      >>> pulled = ms.response(eq, [-unit, unit])  # pulls the particles apart with a force of 1
      >>> longer = float(((pulled.value[1] - pulled.value[0]) * unit).sum())
      >>> print(f"{1 / longer:.3f}")  # the stiffness of the bond, 72 / 2^(1/3) epsilon / sigma^2
      57.146
    """
    if _batched(eq):
        assert isinstance(eq, Equilibrium)
        f = _for_members("force", force, eq.positions.shape[1:], eq.system.batch or 0)
        forces = Unknowns(_vectors_of_particles(eq.system, f, "force"))

        def for_member(member: Equilibrium, f: Unknowns) -> Displacement:
            return response(member, f.positions, solve=solve, throw=False)

        result = _solve_batch(FORCE, for_member, eq, forces, solve)
        return _raise_unless_good(result, throw, "response")
    lin = linearized(eq, solve)
    forces = Unknowns(_vectors_of_particles(lin.system, force, "force"))
    require_sound(lin, eq, throw)
    return _raise_unless_good(solve_derivative(FORCE, lin, forces), throw, "response", lin.system)


def _in_chunks(
    run: Callable[[Any], D], rows: Callable[[int, int], Any], count: int, width: int
) -> D:
    """Solve linear systems for ``count`` right-hand sides, ``width`` of them at a time.

    The last chunk is filled up to ``width``, so that the code compiles once. If ``count`` is 0, one
    chunk is solved and its results are dropped, since the solve gives the shapes of the empty
    result.

    Args:
      run: function that solves for the right-hand sides of one chunk.
      rows: function that returns the right-hand sides from ``start`` to ``stop``, its two
        arguments.
      count: number of right-hand sides.
      width: number of right-hand sides in a chunk.
    """
    # the usual case, without padding or concatenation
    if count == width:
        return run(rows(0, width))
    parts = []
    for start in range(0, max(count, 1), width):
        part = run(rows(start, start + width))
        keep = min(width, count - start)
        parts.append(jax.tree.map(lambda leaf, keep=keep: leaf[:keep], part))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _require_memory_of_jacobian(system: System, wrt: str, components: int) -> None:
    """Raise an error where the Jacobian of a system or a batch does not fit in memory.

    A Jacobian has two arrays of derivatives, ``value`` and ``nonaffine``.

    Args:
      system: the system, or the batch.
      wrt: the parameter by which the positions are differentiated.
      components: the number of components of the parameter in one system.
    """
    of_batch = f" of {system.batch:,} systems" if system.batch else ""
    require_memory(
        2.0 * components * system.positions.size,
        system.positions.dtype.itemsize,
        f"jacobian by {components:,} components of {wrt}{of_batch}, with its non-affine part,",
        "take ms.vjp or ms.gradient, whose cost does not grow with the number of parameters, or"
        " ms.jvp, one direction at a time.",
    )


def jacobian(
    eq: Equilibrium | Linearization,
    wrt: str = "sigma",
    *,
    solve: Method | None = None,
    chunk: int | None = None,
    throw: bool = True,
) -> Displacement:
    """Compute the derivative of every coordinate by every component of one parameter.

    Args:
      eq: the minimum, as in ``jvp``.
      wrt: the parameter's name. The parameter may be a tree of arrays, such as a network's weights.
      chunk: number of right-hand sides solved together; None for up to 256 of them, within 128 MiB.
      solve, throw: the linear solver, and whether to raise an error, as in ``jvp``.

    Returns:
      a :class:`Displacement` with ``value`` and ``nonaffine`` (n, d, *shape of the parameter), and
      stats of the parameter's shape. In a symmetric matrix of species pairs, the two entries of a
      pair are one physical number, and ``value[..., a, b]`` and ``value[..., b, a]`` are each half
      of the derivative by that number; the result's method ``component("sigma[0,1]")`` gives the
      whole derivative, (n, d). By a tree of arrays, ``value`` and ``nonaffine`` (in a relaxed cell
      the fields of ``value``) are trees of its structure, with an array (n, d, *shape of the leaf)
      for each leaf, and the stats are arrays (m,) over all m numbers of the tree, in the order of
      its leaves; ``component("weights.layers.0.w[3,2]")`` gives the derivative by one of them.

    Raises:
      TooLargeError: the result would take more than half of the free memory; the message gives the
        size. Take ``vjp`` then, whose cost does not grow with the number of parameters.

    Example:
      >>> import mdsens as ms
      >>> ms.enable_x64()
      >>> eq = ms.minimize(ms.load_system("seed_packing_2d", seed=0))
      >>> ms.jacobian(eq, wrt="sigma").value.shape  # particles, axes, diameters of the two species
      (128, 2, 2)
    """
    if _batched(eq):
        assert isinstance(eq, Equilibrium)
        if isinstance(wrt, str) and wrt in eq.params:
            _require_memory_of_jacobian(
                eq.system, wrt, count_numbers(eq.params[wrt]) // (eq.system.batch or 1)
            )
        result = _over_members(
            lambda member, _: jacobian(member, wrt, solve=solve, chunk=chunk, throw=False), eq
        )
        return _raise_unless_good(result, throw, "jacobian")
    lin = linearized(eq, solve)
    system = lin.system
    _check_arguments_of_jacobian(lin, wrt, chunk)
    parameter = lin.params[wrt]
    size = count_numbers(parameter)
    dtype = system.positions.dtype
    _require_memory_of_jacobian(system, wrt, size)
    require_sound(lin, eq, throw)
    width = chunk or _chunk_width(dtype.itemsize, system.positions.size)
    # a parameter of size zero still has one chunk, see ``_in_chunks``
    width = min(width, max(size, 1))

    def directions(start: int, stop: int) -> dict[str, Any]:
        """Return unit changes of one parameter, for its components ``start`` to ``stop`` - 1.

        There is one change for each component, which is one in this component and zero elsewhere.
        Beyond the last component of the parameter the changes are zero.
        """
        unit = np.zeros((stop - start, size))
        inside = np.arange(start, min(stop, size))
        unit[inside - start, inside] = 1.0
        return {wrt: split_last_axis(jnp.asarray(unit, dtype), parameter)}

    flat = _in_chunks(lambda t: solve_derivative(JVP, lin, t, many=True), directions, size, width)

    def shaped(leaf: jax.Array) -> Any:
        """Move the leading axis of an array to the end, and give it the shape of the parameter.

        The leading axis is over the components of the parameter; for a tree the result is a tree.
        """
        return split_last_axis(jnp.moveaxis(leaf, 0, -1), parameter)

    result = Displacement(
        value=jax.tree.map(shaped, flat.value),
        stats=jax.tree.map(shaped, flat.stats) if is_leaf(parameter) else flat.stats,
        nonaffine=shaped(flat.nonaffine),
        max_force=lin.equilibrium.max_force,
        rattlers=lin.network.rattlers,
        wrt=differentiated(system, {wrt: parameter}),
    )
    return _raise_unless_good(result, throw, f"jacobian by {wrt}", system)


def _check_arguments_of_jacobian(lin: Linearization, wrt: str, chunk: int | None) -> None:
    """Raise InputError unless ``wrt`` is a parameter's name and ``chunk`` a count or None."""
    if not isinstance(wrt, str):
        raise InputError(
            f"wrt is {short(wrt)}: give a parameter's name, one of {', '.join(lin.params)}."
        )
    if chunk is not None and not (is_integer(chunk) and chunk >= 1):
        raise InputError(f"chunk is {short(chunk)}: give a whole number of at least 1, or None.")
    changes(lin.system, {wrt: lin.params.get(wrt, 0.0)}, lin.params)  # checks the name
    if not jax.tree.leaves(lin.params[wrt]):
        raise InputError(f"{wrt} is a tree without arrays: differentiate by another parameter.")


def gradient(
    observable: Callable[[System], Any],
    eq: Equilibrium | Linearization,
    *,
    solve: Method | None = None,
    throw: bool = True,
) -> ParameterGradient:
    """Compute the total derivative of an observable O by all parameters p of the system.

    The derivative is dO/dp = @O/@p + (@O/@R) dR/dp, with @ for partial derivatives and the relaxed
    positions R. This takes one linear solve (of the adjoint equation) for each number of the
    observable, for all parameters.

    Args:
      observable: a function of a System that jax can trace, which returns a scalar or an array; see
        :mod:`mdsens.observables`.
      eq: the minimum, as in ``jvp``.
      solve, throw: the linear solver, and whether to raise an error, as in ``jvp``.

    Returns:
      a :class:`ParameterGradient` with ``value`` a dict: for each parameter an array with the shape
      of the observable followed by the shape of the parameter, for a tree of arrays a tree of the
      same structure. In a symmetric matrix of species
      pairs, entries (a, b) and (b, a) are one physical number, and each has half of the derivative
      by that number; the result's method ``component("sigma[0,1]")`` gives the whole derivative, of
      the observable's shape.

    Example:
      >>> import mdsens as ms
      >>> ms.enable_x64()
      >>> eq = ms.minimize(ms.load_system("dimer"))
      >>> depth = ms.gradient(ms.observables.energy, eq)  # the energy at rest is -epsilon
      >>> print(f"{float(depth.value['epsilon']):.6f}")
      -1.000000
    """
    if _batched(eq):
        assert isinstance(eq, Equilibrium)
        result = _over_members(
            lambda member, _: gradient(observable, member, solve=solve, throw=False), eq
        )
        return _raise_unless_good(result, throw, "gradient")
    return value_and_gradient(observable, eq, solve=solve, throw=throw)[1]


def value_and_gradient(
    observable: Callable[[System], Any],
    eq: Equilibrium | Linearization,
    *,
    solve: Method | None = None,
    throw: bool = True,
) -> tuple[jax.Array, ParameterGradient]:
    """Compute the value of an observable at one minimum, and its derivative by all parameters.

    The arguments and the derivative are those of ``gradient``.
    """
    observed(observable)  # checks it
    lin = linearized(eq, solve)
    # The observable sees all contacts; the backbone ``lin.system`` is without those of rattlers.
    whole = lin.equilibrium.system
    partials = _partial_derivatives
    core = lin
    if _is_of_mdsens(observable):
        partials = _compiled_partial_derivatives
        core = lin.traced(tuple(lin.system.params))

    def beside() -> Unknowns:
        return partials(core, whole, observable, unknowns_aside(lin.traced(())))[1]

    value, cotangents, direct = partials(core, whole, observable, lin.unknowns)
    require_sound(lin, eq, throw)
    return value, total_derivative(lin, value, cotangents, direct, throw, beside)


def _partial_derivatives(
    lin: Linearization,
    system: System,
    observable: Callable[[System], Any],
    unknowns: Unknowns,
) -> tuple[jax.Array, Unknowns, Params]:
    """Compute an observable, and differentiate each of its numbers by unknowns and parameters.

    Args:
      lin: the linearization of the minimum.
      system: the minimum with all its contacts.
      observable: function of a System.
      unknowns: the positions and other unknowns at which it is differentiated.

    Returns:
      (value, derivatives by the unknowns, derivatives by the parameters at constant unknowns); the
      derivatives have a leading axis over the numbers of the observable.
    """
    of_system = observed(observable)

    def observe(x: Unknowns, params: Params) -> jax.Array:
        return of_system(lin.moved(system, x, params))

    value, pull = jax.vjp(observe, unknowns, lin.params)
    rows = unit_cotangents(lin, value)
    # vmap of a bare ``pull`` would have jax print the whole vjp to name it
    cotangents, direct = jax.vmap(lambda w: pull(w))(rows)
    # an observable does not depend on the multipliers
    return value, dataclasses.replace(cotangents, multipliers=None), direct


_compiled_partial_derivatives = compiled(_partial_derivatives, static_argnames="observable")


def _is_of_mdsens(observable: Callable[[System], Any]) -> bool:
    """Return whether an observable is a function of mdsens, which depends on its argument alone.

    It can be compiled once, together with its derivatives. A function of the user may depend on
    variables that change between two calls.
    """
    return (
        isinstance(observable, FunctionType)
        and (observable.__module__ or "").startswith("mdsens.")
        and "<locals>" not in observable.__qualname__
    )


def observed(observable: Callable[[System], ArrayLike]) -> Callable[[System], jax.Array]:
    """Check a user's observable, and return it as a function of a System that returns an array."""
    if not callable(observable):
        raise InputError(
            f"the observable is {short(observable)}: give a function of a System, such as"
            " ms.observables.pressure."
        )
    function = Traceable("the observable", observable)
    return lambda system: numbers(function(system))


def numbers(value: object) -> jax.Array:
    """Check the value that a user's observable returns, and convert it to an array."""
    try:
        # an array of jax as it is: jax would compile its conversion
        array = value if isinstance(value, jax.Array) else jnp.asarray(value)
    except Exception as error:  # a dict, a text, rows of different lengths
        raise InputError(
            f"the observable returns {short(value)}: return a number or an array."
        ) from error
    if value is None or not array.size:
        raise InputError(f"the observable returns {short(value)}: return a number or an array.")
    return array


def unit_cotangents(lin: Linearization, value: jax.Array) -> jax.Array:
    """Return a unit vector for each of an observable's N numbers, (N, *shape of the observable).

    Each unit vector selects one number for differentiation. An error is raised where the
    observable is not of floating-point numbers, or its gradients do not fit in memory.

    Args:
      lin: the linearization of the minimum.
      value: value of the observable, or its shape and type.
    """
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise InputError(f"the observable returns {value.dtype}: return floating-point numbers.")
    require_memory(
        float(value.size) * (value.size + lin.system.positions.size + count_numbers(lin.params)),
        value.dtype.itemsize,
        f"gradient of {value.size:,} observables",
        "ask for fewer observables at once.",
    )
    return as_jax(np.eye(value.size, dtype=value.dtype).reshape(value.size, *value.shape))


def total_derivative(
    lin: Linearization,
    value: jax.Array,
    cotangents: Unknowns,
    direct: Params,
    throw: bool,
    beside: Callable[[], Unknowns],
) -> ParameterGradient:
    """Compute the total derivative of an observable by the parameters from its partial derivatives.

    For each number of the observable, one linear solve (of the adjoint equation) gives the part due
    to the motion of the minimum.

    Args:
      lin: the linearization of the minimum.
      value: value of the observable.
      cotangents: partial derivatives of the observable by the positions and other unknowns of the
        minimum, with a leading axis over the numbers of the observable.
      direct: partial derivatives of the observable by the parameters, with the same leading axis.
      throw: whether to raise an error where a status is not good.
      beside: function that computes ``cotangents`` at positions slightly beside the minimum, see
        :func:`aside`. It is called where the cotangents at the minimum may be round-off.
    """
    count = value.size
    width = min(count, _chunk_width(value.dtype.itemsize, lin.system.positions.size))

    def rows(start: int, stop: int) -> Unknowns:
        """Return the entries of ``cotangents`` from ``start`` to ``stop`` along the leading axis.

        Entries beyond the end are zeros.
        """
        missing = stop - min(stop, count)
        if not start and not missing:
            return cotangents
        return jax.tree.map(
            lambda w: jnp.pad(w[start:stop], [(0, missing), *[(0, 0)] * (w.ndim - 1)]), cotangents
        )

    flat = _in_chunks(lambda w: solve_derivative(VJP, lin, w, many=True), rows, count, width)
    stats = flat.stats
    if dropped_any(stats.status):
        size = norms(cotangents, many=True)
        size_beside = norms(beside(), many=True)
        stats = without_round_off(stats, size, size_beside, lin.system.positions.dtype)
    total, stats = _total_of_parts(flat.value, direct, stats, value.shape)
    result = ParameterGradient(
        value=total,
        stats=stats,
        max_force=lin.equilibrium.max_force,
        rattlers=lin.network.rattlers,
        wrt=differentiated(lin.system, lin.params),
    )
    return _raise_unless_good(result, throw, "gradient", lin.system)


@compiled(static_argnames=("shape",))
def _total_of_parts(
    moved: Params, direct: Params, stats: SolveStats, shape: tuple[int, ...]
) -> tuple[Params, SolveStats]:
    """Add the two parts of the derivative of an observable, and give it the observable's shape.

    Args:
      moved: part of the derivative due to the motion of the minimum, by name of the parameter, with
        a leading axis over the N numbers of the observable.
      direct: the part at constant positions, likewise.
      stats: statistics of the N linear solves.
      shape: shape of the observable.

    Returns:
      (derivatives, arrays of the shape of the observable followed by that of the parameter; the
      statistics, of the shape of the observable, NOT_FINITE where a derivative is not finite).
    """
    total = jax.tree.map(lambda a, b: (a + b).reshape(*shape, *b.shape[1:]), moved, direct)
    finite = [
        jnp.all(jnp.isfinite(t), axis=tuple(range(len(shape), t.ndim)))
        for t in jax.tree.leaves(total)
    ]
    stats = jax.tree.map(lambda leaf: leaf.reshape(shape), stats)
    return total, status_of_finite(stats, jnp.all(jnp.stack(finite), axis=0))
