"""The softest modes of a relaxed configuration, and the derivative of their stiffness.

    H v = lambda v,    d lambda / dp = v^T (@H/@p) v + v^T (@H/@R) v . dR/dp

H is the Hessian d2U/dR2 of the energy U by positions R in the present cell, outside of its null
space (translations, rattlers), lambda is the lowest eigenvalue there, and p are the parameters. The
mode v has norm one and is kept constant while H changes, because the change of v contributes only
to second order (Hellmann and Feynman). @ marks partial derivatives. The last term is due to the
motion of the minimum, and takes one adjoint solve; for a relaxed cell, this term contains
the motion of the cell.

Where eigenvalues are equal, as in a crystal, a single one of them has no derivative, but their mean
has one: the mean is the trace of H on the space that the modes of these eigenvalues span, over the
dimension of that space.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.compilation import compiled
from mdsens._util.errors import InputError, raise_for_status
from mdsens._util.outcome import worse
from mdsens._util.precision import full_precision
from mdsens._util.tables import Shown
from mdsens._util.validation import is_integer, is_number, short
from mdsens.implicit.linear import Method
from mdsens.implicit.linear.eigen import DENSE_SIZE, NULL, Spectrum
from mdsens.mechanics.hessian import dense_hessian, max_force
from mdsens.mechanics.hessian_factor import HessianFactor, participation
from mdsens.mechanics.null_space import NullSpace
from mdsens.mechanics.rigidity import analyze_rigidity
from mdsens.mechanics.status import Status
from mdsens.mechanics.units import doubtful_stiffness, natural_units, unrelaxed
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.system import System, potential_energy, require_unconstrained
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity.derivative_solve import aside
from mdsens.sensitivity.derivatives import total_derivative
from mdsens.sensitivity.linearization import Linearization, linearized, require_sound
from mdsens.sensitivity.results import ParameterGradient

__all__ = ["Softest", "gradient", "smallest_stiffness", "stiffness"]

# Eigenvalues whose relative difference is at most this count as equal. Those of a crystal are
# equal to round-off of its positions.
EQUAL = 1e-6
# eigenvalues computed beyond those asked for, so that the gap to the next one is known
EXTRA = 4
# The most eigenvalues computed beyond those asked for. Where all of these are equal, the
# multiplicity and the gap remain unknown, and the status is UNRESOLVED.
MOST_EXTRA = 200
# the same in traced code, where every array has to have this fixed size
MOST_EXTRA_TRACED = 48


@dataclasses.dataclass(frozen=True, repr=False)
class Softest(Shown):
    """The lowest modes of the Hessian H outside of its null space, with their stiffness.

    Attributes:
      values: (k,) eigenvalues, ascending, energy per length squared. k is the number asked for;
        where the last of these eigenvalues is equal to the next ones, k includes all that are
        equal.
      vectors: (k, n, d) the modes, orthonormal; rows of rattlers are zero.
      residuals: (k,) |H v - lambda v| of each mode v with eigenvalue lambda.
      gap: distance from the last of these eigenvalues to the next; inf without a next eigenvalue.
      mixing: estimate of the largest share that modes beyond the gap may have in these modes:
        (residual + change of H that the remaining force can make) / gap. The relative error of the
        derivative is about as large as ``mixing``.
      participation: (k,) participation ratio of each mode: 1 where all particles move alike, 1/n
        where only one moves.
      status: DEGENERATE where k is larger than the number asked for, UNRESOLVED where ``mixing`` is
        larger than the accuracy asked for; INDEFINITE, FLOPPY or STIFFNESS_UNSETTLED where a
        stiffness is negative, zero or in doubt; or the status of the minimum where that is bad.
      method: the eigenvalue solver that was used.
    """

    values: np.ndarray
    vectors: np.ndarray
    residuals: np.ndarray
    gap: float
    mixing: float
    participation: np.ndarray
    status: Status
    method: str

    @property
    def value(self) -> float:
        """The smallest stiffness; the mean of ``values`` where there are several eigenvalues."""
        return float(np.mean(self.values))

    _title = "Softest modes"

    def _rows(self) -> list[tuple[str, str]]:
        stiffness = f"{self.value:.6g}"
        if len(self.values) > 1:
            shown = ", ".join(f"{v:.6g}" for v in self.values[:4])
            if len(self.values) > 4:
                shown += " …"
            stiffness += f", mean of {len(self.values)}: {shown}"
        return [
            ("stiffness", stiffness),
            ("gap to the next", f"{self.gap:.3g}"),
            ("residual", f"{np.max(self.residuals, initial=0.0):.1e}, by {self.method}"),
            ("mixing", f"{self.mixing:.1e}"),
            ("participation", f"{np.mean(self.participation):.3g}"),
            ("status", f"{self.status.name}: {self.status.sentence}"),
        ]


def smallest_stiffness(
    eq: Equilibrium | Linearization, count: int = 1, *, accuracy: float = 1e-3, throw: bool = True
) -> Softest:
    """Compute the lowest eigenvalue of the Hessian outside of its null space, its mode and the gap.

    The null space contains translations and rattlers, and the gap is the distance to the next
    eigenvalue.

    Args:
      eq: a minimum, from ``minimize`` or ``linearize``; at a pressure, the Hessian is the second
        derivative by positions in the present cell.
      count: number of the lowest eigenvalues whose mean is the value of the result.
      accuracy: largest relative error that the derivative of the value may have because the
        computed modes contain a part of the next stiffer ones. The attribute ``mixing`` of the
        result estimates this error; where it is larger than ``accuracy``, the status is UNRESOLVED.
      throw: raise unless the status is good.

    Returns:
      :class:`Softest`.

    Raises:
      InputError: ``eq`` is a batch or has constraints, or another argument is invalid.
      ConvergenceError: ``eq`` is no minimum or is a saddle, has a floppy mode, or its lowest modes
        cannot be told from the next ones.

    Example:
      >>> import mdsens as ms
      >>> ms.enable_x64()
      >>> eq = ms.minimize(ms.load_system("seed_packing_2d", seed=0))
      >>> softest = ms.modes.smallest_stiffness(eq)
      >>> print(f"{softest.value:.5f}")
      0.02996
    """
    count = _check_arguments(count, accuracy)
    lin = linearized(eq, None)
    require_sound(lin, eq, throw)
    softest = _compute_softest(lin, count, float(accuracy))
    if throw:
        message = f"the smallest stiffness is {softest.value:.3g}, by {softest.method}"
        raise_for_status(softest.status, message, softest)
    return softest


def gradient(
    eq: Equilibrium | Linearization,
    count: int = 1,
    *,
    accuracy: float = 1e-3,
    solve: Method | None = None,
    throw: bool = True,
) -> ParameterGradient:
    """Compute the total derivative of the smallest stiffness by all parameters.

    The result is the derivative of ``smallest_stiffness(eq, count).value``, from the lowest
    eigenvalue with its mode, and one adjoint solve. For several modes, because they were requested
    or because they are equally stiff, it is the derivative of their mean stiffness. This derivative
    is valid as long as these modes do not cross the next ones, that is, for changes of the
    eigenvalues that are small against the gap, the distance to the next eigenvalue.

    Args:
      eq, count, accuracy: the minimum, the number of eigenvalues and the relative accuracy, as in
        :func:`smallest_stiffness`.
      solve, throw: the linear solver, and whether to raise an error, as in ``ms.gradient``.

    Returns:
      a :class:`~mdsens.ParameterGradient`, whose ``value`` is a dict shaped like the parameters, as
      that of ``ms.gradient``. In a symmetric matrix of species pairs, each of the two entries of a
      pair has half of the derivative; the result's method ``component`` gives the whole. The status
      of the result is that of the solve or, where that is good, that of the modes: DEGENERATE says
      that the mean is over more modes than were asked for.
    """
    count = _check_arguments(count, accuracy)
    lin = linearized(eq, solve)
    require_sound(lin, eq, throw)
    softest = smallest_stiffness(lin, count, accuracy=accuracy, throw=throw)
    core = lin.traced(tuple(lin.params))
    vectors = jnp.asarray(softest.vectors, lin.system.positions.dtype)
    value, cotangents, direct = _pull_mean_stiffness(core, vectors)
    result = total_derivative(
        lin, value, cotangents, direct, throw, lambda: _pull_mean_stiffness(aside(core), vectors)[1]
    )
    code = result.stats.status
    if result.status.good:
        code = worse(code, softest.status.value)
    return dataclasses.replace(result, stats=dataclasses.replace(result.stats, status=code))


def _check_arguments(count: int, accuracy: float) -> int:
    """Check two arguments of :func:`smallest_stiffness`; return ``count`` as a Python int.

    The other argument is ``accuracy``, which has to lie between 0 and 1.
    """
    if not is_number(accuracy) or not 0 < accuracy < 1:
        raise InputError(f"accuracy is {short(accuracy)}: give a number between 0 and 1.")
    return _check_count(count)


def _check_count(count: int) -> int:
    """Check the number of modes, and return it as a Python int; True and False are refused."""
    if not is_integer(count) or count < 1:
        raise InputError(f"count is {short(count)}: give a whole number from 1.")
    return int(count)


def _compute_softest(lin: Linearization, count: int, accuracy: float) -> Softest:
    """Compute the lowest modes of the Hessian, and judge whether they are reliable.

    If further modes are as stiff as the last of the ``count`` lowest modes, they are included.

    Args:
      lin: the linearization of the minimum.
      count: the number of modes asked for.
      accuracy: the largest ``mixing`` for which the status is good. ``mixing`` is the share that
        other, stiffer modes may have in these modes, see :class:`Softest`.
    """
    system = lin.system
    require_unconstrained(system, "modes")
    status = lin.status
    available = _count_modes(lin)
    if not available:
        if status.good:
            raise InputError(
                f"the system of {system.n} particles has no modes but translations and rotations:"
                " take more particles."
            )
        return _without_modes(system, 0.0, gap=np.inf, mixing=0.0, status=status, method="none")
    # A Linearization stores no factor where the energy is no sum over pairs.
    stiffness = HessianFactor(system, lin.null) if lin.factor is None else lin.factor
    length = float(natural_units(system)[0])
    largest_force = float(lin.equilibrium.max_force)
    floor = doubtful_stiffness(largest_force, length)
    spectrum, k, gap_known = _find_gap(stiffness, count, available, floor)
    if not np.isfinite(spectrum.values).all():
        if status.good:
            status = Status.NOT_FINITE
        return _without_modes(
            system, np.nan, gap=np.nan, mixing=np.nan, status=status, method=spectrum.method
        )
    values = spectrum.values[:k]
    residuals = spectrum.residuals[:k]
    gap = float(spectrum.values[k] - values[-1]) if k < len(spectrum.values) else np.inf
    # The force left means that the minimum is |F| / lambda away, and there H differs by its size
    # times that distance over the potential's length scale.
    distance = largest_force / max(abs(float(values[0])), floor, 1e-300)
    error = float(residuals.max()) + spectrum.largest * min(distance / length, 1.0)
    mixing = error / gap if gap_known and gap > 0 else np.inf
    if status.good:
        status = _judge_modes(spectrum, k, count, mixing, accuracy)
    return Softest(
        values=values,
        vectors=np.ascontiguousarray(spectrum.vectors[:, :k].T).reshape(k, *system.positions.shape),
        residuals=residuals,
        gap=gap,
        mixing=mixing,
        participation=participation(spectrum.vectors[:, :k], system.dimension),
        status=status,
        method=spectrum.method,
    )


def _count_modes(lin: Linearization) -> int:
    """Count the modes of the Hessian outside of its null space (translations, rattlers).

    The result is 0 if all particles are rattlers or a position is not finite.
    """
    positions = np.asarray(lin.system.positions)
    if np.asarray(lin.network.rattlers).all() or not np.isfinite(positions).all():
        return 0
    return positions.size - sum(lin.null.dimensions(lin.system.dimension))


def _find_gap(
    stiffness: HessianFactor, count: int, available: int, floor: float
) -> tuple[Spectrum, int, bool]:
    """Compute the lowest ``count`` modes, and more of them until the gap above these is known.

    The gap is the difference of stiffness to the next stiffer mode. If further modes are as stiff
    as the last of the ``count`` modes, they lie below the gap.

    Args:
      stiffness: the Hessian, with its factor.
      count: the number of modes asked for.
      available: the number of modes outside of the null space.
      floor: the sign of a stiffness smaller than this is in doubt.

    Returns:
      the computed modes, the number of modes below the gap, and whether the gap is known; the
      number is 0 where an eigenvalue is not finite.
    """
    # up to DENSE_SIZE every eigenvalue is computed anyway, so asking for many costs nothing
    dense = stiffness.system.positions.size <= DENSE_SIZE
    asked = min(count + (MOST_EXTRA if dense else EXTRA), available)
    while True:
        spectrum = stiffness.lowest(asked, floor)
        if not np.isfinite(spectrum.values).all():
            return spectrum, 0, False
        k = _count_with_equal(spectrum.values, min(count, available))
        gap_known = asked == available or (k < asked and _all_below_gap(stiffness, spectrum, k))
        if gap_known or asked >= count + MOST_EXTRA:
            return spectrum, k, gap_known
        # all that were asked for are equal, or the solver missed some of the equal ones
        asked = min(3 * asked, count + MOST_EXTRA, available)


def _without_modes(
    system: System, value: float, *, gap: float, mixing: float, status: Status, method: str
) -> Softest:
    """Return the result for a minimum whose modes cannot be computed.

    The result has the form of a single mode, whose numbers have no meaning: its stiffness, its
    displacements, its residual and its participation are all ``value``, which is 0 or NaN.
    """
    return Softest(
        values=np.full(1, value),
        vectors=np.full((1, *system.positions.shape), value),
        residuals=np.full(1, value),
        gap=gap,
        mixing=mixing,
        participation=np.full(1, value),
        status=status,
        method=method,
    )


def _count_with_equal(values: np.ndarray, count: int) -> int:
    """Count the lowest eigenvalues, and with them all that are equal to the last one.

    The result is ``count``, plus the number of eigenvalues beyond the lowest ``count`` that are
    equal to the last of the lowest ``count``.

    Args:
      values: ascending eigenvalues.
      count: number of the lowest eigenvalues.
    """
    last = values[count - 1]
    return int(np.sum(values <= last + EQUAL * abs(last)))


def _all_below_gap(stiffness: HessianFactor, spectrum: Spectrum, k: int) -> bool:
    """Return whether the lowest k computed eigenvalues are all that the Hessian has below the gap.

    The gap is the one between eigenvalue k and the next. Lanczos may miss some of several equal
    eigenvalues. A factor of the Hessian, shifted by a value in the gap, counts the eigenvalues
    below the gap (by its inertia); without such a factor, the answer is True.
    """
    if spectrum.method != "shift-invert":
        return True
    below = stiffness.below(float(0.5 * (spectrum.values[k - 1] + spectrum.values[k])))
    return below is None or below == k


def _judge_modes(spectrum: Spectrum, k: int, count: int, mixing: float, accuracy: float) -> Status:
    """Judge the lowest modes at a good minimum: return CONVERGED, or the status of the worst fault.

    Args:
      spectrum: the lowest modes.
      k: the number of modes; above ``count`` where further modes are as stiff as the last one.
      count: the number of modes asked for.
      mixing: estimated share that other, stiffer modes have in these k modes.
      accuracy: the largest ``mixing`` for which the status is good.
    """
    if spectrum.negative:
        return Status.INDEFINITE
    if spectrum.zero:
        return Status.FLOPPY
    if spectrum.hidden:
        return Status.STIFFNESS_UNSETTLED
    # also true where mixing is NaN
    if not mixing <= accuracy:
        return Status.UNRESOLVED
    return Status.DEGENERATE if k > count else Status.CONVERGED


def _stiffness_along(system: System, vectors: jax.Array) -> jax.Array:
    """Compute v^T H v, (k,), of modes v (k, n, d), with the Hessian H of a system.

    Derivatives of the result keep the modes constant.
    """
    R = system.positions

    def along(v: jax.Array) -> jax.Array:
        # v^T H v is the second derivative of U(R + t v) by t at t = 0: forward mode twice.
        def slope(t: jax.Array) -> jax.Array:
            return jax.jvp(
                lambda s: potential_energy(system, R + s * v), (t,), (jnp.ones_like(t),)
            )[1]

        zero = jnp.zeros((), R.dtype)
        return jax.jvp(slope, (zero,), (jnp.ones_like(zero),))[1]

    return jax.vmap(along)(vectors)


@compiled
def _pull_mean_stiffness(
    lin: Linearization, vectors: jax.Array
) -> tuple[jax.Array, Unknowns, dict[str, Any]]:
    """Compute the mean stiffness of modes, and its derivatives by unknowns and by parameters.

    The unknowns are the positions and, for a relaxed cell, the strain of the cell. Each
    derivative has a leading axis of length one, for the one number that is differentiated.

    Args:
      lin: the linearization of the minimum.
      vectors: (k, n, d) the modes, which are kept constant.
    """

    def observe(x: Unknowns, params: Mapping[str, Any]) -> jax.Array:
        return jnp.mean(_stiffness_along(lin.moved(lin.system, x, params), vectors))

    value, pull = jax.vjp(observe, lin.unknowns, lin.params)
    cotangents, direct = jax.tree.map(lambda w: w[None], pull(jnp.ones_like(value)))
    return value, cotangents, direct


# ── of a System, traceable ──


def stiffness(system: System, count: int = 1, *, has_aux: bool = False) -> Any:
    """Compute the smallest stiffness of a relaxed System, for jax.grad through ``equilibrate``.

    The result is ``smallest_stiffness(eq, count).value``, computed from all eigenvalues of the
    dense Hessian, in code that jax can trace. The time grows with the cube of the number of
    coordinates n d, so this function is for small systems. The modes are kept constant in the
    derivative, which is exact for the first derivative; a second derivative is refused.

    Args:
      system: a relaxed system of up to 1,200 coordinates n d.
      count: number of the lowest eigenvalues whose mean is the result.
      has_aux: whether to return ``(stiffness, status)``, with the status as an int32 array, since
        traced code cannot raise: UNCONVERGED where the system is not relaxed, UNJAMMED, INDEFINITE,
        FLOPPY, DEGENERATE for a mean over more modes than requested, UNRESOLVED where more than 48
        eigenvalues are equal.

    Raises:
      InputError: the system has more coordinates (use ``ms.modes.gradient`` instead), is a batch or
        has constraints; or a second derivative is taken.
    """
    if not isinstance(system, System):
        raise InputError(
            f"stiffness got a {type(system).__name__}: give a System, or take smallest_stiffness"
            " of an Equilibrium."
        )
    if system.batch is not None:
        raise InputError(
            f"the stiffness is of one system, and this is a batch of {system.batch}: use"
            " jax.vmap(ms.modes.stiffness)(batch)."
        )
    require_unconstrained(system, "modes")
    n, d = system.positions.shape
    if n * d > DENSE_SIZE:
        raise InputError(
            f"the system has {n * d:,} coordinates, and this function computes all eigenvalues,"
            f" for up to {DENSE_SIZE:,} coordinates: take ms.modes.gradient(eq), which computes"
            " only the lowest eigenvalues."
        )
    return _stiffness_of_system(system, min(_check_count(count), n * d), has_aux)


@compiled(static_argnames=("count", "has_aux"))
def _stiffness_of_system(system: System, count: int, has_aux: bool) -> Any:
    """Compute the mean stiffness of a system's lowest modes, with the status if ``has_aux``."""
    constant = jax.lax.stop_gradient(system)
    force_left = max_force(constant)
    backbone, net, null = analyze_rigidity(system, force_left)
    if not has_aux:
        return _mean_stiffness(backbone, null, count)
    # a status is an integer, which has no derivative
    status = _lowest_modes(jax.lax.stop_gradient(backbone), null, count)[2]
    status = jnp.where(net.unjammed, Status.UNJAMMED.value, status)
    status = jnp.where(
        unrelaxed(constant, force_left, net.mean_force), Status.UNCONVERGED.value, status
    )
    return _mean_stiffness(backbone, null, count), status.astype(jnp.int32)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _mean_stiffness(system: System, null: NullSpace, count: int) -> jax.Array:
    """Compute the mean stiffness of the lowest modes of a system without contacts of rattlers.

    The derivative of this function keeps the modes constant (Hellmann and Feynman). The derivative
    of ``jnp.linalg.eigh`` would divide by differences of eigenvalues, which may be zero.

    Args:
      system: the system.
      null: the null space of its Hessian, which is left out.
      count: the number of modes; equally stiff ones are added.
    """
    vectors, weights, _ = _lowest_modes(system, null, count)
    return jnp.sum(weights * _stiffness_along(system, vectors))


@_mean_stiffness.defjvp
def _mean_stiffness_jvp(
    count: int,
    primals: tuple[System, NullSpace],
    tangents: tuple[System, NullSpace],
) -> tuple[jax.Array, jax.Array]:
    system, null = primals
    change, _ = tangents
    vectors, weights, _ = _lowest_modes(system, null, count)
    return jax.jvp(lambda s: jnp.sum(weights * _stiffness_along(s, vectors)), (system,), (change,))


# a function with a derivative rule of its own, only in order to refuse the second derivative
@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
@full_precision
def _lowest_modes(
    system: System, null: NullSpace, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute the lowest modes of the Hessian of a system, in code that jax can trace.

    Args:
      system: the system.
      null: the null space of the Hessian, which is left out.
      count: the number of modes asked for; equally stiff ones are added.

    Returns:
      the k lowest modes (k, n, d), where k follows from ``count`` and not from the eigenvalues; the
      weight (k,) of each mode in the mean stiffness, zero for modes that are not part of the mean;
      and the status.
    """
    n, d = system.positions.shape
    unit = jnp.eye(n * d, dtype=system.positions.dtype)

    def off_null(v: jax.Array) -> jax.Array:
        return null.project(Unknowns(v.reshape(n, d))).positions.ravel()

    projector = jax.vmap(off_null)(unit)
    matrix = projector @ dense_hessian(system) @ projector
    matrix = 0.5 * (matrix + matrix.T)
    # the largest column sum bounds every eigenvalue, so that the null space, shifted to twice it,
    # comes after all of them
    bound = jnp.max(jnp.sum(jnp.abs(matrix), axis=0))
    shift = 2.0 * jnp.where(bound > 0, bound, 1.0)
    values, vectors = jnp.linalg.eigh(matrix + shift * (unit - projector))
    k = min(count + MOST_EXTRA_TRACED, n * d)
    last = values[count - 1]
    # 1.5 lies between the eigenvalues, at most 1 bound, and the null space at 2
    chosen = (values <= last + EQUAL * jnp.abs(last)) & (values < 1.5 * bound)
    zero = max(NULL, 8.0 * n * d * float(jnp.finfo(values.dtype).eps)) * bound
    # modes whose stiffness is zero to round-off contribute exactly zero to the mean
    weights = chosen[:k] * (jnp.abs(values[:k]) > zero) / jnp.maximum(jnp.sum(chosen[:k]), 1)
    multiplicity = jnp.sum(chosen)
    # A later line takes precedence over an earlier one.
    status = jnp.where(multiplicity > count, Status.DEGENERATE.value, Status.CONVERGED.value)
    status = jnp.where(multiplicity > k, Status.UNRESOLVED.value, status)
    status = jnp.where(jnp.abs(values[0]) <= zero, Status.FLOPPY.value, status)
    status = jnp.where(values[0] < -zero, Status.INDEFINITE.value, status)
    return vectors.T[:k].reshape(k, n, d), weights, status


@_lowest_modes.defjvp
def _lowest_modes_jvp(
    count: int, primals: tuple[System, NullSpace], tangents: tuple[System, NullSpace]
) -> Any:
    raise InputError(
        "the smallest stiffness of a System has a first derivative only, in which its modes are"
        " kept constant: for a second, take finite differences of ms.modes.gradient."
    )
