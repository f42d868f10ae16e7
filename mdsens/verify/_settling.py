"""Newton steps that reduce the force left at a minimum to round-off, before finite differences.

A minimizer stops at a tolerance, and the force that it leaves is in the softest modes. Near jamming
a force of 1e-14 displaces positions by 1e-10. This is 1e-4 of the change of the positions over a
parameter step of 1e-6. A finite difference over half that step has the same error, because the
minimizer takes the same path, so that a comparison of the two differences does not show the error.
The Newton steps remove the force first. They use the Hessian of a minimum nearby. The positions at
which dU/dR = 0 (U is the energy, R the positions) do not depend on the matrix of the steps: with a
wrong Hessian the steps converge slowly, but to the same positions. The step that remains at the end
is the round-off of the positions.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.compilation import as_jax, compiled
from mdsens.mechanics import contacts, lagrangian
from mdsens.mechanics.hessian_factor import HessianFactor
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.box import FixedBox
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity.certificate.solution_space import Space, on_host
from mdsens.sensitivity.linearization import Linearization

__all__ = ["Settled", "Settling"]

# Largest number of steps; from a minimizer's tolerance it takes two or three.
STEPS = 8
# A step that is not shorter than this share of the previous one is round-off.
FALLS = 0.5
# Relative tolerance of an iterative solve: each step is then shorter than the previous one by this
# factor.
RTOL = 1e-4


class Settled(NamedTuple):
    """An energy minimum at which Newton steps have reduced the forces to round-off.

    Attributes:
      equilibrium: the minimum; its ``status`` and ``steps`` describe the minimizer's run before the
        Newton steps.
      rest: a last Newton step, which is not taken, since the steps no longer get shorter: its size
        is that of the round-off of the positions. It has the form of a derivative by ``jvp``:
        positions (n, d), and the strain of the cell, multipliers and parameters where these are
        relaxed, too.
      force: the largest force that remains on a particle.
    """

    equilibrium: Equilibrium
    rest: Unknowns
    force: float


@compiled
def _forces_left(lin: Linearization) -> Unknowns:
    """Evaluate the negative condition of a minimum, which is zero there, at its configuration.

    In a fixed cell without constraints, the condition is dU/dR: the gradient of the energy U by the
    positions R. The result is then the forces. Coordinates that constraints fix are zero.
    """
    negative = jax.tree.map(jnp.negative, lin.condition(lin.unknowns, lin.params))
    return lin.null.free(negative)


@compiled
def _public(lin: Linearization, x: Unknowns) -> Unknowns:
    """Convert a change x of the unknowns of a minimum to the form in which ``jvp`` returns changes.

    The unknowns are the positions, and the strain of the cell or the multipliers and parameters
    that are relaxed with the positions. In the form of ``jvp``, the change of the positions
    includes the motion with the cell.
    """
    if not lin.constrained:
        value = lin.structure.stored(lin, x, {})
        return value if isinstance(value, Unknowns) else Unknowns(value)
    structure: Any = lin.structure
    return jax.jvp(lambda y: structure.read(lin, y, lin.params), (lin.unknowns,), (x,))[1]


class Settling:
    """Function that takes Newton steps from a configuration near a minimum to the minimum.

    Args:
      lin: a linearized minimum of the same system at nearly the same parameters. The steps use the
        Hessian, the contact network and the null space of this minimum.
    """

    def __init__(self, lin: Linearization):
        stiffness = lin.factor
        if stiffness is None:
            stiffness = HessianFactor(lin.system, lin.null, lin.equilibrium.order)
        self.lin = lin
        self.space = Space(lin, stiffness)

    def __call__(self, near: Equilibrium) -> Settled:
        """Take Newton steps from the configuration ``near`` until they no longer get shorter.

        The steps end when one is more than half as long as the step before it.

        Args:
          near: a minimum at which a minimizer has left small forces.
        """
        minimum = near
        lin = self._lin_at(minimum)
        step, force = self._newton(lin)
        # Carried along: a minimum, its linearization, and the Newton step from it, not yet taken.
        for _ in range(STEPS):
            next_minimum = self._moved(minimum, lin, step)
            next_lin = self._lin_at(next_minimum)
            next_step, next_force = self._newton(next_lin)
            before = self.space.size(step)
            after = self.space.size(next_step)
            if not after < FALLS * before:
                # Both steps count as round-off, and the larger one is returned as its size.
                step = next_step if after > before else step
                break
            minimum, lin = next_minimum, next_lin
            step, force = next_step, next_force
        return Settled(minimum, _public(lin.traced(()), step), force)

    def _lin_at(self, near: Equilibrium) -> Linearization:
        """Linearize at the minimum ``near``, with the contact network of the reference minimum.

        The reference minimum is the one with which this ``Settling`` was made. The load on the cell
        and the multipliers of constraints are those of ``near``.
        """
        lin = self.lin
        backbone = contacts.backbone(near.system, lin.network)
        structure = lin.structure.at(near, backbone)
        return dataclasses.replace(lin, system=backbone, structure=structure)

    def _newton(self, lin: Linearization) -> tuple[Unknowns, float]:
        """Compute the Newton step from the configuration of ``lin`` to a minimum.

        Args:
          lin: the linearization at the configuration.

        Returns:
          the step, and the largest force on a particle that is not a rattler.
        """
        # The Newton step x solves H x = -F, with F = dU/dR in a fixed cell.
        forces = _forces_left(lin.traced(()))
        rattlers = np.asarray(self.lin.network.rattlers)[:, None]
        norms = np.linalg.norm(np.where(rattlers, 0.0, forces.positions), axis=1)
        return self.space.yields(forces, RTOL)[0], float(np.max(norms, initial=0.0))

    def _moved(self, minimum: Equilibrium, lin: Linearization, step: Unknowns) -> Equilibrium:
        """Add a step to the positions of a minimum, and to its cell or multipliers if relaxed.

        Args:
          minimum: the minimum.
          lin: the linearization at this minimum.
          step: the change of the unknowns: positions, and strain of the cell or multipliers.
        """
        # added by numpy: jax would compile it
        x = jax.tree.map(as_jax, on_host(np.add, lin.unknowns, step))
        system = lin.moved(minimum.system, x, lin.params)
        if lin.cell is not None:
            # ``moved`` does not keep ``orthogonal``, whether the cell is diagonal. The field is
            # static: with another value, jax would compile again.
            cell = FixedBox(jnp.asarray(system.box), minimum.system.boundary.orthogonal)
            return dataclasses.replace(minimum, system=system.replace(boundary=cell))
        if not lin.constrained:
            return dataclasses.replace(minimum, system=system)
        params = lagrangian.own_params(system)
        return dataclasses.replace(
            minimum, system=system, multipliers=lagrangian.multipliers_at(system, x, params)
        )
