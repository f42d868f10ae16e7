"""Constraints on a relaxed configuration: pinned coordinates, walls, rigid bonds, fixed totals.

A constraint is an object in the ``constraints`` of a :class:`~mdsens.System`. The numbers that it
needs (a wall's position, a bond's length) are parameters of the system, like those of the
potential, so that derivatives by them are taken in the same way. Each constraint has a Lagrange
multiplier, stored under the constraint's name: the force that maintains the constraint.

    L = U(R, p) + sum_k lambda_k g_k(R, p),   dL/dR = 0,   g = 0,   lower <= R <= upper

L is the Lagrangian, U the energy, R are the positions, p the parameters, lambda_k the multipliers,
and g_k the residuals of the constraints. Walls give the bounds of R instead, and pinned coordinates
keep their values.
Nocedal and Wright, Numerical Optimization, 2006, chapter 12.
"""

from mdsens.constraints.base import Bounds, Constraint, check_constraints
from mdsens.constraints.positions import Pinned, RigidBonds, Wall
from mdsens.constraints.totals import FixedTotal, Simplex

__all__ = [
    "Bounds",
    "Constraint",
    "FixedTotal",
    "Pinned",
    "RigidBonds",
    "Simplex",
    "Wall",
    "check_constraints",
]
