"""A minimum found again, brought down to round-off by Newton steps with the Hessian of the minimum
it was found from.

A minimizer stops at a tolerance, and the force that it leaves is in the softest modes. Near jamming
a force of 1e-14 leaves positions off by 1e-10, which is 1e-4 of a difference over a step of 1e-6,
and the same of one over half that step, because the minimizer went the same way there. So the force
left is taken away first. A root of dU/dR = 0 is one whichever matrix the steps were made with: a
wrong Hessian makes them slow, not their end wrong. The step that is still left at the end is what
round-off makes of the positions.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdsens.mechanics import contacts, lagrangian
from mdsens.mechanics.hessian import Unknowns
from mdsens.mechanics.hessian_factor import HessianFactor
from mdsens.model.box import FixedBox
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity._derivative_solve import read
from mdsens.sensitivity.certificate.solution_space import Space
from mdsens.sensitivity.linearization import Linearization

__all__ = ["Settled", "Settling"]

STEPS = 8  # at most; from a minimizer's tolerance it takes two or three
FALLS = 0.5  # of the step before: one that is not shorter than that is round-off
RTOL = 1e-4  # of a solve without a factor: each step is then that much shorter than the one before


class Settled(NamedTuple):
    """A minimum at round-off.

    Attributes:
      equilibrium: the minimum; status and steps are the minimizer's.
      rest: the Newton step left, as the doors give changes.
      force: the largest force left on a particle.
    """

    equilibrium: Equilibrium
    rest: Unknowns
    force: float


@jax.jit
def _condition(lin: Linearization) -> Unknowns:
    return lin.condition(lin.unknowns, lin.params)


@jax.jit
def _public(lin: Linearization, x: Unknowns) -> Unknowns:
    """A change of the unknowns as the doors give it."""
    if lin.constraint_status is None:
        value = lin.stored(x)
        return value if isinstance(value, Unknowns) else Unknowns(value)
    return jax.jvp(lambda y: read(lin, y, lin.params), (lin.unknowns,), (x,))[1]


class Settling:
    """Newton steps to a minimum from near it.

    Args:
      lin: a minimum of the same system at nearly the same parameters, whose Hessian, network and
        null space they take.
    """

    def __init__(self, lin: Linearization):
        stiffness = lin.stiffness
        if stiffness is None:
            stiffness = HessianFactor(lin.system, lin.null, lin.equilibrium.order)
        self.lin, self.space = lin, Space(lin, stiffness)

    def __call__(self, there: Equilibrium) -> Settled:
        at = self._lin_at(there)
        step, force = self._newton(at)
        for _ in range(STEPS):
            beside = self._moved(there, at, step)
            its_lin = self._lin_at(beside)
            its_step, its_force = self._newton(its_lin)
            before, after = self.space.size(step), self.space.size(its_step)
            if not after < FALLS * before:
                step = its_step if after > before else step
                break
            there, at, step, force = beside, its_lin, its_step, its_force
        return Settled(there, _public(at.traced(()), step), force)

    def _lin_at(self, there: Equilibrium) -> Linearization:
        """The condition at a configuration, on the network of the minimum between."""
        lin = self.lin
        backbone = contacts.backbone(there.system, lin.network)
        cell = None if lin.cell is None else dataclasses.replace(lin.cell, pressure=there.pressure)
        multipliers = lin.multipliers
        if multipliers is not None:
            multipliers = lagrangian.unknowns_of(backbone, there.multipliers).multipliers
        return dataclasses.replace(lin, system=backbone, cell=cell, multipliers=multipliers)

    def _newton(self, eq: Linearization) -> tuple[Unknowns, float]:
        """The step to the minimum, and the largest force that is left here."""
        forces = self.lin.null.free(jax.tree.map(jnp.negative, _condition(eq.traced(()))))
        loose = np.asarray(self.lin.network.rattlers)[:, None]
        largest = float(
            np.max(np.linalg.norm(np.where(loose, 0.0, forces.positions), axis=1), initial=0.0)
        )
        return self.space.yields(forces, RTOL)[0], largest

    def _moved(self, there: Equilibrium, eq: Linearization, step: Unknowns) -> Equilibrium:
        x = jax.tree.map(jnp.add, eq.unknowns, step)
        system = eq.moved(there.system, x, eq.params)
        if eq.cell is not None:
            cell = FixedBox(jnp.asarray(system.box), there.system.boundary.orthogonal)
            return dataclasses.replace(there, system=system.replace(boundary=cell))
        if eq.constraint_status is None:
            return dataclasses.replace(there, system=system)
        own = lagrangian.own_params(system)
        return dataclasses.replace(
            there, system=system, multipliers=lagrangian.multipliers_at(system, x, own)
        )
