"""The softest modes of a relaxed configuration, and the derivative of their stiffness by the
parameters.

    H v = lambda v,    d lambda / dp = v^T (@H/@p) v + v^T (@H/@R) v . dR/dp

H is the Hessian d2U/dR2 by positions in the present cell, off its null space, and lambda the lowest
eigenvalue there. v has norm one and stays as it is while H changes: its own motion counts to second
order (Hellmann and Feynman). The last term is the motion of the minimum, one adjoint solve; at a
pressure it contains that of the cell.

Where eigenvalues are equal, as in a crystal, each alone has no derivative, and their mean has one:
the trace of H on the space that they span, over its dimension.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.errors import InputError, raise_for_status
from mdsens._util.outcome import worse
from mdsens._util.tables import Shown
from mdsens._util.validation import short
from mdsens.implicit.linear.eigen import DENSE_SIZE, NULL, Spectrum
from mdsens.implicit.linear.operators import Method
from mdsens.mechanics.hessian import Unknowns, dense_hessian, max_force
from mdsens.mechanics.hessian_factor import HessianFactor, participation
from mdsens.mechanics.null_space import NullSpace
from mdsens.mechanics.rigidity import analyze_rigidity
from mdsens.mechanics.status import Status
from mdsens.mechanics.units import doubtful_stiffness, natural_units, unrelaxed
from mdsens.model.system import System, potential_energy, require_unconstrained
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity._derivative_solve import aside
from mdsens.sensitivity.derivatives import total_derivative
from mdsens.sensitivity.linearization import Linearization, linearized, require_sound
from mdsens.sensitivity.results import ParameterGradient

__all__ = ["Softest", "gradient", "smallest_stiffness", "stiffness"]

# of an eigenvalue: nearer ones are taken as equal, which a crystal's are to round-off of its
# positions
EQUAL = 1e-6
SPARE = 4  # eigenvalues asked for beyond those wanted, to see the gap
MOST = 200  # beyond those wanted: of that many equal ones nothing is said
LOOK = 48  # likewise in traced code, whose shapes are fixed


@dataclasses.dataclass(frozen=True, repr=False)
class Softest(Shown):
    """The lowest modes of the Hessian off its null space, as many as belong together.

    Attributes:
      values: (k,) eigenvalues, ascending, energy a length squared. k is what was asked for or,
        where the last of these is equal to the next, as many more as are equal to it.
      vectors: (k, n, d) the modes, orthonormal; rows of rattlers zero.
      residuals: (k,) |H v - lambda v|.
      gap: from the last of these to the next eigenvalue; inf where there is none.
      mixing: how much of the modes beyond the gap may be in these, at most about: the residual, and
        what the force left can change of H, over the gap. It is the relative size of the error of
        the derivative.
      participation: (k,) of each mode, 1 where all particles move alike, 1/n where one does.
      status: DEGENERATE where k is more than was asked for, UNRESOLVED where ``mixing`` is above
        the accuracy; or what is wrong with the minimum.
      method: how they were found.
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
        """The smallest stiffness; the mean of ``values`` where there are several."""
        return float(np.mean(self.values))

    _title = "Softest modes"

    def _rows(self) -> list[tuple[str, str]]:
        shown = ", ".join(f"{v:.6g}" for v in self.values[:4]) + (
            " …" if len(self.values) > 4 else ""
        )
        return [
            (
                "stiffness",
                f"{self.value:.6g}"
                + (f", mean of {len(self.values)}: {shown}" if len(self.values) > 1 else ""),
            ),
            ("gap to the next", f"{self.gap:.3g}"),
            ("residual", f"{np.max(self.residuals, initial=0.0):.1e}, by {self.method}"),
            ("mixing", f"{self.mixing:.1e}"),
            ("participation", f"{np.mean(self.participation):.3g}"),
            ("status", f"{self.status.name}: {self.status.sentence}"),
        ]


def smallest_stiffness(
    eq: Equilibrium | Linearization, count: int = 1, *, accuracy: float = 1e-3, throw: bool = True
) -> Softest:
    """The lowest eigenvalue of the Hessian off its null space, with its mode and the gap to the
    next.

    Args:
      eq: from ``minimize`` or ``linearize``; at a pressure, the Hessian is that by positions in the
        present cell.
      count: how many of the lowest eigenvalues are taken together.
      accuracy: of the derivative, relative: where the modes may hold more than this of the next
        ones, the status is UNRESOLVED.
      throw: raise unless the status is good.

    Returns:
      :class:`Softest`.

    Raises:
      InputError: a batch. ConvergenceError: no minimum, a saddle, a floppy mode, modes that cannot
        be told apart.
    """
    count = _checked(count, accuracy)
    lin = linearized(eq, None)
    require_sound(lin, eq, throw)
    found = _softest(lin, count, float(accuracy))
    if throw:
        raise_for_status(
            found.status, f"the smallest stiffness is {found.value:.3g}, by {found.method}", found
        )
    return found


def gradient(
    eq: Equilibrium | Linearization,
    count: int = 1,
    *,
    accuracy: float = 1e-3,
    solve: Method | None = None,
    throw: bool = True,
) -> ParameterGradient:
    """The total derivative of the smallest stiffness by all parameters, by one eigenvalue and one
    adjoint solve.

    Of ``smallest_stiffness(at, count).value``: of several modes, by choice or because they are
    equal, that of their mean. It holds while the modes do not meet the next ones, for changes of
    the eigenvalues small against their gap.

    Args:
      at, count, accuracy: as in :func:`smallest_stiffness`.
      solve, throw: as in ``ms.gradient``.

    Returns:
      a :class:`~mdsens.ParameterGradient`, its value a dict shaped like the parameters, as of
      ``ms.gradient``: in a symmetric matrix of species pairs half of the derivative in each of two
      entries, and the whole in its ``component``. Its status is the solve's, or where that one is
      good the modes': DEGENERATE says that it is a mean over more modes than were asked for.
    """
    count = _checked(count, accuracy)
    lin = linearized(eq, solve)
    require_sound(lin, eq, throw)
    found = smallest_stiffness(lin, count, accuracy=accuracy, throw=throw)
    core, vectors = (
        lin.traced(tuple(lin.params)),
        jnp.asarray(found.vectors, lin.system.positions.dtype),
    )
    value, cotangents, direct = _pulled(core, vectors)
    result = total_derivative(
        lin, value, cotangents, direct, throw, lambda: _pulled(aside(core), vectors)[1]
    )
    code = result.stats.status
    if result.status.good:
        code = worse(code, found.status.value)
    return dataclasses.replace(result, stats=dataclasses.replace(result.stats, status=code))


def _checked(count: Any, accuracy: Any) -> int:
    """The count, and the accuracy's check."""
    if not isinstance(accuracy, int | float) or not 0 < accuracy < 1:
        raise InputError(f"accuracy is {short(accuracy)}: give a number between 0 and 1.")
    return _whole(count)


def _whole(count: Any) -> int:
    if not isinstance(count, int | np.integer) or isinstance(count, bool) or count < 1:
        raise InputError(f"count is {short(count)}: give a whole number from 1.")
    return int(count)


def _softest(lin: Linearization, count: int, accuracy: float) -> Softest:
    system, d = lin.system, lin.system.dimension
    require_unconstrained(system, "modes")
    before, largest_force = Status(int(lin.status)), float(lin.equilibrium.max_force)
    loose = np.asarray(lin.network.rattlers)
    left = system.positions.size - (0 if loose.all() else sum(lin.null.dimensions(d)))
    if loose.all() or not left or not np.isfinite(np.asarray(system.positions)).all():
        nothing = np.zeros(1), np.zeros((1, *system.positions.shape)), np.zeros(1)
        status = Status.UNJAMMED if before.good else before
        return Softest(*nothing, np.inf, 0.0, np.zeros(1), status, "none")
    stiffness = HessianFactor(system, lin.null) if lin.stiffness is None else lin.stiffness
    length = float(natural_units(system)[0])
    floor = doubtful_stiffness(largest_force, length)
    dense = (
        system.positions.size <= DENSE_SIZE
    )  # where every eigenvalue is computed, whatever is asked for
    ask = min(count + (MOST if dense else SPARE), left)
    while True:
        spectrum = stiffness.lowest(ask, floor)
        if not np.isfinite(spectrum.values).all():
            nothing = (
                np.full(1, np.nan),
                np.full((1, *system.positions.shape), np.nan),
                np.full(1, np.nan),
            )
            status = Status.NOT_FINITE if before.good else before
            return Softest(*nothing, np.nan, np.nan, np.full(1, np.nan), status, spectrum.method)
        k = _together(spectrum.values, min(count, left))
        seen = ask == left or (k < ask and _all_found(stiffness, spectrum, k))
        if seen or ask >= count + MOST:
            break
        ask = min(
            3 * ask, count + MOST, left
        )  # equal to the last that was asked for, or some of the equal were missed
    values, residuals = spectrum.values[:k], spectrum.residuals[:k]
    gap = float(spectrum.values[k] - values[-1]) if k < len(spectrum.values) else np.inf
    # the force left leaves the minimum |F| / lambda away, and there H is another by its size over
    # the potential's length
    off = largest_force / max(abs(float(values[0])), floor, 1e-300)
    doubt = float(residuals.max()) + spectrum.largest * min(off / length, 1.0)
    mixing = doubt / gap if seen and gap > 0 else np.inf
    status = before if not before.good else _verdict(spectrum, k, count, mixing, accuracy)
    vectors = np.ascontiguousarray(spectrum.vectors[:, :k].T).reshape(k, *system.positions.shape)
    shares = participation(spectrum.vectors[:, :k], d)
    return Softest(values, vectors, residuals, gap, mixing, shares, status, spectrum.method)


def _together(values: np.ndarray, count: int) -> int:
    """``count``, and as many more as are equal to the last of these."""
    last = values[count - 1]
    return int(np.sum(values <= last + EQUAL * abs(last)))


def _all_found(stiffness: HessianFactor, spectrum: Spectrum, k: int) -> bool:
    """Whether none below the gap is missing, as Lanczos may miss equal ones: by inertia, where a
    factor tells.
    """
    if spectrum.method != "shift-invert":
        return True
    below = stiffness.below(float(0.5 * (spectrum.values[k - 1] + spectrum.values[k])))
    return below is None or below == k


def _verdict(spectrum: Spectrum, k: int, count: int, mixing: float, accuracy: float) -> Status:
    if spectrum.negative:
        return Status.INDEFINITE
    if spectrum.zero:
        return Status.FLOPPY
    if spectrum.hidden:
        return Status.STIFFNESS_UNSETTLED
    if not mixing <= accuracy:
        return Status.UNRESOLVED
    return Status.DEGENERATE if k > count else Status.CONVERGED


def _stiffness_along(system: System, vectors: jax.Array) -> jax.Array:
    """v^T H v of modes (k, n, d), which are held, (k,)."""
    R = system.positions

    def along(v: jax.Array) -> jax.Array:
        def slope(t: jax.Array) -> jax.Array:
            return jax.jvp(
                lambda s: potential_energy(system, R + s * v), (t,), (jnp.ones_like(t),)
            )[1]

        zero = jnp.zeros((), R.dtype)
        return jax.jvp(slope, (zero,), (jnp.ones_like(zero),))[1]

    return jax.vmap(along)(vectors)


@jax.jit
def _pulled(
    lin: Linearization, vectors: jax.Array
) -> tuple[jax.Array, Unknowns, dict[str, jax.Array]]:
    """The mean stiffness, and what it owes to unknowns and parameters, with the leading axis of one
    number.
    """

    def observe(x: Unknowns, params: Any) -> jax.Array:
        return jnp.mean(_stiffness_along(lin.moved(lin.system, x, params), vectors))

    value, pull = jax.vjp(observe, lin.unknowns, lin.params)
    cotangents, direct = jax.tree.map(lambda w: w[None], pull(jnp.ones_like(value)))
    return value, cotangents, direct


# ── of a System, traceable ──


def stiffness(system: System, count: int = 1, *, has_aux: bool = False) -> Any:
    """The smallest stiffness of a relaxed System, traceable, for ``jax.grad`` through
    ``equilibrate``.

    ``smallest_stiffness(at, count).value`` by all eigenvalues of the dense Hessian, so for small
    systems: the time goes with the cube of the number of unknowns. The modes are held while it is
    differentiated, which is exact for the first derivative; a second is refused.

    Args:
      system: relaxed, of up to 1,200 unknowns.
      count: how many of the lowest eigenvalues are taken together.
      has_aux: return ``(stiffness, status)``, the status as an int32 array, since traced code
        cannot raise: UNCONVERGED where the system is not relaxed, UNJAMMED, INDEFINITE, FLOPPY,
        DEGENERATE for a mean over more than were asked for, UNRESOLVED where more than 48 are
        equal.

    Raises:
      InputError: more unknowns, where ``ms.modes.gradient`` is the way; a second derivative.
    """
    if not isinstance(system, System):
        raise InputError(
            f"got a {type(system).__name__}: give a System, or take smallest_stiffness of an"
            " Equilibrium."
        )
    if system.batch is not None:
        raise InputError(
            f"the stiffness is of one system: use jax.vmap(...)(batch) for these {system.batch}."
        )
    require_unconstrained(system, "modes")
    n, d = system.positions.shape
    if n * d > DENSE_SIZE:
        raise InputError(
            f"the system has {n * d:,} unknowns, and all eigenvalues are computed here, up to"
            f" {DENSE_SIZE:,}: take ms.modes.gradient(eq), which finds the lowest alone."
        )
    return _of_system(system, min(_whole(count), n * d), has_aux)


@functools.partial(jax.jit, static_argnames=("count", "has_aux"))
def _of_system(system: System, count: int, has_aux: bool) -> Any:
    still = jax.lax.stop_gradient(system)
    left = max_force(still)
    held, net, null = analyze_rigidity(system, left)
    if not has_aux:
        return _mean(held, null, count)
    status = _modes(jax.lax.stop_gradient(held), null, count)[2]
    status = jnp.where(net.unjammed, Status.UNJAMMED.value, status)
    status = jnp.where(unrelaxed(still, left, net.mean_force), Status.UNCONVERGED.value, status)
    return _mean(held, null, count), status.astype(jnp.int32)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _mean(system: System, null: NullSpace, count: int) -> jax.Array:
    vectors, weights, _ = _modes(system, null, count)
    return jnp.sum(weights * _stiffness_along(system, vectors))


@_mean.defjvp
def _mean_jvp(count: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (system, null), (change, _) = primals, tangents
    vectors, weights, _ = _modes(system, null, count)
    return jax.jvp(lambda s: jnp.sum(weights * _stiffness_along(s, vectors)), (system,), (change,))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _modes(system: System, null: NullSpace, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The lowest modes (k, n, d), the weight of each in the mean (k,), and the status."""
    n, d = system.positions.shape
    unit = jnp.eye(n * d, dtype=system.positions.dtype)

    def off(v: jax.Array) -> jax.Array:
        return null.project(Unknowns(v.reshape(n, d))).positions.ravel()

    kept = jax.vmap(off)(unit)
    matrix = kept @ dense_hessian(system) @ kept
    matrix = 0.5 * (matrix + matrix.T)
    size = jnp.max(jnp.sum(jnp.abs(matrix), axis=0))
    # the null space goes to the top, beyond every eigenvalue
    values, vectors = jnp.linalg.eigh(matrix + 2.0 * jnp.where(size > 0, size, 1.0) * (unit - kept))
    k = min(count + LOOK, n * d)
    last = values[count - 1]
    there = (values <= last + EQUAL * jnp.abs(last)) & (values < 1.5 * size)
    nothing = max(NULL, 8.0 * n * d * float(jnp.finfo(values.dtype).eps)) * size
    # what is zero to round-off adds zero to the mean
    weights = there[:k] * (jnp.abs(values[:k]) > nothing) / jnp.maximum(jnp.sum(there[:k]), 1)
    found = jnp.sum(there)
    status = jnp.where(found > count, Status.DEGENERATE.value, Status.CONVERGED.value)
    status = jnp.where(found > k, Status.UNRESOLVED.value, status)
    status = jnp.where(jnp.abs(values[0]) <= nothing, Status.FLOPPY.value, status)
    status = jnp.where(values[0] < -nothing, Status.INDEFINITE.value, status)
    return vectors.T[:k].reshape(k, n, d), weights, status


@_modes.defjvp
def _modes_jvp(count: int, primals: Any, tangents: Any) -> Any:
    raise InputError(
        "the smallest stiffness of a System has a first derivative alone, in which its modes are"
        " held: for a second, take differences of ms.modes.gradient."
    )
