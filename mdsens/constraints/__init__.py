"""Constraints on a relaxed configuration: pinned coordinates, walls, rigid bonds, fixed totals.

A constraint is a record in the ``constraints`` of a :class:`~mdsens.System`. The numbers it needs
(a wall's position, a bond's length) are parameters of the system beside the potential's, so that
derivatives by them are taken like any others. Each has a multiplier under its name: the force that
maintains the constraint.

    L = U(R, p) + sum_k lambda_k g_k(R, p),   dL/dR = 0,   g = 0,   lower <= R <= upper

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
