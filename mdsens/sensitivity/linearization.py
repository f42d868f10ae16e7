"""The linearization of a minimum: the Hessian, its null space and the cell, for derivatives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mdsens._util.attributes import Named
from mdsens._util.compilation import compiled
from mdsens._util.environment import require_sound_jax
from mdsens._util.errors import InputError, raise_for_status
from mdsens._util.outcome import is_good
from mdsens._util.portable import Portable
from mdsens._util.pytree import matching
from mdsens._util.suggestions import did_you_mean
from mdsens._util.validation import real_array, require_host, short
from mdsens.implicit.linear import Auto, Direct, Method, check_method
from mdsens.mechanics import lagrangian
from mdsens.mechanics.cell import Cell
from mdsens.mechanics.contacts import Network
from mdsens.mechanics.hessian import assembles
from mdsens.mechanics.hessian_blocks import BlockRows
from mdsens.mechanics.hessian_factor import ONE_SOLVE_3D, HessianFactor, factorizes
from mdsens.mechanics.kkt_factor import KKT
from mdsens.mechanics.kkt_operator import about_to_switch, constrained_null_space
from mdsens.mechanics.load import differentiated
from mdsens.mechanics.null_space import NullSpace
from mdsens.mechanics.rigidity import analyze_rigidity
from mdsens.mechanics.status import Status, status_at
from mdsens.mechanics.units import RELAXED, doubtful_stiffness, natural_units, unrelaxed
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.system import System
from mdsens.potentials.parameters import check_symmetric
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity.structure import (
    ConstrainedStructure,
    FixedCellStructure,
    RelaxedCellStructure,
    Structure,
)

__all__ = [
    "Linearization",
    "by_factor",
    "changes",
    "force_left",
    "full_tangent",
    "linearized",
    "linearize",
    "require_sound",
]

Params = Mapping[str, Any]
# What to do where a change of the load is asked for, and the cell is not under such a load.
_HINTS = {
    "pressure": (
        "the cell of this minimum is not at a pressure; relax a cell that follows a pressure by"
        " ms.minimize(system, pressure=P)."
    ),
    "stress": (
        "the cell of this minimum is not at a stress; relax a cell that follows a stress by"
        " ms.minimize(system, cell=ms.relaxation.AtStress(stress))."
    ),
}
_HINTS["volume"] = _HINTS["deviator"] = (
    "the cell of this minimum is not relaxed at a volume; do so by ms.minimize(system,"
    " cell=ms.relaxation.AtVolume())."
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linearization(Portable, Named):
    """A minimum with what all its derivatives have in common: null space, contact network, factor.

    Functions that differentiate a minimum, such as ``jvp`` and ``gradient``, take a Linearization
    in place of the minimum.

    Attributes:
      equilibrium: the minimum.
      system: the backbone of the configuration, that is, the system without the contacts of
        rattlers. Derivatives are those of the backbone's energy.
      network: contacts, clusters and rattlers.
      null: the null space of the Hessian: translations, motions of rattlers, rotations of free
        clusters.
      solve: the linear solver.
      structure: the kind of minimum (in a fixed or relaxed cell, or under constraints), which says
        what the unknowns are and which condition is zero at the minimum; see
        :mod:`mdsens.sensitivity.structure`.
      blocks: the Hessian as d x d blocks of pairs, for compiled products with it; None where it is
        not assembled.
      factor: the Hessian as a sparse matrix outside of compiled code, with a factor that is
        computed when it is first needed; None in traced code and for potentials that are no sum
        over pairs. Under constraints, the matrix of the whole system of equations with its factor.
      force_status: UNCONVERGED where the largest force left on a particle is not small compared
        with the mean pair force; CONTACTS_UNSETTLED where particles just touch, and the largest
        force left on a particle leaves open whether they are in contact; INDEFINITE where a mode
        has negative stiffness; else CONVERGED.
    """

    equilibrium: Equilibrium
    system: System
    network: Network
    null: NullSpace
    solve: Method = dataclasses.field(default=Auto(), metadata={"static": True})
    structure: Structure = dataclasses.field(default=FixedCellStructure())
    blocks: BlockRows | None = None
    factor: HessianFactor | KKT | None = dataclasses.field(
        default=None, metadata={"static": True}, compare=False
    )
    force_status: jax.Array | None = None

    @property
    def cell(self) -> Cell | None:
        """The cell where it was relaxed, with its load and stiffness; None where it is fixed."""
        return getattr(self.structure, "cell", None)

    @property
    def multipliers(self) -> dict[str, jax.Array] | None:
        """Lagrange multipliers of the constraints g = 0, by name; None without such constraints."""
        return getattr(self.structure, "multipliers", None)

    @property
    def constrained(self) -> bool:
        """Whether the system has constraints."""
        return isinstance(self.structure, ConstrainedStructure)

    @property
    def params(self) -> dict[str, Any]:
        """The parameters, by name, by which the minimum can be differentiated.

        They are the parameters of the system except those that relax under constraints, and those
        of the load under which the cell was relaxed: ``pressure``; ``stress``; or ``volume`` and
        ``deviator``.
        """
        return self.structure.params(self.system)

    @property
    def unknowns(self) -> Unknowns:
        """The values at the minimum of the unknowns of its equations.

        They are the positions; in a relaxed cell also its strain, zero at the minimum; under
        constraints also the multipliers and the parameters that relax.
        """
        return self.structure.unknowns(self.system)

    def condition(self, x: Unknowns, params: Params) -> Unknowns:
        """Evaluate F(x, params), the condition that is zero at the minimum.

        In a fixed cell F is dU/dR, the derivative of the energy by the positions. In a relaxed cell
        F also contains the stress that the load leaves unbalanced: at a pressure, the derivative of
        the enthalpy by the strain of the cell. Under constraints F
        is dL/dx, the derivative of the Lagrangian L = U + lambda . g, and the values g of the
        constraints' equations; for a coordinate that is pinned or at a bound, its distance from
        the prescribed value takes the place of dL/dx.

        Args:
          x: the unknowns: positions, and strain of the cell or multipliers where there are any.
          params: all parameters by name.
        """
        return self.structure.condition(self, x, params)

    def moved(self, system: System, x: Unknowns, params: Params) -> System:
        """Return the system with other unknowns and other parameters, and the same neighbor list.

        This function can be traced by jax.

        Args:
          system: the system.
          x: the unknowns: positions, and strain of the cell or parameters that relax, if there are
            any.
          params: the other parameters, by name.
        """
        return self.structure.moved(system, x, params)

    def traced(self, differentiated: Sequence[str]) -> Linearization:
        """Return the linearization for compiled code, without the factor of the Hessian.

        The potential is in its cheapest form for the derivatives. The system of the equilibrium has
        no neighbor list: derivatives are those of the backbone, and with the capacity of another
        list jax would compile them again.

        Args:
          differentiated: names of the parameters that derivatives are to be taken by.
        """
        # parameters that constraints relax are unknowns, and are differentiated too
        names = [*differentiated, *lagrangian.relaxed(self.system)]
        potential = self.system.potential.specialize(self.system.params, names)
        # The factor is a static field, by which jax looks up compiled code: with it, derivatives
        # would be compiled anew for each minimum.
        whole = self.equilibrium.system.replace(neighbors=None)
        return dataclasses.replace(
            self,
            equilibrium=dataclasses.replace(self.equilibrium, system=whole),
            system=self.system.replace(potential=potential),
            factor=None,
        )

    @property
    def status(self) -> Any:
        """CONVERGED, or the reason why no derivative can be taken at this minimum.

        It is a member of :class:`~mdsens.Status`; for a batch, ``code``.
        """
        return status_at(self.code)

    @property
    def code(self) -> Any:
        """The code of the status, an int32 array.

        The status is the first bad one of four: that of the minimization; UNJAMMED where no
        particle has enough contacts; ``force_status``, on the force left and on negative modes; and
        that of the cell or of the constraints.
        """
        status = _status_of_minimum(self.equilibrium.code, self.network.unjammed)
        for other in (self.force_status, self.structure.status):
            if other is None:
                continue
            # numpy on the host, jax in traced code
            xp = jnp if isinstance(status, Tracer) or isinstance(other, Tracer) else np
            status = xp.where(status != Status.CONVERGED.value, status, other)
        return status


def by_factor(system: System, solve: Method, many: bool = False) -> bool:
    """Return whether a linear solver is to use the sparse factor of the Hessian of a system.

    The result is False where the Hessian of the system cannot be factorized.

    Args:
      system: the system.
      solve: the solver. Direct always uses the factor. Auto uses it only on a CPU, and not for a
        single solve of a large system in 3-D, where many entries that are zero in the Hessian are
        not zero in its factor.
      many: whether there are many right-hand sides.
    """
    pays = many or system.dimension == 2 or system.n <= ONE_SOLVE_3D
    wanted = isinstance(solve, Direct) or (
        isinstance(solve, Auto) and pays and jax.default_backend() == "cpu"
    )
    # Under constraints the KKT itself decides, by its size, whether it is factorized.
    return wanted and (bool(system.constraints) or factorizes(system))


def _status_of_minimum(status: np.ndarray | jax.Array, unjammed: np.ndarray | jax.Array) -> Any:
    """Return the status of the minimization where it is bad, else UNJAMMED or CONVERGED.

    Args:
      status: the status of the minimization.
      unjammed: True where no particle has enough contacts.
    """
    xp = jnp if isinstance(unjammed, Tracer) else np
    code = xp.where(unjammed, Status.UNJAMMED.value, Status.CONVERGED.value)
    return xp.where(is_good(status), code, status)


@compiled
def force_left(system: System, net: Network, largest: jax.Array) -> jax.Array:
    """Judge a minimum by the largest force left on a particle; return a status.

    The status is UNCONVERGED where the force is not small compared with the mean pair force. It is
    CONTACTS_UNSETTLED where particles just touch and the force is so large that it is not known
    whether they are in contact. Else it is CONVERGED. For a batch, the result is an array with the
    status of each minimum.

    Args:
      system: the configuration.
      net: its contact network.
      largest: the largest force left on a particle.
    """
    if system.batch is not None:
        return jax.vmap(force_left)(system, net, largest)
    code = jnp.where(net.touching, Status.CONTACTS_UNSETTLED.value, Status.CONVERGED.value)
    return jnp.where(
        unrelaxed(system, largest, net.mean_force), Status.UNCONVERGED.value, code
    ).astype(jnp.int32)


def _force_left_of_one(eq: Equilibrium, net: Network) -> Any:
    """Judge one minimum by the largest force left on a particle; return a status.

    The status is the one that ``force_left`` returns. But where the force is small compared with
    the mean contact force and no particles just touch, it is CONVERGED without the compiled code of
    ``force_left``, which compares the force with the scales of the potential.

    Args:
      eq: the minimum.
      net: its contact network.
    """
    mean_force = np.asarray(net.mean_force)
    if np.asarray(eq.max_force) <= RELAXED * mean_force and not np.asarray(net.touching):
        return np.int32(Status.CONVERGED.value)
    # else the scales of the potential decide, in compiled code
    return force_left(eq.system, net, eq.max_force)


def linearize(eq: Equilibrium, solve: Method = Auto(), throw: bool = True) -> Linearization:
    """Find contact network, rattlers and null space of a minimum, once for many derivatives.

    Args:
      eq: a minimum, from ``minimize``; not a batch.
      solve: the linear solver, with its options: GMRES(), CG(), MINRES(), BiCGSTAB(), Direct() and
        others of mdsens.implicit, or Auto(), which chooses one.
      throw: whether to raise an error where the minimum cannot be differentiated; with False, the
        status of every derivative gives the reason.

    Returns:
      a :class:`Linearization`, which functions such as ``jvp`` take in place of the minimum.

    Raises:
      ConvergenceError: the minimum is not converged, has no contacts (UNJAMMED), or cannot be
        differentiated for another reason, which the message gives.

    Example:
      >>> import mdsens as ms
      >>> ms.enable_x64()
      >>> eq = ms.minimize(ms.load_system("seed_packing_2d", seed=0))
      >>> lin = ms.linearize(eq)  # the Hessian is factorized here, once
      >>> large, small = (ms.jvp(lin, {"sigma": s}).value for s in ([1.0, 0.0], [0.0, 1.0]))
    """
    require_sound_jax()
    if not isinstance(eq, Equilibrium):
        raise InputError(
            f"linearize got a {type(eq).__name__}: give the Equilibrium that ms.minimize returns."
        )
    check_method(solve)
    if eq.system.batch is not None:
        raise InputError(
            f"linearize takes one minimum and got a batch of {eq.system.batch}: give one minimum"
            " of the batch, ms.unstack(eq)[0]."
        )
    backbone, net, null = analyze_rigidity(eq.system, eq.max_force, eq.contacts_needed)
    if eq.system.constraints:
        return _linearize_constrained(eq, backbone, net, null, solve, throw)
    null = null.simplified()
    factor = HessianFactor(backbone, null, eq.order)
    # a saddle of order k must have exactly k negative modes
    if eq.order and factor.unstable(eq.order + 1) != eq.order:
        eq = dataclasses.replace(eq, code=jnp.asarray(Status.NOT_A_SADDLE.value, jnp.int32))
    force_status = _judge_force_and_modes(eq, net, factor, solve)
    structure = FixedCellStructure()
    if eq.load is not None:
        structure = RelaxedCellStructure(Cell.of(backbone, factor, eq.load, np.asarray(eq.strains)))
    lin = Linearization(
        equilibrium=eq,
        system=backbone,
        network=net,
        null=null,
        solve=solve,
        structure=structure,
        factor=factor if assembles(backbone) else None,
        force_status=force_status,
    )
    if throw:
        raise_for_status(lin.status, "this minimum cannot be differentiated", lin)
    return lin


def _judge_force_and_modes(
    eq: Equilibrium, net: Network, factor: HessianFactor, solve: Method
) -> Any:
    """Judge a minimum by the force left and by modes of negative stiffness; return a status.

    The status is that of ``force_left``; or INDEFINITE where that is good and a mode has negative
    stiffness.

    Args:
      eq: the minimum.
      net: its contact network.
      factor: the Hessian, with its factor.
      solve: the linear solver of the derivatives.
    """
    force_status = _force_left_of_one(eq, net)
    # Negative modes are looked for here unless the minimization has done so (``examined``),
    # ``linearize`` has counted them (a saddle), or every solve counts them by a factor.
    examined = bool(np.all(eq.examined)) or eq.order > 0 or by_factor(factor.system, solve)
    if examined or int(force_status) != Status.CONVERGED:
        return force_status
    # without contacts, or with NaN positions, the status is bad already and modes mean nothing
    if not bool(net.unjammed) and np.isfinite(np.asarray(eq.positions)).all():
        # a negative stiffness below what the force left can add is in doubt, and is no saddle yet
        floor = doubtful_stiffness(eq.max_force, natural_units(eq.system)[0])
        if factor.negative_mode(floor) is not None:
            return jnp.asarray(Status.INDEFINITE.value, jnp.int32)
    return force_status


def _linearize_constrained(
    eq: Equilibrium, backbone: System, net: Network, null: NullSpace, solve: Method, throw: bool
) -> Linearization:
    """Linearize a minimum under constraints.

    Args:
      eq: the minimum.
      backbone: the system without the contacts of rattlers.
      net: the contact network.
      null: the null space of the Hessian without constraints.
      solve: the linear solver.
      throw: whether to raise an error where the minimum cannot be differentiated.
    """
    multipliers = lagrangian.unknowns_of(backbone, eq.multipliers).multipliers
    # of the motions of the null space, constraints prevent some
    null = constrained_null_space(backbone, net, null, multipliers)
    factor = KKT(backbone, null, multipliers)
    status = Status.CONVERGED
    # a coordinate about to meet or leave its bound: the derivative differs on the two sides
    if about_to_switch(eq.system, eq.multipliers, null, float(eq.max_force)):
        status = Status.DEGENERATE_CONSTRAINT
    # the graver status replaces the other
    if factor.redundant:
        status = Status.REDUNDANT_CONSTRAINTS
    lin = Linearization(
        equilibrium=eq,
        system=backbone,
        network=net,
        null=null,
        solve=solve,
        structure=ConstrainedStructure(multipliers, jnp.asarray(status.value, jnp.int32)),
        factor=factor,
    )
    if throw:
        raise_for_status(lin.status, "this minimum cannot be differentiated", lin)
    return lin


def linearized(eq: Equilibrium | Linearization, solve: Method | None) -> Linearization:
    """Linearize a minimum for a given linear solver.

    Args:
      eq: the minimum; :func:`require_sound` checks whether it can be differentiated. If ``eq`` is a
        Linearization, it is returned with ``solve`` as its solver.
      solve: the solver; where None, Auto() or the solver of the Linearization.
    """
    if solve is not None:
        check_method(solve)
    if isinstance(eq, Linearization):
        return eq if solve is None else dataclasses.replace(eq, solve=solve)
    if not isinstance(eq, Equilibrium):
        raise InputError(
            f"for the minimum, got a {type(eq).__name__}: give the Equilibrium that ms.minimize"
            " returns, or a Linearization."
        )
    require_host(
        "a function of an Equilibrium",
        "call it outside of the traced function, or differentiate ms.equilibrate there",
        eq,
    )
    return linearize(eq, Auto() if solve is None else solve, throw=False)


def require_sound(lin: Linearization, eq: Equilibrium | Linearization, throw: bool) -> None:
    """Raise an error where a minimum cannot be differentiated, if ``throw`` is True.

    Call this function after the other arguments of the user are checked, so that errors in the
    arguments are reported first.

    Args:
      lin: the linearization of the minimum.
      eq: what the user gave, the minimum or its Linearization. For a Linearization no error is
        raised, since the user has already chosen in ``linearize`` whether to raise.
      throw: whether to raise.
    """
    if throw and isinstance(eq, Equilibrium):
        raise_for_status(lin.status, "this minimum cannot be differentiated", lin)


def full_tangent(system: System, dparams: Params, params: Params | None = None) -> dict[str, Any]:
    """Return changes of all parameters by name: the given ones, checked, and zeros for the others.

    Args:
      system: the system.
      dparams: the given changes by parameter name; that of a tree of arrays, such as a network's
        weights, is a tree of the same structure.
      params: all parameters by name; where None, those of the system. For a Linearization give its
        ``params``, which contains the load on a relaxed cell.
    """
    partial = changes(system, dparams, params)
    valid = system.params if params is None else params

    def no_change(value: Any) -> np.ndarray:
        return np.zeros(value.shape, value.dtype)

    return {
        name: partial[name] if name in partial else jax.tree.map(no_change, value)
        for name, value in valid.items()
    }


def changes(system: System, dparams: Params, params: Params | None = None) -> dict[str, Any]:
    """Check a user's changes of some parameters, and convert them to the parameters' type.

    Names, shapes and symmetry are checked, and that the changes are finite.

    Args:
      system: the system.
      dparams: the changes by parameter name; that of a tree of arrays is a tree of the same
        structure.
      params: all parameters by name; where None, those of the system. For a Linearization give its
        ``params``, which contains the load on a relaxed cell.
    """
    valid = system.params if params is None else params
    paired = {parameter.name for parameter in differentiated(system, valid) if parameter.paired}
    if not isinstance(dparams, Mapping):
        raise InputError(
            f"dparams is a {type(dparams).__name__}: give a dict of parameter names and their"
            " changes."
        )
    for name in dparams:
        if name not in valid:
            hint = _HINTS.get(name, did_you_mean(name, valid))
            raise InputError(f"{name!r} is no parameter of {system.potential.name}: {hint}")

    def checked(name: str, change: object, value: Any) -> Any:
        array = _checked_change(name, change, value.shape)
        if name in paired:
            array = _symmetric_change(system, name, array)
        return array.astype(value.dtype)

    return {
        name: matching(checked, change, valid[name], name, "dparams")
        for name, change in dparams.items()
    }


def _symmetric_change(system: System, name: str, change: Any) -> Any:
    """Make a change of a symmetric matrix symmetric to the last bit; refuse one that is not.

    Args:
      system: the system.
      name: name of the parameter: a matrix of species pairs, or a stress on the cell.
      change: the change of the parameter; traced arrays are returned as they are.
    """
    if name in system.params or isinstance(change, Tracer):
        return check_symmetric(f"dparams[{name!r}]", change)
    array = np.asarray(change, float)
    transposed = np.swapaxes(array, -1, -2)
    # 1e-13 is some eps, the round-off of the computation that made the change
    if np.max(np.abs(array - transposed)) > 1e-13 * np.max(np.abs(array)):
        raise InputError(
            f"dparams[{name!r}] is {short(array.tolist())}, which is not symmetric: give a"
            " symmetric change of the stress."
        )
    return 0.5 * (array + transposed)


def _checked_change(name: str, change: object, shape: tuple[int, ...]) -> Any:
    """Check that a change has the parameter's shape and is finite; return it as an array.

    Args:
      name: name of the parameter, or of a leaf of its tree.
      change: the change that the user gave.
      shape: shape of the parameter.
    """
    array = real_array(f"dparams[{name!r}]", change)
    if array.shape != shape:
        raise InputError(
            f"dparams[{name!r}] has shape {array.shape}: the parameter has {shape}; give a change"
            " of that shape."
        )
    if not isinstance(array, Tracer) and not np.isfinite(np.asarray(array, float)).all():
        raise InputError(f"dparams[{name!r}] is not finite: give finite changes.")
    return array
