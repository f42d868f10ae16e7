"""Elastic moduli of a relaxed configuration: second derivatives of its relaxed energy by strain.

    A_ijkl = V^-1 d2 min_R U / dstrain_ij dstrain_kl
           = V^-1 (d2U/dstrain dstrain - d2U/dstrain dR  H^+  d2U/dR dstrain)

with the energy U, the volume V, the positions R, the pseudo-inverse H^+ of the Hessian, and a
symmetric deformation gradient 1 + strain. The first term is the affine stiffness. The second term
is what the stiffness loses because particles leave their affine positions, by the non-affine
displacements -H^+ d2U/dR dstrain. This is the convention of jax-md and of the packing literature.
Under a stress sigma, A is not what an experiment measures. An experiment measures Birch's tensor,
the derivative of the stress by the strain,

    B_ijkl = A_ijkl - sigma_ij d_kl
             + (sigma_ik d_jl + sigma_il d_jk + sigma_jk d_il + sigma_jl d_ik) / 4,

where d_ij is one for i = j, else zero. The bulk modulus of B is -V dP/dV at constant shape, which
is P (d - 1) / d above that of A, with the pressure P in dimension d. (That is Voigt's average: a
cell whose shape may change as well, as under ``minimize(pressure=P, shape=True)``, is a little
softer.) The shear modulus of B is P / 2 below that of A (Barron and Klein, Proc. Phys. Soc. 85,
523, 1965; Wallace, Thermodynamics of Crystals, 1972).

At imposed strain A is defined also where it has negative eigenvalues. The moduli are those of a
solid where the bulk and the shear modulus are positive, both of A and of B. Otherwise the status is
FLOPPY where one of these moduli is zero to round-off and UNSTABLE where one is negative; with both
statuses an error is raised. Where the moduli are positive but B is not positive definite, some
strain still lowers the enthalpy: the moduli remain averages over directions, and the status
SHAPE_HELD is a warning. See :mod:`mdsens.mechanics.stability`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from numpy.typing import ArrayLike

from mdsens._util.compilation import compiled
from mdsens._util.errors import InputError, raise_for_status
from mdsens._util.outcome import worse
from mdsens._util.portable import Portable
from mdsens._util.precision import full_precision
from mdsens._util.tables import Shown
from mdsens._util.user_functions import Traceable
from mdsens._util.validation import real_array
from mdsens.implicit.linear import Auto, Method
from mdsens.implicit.linear.result import SolveStats
from mdsens.implicit.linear.solution import linear_solve
from mdsens.mechanics.hessian import hessian_operator, max_force
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
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.system import System, require_unconstrained, require_volume
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity import derivatives
from mdsens.sensitivity.derivative_solve import (
    STRAIN,
    aside,
    solve_derivative,
    status_of_finite,
    strain_is_silent,
)
from mdsens.sensitivity.derivatives import numbers, total_derivative, unit_cotangents
from mdsens.sensitivity.linearization import Linearization, full_tangent, linearized, require_sound
from mdsens.sensitivity.results import Derivative, DirectionalDerivative, ParameterGradient

__all__ = ["GPa", "Isotropic", "Moduli", "directional", "gradient", "isotropic", "jvp", "mandel"]
__all__ += ["moduli", "value_and_gradient", "voigt"]

# One gigapascal in eV per cubic angstrom (the elementary charge of the SI is exact): moduli.voigt /
# GPa are elastic constants in GPa where energies are in eV and lengths in angstroms.
GPa = 1.0 / 160.2176634

D = TypeVar("D", bound=Derivative)


def _check_tensor(tensor: ArrayLike | Moduli) -> jax.Array:
    """Check that the user gave a stiffness tensor (d, d, d, d), and return it as an array."""
    if isinstance(tensor, Moduli):
        raise InputError("got Moduli: give one of its tensors, moduli.tensor or moduli.birch.")
    array = jnp.asarray(real_array("the tensor", tensor))
    if array.shape not in ((2, 2, 2, 2), (3, 3, 3, 3)):
        raise InputError(
            f"the tensor has shape {array.shape}: give an array (d, d, d, d), such as"
            " moduli.tensor."
        )
    return array


def isotropic(tensor: jax.Array) -> Isotropic:
    """Compute bulk, shear and Young's modulus and Poisson's ratio of a stiffness tensor.

    These describe the isotropic part of the tensor, its average over all directions; see
    :class:`Isotropic`.

    Args:
      tensor: (d, d, d, d), either A (second derivative of the energy by strain) or Birch's B
        (derivative of the stress by strain).
    """
    return isotropic_part(_check_tensor(tensor))


def mandel(tensor: jax.Array) -> jax.Array:
    """Return a stiffness tensor (d, d, d, d) as the matrix (m, m) of Mandel's notation.

    Rows and columns are xx, yy, (zz, yz, xz,) xy; m = d (d + 1) / 2. The eigenvalues of the matrix
    are those of the tensor.
    """
    return to_mandel(_check_tensor(tensor))


def voigt(tensor: jax.Array) -> jax.Array:
    """Return a stiffness tensor C (d, d, d, d) as the matrix (m, m) of Voigt's notation.

    The entries of the matrix are C_ab = C_ijkl, where a and b each stand for one pair of xx, yy,
    (zz, yz, xz,) xy; m = d (d + 1) / 2.
    """
    tensor = _check_tensor(tensor)
    d = tensor.shape[0]
    # Mandel's notation weights each shear component by sqrt(2), Voigt's by 1
    root = jnp.concatenate([jnp.ones(d), jnp.full(d * (d - 1) // 2, 2.0**0.5)])
    return to_mandel(tensor) / (root[:, None] * root[None])


@full_precision
def directional(tensor: jax.Array, directions: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Compute Young's modulus and Poisson's ratio for uniaxial stress along given directions.

    With a unit vector n along the direction and the compliance S, the inverse of the tensor,

        E = 1 / (nn:S:nn),    nu = -E nn:S:(1 - nn) / (d - 1)

    are Young's modulus and Poisson's ratio; in 3-D nu is the mean over the transverse directions.
    Where a strain along n costs no energy, no stress along n can be in equilibrium: E is zero and
    nu NaN. A singular value of the tensor counts as zero where it is below 100 eps of the largest,
    with the machine precision eps.

    Args:
      tensor: (d, d, d, d), either A (second derivative of the energy by strain) or Birch's B
        (derivative of the stress by strain); B is what a tensile test measures.
      directions: (…, d), vectors of any length but zero.

    Returns:
      (E, nu), each of shape (…).
    """
    tensor = _check_tensor(tensor)
    d = tensor.shape[0]
    vectors = jnp.asarray(real_array("directions", directions), tensor.dtype)
    if vectors.ndim < 1 or vectors.shape[-1] != d:
        raise InputError(f"directions have shape {vectors.shape}: give an array (…, {d}).")
    # divided by the largest component first, so that the squares neither overflow nor underflow
    largest = jnp.max(jnp.abs(vectors), axis=-1, keepdims=True)
    if not isinstance(vectors, Tracer):
        sizes = np.asarray(largest)
        if not np.all((sizes > 0) & np.isfinite(sizes)):
            raise InputError(
                "a direction is zero or not finite: give finite vectors with a norm above zero."
            )
    n = vectors / largest
    n = n / jnp.linalg.norm(n, axis=-1, keepdims=True)
    # the unit stress nn in Mandel's notation, (…, m)
    along = jnp.einsum("...i,...j,aij->...a", n, n, basis(d))
    matrix = mandel(tensor)
    eps = float(jnp.finfo(tensor.dtype).eps)
    # which strains cost nothing is a discrete question, so it has no derivative
    left, singular, right = jnp.linalg.svd(jax.lax.stop_gradient(matrix))
    zero = singular <= 100.0 * eps * singular[0]
    # these strains get a stiffness, so that the solve is regular for all other directions
    scale = jnp.where(singular[0] > 0, singular[0], 1.0)
    filled = matrix + scale * (left * zero) @ right
    unresisted = jnp.linalg.norm((along @ left) * zero, axis=-1) > eps**0.5
    strain = jnp.linalg.solve(filled, along.reshape(-1, along.shape[-1]).T).T.reshape(along.shape)
    # nn:S:nn. It is finite also where a strain costs nothing, owing to ``filled``: in a derivative
    # a NaN would pass through where() below, although its entry is not taken.
    longitudinal = jnp.sum(strain * along, axis=-1)
    # tr(S:nn), from the traces of Mandel's basis; tr(S:nn) - nn:S:nn is the transverse strain
    volumetric = strain @ jnp.einsum("aii->a", basis(d))
    young = jnp.where(unresisted, 0.0, 1.0 / longitudinal)
    poisson = jnp.where(
        unresisted, jnp.nan, -(volumetric - longitudinal) / ((d - 1) * longitudinal)
    )
    return young, poisson


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Moduli(Portable, Shown):
    """Elastic moduli of a relaxed configuration, with the status of the linear solves behind them.

    A frozen dataclass and a jax pytree.

    Attributes:
      tensor: (d, d, d, d) the stiffness tensor A, with relaxed particles at imposed strain, in
        energy per volume; zero where all of it is round-off. ``bulk``, ``shear``, ``young`` and
        ``poisson`` are those of A: zero where they are round-off, and ratios of zeros are NaN.
      affine: (d, d, d, d) what A would be if particles followed the strain affinely.
      stress: (d, d) Cauchy stress, positive in tension.
      nonaffine: (m, n, d) displacements from the affine positions, for each of the
        m = d (d + 1) / 2 Mandel components of the strain; zero for rattlers.
      stats: statistics of the m linear solves, as arrays (m,). The error of the tensor is of the
        order of the residual squared. Where the solves are good, the status judges the moduli:
        FLOPPY, STIFFNESS_UNSETTLED or UNSTABLE where they are not those of a solid, SHAPE_HELD as
        a warning; see :func:`mdsens.mechanics.stability.verdict`.
      round_off: stiffnesses up to this size count as zero; see
        :func:`mdsens.mechanics.stability.resolution`.

    The properties ``bulk``, ``shear``, ``young``, ``poisson``, ``pressure``, ``birch`` (Birch's
    tensor, (d, d, d, d)), ``voigt`` (the same as a matrix: C11, C12, C44 of a cubic crystal),
    ``stability`` (the smallest eigenvalue of the symmetrized Birch tensor) and ``status`` (the
    worst status of the solves) are computed from these fields.
    """

    tensor: jax.Array
    affine: jax.Array
    stress: jax.Array
    nonaffine: jax.Array
    stats: SolveStats
    round_off: jax.Array

    @property
    def status(self) -> Status:
        """The worst status of the linear solves and of the moduli.

        The status cannot be read in code that jax compiles.
        """
        return Status.worst_of(self.stats.status)

    @property
    def birch(self) -> jax.Array:
        """Birch's tensor B (d, d, d, d), the derivative of the Cauchy stress by the strain.

        The particles are relaxed, as in the stiffness tensor A. The module :mod:`mdsens.elasticity`
        gives the equation of B in terms of A and the stress.
        """
        return cleared(birch(self.tensor, self.stress), self.round_off)

    @property
    def voigt(self) -> jax.Array:
        """Birch's tensor as the matrix (m, m) of Voigt's notation, m = 6 in 3-D and 3 in 2-D.

        These are the elastic constants that an experiment measures, in energy per volume:
        ``voigt[0, 0]``, ``voigt[0, 1]`` and ``voigt[3, 3]`` are C11, C12 and C44 of a cubic
        crystal. Where energies are in eV and lengths in angstroms, divide by ``GPa`` of this module
        for GPa. ``ms.elasticity.voigt`` takes any other tensor, such as ``affine``.
        """
        return voigt(self.birch)

    @property
    def pressure(self) -> jax.Array:
        """The pressure P = -tr(stress) / d."""
        return -jnp.trace(self.stress) / self.stress.shape[0]

    @property
    def bulk(self) -> jax.Array:
        """Bulk modulus K of the stiffness tensor A (second derivative of the energy by strain).

        Under a pressure P this is not -V dP/dV. That is the bulk modulus of Birch's tensor,
        ``isotropic(moduli.birch).bulk``.
        """
        return isotropic_part(self.tensor, self.round_off).bulk

    @property
    def shear(self) -> jax.Array:
        """Shear modulus G of the stiffness tensor A, averaged over directions."""
        return isotropic_part(self.tensor, self.round_off).shear

    @property
    def young(self) -> jax.Array:
        """Young's modulus E of the isotropic part of the stiffness tensor A."""
        return isotropic_part(self.tensor, self.round_off).young

    @property
    def poisson(self) -> jax.Array:
        """Poisson's ratio nu of the isotropic part of the stiffness tensor A."""
        return isotropic_part(self.tensor, self.round_off).poisson

    @property
    def stability(self) -> jax.Array:
        """The smallest eigenvalue of Birch's tensor, symmetrized.

        It is positive where no strain lowers the free enthalpy (Born's criterion).
        """
        return softest_strain(self.birch)

    _title = "Elastic moduli"

    def _voigt_rows(self) -> list[tuple[str, str]]:
        """Return the rows of the constants of a crystal, which a packing in 2-D does not need."""
        matrix = np.asarray(self.voigt)
        if matrix.shape != (6, 6):
            return []
        of_voigt = {
            "C11, C22, C33": matrix[[0, 1, 2], [0, 1, 2]],
            "C12, C13, C23": matrix[[0, 0, 1], [1, 2, 2]],
            "C44, C55, C66": matrix[[3, 4, 5], [3, 4, 5]],
        }
        return [
            (name, f"{', '.join(f'{value:.6g}' for value in values)} of Birch's tensor")
            for name, values in of_voigt.items()
        ]

    def _rows(self) -> list[tuple[str, str]]:
        of_a, of_affine, of_birch = (
            isotropic_part(x, self.round_off) for x in (self.tensor, self.affine, self.birch)
        )

        def line(name: str) -> str:
            a, b, c = (float(getattr(x, name)) for x in (of_a, of_birch, of_affine))
            return f"{a:.6g}; {b:.6g} in Birch's convention; {c:.6g} if affine"

        stability = f"{float(self.stability):.6g} of Birch's tensor: stable where positive"
        largest_residual = float(np.max(np.asarray(self.stats.residual)))
        return [
            ("pressure", f"{float(self.pressure):.6g} energy/volume, the unit of all moduli"),
            ("bulk modulus", line("bulk")),
            ("shear modulus", line("shear")),
            ("Young's modulus", line("young")),
            ("Poisson's ratio", line("poisson")),
            *self._voigt_rows(),
            ("smallest eigenvalue", stability),
            ("status", f"{self.status.name}: {self.status.sentence}"),
            ("residual", f"{largest_residual:.1e}, by {self.stats.solver}"),
        ]


def moduli(
    eq: Equilibrium | Linearization | System, *, solve: Method | None = None, throw: bool = True
) -> Moduli:
    """Compute the elastic moduli of a relaxed configuration at imposed strain.

    The cheapest derivative of the moduli by the parameters is :func:`gradient`, which takes one
    more linear solve. ``ms.gradient`` of a function of a System that calls ``moduli`` takes several
    solves and twice the compilation time, but also works for a batch.

    Args:
      eq: an Equilibrium or a Linearization; one factorization then serves all strains. Or a
        relaxed System: jax can then trace the function and differentiate it to any order, as in
        ``jax.grad`` through ``equilibrate``.
      solve: the linear solver; Auto() where None.
      throw: raise unless the status is good. For a System nothing is raised: the status is in
        ``stats`` of the result. If your function of a System returns only a number, this status
        is lost, and ``ms.gradient`` of your function only notices a NaN (NOT_FINITE). Young's
        modulus E and Poisson's ratio nu are NaN where the bulk and shear moduli are both zero or
        one of them is negative, which is the case for no solid.

    Returns:
      :class:`Moduli`.

    Raises:
      InputError: the boundaries are open, or ``eq`` is a batch or has constraints.
      ConvergenceError: ``eq`` is no minimum; a solve did not converge; the bulk or the shear
        modulus is zero to round-off (FLOPPY), in doubt (STIFFNESS_UNSETTLED) or negative
        (UNSTABLE). The message gives both moduli, and ``throw=False`` returns the tensor, whose
        entries are valid all the same.

    Example:
      >>> import mdsens as ms
      >>> ms.enable_x64()
      >>> m = ms.elasticity.moduli(ms.minimize(ms.load_system("seed_packing_2d", seed=0)))
      >>> print(f"bulk {float(m.bulk):.4f}, shear {float(m.shear):.4f}")
      bulk 0.9205, shear 0.2676
    """
    if isinstance(eq, System):
        _check_cell(eq)
        return _moduli_of_system(eq, Auto() if solve is None else solve)
    if isinstance(eq, Equilibrium):
        _check_cell(eq.system)
    lin = linearized(eq, solve)
    _check_cell(lin.system)
    require_sound(lin, eq, throw)
    strains = jnp.asarray(basis(lin.system.dimension), lin.system.positions.dtype)
    # all m strains at once, so that they share one factor of the Hessian
    strained = solve_derivative(STRAIN, lin, strains, many=True)
    result = _assemble_moduli(lin.system, strained.value, strained.stats, lin.equilibrium.max_force)
    if throw:
        where = where_not_finite(result.status, lin.system)
        message = f"elastic moduli by {result.stats.solver}{where}{_describe_moduli(result)}"
        raise_for_status(result.status, message, result)
    return result


def _describe_moduli(result: Moduli) -> str:
    """Describe the moduli in words, for the error that the configuration is no solid."""
    if result.status not in (Status.FLOPPY, Status.STIFFNESS_UNSETTLED, Status.UNSTABLE):
        return ""
    return (
        f": bulk modulus {float(result.bulk):.3g}, shear modulus {float(result.shear):.3g},"
        f" smallest eigenvalue of Birch's tensor {float(result.stability):.3g} (throw=False gives"
        " them)"
    )


def gradient(
    observable: Callable[[Moduli], Any],
    eq: Equilibrium | Linearization,
    *,
    solve: Method | None = None,
    throw: bool = True,
) -> ParameterGradient:
    """Compute the total derivative of a function of the elastic moduli by all parameters.

    The cost is that of the linear solves of ``moduli``, and one adjoint solve for each number that
    ``observable`` returns. The relaxed energy is stationary in the non-affine displacements, so
    they may be kept constant while the tensor is differentiated. The remaining part of the
    derivative is due to the motion of the minimum, which the adjoint solve gives.

    Args:
      observable: function of Moduli that returns a number or an array, such as
        ``lambda m: m.poisson``; jax must be able to trace the function. It may use the tensors and
        the stress; the non-affine displacements have no derivative here. To differentiate them too,
        take ``moduli`` of a System.
      eq, solve, throw: the minimum, the linear solver, and whether to raise an error, as in
        ``ms.gradient``.

    Returns:
      a :class:`~mdsens.ParameterGradient`, whose ``value`` is a dict shaped like the parameters, as
      that of ``ms.gradient``. In a symmetric matrix of species pairs, each of the two entries of a
      pair has half of the derivative; the result's method ``component`` gives the whole.
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
    """Compute the total derivative of a function of the elastic moduli along one direction.

    The direction is one in parameter space. This is the forward mode of ``gradient``: it takes the
    linear solves of ``moduli`` and one more, however many numbers ``observable`` returns. If the
    cell was relaxed, it responds to the parameters, and ``dparams`` may contain its load, such as
    the pressure.

    Args:
      observable, eq, solve, throw: the function of the moduli, the minimum, the linear solver, and
        whether to raise an error, as in ``gradient``.
      dparams: the direction, changes by parameter name, as in ``ms.jvp``; the change of a matrix of
        species pairs must be symmetric.

    Returns:
      a :class:`~mdsens.DirectionalDerivative`, whose ``value`` has the shape of what ``observable``
      returns.
    """
    lin, observe = _prepare_observable(observable, eq, solve)
    tangent = full_tangent(lin.system, dparams, lin.params)
    require_sound(lin, eq, throw)
    elastic = moduli(lin, throw=throw)
    moved = derivatives.jvp(lin, dparams, throw=throw)
    # the chain rule: parameters -> motion of the minimum -> tensors -> observable
    # ``moved`` is in the form for users; ``unknown`` takes out the motion with the cell again.
    rates = _push_tensors(
        lin.traced(tuple(dparams)), elastic, lin.structure.unknown(lin, moved.value), tangent
    )
    _, rate = jax.jvp(
        _function_of_tensors(observe, elastic),
        (elastic.tensor, elastic.affine, elastic.stress),
        rates,
    )
    # good solves do not exclude a derivative of the potential or the observable that is not finite
    finite = jnp.all(jnp.isfinite(rate))
    result = DirectionalDerivative(
        value=rate,
        stats=status_of_finite(moved.stats, finite),
        max_force=moved.max_force,
        rattlers=moved.rattlers,
    )
    result = _with_status_of_moduli(elastic, result)
    if throw:
        raise_for_status(result.status, "jvp of elastic moduli", result)
    return result


def value_and_gradient(
    observable: Callable[[Moduli], Any],
    eq: Equilibrium | Linearization,
    *,
    solve: Method | None = None,
    throw: bool = True,
) -> tuple[jax.Array, ParameterGradient]:
    """Compute the value of a function of the elastic moduli, and its derivative by all parameters.

    The arguments and the derivative are those of :func:`gradient`.
    """
    lin, observe = _prepare_observable(observable, eq, solve)
    require_sound(lin, eq, throw)
    elastic = moduli(lin, throw=throw)
    value, pull = jax.vjp(
        _function_of_tensors(observe, elastic), elastic.tensor, elastic.affine, elastic.stress
    )
    # derivatives of each number of the observable by (tensor, affine, stress)
    weights = jax.vmap(lambda w: pull(w))(unit_cotangents(lin, value))
    core = lin.traced(tuple(lin.params))

    def pull_at(lin: Linearization) -> tuple[Unknowns, dict[str, Any]]:
        return _pull_tensors(lin, elastic, weights)

    cotangents, direct = pull_at(core)
    # the last argument: cotangents beside the minimum, where those at the minimum are round-off
    result = total_derivative(
        lin, value, cotangents, direct, throw, lambda: pull_at(aside(core))[0]
    )
    return value, _with_status_of_moduli(elastic, result)


def _with_status_of_moduli(elastic: Moduli, result: D) -> D:
    """Return a derivative of the elastic moduli whose status takes account of the moduli's status.

    The status of the result is the worse of the two. But where the status of the moduli is not
    good, the result always has this status, because it names the cause.

    Args:
      elastic: the moduli.
      result: the derivative.
    """
    worst = elastic.status
    # the status of the derivative is an array with one entry for each solve
    code = worse(result.stats.status, worst.value)
    if not worst.good:
        code = jnp.full_like(result.stats.status, worst.value)
    return dataclasses.replace(result, stats=dataclasses.replace(result.stats, status=code))


def _prepare_observable(
    observable: Callable[[Moduli], Any],
    eq: Equilibrium | Linearization,
    solve: Method | None,
) -> tuple[Linearization, Callable[[Moduli], jax.Array]]:
    """Linearize a minimum, and check the user's function of the elastic moduli.

    The function is checked on the shapes of the moduli alone, before any linear solve. Both the
    linearization and the function are returned.

    Args:
      observable: the user's function.
      eq: the minimum.
      solve: the linear solver; the default one where None.
    """
    if not callable(observable):
        raise InputError(
            "`observable` is not a function: give a function of Moduli, such as"
            " lambda m: m.poisson."
        )
    if isinstance(eq, Equilibrium):
        _check_cell(eq.system)
    lin = linearized(eq, solve)
    _check_cell(lin.system)
    function = Traceable("the function of the moduli", observable)

    def observe(moduli: Moduli) -> jax.Array:
        return numbers(function(moduli))

    unit_cotangents(lin, jax.eval_shape(observe, _abstract_moduli(lin.system)))
    return lin, observe


def _abstract_moduli(system: System) -> Moduli:
    """Return elastic moduli with the shapes and types of their arrays, but without values.

    A user's function of the moduli is checked on them before anything is computed.
    """
    n, d = system.positions.shape
    dtype = system.positions.dtype
    m = d * (d + 1) // 2
    # the m solves of the Mandel strains
    counts = jnp.zeros(m, jnp.int32)
    sizes = jnp.zeros(m, dtype)
    stats = SolveStats(status=counts, residual=sizes, iterations=counts, dropped=sizes)
    motion = jnp.zeros((m, n, d), dtype)
    return jax.eval_shape(_assemble_moduli, system, motion, stats, jnp.zeros((), dtype))


def _function_of_tensors(
    observe: Callable[[Moduli], jax.Array], elastic: Moduli
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Turn a function of the elastic moduli into a function of their three tensors alone.

    The tensors are (tensor, affine, stress): the relaxed and the affine stiffness tensor, and the
    stress. All other fields of the moduli, such as the non-affine displacements, are constants of
    the function.

    Args:
      observe: the function of the moduli.
      elastic: the moduli.
    """

    def observe_tensors(tensor: jax.Array, affine: jax.Array, stress: jax.Array) -> jax.Array:
        return observe(dataclasses.replace(elastic, tensor=tensor, affine=affine, stress=stress))

    return observe_tensors


def _tensors_of_unknowns(
    lin: Linearization, elastic: Moduli
) -> Callable[[Unknowns, Mapping[str, Any]], tuple[jax.Array, ...]]:
    """Return a function of positions, strain and parameters that computes (tensor, affine, stress).

    These are the relaxed and the affine stiffness tensor and the stress. The non-affine
    displacements are kept constant in the function, since the relaxed energy is stationary in them.

    Args:
      lin: the linearization of the minimum.
      elastic: the moduli at the minimum.
    """

    def tensors_at(x: Unknowns, params: Mapping[str, Any]) -> tuple[jax.Array, ...]:
        # lin.moved keeps the neighbor list, so that this can be traced
        tensor, affine, stress = tensors(lin.moved(lin.system, x, params), elastic.nonaffine)
        return cleared(tensor, elastic.round_off), affine, stress

    return tensors_at


@compiled
def _push_tensors(
    lin: Linearization, elastic: Moduli, x: Unknowns, params: Mapping[str, Any]
) -> tuple[jax.Array, ...]:
    """Differentiate the two stiffness tensors and the stress along one direction.

    The two are the relaxed and the affine stiffness tensor. The direction is a displacement of the
    particles together with a change of the parameters.

    Args:
      lin: the linearization of the minimum.
      elastic: the moduli at the minimum.
      x: the displacement of the particles; for a relaxed cell also the strain of the cell.
      params: the change of the parameters, by name.
    """
    primals = (lin.unknowns, dict(lin.params))
    return jax.jvp(_tensors_of_unknowns(lin, elastic), primals, (x, dict(params)))[1]


@compiled
def _pull_tensors(
    lin: Linearization, elastic: Moduli, weights: tuple[jax.Array, ...]
) -> tuple[Unknowns, dict[str, Any]]:
    """Differentiate weighted sums of the entries of the stiffness tensors and of the stress.

    The derivatives are those by the parameters and by the unknowns: the positions and, for a
    relaxed cell, the strain of the cell.

    Args:
      lin: the linearization of the minimum.
      elastic: the moduli at the minimum.
      weights: weights of the entries of (tensor, affine, stress), the relaxed and the affine
        stiffness tensor and the stress; with a leading axis over the sums.
    """
    pull = jax.vjp(_tensors_of_unknowns(lin, elastic), lin.unknowns, lin.params)[1]
    return jax.vmap(lambda w: pull(w))(weights)


def _check_cell(system: System) -> None:
    """Raise an error for a system without elastic moduli: under constraints, open, or a batch."""
    require_unconstrained(system, "elasticity")
    require_volume(system, "elastic moduli need")
    if system.batch is not None:
        raise InputError(
            f"moduli are of one system, and this is a batch of {system.batch}: loop over"
            " ms.unstack(batch), or use jax.vmap for the moduli; for a derivative, take"
            " ms.gradient(lambda s: ms.elasticity.moduli(s).bulk, batch)."
        )


def _assemble_moduli(
    system: System, motion: jax.Array, stats: SolveStats, max_force: jax.Array
) -> Moduli:
    """Compute the elastic moduli of a configuration from its non-affine displacements.

    The status of the moduli is the worse of two: the status of the linear solves, and the status
    that says whether the stiffness is that of a solid.

    Args:
      system: the backbone, that is, the system without the contacts of rattlers.
      motion: (m, n, d), the non-affine displacements under each of the m Mandel strains.
      stats: statistics of the linear solves for ``motion``.
      max_force: the largest force left on a particle.
    """
    response = solid(system, motion, max_force, stats.residual)
    return Moduli(
        tensor=response.tensor,
        affine=response.affine,
        stress=response.stress,
        nonaffine=motion,
        stats=dataclasses.replace(stats, status=worse(stats.status, response.status)),
        round_off=response.round_off,
    )


# compiled, so that functions derived from it are traced and compiled once: without this,
# ms.gradient of the moduli of a batch did not end
@compiled(static_argnames="solve", loops=True)
def _moduli_of_system(system: System, solve: Method) -> Moduli:
    """Compute the elastic moduli of a relaxed System in code that jax can trace and differentiate.

    The status is an array in ``stats``, since traced code cannot raise an error.
    """
    constant = jax.lax.stop_gradient(system)
    force_left = max_force(constant)
    backbone, net, null = analyze_rigidity(system, force_left)
    operator = hessian_operator(backbone, null)

    def relax_under(strain: jax.Array) -> tuple[jax.Array, SolveStats]:
        forces = forces_of_strain(backbone, strain)
        x, stats = linear_solve(operator, Unknowns(forces), solve)
        # forces that are round-off have a large share along translations, which deserves no
        # warning. They are solved for all the same, since their derivatives need not vanish.
        silent = strain_is_silent(constant, forces) & (
            stats.status == Status.NULL_COMPONENT_DROPPED.value
        )
        code = jnp.where(silent, Status.CONVERGED.value, stats.status)
        return x.positions, dataclasses.replace(stats, status=code)

    strains = jnp.asarray(basis(system.dimension), system.positions.dtype)
    motion, stats = jax.vmap(relax_under)(strains)
    # a configuration that is no minimum comes before anything that the solves report
    code = jnp.where(net.unjammed, Status.UNJAMMED.value, Status.CONVERGED.value)
    code = jnp.where(
        unrelaxed(constant, force_left, net.mean_force), Status.UNCONVERGED.value, code
    )
    stats = dataclasses.replace(
        stats, status=jnp.where(code != Status.CONVERGED.value, code, stats.status)
    )
    return _assemble_moduli(backbone, motion, stats, force_left)
