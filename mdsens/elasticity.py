"""Elastic moduli of a relaxed configuration, as one more sensitivity: that of its energy to strain.

    A_ijkl = V^-1 d2 min_R U / dstrain_ij dstrain_kl
           = V^-1 (d2U/dstrain dstrain - d2U/dstrain dR  H^+  d2U/dR dstrain)

with F = 1 + strain symmetric. The first part is affine; the second is what particles give back as
they leave their affine places, -H^+ d2U/dR dstrain, the non-affine displacements. This is the
convention of jax-md and of the packing literature. Under a stress sigma it is not what an
experiment measures: that is Birch's tensor, the derivative of the stress by the strain,

    B_ijkl = A_ijkl + (sigma_ik d_jl + sigma_il d_jk + sigma_jk d_il + sigma_jl d_ik) / 4 - sigma_ij d_kl,

whose bulk modulus is -V dP/dV at constant shape (Voigt's average: a cell whose shape may follow, as
of ``minimize(pressure=P, shape=True)``, gives way a little more), with P (d - 1) / d more than A's,
and whose shear modulus is P / 2 less (Barron and Klein, Proc. Phys. Soc. 85, 523, 1965; Wallace,
Thermodynamics of Crystals, 1972).

At imposed strain A is what it is, of either sign. Numbers of a solid it gives where the bulk and
the shear modulus are positive, of A and of B: else the status is FLOPPY where one is zero to
round-off, UNSTABLE where one is negative, both of which raise. Where they are positive and some
strain still lowers the enthalpy, B not positive definite, moduli are the averages that they always
are, and the status warns, SHAPE_HELD: see :mod:`mdsens.mechanics.stability`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mdsens._util.errors import InputError, raise_for_status
from mdsens._util.outcome import worse
from mdsens._util.portable import Portable
from mdsens._util.tables import Shown
from mdsens._util.user_functions import Traceable
from mdsens._util.validation import real_array
from mdsens.implicit.linear.operators import Auto, Method
from mdsens.implicit.linear.result import SolveStats
from mdsens.implicit.linear.solution import linear_solve
from mdsens.mechanics.hessian import Unknowns, hessian_operator, max_force
from mdsens.mechanics.not_finite import where_not_finite
from mdsens.mechanics.rigidity import analyze_rigidity
from mdsens.mechanics.stability import (
    Isotropic,
    birch,
    cleared,
    isotropic_part,
    softest_strain,
    solid,
    tensors,
)
from mdsens.mechanics.status import Status
from mdsens.mechanics.strain import basis, forces_of_strain, to_mandel
from mdsens.mechanics.units import unrelaxed
from mdsens.model.system import System, require_unconstrained
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity import derivatives
from mdsens.sensitivity._derivative_solve import (
    STRAIN,
    aside,
    solve_derivative,
    status_of_finite,
    strain_is_silent,
)
from mdsens.sensitivity.derivatives import numbers, total_derivative, unit_cotangents
from mdsens.sensitivity.linearization import Linearization, full_tangent, linearized, require_sound
from mdsens.sensitivity.results import Derivative, DirectionalDerivative, ParameterGradient

__all__ = ["Isotropic", "Moduli", "directional", "gradient", "isotropic", "jvp", "mandel", "moduli"]
__all__ += ["value_and_gradient", "voigt"]

D = TypeVar("D", bound=Derivative)


def _tensor(given: Any) -> jax.Array:
    """A stiffness tensor, checked."""
    if isinstance(given, Moduli):
        raise InputError("got Moduli: give one of its tensors, moduli.tensor or moduli.birch.")
    array = jnp.asarray(real_array("the tensor", given))
    if array.shape not in ((2, 2, 2, 2), (3, 3, 3, 3)):
        raise InputError(
            f"the tensor has shape {array.shape}: give (d, d, d, d), such as moduli.tensor."
        )
    return array


def isotropic(tensor: jax.Array) -> Isotropic:
    """The isotropic part of a stiffness tensor (d, d, d, d), of either convention; see
    :class:`Isotropic`.
    """
    return isotropic_part(_tensor(tensor))


def mandel(tensor: jax.Array) -> jax.Array:
    """A stiffness tensor as (m, m) in Mandel's form, whose eigenvalues are its own: xx, yy, (zz,
    yz, xz,) xy.
    """
    return to_mandel(_tensor(tensor))


def voigt(tensor: jax.Array) -> jax.Array:
    """A stiffness tensor as (m, m) in Voigt's form, C_ab = C_ijkl: xx, yy, (zz, yz, xz,) xy."""
    tensor = _tensor(tensor)
    d = tensor.shape[0]
    root = jnp.concatenate([jnp.ones(d), jnp.full(d * (d - 1) // 2, 2.0**0.5)])
    return to_mandel(tensor) / (root[:, None] * root[None])


def directional(tensor: jax.Array, directions: Any) -> tuple[jax.Array, jax.Array]:
    """Young's modulus and Poisson's ratio under a uniaxial stress along directions, E(n) and nu(n).

    With the compliance S, the inverse of the tensor: E = 1 / (nn:S:nn), and nu = -E nn:S:(1 - nn) /
      (d - 1), in 3-D the
    mean over what is across. Where a strain along n costs nothing, E is zero and nu NaN: the stress
    has nothing to stand on. Nothing is a singular value of the tensor below 100 eps of the largest.

    Args:
      tensor: (d, d, d, d) of either convention; Birch's for what a tensile test would see.
      directions: (…, d), of any length but zero.
    """
    tensor = _tensor(tensor)
    d = tensor.shape[0]
    given = jnp.asarray(real_array("directions", directions), tensor.dtype)
    if given.ndim < 1 or given.shape[-1] != d:
        raise InputError(f"directions have shape {given.shape}: give (…, {d}).")
    largest = jnp.max(
        jnp.abs(given), axis=-1, keepdims=True
    )  # taken out, so that no square over- or underflows
    if not isinstance(given, Tracer) and not np.all(
        (np.asarray(largest) > 0) & np.isfinite(np.asarray(largest))
    ):
        raise InputError("a direction is zero or not finite: give vectors of any other length.")
    n = given / largest
    n = n / jnp.linalg.norm(n, axis=-1, keepdims=True)
    along = jnp.einsum("...i,...j,aij->...a", n, n, basis(d))
    matrix, eps = mandel(tensor), float(jnp.finfo(tensor.dtype).eps)
    left, sizes, right = jnp.linalg.svd(jax.lax.stop_gradient(matrix))
    nothing = sizes <= 100.0 * eps * sizes[0]
    filled = (
        matrix + jnp.where(sizes[0] > 0, sizes[0], 1.0) * (left * nothing) @ right
    )  # what is solved for elsewhere
    falls = jnp.linalg.norm((along @ left) * nothing, axis=-1) > eps**0.5
    strain = jnp.linalg.solve(filled, along.reshape(-1, along.shape[-1]).T).T.reshape(along.shape)
    on, whole = jnp.sum(strain * along, axis=-1), strain @ jnp.einsum("aii->a", basis(d))
    return jnp.where(falls, 0.0, 1.0 / on), jnp.where(
        falls, jnp.nan, -(whole - on) / ((d - 1) * on)
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Moduli(Portable, Shown):
    """Elastic moduli with their evidence. Frozen, and a pytree.

    Attributes:
      tensor: (d, d, d, d) A, relaxed, at imposed strain; energy a volume; zero where all of it is
        round-off. ``bulk``, ``shear``, ``young`` and ``poisson`` are of this one: zero where they
        are round-off, and ratios of zeros NaN.
      affine: (d, d, d, d) what A would be if particles followed the strain.
      stress: (d, d) Cauchy, positive in tension.
      nonaffine: (m, n, d) displacements from the affine places, by each Mandel component of the
        strain; rattlers zero.
      stats: of the m linear solves. The error of the tensor is of the order of the residual
        squared. Where the solves are good the status says what the tensor is of: FLOPPY,
        STIFFNESS_UNSETTLED or UNSTABLE where its numbers are those of no solid, SHAPE_HELD as a
        warning; see :func:`mdsens.mechanics.stability.verdict`.
      round_off: a stiffness as small is none; see :func:`mdsens.mechanics.stability.resolution`.

    and, made of these: ``bulk``, ``shear``, ``young``, ``poisson``, ``pressure``, ``birch`` (d, d,
    d, d), the smallest eigenvalue of the symmetrized Birch tensor as ``stability``, and the worst
    of the stats' as ``status``.
    """

    tensor: jax.Array
    affine: jax.Array
    stress: jax.Array
    nonaffine: jax.Array
    stats: SolveStats
    round_off: jax.Array

    @property
    def status(self) -> Status:
        """The worst status among the stats'; of concrete moduli, not of traced ones."""
        return Status.worst_of(self.stats.status)

    @property
    def birch(self) -> jax.Array:
        """(d, d, d, d) B, the derivative of the Cauchy stress by the strain, with A's relaxation;
        see the module.
        """
        return cleared(birch(self.tensor, self.stress), self.round_off)

    @property
    def pressure(self) -> jax.Array:
        """-tr(stress) / d."""
        return -jnp.trace(self.stress) / self.stress.shape[0]

    @property
    def bulk(self) -> jax.Array:
        """K of A; -V dP/dV is ``isotropic(moduli.birch).bulk``."""
        return isotropic_part(self.tensor, self.round_off).bulk

    @property
    def shear(self) -> jax.Array:
        """G of A, averaged over directions."""
        return isotropic_part(self.tensor, self.round_off).shear

    @property
    def young(self) -> jax.Array:
        """E of A."""
        return isotropic_part(self.tensor, self.round_off).young

    @property
    def poisson(self) -> jax.Array:
        """nu of A."""
        return isotropic_part(self.tensor, self.round_off).poisson

    @property
    def stability(self) -> jax.Array:
        """The smallest eigenvalue of B, symmetrized: positive where no strain lowers the free
        enthalpy (Born).
        """
        return softest_strain(self.birch)

    _title = "Elastic moduli"

    def _rows(self) -> list[tuple[str, str]]:
        measured, whole, of_birch = (
            isotropic_part(x, self.round_off) for x in (self.tensor, self.affine, self.birch)
        )

        def line(name: str) -> str:
            a, b, c = (float(getattr(x, name)) for x in (measured, of_birch, whole))
            return f"{a:.6g}; {b:.6g} in Birch's convention; {c:.6g} if affine"

        return [
            ("pressure", f"{float(self.pressure):.6g}"),
            ("bulk modulus", line("bulk")),
            ("shear modulus", line("shear")),
            ("Young's modulus", line("young")),
            ("Poisson's ratio", line("poisson")),
            (
                "smallest eigenvalue",
                f"{float(self.stability):.6g} of Birch's tensor: stable where positive",
            ),
            ("status", f"{self.status.name}: {self.status.sentence}"),
            (
                "residual",
                f"{float(np.max(np.asarray(self.stats.residual))):.1e}, by {self.stats.solver}",
            ),
        ]


def moduli(
    eq: Equilibrium | Linearization | System, *, solve: Method | None = None, throw: bool = True
) -> Moduli:
    """Elastic moduli at imposed strain.

    Their derivative by the parameters is cheapest by :func:`gradient`, one solve more; a function
    of a System that takes moduli inside, given to ``ms.gradient``, costs several and twice the
    compilation, and serves a batch, too.

    Args:
      eq: an Equilibrium or a Linearization, for the number with its status, by one factor for all
        strains; or a relaxed System, traceable and differentiable to any order, for ``jax.grad``
        through ``equilibrate``.
      solve: the linear solver; Auto() where None.
      throw: raise unless the status is good. Of a System nothing is raised: read ``stats``. A
        function of a System that gives back a number alone hides them, and ``ms.gradient`` of it
        knows only what is NaN (NOT_FINITE), as E and nu are where no solid has them.

    Returns:
      :class:`Moduli`.

    Raises:
      InputError: open boundaries, a batch. ConvergenceError: no minimum; a solve that did not
        converge; a bulk or shear
      modulus that is zero to round-off (FLOPPY), in doubt (STIFFNESS_UNSETTLED) or negative
      (UNSTABLE): the message gives both, and ``throw=False`` the tensor, of which each entry is
      what it is.
    """
    if isinstance(eq, System):
        _check_cell(eq)
        return _of_system(eq, Auto() if solve is None else solve)
    if isinstance(eq, Equilibrium):
        _check_cell(eq.system)
    lin = linearized(eq, solve)
    _check_cell(lin.system)
    require_sound(lin, eq, throw)
    strained = solve_derivative(
        STRAIN, lin, jnp.asarray(basis(lin.system.dimension), lin.system.positions.dtype), many=True
    )
    found = _judged(lin.system, strained.value, strained.stats, lin.equilibrium.max_force)
    if throw:
        where = where_not_finite(found.status, lin.system)
        raise_for_status(
            found.status, f"elastic moduli by {found.stats.solver}{where}{_figures(found)}", found
        )
    return found


def _figures(found: Moduli) -> str:
    """What a message that refuses moduli says of them, where the solves are good and the solid is
    none.
    """
    if found.status not in (Status.FLOPPY, Status.STIFFNESS_UNSETTLED, Status.UNSTABLE):
        return ""
    return (
        f": bulk modulus {float(found.bulk):.3g}, shear modulus {float(found.shear):.3g}, smallest"
        f" eigenvalue of Birch's tensor {float(found.stability):.3g} (throw=False gives them)"
    )


def gradient(
    observable: Callable[[Moduli], Any],
    eq: Equilibrium | Linearization,
    *,
    solve: Method | None = None,
    throw: bool = True,
) -> ParameterGradient:
    """The total derivative of a function of the moduli by all parameters, by the solves of
    ``moduli`` and one more.

    The relaxed energy is stationary in the non-affine displacements, so that these may stay as they
    are while the tensor is differentiated; what is left is the motion of the minimum, one adjoint
    solve for each number of ``observable``.

    Args:
      observable: Moduli -> number or array, traceable: ``lambda m: m.poisson``. Of its tensors and stress,
        that is: the displacements themselves have no derivative here, ``moduli`` of a System gives
        them one.
      at, solve, throw: as in ``ms.gradient``.

    Returns:
      a :class:`~mdsens.ParameterGradient`, its value a dict shaped like the parameters, as of
      ``ms.gradient``: in a symmetric matrix of species pairs half of the derivative in each of two
      entries, and the whole in its ``component``.
    """
    return value_and_gradient(observable, eq, solve=solve, throw=throw)[1]


def jvp(
    observable: Callable[[Moduli], Any],
    eq: Equilibrium | Linearization,
    dparams: Mapping[str, Any],
    *,
    solve: Method | None = None,
    throw: bool = True,
) -> DirectionalDerivative:
    """The total derivative of a function of the moduli along one direction of the parameters:
    ``gradient``, forward.

    By the solves of ``moduli`` and one more, however many numbers ``observable`` has. At a pressure the
    cell follows, and ``dparams`` may name the pressure.

    Args:
      observable, eq, solve, throw: as in ``gradient``.
      dparams: changes by parameter name, as in ``ms.jvp``; of a matrix of species pairs symmetric.

    Returns:
      a :class:`~mdsens.DirectionalDerivative`, its value shaped like what ``observable`` returns.
    """
    lin, observe = _function(observable, eq, solve)
    tangent = full_tangent(lin.system, dparams, lin.params)
    require_sound(lin, eq, throw)
    elastic = moduli(lin, throw=throw)
    moved = derivatives.jvp(lin, dparams, throw=throw)
    rates = _pushed(lin.traced(tuple(dparams)), elastic, lin.unknown(moved.value), tangent)
    _, rate = jax.jvp(
        _of_tensors(observe, elastic), (elastic.tensor, elastic.affine, elastic.stress), rates
    )
    finite = jnp.all(jnp.isfinite(rate))
    found = DirectionalDerivative(
        value=rate,
        stats=status_of_finite(moved.stats, finite),
        max_force=moved.max_force,
        rattlers=moved.rattlers,
    )
    found = _as_good_as(elastic, found)
    if throw:
        raise_for_status(found.status, "jvp of elastic moduli", found)
    return found


def value_and_gradient(
    observable: Callable[[Moduli], Any],
    eq: Equilibrium | Linearization,
    *,
    solve: Method | None = None,
    throw: bool = True,
) -> tuple[jax.Array, ParameterGradient]:
    """What ``gradient`` gives, with the value of the function before it."""
    lin, observe = _function(observable, eq, solve)
    require_sound(lin, eq, throw)
    elastic = moduli(lin, throw=throw)
    value, pull = jax.vjp(
        _of_tensors(observe, elastic), elastic.tensor, elastic.affine, elastic.stress
    )
    weights = jax.vmap(lambda w: pull(w))(unit_cotangents(lin, value))
    core = lin.traced(tuple(lin.params))

    def pulled(eq: Linearization) -> Any:
        return _pulled(eq, elastic, weights)

    cotangents, direct = pulled(core)
    found = total_derivative(lin, value, cotangents, direct, throw, lambda: pulled(aside(core))[0])
    return value, _as_good_as(elastic, found)


def _as_good_as(elastic: Moduli, result: D) -> D:
    """A derivative of moduli, with the status of these where that is worse, or says that they are
    none.
    """
    worst, own = elastic.status, result.stats.status
    code = worse(own, worst.value)
    code = code if worst.good else jnp.full_like(own, worst.value)
    return dataclasses.replace(result, stats=dataclasses.replace(result.stats, status=code))


def _function(
    observable: Any, eq: Any, solve: Any
) -> tuple[Linearization, Callable[[Moduli], jax.Array]]:
    """The minimum made ready, and the function of its moduli, tried without them."""
    if not callable(observable):
        raise InputError(
            "the first argument is no function: give one of Moduli, such as lambda m: m.poisson."
        )
    if isinstance(eq, Equilibrium):
        _check_cell(eq.system)
    lin = linearized(eq, solve)
    _check_cell(lin.system)
    function = Traceable("the function of the moduli", observable)

    def observe(moduli: Moduli) -> jax.Array:
        return numbers(function(moduli))

    unit_cotangents(lin, jax.eval_shape(observe, _shapes(lin.system)))
    return lin, observe


def _shapes(system: System) -> Moduli:
    """Moduli without numbers."""
    (n, d), dtype = system.positions.shape, system.positions.dtype
    m = d * (d + 1) // 2
    counts, sizes = jnp.zeros(m, jnp.int32), jnp.zeros(m, dtype)
    stats = SolveStats(counts, sizes, counts, sizes)
    return jax.eval_shape(_judged, system, jnp.zeros((m, n, d), dtype), stats, jnp.zeros((), dtype))


def _of_tensors(
    observe: Callable[[Moduli], jax.Array], elastic: Moduli
) -> Callable[..., jax.Array]:
    """The function as one of the tensors and the stress, the displacements as they are."""

    def of_tensors(tensor: jax.Array, affine: jax.Array, stress: jax.Array) -> jax.Array:
        return observe(dataclasses.replace(elastic, tensor=tensor, affine=affine, stress=stress))

    return of_tensors


def _tensors(lin: Linearization, elastic: Moduli) -> Callable[..., tuple[jax.Array, ...]]:
    """The tensors and the stress as functions of the unknowns and the parameters, the displacements
    as they are.
    """

    def at(x: Unknowns, params: Any) -> tuple[jax.Array, ...]:
        tensor, affine, stress = tensors(lin.moved(lin.system, x, params), elastic.nonaffine)
        return cleared(tensor, elastic.round_off), affine, stress

    return at


@jax.jit
def _pushed(lin: Linearization, elastic: Moduli, x: Unknowns, params: Any) -> Any:
    """How fast the tensors change as the unknowns and the parameters do."""
    return jax.jvp(_tensors(lin, elastic), (lin.unknowns, dict(lin.params)), (x, dict(params)))[1]


@jax.jit
def _pulled(lin: Linearization, elastic: Moduli, weights: tuple[jax.Array, ...]) -> Any:
    """What each of some combinations of the tensors owes to the unknowns and to the parameters."""
    pull = jax.vjp(_tensors(lin, elastic), lin.unknowns, lin.params)[1]
    return jax.vmap(lambda w: pull(w))(weights)


def _check_cell(system: System) -> None:
    require_unconstrained(system, "elasticity")
    if system.box is None:
        raise InputError(
            "elastic moduli need a volume, and this system has open boundaries: give it a box."
        )
    if system.batch is not None:
        raise InputError(
            f"moduli are of one system, and this is a batch of {system.batch}: loop over"
            " ms.unstack, or take ms.gradient(lambda s: ms.elasticity.moduli(s).bulk, batch) for a"
            " derivative, jax.vmap for values."
        )


def _judged(system: System, motion: jax.Array, stats: SolveStats, max_force: Any) -> Moduli:
    """The moduli of a backbone, with the status that says what they are of."""
    found = solid(system, motion, max_force, jnp.max(stats.residual))
    stats = dataclasses.replace(stats, status=worse(stats.status, found.status))
    return Moduli(found.tensor, found.affine, found.stress, motion, stats, found.round_off)


@functools.partial(
    jax.jit, static_argnames="solve"
)  # so that what is derived from it is traced and compiled once
def _of_system(system: System, solve: Method) -> Moduli:
    still = jax.lax.stop_gradient(system)
    left = max_force(still)
    backbone, net, null = analyze_rigidity(system, left)
    operator = hessian_operator(backbone, null)

    def one(strain: jax.Array) -> tuple[jax.Array, SolveStats]:
        forces = forces_of_strain(backbone, strain)
        x, stats = linear_solve(operator, Unknowns(forces), solve)
        # of round-off, translations are no part worth a word; its derivatives count all the same
        silent = strain_is_silent(still, forces) & (
            stats.status == Status.NULL_COMPONENT_DROPPED.value
        )
        return x.positions, dataclasses.replace(
            stats, status=jnp.where(silent, Status.CONVERGED.value, stats.status)
        )

    motion, stats = jax.vmap(one)(jnp.asarray(basis(system.dimension), system.positions.dtype))
    code = jnp.where(net.unjammed, Status.UNJAMMED.value, Status.CONVERGED.value)
    code = jnp.where(unrelaxed(still, left, net.mean_force), Status.UNCONVERGED.value, code)
    stats = dataclasses.replace(
        stats, status=jnp.where(code != Status.CONVERGED.value, code, stats.status)
    )
    return _judged(backbone, motion, stats, left)
