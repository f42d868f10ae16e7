"""Whether a sensitivity can be trusted: is the minimum one, is it stable, how wrong can its derivative be, how far does
it reach.

Every figure is computed at the minimum as it is. The bounds of the error are estimates: the constants in them hold
along the way to the true minimum, and are taken where it starts.
"""

from mdsens.certificate._certify import certify
from mdsens.certificate._parts import CellState, ConstraintState, Derivative, StrainState
from mdsens.certificate._record import Certificate

__all__ = ["CellState", "Certificate", "ConstraintState", "Derivative", "StrainState", "certify"]
