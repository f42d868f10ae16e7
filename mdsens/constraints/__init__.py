"""What a configuration must obey while its energy is least: pinned coordinates, walls, rigid bonds,
fixed totals.

A constraint is a record that a :class:`~mdsens.System` holds. What it needs in numbers (a wall's
position, a bond's length) are parameters of the system beside the potential's, so that derivatives by
them are asked for like any other. Each has a multiplier under its name: the force that it takes to
hold it.

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
