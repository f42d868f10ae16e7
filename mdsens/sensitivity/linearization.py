"""A minimum made ready to be differentiated: its condition, null space and, where it responds, its
cell.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mdsens._util.attributes import Named
from mdsens._util.environment import require_sound_jax
from mdsens._util.errors import InputError, raise_for_status
from mdsens._util.outcome import is_good
from mdsens._util.portable import Portable
from mdsens._util.validation import real_array, require_host
from mdsens.implicit.linear import Auto, Direct, Method, check_method
from mdsens.mechanics import lagrangian
from mdsens.mechanics.cell import Cell
from mdsens.mechanics.contacts import Network
from mdsens.mechanics.hessian import Unknowns
from mdsens.mechanics.hessian_blocks import BlockRows
from mdsens.mechanics.hessian_factor import ONE_SOLVE_3D, HessianFactor, factorizes
from mdsens.mechanics.kkt_factor import KKT
from mdsens.mechanics.kkt_operator import about_to_switch, constrained_null_space
from mdsens.mechanics.null_space import NullSpace
from mdsens.mechanics.rigidity import analyze_rigidity
from mdsens.mechanics.status import Status
from mdsens.mechanics.units import RELAXED, doubtful_stiffness, natural_units, unrelaxed
from mdsens.model.system import System, parameters_of
from mdsens.potentials.parameters import check_symmetric
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity.structure import (
    AtPressureStructure,
    ConstrainedStructure,
    FixedCellStructure,
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
]
__all__ += ["require_sound"]

Params = Mapping[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linearization(Portable, Named):
    """A minimum ready to be differentiated; every call on a minimum takes one in place of it.

    Attributes:
      equilibrium: the minimum.
      system: its backbone, the contacts of rattlers deleted: derivatives are of its energy.
      network: contacts, clusters and rattlers.
      null: the null space of the Hessian: translations, rattlers, rotations of free clusters.
      solve: the linear solver.
      structure: which unknowns there are and what is zero at the minimum, see
        :mod:`mdsens.sensitivity.structure`.
      blocks: the Hessian as blocks of pairs, for compiled products with it; None where it is not
        assembled.
      factor: the Hessian on the host with its factor, made when it is first needed; None in traced
        code and for potentials of more than pairs. Under constraints that of the whole system of
        equations.
      force_status: UNCONVERGED where the largest force left is not small beside the mean pair
        force, CONTACTS_UNSETTLED where it does not tell whether particles touch, INDEFINITE where a
        mode of negative stiffness was found; else CONVERGED.
    """

    equilibrium: Equilibrium
    system: System
    network: Network
    null: NullSpace
    solve: Method = dataclasses.field(default=Auto(), metadata={"static": True})
    structure: Structure = FixedCellStructure()
    blocks: BlockRows | None = None
    factor: HessianFactor | KKT | None = dataclasses.field(
        default=None, metadata={"static": True}, compare=False
    )
    force_status: jax.Array | None = None

    @property
    def cell(self) -> Cell | None:
        """The cell that responds to the pressure; None where it is fixed."""
        return getattr(self.structure, "cell", None)

    @property
    def multipliers(self) -> dict[str, jax.Array] | None:
        """Of the equations among the constraints; None without any."""
        return getattr(self.structure, "multipliers", None)

    @property
    def constrained(self) -> bool:
        """Whether the system has constraints."""
        return isinstance(self.structure, ConstrainedStructure)

    @property
    def params(self) -> dict[str, Any]:
        """The parameters that derivatives are taken by: those of the system that no constraint
        relaxes and, where the cell is an unknown, the pressure.
        """
        return self.structure.params(self.system)

    @property
    def unknowns(self) -> Unknowns:
        """The unknowns at the minimum: positions, a strain of zero where the cell is an unknown,
        and what constraints add.
        """
        return self.structure.unknowns(self.system)

    def condition(self, x: Unknowns, params: Params) -> Unknowns:
        """F(x, params), zero at the minimum: dU/dR; at a pressure the derivative of the enthalpy by
        strain as well; under constraints dL/dx and the equations.
        """
        return self.structure.condition(self, x, params)

    def moved(self, system: System, x: Unknowns, params: Params) -> System:
        """A system of this configuration at other unknowns and parameters; traceable, its neighbor
        list stays.
        """
        return self.structure.moved(system, x, params)

    def traced(self, differentiated: Sequence[str]) -> Linearization:
        """The form that compiled code takes: without the host's factor, and with the potential in
        its cheapest form.

        Args:
          differentiated: parameters whose derivatives are to be taken.
        """
        names = [*differentiated, *lagrangian.relaxed(self.system)]
        potential = self.system.potential.at(self.system.params, names)
        return dataclasses.replace(
            self, system=self.system.replace(potential=potential), factor=None
        )

    @property
    def status(self) -> Any:
        """CONVERGED, or why no derivative can be taken here: the minimization's own status,
        UNJAMMED, that of the force left, or the structure's.
        """
        code = _outcome(self.equilibrium.status, self.network.unjammed)
        for more in (self.force_status, self.structure.status):
            xp = jnp if isinstance(code, Tracer) or isinstance(more, Tracer) else np
            code = code if more is None else xp.where(code != Status.CONVERGED.value, code, more)
        return code


def by_factor(system: System, solve: Method, many: bool = False) -> bool:
    """Whether the solver that is asked for takes the sparse factor of H wherever H has one, for one
    solve or many.
    """
    pays = many or system.dimension == 2 or system.n <= ONE_SOLVE_3D
    wanted = isinstance(solve, Direct) or (
        isinstance(solve, Auto) and pays and jax.default_backend() == "cpu"
    )
    return wanted and (bool(system.constraints) or factorizes(system))


def _outcome(status: Any, unjammed: Any) -> Any:
    xp = jnp if isinstance(unjammed, Tracer) else np
    code = xp.where(unjammed, Status.UNJAMMED.value, Status.CONVERGED.value)
    return xp.where(is_good(status), code, status)


@jax.jit
def force_left(system: System, net: Network, largest: Any) -> jax.Array:
    """What the largest force left puts in doubt, of each of a batch: UNCONVERGED where it is not
    small beside the mean pair force, CONTACTS_UNSETTLED where particles touch and it cannot be told
    whether they are in contact.
    """
    if system.batch is not None:
        return jax.vmap(force_left)(system, net, largest)
    code = jnp.where(net.touching, Status.CONTACTS_UNSETTLED.value, Status.CONVERGED.value)
    return jnp.where(
        unrelaxed(system, largest, net.mean_force), Status.UNCONVERGED.value, code
    ).astype(jnp.int32)


def _force_left_of_one(eq: Equilibrium, net: Network) -> Any:
    """``force_left`` of one minimum, which needs the potential's own scales where the contacts do not
    settle it.
    """
    left, mean = np.asarray(eq.max_force), np.asarray(net.mean_force)
    if left <= RELAXED * mean and not np.asarray(net.touching):
        return np.int32(Status.CONVERGED.value)
    return force_left(eq.system, net, eq.max_force)


def linearize(eq: Equilibrium, solve: Method = Auto(), throw: bool = True) -> Linearization:
    """Find the network, the rattlers and the null space of a minimum, once for many derivatives.

    Args:
      eq: from ``minimize``; not a batch.
      solve: an option record of mdsens.implicit: GMRES(), CG(), MINRES(), BiCGSTAB(), Direct() and
        others, or Auto(), which chooses.
      throw: raise where the minimum cannot be differentiated; with False every door's status says
        so.

    Raises:
      ConvergenceError: an unconverged minimum, or one without contacts (UNJAMMED).
    """
    require_sound_jax()
    if not isinstance(eq, Equilibrium):
        raise InputError(
            f"got a {type(eq).__name__}: give the Equilibrium that ms.minimize returns."
        )
    check_method(solve)
    if eq.system.batch is not None:
        raise InputError(
            f"linearize takes one minimum and got a batch of {eq.system.batch}: give a member,"
            " ms.unstack(eq)[0]."
        )
    backbone, net, null = analyze_rigidity(eq.system, eq.max_force, eq.contacts_needed)
    if eq.system.constraints:
        return _constrained(eq, backbone, net, null, solve, throw)
    null = null.simplified()
    factor = HessianFactor(backbone, null, eq.order)
    if eq.order and factor.unstable(eq.order + 1) != eq.order:
        eq = dataclasses.replace(eq, status=jnp.asarray(Status.NOT_A_SADDLE.value, jnp.int32))
    force_status = _force_left_of_one(eq, net)
    # where a factor does not count negative modes at every solve
    examined = bool(np.all(eq.examined)) or eq.order > 0 or by_factor(backbone, solve)
    rigid = not bool(net.unjammed) and np.isfinite(np.asarray(eq.positions)).all()
    if int(force_status) == Status.CONVERGED and not examined and rigid:
        floor = doubtful_stiffness(eq.max_force, natural_units(eq.system)[0])
        if factor.negative_mode(floor) is not None:
            force_status = jnp.asarray(Status.INDEFINITE.value, jnp.int32)
    structure = FixedCellStructure()
    if eq.pressure is not None:
        structure = AtPressureStructure(
            Cell.of(backbone, factor, eq.pressure, np.asarray(eq.strains))
        )
    lin = Linearization(
        equilibrium=eq,
        system=backbone,
        network=net,
        null=null,
        solve=solve,
        structure=structure,
        factor=factor if backbone.potential.pairwise else None,
        force_status=force_status,
    )
    if throw:
        raise_for_status(Status(int(lin.status)), "this minimum cannot be differentiated", lin)
    return lin


def _constrained(
    eq: Equilibrium, backbone: System, net: Network, null: NullSpace, solve: Method, throw: bool
) -> Linearization:
    multipliers = lagrangian.unknowns_of(backbone, eq.multipliers).multipliers
    null = constrained_null_space(backbone, net, null, multipliers)
    factor = KKT(backbone, null, multipliers)
    code = Status.CONVERGED
    if about_to_switch(eq.system, eq.multipliers, null, float(eq.max_force)):
        code = Status.DEGENERATE_CONSTRAINT
    if factor.redundant:
        code = Status.REDUNDANT_CONSTRAINTS
    lin = Linearization(
        equilibrium=eq,
        system=backbone,
        network=net,
        null=null,
        solve=solve,
        structure=ConstrainedStructure(multipliers, jnp.asarray(code.value, jnp.int32)),
        factor=factor,
    )
    if throw:
        raise_for_status(Status(int(lin.status)), "this minimum cannot be differentiated", lin)
    return lin


def linearized(eq: Equilibrium | Linearization, solve: Method | None) -> Linearization:
    """What a door is given, as a Linearization with the solver that is asked for; sound or not, see
    :func:`require_sound`.
    """
    if solve is not None:
        check_method(solve)
    if isinstance(eq, Linearization):
        return eq if solve is None else dataclasses.replace(eq, solve=solve)
    if not isinstance(eq, Equilibrium):
        raise InputError(
            f"got a {type(eq).__name__}: give the Equilibrium that ms.minimize returns, or a"
            " Linearization."
        )
    require_host(
        "what takes an Equilibrium", "call it outside, or differentiate ms.equilibrate there", eq
    )
    return linearize(eq, Auto() if solve is None else solve, throw=False)


def require_sound(lin: Linearization, eq: Equilibrium | Linearization, throw: bool) -> None:
    """Raise where the minimum ``eq`` cannot be differentiated, if ``throw``: after the other
    arguments were looked at, for one who errs in these should not first be told of contacts.

    A Linearization was asked for with or without an error of its own.
    """
    if throw and isinstance(eq, Equilibrium):
        raise_for_status(Status(int(lin.status)), "this minimum cannot be differentiated", lin)


def full_tangent(system: System, dparams: Params, params: Params | None = None) -> dict[str, Any]:
    """A full dict of parameter changes from a partial one, checked; of a Linearization's ``params``
    where given.
    """
    given, valid = changes(system, dparams, params), system.params if params is None else params
    return {k: given[k] if k in given else np.zeros(v.shape, v.dtype) for k, v in valid.items()}


def changes(system: System, dparams: Params, params: Params | None = None) -> dict[str, Any]:
    """Changes of some parameters, checked; of a Linearization's ``params`` where they are given."""
    valid = system.params if params is None else params
    paired = {parameter.name for parameter in parameters_of(system, valid) if parameter.paired}
    if not isinstance(dparams, Mapping):
        raise InputError(
            f"dparams is a {type(dparams).__name__}: give a dict of parameter names and their"
            " changes."
        )
    for name, change in dparams.items():
        if name not in valid:
            near = difflib.get_close_matches(str(name), valid, n=1)
            hint = (
                f"did you mean {near[0]!r}?" if near else f"it has {', '.join(map(repr, valid))}."
            )
            if name == "pressure":
                hint = (
                    "this cell is given; one that follows a pressure is relaxed by"
                    " ms.minimize(system, pressure=P)."
                )
            raise InputError(f"{name!r} is no parameter of {system.potential.name}: {hint}")
        given = real_array(f"dparams[{name!r}]", change)
        want, got = valid[name].shape, given.shape
        if want != got:
            raise InputError(
                f"dparams[{name!r}] has shape {got}: the parameter has {want}, give that."
            )
        if not isinstance(given, Tracer) and not np.isfinite(np.asarray(given, float)).all():
            raise InputError(f"dparams[{name!r}] is not finite: give finite changes.")
    found = {}
    for name, change in dparams.items():
        given = real_array(f"dparams[{name!r}]", change)
        given = check_symmetric(f"dparams[{name!r}]", given) if name in paired else given
        found[name] = given.astype(valid[name].dtype)
    return found
